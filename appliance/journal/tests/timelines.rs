//! Branches: each line reads its own history and its parent's up to the branch point, and writing to one never shows in another.

mod common;

use common::*;
use journal::{BranchError, IndexChoice, Journal, OpenViewError, ResolvedPoint};
use model::{Consistency, HistoryTime, Lsn, Mark, RecoveryPoint, TimelineId};
use std::collections::BTreeMap;

const SECTORS: [u64; 2] = [200, 300];

fn grow(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, count: usize) {
    for _ in 0..count {
        let seq = oracle.log.len() as u64 + 1;
        let entry = draw(rng, &SECTORS, seq);
        let lsn = append(journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
        assert_eq!(lsn, oracle.last());
        if rng.below(15) == 0 {
            run_jobs(journal, seq).expect("jobs succeed");
        }
    }
    journal.drain().expect("durable");
}

fn check_all(journal: &Journal, lines: &BTreeMap<TimelineId, Oracle>, step: usize, what: &str) {
    let reader = journal.reader();
    for (id, oracle) in lines {
        let last = oracle.last().0;
        for lsn in (1..=last).filter(|l| l % step as u64 == 0 || *l == last) {
            check_view(&reader, *id, Lsn(lsn), &oracle.images_at(Lsn(lsn)), &format!("{what}, timeline {id}"));
        }
        let past = ResolvedPoint { timeline: *id, lsn: Lsn(last + 1), time: HistoryTime(0) };
        assert!(matches!(reader.view(past), Err(OpenViewError::AfterEnd { .. })), "{what}");
    }
}

#[test]
fn branches_of_branches_read_right_and_survive_crashes() {
    for seed in 1..8 {
        let index = if seed % 2 == 0 { IndexChoice::Memory } else { IndexChoice::None };
        let mut rng = Rng::new(seed);
        let mut disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, index.clone());
        let mut lines: BTreeMap<TimelineId, Oracle> = BTreeMap::new();
        let mut first = Oracle::new(&SECTORS);
        grow(&mut journal, &mut first, &mut rng, 80);
        lines.insert(TimelineId(0), first);
        for round in 0..8 {
            let what = format!("seed {seed}, round {round}");
            // Branch off somewhere, or go on somewhere.
            let ids: Vec<TimelineId> = lines.keys().copied().collect();
            let on = ids[rng.below(ids.len() as u64) as usize];
            if rng.below(2) == 0 {
                let at = Lsn(1 + rng.below(lines[&on].last().0));
                let id = journal.branch(at, on).unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
                let mut oracle = lines[&on].clone();
                oracle.cut(at);
                lines.insert(id, oracle);
                journal.switch_timeline(id).unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
            } else {
                journal.switch_timeline(on).unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
            }
            let current = journal.timeline();
            grow(&mut journal, lines.get_mut(&current).expect("known"), &mut rng, 40);
            check_all(&journal, &lines, 17, &what);
            if rng.below(2) == 0 {
                drop(journal);
                disk = disk.power_cut();
                journal = open(&disk, index.clone());
                assert_eq!(journal.timeline(), current, "{what}");
                check_all(&journal, &lines, 23, &format!("{what}, after a cut"));
            }
        }
        assert_eq!(journal.reader().timelines().len(), lines.len(), "seed {seed}");
        assert!(journal.reader().verify(&mut |_| {}).is_clean(), "seed {seed}");
    }
}

#[test]
fn a_dropped_timeline_leaves_what_others_need() {
    for seed in 20..26 {
        let mut rng = Rng::new(seed);
        let mut disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        let mut main = Oracle::new(&SECTORS);
        grow(&mut journal, &mut main, &mut rng, 120);
        let drill = journal.branch(Lsn(60), TimelineId(0)).expect("branches");
        journal.switch_timeline(drill).expect("switches");
        let mut line = main.clone();
        line.cut(Lsn(60));
        grow(&mut journal, &mut line, &mut rng, 150);
        let child = journal.branch(Lsn(100), drill).expect("branches");
        let mut grand = line.clone();
        grand.cut(Lsn(100));
        assert!(matches!(journal.drop_timeline(drill), Err(BranchError::Current(_))));
        journal.switch_timeline(child).expect("switches");
        grow(&mut journal, &mut grand, &mut rng, 30);
        let view = journal
            .reader()
            .view(ResolvedPoint { timeline: drill, lsn: Lsn(150), time: HistoryTime(0) })
            .expect("opens");
        assert!(matches!(journal.drop_timeline(drill), Err(BranchError::InUse(_))));
        drop(view);
        let files = disk.paths().len();
        journal.drop_timeline(drill).expect("drops");
        assert!(matches!(journal.branch(Lsn(70), drill), Err(BranchError::NoTimeline(_))));
        run_jobs(&mut journal, 1).expect("jobs succeed");
        assert!(disk.paths().len() < files, "seed {seed}: its own end is deleted");
        let lines: BTreeMap<TimelineId, Oracle> =
            [(TimelineId(0), main.clone()), (child, grand.clone())].into_iter().collect();
        check_all(&journal, &lines, 13, &format!("seed {seed}"));
        drop(journal);
        disk = disk.power_cut();
        let mut journal = open(&disk, IndexChoice::Memory);
        check_all(&journal, &lines, 13, &format!("seed {seed}, after a cut"));
        // Nobody needs the child or what it stands on any more.
        journal.switch_timeline(TimelineId(0)).expect("switches");
        journal.drop_timeline(child).expect("drops");
        run_jobs(&mut journal, 2).expect("jobs succeed");
        let left: Vec<_> = disk.paths().into_iter().filter(|p| p.to_string_lossy().contains("/seg/0000000")).collect();
        assert!(left.iter().all(|p| p.to_string_lossy().contains("/seg/00000000-")), "seed {seed}: {left:?}");
        grow(&mut journal, &mut main, &mut rng, 20);
        check_all(&journal, &[(TimelineId(0), main)].into_iter().collect(), 11, &format!("seed {seed}, alone"));
    }
}

#[test]
fn a_term_goes_up_only_and_stands_in_the_names() {
    let disk = disk(40);
    let mut rng = Rng::new(40);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    grow(&mut journal, &mut oracle, &mut rng, 10);
    journal.set_term(model::Term(5)).expect("goes up");
    assert!(journal.set_term(model::Term(4)).is_err());
    // A term without a record leaves nothing behind.
    journal.set_term(model::Term(6)).expect("goes up");
    grow(&mut journal, &mut oracle, &mut rng, 10);
    journal.set_term(model::Term(7)).expect("goes up");
    journal.close().expect("closes");
    let mut journal = open(&disk, IndexChoice::None);
    assert_eq!(journal.term(), model::Term(7));
    grow(&mut journal, &mut oracle, &mut rng, 10);
    let names: Vec<String> =
        disk.paths().iter().map(|p| p.display().to_string()).filter(|p| p.contains("/seg/0")).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(
        names[0].contains("-00000001.") && names[1].contains("-00000006.") && names[2].contains("-00000007."),
        "{names:?}"
    );
    let terms: Vec<u64> = journal.reader().records(Lsn(1)).map(|r| r.expect("reads").record.term.0).collect();
    assert_eq!(terms, [[1; 10], [6; 10], [7; 10]].concat());
}

#[test]
fn a_branch_point_outside_the_history_is_refused() {
    let disk = disk(41);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    grow(&mut journal, &mut oracle, &mut Rng::new(41), 10);
    assert!(matches!(journal.branch(Lsn(11), TimelineId(0)), Err(BranchError::AfterEnd { end: Lsn(10), .. })));
    assert!(matches!(journal.branch(Lsn(1), TimelineId(7)), Err(BranchError::NoTimeline(TimelineId(7)))));
    assert!(matches!(journal.switch_timeline(TimelineId(7)), Err(BranchError::NoTimeline(_))));
    let branch = journal.branch(Lsn(5), TimelineId(0)).expect("branches");
    let reader = journal.reader();
    let at = model::RecoveryPoint::Lsn(Lsn(6));
    assert!(matches!(reader.resolve_on(branch, &at), Some(Err(journal::ResolveError::AfterEnd { end: Lsn(5), .. }))));
    assert!(reader.resolve_on(TimelineId(9), &at).is_none() && reader.points_on(TimelineId(9)).is_none());
    assert_eq!(reader.points_on(branch).expect("known").timeline, branch);
}

#[test]
fn a_timeline_dropped_before_its_segments_were_sealed_blocks_nothing() {
    for sealing in [false, true] {
        let disk = disk(42);
        let mut rng = Rng::new(42);
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        let mut main = Oracle::new(&SECTORS);
        let fill = |journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng| {
            for _ in 0..60 {
                let seq = oracle.log.len() as u64 + 1;
                let entry = draw(rng, &SECTORS, seq);
                append(journal, &entry, seq).expect("appends");
                oracle.log.push(entry);
            }
            journal.drain().expect("durable");
        };
        fill(&mut journal, &mut main, &mut rng);
        run_jobs(&mut journal, 1).expect("jobs succeed");
        let drill = journal.branch(Lsn(60), TimelineId(0)).expect("branches");
        journal.switch_timeline(drill).expect("switches");
        fill(&mut journal, &mut main.clone(), &mut rng);
        journal.switch_timeline(TimelineId(0)).expect("switches");
        let mut held = None;
        while let Some(job) = journal.next_job(HistoryTime(1)).filter(|_| sealing) {
            if job.what() == "seal a segment" {
                held = Some(job);
                break;
            }
            journal.job_done(job.run()).expect("succeeds");
        }
        assert_eq!(held.is_some(), sealing, "a seal was under way");
        journal.drop_timeline(drill).expect("drops");
        let job = journal.next_job(HistoryTime(1));
        if let Some(held) = held {
            // The files go first, then the seal comes to a file that is gone.
            if let Some(job) = job {
                journal.job_done(job.run()).expect("succeeds");
            }
            while let Some(job) = journal.next_job(HistoryTime(1)) {
                journal.job_done(job.run()).expect("succeeds");
            }
            journal.job_done(held.run()).expect("a segment that is not wanted any more is no failure");
        } else if let Some(job) = job {
            journal.job_done(job.run()).expect("succeeds");
        }
        run_jobs(&mut journal, 2_000_000).unwrap_or_else(|e| panic!("sealing {sealing}: {}", chain(&e)));
        fill(&mut journal, &mut main, &mut rng);
        run_jobs(&mut journal, 4_000_000).unwrap_or_else(|e| panic!("sealing {sealing}: {}", chain(&e)));
        let stats = journal.stats();
        assert_eq!((stats.unsealed, stats.failing.len()), (1, 0), "sealing {sealing}: {stats:?}");
        let left = disk.paths().into_iter().filter(|p| p.to_string_lossy().contains("/seg/00000001-")).count();
        assert_eq!(left, 0, "sealing {sealing}");
        check_all(&journal, &[(TimelineId(0), main)].into_iter().collect(), 7, "after the drop");
    }
}

#[test]
fn a_timeline_whose_bookmarks_would_be_lost_is_not_dropped() {
    let disk = disk(43);
    let mut rng = Rng::new(43);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut main = Oracle::new(&SECTORS);
    grow(&mut journal, &mut main, &mut rng, 20);
    let bookmark = |journal: &mut Journal, oracle: &mut Oracle, name: &str| {
        let name = name.parse().expect("a name");
        mark(journal, oracle, &Mark::Bookmark { name, consistency: Consistency::Crash }, 0).expect("appends");
        journal.drain().expect("durable");
    };
    let drill = journal.branch(Lsn(20), TimelineId(0)).expect("branches");
    journal.switch_timeline(drill).expect("switches");
    let mut line = main.clone();
    bookmark(&mut journal, &mut line, "early");
    grow(&mut journal, &mut line, &mut rng, 20);
    let child = journal.branch(line.last(), drill).expect("branches");
    bookmark(&mut journal, &mut line, "late");
    journal.switch_timeline(child).expect("switches");
    let refused = journal.drop_timeline(drill).expect_err("a bookmark would be lost");
    let BranchError::Bookmarked { timeline, name, lsn, count } = refused else { panic!("{refused}") };
    assert_eq!((timeline, name.as_str(), lsn, count), (drill, "late", line.last(), 1));
    assert!(journal.reader().resolve_on(drill, &RecoveryPoint::Lsn(lsn)).is_some(), "nothing was changed");
    journal.switch_timeline(drill).expect("switches");
    journal.release_bookmark(&name).expect("releases");
    journal.switch_timeline(child).expect("switches");
    journal.drop_timeline(drill).expect("the early one lies where the child still needs it");
    // With the child that would go too, though nobody names the timeline it lies on.
    journal.switch_timeline(TimelineId(0)).expect("switches");
    let refused = journal.drop_timeline(child).expect_err("a bookmark would be lost");
    let BranchError::Bookmarked { timeline, name, lsn, count } = refused else { panic!("{refused}") };
    assert_eq!((timeline, name.as_str(), lsn, count), (drill, "early", Lsn(21), 1));
    journal.switch_timeline(child).expect("switches");
    journal.release_bookmark(&name).expect("releases");
    journal.switch_timeline(TimelineId(0)).expect("switches");
    journal.drop_timeline(child).expect("drops");
}
