//! Numbers with their units, and times.

use jiff::Timestamp;
use std::fmt;

/// `4.2 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// Bytes a second.
pub fn rate(per_second: f64) -> String {
    format!("{}/s", bytes(per_second.max(0.0) as u64))
}

/// `812 ms`, `4.2 s`, `13 min`, `7.5 h`, `12 d`.
pub fn span_ms(ms: u64) -> String {
    let s = ms as f64 / 1000.0;
    match s {
        _ if ms < 1000 => format!("{ms} ms"),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// `13 000 000`, with narrow spaces.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

fn stamp(us: u64) -> Option<Timestamp> {
    i64::try_from(us).ok().and_then(|us| Timestamp::from_microsecond(us).ok())
}

/// `2026-11-22T10:31:07.250123Z`.
pub fn iso(us: u64) -> String {
    stamp(us).map_or_else(|| us.to_string(), |t| t.to_string())
}

/// `2026-11-22 10:31:07 UTC`.
pub fn utc(us: u64) -> String {
    stamp(us).map_or_else(|| us.to_string(), |t| t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// What a person typed, or a script has sent: with a zone, or in UTC.
pub fn parse_time(text: &str) -> Option<u64> {
    let text = text.trim().replace(" UTC", "Z");
    let at = text.parse::<Timestamp>().or_else(|_| format!("{text}Z").parse()).ok()?;
    u64::try_from(at.as_microsecond()).ok()
}

/// A moment as a page shows it: in UTC, and a script may write it in the viewer's own zone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct When(pub u64);

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<time datetime=\"{}\">{}</time>", iso(self.0), utc(self.0))
    }
}

// Digits and fixed words only.
impl askama::filters::HtmlSafe for When {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_units() {
        assert_eq!(
            [bytes(17), bytes(2048), bytes(40 << 30), bytes(u64::MAX)],
            ["17 B", "2.0 KiB", "40 GiB", "16384 PiB"]
        );
        assert_eq!(rate(1.5e6), "1.4 MiB/s");
        assert_eq!(
            [span_ms(812), span_ms(4200), span_ms(780_000), span_ms(27_000_000), span_ms(1 << 40)],
            ["812 ms", "4.2 s", "13 min", "7.5 h", "12726 d"]
        );
        assert_eq!(count(13_000_000), "13\u{202f}000\u{202f}000");
    }

    #[test]
    fn times_are_read_as_they_are_shown() {
        let us = 1_795_429_867_250_123;
        assert_eq!(parse_time(&iso(us)), Some(us));
        assert_eq!(parse_time(&utc(us)), Some(us / 1_000_000 * 1_000_000));
        assert_eq!(parse_time("2026-11-23T10:31"), parse_time("2026-11-23 10:31:00Z"));
        assert_eq!(parse_time("2026-11-23T11:31:00+01:00"), parse_time("2026-11-23 10:31:00Z"));
        assert_eq!([parse_time(""), parse_time("yesterday")], [None, None]);
        assert_eq!(utc(u64::MAX), u64::MAX.to_string());
        assert!(When(us).to_string().starts_with("<time datetime=\"2026-"));
    }
}
