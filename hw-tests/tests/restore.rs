//! A machine gets its disk back: `holdfast-agent rescue` in a busybox initramfs, the command line on the box, a real disk in between.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    disk::check_ext4,
    guest::{Guest, Initramfs, Kernel},
    image::ImageDisk,
    line::Line,
    process::{self, Finished, wait_for},
    product::{Appliance, At, Binaries},
    skip, tools,
};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const GROUP: &str = "db1";
const BYTES: u64 = 48 << 20;
const LARGER: u64 = 64 << 20;
const STEP_MAX: Duration = Duration::from_secs(240);
const NETWORK: [&str; 4] = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"];

fn drive(dir: &Path, name: &str, bytes: u64) -> Result<(PathBuf, [String; 2])> {
    let file = dir.join(name);
    File::create(&file)?.set_len(bytes)?;
    let drive = format!("file={},if=virtio,format=raw,cache=writeback", file.display());
    Ok((file, ["-drive".to_owned(), drive]))
}

/// What a disk's file must be: the view's content, and behind it nothing that was written.
fn is_the_view(appliance: &Appliance, disk: &Path, at: &At) -> Result<()> {
    let view = appliance.view(GROUP, at)?;
    let mut client = view.only()?.connect()?;
    let disk = File::open(disk)?;
    let (mut have, mut want) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..BYTES).step_by(1 << 20) {
        disk.read_exact_at(&mut have, offset)?;
        client.read(offset, &mut want)?;
        let differs = (0..have.len()).find(|i| have[*i] != want[*i]);
        ensure!(differs.is_none(), "the disk differs from the view at byte {}", offset + differs.unwrap_or(0) as u64);
    }
    for offset in (BYTES..LARGER).step_by(1 << 20) {
        disk.read_exact_at(&mut have, offset)?;
        ensure!(have.iter().all(|b| *b == 0), "something was written behind the volume");
    }
    drop(client);
    view.close()
}

struct Rescue {
    guest: Guest,
    line: Line,
}

impl Rescue {
    /// The token is used the first time; a started-again agent finds its identity.
    fn start(&mut self, token: &str, more: &str) -> Result<()> {
        let port = self.line.at().port();
        let line = format!(
            "/programs/holdfast-agent rescue --box 10.0.2.2:{port} --token {token} --name metal {more} >>/tmp/rescue.out 2>&1 & echo $! >/tmp/rescue.pid"
        );
        self.guest.sh(&line, STEP_MAX).map(drop)
    }
    fn kill(&mut self) -> Result<()> {
        self.guest.sh("p=$(cat /tmp/rescue.pid); kill -9 $p; wait $p; true", STEP_MAX).map(drop)
    }
    fn said(&mut self) -> String {
        self.guest.sh("cat /tmp/rescue.out", STEP_MAX).unwrap_or_default()
    }
}

fn wait_target(appliance: &Appliance) -> Result<Value> {
    wait_for("the machine to wait", STEP_MAX, || {
        let targets = appliance.control().get("/restore-targets")?;
        Ok(targets.as_array().into_iter().flatten().find(|t| t["name"] == "metal").cloned())
    })
}

fn restore(appliance: &Appliance, at: &str, disk: &str, more: &[&str]) -> Result<Finished> {
    let args = [&["restore", GROUP, "--at", at, "--to", "metal", "--disk", disk], more].concat();
    process::run(appliance.cli(&args), STEP_MAX)
}

fn status(appliance: &Appliance, id: &str) -> Result<Value> {
    appliance.control().get(&format!("/restores/{id}"))
}
fn wait_phase(appliance: &Appliance, id: &str, phases: &[&str]) -> Result<Value> {
    wait_for(&format!("restore {id} to be {phases:?}"), STEP_MAX, || {
        let status = status(appliance, id)?;
        let is = status["phase"]["is"].as_str().unwrap_or_default().to_owned();
        ensure!(is != "failed" || phases.contains(&"failed"), "{status}");
        Ok(phases.contains(&is.as_str()).then_some(status))
    })
}

#[test]
fn a_machine_gets_its_disk_back_through_an_initramfs() -> Result<()> {
    let cache = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let kernel = match Kernel::debian("linux-image-amd64", &cache) {
        Ok(kernel) => kernel,
        Err(e) => {
            skip(format!("a restore in a guest: the kernel could not be had: {e:#}"));
            return Ok(());
        }
    };
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start_with(&bins, &dir.path().join("box"), "heartbeat_timeout_ms = 20000\n")?;
    appliance.create_ingest(GROUP, &[("disk", BYTES)])?;
    let mut image = ImageDisk::create(dir.path(), BYTES, 91)?;
    for _ in 0..20 {
        image.change()?;
    }
    image.send(&mut appliance.ingest_target(GROUP, "disk")?.connect()?)?;
    let first = appliance.bookmark(GROUP, "first")?;
    image.change()?;
    let changed = image.send(&mut appliance.ingest_target(GROUP, "disk")?.connect()?)?;
    let second = appliance.bookmark(GROUP, "second")?;

    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.program(&bins.agent)?;
    let (large, large_args) = drive(dir.path(), "large", LARGER)?;
    let (small, small_args) = drive(dir.path(), "small", BYTES - 512)?;
    let args: Vec<&str> = NETWORK.into_iter().chain(large_args.iter().chain(&small_args).map(String::as_str)).collect();
    let guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &args)?;
    let mut rescue = Rescue { guest, line: Line::to(appliance.listen())? };
    rescue.start(&appliance.token()?, "--no-reboot")?;
    let target = wait_target(&appliance).with_context(|| rescue.said())?;
    ensure!(target["disks"].as_array().is_some_and(|d| d.iter().any(|d| d["path"] == "/dev/vda")), "{target}");
    let shown = appliance.run_cli(&["restore", "targets"])?.stdout;
    ensure!(shown.contains("/dev/vda") && shown.contains("nothing that is known"), "{shown}");

    // What cannot be is refused before anything is written, with what to do.
    let refused = |at: &str, disk: &str, more: &[&str], says: &str| -> Result<()> {
        let done = restore(&appliance, at, disk, more)?;
        ensure!(!done.status.success(), "{disk} was taken");
        ensure!(done.stderr.contains(says), "{says:?} is not in {:?}", done.stderr);
        Ok(())
    };
    refused("first", "disk=/dev/vda", &[], "--yes")?;
    refused("first", "disk=/dev/vdb", &["--yes"], "are needed")?;
    refused("first", "disk=/dev/vdq", &["--yes"], "no disk")?;

    let done = restore(&appliance, "first", "disk=/dev/vda", &["--yes"])?;
    ensure!(done.status.success(), "{}{}{}", done.stdout, done.stderr, rescue.said());
    println!("{}", done.stdout.trim());
    is_the_view(&appliance, &large, &At::Lsn(first.lsn))?;
    check_ext4(&large, false)?;
    ensure!(fs::read(&small)?.iter().all(|b| *b == 0), "the other disk was written");

    // In use: refused, and let go afterwards it is not.
    rescue.guest.sh("mount -t ext4 -o ro,noload /dev/vda /mnt", STEP_MAX)?;
    wait_for("the machine to say so", STEP_MAX, || {
        let target = wait_target(&appliance)?;
        Ok((target["disks"][0]["in_use"] == "mounted at /mnt").then_some(()))
    })?;
    refused("first", "disk=/dev/vda", &["--yes"], "mounted at /mnt")?;
    rescue.guest.sh("umount /mnt", STEP_MAX)?;
    wait_for("the machine to say so", STEP_MAX, || {
        Ok(wait_target(&appliance)?["disks"][0]["in_use"].is_null().then_some(()))
    })?;

    // A later moment: the difference is shipped, through kills of agent and box and a cut line.
    let group = appliance.group(GROUP)?["id"].clone();
    let wish = json!({
        "id": "0000beef",
        "target": "metal",
        "from": [{ "branch": { "group": group } }],
        "disks": [{ "group": group, "volume": 0, "path": "/dev/vda" }],
    });
    appliance.control().post("/restores", &wish)?;
    wait_phase(&appliance, "0000beef", &["copying", "following"])?;
    rescue.kill()?;
    wait_phase(&appliance, "0000beef", &["waiting"])?;
    rescue.start("used", "--no-reboot")?;
    wait_phase(&appliance, "0000beef", &["copying", "following"]).with_context(|| rescue.said())?;
    appliance.kill()?;
    appliance.run()?;
    wait_phase(&appliance, "0000beef", &["copying", "following"]).with_context(|| rescue.said())?;
    rescue.line.cut();
    wait_phase(&appliance, "0000beef", &["waiting"])?;
    rescue.line.mend();
    let following = wait_phase(&appliance, "0000beef", &["following"]).with_context(|| rescue.said())?;
    let sent = |s: &Value| s["shipped_bytes"].as_u64().unwrap_or(0) + s["zeroed_bytes"].as_u64().unwrap_or(0);
    println!("since the box was started again: {} bytes sent; {changed} had changed in all", sent(&following));
    // Written while it follows, then finished.
    image.change()?;
    let before = sent(&following);
    let more = image.send(&mut appliance.ingest_target(GROUP, "disk")?.connect()?)?;
    appliance.control().post("/restores/0000beef/finish", &json!({}))?;
    let done = wait_phase(&appliance, "0000beef", &["done"]).with_context(|| rescue.said())?;
    let shipped = sent(&done) - before;
    println!("shipped {shipped} bytes for {more} that changed: {:.2}", shipped as f64 / more as f64);
    ensure!(shipped <= more * 2, "{shipped} bytes were shipped for {more}");
    let third = appliance.bookmark(GROUP, "third")?;
    is_the_view(&appliance, &large, &At::Lsn(third.lsn))?;
    check_ext4(&large, false)?;
    appliance.control().post("/restores/0000beef/release", &json!({ "reboot": false }))?;
    wait_phase(&appliance, "0000beef", &["released"])?;

    // Back to an older moment; and now the machine is started anew, for it was told to.
    rescue.kill()?;
    rescue.start("used", "")?;
    wait_for("the machine to be back", STEP_MAX, || {
        let done = restore(&appliance, "second", "disk=/dev/vda", &["--yes", "--reboot"])?;
        Ok(done.status.success().then_some(()))
    })?;
    rescue.guest.wait_end(STEP_MAX)?;
    is_the_view(&appliance, &large, &At::Lsn(second.lsn))?;
    appliance.stop()?;
    dir.done()
}

/// The medium that `cargo xtask rescue` makes, as it is for a machine with drives and a card that no virtual machine is made for.
#[test]
fn a_machine_boots_the_rescue_medium_by_uefi_and_gets_its_disk_back() -> Result<()> {
    let cache = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    if let Err(e) = Kernel::debian("linux-image-amd64", &cache) {
        skip(format!("the rescue medium: the kernel could not be had: {e:#}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start_with(&bins, &dir.path().join("box"), "heartbeat_timeout_ms = 20000\n")?;
    appliance.create_ingest(GROUP, &[("disk", BYTES)])?;
    let mut image = ImageDisk::create(dir.path(), BYTES, 92)?;
    for _ in 0..20 {
        image.change()?;
    }
    image.send(&mut appliance.ingest_target(GROUP, "disk")?.connect()?)?;
    let moment = appliance.bookmark(GROUP, "moment")?;

    let medium = dir.path().join("rescue.iso");
    let at = format!("10.0.2.2:{}", appliance.listen().port());
    let mut make = Command::new(bins.beside("xtask")?);
    make.args(["rescue", "--built", "--name", "metal", "--box", &at, "--token", &appliance.token()?, "--out"]);
    make.arg(&medium);
    process::run(make, STEP_MAX)?.ok()?;
    let disk = dir.path().join("metal");
    File::create(&disk)?.set_len(LARGER)?;
    let drive = format!("file={},if=none,id=disk,format=raw,cache=writeback", disk.display());
    let medium = medium.display().to_string();
    let args = [
        &["-bios", tools::OVMF, "-no-reboot", "-cdrom", &medium, "-drive", &drive][..],
        &[
            "-device",
            "nvme,drive=disk,serial=metal1",
            "-netdev",
            "user,id=net",
            "-device",
            "e1000e,netdev=net,romfile=",
        ],
    ]
    .concat();
    let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    let guest = Guest::switch_on(&dir.path().join("guest"), &args)?;
    let target = wait_target(&appliance).with_context(|| format!("see {}", guest.log_path().display()))?;
    ensure!(target["disks"].as_array().is_some_and(|d| d.len() == 1), "the medium itself is no disk: {target}");
    let done = restore(&appliance, "moment", "disk=/dev/nvme0n1", &["--yes", "--reboot"])?;
    ensure!(done.status.success(), "{}{}", done.stdout, done.stderr);
    guest.wait_end(STEP_MAX)?;
    is_the_view(&appliance, &disk, &At::Lsn(moment.lsn))?;
    check_ext4(&disk, false)?;
    appliance.stop()?;
    dir.done()
}
