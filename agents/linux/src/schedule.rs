//! Limits by time of the week: `[DAYS] HH:MM-HH:MM MIB`, in the host's local time.
//!
//! `DAYS` is a day (`sat`) or a range (`mon-fri`, also over the week's end: `sat-sun`, `fri-mon`); without it every day is meant. A time that ends
//! before it begins goes over midnight and belongs to the day it begins on. `24:00` is the end of the day. `MIB` is MiB per second, 0 is
//! no limit.

use serde::Deserialize;
use std::{fmt, str::FromStr};

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DAY_MINUTES: u16 = 24 * 60;

/// One line of a schedule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct TimeLimit {
    /// First and last day; Monday is 0.
    days: (u8, u8),
    /// From and until, in minutes of the day.
    time: (u16, u16),
    pub mib_s: u32,
}

/// A line that is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is not a limit by time: write it as \"mon-fri 08:00-18:00 20\", days (may be left out), HH:MM-HH:MM, MiB per second"
)]
pub struct TimeLimitError(String);

impl TimeLimit {
    /// Whether a minute of a day (Monday is 0) lies in it.
    pub fn covers(&self, day: u8, minute: u16) -> bool {
        let (from, until) = self.time;
        if from < until {
            return self.on(day) && (from..until).contains(&minute);
        }
        // Over midnight: the morning belongs to the day before.
        (self.on(day) && minute >= from) || (self.on((day + 6) % 7) && minute < until)
    }
    fn on(&self, day: u8) -> bool {
        let (first, last) = self.days;
        if first <= last { (first..=last).contains(&day) } else { day >= first || day <= last }
    }
}

fn day(text: &str) -> Option<u8> {
    DAYS.iter().position(|d| d.eq_ignore_ascii_case(text)).map(|d| d as u8)
}

fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    if hour.len() != 2 || minute.len() != 2 {
        return None;
    }
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    let at = hour * 60 + minute;
    (minute < 60 && at <= DAY_MINUTES).then_some(at)
}

impl FromStr for TimeLimit {
    type Err = TimeLimitError;

    fn from_str(text: &str) -> Result<Self, TimeLimitError> {
        let parse = || {
            let words: Vec<&str> = text.split_whitespace().collect();
            let (days, time, mib_s) = match words.as_slice() {
                [time, mib_s] => ((0, 6), *time, *mib_s),
                [days, time, mib_s] => {
                    let (first, last) = days.split_once('-').unwrap_or((days, days));
                    ((day(first)?, day(last)?), *time, *mib_s)
                }
                _ => return None,
            };
            let (from, until) = time.split_once('-')?;
            let time = (minute(from)?, minute(until)?);
            // Nothing, or the whole day? Nobody can tell.
            (time.0 != time.1 && time.0 < DAY_MINUTES).then_some(())?;
            Some(Self { days, time, mib_s: mib_s.parse().ok()? })
        };
        parse().ok_or_else(|| TimeLimitError(text.to_owned()))
    }
}

impl TryFrom<String> for TimeLimit {
    type Error = TimeLimitError;
    fn try_from(text: String) -> Result<Self, TimeLimitError> {
        text.parse()
    }
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |d: u8| DAYS.get(usize::from(d)).copied().unwrap_or("?");
        let clock = |m: u16| format!("{:02}:{:02}", m / 60, m % 60);
        let (days, time) = (self.days, self.time);
        write!(f, "{}-{} {}-{} {}", name(days.0), name(days.1), clock(time.0), clock(time.1), self.mib_s)
    }
}

/// Day and minute of the host's local time now.
pub fn local_now() -> (u8, u16) {
    let now = jiff::Zoned::now();
    (now.weekday().to_monday_zero_offset() as u8, now.hour() as u16 * 60 + now.minute() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(text: &str) -> TimeLimit {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    /// Every minute of the week against what the words say.
    #[test]
    fn every_minute_of_the_week() {
        type Says = fn(u8, u16) -> bool;
        let cases: [(&str, Says); 6] = [
            ("mon-fri 08:00-18:00 20", |d, m| d < 5 && (480..1080).contains(&m)),
            ("00:00-24:00 5", |_, _| true),
            ("22:00-06:00 0", |_, m| !(360..1320).contains(&m)),
            ("sat 12:30-13:00 1", |d, m| d == 5 && (750..780).contains(&m)),
            ("fri-mon 00:00-01:00 1", |d, m| !(1..4).contains(&d) && m < 60),
            // From Sunday evening into Monday morning, and no other.
            ("SUN 23:00-01:00 1", |d, m| (d == 6 && m >= 1380) || (d == 0 && m < 60)),
        ];
        for (text, says) in cases {
            let limit = limit(text);
            for day in 0..7 {
                for minute in 0..DAY_MINUTES {
                    assert_eq!(limit.covers(day, minute), says(day, minute), "{text}: day {day} minute {minute}");
                }
            }
            assert_eq!(limit.to_string().parse(), Ok(limit), "{text}");
        }
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for bad in [
            "",
            "20",
            "08:00-18:00",
            "8:00-18:00 20",
            "08:00-18:60 20",
            "08:00-24:01 20",
            "24:00-01:00 20",
            "08:00-08:00 20",
            "noday 08:00-18:00 20",
            "mon-xxx 08:00-18:00 20",
            "mon 08:00-18:00 -1",
            "mon 08:00 18:00 20",
            "mon 08:00-18:00 20 x",
        ] {
            let error = bad.parse::<TimeLimit>().unwrap_err();
            assert!(error.to_string().contains("HH:MM-HH:MM"), "{bad}: {error}");
        }
    }

    #[test]
    fn the_clock_is_of_the_week() {
        let (day, minute) = local_now();
        assert!(day < 7 && minute < DAY_MINUTES);
    }
}
