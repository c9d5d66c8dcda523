//! What goes into a journal's calls and what comes out of them.

use crate::{Corruption, GapState, OptionsError};
use model::{
    BookmarkName, ByteLen, Codec, Consistency, Extent, GapReason, HistoryTime, Lsn, RecordKind, SourceSeq, StreamId,
    TimelineId, VolumeId, WriteFlags,
};
use std::path::PathBuf;

/// Where the disposable index lies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum IndexChoice {
    /// sled directories below this absolute path.
    Sled { dir: PathBuf },
    /// In memory: for tests and short-lived journals.
    Memory,
    /// None: reads use the segments' footers. Always right, slower on long histories.
    #[default]
    None,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JournalOptions {
    /// Batches of a segment end at or below this.
    pub segment_bytes: ByteLen,
    /// A batch is sent when it has this many bytes; it may be longer by one record.
    pub batch_bytes: usize,
    /// Durable writes in flight.
    pub depth: usize,
    /// Segments kept zero-filled ahead.
    pub prepared_ahead: usize,
    /// 8, 64, 512 or 4096.
    pub segments_per_generation: u32,
    pub index: IndexChoice,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: ByteLen(128 << 20),
            batch_bytes: 1 << 20,
            depth: 4,
            prepared_ahead: 2,
            segments_per_generation: 512,
            index: IndexChoice::None,
        }
    }
}

/// Room for the header block and one batch with the longest record, rounded up.
const SEGMENT_BYTES_MIN: u64 = 160 * 1024;
const _: () = assert!(
    crate::format::BLOCK
        + (crate::format::BATCH_HEADER + crate::format::RECORD_HEADER + crate::format::MAX_RECORD_BYTES)
            .next_multiple_of(crate::format::BLOCK)
        <= SEGMENT_BYTES_MIN as usize
);

impl JournalOptions {
    pub fn check(&self) -> Result<(), OptionsError> {
        let bytes = self.segment_bytes.0;
        if !(SEGMENT_BYTES_MIN..=crate::format::MAX_SEGMENT_BYTES).contains(&bytes)
            || !bytes.is_multiple_of(crate::format::BLOCK as u64)
        {
            return Err(OptionsError::SegmentBytes { given: self.segment_bytes });
        }
        if !(4096..=16 << 20).contains(&self.batch_bytes) {
            return Err(OptionsError::BatchBytes { given: self.batch_bytes });
        }
        if !(1..=64).contains(&self.depth) {
            return Err(OptionsError::Depth { given: self.depth });
        }
        if !(1..=16).contains(&self.prepared_ahead) {
            return Err(OptionsError::PreparedAhead { given: self.prepared_ahead });
        }
        if crate::index::Shape::new(self.segments_per_generation).is_none() {
            return Err(OptionsError::SegmentsPerGeneration { given: self.segments_per_generation });
        }
        Ok(())
    }
}

/// A record to be appended; the journal gives it its LSN and term.
#[derive(Clone, Copy, Debug)]
pub struct NewRecord<'a> {
    /// Anything but [`RecordKind::Mark`].
    pub kind: RecordKind,
    pub flags: WriteFlags,
    pub volume: VolumeId,
    /// Empty for [`RecordKind::Flush`].
    pub extent: Extent,
    pub codec: Codec,
    /// As stored, after `codec`; at most [`MAX_RECORD_BYTES`](crate::MAX_RECORD_BYTES).
    pub payload: &'a [u8],
    /// CRC-32 (IEEE) of `payload` where its sender made one: checked before the record is taken. None: nobody did, and it is made here.
    pub payload_crc: Option<u32>,
    /// Raised to that of the record before, should it be lower.
    pub time: HistoryTime,
    pub source_wall_us: u64,
    /// The nil stream for what the box itself makes; it does not move the source's position.
    pub stream: StreamId,
    pub seq: SourceSeq,
}

/// How far the appends have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    pub appended: Lsn,
    /// In the file and readable by views.
    pub written: Lsn,
    /// Survives power loss, and so does everything before it.
    pub durable: Lsn,
    pub in_flight: usize,
    pub unsent_bytes: usize,
}

/// Where a source resumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourcePosition {
    pub stream: StreamId,
    pub appended: SourceSeq,
    pub durable: SourceSeq,
}

/// A torn tail that was cut: writes that were never acknowledged as durable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cut {
    pub file: PathBuf,
    /// The last LSN that is kept.
    pub after: Lsn,
    pub at_offset: u64,
    /// Whole records found behind the cut.
    pub records: u64,
    /// Bytes behind the cut up to the last one that is not zero.
    pub bytes: ByteLen,
}

/// What opening a journal found and did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    pub segments: usize,
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
    /// Segments that were open and have been read record by record.
    pub scanned: usize,
    pub cut: Vec<Cut>,
    /// Files removed: prepared ahead, empty, below the floor, of a dropped timeline.
    pub removed: Vec<PathBuf>,
    /// What was wrong with one of the two copies of the control record; the other one was used and both are whole again.
    pub control_fault: Option<String>,
    /// Files that are none of ours; left alone.
    pub strays: Vec<PathBuf>,
    /// Segments that could not be sealed for lack of room; they are read as they are and sealed later.
    pub unsealed: usize,
}

/// A recovery point that exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResolvedPoint {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub time: HistoryTime,
}

/// A stretch of history in which every request boundary is a recovery point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PointRange {
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
    pub first_time: HistoryTime,
    pub last_time: HistoryTime,
}

/// A stretch without recovery points.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    pub first_lsn: Lsn,
    /// None while it lasts.
    pub last_lsn: Option<Lsn>,
    pub first_time: HistoryTime,
    pub last_time: Option<HistoryTime>,
    pub reason: GapReason,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BookmarkInfo {
    pub name: BookmarkName,
    pub lsn: Lsn,
    pub time: HistoryTime,
    pub consistency: Consistency,
}

/// What can be recovered on the current timeline.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Points {
    pub timeline: TimelineId,
    pub valid: Vec<PointRange>,
    pub gaps: Vec<Gap>,
    pub bookmarks: Vec<BookmarkInfo>,
}

/// What the host wrote in a stretch of time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RateBucket {
    pub start: HistoryTime,
    pub end: HistoryTime,
    pub bytes: ByteLen,
    /// Records that changed a volume.
    pub records: u64,
}

/// A line of history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimelineInfo {
    pub id: TimelineId,
    /// Where it branched; none for the first.
    pub parent: Option<(TimelineId, Lsn)>,
    pub last_lsn: Lsn,
    pub current: bool,
}

/// What sectors of a view are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    /// May hold anything.
    Data,
    /// Reads as zeroes.
    Zero,
}

/// How a verification goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyProgress {
    pub file: PathBuf,
    pub done: ByteLen,
    pub total: ByteLen,
}

/// What a verification found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VerifyReport {
    pub segments: usize,
    pub records: u64,
    pub bytes: ByteLen,
    pub base_blocks: u64,
    pub index_runs: u64,
    /// At most [`VERIFY_DAMAGE_MAX`]; `damage_count` counts all.
    pub damage: Vec<Corruption>,
    pub damage_count: u64,
    /// Files that could not be read, with the reason.
    pub unreadable: Vec<String>,
    /// Index runs that disagree with the segments. The index is disposable: they are set aside, not damage.
    pub index_wrong: u64,
}

/// Damages listed by one verification; a disk full of them would otherwise fill memory.
pub const VERIFY_DAMAGE_MAX: usize = 1000;

impl VerifyReport {
    pub fn is_clean(&self) -> bool {
        self.damage_count == 0 && self.unreadable.is_empty()
    }
}

/// Whether a position is inside a gap, for callers that only want that.
impl GapState {
    pub fn reason(self) -> Option<(Lsn, GapReason)> {
        match self {
            Self::Never => Some((Lsn::ZERO, GapReason::InitialSync)),
            Self::Gap { since, reason } => Some((since, reason)),
            Self::Consistent => None,
        }
    }
}
