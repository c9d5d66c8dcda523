//! The copy: one mechanism for initial sync and resync, one cursor over all volumes.
//!
//! # Comparing
//!
//! Once a group has been copied whole, most of what is dirty on suspicion is the same on both sides: after a host crash that is nearly
//! everything. Where the box can compare, a read is not sent but asked about, twice: first a hash for each granule, then, of the granules that
//! differ, one for each 4 KiB. What is the same is taken out of the read as if the stream had it already, which it has; the rest is
//! sent as any copy is. So what crosses the network is 1/4096 of what is looked at, 1/256 of the granules that differ, and the blocks that do.
//!
//! **Why the answer may come from any state of the box since the gap began.** Take one sector of a block that was found the same. If no record
//! that the box applies after it looked touches the sector, the box holds what the read saw, and the read is right by the rules of copying. If
//! some do, the last of them decides, whatever was there before: and it is a write of the host, or a copied piece, both
//! right by the same rules. Records that were only marked or taken back are dirty again. What remains is a box that forgets what it
//! looked at: it answers only when everything it had taken in before the question is durable, and what it takes in later is in the window here.
//!
//! A connection that ends takes its questions along: what was asked is dirty again. A box that answers heartbeats but no question
//! for [`COMPARE_MS_MAX`] is copied to without asking.

use super::event::{Action, Alarm, Numbered, Payload, ReadId};
use super::{Link, Phase, Source};
use crate::granules::GRANULE_SECTORS;
use crate::pressure::Pressure;
use model::{Extent, ExtentSet, MonoTime, RecordKind, SECTOR, Sectors, VolumeId, WriteFlags};
use wire::MAX_RECORD_BYTES;

const RECORD_SECTORS: u64 = MAX_RECORD_BYTES as u64 / SECTOR;
/// A read that failed is tried again after this; the others go on meanwhile.
const RETRY_MS: u64 = 5_000;

/// A question that is not answered for this long will not be.
const COMPARE_MS_MAX: u64 = 60_000;
/// First each granule, then each block of 4 KiB of those that differ.
const COARSE_SECTORS: u32 = GRANULE_SECTORS as u32;
const FINE_SECTORS: u32 = 8;

/// A read in flight.
#[derive(Debug)]
pub(super) struct Read {
    id: ReadId,
    pub(super) volume: usize,
    pub(super) extent: Extent,
    /// Sectors the stream has already: those the host wrote since, newer than this read may have seen, and those the box found the same.
    masked: ExtentSet,
    asked: Option<Asked>,
}

/// The read is done, and the box has been asked what of it differs.
#[derive(Debug)]
struct Asked {
    id: u64,
    block_sectors: u32,
    runs: Vec<Extent>,
    zeroes: Vec<Extent>,
    since: MonoTime,
}

#[derive(Debug)]
pub(super) struct Copying {
    pub(super) reads: Vec<Read>,
    next_id: u64,
    /// Where the next read is looked for: volume and granule.
    cursor: (usize, u64),
    not_before: MonoTime,
    pub(super) rate: Option<u64>,
    /// Most sectors that were to copy at once in this gap.
    pub(super) total: Sectors,
    /// The box of this connection compares.
    pub(super) box_compares: bool,
    next_compare: u64,
    /// Bytes that were found to be the same, and so were not sent.
    pub(super) same_bytes: u64,
}

impl Copying {
    pub(super) fn new() -> Self {
        Self {
            reads: Vec::new(),
            next_id: 1,
            cursor: (0, 0),
            not_before: MonoTime(0),
            rate: None,
            total: Sectors(0),
            box_compares: false,
            next_compare: 1,
            same_bytes: 0,
        }
    }
    pub(super) fn mask(&mut self, volume: usize, extent: &Extent) {
        for read in self.reads.iter_mut().filter(|read| read.volume == volume) {
            if let Some(both) = read.extent.intersect(extent) {
                read.masked.insert(both);
            }
        }
    }
    pub(super) fn mask_all(&mut self) {
        self.reads.iter_mut().for_each(|read| read.masked.insert(read.extent));
    }
    fn bytes_in_flight(&self) -> u64 {
        self.reads.iter().map(|read| read.extent.bytes()).sum()
    }
}

impl Source {
    /// Sectors in the dirty map or being read.
    pub(super) fn to_copy(&self) -> Sectors {
        let marked: u64 = self.volumes.iter().map(|v| v.dirty.covered().0).sum();
        Sectors(marked + self.copying.bytes_in_flight() / SECTOR)
    }

    pub(super) fn nothing_to_copy(&self) -> bool {
        self.copying.reads.is_empty() && self.volumes.iter().all(|v| v.dirty.is_empty())
    }

    /// Whether copying makes sense at all now: somebody takes it, and the spool is not needed for live writes.
    pub(super) fn may_copy(&self) -> bool {
        self.link == Link::Ready
            && self.positioned
            && !self.paused
            && !self.journal_full
            && self.storing_before_send.is_none()
            && self.pressure < Pressure::SpillOnly
            && self.window.bytes() <= self.config.spool_bytes_max / 2
            && self.window.len() <= self.config.spool_records_max / 2
    }

    pub(super) fn issue_reads(&mut self, out: &mut Vec<Action>) {
        // A read never takes more than an eighth of the spool, so that a small spool still copies.
        let most =
            (self.config.read_bytes_max.min(self.config.spool_bytes_max / 8) / (GRANULE_SECTORS * SECTOR)).max(1);
        while self.copying.reads.len() < self.config.reads_max
            && self.now.mono >= self.copying.not_before
            && !self.survey.holds_reads(self.now.mono)
            && self.may_copy()
            && let Some((volume, run)) = self.next_dirty(most)
        {
            let state = &mut self.volumes[volume];
            let extent = state.dirty.extent(&run);
            let held = self.window.bytes() + self.copying.bytes_in_flight();
            if held > 0 && held + extent.bytes() > self.config.spool_bytes_max / 2 {
                return;
            }
            state.dirty.clear(run.clone());
            self.copying.cursor = (volume, run.end);
            let id = ReadId(self.copying.next_id);
            self.copying.next_id += 1;
            self.copying.reads.push(Read { id, volume, extent, masked: ExtentSet::new(), asked: None });
            out.push(Action::ReadVolume { read: id, volume: state.spec.id, extent });
            let delay = match self.pressure {
                Pressure::Delay { ms } => ms,
                Pressure::None | Pressure::SpillOnly | Pressure::DirtyMapOnly => 0,
            };
            let paced = self.copying.rate.map_or(0, |rate| extent.bytes().saturating_mul(1000) / rate.max(1));
            // A rate of nearly nothing must not push the next read out of reach when it is raised again.
            self.copying.not_before = self.now.mono.plus_ms(delay.max(paced).min(10_000));
        }
    }

    fn next_dirty(&self, most: u64) -> Option<(usize, std::ops::Range<u64>)> {
        let (at, from) = self.copying.cursor;
        let count = self.volumes.len();
        // Once round: the rest of this volume, the others, and this one from its start.
        (0..=count).find_map(|step| {
            let volume = (at + step) % count.max(1);
            let run = self.volumes.get(volume)?.dirty.next_run(if step == 0 { from } else { 0 }, most)?;
            Some((volume, run))
        })
    }

    fn copies_now(&self) -> bool {
        self.gap.as_ref().is_some_and(|gap| gap.phase == Phase::Copying)
    }

    pub(super) fn read_done(&mut self, id: ReadId, zeroes: &[Extent], out: &mut Vec<Action>) {
        let Some(at) = self.copying.reads.iter().position(|read| read.id == id && read.asked.is_none()) else { return };
        // Before the first copy has ended there is nothing to compare with.
        if self.copies_now() && self.copying.box_compares && self.synced_once && self.link == Link::Ready {
            let whole = self.copying.reads[at].extent;
            return self.ask(at, COARSE_SECTORS, vec![whole], zeroes.to_vec(), out);
        }
        let read = self.copying.reads.swap_remove(at);
        self.finish_read(read, zeroes, out);
    }

    fn ask(&mut self, at: usize, block_sectors: u32, runs: Vec<Extent>, zeroes: Vec<Extent>, out: &mut Vec<Action>) {
        let id = self.copying.next_compare;
        self.copying.next_compare += 1;
        let read = &mut self.copying.reads[at];
        let volume = self.volumes[read.volume].spec.id;
        out.push(Action::Compare { id, read: read.id, volume, block_sectors, runs: runs.clone() });
        read.asked = Some(Asked { id, block_sectors, runs, zeroes, since: self.now.mono });
    }

    pub(super) fn compared(&mut self, id: u64, differ: &[u8], out: &mut Vec<Action>) {
        let of_this = |read: &Read| read.asked.as_ref().is_some_and(|asked| asked.id == id);
        let Some(at) = self.copying.reads.iter().position(of_this) else { return };
        let read = &mut self.copying.reads[at];
        let Some(asked) = read.asked.take() else { return };
        let mut different: Vec<Extent> = Vec::new();
        for (i, block) in wire::blocks(&asked.runs, asked.block_sectors).enumerate() {
            if !wire::differs(differ, i) {
                read.masked.insert(block);
                self.copying.same_bytes += block.bytes();
                continue;
            }
            match different.last_mut() {
                Some(last) if last.end() == block.start() => last.sectors.0 += block.sectors.0,
                _ => different.push(block),
            }
        }
        if asked.block_sectors == COARSE_SECTORS && !different.is_empty() && self.link == Link::Ready {
            return self.ask(at, FINE_SECTORS, different, asked.zeroes, out);
        }
        let read = self.copying.reads.swap_remove(at);
        self.finish_read(read, &asked.zeroes, out);
    }

    /// Questions that will not be answered: of a connection that has ended, or overdue.
    pub(super) fn give_up_asking(&mut self, out: &mut Vec<Action>) {
        let (ready, now) = (self.link == Link::Ready, self.now.mono);
        let overdue = |asked: &Asked| now.ms_since(asked.since) >= COMPARE_MS_MAX;
        while let Some(at) =
            self.copying.reads.iter().position(|read| read.asked.as_ref().is_some_and(|asked| !ready || overdue(asked)))
        {
            let read = self.copying.reads.swap_remove(at);
            self.mark_dirty(read.volume, &read.extent);
            out.push(Action::ReadFinished { read: read.id });
            if ready && self.copying.box_compares {
                self.copying.box_compares = false;
                out.push(Action::Alarm(Alarm::NotCompared { ms: COMPARE_MS_MAX }));
            }
        }
    }

    /// The read's data goes into the stream, as far as the stream does not have it.
    fn finish_read(&mut self, read: Read, zeroes: &[Extent], out: &mut Vec<Action>) {
        let id = read.id;
        if !self.copies_now() {
            // No room now; later it is read again.
            self.mark_dirty(read.volume, &read.extent);
            out.push(Action::ReadFinished { read: id });
            return;
        }
        let mut data: ExtentSet = [read.extent].into_iter().collect();
        read.masked.iter().for_each(|masked| data.remove(&masked));
        let mut zero = Vec::new();
        for extent in zeroes {
            zero.extend(data.overlap(extent));
            data.remove(extent);
        }
        let volume = self.volumes[read.volume].spec.id;
        for extent in zero {
            self.keep_copied(RecordKind::Zero, volume, extent, Payload::None, out);
        }
        for run in data.iter() {
            let mut at = run.start();
            while at < run.end() {
                let piece = Extent::between(at, run.end().min(at + RECORD_SECTORS));
                self.keep_copied(RecordKind::Write, volume, piece, Payload::Read(id), out);
                at = piece.end();
            }
        }
        out.push(Action::ReadFinished { read: id });
    }

    fn keep_copied(
        &mut self,
        kind: RecordKind,
        volume: VolumeId,
        extent: Extent,
        payload: Payload,
        out: &mut Vec<Action>,
    ) {
        let record = Numbered {
            seq: self.window.next(),
            kind,
            flags: WriteFlags::SYNC,
            volume,
            extent,
            mono: self.now.mono,
            wall_us: self.now.wall_us,
        };
        self.window.push(&record, 0);
        out.push(Action::Keep { record, payload });
    }

    pub(super) fn read_failed(&mut self, id: ReadId, out: &mut Vec<Action>) {
        let Some(at) = self.copying.reads.iter().position(|read| read.id == id) else { return };
        let read = self.copying.reads.swap_remove(at);
        self.mark_dirty(read.volume, &read.extent);
        self.copying.not_before = self.copying.not_before.max(self.now.mono.plus_ms(RETRY_MS));
        out.push(Action::ReadFinished { read: id });
        out.push(Action::Alarm(Alarm::ReadFailed { volume: self.volumes[read.volume].spec.id, extent: read.extent }));
    }
}
