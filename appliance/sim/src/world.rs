//! The world: time, luck, and what must hold.

use crate::agent::{Agent, AgentCounts, Around, Surviving};
use crate::host::Host;
use crate::net::{Connection, ToAgent, ToBox, box_time};
use crate::oracle::{Request, fill_sector};
use crate::rng::Rng;
use crate::store::{Down, Flipped, MemoryStore, NotTaken, Store, StoreCounts};
use model::{
    Bound, Consistency, Extent, GroupPolicy, GroupSpec, Lsn, Mark, MonoTime, SECTOR, SourceSeq, StreamId, SyncMode,
    WriteFlags,
};
use replication::{
    CaptureNo, DisconnectReason, Event, Had, Pressure, ReadId, StateError, Target, TargetAction, TargetConfig,
    TargetEvent, resume,
};
use std::collections::VecDeque;
use std::fmt;
use wire::{Comparison, Credit, FrameHeader, Message, Refusal};

/// Steps with faults, then as many as it takes to come to rest.
const STEPS: u64 = 1200;
const REST_STEPS_MAX: u64 = 40_000;

/// What a run may be told.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Options {
    /// A list in memory in place of the journal: tells whether a failure lies above or below the journal's API.
    pub memory: bool,
}

/// What happened in a run.
#[derive(Clone, Copy, Default, Debug)]
pub struct Summary {
    pub requests: u64,
    pub captures_lost: u64,
    pub records_kept: u64,
    pub records_appended: u64,
    pub reads: u64,
    pub states_stored: u64,
    pub alarms: u64,
    pub bookmarks: u64,
    pub bookmarks_refused: u64,
    pub flushes_durable: u64,
    pub flushes_released: u64,
    pub degraded: u64,
    pub agent_clean_restarts: u64,
    pub agent_unclean_restarts: u64,
    pub cuts: u64,
    pub half_open: u64,
    pub box_power_cuts: u64,
    pub box_kills: u64,
    pub box_restarts: u64,
    pub betrayals: u64,
    pub times_full: u64,
    pub gaps: u64,
    pub points_checked: u64,
    pub segments: u64,
    pub cut_tails: u64,
    pub folds: u64,
    pub faults: u64,
    pub flips: u64,
    /// Flips that a read, a verification or the next start named; the others lay where nothing is.
    pub flips_named: u64,
    pub flips_refused_at_start: u64,
    pub host_crashes: u64,
    pub comparisons: u64,
    pub kib_same: u64,
}

impl Summary {
    /// Adds another run's.
    pub fn add(&mut self, other: &Summary) {
        for (mine, theirs) in self.fields_mut().into_iter().zip(other.fields()) {
            *mine.1 += theirs.1;
        }
    }
    /// Every count with its name.
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        let mut copy = *self;
        copy.fields_mut().into_iter().map(|(name, value)| (name, *value)).collect()
    }
    fn fields_mut(&mut self) -> Vec<(&'static str, &mut u64)> {
        vec![
            ("requests", &mut self.requests),
            ("captures lost", &mut self.captures_lost),
            ("records kept", &mut self.records_kept),
            ("records appended", &mut self.records_appended),
            ("reads", &mut self.reads),
            ("states stored", &mut self.states_stored),
            ("alarms", &mut self.alarms),
            ("bookmarks", &mut self.bookmarks),
            ("bookmarks refused", &mut self.bookmarks_refused),
            ("flushes durable", &mut self.flushes_durable),
            ("flushes released", &mut self.flushes_released),
            ("degraded", &mut self.degraded),
            ("agent clean restarts", &mut self.agent_clean_restarts),
            ("agent unclean restarts", &mut self.agent_unclean_restarts),
            ("cuts", &mut self.cuts),
            ("half open", &mut self.half_open),
            ("box power cuts", &mut self.box_power_cuts),
            ("box kills", &mut self.box_kills),
            ("box restarts", &mut self.box_restarts),
            ("betrayals", &mut self.betrayals),
            ("times full", &mut self.times_full),
            ("gaps", &mut self.gaps),
            ("points checked", &mut self.points_checked),
            ("segments", &mut self.segments),
            ("cut tails", &mut self.cut_tails),
            ("folds", &mut self.folds),
            ("disk faults", &mut self.faults),
            ("flips", &mut self.flips),
            ("flips named", &mut self.flips_named),
            ("flips refused at start", &mut self.flips_refused_at_start),
            ("host crashes", &mut self.host_crashes),
            ("comparisons", &mut self.comparisons),
            ("KiB found the same", &mut self.kib_same),
        ]
    }
}

/// What did not hold.
#[derive(Debug, thiserror::Error)]
pub enum FailureKind {
    #[error("the stored state of the source cannot be read")]
    StoredState { source: StateError },
    #[error("no packer")]
    Packer { source: std::io::Error },
    #[error("record {seq} was to be sent and is not in the spool")]
    SendUnkept { seq: SourceSeq },
    #[error("payloads through {through} were released, the box has {durable:?} durable")]
    ReleasedEarly { through: SourceSeq, durable: Option<SourceSeq> },
    #[error("capture {capture} was kept after the ring had let go of it")]
    RingReleasedEarly { capture: CaptureNo },
    #[error("read {id:?} is not known")]
    UnknownRead { id: ReadId },
    #[error("volume {volume} is not known")]
    UnknownVolume { volume: model::VolumeId },
    #[error("flush {flush} was released as durable, the box covers requests up to {covered}")]
    FlushTooEarly { flush: Request, covered: Request },
    #[error("flush {flush} was released undurable in state sync")]
    FlushNotGated { flush: Request },
    #[error("the target refused an honest source")]
    Refused { refusal: Refusal },
    #[error("the source gave up an honest box")]
    SourceGaveUp { reason: DisconnectReason },
    #[error("the store died: {what}")]
    StoreDied { what: String },
    #[error("the store lost durable records: durable to LSN {durable}, after the restart it ends at {end}")]
    LostDurable { durable: Lsn, end: Lsn },
    #[error("the store has record {durable} of the stream durable and says it is at {position}")]
    PositionForgotten { durable: SourceSeq, position: String },
    #[error("LSNs jumped: {got} after {had}")]
    LsnJump { had: Lsn, got: Lsn },
    #[error("LSN {lsn} is offered as a recovery point inside a gap")]
    OfferedInGap { lsn: Lsn },
    #[error("LSN {lsn}, the end of a request outside gaps, is not offered as a recovery point")]
    NotOffered { lsn: Lsn },
    #[error("volume {volume} sector {sector} at LSN {lsn} is not what it was after request {request}")]
    WrongImage { lsn: Lsn, request: Request, volume: usize, sector: u64 },
    #[error("volume {volume} sector {sector}: head view and host disk differ at rest")]
    HeadDiffers { volume: usize, sector: u64 },
    #[error("could not read LSN {lsn}: {what}")]
    Unreadable { lsn: Lsn, what: String },
    #[error("the other group on the disk: {what}")]
    Neighbour { what: String },
    #[error("a bit turned over in {file} at {offset:#x}, and then: {what}")]
    Rot { file: String, offset: u64, what: String },
    #[error("not at rest after {steps} quiet steps: {status}")]
    NoRest { steps: u64, status: String },
}

/// A run that failed, with the line that repeats it.
#[derive(Debug)]
pub struct Failure {
    pub seed: u64,
    pub at_ms: u64,
    pub kind: FailureKind,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms: {}", self.at_ms, self.kind)?;
        let mut cause = std::error::Error::source(&self.kind);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        write!(f, "\n  repeat: cargo xtask sim --seed {} --trace", self.seed)
    }
}

impl std::error::Error for Failure {}

/// Where the lines of a trace go.
pub type TraceSink = Box<dyn FnMut(&str)>;

/// One line per event, in columns, when somebody looks.
pub(crate) struct Trace {
    sink: Option<TraceSink>,
    pub(crate) seed: u64,
    pub(crate) now_ms: u64,
}

impl Trace {
    pub(crate) fn on(&self) -> bool {
        self.sink.is_some()
    }
    pub(crate) fn line(&mut self, who: &str, what: &str, detail: &str) {
        let now_ms = self.now_ms;
        if let Some(sink) = &mut self.sink {
            sink(&format!("{now_ms:>8}  {who:<7} {what:<8} {detail}"));
        }
    }
    pub(crate) fn fail(&self, kind: FailureKind) -> Failure {
        Failure { seed: self.seed, at_ms: self.now_ms, kind }
    }
}

/// How unlucky this world is: chances of "once in so many steps", 0 for never.
struct Luck {
    cut: u64,
    half_open: u64,
    agent_dies: u64,
    agent_stops: u64,
    power_cut: u64,
    kill: u64,
    box_restart: u64,
    full: u64,
    fault: u64,
    resync: u64,
    bookmark: u64,
    pause: u64,
    pressure: u64,
    spool_lost: u64,
    mode: u64,
    betray: u64,
    host_crash: u64,
    /// Requests per step, and items handed in per step, at most.
    load: u64,
    pace: u64,
}

impl Luck {
    fn draw(rng: &mut Rng) -> Self {
        // Each fault is absent in half of the worlds, so that pairs of faults meet without the others.
        let mut chance = |low: u64, high: u64| if rng.one_in(2) { 0 } else { rng.between(low, high) };
        Self {
            cut: chance(40, 400),
            half_open: chance(100, 600),
            agent_dies: chance(20, 400),
            agent_stops: chance(60, 300),
            power_cut: chance(30, 400),
            kill: chance(60, 600),
            box_restart: chance(100, 600),
            full: chance(200, 700),
            fault: chance(60, 500),
            resync: chance(300, 900),
            bookmark: chance(20, 100),
            pause: chance(200, 700),
            pressure: chance(60, 400),
            spool_lost: chance(80, 600),
            mode: chance(150, 700),
            betray: if chance(1, 4) == 1 { 500 } else { 0 },
            host_crash: chance(100, 700),
            load: rng.between(1, 4),
            pace: rng.between(2, 40),
        }
    }
}

/// What the world knows of an LSN.
#[derive(Clone, Copy, Debug)]
struct Logged {
    after: Request,
    /// Inside a gap, or not the end of a request: no recovery point.
    valid: bool,
    in_gap: bool,
    stream: StreamId,
    seq: SourceSeq,
}

struct BoxSide {
    store: Box<dyn Store>,
    target: Option<(u64, Target)>,
    stream: StreamId,
    /// By LSN, from 1 (or from where the store began to keep, after a fold).
    log: Vec<Logged>,
    /// A frame the store had no room for.
    pending: Option<(Box<FrameHeader>, Vec<u8>, Request, TargetAction)>,
    actions: Vec<TargetAction>,
    /// Comparisons, each with the LSN that must be durable before it is answered.
    compares: VecDeque<(Lsn, Comparison)>,
    full_until: Option<u64>,
    /// The newest LSN of the log that is durable, as reported.
    durable: Lsn,
    covered: Request,
}

struct World {
    trace: Trace,
    rng: Rng,
    luck: Luck,
    now_ms: u64,
    host: Host,
    agent: Option<Agent>,
    agent_back_at: u64,
    surviving: Surviving,
    mode: SyncMode,
    connection: Option<Connection>,
    next_connection: u64,
    the_box: BoxSide,
    betrayed: bool,
    quiet: bool,
    paused_until: Option<u64>,
    stopping_until: Option<u64>,
    dies_at: Option<u64>,
    next_bookmark: u64,
    summary: Summary,
}

/// Runs one world.
pub fn run(seed: u64) -> Result<Summary, Failure> {
    run_with(seed, Options::default(), None)
}

/// Runs one world, telling a line per event to `trace`.
pub fn run_with(seed: u64, options: Options, trace: Option<TraceSink>) -> Result<Summary, Failure> {
    let mut world = World::new(seed, options, Trace { sink: trace, seed, now_ms: 0 })?;
    for _ in 0..STEPS {
        world.step()?;
    }
    world.come_to_rest()?;
    world.check_head()?;
    world.check_points(16)?;
    world.check_neighbour(8)?;
    world.rot()?;
    Ok(world.sum_up())
}

impl World {
    fn new(seed: u64, options: Options, trace: Trace) -> Result<Self, Failure> {
        let mut rng = Rng::new(seed, 0);
        let host = Host::new(seed);
        let spec = group_spec(&host);
        let store: Box<dyn Store> = if options.memory {
            let store = MemoryStore::new(seed, host.specs.clone());
            Box::new(store.map_err(|source| trace.fail(FailureKind::Packer { source }))?)
        } else {
            Box::new(
                crate::journal_store::JournalStore::create(seed, &spec, box_time(0))
                    .map_err(|what| trace.fail(FailureKind::StoreDied { what }))?,
            )
        };
        let luck = Luck::draw(&mut rng);
        let mode = draw_mode(&mut rng);
        Ok(Self {
            trace,
            rng,
            luck,
            now_ms: 0,
            host,
            agent: None,
            agent_back_at: 0,
            surviving: Surviving::default(),
            mode,
            connection: None,
            next_connection: 1,
            the_box: BoxSide {
                store,
                target: None,
                stream: StreamId::default(),
                log: Vec::new(),
                pending: None,
                actions: Vec::new(),
                compares: VecDeque::new(),
                full_until: None,
                durable: Lsn::ZERO,
                covered: 0,
            },
            betrayed: false,
            quiet: false,
            paused_until: None,
            stopping_until: None,
            dies_at: None,
            next_bookmark: 1,
            summary: Summary::default(),
        })
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.now_ms += self.rng.between(1, 20);
        self.trace.now_ms = self.now_ms;
        self.host.advance(self.now_ms);
        if !self.quiet {
            for _ in 0..self.rng.below(self.luck.load + 1) {
                if let Some(request) = self.host.issue(self.now_ms) {
                    self.summary.requests += 1;
                    if self.trace.on() {
                        self.trace.line("host", "issue", &format!("request {request}"));
                    }
                }
            }
            self.have_bad_luck()?;
        }
        self.agent_step()?;
        self.box_step()
    }

    // ---- the agent's side ---------------------------------------------------------------------------------------------------------

    /// Calls `f` with the agent and what is around it.
    fn with_agent(
        &mut self,
        f: impl FnOnce(&mut Agent, &mut Around<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(mut agent) = self.agent.take() else { return Ok(()) };
        let result = f(&mut agent, &mut self.around());
        self.agent = Some(agent);
        result
    }

    fn around(&mut self) -> Around<'_> {
        let (durable, seed) = (self.the_box.durable_position(), self.trace.seed);
        Around {
            now_ms: self.now_ms,
            host: &mut self.host,
            surviving: &mut self.surviving,
            connection: &mut self.connection,
            next_connection: &mut self.next_connection,
            trace: &mut self.trace,
            covered: self.the_box.covered,
            durable,
            betrayed: self.betrayed,
            mode: self.mode,
            seed,
        }
    }

    fn agent_step(&mut self) -> Result<(), Failure> {
        if self.agent.is_none() {
            if self.now_ms < self.agent_back_at && !self.quiet {
                return Ok(());
            }
            self.trace.line("agent", "start", "");
            let agent = Agent::start(&mut self.around())?;
            self.agent = Some(agent);
            // What a start does first is stored a moment later: deaths in between are the interesting ones.
            if self.luck.agent_dies > 0 && self.rng.one_in(4) && !self.quiet {
                self.dies_at = Some(self.now_ms + self.rng.below(150));
            }
        }
        if self.paused_until.is_some_and(|until| self.now_ms >= until || self.quiet) {
            self.paused_until = None;
            self.with_agent(|agent, around| agent.on(Event::Unpause, around))?;
        }
        // To stop in order it takes nothing more in and waits a while for what is under way.
        let stopping = self.stopping_until.is_some();
        if let Some(until) = self.stopping_until
            && let Some(agent) = &self.agent
            && (self.now_ms >= until || agent.source.final_state().1)
        {
            self.agent_ends(true);
            return Ok(());
        }
        let hand_in = match () {
            () if stopping => 0,
            () if self.quiet => 1000,
            () => self.rng.below(self.luck.pace + 1),
        };
        self.with_agent(|agent, around| agent.step(hand_in, around))
    }

    fn agent_ends(&mut self, in_order: bool) {
        let Some(agent) = self.agent.take() else { return };
        let counts = if in_order {
            let (counts, clean) = agent.stop(&mut self.surviving);
            self.trace.line("agent", "stop", if clean { "clean" } else { "not clean" });
            counts
        } else {
            self.trace.line("agent", "dies", "");
            agent.die(&mut self.surviving)
        };
        self.count_agent(&counts);
        // The kernel closes its sockets; the box hears of it or not.
        if self.rng.one_in(2) {
            self.box_hears_end();
        }
        self.connection = None;
        // A sync leg without its agent drops out: the host goes on.
        self.host.flushes.clear();
        self.paused_until = None;
        self.stopping_until = None;
        self.dies_at = None;
        self.agent_back_at = self.now_ms + self.rng.below(400);
    }

    /// The host loses its power: agent, ring and what the disks had not made durable are gone. What the agent finds afterwards is what it had
    /// stored for the next boot at some time, and nobody knows what was written since.
    fn host_crashes(&mut self) {
        self.summary.host_crashes += 1;
        self.trace.line("host", "crash", "");
        self.agent_ends(false);
        self.host.crash(self.now_ms);
        self.surviving.state = self.surviving.boot.clone();
        self.surviving.tail_lost = true;
    }

    fn count_agent(&mut self, counts: &AgentCounts) {
        self.summary.records_kept += counts.records;
        self.summary.reads += counts.reads;
        self.summary.states_stored += counts.stores;
        self.summary.alarms += counts.alarms;
        self.summary.bookmarks += counts.bookmarks;
        self.summary.bookmarks_refused += counts.bookmarks_refused;
        self.summary.flushes_durable += counts.flushes_durable;
        self.summary.flushes_released += counts.flushes_released;
        self.summary.degraded += counts.degraded;
        self.summary.kib_same += counts.same_bytes >> 10;
        self.summary.agent_clean_restarts += counts.clean_restarts;
        self.summary.agent_unclean_restarts += counts.unclean_restarts;
    }

    // ---- luck ---------------------------------------------------------------------------------------------------------------------

    fn have_bad_luck(&mut self) -> Result<(), Failure> {
        let luck = &self.luck;
        let rng = &mut self.rng;
        if rng.one_in(luck.cut) && self.connection.is_some() {
            self.summary.cuts += 1;
            self.trace.line("net", "cut", "");
            self.cut()?;
        }
        if self.rng.one_in(self.luck.half_open)
            && let Some(connection) = &mut self.connection
        {
            self.summary.half_open += 1;
            connection.half_open = true;
            self.trace.line("net", "half", "");
        }
        if self.rng.one_in(self.luck.agent_dies) || self.dies_at.is_some_and(|at| self.now_ms >= at) {
            self.agent_ends(false);
        }
        if self.rng.one_in(100)
            && let Some(agent) = &self.agent
        {
            self.surviving.boot = Some(agent.source.boot_state());
        }
        if self.rng.one_in(self.luck.host_crash) {
            self.host_crashes();
        }
        if self.rng.one_in(self.luck.agent_stops) && self.agent.is_some() && self.stopping_until.is_none() {
            self.stopping_until = Some(self.now_ms + 500);
        }
        for (chance, how) in [
            (self.luck.power_cut, Down::PowerCut),
            (self.luck.kill, Down::Killed),
            (self.luck.box_restart, Down::InOrder),
        ] {
            if self.rng.one_in(chance) {
                self.box_ends(how)?;
            }
        }
        if self.rng.one_in(self.luck.betray) {
            self.betray()?;
        }
        if self.rng.one_in(self.luck.full) && self.the_box.full_until.is_none() {
            self.summary.times_full += 1;
            self.the_box.full_until = Some(self.now_ms + self.rng.below(3000));
            self.the_box.store.set_full(true);
            self.trace.line("box", "full", "");
        }
        if self.rng.one_in(self.luck.fault) {
            self.summary.faults += 1;
            self.trace.line("box", "fault", "armed");
            self.the_box.store.arm_fault();
        }
        if self.rng.one_in(self.luck.resync) {
            self.with_agent(|agent, around| agent.on(Event::Resync, around))?;
        }
        if self.rng.one_in(self.luck.bookmark) {
            let id = self.next_bookmark;
            self.next_bookmark += 1;
            let name = format!("bookmark {id}").parse().expect("a name with a number in it is a name");
            let event = Event::Bookmark { id, name, consistency: Consistency::Crash };
            self.with_agent(|agent, around| agent.on(event, around))?;
        }
        if self.rng.one_in(self.luck.pause) && self.paused_until.is_none() && self.agent.is_some() {
            self.paused_until = Some(self.now_ms + self.rng.below(1000));
            self.with_agent(|agent, around| agent.on(Event::Pause, around))?;
        }
        if self.rng.one_in(self.luck.pressure) {
            let pressure = match self.rng.below(6) {
                0 => Pressure::DirtyMapOnly,
                1 => Pressure::SpillOnly,
                2 => Pressure::Delay { ms: self.rng.below(200) },
                _ => Pressure::None,
            };
            self.with_agent(|agent, around| agent.on(Event::Pressure(pressure), around))?;
        }
        if self.rng.one_in(self.luck.spool_lost) {
            let range = self.agent.as_ref().and_then(Agent::spool_range);
            if let Some((first, last)) = range {
                let from = self.rng.between(first, last);
                self.with_agent(|agent, around| agent.lose_spool(from, around))?;
            }
        }
        if self.rng.one_in(self.luck.mode) {
            self.mode = draw_mode(&mut self.rng);
            let mode = self.mode;
            self.with_agent(|agent, around| agent.on(Event::Mode(mode), around))?;
        }
        Ok(())
    }

    /// Both ends hear of it, each in its time; the box perhaps only when the next connection comes.
    fn cut(&mut self) -> Result<(), Failure> {
        self.connection = None;
        if self.rng.one_in(2) {
            self.box_hears_end();
        }
        self.with_agent(|agent, around| agent.disconnected(around))
    }

    fn box_hears_end(&mut self) {
        self.the_box.compares.clear();
        self.the_box.target = None;
        self.the_box.pending = None;
    }

    // ---- the box's side -----------------------------------------------------------------------------------------------------------

    fn box_ends(&mut self, how: Down) -> Result<(), Failure> {
        match how {
            Down::PowerCut => self.summary.box_power_cuts += 1,
            Down::Killed => self.summary.box_kills += 1,
            Down::InOrder => self.summary.box_restarts += 1,
        }
        self.trace.line("box", "ends", &format!("{how:?}, durable {}", self.the_box.durable));
        self.box_hears_end();
        let durable = self.the_box.durable;
        self.the_box
            .store
            .restart(how, box_time(self.now_ms))
            .map_err(|what| self.trace.fail(FailureKind::StoreDied { what }))?;
        let end = self.the_box.store.progress().appended;
        self.trace.line("box", "back", &format!("LSN {end}"));
        if end < durable {
            return Err(self.trace.fail(FailureKind::LostDurable { durable, end }));
        }
        self.the_box.log.truncate(end.0 as usize);
        self.after_box_restart()
    }

    fn betray(&mut self) -> Result<(), Failure> {
        self.betrayed = true;
        self.summary.betrayals += 1;
        self.box_hears_end();
        self.the_box
            .store
            .betray(box_time(self.now_ms))
            .map_err(|what| self.trace.fail(FailureKind::StoreDied { what }))?;
        let end = self.the_box.store.progress().appended;
        self.trace.line("box", "betrays", &format!("LSN {end}"));
        self.the_box.log.truncate(end.0 as usize);
        self.the_box.durable = Lsn::ZERO;
        self.the_box.covered = 0;
        self.after_box_restart()
    }

    fn after_box_restart(&mut self) -> Result<(), Failure> {
        // A machine that is up again answers old connections with a reset.
        if self.connection.is_some() {
            self.cut()?;
        }
        self.the_box.store.set_full(self.the_box.full_until.is_some());
        self.the_box.note_progress();
        self.check_points(2)
    }

    fn box_step(&mut self) -> Result<(), Failure> {
        if self.the_box.full_until.is_some_and(|until| self.now_ms >= until || self.quiet) {
            self.the_box.full_until = None;
            self.the_box.store.set_full(false);
            self.trace.line("box", "room", "");
        }
        let now = box_time(self.now_ms);
        if self.rng.one_in(2) || self.quiet {
            self.the_box.store.step(now).map_err(|what| self.trace.fail(FailureKind::StoreDied { what }))?;
            self.the_box.note_progress();
        }
        if self.the_box.store.is_down() {
            self.box_ends(Down::Killed)?;
        } else if self.rng.one_in(2) {
            self.the_box.note_progress();
            let progress = self.the_box.store.progress();
            self.tell_target(TargetEvent::Progress { written: progress.written, durable: progress.durable })?;
        }
        self.answer_comparisons()?;
        self.take_pending()?;
        while self.the_box.pending.is_none()
            && let Some((number, packet)) = self.packet_for_box()
        {
            self.box_receives(number, packet)?;
        }
        self.tell_target(TargetEvent::Tick)
    }

    fn packet_for_box(&mut self) -> Option<(u64, ToBox)> {
        let connection = self.connection.as_mut()?;
        Some((connection.number, connection.at_box(self.now_ms)?))
    }

    fn box_receives(&mut self, number: u64, packet: ToBox) -> Result<(), Failure> {
        match packet {
            ToBox::Open { facts, source } => {
                // An older connection of the group ends here.
                self.box_hears_end();
                self.the_box.note_progress();
                let position = self.the_box.store.position();
                if let Some((stream, durable)) = self.the_box.durable_position()
                    && !position.is_some_and(|p| p.stream == stream && p.durable >= durable && p.appended >= p.durable)
                {
                    return Err(self
                        .trace
                        .fail(FailureKind::PositionForgotten { durable, position: format!("{position:?}") }));
                }
                let decided = resume(position.map(|p| (p.stream, p.appended)), &facts);
                if self.trace.on() {
                    self.trace.line("box", "open", &format!("{facts:?} has {position:?}: {decided:?}"));
                }
                self.the_box.stream = facts.stream;
                let mut config = TargetConfig::new(Agent::group(), facts.stream, self.host.specs.clone(), decided);
                config.had = position
                    .filter(|p| p.stream == facts.stream)
                    .map(|p| Had { durable: p.durable, appended_lsn: self.the_box.store.progress().appended });
                config.in_gap = self.the_box.store.in_gap();
                config.last_time = self.the_box.store.last_time();
                config.ack_ms = 300;
                config.silence_ms = 3_000;
                config.window = Credit { bytes: self.rng.between(100, 2000) << 10, records: self.rng.between(4, 400) };
                let now = MonoTime::from_ms(self.now_ms);
                let spec = group_spec(&self.host);
                let (target, ready) = Target::open(config, spec, source, box_time(self.now_ms), now);
                self.the_box.target = Some((number, target));
                if let (Message::StreamReady { resume, credit, .. }, Some(connection)) = (ready, &mut self.connection) {
                    connection.send_to_agent(self.now_ms, ToAgent::Ready { resume, credit });
                }
                Ok(())
            }
            ToBox::Message(message) => self.tell_target(TargetEvent::Message(&message)),
            ToBox::Frame { header, payload, after } => {
                let Some((_, target)) = &mut self.the_box.target else { return Ok(()) };
                let event = TargetEvent::Frame { header: &header, payload: &payload };
                let mut actions = Vec::new();
                target.on(event, MonoTime::from_ms(self.now_ms), box_time(self.now_ms), &mut actions);
                for action in actions {
                    match action {
                        TargetAction::Append { .. } | TargetAction::AppendMark { .. } => {
                            self.the_box.pending = Some((header.clone(), payload.clone(), after, action));
                            self.take_pending()?;
                        }
                        other => self.target_acts(other)?,
                    }
                }
                Ok(())
            }
        }
    }

    /// Each in its own time, from the newest state of that moment.
    fn answer_comparisons(&mut self) -> Result<(), Failure> {
        while let Some((lsn, _)) = self.the_box.compares.front()
            && *lsn <= self.the_box.store.progress().durable
            && !self.rng.one_in(3)
            && let Some((_, ask)) = self.the_box.compares.pop_front()
        {
            let volume = self.host.specs.iter().position(|spec| spec.id == ask.volume).unwrap_or(usize::MAX);
            let (rng, store) = (&mut self.rng, &mut self.the_box.store);
            let differ = ask.answer(|block, buf| match store.read_head(volume, block) {
                // Now and then a part of it cannot be read.
                Ok(bytes) if !rng.one_in(2000) => {
                    buf.copy_from_slice(&bytes);
                    true
                }
                Ok(_) | Err(_) => false,
            });
            self.summary.comparisons += 1;
            self.tell_target(TargetEvent::Compared { id: ask.id, differ })?;
        }
        Ok(())
    }

    /// Appends the frame that waits, if the store takes it.
    fn take_pending(&mut self) -> Result<(), Failure> {
        let Some((header, payload, after, action)) = self.the_box.pending.take() else { return Ok(()) };
        let stream = self.the_box.stream;
        let taken = match &action {
            TargetAction::AppendMark { mark, time, seq } => self.the_box.store.append_mark(mark, *time, stream, *seq),
            TargetAction::Append { time } => self.the_box.store.append(&header, &payload, *time, stream),
            TargetAction::SendAck(_)
            | TargetAction::Send(_)
            | TargetAction::Compare(_)
            | TargetAction::Refuse(_)
            | TargetAction::Proven { .. }
            | TargetAction::State(_) => return Ok(()),
        };
        match taken {
            Ok(lsn) => {
                let had = Lsn(self.the_box.log.len() as u64);
                if lsn != had.next() {
                    return Err(self.trace.fail(FailureKind::LsnJump { had, got: lsn }));
                }
                let mark = match &action {
                    TargetAction::AppendMark { mark, .. } => Some(mark),
                    _ => None,
                };
                if matches!(mark, Some(Mark::GapBegin { .. })) {
                    self.summary.gaps += 1;
                }
                self.the_box.note(mark, &header, after, stream);
                self.summary.records_appended += 1;
                self.tell_target(TargetEvent::Room(true))?;
                self.tell_target(TargetEvent::Appended { seq: header.seq, lsn })
            }
            Err(NotTaken::Dead(what)) => Err(self.trace.fail(FailureKind::StoreDied { what })),
            Err(reason) => {
                self.the_box.pending = Some((header, payload, after, action));
                if matches!(reason, NotTaken::Full) { self.tell_target(TargetEvent::Room(false)) } else { Ok(()) }
            }
        }
    }

    fn tell_target(&mut self, event: TargetEvent<'_>) -> Result<(), Failure> {
        let Some((_, target)) = &mut self.the_box.target else { return Ok(()) };
        let mut actions = std::mem::take(&mut self.the_box.actions);
        target.on(event, MonoTime::from_ms(self.now_ms), box_time(self.now_ms), &mut actions);
        for action in actions.drain(..) {
            self.target_acts(action)?;
        }
        self.the_box.actions = actions;
        Ok(())
    }

    fn target_acts(&mut self, action: TargetAction) -> Result<(), Failure> {
        if self.trace.on() {
            self.trace.line("target", "action", &format!("{action:?}"));
        }
        let number = self.the_box.target.as_ref().map(|(number, _)| *number);
        let connection = self.connection.as_mut().filter(|connection| Some(connection.number) == number);
        match action {
            TargetAction::SendAck(ack) => {
                if let Some(connection) = connection {
                    connection.send_to_agent(self.now_ms, ToAgent::Ack(ack));
                }
            }
            TargetAction::Send(message) => {
                if let Some(connection) = connection {
                    connection.send_to_agent(self.now_ms, ToAgent::Message(message));
                }
            }
            TargetAction::Refuse(refusal) if refusal.code == wire::RefuseCode::Silent => self.box_hears_end(),
            TargetAction::Refuse(refusal) => return Err(self.trace.fail(FailureKind::Refused { refusal })),
            TargetAction::Proven { .. } | TargetAction::State(_) => {}
            TargetAction::Append { .. } | TargetAction::AppendMark { .. } => {}
            TargetAction::Compare(ask) => {
                let lsn = self.the_box.store.progress().appended;
                self.the_box.compares.push_back((lsn, ask));
            }
        }
        Ok(())
    }

    // ---- what must hold -----------------------------------------------------------------------------------------------------------

    fn come_to_rest(&mut self) -> Result<(), Failure> {
        self.quiet = true;
        self.trace.line("world", "quiet", "");
        if self.connection.as_ref().is_some_and(|connection| connection.half_open) {
            self.trace.line("net", "half", "left to the silence rule");
        }
        self.with_agent(|agent, around| agent.on(Event::Pressure(Pressure::None), around))?;
        for _ in 0..REST_STEPS_MAX {
            self.step()?;
            let quiet_net = self.connection.as_ref().is_some_and(Connection::is_quiet);
            let idle = self.host.is_idle() && self.agent.as_ref().is_some_and(|agent| agent.is_idle(&self.host));
            if idle && quiet_net && self.the_box.pending.is_none() && self.host.flushes.is_empty() {
                return Ok(());
            }
        }
        let status = match &self.agent {
            Some(agent) => format!(
                "{:?}, {} flushes wait, quiet net {:?}",
                agent.source.status(),
                self.host.flushes.len(),
                self.connection.as_ref().map(Connection::is_quiet)
            ),
            None => "no agent".into(),
        };
        Err(self.trace.fail(FailureKind::NoRest { steps: REST_STEPS_MAX, status }))
    }

    fn check_head(&mut self) -> Result<(), Failure> {
        for volume in 0..self.host.disks.len() {
            let sectors = self.host.disks[volume].len() as u64;
            let bytes = self.the_box.store.read_head(volume, Extent::new(0, sectors)).map_err(|what| {
                self.trace.fail(FailureKind::Unreadable { lsn: self.the_box.store.progress().appended, what })
            })?;
            let mut want = [0; SECTOR as usize];
            for (sector, (tag, got)) in
                self.host.disks[volume].iter().zip(bytes.chunks_exact(SECTOR as usize)).enumerate()
            {
                fill_sector(*tag, &mut want);
                if got != want {
                    return Err(self.trace.fail(FailureKind::HeadDiffers { volume, sector: sector as u64 }));
                }
            }
        }
        Ok(())
    }

    /// Opens `count` recovery points at random, and the newest, and compares them with the oracle; and compares what is offered with
    /// what may be.
    fn check_points(&mut self, count: u64) -> Result<(), Failure> {
        let offered = self.the_box.store.offered();
        let first_kept = offered.first().map_or(Lsn::MAX, |(first, _)| *first);
        let written = self.the_box.store.progress().written;
        let is_offered = |lsn: Lsn| offered.iter().any(|(first, last)| *first <= lsn && lsn <= *last);
        for (at, logged) in self.the_box.log.iter().enumerate() {
            let lsn = Lsn(at as u64 + 1);
            if lsn > written {
                break;
            }
            if logged.in_gap && is_offered(lsn) {
                return Err(self.trace.fail(FailureKind::OfferedInGap { lsn }));
            }
            if logged.valid && lsn >= first_kept && !is_offered(lsn) {
                return Err(self.trace.fail(FailureKind::NotOffered { lsn }));
            }
        }
        let points: Vec<Lsn> = (1..=self.the_box.log.len() as u64)
            .map(Lsn)
            .filter(|lsn| *lsn <= written && self.the_box.log[lsn.0 as usize - 1].valid && is_offered(*lsn))
            .collect();
        let Some(newest) = points.last().copied() else { return Ok(()) };
        self.check_point(newest)?;
        // Where things go wrong: at both ends of a stretch between gaps.
        let is_edge = |lsn: &Lsn| {
            let at = lsn.0 as usize - 1;
            let neighbours = self.the_box.log[at.saturating_sub(1)..(at + 2).min(self.the_box.log.len())].iter();
            at == 0 || neighbours.clone().any(|logged| logged.in_gap)
        };
        let edges: Vec<Lsn> = points.iter().copied().filter(is_edge).collect();
        for turn in 0..count {
            let from = if turn % 2 == 0 && !edges.is_empty() { &edges } else { &points };
            let lsn = from[self.rng.below(from.len() as u64) as usize];
            self.check_point(lsn)?;
        }
        Ok(())
    }

    fn check_point(&mut self, lsn: Lsn) -> Result<(), Failure> {
        let request = self.the_box.log[lsn.0 as usize - 1].after;
        for volume in 0..self.host.disks.len() {
            let sectors = self.host.disks[volume].len() as u64;
            let extent = Extent::new(0, sectors);
            let read = self.the_box.store.read(lsn, volume, extent);
            let bytes = read.map_err(|what| self.trace.fail(FailureKind::Unreadable { lsn, what }))?;
            let mut want = [0; SECTOR as usize];
            for (sector, got) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                fill_sector(self.host.log.tag(volume, sector as u64, request), &mut want);
                if got != want {
                    let sector = sector as u64;
                    return Err(self.trace.fail(FailureKind::WrongImage { lsn, request, volume, sector }));
                }
            }
        }
        self.summary.points_checked += 1;
        Ok(())
    }

    fn check_neighbour(&mut self, moments: u64) -> Result<(), Failure> {
        let checked = self.the_box.store.check_neighbour(moments);
        checked.map_err(|what| self.trace.fail(FailureKind::Neighbour { what }))
    }

    /// A bit of the journal turns over while nothing happens. From then on every read is right or refused by name; the next start
    /// refuses by name or has everything that was durable; and the other group does not notice.
    fn rot(&mut self) -> Result<(), Failure> {
        let flipped = self.the_box.store.flip().map_err(|what| self.trace.fail(FailureKind::StoreDied { what }))?;
        let Some(Flipped { file, offset }) = flipped else { return Ok(()) };
        self.trace.line("disk", "flip", &format!("{file} at {offset:#x}"));
        self.summary.flips += 1;
        let mut named = self.right_or_refused()?;
        named |= !self.the_box.store.verify().is_empty();
        let durable = self.the_box.store.progress().durable;
        match self.the_box.store.restart(Down::InOrder, box_time(self.now_ms)) {
            Ok(()) => {
                let end = self.the_box.store.progress().appended;
                if end < durable {
                    let what = format!("it was durable to LSN {durable} and ends at {end}, with no word said");
                    return Err(self.trace.fail(FailureKind::Rot { file, offset, what }));
                }
                named |= self.right_or_refused()?;
                self.check_neighbour(4)?;
            }
            // The group stays closed until somebody acts, and says where it hurts.
            Err(what) if names(&what, &file) => {
                self.trace.line("box", "refuses", &what);
                self.summary.flips_refused_at_start += 1;
                named = true;
            }
            Err(what) => return Err(self.trace.fail(FailureKind::Rot { file, offset, what })),
        }
        self.summary.flips_named += u64::from(named);
        Ok(())
    }

    /// Reads the head and some moments: says whether one was refused, and fails where one is wrong.
    fn right_or_refused(&mut self) -> Result<bool, Failure> {
        let mut refused = false;
        for checked in [self.check_head(), self.check_points(6)] {
            match checked {
                Ok(()) => {}
                Err(Failure { kind: FailureKind::Unreadable { .. }, .. }) => refused = true,
                Err(other) => return Err(other),
            }
        }
        Ok(refused)
    }

    fn sum_up(mut self) -> Summary {
        if let Some(agent) = self.agent.take() {
            self.count_agent(&agent.counts());
        }
        let StoreCounts { segments, cut_tails, folds } = self.the_box.store.counts();
        Summary { captures_lost: self.host.lost, segments, cut_tails, folds, ..self.summary }
    }
}

/// Whether the text names the file, if only by its last part.
fn names(text: &str, file: &str) -> bool {
    file.rsplit('/').next().is_some_and(|name| text.contains(name))
}

impl BoxSide {
    /// Keeps the world's own record of an append.
    fn note(&mut self, mark: Option<&Mark>, header: &FrameHeader, after: Request, stream: StreamId) {
        let was_in_gap = self.log.last().is_none_or(|logged| logged.in_gap);
        let in_gap = match mark {
            Some(Mark::GapBegin { .. }) => true,
            Some(Mark::Consistent) => false,
            Some(_) | None => was_in_gap,
        };
        let valid = !in_gap && !header.flags.contains(WriteFlags::MORE);
        // A new stream's first mark changes nothing: it stands for what was there before.
        let before = self.log.last().map_or(0, |logged| logged.after);
        let after = if matches!(mark, Some(Mark::StreamBegin { .. })) { before } else { after };
        self.log.push(Logged { after, valid, in_gap, stream, seq: header.seq });
    }

    fn note_progress(&mut self) {
        let durable = self.store.progress().durable;
        if durable > self.durable {
            let new = &self.log[self.durable.0 as usize..(durable.0 as usize).min(self.log.len())];
            let covered = new.iter().rev().find(|logged| logged.valid).map_or(0, |logged| logged.after);
            self.covered = self.covered.max(covered);
            self.durable = durable;
        }
    }

    fn durable_position(&self) -> Option<(StreamId, SourceSeq)> {
        let at = (self.durable.0 as usize).min(self.log.len()).checked_sub(1)?;
        Some((self.log[at].stream, self.log[at].seq))
    }
}

fn draw_mode(rng: &mut Rng) -> SyncMode {
    let wait_ms_max = rng.between(20, 500);
    match rng.below(4) {
        0 => SyncMode::Sync { wait_ms_max, at_bound: Bound::Degrade },
        1 => SyncMode::Sync { wait_ms_max, at_bound: Bound::Hold },
        _ => SyncMode::Async,
    }
}

fn group_spec(host: &Host) -> GroupSpec {
    GroupSpec {
        id: Agent::group(),
        name: "simulated".into(),
        host: None,
        volumes: host.specs.clone(),
        policy: GroupPolicy::default(),
    }
}
