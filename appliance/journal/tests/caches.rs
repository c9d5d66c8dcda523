//! What a reader remembers never changes an answer: places found before a fold, checksums kept of parts of records, reads that do
//! not wait. On a real folder, so that the page cache takes part.

mod common;

use common::*;
use durable::{Disk, OsDisk};
use journal::{IndexChoice, Journal, ReadViewError, ResolvedPoint, View};
use model::{Extent, HistoryTime, Lsn, Mark, RecordKind, Term, TimelineId, VolumeId};
use std::{
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

const SECTORS: [u64; 2] = [300, 2000];
const HOUR: u64 = 3_600_000_000;

struct Real {
    folder: tempfile::TempDir,
    disk: Arc<dyn Disk>,
}

impl Real {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = Arc::new(OsDisk::new(folder.path()).expect("opens the folder"));
        Self { folder, disk }
    }
    fn create(&self, hours: u32, index: IndexChoice) -> Journal {
        let mut spec = spec(&SECTORS);
        spec.policy.window_hours = hours;
        spec.policy.window_hours_floor = 0;
        Journal::create(Arc::clone(&self.disk), dir(), &spec, Term(1), options(index), HistoryTime(1)).expect("creates")
    }
    fn segments(&self) -> Vec<PathBuf> {
        let dir = self.folder.path().join(dir()).join("seg");
        let files = std::fs::read_dir(dir).expect("segments").map(|e| e.expect("an entry").path());
        files.filter(|p| p.extension().is_some_and(|e| e == "seg" || e == "open")).collect()
    }
}

fn at(lsn: Lsn) -> ResolvedPoint {
    ResolvedPoint { timeline: TimelineId(0), lsn, time: HistoryTime(0) }
}

fn grow(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, count: usize) {
    for _ in 0..count {
        let seq = oracle.log.len() as u64 + 1;
        let mut entry = draw(rng, &SECTORS, seq * HOUR / 60);
        entry.more = false;
        append(journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
    }
    journal.drain().expect("durable");
}

/// Random reads of a view, by both ways; how many did not have to wait.
fn check_some(view: &View, images: &[Vec<u8>], rng: &mut Rng, what: &str) -> usize {
    let mut at_once = 0;
    for _ in 0..60 {
        let which = rng.below(2) as usize;
        let (image, volume) = (&images[which], VolumeId(which as u32 + 1));
        let start = rng.below(SECTORS[which]);
        let longest = [1, 8, 64, 2000][rng.below(4) as usize];
        let sectors = 1 + rng.below((SECTORS[which] - start).min(longest));
        let (from, len) = ((start * 512) as usize, (sectors * 512) as usize);
        let mut got = vec![0xa5; len];
        if rng.below(3) == 0 {
            view.prefetch(volume, start * 512, len as u64).expect("prefetches");
        }
        if view.read_at_once(volume, start * 512, &mut got) {
            at_once += 1;
            assert!(got == image[from..from + len], "{what}: at once, volume {volume} sector {start}+{sectors}");
        }
        got.fill(0x5a);
        view.read(volume, start * 512, &mut got).unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
        assert!(got == image[from..from + len], "{what}: volume {volume} sector {start}+{sectors}");
    }
    at_once
}

#[test]
fn views_held_open_read_the_same_while_folds_move_what_they_found() {
    for (seed, index) in [(1, IndexChoice::Memory), (2, IndexChoice::None)] {
        let what = format!("seed {seed}, {index:?}");
        let real = Real::new();
        let mut rng = Rng::new(seed);
        let mut journal = real.create(1, index);
        let mut oracle = Oracle::new(&SECTORS);
        mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
        let (mut held, mut folds, mut at_once) = (Vec::new(), 0, 0);
        let mut floor = Lsn::ZERO;
        for round in 0..9 {
            grow(&mut journal, &mut oracle, &mut rng, 70);
            let lsn = oracle.last();
            let view = journal.reader().view(at(lsn)).expect("opens");
            held.push((view, oracle.images_at(lsn)));
            // Three at a time: the oldest lets the floor go on, the others have read before it does.
            if held.len() > 3 {
                held.remove(0);
            }
            for (view, images) in &held {
                at_once += check_some(view, images, &mut rng, &format!("{what}, round {round}"));
            }
            run_jobs(&mut journal, oracle.log.len() as u64 * HOUR / 60 + round).expect("jobs succeed");
            let now = journal.stats().floor;
            folds += u32::from(now > floor);
            floor = now;
            for (view, images) in &held {
                at_once += check_some(view, images, &mut rng, &format!("{what}, after the jobs of round {round}"));
            }
        }
        assert!(folds >= 3, "{what}: {folds} folds moved the floor to {floor}");
        // A folder in memory may not know of reads that do not wait; then there was none, and nothing was wrong.
        if at_once == 0 {
            println!("SKIPPED: {} answers no read at once", real.folder.path().display());
        }
    }
}

/// A journal with one record of 128 KiB and small ones behind it, a view of it, and what it must read.
fn with_large_record(real: &Real) -> (Journal, Vec<u8>) {
    let mut journal = real.create(72, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
    let mut rng = Rng::new(5);
    let mut write = |lba: u64, len: usize| {
        let change = Change::Write { volume: 1, lba, data: rng.bytes(len) };
        // Not a multiple of five: stored as it is.
        let seq = 1 + oracle.log.len() as u64 * 5;
        let entry = Entry { change, time: seq, more: false, kind: RecordKind::Write };
        append(&mut journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
    };
    write(8, 128 << 10);
    (0..4).for_each(|i| write(300 + i * 8, 4096));
    journal.drain().expect("durable");
    let image = oracle.images_at(oracle.last()).remove(1);
    (journal, image)
}

/// Finds these bytes in the segments.
fn place_of(files: &[PathBuf], bytes: &[u8]) -> (PathBuf, u64) {
    for file in files {
        let all = std::fs::read(file).expect("reads");
        if let Some(at) = all.windows(64).position(|w| w == &bytes[..64]) {
            return (file.clone(), at as u64);
        }
    }
    panic!("the bytes are in no segment");
}

fn flip(file: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(file).expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("reads");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("writes");
}

fn is_damage(result: Result<(), ReadViewError>) -> bool {
    matches!(result, Err(ReadViewError::Corrupt(_)))
}

#[test]
fn damage_is_noticed_after_the_checksums_were_kept_and_only_where_it_is() {
    let real = Real::new();
    let (journal, image) = with_large_record(&real);
    let reader = journal.reader();
    let view = reader.view(reader.resolve(&model::RecoveryPoint::Latest).expect("a point")).expect("opens");
    let volume = VolumeId(2);
    let sector = |s: u64| (s * 512) as usize;
    let read = |start: u64, sectors: u64| {
        let mut got = vec![0xee; sector(sectors)];
        let result = view.read(volume, start * 512, &mut got);
        if result.is_ok() {
            assert!(got == image[sector(start)..sector(start + sectors)], "sector {start}+{sectors}");
        }
        let mut at_once = vec![0xee; sector(sectors)];
        if view.read_at_once(volume, start * 512, &mut at_once) {
            assert!(at_once == image[sector(start)..sector(start + sectors)], "at once: sector {start}+{sectors}");
            assert!(result.is_ok(), "at once what cannot be read");
        }
        result
    };
    // Every block, half blocks and stretches over several: the sums are kept by the first.
    for (start, sectors) in [(16, 8), (8, 8), (9, 3), (20, 9), (250, 14), (8, 256), (0, 340), (300, 8), (302, 1)] {
        read(start, sectors).expect("reads");
    }
    let files = real.segments();
    // The third block of the large record.
    let (file, at) = place_of(&files, &image[sector(24)..]);
    flip(&file, at + 100);
    for (start, sectors, damaged) in
        [(24, 8, true), (25, 1, true), (16, 8, false), (32, 8, false), (16, 24, true), (8, 256, true), (300, 8, false)]
    {
        assert_eq!(is_damage(read(start, sectors)), damaged, "sector {start}+{sectors}");
    }
    flip(&file, at + 100);
    read(8, 256).expect("what was put right reads again");
    // One of the small records: it is read whole each time.
    let (file, at) = place_of(&files, &image[sector(308)..]);
    flip(&file, at + 4095);
    assert!(is_damage(read(308, 8)) && is_damage(read(300, 24)), "a flip in a small record");
    read(300, 8).expect("the record before it");
    // Cut off behind the large record: nothing is made up.
    flip(&file, at + 4095);
    let (file, at) = place_of(&files, &image[sector(8)..]);
    std::fs::OpenOptions::new().write(true).open(&file).expect("opens").set_len(at + 8192).expect("cuts");
    read(8, 8).expect("what is left");
    assert!(is_damage(read(24, 8)) && is_damage(read(300, 8)), "what was cut off");
}

#[test]
fn a_record_damaged_before_its_first_read_is_never_served_in_any_part() {
    let real = Real::new();
    let (journal, image) = with_large_record(&real);
    let (file, at) = place_of(&real.segments(), &image[8 * 512..]);
    flip(&file, at + 70_000);
    let reader = journal.reader();
    let view = reader.view(reader.resolve(&model::RecoveryPoint::Latest).expect("a point")).expect("opens");
    for start in (8..264).step_by(8) {
        let mut got = vec![0; 4096];
        assert!(is_damage(view.read(VolumeId(2), start * 512, &mut got)), "sector {start}");
        assert!(!view.read_at_once(VolumeId(2), start * 512, &mut got), "sector {start} at once");
    }
    let mut got = vec![0; 4096];
    view.read(VolumeId(2), 300 * 512, &mut got).expect("its neighbour");
    assert!(got == image[300 * 512..308 * 512]);
    assert!(view.allocation(VolumeId(2), Extent::new(0, 2000)).is_ok());
}
