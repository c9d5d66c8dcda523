//! Real kernels: what a guest writes, the box has, and opens as it was.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    compare,
    disk::check_ext4,
    guest::{Bridge, Guest, Initramfs, Kernel},
    process,
    product::{Appliance, At, Binaries},
    tools,
};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const DISK_BYTES: u64 = 48 << 20;
/// For one command in an emulated guest.
const STEP_MAX: Duration = Duration::from_secs(120);
const SYNC_MAX: Duration = Duration::from_secs(120);
/// A guest's way to this machine's loopback.
const HOST: &str = "10.0.2.2";
const NETWORK: [&str; 4] = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"];

fn kernel() -> Result<Kernel> {
    Kernel::debian("linux-image-amd64", &PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest"))
}

/// A view's content as a file.
fn opened(appliance: &Appliance, group: &str, at: &At, to: &Path) -> Result<()> {
    let view = appliance.view(group, at).with_context(|| format!("open {at}"))?;
    view.only()?.connect()?.copy_to(to)?;
    view.close()
}

fn file_in(image: &Path, name: &str) -> Result<String> {
    Ok(process::call("debugfs", &["-R", &format!("cat /{name}"), &image.to_string_lossy()], STEP_MAX)?.stdout)
}

#[test]
fn what_a_guests_kernel_writes_over_nbd_is_there_after_its_power_is_cut() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut appliance = Appliance::start(&Binaries::beside_us()?, &dir.path().join("box"))?;
    appliance.create_ingest("vm", &[("disk", DISK_BYTES)])?;
    let target = appliance.ingest_target("vm", "disk")?;
    // Debian's nbd-client speaks TLS 1.2 at most, the box 1.3 at least: the guest comes through a tunnel.
    let bridge = Bridge::to(&target.unix_socket)?;

    let kernel = kernel()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.module(&kernel, "nbd")?;
    initramfs.program(&tools::need("nbd-client")?)?;
    initramfs.program(&tools::need("mke2fs")?)?;
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &NETWORK)?;
    guest.sh(
        &format!("/programs/nbd-client -name {} {HOST} {} /dev/nbd0", target.export_name, bridge.port()),
        STEP_MAX,
    )?;
    guest.sh("/programs/mke2fs -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt", STEP_MAX)?;
    guest.sh("echo one > /mnt/one && sync", STEP_MAX)?;
    appliance.bookmark("vm", "one")?;
    guest.sh("rm /mnt/one && echo two > /mnt/two && sync && umount /mnt", STEP_MAX)?;
    let two = appliance.bookmark("vm", "two")?;
    let read_back = guest.sh("md5sum /dev/nbd0 | cut -d ' ' -f 1", STEP_MAX)?;
    guest.sh("mount /dev/nbd0 /mnt && echo three > /mnt/three && sync && dd if=/dev/urandom of=/mnt/unsynced bs=64k count=64", STEP_MAX)?;
    guest.power_off()?;

    let image = dir.path().join("opened.img");
    opened(&appliance, "vm", &At::Bookmark("one".into()), &image)?;
    check_ext4(&image, true)?;
    assert_eq!(file_in(&image, "one")?, "one\n");
    opened(&appliance, "vm", &At::Lsn(two.lsn), &image)?;
    check_ext4(&image, false)?;
    let md5 = process::call("md5sum", &[&image.to_string_lossy()], STEP_MAX)?.stdout;
    assert_eq!(md5.split_whitespace().next(), Some(read_back.trim()), "the view is not what the guest read back");
    assert_eq!((file_in(&image, "one")?.as_str(), file_in(&image, "two")?.as_str()), ("", "two\n"));
    opened(&appliance, "vm", &At::Latest, &image)?;
    check_ext4(&image, true)?;
    assert_eq!(file_in(&image, "three")?, "three\n", "what was synced before the power went is there");
    appliance.stop()
}

#[test]
fn a_guests_kernel_reaches_the_box_over_tls_with_qemus_help() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut appliance = Appliance::start(&Binaries::beside_us()?, &dir.path().join("box"))?;
    appliance.create_ingest("tls", &[("disk", DISK_BYTES)])?;
    let target = appliance.ingest_target("tls", "disk")?;
    let certificate = dir.path().join("certificate");
    appliance.client_certificate("guest", &certificate)?;

    let kernel = kernel()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.module(&kernel, "nbd")?;
    initramfs.program(&tools::need("qemu-nbd")?)?;
    initramfs.program(&tools::need("mke2fs")?)?;
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        initramfs.file(&format!("etc/nbd/{file}"), 0o600, fs::read(certificate.join(file))?);
    }
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &NETWORK)?;
    let disk = format!(
        "driver=nbd,host={HOST},port={},export={},tls-creds=tls,tls-hostname=holdfast-box",
        appliance.nbd_listen().port(),
        target.export_name
    );
    let credentials = "tls-creds-x509,id=tls,endpoint=client,dir=/etc/nbd";
    guest.sh(
        &format!("/programs/qemu-nbd --fork --connect=/dev/nbd0 --object {credentials} --image-opts {disk}"),
        STEP_MAX,
    )?;
    guest.sh(
        "/programs/mke2fs -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt && echo one > /mnt/one && umount /mnt",
        STEP_MAX,
    )?;
    let moment = appliance.bookmark("tls", "one")?;
    let read_back = guest.sh("md5sum /dev/nbd0 | cut -d ' ' -f 1", STEP_MAX)?;
    guest.power_off()?;

    let image = dir.path().join("opened.img");
    opened(&appliance, "tls", &At::Lsn(moment.lsn), &image)?;
    check_ext4(&image, false)?;
    let md5 = process::call("md5sum", &[&image.to_string_lossy()], STEP_MAX)?.stdout;
    assert_eq!(md5.split_whitespace().next(), Some(read_back.trim()), "the view is not what the guest read back");
    assert_eq!(file_in(&image, "one")?, "one\n");
    appliance.stop()
}

#[test]
fn a_running_machines_disk_mirrored_by_qemu_is_identical() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut appliance = Appliance::start(&Binaries::beside_us()?, &dir.path().join("box"))?;
    appliance.create_ingest("mirror", &[("disk", DISK_BYTES)])?;
    let target = appliance.ingest_target("mirror", "disk")?;
    let source = dir.path().join("source.img");
    fs::File::create(&source)?.set_len(DISK_BYTES)?;

    let kernel = kernel()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.program(&tools::need("mke2fs")?)?;
    let node = format!("driver=raw,node-name=source,file.driver=file,file.filename={}", source.display());
    let drive = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=source"];
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &drive)?;
    guest.sh("/programs/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt", STEP_MAX)?;
    let writer = "while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/mnt/f$((i%8)) bs=16k count=8 conv=fsync 2>/dev/null; i=$((i+1)); echo $i >/tmp/next; mv /tmp/next /tmp/count; done";
    guest.sh(&format!("({writer}; touch /tmp/stopped) >/dev/null 2>&1 &"), STEP_MAX)?;

    let server = json!({ "type": "unix", "path": target.unix_socket });
    let node = json!({ "driver": "nbd", "node-name": "target", "server": server, "export": target.export_name });
    guest.qmp.execute("blockdev-add", node)?;
    let job = json!({ "job-id": "mirror", "device": "source", "target": "target", "sync": "full", "copy-mode": "write-blocking" });
    guest.qmp.execute("blockdev-mirror", job)?;
    guest.qmp.event("the mirror to be in step", SYNC_MAX, |e| e["event"] == "BLOCK_JOB_READY")?;
    appliance.bookmark("mirror", "running")?;
    let count = |guest: &mut Guest| -> Result<u64> {
        Ok(guest.sh("cat /tmp/count 2>/dev/null || echo 0", STEP_MAX)?.trim().parse()?)
    };
    let before = count(&mut guest)?;
    process::wait_for("the guest to write on", STEP_MAX, || Ok((count(&mut guest)? > before + 5).then_some(())))?;
    guest.sh("touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 1; done; umount /mnt", STEP_MAX)?;
    guest.qmp.execute("block-job-cancel", json!({ "device": "mirror" }))?;
    let ended = guest.qmp.event("the mirror to end", SYNC_MAX, |e| {
        ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"].iter().any(|name| e["event"] == *name)
    })?;
    ensure!(ended["event"] == "BLOCK_JOB_COMPLETED" && ended["data"]["error"].is_null(), "the mirror failed: {ended}");
    let end = appliance.bookmark("mirror", "end")?;
    guest.power_off()?;

    let view = appliance.view("mirror", &At::Lsn(end.lsn))?;
    let difference = compare::export_with_file(&mut view.only()?.connect()?, &source)?;
    assert_eq!(difference.map(|d| d.to_string()), None, "the mirror differs from its source");
    view.close()?;
    let image = dir.path().join("opened.img");
    opened(&appliance, "mirror", &At::Bookmark("running".into()), &image)?;
    check_ext4(&image, true).context("a moment while the machine ran")?;
    appliance.stop()
}

#[test]
fn the_agent_captures_a_disk_under_debians_kernel() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let source = dir.path().join("source.img");
    fs::File::create(&source)?.set_len(DISK_BYTES)?;

    let kernel = kernel()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.program(&tools::need("mke2fs")?)?;
    initramfs.program(&bins.agent)?;
    initramfs.file("etc/agent.toml", 0o600, b"state_dir = \"/var/agent\"\n".to_vec());
    let drive = format!("file={},if=virtio,format=raw,cache=writeback", source.display());
    let args = [&NETWORK[..], &["-drive", &drive]].concat();
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &args)?;
    guest.sh("/programs/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt", STEP_MAX)?;
    let agent = "/programs/holdfast-agent --config /etc/agent.toml";
    let (token, port) = (appliance.token()?, appliance.listen().port());
    guest.sh(&format!("{agent} enrol --box {HOST}:{port} --token {token}"), STEP_MAX)?;
    guest.sh(&format!("{agent} run >/dev/ttyS0 2>&1 &"), STEP_MAX)?;
    guest.sh("n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done", STEP_MAX)?;
    guest.sh(&format!("{agent} protect /dev/vda --group guest"), STEP_MAX)?;
    let writer = "while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/mnt/f$((i%8)) bs=16k count=8 conv=fsync 2>/dev/null; i=$((i+1)); done";
    guest.sh(&format!("({writer}; touch /tmp/stopped) >/dev/null 2>&1 &"), STEP_MAX)?;
    appliance
        .wait_state("guest", "replicating", SYNC_MAX)
        .with_context(|| format!("see {}", guest.log_path().display()))?;
    appliance.bookmark("guest", "running")?;
    guest.sh("sleep 1; touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 1; done; umount /mnt; sync", STEP_MAX)?;
    let end = appliance.bookmark("guest", "end")?;
    guest.power_off()?;

    let view = appliance.view("guest", &At::Lsn(end.lsn))?;
    let difference = compare::export_with_file(&mut view.only()?.connect()?, &source)?;
    assert_eq!(difference.map(|d| d.to_string()), None, "the box has not what the disk has");
    view.close()?;
    let image = dir.path().join("opened.img");
    opened(&appliance, "guest", &At::Bookmark("running".into()), &image)?;
    check_ext4(&image, true).context("a moment while the guest wrote")?;
    appliance.stop()
}
