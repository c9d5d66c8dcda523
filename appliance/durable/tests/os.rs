//! The real disk: its ways of durable writing, what it leaves behind when it fails, its lock.

mod common;

use common::Rng;
use durable::{ALIGN, AlignedBuf, Disk, DiskErrorKind, LockError, OpenMode, OsDisk, QueueChoice};
use model::ByteLen;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn buffer(data: &[u8]) -> AlignedBuf {
    let mut buf = AlignedBuf::with_capacity(data.len());
    buf.extend_from_slice(data);
    buf.pad();
    buf
}

/// Each way there is, with its name. A way that this machine refuses falls through to the next, which the name shows.
fn ways() -> Vec<(QueueChoice, &'static str)> {
    vec![
        (QueueChoice::IoUring, "io_uring, direct"),
        (QueueChoice::DirectThreads, "threads, direct"),
        (QueueChoice::BufferedThreads, "threads, buffered"),
        (QueueChoice::FdatasyncThreads, "threads, buffered, fdatasync"),
    ]
}

#[test]
fn queued_writes_come_back_and_are_there() {
    const LEN: usize = 64 * ALIGN;
    for (choice, name) in ways() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = OsDisk::new(dir.path()).expect("a disk").with_queue(choice);
        let path = Path::new("segment");
        disk.create_zeroed(path, ByteLen((64 * LEN) as u64)).expect("made");
        let mut queue = disk.write_queue(path, 4).expect("a queue");
        if queue.backend() != name {
            println!("SKIPPED: '{name}' is refused here, this ran with '{}'", queue.backend());
        }
        let mut expected = Rng::new(5).bytes(64 * LEN);
        let mut done = Vec::new();
        for (id, part) in expected.chunks(LEN).enumerate() {
            while queue.in_flight() == 4 {
                done.extend(queue.complete(true));
            }
            queue.submit(id as u64, (id * LEN) as u64, buffer(part));
        }
        while queue.in_flight() > 0 {
            done.extend(queue.complete(true));
        }
        let mut ids: Vec<u64> = done.iter().map(|c| c.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..64).collect::<Vec<u64>>(), "{name}");
        assert!(done.iter().all(|c| c.result.is_ok()), "{name}");
        // The same through the page cache, with an ordinary write in between: the two see each other.
        let file = disk.open(path, OpenMode::ReadWrite).expect("opened");
        let mut seen = vec![0; expected.len()];
        file.read_at(0, &mut seen).expect("read");
        assert!(seen == expected, "{name}: other data was read");
        file.write_at(100, b"through the page cache").expect("written");
        file.flush().expect("flushed");
        expected[100..122].copy_from_slice(b"through the page cache");
        expected[ALIGN..2 * ALIGN].fill(7);
        queue.submit(99, ALIGN as u64, buffer(&[7; ALIGN]));
        assert!(queue.complete(true).iter().all(|c| c.id == 99 && c.result.is_ok()), "{name}");
        file.read_at(0, &mut seen).expect("read");
        assert!(seen == expected, "{name}: page cache and direct writes disagree");
    }
}

#[test]
fn a_failed_write_poisons_its_queue_and_no_other() {
    for (choice, name) in ways() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = OsDisk::new(dir.path()).expect("a disk").with_queue(choice);
        let path = Path::new("segment");
        disk.create_zeroed(path, ByteLen(1 << 20)).expect("made");
        let mut queue = disk.write_queue(path, 4).expect("a queue");
        // No file is as long as this.
        queue.submit(1, i64::MAX as u64 + 1 - ALIGN as u64, buffer(&[1; ALIGN]));
        let failed = queue.complete(true).pop().expect("a completion");
        assert_eq!(failed.id, 1, "{name}");
        assert!(matches!(failed.result.expect_err(name).kind, DiskErrorKind::Io(_)), "{name}");
        for id in 2..4 {
            queue.submit(id, 0, buffer(&[2; ALIGN]));
            assert_eq!(queue.in_flight(), 1, "{name}");
            let refused = queue.complete(true).pop().expect("a completion");
            assert_eq!((refused.id, refused.buf.len()), (id, ALIGN), "{name}");
            assert!(matches!(refused.result.expect_err(name).kind, DiskErrorKind::Poisoned), "{name}");
        }
        let mut seen = [9; ALIGN];
        disk.open(path, OpenMode::Read).expect("opened").read_at(0, &mut seen).expect("read");
        assert!(seen.iter().all(|b| *b == 0), "{name}: a poisoned queue wrote");
        let mut other = disk.write_queue(path, 1).expect("a queue");
        other.submit(1, 0, buffer(&[3; ALIGN]));
        assert!(other.complete(true).iter().all(|c| c.result.is_ok()), "{name}");
    }
}

#[test]
fn a_dropped_queue_has_written_everything() {
    for (choice, name) in ways() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = OsDisk::new(dir.path()).expect("a disk").with_queue(choice);
        disk.create_zeroed(Path::new("f"), ByteLen(16 << 20)).expect("made");
        let expected = Rng::new(1).bytes(16 << 20);
        for half in [0, 8] {
            let mut queue = disk.write_queue(Path::new("f"), 8).expect("a queue");
            for part in half..half + 8 {
                queue.submit(part as u64, (part << 20) as u64, buffer(&expected[part << 20..(part + 1) << 20]));
            }
        }
        let mut seen = vec![0; 16 << 20];
        disk.open(Path::new("f"), OpenMode::Read).expect("opened").read_at(0, &mut seen).expect("read");
        assert!(seen == expected, "{name}: a write in flight was lost");
    }
}

#[test]
fn a_queue_can_be_used_from_another_thread() {
    for (choice, name) in ways() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = OsDisk::new(dir.path()).expect("a disk").with_queue(choice);
        disk.create_zeroed(Path::new("f"), ByteLen(1 << 20)).expect("made");
        let mut queue = disk.write_queue(Path::new("f"), 2).expect("a queue");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                queue.submit(1, 0, buffer(&[1; ALIGN]));
                assert!(queue.complete(true).iter().all(|c| c.result.is_ok()), "{name}");
            });
        });
        queue.submit(2, ALIGN as u64, buffer(&[2; ALIGN]));
        assert!(queue.complete(true).iter().all(|c| c.result.is_ok()), "{name}");
    }
}

#[test]
fn an_impossible_depth_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    disk.create_zeroed(Path::new("f"), ByteLen(ALIGN as u64)).expect("made");
    for depth in [0, durable::QUEUE_DEPTH_MAX + 1] {
        assert!(disk.write_queue(Path::new("f"), depth).is_err(), "depth {depth}");
    }
    disk.write_queue(Path::new("f"), durable::QUEUE_DEPTH_MAX).expect("the deepest");
}

#[test]
fn zeroed_files_are_allocated_and_private() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    // Not a multiple of anything.
    let len = (20 << 20) + 12_345;
    let file = disk.create_zeroed(Path::new("f"), ByteLen(len)).expect("made");
    let meta = std::fs::metadata(dir.path().join("f")).expect("there");
    assert_eq!(meta.len(), len);
    assert!(meta.blocks() * 512 >= len, "only {} blocks are allocated", meta.blocks());
    assert_eq!(meta.mode() & 0o777, 0o600);
    let mut seen = vec![1; len as usize];
    file.read_at(0, &mut seen).expect("read");
    assert!(seen.iter().all(|b| *b == 0));
    disk.create_dir(Path::new("d")).expect("made");
    assert_eq!(std::fs::metadata(dir.path().join("d")).expect("there").mode() & 0o777, 0o700);
}

#[test]
fn leftovers_are_hidden_and_cleaned_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    disk.replace(Path::new("kept"), b"x").expect("made");
    std::fs::write(dir.path().join(".new-1-0"), b"half a segment").expect("written");
    // The name this process would use next may be taken by one that died with the same number.
    for n in 0..20 {
        std::fs::write(dir.path().join(format!(".new-{}-{n}", std::process::id())), b"").expect("written");
    }
    disk.replace(Path::new("kept"), b"y").expect("made beside the leftovers");
    let names: Vec<String> = disk.list(Path::new("")).expect("listed").into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["kept"]);
    assert!(disk.cleanup(Path::new("")).expect("cleaned up") >= 20);
    assert_eq!(disk.cleanup(Path::new("")).expect("cleaned up"), 0);
    assert_eq!(real_names(dir.path()), ["kept"]);
    assert!(disk.cleanup(Path::new("nowhere")).expect_err("not there").is_not_found());
}

fn real_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A file system of 1 MiB, gone when dropped.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn mount() -> Option<Tiny> {
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(dir.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Tiny(dir)),
            Ok(output) => {
                println!("SKIPPED: no small file system: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(e) => {
                println!("SKIPPED: no small file system: {e}");
                None
            }
        }
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.0.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("could not unmount {}", self.0.path().display());
        }
    }
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing_behind() {
    let Some(tiny) = Tiny::mount() else { return };
    let root = tiny.0.path();
    let disk = OsDisk::new(root).expect("a disk");
    let space = disk.space().expect("measured");
    assert_eq!((space.total, space.available), (ByteLen(1 << 20), ByteLen(1 << 20)));
    let full = disk.create_zeroed(Path::new("big"), ByteLen(2 << 20)).expect_err("no room");
    assert!(full.is_full(), "{full}");
    assert_eq!(full.to_string(), "create big: no room left on the disk");
    assert!(disk.replace(Path::new("big"), &vec![1; 2 << 20]).expect_err("no room").is_full());
    assert_eq!(real_names(root), [""; 0]);
    assert_eq!(disk.space().expect("measured").available, ByteLen(1 << 20));

    disk.replace(Path::new("old"), b"old").expect("made");
    assert!(disk.replace(Path::new("old"), &vec![1; 2 << 20]).expect_err("no room").is_full());
    let mut seen = [0; 3];
    disk.open(Path::new("old"), OpenMode::Read).expect("there").read_at(0, &mut seen).expect("read");
    assert_eq!(&seen, b"old", "a failed replacement must leave the old file");

    // A write that fits in part only is a failure of the whole, and the last the queue takes.
    let sparse = disk.create_sparse(Path::new("sparse"), ByteLen(4 << 20)).expect("made");
    assert!(sparse.write_at(0, &vec![1; 2 << 20]).expect_err("no room").is_full());
    for (choice, name) in ways() {
        sparse.punch_hole(0, 4 << 20).expect("punched");
        let disk = disk.clone().with_queue(choice);
        let mut queue = disk.write_queue(Path::new("sparse"), 2).expect("a queue");
        queue.submit(1, 0, buffer(&vec![1; 2 << 20]));
        let failed = queue.complete(true).pop().expect("a completion").result.expect_err(name);
        // The kernel may report the part that fitted instead of the reason.
        let short = matches!(&failed.kind, DiskErrorKind::Io(e) if e.kind() == std::io::ErrorKind::WriteZero);
        assert!(failed.is_full() || short, "{name}: {failed}");
        queue.submit(2, 0, buffer(&[1; ALIGN]));
        let refused = queue.complete(true).pop().expect("a completion").result.expect_err(name);
        assert!(matches!(refused.kind, DiskErrorKind::Poisoned), "{name}: {refused}");
    }
}

#[test]
fn a_missing_root_is_refused_and_can_be_created() {
    let dir = tempfile::tempdir().expect("a directory");
    let root: PathBuf = dir.path().join("a/b");
    assert!(OsDisk::new(&root).expect_err("not there").is_not_found());
    OsDisk::create(&root).expect("made").replace(Path::new("f"), b"x").expect("written");
    OsDisk::create(&root).expect("one that exists is fine");
    OsDisk::new(root.join("f")).expect_err("a file is no disk");
}

#[test]
fn two_cannot_hold_the_lock() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    let held = disk.lock(Path::new("lock")).expect("free");
    let refused = OsDisk::new(dir.path()).expect("a disk").lock(Path::new("lock")).expect_err("held");
    let expected = format!("lock is in use by another process ({})", std::process::id());
    assert_eq!(refused.to_string(), expected);
    assert!(matches!(refused, LockError::Held { pid: Some(pid), .. } if pid == std::process::id()), "{refused:?}");
    drop(held);
    drop(disk.lock(Path::new("lock")).expect("free again"));
    // Whatever is in the file, the lock decides.
    std::fs::write(dir.path().join("lock"), [0xff; 100]).expect("written");
    let held = disk.lock(Path::new("lock")).expect("free");
    std::fs::write(dir.path().join("lock"), [0xff; 100]).expect("written");
    let refused = disk.lock(Path::new("lock")).expect_err("held");
    assert_eq!(refused.to_string(), "lock is in use by another process");
    drop(held);
    assert!(matches!(disk.lock(Path::new("nowhere/lock")), Err(LockError::Disk(e)) if e.is_not_found()));
}

#[test]
fn reads_and_writes_from_several_threads_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = OsDisk::new(dir.path()).expect("a disk");
    let file = disk.create_sparse(Path::new("f"), ByteLen(8 << 16)).expect("made");
    std::thread::scope(|scope| {
        for t in 0..8u8 {
            let file = &file;
            scope.spawn(move || {
                let at = u64::from(t) << 16;
                for round in 1..50u8 {
                    file.write_at(at, &[round; 1 << 12]).expect("written");
                    let mut seen = [0; 1 << 12];
                    file.read_at(at, &mut seen).expect("read");
                    assert!(seen.iter().all(|b| *b == round), "thread {t}, round {round}");
                }
            });
        }
    });
    file.flush().expect("flushed");
}
