//! The simulated disk keeps its promises, and breaks everything else often enough to be worth testing against.

mod common;

use common::Rng;
use durable::{ALIGN, AlignedBuf, Disk, DiskError, DiskErrorKind, OpenMode, SimDisk};
use model::ByteLen;
use std::{collections::BTreeSet, path::Path, sync::Arc};

const ROOM: ByteLen = ByteLen(8 << 20);
const SECTOR: usize = 512;

fn p(path: &str) -> &Path {
    Path::new(path)
}

fn read(disk: &SimDisk, path: &str) -> Vec<u8> {
    let file = disk.open(p(path), OpenMode::Read).expect("there");
    let mut bytes = vec![0; file.len().expect("measured").0 as usize];
    file.read_at(0, &mut bytes).expect("read");
    bytes
}

fn buffer(byte: u8, len: usize) -> AlignedBuf {
    let mut buf = AlignedBuf::with_capacity(len);
    buf.extend_from_slice(&vec![byte; len]);
    buf
}

fn is_power_lost(e: &DiskError) -> bool {
    matches!(&e.kind, DiskErrorKind::Io(e) if e.to_string() == "power lost")
}

#[test]
fn what_was_flushed_survives_and_what_was_not_does_not_always() {
    let (mut whole, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..300 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(8 * 4096)).expect("made");
        file.write_at(0, &[1; 4096]).expect("written");
        file.flush().expect("flushed");
        file.write_at(2048, &[2; 8192]).expect("written");
        let found = read(&disk.power_cut(), "f");
        assert_eq!(found.len(), 8 * 4096, "seed {seed}");
        assert!(found[..2048].iter().all(|b| *b == 1), "seed {seed}: flushed data is gone");
        assert!(found[10240..].iter().all(|b| *b == 0), "seed {seed}: data nobody wrote");
        let mut kept = 0;
        for (n, sector) in found[2048..10240].chunks(SECTOR).enumerate() {
            let old = if n < 4 { 1 } else { 0 };
            assert!(
                sector.iter().all(|b| *b == 2) || sector.iter().all(|b| *b == old),
                "seed {seed}: sector {n} is torn"
            );
            kept += usize::from(sector[0] == 2);
        }
        match kept {
            0 => lost += 1,
            16 => whole += 1,
            _ => torn += 1,
        }
    }
    assert!(whole > 30 && lost > 30 && torn > 30, "{whole} whole, {lost} lost, {torn} torn");
}

#[test]
fn unflushed_writes_are_reordered() {
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(3 * 4096)).expect("made");
        for n in 0..3u8 {
            file.write_at(u64::from(n) * 4096, &[n + 1; 512]).expect("written");
        }
        let found = read(&disk.power_cut(), "f");
        seen.insert([0, 1, 2].map(|n| found[n * 4096] != 0));
    }
    assert_eq!(seen.len(), 8, "every subset of three writes must occur: {seen:?}");
}

#[test]
fn overlapping_unflushed_writes_leave_each_version() {
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(512)).expect("made");
        for version in 1..4 {
            file.write_at(0, &[version; 512]).expect("written");
        }
        assert_eq!(read(&disk, "f"), [3; 512]);
        let found = read(&disk.power_cut(), "f");
        assert!(found.iter().all(|b| *b == found[0]), "seed {seed}");
        seen.insert(found[0]);
    }
    assert_eq!(seen, BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn a_queued_write_is_durable_exactly_when_it_completed() {
    let mut outcomes = BTreeSet::new();
    let mut orders = BTreeSet::new();
    for seed in 0..300 {
        let disk = SimDisk::new(seed, ROOM);
        disk.create_zeroed(p("f"), ByteLen(4 * 8192)).expect("made");
        let mut queue = disk.write_queue(p("f"), 4).expect("a queue");
        for id in 0..4 {
            queue.submit(id, id * 8192, buffer(id as u8 + 1, 8192));
        }
        let done: Vec<u64> =
            queue.complete(true).into_iter().map(|c| c.result.map(|()| c.id).expect("written")).collect();
        assert!(!done.is_empty(), "seed {seed}: waited for nothing");
        assert_eq!(queue.in_flight(), 4 - done.len(), "seed {seed}");
        let found = read(&disk.power_cut(), "f");
        for (id, part) in found.chunks(8192).enumerate() {
            let here = part.iter().filter(|b| **b == id as u8 + 1).count();
            assert!(here % SECTOR == 0 && part.iter().all(|b| *b == id as u8 + 1 || *b == 0), "seed {seed}");
            if done.contains(&(id as u64)) {
                assert_eq!(here, 8192, "seed {seed}: a completed write is gone");
            } else {
                outcomes.insert(here / SECTOR);
            }
        }
        let after = queue.complete(true);
        assert_eq!(after.len(), 4 - done.len(), "seed {seed}: each submission completes, with or without power");
        assert!(after.iter().all(|c| is_power_lost(c.result.as_ref().expect_err("no power"))), "seed {seed}");
        orders.insert(done);
    }
    assert!(outcomes.contains(&0) && outcomes.contains(&16) && outcomes.len() > 5, "in flight: {outcomes:?}");
    assert!(orders.len() > 40, "completions come in few orders: {}", orders.len());
}

#[test]
fn a_queued_write_makes_nothing_else_durable_and_is_not_undone_by_older_writes() {
    let mut lost = 0;
    for seed in 0..200 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(4 * 4096)).expect("made");
        file.write_at(0, &[1; 4 * 4096]).expect("written");
        let mut queue = disk.write_queue(p("f"), 1).expect("a queue");
        queue.submit(1, 4096, buffer(2, 4096));
        assert!(queue.complete(true)[0].result.is_ok());
        let found = read(&disk.power_cut(), "f");
        assert!(found[4096..8192].iter().all(|b| *b == 2), "seed {seed}: an older unflushed write came after");
        lost += usize::from(found[0] == 0);
    }
    assert!(lost > 20, "unflushed neighbours were lost only {lost} times");
}

#[test]
fn directory_operations_are_durable_when_they_return() {
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        disk.create_dir(p("a/b")).expect("made");
        disk.replace(p("a/old"), b"old").expect("made");
        disk.replace(p("a/b/x"), b"moved").expect("made");
        disk.replace(p("gone"), b"gone").expect("made");
        disk.rename(p("a/b/x"), p("a/old")).expect("renamed");
        disk.remove(p("gone")).expect("removed");
        disk.create_zeroed(p("zeroes"), ByteLen(5000)).expect("made");
        let next = disk.power_cut();
        assert_eq!(next.paths(), [p("a/old"), p("zeroes")], "seed {seed}");
        assert_eq!(read(&next, "a/old"), b"moved");
        assert_eq!(read(&next, "zeroes"), [0; 5000]);
    }
}

#[test]
fn a_rename_does_not_make_the_content_durable() {
    let mut empty = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        disk.create_sparse(p("new"), ByteLen(0)).expect("made").write_at(0, &[1; 600]).expect("written");
        disk.rename(p("new"), p("f")).expect("renamed");
        empty += usize::from(read(&disk.power_cut(), "f").is_empty());
    }
    assert!(empty > 20, "the classic mistake shows only {empty} times in 100");
}

#[test]
fn an_interrupted_directory_operation_happens_or_not() {
    type Op = fn(&SimDisk) -> Result<(), DiskError>;
    let cases: [(Op, &[&str]); 5] = [
        (|d| d.rename(p("x"), p("y")), &["x", "y"]),
        (|d| d.remove(p("x")), &["", "x"]),
        (|d| d.create_zeroed(p("z"), ByteLen(4096)).map(drop), &["x", "x temporary", "x z"]),
        (|d| d.create_sparse(p("z"), ByteLen(4096)).map(drop), &["x", "x temporary", "x z"]),
        (|d| d.create_dir(p("d/e/f")), &["x", "x d", "x d d/e", "x d d/e d/e/f"]),
    ];
    for (n, (operate, expected)) in cases.iter().enumerate() {
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let disk = SimDisk::new(seed, ROOM);
            disk.replace(p("x"), b"x").expect("made");
            disk.cut_after(0);
            assert!(is_power_lost(&operate(&disk).expect_err("the power goes")), "case {n}");
            assert!(is_power_lost(&disk.list(p("")).expect_err("the power is gone")), "case {n}");
            let next = disk.power_cut();
            let mut names: Vec<String> = next.paths().iter().map(|path| path.display().to_string()).collect();
            names.iter_mut().filter(|name| name.starts_with(".new-")).for_each(|name| *name = "temporary".into());
            for dir in ["d", "d/e", "d/e/f"] {
                names.extend(next.list(p(dir)).is_ok().then(|| dir.to_owned()));
            }
            names.sort_by_key(|name| (name != "x", name.clone()));
            seen.insert(names.join(" "));
            assert!(
                next.list(p("")).expect("listed").iter().all(|e| !e.name.starts_with(".new-")),
                "temporary files are hidden"
            );
            next.cleanup(p("")).expect("cleaned up");
            assert!(next.paths().iter().all(|path| !path.display().to_string().starts_with(".new-")), "case {n}");
        }
        assert_eq!(seen, expected.iter().map(|s| (*s).to_owned()).collect(), "case {n}");
    }
}

#[test]
fn replacing_is_old_or_new_at_every_crash_point() {
    for point in 0..3 {
        let mut seen = BTreeSet::new();
        for seed in 0..60 {
            let disk = SimDisk::new(seed, ROOM);
            disk.replace(p("f"), &[1; 5000]).expect("made");
            disk.cut_after(point);
            disk.replace(p("f"), &[2; 3000]).expect_err("the power goes");
            let next = disk.power_cut();
            let found = read(&next, "f");
            assert!(found == [1; 5000] || found == [2; 3000], "point {point}, seed {seed}: {} bytes", found.len());
            seen.insert(found[0]);
        }
        // Only the last step, the rename, can show the new one.
        assert_eq!(seen.len(), if point == 2 { 2 } else { 1 }, "point {point}");
    }
}

#[test]
fn lengths_survive_in_their_order() {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(3 * 4096)).expect("made");
        file.write_at(0, &[1; 3 * 4096]).expect("written");
        file.flush().expect("flushed");
        file.set_len(ByteLen(1000)).expect("cut");
        file.set_len(ByteLen(2 * 4096)).expect("extended");
        assert!(read(&disk, "f")[1000..].iter().all(|b| *b == 0), "what was cut off must not come back");
        let found = read(&disk.power_cut(), "f");
        seen.insert(found.len());
        assert!(found[..1000].iter().all(|b| *b == 1), "seed {seed}");
        if found.len() == 2 * 4096 {
            assert!(found[1000..].iter().all(|b| *b == 0), "seed {seed}: what was cut off came back");
        } else {
            assert!(found.iter().all(|b| *b == 1), "seed {seed}");
        }
    }
    assert_eq!(seen, BTreeSet::from([1000, 2 * 4096, 3 * 4096]));
}

#[test]
fn a_flushed_cut_stays_cut() {
    for seed in 0..50 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(3 * 4096)).expect("made");
        file.write_at(0, &[1; 3 * 4096]).expect("written");
        file.set_len(ByteLen(100)).expect("cut");
        file.set_len(ByteLen(4096)).expect("extended");
        file.punch_hole(10, 20).expect("punched");
        file.flush().expect("flushed");
        let found = read(&disk.power_cut(), "f");
        let expected: Vec<u8> = (0..4096).map(|n| u8::from(n < 100 && !(10..30).contains(&n))).collect();
        assert!(found == expected, "seed {seed}");
    }
}

/// A run with everything in it; returns every byte of every file after the cut, and what the caller saw.
fn eventful(seed: u64, cut: Option<u64>) -> (Vec<String>, u64) {
    let disk = SimDisk::new(seed, ROOM);
    if let Some(n) = cut {
        disk.cut_after(n);
    }
    let mut log = Vec::new();
    let run = |log: &mut Vec<String>| -> Result<(), DiskError> {
        disk.create_dir(p("d"))?;
        let file = disk.create_zeroed(p("d/f"), ByteLen(16 * 4096))?;
        let mut queue = disk.write_queue(p("d/f"), 3)?;
        for id in 0..6 {
            if queue.in_flight() == 3 {
                log.extend(queue.complete(true).into_iter().map(|c| format!("{} {}", c.id, c.result.is_ok())));
            }
            if queue.in_flight() < 3 {
                queue.submit(id, id * 8192, buffer(id as u8 + 1, 8192));
            }
        }
        file.write_at(50_000, &[9; 9000])?;
        file.flush()?;
        file.write_at(100, &[8; 3000])?;
        disk.replace(p("d/g"), &[5; 700])?;
        file.set_len(ByteLen(60_000))?;
        disk.rename(p("d/f"), p("h"))?;
        std::mem::forget(queue);
        Ok(())
    };
    let ended = run(&mut log).map_err(|e| e.to_string());
    log.push(format!("{ended:?}"));
    let operations = disk.operations();
    let next = disk.power_cut();
    for path in next.paths() {
        if let Ok(file) = next.open(&path, OpenMode::Read) {
            let mut bytes = vec![0; file.len().expect("measured").0 as usize];
            file.read_at(0, &mut bytes).expect("read");
            log.push(format!("{} {bytes:?}", path.display()));
        } else {
            log.push(path.display().to_string());
        }
    }
    (log, operations)
}

#[test]
fn the_same_seed_gives_the_same_disk() {
    let mut different = BTreeSet::new();
    for seed in 0..20 {
        let (log, operations) = eventful(seed, None);
        assert_eq!((log.clone(), operations), eventful(seed, None), "seed {seed}");
        different.insert(log);
        for cut in 0..operations {
            assert_eq!(eventful(seed, Some(cut)), eventful(seed, Some(cut)), "seed {seed}, cut {cut}");
            assert_eq!(eventful(seed, Some(cut)).1, cut, "seed {seed}: exactly so many operations went through");
        }
    }
    assert!(different.len() > 10, "seeds hardly matter: {}", different.len());
}

#[test]
fn a_fork_has_another_future_and_leaves_the_original_alone() {
    let disk = SimDisk::new(1, ROOM);
    let file = disk.create_zeroed(p("f"), ByteLen(4096)).expect("made");
    file.write_at(0, &[1; 4096]).expect("written");
    let futures: BTreeSet<Vec<u8>> = (0..50).map(|seed| read(&disk.fork(seed).power_cut(), "f")).collect();
    assert!(futures.len() > 5, "{} futures", futures.len());
    disk.fork(1).replace(p("f"), b"fork").expect("made");
    assert_eq!(read(&disk, "f"), [1; 4096]);
    file.flush().expect("the original goes on");
    let futures: BTreeSet<Vec<u8>> = (0..50).map(|seed| read(&disk.fork(seed).power_cut(), "f")).collect();
    assert_eq!(futures.len(), 1, "flushed is flushed in every future");
}

#[test]
fn a_killed_process_leaves_unflushed_data_visible_and_at_risk() {
    let (mut flown, mut lost) = (BTreeSet::new(), 0);
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(3 * 4096)).expect("made");
        file.write_at(0, &[1; 4096]).expect("written");
        let mut queue = disk.write_queue(p("f"), 1).expect("a queue");
        queue.submit(1, 4096, buffer(2, 4096));
        let next = disk.kill();
        assert!(is_power_lost(&file.write_at(0, &[1]).expect_err("the process is dead")));
        drop(queue);
        let found = read(&next, "f");
        assert!(found[..4096].iter().all(|b| *b == 1), "seed {seed}: the page cache outlives the process");
        assert!(found[4096..8192].iter().all(|b| *b == found[4096]), "seed {seed}: a kill tears nothing");
        flown.insert(found[4096]);
        lost += usize::from(read(&next.power_cut(), "f")[0] == 0);
    }
    assert_eq!(flown, BTreeSet::from([0, 2]));
    assert!(lost > 10, "unflushed data was lost only {lost} times");
}

#[test]
fn a_failed_flush_poisons_and_a_later_one_saves_nothing() {
    let mut lost = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(12288)).expect("made");
        file.write_at(0, &[1; 12288]).expect("written");
        disk.fail_next_flush();
        file.flush().expect_err("asked for");
        for refused in [file.flush(), file.write_at(0, &[1]), file.set_len(ByteLen(1)), file.punch_hole(0, 1)] {
            assert!(matches!(refused.expect_err("poisoned").kind, DiskErrorKind::Poisoned), "seed {seed}");
        }
        let again = disk.open(p("f"), OpenMode::ReadWrite).expect("opened");
        assert_eq!(read(&disk, "f"), [1; 12288], "visible all the same");
        again.flush().expect("the pages are clean, so this succeeds");
        // What is written again is safe again, either way of writing.
        again.write_at(4096, &[2; 2048]).expect("written");
        again.flush().expect("flushed");
        again.write_at(6144, &[2; 2048]).expect("written");
        again.flush().expect("flushed");
        let mut queue = disk.write_queue(p("f"), 1).expect("a queue");
        queue.submit(1, 8192, buffer(2, 4096));
        assert!(queue.complete(true)[0].result.is_ok());
        let found = read(&disk.power_cut(), "f");
        assert!(found[4096..].iter().all(|b| *b == 2), "seed {seed}");
        lost += usize::from(found[0] == 0);
    }
    assert!(lost > 20, "a failed flush lost data only {lost} times");
}

#[test]
fn a_length_from_before_a_failed_flush_is_saved_by_the_next() {
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_sparse(p("f"), ByteLen(0)).expect("made");
        file.write_at(0, &[1; 1000]).expect("written");
        file.set_len(ByteLen(100)).expect("cut");
        file.write_at(0, &[2; 2000]).expect("written");
        disk.fail_next_flush();
        file.flush().expect_err("asked for");
        let again = disk.open(p("f"), OpenMode::ReadWrite).expect("opened");
        again.write_at(500, &[3; 500]).expect("written");
        again.flush().expect("flushed");
        let found = read(&disk.power_cut(), "f");
        assert_eq!(found.len(), 2000, "seed {seed}");
        assert!(found[500..1000].iter().all(|b| *b == 3), "seed {seed}: a flushed write is gone");
        assert!(found[100..500].iter().all(|b| *b != 1), "seed {seed}: what was cut off came back");
    }
}

#[test]
fn a_process_killed_inside_a_rename_leaves_either_name_and_only_a_cleanup_makes_it_last() {
    let (mut seen, mut later) = (BTreeSet::new(), BTreeSet::new());
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        disk.replace(p("x"), b"x").expect("made");
        disk.cut_after(0);
        disk.rename(p("x"), p("y")).expect_err("the process dies");
        let next = disk.kill();
        seen.insert(next.paths());
        later.insert((next.paths(), next.fork(seed).power_cut().paths()));
        next.cleanup(p("")).expect("flushed");
        assert_eq!(next.paths(), next.power_cut().paths(), "seed {seed}");
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
    let goes_back = (vec![p("y").to_owned()], vec![p("x").to_owned()]);
    assert!(later.contains(&goes_back), "a name that was seen must be able to go back: {later:?}");
}

#[test]
fn a_failed_write_hits_the_named_file_once_and_poisons_its_queue() {
    let disk = SimDisk::new(3, ROOM);
    for name in ["seg-1", "other"] {
        disk.create_zeroed(p(name), ByteLen(8192)).expect("made");
    }
    disk.fail_write_at("seg-");
    let other = disk.open(p("other"), OpenMode::ReadWrite).expect("opened");
    other.write_at(0, &[1]).expect("not this one");
    let mut queue = disk.write_queue(p("seg-1"), 2).expect("a queue");
    queue.submit(1, 0, buffer(1, 4096));
    assert!(matches!(queue.complete(true)[0].result.as_ref().expect_err("asked for").kind, DiskErrorKind::Io(_)));
    queue.submit(2, 0, buffer(1, 4096));
    assert!(matches!(queue.complete(true)[0].result.as_ref().expect_err("poisoned").kind, DiskErrorKind::Poisoned));
    let mut next = disk.write_queue(p("seg-1"), 2).expect("a queue");
    next.submit(1, 0, buffer(1, 4096));
    assert!(next.complete(true)[0].result.is_ok());
    disk.fail_write_at("oth");
    other.write_at(0, &[1; 100]).expect_err("asked for");
    other.write_at(0, &[1; 100]).expect("a failed write alone poisons no file");
}

#[test]
fn a_failed_directory_operation_may_not_last() {
    let mut seen = BTreeSet::new();
    for seed in 0..60 {
        let disk = SimDisk::new(seed, ROOM);
        disk.replace(p("x"), b"x").expect("made");
        disk.fail_next_directory_flush();
        disk.rename(p("x"), p("y")).expect_err("asked for");
        assert_eq!(disk.paths(), [p("y")], "it is seen");
        seen.insert(disk.fork(seed).power_cut().paths());
        disk.cleanup(p("")).expect("flushed");
        assert_eq!(disk.power_cut().paths(), [p("y")], "seed {seed}: a later flush of the directory saves it");
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
}

#[test]
fn a_lying_flush_loses_what_it_promised() {
    let (mut file_lost, mut queue_lost, mut name_lost) = (0, 0, 0);
    for seed in 0..100 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(8192)).expect("made");
        disk.set_lying_flush(true);
        file.write_at(0, &[1; 4096]).expect("written");
        file.flush().expect("it says so");
        let mut queue = disk.write_queue(p("f"), 1).expect("a queue");
        queue.submit(1, 4096, buffer(1, 4096));
        assert!(queue.complete(true)[0].result.is_ok());
        disk.rename(p("f"), p("g")).expect("it says so");
        assert_eq!(read(&disk, "g"), [1; 8192]);
        let next = disk.power_cut();
        let name = next.paths()[0].display().to_string();
        name_lost += usize::from(name == "f");
        let found = read(&next, &name);
        file_lost += usize::from(found[0] == 0);
        queue_lost += usize::from(found[4096] == 0);
    }
    assert!(file_lost > 20 && queue_lost > 20 && name_lost > 20, "{file_lost} {queue_lost} {name_lost}");
}

#[test]
fn a_misdirected_write_damages_another_place() {
    for seed in 0..50 {
        let disk = SimDisk::new(seed, ROOM);
        let file = disk.create_zeroed(p("f"), ByteLen(8 * 4096)).expect("made");
        disk.misdirect_next_write("f");
        let mut queue = disk.write_queue(p("f"), 1).expect("a queue");
        queue.submit(1, 4096, buffer(1, 4096));
        assert!(queue.complete(true)[0].result.is_ok(), "the device notices nothing");
        let found = read(&disk, "f");
        assert!(found[4096..8192].iter().all(|b| *b == 0), "seed {seed}: the right place is stale");
        assert_eq!(found.iter().filter(|b| **b == 1).count(), 4096, "seed {seed}: another place is damaged");
        queue.submit(2, 4096, buffer(2, 4096));
        assert!(queue.complete(true)[0].result.is_ok());
        assert!(read(&disk, "f")[4096..8192].iter().all(|b| *b == 2), "only one write goes astray");
        disk.misdirect_next_write("f");
        file.write_at(0, &[3; 4096]).expect("written");
        assert_eq!(read(&disk, "f")[0], 3, "served from the page cache");
        file.flush().expect("flushed");
        assert_ne!(read(&disk.power_cut(), "f")[0], 3, "seed {seed}: it never got there");
    }
}

#[test]
fn a_flipped_bit_is_one_bit() {
    let disk = SimDisk::new(1, ROOM);
    let file = disk.create_zeroed(p("f"), ByteLen(9000)).expect("made");
    file.write_at(5000, &[0x0f]).expect("written");
    disk.flip_bit(p("f"), 5000, 7).expect("flipped");
    disk.flip_bit(p("f"), 8999, 0).expect("flipped");
    file.flush().expect("flushed");
    let found = read(&disk.power_cut(), "f");
    let set: Vec<(usize, u8)> = found.iter().copied().enumerate().filter(|(_, b)| *b != 0).collect();
    assert_eq!(set, [(5000, 0x8f), (8999, 1)]);
    let other = SimDisk::new(1, ROOM);
    other.flip_bit(p("f"), 0, 0).expect_err("no such file");
    other.create_sparse(p("f"), ByteLen(1)).expect("made");
    other.flip_bit(p("f"), 1, 0).expect_err("past the end");
}

#[test]
fn room_is_counted() {
    let disk = SimDisk::new(1, ByteLen(100 * 4096));
    let available = || disk.space().expect("measured").available.0 / 4096;
    let file = disk.create_zeroed(p("z"), ByteLen(40 * 4096)).expect("fits");
    assert_eq!(available(), 60);
    file.write_at(0, &[1; 40 * 4096]).expect("no new room needed");
    assert_eq!(available(), 60);
    assert!(disk.create_zeroed(p("y"), ByteLen(61 * 4096)).expect_err("no room").is_full());
    assert_eq!(disk.paths(), [p("z")]);
    let sparse = disk.create_sparse(p("s"), ByteLen(1 << 30)).expect("holes take no room");
    assert_eq!(available(), 60);
    sparse.write_at(10 * 4096 - 1, &[1; 2]).expect("fits");
    assert_eq!(available(), 58);
    sparse.punch_hole(9 * 4096, 2 * 4096).expect("punched");
    assert_eq!(available(), 60);
    disk.fill(ByteLen(50 * 4096));
    assert_eq!(available(), 10);
    assert!(sparse.write_at(0, &[1; 11 * 4096]).expect_err("no room").is_full());
    assert!(disk.replace(p("r"), &[1; 4097]).expect_err("no room").is_full());
    assert_eq!(disk.paths(), [p("s"), p("z")], "a failed replacement leaves nothing");
    sparse.set_len(ByteLen(0)).expect("cut");
    assert_eq!(available(), 10);
    let mut queue = disk.write_queue(p("s"), 1).expect("a queue");
    queue.submit(1, 0, buffer(1, 11 * 4096));
    assert!(queue.complete(true)[0].result.as_ref().expect_err("no room").is_full());
    drop(queue);
    disk.set_capacity(ByteLen(10 * 4096));
    assert_eq!(available(), 0);
    disk.set_capacity(ByteLen(1000 * 4096));
    disk.remove(p("z")).expect("removed");
    drop(sparse);
    let before = available();
    let mut one = [0];
    file.read_at(0, &mut one).expect("open files keep their room");
    drop(file);
    disk.remove(p("s")).expect("removed");
    assert_eq!(available(), 950, "was {before} while the file was open");
}

/// Random writes, flushes and cuts against an oracle that keeps, for each sector, every version it may have.
#[test]
fn each_sector_is_a_version_it_may_be() {
    const SECTORS: usize = 64;
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let mut disk = SimDisk::new(seed, ROOM);
        disk.create_zeroed(p("f"), ByteLen((SECTORS * SECTOR) as u64)).expect("made");
        // First what is durable, then what came since.
        let mut versions: Vec<Vec<u8>> = vec![vec![0]; SECTORS];
        for round in 0..6 {
            let file = disk.open(p("f"), OpenMode::ReadWrite).expect("opened");
            let mut queue = disk.write_queue(p("f"), 4).expect("a queue");
            for _ in 0..rng.below(12) {
                let version = rng.below(255) as u8 + 1;
                match rng.below(6) {
                    0 => {
                        file.flush().expect("flushed");
                        versions.iter_mut().for_each(|v| drop(v.drain(..v.len() - 1)));
                    }
                    1 => {
                        let at = rng.below(SECTORS as u64 / 8 - 1) as usize;
                        queue.submit(0, (at * ALIGN) as u64, buffer(version, ALIGN));
                        if rng.below(2) == 0 {
                            assert!(queue.complete(true)[0].result.is_ok(), "seed {seed}");
                            versions[at * 8..at * 8 + 8].iter_mut().for_each(|v| *v = vec![version]);
                        } else {
                            versions[at * 8..at * 8 + 8].iter_mut().for_each(|v| v.push(version));
                            break;
                        }
                    }
                    2 => {
                        let (at, len) = (rng.below(SECTORS as u64 - 16), rng.below(17));
                        file.punch_hole(at * SECTOR as u64, len * SECTOR as u64).expect("punched");
                        versions[at as usize..(at + len) as usize].iter_mut().for_each(|v| v.push(0));
                    }
                    _ => {
                        let (at, len) = (rng.below(SECTORS as u64 - 16), rng.below(17));
                        file.write_at(at * SECTOR as u64, &vec![version; len as usize * SECTOR]).expect("written");
                        versions[at as usize..(at + len) as usize].iter_mut().for_each(|v| v.push(version));
                    }
                }
            }
            disk = disk.power_cut();
            let found = read(&disk, "f");
            for (n, sector) in found.chunks(SECTOR).enumerate() {
                let at = format!("seed {seed}, round {round}, sector {n}");
                assert!(sector.iter().all(|b| *b == sector[0]), "{at}: torn inside");
                assert!(versions[n].contains(&sector[0]), "{at}: {} is none of {:?}", sector[0], versions[n]);
                versions[n] = vec![sector[0]];
            }
        }
    }
}

#[test]
fn clones_and_threads_share_the_disk() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1, ROOM));
    disk.create_dir(p("d")).expect("made");
    std::thread::scope(|scope| {
        for t in 0..4 {
            let disk = &disk;
            scope.spawn(move || {
                for n in 0..20 {
                    disk.replace(p(&format!("d/{t}-{n}")), &[t; 100]).expect("made");
                }
            });
        }
    });
    assert_eq!(disk.list(p("d")).expect("listed").len(), 80);
}
