//! Long histories: opening any moment, restarting after a kill.

use super::Results;
use crate::repo::Repo;
use anyhow::{Context, Result, ensure};
use hw_tests::process;
use serde_json::Value;
use std::{path::Path, time::Duration};

/// Writing ten million records takes most of it.
const LIMIT: Duration = Duration::from_secs(3600);

/// Runs the journal's own measurement, which prints one JSON object per length of history.
pub fn run(repo: &Repo, dir: &Path, quick: bool, results: &mut Results) -> Result<()> {
    let example = ["--quiet", "--package", "journal", "--example", "open_bench"];
    repo.show(repo.cargo(&["build"]).args(example))?;
    let counts = if quick { "10000,1000000" } else { "10000,1000000,10000000" };
    println!("histories of {counts} records");
    let at = dir.join("journal");
    std::fs::create_dir_all(&at)?;
    let mut command = repo.cargo(&["run"]);
    command.args(example).arg("--").arg(&at).args(["--records", counts, "--json"]);
    let done = process::run(command, LIMIT)?.ok()?;
    for line in done.stdout.lines().filter(|l| l.starts_with('{')) {
        println!("  {line}");
        results
            .histories
            .push(serde_json::from_str::<Value>(line).with_context(|| format!("open_bench printed {line}"))?);
    }
    ensure!(!results.histories.is_empty(), "open_bench measured nothing: {}", done.stdout);
    Ok(())
}
