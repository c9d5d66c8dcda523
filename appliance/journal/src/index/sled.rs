//! Runs in sled, one directory per generation, behind a guard.
//!
//! sled 0.34 panics on damaged pages, opens a file with a missing tail and silently lacks what was there, and never gives
//! room back for deleted keys. What that leads to here:
//!
//! - **every call** goes through [`guarded`]: a panic or an error marks the generation damaged. It is set aside (renamed to
//!   `….bad`, the last one is kept for study) at the next use, its runs are gone, hence due again;
//! - a run counts when its record is there, which is written after its pages were flushed; the pages form a chain with numbers,
//!   checksums and an attempt stamp, so a lookup that passes a page that is missing or stale knows it (see `page`). A
//!   power loss loses runs, never parts of runs;
//! - at open the store's record, all run records and the two ends of each run are read: cheap, and finds most lost tails
//!   at once. The rest is found by the lookup that would have been wrong;
//! - nothing is ever deleted but whole directories (and the leftovers of an attempt that was cut short);
//! - a handle that has panicked is forgotten, not dropped: its destructor may wait for a thread that is gone. That leaks
//!   memory, so after [`SET_ASIDE_MAX`] generations were set aside the store answers `Unavailable` until the process
//!   starts again, and readers use footers;
//! - sled's own flush thread is not used (`flush_every_ms(None)`): when it dies of a damaged page the destructor of the
//!   database waits for it for ever. Runs are flushed when they are written.
//!
//! Bounds: at most [`SledOptions::open_max`] generations are open, the least recently used is closed; 64 MiB of cache each
//! (a wish to sled, not a limit); filters below 10 MiB; facts of runs about 60 bytes each.
//!
//! Directory names: `g<timeline>-<generation>`; `.bad` set aside; `.gone` being deleted. In a directory, beside sled's files, lies
//! `holdfast.runs` once the generation is closed: a list of its runs, so that a long history is not opened generation by
//! generation at every start only to find that nothing is due. It is a hint: opening the generation corrects it.

use super::{
    Damage, GenerationId, IndexError, IndexStore, Piece, RunId, RunInfo, RunIter, Shape,
    filter::FilterBuilder,
    page::{self, Owner, Page, Place, RunRecord, StoreRecord},
};
use ::sled::{Db, IVec};
use model::{Extent, TimelineId, VolumeId};
use std::{
    collections::BTreeMap,
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// After so many damaged generations in one process the store gives up; see the module's text.
pub const SET_ASIDE_MAX: u32 = 8;

const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Pages held back while a run is written, so that their keys go first: about 350 KiB.
const WINDOW: usize = 256;

/// sled puts a value of a quarter of its segment (128 KiB) into a file of its own; a page is far below.
const BLOB_LIMIT: usize = 64 * 1024;

/// How a [`SledStore`] is set up.
#[derive(Clone, Copy, Debug)]
pub struct SledOptions {
    /// sled's page cache, for each open generation.
    pub cache_bytes: u64,
    /// A view needs its own generation and the map before it; two views and the writer are four.
    pub open_max: usize,
    /// How often an open is tried again, 50 ms apart, while the directory is locked: a killed process, or a handle of ours
    /// that is being dropped, holds the lock a little longer.
    pub lock_tries: u32,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20, open_max: 4, lock_tries: 200 }
    }
}

/// An [`IndexStore`] in sled directories.
#[derive(Debug)]
pub struct SledStore {
    dir: PathBuf,
    shape: Shape,
    identity: [u8; 16],
    options: SledOptions,
    slots: Mutex<BTreeMap<GenerationId, Arc<Slot>>>,
    /// Counts uses, to find the least recently used generation.
    uses: AtomicU64,
    set_aside: AtomicU32,
}

#[derive(Debug)]
struct Slot {
    id: GenerationId,
    last_use: AtomicU64,
    state: Mutex<SlotState>,
}

#[derive(Debug, Default)]
struct SlotState {
    /// The finished runs; none before the directory has been opened once.
    known: Option<BTreeMap<(u8, u32), RunInfo>>,
    open: Option<Arc<Opened>>,
    /// Dropped for good; whoever still holds the slot must look it up again.
    gone: bool,
}

/// An open generation.
struct Opened {
    id: GenerationId,
    identity: [u8; 16],
    /// None only while it is being dropped.
    db: Option<Db>,
    runs: RwLock<BTreeMap<(u8, u32), Arc<RunRecord>>>,
    /// Nothing may be believed any more, and nothing written.
    damaged: AtomicBool,
    /// A call has panicked: see the module's text.
    panicked: AtomicBool,
    /// One run is written at a time.
    writing: Mutex<()>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("id", &self.id).field("damaged", &self.damaged).finish_non_exhaustive()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(db) = self.db.take() else { return };
        if *self.panicked.get_mut() {
            std::mem::forget(db);
            return;
        }
        // Dropping flushes; what fails there was not promised.
        let dropped = guarded(|| {
            drop(db);
            Ok(())
        });
        drop(dropped);
    }
}

/// Runs a call into sled; a panic becomes an error.
fn guarded<T>(call: impl FnOnce() -> Result<T, ::sled::Error>) -> Result<T, Damage> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Damage::Store(Box::new(e))),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Damage::Panicked(text.chars().take(200).collect()))
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn content(what: &'static str) -> Damage {
    Damage::Content { what }
}

impl Opened {
    fn db(&self) -> &Db {
        self.db.as_ref().expect("the handle is taken only when dropped")
    }

    fn owner(&self, run: RunId) -> Owner {
        Owner { identity: self.identity, run }
    }

    /// Marks the generation damaged and says so.
    fn fail(&self, why: Damage) -> IndexError {
        if let Damage::Panicked(_) = why {
            self.panicked.store(true, Ordering::Release);
        }
        self.damaged.store(true, Ordering::Release);
        IndexError::Unavailable { generation: self.id, why }
    }

    /// A guarded call whose failure condemns the generation.
    fn call<T>(&self, call: impl FnOnce(&Db) -> Result<T, ::sled::Error>) -> Result<T, IndexError> {
        guarded(|| call(self.db())).map_err(|why| self.fail(why))
    }

    fn record(&self, run: RunId) -> Option<Arc<RunRecord>> {
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        runs.get(&(run.level, run.ordinal)).cloned()
    }

    /// Reads and checks one page of a finished run.
    fn page(&self, run: RunId, record: &RunRecord, at: Place, seq: u32) -> Result<Page, Damage> {
        let bytes = guarded(|| self.db().get(page::page_key(run, at)))?
            .ok_or(content("a page of a finished run is missing"))?;
        self.checked(run, record, at, seq, &bytes)
    }

    fn checked(&self, run: RunId, record: &RunRecord, at: Place, seq: u32, bytes: &IVec) -> Result<Page, Damage> {
        let found = page::decode(&self.owner(run), at, bytes).map_err(content)?;
        if found.stamp != record.stamp {
            return Err(content("a page is from an earlier attempt at its run"));
        }
        if found.seq != seq || (found.next.is_none()) != (seq + 1 == record.pages) {
            return Err(content("a page is not the one its run expects"));
        }
        Ok(found)
    }

    /// The page that holds `place` or the gap around it: the last one that does not begin after it.
    fn page_before(&self, run: RunId, record: &RunRecord, place: Place) -> Result<(Page, Place), Damage> {
        // The smallest key above the place's own.
        let mut above = page::page_key(run, place).to_vec();
        above.push(0);
        let (key, bytes) =
            guarded(|| self.db().get_lt(&above))?.ok_or(content("the first page of a finished run is missing"))?;
        let at = page::parse_page_key(run, &key).ok_or(content("the first page of a finished run is missing"))?;
        let owner = self.owner(run);
        let seq = page::decode(&owner, at, &bytes).map_err(content)?.seq;
        let found = self.checked(run, record, at, seq, &bytes)?;
        if found.next.is_some_and(|next| next <= place) {
            return Err(content("a page of a finished run is missing"));
        }
        Ok((found, at))
    }

    fn lookup(&self, run: RunId, record: &RunRecord, volume: VolumeId, extent: Extent) -> Result<Vec<Piece>, Damage> {
        let mut out = Vec::new();
        let Some((first, _)) = record.ends else { return Ok(out) };
        let (start, end) = ((volume, extent.start()), (volume, extent.end()));
        if first >= end {
            return Ok(out);
        }
        let mut current =
            if first > start { self.page(run, record, first, 0)? } else { self.page_before(run, record, start)?.0 };
        loop {
            let meeting = current.pieces.iter().filter(|p| p.volume == volume);
            out.extend(meeting.filter_map(|p| p.clip(extent.start(), extent.end())));
            match current.next {
                Some(next) if next < end => current = self.page(run, record, next, current.seq + 1)?,
                _ => return Ok(out),
            }
        }
    }

    /// Reads what must be there before anything is believed.
    fn load(&self, shape: Shape) -> Result<BTreeMap<(u8, u32), Arc<RunRecord>>, Damage> {
        let mine = StoreRecord {
            format: page::FORMAT,
            timeline: self.id.timeline.0,
            generation: self.id.number,
            segments: shape.segments_per_generation(),
        };
        let owner = self.owner(RunId::new(self.id.timeline, u8::MAX, self.id.number));
        match guarded(|| self.db().get(page::STORE_KEY))? {
            Some(bytes) => {
                let found: StoreRecord = owner
                    .unseal_record(&page::STORE_KEY, &bytes)
                    .ok_or(content("the store's record is damaged or of another journal"))?;
                if found != mine {
                    return Err(content("the store was written for another generation, shape or format"));
                }
            }
            None => {
                if guarded(|| self.db().first())?.is_some() {
                    return Err(content("the store's record is missing"));
                }
                guarded(|| self.db().insert(page::STORE_KEY, owner.seal_record(&page::STORE_KEY, &mine)))?;
            }
        }
        let mut runs = BTreeMap::new();
        let entries = guarded(|| self.db().scan_prefix(page::done_prefix()).collect::<Result<Vec<_>, _>>())?;
        for (key, bytes) in entries {
            let (level, ordinal) = page::parse_done_key(&key).ok_or(content("a run's record has a bad key"))?;
            let run = RunId::new(self.id.timeline, level, ordinal);
            let record: RunRecord = self
                .owner(run)
                .unseal_record(&key, &bytes)
                .filter(RunRecord::is_sound)
                .ok_or(content("a run's record does not match its checksum"))?;
            if let Some((first, last)) = record.ends {
                self.page(run, &record, first, 0)?;
                self.page(run, &record, last, record.pages - 1)?;
            }
            runs.insert((level, ordinal), Arc::new(record));
        }
        Ok(runs)
    }
}

impl SledStore {
    /// Opens the store in `dir` (absolute; made when it is not there). `identity` tells this journal's index from
    /// another's: what was written under another one is set aside. No generation is opened yet.
    pub fn open(dir: &Path, identity: [u8; 16], shape: Shape, options: SledOptions) -> Result<Self, io::Error> {
        fs::create_dir_all(dir)?;
        let mut slots = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if name.ends_with(GONE) {
                fs::remove_dir_all(entry.path())?;
            } else if let Some(id) = parse_dir_name(&name) {
                let slot = Slot::new(id);
                lock(&slot.state).known = read_hint(&entry.path(), &identity, id);
                slots.insert(id, Arc::new(slot));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            shape,
            identity,
            options,
            slots: Mutex::new(slots),
            uses: AtomicU64::new(0),
            set_aside: AtomicU32::new(0),
        })
    }

    fn path(&self, id: GenerationId) -> PathBuf {
        self.dir.join(dir_name(id))
    }

    /// The generation's slot; made when `create`.
    fn slot(&self, id: GenerationId, create: bool) -> Option<Arc<Slot>> {
        let mut slots = lock(&self.slots);
        if create {
            return Some(slots.entry(id).or_insert_with(|| Arc::new(Slot::new(id))).clone());
        }
        slots.get(&id).cloned()
    }

    /// The open generation, opened now if need be; none when there is none and `create` is not set.
    fn opened(&self, id: GenerationId, create: bool) -> Result<Option<Arc<Opened>>, IndexError> {
        loop {
            let Some(slot) = self.slot(id, create) else { return Ok(None) };
            slot.last_use.store(self.uses.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
            let mut state = lock(&slot.state);
            if state.gone {
                continue;
            }
            if let Some(open) = &state.open {
                if !open.damaged.load(Ordering::Acquire) {
                    return Ok(Some(open.clone()));
                }
                state.open = None;
                state.known = None;
                self.put_aside(&slot)?;
            }
            if !self.path(id).is_dir() {
                state.known = None;
                if !create {
                    state.gone = true;
                    lock(&self.slots).remove(&id);
                    return Ok(None);
                }
            }
            let unavailable = |why| IndexError::Unavailable { generation: id, why };
            if self.set_aside.load(Ordering::Relaxed) >= SET_ASIDE_MAX {
                return Err(unavailable(Damage::Earlier));
            }
            return match self.open_generation(id) {
                Ok(open) => {
                    let open = Arc::new(open);
                    let runs = open.runs.read().unwrap_or_else(PoisonError::into_inner);
                    state.known = Some(runs.iter().map(|(key, record)| (*key, record.info())).collect());
                    drop(runs);
                    state.open = Some(open.clone());
                    drop(state);
                    self.close_others(id);
                    Ok(Some(open))
                }
                Err(Damage::Locked) => Err(unavailable(Damage::Locked)),
                Err(why) => {
                    self.put_aside(&slot)?;
                    Err(unavailable(why))
                }
            };
        }
    }

    fn open_generation(&self, id: GenerationId) -> Result<Opened, Damage> {
        let path = self.path(id);
        let mut tries = 0;
        let db = loop {
            let config = ::sled::Config::new()
                .path(&path)
                .cache_capacity(self.options.cache_bytes)
                .flush_every_ms(None)
                .mode(::sled::Mode::HighThroughput);
            match guarded(|| config.open()) {
                Ok(db) => break db,
                Err(Damage::Store(e)) if is_lock_error(&e) => {
                    tries += 1;
                    if tries >= self.options.lock_tries {
                        return Err(Damage::Locked);
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                Err(why) => return Err(why),
            }
        };
        let mut open = Opened {
            id,
            identity: self.identity,
            db: Some(db),
            runs: RwLock::default(),
            damaged: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            writing: Mutex::new(()),
        };
        match open.load(self.shape) {
            Ok(runs) => {
                open.runs = RwLock::new(runs);
                Ok(open)
            }
            Err(why) => {
                *open.panicked.get_mut() = matches!(why, Damage::Panicked(_));
                Err(why)
            }
        }
    }

    /// Renames a damaged generation out of the way. Only the last damaged one is kept, so damage cannot fill the disk.
    fn put_aside(&self, slot: &Slot) -> Result<(), IndexError> {
        self.set_aside.fetch_add(1, Ordering::Relaxed);
        let aside = || -> io::Result<()> {
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                if entry.file_name().to_str().is_some_and(|name| name.ends_with(BAD)) {
                    fs::remove_dir_all(entry.path())?;
                }
            }
            let path = self.path(slot.id);
            match fs::rename(&path, self.dir.join(format!("{}{BAD}", dir_name(slot.id)))) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        };
        aside().map_err(|e| IndexError::Unavailable { generation: slot.id, why: Damage::Directory(e) })
    }

    /// Closes the least recently used generations until no more than allowed are open.
    fn close_others(&self, keep: GenerationId) {
        let mut others: Vec<Arc<Slot>> = lock(&self.slots).values().filter(|slot| slot.id != keep).cloned().collect();
        others.sort_by_key(|slot| std::cmp::Reverse(slot.last_use.load(Ordering::Relaxed)));
        let mut open = 1;
        for slot in others {
            // One that is just being opened or closed counts itself.
            let Ok(mut state) = slot.state.try_lock() else { continue };
            match &state.open {
                Some(db) if db.damaged.load(Ordering::Acquire) => {}
                Some(db) => {
                    open += 1;
                    // One in use stays: whoever wants it again would wait for its lock.
                    if open > self.options.open_max.max(1) && Arc::strong_count(db) == 1 {
                        state.open = None;
                    }
                }
                None => {}
            }
        }
    }

    /// Writes the pages of a run and, when they are on the disk, its record.
    fn write_run(
        &self,
        open: &Opened,
        run: RunId,
        tag: u64,
        pieces: &mut dyn Iterator<Item = Result<Piece, IndexError>>,
    ) -> Result<RunInfo, IndexError> {
        let _writing = lock(&open.writing);
        if let Some(record) = open.record(run) {
            return Ok(record.info());
        }
        let stamp = self.begin_attempt(open, run)?;
        let owner = open.owner(run);
        let mut record = RunRecord { stamp, pieces: 0, pages: 0, bytes: 0, tag, ends: None, filter: None };
        let mut filter = FilterBuilder::default();
        let mut full: Vec<Piece> = Vec::with_capacity(page::PAGE_PIECES);
        let mut window: Vec<([u8; 18], Vec<u8>)> = Vec::with_capacity(WINDOW);
        let mut write = |full: &mut Vec<Piece>, next: Option<Place>| -> Result<(), IndexError> {
            if let Some(first) = full.first() {
                let at = (first.volume, first.lba);
                let bytes = page::encode(&owner, stamp, record.pages, next, full);
                debug_assert!(bytes.len() < BLOB_LIMIT, "a page must not become a file of its own");
                record.pieces += full.len() as u64;
                record.bytes += bytes.len() as u64;
                record.pages += 1;
                record.ends = Some((record.ends.map_or(at, |(head, _)| head), at));
                full.clear();
                window.push((page::page_key(run, at), bytes));
            }
            if window.len() == WINDOW || next.is_none() {
                // Keys first, then what belongs to them: sled splits a leaf at 16 keys and writes it anew each time, which
                // with the values in it more than doubles what lies on the disk.
                for (key, _) in &window {
                    open.call(|db| db.insert(key, &[]))?;
                }
                for (key, bytes) in window.drain(..) {
                    open.call(|db| db.insert(key, bytes))?;
                }
            }
            Ok(())
        };
        let mut last: Option<Place> = None;
        for piece in pieces {
            let piece = piece?;
            let at = (piece.volume, piece.lba);
            let ends_right = piece.lba.checked_add(u64::from(piece.sectors)).is_some_and(|end| end > piece.lba);
            if !ends_right || last.is_some_and(|last| at < last) {
                return Err(IndexError::OutOfOrder { run, piece });
            }
            last = Some((piece.volume, piece.end()));
            if full.len() == page::PAGE_PIECES || full.first().is_some_and(|first| first.volume != piece.volume) {
                write(&mut full, Some(at))?;
            }
            filter.add(&piece);
            full.push(piece);
        }
        write(&mut full, None)?;
        record.filter = filter.finish();
        // The pages first: the record vouches for them.
        open.call(|db| db.flush())?;
        let key = page::done_key(run);
        open.call(|db| db.insert(key, owner.seal_record(&key, &record)))?;
        let info = record.info();
        let mut runs = open.runs.write().unwrap_or_else(PoisonError::into_inner);
        runs.insert((run.level, run.ordinal), Arc::new(record));
        Ok(info)
    }

    /// Nothing more will be written here: makes the records durable and leaves the hint for the next start.
    fn close_generation(&self, open: &Opened) -> Result<(), IndexError> {
        open.call(|db| db.flush())?;
        let runs = open.runs.read().unwrap_or_else(PoisonError::into_inner);
        let list: Vec<(u8, u32, RunInfo)> =
            runs.iter().map(|((level, n), record)| (*level, *n, record.info())).collect();
        drop(runs);
        let bytes = hint_owner(self.identity, open.id).seal_record(HINT.as_bytes(), &list);
        let path = self.path(open.id);
        // Without it the next start is slower, nothing else; a torn one does not match its checksum.
        let written =
            fs::write(path.join(HINT_NEW), bytes).and_then(|()| fs::rename(path.join(HINT_NEW), path.join(HINT)));
        drop(written);
        Ok(())
    }

    /// Counts the attempt and clears away what an earlier one left.
    fn begin_attempt(&self, open: &Opened, run: RunId) -> Result<u32, IndexError> {
        let key = page::attempt_key(run);
        let before = open.call(|db| db.get(key))?;
        let before = before.and_then(|bytes| bytes.as_ref().try_into().ok()).map_or(0, u32::from_be_bytes);
        if before > 0 {
            loop {
                let left = open.call(|db| {
                    db.scan_prefix(page::page_prefix(run)).keys().take(256).collect::<Result<Vec<_>, _>>()
                })?;
                if left.is_empty() {
                    break;
                }
                for key in left {
                    open.call(|db| db.remove(key))?;
                }
            }
        }
        let stamp = before.wrapping_add(1);
        open.call(|db| db.insert(key, &stamp.to_be_bytes()))?;
        Ok(stamp)
    }
}

impl Slot {
    fn new(id: GenerationId) -> Self {
        Self { id, last_use: AtomicU64::new(0), state: Mutex::default() }
    }
}

impl IndexStore for SledStore {
    fn put_run(
        &self,
        run: RunId,
        tag: u64,
        pieces: &mut dyn Iterator<Item = Result<Piece, IndexError>>,
    ) -> Result<RunInfo, IndexError> {
        let generation = self.shape.generation(run);
        let open = self.opened(generation, true)?.ok_or(IndexError::NoRun(run))?;
        let info = self.write_run(&open, run, tag, pieces)?;
        if let Some(slot) = self.slot(generation, false)
            && let Some(known) = &mut lock(&slot.state).known
        {
            known.insert((run.level, run.ordinal), info);
        }
        if run == self.shape.map(generation) || run == self.shape.top(generation) {
            self.close_generation(&open)?;
        }
        Ok(info)
    }

    fn run(&self, run: RunId) -> Option<RunInfo> {
        let slot = self.slot(self.shape.generation(run), false)?;
        let state = lock(&slot.state);
        let damaged = state.open.as_ref().is_some_and(|open| open.damaged.load(Ordering::Acquire));
        if let Some(known) = &state.known
            && !damaged
        {
            return known.get(&(run.level, run.ordinal)).copied();
        }
        drop(state);
        // Not opened yet, or condemned: opening decides.
        let open = self.opened(slot.id, false).ok()??;
        open.record(run).map(|record| record.info())
    }

    fn lookup(&self, run: RunId, volume: VolumeId, extent: Extent, out: &mut Vec<Piece>) -> Result<(), IndexError> {
        let open = self.opened(self.shape.generation(run), false)?.ok_or(IndexError::NoRun(run))?;
        let record = open.record(run).ok_or(IndexError::NoRun(run))?;
        if record.filter.as_ref().is_some_and(|filter| !filter.may_meet(volume, extent)) {
            return Ok(());
        }
        out.extend(open.lookup(run, &record, volume, extent).map_err(|why| open.fail(why))?);
        Ok(())
    }

    fn run_iter(&self, run: RunId) -> Result<RunIter<'_>, IndexError> {
        let open = self.opened(self.shape.generation(run), false)?.ok_or(IndexError::NoRun(run))?;
        let record = open.record(run).ok_or(IndexError::NoRun(run))?;
        let next = record.ends.map(|(first, _)| first);
        Ok(Box::new(Walk { store: self, run, stamp: record.stamp, next, seq: 0, pieces: Vec::new().into_iter() }))
    }

    fn generations(&self) -> Vec<GenerationId> {
        lock(&self.slots).keys().copied().collect()
    }

    fn drop_generation(&self, generation: GenerationId) -> Result<(), IndexError> {
        let Some(slot) = self.slot(generation, false) else { return Ok(()) };
        let mut state = lock(&slot.state);
        if state.gone {
            return Ok(());
        }
        state.open = None;
        state.known = None;
        let gone = self.dir.join(format!("{}{GONE}", dir_name(generation)));
        let removed = match fs::rename(self.path(generation), &gone) {
            Ok(()) => fs::remove_dir_all(&gone),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        };
        removed.map_err(|e| IndexError::Unavailable { generation, why: Damage::Directory(e) })?;
        state.gone = true;
        lock(&self.slots).remove(&generation);
        Ok(())
    }

    fn damaged(&self) -> u32 {
        self.set_aside.load(Ordering::Relaxed)
    }

    fn bytes(&self) -> u64 {
        // What cannot be read now counts nothing: this is a figure for people.
        let mut total = 0;
        let mut folders = vec![self.dir.clone()];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                    Ok(meta) => total += meta.len(),
                    Err(_) => {}
                }
            }
        }
        total
    }

    fn flush(&self) -> Result<(), IndexError> {
        let slots: Vec<Arc<Slot>> = lock(&self.slots).values().cloned().collect();
        for slot in slots {
            let open = lock(&slot.state).open.clone();
            if let Some(open) = open {
                open.call(|db| db.flush())?;
            }
        }
        Ok(())
    }
}

/// Walks a run page by page; holds no handle between two, so that a generation can be closed or set aside meanwhile.
struct Walk<'a> {
    store: &'a SledStore,
    run: RunId,
    stamp: u32,
    next: Option<Place>,
    seq: u32,
    pieces: std::vec::IntoIter<Piece>,
}

impl Walk<'_> {
    fn turn(&mut self, at: Place) -> Result<(), IndexError> {
        let open = self.store.opened(self.store.shape.generation(self.run), false)?;
        let open = open.ok_or(IndexError::NoRun(self.run))?;
        let record = open.record(self.run).filter(|record| record.stamp == self.stamp);
        let record = record.ok_or(IndexError::NoRun(self.run))?;
        let page = open.page(self.run, &record, at, self.seq).map_err(|why| open.fail(why))?;
        self.seq += 1;
        self.next = page.next;
        self.pieces = page.pieces.into_iter();
        Ok(())
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Piece, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.pieces.next() {
                return Some(Ok(piece));
            }
            let at = self.next.take()?;
            if let Err(e) = self.turn(at) {
                return Some(Err(e));
            }
        }
    }
}

fn is_lock_error(e: &::sled::Error) -> bool {
    matches!(e, ::sled::Error::Io(e) if e.to_string().contains("could not acquire lock"))
}

const HINT: &str = "holdfast.runs";
const HINT_NEW: &str = "holdfast.runs.new";

fn hint_owner(identity: [u8; 16], id: GenerationId) -> Owner {
    Owner { identity, run: RunId::new(id.timeline, u8::MAX, id.number) }
}

fn read_hint(dir: &Path, identity: &[u8; 16], id: GenerationId) -> Option<BTreeMap<(u8, u32), RunInfo>> {
    let bytes = fs::read(dir.join(HINT)).ok()?;
    let list: Vec<(u8, u32, RunInfo)> = hint_owner(*identity, id).unseal_record(HINT.as_bytes(), &bytes)?;
    Some(list.into_iter().map(|(level, n, info)| ((level, n), info)).collect())
}

const BAD: &str = ".bad";
const GONE: &str = ".gone";

fn dir_name(id: GenerationId) -> String {
    format!("g{}-{}", id.timeline, id.number)
}

fn parse_dir_name(name: &str) -> Option<GenerationId> {
    let (timeline, number) = name.strip_prefix('g')?.split_once('-')?;
    let id = GenerationId { timeline: TimelineId(timeline.parse().ok()?), number: number.parse().ok()? };
    (dir_name(id) == name).then_some(id)
}
