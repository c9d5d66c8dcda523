//! The journal of a protection group: every write of its volumes, in order, so that any moment can be opened as a disk.
//!
//! One directory on a [`durable::Disk`] per group. The caller owns threads and clocks: [`Journal`] is the single writer's
//! handle, [`JournalReader`] is cloned to whoever reads, [`Job`]s are what the caller runs on a worker.
//!
//! ```text
//! control.a control.b           twin record: group, term, incarnation, timelines, floor, cutoff    (control)
//! seg/TIMELINE-LSN-TERM.open    the segment that takes appends, or was never sealed                 (segment, writer)
//! seg/TIMELINE-LSN-TERM.seg     a sealed segment, ends in its own index                             (format, footer)
//! seg/prepared-N                zero-filled ahead; never adopted after a restart                    (jobs)
//! base/vN.img base/vN.sum       each volume at the floor, and its checksums                         (base)
//!                               or, for a branch of another group's journal, a moment of that one (trunk)
//! index/…                       where the newest version of a sector lies; disposable               (index)
//! ```
//!
//! # Invariants
//!
//! - LSNs of a timeline are contiguous, from the floor to the last one; a branch goes on with the LSN after its branch point.
//! - A segment file gets its name only when everything before its first LSN is durable.
//! - `durable` advances over the contiguous prefix of finished writes only. A failed write poisons the journal.
//! - Reads give the same answer with the index, without it, and while it is being built.
//! - The cutoff is monotone and persisted before the base is touched; the floor is persisted before a segment is deleted.
//!
//! # Power loss
//!
//! What was reported durable is there, bit for bit; of the rest a prefix, whole batches only. Damage above the highest LSN
//! that anything on the disk claims to be durable is a torn tail and is cut ([`RecoveryReport`]); at or below it is
//! [`Corruption`] and stops the group. The decision is one table ([`recover`](self)), tested over every combination.
//! A flip in the very last batches of a segment that was open when power was lost cannot be told from a torn write; a later
//! batch, a later segment, sealing, closing and, when appends come to rest, a job all put that beyond doubt.
//!
//! # Limits
//!
//! [`MAX_RECORD_BYTES`] per record, 1 GiB per segment, [`format::MAX_SEGMENT_RECORDS`] records per segment; caches and
//! queues are bounded where they are made. Volumes may grow, never shrink. A bookmark pins all history from it on.
//! History ages by time that was seen to pass: a clock that leaps ahead, and time in which the process did not run, age it by an
//! hour at most each.
//!
//! # Tests
//!
//! `tests/reads` (every LSN against a slow model), `crash` (power cut and kill at every operation, chains, failed flushes, and a
//! disk that lies to show that the tests see), `damage` (flipped bits, lost and foreign files), `full`, `points`, `timelines`, `branches`,
//! `retention` (power cut at every operation of a fold), `concurrent`, `fixtures` (version 1 opens for ever). Examples:
//! `append_bench`, `open_bench` (both `--json`), `make_fixture`.

mod ageing;
mod base;
mod cache;
mod control;
mod error;
pub mod format;
mod index;
mod jobs;
mod load;
mod payload;
mod plans;
mod points;
mod reader;
mod recover;
mod retention;
mod scan;
mod segment;
mod shared;
mod stats;
mod trunk;
mod types;
mod verify;
mod view;
mod writer;

pub use base::BaseError;
pub use control::BranchPoint;
pub use error::{
    AppendError, BookmarkError, BranchError, ControlError, Corruption, CreateError, Damage, HoldError, JobError,
    OpenError, OpenViewError, OptionsError, ReadError, ReadViewError, ResolveError, SharedDiskError, SpecError,
};
pub use format::{GapState, MAX_RECORD_BYTES, SourceMark};
pub use index::IndexError;
pub use jobs::{Job, JobDone, JobOutcome, RETAIN_EVERY_US, RETRY_US};
pub use reader::{JournalReader, JournalRecord, RecordIter};
pub use retention::{Forecast, KeepReason, Kept, Pressure, Share, SharedOut, share_out};
pub use stats::{JournalStats, RetentionStatus};
pub use types::{
    Allocation, BookmarkInfo, Cut, Gap, IndexChoice, JournalOptions, NewRecord, PointRange, Points, Progress,
    RateBucket, RecoveryReport, ResolvedPoint, SourcePosition, TimelineInfo, VERIFY_DAMAGE_MAX, VerifyProgress,
    VerifyReport,
};
pub use view::{View, ViewHandle};
pub use writer::Journal;
