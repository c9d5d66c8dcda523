//! How much of the host's writes may lie between the legs and the engine.
//!
//! A leg that answers at once would otherwise fill memory with what an engine that is late has not taken. One budget for all legs, as large as
//! the ring of the other backends; whatever does not fit is marked instead of kept, as there.
//!
//! **Order.** What was lost is told before anything that was written after it, on whichever volume: the marks of all legs lie in one place, and
//! a leg that hands a write on first tells all that lie there. While it does, the others wait ([`Budget::tell_lost`]).

use crate::capture::TargetId;
use model::Extent;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, TryLockError,
    atomic::{AtomicU64, Ordering},
};

/// Places of lost writes that are kept apart; with more, one place covers all of a volume's.
const LOST_MAX: usize = 1024;

/// Bytes that a request counts for beside its data. Also bounds how many lie in the engine's inbox, which legs must not fill.
pub const REQUEST_BYTES: u64 = 8 << 10;

#[derive(Debug)]
pub struct Budget {
    used: AtomicU64,
    max: u64,
    lost: Mutex<Vec<(TargetId, Extent)>>,
}

/// A part of the budget; given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), max, lost: Mutex::default() })
    }

    /// None when it does not fit.
    pub fn take(self: &Arc<Self>, data: usize) -> Option<Charge> {
        let bytes = (data as u64).saturating_add(REQUEST_BYTES);
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Charge { budget: self.clone(), bytes })
    }

    fn lost(&self) -> MutexGuard<'_, Vec<(TargetId, Extent)>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write to this place was not kept.
    pub fn mark(&self, target: TargetId, extent: Extent) {
        let mut lost = self.lost();
        match lost.last_mut() {
            Some((of, last)) if *of == target && last.end() == extent.start() => {
                *last = Extent::between(last.start(), extent.end());
            }
            _ => lost.push((target, extent)),
        }
        if lost.len() > LOST_MAX {
            merge(&mut lost);
        }
    }

    /// Tells what was lost, if anything was; nobody else can tell or mark meanwhile. Says whether anybody listens.
    pub fn tell_lost(&self, tell: impl FnOnce(Vec<(TargetId, Extent)>) -> bool) -> bool {
        let mut lost = self.lost();
        lost.is_empty() || tell(std::mem::take(&mut *lost))
    }

    /// What was lost and has not been told. None while a leg is telling: whoever asks is the one that it waits for.
    pub fn take_lost(&self) -> Option<Vec<(TargetId, Extent)>> {
        match self.lost.try_lock() {
            Ok(mut lost) => Some(std::mem::take(&mut *lost)),
            Err(TryLockError::Poisoned(lost)) => Some(std::mem::take(&mut *lost.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Bytes in use and in all.
    pub fn fill(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.max)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// One place for each volume.
fn merge(lost: &mut Vec<(TargetId, Extent)>) {
    let mut whole: Vec<(TargetId, Extent)> = Vec::new();
    for (target, extent) in lost.drain(..) {
        match whole.iter_mut().find(|(of, _)| *of == target) {
            Some((_, one)) => {
                *one = Extent::between(one.start().min(extent.start()), one.end().max(extent.end()));
            }
            None => whole.push((target, extent)),
        }
    }
    *lost = whole;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_places_are_lost_they_are_bounded_and_covered() {
        let budget = Budget::new(0);
        let (one, other) = (TargetId(1), TargetId(2));
        assert!(budget.tell_lost(|_| unreachable!("nothing was lost")));
        for n in 0..=LOST_MAX as u64 {
            budget.mark(if n == 7 { other } else { one }, Extent::new(n * 10, 4));
        }
        let end = LOST_MAX as u64 * 10 + 4;
        assert_eq!(budget.take_lost().unwrap(), [(one, Extent::between(0, end)), (other, Extent::new(70, 4))]);
        // Neighbours are one place.
        budget.mark(one, Extent::new(8, 8));
        budget.mark(one, Extent::new(16, 8));
        budget.mark(other, Extent::new(24, 8));
        let mut told = Vec::new();
        assert!(!budget.tell_lost(|lost| {
            told = lost;
            assert_eq!(budget.take_lost(), None, "who asks meanwhile must not wait");
            false
        }));
        assert_eq!(told, [(one, Extent::new(8, 16)), (other, Extent::new(24, 8))]);
        assert_eq!(budget.take_lost(), Some(Vec::new()));
    }

    #[test]
    fn what_does_not_fit_is_refused_until_something_was_given_back() {
        let budget = Budget::new(2 * REQUEST_BYTES + 100);
        let first = budget.take(100).unwrap();
        assert!(budget.take(1).is_none() && budget.take(usize::MAX).is_none());
        let second = budget.take(0).unwrap();
        assert_eq!(budget.fill(), (2 * REQUEST_BYTES + 100, 2 * REQUEST_BYTES + 100));
        drop(first);
        let third = budget.take(100).unwrap();
        drop((second, third));
        assert_eq!(budget.fill().0, 0);
    }
}
