//! Reading a journal: what can be recovered, views, records, pictures. Cloned to whoever reads; never blocks the writer for
//! longer than a lookup in memory.

use crate::{
    Corruption, GapState, OpenError, OpenViewError, ReadError, ResolveError,
    base::{Base, ImageBase},
    control::{BranchPoint, Control, ControlRecord},
    format::{self, ExtentEntry, RECORD_HEADER, TableEntry},
    index::Shape,
    load::{self, Mode},
    points::History,
    segment::{self, Segment},
    shared::{LeaseError, Map, Shared},
    stats::{self, JournalStats},
    trunk::Trunk,
    types::{Points, RateBucket, ResolvedPoint, TimelineInfo, VerifyProgress, VerifyReport},
    verify,
    view::{Caches, Moment, Remember, View, ViewHandle},
    writer::check_trunk,
};
use durable::Disk;
use model::{
    ExtentSet, GroupId, GroupSpec, HistoryTime, Lsn, Mark, Record, RecordKind, RecoveryPoint, TimelineId, VolumeId,
};
use std::{path::Path, sync::Arc};

/// A handle for reading; clones share their caches.
#[derive(Clone)]
pub struct JournalReader {
    pub(crate) shared: Arc<Shared>,
    caches: Arc<Caches>,
    damage: Arc<Vec<Corruption>>,
}

impl std::fmt::Debug for JournalReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JournalReader({})", self.shared.dir.display())
    }
}

impl JournalReader {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, caches: Arc::default(), damage: Arc::default() }
    }

    /// Opens a journal that no daemon has open, changes nothing, needs no index, and goes on in spite of damage: what is
    /// whole can be read, and [`JournalReader::damage`] lists the rest. A read that would need what is missing says so.
    pub fn open_offline(disk: Arc<dyn Disk>, dir: &Path) -> Result<JournalReader, OpenError> {
        Self::offline_on(disk, dir, None)
    }

    /// The same for a branch, with a view of the moment it goes on from: that of [`OpenError::NeedsTrunk`].
    pub fn open_offline_branch(
        disk: Arc<dyn Disk>,
        dir: &Path,
        on: Arc<ViewHandle>,
    ) -> Result<JournalReader, OpenError> {
        Self::offline_on(disk, dir, Some(on))
    }

    fn offline_on(disk: Arc<dyn Disk>, dir: &Path, on: Option<Arc<ViewHandle>>) -> Result<JournalReader, OpenError> {
        let control = Control::load(Arc::clone(&disk), dir).map_err(OpenError::Control)?;
        let record = control.ok_or_else(|| OpenError::NoJournal { dir: dir.to_owned() })?.record();
        check_trunk(record.branching.on, on.as_deref())?;
        let loaded = load::load(&*disk, dir, &record, Mode::Lenient)?;
        let mut damage = loaded.damage;
        let base: Arc<dyn Base> = match on {
            Some(view) => Arc::new(Trunk::new(view)),
            None => Arc::new(offline_base(&disk, dir, &record, &mut damage)?),
        };
        let map = Map {
            spec: Arc::new(record.spec),
            lines: loaded.lines,
            current: record.current,
            floor: record.floor,
            cutoff: record.cutoff,
            released: Arc::new(record.released),
            branching: Arc::new(record.branching),
        };
        let shared = Shared::new(disk, dir.to_owned(), Shape::default(), map, base);
        let mut reader = Self::new(Arc::new(shared));
        reader.damage = Arc::new(damage);
        Ok(reader)
    }

    /// What [`JournalReader::open_offline`] found damaged.
    pub fn damage(&self) -> &[Corruption] {
        &self.damage
    }
    pub fn spec(&self) -> GroupSpec {
        GroupSpec::clone(&self.shared.map().spec)
    }
    /// The moment of another group's journal that this one goes on from, if it is a branch.
    pub fn branch_point(&self) -> Option<BranchPoint> {
        self.shared.map().branching.on
    }
    /// Other groups' journals that go on from a moment of this one.
    pub fn branches(&self) -> Vec<(GroupId, TimelineId, Lsn)> {
        let map = self.shared.map();
        map.branching.branches.iter().map(|(group, (timeline, lsn))| (*group, *timeline, *lsn)).collect()
    }
    /// Sectors of a volume that records of the current timeline behind `after`, up to `upto`, have changed.
    pub fn changed(&self, volume: VolumeId, after: Lsn, upto: Lsn) -> Result<ExtentSet, ReadError> {
        let map = self.shared.map();
        let mut changed = ExtentSet::new();
        for (segment, end) in map.history(map.current, upto.min(map.current().written())) {
            if segment.last_lsn() <= after {
                continue;
            }
            let inside = |e: &&ExtentEntry| e.volume == volume && e.lsn > after && e.lsn <= end;
            for entry in self.shared.all_extents(&segment)?.iter().filter(inside) {
                changed.insert(entry.extent);
            }
        }
        Ok(changed)
    }
    pub fn timelines(&self) -> Vec<TimelineInfo> {
        let map = self.shared.map();
        let live = map.lines.values().filter(|l| l.live);
        live.map(|l| TimelineInfo { id: l.id, parent: l.parent, last_lsn: l.written(), current: l.id == map.current })
            .collect()
    }
    /// What can be recovered on the current timeline.
    pub fn points(&self) -> Points {
        let map = self.shared.map();
        History::new(&self.shared, &map, map.current, map.current().written()).points()
    }
    /// Whether recovery points are being offered at the end of what is written.
    pub fn gap_state(&self) -> GapState {
        let map = self.shared.map();
        let end = map.current().written();
        let marks = map.history(map.current, end).into_iter().flat_map(|(s, upto)| s.marks(upto));
        marks.fold(map.floor.gap, |state, entry| state.after(entry.lsn, &entry.mark))
    }
    /// The recovery point a wish means; a refusal names the nearest ones.
    pub fn resolve(&self, point: &RecoveryPoint) -> Result<ResolvedPoint, ResolveError> {
        let map = self.shared.map();
        History::new(&self.shared, &map, map.current, map.current().written()).resolve(point)
    }
    /// The same on another timeline; None when there is no such timeline.
    pub fn points_on(&self, timeline: TimelineId) -> Option<Points> {
        let map = self.shared.map();
        let end = map.line(timeline)?.written();
        Some(History::new(&self.shared, &map, timeline, end).points())
    }
    /// The same on another timeline; None when there is no such timeline.
    pub fn resolve_on(
        &self,
        timeline: TimelineId,
        point: &RecoveryPoint,
    ) -> Option<Result<ResolvedPoint, ResolveError>> {
        let map = self.shared.map();
        let end = map.line(timeline)?.written();
        Some(History::new(&self.shared, &map, timeline, end).resolve(point))
    }
    /// Opens the group as of a point. Reads no file.
    pub fn view(&self, at: ResolvedPoint) -> Result<View, OpenViewError> {
        let map = self.shared.map();
        let line = map.line(at.timeline).ok_or(OpenViewError::NoTimeline(at.timeline))?;
        if at.lsn > line.written() {
            return Err(OpenViewError::AfterEnd { lsn: at.lsn, end: line.written() });
        }
        let lease = self.shared.lease(at.timeline, at.lsn, true).map_err(|e| match e {
            LeaseError::BelowCutoff(floor) => OpenViewError::BeforeFloor { lsn: at.lsn, floor },
            LeaseError::TooMany(open) => OpenViewError::TooMany { open, max: crate::shared::VIEWS_MAX },
        })?;
        Ok(View::new(self.moment(at, Remember::Plans), at, Arc::clone(&map.spec), lease))
    }
    /// The newest state that is written, whether or not it is a recovery point: for those who read back what they wrote.
    pub fn head_view(&self) -> View {
        loop {
            let map = self.shared.map();
            let (timeline, lsn) = (map.current, map.current().written());
            // Below the cutoff only when a fold passed between the two lines; the next try sees the newer map.
            let Ok(lease) = self.shared.lease(timeline, lsn, false) else { continue };
            // No record was read: the time is that of the segment's end, for showing.
            let time = map.segment_of(timeline, lsn).map_or(map.floor.time, |s| s.summary().last_time);
            let at = ResolvedPoint { timeline, lsn, time };
            return View::new(self.moment(at, Remember::Nothing), at, Arc::clone(&map.spec), lease);
        }
    }
    fn moment(&self, at: ResolvedPoint, remember: Remember) -> Moment {
        let (shared, caches) = (Arc::clone(&self.shared), Arc::clone(&self.caches));
        Moment { shared, caches, remember, timeline: at.timeline, lsn: at.lsn }
    }

    /// Bytes and writes over time, in at most `buckets` steps of equal length: for pictures. Inside a sealed segment the curve
    /// is known at some dozens of points and taken as straight between them.
    pub fn rate_history(&self, buckets: usize) -> Vec<RateBucket> {
        let map = self.shared.map();
        stats::rate_history(&map, buckets.clamp(1, 10_000))
    }

    /// All records of the current timeline from `from` on, in LSN order, up to what is written now. A damaged record is an
    /// error in its place; the ones behind it still come.
    pub fn records(&self, from: Lsn) -> RecordIter {
        let map = self.shared.map();
        let end = map.current().written();
        let segments = map.history(map.current, end);
        let first = segments.first().map_or(Lsn(1), |(s, _)| s.first_lsn());
        RecordIter { shared: Arc::clone(&self.shared), segments, next: from.max(first), at: 0, page: None }
    }
    /// Checks every checksum of segments and base, and that index and footers say what the records say.
    pub fn verify(&self, progress: &mut dyn FnMut(VerifyProgress)) -> VerifyReport {
        let mut report = verify::verify(&self.shared, progress);
        // An offline open found these before; segments it could not even name are in no list.
        for corruption in self.damage.iter() {
            if !report.damage.contains(corruption) {
                report.damage_count += 1;
                report.damage.insert(0, corruption.clone());
            }
        }
        self.shared.set_damage(report.damage.first().cloned());
        report
    }
    pub fn stats(&self) -> JournalStats {
        stats::stats(&self.shared)
    }
    /// Marks of the current timeline but watermarks, up to what is written.
    pub fn marks(&self) -> Vec<(Lsn, HistoryTime, Mark)> {
        let map = self.shared.map();
        let all = map.history(map.current, map.current().written()).into_iter().flat_map(|(s, upto)| s.marks(upto));
        all.map(|m| (m.lsn, m.time, m.mark)).collect()
    }
}

/// The base as far as it is whole; what is not is noted.
fn offline_base(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    record: &ControlRecord,
    damage: &mut Vec<Corruption>,
) -> Result<ImageBase, OpenError> {
    let interrupted = (record.cutoff > record.floor.lsn).then_some(record.cutoff);
    let base = ImageBase::open_read_only(Arc::clone(disk), &format::base_dir(dir), interrupted);
    for volume in &record.spec.volumes {
        let opened = base.ensure_volume(volume.id, volume.sectors, record.based.contains(&volume.id));
        match opened.map_err(crate::view::base_error) {
            Ok(()) => {}
            Err(ReadError::Corrupt(corruption)) => damage.push(corruption),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(base)
}

/// A record as it stands in the journal; its payload is read when it is asked for.
pub struct JournalRecord {
    pub record: Record,
    /// Of the record's header, in `file`.
    pub offset: u64,
    shared: Arc<Shared>,
    segment: Arc<Segment>,
}

impl JournalRecord {
    /// The segment file it lies in.
    pub fn file(&self) -> std::path::PathBuf {
        self.segment.path(&self.shared.dir)
    }
    /// The payload as stored, checked.
    pub fn payload(&self) -> Result<Vec<u8>, ReadError> {
        let file = self.shared.file(&self.segment)?;
        let guess = self.record.stored_len as usize;
        segment::read_record(&*file, &self.file(), self.segment.tag, self.offset, guess).map(|(_, payload)| payload)
    }
    /// What the extent reads as after this record: the decoded payload; empty for records that hold no data.
    pub fn data(&self) -> Result<Vec<u8>, ReadError> {
        if self.record.kind != RecordKind::Write {
            return Ok(Vec::new());
        }
        Ok(format::decode_payload(&self.record, &self.payload()?, &self.file(), self.offset)?)
    }
    /// What a mark says; None for other records and for marks of a later version.
    pub fn mark(&self) -> Result<Option<Mark>, ReadError> {
        if self.record.kind != RecordKind::Mark {
            return Ok(None);
        }
        Ok(postcard::from_bytes(&self.payload()?).ok())
    }
}

impl std::fmt::Debug for JournalRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {:#x}", self.record, self.offset)
    }
}

/// See [`JournalReader::records`].
pub struct RecordIter {
    shared: Arc<Shared>,
    segments: Vec<(Arc<Segment>, Lsn)>,
    next: Lsn,
    at: usize,
    page: Option<(Lsn, Vec<TableEntry>)>,
}

impl RecordIter {
    fn read(&mut self, segment: &Arc<Segment>, lsn: Lsn) -> Result<JournalRecord, ReadError> {
        let held = self
            .page
            .as_ref()
            .and_then(|(first, entries)| entries.get(usize::try_from(lsn.0.checked_sub(first.0)?).ok()?).copied());
        let entry = match held {
            Some(entry) => entry,
            None => {
                self.page = self.shared.table_page(segment, lsn)?;
                let found = self.page.as_ref().and_then(|(first, e)| e.get((lsn.0 - first.0) as usize).copied());
                found.ok_or_else(|| self.disagree(segment, 0, lsn))?
            }
        };
        let file = self.shared.file(segment)?;
        let path = segment.path(&self.shared.dir);
        let mut header = [0; RECORD_HEADER];
        segment::read_or_short(&*file, &path, entry.offset.into(), &mut header)?;
        let offset = u64::from(entry.offset);
        let record = format::decode_record(&header, segment.tag).ok_or_else(|| Corruption {
            file: path.clone(),
            offset,
            what: crate::Damage::RecordHeader,
        })?;
        if record.lsn != lsn {
            return Err(self.disagree(segment, offset, lsn));
        }
        Ok(JournalRecord { record, offset, shared: Arc::clone(&self.shared), segment: Arc::clone(segment) })
    }
    fn disagree(&self, segment: &Segment, offset: u64, lsn: Lsn) -> ReadError {
        let file = segment.path(&self.shared.dir);
        Corruption { file, offset, what: crate::Damage::FooterDisagrees { lsn } }.into()
    }
}

impl Iterator for RecordIter {
    type Item = Result<JournalRecord, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (segment, upto) = self.segments.get(self.at)?;
            let segment = Arc::clone(segment);
            if self.next > segment.last_lsn().min(*upto) {
                self.at += 1;
                self.page = None;
                continue;
            }
            let lsn = self.next.max(segment.first_lsn());
            self.next = lsn.next();
            return Some(self.read(&segment, lsn));
        }
    }
}
