//! `cargo xtask bench`: the figures, beside their peers, in one run.
//!
//! One job runs against every system in turn, in several rounds that interleave the systems, so that a machine that is
//! slow for a while is slow for all; each cell is the median of its rounds. The semantics are the same for all: a writer
//! has one write outstanding and goes on when that write **and a flush after it** have returned, so every counted write is
//! durable; a "queue depth" of 16 is 16 such writers. On the raw file that is `O_DIRECT` and `fdatasync` after each write;
//! over NBD it is a write and an NBD flush, by fio's own engine.

mod capture;
mod emulated;
mod fio;
mod journal;
mod live;
mod mirror;
mod report;
mod systems;

use crate::{
    demo::leftover,
    deps::{self, Purpose},
    repo::Repo,
};
use anyhow::{Context, Result, ensure};
use hw_tests::product::Binaries;
use std::{collections::BTreeMap, fs, thread, time::Duration};

#[derive(clap::Args)]
pub struct Options {
    /// One short round of everything
    #[arg(long)]
    quick: bool,
    /// Only this part: ingest, view, agent, capture, emulated, lag, cut, sync, journal
    #[arg(long)]
    only: Option<Part>,
    /// Everything about capture: the parts capture, emulated, lag, cut and sync
    #[arg(long, conflicts_with = "only")]
    capture: bool,
    /// How long the part cut leaves the cable unplugged [default: 60, with --quick 6]
    #[arg(long)]
    cut_seconds: Option<u64>,
    /// Keep the table of the tree as it is
    #[arg(long)]
    no_write: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Part {
    /// Durable writes through NBD, beside the peers
    Ingest,
    /// Reading a view, beside the raw file
    View,
    /// A disk captured by the agent
    Agent,
    /// What capture alone costs a host that writes
    Capture,
    /// The same on null_blk of 100 µs, in an emulated guest
    Emulated,
    /// How far the box is behind at a sustained rate
    Lag,
    /// What a cut of the network costs
    Cut,
    /// What a synchronous write costs, beside DRBD and md
    Sync,
    /// Opening moments and restarting with long histories
    Journal,
}

/// What `--capture` runs.
const OF_CAPTURE: &[Part] = &[Part::Capture, Part::Emulated, Part::Lag, Part::Cut, Part::Sync];

/// Size of the disk written to: larger than any cache that would hide the device, small enough to be filled first.
const DISK_BYTES: u64 = 1 << 30;

/// (system, job) → one value per round.
type Samples = BTreeMap<(String, String), Vec<f64>>;

/// What a run found.
#[derive(Default)]
pub struct Results {
    /// Writes or reads per second.
    pub rates: Samples,
    /// What the journal's own measurement printed, one object per length of history.
    pub histories: Vec<serde_json::Value>,
    /// Single facts in the order found: (what, value).
    pub facts: Vec<(String, String)>,
    /// What could not be measured: (what, why).
    pub failures: Vec<(String, String)>,
}

impl Results {
    /// Something was not measured: said at once and in the table, and the rest goes on.
    fn failed(&mut self, what: &str, why: &anyhow::Error) {
        println!("  FAILED: {what}: {why:#}");
        self.failures.push((what.to_owned(), format!("{why:#}").replace('\n', " ")));
    }
    fn ends(&mut self, what: &str, done: Result<()>) {
        if let Err(e) = done {
            self.failed(what, &e);
        }
    }
    fn fact(&mut self, what: impl Into<String>, value: impl Into<String>) {
        let (what, value) = (what.into(), value.into());
        println!("  {what}: {value}");
        self.facts.push((what, value));
    }
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    deps::install(repo, Some(Purpose::Bench))?;
    let whole = options.only.is_none() && !options.capture;
    let wanted = |part: Part| match options.only {
        Some(only) => only == part,
        None => whole || OF_CAPTURE.contains(&part),
    };
    if [Part::Capture, Part::Emulated].into_iter().any(wanted) {
        repo.show(&mut repo.cargo(&["build", "--package", "agent-linux", "--examples"]))?;
    }
    if !matches!(options.only, Some(Part::Capture | Part::Emulated)) {
        repo.build_programs()?;
    }
    if wanted(Part::Sync) {
        repo.show(&mut repo.cargo(&["build", "--package", "hw-tests", "--bins"]))?;
    }
    let dir = repo.target_dir()?.join("bench");
    if dir.exists() {
        leftover::take_down(&dir)?;
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    // So that the pressure average, over ten seconds, has forgotten the build.
    thread::sleep(Duration::from_secs(10));
    let busy = report::busy();
    let mut results = Results::default();
    let rounds = if options.quick { 1 } else { 3 };
    if [Part::Ingest, Part::View, Part::Agent].into_iter().any(wanted) {
        let bins = Binaries::beside_us()?;
        let bench =
            systems::Bench { bins: &bins, dir: &dir, seconds: if options.quick { 2 } else { 4 }, bytes: DISK_BYTES };
        for round in 1..=rounds {
            println!("round {round} of {rounds}");
            if wanted(Part::Ingest) {
                let done = bench.ingest_round(&mut results, round as usize, round == rounds);
                results.ends("durable writes", done);
            }
            if wanted(Part::View) {
                let done = bench.view_round(&mut results);
                results.ends("reading a view", done);
            }
        }
        if wanted(Part::Agent) {
            let done = bench.agent(&mut results);
            results.ends("the agent", done);
        }
    }
    if wanted(Part::Capture) {
        let done = capture::run(&dir, options.quick, &mut results);
        results.ends("capture", done);
    }
    if wanted(Part::Emulated) {
        let done = emulated::run(&dir, &repo.target_dir()?.join("guest"), options.quick, &mut results);
        results.ends("capture in an emulated guest", done);
    }
    if wanted(Part::Lag) {
        let done = Binaries::beside_us().and_then(|bins| live::lag(&bins, &dir, options.quick, &mut results));
        results.ends("lag", done);
    }
    if wanted(Part::Cut) {
        let seconds = options.cut_seconds.unwrap_or(if options.quick { 6 } else { 60 });
        let done = Binaries::beside_us().and_then(|bins| live::cut(&bins, &dir, seconds, &mut results));
        results.ends("a cut of the network", done);
    }
    if wanted(Part::Sync) {
        let cache = repo.target_dir()?.join("guest");
        let done = Binaries::beside_us().and_then(|bins| mirror::run(&bins, &dir, &cache, options.quick, &mut results));
        results.ends("sync latency", done);
    }
    if wanted(Part::Journal) {
        let done = journal::run(repo, &dir, options.quick, &mut results);
        results.ends("long histories", done);
    }
    let text = report::render(&results, &repo.commit(), rounds, busy);
    println!("\n{text}");
    if whole && !options.no_write {
        let file = repo.root.join("appliance/docs/measured.md");
        fs::create_dir_all(file.parent().context("a file in a folder")?)?;
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        println!("written to {}", file.display());
    }
    fs::remove_dir_all(&dir)?;
    ensure!(
        results.failures.is_empty(),
        "{} parts could not be measured; the table says which",
        results.failures.len()
    );
    Ok(())
}
