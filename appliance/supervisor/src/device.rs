//! The device the journals lie on: how writes to it are made durable, and whether that can be trusted.
//!
//! What is acknowledged as durable was written with RWF_DSYNC, which the kernel turns into a forced-unit-access write or a flush of
//! the device's volatile cache. It does so only while it believes that there is one (`queue/write_cache` is `write back`) and only
//! where the file system passes it on. Both can be switched off by an administrator in search of speed; then a power cut takes
//! acknowledged writes, and nothing here would ever notice. So it is looked at once, at start, logged, and shown in the status.
//!
//! `write through` by itself is no fault: disks without a volatile cache say so.

use crate::events::{Event, Events};
use durable::{Disk, DiskError};
use model::ByteLen;
use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Made and removed at start, to learn how durable writes are done.
const PROBE: &str = "write-probe";

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Device {
    /// Of the device, or of the file system where there is none.
    pub name: String,
    /// As the kernel says; `unknown` where it does not.
    pub write_cache: String,
    /// As [`durable::WriteQueue::backend`] says.
    pub durable_writes: String,
    /// Why what is acknowledged may not survive a power cut.
    pub doubt: Option<String>,
}

/// Looks at the device and notes what it is. Blocking.
pub fn look(data: &Path, disk: &dyn Disk, events: &Events) -> Device {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let number = fs::metadata(data).map_or(0, |meta| meta.dev());
    let mut device = read(Path::new("/sys"), number, &mounts);
    device.durable_writes = match durable_writes(disk) {
        Ok(backend) => backend.to_owned(),
        Err(e) => format!("not tried: {}", crate::chain(&e)),
    };
    let text = format!("write cache: {}, durable writes: {}", device.write_cache, device.durable_writes);
    events.note(Event::JournalDevice, &device.name, text);
    if let Some(doubt) = &device.doubt {
        events.note(Event::DeviceDoubtful, &device.name, doubt);
    }
    device
}

/// Opens a queue for durable writes as a journal does.
fn durable_writes(disk: &dyn Disk) -> Result<&'static str, DiskError> {
    let probe = Path::new(PROBE);
    // One that a killed daemon left; when it cannot be removed, making it says why.
    let _ = disk.remove(probe);
    disk.create_zeroed(probe, ByteLen(durable::ALIGN as u64))?;
    let backend = disk.write_queue(probe, 1).map(|queue| queue.backend());
    disk.remove(probe)?;
    backend
}

fn read(sys: &Path, number: u64, mounts: &str) -> Device {
    let at = format!("{}:{}", libc::major(number), libc::minor(number));
    let mount = mounts.lines().rev().filter_map(Mount::parse).find(|mount| mount.number == at);
    let block = sys.join("dev/block").join(&at).canonicalize().ok().map(whole_disk);
    let own_name = block.as_ref().and_then(|b| b.file_name()).map(|n| n.to_string_lossy().into_owned());
    let name = own_name.or_else(|| mount.as_ref().map(|m| format!("{} ({})", m.source, m.kind)));
    let write_cache = block.as_ref().and_then(|b| line(&b.join("queue/write_cache")));
    let hardware = block.as_deref().and_then(scsi_cache);
    let doubt = doubt(write_cache.as_deref(), hardware.as_deref(), mount.as_ref());
    Device {
        name: name.unwrap_or_else(|| "an unknown device".into()),
        write_cache: write_cache.unwrap_or_else(|| "unknown".into()),
        durable_writes: String::new(),
        doubt,
    }
}

fn doubt(write_cache: Option<&str>, hardware: Option<&str>, mount: Option<&Mount<'_>>) -> Option<String> {
    let no_barrier = |option: &&str| matches!(*option, "nobarrier" | "barrier=0");
    if let Some(option) = mount.and_then(|m| m.options().find(no_barrier)) {
        return Some(format!(
            "the file system of the data folder is mounted with {option}: it does not flush the device's cache, and a power cut may \
             take writes that were acknowledged as durable; mount it without this option"
        ));
    }
    if write_cache == Some("write through") && hardware.is_some_and(|h| h.contains("write back")) {
        return Some(
            "the device has a volatile write cache but the kernel was told that it has none (queue/write_cache is \"write through\"): \
             it is never flushed, and a power cut may take writes that were acknowledged as durable; write \"write back\" there"
                .to_owned(),
        );
    }
    None
}

/// A partition's cache is its disk's.
fn whole_disk(block: PathBuf) -> PathBuf {
    match block.parent() {
        Some(disk) if block.join("partition").exists() => disk.to_owned(),
        _ => block,
    }
}

/// What a SCSI or SATA disk itself says of its cache.
fn scsi_cache(block: &Path) -> Option<String> {
    let disks = fs::read_dir(block.join("device/scsi_disk")).ok()?;
    disks.flatten().find_map(|disk| line(&disk.path().join("cache_type")))
}

fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A line of `/proc/self/mountinfo`.
struct Mount<'a> {
    number: &'a str,
    own_options: &'a str,
    kind: &'a str,
    source: &'a str,
    super_options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(2);
        let number = before.next()?;
        let own_options = before.nth(2)?;
        let mut after = after.split(' ');
        Some(Self {
            number,
            own_options,
            kind: after.next()?,
            source: after.next()?,
            super_options: after.next().unwrap_or_default(),
        })
    }
    fn options(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.own_options.split(',').chain(self.super_options.split(','))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
        30 22 8:2 / /var/lib rw,noatime shared:2 - xfs /dev/sda2 rw,nobarrier\n\
        31 22 0:40 / /tmp rw - tmpfs tmpfs rw\n";

    /// A made-up /sys with one disk of one partition.
    fn sys(write_cache: &str, cache_type: Option<&str>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("devices/sda");
        fs::create_dir_all(disk.join("sda1")).unwrap();
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::create_dir_all(dir.path().join("dev/block")).unwrap();
        fs::write(disk.join("sda1/partition"), "1\n").unwrap();
        fs::write(disk.join("queue/write_cache"), format!("{write_cache}\n")).unwrap();
        if let Some(kind) = cache_type {
            fs::create_dir_all(disk.join("device/scsi_disk/0:0:0:0")).unwrap();
            fs::write(disk.join("device/scsi_disk/0:0:0:0/cache_type"), format!("{kind}\n")).unwrap();
        }
        std::os::unix::fs::symlink(disk.join("sda1"), dir.path().join("dev/block/8:1")).unwrap();
        dir
    }

    #[test]
    fn what_costs_acknowledged_writes_is_found_and_what_does_not_is_not() {
        for (write_cache, cache_type, doubtful) in [
            ("write back", Some("write back"), false),
            ("write back", None, false),
            ("write through", None, false),
            ("write through", Some("write through"), false),
            ("write through", Some("write back, no read (daft)"), true),
        ] {
            let sys = sys(write_cache, cache_type);
            let found = read(sys.path(), libc::makedev(8, 1), MOUNTS);
            assert_eq!((found.name.as_str(), found.write_cache.as_str()), ("sda", write_cache));
            assert_eq!(found.doubt.is_some(), doubtful, "{write_cache} {cache_type:?}: {:?}", found.doubt);
        }
        let sys = tempfile::tempdir().unwrap();
        let found = read(sys.path(), libc::makedev(8, 2), MOUNTS);
        assert_eq!((found.name.as_str(), found.write_cache.as_str()), ("/dev/sda2 (xfs)", "unknown"));
        assert!(found.doubt.is_some_and(|d| d.contains("nobarrier")));
        let found = read(sys.path(), libc::makedev(0, 40), MOUNTS);
        assert_eq!((found.name.as_str(), found.doubt), ("tmpfs (tmpfs)", None));
        assert_eq!(read(sys.path(), libc::makedev(9, 9), "garbage\n\n - \n").name, "an unknown device");
    }

    #[test]
    fn the_way_of_durable_writes_is_learnt_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let disk = durable::OsDisk::new(dir.path()).unwrap();
        for _ in 0..2 {
            assert!(!durable_writes(&disk).unwrap().is_empty());
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        fs::write(dir.path().join(PROBE), "left by a killed daemon").unwrap();
        assert!(durable_writes(&disk).is_ok());
    }
}
