//! Holdfast's daemon: wires journals, agents, NBD and the control API together.

mod catalog;
mod clock;
mod config;
mod events;
mod files;
pub mod metrics;
mod pki;

/// Locks, whatever happened to the thread that held the lock before: every critical section here leaves its data whole at each
/// step, so a panic elsewhere is no reason to fail everybody after it.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
