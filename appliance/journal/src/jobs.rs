//! Work in the background: slow things that a journal needs done and that the caller runs on a thread of its own.
//!
//! ```text
//! Prepare   a zero-filled segment ahead, so that appends change no metadata
//! Seal      footer, flush and name of a segment that is full
//! Index     runs of the index that are due, from footers and smaller runs
//! Retain    cutoff persisted ─► base folded ─► floor persisted ─► files and index generations deleted
//! Note      what is durable goes into the control record when appends have come to rest: from then on damage anywhere in the
//!           open segment is told from a torn tail, even in its last batches
//! Delete    files of timelines that were given up, and what Retain could not delete
//! ```
//!
//! [`Journal::next_job`] hands out at most one job of a kind at a time; [`Job::run`] blocks and may run on any thread;
//! [`Journal::job_done`] takes the result. A job that is dropped is simply due again. One that fails is tried again after
//! [`RETRY_US`], and [`JournalStats`](crate::JournalStats) says so meanwhile. None of them ever touches what appends and
//! reads rely on until the result is durable.

use crate::{
    ControlError, IndexError, JobError, ReadError,
    ageing::Ageing,
    base::{BaseError, FoldData, FoldPiece},
    control::{Control, ControlRecord, Floor},
    format::{self, SegmentState},
    index::{
        GenerationId, IndexStore, Inputs, MemStore, Piece, PieceKind, RunId, RunTask, SledOptions, SledStore, Version,
        merge, pieces_from_versions,
    },
    load,
    payload::{Payloads, Place},
    points::History,
    retention::{self, Facts, Pin, Plan, SegmentFact, TimelineFact},
    segment::{self, Segment},
    shared::Shared,
    stats::RetentionStatus,
    types::{IndexChoice, JournalOptions},
    writer::{Journal, carry_at, forget_unneeded, note_durable},
};
use durable::DiskError;
use model::{ByteLen, HistoryTime, Lsn, Mark, RecordKind, TimelineId};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// After a failure, on the history's clock.
pub const RETRY_US: u64 = 1_000_000;
/// Between two looks at what may be deleted.
pub const RETAIN_EVERY_US: u64 = 10_000_000;
/// Appends are at rest when nothing became durable for so long.
const REST_US: u64 = 1_000_000;
/// Segments folded by one job: it decides how much room has to be kept free for folding.
const FOLD_SEGMENTS_MAX: usize = 4;
/// Runs built by one job, so that it ends within seconds and others get their turn.
const RUNS_PER_JOB: usize = 16;
/// Segments that wait to be sealed before sealing goes before preparing: each holds its index in memory.
const UNSEALED_SOFT_MAX: usize = 2;

/// A zero-filled segment that waits for its name.
pub struct Prepared {
    pub path: PathBuf,
    pub bytes: ByteLen,
}

/// Marks a kind of job as handed out, until it is dropped.
struct Token(Arc<AtomicBool>);

impl Drop for Token {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[derive(Default)]
struct Lane {
    busy: Arc<AtomicBool>,
    /// Not before this time.
    not_before: u64,
}

impl Lane {
    fn take(&self, now: HistoryTime) -> Option<Token> {
        if now.0 < self.not_before || self.busy.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(Token(Arc::clone(&self.busy)))
    }
}

/// What the journal knows of its jobs.
pub struct JobState {
    prepared: VecDeque<Prepared>,
    next_prepared: u64,
    segment_bytes: ByteLen,
    /// Full, unsealed, oldest first.
    seal: VecDeque<Arc<Segment>>,
    delete: Vec<Arc<Segment>>,
    index: IndexChoice,
    index_due: bool,
    /// Damaged generations the index knew of at the last look.
    index_damaged: u32,
    retain_due: bool,
    must_free: Option<u64>,
    preparing: Lane,
    sealing: Lane,
    indexing: Lane,
    retaining: Lane,
    deleting: Lane,
    noting: Lane,
    /// What was durable when we last looked, and since when.
    rest: (Lsn, HistoryTime),
    /// What control knows to be durable.
    noted: Lsn,
    /// As of the last [`Journal::next_job`].
    now: HistoryTime,
    pub ageing: Ageing,
}

impl JobState {
    pub fn new(options: &JournalOptions, now: HistoryTime) -> Self {
        Self {
            prepared: VecDeque::new(),
            next_prepared: 1,
            segment_bytes: options.segment_bytes,
            seal: VecDeque::new(),
            delete: Vec::new(),
            index: options.index.clone(),
            index_due: options.index != IndexChoice::None,
            index_damaged: 0,
            retain_due: true,
            must_free: None,
            preparing: Lane::default(),
            sealing: Lane::default(),
            indexing: Lane::default(),
            retaining: Lane::default(),
            deleting: Lane::default(),
            noting: Lane::default(),
            rest: (Lsn::ZERO, now),
            noted: Lsn::ZERO,
            now,
            ageing: Ageing::default(),
        }
    }
    /// A clock that is set back must not hold anything up: what waits for a time does so no longer.
    fn look(&mut self, now: HistoryTime) {
        if now < self.now {
            for lane in [
                &mut self.preparing,
                &mut self.sealing,
                &mut self.indexing,
                &mut self.retaining,
                &mut self.deleting,
                &mut self.noting,
            ] {
                lane.not_before = 0;
            }
            self.rest.1 = now;
        }
        self.now = now;
    }
    pub fn take_prepared(&mut self) -> Option<Prepared> {
        self.prepared.pop_front()
    }
    pub fn prepared_bytes(&self) -> u64 {
        self.prepared.iter().map(|p| p.bytes.0).sum()
    }
    pub fn next_prepared_path(&mut self, dir: &Path) -> PathBuf {
        self.next_prepared += 1;
        format::prepared_path(dir, self.next_prepared - 1)
    }
    pub fn add_unsealed(&mut self, segment: Arc<Segment>) {
        self.seal.push_back(segment);
    }
    /// Files that nobody needs any more; what waited to be sealed does not wait longer.
    pub fn add_deleted(&mut self, segments: Vec<Arc<Segment>>) {
        self.seal.retain(|s| segments.iter().all(|gone| !Arc::ptr_eq(s, gone)));
        self.delete.extend(segments);
    }
    pub fn unsealed(&self) -> usize {
        self.seal.len()
    }
    pub fn oldest_unsealed(&self) -> Option<Arc<Segment>> {
        self.seal.front().cloned()
    }
    pub fn sealed(&mut self, segment: &Arc<Segment>) {
        self.seal.retain(|s| !Arc::ptr_eq(s, segment));
        self.index_due = self.index != IndexChoice::None;
        self.retain_due = true;
    }
    /// Room that appends leave alone, so that a full journal can still be sealed and folded: one segment's worth at a time.
    pub fn reserve(&self) -> ByteLen {
        ByteLen(retention::reserve(self.segment_bytes.0, 0) - self.segment_bytes.0)
    }
    /// Room below which history gives way.
    fn wanted(&self) -> u64 {
        retention::reserve(self.segment_bytes.0, FOLD_SEGMENTS_MAX)
    }
    /// No room was found: look at once for what may go.
    pub fn no_room(&mut self) {
        self.retain_due = true;
    }
}

/// A piece of work. Nothing happens until [`Job::run`].
pub struct Job {
    work: Work,
    shared: Arc<Shared>,
    token: Token,
}

enum Work {
    Prepare { path: PathBuf, bytes: ByteLen },
    Seal(Arc<Segment>),
    Index(IndexChoice),
    Retain { control: Arc<Control>, plan: Box<Plan> },
    Note { control: Arc<Control>, ends: Vec<(TimelineId, Lsn)>, durable: Lsn },
    Delete(Vec<Arc<Segment>>),
}

impl Work {
    fn what(&self) -> &'static str {
        match self {
            Self::Prepare { .. } => "prepare a segment",
            Self::Seal(_) => "seal a segment",
            Self::Index(_) => "index segments",
            Self::Retain { .. } => RETAIN,
            Self::Note { .. } => "note what is durable",
            Self::Delete(_) => DELETE,
        }
    }
}

/// What a job did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum JobOutcome {
    Prepared {
        bytes: ByteLen,
    },
    Sealed {
        first: Lsn,
        last: Lsn,
    },
    /// Runs built; zero when the index is up to date.
    Indexed {
        runs: usize,
    },
    /// The floor is here now; so many files and bytes are gone.
    Retained {
        floor: Lsn,
        deleted: usize,
        bytes: ByteLen,
    },
    Deleted {
        files: usize,
    },
    Noted {
        durable: Lsn,
    },
}

/// The result of a job, for [`Journal::job_done`].
pub struct JobDone {
    work: Work,
    result: Result<JobOutcome, JobError>,
    /// Files that should be gone and are not.
    left: Vec<Arc<Segment>>,
    _token: Token,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({})", self.what())
    }
}

impl std::fmt::Debug for JobDone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JobDone({}: {:?})", self.work.what(), self.result)
    }
}

impl Journal {
    /// The next thing to do in the background, if any is due and none of its kind is under way.
    pub fn next_job(&mut self, now: HistoryTime) -> Option<Job> {
        // Records are never older than those before them, whatever the clock says.
        self.jobs.ageing.reads(now.max(self.last_time()).0);
        self.jobs.look(now);
        if self.jobs.seal.len() > UNSEALED_SOFT_MAX {
            return self.seal_job(now).or_else(|| self.prepare_job(now)).or_else(|| self.other_job(now));
        }
        self.prepare_job(now).or_else(|| self.seal_job(now)).or_else(|| self.other_job(now))
    }

    fn job(&self, work: Work, token: Token) -> Job {
        Job { work, shared: Arc::clone(&self.shared), token }
    }
    fn prepare_job(&mut self, now: HistoryTime) -> Option<Job> {
        if self.jobs.prepared.len() >= self.options.prepared_ahead {
            return None;
        }
        let token = self.jobs.preparing.take(now)?;
        let bytes = self.options.segment_bytes;
        if let Err(e) = self.room_for(bytes) {
            self.jobs.preparing.not_before = now.0.saturating_add(RETRY_US);
            self.jobs.no_room();
            self.note("prepare a segment", Some(error_chain(&e)));
            return None;
        }
        let path = self.jobs.next_prepared_path(&self.shared.dir);
        Some(self.job(Work::Prepare { path, bytes }, token))
    }
    fn seal_job(&mut self, now: HistoryTime) -> Option<Job> {
        let segment = Arc::clone(self.jobs.seal.front()?);
        let token = self.jobs.sealing.take(now)?;
        Some(self.job(Work::Seal(segment), token))
    }
    fn note_job(&mut self, now: HistoryTime) -> Option<Job> {
        let durable = self.progress().durable;
        if durable != self.jobs.rest.0 {
            self.jobs.rest = (durable, now);
        }
        if durable == self.jobs.noted || now.0 - self.jobs.rest.1.0 < REST_US {
            return None;
        }
        let token = self.jobs.noting.take(now)?;
        let control = Arc::clone(&self.control);
        Some(self.job(Work::Note { control, ends: self.ends(), durable }, token))
    }
    fn other_job(&mut self, now: HistoryTime) -> Option<Job> {
        if let Some(job) = self.note_job(now) {
            return Some(job);
        }
        if !self.jobs.delete.is_empty()
            && let Some(token) = self.jobs.deleting.take(now)
        {
            return Some(self.job(Work::Delete(self.jobs.delete.clone()), token));
        }
        if self.jobs.retain_due
            && let Some(token) = self.jobs.retaining.take(now)
        {
            self.jobs.retain_due = false;
            if let Some(plan) = self.plan(now) {
                let work = Work::Retain { control: Arc::clone(&self.control), plan: Box::new(plan) };
                return Some(self.job(work, token));
            }
        }
        if self.jobs.retaining.not_before <= now.0 && !self.jobs.retain_due {
            // The next look; a failure sets a later one.
            self.jobs.retaining.not_before = now.0.saturating_add(RETAIN_EVERY_US);
            self.jobs.retain_due = true;
            // Reads have found damage since the index was last complete: an idle journal seals nothing that would make it due.
            let damaged = self.shared.index().map_or(0, |index| index.damaged());
            if damaged != self.jobs.index_damaged {
                self.jobs.index_damaged = damaged;
                self.jobs.index_due = true;
            }
        }
        if self.jobs.index_due
            && let Some(token) = self.jobs.indexing.take(now)
        {
            return Some(self.job(Work::Index(self.jobs.index.clone()), token));
        }
        None
    }

    /// Bytes this journal must free because others need the disk too (see [`retention::share_out`]); none: it is alone.
    pub fn set_must_free(&mut self, bytes: Option<u64>) {
        if self.jobs.must_free != bytes {
            self.jobs.must_free = bytes;
            self.jobs.retain_due = true;
        }
    }

    /// What this journal could give up, for sharing a disk among several.
    pub fn share(&self, now: HistoryTime) -> retention::Share {
        let priority = self.spec().policy.priority;
        self.with_facts(now, |facts| retention::share(facts, priority))
    }

    fn with_facts<T>(&self, now: HistoryTime, act: impl FnOnce(&Facts<'_>) -> T) -> T {
        let map = self.shared.map();
        let policy = &map.spec.policy;
        let numbers = self.shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let leases = self.shared.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let mut segments = Vec::new();
        let ageing = &self.jobs.ageing;
        for line in map.lines.values() {
            // The segment with the last durable record of a live line stays, and what comes after it: it carries the line's
            // ordinal, time and source position. A later one may be gone after a power cut, for it holds nothing durable.
            let last = if line.live { line.position(line.written()).unwrap_or(0) } else { usize::MAX };
            for (i, segment) in line.segments.iter().enumerate() {
                let s = segment.summary();
                segments.push(SegmentFact {
                    timeline: line.id,
                    ordinal: segment.header.ordinal,
                    first_lsn: segment.first_lsn(),
                    last_lsn: s.last_lsn,
                    first_time_us: ageing.time_as_aged(s.first_time.0),
                    last_time_us: ageing.time_as_aged(s.last_time.0),
                    bytes: s.file_bytes,
                    open: !s.sealed || i >= last,
                });
            }
        }
        let timelines: Vec<TimelineFact> =
            map.lines.values().map(|l| TimelineFact { id: l.id, parent: l.parent, live: l.live }).collect();
        let mut bookmarks = Vec::new();
        for line in map.lines.values() {
            for entry in line.segments.iter().flat_map(|s| s.marks(line.written())) {
                let pin = Pin { timeline: line.id, lsn: entry.lsn };
                if matches!(entry.mark, Mark::Bookmark { .. }) && !map.released.contains(&(line.id, entry.lsn)) {
                    bookmarks.push(pin);
                }
            }
        }
        let pins: Vec<Pin> = leases.list().into_iter().map(|(timeline, lsn)| Pin { timeline, lsn }).collect();
        let mut held: Vec<Pin> =
            map.branching.branches.values().map(|(timeline, lsn)| Pin { timeline: *timeline, lsn: *lsn }).collect();
        if map.branching.on.is_some() {
            // It has no base to fold into.
            held.extend(
                map.lines.values().filter(|l| l.parent.is_none()).map(|l| Pin { timeline: l.id, lsn: Lsn::ZERO }),
            );
        }
        let hours = |h: u32| u64::from(h) * 3_600_000_000;
        let out = act(&Facts {
            now_us: ageing.now(now.0),
            window_us: hours(policy.window_hours),
            window_floor_us: hours(policy.window_hours_floor),
            // One segment below the limit: there must be room for the next one before it is needed. The base is not history and
            // does not count.
            bytes_max: policy.journal_bytes_max.map(|b| b.0.saturating_sub(self.options.segment_bytes.0)),
            other_bytes: numbers.index_bytes.0 + self.jobs.prepared_bytes(),
            // A disk that cannot say is taken as empty of need: nothing is deleted on a doubt.
            available: self.shared.disk.space().map_or(u64::MAX, |s| s.available.0),
            reserve: self.jobs.wanted(),
            must_free: self.jobs.must_free,
            alarm_below_hours: policy.alarm_below_hours,
            floor: map.floor.lsn,
            cutoff: map.cutoff,
            segments: &segments,
            timelines: &timelines,
            bookmarks: &bookmarks,
            leases: &pins,
            held: &held,
            fold_segments_max: FOLD_SEGMENTS_MAX,
        });
        drop(leases);
        out
    }

    /// The plan, when there is something to do. From here on views below the new cutoff are refused: leases and cutoff change
    /// under one lock, so that no view can slip in between.
    fn plan(&mut self, now: HistoryTime) -> Option<Plan> {
        let shared = Arc::clone(&self.shared);
        let (plan, idle) = self.with_facts(now, |facts| {
            let plan = retention::plan(facts);
            let idle = plan.is_idle(facts);
            if !idle {
                shared.change_map(|m| m.cutoff = m.cutoff.max(plan.new_cutoff));
            }
            (plan, idle)
        });
        let oldest = shared.map().segments().map(|s| s.summary().first_time.0).min();
        self.jobs.ageing.forget_before(oldest.unwrap_or(u64::MAX));
        let status = RetentionStatus {
            pressure: plan.pressure,
            forecast: plan.forecast,
            kept: plan.kept.clone(),
            delete_bytes: ByteLen(plan.delete_bytes),
        };
        self.shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).retention = Some(status);
        (!idle).then_some(plan)
    }

    /// Takes the result of a job. An error says what was not done; the job is due again later.
    pub fn job_done(&mut self, done: JobDone) -> Result<JobOutcome, JobError> {
        let what = done.work.what();
        let later = self.jobs.now.0.saturating_add(RETRY_US);
        let JobDone { work, result, left, _token } = done;
        self.jobs.add_deleted(left);
        match (work, &result) {
            (Work::Prepare { path, bytes }, Ok(_)) => self.jobs.prepared.push_back(Prepared { path, bytes }),
            (Work::Prepare { .. }, Err(_)) => {
                self.jobs.preparing.not_before = later;
                self.jobs.no_room();
            }
            (Work::Seal(segment), Ok(_)) => self.jobs.sealed(&segment),
            (Work::Seal(_), Err(_)) => self.jobs.sealing.not_before = later,
            (Work::Index(_), Ok(JobOutcome::Indexed { runs: 0 })) => self.jobs.index_due = false,
            (Work::Index(_), Ok(_)) => {}
            (Work::Index(_), Err(_)) => self.jobs.indexing.not_before = later,
            (Work::Retain { .. }, Ok(_)) => {
                // Perhaps there is more: a round is bounded.
                self.jobs.retain_due = true;
                self.jobs.preparing.not_before = 0;
                self.jobs.retaining.not_before = 0;
            }
            (Work::Retain { .. }, Err(_)) => {
                self.jobs.retain_due = true;
                self.jobs.retaining.not_before = later;
            }
            (Work::Delete(segments), Ok(_)) => {
                self.jobs.delete.retain(|s| segments.iter().all(|gone| !Arc::ptr_eq(s, gone)));
            }
            (Work::Delete(_), Err(_)) => self.jobs.deleting.not_before = later,
            (Work::Note { durable, .. }, Ok(_)) => self.jobs.noted = durable,
            (Work::Note { .. }, Err(_)) => self.jobs.noting.not_before = later,
        }
        self.note(what, result.as_ref().err().map(|e| error_chain(e)));
        match &result {
            Err(JobError::Corrupt { source, .. }) => self.shared.note_damage(&ReadError::Corrupt(source.clone())),
            Err(JobError::Base { source, .. }) => self.shared.note_base_damage(source),
            _ => {}
        }
        let prepared = self.jobs.prepared_bytes();
        let mut numbers = self.shared.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.prepared_bytes = ByteLen(prepared);
        numbers.index_behind = self.jobs.index_due;
        drop(numbers);
        result
    }

    fn note(&self, what: &'static str, failure: Option<String>) {
        let mut numbers = self.shared.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(text) => numbers.failing.insert(what, text),
            None => numbers.failing.remove(what),
        };
    }
}

/// An error and its causes, in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        at = cause.source();
    }
    text
}

impl Job {
    pub fn what(&self) -> &'static str {
        self.work.what()
    }
    /// Does the work; blocks. Any thread.
    pub fn run(self) -> JobDone {
        let Job { work, shared, token } = self;
        let what = work.what();
        let mut left = Vec::new();
        let result = match &work {
            // Another writer may have the journal open by now.
            _ if shared.closed.load(Ordering::Acquire) => Err(JobError::Closed { what }),
            Work::Prepare { path, bytes } => prepare(&shared, path, *bytes),
            Work::Seal(segment) => seal(&shared, segment),
            Work::Index(choice) => build_index(&shared, choice),
            Work::Retain { control, plan } => retain(&shared, control, plan, &mut left),
            Work::Delete(segments) => delete(&shared, segments),
            Work::Note { control, ends, durable } => control
                .update(|r| note_durable(r, ends))
                .map(|()| JobOutcome::Noted { durable: *durable })
                .map_err(|source| JobError::Control { what, source }),
        };
        JobDone { work, result, left, _token: token }
    }
}

fn disk_error(what: &'static str) -> impl Fn(DiskError) -> JobError {
    move |source| JobError::Disk { what, source }
}

fn read_error(what: &'static str) -> impl Fn(ReadError) -> JobError {
    move |e| match e {
        ReadError::Corrupt(source) => JobError::Corrupt { what, source },
        ReadError::Disk(source) => JobError::Disk { what, source },
        ReadError::Base(source) => JobError::Base { what, source },
    }
}

fn prepare(shared: &Shared, path: &Path, bytes: ByteLen) -> Result<JobOutcome, JobError> {
    shared.disk.create_zeroed(path, bytes).map_err(disk_error("prepare a segment"))?;
    Ok(JobOutcome::Prepared { bytes })
}

fn seal(shared: &Shared, segment: &Arc<Segment>) -> Result<JobOutcome, JobError> {
    match segment::seal(&*shared.disk, &shared.dir, segment) {
        Ok(()) => {}
        // Given up, and deleted, after this job was handed out.
        Err(e) if e.is_not_found() && !shared.map().segments().any(|s| Arc::ptr_eq(s, segment)) => {
            return Ok(JobOutcome::Deleted { files: 0 });
        }
        Err(e) => return Err(disk_error("seal a segment")(e)),
    }
    Ok(JobOutcome::Sealed { first: segment.first_lsn(), last: segment.last_lsn() })
}

/// Removes a file and says how long it was; one that is gone already was removed by an earlier try.
fn remove_file(shared: &Shared, segment: &Segment) -> Result<Option<u64>, DiskError> {
    let len = segment.summary().file_bytes;
    let removed = match shared.disk.remove(&segment.path(&shared.dir)) {
        // A seal that was under way may have renamed it and not have said so yet.
        Err(e) if e.is_not_found() => shared.disk.remove(&segment.header.name(SegmentState::Sealed).path(&shared.dir)),
        other => other,
    };
    shared.forget(segment);
    match removed {
        Ok(()) => Ok(Some(len)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

fn delete(shared: &Shared, segments: &[Arc<Segment>]) -> Result<JobOutcome, JobError> {
    let mut files = 0;
    for segment in segments {
        files += usize::from(remove_file(shared, segment).map_err(disk_error(DELETE))?.is_some());
    }
    Ok(JobOutcome::Deleted { files })
}

// ---------------------------------------------------------------- index

fn open_index(shared: &Shared, choice: &IndexChoice) -> Result<Option<Arc<dyn IndexStore>>, JobError> {
    if let Some(index) = shared.index() {
        return Ok(Some(index));
    }
    let index: Arc<dyn IndexStore> = match choice {
        IndexChoice::None => return Ok(None),
        IndexChoice::Memory => Arc::new(MemStore::new(shared.shape)),
        IndexChoice::Sled { dir } => {
            let group = shared.map().spec.id;
            let opened = SledStore::open(dir, *group.bytes(), shared.shape, SledOptions::default());
            Arc::new(opened.map_err(|e| disk_error("index segments")(DiskError::from_io("open index", dir, e)))?)
        }
    };
    drop_old_generations(shared, &*index)?;
    shared.set_index(Some(Arc::clone(&index)));
    Ok(Some(index))
}

fn index_error(source: IndexError) -> JobError {
    JobError::Index { what: "index segments", source }
}

/// Generations whose segments are all gone.
fn drop_old_generations(shared: &Shared, index: &dyn IndexStore) -> Result<(), JobError> {
    let map = shared.map();
    for generation in index.generations() {
        let needed = map.line(generation.timeline).is_some_and(|line| {
            line.segments.first().is_some_and(|s| shared.shape.segments(generation).end > s.header.ordinal)
        });
        if !needed {
            index.drop_generation(generation).map_err(index_error)?;
        }
    }
    Ok(())
}

fn build_index(shared: &Shared, choice: &IndexChoice) -> Result<JobOutcome, JobError> {
    let Some(index) = open_index(shared, choice)? else { return Ok(JobOutcome::Indexed { runs: 0 }) };
    let mut runs = 0;
    while runs < RUNS_PER_JOB {
        let Some((timeline, task)) = next_task(shared, &*index) else { break };
        build_run(shared, &*index, timeline, &task)?;
        runs += 1;
    }
    if runs > 0 {
        index.flush().map_err(index_error)?;
    }
    shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).index_bytes = ByteLen(index.bytes());
    Ok(JobOutcome::Indexed { runs })
}

fn next_task(shared: &Shared, index: &dyn IndexStore) -> Option<(TimelineId, RunTask)> {
    let map = shared.map();
    // The timeline that takes the appends first: it is the one that is asked most.
    let current = map.lines.get(&map.current).into_iter();
    for line in current.chain(map.lines.values().filter(|l| l.id != map.current)) {
        let sealed = line.segments.iter().take_while(|s| s.sealed().is_some()).count();
        let end = line.first_kept() + sealed as u32;
        let pieces = |run: RunId| {
            let info = index.run(run)?;
            (shared.run_tag(line, run) == Some(info.tag)).then_some(info.pieces)
        };
        if let Some(task) = shared.shape.next_due(line.id, line.first_kept(), end, pieces) {
            return Some((line.id, task));
        }
    }
    None
}

fn build_run(shared: &Shared, index: &dyn IndexStore, timeline: TimelineId, task: &RunTask) -> Result<(), JobError> {
    let map = shared.map();
    let gone = || index_error(IndexError::NoRun(task.run));
    let line = map.line(timeline).ok_or_else(gone)?;
    let tag = shared.run_tag(line, task.run).ok_or_else(gone)?;
    if index.run(task.run).is_some_and(|info| info.tag != tag) {
        // Made from other segments than ours (a journal put back from a copy): not to be used, and neither is what lies beside.
        let generation: GenerationId = shared.shape.generation(task.run);
        index.drop_generation(generation).map_err(index_error)?;
        return Ok(());
    }
    match &task.inputs {
        Inputs::Footer(ordinal) => {
            let segment = line.by_ordinal(*ordinal).ok_or_else(gone)?;
            let pieces = segment_pieces(shared, segment, *ordinal, Lsn::ZERO, Lsn::MAX)?;
            index.put_run(task.run, tag, &mut pieces.into_iter().map(Ok)).map_err(index_error)?;
        }
        Inputs::Runs { newest_first, keep_from } => {
            let inputs: Result<Vec<_>, IndexError> = newest_first.iter().map(|run| index.run_iter(*run)).collect();
            let mut merged = merge(inputs.map_err(index_error)?, *keep_from);
            index.put_run(task.run, tag, &mut merged).map_err(index_error)?;
        }
    }
    Ok(())
}

/// The newest pieces of one segment, of records above `after` and up to `upto`.
fn segment_pieces(
    shared: &Shared,
    segment: &Segment,
    ordinal: u32,
    after: Lsn,
    upto: Lsn,
) -> Result<Vec<Piece>, JobError> {
    let extents = shared.all_extents(segment).map_err(read_error("index segments"))?;
    let versions = extents.into_iter().filter(|e| e.lsn > after && e.lsn <= upto).map(|e| Version {
        volume: e.volume,
        lba: e.extent.start(),
        // The footer keeps 32 bits.
        sectors: e.extent.sectors.0 as u32,
        lsn: e.lsn,
        offset: e.offset,
        kind: if e.kind == RecordKind::Write { PieceKind::Data } else { PieceKind::Zero },
    });
    Ok(pieces_from_versions(ordinal, versions))
}

// ---------------------------------------------------------------- retention

const RETAIN: &str = "fold and delete old history";
const DELETE: &str = "delete files of history";

fn retain(
    shared: &Arc<Shared>,
    control: &Control,
    plan: &Plan,
    left: &mut Vec<Arc<Segment>>,
) -> Result<JobOutcome, JobError> {
    let keep = |source: ControlError| JobError::Control { what: RETAIN, source };
    // The cutoff first: from here on nobody is promised anything below it, whatever happens.
    control.update(|r| r.cutoff = r.cutoff.max(plan.new_cutoff)).map_err(keep)?;
    let map = shared.map();
    if plan.new_cutoff > map.floor.lsn {
        fold(shared, plan)?;
        let floor = floor_at(shared, plan);
        let volumes: Vec<_> = map.spec.volumes.iter().map(|v| v.id).collect();
        control
            .update(|r| {
                r.floor = floor;
                r.based.extend(volumes);
                prune_released(r);
                forget_unneeded(r);
            })
            .map_err(keep)?;
        shared.base.fold_done(plan.new_cutoff);
    }
    // The floor is durable: what lies below it may go.
    let record = control.record();
    let mut gone: Vec<Arc<Segment>> = Vec::new();
    shared.change_map(|m| {
        m.floor = record.floor;
        m.released = Arc::new(record.released.clone());
        m.lines.retain(|id, line| {
            line.start = load::start_of(&record, *id);
            let mut kept = Vec::with_capacity(line.segments.len());
            for segment in line.segments.drain(..) {
                let going = plan.delete.binary_search(&(*id, segment.header.ordinal)).is_ok();
                if going { gone.push(segment) } else { kept.push(segment) }
            }
            line.segments = kept;
            record.timeline(*id).is_some()
        });
    });
    // The map has them no more, so no plan will name them again: what cannot be removed now is left to Delete, which says why.
    let (mut deleted, mut bytes) = (0, 0);
    for segment in gone {
        match remove_file(shared, &segment) {
            Ok(len) => {
                deleted += usize::from(len.is_some());
                bytes += len.unwrap_or(0);
            }
            Err(_) => left.push(segment),
        }
    }
    if let Some(index) = shared.index() {
        drop_old_generations(shared, &*index)?;
        shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).index_bytes = ByteLen(index.bytes());
    }
    if let Ok(bytes) = shared.base.bytes() {
        shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).base_bytes = bytes;
    }
    Ok(JobOutcome::Retained { floor: record.floor.lsn, deleted, bytes: ByteLen(bytes) })
}

/// Bookmarks below the floor are gone with their history; that they were released need not be known any more.
fn prune_released(record: &mut ControlRecord) {
    let floor = record.floor.lsn;
    record.released.retain(|(_, lsn)| *lsn > floor);
}

/// What the new floor carries along.
fn floor_at(shared: &Shared, plan: &Plan) -> Floor {
    let map = shared.map();
    let lsn = plan.new_cutoff;
    let timeline = plan
        .trunk
        .iter()
        .find(|(_, until)| until.is_none_or(|until| lsn <= until))
        .map_or(map.floor.timeline, |(id, _)| *id);
    let carry = carry_at(shared, &map, timeline, lsn);
    let history = History::new(shared, &map, timeline, lsn);
    let time = history.time_of(lsn).unwrap_or(carry.time);
    Floor { timeline, lsn, time, gap: carry.gap, at_boundary: !carry.inside_request }
}

/// Moves the base from the floor to the cutoff.
fn fold(shared: &Arc<Shared>, plan: &Plan) -> Result<(), JobError> {
    let map = shared.map();
    let base = |source: BaseError| JobError::Base { what: RETAIN, source: Box::new(source) };
    let record_floor = map.floor.lsn;
    // Numbered in the order of history: these numbers stand in for ordinals, which count per timeline.
    let mut segments: Vec<(Arc<Segment>, Lsn)> = Vec::new();
    for (id, until) in &plan.trunk {
        let upto = until.map_or(plan.new_cutoff, |until| until.min(plan.new_cutoff));
        let Some(line) = map.line(*id) else { continue };
        let end = line.segments.partition_point(|s| s.first_lsn() <= upto);
        segments.extend(line.segments[..end].iter().map(|s| (Arc::clone(s), upto)));
        if until.is_none_or(|until| until >= plan.new_cutoff) {
            break;
        }
    }
    let mut runs = Vec::new();
    for (i, (segment, upto)) in segments.iter().enumerate().rev() {
        let pieces = segment_pieces(shared, segment, i as u32, record_floor, *upto)?;
        runs.push(pieces.into_iter().map(Ok::<_, ReadError>));
    }
    let pieces: Result<Vec<Piece>, ReadError> = merge(runs, 0).collect();
    let pieces = pieces.map_err(read_error(RETAIN))?;
    let payloads = Payloads::new(16 << 20);
    for volume in &map.spec.volumes {
        shared.base.ensure_volume(volume.id, volume.sectors, false).map_err(base)?;
    }
    for of_volume in pieces.chunk_by(|a, b| a.volume == b.volume) {
        let volume = of_volume[0].volume;
        let mut stream = of_volume.iter().map(|piece| {
            let data = match piece.kind {
                PieceKind::Zero => FoldData::Zero(piece.sectors.into()),
                PieceKind::Data => {
                    let segment = Arc::clone(&segments[piece.ordinal as usize].0);
                    let place = Place { segment, offset: piece.offset, skip: piece.skip.into() };
                    let extent = piece.extent();
                    let mut data = vec![0; extent.bytes() as usize];
                    payloads
                        .read(shared, &place, volume, extent, &mut data)
                        .map_err(|e| BaseError::Source(Box::new(e)))?;
                    FoldData::Data(data)
                }
            };
            Ok(FoldPiece { lba: piece.lba, data })
        });
        shared.base.fold(plan.new_cutoff, volume, &mut stream).map_err(base)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        NewRecord,
        index::{RunInfo, RunIter},
    };
    use durable::SimDisk;
    use model::{
        Codec, Extent, GroupId, GroupPolicy, GroupSpec, Sectors, SourceSeq, StreamId, Term, VolumeId, VolumeSpec,
        WriteFlags,
    };

    /// An index that has lost what it had, as one whose damaged generation was set aside.
    #[derive(Debug)]
    struct Damaged(MemStore);

    impl IndexStore for Damaged {
        fn put_run(
            &self,
            run: RunId,
            tag: u64,
            pieces: &mut dyn Iterator<Item = Result<Piece, IndexError>>,
        ) -> Result<RunInfo, IndexError> {
            self.0.put_run(run, tag, pieces)
        }
        fn run(&self, run: RunId) -> Option<RunInfo> {
            self.0.run(run)
        }
        fn lookup(&self, run: RunId, volume: VolumeId, e: Extent, out: &mut Vec<Piece>) -> Result<(), IndexError> {
            self.0.lookup(run, volume, e, out)
        }
        fn run_iter(&self, run: RunId) -> Result<RunIter<'_>, IndexError> {
            self.0.run_iter(run)
        }
        fn generations(&self) -> Vec<GenerationId> {
            self.0.generations()
        }
        fn drop_generation(&self, generation: GenerationId) -> Result<(), IndexError> {
            self.0.drop_generation(generation)
        }
        fn damaged(&self) -> u32 {
            1
        }
        fn bytes(&self) -> u64 {
            self.0.bytes()
        }
        fn flush(&self) -> Result<(), IndexError> {
            self.0.flush()
        }
    }

    #[test]
    fn an_idle_journal_rebuilds_a_damaged_index() {
        let disk: Arc<dyn durable::Disk> = Arc::new(SimDisk::new(1, ByteLen(64 << 20)));
        let volume = VolumeSpec { id: VolumeId(1), name: "v".into(), sectors: Sectors(64), identity: String::new() };
        let spec = GroupSpec {
            id: GroupId([1; 16]),
            name: "g".into(),
            host: None,
            volumes: vec![volume],
            policy: GroupPolicy::default(),
        };
        let options = JournalOptions {
            segment_bytes: ByteLen(160 * 1024),
            batch_bytes: 4096,
            depth: 2,
            prepared_ahead: 1,
            segments_per_generation: 8,
            index: IndexChoice::Memory,
        };
        let mut journal =
            Journal::create(disk, Path::new("g"), &spec, Term(1), options, HistoryTime(1)).expect("creates");
        let payload = [7; 4096];
        for seq in 1..=100u64 {
            let record = NewRecord {
                kind: RecordKind::Write,
                flags: WriteFlags::NONE,
                volume: VolumeId(1),
                extent: Extent::new(seq % 8 * 8, 8),
                codec: Codec::Raw,
                payload_crc: None,
                payload: &payload,
                time: HistoryTime(seq),
                source_wall_us: 0,
                stream: StreamId([1; 16]),
                seq: SourceSeq(seq),
            };
            while journal.append(&record).is_err() {
                journal.poll(true).expect("polls");
            }
        }
        journal.drain().expect("durable");
        let indexed = |journal: &mut Journal, now: u64| {
            let mut built = 0;
            while let Some(job) = journal.next_job(HistoryTime(now)) {
                if let JobOutcome::Indexed { runs } = journal.job_done(job.run()).expect("succeeds") {
                    built += runs;
                }
            }
            built
        };
        let runs = indexed(&mut journal, 1_000);
        assert!(runs > 3, "{runs} runs");
        assert_eq!(indexed(&mut journal, 20_000_000), 0, "there is nothing to do");
        journal.shared.set_index(Some(Arc::new(Damaged(MemStore::new(journal.shared.shape)))));
        assert_eq!(journal.stats().index_damaged, 1);
        assert_eq!(indexed(&mut journal, 40_000_000), runs, "rebuilt without a single append");
        assert_eq!(indexed(&mut journal, 60_000_000), 0, "once");
    }
}
