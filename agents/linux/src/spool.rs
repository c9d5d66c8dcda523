//! The spool of one group: numbered records that the box does not have durably yet, in memory first, then in a file.
//!
//! A queue in the order of the numbers. Payloads go to memory until [`Spool::memory_max`] is reached, then to the file, a ring: taken
//! off in the order they were put on. The file is made with all its blocks and never grows; it holds nothing after the
//! agent died (the capture ring and the stored dirty map do), so it is never flushed and needs no format. A payload is checked when it is
//! read back; one that is damaged or cannot be read is lost from the stream, and its place is copied ([`replication::Event::SpoolLost`]).
//!
//! Bounds: memory at most `memory_max` and one record more; the file at most its size. The source machine counts charged bytes (payload
//! and header) against the sum of both, so that in order there is always room in one of them; when there is not, [`SpoolError::Full`] says so and
//! the machine opens a gap.

use model::SourceSeq;
use replication::Numbered;
use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes of a payload, shared with whoever sends them.
#[derive(Clone, Debug)]
pub struct Piece {
    pub bytes: Arc<Vec<u8>>,
    pub range: Range<usize>,
}

impl Piece {
    pub fn whole(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { bytes: Arc::new(bytes), range }
    }
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }
    pub fn len(&self) -> usize {
        self.range.len()
    }
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// A payload where it is now.
#[derive(Clone, Debug)]
pub enum Body {
    None,
    Memory(Piece),
    /// With the checksum of what was written there: what is read back gets a new one on its way, and damage would pass for data.
    File {
        file: Arc<File>,
        at: u64,
        len: u32,
        crc: u32,
    },
}

impl Body {
    /// The payload's bytes; from the file into `buffer`.
    pub fn read<'a>(&'a self, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        match self {
            Self::None => Ok(&[]),
            Self::Memory(piece) => Ok(piece.as_slice()),
            Self::File { file, at, len, crc } => {
                buffer.resize(*len as usize, 0);
                file.read_exact_at(buffer, *at)?;
                if wire::crc32(buffer) != *crc {
                    let text = format!("the spool file does not hold what was written to it at {at:#x}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Ok(buffer)
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("the spool has no room for {len} bytes")]
    Full { len: usize },
    #[error("could not write to the spool file {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not make the spool file {} of {bytes} bytes", path.display())]
    Create {
        path: PathBuf,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("record {got} does not follow {have}")]
    OutOfOrder { have: SourceSeq, got: SourceSeq },
}

struct Entry {
    record: Numbered,
    body: Body,
}

#[derive(Debug)]
struct Ring {
    file: Arc<File>,
    path: PathBuf,
    size: u64,
    /// Where the next payload goes, and where the oldest one begins; equal when empty.
    head: u64,
    tail: u64,
    count: usize,
}

#[derive(Default)]
pub struct Spool {
    entries: VecDeque<Entry>,
    memory_max: u64,
    memory: u64,
    ring: Option<Ring>,
}

impl Spool {
    pub fn new(memory_max: u64) -> Self {
        Self { memory_max, ..Self::default() }
    }

    pub fn memory_max(&self) -> u64 {
        self.memory_max
    }
    pub fn memory(&self) -> u64 {
        self.memory
    }
    /// Bytes that lie in the file.
    pub fn in_file(&self) -> u64 {
        self.entries.iter().map(|e| if let Body::File { len, .. } = e.body { u64::from(len) } else { 0 }).sum()
    }
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a file of `bytes` with all blocks allocated. One of an agent before us is replaced: nothing in it is of use.
    pub fn add_file(&mut self, path: &Path, bytes: u64) -> Result<(), SpoolError> {
        let error = |source| SpoolError::Create { path: path.to_owned(), bytes, source };
        let file = open_spool_file(path, bytes).map_err(error)?;
        self.ring = Some(Ring { file: Arc::new(file), path: path.to_owned(), size: bytes, head: 0, tail: 0, count: 0 });
        Ok(())
    }

    /// Keeps a record; it must be the next one.
    pub fn keep(&mut self, record: Numbered, payload: Option<Piece>) -> Result<(), SpoolError> {
        if let Some(last) = self.entries.back()
            && last.record.seq.next() != record.seq
        {
            return Err(SpoolError::OutOfOrder { have: last.record.seq, got: record.seq });
        }
        let body = match payload {
            None => Body::None,
            Some(piece) if piece.is_empty() => Body::None,
            Some(piece) if self.memory < self.memory_max => {
                self.memory += piece.len() as u64;
                Body::Memory(piece)
            }
            Some(piece) => match &mut self.ring {
                None => return Err(SpoolError::Full { len: piece.len() }),
                Some(ring) => ring.put(piece.as_slice())?,
            },
        };
        self.entries.push_back(Entry { record, body });
        Ok(())
    }

    /// Records `first..=last`, as far as they are here.
    pub fn range(&self, first: SourceSeq, last: SourceSeq) -> impl Iterator<Item = (Numbered, Body)> + '_ {
        let start = self.entries.front().map_or(0, |e| first.0.saturating_sub(e.record.seq.0)) as usize;
        self.entries
            .iter()
            .skip(start)
            .skip_while(move |e| e.record.seq < first)
            .take_while(move |e| e.record.seq <= last)
            .map(|e| (e.record, e.body.clone()))
    }

    /// Forgets everything up to and including `through`.
    pub fn release(&mut self, through: SourceSeq) {
        while self.entries.front().is_some_and(|e| e.record.seq <= through) {
            if let Some(entry) = self.entries.pop_front() {
                self.freed(&entry.body, true);
            }
        }
    }

    /// Forgets everything from `from` on.
    pub fn drop_from(&mut self, from: SourceSeq) {
        while self.entries.back().is_some_and(|e| e.record.seq >= from) {
            if let Some(entry) = self.entries.pop_back() {
                self.freed(&entry.body, false);
            }
        }
    }

    fn freed(&mut self, body: &Body, oldest: bool) {
        match body {
            Body::None => {}
            Body::Memory(piece) => self.memory -= piece.len() as u64,
            Body::File { at, .. } => {
                let next =
                    self.entries.iter().find_map(|e| if let Body::File { at, .. } = e.body { Some(at) } else { None });
                if let Some(ring) = &mut self.ring {
                    ring.count -= 1;
                    match (ring.count, oldest) {
                        (0, _) => (ring.head, ring.tail) = (0, 0),
                        (_, true) => ring.tail = next.unwrap_or(ring.head),
                        // The newest: its place is the next one's.
                        (_, false) => ring.head = *at,
                    }
                }
            }
        }
    }
}

impl Ring {
    fn put(&mut self, bytes: &[u8]) -> Result<Body, SpoolError> {
        let len = bytes.len() as u64;
        let full = SpoolError::Full { len: bytes.len() };
        // A payload does not wrap: at the end of the file it begins anew. `head == tail` is empty only when nothing is held.
        let at = if self.count == 0 {
            if len > self.size {
                return Err(full);
            }
            (self.head, self.tail) = (0, 0);
            0
        } else if self.head > self.tail {
            if self.head + len <= self.size {
                self.head
            } else if len < self.tail {
                0
            } else {
                return Err(full);
            }
        } else if self.head + len < self.tail {
            self.head
        } else {
            return Err(full);
        };
        self.file.write_all_at(bytes, at).map_err(|source| SpoolError::Write { path: self.path.clone(), source })?;
        self.head = at + len;
        self.count += 1;
        Ok(Body::File { file: self.file.clone(), at, len: bytes.len() as u32, crc: wire::crc32(bytes) })
    }
}

/// Opens or makes the file with exactly `bytes` allocated; keeps the blocks of one that has that size already, so that the
/// extents told to the kernel stay true.
pub fn open_spool_file(path: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOATIME)
        .open(path)?;
    let allocated = file.set_len(bytes).and_then(|()| {
        // SAFETY: a valid descriptor and plain numbers.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as i64) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    });
    if let Err(e) = allocated {
        // Nothing half-made stays behind: it would eat the room that was missing.
        drop(file);
        let _ = std::fs::remove_file(path);
        return Err(e);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Extent, MonoTime, RecordKind, VolumeId, WriteFlags};
    use std::collections::BTreeMap;

    fn record(seq: u64) -> Numbered {
        Numbered {
            seq: SourceSeq(seq),
            kind: RecordKind::Write,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent: Extent::new(seq, 1),
            mono: MonoTime(0),
            wall_us: 0,
        }
    }

    fn content(spool: &Spool, first: u64, last: u64) -> BTreeMap<u64, Vec<u8>> {
        let mut buffer = Vec::new();
        spool
            .range(SourceSeq(first), SourceSeq(last))
            .map(|(r, b)| (r.seq.0, b.read(&mut buffer).unwrap().to_vec()))
            .collect()
    }

    /// Puts and takes at random, in memory and in a small file that wraps often, beside a plain map.
    #[test]
    fn the_spool_is_a_queue_wherever_its_bytes_lie() {
        let mut refused = 0;
        for seed in 1..40u64 {
            let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut draw = |below: u64| {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                s % below
            };
            let dir = tempfile::tempdir().unwrap();
            let mut spool = Spool::new(draw(3) * 1000);
            spool.add_file(&dir.path().join("s"), 10_000).unwrap();
            let mut oracle: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            let mut next = 1u64;
            let mut in_file = 0;
            for _ in 0..600 {
                match draw(10) {
                    0..=5 => {
                        let payload = vec![next as u8; draw(1500) as usize];
                        match spool.keep(record(next), Some(Piece::whole(payload.clone()))) {
                            Ok(()) => {
                                oracle.insert(next, payload);
                                next += 1;
                            }
                            Err(SpoolError::Full { .. }) => refused += 1,
                            Err(e) => panic!("seed {seed}: {e}"),
                        }
                        in_file = in_file.max(spool.in_file());
                    }
                    6..=8 => {
                        let through = oracle.keys().next().copied().unwrap_or(next) + draw(3);
                        let through = through.min(next.saturating_sub(1));
                        spool.release(SourceSeq(through));
                        oracle = oracle.split_off(&(through + 1));
                    }
                    _ => {
                        if let Some(last) = oracle.keys().next_back().copied() {
                            let from = last - draw(3).min(oracle.len() as u64 - 1);
                            spool.drop_from(SourceSeq(from));
                            oracle.split_off(&from);
                            next = from;
                        }
                    }
                }
                assert_eq!(content(&spool, 0, u64::MAX), oracle, "seed {seed}");
                let held: u64 = oracle.values().map(|v| v.len() as u64).sum();
                assert_eq!(spool.memory() + spool.in_file(), held, "seed {seed}");
            }
            assert!(in_file > 4000, "seed {seed}: {in_file} in the file");
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn damage_in_the_file_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut spool = Spool::new(0);
        spool.add_file(&path, 10_000).unwrap();
        spool.keep(record(1), Some(Piece::whole(vec![1; 700]))).unwrap();
        spool.keep(record(2), Some(Piece::whole(vec![2; 700]))).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[3], 900).unwrap();
        let mut buffer = Vec::new();
        let (_, first) = spool.range(SourceSeq(1), SourceSeq(1)).next().unwrap();
        assert_eq!(first.read(&mut buffer).unwrap(), [1; 700]);
        let (_, second) = spool.range(SourceSeq(2), SourceSeq(2)).next().unwrap();
        assert_eq!(second.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_range_begins_where_it_is_asked_to() {
        let mut spool = Spool::new(1000);
        for seq in 5..10 {
            spool.keep(record(seq), Some(Piece::whole(vec![seq as u8]))).unwrap();
        }
        assert_eq!(content(&spool, 7, 8).into_keys().collect::<Vec<_>>(), [7, 8]);
        assert!(content(&spool, 10, 20).is_empty());
        assert!(matches!(spool.keep(record(12), None), Err(SpoolError::OutOfOrder { .. })));
    }

    #[test]
    fn a_full_disk_leaves_no_half_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut spool = Spool::new(0);
        // More than any disk has.
        assert!(matches!(spool.add_file(&path, 1 << 60), Err(SpoolError::Create { .. })));
        assert!(!path.exists());
        assert!(matches!(spool.keep(record(1), Some(Piece::whole(vec![1]))), Err(SpoolError::Full { .. })));
    }
}
