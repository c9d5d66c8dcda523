//! Power cuts and kills at every operation: what was acknowledged as durable is there bit for bit, the rest is a prefix.

mod common;

use common::*;
use durable::SimDisk;
use journal::{IndexChoice, Journal, JournalOptions, OpenError};
use model::{BookmarkName, Consistency, GapReason, HistoryTime, Lsn, Mark, Term, TimelineId};

const SECTORS: [u64; 2] = [300, 500];

/// What the caller of a journal was told before the end.
struct Told {
    /// Everything up to here was reported durable.
    durable: Lsn,
    /// Everything that append has accepted.
    oracle: Oracle,
    created: bool,
}

/// Appends `count` records with jobs between; ends at the first error.
fn life(journal: &mut Journal, told: &mut Told, rng: &mut Rng, count: usize) -> Result<(), String> {
    for i in 0..count {
        let seq = told.oracle.log.len() as u64 + 1;
        let failed = |e: journal::AppendError| chain(&e);
        if i % 17 == 3 {
            let what = match i % 3 {
                0 => Mark::Consistent,
                1 => Mark::GapBegin { reason: GapReason::Overflow },
                _ => Mark::Bookmark {
                    name: BookmarkName::try_from(format!("b{seq}")).expect("a name"),
                    consistency: Consistency::Crash,
                },
            };
            mark(journal, &mut told.oracle, &what, seq).map_err(failed)?;
            continue;
        }
        let entry = draw(rng, &SECTORS, seq);
        // The record may be in the journal even when append fails in the end: its batch may have been sent.
        append(journal, &entry, seq).map_err(failed)?;
        told.oracle.log.push(entry);
        if rng.below(3) == 0 {
            journal.submit().map_err(failed)?;
        }
        if rng.below(4) == 0 {
            told.durable = told.durable.max(journal.poll(false).map_err(failed)?.durable);
        }
        if rng.below(12) == 0 {
            run_jobs(journal, seq).map_err(|e| chain(&e))?;
        }
    }
    told.durable = journal.drain().map_err(|e| chain(&e))?.durable;
    Ok(())
}

fn begin(disk: &SimDisk, seed: u64, count: usize) -> (Told, Result<(), String>) {
    let mut told = Told { durable: Lsn(0), oracle: Oracle::new(&SECTORS), created: false };
    let spec = spec(&SECTORS);
    let created = Journal::create(arc(disk), dir(), &spec, Term(1), options(IndexChoice::Memory), HistoryTime(1));
    let mut journal = match created {
        Ok(journal) => journal,
        Err(e) => return (told, Err(chain(&e))),
    };
    told.created = true;
    let result = life(&mut journal, &mut told, &mut Rng::new(seed), count);
    if result.is_ok() && seed.is_multiple_of(2) {
        let closed = journal.close().map_err(|e| chain(&e));
        return (told, closed);
    }
    (told, result)
}

/// Opens after a crash and holds the journal to what was told; goes on with a shortened model.
fn check(disk: &SimDisk, told: &mut Told, what: &str) -> Option<Journal> {
    let (journal, report) = match Journal::open(arc(disk), dir(), options(IndexChoice::Memory), HistoryTime(1)) {
        Ok(opened) => opened,
        Err(OpenError::NoJournal { .. }) if !told.created => return None,
        Err(OpenError::Disk(e)) if e.is_not_found() && !told.created => return None,
        Err(e) => panic!("{what}: does not open: {}", chain(&e)),
    };
    let last = report.last_lsn;
    assert!(last >= told.durable, "{what}: {last} is left, {} was durable; {report:?}", told.durable);
    assert!(last <= told.oracle.last(), "{what}: {last} was never appended; {report:?}");
    told.oracle.cut(last);
    told.durable = last;
    let progress = journal.progress();
    assert_eq!((progress.appended, progress.durable, progress.written), (last, last, last), "{what}");
    let reader = journal.reader();
    let lsns: Vec<u64> =
        reader.records(Lsn(1)).map(|r| r.unwrap_or_else(|e| panic!("{what}: {e}")).record.lsn.0).collect();
    assert_eq!(lsns, (1..=last.0).collect::<Vec<u64>>(), "{what}: LSNs without a hole");
    for lsn in [last.0, last.0 * 2 / 3, last.0 / 3] {
        check_view(&reader, TimelineId(0), Lsn(lsn), &told.oracle.images_at(Lsn(lsn)), what);
    }
    let position = journal.source_position().map(|p| (p.appended.0, p.durable.0));
    let want = told.oracle.log.iter().rposition(|e| e.kind != model::RecordKind::Mark).map(|i| i as u64 + 1);
    assert_eq!(position, want.map(|seq| (seq, seq)), "{what}: where the source resumes");
    Some(journal)
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_durable() {
    let mut cuts = 0;
    for seed in 1..=4 {
        let whole = disk(seed);
        let (_, result) = begin(&whole, seed, 110);
        assert_eq!(result, Ok(()), "seed {seed}: the script runs through");
        let operations = whole.operations();
        for n in 0..operations {
            let what = format!("seed {seed}, cut after {n} of {operations}");
            let first = disk(seed);
            first.cut_after(n);
            let (mut told, _) = begin(&first, seed, 110);
            let second = first.power_cut();
            cuts += 1;
            let Some(mut journal) = check(&second, &mut told, &what) else {
                // Nothing was promised; a new journal can be made in its place.
                let (_, again) = begin(&second, seed, 10);
                assert_eq!(again, Ok(()), "{what}: create again");
                continue;
            };
            // And it goes on from there, at once, and through the next cut.
            if n % 5 == 0 {
                let mut rng = Rng::new(seed ^ n);
                life(&mut journal, &mut told, &mut rng, 30).unwrap_or_else(|e| panic!("{what}: goes on: {e}"));
                drop(journal);
                check(&second.power_cut(), &mut told, &format!("{what}, then again"));
            }
        }
    }
    assert!(cuts > 400, "{cuts} crash points");
}

#[test]
fn chains_of_crashes_keep_every_acknowledged_record() {
    for seed in 100..160 {
        let mut rng = Rng::new(seed);
        let mut disk = disk(seed);
        let (mut told, result) = begin(&disk, seed | 1, 20);
        assert_eq!(result, Ok(()), "seed {seed}");
        for round in 0..8 {
            let what = format!("seed {seed}, round {round}");
            let killed = rng.below(3) == 0;
            disk = if killed { disk.kill() } else { disk.power_cut() };
            let Some(mut journal) = check(&disk, &mut told, &what) else { panic!("{what}: the journal is gone") };
            if rng.below(4) > 0 {
                disk.cut_after(rng.below(60));
            }
            // Ends by the cut, or by itself.
            let _ = life(&mut journal, &mut told, &mut rng, 40);
            if rng.below(3) == 0 {
                let _ = run_jobs(&mut journal, 1_000_000);
            }
            if rng.below(4) == 0 && journal.close().is_ok() {
                told.durable = told.oracle.last();
            }
        }
    }
}

#[test]
fn what_recovery_read_after_a_kill_survives_the_power_cut_that_follows() {
    for seed in 200..230 {
        let first = disk(seed);
        let (mut told, result) = begin(&first, seed | 1, 60);
        assert_eq!(result, Ok(()), "seed {seed}");
        let killed = first.kill();
        let journal = check(&killed, &mut told, &format!("seed {seed}, killed"));
        drop(journal);
        check(&killed.power_cut(), &mut told, &format!("seed {seed}, then cut"));
    }
}

#[test]
fn a_failed_write_poisons_until_the_journal_is_opened_again() {
    for seed in 300..320 {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut told = Told { durable: Lsn(0), oracle: Oracle::new(&SECTORS), created: true };
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        life(&mut journal, &mut told, &mut rng, 30).expect("runs");
        disk.fail_write_at(format!("{DIR}/seg/0"));
        let failed = life(&mut journal, &mut told, &mut rng, 30);
        let text = failed.expect_err("the write failed");
        let known = ["earlier write failed", "next segment", "seal a segment did not succeed"];
        assert!(known.iter().any(|k| text.contains(k)), "seed {seed}: {text}");
        if text.contains("earlier write failed") {
            let entry = draw(&mut rng, &SECTORS, 1);
            assert!(append(&mut journal, &entry, 1).is_err(), "seed {seed}: stays poisoned");
            assert!(journal.submit().is_err() && journal.poll(true).is_err(), "seed {seed}");
        }
        drop(journal);
        // The same process opens again: what failed is cut or there, and nothing else is lost.
        let journal = check(&disk, &mut told, &format!("seed {seed}"));
        let mut journal = journal.expect("there is a journal");
        life(&mut journal, &mut told, &mut rng, 30).expect("goes on");
    }
}

#[test]
fn a_failed_flush_of_a_name_or_header_loses_nothing() {
    for seed in 400..420 {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut told = Told { durable: Lsn(0), oracle: Oracle::new(&SECTORS), created: true };
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        life(&mut journal, &mut told, &mut rng, 20).expect("runs");
        for round in 0..6 {
            match round % 2 {
                0 => disk.fail_next_flush(),
                _ => disk.fail_next_directory_flush(),
            }
            for _ in 0..5 {
                let _ = life(&mut journal, &mut told, &mut rng, 30);
                let _ = run_jobs(&mut journal, 1_000_000 * (round + 1));
            }
        }
        drop(journal);
        check(&disk.power_cut(), &mut told, &format!("seed {seed}"));
    }
}

#[test]
fn options_that_cannot_work_are_refused_by_name() {
    let disk = disk(1);
    let bad = |change: fn(&mut JournalOptions)| {
        let mut options = options(IndexChoice::None);
        change(&mut options);
        Journal::create(arc(&disk), dir(), &spec(&SECTORS), Term(1), options, HistoryTime(1))
            .expect_err("refused")
            .to_string()
    };
    assert!(bad(|o| o.segment_bytes.0 = 100).contains("segments of 100 B"));
    assert!(bad(|o| o.depth = 0).contains("0 writes in flight"));
    assert!(bad(|o| o.segments_per_generation = 9).contains("generations of 9"));
    assert!(bad(|o| o.batch_bytes = 1 << 30).contains("batches of"));
    create(&disk, &SECTORS, IndexChoice::None);
    let again =
        Journal::create(arc(&disk), dir(), &spec(&SECTORS), Term(1), options(IndexChoice::None), HistoryTime(1));
    assert!(again.expect_err("refused").to_string().contains("there is a journal in"));
}

/// The tests above would be worth nothing if they could not see a loss: a disk that lies about its flushes must be found out.
#[test]
fn a_disk_that_lies_about_flushes_is_found_out_by_these_tests() {
    let (mut caught, mut lucky) = (0, 0);
    for seed in 500..540 {
        let disk = disk(seed);
        disk.set_lying_flush(true);
        let (mut told, result) = begin(&disk, seed | 1, 60);
        assert_eq!(result, Ok(()), "seed {seed}: nothing is noticed while it runs");
        let cut = disk.power_cut();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            check(&cut, &mut told, &format!("seed {seed}, lied to"));
        }));
        if outcome.is_err() { caught += 1 } else { lucky += 1 }
    }
    assert!(caught > 20, "{caught} lies caught, {lucky} without consequence");
}
