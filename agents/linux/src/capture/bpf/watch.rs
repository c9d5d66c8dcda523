//! `bpf-watch`: where a device of the device mapper was written, exactly, whoever is there to ask.
//!
//! It is what lets a mirror come back without everything being compared: its programs stay in the kernel while the agent is away,
//! upgraded, killed, and mark every bio that is handed to the volume (one byte per 64 KiB). They copy nothing and send nothing.
//!
//! **What is promised.** [`Watch::marks`] answers every place written since [`Watch::add`], except those forgotten by
//! [`Watch::forget_closed`]; or that it is not known ([`Unknown`]), never less. A mark may be one too many.
//!
//! **Forgetting** must not lose a write that is marked and not yet safe elsewhere. Marks carry the number of an epoch:
//!
//! ```text
//!  open ──close()──▶ closed: new writes mark with the next number
//!                      │ drained(): every write of older epochs has completed
//!                      ▼ the caller makes sure that what completed is safe
//!                    forget_closed(): marks of older epochs are cleared; a place written again since keeps its mark
//! ```
//!
//! *Why `drained` is right.* A program counts a bio before it marks. `close` returns when no program runs any more that knew the old
//! number (the kernel waits for that when a map of maps is changed). Completions are read before issues: equal sums mean that every
//! bio counted by then had completed before. A bio whose completion no program saw (see [`super`]) would keep the sums apart for ever: it is
//! written off when the device itself has had nothing under way at a look [`REST_MS`] after the close.
//!
//! **When it is not known:** the volume's device was made anew meanwhile (told by its sequence number, since 5.15; before, the caller must
//! know otherwise), a program was not run because it ran on that CPU already, one bio covered more than 256 MiB, or something
//! other than the device mapper is stacked on the volume (md passes bios on that no tracepoint shows).
//!
//! **Pins.** A directory of its own beside that of `bpf-rq` ([`dir_beside`]); `meta` says whether it is whole and of our layout. Another
//! layout, or anything that cannot be opened, is taken out and made anew: everything is compared once then. A reboot takes it all away.
//!
//! **Limits.** 64 volumes, 1 PiB in all; x86_64; kernels with BTF; needs what `bpf-rq` needs, but no ring and no calibration.

use super::{
    Ebpf, EbpfLoader, RawTracePoint, attach, bio_places, btf, facts, key_of, lift_memlock, map_error, missed,
    pins::Pins, ring::Mapping, take_map,
};
use crate::capture::{CaptureError, DevNo};
use aya::{
    Pod,
    maps::{Array, ArrayOfMaps, HashMap as BpfHashMap, MapData, PerCpuArray},
};
use model::{Extent, ExtentSet, MonoTime};
use std::{
    collections::HashMap,
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU8, Ordering},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("HOLDFAST_WATCH_OBJECT"));

/// Grows with every change of what pinned programs and another version of the agent would understand differently.
const LAYOUT: u64 = 0x4846_5741_5443_0001;
const META_LAYOUT: u32 = 0;
const META_COMPLETE: u32 = 1;
const MAX_WATCHED: usize = 64;
const EPOCHS: usize = 4;
const EPOCH_MIN: u8 = 4;
const GRANULE_SECTORS: u64 = 128;
const CELLS_PER_CHUNK: u32 = 65536;
const GRANULES_PER_CHUNK: u64 = CELLS_PER_CHUNK as u64 * 8;
const CHUNKS: u32 = 32768;
/// After a close, before a device without anything under way says that all earlier writes are over.
pub const REST_MS: u64 = 2_000;

const MAPS: [&str; 4] = ["watched", "dirty", "counts", "meta"];
/// Completions first: a write between the two attachments is at worst counted as done without having been counted as queued, which does not
/// happen, because only what was queued is looked for.
const PROGRAMS: [(&str, &str, &str); 2] = [
    ("hf_watch_complete", "block_bio_complete", "link-watch-complete"),
    ("hf_watch_queue", "block_bio_queue", "link-watch-queue"),
];

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct WatchedValue {
    slot: u32,
    epoch: u32,
    first_chunk: u32,
    pad: u32,
    granules: u64,
    sectors: u64,
    /// The device's sequence number; 0 where the kernel has none.
    instance: u64,
    /// Ranges too long to be marked that were counted before this volume's map was whole.
    whole: u64,
    /// Runs missed by the program before this volume's map was whole.
    missed: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Counts {
    queued: [u64; EPOCHS],
    done: [u64; EPOCHS],
    whole: u64,
}

// SAFETY: a run of u32 pairs and u64 without padding, any bytes are a value.
unsafe impl Pod for WatchedValue {}
// SAFETY: as above.
unsafe impl Pod for Counts {}

/// Why it is not known where a volume was written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unknown {
    #[error("it was not watched")]
    NotWatched,
    #[error("it is of another size than the one that was watched")]
    Resized,
    #[error("its device was made anew meanwhile")]
    AnotherDevice,
    #[error("this kernel does not tell whether its device was made anew meanwhile")]
    PerhapsAnother,
    #[error("the kernel did not run the watching program {times} times")]
    Missed { times: u64 },
    #[error("ranges were written that are too long to be marked")]
    TooLong,
    #[error("{holder} lies on it, whose writes cannot be watched")]
    Holder { holder: String },
}

struct Held {
    value: WatchedValue,
    chunks: Vec<Mapping>,
    /// When the last epoch was closed.
    closed: Option<MonoTime>,
    /// Long ranges counted when it was.
    whole_closed: u64,
    /// Writes of each epoch that were written off.
    written_off: [u64; EPOCHS],
}

impl Held {
    fn cell(&self, granule: u64) -> Option<&AtomicU8> {
        let chunk = self.chunks.get(usize::try_from(granule / GRANULES_PER_CHUNK).ok()?)?;
        let at = (granule % GRANULES_PER_CHUNK) as usize;
        // SAFETY: inside the mapping (just checked), which lives as long as `self`; kernel and agent access single bytes of it, or the
        // kernel eight at once.
        (at < chunk.len()).then(|| unsafe { AtomicU8::from_ptr(chunk.as_ptr().add(at)) })
    }

    /// Calls `f` for every granule with a mark; eight at a time, nearly all are zero.
    fn each_mark(&self, mut f: impl FnMut(u64, u8)) {
        for (i, chunk) in self.chunks.iter().enumerate() {
            let first = i as u64 * GRANULES_PER_CHUNK;
            let cells = self.value.granules.saturating_sub(first).min(GRANULES_PER_CHUNK).div_ceil(8);
            for cell in 0..cells as usize {
                // SAFETY: inside the mapping and aligned; a volatile read of shared memory, whose answer is a hint: who clears a byte
                // does it atomically.
                let word = unsafe { chunk.as_ptr().cast::<u64>().add(cell).read_volatile() };
                if word != 0 {
                    for (byte, mark) in word.to_ne_bytes().into_iter().enumerate().filter(|(_, m)| *m != 0) {
                        f(first + cell as u64 * 8 + byte as u64, mark);
                    }
                }
            }
        }
    }
}

/// The watch over this host's mirrored volumes.
pub struct Watch {
    pins: Pins,
    map: BpfHashMap<MapData, u64, WatchedValue>,
    dirty: ArrayOfMaps<MapData, Array<MapData, u64>>,
    counts: PerCpuArray<MapData, Counts>,
    held: HashMap<u64, Held>,
    queue: RawTracePoint,
}

/// Where the watch is pinned, beside the pins of `bpf-rq`.
pub fn dir_beside(pins: &Path) -> PathBuf {
    let mut name = pins.file_name().unwrap_or_default().to_owned();
    name.push("-watch");
    pins.with_file_name(name)
}

/// Takes the watch out of the kernel; nothing happens when there is none.
pub fn remove(dir: &Path) -> Result<(), CaptureError> {
    match Pins::existing(dir) {
        None => Ok(()),
        Some(pins) => {
            clear(&pins)?;
            pins.remove()
        }
    }
}

fn clear(pins: &Pins) -> Result<(), CaptureError> {
    let links = PROGRAMS.iter().map(|(_, _, link)| *link);
    links.chain(PROGRAMS.iter().map(|(program, _, _)| *program)).chain(MAPS).try_for_each(|n| pins.remove_file(n))
}

fn granules_of(sectors: u64) -> u64 {
    sectors.div_ceil(GRANULE_SECTORS)
}

fn chunks_of(sectors: u64) -> u64 {
    granules_of(sectors).div_ceil(GRANULES_PER_CHUNK)
}

fn next_epoch(epoch: u32) -> u32 {
    if epoch >= u32::from(u8::MAX) { u32::from(EPOCH_MIN) } else { epoch + 1 }
}

fn instance(disk: DevNo) -> u64 {
    let text = fs::read_to_string(format!("/sys/dev/block/{disk}/diskseq")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Something on the volume that may hand on bios which no tracepoint shows.
fn foreign_holder(disk: DevNo) -> Option<String> {
    let holders = fs::read_dir(format!("/sys/dev/block/{disk}/holders")).into_iter().flatten().flatten();
    holders.map(|h| h.file_name().to_string_lossy().into_owned()).find(|name| !name.starts_with("dm-"))
}

/// Whether the device has no write under way. Unknown counts as no.
fn at_rest(disk: DevNo) -> bool {
    let text = fs::read_to_string(format!("/sys/dev/block/{disk}/inflight")).unwrap_or_default();
    text.split_whitespace().nth(1) == Some("0")
}

/// Which arguments of the tracepoints are the bio.
fn places(facts: &btf::Facts) -> Result<(u32, u32), CaptureError> {
    bio_places(facts).map_err(|what| CaptureError::Feature { what })
}

impl Watch {
    /// Goes on with the programs that are in the kernel, or puts them there.
    pub fn open(dir: &Path) -> Result<Self, CaptureError> {
        let pins = Pins::new(dir)?;
        match Self::resume(Pins::new(dir)?) {
            Ok(Some(watch)) => return Ok(watch),
            Ok(None) => {}
            Err(e) => {
                let why = crate::error_chain(&e);
                tracing::warn!(%why, "the watch over mirrored volumes is made anew");
            }
        }
        clear(&pins)?;
        Self::begin(&pins)?;
        Self::open_pins(pins)
    }

    /// What is pinned, if it is whole and of our layout.
    fn resume(pins: Pins) -> Result<Option<Self>, CaptureError> {
        let names = PROGRAMS.iter().flat_map(|(program, _, link)| [*program, *link]).chain(MAPS);
        if names.into_iter().any(|name| !pins.path(name).exists()) {
            return Ok(None);
        }
        let meta: Array<MapData, u64> = Array::try_from(pins.open_map("meta")?).map_err(map_error("meta"))?;
        let cell = |i: u32| meta.get(&i, 0).map_err(map_error("meta"));
        if cell(META_LAYOUT)? != LAYOUT || cell(META_COMPLETE)? != 1 {
            return Ok(None);
        }
        Self::open_pins(pins).map(Some)
    }

    fn begin(pins: &Pins) -> Result<(), CaptureError> {
        if OBJECT.is_empty() {
            return Err(CaptureError::NotBuiltIn);
        }
        if !cfg!(target_arch = "x86_64") {
            return Err(CaptureError::Architecture { arch: std::env::consts::ARCH });
        }
        lift_memlock();
        let (bio_arg, bio_done_arg) = places(&facts()?)?;
        let mut ebpf: Ebpf = EbpfLoader::new()
            .override_global("bio_arg", &bio_arg, true)
            .override_global("bio_done_arg", &bio_done_arg, true)
            .load(OBJECT)
            .map_err(|e| CaptureError::Load(Box::new(e)))?;
        for name in MAPS {
            let missing = CaptureError::Missing { program: "the watching object", what: name };
            pins.pin_map(name, ebpf.map(name).ok_or(missing)?)?;
        }
        for (program, tracepoint, link) in PROGRAMS {
            pins.pin_link_at(link, attach(&mut ebpf, program, tracepoint)?)?;
            pins.pin_program(program, super::loaded(&mut ebpf, program)?)?;
        }
        let mut meta: Array<MapData, u64> = Array::try_from(take_map(&mut ebpf, "meta")?).map_err(map_error("meta"))?;
        meta.set(META_LAYOUT, LAYOUT, 0).map_err(map_error("meta"))?;
        // Last: from here on the pins are whole.
        meta.set(META_COMPLETE, 1, 0).map_err(map_error("meta"))
    }

    fn open_pins(pins: Pins) -> Result<Self, CaptureError> {
        let map: BpfHashMap<MapData, u64, WatchedValue> =
            BpfHashMap::try_from(pins.open_map("watched")?).map_err(map_error("watched"))?;
        let dirty = ArrayOfMaps::try_from(pins.open_map("dirty")?).map_err(map_error("dirty"))?;
        let counts = PerCpuArray::try_from(pins.open_map("counts")?).map_err(map_error("counts"))?;
        let queue = pins.open_program("hf_watch_queue")?;
        let values: Vec<(u64, WatchedValue)> = map.iter().collect::<Result<_, _>>().map_err(map_error("watched"))?;
        let mut this = Self { pins, map, dirty, counts, held: HashMap::new(), queue };
        for (key, value) in values {
            let chunks = this.map_chunks(&value)?;
            let held = Held { value, chunks, closed: None, whole_closed: 0, written_off: [0; EPOCHS] };
            this.held.insert(key, held);
        }
        Ok(this)
    }

    fn map_chunks(&self, value: &WatchedValue) -> Result<Vec<Mapping>, CaptureError> {
        let count = chunks_of(value.sectors).min(u64::from(CHUNKS)) as u32;
        (value.first_chunk..value.first_chunk.saturating_add(count))
            .map(|i| {
                let inner = super::pins::inner_map(&self.pins, "dirty", i)?;
                let path = || self.pins.path("dirty").display().to_string();
                Mapping::new(inner.fd().as_fd(), 0, CELLS_PER_CHUNK as usize * 8, true)
                    .map_err(|source| CaptureError::File { what: "map the marks", path: path(), source })
            })
            .collect()
    }

    fn missed(&self) -> u64 {
        missed(&self.queue).unwrap_or(0)
    }

    fn sums(&self, slot: u32) -> Result<Counts, CaptureError> {
        let mut sum = Counts::default();
        for one in self.counts.get(&slot, 0).map_err(map_error("counts"))?.iter() {
            for i in 0..EPOCHS {
                sum.queued[i] += one.queued[i];
                sum.done[i] += one.done[i];
            }
            sum.whole += one.whole;
        }
        Ok(sum)
    }

    /// Whether [`marks`](Self::marks) would answer for a device now. `same_device`: the caller knows that the device was not made anew since.
    pub fn knows(&self, disk: DevNo, sectors: u64, same_device: bool) -> Result<Result<(), Unknown>, CaptureError> {
        let Some(held) = self.held.get(&key_of(disk)) else { return Ok(Err(Unknown::NotWatched)) };
        let value = &held.value;
        if value.sectors != sectors {
            return Ok(Err(Unknown::Resized));
        }
        match (value.instance, instance(disk)) {
            (0, _) | (_, 0) if !same_device => return Ok(Err(Unknown::PerhapsAnother)),
            (had, has) if had != has => return Ok(Err(Unknown::AnotherDevice)),
            _ => {}
        }
        let times = self.missed().saturating_sub(value.missed);
        if times > 0 {
            return Ok(Err(Unknown::Missed { times }));
        }
        if self.sums(value.slot)?.whole != value.whole {
            return Ok(Err(Unknown::TooLong));
        }
        Ok(foreign_holder(disk).map_or(Ok(()), |holder| Err(Unknown::Holder { holder })))
    }

    /// Every place of the device that was written and not forgotten, of writes that had been handed to it before this call.
    pub fn marks(&self, disk: DevNo) -> Vec<Extent> {
        let Some(held) = self.held.get(&key_of(disk)) else { return Vec::new() };
        let mut set = ExtentSet::new();
        held.each_mark(|granule, _| {
            let start = granule * GRANULE_SECTORS;
            set.insert(Extent::between(start, (start + GRANULE_SECTORS).min(held.value.sectors)));
        });
        set.iter().collect()
    }

    /// Begins to watch a device: what is written from when this returns is marked. What was before is not known.
    pub fn add(&mut self, disk: DevNo, sectors: u64) -> Result<(), CaptureError> {
        self.drop_device(disk)?;
        if self.held.len() >= MAX_WATCHED {
            return Err(CaptureError::TooManyDisks { asked: self.held.len() + 1, max: MAX_WATCHED });
        }
        let full = || CaptureError::DirtyMapFull {
            max_tib: (u64::from(CHUNKS) * GRANULES_PER_CHUNK * GRANULE_SECTORS * 512) >> 40,
        };
        let count = u32::try_from(chunks_of(sectors)).ok().filter(|c| *c <= CHUNKS).ok_or_else(full)?;
        let first_chunk = self.free_chunks(count).ok_or_else(full)?;
        let slots: Vec<u32> = self.held.values().map(|h| h.value.slot).collect();
        let free = (0..MAX_WATCHED as u32).find(|s| !slots.contains(s));
        let slot = free.ok_or(CaptureError::TooManyDisks { asked: slots.len() + 1, max: MAX_WATCHED })?;
        for i in first_chunk..first_chunk + count {
            let chunk: Array<MapData, u64> = Array::create(CELLS_PER_CHUNK, 1 << 10).map_err(map_error("dirty"))?;
            self.dirty.set(i, &chunk, 0).map_err(map_error("dirty"))?;
        }
        let before = self.sums(slot)?;
        let value = WatchedValue {
            slot,
            epoch: u32::from(EPOCH_MIN),
            first_chunk,
            pad: 0,
            granules: granules_of(sectors),
            sectors,
            instance: instance(disk),
            whole: before.whole,
            missed: self.missed(),
        };
        let chunks = self.map_chunks(&value)?;
        self.map.insert(key_of(disk), value, 0).map_err(map_error("watched"))?;
        // Whoever had the slot before may have left writes that are never counted as done; nothing of this device is counted yet.
        let written_off = std::array::from_fn(|i| before.queued[i].saturating_sub(before.done[i]));
        let held = Held { value, chunks, closed: None, whole_closed: 0, written_off };
        self.held.insert(key_of(disk), held);
        Ok(())
    }

    /// The first run of `count` unused places in the outer map.
    fn free_chunks(&self, count: u32) -> Option<u32> {
        let mut used: Vec<(u32, u32)> =
            self.held.values().map(|h| (h.value.first_chunk, h.value.first_chunk + h.chunks.len() as u32)).collect();
        used.sort_unstable();
        let mut at = 0;
        for (start, end) in used {
            if start >= at + count {
                break;
            }
            at = at.max(end);
        }
        (at + count <= CHUNKS).then_some(at)
    }

    pub fn drop_device(&mut self, disk: DevNo) -> Result<(), CaptureError> {
        let key = key_of(disk);
        if self.held.remove(&key).is_none() {
            return Ok(());
        }
        self.map.remove(&key).map_err(map_error("watched"))
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Writes from now on mark with another number than all before.
    pub fn close(&mut self, disk: DevNo, now: MonoTime) -> Result<(), CaptureError> {
        let Some(held) = self.held.get_mut(&key_of(disk)) else { return Ok(()) };
        let slot = held.value.slot;
        let mut value = held.value;
        value.epoch = next_epoch(value.epoch);
        self.map.insert(key_of(disk), value, 0).map_err(map_error("watched"))?;
        held.value = value;
        held.closed = Some(now);
        // No program may run any more that knows the old number; the kernel waits for that when a map of maps is changed.
        let same = self.dirty.get(&value.first_chunk, 0).map_err(map_error("dirty"))?;
        self.dirty.set(value.first_chunk, &same, 0).map_err(map_error("dirty"))?;
        let whole = self.sums(slot)?.whole;
        if let Some(held) = self.held.get_mut(&key_of(disk)) {
            held.whole_closed = whole;
        }
        Ok(())
    }

    /// Whether every write that marked before the last [`close`](Self::close) has completed.
    pub fn drained(&mut self, disk: DevNo, now: MonoTime) -> Result<bool, CaptureError> {
        let Some(held) = self.held.get(&key_of(disk)) else { return Ok(false) };
        let Some(closed) = held.closed else { return Ok(false) };
        let (slot, current) = (held.value.slot, held.value.epoch as usize % EPOCHS);
        let rests = now.ms_since(closed) >= REST_MS && at_rest(disk);
        // In this order.
        let done = self.sums(slot)?.done;
        let queued = self.sums(slot)?.queued;
        let Some(held) = self.held.get_mut(&key_of(disk)) else { return Ok(false) };
        let mut all = true;
        for i in (0..EPOCHS).filter(|i| *i != current) {
            let open = queued[i].saturating_sub(done[i]);
            if rests {
                held.written_off[i] = open;
            }
            all &= open == held.written_off[i];
        }
        Ok(all)
    }

    /// Forgets the marks from before the last [`close`](Self::close). Only after [`drained`](Self::drained) has said yes, and once what those
    /// writes wrote is safe. Answers how many were forgotten.
    pub fn forget_closed(&mut self, disk: DevNo) -> Result<u64, CaptureError> {
        let Some(held) = self.held.get_mut(&key_of(disk)) else { return Ok(0) };
        if held.closed.take().is_none() {
            return Ok(0);
        }
        let mut old = Vec::new();
        held.each_mark(|granule, mark| {
            if u32::from(mark) != held.value.epoch {
                old.push((granule, mark));
            }
        });
        let mut forgotten = 0;
        for (granule, mark) in old {
            // Marked again meanwhile: stays.
            if let Some(cell) = held.cell(granule) {
                forgotten += u64::from(cell.compare_exchange(mark, 0, Ordering::AcqRel, Ordering::Acquire).is_ok());
            }
        }
        if held.value.whole != held.whole_closed {
            held.value.whole = held.whole_closed;
            let value = held.value;
            self.map.insert(key_of(disk), value, 0).map_err(map_error("watched"))?;
        }
        Ok(forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_the_kernel_half() {
        assert_eq!((size_of::<WatchedValue>(), size_of::<Counts>()), (16 + 8 * 5, 8 * (2 * EPOCHS + 1)));
    }

    #[test]
    fn epochs_go_round_without_zero_and_without_a_jump_in_their_counts() {
        let mut epoch = u32::from(EPOCH_MIN);
        for _ in 0..1000 {
            let next = next_epoch(epoch);
            assert!((u32::from(EPOCH_MIN)..=255).contains(&next));
            assert_eq!((epoch as usize + 1) % EPOCHS, next as usize % EPOCHS);
            epoch = next;
        }
    }

    #[test]
    fn the_watch_has_a_place_of_its_own() {
        assert_eq!(dir_beside(Path::new("/sys/fs/bpf/holdfast")), Path::new("/sys/fs/bpf/holdfast-watch"));
    }
}
