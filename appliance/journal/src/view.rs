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
//! What was found is remembered ([`crate::plans`]), and so are checksums of records read in parts ([`crate::payload`]): a read of
//! a place asked for before looks nothing up, reads just its bytes, and still checks them. Records that lie behind each other are
//! read together; of many that do not, the disk is told before the first is waited for.
//!
//! Damage is met only by a read that needs the damaged bytes, and named. A doubt about the index is no damage: the read is
//! done again from footers, which always say the same.

use crate::{
    Corruption, Damage, JournalReader, OpenViewError, ReadError, ReadViewError,
    base::BaseError,
    control::BranchPoint,
    format::{self, ExtentEntry, RECORD_HEADER},
    index::{IndexStore, Piece, PieceKind, Source, take_missing},
    payload::{self, Payloads, Place},
    plans::{self, From, Of, Part, Plans},
    segment::Segment,
    shared::{Lease, Line, Link, Map, Shared},
    types::{Allocation, ResolvedPoint},
};
use model::{
    ByteLen, Extent, ExtentSet, GroupSpec, Lsn, RecordKind, SECTOR, Sectors, TimelineId, VolumeId, VolumeSpec,
};
use std::sync::{Arc, PoisonError, RwLock};

/// A read is planned for so many sectors at a time (64 MiB), so that a huge range does not gather a huge plan.
const WINDOW_SECTORS: u64 = 1 << 17;
/// More holes than this are asked for with one range around all of them.
const HOLES_MAX: usize = 8;
/// A read that loses its segments to a fold starts again; folds are seconds apart, so this never ends a healthy read.
const RETRIES_MAX: usize = 32;

/// A read of more parts than this is left to a thread that may wait.
const AT_ONCE_PARTS_MAX: usize = 64;
/// From so many records on the disk is asked whether it must fetch them, to let it fetch them beside each other.
const PROBED_FROM: usize = 4;
/// Records looked at for that.
const PROBES: usize = 4;

/// Decoded payloads kept by one reader, for reads that need a part of a record at a time.
const DECODED_BYTES_MAX: usize = 16 << 20;

/// What the views of one reader remember.
pub struct Caches {
    payloads: Payloads,
    plans: Plans,
}

impl Default for Caches {
    fn default() -> Self {
        Self { payloads: Payloads::new(DECODED_BYTES_MAX), plans: Plans::new(plans::PLANS_BYTES_MAX) }
    }
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

/// Whether what was found is worth remembering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remember {
    /// A view that is read from many times.
    Plans,
    /// The newest state, which is another one at the next read.
    Nothing,
}

/// What a view is, without its lease.
pub struct Moment {
    pub shared: Arc<Shared>,
    pub caches: Arc<Caches>,
    pub remember: Remember,
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

/// Where a plan may come from; each is asked when the one before it was wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trust {
    Remembered,
    Index,
    Footers,
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
                Ok(From::Record(Place { segment: Arc::clone(segment), offset, skip }))
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
                    RecordKind::Write => From::Record(Place {
                        segment: Arc::clone(segment),
                        offset: entry.offset,
                        skip: hole.start() - entry.extent.start(),
                    }),
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

    fn of(&self, volume: VolumeId) -> Of {
        Of { timeline: self.timeline, lsn: self.lsn, volume }
    }
    fn remembered(&self, map: &Map, volume: VolumeId, extent: Extent) -> Option<Vec<Part>> {
        match self.remember {
            Remember::Plans => self.caches.plans.get(self.of(volume), map.floor.lsn, &extent),
            Remember::Nothing => None,
        }
    }
    /// Makes a plan and remembers it.
    fn plan_anew(
        &self,
        map: &Map,
        index: Option<&dyn IndexStore>,
        volume: VolumeId,
        extent: Extent,
    ) -> Result<Vec<Part>, PlanError> {
        if self.remember == Remember::Nothing {
            return self.plan(map, index, volume, extent);
        }
        let whole = plans::whole_chunks(&extent);
        let parts = match self.plan(map, index, volume, whole) {
            Ok(parts) => parts,
            // Something around the extent cannot be found; that is no matter of the extent's own.
            Err(PlanError::Read(_)) if whole != extent => return self.plan(map, index, volume, extent),
            Err(e) => return Err(e),
        };
        self.caches.plans.put(self.of(volume), map.floor.lsn, &whole, &parts);
        Ok(plans::clip(&parts, &extent))
    }

    /// Runs `act` on a plan; plans again without the index when that is in doubt, and with a newer map when a fold has taken
    /// segments away.
    fn with_plan<T>(
        &self,
        volume: VolumeId,
        extent: Extent,
        mut act: impl FnMut(bool, &[Part]) -> Result<T, PlanError>,
    ) -> Result<T, ReadError> {
        let mut trust = Trust::Remembered;
        let mut tries = 0;
        loop {
            let map = self.shared.map();
            let known = if trust == Trust::Remembered { self.remembered(&map, volume, extent) } else { None };
            let was_known = known.is_some();
            let index = if trust == Trust::Footers { None } else { self.shared.index() };
            let doubtful = was_known || index.is_some();
            let result = known
                .map_or_else(|| self.plan_anew(&map, index.as_deref(), volume, extent), Ok)
                .and_then(|parts| act(doubtful, &parts));
            if let Err(PlanError::Index | PlanError::Read(ReadError::Disk(_))) = result {
                self.caches.plans.forget(self.of(volume), &extent);
            }
            match result {
                Ok(out) => return Ok(out),
                Err(PlanError::Index) if was_known => trust = Trust::Index,
                Err(PlanError::Index) if trust != Trust::Footers => trust = Trust::Footers,
                // Without an index nothing can be in doubt but a segment that is gone since the map was taken.
                Err(PlanError::Index) if tries < RETRIES_MAX => tries += 1,
                Err(PlanError::Index) => {
                    let file = self.shared.dir.clone();
                    return Err(
                        Corruption { file, offset: 0, what: Damage::Missing { from: self.lsn, to: self.lsn } }.into()
                    );
                }
                Err(PlanError::Read(ReadError::Disk(e))) if e.is_not_found() && tries < RETRIES_MAX => {
                    if !was_known && Arc::ptr_eq(&map, &self.shared.map()) {
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
        self.shared.base.begins_empty() && self.shared.map().floor.lsn == Lsn::ZERO
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
        self.with_plan(volume, extent, |doubtful, parts| self.fill(doubtful, volume, parts, buf))
    }

    /// Fills `buf` from a plan that covers just it.
    fn fill(&self, doubtful: bool, volume: VolumeId, parts: &[Part], buf: &mut [u8]) -> Result<(), PlanError> {
        self.let_the_disk_begin(parts, false);
        let mut rest = buf;
        let mut take = |part: &Part| {
            let (out, later) = std::mem::take(&mut rest).split_at_mut(part.extent.bytes() as usize);
            rest = later;
            out
        };
        let mut at = 0;
        while let Some(part) = parts.get(at) {
            match &part.from {
                From::Zero => take(part).fill(0),
                From::Base => self.read_base(volume, part.extent.start(), take(part))?,
                From::Record(_) => {
                    let run = payload::run_length(parts[at..].iter().map_while(|p| match &p.from {
                        From::Record(place) => Some((place, p.extent)),
                        From::Zero | From::Base => None,
                    }));
                    let mut pieces: Vec<payload::Piece<'_>> = Vec::with_capacity(run);
                    for part in &parts[at..at + run] {
                        let From::Record(place) = &part.from else { continue };
                        pieces.push(payload::Piece { place, extent: part.extent, out: take(part) });
                    }
                    self.fill_run(doubtful, volume, &mut pieces)?;
                    at += run;
                    continue;
                }
            }
            at += 1;
        }
        Ok(())
    }

    fn fill_run(&self, doubtful: bool, volume: VolumeId, pieces: &mut [payload::Piece<'_>]) -> Result<(), PlanError> {
        let payloads = &self.caches.payloads;
        let mut done = 0;
        while done < pieces.len() {
            if pieces.len() - done > 1 {
                done += payloads.read_run(&self.shared, volume, &mut pieces[done..]);
            }
            let Some(piece) = pieces.get_mut(done) else { break };
            payloads.read(&self.shared, piece.place, volume, piece.extent, piece.out).map_err(|e| match e {
                // The record is whole, what pointed at it is wrong; when that was the index, ask the footers.
                ReadError::Corrupt(Corruption { what: Damage::FooterDisagrees { .. }, .. }) if doubtful => {
                    PlanError::Index
                }
                e => e.into(),
            })?;
            done += 1;
        }
        Ok(())
    }

    /// Tells the disk of all records of a plan when it would have to fetch them one after the other otherwise. `surely`:
    /// without looking first whether they are in memory.
    fn let_the_disk_begin(&self, parts: &[Part], surely: bool) {
        let places = || {
            parts.iter().filter_map(|part| match &part.from {
                From::Record(place) => Some((place, part.extent)),
                From::Zero | From::Base => None,
            })
        };
        let count = places().count();
        if count < PROBED_FROM && !surely {
            return;
        }
        let cold = |(place, _): (&Place, Extent)| {
            let file = self.shared.file(&place.segment);
            file.is_ok_and(|file| !file.read_cached_at(place.offset.into(), &mut [0; RECORD_HEADER]))
        };
        if !surely && !places().step_by(count.div_ceil(PROBES)).any(cold) {
            return;
        }
        for (place, extent) in places() {
            if let Ok(file) = self.shared.file(&place.segment) {
                file.will_read(place.offset.into(), RECORD_HEADER as u64 + (place.skip + extent.sectors.0) * SECTOR);
            }
        }
    }

    /// Fills `buf` (whole sectors) without waiting for anything; false when that cannot be.
    fn read_at_once(&self, volume: VolumeId, extent: Extent, buf: &mut [u8]) -> bool {
        let map = self.shared.map();
        let Some(parts) = self.remembered(&map, volume, extent) else { return false };
        if parts.len() > AT_ONCE_PARTS_MAX {
            return false;
        }
        let mut rest = buf;
        parts.iter().all(|part| {
            let (out, later) = std::mem::take(&mut rest).split_at_mut(part.extent.bytes() as usize);
            rest = later;
            match &part.from {
                From::Zero => out.fill(0),
                From::Base if self.no_base() => out.fill(0),
                From::Base => return self.shared.base.read_at_once(volume, part.extent.start(), out),
                From::Record(place) => {
                    return self.caches.payloads.read_at_once(&self.shared, place, volume, part.extent, out);
                }
            }
            true
        })
    }

    /// Has the disk bring the extent into memory, without waiting for it.
    fn prefetch(&self, volume: VolumeId, extent: Extent) -> Result<(), ReadError> {
        self.with_plan(volume, extent, |_, parts| {
            self.let_the_disk_begin(parts, true);
            for part in parts.iter().filter(|part| matches!(part.from, From::Base)) {
                self.shared.base.prefetch(volume, part.extent);
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
                        From::Record(_) => found.push((part.extent, Allocation::Data)),
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
    /// The moment, as a branch that goes on from it names it.
    pub fn branch_point(&self) -> BranchPoint {
        BranchPoint { group: self.spec.id, timeline: self.point.timeline, lsn: self.point.lsn }
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
    /// The same from what memory holds, without waiting for a disk or a lock held for long: may be called from where nothing may
    /// block. False: it was not filled (or only in part); [`View::read`] does it, or says why not. Never true with wrong bytes.
    pub fn read_at_once(&self, volume: VolumeId, offset_bytes: u64, buf: &mut [u8]) -> bool {
        let len = buf.len() as u64;
        if !offset_bytes.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) || len == 0 {
            return false;
        }
        let Ok(size) = self.size(volume) else { return false };
        let extent = Extent::new(offset_bytes / SECTOR, len / SECTOR);
        extent.fits(size) && self.moment.read_at_once(volume, extent, buf)
    }
    /// Has the disk bring the range into memory for a read that is sure to come; does not wait for it. What lies behind the
    /// volume's end is left out.
    pub fn prefetch(&self, volume: VolumeId, offset_bytes: u64, len: u64) -> Result<(), ReadViewError> {
        let size = self.size(volume)?;
        let end = offset_bytes.saturating_add(len).div_ceil(SECTOR).min(size.0);
        let start = offset_bytes / SECTOR;
        if start < end {
            self.moment.prefetch(volume, Extent::between(start, end.min(start + WINDOW_SECTORS)))?;
        }
        Ok(())
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

/// A view that outlives its journal's handle. A journal that failed is opened again, as another [`Journal`](crate::Journal): a view of the
/// earlier one holds nothing back in the new one. Whoever opens it puts a view of the same moment here before any job runs.
#[derive(Debug)]
pub struct ViewHandle {
    now: RwLock<Arc<View>>,
}

impl ViewHandle {
    pub fn new(view: View) -> Arc<Self> {
        Arc::new(Self { now: RwLock::new(Arc::new(view)) })
    }
    pub fn get(&self) -> Arc<View> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }
    pub fn point(&self) -> ResolvedPoint {
        self.get().point
    }
    /// Takes the view of the same moment from the journal as it was opened again.
    pub fn move_to(&self, reader: &JournalReader) -> Result<(), OpenViewError> {
        let view = Arc::new(reader.view(self.point())?);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = view;
        Ok(())
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View({:?})", self.point)
    }
}
