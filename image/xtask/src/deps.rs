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
/// Two are needed where one package drives another out; what is absent after a third cannot be had.
const ROUNDS_MAX: usize = 3;
/// The package whose kernel the guests run.
pub const GUEST_KERNEL: &str = "linux-image-amd64";

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    Try,
    Test,
    Bench,
    Package,
    /// `try --takeover`
    Story,
    Rescue,
}

impl Purpose {
    fn need(self) -> Need {
        match self {
            Self::Try => Need::Try,
            Self::Test => Need::Test,
            Self::Bench => Need::Bench,
            Self::Package => Need::Package,
            Self::Story => Need::Story,
            Self::Rescue => Need::Rescue,
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
    let look = || wanted(purpose, |name| tools::find(name).is_some());
    let absent = look();
    if !absent.is_empty() {
        match Installer::new() {
            Some(mut apt) => settle(look, |tool| apt.install(tool)),
            None => {
                let packages: Vec<_> = packages(&absent);
                println!(
                    "not root and no sudo without a password: install these first: apt-get install {}",
                    packages.join(" ")
                );
            }
        }
    }
    let mut missing = Missing::default();
    // Of all that is wanted, not only of what was absent: a package may have driven another one out.
    for tool in look() {
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

/// Installs what is absent, and again what that has driven out: a package of the distribution's release and one from its backports
/// may exclude each other.
fn settle(look: impl Fn() -> Vec<&'static Tool>, mut install: impl FnMut(&'static Tool)) {
    for _ in 0..ROUNDS_MAX {
        let absent = look();
        if absent.is_empty() {
            return;
        }
        absent.into_iter().for_each(&mut install);
    }
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
    fn a_tool_that_another_ones_package_drives_out_is_installed_again() {
        let here = std::cell::RefCell::new(vec!["qemu-img"]);
        let asked = std::cell::RefCell::new(Vec::new());
        let look = || wanted(Some(Purpose::Test), |name| !name.starts_with("qemu-") || here.borrow().contains(&name));
        settle(look, |tool| {
            asked.borrow_mut().push(tool.name);
            // As Debian 12's emulator does with the disk tools from its backports.
            here.borrow_mut().retain(|name| tool.name == "qemu-img" || *name != "qemu-img");
            here.borrow_mut().push(tool.name);
        });
        assert!(look().is_empty(), "{:?}", asked.borrow());
        assert!(asked.borrow().contains(&"qemu-img"));
        // What cannot be had is not asked for without end.
        let asked = std::cell::Cell::new(0);
        settle(|| wanted(Some(Purpose::Test), |name| name != "fio"), |_| asked.set(asked.get() + 1));
        assert_eq!(asked.get(), ROUNDS_MAX);
    }

    #[test]
    fn a_package_with_two_tools_is_named_once() {
        let two: Vec<_> = TOOLS.iter().filter(|t| t.package == "e2fsprogs").collect();
        assert!(two.len() > 1);
        assert_eq!(packages(&two), ["e2fsprogs"]);
    }
}
