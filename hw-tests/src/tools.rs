//! System tools: where they are, and which Debian package brings one that is missing.

use anyhow::{Context, Result};
use std::{env, path::PathBuf};

/// A tool we call and the package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    pub name: &'static str,
    pub package: &'static str,
    /// What we use it for; shown when it is missing.
    pub used_for: &'static str,
    /// Commands that cannot do their work without it.
    pub needed_by: &'static [Need],
}

/// A command of `cargo xtask` with needs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Try,
    Test,
    Bench,
    Package,
    /// `try --takeover`.
    Story,
    Rescue,
}

use Need::{Bench, Package, Rescue, Story, Test, Try};

/// QEMU's UEFI firmware: no program, and as needed as one.
pub const OVMF: &str = "/usr/share/ovmf/OVMF.fd";
/// GRUB for both kinds of firmware: no programs either.
pub const GRUB_BIOS: &str = "/usr/lib/grub/i386-pc/moddep.lst";
pub const GRUB_UEFI: &str = "/usr/lib/grub/x86_64-efi/moddep.lst";

/// Every tool anything in this tree calls. `cargo`, `rustc` and git are taken as given.
pub const TOOLS: &[Tool] = &[
    Tool {
        name: "cc",
        package: "gcc",
        used_for: "the C parts of zstd and ring",
        needed_by: &[Try, Test, Bench, Package, Story, Rescue],
    },
    Tool {
        name: "clang",
        package: "clang",
        used_for: "the agent's BPF program",
        needed_by: &[Try, Test, Bench, Package, Story, Rescue],
    },
    Tool {
        name: "mke2fs",
        package: "e2fsprogs",
        used_for: "ext4 on test disks",
        needed_by: &[Try, Test, Bench, Story],
    },
    Tool {
        name: "debugfs",
        package: "e2fsprogs",
        used_for: "changing an ext4 image without root",
        needed_by: &[Try, Test],
    },
    Tool { name: "e2fsck", package: "e2fsprogs", used_for: "checking file systems in views", needed_by: &[Try, Test] },
    Tool { name: "losetup", package: "mount", used_for: "loop disks", needed_by: &[Try, Test, Bench, Story] },
    Tool {
        name: "fsfreeze",
        package: "util-linux",
        used_for: "holding a file system still for the oracle",
        needed_by: &[Try, Test],
    },
    Tool {
        name: "setpriv",
        package: "util-linux",
        used_for: "running the newcomer's command without root",
        needed_by: &[Test],
    },
    Tool {
        name: "unshare",
        package: "util-linux",
        used_for: "installing a package into a guest's disk",
        needed_by: &[Test],
    },
    Tool {
        name: "qemu-img",
        package: "qemu-utils",
        used_for: "qcow2, comparing and converting views",
        needed_by: &[Test, Bench, Story],
    },
    Tool { name: "qemu-nbd", package: "qemu-utils", used_for: "a peer in the bench", needed_by: &[Test, Bench] },
    Tool { name: "qemu-system-x86_64", package: "qemu-system-x86", used_for: "guests", needed_by: &[Test, Story] },
    Tool { name: OVMF, package: "ovmf", used_for: "firmware of UEFI guests", needed_by: &[Test] },
    Tool { name: "nbdcopy", package: "libnbd-bin", used_for: "a foreign NBD client", needed_by: &[Test] },
    Tool { name: "nbdfuse", package: "libnbd-bin", used_for: "a slow disk in the bench", needed_by: &[Bench] },
    Tool { name: "nbdinfo", package: "libnbd-bin", used_for: "a foreign NBD client", needed_by: &[Test] },
    Tool {
        name: "nbd-client",
        package: "nbd-client",
        used_for: "the kernel's NBD client in guests",
        needed_by: &[Test],
    },
    Tool { name: "dmsetup", package: "dmsetup", used_for: "volumes in guests", needed_by: &[Test] },
    Tool {
        name: "busybox",
        package: "busybox-static",
        used_for: "guests' user land",
        needed_by: &[Test, Story, Rescue],
    },
    Tool { name: "cpio", package: "cpio", used_for: "guests' initramfs", needed_by: &[Test] },
    Tool { name: "modprobe", package: "kmod", used_for: "guests' kernel modules", needed_by: &[Test, Story, Rescue] },
    Tool {
        name: "dpkg-deb",
        package: "dpkg",
        used_for: "unpacking the guests' kernel, making packages",
        needed_by: &[Test, Package, Story, Rescue],
    },
    Tool { name: "rpmbuild", package: "rpm", used_for: "making packages", needed_by: &[Test, Package] },
    Tool {
        name: "readelf",
        package: "binutils",
        used_for: "looking whether a program to be packed is static",
        needed_by: &[Test, Package],
    },
    Tool {
        name: "xz",
        package: "xz-utils",
        used_for: "modules of the guests' newer kernels",
        needed_by: &[Test, Story, Rescue],
    },
    Tool {
        name: "drbdsetup",
        package: "drbd-utils",
        used_for: "a peer of sync mode in the bench",
        needed_by: &[Bench],
    },
    Tool { name: "mdadm", package: "mdadm", used_for: "RAID in guests", needed_by: &[Test] },
    Tool { name: "lvm", package: "lvm2", used_for: "logical volumes in guests", needed_by: &[Test] },
    Tool { name: "cryptsetup", package: "cryptsetup-bin", used_for: "LUKS in guests", needed_by: &[Test] },
    Tool { name: "btrfs", package: "btrfs-progs", used_for: "btrfs on test disks", needed_by: &[Test] },
    Tool { name: "xfs_repair", package: "xfsprogs", used_for: "checking XFS", needed_by: &[Test] },
    Tool { name: "psql", package: "postgresql", used_for: "a database on a captured disk", needed_by: &[Test] },
    // The package of the server would start one; its program is in this one too, under this name.
    Tool { name: "redis-check-rdb", package: "redis-tools", used_for: "probes of a real Redis", needed_by: &[Test] },
    Tool { name: "openssl", package: "openssl", used_for: "probes of a server with TLS", needed_by: &[Test] },
    Tool { name: "chromium", package: "chromium", used_for: "the pages in a real browser", needed_by: &[Test] },
    Tool { name: "mmdebstrap", package: "mmdebstrap", used_for: "Debian guests", needed_by: &[Test, Story] },
    Tool { name: "sgdisk", package: "gdisk", used_for: "the partitions of Debian guests", needed_by: &[Test, Story] },
    Tool { name: "mkfs.vfat", package: "dosfstools", used_for: "the ESP of Debian guests", needed_by: &[Test, Story] },
    Tool { name: "mcopy", package: "mtools", used_for: "the ESP of Debian guests", needed_by: &[Test, Story, Rescue] },
    Tool {
        name: "grub-mkrescue",
        package: "grub-common",
        used_for: "the rescue medium",
        needed_by: &[Test, Story, Rescue],
    },
    Tool {
        name: GRUB_BIOS,
        package: "grub-pc-bin",
        used_for: "a rescue medium that boots by BIOS",
        needed_by: &[Test, Story, Rescue],
    },
    Tool {
        name: GRUB_UEFI,
        package: "grub-efi-amd64-bin",
        used_for: "a rescue medium that boots by UEFI",
        needed_by: &[Test, Story, Rescue],
    },
    Tool { name: "xorriso", package: "xorriso", used_for: "the rescue medium", needed_by: &[Test, Story, Rescue] },
    Tool { name: "gzip", package: "gzip", used_for: "the rescue medium", needed_by: &[Test, Story, Rescue] },
    Tool { name: "shellcheck", package: "shellcheck", used_for: "checking scripts", needed_by: &[Test] },
    Tool { name: "ip", package: "iproute2", used_for: "network faults", needed_by: &[Test, Story] },
    Tool { name: "nsenter", package: "util-linux", used_for: "a host behind a cable of its own", needed_by: &[Test] },
    Tool { name: "mkfs.xfs", package: "xfsprogs", used_for: "XFS on test disks", needed_by: &[Test] },
    Tool { name: "fio", package: "fio", used_for: "load", needed_by: &[Test, Bench] },
    Tool { name: "nbdkit", package: "nbdkit", used_for: "a peer in the bench", needed_by: &[Test, Bench] },
];

/// Where a tool is. Looks in the system folders too: an ordinary user's PATH has no sbin.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Where a tool is, or an error that says which package has it.
pub fn need(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| match TOOLS.iter().find(|t| t.name == name) {
        Some(tool) => format!("{name} is missing ({}): apt-get install {}", tool.used_for, tool.package),
        None => format!("{name} is missing"),
    })
}

/// Whether we are root in our user namespace.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let error = need("no-such-tool-at-all").unwrap_err().to_string();
        assert_eq!(error, "no-such-tool-at-all is missing");
        assert!(find("sh").is_some());
    }

    #[test]
    fn no_tool_is_listed_twice() {
        for (i, tool) in TOOLS.iter().enumerate() {
            assert!(TOOLS[..i].iter().all(|t| t.name != tool.name), "{} is listed twice", tool.name);
        }
    }
}
