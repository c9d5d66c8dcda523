//! What the box says of itself and its groups, and what is at risk.

use crate::{
    App,
    exports::Export,
    links::risk_of,
    vault::{Group, Live, Phase},
    views::OpenView,
};
use journal::{BranchPoint, JournalStats, KeepReason, Pressure};
use model::{ByteLen, GroupPolicy, GroupSpec, RiskReason};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use wire::{GroupAgentStatus, Notice};

/// What a group is doing, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupState {
    NeverSynced,
    Syncing,
    Resyncing,
    Replicating,
    Disconnected,
    Stopped,
    Ingest,
    Opening,
    Released,
}

impl GroupState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::NeverSynced => "never-synced",
            Self::Syncing => "syncing",
            Self::Resyncing => "resyncing",
            Self::Replicating => "replicating",
            Self::Disconnected => "disconnected",
            Self::Stopped => "stopped",
            Self::Ingest => "ingest",
            Self::Opening => "opening",
            Self::Released => "released",
        }
    }
}

/// The facts a group's state and risks are decided from.
pub struct Facts<'a> {
    pub policy: &'a GroupPolicy,
    pub phase: PhaseFact<'a>,
    pub is_ingest: bool,
    pub released: bool,
    pub live: &'a Live,
    /// A recovery point exists or existed.
    pub ever_consistent: bool,
    pub host_connected: bool,
    /// What the agent says of the group, and when it said so.
    pub agent: Option<(&'a GroupAgentStatus, u64)>,
    pub pressure: Option<Pressure>,
    pub hours_left: Option<u64>,
    /// What the host's agent said last that holds of this group or of the host.
    pub notices: Vec<RiskReason>,
    /// Damage that a read or a verification met while the group ran.
    pub damage: Option<String>,
    pub now_us: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PhaseFact<'a> {
    Opening,
    Running,
    Stopped { reason: &'a str, damaged: bool },
}

/// What is decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub state: GroupState,
    pub reason: Option<String>,
    /// None: not known.
    pub lag_ms: Option<u64>,
    /// While it is not known: since when.
    pub lag_since_us: Option<u64>,
    /// The newest moment of which it is proven that all before it is durable here.
    pub lag_proven_us: Option<u64>,
    pub risks: Vec<RiskReason>,
}

/// Pure: facts in, words out.
pub fn judge(f: &Facts<'_>) -> Verdict {
    let mut risks = Vec::new();
    let gap = f.live.gap.map(|(_, reason)| reason);
    let linked = f.live.link.is_some();
    let (state, reason) = match f.phase {
        PhaseFact::Opening => (GroupState::Opening, Some("recovery is running".to_owned())),
        PhaseFact::Stopped { reason, damaged } => {
            if damaged {
                risks.push(RiskReason::Corrupt { what: reason.to_owned() });
            }
            (GroupState::Stopped, Some(reason.to_owned()))
        }
        PhaseFact::Running if f.released => {
            (GroupState::Released, Some("the host no longer protects it; its history stays".to_owned()))
        }
        PhaseFact::Running if f.is_ingest => (GroupState::Ingest, f.live.full.clone()),
        PhaseFact::Running => match (gap, linked) {
            (_, false) if !f.ever_consistent => (GroupState::NeverSynced, None),
            (_, false) => (GroupState::Disconnected, f.live.full.clone()),
            (Some(_), true) if !f.ever_consistent => (GroupState::Syncing, f.live.full.clone()),
            (Some(reason), true) => (GroupState::Resyncing, Some(reason.to_string())),
            (None, true) => (GroupState::Replicating, f.live.full.clone()),
        },
    };
    let mut lag_ms = None;
    let (mut lag_since_us, mut lag_proven_us) = (None, None);
    if f.is_ingest {
        // The client itself waits for what it wants durable: nothing is on its way anywhere else.
        lag_ms = (f.phase == PhaseFact::Running).then_some(0);
    } else if !f.released {
        if !f.ever_consistent {
            risks.push(RiskReason::NeverSynced);
        } else if let Some(reason) = gap {
            risks.push(RiskReason::Resyncing { reason });
        }
        let lag = Lag::of(f);
        let since = lag.proven_us;
        lag_proven_us = since;
        if linked && f.phase == PhaseFact::Running {
            lag_ms = lag.ms.filter(|_| gap.is_none());
        } else if f.phase == PhaseFact::Running {
            let since_us = f.live.link_lost_us.or(since).unwrap_or(0);
            risks.push(RiskReason::HostSilent { since_us });
        }
        lag_since_us = since.filter(|_| lag_ms.is_none());
        if let Some(lag) = lag_ms
            && lag > f.policy.lag_ms_alarm
        {
            risks.push(RiskReason::Lagging { lag_ms: lag, alarm_ms: f.policy.lag_ms_alarm });
        }
        if f.host_connected && f.agent.is_some_and(|(a, _)| a.gate.contains("degraded")) {
            risks.push(RiskReason::Degraded { since_us: since.unwrap_or(0) });
        }
    }
    if !f.released && !f.is_ingest {
        risks.extend(f.notices.iter().cloned());
    }
    if let Some(what) = &f.damage {
        risks.push(RiskReason::Damaged { what: what.clone() });
    }
    if f.live.full.is_some() || matches!(f.pressure, Some(Pressure::Full { .. })) {
        risks.push(RiskReason::JournalFull);
    }
    let short = match (f.pressure, f.hours_left) {
        (Some(Pressure::Alarm { hours_left }), _) => Some(hours_left),
        (Some(Pressure::Shorten { window_us }), _) => Some(window_us / 3_600_000_000),
        (_, Some(left)) if left < u64::from(f.policy.alarm_below_hours) => Some(left),
        _ => None,
    };
    if let Some(hours_left) = short {
        risks.push(RiskReason::HistoryShort { hours_left, alarm_hours: f.policy.alarm_below_hours.into() });
    }
    Verdict { state, reason, lag_ms, lag_since_us, lag_proven_us, risks }
}

/// An agent says how far it is at least once a second. When nothing was heard for this long, on a link that still stands, nothing
/// is known: its machine may be too busy to speak, and writes all the more.
const PROOF_AGE_MS_MAX: u64 = 5_000;

/// How much of the host's work would be lost now: the age of its oldest write that is not durable here.
///
/// Two sources of proof. A *watermark* that became durable: all the host wrote before it is here. And what the *agent says* of its
/// oldest write that is not acknowledged as durable, none being 0; the box hears it some time later, and the write is older by then.
/// The newer of the two counts. "All is in" is 0 until [`PROOF_AGE_MS_MAX`] after it was proven, whether or not the host writes: the
/// proof's own age is no lag, and is shown beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Lag {
    ms: Option<u64>,
    proven_us: Option<u64>,
}

impl Lag {
    fn of(f: &Facts<'_>) -> Self {
        let mark_us = f.live.proven.map(|t| t.0);
        let said = f.agent.and_then(|(agent, at_us)| Some((at_us, agent.lag_ms?)));
        // All before the oldest write that waits is durable.
        let said_us = said.map(|(at_us, ms)| at_us.saturating_sub(ms.saturating_mul(1000)));
        let Some(proven_us) = mark_us.max(said_us) else { return Self { ms: None, proven_us: None } };
        let ms_since = |us: u64| f.now_us.saturating_sub(us) / 1000;
        let waits = said.is_some_and(|(at_us, ms)| ms > 0 && mark_us < Some(at_us));
        let ms = match ms_since(proven_us) {
            age if waits => Some(age),
            age if age <= PROOF_AGE_MS_MAX => Some(0),
            _ => None,
        };
        Self { ms, proven_us: Some(proven_us) }
    }
}

/// One group, with everything about it.
pub struct GroupReport {
    pub spec: GroupSpec,
    pub stopped_since_us: Option<u64>,
    pub live: Live,
    pub stats: Option<JournalStats>,
    pub verdict: Verdict,
    pub host_name: Option<String>,
    pub agent: Option<GroupAgentStatus>,
    /// What it goes on from, with that group's name.
    pub branch: Option<(BranchPoint, Option<String>)>,
    /// Groups that go on from a moment of this one, by name.
    pub branches: Vec<String>,
}

impl GroupReport {
    /// What an administrator should look at beside the risks: nothing is lost by it yet.
    pub fn alerts(&self) -> Vec<String> {
        let mut alerts = Vec::new();
        if let Some(stats) = &self.stats {
            alerts.extend(stats.failing.iter().map(|(what, why)| format!("could not {what}, trying again: {why}")));
            if stats.index_damaged > 0 {
                let behind = if stats.index_behind { "it is being rebuilt" } else { "it has been rebuilt" };
                alerts.push(format!(
                    "the index was found damaged {} since the group was opened; {behind}, no history is lost: check the disk",
                    if stats.index_damaged == 1 { "once".to_owned() } else { format!("{} times", stats.index_damaged) },
                ));
            }
        }
        if let Some(fault) = self.live.recovery.as_ref().and_then(|r| r.control_fault.as_ref()) {
            alerts.push(format!(
                "one of the two copies of the journal's control file was damaged when the group was opened ({fault}); the other \
                 one was used and the copy written anew: check the disk"
            ));
        }
        alerts
    }
}

/// Gathers a group's report. Cheap; locks, but no disk.
pub fn group_report(app: &App, group: &Group) -> GroupReport {
    let shared = &group.shared;
    let (phase, live, spec) = (shared.phase(), shared.live(), shared.spec());
    let host = shared.host.map(|id| app.links.hosts.live(id)).unwrap_or_default();
    let agent = host.status.as_ref().and_then(|s| s.groups.iter().find(|g| g.group == spec.id)).cloned();
    let reader = match &phase {
        Phase::Running(reader) => Some(reader),
        _ => None,
    };
    let stats = reader.map(journal::JournalReader::stats);
    let never = matches!(reader.map(journal::JournalReader::gap_state), Some(journal::GapState::Never) | None);
    let ever_consistent = !never && !reader.is_some_and(|r| live.gap.is_some() && r.points().valid.is_empty());
    let verdict = judge(&Facts {
        policy: &spec.policy,
        phase: match &phase {
            Phase::Opening => PhaseFact::Opening,
            Phase::Running(_) => PhaseFact::Running,
            Phase::Stopped { reason, damaged, .. } => PhaseFact::Stopped { reason, damaged: *damaged },
            Phase::Closed => PhaseFact::Stopped { reason: "closed", damaged: false },
        },
        is_ingest: shared.host.is_none(),
        released: shared.released.load(Ordering::Relaxed),
        live: &live,
        ever_consistent,
        host_connected: host.connected,
        notices: host
            .notices
            .iter()
            .filter(|n| match n {
                Notice::UnknownWrites { group, .. } | Notice::CaptureReduced { group, .. } => *group == spec.id,
                Notice::HostThrottled { .. } => true,
            })
            .map(risk_of)
            .collect(),
        agent: agent.as_ref().map(|a| (a, host.status_us)),
        pressure: stats.as_ref().and_then(|s| s.retention.as_ref()).map(|r| r.pressure),
        hours_left: stats.as_ref().and_then(|s| s.hours_left),
        damage: stats.as_ref().and_then(|s| s.damage.as_ref()).map(|d| crate::chain(d)),
        now_us: app.clock.wall_us(),
    });
    let host_name = shared.host.and_then(|id| app.catalog.data().host(id).map(|h| h.name.clone()));
    let stopped_since_us = match phase {
        Phase::Stopped { since_us, .. } => Some(since_us),
        Phase::Opening | Phase::Running(_) | Phase::Closed => None,
    };
    let catalog = app.catalog.data();
    let branch = shared.branch.map(|on| (on, catalog.group(on.group).map(|g| g.name.clone())));
    let branches = catalog.branches_of(shared.id).map(|g| g.name.clone()).collect();
    GroupReport { spec, stopped_since_us, live, stats, verdict, host_name, agent, branch, branches }
}

pub fn group_json(report: &GroupReport) -> Value {
    let GroupReport { spec, stopped_since_us, live, stats, verdict, host_name, agent, branch, branches } = report;
    let syncing = matches!(verdict.state, GroupState::Syncing | GroupState::Resyncing);
    let sync = agent
        .as_ref()
        .filter(|_| syncing)
        .map(|a| json!({ "done_bytes": a.sync_done.0, "total_bytes": a.sync_total.0 }));
    let stat = |f: fn(&JournalStats) -> u64| stats.as_ref().map_or(0, f);
    let time = |f: fn(&JournalStats) -> u64| stats.as_ref().map(f).filter(|t| *t > 0);
    let hours = stats.as_ref().map_or(0.0, |s| s.last_time.0.saturating_sub(s.first_time.0) as f64 / 3.6e9);
    json!({
        "id": spec.id,
        "name": spec.name,
        "host_id": spec.host,
        "host_name": host_name,
        "branch": branch.as_ref().map(|(on, name)| json!({
            "group": on.group, "group_name": name, "timeline": on.timeline, "lsn": on.lsn,
        })),
        "branches": branches,
        "volumes": spec.volumes,
        "policy": spec.policy,
        "state": verdict.state.name(),
        "reason": verdict.reason,
        "stopped_since_us": stopped_since_us,
        "sync": sync,
        "lag_ms": verdict.lag_ms,
        "lag_since_us": verdict.lag_since_us,
        "lag_proven_us": verdict.lag_proven_us,
        "appended_lsn": live.progress.appended,
        "written_lsn": live.progress.written,
        "durable_lsn": live.progress.durable,
        "first_time_us": time(|s| s.first_time.0),
        "last_time_us": time(|s| s.last_time.0),
        "write_rate_bytes_s": live.write_rate_bytes,
        "write_rate_ops_s": live.write_rate_ops,
        "journal_bytes": stat(|s| s.used_bytes.0),
        "reserved_bytes": stat(|s| s.reserved_bytes().0),
        "prepared_bytes": stat(|s| s.prepared_bytes.0),
        "payload_bytes": stat(|s| s.payload_bytes.0),
        "index_bytes": stat(|s| s.index_bytes.0),
        "base_bytes": stat(|s| s.base_bytes.0),
        "segments": stat(|s| s.segments as u64),
        "records": stat(|s| s.records),
        "hours_of_history": hours,
        "hours_forecast": stats.as_ref().and_then(|s| s.hours_left),
        "pressure": stats.as_ref().and_then(|s| s.retention.as_ref()).map(|r| pressure_text(r.pressure)),
        "risks": verdict.risks,
        "alerts": report.alerts(),
        "index_damaged": stats.as_ref().map_or(0, |s| s.index_damaged),
        "failing": stats.as_ref().map(|s| &s.failing),
        "retention": stats.as_ref().map(retention_json),
        "spool_bytes": agent.as_ref().map(|a| a.spool_bytes.0),
        "dirty_bytes": agent.as_ref().map(|a| a.dirty_bytes.0),
        "gate": agent.as_ref().map(|a| a.gate.clone()),
        "recovered": live.recovery.as_ref().map(|r| json!({
            "segments": r.segments,
            "last_lsn": r.last_lsn,
            "scanned": r.scanned,
            "cut": r.cut.iter().map(|c| json!({
                "file": c.file, "after_lsn": c.after, "offset": c.at_offset, "records": c.records, "bytes": c.bytes,
            })).collect::<Vec<_>>(),
        })),
    })
}

fn pressure_text(pressure: Pressure) -> String {
    match pressure {
        Pressure::Ok => "ok".into(),
        Pressure::Alarm { hours_left } => format!("alarm: {hours_left} h of history fit"),
        Pressure::Shorten { window_us } => {
            format!("the window is shortened to {:.1} h", window_us as f64 / 3.6e9)
        }
        Pressure::Full { missing } => format!("full: {} are missing and nothing more may be deleted", ByteLen(missing)),
    }
}

fn retention_json(stats: &JournalStats) -> Value {
    let kept = |reason: KeepReason| {
        let kept = stats.retention.as_ref().and_then(|r| r.kept.get(&reason)).copied().unwrap_or_default();
        json!({ "segments": kept.segments, "bytes": kept.bytes })
    };
    json!({
        "kept": {
            "open": kept(KeepReason::Open),
            "window": kept(KeepReason::Window),
            "bookmark": kept(KeepReason::Bookmark),
            "view": kept(KeepReason::View),
            "branch": kept(KeepReason::Branch),
            "unfolded": kept(KeepReason::Unfolded),
        },
        "floor_lsn": stats.floor,
        "cutoff_lsn": stats.cutoff,
        "delete_bytes": stats.retention.as_ref().map(|r| r.delete_bytes.0),
        "bytes_per_hour": stats.retention.as_ref().and_then(|r| r.forecast).map(|f| f.bytes_per_hour),
        "hours_to_limit": stats.retention.as_ref().and_then(|r| r.forecast).map(|f| f.hours_to_limit),
        "views": stats.views,
        "index_behind": stats.index_behind,
        "failing": stats.failing,
    })
}

pub fn hosts_json(app: &App) -> Value {
    let data = app.catalog.data();
    let hosts = data.hosts.iter().map(|host| {
        let live = app.links.hosts.live(host.id);
        let status = live.status.as_ref();
        json!({
            "id": host.id,
            "name": host.name,
            "connected": live.connected,
            "last_heard_us": live.last_heard_us,
            "revoked": host.revoked_us.is_some(),
            "revoked_us": host.revoked_us,
            "enrolled_us": host.enrolled_us,
            "agent_version": live.agent_version,
            "backend": status.map(|s| s.backend.clone()),
            "kernel": status.map(|s| s.kernel.clone()),
            "agent_rss_bytes": status.map(|s| s.rss_bytes.0),
            "agent_uptime_s": status.map(|s| s.uptime_s),
        })
    });
    hosts.collect()
}

pub fn export_json(app: &App, export: &Export) -> Value {
    let tcp = app.nbd_listen.filter(|_| export.tcp).map(|at| format!("nbds://{at}/{}", export.name));
    json!({
        "group": export.group,
        "volume": export.volume,
        "volume_name": export.volume_name,
        "export_name": export.name,
        "bytes": export.size,
        "unix_socket": export.socket,
        "uri": export.uri(),
        "tcp_uri": tcp,
    })
}

pub fn view_json(app: &App, view: &OpenView) -> Value {
    json!({
        "id": view.id,
        "group": view.group_name,
        "group_id": view.group,
        "timeline": view.point.timeline,
        "lsn": view.point.lsn,
        "time_us": view.point.time,
        "opened_us": view.opened_us,
        "open_ms": view.open_ms,
        "opened_by": view.opened_by,
        "clients": view.clients(),
        "idle_limit_s": view.idle_limit.map(|limit| limit.as_secs()),
        "closes_in_s": view.closes_in().map(|left| left.as_secs()),
        "exports": view.exports.iter().map(|e| export_json(app, e)).collect::<Vec<_>>(),
    })
}

pub fn status_json(app: &App) -> Value {
    let groups: Vec<Value> = app.vault.groups().iter().map(|g| group_json(&group_report(app, g))).collect();
    let space = app.vault.space().ok();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "box_name": app.box_name,
        "data_dir": app.data_dir,
        "now_us": app.clock.wall_us(),
        "listen": app.listen.to_string(),
        "nbd_listen": app.nbd_listen.map(|a| a.to_string()),
        "uptime_s": app.clock.uptime_s(),
        "rss_bytes": rss_bytes(),
        "ca_fingerprint": app.pki.ca_fingerprint(),
        "hosts": hosts_json(app),
        "groups": groups,
        "views": app.views.list().iter().map(|v| view_json(app, v)).collect::<Vec<_>>(),
        "ingest_targets": app.exports.ingest_targets().iter().map(|e| export_json(app, e)).collect::<Vec<_>>(),
        "journal_device": {
            "name": app.device.name,
            "write_cache": app.device.write_cache,
            "durable_writes": app.device.durable_writes,
        },
        "alerts": app.alerts(),
        "disk": { "total": space.map(|s| s.total), "available": space.map(|s| s.available) },
        "events": app.events.recent(),
    })
}

/// Resident memory of this process; zero when the kernel does not say.
pub fn rss_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf reads a constant of the system and touches no memory of ours.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages * u64::try_from(page).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::LinkInfo;
    use model::{GapReason, HistoryTime, Lsn};

    const NOW: u64 = 100_000_000;

    fn facts<'a>(live: &'a Live, policy: &'a GroupPolicy) -> Facts<'a> {
        Facts {
            policy,
            phase: PhaseFact::Running,
            is_ingest: false,
            released: false,
            live,
            ever_consistent: true,
            host_connected: true,
            notices: Vec::new(),
            agent: None,
            pressure: None,
            hours_left: None,
            damage: None,
            now_us: NOW,
        }
    }
    fn agent_status() -> GroupAgentStatus {
        GroupAgentStatus {
            group: model::GroupId([1; 16]),
            state: wire::GroupAgentState::Replicating,
            text: String::new(),
            lag_ms: None,
            spool_bytes: ByteLen(0),
            spool_bytes_max: ByteLen(0),
            dirty_bytes: ByteLen(0),
            sync_done: ByteLen(0),
            sync_total: ByteLen(0),
            durable: model::SourceSeq(0),
            gate: "async".into(),
            captured_bytes: ByteLen(0),
            captured_records: 0,
        }
    }
    fn linked() -> Live {
        let link = Some(LinkInfo { id: 1, since_us: 0 });
        Live { link, proven: Some(HistoryTime(NOW - 2_000_000)), ..Live::default() }
    }

    #[test]
    fn each_state_has_its_word_and_its_risks() {
        let policy = GroupPolicy::default();
        let gap = Some((Lsn(5), GapReason::Overflow));
        let well = linked();
        let v = judge(&facts(&well, &policy));
        assert_eq!((v.state, v.lag_ms, v.risks.len()), (GroupState::Replicating, Some(0), 0));
        assert_eq!((v.lag_since_us, v.lag_proven_us), (None, Some(NOW - 2_000_000)));
        let in_gap = Live { gap, ..linked() };
        let v = judge(&facts(&in_gap, &policy));
        assert_eq!((v.state, v.lag_ms), (GroupState::Resyncing, None));
        assert_eq!(v.risks, [RiskReason::Resyncing { reason: GapReason::Overflow }]);
        let v = judge(&Facts { ever_consistent: false, ..facts(&in_gap, &policy) });
        assert_eq!((v.state, &v.risks[..]), (GroupState::Syncing, &[RiskReason::NeverSynced][..]));
        let cut = Live { link: None, link_lost_us: Some(7), ..linked() };
        let v = judge(&facts(&cut, &policy));
        assert_eq!((v.state, v.lag_ms, v.lag_since_us), (GroupState::Disconnected, None, Some(NOW - 2_000_000)));
        assert_eq!(v.risks, [RiskReason::HostSilent { since_us: 7 }]);
        let v = judge(&Facts { ever_consistent: false, ..facts(&cut, &policy) });
        assert_eq!(v.state, GroupState::NeverSynced);
        let stopped = PhaseFact::Stopped { reason: "segment 41: record checksum at 0x7f000", damaged: true };
        let v = judge(&Facts { phase: stopped, ..facts(&cut, &policy) });
        assert_eq!(v.state, GroupState::Stopped);
        assert!(v.reason.unwrap().contains("0x7f000") && matches!(v.risks[0], RiskReason::Corrupt { .. }));
        let v = judge(&Facts { is_ingest: true, ..facts(&cut, &policy) });
        assert_eq!((v.state, v.lag_ms, v.risks.len()), (GroupState::Ingest, Some(0), 0));
        let notices = vec![RiskReason::UnknownWrites { commands: 3 }];
        let v = judge(&Facts { notices: notices.clone(), ..facts(&well, &policy) });
        assert_eq!((v.state, &v.risks), (GroupState::Replicating, &notices));
        let v = judge(&Facts { released: true, notices, ..facts(&cut, &policy) });
        assert_eq!((v.state, v.risks.len()), (GroupState::Released, 0));
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_write_that_waits_and_nothing_else() {
        let policy = GroupPolicy::default();
        let s = |ago_ms: u64| NOW - ago_ms * 1000;
        let said = |lag_ms| GroupAgentStatus { lag_ms, ..agent_status() };
        // (watermark durable, what the agent said, when, lag, proven)
        for (mark, lag_said, at, want, proven) in [
            // Idle: nothing waits, however old the watermark is, as long as the agent is heard.
            (None, Some(0), s(550), Some(0), Some(s(550))),
            (Some(s(9_000)), Some(0), s(990), Some(0), Some(s(990))),
            (Some(s(400)), Some(0), s(990), Some(0), Some(s(400))),
            // A write waits: it is older by now than when it was said.
            (Some(s(9_000)), Some(200), s(500), Some(700), Some(s(700))),
            (None, Some(200), s(500), Some(700), Some(s(700))),
            // A watermark that came between the write and the saying: what waits was written behind it.
            (Some(s(600)), Some(200), s(500), Some(600), Some(s(600))),
            // One that came after: all was in.
            (Some(s(300)), Some(200), s(500), Some(0), Some(s(300))),
            // It waits for a long time: it is said for as long as it is.
            (None, Some(60_000), s(1000), Some(61_000), Some(s(61_000))),
            (None, Some(60_000), s(20_000), Some(80_000), Some(s(80_000))),
            // Nothing was heard for too long.
            (Some(s(7_000)), Some(0), s(6_000), None, Some(s(6_000))),
            (Some(s(6_000)), None, s(10), None, Some(s(6_000))),
            (Some(s(5_000)), None, s(10), Some(0), Some(s(5_000))),
            (None, None, s(10), None, None),
        ] {
            let live = Live { proven: mark.map(HistoryTime), ..linked() };
            let agent = said(lag_said);
            let v = judge(&Facts { agent: Some((&agent, at)), ..facts(&live, &policy) });
            let what = format!("watermark {mark:?}, {lag_said:?} said at {at}");
            assert_eq!((v.lag_ms, v.lag_proven_us), (want, proven), "{what}");
            assert_eq!(v.lag_since_us, if want.is_none() { proven } else { None }, "{what}");
        }
    }

    #[test]
    fn what_is_tight_is_said() {
        let policy = GroupPolicy { lag_ms_alarm: 1000, alarm_below_hours: 12, ..GroupPolicy::default() };
        let full = Live { full: Some("no room".into()), ..linked() };
        let waiting = GroupAgentStatus { lag_ms: Some(1500), ..agent_status() };
        let agent = Some((&waiting, NOW - 500_000));
        let v = judge(&Facts { hours_left: Some(3), agent, ..facts(&full, &policy) });
        assert_eq!(
            v.risks,
            [
                RiskReason::Lagging { lag_ms: 2000, alarm_ms: 1000 },
                RiskReason::JournalFull,
                RiskReason::HistoryShort { hours_left: 3, alarm_hours: 12 },
            ]
        );
        let v = judge(&Facts { pressure: Some(Pressure::Full { missing: 1 }), ..facts(&full, &policy) });
        assert!(v.risks.contains(&RiskReason::JournalFull));
        let v = judge(&Facts { damage: Some("seg 4: record checksum at 0x7f000".into()), ..facts(&linked(), &policy) });
        assert_eq!(v.state, GroupState::Replicating, "what does not need the damaged bytes goes on");
        assert!(v.risks.iter().any(|r| r.to_string().contains("0x7f000")), "{:?}", v.risks);
    }
}
