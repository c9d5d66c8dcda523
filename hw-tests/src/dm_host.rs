//! A host in a guest whose protected disk is a volume of the device mapper: plain, LVM or encrypted.

use crate::{
    Draw, compare,
    guest::{Guest, Initramfs, Kernel},
    load::{self, BLOCK, SLOTS},
    process::wait_for,
    product::{Appliance, At, Binaries},
    tools,
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Of the protected disk, and of that for the agent's state.
pub const DISK_BYTES: u64 = 32 << 20;
pub const STEP_MAX: Duration = Duration::from_secs(120);
pub const SYNC_MAX: Duration = Duration::from_secs(120);
/// A guest's way to this machine's loopback.
pub const HOST: &str = "10.0.2.2";
pub const AGENT: &str = "/programs/holdfast-agent --config /etc/agent.toml";
/// LVM with nobody behind it: no udev, no configuration.
pub const LVM: &str = "/programs/lvm";
pub const LVM_ALONE: &str =
    "--config 'devices{use_devicesfile=0} activation{udev_sync=0 udev_rules=0} backup{backup=0 archive=0}'";
/// What a writer of blocks takes of the volume.
pub const AREA: u64 = SLOTS * BLOCK as u64;
/// Rewrites eight files, each synced.
pub const WRITER: &str = "while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/mnt/f$((i%8)) bs=16k count=4 conv=fsync 2>/dev/null; i=$((i+1)); done";

/// Where kernels are kept.
pub fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest")
}

/// Debian 12\'s.
pub fn kernel() -> Result<Kernel> {
    Kernel::debian("linux-image-amd64", &cache())
}

/// What the protected volume is.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Plain,
    /// A logical volume, made and changed by LVM's own tools.
    Lvm,
    /// Encrypted: what is mirrored is what is above the encryption.
    Crypt,
}

/// A host with a volume of the device mapper, a disk for the agent's state, and a serial line for what it wants known at once.
pub struct Host {
    pub guest: Guest,
    pub disk: PathBuf,
    pub said: PathBuf,
    /// Of the device mapper.
    pub name: &'static str,
}

impl Host {
    pub fn boot(kernel: &Kernel, bins: &Binaries, dir: &Path, kind: Kind) -> Result<Self> {
        let (disk, state) = (dir.join("disk.img"), dir.join("state.img"));
        for file in [&disk, &state] {
            fs::File::create(file)?.set_len(DISK_BYTES)?;
        }
        let drive = |file: &Path| format!("file={},if=virtio,format=raw,cache=writeback", file.display());
        Self::boot_on(kernel, bins, dir, kind, [drive(&disk), drive(&state)], true)
    }

    /// The same on disks that are somewhere else: QEMU's words for the protected one and that of the agent's state. `fresh`: both are empty;
    /// else what is on them stays, and the volume is none of LVM's.
    pub fn boot_on(
        kernel: &Kernel,
        bins: &Binaries,
        dir: &Path,
        kind: Kind,
        drives: [String; 2],
        fresh: bool,
    ) -> Result<Self> {
        let mut initramfs = Initramfs::new(kernel)?;
        for module in ["dm-mod", "dm-mirror", "dm-flakey", "nbd", "virtio_rng", "dm-crypt", "xts", "aes_generic"] {
            initramfs.module(kernel, module)?;
        }
        for tool in ["mke2fs", "dmsetup", "lvm"] {
            initramfs.program(&tools::need(tool)?)?;
        }
        initramfs.program(&bins.agent)?;
        initramfs.program(&bins.agent.with_file_name("guest-load"))?;
        initramfs.file(
            "etc/agent.toml",
            0o600,
            b"state_dir = \"/var/agent\"\nheed_pressure = false\ncopy = \"whole\"\n".to_vec(),
        );
        let (disk, said) = (dir.join("disk.img"), dir.join("said"));
        let serial = format!("file,id=said,path={}", said.display());
        let args = [
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net",
            // An old kernel that has just begun has no randomness, and the agent's connection waits for some.
            "-device",
            "virtio-rng-pci",
            "-drive",
            &drives[0],
            "-drive",
            &drives[1],
            "-chardev",
            &serial,
            "-serial",
            "chardev:said",
        ];
        let guest = Guest::boot(kernel, &initramfs, &dir.join("guest"), &args)?;
        let name = if kind == Kind::Lvm { "vg-data" } else { "data" };
        let mut this = Self { guest, disk, said, name };
        this.sh("stty -F /dev/ttyS2 raw -echo")?;
        let format = if fresh { "/programs/mke2fs -q -t ext4 /dev/vdb" } else { "true" };
        this.sh(&format!("mkdir -p /var/agent /dev/mapper && {format} && mount /dev/vdb /var/agent"))?;
        let sectors = DISK_BYTES / 512;
        let table = match kind {
            Kind::Plain => format!("0 {sectors} linear /dev/vda 0"),
            Kind::Crypt => format!("0 {sectors} crypt aes-xts-plain64 {} 0 /dev/vda 0", "5a".repeat(32)),
            Kind::Lvm if !fresh => bail!("a volume group is made anew at each boot"),
            Kind::Lvm => {
                this.sh("mkdir -p /run/lock/lvm /etc/lvm")?;
                for step in
                    ["pvcreate -ff -y /dev/vda", "vgcreate vg /dev/vda", "lvcreate -y -Wn -Zn -l 100%FREE -n data vg"]
                {
                    this.sh(&format!("{LVM} {step} {LVM_ALONE}"))?;
                }
                return Ok(this);
            }
        };
        this.sh(&format!("/programs/dmsetup create data --noudevsync --table '{table}' && /programs/dmsetup mknodes"))?;
        Ok(this)
    }

    pub fn volume(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// What a volume of one piece holds, as a file; its table when it is not mirrored says where it lies.
    pub fn oracle(&self, plain: &str) -> Result<PathBuf> {
        let words: Vec<&str> = plain.split_whitespace().collect();
        let ["0", sectors, "linear", _, start] = words.as_slice() else { bail!("not one piece: {plain}") };
        let mut bytes = vec![0; sectors.parse::<usize>()? * 512];
        fs::File::open(&self.disk)?.read_exact_at(&mut bytes, start.parse::<u64>()? * 512)?;
        let to = self.disk.with_extension("volume");
        fs::write(&to, bytes)?;
        Ok(to)
    }

    pub fn sh(&mut self, line: &str) -> Result<String> {
        let log = self.guest.log_path().display().to_string();
        self.guest.sh(line, STEP_MAX).with_context(|| format!("see {log}"))
    }

    /// Enrols and starts the agent.
    pub fn join(&mut self, appliance: &Appliance) -> Result<()> {
        let (token, port) = (appliance.token()?, appliance.listen().port());
        self.sh(&format!("{AGENT} enrol --box {HOST}:{port} --token {token}"))?;
        self.start_agent(appliance)
    }

    pub fn start_agent(&mut self, appliance: &Appliance) -> Result<()> {
        self.sh("rm -f /var/agent/agent.sock")?;
        self.sh(&format!("({AGENT} run >/dev/ttyS0 2>&1 & echo $! >/tmp/agent)"))?;
        self.sh("n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -S /var/agent/agent.sock ]")?;
        wait_for("the agent to reach the box", STEP_MAX, || {
            let hosts = appliance.control().get("/hosts")?;
            Ok(hosts.as_array().into_iter().flatten().any(|h| h["connected"] == true).then_some(()))
        })
    }

    /// The only group, as the agent sees it.
    pub fn group(&mut self) -> Result<Value> {
        let text = self.sh(&format!("{AGENT} status --json"))?;
        let status: Value = serde_json::from_str(&text).with_context(|| format!("status {text:?}"))?;
        Ok(status["groups"][0].clone())
    }

    /// Waits until the host's writes are treated so.
    pub fn wait_gate(&mut self, gate: &str) -> Result<Value> {
        let mut last = Value::Null;
        wait_for(&format!("the gate to be {gate}"), SYNC_MAX, || {
            last = self.group()?;
            Ok((last["state"] == "replicating" && last["gate"] == gate).then(|| last.clone()))
        })
        .with_context(|| format!("last seen: {} {} {}", last["state"], last["gate"], last["reason"]))
        .with_context(|| format!("see {}", self.guest.log_path().display()))
    }

    /// Waits until the mirror is in the volume, and in step.
    pub fn wait_whole(&mut self) -> Result<()> {
        wait_for("the mirror to be in again", STEP_MAX, || Ok(self.table()?.contains("mirror core").then_some(())))?;
        self.wait_gate("sync").map(drop)
    }

    pub fn start_writer(&mut self) -> Result<()> {
        self.sh(&format!("rm -f /tmp/stop /tmp/stopped; ({WRITER}; touch /tmp/stopped) >/dev/null 2>&1 &")).map(drop)
    }
    pub fn stop_writer(&mut self) -> Result<()> {
        self.sh("touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 1; done").map(drop)
    }

    /// The table of the volume: the kind of its only target.
    pub fn table(&mut self) -> Result<String> {
        self.sh(&format!("/programs/dmsetup table {}", self.name))
    }

    /// Writes and syncs for so long; what the longest one took and whether any failed.
    pub fn stalls_during(&mut self, seconds: u64) -> Result<()> {
        self.sh(&format!(
            "(/programs/guest-load stall /mnt/stall {seconds} >/tmp/stalls 2>&1; touch /tmp/stalls.done) &"
        ))
        .map(drop)
    }
    pub fn stalls(&mut self) -> Result<Value> {
        // A host's write that hangs is what these tests are to find: where it hangs must be said before the limit ends the guest.
        let waited = "n=0; while ! [ -e /tmp/stalls.done ] && [ $n -lt 90 ]; do sleep 1; n=$((n+1)); done";
        let where_it_hangs = "for p in /proc/[0-9]*; do case $(cat $p/comm 2>/dev/null) in guest-load|holdfast*|kmirror*|nbd*) \
            echo \"$p $(cat $p/comm) $(grep State $p/status)\"; cat $p/stack;; esac; done; dmsetup status; dmsetup table";
        let text = self.sh(&format!(
            "{waited}; if [ -e /tmp/stalls.done ]; then rm /tmp/stalls.done; cat /tmp/stalls; else {{ {where_it_hangs}; }} 2>&1; false; fi"
        ))?;
        serde_json::from_str(&text).with_context(|| format!("guest-load said {text:?}"))
    }
}

/// Bytes of each write that a test makes while the mirror is out, and of the piece that is marked for it.
pub const PIECE: u64 = 64 << 10;

impl Host {
    pub fn stop_agent(&mut self, signal: &str) -> Result<()> {
        let wait = "n=0; while kill -0 $(cat /tmp/agent) 2>/dev/null && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done";
        self.sh(&format!("kill -{signal} $(cat /tmp/agent); {wait}; ! kill -0 $(cat /tmp/agent) 2>/dev/null")).map(drop)
    }

    /// Writes noise to `count` pieces in random places, past every cache; answers how many different ones.
    pub fn scatter(&mut self, draw: &mut Draw, count: u64) -> Result<u64> {
        let places: std::collections::BTreeSet<u64> = (0..count).map(|_| draw.below(DISK_BYTES / PIECE)).collect();
        let volume = self.volume();
        let list = places.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
        self.sh(&format!(
            "for i in {list}; do dd if=/dev/urandom of={volume} bs=64k count=1 seek=$i iflag=fullblock oflag=direct conv=notrunc 2>/dev/null || exit 1; done"
        ))?;
        Ok(places.len() as u64 * PIECE)
    }

    /// Bytes read from the disk, and bytes sent over the network, since the guest was started.
    pub fn traffic(&mut self) -> Result<[u64; 2]> {
        let text = self.sh("set -- $(cat /sys/block/vda/stat); echo $3; cat /sys/class/net/e*/statistics/tx_bytes")?;
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        let mut next = || numbers.next().with_context(|| format!("counters {text:?}"))?.context("a counter");
        Ok([next()? * 512, next()?])
    }

    /// Waits until nothing is remembered that the box has.
    pub fn wait_forgotten(&mut self) -> Result<()> {
        let mut last = Value::Null;
        wait_for("what the box has to be forgotten", SYNC_MAX, || {
            last = self.group()?["marked_bytes"].clone();
            Ok((last == json!(0)).then_some(()))
        })
        .with_context(|| format!("still marked: {last}"))
    }
}

impl Host {
    /// Waits until the agent has heard of a policy, and the mirror is in by it: the two kinds need different legs.
    pub fn wait_policy(&mut self, at_bound: &str) -> Result<()> {
        wait_for("the agent to hear of the policy", STEP_MAX, || {
            Ok((self.group()?["policy"]["mode"]["sync"]["at_bound"] == at_bound).then_some(()))
        })?;
        self.wait_whole()
    }

    /// Begins to write one piece after the other, noting each that has returned, and the first error.
    pub fn start_pieces(&mut self) -> Result<()> {
        let volume = self.volume();
        self.sh(&format!(
            "rm -f /tmp/stop /tmp/stopped /tmp/error; echo 0 >/tmp/pieces; (i=0; while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of={volume} bs=64k count=1 seek=$((i%400)) iflag=fullblock oflag=direct conv=notrunc 2>/tmp/why || {{ cp /tmp/why /tmp/error; break; }}; i=$((i+1)); echo $i >/tmp/pieces; done; touch /tmp/stopped) >/dev/null 2>&1 &"
        ))
        .map(drop)
    }
    pub fn pieces(&mut self) -> Result<u64> {
        let text = self.sh("cat /tmp/pieces")?;
        Ok(text.trim().parse().unwrap_or(0))
    }
    /// Waits until so many more pieces have been written.
    pub fn wait_pieces(&mut self, more: u64) -> Result<()> {
        let from = self.pieces()?;
        wait_for("the host's writes to go on", STEP_MAX, || Ok((self.pieces()? >= from + more).then_some(())))
            .with_context(|| format!("{from} pieces were written before"))
    }
    /// Ends the writing; answers the error that ended it before, if one did.
    pub fn stop_pieces(&mut self) -> Result<String> {
        self.stop_writer()?;
        Ok(self.sh("cat /tmp/error 2>/dev/null; true")?.trim().to_owned())
    }
}

/// What the box holds at `at` is what the disk's file holds.
pub fn assert_identical(appliance: &Appliance, at: &At, disk: &Path) -> Result<()> {
    let view = appliance.view("data", at)?;
    let difference = compare::export_with_file(&mut view.only()?.connect()?, disk)?;
    assert_eq!(difference.map(|d| d.to_string()), None, "{at}: the box has not what the disk has");
    view.close()
}

/// What writers (by their seeds) were last told is done, from what they said on the host's serial line.
pub fn acknowledged(said: &Path, writers: &[u64]) -> Result<Vec<u64>> {
    let text = fs::read_to_string(said)?;
    let mut newest = vec![0; writers.len()];
    // The last line may be under way.
    for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        let (writer, number) = line.trim().split_once(' ').with_context(|| format!("line {line:?}"))?;
        let at = writers.iter().position(|w| w.to_string() == writer).with_context(|| format!("line {line:?}"))?;
        newest[at] = number.parse()?;
    }
    Ok(newest)
}

/// Of each writer, how many writes the box holds; each has its area one behind the other.
pub fn held_by_box(appliance: &Appliance, writers: &[u64]) -> Result<Vec<u64>> {
    let view = appliance.view("data", &At::Latest)?;
    let mut export = view.only()?.connect()?;
    let mut held = Vec::new();
    for (at, writer) in writers.iter().enumerate() {
        let mut area = vec![0; AREA as usize];
        export.read(at as u64 * AREA, &mut area)?;
        held.push(load::writes_in(*writer, &area)?);
    }
    drop(export);
    view.close()?;
    Ok(held)
}
