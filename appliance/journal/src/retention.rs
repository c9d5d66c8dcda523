//! Retention: what may be deleted, why the rest is kept, how long the room lasts. A pure plan.

use model::{Lsn, TimelineId};

/// A segment as the plan sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentFact {
    pub timeline: TimelineId,
    pub ordinal: u32,
    pub first_lsn: Lsn,
    /// Below `first_lsn` when the segment holds no record yet.
    pub last_lsn: Lsn,
    pub first_time_us: u64,
    pub last_time_us: u64,
    pub bytes: u64,
    /// Still being appended to.
    pub open: bool,
}

/// A line of history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimelineFact {
    pub id: TimelineId,
    /// Branched from this timeline at this LSN.
    pub parent: Option<(TimelineId, Lsn)>,
    /// Its own tip is wanted. One that is not only matters as far as others branched from it.
    pub live: bool,
}

/// A moment that must stay readable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pin {
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

/// Everything the plan is made from.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    pub now_us: u64,
    pub window_us: u64,
    /// The window is never shortened below this.
    pub window_floor_us: u64,
    /// At most this much of segments, base and index together.
    pub bytes_max: Option<u64>,
    /// Of the base and the index, which count against the limit.
    pub other_bytes: u64,
    /// What the disk still has for this journal: see [`share_out`] when several share it.
    pub available: u64,
    /// Kept free for the fold itself, which writes before it can delete; see [`reserve`].
    pub reserve: u64,
    /// To be freed beyond what this journal's own limits ask for: its share of a common need.
    pub must_free: u64,
    pub alarm_below_hours: u32,
    /// Everything at or below is in the base.
    pub floor: Lsn,
    /// The persisted cutoff; never below the floor, above it while a fold is being done.
    pub cutoff: Lsn,
    /// Sorted by (timeline, ordinal).
    pub segments: &'a [SegmentFact],
    pub timelines: &'a [TimelineFact],
    pub bookmarks: &'a [Pin],
    /// Open views.
    pub leases: &'a [Pin],
    /// At most this many segments are folded by one plan, so that one round is bounded.
    pub fold_segments_max: usize,
}
