//! The disks of a restore target: what there is, what may be written, and the thread that reads and writes.

use crate::{
    disks::{Class, Device, Disks, DisksError},
    link::Wake,
};
use model::{ByteLen, Extent, RecordKind, SECTOR, SourceSeq, VolumeId};
use replication::restore::TargetEvent;
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Arc, mpsc},
    thread,
};
use wire::{BlockHash, FrameHeader, FrameKind, Look, RestoreDisk, TargetDisk, Unpacker};

/// Zeroes are written so much at a time where the kernel has no better way.
const ZEROES: usize = 1 << 20;
/// Drives and memory that no machine is restored to.
const NO_DISKS: [&str; 4] = ["ram", "zram", "sr", "fd"];

/// What the operator lets be written.
#[derive(Clone, Default)]
pub struct Chosen {
    /// Nodes; empty: any.
    pub allow: Vec<String>,
    /// These and no others are listed, partitions and volumes among them.
    pub named_only: bool,
}

/// The machine's whole disks.
pub fn list(chosen: &Chosen) -> Result<Vec<TargetDisk>, DisksError> {
    let disks = Disks::here()?;
    Ok(listed(&disks, chosen))
}

fn listed(disks: &Disks, chosen: &Chosen) -> Vec<TargetDisk> {
    let whole = |d: &&Device| {
        matches!(d.class, Class::Disk) && d.sectors > 0 && !NO_DISKS.iter().any(|no| is_numbered(&d.name, no))
    };
    let serial = |d: &Device| {
        let said = d.identity.hard.iter().find_map(|id| id.strip_prefix("serial:").or_else(|| id.strip_prefix("vpd:")));
        said.unwrap_or_default().to_owned()
    };
    let describe = |d: &Device| TargetDisk {
        path: d.node().display().to_string(),
        bytes: d.bytes(),
        model: d.model.clone(),
        serial: serial(d),
        identity: d.identity.hard.join(" "),
        holds: holds(disks, d),
        in_use: in_use(disks, d).or_else(|| not_allowed(chosen, &d.node())),
    };
    let listed = |d: &&Device| if chosen.named_only { chosen.names(&d.node()) && d.sectors > 0 } else { whole(d) };
    disks.iter().filter(listed).take(wire::TARGET_DISKS_MAX).map(describe).collect()
}

/// `ram0`, but not `ramdisk-of-somebody`.
fn is_numbered(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
}

impl Chosen {
    fn names(&self, node: &Path) -> bool {
        let node = std::fs::canonicalize(node).unwrap_or_else(|_| node.into());
        // A link of udev's names the same node.
        self.allow.iter().any(|allowed| std::fs::canonicalize(allowed).unwrap_or_else(|_| allowed.into()) == node)
    }
}

fn not_allowed(chosen: &Chosen, node: &Path) -> Option<String> {
    let refused = !chosen.allow.is_empty() && !chosen.names(node);
    refused.then(|| "it is not among the disks given with --allow".to_owned())
}

/// In words; none: nothing that is known.
fn holds(disks: &Disks, disk: &Device) -> Option<String> {
    let what = |d: &Device| {
        d.signature
            .as_ref()
            .map(|s| if s.label.is_empty() { s.kind.to_string() } else { format!("{} {:?}", s.kind, s.label) })
    };
    let parts: Vec<String> =
        disks.partitions(&disk.name).map(|p| what(p).unwrap_or_else(|| "unknown".into())).collect();
    match (what(disk), parts.is_empty()) {
        (own, true) => own,
        (own, false) => Some(format!("{}: {}", own.unwrap_or_else(|| "partitions".into()), parts.join(", "))),
    }
}

/// Who uses a disk or a partition of it, in words.
fn in_use(disks: &Disks, disk: &Device) -> Option<String> {
    if let Some(at) = disks.mounts_above(&disk.name).first() {
        return Some(format!("mounted at {at}"));
    }
    let all = || std::iter::once(disk).chain(disks.partitions(&disk.name));
    if let Some(swap) = all().find(|d| d.swap) {
        return Some(format!("{} is swapped to", swap.node().display()));
    }
    if let Some(above) = all().flat_map(|d| &d.holders).find_map(|name| disks.get(name)) {
        return Some(format!("{} lies on it", above.title()));
    }
    if let Some(above) = all().flat_map(|d| &d.holders).next() {
        return Some(format!("{above} lies on it"));
    }
    disk.read_only.then(|| "it is read-only".to_owned())
}

/// For people.
pub fn line(disk: &TargetDisk) -> String {
    let holds = disk.holds.as_deref().unwrap_or("nothing that is known");
    let used = disk.in_use.as_ref().map_or(String::new(), |by| format!(" – not offered: {by}"));
    let name =
        [disk.model.trim(), disk.serial.trim()].iter().filter(|t| !t.is_empty()).copied().collect::<Vec<_>>().join(" ");
    format!("{:<14} {:>10}  {name:<24} {holds}{used}", disk.path, disk.bytes.to_string())
}

/// Why a disk cannot be written, if it cannot.
pub fn refusal(disks: &[TargetDisk], wanted: &RestoreDisk) -> Option<String> {
    let Some(disk) = disks.iter().find(|d| d.path == wanted.path) else {
        return Some(format!("there is no whole disk {} any more", wanted.path));
    };
    if let Some(by) = &disk.in_use {
        return Some(format!("{} is in use: {by}", wanted.path));
    }
    let needs = ByteLen(wanted.sectors.bytes());
    (disk.bytes < needs).then(|| format!("{} has {} and {needs} are needed", wanted.path, disk.bytes))
}

/// What the thread is asked; in order.
pub enum Job {
    Open(Vec<RestoreDisk>),
    Hash(Look),
    Read { id: u64, disk: VolumeId, extent: Extent },
    Write { header: FrameHeader, payload: Vec<u8> },
    Sync { seq: SourceSeq },
    Close,
}

/// The thread; its queue is bounded by what the target's machine lets the box ask for.
pub struct Worker {
    to: mpsc::Sender<(u64, Job)>,
}

impl Worker {
    pub fn start(chosen: Chosen, events: mpsc::Sender<(u64, TargetEvent)>, wake: Arc<Wake>) -> io::Result<Self> {
        let (to, jobs) = mpsc::channel::<(u64, Job)>();
        let mut hands = Hands { chosen, open: BTreeMap::new(), unpacker: Unpacker::new()?, data: Vec::new() };
        thread::Builder::new().name("disks".to_owned()).spawn(move || {
            // After a failure nothing more is done for that connection: its restore is told, and the disks are closed.
            let mut failed = None;
            for (generation, job) in jobs {
                if failed == Some(generation) && !matches!(job, Job::Close | Job::Open(_)) {
                    continue;
                }
                let event = hands.work(job);
                failed = matches!(event, Some(TargetEvent::Failed { .. })).then_some(generation);
                if let Some(event) = event {
                    let _ = events.send((generation, event));
                    wake.wake();
                }
            }
        })?;
        Ok(Self { to })
    }
    pub fn push(&self, generation: u64, job: Job) {
        // The thread ends with the process.
        let _ = self.to.send((generation, job));
    }
}

struct Opened {
    file: File,
    path: String,
    loose: bool,
}

struct Hands {
    chosen: Chosen,
    open: BTreeMap<VolumeId, Opened>,
    unpacker: Unpacker,
    data: Vec<u8>,
}

impl Hands {
    fn work(&mut self, job: Job) -> Option<TargetEvent> {
        let done = match job {
            Job::Open(disks) => return Some(TargetEvent::Opened { refused: self.open_all(&disks).err() }),
            Job::Close => return Some(TargetEvent::Closed { refused: self.close().err() }),
            Job::Hash(look) => self.hash(&look),
            Job::Read { id, disk, extent } => self.read(id, disk, extent),
            Job::Write { header, payload } => self.write(&header, &payload),
            Job::Sync { seq } => self.sync().map(|()| TargetEvent::Synced { seq }),
        };
        Some(done.unwrap_or_else(|text| TargetEvent::Failed { text }))
    }

    /// All of them or none.
    fn open_all(&mut self, wanted: &[RestoreDisk]) -> Result<(), String> {
        self.open.clear();
        let here = list(&self.chosen).map_err(|e| crate::error_chain(&e))?;
        let mut opened = BTreeMap::new();
        for disk in wanted {
            if let Some(why) = refusal(&here, disk) {
                return Err(why);
            }
            opened.insert(disk.disk, open(disk)?);
        }
        self.open = opened;
        Ok(())
    }

    fn disk(&mut self, disk: VolumeId) -> Result<&mut Opened, String> {
        self.open.get_mut(&disk).ok_or_else(|| format!("disk {disk} is not open"))
    }

    fn hash(&mut self, look: &Look) -> Result<TargetEvent, String> {
        let step = look.block_sectors as usize * SECTOR as usize;
        let mut hashes = Vec::new();
        for run in &look.runs {
            let mut data = std::mem::take(&mut self.data);
            data.resize(run.bytes() as usize, 0);
            let read = self.disk(look.disk)?.read(&mut data, run);
            hashes.extend(data.chunks(step).map(BlockHash::of));
            self.data = data;
            read?;
        }
        Ok(TargetEvent::Hashed { id: look.id, hashes })
    }

    fn read(&mut self, id: u64, disk: VolumeId, extent: Extent) -> Result<TargetEvent, String> {
        let mut data = vec![0; extent.bytes() as usize];
        self.disk(disk)?.read(&mut data, &extent)?;
        Ok(TargetEvent::Read { id, data })
    }

    fn write(&mut self, header: &FrameHeader, payload: &[u8]) -> Result<TargetEvent, String> {
        let mut data = std::mem::take(&mut self.data);
        if header.kind == FrameKind::Record(RecordKind::Write) {
            data.resize(header.extent.bytes() as usize, 0);
            let unpacked = self.unpacker.unpack(header.codec, payload, &mut data);
            unpacked.map_err(|e| format!("the box sent data that cannot be unpacked: {}", crate::error_chain(&e)))?;
            self.disk(header.volume)?.write(&data, &header.extent)?;
        } else {
            self.disk(header.volume)?.zero(&header.extent)?;
        }
        self.data = data;
        Ok(TargetEvent::Wrote { seq: header.seq })
    }

    fn sync(&mut self) -> Result<(), String> {
        self.open.values_mut().try_for_each(Opened::sync)
    }

    fn close(&mut self) -> Result<(), String> {
        let synced = self.sync();
        for disk in std::mem::take(&mut self.open).into_values() {
            // The kernel reads what partitions there are now; a loop device without that wish, or one in use, says no.
            // SAFETY: a valid descriptor, and no argument.
            unsafe { libc::ioctl(disk.file.as_raw_fd(), BLKRRPART) };
        }
        synced
    }
}

/// Numbers of the block layer's requests, which never change: see linux/fs.h.
const BLKRRPART: libc::Ioctl = 0x125f;
const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

fn open(disk: &RestoreDisk) -> Result<Opened, String> {
    let path = &disk.path;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC);
    let file = options.open(path).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => format!("{path} is in use by the kernel: mounted, swapped to, or part of a volume"),
        _ => format!("{path} cannot be opened: {e}"),
    })?;
    let kind = file.metadata().map_err(|e| format!("{path}: {e}"))?.file_type();
    if !kind.is_block_device() {
        return Err(format!("{path} is no block device"));
    }
    let mut bytes = 0u64;
    // SAFETY: a valid descriptor and room for the number that this request writes.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } != 0 {
        return Err(format!("{path} does not say its size: {}", io::Error::last_os_error()));
    }
    // Asked of what was opened: a name may have become another disk's since it was listed.
    let needs = disk.sectors.bytes();
    if bytes < needs {
        return Err(format!("{path} has {} and {} are needed", ByteLen(bytes), ByteLen(needs)));
    }
    // What an agent before this one wrote may still be in memory only.
    Ok(Opened { file, path: path.clone(), loose: true })
}

impl Opened {
    fn failed(&self, what: &str, extent: &Extent, e: &io::Error) -> String {
        format!("{} cannot be {what} at sector {}: {e}", self.path, extent.start())
    }
    fn read(&self, data: &mut [u8], extent: &Extent) -> Result<(), String> {
        self.file.read_exact_at(data, extent.lba.bytes()).map_err(|e| self.failed("read", extent, &e))
    }
    fn write(&mut self, data: &[u8], extent: &Extent) -> Result<(), String> {
        self.loose = true;
        self.file.write_all_at(data, extent.lba.bytes()).map_err(|e| self.failed("written", extent, &e))
    }
    fn zero(&mut self, extent: &Extent) -> Result<(), String> {
        self.loose = true;
        let range = [extent.lba.bytes(), extent.bytes()];
        // SAFETY: a valid descriptor and the two numbers that this request reads.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, range.as_ptr()) } == 0 {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES.min(extent.bytes() as usize)];
        let (mut at, end) = (range[0], range[0] + range[1]);
        while at < end {
            let len = zeroes.len().min((end - at) as usize);
            self.file.write_all_at(&zeroes[..len], at).map_err(|e| self.failed("written", extent, &e))?;
            at += len as u64;
        }
        Ok(())
    }
    /// Durable; and what is read afterwards comes from the disk, not from memory.
    fn sync(&mut self) -> Result<(), String> {
        if !self.loose {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| format!("{} cannot make durable what was written: {e}", self.path))?;
        self.loose = false;
        // SAFETY: a valid descriptor; what cannot be dropped stays.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Sectors;

    fn disk(path: &str, in_use: Option<&str>) -> TargetDisk {
        TargetDisk {
            path: path.into(),
            bytes: ByteLen(1 << 20),
            model: String::new(),
            serial: String::new(),
            identity: String::new(),
            holds: None,
            in_use: in_use.map(str::to_owned),
        }
    }

    #[test]
    fn a_disk_that_is_gone_used_or_too_small_is_refused_in_words() {
        let here = [disk("/dev/a", None), disk("/dev/b", Some("mounted at /"))];
        let wants =
            |path: &str, sectors| RestoreDisk { disk: VolumeId(0), path: path.into(), sectors: Sectors(sectors) };
        assert_eq!(refusal(&here, &wants("/dev/a", 2048)), None);
        let why = |path: &str, sectors| refusal(&here, &wants(path, sectors)).unwrap();
        assert!(why("/dev/a", 2049).contains("are needed"), "{}", why("/dev/a", 2049));
        assert!(why("/dev/b", 1).contains("mounted at /"));
        assert!(why("/dev/c", 1).contains("no whole disk"));
    }

    #[test]
    fn memory_and_drives_are_no_disks() {
        assert!(is_numbered("ram12", "ram") && is_numbered("sr0", "sr"));
        assert!(!is_numbered("sda", "sr") && !is_numbered("ramses", "ram"));
    }

    #[test]
    fn only_what_is_allowed_is_offered() {
        let chosen =
            |allow: &[&str]| Chosen { allow: allow.iter().map(|a| (*a).to_owned()).collect(), named_only: false };
        assert_eq!(not_allowed(&chosen(&[]), Path::new("/dev/null")), None);
        assert_eq!(not_allowed(&chosen(&["/dev/null"]), Path::new("/dev/null")), None);
        assert!(not_allowed(&chosen(&["/dev/zero"]), Path::new("/dev/null")).is_some());
    }

    /// What is no disk is never written, whatever the box says.
    #[test]
    fn a_file_is_no_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let wants = RestoreDisk { disk: VolumeId(0), path: file.path().display().to_string(), sectors: Sectors(8) };
        assert!(open(&wants).err().unwrap().contains("no block device"));
    }
}
