//! Two hosts with four disks each, one box: every disk of both is there as it was, and so is an older moment of each host.
//!
//! The hosts are two agents on this machine, each with its own identity, state and capture in the kernel; their disks are loop
//! disks. Both write at the same time.

use anyhow::{Context, Result};
use hw_tests::{
    Draw, Scratch, compare,
    disk::{self, LoopDisk, Workload},
    process::wait_for,
    product::{Agent, Appliance, At, Binaries},
    skip,
};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

const DISKS: usize = 4;
const DISK_BYTES: u64 = 24 << 20;
const LIMIT: Duration = Duration::from_secs(120);
/// The other tests of this machine press it, and an agent that heeds that would copy too slowly for a test.
const CONFIG: &str = "ring_mib = 16\nspool_memory_mib = 16\nspool_mib = 32\nmemory_mib = 64\nheed_pressure = false\n";

struct Host {
    group: String,
    agent: Agent,
    disks: Vec<LoopDisk>,
    workloads: Vec<Workload>,
}

impl Host {
    fn start(bins: &Binaries, appliance: &Appliance, dir: &Path, number: u64) -> Result<Self> {
        let group = format!("host{number}");
        let setup = hw_tests::product::Setup { config: CONFIG, ..Default::default() };
        let agent = Agent::start_with(bins, &dir.join(&group), appliance, setup)?;
        let mut disks = Vec::new();
        for disk in 0..DISKS {
            disks.push(LoopDisk::create(&dir.join(format!("{group}-{disk}.img")), DISK_BYTES)?);
        }
        // Two with file systems, two without.
        for (i, disk) in disks[..2].iter_mut().enumerate() {
            disk.make_ext4()?;
            disk.mount(&dir.join(format!("{group}-{i}")))?;
        }
        let mut this = Self { group, agent, disks, workloads: Vec::new() };
        this.write_raw(number)?;
        this.work(number);
        let devices: Vec<String> = this.disks.iter().map(|d| d.device().to_string_lossy().into_owned()).collect();
        let mut protect = vec!["protect", "--group", &this.group];
        protect.extend(devices.iter().map(String::as_str));
        this.agent.run_cli(&protect)?;
        Ok(this)
    }

    fn work(&mut self, seed: u64) {
        let start = |(i, d): (usize, &LoopDisk)| {
            Some(Workload::start(d.mount_point()?, seed * 10 + i as u64, Duration::from_millis(5)))
        };
        self.workloads = self.disks.iter().enumerate().filter_map(start).collect();
    }

    fn write_raw(&self, seed: u64) -> Result<()> {
        let mut draw = Draw::new(seed);
        for disk in &self.disks[2..] {
            let file = fs::OpenOptions::new().write(true).open(disk.device())?;
            for _ in 0..40 {
                let mut bytes = vec![0; 16384];
                draw.fill(&mut bytes);
                file.write_all_at(&bytes, draw.below(DISK_BYTES / 16384) * 16384)?;
            }
            file.sync_all()?;
        }
        Ok(())
    }

    /// The host is at rest: a moment is named, and copies of the disks are what it must show.
    fn hold(&mut self, appliance: &Appliance, name: &str, dir: &Path) -> Result<Vec<PathBuf>> {
        for workload in &mut self.workloads {
            workload.stop()?;
        }
        self.workloads.clear();
        for disk in &mut self.disks[..2] {
            disk.freeze()?;
        }
        // The box must have heard of everything: the agent's bookmark goes through its stream.
        self.agent.run_cli(&["bookmark", name, "--group", &self.group])?;
        let mut copies = Vec::new();
        for (i, disk) in self.disks.iter().enumerate() {
            let copy = dir.join(format!("{}-{name}-{i}.img", self.group));
            disk::copy_sparse(disk.backing(), &copy)?;
            copies.push(copy);
        }
        for disk in &mut self.disks[..2] {
            disk.thaw()?;
        }
        appliance.group(&self.group).context("the group is there")?;
        Ok(copies)
    }

    fn verify(&self, appliance: &Appliance, name: &str, copies: &[PathBuf]) -> Result<()> {
        let view = appliance.view(&self.group, &At::Bookmark(name.into()))?;
        assert_eq!(view.exports.len(), DISKS, "{:?}", view.exports);
        for (disk, copy) in self.disks.iter().zip(copies) {
            let device = disk.device().file_name().context("a device has a name")?.to_string_lossy().into_owned();
            let export = view.exports.iter().find(|e| e.volume_name.ends_with(&device));
            let export = export.with_context(|| format!("no volume of {device} in {:?}", view.exports))?;
            let difference = compare::export_with_file(&mut export.connect()?, copy)?;
            assert_eq!(difference.map(|d| d.to_string()), None, "{}, {name}, {device}", self.group);
        }
        view.close()
    }
}

#[test]
fn two_hosts_with_four_disks_each_are_kept_bit_for_bit() -> Result<()> {
    if let Err(why) = disk::loop_disks_work().and_then(|()| disk::capture_works()) {
        skip(format!("two hosts with four disks each: {why}"));
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let dir = scratch.path().to_owned();
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.join("box"))?;
    let mut hosts = Vec::new();
    for number in 1..=2 {
        hosts.push(Host::start(&bins, &appliance, &dir, number)?);
    }
    for host in &hosts {
        appliance.wait_state(&host.group, "replicating", LIMIT)?;
    }
    let steps: Vec<u64> = hosts.iter().flat_map(|h| &h.workloads).map(Workload::steps).collect();
    wait_for("all four workloads to get on", LIMIT, || {
        let now = hosts.iter().flat_map(|h| &h.workloads).map(Workload::steps);
        Ok(now.zip(&steps).all(|(now, then)| now > then + 30).then_some(()))
    })?;
    let first: Vec<_> = hosts.iter_mut().map(|h| h.hold(&appliance, "first", &dir)).collect::<Result<_>>()?;
    for (number, host) in hosts.iter_mut().enumerate() {
        host.work(100 + number as u64);
        host.write_raw(200 + number as u64)?;
    }
    wait_for("all four workloads to get on", LIMIT, || {
        Ok(hosts.iter().flat_map(|h| &h.workloads).all(|w| w.steps() > 30).then_some(()))
    })?;
    let second: Vec<_> = hosts.iter_mut().map(|h| h.hold(&appliance, "second", &dir)).collect::<Result<_>>()?;
    for (host, (first, second)) in hosts.iter().zip(first.iter().zip(&second)) {
        host.verify(&appliance, "first", first)?;
        host.verify(&appliance, "second", second)?;
    }
    for host in &mut hosts {
        host.agent.stop()?;
    }
    appliance.stop()?;
    drop(hosts);
    scratch.done()
}
