//! Times and recovery points as people write them, and times as people read them.
//!
//! Without an offset a time is meant in the local zone. A moment the clocks show twice or never (summer time) is refused
//! with what would be clear, rather than guessed.

use jiff::{Timestamp, civil, tz::AmbiguousOffset, tz::TimeZone};
use model::{HistoryTime, RecoveryPoint};

/// Where and when the person is.
#[derive(Clone, Debug)]
pub struct Clock {
    pub zone: TimeZone,
    pub now: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PointError {
    #[error("{text:?} looks like a time but is none")]
    BadTime { text: String },
    #[error("{text:?} happened twice when the clocks were set back: at {first} and again at {second}")]
    Twice { text: String, first: String, second: String },
    #[error("{text:?} never was: the clocks were set forward over it")]
    Never { text: String },
    #[error("{text:?} lies before 1970 or too far in the future")]
    OutOfRange { text: String },
    #[error(transparent)]
    Untimed(#[from] model::ParsePointError),
}

impl PointError {
    pub fn remedy(&self) -> String {
        match self {
            Self::Twice { first, second, .. } => format!("write one of them with its offset: {first} or {second}"),
            Self::Never { .. } => "write another time, or one with its offset".to_owned(),
            Self::BadTime { .. } | Self::OutOfRange { .. } | Self::Untimed(_) => {
                "use `latest`, `lsn:NUMBER`, a time like 2026-11-22T10:31:07.250, `10:31` or `5m ago`, or `bookmark:NAME`; \
                 `holdfast points` shows what there is"
                    .to_owned()
            }
        }
    }
}

impl Clock {
    pub fn local() -> Self {
        Self { zone: TimeZone::system(), now: Timestamp::now() }
    }

    /// Reads a recovery point. What looks like a time is one; anything else goes to [`RecoveryPoint::parse_untimed`].
    pub fn point(&self, text: &str) -> Result<RecoveryPoint, PointError> {
        let text = text.trim();
        match self.time(text)? {
            Some(time) => Ok(RecoveryPoint::Time(time)),
            None => Ok(RecoveryPoint::parse_untimed(text)?),
        }
    }

    /// `None`: not a time at all.
    fn time(&self, text: &str) -> Result<Option<HistoryTime>, PointError> {
        if let Some(ago) = text.strip_suffix("ago").and_then(|span| parse_span_us(span.trim())) {
            let now = u64::try_from(self.now.as_microsecond()).unwrap_or(0);
            let range = || PointError::OutOfRange { text: text.to_owned() };
            return now.checked_sub(ago).map(|us| Some(HistoryTime(us))).ok_or_else(range);
        }
        if looks_like_date(text) {
            if let Ok(moment) = text.parse::<Timestamp>() {
                return history_time(moment, text).map(Some);
            }
            let Ok(civil) = text.parse::<civil::DateTime>() else {
                return Err(PointError::BadTime { text: text.to_owned() });
            };
            return self.in_zone(civil, text).map(Some);
        }
        if looks_like_clock(text) {
            let Ok(time) = text.parse::<civil::Time>() else {
                return Err(PointError::BadTime { text: text.to_owned() });
            };
            // The last time the clock showed this: today's, or yesterday's when today's is still to come.
            let today = self.now.to_zoned(self.zone.clone()).date();
            let moment = self.in_zone(today.to_datetime(time), text)?;
            if i64::try_from(moment.0).is_ok_and(|us| us <= self.now.as_microsecond()) {
                return Ok(Some(moment));
            }
            let yesterday = today.yesterday().map_err(|_| PointError::OutOfRange { text: text.to_owned() })?;
            return self.in_zone(yesterday.to_datetime(time), text).map(Some);
        }
        Ok(None)
    }

    fn in_zone(&self, civil: civil::DateTime, text: &str) -> Result<HistoryTime, PointError> {
        let ambiguous = self.zone.to_ambiguous_timestamp(civil);
        let range = || PointError::OutOfRange { text: text.to_owned() };
        match ambiguous.offset() {
            AmbiguousOffset::Unambiguous { offset } => {
                history_time(offset.to_timestamp(civil).map_err(|_| range())?, text)
            }
            AmbiguousOffset::Gap { .. } => Err(PointError::Never { text: text.to_owned() }),
            AmbiguousOffset::Fold { before, after } => {
                let with = |offset: jiff::tz::Offset| {
                    let moment = offset.to_timestamp(civil).map_err(|_| range())?;
                    Ok::<_, PointError>(
                        moment.to_zoned(TimeZone::fixed(offset)).strftime("%Y-%m-%dT%H:%M:%S%.f%:z").to_string(),
                    )
                };
                Err(PointError::Twice { text: text.to_owned(), first: with(before)?, second: with(after)? })
            }
        }
    }

    /// A moment for a table: `2026-11-22 10:31:07.250`, in the local zone.
    pub fn show(&self, us: u64) -> String {
        self.format(us, "%Y-%m-%d %H:%M:%S%.3f")
    }

    /// Without the parts of a second.
    pub fn show_seconds(&self, us: u64) -> String {
        self.format(us, "%Y-%m-%d %H:%M:%S")
    }

    /// How the local zone stands to UTC now, for a heading.
    pub fn zone_name(&self) -> String {
        self.now.to_zoned(self.zone.clone()).strftime("%Z, UTC%:z").to_string()
    }

    fn format(&self, us: u64, format: &str) -> String {
        let moment = i64::try_from(us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
        match moment {
            Some(moment) => moment.to_zoned(self.zone.clone()).strftime(format).to_string(),
            None => format!("{us} µs since 1970"),
        }
    }
}

fn history_time(moment: Timestamp, text: &str) -> Result<HistoryTime, PointError> {
    let range = |_| PointError::OutOfRange { text: text.to_owned() };
    u64::try_from(moment.as_microsecond()).map(HistoryTime).map_err(range)
}

/// `2026-…`: four digits and a dash.
fn looks_like_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() > 4 && bytes[..4].iter().all(u8::is_ascii_digit) && bytes[4] == b'-'
}

/// `10:31`, `10:31:07.25`
fn looks_like_clock(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 5
        && bytes[..2].iter().all(u8::is_ascii_digit)
        && bytes[2] == b':'
        && bytes.iter().all(|b| b.is_ascii_digit() || b":.".contains(b))
}

/// `90s`, `5m`, `2h`, `3d`, `1h30m` in microseconds.
fn parse_span_us(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut number: Option<u64> = None;
    for c in text.chars().filter(|c| *c != ' ') {
        if let Some(digit) = c.to_digit(10) {
            number = Some(number.unwrap_or(0).checked_mul(10)?.checked_add(u64::from(digit))?);
            continue;
        }
        let unit = match c {
            's' => 1_000_000,
            'm' => 60_000_000,
            'h' => 3_600_000_000,
            'd' => 86_400_000_000,
            _ => return None,
        };
        total = total.checked_add(number.take()?.checked_mul(unit)?)?;
    }
    (number.is_none() && total > 0).then_some(total)
}

/// A span for people: `250 ms`, `4.2 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`.
pub fn show_span_us(us: u64) -> String {
    let s = us / 1_000_000;
    match () {
        () if us < 1_000_000 => format!("{} ms", us / 1000),
        () if s < 60 => format!("{}.{} s", s, us % 1_000_000 / 100_000),
        () if s < 3600 => format!("{} min {:02} s", s / 60, s % 60),
        () if s < 86_400 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        () => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Lsn;

    /// Berlin's rules; on 2026-11-22 at 12:00 UTC.
    fn clock() -> Clock {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        Clock { zone, now: "2026-11-22T12:00:00Z".parse().unwrap() }
    }

    fn utc(text: &str) -> RecoveryPoint {
        let moment: Timestamp = text.parse().unwrap();
        RecoveryPoint::Time(HistoryTime(moment.as_microsecond() as u64))
    }

    #[test]
    fn times_are_read_in_the_local_zone_unless_they_say_otherwise() {
        for (text, want) in [
            ("2026-11-22T10:31:07.250", "2026-11-22T09:31:07.250Z"),
            ("2026-11-22 10:31:07.250123", "2026-11-22T09:31:07.250123Z"),
            ("2026-07-01 10:31", "2026-07-01T08:31:00Z"),
            ("2026-11-22", "2026-11-21T23:00:00Z"),
            ("2026-11-22T10:31:07Z", "2026-11-22T10:31:07Z"),
            ("2026-11-22T10:31:07.5+08:00", "2026-11-22T02:31:07.5Z"),
            ("2026-11-22 10:31:07-05:30", "2026-11-22T16:01:07Z"),
            ("10:31", "2026-11-22T09:31:00Z"),
            ("13:00:00", "2026-11-22T12:00:00Z"),
            ("13:00:01", "2026-11-21T12:00:01Z"), // not yet today
            ("90s ago", "2026-11-22T11:58:30Z"),
            ("1h30m ago", "2026-11-22T10:30:00Z"),
            (" 2 d ago ", "2026-11-20T12:00:00Z"),
        ] {
            assert_eq!(clock().point(text), Ok(utc(want)), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_a_position_or_a_bookmark() {
        assert_eq!(clock().point("latest"), Ok(RecoveryPoint::Latest));
        assert_eq!(clock().point("4711"), Ok(RecoveryPoint::Lsn(Lsn(4711))));
        assert_eq!(clock().point("20261122"), Ok(RecoveryPoint::Lsn(Lsn(20_261_122))));
        assert_eq!(clock().point("lsn:12"), Ok(RecoveryPoint::Lsn(Lsn(12))));
        for name in ["before upgrade", "long ago", "a-2026", "m ago"] {
            assert_eq!(clock().point(name), Ok(RecoveryPoint::Bookmark(name.parse().unwrap())), "{name}");
        }
        let named = RecoveryPoint::Bookmark("2026-11-22".parse().unwrap());
        assert_eq!(clock().point("bookmark:2026-11-22"), Ok(named));
    }

    #[test]
    fn what_is_not_clear_is_refused_with_what_would_be() {
        let twice = clock().point("2026-10-25 02:30:00").unwrap_err();
        assert!(
            twice.remedy().contains("2026-10-25T02:30:00+02:00 or 2026-10-25T02:30:00+01:00"),
            "{}",
            twice.remedy()
        );
        assert!(clock().point("2026-10-25T02:30:00+02:00").is_ok());
        let never = clock().point("2026-03-29 02:30").unwrap_err();
        assert!(matches!(never, PointError::Never { .. }), "{never}");
        for text in ["2026-13-01", "2026-11-22T25:00", "2026-11-22T10:31:07+99:00", "25:61"] {
            let error = clock().point(text).unwrap_err();
            assert!(matches!(error, PointError::BadTime { .. }), "{text}: {error}");
        }
        assert!(matches!(clock().point("1960-01-01"), Err(PointError::OutOfRange { .. })));
        assert!(matches!(clock().point("99999999d ago"), Err(PointError::OutOfRange { .. })));
        assert!(matches!(clock().point(""), Err(PointError::Untimed(_))));
        assert!(matches!(clock().point("lsn:x"), Err(PointError::Untimed(_))));
    }

    #[test]
    fn a_shown_time_reads_back_as_itself() {
        let us = 1_763_803_867_250_000;
        assert_eq!(clock().point(&clock().show(us)), Ok(RecoveryPoint::Time(HistoryTime(us))));
        assert_eq!(clock().show(us), "2025-11-22 10:31:07.250");
        assert_eq!(clock().show(u64::MAX), format!("{} µs since 1970", u64::MAX));
        assert_eq!(clock().zone_name(), "CET, UTC+01:00");
    }

    #[test]
    fn spans_are_shown_in_two_units() {
        for (us, want) in [
            (40_000, "40 ms"),
            (4_250_000, "4.2 s"),
            (185_000_000, "3 min 05 s"),
            (7_800_000_000, "2 h 10 min"),
            (273_600_000_000, "3 d 4 h"),
        ] {
            assert_eq!(show_span_us(us), want);
        }
    }
}
