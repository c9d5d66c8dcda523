//! What the agent says about itself, to people and to the box.

use super::{Engine, clock};
use model::{ByteLen, SyncMode};
use replication::{Lag, Pressure, SourceStatus};
use serde_json::{Value, json};
use wire::{AgentStatus, GroupAgentState, GroupAgentStatus};

/// Resident memory of this process, the ring included.
fn rss_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    pages * 4096
}

pub fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// What is held back, and why.
fn pressure_text(pressure: Pressure, cause: &str) -> String {
    let held = match pressure {
        Pressure::None => return "none".to_owned(),
        Pressure::Delay { ms } => format!("copying pauses {ms} ms after each read"),
        Pressure::SpillOnly => "copying is stopped".to_owned(),
        Pressure::DirtyMapOnly => "writes are only marked".to_owned(),
    };
    if cause.is_empty() { held.to_owned() } else { format!("{held}: {cause}") }
}

/// The limit of this process's memory cgroup, if there is one.
fn memory_limit() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    std::fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.max")).ok()?.trim().parse().ok()
}

impl Engine {
    fn backend(&self) -> String {
        let kind = |g: &super::Group| match (g.record.sync, g.record.spec.policy.mode) {
            (false, _) => self.ring_backend(),
            (true, SyncMode::Sync { .. }) => crate::capture::dm::NAME.to_owned(),
            (true, SyncMode::Async) => crate::capture::dm::NAME_ASYNC.to_owned(),
        };
        let mut kinds: Vec<String> = self.groups.iter().map(kind).collect();
        kinds.sort();
        kinds.dedup();
        if kinds.is_empty() { self.ring_backend() } else { kinds.join(", ") }
    }

    fn ring_backend(&self) -> String {
        match (&self.ctx.capture, self.capture_error.is_empty()) {
            (Some(capture), _) => capture.name().to_owned(),
            (None, true) => "none: nothing is protected".to_owned(),
            (None, false) => format!("none: {}", self.capture_error),
        }
    }

    pub(super) fn agent_status(&self) -> AgentStatus {
        let groups = self
            .groups
            .iter()
            .map(|group| {
                let asked_sync = matches!(group.record.spec.policy.mode, SyncMode::Sync { .. });
                let gate = match (group.record.sync, asked_sync) {
                    (true, _) => {
                        group.running.as_ref().map_or("out".to_owned(), |r| r.source.status().gate.to_string())
                    }
                    (false, true) => {
                        format!("async (capture backend {} cannot make the host wait)", self.ring_backend())
                    }
                    (false, false) => "async".to_owned(),
                };
                match &group.running {
                    None => GroupAgentStatus {
                        group: group.id(),
                        state: GroupAgentState::Stopped,
                        text: group.stopped.clone(),
                        lag_ms: None,
                        spool_bytes: ByteLen(0),
                        spool_bytes_max: ByteLen(0),
                        dirty_bytes: ByteLen(0),
                        sync_done: ByteLen(0),
                        sync_total: ByteLen(0),
                        durable: model::SourceSeq::ZERO,
                        gate: gate.clone(),
                        captured_bytes: ByteLen(0),
                        captured_records: 0,
                    },
                    Some(running) => {
                        let s = running.source.status();
                        GroupAgentStatus {
                            group: group.id(),
                            state: s.state,
                            text: text_of(&[
                                &running.box_reason,
                                &held_back(running),
                                &left_out(&s),
                                &running.last_alarm,
                                &running.spool_note,
                                &self.ctx.sync.remembering.note(group.id()),
                                &self.ctx.sync.let_go_note(group.id()),
                            ]),
                            lag_ms: if let Lag::Known { ms } = s.lag { Some(ms) } else { None },
                            spool_bytes: s.window_bytes,
                            spool_bytes_max: ByteLen(running.spool_max),
                            dirty_bytes: s.dirty,
                            sync_done: s.sync_done,
                            sync_total: s.sync_total,
                            durable: s.durable,
                            gate: gate.clone(),
                            captured_bytes: s.captured_bytes,
                            captured_records: s.captured_records,
                        }
                    }
                }
            })
            .collect();
        let now = clock::mono();
        AgentStatus {
            agent_version: crate::VERSION.to_owned(),
            kernel: kernel(),
            backend: self.backend(),
            uptime_s: now.ms_since(self.started) / 1000,
            rss_bytes: ByteLen(rss_bytes()),
            mono_ns: now.0,
            wall_us: clock::wall_us(),
            groups,
        }
    }

    pub(super) fn status_json(&self) -> Value {
        let counters = self.ctx.capture.as_ref().and_then(|c| c.counters().ok());
        let (ring_used, ring_size) = self.ctx.capture.as_ref().map_or((0, 0), |c| c.fill());
        let groups: Vec<Value> = self.groups.iter().map(|g| self.group_json(g)).collect();
        json!({
            "version": crate::VERSION,
            "kernel": kernel(),
            "host": self.identity.host,
            "box": {
                "address": self.peer.address,
                "name": self.box_name,
                "connected": self.control_up.is_some(),
                "reason": self.control_reason,
            },
            "backend": self.backend(),
            "uptime_s": clock::mono().ms_since(self.started) / 1000,
            "rss_bytes": rss_bytes(),
            "cpu_percent": self.cost.percent,
            "copy_mib_s": self.copy_mib_s,
            "memory_limit_bytes": memory_limit(),
            "ring": { "used_bytes": ring_used, "size_bytes": ring_size },
            "pressure": { "memory": self.host_pressure.psi_mem, "io": self.host_pressure.psi_io, "cpu": self.host_pressure.psi_cpu },
            "protect_rpo": self.config.throttle().map(|p| json!({
                "mib_s": p.mib_s,
                "limits": self.rpo.limits(),
                "why": self.rpo.why(),
                "trouble": self.rpo.trouble,
            })),
            "capture": counters.map(|c| json!({
                "requests": c.requests,
                "bytes": c.bytes,
                "dropped": c.drops,
                "dropped_bytes": c.drop_bytes,
                "unreadable": c.faults,
                "too_long": c.truncated,
                "passthrough": c.passthrough,
                "unknown": c.unknown,
            })),
            "groups": groups,
        })
    }

    fn group_json(&self, group: &super::Group) -> Value {
        let spec = &group.record.spec;
        let volumes: Vec<Value> = group
            .record
            .volumes
            .iter()
            .map(|v| json!({ "id": v.id, "device": format!("/dev/{}", v.device), "bytes": v.sectors * 512, "identity": v.identity.to_string() }))
            .collect();
        let mut value = json!({
            "id": spec.id,
            "name": spec.name,
            "volumes": volumes,
            "policy": spec.policy,
        });
        let more = match &group.running {
            None => json!({ "state": "stopped", "reason": group.stopped }),
            Some(running) => {
                let s: SourceStatus = running.source.status();
                let lag = match s.lag {
                    Lag::Known { ms } => json!(ms),
                    Lag::Never | Lag::Unknown { .. } => Value::Null,
                };
                let since = match s.lag {
                    Lag::Unknown { since } => json!(clock::mono().ms_since(since)),
                    Lag::Never | Lag::Known { .. } => Value::Null,
                };
                let (state, reason) = state_text(&s);
                json!({
                    "state": state,
                    "reason": text_of(&[&reason, &running.box_reason, &running.last_alarm, &self.ctx.sync.let_go_note(spec.id)]),
                    "stream": s.stream,
                    "lag_ms": lag,
                    "unknown_for_ms": since,
                    "synced_once": s.lag != Lag::Never,
                    "spool_bytes": s.window_bytes,
                    "spool_bytes_max": running.spool_max,
                    "spool_records": s.window_records,
                    "spool_memory_bytes": running.spool.memory(),
                    "spool_file_bytes": running.spool.in_file(),
                    "spool_note": running.spool_note,
                    "spool_file_io": running.spool.file_io(),
                    "spool_file_filled_bytes": running.spool.filled().map(|(to, _)| to),
                    "spool_pieces_left_out": group.record.skips.len(),
                    "dirty_bytes": s.dirty,
                    "sync_done_bytes": s.sync_done,
                    "sync_total_bytes": s.sync_total,
                    "found_same_bytes": s.same,
                    "unused_bytes": s.unused,
                    "surveying": s.surveying,
                    "copied_whole": running.copied_whole,
                    "durable": s.durable,
                    "next": s.next,
                    "pressure": pressure_text(running.pressure, &running.pressure_cause),
                    "marked_in_kernel": running.marked_in_kernel,
                    "unknown_writes": group.record.unknown.seen,
                    "captured_bytes": s.captured_bytes,
                    "captured_records": s.captured_records,
                    "journal_full": s.journal_full,
                    "gate": group.record.sync.then(|| s.gate.to_string()),
                    "marked_bytes": group.record.sync.then(|| self.ctx.sync.marked_bytes(spec.id)),
                    "compared_whole": group.record.sync.then(|| self.ctx.sync.remembering.note(spec.id)),
                })
            }
        };
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
        }
        value
    }
}

/// For the box: what of a group is held back for the host's sake; empty if nothing is.
fn held_back(running: &super::group::Running) -> String {
    if running.pressure == Pressure::None {
        String::new()
    } else {
        pressure_text(running.pressure, &running.pressure_cause)
    }
}

/// For the box, while it is copied: what is not, because no file system uses it.
fn left_out(s: &SourceStatus) -> String {
    match (s.surveying, s.gap) {
        (true, _) => "asking the file systems what they do not use".to_owned(),
        (false, Some(_)) if s.unused.0 > 0 => format!("{} that no file system uses are left out", s.unused),
        _ => String::new(),
    }
}

fn state_text(s: &SourceStatus) -> (&'static str, String) {
    match s.state {
        GroupAgentState::Disconnected => ("disconnected", String::new()),
        GroupAgentState::Opening => ("opening", String::new()),
        GroupAgentState::Syncing { reason } => ("syncing", reason.to_string()),
        GroupAgentState::Marking { reason } => ("marking", reason.to_string()),
        GroupAgentState::Replicating => ("replicating", String::new()),
        GroupAgentState::Paused => ("paused", String::new()),
        GroupAgentState::Stopped => ("stopped", String::new()),
    }
}

fn text_of(parts: &[&String]) -> String {
    parts.iter().filter(|p| !p.is_empty()).map(|p| p.as_str()).collect::<Vec<_>>().join("; ")
}
