//! Replication sessions: the source on the host, the target on the box. Machines that take events and a time and return actions;
//! sockets, clocks, disks and threads belong to the caller, and so do the payload bytes, which are never touched here.
//!
//! - [`Source`]: capture in, numbered stream out; gaps, copy, window, credits, sync gate, what survives an agent's death.
//! - [`Target`]: numbered stream in, appends out; checks everything a hostile source could say, grants credits, keeps history time.
//! - [`restore`]: the way back: a machine's disks get what the box has.
//! - [`pressure()`]: how hard the agent may lean on its host.
//! - [`ownership`]: who runs a host's services: the lease, on either side.
//! - [`HistoryClock`]: the box's time of something captured on the host.
//!
//! # The protocol in one page
//!
//! ```text
//! source                                             target
//!   Hello{Stream} ────────────────────────────────▶
//!                  ◀──────────────────────────────── HelloAck
//!   OpenStream{stream, first, next?, durable?} ────▶  resume = where the journal's newest record of that stream ends
//!                  ◀──────────────────────────────── StreamReady{Continue{next} | Restart, credit}
//!   StreamBegin GapBegin                              a stream the box does not know; or only GapBegin after a restart
//!   copied pieces (SYNC), live writes ─────────────▶  append
//!                  ◀──────────────────────────────── Ack{written, durable, credit}, and one each second
//!   Consistent, writes, flushes, Watermark ────────▶
//!   GapBegin (overflow …) … Consistent
//!   Heartbeat when there is nothing to say ────────▶
//! ```
//!
//! Each side's page has its states, invariants and limits.

mod clock;
mod granules;
pub mod ownership;
mod pressure;
pub mod restore;
#[cfg(test)]
mod rng;
mod source;
mod target;

pub use clock::HistoryClock;
pub use granules::{GRANULE_SECTORS, GranuleMap, StoredMap, StoredMapError};
pub use pressure::{DELAY_MS_MAX, Pressure, PressureCause, PressureInput, pressure, pressure_and_cause};
pub use source::{
    Action, Alarm, BOOKMARKS_MAX, BookmarkRefusal, CaptureNo, Captured, CapturedKind, DisconnectReason, Event,
    GateState, Lag, Lost, Now, Numbered, Payload, ReadId, Source, SourceConfig, SourceStatus, StateError,
    VOLUME_SECTORS_MAX,
};
pub use target::{Had, OpenFacts, Target, TargetAction, TargetConfig, TargetEvent, TargetState, resume};
