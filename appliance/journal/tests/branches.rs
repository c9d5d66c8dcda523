//! Branches in journals of their own: they read what they wrote, and below it the trunk as it was at the branch point, whatever is
//! written, folded or cut in the trunk meanwhile.

mod common;

use common::*;
use durable::SimDisk;
use journal::{
    Allocation, BranchError, HoldError, IndexChoice, Journal, JournalReader, OpenError, ResolvedPoint, ViewHandle,
};
use model::{Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Term, TimelineId, VolumeId};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

const SECTORS: [u64; 2] = [200, 300];
const TRUNK: TimelineId = TimelineId(0);

fn branch_id(n: u8) -> GroupId {
    GroupId([n; 16])
}
fn branch_dir(n: u8) -> PathBuf {
    Path::new("groups").join(format!("branch-{n}"))
}
fn branch_spec(n: u8) -> GroupSpec {
    GroupSpec { id: branch_id(n), name: format!("drill {n}"), ..spec(&SECTORS) }
}
fn at(lsn: Lsn) -> ResolvedPoint {
    ResolvedPoint { timeline: TRUNK, lsn, time: HistoryTime(0) }
}
fn view(reader: &JournalReader, lsn: Lsn) -> Arc<ViewHandle> {
    ViewHandle::new(reader.view(at(lsn)).unwrap_or_else(|e| panic!("view at {lsn}: {}", chain(&e))))
}

fn grow(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, count: usize, hour: u64) {
    for _ in 0..count {
        let seq = oracle.log.len() as u64 + 1;
        let mut entry = draw(rng, &SECTORS, hour * 3_600_000_000 + seq);
        entry.more = false;
        append(journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
    }
    journal.drain().expect("durable");
}

fn make(
    disk: &SimDisk,
    n: u8,
    trunk: &mut Journal,
    images: Vec<Vec<u8>>,
    lsn: Lsn,
    index: IndexChoice,
) -> (Journal, Oracle) {
    trunk.hold(branch_id(n), at(lsn)).unwrap_or_else(|e| panic!("hold {lsn}: {}", chain(&e)));
    let on = view(&trunk.reader(), lsn);
    let branch =
        Journal::create_branch(arc(disk), &branch_dir(n), &branch_spec(n), Term(1), options(index), HistoryTime(1), on)
            .unwrap_or_else(|e| panic!("branch at {lsn}: {}", chain(&e)));
    (branch, Oracle { start: images, ..Oracle::new(&SECTORS) })
}

fn reopen(disk: &SimDisk, n: u8, trunk: &Journal, lsn: Lsn, index: IndexChoice) -> Journal {
    let on = view(&trunk.reader(), lsn);
    let opened = Journal::open_branch(arc(disk), &branch_dir(n), options(index), HistoryTime(1), on);
    opened.unwrap_or_else(|e| panic!("branch {n}: {}", chain(&e))).0
}

fn check(journal: &Journal, oracle: &Oracle, step: u64, what: &str) {
    let last = oracle.last().0;
    for lsn in (0..=last).filter(|l| l % step == 0 || *l == last) {
        check_view(&journal.reader(), TRUNK, Lsn(lsn), &oracle.images_at(Lsn(lsn)), what);
    }
}

/// Everything a client of the NBD export may ask: what is said to be zero is, and reads that do not wait say the same.
fn check_pieces(reader: &JournalReader, want: &[Vec<u8>], what: &str) {
    let head = reader.head_view();
    for (i, image) in want.iter().enumerate() {
        let volume = VolumeId(i as u32 + 1);
        let all = Extent::new(0, SECTORS[i]);
        let kinds = head.allocation(volume, all).expect("allocation");
        assert_eq!(kinds.iter().map(|(e, _)| e.sectors.0).sum::<u64>(), SECTORS[i], "{what}");
        for (extent, kind) in kinds {
            let bytes = &image[(extent.start() * 512) as usize..(extent.end() * 512) as usize];
            assert!(kind == Allocation::Data || bytes.iter().all(|b| *b == 0), "{what}: {extent:?} is not zero");
        }
        for lba in 0..SECTORS[i] {
            let mut sector = [0xee; 512];
            if head.read_at_once(volume, lba * 512, &mut sector) {
                assert_eq!(sector[..], image[(lba * 512) as usize..][..512], "{what}: sector {lba} at once");
            }
        }
    }
}

#[test]
fn branches_and_their_trunk_go_on_side_by_side_through_folds_and_power_cuts() {
    for seed in 1..=seeds(12) {
        let index = || if seed % 2 == 0 { IndexChoice::Memory } else { IndexChoice::None };
        let mut rng = Rng::new(seed);
        let mut disk = disk(seed);
        let mut trunk = create(&disk, &SECTORS, index());
        let policy = GroupPolicy { window_hours: 2, window_hours_floor: 1, ..GroupPolicy::default() };
        trunk.set_spec(GroupSpec { policy, ..spec(&SECTORS) }).expect("a policy");
        let mut main = Oracle::new(&SECTORS);
        grow(&mut trunk, &mut main, &mut rng, 60, 0);
        let mut branches: Vec<(u8, Lsn, Journal, Oracle)> = Vec::new();
        let mut folded = false;
        for round in 1..10_u64 {
            let what = format!("seed {seed}, round {round}");
            if branches.len() < 3 {
                let n = 20 + round as u8;
                let floor = trunk.reader().points().valid.first().map_or(0, |p| p.first_lsn.0);
                let from = floor.max(main.last().0.saturating_sub(40)).max(1);
                let lsn = Lsn(from + rng.below(main.last().0 - from + 1));
                let (branch, oracle) = make(&disk, n, &mut trunk, main.images_at(lsn), lsn, index());
                branches.push((n, lsn, branch, oracle));
            }
            grow(&mut trunk, &mut main, &mut rng, 40, round);
            for (_, _, branch, oracle) in &mut branches {
                grow(branch, oracle, &mut rng, 30, round);
                check(branch, oracle, 13, &what);
                check_pieces(&branch.reader(), &oracle.images_at(oracle.last()), &what);
            }
            // The trunk's window moves on, the branches' moments stay.
            run_jobs(&mut trunk, round * 3_600_000_000).expect("jobs of the trunk");
            let held = branches.iter().map(|b| b.1).min().expect("there are branches");
            folded |= trunk.stats().floor > Lsn::ZERO;
            assert!(trunk.stats().floor <= held, "{what}: floor {} past {held}", trunk.stats().floor);
            for (_, _, branch, oracle) in &mut branches {
                run_jobs(branch, round * 3_600_000_000).expect("jobs of a branch");
                assert_eq!(branch.stats().floor, Lsn::ZERO, "{what}: a branch was folded");
                check(branch, oracle, 29, &what);
            }
            if rng.below(3) == 0 {
                let known: Vec<(u8, Lsn, Oracle)> = branches.drain(..).map(|(n, lsn, _, o)| (n, lsn, o)).collect();
                drop(trunk);
                disk = disk.power_cut();
                trunk = open(&disk, index());
                for (n, lsn, oracle) in known {
                    let branch = reopen(&disk, n, &trunk, lsn, index());
                    check(&branch, &oracle, 17, &format!("{what}, after a cut"));
                    branches.push((n, lsn, branch, oracle));
                }
            }
            if branches.len() == 3 && rng.below(2) == 0 {
                // Given up: what was held for it ages like the rest.
                let (n, ..) = branches.remove(0);
                trunk.release_hold(branch_id(n)).expect("released");
            }
        }
        assert!(folded, "seed {seed}: nothing was ever folded, the holds were not tried");
        for (_, _, branch, _) in &branches {
            let report = branch.reader().verify(&mut |_| {});
            assert!(report.is_clean(), "seed {seed}: {report:?}");
        }
        assert!(trunk.reader().verify(&mut |_| {}).is_clean(), "seed {seed}");
    }
}

#[test]
fn a_branch_of_a_branch_reads_through_both() {
    let mut rng = Rng::new(7);
    let disk = disk(7);
    let mut trunk = create(&disk, &SECTORS, IndexChoice::Memory);
    let mut main = Oracle::new(&SECTORS);
    grow(&mut trunk, &mut main, &mut rng, 50, 0);
    let (mut first, mut one) = make(&disk, 1, &mut trunk, main.images_at(Lsn(31)), Lsn(31), IndexChoice::Memory);
    grow(&mut first, &mut one, &mut rng, 30, 1);
    let (mut second, mut two) = make(&disk, 2, &mut first, one.images_at(Lsn(12)), Lsn(12), IndexChoice::None);
    grow(&mut second, &mut two, &mut rng, 30, 2);
    grow(&mut first, &mut one, &mut rng, 30, 2);
    grow(&mut trunk, &mut main, &mut rng, 30, 2);
    check(&second, &two, 1, "second");
    check(&first, &one, 1, "first");
    check(&trunk, &main, 5, "trunk");
}

#[test]
fn without_its_trunk_at_the_right_moment_a_branch_is_not_opened() {
    let mut rng = Rng::new(3);
    let disk = disk(3);
    let mut trunk = create(&disk, &SECTORS, IndexChoice::None);
    let mut main = Oracle::new(&SECTORS);
    grow(&mut trunk, &mut main, &mut rng, 50, 0);
    let (mut branch, mut oracle) = make(&disk, 1, &mut trunk, main.images_at(Lsn(20)), Lsn(20), IndexChoice::None);
    grow(&mut branch, &mut oracle, &mut rng, 20, 0);
    drop(branch);
    let alone = Journal::open(arc(&disk), &branch_dir(1), options(IndexChoice::None), HistoryTime(1));
    let Err(OpenError::NeedsTrunk { on }) = alone else { panic!("{alone:?}") };
    assert_eq!((on.group, on.timeline, on.lsn), (trunk.spec().id, TRUNK, Lsn(20)));
    let offline = JournalReader::open_offline(arc(&disk), &branch_dir(1));
    assert!(matches!(offline, Err(OpenError::NeedsTrunk { .. })), "{offline:?}");
    let wrong = Journal::open_branch(
        arc(&disk),
        &branch_dir(1),
        options(IndexChoice::None),
        HistoryTime(1),
        view(&trunk.reader(), Lsn(21)),
    );
    assert!(matches!(wrong, Err(OpenError::NeedsTrunk { .. })), "{wrong:?}");
    let no_branch = Journal::open_branch(
        arc(&disk),
        dir(),
        options(IndexChoice::None),
        HistoryTime(1),
        view(&trunk.reader(), Lsn(20)),
    );
    assert!(matches!(no_branch, Err(OpenError::OtherTrunk { lsn: Lsn(20), .. })), "{no_branch:?}");
    drop(trunk);
    // Read with nothing running: the trunk first, the branch on a view of it.
    let below = JournalReader::open_offline(arc(&disk), dir()).expect("the trunk, offline");
    let reader = JournalReader::open_offline_branch(arc(&disk), &branch_dir(1), view(&below, Lsn(20)))
        .expect("the branch, offline");
    assert_eq!(reader.branch_point().map(|p| p.lsn), Some(Lsn(20)));
    check_view(&reader, TRUNK, oracle.last(), &oracle.images_at(oracle.last()), "offline");
}

#[test]
fn what_is_held_is_said_and_refused_where_it_cannot_be() {
    let mut rng = Rng::new(4);
    let disk = disk(4);
    let mut trunk = create(&disk, &SECTORS, IndexChoice::None);
    let mut main = Oracle::new(&SECTORS);
    grow(&mut trunk, &mut main, &mut rng, 50, 0);
    assert!(matches!(trunk.hold(branch_id(1), at(Lsn(51))), Err(HoldError::AfterEnd { end: Lsn(50), .. })));
    let nowhere = ResolvedPoint { timeline: TimelineId(9), ..at(Lsn(5)) };
    assert!(matches!(trunk.hold(branch_id(1), nowhere), Err(HoldError::NoTimeline(TimelineId(9)))));
    trunk.hold(branch_id(1), at(Lsn(30))).expect("held");
    trunk.hold(branch_id(1), at(Lsn(30))).expect("held already");
    assert!(matches!(trunk.hold(branch_id(1), at(Lsn(31))), Err(HoldError::Other { lsn: Lsn(30), .. })));
    assert_eq!(trunk.reader().branches(), [(branch_id(1), TRUNK, Lsn(30))]);
    // The line it is on is not given up.
    let other = trunk.branch(Lsn(40), TRUNK).expect("a timeline");
    trunk.switch_timeline(other).expect("switched");
    assert!(matches!(trunk.drop_timeline(TRUNK), Err(BranchError::InUse(TRUNK))));
    trunk.release_hold(branch_id(1)).expect("released");
    trunk.release_hold(branch_id(1)).expect("nothing is held");
    assert!(trunk.reader().branches().is_empty());
    trunk.drop_timeline(TRUNK).expect("given up");
    assert!(matches!(trunk.hold(branch_id(1), at(Lsn(30))), Err(HoldError::NoTimeline(TRUNK))));
    let still = ResolvedPoint { timeline: other, ..at(Lsn(30)) };
    for n in 0..64 {
        trunk.hold(GroupId([n + 100; 16]), still).expect("held");
    }
    assert!(matches!(trunk.hold(branch_id(1), still), Err(HoldError::TooMany { max: 64 })));
    drop(trunk);
    let trunk = open(&disk.power_cut(), IndexChoice::None);
    assert_eq!(trunk.reader().branches().len(), 64);
}

#[test]
fn what_was_changed_since_a_moment_is_just_that() {
    for seed in 1..=seeds(6) {
        let mut rng = Rng::new(seed);
        let disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        let mut oracle = Oracle::new(&SECTORS);
        grow(&mut journal, &mut oracle, &mut rng, 150, 0);
        run_jobs(&mut journal, 1).expect("jobs succeed");
        for _ in 0..20 {
            let after = rng.below(150);
            let upto = after + rng.below(151 - after);
            for (i, sectors) in SECTORS.iter().enumerate() {
                let changed =
                    journal.reader().changed(VolumeId(i as u32 + 1), Lsn(after), Lsn(upto)).expect("what was changed");
                let mut want = vec![false; *sectors as usize];
                for entry in &oracle.log[after as usize..upto as usize] {
                    let (volume, lba, count) = match &entry.change {
                        Change::Write { volume, lba, data } => (*volume, *lba, data.len() as u64 / 512),
                        Change::Zero { volume, lba, sectors } => (*volume, *lba, *sectors),
                        Change::None => continue,
                    };
                    if volume == i {
                        want[lba as usize..(lba + count) as usize].fill(true);
                    }
                }
                let mut got = vec![false; *sectors as usize];
                changed.iter().for_each(|e| got[e.start() as usize..e.end() as usize].fill(true));
                assert_eq!(got, want, "seed {seed}, ({after}, {upto}], volume {i}");
            }
        }
    }
}

#[test]
fn a_view_moves_to_the_journal_as_it_was_opened_again() {
    let mut rng = Rng::new(11);
    let disk = disk(11);
    let mut trunk = create(&disk, &SECTORS, IndexChoice::Memory);
    let policy = GroupPolicy { window_hours: 2, window_hours_floor: 1, ..GroupPolicy::default() };
    trunk.set_spec(GroupSpec { policy, ..spec(&SECTORS) }).expect("a policy");
    let mut main = Oracle::new(&SECTORS);
    grow(&mut trunk, &mut main, &mut rng, 60, 0);
    let (mut branch, mut oracle) = make(&disk, 1, &mut trunk, main.images_at(Lsn(33)), Lsn(33), IndexChoice::None);
    grow(&mut branch, &mut oracle, &mut rng, 5, 0);
    drop(branch);
    let on = view(&trunk.reader(), Lsn(33));
    let handle = Arc::clone(&on);
    let opened = Journal::open_branch(arc(&disk), &branch_dir(1), options(IndexChoice::None), HistoryTime(1), on)
        .expect("opens");
    let mut branch = opened.0;
    // As after a failed write: the trunk is opened again under the branch, and goes on, and folds.
    drop(trunk);
    let mut trunk = open(&disk, IndexChoice::Memory);
    handle.move_to(&trunk.reader()).expect("the moment is held");
    for hour in 1..12 {
        grow(&mut trunk, &mut main, &mut rng, 40, hour);
        run_jobs(&mut trunk, hour * 3_600_000_000).expect("jobs");
        grow(&mut branch, &mut oracle, &mut rng, 10, hour);
        check(&branch, &oracle, 7, &format!("hour {hour}"));
    }
    assert!((1..=33).contains(&trunk.stats().floor.0), "floor {}", trunk.stats().floor);
}
