//! The host of the story: its disk, its power, its cable.

use anyhow::{Context, Result};
use hw_tests::{
    debian::{DebianGuest, DebianImage, Options, Profile, Tap, install},
    process::call,
    product::Binaries,
};
use serde_json::json;
use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

pub const BRIDGE: &str = "hfbr0";
pub const TAP: &str = "hfhost0";
/// Where the guests' shell looks for this machine.
pub const BOX: &str = "10.0.2.2";
pub const HOST: &str = "10.0.2.15";
/// The machine on the box has the host's own address while the rescue medium runs.
pub const RESCUE_ADDRESS: &str = "10.0.2.16";
/// Where the database answers.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
pub const MAC: &str = "52:54:00:48:46:01";
/// Not the host's: the address must be found again by what neighbours are told.
pub const MACHINE_MAC: &str = "52:54:00:48:46:02";
pub const UNIT: &str = "postgresql@15-main.service";

const STEP_MAX: Duration = Duration::from_secs(300);
/// From the firmware to a question.
const MEDIUM_MAX: Duration = Duration::from_secs(600);

pub fn sql(text: &str) -> String {
    format!("runuser -u postgres -- psql -v ON_ERROR_STOP=1 -qtAc \"{text}\"")
}

/// A Debian with a database that listens to the client's network, and the agent.
pub fn host_disk(bins: &Binaries, target: &Path, dir: &Path) -> Result<PathBuf> {
    let image = DebianImage::get(Profile::POSTGRESQL, &target.join("guest"))?;
    let raw = dir.join("host.raw");
    call("cp", &["--sparse=always", &image.path().to_string_lossy(), &raw.to_string_lossy()], STEP_MAX)?;
    install::put_agent(&raw, &bins.agent, &dir.join("mount"), |root| {
        fs::create_dir_all(root.join("etc/holdfast-agent"))?;
        // An emulated host is always short of processor.
        fs::write(root.join("etc/holdfast-agent/config.toml"), "heed_pressure = false\n")?;
        let database = root.join("etc/postgresql/15/main");
        fs::create_dir_all(database.join("conf.d"))?;
        fs::write(database.join("conf.d/story.conf"), "listen_addresses = '*'\n")?;
        let access = database.join("pg_hba.conf");
        let mut lines = fs::read_to_string(&access).with_context(|| format!("read {}", access.display()))?;
        lines += "host all all 192.0.2.0/24 trust\n";
        Ok(fs::write(&access, lines)?)
    })?;
    let disk = dir.join("host.qcow2");
    let (from, to) = (raw.to_string_lossy(), disk.to_string_lossy());
    call("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &from, "-F", "raw", &to], STEP_MAX)?;
    Ok(disk)
}

pub struct Host(DebianGuest);

impl Host {
    pub fn boot(disk: &Path, dir: &Path) -> Result<Self> {
        Ok(Self(DebianGuest::boot(disk, dir, &options(Vec::new()))?))
    }

    /// From a medium, once; when it is started anew, from its own disk.
    pub fn from_medium(disk: &Path, dir: &Path, medium: &Path) -> Result<Self> {
        let medium = medium.display().to_string();
        let args = ["-cdrom", &medium, "-boot", "once=d"].map(str::to_owned).to_vec();
        Ok(Self(DebianGuest::switch_on(disk, dir, &options(args))?))
    }

    pub fn sh(&mut self, line: &str) -> Result<String> {
        let log = self.log();
        self.0.sh(line, STEP_MAX).context(log)
    }
    pub fn answer(&mut self, question: &str, line: &str) -> Result<()> {
        let log = self.log();
        self.0.guest().answer(question, line, MEDIUM_MAX).context(log)
    }
    /// Where its console's words are.
    pub fn log(&self) -> String {
        format!("see {}", self.0.log_path().display())
    }
    pub fn wait_shell(&mut self) -> Result<()> {
        self.0.guest().wait_shell()
    }
    pub fn link(&mut self, up: bool) -> Result<()> {
        self.0.guest().qmp.execute("set_link", json!({ "name": "net", "up": up })).map(drop)
    }
    pub fn is_stopped(&mut self) -> Result<bool> {
        let said = self.sh(&format!("systemctl is-active {UNIT} || true; ip -o address show dev eth0"))?;
        Ok(!said.lines().any(|l| l == "active" || l == "deactivating") && !said.contains(&ADDRESS.to_string()))
    }
    pub fn power_off_hard(self) -> Result<()> {
        self.0.power_off_hard()
    }
    pub fn shut_down(self) -> Result<()> {
        self.0.shut_down()
    }
}

fn options(args: Vec<String>) -> Options {
    Options { args, tap: Some(Tap { name: TAP, mac: MAC }), ..Options::default() }
}
