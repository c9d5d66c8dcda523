//! One segment: its index in memory while it is not sealed, its footer afterwards, and the reading of records.
//!
//! A segment begins *unsealed*: the writer (or the scan of recovery) fills a [`MemIndex`]. Sealing writes the same facts as a
//! footer, cuts the file behind it, flushes and renames; from then on only the trailer stays in memory and the rest of the
//! footer is read by page. Both answer the same questions, so a reader does not care which it has.
//!
//! # Power loss
//!
//! Seal: footer, length, flush, rename (durable). A crash anywhere before the rename leaves an `.open` file whose batches are
//! untouched; recovery reads them and seals again, at the same place.
//!
//! # Limits
//!
//! A [`MemIndex`] holds at most [`MAX_SEGMENT_RECORDS`](crate::format::MAX_SEGMENT_RECORDS) records, about 25 MiB.

use crate::{
    Corruption, Damage, ReadError,
    format::{
        self, BLOCK, Carry, Coverage, EXTENTS_PER_PAGE, ExtentEntry, Fence, Knot, MarkEntry, RECORD_HEADER, Section,
        SegmentHeader, SegmentState, SegmentTrailer, TABLE_PER_PAGE, TRAILER_COVERAGE_MAX, TRAILER_KNOTS_MAX,
        TableEntry,
    },
};
use durable::{Disk, DiskError, DiskErrorKind, DiskFile, OpenMode};
use model::{ByteLen, Extent, HistoryTime, Lsn, Mark, Record, RecordKind, VolumeId};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock, RwLockReadGuard},
};

/// Where a version lies in a [`MemIndex`]. Extents are filed by size class, so that those which may reach into a range are
/// found by their start: a class-c extent is longer than half of 2^c sectors and at most 2^c.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    volume: VolumeId,
    class: u8,
    lba: u64,
    lsn: Lsn,
}

#[derive(Clone, Copy)]
struct Place {
    sectors: u32,
    offset: u32,
    kind: RecordKind,
}

/// The index of a segment that is not sealed.
pub struct MemIndex {
    first_lsn: Lsn,
    table: Vec<TableEntry>,
    extents: BTreeMap<Key, Place>,
    /// Which size classes a volume has, one bit each.
    classes: BTreeMap<VolumeId, u64>,
    coverage: BTreeMap<VolumeId, Coverage>,
    marks: Vec<MarkEntry>,
    /// Host bytes changed, after each record: the knots are taken from here.
    bytes_so_far: Vec<u64>,
    after: Carry,
    payload_bytes: u64,
}

fn class_of(sectors: u64) -> u8 {
    // At most 64: sectors fit 32 bits.
    sectors.next_power_of_two().trailing_zeros() as u8
}

impl MemIndex {
    pub fn new(header: &SegmentHeader) -> Self {
        Self {
            first_lsn: header.first_lsn,
            table: Vec::new(),
            extents: BTreeMap::new(),
            classes: BTreeMap::new(),
            coverage: BTreeMap::new(),
            marks: Vec::new(),
            bytes_so_far: Vec::new(),
            after: header.before,
            payload_bytes: 0,
        }
    }
    pub fn records(&self) -> u32 {
        self.table.len() as u32
    }
    /// Below `first_lsn` while there is no record.
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.first_lsn.0 + self.table.len() as u64 - 1)
    }
    pub fn after(&self) -> &Carry {
        &self.after
    }
    pub fn marks(&self) -> &[MarkEntry] {
        &self.marks
    }
    pub fn entry(&self, lsn: Lsn) -> Option<TableEntry> {
        let at = lsn.0.checked_sub(self.first_lsn.0)?;
        self.table.get(usize::try_from(at).ok()?).copied()
    }
    pub fn first_time(&self) -> HistoryTime {
        self.table.first().map_or(self.after.time, |e| e.time)
    }
    /// Takes in the record that follows the last one.
    pub fn insert(&mut self, record: &Record, offset: u32, mark: Option<&Mark>) {
        debug_assert_eq!(record.lsn.0, self.first_lsn.0 + self.table.len() as u64, "records come in LSN order");
        self.table.push(TableEntry { offset, time: record.time, kind: record.kind, flags: record.flags });
        let mut bytes = self.bytes_so_far.last().copied().unwrap_or(0);
        if record.kind.changes_volume() {
            let class = class_of(record.extent.sectors.0);
            let key = Key { volume: record.volume, class, lba: record.extent.start(), lsn: record.lsn };
            // Append and the scan both refuse extents longer than 32 bits.
            let place = Place { sectors: record.extent.sectors.0 as u32, offset, kind: record.kind };
            self.extents.insert(key, place);
            *self.classes.entry(record.volume).or_insert(0) |= 1 << class;
            let (start, end) = (record.extent.start(), record.extent.end());
            let cover = self.coverage.entry(record.volume).or_insert(Coverage { volume: record.volume, start, end });
            cover.start = cover.start.min(start);
            cover.end = cover.end.max(end);
            if record.kind == RecordKind::Write {
                bytes += record.extent.bytes();
            }
        }
        self.bytes_so_far.push(bytes);
        self.payload_bytes += u64::from(record.stored_len);
        if let Some(mark) = mark
            && !matches!(mark, Mark::Watermark { .. })
        {
            self.marks.push(MarkEntry { lsn: record.lsn, time: record.time, mark: mark.clone() });
        }
        self.after.advance(record, mark);
    }
    /// [`MemIndex::insert`] unless something before is missing.
    pub fn insert_if(&mut self, whole: bool, record: &Record, offset: u32, mark: Option<&Mark>) {
        if whole {
            self.insert(record, offset, mark);
        }
    }
    /// Appends every version at or below `upto` that meets `extent`.
    pub fn lookup(&self, volume: VolumeId, extent: Extent, upto: Lsn, out: &mut Vec<ExtentEntry>) {
        let mut classes = self.classes.get(&volume).copied().unwrap_or(0);
        while classes != 0 {
            let class = classes.trailing_zeros() as u8;
            classes &= classes - 1;
            let reach = (1u64 << class) - 1;
            let key = |lba, lsn| Key { volume, class, lba, lsn };
            let range = key(extent.start().saturating_sub(reach), Lsn::ZERO)..key(extent.end(), Lsn::ZERO);
            for (key, place) in self.extents.range(range) {
                let version = Extent::new(key.lba, place.sectors.into());
                if key.lsn <= upto && version.end() > extent.start() {
                    out.push(ExtentEntry {
                        volume,
                        extent: version,
                        lsn: key.lsn,
                        offset: place.offset,
                        kind: place.kind,
                    });
                }
            }
        }
    }
    /// All versions by (volume, LBA, LSN).
    pub fn sorted(&self) -> Vec<ExtentEntry> {
        let mut all: Vec<ExtentEntry> = self
            .extents
            .iter()
            .map(|(key, place)| ExtentEntry {
                volume: key.volume,
                extent: Extent::new(key.lba, place.sectors.into()),
                lsn: key.lsn,
                offset: place.offset,
                kind: place.kind,
            })
            .collect();
        all.sort_unstable_by_key(|e| (e.volume, e.extent.lba, e.lsn));
        all
    }
    pub fn coverage(&self) -> Vec<Coverage> {
        if self.coverage.len() > TRAILER_COVERAGE_MAX { Vec::new() } else { self.coverage.values().copied().collect() }
    }
    /// The curve of bytes over time, in at most [`TRAILER_KNOTS_MAX`] points; the last one is the end.
    pub fn knots(&self) -> Vec<Knot> {
        let count = self.table.len();
        let points = count.min(TRAILER_KNOTS_MAX);
        (1..=points)
            .map(|i| {
                let at = count * i / points - 1;
                Knot { time: self.table[at].time, bytes: self.bytes_so_far[at], records: at as u32 + 1 }
            })
            .collect()
    }
    /// The footer's bytes, trailer included, for batches that end at `data_end`. There is at least one record.
    pub fn footer(&self, header: &SegmentHeader, data_end: u64) -> (Vec<u8>, SegmentTrailer) {
        let mut out = Vec::with_capacity(self.table.len() * 41 + 4 * BLOCK);
        let place = |out: &Vec<u8>, start: usize| Section {
            offset: data_end + start as u64,
            len: (out.len() - start) as u64,
            crc: crc32fast::hash(&out[start..]),
        };
        for (i, page) in self.table.chunks(TABLE_PER_PAGE).enumerate() {
            format::push_table_page(&mut out, (i * TABLE_PER_PAGE) as u32, page);
        }
        let table = place(&out, 0);
        let start = out.len();
        let sorted = self.sorted();
        let mut fences = Vec::new();
        for of_volume in sorted.chunk_by(|a, b| a.volume == b.volume) {
            for page in of_volume.chunks(EXTENTS_PER_PAGE) {
                fences.push(format::push_extent_page(&mut out, header.first_lsn, page));
            }
        }
        let extents = place(&out, start);
        let start = out.len();
        out.extend_from_slice(&format::encode_fences(&fences));
        let fences = place(&out, start);
        let start = out.len();
        out.extend_from_slice(&postcard::to_stdvec(&self.marks).expect("marks encode into memory"));
        let marks = place(&out, start);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        let trailer = SegmentTrailer {
            header: header.clone(),
            last_lsn: self.last_lsn(),
            first_time: self.first_time(),
            last_time: self.after.time,
            records: self.records(),
            data_end,
            table,
            extents,
            extent_count: sorted.len() as u32,
            fences,
            marks,
            after: self.after,
            payload_bytes: self.payload_bytes,
            coverage: self.coverage(),
            knots: self.knots(),
        };
        out.extend_from_slice(&trailer.encode());
        (out, trailer)
    }
}

/// A segment that is not sealed.
pub struct Unsealed {
    pub index: MemIndex,
    /// Where the next batch begins.
    pub data_end: u64,
    /// Of the file.
    pub file_bytes: u64,
    /// `Sealed` only for one whose trailer was lost and that is read in spite of it.
    pub named: SegmentState,
}

/// What stays in memory of a sealed segment.
pub struct Sealed {
    pub trailer: SegmentTrailer,
    pub marks: Vec<MarkEntry>,
    pub file_bytes: u64,
}

pub enum State {
    Unsealed(Box<Unsealed>),
    Sealed(Arc<Sealed>),
}

/// One segment, shared by the writer, the jobs and the readers. The lock is held for the length of a lookup or an insert.
pub struct Segment {
    pub header: SegmentHeader,
    pub tag: u64,
    state: RwLock<State>,
    /// Held while the footer is written: a job and an append may both want to.
    sealing: Mutex<()>,
}

/// The facts everyone asks for.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Below the first LSN while there is no record.
    pub last_lsn: Lsn,
    pub first_time: HistoryTime,
    pub last_time: HistoryTime,
    pub records: u64,
    pub file_bytes: u64,
    /// Of the file, what holds records; the rest of one that is not sealed is room made ahead.
    pub used_bytes: u64,
    pub payload_bytes: u64,
    pub sealed: bool,
    pub after: Carry,
}

impl Segment {
    pub fn new(header: SegmentHeader, state: State) -> Self {
        Self { tag: header.tag(), header, state: RwLock::new(state), sealing: Mutex::new(()) }
    }
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
    /// Changes an unsealed segment; None when it is sealed.
    pub fn with_unsealed<T>(&self, change: impl FnOnce(&mut Unsealed) -> T) -> Option<T> {
        match &mut *self.state.write().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            State::Unsealed(unsealed) => Some(change(unsealed)),
            State::Sealed(_) => None,
        }
    }
    fn set_sealed(&self, sealed: Sealed) {
        *self.state.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = State::Sealed(Arc::new(sealed));
    }
    pub fn sealed(&self) -> Option<Arc<Sealed>> {
        match &*self.state() {
            State::Sealed(sealed) => Some(Arc::clone(sealed)),
            State::Unsealed(_) => None,
        }
    }
    pub fn path(&self, dir: &Path) -> PathBuf {
        let state = match &*self.state() {
            State::Unsealed(unsealed) => unsealed.named,
            State::Sealed(_) => SegmentState::Sealed,
        };
        self.header.name(state).path(dir)
    }
    pub fn first_lsn(&self) -> Lsn {
        self.header.first_lsn
    }
    pub fn last_lsn(&self) -> Lsn {
        match &*self.state() {
            State::Unsealed(unsealed) => unsealed.index.last_lsn(),
            State::Sealed(sealed) => sealed.trailer.last_lsn,
        }
    }
    pub fn summary(&self) -> Summary {
        match &*self.state() {
            State::Unsealed(unsealed) => {
                let index = &unsealed.index;
                Summary {
                    last_lsn: index.last_lsn(),
                    first_time: index.first_time(),
                    last_time: index.after().time,
                    records: index.records().into(),
                    file_bytes: unsealed.file_bytes,
                    used_bytes: unsealed.data_end.min(unsealed.file_bytes),
                    payload_bytes: index.payload_bytes,
                    sealed: false,
                    after: *index.after(),
                }
            }
            State::Sealed(sealed) => {
                let t = &sealed.trailer;
                Summary {
                    last_lsn: t.last_lsn,
                    first_time: t.first_time,
                    last_time: t.last_time,
                    records: t.records.into(),
                    file_bytes: sealed.file_bytes,
                    used_bytes: sealed.file_bytes,
                    payload_bytes: t.payload_bytes,
                    sealed: true,
                    after: t.after,
                }
            }
        }
    }
    /// Marks at or below `upto`, watermarks left out.
    pub fn marks(&self, upto: Lsn) -> Vec<MarkEntry> {
        let pick = |marks: &[MarkEntry]| marks.iter().take_while(|m| m.lsn <= upto).cloned().collect();
        match &*self.state() {
            State::Unsealed(unsealed) => pick(unsealed.index.marks()),
            State::Sealed(sealed) => pick(&sealed.marks),
        }
    }
    pub fn knots(&self) -> Vec<Knot> {
        match &*self.state() {
            State::Unsealed(unsealed) => unsealed.index.knots(),
            State::Sealed(sealed) => sealed.trailer.knots.clone(),
        }
    }
    /// Whether the segment may hold something of the extent; false only when it surely does not.
    pub fn may_touch(&self, volume: VolumeId, extent: Extent) -> bool {
        let State::Sealed(sealed) = &*self.state() else { return true };
        let coverage = &sealed.trailer.coverage;
        if coverage.is_empty() {
            return sealed.trailer.extent_count > 0;
        }
        coverage.iter().any(|c| c.volume == volume && c.start < extent.end() && extent.start() < c.end)
    }
}

/// The fences of a sealed segment, as a lookup needs them.
pub struct Fences {
    fences: Vec<Fence>,
    /// The farthest any page up to this one reaches, within its volume: where a backward walk may stop.
    reach: Vec<u64>,
}

impl Fences {
    fn new(fences: Vec<Fence>) -> Self {
        let mut reach: Vec<u64> = Vec::with_capacity(fences.len());
        for (i, fence) in fences.iter().enumerate() {
            let before = if i > 0 && fences[i - 1].volume == fence.volume { reach[i - 1] } else { 0 };
            reach.push(before.max(fence.max_end));
        }
        Self { fences, reach }
    }
    pub fn bytes(&self) -> usize {
        self.fences.len() * (size_of::<Fence>() + size_of::<u64>())
    }
    /// The pages that may hold something of the extent.
    pub fn pages(&self, volume: VolumeId, extent: Extent) -> Vec<usize> {
        let above = self.fences.partition_point(|f| (f.volume, f.first_lba) < (volume, extent.end()));
        let mut pages = Vec::new();
        for page in (0..above).rev() {
            let fence = &self.fences[page];
            if fence.volume != volume || self.reach[page] <= extent.start() {
                break;
            }
            if fence.max_end > extent.start() {
                pages.push(page);
            }
        }
        pages
    }
}

/// A sealed segment's file and trailer: reads the parts of the footer.
pub struct Footer<'a> {
    pub file: &'a dyn DiskFile,
    pub path: &'a Path,
    pub trailer: &'a SegmentTrailer,
}

impl Footer<'_> {
    fn bad(&self, offset: u64, what: Damage) -> ReadError {
        Corruption { file: self.path.to_owned(), offset, what }.into()
    }
    fn section(&self, section: &Section, what: Damage) -> Result<Vec<u8>, ReadError> {
        // The trailer's checksum vouches for the length; it is bounded by the file all the same.
        if section.len > format::MAX_SEGMENT_BYTES {
            return Err(self.bad(section.offset, what));
        }
        let mut bytes = vec![0; section.len as usize];
        read_or_short(self.file, self.path, section.offset, &mut bytes)?;
        if crc32fast::hash(&bytes) != section.crc {
            return Err(self.bad(section.offset, what));
        }
        Ok(bytes)
    }
    pub fn fences(&self) -> Result<Fences, ReadError> {
        let bytes = self.section(&self.trailer.fences, Damage::FooterFences)?;
        let fences = format::decode_fences(&bytes);
        fences.map(Fences::new).ok_or_else(|| self.bad(self.trailer.fences.offset, Damage::FooterFences))
    }
    pub fn marks(&self) -> Result<Vec<MarkEntry>, ReadError> {
        if self.trailer.marks.len == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.section(&self.trailer.marks, Damage::FooterMarks)?;
        postcard::from_bytes(&bytes).map_err(|_| self.bad(self.trailer.marks.offset, Damage::FooterMarks))
    }
    pub fn extent_page(&self, page: usize) -> Result<Vec<ExtentEntry>, ReadError> {
        let offset = self.trailer.extents.offset + (page * BLOCK) as u64;
        let mut bytes = [0; BLOCK];
        read_or_short(self.file, self.path, offset, &mut bytes)?;
        format::read_extent_page(&bytes, self.trailer.header.first_lsn)
            .ok_or_else(|| self.bad(offset, Damage::FooterExtents))
    }
    pub fn extent_pages(&self) -> usize {
        (self.trailer.extents.len / BLOCK as u64) as usize
    }
    pub fn table_page(&self, page: usize) -> Result<Vec<TableEntry>, ReadError> {
        let offset = self.trailer.table.offset + (page * BLOCK) as u64;
        let mut bytes = [0; BLOCK];
        read_or_short(self.file, self.path, offset, &mut bytes)?;
        format::read_table_page(&bytes, (page * TABLE_PER_PAGE) as u32)
            .ok_or_else(|| self.bad(offset, Damage::FooterTable))
    }
    /// Appends every version at or below `upto` that meets `extent`.
    pub fn lookup(
        &self,
        fences: &Fences,
        volume: VolumeId,
        extent: Extent,
        upto: Lsn,
        out: &mut Vec<ExtentEntry>,
    ) -> Result<(), ReadError> {
        for page in fences.pages(volume, extent) {
            let entries = self.extent_page(page)?;
            if entries.first().is_some_and(|e| e.volume != volume) {
                let offset = self.trailer.extents.offset + (page * BLOCK) as u64;
                return Err(self.bad(offset, Damage::FooterExtents));
            }
            out.extend(entries.into_iter().filter(|e| e.lsn <= upto && e.extent.intersect(&extent).is_some()));
        }
        Ok(())
    }
    /// Every version of the segment, by (volume, LBA, LSN).
    pub fn all_extents(&self) -> Result<Vec<ExtentEntry>, ReadError> {
        let mut out = Vec::with_capacity(self.extent_pages() * EXTENTS_PER_PAGE);
        for page in 0..self.extent_pages() {
            out.append(&mut self.extent_page(page)?);
        }
        Ok(out)
    }
}

/// Reads, and says "damaged" when the file is shorter than what durable facts say it holds.
pub fn read_or_short(file: &dyn DiskFile, path: &Path, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
    match file.read_at(offset, buf) {
        Err(DiskError { kind: DiskErrorKind::ShortRead { had, .. }, .. }) => {
            Err(Corruption { file: path.to_owned(), offset, what: Damage::Short { len: offset.saturating_add(had) } }
                .into())
        }
        other => Ok(other?),
    }
}

/// Reads the record at `offset` and checks both its checksums. `guess` is how long the payload may be expected to be.
pub fn read_record(
    file: &dyn DiskFile,
    path: &Path,
    tag: u64,
    offset: u64,
    guess: usize,
) -> Result<(Record, Vec<u8>), ReadError> {
    let bad = |what| ReadError::from(Corruption { file: path.to_owned(), offset, what });
    let mut bytes = vec![0; RECORD_HEADER + guess.min(format::MAX_RECORD_BYTES)];
    match file.read_at(offset, &mut bytes) {
        // The guess may reach past the end; the header alone never does.
        Err(DiskError { kind: DiskErrorKind::ShortRead { .. }, .. }) => {
            bytes.truncate(RECORD_HEADER);
            read_or_short(file, path, offset, &mut bytes)?;
        }
        other => other?,
    }
    let record = format::decode_record(&bytes, tag).ok_or_else(|| bad(Damage::RecordHeader))?;
    let have = bytes.len() - RECORD_HEADER;
    let want = record.stored_len as usize;
    if have < want {
        let at = bytes.len();
        bytes.resize(RECORD_HEADER + want, 0);
        read_or_short(file, path, offset + at as u64, &mut bytes[at..])?;
    }
    bytes.truncate(RECORD_HEADER + want);
    let payload = bytes.split_off(RECORD_HEADER);
    if crc32fast::hash(&payload) != record.payload_crc {
        return Err(bad(Damage::PayloadChecksum));
    }
    Ok((record, payload))
}

/// Reads the last block of a sealed segment and the marks.
pub fn load_sealed(disk: &dyn Disk, path: &Path) -> Result<Sealed, LoadError> {
    let file = disk.open(path, OpenMode::Read).map_err(ReadError::from)?;
    let len = file.len().map_err(ReadError::from)?.0;
    let bad = |offset, what| LoadError::Read(Corruption { file: path.to_owned(), offset, what }.into());
    if len < 2 * BLOCK as u64 || !len.is_multiple_of(BLOCK as u64) {
        return Err(bad(len, Damage::Trailer));
    }
    let at = len - BLOCK as u64;
    let mut block = [0; BLOCK];
    read_or_short(&*file, path, at, &mut block)?;
    let trailer = match SegmentTrailer::decode(&block) {
        Ok(trailer) => trailer,
        Err(format::BlockFault::Version(found)) => return Err(LoadError::Version(found)),
        Err(_) => return Err(bad(at, Damage::Trailer)),
    };
    // The checksum vouches for the contents; these hold for everything a writer of this version makes.
    let records = u64::from(trailer.records);
    let sections = [&trailer.table, &trailer.extents, &trailer.fences, &trailer.marks];
    let inside = sections
        .iter()
        .all(|s| s.offset >= trailer.data_end && s.offset.checked_add(s.len).is_some_and(|end| end <= at));
    let counts = records > 0
        && trailer.header.first_lsn.0.checked_add(records - 1) == Some(trailer.last_lsn.0)
        && trailer.table.len == records.div_ceil(TABLE_PER_PAGE as u64) * BLOCK as u64
        && trailer.extents.len.is_multiple_of(BLOCK as u64);
    if !inside || !counts {
        return Err(bad(at, Damage::Trailer));
    }
    let marks = Footer { file: &*file, path, trailer: &trailer }.marks()?;
    Ok(Sealed { trailer, marks, file_bytes: len })
}

/// Why a sealed segment could not be loaded.
pub enum LoadError {
    Read(ReadError),
    Version(u32),
}

impl From<ReadError> for LoadError {
    fn from(e: ReadError) -> Self {
        Self::Read(e)
    }
}

/// Writes the footer of a segment that takes no more appends, and gives the file its sealed name.
pub fn seal(disk: &dyn Disk, dir: &Path, segment: &Segment) -> Result<(), DiskError> {
    let _one = segment.sealing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (footer, trailer, data_end) = {
        let state = segment.state();
        let State::Unsealed(unsealed) = &*state else { return Ok(()) };
        let (footer, trailer) = unsealed.index.footer(&segment.header, unsealed.data_end);
        (footer, trailer, unsealed.data_end)
    };
    let open = segment.header.name(SegmentState::Open).path(dir);
    let file = disk.open(&open, OpenMode::ReadWrite)?;
    let file_bytes = data_end + footer.len() as u64;
    file.write_at(data_end, &footer)?;
    file.set_len(ByteLen(file_bytes))?;
    file.flush()?;
    let marks = match &*segment.state() {
        State::Unsealed(unsealed) => unsealed.index.marks().to_vec(),
        State::Sealed(_) => return Ok(()),
    };
    disk.rename(&open, &segment.header.name(SegmentState::Sealed).path(dir))?;
    segment.set_sealed(Sealed { trailer, marks, file_bytes });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Codec, GroupId, SourceSeq, StreamId, Term, TimelineId, WriteFlags};

    pub fn header() -> SegmentHeader {
        SegmentHeader {
            group: GroupId([1; 16]),
            timeline: TimelineId(0),
            term: Term(1),
            incarnation: 1,
            ordinal: 0,
            first_lsn: Lsn(100),
            segment_bytes: 1 << 20,
            before: Carry::default(),
        }
    }

    fn rng(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move |below| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s % below
        }
    }

    #[test]
    fn lookups_in_memory_and_by_fences_agree_with_a_list() {
        for seed in 1..40 {
            let mut draw = rng(seed);
            let header = header();
            let mut index = MemIndex::new(&header);
            let mut all = Vec::new();
            for i in 0..600u64 {
                let long = draw(20) == 0;
                let sectors = if long { 1 + draw(5000) } else { 1 + draw(40) };
                let record = Record {
                    lsn: Lsn(100 + i),
                    kind: if long { RecordKind::Discard } else { RecordKind::Write },
                    flags: WriteFlags::NONE,
                    volume: VolumeId(draw(3) as u32),
                    extent: Extent::new(draw(10_000), sectors),
                    codec: Codec::Raw,
                    stored_len: 0,
                    payload_crc: 0,
                    time: HistoryTime(i),
                    source_wall_us: 0,
                    stream: StreamId([1; 16]),
                    seq: SourceSeq(i + 1),
                    term: Term(1),
                };
                index.insert(&record, i as u32, None);
                all.push(record);
            }
            let sorted = index.sorted();
            let fences = Fences::new(
                sorted
                    .chunk_by(|a, b| a.volume == b.volume)
                    .flat_map(|v| v.chunks(EXTENTS_PER_PAGE))
                    .map(|p| format::push_extent_page(&mut Vec::new(), header.first_lsn, p))
                    .collect(),
            );
            let pages: Vec<&[ExtentEntry]> =
                sorted.chunk_by(|a, b| a.volume == b.volume).flat_map(|v| v.chunks(EXTENTS_PER_PAGE)).collect();
            for _ in 0..50 {
                let (volume, extent) = (VolumeId(draw(3) as u32), Extent::new(draw(11_000), 1 + draw(64)));
                let upto = Lsn(99 + draw(602));
                let mut want: Vec<Lsn> = all
                    .iter()
                    .filter(|r| r.volume == volume && r.lsn <= upto && r.extent.intersect(&extent).is_some())
                    .map(|r| r.lsn)
                    .collect();
                want.sort();
                let mut found = Vec::new();
                index.lookup(volume, extent, upto, &mut found);
                let mut got: Vec<Lsn> = found.iter().map(|e| e.lsn).collect();
                got.sort();
                assert_eq!(got, want, "seed {seed}: memory, {extent:?}");
                let mut got: Vec<Lsn> = fences
                    .pages(volume, extent)
                    .into_iter()
                    .flat_map(|p| pages[p].iter())
                    .filter(|e| e.lsn <= upto && e.extent.intersect(&extent).is_some())
                    .map(|e| e.lsn)
                    .collect();
                got.sort();
                assert_eq!(got, want, "seed {seed}: fences, {extent:?}");
            }
        }
    }
}
