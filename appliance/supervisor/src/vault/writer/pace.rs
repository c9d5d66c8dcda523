//! When a batch is sent beside others that are under way, rather than when one of them has ended.
//!
//! A few clients: at once, for nobody else would share the batch. Many: what they ask for while a write is under way makes one larger
//! batch, which costs less than several small ones; but on a device that takes long to make anything durable, several batches under way
//! shorten the wait of each. So batches are spread over the time one takes, and are never closer than the processor time of a
//! batch is worth.

use model::{Lsn, MonoTime};
use std::collections::VecDeque;

/// A batch costs some ten microseconds of processor time whatever is in it: with this between two, a fifth of one processor at most.
const APART_NS: u64 = 50_000;

/// Measures how long batches take. Bounded by the depth of the queue: what ended is forgotten.
#[derive(Default)]
pub(super) struct Pace {
    under_way: VecDeque<(Lsn, MonoTime)>,
    sent: MonoTime,
    /// Smoothed over some eight batches.
    took_ns: u64,
}

/// What there is when the question is asked.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    pub now: MonoTime,
    pub in_flight: usize,
    pub depth: usize,
    /// Who waits for something that is not durable.
    pub waiting: usize,
    /// Somebody waits.
    pub wanted: bool,
}

impl Pace {
    /// A batch that ends with `last` was sent.
    pub(super) fn sent(&mut self, last: Lsn, now: MonoTime) {
        self.sent = now;
        self.under_way.push_back((last, now));
    }

    /// Everything up to `durable` is.
    pub(super) fn durable(&mut self, durable: Lsn, now: MonoTime) {
        while let Some((_, sent)) = self.under_way.pop_front_if(|(last, _)| *last <= durable) {
            let took = now.0.saturating_sub(sent.0);
            self.took_ns = self.took_ns - self.took_ns / 8 + took / 8;
        }
    }

    /// Whether what has been gathered is sent now.
    pub(super) fn sends(&self, moment: Moment) -> bool {
        let Moment { now, in_flight, depth, waiting, wanted } = moment;
        if in_flight == 0 {
            return true;
        }
        if !wanted || in_flight >= depth {
            return false;
        }
        let apart = (self.took_ns / depth.max(1) as u64).max(APART_NS);
        waiting <= depth || now.0.saturating_sub(self.sent.0) >= apart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Moment = Moment { now: MonoTime(0), in_flight: 0, depth: 4, waiting: 0, wanted: false };

    fn at(us: u64) -> MonoTime {
        MonoTime(us * 1000)
    }

    #[test]
    fn few_are_sent_at_once_and_many_are_spread_over_the_time_a_batch_takes() {
        let mut pace = Pace::default();
        assert!(pace.sends(IDLE), "nothing is under way");
        pace.sent(Lsn(1), at(1000));
        let under_way = Moment { in_flight: 1, now: at(1001), ..IDLE };
        assert!(!pace.sends(under_way), "nobody waits: gathered");
        let few = Moment { waiting: 4, wanted: true, ..under_way };
        assert!(pace.sends(few));
        assert!(!pace.sends(Moment { in_flight: 4, ..few }), "the queue is full");
        let many = Moment { waiting: 5, ..few };
        assert!(!pace.sends(many), "a microsecond after the last");
        assert!(pace.sends(Moment { now: at(1050), ..many }));
        // A slow device: a fourth of what a batch takes, in the long run.
        for n in 2..200 {
            pace.sent(Lsn(n), at(n * 10_000));
            pace.durable(Lsn(n), at(n * 10_000 + 4000));
        }
        assert!(pace.under_way.is_empty(), "{:?}", pace.under_way);
        pace.sent(Lsn(200), at(3_000_000));
        let slow = |us: u64| Moment { now: at(3_000_000 + us), ..many };
        assert!(!pace.sends(slow(900)) && pace.sends(slow(1000)));
        // And a fast one after it.
        for n in 201..400 {
            pace.sent(Lsn(n), at(n * 20_000));
            pace.durable(Lsn(n), at(n * 20_000 + 40));
        }
        assert!(pace.took_ns < 50_000, "{}", pace.took_ns);
    }
}
