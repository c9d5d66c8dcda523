//! What a takeover or a drill has come to: kept after every step, so that the next daemon goes on where this one was killed, and shown
//! as it is to whoever looks.

use crate::{
    machine::MachineSpec,
    plan::{Place, Plan, Size},
    port::Mounted,
};
use journal::ResolvedPoint;
use model::{GroupId, RecoveryPoint};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The machine serves in the host's place.
    Failover,
    /// The machine runs apart from everything, is looked at, and is thrown away.
    Drill,
}

/// In the order they are done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// What the plan needs is there.
    Check,
    HookBefore,
    /// The lost host cannot serve any more.
    Fence,
    /// Which moment is taken, of each group.
    Point,
    /// The disks, to be written.
    Branch,
    /// The machine is there, stopped before its first instruction.
    Machine,
    /// It runs.
    Start,
    /// The agent inside answers.
    Boot,
    /// The file systems inside are whole.
    Volumes,
    /// The host's addresses answer from the machine.
    Address,
    Applications,
    HookAfter,
    /// The picture of the screen.
    Picture,
}

impl Step {
    pub const ALL: [Self; 13] = [
        Self::Check,
        Self::HookBefore,
        Self::Fence,
        Self::Point,
        Self::Branch,
        Self::Machine,
        Self::Start,
        Self::Boot,
        Self::Volumes,
        Self::Address,
        Self::Applications,
        Self::HookAfter,
        Self::Picture,
    ];

    /// For people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Check => "check what the plan needs",
            Self::HookBefore => "run the hook before",
            Self::Fence => "make sure the host is off",
            Self::Point => "choose the moment",
            Self::Branch => "make its disks writable",
            Self::Machine => "make the machine",
            Self::Start => "start it",
            Self::Boot => "wait until it is up",
            Self::Volumes => "look at its file systems",
            Self::Address => "move the addresses",
            Self::Applications => "start and check the applications",
            Self::HookAfter => "run the hook after",
            Self::Picture => "take a picture of its screen",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Outcome {
    Running,
    Done {
        text: String,
    },
    /// Not part of this run, and why.
    Skipped {
        text: String,
    },
    Failed {
        text: String,
        remedy: String,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StepState<S = Step> {
    pub step: S,
    pub begun_us: u64,
    pub ended_us: Option<u64>,
    pub outcome: Outcome,
}

impl<S> StepState<S> {
    pub fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Done { .. } | Outcome::Skipped { .. })
    }
}

/// Where the run is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Phase {
    Working,
    /// All steps are done; the machine runs.
    Serving,
    /// A step failed. What was made is still there, to be looked at, until the run is ended.
    Failed {
        step: Step,
    },
    /// What the machine wrote is being brought to the host's own disks; the machine serves until the last difference.
    FailingBack,
    /// The host serves again. The machine is down and what it wrote is kept, so that it can serve again: by itself when nobody is content by
    /// then (none: only when somebody says so).
    Returned {
        until_us: Option<u64>,
    },
    /// Somebody is content. What the machine wrote is kept until the host's own history holds it.
    Committed,
    /// The machine is being taken down and its disks are deleted.
    Ending {
        #[serde(default)]
        how: Ended,
    },
    Ended {
        how: Ended,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// A drill that went through, or was ended by hand.
    #[default]
    Discarded,
    /// The host has it all and serves.
    FailedBack,
    /// A migration whose new place failed before it served: the host serves on.
    Undone,
    /// Refused before anything was touched.
    Refused,
}

/// A moment of a group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PointTaken {
    pub group: GroupId,
    pub group_name: String,
    pub timeline: u32,
    pub lsn: u64,
    pub time_us: u64,
    /// The branch that goes on from it: chosen here, so that making it again makes the same one.
    pub branch: GroupId,
    pub branch_name: String,
}

impl PointTaken {
    pub fn at(&self) -> ResolvedPoint {
        ResolvedPoint {
            timeline: model::TimelineId(self.timeline),
            lsn: model::Lsn(self.lsn),
            time: model::HistoryTime(self.time_us),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    Full,
    Degraded,
}

/// How an application did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AppState {
    pub name: String,
    pub up: bool,
    pub ms: u64,
    pub output: String,
}

/// How the host is known to be off.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Fenced {
    /// The plan's hook said so.
    Hook { output: String },
    /// Whoever pressed the button did.
    Word { who: String },
    /// Its lease has ended for certain, by its own word or by the box's clock.
    Lease { term: u64, how: String },
}

/// Measured from the decision on, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Before the decision: since the host was heard last. None when a person decided.
    #[serde(default)]
    pub detection_ms: Option<u64>,
    pub first_instruction_ms: Option<u64>,
    pub booted_ms: Option<u64>,
    /// The addresses answer (NRO).
    pub address_ms: Option<u64>,
    /// The applications answer (RTO).
    pub serving_ms: Option<u64>,
    /// Of a migration: from the host's order to stop until the new place served.
    #[serde(default)]
    pub pause_ms: Option<u64>,
    /// How old the moment was at the decision (RPO).
    pub point_age_ms: Option<u64>,
}

/// In the order they are done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackStep {
    /// The machine that gets the data is connected, and its disks are large enough.
    Target,
    /// Everything is copied under the serving machine, until little is left.
    Copy,
    /// The machine is shut down.
    Pause,
    /// The last difference, compared whole.
    Last,
    /// Ownership is the host's.
    Own,
    /// It starts from its own disks.
    Restart,
    /// Its agent answers.
    HostUp,
    /// The plan's hook finds its applications well.
    HostChecks,
}

impl BackStep {
    pub const ALL: [Self; 8] =
        [Self::Target, Self::Copy, Self::Pause, Self::Last, Self::Own, Self::Restart, Self::HostUp, Self::HostChecks];

    /// For people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Target => "look at the host's disks",
            Self::Copy => "copy while the machine serves",
            Self::Pause => "shut the machine down",
            Self::Last => "copy and compare the last difference",
            Self::Own => "give the host its ownership",
            Self::Restart => "restart the host from its own disks",
            Self::HostUp => "wait until the host is up",
            Self::HostChecks => "check the host's applications",
        }
    }
}

/// Which disk gets a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackDisk {
    pub group: GroupId,
    pub volume: String,
    pub path: String,
}

/// How a failback came to its end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum BackEnd {
    Committed {
        by: String,
    },
    /// The machine serves again.
    RolledBack {
        why: String,
    },
}

/// Bringing what the machine wrote to the host's own disks, or to those of new hardware.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failback {
    /// Of the restore that ships the data: eight hexadecimal digits.
    pub restore: String,
    /// Who gets it: a host that waits as a restore target.
    pub target: String,
    /// Of the groups that the machine was made of. Empty: found by serial number or size, when the target is looked at.
    pub disks: Vec<BackDisk>,
    pub by: String,
    pub begun_us: u64,
    /// After the host serves, somebody has to be content within this, or the machine serves again.
    pub commit_minutes: u64,
    pub steps: Vec<StepState<BackStep>>,
    /// Where the histories of the host's groups ended when it was told to restart: what comes after is of its own disks as they are now.
    #[serde(default)]
    pub heads: Vec<(GroupId, u64)>,
    /// From the machine's end to the host's answer.
    pub down_ms: Option<u64>,
    /// What a person should know of it.
    pub note: Option<String>,
    pub ended: Option<BackEnd>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunState {
    /// Eight hexadecimal digits.
    pub id: String,
    pub kind: Kind,
    pub plan_name: String,
    pub plan: Plan,
    /// Where the host goes on; the plan's, unless a migration was asked to go elsewhere.
    #[serde(default)]
    pub place: Place,
    /// A migration: the host lives and gives its services up by its own word; until something has served elsewhere, what fails is undone.
    #[serde(default)]
    pub planned: bool,
    /// None: as the plan says.
    pub at: Option<RecoveryPoint>,
    /// The word of whoever pressed the button that the host is off.
    pub source_is_off: Option<String>,
    /// Why a takeover began with no hand on it: the detector's decision with every reason.
    #[serde(default)]
    pub decision: Option<String>,
    /// What the running step waits for.
    #[serde(default)]
    pub now: Option<String>,
    /// A drill that waits to be looked at instead of ending by itself.
    pub hold: bool,
    pub begun_us: u64,
    pub phase: Phase,
    pub steps: Vec<StepState>,
    pub fenced: Option<Fenced>,
    /// In which boot of the box.
    #[serde(default)]
    pub fenced_boot: Option<String>,
    pub points: Vec<PointTaken>,
    pub machine: Option<MachineSpec>,
    pub profile: Option<(Profile, Size)>,
    /// The machine was told to run: it is not told again after a restart of the daemon, for the operator may have stopped it.
    pub started: bool,
    pub volumes: Vec<Mounted>,
    pub applications: Vec<AppState>,
    pub measured: Measured,
    /// Who said that the machine at another hypervisor serves, and who that it is off.
    #[serde(default)]
    pub serves: Option<String>,
    #[serde(default)]
    pub stopped: Option<String>,
    /// Its disks are open to nobody any more: what they hold is being brought to the host.
    #[serde(default)]
    pub sealed: bool,
    /// Of a standby: the restore that it followed by, which disks it has what on, and the restore that fetches what it wrote.
    #[serde(default)]
    pub follows: Option<String>,
    #[serde(default)]
    pub standby_disks: Vec<BackDisk>,
    #[serde(default)]
    pub collects: Option<String>,
    /// When the machine was started again after it had ended by itself.
    #[serde(default)]
    pub restarts_us: Vec<u64>,
    /// The last one, whatever it came to.
    #[serde(default)]
    pub failback: Option<Failback>,
}

impl RunState {
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }
    pub fn step(&self, step: Step) -> Option<&StepState> {
        self.steps.iter().find(|s| s.step == step)
    }
    pub fn is_done(&self, step: Step) -> bool {
        self.step(step).is_some_and(StepState::is_done)
    }
    /// Whether this step of the failback that is going on is done.
    pub fn is_back(&self, step: BackStep) -> bool {
        self.failback.as_ref().is_some_and(|f| f.steps.iter().any(|s| s.step == step && s.is_done()))
    }
    /// What failed, for one line.
    pub fn failure(&self) -> Option<(Step, &str, &str)> {
        self.steps.iter().find_map(|s| match &s.outcome {
            Outcome::Failed { text, remedy } => Some((s.step, text.as_str(), remedy.as_str())),
            _ => None,
        })
    }
    /// Where it goes on: a drill is always run here.
    pub fn place(&self) -> &Place {
        if self.kind == Kind::Drill { &Place::Box } else { &self.place }
    }
    /// Something may have written for somebody at the new place.
    pub fn has_served(&self) -> bool {
        self.serves.is_some() || self.measured.serving_ms.is_some() || self.applications.iter().any(|a| a.up)
    }
    /// Which side is authoritative, for people.
    pub fn authority(&self) -> String {
        let machine = match self.place() {
            Place::Box => "the machine on this box".to_owned(),
            Place::Export => "the machine at another hypervisor, on this box's disks".into(),
            Place::Standby(name) => format!("the standby {name}"),
        };
        match (self.kind, &self.phase) {
            (Kind::Drill, _) | (_, Phase::Ended { .. }) => "the host".into(),
            (Kind::Failover, Phase::Serving) => machine,
            (Kind::Failover, Phase::FailingBack) if !self.is_back(BackStep::Pause) => {
                format!("{machine}; its data runs to the host's disks")
            }
            (Kind::Failover, Phase::FailingBack) if !self.is_back(BackStep::Restart) => {
                "nobody: the machine is down, the last difference runs to the host's disks".into()
            }
            (Kind::Failover, Phase::FailingBack | Phase::Returned { .. } | Phase::Committed) => "the host".into(),
            (Kind::Failover, _) if self.fenced.is_some() => "nobody: the host is off, the machine is not up".into(),
            (Kind::Failover, _) => "the host, if it runs".into(),
        }
    }
}
