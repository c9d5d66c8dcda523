//! History time from a source's monotonic clock.
//!
//! A record carries the source's monotonic time of capture; points are picked by the box's clock. The offset between the two is set
//! when the stream opens (the source says its clock in `OpenStream`, the box looks at its own) and followed slowly: of all samples
//! (box clock minus source clock when a frame arrives) within [`WINDOW_MS`] the smallest was delayed least, and becomes the offset.
//!
//! What comes out never goes backwards, and never lies after the box's clock, so that no source clock, mad or hostile, can put
//! history into the future. Set back the box's clock, and history time stands still until the clock has caught up: order is kept.

use model::{HistoryTime, MonoTime};

/// How long samples are collected before the offset follows them.
pub const WINDOW_MS: u64 = 10_000;

#[derive(Clone, Debug)]
pub struct HistoryClock {
    /// Box microseconds minus source microseconds.
    offset_us: i128,
    smallest_us: Option<i128>,
    window_from: MonoTime,
    last: HistoryTime,
}

impl HistoryClock {
    /// `source`: the source's clock as it opened the stream; `box_now` and `now`: the box's wall and monotonic clocks; `last`: the
    /// newest time already in the history.
    pub fn open(source: MonoTime, box_now: HistoryTime, now: MonoTime, last: HistoryTime) -> Self {
        Self { offset_us: Self::offset(source, box_now), smallest_us: None, window_from: now, last }
    }

    fn offset(source: MonoTime, box_now: HistoryTime) -> i128 {
        i128::from(box_now.0) - i128::from(source.0 / 1000)
    }

    /// Takes a frame's time as it arrives.
    pub fn sample(&mut self, source: MonoTime, box_now: HistoryTime, now: MonoTime) {
        let sample = Self::offset(source, box_now);
        let smallest = self.smallest_us.map_or(sample, |smallest| smallest.min(sample));
        self.smallest_us = Some(smallest);
        // A source clock that runs ahead of what was assumed is followed at once: a record cannot have been sent before its capture.
        self.offset_us = self.offset_us.min(smallest);
        if now.ms_since(self.window_from) >= WINDOW_MS {
            self.offset_us = smallest;
            self.smallest_us = None;
            self.window_from = now;
        }
    }

    /// History time of something captured at `source`, for the next record.
    pub fn map(&mut self, source: MonoTime, box_now: HistoryTime) -> HistoryTime {
        let mapped = i128::from(source.0 / 1000) + self.offset_us;
        let mapped = HistoryTime(u64::try_from(mapped.max(0)).unwrap_or(u64::MAX));
        self.last = self.last.max(mapped.min(box_now));
        self.last
    }

    pub fn last(&self) -> HistoryTime {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn backlog_keeps_its_own_times() {
        // The source opens at its second 1000, the box's clock says 5000 s; what was captured 900 s ago lies at 4100 s.
        let s = |s: u64| MonoTime(s * 1_000_000_000);
        let h = |s: u64| HistoryTime(s * 1_000_000);
        let mut clock = HistoryClock::open(s(1000), h(5000), s(1), HistoryTime(0));
        assert_eq!(clock.map(s(100), h(5000)), h(4100));
        assert_eq!(clock.map(s(999), h(5001)), h(4999));
        assert_eq!(clock.map(s(200), h(5001)), h(4999), "never backwards");
        assert_eq!(clock.map(MonoTime(u64::MAX), h(5002)), h(5002), "never into the future");
        assert_eq!(clock.map(s(1010), h(4000)), h(5002), "the box's clock was set back");
    }

    #[test]
    fn whatever_the_clocks_do_time_goes_forward_and_not_past_the_box() {
        for seed in 1..500 {
            let mut rng = Rng::new(seed);
            let mut box_now = 1_000_000_000 + rng.below(1_000_000);
            let (mut mono, mut now) = (rng.below(1_000_000_000), 0);
            let mut clock = HistoryClock::open(MonoTime(mono), HistoryTime(box_now), MonoTime(now), HistoryTime(0));
            let (mut last, mut newest_box) = (HistoryTime(0), box_now);
            for _ in 0..300 {
                let step = rng.below(2_000_000_000);
                now += step;
                mono += step;
                box_now += step / 1000;
                match rng.below(30) {
                    0 => box_now = box_now.saturating_sub(rng.below(10_000_000)),
                    1 => box_now += rng.below(10_000_000),
                    2 => mono = rng.next(),
                    _ => {}
                }
                mono = mono.min(u64::MAX / 2);
                newest_box = newest_box.max(box_now);
                clock.sample(MonoTime(mono), HistoryTime(box_now), MonoTime(now));
                let time = clock.map(MonoTime(mono.saturating_sub(rng.below(1_000_000))), HistoryTime(box_now));
                assert!(time >= last && time.0 <= newest_box, "seed {seed}");
                last = time;
            }
        }
    }

    #[test]
    fn a_steady_source_is_followed_to_within_the_delay() {
        let mut rng = Rng::new(7);
        let mut clock = HistoryClock::open(MonoTime(0), HistoryTime(90_000_000), MonoTime(0), HistoryTime(0));
        // The first sample was 80 ms late; the others up to 20 ms.
        for i in 1..2000u64 {
            let mono = MonoTime(i * 100_000_000);
            let arrival = HistoryTime(90_000_000 - 80_000 + i * 100_000 + rng.below(20_000));
            clock.sample(mono, arrival, mono);
            let error = clock.map(mono, HistoryTime(u64::MAX)).0 - (90_000_000 - 80_000 + i * 100_000);
            assert!(i < 100 || error <= 20_000, "record {i} is {error} us off");
        }
    }
}
