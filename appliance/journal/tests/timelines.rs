//! Branches: each line reads its own history and its parent's up to the branch point, and writing to one never shows in another.

mod common;

use common::*;
use journal::{BranchError, IndexChoice, Journal, OpenViewError, ResolvedPoint};
use model::{HistoryTime, Lsn, TimelineId};
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
