//! What is drawn with characters: tables, bars, curves.

use std::io::IsTerminal as _;

/// Which characters the terminal shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Glyphs {
    /// A serial console, or a locale that is not UTF-8.
    Ascii,
    Unicode,
}

/// Where something is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Canvas {
    pub width: usize,
    pub glyphs: Glyphs,
}

impl Canvas {
    pub fn of_terminal() -> Self {
        let utf8 = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .filter_map(|name| std::env::var(name).ok())
            .find(|value| !value.is_empty())
            .is_some_and(|value| value.to_ascii_uppercase().replace('-', "").contains("UTF8"));
        Self { width: terminal_width().clamp(40, 200), glyphs: if utf8 { Glyphs::Unicode } else { Glyphs::Ascii } }
    }

    /// A bar that is full at 1.
    pub fn bar(&self, share: f64, width: usize) -> String {
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        let full = (share * width as f64).round() as usize;
        let (on, off) = match self.glyphs {
            Glyphs::Ascii => ('#', '-'),
            Glyphs::Unicode => ('█', '░'),
        };
        (0..width).map(|i| if i < full { on } else { off }).collect()
    }

    /// One column per value, the highest one full; nothing at all is a space.
    pub fn curve(&self, values: &[f64]) -> String {
        let levels: Vec<char> = match self.glyphs {
            Glyphs::Ascii => "_.:-=+*#".chars().collect(),
            Glyphs::Unicode => "▁▂▃▄▅▆▇█".chars().collect(),
        };
        let top = values.iter().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
        let level = |value: f64| {
            let step = (value / top * levels.len() as f64).ceil() as usize;
            levels[step.clamp(1, levels.len()) - 1]
        };
        values.iter().map(|v| if *v > 0.0 && v.is_finite() { level(*v) } else { ' ' }).collect()
    }
}

fn terminal_width() -> usize {
    if let Some(columns) = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()) {
        return columns;
    }
    if !std::io::stdout().is_terminal() {
        return 100;
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize` to the address, which is valid for that; nothing is kept.
    let got = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if got == 0 && size.ws_col > 0 { usize::from(size.ws_col) } else { 80 }
}

/// Columns under headings. Cells that are numbers go to the right.
#[derive(Debug)]
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new() }
    }
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
    /// Lines without an end of line, indented.
    pub fn lines(&self, indent: usize) -> Vec<String> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cells_wide(cell));
            cells.chain([self.head[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let head: Vec<String> = self.head.iter().map(|h| (*h).to_owned()).collect();
        [&head]
            .into_iter()
            .chain(&self.rows)
            .map(|row| {
                let mut line = " ".repeat(indent);
                for (cell, width) in row.iter().zip(&widths) {
                    let padding = " ".repeat(width - cells_wide(cell).min(*width));
                    if cell.starts_with(|c: char| c.is_ascii_digit()) && !cell.contains(['-', ':']) {
                        line.push_str(&padding);
                        line.push_str(cell);
                    } else {
                        line.push_str(cell);
                        line.push_str(&padding);
                    }
                    line.push_str("  ");
                }
                line.trim_end().to_owned()
            })
            .collect()
    }
}

/// Cells a text takes on a terminal: two for East Asian wide characters.
pub fn cells_wide(text: &str) -> usize {
    let wide = |c: char| {
        matches!(u32::from(c),
            0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff | 0xfe30..=0xfe6f
            | 0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1faff | 0x20000..=0x3fffd)
    };
    text.chars().map(|c| if wide(c) { 2 } else { 1 }).sum()
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 gap`, `2 gaps`
pub fn count(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Canvas = Canvas { width: 80, glyphs: Glyphs::Ascii };

    #[test]
    fn bars_and_curves() {
        assert_eq!(PLAIN.bar(0.5, 8), "####----");
        assert_eq!(PLAIN.bar(7.0, 4), "####");
        assert_eq!(PLAIN.bar(f64::NAN, 4), "----");
        assert_eq!(PLAIN.curve(&[0.0, 1.0, 4.0, 8.0]), " _-#");
        assert_eq!(PLAIN.curve(&[0.0, 0.0]), "  ");
        assert_eq!(Canvas { glyphs: Glyphs::Unicode, ..PLAIN }.curve(&[1.0, 8.0]), "▁█");
    }

    #[test]
    fn tables_keep_their_columns_with_wide_characters_too() {
        let mut table = Table::new(&["NAME", "LSN", "TIME"]);
        table.row(["标签".into(), "7".into(), "10:31".into()]);
        table.row(["upgrade".into(), "1,200".into(), "9:02".into()]);
        assert_eq!(table.lines(1), [" NAME     LSN    TIME", " 标签         7  10:31", " upgrade  1,200  9:02"]);
    }

    #[test]
    fn numbers() {
        assert_eq!([grouped(0), grouped(999), grouped(1000), grouped(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([count(1, "gap"), count(0, "gap")], ["1 gap", "0 gaps"]);
    }
}
