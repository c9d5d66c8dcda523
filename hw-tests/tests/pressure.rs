//! What only a whole kernel shows. A write past the block layer, which nobody can capture, is told to the box until a
//! resync. FUA, flushes, discards and zeroes of a disk that has them all are what the journal says. Other programs are held back by the kernel's
//! own limits, which end whatever the agent dies of.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    guest::{Guest, Initramfs, Kernel},
    process::wait_for,
    product::{Appliance, At, Binaries},
    tools,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const DISK_BYTES: u64 = 48 << 20;
const STEP_MAX: Duration = Duration::from_secs(120);
const HOST: &str = "10.0.2.2";
const GROUP: &str = "data";
const AGENT: &str = "/programs/holdfast-agent --config /etc/agent.toml";
/// Small buffers, so that a few MiB are a third of the spool.
const CONFIG: &[u8] =
    b"state_dir = \"/var/agent\"\nheed_pressure = false\nring_mib = 16\nmemory_mib = 32\nspool_memory_mib = 4\n\
spool_mib = 24\nprotect_rpo_mib_s = 1\nprotect_rpo_spool_percent = 20\n";

/// Another program, in a cgroup of its own: 8 MiB, not all at once, for what bursts is marked and not spooled.
const WORK: &str = "sh -c 'echo $$ >/sys/fs/cgroup/work/cgroup.procs; i=0; while [ $i -lt 8 ]; do dd if=/dev/urandom of=/dev/sda bs=64k \
count=16 seek=$((i*16)) conv=notrunc,fsync; i=$((i+1)); usleep 300000; done' 2>/dev/null";

struct Host {
    guest: Guest,
    disk: PathBuf,
}

impl Host {
    fn boot(bins: &Binaries, dir: &Path) -> Result<Self> {
        let cache = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
        let kernel = Kernel::debian("linux-image-amd64", &cache)?;
        let mut initramfs = Initramfs::new(&kernel)?;
        for module in ["virtio_scsi", "sd_mod"] {
            initramfs.module(&kernel, module)?;
        }
        initramfs.program(&tools::need("mke2fs")?)?;
        initramfs.program(&bins.agent)?;
        initramfs.program(Path::new(env!("CARGO_BIN_EXE_guest-load")))?;
        initramfs.file("etc/agent.toml", 0o600, CONFIG.to_vec());
        let (disk, state) = (dir.join("disk.img"), dir.join("state.img"));
        for file in [&disk, &state] {
            fs::File::create(file)?.set_len(DISK_BYTES)?;
        }
        let disk_arg = format!("file={},if=none,id=disk,format=raw,cache=writeback,discard=unmap", disk.display());
        let state_arg = format!("file={},if=virtio,format=raw,cache=writeback", state.display());
        let args = [
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net",
            "-drive",
            &disk_arg,
            "-device",
            "virtio-scsi-pci",
            "-device",
            "scsi-hd,drive=disk,dpofua=on",
            "-drive",
            &state_arg,
        ];
        let mut this = Self { guest: Guest::boot(&kernel, &initramfs, &dir.join("guest"), &args)?, disk };
        this.sh("n=0; while ! [ -b /dev/sda ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -b /dev/sda ]")?;
        this.sh("mkdir -p /var/agent && /programs/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /var/agent")?;
        this.sh("mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mkdir /sys/fs/cgroup/agent /sys/fs/cgroup/work")?;
        Ok(this)
    }

    fn sh(&mut self, line: &str) -> Result<String> {
        let log = self.guest.log_path().display().to_string();
        self.guest.sh(line, STEP_MAX).with_context(|| format!("see {log}"))
    }

    fn start_agent(&mut self, appliance: &Appliance) -> Result<()> {
        self.sh("rm -f /var/agent/agent.sock")?;
        // In a cgroup of its own, as systemd would start it.
        self.sh(&format!(
            "(sh -c 'echo $$ >/sys/fs/cgroup/agent/cgroup.procs; echo $$ >/tmp/agent; exec {AGENT} run' >/dev/ttyS0 2>&1 &)"
        ))?;
        self.sh("n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -S /var/agent/agent.sock ]")?;
        wait_for("the agent to reach the box", STEP_MAX, || {
            let hosts = appliance.control().get("/hosts")?;
            Ok(hosts.as_array().into_iter().flatten().any(|h| h["connected"] == true).then_some(()))
        })
    }

    fn limits(&mut self, cgroup: &str) -> Result<String> {
        self.sh(&format!("cat /sys/fs/cgroup/{cgroup}/io.max 2>/dev/null || true"))
    }

    fn wait_limited(&mut self, limited: bool) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("limits: {limited}"), STEP_MAX, || {
            last = self.limits("work")?;
            Ok((last.contains("wbps=1048576") == limited).then_some(()))
        })
        .with_context(|| format!("io.max says {last:?}; see {}", self.guest.log_path().display()))
    }

    /// Until the box holds what the disk does.
    fn wait_identical(&mut self, appliance: &Appliance) -> Result<()> {
        self.sh("sync; blockdev --flushbufs /dev/sda")?;
        let disk = self.disk.clone();
        wait_for("the box to hold what the disk does", STEP_MAX, || {
            if appliance.group(GROUP)?["state"] != "replicating" {
                return Ok(None);
            }
            let view = appliance.view(GROUP, &At::Latest)?;
            let same = compare::export_with_file(&mut view.only()?.connect()?, &disk)?.is_none();
            view.close()?;
            Ok(same.then_some(()))
        })
    }
}

/// What a disk is asked for besides data, on one that can do all of it.
fn flags(host: &mut Host) -> Result<()> {
    let queue = host.sh("cd /sys/block/sda/queue && cat fua discard_max_bytes write_zeroes_max_bytes")?;
    let can: Vec<&str> = queue.split_whitespace().collect();
    ensure!(can.len() == 3 && can.iter().all(|n| *n != "0"), "a disk with FUA, discard and write-zeroes: {queue:?}");
    host.sh("/programs/guest-load flags /dev/sda").map(drop)
}

/// The same in the journal, read with no daemon.
fn flags_arrived(records: &[Value]) -> Result<()> {
    let live = |r: &&Value| !r["what"].as_str().is_some_and(|w| w.contains("SYNC"));
    let live: Vec<&Value> = records.iter().filter(live).collect();
    let at = |kind: &str, mib: u64| live.iter().position(|r| r["kind"] == kind && r["lba"] == mib << 11);
    let fua = |i: usize| live[i]["what"].as_str().is_some_and(|w| w.contains("FUA"));
    let durable = at("write", 1).context("the durable write")?;
    ensure!(fua(durable), "{}", live[durable]);
    let plain = durable + live[durable..].iter().position(|r| r["lba"] == 2 << 11).context("the plain write")?;
    ensure!(!fua(plain) && live[plain]["kind"] == "write", "{}", live[plain]);
    ensure!(live[plain..].iter().any(|r| r["kind"] == "flush"), "no flush after it");
    for (kind, mib) in [("discard", 4), ("zero", 8)] {
        let inside = |r: &&&Value| r["kind"] == kind && r["lba"].as_u64().is_some_and(|s| s >> 11 == mib);
        let sectors: u64 = live.iter().filter(inside).filter_map(|r| r["sectors"].as_u64()).sum();
        ensure!(sectors == 2048, "{kind}: {sectors} sectors");
    }
    Ok(())
}

fn risk(group: &Value, kind: &str) -> Option<Value> {
    group["risks"].as_array().into_iter().flatten().find(|r| r["kind"] == kind).cloned()
}

/// How often an event is among the recent ones.
fn events(appliance: &Appliance, name: &str) -> Result<usize> {
    let status = appliance.control().get("/status")?;
    Ok(status["events"].as_array().into_iter().flatten().filter(|e| e["event"] == name).count())
}

#[test]
fn what_cannot_be_captured_is_told_and_a_throttle_always_ends() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let mut host = Host::boot(&bins, dir.path())?;
    let (token, port) = (appliance.token()?, appliance.listen().port());
    host.sh(&format!("{AGENT} enrol --box {HOST}:{port} --token {token}"))?;
    host.start_agent(&appliance)?;
    host.sh(&format!("{AGENT} protect /dev/sda --group {GROUP}"))?;
    appliance.wait_state(GROUP, "replicating", STEP_MAX)?;
    ensure!(risk(&appliance.group(GROUP)?, "unknown-writes").is_none(), "before there were any");

    // Past the block layer: the box does not have it, and says so until everything has been copied again.
    host.sh("/programs/guest-load past /dev/sda 4711")?;
    let group = wait_for("the box to be told", STEP_MAX, || {
        let group = appliance.group(GROUP)?;
        Ok(risk(&group, "unknown-writes").map(|_| group))
    })?;
    ensure!(events(&appliance, "unknown-write")? == 1, "{group}");
    host.sh(&format!("{AGENT} resync {GROUP}"))?;
    wait_for("it to be over", STEP_MAX, || {
        Ok(risk(&appliance.group(GROUP)?, "unknown-writes").is_none().then_some(()))
    })?;
    host.wait_identical(&appliance)?;
    flags(&mut host)?;
    host.wait_identical(&appliance)?;

    // The box takes nothing any more: the spool fills.
    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh(WORK)?;
    host.wait_limited(true)?;
    ensure!(!host.limits("agent")?.contains("wbps=1048576"), "the agent holds itself back");
    let status: Value = serde_json::from_str(&host.sh(&format!("{AGENT} status --json"))?)?;
    ensure!(status["protect_rpo"]["limits"] == 1, "{}", status["protect_rpo"]);
    // Killed: what systemd runs then lets everybody go, though no agent comes again.
    host.sh(
        "kill -9 $(cat /tmp/agent); while grep -qs '^State:.[^Z]' /proc/$(cat /tmp/agent)/status; do sleep 1; done",
    )?;
    ensure!(host.limits("work")?.contains("wbps=1048576"), "the limit is the kernel's, not the agent's");
    host.sh(&format!("{AGENT} release-throttle"))?;
    ensure!(host.limits("work")?.trim().is_empty(), "{}", host.limits("work")?);
    ensure!(host.sh("cat /sys/fs/cgroup/cgroup.subtree_control")?.trim().is_empty(), "the controller stays on");

    // The box comes back, and all is as it was.
    appliance.program()?.signal(libc::SIGCONT)?;
    host.start_agent(&appliance)?;
    host.wait_identical(&appliance)?;
    // Once more, with an agent that lives to see it end.
    appliance.program()?.signal(libc::SIGSTOP)?;
    host.sh(WORK)?;
    host.wait_limited(true)?;
    appliance.program()?.signal(libc::SIGCONT)?;
    wait_for("the box to hear of it", STEP_MAX, || Ok((events(&appliance, "host-throttled")? > 0).then_some(())))?;
    host.wait_limited(false)?;
    host.wait_identical(&appliance)?;
    host.sh("kill $(cat /tmp/agent); while grep -qs '^State:.[^Z]' /proc/$(cat /tmp/agent)/status; do sleep 1; done")?;
    host.guest.power_off()?;
    appliance.stop()?;
    flags_arrived(&appliance.records()?)?;
    dir.done()
}
