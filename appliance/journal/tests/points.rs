//! Which moments are offered, and what an operator's wish resolves to.

mod common;

use common::*;
use journal::{IndexChoice, Journal, JournalReader, ResolveError};
use model::{BookmarkName, Consistency, GapReason, HistoryTime, Lsn, Mark, RecordKind, RecoveryPoint, StreamId};

const SECTORS: [u64; 1] = [200];

fn write(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, time: u64, more: bool) -> Lsn {
    let change = Change::Write { volume: 0, lba: rng.below(190), data: rng.bytes(512) };
    let entry = Entry { change, time, more, kind: RecordKind::Write };
    let lsn = append(journal, &entry, oracle.log.len() as u64 + 1).expect("appends");
    oracle.log.push(entry);
    lsn
}

fn bookmark(name: &str) -> Mark {
    Mark::Bookmark { name: name.parse().expect("a name"), consistency: Consistency::Filesystem }
}

fn resolve(reader: &JournalReader, point: RecoveryPoint) -> Result<u64, ResolveError> {
    reader.resolve(&point).map(|p| p.lsn.0)
}

fn at(lsn: u64) -> RecoveryPoint {
    RecoveryPoint::Lsn(Lsn(lsn))
}
fn time(us: u64) -> RecoveryPoint {
    RecoveryPoint::Time(HistoryTime(us))
}
fn named(name: &str) -> RecoveryPoint {
    RecoveryPoint::Bookmark(name.parse().expect("a name"))
}

#[test]
fn a_group_that_never_became_consistent_has_no_points() {
    let disk = disk(1);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    let mut rng = Rng::new(1);
    assert!(matches!(resolve(&journal.reader(), RecoveryPoint::Latest), Err(ResolveError::NeverConsistent)));
    assert!(matches!(resolve(&journal.reader(), time(5)), Err(ResolveError::NeverConsistent)));
    for i in 0..10 {
        write(&mut journal, &mut oracle, &mut rng, 100 + i, false);
    }
    mark(&mut journal, &mut oracle, &Mark::GapBegin { reason: GapReason::Verify }, 200).expect("appends");
    journal.drain().expect("durable");
    let reader = journal.reader();
    assert_eq!(journal.in_gap(), Some((Lsn(0), GapReason::InitialSync)));
    assert!(reader.points().valid.is_empty());
    assert_eq!(reader.points().gaps.len(), 1);
    for point in [RecoveryPoint::Latest, at(5), time(105)] {
        assert!(matches!(resolve(&reader, point), Err(ResolveError::NeverConsistent)));
    }
    assert_eq!(
        reader.resolve(&at(5)).expect_err("none").to_string(),
        "nothing can be recovered yet: the first copy has not ended"
    );
}

#[test]
fn gaps_hide_points_and_name_the_nearest_ones() {
    let disk = disk(2);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    let mut rng = Rng::new(2);
    let j = &mut journal;
    let o = &mut oracle;
    for i in 1..=5 {
        write(j, o, &mut rng, i * 10, false); // 1..5
    }
    mark(j, o, &Mark::Consistent, 60).expect("appends"); // 6
    write(j, o, &mut rng, 70, false); // 7
    write(j, o, &mut rng, 80, true); // 8: inside a request
    write(j, o, &mut rng, 80, true); // 9
    write(j, o, &mut rng, 80, false); // 10 ends it
    mark(j, o, &bookmark("good"), 90).expect("appends"); // 11
    mark(j, o, &Mark::GapBegin { reason: GapReason::Overflow }, 100).expect("appends"); // 12
    write(j, o, &mut rng, 110, false); // 13
    mark(j, o, &bookmark("in the gap"), 115).expect("appends"); // 14
    mark(j, o, &Mark::GapBegin { reason: GapReason::Verify }, 117).expect("appends"); // 15: the first one counts
    mark(j, o, &Mark::Consistent, 120).expect("appends"); // 16
    write(j, o, &mut rng, 130, true); // 17
    mark(j, o, &bookmark("mid request"), 131).expect("appends"); // 18: does not end it
    write(j, o, &mut rng, 132, false); // 19
    journal.drain().expect("durable");
    let reader = journal.reader();

    let points = reader.points();
    let valid: Vec<(u64, u64)> = points.valid.iter().map(|r| (r.first_lsn.0, r.last_lsn.0)).collect();
    assert_eq!(valid, [(6, 11), (16, 19)]);
    let gaps: Vec<(u64, Option<u64>, GapReason)> =
        points.gaps.iter().map(|g| (g.first_lsn.0, g.last_lsn.map(|l| l.0), g.reason)).collect();
    assert_eq!(gaps, [(1, Some(5), GapReason::InitialSync), (12, Some(15), GapReason::Overflow)]);
    assert_eq!(points.bookmarks.len(), 3);
    assert_eq!(points.valid[0].last_time, HistoryTime(90));

    assert_eq!(resolve(&reader, RecoveryPoint::Latest).expect("a point"), 19);
    for good in [6, 7, 10, 11, 16, 19] {
        assert_eq!(resolve(&reader, at(good)).expect("a point"), good);
    }
    for (lsn, before, after) in [(3, None, Some(6)), (12, Some(11), Some(16)), (15, Some(11), Some(16))] {
        match reader.resolve(&at(lsn)) {
            Err(ResolveError::InGap { before: b, after: a, .. }) => {
                assert_eq!((b.map(|l| l.0), a.map(|l| l.0)), (before, after), "{lsn}");
            }
            other => panic!("{lsn}: {other:?}"),
        }
    }
    for (lsn, before, after) in
        [(8, Some(7), Some(10)), (9, Some(7), Some(10)), (17, Some(16), Some(19)), (18, Some(16), Some(19))]
    {
        match reader.resolve(&at(lsn)) {
            Err(ResolveError::InsideRequest { before: b, after: a, .. }) => {
                assert_eq!((b.map(|l| l.0), a.map(|l| l.0)), (before, after), "{lsn}");
            }
            other => panic!("{lsn}: {other:?}"),
        }
    }
    assert!(matches!(reader.resolve(&at(20)), Err(ResolveError::AfterEnd { end: Lsn(19), .. })));
    assert!(matches!(reader.resolve(&at(0)), Err(ResolveError::BeforeFloor { .. })));

    // Times: the last boundary at or before.
    for (us, lsn) in [(60, 6), (69, 6), (70, 7), (79, 7), (80, 10), (89, 10), (99, 11), (120, 16), (131, 16), (132, 19)]
    {
        assert_eq!(resolve(&reader, time(us)).unwrap_or_else(|e| panic!("{us}: {e}")), lsn, "time {us}");
    }
    assert!(matches!(resolve(&reader, time(9)), Err(ResolveError::BeforeFloor { .. })));
    assert!(matches!(resolve(&reader, time(133)), Err(ResolveError::AfterEnd { .. })));
    assert!(matches!(resolve(&reader, time(115)), Err(ResolveError::InGap { .. })));

    assert_eq!(resolve(&reader, named("good")).expect("a point"), 11);
    assert_eq!(resolve(&reader, named("mid request")).expect("a point"), 16);
    assert!(matches!(resolve(&reader, named("in the gap")), Err(ResolveError::InGap { .. })));
    let e = reader.resolve(&named("god")).expect_err("none");
    assert_eq!(e.to_string(), "there is no bookmark \"god\"; did you mean \"good\"");

    journal.release_bookmark(&"good".parse().expect("a name")).expect("releases");
    assert!(matches!(resolve(&journal.reader(), named("good")), Err(ResolveError::NoSuchBookmark { .. })));
    assert!(journal.release_bookmark(&"good".parse().expect("a name")).is_err());
    journal.close().expect("closes");
    let journal = open(&disk, IndexChoice::None);
    assert_eq!(journal.reader().points().bookmarks.len(), 2, "the release survives");
    assert_eq!(journal.in_gap(), None);
}

#[test]
fn points_of_random_histories_agree_with_a_walk_over_all_records() {
    for seed in 1..12 {
        let disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, IndexChoice::None);
        let mut oracle = Oracle::new(&SECTORS);
        let mut rng = Rng::new(seed);
        // The model: for each LSN whether a request is open and whether a gap is; times clamp.
        let (mut open_request, mut consistent, mut clock) = (false, false, 0u64);
        let mut points: Vec<(u64, bool, u64)> = Vec::new();
        let mut names: Vec<(BookmarkName, u64)> = Vec::new();
        for i in 0..400u64 {
            // Clocks jump back now and then, and stand still often.
            let given = match rng.below(10) {
                0 => clock.saturating_sub(rng.below(100)),
                1..=4 => clock,
                _ => clock + rng.below(20),
            };
            clock = clock.max(given);
            match rng.below(12) {
                0 => {
                    let what = if rng.below(2) == 0 {
                        Mark::Consistent
                    } else {
                        Mark::GapBegin { reason: GapReason::Overflow }
                    };
                    mark(&mut journal, &mut oracle, &what, given).expect("appends");
                    consistent = what == Mark::Consistent;
                }
                1 => {
                    let name = format!("b{}", rng.below(5));
                    mark(&mut journal, &mut oracle, &bookmark(&name), given).expect("appends");
                    names.push((name.parse().expect("a name"), i + 1));
                }
                _ => {
                    open_request = rng.below(4) == 0;
                    write(&mut journal, &mut oracle, &mut rng, given, open_request);
                }
            }
            points.push((i + 1, consistent && !open_request, clock));
            if rng.below(20) == 0 {
                run_jobs(&mut journal, i).expect("jobs succeed");
            }
        }
        journal.drain().expect("durable");
        let reader = journal.reader();
        let good = |upto: u64| points[..upto as usize].iter().rev().find(|p| p.1).map(|p| p.0);
        match resolve(&reader, RecoveryPoint::Latest) {
            Ok(lsn) => assert_eq!(Some(lsn), good(400), "seed {seed}"),
            Err(e) => assert_eq!(good(400), None, "seed {seed}: {e}"),
        }
        for (lsn, valid, _) in &points {
            let got = reader.resolve(&at(*lsn));
            assert_eq!(got.is_ok(), *valid, "seed {seed}, LSN {lsn}: {got:?}");
            if let Err(ResolveError::InGap { before, after, .. } | ResolveError::InsideRequest { before, after, .. }) =
                got
            {
                assert_eq!(before.map(|l| l.0), good(*lsn), "seed {seed}, LSN {lsn}");
                let next = points[*lsn as usize..].iter().find(|p| p.1).map(|p| p.0);
                assert_eq!(after.map(|l| l.0), next, "seed {seed}, LSN {lsn}");
            }
        }
        for us in (0..clock + 3).step_by(3) {
            let last = points.iter().rev().find(|p| p.2 <= us).map(|p| p.0);
            match (resolve(&reader, time(us)), last) {
                (Ok(lsn), Some(last)) => assert_eq!(Some(lsn), good(last), "seed {seed}, time {us}"),
                (Err(ResolveError::AfterEnd { .. }), _) => assert!(us > clock, "seed {seed}, time {us}"),
                (Err(ResolveError::BeforeFloor { .. }), None) => {}
                // Only when the moment itself lies in a gap, or in the first request after one.
                (Err(_), Some(last)) => {
                    assert!(reader.resolve(&at(last)).is_err(), "seed {seed}, time {us}: LSN {last} is a point");
                }
                (other, None) => panic!("seed {seed}, time {us}: {other:?} out of nothing"),
            }
        }
        for (name, _) in &names {
            let newest = names.iter().rev().find(|n| n.0 == *name).expect("it is there").1;
            match reader.resolve(&RecoveryPoint::Bookmark(name.clone())) {
                Ok(found) => assert_eq!(Some(found.lsn.0), good(newest), "seed {seed}, {name}"),
                Err(_) => assert!(reader.resolve(&at(newest)).is_err(), "seed {seed}, {name}"),
            }
        }
        for range in reader.points().valid {
            assert!(points[range.first_lsn.0 as usize - 1].1 && points[range.last_lsn.0 as usize - 1].1, "seed {seed}");
            assert_eq!(range.first_time.0, points[range.first_lsn.0 as usize - 1].2, "seed {seed}");
            assert_eq!(range.last_time.0, points[range.last_lsn.0 as usize - 1].2, "seed {seed}");
        }
        // The same answers after a restart, from footers alone.
        let before = reader.points();
        journal.close().expect("closes");
        assert_eq!(open(&disk, IndexChoice::None).reader().points(), before, "seed {seed}");
    }
}

#[test]
fn the_boxs_own_marks_do_not_move_the_sources_position() {
    let disk = disk(3);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    let mut rng = Rng::new(3);
    assert_eq!(journal.source_position(), None);
    write(&mut journal, &mut oracle, &mut rng, 1, false);
    write(&mut journal, &mut oracle, &mut rng, 1, false);
    mark(&mut journal, &mut oracle, &Mark::Consistent, 2).expect("appends");
    let position = journal.source_position().expect("a position");
    assert_eq!((position.stream, position.appended.0, position.durable.0), (STREAM, 2, 0));
    journal.drain().expect("durable");
    assert_eq!(journal.source_position().expect("a position").durable.0, 2);
    let next = StreamId([6; 16]);
    journal
        .append_mark(&Mark::StreamBegin { stream: next }, HistoryTime(3), next, model::SourceSeq(1))
        .expect("appends");
    let position = journal.source_position().expect("a position");
    assert_eq!((position.stream, position.appended.0, position.durable.0), (next, 1, 0));
}
