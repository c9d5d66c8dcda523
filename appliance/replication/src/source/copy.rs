//! The copy: one mechanism for initial sync and resync, one cursor over all volumes.

use super::event::{Action, Alarm, Numbered, Payload, ReadId};
use super::{Link, Phase, Source};
use crate::granules::GRANULE_SECTORS;
use crate::pressure::Pressure;
use model::{Extent, ExtentSet, MonoTime, RecordKind, SECTOR, Sectors, VolumeId, WriteFlags};
use wire::MAX_RECORD_BYTES;

const RECORD_SECTORS: u64 = MAX_RECORD_BYTES as u64 / SECTOR;
/// A read that failed is tried again after this; the others go on meanwhile.
const RETRY_MS: u64 = 5_000;

/// A read in flight.
#[derive(Debug)]
pub(super) struct Read {
    id: ReadId,
    pub(super) volume: usize,
    pub(super) extent: Extent,
    /// Sectors the host wrote since: the stream has them already, and newer than this read may have seen.
    masked: ExtentSet,
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
}

impl Copying {
    pub(super) fn new() -> Self {
        Self { reads: Vec::new(), next_id: 1, cursor: (0, 0), not_before: MonoTime(0), rate: None, total: Sectors(0) }
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
            self.copying.reads.push(Read { id, volume, extent, masked: ExtentSet::new() });
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

    pub(super) fn read_done(&mut self, id: ReadId, zeroes: &[Extent], out: &mut Vec<Action>) {
        let Some(at) = self.copying.reads.iter().position(|read| read.id == id) else { return };
        let read = self.copying.reads.swap_remove(at);
        let copying = self.gap.as_ref().is_some_and(|gap| gap.phase == Phase::Copying);
        if !copying {
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
