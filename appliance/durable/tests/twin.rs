//! Twin records: crashes at every operation, every flipped bit, failures, full disks, hostile files.

mod common;

use common::Rng;
use durable::{Disk, DiskError, FaultReason, OpenMode, SimDisk, TWIN_BODY_MAX, Twin, TwinError};
use model::ByteLen;
use std::path::{Path, PathBuf};

const DIR: &str = "group";
const ROOM: ByteLen = ByteLen(16 << 20);

fn disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed, ROOM);
    disk.create_dir(Path::new(DIR)).expect("made");
    disk
}

fn create(disk: &SimDisk, body: &[u8]) -> Result<Twin, TwinError> {
    Twin::create(disk, Path::new(DIR), "control", body)
}

fn load(disk: &SimDisk) -> Result<Option<(Twin, Vec<u8>)>, TwinError> {
    Twin::load(disk, Path::new(DIR), "control")
}

fn path(side: &str) -> PathBuf {
    Path::new(DIR).join(format!("control.{side}"))
}

fn bytes(disk: &SimDisk, side: &str) -> Vec<u8> {
    let file = disk.open(&path(side), OpenMode::Read).expect("there");
    let mut bytes = vec![0; file.len().expect("measured").0 as usize];
    file.read_at(0, &mut bytes).expect("read");
    bytes
}

/// A body of the n-th store; lengths go up and down and cross block borders.
fn body(n: u64) -> Vec<u8> {
    Rng::new(n).bytes([3, 5000, 0, 512, 9000, 40][n as usize % 6])
}

/// The crash matrix: at each operation of a creation and four stores, over many seeds, the next boot finds the last value
/// acknowledged or the one being stored, without a fault, and can go on. So does a process killed there, and what it relied on stays.
#[test]
fn a_crash_at_any_operation_leaves_the_old_or_the_new_value() {
    let run = |disk: &SimDisk| -> u64 {
        // Returns how many values were acknowledged.
        let Ok(mut twin) = create(disk, &body(0)) else { return 0 };
        for n in 1..5 {
            if twin.store(disk, &body(n)).is_err() {
                return n;
            }
        }
        5
    };
    let whole = disk(0);
    let before = whole.operations();
    assert_eq!(run(&whole), 5);
    let operations = whole.operations() - before;
    assert_eq!(operations, 5 * 6, "two replacements of three operations for each store");
    let (mut olds, mut news) = (0, 0);
    for point in 0..operations {
        for seed in 0..40 {
            for killed in [false, true] {
                let at = format!("crash point {point}, seed {seed}, killed {killed}");
                let first = disk(seed);
                first.cut_after(point);
                let acknowledged = run(&first);
                assert!(!first.is_powered(), "{at}");
                let mut next = if killed { first.kill() } else { first.power_cut() };
                next.cleanup(Path::new(DIR)).expect(&at);
                let mut twin = match load(&next).expect(&at) {
                    None => {
                        assert_eq!(acknowledged, 0, "{at}: an acknowledged value is gone");
                        olds += 1;
                        create(&next, &body(7)).expect(&at)
                    }
                    Some((twin, found)) => {
                        let n = (acknowledged.saturating_sub(1)..=acknowledged).find(|n| found == body(*n));
                        let n = n.unwrap_or_else(|| panic!("{at}: garbage"));
                        assert!(n < 5, "{at}");
                        if n == acknowledged {
                            news += 1
                        } else {
                            olds += 1
                        }
                        assert_eq!(twin.sequence(), n + 1, "{at}");
                        assert_eq!(twin.fault(), None, "{at}: a crash is no damage");
                        // Whoever acts on what was loaded must not see it go back.
                        next = next.power_cut();
                        assert_eq!(
                            load(&next).expect(&at).expect(&at).1,
                            found,
                            "{at}: what was loaded was not durable"
                        );
                        twin
                    }
                };
                twin.store(&next, &body(8)).expect(&at);
                let (twin, found) = load(&next.power_cut()).expect(&at).expect(&at);
                assert!(found == body(8) && twin.fault().is_none(), "{at}: after going on");
            }
        }
    }
    assert!(olds > 100 && news > 100, "both outcomes must occur: {olds} old, {news} new");
}

#[test]
fn any_flipped_bit_of_either_copy_is_survived_reported_and_repaired() {
    for side in ["a", "b"] {
        let whole = disk(1);
        let mut twin = create(&whole, b"first").expect("made");
        twin.store(&whole, b"the newest value").expect("stored");
        for offset in 0..bytes(&whole, side).len() as u64 {
            for bit in 0..8 {
                let at = format!("copy {side}, byte {offset}, bit {bit}");
                let damaged = whole.fork(1);
                damaged.flip_bit(&path(side), offset, bit).expect(&at);
                let (mut twin, found) = load(&damaged).expect(&at).expect(&at);
                assert_eq!(found, b"the newest value", "{at}");
                let fault = twin.fault().unwrap_or_else(|| panic!("{at}: not reported"));
                assert_eq!(fault.path, path(side), "{at}");
                assert!(matches!(fault.reason, FaultReason::Damaged(_)), "{at}: {fault}");
                twin.store(&damaged, b"next").expect(&at);
                assert_eq!(twin.fault(), None, "{at}");
                let (twin, found) = load(&damaged.power_cut()).expect(&at).expect(&at);
                assert!(found == b"next" && twin.fault().is_none(), "{at}: not repaired");
            }
        }
    }
}

/// With one copy damaged the other is all there is: the store that repairs must not touch it first.
#[test]
fn a_crash_while_repairing_still_leaves_a_value() {
    for side in ["a", "b"] {
        for point in 0..6 {
            for seed in 0..40 {
                let at = format!("copy {side}, crash point {point}, seed {seed}");
                let disk = disk(seed);
                create(&disk, &body(1)).expect(&at).store(&disk, &body(3)).expect(&at);
                disk.flip_bit(&path(side), 40, 1).expect(&at);
                let (mut twin, _) = load(&disk).expect(&at).expect(&at);
                disk.cut_after(point);
                twin.store(&disk, &body(4)).expect_err(&at);
                let (_, found) = load(&disk.power_cut()).expect(&at).expect(&at);
                assert!(found == body(3) || found == body(4), "{at}: garbage");
            }
        }
    }
}

#[test]
fn a_cut_or_longer_copy_is_survived_and_reported() {
    for side in ["a", "b"] {
        let whole = disk(1);
        create(&whole, &[7; 100]).expect("made");
        for len in (0..132).chain([133, 4096, TWIN_BODY_MAX as u64 + 33]) {
            let damaged = whole.fork(len);
            let file = damaged.open(&path(side), OpenMode::ReadWrite).expect("there");
            file.set_len(ByteLen(len)).expect("cut");
            let (twin, found) = load(&damaged).expect("one copy is enough").expect("there");
            assert_eq!(found, [7; 100], "copy {side}, length {len}");
            assert!(twin.fault().is_some_and(|f| f.path == path(side)), "copy {side}, length {len}");
        }
    }
}

#[test]
fn garbage_is_never_taken_for_a_value() {
    for seed in 0..300 {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let valid = {
            create(&disk, &[1; 50]).expect("made");
            bytes(&disk, "a")
        };
        for side in ["a", "b"] {
            // Wholly random, or a valid copy with a stretch of noise.
            let mut content = valid.clone();
            let (start, len) = if rng.below(2) == 0 { (0, content.len()) } else { (rng.below(60) as usize, 4) };
            let noise: Vec<u8> = content[start..start + len].iter().map(|b| b ^ (1 + rng.below(255) as u8)).collect();
            content[start..start + len].copy_from_slice(&noise);
            disk.replace(&path(side), &content).expect("written");
        }
        let refused = load(&disk).expect_err("two damaged copies");
        assert!(matches!(refused, TwinError::BothDamaged(_)), "seed {seed}: {refused}");
    }
}

#[test]
fn a_missing_copy_is_survived_and_reported_unless_it_was_never_made() {
    for side in ["a", "b"] {
        let disk = disk(1);
        let mut twin = create(&disk, b"one").expect("made");
        twin.store(&disk, b"two").expect("stored");
        disk.remove(&path(side)).expect("removed");
        let (twin, found) = load(&disk).expect("one copy is enough").expect("there");
        assert_eq!(found, b"two");
        let fault = twin.fault().expect("reported");
        assert_eq!(fault.reason, FaultReason::Missing);
        assert_eq!(fault.to_string(), format!("group/control.{side}: missing"));
    }
    let disk = disk(1);
    assert!(load(&disk).expect("readable").is_none());
    create(&disk, b"one").expect("made");
    disk.remove(&path("b")).expect("removed");
    assert_eq!(load(&disk).expect("readable").expect("there").0.fault(), None, "an interrupted creation");
    assert!(matches!(create(&disk, b"again"), Err(TwinError::Exists { .. })));
}

#[test]
fn two_damaged_copies_are_named_with_both_reasons() {
    let disk = disk(1);
    create(&disk, b"value").expect("made");
    disk.flip_bit(&path("a"), 33, 0).expect("flipped");
    disk.remove(&path("b")).expect("removed");
    let refused = load(&disk).expect_err("nothing is left");
    let expected =
        "both copies are unusable: group/control.a: checksum of a twin record's body at 0x20; group/control.b: missing";
    assert_eq!(refused.to_string(), expected);
}

#[test]
fn copies_that_contradict_each_other_are_refused() {
    let (one, two) = (disk(1), disk(1));
    create(&one, b"value").expect("made");
    create(&two, b"other").expect("made");
    one.replace(&path("b"), &bytes(&two, "b")).expect("written");
    let refused = load(&one).expect_err("which one?");
    assert!(matches!(refused, TwinError::Split { sequence: 1, .. }), "{refused}");
}

#[test]
fn a_copy_left_far_behind_is_reported() {
    let disk = disk(1);
    let mut twin = create(&disk, b"one").expect("made");
    let old = bytes(&disk, "a");
    twin.store(&disk, b"two").expect("stored");
    disk.replace(&path("a"), &old).expect("written");
    assert_eq!(load(&disk).expect("readable").expect("there").0.fault(), None, "one behind is an interrupted store");
    twin.store(&disk, b"three").expect("stored");
    disk.replace(&path("a"), &old).expect("written");
    let (twin, found) = load(&disk).expect("readable").expect("there");
    assert_eq!(found, b"three");
    assert_eq!(twin.fault().expect("reported").reason, FaultReason::Stale { sequence: 1, newest: 3 });
}

/// Sets a header field and makes the header's checksum right again.
fn forge(disk: &SimDisk, side: &str, at: usize, value: &[u8]) {
    let mut content = bytes(disk, side);
    content[at..at + value.len()].copy_from_slice(value);
    let crc = crc32fast::hash(&content[..28]);
    content[28..32].copy_from_slice(&crc.to_le_bytes());
    disk.replace(&path(side), &content).expect("written");
}

#[test]
fn a_newer_format_is_refused_rather_than_going_back_to_the_older_copy() {
    let disk = disk(1);
    create(&disk, b"value").expect("made");
    forge(&disk, "b", 8, &2u32.to_le_bytes());
    let refused = load(&disk).expect_err("from a newer version");
    assert!(matches!(refused, TwinError::NewerFormat { found: 2, .. }), "{refused}");
}

#[test]
fn another_kind_of_file_is_no_twin_record() {
    let disk = disk(1);
    create(&disk, b"value").expect("made");
    forge(&disk, "b", 0, b"JOURNAL!");
    let (twin, found) = load(&disk).expect("one copy is enough").expect("there");
    assert_eq!(found, b"value");
    assert_eq!(twin.fault().expect("reported").to_string(), "group/control.b: magic of a twin record at 0x0");
}

/// After a store that wrote one copy only, the retry must begin with the other: the copies stay one apart, and a crash in the
/// retry is no damage either.
#[test]
fn a_crash_while_repeating_a_half_done_store_is_no_damage() {
    for side in ["a", "b"] {
        for point in 0..6 {
            for seed in 0..20 {
                let at = format!("copy {side}, crash point {point}, seed {seed}");
                let disk = disk(seed);
                let mut twin = create(&disk, &body(1)).expect(&at);
                // The copy that is written second alternates.
                if side == "b" {
                    twin.store(&disk, &body(1)).expect(&at);
                }
                disk.fail_write_at(path(side));
                twin.store(&disk, &body(2)).expect_err(&at);
                assert_eq!(twin.fault().map(|f| &f.reason), Some(&FaultReason::NotWritten), "{at}");
                disk.cut_after(point);
                twin.store(&disk, &body(3)).expect_err(&at);
                let (twin, found) = load(&disk.power_cut()).expect(&at).expect(&at);
                assert!(found == body(2) || found == body(3), "{at}: garbage");
                assert_eq!(twin.fault(), None, "{at}");
            }
        }
    }
}

#[test]
fn the_last_sequence_number_is_an_error_not_a_wrap() {
    let disk = disk(1);
    create(&disk, b"value").expect("made");
    for side in ["a", "b"] {
        forge(&disk, side, 16, &u64::MAX.to_le_bytes());
    }
    let (mut twin, _) = load(&disk).expect("readable").expect("there");
    assert!(matches!(twin.store(&disk, b"next"), Err(TwinError::SequenceUsedUp { .. })));
}

#[test]
fn the_size_limit_is_exact() {
    let disk = disk(1);
    let mut twin = create(&disk, &vec![1; TWIN_BODY_MAX]).expect("the largest");
    assert_eq!(load(&disk).expect("readable").expect("there").1.len(), TWIN_BODY_MAX);
    assert!(matches!(twin.store(&disk, &vec![1; TWIN_BODY_MAX + 1]), Err(TwinError::TooBig { .. })));
    assert!(matches!(create(&self::disk(2), &vec![1; TWIN_BODY_MAX + 1]), Err(TwinError::TooBig { .. })));
}

/// A store that fails (flush, directory flush, write, full disk) may be tried again, with another value, and whatever happens in
/// between a boot finds the value before or one of those tried since.
#[test]
fn failed_stores_can_be_repeated() {
    type Fault = fn(&SimDisk);
    let faults: [Fault; 5] = [
        |disk| disk.fail_next_flush(),
        |disk| disk.fail_next_directory_flush(),
        |disk| disk.fail_write_at(path("a")),
        |disk| disk.fail_write_at(path("b")),
        |disk| disk.set_capacity(ByteLen(0)),
    ];
    for (kind, fault) in faults.iter().enumerate() {
        for seed in 0..60 {
            let at = format!("fault {kind}, seed {seed}");
            let disk = disk(seed);
            let mut twin = create(&disk, &body(1)).expect(&at);
            let mut possible = vec![body(1)];
            for n in 2..4 {
                fault(&disk);
                possible.push(body(n));
                let failed = twin.store(&disk, &body(n)).expect_err(&at);
                assert!(matches!(failed, TwinError::Disk(DiskError { .. })), "{at}: {failed}");
                let (_, found) = load(&disk.fork(seed).power_cut()).expect(&at).expect(&at);
                assert!(possible.contains(&found), "{at}: garbage after store {n}");
            }
            disk.set_capacity(ROOM);
            twin.store(&disk, &body(9)).expect(&at);
            assert_eq!(twin.fault(), None, "{at}");
            let (twin, found) = load(&disk.power_cut()).expect(&at).expect(&at);
            assert!(found == body(9) && twin.fault().is_none(), "{at}");
        }
    }
}

#[test]
fn a_disk_that_lies_is_not_believed_to_be_whole() {
    let mut noticed = 0;
    for seed in 0..200 {
        let disk = disk(seed);
        let mut twin = create(&disk, &body(1)).expect("made");
        disk.set_lying_flush(true);
        for n in 2..6 {
            twin.store(&disk, &body(n)).expect("it says so");
        }
        match load(&disk.power_cut()) {
            Ok(Some((twin, found))) => {
                assert!((1..6).any(|n| found == body(n)), "seed {seed}: garbage");
                noticed += usize::from(twin.fault().is_some());
            }
            Ok(None) => panic!("seed {seed}: the first value was durable before the lies"),
            Err(TwinError::BothDamaged(_)) => noticed += 1,
            Err(e) => panic!("seed {seed}: {e}"),
        }
    }
    assert!(noticed > 20, "only {noticed} of 200 lies were noticed");
}
