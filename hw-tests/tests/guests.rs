//! Real kernels: what a guest writes, the box has, and opens as it was.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    disk::{self, check_ext4},
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
    let dir = Scratch::new()?;
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
    appliance.stop()?;
    dir.done()
}

#[test]
fn a_guests_kernel_reaches_the_box_over_tls_with_qemus_help() -> Result<()> {
    let dir = Scratch::new()?;
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
    appliance.stop()?;
    dir.done()
}

#[test]
fn a_running_machines_disk_mirrored_by_qemu_is_identical() -> Result<()> {
    let dir = Scratch::new()?;
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
    appliance.stop()?;
    dir.done()
}

const AGENT: &str = "/programs/holdfast-agent --config /etc/agent.toml";
/// Rewrites eight files, each synced. With pauses: an agent leaves a host that is stalled by its disk all the time in peace.
const WRITER: &str = "while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/mnt/f$((i%8)) bs=16k count=8 conv=fsync 2>/dev/null; i=$((i+1)); usleep 300000; done";

/// A host in a guest: its disk, a second one for the agent's state, and what it boots with.
struct Host {
    kernel: Kernel,
    initramfs: Initramfs,
    dir: PathBuf,
    disk: PathBuf,
    state: PathBuf,
}

impl Host {
    fn new(bins: &Binaries, dir: &Path) -> Result<Self> {
        let kernel = kernel()?;
        let mut initramfs = Initramfs::new(&kernel)?;
        initramfs.program(&tools::need("mke2fs")?)?;
        initramfs.program(&bins.agent)?;
        initramfs.file("etc/agent.toml", 0o600, b"state_dir = \"/var/agent\"\ncopy = \"whole\"\n".to_vec());
        let (disk, state) = (dir.join("disk.img"), dir.join("state.img"));
        for file in [&disk, &state] {
            fs::File::create(file)?.set_len(DISK_BYTES)?;
        }
        Ok(Self { kernel, initramfs, dir: dir.join("guest"), disk, state })
    }

    /// Power on, up to where the agent could be started.
    fn boot(&self) -> Result<Guest> {
        let drive = |file: &Path| format!("file={},if=virtio,format=raw,cache=writeback", file.display());
        let drives = [drive(&self.disk), drive(&self.state)];
        let args = [&NETWORK[..], &["-drive", &drives[0], "-drive", &drives[1]]].concat();
        let mut guest = Guest::boot(&self.kernel, &self.initramfs, &self.dir, &args)?;
        guest.sh("mkdir -p /var/agent && (mount /dev/vdb /var/agent || (/programs/mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /var/agent))", STEP_MAX)?;
        guest.sh("mount /dev/vda /mnt || (/programs/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt)", STEP_MAX)?;
        Ok(guest)
    }

    fn start_agent(&self, guest: &mut Guest) -> Result<()> {
        guest.sh("rm -f /var/agent/agent.sock", STEP_MAX)?;
        guest.sh(&format!("{AGENT} run >/dev/ttyS0 2>&1 &"), STEP_MAX)?;
        guest.sh("n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -S /var/agent/agent.sock ]", STEP_MAX)?;
        Ok(())
    }

    fn start_writer(&self, guest: &mut Guest) -> Result<()> {
        guest
            .sh(&format!("rm -f /tmp/stop /tmp/stopped; ({WRITER}; touch /tmp/stopped) >/dev/null 2>&1 &"), STEP_MAX)
            .map(drop)
    }

    /// Ends the writer and brings the disk to rest.
    fn rest(&self, guest: &mut Guest) -> Result<()> {
        guest
            .sh("touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 1; done; umount /mnt; sync", STEP_MAX)
            .map(drop)
    }
}

fn wait_connected(appliance: &Appliance) -> Result<()> {
    process::wait_for("the agent to reach the box", STEP_MAX, || {
        let hosts = appliance.control().get("/hosts")?;
        Ok(hosts.as_array().into_iter().flatten().any(|h| h["connected"] == true).then_some(()))
    })
}

fn assert_identical(appliance: &Appliance, group: &str, at: &At, disk: &Path) -> Result<()> {
    let view = appliance.view(group, at)?;
    let difference = compare::export_with_file(&mut view.only()?.connect()?, disk)?;
    assert_eq!(difference.map(|d| d.to_string()), None, "{at}: the box has not what the disk has");
    view.close()
}

#[test]
fn the_agent_captures_a_disk_under_debians_kernel_and_a_power_cut_of_the_host_costs_no_history() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let host = Host::new(&bins, dir.path())?;

    let mut guest = host.boot()?;
    let (token, port) = (appliance.token()?, appliance.listen().port());
    guest.sh(&format!("{AGENT} enrol --box {HOST}:{port} --token {token}"), STEP_MAX)?;
    host.start_agent(&mut guest)?;
    wait_connected(&appliance)?;
    guest.sh(&format!("{AGENT} protect /dev/vda --group guest"), STEP_MAX)?;
    host.start_writer(&mut guest)?;
    appliance
        .wait_state("guest", "replicating", SYNC_MAX)
        .with_context(|| format!("see {}", guest.log_path().display()))?;
    appliance.bookmark("guest", "running")?;
    host.rest(&mut guest)?;
    let rest = appliance.bookmark("guest", "rest")?;
    let at_rest = dir.path().join("rest.img");
    disk::copy_sparse(&host.disk, &at_rest)?;
    assert_identical(&appliance, "guest", &At::Lsn(rest.lsn), &at_rest)?;
    let image = dir.path().join("opened.img");
    opened(&appliance, "guest", &At::Bookmark("running".into()), &image)?;
    check_ext4(&image, true).context("a moment while the guest wrote")?;

    guest.sh("mount /dev/vda /mnt", STEP_MAX)?;
    host.start_writer(&mut guest)?;
    guest.sh("sleep 2", STEP_MAX)?;
    guest.power_off()?;
    // Mounting replays the journal and changes the disk before the agent is there to see it.
    let mut guest = host.boot()?;
    host.start_agent(&mut guest)?;
    wait_connected(&appliance)?;
    host.start_writer(&mut guest)?;
    let back = |g: &serde_json::Value| g["state"] == "replicating" && g["lag_ms"].is_u64();
    process::wait_for("the group to be in step again", SYNC_MAX, || Ok(back(&appliance.group("guest")?).then_some(())))
        .with_context(|| format!("see {}", guest.log_path().display()))?;
    host.rest(&mut guest)?;
    let end = appliance.bookmark("guest", "end")?;
    guest.power_off()?;
    assert_identical(&appliance, "guest", &At::Lsn(end.lsn), &host.disk)?;
    assert_identical(&appliance, "guest", &At::Bookmark("rest".into()), &at_rest)?;
    appliance.stop()?;
    dir.done()
}
