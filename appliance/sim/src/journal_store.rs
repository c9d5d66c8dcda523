//! The journal on a [`SimDisk`], as the box drives it: one thread's worth of appends, polls and background jobs.

use crate::neighbour::Neighbour;
use crate::rng::Rng;
use crate::store::{Down, Flipped, NotTaken, Position, Store, StoreCounts, StoreProgress};
use durable::{Disk, OpenMode, SimDisk};
use journal::{AppendError, IndexChoice, JobOutcome, Journal, JournalOptions, NewRecord, RecoveryReport};
use model::{
    ByteLen, Extent, GapReason, GroupSpec, HistoryTime, Lsn, Mark, RecoveryPoint, SECTOR, SourceSeq, StreamId, Term,
};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use wire::{FrameHeader, FrameKind};

const DIR: &str = "groups/simulated";
const CAPACITY: ByteLen = ByteLen(512 << 20);
/// At most so many faults are armed at once: a write, a flush and a cut.
const FAULTS_MAX: usize = 4;
pub(crate) const NO_ROOM: &str = "no room left on the disk";
/// The jobs' clock runs ahead of the world's, so that what is due every ten seconds comes round often enough.
const JOBS_CLOCK_TIMES: u64 = 40;

pub(crate) struct JournalStore {
    rng: Rng,
    seed: u64,
    spec: GroupSpec,
    options: JournalOptions,
    disk: SimDisk,
    /// None between a failed reopening and the next.
    journal: Option<Journal>,
    /// Another group on the same disk.
    neighbour: Neighbour,
    /// An older state of the disk, for a box that goes back to it.
    older: Option<SimDisk>,
    /// A write failed, as it was to: the journal takes nothing until it is opened again.
    failed: bool,
    full: bool,
    counts: StoreCounts,
}

impl JournalStore {
    pub(crate) fn create(seed: u64, spec: &GroupSpec, now: HistoryTime) -> Result<Self, String> {
        let mut rng = Rng::new(seed, 60);
        let options = JournalOptions {
            segment_bytes: ByteLen(rng.between(64, 512) * 4096),
            batch_bytes: rng.between(1, 16) as usize * 4096,
            depth: rng.between(1, 4) as usize,
            prepared_ahead: rng.between(1, 2) as usize,
            segments_per_generation: 8,
            index: if rng.one_in(2) { IndexChoice::Memory } else { IndexChoice::None },
        };
        let mut spec = spec.clone();
        // In half of the worlds nothing has to be kept: the base is folded all the time.
        let hours = if rng.one_in(2) { 0 } else { 1000 };
        spec.policy.window_hours = hours;
        spec.policy.window_hours_floor = hours;
        let disk = SimDisk::new(seed, CAPACITY);
        let journal = Self::make(&disk, &spec, &options, now)?;
        let neighbour = Neighbour::new(seed);
        Ok(Self {
            rng,
            seed,
            spec,
            options,
            disk,
            journal: Some(journal),
            neighbour,
            older: None,
            failed: false,
            full: false,
            counts: StoreCounts::default(),
        })
    }

    fn make(disk: &SimDisk, spec: &GroupSpec, options: &JournalOptions, now: HistoryTime) -> Result<Journal, String> {
        let disk: Arc<dyn Disk> = Arc::new(disk.clone());
        Journal::create(disk, Path::new(DIR), spec, Term(1), options.clone(), now).map_err(|error| chain(&error))
    }

    fn open(&mut self, now: HistoryTime) -> Result<(), OpenFailed> {
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let (journal, report) = Journal::open(disk, Path::new(DIR), self.options.clone(), now).map_err(|error| {
            OpenFailed { injected: !self.disk.is_powered() || is_injected(&error), what: chain(&error) }
        })?;
        let RecoveryReport { cut, .. } = report;
        self.counts.cut_tails += cut.len() as u64;
        self.journal = Some(journal);
        Ok(())
    }

    fn journal(&self) -> &Journal {
        self.journal.as_ref().expect("a world in which the journal could not be opened has ended")
    }

    fn not_taken(&mut self, error: AppendError) -> NotTaken {
        match error {
            AppendError::Busy { .. } => NotTaken::Busy,
            AppendError::NoSpace { .. } | AppendError::OverLimit { .. } => NotTaken::Full,
            // It lost power, or a write failed that was to fail: the world finds it down and starts it again.
            error if !self.disk.is_powered() || is_injected(&error) => {
                self.failed = true;
                NotTaken::Busy
            }
            AppendError::Control(_) if chain(&error).contains(NO_ROOM) => NotTaken::Full,
            error => NotTaken::Dead(chain(&error)),
        }
    }

    fn jobs(&mut self, now: HistoryTime) -> Result<(), String> {
        let now = HistoryTime(now.0.saturating_mul(JOBS_CLOCK_TIMES));
        for _ in 0..self.rng.below(4) {
            let Some(journal) = &mut self.journal else { return Ok(()) };
            let Some(job) = journal.next_job(now) else { return Ok(()) };
            // Now and then one is forgotten, as when its thread is told to end.
            if self.rng.one_in(50) {
                continue;
            }
            let done = job.run();
            match journal.job_done(done) {
                Ok(JobOutcome::Sealed { .. }) => self.counts.segments += 1,
                Ok(JobOutcome::Retained { deleted, .. }) => self.counts.folds += u64::from(deleted > 0),
                Ok(_) => {}
                // A disk without room or power is no fault of the journal's; damage is.
                Err(error @ journal::JobError::Corrupt { .. }) => return Err(chain(&error)),
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Store for JournalStore {
    fn append(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        time: HistoryTime,
        stream: StreamId,
    ) -> Result<Lsn, NotTaken> {
        let FrameKind::Record(kind) = header.kind else { return Err(NotTaken::Dead("not a record".into())) };
        let record = NewRecord {
            kind,
            flags: header.flags,
            volume: header.volume,
            extent: header.extent,
            codec: header.codec,
            payload,
            payload_crc: Some(header.payload_crc),
            time,
            source_wall_us: header.wall_us,
            stream,
            seq: header.seq,
        };
        let Some(journal) = &mut self.journal else { return Err(NotTaken::Busy) };
        journal.append(&record).map_err(|error| self.not_taken(error))
    }

    fn append_mark(
        &mut self,
        mark: &Mark,
        time: HistoryTime,
        stream: StreamId,
        seq: SourceSeq,
    ) -> Result<Lsn, NotTaken> {
        let Some(journal) = &mut self.journal else { return Err(NotTaken::Busy) };
        journal.append_mark(mark, time, stream, seq).map_err(|error| self.not_taken(error))
    }

    fn step(&mut self, now: HistoryTime) -> Result<(), String> {
        let wait = self.rng.one_in(3);
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let polled = journal.submit().and_then(|()| journal.poll(wait));
        if let Err(error) = polled
            && let NotTaken::Dead(what) = self.not_taken(error)
        {
            return Err(what);
        }
        self.neighbour.step(&self.disk, now).map_err(|what| format!("the neighbour: {what}"))?;
        if self.rng.one_in(300) && !self.is_down() {
            self.older = Some(self.disk.fork(self.rng.next()));
        }
        self.jobs(now)
    }

    fn progress(&self) -> StoreProgress {
        let progress = self.journal().progress();
        StoreProgress { appended: progress.appended, written: progress.written, durable: progress.durable }
    }

    fn position(&self) -> Option<Position> {
        let position = self.journal().source_position()?;
        Some(Position { stream: position.stream, appended: position.appended, durable: position.durable })
    }

    fn in_gap(&self) -> Option<GapReason> {
        self.journal().in_gap().map(|(_, reason)| reason)
    }

    fn last_time(&self) -> HistoryTime {
        self.journal().last_time()
    }

    fn set_full(&mut self, full: bool) {
        self.full = full;
        // Less than the journal keeps for itself: no new segment fits, but an interrupted fold can be done again.
        let used = self.disk.space().map_or(0, |space| space.total.0 - space.available.0);
        self.disk.set_capacity(if full { ByteLen(used + (4 << 20)) } else { CAPACITY });
    }

    fn arm_fault(&mut self) {
        match self.rng.below(3) {
            0 => self.disk.fail_write_at(Path::new(DIR).join("seg")),
            1 => self.disk.fail_next_flush(),
            // The power goes in the middle of an operation, not between two of them.
            _ => self.disk.cut_after(self.rng.below(20)),
        }
    }

    fn is_down(&self) -> bool {
        !self.disk.is_powered() || self.failed
    }

    fn restart(&mut self, how: Down, now: HistoryTime) -> Result<(), String> {
        let how = if self.disk.is_powered() { how } else { Down::PowerCut };
        match how {
            Down::PowerCut => self.disk = self.disk.power_cut(),
            Down::Killed => self.disk = self.disk.kill(),
            Down::InOrder => {
                if let Some(journal) = self.journal.take() {
                    // A full or failing disk may refuse; what was not durable was not promised.
                    let closed = journal.close();
                    if let Err(error) = closed
                        && let NotTaken::Dead(what) = self.not_taken(error)
                    {
                        return Err(what);
                    }
                }
                if !self.disk.is_powered() {
                    self.disk = self.disk.power_cut();
                }
            }
        }
        self.journal = None;
        self.failed = false;
        self.set_full(self.full);
        // A fault may strike while the journal is being opened; the next start finds the disk better.
        for _ in 0..FAULTS_MAX {
            match self.open(now) {
                Err(OpenFailed { injected: true, .. }) => {
                    if !self.disk.is_powered() {
                        self.disk = self.disk.power_cut();
                    }
                }
                Err(OpenFailed { what, .. }) => return Err(what),
                Ok(()) => {
                    let reopened = self.neighbour.reopen(&self.disk, now);
                    reopened.map_err(|what| format!("the neighbour: {what}"))?;
                    if self.disk.is_powered() {
                        return Ok(());
                    }
                    // It went while the other group was opened: for both of them.
                    self.journal = None;
                    self.disk = self.disk.power_cut();
                }
            }
        }
        Err(format!("not opened in {FAULTS_MAX} attempts"))
    }

    fn betray(&mut self, now: HistoryTime) -> Result<(), String> {
        self.journal = None;
        self.failed = false;
        match self.older.take().filter(|_| self.rng.one_in(2)) {
            Some(older) => {
                self.disk = older.kill();
                self.neighbour.abandon();
                self.restart(Down::Killed, now)
            }
            None => {
                self.disk = SimDisk::new(self.seed ^ now.0, CAPACITY);
                self.journal = Some(Self::make(&self.disk, &self.spec, &self.options, now)?);
                self.neighbour.abandon();
                Ok(())
            }
        }
    }

    fn offered(&self) -> Vec<(Lsn, Lsn)> {
        self.journal().reader().points().valid.iter().map(|range| (range.first_lsn, range.last_lsn)).collect()
    }

    fn read(&mut self, lsn: Lsn, volume: usize, extent: Extent) -> Result<Vec<u8>, String> {
        let reader = self.journal().reader();
        let point = reader.resolve(&RecoveryPoint::Lsn(lsn)).map_err(|error| chain(&error))?;
        if point.lsn != lsn {
            return Err(format!("asked for LSN {lsn}, resolved to {}", point.lsn));
        }
        let view = reader.view(point).map_err(|error| chain(&error))?;
        let mut out = vec![0; extent.bytes() as usize];
        let id = self.spec.volumes[volume].id;
        view.read(id, extent.start() * SECTOR, &mut out).map_err(|error| chain(&error))?;
        Ok(out)
    }

    fn read_head(&mut self, volume: usize, extent: Extent) -> Result<Vec<u8>, String> {
        let view = self.journal().reader().head_view();
        let mut out = vec![0; extent.bytes() as usize];
        let id = self.spec.volumes[volume].id;
        view.read(id, extent.start() * SECTOR, &mut out).map_err(|error| chain(&error))?;
        Ok(out)
    }

    fn flip(&mut self) -> Result<Option<Flipped>, String> {
        let ours: Vec<_> = self.disk.paths().into_iter().filter(|p| p.starts_with(DIR)).collect();
        let path = ours[self.rng.below(ours.len() as u64) as usize].clone();
        let opened = self.disk.open(&path, OpenMode::Read).and_then(|file| file.len());
        let ByteLen(len) = opened.map_err(|error| chain(&error))?;
        if len == 0 {
            return Ok(None);
        }
        // Where something is, more often than in the zeroes behind it.
        let offset = if self.rng.one_in(2) { self.rng.below(len) } else { self.rng.below(len.min(64 << 10)) };
        let bit = self.rng.below(8) as u8;
        self.disk.flip_bit(&path, offset, bit).map_err(|error| chain(&error))?;
        Ok(Some(Flipped { file: path.display().to_string(), offset }))
    }

    fn verify(&mut self) -> Vec<String> {
        let report = self.journal().reader().verify(&mut |_| {});
        report.damage.iter().map(ToString::to_string).chain(report.unreadable).collect()
    }

    fn check_neighbour(&mut self, moments: u64) -> Result<(), String> {
        self.neighbour.check(moments)
    }

    fn counts(&self) -> StoreCounts {
        self.counts
    }
}

struct OpenFailed {
    what: String,
    injected: bool,
}

/// Whether the simulated disk made it up.
pub(crate) fn is_injected(error: &dyn Error) -> bool {
    chain(error).contains("simulated medium error")
}

/// An error and its causes as one sentence.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
