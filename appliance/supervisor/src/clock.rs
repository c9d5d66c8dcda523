//! The one place where clocks are read.

use model::{HistoryTime, MonoTime};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The box's clocks: wall time for people and history, monotonic time for timeouts.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }
    /// Microseconds since 1970 by the wall clock.
    pub fn wall_us(&self) -> u64 {
        // A clock before 1970 is as good as none: zero, and the journal keeps its own order.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
    }
    pub fn history(&self) -> HistoryTime {
        HistoryTime(self.wall_us())
    }
    /// Nanoseconds since the daemon started.
    pub fn mono(&self) -> MonoTime {
        // 584 years fit.
        MonoTime(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
    pub fn uptime_s(&self) -> u64 {
        self.started.elapsed().as_secs()
    }
}
