//! Where a file's blocks lie on its disk (FIEMAP), so that the agent's own spool file is not captured.

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
const FLAG_SYNC: u32 = 1;
/// Unknown, delayed, encoded, encrypted, not aligned, inline, tail, shared.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000;

/// The disk a file lies on, and its extents there in sectors of the whole disk.
pub fn on_disk(disks: &Disks, file: &File) -> Result<(String, Vec<Extent>), ExtentsError> {
    let dev = file.metadata().map_err(ExtentsError::Fiemap)?.dev();
    let number = crate::capture::DevNo { major: libc::major(dev), minor: libc::minor(dev) };
    let device =
        disks.by_number(number).ok_or(ExtentsError::UnknownDisk { major: number.major, minor: number.minor })?;
    let (disk, first) = match &device.class {
        Class::Disk => (device.name.clone(), 0),
        Class::Partition { of, start } if matches!(disks.get(of).map(|d| &d.class), Some(Class::Disk)) => {
            (of.clone(), *start)
        }
        _ => return Err(ExtentsError::Layered { device: device.title() }),
    };
    let mut map = Fiemap {
        start: 0,
        length: u64::MAX,
        flags: FLAG_SYNC,
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
    for e in map.extents.iter().take(map.mapped as usize) {
        if e.flags & NO_PLACE != 0 || e.physical % SECTOR != 0 || e.length % SECTOR != 0 {
            return Err(ExtentsError::NoPlace);
        }
        let start = first + e.physical / SECTOR;
        match out.last_mut() {
            Some(last) if last.end() == start => last.sectors.0 += e.length / SECTOR,
            _ => out.push(Extent::new(start, e.length / SECTOR)),
        }
    }
    if out.len() > EXTENTS_MAX || map.mapped as usize > EXTENTS_MAX {
        return Err(ExtentsError::TooMany);
    }
    Ok((disk, out))
}

/// Whether a file lies on a file system that has no disk.
pub fn in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a valid descriptor, and a struct of ours to be written.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call succeeded, so it filled the struct.
    #[allow(clippy::unnecessary_cast, reason = "the field's type differs between C libraries")]
    let kind = unsafe { stat.assume_init() }.f_type as i64;
    kind == TMPFS || kind == RAMFS
}
