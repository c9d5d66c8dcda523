//! What the agent itself costs its host, and what follows from it.
//!
//! Once a second the processor time that this process has taken is looked at. Above the configured share of one processor over
//! [`SPAN_S`] seconds, copying is slowed down as for pressure of the host's own; above twice the share, when nothing is being copied, live writes
//! are only marked for a while, by the kernel half itself ([`crate::engine`] switches it over), which costs a fraction of sending them: their
//! moments are lost, the host is not. The longer that proves necessary the longer it lasts, so that the two do not take turns.
//!
//! The decision is a machine that takes figures and a time; only [`own_cpu_ms`] looks at the system.

use replication::Pressure;
use std::collections::VecDeque;

/// The share is taken over so long.
pub const SPAN_S: usize = 10;
const MARK_MS_MIN: u64 = 10_000;
const MARK_MS_MAX: u64 = 3_600_000;

/// Processor time of this process so far, all threads.
pub fn own_cpu_ms() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: a struct of ours to be written.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: zeroes are a valid value, and the call has filled it.
    let usage = unsafe { usage.assume_init() };
    let ms = |t: libc::timeval| t.tv_sec as u64 * 1000 + t.tv_usec as u64 / 1000;
    ms(usage.ru_utime) + ms(usage.ru_stime)
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Watch {
    /// Time and processor time, a second apart, the last [`SPAN_S`] and one.
    samples: VecDeque<(u64, u64)>,
    marking_until: Option<u64>,
    mark_ms: u64,
    pub percent: u64,
}

impl Watch {
    /// Takes a sample; answers what the agent's own cost asks for. `max_percent` 0: nothing, whatever it costs.
    pub fn on(&mut self, now_ms: u64, cpu_ms: u64, max_percent: u32, copying: bool) -> Pressure {
        self.samples.push_back((now_ms, cpu_ms));
        while self.samples.len() > SPAN_S + 1 {
            self.samples.pop_front();
        }
        let Some((from, cpu)) = self.samples.front().copied() else { return Pressure::None };
        let span = now_ms.saturating_sub(from);
        self.percent = (cpu_ms.saturating_sub(cpu) * 100).checked_div(span).unwrap_or(0);
        let max = u64::from(max_percent);
        // A start is costly and short.
        if max == 0 || self.samples.len() <= SPAN_S {
            return Pressure::None;
        }
        if self.percent >= 2 * max && !copying && self.marking_until.is_none() {
            self.mark_ms = (self.mark_ms * 2).clamp(MARK_MS_MIN, MARK_MS_MAX);
            self.marking_until = Some(now_ms + self.mark_ms);
        }
        match self.marking_until {
            Some(until) if now_ms < until => return Pressure::DirtyMapOnly,
            Some(until) if now_ms >= until => self.marking_until = None,
            _ => {}
        }
        if self.percent < max / 2 && self.mark_ms > 0 {
            // Half as long the next time, if it stays quiet.
            self.mark_ms = self.mark_ms.saturating_sub(1000);
        }
        if self.percent >= max {
            let ms = (10 * (self.percent - max + 1)).min(replication::DELAY_MS_MAX);
            return Pressure::Delay { ms };
        }
        Pressure::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds of a load in percent; answers what was asked for at each.
    fn run(watch: &mut Watch, clock: &mut (u64, u64), load: u64, seconds: u64, copying: bool) -> Vec<Pressure> {
        (0..seconds)
            .map(|_| {
                clock.0 += 1000;
                clock.1 += load * 10;
                watch.on(clock.0, clock.1, 100, copying)
            })
            .collect()
    }

    #[test]
    fn a_busy_agent_slows_down_and_then_only_marks() {
        let (mut watch, mut clock) = (Watch::default(), (0, 0));
        assert!(run(&mut watch, &mut clock, 20, 60, false).iter().all(|p| *p == Pressure::None));
        // A burst shorter than the span changes nothing.
        assert!(run(&mut watch, &mut clock, 150, 3, false).iter().all(|p| *p == Pressure::None));
        assert!(run(&mut watch, &mut clock, 0, 20, false).iter().all(|p| *p == Pressure::None));
        let slow = run(&mut watch, &mut clock, 120, 30, true);
        assert_eq!(slow.last(), Some(&Pressure::Delay { ms: 210 }));
        // Far above, but something is being copied: it must come to an end.
        let copying = run(&mut watch, &mut clock, 400, 30, true);
        assert!(copying.iter().all(|p| *p <= Pressure::Delay { ms: replication::DELAY_MS_MAX }), "{copying:?}");
        // Nothing is copied: it marks for a while, though marking costs little.
        let first = run(&mut watch, &mut clock, 400, 1, false);
        assert_eq!(first, [Pressure::DirtyMapOnly]);
        let while_ = run(&mut watch, &mut clock, 5, 11, false);
        assert_eq!(while_.iter().filter(|p| **p == Pressure::DirtyMapOnly).count(), 9);
        assert_eq!(while_.last(), Some(&Pressure::None));
        // Soon again: for longer.
        let mut again = run(&mut watch, &mut clock, 400, 12, false);
        again.extend(run(&mut watch, &mut clock, 5, 200, false));
        let marked = again.iter().filter(|p| **p == Pressure::DirtyMapOnly).count();
        assert!(marked > 12 && marked < 25, "{marked}");
    }

    #[test]
    fn without_a_limit_nothing_is_held_back() {
        let mut watch = Watch::default();
        for s in 0..100 {
            assert_eq!(watch.on(s * 1000, s * 8000, 0, false), Pressure::None);
        }
        assert_eq!(watch.percent, 800);
    }

    #[test]
    fn a_clock_that_stands_still_divides_nothing_by_nothing() {
        let mut watch = Watch::default();
        for _ in 0..30 {
            assert_eq!(watch.on(5, 5, 1, false), Pressure::None);
        }
    }

    #[test]
    fn the_kernel_counts_what_we_do() {
        let before = own_cpu_ms();
        let begun = std::time::Instant::now();
        let mut x = 1u64;
        while own_cpu_ms() < before + 20 && begun.elapsed().as_secs() < 60 {
            x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(5);
        }
        assert!(own_cpu_ms() >= before + 20, "{x}");
    }
}
