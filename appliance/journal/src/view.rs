//! A group's volumes as of one recovery point, read-only.
//!
//! For every sector: the newest version at or below the view's LSN, else the base. A read asks, newest first, and stops when
//! every sector has its answer:
//!
//! 1. the segment that contains the view's LSN, with only the versions up to it;
//! 2. the segments before it, by merged runs of the index where there are any ([`Shape::cover`](crate::index::Shape::cover)),
//!    by footers or the memory of unsealed segments where there are none;
//! 3. the same for the parent timeline up to the branch point, and its parent;
//! 4. the base.
//!
//! Opening a view touches no file. What a read costs does not depend on the length of the history but by a logarithm, as long
//! as the index is there; without it each segment's fences are asked in memory and at most some of its pages are read.
//!
//! Damage is met only by a read that needs the damaged bytes, and named. A doubt about the index is no damage: the read is
//! done again from footers, which always say the same.

use crate::{
    Corruption, Damage, ReadError, ReadViewError,
    base::BaseError,
    cache::Lru,
    format::{self, ExtentEntry},
    index::{IndexStore, Piece, PieceKind, Source, take_missing},
    segment::{self, Segment},
    shared::{Lease, Line, Link, Map, Shared},
    types::{Allocation, ResolvedPoint},
};
use model::{
    ByteLen, Codec, Extent, ExtentSet, GroupSpec, Lsn, RecordKind, SECTOR, Sectors, TimelineId, VolumeId, VolumeSpec,
};
use std::sync::Arc;

/// A read is planned for so many sectors at a time (64 MiB), so that a huge range does not gather a huge plan.
const WINDOW_SECTORS: u64 = 1 << 17;
/// More holes than this are asked for with one range around all of them.
const HOLES_MAX: usize = 8;
/// A read that loses its segments to a fold starts again; folds are seconds apart, so this never ends a healthy read.
const RETRIES_MAX: usize = 32;

/// Decoded payloads, shared by the views of one reader: segment (tag and ordinal; a tag alone is a hash), offset.
pub type RecordCache = Lru<(u64, u32, u32), Kept>;

/// A record's data, and what it stands for.
#[derive(Clone)]
pub struct Kept {
    volume: VolumeId,
    extent: Extent,
    data: Arc<Vec<u8>>,
}

impl Kept {
    fn holds(&self, volume: VolumeId, want: Extent, skip: u64) -> bool {
        self.volume == volume
            && self.extent.start().checked_add(skip) == Some(want.start())
            && self.extent.end() >= want.end()
            && self.data.len() as u64 == self.extent.bytes()
    }
}

/// Where the data of a stretch comes from.
enum From {
    Record { segment: Arc<Segment>, offset: u32, skip: u64 },
    Zero,
    Base,
}

struct Part {
    extent: Extent,
    from: From,
}

/// Why a plan has to be made again.
enum PlanError {
    /// The index did not answer, or answered what cannot be.
    Index,
    Read(ReadError),
}

impl<E: Into<ReadError>> std::convert::From<E> for PlanError {
    fn from(e: E) -> Self {
        Self::Read(e.into())
    }
}

/// What a view is, without its lease; [`View`] and the fold use it.
pub struct Moment {
    pub shared: Arc<Shared>,
    pub cache: Arc<RecordCache>,
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

impl Moment {
    fn plan(
        &self,
        map: &Map,
        index: Option<&dyn IndexStore>,
        volume: VolumeId,
        extent: Extent,
    ) -> Result<Vec<Part>, PlanError> {
        let mut missing: ExtentSet = [extent].into_iter().collect();
        let mut parts = Vec::new();
        for link in map.chain(self.timeline, self.lsn) {
            if missing.is_empty() {
                break;
            }
            self.plan_link(map, index, volume, link, &mut missing, &mut parts)?;
        }
        parts.extend(missing.iter().map(|extent| Part { extent, from: From::Base }));
        parts.sort_unstable_by_key(|p| p.extent.lba);
        Ok(parts)
    }

    fn plan_link(
        &self,
        map: &Map,
        index: Option<&dyn IndexStore>,
        volume: VolumeId,
        link: Link,
        missing: &mut ExtentSet,
        parts: &mut Vec<Part>,
    ) -> Result<(), PlanError> {
        let Some(line) = map.line(link.timeline) else { return Ok(()) };
        let Some(mut at) = line.position(link.upto) else { return Ok(()) };
        // The segment in which the link ends, if it goes on behind; whole segments can be answered by runs. One that is not sealed may
        // go on at any time: by the time the index is asked, a run of it could hold what came later.
        if line.segments[at].sealed().is_none_or(|s| s.trailer.last_lsn > link.upto) {
            self.ask_segment(&line.segments[at], volume, link.upto, missing, parts)?;
            match at.checked_sub(1) {
                Some(before) => at = before,
                None => return Ok(()),
            }
        }
        let Some(index) = index else { return self.plan_by_footers(line, at, volume, link.upto, missing, parts) };
        let end = line.segments[at].header.ordinal + 1;
        let have = |run| self.shared.has_run(index, line, run);
        for source in self.shared.shape.cover(link.timeline, line.first_kept(), end, have) {
            if missing.is_empty() {
                break;
            }
            match source {
                Source::Run(run) => {
                    let mut found = Vec::new();
                    for extent in ranges_of(missing) {
                        index.lookup(run, volume, extent, &mut found).map_err(|_| PlanError::Index)?;
                    }
                    let mut pieces = Vec::new();
                    take_missing(missing, &found, &mut pieces);
                    for piece in pieces {
                        let from = Self::source_of(line, &piece)?;
                        parts.push(Part { extent: piece.extent(), from });
                    }
                }
                Source::Footer(ordinal) => {
                    let segment = line.by_ordinal(ordinal).ok_or(PlanError::Index)?;
                    self.ask_segment(segment, volume, link.upto, missing, parts)?;
                }
            }
        }
        Ok(())
    }

    /// The same without an index: segment by segment from `at` down. A journal that was opened for reading in spite of damage
    /// may lack records; stepping over such a hole could show something older than what was written.
    fn plan_by_footers(
        &self,
        line: &Line,
        at: usize,
        volume: VolumeId,
        upto: Lsn,
        missing: &mut ExtentSet,
        parts: &mut Vec<Part>,
    ) -> Result<(), PlanError> {
        let hole = |from: Lsn, to: Lsn| {
            let file = format::segment_dir(&self.shared.dir);
            PlanError::Read(Corruption { file, offset: 0, what: Damage::Missing { from, to } }.into())
        };
        let mut above = line.segments[at].last_lsn().min(upto).next();
        for segment in line.segments[..=at].iter().rev() {
            if missing.is_empty() {
                return Ok(());
            }
            if segment.last_lsn().next() < above {
                return Err(hole(segment.last_lsn().next(), above.prev()));
            }
            self.ask_segment(segment, volume, upto, missing, parts)?;
            above = segment.first_lsn();
        }
        if !missing.is_empty() && above.prev() > line.start {
            return Err(hole(line.start.next(), above.prev()));
        }
        Ok(())
    }

    /// What a piece of the index stands for.
    fn source_of(line: &Line, piece: &Piece) -> Result<From, PlanError> {
        if piece.ordinal < line.first_kept() {
            return Ok(From::Base); // folded: the base has it
        }
        match piece.kind {
            PieceKind::Zero => Ok(From::Zero),
            PieceKind::Data => {
                let segment = line.by_ordinal(piece.ordinal).ok_or(PlanError::Index)?;
                let (offset, skip) = (piece.offset, piece.skip.into());
                Ok(From::Record { segment: Arc::clone(segment), offset, skip })
            }
        }
    }

    fn ask_segment(
        &self,
        segment: &Arc<Segment>,
        volume: VolumeId,
        upto: Lsn,
        missing: &mut ExtentSet,
        parts: &mut Vec<Part>,
    ) -> Result<(), ReadError> {
        let mut found: Vec<ExtentEntry> = Vec::new();
        for extent in ranges_of(missing) {
            self.shared.lookup(segment, volume, extent, upto, &mut found)?;
        }
        found.sort_unstable_by_key(|e| std::cmp::Reverse(e.lsn));
        for entry in found {
            for hole in missing.overlap(&entry.extent) {
                let from = match entry.kind {
                    RecordKind::Write => From::Record {
                        segment: Arc::clone(segment),
                        offset: entry.offset,
                        skip: hole.start() - entry.extent.start(),
                    },
                    _ => From::Zero,
                };
                parts.push(Part { extent: hole, from });
            }
            missing.remove(&entry.extent);
            if missing.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Runs `act` on a plan; plans again without the index when that is in doubt, and with a newer map when a fold has taken
    /// segments away.
    fn with_plan<T>(
        &self,
        volume: VolumeId,
        extent: Extent,
        mut act: impl FnMut(bool, &[Part]) -> Result<T, PlanError>,
    ) -> Result<T, ReadError> {
        let mut use_index = true;
        let mut tries = 0;
        loop {
            let map = self.shared.map();
            let index = if use_index { self.shared.index() } else { None };
            let result =
                self.plan(&map, index.as_deref(), volume, extent).and_then(|parts| act(index.is_some(), &parts));
            match result {
                Ok(out) => return Ok(out),
                Err(PlanError::Index) if use_index => use_index = false,
                // Without an index nothing can be in doubt but a segment that is gone since the map was taken.
                Err(PlanError::Index) if tries < RETRIES_MAX => tries += 1,
                Err(PlanError::Index) => {
                    let file = self.shared.dir.clone();
                    return Err(
                        Corruption { file, offset: 0, what: Damage::Missing { from: self.lsn, to: self.lsn } }.into()
                    );
                }
                Err(PlanError::Read(ReadError::Disk(e))) if e.is_not_found() && tries < RETRIES_MAX => {
                    if Arc::ptr_eq(&map, &self.shared.map()) {
                        return Err(e.into()); // nothing was folded: the file is really gone
                    }
                    tries += 1;
                }
                Err(PlanError::Read(e)) => return Err(e),
            }
        }
    }

    /// Whether no fold was ever finished: what no segment has was never written. Asked after the plan was made, not of the plan's map: a
    /// first fold may have ended in between, and runs of the index made since leave out what it took.
    fn no_base(&self) -> bool {
        self.shared.map().floor.lsn == Lsn::ZERO
    }

    fn read_base(&self, volume: VolumeId, lba: u64, out: &mut [u8]) -> Result<(), ReadError> {
        if self.no_base() {
            out.fill(0);
            return Ok(());
        }
        self.shared.base.read(volume, lba, out).map_err(base_error)
    }

    /// Fills `buf` from whole sectors.
    fn read_sectors(&self, volume: VolumeId, extent: Extent, buf: &mut [u8]) -> Result<(), ReadError> {
        self.with_plan(volume, extent, |indexed, parts| {
            for part in parts {
                let start = ((part.extent.start() - extent.start()) * SECTOR) as usize;
                let out = &mut buf[start..start + part.extent.bytes() as usize];
                match &part.from {
                    From::Zero => out.fill(0),
                    From::Base => self.read_base(volume, part.extent.start(), out)?,
                    From::Record { segment, offset, skip } => {
                        let data = fetch(&self.shared, &self.cache, segment, *offset, volume, part.extent, *skip);
                        let data = data.map_err(|e| match e {
                            // The record is whole, what pointed at it is wrong; when that was the index, ask the footers.
                            ReadError::Corrupt(Corruption { what: Damage::FooterDisagrees { .. }, .. }) if indexed => {
                                PlanError::Index
                            }
                            e => e.into(),
                        })?;
                        let at = (skip * SECTOR) as usize;
                        out.copy_from_slice(&data[at..at + out.len()]);
                    }
                }
            }
            Ok(())
        })
    }

    /// Fills `buf` from any byte on; the range is inside the volume.
    pub fn read(&self, volume: VolumeId, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let first = at / SECTOR;
            let head = (at % SECTOR) as usize;
            let window = rest.len().min((WINDOW_SECTORS * SECTOR) as usize - head);
            let (now, later) = rest.split_at_mut(window);
            let end = (at + window as u64).div_ceil(SECTOR);
            let extent = Extent::between(first, end);
            if head == 0 && (window as u64).is_multiple_of(SECTOR) {
                self.read_sectors(volume, extent, now)?;
            } else {
                let mut whole = vec![0; extent.bytes() as usize];
                self.read_sectors(volume, extent, &mut whole)?;
                now.copy_from_slice(&whole[head..head + window]);
            }
            at += window as u64;
            rest = later;
        }
        Ok(())
    }

    pub fn allocation(&self, volume: VolumeId, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ReadError> {
        let mut out: Vec<(Extent, Allocation)> = Vec::new();
        let mut push = |extent: Extent, kind| match out.last_mut() {
            _ if extent.is_empty() => {}
            Some((last, before)) if *before == kind && last.end() == extent.start() => {
                *last = Extent::between(last.start(), extent.end());
            }
            _ => out.push((extent, kind)),
        };
        let mut at = extent.start();
        while at < extent.end() {
            let window = Extent::between(at, extent.end().min(at + WINDOW_SECTORS));
            let parts = self.with_plan(volume, window, |_, parts| {
                let mut found: Vec<(Extent, Allocation)> = Vec::new();
                for part in parts {
                    match part.from {
                        From::Record { .. } => found.push((part.extent, Allocation::Data)),
                        From::Zero => found.push((part.extent, Allocation::Zero)),
                        From::Base if self.no_base() => found.push((part.extent, Allocation::Zero)),
                        From::Base => {
                            let written = self.shared.base.written(volume, part.extent).map_err(base_error)?;
                            let mut from = part.extent.start();
                            for data in written.iter().filter_map(|e| e.intersect(&part.extent)) {
                                found.push((Extent::between(from, data.start()), Allocation::Zero));
                                found.push((data, Allocation::Data));
                                from = data.end();
                            }
                            found.push((Extent::between(from, part.extent.end()), Allocation::Zero));
                        }
                    }
                }
                Ok(found)
            })?;
            parts.into_iter().for_each(|(extent, kind)| push(extent, kind));
            at = window.end();
        }
        Ok(out)
    }
}

/// The decoded data of the record at `offset`, which must hold sectors `want` of the volume from its sector `skip` on.
pub fn fetch(
    shared: &Shared,
    cache: &RecordCache,
    segment: &Segment,
    offset: u32,
    volume: VolumeId,
    want: Extent,
    skip: u64,
) -> Result<Arc<Vec<u8>>, ReadError> {
    let key = (segment.tag, segment.header.ordinal, offset);
    let end = (skip + want.sectors.0) * SECTOR;
    if let Some(kept) = cache.get(&key)
        && kept.holds(volume, want, skip)
    {
        return Ok(kept.data);
    }
    let file = shared.file(segment)?;
    let path = segment.path(&shared.dir);
    let (record, payload) = segment::read_record(&*file, &path, segment.tag, offset.into(), end as usize)?;
    let data = match record.codec {
        _ if record.kind != RecordKind::Write => Vec::new(),
        Codec::Raw if payload.len() as u64 == record.extent.bytes() => payload,
        _ => format::decode_payload(&record, &payload, &path, offset.into())?,
    };
    let kept = Kept { volume: record.volume, extent: record.extent, data: Arc::new(data) };
    if !kept.holds(volume, want, skip) {
        let what = Damage::FooterDisagrees { lsn: record.lsn };
        return Err(Corruption { file: path, offset: offset.into(), what }.into());
    }
    // Used up by this read: keeping it would only push others out.
    if want.sectors < record.extent.sectors {
        cache.put(key, kept.clone(), kept.data.len());
    }
    Ok(kept.data)
}

/// The base's errors, as a reader tells them.
pub fn base_error(e: BaseError) -> ReadError {
    match e {
        BaseError::Corruption(c) => c.into(),
        BaseError::Disk(e) => e.into(),
        other => ReadError::Base(Box::new(other)),
    }
}

/// What is still missing, in ranges worth asking for.
fn ranges_of(missing: &ExtentSet) -> Vec<Extent> {
    if missing.run_count() <= HOLES_MAX {
        return missing.iter().collect();
    }
    let start = missing.first().map_or(0, |e| e.start());
    let end = missing.iter().last().map_or(start, |e| e.end());
    vec![Extent::between(start, end)]
}

/// A group as of one recovery point. While it is open, nothing it needs is folded or deleted.
pub struct View {
    moment: Moment,
    point: ResolvedPoint,
    spec: Arc<GroupSpec>,
    _lease: Lease,
}

impl View {
    pub(crate) fn new(moment: Moment, point: ResolvedPoint, spec: Arc<GroupSpec>, lease: Lease) -> Self {
        Self { moment, point, spec, _lease: lease }
    }
    pub fn point(&self) -> ResolvedPoint {
        self.point
    }
    pub fn volumes(&self) -> &[VolumeSpec] {
        &self.spec.volumes
    }
    fn size(&self, volume: VolumeId) -> Result<Sectors, ReadViewError> {
        let found = self.spec.volumes.iter().find(|v| v.id == volume);
        found.map(|v| v.sectors).ok_or(ReadViewError::NoVolume(volume))
    }
    /// Fills `buf` from byte `offset_bytes` of the volume on.
    pub fn read(&self, volume: VolumeId, offset_bytes: u64, buf: &mut [u8]) -> Result<(), ReadViewError> {
        let size = ByteLen(self.size(volume)?.bytes());
        let len = buf.len() as u64;
        if offset_bytes.checked_add(len).is_none_or(|end| end > size.0) {
            return Err(ReadViewError::Outside { volume, offset: offset_bytes, len, size });
        }
        Ok(self.moment.read(volume, offset_bytes, buf).inspect_err(|e| self.moment.shared.note_damage(e))?)
    }
    /// What the extent is made of: in order, without holes, neighbours of a kind joined.
    pub fn allocation(&self, volume: VolumeId, extent: Extent) -> Result<Vec<(Extent, Allocation)>, ReadViewError> {
        let size = self.size(volume)?;
        if !extent.fits(size) {
            let (offset, len) = (extent.lba.0.saturating_mul(SECTOR), extent.sectors.0.saturating_mul(SECTOR));
            return Err(ReadViewError::Outside { volume, offset, len, size: ByteLen(size.bytes()) });
        }
        Ok(self.moment.allocation(volume, extent)?)
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View({:?})", self.point)
    }
}
