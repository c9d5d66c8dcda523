//! Where a file's blocks lie (FIEMAP), so that the agent's own spool file is not captured.
//!
//! [`places`] goes down from the file system to the disks that are captured: through partitions, LVM's linear volumes, LUKS (which moves data by a
//! fixed offset and changes only what it looks like) and mirrors of md. It answers only where a block that is written again stays where it is: on
//! ext2, ext3, ext4 and XFS. What writes elsewhere each time (btrfs, f2fs, a copy-on-write or striped or thin volume), what writes the data a
//! second time (ext4 with `data=journal`), and what lies on no disk of this host that is known (NFS, overlayfs) is an error that says so; the group then
//! has no spool file if that could be captured, and its writes are marked once memory is used up.
//!
//! What is answered is true until somebody moves the file or the volume below it (`pvmove`, a defragmenter). The engine asks again every few
//! seconds; what was left out in between and is not ours any more is copied.

use crate::capture::{
    DevNo,
    dm::ioctl::{DeviceMapper, Target},
};
use crate::disks::{Class, Disks};
use model::{Extent, SECTOR};
use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
};

/// What the kernel half can be told to leave out of one disk.
const EXTENTS_MAX: usize = crate::capture::bpf::layout::MAX_SKIPS;

/// Why a spool file on a protected disk cannot be left out of capture.
#[derive(Debug, thiserror::Error)]
pub enum ExtentsError {
    #[error("the file system of the state directory is on no disk that is known (device {major}:{minor})")]
    UnknownDisk { major: u32, minor: u32 },
    #[error("the state directory's file system lies on {device}, which is not a plain disk or partition")]
    Layered { device: String },
    #[error("the file system does not tell where the file lies")]
    Fiemap(#[source] io::Error),
    #[error("the file lies in more than {EXTENTS_MAX} pieces")]
    TooMany,
    #[error("a part of the file has no fixed place on the disk")]
    NoPlace,
    #[error("its file system ({}) is none of ext2, ext3, ext4 and XFS: a block that is written again may lie elsewhere", kind_name(*kind))]
    Moves { kind: i64 },
    #[error("its file system writes data to its journal as well (ext4 with data=journal, or the file's attribute j)")]
    Journalled,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS_MAX + 1],
}

const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FLAG_JOURNAL_DATA: libc::c_long = 0x4000;
/// Allocated, and no data yet: reading it answers zeroes.
const UNWRITTEN: u32 = 0x800;
/// Devices on each other; more is a loop in what we read.
const DEPTH_MAX: u32 = 8;
const FLAG_SYNC: u32 = 1;
/// Unknown, delayed, encoded, encrypted, not aligned, inline, tail, shared.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000;

/// The disk a file lies on, and its extents there in sectors of the whole disk. Plain disks and partitions only: what may be written from
/// outside the file system.
pub fn on_disk(disks: &Disks, file: &File) -> Result<(String, Vec<Extent>), ExtentsError> {
    let device = device_of(disks, file)?;
    let (disk, first) = match &device.class {
        Class::Disk => (device.name.clone(), 0),
        Class::Partition { of, start } if matches!(disks.get(of).map(|d| &d.class), Some(Class::Disk)) => {
            (of.clone(), *start)
        }
        _ => return Err(ExtentsError::Layered { device: device.title() }),
    };
    let extents = fiemap(file, FLAG_SYNC)?.0;
    Ok((disk, extents.iter().map(|e| Extent::new(first + e.start(), e.sectors.0)).collect()))
}

fn device_of<'a>(disks: &'a Disks, file: &File) -> Result<&'a crate::disks::Device, ExtentsError> {
    let dev = file.metadata().map_err(ExtentsError::Fiemap)?.dev();
    let number = DevNo { major: libc::major(dev), minor: libc::minor(dev) };
    disks.by_number(number).ok_or(ExtentsError::UnknownDisk { major: number.major, minor: number.minor })
}

/// How what a device holds lies on those under it: the table of a device-mapper device, and the members of a mirror of md with the sector at
/// which each one's data begins. None: not to be known.
pub trait Below {
    fn table(&self, device: DevNo) -> Option<Vec<Target>>;
    fn mirror(&self, name: &str) -> Option<Vec<(DevNo, u64)>>;
}

/// The running host.
pub struct Here;

impl Below for Here {
    fn table(&self, device: DevNo) -> Option<Vec<Target>> {
        DeviceMapper::open().ok()?.table(device).ok()
    }

    fn mirror(&self, name: &str) -> Option<Vec<(DevNo, u64)>> {
        let md = std::path::PathBuf::from(format!("/sys/block/{name}/md"));
        let text = |path: std::path::PathBuf| std::fs::read_to_string(path).ok().map(|s| s.trim().to_owned());
        if text(md.join("level"))? != "raid1" {
            return None;
        }
        let mut members = Vec::new();
        for entry in std::fs::read_dir(&md).ok()? {
            let entry = entry.ok()?;
            if !entry.file_name().to_string_lossy().starts_with("dev-") {
                continue;
            }
            let number = text(entry.path().join("block/dev"))?;
            let (major, minor) = number.split_once(':')?;
            let number = DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? };
            members.push((number, text(entry.path().join("offset"))?.parse().ok()?));
        }
        Some(members)
    }
}

/// Where the file lies on the disks that are captured, in sectors of each; see the module's documentation.
pub fn places(disks: &Disks, file: &File, below: &dyn Below) -> Result<Vec<(String, Extent)>, ExtentsError> {
    const EXT: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    let kind = kind_of(file).unwrap_or(0);
    if kind != EXT && kind != XFS {
        return Err(ExtentsError::Moves { kind });
    }
    let device = device_of(disks, file)?;
    if kind == EXT && journals_data(file, device.number) {
        return Err(ExtentsError::Journalled);
    }
    // Not flushed: the file's blocks were allocated long before, and this is asked every few seconds.
    let extents = fiemap(file, 0)?.0;
    let mut out = under(disks, device.number, &extents, below)?;
    out.sort();
    Ok(out)
}

/// Where extents of a device lie on the disks that are captured, in sectors of each; an error where that is not certain.
pub fn under(
    disks: &Disks,
    number: DevNo,
    extents: &[Extent],
    below: &dyn Below,
) -> Result<Vec<(String, Extent)>, ExtentsError> {
    let mut out = Vec::new();
    go_down(disks, number, extents, below, 0, &mut out)?;
    Ok(out)
}

fn go_down(
    disks: &Disks,
    number: DevNo,
    extents: &[Extent],
    below: &dyn Below,
    depth: u32,
    out: &mut Vec<(String, Extent)>,
) -> Result<(), ExtentsError> {
    let device =
        disks.by_number(number).ok_or(ExtentsError::UnknownDisk { major: number.major, minor: number.minor })?;
    let layered = || ExtentsError::Layered { device: device.title() };
    if depth > DEPTH_MAX {
        return Err(layered());
    }
    let shifted =
        |by: u64| -> Vec<Extent> { extents.iter().map(|e| Extent::new(e.start() + by, e.sectors.0)).collect() };
    match &device.class {
        Class::Disk => {
            out.extend(extents.iter().map(|e| (device.name.clone(), *e)));
            Ok(())
        }
        Class::Partition { of, start } => {
            let whole = disks.get(of).ok_or_else(layered)?;
            go_down(disks, whole.number, &shifted(*start), below, depth + 1, out)
        }
        Class::Md { .. } => {
            let members = below.mirror(&device.name).filter(|m| !m.is_empty()).ok_or_else(layered)?;
            members.into_iter().try_for_each(|(n, first)| go_down(disks, n, &shifted(first), below, depth + 1, out))
        }
        // A multipath map is captured itself.
        Class::Dm { maker, .. } if maker == "mpath" && device.queue => {
            out.extend(extents.iter().map(|e| (device.name.clone(), *e)));
            Ok(())
        }
        Class::Dm { .. } => {
            let table = below.table(number).ok_or_else(layered)?;
            let mut covered = 0;
            for line in &table {
                let here = Extent::new(line.start, line.sectors);
                let parts: Vec<Extent> = extents.iter().filter_map(|e| e.intersect(&here)).collect();
                if parts.is_empty() {
                    continue;
                }
                let (to, first) = moved_by(line).ok_or_else(layered)?;
                covered += parts.iter().map(|e| e.sectors.0).sum::<u64>();
                let parts: Vec<Extent> =
                    parts.iter().map(|e| Extent::new(first + (e.start() - line.start), e.sectors.0)).collect();
                go_down(disks, to, &parts, below, depth + 1, out)?;
            }
            if covered != extents.iter().map(|e| e.sectors.0).sum::<u64>() {
                return Err(layered());
            }
            Ok(())
        }
    }
}

/// The device and first sector that a line of a table puts its sectors to, one after the other.
fn moved_by(line: &Target) -> Option<(DevNo, u64)> {
    let mut words = line.params.split_whitespace();
    let (device, first) = match line.kind.as_str() {
        "linear" => (words.next()?, words.next()?),
        // Cipher, key, offset of the initial vector; then as above.
        "crypt" => (words.nth(3)?, words.next()?),
        _ => return None,
    };
    let (major, minor) = device.split_once(':')?;
    Some((DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? }, first.parse().ok()?))
}

/// Whether every block of the file has been written, so that writing it again changes nothing but its data.
pub fn is_written(file: &File) -> bool {
    matches!(fiemap(file, 0), Ok((_, flags)) if flags & UNWRITTEN == 0)
}

/// The file's extents on its device, in sectors, joined where they touch; and all their flags.
fn fiemap(file: &File, flags: u32) -> Result<(Vec<Extent>, u32), ExtentsError> {
    let mut map = Fiemap {
        start: 0,
        length: u64::MAX,
        flags,
        mapped: 0,
        count: EXTENTS_MAX as u32 + 1,
        reserved: 0,
        extents: [FiemapExtent::default(); EXTENTS_MAX + 1],
    };
    // SAFETY: a valid descriptor, and a struct of the kernel's layout with room for `count` extents.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } != 0 {
        return Err(ExtentsError::Fiemap(io::Error::last_os_error()));
    }
    let mut out: Vec<Extent> = Vec::new();
    let mut seen = 0;
    for e in map.extents.iter().take(map.mapped as usize) {
        if e.flags & NO_PLACE != 0 || e.physical % SECTOR != 0 || e.length % SECTOR != 0 {
            return Err(ExtentsError::NoPlace);
        }
        seen |= e.flags;
        let start = e.physical / SECTOR;
        match out.last_mut() {
            Some(last) if last.end() == start => last.sectors.0 += e.length / SECTOR,
            _ => out.push(Extent::new(start, e.length / SECTOR)),
        }
    }
    if out.len() > EXTENTS_MAX || map.mapped as usize > EXTENTS_MAX {
        return Err(ExtentsError::TooMany);
    }
    Ok((out, seen))
}

/// Whether a file of ext4 goes through the journal with its data, where what is written lands in the journal's blocks first.
fn journals_data(file: &File, device: DevNo) -> bool {
    let mut flags: libc::c_long = 0;
    // SAFETY: a valid descriptor, and a long of ours to be written.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS, &raw mut flags) } == 0 && flags & FLAG_JOURNAL_DATA != 0
    {
        return true;
    }
    mounted_with_journal(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(), device)
}

fn mounted_with_journal(mountinfo: &str, device: DevNo) -> bool {
    let number = device.to_string();
    mountinfo.lines().filter(|l| l.split(' ').nth(2) == Some(&number)).any(|l| {
        let options = l.split_once(" - ").and_then(|(_, right)| right.split(' ').nth(2)).unwrap_or_default();
        options.split(',').any(|o| o == "data=journal")
    })
}

/// A file system as people call it, by the number that `statfs` gives it.
fn kind_name(kind: i64) -> String {
    let name = match kind {
        0x9123_683e => "btrfs",
        0xf2f5_2010 => "f2fs",
        0x2fc1_2fc1 => "ZFS",
        0xca45_1a4e => "bcachefs",
        0x794c_7630 => "overlayfs",
        0x6969 => "NFS",
        0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x6573_5546 => "FUSE",
        _ => return format!("type {kind:#x}"),
    };
    name.to_owned()
}

fn kind_of(file: &File) -> Option<i64> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a valid descriptor, and a struct of ours to be written.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so it filled the struct.
    #[allow(clippy::unnecessary_cast, reason = "the field's type differs between C libraries")]
    let kind = unsafe { stat.assume_init() }.f_type as i64;
    Some(kind)
}

/// Whether a file lies on a file system that has no disk.
pub fn in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    matches!(kind_of(file), Some(TMPFS | RAMFS))
}

/// The file that a loop device lies on, if it is one.
pub fn file_of_loop(disk: &str) -> Option<std::path::PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/block/{disk}/loop/backing_file")).ok()?;
    Some(text.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disks::Roots;
    use std::{collections::BTreeMap, fs, path::Path};

    #[derive(Default)]
    struct Told {
        tables: BTreeMap<DevNo, Vec<Target>>,
        mirrors: BTreeMap<String, Vec<(DevNo, u64)>>,
    }

    impl Below for Told {
        fn table(&self, device: DevNo) -> Option<Vec<Target>> {
            self.tables.get(&device).cloned()
        }
        fn mirror(&self, name: &str) -> Option<Vec<(DevNo, u64)>> {
            self.mirrors.get(name).cloned()
        }
    }

    fn device(sys: &Path, name: &str, number: &str, more: &[(&str, &str)]) {
        let dir = sys.join("block").join(name);
        fs::create_dir_all(dir.join("mq")).unwrap();
        for (file, text) in [("dev", number), ("size", "1000000")].iter().chain(more) {
            fs::create_dir_all(dir.join(file).parent().unwrap()).unwrap();
            fs::write(dir.join(file), text).unwrap();
        }
    }

    fn no(major: u32, minor: u32) -> DevNo {
        DevNo { major, minor }
    }

    fn line(start: u64, sectors: u64, kind: &str, params: &str) -> Target {
        Target { start, sectors, kind: kind.to_owned(), params: params.to_owned() }
    }

    /// LUKS on a volume of LVM in two pieces, one on a partition and one on a mirror of two disks.
    #[test]
    fn extents_are_followed_down_to_the_disks() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path().join("sys");
        device(
            &sys,
            "sda",
            "8:0",
            &[("sda1/partition", "1"), ("sda1/dev", "8:1"), ("sda1/size", "900000"), ("sda1/start", "2048")],
        );
        device(&sys, "sdb", "8:16", &[]);
        device(&sys, "sdc", "8:32", &[]);
        device(&sys, "md0", "9:0", &[("md/level", "raid1")]);
        device(&sys, "dm-0", "253:0", &[("dm/uuid", "LVM-x"), ("dm/name", "vg-lv")]);
        device(&sys, "dm-1", "253:1", &[("dm/uuid", "CRYPT-x"), ("dm/name", "luks")]);
        let roots = Roots { sys, proc: dir.path().join("proc"), dev: dir.path().join("dev") };
        let disks = Disks::discover(&roots, &|_| None).unwrap();
        let mut told = Told::default();
        told.tables.insert(
            no(253, 1),
            vec![line(0, 90_000, "crypt", "aes-xts-plain64 :64:logon:k 0 253:0 4096 1 allow_discards")],
        );
        told.tables
            .insert(no(253, 0), vec![line(0, 50_000, "linear", "8:1 100"), line(50_000, 50_000, "linear", "9:0 7")]);
        told.mirrors.insert("md0".to_owned(), vec![(no(8, 16), 2048), (no(8, 32), 4096)]);
        let follow = |told: &Told, extents: &[Extent]| {
            let mut out = Vec::new();
            go_down(&disks, no(253, 1), extents, told, 0, &mut out).map(|()| {
                out.sort();
                out
            })
        };
        // 45,000 + 4096 lies 904 sectors before the end of the first piece.
        let out = follow(&told, &[Extent::new(45_000, 1000), Extent::new(10, 5)]).unwrap();
        let at = |disk: &str, start, len| (disk.to_owned(), Extent::new(start, len));
        assert_eq!(
            out,
            [
                at("sda", 2048 + 100 + 4106, 5),
                at("sda", 2048 + 100 + 49_096, 904),
                at("sdb", 2048 + 7, 96),
                at("sdc", 4096 + 7, 96)
            ]
        );
        // Behind the end of a table, on something that is not one piece after the other, or a circle: not known.
        assert!(matches!(follow(&told, &[Extent::new(89_999, 2)]), Err(ExtentsError::Layered { .. })));
        told.mirrors.clear();
        assert!(matches!(follow(&told, &[Extent::new(46_000, 8)]), Err(ExtentsError::Layered { .. })));
        assert!(follow(&told, &[Extent::new(0, 8)]).is_ok());
        told.tables.insert(no(253, 0), vec![line(0, 100_000, "striped", "2 128 8:16 0 8:32 0")]);
        assert!(matches!(follow(&told, &[Extent::new(0, 8)]), Err(ExtentsError::Layered { .. })));
        told.tables.insert(no(253, 0), vec![line(0, 100_000, "linear", "253:1 0")]);
        assert!(matches!(follow(&told, &[Extent::new(0, 8)]), Err(ExtentsError::Layered { .. })));
        told.tables.insert(no(253, 0), vec![line(0, 100_000, "linear", "7:99 0")]);
        assert!(matches!(follow(&told, &[Extent::new(0, 8)]), Err(ExtentsError::UnknownDisk { major: 7, minor: 99 })));
    }

    #[test]
    fn a_journal_of_data_is_seen_in_the_mount() {
        let text = "29 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,data=journal\n30 1 8:2 / /x rw - ext4 /dev/sda2 rw\n";
        assert!(mounted_with_journal(text, no(8, 1)));
        assert!(!mounted_with_journal(text, no(8, 2)));
        assert!(!mounted_with_journal("garbage", no(8, 1)));
    }

    /// Allocated is not written; what was written all over stays where it is when it is written again.
    #[test]
    fn a_file_that_was_filled_keeps_its_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let (file, _) = crate::spool::open_spool_file(&path, 4 << 20).unwrap();
        let Ok((before, flags)) = fiemap(&file, FLAG_SYNC) else {
            return println!("SKIPPED: a filled file's places: the temporary directory's file system has no FIEMAP");
        };
        assert!(flags & UNWRITTEN != 0 && !is_written(&file), "{flags:#x}");
        use std::os::unix::fs::FileExt;
        let plain = fs::OpenOptions::new().write(true).open(&path).unwrap();
        for round in 1..3u8 {
            plain.write_all_at(&vec![round; 4 << 20], 0).unwrap();
            plain.sync_all().unwrap();
            assert_eq!(fiemap(&file, FLAG_SYNC).unwrap().0, before);
            assert!(is_written(&file));
        }
    }
}
