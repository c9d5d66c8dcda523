//! `cargo xtask deps`: finds missing system tools and installs their packages.
//!
//! A package is asked for only when its *tool* is missing, and one at a time: a machine may have a tool from backports or
//! built by hand, and one package that cannot be had must not take the others along.

use crate::repo::Repo;
use anyhow::Result;
use hw_tests::{
    debian::{DebianImage, Profile},
    guest::{BOOKWORM_BACKPORTS, BULLSEYE_SECURITY, Kernel},
    process,
    tools::{self, Need, TOOLS, Tool},
};
use std::{path::Path, process::Command, time::Duration};

/// Downloading and unpacking one package.
const INSTALL_MAX: Duration = Duration::from_secs(900);
/// The package whose kernel the guests run.
pub const GUEST_KERNEL: &str = "linux-image-amd64";

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    Try,
    Test,
    Bench,
    Package,
}

impl Purpose {
    fn need(self) -> Need {
        match self {
            Self::Try => Need::Try,
            Self::Test => Need::Test,
            Self::Bench => Need::Bench,
            Self::Package => Need::Package,
        }
    }
}

/// What could not be had.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Missing {
    pub tools: Vec<&'static str>,
}

pub fn run(repo: &Repo, purpose: Option<Purpose>) -> Result<()> {
    let missing = install(repo, purpose)?;
    if missing.tools.is_empty() {
        println!("every tool is here");
    }
    Ok(())
}

/// Installs what is missing, as far as we may; returns what is still missing, having said so.
pub fn install(repo: &Repo, purpose: Option<Purpose>) -> Result<Missing> {
    let wanted = wanted(purpose, |name| tools::find(name).is_some());
    if !wanted.is_empty() {
        match Installer::new() {
            Some(mut apt) => wanted.iter().for_each(|tool| apt.install(tool)),
            None => {
                let packages: Vec<_> = packages(&wanted);
                println!(
                    "not root and no sudo without a password: install these first: apt-get install {}",
                    packages.join(" ")
                );
            }
        }
    }
    let mut missing = Missing::default();
    for tool in wanted.iter().filter(|t| tools::find(t.name).is_none()) {
        println!("still missing: {} ({}), package {}", tool.name, tool.used_for, tool.package);
        missing.tools.push(tool.name);
    }
    if purpose.is_none_or(|p| p == Purpose::Test) && missing.tools.is_empty() {
        let kernel = Kernel::debian(GUEST_KERNEL, &repo.target_dir()?.join("guest"))?;
        println!("guests run Debian's kernel {}", kernel.version);
        // Tests of these are skipped by name where they cannot be had.
        for release in [BOOKWORM_BACKPORTS, BULLSEYE_SECURITY] {
            match Kernel::of_release(&release, &repo.target_dir()?.join("guest")) {
                Ok(kernel) => println!("and {}", kernel.version),
                Err(e) => println!("Linux {} could not be had: {e:#}", release.name),
            }
        }
        debian_images(&repo.target_dir()?.join("guest"))?;
    }
    Ok(missing)
}

/// Disks of whole Debian hosts, so that no test's time has their making in it.
fn debian_images(cache: &Path) -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        // The tests that need one say so too, and are counted.
        println!("no disks of Debian hosts: {why}");
        return Ok(());
    }
    for profile in Profile::TESTED {
        let image = DebianImage::get(profile, cache)?;
        println!("a Debian host: {}", image.path().display());
    }
    Ok(())
}

/// The tools that are wanted and not here.
fn wanted(purpose: Option<Purpose>, here: impl Fn(&str) -> bool) -> Vec<&'static Tool> {
    let needed = |t: &&Tool| purpose.is_none_or(|p| t.needed_by.contains(&p.need()));
    TOOLS.iter().filter(needed).filter(|t| !here(t.name)).collect()
}

fn packages(tools: &[&Tool]) -> Vec<&'static str> {
    let mut packages: Vec<_> = tools.iter().map(|t| t.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// apt-get, as root or through sudo.
struct Installer {
    sudo: bool,
    /// Lists are refreshed once, before the first package.
    fresh: bool,
}

impl Installer {
    fn new() -> Option<Self> {
        tools::find("apt-get")?;
        if tools::is_root() {
            return Some(Self { sudo: false, fresh: false });
        }
        let mut probe = Command::new(tools::find("sudo")?);
        probe.args(["-n", "true"]);
        let allowed = process::run(probe, Duration::from_secs(10)).is_ok_and(|done| done.status.success());
        allowed.then_some(Self { sudo: true, fresh: false })
    }

    fn install(&mut self, tool: &Tool) {
        // An earlier package may have brought it along.
        if tools::find(tool.name).is_some() {
            return;
        }
        if !std::mem::replace(&mut self.fresh, true)
            && let Err(e) = self.apt(&["update"])
        {
            println!("package lists were not refreshed: {e:#}");
        }
        println!("installing {} for {} ({})", tool.package, tool.name, tool.used_for);
        if let Err(e) = self.apt(&["install", "-y", "--no-install-recommends", tool.package]) {
            println!("{} was not installed: {e:#}", tool.package);
        }
    }

    fn apt(&self, args: &[&str]) -> Result<()> {
        let mut command = if self.sudo { Command::new("sudo") } else { Command::new("env") };
        if self.sudo {
            command.args(["-n", "env"]);
        }
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]).args(args);
        process::run(command, INSTALL_MAX)?.ok().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_missing_tools_of_the_purpose_are_wanted() {
        let names =
            |purpose, here: fn(&str) -> bool| -> Vec<_> { wanted(purpose, here).iter().map(|t| t.name).collect() };
        assert!(names(None, |_| true).is_empty());
        assert_eq!(names(None, |_| false).len(), TOOLS.len());
        let for_try = names(Some(Purpose::Try), |name| name != "clang" && name != "fio");
        assert_eq!(for_try, ["clang"], "fio is no need of try");
    }

    #[test]
    fn a_package_with_two_tools_is_named_once() {
        let two: Vec<_> = TOOLS.iter().filter(|t| t.package == "e2fsprogs").collect();
        assert!(two.len() > 1);
        assert_eq!(packages(&two), ["e2fsprogs"]);
    }
}
