//! `cargo xtask package`: what is installed on hosts and boxes, as deb and rpm, in `target/packages`.
//!
//! The scripts beside the two programs know how; this builds the programs first and calls them. Same commit, same bytes.

use crate::{
    deps::{self, Purpose},
    repo::Repo,
};
use anyhow::{Result, bail};
use std::{fs, process::Command};

/// The scripts, each of which makes a deb and an rpm.
const SCRIPTS: [&str; 2] = ["agents/linux/packaging/build.sh", "appliance/supervisor/packaging/build.sh"];

#[derive(clap::Args)]
pub struct Options {
    /// Only this kind
    #[arg(long, value_enum)]
    only: Option<Kind>,
    /// Pack quickly instead of small
    #[arg(long)]
    fast: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Kind {
    Deb,
    Rpm,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Rpm => "rpm",
        }
    }
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let missing = deps::install(repo, Some(Purpose::Package))?;
    if !missing.tools.is_empty() {
        bail!("missing: {}", missing.tools.join(", "));
    }
    println!("building");
    let programs = ["--package", "supervisor", "--package", "ctl", "--package", "agent-linux"];
    repo.show(repo.cargo(&["build", "--locked"]).args(programs))?;
    let out = repo.target_dir()?.join("packages");
    fs::create_dir_all(&out)?;
    for script in SCRIPTS {
        let mut command = Command::new(repo.root.join(script));
        command.arg("--out").arg(&out).args(arguments(options));
        repo.show(&mut command)?;
    }
    Ok(())
}

fn arguments(options: &Options) -> Vec<&'static str> {
    let mut arguments = Vec::new();
    if let Some(kind) = options.only {
        arguments.extend(["--only", kind.name()]);
    }
    if options.fast {
        arguments.push("--fast");
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_are_there_and_are_told_what_was_asked() {
        let repo = Repo::find().unwrap();
        for script in SCRIPTS {
            assert!(repo.root.join(script).is_file(), "{script}");
        }
        assert_eq!(arguments(&Options { only: None, fast: false }), Vec::<&str>::new());
        assert_eq!(arguments(&Options { only: Some(Kind::Rpm), fast: true }), ["--only", "rpm", "--fast"]);
    }
}
