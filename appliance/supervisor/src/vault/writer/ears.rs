//! How the journal thread waits: for commands, for writes that end and for the clock, all at once. While it waits, the connections
//! that live on the thread are served (see [`Group::here`](crate::vault::Group::here)).
//!
//! A queue of durable writes that has no descriptor (a simulated disk, or threads instead of io_uring) makes the thread *deaf*: it
//! then waits for completions inside a turn, and its connections with it.

use crate::vault::inbox::Inbox;
use journal::Journal;
use std::{future::poll_fn, os::fd::OwnedFd, pin::Pin, task::Poll, time::Duration};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, Sleep, sleep},
};

pub(super) struct Ears {
    /// Tells of ended writes.
    ended: Option<AsyncFd<OwnedFd>>,
    /// The queue it belongs to.
    queue: u64,
    /// Set to the shortest wait that was asked for since it last rang: setting it anew for each wait would cost more than a ring too
    /// many each tick.
    alarm: Pin<Box<Sleep>>,
}

impl Ears {
    /// Inside the thread's runtime.
    pub(super) fn new() -> Self {
        Self { ended: None, queue: 0, alarm: Box::pin(sleep(Duration::ZERO)) }
    }

    /// Each segment has a queue of its own: listens to the one of now.
    pub(super) fn follow(&mut self, journal: &Journal) {
        if self.queue != journal.queue_number() {
            self.queue = journal.queue_number();
            // Without a place in the thread's epoll it is deaf, and works all the same.
            self.ended = journal.completion_fd().and_then(|fd| {
                // SAFETY: an owned descriptor stays open, and the same, until `AsyncFd` is dropped.
                unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.ok()
            });
        }
    }

    /// Nobody tells when a write ends.
    pub(super) fn deaf(&self) -> bool {
        self.ended.is_none()
    }

    /// Waits until something is in the inbox, a write may have ended, or the limit has passed. It may return for nothing.
    pub(super) async fn wait<T>(&mut self, inbox: &Inbox<T>, limit: Duration) {
        let until = Instant::now() + limit;
        if self.alarm.is_elapsed() || until < self.alarm.deadline() {
            self.alarm.as_mut().reset(until);
        }
        let Self { ended, alarm, .. } = self;
        poll_fn(|cx| {
            // All three are asked, so that each wakes us.
            let filled = inbox.poll_filled(cx).is_ready();
            let told = match ended.as_ref().map(|fd| fd.poll_read_ready(cx)) {
                Some(Poll::Ready(Ok(mut told))) => {
                    // Cleared before the completions are collected: one that comes in between is told of again.
                    told.clear_ready();
                    true
                }
                Some(Poll::Ready(Err(_))) => true,
                Some(Poll::Pending) | None => false,
            };
            let rang = alarm.as_mut().poll(cx).is_ready();
            if filled || told || rang { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
