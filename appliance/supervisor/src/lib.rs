//! Holdfast's daemon: wires journals, agents, NBD and the control API together.
//!
//! ```text
//!  agents ──TLS──▶ links ──────┐                    ┌── job threads (prepare, index, fold)
//!  NBD ──unix/TLS─▶ exports ───┼─▶ vault: one journal thread per group
//!  CLI ──unix──▶ api ──────────┤                    └── read threads (views)
//!  browser ─TLS─▶ face ─▶ api ─┘
//! ```
//!
//! Sockets live on a tokio runtime; journals, jobs and reads of views on threads of their own, for nothing that waits for a disk may
//! hold up a worker. Who owns what: a group's thread owns its [`journal::Journal`]; [`catalog`] owns hosts and tokens; [`pki`] the
//! authority. [`Daemon::start`] makes all of it, in the order in which each part needs the one before, and [`Daemon::stop`] takes it
//! down in the other one: no new work, everything durable, threads joined.
//!
//! The layout of the data folder is written in [`Daemon::start`]; nothing else makes files at its top level.
//!
//! **Power loss.** The catalogue and the journals each survive it by themselves and agree by construction: see their pages. Views and
//! sessions are gone after a restart; clients open and connect again.

#![recursion_limit = "256"] // `json!` of one group has that many fields

pub mod api;
mod catalog;
mod clock;
pub mod config;
mod daemon;
mod device;
mod events;
mod export_metrics;
mod exports;
mod face;
mod files;
mod links;
pub mod metrics;
mod outbox;
mod ownership;
mod pki;
mod pump;
mod restores;
mod status;
mod takeovers;
mod vault;
mod views;
mod watch;

pub use daemon::{App, Daemon, StartError};
pub use events::Event;

/// Locks, whatever happened to the thread that held the lock before: every critical section here leaves its data whole at each
/// step, so a panic elsewhere is no reason to fail everybody after it.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until a flag is raised, or nobody is left who could.
pub(crate) async fn raised(flag: &mut tokio::sync::watch::Receiver<bool>) {
    let _ = flag.wait_for(|raised| *raised).await;
}

/// An error and its causes as one sentence.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
