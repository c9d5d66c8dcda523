//! Flipped bits, lost files and wrong files: never served as data, always named with file and offset, and a torn tail is never
//! taken for damage nor damage for a torn tail.

mod common;

use common::*;
use durable::{Disk, OpenMode, SimDisk};
use journal::{Corruption, IndexChoice, Journal, JournalReader, OpenError, ReadViewError, ResolvedPoint};
use model::{GroupId, HistoryTime, Lsn, Mark, Term, TimelineId, VolumeId};
use std::path::{Path, PathBuf};

const SECTORS: [u64; 2] = [300, 500];

fn journal_of(seed: u64, count: u64, close: bool) -> (SimDisk, Oracle) {
    let disk = disk(seed);
    let mut rng = Rng::new(seed);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
    for seq in 2..=count {
        let entry = draw(&mut rng, &SECTORS, seq);
        append(&mut journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
        if rng.below(3) == 0 {
            journal.submit().expect("submits");
        }
        if rng.below(10) == 0 {
            run_jobs(&mut journal, seq).expect("jobs succeed");
        }
    }
    journal.drain().expect("durable");
    if close {
        journal.close().expect("closes");
    }
    (disk, oracle)
}

fn segments(disk: &SimDisk, suffix: &str) -> Vec<PathBuf> {
    disk.paths()
        .into_iter()
        .filter(|p| p.to_string_lossy().contains("/seg/0") && p.to_string_lossy().ends_with(suffix))
        .collect()
}

fn len(disk: &SimDisk, path: &Path) -> u64 {
    disk.open(path, OpenMode::Read).expect("opens").len().expect("has a length").0
}

fn try_open(disk: &SimDisk) -> Result<Journal, OpenError> {
    Journal::open(arc(disk), dir(), options(IndexChoice::None), HistoryTime(1)).map(|(j, _)| j)
}

fn corruption_of(e: &OpenError) -> &Corruption {
    match e {
        OpenError::Corrupt(c) => c,
        other => panic!("not called damage: {}", chain(other)),
    }
}

/// End of the last batch of an open segment: the last byte that is not zero, rounded up.
fn used(disk: &SimDisk, path: &Path) -> u64 {
    let mut bytes = vec![0; len(disk, path) as usize];
    disk.open(path, OpenMode::Read).expect("opens").read_at(0, &mut bytes).expect("reads");
    bytes.iter().rposition(|b| *b != 0).map_or(0, |at| (at as u64 + 1).next_multiple_of(4096))
}

#[test]
fn verify_finds_every_flipped_byte_of_a_sealed_segment() {
    let (disk, _) = journal_of(1, 150, true);
    let reader = JournalReader::open_offline(arc(&disk), dir()).expect("opens");
    let report = reader.verify(&mut |_| {});
    assert!(report.is_clean(), "{report:?}");
    let files = segments(&disk, ".seg");
    assert!(files.len() >= 2);
    let mut flips = 0;
    for file in &files[..2] {
        let len = len(&disk, file);
        // All of the first and last block, samples between.
        let offsets =
            (0..len).filter(|at| at % 211 == 0 || (*at < 4096 && at % 13 == 0) || (*at > len - 4096 && at % 13 == 0));
        for offset in offsets {
            disk.flip_bit(file, offset, (offset % 8) as u8).expect("flips");
            // A reader that opened before the damage, as the running box has it.
            let report = reader.verify(&mut |_| {});
            assert!(report.damage_count > 0, "{}: a flip at {offset:#x} of {len:#x} is not found", file.display());
            assert!(report.damage.iter().all(|d| d.file == *file), "{offset:#x}: {:?}", report.damage);
            disk.flip_bit(file, offset, (offset % 8) as u8).expect("flips back");
            flips += 1;
        }
    }
    assert!(flips > 1000, "{flips}");
    assert!(reader.verify(&mut |_| {}).is_clean());
}

#[test]
fn a_flip_in_a_sealed_segment_is_never_served_and_names_its_place() {
    let (disk, oracle) = journal_of(2, 300, true);
    let files = segments(&disk, ".seg");
    let mut rng = Rng::new(2);
    let (mut refused, mut named, mut harmless) = (0, 0, 0);
    for round in 0..300 {
        let file = &files[rng.below(files.len() as u64) as usize];
        let offset = rng.below(len(&disk, file));
        disk.flip_bit(file, offset, 3).expect("flips");
        let reader = match try_open(&disk.fork(round)) {
            Ok(journal) => journal.reader(),
            Err(e) => {
                let damage = corruption_of(&e);
                assert_eq!(damage.file, *file, "round {round}");
                assert!(damage.offset <= offset, "round {round}: {damage}");
                refused += 1;
                JournalReader::open_offline(arc(&disk), dir()).expect("offline opens all the same")
            }
        };
        let at = ResolvedPoint { timeline: TimelineId(0), lsn: oracle.last(), time: HistoryTime(0) };
        // Offline the end may be cut short by damage in the last segment; what is shown must be right.
        let at = if reader.view(at).is_ok() { at } else { ResolvedPoint { lsn: reader.stats().last_lsn, ..at } };
        let images = oracle.images_at(at.lsn);
        let view = reader.view(at).expect("opens");
        let mut clean = true;
        for (i, image) in images.iter().enumerate() {
            for lba in 0..SECTORS[i] {
                let mut got = [0; 512];
                match view.read(VolumeId(i as u32 + 1), lba * 512, &mut got) {
                    Ok(()) => {
                        assert!(got == image[(lba * 512) as usize..][..512], "round {round}: sector {lba} is wrong")
                    }
                    Err(ReadViewError::Corrupt(damage)) => {
                        clean = false;
                        let here = damage.file == *file || damage.file.ends_with("seg");
                        assert!(here, "round {round}: {damage}, flipped {} at {offset:#x}", file.display());
                    }
                    Err(e) => panic!("round {round}: {}", chain(&e)),
                }
            }
        }
        if clean {
            harmless += 1
        } else {
            named += 1
        }
        disk.flip_bit(file, offset, 3).expect("flips back");
    }
    assert!(refused > 0 && named > 0 && harmless > 0, "{refused} refused, {named} named, {harmless} harmless");
    try_open(&disk).expect("whole again");
}

#[test]
fn a_flip_in_the_open_segment_is_damage_below_what_was_claimed_and_a_torn_tail_above() {
    let (mut corrupt, mut cut) = (0, 0);
    for close in [true, false] {
        let (disk, oracle) = journal_of(5, 33, close);
        let files = segments(&disk, ".open");
        assert_eq!(files.len(), 1, "{:?}", disk.paths());
        let file = &files[0];
        let end = used(&disk, file);
        for offset in (0..end).step_by(37) {
            let what = format!("closed {close}, flip at {offset:#x} of {end:#x}");
            let copy = disk.fork(offset);
            copy.flip_bit(file, offset, (offset % 8) as u8).expect("flips");
            match Journal::open(arc(&copy), dir(), options(IndexChoice::None), HistoryTime(1)) {
                Err(e) => {
                    let damage = corruption_of(&e);
                    assert_eq!(damage.file, *file, "{what}");
                    assert!(damage.offset <= offset, "{what}: {damage}");
                    corrupt += 1;
                }
                Ok((journal, report)) => {
                    let last = journal.progress().durable;
                    if last < oracle.last() {
                        // Only where nobody had said yet that it was durable: the last batches in flight.
                        assert!(!close, "{what}: a closed journal lost {last}..{}", oracle.last());
                        assert_eq!(report.cut.len(), 1, "{what}");
                        assert!(report.cut[0].at_offset <= offset && offset < end, "{what}: {report:?}");
                        cut += 1;
                    }
                    // Otherwise the flip was in padding, which verify finds.
                    check_view(&journal.reader(), TimelineId(0), last, &oracle.images_at(last), &what);
                }
            }
        }
    }
    assert!(corrupt > 20 && cut > 3, "{corrupt} called damage, {cut} cut");
}

#[test]
fn an_idle_journal_notes_what_is_durable_so_that_no_flip_passes_for_a_torn_tail() {
    let disk = disk(6);
    let mut rng = Rng::new(6);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    for seq in 1..=20 {
        append(&mut journal, &draw(&mut rng, &SECTORS, seq), seq).expect("appends");
    }
    journal.drain().expect("durable");
    run_jobs(&mut journal, 10).expect("jobs succeed");
    let done = run_jobs(&mut journal, 2_000_000).expect("jobs succeed");
    assert!(done.contains(&journal::JobOutcome::Noted { durable: Lsn(20) }), "{done:?}");
    assert_eq!(run_jobs(&mut journal, 5_000_000).expect("jobs succeed"), [], "once is enough");
    drop(journal);
    let file = &segments(&disk, ".open")[0];
    let end = used(&disk, file);
    let mut damage = 0;
    for offset in (0..end).step_by(101) {
        let copy = disk.fork(offset);
        copy.flip_bit(file, offset, 4).expect("flips");
        match try_open(&copy) {
            Err(e) => {
                assert_eq!(corruption_of(&e).file, *file);
                damage += 1;
            }
            // Padding.
            Ok(journal) => assert_eq!(journal.progress().durable, Lsn(20), "flip at {offset:#x}"),
        }
    }
    assert!(damage > 50, "{damage}");
}

#[test]
fn a_missing_or_foreign_or_renamed_segment_is_refused_by_name() {
    let (disk, oracle) = journal_of(7, 200, true);
    let files = segments(&disk, ".seg");
    // Lost in the middle.
    let copy = disk.fork(1);
    copy.remove(&files[1]).expect("removes");
    let e = try_open(&copy).expect_err("refused");
    assert!(chain(&e).contains("are missing"), "{}", chain(&e));
    let offline = JournalReader::open_offline(arc(&copy), dir()).expect("opens");
    assert_eq!(offline.damage().len(), 1, "{:?}", offline.damage());
    // What lies behind the hole is shown only where it does not depend on it.
    let at = ResolvedPoint { timeline: TimelineId(0), lsn: oracle.last(), time: HistoryTime(0) };
    let (view, images) = (offline.view(at).expect("opens"), oracle.images_at(at.lsn));
    let (mut right, mut refused) = (0, 0);
    for lba in 0..SECTORS[1] {
        let mut got = [0; 512];
        match view.read(VolumeId(2), lba * 512, &mut got) {
            Ok(()) => {
                assert!(got == images[1][(lba * 512) as usize..][..512], "sector {lba}");
                right += 1;
            }
            Err(e) => {
                assert!(chain(&e).contains("are missing"), "{}", chain(&e));
                refused += 1;
            }
        }
    }
    assert!(right > 0 && refused > 0, "{right} right, {refused} refused");

    // The last one lost: control knows that it was durable.
    let copy = disk.fork(2);
    for file in segments(&copy, ".open").iter().chain(files.last()) {
        copy.remove(file).expect("removes");
    }
    assert!(chain(&try_open(&copy).expect_err("refused")).contains("are missing"));

    // Under another name.
    let copy = disk.fork(3);
    let other = files[0].with_file_name("00000000-0000000000000001-00000009.seg");
    copy.rename(&files[0], &other).expect("renames");
    assert!(chain(&try_open(&copy).expect_err("refused")).contains("does not belong to this file name"));

    // Of another group.
    let copy = disk.fork(4);
    let mut spec = spec(&SECTORS);
    spec.id = GroupId([1; 16]);
    let mut foreign = Journal::create(
        arc(&copy),
        Path::new("groups/other"),
        &spec,
        Term(1),
        options(IndexChoice::None),
        HistoryTime(1),
    )
    .expect("creates");
    let entry = draw(&mut Rng::new(1), &SECTORS, 1);
    append(&mut foreign, &entry, 1).expect("appends");
    foreign.close().expect("closes");
    let theirs: Vec<PathBuf> = copy.paths().into_iter().filter(|p| p.starts_with("groups/other/seg")).collect();
    copy.rename(&theirs[0], &files[0].with_file_name("00000000-0000000000000001-00000001.open")).expect("renames");
    let e = try_open(&copy).expect_err("refused");
    assert!(matches!(e, OpenError::Foreign { .. }), "{}", chain(&e));
}

#[test]
fn one_damaged_control_copy_is_survived_and_two_are_refused() {
    let (disk, oracle) = journal_of(8, 60, true);
    let copies = [dir().join("control.a"), dir().join("control.b")];
    disk.flip_bit(&copies[0], 40, 1).expect("flips");
    let (journal, report) = Journal::open(arc(&disk), dir(), options(IndexChoice::None), HistoryTime(1))
        .expect("opens with the other copy");
    assert!(report.control_fault.is_some_and(|f| f.contains("control.a")));
    check_view(&journal.reader(), TimelineId(0), oracle.last(), &oracle.images_at(oracle.last()), "one copy");
    drop(journal);
    let (_, report) = Journal::open(arc(&disk), dir(), options(IndexChoice::None), HistoryTime(1)).expect("repaired");
    assert_eq!(report.control_fault, None);
    for copy in &copies {
        disk.flip_bit(copy, 40, 1).expect("flips");
    }
    assert!(matches!(try_open(&disk), Err(OpenError::Control(_))));
}

#[test]
fn a_stale_prepared_file_is_removed_and_a_stray_is_left_alone() {
    let (disk, _) = journal_of(9, 50, true);
    let seg = dir().join("seg");
    disk.create_zeroed(&seg.join("prepared-77"), model::ByteLen(8192)).expect("creates");
    disk.create_zeroed(&seg.join("notes.txt"), model::ByteLen(10)).expect("creates");
    let (_, report) = Journal::open(arc(&disk), dir(), options(IndexChoice::None), HistoryTime(1)).expect("opens");
    assert!(report.removed.contains(&seg.join("prepared-77")), "{report:?}");
    assert_eq!(report.strays, [seg.join("notes.txt")]);
    assert!(disk.open(&seg.join("notes.txt"), OpenMode::Read).is_ok());
}

#[test]
fn an_index_that_lies_is_found_out_and_does_not_change_an_answer() {
    // The records a run points at say what they are; a run made for other segments is refused by its tag.
    let folder = tempfile::tempdir().expect("a folder");
    let index = IndexChoice::Sled { dir: folder.path().join("index") };
    let grow = |seed: u64, index: IndexChoice| {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut journal = create(&disk, &SECTORS, index);
        let mut oracle = Oracle::new(&SECTORS);
        for seq in 1..=400 {
            let entry = draw(&mut rng, &SECTORS, seq);
            append(&mut journal, &entry, seq).expect("appends");
            oracle.log.push(entry);
        }
        journal.drain().expect("durable");
        run_jobs(&mut journal, 1).expect("jobs succeed");
        (journal, oracle)
    };
    let (journal, _) = grow(10, index.clone());
    journal.close().expect("closes");
    // The same group and the same LSNs, other contents: as after putting back a copy of the data folder.
    let (mut journal, oracle) = grow(11, index);
    run_jobs(&mut journal, 2).expect("jobs succeed");
    for lsn in [50, 200, 333, 400] {
        check_view(&journal.reader(), TimelineId(0), Lsn(lsn), &oracle.images_at(Lsn(lsn)), "with another's index");
    }
}
