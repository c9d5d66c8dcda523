//! What a synchronous write costs: a mirrored volume of ours beside DRBD (protocol C) and md raid1 over NBD, in one guest.
//!
//! One guest in software emulation, one kernel: every far side is reached over the guest's own loopback and lies on a disk of its own, so the
//! network costs all the same, and only ratios mean anything. Ours is the whole product: agent, TLS, a box with its journal. DRBD's far side is
//! a second resource of the same kernel; md's is `qemu-nbd`. A figure is what a write of 4 KiB and its flush take on the volume; the systems take turns.

use super::Results;
use crate::deps::GUEST_KERNEL;
use anyhow::{Context, Result};
use hw_tests::{
    guest::{Guest, Initramfs, Kernel},
    process::wait_for,
    product::Binaries,
    tools,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

const STEP_MAX: Duration = Duration::from_secs(120);
/// vda: both plain volumes; vdb: the box; vdc, vdd: DRBD; vde, vdf: md.
const DISKS_MIB: [u64; 6] = [64, 1024, 64, 64, 64, 64];
const AGENT: &str = "/programs/holdfast-agent --config /etc/agent.toml";
const DRBD: &str = "/programs/drbdsetup-84";
const ROUNDS: usize = 3;

const PLAIN: &str = "plain volume";
/// What is measured, and on which device.
const SYSTEMS: [(&str, &str); 4] = [
    (PLAIN, "/dev/mapper/plain"),
    ("Holdfast, sync", "/dev/mapper/data"),
    ("DRBD 8.4, protocol C", "/dev/drbd0"),
    ("md raid1 and NBD", "/dev/md0"),
];

pub fn run(bins: &Binaries, dir: &Path, cache: &Path, quick: bool, results: &mut Results) -> Result<()> {
    let kernel = Kernel::debian(GUEST_KERNEL, cache)?;
    let dir = dir.join("mirror");
    fs::create_dir_all(&dir)?;
    let mut guest = boot(bins, &kernel, &dir)?;
    let mut there: Vec<(&str, &str)> = vec![SYSTEMS[0]];
    let plain = volumes(&mut guest);
    plain.context("two volumes of the device mapper")?;
    for (system, set_up) in [
        (SYSTEMS[1], holdfast as fn(&mut Guest) -> Result<()>),
        (SYSTEMS[2], drbd as fn(&mut Guest) -> Result<()>),
        (SYSTEMS[3], raid as fn(&mut Guest) -> Result<()>),
    ] {
        match set_up(&mut guest) {
            Ok(()) => there.push(system),
            Err(e) => results.failed(&format!("sync latency of {}", system.0), &e),
        }
    }
    let count = if quick { 60 } else { 250 };
    let mut samples: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (name, device) in &there {
            let said = sh(&mut guest, &format!("/programs/guest-load latency {device} {count}"))?;
            let value: Value = serde_json::from_str(&said).with_context(|| format!("guest-load said {said:?}"))?;
            let us = |key: &str| value[key].as_f64().with_context(|| format!("no {key} in {said}"));
            samples.entry(name).or_default().push((us("p50_us")?, us("p99_us")?));
        }
    }
    let median = |name: &str, pick: fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = samples.get(name).into_iter().flatten().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let own = (median(PLAIN, |s| s.0), median(PLAIN, |s| s.1));
    for (name, _) in there {
        let (half, most) = (median(name, |s| s.0), median(name, |s| s.1));
        results.fact(
            format!("synced write of 4 KiB in one emulated guest, far side over its loopback: {name}"),
            format!(
                "p50 {:.2} × the plain volume, p99 {:.2} × ({:.2} ms and {:.2} ms; median of {ROUNDS} rounds of {count})",
                half / own.0.max(1.0),
                most / own.1.max(1.0),
                half / 1000.0,
                most / 1000.0
            ),
        );
    }
    guest.power_off()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn sh(guest: &mut Guest, line: &str) -> Result<String> {
    guest.sh(line, STEP_MAX)
}

fn boot(bins: &Binaries, kernel: &Kernel, dir: &Path) -> Result<Guest> {
    let mut initramfs = Initramfs::new(kernel)?;
    for module in ["dm-mod", "dm-mirror", "nbd", "md_mod", "raid1", "drbd"] {
        initramfs.module(kernel, module)?;
    }
    for tool in ["mke2fs", "dmsetup", "mdadm", "qemu-nbd", "nbd-client", "drbdmeta"] {
        initramfs.program(&tools::need(tool)?)?;
    }
    let beside = bins.agent.parent().context("the programs are in no folder")?;
    for program in [&bins.agent, &bins.holdfast, &bins.holdfastd, &beside.join("guest-load")] {
        initramfs.program(program)?;
    }
    // The one that speaks to the kernel's own DRBD; drbdsetup itself is for DRBD 9.
    initramfs.program(Path::new("/lib/drbd/drbdsetup-84"))?;
    initramfs.file("etc/agent.toml", 0o600, b"state_dir = \"/var/agent\"\nheed_pressure = false\n".to_vec());
    let config = "data = \"/box/data\"\nnames = [\"localhost\"]\nlisten = \"127.0.0.1:7440\"\nnbd_listen = \"127.0.0.1:7441\"\n\
                  metrics_listen = \"127.0.0.1:7442\"\n";
    initramfs.file("etc/box.toml", 0o600, config.as_bytes().to_vec());
    let mut args = Vec::new();
    for (i, mib) in DISKS_MIB.iter().enumerate() {
        let file = dir.join(format!("disk{i}.img"));
        fs::File::create(&file)?.set_len(mib << 20)?;
        args.push("-drive".to_owned());
        args.push(format!("file={},if=virtio,format=raw,cache=writeback", file.display()));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Guest::boot(kernel, &initramfs, &dir.join("guest"), &args)
}

fn volumes(guest: &mut Guest) -> Result<()> {
    let half = DISKS_MIB[0] << 10;
    for (name, start) in [("plain", 0), ("data", half)] {
        sh(
            guest,
            &format!(
                "/programs/dmsetup create {name} --noudevsync --table '0 {half} linear /dev/vda {start}' && /programs/dmsetup mknodes"
            ),
        )?;
    }
    Ok(())
}

fn holdfast(guest: &mut Guest) -> Result<()> {
    sh(guest, "mkdir -p /var/agent /box && /programs/mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /box")?;
    sh(guest, "(/programs/holdfastd --config /etc/box.toml >/tmp/box.log 2>&1 &)")?;
    sh(
        guest,
        "n=0; while ! grep -q READY /tmp/box.log && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; grep -q READY /tmp/box.log || { cat /tmp/box.log; false; }",
    )?;
    let said = sh(guest, "/programs/holdfast --socket /box/data/run/control.sock host token --json")?;
    let answer: Value = serde_json::from_str(&said).with_context(|| format!("the box said {said:?}"))?;
    let token = answer["token"].as_str().with_context(|| format!("no token in {answer}"))?;
    sh(guest, &format!("{AGENT} enrol --box 127.0.0.1:7440 --token {token}"))?;
    sh(guest, &format!("({AGENT} run >/tmp/agent.log 2>&1 &)"))?;
    sh(
        guest,
        "n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -S /var/agent/agent.sock ]",
    )?;
    sh(guest, &format!("{AGENT} protect --sync /dev/mapper/data --group data"))?;
    wait_for("the mirror to be in step", STEP_MAX, || {
        let status: Value = serde_json::from_str(&sh(guest, &format!("{AGENT} status --json"))?)?;
        let group = &status["groups"][0];
        Ok((group["state"] == "replicating" && group["gate"] == "sync").then_some(()))
    })
}

/// Two resources of one kernel, each the other's peer.
fn drbd(guest: &mut Guest) -> Result<()> {
    sh(
        guest,
        "echo disabled >/sys/module/drbd/parameters/usermode_helper; mkdir -p /var/lib/drbd /var/run/drbd /var/lock",
    )?;
    for (minor, disk, own, peer) in [(0, "/dev/vdc", 7788, 7789), (1, "/dev/vdd", 7789, 7788)] {
        sh(guest, &format!("yes yes | /programs/drbdmeta --force {minor} v08 {disk} internal create-md"))?;
        sh(
            guest,
            &format!(
                "{DRBD} new-resource r{minor} && {DRBD} new-minor r{minor} {minor} 0 && {DRBD} attach {minor} {disk} {disk} internal"
            ),
        )?;
        sh(guest, &format!("{DRBD} connect r{minor} ipv4:127.0.0.1:{own} ipv4:127.0.0.1:{peer} --protocol=C"))?;
    }
    let state = |guest: &mut Guest, what: &str| sh(guest, &format!("{DRBD} {what} 0"));
    wait_for("both sides to be connected", STEP_MAX, || {
        Ok(state(guest, "cstate")?.contains("Connected").then_some(()))
    })?;
    // Both are new and empty: nothing to copy.
    sh(guest, &format!("{DRBD} new-current-uuid --clear-bitmap 0 && {DRBD} primary 0"))?;
    wait_for("both sides to be whole", STEP_MAX, || {
        Ok(state(guest, "dstate")?.contains("UpToDate/UpToDate").then_some(()))
    })?;
    sh(guest, "[ -b /dev/drbd0 ]").map(drop)
}

/// One leg here, the other behind NBD.
fn raid(guest: &mut Guest) -> Result<()> {
    sh(
        guest,
        "(/programs/qemu-nbd --persistent --format=raw --cache=none --bind=127.0.0.1 --port=10809 /dev/vdf >/tmp/nbd.log 2>&1 &)",
    )?;
    sh(
        guest,
        "n=0; until /programs/nbd-client 127.0.0.1 10809 /dev/nbd7 >/tmp/nbd-client.log 2>&1 || [ $n -gt 20 ]; do n=$((n+1)); sleep 1; done; cat /tmp/nbd-client.log; [ $(blockdev --getsz /dev/nbd7) -gt 0 ]",
    )?;
    sh(guest, "yes | /programs/mdadm --create /dev/md0 --level=1 --raid-devices=2 --assume-clean --bitmap=internal --metadata=1.2 /dev/vde /dev/nbd7").map(drop)
}
