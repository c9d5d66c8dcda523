//! The Holdfast agent: captures what a Linux host writes and sends it to the box.

pub mod arp;
pub mod beats;
pub mod capture;
pub mod carry;
pub mod clock;
pub mod config;
pub mod cost;
pub mod disks;
pub mod engine;
pub mod enrol;
pub mod extents;
pub mod fence;
pub mod freeze;
pub mod inside;
pub mod link;
pub mod local;
pub mod net;
pub mod premount;
pub mod probes;
pub mod psi;
pub mod reader;
pub mod rescue;
pub mod schedule;
pub mod shim;
pub mod spool;
pub mod state;
pub mod survey;
pub mod throttle;
pub mod tls;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// An error and its causes as one sentence, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
