//! What the administrator asked for: the command line and one TOML file.
//!
//! Unknown keys are refused, so that a misspelt one cannot silently mean "the default". Everything is checked here, before
//! anything is opened, and a refusal names the file, the key and what is expected. The file is read once at start.

use clap::Parser;
use durable::ALIGN;
use serde::Deserialize;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// Holdfast, the box: journals what its hosts write and opens any moment of it.
#[derive(Parser, Clone, Debug, Default)]
#[command(name = "holdfastd", version)]
pub struct CommandLine {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder that holds everything the box keeps; overrides the file's `data`.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where agents connect (TLS); overrides the file's `listen`.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Where NBD clients connect over TLS; overrides the file's `nbd_listen`.
    #[arg(long, value_name = "ADDR:PORT")]
    pub nbd_listen: Option<SocketAddr>,
    /// Where Prometheus reads, a loopback address, or `none`; overrides the file's `metrics_listen`.
    #[arg(long, value_name = "ADDR:PORT|none")]
    pub metrics_listen: Option<String>,
}

/// A configuration that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("could not read the configuration {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration {} is not valid: {}", path.display(), source.message())]
    Parse { path: PathBuf, line: Option<usize>, source: Box<toml::de::Error> },
    #[error("{key} = {value}: {expected}")]
    Value { key: &'static str, value: String, expected: &'static str },
    #[error("could not find the current folder to complete {}", path.display())]
    Absolute { path: PathBuf, source: io::Error },
}

impl ConfigError {
    /// The whole refusal as an administrator reads it, with the file's line when there is one.
    pub fn report(&self) -> String {
        let place = match self {
            Self::Parse { line: Some(line), .. } => format!(" (line {line})"),
            _ => String::new(),
        };
        let cause = match self {
            Self::Read { source, .. } | Self::Absolute { source, .. } => format!(": {source}"),
            _ => String::new(),
        };
        format!("{self}{place}{cause}")
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A tracing filter: `info`, `debug`, `supervisor=debug,info`.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".into() }
    }
}

/// How journals are laid out; the defaults are the measured ones and need no change.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JournalConfig {
    /// Size of a segment file.
    pub segment_mib: u64,
    /// Segments kept zero-filled ahead of the writer.
    pub prepared_ahead: usize,
    /// Largest batch of one durable write.
    pub batch_kib: usize,
    /// Durable writes in flight.
    pub depth: usize,
    /// Room on the disk that history may never take; kept for the catalogue, the index and the administrator.
    pub keep_free_mib: u64,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self { segment_mib: 128, prepared_ahead: 2, batch_kib: 1024, depth: 4, keep_free_mib: 64 }
    }
}

/// The file as it is written; every key may be left out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    data: Option<PathBuf>,
    run: Option<PathBuf>,
    box_name: Option<String>,
    names: Vec<String>,
    listen: Option<SocketAddr>,
    nbd_listen: Option<SocketAddr>,
    metrics_listen: Option<String>,
    heartbeat_timeout_ms: Option<u64>,
    view_idle_minutes: Option<u64>,
    log: LogConfig,
    web: WebConfig,
    journal: JournalConfig,
}

/// The pages.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WebConfig {
    listen: Option<String>,
}

/// The configuration in force, complete and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Absolute.
    pub data: PathBuf,
    /// Control socket and NBD sockets.
    pub run: PathBuf,
    pub box_name: String,
    /// Further names and addresses of the box, for its certificate.
    pub names: Vec<String>,
    pub listen: SocketAddr,
    pub nbd_listen: Option<SocketAddr>,
    /// None: no metrics listener.
    pub metrics_listen: Option<SocketAddr>,
    /// Pages and API over TLS. None: neither.
    pub web_listen: Option<SocketAddr>,
    /// A connection that says nothing for so long is taken for dead (half-open).
    pub heartbeat_timeout_ms: u64,
    /// A view that nobody has had open for so long is closed; 0: never.
    pub view_idle_minutes: u64,
    pub log: LogConfig,
    pub journal: JournalConfig,
}

/// A year: more is a typing error.
pub const VIEW_IDLE_MINUTES_MAX: u64 = 365 * 24 * 60;
/// `sun_path` holds 108 bytes with the final zero.
const SOCKET_PATH_MAX: usize = 107;
/// The longest file name made inside `run/nbd`: see `exports::socket_name`.
pub const SOCKET_NAME_MAX: usize = 48;

impl Config {
    pub fn load(line: &CommandLine) -> Result<Self, ConfigError> {
        let file = match &line.config {
            None => File::default(),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
                Self::parse(path, &text)?
            }
        };
        Self::complete(file, line)
    }

    fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
        toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            line: e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1),
            source: Box::new(e),
        })
    }

    fn complete(file: File, line: &CommandLine) -> Result<Self, ConfigError> {
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).map_err(|source| ConfigError::Absolute { path: path.clone(), source })
        };
        let data = line.data.clone().or(file.data).unwrap_or_else(|| "/var/lib/holdfast".into());
        if data.as_os_str().is_empty() {
            return Err(bad("data", "\"\"", "a folder is expected"));
        }
        let data = absolute(data)?;
        let run = match file.run {
            Some(run) => absolute(run)?,
            None => data.join("run"),
        };
        let longest = run.join("nbd").as_os_str().len() + 1 + SOCKET_NAME_MAX;
        if longest > SOCKET_PATH_MAX {
            let value = run.display().to_string();
            let expected = "a shorter path is needed: socket paths below it must stay within 107 bytes";
            return Err(bad("run", &value, expected));
        }
        let metrics = line.metrics_listen.clone().or(file.metrics_listen);
        let metrics_listen = match metrics.as_deref() {
            Some("none") => None,
            None => Some(SocketAddr::from(([127, 0, 0, 1], 7441))),
            Some(text) => {
                let expected = "an address with a port like 127.0.0.1:7441, or \"none\", is expected";
                let at: SocketAddr = text.parse().map_err(|_| bad("metrics_listen", text, expected))?;
                if !is_loopback(at.ip()) {
                    return Err(bad("metrics_listen", text, "only a loopback address is allowed: it is not encrypted"));
                }
                Some(at)
            }
        };
        let web_listen = match file.web.listen.as_deref() {
            Some("none") => None,
            None => Some(SocketAddr::from(([0, 0, 0, 0], 8443))),
            Some(text) => {
                let expected = "an address with a port like 0.0.0.0:8443, or \"none\", is expected";
                Some(text.parse().map_err(|_| bad("web.listen", text, expected))?)
            }
        };
        let box_name = file.box_name.unwrap_or_else(host_name);
        if box_name.is_empty() || box_name.chars().count() > 64 || box_name.chars().any(char::is_control) {
            return Err(bad(
                "box_name",
                &box_name,
                "1 to 64 characters are expected, none of them a control character",
            ));
        }
        for name in &file.names {
            let fine = !name.is_empty()
                && name.len() <= 253
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:_".contains(&b));
            if !fine {
                return Err(bad("names", name, "host names and IP addresses are expected"));
            }
        }
        let heartbeat_timeout_ms = file.heartbeat_timeout_ms.unwrap_or(15_000);
        if !(200..=600_000).contains(&heartbeat_timeout_ms) {
            let value = heartbeat_timeout_ms.to_string();
            return Err(bad("heartbeat_timeout_ms", &value, "200 to 600000 is expected"));
        }
        let view_idle_minutes = file.view_idle_minutes.unwrap_or(60);
        if view_idle_minutes > VIEW_IDLE_MINUTES_MAX {
            return Err(bad("view_idle_minutes", &view_idle_minutes.to_string(), "0 (never) to 525600 is expected"));
        }
        check_journal(&file.journal)?;
        if tracing_subscriber::EnvFilter::try_new(&file.log.level).is_err() {
            return Err(bad("log.level", &file.log.level, "a level like \"info\" or \"debug\" is expected"));
        }
        Ok(Self {
            data,
            run,
            box_name,
            names: file.names,
            listen: line.listen.or(file.listen).unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 7440))),
            nbd_listen: line.nbd_listen.or(file.nbd_listen),
            metrics_listen,
            web_listen,
            heartbeat_timeout_ms,
            view_idle_minutes,
            log: file.log,
            journal: file.journal,
        })
    }

    pub fn view_idle(&self) -> Option<Duration> {
        (self.view_idle_minutes > 0).then(|| Duration::from_secs(self.view_idle_minutes * 60))
    }
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }
    pub fn nbd_dir(&self) -> PathBuf {
        self.run.join("nbd")
    }
}

fn check_journal(j: &JournalConfig) -> Result<(), ConfigError> {
    let number = |key, value: u64, low: u64, high: u64, expected| {
        if (low..=high).contains(&value) { Ok(()) } else { Err(bad(key, &value.to_string(), expected)) }
    };
    number("journal.segment_mib", j.segment_mib, 4, 1024, "4 to 1024 is expected")?;
    number("journal.prepared_ahead", j.prepared_ahead as u64, 1, 8, "1 to 8 is expected")?;
    number("journal.batch_kib", j.batch_kib as u64, 256, 4096, "256 to 4096 is expected")?;
    number("journal.depth", j.depth as u64, 1, 64, "1 to 64 is expected")?;
    number("journal.keep_free_mib", j.keep_free_mib, 0, 1 << 30, "a number of MiB is expected")?;
    if !(j.batch_kib << 10).is_multiple_of(ALIGN) {
        return Err(bad("journal.batch_kib", &j.batch_kib.to_string(), "a multiple of 4 is expected"));
    }
    if (j.batch_kib as u64) << 10 > j.segment_mib << 19 {
        return Err(bad("journal.batch_kib", &j.batch_kib.to_string(), "at most half a segment is expected"));
    }
    Ok(())
}

fn bad(key: &'static str, value: &str, expected: &'static str) -> ConfigError {
    ConfigError::Value { key, value: value.chars().take(200).collect(), expected }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(64).collect();
    if name.is_empty() { "holdfast".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> Result<Config, ConfigError> {
        Config::complete(Config::parse(Path::new("/etc/holdfast.toml"), text)?, &CommandLine::default())
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        let c = from("").unwrap();
        assert_eq!(c.data, Path::new("/var/lib/holdfast"));
        assert_eq!(c.run, Path::new("/var/lib/holdfast/run"));
        assert_eq!(c.listen.to_string(), "0.0.0.0:7440");
        assert_eq!(c.metrics_listen.unwrap().to_string(), "127.0.0.1:7441");
        assert_eq!(c.nbd_listen, None);
        assert_eq!((c.journal.segment_mib, c.journal.prepared_ahead), (128, 2));
    }

    /// The packaged file says "every key is here with its default": it must be true.
    #[test]
    fn the_packaged_file_has_every_key_with_its_default() {
        let text = include_str!("../packaging/holdfast.toml");
        // Keys are commented out with `#key`, prose with `# text`.
        let shown: String = text
            .lines()
            .map(|line| {
                let key = line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
                format!("{}\n", key.unwrap_or(line))
            })
            .collect();
        let table: toml::Table = shown.parse().expect("the file is TOML with every key written out");
        // Examples: they have no default, or one that is this machine's.
        let examples = ["nbd_listen", "box_name"];
        let without = |skip: &[&str]| {
            let mut table = table.clone();
            skip.iter().for_each(|key| drop(table.remove(*key).expect("the example is there")));
            table.to_string()
        };
        let default = from("").unwrap();
        let plain = from(text).expect("the file as it is packaged");
        assert_eq!(plain, default, "the file as it is packaged changes something");
        let c = from(&without(&examples)).expect("the file with every key written out");
        assert_eq!(c, default, "a default in the file is not the one in the code");
        let all = from(&without(&[])).expect("with the examples too");
        assert!(all.nbd_listen.is_some());
        // Every key there is: taken from what an unknown one is refused with.
        for (section, have) in [
            ("", &table),
            ("[log]\n", table["log"].as_table().unwrap()),
            ("[web]\n", table["web"].as_table().unwrap()),
            ("[journal]\n", table["journal"].as_table().unwrap()),
        ] {
            let refused = from(&format!("{section}no_such_key = 1")).unwrap_err().report();
            let known: Vec<&str> = refused.split('`').skip(3).step_by(2).collect();
            assert!(!known.is_empty(), "no keys in {refused:?}");
            for key in known {
                assert!(have.contains_key(key), "{section}{key} is not in the packaged file");
            }
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let line = CommandLine {
            data: Some("/srv/h".into()),
            listen: Some("127.0.0.1:1".parse().unwrap()),
            metrics_listen: Some("none".into()),
            ..Default::default()
        };
        let file = Config::parse(Path::new("f"), "data = \"/other\"\nlisten = \"1.2.3.4:5\"").unwrap();
        let c = Config::complete(file, &line).unwrap();
        assert_eq!((c.data.to_str(), c.listen.port(), c.metrics_listen), (Some("/srv/h"), 1, None));
    }

    #[test]
    fn refusals_name_the_key_and_what_is_expected() {
        for (text, says) in [
            ("daat = \"/x\"", "daat"),
            ("data = 4", "line 1"),
            ("\n\n[journal]\nsegment_mib = \"big\"", "line 4"),
            ("[journal]\nsegment_mib = 1", "journal.segment_mib = 1: 4 to 1024"),
            ("[journal]\nprepared = 1", "prepared"),
            ("metrics_listen = \"0.0.0.0:7441\"", "loopback"),
            ("[web]\nlisten = \"here\"", "web.listen = here"),
            ("metrics_listen = \"here\"", "metrics_listen = here"),
            ("listen = \"7440\"", "line 1"),
            ("names = [\"a b\"]", "names = a b"),
            ("heartbeat_timeout_ms = 1", "heartbeat_timeout_ms = 1"),
            ("view_idle_minutes = 525601", "view_idle_minutes = 525601"),
            ("[log]\nformat = \"xml\"", "xml"),
            ("[log]\nlevel = \"a=b=c\"", "log.level"),
            ("[log]\nlevle = \"info\"", "levle"),
            ("data = \"\"", "data"),
            ("[journal]\nsegment_mib = 4\nbatch_kib = 4096", "half a segment"),
        ] {
            let said = from(text).expect_err(text).report();
            assert!(said.contains(says), "{text:?} was refused with {said:?}, which does not say {says:?}");
            assert!(!said.contains('\u{0}'), "{said:?}");
        }
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused_before_anything_is_made() {
        let long = format!("data = \"/{}\"", "x".repeat(90));
        assert!(from(&long).unwrap_err().report().contains("107 bytes"));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let line = CommandLine { config: Some("/nonexistent/h.toml".into()), ..Default::default() };
        let said = Config::load(&line).unwrap_err().report();
        assert!(said.contains("/nonexistent/h.toml"), "{said}");
    }
}
