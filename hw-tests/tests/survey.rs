//! A first copy that leaves out what file systems do not use, where those lie on logical volumes on LUKS on RAID: what the box has is brought up in
//! another guest, and every block that is used is what the host's disks have.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    dm_host::{AGENT, HOST, cache, kernel},
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

const STEP_MAX: Duration = Duration::from_secs(180);
const COPY_MAX: Duration = Duration::from_secs(300);
/// XFS makes no smaller file systems than 300 MiB.
const MEMBER_BYTES: u64 = 416 << 20;
const STATE_BYTES: u64 = 32 << 20;
const EXT4_MIB: u64 = 64;
const XFS_MIB: u64 = 304;
/// Both are all but empty: of what they hold at least this much is left out, on each member.
const UNUSED_MIN: u64 = (EXT4_MIB / 2 + XFS_MIB * 3 / 4) << 20;
const LVM: &str = "/programs/lvm";
/// No udev in a guest: LVM makes its nodes itself.
const LVM_CONFIG: &str = "--config 'activation{udev_sync=0 udev_rules=0 verify_udev_operations=0} devices{scan=\"/dev\" use_devicesfile=0} global{use_lvmpolld=0 locking_dir=\"/tmp/lvm\"} backup{backup=0 archive=0}'";
const OPEN: &str = "echo -n secret >/tmp/key; /programs/cryptsetup open --key-file /tmp/key /dev/md0 safe";
const MOUNT: &str =
    "mkdir -p /mnt/one /mnt/two && mount /dev/mapper/vg-one /mnt/one && mount -t xfs /dev/mapper/vg-two /mnt/two";
/// Blocks that were used and are free again: what is in them, nobody may see.
const FILL: &str = "for d in one two; do cp /programs/lvm /mnt/$d/kept; dd if=/dev/urandom of=/mnt/$d/gone bs=1M count=12 2>/dev/null; mkdir /mnt/$d/many; for i in 1 2 3 4 5 6 7 8 9; do echo $i >/mnt/$d/many/$i; done; done; sync; rm /mnt/one/gone /mnt/two/gone; sync";
/// Of ext4 all blocks that are used, as its own tools tell them; of XFS its files, and that its own tool finds it whole.
const SUMS: &str = "/programs/e2fsck -fn /dev/mapper/vg-one >/dev/null && /programs/e2image -ra /dev/mapper/vg-one - 2>/dev/null | sha256sum && /programs/xfs_repair -n /dev/mapper/vg-two 2>/dev/null >/dev/null && mount -t xfs -o ro /dev/mapper/vg-two /mnt/two && (cd /mnt/two && find . -type f | sort | xargs sha256sum); umount /mnt/two";

fn initramfs(kernel: &Kernel, bins: &Binaries) -> Result<Initramfs> {
    let mut initramfs = Initramfs::new(kernel)?;
    for module in [
        "md_mod",
        "raid1",
        "dm_mod",
        "dm_crypt",
        "xts",
        "aesni_intel",
        "sha256_generic",
        "algif_skcipher",
        "xfs",
        "virtio_rng",
    ] {
        initramfs.module(kernel, module)?;
    }
    for tool in ["mke2fs", "mkfs.xfs", "mdadm", "cryptsetup", "lvm", "e2fsck", "e2image", "xfs_repair"] {
        initramfs.program(&tools::need(tool)?)?;
    }
    initramfs.program(&bins.agent)?;
    initramfs.file("etc/agent.toml", 0o600, b"state_dir = \"/var/agent\"\nheed_pressure = false\n".to_vec());
    // cryptsetup locks here.
    initramfs.file("run/cryptsetup/.keep", 0o600, Vec::new());
    Ok(initramfs)
}

fn boot(kernel: &Kernel, initramfs: &Initramfs, dir: &Path, disks: &[PathBuf]) -> Result<Guest> {
    let mut args: Vec<String> =
        ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]
            .map(String::from)
            .into();
    // With serial numbers: nothing else tells the members of an array from each other.
    for (i, disk) in disks.iter().enumerate() {
        args.extend([
            "-drive".to_owned(),
            format!("file={},if=none,id=disk{i},format=raw,cache=writeback", disk.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=disk{i},serial=HF-{i}"),
        ]);
    }
    Guest::boot(kernel, initramfs, dir, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn what_file_systems_on_volumes_on_luks_on_raid_do_not_use_is_left_out_and_nothing_else() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let kernel = kernel().with_context(|| format!("in {}", cache().display()))?;
    let initramfs = initramfs(&kernel, &bins)?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    let disk = |name: &str, bytes: u64| -> Result<PathBuf> {
        let file = dir.path().join(name);
        fs::File::create(&file)?.set_len(bytes)?;
        Ok(file)
    };
    let members = [disk("one.img", MEMBER_BYTES)?, disk("two.img", MEMBER_BYTES)?];
    let disks = [members[0].clone(), members[1].clone(), disk("state.img", STATE_BYTES)?];
    let mut guest = boot(&kernel, &initramfs, &dir.path().join("guest"), &disks)?;
    let log = guest.log_path().display().to_string();
    let sh = |guest: &mut Guest, line: &str| guest.sh(line, STEP_MAX).with_context(|| format!("see {log}"));
    sh(
        &mut guest,
        "yes | /programs/mdadm --create /dev/md0 --level=1 --raid-devices=2 --assume-clean --metadata=1.2 /dev/vda /dev/vdb",
    )?;
    sh(
        &mut guest,
        &format!(
            "{OPEN} 2>/dev/null || (/programs/cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/key /dev/md0 && {OPEN})"
        ),
    )?;
    sh(
        &mut guest,
        &format!("{LVM} pvcreate {LVM_CONFIG} /dev/mapper/safe && {LVM} vgcreate {LVM_CONFIG} vg /dev/mapper/safe"),
    )?;
    for (name, mib) in [("one", EXT4_MIB), ("two", XFS_MIB)] {
        sh(&mut guest, &format!("{LVM} lvcreate -y -W n -Z n {LVM_CONFIG} -n {name} -L {mib}M vg"))?;
    }
    sh(
        &mut guest,
        &format!(
            "/programs/mke2fs -q -t ext4 /dev/mapper/vg-one && /programs/mkfs.xfs -q /dev/mapper/vg-two && {MOUNT} && {FILL}"
        ),
    )?;

    sh(&mut guest, "mkdir -p /var/agent && /programs/mke2fs -q -t ext4 /dev/vdc && mount /dev/vdc /var/agent")?;
    let (token, port) = (appliance.token()?, appliance.listen().port());
    sh(
        &mut guest,
        &format!(
            "{AGENT} enrol --box {HOST}:{port} --token {token}; ({AGENT} run >/dev/ttyS0 2>&1 & echo $! >/tmp/agent)"
        ),
    )?;
    sh(
        &mut guest,
        "n=0; while ! [ -S /var/agent/agent.sock ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -S /var/agent/agent.sock ]",
    )?;
    let told = sh(&mut guest, &format!("{AGENT} disks /mnt/one /mnt/two"))?;
    ensure!(told.contains("that no file system uses now"), "{told}");
    // What is taken while the copy runs must not be left out of it.
    sh(
        &mut guest,
        "(i=0; while ! [ -e /tmp/stop ]; do for d in one two; do dd if=/dev/urandom of=/mnt/$d/f$((i%8)) bs=64k count=4 conv=fsync; rm -f /mnt/$d/f$(((i+3)%8)); done; i=$((i+1)); done >/dev/null 2>&1; touch /tmp/stopped) >/dev/null 2>&1 &",
    )?;
    sh(&mut guest, &format!("{AGENT} protect /mnt/one /mnt/two --group data"))?;
    let mut last = Value::Null;
    let group = wait_for("the first copy", COPY_MAX, || {
        let text = sh(&mut guest, &format!("{AGENT} status --json"))?;
        last = serde_json::from_str::<Value>(&text)?["groups"][0].clone();
        Ok((last["state"] == "replicating").then(|| last.clone()))
    })
    .with_context(|| format!("last seen: {last}"))?;
    let unused = group["unused_bytes"].as_u64().with_context(|| format!("{group}"))?;
    println!("of {} bytes on two members {unused} are used by no file system", 2 * MEMBER_BYTES);
    ensure!(unused >= 2 * UNUSED_MIN, "only {unused} bytes were left out: {group}");
    ensure!(
        unused <= (2 * (EXT4_MIB + XFS_MIB)) << 20,
        "{unused} bytes were left out, more than the file systems have: {group}"
    );

    // Everything comes to rest, and the disks are what the box is to have.
    sh(&mut guest, "touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 1; done; umount /mnt/one /mnt/two && sync")?;
    let sums = sh(&mut guest, SUMS)?;
    sh(
        &mut guest,
        &format!(
            "{LVM} vgchange {LVM_CONFIG} -an vg && /programs/cryptsetup close safe && /programs/mdadm --stop /dev/md0 && sync"
        ),
    )?;
    let end = appliance.bookmark("data", "end")?;
    guest.power_off()?;

    // Another machine on what the box has.
    let view = appliance.view("data", &At::Lsn(end.lsn))?;
    let mut copies = Vec::new();
    for export in &view.exports {
        let to = dir.path().join(format!("copy-{}.img", copies.len()));
        export.connect()?.copy_to(&to)?;
        copies.push(to);
    }
    ensure!(copies.len() == 2, "{} volumes in the view", copies.len());
    view.close()?;
    let mut other = boot(&kernel, &initramfs, &dir.path().join("guest"), &copies)?;
    sh(&mut other, "/programs/mdadm --assemble --run /dev/md0 /dev/vda /dev/vdb")?;
    sh(&mut other, &format!("{OPEN} && {LVM} vgchange {LVM_CONFIG} -ay vg && mkdir -p /mnt/one /mnt/two"))?;
    let theirs = sh(&mut other, SUMS)?;
    ensure!(sums.lines().count() > 10, "{sums}");
    assert_eq!(theirs, sums, "the box has not what the host's disks have");
    other.power_off()?;
    appliance.stop()?;
    dir.done()
}
