//! Taking over a host: deciding that it is dead, running it elsewhere, and giving it back.
//!
//! - [`plan`]: what is to be done when a host is lost, as people write it.
//! - [`run`] does it, a drill or in earnest, step by step; [`state`] is what it has come to, kept after each.
//! - [`machine`]: QEMU with the disks of a branch; [`qmp`] drives it, [`port`] speaks with the agent inside.
//! - [`detect`]: from missed heartbeats, probes, the operator's script and the button to a decision with its reasons. Pure.
//!
//! Who owns a host, and how the one who lost it stops before another begins, is not here: an agent takes part in that, and agents
//! do not use this crate. It is `replication::ownership`.

pub mod detect;
pub mod machine;
pub mod plan;
pub mod port;
pub mod qmp;
pub mod run;
pub mod state;
