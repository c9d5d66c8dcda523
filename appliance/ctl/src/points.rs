//! The moments of a group as a picture: what was written, where any moment can be opened, gaps, bookmarks.

use crate::{
    api::{Bookmark, Gap, PointRange, Points, Rate},
    picture::{Canvas, Glyphs, Table, count, grouped},
    times::{Clock, show_span_us},
};
use model::ByteLen;

/// Rows of a table; the newest are the ones people look for, `--json` has all.
const ROWS_MAX: usize = 25;

/// The whole page.
pub fn render(name: &str, points: &Points, clock: &Clock, canvas: Canvas) -> String {
    let mut lines = Vec::new();
    let Some(span) = Span::of(points, u64::try_from(clock.now.as_microsecond()).unwrap_or(0)) else {
        return format!("group {name}: no moment can be opened yet: the first copy has not ended\n");
    };
    let moments: u64 = points.valid.iter().map(|r| r.last_lsn.saturating_sub(r.first_lsn) + 1).sum();
    lines.push(format!(
        "group {name}: {} records in {}, {}, {}",
        grouped(moments),
        show_span_us(span.end_us - span.start_us),
        count(points.gaps.len(), "gap"),
        count(points.bookmarks.len(), "bookmark"),
    ));
    lines.push(format!("times are local ({})", clock.zone_name()));
    lines.push(String::new());
    lines.extend(timeline(points, &span, clock, canvas));
    table(&mut lines, ranges_table(&points.valid, clock), "moments: any in these stretches", points.valid.len());
    table(&mut lines, gaps_table(&points.gaps, clock), "gaps: no moment can be opened", points.gaps.len());
    table(&mut lines, bookmarks_table(&points.bookmarks, clock), "bookmarks", points.bookmarks.len());
    lines.push(String::new());
    lines.join("\n")
}

fn table(lines: &mut Vec<String>, table: Table, title: &str, rows: usize) {
    if rows == 0 {
        return;
    }
    lines.push(String::new());
    let hidden = rows.saturating_sub(ROWS_MAX);
    let more = if hidden > 0 { format!(" (the newest {ROWS_MAX} of {rows}; --json has all)") } else { String::new() };
    lines.push(format!("{title}{more}"));
    lines.extend(table.lines(2));
}

fn newest<T>(rows: &[T]) -> &[T] {
    &rows[rows.len().saturating_sub(ROWS_MAX)..]
}

fn ranges_table(ranges: &[PointRange], clock: &Clock) -> Table {
    let mut table = Table::new(&["FROM", "TO", "SPAN", "FIRST LSN", "LAST LSN"]);
    for range in newest(ranges) {
        table.row([
            clock.show(range.first_time_us),
            clock.show(range.last_time_us),
            show_span_us(range.last_time_us.saturating_sub(range.first_time_us)),
            range.first_lsn.to_string(),
            range.last_lsn.to_string(),
        ]);
    }
    table
}

fn gaps_table(gaps: &[Gap], clock: &Clock) -> Table {
    let mut table = Table::new(&["FROM", "TO", "REASON"]);
    for gap in newest(gaps) {
        let to = match (gap.last_lsn, gap.last_time_us) {
            (None, _) => "still open".to_owned(),
            (Some(_), Some(us)) => clock.show(us),
            (Some(lsn), None) => format!("LSN {lsn}"),
        };
        table.row([clock.show(gap.first_time_us), to, gap.reason.clone()]);
    }
    table
}

fn bookmarks_table(bookmarks: &[Bookmark], clock: &Clock) -> Table {
    let mut table = Table::new(&["", "NAME", "TIME", "LSN", "CONSISTENCY"]);
    let skipped = bookmarks.len() - newest(bookmarks).len();
    for (i, bookmark) in newest(bookmarks).iter().enumerate() {
        table.row([
            letter(skipped + i).to_string(),
            bookmark.name.clone(),
            clock.show(bookmark.time_us),
            bookmark.lsn.to_string(),
            bookmark.consistency.map_or_else(|| "?".to_owned(), |c| c.to_string()),
        ]);
    }
    table
}

/// Which sign stands for the n-th bookmark in the picture.
fn letter(n: usize) -> char {
    char::from(b'a' + (n % 26) as u8)
}

/// From the first moment to the last.
struct Span {
    start_us: u64,
    end_us: u64,
}

impl Span {
    fn of(points: &Points, now_us: u64) -> Option<Self> {
        let starts = points.valid.iter().map(|r| r.first_time_us).chain(points.gaps.iter().map(|g| g.first_time_us));
        let start_us = starts.min()?;
        let open = points.gaps.iter().any(|gap| gap.last_lsn.is_none()).then_some(now_us);
        let gap_ends = points.gaps.iter().filter_map(|gap| gap.last_time_us);
        let ends = points.valid.iter().map(|r| r.last_time_us).chain(gap_ends).chain(open);
        let end_us = ends.max().unwrap_or(start_us).max(start_us);
        if points.valid.is_empty() && points.bookmarks.is_empty() {
            return None;
        }
        Some(Self { start_us, end_us })
    }
    /// Start and end of a column, the end not included.
    fn column(&self, i: usize, width: usize) -> (u64, u64) {
        let len = u128::from(self.end_us - self.start_us + 1);
        let at = |i: usize| self.start_us + (len * i as u128 / width as u128) as u64;
        (at(i), at(i + 1).max(at(i) + 1))
    }
    fn place(&self, us: u64, width: usize) -> usize {
        let len = u128::from(self.end_us - self.start_us + 1);
        let at = u128::from(us.clamp(self.start_us, self.end_us) - self.start_us);
        (at * width as u128 / len) as usize
    }
}

const LABEL: usize = 12;

fn timeline(points: &Points, span: &Span, clock: &Clock, canvas: Canvas) -> Vec<String> {
    let width = canvas.width.saturating_sub(LABEL + 22).clamp(24, 120);
    let mut lines = Vec::new();
    if !points.rate.is_empty() {
        let rates = columns_of_rate(&points.rate, span, width);
        let peak = rates.iter().copied().fold(0.0, f64::max);
        lines.push(row("writes", &canvas.curve(&rates), &format!("peak {}/s", ByteLen(peak as u64))));
    }
    let (all, part, none) = match canvas.glyphs {
        Glyphs::Ascii => ('=', '-', '.'),
        Glyphs::Unicode => ('━', '╍', '·'),
    };
    let cells: String = (0..width)
        .map(|i| {
            let (from, to) = span.column(i, width);
            let valid = points.valid.iter().any(|r| r.first_time_us < to && r.last_time_us >= from);
            let gap = points.gaps.iter().any(|g| {
                // A gap whose end is not told lasts until the next valid stretch begins.
                let next = points.valid.iter().map(|r| r.first_time_us).filter(|us| *us > g.first_time_us).min();
                let end = g.last_time_us.or(next).unwrap_or(u64::MAX);
                g.first_time_us < to && end >= from
            });
            match (valid, gap) {
                (true, false) => all,
                (true, true) => part,
                (false, true) => none,
                (false, false) => ' ',
            }
        })
        .collect();
    lines.push(row("moments", &cells, &format!("{all} any  {part} some  {none} none")));
    if !points.bookmarks.is_empty() {
        let mut marks = vec![' '; width];
        for (i, bookmark) in points.bookmarks.iter().enumerate() {
            let at = &mut marks[span.place(bookmark.time_us, width)];
            *at = if *at == ' ' { letter(i) } else { '*' };
        }
        lines.push(row("bookmarks", &marks.into_iter().collect::<String>(), ""));
    }
    let (start, end) = (clock.show_seconds(span.start_us), clock.show_seconds(span.end_us));
    let middle = width.saturating_sub(start.len() + end.len()).max(2);
    lines.push(row("", &format!("{start}{}{end}", " ".repeat(middle)), ""));
    lines
}

fn row(label: &str, cells: &str, legend: &str) -> String {
    format!("{label:<LABEL$}{cells}  {legend}").trim_end().to_owned()
}

/// Bytes per second in each column; a bucket that spans several is spread over them.
fn columns_of_rate(rate: &[Rate], span: &Span, width: usize) -> Vec<f64> {
    (0..width)
        .map(|i| {
            let (from, to) = span.column(i, width);
            let bytes: f64 = rate
                .iter()
                .filter(|bucket| bucket.end_us > bucket.start_us)
                .map(|bucket| {
                    let shared = bucket.end_us.min(to).saturating_sub(bucket.start_us.max(from));
                    bucket.bytes as f64 * shared as f64 / (bucket.end_us - bucket.start_us) as f64
                })
                .sum();
            bytes * 1e6 / (to - from) as f64
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    const S: u64 = 1_000_000;
    const T0: u64 = 1_763_803_800 * S; // 2025-11-22 09:30:00 UTC

    fn clock() -> Clock {
        Clock { zone: TimeZone::UTC, now: jiff::Timestamp::from_microsecond((T0 + 100 * S) as i64).unwrap() }
    }

    fn range(from_s: u64, to_s: u64) -> PointRange {
        PointRange { first_lsn: from_s, last_lsn: to_s, first_time_us: T0 + from_s * S, last_time_us: T0 + to_s * S }
    }

    #[test]
    fn the_timeline_shows_stretches_gaps_and_bookmarks_where_they_are() {
        let points = Points {
            valid: vec![range(0, 49), range(75, 100)],
            gaps: vec![Gap {
                first_lsn: 50,
                last_lsn: Some(74),
                reason: "the journal was full".into(),
                first_time_us: T0 + 51 * S,
                last_time_us: Some(T0 + 74 * S),
            }],
            bookmarks: vec![
                Bookmark { name: "start".into(), lsn: 1, time_us: T0, ..Default::default() },
                Bookmark { name: "升级前".into(), lsn: 80, time_us: T0 + 80 * S, ..Default::default() },
            ],
            rate: vec![
                Rate { start_us: T0, end_us: T0 + 50 * S, bytes: 50 << 20, writes: 9 },
                Rate { start_us: T0 + 75 * S, end_us: T0 + 100 * S, bytes: 400 << 20, writes: 9 },
            ],
        };
        let page = render("g", &points, &clock(), Canvas { width: 84, glyphs: Glyphs::Ascii });
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!(lines[0], "group g: 76 records in 1 min 40 s, 1 gap, 2 bookmarks");
        // 50 columns of two seconds each.
        let column = |label: &str| lines.iter().find(|l| l.starts_with(label)).map(|l| l[12..].to_owned()).unwrap();
        let moments = column("moments");
        assert_eq!(&moments[..50], format!("{}{}-{}", "=".repeat(25), ".".repeat(12), "=".repeat(12)), "{page}");
        assert_eq!(column("writes").split("  peak").next().unwrap().trim_end().len(), 50, "{page}");
        assert!(column("writes").starts_with(&"_".repeat(24)), "{page}");
        assert!(column("writes").contains("#####"), "{page}");
        let marks = column("bookmarks");
        assert_eq!((marks.find('a'), marks.find('b')), (Some(0), Some(39)), "{page}");
        assert!(page.contains("2025-11-22 09:30:51.000  2025-11-22 09:31:14.000  the journal was full"), "{page}");
        assert!(page.contains("升级前"), "{page}");
    }

    #[test]
    fn an_open_gap_reaches_to_now_and_no_points_are_said_in_words() {
        let open = |valid: Vec<PointRange>| Points {
            valid,
            gaps: vec![Gap { first_lsn: 50, first_time_us: T0 + 50 * S, reason: "x".into(), ..Default::default() }],
            ..Default::default()
        };
        let page = render("g", &open(vec![range(0, 49)]), &clock(), Canvas { width: 84, glyphs: Glyphs::Ascii });
        assert!(page.contains("still open"), "{page}");
        assert!(page.contains(&".".repeat(24)), "{page}");
        for points in [open(Vec::new()), Points::default()] {
            let page = render("g", &points, &clock(), Canvas { width: 84, glyphs: Glyphs::Ascii });
            assert_eq!(page, "group g: no moment can be opened yet: the first copy has not ended\n");
        }
    }

    #[test]
    fn one_single_moment_is_a_picture_too() {
        let points = Points { valid: vec![range(5, 5)], ..Default::default() };
        let page = render("g", &points, &clock(), Canvas { width: 40, glyphs: Glyphs::Unicode });
        assert!(page.contains('━'), "{page}");
    }
}
