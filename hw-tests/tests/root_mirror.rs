//! A Debian host whose root file system, on a logical volume, is at a mirror: the agent serves the writes of the very volume that it, its state, the
//! journal and the swap live on. Whatever becomes of the agent and of the box, the host goes on.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    debian::{DebianImage, Options, Profile, host::Host, install},
    disk::check_ext4,
    load::{self, BLOCK, SLOTS},
    process::call,
    product::{Appliance, At, Binaries},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const GROUP: &str = "root";
const SEED: u64 = 20_261_130;
/// Where the guest finds its writer.
const LOAD: &str = "/usr/local/bin/guest-load";
/// What the agent may take, locked in memory as it is.
const RSS_KIB_MAX: u64 = 64 << 10;
/// An emulated machine that swaps.
const PRESSED_MAX: Duration = Duration::from_secs(600);
const COPY_MAX: Duration = Duration::from_secs(120);

/// A Debian on LVM with the writer on a second disk, and a third serial line that is a file here.
fn host(bins: &Binaries, dir: &Path, said: &Path) -> Result<Host> {
    let program = bins.agent.with_file_name("guest-load");
    let bytes = fs::metadata(&program)?.len();
    let disk = dir.join("programs.raw");
    fs::copy(&program, &disk)?;
    fs::File::options().write(true).open(&disk)?.set_len(bytes.next_multiple_of(1 << 20))?;
    let args = [
        "-chardev".to_owned(),
        format!("file,id=said,append=on,path={}", said.display()),
        "-serial".to_owned(),
        "chardev:said".to_owned(),
    ];
    let options = Options { disks: vec![disk], args: args.into(), ..Options::default() };
    let mut host = Host::new(bins, dir, Profile::LVM, options)?;
    host.sh(&format!("head -c {bytes} /dev/vdb >{LOAD} && chmod 755 {LOAD} && sync"))?;
    // As the agent's refusal says where the module is not there.
    host.sh("modprobe nbd && echo nbd >/etc/modules-load.d/holdfast-agent.conf")?;
    Ok(host)
}

/// What these tests do with it.
trait Tried {
    fn table(&mut self) -> Result<String>;
    fn writes_during(&mut self, seconds: u64) -> Result<()>;
    fn writes(&mut self) -> Result<Value>;
    fn in_sync(&mut self) -> Result<Value>;
    fn signal(&mut self, signal: &str) -> Result<()>;
    fn nothing_is_left(&mut self) -> Result<()>;
}

impl Tried for Host {
    fn table(&mut self) -> Result<String> {
        self.sh("dmsetup table vg-root").map(|t| t.trim().to_owned())
    }

    /// Writes and syncs on the root file system for so long.
    fn writes_during(&mut self, seconds: u64) -> Result<()> {
        self.sh(&format!(
            "rm -f /run/writes.done; ({LOAD} stall /srv/stall {seconds} >/run/writes 2>&1; touch /run/writes.done) >/dev/null 2>&1 &"
        ))
        .map(drop)
    }

    /// What became of that: no write may have failed, and they went on.
    fn writes(&mut self) -> Result<Value> {
        let text = self.sh("while ! [ -e /run/writes.done ]; do sleep 1; done; cat /run/writes")?;
        let said: Value = serde_json::from_str(&text).with_context(|| format!("guest-load said {text:?}"))?;
        ensure!(said["errors"] == 0 && said["writes"].as_u64() > Some(1), "{said}");
        Ok(said)
    }

    fn in_sync(&mut self) -> Result<Value> {
        self.wait_group("the host's writes to wait for the box", |g| g["state"] == "replicating" && g["gate"] == "sync")
    }

    fn signal(&mut self, signal: &str) -> Result<()> {
        self.sh(&format!("systemctl kill --kill-who=main --signal={signal} holdfast-agent")).map(drop)
    }

    /// No device of ours, no leg, and nothing in the kernel that watches.
    fn nothing_is_left(&mut self) -> Result<()> {
        let left = self.sh("dmsetup ls; cat /sys/block/nbd*/pid 2>/dev/null; ls /sys/fs/bpf | grep holdfast; true")?;
        ensure!(left.lines().filter(|l| !l.trim().is_empty()).count() == 1, "more is left than the volume: {left}");
        Ok(())
    }
}

/// Which write the host was last told is done.
fn acknowledged(said: &Path) -> Result<u64> {
    let text = fs::read_to_string(said)?;
    // The last line may be under way.
    let whole = text.split_inclusive('\n').rfind(|l| l.ends_with('\n') && l.starts_with(&SEED.to_string()));
    let line = whole.context("no write was acknowledged")?;
    line.trim().split(' ').nth(1).and_then(|n| n.parse().ok()).with_context(|| format!("line {line:?}"))
}

/// What a file of the root file system holds on the box, and that the file system is what a power cut would leave.
fn on_the_box(appliance: &Appliance, dir: &Path, file: &str) -> Result<Vec<u8>> {
    let image = dir.join("box.img");
    let view = appliance.view(GROUP, &At::Latest)?;
    view.only()?.connect()?.copy_to(&image)?;
    view.close()?;
    check_ext4(&image, true)?;
    let out = dir.join("box.file");
    let ask = format!("dump {file} {}", out.display());
    call("debugfs", &["-R", &ask, &image.to_string_lossy()], COPY_MAX)?;
    Ok(fs::read(out)?)
}

#[test]
fn a_root_volume_is_mirrored_live_and_nothing_of_ours_can_hold_its_host() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a root volume at a mirror: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let said: PathBuf = dir.path().join("said");
    let mut host = host(&bins, dir.path(), &said)?;
    let root = install::root(&host.disk)?;
    let plain = host.table()?;
    host.join(&appliance)?;
    let refused = host.sh("! holdfast-agent protect --sync=strict / --group no")?;
    ensure!(refused.contains("holds the root file system: under the strict policy"), "{refused}");

    // In, under the root with a writer; the copy takes the rest of the time.
    host.writes_during(20)?;
    host.sh(&format!("holdfast-agent protect --sync --wait-ms 2000 / --group {GROUP}"))?;
    ensure!(host.table()?.contains("mirror core"), "{}", host.table()?);
    println!("put in under a writer: {}", host.writes()?);
    let group = host.in_sync()?;
    ensure!(group["spool_note"].as_str().is_some_and(|n| n.contains("writes wait for the box")), "{group}");
    host.assert_identical(&appliance, GROUP, root)?;

    // The journal, the agent's state and its own program are on it, and now the swap is too: more is written than there is memory.
    host.sh("dd if=/dev/zero of=/srv/swap bs=1M count=96 2>/dev/null && chmod 600 /srv/swap && mkswap -q /srv/swap && swapon /srv/swap")?;
    host.writes_during(30)?;
    let free = host.sh("awk '/^MemAvailable/ {print $2}' /proc/meminfo")?;
    let kib: u64 = free.trim().parse()?;
    let hold = kib + (24 << 10);
    let press = format!(
        "mount -o remount,size=90% /dev/shm && head -c {hold}K /dev/urandom >/dev/shm/hold; dd if=/dev/zero of=/srv/again bs=1M count=64 2>/dev/null; sync"
    );
    host.guest()?.sh(&press, PRESSED_MAX)?;
    let swapped = host.sh("awk '/^pswpout/ {print $2}' /proc/vmstat")?;
    ensure!(swapped.trim().parse::<u64>()? > 1000, "hardly anything was swapped out: {swapped}");
    println!("short of memory, {} pages swapped out: {}", swapped.trim(), host.writes()?);
    host.sh("rm /dev/shm/hold && swapoff /srv/swap && rm /srv/swap /srv/again")?;
    let memory = host.sh("grep -E 'VmHWM|VmRSS|VmLck' /proc/$(systemctl show -P MainPID holdfast-agent)/status")?;
    println!("the agent: {}", memory.split_whitespace().collect::<Vec<_>>().join(" "));
    let resident =
        memory.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    ensure!(resident.is_some_and(|kib| kib <= RSS_KIB_MAX), "the agent takes more than {RSS_KIB_MAX} KiB: {memory}");
    host.in_sync()?;

    // Killed, and started again by systemd from the very volume; stopped; the box hangs.
    for signal in ["KILL", "STOP"] {
        host.writes_during(12)?;
        host.sh("sleep 2")?;
        host.signal(signal)?;
        println!("agent {signal}: {}", host.writes()?);
        if signal == "STOP" {
            let status = host.sh("dmsetup status vg-root")?;
            ensure!(!status.contains(" 1 AA "), "the leg of a stopped agent is in: {status}");
            host.signal("KILL")?;
        }
        let back = host.in_sync()?;
        assert_eq!(back["compared_whole"], "", "{signal}: what was written meanwhile was not known");
        host.assert_identical(&appliance, GROUP, root)?;
    }
    host.writes_during(12)?;
    appliance.program()?.signal(libc::SIGSTOP)?;
    println!("box stopped: {}", host.writes()?);
    appliance.program()?.signal(libc::SIGCONT)?;
    host.in_sync()?;

    // The power goes: what the host was told is written, the box has.
    host.sh(&format!(
        "dd if=/dev/zero of=/srv/acks bs=4k count={SLOTS} conv=fsync 2>/dev/null && stty -F /dev/ttyS2 raw -echo"
    ))?;
    host.sh(&format!("({LOAD} acks /srv/acks 0 {SEED} /dev/ttyS2 >/run/acks 2>&1 &)"))?;
    host.sh("sleep 4")?;
    host.guest.take().context("the host is switched off")?.power_off_hard()?;
    let promised = acknowledged(&said)?;
    let area = on_the_box(&appliance, dir.path(), "/srv/acks")?;
    ensure!(area.len() as u64 == SLOTS * BLOCK as u64, "the file has {} bytes on the box", area.len());
    let held = load::writes_in(SEED, &area)?;
    println!("power cut: {promised} writes were acknowledged, {held} are on the box");
    ensure!(held >= promised, "the host was told that write {promised} is done, the box has {held}");

    // It boots from its own table, and is mirrored again without anybody's hand.
    host.power_on()?;
    let again = host.in_sync()?;
    ensure!(host.table()?.contains("mirror core"), "{again}");
    host.assert_identical(&appliance, GROUP, root)?;

    // Out, under a writer: nothing is left.
    host.writes_during(6)?;
    host.sh(&format!("holdfast-agent unprotect {GROUP}"))?;
    println!("taken out under a writer: {}", host.writes()?);
    assert_eq!(host.table()?, plain);
    host.nothing_is_left()?;
    host.guest.take().context("the host is switched off")?.shut_down()?;
    appliance.stop()?;
    dir.done()
}

/// Where the kernel lets no BPF program read its memory, now and at every boot.
fn lock_down(host: &mut Host) -> Result<()> {
    host.sh("sed -i 's/^linux .*/& lockdown=confidentiality/' /boot/grub/grub.cfg && sync")?;
    host.sh("echo confidentiality >/sys/kernel/security/lockdown")?;
    locked_down(host)
}

fn locked_down(host: &mut Host) -> Result<()> {
    let said = host.sh("cat /sys/kernel/security/lockdown")?;
    ensure!(said.contains("[confidentiality]"), "the kernel is not locked down: {said}");
    Ok(())
}

/// The host waits for nobody, and each of its writes passes through an agent that lives on the very volume.
#[test]
fn a_root_volume_is_captured_at_a_mirror_where_bpf_is_refused() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a root volume at a mirror where BPF is refused: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = host(&bins, dir.path(), &dir.path().join("said"))?;
    let root = install::root(&host.disk)?;
    let plain = host.table()?;
    lock_down(&mut host)?;
    host.join(&appliance)?;
    let captured = |host: &mut Host| {
        host.wait_group("capture at a mirror", |g| g["state"] == "replicating" && g["gate"] == "async")
    };

    host.writes_during(20)?;
    host.sh(&format!("holdfast-agent protect / --group {GROUP}"))?;
    ensure!(host.table()?.contains("mirror core"), "{}", host.table()?);
    println!("put in under a writer: {}", host.writes()?);
    captured(&mut host)?;
    host.assert_identical(&appliance, GROUP, root)?;

    // The box hangs: nobody waits for it.
    host.writes_during(12)?;
    appliance.program()?.signal(libc::SIGSTOP)?;
    println!("box stopped: {}", host.writes()?);
    appliance.program()?.signal(libc::SIGCONT)?;
    captured(&mut host)?;

    // The agent is killed, and started again by systemd from the very volume: nobody could mark what was written meanwhile.
    host.writes_during(12)?;
    host.sh("sleep 2")?;
    host.signal("KILL")?;
    println!("agent KILL: {}", host.writes()?);
    let back = captured(&mut host)?;
    ensure!(back["compared_whole"].as_str().is_some_and(|t| t.contains("everything is compared")), "{back}");
    host.assert_identical(&appliance, GROUP, root)?;

    // The power goes while somebody writes. It boots from its own table and is captured again by itself.
    host.writes_during(60)?;
    host.sh("sleep 3")?;
    host.guest.take().context("the host is switched off")?.power_off_hard()?;
    host.power_on()?;
    locked_down(&mut host)?;
    captured(&mut host)?;
    ensure!(host.table()?.contains("mirror core"), "{}", host.table()?);
    host.assert_identical(&appliance, GROUP, root)?;

    // Out, under a writer: nothing is left.
    host.writes_during(6)?;
    host.sh(&format!("holdfast-agent unprotect {GROUP}"))?;
    println!("taken out under a writer: {}", host.writes()?);
    assert_eq!(host.table()?, plain);
    host.nothing_is_left()?;
    host.guest.take().context("the host is switched off")?.shut_down()?;
    appliance.stop()?;
    dir.done()
}
