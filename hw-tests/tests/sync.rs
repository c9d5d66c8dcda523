//! Sync mode on real kernels: a host in a guest whose volume is mirrored live, and whose writes wait for the box.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch,
    disk::check_ext4,
    dm_host::{
        AGENT, AREA, DISK_BYTES, Host, Kind, LVM, LVM_ALONE, STEP_MAX, acknowledged, assert_identical, cache,
        held_by_box, kernel,
    },
    guest::{BOOKWORM_BACKPORTS, BULLSEYE_SECURITY, Kernel, Release},
    process::wait_for,
    product::{Appliance, At, Binaries},
};
use serde_json::json;

/// Under the strict policy the host's writes wait for an agent that died, and for no longer than they are to.
#[test]
fn a_strict_host_waits_for_its_agent_but_not_for_ever() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&kernel()?, &bins, dir.path(), Kind::Plain)?;
    host.sh("echo 'sync_hold_s = 6' >>/etc/agent.toml")?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("{AGENT} protect --sync=strict --wait-ms 1000 {volume} --group data"))?;
    host.wait_gate("sync")?;
    host.start_pieces()?;
    host.wait_pieces(3)?;

    // Killed: what is written waits, and what the host has heard of is on the box; the next agent takes it up.
    host.stop_agent("KILL")?;
    let (stood, again) = (host.pieces()?, host.sh("sleep 2; cat /tmp/pieces")?);
    ensure!(again.trim().parse::<u64>()? <= stood + 1, "the host went on alone: {stood} pieces, then {again}");
    ensure!(host.table()?.contains("mirror core"), "the mirror is out");
    let status = host.sh("/programs/dmsetup status data")?;
    ensure!(status.contains(" 1 AA "), "the leg is out: {status}");
    host.start_agent(&appliance)?;
    host.wait_pieces(3)?;
    host.wait_gate("sync")?;
    let status = host.sh("/programs/dmsetup status data")?;
    ensure!(status.contains(" 1 AA "), "the leg is out: {status}");
    assert_eq!(host.stop_pieces()?, "", "a write failed");
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // The box hangs for longer than a request may be under way: the kernel keeps the writes, and they come again.
    host.start_pieces()?;
    host.wait_pieces(2)?;
    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh("sleep 10")?;
    let stood = host.pieces()?;
    appliance.program()?.signal(libc::SIGCONT)?;
    host.wait_pieces(3)?;
    host.wait_gate("sync")?;
    let status = host.sh("/programs/dmsetup status data")?;
    ensure!(status.contains(" 1 AA "), "after {stood} pieces the leg is out: {status}");
    assert_eq!(host.stop_pieces()?, "", "a write failed");
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // Nobody comes: after its time the host goes on without an error, and what it writes then is made good.
    host.start_pieces()?;
    host.wait_pieces(2)?;
    host.stop_agent("KILL")?;
    host.wait_pieces(3)?;
    host.start_agent(&appliance)?;
    host.wait_whole()?;
    let told = host.group()?;
    ensure!(told["reason"].as_str().is_some_and(|r| r.contains("went on without the box")), "{told}");
    assert_eq!(host.stop_pieces()?, "", "a write failed");
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // Killed once more and taken out: what waits is let go at once.
    host.start_pieces()?;
    host.wait_pieces(1)?;
    host.stop_agent("KILL")?;
    host.sh(&format!("{AGENT} remove"))?;
    host.wait_pieces(3)?;
    assert_eq!(host.stop_pieces()?, "", "a write failed");
    let left = host.sh(
        "/programs/dmsetup ls; cat /sys/block/nbd*/pid 2>/dev/null; ls -d /sys/fs/bpf/holdfast* 2>/dev/null; true",
    )?;
    ensure!(left.lines().filter(|l| !l.trim().is_empty()).count() == 1, "more is left than the volume: {left}");
    appliance.stop()?;
    dir.done()
}

/// What was read and sent stays within 1.2 of what was written while the mirror was out, and a fixed part for starting: the beginnings of
/// all devices are looked at (some 70 KiB each, at every try), certificates, the status each second.
fn assert_only_what_was_written(how: &str, dirtied: u64, before: [u64; 2], after: [u64; 2]) -> Result<()> {
    const LOOKS: u64 = 6 << 20;
    const TALK: u64 = 512 << 10;
    let [read, sent] = [after[0] - before[0], after[1] - before[1]];
    println!("{how}: {dirtied} bytes written while the mirror was out, {read} read and {sent} sent for them");
    ensure!(
        read <= dirtied * 12 / 10 + LOOKS && sent <= dirtied * 12 / 10 + TALK,
        "{how}: {dirtied} bytes were written while the mirror was out, {read} were read and {sent} sent"
    );
    Ok(())
}

#[test]
fn a_mirror_that_was_out_costs_what_was_written_meanwhile() -> Result<()> {
    out_and_in_again(&kernel()?)
}

fn out_and_in_again(kernel: &Kernel) -> Result<()> {
    let dir = Scratch::new()?;
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_122u64);
    println!("HOLDFAST_SEED={seed}");
    let mut draw = Draw::new(seed);
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(kernel, &bins, dir.path(), Kind::Plain)?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("dd if=/dev/urandom of={volume} bs=1M count=32 iflag=fullblock oflag=direct 2>/dev/null"))?;
    host.sh(&format!("{AGENT} protect --sync {volume} --group data"))?;
    host.wait_gate("sync")?;
    host.scatter(&mut draw, 4)?;

    for (how, signal) in [("agent killed", "KILL"), ("agent stopped and started", "TERM")] {
        host.wait_forgotten()?;
        host.stop_agent(signal)?;
        let dirtied = host.scatter(&mut draw, 48)?;
        let before = host.traffic()?;
        host.start_agent(&appliance)?;
        host.wait_gate("sync")?;
        assert_only_what_was_written(how, dirtied, before, host.traffic()?)?;
        assert_identical(&appliance, &At::Latest, &host.disk)?;
    }

    // Somebody loads another table, as LVM's tools do, and writes past us.
    host.wait_forgotten()?;
    let sectors = DISK_BYTES / 512;
    let before = host.traffic()?;
    host.sh(&format!(
        "/programs/dmsetup load data --table '0 {sectors} linear /dev/vda 0' && /programs/dmsetup resume data --noudevsync"
    ))?;
    let dirtied = host.scatter(&mut draw, 24)?;
    host.wait_whole()?;
    assert_only_what_was_written("table replaced", dirtied, before, host.traffic()?)?;
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // Killed under load: what was not acknowledged is made good too.
    host.sh(&format!(
        "rm -f /tmp/stop /tmp/stopped; (while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of={volume} bs=64k count=1 seek=$((i%300)) iflag=fullblock oflag=direct conv=notrunc; i=$((i+7)); done; touch /tmp/stopped) >/dev/null 2>&1 &"
    ))?;
    host.stop_agent("KILL")?;
    host.start_agent(&appliance)?;
    host.wait_gate("sync")?;
    host.stop_writer()?;
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // Where the kernel cannot be asked, everything is compared, and the agent says so.
    host.sh("echo 'pin_dir = \"/var/agent/pins\"' >>/etc/agent.toml")?;
    host.stop_agent("KILL")?;
    let before = host.traffic()?;
    host.start_agent(&appliance)?;
    let group = host.wait_gate("sync")?;
    ensure!(group["compared_whole"].as_str().is_some_and(|t| t.contains("BPF")), "{group}");
    let read = host.traffic()?[0] - before[0];
    ensure!(read >= DISK_BYTES, "only {read} bytes were read of a volume of {DISK_BYTES} that nobody watched");
    assert_identical(&appliance, &At::Latest, &host.disk)?;
    appliance.stop()?;
    dir.done()
}

#[test]
fn a_mounted_volume_is_mirrored_live_and_its_agent_may_die() -> Result<()> {
    mirrored_live(&kernel()?)
}

#[test]
fn a_mounted_volume_is_mirrored_live_on_linux_6_12() -> Result<()> {
    mirrored_live_on(&BOOKWORM_BACKPORTS)
}

#[test]
fn a_mounted_volume_is_mirrored_live_on_linux_5_10() -> Result<()> {
    mirrored_live_on(&BULLSEYE_SECURITY)
}

fn mirrored_live_on(release: &Release) -> Result<()> {
    match Kernel::of_release(release, &cache()) {
        Ok(kernel) => mirrored_live(&kernel),
        Err(e) => {
            hw_tests::skip(format!("a mirror on Linux {}: the kernel could not be had: {e:#}", release.name));
            Ok(())
        }
    }
}

fn mirrored_live(kernel: &Kernel) -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(kernel, &bins, dir.path(), Kind::Lvm)?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("/programs/mke2fs -q -t ext4 {volume} && mount {volume} /mnt"))?;
    let plain = host.table()?;
    let refused = host.sh(&format!("! {AGENT} protect --sync /dev/vda --group no"))?;
    ensure!(refused.contains("not a volume of the device mapper"), "{refused}");

    host.stalls_during(3)?;
    let alone = host.stalls()?;

    // In, under a file system with a writer.
    host.start_writer()?;
    host.sh(&format!("{AGENT} protect --sync {volume} --group data"))?;
    host.wait_gate("sync")?;
    let table = host.table()?;
    ensure!(table.contains("mirror core 2 1024 nosync 2") && table.contains("handle_errors keep_log"), "{table}");
    appliance.bookmark("data", "running")?;
    host.stop_writer()?;
    host.sh("sync && /programs/dmsetup suspend vg-data")?;
    // No bookmark is needed to have the newest: what was acknowledged is there.
    assert_identical(&appliance, &At::Latest, &host.oracle(&plain)?)?;
    host.sh("/programs/dmsetup resume vg-data --noudevsync")?;
    let image = dir.path().join("running.img");
    let view = appliance.view("data", &At::Bookmark("running".into()))?;
    view.only()?.connect()?.copy_to(&image)?;
    view.close()?;
    check_ext4(&image, true).context("a moment while the guest wrote")?;

    host.stalls_during(3)?;
    let waiting = host.stalls()?;
    println!("one write and flush after the other: alone {alone}, waiting for the box {waiting}");

    // The agent is killed: no error, a short stall, and the host goes on; the next agent puts a new leg in.
    host.stalls_during(6)?;
    host.sh("sleep 2; kill -9 $(cat /tmp/agent)")?;
    let killed = host.stalls()?;
    ensure!(killed["errors"] == 0 && killed["writes"].as_u64() > Some(1), "{killed}");
    println!("agent killed: {killed}");
    host.start_writer()?;
    host.start_agent(&appliance)?;
    let back = host.wait_gate("sync")?;
    assert_eq!(back["compared_whole"], "", "what was written meanwhile was not known");
    host.stop_writer()?;
    host.sh("umount /mnt && sync")?;
    let end = appliance.bookmark("data", "end")?;
    assert_identical(&appliance, &At::Lsn(end.lsn), &host.oracle(&plain)?)?;

    // LVM loads its own table: the mirror is put in again.
    host.sh(&format!("{LVM} lvchange --refresh vg/data {LVM_ALONE}"))?;
    host.wait_whole()?;

    // Out again: the table as it was, and nothing left.
    host.sh(&format!("mount {volume} /mnt"))?;
    host.start_writer()?;
    host.sh("kill -9 $(cat /tmp/agent); sleep 1")?;
    let out = host.sh(&format!("{AGENT} remove"))?;
    ensure!(out.contains("/dev/mapper/vg-data has its own table again"), "{out}");
    host.stop_writer()?;
    assert_eq!(host.table()?, plain);
    let left = host.sh("/programs/dmsetup ls; cat /sys/block/nbd*/pid 2>/dev/null; true")?;
    ensure!(left.lines().filter(|l| !l.trim().is_empty()).count() == 1, "more is left than the volume: {left}");
    host.sh("umount /mnt")?;
    let end = host.oracle(&plain)?;
    host.guest.power_off()?;
    check_ext4(&end, false)?;
    appliance.stop()?;
    dir.done()
}

/// Cuts taken of one running host.
const CUTS: u64 = 50;

#[test]
fn what_a_host_was_told_is_written_is_on_the_box_at_every_cut() -> Result<()> {
    let dir = Scratch::new()?;
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_122u64);
    let mut draw = Draw::new(seed);
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&kernel()?, &bins, dir.path(), Kind::Crypt)?;
    host.join(&appliance)?;
    let volume = host.volume();
    // What was never written decrypts to noise.
    host.sh(&format!("dd if=/dev/zero of={volume} bs=64k count=16 oflag=direct 2>&1"))?;
    let writers: Vec<u64> = (1..=3).map(|n| seed ^ (n << 40)).collect();
    for (at, writer) in writers.iter().enumerate() {
        let offset = at as u64 * AREA;
        host.sh(&format!("/programs/guest-load acks {volume} {offset} {writer} /dev/ttyS2 >/dev/ttyS0 2>&1 &"))?;
    }
    // Under them: a copy needs moments without a write under way, which a disk that is never idle does not have by itself.
    host.sh(&format!("{AGENT} protect --sync {volume} --group data"))?;
    host.wait_gate("sync")?;
    let check = |appliance: &Appliance, promised: &[u64], cut: u64| -> Result<()> {
        let held = held_by_box(appliance, &writers).with_context(|| format!("cut {cut}, HOLDFAST_SEED={seed}"))?;
        ensure!(
            held.iter().zip(promised).all(|(held, promised)| held >= promised),
            "cut {cut}: the host was told that writes {promised:?} are done, the box has {held:?}; HOLDFAST_SEED={seed}"
        );
        Ok(())
    };
    let mut before = 0;
    for cut in 1..=CUTS {
        let wanted = before + 1 + draw.below(12);
        wait_for("the writers to go on", STEP_MAX, || {
            Ok((acknowledged(&host.said, &writers)?.iter().sum::<u64>() >= wanted).then_some(()))
        })?;
        // Nothing of the guest runs on from here, as if its power were cut.
        host.guest.qmp.execute("stop", json!({}))?;
        let promised = acknowledged(&host.said, &writers)?;
        before = promised.iter().sum();
        check(&appliance, &promised, cut)?;
        host.guest.qmp.execute("cont", json!({}))?;
    }
    let group = host.group()?;
    assert_eq!((&group["gate"], &group["state"]), (&json!("sync"), &json!("replicating")), "in step all the time");
    let said = host.said.clone();
    host.guest.power_off()?;
    let promised = acknowledged(&said, &writers)?;
    check(&appliance, &promised, CUTS + 1)?;
    println!("{CUTS} cuts and a kill, {} acknowledged writes", promised.iter().sum::<u64>());
    appliance.stop()?;
    dir.done()
}

/// What is in a block of the volume, as whoever reads it sees it.
fn block_through(host: &mut Host, device: &str, block: u64) -> Result<String> {
    host.sh(&format!("dd if={device} bs=4k skip={block} count=1 iflag=direct 2>/dev/null | head -c 4"))
}

#[test]
fn neither_box_nor_agent_nor_disk_can_fail_the_hosts_writes() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&kernel()?, &bins, dir.path(), Kind::Plain)?;
    host.join(&appliance)?;
    let volume = host.volume();
    host.sh(&format!("/programs/mke2fs -q -t ext4 {volume} && mount {volume} /mnt"))?;
    host.sh(&format!("{AGENT} protect --sync --wait-ms 1000 {volume} --group data"))?;
    host.wait_gate("sync")?;

    // The box hangs: the host waits for its bound, goes on without it, and is in step again when the box is back.
    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh(
        "for i in 1 2 3 4 5; do dd if=/dev/urandom of=/mnt/alone bs=16k count=4 conv=fsync 2>/dev/null || exit 1; done",
    )?;
    let degraded = host.group()?;
    ensure!(degraded["gate"].as_str().is_some_and(|g| g.starts_with("degraded")), "{degraded}");
    ensure!(degraded["reason"].as_str().is_some_and(|r| r.contains("the host waited")), "{degraded}");
    appliance.program()?.signal(libc::SIGCONT)?;
    host.wait_gate("sync")?;

    // The same under the other policy: the write stands still as long as the box does, and returns with it.
    appliance.run_cli(&["group", "policy", "data", "--at-bound", "hold"])?;
    host.wait_policy("hold")?;
    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh("(dd if=/dev/urandom of=/mnt/held bs=16k count=4 conv=fsync 2>/dev/null && echo done >/tmp/held) >/dev/null 2>&1 &")?;
    wait_for("the agent to say that the host is held", STEP_MAX, || {
        Ok(host.group()?["reason"].as_str().is_some_and(|r| r.contains("as the policy says")).then_some(()))
    })?;
    assert_eq!(host.sh("cat /tmp/held 2>/dev/null; true")?.trim(), "", "the write returned without the box");
    appliance.program()?.signal(libc::SIGCONT)?;
    host.sh("while ! [ -e /tmp/held ]; do sleep 1; done")?;
    appliance.run_cli(&["group", "policy", "data", "--at-bound", "degrade"])?;
    host.wait_policy("degrade")?;

    // The agent hangs whole: the kernel takes its leg for dead.
    host.stalls_during(10)?;
    host.sh("sleep 2; kill -STOP $(cat /tmp/agent)")?;
    let hung = host.stalls()?;
    ensure!(hung["errors"] == 0 && hung["writes"].as_u64() > Some(1), "{hung}");
    println!("agent stopped: {hung}");
    let status = host.sh("/programs/dmsetup status data")?;
    ensure!(status.contains(" 1 AD ") || status.contains(" 1 AF ") || status.contains(" 1 AR "), "{status}");
    host.sh("kill -9 $(cat /tmp/agent); sleep 1")?;
    host.start_agent(&appliance)?;
    host.wait_gate("sync")?;
    host.sh("umount /mnt && sync")?;
    assert_identical(&appliance, &At::Latest, &host.disk)?;

    // Somebody loads another table, as LVM's tools do: the mirror is put in again.
    let sectors = DISK_BYTES / 512;
    host.sh(&format!(
        "/programs/dmsetup load data --table '0 {sectors} linear /dev/vda 0' && /programs/dmsetup resume data --noudevsync"
    ))?;
    host.wait_whole()?;

    // The local disk fails writes: the host hears of no error, reads what it wrote, and the box has it.
    let pattern = |text: &str| format!("yes {text} | dd of=/tmp/pattern bs=4096 count=1 iflag=fullblock 2>/dev/null");
    let write = format!("dd if=/tmp/pattern of={volume} bs=4k seek=1000 oflag=direct conv=notrunc 2>&1");
    host.sh(&format!("{} && {write}", pattern("AAA")))?;
    host.sh(&format!(
        "/programs/dmsetup load data-holdfast --table '0 {sectors} flakey /dev/vda 0 0 1000 1 error_writes' && /programs/dmsetup resume data-holdfast --noudevsync"
    ))?;
    host.sh(&format!("{} && {write}", pattern("BBB")))?;
    let on_disk = block_through(&mut host, "/dev/vda", 1000)?;
    assert_eq!((block_through(&mut host, &volume, 1000)?.trim(), on_disk.trim()), ("BBB", "AAA"));
    let view = appliance.view("data", &At::Latest)?;
    let mut block = [0; 4];
    view.only()?.connect()?.read(1000 * 4096, &mut block)?;
    view.close()?;
    assert_eq!(&block, b"BBB\n");
    let failed = host.group()?;
    ensure!(failed["reason"].as_str().is_some_and(|r| r.contains("local disk")), "{failed}");
    appliance.stop()?;
    dir.done()
}
