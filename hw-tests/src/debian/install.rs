//! A package in a Debian disk before it boots: unpacked and configured in a chroot, its initramfs made there, at this machine's speed.

use crate::{process, tools};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Making an initramfs takes most of it.
const INSTALL_MAX: Duration = Duration::from_secs(300);
/// Of the partitions that [`super::DebianImage`] makes.
const BOOT: usize = 3;
const ROOT: usize = 4;
/// Where LVM begins with a volume group's data.
const EXTENTS_START: u64 = 1 << 20;

/// Where the root file system of a raw disk lies, in bytes: begin and length. It is an ext4, alone in its partition or the first logical
/// volume there.
pub fn root(disk: &Path) -> Result<(u64, u64)> {
    let (partition, _) = partition(disk, ROOT)?;
    for from in [partition, partition + EXTENTS_START] {
        // The superblock: count of blocks at 4, how long they are at 24, what says that it is one at 56.
        let mut block = [0; 64];
        File::open(disk)?.read_exact_at(&mut block, from + 1024)?;
        let at = |from: usize| u64::from(u32::from_le_bytes(std::array::from_fn(|i| block[from + i])));
        if block[56..58] == [0x53, 0xef] {
            return Ok((from, at(4) * (1024 << at(24))));
        }
    }
    bail!("{} has no ext4 in its partition {ROOT}", disk.display())
}

/// The identifier of the root's partition, as `/dev/disk/by-partuuid` has it.
pub fn root_partition_id(disk: &Path) -> Result<String> {
    let said = process::call("sgdisk", &["-i", &ROOT.to_string(), &disk.to_string_lossy()], INSTALL_MAX)?.stdout;
    let id = said.lines().find_map(|l| l.strip_prefix("Partition unique GUID: "));
    id.map(|id| id.trim().to_lowercase()).with_context(|| format!("sgdisk said {said:?}"))
}

/// The size of the root's partition, in sectors of 512 bytes.
pub fn root_partition_sectors(disk: &Path) -> Result<u64> {
    Ok(partition(disk, ROOT)?.1 / 512)
}

/// Where a partition of a raw disk lies, in bytes: begin and length.
fn partition(disk: &Path, number: usize) -> Result<(u64, u64)> {
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
shift 6
mount -o "loop,$root" "$disk" "$at"
mount -o "loop,$boot" "$disk" "$at/boot"
mount -t proc proc "$at/proc"
mount --bind /dev "$at/dev"
while [ $# -gt 0 ]; do
    mkdir -p "$(dirname "$at$1")"
    printf '%s' "$2" >"$at$1"
    shift 2
done
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

/// A file of a host's: where it lies, and its content.
pub type Put<'a> = (&'a str, String);

/// Installs a deb into a raw disk whose root is [`root`], with `files` put there first, and adds `more` to the agent's configuration. `at`: a folder
/// to mount it on.
pub fn install(disk: &Path, deb: &Path, more: &str, files: &[Put<'_>], at: &Path) -> Result<()> {
    std::fs::create_dir_all(at)?;
    let options = |(offset, bytes): (u64, u64)| format!("offset={offset},sizelimit={bytes}");
    let mut command = Command::new(tools::need("unshare")?);
    command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "install"]).arg(disk).arg(at);
    command.args([options(partition(disk, BOOT)?), options(root(disk)?)]).arg(deb).arg(more);
    command.args(files.iter().flat_map(|(path, content)| [*path, content]));
    process::run(command, INSTALL_MAX)?.ok().with_context(|| format!("install {}", deb.display()))?;
    Ok(())
}

/// Puts the agent and its units into a raw disk's root as its package does, without running anything in it; `more` does what else is to be
/// done there. `at`: a folder to mount it on.
pub fn put_agent(disk: &Path, agent: &Path, at: &Path, more: impl Fn(&Path) -> Result<()>) -> Result<()> {
    let (offset, bytes) = partition(disk, ROOT)?;
    fs::create_dir_all(at)?;
    let options = format!("loop,offset={offset},sizelimit={bytes}");
    process::call("mount", &["-o", &options, &disk.to_string_lossy(), &at.to_string_lossy()], INSTALL_MAX)?;
    let put = || -> Result<()> {
        let packaging = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../agents/linux/packaging");
        for (from, to, mode) in [
            (agent.to_owned(), "usr/bin/holdfast-agent", 0o755),
            (packaging.join("holdfast-agent.service"), "usr/lib/systemd/system/holdfast-agent.service", 0o644),
            (packaging.join("holdfast-inside.service"), "usr/lib/systemd/system/holdfast-inside.service", 0o644),
            (packaging.join("59-holdfast-shim.rules"), "usr/lib/udev/rules.d/59-holdfast-shim.rules", 0o644),
            (packaging.join("60-holdfast-inside.rules"), "usr/lib/udev/rules.d/60-holdfast-inside.rules", 0o644),
        ] {
            let to = at.join(to);
            fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        }
        more(at)
    };
    let done = put();
    process::call("umount", &[&at.to_string_lossy()], INSTALL_MAX)?;
    done
}
