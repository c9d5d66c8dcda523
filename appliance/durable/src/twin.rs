//! A small value kept in two files, so that one damaged copy loses nothing.
//!
//! **Format** of `<name>.a` and `<name>.b`, little-endian: magic (8 bytes) · format version u32 · body length u32 ·
//! sequence u64 · CRC-32 of the body u32 · CRC-32 of the 28 bytes before u32 · body. Nothing follows, nothing is padding: each
//! bit of the file is covered by a checksum. A later format keeps the header as it is.
//!
//! **Storing** raises the sequence by one and replaces both copies, the older (or damaged, or missing) one first: until that
//! one is durable the other still holds the value before, so there is a valid copy at every moment. Both are written
//! each time, rather than in turns, because a copy that alone holds the newest value would, damaged, silently take its
//! owner back in time: to a term already given away or a cutoff already deleted behind. A copy is replaced by flush and rename
//! ([`Disk::replace`]) rather than written in place: a power cut then never leaves a damaged copy, so damage that is found is
//! always real and worth an alarm, a full disk fails before the old copy is touched, and someone reading at the same time
//! sees whole values only.
//!
//! **Loading** takes the valid copy with the highest sequence. Copies one apart are an interrupted store, and only `a`, with
//! sequence 1, an interrupted creation; neither is worth a word. Everything else is a [`CopyFault`], which
//! [`Twin::fault`] reports and the next store repairs; loading itself writes nothing. Two damaged copies, two different values
//! of one sequence and a copy of a newer format are errors. A process that was killed inside a store may leave a copy whose name is
//! not durable yet: who is going to act on the value calls [`Disk::cleanup`] on its directory before it loads.
//!
//! **Power loss** during a store leaves the value before or the new one. After a store that *failed* either may be found;
//! storing again is safe.
//!
//! Limit: [`TWIN_BODY_MAX`]. Tests: `tests/twin.rs`.

use crate::{Corruption, Disk, DiskError, OpenMode};
use model::ByteLen;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The largest body: 4 MiB, so that a damaged length cannot ask for the machine's memory.
pub const TWIN_BODY_MAX: usize = 4 << 20;

const MAGIC: [u8; 8] = *b"HFTWIN\r\n";
const VERSION: u32 = 1;
const HEADER: usize = 32;

/// Where a value is kept and which sequence it has reached.
#[derive(Debug)]
pub struct Twin {
    dir: PathBuf,
    name: String,
    sequence: u64,
    /// The copy that surely holds the newest value, so the one to be replaced last.
    newest: Side,
    fault: Option<CopyFault>,
}

/// What is wrong with one copy, while the other is good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyFault {
    pub path: PathBuf,
    pub reason: FaultReason,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FaultReason {
    Missing,
    Damaged(Corruption),
    /// The medium could not read it; what it said.
    Unreadable(String),
    /// Valid, but older than an interrupted store explains: a store that was reported durable was lost.
    Stale {
        sequence: u64,
        newest: u64,
    },
    /// The last store wrote the other copy and failed at this one.
    NotWritten,
}

#[derive(Debug, thiserror::Error)]
pub enum TwinError {
    #[error("both copies are unusable: {}; {}", .0[0], .0[1])]
    BothDamaged(Box<[CopyFault; 2]>),
    #[error("{} and its twin have the same sequence {sequence} and different contents", path.display())]
    Split { path: PathBuf, sequence: u64 },
    #[error("{} has format {found}, this version reads up to {VERSION}", path.display())]
    NewerFormat { path: PathBuf, found: u32 },
    #[error("{} exists already", path.display())]
    Exists { path: PathBuf },
    #[error("{len} bytes are more than the {TWIN_BODY_MAX} a twin record holds")]
    TooBig { len: usize },
    #[error("{} has used up its sequence numbers", path.display())]
    SequenceUsedUp { path: PathBuf },
    #[error("could not keep a twin record")]
    Disk(#[source] DiskError),
}

impl fmt::Display for CopyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.reason {
            FaultReason::Missing => write!(f, "{path}: missing"),
            FaultReason::Damaged(damage) => write!(f, "{damage}"),
            FaultReason::Unreadable(why) => write!(f, "{path}: cannot be read: {why}"),
            FaultReason::Stale { sequence, newest } => {
                write!(f, "{path}: is at sequence {sequence}, the other at {newest}")
            }
            FaultReason::NotWritten => write!(f, "{path}: the last store failed at this copy"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    A,
    B,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

impl Twin {
    /// Writes a first value. Refused when either copy is there already, whatever is in it.
    pub fn create(disk: &dyn Disk, dir: &Path, name: &str, body: &[u8]) -> Result<Twin, TwinError> {
        for side in [Side::A, Side::B] {
            let path = copy_path(dir, name, side);
            match disk.open(&path, OpenMode::Read) {
                Ok(_) => return Err(TwinError::Exists { path }),
                Err(e) if e.is_not_found() => {}
                Err(e) => return Err(TwinError::Disk(e)),
            }
        }
        // `a` is written first: alone, with sequence 1, it is known as an interrupted creation.
        let mut twin = Twin { dir: dir.to_owned(), name: name.to_owned(), sequence: 0, newest: Side::B, fault: None };
        twin.store(disk, body)?;
        Ok(twin)
    }

    /// The newest value, or `None` if neither copy is there.
    pub fn load(disk: &dyn Disk, dir: &Path, name: &str) -> Result<Option<(Twin, Vec<u8>)>, TwinError> {
        let twin =
            |sequence, newest, fault| Twin { dir: dir.to_owned(), name: name.to_owned(), sequence, newest, fault };
        let [a, b] = [Side::A, Side::B].map(|side| read_copy(disk, &copy_path(dir, name, side)));
        let (a, b) = (a?, b?);
        Ok(Some(match (a, b) {
            (Err(a), Err(b)) if a.reason == FaultReason::Missing && b.reason == FaultReason::Missing => {
                return Ok(None);
            }
            (Err(a), Err(b)) => return Err(TwinError::BothDamaged(Box::new([a, b]))),
            (Ok(copy), Err(fault)) => {
                let creation = copy.sequence == 1 && fault.reason == FaultReason::Missing;
                (twin(copy.sequence, Side::A, (!creation).then_some(fault)), copy.body)
            }
            (Err(fault), Ok(copy)) => (twin(copy.sequence, Side::B, Some(fault)), copy.body),
            (Ok(a), Ok(b)) if a.sequence == b.sequence => {
                if a.body != b.body {
                    return Err(TwinError::Split { path: copy_path(dir, name, Side::A), sequence: a.sequence });
                }
                (twin(a.sequence, Side::A, None), a.body)
            }
            (Ok(a), Ok(b)) => {
                let (side, newer, older) = if a.sequence > b.sequence { (Side::A, a, b) } else { (Side::B, b, a) };
                let fault = (newer.sequence - older.sequence > 1).then(|| CopyFault {
                    path: copy_path(dir, name, side.other()),
                    reason: FaultReason::Stale { sequence: older.sequence, newest: newer.sequence },
                });
                (twin(newer.sequence, side, fault), newer.body)
            }
        }))
    }

    /// Replaces the value. After `Ok` the new one survives power loss and the loss of either copy.
    pub fn store(&mut self, disk: &dyn Disk, body: &[u8]) -> Result<(), TwinError> {
        if body.len() > TWIN_BODY_MAX {
            return Err(TwinError::TooBig { len: body.len() });
        }
        let sequence =
            self.sequence.checked_add(1).ok_or_else(|| TwinError::SequenceUsedUp { path: self.path(self.newest) })?;
        let copy = encode(sequence, body);
        let (first, second) = (self.newest.other(), self.newest);
        // If this fails, the same sequence is tried again into the same file: the other copy never has it with another body.
        disk.replace(&self.path(first), &copy).map_err(TwinError::Disk)?;
        // From here on `first` is the one to keep: a retry after the next failure must not touch it first.
        (self.sequence, self.newest) = (sequence, first);
        self.fault = Some(CopyFault { path: self.path(second), reason: FaultReason::NotWritten });
        disk.replace(&self.path(second), &copy).map_err(TwinError::Disk)?;
        self.fault = None;
        Ok(())
    }

    /// What was wrong with one copy when the value was loaded or last stored; the next store that succeeds repairs it.
    pub fn fault(&self) -> Option<&CopyFault> {
        self.fault.as_ref()
    }

    /// How often a value was stored.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    fn path(&self, side: Side) -> PathBuf {
        copy_path(&self.dir, &self.name, side)
    }
}

fn copy_path(dir: &Path, name: &str, side: Side) -> PathBuf {
    dir.join(match side {
        Side::A => format!("{name}.a"),
        Side::B => format!("{name}.b"),
    })
}

struct Copy {
    sequence: u64,
    body: Vec<u8>,
}

fn encode(sequence: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// The outer error stops the load; the inner one is about this copy only.
fn read_copy(disk: &dyn Disk, path: &Path) -> Result<Result<Copy, CopyFault>, TwinError> {
    let fault = |reason| Ok(Err(CopyFault { path: path.to_owned(), reason }));
    let damaged = |offset: usize, what| fault(FaultReason::Damaged(Corruption::new(path, offset as u64, what)));
    let bytes = match read_file(disk, path) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return damaged(0, "length of a twin record"),
        Err(e) if e.is_not_found() => return fault(FaultReason::Missing),
        Err(e) => return fault(FaultReason::Unreadable(e.kind.to_string())),
    };
    let Some((header, body)) = bytes.split_first_chunk::<HEADER>() else {
        return damaged(0, "length of a twin record");
    };
    if header[..8] != MAGIC {
        return damaged(0, "magic of a twin record");
    }
    if crc32fast::hash(&header[..28]) != u32_at(header, 28) {
        return damaged(0, "checksum of a twin record's header");
    }
    // After the checksum: a flipped bit must not look like a newer format.
    let found = u32_at(header, 8);
    if found != VERSION {
        return Err(TwinError::NewerFormat { path: path.to_owned(), found });
    }
    if u32_at(header, 12) as usize != body.len() {
        return damaged(HEADER, "length of a twin record's body");
    }
    if crc32fast::hash(body) != u32_at(header, 24) {
        return damaged(HEADER, "checksum of a twin record's body");
    }
    let sequence = u64::from(u32_at(header, 16)) | u64::from(u32_at(header, 20)) << 32;
    Ok(Ok(Copy { sequence, body: body.to_vec() }))
}

fn u32_at(header: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

/// `None` if the file is longer than any twin record.
fn read_file(disk: &dyn Disk, path: &Path) -> Result<Option<Vec<u8>>, DiskError> {
    let file = disk.open(path, OpenMode::Read)?;
    let ByteLen(len) = file.len()?;
    if len > (HEADER + TWIN_BODY_MAX) as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; len as usize];
    file.read_at(0, &mut bytes)?;
    Ok(Some(bytes))
}
