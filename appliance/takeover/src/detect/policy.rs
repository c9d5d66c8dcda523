//! What has to be seen before a takeover begins by itself: how many beats, on which channels, for how long, with what proof.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A way by which a host shows that it lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Anything heard on the replication streams or the control connection.
    Stream,
    /// The small authenticated datagrams.
    Beat,
    /// The host's kernel answers echo requests.
    Icmp,
    /// The host's network card answers for its address.
    Arp,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "the agent's connections",
            Self::Beat => "the heartbeat datagrams",
            Self::Icmp => "ping",
            Self::Arp => "ARP",
        })
    }
}

/// What a channel's silence and life count for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// Must be silent; while it shows life there is no takeover by itself.
    Required,
    /// Shown beside the decision, and no more.
    Advisory,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelRule {
    pub channel: Channel,
    pub weight: Weight,
    pub period_ms: u64,
    /// So many missed beats in a row make it silent.
    pub missed_max: u32,
}

/// What a failing application leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeThen {
    Alarm,
    Takeover,
}

/// A probe or operator's script, by the name the plan gives it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeRule {
    pub name: String,
    pub failures_min: u32,
    pub for_ms: u64,
    /// An older result says nothing.
    pub fresh_ms: u64,
    pub then: ProbeThen,
}

/// Proof that it is not the box that is cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UplinkRule {
    /// The gateway must have answered.
    pub gateway: bool,
    /// So many peers and other hosts must have been heard.
    pub others_min: u32,
    pub fresh_ms: u64,
}

/// Each return of a silent host within the window doubles how long silence must last the next time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Damping {
    pub window_ms: u64,
    pub hold_ms_max: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whether a takeover begins with no hand on it. Else everything is watched, and alarms say what is seen.
    pub automatic: bool,
    pub channels: Vec<ChannelRule>,
    /// All required channels must have been silent together for this long.
    pub hold_ms: u64,
    pub uplink: UplinkRule,
    pub probes: Vec<ProbeRule>,
    pub damping: Damping,
    /// After the box's own start, a host that was never heard proves nothing for so long; it may be booting as well.
    pub grace_ms: u64,
    /// Whether a host may be taken over that the box has not heard since its own start.
    pub unheard: bool,
}

impl Default for Policy {
    /// Detects in less than six seconds: five for four missed beats, a quarter of one for holding, the rest for a line that is sometimes late.
    fn default() -> Self {
        let rule = |channel, weight| ChannelRule { channel, weight, period_ms: 1_000, missed_max: 4 };
        Self {
            automatic: false,
            channels: vec![
                rule(Channel::Stream, Weight::Required),
                rule(Channel::Beat, Weight::Required),
                rule(Channel::Icmp, Weight::Required),
            ],
            hold_ms: 250,
            uplink: UplinkRule { gateway: true, others_min: 0, fresh_ms: 3_000 },
            probes: Vec::new(),
            damping: Damping { window_ms: 600_000, hold_ms_max: 120_000 },
            grace_ms: 60_000,
            unheard: false,
        }
    }
}

/// A policy that cannot work, with what would.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("no channel is required: name at least one whose silence shows that the host is dead")]
    NothingRequired,
    #[error(
        "automatic takeover needs proof of the box's own uplink: set `gateway = true` or `others_min` to at least 1"
    )]
    NoUplinkProof,
    #[error("{channel} is listed twice")]
    Twice { channel: Channel },
    #[error("probe {name:?} is listed twice")]
    ProbeTwice { name: String },
    #[error("{what} is {is}: it must be between {low} and {high}")]
    Range { what: &'static str, is: u64, low: u64, high: u64 },
}

impl Policy {
    pub fn check(&self) -> Result<(), PolicyError> {
        let range = |what, is, low, high| {
            if (low..=high).contains(&is) { Ok(()) } else { Err(PolicyError::Range { what, is, low, high }) }
        };
        let day = 86_400_000;
        for (at, rule) in self.channels.iter().enumerate() {
            if self.channels[..at].iter().any(|r| r.channel == rule.channel) {
                return Err(PolicyError::Twice { channel: rule.channel });
            }
            range("period_ms", rule.period_ms, 100, 60_000)?;
            // One lost packet is not a dead host.
            range("missed_max", u64::from(rule.missed_max), 2, 1_000)?;
        }
        if !self.channels.iter().any(|r| r.weight == Weight::Required) {
            return Err(PolicyError::NothingRequired);
        }
        if self.automatic && !self.uplink.gateway && self.uplink.others_min == 0 {
            return Err(PolicyError::NoUplinkProof);
        }
        for (at, probe) in self.probes.iter().enumerate() {
            if self.probes[..at].iter().any(|p| p.name == probe.name) {
                return Err(PolicyError::ProbeTwice { name: probe.name.clone() });
            }
            range("failures_min", u64::from(probe.failures_min), 2, 1_000)?;
            range("for_ms", probe.for_ms, 0, day)?;
            range("fresh_ms", probe.fresh_ms, 100, day)?;
        }
        range("hold_ms", self.hold_ms, 0, 600_000)?;
        range("hold_ms_max", self.damping.hold_ms_max, self.hold_ms, day)?;
        range("window_ms", self.damping.window_ms, 0, day)?;
        range("fresh_ms", self.uplink.fresh_ms, 100, 60_000)?;
        range("grace_ms", self.grace_ms, 0, day)
    }
}
