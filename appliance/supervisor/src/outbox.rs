//! Answers on their way to a connection, filled by whichever thread has them.
//!
//! Whoever finishes something encodes the answer straight into the outbox, under a lock nobody holds for long, and wakes the
//! connection's task once for many: no answer travels through a channel, and one system call sends all that are there.
//!
//! The outbox also counts what the connection was given and has not been worked off ([`Outbox::owed`]): the pump reads nothing more
//! from a connection that is over its budget, and so every queue behind it is bounded.

use std::{sync::Mutex, task::Waker};

/// A buffer that grew for a large answer is not kept at that size.
const KEEP_BYTES: usize = 1 << 20;

#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    owed: usize,
    closing: bool,
    task: Option<Waker>,
}

/// What the task finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub owed: usize,
    /// Send what is there, then close.
    pub closing: bool,
}

impl Outbox {
    pub fn owed(&self) -> usize {
        crate::lock(&self.state).owed
    }
    /// Work of this cost was handed on.
    pub fn take_on(&self, cost: usize) {
        crate::lock(&self.state).owed += cost;
    }
    /// Adds an answer and takes `cost` off what is owed. The task must still be woken: once, after the last of many.
    pub fn put(&self, cost: usize, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut state = crate::lock(&self.state);
        encode(&mut state.bytes);
        state.owed = state.owed.saturating_sub(cost);
    }
    /// The connection is closed after what is in here has been sent.
    pub fn close(&self) {
        crate::lock(&self.state).closing = true;
        self.wake();
    }
    /// Lets the task send.
    pub fn wake(&self) {
        let task = crate::lock(&self.state).task.take();
        if let Some(task) = task {
            task.wake();
        }
    }
    /// For the task: moves the answers into the empty `out` and asks to be woken for more.
    pub fn collect(&self, out: &mut Vec<u8>, task: &Waker) -> Found {
        debug_assert!(out.is_empty());
        if out.capacity() > KEEP_BYTES {
            *out = Vec::new();
        }
        let mut state = crate::lock(&self.state);
        std::mem::swap(&mut state.bytes, out);
        if !state.task.as_ref().is_some_and(|t| t.will_wake(task)) {
            state.task = Some(task.clone());
        }
        Found { owed: state.owed, closing: state.closing }
    }
}
