//! The seam between the engine and a disk.

use model::ByteLen;
use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Alignment of offsets, lengths and memory of queued writes: 4 KiB, the largest physical block in common use, so that a
/// torn write can never damage a neighbour that was durable before.
pub const ALIGN: usize = 4096;

/// Why a disk operation failed.
#[derive(Debug)]
pub enum DiskErrorKind {
    /// No room (ENOSPC, EDQUOT).
    Full,
    NotFound,
    Exists,
    /// Fewer bytes than asked for are in the file.
    ShortRead {
        wanted: u64,
        had: u64,
    },
    /// An earlier flush or durable write of this handle failed; nothing is accepted until the file is reopened and recovered.
    Poisoned,
    Io(io::Error),
}

/// Names a disk keeps for files that are still being made. [`Disk::list`] hides them, [`Disk::cleanup`] removes them, and no
/// caller may use them.
pub const TEMP_PREFIX: &str = ".new-";

/// The path below a disk's root, with `.` taken out. Refuses what could leave the root and the names of temporary files.
pub(crate) fn inside(op: &'static str, path: &Path) -> Result<PathBuf, DiskError> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(name) if !name.as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes()) => clean.push(name),
            _ => return Err(DiskError::invalid(op, path, "not a path below the disk's root")),
        }
    }
    Ok(clean)
}

/// A failed disk operation: what, on which file, why.
#[derive(Debug, thiserror::Error)]
#[error("{op} {}: {kind}", path.display())]
pub struct DiskError {
    pub op: &'static str,
    pub path: PathBuf,
    pub kind: DiskErrorKind,
}

impl fmt::Display for DiskErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("no room left on the disk"),
            Self::NotFound => f.write_str("not found"),
            Self::Exists => f.write_str("exists already"),
            Self::ShortRead { wanted, had } => write!(f, "wanted {wanted} bytes, the file has {had}"),
            Self::Poisoned => f.write_str("refused after an earlier failed flush"),
            Self::Io(e) => write!(f, "{e}"),
        }
    }
}

impl DiskError {
    pub fn new(op: &'static str, path: &Path, kind: DiskErrorKind) -> Self {
        Self { op, path: path.to_owned(), kind }
    }
    /// Sorts an operating-system error into the kinds the engine decides by.
    pub fn from_io(op: &'static str, path: &Path, e: io::Error) -> Self {
        let kind = match e.kind() {
            io::ErrorKind::NotFound => DiskErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => DiskErrorKind::Exists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DiskErrorKind::Full,
            _ => DiskErrorKind::Io(e),
        };
        Self::new(op, path, kind)
    }
    pub(crate) fn invalid(op: &'static str, path: &Path, why: &'static str) -> Self {
        Self::new(op, path, DiskErrorKind::Io(io::Error::new(io::ErrorKind::InvalidInput, why)))
    }
    pub fn is_full(&self) -> bool {
        matches!(self.kind, DiskErrorKind::Full)
    }
    pub fn is_not_found(&self) -> bool {
        matches!(self.kind, DiskErrorKind::NotFound)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    Read,
    ReadWrite,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    pub name: String,
    pub len: ByteLen,
    pub is_dir: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    pub total: ByteLen,
    pub available: ByteLen,
}

/// A directory tree on one file system. All paths are relative to its root.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Makes a file of `len` bytes that are allocated **and written** as zeroes, and flushes file and directory: later writes
    /// into it change no metadata. Fails with [`DiskErrorKind::Full`] and leaves nothing behind when there is no room.
    fn create_zeroed(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// Makes a file of `len` bytes that need not be allocated (holes read as zeroes); its directory entry is flushed.
    fn create_sparse(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError>;
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Arc<dyn DiskFile>, DiskError>;
    /// A queue of durable writes into an existing file, at most `depth` in flight.
    fn write_queue(&self, path: &Path, depth: usize) -> Result<Box<dyn WriteQueue>, DiskError>;
    /// Replaces `to` by `from` and flushes the directories: after `Ok` the new name survives power loss.
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError>;
    /// Removes a file, or a directory that is empty, and flushes the directory it was in. One that is not there is an error
    /// ([`DiskErrorKind::NotFound`]).
    fn remove(&self, path: &Path) -> Result<(), DiskError>;
    /// Makes a directory and its parents and flushes them; one that exists is fine.
    fn create_dir(&self, path: &Path) -> Result<(), DiskError>;
    /// What a directory holds, sorted by name. A directory that is not there is an error.
    fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, DiskError>;
    fn space(&self) -> Result<Space, DiskError>;
    /// Puts `data` at `path` in one step, whether or not a file is there: after `Ok` all of it survives power loss; before,
    /// and after a failure, the file is either the old one or the new one, never a mixture.
    fn replace(&self, path: &Path, data: &[u8]) -> Result<(), DiskError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".replacing");
        let temp = path.with_file_name(name);
        match self.remove(&temp) {
            Err(e) if !e.is_not_found() => return Err(e),
            _ => {}
        }
        let file = self.create_sparse(&temp, ByteLen(0))?;
        file.write_at(0, data)?;
        file.flush()?;
        self.rename(&temp, path)
    }
    /// Removes what interrupted creations left in `dir` and flushes the directory, so that the names it shows survive power
    /// loss even if the process that made them died before it could flush them. Returns how many leftovers went. Call it
    /// before anything is created there. A disk whose creations leave nothing behind has nothing to do.
    fn cleanup(&self, dir: &Path) -> Result<usize, DiskError> {
        self.list(dir).map(|_| 0)
    }
}

/// An open file. Reads and writes go anywhere, at once from several threads.
#[expect(clippy::len_without_is_empty, reason = "a file is measured, which can fail; nobody asks whether it is empty")]
pub trait DiskFile: Send + Sync + fmt::Debug {
    fn len(&self) -> Result<ByteLen, DiskError>;
    /// Fills `buf` or fails with [`DiskErrorKind::ShortRead`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;
    /// [`DiskFile::read_at`] of what lies behind each other into two buffers.
    fn read_two_at(&self, offset: u64, first: &mut [u8], second: &mut [u8]) -> Result<(), DiskError> {
        self.read_at(offset, first)?;
        self.read_at(offset.saturating_add(first.len() as u64), second)
    }
    /// Fills `buf` if memory holds all of it, without waiting for the device. False: it was not filled, or only in part, and
    /// [`DiskFile::read_at`] does it or says why not.
    fn read_cached_at(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }
    /// The range will be read soon: the device may begin. Does not wait, and changes nothing but time.
    fn will_read(&self, _offset: u64, _len: u64) {}
    /// Writes without promising durability; [`DiskFile::flush`] does. May extend the file.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// After `Ok`, everything written before survives power loss. A failed flush poisons the handle.
    fn flush(&self) -> Result<(), DiskError>;
    /// Cuts or extends (with zeroes) the file; durable only after [`DiskFile::flush`].
    fn set_len(&self, len: ByteLen) -> Result<(), DiskError>;
    /// Gives the range's space back to the file system; it reads as zeroes. Durable only after [`DiskFile::flush`].
    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), DiskError>;
}

/// Durable writes, several at a time, completing in any order.
///
/// A completion with `Ok` means: these bytes survive power loss. A failed one poisons the queue: all later submissions
/// complete with [`DiskErrorKind::Poisoned`].
pub trait WriteQueue: Send {
    /// Queues `buf.as_slice()` (a multiple of [`ALIGN`]) at `offset` (likewise). Panics if more than `depth` are in flight.
    fn submit(&mut self, id: u64, offset: u64, buf: AlignedBuf);
    fn in_flight(&self) -> usize;
    fn depth(&self) -> usize;
    /// Collects what has completed. With `wait` and something in flight, blocks until at least one has.
    fn complete(&mut self, wait: bool) -> Vec<Completion>;
    /// A descriptor that becomes readable when a write has ended, for those who wait for other things too. It is a copy: it
    /// may be closed before or after the queue. None: there is no such thing, only [`WriteQueue::complete`] tells.
    fn completion_fd(&self) -> Option<OwnedFd> {
        None
    }
    /// How the writes are done, for the log, e.g. `io_uring, direct`.
    fn backend(&self) -> &'static str {
        "unnamed"
    }
}

/// One finished durable write; the buffer comes back for reuse.
#[derive(Debug)]
pub struct Completion {
    pub id: u64,
    pub buf: AlignedBuf,
    pub result: Result<(), DiskError>,
}

/// A growable buffer aligned to [`ALIGN`], as direct I/O wants it, of a fixed capacity.
pub struct AlignedBuf {
    ptr: std::ptr::NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: the buffer owns its allocation and hands out references only through `&self`/`&mut self`.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer for `capacity` bytes, rounded up to [`ALIGN`], all zero.
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.max(1).next_multiple_of(ALIGN);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(ptr) = std::ptr::NonNull::new(raw) else { std::alloc::handle_alloc_error(layout) };
        Self { ptr, len: 0, capacity }
    }
    fn layout(capacity: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(capacity, ALIGN).expect("a capacity below isize::MAX")
    }
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    pub fn capacity(&self) -> usize {
        self.capacity
    }
    pub fn room(&self) -> usize {
        self.capacity - self.len
    }
    pub fn clear(&mut self) {
        self.len = 0;
    }
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes from `ptr` are ours and initialised (allocated zeroed, only ever written).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
    /// Appends `data`; panics when there is no room, which the caller checks with [`AlignedBuf::room`].
    pub fn extend_from_slice(&mut self, data: &[u8]) {
        assert!(data.len() <= self.room(), "{} bytes into a buffer with room for {}", data.len(), self.room());
        let start = self.len;
        self.len += data.len();
        self.as_mut_slice()[start..].copy_from_slice(data);
    }
    /// Pads with zeroes to the next multiple of [`ALIGN`].
    pub fn pad(&mut self) {
        let start = self.len;
        self.len = self.len.next_multiple_of(ALIGN);
        self.as_mut_slice()[start..].fill(0);
    }
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `with_capacity` with the same layout.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity)
    }
}
