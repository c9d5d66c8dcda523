//! Records: what a journal is made of, as they pass between crates. Bytes on disk and on the wire are defined there.

use crate::{Extent, HistoryTime, Lsn, SourceSeq, StreamId, Term, VolumeId};
use serde::{Deserialize, Serialize};
use std::ops::BitOr;

/// What a record does to its volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum RecordKind {
    /// Data for the extent; the payload holds it.
    Write = 1,
    /// The extent reads as zeroes from here on.
    Zero = 2,
    /// The host gave the extent up. It reads as zeroes in views: the one answer that is the same every time.
    Discard = 3,
    /// The host asked for its write cache to be flushed.
    Flush = 4,
    /// See [`Mark`](crate::Mark); the payload holds it.
    Mark = 5,
}

impl RecordKind {
    pub const fn from_u8(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Discard,
            4 => Self::Flush,
            5 => Self::Mark,
            _ => return None,
        })
    }
    /// Whether the record changes what the volume reads as.
    pub const fn changes_volume(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Discard)
    }
}

/// How a payload is stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(u8)]
pub enum Codec {
    #[default]
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    pub const fn from_u8(codec: u8) -> Option<Self> {
        match codec {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Flags of a record; unknown bits are refused by whoever reads them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WriteFlags(pub u16);

impl WriteFlags {
    pub const NONE: Self = Self(0);
    /// The host wanted it on stable storage before the answer.
    pub const FUA: Self = Self(1);
    /// The host wanted everything completed before it flushed first.
    pub const PREFLUSH: Self = Self(2);
    /// More records of the same host request follow: not a request boundary, so not a recovery point.
    pub const MORE: Self = Self(4);
    /// Copied by initial sync or resync, not written by the host at this moment.
    pub const SYNC: Self = Self(8);
    const ALL: u16 = 15;

    pub const fn from_bits(bits: u16) -> Option<Self> {
        if bits & !Self::ALL == 0 { Some(Self(bits)) } else { None }
    }
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for WriteFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A record's facts, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub lsn: Lsn,
    pub kind: RecordKind,
    pub flags: WriteFlags,
    pub volume: VolumeId,
    /// Empty for [`RecordKind::Flush`] and [`RecordKind::Mark`].
    pub extent: Extent,
    pub codec: Codec,
    /// Bytes of the payload as stored, after `codec`.
    pub stored_len: u32,
    /// CRC-32 (IEEE) of the payload as stored.
    pub payload_crc: u32,
    pub time: HistoryTime,
    /// The host's own wall clock at capture, microseconds since 1970; for showing, never for ordering.
    pub source_wall_us: u64,
    pub stream: StreamId,
    pub seq: SourceSeq,
    pub term: Term,
}
