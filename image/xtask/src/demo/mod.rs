//! `cargo xtask try`: the newcomer's command.
//!
//! Builds the three programs, starts a box on loopback with everything in one folder, protects a disk that is being
//! written to, and shows what happens: as root a loop disk with ext4, its writes captured in the kernel by an agent; without
//! root an ext4 image written to an ingest target over NBD. Ends with Ctrl-C and leaves nothing behind but the folder.
//!
//! `--check` does it bounded: moments are taken while the disk is held still and its content copied aside (the oracle),
//! then opened as views while the disk is being written to, and compared byte by byte; box and agent are killed in between.
//!
//! `--takeover` tells the whole story of a host that is lost instead: see [`story`].

mod check;
pub mod leftover;
mod source;
mod story;

pub use check::SPOILT_BYTE;

use crate::{
    deps::{self, Purpose},
    repo::Repo,
    stop,
};
use anyhow::{Context, Result, bail};
use hw_tests::{
    disk,
    process::quoted,
    product::{Appliance, Binaries},
};
use serde_json::Value;
use source::Source;
use std::{
    fs,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// The protection group's name.
const GROUP: &str = "demo";
/// Written into the folder, so that we empty no folder that is not ours.
const MARK: &str = ".holdfast-try";
/// How long the first copy may take.
const SYNC_MAX: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub struct Options {
    /// Do it bounded, compare every moment with an oracle, and end
    #[arg(long)]
    check: bool,
    /// Where everything goes; emptied first
    #[arg(long)]
    data: Option<PathBuf>,
    /// Protect through an ingest target even as root
    #[arg(long)]
    without_root: bool,
    /// The whole story instead: a host with a database loses its power, is taken over, and gets everything back
    #[arg(long, conflicts_with_all = ["without_root", "spoil"])]
    takeover: bool,
    /// With --takeover: by hand instead of by itself
    #[arg(long, requires = "takeover")]
    by_hand: bool,
    /// The programs beside this one are up to date; nothing is installed or built
    #[arg(long, hide = true)]
    built: bool,
    /// With --check: change one byte of the first oracle, which must be noticed
    #[arg(long, hide = true)]
    spoil: bool,
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    if options.takeover {
        return story::run(repo, options);
    }
    if !options.built {
        deps::install(repo, Some(Purpose::Try))?;
        println!("building");
        repo.build_programs()?;
    }
    let bins = Binaries::beside_us()?;
    let started = Instant::now();
    stop::listen();
    let dir = prepare(&options.data.clone().map_or_else(|| repo.target_dir().map(|t| t.join("try")), Ok)?)?;
    println!("everything goes into {}", dir.display());

    let kernel_capture = if options.without_root {
        Err("asked for".to_owned())
    } else {
        disk::loop_disks_work().and_then(|()| disk::capture_works())
    };
    let pages = hw_tests::product::free_port()?;
    let appliance = Appliance::start_with(&bins, &dir.join("box"), &format!("web.listen = \"127.0.0.1:{pages}\"\n"))?;
    println!(
        "the box is up: agents at {}, its administrator at {}",
        appliance.listen(),
        appliance.control().socket().display()
    );
    let made = appliance.control().post("/web/setup-code", &Value::Null)?;
    println!(
        "its pages: https://localhost:{pages} (the certificate is of its own authority); the code for the first administrator: {}",
        made["code"].as_str().unwrap_or("?")
    );
    let source = match kernel_capture {
        Ok(()) => {
            println!("a loop disk with ext4 is protected; its writes are captured in the kernel");
            Source::kernel(&bins, &appliance, &dir)?
        }
        Err(why) => {
            println!(
                "no capture in the kernel here ({why}): an ext4 image is written to an ingest target over NBD instead"
            );
            Source::ingest(&appliance, &dir)?
        }
    };
    let programs = bins.holdfast.parent().context("programs lie in a folder")?.to_owned();
    let mut session = Session { appliance, source, started, programs };
    let done = session
        .first_copy()
        .and_then(|()| if options.check { check::run(&mut session, &dir, options.spoil) } else { session.watch() });
    let ended = session.end();
    done.and(ended)
}

/// An empty folder of ours.
fn prepare(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    leftover::take_down(&dir)?;
    let ours = dir.join(MARK).exists();
    let mut entries = Vec::new();
    for entry in fs::read_dir(&dir)? {
        entries.push(entry?.path());
    }
    if !ours && !entries.is_empty() {
        bail!("{} is not empty and was not made by this command: name another folder with --data", dir.display());
    }
    for path in entries.iter().filter(|p| !p.ends_with(MARK)) {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.with_context(|| format!("remove {}", path.display()))?;
    }
    fs::write(dir.join(MARK), "made by cargo xtask try; emptied by its next run\n")?;
    Ok(dir)
}

/// A box, and a disk it protects.
struct Session {
    appliance: Appliance,
    source: Source,
    started: Instant,
    programs: PathBuf,
}

impl Session {
    /// Says something with the time since the start.
    fn say(&self, text: impl std::fmt::Display) {
        println!("[{:5.1} s] {text}", self.started.elapsed().as_secs_f32());
    }

    fn figures(&self) -> Result<Figures> {
        Ok(Figures::from_json(&self.appliance.group(GROUP)?))
    }

    /// Shows a bar until the group can be recovered.
    fn first_copy(&mut self) -> Result<()> {
        let line = StatusLine::new();
        let begun = Instant::now();
        loop {
            self.source.check()?;
            let figures = self.figures()?;
            if self.source.in_step(&figures.state) {
                line.end();
                self.say("protected: every write from here on is kept");
                return Ok(());
            }
            line.show(&figures.sync_line());
            if stop::asked() {
                bail!("stopped");
            }
            if begun.elapsed() > SYNC_MAX {
                line.end();
                bail!("the first copy did not end within {} s: {figures:?}", SYNC_MAX.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// One line a second until Ctrl-C.
    fn watch(&mut self) -> Result<()> {
        self.explain();
        let line = StatusLine::new();
        while !stop::asked() {
            self.source.check()?;
            line.show(&self.figures()?.line());
            let next = Instant::now() + Duration::from_secs(1);
            while Instant::now() < next && !stop::asked() {
                thread::sleep(Duration::from_millis(50));
            }
        }
        line.end();
        println!("stopping");
        Ok(())
    }

    fn explain(&self) {
        let programs = self.programs.display();
        println!("\nIn another terminal, first:\n");
        println!("  export HOLDFAST_SOCKET={}", quoted(&self.appliance.control().socket().to_string_lossy()));
        println!("  export PATH={programs}:$PATH\n");
        println!("then:\n");
        for (command, what) in [
            ("holdfast status", "what the box is doing"),
            ("holdfast points", "the moments that can be opened"),
            ("holdfast bookmark create before-upgrade", "name this moment"),
            ("holdfast view open --at before-upgrade", "open it as a disk; a time, an LSN or `latest` will do too"),
            ("holdfast restore --at '5s ago' --to restored.img", "copy a moment to a file"),
            ("holdfast verify", "check every checksum"),
        ] {
            println!("  {command:50} # {what}");
        }
        println!("\nThe disk being written to: {}. Ctrl-C stops everything.\n", self.source.describe());
    }

    fn end(self) -> Result<()> {
        let Self { mut appliance, source, .. } = self;
        let source_ended = source.end();
        appliance.stop()?;
        source_ended
    }
}

/// What one line of status shows.
#[derive(Debug, Default)]
struct Figures {
    state: String,
    reason: Option<String>,
    sync: Option<(u64, u64)>,
    lag_ms: Option<u64>,
    rate_bytes: u64,
    rate_ops: u64,
    journal_bytes: u64,
    hours: f64,
}

impl Figures {
    fn from_json(group: &Value) -> Self {
        let number = |key: &str| group[key].as_f64().unwrap_or(0.0);
        let sync = &group["sync"];
        Self {
            state: group["state"].as_str().unwrap_or("unknown").to_owned(),
            reason: group["reason"].as_str().map(str::to_owned),
            sync: sync["done_bytes"].as_u64().zip(sync["total_bytes"].as_u64()),
            lag_ms: group["lag_ms"].as_u64(),
            rate_bytes: number("write_rate_bytes_s") as u64,
            rate_ops: number("write_rate_ops_s") as u64,
            journal_bytes: number("journal_bytes") as u64,
            hours: number("hours_of_history"),
        }
    }

    fn sync_line(&self) -> String {
        let Some((done, total)) = self.sync.filter(|(_, total)| *total > 0) else {
            return format!("first copy: {}", self.state);
        };
        let filled = (done.min(total) * 30 / total) as usize;
        format!("first copy [{}{}] {} of {}", "#".repeat(filled), ".".repeat(30 - filled), size(done), size(total))
    }

    fn line(&self) -> String {
        let lag = self.lag_ms.map_or("unknown".to_owned(), |ms| format!("{ms} ms"));
        let reason = self.reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
        format!(
            "{}{reason}  lag {lag}  writes {}/s in {}/s  journal {}  history {}",
            self.state,
            self.rate_ops,
            size(self.rate_bytes),
            size(self.journal_bytes),
            hours(self.hours)
        )
    }
}

/// Bytes as people read them.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn hours(hours: f64) -> String {
    match hours * 3600.0 {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        _ => format!("{hours:.1} h"),
    }
}

/// One line that is written over on a terminal, and a new line each time elsewhere.
struct StatusLine {
    terminal: bool,
}

impl StatusLine {
    fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal() }
    }
    fn show(&self, text: &str) {
        if !self.terminal {
            println!("{text}");
            return;
        }
        print!("\r\x1b[K{text}");
        // A line that shows late does no harm.
        drop(std::io::stdout().flush());
    }
    fn end(&self) {
        if self.terminal {
            println!();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_folder_that_is_not_ours_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "x").unwrap();
        assert!(prepare(dir.path()).unwrap_err().to_string().contains("not empty"));
        assert!(dir.path().join("precious").exists());
        let ours = dir.path().join("ours");
        prepare(&ours).unwrap();
        fs::write(ours.join("old"), "x").unwrap();
        prepare(&ours).unwrap();
        assert!(!ours.join("old").exists() && ours.join(MARK).exists());
    }

    #[test]
    fn a_status_reads_as_a_line() {
        let group = json!({"state": "replicating", "reason": null, "lag_ms": 12, "write_rate_bytes_s": 2048, "write_rate_ops_s": 3,
            "journal_bytes": 1048576, "hours_of_history": 0.01, "sync": null});
        assert_eq!(
            Figures::from_json(&group).line(),
            "replicating  lag 12 ms  writes 3/s in 2.0 KiB/s  journal 1.0 MiB  history 36 s"
        );
        let syncing = json!({"state": "syncing", "lag_ms": null, "sync": {"done_bytes": 512, "total_bytes": 1024}});
        let figures = Figures::from_json(&syncing);
        assert_eq!(figures.sync_line(), "first copy [###############...............] 512 B of 1.0 KiB");
        assert!(figures.line().contains("lag unknown"));
    }
}
