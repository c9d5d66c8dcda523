//! The agent's configuration: a TOML file that refuses what it does not know.

use crate::schedule::TimeLimit;
use model::ByteLen;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};

pub const DEFAULT_PATH: &str = "/etc/holdfast-agent/config.toml";

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Identity, groups and spool files; survives reboots.
    pub state_dir: PathBuf,
    /// What has to survive the agent but not the host; best on tmpfs.
    pub run_dir: PathBuf,
    /// On a BPF file system.
    pub pin_dir: PathBuf,
    /// How writes are captured that need not wait for the box: `bpf-rq` (and mirrors where BPF is refused), `bpf-legacy`
    /// on kernels too old for it, or mirrors.
    pub capture: crate::capture::choose::Choice,
    /// Buffer between kernel and agent, for all disks.
    pub ring_mib: u32,
    /// Ring and spools in memory of all groups together may take this much.
    pub memory_mib: u32,
    /// Of each group: writes that the box does not have yet, in memory.
    pub spool_memory_mib: u32,
    /// Of each group: the same in a file of the state directory, once memory is used up. 0: no file.
    pub spool_mib: u32,
    /// What a first copy, or a comparison of everything, looks at.
    pub copy: CopyWhat,
    /// Initial sync and resync read at most this much from the disks each second. 0: no limit.
    pub copy_mib_s: u32,
    /// Times of day with another limit than `copy_mib_s`; the first that fits counts.
    pub copy_schedule: Vec<TimeLimit>,
    /// Percent of one processor that the agent may take before it holds itself back. 0: no limit.
    pub cpu_percent_max: u32,
    /// Slow copying down, and at worst only mark writes, when the host is short of memory, I/O or processor time.
    pub heed_pressure: bool,
    /// MiB per second that other programs may write to protected disks while the box does not keep up, each cgroup and disk for itself. 0:
    /// they are never held back.
    pub protect_rpo_mib_s: u32,
    /// Which cgroups; empty: all but the agent's own.
    pub protect_rpo_cgroups: Vec<PathBuf>,
    /// From how full a spool on.
    pub protect_rpo_spool_percent: u32,
    /// From how much lag on. 0: whatever the lag.
    pub protect_rpo_lag_s: u32,
    /// Sync mode with the policy to hold: even so the host waits for the box, or for an agent, no longer than this.
    pub sync_hold_s: u32,
    /// Carry the dirty maps over a clean reboot; needs the hooks of the package.
    pub carry_over: bool,
    /// Services of a takeover plan that are no systemd units: the box knows their names and never their commands.
    pub fence: Fencing,
    /// Scripts that a takeover plan may have run as probes: the box knows their names, sees how they end and what they print, and no more.
    pub scripts: BTreeMap<String, Script>,
    /// What this host offers when it stands by for another one. Left out: it does not.
    pub standby: StandsBy,
    pub log: Log,
    /// The file, when it is not the usual one: what the agent starts of itself needs the same.
    #[serde(skip)]
    pub loaded_from: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CopyWhat {
    /// Not what a mounted ext4 or XFS says it does not use (`survey.rs`).
    Allocated,
    /// Every sector.
    Whole,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StandsBy {
    /// Disks, partitions or volumes that the box may overwrite, and no others.
    pub disks: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fencing {
    pub services: BTreeMap<String, FenceCommands>,
}

/// Commands with their arguments, not run by a shell.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceCommands {
    pub start: Vec<String>,
    pub stop: Vec<String>,
    /// When `stop` was not enough.
    pub kill: Vec<String>,
    /// Ends with 0 while it runs.
    pub check: Vec<String>,
}

/// A program with its arguments, not run by a shell.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    pub program: PathBuf,
    #[serde(default)]
    pub arguments: Vec<String>,
    /// There is no default: what runs as root should say so.
    pub user: String,
    /// Killed after this, with all it started; the plan may give it less.
    #[serde(default = "script_limit_ms")]
    pub limit_ms: u64,
}

const SCRIPT_LIMIT_MS_MAX: u64 = 300_000;

fn script_limit_ms() -> u64 {
    10_000
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub format: LogFormat,
    /// As `RUST_LOG` understands it: `info`, `debug`, …
    pub level: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".to_owned() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/holdfast-agent".into(),
            run_dir: "/run/holdfast-agent".into(),
            pin_dir: crate::capture::bpf::PIN_ROOT.into(),
            capture: crate::capture::choose::Choice::BpfRq,
            ring_mib: 16,
            memory_mib: 48,
            spool_memory_mib: 8,
            spool_mib: 512,
            copy: CopyWhat::Allocated,
            copy_mib_s: 0,
            copy_schedule: Vec::new(),
            cpu_percent_max: 100,
            heed_pressure: true,
            protect_rpo_mib_s: 0,
            protect_rpo_cgroups: Vec::new(),
            protect_rpo_spool_percent: 60,
            protect_rpo_lag_s: 0,
            sync_hold_s: 300,
            carry_over: true,
            fence: Fencing::default(),
            scripts: BTreeMap::new(),
            standby: StandsBy::default(),
            log: Log::default(),
            loaded_from: None,
        }
    }
}

/// A configuration that cannot be used; says where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("could not read {}; give another with --config, or leave it out to use the defaults", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is empty: it may have been cut off by a crash; write at least `ring_mib = 16`, or remove the file to use the defaults",
        path.display()
    )]
    Empty { path: PathBuf },
    #[error("{}, line {line}: {what}; correct the line and start again", path.display())]
    Syntax { path: PathBuf, line: usize, what: String },
    #[error("{}: {key} is {value}, it must be {allowed}", path.display())]
    Value { path: PathBuf, key: &'static str, value: String, allowed: String },
    #[error(
        "{}: ring_mib ({ring}) and spool_memory_mib ({spool}) together exceed memory_mib ({memory}): raise memory_mib or lower \
         one of the two",
        path.display()
    )]
    Memory { path: PathBuf, ring: u32, spool: u32, memory: u32 },
}

impl Config {
    /// Reads `path`; without one, the default file if it is there, else the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let at = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(at) {
            Ok(text) => Ok(Self { loaded_from: path.map(Path::to_owned), ..Self::parse(&text, at)? }),
            Err(e) if path.is_none() && e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: at.to_owned(), source }),
        }
    }

    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        if text.trim().is_empty() {
            return Err(ConfigError::Empty { path: path.to_owned() });
        }
        let config: Self = toml::from_str(text).map_err(|e| {
            let before = e.span().map_or("", |s| text.get(..s.start).unwrap_or(text));
            ConfigError::Syntax {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                what: e.message().trim().replace('\n', " "),
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let value = |key, value: String, allowed: &str| {
            Err(ConfigError::Value { path: path.to_owned(), key, value, allowed: allowed.to_owned() })
        };
        for (key, dir) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir), ("pin_dir", &self.pin_dir)] {
            if !dir.is_absolute() {
                return value(key, format!("{:?}", dir.display()), "an absolute path");
            }
        }
        if let Some(disk) = self.standby.disks.iter().find(|disk| !disk.starts_with("/dev/")) {
            return value("standby.disks", format!("{disk:?}"), "paths that begin with /dev/");
        }
        for (name, commands) in &self.fence.services {
            let all = [&commands.start, &commands.stop, &commands.kill, &commands.check];
            if all.iter().any(|c| c.is_empty()) {
                return value("fence.services", format!("{name:?}"), "four commands: start, stop, kill and check");
            }
        }
        for (name, script) in &self.scripts {
            if !script.program.is_absolute() {
                let is = format!("{:?} of {name:?}", script.program.display());
                return value("scripts: program", is, "an absolute path");
            }
            // The name goes to getent as an argument.
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let user = &script.user;
            if user.is_empty() || user.len() > 64 || user.starts_with('-') || !user.chars().all(plain) {
                return value("scripts: user", format!("{user:?} of {name:?}"), "the name of a user of this host");
            }
            if !(100..=SCRIPT_LIMIT_MS_MAX).contains(&script.limit_ms) {
                return value("scripts: limit_ms", format!("{} of {name:?}", script.limit_ms), "from 100 to 300000");
            }
        }
        // The kernel wants a power of two; 1 GiB is the largest that its 32-bit length can say with room to spare.
        if !self.ring_mib.is_power_of_two() || self.ring_mib > 1024 {
            return value("ring_mib", self.ring_mib.to_string(), "a power of two from 1 to 1024");
        }
        if self.spool_memory_mib < 4 {
            return value("spool_memory_mib", self.spool_memory_mib.to_string(), "4 or more");
        }
        if self.ring_mib.saturating_add(self.spool_memory_mib) > self.memory_mib {
            return Err(ConfigError::Memory {
                path: path.to_owned(),
                ring: self.ring_mib,
                spool: self.spool_memory_mib,
                memory: self.memory_mib,
            });
        }
        // From 95 % on writes are only marked: to hold anybody back is too late then.
        if !(1..95).contains(&self.protect_rpo_spool_percent) {
            return value("protect_rpo_spool_percent", self.protect_rpo_spool_percent.to_string(), "from 1 to 94");
        }
        let outside = |path: &&PathBuf| path.components().any(|c| matches!(c, std::path::Component::ParentDir));
        if let Some(path) = self.protect_rpo_cgroups.iter().find(outside) {
            return value("protect_rpo_cgroups", format!("{:?}", path.display()), "paths without `..`");
        }
        if self.sync_hold_s == 0 || self.sync_hold_s > 86_400 {
            return value("sync_hold_s", self.sync_hold_s.to_string(), "from 1 to 86400");
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.level).is_err() {
            return value("log.level", format!("{:?}", self.log.level), "error, warn, info, debug or trace");
        }
        Ok(())
    }

    /// MiB per second that copying may read at a time of the week; 0: no limit.
    pub fn copy_mib_s_at(&self, day: u8, minute: u16) -> u32 {
        self.copy_schedule.iter().find(|limit| limit.covers(day, minute)).map_or(self.copy_mib_s, |limit| limit.mib_s)
    }

    /// When other programs are held back, if ever.
    pub fn throttle(&self) -> Option<crate::throttle::Policy> {
        (self.protect_rpo_mib_s > 0).then(|| crate::throttle::Policy {
            mib_s: self.protect_rpo_mib_s.into(),
            spool_percent: self.protect_rpo_spool_percent.into(),
            lag_ms: u64::from(self.protect_rpo_lag_s) * 1000,
            cgroups: self.protect_rpo_cgroups.clone(),
        })
    }

    /// How many groups fit under the memory ceiling.
    pub fn groups_max(&self) -> usize {
        (self.memory_mib.saturating_sub(self.ring_mib) / self.spool_memory_mib.max(1)) as usize
    }

    pub fn ring_bytes(&self) -> u32 {
        self.ring_mib << 20
    }
    pub fn spool_memory(&self) -> ByteLen {
        ByteLen(u64::from(self.spool_memory_mib) << 20)
    }
    pub fn spool_file(&self) -> ByteLen {
        ByteLen(u64::from(self.spool_mib) << 20)
    }
    pub fn socket(&self) -> PathBuf {
        self.state_dir.join("agent.sock")
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Config::parse(text, Path::new("/etc/x.toml")).expect_err("refused").to_string()
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let config = Config::parse("ring_mib = 32\n[log]\nformat = \"json\"", Path::new("x")).unwrap();
        assert_eq!(config.ring_mib, 32);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.state_dir, Path::new("/var/lib/holdfast-agent"));
        assert_eq!(config.groups_max(), 2);
    }

    #[test]
    fn errors_name_file_line_and_remedy() {
        let unknown = refused("ring_mib = 16\n\nrnig = 3");
        assert!(
            unknown.contains("/etc/x.toml, line 3") && unknown.contains("rnig") && unknown.contains("ring_mib"),
            "{unknown}"
        );
        let kind = refused("ring_mib = \"big\"");
        assert!(kind.contains("line 1") && kind.contains("correct the line"), "{kind}");
        let empty = refused(" \n");
        assert!(empty.contains("is empty") && empty.contains("remove the file"), "{empty}");
        let syntax = refused("ring_mib = 16\n]]");
        assert!(syntax.contains("line 2"), "{syntax}");
        assert!(refused("ring_mib = 100").contains("a power of two"));
        assert!(refused("state_dir = \"here\"").contains("absolute"));
        assert!(refused("memory_mib = 20").contains("raise memory_mib"));
        assert!(refused("copy = \"some\"").contains("allocated"));
        assert!(refused("protect_rpo_spool_percent = 95").contains("from 1 to 94"));
        assert!(refused("protect_rpo_cgroups = [\"a/../b\"]").contains("without `..`"));
        assert!(refused("[log]\nlevel = \"a=b=c\"").contains("log.level"));
    }

    /// The packaged file shows every key with its default, behind a `#`: what it says must be what happens.
    #[test]
    fn the_packaged_example_is_the_default() {
        let example = include_str!("../packaging/config.toml");
        let told = Config::parse(example, Path::new("config.toml")).unwrap();
        assert_eq!(told, Config::default(), "as packaged");
        let mut keys = 0;
        let all: String = example
            .lines()
            .map(|line| match line.strip_prefix('#') {
                // A remark has a space behind its `#`, a key has not.
                Some(key) if key.contains(" = ") && !key.starts_with(' ') => {
                    keys += 1;
                    format!("{key}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let every = Config::parse(&all, Path::new("config.toml")).unwrap();
        assert_eq!(every, Config::default(), "with every key");
        // `deny_unknown_fields` finds a key too many; this finds one too few.
        // Tables are no keys, and `services` has none of its own: the example says what one looks like.
        let tables = ["log: ", "fence: ", "services: ", "scripts: ", "standby: ", "loaded_from: "].len();
        let fields = format!("{:?}", Config::default()).matches(": ").count() - tables;
        assert!(example.contains("# [fence.services.web]") && example.contains("# [scripts.orders]"));
        assert_eq!(keys, fields, "the example leaves out a key");
    }

    #[test]
    fn services_of_a_takeover_plan_need_all_their_commands() {
        let web = "[fence.services.web]\nstart = [\"a\"]\nstop = [\"b\"]\nkill = [\"c\", \"d\"]\ncheck = [\"e\"]\n";
        let config = Config::parse(web, Path::new("x")).unwrap();
        assert_eq!(config.fence.services["web"].kill, ["c", "d"]);
        assert!(refused(&web.replace("[\"e\"]", "[]")).contains("four commands"));
        assert!(refused(&web.replace("check = [\"e\"]", "")).contains("check"));
    }

    #[test]
    fn scripts_name_their_program_their_user_and_a_limit() {
        let good = "[scripts.orders]\nprogram = \"/opt/orders\"\narguments = [\"--quick\"]\nuser = \"nobody\"\n";
        let config = Config::parse(good, Path::new("x")).unwrap();
        assert_eq!((config.scripts["orders"].limit_ms, config.scripts["orders"].arguments.len()), (10_000, 1));
        assert!(refused(&good.replace("/opt/orders", "orders")).contains("an absolute path"));
        assert!(refused(&good.replace("nobody", "-x")).contains("the name of a user"));
        assert!(refused(&good.replace("user = \"nobody\"\n", "")).contains("user"));
        assert!(refused(&format!("{good}limit_ms = 5")).contains("from 100 to 300000"));
    }

    #[test]
    fn the_schedule_comes_before_the_limit() {
        let text = "copy_mib_s = 50\ncopy_schedule = [\"mon-fri 08:00-18:00 20\", \"22:00-06:00 0\"]";
        let config = Config::parse(text, Path::new("x")).unwrap();
        let at = |day, hour: u16| config.copy_mib_s_at(day, hour * 60);
        assert_eq!((at(0, 9), at(5, 9), at(0, 19), at(6, 23), at(0, 5)), (20, 50, 50, 0, 0));
        let bad = refused("\ncopy_schedule = [\"mon-fri 8-18 20\"]");
        assert!(bad.contains("line 2") && bad.contains("HH:MM"), "{bad}");
    }

    #[test]
    fn a_missing_file_is_an_error_only_when_it_was_asked_for() {
        let missing = Config::load(Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert!(missing.to_string().contains("--config"), "{missing}");
    }
}
