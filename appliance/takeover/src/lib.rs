//! Taking over a host: deciding that it is dead, running it elsewhere, and giving it back.
//!
//! - [`detect`]: from missed heartbeats, probes, the operator's script and the button to a decision with its reasons. Pure.
//!
//! Who owns a host, and how the one who lost it stops before another begins, is not here: an agent takes part in that, and agents
//! do not use this crate. It is `replication::ownership`.

pub mod detect;
