//! This tree: where it is, what it holds, and how cargo is called in it.

use anyhow::{Context, Result, bail};
use hw_tests::process::{self, Finished};
use serde_json::Value;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const QUESTION_MAX: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
pub struct Repo {
    pub root: PathBuf,
}

impl Repo {
    pub fn find() -> Result<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.ancestors().nth(2).context("xtask does not lie two folders below the root")?;
        // Programs copied out of the tree for another user run without one.
        Ok(Self { root: root.canonicalize().unwrap_or_else(|_| root.to_owned()) })
    }

    /// cargo, without what the cargo that started us put into the environment: some build scripts (ring's) run again
    /// whenever one of those variables changes.
    pub fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        for (key, _) in env::vars_os() {
            let name = key.to_string_lossy();
            let ours = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
            if ours.iter().any(|p| name.starts_with(p)) {
                command.env_remove(&key);
            }
        }
        command.args(args).current_dir(&self.root);
        command
    }

    /// Runs a command in the tree with its output shown as it comes.
    pub fn show(&self, command: &mut Command) -> Result<()> {
        let what = process::command_line(command);
        let status = command.current_dir(&self.root).status().with_context(|| format!("start {what}"))?;
        if !status.success() {
            bail!("{what} failed ({status})");
        }
        Ok(())
    }

    /// Builds what is run: the box, its command line, the agent.
    pub fn build_programs(&self) -> Result<()> {
        self.show(&mut self.cargo(&[
            "build",
            "--package",
            "supervisor",
            "--package",
            "ctl",
            "--package",
            "agent-linux",
        ]))
    }

    /// Asks cargo something.
    pub fn ask_cargo(&self, args: &[&str]) -> Result<Finished> {
        process::run(self.cargo(args), QUESTION_MAX)
    }

    pub fn metadata(&self) -> Result<Value> {
        let answer = self.ask_cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"])?.ok()?;
        serde_json::from_str(&answer.stdout).context("cargo metadata")
    }

    pub fn target_dir(&self) -> Result<PathBuf> {
        let metadata = self.metadata()?;
        Ok(metadata["target_directory"].as_str().context("cargo metadata names no target folder")?.into())
    }

    /// Files of the tree as git sees them (known or new, not ignored), relative to the root.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(&self.root);
        let mut files: Vec<PathBuf> = match process::run(git, QUESTION_MAX).and_then(Finished::ok) {
            Ok(listed) => listed.stdout.split('\0').filter(|f| !f.is_empty()).map(PathBuf::from).collect(),
            // A source archive has no git: everything but what builds leave behind.
            Err(_) => {
                let mut found = Vec::new();
                walk(&self.root, &self.root, &mut found)?;
                found
            }
        };
        files.retain(|f| self.root.join(f).is_file());
        files.sort();
        files.dedup();
        Ok(files)
    }

    /// The commit and whether the tree differs from it, as a table's heading needs it.
    pub fn commit(&self) -> String {
        let ask = |args: &[&str]| {
            let mut git = Command::new("git");
            git.args(args).current_dir(&self.root);
            process::run(git, QUESTION_MAX).and_then(Finished::ok).map(|done| done.stdout.trim().to_owned())
        };
        match (ask(&["rev-parse", "--short=12", "HEAD"]), ask(&["status", "--porcelain", "--untracked-files=no"])) {
            (Ok(commit), Ok(changes)) if changes.is_empty() => commit,
            (Ok(commit), _) => format!("{commit} with uncommitted changes"),
            (Err(_), _) => "unknown".to_owned(),
        }
    }
}

fn walk(root: &Path, dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let inside = path.strip_prefix(root)?;
        if inside == Path::new("target") || inside == Path::new(".git") {
            continue;
        }
        if path.is_dir() { walk(root, &path, found)? } else { found.push(inside.to_owned()) }
    }
    Ok(())
}
