//! Reads what lies in a journal's folder and decides what each file is worth ([`recover`](crate::recover)).
//!
//! *Strict* is for the writer: anything durable that cannot be read stops the open, by name; what is of no worth is removed,
//! and files that were written without a flush are flushed before anything relies on them. *Lenient* is for reading a
//! journal without its daemon: nothing is changed, damage is listed, and what is whole can be read.

use crate::{
    Corruption, Cut, Damage, OpenError, ReadError, RecoveryReport,
    control::ControlRecord,
    format::{self, BLOCK, BlockFault, FileName, SegmentHeader, SegmentName, SegmentState},
    recover::{BodyFact, Facts, HeaderFact, Verdict, decide},
    scan::{Scan, Tail, scan},
    segment::{self, LoadError, Sealed, Segment, State, Unsealed},
    shared::Line,
};
use durable::{DirEntry, Disk, OpenMode};
use model::{ByteLen, Lsn, TimelineId};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Strict,
    Lenient,
}

pub struct Loaded {
    pub lines: BTreeMap<TimelineId, Line>,
    pub report: RecoveryReport,
    /// Lenient only: what a strict open would have refused.
    pub damage: Vec<Corruption>,
}

struct Loader<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    record: &'a ControlRecord,
    mode: Mode,
    report: RecoveryReport,
    damage: Vec<Corruption>,
}

/// Loads all timelines that the control record knows.
pub fn load(disk: &dyn Disk, dir: &Path, record: &ControlRecord, mode: Mode) -> Result<Loaded, OpenError> {
    let folder = format::segment_dir(dir);
    if mode == Mode::Strict {
        // Names that a process made and did not live to flush must survive from here on.
        disk.cleanup(&folder).map_err(OpenError::Disk)?;
    }
    let mut loader = Loader { disk, dir, record, mode, report: RecoveryReport::default(), damage: Vec::new() };
    let mut names: BTreeMap<TimelineId, Vec<SegmentName>> = BTreeMap::new();
    for DirEntry { name, .. } in disk.list(&folder).map_err(OpenError::Disk)? {
        match format::parse_name(&name) {
            FileName::Prepared(_) => loader.remove(&folder.join(&name))?,
            FileName::Unknown => loader.report.strays.push(folder.join(&name)),
            FileName::Segment(segment) if segment.first_lsn == Lsn::ZERO => {
                loader.report.strays.push(folder.join(&name))
            }
            FileName::Segment(segment) => names.entry(segment.timeline).or_default().push(segment),
        }
    }
    for (timeline, files) in &names {
        if record.timeline(*timeline).is_none() {
            loader.unknown_timeline(*timeline, files)?;
        }
    }
    let mut lines = BTreeMap::new();
    for timeline in &record.timelines {
        let mut files = names.remove(&timeline.id).unwrap_or_default();
        files.sort_by_key(|n| (n.first_lsn, n.term, n.state == SegmentState::Sealed));
        let line = loader.line(timeline.id, files)?;
        lines.insert(timeline.id, line);
    }
    let mut report = loader.report;
    report.segments = lines.values().map(|l: &Line| l.segments.len()).sum();
    if let Some(current) = lines.get(&record.current) {
        report.first_lsn = current.segments.first().map_or(current.start, |s| s.first_lsn());
        report.last_lsn = current.written();
    }
    Ok(Loaded { lines, report, damage: loader.damage })
}

/// Where the own records of a timeline begin: behind the floor for those the floor lies on, else behind the branch point.
pub fn start_of(record: &ControlRecord, id: TimelineId) -> Lsn {
    let mut on_floor = Some((record.floor.timeline, record.floor.lsn));
    while let Some((timeline, upto)) = on_floor {
        if timeline == id {
            return upto;
        }
        on_floor = record.timeline(timeline).and_then(|t| t.parent).map(|(parent, at)| (parent, at.min(upto)));
    }
    record.timeline(id).and_then(|t| t.parent).map_or(Lsn::ZERO, |(_, at)| at)
}

/// Up to where a timeline that is not live is still needed by those that branch from it; None when by none.
pub fn needed_upto(record: &ControlRecord, id: TimelineId) -> Option<Lsn> {
    record.timelines.iter().filter_map(|t| t.parent).filter(|(parent, _)| *parent == id).map(|(_, at)| at).max()
}

impl Loader<'_> {
    /// Strict: an error. Lenient: one more damage, and on with the rest.
    fn corrupt(&mut self, file: PathBuf, offset: u64, what: Damage) -> Result<(), OpenError> {
        self.broken(Corruption { file, offset, what })
    }
    fn broken(&mut self, corruption: Corruption) -> Result<(), OpenError> {
        match self.mode {
            Mode::Strict => Err(OpenError::Corrupt(corruption)),
            Mode::Lenient => {
                self.damage.push(corruption);
                Ok(())
            }
        }
    }
    /// Strict: removes a file that is worth nothing.
    fn remove(&mut self, path: &Path) -> Result<(), OpenError> {
        if self.mode == Mode::Strict {
            self.disk.remove(path).map_err(OpenError::Disk)?;
            self.report.removed.push(path.to_owned());
        }
        Ok(())
    }
    /// Strict: removes a segment that nobody needs, unless it belongs to another group.
    fn remove_own(&mut self, name: &SegmentName) -> Result<(), OpenError> {
        let path = name.path(self.dir);
        let mut block = [0; BLOCK];
        let file = self.disk.open(&path, OpenMode::Read).map_err(OpenError::Disk)?;
        if file.read_at(0, &mut block).is_ok()
            && let Ok(header) = SegmentHeader::decode(&block)
            && header.group != self.record.spec.id
        {
            return self.foreign(path, &header);
        }
        self.remove(&path)
    }
    /// Segments of a timeline the control record does not have: one that was dropped (its number was given once), or foreign.
    fn unknown_timeline(&mut self, timeline: TimelineId, files: &[SegmentName]) -> Result<(), OpenError> {
        for name in files {
            let path = name.path(self.dir);
            if timeline.0 < self.record.next_timeline {
                self.remove_own(name)?;
            } else if self.mode == Mode::Strict {
                return Err(OpenError::UnknownTimeline { file: path, timeline });
            } else {
                self.report.strays.push(path);
            }
        }
        Ok(())
    }

    fn line(&mut self, id: TimelineId, files: Vec<SegmentName>) -> Result<Line, OpenError> {
        let known = *self.record.timeline(id).expect("the caller walks the record's timelines");
        let start = start_of(self.record, id);
        // A timeline that was dropped is kept as far as others branch from it.
        let end_max = if known.live { Lsn::MAX } else { needed_upto(self.record, id).unwrap_or(Lsn::ZERO) };
        let mut segments: Vec<Arc<Segment>> = Vec::new();
        for (i, name) in files.iter().enumerate() {
            let next_first = files.get(i + 1).map(|n| n.first_lsn);
            // All its records are in the base: its end was persisted as the floor before it was to be deleted.
            let folded = name.first_lsn <= start && next_first.is_some_and(|next| next <= start.next());
            if name.first_lsn > end_max || folded {
                self.remove_own(name)?;
                continue;
            }
            let Some(segment) = self.segment(name, next_first, known.durable)? else { continue };
            if segment.last_lsn() <= start {
                self.remove(&segment.path(self.dir))?;
                continue;
            }
            let expected = segments.last().map_or(start, |before| before.last_lsn()).next();
            if segment.first_lsn() > expected {
                let what = Damage::Missing { from: expected, to: segment.first_lsn().prev() };
                // The segment before may have told of the same hole already.
                if self.damage.last().is_none_or(|d| d.what != what) {
                    self.corrupt(segment.path(self.dir), 0, what)?;
                }
            }
            // The index counts by ordinals: they must be without a hole too.
            if let Some(before) = segments.last()
                && self.mode == Mode::Strict
                && segment.header.ordinal != before.header.ordinal + 1
            {
                self.corrupt(segment.path(self.dir), 0, Damage::SegmentName)?;
            }
            segments.push(Arc::new(segment));
        }
        let last = segments.last().map_or(start, |s| s.last_lsn());
        let durable = known.durable.min(end_max);
        if last < durable {
            let what = Damage::Missing { from: last.next(), to: durable };
            self.corrupt(format::segment_dir(self.dir), 0, what)?;
        }
        let written = Arc::new(AtomicU64::new(last.min(end_max).max(start).0));
        Ok(Line { id, parent: known.parent, live: known.live, start, segments, written })
    }

    /// One file: facts, verdict, and what follows from it.
    fn segment(
        &mut self,
        name: &SegmentName,
        next_first: Option<Lsn>,
        durable: Lsn,
    ) -> Result<Option<Segment>, OpenError> {
        match name.state {
            SegmentState::Sealed => self.sealed(name, next_first),
            SegmentState::Open => self.open(name, next_first, durable),
        }
    }

    fn header_fact(&self, header: &SegmentHeader, name: &SegmentName) -> HeaderFact {
        if header.group != self.record.spec.id {
            HeaderFact::Foreign
        } else if header.name(name.state) != *name {
            HeaderFact::Misnamed
        } else {
            HeaderFact::Good
        }
    }

    fn foreign(&mut self, path: PathBuf, header: &SegmentHeader) -> Result<(), OpenError> {
        if self.mode == Mode::Strict {
            return Err(OpenError::Foreign { file: path, found: header.group, expected: self.record.spec.id });
        }
        self.report.strays.push(path);
        Ok(())
    }

    fn sealed(&mut self, name: &SegmentName, next_first: Option<Lsn>) -> Result<Option<Segment>, OpenError> {
        let path = name.path(self.dir);
        let sealed: Sealed = match segment::load_sealed(self.disk, &path) {
            Ok(sealed) => sealed,
            Err(LoadError::Version(found)) => {
                return Err(OpenError::Version { file: path, found, known: format::FORMAT_VERSION });
            }
            Err(LoadError::Read(ReadError::Corrupt(mut corruption))) => {
                let facts = Facts {
                    header: HeaderFact::Good,
                    first: name.first_lsn,
                    body: BodyFact::NoTrailer,
                    claim: Lsn::ZERO,
                    next_first,
                };
                // The table says that it is damage; the reader of the trailer knows where and, if it got so far, what.
                if let Verdict::Corrupt(what) = decide(&facts)
                    && !matches!(corruption.what, Damage::FooterMarks | Damage::Short { .. })
                {
                    corruption.what = what;
                }
                self.broken(corruption)?;
                return self.salvage(name, next_first);
            }
            Err(LoadError::Read(e)) => return Err(e.into()),
        };
        let header = sealed.trailer.header.clone();
        let facts = Facts {
            header: self.header_fact(&header, name),
            first: name.first_lsn,
            body: BodyFact::Trailer { last: sealed.trailer.last_lsn },
            claim: Lsn::ZERO,
            next_first,
        };
        let at = sealed.file_bytes - BLOCK as u64;
        match decide(&facts) {
            Verdict::Foreign => return self.foreign(path, &header).map(|()| None),
            Verdict::Corrupt(what @ Damage::SegmentName) => return self.corrupt(path, at, what).map(|()| None),
            Verdict::Corrupt(what) => self.corrupt(path, at, what)?,
            Verdict::Keep | Verdict::SealAt { .. } | Verdict::RemoveEmpty => {}
        }
        Ok(Some(Segment::new(header, State::Sealed(Arc::new(sealed)))))
    }

    /// Lenient: what can be read of a sealed segment without its trailer, record by record.
    fn salvage(&mut self, name: &SegmentName, next_first: Option<Lsn>) -> Result<Option<Segment>, OpenError> {
        let path = name.path(self.dir);
        let file = self.disk.open(&path, OpenMode::Read).map_err(OpenError::Disk)?;
        let len = file.len().map_err(OpenError::Disk)?.0;
        let mut block = [0; BLOCK];
        if len < BLOCK as u64 {
            return Ok(None);
        }
        file.read_at(0, &mut block).map_err(OpenError::Disk)?;
        let Ok(header) = SegmentHeader::decode(&block) else {
            return self.corrupt(path, 0, Damage::SegmentHeader).map(|()| None);
        };
        if self.header_fact(&header, name) != HeaderFact::Good {
            return self.corrupt(path, 0, Damage::SegmentName).map(|()| None);
        }
        let found = scan(&*file, &header, next_first.map(Lsn::prev))?;
        Ok(self.unsealed(header, found, len, SegmentState::Sealed))
    }

    fn unsealed(&self, header: SegmentHeader, found: Scan, file_bytes: u64, named: SegmentState) -> Option<Segment> {
        if found.index.records() == 0 {
            return None;
        }
        let unsealed = Unsealed { index: found.index, data_end: found.data_end, file_bytes, named };
        Some(Segment::new(header, State::Unsealed(Box::new(unsealed))))
    }

    fn note_cut(&mut self, path: &Path, found: &Scan) {
        if found.tail == Tail::Torn {
            self.report.cut.push(Cut {
                file: path.to_owned(),
                after: found.index.last_lsn(),
                at_offset: found.data_end,
                records: found.behind_records,
                bytes: ByteLen(found.behind_bytes),
            });
        }
    }

    fn open(
        &mut self,
        name: &SegmentName,
        next_first: Option<Lsn>,
        durable: Lsn,
    ) -> Result<Option<Segment>, OpenError> {
        let path = name.path(self.dir);
        let strict = self.mode == Mode::Strict;
        let file = self
            .disk
            .open(&path, if strict { OpenMode::ReadWrite } else { OpenMode::Read })
            .map_err(OpenError::Disk)?;
        let len = file.len().map_err(OpenError::Disk)?.0;
        if strict {
            // A write that a killed process left in flight may still be under way to the disk. Setting the length waits for it
            // (the file system drains direct I/O of the file first); otherwise it could land in what is sealed below.
            file.set_len(ByteLen(len)).map_err(OpenError::Disk)?;
            // What is read below may be in the page cache only.
            file.flush().map_err(OpenError::Disk)?;
        }
        let mut block = [0; BLOCK];
        let header = if len < BLOCK as u64 {
            Err(BlockFault::Blank)
        } else {
            file.read_at(0, &mut block).map_err(OpenError::Disk)?;
            SegmentHeader::decode(&block)
        };
        let header = match header {
            Ok(header) => header,
            Err(BlockFault::Version(found)) => {
                return Err(OpenError::Version { file: path, found, known: format::FORMAT_VERSION });
            }
            Err(_) => {
                let body = BodyFact::Scanned { last: name.first_lsn.prev(), tail: Tail::Torn };
                let facts =
                    Facts { header: HeaderFact::Bad, first: name.first_lsn, body, claim: Lsn::ZERO, next_first };
                let Verdict::Corrupt(what) = decide(&facts) else { unreachable!("a bad header is damage, row E") };
                return self.corrupt(path, 0, what).map(|()| None);
            }
        };
        let fact = self.header_fact(&header, name);
        if fact == HeaderFact::Foreign {
            return self.foreign(path, &header).map(|()| None);
        }
        let found = scan(&*file, &header, next_first.map(Lsn::prev))?;
        self.report.scanned += 1;
        // What control knows of later segments is proven by their names.
        let hint = next_first.map_or(durable, |next| durable.min(next.prev()));
        let facts = Facts {
            header: fact,
            first: name.first_lsn,
            body: BodyFact::Scanned { last: found.index.last_lsn(), tail: found.tail },
            claim: found.claim.max(hint),
            next_first,
        };
        match decide(&facts) {
            Verdict::Foreign => self.foreign(path, &header).map(|()| None),
            Verdict::RemoveEmpty => {
                self.note_cut(&path, &found);
                self.remove(&path).map(|()| None)
            }
            Verdict::Corrupt(what) => {
                let offset = if fact == HeaderFact::Good { found.data_end } else { 0 };
                self.corrupt(path, offset, what)?;
                Ok(if fact == HeaderFact::Good { self.unsealed(header, found, len, SegmentState::Open) } else { None })
            }
            Verdict::Keep | Verdict::SealAt { .. } => {
                self.note_cut(&path, &found);
                Ok(self.unsealed(header, found, len, SegmentState::Open))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Journal, JournalOptions, JournalReader, NewRecord, types::IndexChoice};
    use durable::SimDisk;
    use model::{
        Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Mark, RecordKind, RecoveryPoint, Sectors,
        SourceSeq, StreamId, Term, VolumeId, VolumeSpec, WriteFlags,
    };

    fn rng(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move |below| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s % below
        }
    }

    fn options() -> JournalOptions {
        JournalOptions {
            segment_bytes: ByteLen(160 * 1024),
            batch_bytes: 4096,
            depth: 2,
            prepared_ahead: 1,
            segments_per_generation: 8,
            index: IndexChoice::Memory,
        }
    }

    fn small(disk: &SimDisk) -> PathBuf {
        let dir = PathBuf::from("g");
        let volume = VolumeSpec { id: VolumeId(1), name: "v".into(), sectors: Sectors(64), identity: String::new() };
        let spec = GroupSpec {
            id: GroupId([1; 16]),
            name: "g".into(),
            host: None,
            volumes: vec![volume],
            policy: GroupPolicy::default(),
        };
        let disk: Arc<dyn Disk> = Arc::new(disk.clone());
        let mut journal = Journal::create(disk, &dir, &spec, Term(1), options(), HistoryTime(1)).expect("creates");
        journal.append_mark(&Mark::Consistent, HistoryTime(1), StreamId::default(), SourceSeq(0)).expect("appends");
        for seq in 1..=300u64 {
            let payload = vec![seq as u8; 512];
            let record = NewRecord {
                kind: RecordKind::Write,
                flags: WriteFlags::NONE,
                volume: VolumeId(1),
                extent: Extent::new(seq % 64, 1),
                codec: Codec::Raw,
                payload_crc: None,
                payload: &payload,
                time: HistoryTime(seq),
                source_wall_us: 0,
                stream: StreamId([1; 16]),
                seq: SourceSeq(seq),
            };
            while journal.append(&record).is_err() {
                journal.poll(true).expect("polls");
            }
        }
        journal.drain().expect("durable");
        while let Some(job) = journal.next_job(HistoryTime(1)) {
            journal.job_done(job.run()).expect("succeeds");
        }
        journal.close().expect("closes");
        dir
    }

    /// Uses a journal in every way there is; whatever comes out, it must come out.
    fn use_it(disk: &SimDisk, dir: &Path) {
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let live = Journal::open(Arc::clone(&shared), dir, options(), HistoryTime(1)).ok().map(|(mut journal, _)| {
            while let Some(job) = journal.next_job(HistoryTime(20_000_000)) {
                if journal.job_done(job.run()).is_err() {
                    break;
                }
            }
            journal
        });
        let offline = JournalReader::open_offline(shared, dir).ok();
        for reader in live.iter().map(Journal::reader).chain(offline) {
            reader.points();
            reader.stats();
            reader.rate_history(20);
            for point in [RecoveryPoint::Latest, RecoveryPoint::Time(HistoryTime(100)), RecoveryPoint::Lsn(Lsn(200))] {
                if let Ok(point) = reader.resolve(&point)
                    && let Ok(view) = reader.view(point)
                {
                    let _ = view.read(VolumeId(1), 100, &mut [0; 9000]);
                    let _ = view.allocation(VolumeId(1), Extent::new(0, 64));
                }
            }
            reader.records(Lsn(1)).take(1000).for_each(drop);
            reader.verify(&mut |_| {});
        }
    }

    fn bytes_of(disk: &SimDisk, path: &Path) -> Vec<u8> {
        let file = disk.open(path, OpenMode::Read).expect("opens");
        let mut bytes = vec![0; file.len().expect("a length").0 as usize];
        file.read_at(0, &mut bytes).expect("reads");
        bytes
    }

    #[test]
    fn hostile_bytes_with_right_checksums_never_panic() {
        let original = SimDisk::new(1, ByteLen(64 << 20));
        let dir = small(&original);
        let sealed: Vec<PathBuf> =
            original.paths().into_iter().filter(|p| p.extension().is_some_and(|e| e == "seg")).collect();
        assert!(!sealed.is_empty());
        for seed in 1..250 {
            let mut draw = rng(seed);
            let disk = original.fork(seed);
            let path = &sealed[draw(sealed.len() as u64) as usize];
            let mut bytes = bytes_of(&disk, path);
            // A block is chosen, bytes of it are changed, and whatever checksum it has is made right again.
            let blocks = bytes.len() / BLOCK;
            let number = match draw(4) {
                0 => 0,
                1 | 2 => blocks - 1,
                _ => draw(blocks as u64) as usize,
            };
            let block = &mut bytes[number * BLOCK..(number + 1) * BLOCK];
            for _ in 0..1 + draw(4) {
                let at = (20 + draw(200)) as usize;
                block[at] = match draw(3) {
                    0 => 0xff,
                    1 => block[at].wrapping_add(1),
                    _ => draw(256) as u8,
                };
            }
            if number == 0 || number == blocks - 1 {
                let mut crc = crc32fast::Hasher::new();
                crc.update(&block[..16]);
                crc.update(&block[20..]);
                let crc = crc.finalize();
                block[16..20].copy_from_slice(&crc.to_le_bytes());
            } else {
                let crc = crc32fast::hash(&block[8..]);
                block[4..8].copy_from_slice(&crc.to_le_bytes());
            }
            disk.open(path, OpenMode::ReadWrite).expect("opens").write_at(0, &bytes).expect("writes");
            use_it(&disk, &dir);
        }
    }

    #[test]
    fn random_bytes_in_any_file_never_panic() {
        let original = SimDisk::new(2, ByteLen(64 << 20));
        let dir = small(&original);
        let files: Vec<PathBuf> = original.paths();
        for seed in 1..150 {
            let mut draw = rng(seed);
            let disk = original.fork(seed);
            let path = &files[draw(files.len() as u64) as usize];
            let file = disk.open(path, OpenMode::ReadWrite).expect("opens");
            let len = file.len().expect("a length").0.max(1);
            match draw(3) {
                0 => file.set_len(ByteLen(draw(len))).expect("cuts"),
                _ => {
                    let junk: Vec<u8> = (0..1 + draw(300)).map(|_| draw(256) as u8).collect();
                    file.write_at(draw(len), &junk).expect("writes");
                }
            }
            use_it(&disk, &dir);
        }
    }
}
