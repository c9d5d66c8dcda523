//! Records that are numbered and not yet durable on the box. Payloads are with the caller.

use crate::source::event::Numbered;
use model::{Extent, MonoTime, RecordKind, SourceSeq, VolumeId, WriteFlags};
use std::collections::VecDeque;
use wire::{FrameKind, charge};

/// What the machine has to remember of a record: 40 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub lba: u64,
    pub mono: MonoTime,
    pub sectors: u32,
    pub charge: u32,
    pub volume: VolumeId,
    pub kind: RecordKind,
    pub sync: bool,
}

impl Entry {
    pub(super) fn extent(&self) -> Extent {
        Extent::new(self.lba, u64::from(self.sectors))
    }
    /// A write of the host, as opposed to a copy or a mark: lag is counted from these.
    pub(super) fn is_live(&self) -> bool {
        self.kind != RecordKind::Mark && !self.sync
    }
}

/// `[first, next)`, in order. `first` is the one after the last durable record.
#[derive(Debug)]
pub(super) struct Window {
    first: SourceSeq,
    entries: VecDeque<Entry>,
    bytes: u64,
}

impl Window {
    pub(super) fn starting_at(first: SourceSeq) -> Self {
        Self { first, entries: VecDeque::new(), bytes: 0 }
    }
    pub(super) fn first(&self) -> SourceSeq {
        self.first
    }
    pub(super) fn next(&self) -> SourceSeq {
        SourceSeq(self.first.0 + self.entries.len() as u64)
    }
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    /// Charged bytes of everything in the window.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
    pub(super) fn get(&self, seq: SourceSeq) -> Option<&Entry> {
        self.entries.get(usize::try_from(seq.0.checked_sub(self.first.0)?).ok()?)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
    /// The oldest write of the host in the window. Marks and copies in front of it are few at any time but during a copy, when lag is
    /// counted from the gap instead.
    pub(super) fn oldest_live(&self) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.is_live())
    }
    pub(super) fn push(&mut self, record: &Numbered, payload_len: u32) {
        debug_assert_eq!(record.seq, self.next());
        let charge = charge(FrameKind::Record(record.kind), record.extent, payload_len);
        self.bytes += charge;
        self.entries.push_back(Entry {
            lba: record.extent.lba.0,
            mono: record.mono,
            sectors: record.extent.sectors.0 as u32,
            charge: charge as u32,
            volume: record.volume,
            kind: record.kind,
            sync: record.flags.contains(WriteFlags::SYNC),
        });
    }
    /// Forgets everything up to and including `through`.
    pub(super) fn release(&mut self, through: SourceSeq) {
        while self.first <= through
            && let Some(entry) = self.entries.pop_front()
        {
            self.bytes -= u64::from(entry.charge);
            self.first = self.first.next();
        }
    }
    /// Takes out everything from `from` on; the next record gets that number.
    pub(super) fn truncate(&mut self, from: SourceSeq, mut each: impl FnMut(&Entry)) {
        let keep = usize::try_from(from.0.saturating_sub(self.first.0)).unwrap_or(usize::MAX);
        for entry in self.entries.drain(keep.min(self.entries.len())..) {
            self.bytes -= u64::from(entry.charge);
            each(&entry);
        }
    }
}
