//! A journal on a simulated disk beside a slow and obvious model of what it must say.
#![allow(dead_code, reason = "every test file uses another part of it")]

use durable::{Disk, SimDisk};
use journal::{
    AppendError, IndexChoice, JobError, JobOutcome, Journal, JournalOptions, JournalReader, NewRecord, ResolvedPoint,
};
use model::{
    ByteLen, Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Mark, RecordKind, Sectors, SourceSeq,
    StreamId, Term, TimelineId, VolumeId, VolumeSpec, WriteFlags,
};
use std::{path::Path, sync::Arc};

pub const DIR: &str = "groups/g";
pub const STREAM: StreamId = StreamId([5; 16]);

/// xorshift; the seed stands in every assertion.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, below: u64) -> u64 {
        self.next() % below
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// How many seeds a long test takes: a few in the run of every day, as many as `HOLDFAST_SEEDS` says in a long one.
pub fn seeds(default: u64) -> u64 {
    match std::env::var("HOLDFAST_SEEDS") {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("HOLDFAST_SEEDS={text}: {e}")),
        Err(_) => default,
    }
}

pub fn dir() -> &'static Path {
    Path::new(DIR)
}

pub fn spec(sectors: &[u64]) -> GroupSpec {
    let volumes = sectors.iter().enumerate().map(|(i, sectors)| VolumeSpec {
        id: VolumeId(i as u32 + 1),
        name: format!("/dev/sd{}", (b'b' + i as u8) as char),
        sectors: Sectors(*sectors),
        identity: format!("wwn-{i}"),
    });
    GroupSpec {
        id: GroupId([9; 16]),
        name: "db".into(),
        host: None,
        volumes: volumes.collect(),
        policy: GroupPolicy { window_hours: 1_000_000, ..GroupPolicy::default() },
    }
}

/// Small segments, so that a short script crosses many borders.
pub fn options(index: IndexChoice) -> JournalOptions {
    JournalOptions {
        segment_bytes: ByteLen(160 * 1024),
        batch_bytes: 8192,
        depth: 3,
        prepared_ahead: 1,
        segments_per_generation: 8,
        index,
    }
}

pub fn disk(seed: u64) -> SimDisk {
    SimDisk::new(seed, ByteLen(256 << 20))
}

pub fn arc(disk: &SimDisk) -> Arc<dyn Disk> {
    Arc::new(disk.clone())
}

/// What a record does, as the model keeps it.
#[derive(Clone, Debug)]
pub enum Change {
    Write { volume: usize, lba: u64, data: Vec<u8> },
    Zero { volume: usize, lba: u64, sectors: u64 },
    None,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub change: Change,
    pub time: u64,
    pub more: bool,
    pub kind: RecordKind,
}

/// Everything that was appended, in order: entry `i` has LSN `first + i`.
#[derive(Clone, Debug)]
pub struct Oracle {
    pub sectors: Vec<u64>,
    pub first: u64,
    pub log: Vec<Entry>,
    /// The volumes before the first entry.
    pub start: Vec<Vec<u8>>,
}

impl Oracle {
    pub fn new(sectors: &[u64]) -> Self {
        let start = sectors.iter().map(|s| vec![0; (s * 512) as usize]).collect();
        Self { sectors: sectors.to_vec(), first: 1, log: Vec::new(), start }
    }
    pub fn last(&self) -> Lsn {
        Lsn(self.first + self.log.len() as u64 - 1)
    }
    pub fn apply(images: &mut [Vec<u8>], change: &Change) {
        match change {
            Change::Write { volume, lba, data } => {
                images[*volume][(lba * 512) as usize..][..data.len()].copy_from_slice(data);
            }
            Change::Zero { volume, lba, sectors } => {
                images[*volume][(lba * 512) as usize..][..(sectors * 512) as usize].fill(0);
            }
            Change::None => {}
        }
    }
    pub fn images_at(&self, lsn: Lsn) -> Vec<Vec<u8>> {
        let mut images = self.start.clone();
        let count = (lsn.0 + 1).saturating_sub(self.first) as usize;
        self.log[..count].iter().for_each(|e| Self::apply(&mut images, &e.change));
        images
    }
    /// What was not acknowledged and is not there after recovery never happened.
    pub fn cut(&mut self, last: Lsn) {
        self.log.truncate((last.0 + 1).saturating_sub(self.first) as usize);
    }
}

/// A random record for these volumes.
pub fn draw(rng: &mut Rng, sectors: &[u64], time: u64) -> Entry {
    let volume = rng.below(sectors.len() as u64) as usize;
    let size = sectors[volume];
    // Half of the writes fall into a small part, so that they overlap each other often and not only at block borders.
    let lba = if rng.below(2) == 0 { rng.below(size.min(64)) } else { rng.below(size) };
    let room = size - lba;
    let change = match rng.below(20) {
        0 => Change::Zero { volume, lba, sectors: 1 + rng.below(room) },
        1 | 2 => Change::Zero { volume, lba, sectors: 1 + rng.below(room.min(32)) },
        3 => Change::None,
        4 => {
            let len = 1 + rng.below(room.min(256));
            Change::Write { volume, lba, data: rng.bytes((len * 512) as usize) }
        }
        _ => {
            let len = 1 + rng.below(room.min(16));
            Change::Write { volume, lba, data: rng.bytes((len * 512) as usize) }
        }
    };
    let kind = match (&change, rng.below(2)) {
        (Change::Write { .. }, _) => RecordKind::Write,
        (Change::Zero { .. }, 0) => RecordKind::Zero,
        (Change::Zero { .. }, _) => RecordKind::Discard,
        (Change::None, _) => RecordKind::Flush,
    };
    let more = matches!(change, Change::Write { .. }) && rng.below(8) == 0;
    Entry { change, time, more, kind }
}

/// Appends an entry, collecting completions when the journal is busy.
pub fn append(journal: &mut Journal, entry: &Entry, seq: u64) -> Result<Lsn, AppendError> {
    let (volume, extent, payload): (usize, Extent, &[u8]) = match &entry.change {
        Change::Write { volume, lba, data } => (*volume, Extent::new(*lba, data.len() as u64 / 512), data),
        Change::Zero { volume, lba, sectors } => (*volume, Extent::new(*lba, *sectors), &[]),
        Change::None => (0, Extent::default(), &[]),
    };
    // Every fifth write is stored compressed.
    let compressed = (entry.kind == RecordKind::Write && seq.is_multiple_of(5))
        .then(|| zstd::bulk::compress(payload, 1).expect("compresses"))
        .filter(|c| c.len() <= journal::MAX_RECORD_BYTES);
    let (codec, payload) = compressed.as_deref().map_or((Codec::Raw, payload), |c| (Codec::Zstd, c));
    let record = NewRecord {
        kind: entry.kind,
        flags: if entry.more { WriteFlags::MORE } else { WriteFlags::NONE },
        volume: VolumeId(volume as u32 + 1),
        extent,
        codec,
        payload,
        payload_crc: Some(crc32fast::hash(payload)),
        time: HistoryTime(entry.time),
        source_wall_us: entry.time,
        stream: STREAM,
        seq: SourceSeq(seq),
    };
    loop {
        match journal.append(&record) {
            Err(AppendError::Busy { .. }) => journal.poll(true).map(|_| ())?,
            other => return other,
        }
    }
}

pub fn mark(journal: &mut Journal, oracle: &mut Oracle, mark: &Mark, time: u64) -> Result<Lsn, AppendError> {
    let lsn = loop {
        match journal.append_mark(mark, HistoryTime(time), StreamId::default(), SourceSeq(0)) {
            Err(AppendError::Busy { .. }) => journal.poll(true).map(|_| ())?,
            other => break other?,
        }
    };
    oracle.log.push(Entry { change: Change::None, time, more: false, kind: RecordKind::Mark });
    Ok(lsn)
}

/// Runs what is due, until nothing is or something fails.
pub fn run_jobs(journal: &mut Journal, now: u64) -> Result<Vec<JobOutcome>, JobError> {
    let mut out = Vec::new();
    while let Some(job) = journal.next_job(HistoryTime(now)) {
        out.push(journal.job_done(job.run())?);
        assert!(out.len() < 10_000, "jobs never end: {:?}", &out[out.len() - 5..]);
    }
    Ok(out)
}

/// Compares a whole view with the model.
pub fn check_view(reader: &JournalReader, timeline: TimelineId, lsn: Lsn, want: &[Vec<u8>], what: &str) {
    let at = ResolvedPoint { timeline, lsn, time: HistoryTime(0) };
    let view = reader.view(at).unwrap_or_else(|e| panic!("{what}: view at {lsn}: {e}"));
    for (i, image) in want.iter().enumerate() {
        let mut got = vec![0xee; image.len()];
        let volume = VolumeId(i as u32 + 1);
        view.read(volume, 0, &mut got).unwrap_or_else(|e| panic!("{what}: read {volume} at {lsn}: {e:?}"));
        if let Some(at) = got.iter().zip(image).position(|(a, b)| a != b) {
            panic!("{what}: at LSN {lsn} volume {volume} differs at byte {at} (sector {})", at / 512);
        }
    }
}

pub fn create(disk: &SimDisk, sectors: &[u64], index: IndexChoice) -> Journal {
    Journal::create(arc(disk), dir(), &spec(sectors), Term(1), options(index), HistoryTime(1)).expect("creates")
}

pub fn open(disk: &SimDisk, index: IndexChoice) -> Journal {
    Journal::open(arc(disk), dir(), options(index), HistoryTime(1)).expect("opens").0
}

/// An error and its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text = format!("{text}: {cause}");
        at = cause.source();
    }
    text
}
