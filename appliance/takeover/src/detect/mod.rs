//! Detectors: what shows that a host is alive, what shows that it is not, and what follows.
//!
//! Nothing here reads a clock or sends a packet. Whoever hears a beat says so with the time; whoever wants an answer asks with the
//! time.

mod accrual;

pub use accrual::{Beats, Pulse};
