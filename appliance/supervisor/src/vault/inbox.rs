//! The way into a thread: a queue whose consumer takes everything at once and can wait with a limit, or among other things.
//!
//! A channel hands over one item per lock; a journal thread under load wants the hundred that came while it wrote. There is no
//! bound here because each producer has its own, written where it is kept: an NBD connection its byte budget
//! ([`crate::exports::driver`]), an agent's stream its credits ([`replication::Target`]), the control API its limit on requests
//! at once, jobs their number per group.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

pub struct Inbox<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

struct State<T> {
    items: VecDeque<T>,
    waiting: bool,
    /// Of a consumer that waits for other things too.
    waker: Option<Waker>,
    closed: bool,
}

/// The consumer is gone; here is the item back.
#[derive(Debug)]
pub struct Closed<T>(pub T);

/// How long the consumer waits for an item.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    No,
    AtMost(Duration),
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        let state = State { items: VecDeque::new(), waiting: false, waker: None, closed: false };
        Self { state: Mutex::new(state), filled: Condvar::new() }
    }
}

impl<T> Inbox<T> {
    pub fn push(&self, item: T) -> Result<(), Closed<T>> {
        let mut state = crate::lock(&self.state);
        if state.closed {
            return Err(Closed(item));
        }
        state.items.push_back(item);
        // A wake-up is a system call: only for a consumer that sleeps.
        if state.waiting {
            state.waiting = false;
            self.filled.notify_one();
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Whether [`Inbox::take`] would find something (or the end); if not, the task is woken when it would. With one consumer only.
    pub fn poll_filled(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = crate::lock(&self.state);
        if !state.items.is_empty() || state.closed {
            return Poll::Ready(());
        }
        if !state.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Moves everything that is queued behind what `into` holds. With one consumer only.
    pub fn take(&self, into: &mut VecDeque<T>, wait: Wait) {
        let mut state = crate::lock(&self.state);
        if state.items.is_empty()
            && !state.closed
            && let Wait::AtMost(limit) = wait
        {
            state.waiting = true;
            let woken = self.filled.wait_timeout_while(state, limit, |s| s.items.is_empty() && !s.closed);
            state = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            state.waiting = false;
        }
        into.append(&mut state.items);
    }

    /// Takes one item, waiting for it; `None` once closed and empty. With any number of consumers.
    pub fn next(&self) -> Option<T> {
        let mut state = crate::lock(&self.state);
        loop {
            if let Some(item) = state.items.pop_front() {
                // Another consumer may sleep while items are left: its wake-up was spent on this one.
                if !state.items.is_empty() {
                    self.filled.notify_one();
                }
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state.waiting = true;
            state = self.filled.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Takes nothing more in; what is queued can still be taken out.
    pub fn close(&self) {
        let mut state = crate::lock(&self.state);
        state.closed = true;
        let waker = state.waker.take();
        drop(state);
        self.filled.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub fn len(&self) -> usize {
        crate::lock(&self.state).items.len()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn everything_comes_out_in_order() {
        let inbox = Arc::new(Inbox::default());
        let producer = {
            let inbox = Arc::clone(&inbox);
            std::thread::spawn(move || (0..10_000).for_each(|i| inbox.push(i).unwrap()))
        };
        let (mut got, mut batch) = (Vec::new(), VecDeque::new());
        while got.len() < 10_000 {
            inbox.take(&mut batch, Wait::AtMost(Duration::from_secs(10)));
            got.extend(batch.drain(..));
        }
        producer.join().unwrap();
        assert!(got.iter().copied().eq(0..10_000));
    }

    /// Between looking and waiting nothing may slip through: each item that comes wakes the task that saw none.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_consumer_that_waits_among_other_things_misses_nothing() {
        let inbox = Arc::new(Inbox::default());
        let producer = {
            let inbox = Arc::clone(&inbox);
            std::thread::spawn(move || {
                for i in 0..10_000 {
                    inbox.push(i).unwrap();
                    if i % 7 == 0 {
                        std::thread::yield_now();
                    }
                }
                inbox.close();
            })
        };
        let (mut got, mut batch) = (Vec::new(), VecDeque::new());
        loop {
            let filled = std::future::poll_fn(|cx| inbox.poll_filled(cx));
            tokio::time::timeout(Duration::from_secs(60), filled).await.expect("woken");
            inbox.take(&mut batch, Wait::No);
            if batch.is_empty() {
                break;
            }
            got.extend(batch.drain(..));
        }
        producer.join().unwrap();
        assert!(got.iter().copied().eq(0..10_000));
    }

    #[test]
    fn several_consumers_share_and_all_end() {
        let inbox = Arc::new(Inbox::default());
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let inbox = Arc::clone(&inbox);
                std::thread::spawn(move || std::iter::from_fn(|| inbox.next()).collect::<Vec<u32>>())
            })
            .collect();
        (0..5000).for_each(|i| inbox.push(i).unwrap());
        inbox.close();
        let mut all: Vec<u32> = workers.into_iter().flat_map(|w| w.join().unwrap()).collect();
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..5000));
        assert!(matches!(inbox.push(1), Err(Closed(1))));
    }
}
