//! The disk of a Debian host, made from packages.

use crate::{
    guest::lock,
    process::{call, run},
    tools,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// mmdebstrap downloads and unpacks a hundred packages.
const TREE_MAX: Duration = Duration::from_secs(900);
const STEP_MAX: Duration = Duration::from_secs(300);
const MIRROR: &str = "http://deb.debian.org/debian";
const SUITE: &str = "bookworm";

/// Sectors where the partitions begin; the last ends 1 MiB before the disk does.
const SECTOR: u64 = 512;
const BIOS_START: u64 = 2048;
const ESP_START: u64 = 4096;
const BOOT_START: u64 = 36 << 11;
const ROOT_START: u64 = 164 << 11;

const BOOT_UUID: &str = "5b1d0c52-70e7-4d6e-9a55-1f2d3c4b5a61";
const ROOT_UUID: &str = "9d2f6a34-3a0b-4a7e-8f43-0c1e2d3f4a52";

const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "initramfs-tools",
    "lvm2",
    "e2fsprogs",
    "linux-image-amd64",
    "kmod",
    "iproute2",
    "procps",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "grub2-common",
    "zstd",
];

/// Folders of the kernel's modules that no guest needs: four fifths of them.
const NO_MODULES: &[&str] = &[
    "drivers/accel",
    "drivers/bluetooth",
    "drivers/comedi",
    "drivers/crypto",
    "drivers/edac",
    "drivers/gpu",
    "drivers/hid",
    "drivers/hwmon",
    "drivers/i2c",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/input",
    "drivers/isdn",
    "drivers/leds",
    "drivers/media",
    "drivers/mfd",
    "drivers/mmc",
    "drivers/mtd",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/nvme",
    "drivers/platform",
    "drivers/power",
    "drivers/scsi",
    "drivers/spi",
    "drivers/staging",
    "drivers/target",
    "drivers/usb",
    "drivers/video",
    "drivers/watchdog",
    "fs/ceph",
    "fs/f2fs",
    "fs/gfs2",
    "fs/jfs",
    "fs/nfs",
    "fs/nfsd",
    "fs/ocfs2",
    "fs/smb",
    "net/bluetooth",
    "net/mac80211",
    "net/wireless",
    "sound",
];

/// In the initramfs, whatever initramfs-tools and the packages' hooks add.
const MODULES: &str = "virtio_pci\nvirtio_blk\nvirtio_net\next4\ncrc32c_generic\ndm-mod\n";

/// Units that do nothing for a test: each takes up to a second of an emulated boot, or writes at some time of its own.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty@tty1.service",
    "modprobe@configfs.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-binfmt.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-initrd.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-user-sessions.service",
];

/// Answers commands on the second serial port as the busybox guest does. Not in /tmp: that is on the root file system.
const SHELL: &str = r#"#!/bin/sh
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
ip link set lo up
ip link set eth0 up && ip addr replace 10.0.2.15/24 dev eth0 && ip route replace default via 10.0.2.2
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo HF-SHELL >&3
while read -r number line <&3; do
	eval "$line" >/run/guest-shell.output 2>&1 </dev/null
	status=$?
	cat /run/guest-shell.output >&3
	printf '\nHF-END %s %s\n' "$number" "$status" >&3
done
"#;

const SHELL_UNIT: &str = "[Unit]
Description=Commands from the second serial port
After=local-fs.target
Before=network.target
Wants=network.target
[Service]
ExecStart=/usr/local/sbin/guest-shell
Restart=always
KillMode=process
[Install]
WantedBy=multi-user.target
";

const JOURNAL: &str = "[Journal]
Storage=volatile
ForwardToConsole=yes
MaxLevelConsole=info
";

const KERNEL_LINE: &str = "ro console=ttyS0 net.ifnames=0 mitigations=off random.trust_cpu=on apparmor=0 audit=0 systemd.show_status=0 systemd.log_level=notice quiet panic=-1";

/// What the root file system lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// The fourth partition.
    Partition,
    /// The logical volume `vg/root`, alone in the fourth partition; 64 MiB of the group are free.
    Lvm,
}

/// Which Debian host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Profile {
    pub root: Root,
    /// With the package postgresql, its cluster `main` made and its service enabled.
    pub postgresql: bool,
}

impl Profile {
    pub const PARTITION: Self = Self { root: Root::Partition, postgresql: false };
    pub const LVM: Self = Self { root: Root::Lvm, postgresql: false };
    pub const POSTGRESQL: Self = Self { root: Root::Partition, postgresql: true };

    /// Those that tests boot.
    pub const TESTED: [Self; 3] = [Self::PARTITION, Self::LVM, Self::POSTGRESQL];

    fn disk_bytes(self) -> u64 {
        if self.postgresql { 3 << 29 } else { 1 << 30 }
    }
    fn packages(self) -> String {
        let more = self.postgresql.then_some("postgresql");
        PACKAGES.iter().copied().chain(more).collect::<Vec<_>>().join(",")
    }
}

/// A bootable disk in the cache; never written to.
#[derive(Clone, Debug)]
pub struct DebianImage {
    disk: PathBuf,
    pub profile: Profile,
}

impl DebianImage {
    /// Why it cannot be made or used here, if it cannot.
    pub fn refused() -> Option<&'static str> {
        (!tools::is_root()).then_some("a Debian disk is made by root")
    }

    /// The image of a profile, made once into `cache`.
    pub fn get(profile: Profile, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache)?;
        let cache = cache.canonicalize()?;
        let _lock = lock(&cache.join("debian.lock"))?;
        let dir = cache.join("debian");
        fs::create_dir_all(&dir)?;
        let root = if profile.root == Root::Lvm { "lvm" } else { "partition" };
        let extra = if profile.postgresql { "-postgresql" } else { "" };
        let disk = dir.join(format!("{root}{extra}-{}.img", key()));
        if !disk.exists() {
            if let Some(why) = Self::refused() {
                bail!("{why}");
            }
            let tree = tree(profile, &dir)?;
            let making = Making { profile, tree, work: dir.join(format!("{root}{extra}.making")) };
            if making.work.exists() {
                fs::remove_dir_all(&making.work)?;
            }
            fs::create_dir_all(&making.work)?;
            let made = making.disk()?;
            fs::rename(&made, &disk)?;
            fs::remove_dir_all(&making.work)?;
        }
        Ok(Self { disk, profile })
    }

    /// The raw disk.
    pub fn path(&self) -> &Path {
        &self.disk
    }
    pub fn bytes(&self) -> u64 {
        self.profile.disk_bytes()
    }

    /// A disk of one's own that begins as this one.
    pub fn overlay(&self, to: &Path) -> Result<PathBuf> {
        call("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &text(&self.disk), &text(to)], STEP_MAX)?;
        Ok(to.to_owned())
    }
}

/// Changes with all that goes in: this very file.
fn key() -> String {
    let hash = include_bytes!("image.rs")
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The installed system as a folder, made once; what an earlier version of this file made goes.
fn tree(profile: Profile, dir: &Path) -> Result<PathBuf> {
    let name = if profile.postgresql { "tree-postgresql" } else { "tree" };
    let tree = dir.join(name);
    let complete = dir.join(format!("{name}.complete"));
    if tree.exists() && fs::read_to_string(&complete).is_ok_and(|k| k == key()) {
        return Ok(tree);
    }
    for old in fs::read_dir(dir)? {
        let old = old?.path();
        if old.extension().is_some_and(|e| e == "img") && !text(&old).contains(&key()) {
            fs::remove_file(&old)?;
        }
    }
    if complete.exists() {
        fs::remove_file(&complete)?;
    }
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let modules = dir.join("modules");
    fs::write(&modules, MODULES)?;
    let mut command = Command::new(tools::need("mmdebstrap")?);
    command.args(["--quiet", "--mode=root", "--variant=apt", "--components=main", "--architectures=amd64"]);
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    // What a power cut would take is made again.
    command.arg("--dpkgopt=force-unsafe-io");
    for folder in NO_MODULES {
        command.arg(format!("--dpkgopt=path-exclude=/lib/modules/*/kernel/{folder}/*"));
    }
    for folder in ["man", "doc", "locale", "info", "lintian", "bug", "i18n/locales"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    command.arg(format!("--include={}", profile.packages()));
    // Before the kernel is unpacked, so that its initramfs is made once and right.
    command.arg(format!(
        "--essential-hook=mkdir -p \"$1/etc/initramfs-tools/conf.d\" \"$1/usr/share/initramfs-tools/modules.d\"; \
         printf 'MODULES=list\\nRESUME=none\\nCOMPRESS=gzip\\n' >\"$1/etc/initramfs-tools/conf.d/guest\"; \
         cp '{}' \"$1/usr/share/initramfs-tools/modules.d/guest\"",
        modules.display()
    ));
    command.arg(SUITE).arg(&tree).arg(MIRROR);
    run(command, TREE_MAX)?.ok()?;
    furnish(&tree)?;
    // A file system of its own in the image.
    let boot = boot_of(&tree);
    if boot.exists() {
        fs::remove_dir_all(&boot)?;
    }
    fs::rename(tree.join("boot"), &boot)?;
    fs::create_dir(tree.join("boot"))?;
    fs::write(&complete, key())?;
    Ok(tree)
}

/// Where the content of a tree's `/boot` is kept.
fn boot_of(tree: &Path) -> PathBuf {
    tree.with_extension("boot")
}

/// What makes a guest of the installed system.
fn furnish(tree: &Path) -> Result<()> {
    let put = |path: &str, mode: u32, content: &str| -> Result<()> {
        let path = tree.join(path);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    };
    put("etc/hostname", 0o644, "guest\n")?;
    put("etc/hosts", 0o644, "127.0.0.1 localhost guest\n10.0.2.2 box\n")?;
    put("etc/machine-id", 0o444, "7c1f0a9e5b3d4c2f8a6e1d0b9c8f7e6a\n")?;
    put("usr/local/sbin/guest-shell", 0o755, SHELL)?;
    put("etc/systemd/system/guest-shell.service", 0o644, SHELL_UNIT)?;
    put("etc/systemd/journald.conf.d/guest.conf", 0o644, JOURNAL)?;
    let units = tree.join("etc/systemd/system");
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink("/etc/systemd/system/guest-shell.service", wants.join("guest-shell.service"))?;
    for unit in MASKED {
        let link = units.join(unit);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        symlink("/dev/null", link)?;
    }
    Ok(())
}

/// One disk being made.
struct Making {
    profile: Profile,
    tree: PathBuf,
    work: PathBuf,
}

impl Making {
    fn disk(&self) -> Result<PathBuf> {
        let disk = self.work.join("disk.img");
        File::create(&disk)?.set_len(self.profile.disk_bytes())?;
        let mut table = Command::new(tools::need("sgdisk")?);
        for (n, start, kind) in [
            (1, BIOS_START, "ef02"),
            (2, ESP_START, "ef00"),
            (3, BOOT_START, "8300"),
            (4, ROOT_START, self.root_kind()),
        ] {
            let end = match n {
                1 => ESP_START - 1,
                2 => BOOT_START - 1,
                3 => ROOT_START - 1,
                _ => self.root_end() - 1,
            };
            table.arg(format!("--new={n}:{start}:{end}")).arg(format!("--typecode={n}:{kind}"));
        }
        table.arg(&disk);
        run(table, STEP_MAX)?.ok()?;
        self.boot(&disk)?;
        self.root(&disk)?;
        Ok(disk)
    }

    fn root_kind(&self) -> &'static str {
        if self.profile.root == Root::Lvm { "8e00" } else { "8300" }
    }
    /// In sectors.
    fn root_end(&self) -> u64 {
        self.profile.disk_bytes() / SECTOR - 2048
    }
    fn root_device(&self) -> String {
        match self.profile.root {
            Root::Partition => format!("UUID={ROOT_UUID}"),
            Root::Lvm => "/dev/mapper/vg-root".to_owned(),
        }
    }

    /// GRUB in its places, `/boot` and the ESP.
    fn boot(&self, disk: &Path) -> Result<()> {
        let boot = boot_of(&self.tree);
        let version = fs::read_dir(&boot)?
            .filter_map(|e| e.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))
            .next()
            .with_context(|| format!("no kernel in {}", boot.display()))?;
        let temporary = |name: &str| self.tree.join("tmp").join(name);
        let early = format!("search.fs_uuid {BOOT_UUID} root\nset prefix=($root)/grub\nconfigfile $prefix/grub.cfg\n");
        fs::write(temporary("early.cfg"), early)?;
        let common =
            ["normal", "linux", "configfile", "search_fs_uuid", "part_gpt", "ext2", "serial", "terminal", "echo"];
        for (format, to, more) in [("i386-pc", "core.img", "biosdisk"), ("x86_64-efi", "grub.efi", "boot")] {
            let mut command = Command::new(tools::need("chroot")?);
            command.arg(&self.tree).args(["grub-mkimage", "-O", format, "-o", &format!("/tmp/{to}"), "-p", "/grub"]);
            command.args(["-c", "/tmp/early.cfg"]).args(common).arg(more);
            run(command, STEP_MAX)?.ok()?;
        }
        self.bios(disk, &temporary("core.img"))?;

        let esp = self.work.join("esp.img");
        File::create(&esp)?.set_len((BOOT_START - ESP_START) * SECTOR)?;
        call("mkfs.vfat", &["-i", "48464553", &text(&esp)], STEP_MAX)?;
        call("mmd", &["-i", &text(&esp), "::/EFI", "::/EFI/BOOT"], STEP_MAX)?;
        call("mcopy", &["-i", &text(&esp), &text(&temporary("grub.efi")), "::/EFI/BOOT/BOOTX64.EFI"], STEP_MAX)?;
        put(&esp, disk, ESP_START)?;
        for made in ["early.cfg", "core.img", "grub.efi"] {
            fs::remove_file(temporary(made))?;
        }

        let menu = format!(
            "serial --unit=0 --speed=115200\nterminal_output serial\nlinux /vmlinuz-{version} root={} {KERNEL_LINE}\ninitrd /initrd.img-{version}\nboot\n",
            self.root_device()
        );
        fs::create_dir_all(boot.join("grub"))?;
        fs::write(boot.join("grub/grub.cfg"), menu)?;
        let image = self.work.join("boot.img");
        ext4(&image, (ROOT_START - BOOT_START) * SECTOR, BOOT_UUID, &boot)?;
        put(&image, disk, BOOT_START)
    }

    /// What `grub-bios-setup` does: the first stage into the first sector, saying where the second lies; the second one's first sector says
    /// where the rest of it lies.
    fn bios(&self, disk: &Path, core: &Path) -> Result<()> {
        let first = fs::read(self.tree.join("usr/lib/grub/i386-pc/boot.img"))?;
        let mut core = fs::read(core)?;
        ensure!(first.len() == 512 && core.len() > 512, "GRUB's images are not as expected");
        ensure!(core.len() as u64 <= (ESP_START - BIOS_START) * SECTOR, "GRUB is too large for its partition");
        let sectors = (core.len() as u64 - 1) / SECTOR;
        core[500..508].copy_from_slice(&(BIOS_START + 1).to_le_bytes());
        core[508..510].copy_from_slice(&(sectors as u16).to_le_bytes());
        let disk = File::options().write(true).open(disk)?;
        // From 440 on the sector belongs to the partition table.
        let mut sector = first[..440].to_vec();
        sector[0x5c..0x64].copy_from_slice(&BIOS_START.to_le_bytes());
        disk.write_all_at(&sector, 0)?;
        Ok(disk.write_all_at(&core, BIOS_START * SECTOR)?)
    }

    fn root(&self, disk: &Path) -> Result<()> {
        fs::write(
            self.tree.join("etc/fstab"),
            format!("{} / ext4 defaults 0 0\nUUID={BOOT_UUID} /boot ext4 defaults 0 0\n", self.root_device()),
        )?;
        let (start, bytes) = match self.profile.root {
            Root::Partition => (ROOT_START, (self.root_end() - ROOT_START) * SECTOR),
            Root::Lvm => self.volume(disk)?,
        };
        let image = self.work.join("root.img");
        ext4(&image, bytes, ROOT_UUID, &self.tree)?;
        put(&image, disk, start)
    }

    /// A volume group in the fourth partition and `root` in it; where that lies in sectors of the disk, and its bytes.
    fn volume(&self, disk: &Path) -> Result<(u64, u64)> {
        let offset = (ROOT_START * SECTOR).to_string();
        let limit = ((self.root_end() - ROOT_START) * SECTOR).to_string();
        let attached =
            call("losetup", &["--find", "--show", "--offset", &offset, "--sizelimit", &limit, &text(disk)], STEP_MAX)?;
        let device = attached.stdout.trim().to_owned();
        let made = lvm_on(&device);
        call("losetup", &["--detach", &device], STEP_MAX)?;
        let (first, bytes) = made?;
        Ok((ROOT_START + first, bytes))
    }
}

/// With no device mapper: nothing is activated, only LVM's own metadata written. Answers where the volume begins on the device, in
/// sectors, and its bytes.
fn lvm_on(device: &str) -> Result<(u64, u64)> {
    let config = format!(
        "devices{{use_devicesfile=0 filter=[\"a|^{device}$|\",\"r|.*|\"]}} backup{{backup=0 archive=0}} activation{{udev_sync=0 udev_rules=0}}"
    );
    let lvm = |words: &[&str]| {
        let mut command = Command::new(tools::need("lvm")?);
        command.args(words).args(["--driverloaded", "n", "--config", &config]);
        run(command, STEP_MAX)?.ok()
    };
    lvm(&["pvcreate", "-ff", "-y", device])?;
    lvm(&["vgcreate", "vg", device])?;
    let free = lvm(&["vgs", "--noheadings", "-o", "vg_free_count", "vg"])?;
    let free: u64 = free.stdout.trim().parse().with_context(|| format!("vgs said {:?}", free.stdout))?;
    // In extents of 4 MiB.
    let extents = (free - 16).to_string();
    lvm(&["lvcreate", "-y", "-an", "-Zn", "-Wn", "-l", &extents, "-n", "root", "vg"])?;
    let start = lvm(&["pvs", "--noheadings", "--nosuffix", "--units", "s", "-o", "pe_start", device])?;
    let start: u64 = start.stdout.trim().parse().with_context(|| format!("pvs said {:?}", start.stdout))?;
    Ok((start, (free - 16) * (4 << 20)))
}

fn ext4(image: &Path, bytes: u64, uuid: &str, content: &Path) -> Result<()> {
    File::create(image)?.set_len(bytes)?;
    let lazy = "lazy_itable_init=0,lazy_journal_init=0";
    let words = ["-q", "-F", "-t", "ext4", "-U", uuid, "-E", lazy, "-d", &text(content), &text(image)];
    call("mke2fs", &words, STEP_MAX).map(drop)
}

/// Copies an image into the disk at a sector, holes left as they are.
fn put(image: &Path, disk: &Path, sector: u64) -> Result<()> {
    let mut from = File::open(image)?;
    let to = File::options().write(true).open(disk)?;
    let mut piece = vec![0; 1 << 16];
    let mut at = sector * SECTOR;
    loop {
        let n = from.read(&mut piece)?;
        if n == 0 {
            break;
        }
        if piece[..n].iter().any(|b| *b != 0) {
            to.write_all_at(&piece[..n], at)?;
        }
        at += n as u64;
    }
    Ok(fs::remove_file(image)?)
}
