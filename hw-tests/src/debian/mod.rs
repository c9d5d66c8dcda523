//! A whole Debian host for tests: a bootable disk with systemd, udev, LVM and initramfs-tools, made once from Debian's packages.
//!
//! [`Guest`](crate::guest::Guest) runs a kernel and busybox, and boots in seconds; what it cannot show is a *reboot*: an initramfs made by the
//! distribution's own tools, units started and stopped in order, a root file system that is mounted first and unmounted last. [`DebianGuest`]
//! is for that. It is driven by the same [`sh`](DebianGuest::sh).
//!
//! # What is made
//!
//! - A tree, by mmdebstrap, from the machine's own Debian mirror: bookworm, its kernel, no recommended packages, no documentation, and only the
//!   kernel's modules that a guest may need. A service answers on the second serial port.
//! - A raw disk of 1 GiB (1.5 GiB with PostgreSQL), sparse: GPT; 1 a BIOS boot partition with GRUB, 2 an ESP with GRUB, 3 `/boot`, 4 the
//!   root as ext4, or an LVM physical volume whose logical volume `vg/root` is it. It boots with `-drive` alone, by BIOS and by UEFI.
//!
//! All of it is put together without mounting anything: file systems by `mke2fs -d` and mtools, GRUB's sectors as `grub-bios-setup` writes them,
//! LVM's labels by LVM's own tools on a loop device with no device mapper. That takes root and about a minute, once for each folder of
//! guests; what went in is the name's key, so that a change of `image.rs` makes it anew. `cargo xtask deps` does it before tests are timed.
//!
//! A test gets an [`overlay`](DebianImage::overlay), which is its own and costs nothing; the image itself is never written to. A raw copy is for
//! tests that compare the disk byte by byte, and for [`install`], which puts a package into it.
//!
//! # Limits
//!
//! Emulated: half a minute from power-on to the shell. Nobody logs in, no host keys, no clock service. The mirror's newest packages are
//! taken: what is tested is today's bookworm.

pub mod host;
mod image;
pub mod install;

pub use image::{DebianImage, Profile, Root};

use crate::{
    guest::Guest,
    tools::{self, OVMF},
};
use anyhow::Result;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(300);

/// The firmware a guest starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

/// What a guest gets besides its system disk.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub firmware: Firmware,
    /// More disks, raw: `/dev/vdb` and on.
    pub disks: Vec<PathBuf>,
    /// More words for QEMU.
    pub args: Vec<String>,
    /// TCP ports of this machine's loopback that lead to ports of the guest.
    pub forwards: Vec<(u16, u16)>,
    /// Where its network card is plugged in; none: into QEMU's own network.
    pub tap: Option<Tap>,
}

/// An interface of this machine, and the hardware address of the card behind it.
#[derive(Clone, Debug)]
pub struct Tap {
    pub name: &'static str,
    pub mac: &'static str,
}

/// A running Debian; powered off hard when dropped.
///
/// Its network is QEMU's own, unless it has a tap: the guest is 10.0.2.15, and 10.0.2.2 is this machine's loopback.
#[derive(Debug)]
pub struct DebianGuest {
    guest: Guest,
}

impl DebianGuest {
    /// Boots from a disk, qcow2 by its name's end, else raw; `dir` is for sockets and the console's log.
    pub fn boot(disk: &Path, dir: &Path, options: &Options) -> Result<Self> {
        let mut this = Self::switch_on(disk, dir, options)?;
        this.guest.wait_shell()?;
        Ok(this)
    }

    /// As [`boot`](Self::boot), and waits for nothing in it: it may boot something else first.
    pub fn switch_on(disk: &Path, dir: &Path, options: &Options) -> Result<Self> {
        let mut args: Vec<String> = Vec::new();
        if options.firmware == Firmware::Uefi {
            tools::need(OVMF)?;
            args.extend(["-bios".to_owned(), OVMF.to_owned()]);
        }
        let mut drive = |file: &Path, format: &str| {
            args.push("-drive".to_owned());
            args.push(format!("file={},if=virtio,format={format},cache=writeback,discard=unmap", file.display()));
        };
        drive(disk, if disk.extension().is_some_and(|e| e == "qcow2") { "qcow2" } else { "raw" });
        options.disks.iter().for_each(|d| drive(d, "raw"));
        let forwards: String =
            options.forwards.iter().map(|(ours, its)| format!(",hostfwd=tcp:127.0.0.1:{ours}-:{its}")).collect();
        let (wire, mac) = match &options.tap {
            None => (format!("user,id=net{forwards}"), String::new()),
            Some(tap) => {
                (format!("tap,id=net,ifname={},script=no,downscript=no", tap.name), format!(",mac={}", tap.mac))
            }
        };
        args.extend(["-netdev".to_owned(), wire]);
        args.extend(["-device".to_owned(), format!("virtio-net-pci,netdev=net,romfile={mac}")]);
        args.extend(options.args.iter().cloned());
        Ok(Self { guest: Guest::switch_on(dir, &args)? })
    }

    /// Runs a command in the guest and returns its output; fails when it fails.
    pub fn sh(&mut self, line: &str, limit: Duration) -> Result<String> {
        self.guest.sh(line, limit)
    }

    /// An orderly reboot, and waits for the shell of the next boot.
    pub fn reboot(&mut self) -> Result<()> {
        // In the background: the answer must be out before the shell is stopped.
        self.sh("(sleep 1; systemctl reboot) >/dev/null 2>&1 &", STEP_MAX)?;
        self.guest.wait_shell()
    }

    /// An orderly end, to the last write.
    pub fn shut_down(mut self) -> Result<()> {
        self.sh("(sleep 1; systemctl poweroff) >/dev/null 2>&1 &", STEP_MAX)?;
        self.guest.wait_end(STEP_MAX)
    }

    /// The power goes: nothing in the guest's caches survives. Its disks stay with the caller.
    pub fn power_off_hard(self) -> Result<()> {
        self.guest.power_off()
    }

    /// What it printed on its console.
    pub fn log_path(&self) -> &Path {
        self.guest.log_path()
    }
    /// The machine under it.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }
}
