//! Pieces: which record holds the newest data of which sectors.
//!
//! A *version* is what one record says about an extent; a *piece* is the part of a version that nothing newer hides. The
//! pieces of one run never overlap and are sorted by (volume, lba); two that could be one are one (they go on in the same
//! record, or both read as zeroes).
//!
//! Invariants, relied upon by every reader:
//! - a sector that some version of the input touched lies in exactly one piece of the output, and that piece names the
//!   newest such version (of equal LSNs, which a journal never has, the later in the input);
//! - a piece of kind [`PieceKind::Zero`] names no record (`offset` and `skip` are 0): its answer needs none. Its `ordinal`
//!   is the highest of the zero versions joined into it, so it is dropped only when all of them are in the base;
//! - a piece of kind [`PieceKind::Data`] whose ordinal is below the first kept segment means "read the base".
//!
//! Tested against one cell per sector over hundreds of seeds.

use model::{Extent, ExtentSet, Lsn, VolumeId};
use std::collections::BinaryHeap;

/// What the sectors of a piece read as.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum PieceKind {
    /// The record's payload.
    Data = 1,
    /// Zeroes: a ZERO or DISCARD record.
    Zero = 2,
}

/// The newest version of a stretch of sectors, within one run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Piece {
    pub volume: VolumeId,
    pub lba: u64,
    /// Never 0.
    pub sectors: u32,
    /// The segment, counted within its timeline.
    pub ordinal: u32,
    /// Where the record's header starts in the segment file.
    pub offset: u32,
    /// Sectors into the record's extent.
    pub skip: u32,
    pub kind: PieceKind,
}

impl Piece {
    /// One past the last sector.
    pub fn end(&self) -> u64 {
        self.lba.saturating_add(u64::from(self.sectors))
    }

    pub fn extent(&self) -> Extent {
        Extent::new(self.lba, u64::from(self.sectors))
    }

    /// The part of the piece inside `[start, end)`; none when they do not meet.
    pub fn clip(&self, start: u64, end: u64) -> Option<Piece> {
        let from = start.max(self.lba);
        let to = end.min(self.end());
        if from >= to {
            return None;
        }
        // Both differences are at most `self.sectors`, a u32.
        let cut = (from - self.lba) as u32;
        let skip = match self.kind {
            PieceKind::Data => self.skip.saturating_add(cut),
            PieceKind::Zero => 0,
        };
        Some(Piece { lba: from, sectors: (to - from) as u32, skip, ..*self })
    }

    /// Takes `next` in when it goes on where this one ends, in the same record or as zeroes too.
    fn join(&mut self, next: &Piece) -> bool {
        if self.volume != next.volume || self.kind != next.kind || self.end() != next.lba {
            return false;
        }
        let Some(sectors) = self.sectors.checked_add(next.sectors) else { return false };
        match self.kind {
            PieceKind::Zero => self.ordinal = self.ordinal.max(next.ordinal),
            PieceKind::Data => {
                let goes_on = self.ordinal == next.ordinal
                    && self.offset == next.offset
                    && self.skip.checked_add(self.sectors) == Some(next.skip);
                if !goes_on {
                    return false;
                }
            }
        }
        self.sectors = sectors;
        true
    }
}

/// What one record of a segment says about an extent, as its footer lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version {
    pub volume: VolumeId,
    pub lba: u64,
    pub sectors: u32,
    pub lsn: Lsn,
    pub offset: u32,
    pub kind: PieceKind,
}

impl Version {
    fn end(&self) -> u64 {
        self.lba.saturating_add(u64::from(self.sectors))
    }
}

/// A version that covers the sweep's position; the newest one comes out of the heap first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Live {
    lsn: Lsn,
    /// Index into the sorted input: settles equal LSNs.
    index: usize,
}

/// The newest, non-overlapping pieces of one segment's versions, sorted by (volume, lba).
///
/// For a view in the middle of a segment, give only the versions at or below its LSN.
pub fn pieces_from_versions(ordinal: u32, versions: impl IntoIterator<Item = Version>) -> Vec<Piece> {
    let mut versions: Vec<Version> = versions.into_iter().filter(|v| v.end() > v.lba).collect();
    // A stable sort: of two with the same LSN at one place the later of the input has the higher index and wins.
    versions.sort_by_key(|v| (v.volume, v.lba, v.lsn));
    let mut out = Vec::with_capacity(versions.len());
    let mut joiner = Joiner::default();
    let mut heap: BinaryHeap<Live> = BinaryHeap::new();
    let mut next = 0;
    while next < versions.len() {
        let volume = versions[next].volume;
        let mut position = versions[next].lba;
        loop {
            while next < versions.len() && versions[next].volume == volume && versions[next].lba <= position {
                heap.push(Live { lsn: versions[next].lsn, index: next });
                next += 1;
            }
            let next_start = (next < versions.len() && versions[next].volume == volume).then(|| versions[next].lba);
            while heap.peek().is_some_and(|top| versions[top.index].end() <= position) {
                heap.pop();
            }
            let Some(top) = heap.peek() else {
                match next_start {
                    Some(start) => position = start,
                    None => break,
                }
                continue;
            };
            let top = &versions[top.index];
            let end = next_start.map_or(top.end(), |start| start.min(top.end()));
            let skip = match top.kind {
                // At most `top.sectors`, a u32.
                PieceKind::Data => (position - top.lba) as u32,
                PieceKind::Zero => 0,
            };
            let offset = if top.kind == PieceKind::Data { top.offset } else { 0 };
            let piece = Piece {
                volume,
                lba: position,
                sectors: (end - position) as u32,
                ordinal,
                offset,
                skip,
                kind: top.kind,
            };
            out.extend(joiner.push(piece));
            position = end;
        }
    }
    out.extend(joiner.finish());
    out
}

/// Joins neighbours of a sorted stream of pieces.
#[derive(Default)]
struct Joiner {
    held: Option<Piece>,
}

impl Joiner {
    /// Takes the next piece; answers the one before it when they stay apart.
    fn push(&mut self, piece: Piece) -> Option<Piece> {
        if self.held.as_mut().is_some_and(|held| held.join(&piece)) {
            return None;
        }
        self.held.replace(piece)
    }
    fn finish(&mut self) -> Option<Piece> {
        self.held.take()
    }
}

/// Merges sorted runs, **newest first**, into one run: where they overlap the newer one hides the older.
///
/// An input that fails ends the merge with its error; nothing comes after it.
pub struct Merge<I: Iterator> {
    inputs: Vec<Input<I>>,
    joiner: Joiner,
    /// Everything below is done: (volume, lba).
    position: (VolumeId, u64),
    keep_from: u32,
    started: bool,
    ended: bool,
}

struct Input<I> {
    source: I,
    /// The piece the input stands at; its first part may be behind the position already.
    head: Option<Piece>,
}

/// Merges `newest_first`. Pieces of segments below `keep_from` are left out: they are in the base. Only the bottom of a
/// stack of runs may leave them out, since above it they still hide what is older; 0 keeps all.
pub fn merge<I, E>(newest_first: impl IntoIterator<Item = I>, keep_from: u32) -> Merge<I>
where
    I: Iterator<Item = Result<Piece, E>>,
{
    Merge {
        inputs: newest_first.into_iter().map(|source| Input { source, head: None }).collect(),
        joiner: Joiner::default(),
        position: (VolumeId(0), 0),
        keep_from,
        started: false,
        ended: false,
    }
}

impl<I, E> Merge<I>
where
    I: Iterator<Item = Result<Piece, E>>,
{
    /// The next part of the merged run, before joining.
    fn part(&mut self) -> Result<Option<Piece>, E> {
        if !self.started {
            self.started = true;
            for input in &mut self.inputs {
                input.head = input.source.next().transpose()?;
            }
        }
        for input in &mut self.inputs {
            while let Some(head) = &input.head
                && (head.volume, head.end()) <= self.position
            {
                input.head = input.source.next().transpose()?;
            }
        }
        // Where the next part starts: the lowest sector at or after the position that some input has.
        let (volume, start) = match self
            .inputs
            .iter()
            .filter_map(|input| input.head.as_ref())
            .map(|head| (head.volume, head.lba).max(self.position))
            .min()
        {
            Some(at) => at,
            None => return Ok(None),
        };
        let mut end = u64::MAX;
        for input in &self.inputs {
            let Some(head) = input.head.as_ref().filter(|head| head.volume == volume) else { continue };
            if head.lba > start {
                end = end.min(head.lba); // a newer one begins here and hides what follows
                continue;
            }
            let part = head.clip(start, end).expect("the head covers `start`, and `end` is past it");
            self.position = (volume, part.end());
            return Ok(Some(part));
        }
        unreachable!("`start` was taken from an input that covers it")
    }
}

impl<I, E> Iterator for Merge<I>
where
    I: Iterator<Item = Result<Piece, E>>,
{
    type Item = Result<Piece, E>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            match self.part() {
                Ok(Some(part)) if part.ordinal < self.keep_from => {}
                Ok(Some(part)) => {
                    if let Some(whole) = self.joiner.push(part) {
                        return Some(Ok(whole));
                    }
                }
                Ok(None) => {
                    self.ended = true;
                    return self.joiner.finish().map(Ok);
                }
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
        }
        None
    }
}

/// Takes from `found` what is still `missing`, appends it to `out` clipped, and strikes it off `missing`.
///
/// A reader calls this with the pieces of one volume, newest source first, until nothing is missing.
pub fn take_missing(missing: &mut ExtentSet, found: &[Piece], out: &mut Vec<Piece>) {
    for piece in found {
        for hole in missing.overlap(&piece.extent()) {
            out.extend(piece.clip(hole.start(), hole.end()));
        }
        missing.remove(&piece.extent());
    }
}
