//! The sections of a plan that work before anything is lost: `[lease]`, by which the host stops by itself, and `[detect]`, what shows that
//! it is lost.

use super::{Address, Checker, Network, Subject};
use crate::detect::{Channel, ChannelRule, Damping, Policy, ProbeRule, ProbeThen, UplinkRule, Weight};
use model::HostId;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use toml::Spanned;
use wire::{HostPlan, LeaseRules, PLAN_ITEMS_MAX, PlanAddress, PlanProbe, PlanService, ProbeKind};

/// As `replication::ownership::check_rules` has it, which this crate may not use; a test of the box compares them.
pub const LEASE_MS_MIN: u64 = 3_000;
pub const LEASE_MS_MAX: u64 = 600_000;
pub const STOP_MS_MIN: u64 = 500;
/// What a lease leaves for renewing it.
pub const RENEWING_MS: u64 = 2_000;
const LEASE_MS: u64 = 10_000;
const STOP_MS: u64 = 4_000;
/// Addresses that prove the uplink, beside the gateway.
pub const OTHERS_MAX: usize = 16;
/// A week: what is followed later than that is a copy, and no standby.
const LAG_SECONDS_MAX: u64 = 604_800;
const DAY_MS: u64 = 86_400_000;

/// The host serves only as long as it hears the box.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lease {
    pub rules: LeaseRules,
    /// Of the services, as the host has them: taken down first.
    pub addresses: Vec<PlanAddress>,
    /// Started in this order, stopped in the other.
    pub services: Vec<PlanService>,
}

/// What shows that the host is lost, and whether a takeover follows by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Detect {
    pub policy: Policy,
    /// Where the host is pinged; none: where its agent connects from.
    pub address: Option<IpAddr>,
    /// Pinged to prove the box's own uplink.
    pub gateway: Option<IpAddr>,
    pub others: Vec<IpAddr>,
    /// Made by the host's agent.
    pub probes: Vec<PlanProbe>,
}

/// Which disk of a standby gets a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandbyDisk {
    /// None: of the host's only group.
    #[serde(default)]
    pub group: Option<String>,
    pub volume: String,
    pub disk: String,
}

/// What a standby has to serve with, and how it follows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standby {
    /// So old is what its disks are brought to: time to stop what should not have been written.
    pub lag_seconds: u64,
    /// Empty: found by size.
    pub disks: Vec<StandbyDisk>,
    /// As the standby has them: put up last.
    pub addresses: Vec<PlanAddress>,
    /// Started in this order, mounts among them; stopped in the other.
    pub services: Vec<PlanService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileStandby {
    lag_seconds: Option<Spanned<u64>>,
    #[serde(default)]
    disks: Vec<Spanned<StandbyDisk>>,
    #[serde(default)]
    addresses: Vec<Spanned<PlanAddress>>,
    #[serde(default)]
    services: Vec<Spanned<PlanService>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileLease {
    lease_ms: Option<Spanned<u64>>,
    stop_ms: Option<Spanned<u64>>,
    #[serde(default)]
    addresses: Vec<Spanned<PlanAddress>>,
    #[serde(default)]
    services: Vec<Spanned<PlanService>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileDetect {
    automatic: Option<Spanned<bool>>,
    address: Option<Spanned<String>>,
    hold_ms: Option<Spanned<u64>>,
    grace_ms: Option<Spanned<u64>>,
    #[serde(default)]
    unheard: bool,
    channels: Option<Spanned<Vec<Spanned<FileChannel>>>>,
    uplink: Option<Spanned<FileUplink>>,
    damping: Option<Spanned<FileDamping>>,
    #[serde(default)]
    probe: Vec<Spanned<FileProbe>>,
}

impl FileDetect {
    pub(super) fn is_automatic(&self) -> bool {
        self.automatic.as_ref().is_some_and(|at| *at.get_ref())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileChannel {
    channel: Channel,
    weight: Option<Weight>,
    period_ms: Option<Spanned<u64>>,
    missed_max: Option<Spanned<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileUplink {
    gateway: Option<Spanned<String>>,
    #[serde(default)]
    others: Vec<Spanned<String>>,
    others_min: Option<Spanned<u32>>,
    fresh_ms: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDamping {
    window_ms: Option<Spanned<u64>>,
    hold_ms_max: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileProbe {
    name: Spanned<String>,
    kind: Spanned<ProbeKind>,
    every_ms: Option<Spanned<u64>>,
    timeout_ms: Option<Spanned<u64>>,
    failures_min: Option<Spanned<u32>>,
    for_ms: Option<Spanned<u64>>,
    fresh_ms: Option<Spanned<u64>>,
    then: Option<ProbeThen>,
}

/// Whether an agent would take it, by the rules that agents check with.
fn agent_says(addresses: &[PlanAddress], services: &[PlanService], probes: &[PlanProbe]) -> Result<(), String> {
    let plan = HostPlan {
        whose: HostId([0; 16]),
        version: 0,
        addresses: addresses.to_vec(),
        services: services.to_vec(),
        probes: probes.to_vec(),
        beat: None,
    };
    plan.check().map_err(|e| e.to_string())
}

impl Checker<'_> {
    pub(super) fn lease(&mut self, at: &Spanned<FileLease>, subject: &Subject, networks: &[Network]) -> Lease {
        let file = at.get_ref();
        self.host_only(at, subject, "a lease is held by a host's agent");
        let lease_ms = self.given(file.lease_ms.as_ref(), "lease_ms", LEASE_MS, LEASE_MS_MIN, LEASE_MS_MAX);
        let most = lease_ms.saturating_sub(RENEWING_MS);
        let stop_ms = self.given(file.stop_ms.as_ref(), "stop_ms", STOP_MS.min(most), STOP_MS_MIN, most);
        let (addresses, services) = self.stopped_and_started(at, &file.addresses, &file.services);
        if file.addresses.is_empty() && file.services.is_empty() {
            let remedy = "name the services, and the addresses they answer at";
            self.fault(at, "a lease that stops nothing keeps no two from serving", remedy);
        }
        // The machine will have it: the host must not keep it.
        let kept: Vec<String> = networks
            .iter()
            .flat_map(|n| &n.addresses)
            .filter(|a| !addresses.iter().any(|l| l.address.parse::<Address>().is_ok_and(|l| l.ip == a.ip)))
            .map(ToString::to_string)
            .collect();
        if !kept.is_empty() {
            let what = format!("the host would keep {} while the machine answers there", kept.join(", "));
            self.fault(at, what, "add it to addresses here, with the host's device");
        }
        Lease { rules: LeaseRules { lease_ms, stop_ms }, addresses, services }
    }

    pub(super) fn standby(&mut self, at: &Spanned<FileStandby>, lease: Option<&Lease>) -> Standby {
        let file = at.get_ref();
        let lag_seconds = self.given(file.lag_seconds.as_ref(), "lag_seconds", 0, 0, LAG_SECONDS_MAX);
        let mut disks: Vec<StandbyDisk> = Vec::new();
        for item in &file.disks {
            let disk = item.get_ref();
            if !disk.disk.starts_with("/dev/") {
                self.fault(item, format!("{:?} is no disk", disk.disk), "give its path on the standby, as /dev/vdb");
            }
            let same = |d: &StandbyDisk| d.disk == disk.disk || (d.group == disk.group && d.volume == disk.volume);
            if disks.iter().any(same) {
                self.fault(item, "this volume or this disk is there twice", "take one out");
            }
            disks.push(disk.clone());
        }
        let (addresses, services) = self.stopped_and_started(at, &file.addresses, &file.services);
        if services.is_empty() {
            let remedy = "name its mounts and services, in the order they are started: { unit = \"srv.mount\" }";
            self.fault(at, "a standby that starts nothing serves nobody", remedy);
        }
        // Else it would answer at both, or at none.
        let ip = |a: &PlanAddress| a.address.parse::<Address>().ok().map(|a| a.ip);
        for address in lease.iter().flat_map(|l| &l.addresses) {
            if !addresses.iter().any(|a| ip(a) == ip(address)) {
                let what = format!("the host's {} would answer nowhere", address.address);
                self.fault(at, what, "add it to addresses here, with the standby's device");
            }
        }
        Standby { lag_seconds, disks, addresses, services }
    }

    /// What an agent takes down and puts up again.
    fn stopped_and_started<T>(
        &mut self,
        at: &Spanned<T>,
        given_addresses: &[Spanned<PlanAddress>],
        given_services: &[Spanned<PlanService>],
    ) -> (Vec<PlanAddress>, Vec<PlanService>) {
        let mut addresses = Vec::new();
        for item in given_addresses {
            let address = item.get_ref();
            match address.address.parse::<Address>().and_then(|_| agent_says(std::slice::from_ref(address), &[], &[])) {
                Err(why) => self.fault(item, why, "give { address = \"192.0.2.10/24\", device = \"eth0\" }"),
                Ok(()) if addresses.contains(address) => {
                    self.fault(item, format!("{} is there twice", address.address), "take one out");
                }
                Ok(()) => addresses.push(address.clone()),
            }
        }
        let mut services = Vec::new();
        for item in given_services {
            match agent_says(&[], std::slice::from_ref(item.get_ref()), &[]) {
                Err(why) => {
                    let remedy = "give { unit = \"name.service\" }, or { configured = \"name\" } of the agent's [fence.services.name]";
                    self.fault(item, why, remedy);
                }
                Ok(()) if services.contains(item.get_ref()) => {
                    self.fault(item, "this service is there twice", "take one out");
                }
                Ok(()) => services.push(item.get_ref().clone()),
            }
        }
        for (count, what) in [(given_addresses.len(), "addresses"), (given_services.len(), "services")] {
            if count > PLAN_ITEMS_MAX {
                self.fault(at, format!("more than {PLAN_ITEMS_MAX} {what}"), "take some out");
            }
        }
        (addresses, services)
    }

    /// `fenced`: whether something of the plan makes sure that the host is off.
    pub(super) fn detect(&mut self, at: &Spanned<FileDetect>, subject: &Subject, fenced: bool) -> Detect {
        let file = at.get_ref();
        self.host_only(at, subject, "a host with an agent can be watched");
        let mut policy = Policy { automatic: file.is_automatic(), ..Policy::default() };
        policy.unheard = file.unheard;
        policy.hold_ms = self.given(file.hold_ms.as_ref(), "hold_ms", policy.hold_ms, 0, 600_000);
        policy.grace_ms = self.given(file.grace_ms.as_ref(), "grace_ms", policy.grace_ms, 0, DAY_MS);
        policy.channels = self.channels(file.channels.as_ref());
        let (uplink, gateway, others) = self.uplink(file.uplink.as_ref());
        policy.uplink = uplink;
        if let Some(damping) = &file.damping {
            let FileDamping { window_ms, hold_ms_max } = damping.get_ref();
            let Damping { window_ms: window, hold_ms_max: most } = policy.damping;
            policy.damping = Damping {
                window_ms: self.given(window_ms.as_ref(), "window_ms", window, 0, DAY_MS),
                hold_ms_max: self.given(
                    hold_ms_max.as_ref(),
                    "hold_ms_max",
                    most.max(policy.hold_ms),
                    policy.hold_ms,
                    DAY_MS,
                ),
            };
        }
        policy.damping.hold_ms_max = policy.damping.hold_ms_max.max(policy.hold_ms);
        let mut probes = Vec::new();
        for item in &file.probe {
            self.probe(item, &mut policy, &mut probes);
        }
        if let Some(extra) = file.probe.get(PLAN_ITEMS_MAX) {
            self.fault(extra, format!("more than {PLAN_ITEMS_MAX} probes"), "take some out");
        }
        if let Some(automatic) = file.automatic.as_ref().filter(|a| *a.get_ref()) {
            if !fenced {
                let what = "nothing would show with no hand on it that the host is off";
                self.fault(automatic, what, "give the plan a [lease], or a fence hook");
            }
            if gateway.is_none() && policy.uplink.others_min == 0 {
                let what = "nothing would prove that it is not the box that is cut off";
                self.fault(automatic, what, "give [detect.uplink] a gateway, or others and others_min");
            }
        }
        let address = file.address.as_ref().and_then(|at| self.ip(at));
        let asks = policy.channels.iter().any(|r| r.channel == Channel::Arp);
        if let (true, Some(at)) = (asks && address.is_some_and(|a| a.is_ipv6()), &file.address) {
            self.fault(at, "ARP asks IPv4 addresses only", "give one, or use channel = \"icmp\"");
        }
        Detect { policy, address, gateway, others, probes }
    }

    fn host_only<T>(&mut self, at: &Spanned<T>, subject: &Subject, why: &str) {
        if matches!(subject, Subject::Groups(_)) {
            self.fault(at, format!("{why}: this plan is for groups"), "take the section out, or name a host");
        }
    }
    fn given(&mut self, at: Option<&Spanned<u64>>, name: &str, default: u64, least: u64, most: u64) -> u64 {
        at.map_or(default, |at| self.number(at, name, least, most))
    }
    fn ip(&mut self, at: &Spanned<String>) -> Option<IpAddr> {
        match at.get_ref().parse::<IpAddr>() {
            Ok(ip) if !ip.is_multicast() && !ip.is_unspecified() => Some(ip),
            _ => {
                self.fault(at, format!("{:?} is no address of a machine", at.get_ref()), "give one, as 192.0.2.1");
                None
            }
        }
    }

    fn channels(&mut self, given: Option<&Spanned<Vec<Spanned<FileChannel>>>>) -> Vec<ChannelRule> {
        let rule = |channel, weight| ChannelRule { channel, weight, period_ms: 1_000, missed_max: 4 };
        // Both work with every agent. Datagrams are left to who knows that the agent sends them.
        let Some(given) = given else {
            return vec![rule(Channel::Stream, Weight::Required), rule(Channel::Icmp, Weight::Required)];
        };
        let mut rules: Vec<ChannelRule> = Vec::new();
        for item in given.get_ref() {
            let FileChannel { channel, weight, period_ms, missed_max } = item.get_ref();
            if rules.iter().any(|r| r.channel == *channel) {
                self.fault(item, format!("{channel} is there twice"), "take one out");
            }
            let mut rule = rule(*channel, weight.unwrap_or(Weight::Required));
            rule.period_ms = self.given(period_ms.as_ref(), "period_ms", rule.period_ms, 100, 60_000);
            if let Some(at) = missed_max {
                rule.missed_max = self.number(at, "missed_max", 2, 1_000);
            }
            rules.push(rule);
        }
        if !rules.iter().any(|r| r.weight == Weight::Required) {
            let remedy = "name at least one whose silence shows that the host is lost: stream";
            self.fault(given, "no channel is required", remedy);
        }
        rules
    }

    fn uplink(&mut self, given: Option<&Spanned<FileUplink>>) -> (UplinkRule, Option<IpAddr>, Vec<IpAddr>) {
        let mut rule = UplinkRule { gateway: false, others_min: 0, fresh_ms: 3_000 };
        let Some(at) = given else { return (rule, None, Vec::new()) };
        let file = at.get_ref();
        let gateway = file.gateway.as_ref().and_then(|at| self.ip(at));
        rule.gateway = gateway.is_some();
        let others: Vec<IpAddr> = file.others.iter().filter_map(|at| self.ip(at)).collect();
        if let Some(extra) = file.others.get(OTHERS_MAX) {
            self.fault(extra, format!("more than {OTHERS_MAX} others"), "take some out");
        }
        // Who names others and no gateway means them as the proof.
        rule.others_min = u32::from(gateway.is_none() && !others.is_empty());
        if let Some(at) = &file.others_min {
            rule.others_min = self.number(at, "others_min", 0, 64);
        }
        rule.fresh_ms = self.given(file.fresh_ms.as_ref(), "fresh_ms", rule.fresh_ms, 1_500, 60_000);
        (rule, gateway, others)
    }

    fn probe(&mut self, at: &Spanned<FileProbe>, policy: &mut Policy, probes: &mut Vec<PlanProbe>) {
        let file = at.get_ref();
        let name = file.name.get_ref().clone();
        if probes.iter().any(|p| p.name == name) {
            self.fault(&file.name, format!("{name:?} is there twice"), "give each probe one name");
        }
        let every_ms = self.given(file.every_ms.as_ref(), "every_ms", 2_000, 500, 3_600_000);
        let timeout_ms = self.given(file.timeout_ms.as_ref(), "timeout_ms", 1_000, 100, 300_000);
        let probe = PlanProbe { name: name.clone(), kind: file.kind.get_ref().clone(), every_ms, timeout_ms };
        if let Err(why) = agent_says(&[], &[], std::slice::from_ref(&probe)) {
            self.fault(&file.kind, why, "correct it; `holdfast plan example` shows each kind");
        }
        let fresh = (3 * (every_ms + timeout_ms)).min(DAY_MS);
        policy.probes.push(ProbeRule {
            name,
            failures_min: file.failures_min.as_ref().map_or(3, |at| self.number(at, "failures_min", 2, 1_000)),
            for_ms: self.given(file.for_ms.as_ref(), "for_ms", 0, 0, DAY_MS),
            fresh_ms: self.given(file.fresh_ms.as_ref(), "fresh_ms", fresh, every_ms, DAY_MS),
            then: file.then.unwrap_or(ProbeThen::Alarm),
        });
        probes.push(probe);
    }
}
