//! Beats of one channel: how many have been missed, and whether the channel is steady enough to be believed.
//!
//! A beat is expected each period. How late beats usually come is learnt from those that came (a smoothed gap and its smoothed
//! deviation, as TCP does for round trips), so that a slow line does not look like a dying host; but what is learnt is bounded by
//! twice the period, so that detection stays inside its promise. Missed beats since the last one are what the decision counts. Those
//! of the last while are kept too, half of them forgotten each half-life: a channel that loses every other beat is unsteady, and
//! its silence is worth less.
//!
//! # Limits
//!
//! A few words per channel; time goes forward only, an earlier time than the last counts as that.

use model::MonoTime;

/// What is learnt may stretch the expected gap to this many periods.
const STRETCH_MAX: u64 = 2;
/// Missed beats remembered are halved each so many periods.
const HALF_LIFE_PERIODS: u64 = 60;
/// So many missed of the last while (with beats between them) make a channel unsteady. In thousandths, as they fade.
const UNSTEADY_MILLI: u64 = 8_000;
/// No more are remembered: after two half-lives any channel is steady again.
const REMEMBERED_MILLI: u64 = 31_000;

/// What a channel says now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pulse {
    /// Not heard since we began to listen, which is within its grace.
    NotYet { since: MonoTime },
    /// The last beat is younger than the next is late.
    Alive { heard: MonoTime },
    /// Beats are missing, not yet enough to call it silent.
    Late { heard: MonoTime, missed: u32 },
    /// As many beats are missing as the rule says.
    Silent { since: MonoTime, missed: u32, ever_heard: bool },
}

/// The beats of one channel.
#[derive(Clone, Debug)]
pub struct Beats {
    period_ms: u64,
    missed_max: u32,
    /// When listening began, and until when a channel that is not heard at all proves nothing.
    began: MonoTime,
    grace_ms: u64,
    heard: Option<MonoTime>,
    /// Eighths of a millisecond, quarters of a millisecond.
    gap_8: u64,
    deviation_4: u64,
    /// Missed beats between beats that came, fading.
    faded: MonoTime,
    missed_milli: u64,
}

impl Beats {
    /// Listening begins now. `grace_ms`: for so long a channel that was never heard says nothing at all; the host may be booting, or the
    /// box may have been away.
    pub fn new(period_ms: u64, missed_max: u32, grace_ms: u64, now: MonoTime) -> Self {
        let period_ms = period_ms.max(1);
        Self {
            period_ms,
            missed_max: missed_max.max(1),
            began: now,
            grace_ms,
            heard: None,
            gap_8: period_ms * 8,
            deviation_4: 0,
            faded: now,
            missed_milli: 0,
        }
    }

    /// A beat came.
    pub fn heard(&mut self, now: MonoTime) {
        if let Some(last) = self.heard {
            let missed = self.missed_since(last, now);
            self.fade(now);
            // A whole outage is no sign of a bad line: who counts returns counts those.
            if missed < self.missed_max {
                self.missed_milli = self.missed_milli.saturating_add(u64::from(missed) * 1000).min(REMEMBERED_MILLI);
            }
            // A gap with missed beats in it says that they were lost, not that they come later.
            if missed == 0 {
                self.learn(now.ms_since(last));
            }
        }
        self.heard = Some(self.heard.map_or(now, |last| last.max(now)));
    }

    /// Nobody listened for so long, until now.
    pub fn excuse(&mut self, away_ms: u64, now: MonoTime) {
        let later =
            |at: MonoTime| MonoTime(at.0.saturating_add(away_ms.saturating_mul(1_000_000)).min(now.0.max(at.0)));
        self.heard = self.heard.map(later);
        self.began = later(self.began);
    }

    pub fn pulse(&self, now: MonoTime) -> Pulse {
        let Some(heard) = self.heard else {
            let quiet = now.ms_since(self.began);
            let Some(counted) = quiet.checked_sub(self.grace_ms) else { return Pulse::NotYet { since: self.began } };
            let missed = whole(counted / self.expected_ms());
            return match missed >= self.missed_max {
                true => Pulse::Silent { since: self.began, missed, ever_heard: false },
                false => Pulse::NotYet { since: self.began },
            };
        };
        match self.missed_since(heard, now) {
            0 => Pulse::Alive { heard },
            missed if missed < self.missed_max => Pulse::Late { heard, missed },
            missed => Pulse::Silent { since: heard, missed, ever_heard: true },
        }
    }

    /// It has been losing beats for a while, so that its silence may be the channel's.
    pub fn is_unsteady(&self, now: MonoTime) -> bool {
        let mut copy = self.clone();
        copy.fade(now);
        copy.missed_milli >= UNSTEADY_MILLI
    }

    /// From the last beat to when this is called silent.
    pub fn silent_after_ms(&self) -> u64 {
        // The first beat is missed when it is a whole period late, see `missed_since`.
        self.expected_ms() * (u64::from(self.missed_max) + 1)
    }

    fn expected_ms(&self) -> u64 {
        (self.gap_8 / 8 + self.deviation_4).clamp(self.period_ms, self.period_ms * STRETCH_MAX)
    }
    /// A beat is missed when the one after it is due, so that a late one is not.
    fn missed_since(&self, last: MonoTime, now: MonoTime) -> u32 {
        whole((now.ms_since(last) / self.expected_ms()).saturating_sub(1))
    }
    fn learn(&mut self, gap_ms: u64) {
        let off = gap_ms.abs_diff(self.gap_8 / 8);
        self.gap_8 = self.gap_8 - self.gap_8 / 8 + gap_ms;
        self.deviation_4 = self.deviation_4 - self.deviation_4 / 4 + off;
    }
    fn fade(&mut self, now: MonoTime) {
        let half_life = self.period_ms * HALF_LIFE_PERIODS;
        let times = now.ms_since(self.faded) / half_life;
        self.missed_milli = self.missed_milli.checked_shr(whole(times)).unwrap_or(0);
        self.faded = self.faded.plus_ms(times * half_life);
    }
}

fn whole(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> MonoTime {
        MonoTime::from_ms(ms)
    }

    #[test]
    fn missed_beats_add_up_and_one_beat_ends_them() {
        let mut beats = Beats::new(1000, 4, 0, at(0));
        for second in 0..10 {
            beats.heard(at(second * 1000));
        }
        assert_eq!(beats.pulse(at(9_900)), Pulse::Alive { heard: at(9_000) });
        assert_eq!(beats.pulse(at(10_900)), Pulse::Alive { heard: at(9_000) }, "late is not missed");
        assert_eq!(beats.pulse(at(11_000)), Pulse::Late { heard: at(9_000), missed: 1 });
        assert_eq!(beats.pulse(at(13_999)), Pulse::Late { heard: at(9_000), missed: 3 });
        assert_eq!(beats.pulse(at(14_000)), Pulse::Silent { since: at(9_000), missed: 4, ever_heard: true });
        assert_eq!(beats.silent_after_ms(), 5_000);
        beats.heard(at(14_001));
        assert_eq!(beats.pulse(at(14_001)), Pulse::Alive { heard: at(14_001) });
    }

    #[test]
    fn a_line_that_is_always_late_is_given_more_time_but_not_without_bound() {
        let mut beats = Beats::new(1000, 4, 0, at(0));
        let mut now = 0;
        for beat in 0..200u64 {
            now += if beat % 2 == 0 { 1_700 } else { 300 };
            beats.heard(at(now));
        }
        assert!(beats.silent_after_ms() > 7_000, "{}", beats.silent_after_ms());
        assert!(beats.silent_after_ms() <= 10_000, "{}", beats.silent_after_ms());
        assert!(!beats.is_unsteady(at(now)), "late beats came");
    }

    #[test]
    fn a_channel_that_loses_beats_is_unsteady_and_recovers() {
        let mut beats = Beats::new(1000, 4, 0, at(0));
        let mut now = 0;
        for _ in 0..10 {
            now += 3_000;
            beats.heard(at(now));
        }
        assert!(beats.is_unsteady(at(now)));
        for _ in 0..180 {
            now += 1_000;
            beats.heard(at(now));
        }
        assert!(!beats.is_unsteady(at(now)));
    }

    #[test]
    fn what_was_never_heard_says_nothing_within_its_grace() {
        let beats = Beats::new(1000, 4, 60_000, at(5_000));
        assert_eq!(beats.pulse(at(64_000)), Pulse::NotYet { since: at(5_000) });
        assert_eq!(beats.pulse(at(68_000)), Pulse::NotYet { since: at(5_000) });
        assert_eq!(beats.pulse(at(69_000)), Pulse::Silent { since: at(5_000), missed: 4, ever_heard: false });
    }

    #[test]
    fn times_that_go_back_and_leap_do_no_harm() {
        let mut beats = Beats::new(0, 0, 0, at(10));
        beats.heard(at(100));
        beats.heard(at(50));
        assert_eq!(beats.pulse(at(20)), Pulse::Alive { heard: at(100) });
        beats.heard(MonoTime(u64::MAX));
        assert!(matches!(beats.pulse(MonoTime(u64::MAX)), Pulse::Alive { .. }));
    }
}
