//! Where a restore goes: a file or a block device, guarded against overwriting what is in use.
//!
//! A file is written as `NAME.holdfast-partial` beside the wanted one, sparse, mode 0600 (it holds a host's data), locked,
//! and renamed when it is whole and on the disk; an existing file keeps its content until then. A block device is opened
//! exclusively, which the kernel refuses while it is mounted, swapped to or part of another device; zeroes are written to
//! it where the volume has none.

use model::ByteLen;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, SeekFrom},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

/// Left free on the file system a file is restored to: metadata grows too, and a full root disk is a second accident.
const ROOM_RESERVE: u64 = 16 << 20;
/// Zeroes written in one go where the kernel cannot zero a range itself.
const ZERO_PIECE: usize = 1 << 20;

/// An open target.
#[derive(Debug)]
pub struct Target {
    file: File,
    place: Place,
}

#[derive(Debug)]
enum Place {
    File { partial: PathBuf, wanted: PathBuf, overwrite: bool, finished: bool },
    Device { path: PathBuf },
}

/// What the person allowed.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    pub overwrite: bool,
    pub onto_protected: bool,
}

/// A volume whose writes are captured, to keep a restore off it.
#[derive(Clone, Debug)]
pub struct Protected {
    pub group: String,
    pub volume: String,
    pub identity: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{} exists already", path.display())]
    Exists { path: PathBuf },
    #[error("{} is a block device: what is on it would be overwritten", path.display())]
    Device { path: PathBuf },
    #[error("{} holds {have}, the volume has {need}", path.display())]
    TooSmall { path: PathBuf, have: ByteLen, need: ByteLen },
    #[error("the file system of {} has room for {have}, the volume holds {need} of data", path.display())]
    NoRoom { path: PathBuf, have: ByteLen, need: ByteLen },
    #[error("{} is mounted at {at}", path.display())]
    Mounted { path: PathBuf, at: String },
    #[error("{} is in use: {by}", path.display())]
    Busy { path: PathBuf, by: String },
    #[error("{} is volume {volume} of protection group {group}", path.display())]
    Protected { path: PathBuf, volume: String, group: String },
    #[error("{} is a {kind}; a file or a block device is needed", path.display())]
    Kind { path: PathBuf, kind: &'static str },
    #[error("another restore is writing {}", path.display())]
    Locked { path: PathBuf },
    #[error("a qcow2 image cannot be written to the device {}", path.display())]
    ImageOnDevice { path: PathBuf },
    #[error("could not {op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
}

impl TargetError {
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Exists { .. } => "choose another name, or say --force to replace it when the restore is complete".into(),
            Self::Device { path } => format!("check with `lsblk {}` that it is the right one, then say --force", path.display()),
            Self::TooSmall { need, .. } => format!("use a device of at least {} bytes ({need})", need.0),
            Self::NoRoom { .. } => "free some room or choose another file system".into(),
            Self::Mounted { at, .. } => format!("unmount it first (umount {at}), or choose another device"),
            Self::Busy { .. } => "stop what uses it, or choose another device".into(),
            Self::Protected { .. } => {
                "end its protection first (holdfast-agent unprotect), or say --onto-protected to have the restore captured \
                 like any other write"
                    .into()
            }
            Self::Kind { .. } => "name a file in an existing folder, or a block device".into(),
            Self::Locked { .. } => "wait for it, or choose another name".into(),
            Self::ImageOnDevice { .. } => "restore to a device with --format raw".into(),
            Self::Io { .. } => return None,
        })
    }
}

impl Target {
    /// Checks what can be checked before the volume is known, and opens. Nothing of an existing target is changed yet.
    pub fn open(path: &Path, allowed: Allowed, protected: &[Protected]) -> Result<Self, TargetError> {
        match fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Self::create(path, allowed),
            Err(source) => Err(TargetError::Io { op: "look at", path: path.to_owned(), source }),
            Ok(meta) if meta.file_type().is_file() => {
                if !allowed.overwrite {
                    return Err(TargetError::Exists { path: path.to_owned() });
                }
                // Behind a symbolic link, so that the link stays and what it points to is replaced.
                let real = path.canonicalize().map_err(|source| io_error("resolve", path, source))?;
                Self::create(&real, allowed)
            }
            Ok(meta) if meta.file_type().is_block_device() => Self::open_device(path, meta.rdev(), allowed, protected),
            Ok(meta) => Err(TargetError::Kind { path: path.to_owned(), kind: kind_of(&meta) }),
        }
    }

    fn create(wanted: &Path, allowed: Allowed) -> Result<Self, TargetError> {
        let Some(name) = wanted.file_name() else {
            return Err(TargetError::Kind { path: wanted.to_owned(), kind: "path without a name" });
        };
        let mut partial_name = name.to_owned();
        partial_name.push(".holdfast-partial");
        let partial = wanted.with_file_name(partial_name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false) // not before it is locked: it may be another restore's
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&partial)
            .map_err(|source| io_error("create", &partial, source))?;
        let same = |file: &File| {
            let (ours, there) = (file.metadata().ok()?, fs::symlink_metadata(&partial).ok()?);
            Some(ours.dev() == there.dev() && ours.ino() == there.ino())
        };
        // The second look: the other one may have finished and renamed it between our open and our lock.
        if file.try_lock().is_err() || same(&file) != Some(true) {
            return Err(TargetError::Locked { path: wanted.to_owned() });
        }
        file.set_len(0).map_err(|source| io_error("empty", &partial, source))?;
        let place = Place::File { partial, wanted: wanted.to_owned(), overwrite: allowed.overwrite, finished: false };
        Ok(Self { file, place })
    }

    fn open_device(path: &Path, number: u64, allowed: Allowed, protected: &[Protected]) -> Result<Self, TargetError> {
        let device = Device::look_up(path, number);
        if !allowed.onto_protected
            && let Some(found) = protected.iter().find(|volume| device.is(volume))
        {
            let (volume, group) = (found.volume.clone(), found.group.clone());
            return Err(TargetError::Protected { path: path.to_owned(), volume, group });
        }
        if let Some(at) = device.mounted_at() {
            return Err(TargetError::Mounted { path: path.to_owned(), at });
        }
        if let Some(by) = device.holder() {
            return Err(TargetError::Busy { path: path.to_owned(), by });
        }
        if !allowed.overwrite {
            return Err(TargetError::Device { path: path.to_owned() });
        }
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
        let file = opened.map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TargetError::Busy { path: path.to_owned(), by: "the kernel holds it".into() },
            _ => io_error("open", path, source),
        })?;
        Ok(Self { file, place: Place::Device { path: path.to_owned() } })
    }

    /// Where the bytes go now; for tools that write the file themselves.
    pub fn image_path(&self) -> Result<&Path, TargetError> {
        match &self.place {
            Place::File { partial, .. } => Ok(partial),
            Place::Device { path } => Err(TargetError::ImageOnDevice { path: path.clone() }),
        }
    }

    /// Checks the room for a volume of `size` of which `data` is not zero, and gives a file its length.
    pub fn prepare(&mut self, size: ByteLen, data: ByteLen) -> Result<(), TargetError> {
        match &self.place {
            Place::Device { path } => {
                let have = self.file.seek(SeekFrom::End(0)).map_err(|source| io_error("measure", path, source))?;
                if have < size.0 {
                    return Err(TargetError::TooSmall { path: path.clone(), have: ByteLen(have), need: size });
                }
                Ok(())
            }
            Place::File { partial, wanted, .. } => {
                let have = room(&self.file).map_err(|source| io_error("measure the room for", wanted, source))?;
                if have < data.0.saturating_add(ROOM_RESERVE) {
                    let have = ByteLen(have.saturating_sub(ROOM_RESERVE));
                    return Err(TargetError::NoRoom { path: wanted.clone(), have, need: data });
                }
                self.file.set_len(size.0).map_err(|source| io_error("extend", partial, source))
            }
        }
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), TargetError> {
        self.file.write_all_at(data, offset).map_err(|source| io_error("write", self.path(), source))
    }

    /// Makes a range read as zeroes. In a file it does already: it is new.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let Place::Device { path } = &self.place else { return Ok(()) };
        if zero_range(&self.file, offset, len) {
            return Ok(());
        }
        let zeroes = vec![0; ZERO_PIECE];
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(ZERO_PIECE as u64);
            let written = self.file.write_all_at(&zeroes[..piece as usize], offset + at);
            written.map_err(|source| io_error("write", path, source))?;
            at += piece;
        }
        Ok(())
    }

    /// Everything was written: makes it durable and gives a file its name.
    pub fn finish(mut self) -> Result<(), TargetError> {
        self.file.sync_all().map_err(|source| io_error("flush", self.path(), source))?;
        let Place::File { partial, wanted, overwrite, finished } = &mut self.place else { return Ok(()) };
        // It may have appeared while we were copying.
        if !*overwrite && fs::symlink_metadata(&*wanted).is_ok() {
            return Err(TargetError::Exists { path: wanted.clone() });
        }
        fs::rename(&*partial, &*wanted).map_err(|source| io_error("rename into", wanted, source))?;
        *finished = true;
        let parent = match wanted.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(|source| io_error("flush the folder", parent, source))
    }

    /// What a failed copy leaves behind, for the message.
    pub fn is_device(&self) -> bool {
        matches!(self.place, Place::Device { .. })
    }

    fn path(&self) -> &Path {
        match &self.place {
            Place::File { wanted, .. } => wanted,
            Place::Device { path } => path,
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Place::File { partial, finished: false, .. } = &self.place {
            // Half a volume is of no use to anyone; if it cannot be removed, its name says what it is.
            let _ = fs::remove_file(partial);
        }
    }
}

fn io_error(op: &'static str, path: &Path, source: io::Error) -> TargetError {
    TargetError::Io { op, path: path.to_owned(), source }
}

fn kind_of(meta: &fs::Metadata) -> &'static str {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => "folder",
        () if kind.is_char_device() => "character device",
        () if kind.is_fifo() => "pipe",
        () if kind.is_socket() => "socket",
        () => "special file",
    }
}

/// Bytes an unprivileged user may still write on the file system of `file`.
fn room(file: &File) -> io::Result<u64> {
    // SAFETY: an all-zero `statvfs` is a valid value of this plain C struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is valid for one write of its type.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Has the kernel zero a range of a block device; whether it could.
fn zero_range(file: &File, offset: u64, len: u64) -> bool {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return false };
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain system call on an open descriptor; no memory is passed.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) == 0 }
}

/// What the kernel says about a block device.
struct Device {
    path: PathBuf,
    /// `/sys/dev/block/MAJOR:MINOR`, resolved.
    sys: Option<PathBuf>,
    /// Its own number and those of its partitions, as `MAJOR:MINOR`.
    numbers: Vec<String>,
    /// Which partition of its disk it is.
    partition: Option<String>,
}

impl Device {
    fn look_up(path: &Path, number: u64) -> Self {
        let number = format!("{}:{}", libc::major(number), libc::minor(number));
        let sys = Path::new("/sys/dev/block").join(&number).canonicalize().ok();
        let mut numbers = vec![number];
        for part in sys.iter().filter_map(|sys| fs::read_dir(sys).ok()).flatten().flatten() {
            if part.path().join("partition").exists() {
                numbers.extend(read_trimmed(&part.path().join("dev")));
            }
        }
        let partition = sys.as_ref().and_then(|sys| read_trimmed(&sys.join("partition")));
        Self { path: path.canonicalize().unwrap_or_else(|_| path.to_owned()), sys, numbers, partition }
    }

    fn mounted_at(&self) -> Option<String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let number = fields.next()?;
            let at = fields.nth(1)?;
            self.numbers.iter().any(|n| n == number).then(|| at.replace("\\040", " "))
        })
    }

    /// A device built on it (LVM, RAID, multipath), or swap.
    fn holder(&self) -> Option<String> {
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(|s| Path::new(s) == self.path) {
            return Some("the system swaps to it".into());
        }
        let mut holders = fs::read_dir(self.sys.as_ref()?.join("holders")).ok()?.flatten();
        holders.next().map(|holder| format!("{} is built on it", holder.file_name().to_string_lossy()))
    }

    /// Whether it is this volume: the same serial, WWN or UUID; or the same name where an agent protects this machine.
    fn is(&self, volume: &Protected) -> bool {
        if self.identities().iter().any(|known| same_disk(&volume.identity, known, self.partition.as_deref())) {
            return true;
        }
        let agent_here = Path::new("/var/lib/holdfast-agent").exists();
        agent_here && Path::new(&volume.volume).canonicalize().is_ok_and(|path| path == self.path)
    }

    /// What agents write down of a disk; a partition's are its disk's.
    fn identities(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(sys) = &self.sys {
            let disk = if self.partition.is_some() { sys.parent().unwrap_or(sys) } else { sys };
            for file in ["serial", "wwid", "wwn", "device/serial", "device/wwid", "dm/uuid", "loop/backing_file"] {
                found.extend(read_trimmed(&disk.join(file)));
            }
        }
        for folder in ["/dev/disk/by-uuid", "/dev/disk/by-partuuid"] {
            for link in fs::read_dir(folder).into_iter().flatten().flatten() {
                if link.path().canonicalize().is_ok_and(|path| path == self.path) {
                    found.push(link.file_name().to_string_lossy().into_owned());
                }
            }
        }
        found
    }
}

/// Whether a recorded identity (`serial:… wwn:…`, with `#N` behind each for partition N) speaks of the disk known by
/// `known`: the whole of it, the partition we mean, or, when we mean the whole disk, any part.
fn same_disk(identity: &str, known: &str, partition: Option<&str>) -> bool {
    let known = known.split_whitespace().collect::<Vec<_>>().join(" ");
    // Short ones are placeholders that many disks share ("0", "1234").
    known.len() >= 6
        && identity.match_indices(&known).any(|(at, _)| {
            let begins = identity[..at].chars().next_back().is_none_or(|c| c == ':' || c.is_whitespace());
            let rest = &identity[at + known.len()..];
            begins
                && match rest.strip_prefix('#') {
                    Some(number) => partition.is_none_or(|n| number.split_whitespace().next() == Some(n)),
                    None => rest.chars().next().is_none_or(char::is_whitespace),
                }
        })
}

fn read_trimmed(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAREFUL: Allowed = Allowed { overwrite: false, onto_protected: false };
    const FORCE: Allowed = Allowed { overwrite: true, onto_protected: false };

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.img");
        let mut target = Target::open(&path, CAREFUL, &[]).unwrap();
        target.prepare(ByteLen(1 << 20), ByteLen(4096)).unwrap();
        target.write(8192, b"data").unwrap();
        assert!(!path.exists());
        drop(target);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a failed restore leaves nothing");

        let mut target = Target::open(&path, CAREFUL, &[]).unwrap();
        target.prepare(ByteLen(1 << 20), ByteLen(4096)).unwrap();
        target.write(8192, b"data").unwrap();
        target.zero(0, 4096).unwrap();
        target.finish().unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (1 << 20, 0o600));
        assert!(meta.blocks() * 512 < 1 << 19, "{} blocks: not sparse", meta.blocks());
        assert_eq!(&fs::read(&path).unwrap()[8192..8196], b"data");
    }

    #[test]
    fn what_exists_is_replaced_only_when_asked_and_only_when_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.img");
        fs::write(&path, b"old").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Target::open(&path, CAREFUL, &[]), Err(TargetError::Exists { .. })));

        let mut target = Target::open(&link, FORCE, &[]).unwrap();
        assert!(matches!(Target::open(&path, FORCE, &[]), Err(TargetError::Locked { .. })), "two at once");
        target.prepare(ByteLen(3), ByteLen(3)).unwrap();
        target.write(0, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        target.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().file_type().is_symlink());

        // One that appears meanwhile is not replaced.
        let late = dir.path().join("late");
        let target = Target::open(&late, CAREFUL, &[]).unwrap();
        fs::write(&late, b"mine").unwrap();
        assert!(matches!(target.finish(), Err(TargetError::Exists { .. })));
        assert_eq!(fs::read(&late).unwrap(), b"mine");
    }

    #[test]
    fn a_protected_disk_is_known_by_what_its_agent_wrote_down() {
        let whole = "serial:S4EVNX0R wwn:naa.5000c500a1b2c3d4";
        let part = "serial:S4EVNX0R#1 wwn:naa.5000c500a1b2c3d4#1";
        for (identity, known, partition, want) in [
            (whole, "naa.5000c500a1b2c3d4", None, true),
            (whole, "S4EVNX0R", Some("2"), true),
            (part, "S4EVNX0R", None, true),
            (part, "S4EVNX0R", Some("1"), true),
            (part, "S4EVNX0R", Some("2"), false),
            (part, "S4EVNX0R", Some("11"), false),
            (whole, "S4EVNX0", None, false),
            (whole, "4EVNX0R", None, false),
            ("serial:1234", "1234", None, false),
            ("loop:/var/disk.img", "/var/disk.img", None, true),
            ("wwn:t10.ATA X 1", "t10.ATA   X  1", None, true),
            ("unknown", "unknown-disk", None, false),
        ] {
            assert_eq!(same_disk(identity, known, partition), want, "{identity} {known} {partition:?}");
        }
    }

    #[test]
    fn what_is_no_target_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path(), Path::new("/dev/null")] {
            let refused = Target::open(path, FORCE, &[]);
            assert!(matches!(refused, Err(TargetError::Kind { .. })), "{refused:?}");
        }
        let nowhere = Target::open(&dir.path().join("no/such/file"), CAREFUL, &[]);
        assert!(matches!(nowhere, Err(TargetError::Io { .. })), "{nowhere:?}");
        let mut target = Target::open(&dir.path().join("x"), CAREFUL, &[]).unwrap();
        let huge = target.prepare(ByteLen(1 << 60), ByteLen(1 << 60));
        assert!(matches!(huge, Err(TargetError::NoRoom { .. })), "{huge:?}");
    }
}
