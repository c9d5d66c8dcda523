//! Marks: records that say something about the history instead of changing a volume.

use crate::{SourceSeq, StreamId};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Why recovery points stop being offered for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GapReason {
    /// The first copy is still running.
    InitialSync,
    /// Capture ran out of room; what changed is known only as a dirty map.
    Overflow,
    /// The source could not tell what it missed (crash, replaced capture) and compares hashes.
    Verify,
    /// The operator asked for it.
    Requested,
    /// The journal had no room; the source kept a dirty map meanwhile.
    JournalFull,
    /// A volume was added to the group, changed its size or was replaced.
    VolumeChanged,
    /// The agent was restarted without a clean stop: what it held but had not delivered is copied again.
    AgentRestart,
    /// The box no longer has what the host had delivered, or has what this host never sent: everything is copied again.
    HistoryLost,
}

impl fmt::Display for GapReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InitialSync => "initial sync",
            Self::Overflow => "the host's buffers overflowed",
            Self::Verify => "the host could not tell what changed; comparing",
            Self::Requested => "resync was requested",
            Self::JournalFull => "the journal was full",
            Self::VolumeChanged => "a volume was added, resized or replaced",
            Self::AgentRestart => "the agent was restarted",
            Self::HistoryLost => "the box and the host disagreed about what was delivered",
        })
    }
}

/// How good a recovery point is for what runs on the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power cut: every write before the point, none after.
    Crash,
    /// The file systems were frozen.
    Filesystem,
    /// The applications were quiesced too.
    Application,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        })
    }
}

/// A bookmark's name: 1 to 128 characters, none of them a control character, no space at either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BookmarkName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BookmarkNameError {
    #[error("a bookmark needs a name")]
    Empty,
    #[error("a bookmark's name has at most 128 characters, this one has {0}")]
    TooLong(usize),
    #[error("a bookmark's name has no control characters and no space at its ends")]
    Character,
}

impl BookmarkName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BookmarkName {
    type Error = BookmarkNameError;
    fn try_from(name: String) -> Result<Self, BookmarkNameError> {
        let count = name.chars().count();
        match () {
            () if count == 0 => Err(BookmarkNameError::Empty),
            () if count > 128 => Err(BookmarkNameError::TooLong(count)),
            () if name.trim() != name || name.chars().any(char::is_control) => Err(BookmarkNameError::Character),
            () => Ok(Self(name)),
        }
    }
}

impl FromStr for BookmarkName {
    type Err = BookmarkNameError;
    fn from_str(name: &str) -> Result<Self, BookmarkNameError> {
        name.to_owned().try_into()
    }
}

impl From<BookmarkName> for String {
    fn from(name: BookmarkName) -> String {
        name.0
    }
}

impl fmt::Display for BookmarkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a record of kind [`Mark`](crate::RecordKind::Mark) says. Stored with postcard: **append variants, never reorder**.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Mark {
    /// From here to the next [`Mark::Consistent`] the volumes agree with no moment of the host: no recovery points.
    GapBegin { reason: GapReason },
    /// The gap is over; from this LSN on every request boundary is a recovery point again.
    Consistent,
    /// The host had captured everything up to `seq` of `stream` when its clocks showed these times; the proof behind lag.
    Watermark { stream: StreamId, seq: SourceSeq, source_wall_us: u64 },
    /// A named, pinned point.
    Bookmark { name: BookmarkName, consistency: Consistency },
    /// A new run of capture begins; its numbering starts again at 1.
    StreamBegin { stream: StreamId },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bookmark_names_are_checked() {
        assert!("before upgrade 每日".parse::<BookmarkName>().is_ok());
        assert_eq!("".parse::<BookmarkName>(), Err(BookmarkNameError::Empty));
        assert_eq!(" x".parse::<BookmarkName>(), Err(BookmarkNameError::Character));
        assert_eq!("a\nb".parse::<BookmarkName>(), Err(BookmarkNameError::Character));
        assert_eq!("x".repeat(129).parse::<BookmarkName>(), Err(BookmarkNameError::TooLong(129)));
        assert!(serde_json::from_str::<BookmarkName>("\"a\\u0007\"").is_err());
    }
}
