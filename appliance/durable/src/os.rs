//! The real disk: a directory of a mounted file system.
//!
//! **Creation.** A new file is made under a temporary name (`.new-…`), filled, flushed, renamed to its own name without
//! replacing anything, and the directory is flushed. A power cut therefore leaves either the whole file or a temporary one,
//! which `list` hides and `cleanup` removes. Files are made with mode 0600, directories with 0700: they hold hosts' data.
//!
//! **Durable writes.** [`Disk::write_queue`] takes the best of four ways that the file system and the kernel allow, found
//! by trying each with an empty write:
//!
//! | way | when |
//! |---|---|
//! | `io_uring, direct` | the usual one: O_DIRECT, each write with RWF_DSYNC |
//! | `threads, direct` | io_uring is switched off: up to four threads of the queue's own call `pwritev2(RWF_DSYNC)` |
//! | `threads, buffered` | O_DIRECT is refused (tmpfs before Linux 6.6, some overlays) |
//! | `threads, buffered, fdatasync` | RWF_DSYNC is refused too |
//!
//! Buffered writes never go through the ring and every thread has an open file of its own: the kernel reports a failed
//! write-back once per open file, so on a shared one the flush of one write could swallow the error of another.
//!
//! **Power loss.** RWF_DSYNC on a direct write becomes a forced-unit-access write or a cache flush: the device's volatile
//! cache is covered. File systems without write barriers are not supported.
//!
//! **Limits.** At most [`QUEUE_DEPTH_MAX`] writes in flight per queue. The thread that submits to a ring must outlive the
//! writes: Linux cancels what an exiting thread submitted, which then completes as a failed write.

use crate::disk::{
    ALIGN, AlignedBuf, Completion, DirEntry, Disk, DiskError, DiskErrorKind, DiskFile, OpenMode, Space, TEMP_PREFIX,
    WriteQueue, inside,
};
use model::ByteLen;
use rustix::{
    fs::{Advice, AtFlags, CWD, FallocateFlags, FlockOperation, RenameFlags, StatxFlags},
    io::{Errno, ReadWriteFlags},
};
use std::{
    collections::VecDeque,
    fmt,
    fs::{DirBuilder, File, OpenOptions},
    io::{self, IoSlice, IoSliceMut, Read},
    num::NonZeroU64,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

/// More in flight than this gains nothing on any device measured and pins memory (a batch is 1 MiB).
pub const QUEUE_DEPTH_MAX: usize = 256;
/// Four writers saturate the devices measured when each write is made durable by itself (`pwritev2` path).
const POOL_THREADS_MAX: usize = 4;
const CHUNK: usize = 1 << 20;
/// Zero-filling flushes after so much, so that its dirty pages never pile up in front of the journal's own writes.
const ZERO_FLUSH_EVERY: u64 = 16 << 20;
static ZEROES: [u8; CHUNK] = [0; CHUNK];

/// A directory of a mounted file system. Clones share nothing but the path.
#[derive(Clone, Debug)]
pub struct OsDisk {
    root: PathBuf,
    queue: QueueChoice,
}

/// The best way of durable writes to try; what is refused falls through to the next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum QueueChoice {
    #[default]
    IoUring,
    DirectThreads,
    BufferedThreads,
    FdatasyncThreads,
}

/// Why a data directory could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it; its number if it left one.
    #[error("{} is in use by another process{}", path.display(), pid.map(|p| format!(" ({p})")).unwrap_or_default())]
    Held { path: PathBuf, pid: Option<u32> },
    #[error("could not take the lock")]
    Disk(#[source] DiskError),
}

/// Holds a lock file; dropping it, or the death of the process, lets go. The file itself stays: removing it would race with
/// the next one to lock.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl OsDisk {
    /// The disk at an existing directory. One that is missing is refused rather than made: it is more likely a data partition that
    /// is not mounted than a wish for an empty disk.
    pub fn new(root: impl Into<PathBuf>) -> Result<OsDisk, DiskError> {
        let root = root.into();
        let meta = std::fs::metadata(&root).map_err(|e| DiskError::from_io("open disk", &root, e))?;
        if !meta.is_dir() {
            return Err(DiskError::from_io("open disk", &root, io::ErrorKind::NotADirectory.into()));
        }
        Ok(OsDisk { root, queue: QueueChoice::default() })
    }

    /// Like [`OsDisk::new`], but makes the directory (and its parents) when it is missing.
    pub fn create(root: impl Into<PathBuf>) -> Result<OsDisk, DiskError> {
        let root = root.into();
        make_dirs(&root).map_err(|e| DiskError::from_io("create disk", &root, e))?;
        OsDisk::new(root)
    }

    /// Starts looking for a way of durable writes at `choice` instead of the best.
    pub fn with_queue(mut self, choice: QueueChoice) -> OsDisk {
        self.queue = choice;
        self
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the exclusive lock file `path` (made if missing), so that two daemons cannot open one data directory. Advisory:
    /// it keeps out only those that ask.
    pub fn lock(&self, path: &Path) -> Result<DirLock, LockError> {
        const OP: &str = "lock";
        let fail = |e: io::Error| LockError::Disk(DiskError::from_io(OP, path, e));
        let full = self.at(OP, path).map_err(LockError::Disk)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(full)
            .map_err(fail)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                // The number is for the message only, so a missing or half-written one is no error. 20 digits hold any u64.
                let mut text = String::new();
                let read = file.by_ref().take(20).read_to_string(&mut text);
                let pid = read.ok().and_then(|_| text.trim().parse().ok());
                return Err(LockError::Held { path: path.to_owned(), pid });
            }
            Err(e) => return Err(fail(e.into())),
        }
        file.set_len(0).map_err(fail)?;
        file.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0).map_err(fail)?;
        Ok(DirLock { _file: file })
    }

    fn at(&self, op: &'static str, path: &Path) -> Result<PathBuf, DiskError> {
        Ok(self.root.join(inside(op, path)?))
    }

    fn flush_parent(&self, op: &'static str, path: &Path) -> Result<(), DiskError> {
        let dir = path.parent().unwrap_or(Path::new(""));
        flush_dir(&self.at(op, dir)?).map_err(|e| DiskError::from_io(op, dir, e))
    }

    /// Makes a file under a temporary name with `fill`, flushes it and gives it its name.
    fn make(
        &self,
        op: &'static str,
        path: &Path,
        may_replace: bool,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<File, DiskError> {
        let fail = |e: io::Error| DiskError::from_io(op, path, e);
        let target = self.at(op, path)?;
        let (Some(dir), Some(_)) = (target.parent(), path.file_name()) else {
            return Err(DiskError::invalid(op, path, "not the name of a file"));
        };
        // Asked before the work of filling; the rename below decides.
        if !may_replace && target.symlink_metadata().is_ok() {
            return Err(DiskError::new(op, path, DiskErrorKind::Exists));
        }
        let (file, mut temp) = Temp::create(dir).map_err(fail)?;
        fill(&file).map_err(fail)?;
        // Content before name: a name that is there means content that is there.
        file.sync_all().map_err(fail)?;
        if may_replace { std::fs::rename(&temp.path, &target) } else { rename_new(&temp.path, &target) }
            .map_err(fail)?;
        temp.path = target;
        let flushed = flush_dir(temp.path.parent().unwrap_or(Path::new(".")));
        // A name that may not survive is taken back (by dropping `temp`), unless it replaced one that cannot be brought back.
        temp.keep = flushed.is_ok() || may_replace;
        flushed.map_err(fail)?;
        Ok(file)
    }
}

impl Disk for OsDisk {
    fn create_zeroed(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.make("create", path, false, |file| write_zeroes(file, len))?;
        Ok(Arc::new(OsFile::new(file, path)))
    }

    fn create_sparse(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        let file = self.make("create", path, false, |file| file.set_len(len.0))?;
        Ok(Arc::new(OsFile::new(file, path)))
    }

    fn replace(&self, path: &Path, data: &[u8]) -> Result<(), DiskError> {
        self.make("replace", path, true, |file| file.write_all_at(data, 0)).map(drop)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<Arc<dyn DiskFile>, DiskError> {
        let full = self.at("open", path)?;
        let open = || -> io::Result<File> {
            let file = OpenOptions::new().read(true).write(mode == OpenMode::ReadWrite).open(full)?;
            // Opening a directory for reading succeeds; reading it would not.
            if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::IsADirectory.into()) }
        };
        let file = open().map_err(|e| DiskError::from_io("open", path, e))?;
        Ok(Arc::new(OsFile::new(file, path)))
    }

    fn write_queue(&self, path: &Path, depth: usize) -> Result<Box<dyn WriteQueue>, DiskError> {
        const OP: &str = "open write queue";
        if depth == 0 || depth > QUEUE_DEPTH_MAX {
            return Err(DiskError::invalid(OP, path, "the depth of a write queue must be 1 to 256"));
        }
        let full = self.at(OP, path)?;
        let fail = |e| DiskError::from_io(OP, path, e);
        let plain = open_for_queue(&full, 0).map_err(fail)?;
        if self.queue <= QueueChoice::DirectThreads
            && direct_fits(&plain)
            && let Ok(direct) = open_for_queue(&full, libc::O_DIRECT)
        {
            if self.queue == QueueChoice::IoUring
                && let Some(ring) = probe_ring(&direct, depth)
            {
                return Ok(Box::new(RingQueue::new(ring, direct, path, depth)));
            }
            if accepts_dsync(&direct) {
                let queue = PoolQueue::new(&full, path, depth, PoolWay::Direct).map_err(fail)?;
                return Ok(Box::new(queue));
            }
        }
        let dsync = self.queue <= QueueChoice::BufferedThreads && accepts_dsync(&plain);
        let way = if dsync { PoolWay::Buffered } else { PoolWay::Fdatasync };
        Ok(Box::new(PoolQueue::new(&full, path, depth, way).map_err(fail)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        const OP: &str = "rename";
        let (source, target) = (self.at(OP, from)?, self.at(OP, to)?);
        if source == self.root || target == self.root {
            return Err(DiskError::invalid(OP, from, "the root cannot be renamed"));
        }
        std::fs::rename(source, target).map_err(|e| DiskError::from_io(OP, from, e))?;
        // The new name first: a cut between the two flushes may show both names, never neither.
        self.flush_parent(OP, to)?;
        if from.parent() != to.parent() {
            self.flush_parent(OP, from)?;
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        let full = self.at("remove", path)?;
        if full == self.root {
            return Err(DiskError::invalid("remove", path, "the root cannot be removed"));
        }
        let removed = match std::fs::remove_file(&full) {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => std::fs::remove_dir(&full),
            other => other,
        };
        removed.map_err(|e| DiskError::from_io("remove", path, e))?;
        self.flush_parent("remove", path)
    }

    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        const OP: &str = "create directory";
        let mut full = self.root.clone();
        for part in inside(OP, path)?.components() {
            full.push(part);
            make_dir(&full).map_err(|e| DiskError::from_io(OP, path, e))?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, DiskError> {
        let fail = |e| DiskError::from_io("list", dir, e);
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(self.at("list", dir)?).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            // A name that is not UTF-8 is nobody's here; shown as well as it can be, so that it is seen as a stray.
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(TEMP_PREFIX) {
                continue;
            }
            match entry.metadata() {
                Ok(meta) => entries.push(DirEntry {
                    name,
                    len: ByteLen(if meta.is_dir() { 0 } else { meta.len() }),
                    is_dir: meta.is_dir(),
                }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {} // removed since the directory was read
                Err(e) => return Err(fail(e)),
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn space(&self) -> Result<Space, DiskError> {
        let stat = rustix::fs::statvfs(&self.root).map_err(|e| DiskError::from_io("measure", &self.root, e.into()))?;
        // What the file system keeps back for the superuser is not counted as available: running into it is too late to act.
        let bytes = |blocks: u64| ByteLen(blocks.saturating_mul(stat.f_frsize));
        Ok(Space { total: bytes(stat.f_blocks), available: bytes(stat.f_bavail) })
    }

    fn cleanup(&self, dir: &Path) -> Result<usize, DiskError> {
        let fail = |e| DiskError::from_io("clean up", dir, e);
        let full = self.at("clean up", dir)?;
        let mut removed = 0;
        for entry in std::fs::read_dir(&full).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if entry.file_name().as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes()) {
                std::fs::remove_file(entry.path()).map_err(fail)?;
                removed += 1;
            }
        }
        flush_dir(&full).map_err(fail)?;
        Ok(removed)
    }
}

/// An open file of an [`OsDisk`].
struct OsFile {
    file: File,
    path: PathBuf,
    /// A flush failed. Linux marks the pages clean all the same, so a second flush would succeed and promise what is lost.
    poisoned: AtomicBool,
    /// Length or allocation changed since the last flush: fdatasync may skip what does not matter for reading the data
    /// back, and whether that includes a cut tail is up to the file system; fsync leaves no room for doubt.
    reshaped: AtomicBool,
}

impl OsFile {
    fn new(file: File, path: &Path) -> Self {
        Self { file, path: path.to_owned(), poisoned: AtomicBool::new(false), reshaped: AtomicBool::new(false) }
    }
    fn fail(&self, op: &'static str, e: io::Error) -> DiskError {
        DiskError::from_io(op, &self.path, e)
    }
    fn check(&self, op: &'static str) -> Result<(), DiskError> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(DiskError::new(op, &self.path, DiskErrorKind::Poisoned));
        }
        Ok(())
    }
}

impl fmt::Debug for OsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OsFile({})", self.path.display())
    }
}

impl DiskFile for OsFile {
    fn len(&self) -> Result<ByteLen, DiskError> {
        self.file.metadata().map(|m| ByteLen(m.len())).map_err(|e| self.fail("measure", e))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let mut had = 0;
        while had < buf.len() {
            match self.file.read_at(&mut buf[had..], offset.saturating_add(had as u64)) {
                Ok(0) => {
                    let kind = DiskErrorKind::ShortRead { wanted: buf.len() as u64, had: had as u64 };
                    return Err(DiskError::new("read", &self.path, kind));
                }
                Ok(n) => had += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.fail("read", e)),
            }
        }
        Ok(())
    }

    fn read_two_at(&self, offset: u64, first: &mut [u8], second: &mut [u8]) -> Result<(), DiskError> {
        let mut bufs = [IoSliceMut::new(first), IoSliceMut::new(second)];
        // Whatever came, nothing at all included, the plain way goes on from there and says what is wrong.
        let had = rustix::io::preadv(&self.file, &mut bufs, offset).unwrap_or(0);
        let later = had.saturating_sub(first.len());
        if had < first.len() {
            self.read_at(offset.saturating_add(had as u64), &mut first[had..])?;
        }
        let at = offset.saturating_add((first.len() + later) as u64);
        if later < second.len() { self.read_at(at, &mut second[later..]) } else { Ok(()) }
    }

    fn read_cached_at(&self, offset: u64, buf: &mut [u8]) -> bool {
        let len = buf.len();
        // A file system that does not know the flag refuses it, and so does one whose pages are not there.
        let read = rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT);
        read.is_ok_and(|had| had == len)
    }

    fn will_read(&self, offset: u64, len: u64) {
        // Advice: refused, it costs time and nothing else.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(len), Advice::WillNeed);
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check("write")?;
        self.file.write_all_at(data, offset).map_err(|e| self.fail("write", e))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.check("flush")?;
        let reshaped = self.reshaped.swap(false, Ordering::AcqRel);
        if reshaped { self.file.sync_all() } else { self.file.sync_data() }.map_err(|e| {
            self.poisoned.store(true, Ordering::Release);
            self.fail("flush", e)
        })
    }

    fn set_len(&self, len: ByteLen) -> Result<(), DiskError> {
        self.check("set length")?;
        self.file.set_len(len.0).map_err(|e| self.fail("set length", e))?;
        self.reshaped.store(true, Ordering::Release);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check("punch hole")?;
        if len == 0 {
            return Ok(());
        }
        let punched = match rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            // No holes here: the space stays, but it must read as zeroes.
            Err(Errno::OPNOTSUPP) => self.zero_range(offset, len),
            other => other.map_err(io::Error::from),
        };
        punched.map_err(|e| self.fail("punch hole", e))?;
        self.reshaped.store(true, Ordering::Release);
        Ok(())
    }
}

impl OsFile {
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.file.metadata()?.len());
        let mut at = offset;
        while at < end {
            let n = (end - at).min(CHUNK as u64) as usize;
            self.file.write_all_at(&ZEROES[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }
}

/// The name of a file that is being made; removed when dropped, unless `keep`.
struct Temp {
    path: PathBuf,
    keep: bool,
}

impl Temp {
    fn create(dir: &Path) -> io::Result<(File, Temp)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("{TEMP_PREFIX}{}-{n}", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => return Ok((file, Temp { path, keep: false })),
                // Left by an earlier process with our number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.keep {
            // The cause is already on its way to the caller; a leftover is hidden from `list` and goes with `cleanup`.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Renames without replacing. Where the file system cannot, a check just before has to do: the engine has one writer per
/// directory.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            if to.symlink_metadata().is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            std::fs::rename(from, to)
        }
        other => Ok(other?),
    }
}

/// Allocates first, so that a full disk is found before the work and the file lies in few pieces; then writes, because a
/// write into an allocated but unwritten range changes metadata, and each durable write would pay for it.
fn write_zeroes(file: &File, len: ByteLen) -> io::Result<()> {
    if len.0 == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len.0) {
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(e) => return Err(e.into()),
    }
    let (mut at, mut dirty) = (0, 0);
    while at < len.0 {
        let n = (len.0 - at).min(CHUNK as u64);
        file.write_all_at(&ZEROES[..n as usize], at)?;
        at += n;
        dirty += n;
        if dirty >= ZERO_FLUSH_EVERY {
            file.sync_data()?;
            dirty = 0;
        }
    }
    file.sync_all()?;
    // Direct writes would have to drop these pages one by one. Only advice: nothing depends on it.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    Ok(())
}

fn flush_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes one directory and flushes its parent, also when it is there already: the process that made it may have died
/// before it flushed.
fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        Err(e) => return Err(e),
    }
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => flush_dir(parent),
        _ => flush_dir(Path::new(".")),
    }
}

fn make_dirs(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent()
        && !parent.as_os_str().is_empty()
    {
        make_dirs(parent)?;
    }
    make_dir(dir)
}

fn open_for_queue(path: &Path, flags: i32) -> io::Result<File> {
    // Readable too: O_DIRECT on a write-only file is refused by some file systems.
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// Whether direct writes aligned to [`ALIGN`] will be taken. Kernels before 6.1 do not say; 4096 is enough for every block
/// device they know.
fn direct_fits(file: &File) -> bool {
    match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN) => {
            let fits = |align: u32| align != 0 && align as usize <= ALIGN;
            fits(stat.stx_dio_offset_align) && fits(stat.stx_dio_mem_align)
        }
        _ => true,
    }
}

/// Whether `pwritev2` is there. An empty write tells no more, and need not: the kernels that have the call honour RWF_DSYNC
/// on every file system (4.7 and later), those before and some sandboxes refuse the call itself.
fn accepts_dsync(file: &File) -> bool {
    rustix::io::pwritev2(file, &[IoSlice::new(&[])], 0, ReadWriteFlags::DSYNC).is_ok()
}

/// A ring in which an empty durable write into `file` worked.
fn probe_ring(file: &File, depth: usize) -> Option<io_uring::IoUring> {
    let mut ring = io_uring::IoUring::new(depth as u32).ok()?;
    let buf = AlignedBuf::with_capacity(ALIGN);
    let entry = durable_write(file, &buf, 0);
    // SAFETY: a write of 0 bytes reads no memory, and `file` is open until its completion is seen or the ring is dropped.
    unsafe { ring.submission().push(&entry).ok()? };
    loop {
        match ring.submit_and_wait(1) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
            Ok(_) => {}
        }
        // An interrupted wait after a successful submission says Ok.
        let done = ring.completion().next();
        if let Some(done) = done {
            return (done.result() == 0).then_some(ring);
        }
    }
}

fn durable_write(file: &File, buf: &AlignedBuf, offset: u64) -> io_uring::squeue::Entry {
    io_uring::opcode::Write::new(io_uring::types::Fd(file.as_raw_fd()), buf.as_ptr(), buf.len() as u32)
        .offset(offset)
        .rw_flags(libc::RWF_DSYNC)
        .build()
}

/// What every queue checks of a submission: a mistake here is the caller's and would damage neighbours.
pub(crate) fn check_submission(queue: &dyn WriteQueue, offset: u64, buf: &AlignedBuf) {
    assert!(offset.is_multiple_of(ALIGN as u64), "offset {offset} of a queued write is not aligned");
    assert!(buf.len().is_multiple_of(ALIGN), "length {} of a queued write is not aligned", buf.len());
    assert!(buf.len() <= QUEUED_BYTES_MAX, "a queued write of {} bytes is above the limit", buf.len());
    assert!(queue.in_flight() < queue.depth(), "more than {} writes in flight", queue.depth());
}

/// Linux cuts a single write at 2 GiB - 4 KiB, which would look like a failed one. Far above any batch.
const QUEUED_BYTES_MAX: usize = 1 << 30;

fn outcome(path: &Path, wanted: usize, result: io::Result<usize>) -> Result<(), DiskError> {
    match result {
        Ok(n) if n == wanted => Ok(()),
        // A short write is not continued: what made it short (a full disk, a dying device) is a failure of the whole.
        Ok(n) => {
            let cause = io::Error::new(io::ErrorKind::WriteZero, format!("only {n} of {wanted} bytes were written"));
            Err(DiskError::from_io("durable write", path, cause))
        }
        Err(e) => Err(DiskError::from_io("durable write", path, e)),
    }
}

fn refused(path: &Path) -> DiskError {
    DiskError::new("durable write", path, DiskErrorKind::Poisoned)
}

/// Durable writes through io_uring.
///
/// A write goes `unsent` (in the ring, not yet taken by the kernel) → with the kernel → `ready` → collected. Its buffer stays in
/// `slots` until the kernel has let go of it.
struct RingQueue {
    ring: io_uring::IoUring,
    file: File,
    path: PathBuf,
    depth: usize,
    slots: Vec<Option<(u64, AlignedBuf)>>,
    unsent: VecDeque<usize>,
    ready: Vec<Completion>,
    poisoned: bool,
    /// The kernel refused to take entries: what is left in the ring must never be sent, its buffers are gone.
    stuck: bool,
}

/// How often a busy kernel is asked again before the ring counts as broken.
const BUSY_TRIES: u32 = 10_000;

impl RingQueue {
    fn new(ring: io_uring::IoUring, file: File, path: &Path, depth: usize) -> Self {
        Self {
            ring,
            file,
            path: path.to_owned(),
            depth,
            slots: (0..depth).map(|_| None).collect(),
            unsent: VecDeque::new(),
            ready: Vec::new(),
            poisoned: false,
            stuck: false,
        }
    }

    fn push(&mut self, id: u64, offset: u64, buf: AlignedBuf) {
        let slot = self.slots.iter().position(Option::is_none).expect("fewer than depth in flight");
        let entry = durable_write(&self.file, &buf, offset).user_data(slot as u64);
        self.slots[slot] = Some((id, buf));
        self.unsent.push_back(slot);
        // SAFETY: the buffer stays in its slot and the file open until the completion is reaped; drop waits for both.
        unsafe { self.ring.submission().push(&entry) }.expect("the ring has room for depth entries");
    }

    fn with_kernel(&self) -> usize {
        self.slots.iter().flatten().count() - self.unsent.len()
    }

    fn reap(&mut self) {
        let done: Vec<(u64, i32)> = self.ring.completion().map(|c| (c.user_data(), c.result())).collect();
        for (slot, result) in done {
            let Some((id, buf)) = usize::try_from(slot).ok().and_then(|s| self.slots.get_mut(s)).and_then(Option::take)
            else {
                continue;
            };
            let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) };
            let result = outcome(&self.path, buf.len(), result);
            self.poisoned |= result.is_err();
            self.ready.push(Completion { id, buf, result });
        }
    }

    /// Sends what is unsent and, with `want` 1, waits for a completion. An interrupted or busy kernel is no error.
    fn enter(&mut self, want: usize) {
        for _ in 0..BUSY_TRIES {
            let sent = if self.stuck {
                // IORING_ENTER_GETEVENTS
                const GET_EVENTS: u32 = 1;
                // SAFETY: nothing is submitted and no argument is passed.
                unsafe { self.ring.submitter().enter::<()>(0, want as u32, GET_EVENTS, None) }.map(|_| 0)
            } else {
                self.ring.submit_and_wait(want)
            };
            match sent {
                Ok(n) => {
                    self.unsent.drain(..n.min(self.unsent.len()));
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    let before = self.ready.len();
                    self.reap();
                    if self.ready.len() > before {
                        return;
                    }
                    std::thread::yield_now();
                }
                Err(e) => return self.give_up(&e),
            }
        }
        self.give_up(&io::Error::from_raw_os_error(libc::EBUSY));
    }

    /// The kernel takes no more entries. What it has not seen fails now; what it has is waited for, and if even that is
    /// refused, its memory is never given back: the device may still read it.
    fn give_up(&mut self, e: &io::Error) {
        let copy = || io::Error::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO));
        self.poisoned = true;
        let lost: Vec<usize> =
            if self.stuck { (0..self.slots.len()).collect() } else { self.unsent.drain(..).collect() };
        for slot in lost {
            let Some((id, buf)) = self.slots[slot].take() else { continue };
            let buf = if self.stuck {
                let other = AlignedBuf::with_capacity(buf.capacity());
                std::mem::forget(buf);
                other
            } else {
                buf
            };
            self.ready.push(Completion { id, buf, result: outcome(&self.path, 1, Err(copy())) });
        }
        self.stuck = true;
    }
}

impl WriteQueue for RingQueue {
    fn submit(&mut self, id: u64, offset: u64, buf: AlignedBuf) {
        check_submission(self, offset, &buf);
        if self.poisoned {
            self.ready.push(Completion { id, buf, result: Err(refused(&self.path)) });
            return;
        }
        self.push(id, offset, buf);
        self.enter(0);
    }

    fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count() + self.ready.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn complete(&mut self, wait: bool) -> Vec<Completion> {
        self.reap();
        if !self.unsent.is_empty() {
            self.enter(0);
            self.reap();
        }
        while wait && self.ready.is_empty() && self.in_flight() > 0 {
            self.enter(1);
            self.reap();
        }
        std::mem::take(&mut self.ready)
    }

    fn completion_fd(&self) -> Option<OwnedFd> {
        // SAFETY: the ring, and with it the descriptor, lives as long as the borrow.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        ring.try_clone_to_owned().ok()
    }

    fn backend(&self) -> &'static str {
        "io_uring, direct"
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        // The kernel reads the buffers until each write is done; freeing them earlier would write someone else's memory.
        while self.with_kernel() > 0 {
            self.enter(1);
            self.reap();
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum PoolWay {
    Direct,
    Buffered,
    Fdatasync,
}

/// Durable writes by a few threads of the queue's own. The only threads this crate starts: a blocking durable write has no
/// other way to be one of several.
struct PoolQueue {
    shared: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    path: PathBuf,
    depth: usize,
    way: PoolWay,
    in_flight: usize,
}

struct Pool {
    state: Mutex<PoolState>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct PoolState {
    /// At most `depth`, by the check at submission; so is `done`.
    jobs: VecDeque<(u64, u64, AlignedBuf)>,
    done: Vec<Completion>,
    poisoned: bool,
    closing: bool,
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, PoolState> {
        // No code that can panic runs under the lock in a half-changed state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, file: &File, path: &Path, way: PoolWay) {
        let mut state = self.state();
        loop {
            let Some((id, offset, buf)) = state.jobs.pop_front() else {
                if state.closing {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let result = if state.poisoned {
                Err(refused(path))
            } else {
                drop(state);
                let result = outcome(path, buf.len(), way.write(file, offset, buf.as_slice()));
                state = self.state();
                result
            };
            state.poisoned |= result.is_err();
            state.done.push(Completion { id, buf, result });
            self.done.notify_one();
        }
    }
}

impl PoolWay {
    fn write(self, file: &File, offset: u64, data: &[u8]) -> io::Result<usize> {
        let flags = if let PoolWay::Fdatasync = self { ReadWriteFlags::empty() } else { ReadWriteFlags::DSYNC };
        let n = loop {
            match rustix::io::pwritev2(file, &[IoSlice::new(data)], offset, flags) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        if let PoolWay::Fdatasync = self {
            file.sync_data()?;
        }
        Ok(n)
    }
}

impl PoolQueue {
    fn new(full: &Path, path: &Path, depth: usize, way: PoolWay) -> io::Result<Self> {
        let shared = Arc::new(Pool { state: Mutex::default(), work: Condvar::new(), done: Condvar::new() });
        let mut queue = Self { shared, threads: Vec::new(), path: path.to_owned(), depth, way, in_flight: 0 };
        for n in 0..depth.min(POOL_THREADS_MAX) {
            let flags = if let PoolWay::Direct = way { libc::O_DIRECT } else { 0 };
            // One open file each: see the module's documentation.
            let file = open_for_queue(full, flags)?;
            let (shared, path) = (queue.shared.clone(), queue.path.clone());
            let thread = std::thread::Builder::new().name(format!("disk-write-{n}"));
            queue.threads.push(thread.spawn(move || shared.run(&file, &path, way))?);
        }
        Ok(queue)
    }
}

impl WriteQueue for PoolQueue {
    fn submit(&mut self, id: u64, offset: u64, buf: AlignedBuf) {
        check_submission(self, offset, &buf);
        self.in_flight += 1;
        let mut state = self.shared.state();
        if state.poisoned {
            state.done.push(Completion { id, buf, result: Err(refused(&self.path)) });
        } else {
            state.jobs.push_back((id, offset, buf));
            self.shared.work.notify_one();
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn complete(&mut self, wait: bool) -> Vec<Completion> {
        let mut state = self.shared.state();
        while wait && self.in_flight > 0 && state.done.is_empty() {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let done = std::mem::take(&mut state.done);
        self.in_flight -= done.len();
        done
    }

    fn backend(&self) -> &'static str {
        match self.way {
            PoolWay::Direct => "threads, direct",
            PoolWay::Buffered => "threads, buffered",
            PoolWay::Fdatasync => "threads, buffered, fdatasync",
        }
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        // What was submitted is still written: a caller that goes away has not taken it back.
        self.shared.state().closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has already said so on stderr; there is nothing left to wait for.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring_queue(dir: &Path) -> Option<RingQueue> {
        let path = Path::new("f");
        OsDisk::new(dir).expect("a disk").create_zeroed(path, ByteLen(4 * ALIGN as u64)).expect("made");
        let file = open_for_queue(&dir.join(path), libc::O_DIRECT).expect("a file for direct writes");
        let Some(ring) = probe_ring(&file, 4) else {
            println!("SKIPPED: this kernel allows no io_uring");
            return None;
        };
        Some(RingQueue::new(ring, file, path, 4))
    }

    /// Whoever waits on the descriptor is told of every completion, also of those after one was told and reaped.
    #[test]
    fn the_ring_s_descriptor_tells_of_each_completion() {
        let dir = tempfile::tempdir().expect("a directory");
        let Some(mut queue) = ring_queue(dir.path()) else { return };
        let fd = queue.completion_fd().expect("a ring has a descriptor");
        let readable = |wait: bool| {
            let mut asked = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            loop {
                // SAFETY: one entry, ours, for the length of the call.
                let told = unsafe { libc::poll(&raw mut asked, 1, if wait { 60_000 } else { 0 }) };
                // The kernel may interrupt the call to end the write in this thread.
                if told >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                    return told == 1 && asked.revents & libc::POLLIN != 0;
                }
            }
        };
        for round in 0..8 {
            assert!(!readable(false), "round {round}: nothing is under way");
            queue.submit(round, round % 4 * ALIGN as u64, full(round as u8));
            assert!(readable(true), "round {round}: not told");
            let done = queue.complete(false);
            assert_eq!(done.iter().map(|c| (c.id, c.result.is_ok())).collect::<Vec<_>>(), [(round, true)]);
        }
        drop(queue);
        assert!(!readable(false), "the copy is its own");
    }

    fn full(byte: u8) -> AlignedBuf {
        let mut buf = AlignedBuf::with_capacity(ALIGN);
        buf.extend_from_slice(&[byte; ALIGN]);
        buf
    }

    /// The kernel refuses entries: those it has seen are waited for, the others fail and are never written, even though
    /// they still stand in the ring.
    #[test]
    fn a_ring_that_breaks_fails_what_it_did_not_send_and_waits_for_the_rest() {
        let dir = tempfile::tempdir().expect("a directory");
        let Some(mut queue) = ring_queue(dir.path()) else { return };
        queue.submit(1, 0, full(1));
        queue.push(2, ALIGN as u64, full(2));
        queue.push(3, 2 * ALIGN as u64, full(3));
        queue.give_up(&io::Error::from_raw_os_error(libc::EBADF));
        queue.submit(4, 3 * ALIGN as u64, full(4));
        let mut done = Vec::new();
        while queue.in_flight() > 0 {
            done.extend(queue.complete(true));
        }
        done.sort_by_key(|c| c.id);
        let ok: Vec<(u64, bool)> = done.iter().map(|c| (c.id, c.result.is_ok())).collect();
        assert_eq!(ok, [(1, true), (2, false), (3, false), (4, false)]);
        assert!(matches!(done[3].result.as_ref().expect_err("poisoned").kind, DiskErrorKind::Poisoned));
        drop((queue, done));
        let written = std::fs::read(dir.path().join("f")).expect("read");
        assert!(written[..ALIGN].iter().all(|b| *b == 1), "the kernel had this one");
        assert!(written[ALIGN..].iter().all(|b| *b == 0), "a write that was reported as failed was sent later");
    }

    /// Not even waiting works: everything fails at once, the queue ends, and no memory the kernel may read is reused.
    #[test]
    fn a_ring_that_cannot_even_wait_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let Some(mut queue) = ring_queue(dir.path()) else { return };
        queue.submit(1, 0, full(1));
        queue.push(2, ALIGN as u64, full(2));
        let in_kernel = queue.slots[0].as_ref().map(|(_, buf)| buf.as_ptr());
        for _ in 0..2 {
            queue.give_up(&io::Error::from_raw_os_error(libc::EBADF));
        }
        let done = queue.complete(true);
        assert_eq!((done.len(), queue.in_flight()), (2, 0));
        for completion in &done {
            assert!(completion.result.is_err(), "write {}", completion.id);
            assert_ne!(Some(completion.buf.as_ptr()), in_kernel, "the kernel may still read this buffer");
        }
        drop(queue);
    }
}
