//! The spool of one group: numbered records that the box does not have durably yet, in memory first, then in a file.
//!
//! A queue in the order of the numbers. Payloads go to memory until [`Spool::memory_max`] is nearly reached; what comes then is gathered in
//! memory and written to the file in chunks of [`CHUNK_BYTES`], each with one write: a disk that is busy anyway sees few large requests instead of
//! one for each record. The file is a ring of chunks; a chunk's room is free again when its last record is gone. It is read a chunk at a time as well.
//!
//! **The file** is made with all its blocks, never grows, and is filled with zeroes once, behind the agent's back and with pauses, so that later
//! writes change no block of the file system but those: their places are told to the kernel half, which leaves them out of
//! capture ([`crate::extents`]); the spool never captures itself. It is written and read past the page cache (`O_DIRECT`): what is written lies on
//! the disk at these places at once and in these requests, and the host's cache is left alone. Where the file system knows no direct I/O the cache
//! is used, and the status says so.
//!
//! **Power loss.** The file holds nothing after the agent died (the capture ring and the stored dirty map do), so it is never
//! flushed and needs no format. A payload is checked when it is read back; one that is damaged or cannot be read is lost from the stream, and its
//! place is copied ([`replication::Event::SpoolLost`]).
//!
//! **Limits.** The engine waits for the disk while it writes a chunk; the host does not, and what overflows the capture ring meanwhile is marked.
//!
//! Bounds: memory at most `memory_max` and one record more, a chunk while it is written, and a chunk for each connection that reads from the file;
//! the file at most its size. The source machine counts charged bytes (payload and header) against memory and [`usable`], so that in
//! order there is always room in one of them; when there is not, [`SpoolError::Full`] says so and the machine opens a gap.

use crate::extents;
use durable::AlignedBuf;
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
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Payloads are written together up to this: a disk's time for it is mostly the transfer, and memory hardly notices it.
pub const CHUNK_BYTES: usize = 512 << 10;
/// Zeroes written at once; who wants to spill meanwhile waits for one of these at most.
const PREWRITE_BYTES: usize = 256 << 10;
/// The pause after each, in times of what it took: the host has the disk for itself three quarters of the time.
const PREWRITE_PAUSE: u32 = 3;
const PREWRITE_PAUSE_MAX: Duration = Duration::from_millis(500);

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

/// Payloads that were written to the file together; never written again while somebody holds this.
#[derive(Debug)]
pub struct Chunk {
    file: Arc<File>,
    at: u64,
    /// A multiple of what direct I/O wants.
    len: usize,
}

/// A payload where it is now.
#[derive(Clone, Debug)]
pub enum Body {
    None,
    Memory(Piece),
    /// With the checksum of what was written there: what is read back gets a new one on its way, and damage would pass for data.
    File {
        chunk: Arc<Chunk>,
        from: usize,
        len: usize,
        crc: u32,
    },
}

/// The chunk that was read last: the records in it are asked for one after the other.
#[derive(Default)]
pub struct Scratch {
    held: Option<(Arc<Chunk>, AlignedBuf)>,
}

impl Body {
    /// The payload's bytes; from the file by way of `scratch`.
    pub fn read<'a>(&'a self, scratch: &'a mut Scratch) -> io::Result<&'a [u8]> {
        match self {
            Self::None => Ok(&[]),
            Self::Memory(piece) => {
                // The file has been read up to what is in memory: its buffer goes.
                scratch.held = None;
                Ok(piece.as_slice())
            }
            Self::File { chunk, from, len, crc } => {
                if !scratch.held.as_ref().is_some_and(|(held, _)| Arc::ptr_eq(held, chunk)) {
                    scratch.held = Some((chunk.clone(), chunk.read()?));
                }
                let bytes = scratch.held.as_ref().and_then(|(_, b)| b.as_slice().get(*from..*from + *len));
                match bytes {
                    Some(bytes) if wire::crc32(bytes) == *crc => Ok(bytes),
                    _ => {
                        let at = chunk.at + *from as u64;
                        let text = format!("the spool file does not hold what was written to it at {at:#x}");
                        Err(io::Error::new(io::ErrorKind::InvalidData, text))
                    }
                }
            }
        }
    }
}

impl Chunk {
    fn read(&self) -> io::Result<AlignedBuf> {
        let mut bytes = zeroes(self.len);
        self.file.read_exact_at(bytes.as_mut_slice(), self.at)?;
        Ok(bytes)
    }
}

fn zeroes(len: usize) -> AlignedBuf {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut bytes = AlignedBuf::with_capacity(len);
    while bytes.len() < len {
        bytes.extend_from_slice(&ZEROES[..(len - bytes.len()).min(ZEROES.len())]);
    }
    bytes
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
    /// In memory until the chunk that it belongs to is full.
    staged: bool,
}

/// What of a file of `bytes` can be counted on: a chunk may not fit before the file's end, one at each end of the ring may be held by a single
/// record, one is being gathered, and each ends on a whole block (at most 4 KiB for at least 384 KiB).
pub fn usable(bytes: u64) -> u64 {
    bytes.saturating_sub(4 * CHUNK_BYTES as u64 + bytes / 64)
}

/// How far the file has been filled, with zeroes or with records; the ring and who fills take turns.
#[derive(Debug, Default)]
struct Fill {
    to: Mutex<u64>,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Held {
    chunk: Arc<Chunk>,
    /// Records in it that are still wanted.
    live: usize,
}

#[derive(Debug)]
struct Ring {
    file: Arc<File>,
    path: PathBuf,
    size: u64,
    chunks: VecDeque<Held>,
    fill: Arc<Fill>,
    direct: bool,
}

#[derive(Default)]
pub struct Spool {
    entries: VecDeque<Entry>,
    memory_max: u64,
    memory: u64,
    staged: u64,
    in_file: u64,
    chunk: u64,
    ring: Option<Ring>,
}

impl Spool {
    pub fn new(memory_max: u64) -> Self {
        Self { memory_max, chunk: CHUNK_BYTES as u64, ..Self::default() }
    }

    pub fn memory_max(&self) -> u64 {
        self.memory_max
    }
    pub fn memory(&self) -> u64 {
        self.memory
    }
    /// Bytes that lie in the file.
    pub fn in_file(&self) -> u64 {
        self.in_file
    }
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    /// How the file is written; None without one.
    pub fn file_io(&self) -> Option<&'static str> {
        self.ring.as_ref().map(|r| if r.direct { "direct" } else { "buffered" })
    }
    /// How far the file has been filled, of how much.
    pub fn filled(&self) -> Option<(u64, u64)> {
        self.ring.as_ref().map(|r| (*r.fill.to.lock().unwrap_or_else(|e| e.into_inner()), r.size))
    }

    /// Adds a file of `bytes` with all blocks allocated. One of an agent before us is replaced: nothing in it is of use.
    pub fn add_file(&mut self, path: &Path, bytes: u64) -> Result<(), SpoolError> {
        let error = |source| SpoolError::Create { path: path.to_owned(), bytes, source };
        let (file, direct) = open_spool_file(path, bytes).map_err(error)?;
        let ring = Ring {
            file: Arc::new(file),
            path: path.to_owned(),
            size: bytes,
            chunks: VecDeque::new(),
            fill: Arc::new(Fill::default()),
            direct,
        };
        ring.fill_ahead().map_err(error)?;
        self.ring = Some(ring);
        Ok(())
    }

    /// Nothing more goes to the file; what is in it can still be read.
    pub fn close_file(&mut self) {
        self.ring = None;
        self.staged = 0;
        self.entries.iter_mut().for_each(|e| e.staged = false);
    }

    /// Keeps a record; it must be the next one.
    pub fn keep(&mut self, record: Numbered, payload: Option<Piece>) -> Result<(), SpoolError> {
        if let Some(last) = self.entries.back()
            && last.record.seq.next() != record.seq
        {
            return Err(SpoolError::OutOfOrder { have: last.record.seq, got: record.seq });
        }
        let Some(piece) = payload.filter(|piece| !piece.is_empty()) else {
            self.entries.push_back(Entry { record, body: Body::None, staged: false });
            return Ok(());
        };
        let len = piece.len() as u64;
        let reserved = if self.ring.is_some() { self.chunk.min(self.memory_max) } else { 0 };
        let staged = self.memory - self.staged >= self.memory_max - reserved;
        if staged {
            if self.ring.is_none() {
                return Err(SpoolError::Full { len: piece.len() });
            }
            if self.staged + len > self.chunk {
                self.write_staged()?;
            }
            self.staged += len;
        }
        self.memory += len;
        self.entries.push_back(Entry { record, body: Body::Memory(piece), staged });
        Ok(())
    }

    /// Writes what was gathered as one chunk. On an error it stays where it is.
    fn write_staged(&mut self) -> Result<(), SpoolError> {
        let Some(ring) = self.ring.as_mut().filter(|_| self.staged > 0) else { return Ok(()) };
        let mut buffer = AlignedBuf::with_capacity(self.staged as usize);
        // The staged ones are among the newest: nothing is looked at twice in vain.
        let mut left = self.staged;
        let mut first = self.entries.len();
        while left > 0 && first > 0 {
            first -= 1;
            if let Entry { body: Body::Memory(piece), staged: true, .. } = &self.entries[first] {
                left -= piece.len() as u64;
            }
        }
        let written = self.entries.range(first..).filter(|e| e.staged);
        for entry in written {
            if let Body::Memory(piece) = &entry.body {
                buffer.extend_from_slice(piece.as_slice());
            }
        }
        buffer.pad();
        let chunk = ring.put(&buffer)?;
        let (mut from, mut live) = (0, 0);
        for entry in self.entries.range_mut(first..).filter(|e| e.staged) {
            let Body::Memory(piece) = &entry.body else { continue };
            let (len, crc) = (piece.len(), wire::crc32(piece.as_slice()));
            entry.body = Body::File { chunk: chunk.clone(), from, len, crc };
            entry.staged = false;
            from += len;
            live += 1;
        }
        ring.chunks.push_back(Held { chunk, live });
        self.in_file += from as u64;
        self.memory -= from as u64;
        self.staged = 0;
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
                self.freed(&entry);
            }
        }
    }

    /// Forgets everything from `from` on.
    pub fn drop_from(&mut self, from: SourceSeq) {
        while self.entries.back().is_some_and(|e| e.record.seq >= from) {
            if let Some(entry) = self.entries.pop_back() {
                self.freed(&entry);
            }
        }
    }

    fn freed(&mut self, entry: &Entry) {
        match &entry.body {
            Body::None => {}
            Body::Memory(piece) => {
                self.memory -= piece.len() as u64;
                if entry.staged {
                    self.staged -= piece.len() as u64;
                }
            }
            Body::File { chunk, len, .. } => {
                self.in_file -= *len as u64;
                if let Some(ring) = &mut self.ring {
                    ring.freed(chunk);
                }
            }
        }
    }
}

impl Ring {
    fn freed(&mut self, chunk: &Arc<Chunk>) {
        // The oldest or the newest, by the order in which records go.
        let held = self.chunks.iter_mut().find(|h| Arc::ptr_eq(&h.chunk, chunk));
        if let Some(held) = held {
            held.live -= 1;
        }
        while self.chunks.front().is_some_and(|h| h.live == 0) {
            self.chunks.pop_front();
        }
        while self.chunks.back().is_some_and(|h| h.live == 0) {
            self.chunks.pop_back();
        }
    }

    /// Where a chunk of `len` bytes goes. A chunk does not wrap: at the end of the file it begins anew.
    fn room(&self, len: u64) -> Option<u64> {
        let (Some(oldest), Some(newest)) = (self.chunks.front(), self.chunks.back()) else {
            return (len <= self.size).then_some(0);
        };
        let (tail, head) = (oldest.chunk.at, newest.chunk.at + newest.chunk.len as u64);
        if newest.chunk.at >= tail {
            if head + len <= self.size { Some(head) } else { (len <= tail).then_some(0) }
        } else {
            (head + len <= tail).then_some(head)
        }
    }

    fn put(&mut self, bytes: &AlignedBuf) -> Result<Arc<Chunk>, SpoolError> {
        let at = self.room(bytes.len() as u64).ok_or(SpoolError::Full { len: bytes.len() })?;
        let end = at + bytes.len() as u64;
        let mut filled = self.fill.to.lock().unwrap_or_else(|e| e.into_inner());
        let written = self.file.write_all_at(bytes.as_slice(), at);
        written.map_err(|source| SpoolError::Write { path: self.path.clone(), source })?;
        // Zeroes never come over it. Chunks begin at the file's start, so nothing before was skipped.
        *filled = (*filled).max(end);
        Ok(Arc::new(Chunk { file: self.file.clone(), at, len: bytes.len() }))
    }

    /// Fills the file from a thread of its own; ends by itself, or with the ring.
    fn fill_ahead(&self) -> io::Result<()> {
        if !self.direct || extents::is_written(&self.file) {
            *self.fill.to.lock().unwrap_or_else(|e| e.into_inner()) = self.size;
            return Ok(());
        }
        let (file, fill, size, path) = (self.file.clone(), self.fill.clone(), self.size, self.path.clone());
        thread::Builder::new().name("spool-fill".to_owned()).spawn(move || {
            crate::reader::low_priority();
            if let Err(e) = fill_file(&file, &fill, size) {
                // What is written there later changes metadata of the file system as well: a cost, not a fault.
                tracing::warn!(path = %path.display(), error = %e, "could not fill the spool file ahead");
            }
        })?;
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.fill.stop.store(true, Ordering::Relaxed);
    }
}

fn fill_file(file: &File, fill: &Fill, size: u64) -> io::Result<()> {
    let zeroes = zeroes(PREWRITE_BYTES);
    while !fill.stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        {
            let mut to = fill.to.lock().unwrap_or_else(|e| e.into_inner());
            let len = (size.saturating_sub(*to)).min(PREWRITE_BYTES as u64);
            if len == 0 {
                break;
            }
            file.write_all_at(&zeroes.as_slice()[..len as usize], *to)?;
            *to += len;
        }
        thread::sleep((begun.elapsed() * PREWRITE_PAUSE).min(PREWRITE_PAUSE_MAX));
    }
    Ok(())
}

/// Opens or makes the file with exactly `bytes` allocated; keeps the blocks of one that has that size already, so that the
/// extents told to the kernel stay true. Second: whether it is written past the page cache.
pub fn open_spool_file(path: &Path, bytes: u64) -> io::Result<(File, bool)> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOATIME | flags)
            .open(path)
    };
    let (file, direct) = match open(libc::O_DIRECT) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0)?, false),
        other => (other?, true),
    };
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
    Ok((file, direct))
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
        let mut buffer = Scratch::default();
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
            let mut spool = Spool { chunk: 4096, ..Spool::new(draw(3) * 2500) };
            spool.add_file(&dir.path().join("s"), 4 * 4096).unwrap();
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
            assert!(in_file > 6000, "seed {seed}: {in_file} in the file");
        }
        assert!(refused > 10, "{refused}");
    }

    #[test]
    fn damage_in_the_file_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut spool = Spool { chunk: 1500, ..Spool::new(0) };
        spool.add_file(&path, 8192).unwrap();
        for seq in 1..=3 {
            spool.keep(record(seq), Some(Piece::whole(vec![seq as u8; 700]))).unwrap();
        }
        assert_eq!((spool.in_file(), spool.memory()), (1400, 700), "the third begins a chunk");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[3], 900).unwrap();
        let mut buffer = Scratch::default();
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

    /// Zeroes that are written ahead never come over a record, and in the end the whole file has been written.
    #[test]
    fn the_file_is_filled_behind_what_is_spooled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut spool = Spool::new(0);
        const SIZE: u64 = 24 << 20;
        spool.add_file(&path, SIZE).unwrap();
        let mut oracle = BTreeMap::new();
        let mut seq = 0;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            seq += 1;
            let payload: Vec<u8> = (0..60_000u32).map(|i| (i as u64 * 31 + seq * 7) as u8 | 1).collect();
            match spool.keep(record(seq), Some(Piece::whole(payload.clone()))) {
                Ok(()) => drop(oracle.insert(seq, payload)),
                Err(e) => {
                    assert!(matches!(e, SpoolError::Full { .. }), "{e}");
                    let through = seq - 100;
                    assert_eq!(content(&spool, 0, u64::MAX), oracle);
                    spool.release(SourceSeq(through));
                    oracle = oracle.split_off(&(through + 1));
                    seq -= 1;
                }
            }
            let (to, size) = spool.filled().unwrap();
            assert_eq!(size, SIZE);
            if to == SIZE && spool.in_file() > SIZE / 2 {
                break;
            }
            assert!(Instant::now() < deadline, "filled to {to}");
        }
        assert_eq!(content(&spool, 0, u64::MAX), oracle);
        let (file, _) = open_spool_file(&path, SIZE).unwrap();
        assert!(spool.file_io() == Some("buffered") || extents::is_written(&file));
        drop(file);
        // Another agent finds it filled and does not fill it again.
        let mut next = Spool::new(0);
        next.add_file(&path, SIZE).unwrap();
        assert_eq!(next.filled(), Some((SIZE, SIZE)));
    }

    /// What a file of a size holds at least, whatever the lengths and however the ring stands.
    #[test]
    fn what_is_counted_on_fits() {
        for seed in 1..6u64 {
            let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut draw = |below: u64| {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                s % below
            };
            let dir = tempfile::tempdir().unwrap();
            let size = 12u64 << 20;
            let memory = 1 << 20;
            let mut spool = Spool::new(memory);
            spool.add_file(&dir.path().join("s"), size).unwrap();
            let (mut seq, mut first, mut held) = (0u64, 1u64, VecDeque::new());
            let mut sum = 0;
            for _ in 0..3000 {
                let len = if draw(4) == 0 { 131_072 } else { (1 + draw(16)) * 512 };
                if sum + len > usable(size) + memory {
                    for _ in 0..draw(200) {
                        if let Some(len) = held.pop_front() {
                            sum -= len;
                            first += 1;
                        }
                    }
                    spool.release(SourceSeq(first - 1));
                    continue;
                }
                seq += 1;
                spool
                    .keep(record(seq), Some(Piece::whole(vec![3; len as usize])))
                    .unwrap_or_else(|e| panic!("seed {seed}, {sum}: {e}"));
                sum += len;
                held.push_back(len);
                assert!(spool.memory() <= memory + 131_072, "seed {seed}: {}", spool.memory());
            }
        }
    }

    #[test]
    fn a_closed_file_is_read_and_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool { chunk: 4096, ..Spool::new(4096) };
        spool.add_file(&dir.path().join("s"), 8 * 4096).unwrap();
        for seq in 1..=8 {
            spool.keep(record(seq), Some(Piece::whole(vec![seq as u8; 2000]))).unwrap();
        }
        let in_file = spool.in_file();
        assert!(in_file > 0);
        spool.close_file();
        assert_eq!(content(&spool, 0, u64::MAX).len(), 8);
        while spool.keep(record(spool.len() as u64 + 1), Some(Piece::whole(vec![9; 2000]))).is_ok() {}
        assert_eq!(spool.in_file(), in_file);
        spool.release(SourceSeq(100));
        assert_eq!((spool.memory(), spool.in_file()), (0, 0));
    }
}
