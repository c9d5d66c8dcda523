//! Where the box puts what arrives: a journal on a disk that lies ([`crate::journal_store`]), or a list in memory.

use crate::rng::Rng;
use model::{
    Codec, Extent, GapReason, HistoryTime, Lsn, Mark, RecordKind, SECTOR, Sectors, SourceSeq, StreamId, VolumeSpec,
    WriteFlags,
};
use wire::{FrameHeader, Unpacker};

/// Where the newest stream stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Position {
    pub(crate) stream: StreamId,
    pub(crate) appended: SourceSeq,
    pub(crate) durable: SourceSeq,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct StoreProgress {
    pub(crate) appended: Lsn,
    pub(crate) written: Lsn,
    pub(crate) durable: Lsn,
}

/// Why a record was not taken.
#[derive(Debug)]
pub(crate) enum NotTaken {
    /// Ask again after a step.
    Busy,
    Full,
    /// The store must be opened again.
    Dead(String),
}

/// How a box goes down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Down {
    PowerCut,
    Killed,
    InOrder,
}

pub(crate) trait Store {
    fn append(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        time: HistoryTime,
        stream: StreamId,
    ) -> Result<Lsn, NotTaken>;
    fn append_mark(
        &mut self,
        mark: &Mark,
        time: HistoryTime,
        stream: StreamId,
        seq: SourceSeq,
    ) -> Result<Lsn, NotTaken>;
    /// Some work: sends what is appended, collects what is done, runs what runs behind. Says whether it still lives.
    fn step(&mut self, now: HistoryTime) -> Result<(), String>;
    fn progress(&self) -> StoreProgress;
    fn position(&self) -> Option<Position>;
    fn in_gap(&self) -> Option<GapReason>;
    fn last_time(&self) -> HistoryTime;
    fn set_full(&mut self, full: bool);
    /// Makes some write, flush or operation to come fail, or the power go in the middle of it.
    fn arm_fault(&mut self) {}
    /// It cannot go on without being opened again.
    fn is_down(&self) -> bool {
        false
    }
    /// Goes down and comes up again; from then on it has what survived.
    fn restart(&mut self, how: Down, now: HistoryTime) -> Result<(), String>;
    /// Loses everything or a durable part, as no honest box does.
    fn betray(&mut self, now: HistoryTime) -> Result<(), String>;
    /// Ranges of LSNs in which every request boundary is offered as a recovery point, both ends included.
    fn offered(&self) -> Vec<(Lsn, Lsn)>;
    /// The bytes of a volume at this point.
    fn read(&mut self, lsn: Lsn, volume: usize, extent: Extent) -> Result<Vec<u8>, String>;
    /// The newest state, gaps or not.
    fn read_head(&mut self, volume: usize, extent: Extent) -> Result<Vec<u8>, String>;
    /// Turns one bit over in a file that is at rest; none where nothing is at rest.
    fn flip(&mut self) -> Result<Option<Flipped>, String> {
        Ok(None)
    }
    /// What a verification complains of.
    fn verify(&mut self) -> Vec<String> {
        Vec::new()
    }
    /// Compares the other group on the same disk with its oracle.
    fn check_neighbour(&mut self, _moments: u64) -> Result<(), String> {
        Ok(())
    }
    /// What the run added to the counts of the summary.
    fn counts(&self) -> StoreCounts;
}

/// A bit that turned over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Flipped {
    pub(crate) file: String,
    pub(crate) offset: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StoreCounts {
    pub(crate) segments: u64,
    pub(crate) cut_tails: u64,
    pub(crate) folds: u64,
}

struct Item {
    kind: RecordKind,
    flags: WriteFlags,
    volume: usize,
    extent: Extent,
    data: Vec<u8>,
    mark: Option<Mark>,
    time: HistoryTime,
    stream: StreamId,
    seq: SourceSeq,
}

/// The list in memory: what a journal should be, without any of the ways it could fail to.
pub(crate) struct MemoryStore {
    rng: Rng,
    specs: Vec<VolumeSpec>,
    items: Vec<Item>,
    written: u64,
    durable: u64,
    full: bool,
    unpacker: Unpacker,
}

impl MemoryStore {
    pub(crate) fn new(seed: u64, specs: Vec<VolumeSpec>) -> std::io::Result<Self> {
        Ok(Self {
            rng: Rng::new(seed, 50),
            specs,
            items: Vec::new(),
            written: 0,
            durable: 0,
            full: false,
            unpacker: Unpacker::new()?,
        })
    }
    fn take(&mut self, item: Item) -> Result<Lsn, NotTaken> {
        if self.full {
            return Err(NotTaken::Full);
        }
        if self.items.len() as u64 - self.written > 200 {
            return Err(NotTaken::Busy);
        }
        self.items.push(item);
        Ok(Lsn(self.items.len() as u64))
    }
    fn image(&self, lsn: u64, volume: usize) -> Vec<u8> {
        let Sectors(sectors) = self.specs[volume].sectors;
        let mut image = vec![0; (sectors * SECTOR) as usize];
        for item in
            self.items.iter().take(lsn as usize).filter(|item| item.volume == volume && item.kind.changes_volume())
        {
            let place = (item.extent.start() * SECTOR) as usize..(item.extent.end() * SECTOR) as usize;
            if item.kind == RecordKind::Write { image[place].copy_from_slice(&item.data) } else { image[place].fill(0) }
        }
        image
    }
    fn cut(image: Vec<u8>, extent: Extent) -> Vec<u8> {
        image[(extent.start() * SECTOR) as usize..(extent.end() * SECTOR) as usize].to_vec()
    }
}

impl Store for MemoryStore {
    fn append(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        time: HistoryTime,
        stream: StreamId,
    ) -> Result<Lsn, NotTaken> {
        header.check_payload(payload).map_err(|error| NotTaken::Dead(error.to_string()))?;
        let wire::FrameKind::Record(kind) = header.kind else { return Err(NotTaken::Dead("not a record".into())) };
        let mut data = vec![0; if kind == RecordKind::Write { header.extent.bytes() as usize } else { 0 }];
        let codec = if kind == RecordKind::Write { header.codec } else { Codec::Raw };
        self.unpacker.unpack(codec, payload, &mut data).map_err(|error| NotTaken::Dead(error.to_string()))?;
        let volume = self.specs.iter().position(|spec| spec.id == header.volume).unwrap_or(usize::MAX);
        let (flags, extent, seq) = (header.flags, header.extent, header.seq);
        self.take(Item { kind, flags, volume, extent, data, mark: None, time, stream, seq })
    }
    fn append_mark(
        &mut self,
        mark: &Mark,
        time: HistoryTime,
        stream: StreamId,
        seq: SourceSeq,
    ) -> Result<Lsn, NotTaken> {
        self.take(Item {
            kind: RecordKind::Mark,
            flags: WriteFlags::NONE,
            volume: usize::MAX,
            extent: Extent::default(),
            data: Vec::new(),
            mark: Some(mark.clone()),
            time,
            stream,
            seq,
        })
    }
    fn step(&mut self, _now: HistoryTime) -> Result<(), String> {
        let end = self.items.len() as u64;
        self.written = self.rng.between(self.written, end);
        if self.rng.one_in(2) {
            self.durable = self.rng.between(self.durable, self.written);
        }
        Ok(())
    }
    fn progress(&self) -> StoreProgress {
        let appended = Lsn(self.items.len() as u64);
        StoreProgress { appended, written: Lsn(self.written), durable: Lsn(self.durable) }
    }
    fn position(&self) -> Option<Position> {
        let last = self.items.last()?;
        let durable = self.items.iter().take(self.durable as usize).rev().find(|item| item.stream == last.stream);
        Some(Position {
            stream: last.stream,
            appended: last.seq,
            durable: durable.map_or(SourceSeq::ZERO, |item| item.seq),
        })
    }
    fn in_gap(&self) -> Option<GapReason> {
        for item in self.items.iter().rev() {
            match &item.mark {
                Some(Mark::Consistent) => return None,
                Some(Mark::GapBegin { reason }) => return Some(*reason),
                Some(_) | None => {}
            }
        }
        Some(GapReason::InitialSync)
    }
    fn last_time(&self) -> HistoryTime {
        self.items.last().map_or(HistoryTime(0), |item| item.time)
    }
    fn set_full(&mut self, full: bool) {
        self.full = full;
    }
    fn restart(&mut self, how: Down, _now: HistoryTime) -> Result<(), String> {
        let end = self.items.len() as u64;
        let kept = if how == Down::InOrder { end } else { self.rng.between(self.durable, end) };
        self.items.truncate(kept as usize);
        (self.written, self.durable) = (kept, kept);
        Ok(())
    }
    fn betray(&mut self, _now: HistoryTime) -> Result<(), String> {
        let kept = if self.rng.one_in(2) { 0 } else { self.rng.below(self.items.len() as u64 + 1) };
        self.items.truncate(kept as usize);
        (self.written, self.durable) = (kept, kept);
        Ok(())
    }
    fn offered(&self) -> Vec<(Lsn, Lsn)> {
        let mut ranges: Vec<(Lsn, Lsn)> = Vec::new();
        let mut open = None;
        for (at, item) in self.items.iter().enumerate() {
            let lsn = Lsn(at as u64 + 1);
            match &item.mark {
                Some(Mark::Consistent) => open = Some(lsn),
                Some(Mark::GapBegin { .. }) => {
                    if let Some(first) = open.take() {
                        ranges.push((first, lsn.prev()));
                    }
                }
                Some(_) | None => {}
            }
        }
        if let Some(first) = open {
            ranges.push((first, Lsn(self.items.len() as u64)));
        }
        ranges
    }
    fn read(&mut self, lsn: Lsn, volume: usize, extent: Extent) -> Result<Vec<u8>, String> {
        let item = lsn.0.checked_sub(1).and_then(|at| self.items.get(at as usize)).ok_or("no such LSN")?;
        if item.flags.contains(WriteFlags::MORE) {
            return Err("inside a request".into());
        }
        Ok(Self::cut(self.image(lsn.0, volume), extent))
    }
    fn read_head(&mut self, volume: usize, extent: Extent) -> Result<Vec<u8>, String> {
        Ok(Self::cut(self.image(u64::MAX, volume), extent))
    }
    fn counts(&self) -> StoreCounts {
        StoreCounts::default()
    }
}
