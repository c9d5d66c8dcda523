//! What box and agent say about who owns a host. The machines that say it are in `replication::ownership`.
//!
//! All of it is in version [`VERSION_OWNERSHIP`](crate::VERSION_OWNERSHIP) of the protocol and goes over the control connection. An
//! agent of an earlier version is welcome as ever: it is never asked for any of this, so nothing can be leased to it, and the box takes
//! over from it by hand or by power fencing only.
//!
//! # What the box may make an agent do
//!
//! Stop and start systemd units, and take down and put up addresses, all by name; and run what the host's own configuration has under a
//! name. No command line crosses the network: whoever owns the box does not own the hosts with it.

// From core: only the parsing of addresses, sockets stay with the caller.
use core::net::{IpAddr, SocketAddr};
use model::{HostId, Owner, Term};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The most of each that one [`HostPlan`] has: a host with more is several hosts.
pub const PLAN_ITEMS_MAX: usize = 64;
/// The longest name or argument in a [`HostPlan`].
pub const PLAN_TEXT_MAX: usize = 256;
/// What is kept of a probe's output.
pub const PROBE_OUTPUT_MAX: usize = 2048;

/// How long a lease runs, and what of it the holder keeps for stopping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRules {
    pub lease_ms: u64,
    /// The end of the lease, in which addresses are taken down and services stopped.
    pub stop_ms: u64,
}

/// What a holder says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holding {
    /// Serves, and no lease of ours can end that.
    Unfenced,
    /// Addresses down, services stopped.
    Down,
    Raising,
    Serving,
    Stopping,
    /// Serves because somebody at the host said so.
    ByHand,
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unfenced => "serving without a lease",
            Self::Down => "down",
            Self::Raising => "being raised",
            Self::Serving => "serving",
            Self::Stopping => "being stopped",
            Self::ByHand => "serving by hand",
        })
    }
}

/// From an agent, each second: may I (go on to) serve?
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The host whose services these are: the sender itself, or the one it stands by for.
    pub whose: HostId,
    /// The highest the sender has stored.
    pub term: Term,
    /// Tells the answer to this one from those to others, also over a restart of the sender.
    pub nonce: u64,
    pub holding: Holding,
}

/// The box's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseAnswer {
    pub whose: HostId,
    pub term: Term,
    pub nonce: u64,
    pub verdict: LeaseVerdict,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum LeaseVerdict {
    /// Serve until this long after the request was sent, by your clock.
    Granted(LeaseRules),
    /// Serve without end: nobody is going to take over unless you say that you have stopped.
    Standing,
    /// From now on by lease: store that, with this term, and ask again.
    Arm(LeaseRules),
    /// Somebody else serves, or will.
    NotYours { owner: Owner },
}

/// Stop (box), or: have stopped and will not serve in this term any more (agent).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseEnd {
    pub whose: HostId,
    pub term: Term,
}

/// An address that belongs to the services, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanAddress {
    /// With its prefix, as `ip address` takes it: `192.0.2.7/24`.
    pub address: String,
    pub device: String,
}

/// Something that is stopped and started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanService {
    /// A systemd unit.
    Unit(String),
    /// A pair of commands in the host's own configuration, by name.
    Configured(String),
}

/// What shows whether an application works.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeKind {
    /// A systemd unit is active.
    Unit(String),
    /// A process with this name runs.
    Process(String),
    /// Somebody accepts connections there.
    Tcp { address: String },
    /// Answers `GET path` with a status below 400.
    Http { address: String, path: String },
    /// Answers as PostgreSQL does.
    Postgres { address: String },
    /// Greets as MySQL or MariaDB does.
    Mysql { address: String },
    /// Answers PING as Redis does.
    Redis { address: String },
    /// The operator's script of that name in the host's own configuration ends with 0.
    Script(String),
    /// The same over TLS 1.3. `name`: whom to ask for; none: the address. Whose certificate it shows is not looked at.
    Https { address: String, path: String, name: Option<String> },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlanProbe {
    pub name: String,
    pub kind: ProbeKind,
    pub every_ms: u64,
    pub timeout_ms: u64,
}

/// The second channel: small authenticated datagrams, see [`Beat`](crate::Beat).
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanBeat {
    pub port: u16,
    pub period_ms: u64,
    pub key: [u8; 32],
}

impl fmt::Debug for PlanBeat {
    /// Without the key: messages are logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlanBeat").field("port", &self.port).field("period_ms", &self.period_ms).finish_non_exhaustive()
    }
}

/// What an agent has to watch, to stop and to start for a host: itself, or one that it stands by for. It replaces the one before.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostPlan {
    pub whose: HostId,
    pub version: u64,
    /// Taken down first, put up last.
    pub addresses: Vec<PlanAddress>,
    /// Started in this order, stopped in the other.
    pub services: Vec<PlanService>,
    pub probes: Vec<PlanProbe>,
    pub beat: Option<PlanBeat>,
}

/// A part of a [`HostPlan`] that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{count} {what}, at most {PLAN_ITEMS_MAX} are allowed")]
    TooMany { what: &'static str, count: usize },
    #[error("{text:?} is not {what}")]
    Text { what: &'static str, text: String },
    #[error("probe {name:?}: {what} is {ms} ms, it must be between {low} and {high}")]
    Time { name: String, what: &'static str, ms: u64, low: u64, high: u64 },
}

impl HostPlan {
    /// Everything in it is bounded and cannot be taken for an option, a path or a second argument by the tools that get it.
    pub fn check(&self) -> Result<(), PlanError> {
        let counts =
            [("addresses", self.addresses.len()), ("services", self.services.len()), ("probes", self.probes.len())];
        for (what, count) in counts {
            if count > PLAN_ITEMS_MAX {
                return Err(PlanError::TooMany { what, count });
            }
        }
        for PlanAddress { address, device } in &self.addresses {
            let (ip, bits) = address.split_once('/').unwrap_or((address, ""));
            let max = match ip.parse() {
                Ok(IpAddr::V4(_)) => 32,
                Ok(IpAddr::V6(_)) => 128,
                Err(_) => 0,
            };
            let whole = bits.parse::<u8>().is_ok_and(|bits| (1..=max).contains(&bits));
            text("an address with its prefix, like 192.0.2.7/24", address, |_| whole)?;
            // The kernel's own limit, and what it does not allow in a name.
            text("a network device", device, |d| d.len() <= 15 && !d.contains('/'))?;
        }
        for service in &self.services {
            match service {
                PlanService::Unit(unit) => text("a systemd unit", unit, is_unit)?,
                PlanService::Configured(name) => text("a name of the configuration", name, is_plain)?,
            }
        }
        self.probes.iter().try_for_each(check_probe)
    }
}

fn check_probe(probe: &PlanProbe) -> Result<(), PlanError> {
    text("a name of a probe", &probe.name, is_plain)?;
    let socket = |address: &String| {
        text("an address and port, like 127.0.0.1:5432", address, |a| a.parse::<SocketAddr>().is_ok())
    };
    match &probe.kind {
        ProbeKind::Unit(unit) => text("a systemd unit", unit, is_unit)?,
        ProbeKind::Process(name) => text("a name of a process", name, |n| !n.contains('/'))?,
        ProbeKind::Script(name) => text("a name of the configuration", name, is_plain)?,
        ProbeKind::Http { address, path } => {
            socket(address)?;
            text("a path that begins with /", path, |p| p.starts_with('/'))?;
        }
        ProbeKind::Https { address, path, name } => {
            socket(address)?;
            text("a path that begins with /", path, |p| p.starts_with('/'))?;
            let host = |n: &str| n.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'));
            name.iter().try_for_each(|name| text("the name of a server", name, host))?;
        }
        ProbeKind::Tcp { address }
        | ProbeKind::Postgres { address }
        | ProbeKind::Mysql { address }
        | ProbeKind::Redis { address } => socket(address)?,
    }
    for (what, ms, low, high) in
        [("its interval", probe.every_ms, 500, 3_600_000), ("its time", probe.timeout_ms, 100, 300_000)]
    {
        if !(low..=high).contains(&ms) {
            return Err(PlanError::Time { name: probe.name.clone(), what, ms, low, high });
        }
    }
    Ok(())
}

fn text(what: &'static str, value: &str, right: impl Fn(&str) -> bool) -> Result<(), PlanError> {
    let sane = !value.is_empty()
        && value.len() <= PLAN_TEXT_MAX
        && !value.starts_with('-')
        && value.chars().all(|c| c.is_ascii_graphic());
    if sane && right(value) {
        return Ok(());
    }
    Err(PlanError::Text { what, text: value.chars().take(PLAN_TEXT_MAX).collect() })
}
fn is_plain(name: &str) -> bool {
    name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}
fn is_unit(name: &str) -> bool {
    name.contains('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':' | '\\'))
}

/// How a probe ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ProbeEnd {
    Works,
    /// The application's fault.
    Fails {
        why: String,
    },
    /// The probe could not be made: that proves nothing about the application.
    Broken {
        why: String,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProbeResult {
    pub whose: HostId,
    pub name: String,
    pub end: ProbeEnd,
    pub took_ms: u64,
    /// The first [`PROBE_OUTPUT_MAX`] bytes of what a script printed.
    pub output: String,
}

/// A step of a planned move, made while the host is still the owner; ownership itself is not moved by orders.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostOrder {
    DropAddresses,
    RaiseAddresses,
    StopServices,
    StartServices,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> HostPlan {
        HostPlan {
            whose: HostId([1; 16]),
            version: 1,
            addresses: vec![PlanAddress { address: "192.0.2.7/24".into(), device: "eth0.12".into() }],
            services: vec![
                PlanService::Unit("postgresql@15-main.service".into()),
                PlanService::Configured("web".into()),
            ],
            probes: vec![PlanProbe {
                name: "db".into(),
                kind: ProbeKind::Postgres { address: "127.0.0.1:5432".into() },
                every_ms: 2000,
                timeout_ms: 1000,
            }],
            beat: Some(PlanBeat { port: 7440, period_ms: 1000, key: [7; 32] }),
        }
    }

    #[test]
    fn a_plan_cannot_smuggle_options_or_commands() {
        assert_eq!(plan().check(), Ok(()));
        type Change = fn(&mut HostPlan);
        let cases: [(Change, &str); 12] = [
            (|p| p.addresses[0].address = "192.0.2.7".into(), "with its prefix"),
            (|p| p.addresses[0].address = "192.0.2.7/33".into(), "with its prefix"),
            (|p| p.addresses[0].address = "-6/24".into(), "with its prefix"),
            (|p| p.addresses[0].device = "eth0 up".into(), "network device"),
            (|p| p.addresses[0].device = "../../etc".into(), "network device"),
            (|p| p.services[0] = PlanService::Unit("--force.service".into()), "systemd unit"),
            (|p| p.services[0] = PlanService::Unit("a.service;reboot".into()), "systemd unit"),
            (|p| p.services[1] = PlanService::Configured("/bin/sh".into()), "name of the configuration"),
            (|p| p.probes[0].kind = ProbeKind::Script("a b".into()), "name of the configuration"),
            (
                |p| p.probes[0].kind = ProbeKind::Http { address: "1.2.3.4:80".into(), path: "x".into() },
                "begins with /",
            ),
            (|p| p.probes[0].every_ms = 0, "its interval is 0 ms"),
            (|p| p.services = vec![PlanService::Configured("a".into()); 65], "65 services"),
        ];
        for (change, said) in cases {
            let mut bad = plan();
            change(&mut bad);
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(said), "{error} lacks {said}");
        }
        assert!(!format!("{:?}", plan()).contains("7, 7, 7"), "the key is not for logs");
    }
}
