//! History that ages: the base takes over what is deleted, and every moment that is still offered reads the same, through power
//! cuts at every operation.

mod common;

use common::*;
use durable::{DirEntry, Disk, DiskError, DiskFile, OpenMode, SimDisk, Space, WriteQueue};
use journal::{AppendError, IndexChoice, JobOutcome, Journal, OpenViewError, ResolveError, ResolvedPoint};
use model::{ByteLen, Consistency, GroupSpec, HistoryTime, Lsn, Mark, RecoveryPoint, Term, TimelineId};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

const SECTORS: [u64; 2] = [300, 500];
const HOUR: u64 = 3_600_000_000;

fn aging_spec(hours: u32) -> GroupSpec {
    let mut spec = spec(&SECTORS);
    spec.policy.window_hours = hours;
    spec.policy.window_hours_floor = 0;
    spec
}

fn create_aging(disk: &SimDisk, hours: u32, index: IndexChoice) -> Journal {
    Journal::create(arc(disk), dir(), &aging_spec(hours), Term(1), options(index), HistoryTime(1)).expect("creates")
}

/// One record every minute.
fn grow(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, count: usize) -> Result<(), String> {
    for _ in 0..count {
        let seq = oracle.log.len() as u64 + 1;
        let mut entry = draw(rng, &SECTORS, seq * HOUR / 60);
        entry.more = false;
        append(journal, &entry, seq).map_err(|e| chain(&e))?;
        oracle.log.push(entry);
    }
    journal.drain().map_err(|e| chain(&e))?;
    Ok(())
}

fn check_from(journal: &Journal, timeline: TimelineId, oracle: &Oracle, step: u64, what: &str) {
    let reader = journal.reader();
    let cutoff = reader.stats().cutoff.0.max(1);
    let last = oracle.last().0;
    let mut images = oracle.images_at(Lsn(cutoff - 1));
    for lsn in cutoff..=last {
        Oracle::apply(&mut images, &oracle.log[(lsn - oracle.first) as usize].change);
        if (lsn - cutoff).is_multiple_of(step) || lsn == last {
            check_view(&reader, timeline, Lsn(lsn), &images, what);
        }
    }
    if cutoff > 1 {
        let below = ResolvedPoint { timeline, lsn: Lsn(cutoff - 1), time: HistoryTime(0) };
        assert!(matches!(reader.view(below), Err(OpenViewError::BeforeFloor { .. })), "{what}");
        let refused = reader.resolve(&RecoveryPoint::Lsn(Lsn(cutoff - 1)));
        assert!(matches!(refused, Err(ResolveError::BeforeFloor { .. } | ResolveError::NeverConsistent)), "{what}");
    }
}

fn retained(done: &[JobOutcome]) -> usize {
    done.iter().map(|d| if let JobOutcome::Retained { deleted, .. } = d { *deleted } else { 0 }).sum()
}

#[test]
fn what_the_window_drops_lies_in_the_base() {
    for seed in 1..6 {
        for index in [IndexChoice::Memory, IndexChoice::None] {
            let what = format!("seed {seed}, {index:?}");
            let disk = disk(seed);
            let mut rng = Rng::new(seed);
            let mut journal = create_aging(&disk, 3, index.clone());
            let mut oracle = Oracle::new(&SECTORS);
            mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
            let mut deleted = 0;
            for round in 0..6 {
                grow(&mut journal, &mut oracle, &mut rng, 120).expect("grows");
                let now = oracle.log.len() as u64 * HOUR / 60;
                deleted += retained(&run_jobs(&mut journal, now).unwrap_or_else(|e| panic!("{what}: {}", chain(&e))));
                check_from(&journal, TimelineId(0), &oracle, 9, &format!("{what}, round {round}"));
            }
            assert!(deleted > 5, "{what}: {deleted} segments deleted");
            let stats = journal.stats();
            assert!(stats.floor > Lsn(300) && stats.floor == stats.cutoff, "{what}: {stats:?}");
            assert!(stats.base_bytes.0 > 0, "{what}");
            let age = oracle.log.len() as u64 * HOUR / 60 - stats.first_time.0;
            assert!(age >= 3 * HOUR, "{what}: the window itself is kept");
            assert_eq!(
                journal.reader().resolve(&RecoveryPoint::Lsn(stats.floor)).expect("the floor is a point").lsn,
                stats.floor
            );
            let report = journal.reader().verify(&mut |_| {});
            assert!(report.is_clean() && report.base_blocks > 0 && report.index_wrong == 0, "{what}: {report:?}");
            journal.close().expect("closes");
            let mut journal = open(&disk, index);
            check_from(&journal, TimelineId(0), &oracle, 9, &format!("{what}, opened again"));
            grow(&mut journal, &mut oracle, &mut rng, 60).expect("goes on");
            check_from(&journal, TimelineId(0), &oracle, 19, &format!("{what}, gone on"));
            let offline = journal::JournalReader::open_offline(arc(&disk), dir()).expect("opens offline");
            check_view(&offline, TimelineId(0), oracle.last(), &oracle.images_at(oracle.last()), &what);
            assert!(offline.damage().is_empty(), "{what}: {:?}", offline.damage());
        }
    }
}

#[test]
fn a_flip_in_the_base_is_found_and_never_served() {
    let disk = disk(9);
    let mut rng = Rng::new(9);
    let mut journal = create_aging(&disk, 1, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    grow(&mut journal, &mut oracle, &mut rng, 400).expect("grows");
    let now = oracle.log.len() as u64 * HOUR / 60;
    assert!(retained(&run_jobs(&mut journal, now).expect("jobs succeed")) > 0);
    let image = dir().join("base/v2.img");
    for offset in (0..SECTORS[1] * 512).step_by(1777) {
        disk.flip_bit(&image, offset, 2).expect("flips");
        let report = journal.reader().verify(&mut |_| {});
        assert_eq!(report.damage_count, 1, "flip at {offset:#x}: {report:?}");
        assert_eq!((&report.damage[0].file, report.damage[0].offset), (&image, offset / 4096 * 4096));
        let view = journal.reader().head_view();
        let images = oracle.images_at(oracle.last());
        let mut got = [0; 512];
        match view.read(model::VolumeId(2), offset / 512 * 512, &mut got) {
            Ok(()) => assert!(got == images[1][(offset / 512 * 512) as usize..][..512], "served a flip at {offset:#x}"),
            Err(e) => assert!(chain(&e).contains("base block of volume 2"), "{}", chain(&e)),
        }
        disk.flip_bit(&image, offset, 2).expect("flips back");
    }
    let sums = dir().join("base/v2.sum");
    disk.flip_bit(&sums, 4100, 2).expect("flips");
    assert!(journal.reader().verify(&mut |_| {}).damage_count > 0);
}

#[test]
fn open_views_and_bookmarks_hold_the_cutoff() {
    let disk = disk(11);
    let mut rng = Rng::new(11);
    let mut journal = create_aging(&disk, 1, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
    grow(&mut journal, &mut oracle, &mut rng, 200).expect("grows");
    let view = journal
        .reader()
        .view(ResolvedPoint { timeline: TimelineId(0), lsn: Lsn(50), time: HistoryTime(0) })
        .expect("opens");
    let want = oracle.images_at(Lsn(50));
    let now = |oracle: &Oracle| oracle.log.len() as u64 * HOUR / 60;
    run_jobs(&mut journal, now(&oracle)).expect("jobs succeed");
    assert!(journal.stats().cutoff <= Lsn(50), "{:?}", journal.stats());
    let name: model::BookmarkName = "keep".parse().expect("a name");
    mark(&mut journal, &mut oracle, &Mark::Bookmark { name: name.clone(), consistency: Consistency::Crash }, 0)
        .expect("appends");
    let pinned = oracle.last();
    grow(&mut journal, &mut oracle, &mut rng, 300).expect("grows");
    run_jobs(&mut journal, now(&oracle)).expect("jobs succeed");
    for (i, image) in want.iter().enumerate() {
        let mut got = vec![0; image.len()];
        view.read(model::VolumeId(i as u32 + 1), 0, &mut got).expect("reads");
        assert!(got == *image, "the view stays what it was");
    }
    assert_eq!(journal.stats().views, 1);
    let kept = journal.stats().retention.expect("a plan").kept;
    assert!(kept.contains_key(&journal::KeepReason::View), "{kept:?}");
    drop(view);
    run_jobs(&mut journal, now(&oracle) + 20_000_000).expect("jobs succeed");
    let stats = journal.stats();
    assert!(stats.cutoff > Lsn(50) && stats.cutoff <= pinned, "{stats:?}, the bookmark is at {pinned}");
    check_view(&journal.reader(), TimelineId(0), pinned, &oracle.images_at(pinned), "the bookmark");
    journal.release_bookmark(&name).expect("releases");
    run_jobs(&mut journal, now(&oracle) + 40_000_000).expect("jobs succeed");
    assert!(journal.stats().cutoff > pinned);
    check_from(&journal, TimelineId(0), &oracle, 20, "after the release");
}

#[test]
fn a_branch_holds_the_cutoff_and_the_base_follows_the_line_that_is_left() {
    for seed in 12..16 {
        let what = format!("seed {seed}");
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut journal = create_aging(&disk, 1, IndexChoice::Memory);
        let mut main = Oracle::new(&SECTORS);
        grow(&mut journal, &mut main, &mut rng, 150).expect("grows");
        let branch = journal.branch(Lsn(100), TimelineId(0)).expect("branches");
        journal.switch_timeline(branch).expect("switches");
        let mut line = main.clone();
        line.cut(Lsn(100));
        grow(&mut journal, &mut line, &mut rng, 250).expect("grows");
        let now = 400 * HOUR / 60;
        run_jobs(&mut journal, now).expect("jobs succeed");
        assert!(journal.stats().cutoff <= Lsn(100), "{what}: {:?}", journal.stats());
        check_from(&journal, TimelineId(0), &main, 21, &format!("{what}, main"));
        check_from(&journal, branch, &line, 21, &format!("{what}, branch"));
        // The old line is given up: the base moves over to the branch.
        journal.drop_timeline(TimelineId(0)).expect("drops");
        run_jobs(&mut journal, now + 20_000_000).expect("jobs succeed");
        assert!(journal.stats().cutoff > Lsn(100), "{what}: {:?}", journal.stats());
        check_from(&journal, branch, &line, 7, &format!("{what}, alone"));
        drop(journal);
        let cut = disk.power_cut();
        let mut journal = open(&cut, IndexChoice::Memory);
        check_from(&journal, branch, &line, 7, &format!("{what}, opened again"));
        grow(&mut journal, &mut line, &mut rng, 100).expect("goes on");
        run_jobs(&mut journal, now + 3 * HOUR).expect("jobs succeed");
        check_from(&journal, branch, &line, 13, &format!("{what}, gone on"));
        assert!(journal.reader().verify(&mut |_| {}).is_clean(), "{what}");
    }
}

#[test]
fn a_power_cut_at_any_operation_of_a_fold_is_made_good() {
    let mut points = 0;
    for seed in 31..34 {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut journal = create_aging(&disk, 1, IndexChoice::None);
        let mut oracle = Oracle::new(&SECTORS);
        grow(&mut journal, &mut oracle, &mut rng, 130).expect("grows");
        // A first fold, so that the second one finds a base; then the one that is cut.
        run_jobs(&mut journal, 130 * HOUR / 60).expect("jobs succeed");
        grow(&mut journal, &mut oracle, &mut rng, 130).expect("grows");
        journal.close().expect("closes");
        let now = 400 * HOUR / 60;
        let script = |disk: &SimDisk| -> Result<usize, String> {
            let opened = Journal::open(arc(disk), dir(), options(IndexChoice::None), HistoryTime(1));
            let (mut journal, _) = opened.map_err(|e| chain(&e))?;
            Ok(retained(&run_jobs(&mut journal, now).map_err(|e| chain(&e))?))
        };
        let whole = disk.fork(0);
        let before = whole.operations();
        assert!(script(&whole).expect("runs through") > 1, "seed {seed}: something is deleted");
        let operations = whole.operations() - before;
        for n in 0..operations {
            let what = format!("seed {seed}, cut after {n} of {operations}");
            let copy = disk.fork(n);
            copy.cut_after(n);
            assert!(script(&copy).is_err(), "{what}: the cut is met");
            let mut found = copy.power_cut();
            points += 1;
            let journal = open(&found, IndexChoice::None);
            check_from(&journal, TimelineId(0), &oracle, 37, &what);
            drop(journal);
            if n % 3 == 0 {
                // Cut again while it is being made good.
                found.cut_after(n / 2 + 3);
                let _ = script(&found);
                found = found.power_cut();
            }
            script(&found).unwrap_or_else(|e| panic!("{what}: done again: {e}"));
            let journal = open(&found, IndexChoice::None);
            check_from(&journal, TimelineId(0), &oracle, 37, &format!("{what}, done again"));
            let report = journal.reader().verify(&mut |_| {});
            assert!(report.is_clean(), "{what}: {report:?}");
        }
    }
    assert!(points > 60, "{points} crash points");
}

/// The disk is full to the last byte when the journal comes back: everything that was offered is read, nothing new is taken, and it goes
/// on from there when there is room.
#[test]
fn a_fold_cut_short_and_not_a_byte_left_do_not_stop_the_open() {
    let (mut points, mut short) = (0, 0);
    for (seed, had_base) in [(41, true), (42, false), (43, true)] {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut journal = create_aging(&disk, 1, IndexChoice::None);
        let mut oracle = Oracle::new(&SECTORS);
        grow(&mut journal, &mut oracle, &mut rng, 130).expect("grows");
        if had_base {
            run_jobs(&mut journal, 130 * HOUR / 60).expect("jobs succeed");
        }
        grow(&mut journal, &mut oracle, &mut rng, 130).expect("grows");
        journal.close().expect("closes");
        let now = 400 * HOUR / 60;
        let fold = |disk: &SimDisk| -> Result<(), String> {
            let opened = Journal::open(arc(disk), dir(), options(IndexChoice::None), HistoryTime(1));
            let (mut journal, _) = opened.map_err(|e| chain(&e))?;
            run_jobs(&mut journal, now).map(drop).map_err(|e| chain(&e))
        };
        let whole = disk.fork(0);
        let before = whole.operations();
        fold(&whole).expect("runs through");
        // Each seed takes others of the operations; the test above takes them all.
        for n in (seed % 4..whole.operations() - before).step_by(4) {
            let what = format!("seed {seed}, cut after {n}");
            let copy = disk.fork(n);
            copy.cut_after(n);
            assert!(fold(&copy).is_err(), "{what}: the cut is met");
            let full = copy.power_cut();
            points += 1;
            full.set_capacity(ByteLen(0));
            let mut journal = open(&full, IndexChoice::None);
            let stats = journal.reader().stats();
            short += u32::from(stats.cutoff > stats.floor);
            check_from(&journal, TimelineId(0), &oracle, 37, &what);
            let seq = oracle.log.len() as u64 + 1;
            let entry = draw(&mut rng, &SECTORS, seq * HOUR / 60);
            let refused = append(&mut journal, &entry, seq).expect_err("there is no room");
            assert!(matches!(refused, AppendError::NoSpace { .. }), "{what}: {}", chain(&refused));
            let _ = run_jobs(&mut journal, now);
            check_from(&journal, TimelineId(0), &oracle, 97, &format!("{what}, after jobs without room"));
            drop(journal);
            // And the power goes once more.
            let room = full.power_cut();
            let mut journal = open(&room, IndexChoice::None);
            room.set_capacity(ByteLen(256 << 20));
            let mut line = oracle.clone();
            grow(&mut journal, &mut line, &mut rng, 20).unwrap_or_else(|e| panic!("{what}: goes on: {e}"));
            // What failed for want of room is tried again a second later.
            run_jobs(&mut journal, now + HOUR).unwrap_or_else(|e| panic!("{what}: folds: {}", chain(&e)));
            check_from(&journal, TimelineId(0), &line, 97, &format!("{what}, with room"));
            let report = journal.reader().verify(&mut |_| {});
            assert!(report.is_clean(), "{what}: {report:?}");
        }
    }
    assert!(points > 20 && short > 5, "{points} crash points, {short} with a fold cut short");
}

#[test]
fn a_disk_that_fills_up_shortens_the_window_and_keeps_going() {
    let disk = SimDisk::new(50, ByteLen(26 << 20));
    let mut rng = Rng::new(50);
    let mut journal = create_aging(&disk, 1_000_000, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    let mut refused = 0;
    for i in 0..6000u64 {
        let seq = oracle.log.len() as u64 + 1;
        let mut entry = draw(&mut rng, &SECTORS, seq * HOUR / 60);
        entry.more = false;
        match append(&mut journal, &entry, seq) {
            Ok(_) => oracle.log.push(entry),
            Err(journal::AppendError::NoSpace { .. }) => refused += 1,
            Err(e) => panic!("{}", chain(&e)),
        }
        if i % 10 == 0 {
            run_jobs(&mut journal, seq * HOUR / 60).unwrap_or_else(|e| panic!("{}", chain(&e)));
        }
    }
    journal.drain().expect("durable");
    assert!(oracle.log.len() > 5000, "{refused} refused");
    assert!(journal.stats().cutoff > Lsn(1000), "{:?}", journal.stats());
    check_from(&journal, TimelineId(0), &oracle, 400, "shortened");
}

#[test]
fn what_a_cut_takes_from_a_new_segment_does_not_take_the_sources_place_too() {
    let disk = disk(60);
    let mut rng = Rng::new(60);
    let mut journal = create_aging(&disk, 1, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    grow(&mut journal, &mut oracle, &mut rng, 100).expect("grows");
    let hour = |n: u64| n * HOUR;
    journal.set_term(Term(2)).expect("goes up");
    for n in 2..30 {
        run_jobs(&mut journal, hour(n)).expect("jobs succeed");
    }
    // The first record in a new segment, taken and not yet durable.
    let entry = Entry { change: Change::None, time: hour(30), more: false, kind: model::RecordKind::Flush };
    append(&mut journal, &entry, 101).expect("appends");
    for n in 30..40 {
        run_jobs(&mut journal, hour(n)).expect("jobs succeed");
    }
    assert!(journal.stats().cutoff > Lsn(1), "{:?}", journal.stats());
    drop(journal);
    let mut journal = open(&disk.power_cut(), IndexChoice::Memory);
    assert_eq!(journal.progress().durable, Lsn(100));
    let position = journal.source_position().expect("the source's place is known");
    assert_eq!(position.appended.0, 100);
    check_from(&journal, TimelineId(0), &oracle, 1, "after the cut");
    grow(&mut journal, &mut oracle, &mut rng, 40).expect("goes on");
    check_from(&journal, TimelineId(0), &oracle, 5, "gone on");
}

/// Writes at these minutes, with jobs after each.
fn minutes(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, minutes: impl Iterator<Item = u64>) {
    for minute in minutes {
        let seq = oracle.log.len() as u64 + 1;
        let mut entry = draw(rng, &SECTORS, minute * HOUR / 60);
        entry.more = false;
        append(journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
        journal.drain().expect("durable");
        run_jobs(journal, minute * HOUR / 60).expect("jobs succeed");
    }
}

#[test]
fn a_clock_that_leaps_ahead_deletes_nothing() {
    const YEAR: u64 = 365 * 24 * 60;
    for restart in [false, true] {
        for ticked_first in [false, true] {
            let what = format!("restart {restart}, jobs first {ticked_first}");
            let disk = disk(61);
            let mut rng = Rng::new(61);
            let mut journal = create_aging(&disk, 3, IndexChoice::Memory);
            let mut oracle = Oracle::new(&SECTORS);
            minutes(&mut journal, &mut oracle, &mut rng, 1..150);
            assert_eq!(journal.stats().cutoff, Lsn(0), "{what}: all of it is inside the window");
            if ticked_first {
                run_jobs(&mut journal, YEAR * HOUR / 60).expect("jobs succeed");
            }
            minutes(&mut journal, &mut oracle, &mut rng, YEAR..YEAR + 60);
            if restart {
                journal.close().expect("closes");
                let now = HistoryTime((YEAR + 60) * HOUR / 60);
                journal = Journal::open(arc(&disk), dir(), options(IndexChoice::Memory), now).expect("opens").0;
                minutes(&mut journal, &mut oracle, &mut rng, YEAR + 60..YEAR + 61);
            }
            let cutoff = journal.stats().cutoff;
            // An hour of the leap counts, and the hour since: of 150 minutes, 60 are left of the window.
            assert!(cutoff <= Lsn(90), "{what}: {:?}", journal.stats());
            check_from(&journal, TimelineId(0), &oracle, 19, &what);
            // From here on it ages as it should.
            minutes(&mut journal, &mut oracle, &mut rng, YEAR + 61..YEAR + 300);
            assert!(journal.stats().cutoff > Lsn(150), "{what}: {:?}", journal.stats());
            check_from(&journal, TimelineId(0), &oracle, 19, &what);
        }
    }
}

#[test]
fn a_leap_that_is_taken_back_and_time_switched_off_age_nothing() {
    let disk = disk(62);
    let mut rng = Rng::new(62);
    let mut journal = create_aging(&disk, 3, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    minutes(&mut journal, &mut oracle, &mut rng, 1..100);
    // Nothing was written while the clock was wrong.
    run_jobs(&mut journal, 9_000 * HOUR).expect("jobs succeed");
    minutes(&mut journal, &mut oracle, &mut rng, 100..170);
    assert_eq!(journal.stats().cutoff, Lsn(0), "the clock is right again, and all of it is inside the window");
    minutes(&mut journal, &mut oracle, &mut rng, 170..360);
    let cutoff = journal.stats().cutoff;
    assert!(cutoff > Lsn(50) && cutoff <= Lsn(180), "the wrong hours hold nothing up: {:?}", journal.stats());
    // Off for a month.
    journal.close().expect("closes");
    let month = 30 * 24 * 60;
    let open =
        |now: u64| Journal::open(arc(&disk), dir(), options(IndexChoice::Memory), HistoryTime(now)).expect("opens").0;
    let mut journal = open(month * HOUR / 60);
    run_jobs(&mut journal, month * HOUR / 60).expect("jobs succeed");
    assert!(journal.stats().cutoff <= Lsn(240), "{:?}", journal.stats());
    check_from(&journal, TimelineId(0), &oracle, 19, "after a month");
    // An idle group ages while its process runs.
    for quarter in 0..20 {
        run_jobs(&mut journal, (month + quarter * 15) * HOUR / 60).expect("jobs succeed");
    }
    let stats = journal.stats();
    assert!(stats.cutoff > Lsn(300) && stats.cutoff < Lsn(360), "{stats:?}");
}

#[test]
fn points_begin_where_views_may() {
    let disk = disk(63);
    let mut rng = Rng::new(63);
    let mut journal = create_aging(&disk, 1, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
    grow(&mut journal, &mut oracle, &mut rng, 300).expect("grows");
    let now = HistoryTime(300 * HOUR / 60);
    let fold = loop {
        let job = journal.next_job(now).expect("a fold is due");
        if job.what() == "fold and delete old history" {
            break job;
        }
        journal.job_done(job.run()).expect("succeeds");
    };
    let stats = journal.stats();
    assert!(stats.cutoff > stats.floor, "the fold is decided and not begun: {stats:?}");
    let reader = journal.reader();
    let points = reader.points();
    assert_eq!(points.valid.len(), 1, "{points:?}");
    assert!(points.valid[0].first_lsn >= stats.cutoff, "{points:?}, cutoff {}", stats.cutoff);
    let first = RecoveryPoint::Lsn(points.valid[0].first_lsn);
    drop(reader.view(reader.resolve(&first).expect("resolves")).expect("what is offered can be opened"));
    journal.job_done(fold.run()).expect("succeeds");
}

/// A disk that now and then removes no segment.
#[derive(Debug)]
struct Stubborn {
    inner: SimDisk,
    refuses: AtomicBool,
}

impl Disk for Stubborn {
    fn create_zeroed(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.inner.create_zeroed(path, len)
    }
    fn create_sparse(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.inner.create_sparse(path, len)
    }
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.inner.open(path, mode)
    }
    fn write_queue(&self, path: &Path, depth: usize) -> Result<Box<dyn WriteQueue>, DiskError> {
        self.inner.write_queue(path, depth)
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        self.inner.rename(from, to)
    }
    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        if self.refuses.load(Ordering::Relaxed) && path.to_string_lossy().contains("/seg/0") {
            return Err(DiskError::from_io("remove", path, std::io::ErrorKind::PermissionDenied.into()));
        }
        self.inner.remove(path)
    }
    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        self.inner.create_dir(path)
    }
    fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, DiskError> {
        self.inner.list(dir)
    }
    fn space(&self) -> Result<Space, DiskError> {
        self.inner.space()
    }
}

#[test]
fn files_that_could_not_be_deleted_go_later() {
    let disk = disk(64);
    let stubborn = Arc::new(Stubborn { inner: disk.clone(), refuses: AtomicBool::new(false) });
    let mut rng = Rng::new(64);
    let shared: Arc<dyn Disk> = Arc::clone(&stubborn) as _;
    let mut journal =
        Journal::create(shared, dir(), &aging_spec(1), Term(1), options(IndexChoice::None), HistoryTime(1))
            .expect("creates");
    let mut oracle = Oracle::new(&SECTORS);
    grow(&mut journal, &mut oracle, &mut rng, 300).expect("grows");
    let minute = HOUR / 60;
    let segments = |disk: &SimDisk| disk.paths().into_iter().filter(|p| p.to_string_lossy().contains("/seg/0")).count();
    stubborn.refuses.store(true, Ordering::Relaxed);
    let _ = run_jobs(&mut journal, 300 * minute);
    assert!(journal.stats().floor > Lsn(0) && segments(&disk) > journal.stats().segments, "files are left");
    assert!(!journal.stats().failing.is_empty());
    stubborn.refuses.store(false, Ordering::Relaxed);
    run_jobs(&mut journal, 301 * minute).expect("jobs succeed");
    assert_eq!(segments(&disk), journal.stats().segments, "nothing is left behind");
    assert!(journal.stats().failing.is_empty(), "{:?}", journal.stats().failing);
}

#[test]
fn a_bookmark_that_is_the_last_record_of_its_segment_outlives_the_window() {
    for seed in 1..6 {
        let disk = disk(seed);
        let mut rng = Rng::new(seed);
        let mut journal = create_aging(&disk, 3, IndexChoice::Memory);
        let mut oracle = Oracle::new(&SECTORS);
        mark(&mut journal, &mut oracle, &Mark::Consistent, 1).expect("appends");
        grow(&mut journal, &mut oracle, &mut rng, 100).expect("grows");
        let name: model::BookmarkName = "before the upgrade".parse().expect("a name");
        let time = (oracle.log.len() as u64 + 1) * HOUR / 60;
        let bookmark = Mark::Bookmark { name: name.clone(), consistency: Consistency::Crash };
        let lsn = mark(&mut journal, &mut oracle, &bookmark, time).expect("appends");
        // The next record begins a segment: as after a restart of a box whose host said nothing more.
        journal.set_term(Term(2)).expect("a higher term");
        for round in 0..4 {
            grow(&mut journal, &mut oracle, &mut rng, 120).expect("grows");
            run_jobs(&mut journal, oracle.log.len() as u64 * HOUR / 60).expect("jobs succeed");
            let found = journal.reader().resolve(&RecoveryPoint::Bookmark(name.clone()));
            let found = found.unwrap_or_else(|e| panic!("seed {seed}, round {round}: {}", chain(&e)));
            assert_eq!(found.lsn, lsn);
            check_view(&journal.reader(), TimelineId(0), lsn, &oracle.images_at(lsn), &format!("seed {seed}"));
        }
        assert!(journal.stats().floor > Lsn::ZERO, "seed {seed}: nothing was folded");
        journal.release_bookmark(&name).expect("released");
        run_jobs(&mut journal, oracle.log.len() as u64 * HOUR / 60 + HOUR).expect("jobs succeed");
        assert!(journal.stats().floor >= lsn, "seed {seed}: it ages like the rest now");
    }
}
