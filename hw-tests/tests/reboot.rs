//! A protected Debian host that is rebooted, loses its power, and gets rid of the agent: its root is an ordinary ext4 partition.
//!
//! The root is compared with the box while it is held still (`fsfreeze`), from the disk's own file.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    debian::{DebianImage, Options, Profile, host::Host, install},
    product::{Appliance, Binaries},
};
use serde_json::Value;
use std::{path::Path, time::Duration};

/// An initramfs made in an emulated guest.
const PURGE_MAX: Duration = Duration::from_secs(600);
const GROUP: &str = "root";

fn host(bins: &Binaries, dir: &Path) -> Result<Host> {
    Host::new(bins, dir, Profile::PARTITION, Options::default())
}

/// What these tests do with it.
trait Tried {
    fn protect(&mut self, appliance: &Appliance, at: &str) -> Result<()>;
    fn work(&mut self, name: &str) -> Result<()>;
    fn named(&mut self) -> Result<String>;
    fn settings(&mut self) -> Result<String>;
    fn early(&mut self) -> Result<Value>;
}

impl Tried for Host {
    /// Enrols, protects what is mounted at `at`, and waits until the box has it.
    fn protect(&mut self, appliance: &Appliance, at: &str) -> Result<()> {
        self.join(appliance)?;
        self.sh(&format!("holdfast-agent protect {at} --group {GROUP}"))?;
        self.in_step().map(drop)
    }

    /// What each boot changes besides what a test writes, and a workload of a kind.
    fn work(&mut self, name: &str) -> Result<()> {
        self.sh(&format!(
            "mkdir /srv/{name} && dd if=/dev/urandom of=/srv/{name}/a bs=1M count=6 conv=fsync 2>/dev/null && \
             cp -r /etc /srv/{name}/etc && rm -rf /srv/{name}/etc/ssl && sync"
        ))
        .map(drop)
    }

    /// Everything on the host that bears our name.
    fn named(&mut self) -> Result<String> {
        let found = self.sh("find / /boot /run /sys/fs/bpf -xdev -iname '*holdfast*'")?;
        let inside = self.sh("lsinitramfs /boot/initrd.img-* | grep holdfast || true")?;
        Ok(format!("{found}{inside}").trim().to_owned())
    }

    /// What of the running system the agent changes while it protects a disk.
    fn settings(&mut self) -> Result<String> {
        self.sh(
            "cat /sys/block/vda/queue/max_sectors_kb; dmsetup table; ls /sys/fs/bpf; systemctl --failed --no-legend",
        )
    }

    fn early(&mut self) -> Result<Value> {
        let text = self.sh("cat /run/holdfast-agent/early.json")?;
        serde_json::from_str(&text).with_context(|| format!("early.json {text:?}"))
    }
}

fn number(group: &Value, key: &str) -> Result<u64> {
    group[key].as_u64().with_context(|| format!("no {key} in {group}"))
}

/// Of a root of 859 MiB: what carry.bin itself takes (8 MiB), and what is written on the way down, after the agent has ended.
const REREAD_MAX: u64 = 24 << 20;

#[test]
fn an_ext4_root_is_carried_over_a_clean_reboot_and_compared_after_a_power_cut() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a reboot of a protected Debian host: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = host(&bins, dir.path())?;
    let root = install::root(&host.disk)?;
    let bytes = root.1;
    host.protect(&appliance, "/")?;
    host.work("before")?;

    host.guest()?.reboot()?;
    let early = host.early()?;
    ensure!(early["groups"].as_array().is_some_and(|g| g.len() == 1), "not carried over: {early}");
    let group = host.in_step()?;
    let reread = number(&group, "sync_done_bytes")?;
    println!("clean reboot: {reread} of {bytes} bytes were read again");
    ensure!(reread <= REREAD_MAX, "{reread} of {bytes} bytes were read again: {group}");
    host.work("between")?;
    host.assert_identical(&appliance, GROUP, root)?;

    // The power goes while somebody writes.
    host.sh("(i=0; while :; do dd if=/dev/urandom of=/srv/before/b$((i%4)) bs=64k count=8 conv=fsync; i=$((i+1)); done >/dev/null 2>&1 &)")?;
    host.sh("sleep 3")?;
    host.guest.take().context("the host is switched off")?.power_off_hard()?;
    host.power_on()?;
    let early = host.sh("cat /run/holdfast-agent/early.json")?;
    ensure!(early.contains("it was not written at the last shutdown"), "carried over a power cut: {early}");
    let group = host.in_step()?;
    let (total, same) = (number(&group, "sync_total_bytes")?, number(&group, "found_same_bytes")?);
    println!("power cut: of {total} bytes {same} were found the same");
    ensure!(same > bytes * 8 / 10, "only {same} of {bytes} bytes were found the same: {group}");
    host.work("after")?;
    host.assert_identical(&appliance, GROUP, root)?;
    appliance.stop()?;
    dir.done()
}

#[test]
fn a_purged_agent_leaves_a_debian_host_as_it_was() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("purging the agent from a Debian host: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = host(&bins, dir.path())?;
    let before = host.settings()?;
    host.protect(&appliance, "/boot")?;
    ensure!(host.settings()? != before, "protecting changed nothing that could be seen: {before}");
    let named = host.named()?;
    for wanted in ["local-premount/holdfast-agent", "/sys/fs/bpf/holdfast", "rules.d/60-holdfast-inside.rules"] {
        ensure!(named.contains(wanted), "{wanted} is not there while the agent is: {named}");
    }

    host.guest()?.sh("DEBIAN_FRONTEND=noninteractive apt-get purge -y holdfast-agent", PURGE_MAX)?;
    assert_eq!(host.named()?, "", "left behind");
    assert_eq!(host.settings()?, before, "not as it was");

    let log = host.guest()?.log_path().to_owned();
    let said = std::fs::read(&log)?.len();
    host.guest()?.reboot()?;
    assert_eq!(host.named()?, "", "back after a boot");
    assert_eq!(host.settings()?, before, "not as it was after a boot");
    let since = String::from_utf8_lossy(&std::fs::read(&log)?[said..]).into_owned();
    ensure!(!since.contains("holdfast-agent"), "the boot after the purge speaks of the agent: {since}");
    host.guest.take().context("the host is switched off")?.shut_down()?;
    appliance.stop()?;
    dir.done()
}
