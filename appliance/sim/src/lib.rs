//! Deterministic worlds. Never shipped. This page is about replication and journal; who owns a host is in [`ownership`].
//!
//! ```text
//!   host disks ── issue ──▶ ring ──▶ agent: Source, spool ══ network ══▶ box: Target ──▶ journal on a lying disk, beside
//!       │                    survives    dies, stops           cut, half open    power cut, killed, full   another group's
//!       └── write log: every version of every sector: the oracle
//! ```
//!
//! One seed makes everything: sizes, load, luck, and every draw. [`run`] lives through a few thousand steps in which connections
//! are cut at any moment, the agent is killed and comes back with what it had stored, the ring overflows, the spool fills or loses
//! payloads, the box loses power or is killed, its journal is full, flushes wait in sync mode; then everything heals and comes
//! to rest.
//!
//! # What must hold
//!
//! - Each LSN that is offered as a recovery point is, bit for bit, what the host's disks were after the request it stands for.
//! - None is offered inside a gap, and outside gaps each request's end is.
//! - What was reported durable survives power cuts and kills.
//! - A payload leaves the spool, and a flush is released as durable, only when the box has it durable.
//! - In state sync no flush is released without that.
//! - A second group on the same disk loses nothing either, whatever happens to the first.
//! - A bit that turned over at rest is never served: reads are right or refused by name, and what is opened again lacks nothing
//!   that was durable.
//! - At rest the head of the journal equals the host's disks, bit for bit; and there always comes rest.
//!
//! # A failure
//!
//! prints `cargo xtask sim --seed N --trace`, which repeats it with one line per event: time in ms, who, what, details.
//!
//! # Limits
//!
//! Time is virtual, threads there are none: races inside the journal's caller are not covered. `sim --memory` puts a list in place of
//! the journal: a seed that fails with both is a fault of replication or of the world itself.

mod agent;
mod host;
mod journal_store;
mod neighbour;
mod net;
mod oracle;
pub mod ownership;
mod rng;
mod store;
mod world;

pub use world::{Failure, FailureKind, Options, Summary, TraceSink, run, run_with};
