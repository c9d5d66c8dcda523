//! The data of records, in the parts that readers ask for.
//!
//! A record has one checksum over its whole payload (up to 128 KiB), and a reader of a view wants 4 KiB of it. So the first read
//! of a part reads and checks the record whole and keeps a checksum of each of its [`SUM_BLOCK`]s; later parts read and check
//! their blocks only. What is kept is the sums and not the data: the data stays in the page cache, where there is room for it, and
//! **every byte handed out was checked after it was read**, however often it was read before. Compressed records have no blocks on
//! the disk: they are kept decoded.
//!
//! # Limits
//!
//! [`SUMS_BYTES_MAX`] of sums and the bound given to [`Payloads::new`] of decoded payloads, the least recently used go first.
//!
//! Tests: `tests/reads.rs`, bit for bit against an oracle, with damage before and after the sums were kept.

use crate::{
    Corruption, Damage, ReadError,
    cache::Lru,
    format::{self, RECORD_HEADER},
    segment::{self, Segment},
    shared::Shared,
};
use model::{Codec, Extent, Record, RecordKind, SECTOR, VolumeId};
use std::{ops::Range, sync::Arc};

/// One page of the page cache, and what most clients read at a time.
const SUM_BLOCK: usize = 4096;
/// About 320 bytes for a record of 128 KiB: sums of some 6 GiB of data that is read in parts.
const SUMS_BYTES_MAX: usize = 16 << 20;
/// What an entry takes beside the sums: the maps' slots and the counted allocation.
const SUMS_ENTRY: usize = 192;
/// Records that follow each other in the file are read together up to this: more would only delay the first of them.
const RUN_BYTES_MAX: u64 = 256 << 10;
/// Bytes of others between two records read together: less than what a second system call costs.
const RUN_GAP_MAX: u64 = 4096;

/// Segment (tag and ordinal; a tag alone is a hash), offset of the record.
type Key = (u64, u32, u32);

/// Where sectors lie: from the `skip`th sector of a record on.
#[derive(Clone)]
pub struct Place {
    pub segment: Arc<Segment>,
    pub offset: u32,
    pub skip: u64,
}

impl Place {
    fn key(&self) -> Key {
        (self.segment.tag, self.segment.header.ordinal, self.offset)
    }
    /// Where the payload begins in the file.
    fn payload(&self) -> u64 {
        u64::from(self.offset) + RECORD_HEADER as u64
    }
}

/// What a record stands for.
#[derive(Clone, Copy)]
struct Covers {
    volume: VolumeId,
    extent: Extent,
}

impl Covers {
    fn of(record: &Record) -> Self {
        Self { volume: record.volume, extent: record.extent }
    }
    fn holds(&self, volume: VolumeId, want: Extent, skip: u64) -> bool {
        self.volume == volume
            && self.extent.start().checked_add(skip) == Some(want.start())
            && self.extent.end() >= want.end()
    }
}

/// A compressed record's data.
#[derive(Clone)]
struct Decoded {
    covers: Covers,
    data: Arc<Vec<u8>>,
}

/// Checksums of an uncompressed payload's blocks; the last one may be short.
struct Sums {
    covers: Covers,
    blocks: Box<[u32]>,
}

impl Sums {
    fn new(covers: Covers, payload: &[u8]) -> Self {
        Self { covers, blocks: payload.chunks(SUM_BLOCK).map(crc32fast::hash).collect() }
    }
    /// The payload's bytes that must be read to check these.
    fn around(&self, bytes: &Range<usize>) -> Range<usize> {
        let end = bytes.end.next_multiple_of(SUM_BLOCK).min(self.covers.extent.bytes() as usize);
        bytes.start / SUM_BLOCK * SUM_BLOCK..end
    }
    /// `bytes` begin at a block.
    fn match_at(&self, start: usize, bytes: &[u8]) -> bool {
        let first = start / SUM_BLOCK;
        let blocks = bytes.chunks(SUM_BLOCK);
        self.blocks
            .get(first..first + blocks.len())
            .is_some_and(|sums| blocks.zip(sums).all(|(block, sum)| crc32fast::hash(block) == *sum))
    }
}

/// Reads parts of records, with what it remembers of them.
pub struct Payloads {
    decoded: Lru<Key, Decoded>,
    sums: Lru<Key, Arc<Sums>>,
}

/// One of several records that are read together.
pub struct Piece<'a> {
    pub place: &'a Place,
    pub extent: Extent,
    pub out: &'a mut [u8],
}

impl Payloads {
    pub fn new(decoded_bytes_max: usize) -> Self {
        Self { decoded: Lru::new(decoded_bytes_max), sums: Lru::new(SUMS_BYTES_MAX) }
    }

    /// Fills `out` with the sectors `want` of the volume, which lie at `place`.
    pub fn read(
        &self,
        shared: &Shared,
        place: &Place,
        volume: VolumeId,
        want: Extent,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let from = (place.skip * SECTOR) as usize;
        if let Some(sums) = self.sums.get(&place.key())
            && sums.covers.holds(volume, want, place.skip)
        {
            return self.read_blocks(shared, place, &sums, from, out);
        }
        if let Some(decoded) = self.decoded.get(&place.key())
            && decoded.covers.holds(volume, want, place.skip)
        {
            out.copy_from_slice(&decoded.data[from..from + out.len()]);
            return Ok(());
        }
        if place.skip == 0 && Self::read_whole(shared, place, volume, want, out)? {
            return Ok(());
        }
        self.read_part(shared, place, volume, want, from, out)
    }

    /// The record is just what is wanted: straight into `out`. False when it is another one, or damaged: the way that looks
    /// at it whole says which.
    fn read_whole(
        shared: &Shared,
        place: &Place,
        volume: VolumeId,
        want: Extent,
        out: &mut [u8],
    ) -> Result<bool, ReadError> {
        if out.len() > format::MAX_RECORD_BYTES {
            return Ok(false);
        }
        let mut head = [0; RECORD_HEADER];
        if shared.file(&place.segment)?.read_two_at(place.offset.into(), &mut head, out).is_err() {
            return Ok(false);
        }
        Ok(is_plain(&head, place.segment.tag, volume, want, out).is_some())
    }

    /// Some blocks of a record whose sums are known.
    fn read_blocks(
        &self,
        shared: &Shared,
        place: &Place,
        sums: &Sums,
        from: usize,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let need = sums.around(&(from..from + out.len()));
        let file = shared.file(&place.segment)?;
        let at = place.payload() + need.start as u64;
        let path = || place.segment.path(&shared.dir);
        let read = |buf: &mut [u8]| match file.read_at(at, buf) {
            // Once more, by the way that knows what it means.
            Err(_) => segment::read_or_short(&*file, &path(), at, buf),
            Ok(()) => Ok(()),
        };
        let whole = if need.len() == out.len() {
            read(out)?;
            sums.match_at(need.start, out)
        } else {
            let mut blocks = vec![0; need.len()];
            read(&mut blocks)?;
            out.copy_from_slice(&blocks[from - need.start..][..out.len()]);
            sums.match_at(need.start, &blocks)
        };
        if !whole {
            let (file, offset) = (path(), place.offset.into());
            return Err(Corruption { file, offset, what: Damage::PayloadChecksum }.into());
        }
        Ok(())
    }

    /// Reads and checks the whole record, hands out a part and remembers what makes the next part cheaper.
    fn read_part(
        &self,
        shared: &Shared,
        place: &Place,
        volume: VolumeId,
        want: Extent,
        from: usize,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let file = shared.file(&place.segment)?;
        let path = place.segment.path(&shared.dir);
        let offset = place.offset.into();
        let (record, payload) = segment::read_record(&*file, &path, place.segment.tag, offset, from + out.len())?;
        let covers = Covers::of(&record);
        let raw = record.codec == Codec::Raw;
        let data = match record.kind {
            RecordKind::Write if raw && payload.len() as u64 == record.extent.bytes() => payload,
            RecordKind::Write => format::decode_payload(&record, &payload, &path, offset)?,
            _ => Vec::new(),
        };
        if !covers.holds(volume, want, place.skip) || data.len() as u64 != record.extent.bytes() {
            let what = Damage::FooterDisagrees { lsn: record.lsn };
            return Err(Corruption { file: path, offset, what }.into());
        }
        out.copy_from_slice(&data[from..from + out.len()]);
        // Used up by this read otherwise: keeping it would only push others out.
        if want.sectors < record.extent.sectors {
            if raw {
                let sums = Sums::new(covers, &data);
                let cost = SUMS_ENTRY + sums.blocks.len() * size_of::<u32>();
                self.sums.put(place.key(), Arc::new(sums), cost);
            } else {
                let cost = data.len();
                self.decoded.put(place.key(), Decoded { covers, data: Arc::new(data) }, cost);
            }
        }
        Ok(())
    }

    /// The same as [`Payloads::read`] from what memory holds, without waiting for anything; false when that cannot be, or
    /// when anything is not as it should be: the caller reads again and hears why.
    pub fn read_at_once(&self, shared: &Shared, place: &Place, volume: VolumeId, want: Extent, out: &mut [u8]) -> bool {
        let Some(file) = shared.open_file(&place.segment) else { return false };
        let from = (place.skip * SECTOR) as usize;
        if let Some(sums) = self.sums.get(&place.key()) {
            let need = sums.around(&(from..from + out.len()));
            return sums.covers.holds(volume, want, place.skip)
                && need.len() == out.len()
                && file.read_cached_at(place.payload() + need.start as u64, out)
                && sums.match_at(need.start, out);
        }
        if place.skip > 0 || out.len() > format::MAX_RECORD_BYTES {
            return false;
        }
        let mut bytes = vec![0; RECORD_HEADER + out.len()];
        if !file.read_cached_at(place.offset.into(), &mut bytes) {
            return false;
        }
        let (head, payload) = bytes.split_at(RECORD_HEADER);
        if is_plain(head, place.segment.tag, volume, want, payload).is_none() {
            return false;
        }
        out.copy_from_slice(payload);
        true
    }

    /// Reads whole records that lie behind each other with one system call; answers how many of `pieces` were filled, from
    /// the first on. Whatever is not as expected ends it: the caller reads that one by itself and hears why.
    pub fn read_run(&self, shared: &Shared, volume: VolumeId, pieces: &mut [Piece<'_>]) -> usize {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return 0 };
        let start = u64::from(first.place.offset);
        let end = last.place.payload() + last.extent.bytes();
        let tag = first.place.segment.tag;
        let Ok(file) = shared.file(&first.place.segment) else { return 0 };
        let mut bytes = vec![0; end.saturating_sub(start) as usize];
        if file.read_at(start, &mut bytes).is_err() {
            return 0;
        }
        let mut filled = 0;
        for piece in pieces {
            let at = (u64::from(piece.place.offset) - start) as usize;
            let Some((head, rest)) = bytes.get(at..).and_then(|b| b.split_at_checked(RECORD_HEADER)) else { break };
            let Some(payload) = rest.get(..piece.out.len()) else { break };
            if is_plain(head, tag, volume, piece.extent, payload).is_none() {
                break;
            }
            piece.out.copy_from_slice(payload);
            filled += 1;
        }
        filled
    }
}

/// The record, if it is a whole, uncompressed write of just this extent.
fn is_plain(head: &[u8], tag: u64, volume: VolumeId, want: Extent, payload: &[u8]) -> Option<Record> {
    format::decode_record(head, tag).filter(|record| {
        record.kind == RecordKind::Write
            && record.codec == Codec::Raw
            && record.volume == volume
            && record.extent == want
            && record.stored_len as usize == payload.len()
            && record.payload_crc == crc32fast::hash(payload)
    })
}

/// How many of these places, from the first on, are worth reading with one call ([`Payloads::read_run`]).
pub fn run_length<'a>(places: impl IntoIterator<Item = (&'a Place, Extent)>) -> usize {
    let mut places = places.into_iter();
    let Some((first, extent)) = places.next().filter(|(place, _)| place.skip == 0) else { return 1 };
    let start = u64::from(first.offset);
    let mut end = first.payload() + extent.bytes();
    let next = places.take_while(|(place, extent)| {
        let at = u64::from(place.offset);
        let near = Arc::ptr_eq(&place.segment, &first.segment)
            && place.skip == 0
            && at.checked_sub(end).is_some_and(|gap| gap <= RUN_GAP_MAX);
        let to = place.payload() + extent.bytes();
        let fits = near && to - start <= RUN_BYTES_MAX;
        if fits {
            end = to;
        }
        fits
    });
    1 + next.count()
}
