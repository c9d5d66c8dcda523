//! What can go wrong, by operation. Damage of what was durable has its own type, [`Corruption`], and never looks like an
//! ordinary failure.

use crate::{base::BaseError, control::BranchPoint};
use durable::DiskError;
use model::{BookmarkName, ByteLen, Extent, GapReason, GroupId, HistoryTime, Lsn, Sectors, Term, TimelineId, VolumeId};
use std::{fmt, path::PathBuf, sync::Arc};

/// Something that was durable is not what was written: file, offset and what is wrong. Never repaired silently.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {what} at {offset:#x}", file.display())]
pub struct Corruption {
    pub file: PathBuf,
    pub offset: u64,
    pub what: Damage,
}

/// What kind of damage.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Damage {
    /// A segment's first block.
    SegmentHeader,
    /// The segment's first block says another place in the history than the file's name.
    SegmentName,
    /// A batch at or below what was durable cannot be read.
    Batch {
        durable: Lsn,
        readable: Lsn,
    },
    RecordHeader,
    PayloadChecksum,
    /// The checksum is right, but the payload does not stand for its extent.
    Payload,
    /// Bytes between batches that are not zero.
    Padding,
    /// A sealed segment without its last block.
    Trailer,
    FooterTable,
    FooterExtents,
    FooterFences,
    FooterMarks,
    /// Footer and records do not say the same.
    FooterDisagrees {
        lsn: Lsn,
    },
    /// Records that were durable are in no segment.
    Missing {
        from: Lsn,
        to: Lsn,
    },
    /// Two segments hold the same LSNs.
    Overlap {
        at: Lsn,
    },
    BaseBlock {
        volume: VolumeId,
    },
    BaseSums {
        volume: VolumeId,
    },
    /// The file is shorter than what it must hold.
    Short {
        len: u64,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SegmentHeader => f.write_str("segment header damaged"),
            Self::SegmentName => f.write_str("the segment header does not belong to this file name"),
            Self::Batch { durable, readable } => {
                write!(
                    f,
                    "records up to LSN {durable} were durable, they can be read up to LSN {readable} only; damaged batch"
                )
            }
            Self::RecordHeader => f.write_str("record header damaged"),
            Self::PayloadChecksum => f.write_str("record checksum"),
            Self::Payload => f.write_str("record payload does not decode to its extent"),
            Self::Padding => f.write_str("padding is not zero"),
            Self::Trailer => f.write_str("sealed segment without a readable trailer"),
            Self::FooterTable => f.write_str("footer: record table damaged"),
            Self::FooterExtents => f.write_str("footer: extent page damaged"),
            Self::FooterFences => f.write_str("footer: fences damaged"),
            Self::FooterMarks => f.write_str("footer: marks damaged"),
            Self::FooterDisagrees { lsn } => write!(f, "footer and record {lsn} disagree"),
            Self::Missing { from, to } => write!(f, "records {from} to {to} are missing"),
            Self::Overlap { at } => write!(f, "a second segment holds LSN {at}"),
            Self::BaseBlock { volume } => write!(f, "base block of volume {volume}: checksum"),
            Self::BaseSums { volume } => write!(f, "checksums of the base of volume {volume} damaged"),
            Self::Short { len } => write!(f, "file ends after {len} bytes"),
        }
    }
}

/// A failed disk operation that several callers are told of.
pub type SharedDiskError = Arc<DiskError>;

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("there is a journal in {} already", dir.display())]
    Exists { dir: PathBuf },
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("create the journal in {}", dir.display())]
    Disk {
        dir: PathBuf,
        #[source]
        source: DiskError,
    },
    #[error("write the control record")]
    Control(#[source] ControlError),
    #[error("open the new journal")]
    Open(#[source] Box<OpenError>),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    #[error("segments of {given} are not possible: 160 KiB to 1 GiB in steps of 4 KiB")]
    SegmentBytes { given: ByteLen },
    #[error("batches of {given} bytes are not possible: 4 KiB to 16 MiB")]
    BatchBytes { given: usize },
    #[error("{given} writes in flight are not possible: 1 to 64")]
    Depth { given: usize },
    #[error("{given} segments ahead are not possible: 1 to 16")]
    PreparedAhead { given: usize },
    #[error("generations of {given} segments are not possible: 8, 64, 512 or 4096")]
    SegmentsPerGeneration { given: u32 },
}

/// A group description a journal cannot keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("volume {0} is described twice")]
    DoubleVolume(VolumeId),
    #[error("{given} volumes in one group, {max} are possible")]
    TooManyVolumes { given: usize, max: usize },
    #[error("the journal belongs to group {have}, not {given}")]
    OtherGroup { have: GroupId, given: GroupId },
    #[error("volume {volume} has {len} bytes of description, {max} are possible")]
    LongDescription { volume: VolumeId, len: usize, max: usize },
    #[error("volume {0} cannot be left out: history refers to it")]
    VolumeGone(VolumeId),
    #[error("volume {volume} cannot shrink from {} to {} sectors: older moments need all of it; give the new disk a new volume", have.0, given.0)]
    VolumeShrinks { volume: VolumeId, have: Sectors, given: Sectors },
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("the control record does not decode to one that is possible")]
    Damaged,
    #[error("the control record cannot be used")]
    Twin(#[source] durable::TwinError),
    #[error("the control record has format version {found}, this program knows {known}")]
    Version { found: u32, known: u32 },
    #[error("the control record would have {len} bytes, {max} are possible")]
    TooBig { len: usize, max: usize },
    #[error("the control record cannot be read or written")]
    Disk(#[source] DiskError),
    #[error("get the base ready for the volumes")]
    Base(#[source] Box<BaseError>),
}

impl ControlError {
    /// It was not kept for want of room, and may be later.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Disk(e) if e.is_full())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("there is no journal in {}", dir.display())]
    NoJournal { dir: PathBuf },
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("read the control record")]
    Control(#[source] ControlError),
    #[error("the journal is damaged")]
    Corrupt(#[source] Corruption),
    #[error("{} belongs to group {found}, this is the journal of group {expected}", file.display())]
    Foreign { file: PathBuf, found: GroupId, expected: GroupId },
    #[error("{} belongs to timeline {timeline}, which this journal does not know", file.display())]
    UnknownTimeline { file: PathBuf, timeline: TimelineId },
    #[error("{} has format version {found}, this program knows {known}", file.display())]
    Version { file: PathBuf, found: u32, known: u32 },
    #[error("open the journal")]
    Disk(#[source] DiskError),
    #[error("open the base")]
    Base(#[source] Box<BaseError>),
    #[error("this journal goes on from LSN {} of timeline {} of group {}, whose journal is needed to read it", on.lsn, on.timeline, on.group)]
    NeedsTrunk { on: BranchPoint },
    #[error("this journal goes on from another one, and not from LSN {lsn} of timeline {timeline} of group {group}")]
    OtherTrunk { group: GroupId, timeline: TimelineId, lsn: Lsn },
}

/// Why a record was not taken. Nothing of it is in the journal.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("all {in_flight} writes are in flight and the batch is full: collect completions first")]
    Busy { in_flight: usize },
    #[error("no room for a new segment of {needed}: {available} left, and {reserve} of it are kept for folding")]
    NoSpace { needed: ByteLen, available: ByteLen, reserve: ByteLen },
    #[error("the journal has {have} and the policy allows {max}")]
    OverLimit { have: ByteLen, max: ByteLen },
    #[error("an earlier write failed; nothing is accepted until the journal is opened again")]
    Poisoned(#[source] SharedDiskError),
    #[error(
        "a payload of {len} bytes for {extent:?}: at most {max} stored bytes and {decoded_max} bytes of the volume go into one record"
    )]
    TooBig { len: usize, extent: Extent, max: usize, decoded_max: usize },
    #[error("volume {0} is not in the group")]
    NoVolume(VolumeId),
    #[error("{extent:?} is not inside volume {volume} of {} sectors", size.0)]
    Outside { volume: VolumeId, extent: Extent, size: Sectors },
    #[error("an empty extent for a record that changes a volume, or an extent or payload for one that does not")]
    Shape,
    #[error("the payload's checksum is {found:#010x}, the record says {given:#010x}")]
    PayloadCrc { given: u32, found: u32 },
    #[error("the payload does not stand for {extent:?}")]
    Payload { extent: Extent },
    #[error("flags {0:#x} are not known")]
    Flags(u16),
    #[error("a mark must come through append_mark")]
    RawMark,
    #[error("the term is {have}, this is of term {given}")]
    Term { have: Term, given: Term },
    #[error("open the next segment")]
    Roll(#[source] SharedDiskError),
    #[error("keep the control record")]
    Control(#[source] Arc<ControlError>),
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("{what} did not succeed; it will be tried again")]
    Disk {
        what: &'static str,
        #[source]
        source: DiskError,
    },
    #[error("{what} found damage")]
    Corrupt {
        what: &'static str,
        #[source]
        source: Corruption,
    },
    #[error("{what} could not use the index; it is rebuilt")]
    Index {
        what: &'static str,
        #[source]
        source: crate::index::IndexError,
    },
    #[error("{what}: the journal was closed meanwhile")]
    Closed { what: &'static str },
    #[error("{what}: the base")]
    Base {
        what: &'static str,
        #[source]
        source: Box<BaseError>,
    },
    #[error("{what}: keep the control record")]
    Control {
        what: &'static str,
        #[source]
        source: ControlError,
    },
}

/// Why a moment is not kept for another group's journal.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error("there is no timeline {0}")]
    NoTimeline(TimelineId),
    #[error("LSN {lsn} is not written yet; the last one is {end}")]
    AfterEnd { lsn: Lsn, end: Lsn },
    #[error("LSN {lsn} is below the floor of the history, {floor}")]
    BeforeFloor { lsn: Lsn, floor: Lsn },
    #[error("LSN {lsn} of timeline {timeline} is held for it already")]
    Other { timeline: TimelineId, lsn: Lsn },
    #[error("{max} branches stand on this journal, which is the limit")]
    TooMany { max: usize },
    #[error("write the control record")]
    Control(#[from] ControlError),
}

#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    #[error("timeline {0} is not known")]
    NoTimeline(TimelineId),
    #[error("LSN {at} is before the oldest kept one, {floor}")]
    BeforeFloor { at: Lsn, floor: Lsn },
    #[error("LSN {at} is past the last durable one, {end}")]
    AfterEnd { at: Lsn, end: Lsn },
    #[error("timeline {0} takes the appends; switch to another one first")]
    Current(TimelineId),
    #[error("timeline {child} branches from timeline {timeline}")]
    HasBranch { timeline: TimelineId, child: TimelineId },
    #[error("{count} timelines, at most {max} are possible; drop one first")]
    TooMany { count: usize, max: usize },
    #[error("views of timeline {0} are open")]
    InUse(TimelineId),
    /// Nothing but a bookmark's release may take it away.
    #[error(
        "{count} bookmarks would be lost, {name:?} at LSN {lsn} of timeline {timeline} among them; release them first",
        name = name.as_str()
    )]
    Bookmarked { timeline: TimelineId, name: BookmarkName, lsn: Lsn, count: usize },
    #[error("make what was appended durable")]
    Append(#[from] AppendError),
    #[error("keep the control record")]
    Control(#[from] ControlError),
}

#[derive(Debug, thiserror::Error)]
pub enum BookmarkError {
    #[error("there is no bookmark {name:?}", name = name.as_str())]
    NoSuchBookmark { name: BookmarkName, similar: Vec<BookmarkName> },
    #[error("keep the control record")]
    Control(#[from] ControlError),
}

/// Why a recovery point is not offered; the neighbours that are.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("nothing can be recovered yet: the first copy has not ended")]
    NeverConsistent,
    #[error("no recovery point: LSN {lsn} lies in a gap ({reason}){}", Neighbours(*before, *after))]
    InGap { lsn: Lsn, reason: GapReason, before: Option<Lsn>, after: Option<Lsn> },
    #[error("LSN {lsn} is in the middle of a host request{}", Neighbours(*before, *after))]
    InsideRequest { lsn: Lsn, before: Option<Lsn>, after: Option<Lsn> },
    #[error("the point is before the oldest kept one, LSN {floor}")]
    BeforeFloor { floor: Lsn, floor_time: HistoryTime },
    #[error("the point is past the end, LSN {end}")]
    AfterEnd { end: Lsn, end_time: HistoryTime },
    #[error("there is no bookmark {name:?}{}", Similar(similar), name = name.as_str())]
    NoSuchBookmark { name: BookmarkName, similar: Vec<BookmarkName> },
    #[error("look the point up")]
    Corrupt(#[source] Corruption),
    #[error("look the point up")]
    Disk(#[source] SharedDiskError),
    #[error("look the point up")]
    Base(#[source] Arc<BaseError>),
}

struct Neighbours(Option<Lsn>, Option<Lsn>);

impl fmt::Display for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1) {
            (Some(b), Some(a)) => write!(f, "; the nearest are LSN {b} before and LSN {a} after it"),
            (Some(b), None) => write!(f, "; the nearest is LSN {b} before it"),
            (None, Some(a)) => write!(f, "; the nearest is LSN {a} after it"),
            (None, None) => Ok(()),
        }
    }
}

struct Similar<'a>(&'a [BookmarkName]);

impl fmt::Display for Similar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.0.iter().enumerate() {
            write!(f, "{}{:?}", if i == 0 { "; did you mean " } else { " or " }, name.as_str())?;
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenViewError {
    #[error("timeline {0} is not known")]
    NoTimeline(TimelineId),
    #[error("LSN {lsn} is before the oldest kept one, {floor}")]
    BeforeFloor { lsn: Lsn, floor: Lsn },
    #[error("LSN {lsn} is past the last one that is written, {end}")]
    AfterEnd { lsn: Lsn, end: Lsn },
    #[error("{open} views are open, at most {max} are possible")]
    TooMany { open: usize, max: usize },
}

#[derive(Debug, thiserror::Error)]
pub enum ReadViewError {
    #[error("volume {0} is not in the group")]
    NoVolume(VolumeId),
    #[error("{len} bytes at {offset} are not inside volume {volume} of {size}")]
    Outside { volume: VolumeId, offset: u64, len: u64, size: ByteLen },
    #[error("the data is damaged")]
    Corrupt(#[source] Corruption),
    #[error("read the journal")]
    Disk(#[source] DiskError),
    #[error("read the base")]
    Base(#[source] Box<BaseError>),
}

impl From<ReadError> for ReadViewError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Corrupt(c) => Self::Corrupt(c),
            ReadError::Disk(e) => Self::Disk(e),
            ReadError::Base(e) => Self::Base(e),
        }
    }
}

impl From<ReadError> for OpenError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Corrupt(c) => Self::Corrupt(c),
            ReadError::Disk(e) => Self::Disk(e),
            ReadError::Base(e) => Self::Base(e),
        }
    }
}

impl From<ReadError> for ResolveError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Corrupt(c) => Self::Corrupt(c),
            ReadError::Disk(e) => Self::Disk(Arc::new(e)),
            ReadError::Base(e) => Self::Base(Arc::new(*e)),
        }
    }
}

/// Reading something of a journal: either the disk failed or what it gave is damaged.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Corrupt(#[from] Corruption),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("read the base")]
    Base(#[source] Box<BaseError>),
}
