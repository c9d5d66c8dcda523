//! A restore: a machine's disks get the content that the box has. The [`Source`] is the box's side, the [`Target`] the machine's.
//!
//! # One pass
//!
//! The box leads. Of everything a pass has to look at, the target's hashes are fetched, first of each granule (64 KiB), then, of the
//! granules that differ, of each 4 KiB; the blocks that differ are shipped as numbered records, or as ranges of zeroes. What differs nearly
//! everywhere is shipped whole at once: hashing it again would only cost time. So what crosses the network is a hash for each granule and the blocks
//! that differ, and a pass over a disk that is right already ships nothing.
//!
//! ```text
//! to look at ─▶ Look ─▶ Looked ─▶ Compare ─▶ Compared ─┬ same
//!      ▲                                               ├ Look again, finer
//!      │                                               └ wait for credit ─▶ Send … Flush ─▶ durable
//!      └──── the connection ends: whatever is not durable at the target ◀──────────┘
//! ```
//!
//! # A whole restore
//!
//! First everything, then again and again what was written at the box meanwhile, and at the end everything once more: that last pass ships nothing
//! when all went well, and mends it otherwise. Which passes, and what they look at, is the caller's to say ([`Source::begin`]).
//!
//! A pass that keeps the old ([`Pass::Keep`]) turns the direction: what differs is fetched from the target, and nothing is written there.
//!
//! # Invariants
//!
//! - A granule leaves the pass only as the same, or when what was shipped of it is durable at the target. A cut at any message loses no more
//!   than looks: it is looked at again.
//! - What the box reads for a record is at least as new as what it compared; the caller marks what changed since a pass began in the next one.
//! - A target writes inside the disks it opened and inside their mapped size, in the order of the records' numbers, and says durable only after a
//!   flush of all that was written before.
//! - Memory: the box has [`SourceConfig::looks_max`] looks and [`SourceConfig::bytes_max`] of records on the way, the target grants
//!   [`TargetConfig::bytes_max`].
//!
//! # Power loss
//!
//! Neither side stores anything. A box that starts anew looks at everything again; a target that starts anew must be looked at again by its box,
//! for what it had not flushed is gone ([`Source::begin`] with full maps).
//!
//! # Tests
//!
//! Worlds of both machines over messages that are cut anywhere, with power cuts of the target, a box that forgets, a source that is written
//! meanwhile, each compared with the source byte by byte; peers that say what cannot be.

mod source;
mod target;
#[cfg(test)]
mod tests;

pub use source::{Pass, Progress, Source, SourceAction, SourceConfig, SourceDisk, SourceError, SourceEvent};
pub use target::{Target, TargetAction, TargetConfig, TargetError, TargetEvent};
