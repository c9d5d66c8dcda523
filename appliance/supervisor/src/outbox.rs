//! Answers on their way to a connection, filled by whichever thread has them.
//!
//! Whoever finishes something encodes the answer straight into the outbox, under a lock nobody holds for long, and sees to it that they
//! go out once for many ([`Outbox::wake`]): no answer travels through a channel, and one system call sends all that are there. Where
//! the connection's socket can be written from any thread ([`Direct`]), that is done there and then, and the connection's task need
//! not even be woken: on the way of a durable write that saves a change of threads.
//!
//! The outbox also counts what the connection was given and has not been worked off ([`Outbox::owed`]): the pump reads nothing more
//! from a connection that is over its budget, and so every queue behind it is bounded. It stops as well while more answers wait in here
//! than a peer may leave unfetched.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
    task::Waker,
};

/// A buffer that grew for a large answer is not kept at that size.
const KEEP_BYTES: usize = 1 << 20;
/// More than this does not fit a socket's buffer anyway and is left to the task.
const DIRECT_BYTES_MAX: usize = 128 << 10;

/// A socket that any thread may try to write to.
pub trait Direct: Send + Sync {
    /// Sends what fits now; never blocks.
    fn try_send(&self, bytes: &[u8]) -> io::Result<usize>;
}

#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Whole answers too large to be copied once more.
    large: VecDeque<Vec<u8>>,
    owed: usize,
    closing: bool,
    /// The task has bytes that must go out before any other.
    task_sends: bool,
    /// The task waits for `owed` to fall.
    task_starves: bool,
    task: Option<Waker>,
    direct: Option<Arc<dyn Direct>>,
}

/// What the task finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub owed: usize,
    /// Send what is there, then close.
    pub closing: bool,
}

/// How much a connection is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Handed on and not worked off.
    pub owed: usize,
    /// Bytes of answers that nobody has taken to send.
    pub waiting: usize,
}

impl Outbox {
    /// Lets answers be sent by the thread that has them. Before anything is put in.
    pub fn set_direct(&self, direct: Arc<dyn Direct>) {
        crate::lock(&self.state).direct = Some(direct);
    }
    #[cfg(test)]
    pub fn owed(&self) -> usize {
        self.standing().owed
    }
    pub fn standing(&self) -> Standing {
        crate::lock(&self.state).standing()
    }
    /// Work of this cost was handed on.
    pub fn take_on(&self, cost: usize) {
        crate::lock(&self.state).owed += cost;
    }
    /// Adds an answer and takes `cost` off what is owed. [`Outbox::wake`] must follow: once, after the last of many.
    pub fn put(&self, cost: usize, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut state = crate::lock(&self.state);
        encode(&mut state.bytes);
        state.owed = state.owed.saturating_sub(cost);
    }
    /// The same with an answer that is encoded already and is sent from where it lies.
    pub fn put_large(&self, cost: usize, answer: Vec<u8>) {
        let mut state = crate::lock(&self.state);
        state.large.push_back(answer);
        state.owed = state.owed.saturating_sub(cost);
    }
    /// The connection is closed after what is in here has been sent.
    pub fn close(&self) {
        crate::lock(&self.state).closing = true;
        self.wake();
    }
    /// Sees to it that what was put in goes out.
    pub fn wake(&self) {
        let mut state = crate::lock(&self.state);
        if state.send_directly() && !state.task_starves && !state.closing {
            return;
        }
        let task = state.task.take();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }
    /// For the task: moves the answers into the empty `out` and asks to be woken for more. `starves`: also when only what is owed has
    /// fallen.
    pub fn collect(&self, out: &mut Vec<u8>, task: &Waker, starves: bool) -> Found {
        debug_assert!(out.is_empty());
        if out.capacity() > KEEP_BYTES {
            *out = Vec::new();
        }
        let mut state = crate::lock(&self.state);
        std::mem::swap(&mut state.bytes, out);
        if out.is_empty()
            && let Some(large) = state.large.pop_front()
        {
            *out = large;
        }
        state.task_sends = !out.is_empty();
        state.task_starves = starves;
        if !state.task.as_ref().is_some_and(|t| t.will_wake(task)) {
            state.task = Some(task.clone());
        }
        Found { owed: state.owed, closing: state.closing }
    }
    /// For the task: it waits for what it is behind to fall. What that is now: it may have fallen already.
    pub fn starve(&self) -> Standing {
        let mut state = crate::lock(&self.state);
        state.task_starves = true;
        state.standing()
    }
}

impl State {
    fn standing(&self) -> Standing {
        let large: usize = self.large.iter().map(Vec::len).sum();
        Standing { owed: self.owed, waiting: self.bytes.len() + large }
    }
    /// Whether everything is sent.
    fn send_directly(&mut self) -> bool {
        if self.bytes.is_empty() {
            return self.large.is_empty() && !self.task_sends;
        }
        let Some(direct) = self.direct.as_ref().filter(|_| !self.task_sends && self.bytes.len() <= DIRECT_BYTES_MAX)
        else {
            return false;
        };
        // Whatever it is, the task meets it too and ends the connection.
        let Ok(sent) = direct.try_send(&self.bytes) else { return false };
        self.bytes.drain(..sent);
        self.bytes.is_empty() && self.large.is_empty()
    }
}
