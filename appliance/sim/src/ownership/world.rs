//! The world: time, luck, and what must hold.

use super::clock::Clock;
use super::machine::{Address, ForAgent, Machine, Work};
use crate::TraceSink;
use crate::rng::Rng;
use model::{HostId, MonoTime, Owner, Term};
use replication::ownership::{
    DRIFT_PPM_MAX, EndedBy, Grantor, GrantorAction, GrantorEvent, Hold, Holder, HolderAction, HolderEvent,
    HolderRecord, HolderState, OwnershipRecord, RENEW_MS, Until, certain_ms,
};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use takeover::detect::{Cause, Channel, Damping, Detector, Policy, Verdict, Witness};
use wire::{LeaseAnswer, LeaseEnd, LeaseRequest, LeaseRules};

const MS: u64 = 1_000;
const SECOND: u64 = 1_000 * MS;
const HOST: HostId = HostId([1; 16]);
const STANDBY: Owner = Owner::Standby(HostId([2; 16]));
/// Faults of every kind.
const CHAOS: u64 = 90 * SECOND;
/// After it everything is mended; by then the host serves again.
const MENDED: u64 = 75 * SECOND;
/// Then partitions that must change nothing.
const PARTITIONS: u64 = 80 * SECOND;
/// And the end: the host dies, or is cut off.
const END: u64 = 60 * SECOND;
/// From the last beat to the decision, when the line was steady; the promise is six seconds from the death.
const DETECTED_MS: u64 = 6_000;
/// A box starts its machine, a standby its services, within this; and the polls in between.
const BEGUN_MS: u64 = 6_000;
const CHANNELS: [Channel; 3] = [Channel::Stream, Channel::Beat, Channel::Icmp];

/// A way to get it wrong, on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// The holder's clock is a fifth too slow: beyond what the protocol covers.
    ClockBeyondBound,
    /// The lease counts from its answer instead of its request.
    LeaseFromAnswer,
    /// The box reads its clock before the request arrives.
    GrantReadEarly,
    /// The next owner begins before it is stored that it is.
    OwnerNotStored,
    /// A host boots into serving although it is fenced.
    NoGate,
    /// An address stays although its lease has ended, while the agent cannot act.
    KernelForgets,
    /// A restarted box takes the past for the time of its last grant.
    RestartForgetsGrants,
    /// One silent channel is enough.
    OneChannelDecides,
    /// Nothing has to prove that the box is not cut off.
    NoUplinkProof,
    /// A standby boots into serving, whoever owns the host.
    StandbyUngated,
    /// A standby begins when the host is being taken from its owner, not when it is granted.
    StandbyBeginsEarly,
    /// What a standby holds is not waited for when the host gets its own back.
    StandbyNotWaitedFor,
}

impl Broken {
    pub const ALL: [Self; 12] = [
        Self::ClockBeyondBound,
        Self::LeaseFromAnswer,
        Self::GrantReadEarly,
        Self::OwnerNotStored,
        Self::NoGate,
        Self::KernelForgets,
        Self::RestartForgetsGrants,
        Self::OneChannelDecides,
        Self::NoUplinkProof,
        Self::StandbyUngated,
        Self::StandbyBeginsEarly,
        Self::StandbyNotWaitedFor,
    ];
}

/// What a run may be told.
#[derive(Clone, Copy, Default, Debug)]
pub struct Options {
    pub broken: Option<Broken>,
}

macro_rules! summary {
    ($($name:ident)*) => {
        /// What happened in a run.
        #[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
        pub struct Summary {
            $(pub $name: u64,)*
        }
        impl Summary {
            /// Adds another run's.
            pub fn add(&mut self, other: &Summary) {
                $(self.$name += other.$name;)*
            }
            /// Every count with its name.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

summary! {
    events cuts lossy pauses freezes agent_crashes crashes_between_actions power_cuts box_crashes box_pauses
    box_power_cuts grants revokes releases ended_by_release ended_by_silence abandoned armed disarmed
    moves_to_box moves_to_standby moves_to_host from_standby_to_host from_standby_to_box standby_served leases_ran_out last_resorts gates kernel_ended
    partitions_without_takeover box_cut_off deaths deaths_in_six_seconds isolations decisions doubts
}

/// What did not hold.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FailureKind {
    #[error("{first} and {second} serve at once, in term {term}")]
    TwoServe { first: Owner, second: Owner, term: Term },
    #[error("a takeover was decided although {channel} had brought a beat {ago_ms} ms before")]
    FalseTakeover { channel: Channel, ago_ms: u64 },
    #[error("a takeover was decided while {what}")]
    TakeoverWhile { what: &'static str },
    #[error("everything is well, but {what}")]
    NotBackToRest { what: String },
    #[error("the host died {ms} ms ago and nothing was decided: {decision}")]
    NotDetected { ms: u64, decision: String },
    #[error("the host died {ms} ms ago and nobody serves")]
    NotTakenOver { ms: u64 },
}

/// A run that failed, with the line that repeats it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub seed: u64,
    pub at_ms: u64,
    pub kind: FailureKind,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ms: {}\n  repeat: cargo xtask sim --ownership --seed {} --trace",
            self.at_ms, self.kind, self.seed
        )
    }
}

impl std::error::Error for Failure {}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Node {
    Box,
    Host,
    Standby,
    Gateway,
}

/// What can be cut by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Control,
    Beat,
    Ping,
}
const CLASSES: [Class; 3] = [Class::Control, Class::Beat, Class::Ping];

#[derive(Clone, Copy, Debug)]
enum Packet {
    Lease { from: Owner, request: LeaseRequest },
    Released { from: Owner, end: LeaseEnd },
    Answer(LeaseAnswer),
    Revoke(LeaseEnd),
    Beat,
    Ping,
    Pong { from: Node },
}

impl Packet {
    fn class(&self) -> Class {
        match self {
            Self::Lease { .. } | Self::Released { .. } | Self::Answer(_) | Self::Revoke(_) => Class::Control,
            Self::Beat => Class::Beat,
            Self::Ping | Self::Pong { .. } => Class::Ping,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum ForBox {
    Packet(Packet),
    Second,
    Look,
    Timer,
    /// Its machine is up, or has stopped.
    Serves,
    Stopped,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Arrive { to: Node, packet: Packet },
    Agent { who: usize, life: u64, what: ForAgent },
    Box { life: u64, what: ForBox },
    StartAgent { who: usize },
    PowerOn { who: usize },
    Resume { who: usize },
    StartBox,
    ResumeBox,
    Mend { number: u64 },
    Fault,
    Phase(Phase),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Chaos,
    Mended,
    Partitions,
    End,
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct Line {
    cut: bool,
    lossy: bool,
}

struct BoxNode {
    clock: Clock,
    runs: bool,
    paused: bool,
    life: u64,
    /// What survives; what the daemon goes by is the same, unless it is broken.
    disk: OwnershipRecord,
    stored: OwnershipRecord,
    grantor: Option<Grantor>,
    detector: Option<Detector>,
    /// Its own machine serves, whether the daemon runs or not.
    serves: bool,
    waiting: Vec<ForBox>,
}

struct World {
    now: u64,
    broken: Option<Broken>,
    trace: Option<TraceSink>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    /// What the queue's numbers stand for.
    pending: Vec<Option<What>>,
    free: Vec<usize>,
    numbers: u64,
    net: Rng,
    luck: Rng,
    work: Rng,
    phase: Phase,
    rules: LeaseRules,
    target: Owner,
    abandons: bool,
    /// From, to, class.
    lines: [[[Line; 3]; 4]; 4],
    /// What a fault cut, by its number.
    cuts: Vec<(u64, usize, usize, usize, bool)>,
    machines: [Machine; 2],
    boxx: BoxNode,
    /// When each channel brought something to the box's door, true time.
    arrived: [u64; 3],
    decided: Option<u64>,
    died: Option<u64>,
    steady: bool,
    summary: Summary,
    failure: Option<FailureKind>,
}

/// Lives through one world.
pub fn run(seed: u64) -> Result<Summary, Failure> {
    run_with(seed, Options::default(), None)
}

/// The same, otherwise or watched.
pub fn run_with(seed: u64, options: Options, trace: Option<TraceSink>) -> Result<Summary, Failure> {
    let mut world = World::new(seed, options, trace);
    world.begin();
    while let Some(Reverse((at, key))) = world.queue.pop() {
        world.now = at;
        let slot = (key & 0xFFFF) as usize;
        let Some(what) = world.pending[slot].take() else { continue };
        world.free.push(slot);
        world.summary.events += 1;
        world.on(what);
        world.check();
        if let Some(kind) = world.failure.take() {
            return Err(Failure { seed, at_ms: world.now / MS, kind });
        }
        if world.phase == Phase::Over {
            break;
        }
    }
    Ok(world.summary)
}

impl World {
    fn new(seed: u64, options: Options, trace: Option<TraceSink>) -> Self {
        let mut luck = Rng::new(seed, 21);
        let bound = DRIFT_PPM_MAX as i64;
        let mut clock = |beyond: bool| {
            let ppm = match luck.below(4) {
                _ if beyond => -200_000,
                0 => bound,
                1 => -bound,
                _ => luck.between(0, 2 * bound as u64) as i64 - bound,
            };
            Clock::new(0, luck.between(1, 10_000_000), ppm)
        };
        let beyond = options.broken == Some(Broken::ClockBeyondBound);
        let (host, standby, of_box) = (clock(beyond), clock(beyond), clock(false));
        let lease_ms = luck.between(5, 15) * 1000;
        let rules = LeaseRules { lease_ms, stop_ms: luck.between(1000, lease_ms - 3000) };
        Self {
            now: 0,
            broken: options.broken,
            trace,
            queue: BinaryHeap::new(),
            pending: Vec::new(),
            free: Vec::new(),
            numbers: 0,
            net: Rng::new(seed, 22),
            work: Rng::new(seed, 23),
            phase: Phase::Chaos,
            rules,
            target: if luck.one_in(2) { STANDBY } else { Owner::Box },
            abandons: luck.one_in(2),
            luck,
            lines: Default::default(),
            cuts: Vec::new(),
            machines: [
                Machine::new(Owner::Host, host, HolderRecord::UNFENCED),
                Machine::new(STANDBY, standby, HolderRecord::STANDBY),
            ],
            boxx: BoxNode {
                clock: of_box,
                runs: false,
                paused: false,
                life: 0,
                disk: OwnershipRecord::new(HOST),
                stored: OwnershipRecord::new(HOST),
                grantor: None,
                detector: None,
                serves: false,
                waiting: Vec::new(),
            },
            arrived: [0; 3],
            decided: None,
            died: None,
            steady: false,
            summary: Summary::default(),
            failure: None,
        }
    }

    fn begin(&mut self) {
        self.at(0, What::StartBox);
        self.at(5 * MS, What::StartAgent { who: 0 });
        self.at(10 * MS, What::StartAgent { who: 1 });
        self.at(5 * SECOND, What::Fault);
        self.at(CHAOS, What::Phase(Phase::Mended));
        self.at(CHAOS + MENDED, What::Phase(Phase::Partitions));
        self.at(CHAOS + MENDED + PARTITIONS, What::Phase(Phase::End));
        self.at(CHAOS + MENDED + PARTITIONS + END, What::Phase(Phase::Over));
    }

    fn line(&mut self, who: &str, what: &str, detail: impl fmt::Debug) {
        if let Some(sink) = &mut self.trace {
            sink(&format!("{:>8}  {who:<8} {what:<9} {detail:?}", self.now / MS));
        }
    }
    fn fail(&mut self, kind: FailureKind) {
        self.failure.get_or_insert(kind);
    }
    /// In so many microseconds.
    fn at(&mut self, after: u64, what: What) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[slot] = Some(what);
        self.numbers += 1;
        self.queue.push(Reverse((self.now + after, self.numbers << 16 | slot as u64)));
    }

    fn on(&mut self, what: What) {
        match what {
            What::Arrive { to, packet } => self.arrive(to, packet),
            What::Agent { who, life, what } => self.agent(who, life, what),
            What::Box { life, what } => self.boxed(life, what),
            What::StartAgent { who } => self.start_agent(who),
            What::PowerOn { who } => self.power_on(who),
            What::Resume { who } => self.resume(who),
            What::StartBox => self.start_box(),
            What::ResumeBox => self.resume_box(),
            What::Mend { number } => self.mend(number),
            What::Fault => self.fault(),
            What::Phase(phase) => self.enter(phase),
        }
    }

    /// The one thing that must never be.
    fn check(&mut self) {
        let mut serving = None;
        let owners = [
            (Owner::Host, self.machines[0].serves(self.now)),
            (STANDBY, self.machines[1].serves(self.now)),
            (Owner::Box, self.boxx.serves),
        ];
        for (owner, serves) in owners {
            match serving {
                Some(first) if serves => {
                    let term = self.boxx.stored.term;
                    return self.fail(FailureKind::TwoServe { first, second: owner, term });
                }
                None if serves => serving = Some(owner),
                _ => {}
            }
        }
    }
}

// --- the network -----------------------------------------------------------------------------------------------------------

impl World {
    fn send(&mut self, from: Node, to: Node, packet: Packet) {
        let line = self.lines[from as usize][to as usize][packet.class() as usize];
        if line.cut {
            return;
        }
        let copies = match line.lossy {
            true => [0, 1, 1, 2][self.net.below(4) as usize],
            false => 1,
        };
        for _ in 0..copies {
            let late = if line.lossy { self.net.below(6 * SECOND) } else { self.net.between(50, 20 * MS) };
            self.at(late, What::Arrive { to, packet });
        }
    }

    fn arrive(&mut self, to: Node, packet: Packet) {
        match to {
            Node::Gateway => self.send(Node::Gateway, Node::Box, Packet::Pong { from: Node::Gateway }),
            Node::Box => {
                let channel = match packet {
                    Packet::Lease { from: Owner::Host, .. } => Some(0),
                    Packet::Beat => Some(1),
                    Packet::Pong { from: Node::Host } => Some(2),
                    _ => None,
                };
                if let Some(channel) = channel {
                    self.arrived[channel] = self.now;
                }
                self.boxed(self.boxx.life, ForBox::Packet(packet));
            }
            Node::Host | Node::Standby => {
                let who = to as usize - Node::Host as usize;
                let what = match packet {
                    Packet::Ping => {
                        if self.machines[who].kernel_runs() {
                            self.send(to, Node::Box, Packet::Pong { from: to });
                        }
                        return;
                    }
                    Packet::Answer(answer) => ForAgent::Answer(answer),
                    Packet::Revoke(end) => ForAgent::Revoke(end),
                    _ => return,
                };
                self.agent(who, self.machines[who].life, what);
            }
        }
    }

    fn cut(&mut self, from: Node, to: Node, class: Class, lossy: bool, number: u64) {
        let (from, to, class) = (from as usize, to as usize, class as usize);
        let line = &mut self.lines[from][to][class];
        *(if lossy { &mut line.lossy } else { &mut line.cut }) = true;
        self.cuts.push((number, from, to, class, lossy));
    }

    fn mend(&mut self, number: u64) {
        self.cuts.retain(|cut| cut.0 != number);
        self.lines = Default::default();
        for (_, from, to, class, lossy) in &self.cuts {
            let line = &mut self.lines[*from][*to][*class];
            *(if *lossy { &mut line.lossy } else { &mut line.cut }) = true;
        }
    }
}

// --- hosts and their agents -------------------------------------------------------------------------------------------------

const NODES: [Node; 2] = [Node::Host, Node::Standby];
const NAMES: [&str; 2] = ["host", "standby"];

impl World {
    const UNGATED: [Broken; 2] = [Broken::NoGate, Broken::StandbyUngated];

    fn start_agent(&mut self, who: usize) {
        let nonce = self.work.next();
        let broken = self.broken;
        let machine = &mut self.machines[who];
        if !machine.power || machine.agent.is_some() {
            return;
        }
        machine.life += 1;
        machine.paused = false;
        machine.waiting.clear();
        let now = machine.clock.read(self.now);
        // Without the gate nothing that has come up is taken down again either.
        let ungated = broken == Some(Self::UNGATED[who]) && machine.run.is_none();
        let stored = if ungated { HolderRecord { fenced: false, ..machine.stored } } else { machine.stored };
        let (holder, actions) = Holder::new(HOST, stored, machine.run, nonce, 1_000, now);
        machine.agent = Some(holder);
        let (life, frozen) = (machine.life, machine.frozen);
        self.line(NAMES[who], "agent", "starts");
        if frozen {
            self.machines[who].agent = None;
            return self.at(SECOND, What::StartAgent { who });
        }
        self.act(who, actions);
        self.at(self.work.clone().below(SECOND), What::Agent { who, life, what: ForAgent::Second });
    }

    fn crash_agent(&mut self, who: usize) {
        let machine = &mut self.machines[who];
        if machine.agent.take().is_none() {
            return;
        }
        machine.life += 1;
        machine.paused = false;
        machine.waiting.clear();
        self.summary.agent_crashes += 1;
        self.line(NAMES[who], "agent", "is killed");
        if self.machines[who].power {
            let after = self.work.between(100 * MS, 3 * SECOND);
            self.at(after, What::StartAgent { who });
        }
    }

    fn power_off(&mut self, who: usize) {
        self.crash_agent(who);
        let machine = &mut self.machines[who];
        machine.power = false;
        machine.frozen = false;
        machine.run = None;
        machine.address = Address::Down;
        self.line(NAMES[who], "power", "off");
    }

    fn power_on(&mut self, who: usize) {
        if self.machines[who].power {
            return;
        }
        let origin = self.work.between(1, 100_000);
        let gate = self.broken != Some(Self::UNGATED[who]);
        let machine = &mut self.machines[who];
        machine.power = true;
        machine.clock = machine.clock.booted(self.now, origin);
        // The gate: what is fenced comes up only when its agent is told so.
        let opens = !machine.stored.fenced || !gate;
        machine.address = if opens { Address::Forever } else { Address::Down };
        self.summary.gates += u64::from(!opens);
        self.line(NAMES[who], "power", "on");
        self.at(200 * MS, What::StartAgent { who });
    }

    fn resume(&mut self, who: usize) {
        let machine = &mut self.machines[who];
        if !machine.frozen && !machine.paused {
            return;
        }
        let dead = matches!(machine.address, Address::Until(end) if machine.clock.read(self.now) >= end);
        self.summary.kernel_ended += u64::from(dead);
        machine.frozen = false;
        machine.paused = false;
        let (life, waiting) = (machine.life, std::mem::take(&mut machine.waiting));
        self.line(NAMES[who], "resumes", waiting.len());
        for what in waiting {
            self.agent(who, life, what);
        }
    }

    /// Something for an agent: now if it runs, when it runs again if it is stopped.
    fn agent(&mut self, who: usize, life: u64, what: ForAgent) {
        let machine = &mut self.machines[who];
        if machine.life != life || machine.agent.is_none() {
            return;
        }
        if !machine.runs() {
            return machine.waiting.push(what);
        }
        let now = machine.clock.read(self.now);
        let Some(holder) = machine.agent.as_mut() else { return };
        let actions = match what {
            ForAgent::Answer(answer) => holder.on(HolderEvent::Answer(answer), now),
            ForAgent::Revoke(end) => holder.on(HolderEvent::Revoke(end), now),
            ForAgent::Timer => holder.on(HolderEvent::Tick, now),
            ForAgent::Second => return self.second(who, life),
            ForAgent::Work(work) => return self.work_done(who, work),
        };
        self.act(who, actions);
    }

    fn second(&mut self, who: usize, life: u64) {
        let machine = &mut self.machines[who];
        let now = machine.clock.read(self.now);
        let late = if self.broken == Some(Broken::LeaseFromAnswer) { 4_000 } else { 0 };
        let Some(holder) = machine.agent.as_mut() else { return };
        let actions = holder.on(HolderEvent::Tick, now);
        let request = holder.request(now.plus_ms(late));
        let from = machine.owner;
        self.act(who, actions);
        self.send(NODES[who], Node::Box, Packet::Lease { from, request });
        if who == 0 {
            self.send(Node::Host, Node::Box, Packet::Beat);
        }
        self.at(RENEW_MS * MS, What::Agent { who, life, what: ForAgent::Second });
    }

    fn act(&mut self, who: usize, actions: Vec<HolderAction>) {
        for action in actions {
            // Killed between any two.
            if self.phase == Phase::Chaos && self.luck.one_in(400) {
                self.summary.crashes_between_actions += 1;
                return self.crash_agent(who);
            }
            self.act_one(who, action);
        }
        self.set_timer(who);
    }

    fn set_timer(&mut self, who: usize) {
        let machine = &self.machines[who];
        let Some(at) = machine.agent.as_ref().and_then(Holder::next_tick) else { return };
        let (life, when) = (machine.life, machine.clock.when(at).max(self.now));
        // One for each change is many; the one that is due does the work and the others find nothing to do. A second's requests tick too, so
        // only what is due before the next of them needs its own.
        if when < self.now + RENEW_MS * MS {
            self.at(when - self.now, What::Agent { who, life, what: ForAgent::Timer });
        }
    }

    fn act_one(&mut self, who: usize, action: HolderAction) {
        if self.trace.is_some() && !matches!(action, HolderAction::Extend { .. } | HolderAction::Remember(Some(_))) {
            self.line(NAMES[who], "does", action);
        }
        let machine = &mut self.machines[who];
        let life = machine.life;
        let work = |after: u64, work: Work| (after, What::Agent { who, life, what: ForAgent::Work(work) });
        let todo = match action {
            HolderAction::Persist(record) => {
                machine.stored = record;
                None
            }
            HolderAction::Remember(run) => {
                machine.run = run;
                None
            }
            HolderAction::Extend { until } => {
                if self.machines[who].serves(self.now) {
                    self.machines[who].address = self.lasting(until);
                }
                None
            }
            HolderAction::Raise { order, .. } => Some(work(self.work.between(20 * MS, 1_500 * MS), Work::Up { order })),
            HolderAction::Stop { order, why, .. } => {
                self.summary.leases_ran_out += u64::from(why == replication::ownership::StopReason::LeaseRanOut);
                let down = self.work.between(MS, 60 * MS);
                let hangs = self.work.one_in(6);
                let stopped = if hangs { 40 * SECOND } else { down + self.work.between(MS, 900 * MS) };
                let (after, what) = work(stopped, Work::Stopped { order });
                self.at(after, what);
                let work = |after: u64, work: Work| (after, What::Agent { who, life, what: ForAgent::Work(work) });
                // What hangs may hang at the address already.
                let down = if hangs && self.work.one_in(3) { stopped } else { down };
                Some(work(down, Work::AddressDown { order }))
            }
            HolderAction::LastResort { order } => {
                self.summary.last_resorts += 1;
                machine.address = Address::Down;
                Some(work(MS, Work::Stopped { order }))
            }
            HolderAction::Released(end) => {
                self.summary.releases += 1;
                let from = machine.owner;
                self.send(NODES[who], Node::Box, Packet::Released { from, end });
                None
            }
        };
        if let Some((after, what)) = todo {
            self.at(after, what);
        }
    }

    fn lasting(&self, until: Until) -> Address {
        match until {
            Until::Forever => Address::Forever,
            Until::At { .. } if self.broken == Some(Broken::KernelForgets) => Address::Forever,
            Until::At { end, .. } => Address::Until(end),
        }
    }

    fn work_done(&mut self, who: usize, work: Work) {
        let machine = &self.machines[who];
        let now = machine.clock.read(self.now);
        let Some(state) = machine.agent.as_ref().map(Holder::state) else { return };
        let event = match (work, state) {
            (Work::Up { order }, HolderState::Raising { until, order: current }) if order == current => {
                if !until.has_ended(now) {
                    self.machines[who].address = self.lasting(until);
                    self.summary.standby_served += u64::from(who == 1);
                }
                HolderEvent::Raised { order }
            }
            (Work::AddressDown { order }, HolderState::Stopping { order: current, .. }) if order == current => {
                self.machines[who].address = Address::Down;
                return;
            }
            (Work::Stopped { order }, HolderState::Stopping { order: current, .. }) if order == current => {
                self.machines[who].address = Address::Down;
                HolderEvent::Stopped { order }
            }
            _ => return,
        };
        let actions = self.machines[who].agent.as_mut().map_or_else(Vec::new, |h| h.on(event, now));
        self.act(who, actions);
    }
}

// --- the box ---------------------------------------------------------------------------------------------------------------

impl World {
    fn policy(&self) -> Policy {
        let mut policy = Policy {
            automatic: true,
            grace_ms: 10_000,
            damping: Damping { window_ms: 25_000, hold_ms_max: 8_000 },
            ..Policy::default()
        };
        match self.broken {
            Some(Broken::OneChannelDecides) => policy.channels.truncate(1),
            Some(Broken::NoUplinkProof) => {
                policy.uplink.others_min = 0;
                policy.uplink.gateway = false;
                // Refused by the policy's own check unless a person has the last word; the world then presses for it.
                policy.automatic = false;
            }
            _ => {}
        }
        policy
    }

    fn start_box(&mut self) {
        if self.boxx.runs {
            return;
        }
        let policy = self.policy();
        let boxx = &mut self.boxx;
        boxx.runs = true;
        boxx.paused = false;
        boxx.life += 1;
        boxx.waiting.clear();
        let now = boxx.clock.read(self.now);
        let life = boxx.life;
        let granted = if self.broken == Some(Broken::RestartForgetsGrants) { MonoTime(0) } else { now };
        boxx.stored = boxx.disk;
        match (Grantor::new(boxx.stored, granted), Detector::new(policy, now)) {
            (Ok(grantor), Ok(detector)) => {
                boxx.grantor = Some(grantor);
                boxx.detector = Some(detector);
            }
            other => unreachable!("rules and policy of the world are good: {other:?}"),
        }
        self.line("box", "starts", self.boxx.stored);
        self.own_machine();
        for what in [ForBox::Second, ForBox::Look, ForBox::Timer] {
            self.at(MS, What::Box { life, what });
        }
    }

    fn crash_box(&mut self) {
        let boxx = &mut self.boxx;
        if !boxx.runs {
            return;
        }
        boxx.runs = false;
        boxx.paused = false;
        boxx.life += 1;
        boxx.waiting.clear();
        (boxx.grantor, boxx.detector) = (None, None);
        self.summary.box_crashes += 1;
        self.line("box", "is killed", ());
        let after = self.luck.between(50 * MS, 8 * SECOND);
        self.at(after, What::StartBox);
    }

    fn resume_box(&mut self) {
        if !self.boxx.paused {
            return;
        }
        self.boxx.paused = false;
        let (life, mut waiting) = (self.boxx.life, std::mem::take(&mut self.boxx.waiting));
        // Whoever decides has read what has arrived.
        waiting.sort_by_key(|what| !matches!(what, ForBox::Packet(_)));
        self.line("box", "resumes", waiting.len());
        waiting.into_iter().for_each(|what| self.boxed(life, what));
    }

    /// What the record says of the box's own machine is made true.
    fn own_machine(&mut self) {
        let (record, life) = (self.boxx.stored, self.boxx.life);
        let ours = record.owner == Owner::Box;
        let moving = matches!(record.hold, Hold::Moving { .. });
        let what = match (ours, moving, self.boxx.serves) {
            (true, false, false) => ForBox::Serves,
            (true, true, _) => ForBox::Stopped,
            _ => return,
        };
        let after = self.work.between(50 * MS, 1_500 * MS);
        self.at(after, What::Box { life, what });
    }

    fn boxed(&mut self, life: u64, what: ForBox) {
        if self.boxx.life != life || !self.boxx.runs {
            return;
        }
        if self.boxx.paused {
            return self.boxx.waiting.push(what);
        }
        let now = self.boxx.clock.read(self.now);
        match what {
            ForBox::Packet(packet) => self.box_hears(packet, now),
            ForBox::Second => {
                for to in [Node::Host, Node::Gateway] {
                    self.send(Node::Box, to, Packet::Ping);
                }
                self.at(RENEW_MS * MS, What::Box { life, what });
            }
            ForBox::Look => {
                self.send(Node::Box, Node::Gateway, Packet::Ping);
                self.look(now);
                self.at(250 * MS, What::Box { life, what });
            }
            ForBox::Timer => {
                self.grantor_event(GrantorEvent::Tick, now);
                if self.boxx.life == life {
                    self.box_timer();
                }
            }
            ForBox::Serves => {
                let record = self.boxx.stored;
                if record.owner == Owner::Box && !matches!(record.hold, Hold::Moving { .. }) {
                    self.boxx.serves = true;
                    self.line("box", "serves", record.term);
                }
            }
            ForBox::Stopped => {
                self.boxx.serves = false;
                self.grantor_event(GrantorEvent::BoxStopped, now);
            }
        }
    }

    fn box_timer(&mut self) {
        let Some(at) = self.boxx.grantor.as_ref().and_then(Grantor::next_tick) else { return };
        let when = self.boxx.clock.when(at).max(self.now + 1);
        self.at(when - self.now, What::Box { life: self.boxx.life, what: ForBox::Timer });
    }

    fn box_hears(&mut self, packet: Packet, now: MonoTime) {
        let Some(detector) = self.boxx.detector.as_mut() else { return };
        match packet {
            Packet::Lease { from, request } => {
                if from == Owner::Host {
                    detector.heard(Channel::Stream, now);
                }
                let early = if self.broken == Some(Broken::GrantReadEarly) { 4_000_000_000 } else { 0 };
                self.grantor_event(GrantorEvent::Request { from, request }, MonoTime(now.0 - early.min(now.0)));
            }
            Packet::Released { from, end } => self.grantor_event(GrantorEvent::Released { from, end }, now),
            Packet::Beat => detector.heard(Channel::Beat, now),
            Packet::Pong { from: Node::Gateway } => detector.witness(Witness::Gateway, now),
            Packet::Pong { .. } => detector.heard(Channel::Icmp, now),
            Packet::Answer(_) | Packet::Revoke(_) | Packet::Ping => {}
        }
    }

    fn grantor_event(&mut self, event: GrantorEvent, now: MonoTime) {
        let Some(grantor) = self.boxx.grantor.as_mut() else { return };
        let actions = grantor.on(event, now);
        self.box_acts(actions);
    }

    fn box_acts(&mut self, actions: Vec<GrantorAction>) {
        for action in actions {
            if self.phase == Phase::Chaos && self.luck.one_in(600) {
                self.summary.crashes_between_actions += 1;
                return self.crash_box();
            }
            let node = |to: Owner| if to == Owner::Host { Node::Host } else { Node::Standby };
            match action {
                GrantorAction::Persist(record) => {
                    self.line("box", "stores", record);
                    let moves = matches!(record.hold, Hold::Moving { .. });
                    let from_standby = matches!(self.boxx.stored.owner, Owner::Standby(_));
                    self.summary.from_standby_to_host += u64::from(from_standby && record.owner == Owner::Host);
                    self.summary.from_standby_to_box += u64::from(from_standby && record.owner == Owner::Box);
                    let begins = matches!(record.hold, Hold::Moving { to: Owner::Standby(_), .. });
                    if begins && self.broken == Some(Broken::StandbyBeginsEarly) && self.machines[1].runs() {
                        self.machines[1].address = Address::Forever;
                    }
                    let lost = self.broken == Some(Broken::OwnerNotStored) && record.owner != self.boxx.disk.owner;
                    self.boxx.stored = record;
                    if !lost {
                        self.boxx.disk = record;
                    }
                    if moves {
                        self.own_machine();
                    }
                    self.box_timer();
                }
                GrantorAction::Answer { to, answer } => {
                    self.summary.grants += u64::from(matches!(answer.verdict, wire::LeaseVerdict::Granted(_)));
                    self.send(Node::Box, node(to), Packet::Answer(answer));
                }
                GrantorAction::Revoke { to, end } => {
                    self.summary.revokes += 1;
                    self.send(Node::Box, node(to), Packet::Revoke(end));
                }
                GrantorAction::Owned { owner, by, .. } => {
                    *(match by {
                        EndedBy::Release => &mut self.summary.ended_by_release,
                        EndedBy::Silence | EndedBy::Power => &mut self.summary.ended_by_silence,
                    }) += 1;
                    *(match owner {
                        Owner::Box => &mut self.summary.moves_to_box,
                        Owner::Host => &mut self.summary.moves_to_host,
                        Owner::Standby(_) => &mut self.summary.moves_to_standby,
                    }) += 1;
                    self.line("box", "owned by", (owner, by));
                    self.own_machine();
                }
                GrantorAction::Behind { from, theirs } => {
                    let what = format!("{from} has seen term {theirs}, which this box has not");
                    self.fail(FailureKind::NotBackToRest { what });
                }
            }
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut Grantor) -> Option<Vec<GrantorAction>>) -> bool {
        if !self.boxx.runs || self.boxx.paused {
            return false;
        }
        let done = self.boxx.grantor.as_mut().and_then(change);
        let changed = done.is_some();
        self.box_acts(done.unwrap_or_default());
        changed
    }

    fn look(&mut self, now: MonoTime) {
        let record = self.boxx.stored;
        let (Some(detector), Some(grantor)) = (self.boxx.detector.as_mut(), self.boxx.grantor.as_ref()) else { return };
        let decision = detector.decide(now);
        let forced = self.broken == Some(Broken::NoUplinkProof)
            && decision.verdict == Verdict::Doubt(takeover::detect::Doubt::NotAutomatic);
        let takes = decision.verdict == Verdict::Takeover(Cause::HostSilent) || forced;
        self.summary.doubts += u64::from(matches!(decision.verdict, Verdict::Doubt(_)));
        if record.owner != Owner::Host {
            return;
        }
        let moving = matches!(record.hold, Hold::Moving { .. });
        if moving && self.abandons && decision.verdict == Verdict::Well {
            self.summary.abandoned += 1;
            self.line("box", "abandons", ());
            self.change(|g| g.abandon().ok());
            return;
        }
        if !takes || moving {
            return;
        }
        let armed = grantor.can_expire();
        self.judge(decision.to_string());
        if armed {
            self.summary.decisions += 1;
            let (to, rules) = (self.target, (self.target != Owner::Box).then_some(self.rules));
            self.change(|g| g.begin_move(to, rules).ok());
            if let Some(detector) = self.boxx.detector.as_mut() {
                detector.settled();
            }
        }
    }

    /// A takeover is decided: by what came to the box's door, may it be?
    fn judge(&mut self, decision: String) {
        self.line("box", "decides", decision);
        for (channel, arrived) in CHANNELS.iter().zip(self.arrived) {
            let ago_ms = (self.now - arrived) / MS;
            if ago_ms < 3_500 {
                return self.fail(FailureKind::FalseTakeover { channel: *channel, ago_ms });
            }
        }
        match self.phase {
            Phase::Chaos => {}
            // What came before is still being mended.
            Phase::Mended if self.now < CHAOS + MENDED / 2 => {}
            Phase::Mended => self.fail(FailureKind::TakeoverWhile { what: "all is mended" }),
            Phase::Partitions => {
                self.fail(FailureKind::TakeoverWhile { what: "a channel comes through or the box is cut off" })
            }
            Phase::End | Phase::Over => {
                self.decided.get_or_insert(self.now);
            }
        }
    }
}

// --- what happens to them --------------------------------------------------------------------------------------------------

impl World {
    fn fault(&mut self) {
        let number = self.numbers;
        match self.phase {
            Phase::Chaos => {
                self.chaos(number);
                let next = self.luck.between(100 * MS, 6 * SECOND);
                self.at(next, What::Fault);
            }
            Phase::Partitions => self.partition(number),
            Phase::Mended | Phase::End | Phase::Over => {}
        }
    }

    fn chaos(&mut self, number: u64) {
        let long = self.luck.between(200 * MS, 25 * SECOND);
        let who = usize::from(self.luck.one_in(3));
        let other = NODES[who];
        match self.luck.below(20) {
            0..=2 => {
                self.summary.cuts += 1;
                let both = self.luck.one_in(2);
                let reverse = self.luck.one_in(2);
                for class in CLASSES {
                    if both || !reverse {
                        self.cut(Node::Box, other, class, false, number);
                    }
                    if both || reverse {
                        self.cut(other, Node::Box, class, false, number);
                    }
                }
                self.at(long, What::Mend { number });
            }
            3..=5 => {
                self.summary.lossy += 1;
                for class in CLASSES {
                    self.cut(Node::Box, other, class, true, number);
                    self.cut(other, Node::Box, class, true, number);
                }
                self.at(long, What::Mend { number });
            }
            6 => {
                self.summary.cuts += 1;
                let class = CLASSES[self.luck.below(3) as usize];
                self.cut(other, Node::Box, class, false, number);
                self.at(long, What::Mend { number });
            }
            7 => {
                self.summary.cuts += 1;
                self.cut_off_box(number);
                self.at(long, What::Mend { number });
            }
            8 | 9 => self.pause(who, long),
            10 => {
                self.summary.freezes += 1;
                self.machines[who].frozen = self.machines[who].power;
                self.line(NAMES[who], "freezes", long / MS);
                self.at(long, What::Resume { who });
            }
            11 => self.crash_agent(who),
            12 | 13 => {
                self.summary.power_cuts += 1;
                self.power_off(who);
                let back = self.luck.between(2 * SECOND, 25 * SECOND);
                self.at(back, What::PowerOn { who });
            }
            14 => self.crash_box(),
            15 => {
                self.summary.box_pauses += 1;
                self.boxx.paused = self.boxx.runs;
                self.line("box", "pauses", long / MS);
                self.at(long, What::ResumeBox);
            }
            16 => {
                // Power: its machine goes too, and its clock begins anew.
                self.summary.box_power_cuts += 1;
                self.crash_box();
                self.boxx.serves = false;
                let origin = self.work.between(1, 100_000);
                self.boxx.clock = self.boxx.clock.booted(self.now, origin);
            }
            _ => self.operator(),
        }
    }

    fn pause(&mut self, who: usize, long: u64) {
        if self.machines[who].agent.is_some() {
            self.summary.pauses += 1;
            self.machines[who].paused = true;
            self.line(NAMES[who], "pauses", long / MS);
            self.at(long, What::Resume { who });
        }
    }

    fn operator(&mut self) {
        let rules = self.rules;
        let to = [Owner::Host, Owner::Box, STANDBY][self.luck.below(3) as usize];
        match self.luck.below(6) {
            0 => self.summary.armed += u64::from(self.change(|g| g.arm(rules).ok())),
            1 => self.summary.disarmed += u64::from(self.change(|g| g.disarm().ok())),
            2 => self.summary.abandoned += u64::from(self.change(|g| g.abandon().ok())),
            _ => {
                self.line("operator", "moves to", to);
                self.change(|g| g.begin_move(to, Some(rules)).ok());
                let record = self.boxx.stored;
                if self.broken == Some(Broken::StandbyNotWaitedFor)
                    && record.owner == STANDBY
                    && matches!(record.hold, Hold::Moving { to: Owner::Host, .. })
                {
                    let end = LeaseEnd { whose: HOST, term: record.term };
                    self.boxed(self.boxx.life, ForBox::Packet(Packet::Released { from: STANDBY, end }));
                }
            }
        }
    }

    fn cut_off_box(&mut self, number: u64) {
        for other in [Node::Host, Node::Standby, Node::Gateway] {
            for class in CLASSES {
                self.cut(Node::Box, other, class, false, number);
                self.cut(other, Node::Box, class, false, number);
            }
        }
    }

    /// One that must change nothing: at least one channel comes through, or the box has cut itself off.
    fn partition(&mut self, number: u64) {
        let choice = self.luck.below(4);
        let through = self.luck.below(3);
        self.line("network", "parts", (choice, through));
        if choice == 0 {
            self.summary.box_cut_off += 1;
            self.cut_off_box(number);
        } else {
            self.summary.partitions_without_takeover += 1;
            for class in CLASSES {
                // The one that comes through does so both ways; of the others this way or that or both.
                if class as u64 != through {
                    self.cut(Node::Host, Node::Box, class, false, number);
                    if self.luck.one_in(2) {
                        self.cut(Node::Box, Node::Host, class, false, number);
                    }
                }
            }
        }
        self.at(20 * SECOND, What::Mend { number });
        // Two, and time to come to rest.
        if self.now < CHAOS + MENDED + SECOND {
            self.at(28 * SECOND, What::Fault);
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.line("world", "phase", phase);
        match phase {
            Phase::Chaos => {}
            // The turn of the last second came late.
            Phase::Mended if !matches!(self.phase, Phase::Chaos | Phase::Mended) => return,
            Phase::Mended => {
                self.rest_of_chaos();
                self.phase = phase;
                self.mended();
                self.at(RENEW_MS * MS, What::Phase(Phase::Mended));
                return;
            }
            Phase::Partitions => {
                self.at_rest();
                self.at(MS, What::Fault);
            }
            Phase::End => {
                self.cuts.clear();
                self.mend(0);
                self.end();
            }
            Phase::Over => self.over(),
        }
        self.phase = phase;
    }

    /// The first time everything is mended; again each second what the operator of a mended world does.
    fn rest_of_chaos(&mut self) {
        if self.phase != Phase::Chaos {
            return;
        }
        self.cuts.clear();
        self.mend(0);
        for who in 0..2 {
            self.resume(who);
            self.power_on(who);
            self.at(2 * SECOND, What::StartAgent { who });
        }
        self.resume_box();
        self.at(SECOND, What::StartBox);
    }

    /// Brings the host back to itself, by lease.
    fn mended(&mut self) {
        if self.now > CHAOS + MENDED / 2 {
            return;
        }
        let rules = self.rules;
        let Hold::Moving { to, silence, .. } = self.boxx.stored.hold else {
            if self.boxx.stored.owner != Owner::Host {
                self.change(|g| g.begin_move(Owner::Host, Some(rules)).ok());
            } else if self.boxx.stored.hold == Hold::Standing {
                self.change(|g| g.arm(rules).ok());
            }
            return;
        };
        // A move away from the host is called off; one that waits for a standing owner's word gets it by asking.
        if self.boxx.stored.owner == Owner::Host && to != Owner::Host && (silence.is_some() || self.luck.one_in(3)) {
            self.change(|g| g.abandon().ok());
        }
    }

    fn at_rest(&mut self) {
        let record = self.boxx.stored;
        let host = &self.machines[0];
        let what = if record.owner != Owner::Host || !matches!(record.hold, Hold::Leased { .. }) {
            format!("the box's record is {record:?}")
        } else if !host.serves(self.now) {
            format!("the host does not serve: {:?}", host.agent.as_ref().map(Holder::state))
        } else {
            return;
        };
        self.fail(FailureKind::NotBackToRest { what });
    }

    fn end(&mut self) {
        self.at_rest();
        let now = self.boxx.clock.read(self.now);
        let required = self.boxx.detector.as_ref();
        // After the partitions; each silence that ended has doubled what must be waited for.
        self.steady = required.is_some_and(|d| !d.is_damped(now));
        self.died = Some(self.now);
        self.decided = None;
        if self.luck.one_in(2) {
            self.summary.deaths += 1;
            self.power_off(0);
        } else {
            self.summary.isolations += 1;
            for class in CLASSES {
                self.cut(Node::Host, Node::Box, class, false, 1);
                self.cut(Node::Box, Node::Host, class, false, 1);
            }
        }
    }

    fn over(&mut self) {
        let Some(died) = self.died else { return };
        let Some(decided) = self.decided else {
            let now = self.boxx.clock.read(self.now);
            let decision = self.boxx.detector.as_mut().map_or(String::new(), |d| d.decide(now).to_string());
            return self.fail(FailureKind::NotDetected { ms: (self.now - died) / MS, decision });
        };
        let took = (decided - died) / MS;
        // An unsteady line doubles the hold, to its bound.
        let bound = if self.steady { DETECTED_MS } else { DETECTED_MS + 2_000 * 2 + 8_000 };
        if took > bound {
            return self.fail(FailureKind::NotDetected { ms: took, decision: "too late".to_owned() });
        }
        self.summary.deaths_in_six_seconds += u64::from(took <= DETECTED_MS);
        let serves = if self.target == Owner::Box { self.boxx.serves } else { self.machines[1].serves(self.now) };
        let since = (self.now - died) / MS;
        if !serves && since > took.max(certain_ms(self.rules)) + BEGUN_MS {
            self.fail(FailureKind::NotTakenOver { ms: since });
        }
    }
}
