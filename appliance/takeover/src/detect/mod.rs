//! Detectors: what shows that a host is alive, what shows that it is not, and what follows.
//!
//! ```text
//!   connections, datagrams, ping ── heard ───▶ ┌──────────┐
//!   gateway, peers, other hosts ─── witness ─▶ │ Detector │ ── decide(now) ──▶ Decision: verdict + every reason, for or against, since when
//!   probes, operator's script ───── probe ───▶ └──────────┘
//!   the button ──────────────────── button ──▶
//! ```
//!
//! Nothing here reads a clock or sends a packet. Whoever hears a beat says so with the time; whoever wants an answer asks with the
//! time, at [`Detector::next_look`] at the latest.
//!
//! # What is decided
//!
//! - *Takeover, the host is silent*: all required channels have missed as many beats as their rules say, for as long as the policy says, and
//!   witnesses have answered all the while and **after** that began: what silenced the host was not the box's own line.
//! - *Takeover, the application fails*: the host is heard, and its probe or the operator's script has failed so often and so long. Not when
//!   the probe could not be made, and not by an old result.
//! - *Takeover, the button*: at once.
//! - *Doubt*: an alarm, and no takeover. Channels disagree; the uplink is not proved; the host came back lately, so that silence has to
//!   last longer (twice as long for each return in the window, to a bound: a dead host is taken over in the end); the box has not heard it since
//!   its own start; the policy leaves it to a person.
//!
//! Time in which nobody listened (the box was paused or starved) is not counted against the host.
//!
//! # What it cannot know
//!
//! A host that is cut off from the box and from its own users alike looks dead, and so does one cut off only from the box. The first should be
//! taken over; in the second case too the takeover is decided, and it is the lease (`replication::ownership`) that keeps two from
//! serving. Where that matters more than minutes, require a channel that shares the users' path to the host.
//!
//! # Limits
//!
//! Bounded per host: as many channels and probes as the policy has, 64 witnesses, 16 returns.

mod accrual;
mod decision;
mod detector;
mod policy;

pub use accrual::{Beats, Pulse};
pub use decision::{Cause, Decision, Doubt, Fact, Points, Reason, Verdict, Witness};
pub use detector::{Detector, ProbeSaid};
pub use policy::{Channel, ChannelRule, Damping, Policy, PolicyError, ProbeRule, ProbeThen, UplinkRule, Weight};
