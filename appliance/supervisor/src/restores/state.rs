//! What a restore is, what is stored of it, and what is said of it.

use crate::{files, vault::GroupError};
use journal::{ResolveError, ResolvedPoint};
use model::{ByteLen, GroupId, HistoryTime, HostId, Lsn, RecoveryPoint, TimelineId, VolumeId};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicBool},
    thread::JoinHandle,
};
use wire::TargetDisk;

/// What a group's disks are restored from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreFrom {
    /// A moment of it, which does not change.
    Point { group: GroupId, at: RecoveryPoint },
    /// Its newest state, while it is written.
    Branch { group: GroupId },
}

impl RestoreFrom {
    pub fn group(&self) -> GroupId {
        match self {
            Self::Point { group, .. } | Self::Branch { group } => *group,
        }
    }
}

/// A volume, and the machine's whole disk that gets its content.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskMap {
    pub group: GroupId,
    pub volume: VolumeId,
    pub path: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreWish {
    /// Id or name of the machine.
    pub target: String,
    /// One for each group.
    pub from: Vec<RestoreFrom>,
    pub disks: Vec<DiskMap>,
    /// What the disks hold that differs from the moment the branches began at is kept, before anything is overwritten.
    #[serde(default)]
    pub keep_old: bool,
    /// So old is what the disks are brought to, as long as it is not finished.
    #[serde(default)]
    pub lag_seconds: u64,
    /// The other way round: what the disks hold that the groups do not is written there, and nothing to the disks.
    #[serde(default)]
    pub collect: bool,
    /// Whose standby follows by it.
    #[serde(default)]
    pub plan: Option<String>,
}

/// A machine that waits.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    pub host: HostId,
    pub name: String,
    pub address: String,
    pub since_us: u64,
    pub disks: Vec<TargetDisk>,
}

/// How far a restore is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum RestorePhase {
    /// It goes on when what is named is there.
    Waiting {
        why: String,
    },
    /// The machine's disks are looked through for what the box never got.
    Keeping {
        done_bytes: u64,
        total_bytes: u64,
    },
    Copying {
        done_bytes: u64,
        total_bytes: u64,
    },
    Following {
        pass: u64,
        behind_bytes: u64,
        lsns: BTreeMap<GroupId, Lsn>,
    },
    Finishing {
        left_bytes: u64,
    },
    /// The disks are the sources at these positions.
    Done {
        lsns: BTreeMap<GroupId, Lsn>,
    },
    Releasing {
        reboot: bool,
    },
    Released {
        reboot: bool,
    },
    Cancelled,
    Failed {
        text: String,
        remedy: String,
    },
}

/// A branch that holds what a machine's disks held.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Late {
    /// The branch that is restored from.
    pub of: GroupId,
    pub branch: GroupId,
    pub name: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RestoreStatus {
    pub id: String,
    pub target: HostId,
    pub target_name: String,
    pub begun_us: u64,
    pub phase: RestorePhase,
    /// Sent as data since the daemon started; zeroes are sent as ranges and counted beside.
    pub shipped_bytes: u64,
    pub zeroed_bytes: u64,
    pub same_bytes: u64,
    pub kept_bytes: u64,
    /// Branches with what the old disks held; only where something differed.
    pub late: Vec<Late>,
    pub finish: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreFault {
    #[error("{0:?} is no id of a restore: eight hexadecimal digits in lower case")]
    Id(String),
    #[error("restore {0} is another one; take another id")]
    IdTaken(String),
    #[error("there is no restore {0:?}")]
    Unknown(String),
    #[error("there is no host {0:?}: start `holdfast-agent rescue` on the machine")]
    NoTarget(String),
    #[error("restore {id} has the machine {target:?} already; cancel it first")]
    Busy { target: String, id: String },
    #[error("{RESTORES_MAX} restores are not over, which is the limit", RESTORES_MAX = super::RESTORES_MAX)]
    TooMany,
    #[error("a restore needs at least one group and one disk for it, and takes {max} disks at most", max = wire::TARGET_DISKS_MAX)]
    Disks,
    #[error("there is no group {0} in this restore")]
    NoGroup(GroupId),
    #[error("group {group:?} has no volume {volume}")]
    NoVolume { group: String, volume: VolumeId },
    #[error("{0} is named for two volumes")]
    Twice(String),
    #[error("old data is kept beside a branch only, and {0:?} is none, or only a moment of it is wanted")]
    KeepsNothing(String),
    #[error("group {name:?}")]
    Group { name: String, source: GroupError },
    #[error("group {name:?}")]
    Point { name: String, source: Box<ResolveError> },
    #[error("the machine {target:?} has no disk {path}")]
    NoDisk { target: String, path: String },
    #[error("{path} of {target:?} is in use ({by}): unmount it, or take it out of what lies on it, and begin again")]
    InUse { target: String, path: String, by: String },
    #[error("{path} of {target:?} has {has} and {needs} are needed: choose a disk that is as large")]
    Smaller { target: String, path: String, has: ByteLen, needs: ByteLen },
    #[error("{path} of {target:?} is not the disk it was when the restore began; nothing more is written to it")]
    OtherDisk { target: String, path: String },
    #[error("the restore goes to one moment already, and that is another one")]
    Pinned,
    #[error("the restore is over")]
    Over,
    #[error("the restore is not done: finish it first, or cancel it")]
    NotDone,
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("the state of the restore was not kept")]
    File(#[from] files::FileError),
    #[error("the state of the restore cannot be written")]
    Encode(#[from] serde_json::Error),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Stage {
    Working,
    Done { lsns: BTreeMap<GroupId, Lsn> },
    Releasing { lsns: BTreeMap<GroupId, Lsn>, reboot: bool },
    Released { reboot: bool },
    Cancelled,
    Failed { text: String, remedy: String },
}

/// A moment as it is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoredPoint {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub time: HistoryTime,
}

impl From<ResolvedPoint> for StoredPoint {
    fn from(at: ResolvedPoint) -> Self {
        Self { timeline: at.timeline, lsn: at.lsn, time: at.time }
    }
}

impl From<StoredPoint> for ResolvedPoint {
    fn from(at: StoredPoint) -> Self {
        Self { timeline: at.timeline, lsn: at.lsn, time: at.time }
    }
}

/// What is stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub id: String,
    pub wish: RestoreWish,
    pub host: HostId,
    pub host_name: String,
    pub begun_us: u64,
    /// Of the groups of which a moment is wanted.
    pub points: BTreeMap<GroupId, StoredPoint>,
    /// In bytes, in the order of the disks.
    pub sizes: Vec<u64>,
    /// What the machine's disks are, by path: after its restart a name may be another disk's.
    pub identities: BTreeMap<String, String>,
    /// Known before they are made.
    pub late: Vec<Late>,
    /// What the old disks held is kept, all of it.
    pub kept: bool,
    pub finish: bool,
    pub stage: Stage,
}

impl State {
    pub fn new(id: &str, wish: &RestoreWish, host: HostId, host_name: &str, now_us: u64) -> Self {
        let all_points = wish.from.iter().all(|f| matches!(f, RestoreFrom::Point { .. }));
        Self {
            id: id.to_owned(),
            wish: wish.clone(),
            host,
            host_name: host_name.to_owned(),
            begun_us: now_us,
            points: BTreeMap::new(),
            sizes: Vec::new(),
            identities: BTreeMap::new(),
            late: Vec::new(),
            kept: false,
            // Nobody writes to a moment.
            finish: all_points,
            stage: Stage::Working,
        }
    }
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Released { .. } | Stage::Cancelled | Stage::Failed { .. })
    }
}

/// A restore and its thread.
pub struct Run {
    state: Mutex<Arc<State>>,
    /// What the thread said last.
    said: Mutex<Said>,
    pub pause: AtomicBool,
    pub thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone)]
pub struct Said {
    pub phase: RestorePhase,
    pub shipped_bytes: u64,
    pub zeroed_bytes: u64,
    pub same_bytes: u64,
    pub kept_bytes: u64,
}

impl Run {
    pub fn of(state: State) -> Self {
        let phase = RestorePhase::Waiting { why: "it is being taken up".into() };
        let said = Said { phase, shipped_bytes: 0, zeroed_bytes: 0, same_bytes: 0, kept_bytes: 0 };
        Self {
            state: Mutex::new(Arc::new(state)),
            said: Mutex::new(said),
            pause: AtomicBool::new(false),
            thread: Mutex::default(),
        }
    }
    pub fn state(&self) -> Arc<State> {
        Arc::clone(&crate::lock(&self.state))
    }
    pub fn say(&self, said: Said) {
        *crate::lock(&self.said) = said;
    }
    pub fn status(&self) -> RestoreStatus {
        let (state, said) = (self.state(), crate::lock(&self.said).clone());
        let phase = match state.stage.clone() {
            Stage::Working => said.phase,
            Stage::Done { lsns } => RestorePhase::Done { lsns },
            Stage::Releasing { reboot, .. } => RestorePhase::Releasing { reboot },
            Stage::Released { reboot } => RestorePhase::Released { reboot },
            Stage::Cancelled => RestorePhase::Cancelled,
            Stage::Failed { text, remedy } => RestorePhase::Failed { text, remedy },
        };
        RestoreStatus {
            id: state.id.clone(),
            target: state.host,
            target_name: state.host_name.clone(),
            begun_us: state.begun_us,
            phase,
            shipped_bytes: said.shipped_bytes,
            zeroed_bytes: said.zeroed_bytes,
            same_bytes: said.same_bytes,
            kept_bytes: said.kept_bytes,
            late: state.late.clone(),
            finish: state.finish,
        }
    }
    pub fn keep(&self, dir: &Path) -> Result<(), RestoreFault> {
        self.change(dir, |_| Ok(()))
    }
    /// Changes what is stored; what could not be stored is not changed.
    pub fn change(
        &self,
        dir: &Path,
        change: impl FnOnce(&mut State) -> Result<(), RestoreFault>,
    ) -> Result<(), RestoreFault> {
        let mut state = crate::lock(&self.state);
        let mut next = State::clone(&state);
        change(&mut next)?;
        let bytes = serde_json::to_vec_pretty(&next)?;
        files::write_secret(&dir.join(format!("{}.json", next.id)), &bytes)?;
        *state = Arc::new(next);
        Ok(())
    }
}
