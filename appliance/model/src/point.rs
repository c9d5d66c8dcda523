//! What an operator picks to go back to.

use crate::{BookmarkName, HistoryTime, Lsn};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A moment of a group's history, as picked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryPoint {
    /// The newest one that is valid.
    Latest,
    Lsn(Lsn),
    /// The last request boundary at or before this time.
    Time(HistoryTime),
    Bookmark(BookmarkName),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no recovery point: use `latest`, `lsn:NUMBER`, a time like 2026-11-22T10:31:07.250 or a bookmark's name"
)]
pub struct ParsePointError {
    pub text: String,
}

impl RecoveryPoint {
    /// Reads `latest`, a bare number or `lsn:NUMBER`, and `bookmark:NAME`. Times need a time zone and are read by the
    /// caller, which has one; what it cannot read as a time it hands here, where it becomes a bookmark's name.
    pub fn parse_untimed(text: &str) -> Result<Self, ParsePointError> {
        let bad = || ParsePointError { text: text.to_owned() };
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(number) = text.strip_prefix("lsn:") {
            return number.parse().map(|n| Self::Lsn(Lsn(n))).map_err(|_| bad());
        }
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().map(|n| Self::Lsn(Lsn(n))).map_err(|_| bad());
        }
        let name = text.strip_prefix("bookmark:").unwrap_or(text);
        name.parse().map(Self::Bookmark).map_err(|_| bad())
    }
}

impl fmt::Display for RecoveryPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Time(t) => write!(f, "{}.{:06} s since 1970", t.0 / 1_000_000, t.0 % 1_000_000),
            Self::Bookmark(name) => write!(f, "bookmark {:?}", name.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_as_an_operator_writes_them() {
        assert_eq!(RecoveryPoint::parse_untimed("latest"), Ok(RecoveryPoint::Latest));
        assert_eq!(RecoveryPoint::parse_untimed("4711"), Ok(RecoveryPoint::Lsn(Lsn(4711))));
        assert_eq!(RecoveryPoint::parse_untimed("lsn:9"), Ok(RecoveryPoint::Lsn(Lsn(9))));
        assert!(matches!(RecoveryPoint::parse_untimed("before upgrade"), Ok(RecoveryPoint::Bookmark(_))));
        assert!(RecoveryPoint::parse_untimed("lsn:x").is_err());
        assert!(RecoveryPoint::parse_untimed("").is_err());
        assert!(RecoveryPoint::parse_untimed("99999999999999999999999").is_err());
    }
}
