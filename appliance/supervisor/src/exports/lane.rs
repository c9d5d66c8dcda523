//! An NBD connection as those see it who carry its requests out.

use crate::outbox::Outbox;
use model::VolumeId;
use nbd::{Errno, Request, Session};
use std::sync::Arc;

/// Data of requests a connection may have unanswered before its next request is read: deep queues of small requests, one
/// largest request (32 MiB) on top. So a connection holds at most 40 MiB of requests and as much again of answers to reads.
pub const BUDGET_BYTES: usize = 8 << 20;
/// What a request costs beside its data, so that requests without data are bounded too.
const REQUEST_COST: usize = 512;

pub struct Lane {
    pub session: Session,
    pub volume: VolumeId,
    /// Of an ingest target: the life of its journal in which the connection began ([`Shared::life`](crate::vault::Shared::life)).
    pub life: u64,
    pub outbox: Arc<Outbox>,
}

/// What a request counts against [`BUDGET_BYTES`].
pub fn cost(request: &Request) -> usize {
    let data = match request.command {
        nbd::Command::Read { .. } | nbd::Command::Write { .. } => request.len as usize,
        nbd::Command::BlockStatus { .. } => nbd::MAX_STATUS_EXTENTS * 8,
        _ => 0,
    };
    REQUEST_COST + data
}

impl Lane {
    pub fn new(session: Session, volume: VolumeId) -> Self {
        Self { session, volume, life: 0, outbox: Arc::default() }
    }
    pub fn in_life(self, life: u64) -> Self {
        Self { life, ..self }
    }
    /// Puts the answer to `request` into the outbox; wake it after the last of many.
    pub fn answer(&self, request: &Request, encode: impl FnOnce(&Session, &mut Vec<u8>)) {
        self.outbox.put(cost(request), |out| encode(&self.session, out));
    }
    /// [`Lane::answer`] with an answer that is encoded already and too large to be copied.
    pub fn answer_large(&self, request: &Request, answer: Vec<u8>) {
        self.outbox.put_large(cost(request), answer);
    }
    pub fn done(&self, request: &Request) {
        self.answer(request, |session, out| session.push_done(out, request.cookie));
    }
    pub fn fail(&self, request: &Request, errno: Errno, text: &str) {
        self.answer(request, |session, out| session.push_error(out, request.cookie, errno, text));
    }
    /// Refuses the work of a connection whose journal has failed since it began, and ends it: what the client wrote without a flush may be
    /// lost, and only an error says so.
    pub fn refuse_lost(&self, requests: impl Iterator<Item = Request>) {
        let text =
            "the journal failed and was opened again: writes that were not flushed before may be lost; connect again";
        requests.for_each(|request| self.fail(&request, Errno::Io, text));
        self.outbox.close();
    }
    pub fn wake(&self) {
        self.outbox.wake();
    }
}
