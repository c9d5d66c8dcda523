//! Plain partitions of a Debian host that get a volume of the device mapper laid over them at a boot, so that they can be mirrored while they are in
//! use; and shims that are not as they should be, with which the host boots all the same.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    debian::{DebianImage, Options, Profile, host::Host, install},
    process::call,
    product::{Appliance, Binaries},
};
use std::{fs, path::Path, time::Duration};

const GROUP: &str = "root";
/// An initramfs made in an emulated guest, on a busy machine.
const INITRAMFS_MAX: Duration = Duration::from_secs(600);
const MAKE_MAX: Duration = Duration::from_secs(60);
const DATA_PARTITION: &str = "3c9e1d5a-7b2f-4e60-8d1c-5a4b3c2d1e0f";
const DATA_UUID: &str = "c0ffee00-1d2c-4b3a-9f8e-7d6c5b4a3928";
const DATA_BYTES: u64 = 48 << 20;

/// What these tests ask a host.
trait Tried {
    fn root_source(&mut self) -> Result<String>;
    fn volumes(&mut self) -> Result<String>;
    fn slow(&mut self, line: &str) -> Result<String>;
    fn boot_anew(&mut self) -> Result<()>;
}

impl Tried for Host {
    fn root_source(&mut self) -> Result<String> {
        self.sh("findmnt -n -o SOURCE /").map(|s| s.trim().to_owned())
    }

    fn volumes(&mut self) -> Result<String> {
        self.sh("dmsetup table").map(|s| s.trim().to_owned())
    }

    fn slow(&mut self, line: &str) -> Result<String> {
        let log = self.guest()?.log_path().display().to_string();
        self.guest()?.sh(line, INITRAMFS_MAX).with_context(|| format!("see {log}"))
    }

    /// In good order, from the power button on.
    fn boot_anew(&mut self) -> Result<()> {
        self.guest.take().context("the host is switched off")?.shut_down()?;
        self.power_on()
    }
}

#[test]
fn a_root_on_a_plain_partition_is_mirrored_by_a_shim() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a shim under a root file system: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    // As `shim add /` notes it, and in the initramfs as that makes it.
    let files = |disk: &Path| -> Result<Vec<install::Put<'static>>> {
        let (id, sectors) = (install::root_partition_id(disk)?, install::root_partition_sectors(disk)?);
        Ok(vec![("/etc/holdfast-agent/shims", format!("holdfast-root {sectors} partition {id}\n"))])
    };
    let mut host = Host::with_files(&bins, dir.path(), Profile::PARTITION, Options::default(), files)?;
    let root = install::root(&host.disk)?;
    assert_eq!(host.root_source()?, "/dev/mapper/holdfast-root");
    let table = host.volumes()?;
    ensure!(table.starts_with("holdfast-root: 0 ") && table.contains(" linear "), "{table}");
    let links =
        host.sh("for l in /dev/disk/by-uuid/* /dev/disk/by-partuuid/*; do echo \"$l $(readlink -f \"$l\")\"; done")?;
    let over = format!("/dev/disk/by-partuuid/{} /dev/dm-0", install::root_partition_id(&host.disk)?);
    ensure!(links.contains(&over), "no {over} in {links}");
    let failed = host.sh("systemctl --failed --no-legend")?;
    ensure!(failed.trim().is_empty(), "{failed}");
    let grub =
        host.slow("grub-probe --target=fs_uuid / 2>&1; grub-mkconfig 2>/dev/null | grep -o 'root=[^ ]*' | sort -u")?;
    println!("GRUB's tools under a shim: {grub}");
    let uuid = host.sh("findmnt -n -o UUID /")?;
    ensure!(grub.ends_with(&format!("root=UUID={uuid}")), "a boot would wait for something else: {grub}");
    host.sh("modprobe nbd && echo nbd >/etc/modules-load.d/holdfast-agent.conf")?;
    host.join(&appliance)?;

    // Mirrored under a writer.
    host.sh("(i=0; while [ -e /run/write ] || [ $i -eq 0 ]; do : >/run/write; dd if=/dev/urandom of=/srv/b$((i%4)) bs=64k count=8 conv=fsync; i=$((i+1)); done >/dev/null 2>&1 &)")?;
    host.sh(&format!("holdfast-agent protect --sync --wait-ms 2000 /dev/mapper/holdfast-root --group {GROUP}"))?;
    let in_sync = |host: &mut Host| {
        host.wait_group("the host's writes to wait for the box", |g| g["state"] == "replicating" && g["gate"] == "sync")
    };
    in_sync(&mut host)?;
    ensure!(host.volumes()?.contains("mirror core"), "{}", host.volumes()?);
    host.assert_identical(&appliance, GROUP, root)?;
    let refused = host.sh("! holdfast-agent shim remove holdfast-root")?;
    ensure!(refused.contains("unprotect its group first"), "{refused}");

    // The power goes while the writer writes; it boots into the shim and is mirrored again.
    host.guest.take().context("the host is switched off")?.power_off_hard()?;
    host.power_on()?;
    assert_eq!(host.root_source()?, "/dev/mapper/holdfast-root");
    in_sync(&mut host)?;
    host.sh("dd if=/dev/urandom of=/srv/again bs=1M count=4 conv=fsync 2>/dev/null")?;
    host.assert_identical(&appliance, GROUP, root)?;

    // Not mirrored any more, and mounted on.
    host.sh(&format!("holdfast-agent unprotect {GROUP}"))?;
    assert_eq!(host.volumes()?, table);
    host.guest.take().context("the host is switched off")?.shut_down()?;
    appliance.stop()?;
    dir.done()
}

/// A disk with one partition and an ext4 in it.
fn data_disk(path: &Path) -> Result<()> {
    fs::File::create(path)?.set_len(DATA_BYTES)?;
    let file = path.to_string_lossy();
    call("sgdisk", &["-n1:2048:0", &format!("-u1:{DATA_PARTITION}"), &file], MAKE_MAX)?;
    let words = ["-q", "-F", "-t", "ext4", "-U", DATA_UUID, "-E", "offset=1048576", &file, "40M"];
    call("mke2fs", &words, MAKE_MAX).map(drop)
}

#[test]
fn a_shim_that_is_not_as_it_was_noted_never_keeps_a_host_from_booting() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("broken shims of a Debian host: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let data = dir.path().join("data.raw");
    data_disk(&data)?;
    let options = Options { disks: vec![data], ..Options::default() };
    // The root has another size than was noted, one partition is gone, and one is as it should be.
    let data_sectors = DATA_BYTES / 512 - 2048 - 33;
    let files = |disk: &Path| -> Result<Vec<install::Put<'static>>> {
        let root = install::root_partition_id(disk)?;
        let shims = format!(
            "holdfast-root 4096 partition {root}\nholdfast-gone 4096 partition 00000000-0000-4000-8000-000000000001\n\
             holdfast-data {data_sectors} partition {DATA_PARTITION}\n"
        );
        let mount = format!("[Mount]\nWhat=/dev/disk/by-uuid/{DATA_UUID}\nWhere=/srv/data\nType=ext4\n");
        Ok(vec![
            ("/etc/holdfast-agent/shims", shims),
            ("/etc/systemd/system/srv-data.mount", mount),
            ("/etc/systemd/system/local-fs.target.d/data.conf", "[Unit]\nRequires=srv-data.mount\n".to_owned()),
        ])
    };
    let mut host = Host::with_files(&bins, dir.path(), Profile::PARTITION, options, files)?;
    assert_eq!(host.root_source()?, "/dev/vda4");
    let inside = host.sh("lsinitramfs /boot/initrd.img-* | grep -e shim")?;
    ensure!(inside.contains("etc/holdfast-agent/shims") && inside.contains("59-holdfast-shim.rules"), "{inside}");
    let listed = host.sh("holdfast-agent shim list")?;
    let state = |name: &str| listed.lines().find(|l| l.contains(name)).unwrap_or_default();
    ensure!(state("holdfast-root").contains("4096 were noted"), "{listed}");
    ensure!(state("holdfast-gone").contains("its disk is not on this host"), "{listed}");
    ensure!(state("holdfast-data").contains("in use"), "{listed}");
    assert_eq!(host.sh("findmnt -n -o SOURCE /srv/data")?.trim(), "/dev/mapper/holdfast-data");
    host.sh("echo kept >/srv/data/file && sync")?;

    // A list that cannot be read, in the running system only: udev looks again, and nobody loses a device.
    host.sh("cp /etc/holdfast-agent/shims /run/shims && echo rubbish >>/etc/holdfast-agent/shims && udevadm trigger --settle /dev/vda4")?;
    ensure!(host.sh("readlink -f /dev/disk/by-partuuid/*")?.contains("/dev/vda4"), "the root lost its link");
    let refused = host.sh("! holdfast-agent shim list")?;
    ensure!(refused.contains("line 4 is no shim"), "{refused}");
    host.sh("cp /run/shims /etc/holdfast-agent/shims")?;

    // One that is mounted stays until the boot, the rest goes; nothing is left after it, and the mount is plain.
    let said = host.slow("systemctl stop holdfast-agent; holdfast-agent remove")?;
    ensure!(said.contains("/dev/mapper/holdfast-data is in use, and gone after the next boot"), "{said}");
    assert_eq!(host.sh("ls /etc/holdfast-agent")?.trim(), "config.toml");
    host.boot_anew()?;
    assert_eq!((host.root_source()?, host.volumes()?), ("/dev/vda4".to_owned(), "No devices found".to_owned()));
    assert_eq!(host.sh("findmnt -n -o SOURCE /srv/data; cat /srv/data/file")?.trim(), "/dev/vdb1\nkept");

    // A disk that nobody uses gets its shim at once, and loses it at once.
    host.sh("systemctl stop srv-data.mount")?;
    let said = host.slow("holdfast-agent shim add /dev/vdb1 --name holdfast-data")?;
    ensure!(said.contains("is now /dev/mapper/holdfast-data"), "{said}");
    host.sh("udevadm settle && systemctl start srv-data.mount")?;
    assert_eq!(
        host.sh("findmnt -n -o SOURCE /srv/data; cat /srv/data/file")?.trim(),
        "/dev/mapper/holdfast-data\nkept"
    );
    host.guest.take().context("the host is switched off")?.shut_down()?;
    dir.done()
}

#[test]
fn a_shim_of_the_root_comes_with_a_boot_and_goes_with_one() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a shim that comes and goes: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut host = Host::new(&bins, dir.path(), Profile::PARTITION, Options::default())?;
    for asked in ["holdfast-agent disks", "holdfast-agent disks /"] {
        let said = host.sh(asked)?;
        ensure!(said.contains("holdfast-agent shim add /dev/vda4"), "{asked}: {said}");
    }
    // One that a boot could not mount any more is refused.
    host.sh("cp /etc/fstab /run/fstab && echo '/dev/vda3 /boot ext4 defaults 0 0' >/etc/fstab")?;
    let refused = host.sh("! holdfast-agent shim add /boot")?;
    ensure!(refused.contains("/etc/fstab line 1 mounts /dev/vda3 as /dev/vda3"), "{refused}");
    host.sh("cp /run/fstab /etc/fstab")?;

    let said = host.slow("holdfast-agent shim add /")?;
    ensure!(said.contains("from the next boot on") && said.contains("/dev/mapper/holdfast-root"), "{said}");
    let listed = host.sh("holdfast-agent shim list")?;
    ensure!(listed.contains("waits for the next boot"), "{listed}");
    assert_eq!((host.root_source()?, host.volumes()?), ("/dev/vda4".to_owned(), "No devices found".to_owned()));
    host.boot_anew()?;
    assert_eq!(host.root_source()?, "/dev/mapper/holdfast-root");

    // Nor may it go while a boot would wait for it.
    host.sh("cp /etc/fstab /run/fstab && echo '/dev/mapper/holdfast-root / ext4 defaults 0 0' >>/etc/fstab")?;
    let refused = host.sh("! holdfast-agent shim remove holdfast-root")?;
    ensure!(refused.contains("/etc/fstab names /dev/mapper/holdfast-root"), "{refused}");
    host.sh("cp /run/fstab /etc/fstab")?;
    let said = host.slow("holdfast-agent shim remove holdfast-root")?;
    ensure!(said.contains("gone after the next boot"), "{said}");
    host.boot_anew()?;
    assert_eq!((host.root_source()?, host.volumes()?), ("/dev/vda4".to_owned(), "No devices found".to_owned()));
    assert_eq!(host.sh("ls /etc/holdfast-agent")?.trim(), "config.toml");
    let inside = host.sh("lsinitramfs /boot/initrd.img-* | grep -e shim || true")?;
    assert_eq!(inside.trim(), "", "left in the initramfs");
    host.guest.take().context("the host is switched off")?.shut_down()?;
    dir.done()
}
