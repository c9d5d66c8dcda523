//! Prometheus' text format, written by hand: it is forty lines, and a registry would only copy what the box knows anyway.
//!
//! Served on a loopback address only and only with the bearer token in `<data>/metrics.token`. Units are in the names.

use std::fmt::{self, Write as _};

/// What a family of samples counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Gauge,
    Counter,
}

/// A page of metrics being written. A family's samples must follow its head.
#[derive(Default)]
pub struct Page {
    text: String,
    family: &'static str,
}

impl Page {
    /// Begins a family: its name, what it is in one line, and its kind.
    pub fn family(&mut self, name: &'static str, help: &str, kind: Kind) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        self.family = name;
        self.line(format_args!("# HELP {name} {}\n# TYPE {name} {kind}\n", Help(help)));
    }

    /// A sample of the family begun last.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Value>) {
        let name = self.family;
        self.line(format_args!("{name}"));
        for (i, (key, value)) in labels.iter().enumerate() {
            self.line(format_args!("{}{key}=\"{}\"", if i == 0 { "{" } else { "," }, Label(value)));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        self.line(format_args!("{close} {}\n", value.into()));
    }

    fn line(&mut self, args: fmt::Arguments<'_>) {
        self.text.write_fmt(args).expect("a String takes everything");
    }

    pub fn finish(self) -> String {
        self.text
    }
}

/// A sample's value. Integers are printed whole: a float loses the low digits of a byte counter after 2^53.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    Whole(u64),
    Float(f64),
}

impl From<u64> for Value {
    fn from(n: u64) -> Self {
        Self::Whole(n)
    }
}
impl From<f64> for Value {
    fn from(n: f64) -> Self {
        Self::Float(n)
    }
}
impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Whole(b.into())
    }
}
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(n) => write!(f, "{n}"),
            Self::Float(n) if n.is_nan() => f.write_str("NaN"),
            Self::Float(n) if n.is_infinite() => f.write_str(if *n > 0.0 { "+Inf" } else { "-Inf" }),
            Self::Float(n) => write!(f, "{n}"),
        }
    }
}

struct Label<'a>(&'a str);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            c if c.is_control() => f.write_char('\u{fffd}'),
            c => f.write_char(c),
        })
    }
}

struct Help<'a>(&'a str);

impl fmt::Display for Help<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '\n' => f.write_str("\\n"),
            c => f.write_char(c),
        })
    }
}

/// Checks a page as a strict reader would; for tests. Returns the number of samples, or the first line that is wrong.
pub fn check(page: &str) -> Result<usize, String> {
    let mut samples = 0;
    let mut family: Option<String> = None;
    let (mut seen, mut heads) = (std::collections::HashSet::new(), std::collections::HashSet::new());
    for line in page.lines() {
        let wrong = |why: &str| Err(format!("{why}: {line:?}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let name = rest.split(' ').next().unwrap_or_default();
            if !seen.insert(name.to_owned()) {
                return wrong("a family begun twice");
            }
            family = None;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let mut words = rest.split(' ');
            let name = words.next().unwrap_or_default();
            if !seen.contains(name) || !matches!(words.next(), Some("gauge" | "counter")) || words.next().is_some() {
                return wrong("a type without its help, or no type");
            }
            if name.ends_with("_total") != rest.ends_with(" counter") {
                return wrong("counters end in _total, gauges do not");
            }
            family = Some(name.to_owned());
        } else {
            let Some((head, value)) = line.rsplit_once(' ') else { return wrong("no value") };
            let (name, labels) = match head.split_once('{') {
                None => (head, None),
                Some((name, labels)) => (name, Some(labels)),
            };
            if Some(name) != family.as_deref() {
                return wrong("a sample outside its family");
            }
            if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return wrong("a name with a wrong character");
            }
            if value.parse::<f64>().is_err() {
                return wrong("no number");
            }
            if labels.is_some_and(|labels| !labels_are_good(labels)) {
                return wrong("labels");
            }
            if !heads.insert(head.to_owned()) {
                return wrong("the same sample twice");
            }
            samples += 1;
        }
    }
    Ok(samples)
}

/// `key="value",…}` with the three escapes.
fn labels_are_good(mut rest: &str) -> bool {
    loop {
        let Some((key, after)) = rest.split_once("=\"") else { return false };
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            return false;
        }
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next() {
                None => return false,
                Some((i, '"')) => break i,
                Some((_, '\\')) => match chars.next() {
                    Some((_, '\\' | '"' | 'n')) => {}
                    _ => return false,
                },
                Some((_, c)) if c.is_control() => return false,
                Some(_) => {}
            }
        };
        match &after[end + 1..] {
            "}" => return true,
            next => match next.strip_prefix(',') {
                Some(next) => rest = next,
                None => return false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_cannot_break_a_line() {
        let mut page = Page::default();
        page.family("holdfast_group_lag_seconds", "Age of the oldest write\nnot yet durable.", Kind::Gauge);
        page.sample(&[("group", "a\"}\n# evil \\"), ("host", "日本")], 1.25);
        page.sample(&[], f64::NAN);
        page.family("holdfast_events_total", "Events.", Kind::Counter);
        page.sample(&[("event", "x")], u64::MAX);
        let text = page.finish();
        assert_eq!(check(&text), Ok(3), "{text}");
        assert!(text.contains("18446744073709551615"), "{text}");
    }

    #[test]
    fn the_checker_finds_what_is_wrong() {
        for bad in [
            "x 1",
            "# HELP x y\n# TYPE x gauge\nx one",
            "# HELP x y\n# TYPE x gauge\nx{a=\"1\"b=\"2\"} 1",
            "# HELP x y\n# TYPE x gauge\nx{a=\"1} 1",
            "# HELP x y\n# TYPE x gauge\nx 1\nx 2",
            "# HELP x y\n# TYPE x gauge\ny 1",
            "# HELP x y\n# TYPE x counter\nx 1",
            "# TYPE x gauge\nx 1",
        ] {
            assert!(check(bad).is_err(), "{bad:?} passed");
        }
    }
}
