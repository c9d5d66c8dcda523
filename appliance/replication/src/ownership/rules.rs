//! How long a lease runs on either side.

use model::MonoTime;
use wire::LeaseRules;

/// How far the rate of either clock may be from true. Crystals are within 100 ppm and NTP slews by at most 500; what is beyond that
/// (a hypervisor that stops a guest's clock) is not covered, see the module's limits.
pub const DRIFT_PPM_MAX: u64 = 1_000;
/// A request is sent so often; a lease is several of these.
pub const RENEW_MS: u64 = 1_000;
const LEASE_MS: std::ops::RangeInclusive<u64> = 3_000..=600_000;
/// A holder keeps at least this much of a lease for stopping.
const STOP_MS_MIN: u64 = 500;

/// Rules that cannot work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    #[error("a lease of {lease_ms} ms: it must be between {} and {} ms", LEASE_MS.start(), LEASE_MS.end())]
    Lease { lease_ms: u64 },
    #[error(
        "{stop_ms} ms for stopping: it must be at least {STOP_MS_MIN} ms, and leave {left} ms of the lease of {lease_ms} ms for renewing it",
        left = 2 * RENEW_MS
    )]
    Stop { stop_ms: u64, lease_ms: u64 },
}

/// What a hostile or wrong box must not be able to set.
pub fn check_rules(rules: LeaseRules) -> Result<(), RulesError> {
    let LeaseRules { lease_ms, stop_ms } = rules;
    if !LEASE_MS.contains(&lease_ms) {
        return Err(RulesError::Lease { lease_ms });
    }
    if stop_ms < STOP_MS_MIN || stop_ms > lease_ms - 2 * RENEW_MS {
        return Err(RulesError::Stop { stop_ms, lease_ms });
    }
    Ok(())
}

/// Until when a holder may serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// No lease.
    Forever,
    /// Stopping begins at `stop` and must be done at `end`.
    At { stop: MonoTime, end: MonoTime },
}

impl Until {
    /// By a lease that was asked for at `sent`.
    pub fn leased(sent: MonoTime, rules: LeaseRules) -> Self {
        let stop = MonoTime::plus_ms(sent, rules.lease_ms - rules.stop_ms.min(rules.lease_ms));
        Self::At { stop, end: sent.plus_ms(rules.lease_ms) }
    }
    /// Whether stopping has to begin.
    pub fn has_ended(self, now: MonoTime) -> bool {
        matches!(self, Self::At { stop, .. } if now >= stop)
    }
    /// The later of the two: each was promised by itself.
    #[must_use]
    pub fn or_later(self, other: Self) -> Self {
        match (self, other) {
            (Self::At { end: a, .. }, Self::At { end: b, .. }) => {
                if b > a {
                    other
                } else {
                    self
                }
            }
            _ => Self::Forever,
        }
    }
}

/// How long the box waits, by its own clock and from the moment it granted, until a lease has run out for certain: both clocks may be wrong by
/// the bound, in the worse direction. Rounded up, and a millisecond for the resolution of times.
pub fn certain_ms(rules: LeaseRules) -> u64 {
    const ONE: u64 = 1_000_000;
    let fast = u128::from(rules.lease_ms) * u128::from(ONE + DRIFT_PPM_MAX);
    let wait = fast.div_ceil(u128::from(ONE - DRIFT_PPM_MAX));
    u64::try_from(wait).unwrap_or(u64::MAX).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_box_waits_longer_than_any_clock_within_the_bound() {
        for lease_ms in [3_000, 10_000, 123_457, 600_000] {
            let wait = certain_ms(LeaseRules { lease_ms, stop_ms: 1_000 }) as f64;
            let (slow, fast) = (1.0 - DRIFT_PPM_MAX as f64 / 1e6, 1.0 + DRIFT_PPM_MAX as f64 / 1e6);
            // True time: a slow holder's lease ends late, a fast box's wait ends early.
            assert!(wait / fast > lease_ms as f64 / slow, "{lease_ms}");
            assert!(wait < lease_ms as f64 * 1.003 + 3.0, "{lease_ms}: {wait} is more than it need be");
        }
    }

    #[test]
    fn rules_that_cannot_work_are_refused_by_name() {
        let check = |lease_ms, stop_ms| check_rules(LeaseRules { lease_ms, stop_ms });
        assert_eq!(check(10_000, 3_000), Ok(()));
        for (lease, stop) in [(0, 0), (2_999, 500), (600_001, 500), (u64::MAX, u64::MAX)] {
            assert_eq!(check(lease, stop), Err(RulesError::Lease { lease_ms: lease }));
        }
        for (lease, stop) in [(10_000, 499), (10_000, 8_001), (3_000, u64::MAX)] {
            assert_eq!(check(lease, stop), Err(RulesError::Stop { stop_ms: stop, lease_ms: lease }));
        }
        assert!(check(0, 0).unwrap_err().to_string().contains("between 3000 and 600000 ms"));
    }
}
