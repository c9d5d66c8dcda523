//! Recovery points as people and links write them.

use crate::{answers::Points, format, lang::Lang};
use model::{HistoryTime, RecoveryPoint};

/// `latest`, an LSN, a time, a bookmark.
pub fn parse(text: &str) -> Option<RecoveryPoint> {
    let text = text.trim();
    if text.contains(':')
        && !text.starts_with("lsn:")
        && !text.starts_with("bookmark:")
        && let Some(us) = format::parse_time(text)
    {
        return Some(RecoveryPoint::Time(HistoryTime(us)));
    }
    RecoveryPoint::parse_untimed(text).ok()
}

/// A picked moment, and what can be said of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Picked {
    /// As it is written in a form.
    pub text: String,
    pub time_us: Option<u64>,
    /// What a disk opened there is worth.
    pub says: String,
    /// Nothing can be opened there.
    pub refused: bool,
}

impl Picked {
    pub fn new(lang: Lang, text: &str, points: &Points) -> Option<Self> {
        let text = text.trim().to_owned();
        let point = parse(&text)?;
        let refuse = |time_us, says: String| Some(Self { text: text.clone(), time_us, says, refused: true });
        let accept =
            |time_us, says: &str| Some(Self { text: text.clone(), time_us, says: says.to_owned(), refused: false });
        let crash = lang.t("pick.crash");
        match &point {
            RecoveryPoint::Latest => match points.valid.last() {
                Some(last) => accept(Some(last.last_time_us), crash),
                None => refuse(None, lang.t("pick.none").to_owned()),
            },
            RecoveryPoint::Bookmark(name) => match points.bookmarks.iter().find(|b| b.name == name.as_str()) {
                Some(b) => {
                    let key = format!("consistency.{}", b.consistency);
                    accept(Some(b.time_us), lang.known(&key).unwrap_or(&b.consistency))
                }
                None => refuse(None, lang.fill("pick.no_bookmark", &[name.as_str()])),
            },
            RecoveryPoint::Lsn(lsn) => {
                match points.valid.iter().find(|s| (s.first_lsn..=s.last_lsn).contains(&lsn.0)) {
                    Some(_) => accept(None, crash),
                    None => refuse(None, lang.t("pick.gap").to_owned()),
                }
            }
            RecoveryPoint::Time(HistoryTime(us)) => {
                let first = points.valid.first().map_or(u64::MAX, |s| s.first_time_us);
                let gap =
                    points.gaps.iter().find(|g| g.first_time_us <= *us && g.last_time_us.is_none_or(|end| *us < end));
                match gap {
                    _ if *us < first => refuse(Some(*us), lang.t("pick.before").to_owned()),
                    Some(_) => refuse(Some(*us), lang.t("pick.gap").to_owned()),
                    None => accept(Some(*us), crash),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{Bookmark, Gap, Stretch};

    #[test]
    fn what_is_said_of_a_moment_follows_the_history() {
        assert!(matches!(parse("2026-11-23T10:31:00Z"), Some(RecoveryPoint::Time(_))));
        assert!(matches!(parse(" 17 "), Some(RecoveryPoint::Lsn(_))));
        assert!(matches!(parse("before upgrade"), Some(RecoveryPoint::Bookmark(_))));
        assert!(matches!(parse("latest"), Some(RecoveryPoint::Latest)));
        assert_eq!(parse(""), None);
        let points = Points {
            valid: vec![
                Stretch { first_lsn: 10, last_lsn: 20, first_time_us: 1_000_000, last_time_us: 2_000_000 },
                Stretch { first_lsn: 30, last_lsn: 40, first_time_us: 3_000_000, last_time_us: 4_000_000 },
            ],
            gaps: vec![Gap {
                first_lsn: 21,
                first_time_us: 2_000_000,
                last_time_us: Some(3_000_000),
                ..Gap::default()
            }],
            bookmarks: vec![Bookmark {
                name: "b".into(),
                time_us: 5,
                consistency: "filesystem".into(),
                ..Bookmark::default()
            }],
            rate: Vec::new(),
        };
        let refused = |text: &str| Picked::new(Lang::En, text, &points).map(|p| p.refused);
        for (text, want) in [
            ("1970-01-01T00:00:01.5Z", Some(false)),
            ("1970-01-01T00:00:02.5Z", Some(true)),
            ("1970-01-01T00:00:03.5Z", Some(false)),
            ("1970-01-01T00:00:00.5Z", Some(true)),
            ("15", Some(false)),
            ("25", Some(true)),
            ("b", Some(false)),
            ("c", Some(true)),
            ("latest", Some(false)),
            ("", None),
        ] {
            assert_eq!(refused(text), want, "{text}");
        }
    }
}
