//! A world of one host, its box, a standby and the networks between: does the lease keep two from serving, and do the detectors
//! take over from the dead and only from those who look so?
//!
//! ```text
//!   host: kernel (addresses, with their lease) ── agent: Holder ══╗  control, beats, ping: cut one by one, one way,
//!   standby: the same ══════════════════════════════════════════╬══ lossy, late, twice ══ box: Detector, Grantor, a machine of its own
//!   gateway ════════════════════════════════════════════════════╝
//! ```
//!
//! Each machine has a clock of its own rate, within the bound of the protocol, and its own origin, which is new with each boot. Agents
//! are killed between any two actions, paused while their kernel goes on, frozen whole; machines lose power; the box's daemon too. Only what was
//! stored comes back. Messages are lost, doubled, reordered and late by seconds, also those of the control connection, which TCP would spare.
//!
//! # What must hold
//!
//! - At no time two of host, standby and box serve. A machine serves when an address of the service answers, whoever runs there.
//! - A takeover is decided only when no required channel has brought anything for longer than beats may be missed.
//! - With everything well for a while the host is the owner again and serves, and no takeover is decided.
//! - While one channel still comes through, or when the box itself is cut off, none is decided.
//! - A host that dies is decided upon within the bound and somebody else serves within the lease's.
//!
//! # That it can fail
//!
//! [`Broken`] names ways to get it wrong; each is found out by the same worlds, within 500 seeds. Two of them are limits of the protocol rather than faults: a
//! clock beyond the bound, and a kernel that does not end an address with its lease while the agent is stopped.
//!
//! # Limits
//!
//! Reading the clock and the system call that follows are one moment here: an agent frozen between the two for longer than its lease's rest is
//! not covered. The operator's words (`by_hand`, `FencedByPower`) are true by definition and are not said here.

mod clock;
mod machine;
mod world;

pub use world::{Broken, Failure, FailureKind, Options, Summary, run, run_with};
