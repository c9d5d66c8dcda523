//! Words for the API's codes, in the viewer's language; a code that nobody knows is shown as it came.

use crate::{answers::Group, format, lang::Lang};
use serde_json::Value;

/// How bad something is; also the name of its colour.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tone {
    Idle,
    Good,
    Busy,
    Warn,
    Bad,
}

impl Tone {
    pub const fn class(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Good => "good",
            Self::Busy => "busy",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }
}

pub fn code(lang: Lang, section: &str, code: &str) -> String {
    lang.known(&format!("{section}.{code}")).unwrap_or(code).to_owned()
}

/// Why a group is not as safe as it should be.
pub fn risk(lang: Lang, risk: &Value) -> String {
    let kind = risk["kind"].as_str().unwrap_or_default();
    let key = format!("risk.{kind}");
    if lang.known(&key).is_none() {
        return risk.as_str().map_or_else(|| risk.to_string(), str::to_owned);
    }
    let text = |name: &str| risk[name].as_str().map_or_else(|| risk[name].to_string(), str::to_owned);
    let span = |name: &str| format::span_ms(risk[name].as_u64().unwrap_or(0));
    let with = match kind {
        "resyncing" => vec![code(lang, "gap", &text("reason"))],
        "lagging" => vec![span("lag_ms"), span("alarm_ms")],
        "history-short" => vec![text("hours_left"), text("alarm_hours")],
        "corrupt" | "damaged" => vec![text("what")],
        "unknown-writes" => vec![text("commands")],
        "capture-reduced" => vec![text("why")],
        "host-throttled" => vec![text("mib_s"), text("why")],
        _ => Vec::new(),
    };
    lang.fill(&key, &with.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Whether something could be lost now.
fn is_grave(risk: &Value) -> bool {
    matches!(risk["kind"].as_str(), Some("never-synced" | "host-silent" | "journal-full" | "corrupt" | "damaged"))
}

pub fn group_tone(group: &Group) -> Tone {
    match group.state.as_str() {
        "stopped" => Tone::Bad,
        _ if group.risks.iter().any(is_grave) => Tone::Bad,
        _ if !group.risks.is_empty() || !group.alerts.is_empty() => Tone::Warn,
        "opening" | "syncing" | "resyncing" => Tone::Busy,
        "released" => Tone::Idle,
        "disconnected" | "never-synced" => Tone::Warn,
        _ => Tone::Good,
    }
}

pub fn run_tone(phase: &str, kind: &str) -> Tone {
    match phase {
        "failed" => Tone::Bad,
        "serving" if kind == "failover" => Tone::Warn,
        "serving" => Tone::Good,
        "ended" | "committed" => Tone::Idle,
        "returned" => Tone::Warn,
        _ => Tone::Busy,
    }
}

pub fn outcome_tone(outcome: &str) -> Tone {
    match outcome {
        "done" => Tone::Good,
        "failed" => Tone::Bad,
        "running" => Tone::Busy,
        _ => Tone::Idle,
    }
}

/// Events that somebody should look at, by how the box logs them.
pub fn event_tone(event: &str) -> Tone {
    const BAD: [&str; 14] = [
        "duplicate-agent",
        "frame-refused",
        "group-stopped",
        "journal-full",
        "job-failed",
        "view-damaged",
        "copy-damaged",
        "takeover-failed",
        "restore-failed",
        "ownership-unsure",
        "host-plan-refused",
        "takeover-restarted",
        "audit-failed",
        "certificate-failed",
    ];
    const WARN: [&str; 24] = [
        "token-refused",
        "host-revoked",
        "host-refused",
        "handshake-failed",
        "connection-limit",
        "host-silent",
        "group-recovered",
        "group-reopened",
        "group-deleted",
        "history-shortened",
        "view-expired",
        "nbd-refused",
        "stray",
        "device-doubtful",
        "unknown-write",
        "capture-reduced",
        "host-throttled",
        "takeover-begun",
        "takeover-serving",
        "restore-begun",
        "owner-changed",
        "takeover-doubt",
        "takeover-decided",
        "failback-returned",
    ];
    if BAD.contains(&event) {
        Tone::Bad
    } else if WARN.contains(&event) {
        Tone::Warn
    } else {
        Tone::Idle
    }
}
