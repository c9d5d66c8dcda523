//! The single writer of a journal: appends become batches, batches become durable in order.
//!
//! ```text
//! append ──► batch (aligned buffer) ──submit──► write queue, at most `depth` in flight ──poll──► durable
//!              │ full? submits itself             │ completes in any order
//!              │ segment full? drains, rolls      ▼
//!              ▼                               durable = end of the contiguous prefix
//!           index of the open segment
//! ```
//!
//! The payload is copied once, into the batch. Nothing waits but three things, each short and rare: [`Journal::poll`] when asked to,
//! a roll to the next segment (it drains the queue first, so that a segment's name proves everything before it durable), and a
//! small stop-gap segment made on the spot when no prepared one is ready.
//!
//! A write that fails poisons the journal: what is durable is known, what came after is not, so nothing more is accepted until
//! the journal is opened again and recovery has looked.

use crate::{
    AppendError, BookmarkError, BranchError, ControlError, CreateError, HoldError, OpenError, SpecError,
    ageing::Ageing,
    base::{Base, ImageBase},
    control::{self, BranchPoint, Control, ControlRecord, TIMELINES_MAX, TimelineRecord},
    error::SharedDiskError,
    format::{
        self, BATCH_HEADER, BLOCK, BatchHeader, Carry, MAX_DECODED_BYTES, MAX_RECORD_BYTES, MAX_SEGMENT_RECORDS,
        RECORD_HEADER, SegmentHeader, SegmentState, SourceMark,
    },
    index::Shape,
    jobs::JobState,
    load::{self, Mode},
    points::History,
    reader::JournalReader,
    scan::is_possible,
    segment::{self, MemIndex, Segment, State, Unsealed},
    shared::{Line, Map, Shared},
    stats::{self, JournalStats},
    trunk::Trunk,
    types::{JournalOptions, NewRecord, Progress, RecoveryReport, ResolvedPoint, SourcePosition},
    view::ViewHandle,
};
use durable::{AlignedBuf, Disk, DiskError, OpenMode, WriteQueue};
use model::{
    BookmarkName, ByteLen, Codec, Extent, GapReason, GroupId, GroupSpec, HistoryTime, Lsn, Mark, Record, RecordKind,
    Sectors, SourceSeq, StreamId, Term, TimelineId, VolumeId, WriteFlags,
};
use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// A segment made on the spot because none was ready is small, so that the append waits some milliseconds only.
const STOPGAP_BYTES: u64 = 8 << 20;
/// Full segments that wait to be sealed: up to 25 MiB of memory each.
const UNSEALED_MAX: usize = 8;
/// Journals that stand on one: some drills and a takeover; the control record stays small.
const BRANCHES_MAX: usize = 64;

/// The segment that takes appends.
struct Current {
    segment: Arc<Segment>,
    queue: Box<dyn WriteQueue>,
    /// Where the batch that is being built will lie.
    offset: u64,
    end: u64,
    records: u32,
}

/// A batch that is being built.
struct Batch {
    buf: AlignedBuf,
    first: Lsn,
    count: u32,
}

/// A batch on its way to the disk.
struct Flight {
    id: u64,
    last: Lsn,
    /// The source's position at its end.
    source: Option<SourceMark>,
    done: bool,
}

/// The writer's handle. There is one per journal; see the crate's documentation.
pub struct Journal {
    pub(crate) shared: Arc<Shared>,
    pub(crate) control: Arc<Control>,
    pub(crate) options: JournalOptions,
    pub(crate) jobs: JobState,
    spec: Arc<GroupSpec>,
    volumes: BTreeMap<VolumeId, Sectors>,
    term: Term,
    incarnation: u64,
    /// The incarnation is durable: segments of this life may be begun.
    begun: bool,
    group: model::GroupId,
    timeline: TimelineId,
    written: Arc<AtomicU64>,
    appended: Lsn,
    durable: Lsn,
    carry: Carry,
    durable_source: Option<SourceMark>,
    current: Option<Current>,
    batch: Option<Batch>,
    free: Vec<AlignedBuf>,
    flights: VecDeque<Flight>,
    next_flight: u64,
    /// Segments begun, and so write queues made, in this life.
    queues: u64,
    poison: Option<SharedDiskError>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal({}, {:?})", self.shared.dir.display(), self.progress())
    }
}

impl Journal {
    /// Makes an empty journal in `dir`; refused when one is there. The group is not consistent until a mark says so.
    pub fn create(
        disk: Arc<dyn Disk>,
        dir: &Path,
        spec: &GroupSpec,
        term: Term,
        options: JournalOptions,
        now: HistoryTime,
    ) -> Result<Journal, CreateError> {
        Self::create_on(disk, dir, spec, term, options, now, None)
    }

    /// Makes a journal that goes on from a moment of another group's: what is not written in it reads as it was there. That
    /// moment must be held there ([`Journal::hold`]) before, and until this one is deleted.
    pub fn create_branch(
        disk: Arc<dyn Disk>,
        dir: &Path,
        spec: &GroupSpec,
        term: Term,
        options: JournalOptions,
        now: HistoryTime,
        on: Arc<ViewHandle>,
    ) -> Result<Journal, CreateError> {
        Self::create_on(disk, dir, spec, term, options, now, Some(on))
    }

    fn create_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        spec: &GroupSpec,
        term: Term,
        options: JournalOptions,
        now: HistoryTime,
        on: Option<Arc<ViewHandle>>,
    ) -> Result<Journal, CreateError> {
        options.check()?;
        control::check_spec(spec)?;
        let failed = |source| CreateError::Disk { dir: dir.to_owned(), source };
        disk.create_dir(dir).map_err(failed)?;
        if Control::load(Arc::clone(&disk), dir).map_err(CreateError::Control)?.is_some() {
            return Err(CreateError::Exists { dir: dir.to_owned() });
        }
        disk.create_dir(&format::segment_dir(dir)).map_err(failed)?;
        disk.create_dir(&format::base_dir(dir)).map_err(failed)?;
        // The control record comes last: a folder without one is no journal yet, and create may be called again.
        let mut record = ControlRecord::new(spec.clone(), term);
        record.branching.on = on.as_ref().map(|on| on.get().branch_point());
        Control::create(Arc::clone(&disk), dir, record).map_err(CreateError::Control)?;
        match Self::open_on(disk, dir, options, now, on) {
            Ok((journal, _)) => Ok(journal),
            Err(e) => Err(CreateError::Open(Box::new(e))),
        }
    }

    /// Recovers what is in `dir` and gets ready to append. `now` is where the jobs' clock begins.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: JournalOptions,
        now: HistoryTime,
    ) -> Result<(Journal, RecoveryReport), OpenError> {
        Self::open_on(disk, dir, options, now, None)
    }

    /// The same for a branch, with a view of the moment it goes on from ([`JournalReader::branch_point`] says which).
    pub fn open_branch(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: JournalOptions,
        now: HistoryTime,
        on: Arc<ViewHandle>,
    ) -> Result<(Journal, RecoveryReport), OpenError> {
        Self::open_on(disk, dir, options, now, Some(on))
    }

    fn open_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: JournalOptions,
        now: HistoryTime,
        on: Option<Arc<ViewHandle>>,
    ) -> Result<(Journal, RecoveryReport), OpenError> {
        options.check()?;
        let control = Control::load(Arc::clone(&disk), dir).map_err(OpenError::Control)?;
        let control = control.ok_or_else(|| OpenError::NoJournal { dir: dir.to_owned() })?;
        disk.cleanup(dir).map_err(OpenError::Disk)?;
        let record = control.record();
        check_trunk(record.branching.on, on.as_deref())?;
        let loaded = load::load(&*disk, dir, &record, Mode::Strict)?;
        let mut report = loaded.report;
        report.control_fault = control.fault();

        // Seal what was open. A full disk is no reason not to start: such a segment is read from memory until there is room.
        for segment in loaded.lines.values().flat_map(|l| &l.segments).filter(|s| s.sealed().is_none()) {
            match segment::seal(&*disk, dir, segment) {
                Ok(()) => {}
                Err(e) if e.is_full() => report.unsealed += 1,
                Err(e) => return Err(OpenError::Disk(e)),
            }
        }
        let base = open_base(&disk, dir, &record, on)?;
        let ends: Vec<(TimelineId, Lsn)> = loaded.lines.values().map(|l| (l.id, l.written())).collect();
        let begun = match begin_life(&control, &ends) {
            // What there is can be read all the same; the first append tries again.
            Err(e) if e.is_full() => false,
            begun => begun.map(|()| true).map_err(OpenError::Control)?,
        };
        let record = control.record();
        let map = Map {
            spec: Arc::new(record.spec.clone()),
            lines: loaded.lines,
            current: record.current,
            floor: record.floor,
            cutoff: record.cutoff,
            released: Arc::new(record.released.clone()),
            branching: Arc::new(record.branching.clone()),
        };
        let shape = Shape::new(options.segments_per_generation).expect("the options were checked");
        let shared = Arc::new(Shared::new(disk, dir.to_owned(), shape, map, base));
        let mut journal = Journal {
            jobs: JobState::new(&options, now),
            control: Arc::new(control),
            spec: Arc::new(record.spec.clone()),
            volumes: BTreeMap::new(),
            term: record.term,
            incarnation: record.incarnation,
            begun,
            group: record.spec.id,
            timeline: record.current,
            written: Arc::default(),
            appended: Lsn::ZERO,
            durable: Lsn::ZERO,
            carry: Carry::default(),
            durable_source: None,
            current: None,
            batch: None,
            free: (0..options.depth + 1)
                .map(|_| {
                    AlignedBuf::with_capacity(options.batch_bytes + BATCH_HEADER + RECORD_HEADER + MAX_RECORD_BYTES)
                })
                .collect(),
            flights: VecDeque::new(),
            next_flight: 0,
            queues: 0,
            poison: None,
            options,
            shared,
        };
        journal.know_volumes(&record.spec);
        journal.stand_on(record.current);
        let window_us = u64::from(record.spec.policy.window_hours) * 3_600_000_000;
        journal.jobs.ageing = Ageing::of(journal.shared.map().segments(), window_us);
        let waiting: Vec<Arc<Segment>> =
            journal.shared.map().segments().filter(|s| s.sealed().is_none()).cloned().collect();
        waiting.into_iter().for_each(|segment| journal.jobs.add_unsealed(segment));
        Ok((journal, report))
    }

    fn know_volumes(&mut self, spec: &GroupSpec) {
        self.volumes = spec.volumes.iter().map(|v| (v.id, v.sectors)).collect();
    }

    /// Takes over the end of a timeline as the place where appends go.
    fn stand_on(&mut self, id: TimelineId) {
        let map = self.shared.map();
        let line = map.line(id).expect("a timeline the map knows");
        self.timeline = id;
        self.written = Arc::clone(&line.written);
        self.appended = line.written();
        self.durable = line.written();
        self.carry = carry_at(&self.shared, &map, id, line.written());
        if line.segments.is_empty() {
            // The parent's source went on with the parent; this line has its own, or none.
            self.carry.source = None;
        }
        self.durable_source = self.carry.source;
    }

    pub fn spec(&self) -> &GroupSpec {
        &self.spec
    }
    /// Changes the policy, or adds or grows volumes. A volume of the history cannot be left out.
    pub fn set_spec(&mut self, spec: GroupSpec) -> Result<(), ControlError> {
        control::check_spec(&spec)?;
        let have = &self.spec;
        if spec.id != have.id {
            return Err(SpecError::OtherGroup { have: have.id, given: spec.id }.into());
        }
        if let Some(gone) = have.volumes.iter().find(|v| spec.volumes.iter().all(|n| n.id != v.id)) {
            return Err(SpecError::VolumeGone(gone.id).into());
        }
        for volume in &have.volumes {
            if let Some(new) = spec.volumes.iter().find(|n| n.id == volume.id && n.sectors < volume.sectors) {
                let (have, given) = (volume.sectors, new.sectors);
                return Err(SpecError::VolumeShrinks { volume: volume.id, have, given }.into());
            }
        }
        let map = self.shared.map();
        if map.cutoff > Lsn::ZERO {
            let record = self.control.record();
            for volume in &spec.volumes {
                let must_exist = record.based.contains(&volume.id);
                let opened = self.shared.base.ensure_volume(volume.id, volume.sectors, must_exist);
                opened.map_err(|e| ControlError::Base(Box::new(e)))?;
            }
        }
        self.control.update(|r| r.spec = spec.clone())?;
        self.know_volumes(&spec);
        self.spec = Arc::new(spec);
        self.shared.change_map(|m| m.spec = Arc::clone(&self.spec));
        Ok(())
    }
    pub fn term(&self) -> Term {
        self.term
    }
    /// Goes on under a higher term: the next record begins a new segment, whose name carries it.
    pub fn set_term(&mut self, term: Term) -> Result<(), AppendError> {
        if term < self.term {
            return Err(AppendError::Term { have: self.term, given: term });
        }
        if term > self.term {
            self.drain()?;
            self.control.update(|r| r.term = term).map_err(|e| self.refused_by_control(e))?;
            self.term = term;
            self.leave_segment();
        }
        Ok(())
    }

    // ------------------------------------------------------------ appending

    /// Takes a record and gives it the next LSN. It is durable when [`Progress::durable`] has reached that.
    pub fn append(&mut self, record: &NewRecord<'_>) -> Result<Lsn, AppendError> {
        if record.kind == RecordKind::Mark {
            return Err(AppendError::RawMark);
        }
        let payload_crc = self.check(record)?;
        self.push(record, payload_crc, None)
    }

    /// Takes a mark.
    pub fn append_mark(
        &mut self,
        mark: &Mark,
        time: HistoryTime,
        stream: StreamId,
        seq: SourceSeq,
    ) -> Result<Lsn, AppendError> {
        let payload = postcard::to_stdvec(mark).expect("a mark encodes into memory");
        let record = NewRecord {
            kind: RecordKind::Mark,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent: Extent::default(),
            codec: Codec::Raw,
            payload_crc: None,
            payload: &payload,
            time,
            source_wall_us: 0,
            stream,
            seq,
        };
        self.push(&record, crc32fast::hash(&payload), Some(mark))
    }

    /// Whether the record may be written at all; what is written can always be read. Answers the checksum of its payload.
    fn check(&self, record: &NewRecord<'_>) -> Result<u32, AppendError> {
        let (extent, len) = (record.extent, record.payload.len());
        if WriteFlags::from_bits(record.flags.0).is_none() {
            return Err(AppendError::Flags(record.flags.0));
        }
        let too_big = len > MAX_RECORD_BYTES
            || extent.sectors.0 > u32::MAX.into()
            || (record.kind == RecordKind::Write && extent.bytes() > MAX_DECODED_BYTES as u64);
        if too_big {
            let (max, decoded_max) = (MAX_RECORD_BYTES, MAX_DECODED_BYTES);
            return Err(AppendError::TooBig { len, extent, max, decoded_max });
        }
        if record.kind.changes_volume() {
            let size = *self.volumes.get(&record.volume).ok_or(AppendError::NoVolume(record.volume))?;
            if !extent.fits(size) {
                return Err(AppendError::Outside { volume: record.volume, extent, size });
            }
        }
        // What is possible does not depend on the checksum.
        if !is_possible(&self.record_of(record, 0)) {
            let data = record.kind == RecordKind::Write && !extent.is_empty();
            return Err(if data { AppendError::Payload { extent } } else { AppendError::Shape });
        }
        // Opening every frame would cost too much here; its header must at least promise the right length.
        if record.kind == RecordKind::Write && record.codec == Codec::Zstd {
            let promised = zstd::zstd_safe::get_frame_content_size(record.payload).ok().flatten();
            if promised != Some(extent.bytes()) {
                return Err(AppendError::Payload { extent });
            }
        }
        let found = crc32fast::hash(record.payload);
        match record.payload_crc {
            Some(given) if given != found => Err(AppendError::PayloadCrc { given, found }),
            _ => Ok(found),
        }
    }

    fn record_of(&self, record: &NewRecord<'_>, payload_crc: u32) -> Record {
        Record {
            lsn: self.appended.next(),
            kind: record.kind,
            flags: record.flags,
            volume: record.volume,
            extent: record.extent,
            codec: record.codec,
            stored_len: record.payload.len() as u32,
            payload_crc,
            time: record.time.max(self.carry.time),
            source_wall_us: record.source_wall_us,
            stream: record.stream,
            seq: record.seq,
            term: self.term,
        }
    }

    fn push(&mut self, new: &NewRecord<'_>, payload_crc: u32, mark: Option<&Mark>) -> Result<Lsn, AppendError> {
        self.healthy()?;
        let need = RECORD_HEADER + new.payload.len();
        self.make_room(need)?;
        let record = self.record_of(new, payload_crc);
        let current = self.current.as_mut().expect("make_room opened a segment");
        let batch = self.batch.as_mut().expect("make_room began a batch");
        // A segment is at most 1 GiB, so offsets fit.
        let offset = (current.offset + batch.buf.len() as u64) as u32;
        batch.buf.extend_from_slice(&format::encode_record(&record, current.segment.tag));
        batch.buf.extend_from_slice(new.payload);
        batch.count += 1;
        current.records += 1;
        current.segment.with_unsealed(|unsealed| unsealed.index.insert(&record, offset, mark));
        self.carry.advance(&record, mark);
        self.jobs.ageing.saw(record.time.0);
        self.appended = record.lsn;
        if batch.buf.len() >= self.options.batch_bytes {
            self.submit()?;
        }
        Ok(record.lsn)
    }

    fn healthy(&self) -> Result<(), AppendError> {
        match &self.poison {
            Some(cause) => Err(AppendError::Poisoned(Arc::clone(cause))),
            None => Ok(()),
        }
    }

    /// After `Ok` there is a batch in an open segment with room for `need` more bytes.
    fn make_room(&mut self, need: usize) -> Result<(), AppendError> {
        if self.batch.as_ref().is_some_and(|b| b.buf.len() >= self.options.batch_bytes) {
            self.submit()?;
            if self.batch.is_some() {
                return Err(AppendError::Busy { in_flight: self.flights.len() });
            }
        }
        let used = self.batch.as_ref().map_or(BATCH_HEADER, |b| b.buf.len());
        let span = (used + need).next_multiple_of(BLOCK) as u64;
        let fits = self.current.as_ref().is_some_and(|c| c.offset + span <= c.end && c.records < MAX_SEGMENT_RECORDS);
        if !fits {
            if self.batch.is_some() {
                self.submit()?;
                if self.batch.is_some() {
                    return Err(AppendError::Busy { in_flight: self.flights.len() });
                }
            }
            self.roll()?;
        }
        if self.batch.is_none() {
            let Some(mut buf) = self.free.pop() else {
                return Err(AppendError::Busy { in_flight: self.flights.len() });
            };
            buf.clear();
            buf.extend_from_slice(&[0; BATCH_HEADER]);
            self.batch = Some(Batch { buf, first: self.appended.next(), count: 0 });
        }
        Ok(())
    }

    /// Sends what has been gathered, if the queue has room; otherwise it stays gathered.
    pub fn submit(&mut self) -> Result<(), AppendError> {
        self.healthy()?;
        let Some(current) = &mut self.current else { return Ok(()) };
        if self.flights.len() >= self.options.depth {
            return Ok(());
        }
        // A batch without a record was begun for one that was then refused; there is nothing to send.
        let Some(mut batch) = self.batch.take_if(|b| b.count > 0) else { return Ok(()) };
        let header = BatchHeader {
            tag: current.segment.tag,
            incarnation: self.incarnation,
            first_lsn: batch.first,
            durable_lsn: self.durable,
            record_count: batch.count,
            body_len: (batch.buf.len() - BATCH_HEADER) as u32,
        };
        batch.buf.as_mut_slice()[..BATCH_HEADER].copy_from_slice(&header.encode());
        batch.buf.pad();
        let len = batch.buf.len() as u64;
        let last = Lsn(batch.first.0 + u64::from(batch.count) - 1);
        self.flights.push_back(Flight { id: self.next_flight, last, source: self.carry.source, done: false });
        current.queue.submit(self.next_flight, current.offset, batch.buf);
        self.next_flight += 1;
        current.offset += len;
        let end = current.offset;
        current.segment.with_unsealed(|unsealed| unsealed.data_end = end);
        Ok(())
    }

    /// Collects finished writes. With `wait` and something in flight, waits for at least one.
    pub fn poll(&mut self, wait: bool) -> Result<Progress, AppendError> {
        self.healthy()?;
        if let Some(current) = &mut self.current {
            for completion in current.queue.complete(wait && !self.flights.is_empty()) {
                self.free.push(completion.buf);
                match completion.result {
                    Ok(()) => {
                        if let Some(flight) = self.flights.iter_mut().find(|f| f.id == completion.id) {
                            flight.done = true;
                        }
                    }
                    Err(e) => {
                        self.poison.get_or_insert_with(|| Arc::new(e));
                    }
                }
            }
        }
        // In order only: an acknowledgement means that everything before it survives too.
        while self.flights.front().is_some_and(|f| f.done) {
            let flight = self.flights.pop_front().expect("there is a front");
            self.durable = flight.last;
            self.durable_source = flight.source;
            self.written.store(flight.last.0, Ordering::Release);
        }
        self.healthy()?;
        Ok(self.progress())
    }

    pub fn progress(&self) -> Progress {
        Progress {
            appended: self.appended,
            written: Lsn(self.written.load(Ordering::Acquire)),
            durable: self.durable,
            in_flight: self.flights.len(),
            unsent_bytes: self.batch.as_ref().map_or(0, |b| b.buf.len() - BATCH_HEADER),
        }
    }

    /// The number of the queue that writes go through: another one, another descriptor.
    pub fn queue_number(&self) -> u64 {
        self.queues
    }

    /// A descriptor that becomes readable when [`Journal::poll`] has something to collect; see
    /// [`WriteQueue::completion_fd`].
    pub fn completion_fd(&self) -> Option<OwnedFd> {
        self.current.as_ref().and_then(|c| c.queue.completion_fd())
    }

    /// Sends and waits until everything appended is durable.
    pub fn drain(&mut self) -> Result<Progress, AppendError> {
        loop {
            self.submit()?;
            if self.flights.is_empty() && self.batch.as_ref().is_none_or(|b| b.count == 0) {
                return Ok(self.progress());
            }
            self.poll(true)?;
        }
    }

    // ------------------------------------------------------------ segments

    /// The current segment takes no more; a job seals it.
    fn leave_segment(&mut self) {
        let Some(Current { segment, records, .. }) = self.current.take() else { return };
        self.free.extend(self.batch.take().map(|b| b.buf));
        if records > 0 {
            self.jobs.add_unsealed(segment);
            return;
        }
        // Never written to: as if it had not been. Should the file stay, recovery removes it for the same reason.
        self.shared.change_map(|m| {
            if let Some(line) = m.lines.get_mut(&segment.header.timeline) {
                line.segments.retain(|s| !Arc::ptr_eq(s, &segment));
            }
        });
        self.shared.forget(&segment);
        let _ = self.shared.disk.remove(&segment.path(&self.shared.dir));
    }

    /// Begins the next segment. Everything appended has been submitted.
    fn roll(&mut self) -> Result<(), AppendError> {
        // The name of a segment proves that all before it is durable: recovery relies on it.
        while !self.flights.is_empty() {
            self.poll(true)?;
        }
        if !self.begun {
            begin_life(&self.control, &self.ends()).map_err(|e| self.refused_by_control(e))?;
            self.incarnation = self.control.record().incarnation;
            self.begun = true;
        }
        self.bound_unsealed()?;
        let (file, bytes, handle) = match self.jobs.take_prepared() {
            Some(prepared) => {
                let handle = self.shared.disk.open(&prepared.path, OpenMode::ReadWrite);
                (prepared.path, prepared.bytes, handle.map_err(|e| self.not_rolled(self.options.segment_bytes, e))?)
            }
            None => {
                let bytes = ByteLen(self.options.segment_bytes.0.min(STOPGAP_BYTES));
                self.room_for(bytes)?;
                let path = self.jobs.next_prepared_path(&self.shared.dir);
                match self.shared.disk.create_zeroed(&path, bytes) {
                    Ok(handle) => (path, bytes, handle),
                    Err(e) => return Err(self.not_rolled(bytes, e)),
                }
            }
        };
        self.leave_segment();
        let map = self.shared.map();
        let line = map.line(self.timeline).expect("the current timeline is in the map");
        let header = SegmentHeader {
            group: self.group,
            timeline: self.timeline,
            term: self.term,
            incarnation: self.incarnation,
            ordinal: line.segments.last().map_or(0, |s| s.header.ordinal + 1),
            first_lsn: self.appended.next(),
            segment_bytes: bytes.0,
            before: self.carry,
        };
        let path = header.name(SegmentState::Open).path(&self.shared.dir);
        let opened = (|| -> Result<Box<dyn WriteQueue>, DiskError> {
            handle.write_at(0, &header.encode())?;
            // Header before name: a file with a segment's name has a header, always.
            handle.flush()?;
            drop(handle);
            self.shared.disk.rename(&file, &path)?;
            self.shared.disk.write_queue(&path, self.options.depth)
        })();
        let queue = opened.map_err(|e| {
            // Under the old name or the new one it holds no record; recovery removes either.
            let _ = self.shared.disk.remove(&file);
            self.not_rolled(bytes, e)
        })?;
        self.queues += 1;
        let unsealed = Unsealed {
            index: MemIndex::new(&header),
            data_end: BLOCK as u64,
            file_bytes: bytes.0,
            named: SegmentState::Open,
        };
        let segment = Arc::new(Segment::new(header, State::Unsealed(Box::new(unsealed))));
        self.current =
            Some(Current { segment: Arc::clone(&segment), queue, offset: BLOCK as u64, end: bytes.0, records: 0 });
        self.shared.change_map(|m| {
            if let Some(line) = m.lines.get_mut(&self.timeline) {
                line.segments.push(segment);
            }
        });
        Ok(())
    }

    /// Each full segment that is not sealed holds its index in memory. When jobs do not come round to it, or fail at it, the
    /// append does it, and says why if it cannot.
    fn bound_unsealed(&mut self) -> Result<(), AppendError> {
        while self.jobs.unsealed() >= UNSEALED_MAX {
            let Some(segment) = self.jobs.oldest_unsealed() else { return Ok(()) };
            segment::seal(&*self.shared.disk, &self.shared.dir, &segment)
                .map_err(|e| self.not_rolled(self.options.segment_bytes, e))?;
            self.jobs.sealed(&segment);
        }
        Ok(())
    }

    /// Why there is no next segment. A full disk is no failure: what is there stays as it is, and there may be room later.
    fn not_rolled(&mut self, needed: ByteLen, e: DiskError) -> AppendError {
        if !e.is_full() {
            return AppendError::Roll(Arc::new(e));
        }
        self.jobs.no_room();
        let available = self.shared.disk.space().map(|s| s.available).unwrap_or_default();
        AppendError::NoSpace { needed, available, reserve: self.jobs.reserve() }
    }

    /// Why the control record was not kept; for want of room it is like any other lack of it.
    fn refused_by_control(&mut self, e: ControlError) -> AppendError {
        match e {
            ControlError::Disk(e) if e.is_full() => self.not_rolled(self.options.segment_bytes, e),
            e => AppendError::Control(Arc::new(e)),
        }
    }

    /// Whether policy and disk allow one more segment.
    pub(crate) fn room_for(&mut self, bytes: ByteLen) -> Result<(), AppendError> {
        let map = self.shared.map();
        let index = self.shared.numbers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).index_bytes;
        let segments: u64 = map.segments().map(|s| s.summary().file_bytes).sum();
        let have = ByteLen(segments + self.jobs.prepared_bytes() + index.0);
        if let Some(max) = map.spec.policy.journal_bytes_max
            && have.0 + bytes.0 > max.0
        {
            self.jobs.no_room();
            return Err(AppendError::OverLimit { have, max });
        }
        let space = self.shared.disk.space().map_err(|e| AppendError::Roll(Arc::new(e)))?;
        let reserve = self.jobs.reserve();
        if space.available.0 < bytes.0 + reserve.0 {
            self.jobs.no_room();
            return Err(AppendError::NoSpace { needed: bytes, available: space.available, reserve });
        }
        Ok(())
    }

    // ------------------------------------------------------------ facts

    /// Where the source resumes; none before its first record.
    pub fn source_position(&self) -> Option<SourcePosition> {
        let appended = self.carry.source?;
        let durable = self.durable_source.filter(|d| d.stream == appended.stream).map_or(SourceSeq::ZERO, |d| d.seq);
        Some(SourcePosition { stream: appended.stream, appended: appended.seq, durable })
    }
    /// Since when, and why, no recovery points are offered at the end of what was appended.
    pub fn in_gap(&self) -> Option<(Lsn, GapReason)> {
        self.carry.gap.reason()
    }
    /// History time of the last record.
    pub fn last_time(&self) -> HistoryTime {
        self.carry.time
    }
    pub fn reader(&self) -> JournalReader {
        JournalReader::new(Arc::clone(&self.shared))
    }
    pub fn stats(&self) -> JournalStats {
        stats::stats(&self.shared)
    }
    /// How durable writes are done, for the log.
    pub fn backend(&self) -> &'static str {
        self.current.as_ref().map_or("not writing", |c| c.queue.backend())
    }

    // ------------------------------------------------------------ branches of other groups

    /// Keeps a moment for another group's journal that is about to go on from it, until [`Journal::release_hold`]. Doing it again
    /// for the same moment is fine.
    pub fn hold(&mut self, for_group: GroupId, at: ResolvedPoint) -> Result<(), HoldError> {
        let map = self.shared.map();
        let line = map.line(at.timeline).filter(|l| l.live).ok_or(HoldError::NoTimeline(at.timeline))?;
        if at.lsn > line.written() {
            return Err(HoldError::AfterEnd { lsn: at.lsn, end: line.written() });
        }
        let kept = (at.timeline, at.lsn);
        match map.branching.branches.get(&for_group) {
            Some(held) if *held == kept => return Ok(()),
            Some((timeline, lsn)) => return Err(HoldError::Other { timeline: *timeline, lsn: *lsn }),
            None if map.branching.branches.len() >= BRANCHES_MAX => {
                return Err(HoldError::TooMany { max: BRANCHES_MAX });
            }
            None => {}
        }
        // No fold is planned past it while it is being written down.
        let _lease = self
            .shared
            .lease(at.timeline, at.lsn, false)
            .map_err(|_| HoldError::BeforeFloor { lsn: at.lsn, floor: self.shared.map().cutoff })?;
        self.control.update(|r| r.branching.branches.extend([(for_group, kept)]))?;
        self.note_branching();
        Ok(())
    }

    /// Lets go of what was held for a group; nothing was, is fine.
    pub fn release_hold(&mut self, for_group: GroupId) -> Result<(), HoldError> {
        self.control.update(|r| r.branching.branches.retain(|group, _| *group != for_group))?;
        self.note_branching();
        Ok(())
    }

    fn note_branching(&self) {
        let branching = Arc::new(self.control.record().branching);
        self.shared.change_map(|m| m.branching = branching);
    }

    // ------------------------------------------------------------ timelines and bookmarks

    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }
    /// Makes a line of history that goes on from `at`; appends stay where they are until [`Journal::switch_timeline`].
    pub fn branch(&mut self, at: Lsn, on: TimelineId) -> Result<TimelineId, BranchError> {
        if on == self.timeline {
            self.drain()?;
        }
        let map = self.shared.map();
        let line = map.line(on).filter(|l| l.live).ok_or(BranchError::NoTimeline(on))?;
        if at > line.written() {
            return Err(BranchError::AfterEnd { at, end: line.written() });
        }
        if at < map.cutoff {
            return Err(BranchError::BeforeFloor { at, floor: map.cutoff });
        }
        let record = self.control.record();
        if record.timelines.len() >= TIMELINES_MAX {
            return Err(BranchError::TooMany { count: record.timelines.len(), max: TIMELINES_MAX });
        }
        // The branch point belongs to the timeline that has it as its own record.
        let on = map.chain(on, at).first().map_or(on, |link| link.timeline);
        let id = TimelineId(record.next_timeline);
        let ends = self.ends();
        self.control.update(|r| {
            note_durable(r, &ends);
            r.next_timeline += 1;
            r.timelines.push(TimelineRecord { id, parent: Some((on, at)), live: true, durable: at });
        })?;
        let written = Arc::new(AtomicU64::new(at.0));
        let parent = Some((on, at));
        let line = Line { id, parent, live: true, start: at, segments: Vec::new(), written };
        self.shared.change_map(|m| m.lines.insert(id, line));
        Ok(id)
    }

    /// Appends go to `to` from now on, behind its end.
    pub fn switch_timeline(&mut self, to: TimelineId) -> Result<(), BranchError> {
        if to == self.timeline {
            return Ok(());
        }
        if self.shared.map().line(to).is_none_or(|l| !l.live) {
            return Err(BranchError::NoTimeline(to));
        }
        self.drain()?;
        let ends = self.ends();
        self.control.update(|r| {
            note_durable(r, &ends);
            r.current = to;
        })?;
        self.leave_segment();
        self.shared.change_map(|m| m.current = to);
        self.stand_on(to);
        Ok(())
    }

    /// Gives up a timeline. What others branched from stays as far as they need it. Refused while a bookmark, here or on a
    /// timeline that is only kept because of this one, would go with it.
    pub fn drop_timeline(&mut self, id: TimelineId) -> Result<(), BranchError> {
        if id == self.timeline {
            return Err(BranchError::Current(id));
        }
        let map = self.shared.map();
        if map.line(id).is_none_or(|l| !l.live) {
            return Err(BranchError::NoTimeline(id));
        }
        let leases = self.shared.leases.lock().unwrap_or_else(std::sync::PoisonError::into_inner).list();
        let held = map.branching.branches.values();
        if leases.iter().chain(held).any(|(timeline, _)| *timeline == id) {
            return Err(BranchError::InUse(id));
        }
        let give_up = |r: &mut ControlRecord| {
            if let Some(line) = r.timeline_mut(id) {
                line.live = false;
            }
            forget_unneeded(r);
        };
        let mut then = self.control.record();
        give_up(&mut then);
        let mut lost = bookmarks_lost(&map, &then).into_iter();
        if let Some((timeline, lsn, name)) = lost.next() {
            return Err(BranchError::Bookmarked { timeline, name, lsn, count: lost.len() + 1 });
        }
        let ends = self.ends();
        self.control.update(|r| {
            note_durable(r, &ends);
            give_up(r);
        })?;
        let record = self.control.record();
        let mut gone: Vec<Arc<Segment>> = Vec::new();
        self.shared.change_map(|m| {
            m.lines.retain(|id, line| {
                let Some(known) = record.timeline(*id) else {
                    gone.append(&mut line.segments);
                    return false;
                };
                line.live = known.live;
                if !known.live {
                    let upto = load::needed_upto(&record, *id).unwrap_or(Lsn::ZERO);
                    let keep = line.segments.partition_point(|s| s.first_lsn() <= upto);
                    gone.extend(line.segments.drain(keep..));
                    line.written.fetch_min(upto.0.max(line.start.0), Ordering::AcqRel);
                }
                true
            });
        });
        self.jobs.add_deleted(gone);
        Ok(())
    }

    /// Deletes a bookmark: every place that has the name. The history it pinned ages like the rest from now on.
    pub fn release_bookmark(&mut self, name: &BookmarkName) -> Result<(), BookmarkError> {
        let map = self.shared.map();
        let history = History::new(&self.shared, &map, self.timeline, Lsn(self.written.load(Ordering::Acquire)));
        let places = history.bookmark_places(name);
        if places.is_empty() {
            return Err(BookmarkError::NoSuchBookmark { name: name.clone(), similar: history.similar_to(name) });
        }
        self.control.update(|r| r.released.extend(places))?;
        let released = Arc::new(self.control.record().released);
        self.shared.change_map(|m| m.released = released);
        Ok(())
    }

    /// Ends of all timelines, all durable.
    pub(crate) fn ends(&self) -> Vec<(TimelineId, Lsn)> {
        let map = self.shared.map();
        map.lines.values().map(|l| (l.id, if l.id == self.timeline { self.durable } else { l.written() })).collect()
    }

    /// Makes everything durable and notes it, so that any later damage is told from a torn tail. Jobs that run meanwhile must have
    /// ended before the journal is opened again.
    pub fn close(mut self) -> Result<(), AppendError> {
        self.drain()?;
        let ends = self.ends();
        self.control.update(|r| note_durable(r, &ends)).map_err(|e| self.refused_by_control(e))
    }
}

impl Drop for Journal {
    /// Jobs that were handed out and have not begun will not begin.
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}

/// Whether the moment given is the one the journal goes on from.
pub(crate) fn check_trunk(wanted: Option<BranchPoint>, given: Option<&ViewHandle>) -> Result<(), OpenError> {
    match (wanted, given.map(|on| on.get().branch_point())) {
        (wanted, given) if wanted == given => Ok(()),
        (Some(on), _) => Err(OpenError::NeedsTrunk { on }),
        (None, Some(BranchPoint { group, timeline, lsn })) => Err(OpenError::OtherTrunk { group, timeline, lsn }),
        (None, None) => Ok(()),
    }
}

/// What lies below the segments.
fn open_base(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    record: &ControlRecord,
    on: Option<Arc<ViewHandle>>,
) -> Result<Arc<dyn Base>, OpenError> {
    if let Some(view) = on {
        return Ok(Arc::new(Trunk::new(view)));
    }
    let failed = |e| OpenError::from(crate::view::base_error(e));
    let interrupted = (record.cutoff > record.floor.lsn).then_some(record.cutoff);
    let base = ImageBase::open(Arc::clone(disk), &format::base_dir(dir), interrupted).map_err(failed)?;
    if record.cutoff > Lsn::ZERO {
        for volume in &record.spec.volumes {
            base.ensure_volume(volume.id, volume.sectors, record.based.contains(&volume.id)).map_err(failed)?;
        }
    }
    Ok(Arc::new(base))
}

/// A new life of the journal, persisted before its first segment: what an earlier one left behind can never pass for this one's.
fn begin_life(control: &Control, ends: &[(TimelineId, Lsn)]) -> Result<(), ControlError> {
    control.update(|r| {
        r.incarnation += 1;
        note_durable(r, ends);
    })
}

/// Raises what control knows to be durable.
pub(crate) fn note_durable(record: &mut ControlRecord, ends: &[(TimelineId, Lsn)]) {
    for (id, end) in ends {
        if let Some(line) = record.timeline_mut(*id) {
            line.durable = line.durable.max(*end);
        }
    }
}

/// Takes out timelines that are given up and that no other one needs.
pub(crate) fn forget_unneeded(record: &mut ControlRecord) {
    loop {
        let gone = record.timelines.iter().find(|t| !t.live && load::needed_upto(record, t.id).is_none()).map(|t| t.id);
        let Some(id) = gone else { return };
        record.timelines.retain(|t| t.id != id);
    }
}

/// Bookmarks, not released, that `then` has no room for.
fn bookmarks_lost(map: &Map, then: &ControlRecord) -> Vec<(TimelineId, Lsn, BookmarkName)> {
    let mut lost = Vec::new();
    for line in map.lines.values() {
        let keeps = match then.timeline(line.id) {
            Some(known) if known.live => continue,
            Some(_) => load::needed_upto(then, line.id).unwrap_or(Lsn::ZERO),
            None => Lsn::ZERO,
        };
        for entry in line.segments.iter().flat_map(|s| s.marks(line.written())) {
            if let Mark::Bookmark { name, .. } = entry.mark
                && entry.lsn > keeps
                && !map.released.contains(&(line.id, entry.lsn))
            {
                lost.push((line.id, entry.lsn, name));
            }
        }
    }
    lost
}

/// What a position carries along: from the segment that holds it, and its records up to there.
pub(crate) fn carry_at(shared: &Shared, map: &Map, id: TimelineId, lsn: Lsn) -> Carry {
    let floor = &map.floor;
    let Some(segment) = map.segment_of(id, lsn).filter(|_| lsn > floor.lsn) else {
        let inside_request = floor.lsn > Lsn::ZERO && !floor.at_boundary;
        return Carry { time: floor.time, gap: floor.gap, source: None, inside_request };
    };
    let summary = segment.summary();
    if summary.last_lsn == lsn {
        return summary.after;
    }
    // In the middle of a segment, which only a branch point can be.
    let gap = segment.marks(lsn).iter().fold(segment.header.before.gap, |state, m| state.after(m.lsn, &m.mark));
    let history = History::new(shared, map, id, lsn);
    // If the table cannot be read: a later time and an open request are on the safe side.
    let time = history.time_of(lsn).unwrap_or(summary.last_time);
    let inside_request = history.is_boundary(lsn).map_or(true, |ends| !ends);
    Carry { time, gap, source: None, inside_request }
}
