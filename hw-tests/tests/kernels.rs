//! Capture on the kernels and stacks of real hosts: Debian's 6.1, 6.12 and 5.10, and on one of them file systems on logical volumes
//! on LUKS on RAID. In a guest the agent's recorder captures while the guest writes; here the record is replayed and compared with
//! the guest's disks, bit for bit, and cut at random.
//!
//! A kernel that cannot be had (no network, not in the archive any more) is skipped by name.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch,
    disk::check_ext4,
    guest::{BOOKWORM_BACKPORTS, BULLSEYE_SECURITY, Guest, Initramfs, Kernel, Release, UBUNTU_4_18},
    process,
    product::Binaries,
    record::{Op, Record, Request, first_difference, recorder},
    skip, tools,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = 48 << 20;
/// The guest's disk that the record goes to.
const RECORD_BYTES: u64 = 256 << 20;

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest")
}

/// The disks of a guest: files, in the order of vda, vdb, ….
struct Drives(Vec<PathBuf>);

impl Drives {
    fn make(dir: &Path, sizes: &[u64]) -> Result<Self> {
        let make = |(i, size): (usize, &u64)| -> Result<PathBuf> {
            let file = dir.join(format!("disk{i}.img"));
            fs::File::create(&file)?.set_len(*size)?;
            Ok(file)
        };
        Ok(Self(sizes.iter().enumerate().map(make).collect::<Result<_>>()?))
    }
    fn args(&self) -> Vec<String> {
        let drive = |f: &PathBuf| {
            ["-drive".to_owned(), format!("file={},if=virtio,format=raw,cache=writeback,discard=unmap", f.display())]
        };
        self.0.iter().flat_map(drive).collect()
    }
    fn boot(&self, kernel: &Kernel, initramfs: &Initramfs, dir: &Path) -> Result<Guest> {
        let args = self.args();
        Guest::boot(kernel, initramfs, dir, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }
    fn images(&self, which: std::ops::Range<usize>) -> Result<Vec<Vec<u8>>> {
        self.0[which].iter().map(|f| fs::read(f).with_context(|| format!("read {}", f.display()))).collect()
    }
}

/// Capture of `disks` begins; the record goes to vda.
fn begin(guest: &mut Guest, disks: &str) -> Result<()> {
    begin_by(guest, "bpf-rq", disks)
}

fn begin_by(guest: &mut Guest, backend: &str, disks: &str) -> Result<()> {
    guest.sh(
        &format!("(HOLDFAST_CAPTURE={backend} /programs/record /dev/vda /tmp/stop {disks} >/tmp/record.out 2>&1; echo ended >>/tmp/record.out) &"),
        STEP_MAX,
    )?;
    guest
        .sh("n=0; while ! [ -e /tmp/stop.ready ] && ! grep -q ended /tmp/record.out && [ $n -lt 100 ]; do n=$((n+1)); sleep 1; done; [ -e /tmp/stop.ready ] || { cat /tmp/record.out; false; }", STEP_MAX)
        .context("capture did not begin")
        .map(drop)
}

/// Capture ends; nothing may have been lost.
fn end(guest: &mut Guest, record: &Path) -> Result<Record> {
    guest.sh(
        "touch /tmp/stop; n=0; while ! grep -q ended /tmp/record.out && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done",
        STEP_MAX,
    )?;
    let said = guest.sh("cat /tmp/record.out", STEP_MAX)?;
    let counters: Value = serde_json::from_str(said.trim().trim_end_matches("ended").trim())
        .with_context(|| format!("the recorder said {said:?}"))?;
    for nothing in ["lost", "drops", "faults", "truncated", "in_flight"] {
        ensure!(counters[nothing] == 0, "{nothing}: {counters}");
    }
    let record = Record::read(record)?;
    ensure!(counters["requests"] == record.requests.len(), "{counters}, in the record {}", record.requests.len());
    Ok(record)
}

fn identical(record: &Record, before: &[Vec<u8>], after: &[Vec<u8>]) {
    let mut images = before.to_vec();
    record.apply(0, record.requests.len(), &mut images);
    for (disk, (have, want)) in images.iter().zip(after).enumerate() {
        assert_eq!(first_difference(have, want), None, "disk {disk}");
    }
}

fn counter(image: &Path, name: &str) -> Result<u64> {
    let done = process::call("debugfs", &["-R", &format!("cat /{name}"), &image.to_string_lossy()], STEP_MAX)?;
    Ok(done.stdout.trim().parse().unwrap_or(0))
}

/// Writes with and without fsync, and A before B.
const WORKLOAD: &str = "i=1; while [ $i -le 25 ]; do for f in A B; do printf %020d $i >/tmp/n; dd if=/tmp/n of=/mnt/$f conv=notrunc,fsync 2>/dev/null; done; dd if=/dev/urandom of=/mnt/f$((i%5)) bs=$((i*1000)) count=3 2>/dev/null; i=$((i+1)); done; dd if=/dev/urandom of=/mnt/big bs=1M count=6 conv=fsync 2>/dev/null; rm /mnt/big; sync; fstrim /mnt || true";

fn capture_is_the_disk(kernel: Result<Kernel>, release: &str, backend: &str) -> Result<()> {
    let kernel = match kernel {
        Ok(kernel) => kernel,
        Err(e) => {
            skip(format!("capture on Linux {release}: the kernel could not be had: {e:#}"));
            return Ok(());
        }
    };
    let dir = Scratch::new()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    // For the self-test of one of the backends.
    initramfs.module(&kernel, "loop")?;
    initramfs.program(&tools::need("mke2fs")?)?;
    initramfs.program(&recorder()?)?;
    let drives = Drives::make(dir.path(), &[RECORD_BYTES, DISK_BYTES])?;
    let mut guest = drives.boot(&kernel, &initramfs, &dir.path().join("guest"))?;
    guest.sh("/programs/mke2fs -q -t ext4 /dev/vdb && sync && blockdev --flushbufs /dev/vdb", STEP_MAX)?;
    let before = drives.images(1..2)?;
    // As the agent does for each disk that it protects.
    guest.sh("echo 1024 >/sys/block/vdb/queue/max_sectors_kb", STEP_MAX)?;
    begin_by(&mut guest, backend, "/dev/vdb")?;
    guest.sh(&format!("mount /dev/vdb /mnt && {WORKLOAD}; umount /mnt && sync"), STEP_MAX)?;
    let record = end(&mut guest, &drives.0[0])?;
    guest.power_off()?;
    println!("Linux {}, {backend}: {} requests", kernel.version, record.requests.len());
    identical(&record, &before, &drives.images(1..2)?);

    let seed = 71;
    let mut draw = Draw::new(seed);
    let mut cuts: Vec<usize> = (0..10).map(|_| draw.below(record.requests.len() as u64) as usize).collect();
    cuts.sort_unstable();
    let (mut images, mut applied, mut with_data) = (before, 0, 0);
    let file = dir.path().join("cut.img");
    for cut in cuts {
        record.apply(applied, cut, &mut images);
        applied = cut;
        fs::write(&file, &images[0])?;
        check_ext4(&file, true).with_context(|| format!("seed {seed}, cut {cut}"))?;
        let (a, b) = (counter(&file, "A")?, counter(&file, "B")?);
        assert!(a >= b && a <= b + 1, "seed {seed}, cut {cut}: A={a} B={b}");
        with_data += u64::from(a > 0);
    }
    assert!(with_data > 0, "seed {seed}: no cut fell into the workload");
    dir.done()
}

#[test]
fn capture_is_the_disk_on_linux_6_1() -> Result<()> {
    capture_is_the_disk(Kernel::debian("linux-image-amd64", &cache()), "6.1", "bpf-rq")
}

fn of(release: &Release) -> Result<()> {
    capture_is_the_disk(Kernel::of_release(release, &cache()), release.name, "bpf-rq")
}

/// The newest kernel here that the backend for old ones runs on, with page tables of five levels.
#[test]
fn the_backend_for_old_kernels_captures_on_linux_6_1() -> Result<()> {
    capture_is_the_disk(Kernel::debian("linux-image-amd64", &cache()), "6.1", "bpf-legacy")
}

/// One it was made for.
#[test]
fn the_backend_for_old_kernels_captures_on_linux_4_18() -> Result<()> {
    capture_is_the_disk(Kernel::of_release(&UBUNTU_4_18, &cache()), UBUNTU_4_18.name, "bpf-legacy")
}

#[test]
fn capture_is_the_disk_on_linux_6_12() -> Result<()> {
    of(&BOOKWORM_BACKPORTS)
}

#[test]
fn capture_is_the_disk_on_linux_5_10() -> Result<()> {
    of(&BULLSEYE_SECURITY)
}

/// What ext4's journal writes with PREFLUSH and FUA at once: the block that makes a transaction count. Where the device has a cache that a
/// power cut empties, the block layer makes several requests of it. What arrives is, in this order, what the transaction consists of, a flush, the block;
/// then another flush, if the device knows no FUA.
#[test]
fn a_commit_arrives_as_a_flush_and_then_the_block_on_disks_with_and_without_fua() -> Result<()> {
    let kernel = Kernel::debian("linux-image-amd64", &cache())?;
    let dir = Scratch::new()?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.module(&kernel, "nvme")?;
    initramfs.program(&tools::need("mke2fs")?)?;
    initramfs.program(&recorder()?)?;
    let drives = Drives::make(dir.path(), &[RECORD_BYTES, DISK_BYTES])?;
    let nvme = dir.path().join("nvme.img");
    fs::File::create(&nvme)?.set_len(DISK_BYTES)?;
    let mut args = drives.args();
    let drive = format!("file={},if=none,id=fast,format=raw,cache=writeback", nvme.display());
    args.extend(["-drive", &drive, "-device", "nvme,drive=fast,serial=HF-1"].map(str::to_owned));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("guest"), &args)?;
    let cache = guest.sh(
        "cd /sys/block; cat vdb/queue/write_cache vdb/queue/fua nvme0n1/queue/write_cache nvme0n1/queue/fua",
        STEP_MAX,
    )?;
    let cache: Vec<&str> = cache.lines().map(str::trim).collect();
    ensure!(cache == ["write back", "0", "write back", "1"], "the disks are not as the test wants them: {cache:?}");
    for disk in ["vdb", "nvme0n1"] {
        guest.sh(&format!("/programs/mke2fs -q -t ext4 -O ^metadata_csum,^fast_commit /dev/{disk} && q=/sys/block/{disk}/queue/max_sectors_kb && {{ [ $(cat $q) -le 1024 ] || echo 1024 >$q; }}"), STEP_MAX)?;
    }
    guest.sh("sync", STEP_MAX)?;
    begin(&mut guest, "/dev/vdb /dev/nvme0n1")?;
    guest.sh("for d in vdb nvme0n1; do mkdir -p /mnt/$d; mount -t ext4 /dev/$d /mnt/$d; for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/$d/f$i bs=4k count=3 conv=fsync 2>/dev/null; done; umount /mnt/$d; done; sync", STEP_MAX)?;
    let record = end(&mut guest, &drives.0[0])?;
    guest.power_off()?;
    for (disk, fua) in [(0, false), (1, true)] {
        let of_disk: Vec<&Request> = record.requests.iter().filter(|r| r.disk == disk).collect();
        let commits = commits(&record, &of_disk);
        println!("disk {disk}: {} requests, {} commits", of_disk.len(), commits.len());
        ensure!(commits.len() >= 8, "only {} commits were seen on disk {disk}", commits.len());
        for (begun, at) in commits {
            let seen = || {
                format!(
                    "disk {disk}, commit {at}, its transaction {begun}: {:?}",
                    &of_disk[begun..(at + 2).min(of_disk.len())]
                )
            };
            ensure!(of_disk[begun + 1..at].iter().any(|r| r.op == Op::Flush), "no flush between: {}", seen());
            ensure!(of_disk[at].fua == fua, "FUA: {}", seen());
            if !fua {
                let next = of_disk[at + 1..].iter().find(|r| r.op == Op::Flush || r.op == Op::Write);
                ensure!(next.is_some_and(|r| r.op == Op::Flush), "no flush after it: {}", seen());
            }
        }
        ensure!(of_disk.iter().all(|r| r.op == Op::Flush || !r.preflush), "disk {disk}: a write came with PREFLUSH");
    }
    dir.done()
}

/// Where transactions of ext4's journal begin and where they are committed, by what is written: begin's last block before a commit, and the
/// commit.
fn commits(record: &Record, requests: &[&Request]) -> Vec<(usize, usize)> {
    const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];
    // A block's kind and the number of its transaction, behind the magic number; journal blocks may be merged into one request.
    let headers = |r: &Request| -> Vec<(u32, u32)> {
        let blocks = record.data(r).chunks(1024).filter(|b| b.starts_with(&MAGIC) && b.len() >= 12);
        let number = |b: &[u8], at: usize| u32::from_be_bytes(std::array::from_fn(|i| b[at + i]));
        blocks.map(|b| (number(b, 4), number(b, 8))).collect()
    };
    let mut begun = std::collections::BTreeMap::new();
    let mut out = Vec::new();
    for (at, request) in requests.iter().enumerate().filter(|(_, r)| r.op == Op::Write) {
        for (kind, transaction) in headers(request) {
            match kind {
                1 => drop(begun.insert(transaction, at)),
                2 => out.extend(begun.get(&transaction).map(|b| (*b, at))),
                _ => {}
            }
        }
    }
    out
}

const LVM: &str = "/programs/lvm";
/// No udev in a guest: LVM makes its nodes itself.
const LVM_CONFIG: &str = "--config 'activation{udev_sync=0 udev_rules=0 verify_udev_operations=0} devices{scan=\"/dev\" use_devicesfile=0} global{use_lvmpolld=0 locking_dir=\"/tmp/lvm\"} backup{backup=0 archive=0}'";

/// RAID over two disks, LUKS on it, a volume group on that.
const OPEN: &str = "echo -n secret >/tmp/key; /programs/cryptsetup open --key-file /tmp/key /dev/md0 safe";

fn stack_initramfs(kernel: &Kernel) -> Result<Initramfs> {
    let mut initramfs = Initramfs::new(kernel)?;
    let modules = [
        "md_mod",
        "raid1",
        "dm_mod",
        "dm_crypt",
        "xts",
        "aesni_intel",
        "sha256_generic",
        "algif_skcipher",
        "xfs",
        "btrfs",
    ];
    for module in modules {
        initramfs.module(kernel, module)?;
    }
    for tool in ["mke2fs", "mkfs.xfs", "mkfs.btrfs", "mdadm", "cryptsetup", "lvm", "e2fsck", "xfs_repair", "btrfs"] {
        initramfs.program(&tools::need(tool)?)?;
    }
    initramfs.program(&recorder()?)?;
    initramfs.program(&Binaries::beside_us()?.agent)?;
    // cryptsetup locks here.
    initramfs.file("run/cryptsetup/.keep", 0o600, Vec::new());
    Ok(initramfs)
}

#[test]
fn a_stack_of_raid_luks_and_logical_volumes_with_three_file_systems_is_captured_as_one() -> Result<()> {
    let kernel = Kernel::debian("linux-image-amd64", &cache())?;
    let dir = Scratch::new()?;
    let initramfs = stack_initramfs(&kernel)?;
    let drives = Drives::make(dir.path(), &[RECORD_BYTES, 544 << 20, 544 << 20])?;
    let mut guest = drives.boot(&kernel, &initramfs, &dir.path().join("guest"))?;
    guest.sh("yes | /programs/mdadm --create /dev/md0 --level=1 --raid-devices=2 --assume-clean --metadata=1.2 /dev/vdb /dev/vdc", STEP_MAX)?;
    guest.sh(&format!("{OPEN} 2>/dev/null || (/programs/cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/key /dev/md0 && {OPEN})"), STEP_MAX)?;
    guest.sh(
        &format!("{LVM} pvcreate {LVM_CONFIG} /dev/mapper/safe && {LVM} vgcreate {LVM_CONFIG} vg-a /dev/mapper/safe"),
        STEP_MAX,
    )?;
    for (name, mib) in [("one", 48), ("two", 304), ("three", 128)] {
        guest.sh(&format!("{LVM} lvcreate -y -W n -Z n {LVM_CONFIG} -n {name} -L {mib}M vg-a"), STEP_MAX)?;
    }
    guest.sh("ls /dev/mapper; /programs/mke2fs -q -t ext4 /dev/mapper/vg--a-one && /programs/mkfs.xfs -q /dev/mapper/vg--a-two && /programs/mkfs.btrfs -q /dev/mapper/vg--a-three", STEP_MAX)?;
    guest.sh("mkdir -p /mnt/one /mnt/two /mnt/three && mount /dev/mapper/vg--a-one /mnt/one && mount -t xfs /dev/mapper/vg--a-two /mnt/two && mount -t btrfs /dev/mapper/vg--a-three /mnt/three", STEP_MAX)?;
    the_agent_shows_the_stack(&mut guest)?;
    guest.sh(
        "umount /mnt/one /mnt/two /mnt/three; sync; blockdev --flushbufs /dev/vdb; blockdev --flushbufs /dev/vdc",
        STEP_MAX,
    )?;
    let before = drives.images(1..3)?;

    begin(&mut guest, "/dev/vdb /dev/vdc")?;
    guest.sh("mount /dev/mapper/vg--a-one /mnt/one && mount -t xfs /dev/mapper/vg--a-two /mnt/two && mount -t btrfs /dev/mapper/vg--a-three /mnt/three", STEP_MAX)?;
    guest.sh("i=1; while [ $i -le 8 ]; do printf %020d $i >/tmp/n; for d in one two three; do dd if=/tmp/n of=/mnt/$d/N conv=notrunc,fsync 2>/dev/null; done; dd if=/dev/urandom of=/mnt/two/f$((i%3)) bs=50k count=2 2>/dev/null; i=$((i+1)); done; sync", STEP_MAX)?;
    guest.sh("umount /mnt/one /mnt/two /mnt/three; sync", STEP_MAX)?;
    // The array marks itself clean a moment after the last write, and that is a write too.
    guest.sh(&format!("{LVM} vgchange {LVM_CONFIG} -an vg-a; /programs/cryptsetup close safe; /programs/mdadm --stop /dev/md0; sync"), STEP_MAX)?;
    let record = end(&mut guest, &drives.0[0])?;
    guest.power_off()?;
    println!("{} requests", record.requests.len());
    identical(&record, &before, &drives.images(1..3)?);

    // Two moments are brought up as they would be after a power cut.
    let seed = 81;
    let mut draw = Draw::new(seed);
    let third = record.requests.len() as u64 / 3;
    let cuts = [third + draw.below(third), 2 * third + draw.below(third)].map(|c| c as usize);
    let (mut images, mut applied) = (before, 0);
    for cut in cuts {
        record.apply(applied, cut, &mut images);
        applied = cut;
        for (image, file) in images.iter().zip(&drives.0[1..]) {
            write_sparse(file, image)?;
        }
        let mut guest = drives.boot(&kernel, &initramfs, &dir.path().join("guest"))?;
        let at = format!("seed {seed}, cut {cut} of {}", record.requests.len());
        let counters = open_and_check(&mut guest).with_context(|| at.clone())?;
        guest.power_off()?;
        println!("{at}: {counters:?}");
        let [one, two, three] = counters;
        assert!(one >= two && two >= three && one <= three + 1, "{at}: {counters:?}");
    }
    dir.done()
}

/// `holdfast-agent disks` on the running stack, by the mount point.
fn the_agent_shows_the_stack(guest: &mut Guest) -> Result<()> {
    let agent = "/programs/holdfast-agent";
    let value: Value = serde_json::from_str(&guest.sh(&format!("{agent} disks --json /mnt/two"), STEP_MAX)?)?;
    let stack: Vec<&str> =
        value["choices"][0]["stack"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let want = [
        "xfs at /mnt/two",
        "logical volume /dev/mapper/vg--a-two",
        "LVM volume group vg-a",
        "opened encrypted volume /dev/mapper/safe",
        "RAID array, raid1 /dev/md0",
        "disk /dev/vdb + disk /dev/vdc",
    ];
    assert_eq!(stack, want, "{value}");
    let volumes: Vec<&str> =
        value["volumes"].as_array().into_iter().flatten().filter_map(|v| v["volume"].as_str()).collect();
    assert_eq!(volumes, ["vdb", "vdc"], "{value}");
    assert_eq!(value["volumes"][0]["backend"], "bpf-rq", "{value}");
    let all: Value = serde_json::from_str(&guest.sh(&format!("{agent} disks --json"), STEP_MAX)?)?;
    let volume = all["devices"].as_array().into_iter().flatten().find(|d| d["path"] == "/dev/mapper/vg--a-three");
    let volume = volume.with_context(|| format!("no third volume in {all}"))?;
    assert_eq!((&volume["volume_group"], &volume["content"]["kind"]), (&"vg-a".into(), &"btrfs".into()), "{volume}");
    assert_eq!(volume["captured_on"], serde_json::json!(["vdb", "vdc"]), "{volume}");
    let text = guest.sh(&format!("{agent} disks"), STEP_MAX)?;
    ensure!(text.contains("LVM volume group") && text.contains("/mnt/three"), "{text}");
    println!("{text}");
    Ok(())
}

/// Assembles the stack, mounts, reads the counters, unmounts, checks.
fn open_and_check(guest: &mut Guest) -> Result<[u64; 3]> {
    guest.sh("/programs/mdadm --assemble --run /dev/md0 /dev/vdb /dev/vdc", STEP_MAX)?;
    guest.sh(OPEN, STEP_MAX)?;
    guest.sh(&format!("{LVM} vgchange {LVM_CONFIG} -ay vg-a"), STEP_MAX)?;
    guest.sh("mkdir -p /mnt/one /mnt/two /mnt/three && mount /dev/mapper/vg--a-one /mnt/one && mount -t xfs /dev/mapper/vg--a-two /mnt/two && mount -t btrfs /dev/mapper/vg--a-three /mnt/three", STEP_MAX)?;
    let said = guest.sh("for d in one two three; do cat /mnt/$d/N 2>/dev/null || echo -n 0; echo; done", STEP_MAX)?;
    let mut numbers = said.split_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
    let counters = std::array::from_fn(|_| numbers.next().unwrap_or(0));
    guest.sh("umount /mnt/one /mnt/two /mnt/three && /programs/e2fsck -fn /dev/mapper/vg--a-one && /programs/xfs_repair -n /dev/mapper/vg--a-two && /programs/btrfs check --readonly /dev/mapper/vg--a-three", STEP_MAX)?;
    Ok(counters)
}

/// Writes an image with holes where it is empty.
fn write_sparse(file: &Path, image: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let to = fs::File::create(file)?;
    to.set_len(image.len() as u64)?;
    const PIECE: usize = 65536;
    for (i, piece) in image.chunks(PIECE).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
        to.write_all_at(piece, (i * PIECE) as u64)?;
    }
    Ok(())
}
