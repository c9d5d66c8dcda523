//! A group's history as a drawing: write rate over time, gaps, bookmarks, events; each column is a link that picks its moment.
//!
//! Drawn here, as numbers for an SVG of 1000 × 150 units; no script is needed to read it or to use it. The box tells the rate in so
//! many pieces of its whole history; a closer look shows pieces as they are told.

use crate::{
    answers::{Event, Points},
    format,
    request::encode,
};

const WIDTH: f64 = 1000.0;
/// Of the bars; below are ticks.
const BASE: f64 = 118.0;
const TOP: f64 = 16.0;
const COLUMNS: usize = 160;
const TICKS: u64 = 6;
/// Pieces asked of the box.
pub const PIECES: usize = 2000;
/// A window is not made narrower.
const SPAN_US_MIN: u64 = 1_000_000;

pub struct Bar {
    pub x: String,
    pub y: String,
    pub width: String,
    pub height: String,
    pub href: String,
    pub title: String,
}
pub struct Band {
    pub x: String,
    pub width: String,
    pub title: String,
}
pub struct Mark {
    pub x: String,
    pub href: String,
    pub title: String,
}
pub struct Tick {
    pub x: String,
    pub iso: String,
    pub text: String,
}
pub struct Zoom {
    pub key: &'static str,
    pub href: String,
    pub here: bool,
}

/// Everything a template draws.
pub struct Chart {
    pub bars: Vec<Bar>,
    pub gaps: Vec<Band>,
    pub bookmarks: Vec<Mark>,
    pub events: Vec<Mark>,
    pub ticks: Vec<Tick>,
    pub picked: Option<String>,
    pub zooms: Vec<Zoom>,
    pub earlier: Option<String>,
    pub later: Option<String>,
    pub top_rate: String,
    pub from_us: u64,
    pub to_us: u64,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    from: u64,
    to: u64,
}

impl Window {
    /// What the query asks for, within the history.
    pub fn new(from: &str, to: &str, points: &Points) -> Option<Self> {
        let whole = Self::whole(points)?;
        let from = from.parse().unwrap_or(whole.from).max(whole.from).min(whole.to.saturating_sub(SPAN_US_MIN));
        let to = to.parse().unwrap_or(whole.to).min(whole.to).max(from + SPAN_US_MIN);
        Some(Self { from, to })
    }
    fn whole(points: &Points) -> Option<Self> {
        let starts = points.valid.iter().map(|s| s.first_time_us).chain(points.rate.iter().map(|r| r.start_us));
        let ends = points.valid.iter().map(|s| s.last_time_us).chain(points.rate.iter().map(|r| r.end_us));
        let (from, to) = (starts.filter(|t| *t > 0).min()?, ends.max()?);
        Some(Self { from, to: to.max(from + SPAN_US_MIN) })
    }
    fn x(self, us: u64) -> f64 {
        let at = us.clamp(self.from, self.to) - self.from;
        at as f64 / (self.to - self.from) as f64 * WIDTH
    }
    fn has(self, us: u64) -> bool {
        (self.from..=self.to).contains(&us)
    }
    fn href(self, base: &str, at: &str) -> String {
        let at = if at.is_empty() { String::new() } else { format!("&at={}", encode(at)) };
        format!("{base}?from={}&to={}{at}#moment", self.from, self.to)
    }
}

/// `base` is the page's path; `at` what is picked, as text and as a time.
pub fn draw(base: &str, window: Window, points: &Points, events: &[&Event], at: &str, at_us: Option<u64>) -> Chart {
    let (bars, top) = bars(base, window, points);
    let gaps =
        points.gaps.iter().filter(|g| g.first_time_us <= window.to && g.last_time_us.is_none_or(|e| e >= window.from));
    let gaps = gaps.map(|g| {
        let (from, to) = (window.x(g.first_time_us), window.x(g.last_time_us.unwrap_or(window.to)));
        Band { x: n(from), width: n((to - from).max(2.0)), title: g.reason.clone() }
    });
    let bookmarks = points.bookmarks.iter().filter(|b| window.has(b.time_us)).map(|b| Mark {
        x: n(window.x(b.time_us)),
        href: window.href(base, &b.name),
        title: b.name.clone(),
    });
    let events = events.iter().filter(|e| window.has(e.time_us)).map(|e| Mark {
        x: n(window.x(e.time_us)),
        href: window.href(base, &format::iso(e.time_us)),
        title: format!("{} {}", e.event, e.text),
    });
    let span = window.to - window.from;
    let ticks = (0..=TICKS).map(|i| {
        let us = window.from + span / TICKS * i;
        Tick { x: n(window.x(us)), iso: format::iso(us), text: short(us, span) }
    });
    let whole = Window::whole(points).unwrap_or(window);
    let moved = |from: u64| Window { from, to: from + span };
    Chart {
        bars,
        gaps: gaps.collect(),
        bookmarks: bookmarks.collect(),
        events: events.collect(),
        ticks: ticks.collect(),
        picked: at_us.filter(|us| window.has(*us)).map(|us| n(window.x(us))),
        zooms: zooms(base, window, whole, at, at_us),
        earlier: (window.from > whole.from)
            .then(|| moved(window.from.saturating_sub(span / 2).max(whole.from)).href(base, at)),
        later: (window.to < whole.to).then(|| moved((window.from + span / 2).min(whole.to - span)).href(base, at)),
        top_rate: format::rate(top),
        from_us: window.from,
        to_us: window.to,
    }
}

fn bars(base: &str, window: Window, points: &Points) -> (Vec<Bar>, f64) {
    let span = window.to - window.from;
    let step = (span / COLUMNS as u64).max(1);
    // Bytes of a piece go to the columns it lies in, by its share of them.
    let mut columns = vec![(0.0, 0.0); COLUMNS];
    for piece in points.rate.iter().filter(|r| r.bytes > 0 && r.end_us > window.from && r.start_us < window.to) {
        let length = (piece.end_us - piece.start_us).max(1) as f64;
        let first = usize::try_from(piece.start_us.max(window.from).saturating_sub(window.from) / step).unwrap_or(0);
        for (i, column) in columns.iter_mut().enumerate().skip(first) {
            let (from, to) = (window.from + step * i as u64, window.from + step * (i as u64 + 1));
            if from >= piece.end_us {
                break;
            }
            let share = (piece.end_us.min(to).saturating_sub(piece.start_us.max(from))) as f64 / length;
            column.0 += piece.bytes as f64 * share;
            column.1 += piece.writes as f64 * share;
        }
    }
    let seconds = step as f64 / 1e6;
    let top = columns.iter().map(|c| c.0 / seconds).fold(0.0, f64::max);
    let width = WIDTH / COLUMNS as f64;
    let bar = |(i, (bytes, writes)): (usize, &(f64, f64))| {
        let rate = bytes / seconds;
        let share = if top > 0.0 { rate / top } else { 0.0 };
        let height = if *bytes > 0.0 { (share * (BASE - TOP)).max(1.5) } else { 0.0 };
        let middle = window.from + step * i as u64 + step / 2;
        Bar {
            x: n(i as f64 * width),
            y: n(BASE - height),
            width: n(width * 0.86),
            height: n(height),
            href: window.href(base, &format::iso(middle)),
            title: format!("{} · {} · {:.0}/s", format::utc(middle), format::rate(rate), writes / seconds),
        }
    };
    (columns.iter().enumerate().map(bar).collect(), top)
}

fn zooms(base: &str, window: Window, whole: Window, at: &str, at_us: Option<u64>) -> Vec<Zoom> {
    let span = window.to - window.from;
    let mut zooms = vec![Zoom {
        key: "timeline.all",
        href: whole.href(base, at),
        here: span + SPAN_US_MIN >= whole.to - whole.from,
    }];
    for (key, minutes) in [
        ("timeline.week", 10_080),
        ("timeline.day", 1440),
        ("timeline.hours6", 360),
        ("timeline.hour", 60),
        ("timeline.minutes10", 10),
        ("timeline.minute", 1),
    ] {
        let wide = minutes * 60_000_000;
        if wide >= whole.to - whole.from {
            continue;
        }
        // About what is picked; else the newest.
        let middle = at_us.unwrap_or(window.to);
        let from = middle.saturating_sub(wide / 2).clamp(whole.from, whole.to - wide);
        zooms.push(Zoom { key, href: Window { from, to: from + wide }.href(base, at), here: span == wide });
    }
    zooms
}

/// A number of the drawing.
fn n(value: f64) -> String {
    format!("{value:.1}")
}

fn short(us: u64, span_us: u64) -> String {
    let text = format::utc(us);
    let part = if span_us > 2 * 86_400_000_000 { text.get(5..16) } else { text.get(11..19) };
    part.unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{Bookmark, Gap, Rate, Stretch};

    const S: u64 = 1_000_000;
    const T: u64 = 1_795_000_000 * S;

    fn points() -> Points {
        Points {
            valid: vec![Stretch { first_lsn: 1, last_lsn: 9, first_time_us: T, last_time_us: T + 3600 * S }],
            gaps: vec![Gap { first_time_us: T + 100 * S, last_time_us: Some(T + 200 * S), ..Gap::default() }],
            bookmarks: vec![Bookmark { name: "a&b \"<".into(), time_us: T + 1800 * S, ..Bookmark::default() }],
            rate: (0..360)
                .map(|i| Rate { start_us: T + i * 10 * S, end_us: T + (i + 1) * 10 * S, bytes: 1000, writes: 1 })
                .collect(),
        }
    }

    #[test]
    fn what_is_drawn_lies_where_it_happened() {
        let points = points();
        let window = Window::new("", "", &points).unwrap();
        let chart = draw("/groups/g", window, &points, &[], "latest", Some(T + 1800 * S));
        assert_eq!(chart.bars.len(), COLUMNS);
        assert_eq!((chart.bookmarks[0].x.as_str(), chart.picked.as_deref()), ("500.0", Some("500.0")));
        assert!(chart.bookmarks[0].href.contains("at=a%26b%20%22%3C"));
        assert_eq!(chart.top_rate, "100 B/s", "bytes are shared out, none twice");
        assert!(chart.earlier.is_none() && chart.later.is_none());
        let near = Window::new(&(T + 1000 * S).to_string(), &(T + 1600 * S).to_string(), &points).unwrap();
        let chart = draw("/g", near, &points, &[], "", None);
        assert!(chart.bookmarks.is_empty() && chart.gaps.is_empty());
        assert!(chart.earlier.is_some() && chart.later.is_some());
        assert!(chart.zooms.iter().any(|z| z.key == "timeline.minutes10" && z.here));
    }

    #[test]
    fn any_window_is_bounded_by_the_history() {
        let points = points();
        for (from, to) in [("0", "99999999999999999999"), ("x", "y"), (&*u64::MAX.to_string(), "0"), ("5", "4")] {
            let w = Window::new(from, to, &points).unwrap();
            assert!(w.from >= T && w.to <= T + 3600 * S && w.to - w.from >= SPAN_US_MIN, "{w:?}");
            draw("/g", w, &points, &[], "", None);
        }
        assert!(Window::new("", "", &Points::default()).is_none());
    }
}
