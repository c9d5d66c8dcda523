//! A Debian host with the agent's package, protected by a box.

use super::{DebianGuest, DebianImage, Options, Profile, install};
use crate::{
    compare,
    process::{self, call, wait_for},
    product::{Appliance, At, Binaries},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(180);
/// Copying or comparing the whole of the root in an emulated guest.
const SYNC_MAX: Duration = Duration::from_secs(900);
const PACKAGE_MAX: Duration = Duration::from_secs(120);
/// A guest's way to this machine's loopback.
const HOST: &str = "10.0.2.2";
/// An emulated machine is under pressure all the time. Every sector is compared, free ones too.
const CONFIG: &str = "heed_pressure = false\ncopy = \"whole\"\n";

fn repo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The agent's package.
fn package(bins: &Binaries, dir: &Path) -> Result<PathBuf> {
    let mut build = Command::new(repo().join("agents/linux/packaging/build.sh"));
    build.args(["--only", "deb", "--fast", "--binary"]).arg(&bins.agent).arg("--out").arg(dir);
    process::run(build, PACKAGE_MAX)?.ok()?;
    let found = std::fs::read_dir(dir)?.filter_map(|e| Some(e.ok()?.path()));
    found.into_iter().find(|p| p.extension().is_some_and(|e| e == "deb")).context("no deb was made")
}

/// A Debian host with the agent's package, on a raw disk that can be read beside it.
pub struct Host {
    pub guest: Option<DebianGuest>,
    pub disk: PathBuf,
    options: Options,
    dir: PathBuf,
}

impl Host {
    pub fn new(bins: &Binaries, dir: &Path, profile: Profile, options: Options) -> Result<Self> {
        Self::with_files(bins, dir, profile, options, |_| Ok(Vec::new()))
    }

    /// With files that are there, and in its initramfs, when it boots for the first time; they may say what the disk is.
    pub fn with_files<'a>(
        bins: &Binaries,
        dir: &Path,
        profile: Profile,
        options: Options,
        files: impl Fn(&Path) -> Result<Vec<install::Put<'a>>>,
    ) -> Result<Self> {
        let image = DebianImage::get(profile, &repo().join("target/guest"))?;
        let disk = dir.join("host.raw");
        call("cp", &["--sparse=always", &image.path().to_string_lossy(), &disk.to_string_lossy()], STEP_MAX)?;
        install::install(&disk, &package(bins, &dir.join("packages"))?, CONFIG, &files(&disk)?, &dir.join("mount"))?;
        let mut this = Self { guest: None, disk, options, dir: dir.join("guest") };
        this.power_on()?;
        Ok(this)
    }

    pub fn power_on(&mut self) -> Result<()> {
        self.guest = Some(DebianGuest::boot(&self.disk, &self.dir, &self.options)?);
        Ok(())
    }

    pub fn guest(&mut self) -> Result<&mut DebianGuest> {
        self.guest.as_mut().context("the host is switched off")
    }

    pub fn sh(&mut self, line: &str) -> Result<String> {
        let guest = self.guest()?;
        let log = guest.log_path().display().to_string();
        guest.sh(line, STEP_MAX).with_context(|| format!("see {log}"))
    }

    /// Enrols and starts the agent.
    pub fn join(&mut self, appliance: &Appliance) -> Result<()> {
        let (token, port) = (appliance.token()?, appliance.listen().port());
        self.sh(&format!("holdfast-agent enrol --box {HOST}:{port} --token {token}"))?;
        self.sh("systemctl start holdfast-agent").map(drop)
    }

    /// Waits until the agent's only group is as `good` wants it; what is said of it then.
    pub fn wait_group(&mut self, what: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let log = self.guest()?.log_path().display().to_string();
        wait_for(what, SYNC_MAX, || {
            // Right after a boot nobody answers yet.
            let text = self.sh("holdfast-agent status --json 2>/dev/null || true")?;
            let Ok(status) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
            last = status["groups"][0].clone();
            Ok(good(&last).then(|| last.clone()))
        })
        .with_context(|| format!("last seen: {last}; see {log}"))
    }

    /// Waits until the agent has nothing left to copy or to compare; what it says then.
    pub fn in_step(&mut self) -> Result<Value> {
        self.wait_group("the group to be in step", |g| g["state"] == "replicating" && g["lag_ms"].is_u64())
    }

    /// Holds the root file system still until the box has what the disk has of it; `root`: where that lies on the disk.
    pub fn assert_identical(&mut self, appliance: &Appliance, group: &str, root: (u64, u64)) -> Result<()> {
        self.sh("sync; fsfreeze --freeze /")?;
        let mut seen = String::new();
        wait_for("the box to have what the disk has", STEP_MAX, || {
            let view = appliance.view(group, &At::Latest)?;
            let mut client = view.only()?.connect()?;
            ensure!(client.size() == root.1, "the view has {} bytes, the root file system {}", client.size(), root.1);
            let difference = compare::export_with_part(&mut client, &self.disk, root.0)?;
            drop(client);
            view.close()?;
            seen = difference.map(|d| d.to_string()).unwrap_or_default();
            Ok(seen.is_empty().then_some(()))
        })
        .with_context(|| seen.clone())?;
        self.sh("fsfreeze --unfreeze /").map(drop)
    }
}
