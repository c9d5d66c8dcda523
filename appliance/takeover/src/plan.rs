//! A takeover plan: what is to be done when a host is lost, as one file that people read and write.
//!
//! A whole one is [`EXAMPLE`].
//!
//! A plan is checked as a whole: [`Plan::parse`] answers every fault it finds, each with its line and what to do about it. What only
//! the box knows (whether there is such a host, whether the bridge is there) is checked by the box, at the time of writing and
//! again before a takeover touches anything.
//!
//! # Limits
//!
//! [`PLAN_BYTES_MAX`]; [`APPLICATIONS_MAX`] applications, [`NETWORKS_MAX`] networks, [`ADDRESSES_MAX`] addresses each; 64 services and
//! probes, which is what one host's agent takes.

mod watch;

pub use watch::{
    Detect, LEASE_MS_MAX, LEASE_MS_MIN, Lease, OTHERS_MAX, RENEWING_MS, STOP_MS_MIN, Standby, StandbyDisk,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fmt, net::IpAddr, str::FromStr};
use toml::Spanned;

/// Every key, with what it is for.
pub const EXAMPLE: &str = include_str!("example.toml");
/// A person wrote it.
pub const PLAN_BYTES_MAX: usize = 64 << 10;
pub const APPLICATIONS_MAX: usize = 64;
pub const NETWORKS_MAX: usize = 8;
pub const ADDRESSES_MAX: usize = 32;
const COMMAND_MAX: usize = 1024;
const NAME_MAX: usize = 128;

/// Something wrong in a plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Counted from 1.
    pub line: usize,
    pub what: String,
    pub remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}; {}", self.line, self.what, self.remedy)
    }
}

/// Everything that is wrong in a plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the plan has {} {}: {}", .0.len(), if .0.len() == 1 { "fault" } else { "faults" }, list(.0))]
pub struct PlanError(pub Vec<Fault>);

fn list(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Whose disks are run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// All groups of a host with an agent.
    Host(String),
    /// Groups by name: machines that came in through ingest targets.
    Groups(Vec<String>),
}

/// Where a lost host goes on. Drills are run on the box whatever this says.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// As a machine on the box.
    #[default]
    Box,
    /// At somebody else's hypervisor, on disks that the box exports.
    Export,
    /// On the host of this name, whose agent follows with disks of its own.
    Standby(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Box => f.write_str("a machine on this box"),
            Self::Export => f.write_str("another hypervisor"),
            Self::Standby(name) => write!(f, "the standby {name}"),
        }
    }
}

/// Which moment is taken when nobody says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointRule {
    /// The newest one: the least is lost.
    #[default]
    Latest,
    /// The newest bookmark.
    Bookmark,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

/// How the machine sees its disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskModel {
    #[default]
    Virtio,
    Ahci,
    Nvme,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicModel {
    #[default]
    Virtio,
    E1000e,
}

/// Processors and memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Size {
    pub cpus: u32,
    pub memory_mib: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Machine {
    pub size: Size,
    pub firmware: Firmware,
    pub disk: DiskModel,
    pub nic: NicModel,
    /// From the first instruction to the word of the agent inside.
    pub boot_seconds_max: u64,
    /// From the power button to the end; then it is ended as by a power cut.
    #[serde(default = "shutdown")]
    pub shutdown_seconds_max: u64,
    /// Whether the host's own agent answers inside. Without one nothing inside is looked at, set or started.
    #[serde(default = "yes")]
    pub agent: bool,
    /// How often an hour one that ended by itself is started again.
    #[serde(default = "restarts")]
    pub restarts_max: u32,
}

const fn shutdown() -> u64 {
    90
}

const fn yes() -> bool {
    true
}

const fn restarts() -> u32 {
    3
}

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or("six pairs of hexadecimal digits are expected")?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| format!("{part:?} are no hexadecimal digits"))?;
        }
        if parts.next().is_some() {
            return Err("six pairs of hexadecimal digits are expected".into());
        }
        if bytes[0] & 1 == 1 {
            return Err("this is a multicast address".into());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An address with its prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (ip, prefix) = text.split_once('/').ok_or("an address with its prefix is expected, as 192.0.2.10/24")?;
        let ip: IpAddr = ip.parse().map_err(|_| format!("{ip:?} is no address"))?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|p| (1..=most).contains(p));
        let prefix = prefix.ok_or_else(|| format!("a prefix from 1 to {most} is expected"))?;
        if ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() {
            return Err(format!("{ip} is no address a host can have on a network"));
        }
        Ok(Self { ip, prefix })
    }
}

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Network {
    pub mac: Mac,
    pub bridge: String,
    pub addresses: Vec<Address>,
    pub gateway: Option<IpAddr>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Application {
    pub name: String,
    /// None: the machine's own boot starts it.
    pub start: Option<String>,
    pub check: String,
    /// For start and check together.
    pub seconds_max: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Hooks {
    /// Before anything is done.
    pub before: Option<Vec<String>>,
    /// After the machine serves.
    pub after: Option<Vec<String>>,
    /// Makes sure that the lost host is off; its success is the proof.
    pub fence: Option<Vec<String>>,
    /// After a failback; its success says that the host serves well.
    #[serde(default)]
    pub check_host: Option<Vec<String>>,
    pub hook_seconds_max: u64,
}

/// Drills with no hand on them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Schedule {
    pub every_hours: u32,
}

/// A plan that makes sense by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub subject: Subject,
    #[serde(default)]
    pub place: Place,
    pub point: PointRule,
    pub machine: Machine,
    pub degraded: Option<Size>,
    pub networks: Vec<Network>,
    pub applications: Vec<Application>,
    pub hooks: Hooks,
    /// None: the host is stopped by nobody but people and hooks.
    #[serde(default)]
    pub lease: Option<Lease>,
    /// Of a standby only.
    #[serde(default)]
    pub standby: Option<Standby>,
    /// None: nobody watches.
    #[serde(default)]
    pub detect: Option<Detect>,
    /// None: drilled when somebody says so.
    #[serde(default)]
    pub drill: Option<Schedule>,
}

// ---------------------------------------------------------------- as it is written

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    host: Option<Spanned<String>>,
    groups: Option<Spanned<Vec<String>>>,
    #[serde(default)]
    place: Option<Spanned<Place>>,
    #[serde(default)]
    point: PointRule,
    machine: Spanned<FileMachine>,
    degraded: Option<Spanned<FileSize>>,
    #[serde(default)]
    network: Vec<Spanned<FileNetwork>>,
    #[serde(default)]
    application: Vec<Spanned<FileApplication>>,
    #[serde(default)]
    hooks: Option<Spanned<FileHooks>>,
    lease: Option<Spanned<watch::FileLease>>,
    standby: Option<Spanned<watch::FileStandby>>,
    detect: Option<Spanned<watch::FileDetect>>,
    drill: Option<Spanned<FileSchedule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileMachine {
    cpus: Spanned<u32>,
    memory_mib: Spanned<u64>,
    #[serde(default)]
    firmware: Firmware,
    #[serde(default)]
    disk: DiskModel,
    #[serde(default)]
    nic: NicModel,
    boot_seconds_max: Option<Spanned<u64>>,
    shutdown_seconds_max: Option<Spanned<u64>>,
    restarts_max: Option<Spanned<u32>>,
    agent: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSize {
    cpus: Spanned<u32>,
    memory_mib: Spanned<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNetwork {
    mac: Spanned<String>,
    bridge: Spanned<String>,
    #[serde(default)]
    addresses: Vec<Spanned<String>>,
    gateway: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileApplication {
    name: Spanned<String>,
    start: Option<Spanned<String>>,
    check: Spanned<String>,
    seconds_max: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileHooks {
    before: Option<Spanned<Vec<String>>>,
    after: Option<Spanned<Vec<String>>>,
    fence: Option<Spanned<Vec<String>>>,
    check_host: Option<Spanned<Vec<String>>>,
    hook_seconds_max: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSchedule {
    every_hours: Spanned<u32>,
}

/// Gathers faults with their lines.
struct Checker<'a> {
    text: &'a str,
    faults: Vec<Fault>,
}

impl Checker<'_> {
    fn line_at(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset.min(self.text.len())].iter().filter(|b| **b == b'\n').count() + 1
    }
    fn fault<T>(&mut self, at: &Spanned<T>, what: impl Into<String>, remedy: impl Into<String>) {
        let line = self.line_at(at.span().start);
        self.faults.push(Fault { line, what: what.into(), remedy: remedy.into() });
    }
    fn number<N: PartialOrd + fmt::Display + Copy>(&mut self, at: &Spanned<N>, name: &str, least: N, most: N) -> N {
        let value = *at.get_ref();
        if value < least || value > most {
            self.fault(at, format!("{name} = {value} is not possible"), format!("give {least} to {most}"));
        }
        value
    }
    fn size(&mut self, cpus: &Spanned<u32>, memory_mib: &Spanned<u64>) -> Size {
        Size { cpus: self.number(cpus, "cpus", 1, 256), memory_mib: self.number(memory_mib, "memory_mib", 64, 4 << 20) }
    }
    fn name(&mut self, at: &Spanned<String>, of: &str) -> String {
        let name = at.get_ref();
        let bad = name.is_empty() || name.len() > NAME_MAX || name.trim() != name || name.chars().any(char::is_control);
        if bad {
            self.fault(at, format!("{name:?} is no name of {of}"), "give 1 to 128 characters, no space at the ends");
        }
        name.clone()
    }
    fn command(&mut self, at: &Spanned<String>, what: &str) -> String {
        let command = at.get_ref();
        if command.trim().is_empty() || command.len() > COMMAND_MAX || command.contains(['\0', '\n']) {
            let remedy = format!("give one line of at most {COMMAND_MAX} characters, or leave it out");
            self.fault(at, format!("{what} is no command"), remedy);
        }
        command.clone()
    }
    fn hook(&mut self, at: Option<&Spanned<Vec<String>>>, what: &str) -> Option<Vec<String>> {
        let at = at?;
        let words = at.get_ref();
        let program = words.first().map(String::as_str).unwrap_or_default();
        if !program.starts_with('/') || words.iter().any(|w| w.len() > COMMAND_MAX || w.contains('\0')) {
            self.fault(
                at,
                format!("{what} does not begin with the path of a program"),
                "give a list: [\"/path/to/program\", \"argument\"]",
            );
        }
        Some(words.clone())
    }
    fn parsed<T: FromStr<Err = String>>(&mut self, at: &Spanned<String>, what: &str) -> Option<T> {
        match at.get_ref().parse() {
            Ok(value) => Some(value),
            Err(why) => {
                self.fault(at, format!("{what} {:?}: {why}", at.get_ref()), "correct it");
                None
            }
        }
    }
    fn network(&mut self, file: &FileNetwork) -> Option<Network> {
        let mac = self.parsed(&file.mac, "mac");
        let bridge = self.name(&file.bridge, "a bridge");
        // The kernel's limit of an interface name.
        if bridge.len() > 15 || bridge.contains(['/', ' ', ':']) {
            self.fault(&file.bridge, format!("{bridge:?} is no name of an interface"), "give the name `ip link` shows");
        }
        if let Some(last) = file.addresses.get(ADDRESSES_MAX) {
            self.fault(last, format!("more than {ADDRESSES_MAX} addresses"), "take some out");
        }
        let addresses: Vec<Address> = file.addresses.iter().filter_map(|at| self.parsed(at, "address")).collect();
        let mut gateway = None;
        if let Some(at) = &file.gateway {
            match at.get_ref().parse::<IpAddr>() {
                Ok(ip) if !addresses.is_empty() && !addresses.iter().any(|a| same_net(a, ip)) => {
                    self.fault(
                        at,
                        format!("no address of the network is in the net of {ip}"),
                        "correct the gateway or a prefix",
                    );
                }
                Ok(ip) => gateway = Some(ip),
                Err(_) => self.fault(at, format!("{:?} is no address", at.get_ref()), "give one, as 192.0.2.1"),
            }
        }
        Some(Network { mac: mac?, bridge, addresses, gateway })
    }
    fn place(&mut self, at: &Spanned<Place>, file: &File) -> Place {
        // Who prepares a machine by hand at another hypervisor can do so when a person is there, and not by itself.
        if *at.get_ref() == Place::Export
            && let Some(detect) = &file.detect
            && detect.get_ref().is_automatic()
        {
            let remedy = "take `automatic = true` out of [detect], or let the host go on at the box: place = \"box\"";
            self.fault(at, "a takeover by itself cannot start a machine at another hypervisor", remedy);
        }
        if let Place::Standby(name) = at.get_ref() {
            let host = file.host.as_ref().map(|h| h.get_ref());
            if host.is_none_or(|host| host == name) {
                self.fault(
                    at,
                    "a standby is another host, for a host with an agent",
                    "name the two: host, and standby",
                );
            }
            if file.lease.is_none() {
                let remedy = "give the plan a [lease]; the standby serves by the same rules";
                self.fault(at, "a standby serves by lease only", remedy);
            }
            if file.standby.is_none() {
                let remedy = "add [standby]: `holdfast plan example` has it";
                self.fault(at, "nothing says what the standby has to start", remedy);
            }
        } else if let Some(standby) = &file.standby {
            self.fault(standby, "[standby] without a standby", "give place = { standby = \"name\" }, or take it out");
        }
        at.get_ref().clone()
    }
    /// What only an agent inside could do.
    fn nobody_inside(&mut self, file: &File) {
        for app in &file.application {
            let remedy = "start and check it by hooks on the box, or take `agent = false` out";
            self.fault(app, "nobody inside could start and check this application", remedy);
        }
        for network in &file.network {
            if let Some(address) = network.get_ref().addresses.first() {
                let remedy = "leave it to what runs inside, which has it configured, or take `agent = false` out";
                self.fault(address, "nobody inside could set this address", remedy);
            }
        }
    }
    fn subject(&mut self, file: &File) -> Subject {
        match (&file.host, &file.groups) {
            (Some(host), None) => Subject::Host(self.name(host, "a host")),
            (None, Some(groups)) => {
                if groups.get_ref().is_empty() {
                    self.fault(groups, "no group is named", "name those whose disks make up the machine");
                }
                Subject::Groups(groups.get_ref().clone())
            }
            (Some(host), Some(_)) => {
                self.fault(host, "both host and groups are given", "keep one of them");
                Subject::Host(host.get_ref().clone())
            }
            (None, None) => {
                let what = "neither host nor groups is given".to_owned();
                self.faults.push(Fault { line: 1, what, remedy: "say whose plan this is: host = \"…\"".into() });
                Subject::Groups(Vec::new())
            }
        }
    }
}

fn same_net(address: &Address, other: IpAddr) -> bool {
    let masked = |bits: u128, width: u32| bits.checked_shr(width - u32::from(address.prefix)).unwrap_or(0);
    match (address.ip, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => masked(u32::from(a).into(), 32) == masked(u32::from(b).into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => masked(a.into(), 128) == masked(b.into(), 128),
        _ => false,
    }
}

const BOOT_SECONDS: u64 = 300;
const APPLICATION_SECONDS: u64 = 60;
const HOOK_SECONDS: u64 = 60;
const SECONDS_MAX: u64 = 3600;

impl Plan {
    /// Reads a plan; all that is wrong with it at once.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        if text.len() > PLAN_BYTES_MAX {
            let what = format!("the plan has {} bytes", text.len());
            return Err(PlanError(vec![Fault { line: 1, what, remedy: format!("at most {PLAN_BYTES_MAX} are read") }]));
        }
        let mut check = Checker { text, faults: Vec::new() };
        let file: File = match from_toml(text) {
            Ok(file) => file,
            Err(e) => {
                let line = check.line_at(e.span().map_or(0, |s| s.start));
                let remedy = "correct it; `holdfast plan example` prints a whole plan".into();
                return Err(PlanError(vec![Fault { line, what: e.message().to_owned(), remedy }]));
            }
        };
        let plan = check.plan(&file);
        if check.faults.is_empty() {
            Ok(plan)
        } else {
            check.faults.sort_by_key(|f| f.line);
            Err(PlanError(check.faults))
        }
    }
}

fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, toml::de::Error> {
    toml::from_str(text)
}

impl Checker<'_> {
    fn plan(&mut self, file: &File) -> Plan {
        let subject = self.subject(file);
        let machine = file.machine.get_ref();
        let size = self.size(&machine.cpus, &machine.memory_mib);
        let seconds = |check: &mut Self, at: Option<&Spanned<u64>>, name: &str, default: u64| {
            at.map_or(default, |at| check.number(at, name, 1, SECONDS_MAX))
        };
        let boot_seconds_max = seconds(self, machine.boot_seconds_max.as_ref(), "boot_seconds_max", BOOT_SECONDS);
        let degraded = file.degraded.as_ref().map(|at| {
            let small = self.size(&at.get_ref().cpus, &at.get_ref().memory_mib);
            if small.memory_mib > size.memory_mib || small.cpus > size.cpus {
                self.fault(at, "the degraded profile is larger than [machine]", "make it smaller, or leave it out");
            }
            small
        });
        let mut networks: Vec<Network> = Vec::new();
        for at in &file.network {
            if let Some(network) = self.network(at.get_ref()) {
                if networks.iter().any(|n| n.mac == network.mac) {
                    self.fault(&at.get_ref().mac, format!("{} is given twice", network.mac), "each card has its own");
                }
                networks.push(network);
            }
        }
        if let Some(at) = file.network.get(NETWORKS_MAX) {
            self.fault(at, format!("more than {NETWORKS_MAX} networks"), "take some out");
        }
        let mut applications: Vec<Application> = Vec::new();
        for at in &file.application {
            let app = at.get_ref();
            let name = self.name(&app.name, "an application");
            if applications.iter().any(|a| a.name == name) {
                self.fault(&app.name, format!("{name:?} is there twice"), "give each application one name");
            }
            let start = app.start.as_ref().map(|at| self.command(at, "start"));
            let check = self.command(&app.check, "check");
            let seconds_max = seconds(self, app.seconds_max.as_ref(), "seconds_max", APPLICATION_SECONDS);
            applications.push(Application { name, start, check, seconds_max });
        }
        if let Some(at) = file.application.get(APPLICATIONS_MAX) {
            self.fault(at, format!("more than {APPLICATIONS_MAX} applications"), "take some out");
        }
        let mut hooks = Hooks { hook_seconds_max: HOOK_SECONDS, ..Hooks::default() };
        if let Some(at) = &file.hooks {
            let given = at.get_ref();
            hooks.before = self.hook(given.before.as_ref(), "before");
            hooks.after = self.hook(given.after.as_ref(), "after");
            hooks.fence = self.hook(given.fence.as_ref(), "fence");
            hooks.check_host = self.hook(given.check_host.as_ref(), "check_host");
            hooks.hook_seconds_max = seconds(self, given.hook_seconds_max.as_ref(), "hook_seconds_max", HOOK_SECONDS);
        }
        // A year: what is drilled more rarely is not drilled.
        let drill = file.drill.as_ref().map(|at| {
            let every_hours = self.number(&at.get_ref().every_hours, "every_hours", 1, 8760);
            Schedule { every_hours }
        });
        let lease = file.lease.as_ref().map(|at| self.lease(at, &subject, &networks));
        let standby = file.standby.as_ref().map(|at| self.standby(at, lease.as_ref()));
        let fenced = lease.is_some() || hooks.fence.is_some();
        let detect = file.detect.as_ref().map(|at| self.detect(at, &subject, fenced));
        let (firmware, disk, nic) = (machine.firmware, machine.disk, machine.nic);
        let restarts_max =
            machine.restarts_max.as_ref().map_or(restarts(), |at| self.number(at, "restarts_max", 0, 100));
        let shutdown_seconds_max =
            seconds(self, machine.shutdown_seconds_max.as_ref(), "shutdown_seconds_max", shutdown());
        let agent = machine.agent.unwrap_or(true);
        if !agent {
            self.nobody_inside(file);
        }
        let machine =
            Machine { size, firmware, disk, nic, boot_seconds_max, shutdown_seconds_max, agent, restarts_max };
        let place = match (&file.place, &file.standby) {
            (Some(at), _) => self.place(at, file),
            (None, Some(standby)) => {
                self.fault(
                    standby,
                    "[standby] without a standby",
                    "give place = { standby = \"name\" }, or take it out",
                );
                Place::Box
            }
            (None, None) => Place::Box,
        };
        Plan {
            subject,
            place,
            point: file.point,
            machine,
            degraded,
            networks,
            applications,
            hooks,
            lease,
            standby,
            detect,
            drill,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::Channel;

    #[test]
    fn the_example_is_a_plan() {
        let plan = Plan::parse(EXAMPLE).expect("a plan");
        assert_eq!(plan.subject, Subject::Host("db1".into()));
        assert_eq!(plan.machine.size, Size { cpus: 4, memory_mib: 8192 });
        assert_eq!(plan.networks[0].mac.to_string(), "52:54:00:12:34:56");
        assert_eq!(plan.networks[0].addresses[0].to_string(), "192.0.2.10/24");
        assert_eq!(plan.applications[0].seconds_max, 60);
        let lease = plan.lease.as_ref().expect("a lease");
        assert_eq!((lease.rules.lease_ms, lease.rules.stop_ms, lease.services.len()), (10_000, 4_000, 2));
        let detect = plan.detect.as_ref().expect("detection");
        assert!(!detect.policy.automatic, "nobody who copies the example begins takeovers by it");
        assert_eq!(detect.policy.check(), Ok(()));
        let kept = serde_json::to_string(&plan).expect("encodes");
        assert_eq!(serde_json::from_str::<Plan>(&kept).expect("decodes"), plan);
        // As runs of earlier versions kept it.
        let mut old: serde_json::Value = serde_json::from_str(&kept).expect("decodes");
        let keys = old.as_object_mut().expect("an object");
        assert!(keys.remove("lease").is_some() && keys.remove("detect").is_some());
        let old: Plan = serde_json::from_value(old).expect("decodes");
        assert_eq!((old.lease, old.detect), (None, None));
    }

    #[test]
    fn every_fault_is_named_with_its_line_at_once() {
        let text = r#"host = "db1"
groups = ["x"]
[machine]
cpus = 0
memory_mib = 8192
boot_seconds_max = 100000
[degraded]
cpus = 1
memory_mib = 16384
[[network]]
mac = "52:54:00:12:34"
bridge = "a bridge with a long name"
addresses = ["192.0.2.10", "10.0.0.1/33", "127.0.0.1/8"]
[[network]]
mac = "52:54:00:12:34:56"
bridge = "br0"
addresses = ["192.0.2.10/24"]
gateway = "192.0.3.1"
[[application]]
name = "a"
check = ""
[[application]]
name = "a"
check = "true"
[hooks]
fence = ["ipmitool"]
"#;
        let faults = Plan::parse(text).expect_err("full of faults").0;
        let lines: Vec<usize> = faults.iter().map(|f| f.line).collect();
        assert_eq!(lines, [1, 4, 6, 7, 11, 12, 13, 13, 13, 18, 21, 23, 26], "{faults:#?}");
        assert!(faults.iter().all(|f| !f.remedy.is_empty()));
    }

    #[test]
    fn faults_of_lease_and_detection_are_named_with_their_lines_too() {
        let text = r#"groups = ["x"]
[machine]
cpus = 1
memory_mib = 64
[[network]]
mac = "52:54:00:12:34:56"
bridge = "br0"
addresses = ["192.0.2.10/24"]
[lease]
lease_ms = 1000
stop_ms = 9000
addresses = [
  { address = "192.0.2.11", device = "eth0" },
  { address = "192.0.2.12/24", device = "eth0/x" },
]
services = [
  { unit = "no unit" },
  { unit = "a.service" },
  { unit = "a.service" },
]
[detect]
automatic = true
address = "here"
hold_ms = 9999999
channels = [
  { channel = "arp", weight = "advisory", period_ms = 1 },
  { channel = "icmp", weight = "advisory", missed_max = 1 },
  { channel = "icmp", weight = "advisory", period_ms = 1 },
]
[detect.uplink]
others_min = 0
fresh_ms = 1
[detect.damping]
hold_ms_max = 100000000
[[detect.probe]]
name = "a"
kind = { tcp = { address = "nowhere" } }
failures_min = 1
[[detect.probe]]
name = "a"
kind = { unit = "a.service" }
"#;
        let faults = Plan::parse(text).expect_err("full of faults").0;
        let lines: Vec<usize> = faults.iter().map(|f| f.line).collect();
        let want = [9, 9, 10, 11, 13, 14, 17, 19, 21, 22, 23, 24, 25, 26, 27, 28, 28, 32, 34, 37, 38, 40];
        assert_eq!(lines, want, "{faults:#?}");
        assert!(faults.iter().all(|f| !f.remedy.is_empty()));
    }

    #[test]
    fn nothing_is_automatic_without_a_fence_and_an_uplink() {
        let plan = |more: &str| Plan::parse(&format!("host = \"a\"\n[machine]\ncpus = 1\nmemory_mib = 64\n{more}"));
        let lease = "[lease]\nservices = [{ unit = \"a.service\" }]\n";
        let hook = "[hooks]\nfence = [\"/bin/true\"]\n";
        let automatic = "[detect]\nautomatic = true\n";
        let uplink = "[detect.uplink]\nothers = [\"192.0.2.3\"]\n";
        for fence in [lease, hook] {
            let plan = plan(&format!("{fence}{automatic}{uplink}")).expect("a plan");
            let detect = plan.detect.expect("detection");
            assert_eq!(detect.policy.check(), Ok(()));
            assert_eq!(detect.policy.uplink.others_min, 1, "the others are meant as the proof");
            assert!(detect.policy.channels.iter().all(|c| c.channel != Channel::Beat), "no agent has to send them");
        }
        for (more, what) in [
            (format!("{automatic}{uplink}"), "nothing would show"),
            (format!("{lease}{automatic}"), "nothing would prove"),
            ("[lease]\n".to_owned(), "stops nothing"),
        ] {
            let faults = plan(&more).expect_err(what).0;
            assert!(faults.len() == 1 && faults[0].what.contains(what), "{faults:?}");
        }
        let plain = plan(&format!("{lease}[detect]\n")).expect("only watched");
        assert_eq!(plain.lease.expect("a lease").rules, wire::LeaseRules { lease_ms: 10_000, stop_ms: 4_000 });
    }

    #[test]
    fn what_is_no_toml_or_has_unknown_keys_is_refused_with_its_line() {
        for (text, line, what) in [
            ("host = \"a\"\n[machine]\ncpus = 1\nmemory_mb = 5\n", 4, "unknown field"),
            ("host = \"a\"\n[machine\n", 2, "unclosed table"),
            ("host = \"a\"\n", 1, "missing field `machine`"),
            ("host = \"a\"\n[machine]\ncpus = \"two\"\nmemory_mib = 64\n", 3, "invalid type"),
            ("[machine]\ncpus = 1\nmemory_mib = 64\n", 1, "neither host nor groups"),
        ] {
            let faults = Plan::parse(text).expect_err(text).0;
            assert_eq!(faults[0].line, line, "{faults:?}");
            assert!(faults[0].what.contains(what), "{faults:?}");
        }
        assert!(Plan::parse(&"#".repeat(PLAN_BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn a_machine_without_an_agent_is_asked_for_nothing_inside() {
        let alone = "groups = [\"vm\"]\n[machine]\ncpus = 1\nmemory_mib = 64\nagent = false\n";
        assert!(!Plan::parse(alone).expect("a plan").machine.agent);
        let more = "[[network]]\nmac = \"52:54:00:12:34:56\"\nbridge = \"br0\"\naddresses = [\"192.0.2.10/24\"]\n\
                    [[application]]\nname = \"a\"\ncheck = \"true\"\n";
        let faults = Plan::parse(&format!("{alone}{more}")).expect_err("nobody is inside").0;
        assert_eq!(faults.iter().map(|f| f.line).collect::<Vec<_>>(), [9, 10], "{faults:#?}");
    }

    #[test]
    fn addresses_are_in_a_net_or_not() {
        let address = |text: &str| text.parse::<Address>().expect("an address");
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        for (a, b, same) in [
            ("192.0.2.10/24", "192.0.2.254", true),
            ("192.0.2.10/24", "192.0.3.1", false),
            ("192.0.2.10/32", "192.0.2.11", false),
            ("2001:db8::1/64", "2001:db8::ffff", true),
            ("2001:db8::1/128", "2001:db8::2", false),
            ("192.0.2.10/24", "::1", false),
        ] {
            assert_eq!(same_net(&address(a), ip(b)), same, "{a} {b}");
        }
    }
}
