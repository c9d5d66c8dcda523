//! Doing a takeover or a drill: one step after the other, kept before and after each, gone on with after a kill.
//!
//! ```text
//! check → hook → fence → point → branch → machine → start → boot → volumes → address → applications → hook → picture
//! ```
//!
//! # Invariants
//!
//! - A step is kept as begun before it does anything, and as done before the next one begins. Doing a begun step again does no harm: the
//!   branch of a moment has its id before it is made, a machine that runs is taken up, an address that is set is set.
//! - The chosen moment is kept before the branch is made, and never chosen again.
//! - Nothing is touched before [`Step::Check`] is done, and no machine serves before [`Step::Fence`] is.
//! - What a host's lease ends is taken from it before anything else of that step, and given back only after the machine has ended.
//! - What failed stays to be looked at until the run is ended; what a failover wrote is thrown away by nobody but a person.
//!
//! # Afterwards
//!
//! ```text
//! Serving ── machine ended by itself ──▶ Working (machine … picture once more), so often an hour; then Failed
//!    │ ▲  drill promoted ──▶ Working (check, fence, machine …) on the same disks
//!    ▼ │ undone
//! FailingBack: target → copy → pause → last → own → restart → host up → host checks ──▶ Returned ──▶ Committed ──▶ Ended
//!                                                                                        └─ nobody content in time ──▶ Working
//! ```
//!
//! The driver runs on a thread of its own; everything that is the box's comes through [`Hands`]. Which kills it survives is tested in the
//! box's own tests, with the daemon killed at each step.

mod away;
mod back;
mod fence;
mod hook;
mod life;
mod point;
mod standby;

pub use point::{BOOKMARK_SPREAD_MAX, one_moment};

use crate::{
    machine::{self, DRILL, Machine, MachineDisk, MachineError, MachineNic, MachineSpec, Wire},
    plan::{Application, Place, Plan, Size, Subject},
    port::{Port, PortError},
    state::{
        AppState, BackDisk, Ended, Failback, Kind, Outcome, Phase, PointTaken, Profile, RunState, Step, StepState,
    },
};
use hook::{plug, run_hook, unplug};
use journal::ResolvedPoint;
use model::{GroupId, RecoveryPoint};
use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// For the agent inside to answer what it can answer at once.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// An agent that is not up yet is asked again after this.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// A check that failed is made again after this.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// For one check of an application.
const CHECK_SECONDS: u64 = 20;
/// Kept of what a hook or a check printed.
const OUTPUT_MAX: usize = 4096;

/// Why the box could not do its part, in words for people.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct HandsError {
    pub text: String,
    pub remedy: String,
}

impl HandsError {
    pub fn new(text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { text: text.into(), remedy: remedy.into() }
    }
}

/// A group whose disks belong to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    pub id: GroupId,
    pub name: String,
}

/// Something that is asked of a run which does not work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asked {
    /// Try what failed again; start the machine again if it has ended.
    Again {
        source_is_off: Option<String>,
    },
    /// Make a drill a takeover: what was written in it is kept.
    Promote {
        source_is_off: Option<String>,
    },
    Failback(FailbackWish),
    /// The machine at another hypervisor serves.
    Serves {
        by: String,
    },
    /// It is off and stays off.
    Stopped {
        by: String,
    },
    /// The host serves well: what the machine wrote may go.
    Commit {
        by: String,
    },
    /// The machine shall serve again.
    RollBack {
        by: String,
        source_is_off: Option<String>,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FailbackWish {
    /// Eight hexadecimal digits.
    pub restore: String,
    pub target: String,
    pub disks: Vec<BackDisk>,
    pub by: String,
    pub commit_minutes: u64,
}

/// How far the shipping of a failback is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Shipping {
    Copying,
    /// All was copied once; this much has been written since.
    Following {
        pass: u64,
        behind_bytes: u64,
    },
    Finishing,
    Done {
        shipped_bytes: u64,
        same_bytes: u64,
    },
    /// It goes on by itself when the reason has gone.
    Waiting {
        why: String,
    },
    Failed {
        text: String,
        remedy: String,
    },
}

/// What somebody wants of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    GoOn,
    /// Stop where it is: the daemon ends, the next one goes on.
    Pause,
    /// Take it down and throw away what it wrote.
    End,
}

/// How far the host has been taken from its owner.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeaseWait {
    /// Until it says that it has stopped; or for so long, when its silence proves something.
    Waits { ms: Option<u64> },
    /// The box owns it; `released`: by the host's own word, so that it may still have something to send.
    Done { term: u64, how: String, released: bool },
}

/// What the box does for a run. All calls may block.
pub trait Hands {
    fn now_us(&self) -> u64;
    /// Makes the state durable.
    fn keep(&self, state: &RunState) -> Result<(), HandsError>;
    fn wanted(&self) -> Wanted;
    /// Its end was wanted when something else had begun: not any more.
    fn never_mind(&self);
    /// Which boot of the box this is.
    fn boot_id(&self) -> String;
    /// The groups of a plan, in the order of the machine's disks. An error when there is none, or one is not there.
    fn members(&self, subject: &Subject) -> Result<Vec<Member>, HandsError>;
    /// Whether the host of this plan is seen to live, and by what.
    fn seen_alive(&self, subject: &Subject) -> Option<String>;
    /// Whether the host's lease would show that it is off, and why not; none when the plan has no lease.
    fn lease_fences(&self, plan: &Plan) -> Option<Result<(), String>>;
    /// Takes the host from its owner, or looks how far that is.
    fn take(&self, plan: &Plan) -> Result<LeaseWait, HandsError>;
    /// The host has no power, or somebody swears so.
    fn fenced_by_power(&self, plan: &Plan) -> Result<(), HandsError>;
    /// Waits until what a host that lives wrote before it stopped is here.
    fn drain(&self, plan: &Plan) -> Result<(), HandsError>;
    /// Whether the box owns the host of a leased plan.
    fn is_ours(&self, plan: &Plan) -> bool;
    /// The host may serve again, if the box has taken it. Nothing of ours serves any more.
    fn give_back(&self, plan: &Plan) -> Result<(), HandsError>;
    /// The moment a wish means in a group.
    fn resolve(&self, group: GroupId, at: &RecoveryPoint) -> Result<ResolvedPoint, HandsError>;
    /// The newest bookmark that all of these groups have.
    fn newest_bookmark(&self, members: &[Member]) -> Result<RecoveryPoint, HandsError>;
    fn fresh_group_id(&self) -> Result<GroupId, HandsError>;
    /// Makes the branch, or finds it made; its disks as exports.
    fn branch(&self, point: &PointTaken) -> Result<Vec<MachineDisk>, HandsError>;
    /// Whether the plan's standby has all it needs, and how far behind it is; for people.
    fn standby_ready(&self, state: &RunState) -> Result<String, HandsError>;
    /// The restore that it follows by, and its disks.
    fn standby_follows(&self, state: &RunState) -> Result<(String, Vec<BackDisk>), HandsError>;
    /// Its disks shall end at just these moments.
    fn standby_finish(&self, restore: &str, points: &[PointTaken]) -> Result<(), HandsError>;
    /// Has the disks let go; whether they are.
    fn let_disks_go(&self, restore: &str) -> Result<bool, HandsError>;
    /// The standby may serve from here on. The box owns the host, and serves nothing.
    fn give_to_standby(&self, plan: &Plan) -> Result<(), HandsError>;
    /// Whether the standby serves; none: it does not own the host.
    fn standby_serves(&self, plan: &Plan) -> Result<Option<bool>, HandsError>;
    /// Eight hexadecimal digits that no restore has.
    fn fresh_restore(&self) -> Result<String, HandsError>;
    /// Brings what the standby's disks hold into the branches, or finds that begun.
    fn collect(&self, state: &RunState, restore: &str) -> Result<(), HandsError>;
    /// Who has disks of these branches open.
    fn clients(&self, points: &[PointTaken]) -> Vec<String>;
    /// Closes the disks of these branches to everybody, for as long as the run is sealed.
    fn close_disks(&self, points: &[PointTaken]);
    /// Deletes the branch; none is fine.
    fn drop_branch(&self, point: &PointTaken) -> Result<(), HandsError>;
    /// Memory that a machine may take, in MiB.
    fn memory_mib(&self) -> Result<u64, HandsError>;
    /// A folder for the machine's sockets and logs.
    fn dir(&self, id: &str) -> PathBuf;

    /// Whether something is asked that [`Self::asked`] would answer.
    fn is_asked(&self) -> bool;
    fn asked(&self) -> Option<Asked>;
    /// What was asked is done, or has no sense any more.
    fn answered(&self);
    /// Begins the shipping of a failback, or finds it begun; the disks it goes to.
    fn ship(&self, state: &RunState, failback: &Failback) -> Result<Vec<BackDisk>, HandsError>;
    fn shipping(&self, restore: &str) -> Result<Shipping, HandsError>;
    /// Nothing is written any more: ship the rest, and compare.
    fn ship_last(&self, restore: &str) -> Result<(), HandsError>;
    /// Has the target restart from its own disks.
    fn restart_target(&self, restore: &str) -> Result<(), HandsError>;
    /// Ends the shipping; none is fine.
    fn cancel_shipping(&self, restore: &str) -> Result<(), HandsError>;
    /// The last LSN of a group.
    fn head(&self, group: GroupId) -> Result<u64, HandsError>;
    /// Why the history of a group does not hold all that its host's disks hold since `after`: they must have been compared since then.
    fn not_whole(&self, group: GroupId, after: u64) -> Result<Option<String>, HandsError>;
}

/// Why a step did not come to its end.
enum Stop {
    Failed {
        text: String,
        remedy: String,
    },
    /// Somebody wants something else.
    Wanted,
}

impl From<HandsError> for Stop {
    fn from(e: HandsError) -> Self {
        Self::Failed { text: e.text, remedy: e.remedy }
    }
}

impl From<MachineError> for Stop {
    fn from(e: MachineError) -> Self {
        let remedy = match &e {
            MachineError::NoQemu | MachineError::NoFirmware => "install it and try again",
            _ => "look at qemu.log in the run's folder",
        };
        Self::Failed { text: words(&e), remedy: remedy.into() }
    }
}

impl From<PortError> for Stop {
    fn from(e: PortError) -> Self {
        Self::Failed {
            text: words(&e),
            remedy: "look at the picture of the screen and at serial.log in the run's folder".into(),
        }
    }
}

fn words(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut at = e.source();
    while let Some(cause) = at {
        text = format!("{text}: {cause}");
        at = cause.source();
    }
    text
}

fn failed(text: impl Into<String>, remedy: impl Into<String>) -> Stop {
    Stop::Failed { text: text.into(), remedy: remedy.into() }
}

/// What a step came to.
enum Attempt {
    Went,
    Failed,
    Interrupted,
}

/// One run and its machine.
pub struct Driver<'a, H: Hands> {
    hands: &'a H,
    pub state: RunState,
    machine: Option<Machine>,
}

impl<'a, H: Hands> Driver<'a, H> {
    pub fn new(hands: &'a H, state: RunState) -> Self {
        Self { hands, state, machine: None }
    }

    /// Does what is left to do. Ends when the run is over, serves, failed, or somebody wants it to stop.
    pub fn drive(&mut self) -> Result<(), HandsError> {
        loop {
            match (&self.state.phase, self.hands.wanted()) {
                (Phase::Ended { .. }, _) | (_, Wanted::Pause) => return Ok(()),
                (Phase::Working, _) => self.work()?,
                (Phase::Ending { .. }, _) => return self.end(),
                (Phase::FailingBack | Phase::Returned { .. }, Wanted::End) => self.hands.never_mind(),
                (Phase::FailingBack, _) => self.work_back()?,
                (Phase::Committed, Wanted::End) => {
                    self.state.phase = Phase::Ending { how: Ended::FailedBack };
                    self.hands.keep(&self.state)?;
                }
                (_, Wanted::End) => {
                    self.state.phase = Phase::Ending { how: Ended::Discarded };
                    self.hands.keep(&self.state)?;
                }
                (_, Wanted::GoOn) => {
                    let before = self.state.phase.clone();
                    match self.hands.asked() {
                        Some(asked) => {
                            let done = self.answer(asked);
                            self.hands.answered();
                            done?;
                        }
                        None => self.look_after()?,
                    }
                    if self.state.phase == before && !self.hands.is_asked() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn work(&mut self) -> Result<(), HandsError> {
        for step in Step::ALL {
            if self.state.is_done(step) {
                continue;
            }
            match self.hands.wanted() {
                Wanted::GoOn => {}
                Wanted::Pause => return Ok(()),
                Wanted::End => {
                    self.state.phase = Phase::Ending { how: Ended::Discarded };
                    return self.hands.keep(&self.state);
                }
            }
            match self.attempt(|state| Some(&mut state.steps), step, |driver| driver.act(step))? {
                Attempt::Went => self.hands.keep(&self.state)?,
                // Stays begun: the next daemon, or the end, goes on from here.
                Attempt::Interrupted => return Ok(()),
                Attempt::Failed => {
                    // Nothing was touched: there is nothing to look at and nothing to throw away. The host may have been taken from its
                    // owner.
                    let nothing = self.state.points.is_empty();
                    self.evidence();
                    if step == Step::Fence {
                        // Whoever tries again says it again.
                        self.state.source_is_off = None;
                        if self.stays_returned() {
                            return self.hands.keep(&self.state);
                        }
                    }
                    self.state.phase = match nothing {
                        true => Phase::Ending { how: Ended::Refused },
                        // Nobody has been served by what was written there.
                        false if self.state.planned && !self.state.has_served() => Phase::Ending { how: Ended::Undone },
                        false => Phase::Failed { step },
                    };
                    return self.hands.keep(&self.state);
                }
            }
        }
        let by_itself = self.state.kind == Kind::Drill && !self.state.hold;
        self.state.phase = if by_itself { Phase::Ending { how: Ended::Discarded } } else { Phase::Serving };
        self.hands.keep(&self.state)
    }

    /// Does one step, kept as begun before; what it came to is in the state and not kept yet.
    fn attempt<S: Copy + PartialEq>(
        &mut self,
        list: impl Fn(&mut RunState) -> Option<&mut Vec<StepState<S>>>,
        step: S,
        act: impl FnOnce(&mut Self) -> Result<Option<String>, Stop>,
    ) -> Result<Attempt, HandsError> {
        let begun_us = self.hands.now_us();
        // What the step before waited for is of the past.
        self.state.now = None;
        if let Some(steps) = list(&mut self.state) {
            steps.retain(|s| s.step != step);
            steps.push(StepState { step, begun_us, ended_us: None, outcome: Outcome::Running });
        }
        self.hands.keep(&self.state)?;
        let (outcome, attempt) = match act(self) {
            Ok(Some(text)) => (Outcome::Done { text }, Attempt::Went),
            Ok(None) => (Outcome::Skipped { text: "not part of this run".into() }, Attempt::Went),
            Err(Stop::Wanted) => return Ok(Attempt::Interrupted),
            // A daemon that stops takes the machine's disks along: what fails for it is done again by the next one.
            Err(Stop::Failed { .. }) if self.hands.wanted() == Wanted::Pause => return Ok(Attempt::Interrupted),
            Err(Stop::Failed { text, remedy }) => (Outcome::Failed { text, remedy }, Attempt::Failed),
        };
        let now_us = self.hands.now_us();
        if let Some(entry) = list(&mut self.state).and_then(|steps| steps.iter_mut().find(|s| s.step == step)) {
            entry.ended_us = Some(now_us);
            entry.outcome = outcome;
        }
        Ok(attempt)
    }

    /// Milliseconds since the decision.
    fn elapsed_ms(&self) -> u64 {
        self.hands.now_us().saturating_sub(self.state.begun_us) / 1000
    }

    /// Times how long it took, and of a migration how long nobody served.
    fn serves_now(&mut self) {
        let served_ms = *self.state.measured.serving_ms.get_or_insert(self.elapsed_ms());
        if let (true, Some(fence)) = (self.state.planned, self.state.step(Step::Fence)) {
            let stopped_ms = fence.begun_us.saturating_sub(self.state.begun_us) / 1000;
            self.state.measured.pause_ms.get_or_insert(served_ms.saturating_sub(stopped_ms));
        }
    }

    fn act(&mut self, step: Step) -> Result<Option<String>, Stop> {
        let is_drill = self.state.kind == Kind::Drill;
        match step {
            Step::Check => self.check().map(Some),
            Step::HookBefore if is_drill => Ok(None),
            Step::HookBefore => self.hook(|plan| plan.hooks.before.clone()),
            Step::Fence if is_drill => Ok(None),
            Step::Fence => {
                let text = self.fence()?;
                self.state.fenced_boot = Some(self.hands.boot_id());
                Ok(Some(text))
            }
            Step::Point => self.choose().map(Some),
            Step::Machine if self.at_standby() => self.finish_standby().map(Some),
            Step::Start if self.at_standby() => self.give_to_standby().map(Some),
            Step::Boot if self.at_standby() => self.wait_for_standby().map(Some),
            Step::Volumes | Step::Address | Step::Applications | Step::Picture if self.at_standby() => Ok(None),
            Step::Machine if *self.state.place() == Place::Export => self.open_disks().map(Some),
            Step::Boot if *self.state.place() == Place::Export => self.wait_for_word().map(Some),
            Step::Start | Step::Volumes | Step::Address | Step::Applications | Step::Picture
                if *self.state.place() == Place::Export =>
            {
                Ok(None)
            }
            Step::Branch => self.make_branches().map(Some),
            Step::Machine => self.make_machine().map(Some),
            Step::Start => self.start().map(Some),
            Step::Boot => self.boot().map(Some),
            Step::Volumes if !self.state.plan.machine.agent => Ok(None),
            Step::Volumes => self.look_at_volumes().map(Some),
            Step::Address if self.state.plan.networks.iter().all(|n| n.addresses.is_empty()) => Ok(None),
            Step::Address => self.addresses().map(Some),
            Step::Applications if self.state.plan.applications.is_empty() => {
                self.serves_now();
                Ok(None)
            }
            Step::Applications => self.start_applications().map(Some),
            Step::HookAfter if is_drill => Ok(None),
            Step::HookAfter => self.hook(|plan| plan.hooks.after.clone()),
            Step::Picture => self.picture().map(Some),
        }
    }

    fn check(&mut self) -> Result<String, Stop> {
        let plan = &self.state.plan;
        self.hands.members(&plan.subject)?;
        self.check_point()?;
        if self.state.planned {
            self.check_source()?;
        }
        if *self.state.place() == Place::Export {
            self.check_fence()?;
            return Ok("its disks will be open to another hypervisor".into());
        }
        if self.at_standby() {
            self.check_fence()?;
            return Ok(self.hands.standby_ready(&self.state)?);
        }
        machine::missing(plan.machine.firmware)?;
        if self.state.kind == Kind::Failover {
            for network in &plan.networks {
                if !PathBuf::from("/sys/class/net").join(&network.bridge).join("bridge").exists() {
                    let remedy = "make the bridge, or name another one in the plan";
                    return Err(failed(format!("this box has no bridge {:?}", network.bridge), remedy));
                }
            }
            self.check_fence()?;
        }
        // A drill that is promoted gives its machine's memory back before it takes any.
        let own = self.state.machine.as_ref().map_or(0, |spec| spec.size.memory_mib);
        let have = self.hands.memory_mib()? + own;
        let (profile, size) = fitting(plan, have).ok_or_else(|| {
            let least = plan.degraded.unwrap_or(plan.machine.size).memory_mib;
            failed(
                format!("{least} MiB of memory are needed, the box has {have} to give"),
                "end other machines, or give the plan a smaller [degraded]",
            )
        })?;
        self.state.profile = Some((profile, size));
        let accel = if machine::kvm_works() {
            "hardware acceleration"
        } else {
            "no hardware acceleration: slower by ten times and more"
        };
        let which = if profile == Profile::Degraded { ", the degraded profile" } else { "" };
        Ok(format!("{} CPUs, {} MiB{which}; {accel}", size.cpus, size.memory_mib))
    }

    /// Runs a hook of the plan, if it has that one.
    fn hook(&self, which: impl Fn(&Plan) -> Option<Vec<String>>) -> Result<Option<String>, Stop> {
        let Some(words) = which(&self.state.plan) else { return Ok(None) };
        run_hook(&words, &self.state, self.state.plan.hooks.hook_seconds_max).map(Some)
    }

    fn make_branches(&mut self) -> Result<String, Stop> {
        let mut disks = 0;
        for point in self.state.points.clone() {
            disks += self.hands.branch(&point)?.len();
        }
        Ok(format!("{disks} {}", if disks == 1 { "disk" } else { "disks" }))
    }

    fn make_machine(&mut self) -> Result<String, Stop> {
        self.leave_the_drill()?;
        // Always: after a restart of the daemon they may not be exported yet.
        let mut disks = Vec::new();
        for point in self.state.points.clone() {
            disks.extend(self.hands.branch(&point)?);
        }
        if let Some(spec) = &mut self.state.machine {
            spec.disks = disks;
        } else {
            let plan = &self.state.plan;
            let (_, size) = self
                .state
                .profile
                .ok_or_else(|| failed("the size was not chosen", "end this run and begin another"))?;
            let is_drill = self.state.kind == Kind::Drill;
            let nics = plan.networks.iter().map(|network| MachineNic {
                mac: network.mac,
                wire: if is_drill { Wire::Isolated } else { Wire::Bridge(network.bridge.clone()) },
            });
            self.state.machine = Some(MachineSpec {
                name: self.state.plan_name.clone(),
                dir: self.hands.dir(&self.state.id),
                size,
                firmware: plan.machine.firmware,
                disk_model: plan.machine.disk,
                nic_model: plan.machine.nic,
                disks,
                nics: nics.collect(),
                marker: if is_drill { DRILL.into() } else { "failover".into() },
                kvm: machine::kvm_works(),
            });
            self.hands.keep(&self.state)?;
        }
        let spec = self.state.machine.clone().ok_or_else(|| failed("there is no machine", "end this run"))?;
        plug(&spec)?;
        let mut slower = "";
        let machine = match Machine::start(&spec) {
            // What a short guest could do, a long one may not: better slow than not at all.
            Err(MachineError::Ended { .. }) if spec.kvm => {
                let emulated = MachineSpec { kvm: false, ..spec.clone() };
                let machine = Machine::start(&emulated)?;
                self.state.machine = Some(emulated);
                slower = "; hardware acceleration failed: emulated";
                machine
            }
            started => started?,
        };
        self.machine = Some(machine);
        Ok(format!("{} disks, {} network cards{slower}", spec.disks.len(), spec.nics.len()))
    }

    /// The machine, which an earlier daemon may have started.
    fn machine(&mut self) -> Result<&mut Machine, Stop> {
        if self.machine.is_none() {
            let spec = self.state.machine.as_ref().ok_or_else(|| failed("there is no machine", "end this run"))?;
            let found = Machine::adopt(spec)?;
            self.machine = Some(found.ok_or_else(|| {
                failed(
                    "the machine has ended by itself",
                    "its disks are as it left them: look at qemu.log and serial.log in the run's folder",
                )
            })?);
        }
        self.machine.as_mut().ok_or_else(|| failed("there is no machine", "end this run"))
    }

    /// Time has passed since the host was known to be off.
    fn may_serve(&self) -> Result<(), Stop> {
        let plan = &self.state.plan;
        if self.state.kind == Kind::Drill {
            return Ok(());
        }
        if plan.lease.is_some() && !self.hands.is_ours(plan) {
            let remedy = "end this run; who owns the host is in `holdfast plan status`";
            return Err(failed("the box does not own the host any more", remedy));
        }
        // Somebody may have switched it on.
        if plan.lease.is_none()
            && let Some(seen) = self.hands.seen_alive(&plan.subject)
        {
            let remedy = "shut the host down, then `holdfast run again`; or end this run, and the host serves";
            return Err(failed(format!("the host serves: {seen}"), remedy));
        }
        Ok(())
    }

    fn start(&mut self) -> Result<String, Stop> {
        if !self.state.started {
            self.may_serve()?;
            self.machine()?.go_on()?;
            self.state.started = true;
            self.state.measured.first_instruction_ms = Some(self.elapsed_ms());
        }
        let ms = self.state.measured.first_instruction_ms.unwrap_or_default();
        Ok(format!("first instruction {:.1} s after the decision", ms as f64 / 1000.0))
    }

    fn port(&mut self) -> Result<Port, Stop> {
        self.machine()?;
        let spec = self.state.machine.as_ref().ok_or_else(|| failed("there is no machine", "end this run"))?;
        Ok(Port::connect(&spec.port_socket())?)
    }

    fn boot(&mut self) -> Result<String, Stop> {
        if !self.state.plan.machine.agent {
            let status = self.machine()?.status()?;
            if status != "running" {
                return Err(failed(format!("the machine does not run: {status}"), "look at the picture of the screen"));
            }
            return Ok("it runs; what it does inside only the picture shows".into());
        }
        let limit = Duration::from_secs(self.state.plan.machine.boot_seconds_max);
        let deadline = Instant::now() + limit;
        let mut port = self.port()?;
        loop {
            match port.hello(ANSWER_MAX.min(Duration::from_secs(2))) {
                Ok(hello) if !matches!(hello.system.as_str(), "initializing" | "starting") => {
                    self.state.measured.booted_ms.get_or_insert(self.elapsed_ms());
                    return Ok(format!("{} is {}", hello.host_name, hello.system));
                }
                Ok(_) | Err(PortError::Silent { .. } | PortError::Refused(_)) => {}
                Err(e) => return Err(e.into()),
            }
            if self.hands.wanted() != Wanted::GoOn {
                return Err(Stop::Wanted);
            }
            let status = self.machine()?.status()?;
            if status != "running" {
                let remedy = "look at the picture of the screen; an earlier moment may boot: give it with --at";
                return Err(failed(format!("the machine does not run: {status}"), remedy));
            }
            if Instant::now() >= deadline {
                let text = format!("nothing inside has answered within {} s", limit.as_secs());
                let remedy = "look at the picture of the screen and at serial.log; an earlier moment may boot (--at); without an agent \
                              inside, no more than the picture can be had";
                return Err(failed(text, remedy));
            }
            thread::sleep(ASK_EVERY);
        }
    }

    fn look_at_volumes(&mut self) -> Result<String, Stop> {
        let volumes = self.port()?.volumes(ANSWER_MAX)?;
        self.state.volumes = volumes;
        let bad: Vec<String> = self
            .state
            .volumes
            .iter()
            .filter_map(|v| Some(format!("{} on {}: {}", v.fs, v.mount, v.fault.as_ref()?)))
            .collect();
        if !bad.is_empty() {
            return Err(failed(bad.join("; "), "an earlier moment may be whole: give it with --at"));
        }
        let list: Vec<String> = self.state.volumes.iter().map(|v| format!("{} ({})", v.mount, v.fs)).collect();
        Ok(list.join(", "))
    }

    fn addresses(&mut self) -> Result<String, Stop> {
        let mut port = self.port()?;
        let mut set = Vec::new();
        for network in self.state.plan.networks.clone() {
            if network.addresses.is_empty() {
                continue;
            }
            port.network(&network, ANSWER_MAX)?;
            set.extend(network.addresses.iter().map(ToString::to_string));
        }
        self.state.measured.address_ms.get_or_insert(self.elapsed_ms());
        Ok(set.join(", "))
    }

    fn start_applications(&mut self) -> Result<String, Stop> {
        let mut port = self.port()?;
        for app in self.state.plan.applications.clone() {
            if self.state.applications.iter().any(|a| a.name == app.name && a.up) {
                continue;
            }
            let begun = Instant::now();
            let (up, output) = self.bring_up(&mut port, &app, begun)?;
            let ms = begun.elapsed().as_millis() as u64;
            self.state.applications.retain(|a| a.name != app.name);
            self.state.applications.push(AppState { name: app.name.clone(), up, ms, output: output.clone() });
            self.hands.keep(&self.state)?;
            if !up {
                let text = format!("{} is not up after {} s: {output}", app.name, app.seconds_max);
                return Err(failed(text, "look at its own log inside the machine, or try an earlier moment with --at"));
            }
        }
        self.serves_now();
        let names: Vec<&str> = self.state.applications.iter().map(|a| a.name.as_str()).collect();
        Ok(format!("{} {}", names.join(", "), if names.len() == 1 { "answers" } else { "answer" }))
    }

    fn bring_up(&self, port: &mut Port, app: &Application, begun: Instant) -> Result<(bool, String), Stop> {
        if let Some(start) = &app.start {
            let ran = port.run(start, app.seconds_max)?;
            if ran.code != Some(0) {
                return Ok((false, format!("`{start}` ended with {}: {}", code(ran.code), clipped(&ran.output))));
            }
        }
        loop {
            let ran = port.run(&app.check, CHECK_SECONDS.min(app.seconds_max))?;
            if ran.code == Some(0) {
                return Ok((true, clipped(&ran.output)));
            }
            if begun.elapsed() >= Duration::from_secs(app.seconds_max) {
                return Ok((false, format!("`{}` ended with {}: {}", app.check, code(ran.code), clipped(&ran.output))));
            }
            if self.hands.wanted() != Wanted::GoOn {
                return Err(Stop::Wanted);
            }
            thread::sleep(CHECK_EVERY);
        }
    }

    fn picture(&mut self) -> Result<String, Stop> {
        let file = self.hands.dir(&self.state.id).join("screen.png");
        self.machine()?.screenshot(&file)?;
        Ok(file.display().to_string())
    }

    /// The picture of a machine that did not make it, as well as it can be had.
    fn evidence(&mut self) {
        if self.state.machine.is_some() {
            let _ = self.picture();
        }
    }

    /// Takes the machine down and deletes its disks.
    fn end(&mut self) -> Result<(), HandsError> {
        let how = match self.state.phase {
            Phase::Ending { how } => how,
            _ => Ended::Discarded,
        };
        // Whoever took services over from it may still want a clean end.
        self.take_down(self.state.kind == Kind::Failover)?;
        if *self.state.place() == Place::Export {
            self.close_for_good()?;
        }
        if self.at_standby() && !self.leave_standby()? {
            // The daemon ends; the next one goes on here.
            return Ok(());
        }
        // The machine has ended: before what may take long, for the host serves from here on.
        if self.state.kind == Kind::Failover {
            let plan = self.state.plan.clone();
            self.hands.give_back(&plan)?;
        }
        for point in self.state.points.clone() {
            self.hands.drop_branch(&point)?;
        }
        self.state.phase = Phase::Ended { how };
        self.hands.keep(&self.state)
    }

    /// Ends the machine, if one runs; whether it had shut itself down, or did when it was asked to.
    fn take_down(&mut self, asked_first: bool) -> Result<bool, HandsError> {
        let Some(spec) = self.state.machine.clone() else { return Ok(true) };
        let by_hand = |e: MachineError| HandsError::new(words(&e), "end it by hand: its process is named holdfast-…");
        let running = match self.machine.take() {
            Some(machine) => Some(machine),
            None => Machine::adopt(&spec).map_err(by_hand)?,
        };
        let shutdown_max = Duration::from_secs(self.state.plan.machine.shutdown_seconds_max);
        let mut clean = true;
        if let Some(mut machine) = running {
            let status = machine.status().unwrap_or_default();
            clean = status == "shutdown"
                || (asked_first
                    && status == "running"
                    && machine.press_power().is_ok()
                    && machine.ended_by(Instant::now() + shutdown_max).unwrap_or(false));
            machine.end().map_err(by_hand)?;
        }
        unplug(&spec);
        Ok(clean)
    }
}

/// The size the box has room for.
fn fitting(plan: &Plan, have_mib: u64) -> Option<(Profile, Size)> {
    let full = plan.machine.size;
    if full.memory_mib <= have_mib {
        return Some((Profile::Full, full));
    }
    plan.degraded.filter(|small| small.memory_mib <= have_mib).map(|small| (Profile::Degraded, small))
}

fn code(code: Option<i32>) -> String {
    code.map_or_else(|| "no status in time".into(), |c| format!("status {c}"))
}

fn clipped(text: &str) -> String {
    let text = text.trim();
    let from = text.char_indices().rev().nth(OUTPUT_MAX - 1).map_or(0, |(at, _)| at);
    text[from..].to_owned()
}
