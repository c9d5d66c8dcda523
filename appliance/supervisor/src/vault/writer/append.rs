//! The journal's side: append, submit, collect, and what to do when there is no room.

use super::{BALANCE_MS_MAX, Held, JOBS_BEFORE_FULL, JOBS_EVERY_BYTES, Refused, Who, Writer, pace::Moment};
use crate::{
    events::Event,
    vault::{Counters, Marked, jobs},
};
use journal::{AppendError, NewRecord};
use model::{HistoryTime, Lsn, Mark, RecordKind, SourceSeq, StreamId};
use replication::TargetEvent;

impl Writer<'_> {
    pub(super) fn append(&mut self, record: &NewRecord<'_>) -> Result<Lsn, Refused> {
        loop {
            match self.journal.append(record) {
                Ok(lsn) => {
                    let bytes = if record.kind == RecordKind::Write { record.extent.bytes() } else { 0 };
                    Counters::add(&self.shared.counters.bytes, bytes);
                    Counters::add(&self.shared.counters.records, 1);
                    self.appended_since_jobs += record.payload.len() as u64 + 128;
                    self.took();
                    return Ok(lsn);
                }
                Err(AppendError::Busy { .. }) => self.make_way()?,
                Err(e) => return Err(sort(e)),
            }
        }
    }

    pub(super) fn append_mark(
        &mut self,
        mark: &Mark,
        time: HistoryTime,
        stream: StreamId,
        seq: SourceSeq,
    ) -> Result<Lsn, Refused> {
        loop {
            match self.journal.append_mark(mark, time, stream, seq) {
                Ok(lsn) => {
                    self.took();
                    return Ok(lsn);
                }
                Err(AppendError::Busy { .. }) => self.make_way()?,
                Err(e) => return Err(sort(e)),
            }
        }
    }

    /// All writes are in flight and the batch is full: answers go out while one of them ends.
    pub(super) fn make_way(&mut self) -> Result<(), Refused> {
        self.wake();
        self.collect(true);
        self.wake();
        match self.failed.take() {
            None => Ok(()),
            Some(text) => Err(Refused::Failed(text)),
        }
    }

    /// Something was appended: there is room.
    pub(super) fn took(&mut self) {
        self.held = None;
        if self.full {
            self.full = false;
            self.shared.change_live(|live| live.full = None);
            self.context.events.note(Event::JournalRoom, &self.shared.name, "writes are taken again");
            self.target_event(TargetEvent::Room(true), None);
        }
        if self.appended_since_jobs >= JOBS_EVERY_BYTES {
            self.start_jobs();
        }
    }

    /// The head of the queue does not fit. True: jobs may still make room, it waits. False: the group is full.
    pub(super) fn hold(&mut self, text: &str) -> bool {
        let now = self.context.clock.mono();
        let held = self.held.unwrap_or_else(|| Held::at(now));
        self.start_jobs();
        let may_balance = !held.balanced && now.ms_since(held.since) < BALANCE_MS_MAX;
        if may_balance {
            self.context.room_wanted.notify_one();
        }
        if !self.full && (may_balance || (self.jobs_running > 0 && held.jobs < JOBS_BEFORE_FULL)) {
            self.held = Some(Held { due: false, tried: now, ..held });
            return true;
        }
        self.held = None;
        if !self.full {
            self.full = true;
            self.shared.change_live(|live| live.full = Some(text.to_owned()));
            self.context.events.note(Event::JournalFull, &self.shared.name, text);
            self.target_event(TargetEvent::Room(false), None);
        }
        false
    }

    pub(super) fn submit(&mut self) {
        let progress = self.journal.progress();
        if progress.unsent_bytes == 0 {
            return;
        }
        let now = self.context.clock.mono();
        let moment = Moment {
            now,
            in_flight: progress.in_flight,
            depth: self.context.options.depth,
            waiting: self.waiters.len(),
            wanted: self.wanted(&progress),
        };
        if !self.pace.sends(moment) {
            return;
        }
        Counters::add(&self.shared.counters.batches, 1);
        match self.journal.submit() {
            Ok(()) => self.pace.sent(progress.appended, now),
            Err(AppendError::Busy { .. }) => {}
            Err(e) => self.failed = Some(crate::chain(&e)),
        }
    }

    /// Takes in completions and answers who waited for them.
    pub(super) fn collect(&mut self, block: bool) {
        let progress = match self.journal.poll(block) {
            Ok(progress) => progress,
            Err(e) => {
                self.failed = Some(crate::chain(&e));
                return;
            }
        };
        self.pace.durable(progress.durable, self.context.clock.mono());
        let mut source = false;
        while let Some(front) = self.waiters.front()
            && front.lsn <= progress.durable
            && let Some(waiter) = self.waiters.pop_front()
        {
            match waiter.who {
                Who::Client { lane, op } => {
                    lane.done(&op.request);
                    self.touch(&lane.outbox);
                }
                Who::Mark { time, reply } => {
                    let _ = reply.send(Ok(Marked { lsn: waiter.lsn, time }));
                }
                Who::Barrier { reply } => {
                    let _ = reply.send(Ok(()));
                }
                Who::Source => source = true,
            }
        }
        while let Some(front) = self.reads.front()
            && front.lsn <= progress.written
            && let Some(reading) = self.reads.pop_front()
        {
            self.read(reading);
        }
        self.begin_compares();
        if source {
            self.target_event(TargetEvent::Progress { written: progress.written, durable: progress.durable }, None);
        }
    }

    /// Makes everything appended durable.
    pub(super) fn settle(&mut self) {
        loop {
            let progress = self.journal.progress();
            if self.failed.is_some() || progress.durable >= progress.appended {
                return;
            }
            match self.journal.submit() {
                Ok(()) | Err(AppendError::Busy { .. }) => self.collect(true),
                Err(e) => self.failed = Some(crate::chain(&e)),
            }
        }
    }

    pub(super) fn start_jobs(&mut self) {
        self.appended_since_jobs = 0;
        while self.jobs_running < jobs::PER_GROUP
            && !self.closing
            && let Some(job) = self.journal.next_job(self.context.clock.history())
        {
            tracing::debug!(group = %self.shared.name, job = job.what(), "job");
            if self.context.jobs.push(job, self.inbox).is_err() {
                return; // the box is shutting down
            }
            self.jobs_running += 1;
        }
    }

    pub(super) fn job_done(&mut self, done: journal::JobDone) {
        if let Some(held) = &mut self.held {
            held.jobs += 1;
            held.due = true;
        }
        match self.journal.job_done(done) {
            Ok(outcome) => tracing::debug!(group = %self.shared.name, ?outcome, "job done"),
            Err(e) => {
                self.context.events.note(Event::JobFailed, &self.shared.name, crate::chain(&e));
                // Not at once: a job that fails for lack of room would be tried in a loop.
                return;
            }
        }
        self.start_jobs();
    }
}

fn sort(e: AppendError) -> Refused {
    match e {
        AppendError::NoSpace { .. } | AppendError::OverLimit { .. } => Refused::NoRoom(e.to_string()),
        AppendError::Poisoned(_) | AppendError::Roll(_) | AppendError::Control(_) => Refused::Failed(crate::chain(&e)),
        e => Refused::Record(e),
    }
}
