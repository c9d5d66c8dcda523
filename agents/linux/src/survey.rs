//! What the file systems on protected disks do not use, so that it is neither read nor compared nor sent.
//!
//! A mounted ext4 or XFS is asked for its free extents (`FS_IOC_GETFSMAP`), which are followed down to the captured disks ([`extents::under`]). Then
//! it is synced (`syncfs`), and only then is the answer given.
//!
//! **Why in this order.** Capture runs before the question. The kernel answers from what the file system holds in memory, under its own locks: what
//! it calls free may have been freed by a transaction that is not in its log yet. A crash image of before that commit still refers to those
//! blocks and needs their old content; so no moment may be opened before it. ext4 calls data blocks free only after the commit of what freed them, but
//! with `data=writeback` at once; XFS calls blocks free as soon as their transaction has ended in memory, with a reverse map even between its steps,
//! where the log's intents finish the rest in recovery. `syncfs` forces the log of both. What is taken and written after the question
//! is captured as any write; why nothing else can matter is written at the machine (`replication`, `survey.rs`).
//!
//! **What is copied whole**, with a sentence that says why ([`Answer::whole`]): everything but ext4 (and ext3, which is served by it) and XFS
//! version 5; without a journal or with one on another device; mounted read-only, where a log may wait that was not replayed; with a feature
//! that is not in the lists here (bigalloc, fast commit, XFS with a realtime section, …); on volumes that are not one piece after the other (thin,
//! striped, snapshots); where the answer contradicts itself, or where mount or volumes changed meanwhile. What is not mounted, swap, and all
//! that lies outside of file systems is copied as ever.
//!
//! Cost: the query reads what of the block bitmaps is not in memory; `syncfs` writes what programs have written and not synced, once for a large
//! copy. Both may take long or hang with the file system: they run in a thread of their own, which nothing waits for. While it runs the mount point
//! is open, so `umount` answers that it is busy. Memory: 256 KiB, and 2 MiB for each TiB of volumes.

use crate::{
    capture::{DevNo, dm::ioctl::Target},
    disks::{Device, Disks, read_head, unescape},
    extents::{self, Below, ExtentsError},
};
use model::{ByteLen, Extent, SECTOR, VolumeId};
use replication::GranuleMap;
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
};

/// A copy of less than this is not worth a sync of the host's file systems.
pub const BYTES_MIN: u64 = 32 << 20;
/// Records of one call.
const RECORDS: usize = 4096;
/// Extents that are followed down at once.
const BATCH: usize = 1024;

/// A volume of a group and where it lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OnDisk {
    pub id: VolumeId,
    /// Kernel name of the device that is the volume.
    pub device: String,
    /// Of the disk that is captured, and the volume's range of it.
    pub disk: String,
    pub range: Extent,
}

#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Answer {
    pub unused: Vec<(VolumeId, GranuleMap)>,
    /// File systems of which everything is copied, and why: a sentence each.
    pub whole: Vec<String>,
}

/// Why all of a file system is copied.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    #[error("{kind} does not tell what it does not use")]
    Kind { kind: String },
    #[error("it is mounted read-only")]
    ReadOnly,
    #[error("none of its mount points could be opened")]
    Hidden,
    #[error("its superblock could not be read")]
    Unreadable,
    #[error("its superblock is not that of {kind}")]
    NotThat { kind: String },
    #[error("it has no journal")]
    NoJournal,
    #[error("its log is on another device")]
    LogElsewhere,
    #[error("it has a realtime section")]
    Realtime,
    #[error("XFS of version {0}")]
    OldXfs(u16),
    #[error("it has features that are not known here ({set}: {bits:#x})")]
    Feature { set: &'static str, bits: u32 },
    #[error(transparent)]
    Place(#[from] ExtentsError),
    #[error("it does not say what is free (FS_IOC_GETFSMAP)")]
    Query(#[source] io::Error),
    #[error("what it says is free contradicts itself at byte {at}")]
    Contradiction { at: u64 },
    #[error("it could not be synced")]
    Sync(#[source] io::Error),
    #[error("its mount or the volumes under it changed meanwhile")]
    Changed,
}

/// Asks all file systems on these volumes. Takes as long as they take, so not for a thread that has something else to do.
pub fn ask(volumes: &[OnDisk]) -> Answer {
    let empty = |v: &OnDisk| (v.id, GranuleMap::empty(v.range.sectors));
    let mut answer = Answer { unused: volumes.iter().map(empty).collect(), whole: Vec::new() };
    let disks = match Disks::here() {
        Ok(disks) => disks,
        Err(e) => {
            answer.whole.push(crate::error_chain(&e));
            return answer;
        }
    };
    for device in mounted_on(&disks, volumes) {
        match unused_of(&disks, device, volumes) {
            Ok(maps) => answer.unused.iter_mut().zip(&maps).for_each(|((_, all), map)| all.union(map)),
            Err(e) => answer.whole.push(whole_sentence(device, &e)),
        }
    }
    answer
}

/// How much of the volumes [`ask`] would leave out about now, by the file systems' own counts. Syncs nothing.
pub fn estimate(disks: &Disks, volumes: &[OnDisk]) -> (ByteLen, Vec<String>) {
    let (mut bytes, mut whole) = (0, Vec::new());
    for device in mounted_on(disks, volumes) {
        let free = understood(disks, device, &extents::Here).and_then(|(dir, places)| {
            let ours = places.iter().any(|(disk, extent)| on_volumes(volumes, disk, extent));
            let stat = nix::sys::statvfs::fstatvfs(&dir).map_err(|e| SurveyError::Query(e.into()))?;
            // An array's members are one disk's worth each.
            let copies = places.iter().map(|(_, e)| e.sectors.0).sum::<u64>() / device.sectors.max(1);
            Ok(if ours { stat.blocks_free() * stat.fragment_size() * copies } else { 0 })
        });
        match free {
            Ok(free) => bytes += free,
            Err(e) => whole.push(whole_sentence(device, &e)),
        }
    }
    (ByteLen(bytes), whole)
}

fn whole_sentence(device: &Device, why: &SurveyError) -> String {
    let at = device.mounts.first().map_or("", String::as_str);
    format!("{} at {at} is copied whole: {}", device.title(), crate::error_chain(why))
}

/// What is mounted on the volumes or on anything above them, each once.
fn mounted_on<'a>(disks: &'a Disks, volumes: &[OnDisk]) -> Vec<&'a Device> {
    let mut names = BTreeSet::new();
    volumes
        .iter()
        .flat_map(|v| disks.with_above(&v.device))
        .filter(|d| !d.mounts.is_empty() && names.insert(d.name.clone()))
        .collect()
}

fn on_volumes(volumes: &[OnDisk], disk: &str, extent: &Extent) -> bool {
    volumes.iter().any(|v| v.disk == disk && v.range.intersect(extent).is_some())
}

fn unused_of(disks: &Disks, device: &Device, volumes: &[OnDisk]) -> Result<Vec<GranuleMap>, SurveyError> {
    let before = Mounted::of(device)?;
    let below = Remembered::new(&extents::Here);
    let (dir, _) = understood(disks, device, &below)?;
    let mut maps: Vec<GranuleMap> = volumes.iter().map(|v| GranuleMap::empty(v.range.sectors)).collect();
    query(&dir, device, &mut |free| {
        for (disk, extent) in extents::under(disks, device.number, free, &below)? {
            for (volume, map) in volumes.iter().zip(&mut maps).filter(|(v, _)| v.disk == disk) {
                if let Some(both) = volume.range.intersect(&extent) {
                    map.set(map.inside(&Extent::new(both.start() - volume.range.start(), both.sectors.0)));
                }
            }
        }
        Ok(())
    })?;
    sync(&dir)?;
    // Aborted journals make a mount read-only; a moved volume would have been followed to the wrong place.
    if Mounted::of(device)? != before || !below.unchanged() {
        return Err(SurveyError::Changed);
    }
    Ok(maps)
}

/// Opens a file system that everything of can be answered for; and where all of it lies.
fn understood(disks: &Disks, device: &Device, below: &dyn Below) -> Result<(File, Vec<(String, Extent)>), SurveyError> {
    let mounted = Mounted::of(device)?;
    let check = match mounted.kind.as_str() {
        "ext3" | "ext4" => check_ext,
        "xfs" => check_xfs,
        _ => return Err(SurveyError::Kind { kind: mounted.kind }),
    };
    if !mounted.writable {
        return Err(SurveyError::ReadOnly);
    }
    check(&read_head(&device.node()).ok_or(SurveyError::Unreadable)?)?;
    let places = extents::under(disks, device.number, &[Extent::new(0, device.sectors)], below)?;
    let dir = device.mounts.iter().find_map(|at| open_on(at.as_ref(), device.number)).ok_or(SurveyError::Hidden)?;
    Ok((dir, places))
}

/// The mount point, unless something else is mounted over it.
fn open_on(at: &Path, number: DevNo) -> Option<File> {
    let file = File::open(at).ok()?;
    let dev = file.metadata().ok()?.dev();
    (DevNo { major: libc::major(dev), minor: libc::minor(dev) } == number).then_some(file)
}

fn sync(dir: &File) -> Result<(), SurveyError> {
    // SAFETY: a valid descriptor.
    if unsafe { libc::syncfs(dir.as_raw_fd()) } != 0 {
        return Err(SurveyError::Sync(io::Error::last_os_error()));
    }
    // Kernels before 5.17 keep to themselves that syncfs failed; a file system that was shut down fails this.
    dir.sync_all().map_err(SurveyError::Sync)
}

/// What the mount table says of a device.
#[derive(PartialEq, Eq, Debug)]
struct Mounted {
    kind: String,
    writable: bool,
}

impl Mounted {
    /// A btrfs is mounted under a number of its own.
    fn of(device: &Device) -> Result<Self, SurveyError> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let kind = || device.signature.as_ref().map_or("its file system".to_owned(), |s| s.kind.to_string());
        Self::parse(&text, device.number).ok_or_else(|| SurveyError::Kind { kind: kind() })
    }
    fn parse(mountinfo: &str, number: DevNo) -> Option<Self> {
        let number = number.to_string();
        let line = mountinfo.lines().find(|l| l.split(' ').nth(2) == Some(&number))?;
        let mut right = line.split_once(" - ")?.1.split(' ');
        let kind = unescape(right.next()?);
        let options = right.nth(1)?;
        let not = |o: &str| matches!(o, "ro" | "shutdown" | "emergency_ro" | "norecovery" | "noload");
        let writable = options.split(',').any(|o| o == "rw") && !options.split(',').any(not);
        Some(Self { kind, writable })
    }
}

/// Members of a mirror, and the sector at which each one's data begins.
type Members = Vec<(DevNo, u64)>;

/// Tables and mirrors as they were told first, to be compared at the end.
struct Remembered<'a> {
    inner: &'a dyn Below,
    tables: RefCell<BTreeMap<DevNo, Option<Vec<Target>>>>,
    mirrors: RefCell<BTreeMap<String, Option<Members>>>,
}

impl<'a> Remembered<'a> {
    fn new(inner: &'a dyn Below) -> Self {
        Self { inner, tables: RefCell::default(), mirrors: RefCell::default() }
    }
    fn unchanged(&self) -> bool {
        self.tables.borrow().iter().all(|(device, told)| self.inner.table(*device) == *told)
            && self.mirrors.borrow().iter().all(|(name, told)| self.inner.mirror(name) == *told)
    }
}

impl Below for Remembered<'_> {
    fn table(&self, device: DevNo) -> Option<Vec<Target>> {
        self.tables.borrow_mut().entry(device).or_insert_with(|| self.inner.table(device)).clone()
    }
    fn mirror(&self, name: &str) -> Option<Members> {
        self.mirrors.borrow_mut().entry(name.to_owned()).or_insert_with(|| self.inner.mirror(name)).clone()
    }
}

// ---- superblocks --------------------------------------------------------------------------------------------------------------------

fn known(set: &'static str, bits: u32, known: u32) -> Result<(), SurveyError> {
    match bits & !known {
        0 => Ok(()),
        bits => Err(SurveyError::Feature { set, bits }),
    }
}

fn field<const N: usize>(head: &[u8], at: usize) -> Result<[u8; N], SurveyError> {
    head.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or(SurveyError::Unreadable)
}

fn check_ext(head: &[u8]) -> Result<(), SurveyError> {
    const HAS_JOURNAL: u32 = 4;
    // Preallocation, imagic, journal, attributes, resize inode, directory index, sparse_super2, stable inodes, orphan file. Not fast_commit: its
    // replay works on what was not looked into.
    const COMPAT: u32 = 0x1 | 0x2 | HAS_JOURNAL | 0x8 | 0x10 | 0x20 | 0x200 | 0x800 | 0x1000;
    // File types, journal to be replayed (as always when mounted), meta_bg, extents, 64bit, mmp, flex_bg, values in inodes, checksum seed, large
    // directories, inline data, encryption, case folding. Not a journal device.
    const INCOMPAT: u32 =
        0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;
    // Sparse backups, large files, huge files, group checksums, links, extra inode size, quota, metadata checksums, projects, verity, orphans. Not
    // bigalloc: kernels count its free clusters as blocks.
    const RO_COMPAT: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x8000 | 0x1_0000;
    let word = |at: usize| field(head, 1024 + at).map(u32::from_le_bytes);
    if field(head, 1024 + 56)? != [0x53, 0xef] {
        return Err(SurveyError::NotThat { kind: "ext4".to_owned() });
    }
    let compat = word(92)?;
    if compat & HAS_JOURNAL == 0 {
        return Err(SurveyError::NoJournal);
    }
    known("compat", compat, COMPAT)?;
    known("incompat", word(96)?, INCOMPAT)?;
    known("ro_compat", word(100)?, RO_COMPAT)?;
    // The journal's inode; none when it is a device.
    if word(224)? == 0 { Err(SurveyError::LogElsewhere) } else { Ok(()) }
}

fn check_xfs(head: &[u8]) -> Result<(), SurveyError> {
    // Free inode tree, reverse map, reflink, counted inode trees.
    const RO_COMPAT: u32 = 0x1 | 0x2 | 0x4 | 0x8;
    // File types, sparse inodes, metadata UUID, big times, large extent counts, exchange of ranges, parent pointers. Not "needs repair".
    const INCOMPAT: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
    let word = |at: usize| field(head, at).map(u32::from_be_bytes);
    let quad = |at: usize| field(head, at).map(u64::from_be_bytes);
    if field(head, 0)? != *b"XFSB" {
        return Err(SurveyError::NotThat { kind: "XFS".to_owned() });
    }
    let version = u16::from_be_bytes(field(head, 100)?) & 0xf;
    if version != 5 {
        return Err(SurveyError::OldXfs(version));
    }
    known("ro_compat", word(212)?, RO_COMPAT)?;
    known("incompat", word(216)?, INCOMPAT)?;
    if quad(16)? != 0 || quad(24)? != 0 {
        return Err(SurveyError::Realtime);
    }
    if quad(48)? == 0 { Err(SurveyError::LogElsewhere) } else { Ok(()) }
}

// ---- FS_IOC_GETFSMAP ----------------------------------------------------------------------------------------------------------------

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

#[repr(C)]
struct Query {
    iflags: u32,
    oflags: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [Record; 2],
    records: [Record; RECORDS],
}

const FS_IOC_GETFSMAP: libc::c_ulong = 0xc0c0_583b;
/// The records' devices are device numbers.
const DEVICES_ARE_NUMBERS: u32 = 1;
const SPECIAL_OWNER: u32 = 0x10;
const LAST: u32 = 0x20;
const OWNER_FREE: u64 = 1;

type Take<'a> = &'a mut dyn FnMut(&[Extent]) -> Result<(), SurveyError>;

fn query(dir: &File, device: &Device, take: Take<'_>) -> Result<(), SurveyError> {
    let highest = Record {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        ..Record::default()
    };
    let mut query = Box::new(Query {
        iflags: 0,
        oflags: 0,
        count: RECORDS as u32,
        entries: 0,
        reserved: [0; 6],
        keys: [Record::default(), highest],
        records: [Record::default(); RECORDS],
    });
    let mut free = Free::new(device.number, device.sectors);
    loop {
        // SAFETY: a valid descriptor, and a struct of the kernel's layout with room for `count` records.
        if unsafe { libc::ioctl(dir.as_raw_fd(), FS_IOC_GETFSMAP, &raw mut *query) } != 0 {
            return Err(SurveyError::Query(io::Error::last_os_error()));
        }
        if query.oflags & DEVICES_ARE_NUMBERS == 0 {
            return Err(SurveyError::Query(io::ErrorKind::Unsupported.into()));
        }
        let records = query.records.get(..query.entries as usize).unwrap_or_default();
        records.iter().try_for_each(|record| free.add(record, take))?;
        let Some(last) = records.last().copied() else { break };
        if last.flags & LAST != 0 {
            break;
        }
        let key = |r: &Record| (r.device, r.physical, r.owner, r.offset);
        // Else it would go round for ever.
        if key(&last) <= key(&query.keys[0]) && query.keys[0].length > 0 {
            return Err(SurveyError::Contradiction { at: last.physical });
        }
        query.keys[0] = last;
    }
    free.end(take)
}

/// Joins free records that touch, and refuses an answer that cannot be right.
struct Free {
    device: u32,
    sectors: u64,
    /// Where the records begin that may come.
    sorted_from: u64,
    used_to: u64,
    free_to: u64,
    ready: Vec<Extent>,
}

impl Free {
    fn new(number: DevNo, sectors: u64) -> Self {
        let (major, minor) = (number.major, number.minor);
        let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
        Self { device, sectors, sorted_from: 0, used_to: 0, free_to: 0, ready: Vec::new() }
    }
    fn add(&mut self, record: &Record, take: Take<'_>) -> Result<(), SurveyError> {
        // A log on another device.
        if record.device != self.device || record.length == 0 {
            return Ok(());
        }
        let (start, wrong) = (record.physical, SurveyError::Contradiction { at: record.physical });
        let Some(end) = start.checked_add(record.length).filter(|end| *end <= self.sectors * SECTOR) else {
            return Err(wrong);
        };
        let is_free = record.flags & SPECIAL_OWNER != 0 && record.owner == OWNER_FREE;
        let overlaps = if is_free { start < self.used_to.max(self.free_to) } else { start < self.free_to };
        if start < self.sorted_from || overlaps || !start.is_multiple_of(SECTOR) || !end.is_multiple_of(SECTOR) {
            return Err(wrong);
        }
        self.sorted_from = start;
        if !is_free {
            // Blocks that files share come once for each.
            self.used_to = self.used_to.max(end);
            return Ok(());
        }
        let touches = self.free_to == start;
        self.free_to = end;
        match self.ready.last_mut() {
            Some(last) if touches => last.sectors.0 += (end - start) / SECTOR,
            _ => {
                if self.ready.len() >= BATCH {
                    take(&std::mem::take(&mut self.ready))?;
                }
                self.ready.push(Extent::new(start / SECTOR, (end - start) / SECTOR));
            }
        }
        Ok(())
    }
    fn end(self, take: Take<'_>) -> Result<(), SurveyError> {
        take(&self.ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: DevNo = DevNo { major: 253, minor: 300 };
    const KERNELS: u32 = 44 | (253 << 8) | (0x100 << 12);

    fn record(start: u64, len: u64, free: bool) -> Record {
        let flags = if free { SPECIAL_OWNER } else { 0 };
        // A file's number may be that of "free"; only the flag tells.
        Record {
            device: KERNELS,
            flags,
            physical: start << 12,
            owner: OWNER_FREE,
            length: len << 12,
            ..Record::default()
        }
    }

    fn free_of(records: &[Record]) -> Result<Vec<Extent>, SurveyError> {
        let mut out = Vec::new();
        let mut take = |free: &[Extent]| {
            out.extend_from_slice(free);
            Ok(())
        };
        let mut free = Free::new(NUMBER, 100_000 * 8);
        records.iter().try_for_each(|r| free.add(r, &mut take))?;
        free.end(&mut take)?;
        Ok(out)
    }

    #[test]
    fn free_extents_are_joined_and_contradictions_refused() {
        let blocks = |start: u64, len: u64| Extent::new(start * 8, len * 8);
        let answer = [
            record(0, 10, false),
            record(10, 5, true),
            record(15, 0, false),
            record(15, 5, true),
            record(20, 30, false),
            record(25, 5, false),
            record(50, 1, true),
        ];
        assert_eq!(free_of(&answer).unwrap(), [blocks(10, 10), blocks(50, 1)]);
        let other = Record { device: 7, ..record(15, 1, true) };
        assert!(free_of(&[other]).unwrap().is_empty());
        let many: Vec<Record> = (0..5000).map(|i| record(i * 2, 1, true)).collect();
        assert_eq!(free_of(&many).unwrap().len(), 5000);
        for wrong in [
            [record(0, 10, false), record(9, 2, true)],
            [record(0, 10, true), record(9, 2, false)],
            [record(0, 10, true), record(9, 2, true)],
            [record(20, 10, false), record(5, 2, true)],
            [record(0, 1, false), record(99_999, 2, true)],
            [record(0, 1, false), Record { physical: u64::MAX - 511, ..record(0, 1, true) }],
            [record(0, 1, false), Record { length: 700, ..record(5, 1, true) }],
        ] {
            assert!(matches!(free_of(&wrong), Err(SurveyError::Contradiction { .. })));
        }
    }

    fn ext(compat: u32, incompat: u32, ro_compat: u32, journal: u32) -> Result<(), SurveyError> {
        let mut head = vec![0; 4096];
        head[1080..1082].copy_from_slice(&[0x53, 0xef]);
        for (at, value) in [(92, compat), (96, incompat), (100, ro_compat), (224, journal)] {
            head[1024 + at..1028 + at].copy_from_slice(&value.to_le_bytes());
        }
        check_ext(&head)
    }

    fn xfs(version: u16, ro_compat: u32, incompat: u32, realtime: u64, log: u64) -> Result<(), SurveyError> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(b"XFSB");
        head[100..102].copy_from_slice(&(0xb4a0 | version).to_be_bytes());
        head[212..216].copy_from_slice(&ro_compat.to_be_bytes());
        head[216..220].copy_from_slice(&incompat.to_be_bytes());
        head[16..24].copy_from_slice(&realtime.to_be_bytes());
        head[48..56].copy_from_slice(&log.to_be_bytes());
        check_xfs(&head)
    }

    #[test]
    fn what_is_not_known_of_a_file_system_is_refused_by_name() {
        // As Debian 12 makes them.
        assert!(ext(0x103c & !0x1000, 0x2c6, 0x46b, 8).is_ok());
        assert!(matches!(ext(0x38, 0x2c2, 0x46b, 0), Err(SurveyError::NoJournal)));
        assert!(matches!(ext(0x3c, 0x2c2, 0x46b, 0), Err(SurveyError::LogElsewhere)));
        assert!(matches!(ext(0x43c, 0x2c2, 0x46b, 8), Err(SurveyError::Feature { set: "compat", bits: 0x400 })));
        assert!(matches!(ext(0x3c, 0x2c2, 0x66b, 8), Err(SurveyError::Feature { set: "ro_compat", bits: 0x200 })));
        assert!(matches!(ext(0x3c, 0x8000_02c2, 0x46b, 8), Err(SurveyError::Feature { set: "incompat", .. })));
        assert!(xfs(5, 0xf, 0x2b, 0, 9).is_ok());
        assert!(matches!(xfs(4, 0, 0, 0, 9), Err(SurveyError::OldXfs(4))));
        assert!(matches!(xfs(5, 0xf, 0x3b, 0, 9), Err(SurveyError::Feature { set: "incompat", bits: 0x10 })));
        assert!(matches!(xfs(5, 0x1f, 0xb, 0, 9), Err(SurveyError::Feature { set: "ro_compat", bits: 0x10 })));
        assert!(matches!(xfs(5, 0xf, 0xb, 100, 9), Err(SurveyError::Realtime)));
        assert!(matches!(xfs(5, 0xf, 0xb, 0, 0), Err(SurveyError::LogElsewhere)));
        assert!(matches!(check_ext(&[0; 100]), Err(SurveyError::Unreadable)));
        assert!(matches!(check_xfs(&[0; 512]), Err(SurveyError::NotThat { .. })));
    }

    #[test]
    fn only_what_is_mounted_for_writing_is_asked() {
        let of = |options: &str| {
            let text = format!(
                "29 1 8:1 / /a\\040b ro,relatime shared:1 - ext4 /dev/sda1 {options}\n30 1 8:2 / /x rw - xfs /dev/b rw\n"
            );
            Mounted::parse(&text, DevNo { major: 8, minor: 1 }).unwrap()
        };
        // A mount for reading of a file system that others write to.
        assert_eq!(of("rw,errors=remount-ro"), Mounted { kind: "ext4".to_owned(), writable: true });
        for not in ["ro", "ro,noload", "rw,shutdown", "rw,norecovery"] {
            assert!(!of(not).writable, "{not}");
        }
        assert_eq!(Mounted::parse("garbage\n", DevNo { major: 8, minor: 1 }), None);
    }

    #[test]
    fn a_volume_that_moves_meanwhile_is_noticed() {
        struct Moving(RefCell<u64>);
        impl Below for Moving {
            fn table(&self, _: DevNo) -> Option<Vec<Target>> {
                let params = format!("8:1 {}", *self.0.borrow());
                Some(vec![Target { start: 0, sectors: 8, kind: "linear".to_owned(), params }])
            }
            fn mirror(&self, _: &str) -> Option<Vec<(DevNo, u64)>> {
                None
            }
        }
        let moving = Moving(RefCell::new(1));
        let below = Remembered::new(&moving);
        let first = below.table(NUMBER);
        assert!(below.mirror("md0").is_none() && below.unchanged());
        *moving.0.borrow_mut() = 2;
        assert_eq!(below.table(NUMBER), first, "the same for all of one question");
        assert!(!below.unchanged());
    }
}
