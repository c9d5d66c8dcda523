//! Long histories: opening any moment, restarting after a kill.

use super::Results;
use crate::repo::Repo;
use anyhow::{Context, Result};
use hw_tests::process;
use std::{path::Path, time::Duration};

/// Writing ten million records takes most of it.
const LIMIT: Duration = Duration::from_secs(1800);

/// Runs the journal's own measurement, which prints `fact: value` lines.
pub fn run(repo: &Repo, dir: &Path, quick: bool, results: &mut Results) -> Result<()> {
    repo.show(&mut repo.cargo(&["build", "--quiet", "--package", "journal", "--example", "open_bench"]))?;
    let counts: &[u64] = if quick { &[10_000, 1_000_000] } else { &[10_000, 1_000_000, 10_000_000] };
    for count in counts {
        let at = dir.join(format!("journal-{count}"));
        std::fs::create_dir_all(&at)?;
        let (count, at_text) = (count.to_string(), at.to_string_lossy().into_owned());
        let mut command = repo.cargo(&["run", "--quiet", "--package", "journal", "--example", "open_bench", "--"]);
        command.args(["--records", &count, "--dir", &at_text]);
        let done = process::run(command, LIMIT)?.ok().with_context(|| format!("{count} records"))?;
        for line in done.stdout.lines() {
            if let Some((what, value)) = line.split_once(": ") {
                results.fact(format!("{count} records: {what}"), value.trim());
            }
        }
        std::fs::remove_dir_all(&at)?;
    }
    Ok(())
}
