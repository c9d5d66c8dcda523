//! The control API's answers, as far as they are shown.
//!
//! A box and its command line may differ in version: fields that are missing read as empty, fields that are new are
//! ignored, and what cannot be understood is shown as it came.

use model::{Consistency, GapReason, GroupPolicy, RiskReason, VolumeSpec};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Status {
    pub version: String,
    pub box_name: String,
    pub data_dir: String,
    pub now_us: u64,
    pub listen: Option<String>,
    pub uptime_s: u64,
    pub rss_bytes: u64,
    pub ca_fingerprint: String,
    pub hosts: Vec<Host>,
    pub groups: Vec<Group>,
    pub views: Vec<View>,
    pub disk: Disk,
    pub journal_device: Option<JournalDevice>,
    pub alerts: Vec<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct JournalDevice {
    pub name: String,
    pub write_cache: String,
    pub durable_writes: String,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Disk {
    pub total: u64,
    pub available: u64,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Host {
    pub id: String,
    pub name: String,
    pub connected: bool,
    pub last_heard_us: Option<u64>,
    pub revoked: bool,
    pub agent_version: Option<String>,
    pub backend: Option<String>,
    pub agent_rss_bytes: Option<u64>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Group {
    pub id: String,
    pub name: String,
    pub host_name: Option<String>,
    pub volumes: Vec<VolumeSpec>,
    #[serde(deserialize_with = "lenient")]
    pub policy: Option<GroupPolicy>,
    pub state: String,
    #[serde(deserialize_with = "text")]
    pub reason: Option<String>,
    pub sync: Option<Sync>,
    pub lag_ms: Option<u64>,
    pub lag_since_us: Option<u64>,
    pub lag_proven_us: Option<u64>,
    pub appended_lsn: u64,
    pub durable_lsn: u64,
    pub first_time_us: Option<u64>,
    pub last_time_us: Option<u64>,
    pub write_rate_bytes_s: f64,
    pub write_rate_ops_s: f64,
    pub journal_bytes: u64,
    pub reserved_bytes: u64,
    pub alerts: Vec<String>,
    pub index_bytes: u64,
    pub base_bytes: u64,
    pub segments: u64,
    pub records: u64,
    pub hours_of_history: f64,
    pub hours_forecast: Option<f64>,
    #[serde(deserialize_with = "text")]
    pub pressure: Option<String>,
    #[serde(deserialize_with = "risks")]
    pub risks: Vec<String>,
    pub retention: Value,
}

#[derive(Deserialize, Debug, Default, Clone, Copy)]
#[serde(default)]
pub struct Sync {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Token {
    pub token: String,
    pub expires_us: u64,
    pub ca_fingerprint: String,
    /// Where agents connect, as the box listens.
    #[serde(default)]
    pub listen: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct View {
    pub id: Value,
    pub group: String,
    pub lsn: u64,
    pub time_us: u64,
    pub open_ms: Option<f64>,
    pub opened_by: Option<String>,
    pub clients: Vec<String>,
    pub idle_limit_s: Option<u64>,
    pub closes_in_s: Option<u64>,
    pub exports: Vec<Export>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Export {
    pub volume: u32,
    pub volume_name: String,
    pub export_name: String,
    pub bytes: u64,
    pub unix_socket: String,
    pub uri: String,
    pub tcp_uri: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Points {
    pub valid: Vec<PointRange>,
    pub gaps: Vec<Gap>,
    pub bookmarks: Vec<Bookmark>,
    pub rate: Vec<Rate>,
}

#[derive(Deserialize, Debug, Default, Clone, Copy)]
#[serde(default)]
pub struct PointRange {
    pub first_lsn: u64,
    pub last_lsn: u64,
    pub first_time_us: u64,
    pub last_time_us: u64,
}

#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default)]
pub struct Gap {
    pub first_lsn: u64,
    pub last_lsn: Option<u64>,
    #[serde(deserialize_with = "gap_reason")]
    pub reason: String,
    pub first_time_us: u64,
    pub last_time_us: Option<u64>,
}

#[derive(Deserialize, Debug, Default, Clone)]
#[serde(default)]
pub struct Bookmark {
    pub name: String,
    pub lsn: u64,
    pub time_us: u64,
    #[serde(deserialize_with = "lenient")]
    pub consistency: Option<Consistency>,
}

#[derive(Deserialize, Debug, Default, Clone, Copy)]
#[serde(default)]
pub struct Rate {
    pub start_us: u64,
    pub end_us: u64,
    pub bytes: u64,
    pub writes: u64,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct ClientCert {
    pub certificate_pem: String,
    pub key_pem: String,
    pub ca_pem: String,
}

/// A value of a known type, or nothing when this version does not understand it.
fn lenient<'de, D: Deserializer<'de>, T: for<'a> Deserialize<'a>>(d: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(d)?).ok())
}

/// Null, a text, or whatever else as JSON.
fn text<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(d)? {
        Value::Null => None,
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    })
}

fn risks<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let Value::Array(risks) = Value::deserialize(d)? else { return Ok(Vec::new()) };
    Ok(risks
        .into_iter()
        .map(|risk| match serde_json::from_value::<RiskReason>(risk.clone()) {
            Ok(known) => known.to_string(),
            Err(_) => risk.as_str().map_or_else(|| risk.to_string(), str::to_owned),
        })
        .collect())
}

fn gap_reason<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let reason = Value::deserialize(d)?;
    Ok(match serde_json::from_value::<GapReason>(reason.clone()) {
        Ok(known) => known.to_string(),
        Err(_) => reason.as_str().map_or_else(|| reason.to_string(), str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_another_version_are_read_as_far_as_they_go() {
        let group: Group = serde_json::from_str(
            r#"{"name":"g","policy":{"unheard":1},"risks":[{"kind":"never-synced"},{"kind":"sunspots","n":2},"x"],
                "reason":{"a":1},"pressure":"ok","hours_of_history":3,"volumes":[],"new_field":[1]}"#,
        )
        .unwrap();
        assert_eq!(group.policy, None);
        assert!(group.risks[0].starts_with("the first copy has not ended"), "{:?}", group.risks);
        assert_eq!(group.risks[1..], [r#"{"kind":"sunspots","n":2}"#, "x"]);
        assert_eq!(group.reason.as_deref(), Some(r#"{"a":1}"#));
        let gap: Gap = serde_json::from_str(r#"{"reason":"journal-full","last_lsn":null}"#).unwrap();
        assert_eq!((gap.reason.as_str(), gap.last_lsn), ("the journal was full", None));
    }
}
