//! Where the sectors of a view lie, as far as they have been asked for.
//!
//! A view never changes, so what was found once stays right: an answer is a record, zeroes or the base, for each stretch of a
//! chunk of [`CHUNK_SECTORS`]. Only a fold moves data, from segments into the base; what was found before it still says the
//! same but may name a file that is gone. So an answer found above another floor is not used, and one that names a file that
//! is gone in spite of that is forgotten and asked for again.
//!
//! # Limits
//!
//! One cache for all views of a journal, [`PLANS_BYTES_MAX`]; the least recently used goes first, so a closed view's answers
//! make room by themselves.

use crate::{cache::Lru, payload::Place};
use model::{Extent, Lsn, SECTOR, TimelineId, VolumeId};
use std::sync::Arc;

/// 256 KiB: a page of the index holds the places of about as much, when every 4 KiB lie somewhere else.
pub const CHUNK_SECTORS: u64 = (256 << 10) / SECTOR;
/// Places of 3 GiB whose every 4 KiB lie somewhere else, of much more otherwise.
pub const PLANS_BYTES_MAX: usize = 32 << 20;
/// What an entry takes beside its parts.
const ENTRY: usize = 192;

/// Where the data of a stretch comes from.
#[derive(Clone)]
pub enum From {
    Record(Place),
    Zero,
    Base,
}

/// A stretch and where its data comes from.
#[derive(Clone)]
pub struct Part {
    pub extent: Extent,
    pub from: From,
}

impl Part {
    /// What of it lies in `extent`.
    fn clip(&self, extent: &Extent) -> Option<Part> {
        let clipped = self.extent.intersect(extent)?;
        let mut from = self.from.clone();
        if let From::Record(place) = &mut from {
            place.skip += clipped.start() - self.extent.start();
        }
        Some(Part { extent: clipped, from })
    }
}

/// What of sorted parts lies in `extent`.
pub fn clip(parts: &[Part], extent: &Extent) -> Vec<Part> {
    let first = parts.partition_point(|part| part.extent.end() <= extent.start());
    parts[first..].iter().map_while(|part| part.clip(extent)).collect()
}

/// A volume as of a moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Of {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub volume: VolumeId,
}

#[derive(Clone)]
struct Chunk {
    floor: Lsn,
    parts: Arc<[Part]>,
}

pub struct Plans {
    chunks: Lru<(Of, u64), Chunk>,
}

/// The chunks an extent touches.
fn chunks(extent: &Extent) -> std::ops::Range<u64> {
    extent.start() / CHUNK_SECTORS..extent.end().div_ceil(CHUNK_SECTORS)
}

/// The extent, widened to whole chunks.
pub fn whole_chunks(extent: &Extent) -> Extent {
    let chunks = chunks(extent);
    Extent::between(chunks.start * CHUNK_SECTORS, chunks.end * CHUNK_SECTORS)
}

impl Plans {
    pub fn new(bytes_max: usize) -> Self {
        Self { chunks: Lru::new(bytes_max) }
    }
    /// All parts of the extent, if they were found above this floor.
    pub fn get(&self, of: Of, floor: Lsn, extent: &Extent) -> Option<Vec<Part>> {
        let mut parts = Vec::new();
        for number in chunks(extent) {
            let chunk = self.chunks.get(&(of, number)).filter(|chunk| chunk.floor == floor)?;
            parts.append(&mut clip(&chunk.parts, extent));
        }
        Some(parts)
    }
    /// Keeps the parts of an extent of whole chunks, found above this floor.
    pub fn put(&self, of: Of, floor: Lsn, extent: &Extent, parts: &[Part]) {
        for number in chunks(extent) {
            let parts = clip(parts, &Extent::new(number * CHUNK_SECTORS, CHUNK_SECTORS));
            let cost = ENTRY + parts.len() * size_of::<Part>();
            self.chunks.put((of, number), Chunk { floor, parts: parts.into() }, cost);
        }
    }
    pub fn forget(&self, of: Of, extent: &Extent) {
        chunks(extent).for_each(|number| self.chunks.remove(&(of, number)));
    }
}
