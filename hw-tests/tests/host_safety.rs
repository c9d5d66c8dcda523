//! Nothing that happens to the agent, the network or the box may hold up or fail the host's own I/O; and when it is over, box and
//! disk agree again and the history from before is whole.
//!
//! The host is this machine: a loop disk with ext4 and a workload that fails at the first error of a system call. Each test harms
//! one part *while* the workload runs, insists that the workload gets on meanwhile, mends it, waits until the group is in step,
//! and compares the newest moment and an old one with copies of the disk, byte by byte.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch, compare,
    disk::{self, LoopDisk, Workload, check_ext4},
    net::{self, Cable},
    process::wait_for,
    product::{Agent, Appliance, At, Binaries, Moment, Setup},
    skip,
};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

const GROUP: &str = "host";
const DISK_BYTES: u64 = 192 << 20;
/// Of that, bytes which never change: sending them again would show.
const STILL_BYTES: u64 = 96 << 20;
const LIMIT: Duration = Duration::from_secs(120);
/// Small buffers: what takes a day on a server takes a second here. Pressure is not heeded, for the other tests of this machine
/// would make the agent mark instead of spool.
const SMALL: &str = "ring_mib = 1\nspool_memory_mib = 8\nspool_mib = 16\nmemory_mib = 64\nheed_pressure = false\n";
const PAUSE: Duration = Duration::from_millis(2);
/// Steps of the workload that show that the host gets on: some write, some fsync.
const STEPS: u64 = 40;

/// A host under load, protected, with a moment to come back to.
struct Scene {
    scratch: Scratch,
    appliance: Appliance,
    // Dropped in this order: who uses the disk goes before it.
    workload: Workload,
    agent: Agent,
    disk: LoopDisk,
    before: Held,
}

/// A moment and what the disk was then.
struct Held {
    moment: Moment,
    oracle: PathBuf,
}

/// Why these tests cannot run here, if they cannot.
fn missing() -> Option<String> {
    [disk::loop_disks_work(), disk::capture_works(), net::cables_work()].into_iter().find_map(Result::err)
}

impl Scene {
    fn set(config: &str, seed: u64) -> Result<Self> {
        let scratch = Scratch::new()?;
        let dir = scratch.path().to_owned();
        let bins = Binaries::beside_us()?;
        let cable = Cable::new()?;
        let appliance = Appliance::start_on(&bins, &dir.join("box"), &cable.address().to_string())?;
        let setup = Setup { config, cable: Some(cable), ..Setup::default() };
        let agent = Agent::start_with(&bins, &dir.join("agent"), &appliance, setup)?;
        let mut disk = LoopDisk::create(&dir.join("disk.img"), DISK_BYTES)?;
        disk.make_ext4()?;
        disk.mount(&dir.join("mnt"))?;
        write_still(&dir.join("mnt/still"), seed)?;
        let workload = Workload::start(&dir.join("mnt"), seed, PAUSE);
        agent.protect(disk.device(), GROUP)?;
        appliance.wait_state(GROUP, "replicating", LIMIT)?;
        let before = hold(&appliance, &mut disk, "before", &dir)?;
        Ok(Self { scratch, appliance, agent, disk, workload, before })
    }

    /// Bytes of data in the journal.
    fn journalled(&self) -> Result<u64> {
        self.appliance.group(GROUP)?["payload_bytes"].as_u64().context("no payload_bytes")
    }

    /// Waits until the workload has come on, which it cannot while a system call of it waits for us.
    fn host_gets_on(&mut self) -> Result<()> {
        let from = self.workload.steps();
        wait_for("the host to get on", LIMIT, || {
            self.workload.check()?;
            Ok((self.workload.steps() >= from + STEPS).then_some(()))
        })
    }

    /// As long as it takes until the host has written `bytes` to its disk.
    fn host_writes(&mut self, bytes: u64) -> Result<()> {
        let written = |disk: &LoopDisk| -> Result<u64> {
            let name = disk.device().file_name().context("a device without a name")?.to_string_lossy().into_owned();
            let stat = fs::read_to_string(format!("/sys/block/{name}/stat"))?;
            let sectors: u64 = stat.split_whitespace().nth(6).context("a short stat line")?.parse()?;
            Ok(sectors * 512)
        };
        let from = written(&self.disk)?;
        wait_for("the host to write", LIMIT, || {
            self.workload.check()?;
            Ok((written(&self.disk)? >= from + bytes).then_some(()))
        })
    }

    /// Until moments can be named again. What the box shows is not proof: it may not have heard yet that the agent had to mark.
    fn wait_in_step(&self) -> Result<()> {
        let (log, mut refused) = (self.agent.log_path(), None);
        let waited = wait_for("the group to be in step", LIMIT, || {
            let group = self.appliance.group(GROUP)?;
            if group["state"] != "replicating" {
                return Ok(None);
            }
            let named = self.appliance.bookmark(GROUP, &format!("in step at step {}", self.workload.steps()));
            Ok(named.map_err(|e| refused = Some(e)).ok())
        });
        waited.with_context(|| format!("{refused:?}; see {}", log.display())).map(drop)
    }

    /// Everything is well again: both moments are what the disk was, the newest one's file system is whole, and nothing of ours
    /// stays in the kernel when the agent is removed.
    fn end(mut self) -> Result<()> {
        self.wait_in_step()?;
        let dir = self.scratch.path().to_owned();
        let after = hold(&self.appliance, &mut self.disk, "after", &dir)?;
        self.host_gets_on()?;
        self.workload.stop()?;
        for held in [&self.before, &after] {
            let view = self.appliance.view(GROUP, &At::Lsn(held.moment.lsn))?;
            let difference = compare::export_with_file(&mut view.only()?.connect()?, &held.oracle)?;
            assert_eq!(difference.map(|d| d.to_string()), None, "moment {:?}", held.moment.name);
            view.close()?;
        }
        check_ext4(&after.oracle, true)?;
        self.agent.stop()?;
        self.agent.run_cli(&["remove"])?;
        ensure!(!self.agent.pins().exists(), "{} is still there", self.agent.pins().display());
        self.disk.unmount()?;
        self.appliance.stop()?;
        self.scratch.done()
    }
}

/// A file that no zero-skipping and no compression makes smaller.
fn write_still(path: &Path, seed: u64) -> Result<()> {
    let (mut draw, mut block) = (Draw::new(seed ^ 0x5711), vec![0; 1 << 20]);
    let mut file = fs::File::create(path)?;
    for _ in 0..STILL_BYTES / block.len() as u64 {
        draw.fill(&mut block);
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

/// Names a moment of a disk that is held still, and keeps what it was then.
fn hold(appliance: &Appliance, disk: &mut LoopDisk, name: &str, dir: &Path) -> Result<Held> {
    let oracle = dir.join(format!("{name}.img"));
    disk.freeze()?;
    let moment = appliance.bookmark(GROUP, name);
    let copied = disk::copy_sparse(disk.backing(), &oracle);
    disk.thaw()?;
    copied?;
    Ok(Held { moment: moment?, oracle })
}

/// An agent that does not run for a while: stopped by a debugger, starved, swapped out.
#[test]
fn a_stopped_agent_does_not_hold_up_its_host() -> Result<()> {
    if let Some(why) = missing() {
        skip(why);
        return Ok(());
    }
    let mut scene = Scene::set(SMALL, 1)?;
    scene.agent.program()?.signal(libc::SIGSTOP)?;
    scene.host_gets_on()?;
    // Several times what ring and spools hold: capture overflows while nobody reads it.
    scene.host_writes(16 << 20)?;
    scene.agent.program()?.signal(libc::SIGCONT)?;
    scene.end()
}

/// Packets stop arriving; nothing is refused and nothing closed.
#[test]
fn a_pulled_cable_does_not_hold_up_the_host() -> Result<()> {
    if let Some(why) = missing() {
        skip(why);
        return Ok(());
    }
    let mut scene = Scene::set(SMALL, 2)?;
    scene.agent.cable()?.pull()?;
    scene.host_gets_on()?;
    scene.host_writes(40 << 20)?;
    scene.agent.cable()?.plug()?;
    scene.end()
}

/// The box is away for longer than the spools last, and comes back with the disk it had.
#[test]
fn a_box_that_is_gone_for_long_does_not_hold_up_the_host_and_is_not_sent_everything() -> Result<()> {
    if let Some(why) = missing() {
        skip(why);
        return Ok(());
    }
    let mut scene = Scene::set(SMALL, 3)?;
    let before = scene.journalled()?;
    scene.appliance.kill()?;
    scene.host_gets_on()?;
    scene.host_writes(40 << 20)?;
    // Quiet from here on, so that what is sent is what happened meanwhile and nothing else.
    scene.workload.stop()?;
    scene.appliance.run()?;
    scene.wait_in_step()?;
    let sent = scene.journalled()?.saturating_sub(before);
    ensure!(sent < STILL_BYTES, "{sent} bytes were sent after the pause: what did not change was among them");
    scene.workload = Workload::start(&scene.scratch.path().join("mnt"), 5, PAUSE);
    scene.end()
}

/// Killed again and again, as the kernel does with what takes too much memory.
#[test]
fn an_agent_killed_again_and_again_does_not_hold_up_its_host() -> Result<()> {
    if let Some(why) = missing() {
        skip(why);
        return Ok(());
    }
    let mut scene = Scene::set(SMALL, 4)?;
    for _ in 0..4 {
        scene.agent.kill()?;
        scene.host_gets_on()?;
        scene.agent.run()?;
        scene.host_gets_on()?;
    }
    scene.end()
}
