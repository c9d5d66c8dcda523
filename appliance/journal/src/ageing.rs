//! How old history is: by the time this process has seen pass, not by what a clock says after a leap.
//!
//! History carries wall-clock times, and a wall clock can be set. Taken at its word, a clock that leaps a year ahead would make the
//! whole history a year old and retention would delete it. So every reading of the clock is watched, those that come with
//! records included: when two that follow each other are more than [`STEP_MAX_US`] apart, only that much has passed, and
//! the rest is a **leap**. Whatever was recorded before a leap counts as that much younger ([`Ageing::time_as_aged`]).
//!
//! Time in which the process did not run was not seen either: a box that was off for a month still has its window of history
//! when it comes back. Leaps are not stored. At open they are taken from the history itself: a stretch without a record that
//! is as long as the window is a leap, for had it been seen to pass, what lies before it would be deleted (or pinned).
//!
//! The error is always on the side of keeping too much. An idle group ages as long as its jobs are asked for.
//!
//! Limits: a clock that goes too fast, or leaps by less than [`STEP_MAX_US`] at a time, is believed. A leap that was written down
//! (some record has its time) and taken back cannot be undone: the history's time stands still until the clock is there.

use crate::segment::Segment;
use std::sync::Arc;

/// As much may pass between two looks. The jobs of a journal are asked for every second or so; this leaves room for a
/// machine that was stopped for a while.
pub const STEP_MAX_US: u64 = 3_600_000_000;
/// Leaps remembered; past that the two oldest become one, which makes what lies between them younger, never older.
const LEAPS_MAX: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Leap {
    from: u64,
    to: u64,
    /// What did not pass.
    unseen: u64,
}

/// The clock as it was seen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ageing {
    last: u64,
    /// In order, without overlap.
    leaps: Vec<Leap>,
}

impl Ageing {
    /// At open: from the times of these segments' records.
    pub fn of<'a>(segments: impl Iterator<Item = &'a Arc<Segment>>, window_us: u64) -> Self {
        let mut times: Vec<u64> = Vec::new();
        for segment in segments {
            times.push(segment.summary().first_time.0);
            times.extend(segment.knots().iter().map(|knot| knot.time.0));
        }
        times.sort_unstable();
        let mut this = Self { last: times.first().copied().unwrap_or(0), leaps: Vec::new() };
        for time in times {
            if time - this.last >= window_us {
                this.saw(time);
            }
            this.last = time;
        }
        this
    }

    /// A reading that goes with a record. One that lies behind was delayed and says nothing.
    pub fn saw(&mut self, time: u64) {
        if time <= self.last {
            return;
        }
        if let Some(unseen) = (time - self.last).checked_sub(STEP_MAX_US).filter(|unseen| *unseen > 0) {
            self.leaps.push(Leap { from: self.last, to: time, unseen });
            if self.leaps.len() > LEAPS_MAX {
                let oldest = self.leaps.remove(0);
                self.leaps[0].unseen = self.leaps[0].unseen.saturating_add(oldest.unseen);
            }
        }
        self.last = time;
    }

    /// A reading of the clock itself. One that lies behind takes back what was leapt.
    pub fn reads(&mut self, now: u64) {
        if now >= self.last {
            return self.saw(now);
        }
        self.leaps.retain(|leap| leap.from < now);
        if let Some(leap) = self.leaps.last_mut()
            && leap.to > now
        {
            leap.unseen = leap.unseen.saturating_sub(leap.to - now);
            leap.to = now;
        }
        self.last = now;
    }

    /// Where the clock stands, as far as it is believed: for who asks between two looks.
    pub fn now(&self, now: u64) -> u64 {
        now.clamp(self.last, self.last.saturating_add(STEP_MAX_US))
    }

    /// A time of the history, later by what did not pass since.
    pub fn time_as_aged(&self, time: u64) -> u64 {
        let unseen = self.leaps.iter().filter(|leap| leap.from >= time).map(|leap| leap.unseen);
        unseen.fold(time, u64::saturating_add)
    }

    /// Forgets leaps that no history lies before.
    pub fn forget_before(&mut self, oldest: u64) {
        self.leaps.retain(|leap| leap.from >= oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::rng;

    const HOUR: u64 = STEP_MAX_US;

    #[test]
    fn age_is_what_was_seen_to_pass() {
        for seed in 1..300 {
            let mut draw = rng(seed);
            let mut ageing = Ageing::default();
            ageing.saw(1 + draw(1 << 50));
            // Each time of the history with how much was seen to pass since, counted by hand.
            let mut history: Vec<(u64, u64)> = vec![(ageing.last, 0)];
            for _ in 0..1 + draw(60) {
                let step = match draw(4) {
                    0 => draw(400 * 24 * HOUR),
                    1 => HOUR + draw(2),
                    _ => draw(HOUR),
                };
                let now = ageing.last + step;
                if draw(2) == 0 {
                    ageing.saw(now)
                } else {
                    ageing.reads(now)
                }
                history.iter_mut().for_each(|(_, age)| *age += step.min(HOUR));
                history.push((now, 0));
                let mut before = 0;
                for (time, age) in &history {
                    let aged = ageing.time_as_aged(*time);
                    assert_eq!(now - aged, *age, "seed {seed}: time {time} at {now}");
                    assert!(aged >= before, "seed {seed}: the order stays");
                    before = aged;
                }
            }
        }
    }

    #[test]
    fn a_leap_taken_back_leaves_nothing() {
        let mut ageing = Ageing::default();
        ageing.reads(10 * HOUR);
        let before = Ageing { leaps: Vec::new(), ..ageing.clone() };
        ageing.forget_before(1);
        assert_eq!(ageing, before, "nothing lies before the first reading");
        ageing.reads(5000 * HOUR);
        assert_eq!(ageing.time_as_aged(10 * HOUR), 4999 * HOUR);
        ageing.saw(11 * HOUR); // a record that was delayed
        assert_eq!(ageing.time_as_aged(10 * HOUR), 4999 * HOUR);
        let mut half = ageing.clone();
        half.reads(3000 * HOUR);
        assert_eq!(half.time_as_aged(10 * HOUR), 2999 * HOUR);
        ageing.reads(10 * HOUR);
        assert_eq!(ageing, before);
        assert_eq!(
            (ageing.now(0), ageing.now(10 * HOUR + 5), ageing.now(u64::MAX)),
            (10 * HOUR, 10 * HOUR + 5, 11 * HOUR)
        );
    }

    #[test]
    fn more_leaps_than_are_remembered_make_nothing_older() {
        let mut ageing = Ageing::default();
        ageing.saw(1);
        let mut times = vec![1];
        for i in 1..500u64 {
            ageing.saw(ageing.last + 100 * HOUR);
            times.push(ageing.last);
            assert!(ageing.leaps.len() <= LEAPS_MAX);
            for (k, time) in times.iter().enumerate() {
                let age = ageing.last - ageing.time_as_aged(*time).min(ageing.last);
                assert!(age <= (i - k as u64) * HOUR, "leap {i}: time {k} is {age} old");
            }
        }
        ageing.saw(u64::MAX);
        assert_eq!(ageing.time_as_aged(u64::MAX), u64::MAX);
    }
}
