//! The journal thread: the one owner of a group's [`Journal`].
//!
//! ```text
//!            ┌────────────── JobDone ──────────── job threads
//! NBD ──┐    ▼
//! agent ├─▶ inbox ─▶ pending ─▶ append ─▶ submit ─▶ poll ─▶ answers, acks ─▶ outboxes
//! API ──┘              (in order)
//! ```
//!
//! **One thread from socket to socket.** The NBD connections of an ingest target live on this thread too ([`Group::here`]): a request that
//! is read from a socket is appended, sent to the disk and answered without another thread being woken. Commands of other threads (jobs,
//! agents' connections, the API) come through the same inbox. A lone client's durable write (a write and a flush, so two requests)
//! costs 2 recv, 2 send, 1 io_uring_enter, 4 epoll_wait of which 2 do not wait, and no futex.
//!
//! **Group commit without a timer.** One turn takes everything that is queued, appends it, collects what has ended, submits, and only
//! then waits, for anything ([`ears`]). Under load a batch is what came in while the last ones were being written; [`pace`] says when it
//! goes beside them. When nobody waits for durability (plain writes, no flush), what comes in while a write is under way is gathered
//! into the next one instead of making many small ones.
//!
//! **Answers.** A plain NBD write is answered when it is appended: the client was promised a volatile cache. FUA and flush are answered
//! when the LSN they mean is durable. A read of an ingest target goes to the readers once everything appended before it is written. An
//! agent is told *durable* by [`Target`] from the journal's progress, never earlier.
//!
//! **No room.** A record that does not fit stays at the head of the queue while jobs may still make room (prepare, fold within the
//! window's floor). When they could not, the group is *full*: NBD writes fail with "no space", an agent is told and keeps a dirty map;
//! nothing acknowledged is touched. It is tried again with every job and every second.
//!
//! **Failure.** A failed write poisons the journal: all who wait are told, the stream connection is cut, and the journal is opened again,
//! which recovers it. Writes that were answered without a flush may be lost with it: NBD connections from before get errors until they
//! end, for a flush on one of them must not pass ([`Shared::life`]). Damage stops the group for good, with file and offset in its status.
//!
//! **Limits.** What is queued is bounded by its producers, see [`Inbox`]; `waiters` and `reads` hold at most what those have
//! unanswered.
//!
//! [`Group::here`]: super::Group::here

mod append;
mod clients;
mod ears;
mod pace;
mod source;

use super::{
    Command, Counters, Group, GroupError, Marked, Phase, Shared,
    compare::ComparePool,
    group::Live,
    inbox::{Inbox, Wait},
    jobs::JobPool,
};
use crate::{
    catalog::Catalog,
    clock::Clock,
    events::{Event, Events},
    exports::{driver::Op, lane::Lane, pool::ReadPool},
    links::lane::{Inbound, LinkLane},
    outbox::Outbox,
};
use durable::Disk;
use ears::Ears;
use journal::{
    AppendError, BranchPoint, Journal, JournalOptions, JournalReader, OpenError, Progress, RecoveryReport,
    ResolvedPoint,
};
use model::{HistoryTime, Lsn, Mark, MonoTime, SourceSeq, StreamId};
use nbd::Errno;
use pace::Pace;
use replication::{Target, TargetAction, TargetEvent};
use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Notify, oneshot},
};
use wire::{FrameHeader, Message, Refusal, RefuseCode};

/// With nothing to do, the thread looks at retention and rates this often.
const TICK_MS: u64 = 1000;
/// With an agent connected, acks and silence are looked at this often.
const LINK_TICK_MS: u64 = 100;
/// Nobody tells of ended writes, and nobody waits for one: completions are looked at this often.
const GATHER: Duration = Duration::from_micros(500);
/// Jobs that may end without making room before a record that does not fit means "full". Several, because one prepares, one folds, one
/// deletes.
const JOBS_BEFORE_FULL: u32 = 4;
/// How long a record that does not fit waits for the groups to share out their room anew before the answer is "full".
const BALANCE_MS_MAX: u64 = 5_000;
/// After so much was appended, jobs are looked for without waiting for the next tick: segments must be prepared ahead of a fast writer.
const JOBS_EVERY_BYTES: u64 = 8 << 20;
/// Connections served before the journal has its turn: more than a box takes, so all that are ready.
const READY_MAX: u32 = 256;
/// How often a branch looks whether the group it goes on from is open.
const TRUNK_MS: u64 = 50;
/// Waits before a stopped group is tried again.
const RETRY_MS: [u64; 5] = [500, 2_000, 5_000, 15_000, 30_000];

/// What a journal thread works with.
pub struct Context {
    pub disk: Arc<dyn Disk>,
    /// The group's folder, relative to the disk.
    pub dir: PathBuf,
    pub options: JournalOptions,
    pub clock: Clock,
    pub events: Arc<Events>,
    pub jobs: Arc<JobPool>,
    pub reads: Arc<ReadPool>,
    pub compares: Arc<ComparePool>,
    /// Told when a record does not fit: who has to give up history is decided for all groups together.
    pub room_wanted: Arc<Notify>,
    pub catalog: Arc<Catalog>,
    /// The group whose journal a branch goes on from, and where.
    pub trunk: Option<(Arc<Group>, BranchPoint)>,
}

/// What the thread's connections and its waiting run on.
pub fn runtime() -> io::Result<Runtime> {
    // All sockets that are ready are read before the journal's turn: one batch for all of them.
    Builder::new_current_thread().enable_io().enable_time().event_interval(READY_MAX).build()
}

/// Runs a group until it is closed. `made`: its journal, if it was only just made.
pub fn run(
    runtime: &Runtime,
    context: &Context,
    shared: &Arc<Shared>,
    inbox: &Arc<Inbox<Command>>,
    made: Option<Journal>,
) {
    runtime.block_on(live(context, shared, inbox, made));
    shared.set_phase(Phase::Closed);
    inbox.close();
    let mut left = VecDeque::new();
    inbox.take(&mut left, Wait::No);
    left.into_iter().for_each(|command| refuse(command, "the group is closed"));
    // Connections that were woken for their last answers send them.
    runtime.block_on(tokio::task::yield_now());
}

async fn live(context: &Context, shared: &Arc<Shared>, inbox: &Arc<Inbox<Command>>, mut made: Option<Journal>) {
    let mut failures = 0;
    loop {
        shared.set_phase(Phase::Opening);
        let now = context.clock.history();
        let opened = match made.take() {
            Some(journal) => Ok((journal, RecoveryReport::default())),
            None => match open(context, now) {
                Ok(opened) => opened,
                Err(NoTrunk::Wait) => {
                    if !refuse_until(context, inbox, "the group it goes on from is being opened", Some(TRUNK_MS)).await
                    {
                        return;
                    }
                    continue;
                }
                Err(NoTrunk::Broken(reason)) => {
                    if !stop(context, shared, inbox, reason, false, &mut failures).await {
                        return;
                    }
                    continue;
                }
            },
        };
        let (reason, damaged) = match opened {
            Ok((mut journal, report)) => {
                settle(context, shared, &mut journal);
                note_opened(context, shared, &report, failures);
                shared.change_live(|live| *live = Live { recovery: Some(report), ..Live::default() });
                match Writer::new(context, shared, inbox, journal).run_guarded().await {
                    End::Closed => return,
                    End::Failed(reason) => (reason, false),
                }
            }
            Err(e) => (crate::chain(&e), is_damage(&e)),
        };
        if !stop(context, shared, inbox, reason, damaged, &mut failures).await {
            return;
        }
    }
}

/// The group takes nothing until it is tried again; false when it is closed meanwhile.
async fn stop(
    context: &Context,
    shared: &Shared,
    inbox: &Inbox<Command>,
    reason: String,
    damaged: bool,
    failures: &mut usize,
) -> bool {
    context.events.note(Event::GroupStopped, &shared.name, &reason);
    let since_us = context.clock.wall_us();
    shared.end_life();
    shared.set_phase(Phase::Stopped { reason: reason.clone(), damaged, since_us });
    shared.change_live(|live| *live = Live { recovery: live.recovery.take(), ..Live::default() });
    let retry_ms = (!damaged).then(|| RETRY_MS[(*failures).min(RETRY_MS.len() - 1)]);
    *failures += 1;
    refuse_until(context, inbox, &reason, retry_ms).await
}

/// Why a branch cannot be opened now.
enum NoTrunk {
    /// The group it goes on from is being opened.
    Wait,
    Broken(String),
}

type Opened = Result<(Journal, RecoveryReport), OpenError>;

/// Opens the group's journal; a branch on a view of the moment it goes on from.
fn open(context: &Context, now: HistoryTime) -> Result<Opened, NoTrunk> {
    let (disk, dir, options) = (Arc::clone(&context.disk), &context.dir, context.options.clone());
    let Some((trunk, point)) = &context.trunk else { return Ok(Journal::open(disk, dir, options, now)) };
    let life = trunk.shared.life();
    let broken = |e: &dyn std::error::Error| {
        NoTrunk::Broken(format!("the moment of {:?} it goes on from: {}", trunk.name(), crate::chain(e)))
    };
    let reader = match trunk.reader() {
        Ok(reader) => reader,
        Err(GroupError::Opening) => return Err(NoTrunk::Wait),
        Err(e) => return Err(broken(&e)),
    };
    let at = ResolvedPoint { timeline: point.timeline, lsn: point.lsn, time: HistoryTime::default() };
    let on = match reader.view(at).map(|view| trunk.keep_view(life, view)) {
        Ok(Ok(on)) => on,
        Ok(Err(_)) => return Err(NoTrunk::Wait),
        Err(e) => return Err(broken(&e)),
    };
    Ok(Journal::open_branch(disk, dir, options, now, on))
}

/// Before any job of a journal that was just opened: what others need of it.
fn settle(context: &Context, shared: &Shared, journal: &mut Journal) {
    let reader = journal.reader();
    for e in shared.move_views(&reader) {
        context.events.note(
            Event::ViewDamaged,
            &shared.name,
            format!("after the journal was opened again: {}", crate::chain(&e)),
        );
    }
    // A crash in the middle of making or deleting a branch leaves its moment held.
    let known = context.catalog.data();
    for (branch, ..) in reader.branches() {
        if known.group(branch).is_none()
            && let Err(e) = journal.release_hold(branch)
        {
            context.events.note(Event::JobFailed, &shared.name, crate::chain(&e));
        }
    }
}

fn note_opened(context: &Context, shared: &Shared, report: &RecoveryReport, failures: usize) {
    let event = if failures > 0 { Event::GroupReopened } else { Event::GroupOpened };
    let text = format!("LSN {} to {} in {} segments", report.first_lsn, report.last_lsn, report.segments);
    context.events.note(event, &shared.name, text);
    if let Some(fault) = &report.control_fault {
        context.events.note(Event::CopyDamaged, &shared.name, format!("the journal's control file: {fault}"));
    }
    for cut in &report.cut {
        let text = format!(
            "{}: {} records in {} after LSN {} were not acknowledged and are cut",
            cut.file.display(),
            cut.records,
            cut.bytes,
            cut.after
        );
        context.events.note(Event::GroupRecovered, &shared.name, text);
    }
}

/// Whether trying again cannot help.
fn is_damage(e: &OpenError) -> bool {
    !matches!(e, OpenError::Disk(_) | OpenError::Control(journal::ControlError::Disk(_)))
}

/// Answers everything with the reason until it is time to try again (true) or the group is closed (false).
async fn refuse_until(context: &Context, inbox: &Inbox<Command>, reason: &str, retry_ms: Option<u64>) -> bool {
    let from = context.clock.mono();
    let text = format!("the group is stopped: {reason}");
    let mut queue = VecDeque::new();
    let mut ears = Ears::new();
    loop {
        let waited = context.clock.mono().ms_since(from);
        let left = match retry_ms {
            Some(ms) if waited >= ms => return true,
            Some(ms) => ms - waited,
            None => 60_000,
        };
        ears.wait(inbox, Duration::from_millis(left)).await;
        inbox.take(&mut queue, Wait::No);
        for command in queue.drain(..) {
            if matches!(command, Command::Close) {
                return false;
            }
            refuse(command, &text);
        }
    }
}

/// Tells whoever sent `command` that it cannot be carried out.
fn refuse(command: Command, text: &str) {
    let stopped = || GroupError::Stopped { reason: text.to_owned() };
    match command {
        Command::Nbd { lane, ops } => {
            ops.iter().for_each(|op| lane.fail(&op.request, Errno::Io, text));
            lane.wake();
        }
        Command::Frames { link, cost, .. } => {
            link.outbox.put(cost, |_| {});
            link.say(&Message::refuse(RefuseCode::Stopped, text));
            link.outbox.close();
        }
        Command::Attach { reply, .. } => {
            let _ = reply.send(Err(Refusal { code: RefuseCode::Stopped, text: text.to_owned() }));
        }
        Command::Mark { reply, .. } => {
            let _ = reply.send(Err(stopped()));
        }
        Command::Barrier { reply }
        | Command::SetSpec { reply, .. }
        | Command::ReleaseBookmark { reply, .. }
        | Command::Hold { reply, .. }
        | Command::ReleaseHold { reply, .. } => {
            let _ = reply.send(Err(stopped()));
        }
        Command::Detach { .. }
        | Command::Compared { .. }
        | Command::MustFree { .. }
        | Command::Share { .. }
        | Command::JobDone(_)
        | Command::JobPanicked { .. }
        | Command::Close => {}
    }
}

enum End {
    Closed,
    Failed(String),
}

/// Work in the order it came; at most its first piece is half done.
enum Work {
    Ops {
        lane: Arc<Lane>,
        ops: std::vec::IntoIter<Op>,
    },
    /// A write of which `done` bytes are appended.
    Write {
        lane: Arc<Lane>,
        op: Op,
        done: usize,
    },
    Frames {
        link: Arc<LinkLane>,
        frames: std::vec::IntoIter<Inbound>,
        cost: usize,
    },
    /// A record the target has accepted.
    Record {
        link: Arc<LinkLane>,
        header: FrameHeader,
        payload: bytes::Bytes,
        time: HistoryTime,
    },
    SourceMark {
        link: Arc<LinkLane>,
        mark: Mark,
        time: HistoryTime,
        seq: SourceSeq,
    },
    Mark {
        mark: Mark,
        reply: oneshot::Sender<Result<Marked, GroupError>>,
    },
}

impl Work {
    fn outbox(&self) -> Option<&Arc<Outbox>> {
        match self {
            Self::Ops { lane, .. } | Self::Write { lane, .. } => Some(&lane.outbox),
            Self::Frames { link, .. } | Self::Record { link, .. } | Self::SourceMark { link, .. } => Some(&link.outbox),
            Self::Mark { .. } => None,
        }
    }
}

/// What became of a piece of work.
enum Step {
    Done,
    /// There is more of it.
    Again(Work),
    /// It does not fit; it stays first in line.
    Held(Work),
}

/// Somebody who is told when `lsn` is durable.
struct Waiter {
    lsn: Lsn,
    who: Who,
}

enum Who {
    Client {
        lane: Arc<Lane>,
        op: Op,
    },
    Mark {
        time: HistoryTime,
        reply: oneshot::Sender<Result<Marked, GroupError>>,
    },
    Barrier {
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    /// The agent's source, by way of the target.
    Source,
}

/// A read of an ingest target that must see everything up to `lsn`.
struct Reading {
    lsn: Lsn,
    lane: Arc<Lane>,
    op: Op,
}

/// Why a record was not appended.
enum Refused {
    NoRoom(String),
    /// This record, and no other, cannot be taken.
    Record(AppendError),
    /// The journal takes nothing any more.
    Failed(String),
}

struct Attached {
    lane: Arc<LinkLane>,
    stream: StreamId,
    target: Target,
}

/// A piece of work that waits for room.
#[derive(Clone, Copy)]
struct Held {
    /// Jobs that have ended since without making room.
    jobs: u32,
    /// One has ended since it was tried last.
    due: bool,
    tried: MonoTime,
    /// Since when it waits.
    since: MonoTime,
    /// The groups of the box have shared out their room since.
    balanced: bool,
}

impl Held {
    fn at(now: MonoTime) -> Self {
        Self { jobs: 0, due: false, tried: now, since: now, balanced: false }
    }
}

struct Writer<'a> {
    context: &'a Context,
    shared: &'a Arc<Shared>,
    inbox: &'a Arc<Inbox<Command>>,
    ears: Ears,
    pace: Pace,
    journal: Journal,
    reader: JournalReader,
    queue: VecDeque<Command>,
    pending: VecDeque<Work>,
    waiters: VecDeque<Waiter>,
    reads: VecDeque<Reading>,
    /// Comparisons of the connection that wait for everything before them to be durable.
    compares: VecDeque<(Lsn, wire::Comparison)>,
    /// Outboxes with answers whose tasks are not woken yet.
    touched: Vec<Arc<Outbox>>,
    /// Of the connection whose work is in hand.
    current: Option<Arc<Outbox>>,
    link: Option<Attached>,
    actions: Vec<TargetAction>,
    jobs_running: usize,
    appended_since_jobs: u64,
    /// Set while the head of `pending` does not fit.
    held: Option<Held>,
    full: bool,
    ticked: MonoTime,
    rated: (MonoTime, u64, u64),
    closing: bool,
    failed: Option<String>,
}

impl<'a> Writer<'a> {
    fn new(
        context: &'a Context,
        shared: &'a Arc<Shared>,
        inbox: &'a Arc<Inbox<Command>>,
        mut journal: Journal,
    ) -> Self {
        let now = context.clock.mono();
        let reader = journal.reader();
        shared.set_spec(journal.spec().clone());
        // Until the box says otherwise, others' needs are not its own: what the disk lacks is shared out by priority.
        journal.set_must_free(Some(0));
        Self {
            context,
            shared,
            inbox,
            ears: Ears::new(),
            pace: Pace::default(),
            reader,
            journal,
            queue: VecDeque::new(),
            pending: VecDeque::new(),
            waiters: VecDeque::new(),
            reads: VecDeque::new(),
            compares: VecDeque::new(),
            touched: Vec::new(),
            current: None,
            link: None,
            actions: Vec::new(),
            jobs_running: 0,
            appended_since_jobs: 0,
            held: None,
            full: false,
            ticked: now,
            rated: (now, Counters::get(&shared.counters.bytes), Counters::get(&shared.counters.records)),
            closing: false,
            failed: None,
        }
    }

    /// Runs; a panic, which is a defect here or below, fails the group as a failed write does: it is opened again.
    async fn run_guarded(mut self) -> End {
        let mut sound = guarded(|| self.begin());
        while sound && self.failed.is_none() && !(self.closing && self.pending.is_empty()) {
            match self.rest() {
                Some(limit) => self.ears.wait(self.inbox, limit).await,
                // The connections have theirs.
                None => tokio::task::yield_now().await,
            }
            sound = guarded(|| self.turn());
        }
        if !sound {
            self.failed = Some("the group's thread panicked; the log says where".into());
            // What it held at that moment cannot be answered any more: that connection ends.
            if let Some(outbox) = self.current.take() {
                outbox.close();
            }
        }
        match catch_unwind(AssertUnwindSafe(|| self.end())) {
            Ok(End::Closed) if self.failed.is_none() => {
                if let Err(e) = self.journal.close() {
                    self.context.events.note(Event::GroupStopped, &self.shared.name, crate::chain(&e));
                }
                End::Closed
            }
            Ok(end) => end,
            Err(_) => End::Failed("the group's thread panicked twice; the log says where".into()),
        }
    }

    fn begin(&mut self) {
        self.begin_if_new();
        self.start_jobs();
        self.publish();
        if self.failed.is_none() {
            self.shared.set_phase(Phase::Running(self.reader.clone()));
        }
    }

    /// An ingest group is valid from its first LSN on: an empty disk is a consistent one.
    fn begin_if_new(&mut self) {
        if self.shared.host.is_none() && self.journal.in_gap().is_some() {
            match self.append_mark(
                &Mark::Consistent,
                self.context.clock.history(),
                StreamId::default(),
                SourceSeq::ZERO,
            ) {
                Ok(_) => self.settle(),
                Err(Refused::NoRoom(text) | Refused::Failed(text)) => self.failed = Some(text),
                Err(Refused::Record(e)) => self.failed = Some(crate::chain(&e)),
            }
        }
    }

    fn turn(&mut self) {
        self.inbox.take(&mut self.queue, Wait::No);
        while let Some(command) = self.queue.pop_front() {
            self.command(command);
        }
        self.drain();
        // What has ended makes room for what is sent.
        self.collect(false);
        self.submit();
        self.wake();
        self.ears.follow(&self.journal);
        if self.ears.deaf() {
            // Whoever needs a completion waits for one, unless there is more to submit first.
            let progress = self.journal.progress();
            self.collect(self.wanted(&progress) && progress.in_flight > 0 && self.inbox.is_empty());
            self.submit();
            self.wake();
        }
        self.tick();
        self.publish();
    }

    /// Whether somebody waits for what is not there yet.
    fn wanted(&self, progress: &Progress) -> bool {
        !self.waiters.is_empty()
            || !self.compares.is_empty()
            || self.reads.front().is_some_and(|r| r.lsn > progress.written)
            || self.closing
    }

    /// How long there is nothing to do unless something comes; none: there is something.
    fn rest(&self) -> Option<Duration> {
        let progress = self.journal.progress();
        let deaf = self.ears.deaf() && progress.in_flight > 0;
        let ready = !self.pending.is_empty() && self.held.is_none_or(|h| h.due);
        if ready || self.closing || (deaf && self.wanted(&progress)) {
            return None;
        }
        if deaf {
            return Some(GATHER);
        }
        let every = if self.link.is_some() { LINK_TICK_MS } else { TICK_MS };
        let since = self.context.clock.mono().ms_since(self.ticked);
        Some(Duration::from_millis(every.saturating_sub(since).max(1)))
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Nbd { lane, ops } if lane.life != self.shared.life() => {
                lane.refuse_lost(ops.iter().map(|op| op.request));
            }
            Command::Nbd { lane, ops } => self.pending.push_back(Work::Ops { lane, ops: ops.into_iter() }),
            Command::Frames { link, frames, cost } => {
                self.pending.push_back(Work::Frames { link, frames: frames.into_iter(), cost });
            }
            Command::Attach { link, open, reply } => {
                let answer = self.attach(link, &open);
                let _ = reply.send(answer);
            }
            Command::Detach { link } => {
                if self.link.as_ref().is_some_and(|l| l.lane.id == link) {
                    self.drop_link();
                }
            }
            Command::Compared { link, id, differ } => {
                if self.link.as_ref().is_some_and(|l| l.lane.id == link) {
                    self.target_event(TargetEvent::Compared { id, differ }, None);
                }
            }
            Command::Mark { mark, reply } => self.pending.push_back(Work::Mark { mark, reply }),
            Command::Barrier { reply } => {
                let progress = self.journal.progress();
                if progress.durable >= progress.appended {
                    let _ = reply.send(Ok(()));
                } else {
                    self.waiters.push_back(Waiter { lsn: progress.appended, who: Who::Barrier { reply } });
                }
            }
            Command::SetSpec { spec, reply } => {
                let result = self.journal.set_spec(*spec).map_err(GroupError::Control);
                if result.is_ok() {
                    self.shared.set_spec(self.journal.spec().clone());
                    self.start_jobs();
                }
                let _ = reply.send(result);
            }
            Command::ReleaseBookmark { name, reply } => {
                let result = self.journal.release_bookmark(&name).map_err(GroupError::Bookmark);
                let _ = reply.send(result);
                self.start_jobs();
            }
            Command::Hold { for_group, at, reply } => {
                let _ = reply.send(self.journal.hold(for_group, at).map_err(GroupError::Hold));
            }
            Command::ReleaseHold { for_group, reply } => {
                let _ = reply.send(self.journal.release_hold(for_group).map_err(GroupError::Hold));
                self.start_jobs();
            }
            Command::MustFree { bytes } => {
                self.journal.set_must_free(bytes);
                self.start_jobs();
                if let Some(held) = &mut self.held {
                    held.balanced = true;
                    held.due = true;
                }
            }
            Command::Share { reply } => {
                let _ = reply.send(self.journal.share(self.context.clock.history()));
            }
            Command::JobDone(done) => {
                self.jobs_running = self.jobs_running.saturating_sub(1);
                self.job_done(*done);
            }
            Command::JobPanicked { what } => {
                self.jobs_running = self.jobs_running.saturating_sub(1);
                self.failed = Some(format!("{what} panicked; the group is opened again"));
            }
            Command::Close => {
                self.closing = true;
                // Or its source would go on sending, and this would never end.
                if let Some(link) = &self.link {
                    link.lane.say(&Message::refuse(RefuseCode::ShuttingDown, "the group is closed"));
                }
                self.drop_link();
            }
        }
    }

    // ---- the queue

    /// Appends what is pending, in order, until something does not fit.
    fn drain(&mut self) {
        if let Some(held) = self.held
            && !held.due
            && !self.closing
            && self.context.clock.mono().ms_since(held.tried) < TICK_MS
        {
            return;
        }
        while self.failed.is_none()
            && let Some(work) = self.pending.pop_front()
        {
            match self.step(work) {
                Step::Done => {}
                Step::Again(work) => self.pending.push_front(work),
                Step::Held(work) => {
                    self.pending.push_front(work);
                    break;
                }
            }
        }
        if self.closing && self.held.is_some() {
            // Nobody waits for room at the end: what was not appended was not acknowledged.
            self.pending.drain(..).for_each(|work| fail_work(work, "the box is shutting down"));
        }
    }

    fn step(&mut self, work: Work) -> Step {
        if let Some(outbox) = work.outbox()
            && !self.current.as_ref().is_some_and(|c| Arc::ptr_eq(c, outbox))
        {
            self.current = Some(Arc::clone(outbox));
        }
        match work {
            Work::Ops { lane, mut ops } => {
                let Some(op) = ops.next() else { return Step::Done };
                match self.op(&lane, op) {
                    Step::Held(held) | Step::Again(held) => {
                        self.pending.push_front(Work::Ops { lane, ops });
                        Step::Held(held)
                    }
                    Step::Done => Step::Again(Work::Ops { lane, ops }),
                }
            }
            Work::Write { lane, op, done } => self.write(lane, op, done),
            Work::Frames { link, mut frames, cost } => match frames.next() {
                // What an ended connection still had in its buffers must not be appended any more.
                Some(frame) if self.is_current(&link) => {
                    self.pending.push_front(Work::Frames { link: Arc::clone(&link), frames, cost });
                    self.frame(&link, frame);
                    Step::Done
                }
                _ => {
                    link.outbox.put(cost, |_| {});
                    self.touch(&link.outbox);
                    Step::Done
                }
            },
            Work::Record { link, header, payload, time } => self.record(link, header, payload, time),
            Work::SourceMark { link, mark, time, seq } => self.source_mark(link, mark, time, seq),
            Work::Mark { mark, reply } => self.mark(mark, reply),
        }
    }

    // ---- marks of the box's own

    fn mark(&mut self, mark: Mark, reply: oneshot::Sender<Result<Marked, GroupError>>) -> Step {
        let time = self.context.clock.history();
        match self.append_mark(&mark, time, StreamId::default(), SourceSeq::ZERO) {
            Ok(lsn) => self.waiters.push_back(Waiter { lsn, who: Who::Mark { time, reply } }),
            Err(Refused::NoRoom(reason)) => {
                if self.hold(&reason) {
                    return Step::Held(Work::Mark { mark, reply });
                }
                let _ = reply.send(Err(GroupError::Full { reason }));
            }
            Err(Refused::Record(e)) => {
                let _ = reply.send(Err(GroupError::Append(e)));
            }
            Err(Refused::Failed(reason)) => {
                let _ = reply.send(Err(GroupError::Stopped { reason: reason.clone() }));
                self.failed = Some(reason);
            }
        }
        Step::Done
    }

    // ---- housekeeping

    fn touch(&mut self, outbox: &Arc<Outbox>) {
        if !self.touched.iter().any(|o| Arc::ptr_eq(o, outbox)) {
            self.touched.push(Arc::clone(outbox));
        }
    }
    fn wake(&mut self) {
        self.touched.drain(..).for_each(|outbox| outbox.wake());
    }

    fn tick(&mut self) {
        let now = self.context.clock.mono();
        let every = if self.link.is_some() { LINK_TICK_MS } else { TICK_MS };
        if now.ms_since(self.ticked) < every {
            return;
        }
        self.ticked = now;
        self.target_event(TargetEvent::Tick, None);
        self.wake();
        let (since, bytes, records) = self.rated;
        let ms = now.ms_since(since);
        if ms >= TICK_MS {
            let counters = &self.shared.counters;
            let (b, r) = (Counters::get(&counters.bytes), Counters::get(&counters.records));
            let per_s = |n: u64| n as f64 * 1000.0 / ms as f64;
            let (rate_b, rate_r) = (per_s(b - bytes), per_s(r - records));
            // Half of what it was each second: steady enough to read, quick enough to be true.
            self.shared.change_live(|live| {
                live.write_rate_bytes = (live.write_rate_bytes + rate_b) / 2.0;
                live.write_rate_ops = (live.write_rate_ops + rate_r) / 2.0;
            });
            self.rated = (now, b, r);
            self.start_jobs();
        }
    }

    fn publish(&self) {
        let (progress, gap) = (self.journal.progress(), self.journal.in_gap());
        self.shared.change_live(|live| (live.progress, live.gap) = (progress, gap));
    }

    /// Ends the thread's work: everything durable if it can be, everybody told, no job left running.
    fn end(&mut self) -> End {
        if self.failed.is_none() {
            self.settle();
        }
        let reason = self.failed.clone();
        let text = reason.as_deref().unwrap_or("the box is shutting down");
        for work in self.pending.drain(..) {
            fail_work(work, text);
        }
        for waiter in self.waiters.drain(..) {
            match waiter.who {
                Who::Client { lane, op } => {
                    lane.fail(&op.request, Errno::Io, text);
                    lane.wake();
                }
                Who::Mark { reply, .. } => {
                    let _ = reply.send(Err(GroupError::Stopped { reason: text.to_owned() }));
                }
                Who::Barrier { reply } => {
                    let _ = reply.send(Err(GroupError::Stopped { reason: text.to_owned() }));
                }
                Who::Source => {}
            }
        }
        for reading in self.reads.drain(..) {
            reading.lane.fail(&reading.op.request, Errno::Io, text);
            reading.lane.wake();
        }
        if let Some(link) = &self.link {
            let code = if reason.is_some() { RefuseCode::Stopped } else { RefuseCode::ShuttingDown };
            link.lane.say(&Message::refuse(code, text));
        }
        self.drop_link();
        self.wake();
        // A job works on the journal's files: the next opening must not meet it. What was taken from the inbox and not looked at may
        // hold its end.
        let mut queue = std::mem::take(&mut self.queue);
        loop {
            for command in queue.drain(..) {
                match command {
                    Command::JobDone(done) => {
                        self.jobs_running -= 1;
                        if let Err(e) = self.journal.job_done(*done) {
                            self.context.events.note(Event::JobFailed, &self.shared.name, crate::chain(&e));
                        }
                    }
                    Command::JobPanicked { .. } => self.jobs_running -= 1,
                    Command::Close => self.closing = true,
                    other => refuse(other, text),
                }
            }
            if self.jobs_running == 0 {
                break;
            }
            self.inbox.take(&mut queue, Wait::AtMost(Duration::from_millis(TICK_MS)));
        }
        match reason {
            Some(reason) if !self.closing => End::Failed(reason),
            Some(_) => End::Closed,
            None => End::Closed,
        }
    }
}

/// Whether it came to its end without a panic.
fn guarded(act: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(act)).is_ok()
}

fn fail_work(work: Work, text: &str) {
    match work {
        Work::Ops { lane, ops } => {
            ops.for_each(|op| lane.fail(&op.request, Errno::Io, text));
            lane.wake();
        }
        Work::Write { lane, op, .. } => {
            lane.fail(&op.request, Errno::Io, text);
            lane.wake();
        }
        Work::Frames { link, cost, .. } => link.outbox.put(cost, |_| {}),
        Work::Record { .. } | Work::SourceMark { .. } => {}
        Work::Mark { reply, .. } => {
            let _ = reply.send(Err(GroupError::Stopped { reason: text.to_owned() }));
        }
    }
}
