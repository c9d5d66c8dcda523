//! The agent at work: one thread that owns capture, all groups and their machines, and takes one event at a time.
//!
//! ```text
//!  capture ring ──poll──▶┐                         ┌──▶ link threads (one per group, one for control) ◀──▶ box
//!  link threads ──inbox─▶│ engine: Source machines │──▶ reader threads ──inbox──▶
//!  readers, CLI ──inbox─▶┘   spool, dirty maps     └──▶ run_dir (stored states)
//! ```
//!
//! **Nothing is let go too early.** What capture handed out keeps its place in the ring until the machine says that an agent that dies
//! would not lose it (durable on the box, or in the stored dirty map); losses likewise. A new agent goes on at that place.
//!
//! **Copying is right** because of two rules that are kept here: a read begins after every write handed in before it was ordered has
//! completed, and its result is handed in after everything that was issued before the read ended.
//!
//! **The host never waits for us.** This thread may be slow or dead: the ring fills, the kernel half marks what it drops, and the machine is
//! told in order.
//!
//! **Bounds.** Inbox [`INBOX_MAX`]; bytes per round [`POLL_BUDGET`]; the rest is bounded by ring and spools, whose sum is under the
//! configured ceiling.

mod commands;
mod fencing;
mod group;
mod memory;
mod notices;
mod rpo;
mod scribe;
mod spare;
mod spill;
mod start;
mod status;
mod sync;

pub use start::{find as find_volume, restore_requests};

use crate::{
    capture::{Capture, CaptureError, Captured, DevNo, Position, TargetId, dm::leg::FromLeg},
    carry, clock,
    config::Config,
    cost,
    disks::Disks,
    freeze::{FreezeError, Frozen},
    link::{FromLink, Link, LinkId, Peer, Who},
    local::{Answer, Request},
    psi,
    reader::{Job, Outcome, Pool},
    schedule,
    state::{self, HostIdentity, RunState, StateDir, StateError},
    survey,
    tls::{self, TlsError},
};
use group::{Batch, Group, Running};
use model::{BookmarkName, Consistency, Extent, GroupId, HostId, MonoTime};
use replication::{Event, Pressure, PressureInput};
use scribe::{Key, Scribe, Stored};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};
use sync::Legs;
use wire::Message;

/// Events of other threads that wait; who would add one more waits too.
const INBOX_MAX: usize = 4096;
/// Captured bytes that are handled before other events get their turn.
const POLL_BUDGET: usize = 4 << 20;
/// The ring is looked at this often while there is something in it, and at least this often when there is not.
const SLEEP_BUSY: Duration = Duration::from_micros(500);
const SLEEP_IDLE: Duration = Duration::from_millis(20);
const TICK_MS: u64 = 100;
/// While the ring is more than a quarter full the machines are asked this often to store what lets it go.
const TICK_PRESSED_MS: u64 = 10;
const SECOND_MS: u64 = 1_000;
/// A control connection that says nothing for this long is made anew.
const CONTROL_SILENCE_MS: u64 = 15_000;
/// States are stored for the time after a reboot this often.
const BOOT_STORE_MS: u64 = 600_000;
/// The first time, however short the host has been up.
const BOOT_STORE_FIRST_MS: u64 = 60_000;
/// Groups that are stopped (a disk is missing, capture does not work) are tried again this often.
const RETRY_STOPPED_MS: u64 = 30_000;
/// The box has this long to answer a change.
const PENDING_MS: u64 = 60_000;
/// At a stop, requests in flight are waited for this long; with some left the next start opens a gap.
const STOP_WAIT_MS: u64 = 1_000;
/// Reads at once, over all groups.
const READERS: usize = 4;
/// Certificates are for 90 days; renewed when a third of that is over.
const RENEW_US: u64 = 30 * 86_400 * 1_000_000;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("could not start a thread or make a descriptor")]
    System(#[source] io::Error),
    #[error("could not listen on the control socket {path}")]
    Socket {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("capture broke")]
    Capture(#[source] CaptureError),
}

/// How capture comes about: the one seam that tests of the engine replace.
pub type CaptureStart = Box<dyn FnMut(Option<(&Path, DevNo)>) -> Result<Box<dyn Capture>, CaptureError> + Send>;

enum Input {
    Link(LinkId, u64, FromLink),
    Read(Outcome),
    Request(Request, Answer),
    Frozen {
        group: GroupId,
        id: u64,
        name: BookmarkName,
        result: Result<Frozen, FreezeError>,
    },
    Leg(TargetId, FromLeg),
    /// The fence has something to say to the box.
    Tell(Box<Message>),
    /// What file systems do not use, and what was issued before they were synced.
    Surveyed {
        group: GroupId,
        number: u64,
        answer: survey::Answer,
        barrier: Position,
    },
    /// A moment without I/O under way was made for a mirrored volume, after so many writes had arrived.
    Fenced(TargetId, u64),
    Stop,
}

/// Something that has to wait until capture is drained to a position.
enum Wait {
    Drained { group: GroupId, barrier: u64 },
    Surveyed { group: GroupId, number: u64, answer: survey::Answer },
    Read(Outcome),
    Bookmark { group: GroupId, id: u64, name: BookmarkName, consistency: Consistency },
}

/// What may make a group hold itself back.
struct HostLoad {
    pressure: PressureInput,
    /// What the agent's own processor time asks for.
    cost: Pressure,
    cost_percent: u64,
}

fn copy_rate(mib_s: u32) -> Event {
    Event::CopyRate((mib_s > 0).then_some(u64::from(mib_s) << 20))
}

/// What the groups share.
struct Ctx {
    state: Arc<StateDir>,
    /// Who writes to the state directory, but for what the agent's end is to find at once (`run_dir`, in memory).
    scribe: Scribe,
    boot_id: String,
    capture: Option<Box<dyn Capture>>,
    pool: Option<Pool>,
    captures: u64,
    surveys: u64,
    to_self: mpsc::SyncSender<Input>,
    waits: Vec<(Position, Wait)>,
    open_losses: BTreeSet<(GroupId, u64)>,
    losses_settled: bool,
    retry_persist: Vec<(GroupId, u64, RunState)>,
    sync: Legs,
}

impl Ctx {
    fn next_capture(&mut self) -> u64 {
        self.captures += 1;
        self.captures
    }
    fn handed_out(&self, target: TargetId) -> u64 {
        self.sync.handed_out(target).unwrap_or_else(|| self.capture.as_ref().map_or(0, |c| c.handed_out()))
    }
    fn writes_before(&mut self, number: u64, target: TargetId, extent: &Extent) -> bool {
        if let Some(waits) = self.sync.writes_before(number, target, extent) {
            return waits;
        }
        self.capture.as_ref().is_some_and(|c| c.writes_before(number, target, extent))
    }
    fn wait(&mut self, wait: Wait) {
        let at = self.capture.as_ref().map_or(Position(0), |c| c.barrier().now());
        self.waits.push((at, wait));
    }
    /// Asks the file systems in a thread of its own: they answer when they please. None: it could not be begun.
    fn survey(&mut self, group: GroupId, volumes: Vec<survey::OnDisk>) -> Option<u64> {
        let barrier = self.capture.as_ref()?.barrier();
        self.surveys += 1;
        let (number, sender) = (self.surveys, self.to_self.clone());
        let job = move || {
            let answer = survey::ask(&volumes);
            let _ = sender.send(Input::Surveyed { group, number, answer, barrier: barrier.now() });
        };
        match std::thread::Builder::new().name("survey".to_owned()).spawn(job) {
            Ok(_) => Some(number),
            Err(e) => {
                tracing::warn!(error = %e, "could not start a thread that asks the file systems: everything is copied");
                None
            }
        }
    }
    fn read(&self, job: Job) {
        if let Some(pool) = self.pool.as_ref().or(self.sync.pool.as_ref()) {
            pool.read(job);
        }
    }
    fn loss_recorded(&mut self, group: GroupId, id: u64) {
        self.open_losses.remove(&(group, id));
        self.losses_settled = self.open_losses.is_empty();
    }
}

pub struct Engine {
    config: Config,
    identity: HostIdentity,
    peer: Peer,
    ctx: Ctx,
    groups: Vec<Group>,
    start_capture: CaptureStart,
    capture_error: String,
    control: Option<Link>,
    control_up: Option<u64>,
    control_reason: String,
    control_heard: MonoTime,
    /// The box understands [`Message::Notices`], and what it was told last on this connection.
    box_hears_notices: bool,
    told_notices: Option<Vec<wire::Notice>>,
    /// Holds the lease, when a takeover plan gives this host one.
    fence: Option<crate::fence::Fence>,
    /// What the plan has this host watch, and the second channel.
    probes: Option<crate::probes::Probes>,
    beats: Option<crate::beats::Beats>,
    /// Of the hosts that this one stands by for.
    other_fences: BTreeMap<HostId, crate::fence::Fence>,
    box_leases: bool,
    box_name: String,
    inbox: mpsc::Receiver<Input>,
    to_self: mpsc::SyncSender<Input>,
    batches: VecDeque<Batch>,
    pending: Option<commands::Pending>,
    pending_since: MonoTime,
    /// A thread is freezing file systems; one at a time.
    freezing: bool,
    renewing: Option<String>,
    next_bookmark: u64,
    host_pressure: PressureInput,
    /// States that the hooks of shutdown and boot vouch for; each is used once.
    carried: Vec<(GroupId, Vec<u8>)>,
    cost: cost::Watch,
    own_cost: Pressure,
    rpo: rpo::Rpo,
    /// MiB per second that copying may read right now; 0: no limit.
    copy_mib_s: u32,
    started: MonoTime,
    last_tick: MonoTime,
    last_second: MonoTime,
    next_boot_store: MonoTime,
    last_retry: MonoTime,
    last_spool_look: MonoTime,
    heartbeats: u64,
    stopping: bool,
    _lock: durable::DirLock,
}

/// Tells a running engine to stop; the engine thread ends by itself then.
#[derive(Clone)]
pub struct Stopper(mpsc::SyncSender<Input>);

impl Stopper {
    pub fn stop(&self) {
        let _ = self.0.send(Input::Stop);
    }
}

impl Engine {
    /// Opens everything that does not need the box: state, capture, groups, the control socket.
    pub fn new(config: Config, start_capture: CaptureStart) -> Result<Self, EngineError> {
        let state = StateDir::open(&config.state_dir, &config.run_dir)?;
        let lock = state.lock()?;
        let identity = state.identity()?;
        let records = state.load_groups()?;
        let pem = state.host_pem()?;
        let tls = tls::session_config(&state.read("ca.pem")?, &pem.certificate, &pem.key)?;
        let boot_id = state::boot_id();
        let carried = carry::take(&state, &config.run_dir, &boot_id).unwrap_or_else(|e| {
            tracing::info!(why = %crate::error_chain(&e), "nothing is carried over the reboot");
            Vec::new()
        });
        let state = Arc::new(state);
        let scribe = Scribe::start(state.clone()).map_err(EngineError::System)?;
        let who = Who {
            host: identity.host,
            boot_id: boot_id.clone(),
            instance: state::random_128().map_err(EngineError::System)?,
        };
        let peer = Peer { address: identity.box_address.clone(), who, config: Arc::new(Mutex::new(tls)) };
        let (to_self, inbox) = mpsc::sync_channel(INBOX_MAX);
        let now = clock::mono();
        let inbox_bytes = u64::from(config.ring_bytes());
        let mut engine = Self {
            identity,
            peer,
            ctx: Ctx {
                state,
                scribe,
                boot_id,
                capture: None,
                pool: None,
                captures: 0,
                surveys: 0,
                to_self: to_self.clone(),
                waits: Vec::new(),
                open_losses: BTreeSet::new(),
                losses_settled: false,
                retry_persist: Vec::new(),
                sync: Legs::new(to_self.clone(), now, inbox_bytes),
            },
            groups: Vec::new(),
            start_capture,
            capture_error: String::new(),
            control: None,
            control_up: None,
            control_reason: "not connected yet".to_owned(),
            control_heard: now,
            box_hears_notices: false,
            told_notices: None,
            fence: None,
            probes: None,
            beats: None,
            other_fences: BTreeMap::new(),
            box_leases: false,
            box_name: String::new(),
            inbox,
            to_self,
            batches: VecDeque::new(),
            pending: None,
            pending_since: now,
            freezing: false,
            renewing: None,
            next_bookmark: 1,
            host_pressure: PressureInput::default(),
            carried,
            cost: cost::Watch::default(),
            own_cost: Pressure::None,
            rpo: rpo::Rpo::default(),
            copy_mib_s: 0,
            started: now,
            last_tick: now,
            last_second: now,
            next_boot_store: now.plus_ms(BOOT_STORE_FIRST_MS),
            last_retry: now,
            last_spool_look: now,
            heartbeats: 0,
            stopping: false,
            _lock: lock,
            config,
        };
        engine.start_fence();
        crate::rescue::stand_by(engine.peer.clone(), engine.config.standby.disks.clone())
            .map_err(EngineError::System)?;
        engine.rpo = rpo::Rpo::open(&engine.config.run_dir);
        engine.groups =
            records.into_iter().map(|record| Group { record, running: None, stopped: String::new() }).collect();
        engine.start_stopped()?;
        let sender = engine.to_self.clone();
        let path = engine.config.socket();
        crate::local::serve(&path, move |request, answer| sender.send(Input::Request(request, answer)).is_ok())
            .map_err(|source| EngineError::Socket { path: path.display().to_string(), source })?;
        engine.control = Some(engine.link(LinkId::Control)?);
        Ok(engine)
    }

    pub fn stopper(&self) -> Stopper {
        Stopper(self.to_self.clone())
    }

    fn link(&self, id: LinkId) -> Result<Link, EngineError> {
        let sender = self.to_self.clone();
        let deliver = Box::new(move |id, generation, what| sender.send(Input::Link(id, generation, what)).is_ok());
        Link::start(id, self.peer.clone(), deliver).map_err(EngineError::System)
    }

    /// Works until told to stop. An error is one that a new start may mend.
    pub fn run(mut self) -> Result<(), EngineError> {
        match self.turn() {
            Ok(()) => self.shut_down(),
            Err(e) => {
                if matches!(e, EngineError::Capture(CaptureError::Damaged { .. }))
                    && let Some(capture) = &mut self.ctx.capture
                    && let Err(e) = capture.remove()
                {
                    // The next agent would find the same damage.
                    tracing::error!(error = %crate::error_chain(&e), "could not take the damaged capture out of the kernel");
                }
                Err(e)
            }
        }
    }

    fn turn(&mut self) -> Result<(), EngineError> {
        let mut sleep = SLEEP_BUSY;
        while !self.stopping {
            match self.inbox.recv_timeout(sleep) {
                Ok(input) => {
                    self.input(input);
                    // What else is there, but not for ever: capture must have its turn.
                    for _ in 0..256 {
                        let Ok(input) = self.inbox.try_recv() else { break };
                        self.input(input);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                // We hold a sender ourselves.
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            let (handled, more) = self.work()?;
            sleep = match (more, handled) {
                (true, _) => Duration::ZERO,
                (false, true) => SLEEP_BUSY,
                (false, false) => (sleep.max(SLEEP_BUSY) * 2).min(SLEEP_IDLE),
            };
        }
        Ok(())
    }

    /// One round: what was captured, what waited for it, time.
    fn work(&mut self) -> Result<(bool, bool), EngineError> {
        let (handled, more) = self.poll()?;
        self.each_running(|running, ctx, id| running.begin_reads(ctx, id));
        self.let_go()?;
        let now = clock::mono();
        let pressed = self.ctx.capture.as_ref().is_some_and(|c| {
            let (used, size) = c.fill();
            used > size / 4
        });
        if now.ms_since(self.last_tick) >= if pressed { TICK_PRESSED_MS } else { TICK_MS } {
            self.last_tick = now;
            let second = now.ms_since(self.last_second) >= SECOND_MS;
            if second {
                self.last_second = now;
                self.keep_schedule();
                if self.config.heed_pressure {
                    psi::read(Path::new("/proc"), &mut self.host_pressure);
                    self.watch_cost(now);
                }
            }
            let host = HostLoad { pressure: self.host_pressure, cost: self.own_cost, cost_percent: self.cost.percent };
            self.each_running(|running, ctx, id| running.tick(ctx, id, &host, second));
            if second {
                self.fit_modes()?;
                self.protect_rpo(now);
                self.each_second(now);
            }
        }
        self.go_on_with_stored();
        self.answer_box();
        Ok((handled, more))
    }

    /// Copying at the speed that is allowed at this time of the week.
    fn keep_schedule(&mut self) {
        let mib_s = if self.config.copy_schedule.is_empty() {
            self.config.copy_mib_s
        } else {
            let (day, minute) = schedule::local_now();
            self.config.copy_mib_s_at(day, minute)
        };
        if mib_s == self.copy_mib_s {
            return;
        }
        self.copy_mib_s = mib_s;
        tracing::info!(mib_s, "copying may read so much each second now (0: no limit)");
        self.each_running(|running, ctx, id| running.on(ctx, id, copy_rate(mib_s)));
    }

    fn watch_cost(&mut self, now: MonoTime) {
        let copying = self.groups.iter().filter_map(|g| g.running.as_ref()).any(|r| r.source.status().gap.is_some());
        let before = self.own_cost;
        self.own_cost = self.cost.on(now.0 / 1_000_000, cost::own_cpu_ms(), self.config.cpu_percent_max, copying);
        let marks = |p: Pressure| p == Pressure::DirtyMapOnly;
        if marks(self.own_cost) != marks(before) {
            tracing::warn!(
                percent = self.cost.percent,
                max = self.config.cpu_percent_max,
                marking = marks(self.own_cost),
                "the agent's own processor time decides whether writes are sent or only marked"
            );
        }
    }

    fn each_running(&mut self, mut f: impl FnMut(&mut Running, &mut Ctx, GroupId)) {
        for group in &mut self.groups {
            let id = group.id();
            if let Some(running) = &mut group.running {
                f(running, &mut self.ctx, id);
            }
        }
    }

    fn running(&mut self, id: GroupId) -> Option<(&mut Running, &mut Ctx)> {
        let running = self.groups.iter_mut().find(|g| g.id() == id)?.running.as_mut()?;
        Some((running, &mut self.ctx))
    }

    /// Takes from capture; then hands out what waited for that.
    fn poll(&mut self) -> Result<(bool, bool), EngineError> {
        let now = clock::mono();
        let all_told = self.take_lost_of_legs();
        let exact = self.groups.iter().filter_map(|g| g.running.as_ref()).any(|r| r.source.status().gap.is_none());
        let Some(capture) = &mut self.ctx.capture else {
            // Nothing lies in a ring, so nothing can be missed before a wait, but what a leg is about to tell.
            if all_told {
                let waits = std::mem::take(&mut self.ctx.waits);
                waits.into_iter().for_each(|(_, wait)| self.waited(wait));
            }
            return Ok((false, !all_told));
        };
        let mut events = Vec::new();
        let polled = capture.poll(POLL_BUDGET, exact, now, &mut events).map_err(EngineError::Capture)?;
        let reads_wait = all_told && self.ctx.waits.iter().any(|(at, _)| *at <= polled.position);
        if reads_wait {
            capture.flush_losses(&mut events).map_err(EngineError::Capture)?;
        }
        let handled = !events.is_empty();
        self.hand_in(polled.position, events);
        if reads_wait {
            let waits = std::mem::take(&mut self.ctx.waits);
            for (at, wait) in waits {
                if at <= polled.position { self.waited(wait) } else { self.ctx.waits.push((at, wait)) }
            }
        }
        Ok((handled, polled.more))
    }

    fn hand_in(&mut self, position: Position, events: Vec<Captured>) {
        let mut batch = Batch { position, captures: Vec::new(), losses: Vec::new() };
        for event in events {
            match event {
                Captured::Request(mut request) => {
                    let data = Arc::new(std::mem::take(&mut request.data));
                    self.each_running(|running, ctx, id| {
                        if let Some(no) = running.request(ctx, id, &request, &data) {
                            match batch.captures.iter_mut().find(|(g, _)| *g == id) {
                                Some((_, last)) => *last = no,
                                None => batch.captures.push((id, no)),
                            }
                        }
                    });
                }
                Captured::Done { .. } => {}
                Captured::Lost { target, extents, why } => self.each_running(|running, ctx, id| {
                    if let Some(loss) = running.lost(ctx, id, target, &extents, why) {
                        batch.losses.push((id, loss));
                    }
                }),
            }
        }
        let empty = batch.captures.is_empty() && batch.losses.is_empty();
        match self.batches.back_mut() {
            // Nothing of ours: it goes with the batch before.
            Some(last) if empty => last.position = last.position.max(position),
            _ => self.batches.push_back(batch),
        }
    }

    fn waited(&mut self, wait: Wait) {
        match wait {
            Wait::Drained { group, barrier } => {
                if let Some((running, ctx)) = self.running(group) {
                    running.on(ctx, group, Event::Drained { barrier });
                }
            }
            Wait::Surveyed { group, number, answer } => {
                if let Some((running, ctx)) = self.running(group) {
                    running.surveyed(ctx, group, number, answer);
                }
            }
            Wait::Read(outcome) => {
                let group = outcome.group;
                if let Some((running, ctx)) = self.running(group) {
                    running.read_done(ctx, group, outcome);
                }
            }
            Wait::Bookmark { group, id, name, consistency } => {
                if consistency == Consistency::Filesystem && self.thawed(group, id) {
                    self.take_bookmark(
                        group,
                        id,
                        "the file systems had to be let go before everything they had written was captured",
                    );
                } else if let Some((running, ctx)) = self.running(group) {
                    running.on(ctx, group, Event::Bookmark { id, name, consistency });
                }
            }
        }
    }

    /// Gives capture's memory back as far as nobody would miss it.
    fn let_go(&mut self) -> Result<(), EngineError> {
        let released = |groups: &[Group], id: GroupId, no: u64| {
            groups.iter().find(|g| g.id() == id).and_then(|g| g.running.as_ref()).is_none_or(|r| r.released >= no)
        };
        let mut to = None;
        while let Some(batch) = self.batches.front() {
            let free = batch.captures.iter().all(|(id, no)| released(&self.groups, *id, *no))
                && batch.losses.iter().all(|loss| !self.ctx.open_losses.contains(loss));
            if !free {
                break;
            }
            to = Some(batch.position);
            self.batches.pop_front();
        }
        let Some(capture) = &mut self.ctx.capture else { return Ok(()) };
        if let Some(to) = to {
            capture.release(to);
        }
        if self.ctx.losses_settled {
            self.ctx.losses_settled = false;
            capture.confirm_losses().map_err(EngineError::Capture)?;
        }
        Ok(())
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Stop => self.stopping = true,
            Input::Read(outcome) => {
                let at = outcome.barrier;
                self.ctx.waits.push((at, Wait::Read(outcome)));
            }
            Input::Link(LinkId::Control, generation, what) => self.heard_control(generation, what),
            Input::Link(LinkId::Stream(group), generation, what) => {
                if let Some((running, ctx)) = self.running(group) {
                    running.heard_link(ctx, group, generation, what);
                }
            }
            Input::Surveyed { group, number, answer, barrier } => {
                self.ctx.waits.push((barrier, Wait::Surveyed { group, number, answer }));
            }
            Input::Request(request, answer) => self.request(request, answer),
            Input::Frozen { group, id, name, result } => self.frozen(group, id, name, result),
            Input::Leg(target, what) => self.heard_from_leg(target, what),
            Input::Tell(message) => self.tell_of_lease(*message),
            Input::Fenced(target, number) => self.ctx.sync.fenced(target, number),
        }
    }

    fn each_second(&mut self, now: MonoTime) {
        for (group, serial, run) in std::mem::take(&mut self.ctx.retry_persist) {
            match self.ctx.state.store_run(group, &run) {
                Ok(()) => {
                    if let Some((running, ctx)) = self.running(group) {
                        running.last_alarm.clear();
                        running.on(ctx, group, Event::Persisted { serial });
                    }
                }
                Err(_) => self.ctx.retry_persist.push((group, serial, run)),
            }
        }
        if let Some(generation) = self.control_up {
            if now.ms_since(self.control_heard) >= CONTROL_SILENCE_MS {
                self.control_up = None;
                if let Some(link) = &self.control {
                    link.close(generation, format!("nothing was heard from the box for {CONTROL_SILENCE_MS} ms"));
                }
            } else {
                self.heartbeats += 1;
                self.tell(Message::heartbeat(self.heartbeats, now));
                let status = self.agent_status();
                self.tell(Message::Status(status));
            }
        }
        self.give_up_pending(now);
        self.tell_notices();
        self.watch_mirrors(now);
        self.watch_spools(now);
        if now.ms_since(self.last_retry) >= RETRY_STOPPED_MS {
            self.last_retry = now;
            if self.groups.iter().any(|g| g.running.is_none() && !g.record.sync)
                && let Err(e) = self.start_stopped()
            {
                tracing::error!(error = %crate::error_chain(&e), "could not start a stopped group");
            }
        }
        if now >= self.next_boot_store {
            self.next_boot_store = now.plus_ms(BOOT_STORE_MS);
            self.store_for_boot(false);
            self.note_contents();
        }
    }

    fn tell(&self, message: Message) {
        if let (Some(generation), Some(link)) = (self.control_up, &self.control) {
            link.message(generation, message);
        }
    }

    fn answer_box(&mut self) {
        let mut answers = Vec::new();
        self.each_running(|running, _, _| answers.append(&mut running.box_answers));
        for (id, result) in answers {
            self.tell(Message::CommandDone { id, result });
        }
    }

    /// `stopping`: nothing is captured after this but by the kernel half, and a stream that ended clean may go on as clean. Otherwise what is
    /// found after a host that went down without a word must not claim that.
    fn store_for_boot(&self, stopping: bool) {
        for group in &self.groups {
            if let Some(running) = &group.running {
                let state = if stopping { running.source.final_state().0 } else { running.source.boot_state() };
                let id = group.id();
                self.ctx.scribe.put(Key::Boot(id), move |dir| {
                    if let Err(e) = dir.store_boot(id, &state) {
                        tracing::warn!(group = %id, error = %crate::error_chain(&e), "could not store the group's state for the next boot");
                    }
                    None
                });
            }
        }
    }

    /// A file system that was made anew on a protected disk changes what the disk is known by, if it is known by nothing else.
    fn note_contents(&mut self) {
        let Ok(disks) = Disks::here() else { return };
        let mut changed = false;
        for group in &mut self.groups {
            let Some(running) = &group.running else { continue };
            for volume in &mut group.record.volumes {
                let at = running.volumes.iter().find(|v| v.id == volume.id).and_then(|v| disks.get(&v.device));
                if let Some(device) = at
                    && device.identity.content != volume.identity.content
                {
                    volume.identity.content = device.identity.content.clone();
                    changed = true;
                }
            }
        }
        if changed {
            self.store_groups();
        }
    }

    /// False: it could not be stored. True where that is not known yet ([`Self::settle`]).
    fn store_groups(&mut self) -> bool {
        let records: Vec<_> = self.groups.iter().map(|g| g.record.clone()).collect();
        let stored = Arc::new(AtomicBool::new(true));
        let says = stored.clone();
        self.ctx.scribe.put(Key::Groups, move |dir| {
            if let Err(e) = dir.store_groups(&records) {
                tracing::error!(error = %crate::error_chain(&e), "could not store the list of groups");
                says.store(false, Ordering::Release);
            }
            None
        });
        self.settle();
        stored.load(Ordering::Acquire)
    }

    /// Waits until what was to be stored is, where that does not wait for this thread; where it does, it is on its way.
    fn settle(&self) {
        if !self.ctx.sync.holds_state() {
            self.ctx.scribe.settle();
        }
    }

    fn go_on_with_stored(&mut self) {
        for stored in self.ctx.scribe.stored() {
            match stored {
                Stored::Identity { identity, tls, result } => self.renewal_stored(identity, tls, result),
                Stored::Plan { plan, result } => self.plan_stored(plan, result),
                Stored::OthersPlan { plan, result } => self.others_plan_stored(plan, result),
            }
        }
    }

    /// Everything that is known is stored; capture goes on in the kernel.
    fn shut_down(mut self) -> Result<(), EngineError> {
        let begun = clock::mono();
        self.rpo.release();
        self.take_out_mirrors(None);
        // Requests that were handed out and have not completed would look unmatched to the next agent.
        loop {
            self.work()?;
            let in_flight = self.ctx.capture.as_ref().map_or(0, |c| c.in_flight());
            if in_flight == 0 || clock::mono().ms_since(begun) >= STOP_WAIT_MS {
                break;
            }
            while let Ok(input) = self.inbox.try_recv() {
                self.input(input);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.let_go()?;
        self.note_contents();
        for group in &self.groups {
            if let Some(running) = &group.running {
                let (source, clean) = running.source.final_state();
                tracing::info!(group = %group.id(), clean, "group stopped");
                self.ctx.state.store_run(group.id(), &RunState { boot_id: self.ctx.boot_id.clone(), source })?;
            }
        }
        self.store_for_boot(true);
        // Mirrors are out by now.
        self.ctx.scribe.settle();
        if self.config.carry_over && self.ctx.capture.is_some() {
            let planned = Disks::here()
                .map_err(carry::CarryError::from)
                .and_then(|disks| carry::plan(&self.ctx.state, &self.config.run_dir, &self.ctx.boot_id, &disks));
            if let Err(e) = planned {
                tracing::info!(why = %crate::error_chain(&e), "nothing will be carried over a reboot");
            }
        }
        let _ = std::fs::remove_file(self.config.socket());
        Ok(())
    }
}
