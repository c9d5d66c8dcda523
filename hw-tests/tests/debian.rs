//! Whole Debian hosts: they boot by their own boot loader and initramfs, and go down and come back as hosts do.

use anyhow::Result;
use hw_tests::{
    Scratch,
    debian::{DebianGuest, DebianImage, Firmware, Options, Profile},
};
use std::{path::PathBuf, time::Duration};

const STEP_MAX: Duration = Duration::from_secs(120);

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest")
}

fn boots(profile: Profile, firmware: Firmware, root: &str) -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a Debian host of its own: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let image = DebianImage::get(profile, &cache())?;
    let disk = image.overlay(&dir.path().join("disk.qcow2"))?;
    let options = Options { firmware, ..Options::default() };
    let mut guest = DebianGuest::boot(&disk, &dir.path().join("guest"), &options)?;
    let source = guest.sh("findmnt -no SOURCE /", STEP_MAX)?;
    assert_eq!(source.trim(), root);
    let efi = guest.sh("[ -d /sys/firmware/efi ] && echo efi || echo bios", STEP_MAX)?;
    assert_eq!(efi.trim(), if firmware == Firmware::Uefi { "efi" } else { "bios" });
    let failed = guest.sh("systemctl --failed --no-legend", STEP_MAX)?;
    assert_eq!(failed.trim(), "", "units that failed");
    guest.shut_down()?;
    dir.done()
}

#[test]
fn a_debian_host_boots_from_its_partition_by_bios() -> Result<()> {
    boots(Profile::PARTITION, Firmware::Bios, "/dev/vda4")
}

#[test]
fn a_debian_host_boots_from_its_logical_volume_by_uefi() -> Result<()> {
    boots(Profile::LVM, Firmware::Uefi, "/dev/mapper/vg-root")
}
