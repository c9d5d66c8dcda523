//! Which mirrored writes may not have reached the local disk yet.
//!
//! A copy of the local disk must not begin before every write handed in earlier has completed there, or it would carry older
//! bytes behind a newer write. The kernel tells the leg when a write arrives, never when the local leg is done with it. What it does tell
//! is how many writes the device under the mirror has under way: the mirror hands a write to its local leg **before** it hands it to ours,
//! so a moment with none under way ends every write that had arrived before that moment.
//!
//! On a device that is never idle such a moment may not be seen; then the caller makes one, by suspending the mirror and
//! resuming it at once ([`Order::wants_fence`]).

use model::{Extent, MonoTime};
use std::collections::VecDeque;

/// Writes remembered one by one; with more, all of them count as touching everything.
const REMEMBERED_MAX: usize = 16_384;
/// A read that waits longer than this gets a moment made for it.
const FENCE_AFTER_MS: u64 = 1_000;

#[derive(Debug, Default)]
pub struct Order {
    arrived: u64,
    open: VecDeque<(u64, Extent)>,
    /// Numbers up to this were forgotten without having been seen to complete.
    forgotten: u64,
    blocked_since: Option<MonoTime>,
}

impl Order {
    /// A write arrived at the leg.
    pub fn arrived(&mut self, extent: Extent) {
        self.arrived += 1;
        self.open.push_back((self.arrived, extent));
        if self.open.len() > REMEMBERED_MAX
            && let Some((number, _)) = self.open.pop_front()
        {
            self.forgotten = number;
        }
    }
    pub fn count(&self) -> u64 {
        self.arrived
    }
    /// Nothing was under way at a moment after the first `number` had arrived.
    pub fn idle(&mut self, number: u64) {
        while self.open.front().is_some_and(|(n, _)| *n <= number) {
            self.open.pop_front();
        }
        if self.forgotten <= number {
            self.forgotten = 0;
        }
        self.blocked_since = None;
    }
    /// Whether a write among the first `number` that touches `extent` may not have reached the local disk.
    pub fn may_be_under_way(&self, number: u64, extent: &Extent) -> bool {
        (self.forgotten > 0 && number > 0)
            || self
                .open
                .iter()
                .take_while(|(n, _)| *n <= number)
                .any(|(_, written)| written.intersect(extent).is_some())
    }
    /// A read waits. Says whether it has waited long enough for a suspend.
    pub fn wants_fence(&mut self, now: MonoTime) -> bool {
        let since = *self.blocked_since.get_or_insert(now);
        now.ms_since(since) >= FENCE_AFTER_MS
    }
    pub fn anything_open(&self) -> bool {
        !self.open.is_empty() || self.forgotten > 0
    }
}

/// Writes under way on a device, from its `inflight` file: reads and writes.
pub fn writes_under_way(text: &str) -> Option<u64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_waits_only_for_earlier_writes_to_its_place() {
        let mut order = Order::default();
        order.arrived(Extent::new(0, 8));
        let before = order.count();
        order.arrived(Extent::new(100, 8));
        assert!(order.may_be_under_way(before, &Extent::new(7, 1)));
        assert!(!order.may_be_under_way(before, &Extent::new(8, 1)));
        assert!(!order.may_be_under_way(before, &Extent::new(100, 8)), "came later");
        assert!(order.may_be_under_way(order.count(), &Extent::new(96, 8)));
        order.idle(order.count());
        assert!(!order.may_be_under_way(order.count(), &Extent::new(0, 200)));
    }

    #[test]
    fn what_cannot_be_remembered_touches_everything() {
        let mut order = Order::default();
        (0..=REMEMBERED_MAX as u64).for_each(|n| order.arrived(Extent::new(n * 8, 8)));
        assert!(order.may_be_under_way(1, &Extent::new(1 << 30, 8)));
        order.idle(order.count());
        assert!(!order.may_be_under_way(order.count(), &Extent::new(0, 8)) && !order.anything_open());
    }

    #[test]
    fn a_blocked_read_gets_a_moment_made() {
        let mut order = Order::default();
        order.arrived(Extent::new(0, 8));
        assert!(!order.wants_fence(MonoTime(0)));
        assert!(!order.wants_fence(MonoTime(0).plus_ms(FENCE_AFTER_MS - 1)));
        assert!(order.wants_fence(MonoTime(0).plus_ms(FENCE_AFTER_MS)));
        order.idle(order.count());
        assert!(!order.wants_fence(MonoTime(0).plus_ms(FENCE_AFTER_MS)), "begins anew");
    }

    #[test]
    fn the_kernels_count_is_read() {
        assert_eq!(writes_under_way("       3        0\n"), Some(0));
        assert_eq!(writes_under_way("0 17"), Some(17));
        assert_eq!(writes_under_way(""), None);
    }
}
