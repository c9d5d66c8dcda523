//! A full disk: refused by name, nothing acknowledged is lost, and it goes on when there is room again.

mod common;

use common::*;
use durable::{Disk, SimDisk};
use journal::{AppendError, IndexChoice, JobOutcome, Journal, Pressure};
use model::{ByteLen, HistoryTime, Lsn, TimelineId};

const SECTORS: [u64; 2] = [300, 500];

fn fill_until_refused(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, jobs: bool) -> AppendError {
    for _ in 0..100_000 {
        let seq = oracle.log.len() as u64 + 1;
        let entry = draw(rng, &SECTORS, seq);
        match append(journal, &entry, seq) {
            Ok(_) => oracle.log.push(entry),
            Err(e) => return e,
        }
        if jobs && rng.below(20) == 0 {
            let _ = run_jobs(journal, seq * 2_000_000);
        }
    }
    panic!("the disk never became full");
}

fn check(disk: &SimDisk, journal: &Journal, oracle: &Oracle, what: &str) {
    check_view(&journal.reader(), TimelineId(0), oracle.last(), &oracle.images_at(oracle.last()), what);
    let middle = Lsn(oracle.last().0 / 2);
    check_view(&journal.reader(), TimelineId(0), middle, &oracle.images_at(middle), what);
    assert!(disk.is_powered());
}

#[test]
fn a_full_disk_is_refused_by_name_and_appends_go_on_when_room_returns() {
    for seed in 1..6 {
        for jobs in [true, false] {
            let what = format!("seed {seed}, jobs {jobs}");
            let disk = SimDisk::new(seed, ByteLen(24 << 20));
            let mut rng = Rng::new(seed);
            let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
            let mut oracle = Oracle::new(&SECTORS);
            let e = fill_until_refused(&mut journal, &mut oracle, &mut rng, jobs);
            assert!(matches!(e, AppendError::NoSpace { .. }), "{what}: {}", chain(&e));
            // Refused again and again, without harm.
            for _ in 0..3 {
                let e = fill_until_refused(&mut journal, &mut oracle, &mut rng, false);
                assert!(matches!(e, AppendError::NoSpace { .. }), "{what}: {}", chain(&e));
            }
            assert_eq!(journal.drain().expect("what was taken becomes durable").durable, oracle.last(), "{what}");
            check(&disk, &journal, &oracle, &what);
            let space = disk.space().expect("space");
            assert!(space.available.0 > 160 * 1024, "{what}: the reserve for folding was left: {space:?}");

            disk.set_capacity(ByteLen(40 << 20));
            for _ in 0..50 {
                let seq = oracle.log.len() as u64 + 1;
                let entry = draw(&mut rng, &SECTORS, seq);
                append(&mut journal, &entry, seq).unwrap_or_else(|e| panic!("{what}: goes on: {}", chain(&e)));
                oracle.log.push(entry);
            }
            journal.close().expect("closes");
            let journal = open(&disk, IndexChoice::Memory);
            check(&disk, &journal, &oracle, &what);
        }
    }
}

#[test]
fn not_a_byte_left_neither_stops_the_open_nor_loses_a_record() {
    for seed in 10..16 {
        let disk = SimDisk::new(seed, ByteLen(64 << 20));
        let mut rng = Rng::new(seed);
        let mut journal = create(&disk, &SECTORS, IndexChoice::None);
        let mut oracle = Oracle::new(&SECTORS);
        for seq in 1..=150 {
            let entry = draw(&mut rng, &SECTORS, seq);
            append(&mut journal, &entry, seq).expect("appends");
            oracle.log.push(entry);
        }
        journal.drain().expect("durable");
        let what = format!("seed {seed}");
        // Someone else has filled the disk: sealing and preparing fail, reading and durability do not.
        disk.set_capacity(ByteLen(0));
        let mut failures = 0;
        for round in 0..5 {
            failures += u32::from(run_jobs(&mut journal, round * 2_000_000).is_err());
        }
        assert!(failures > 0, "{what}: sealing needs room");
        assert!(!journal.stats().failing.is_empty(), "{what}");
        check(&disk, &journal, &oracle, &what);
        drop(journal);
        let cut = disk.power_cut();
        let (mut journal, report) = Journal::open(arc(&cut), dir(), options(IndexChoice::None), HistoryTime(1))
            .unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
        assert!(report.unsealed > 0, "{what}: {report:?}");
        check(&cut, &journal, &oracle, &what);
        // A new life cannot begin without its number on the disk; that is lack of room like any other, and the record is not taken.
        let seq = oracle.log.len() as u64 + 1;
        let entry = draw(&mut rng, &SECTORS, seq);
        for _ in 0..3 {
            let e = append(&mut journal, &entry, seq).expect_err("there is no room");
            assert!(matches!(e, AppendError::NoSpace { .. }), "{what}: {}", chain(&e));
        }
        let e = journal.set_term(model::Term(2)).expect_err("there is no room");
        assert!(matches!(e, AppendError::NoSpace { .. }), "{what}: {}", chain(&e));
        // The same life goes on when there is room.
        cut.set_capacity(ByteLen(64 << 20));
        append(&mut journal, &entry, seq).unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
        oracle.log.push(entry);
        journal.drain().expect("durable");
        check(&cut, &journal, &oracle, &what);
        drop(journal);
        let mut journal = open(&cut, IndexChoice::None);
        run_jobs(&mut journal, 1).expect("jobs succeed");
        check(&cut, &journal, &oracle, &what);
        assert!(journal.reader().verify(&mut |_| {}).is_clean(), "{what}");
    }
}

#[test]
fn a_policy_limit_shortens_the_window_and_then_refuses() {
    let disk = disk(30);
    let mut rng = Rng::new(30);
    let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    let mut spec = journal.spec().clone();
    spec.policy.journal_bytes_max = Some(ByteLen(2 << 20));
    spec.policy.window_hours = 100;
    spec.policy.window_hours_floor = 100;
    journal.set_spec(spec.clone()).expect("changes");
    let e = fill_until_refused(&mut journal, &mut oracle, &mut rng, true);
    assert!(matches!(e, AppendError::OverLimit { .. }), "{}", chain(&e));
    journal.drain().expect("durable");
    check(&disk, &journal, &oracle, "full by policy");
    let now = oracle.log.len() as u64 * 2_000_000 + 20_000_000;
    run_jobs(&mut journal, now).expect("jobs succeed");
    assert!(matches!(journal.stats().pressure(), Pressure::Full { .. }), "{:?}", journal.stats().pressure());
    // A shorter floor frees room, and the records that remain are right.
    spec.policy.window_hours_floor = 0;
    journal.set_spec(spec).expect("changes");
    let hour = 3_600_000_000;
    let done = run_jobs(&mut journal, now + 2 * hour).expect("jobs succeed");
    let deleted: usize =
        done.iter().map(|d| if let JobOutcome::Retained { deleted, .. } = d { *deleted } else { 0 }).sum();
    assert!(deleted > 0, "{done:?}");
    for _ in 0..20 {
        let seq = oracle.log.len() as u64 + 1;
        let entry = draw(&mut rng, &SECTORS, now + 3 * hour);
        append(&mut journal, &entry, seq).expect("there is room again");
        oracle.log.push(entry);
    }
    journal.drain().expect("durable");
    check_view(&journal.reader(), TimelineId(0), oracle.last(), &oracle.images_at(oracle.last()), "after the fold");
}
