//! The kernel's device-mapper control device: the few calls that live insertion needs, and no more.
//!
//! Format: `struct dm_ioctl` (312 bytes) and behind it, for a table, one `struct dm_target_spec` (40 bytes) with its text for each
//! target (`include/uapi/linux/dm-ioctl.h`, version 4). Devices are addressed by their number: a name may change.
//!
//! [`DeviceMapper::swap`] is the one call that stands in a host's way: suspend, change of table and resume in **one** ioctl, from
//! a buffer on the stack. A process that is killed can leave a device with its old table or its new one, never suspended for good.

use crate::capture::DevNo;
use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::Path,
};

const CONTROL: &str = "/dev/mapper/control";
const HEADER_LEN: usize = 312;
const SPEC_LEN: usize = 40;
/// Tables of a few lines; a striped volume of thousands of segments still fits.
const ANSWER_MAX: usize = 4 << 20;
const INTERFACE: [u32; 3] = [4, 0, 0];
/// Longest name and identifier, without the zero behind them.
pub const NAME_MAX: usize = 127;
pub const UUID_MAX: usize = 128;

const VERSION: u32 = 0;
const DEV_CREATE: u32 = 3;
const DEV_REMOVE: u32 = 4;
const DEV_SUSPEND: u32 = 6;
const DEV_STATUS: u32 = 7;
const TABLE_LOAD: u32 = 9;
const TABLE_CLEAR: u32 = 10;
const TABLE_STATUS: u32 = 12;
const LIST_DEVICES: u32 = 2;

const F_READONLY: u32 = 1 << 0;
const F_SUSPEND: u32 = 1 << 1;
const F_STATUS_TABLE: u32 = 1 << 4;
const F_BUFFER_FULL: u32 = 1 << 8;
const F_SKIP_LOCKFS: u32 = 1 << 10;
const F_NOFLUSH: u32 = 1 << 11;
const F_SECURE: u32 = 1 << 15;

/// For udev: a device of ours is nobody's file system, physical volume or swap (upper half of the "cookie").
const UDEV_LEAVE_ALONE: u32 = (0x02 | 0x04 | 0x08 | 0x40) << 16;
/// For udev's rules of the device mapper: this comes from who made the device.
const UDEV_LOOK: u32 = 0x40 << 16;

/// One line of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub start: u64,
    pub sectors: u64,
    pub kind: String,
    pub params: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Info {
    pub number: DevNo,
    pub name: String,
    pub uuid: String,
    pub read_only: bool,
    pub suspended: bool,
    pub open_count: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum DmError {
    #[error("could not open {CONTROL}: is the kernel's device mapper there, and are we root?")]
    Control(#[source] io::Error),
    #[error("device mapper: could not {what} {device}")]
    Call {
        what: &'static str,
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("device mapper: {what} of {len} bytes is longer than {max}")]
    TooLong { what: &'static str, len: usize, max: usize },
    #[error("device mapper: the kernel's answer about {device} makes no sense: {what}")]
    Answer { device: String, what: &'static str },
}

impl DmError {
    /// Whether the kernel knows no such device.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Call { source, .. } if matches!(source.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)))
    }
}

/// Which device a call is about.
#[derive(Clone, Copy, Debug)]
enum Which<'a> {
    None,
    Number(DevNo),
    Name { name: &'a str, uuid: &'a str },
    Uuid(&'a str),
}

impl std::fmt::Display for Which<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("all devices"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Name { name, .. } => f.write_str(name),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    buffer[at..at + bytes.len()].copy_from_slice(bytes);
}
fn u32_at(buffer: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&buffer[at..at + 4]);
    u32::from_ne_bytes(four)
}
fn u64_at(buffer: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&buffer[at..at + 8]);
    u64::from_ne_bytes(eight)
}
fn text_at(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|b| *b == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).into_owned()
}

// Offsets in struct dm_ioctl.
const AT_SIZE: usize = 12;
const AT_DATA: usize = 16;
const AT_COUNT: usize = 20;
const AT_OPEN: usize = 24;
const AT_FLAGS: usize = 28;
const AT_EVENT: usize = 32;
const AT_DEV: usize = 40;
const AT_NAME: usize = 48;
const AT_UUID: usize = 176;

fn fill_header(buffer: &mut [u8], which: Which<'_>, flags: u32, event: u32) {
    for (i, number) in INTERFACE.iter().enumerate() {
        put(buffer, i * 4, &number.to_ne_bytes());
    }
    let len = buffer.len() as u32;
    put(buffer, AT_SIZE, &len.to_ne_bytes());
    put(buffer, AT_DATA, &(HEADER_LEN as u32).to_ne_bytes());
    put(buffer, AT_FLAGS, &flags.to_ne_bytes());
    put(buffer, AT_EVENT, &event.to_ne_bytes());
    match which {
        Which::None => {}
        Which::Number(n) => put(buffer, AT_DEV, &libc::makedev(n.major, n.minor).to_ne_bytes()),
        Which::Name { name, uuid } => {
            put(buffer, AT_NAME, name.as_bytes());
            put(buffer, AT_UUID, uuid.as_bytes());
        }
        Which::Uuid(uuid) => put(buffer, AT_UUID, uuid.as_bytes()),
    }
}

fn info_in(buffer: &[u8]) -> Info {
    let dev = u64_at(buffer, AT_DEV);
    let flags = u32_at(buffer, AT_FLAGS);
    Info {
        number: DevNo { major: libc::major(dev), minor: libc::minor(dev) },
        name: text_at(&buffer[AT_NAME..AT_NAME + NAME_MAX + 1]),
        uuid: text_at(&buffer[AT_UUID..AT_UUID + UUID_MAX + 1]),
        read_only: flags & F_READONLY != 0,
        suspended: flags & F_SUSPEND != 0,
        open_count: u32_at(buffer, AT_OPEN),
    }
}

/// A table as the kernel takes it: each entry says how far the next one is.
fn encode_table(table: &[Target], out: &mut Vec<u8>) -> Result<(), DmError> {
    for target in table {
        if target.kind.len() > 15 {
            return Err(DmError::TooLong { what: "a target type", len: target.kind.len(), max: 15 });
        }
        let begin = out.len();
        let len = (SPEC_LEN + target.params.len() + 1).next_multiple_of(8);
        out.resize(begin + len, 0);
        let entry = &mut out[begin..];
        put(entry, 0, &target.start.to_ne_bytes());
        put(entry, 8, &target.sectors.to_ne_bytes());
        put(entry, 20, &(len as u32).to_ne_bytes());
        put(entry, 24, target.kind.as_bytes());
        put(entry, SPEC_LEN, target.params.as_bytes());
    }
    Ok(())
}

/// A table as the kernel tells it: each entry says where the next one begins, counted from the first.
fn decode_table(data: &[u8], count: u32) -> Option<Vec<Target>> {
    let mut table = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let entry = data.get(at..)?;
        if entry.len() < SPEC_LEN {
            return None;
        }
        table.push(Target {
            start: u64_at(entry, 0),
            sectors: u64_at(entry, 8),
            kind: text_at(&entry[24..SPEC_LEN]),
            params: text_at(&entry[SPEC_LEN..]),
        });
        let next = u32_at(entry, 20) as usize;
        if next <= at && table.len() < count as usize {
            return None;
        }
        at = next;
    }
    Some(table)
}

/// How [`DeviceMapper::swap`] treats what is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InFlight {
    /// It completes on the old table.
    Complete,
    /// What the old table cannot complete is handed to the new one.
    HandOver,
}

/// The control device, opened once.
#[derive(Debug)]
pub struct DeviceMapper {
    control: File,
}

impl DeviceMapper {
    pub fn open() -> Result<Self, DmError> {
        let control = OpenOptions::new().read(true).write(true).open(Path::new(CONTROL)).map_err(DmError::Control)?;
        Ok(Self { control })
    }

    fn ioctl(&self, command: u32, buffer: &mut [u8]) -> io::Result<()> {
        // _IOWR(0xfd, command, struct dm_ioctl)
        let request = (3u32 << 30) | ((HEADER_LEN as u32) << 16) | (0xfd << 8) | command;
        loop {
            // SAFETY: the buffer begins with a struct dm_ioctl whose data_size is the buffer's length (`fill_header`); the kernel
            // writes no further than that.
            let done = unsafe { libc::ioctl(self.control.as_raw_fd(), request as libc::Ioctl, buffer.as_mut_ptr()) };
            if done == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // A suspend that a signal interrupted has changed nothing.
            if error.raw_os_error() != Some(libc::EINTR) {
                return Err(error);
            }
        }
    }

    /// A call with nothing behind the header, from the stack.
    fn short(
        &self,
        what: &'static str,
        command: u32,
        which: Which<'_>,
        flags: u32,
        event: u32,
    ) -> Result<[u8; HEADER_LEN], DmError> {
        let mut buffer = [0; HEADER_LEN];
        fill_header(&mut buffer, which, flags, event);
        self.ioctl(command, &mut buffer).map_err(|source| DmError::Call { what, device: which.to_string(), source })?;
        Ok(buffer)
    }

    /// The kernel's interface version.
    pub fn version(&self) -> Result<(u32, u32, u32), DmError> {
        let answer = self.short("ask the version of", VERSION, Which::None, 0, 0)?;
        Ok((u32_at(&answer, 0), u32_at(&answer, 4), u32_at(&answer, 8)))
    }

    pub fn info(&self, device: DevNo) -> Result<Info, DmError> {
        self.short("look at", DEV_STATUS, Which::Number(device), 0, 0).map(|b| info_in(&b))
    }

    /// The device with this identifier, if there is one.
    pub fn by_uuid(&self, uuid: &str) -> Result<Option<Info>, DmError> {
        check("an identifier", uuid, UUID_MAX)?;
        match self.short("look for", DEV_STATUS, Which::Uuid(uuid), 0, 0) {
            Ok(answer) => Ok(Some(info_in(&answer))),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Numbers and names of all devices.
    pub fn list(&self) -> Result<Vec<(DevNo, String)>, DmError> {
        let answer = self.long("list", LIST_DEVICES, Which::None, 0)?;
        let bad = || DmError::Answer { device: "all devices".to_owned(), what: "the list is cut off" };
        let data = &answer[HEADER_LEN..];
        let mut out = Vec::new();
        let mut at = 0usize;
        // A first entry without a device number: the list is empty.
        while let Some(entry) = data.get(at..).filter(|e| e.len() > 12) {
            let dev = u64_at(entry, 0);
            if dev == 0 {
                break;
            }
            out.push((DevNo { major: libc::major(dev), minor: libc::minor(dev) }, text_at(&entry[12..])));
            match u32_at(entry, 8) as usize {
                0 => break,
                next => at = at.checked_add(next).ok_or_else(bad)?,
            }
        }
        Ok(out)
    }

    /// A new device without a table, which udev leaves alone.
    pub fn create(&self, name: &str, uuid: &str) -> Result<DevNo, DmError> {
        check("a name", name, NAME_MAX)?;
        check("an identifier", uuid, UUID_MAX)?;
        let which = Which::Name { name, uuid };
        self.short("create", DEV_CREATE, which, 0, UDEV_LEAVE_ALONE).map(|b| info_in(&b).number)
    }

    /// Puts a table beside the one in use; [`swap`](Self::swap) makes it that. It may hold keys: nothing of it stays in memory.
    pub fn load(&self, device: DevNo, table: &[Target], read_only: bool) -> Result<(), DmError> {
        let mut buffer = vec![0; HEADER_LEN];
        encode_table(table, &mut buffer)?;
        let flags = F_SECURE | if read_only { F_READONLY } else { 0 };
        fill_header(&mut buffer, Which::Number(device), flags, 0);
        put(&mut buffer, AT_COUNT, &(table.len() as u32).to_ne_bytes());
        let done = self.ioctl(TABLE_LOAD, &mut buffer);
        buffer.fill(0);
        std::hint::black_box(&buffer);
        done.map_err(|source| DmError::Call { what: "load a table into", device: device.to_string(), source })
    }

    /// Forgets a table that was loaded and is not in use.
    pub fn clear(&self, device: DevNo) -> Result<(), DmError> {
        self.short("forget the new table of", TABLE_CLEAR, Which::Number(device), 0, 0).map(drop)
    }

    /// Makes the loaded table the one in use: suspend, change and resume in one call. File systems above are not frozen: they need not
    /// be, and a freeze can take as long as a file system's dirty data.
    pub fn swap(&self, device: DevNo, in_flight: InFlight) -> Result<(), DmError> {
        let flags = F_SKIP_LOCKFS | if in_flight == InFlight::HandOver { F_NOFLUSH } else { 0 };
        self.short("change the table of", DEV_SUSPEND, Which::Number(device), flags, 0).map(drop)
    }

    /// Brings a new device to life with its loaded table; udev leaves it alone.
    pub fn start(&self, device: DevNo) -> Result<(), DmError> {
        self.short("start", DEV_SUSPEND, Which::Number(device), 0, UDEV_LEAVE_ALONE).map(drop)
    }

    /// As [`start`](Self::start), for a volume that is to be mounted: udev looks into it and gives it its names.
    pub fn start_for_all(&self, device: DevNo) -> Result<(), DmError> {
        self.short("start", DEV_SUSPEND, Which::Number(device), 0, UDEV_LOOK).map(drop)
    }

    /// After a change of table that failed: the device must not stay suspended.
    pub fn resume(&self, device: DevNo) -> Result<(), DmError> {
        self.short("resume", DEV_SUSPEND, Which::Number(device), 0, 0).map(drop)
    }

    pub fn remove(&self, device: DevNo) -> Result<(), DmError> {
        self.short("remove", DEV_REMOVE, Which::Number(device), 0, UDEV_LEAVE_ALONE).map(drop)
    }

    /// The table in use. May hold keys.
    pub fn table(&self, device: DevNo) -> Result<Vec<Target>, DmError> {
        self.lines("read the table of", device, F_STATUS_TABLE | F_SECURE)
    }

    /// What each target says of itself. Does not flush: a status must not wait for a sick disk.
    pub fn status(&self, device: DevNo) -> Result<Vec<Target>, DmError> {
        self.lines("read the status of", device, F_NOFLUSH)
    }

    fn lines(&self, what: &'static str, device: DevNo, flags: u32) -> Result<Vec<Target>, DmError> {
        let mut answer = self.long(what, TABLE_STATUS, Which::Number(device), flags)?;
        let from = (u32_at(&answer, AT_DATA) as usize).min(answer.len());
        let count = u32_at(&answer, AT_COUNT);
        let table = decode_table(&answer[from..], count);
        answer.fill(0);
        std::hint::black_box(&answer);
        table.ok_or_else(|| DmError::Answer { device: device.to_string(), what: "its table is cut off" })
    }

    /// A call whose answer may be long.
    fn long(&self, what: &'static str, command: u32, which: Which<'_>, flags: u32) -> Result<Vec<u8>, DmError> {
        let mut len = 16 << 10;
        loop {
            let mut buffer = vec![0; len];
            fill_header(&mut buffer, which, flags, 0);
            self.ioctl(command, &mut buffer).map_err(|source| DmError::Call {
                what,
                device: which.to_string(),
                source,
            })?;
            if u32_at(&buffer, AT_FLAGS) & F_BUFFER_FULL == 0 {
                return Ok(buffer);
            }
            if len >= ANSWER_MAX {
                return Err(DmError::Answer { device: which.to_string(), what: "it is too long" });
            }
            len *= 4;
        }
    }
}

fn check(what: &'static str, text: &str, max: usize) -> Result<(), DmError> {
    if text.len() > max { Err(DmError::TooLong { what, len: text.len(), max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(start: u64, sectors: u64, params: &str) -> Target {
        Target { start, sectors, kind: "linear".to_owned(), params: params.to_owned() }
    }

    #[test]
    fn a_table_is_laid_out_as_the_kernel_reads_it() {
        let mut out = Vec::new();
        encode_table(&[linear(0, 8, "253:0 0"), linear(8, 16, "253:1 2048")], &mut out).unwrap();
        assert_eq!(out.len() % 8, 0);
        let next = u32_at(&out, 20) as usize;
        assert_eq!(next, 48);
        assert_eq!((u64_at(&out, next), u64_at(&out, next + 8)), (8, 16));
        assert_eq!(text_at(&out[SPEC_LEN..]), "253:0 0");
        let long = Target { kind: "a-type-of-16-char".to_owned(), ..linear(0, 8, "") };
        assert!(matches!(encode_table(&[long], &mut Vec::new()), Err(DmError::TooLong { .. })));
    }

    #[test]
    fn a_table_is_read_as_the_kernel_tells_it() {
        let table = [linear(0, 8, "253:0 0"), linear(8, 16, "253:1 2048")];
        let mut told = Vec::new();
        encode_table(&table, &mut told).unwrap();
        // The kernel counts from the first entry, not from the one before.
        let end = told.len() as u32;
        put(&mut told, 48 + 20, &end.to_ne_bytes());
        assert_eq!(decode_table(&told, 2).unwrap(), table);
        assert_eq!(decode_table(&told[..60], 2), None, "cut off");
        put(&mut told, 20, &0u32.to_ne_bytes());
        assert_eq!(decode_table(&told, 2), None, "runs in a circle");
        assert_eq!(decode_table(&[], 0).unwrap(), []);
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(check("a name", &"n".repeat(NAME_MAX), NAME_MAX).is_ok());
        assert!(matches!(check("a name", &"n".repeat(NAME_MAX + 1), NAME_MAX), Err(DmError::TooLong { .. })));
    }
}
