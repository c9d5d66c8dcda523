//! A network: ordered, lossless and slow while it lasts, and cut at any moment. What is under way in a cut is gone.

use crate::oracle::Request;
use model::{HistoryTime, MonoTime};
use replication::OpenFacts;
use std::collections::VecDeque;
use wire::{Ack, Credit, FrameHeader, Message, Resume};

/// From the agent to the box.
#[derive(Clone, Debug)]
pub(crate) enum ToBox {
    Open {
        facts: OpenFacts,
        source: MonoTime,
    },
    /// `after`: the newest request that had been handed in when the record was made; the oracle's side of the frame.
    Frame {
        header: Box<FrameHeader>,
        payload: Vec<u8>,
        after: Request,
    },
    Message(Message),
}

/// From the box to the agent.
#[derive(Clone, Debug)]
pub(crate) enum ToAgent {
    Ready { resume: Resume, credit: Credit },
    Ack(Ack),
    Message(Message),
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) number: u64,
    to_box: VecDeque<(u64, ToBox)>,
    to_agent: VecDeque<(u64, ToAgent)>,
    /// Nothing arrives any more, and nobody is told.
    pub(crate) half_open: bool,
    delay_ms: u64,
}

impl Connection {
    pub(crate) fn new(number: u64, delay_ms: u64) -> Self {
        Self { number, to_box: VecDeque::new(), to_agent: VecDeque::new(), half_open: false, delay_ms }
    }
    pub(crate) fn send_to_box(&mut self, now_ms: u64, packet: ToBox) {
        if !self.half_open {
            self.to_box.push_back((now_ms + self.delay_ms, packet));
        }
    }
    pub(crate) fn send_to_agent(&mut self, now_ms: u64, packet: ToAgent) {
        if !self.half_open {
            self.to_agent.push_back((now_ms + self.delay_ms, packet));
        }
    }
    pub(crate) fn at_box(&mut self, now_ms: u64) -> Option<ToBox> {
        let due = !self.half_open && self.to_box.front().is_some_and(|(at, _)| *at <= now_ms);
        due.then(|| self.to_box.pop_front()).flatten().map(|(_, packet)| packet)
    }
    pub(crate) fn at_agent(&mut self, now_ms: u64) -> Option<ToAgent> {
        let due = !self.half_open && self.to_agent.front().is_some_and(|(at, _)| *at <= now_ms);
        due.then(|| self.to_agent.pop_front()).flatten().map(|(_, packet)| packet)
    }
    pub(crate) fn is_quiet(&self) -> bool {
        self.to_box.is_empty() && self.to_agent.is_empty()
    }
}

/// The box's wall clock, when the world's is `now_ms`.
pub(crate) fn box_time(now_ms: u64) -> HistoryTime {
    HistoryTime(1_700_000_000_000_000 + now_ms * 1000)
}
