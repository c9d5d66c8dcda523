//! `cargo xtask test`: every test there is, in phases, with one summary at the end.
//!
//! A phase that fails does not stop the others, except the build. Tests that could not run print `SKIPPED: why`; those
//! lines are gathered and shown at the end.

use crate::{
    deps::{self, Purpose},
    nobody,
    repo::Repo,
    tidy,
};
use anyhow::{Context, Result, bail};
use hw_tests::{
    process::{self, command_line},
    tools,
};
use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// For a check that ends at its first comparison.
const SPOILT_MAX: Duration = Duration::from_secs(180);

/// Making four packages twice, installing and removing them.
const PACKAGES_MAX: Duration = Duration::from_secs(600);

#[derive(clap::Args)]
pub struct Options {
    /// Leave out guests and the newcomer's command
    #[arg(long)]
    quick: bool,
}

/// What the tests of one phase came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    run: u64,
    failed: u64,
    skipped: Vec<String>,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.run += other.run;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
    }
}

struct Run<'a> {
    repo: &'a Repo,
    started: Instant,
    counts: Counts,
    failed: Vec<String>,
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let mut run = Run { repo, started: Instant::now(), counts: Counts::default(), failed: Vec::new() };
    run.phase("deps", |r| {
        let missing = deps::install(r.repo, Some(Purpose::Test))?;
        if !missing.tools.is_empty() {
            bail!("missing: {}", missing.tools.join(", "));
        }
        Ok(())
    });
    run.phase("build", |r| r.repo.show(&mut r.repo.cargo(&["build", "--quiet", "--workspace", "--locked"])));
    if run.failed.iter().any(|f| f == "build") {
        return run.finish();
    }
    run.phase("tidy", |r| tidy::run(r.repo));
    run.phase("format", |r| r.repo.show(&mut r.repo.cargo(&["fmt", "--all", "--check"])));
    // Without exception: a warning that is only shown is a warning nobody reads.
    run.phase("lints", |r| {
        r.repo.show(&mut r.repo.cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "--deny",
            "warnings",
        ]))
    });
    run.phase("packages", |r| {
        let programs = programs()?;
        let mut test = Command::new(r.repo.root.join("agents/linux/packaging/test.sh"));
        test.arg(programs).current_dir(&r.repo.root);
        // Not shown as it comes: what it skips is counted like any other skip.
        let done = process::run(test, PACKAGES_MAX)?;
        print!("{}", done.stdout);
        r.counts.skipped.extend(skips(&done.stdout, "\0"));
        done.ok().map(drop)
    });
    run.phase("tests", |r| r.tests(Which::AllButGuests));
    if !options.quick {
        run.phase("guests", |r| r.tests(Which::Guests));
        run.phase("try --check", |r| r.repo.show(Command::new(ourselves()?).args(["try", "--check", "--built"])));
        run.phase("try --check notices one wrong byte", |r| a_wrong_byte_is_noticed(r.repo));
        run.phase("try --check without root", |_| without_root());
    }
    run.finish()
}

/// Which tests run together: those of the guests come last, alone.
#[derive(Clone, Copy)]
enum Which {
    AllButGuests,
    Guests,
}

impl Which {
    /// For nextest.
    fn filter(self) -> &'static str {
        match self {
            Self::AllButGuests => "not package(hw-tests)",
            Self::Guests => "package(hw-tests)",
        }
    }

    /// For cargo's own runner.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::AllButGuests => &["--workspace", "--exclude", "hw-tests"],
            Self::Guests => &["--package", "hw-tests"],
        }
    }
}

impl Run<'_> {
    fn phase(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<()>) {
        let begun = Instant::now();
        println!("[{:7.1} s] {name}", self.started.elapsed().as_secs_f32());
        let done = work(self);
        let (total, took) = (self.started.elapsed().as_secs_f32(), begun.elapsed().as_secs_f32());
        match done {
            Ok(()) => println!("[{total:7.1} s] {name}: ok in {took:.1} s"),
            Err(e) => {
                println!("[{total:7.1} s] {name}: FAILED in {took:.1} s: {e:#}");
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Runs tests with nextest, or with cargo's own runner where that is all there is.
    fn tests(&mut self, which: Which) -> Result<()> {
        let (counts, outcome) = if tools::find("cargo-nextest").is_some() {
            // Chosen by a filter, not by `--package`: another choice of packages is another choice of features, and cargo would
            // build the same crates again.
            self.nextest(&["--workspace", "-E", which.filter()])?
        } else {
            self.cargo_test(which.packages())?
        };
        self.counts.add(counts);
        outcome
    }

    fn nextest(&self, which: &[&str]) -> Result<(Counts, Result<()>)> {
        let report = self.repo.target_dir()?.join("nextest/all/junit.xml");
        if report.exists() {
            fs::remove_file(&report)?;
        }
        let mut command = self.repo.cargo(&["nextest", "run", "--profile", "all", "--locked", "--no-tests", "pass"]);
        let outcome = self.repo.show(command.args(which));
        let text = if report.exists() { fs::read_to_string(&report)? } else { String::new() };
        Ok((from_junit(&text), outcome))
    }

    fn cargo_test(&self, which: &[&str]) -> Result<(Counts, Result<()>)> {
        println!("cargo-nextest is not installed: cargo's own runner is used");
        let log = self.repo.target_dir()?.join("cargo-test.log");
        let out = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut command = self.repo.cargo(&["test", "--no-fail-fast", "--locked"]);
        command.args(which).args(["--", "--show-output"]).stdout(out);
        let outcome = self.repo.show(&mut command).with_context(|| format!("see {}", log.display()));
        Ok((from_libtest(&fs::read_to_string(&log)?), outcome))
    }

    fn finish(self) -> Result<()> {
        let Counts { run, failed, mut skipped } = self.counts;
        skipped.sort();
        skipped.iter().for_each(|s| println!("{s}"));
        let took = self.started.elapsed().as_secs_f32();
        let (passed, skips) = (run - failed, skipped.len());
        let failures = if failed > 0 { format!(", {failed} failed") } else { String::new() };
        println!("     Summary [{took:8.1}s] {run} tests run: {passed} passed{failures}, {skips} skipped");
        if !self.failed.is_empty() {
            bail!("failed: {}", self.failed.join(", "));
        }
        Ok(())
    }
}

/// Our own program as it was built last: while the tests run, cargo may put a new file in the place of the one we run from, and
/// what the kernel names as ours then is gone.
fn ourselves() -> Result<PathBuf> {
    Ok(programs()?.join("xtask"))
}

/// The folder of the programs. Ours has been built again meanwhile, perhaps, and its old file is gone; its folder is not.
fn programs() -> Result<PathBuf> {
    let us = std::env::current_exe()?;
    Ok(us.parent().context("our own program is in no folder")?.to_owned())
}

/// A check that cannot fail proves nothing: this one must, and must say where.
fn a_wrong_byte_is_noticed(repo: &Repo) -> Result<()> {
    let mut command = Command::new(ourselves()?);
    command
        .args(["try", "--check", "--built", "--without-root", "--spoil", "--data"])
        .arg(repo.target_dir()?.join("try-spoilt"));
    let done = process::run(command, SPOILT_MAX)?;
    let place = format!("first difference at byte {}", crate::demo::SPOILT_BYTE);
    if done.status.success() || !done.stderr.contains(&place) {
        bail!(
            "one byte of the oracle was changed, and that was not said ({}):\n{}{}",
            done.status,
            done.stdout,
            done.stderr
        );
    }
    Ok(())
}

/// The newcomer's command as somebody who is not root. Run by root it steps down to `nobody`, with copies of the programs as
/// built: the tree may lie where `nobody` cannot look.
fn without_root() -> Result<()> {
    if !tools::is_root() {
        // The phase before was this one already.
        return Ok(());
    }
    let dir = nobody::Folder::make()?;
    let from = programs()?;
    for program in ["xtask", "holdfastd", "holdfast", "holdfast-agent"] {
        fs::copy(from.join(program), dir.path().join(program)).with_context(|| format!("copy {program}"))?;
    }
    let mut command = nobody::step_down()?;
    command.arg(dir.path().join("xtask")).args(["try", "--check", "--built", "--data"]).arg(dir.path().join("try"));
    command.env("HOME", dir.path()).current_dir(dir.path());
    let status = command.status()?;
    if !status.success() {
        bail!("{} failed ({status})", command_line(&command));
    }
    Ok(())
}

/// Reads nextest's JUnit report: its totals, and the skips its tests printed.
fn from_junit(report: &str) -> Counts {
    let head = report.split("<testsuites").nth(1).and_then(|r| r.split('>').next()).unwrap_or("");
    let number = |key: &str| {
        let value = head.split(&format!(" {key}=\"")).nth(1).and_then(|v| v.split('"').next());
        value.and_then(|v| v.parse().ok()).unwrap_or(0)
    };
    Counts {
        run: number("tests"),
        failed: number("failures") + number("errors"),
        skipped: skips(report, "testcase name=\""),
    }
}

/// Every printed skip, with the test it stands in.
fn skips(text: &str, test_mark: &str) -> Vec<String> {
    let (mut found, mut test) = (Vec::new(), "");
    for line in text.lines() {
        if let Some(name) = line.split(test_mark).nth(1).and_then(|rest| rest.split('"').next()) {
            test = name;
        }
        if let Some((_, why)) = line.split_once("SKIPPED: ") {
            let why = why.split("</system-out>").next().unwrap_or(why).trim();
            found.push(if test.is_empty() { format!("SKIPPED: {why}") } else { format!("SKIPPED: {test}: {why}") });
        }
    }
    found
}

/// Reads what cargo's own runner prints: `test result: ok. 3 passed; 1 failed; ..` once per binary.
fn from_libtest(log: &str) -> Counts {
    let mut counts = Counts { skipped: skips(log, "\0"), ..Counts::default() };
    for line in log.lines().filter(|l| l.starts_with("test result:")) {
        let number = |what: &str| {
            let before = line.split(what).next().filter(|b| b.len() < line.len())?;
            before.split_whitespace().next_back()?.parse::<u64>().ok()
        };
        let (passed, failed) = (number(" passed").unwrap_or(0), number(" failed").unwrap_or(0));
        counts.run += passed + failed;
        counts.failed += failed;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_junit_report_is_counted_with_its_skips() {
        let report = "<?xml version=\"1.0\"?>\n<testsuites name=\"all\" tests=\"12\" failures=\"1\" errors=\"0\" uuid=\"x\">\n<testcase name=\"a::b\" classname=\"c\">\n<system-out>running 1 test\nSKIPPED: needs root</system-out>\n</testcase></testsuites>";
        let counts = from_junit(report);
        assert_eq!(counts, Counts { run: 12, failed: 1, skipped: vec!["SKIPPED: a::b: needs root".into()] });
        assert_eq!(from_junit(""), Counts::default());
    }

    #[test]
    fn the_output_of_cargos_own_runner_is_counted() {
        let log = "---- a stdout ----\nSKIPPED: no fio\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured\ntest result: FAILED. 2 passed; 1 failed; 0 ignored\n";
        assert_eq!(from_libtest(log), Counts { run: 6, failed: 1, skipped: vec!["SKIPPED: no fio".into()] });
    }
}
