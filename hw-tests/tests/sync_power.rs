//! A host in sync mode whose power goes, again and again: its disks' caches with it.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch,
    dm_host::{AGENT, AREA, DISK_BYTES, Host, Kind, STEP_MAX, acknowledged, held_by_box, kernel},
    load,
    process::wait_for,
    product::{Appliance, At, Binaries},
    volatile::Volatile,
};
use std::{fs, path::Path, thread, time::Duration};

/// As many as fit into some minutes of an emulated machine.
const CUTS: u64 = 8;
/// A run that has this many is the goal's: `HOLDFAST_POWER_CUTS=50`.
const CUTS_MAX: u64 = 10_000;
/// The longest a host writes before its power goes, once a write was acknowledged.
const WRITES_MS_MAX: u64 = 1_500;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// What the box holds now is what the host's disk holds.
fn assert_box_has(appliance: &Appliance, disk: &Volatile, dir: &Path) -> Result<()> {
    let file = dir.join("disk.now");
    fs::write(&file, disk.content())?;
    hw_tests::dm_host::assert_identical(appliance, &At::Latest, &file)
}

/// How many of a writer's acknowledged writes an area lacks: it may hold them in any order, whole or not.
fn lacks(writer: u64, promised: u64, area: &[u8]) -> u64 {
    let mut sequence = load::Sequence::new(writer);
    let mut newest = std::collections::BTreeMap::new();
    for _ in 0..promised {
        let (number, slot) = sequence.next_write();
        newest.insert(slot, number);
    }
    // A later one that was under way may have replaced it.
    let there = |slot: u64, least: u64| {
        let block = &area[slot as usize * load::BLOCK..(slot as usize + 1) * load::BLOCK];
        let number = u64::from_le_bytes(std::array::from_fn(|i| block[8 + i]));
        number >= least && block == load::content(writer, number, slot)
    };
    newest.into_iter().filter(|(slot, number)| !there(*slot, *number)).count() as u64
}

/// The power of a host in sync mode goes at random moments (`HOLDFAST_POWER_CUTS` of them, 8 unless it says otherwise: they took 4.6
/// minutes beside another guest; 50 were never run). Each time its disk loses what it had in its cache, all or in part. **The box has every write that the host was told is done**,
/// also those that the host's own disk has lost; then the host boots, its agent finds its state on a disk that lost power too, puts the
/// mirror in, and box and disk are made the same, bit for bit.
#[test]
fn what_a_host_was_told_is_written_outlives_its_power_and_its_disks_cache() -> Result<()> {
    let cuts = number("HOLDFAST_POWER_CUTS", CUTS).clamp(1, CUTS_MAX);
    let seed = number("HOLDFAST_SEED", 20_261_130);
    let mut draw = Draw::new(seed);
    let dir = Scratch::new()?;
    let (bins, kernel) = (Binaries::beside_us()?, kernel()?);
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let disk = Volatile::serve(&dir.path().join("disk.nbd"), DISK_BYTES as usize)?;
    let state = Volatile::serve(&dir.path().join("state.nbd"), DISK_BYTES as usize)?;
    let (mut acked, mut lost_by_disk) = (0, 0);
    for cut in 0..cuts {
        let told = || format!("cut {cut} of {cuts}, HOLDFAST_SEED={seed}");
        let drives = [disk.drive(), state.drive()];
        let mut host = Host::boot_on(&kernel, &bins, dir.path(), Kind::Plain, drives, cut == 0).with_context(told)?;
        let volume = host.volume();
        if cut == 0 {
            host.join(&appliance)?;
            host.sh(&format!("{AGENT} protect --sync {volume} --group data"))?;
        } else {
            host.start_agent(&appliance).with_context(told)?;
        }
        host.wait_gate("sync").with_context(told)?;
        assert_box_has(&appliance, &disk, dir.path()).with_context(told)?;

        // Each boot's writers begin with nothing of theirs there.
        host.sh(&format!("dd if=/dev/zero of={volume} bs=64k count=12 oflag=direct conv=notrunc,fsync 2>/dev/null"))?;
        let writers: Vec<u64> = (1..=3).map(|n| seed ^ (n << 40) ^ (cut << 20)).collect();
        for (at, writer) in writers.iter().enumerate() {
            let offset = at as u64 * AREA;
            host.sh(&format!("/programs/guest-load acks {volume} {offset} {writer} /dev/ttyS2 >/dev/ttyS0 2>&1 &"))?;
        }
        wait_for("the writers to be told of a write", STEP_MAX, || {
            Ok((acknowledged(&host.said, &writers)?.iter().sum::<u64>() > 0).then_some(()))
        })?;
        thread::sleep(Duration::from_millis(draw.below(WRITES_MS_MAX)));
        let said = host.said.clone();
        host.guest.power_off()?;
        disk.cut(&mut draw)?;
        state.cut(&mut draw)?;

        let promised = acknowledged(&said, &writers)?;
        let held = held_by_box(&appliance, &writers).with_context(told)?;
        ensure!(
            held.iter().zip(&promised).all(|(held, promised)| held >= promised),
            "the host was told that writes {promised:?} are done, the box has {held:?}; {}",
            told()
        );
        let left = disk.content();
        for (at, (writer, promised)) in writers.iter().zip(&promised).enumerate() {
            lost_by_disk += lacks(*writer, *promised, &left[at * AREA as usize..(at + 1) * AREA as usize]);
        }
        acked += promised.iter().sum::<u64>();
    }
    println!(
        "{cuts} power cuts: {acked} writes were acknowledged, the host's disk has lost {lost_by_disk} of them, the box none"
    );
    ensure!(lost_by_disk > 0, "the disk has lost nothing, so nothing was proved: HOLDFAST_SEED={seed}");

    // The last cut's host boots as well.
    let drives = [disk.drive(), state.drive()];
    let mut host = Host::boot_on(&kernel, &bins, dir.path(), Kind::Plain, drives, false)?;
    host.start_agent(&appliance)?;
    host.wait_gate("sync")?;
    assert_box_has(&appliance, &disk, dir.path())?;
    host.guest.power_off()?;
    appliance.stop()?;
    dir.done()
}
