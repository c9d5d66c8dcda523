//! `cargo xtask sim`: one world of the simulator by its seed, as a failing test prints it.

use crate::repo::Repo;
use anyhow::{Context, Result};

#[derive(clap::Args)]
pub struct Options {
    /// The seed a failing run printed
    #[arg(long)]
    seed: u64,
    /// A world of ownership and takeover instead of replication and journal
    #[arg(long)]
    ownership: bool,
    /// Print every step of the world
    #[arg(long)]
    trace: bool,
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let seed = options.seed.to_string();
    let mut args = vec!["run", "--quiet", "--package", "sim", "--example", "world", "--", "--seed", &seed];
    if options.ownership {
        args.push("--ownership");
    }
    if options.trace {
        args.push("--trace");
    }
    repo.show(&mut repo.cargo(&args)).with_context(|| format!("seed {seed}"))
}
