//! The API's answers, as far as pages show them.
//!
//! Fields that are missing read as empty and fields that are new are ignored: the pages come with the box, but what they show was written
//! by whoever wrote the route, and a page that shows a little less is better than none.

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;
use std::collections::BTreeMap;

macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident : $kind:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default)]
        pub struct $name { $($(#[$field_doc])* #[serde(deserialize_with = "lenient")] pub $field: $kind),* }
    )* };
}

answers! {
    Status {
        version: String, box_name: String, now_us: u64, uptime_s: u64, rss_bytes: u64, listen: String, nbd_listen: Option<String>, ca_fingerprint: String,
        hosts: Vec<Host>, groups: Vec<Group>, views: Vec<View>, ingest_targets: Vec<Export>, disk: Disk, alerts: Vec<String>, events: Vec<Event>,
    }
    Disk { total: Option<u64>, available: Option<u64> }
    Host {
        id: String, name: String, connected: bool, last_heard_us: Option<u64>, revoked: bool, enrolled_us: u64,
        agent_version: Option<String>, backend: Option<String>, kernel: Option<String>, agent_rss_bytes: Option<u64>,
    }
    Group {
        id: String, name: String, host_name: Option<String>, branch: Option<Branch>, branches: Vec<String>, volumes: Vec<Volume>,
        policy: Option<Policy>, state: String, reason: Option<String>, sync: Option<Sync>, lag_ms: Option<u64>, lag_since_us: Option<u64>,
        durable_lsn: u64, first_time_us: Option<u64>, last_time_us: Option<u64>, write_rate_bytes_s: f64, write_rate_ops_s: f64,
        journal_bytes: u64, reserved_bytes: u64, base_bytes: u64, index_bytes: u64, segments: u64, records: u64, hours_of_history: f64,
        hours_forecast: Option<f64>, risks: Vec<Value>, alerts: Vec<String>, retention: Option<Retention>, spool_bytes: Option<u64>,
        dirty_bytes: Option<u64>,
    }
    Branch { group_name: Option<String>, lsn: u64 }
    Volume { id: u32, name: String, sectors: u64 }
    Sync { done_bytes: u64, total_bytes: u64 }
    Retention { kept: BTreeMap<String, Kept>, bytes_per_hour: Option<u64> }
    Kept { segments: u64, bytes: u64 }
    Policy {
        mode: Value, window_hours: u64, window_hours_floor: u64, journal_bytes_max: Option<u64>, alarm_below_hours: u64, priority: u64,
        lag_ms_alarm: u64,
    }
    View {
        id: String, group: String, lsn: u64, time_us: u64, opened_us: u64, open_ms: Option<f64>, opened_by: Option<String>,
        clients: Vec<String>, closes_in_s: Option<u64>, exports: Vec<Export>,
    }
    Export { volume_name: String, export_name: String, bytes: u64, unix_socket: String, uri: String, tcp_uri: Option<String> }
    Event { time_us: u64, event: String, subject: String, text: String }
    NewToken { token: String, expires_us: u64, ca_fingerprint: String, listen: String }
    PendingToken { host_name: Option<String>, expires_us: u64 }
    Points { valid: Vec<Stretch>, gaps: Vec<Gap>, bookmarks: Vec<Bookmark>, rate: Vec<Rate> }
    Stretch { first_lsn: u64, last_lsn: u64, first_time_us: u64, last_time_us: u64 }
    Gap { first_lsn: u64, reason: String, first_time_us: u64, last_time_us: Option<u64> }
    Bookmark { name: String, lsn: u64, time_us: u64, consistency: String }
    Rate { start_us: u64, end_us: u64, bytes: u64, writes: u64 }
    PlanEntry { name: String, plan: Plan, fault: Option<String> }
    Plan { subject: Subject, machine: Machine, applications: Vec<Named>, networks: Vec<Network>, lease: Option<Value>, detect: Option<Detect>, drill: Option<Value> }
    Subject { host: Option<String>, groups: Vec<String> }
    Machine { size: Size, agent: bool }
    Size { cpus: u64, memory_mib: u64 }
    Named { name: String }
    Network { addresses: Vec<Value> }
    Detect { automatic: bool }
    PlanStatus { host: String, plan: Option<String>, ownership: Option<Ownership>, seen: Option<Seen> }
    Ownership {
        owner: Value, term: u64, hold: String, rules: Option<Rules>, holding: Option<Value>, holding_age_ms: Option<u64>, waits_ms: Option<u64>,
        fences: bool, why_not: Option<String>, alerts: Vec<String>,
    }
    Rules { lease_ms: u64 }
    Seen { automatic: bool, verdict: String, text: String, reasons: Vec<Reason>, alarm: Option<String>, in_the_way: Option<String> }
    Reason { points: String, text: String, since_ms: u64, advisory: bool }
    Run {
        id: String, kind: String, plan_name: String, plan: Plan, decision: Option<String>, now: Option<String>, hold: bool, begun_us: u64,
        phase: Phase, steps: Vec<Step>, fenced: Option<Fenced>, points: Vec<PointTaken>, machine: Option<Value>, started: bool,
        applications: Vec<AppState>, measured: Measured, restarts_us: Vec<u64>, failback: Option<Failback>, authority: String,
        stuck: Option<String>, shipping: Option<Shipping>,
    }
    Phase { is: String, step: Option<String>, until_us: Option<u64>, how: Option<String> }
    Step { step: String, title: String, begun_us: u64, ended_us: Option<u64>, outcome: Outcome }
    Outcome { is: String, text: String, remedy: String }
    Fenced { by: String, output: String, who: String, term: u64, how: String }
    PointTaken { group: String, group_name: String, lsn: u64, time_us: u64, branch_name: String }
    AppState { name: String, up: bool, ms: u64, output: String }
    Measured {
        detection_ms: Option<u64>, first_instruction_ms: Option<u64>, booted_ms: Option<u64>, address_ms: Option<u64>,
        serving_ms: Option<u64>, point_age_ms: Option<u64>,
    }
    Failback {
        restore: String, target: String, by: String, commit_minutes: u64, steps: Vec<Step>, down_ms: Option<u64>, note: Option<String>,
        ended: Option<BackEnd>,
    }
    BackEnd { is: String, by: String, why: String }
    Shipping { is: String, done_bytes: Option<u64>, total_bytes: Option<u64>, behind_bytes: Option<u64>, left_bytes: Option<u64>, why: String, text: String, remedy: String }
    Target { host: String, name: String, address: String, since_us: u64, disks: Vec<TargetDisk> }
    TargetDisk { path: String, bytes: u64, model: String, serial: String, holds: Option<String>, in_use: Option<String> }
    Restore {
        id: String, target_name: String, begun_us: u64, phase: Shipping, shipped_bytes: u64, same_bytes: u64, kept_bytes: u64, finish: bool,
    }
    User { name: String, role: String, created_us: u64 }
    ApiToken { id: String, name: String, role: String, created_us: u64, by: String }
    AuditPage { entries: Vec<AuditEntry>, total: u64, broken_at: Option<u64> }
    AuditEntry { n: u64, time_us: u64, who: String, role: String, via: String, from: String, what: String, asked: String, status: u16, result: String, hash: String }
}

/// A value of the kind that is wanted; else what is empty. A text is wanted where JSON has something else: that, as it stands there.
fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(d: D) -> Result<T, D::Error> {
    let value = Value::deserialize(d)?;
    if value.is_null() {
        return Ok(T::default());
    }
    Ok(serde_json::from_value(value.clone())
        .or_else(|_| serde_json::from_value(Value::String(value.to_string())))
        .unwrap_or_default())
}

impl Volume {
    pub fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(model::SECTOR)
    }
}

impl Policy {
    fn sync(&self) -> Option<&Value> {
        self.mode.get("sync")
    }
    pub fn wait_ms(&self) -> u64 {
        self.sync().and_then(|s| s["wait_ms_max"].as_u64()).unwrap_or(2000)
    }
    pub fn holds(&self) -> bool {
        self.sync().is_some_and(|s| s["at_bound"] == "hold")
    }
    /// As a form has it; empty: no limit.
    pub fn gib(&self) -> String {
        self.journal_bytes_max.map(|b| (b as f64 / f64::from(1 << 30)).to_string()).unwrap_or_default()
    }
}

impl Subject {
    /// For people.
    pub fn name(&self) -> String {
        self.host.clone().unwrap_or_else(|| self.groups.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_another_version_are_read_as_far_as_they_go() {
        let group: Group = serde_json::from_str(
            r#"{"name":7,"lag_ms":"x","risks":null,"state":{"a":1},"new":[],"sync":{"done_bytes":1}}"#,
        )
        .unwrap();
        assert_eq!((group.name.as_str(), group.lag_ms, group.state.as_str()), ("7", None, r#"{"a":1}"#));
        assert_eq!(group.sync.unwrap().done_bytes, 1);
        assert!(group.risks.is_empty());
    }
}
