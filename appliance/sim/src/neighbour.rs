//! Another group's journal on the same disk: what happens to one must not touch the other.
//!
//! It takes a record now and then, shares every power cut, kill, failed flush and full disk with the group that is watched closely, and
//! has an oracle of its own: a list of what was appended. A write that fails takes it down until it is opened again, as the box
//! does with one group while the others run.

use crate::journal_store::{NO_ROOM, chain, is_injected};
use crate::oracle::fill;
use crate::rng::Rng;
use durable::{Disk, SimDisk};
use journal::{AppendError, IndexChoice, Journal, JournalOptions, NewRecord};
use model::{
    ByteLen, Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Mark, RecordKind, RecoveryPoint, SECTOR,
    Sectors, SourceSeq, StreamId, Term, VolumeId, VolumeSpec, WriteFlags,
};
use std::path::PathBuf;
use std::sync::Arc;

const SECTORS: u64 = 256;
const VOLUME: VolumeId = VolumeId(5);
/// Records in memory and not yet written; more would only be refused as busy.
const RECORDS_MAX: usize = 4000;

pub(crate) struct Neighbour {
    rng: Rng,
    /// How many groups have stood here.
    life: u32,
    /// There is none: one is to be begun.
    abandoned: bool,
    journal: Option<Journal>,
    /// By LSN, from 2 on (1 is the mark that makes an empty disk valid): where, and the tag of its sectors.
    log: Vec<(Extent, u64)>,
    durable: Lsn,
    next_tag: u64,
}

/// What is wrong with it, in words: the world makes a failure of it.
type Checked = Result<(), String>;

impl Neighbour {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed, 70),
            life: 0,
            abandoned: true,
            journal: None,
            log: Vec::new(),
            durable: Lsn::ZERO,
            next_tag: 1,
        }
    }

    fn dir(&self) -> PathBuf {
        PathBuf::from(format!("groups/neighbour-{}", self.life))
    }

    /// The disk went back to an older state, which no list of ours knows: another group takes its place.
    pub(crate) fn abandon(&mut self) {
        (self.journal, self.abandoned) = (None, true);
    }

    fn begin(&mut self, disk: &SimDisk, now: HistoryTime) -> Checked {
        self.life += 1;
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let created = Journal::create(shared, &self.dir(), &spec(), Term(1), options(), now);
        let mut journal = match created {
            Ok(journal) => journal,
            Err(e) => return excuse(disk, &e),
        };
        let stream = StreamId::default();
        let begun = journal.append_mark(&Mark::Consistent, now, stream, SourceSeq(1)).and_then(|_| journal.drain());
        if let Err(e) = begun {
            return excuse(disk, &e);
        }
        (self.log, self.durable, self.abandoned) = (Vec::new(), Lsn::ZERO, false);
        self.journal = Some(journal);
        self.note();
        Ok(())
    }

    /// The process or the machine was down: open it again and look whether everything durable is there.
    pub(crate) fn reopen(&mut self, disk: &SimDisk, now: HistoryTime) -> Checked {
        self.journal = None;
        if self.abandoned {
            return self.begin(disk, now);
        }
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let (journal, _) = match Journal::open(shared, &self.dir(), options(), now) {
            Ok(opened) => opened,
            // The next step tries again.
            Err(e) => return excuse(disk, &e),
        };
        let end = journal.progress().appended;
        if end < self.durable || end.0 > 1 + self.log.len() as u64 {
            return Err(format!("durable to LSN {}, after a restart it ends at {end}", self.durable));
        }
        self.log.truncate(end.0.saturating_sub(1) as usize);
        self.journal = Some(journal);
        self.note();
        self.check_head()
    }

    pub(crate) fn step(&mut self, disk: &SimDisk, now: HistoryTime) -> Checked {
        if self.journal.is_none() {
            return if disk.is_powered() { self.reopen(disk, now) } else { Ok(()) };
        }
        if self.rng.one_in(2) {
            return Ok(());
        }
        let start = self.rng.below(SECTORS);
        let extent = Extent::new(start, self.rng.between(1, (SECTORS - start).min(24)));
        let tag = self.next_tag;
        let done = self.append(extent, tag, now).and_then(|()| self.work(now));
        match done {
            Ok(()) => Ok(()),
            Err(AppendError::Busy { .. } | AppendError::NoSpace { .. } | AppendError::OverLimit { .. }) => Ok(()),
            Err(e) => {
                // Down until it is opened again.
                self.journal = None;
                excuse(disk, &e)
            }
        }
    }

    fn append(&mut self, extent: Extent, tag: u64, now: HistoryTime) -> Result<(), AppendError> {
        if self.log.len() >= RECORDS_MAX {
            return Ok(());
        }
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let payload = fill(&vec![tag; extent.sectors.0 as usize]);
        journal.append(&NewRecord {
            kind: RecordKind::Write,
            flags: WriteFlags::NONE,
            volume: VOLUME,
            extent,
            codec: Codec::Raw,
            payload: &payload,
            payload_crc: None,
            time: now,
            source_wall_us: now.0,
            stream: StreamId::default(),
            seq: SourceSeq(self.log.len() as u64 + 2),
        })?;
        self.log.push((extent, tag));
        self.next_tag += 1;
        Ok(())
    }

    fn work(&mut self, now: HistoryTime) -> Result<(), AppendError> {
        let wait = self.rng.one_in(4);
        let Some(journal) = &mut self.journal else { return Ok(()) };
        journal.submit()?;
        journal.poll(wait)?;
        if let Some(job) = journal.next_job(now) {
            // A job that finds no room or no power is due again; damage shows in the reads.
            drop(journal.job_done(job.run()));
        }
        self.note();
        Ok(())
    }

    fn note(&mut self) {
        if let Some(journal) = &self.journal {
            self.durable = self.durable.max(journal.progress().durable);
        }
    }

    fn image(&self, lsn: Lsn) -> Vec<u8> {
        let mut tags = vec![0; SECTORS as usize];
        for (extent, tag) in &self.log[..(lsn.0 as usize).saturating_sub(1)] {
            tags[extent.start() as usize..extent.end() as usize].fill(*tag);
        }
        fill(&tags)
    }

    fn check_head(&self) -> Checked {
        let Some(journal) = &self.journal else { return Ok(()) };
        let written = journal.progress().written;
        let mut got = vec![0; (SECTORS * SECTOR) as usize];
        let view = journal.reader().head_view();
        view.read(VOLUME, 0, &mut got).map_err(|e| chain(&e))?;
        compare(written, &got, &self.image(written))
    }

    /// The newest state and some moments, bit for bit.
    pub(crate) fn check(&mut self, moments: u64) -> Checked {
        self.check_head()?;
        let Some(journal) = &self.journal else { return Ok(()) };
        let reader = journal.reader();
        let written = journal.progress().written;
        for _ in 0..moments {
            let lsn = Lsn(self.rng.between(1, written.0.max(1)));
            let point = reader.resolve(&RecoveryPoint::Lsn(lsn)).map_err(|e| chain(&e))?;
            let view = reader.view(point).map_err(|e| chain(&e))?;
            let mut got = vec![0; (SECTORS * SECTOR) as usize];
            view.read(VOLUME, 0, &mut got).map_err(|e| chain(&e))?;
            compare(lsn, &got, &self.image(lsn))?;
        }
        Ok(())
    }
}

/// Only what the disk made up is an excuse.
fn excuse(disk: &SimDisk, error: &(dyn std::error::Error + 'static)) -> Checked {
    let what = chain(error);
    // A disk that is as good as full takes no new group.
    let full = what.contains(NO_ROOM) || what.contains("no room for a new segment");
    let excused = full || !disk.is_powered() || is_injected(error);
    if excused { Ok(()) } else { Err(what) }
}

fn compare(lsn: Lsn, got: &[u8], want: &[u8]) -> Checked {
    match (0..SECTORS).find(|s| got[(s * SECTOR) as usize..][..512] != want[(s * SECTOR) as usize..][..512]) {
        Some(sector) => Err(format!("sector {sector} at LSN {lsn} is not what was written")),
        None => Ok(()),
    }
}

fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes: ByteLen(128 * 4096),
        batch_bytes: 8 * 4096,
        depth: 2,
        prepared_ahead: 1,
        segments_per_generation: 8,
        index: IndexChoice::None,
    }
}

fn spec() -> GroupSpec {
    GroupSpec {
        id: GroupId(*b"simulated other!"),
        name: "neighbour".into(),
        host: None,
        volumes: vec![VolumeSpec {
            id: VOLUME,
            name: "/dev/other".into(),
            sectors: Sectors(SECTORS),
            identity: "sim:other".into(),
        }],
        policy: GroupPolicy::default(),
    }
}
