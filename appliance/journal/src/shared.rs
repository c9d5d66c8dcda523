//! What the writer, the jobs and the readers of one journal share.
//!
//! The [`Map`] of segments and timelines is immutable and replaced as a whole: a reader takes the one that is in force and
//! works on it in peace, however long it takes. Segments it names may be deleted meanwhile; then their data is in the base
//! already, and the reader starts again with the newer map.
//!
//! ```text
//! lock          held by                        while holding it, may take
//! leases        open view, retention           map (read, swap)
//! map           everyone, to clone or swap     nothing
//! segment       lookups, append, seal          nothing
//! ```

use crate::{
    BaseError, Corruption, ReadError,
    base::Base,
    cache::Lru,
    control::{Branching, Floor},
    format::{self, ExtentEntry, TableEntry},
    index::{IndexStore, RunId, Shape},
    segment::{Fences, Footer, Segment, State},
    stats::Numbers,
};
use durable::{Disk, DiskFile, OpenMode};
use model::{Extent, GroupSpec, Lsn, TimelineId, VolumeId};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Handles of segment files kept open: a view of a long history touches some dozens, a process may open 1024 by default.
const FILES_MAX: usize = 128;
/// Of fences kept in memory: 32 bytes per 170 records, so about 300 million records' worth.
const FENCES_BYTES_MAX: usize = 64 << 20;
/// Views open at once; each pins history.
pub const VIEWS_MAX: usize = 1024;

/// A line of history and the segments it has of its own.
#[derive(Clone)]
pub struct Line {
    pub id: TimelineId,
    pub parent: Option<(TimelineId, Lsn)>,
    pub live: bool,
    /// The line's own records begin behind this LSN: the branch point, or the floor.
    pub start: Lsn,
    /// By first LSN; contiguous, ordinals count up by one.
    pub segments: Vec<Arc<Segment>>,
    /// The last LSN that can be read, that of the branch point while the line has none of its own.
    pub written: Arc<AtomicU64>,
}

impl Line {
    pub fn written(&self) -> Lsn {
        Lsn(self.written.load(Ordering::Acquire))
    }
    /// Index of the segment that holds this LSN.
    pub fn position(&self, lsn: Lsn) -> Option<usize> {
        self.segments.partition_point(|s| s.first_lsn() <= lsn).checked_sub(1)
    }
    pub fn first_kept(&self) -> u32 {
        self.segments.first().map_or(0, |s| s.header.ordinal)
    }
    /// The segment with this ordinal.
    pub fn by_ordinal(&self, ordinal: u32) -> Option<&Arc<Segment>> {
        self.segments.get(usize::try_from(ordinal.checked_sub(self.first_kept())?).ok()?)
    }
}

/// Everything there is, at one moment.
#[derive(Clone)]
pub struct Map {
    pub spec: Arc<GroupSpec>,
    pub lines: BTreeMap<TimelineId, Line>,
    pub current: TimelineId,
    pub floor: Floor,
    pub cutoff: Lsn,
    pub released: Arc<BTreeSet<(TimelineId, Lsn)>>,
    pub branching: Arc<Branching>,
}

/// A stretch of a view's history: the records of `timeline` up to `upto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    pub timeline: TimelineId,
    pub upto: Lsn,
}

impl Map {
    pub fn line(&self, id: TimelineId) -> Option<&Line> {
        self.lines.get(&id)
    }
    pub fn current(&self) -> &Line {
        self.lines.get(&self.current).expect("the current timeline is in the map")
    }
    /// The stretches that make up timeline `id` as of `lsn`, newest first.
    pub fn chain(&self, id: TimelineId, lsn: Lsn) -> Vec<Link> {
        let mut out = Vec::new();
        let (mut id, mut upto) = (id, lsn);
        while let Some(line) = self.lines.get(&id) {
            match line.parent {
                Some((parent, at)) => {
                    if upto > at {
                        out.push(Link { timeline: id, upto });
                    }
                    (id, upto) = (parent, upto.min(at));
                }
                None => {
                    out.push(Link { timeline: id, upto });
                    break;
                }
            }
        }
        out
    }
    /// The segment that holds an LSN of a timeline's history, its parents' included.
    pub fn segment_of(&self, id: TimelineId, lsn: Lsn) -> Option<&Arc<Segment>> {
        for link in self.chain(id, lsn) {
            let line = self.lines.get(&link.timeline)?;
            if let Some(at) = line.position(lsn)
                && link.upto >= lsn
            {
                return line.segments.get(at);
            }
        }
        None
    }
    /// All segments of a timeline's history with what counts of each, oldest first.
    pub fn history(&self, id: TimelineId, upto: Lsn) -> Vec<(Arc<Segment>, Lsn)> {
        let mut out = Vec::new();
        for link in self.chain(id, upto).into_iter().rev() {
            let Some(line) = self.lines.get(&link.timeline) else { continue };
            let end = line.segments.partition_point(|s| s.first_lsn() <= link.upto);
            out.extend(line.segments[..end].iter().map(|s| (Arc::clone(s), link.upto)));
        }
        out
    }
    pub fn segments(&self) -> impl Iterator<Item = &Arc<Segment>> {
        self.lines.values().flat_map(|line| line.segments.iter())
    }
}

/// Open views: what they read must stay.
#[derive(Default)]
pub struct Leases {
    held: BTreeMap<u64, (TimelineId, Lsn)>,
    next: u64,
}

impl Leases {
    pub fn list(&self) -> Vec<(TimelineId, Lsn)> {
        self.held.values().copied().collect()
    }
    pub fn count(&self) -> usize {
        self.held.len()
    }
}

pub struct Shared {
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub shape: Shape,
    map: RwLock<Arc<Map>>,
    pub leases: Mutex<Leases>,
    pub numbers: Mutex<Numbers>,
    /// The writer's handle is gone: jobs must not begin.
    pub closed: AtomicBool,
    /// None until a job has opened it, and for journals without one.
    index: RwLock<Option<Arc<dyn IndexStore>>>,
    pub base: Arc<dyn Base>,
    files: Lru<(TimelineId, u32), Arc<dyn DiskFile>>,
    fences: Lru<(TimelineId, u32), Arc<Fences>>,
}

impl Shared {
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, shape: Shape, map: Map, base: Arc<dyn Base>) -> Self {
        Self {
            disk,
            dir,
            shape,
            map: RwLock::new(Arc::new(map)),
            leases: Mutex::default(),
            numbers: Mutex::default(),
            closed: AtomicBool::new(false),
            index: RwLock::new(None),
            base,
            files: Lru::new(FILES_MAX),
            fences: Lru::new(FENCES_BYTES_MAX),
        }
    }
    /// Keeps what a read found damaged, for the status: whoever read it may be a client that tells nobody.
    pub fn note_damage(&self, error: &ReadError) {
        match error {
            ReadError::Corrupt(found) => self.keep_damage(found),
            ReadError::Base(base) => self.note_base_damage(base),
            ReadError::Disk(_) => {}
        }
    }
    pub fn note_base_damage(&self, error: &BaseError) {
        if let BaseError::Corruption(found) = error {
            self.keep_damage(found);
        }
    }
    fn keep_damage(&self, found: &Corruption) {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.damage.get_or_insert_with(|| found.clone());
    }
    /// What a verification found, or that it found nothing.
    pub fn set_damage(&self, found: Option<Corruption>) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).damage = found;
    }
    pub fn map(&self) -> Arc<Map> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }
    /// Replaces the map by a changed copy. Changes are rare: a segment begins or goes, a policy or timeline changes.
    pub fn change_map<T>(&self, change: impl FnOnce(&mut Map) -> T) -> T {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Map::clone(&map);
        let out = change(&mut next);
        *map = Arc::new(next);
        out
    }
    pub fn index(&self) -> Option<Arc<dyn IndexStore>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    pub fn set_index(&self, index: Option<Arc<dyn IndexStore>>) {
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = index;
    }

    /// A handle of the segment's file. The name changes once, when it is sealed: a name that is gone is asked for again.
    pub fn file(&self, segment: &Segment) -> Result<Arc<dyn DiskFile>, ReadError> {
        let key = (segment.header.timeline, segment.header.ordinal);
        if let Some(file) = self.files.get(&key) {
            return Ok(file);
        }
        let path = segment.path(&self.dir);
        let file = match self.disk.open(&path, OpenMode::Read) {
            Err(e) if e.is_not_found() => {
                let again = segment.path(&self.dir);
                let other = segment.header.name(format::SegmentState::Sealed).path(&self.dir);
                // Renamed between asking for the name and opening it; or renamed already and not yet marked as sealed.
                self.disk.open(if again == path { &other } else { &again }, OpenMode::Read)?
            }
            other => other?,
        };
        self.files.put(key, Arc::clone(&file), 1);
        Ok(file)
    }
    /// The handle of a segment's file, if it is open already.
    pub fn open_file(&self, segment: &Segment) -> Option<Arc<dyn DiskFile>> {
        self.files.get(&(segment.header.timeline, segment.header.ordinal))
    }
    /// Forgets what is kept of a segment that is deleted or renamed.
    pub fn forget(&self, segment: &Segment) {
        let key = (segment.header.timeline, segment.header.ordinal);
        self.files.remove(&key);
        self.fences.remove(&key);
    }
    fn fences(&self, segment: &Segment, footer: &Footer<'_>) -> Result<Arc<Fences>, ReadError> {
        let key = (segment.header.timeline, segment.header.ordinal);
        if let Some(fences) = self.fences.get(&key) {
            return Ok(fences);
        }
        let fences = Arc::new(footer.fences()?);
        self.fences.put(key, Arc::clone(&fences), fences.bytes().max(1));
        Ok(fences)
    }

    /// Appends every version at or below `upto` that meets the extent, from memory or from the footer.
    pub fn lookup(
        &self,
        segment: &Segment,
        volume: VolumeId,
        extent: Extent,
        upto: Lsn,
        out: &mut Vec<ExtentEntry>,
    ) -> Result<(), ReadError> {
        if !segment.may_touch(volume, extent) {
            return Ok(());
        }
        let sealed = match &*segment.state() {
            State::Unsealed(unsealed) => {
                unsealed.index.lookup(volume, extent, upto, out);
                return Ok(());
            }
            State::Sealed(sealed) => Arc::clone(sealed),
        };
        let file = self.file(segment)?;
        let path = segment.path(&self.dir);
        let footer = Footer { file: &*file, path: &path, trailer: &sealed.trailer };
        let fences = self.fences(segment, &footer)?;
        footer.lookup(&fences, volume, extent, upto, out)
    }
    /// Every version of a segment, in no certain order.
    pub fn all_extents(&self, segment: &Segment) -> Result<Vec<ExtentEntry>, ReadError> {
        let sealed = match &*segment.state() {
            State::Unsealed(unsealed) => return Ok(unsealed.index.sorted()),
            State::Sealed(sealed) => Arc::clone(sealed),
        };
        let file = self.file(segment)?;
        Footer { file: &*file, path: &segment.path(&self.dir), trailer: &sealed.trailer }.all_extents()
    }
    /// Where a stretch of the record table lies: the entries of one page, and the LSN of its first. None for LSNs the segment
    /// does not hold.
    pub fn table_page(&self, segment: &Segment, lsn: Lsn) -> Result<Option<(Lsn, Vec<TableEntry>)>, ReadError> {
        let first = segment.first_lsn();
        let Some(index) = lsn.0.checked_sub(first.0) else { return Ok(None) };
        let page = index / format::TABLE_PER_PAGE as u64;
        let page_first = Lsn(first.0 + page * format::TABLE_PER_PAGE as u64);
        let sealed = match &*segment.state() {
            State::Unsealed(unsealed) => {
                let entries: Vec<TableEntry> = (page_first.0..page_first.0 + format::TABLE_PER_PAGE as u64)
                    .map_while(|lsn| unsealed.index.entry(Lsn(lsn)))
                    .collect();
                return Ok((lsn <= unsealed.index.last_lsn()).then_some((page_first, entries)));
            }
            State::Sealed(sealed) => Arc::clone(sealed),
        };
        if lsn > sealed.trailer.last_lsn {
            return Ok(None);
        }
        let file = self.file(segment)?;
        let footer = Footer { file: &*file, path: &segment.path(&self.dir), trailer: &sealed.trailer };
        Ok(Some((page_first, footer.table_page(page as usize)?)))
    }
    pub fn entry(&self, segment: &Segment, lsn: Lsn) -> Result<Option<TableEntry>, ReadError> {
        let Some((first, entries)) = self.table_page(segment, lsn)? else { return Ok(None) };
        Ok(entries.get((lsn.0 - first.0) as usize).copied())
    }

    /// What a run must have been made from to be used: the last segment it covers, whose identity says everything before it.
    pub fn run_tag(&self, line: &Line, run: RunId) -> Option<u64> {
        let last = self.shape.covers(run).end.checked_sub(1)?;
        let sealed = line.by_ordinal(last)?.sealed()?;
        Some(sealed.trailer.header.tag() ^ sealed.trailer.last_lsn.0.rotate_left(32))
    }
    /// Whether a run is there and is ours.
    pub fn has_run(&self, index: &dyn IndexStore, line: &Line, run: RunId) -> bool {
        let Some(info) = index.run(run) else { return false };
        self.run_tag(line, run) == Some(info.tag)
    }

    /// Takes a lease on a moment, so that nothing it needs is folded or deleted; refused below the cutoff.
    /// `counted`: against the bound of open views.
    pub fn lease(self: &Arc<Self>, timeline: TimelineId, lsn: Lsn, counted: bool) -> Result<Lease, LeaseError> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let cutoff = self.map().cutoff;
        if lsn < cutoff {
            return Err(LeaseError::BelowCutoff(cutoff));
        }
        if counted && leases.held.len() >= VIEWS_MAX {
            return Err(LeaseError::TooMany(leases.held.len()));
        }
        let id = leases.next;
        leases.next += 1;
        leases.held.insert(id, (timeline, lsn));
        Ok(Lease { shared: Arc::clone(self), id })
    }
}

pub enum LeaseError {
    BelowCutoff(Lsn),
    TooMany(usize),
}

/// Holds a moment open; gives it up when dropped.
pub struct Lease {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shared.leases.lock().unwrap_or_else(PoisonError::into_inner).held.remove(&self.id);
    }
}
