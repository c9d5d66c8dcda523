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
    /// CLOCK_BOOTTIME, which also counts while the box sleeps: leases run by it. Not to be compared with [`Clock::mono`].
    pub fn boot(&self) -> MonoTime {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a value of the right type that outlives the call.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        MonoTime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }
    pub fn uptime_s(&self) -> u64 {
        self.started.elapsed().as_secs()
    }
}
