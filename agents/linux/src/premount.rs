//! The root file system before the host mounts it: looked into by the initramfs, so that capture begins before that mount.
//!
//! The list of what is protected lies in a file on the root file system, and mounting that writes, even for reading only: ext4 its journal's
//! superblock, XFS stale blocks of its log. A mount without the journal writes nothing, so that is what is done here, first, and it is over
//! before the real one.
//!
//! - **Only after an orderly end.** A journal that was not replayed hides what the files hold; after a crash there is nothing to carry over, and the
//!   later hook begins capture. ext4 says how it was left in its superblock. XFS does not: what is read from one that was not left in
//!   order may be old, and what is acted on has checksums and says of which boot it is.
//! - **Nobody is left with it.** The mount is in a name space of this process: it goes with the process, however that ends. Were it left, the real
//!   mount would be one without a journal.
//! - **Should it write after all**, the kernel's count of writes shows that, and the groups are compared ([`crate::carry`]).
//!
//! Other file systems are left to the later hook: btrfs may need a subvolume named and further devices, and mounting it read-only does not write.

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// Superblocks of both lie in it.
const LOOK_BYTES: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum PremountError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What is known of a file system that is not mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    /// It can be looked into without writing to it.
    Clean { kind: &'static str, options: &'static str },
    /// A journal is to be replayed, or something to be cleared up, first.
    NotClean,
    /// Of another kind.
    Other,
}

/// Judges the first 4 KiB of a device.
pub fn judge(head: &[u8]) -> Rest {
    const EXT: usize = 1024;
    let short = |at: usize| head.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let long = |at: usize| head.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if head.starts_with(b"XFSB") {
        // Its superblock does not say whether it was mounted since the shutdown, and may not change when it was.
        return Rest::NotClean;
    }
    if short(EXT + 0x38) != 0xef53 {
        return Rest::Other;
    }
    let (clean, errors) = (short(EXT + 0x3a) & 1 != 0, short(EXT + 0x3a) & 2 != 0);
    let replay = long(EXT + 0x60) & 0x4 != 0;
    // Files that were deleted while they were open: as a list, or in a file of their own.
    let orphans = long(EXT + 0xe8) != 0 || long(EXT + 0x64) & 0x1_0000 != 0;
    if !clean || errors || replay || orphans {
        return Rest::NotClean;
    }
    Rest::Clean { kind: "ext4", options: "noload" }
}

/// The root file system, mounted where only this process sees it, until it is dropped.
#[derive(Debug)]
pub struct Looked {
    at: PathBuf,
}

impl Looked {
    /// None: it is not one that may be looked into now. Must be called before threads are made; `at` is made.
    pub fn into(device: &Path, at: &Path) -> Result<Option<Self>, PremountError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| PremountError::Io { what, path, source }
        };
        let mut head = [0; LOOK_BYTES];
        let read = File::open(device).and_then(|file| file.read_exact_at(&mut head, 0));
        read.map_err(failed("read", device))?;
        let Rest::Clean { kind, options } = judge(&head) else { return Ok(None) };
        fs::create_dir_all(at).map_err(failed("make", at))?;
        let root = Path::new("/");
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| failed("have an own view of", root)(e.into()))?;
        mount(None::<&str>, root, None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(|e| failed("have an own view of", root)(e.into()))?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
        mount(Some(device), at, Some(kind), flags, Some(options)).map_err(|e| failed("look into", device)(e.into()))?;
        Ok(Some(Self { at: at.to_owned() }))
    }

    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Looked {
    fn drop(&mut self) {
        if let Err(e) = umount2(&self.at, MntFlags::UMOUNT_NOFOLLOW) {
            // It goes when this process ends.
            crate::carry::tell(&format!("could not unmount {}: {e}", self.at.display()));
        }
        let _ = fs::remove_dir(&self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The first 4 KiB of a fresh file system.
    fn made(program: &str, words: &[&str]) -> Option<(tempfile::TempDir, PathBuf, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        let Ok(done) = Command::new(program).args(words).arg(&image).output() else {
            println!("SKIPPED: {program} is missing");
            return None;
        };
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let head = fs::read(&image).unwrap()[..LOOK_BYTES].to_vec();
        Some((dir, image, head))
    }

    #[test]
    fn how_ext4_was_left_is_read_from_its_superblock() {
        assert_eq!((judge(&[0; LOOK_BYTES]), judge(&[])), (Rest::Other, Rest::Other));
        let Some((_dir, image, head)) = made("mkfs.ext4", &["-q", "-F"]) else { return };
        assert_eq!(judge(&head), Rest::Clean { kind: "ext4", options: "noload" });
        // As e2fsprogs' own tool writes it.
        for (set, wanted) in [
            ("feature needs_recovery", Rest::NotClean),
            ("feature ^needs_recovery", Rest::Clean { kind: "ext4", options: "noload" }),
            ("ssv state 0", Rest::NotClean),
            ("ssv state 3", Rest::NotClean),
            ("ssv state 1", Rest::Clean { kind: "ext4", options: "noload" }),
            ("ssv last_orphan 12", Rest::NotClean),
        ] {
            let done = Command::new("debugfs").args(["-w", "-R", set]).arg(&image).output().unwrap();
            assert!(done.status.success(), "{set}: {}", String::from_utf8_lossy(&done.stderr));
            assert_eq!(judge(&fs::read(&image).unwrap()[..LOOK_BYTES]), wanted, "{set}");
        }
    }

    #[test]
    fn xfs_is_looked_into_without_its_log() {
        let Some((_dir, _, head)) = made("mkfs.xfs", &["-q", "-f"]) else { return };
        assert_eq!(judge(&head), Rest::NotClean);
    }
}
