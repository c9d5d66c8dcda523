//! Every byte a journal puts on a disk, and every name it gives a file.
//!
//! Version 1. All integers are little-endian. Nothing here does I/O: bytes in, facts out, and hostile bytes give an error,
//! never a panic. A reader of version 1 stays for ever (`tests/fixtures/v1`).
//!
//! ```text
//! segment file            0  header block   (4096, see [`SegmentHeader`])
//!                      4096  batches, each at a multiple of 4096:
//!                              batch header 64 | records: (record header 96 | payload)* | zeroes to the next 4096
//!          after the batches  zeroes while the segment is open; when sealed, the footer, in whole blocks:
//!                              table pages    one entry of 16 bytes per record, in LSN order
//!                              extent pages   one entry of 24 bytes per record that changes a volume, by (volume, LBA, LSN)
//!                              fences         24 bytes per extent page: where it begins and how far it reaches
//!                              marks          postcard, without watermarks
//!                              trailer block  (4096, see [`SegmentTrailer`]), always the last block of the file
//! ```
//!
//! Every byte of a used block is covered: by a checksum, or by the rule that padding is zero.
//!
//! A record header and a batch header carry a *tag* made from group, timeline, first LSN and incarnation of their segment, so
//! that bytes of another segment, or a journal stored as a host's data inside this one, never pass for our own.

use crate::error::{Corruption, Damage};
use model::{
    Codec, Extent, GapReason, GroupId, HistoryTime, Lba, Lsn, Mark, Record, RecordKind, Sectors, SourceSeq, StreamId,
    Term, TimelineId, VolumeId, WriteFlags,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// The version written; a reader refuses any other by name.
pub const FORMAT_VERSION: u32 = 1;
/// Of the control record of a journal that is a branch, or has branches.
pub const CONTROL_VERSION_BRANCHES: u32 = 2;
/// Batches, footer parts and the header are placed at multiples of this (see [`durable::ALIGN`]).
pub const BLOCK: usize = durable::ALIGN;
/// The longest payload of one record; longer host writes come split, flagged [`WriteFlags::MORE`].
pub const MAX_RECORD_BYTES: usize = 128 * 1024;
/// A segment is sealed early when it holds this many records, so that its index fits in memory (about 25 MiB).
pub const MAX_SEGMENT_RECORDS: u32 = 262_144;
/// Offsets inside a segment are 32 bits; 1 GiB leaves room for the footer.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;

const SEGMENT_MAGIC: [u8; 8] = *b"HFsegm01";
const TRAILER_MAGIC: [u8; 8] = *b"HFtrail1";
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"HFb1");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"HFr1");
const TABLE_MAGIC: u32 = u32::from_le_bytes(*b"HFt1");
const EXTENT_MAGIC: u32 = u32::from_le_bytes(*b"HFx1");

// ---------------------------------------------------------------- names

/// The name of a journal's control record in its folder; the twin adds `.a` and `.b`.
pub const CONTROL_NAME: &str = "control";

pub fn segment_dir(dir: &Path) -> PathBuf {
    dir.join("seg")
}

pub fn base_dir(dir: &Path) -> PathBuf {
    dir.join("base")
}

pub fn base_image_path(dir: &Path, volume: VolumeId) -> PathBuf {
    base_dir(dir).join(format!("v{volume}.img"))
}

pub fn base_sums_path(dir: &Path, volume: VolumeId) -> PathBuf {
    base_dir(dir).join(format!("v{volume}.sum"))
}

/// A sled directory of one generation, below the index folder of its timeline.
pub fn generation_dir(index: &Path, generation: u64) -> PathBuf {
    index.join(format!("g{generation}"))
}

pub fn timeline_index_dir(index: &Path, timeline: TimelineId) -> PathBuf {
    index.join(format!("t{:08x}", timeline.0))
}

pub fn prepared_path(dir: &Path, number: u64) -> PathBuf {
    segment_dir(dir).join(format!("prepared-{number}"))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentState {
    /// Takes appends, or was never sealed.
    Open,
    Sealed,
}

/// What a segment's file name says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentName {
    pub timeline: TimelineId,
    pub first_lsn: Lsn,
    pub term: Term,
    pub state: SegmentState,
}

/// What a name in the segment folder is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileName {
    Segment(SegmentName),
    Prepared(u64),
    Unknown,
}

impl SegmentName {
    pub fn path(&self, dir: &Path) -> PathBuf {
        let suffix = match self.state {
            SegmentState::Open => "open",
            SegmentState::Sealed => "seg",
        };
        segment_dir(dir).join(format!("{:08x}-{:016x}-{:08x}.{suffix}", self.timeline.0, self.first_lsn.0, self.term.0))
    }
    pub fn with_state(self, state: SegmentState) -> Self {
        Self { state, ..self }
    }
}

/// Reads a name of the segment folder.
pub fn parse_name(name: &str) -> FileName {
    if let Some(number) = name.strip_prefix("prepared-") {
        return number.parse().map_or(FileName::Unknown, FileName::Prepared);
    }
    let parse = || {
        let (stem, suffix) = name.rsplit_once('.')?;
        let state = match suffix {
            "open" => SegmentState::Open,
            "seg" => SegmentState::Sealed,
            _ => return None,
        };
        let mut parts = stem.split('-');
        let (timeline, first, term) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || timeline.len() != 8 || first.len() != 16 || term.len() < 8 {
            return None;
        }
        Some(SegmentName {
            timeline: TimelineId(u32::from_str_radix(timeline, 16).ok()?),
            first_lsn: Lsn(u64::from_str_radix(first, 16).ok()?),
            term: Term(u64::from_str_radix(term, 16).ok()?),
            state,
        })
    };
    parse().map_or(FileName::Unknown, FileName::Segment)
}

// ---------------------------------------------------------------- blocks

/// Offset of the checksum in a block; everything else of the block is under it.
const BLOCK_CRC_AT: usize = 16;
const BLOCK_BODY_AT: usize = 20;

/// Why a block was not what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockFault {
    /// All zero: never written.
    Blank,
    Magic,
    Version(u32),
    Checksum,
    Body,
}

fn block_crc(block: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&block[..BLOCK_CRC_AT]);
    crc.update(&block[BLOCK_BODY_AT..]);
    crc.finalize()
}

/// magic 8 | version 4 | body length 4 | checksum 4 | body (postcard) | zeroes. None when the body is too long.
fn encode_block<T: Serialize>(magic: [u8; 8], body: &T) -> Option<Vec<u8>> {
    let mut block = vec![0u8; BLOCK];
    let used = postcard::to_slice(body, &mut block[BLOCK_BODY_AT..]).ok()?.len();
    block[..8].copy_from_slice(&magic);
    block[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    block[12..16].copy_from_slice(&(used as u32).to_le_bytes());
    let crc = block_crc(&block);
    block[BLOCK_CRC_AT..BLOCK_BODY_AT].copy_from_slice(&crc.to_le_bytes());
    Some(block)
}

fn decode_block<T: for<'a> Deserialize<'a>>(magic: [u8; 8], block: &[u8]) -> Result<T, BlockFault> {
    if block.len() != BLOCK {
        return Err(BlockFault::Body);
    }
    if block[..8] != magic {
        return Err(if block.iter().all(|b| *b == 0) { BlockFault::Blank } else { BlockFault::Magic });
    }
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if word(BLOCK_CRC_AT) != block_crc(block) {
        return Err(BlockFault::Checksum);
    }
    if word(8) != FORMAT_VERSION {
        return Err(BlockFault::Version(word(8)));
    }
    let body = block[BLOCK_BODY_AT..].get(..word(12) as usize).ok_or(BlockFault::Body)?;
    postcard::from_bytes(body).map_err(|_| BlockFault::Body)
}

/// Whether recovery points are offered at a position, and why not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum GapState {
    /// No [`Mark::Consistent`] has ever been seen: the first copy is not complete.
    #[default]
    Never,
    /// Between a [`Mark::GapBegin`] at this LSN and the next [`Mark::Consistent`].
    Gap { since: Lsn, reason: GapReason },
    /// Every request boundary is a recovery point.
    Consistent,
}

impl GapState {
    /// The state after a mark.
    #[must_use]
    pub fn after(self, lsn: Lsn, mark: &Mark) -> Self {
        match (self, mark) {
            (_, Mark::Consistent) => Self::Consistent,
            // A second begin inside a gap changes nothing: the first one says since when.
            (Self::Consistent, Mark::GapBegin { reason }) => Self::Gap { since: lsn, reason: *reason },
            (state, _) => state,
        }
    }
    pub fn is_consistent(self) -> bool {
        matches!(self, Self::Consistent)
    }
}

/// How far a source's stream has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceMark {
    pub stream: StreamId,
    pub seq: SourceSeq,
}

/// What a position in a timeline carries along from everything before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Carry {
    /// History time of the record before; later ones are never below it.
    pub time: HistoryTime,
    pub gap: GapState,
    pub source: Option<SourceMark>,
    /// More records of the same host request follow. A mark in the middle of a request does not end it.
    pub inside_request: bool,
}

impl Carry {
    /// Takes a record in. Records of the nil stream (made by the box itself) do not move the source's position.
    pub fn advance(&mut self, record: &Record, mark: Option<&Mark>) {
        self.time = self.time.max(record.time);
        if record.kind != RecordKind::Mark {
            self.inside_request = record.flags.contains(WriteFlags::MORE);
        }
        if record.stream != StreamId::default() {
            self.source = Some(match self.source {
                Some(at) if at.stream == record.stream => SourceMark { seq: at.seq.max(record.seq), ..at },
                _ => SourceMark { stream: record.stream, seq: record.seq },
            });
        }
        if let Some(mark) = mark {
            self.gap = self.gap.after(record.lsn, mark);
        }
    }
}

/// The first block of a segment; never changes once the file has its name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SegmentHeader {
    pub group: GroupId,
    pub timeline: TimelineId,
    pub term: Term,
    /// Grows at every open of the journal; persisted in control before it is used.
    pub incarnation: u64,
    /// Segments of a timeline count up by one.
    pub ordinal: u32,
    pub first_lsn: Lsn,
    /// Batches end at or below this offset.
    pub segment_bytes: u64,
    pub before: Carry,
}

impl SegmentHeader {
    /// What ties batches and records to this segment (FNV-1a, 64 bits).
    pub fn tag(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut eat = |bytes: &[u8]| {
            for b in bytes {
                hash = (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        eat(self.group.bytes());
        eat(&self.timeline.0.to_le_bytes());
        eat(&self.first_lsn.0.to_le_bytes());
        eat(&self.incarnation.to_le_bytes());
        hash
    }
    pub fn name(&self, state: SegmentState) -> SegmentName {
        SegmentName { timeline: self.timeline, first_lsn: self.first_lsn, term: self.term, state }
    }
    pub fn encode(&self) -> Vec<u8> {
        encode_block(SEGMENT_MAGIC, self).expect("a segment header of fixed size fits its block")
    }
    pub fn decode(block: &[u8]) -> Result<Self, BlockFault> {
        decode_block(SEGMENT_MAGIC, block).and_then(Self::checked)
    }
    /// LSNs begin at 1, and what follows them, and the ordinal, must be countable.
    fn checked(self) -> Result<Self, BlockFault> {
        let possible = (1..u64::MAX / 2).contains(&self.first_lsn.0) && self.ordinal < u32::MAX / 2;
        if possible { Ok(self) } else { Err(BlockFault::Body) }
    }
}

/// Sectors of one volume a segment touches: from `start` to below `end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Coverage {
    pub volume: VolumeId,
    pub start: u64,
    pub end: u64,
}

/// A point on the curve "bytes and records so far" of a segment, for pictures.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Knot {
    pub time: HistoryTime,
    /// Host bytes changed by the segment's records up to here.
    pub bytes: u64,
    pub records: u32,
}

/// Knots and coverages a trailer holds at most, so that it always fits its block. A segment that touches more volumes has an
/// empty coverage, which means "any".
pub const TRAILER_KNOTS_MAX: usize = 32;
pub const TRAILER_COVERAGE_MAX: usize = 48;

/// A part of the footer: `len` bytes at `offset`, checksummed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Section {
    pub offset: u64,
    pub len: u64,
    pub crc: u32,
}

/// The last block of a sealed segment: all that must be known of it when a journal opens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SegmentTrailer {
    pub header: SegmentHeader,
    pub last_lsn: Lsn,
    pub first_time: HistoryTime,
    pub last_time: HistoryTime,
    pub records: u32,
    /// Where the batches end and the footer begins.
    pub data_end: u64,
    /// Whole pages, each with its own checksum; `crc` is not used.
    pub table: Section,
    pub extents: Section,
    pub extent_count: u32,
    pub fences: Section,
    pub marks: Section,
    pub after: Carry,
    pub payload_bytes: u64,
    pub coverage: Vec<Coverage>,
    pub knots: Vec<Knot>,
}

impl SegmentTrailer {
    pub fn encode(&self) -> Vec<u8> {
        encode_block(TRAILER_MAGIC, self).expect("a trailer within its limits fits its block")
    }
    pub fn decode(block: &[u8]) -> Result<Self, BlockFault> {
        let this: Self = decode_block(TRAILER_MAGIC, block)?;
        this.header.clone().checked().map(|_| this)
    }
}

/// A mark as a footer keeps it; watermarks are left out (they are many, and the table finds them).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MarkEntry {
    pub lsn: Lsn,
    pub time: HistoryTime,
    pub mark: Mark,
}

// ---------------------------------------------------------------- batches and records

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawBatch {
    magic: U32,
    crc: U32,
    tag: U64,
    incarnation: U64,
    first_lsn: U64,
    durable_lsn: U64,
    record_count: U32,
    body_len: U32,
    reserved: [u8; 16],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRecord {
    magic: U32,
    crc: U32,
    lsn: U64,
    lba: U64,
    sectors: U32,
    stored_len: U32,
    payload_crc: U32,
    volume: U32,
    kind: u8,
    codec: u8,
    flags: U16,
    tag: U32,
    time: U64,
    source_wall_us: U64,
    seq: U64,
    term: U64,
    stream: [u8; 16],
}

pub const BATCH_HEADER: usize = size_of::<RawBatch>();
pub const RECORD_HEADER: usize = size_of::<RawRecord>();
const _: () = assert!(BATCH_HEADER == 64 && RECORD_HEADER == 96);

/// What stands before the records of one durable write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    pub tag: u64,
    pub incarnation: u64,
    pub first_lsn: Lsn,
    /// The highest LSN known to be durable when this batch was sent: proof that damage at or below it is no torn tail.
    pub durable_lsn: Lsn,
    pub record_count: u32,
    /// Bytes of the records, between this header and the padding.
    pub body_len: u32,
}

impl BatchHeader {
    pub fn encode(&self) -> [u8; BATCH_HEADER] {
        let mut raw = RawBatch {
            magic: BATCH_MAGIC.into(),
            crc: 0.into(),
            tag: self.tag.into(),
            incarnation: self.incarnation.into(),
            first_lsn: self.first_lsn.0.into(),
            durable_lsn: self.durable_lsn.0.into(),
            record_count: self.record_count.into(),
            body_len: self.body_len.into(),
            reserved: [0; 16],
        };
        raw.crc = crc32fast::hash(&raw.as_bytes()[8..]).into();
        raw.as_bytes().try_into().expect("the array is as long as the struct")
    }
    /// None when these bytes are no whole batch header of the segment with this tag.
    pub fn decode(bytes: &[u8], tag: u64, incarnation: u64) -> Option<Self> {
        let (raw, _) = RawBatch::read_from_prefix(bytes).ok()?;
        if raw.magic.get() != BATCH_MAGIC || raw.crc.get() != crc32fast::hash(&raw.as_bytes()[8..]) {
            return None;
        }
        let this = Self {
            tag: raw.tag.get(),
            incarnation: raw.incarnation.get(),
            first_lsn: Lsn(raw.first_lsn.get()),
            durable_lsn: Lsn(raw.durable_lsn.get()),
            record_count: raw.record_count.get(),
            body_len: raw.body_len.get(),
        };
        let plausible = this.record_count > 0
            && u64::from(this.body_len) >= u64::from(this.record_count) * RECORD_HEADER as u64
            && u64::from(this.body_len) <= MAX_SEGMENT_BYTES
            && this.first_lsn.0.checked_add(u64::from(this.record_count)).is_some();
        (this.tag == tag && this.incarnation == incarnation && plausible).then_some(this)
    }
    /// Header, records and padding.
    pub fn span(&self) -> u64 {
        (BATCH_HEADER as u64 + u64::from(self.body_len)).next_multiple_of(BLOCK as u64)
    }
}

/// The header bytes of a record of the segment with this tag.
pub fn encode_record(record: &Record, tag: u64) -> [u8; RECORD_HEADER] {
    let mut raw = RawRecord {
        magic: RECORD_MAGIC.into(),
        crc: 0.into(),
        lsn: record.lsn.0.into(),
        lba: record.extent.lba.0.into(),
        sectors: u32::try_from(record.extent.sectors.0).expect("append refuses longer extents").into(),
        stored_len: record.stored_len.into(),
        payload_crc: record.payload_crc.into(),
        volume: record.volume.0.into(),
        kind: record.kind as u8,
        codec: record.codec as u8,
        flags: record.flags.0.into(),
        tag: (tag as u32).into(),
        time: record.time.0.into(),
        source_wall_us: record.source_wall_us.into(),
        seq: record.seq.0.into(),
        term: record.term.0.into(),
        stream: *record.stream.bytes(),
    };
    raw.crc = crc32fast::hash(&raw.as_bytes()[8..]).into();
    raw.as_bytes().try_into().expect("the array is as long as the struct")
}

/// None when these bytes are no whole record header of the segment with this tag.
pub fn decode_record(bytes: &[u8], tag: u64) -> Option<Record> {
    let (raw, _) = RawRecord::read_from_prefix(bytes).ok()?;
    if raw.magic.get() != RECORD_MAGIC
        || raw.tag.get() != tag as u32
        || raw.crc.get() != crc32fast::hash(&raw.as_bytes()[8..])
        || raw.stored_len.get() as usize > MAX_RECORD_BYTES
    {
        return None;
    }
    Some(Record {
        lsn: Lsn(raw.lsn.get()),
        kind: RecordKind::from_u8(raw.kind)?,
        flags: WriteFlags::from_bits(raw.flags.get())?,
        volume: VolumeId(raw.volume.get()),
        extent: Extent { lba: Lba(raw.lba.get()), sectors: Sectors(raw.sectors.get().into()) },
        codec: Codec::from_u8(raw.codec)?,
        stored_len: raw.stored_len.get(),
        payload_crc: raw.payload_crc.get(),
        time: HistoryTime(raw.time.get()),
        source_wall_us: raw.source_wall_us.get(),
        stream: StreamId(raw.stream),
        seq: SourceSeq(raw.seq.get()),
        term: Term(raw.term.get()),
    })
}

// ---------------------------------------------------------------- footer pages

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPage {
    magic: U32,
    /// Over everything behind it.
    crc: U32,
    count: U32,
    /// Table: index of the first entry. Extents: the volume.
    key: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawTableEntry {
    time: U64,
    offset: U32,
    kind: u8,
    flags: u8,
    reserved: [u8; 2],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawExtent {
    lba: U64,
    sectors: U32,
    offset: U32,
    lsn_delta: U32,
    kind: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawFence {
    first_lba: U64,
    max_end: U64,
    volume: U32,
    count: U32,
}

const PAGE_HEADER: usize = size_of::<RawPage>();
const TABLE_ENTRY: usize = size_of::<RawTableEntry>();
const EXTENT_ENTRY: usize = size_of::<RawExtent>();
pub const TABLE_PER_PAGE: usize = (BLOCK - PAGE_HEADER) / TABLE_ENTRY;
pub const EXTENTS_PER_PAGE: usize = (BLOCK - PAGE_HEADER) / EXTENT_ENTRY;
const _: () = assert!(TABLE_PER_PAGE == 255 && EXTENTS_PER_PAGE == 170 && size_of::<RawFence>() == 24);

/// One record in a segment's table, which is in LSN order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableEntry {
    /// Of the record header in the segment file.
    pub offset: u32,
    pub time: HistoryTime,
    pub kind: RecordKind,
    pub flags: WriteFlags,
}

/// One version of an extent, as a segment's index knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentEntry {
    pub volume: VolumeId,
    pub extent: Extent,
    pub lsn: Lsn,
    /// Of the record header in the segment file.
    pub offset: u32,
    /// Write, Zero or Discard.
    pub kind: RecordKind,
}

/// Where an extent page begins and how far it reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fence {
    pub volume: VolumeId,
    pub first_lba: u64,
    pub max_end: u64,
    pub count: u32,
}

fn seal_page(page: &mut [u8], magic: u32, count: usize, key: u32) {
    let header = RawPage { magic: magic.into(), crc: 0.into(), count: (count as u32).into(), key: key.into() };
    page[..PAGE_HEADER].copy_from_slice(header.as_bytes());
    let crc = crc32fast::hash(&page[8..]);
    page[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn open_page(page: &[u8], magic: u32, per_page: usize) -> Option<(usize, u32)> {
    let (header, _) = RawPage::read_from_prefix(page).ok()?;
    let ok = page.len() == BLOCK
        && header.magic.get() == magic
        && header.crc.get() == crc32fast::hash(&page[8..])
        && header.count.get() as usize <= per_page;
    ok.then(|| (header.count.get() as usize, header.key.get()))
}

/// Appends a table page of at most [`TABLE_PER_PAGE`] entries; `first_index` is the place of the first in the segment.
pub fn push_table_page(out: &mut Vec<u8>, first_index: u32, entries: &[TableEntry]) {
    let start = out.len();
    out.resize(start + BLOCK, 0);
    let page = &mut out[start..];
    for (entry, slot) in entries.iter().zip(page[PAGE_HEADER..].chunks_exact_mut(TABLE_ENTRY)) {
        let raw = RawTableEntry {
            time: entry.time.0.into(),
            offset: entry.offset.into(),
            kind: entry.kind as u8,
            flags: u8::try_from(entry.flags.0).expect("known flags fit a byte"),
            reserved: [0; 2],
        };
        slot.copy_from_slice(raw.as_bytes());
    }
    seal_page(page, TABLE_MAGIC, entries.len(), first_index);
}

/// Reads a table page; None when it is damaged or not the one that begins at `first_index`.
pub fn read_table_page(page: &[u8], first_index: u32) -> Option<Vec<TableEntry>> {
    let (count, key) = open_page(page, TABLE_MAGIC, TABLE_PER_PAGE)?;
    if key != first_index {
        return None;
    }
    let slots = page[PAGE_HEADER..].chunks_exact(TABLE_ENTRY).take(count);
    slots
        .map(|slot| {
            let raw = RawTableEntry::read_from_bytes(slot).ok()?;
            Some(TableEntry {
                offset: raw.offset.get(),
                time: HistoryTime(raw.time.get()),
                kind: RecordKind::from_u8(raw.kind)?,
                flags: WriteFlags::from_bits(raw.flags.into())?,
            })
        })
        .collect()
}

/// Appends an extent page of at most [`EXTENTS_PER_PAGE`] entries, all of one volume, and returns its fence.
pub fn push_extent_page(out: &mut Vec<u8>, first_lsn: Lsn, entries: &[ExtentEntry]) -> Fence {
    let start = out.len();
    out.resize(start + BLOCK, 0);
    let page = &mut out[start..];
    for (entry, slot) in entries.iter().zip(page[PAGE_HEADER..].chunks_exact_mut(EXTENT_ENTRY)) {
        let raw = RawExtent {
            lba: entry.extent.lba.0.into(),
            sectors: u32::try_from(entry.extent.sectors.0).expect("append refuses longer extents").into(),
            offset: entry.offset.into(),
            lsn_delta: u32::try_from(entry.lsn.0 - first_lsn.0).expect("a segment holds fewer records").into(),
            kind: entry.kind as u8,
            reserved: [0; 3],
        };
        slot.copy_from_slice(raw.as_bytes());
    }
    let volume = entries.first().map_or(VolumeId(0), |e| e.volume);
    seal_page(page, EXTENT_MAGIC, entries.len(), volume.0);
    Fence {
        volume,
        first_lba: entries.first().map_or(0, |e| e.extent.start()),
        max_end: entries.iter().map(|e| e.extent.end()).max().unwrap_or(0),
        count: entries.len() as u32,
    }
}

/// Reads an extent page; None when it is damaged.
pub fn read_extent_page(page: &[u8], first_lsn: Lsn) -> Option<Vec<ExtentEntry>> {
    let (count, key) = open_page(page, EXTENT_MAGIC, EXTENTS_PER_PAGE)?;
    let slots = page[PAGE_HEADER..].chunks_exact(EXTENT_ENTRY).take(count);
    slots
        .map(|slot| {
            let raw = RawExtent::read_from_bytes(slot).ok()?;
            Some(ExtentEntry {
                volume: VolumeId(key),
                extent: Extent::new(raw.lba.get(), raw.sectors.get().into()),
                lsn: Lsn(first_lsn.0.checked_add(raw.lsn_delta.get().into())?),
                offset: raw.offset.get(),
                kind: RecordKind::from_u8(raw.kind).filter(|k| k.changes_volume())?,
            })
        })
        .collect()
}

pub fn encode_fences(fences: &[Fence]) -> Vec<u8> {
    let mut out = Vec::with_capacity(std::mem::size_of_val(fences));
    for fence in fences {
        let raw = RawFence {
            first_lba: fence.first_lba.into(),
            max_end: fence.max_end.into(),
            volume: fence.volume.0.into(),
            count: fence.count.into(),
        };
        out.extend_from_slice(raw.as_bytes());
    }
    out
}

/// None when the length is no whole number of fences.
pub fn decode_fences(bytes: &[u8]) -> Option<Vec<Fence>> {
    let chunks = bytes.chunks_exact(size_of::<RawFence>());
    if !chunks.remainder().is_empty() {
        return None;
    }
    chunks
        .map(|chunk| {
            let raw = RawFence::read_from_bytes(chunk).ok()?;
            Some(Fence {
                volume: VolumeId(raw.volume.get()),
                first_lba: raw.first_lba.get(),
                max_end: raw.max_end.get(),
                count: raw.count.get(),
            })
        })
        .collect()
}

// ---------------------------------------------------------------- payloads

/// The bytes of an extent that a Write record's payload stands for. The caller has checked the payload's checksum.
pub fn decode_payload(record: &Record, payload: &[u8], path: &Path, offset: u64) -> Result<Vec<u8>, Corruption> {
    let bad = || Corruption { file: path.to_owned(), offset, what: Damage::Payload };
    let want = usize::try_from(record.extent.bytes()).map_err(|_| bad())?;
    match record.codec {
        Codec::Raw if payload.len() == want => Ok(payload.to_vec()),
        Codec::Raw => Err(bad()),
        Codec::Zstd => {
            // The bound comes first: a hostile frame may claim any length.
            if want > MAX_DECODED_BYTES {
                return Err(bad());
            }
            let out = zstd::bulk::decompress(payload, want).map_err(|_| bad())?;
            if out.len() == want { Ok(out) } else { Err(bad()) }
        }
    }
}

/// The longest extent a Write record may stand for: a compressed payload of 128 KiB may hold more than a raw one, and readers
/// keep a record decoded in memory.
pub const MAX_DECODED_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SegmentHeader {
        SegmentHeader {
            group: GroupId(*b"0123456789abcdef"),
            timeline: TimelineId(3),
            term: Term(9),
            incarnation: 2,
            ordinal: 7,
            first_lsn: Lsn(1000),
            segment_bytes: 1 << 20,
            before: Carry::default(),
        }
    }

    fn record() -> Record {
        Record {
            lsn: Lsn(1001),
            kind: RecordKind::Write,
            flags: WriteFlags::FUA | WriteFlags::MORE,
            volume: VolumeId(4),
            extent: Extent::new(77, 8),
            codec: Codec::Raw,
            stored_len: 4096,
            payload_crc: 0xdead_beef,
            time: HistoryTime(5),
            source_wall_us: 6,
            stream: StreamId([7; 16]),
            seq: SourceSeq(8),
            term: Term(9),
        }
    }

    #[test]
    fn names_read_back_as_they_were_made() {
        for state in [SegmentState::Open, SegmentState::Sealed] {
            let name = header().name(state);
            let path = name.path(Path::new("g"));
            let text = path.file_name().and_then(|n| n.to_str()).expect("a name");
            assert_eq!(parse_name(text), FileName::Segment(name));
        }
        let term = SegmentName { term: Term(u64::MAX), ..header().name(SegmentState::Open) };
        let path = term.path(Path::new(""));
        assert_eq!(parse_name(path.file_name().and_then(|n| n.to_str()).expect("a name")), FileName::Segment(term));
        assert_eq!(parse_name("prepared-12"), FileName::Prepared(12));
        for odd in [
            "",
            ".",
            "prepared-",
            "prepared-x",
            "x.seg",
            "00000000-0000000000000001-00000001",
            "0-1-2.seg",
            "00000000-0000000000000001-00000001-2.seg",
            "00000000-000000000000000é-00000001.seg",
        ] {
            assert_eq!(parse_name(odd), FileName::Unknown, "{odd}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_seen() {
        let block = header().encode();
        assert_eq!(SegmentHeader::decode(&block), Ok(header()));
        assert_eq!(SegmentHeader::decode(&vec![0; BLOCK]), Err(BlockFault::Blank));
        for at in (0..BLOCK).step_by(7).chain(0..64) {
            let mut bad = block.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(SegmentHeader::decode(&bad).is_err(), "byte {at}");
        }
        let tag = header().tag();
        let bytes = encode_record(&record(), tag);
        assert_eq!(decode_record(&bytes, tag), Some(record()));
        assert_eq!(decode_record(&bytes, tag ^ 1), None);
        for at in 0..RECORD_HEADER * 8 {
            let mut bad = bytes;
            bad[at / 8] ^= 1 << (at % 8);
            assert_eq!(decode_record(&bad, tag), None, "bit {at}");
        }
        let batch = BatchHeader {
            tag,
            incarnation: 2,
            first_lsn: Lsn(1000),
            durable_lsn: Lsn(999),
            record_count: 2,
            body_len: 400,
        };
        let bytes = batch.encode();
        assert_eq!(BatchHeader::decode(&bytes, tag, 2), Some(batch));
        for at in 0..BATCH_HEADER * 8 {
            let mut bad = bytes;
            bad[at / 8] ^= 1 << (at % 8);
            assert_eq!(BatchHeader::decode(&bad, tag, 2), None, "bit {at}");
        }
    }

    #[test]
    fn pages_read_back_and_show_damage() {
        let table: Vec<TableEntry> = (0..200u32)
            .map(|i| TableEntry {
                offset: i * 100,
                time: HistoryTime(i.into()),
                kind: RecordKind::Zero,
                flags: WriteFlags::SYNC,
            })
            .collect();
        let mut page = Vec::new();
        push_table_page(&mut page, 510, &table);
        assert_eq!(read_table_page(&page, 510), Some(table));
        assert_eq!(read_table_page(&page, 0), None);
        let extents: Vec<ExtentEntry> = (0..170u32)
            .map(|i| ExtentEntry {
                volume: VolumeId(2),
                extent: Extent::new(u64::from(i) * 3, 5),
                lsn: Lsn(10 + u64::from(i)),
                offset: i,
                kind: RecordKind::Write,
            })
            .collect();
        let mut bytes = Vec::new();
        let fence = push_extent_page(&mut bytes, Lsn(10), &extents);
        assert_eq!(fence, Fence { volume: VolumeId(2), first_lba: 0, max_end: 169 * 3 + 5, count: 170 });
        assert_eq!(read_extent_page(&bytes, Lsn(10)), Some(extents));
        assert_eq!(decode_fences(&encode_fences(&[fence])), Some(vec![fence]));
        assert_eq!(decode_fences(&[0; 25]), None);
        for at in 0..BLOCK {
            bytes[at] ^= 1;
            assert_eq!(read_extent_page(&bytes, Lsn(10)), None, "byte {at}");
            bytes[at] ^= 1;
            page[at] ^= 1;
            assert_eq!(read_table_page(&page, 510), None, "byte {at}");
            page[at] ^= 1;
        }
    }

    #[test]
    fn random_bytes_are_never_ours_and_never_panic() {
        let mut s = 0x1234_5678_9abc_def1u64;
        for round in 0..2000 {
            let bytes: Vec<u8> = (0..BLOCK)
                .map(|_| {
                    s ^= s << 13;
                    s ^= s >> 7;
                    s ^= s << 17;
                    s as u8
                })
                .collect();
            assert!(SegmentHeader::decode(&bytes).is_err(), "round {round}");
            assert!(SegmentTrailer::decode(&bytes).is_err(), "round {round}");
            assert!(decode_record(&bytes, s).is_none(), "round {round}");
            assert!(BatchHeader::decode(&bytes, s, 1).is_none(), "round {round}");
            assert!(read_extent_page(&bytes, Lsn(u64::MAX)).is_none(), "round {round}");
        }
    }
}
