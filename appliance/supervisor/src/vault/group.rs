//! A group as the rest of the daemon sees it: a way to send its journal thread commands, and what the thread last said of itself.

use super::inbox::{Closed, Inbox};
use crate::{
    exports::{driver::Op, lane::Lane},
    links::lane::{Inbound, LinkLane},
};
use journal::{
    BranchPoint, JobDone, JournalReader, OpenViewError, Progress, RecoveryReport, ResolvedPoint, View, ViewHandle,
};
use model::{BookmarkName, GapReason, GroupId, GroupSpec, HistoryTime, HostId, Lsn, Mark, MonoTime, VolumeSpec};
use replication::OpenFacts;
use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use tokio::{runtime::Handle, sync::oneshot};
use wire::Refusal;

/// What a journal thread can be told.
pub enum Command {
    /// Requests of an NBD client of an ingest target. Answered into the lane.
    Nbd {
        lane: Arc<Lane>,
        ops: Vec<Op>,
    },
    /// What came on an agent's stream connection.
    Frames {
        link: Arc<LinkLane>,
        frames: Vec<Inbound>,
        cost: usize,
    },
    /// A stream connection opens; on success `StreamReady` is in its outbox.
    Attach {
        link: Arc<LinkLane>,
        open: StreamOpening,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// A stream connection has ended.
    Detach {
        link: u64,
    },
    /// What a comparison found, for the connection that asked.
    Compared {
        link: u64,
        id: u64,
        differ: Vec<u8>,
    },
    /// A mark of the box's own (ingest groups only); answered when it is durable.
    Mark {
        mark: Mark,
        reply: oneshot::Sender<Result<Marked, GroupError>>,
    },
    /// Answered when everything appended so far is durable.
    Barrier {
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    SetSpec {
        spec: Box<GroupSpec>,
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    ReleaseBookmark {
        name: BookmarkName,
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    /// Keep a moment for another group's journal that goes on from it.
    Hold {
        for_group: GroupId,
        at: ResolvedPoint,
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    /// Let go of what was kept for that group.
    ReleaseHold {
        for_group: GroupId,
        reply: oneshot::Sender<Result<(), GroupError>>,
    },
    /// What the group must free for the others on the disk; none: it is alone.
    MustFree {
        bytes: Option<u64>,
    },
    /// What the group could free.
    Share {
        reply: std::sync::mpsc::SyncSender<journal::Share>,
    },
    JobDone(Box<JobDone>),
    JobPanicked {
        what: &'static str,
    },
    /// Make everything durable and end the thread.
    Close,
}

/// The facts of `OpenStream`.
pub struct StreamOpening {
    pub facts: OpenFacts,
    pub volumes: Vec<VolumeSpec>,
    pub mono: MonoTime,
    pub silence_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marked {
    pub lsn: Lsn,
    pub time: HistoryTime,
}

/// Why a group did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error("the group is stopped: {reason}")]
    Stopped { reason: String },
    #[error("the group is being opened")]
    Opening,
    #[error("the group is closed")]
    Closed,
    #[error("the journal is full: {reason}")]
    Full { reason: String },
    #[error("the journal refused it")]
    Append(#[source] journal::AppendError),
    #[error("the bookmark cannot be taken back")]
    Bookmark(#[source] journal::BookmarkError),
    #[error("the group's description was not kept")]
    Control(#[source] journal::ControlError),
    #[error("the moment cannot be kept for a branch")]
    Hold(#[source] journal::HoldError),
}

/// What the group is doing.
#[derive(Clone)]
pub enum Phase {
    /// Recovery is running.
    Opening,
    Running(JournalReader),
    /// Nothing is taken. `damaged`: it stays so until somebody acts; else it is tried again.
    Stopped {
        reason: String,
        damaged: bool,
        since_us: u64,
    },
    Closed,
}

/// The stream connection, as far as status needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkInfo {
    pub id: u64,
    pub since_us: u64,
}

/// What the journal thread last said.
#[derive(Clone, Debug, Default)]
pub struct Live {
    pub progress: Progress,
    /// No points at the end, since when and why.
    pub gap: Option<(Lsn, GapReason)>,
    pub link: Option<LinkInfo>,
    /// When the last stream connection ended.
    pub link_lost_us: Option<u64>,
    /// Every write of the host up to this time is durable here.
    pub proven: Option<HistoryTime>,
    /// Why nothing more is taken.
    pub full: Option<String>,
    pub write_rate_bytes: f64,
    pub write_rate_ops: f64,
    pub recovery: Option<RecoveryReport>,
}

/// Counters for `/metrics`; they only grow.
#[derive(Default)]
pub struct Counters {
    pub bytes: AtomicU64,
    pub records: AtomicU64,
    pub batches: AtomicU64,
    pub flushes: AtomicU64,
    pub refused_full: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// Shared by the handle and the thread.
pub struct Shared {
    pub id: GroupId,
    pub name: String,
    pub host: Option<HostId>,
    pub counters: Counters,
    /// The host stopped protecting it.
    pub released: AtomicBool,
    /// The moment of another group's journal this one goes on from.
    pub branch: Option<BranchPoint>,
    /// Views of this journal that must outlive a failure of it.
    views: Mutex<Vec<Weak<ViewHandle>>>,
    /// How often the journal has failed since the daemon started: see [`Shared::life`].
    life: AtomicU64,
    phase: Mutex<Phase>,
    live: Mutex<Live>,
    spec: Mutex<GroupSpec>,
}

impl Shared {
    pub fn new(spec: GroupSpec, released: bool, branch: Option<BranchPoint>) -> Self {
        Self {
            id: spec.id,
            name: spec.name.clone(),
            host: spec.host,
            counters: Counters::default(),
            released: AtomicBool::new(released),
            branch,
            views: Mutex::default(),
            life: AtomicU64::new(0),
            phase: Mutex::new(Phase::Opening),
            live: Mutex::default(),
            spec: Mutex::new(spec),
        }
    }
    /// Which life of the journal this is. When it fails, writes that were answered and not yet flushed may be lost; a connection of an
    /// earlier life must not be told that a later flush made them durable.
    pub fn life(&self) -> u64 {
        self.life.load(Ordering::Acquire)
    }
    pub(super) fn end_life(&self) {
        self.life.fetch_add(1, Ordering::AcqRel);
    }
    /// Has every view of an earlier life read the journal as it was opened again. Before any job of it runs: until then nothing holds
    /// back in it what they need.
    pub(super) fn move_views(&self, reader: &JournalReader) -> Vec<OpenViewError> {
        let mut views = crate::lock(&self.views);
        views.retain(|view| view.strong_count() > 0);
        views.iter().filter_map(Weak::upgrade).filter_map(|view| view.move_to(reader).err()).collect()
    }
    pub fn phase(&self) -> Phase {
        crate::lock(&self.phase).clone()
    }
    pub fn set_phase(&self, phase: Phase) {
        *crate::lock(&self.phase) = phase;
    }
    pub fn live(&self) -> Live {
        crate::lock(&self.live).clone()
    }
    pub fn change_live(&self, change: impl FnOnce(&mut Live)) {
        change(&mut crate::lock(&self.live));
    }
    /// As the journal says; before it was opened, only name, host and id are right.
    pub fn spec(&self) -> GroupSpec {
        crate::lock(&self.spec).clone()
    }
    pub fn set_spec(&self, spec: GroupSpec) {
        *crate::lock(&self.spec) = spec;
    }
}

/// A handle to a group's journal thread.
pub struct Group {
    pub shared: Arc<Shared>,
    pub(super) inbox: Arc<Inbox<Command>>,
    /// What runs on the journal's own thread beside it.
    pub(super) here: Handle,
    pub(super) thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Group {
    pub fn id(&self) -> GroupId {
        self.shared.id
    }
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The reader of a running group, or why there is none.
    pub fn reader(&self) -> Result<JournalReader, GroupError> {
        match self.shared.phase() {
            Phase::Running(reader) => Ok(reader),
            Phase::Opening => Err(GroupError::Opening),
            Phase::Stopped { reason, .. } => Err(GroupError::Stopped { reason }),
            Phase::Closed => Err(GroupError::Closed),
        }
    }

    /// The journal's own thread, for the sockets of its NBD clients: a request that is read there is appended, sent to the disk and
    /// answered without changing threads. What runs there must not block, and ends with the thread.
    pub fn here(&self) -> &Handle {
        &self.here
    }

    /// Sends a command; a closed group gives it back.
    pub fn push(&self, command: Command) -> Result<(), Closed<Command>> {
        self.inbox.push(command)
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, GroupError>>) -> Command,
    ) -> Result<T, GroupError> {
        let (reply, answer) = oneshot::channel();
        self.push(command(reply)).map_err(|_| GroupError::Closed)?;
        // A thread that ends drops what it was asked.
        answer.await.unwrap_or(Err(GroupError::Closed))
    }
    pub async fn mark(&self, mark: Mark) -> Result<Marked, GroupError> {
        self.ask(|reply| Command::Mark { mark, reply }).await
    }
    /// Waits until everything appended so far is durable, and so readable.
    pub async fn barrier(&self) -> Result<(), GroupError> {
        self.ask(|reply| Command::Barrier { reply }).await
    }
    pub async fn replace_spec(&self, spec: GroupSpec) -> Result<(), GroupError> {
        self.ask(|reply| Command::SetSpec { spec: Box::new(spec), reply }).await
    }
    pub async fn release_bookmark(&self, name: BookmarkName) -> Result<(), GroupError> {
        self.ask(|reply| Command::ReleaseBookmark { name, reply }).await
    }
    /// Opens a stream; on success `StreamReady` is in the lane's outbox.
    pub async fn attach(&self, link: Arc<LinkLane>, open: StreamOpening) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        let closed = || Refusal { code: wire::RefuseCode::Stopped, text: "the group is closed".into() };
        self.push(Command::Attach { link, open, reply }).map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }
    pub fn detach(&self, link: u64) {
        let _ = self.push(Command::Detach { link });
    }
    pub fn must_free(&self, bytes: Option<u64>) {
        let _ = self.push(Command::MustFree { bytes });
    }
    /// What the group could free; none when it is not running. Blocking.
    pub fn share(&self) -> Option<journal::Share> {
        if !matches!(self.shared.phase(), Phase::Running(_)) {
            return None;
        }
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        self.push(Command::Share { reply }).ok()?;
        // A thread that waits for its disk has nothing to say about room now.
        answer.recv_timeout(std::time::Duration::from_secs(5)).ok()
    }

    /// Keeps a view over failures of the journal; `life` is that of before its reader was asked for.
    pub fn keep_view(&self, life: u64, view: View) -> Result<Arc<ViewHandle>, GroupError> {
        let handle = ViewHandle::new(view);
        crate::lock(&self.shared.views).push(Arc::downgrade(&handle));
        // One that came after the others had moved on would be left behind.
        if self.shared.life() == life { Ok(handle) } else { Err(GroupError::Opening) }
    }
    /// The same as [`Group::barrier`]. Blocking.
    pub fn wait_durable(&self) -> Result<(), GroupError> {
        self.ask_blocking(|reply| Command::Barrier { reply })
    }
    /// Keeps a moment for another group's journal. Blocking.
    pub fn hold(&self, for_group: GroupId, at: ResolvedPoint) -> Result<(), GroupError> {
        self.ask_blocking(|reply| Command::Hold { for_group, at, reply })
    }
    /// Blocking.
    pub fn release_hold(&self, for_group: GroupId) -> Result<(), GroupError> {
        self.ask_blocking(|reply| Command::ReleaseHold { for_group, reply })
    }
    fn ask_blocking<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, GroupError>>) -> Command,
    ) -> Result<T, GroupError> {
        let (reply, answer) = oneshot::channel();
        self.push(command(reply)).map_err(|_| GroupError::Closed)?;
        answer.blocking_recv().unwrap_or(Err(GroupError::Closed))
    }

    /// Asks the thread to end; [`Group::join`] waits for it.
    pub fn close(&self) {
        let _ = self.push(Command::Close);
    }
    /// Blocking.
    pub fn join(&self) {
        let thread = crate::lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group({} {:?})", self.shared.id, self.shared.name)
    }
}
