//! `cargo xtask`: everything one does with this tree beyond `cargo build`.
//!
//! - `try`: the newcomer's command: a box, a protected disk, live figures; `--check` proves it bit for bit;
//! - `test`: every test there is, guests included; what CI runs;
//! - `tidy`: the rules of the house that no compiler checks;
//! - `deps`: the system tools the others call;
//! - `bench`: the figures, beside their peers, in one run;
//! - `package`: deb and rpm of agent and box;
//! - `rescue`: a medium that boots a machine which is to get its disks back;
//! - `sim`: one simulated world by its seed.

mod bench;
mod demo;
mod deps;
mod nobody;
mod package;
mod phases;
mod repo;
mod rescue;
mod simulate;
mod stop;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Work on Holdfast")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Start a box here, protect a disk under a changing workload, and show what happens
    Try(demo::Options),
    /// Run every test: tidy, formats, lints, unit, simulation, guests
    Test(phases::Options),
    /// Check the rules of the house
    Tidy,
    /// Find missing system tools and install them
    Deps {
        /// Only what this command needs
        #[arg(long = "for", value_enum)]
        purpose: Option<deps::Purpose>,
    },
    /// Measure, beside the peers, and write the table
    Bench(bench::Options),
    /// Make the packages that hosts and boxes are installed from
    Package(package::Options),
    /// Make a medium that boots a machine which is to get its disks back
    Rescue(rescue::Options),
    /// Run one simulated world
    Sim(simulate::Options),
}

fn main() -> ExitCode {
    let done = run(Cli::parse().command);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let repo = repo::Repo::find()?;
    match task {
        Task::Try(options) => demo::run(&repo, &options),
        Task::Test(options) => phases::run(&repo, &options),
        Task::Tidy => tidy::run(&repo),
        Task::Deps { purpose } => deps::run(&repo, purpose),
        Task::Bench(options) => bench::run(&repo, &options),
        Task::Package(options) => package::run(&repo, &options),
        Task::Rescue(options) => rescue::run(&repo, &options),
        Task::Sim(options) => simulate::run(&repo, &options),
    }
}
