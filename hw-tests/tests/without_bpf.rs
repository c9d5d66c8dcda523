//! Capture on hosts whose kernel refuses BPF: volumes of the device mapper are captured at mirrors, and the host waits for nobody.
//!
//! The refusal is the kernel's own: lockdown in mode confidentiality, which lets no BPF program read its memory. A kernel that has no type
//! information refuses too; an old one is served by the backend made for it.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch,
    disk::check_ext4,
    dm_host::{AGENT, DISK_BYTES, Host, Kind, STEP_MAX, assert_identical, cache, kernel},
    guest::{BOOKWORM_BACKPORTS, BULLSEYE_SECURITY, Kernel, Release, UBUNTU_4_18},
    process::{self, wait_for},
    product::{Appliance, At, Binaries},
};
use serde_json::Value;
use std::path::Path;

/// Moments opened of one running host.
const CUTS: u64 = 8;
/// Each number reaches file A before it reaches file B.
const A_BEFORE_B: &str = "i=1; while [ $i -le 20 ]; do for f in A B; do printf %020d $i >/tmp/n; dd if=/tmp/n of=/mnt/$f conv=notrunc,fsync 2>/dev/null; done; i=$((i+1)); done";
/// Agent and all: what it may take whatever the box and its own disk do.
const RSS_KIB_MAX: u64 = 96 << 10;

fn lock_down(host: &mut Host) -> Result<()> {
    let said = host.sh(
        "mount -t securityfs securityfs /sys/kernel/security && echo confidentiality >/sys/kernel/security/lockdown; cat /sys/kernel/security/lockdown",
    )?;
    ensure!(said.contains("[confidentiality]"), "the kernel is not locked down: {said}");
    Ok(())
}

fn number(image: &Path, name: &str) -> Result<u64> {
    let done = process::call("debugfs", &["-R", &format!("cat /{name}"), &image.to_string_lossy()], STEP_MAX)?;
    Ok(done.stdout.trim().parse().unwrap_or(0))
}

/// Nothing of the host is in the air: the volume stands still, and the box has what it holds.
fn assert_box_has_all(host: &mut Host, appliance: &Appliance, plain: &str, name: &str) -> Result<u64> {
    host.sh(&format!("sync && /programs/dmsetup suspend {}", host.name))?;
    let moment = appliance.bookmark("data", name)?;
    assert_identical(appliance, &At::Lsn(moment.lsn), &host.oracle(plain)?)?;
    host.sh(&format!("/programs/dmsetup resume {} --noudevsync", host.name))?;
    Ok(moment.lsn)
}

#[test]
fn a_mounted_volume_is_captured_where_bpf_is_refused() -> Result<()> {
    captured_without_bpf(&kernel()?)
}

#[test]
fn a_mounted_volume_is_captured_where_bpf_is_refused_on_linux_6_12() -> Result<()> {
    on(&BOOKWORM_BACKPORTS)
}

#[test]
fn a_mounted_volume_is_captured_where_bpf_is_refused_on_linux_5_10() -> Result<()> {
    on(&BULLSEYE_SECURITY)
}

fn on(release: &Release) -> Result<()> {
    match Kernel::of_release(release, &cache()) {
        Ok(kernel) => captured_without_bpf(&kernel),
        Err(e) => {
            hw_tests::skip(format!("capture without BPF on Linux {}: no kernel: {e:#}", release.name));
            Ok(())
        }
    }
}

/// What the agent offers is what the kernel lets it do.
fn offered(host: &mut Host) -> Result<()> {
    let all: Value = serde_json::from_str(&host.sh(&format!("{AGENT} disks --json"))?)?;
    let why = all["at_mirrors"].as_str().unwrap_or_default();
    ensure!(why.contains("BPF is refused") && why.contains("lockdown"), "{all}");
    let of = |path: &str| all["devices"].as_array().into_iter().flatten().find(|d| d["path"] == path).cloned();
    let volume = of(&host.volume()).with_context(|| format!("no volume in {all}"))?;
    assert_eq!(volume["backends"], serde_json::json!(["dm-mirror-async"]), "{volume}");
    let text = host.sh(&format!("{AGENT} disks"))?;
    ensure!(text.contains("dm-mirror-async") && text.contains("BPF is refused"), "{text}");
    let refused = host.sh(&format!("! {AGENT} protect /dev/vda --group no"))?;
    ensure!(refused.contains("only volumes of the device mapper"), "{refused}");
    Ok(())
}

fn captured_without_bpf(kernel: &Kernel) -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(kernel, &bins, dir.path(), Kind::Lvm)?;
    lock_down(&mut host)?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("/programs/mke2fs -q -t ext4 {volume} && mount {volume} /mnt"))?;
    let plain = host.table()?;
    offered(&mut host)?;

    // In, under a file system with a writer.
    host.stalls_during(3)?;
    let alone = host.stalls()?;
    host.start_writer()?;
    host.sh(&format!("{AGENT} protect {volume} --group data"))?;
    host.wait_gate("async")?;
    ensure!(host.table()?.contains("mirror core"), "{}", host.table()?);
    let begin = appliance.bookmark("data", "begin")?.lsn;
    host.sh(A_BEFORE_B)?;
    host.stop_writer()?;
    let end = assert_box_has_all(&mut host, &appliance, &plain, "worked")?;
    cuts_are_crash_images(&appliance, dir.path(), begin, end)?;
    host.stalls_during(3)?;
    println!(
        "Linux {}: one write and flush after the other: alone {alone}, captured {}",
        kernel.version,
        host.stalls()?
    );

    // The box hangs: nobody waits for it.
    host.stalls_during(6)?;
    appliance.program()?.signal(libc::SIGSTOP)?;
    let hung = host.stalls()?;
    ensure!(hung["errors"] == 0 && hung["writes"].as_u64() > Some(1), "{hung}");
    appliance.program()?.signal(libc::SIGCONT)?;
    println!("box stopped: {hung}");

    // The agent is stopped, and killed: no error, and the next one compares, for nobody could mark what was written.
    for signal in ["STOP", "KILL"] {
        host.wait_gate("async")?;
        host.stalls_during(6)?;
        host.sh(&format!("sleep 2; kill -{signal} $(cat /tmp/agent)"))?;
        let died = host.stalls()?;
        ensure!(died["errors"] == 0 && died["writes"].as_u64() > Some(1), "{signal}: {died}");
        println!("agent {signal}: {died}");
        host.sh("kill -9 $(cat /tmp/agent) 2>/dev/null; sleep 1")?;
        host.start_writer()?;
        host.start_agent(&appliance)?;
        let back = host.wait_gate("async")?;
        ensure!(back["compared_whole"].as_str().is_some_and(|t| t.contains("everything is compared")), "{back}");
        host.stop_writer()?;
        assert_box_has_all(&mut host, &appliance, &plain, &format!("after-{}", signal.to_lowercase()))?;
    }

    // Out again under a writer: the table as it was, and nothing left.
    host.start_writer()?;
    host.sh(&format!("{AGENT} unprotect data"))?;
    assert_eq!(host.table()?, plain);
    host.stop_writer()?;
    let left = host.sh("/programs/dmsetup ls; cat /sys/block/nbd*/pid 2>/dev/null; true")?;
    ensure!(left.lines().filter(|l| !l.trim().is_empty()).count() == 1, "more is left than the volume: {left}");
    host.sh("umount /mnt")?;
    let end = host.oracle(&plain)?;
    host.guest.power_off()?;
    check_ext4(&end, false)?;
    appliance.stop()?;
    dir.done()
}

/// Any moment is what a power cut would have left: the file system mounts and is whole, and A is never behind B.
fn cuts_are_crash_images(appliance: &Appliance, dir: &Path, begin: u64, end: u64) -> Result<()> {
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_123u64);
    let mut draw = Draw::new(seed);
    let image = dir.join("cut.img");
    let mut with_data = 0;
    for _ in 0..CUTS {
        let lsn = begin + draw.below(end - begin);
        let at = || format!("LSN {lsn} of {begin} to {end}, HOLDFAST_SEED={seed}");
        let view = appliance.view("data", &At::Lsn(lsn)).with_context(at)?;
        view.only()?.connect()?.copy_to(&image)?;
        view.close()?;
        check_ext4(&image, true).with_context(at)?;
        let (a, b) = (number(&image, "A")?, number(&image, "B")?);
        ensure!(a >= b && a <= b + 1, "A={a} B={b} at {}", at());
        with_data += u64::from(a > 0);
    }
    ensure!(with_data > 0, "no cut fell into the workload: HOLDFAST_SEED={seed}");
    Ok(())
}

/// The agent's own disk stands still and the box is gone, so the agent hangs: the host's writes return all the same, what there is no room for
/// is marked, and made good.
#[test]
fn an_agent_that_hangs_neither_holds_the_host_nor_fills_its_memory() -> Result<()> {
    let dir = Scratch::new()?;
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_123u64);
    let mut draw = Draw::new(seed);
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&kernel()?, &bins, dir.path(), Kind::Plain)?;
    host.sh("printf 'capture = \"dm-mirror\"\\nring_mib = 1\\nrun_dir = \"/var/agent/run\"\\n' >>/etc/agent.toml")?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("{AGENT} protect {volume} --group data"))?;
    host.wait_gate("async")?;
    host.scatter(&mut draw, 16)?;

    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh("fsfreeze --freeze /var/agent")?;
    let written = host.scatter(&mut draw, 3 * DISK_BYTES / (64 << 10))?;
    let status = host.sh(&format!("/programs/dmsetup status {}", host.name))?;
    ensure!(status.contains(" 1 AA "), "the leg is out: {status}");
    let resident = host.sh("grep VmRSS /proc/$(cat /tmp/agent)/status")?;
    let kib: u64 = resident.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
    ensure!(kib < RSS_KIB_MAX, "the agent takes {kib} KiB");
    println!("{written} bytes written while the agent hung, which takes {kib} KiB; HOLDFAST_SEED={seed}");
    host.sh("fsfreeze --unfreeze /var/agent")?;
    appliance.program()?.signal(libc::SIGCONT)?;
    wait_for("the agent to work again", STEP_MAX, || Ok(host.group().ok()))?;
    host.wait_gate("async")?;
    let end = appliance.bookmark("data", "end")?;
    assert_identical(&appliance, &At::Lsn(end.lsn), &host.disk)?;
    appliance.stop()?;
    dir.done()
}

/// A kernel that is too old for everything else: mirrors are refused there, for they could hang the host, and the backend for old kernels works
/// when it is asked for.
#[test]
fn a_volume_is_protected_on_linux_4_18_by_the_backend_for_old_kernels() -> Result<()> {
    let kernel = Kernel::of_release(&UBUNTU_4_18, &cache())?;
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&kernel, &bins, dir.path(), Kind::Lvm)?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("/programs/mke2fs -q -t ext4 {volume} && mount {volume} /mnt"))?;
    for how in ["", "--sync"] {
        let refused = host.sh(&format!("! {AGENT} protect {how} {volume} --group no"))?;
        ensure!(refused.contains("older ones than 5.10"), "{refused}");
    }
    let text = host.sh(&format!("{AGENT} disks"))?;
    ensure!(text.contains("type information") && text.contains("bpf-legacy"), "{text}");

    host.stop_agent("TERM")?;
    host.sh("echo 'capture = \"bpf-legacy\"' >>/etc/agent.toml")?;
    host.start_agent(&appliance)?;
    host.start_writer()?;
    host.sh(&format!("{AGENT} protect {volume} --group data"))?;
    host.sh(A_BEFORE_B)?;
    host.stop_writer()?;
    assert_disk_identical(&mut host, &appliance, "worked")?;

    // What is written while no agent runs is compared by the next one.
    host.start_writer()?;
    host.stop_agent("KILL")?;
    host.sh("dd if=/dev/urandom of=/mnt/alone bs=64k count=8 conv=fsync 2>/dev/null")?;
    host.start_agent(&appliance)?;
    host.stop_writer()?;
    assert_disk_identical(&mut host, &appliance, "after")?;
    appliance.stop()?;
    dir.done()
}

/// Nothing of the host is in the air, and the box has what its disk holds.
fn assert_disk_identical(host: &mut Host, appliance: &Appliance, name: &str) -> Result<()> {
    host.sh("sync; umount /mnt && sync")?;
    let mut last = Value::Null;
    wait_for("the group to be in step", STEP_MAX, || {
        last = host.group()?;
        Ok((last["state"] == "replicating").then_some(()))
    })
    .with_context(|| format!("last seen: {last}"))?;
    let moment = appliance.bookmark("data", name)?;
    assert_identical(appliance, &At::Lsn(moment.lsn), &host.disk)?;
    host.sh(&format!("mount {} /mnt", host.volume())).map(drop)
}
