//! Times. No clock is read here: a time is always handed in.

use serde::{Deserialize, Serialize};

/// Microseconds since 1970-01-01T00:00:00Z **on the history's own clock**: it never goes backwards within a timeline.
///
/// The box derives it from the source's monotonic clock and its own wall clock, so that neither a clock set back on the
/// host nor one set back on the box can put a later write before an earlier one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HistoryTime(pub u64);

/// Nanoseconds on some machine's monotonic clock. Two of different machines, or across a reboot, cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MonoTime(pub u64);

impl MonoTime {
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0 + ms * 1_000_000)
    }
    /// Milliseconds from `earlier` to here; zero when it is not earlier.
    pub const fn ms_since(self, earlier: MonoTime) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}
