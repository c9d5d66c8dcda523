//! A package in a Debian disk before it boots: unpacked and configured in a chroot, its initramfs made there, at this machine's speed.

use crate::{process, tools};
use anyhow::{Context, Result, ensure};
use std::{fs::File, os::unix::fs::FileExt, path::Path, process::Command, time::Duration};

/// Making an initramfs takes most of it.
const INSTALL_MAX: Duration = Duration::from_secs(300);
/// Of the partitions that [`super::DebianImage`] makes.
const BOOT: usize = 3;
pub const ROOT: usize = 4;

/// Where a partition of a raw disk lies, in bytes: begin and length.
pub fn partition(disk: &Path, number: usize) -> Result<(u64, u64)> {
    // GPT: 128 bytes for each partition from the third sector on; first and last sector at 32 and 40.
    let mut entry = [0; 128];
    File::open(disk)?.read_exact_at(&mut entry, 2 * 512 + (number as u64 - 1) * 128)?;
    let at = |from: usize| u64::from_le_bytes(std::array::from_fn(|i| entry[from + i]));
    let (first, last) = (at(32), at(40));
    ensure!(first > 0 && last >= first, "{} has no partition {number}", disk.display());
    Ok((first * 512, (last + 1 - first) * 512))
}

/// What is done in a mount name space of its own, so that nothing stays mounted whatever happens. No /sys: nothing of this machine's kernel is
/// to be seen by what runs there.
const SCRIPT: &str = r#"set -eu
disk=$1 at=$2 boot=$3 root=$4 deb=$5 more=$6
mount -o "loop,$root" "$disk" "$at"
mount -o "loop,$boot" "$disk" "$at/boot"
mount -t proc proc "$at/proc"
mount --bind /dev "$at/dev"
cp "$deb" "$at/tmp/new.deb"
DEBIAN_FRONTEND=noninteractive chroot "$at" dpkg --force-unsafe-io -i /tmp/new.deb
rm "$at/tmp/new.deb"
config=$at/etc/holdfast-agent/config.toml
# In front: it ends with a table.
(printf '%s' "$more" && cat "$config") >"$at/tmp/config"
cat "$at/tmp/config" >"$config"
rm "$at/tmp/config"
umount "$at/dev" "$at/proc" "$at/boot" "$at"
"#;

/// Installs a deb into a raw disk whose root is the fourth partition, and adds `more` to the agent's configuration. `at`: a folder to mount it on.
pub fn install(disk: &Path, deb: &Path, more: &str, at: &Path) -> Result<()> {
    std::fs::create_dir_all(at)?;
    let options = |number| -> Result<String> {
        let (offset, bytes) = partition(disk, number)?;
        Ok(format!("offset={offset},sizelimit={bytes}"))
    };
    let mut command = Command::new(tools::need("unshare")?);
    command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "install"]).arg(disk).arg(at);
    command.args([options(BOOT)?, options(ROOT)?]).arg(deb).arg(more);
    process::run(command, INSTALL_MAX)?.ok().with_context(|| format!("install {}", deb.display()))?;
    Ok(())
}
