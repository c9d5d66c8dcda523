//! What every disk promises while nothing goes wrong, checked against a map of byte vectors on the real disk (in every way
//! of durable writing it has) and the simulated one.

mod common;

use common::Rng;
use durable::{ALIGN, AlignedBuf, Disk, DiskErrorKind, OpenMode, OsDisk, QueueChoice, SimDisk};
use model::ByteLen;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

const ROOM: ByteLen = ByteLen(64 << 20);

/// Random operations on `disk` and on a map; after each the two must agree on everything a caller can see.
fn agrees_with_a_map(disk: &dyn Disk, seed: u64, steps: usize) {
    let mut rng = Rng::new(seed);
    let mut oracle: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    disk.create_dir(Path::new("d/e")).expect("a directory");
    let names: Vec<PathBuf> = ["x", "y", "d/x", "d/e/x", "d/e/y"].iter().map(PathBuf::from).collect();
    for step in 0..steps {
        let at = format!("seed {seed}, step {step}");
        let name = &names[rng.below(names.len() as u64) as usize];
        match rng.below(9) {
            0 => {
                let len = rng.below(40_000);
                let zeroed = rng.below(2) == 0;
                let made = if zeroed {
                    disk.create_zeroed(name, ByteLen(len))
                } else {
                    disk.create_sparse(name, ByteLen(len))
                };
                if oracle.contains_key(name) {
                    assert!(matches!(made.expect_err(&at).kind, DiskErrorKind::Exists), "{at}");
                } else {
                    assert_eq!(made.expect(&at).len().expect(&at), ByteLen(len), "{at}");
                    oracle.insert(name.clone(), vec![0; len as usize]);
                }
            }
            1 => {
                let to = &names[rng.below(names.len() as u64) as usize];
                match (disk.rename(name, to), oracle.remove(name)) {
                    (Ok(()), Some(content)) => drop(oracle.insert(to.clone(), content)),
                    (Err(e), None) => assert!(e.is_not_found(), "{at}: {e}"),
                    (done, had) => panic!("{at}: rename {done:?}, the oracle has it: {}", had.is_some()),
                }
            }
            2 if rng.below(3) == 0 => match (disk.remove(name), oracle.remove(name)) {
                (Ok(()), Some(_)) => {}
                (Err(e), None) => assert!(e.is_not_found(), "{at}: {e}"),
                (done, had) => panic!("{at}: remove {done:?}, the oracle has it: {}", had.is_some()),
            },
            3 => {
                let len = rng.below(9000) as usize;
                let data = rng.bytes(len);
                disk.replace(name, &data).expect(&at);
                oracle.insert(name.clone(), data);
            }
            4 => {
                let Some(content) = oracle.get_mut(name) else { continue };
                queued_writes(disk, name, content, &mut rng, &at);
            }
            _ => {
                let opened = disk.open(name, OpenMode::ReadWrite);
                let Some(content) = oracle.get_mut(name) else {
                    assert!(opened.expect_err(&at).is_not_found(), "{at}");
                    continue;
                };
                let file = opened.expect(&at);
                for _ in 0..rng.below(4) {
                    let offset = rng.below(50_000);
                    let len = rng.below(10_000);
                    match rng.below(4) {
                        0 => {
                            file.set_len(ByteLen(offset)).expect(&at);
                            content.resize(offset as usize, 0);
                        }
                        1 => {
                            file.punch_hole(offset, len).expect(&at);
                            let end = ((offset + len) as usize).min(content.len());
                            content[(offset as usize).min(end)..end].fill(0);
                        }
                        _ if len > 0 => {
                            let data = rng.bytes(len as usize);
                            file.write_at(offset, &data).expect(&at);
                            let end = (offset + len) as usize;
                            if content.len() < end {
                                content.resize(end, 0);
                            }
                            content[offset as usize..end].copy_from_slice(&data);
                        }
                        _ => {}
                    }
                }
                file.flush().expect(&at);
            }
        }
        for name in &names {
            let Some(content) = oracle.get(name) else {
                assert!(disk.open(name, OpenMode::Read).expect_err(&at).is_not_found(), "{at}");
                continue;
            };
            let file = disk.open(name, OpenMode::Read).expect(&at);
            assert_eq!(file.len().expect(&at).0, content.len() as u64, "{at}: length of {}", name.display());
            let mut seen = vec![0xaa; content.len()];
            file.read_at(0, &mut seen).expect(&at);
            assert!(seen == *content, "{at}: contents of {}", name.display());
            let past = file.read_at(content.len() as u64, &mut [0]).expect_err(&at);
            assert!(matches!(past.kind, DiskErrorKind::ShortRead { wanted: 1, had: 0 }), "{at}: {past}");
        }
        let listed: Vec<(String, u64)> = list(disk, "d/e").into_iter().map(|e| (e.0, e.1)).collect();
        let expected: Vec<(String, u64)> = oracle
            .iter()
            .filter_map(|(path, content)| {
                Some((path.strip_prefix("d/e").ok()?.display().to_string(), content.len() as u64))
            })
            .collect();
        assert_eq!(listed, expected, "{at}");
    }
}

fn list(disk: &dyn Disk, dir: &str) -> Vec<(String, u64, bool)> {
    disk.list(Path::new(dir)).expect("a listing").into_iter().map(|e| (e.name, e.len.0, e.is_dir)).collect()
}

/// Disjoint writes, several in flight, some of them past the end.
fn queued_writes(disk: &dyn Disk, name: &Path, content: &mut Vec<u8>, rng: &mut Rng, at: &str) {
    let depth = 1 + rng.below(5) as usize;
    let mut queue = disk.write_queue(name, depth).expect(at);
    assert_eq!(queue.depth(), depth, "{at}");
    let mut waiting = BTreeMap::new();
    let collect = |done: Vec<durable::Completion>, waiting: &mut BTreeMap<u64, Vec<u8>>| {
        for completion in done {
            completion.result.expect(at);
            let sent = waiting.remove(&completion.id).expect("one completion for each submission");
            assert!(completion.buf.as_slice() == sent, "{at}: another buffer came back");
        }
    };
    let mut offset = rng.below(4) * ALIGN as u64;
    for id in 0..rng.below(12) {
        while queue.in_flight() == depth {
            collect(queue.complete(true), &mut waiting);
        }
        let len = (1 + rng.below(3) as usize) * ALIGN;
        let data = rng.bytes(len);
        let mut buf = AlignedBuf::with_capacity(len);
        buf.extend_from_slice(&data);
        queue.submit(id, offset, buf);
        let end = offset as usize + len;
        if content.len() < end {
            content.resize(end, 0);
        }
        content[offset as usize..end].copy_from_slice(&data);
        waiting.insert(id, data);
        offset += (len + rng.below(2) as usize * ALIGN) as u64;
        collect(queue.complete(false), &mut waiting);
        assert_eq!(queue.in_flight(), waiting.len(), "{at}");
    }
    // Half of the time the queue is dropped with writes in flight: they must be there all the same.
    if rng.below(2) == 0 {
        while queue.in_flight() > 0 {
            collect(queue.complete(true), &mut waiting);
        }
        assert!(waiting.is_empty(), "{at}");
        assert!(queue.complete(true).is_empty(), "{at}: waiting for nothing must return");
    }
}

#[test]
fn a_simulated_disk_agrees_with_a_map() {
    for seed in 0..60 {
        agrees_with_a_map(&SimDisk::new(seed, ROOM), seed, 150);
    }
}

#[test]
fn the_real_disk_agrees_with_a_map() {
    let ways =
        [QueueChoice::IoUring, QueueChoice::DirectThreads, QueueChoice::BufferedThreads, QueueChoice::FdatasyncThreads];
    for (seed, way) in ways.into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("a directory");
        agrees_with_a_map(&OsDisk::new(dir.path()).expect("a disk").with_queue(way), seed as u64, 60);
    }
}

#[test]
fn the_real_disk_agrees_with_a_map_without_direct_writes() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("SKIPPED: /dev/shm cannot be written to");
        return;
    };
    agrees_with_a_map(&OsDisk::new(dir.path()).expect("a disk"), 9, 300);
}

#[test]
fn paths_stay_inside_the_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let os = OsDisk::new(dir.path()).expect("a disk");
    let sim = SimDisk::new(1, ROOM);
    for disk in [&os as &dyn Disk, &sim] {
        for path in ["/etc/passwd", "../x", "a/../../x", ".new-1", "a/.new-x", ".new-d/x"] {
            let path = Path::new(path);
            for failed in [
                disk.open(path, OpenMode::Read).map(drop),
                disk.create_sparse(path, ByteLen(1)).map(drop),
                disk.create_zeroed(path, ByteLen(1)).map(drop),
                disk.replace(path, b"x"),
                disk.rename(path, Path::new("y")),
                disk.rename(Path::new("y"), path),
                disk.remove(path),
                disk.create_dir(path),
                disk.write_queue(path, 1).map(drop),
                disk.list(path).map(drop),
            ] {
                let refused = failed.expect_err("a path outside the disk");
                assert!(
                    matches!(&refused.kind, DiskErrorKind::Io(e) if e.kind() == std::io::ErrorKind::InvalidInput),
                    "{refused}"
                );
            }
        }
    }
}

#[test]
fn directories_and_files_are_not_mistaken_for_each_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let os = OsDisk::new(dir.path()).expect("a disk");
    let sim = SimDisk::new(1, ROOM);
    for disk in [&os as &dyn Disk, &sim] {
        let p = Path::new;
        disk.create_dir(p("a/b")).expect("made");
        disk.create_dir(p("a/b")).expect("one that exists is fine");
        disk.replace(p("a/f"), b"x").expect("made");
        assert_eq!(list(disk, ""), [("a".into(), 0, true)]);
        assert_eq!(list(disk, "a"), [("b".into(), 0, true), ("f".into(), 1, false)]);
        disk.open(p("a"), OpenMode::Read).expect_err("a directory is not opened");
        disk.list(p("a/f")).expect_err("a file is not listed");
        assert!(disk.list(p("nowhere")).expect_err("not there").is_not_found());
        disk.create_dir(p("a/f")).expect_err("a file is there");
        disk.remove(p("a")).expect_err("not empty");
        disk.rename(p("a/f"), p("a/b")).expect_err("a directory is there");
        disk.replace(p("a/b"), b"x").expect_err("a directory is there");
        assert!(disk.replace(p("nowhere/f"), b"x").expect_err("no such directory").is_not_found());
        assert!(disk.create_zeroed(p("nowhere/f"), ByteLen(1)).expect_err("no such directory").is_not_found());
        assert!(disk.rename(p("a/f"), p("nowhere/f")).expect_err("no such directory").is_not_found());
        disk.rename(p("a"), p("c")).expect("a directory moves with what is in it");
        assert_eq!(list(disk, "c"), [("b".into(), 0, true), ("f".into(), 1, false)]);
        disk.remove(p("c/b")).expect("an empty directory goes");
        disk.remove(p("c/f")).expect("a file goes");
        disk.remove(p("c")).expect("now it is empty");
        assert_eq!(list(disk, ""), []);
        disk.write_queue(p("nowhere"), 1).err().expect("not there");
    }
}

#[test]
fn a_removed_file_can_be_read_until_it_is_closed() {
    let dir = tempfile::tempdir().expect("a directory");
    let os = OsDisk::new(dir.path()).expect("a disk");
    let sim = SimDisk::new(1, ROOM);
    for disk in [&os as &dyn Disk, &sim] {
        disk.replace(Path::new("f"), b"segment").expect("made");
        let file = disk.open(Path::new("f"), OpenMode::Read).expect("opened");
        disk.remove(Path::new("f")).expect("removed");
        let mut seen = [0; 7];
        file.read_at(0, &mut seen).expect("a view still reads the segment that retention removed");
        assert_eq!(&seen, b"segment");
        let refused = file.write_at(0, b"x").expect_err("opened for reading");
        assert!(matches!(refused.kind, DiskErrorKind::Io(_)), "{refused}");
    }
}

fn misuse(offset: u64, len: usize, count: usize) {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    disk.create_zeroed(Path::new("f"), ByteLen(1 << 20)).expect("made");
    let mut queue = disk.write_queue(Path::new("f"), 2).expect("a queue");
    for id in 0..count as u64 {
        let mut buf = AlignedBuf::with_capacity(len);
        buf.extend_from_slice(&vec![1; len]);
        queue.submit(id, offset, buf);
    }
}

#[test]
#[should_panic(expected = "offset 512 of a queued write is not aligned")]
fn an_unaligned_offset_panics() {
    misuse(512, ALIGN, 1);
}

#[test]
#[should_panic(expected = "length 100 of a queued write is not aligned")]
fn an_unaligned_length_panics() {
    misuse(0, 100, 1);
}

#[test]
#[should_panic(expected = "more than 2 writes in flight")]
fn too_many_in_flight_panics() {
    misuse(0, ALIGN, 3);
}
