//! A disk in memory that loses power on purpose.
//!
//! [`SimDisk`] keeps the promises of [`Disk`] and not one more, and everything it does follows from one seed.
//!
//! **Power loss** ([`SimDisk::power_cut`]). What was flushed, or was a queued write that completed with `Ok`, is there. Of
//! everything else, each write is lost, kept, or torn at 512-byte sectors, independently and in any order; now and then all
//! of it survives, or none. Changes of a file's length survive up to some point in their order (file systems journal
//! them). Directory operations are durable when they return; one that the cut interrupts happened or did not, and an interrupted
//! creation may leave a temporary name.
//!
//! **Crash points.** [`SimDisk::cut_after`]`(n)` lets `n` more operations through and cuts the power inside the next one: that
//! one fails, so does everything after it, and `power_cut` then shows what the next boot finds. An operation is a write, a
//! change of length, a flush, a submission, the delivery of a completion, a creation, rename or removal; a
//! [`Disk::replace`] counts as three (write, flush, rename). Reads do not count. To try every crash point, run once to
//! learn [`SimDisk::operations`], then once for each smaller number.
//!
//! **A killed process** ([`SimDisk::kill`]) is not a power cut: unflushed writes stay visible and stay at risk.
//!
//! **Faults**, all off unless asked for: failed flushes and writes, a full disk, flipped bits, flushes that lie, misdirected writes.
//!
//! ```text
//! write_at ──► pending ──flush──► durable          queued write ──completion──► durable
//!                 │ failed flush                        │ (in flight)
//!                 ▼                                     │
//!              failed  (visible, never made durable     │
//!                 │     by a later flush)               │
//!                 └──────────── power_cut: each survives, or not, or in part
//! ```
//!
//! **Simpler than a real disk:** a queued write that completes on a file with unflushed changes of length makes everything before
//! it in that file durable (the file system's journal would commit the length and, in ordered mode, the data below it).
//! Tests are in `tests/sim.rs`.

use crate::{
    disk::{
        AlignedBuf, Completion, DirEntry, Disk, DiskError, DiskErrorKind, DiskFile, OpenMode, Space, TEMP_PREFIX,
        WriteQueue, inside,
    },
    rng::Rng,
};
use model::{ByteLen, Extent, ExtentSet, SECTOR};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// The unit of allocation, and of the memory a simulated file takes.
const PAGE: u64 = 4096;

/// A simulated disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

impl SimDisk {
    pub fn new(seed: u64, capacity: ByteLen) -> SimDisk {
        SimDisk::of(State {
            rng: Rng::new(seed),
            powered: true,
            operations: 0,
            cut_at: None,
            capacity: capacity.0,
            ballast: 0,
            names: vec![Arc::new(BTreeMap::new())],
            interrupted: 0,
            inodes: BTreeMap::new(),
            flights: BTreeMap::new(),
            next: 0,
            faults: Faults::default(),
        })
    }

    fn of(state: State) -> SimDisk {
        SimDisk { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power and returns the disk as the next boot finds it. Everything on this one fails from now on. Calling it again
    /// gives another disk that this cut could have left.
    pub fn power_cut(&self) -> SimDisk {
        let mut state = self.state();
        let next = state.after_power_cut();
        state.powered = false;
        SimDisk::of(next)
    }

    /// Kills the process: its queued writes in flight happened or did not, everything else stays as it was, unflushed
    /// writes included: visible, and lost if the power goes before someone flushes them. Everything on this disk fails from
    /// now on. After a crash point was reached, this is the process killed inside that operation instead.
    pub fn kill(&self) -> SimDisk {
        let mut state = self.state();
        let mut next = state.copy();
        state.powered = false;
        // Crash points belong to the run that set them.
        next.cut_at = None;
        next.operations = 0;
        let undone = next.rng.below(next.interrupted as u64 + 1) as usize;
        next.names.truncate(next.names.len() - undone);
        next.interrupted = 0;
        for (_, flight) in std::mem::take(&mut next.flights) {
            if next.rng.coin() {
                // A full disk fails the write; nobody is left to be told.
                let _ = next.land(&flight);
            }
        }
        next.collect();
        SimDisk::of(next)
    }

    /// The same disk with another future: same contents, same writes at risk, other luck. Without handles.
    pub fn fork(&self, seed: u64) -> SimDisk {
        let mut next = self.state().copy();
        next.rng = Rng::new(seed);
        SimDisk::of(next)
    }

    /// Lets `n` more operations through and cuts the power inside the one after.
    pub fn cut_after(&self, n: u64) {
        let mut state = self.state();
        state.cut_at = Some(state.operations + n);
    }

    /// Operations done so far (see the module's documentation for what counts).
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Whether the power is still on; after a crash point was reached it is not.
    pub fn is_powered(&self) -> bool {
        self.state().powered
    }

    /// Turns one bit of a file over, as ageing media do. Not an operation.
    pub fn flip_bit(&self, path: &Path, offset: u64, bit: u8) -> Result<(), DiskError> {
        const OP: &str = "flip bit";
        let mut state = self.state();
        let id = state.file(OP, &inside(OP, path)?)?;
        let inode = state.inode(id);
        if offset >= inode.now.len {
            let kind = DiskErrorKind::ShortRead { wanted: offset.saturating_add(1), had: inode.now.len };
            return Err(DiskError::new(OP, path, kind));
        }
        inode.flip(offset, 1 << (bit % 8));
        Ok(())
    }

    /// Makes the next [`DiskFile::flush`] fail. What it should have saved may be lost, and no later flush will save it.
    pub fn fail_next_flush(&self) {
        self.state().faults.flush = true;
    }

    /// Makes the next directory operation fail after it has changed what is seen: it may not survive a power cut.
    pub fn fail_next_directory_flush(&self) {
        self.state().faults.directory_flush = true;
    }

    /// Makes the next write (queued or not) to a file whose path begins with `prefix` fail, with a part of it perhaps written.
    pub fn fail_write_at(&self, prefix: impl Into<PathBuf>) {
        self.state().faults.write = Some(prefix.into());
    }

    /// Lets flushes, durable writes and directory operations claim success without making anything durable, as devices with a
    /// broken write cache do.
    pub fn set_lying_flush(&self, lies: bool) {
        self.state().faults.lying = lies;
    }

    /// Sends the next write to a file whose path begins with `prefix` to another place of the same file.
    pub fn misdirect_next_write(&self, prefix: impl Into<PathBuf>) {
        self.state().faults.misdirect = Some(prefix.into());
    }

    /// Takes up `bytes` of the room, in addition to what was taken before.
    pub fn fill(&self, bytes: ByteLen) {
        let mut state = self.state();
        state.ballast = state.ballast.saturating_add(bytes.0);
    }

    /// Changes the size of the disk. It may become smaller than what lies on it: then nothing more fits.
    pub fn set_capacity(&self, bytes: ByteLen) {
        self.state().capacity = bytes.0;
    }

    /// All files, sorted, temporary ones included.
    pub fn paths(&self) -> Vec<PathBuf> {
        let state = self.state();
        let files = state.now().iter().filter(|(_, node)| matches!(node, Node::File(_)));
        files.map(|(path, _)| path.clone()).collect()
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "SimDisk({} files, {} operations, powered: {})", state.inodes.len(), state.operations, state.powered)
    }
}

impl Disk for SimDisk {
    fn create_zeroed(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.create(path, len, true)
    }

    fn create_sparse(&self, path: &Path, len: ByteLen) -> Result<Arc<dyn DiskFile>, DiskError> {
        self.create(path, len, false)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<Arc<dyn DiskFile>, DiskError> {
        let clean = inside("open", path)?;
        let mut state = self.state();
        let id = state.file("open", &clean)?;
        Ok(self.handle(&mut state, id, &clean, mode))
    }

    fn write_queue(&self, path: &Path, depth: usize) -> Result<Box<dyn WriteQueue>, DiskError> {
        const OP: &str = "open write queue";
        let clean = inside(OP, path)?;
        if depth == 0 || depth > crate::os::QUEUE_DEPTH_MAX {
            return Err(DiskError::invalid(OP, path, "the depth of a write queue must be 1 to 256"));
        }
        let mut state = self.state();
        let id = state.file(OP, &clean)?;
        let open = state.inode(id).open.clone();
        Ok(Box::new(SimQueue {
            disk: self.clone(),
            inode: id,
            path: clean,
            depth,
            flying: Vec::new(),
            ready: Vec::new(),
            poisoned: false,
            _open: open,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        const OP: &str = "rename";
        let (from, to) = (inside(OP, from)?, inside(OP, to)?);
        let mut state = self.state();
        state.alive(OP, &from)?;
        let node = state.node(OP, &from)?;
        state.parent_exists(OP, &to)?;
        let refuse = |kind: io::ErrorKind| Err(DiskError::from_io(OP, &from, kind.into()));
        if from.as_os_str().is_empty() || (to != from && to.starts_with(&from)) {
            return refuse(io::ErrorKind::InvalidInput);
        }
        match (node, state.now().get(&to)) {
            (Node::File(_), Some(Node::Dir)) => return refuse(io::ErrorKind::IsADirectory),
            (Node::Dir, Some(Node::File(_))) => return refuse(io::ErrorKind::NotADirectory),
            (Node::Dir, Some(Node::Dir)) if from != to && state.has_children(&to) => {
                return refuse(io::ErrorKind::DirectoryNotEmpty);
            }
            _ => {}
        }
        let mut names = (**state.now()).clone();
        let moved: Vec<PathBuf> = names.keys().filter(|p| p.starts_with(&from)).cloned().collect();
        let moved: Vec<(PathBuf, Node)> = moved.into_iter().filter_map(|p| names.remove_entry(&p)).collect();
        for (path, node) in moved {
            let rest = path.strip_prefix(&from).unwrap_or(Path::new(""));
            names.insert(if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) }, node);
        }
        state.rename_all(OP, &from, vec![names])
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        const OP: &str = "remove";
        let path = inside(OP, path)?;
        let mut state = self.state();
        state.alive(OP, &path)?;
        if path.as_os_str().is_empty() {
            return Err(DiskError::invalid(OP, &path, "the root cannot be removed"));
        }
        if state.node(OP, &path)? == Node::Dir && state.has_children(&path) {
            return Err(DiskError::from_io(OP, &path, io::ErrorKind::DirectoryNotEmpty.into()));
        }
        let mut names = (**state.now()).clone();
        names.remove(&path);
        state.rename_all(OP, &path, vec![names])
    }

    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        const OP: &str = "create directory";
        let path = inside(OP, path)?;
        let mut state = self.state();
        state.alive(OP, &path)?;
        let mut steps = Vec::new();
        let mut names = (**state.now()).clone();
        let mut dir = PathBuf::new();
        for part in path.components() {
            dir.push(part);
            match names.get(&dir) {
                Some(Node::Dir) => {}
                Some(Node::File(_)) => return Err(DiskError::new(OP, &path, DiskErrorKind::Exists)),
                None => {
                    names.insert(dir.clone(), Node::Dir);
                    steps.push(names.clone());
                }
            }
        }
        if steps.is_empty() {
            steps.push(names);
        }
        state.rename_all(OP, &path, steps)
    }

    fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, DiskError> {
        let dir = inside("list", dir)?;
        let state = self.state();
        state.alive("list", &dir)?;
        if state.node("list", &dir)? != Node::Dir {
            return Err(DiskError::from_io("list", &dir, io::ErrorKind::NotADirectory.into()));
        }
        let children = state.now().iter().filter(|(path, _)| path.parent() == Some(&dir));
        let entries = children.filter(|(path, _)| !is_temp(path)).map(|(path, node)| DirEntry {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            len: ByteLen(match node {
                Node::File(id) => state.inodes.get(id).map_or(0, |inode| inode.now.len),
                Node::Dir => 0,
            }),
            is_dir: *node == Node::Dir,
        });
        let mut entries: Vec<DirEntry> = entries.collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn space(&self) -> Result<Space, DiskError> {
        let state = self.state();
        state.alive("measure", Path::new(""))?;
        Ok(Space { total: ByteLen(state.capacity), available: ByteLen(state.available()) })
    }

    fn replace(&self, path: &Path, data: &[u8]) -> Result<(), DiskError> {
        const OP: &str = "replace";
        let path = inside(OP, path)?;
        let mut state = self.state();
        state.alive(OP, &path)?;
        state.parent_exists(OP, &path)?;
        if state.now().get(&path) == Some(&Node::Dir) || path.as_os_str().is_empty() {
            return Err(DiskError::from_io(OP, &path, io::ErrorKind::IsADirectory.into()));
        }
        let before = (**state.now()).clone();
        let id = state.make_inode(Content::default());
        let (mut with_temp, mut with_file) = (before.clone(), before);
        with_temp.insert(state.temp_name(&path), Node::File(id));
        with_file.insert(path.clone(), Node::File(id));
        // As the real one does it: a name that is not there to be found, content, flush, rename.
        state.names.push(Arc::new(with_temp));
        state.interrupted = 1;
        let written = state.write(OP, id, &path, 0, data).and_then(|()| state.flush(OP, id, &path));
        if let Err(e) = written {
            if state.powered {
                // The temporary file is taken back, and its room with it.
                state.names.pop();
                state.inodes.remove(&id);
                state.interrupted = 0;
            }
            return Err(e);
        }
        state.interrupted = 0;
        state.rename_all(OP, &path, vec![with_file])
    }

    fn cleanup(&self, dir: &Path) -> Result<usize, DiskError> {
        const OP: &str = "clean up";
        let dir = inside(OP, dir)?;
        let mut state = self.state();
        state.alive(OP, &dir)?;
        if state.node(OP, &dir)? != Node::Dir {
            return Err(DiskError::from_io(OP, &dir, io::ErrorKind::NotADirectory.into()));
        }
        let mut names = (**state.now()).clone();
        let before = names.len();
        names.retain(|path, _| !(path.parent() == Some(&dir) && is_temp(path)));
        let removed = before - names.len();
        state.rename_all(OP, &dir, vec![names])?;
        Ok(removed)
    }
}

impl SimDisk {
    fn create(&self, path: &Path, len: ByteLen, allocate: bool) -> Result<Arc<dyn DiskFile>, DiskError> {
        const OP: &str = "create";
        let path = inside(OP, path)?;
        let mut state = self.state();
        state.alive(OP, &path)?;
        state.parent_exists(OP, &path)?;
        if state.now().contains_key(&path) || path.as_os_str().is_empty() {
            return Err(DiskError::new(OP, &path, DiskErrorKind::Exists));
        }
        let pages = len.0.div_ceil(PAGE);
        if allocate && pages.saturating_mul(PAGE) > state.available() {
            return Err(DiskError::new(OP, &path, DiskErrorKind::Full));
        }
        let id = state.make_inode(Content { len: len.0, pages: BTreeMap::new() });
        if allocate {
            state.inode(id).allocate(0, pages);
        }
        let (mut with_temp, mut with_file) = ((**state.now()).clone(), (**state.now()).clone());
        with_temp.insert(state.temp_name(&path), Node::File(id));
        with_file.insert(path.clone(), Node::File(id));
        state.rename_all(OP, &path, vec![with_temp, with_file])?;
        Ok(self.handle(&mut state, id, &path, OpenMode::ReadWrite))
    }

    fn handle(&self, state: &mut State, id: InodeId, path: &Path, mode: OpenMode) -> Arc<dyn DiskFile> {
        let open = state.inode(id).open.clone();
        let poisoned = AtomicBool::new(false);
        Arc::new(SimFile { disk: self.clone(), inode: id, path: path.to_owned(), mode, poisoned, _open: open })
    }
}

struct SimFile {
    disk: SimDisk,
    inode: InodeId,
    path: PathBuf,
    mode: OpenMode,
    poisoned: AtomicBool,
    /// Keeps the contents of a removed file until the last handle is gone.
    _open: Arc<()>,
}

impl SimFile {
    fn writable(&self, op: &'static str) -> Result<MutexGuard<'_, State>, DiskError> {
        let state = self.disk.state();
        state.alive(op, &self.path)?;
        if self.poisoned.load(Ordering::Acquire) {
            return Err(DiskError::new(op, &self.path, DiskErrorKind::Poisoned));
        }
        if self.mode == OpenMode::Read {
            return Err(DiskError::from_io(op, &self.path, io::ErrorKind::PermissionDenied.into()));
        }
        Ok(state)
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({})", self.path.display())
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> Result<ByteLen, DiskError> {
        let mut state = self.disk.state();
        state.alive("measure", &self.path)?;
        Ok(ByteLen(state.inode(self.inode).now.len))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let mut state = self.disk.state();
        state.alive("read", &self.path)?;
        let had = state.inode(self.inode).now.read(offset, buf);
        if had < buf.len() {
            let kind = DiskErrorKind::ShortRead { wanted: buf.len() as u64, had: had as u64 };
            return Err(DiskError::new("read", &self.path, kind));
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.writable("write")?.write("write", self.inode, &self.path, offset, data)
    }

    fn flush(&self) -> Result<(), DiskError> {
        // A flush through a handle for reading is allowed, as it is on Linux.
        let mut state = self.disk.state();
        state.alive("flush", &self.path)?;
        if self.poisoned.load(Ordering::Acquire) {
            return Err(DiskError::new("flush", &self.path, DiskErrorKind::Poisoned));
        }
        let flushed = state.flush("flush", self.inode, &self.path);
        self.poisoned.store(flushed.is_err(), Ordering::Release);
        flushed
    }

    fn set_len(&self, len: ByteLen) -> Result<(), DiskError> {
        const OP: &str = "set length";
        let mut state = self.writable(OP)?;
        let step = state.step(OP, &self.path)?;
        let inode = state.inode(self.inode);
        inode.now.set_len(len.0);
        inode.free(len.0.div_ceil(PAGE), u64::MAX);
        inode.pending.push(Change::Len(len.0));
        step.end(OP, &self.path)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        const OP: &str = "punch hole";
        let mut state = self.writable(OP)?;
        let step = state.step(OP, &self.path)?;
        let inode = state.inode(self.inode);
        let end = offset.saturating_add(len).min(inode.now.len);
        if offset < end {
            let change = Change::Data { at: offset, data: Data::Zero(end - offset) };
            change.apply(&mut inode.now);
            inode.free(offset.div_ceil(PAGE), if end == inode.now.len { end.div_ceil(PAGE) } else { end / PAGE });
            inode.pending.push(change);
        }
        step.end(OP, &self.path)
    }
}

struct SimQueue {
    disk: SimDisk,
    inode: InodeId,
    path: PathBuf,
    depth: usize,
    /// Number in [`State::flights`], the caller's id, the buffer.
    flying: Vec<(u64, u64, AlignedBuf)>,
    ready: Vec<Completion>,
    poisoned: bool,
    _open: Arc<()>,
}

const QUEUED: &str = "durable write";

impl SimQueue {
    fn land_one(&mut self, at: usize) {
        let (number, id, buf) = self.flying.swap_remove(at);
        let mut state = self.disk.state();
        let result = match state.step(QUEUED, &self.path) {
            // Not delivered: the write stays in flight, and the cut decides about it.
            Err(e) => Err(e),
            Ok(Step::Cut) => Err(power_lost(QUEUED, &self.path)),
            Ok(Step::Whole) => match state.flights.remove(&number) {
                Some(flight) => state.land(&flight),
                None => Err(power_lost(QUEUED, &self.path)),
            },
        };
        drop(state);
        self.poisoned |= result.is_err();
        self.ready.push(Completion { id, buf, result });
    }
}

impl WriteQueue for SimQueue {
    fn submit(&mut self, id: u64, offset: u64, buf: AlignedBuf) {
        crate::os::check_submission(self, offset, &buf);
        if self.poisoned {
            let result = Err(DiskError::new(QUEUED, &self.path, DiskErrorKind::Poisoned));
            self.ready.push(Completion { id, buf, result });
            return;
        }
        let mut state = self.disk.state();
        let step = state.step(QUEUED, &self.path);
        if step.is_ok() {
            let number = state.number();
            let data = buf.as_slice().to_vec();
            state.flights.insert(number, Flight { inode: self.inode, path: self.path.clone(), at: offset, data });
            self.flying.push((number, id, buf));
        } else {
            drop(state);
            self.poisoned = true;
            self.ready.push(Completion { id, buf, result: step.map(drop) });
        }
    }

    fn in_flight(&self) -> usize {
        self.flying.len() + self.ready.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn complete(&mut self, wait: bool) -> Vec<Completion> {
        let must = usize::from(wait && self.ready.is_empty()).min(self.flying.len());
        let count = {
            let mut state = self.disk.state();
            if state.powered {
                must + state.rng.below((self.flying.len() - must) as u64 + 1) as usize
            } else {
                self.flying.len()
            }
        };
        for _ in 0..count {
            let at = self.disk.state().rng.below(self.flying.len() as u64) as usize;
            self.land_one(at);
        }
        std::mem::take(&mut self.ready)
    }

    fn backend(&self) -> &'static str {
        "simulated"
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        // Without power the writes in flight stay where the cut found them.
        if state.powered {
            state.rng.shuffle(&mut self.flying);
            for (number, ..) in &self.flying {
                if let Some(flight) = state.flights.remove(number) {
                    // Nobody is left to be told of a failure; the write was never acknowledged.
                    let _ = state.land(&flight);
                }
            }
        }
    }
}

type InodeId = u64;
type Names = BTreeMap<PathBuf, Node>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(InodeId),
}

struct State {
    rng: Rng,
    powered: bool,
    operations: u64,
    cut_at: Option<u64>,
    capacity: u64,
    ballast: u64,
    /// First the names that are durable, last those that are seen; between them, in order, those a power cut may leave.
    names: Vec<Arc<Names>>,
    /// How many of the last names belong to a directory operation that never returned.
    interrupted: usize,
    inodes: BTreeMap<InodeId, Inode>,
    flights: BTreeMap<u64, Flight>,
    /// For inodes, flights and temporary names.
    next: u64,
    faults: Faults,
}

#[derive(Clone, Default)]
struct Faults {
    flush: bool,
    directory_flush: bool,
    write: Option<PathBuf>,
    misdirect: Option<PathBuf>,
    lying: bool,
}

/// A queued write that has not completed.
#[derive(Clone)]
struct Flight {
    inode: InodeId,
    path: PathBuf,
    at: u64,
    data: Vec<u8>,
}

#[derive(Clone, Copy)]
enum Step {
    Whole,
    /// The power goes in the middle of this operation.
    Cut,
}

impl Step {
    fn end(self, op: &'static str, path: &Path) -> Result<(), DiskError> {
        match self {
            Step::Whole => Ok(()),
            Step::Cut => Err(power_lost(op, path)),
        }
    }
}

fn power_lost(op: &'static str, path: &Path) -> DiskError {
    DiskError::new(op, path, DiskErrorKind::Io(io::Error::other("power lost")))
}

fn injected(op: &'static str, path: &Path) -> DiskError {
    DiskError::new(op, path, DiskErrorKind::Io(io::Error::other("simulated medium error")))
}

fn is_temp(path: &Path) -> bool {
    path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes())
}

impl State {
    fn alive(&self, op: &'static str, path: &Path) -> Result<(), DiskError> {
        if self.powered { Ok(()) } else { Err(power_lost(op, path)) }
    }

    /// Counts an operation, or finds that the power goes in it.
    fn step(&mut self, op: &'static str, path: &Path) -> Result<Step, DiskError> {
        self.alive(op, path)?;
        if self.cut_at == Some(self.operations) {
            self.powered = false;
            return Ok(Step::Cut);
        }
        self.operations += 1;
        Ok(Step::Whole)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A copy that shares no handle with this one.
    fn copy(&self) -> State {
        let mut inodes = self.inodes.clone();
        for inode in inodes.values_mut() {
            inode.open = Arc::new(());
        }
        State {
            rng: self.rng.clone(),
            powered: true,
            operations: self.operations,
            cut_at: self.cut_at,
            capacity: self.capacity,
            ballast: self.ballast,
            names: self.names.clone(),
            interrupted: self.interrupted,
            inodes,
            flights: self.flights.clone(),
            next: self.next,
            faults: self.faults.clone(),
        }
    }

    // -- names --

    fn now(&self) -> &Arc<Names> {
        self.names.last().expect("the durable names are always there")
    }

    fn node(&self, op: &'static str, path: &Path) -> Result<Node, DiskError> {
        if path.as_os_str().is_empty() {
            return Ok(Node::Dir);
        }
        self.now().get(path).copied().ok_or_else(|| DiskError::new(op, path, DiskErrorKind::NotFound))
    }

    fn file(&self, op: &'static str, path: &Path) -> Result<InodeId, DiskError> {
        self.alive(op, path)?;
        match self.node(op, path)? {
            Node::File(id) => Ok(id),
            Node::Dir => Err(DiskError::from_io(op, path, io::ErrorKind::IsADirectory.into())),
        }
    }

    fn parent_exists(&self, op: &'static str, path: &Path) -> Result<(), DiskError> {
        match self.node(op, path.parent().unwrap_or(Path::new(""))) {
            Ok(Node::Dir) => Ok(()),
            Ok(Node::File(_)) => Err(DiskError::from_io(op, path, io::ErrorKind::NotADirectory.into())),
            Err(_) => Err(DiskError::new(op, path, DiskErrorKind::NotFound)),
        }
    }

    fn has_children(&self, dir: &Path) -> bool {
        self.now().keys().any(|path| path.parent() == Some(dir))
    }

    fn temp_name(&mut self, path: &Path) -> PathBuf {
        let n = self.number();
        path.with_file_name(OsStr::new(&format!("{TEMP_PREFIX}{n}")))
    }

    /// A directory operation: `steps` are the names after each of its parts. Durable when it returns `Ok`.
    fn rename_all(&mut self, op: &'static str, path: &Path, steps: Vec<Names>) -> Result<(), DiskError> {
        let step = self.step(op, path)?;
        let broken = std::mem::take(&mut self.faults.directory_flush);
        if let Step::Cut = step {
            self.interrupted += steps.len();
            self.names.extend(steps.into_iter().map(Arc::new));
        } else {
            self.names.extend(steps.into_iter().next_back().map(Arc::new));
            if broken {
                return Err(injected(op, path));
            }
            if !self.faults.lying {
                self.names.drain(..self.names.len() - 1);
            }
            self.collect();
        }
        step.end(op, path)
    }

    /// Forgets files that no name, handle or write leads to.
    fn collect(&mut self) {
        let mut reachable: BTreeSet<InodeId> = self.flights.values().map(|f| f.inode).collect();
        for names in &self.names {
            reachable
                .extend(names.values().filter_map(|node| if let Node::File(id) = node { Some(*id) } else { None }));
        }
        self.inodes.retain(|id, inode| reachable.contains(id) || Arc::strong_count(&inode.open) > 1);
    }

    // -- files --

    fn make_inode(&mut self, content: Content) -> InodeId {
        let id = self.number();
        let inode = Inode {
            now: content.clone(),
            durable: content,
            pending: Vec::new(),
            failed: Vec::new(),
            allocated: ExtentSet::new(),
            open: Arc::new(()),
        };
        self.inodes.insert(id, inode);
        id
    }

    fn inode(&mut self, id: InodeId) -> &mut Inode {
        self.inodes.get_mut(&id).expect("a handle or a name keeps its inode")
    }

    fn available(&self) -> u64 {
        let used: u64 = self.inodes.values().map(|inode| inode.allocated.sectors().0 * PAGE).sum();
        self.capacity.saturating_sub(used).saturating_sub(self.ballast)
    }

    /// How many of `len` bytes at `at` there is room for.
    fn room(&mut self, id: InodeId, at: u64, len: u64) -> u64 {
        let mut free = self.available() / PAGE;
        let wanted = Extent::between(at / PAGE, at.saturating_add(len).div_ceil(PAGE));
        let mut page = wanted.start();
        for have in self.inode(id).allocated.overlap(&wanted).into_iter().chain([Extent::new(wanted.end(), 0)]) {
            let missing = have.start() - page;
            if missing > free {
                return ((page + free) * PAGE).saturating_sub(at);
            }
            free -= missing;
            page = have.end();
        }
        len
    }

    fn take_fault(fault: &mut Option<PathBuf>, path: &Path) -> bool {
        let hit = fault.as_ref().is_some_and(|prefix| {
            path.as_os_str().as_encoded_bytes().starts_with(prefix.as_os_str().as_encoded_bytes())
        });
        if hit {
            *fault = None;
        }
        hit
    }

    /// Another place of the same file for a write of `len` bytes; none if the file is too small.
    fn astray(&mut self, id: InodeId, at: u64, len: u64) -> Option<u64> {
        let places = self.inode(id).now.len.checked_sub(len)? / PAGE + 1;
        let place = self.rng.below(places) * PAGE;
        if place != at { Some(place) } else { (place >= PAGE).then(|| place - PAGE).or((places > 1).then_some(PAGE)) }
    }

    fn write(&mut self, op: &'static str, id: InodeId, path: &Path, at: u64, data: &[u8]) -> Result<(), DiskError> {
        let step = self.step(op, path)?;
        if at.checked_add(data.len() as u64).is_none() {
            return Err(DiskError::invalid(op, path, "past the largest file"));
        }
        let fails = Self::take_fault(&mut self.faults.write, path);
        let wanted = if fails { self.rng.below(data.len() as u64 + 1) } else { data.len() as u64 };
        let fits = self.room(id, at, wanted);
        let part = &data[..fits.min(wanted) as usize];
        let astray = Self::take_fault(&mut self.faults.misdirect, path);
        let place = if astray { self.astray(id, at, part.len() as u64) } else { Some(at) };
        let inode = self.inode(id);
        let end = at + part.len() as u64;
        inode.allocate(at / PAGE, end.div_ceil(PAGE));
        // Reads are served from the page cache, which has the right thing wherever the device puts it.
        inode.now.write(at, part);
        if !part.is_empty() {
            if end > inode.now.len {
                inode.now.len = end;
                inode.pending.push(Change::Len(end));
            }
            if let Some(at) = place {
                inode.pending.push(Change::Data { at, data: Data::Bytes(part.to_vec()) });
            }
        }
        step.end(op, path)?;
        if fails {
            return Err(injected(op, path));
        }
        if fits < wanted { Err(DiskError::new(op, path, DiskErrorKind::Full)) } else { Ok(()) }
    }

    fn flush(&mut self, op: &'static str, id: InodeId, path: &Path) -> Result<(), DiskError> {
        self.step(op, path)?.end(op, path)?;
        let fails = std::mem::take(&mut self.faults.flush);
        let lying = self.faults.lying;
        let inode = self.inode(id);
        if fails {
            // The kernel marks the pages clean: visible, at risk, and out of reach of the next flush. A length is not data: the
            // next flush that works saves it.
            let (lost, kept) =
                std::mem::take(&mut inode.pending).into_iter().partition(|c| matches!(c, Change::Data { .. }));
            let mut lost: Vec<Change> = lost;
            inode.failed.append(&mut lost);
            inode.pending = kept;
            return Err(injected(op, path));
        }
        if !lying {
            inode.commit();
        }
        Ok(())
    }

    /// Completes a queued write.
    fn land(&mut self, flight: &Flight) -> Result<(), DiskError> {
        let Flight { inode: id, path, at, data } = flight;
        let (id, at) = (*id, *at);
        if at.checked_add(data.len() as u64).is_none() {
            return Err(DiskError::invalid(QUEUED, path, "past the largest file"));
        }
        let fails = Self::take_fault(&mut self.faults.write, path);
        let fits = self.room(id, at, data.len() as u64);
        let lying = self.faults.lying;
        if fails || fits < data.len() as u64 {
            // Any part of it may have reached the medium.
            let part = self.rng.below(fits.min(data.len() as u64) + 1) as usize;
            let inode = self.inode(id);
            inode.pending_write(at, &data[..part]);
            return Err(if fails { injected(QUEUED, path) } else { DiskError::new(QUEUED, path, DiskErrorKind::Full) });
        }
        let astray = Self::take_fault(&mut self.faults.misdirect, path);
        let place = if astray { self.astray(id, at, data.len() as u64) } else { Some(at) };
        let inode = self.inode(id);
        let Some(at) = place else { return Ok(()) };
        if lying {
            inode.pending_write(at, data);
        } else {
            inode.durable_write(at, data);
        }
        Ok(())
    }

    // -- power --

    fn after_power_cut(&mut self) -> State {
        let mut next = self.copy();
        next.rng = Rng::new(self.rng.next());
        next.operations = 0;
        next.cut_at = None;
        next.interrupted = 0;
        next.faults = Faults { lying: self.faults.lying, ..Faults::default() };
        let survivor = next.rng.below(next.names.len() as u64) as usize;
        next.names = vec![next.names[survivor].clone()];
        let flights = std::mem::take(&mut next.flights);
        next.collect();
        let ids: Vec<InodeId> = next.inodes.keys().copied().collect();
        for id in ids {
            let flying = flights.values().filter(|f| f.inode == id);
            let flying = flying.map(|f| Change::Data { at: f.at, data: Data::Bytes(f.data.clone()) });
            let grown = flights.values().filter(|f| f.inode == id).map(|f| f.at + f.data.len() as u64).max();
            let mut changes: Vec<Change> = flying.collect();
            let mut rng = next.rng.clone();
            let inode = next.inode(id);
            // The length such a write would give the file, if it is more: survives like any other change of length.
            changes.extend(grown.filter(|end| *end > inode.now.len).map(Change::Len));
            inode.cut(&mut rng, changes);
            next.rng = rng;
        }
        next
    }
}

#[derive(Clone)]
struct Inode {
    /// What reads see.
    now: Content,
    /// What a power cut cannot take.
    durable: Content,
    /// Since the last flush, in order.
    pending: Vec<Change>,
    /// What a failed flush should have saved.
    failed: Vec<Change>,
    /// Pages that have room on the disk.
    allocated: ExtentSet,
    /// Held by every handle.
    open: Arc<()>,
}

impl Inode {
    fn allocate(&mut self, first: u64, end: u64) {
        self.allocated.insert(Extent::between(first, end));
    }

    fn free(&mut self, first: u64, end: u64) {
        self.allocated.remove(&Extent::between(first, end));
    }

    /// Makes everything pending durable.
    fn commit(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            match &change {
                Change::Data { at, data } => trim(&mut self.failed, *at, at + data.len()),
                Change::Len(len) => trim(&mut self.failed, *len, u64::MAX),
            }
            change.apply(&mut self.durable);
        }
    }

    fn pending_write(&mut self, at: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = at + data.len() as u64;
        self.allocate(at / PAGE, end.div_ceil(PAGE));
        self.now.write(at, data);
        if end > self.now.len {
            self.now.len = end;
            self.pending.push(Change::Len(end));
        }
        self.pending.push(Change::Data { at, data: Data::Bytes(data.to_vec()) });
    }

    fn durable_write(&mut self, at: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = at + data.len() as u64;
        self.allocate(at / PAGE, end.div_ceil(PAGE));
        if self.pending.iter().any(|change| matches!(change, Change::Len(_))) {
            self.commit();
        }
        // What was at risk here is overwritten for good.
        trim(&mut self.pending, at, end);
        trim(&mut self.failed, at, end);
        for content in [&mut self.now, &mut self.durable] {
            content.write(at, data);
            content.len = content.len.max(end);
        }
    }

    fn flip(&mut self, offset: u64, mask: u8) {
        self.now.flip(offset, mask);
        self.durable.flip(offset, mask);
        for change in self.pending.iter_mut().chain(&mut self.failed) {
            if let Change::Data { at, data: Data::Bytes(bytes) } = change
                && let Some(byte) = offset.checked_sub(*at).and_then(|i| bytes.get_mut(usize::try_from(i).ok()?))
            {
                *byte ^= mask;
            }
        }
    }

    /// What a power cut leaves, with `flying` in flight.
    fn cut(&mut self, rng: &mut Rng, flying: Vec<Change>) {
        let mut content = std::mem::take(&mut self.durable);
        survive(rng, &mut content, &std::mem::take(&mut self.failed));
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend(flying);
        survive(rng, &mut content, &pending);
        content.clip();
        self.free(content.len.div_ceil(PAGE), u64::MAX);
        for page in content.pages.keys() {
            self.allocated.insert(Extent::new(*page, 1));
        }
        self.now = content.clone();
        self.durable = content;
    }
}

/// Lets some of `changes` happen to `content`.
fn survive(rng: &mut Rng, content: &mut Content, changes: &[Change]) {
    // Lengths survive up to a point in their order. Writes before a cut of the file that survives are cut too; otherwise their
    // order means nothing.
    let lengths = changes.iter().filter(|c| matches!(c, Change::Len(_))).count() as u64;
    let mut surviving = rng.below(lengths + 1);
    let mut together = Vec::new();
    for change in changes {
        match change {
            Change::Data { .. } => together.push(change),
            Change::Len(len) if surviving > 0 => {
                surviving -= 1;
                if *len < content.len {
                    survive_together(rng, content, &std::mem::take(&mut together));
                    content.set_len(*len);
                } else {
                    content.len = *len;
                }
            }
            Change::Len(_) => {}
        }
    }
    survive_together(rng, content, &together);
}

fn survive_together(rng: &mut Rng, content: &mut Content, changes: &[&Change]) {
    // All and nothing are rare among many writes if each is drawn for itself, and are what happens most often.
    let mood = rng.below(6);
    if mood == 0 {
        return;
    }
    let mut order = changes.to_vec();
    if mood != 1 {
        rng.shuffle(&mut order);
    }
    for change in order {
        let Change::Data { at, data } = change else { continue };
        let end = at + data.len();
        let luck = if mood == 1 { 0 } else { rng.below(4) };
        let prefix = at + rng.below(data.len() + 1);
        let mut sector = *at;
        while luck != 1 && sector < end {
            let next = ((sector / SECTOR + 1) * SECTOR).min(end);
            let kept = match luck {
                0 => true,
                2 => next <= prefix,
                _ => rng.coin(),
            };
            if kept {
                data.apply(content, *at, sector, next);
            }
            sector = next;
        }
    }
}

/// Takes the bytes from `start` to `end` out of what is at risk.
fn trim(changes: &mut Vec<Change>, start: u64, end: u64) {
    let mut kept = Vec::with_capacity(changes.len());
    for change in changes.drain(..) {
        let Change::Data { at, data } = &change else {
            kept.push(change);
            continue;
        };
        let (at, stop) = (*at, at + data.len());
        if stop <= start || end <= at {
            kept.push(change);
            continue;
        }
        for (from, to) in [(at, start), (end, stop)] {
            if from < to {
                kept.push(Change::Data { at: from, data: data.part(from - at, to - at) });
            }
        }
    }
    *changes = kept;
}

#[derive(Clone)]
enum Change {
    Data { at: u64, data: Data },
    Len(u64),
}

#[derive(Clone)]
enum Data {
    Bytes(Vec<u8>),
    Zero(u64),
}

impl Change {
    fn apply(&self, content: &mut Content) {
        match self {
            Change::Data { at, data } => data.apply(content, *at, *at, at + data.len()),
            Change::Len(len) => content.set_len(*len),
        }
    }
}

impl Data {
    fn len(&self) -> u64 {
        match self {
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Zero(len) => *len,
        }
    }
    fn part(&self, from: u64, to: u64) -> Data {
        match self {
            Data::Bytes(bytes) => Data::Bytes(bytes[from as usize..to as usize].to_vec()),
            Data::Zero(_) => Data::Zero(to - from),
        }
    }
    /// Writes the part of this that lies from `start` to `end`, when it begins at `at`.
    fn apply(&self, content: &mut Content, at: u64, start: u64, end: u64) {
        match self {
            Data::Bytes(bytes) => content.write(start, &bytes[(start - at) as usize..(end - at) as usize]),
            Data::Zero(_) => content.zero(start, end),
        }
    }
}

/// Bytes of a file; a page that is not there reads as zeroes. May hold pages past its length until [`Content::clip`].
#[derive(Clone, Default)]
struct Content {
    len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
}

impl Content {
    /// Returns how many bytes the file had.
    fn read(&self, at: u64, buf: &mut [u8]) -> usize {
        let had = (buf.len() as u64).min(self.len.saturating_sub(at)) as usize;
        for (page, within, range) in pieces(at, had) {
            match self.pages.get(&page) {
                Some(bytes) => buf[range.clone()].copy_from_slice(&bytes[within..within + range.len()]),
                None => buf[range].fill(0),
            }
        }
        had
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        for (page, within, range) in pieces(at, data.len()) {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[within..within + range.len()].copy_from_slice(&data[range]);
        }
    }

    fn zero(&mut self, start: u64, end: u64) {
        let (first, last) = (start.div_ceil(PAGE), end / PAGE);
        let whole: Vec<u64> =
            if first < last { self.pages.range(first..last).map(|(p, _)| *p).collect() } else { Vec::new() };
        for page in whole {
            self.pages.remove(&page);
        }
        let mut edge = |from: u64, to: u64| {
            if from < to
                && let Some(bytes) = self.pages.get_mut(&(from / PAGE))
            {
                let within = (from % PAGE) as usize;
                Arc::make_mut(bytes)[within..within + (to - from) as usize].fill(0);
            }
        };
        if first > last {
            edge(start, end);
        } else {
            edge(start, first * PAGE);
            edge(last * PAGE, end);
        }
    }

    fn set_len(&mut self, len: u64) {
        self.len = len;
        self.clip();
    }

    fn clip(&mut self) {
        self.pages.split_off(&self.len.div_ceil(PAGE));
        self.zero(self.len, self.len.div_ceil(PAGE) * PAGE);
    }

    fn flip(&mut self, offset: u64, mask: u8) {
        if offset < self.len {
            let bytes = self.pages.entry(offset / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[(offset % PAGE) as usize] ^= mask;
        }
    }
}

/// The pages that `len` bytes at `at` touch: the page, where in it, and which of the bytes.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let within = (here % PAGE) as usize;
        let n = (len - done).min(PAGE as usize - within);
        let range = done..done + n;
        done += n;
        (n > 0).then_some((here / PAGE, within, range))
    })
}
