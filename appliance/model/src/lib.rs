//! The nouns of Holdfast: identities, positions, ranges, times, records, marks, policies and states.
//!
//! This crate does no I/O, reads no clock and draws no random numbers; every other crate may use it. The words are those
//! of the glossary in `appliance/docs/design.md`; code, logs and pages use the same ones.

mod group;
mod id;
mod mark;
mod ownership;
mod point;
mod position;
mod range;
mod record;
mod time;

pub use group::{Bound, GroupPolicy, GroupSpec, RiskReason, SyncMode, VolumeSpec};
pub use id::{GroupId, HostId, ParseIdError, StreamId, VolumeId};
pub use mark::{BookmarkName, BookmarkNameError, Consistency, GapReason, Mark};
pub use ownership::Owner;
pub use point::{ParsePointError, RecoveryPoint};
pub use position::{Lsn, SourceSeq, Term, TimelineId};
pub use range::{ByteLen, Extent, ExtentSet, Lba, SECTOR, Sectors};
pub use record::{Codec, Record, RecordKind, WriteFlags};
pub use time::{HistoryTime, MonoTime};
