//! Protection groups and their policies.

use crate::{ByteLen, GapReason, GroupId, HostId, Sectors, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A volume of a group, as the source described it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeSpec {
    pub id: VolumeId,
    /// What the host calls it, e.g. `/dev/sdb`; for people.
    pub name: String,
    pub sectors: Sectors,
    /// What tells the disk from another one put in its place (serial, WWN, file-system or partition-table UUID).
    pub identity: String,
}

/// A protection group: its volumes share one journal and one write order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupSpec {
    pub id: GroupId,
    /// For people; unique on the box.
    pub name: String,
    /// None for a group filled through ingest targets.
    pub host: Option<HostId>,
    pub volumes: Vec<VolumeSpec>,
    pub policy: GroupPolicy,
}

/// What happens when a host in sync mode has waited its bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Go on asynchronously and raise an alarm.
    Degrade,
    /// Keep the host waiting: no acknowledged write may be lost, whatever it costs.
    Hold,
}

/// Whether the host waits for the box.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum SyncMode {
    /// The host never waits.
    Async,
    /// The host's flush or FUA write returns when the box has it durable.
    Sync { wait_ms_max: u64, at_bound: Bound },
}

/// What the operator asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupPolicy {
    pub mode: SyncMode,
    /// How far back any moment can be opened.
    pub window_hours: u32,
    /// The window is never shortened below this when room runs out.
    pub window_hours_floor: u32,
    /// At most this much journal; none means "what the disk has".
    pub journal_bytes_max: Option<ByteLen>,
    /// Alarm when the forecast falls below this many hours of history.
    pub alarm_below_hours: u32,
    /// Lower is shortened first when several groups compete for room.
    pub priority: u8,
    /// Alarm when lag is above this.
    pub lag_ms_alarm: u64,
}

impl Default for GroupPolicy {
    fn default() -> Self {
        Self {
            mode: SyncMode::Async,
            window_hours: 72,
            window_hours_floor: 4,
            journal_bytes_max: None,
            alarm_below_hours: 12,
            priority: 100,
            lag_ms_alarm: 10_000,
        }
    }
}

/// Why a group is not as safe as it should be; shown as it stands here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum RiskReason {
    NeverSynced,
    Resyncing {
        reason: GapReason,
    },
    HostSilent {
        since_us: u64,
    },
    Lagging {
        lag_ms: u64,
        alarm_ms: u64,
    },
    JournalFull,
    HistoryShort {
        hours_left: u64,
        alarm_hours: u64,
    },
    Corrupt {
        what: String,
    },
    /// The group runs; some of its history cannot be read.
    Damaged {
        what: String,
    },
    Degraded {
        since_us: u64,
    },
    /// The host's agent saw commands go to a protected disk past the block layer.
    UnknownWrites {
        commands: u64,
    },
    /// To spare the host, its writes are only marked.
    CaptureReduced {
        why: String,
    },
    /// So that the box keeps up, other programs of the host are held back.
    HostThrottled {
        mib_s: u64,
        why: String,
    },
}

impl fmt::Display for RiskReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverSynced => f.write_str("the first copy has not ended: nothing can be recovered yet"),
            Self::Resyncing { reason } => write!(f, "resync is running ({reason}); older moments stay open"),
            Self::HostSilent { .. } => f.write_str("nothing heard from the host: RPO unknown"),
            Self::Lagging { lag_ms, alarm_ms } => write!(f, "lag is {lag_ms} ms, the alarm is set at {alarm_ms} ms"),
            Self::JournalFull => {
                f.write_str("the journal is full: history is kept, new writes are only marked on the host")
            }
            Self::HistoryShort { hours_left, alarm_hours } => {
                write!(f, "{hours_left} h of history fit, the alarm is set at {alarm_hours} h")
            }
            Self::Corrupt { what } => write!(f, "stopped: {what}"),
            Self::Damaged { what } => {
                write!(f, "some history is damaged and not served: {what}; run `holdfast verify`")
            }
            Self::Degraded { .. } => f.write_str("sync mode has fallen back to async"),
            Self::UnknownWrites { commands } => write!(
                f,
                "{commands} commands went to a protected disk of the host past the block layer; what they wrote, if anything, is not here: \
                 resync the group"
            ),
            Self::CaptureReduced { why } => {
                write!(f, "to spare the host its writes are only marked, and copied later: {why}")
            }
            Self::HostThrottled { mib_s, why } => {
                write!(f, "other programs of the host may write {mib_s} MiB/s each, so that the box keeps up: {why}")
            }
        }
    }
}
