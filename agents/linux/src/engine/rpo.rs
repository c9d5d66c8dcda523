//! Holding other programs back so that no moment has to be given up; see [`crate::throttle`].

use super::Engine;
use crate::throttle::{Decision, Kernel, Need, Place, Throttle, ThrottleError};
use model::MonoTime;
use replication::Lag;
use std::path::Path;

/// Services come and go; and what could not be put back is tried again so often.
const AGAIN_MS: u64 = 5_000;

#[derive(Default)]
pub(super) struct Rpo {
    throttle: Option<Throttle>,
    decision: Decision,
    on: bool,
    last: Option<MonoTime>,
    /// Why it does not work, for people.
    pub trouble: String,
}

impl Rpo {
    /// Puts back what an agent before us has left.
    pub fn open(run_dir: &Path) -> Self {
        let mut this = Self::default();
        match Throttle::open(run_dir, Box::new(Kernel)) {
            Ok(throttle) => this.throttle = Some(throttle),
            Err(e) => this.failed(&e),
        }
        this.release();
        this
    }

    pub fn release(&mut self) {
        let Some(throttle) = self.throttle.as_mut().filter(|t| t.is_set()) else { return };
        match throttle.release() {
            Ok(()) => {
                tracing::info!("other programs write as fast as they like again");
                self.trouble.clear();
            }
            Err(e) => self.failed(&e),
        }
    }

    fn failed(&mut self, e: &ThrottleError) {
        let why = crate::error_chain(e);
        if self.trouble != why {
            tracing::error!(%why, "holding other programs back, or letting them go");
        }
        self.trouble = why;
    }

    /// What is held back, if anything is: why.
    pub fn why(&self) -> Option<&str> {
        self.throttle.as_ref().filter(|t| t.limits() > 0).map(|_| self.decision.why.as_str())
    }
    pub fn limits(&self) -> usize {
        self.throttle.as_ref().map_or(0, Throttle::limits)
    }
}

impl Engine {
    pub(super) fn protect_rpo(&mut self, now: MonoTime) {
        let policy = self.config.throttle();
        let needs: Vec<Need> = self
            .groups
            .iter()
            .filter(|g| !g.record.sync)
            .filter_map(|g| g.running.as_ref())
            .filter_map(|running| {
                let status = running.source.status();
                let used = u128::from(status.window_bytes.0) * 100 / u128::from(running.spool_max.max(1));
                let lag_ms = if let Lag::Known { ms } = status.lag { ms } else { 0 };
                status.gap.is_none().then_some(Need { spool_percent: used.min(100) as u64, lag_ms })
            })
            .collect();
        let rpo = &mut self.rpo;
        let on = policy.as_ref().is_some_and(|p| rpo.decision.on(now.0 / 1_000_000, p, &needs));
        let changed = on != rpo.on;
        rpo.on = on;
        let due = rpo.last.is_none_or(|last| now.ms_since(last) >= AGAIN_MS);
        if !changed && !due {
            return;
        }
        rpo.last = Some(now);
        match (on, policy) {
            (true, Some(policy)) => {
                let disks: Vec<_> =
                    self.ctx.capture.iter().flat_map(|c| c.targets()).map(|(_, target)| target.disk).collect();
                if changed {
                    tracing::warn!(why = %rpo.decision.why, mib_s = policy.mib_s, "other programs are held back so that the box keeps up");
                }
                let set = Place::here()
                    .and_then(|place| rpo.throttle.as_mut().map_or(Ok(()), |t| t.set(&place, &policy, &disks)));
                match set {
                    Ok(()) => rpo.trouble.clear(),
                    Err(e) => rpo.failed(&e),
                }
            }
            _ => rpo.release(),
        }
    }
}
