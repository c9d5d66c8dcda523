//! A clock with a rate and an origin of its own.

use model::MonoTime;

/// Counts from a boot. True time is in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    booted_us: u64,
    origin_ns: u64,
    per_million: u64,
}

impl Clock {
    /// `ppm`: how much faster than true time.
    pub(super) fn new(booted_us: u64, origin_ms: u64, ppm: i64) -> Self {
        let per_million = 1_000_000u64.saturating_add_signed(ppm);
        Self { booted_us, origin_ns: origin_ms * 1_000_000, per_million }
    }
    pub(super) fn booted(self, now_us: u64, origin_ms: u64) -> Self {
        Self { booted_us: now_us, origin_ns: origin_ms * 1_000_000, ..self }
    }
    pub(super) fn read(self, now_us: u64) -> MonoTime {
        MonoTime(self.origin_ns + (now_us - self.booted_us) * self.per_million / 1_000)
    }
    /// The first true time at which the clock shows at least `at`.
    pub(super) fn when(self, at: MonoTime) -> u64 {
        self.booted_us + (at.0.saturating_sub(self.origin_ns) * 1_000).div_ceil(self.per_million)
    }
}
