//! An agent's stream connection as its group's journal thread sees it.

use crate::outbox::Outbox;
use bytes::Bytes;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use wire::{FrameHeader, Message};

/// Bytes of frames read from a stream connection and not yet judged. The credits of [`replication::Target`] bound what lies between
/// append and disk; this bounds what lies before it, also for a source that sends without credit.
pub const BUDGET_BYTES: usize = 8 << 20;

/// One thing that came on the connection.
pub enum Inbound {
    Record { header: FrameHeader, payload: Bytes },
    Message(Message),
}

pub struct LinkLane {
    /// Never used twice by one process.
    pub id: u64,
    /// Who is at the other end, for events.
    pub peer: String,
    pub outbox: Arc<Outbox>,
}

impl LinkLane {
    pub fn new(peer: String) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), peer, outbox: Arc::default() }
    }
    /// Adds a message to what is sent; wake the outbox after the last of many.
    pub fn say(&self, message: &Message) {
        self.outbox.put(0, |out| {
            // Ours are far below the limit; should one not fit, the connection ends for lack of it and is made again.
            if let Err(e) = wire::encode_message(message, out) {
                tracing::error!(message = message.name(), error = %e, "could not encode a message");
            }
        });
    }
}
