//! Damage that power loss cannot explain.

use std::path::{Path, PathBuf};

/// Bytes that were durable once are not what they were. Never made from a torn tail: that is expected and cut in silence.
///
/// Reads as a sentence: `segments/00000000-1f.seg: record checksum at 0x7f000`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {what} at {offset:#x}", path.display())]
pub struct Corruption {
    /// The file, relative to the disk's root.
    pub path: PathBuf,
    /// Where in the file the damaged thing begins.
    pub offset: u64,
    /// What did not hold, e.g. `record checksum`.
    pub what: &'static str,
}

impl Corruption {
    pub fn new(path: &Path, offset: u64, what: &'static str) -> Self {
        Self { path: path.to_owned(), offset, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_a_sentence() {
        let damage = Corruption::new(Path::new("segments/41.seg"), 0x7f000, "record checksum");
        assert_eq!(damage.to_string(), "segments/41.seg: record checksum at 0x7f000");
    }
}
