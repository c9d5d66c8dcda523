//! Failback: what the machine wrote is brought to the host's own disks while it serves; one pause; and a way back until somebody is content.
//!
//! # Invariants
//!
//! - The machine's disks are deleted only after somebody was content **and** the host's own history holds all that its disks hold.
//! - Nothing is given to the host before the machine is down and its disks were compared with the host's, whole.
//! - What fails before the host restarts is undone: the machine serves again, on the same disks. What fails later needs, as any takeover,
//!   proof that the host is off before the machine serves again.

use super::{
    Attempt, Driver, FailbackWish, Hands, HandsError, Shipping, Stop, Wanted, clipped, failed, hook::run_hook,
};
use crate::{
    plan::{Place, Subject},
    state::{BackEnd, BackStep, Ended, Failback, Outcome, Phase, RunState, Step, StepState},
};
use std::{
    thread,
    time::{Duration, Instant},
};

/// Shipping and hosts are looked at so often.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// So little left is worth a pause.
const LITTLE_BYTES: u64 = 64 << 20;
/// A host that writes as fast as its data is shipped is paused after so many passes.
const PASSES_MAX: u64 = 10;

fn steps(state: &mut RunState) -> Option<&mut Vec<StepState<BackStep>>> {
    Some(&mut state.failback.as_mut()?.steps)
}

impl<H: Hands> Driver<'_, H> {
    pub(super) fn begin_failback(&mut self, wish: FailbackWish) -> Result<(), HandsError> {
        self.state.failback = Some(Failback {
            restore: wish.restore,
            target: wish.target,
            disks: wish.disks,
            by: wish.by,
            begun_us: self.hands.now_us(),
            commit_minutes: wish.commit_minutes,
            steps: Vec::new(),
            heads: Vec::new(),
            down_ms: None,
            note: None,
            ended: None,
        });
        self.state.phase = Phase::FailingBack;
        self.hands.keep(&self.state)
    }

    pub(super) fn work_back(&mut self) -> Result<(), HandsError> {
        for step in BackStep::ALL {
            if self.state.is_back(step) {
                continue;
            }
            if self.hands.wanted() == Wanted::Pause {
                return Ok(());
            }
            if let Some(asked) = self.hands.asked() {
                let done = match asked {
                    super::Asked::RollBack { by, source_is_off } => {
                        self.roll_back(format!("{by} said so"), source_is_off).map(|()| true)
                    }
                    _ => Ok(false),
                };
                self.hands.answered();
                if done? {
                    return Ok(());
                }
            }
            match self.attempt(steps, step, |driver| driver.act_back(step))? {
                Attempt::Went => self.hands.keep(&self.state)?,
                Attempt::Interrupted => return Ok(()),
                Attempt::Failed if step < BackStep::Restart => {
                    let why = self.failed_text(step);
                    return self.undo(why);
                }
                Attempt::Failed => {
                    // The host may serve, badly: back to the machine at once where the plan can prove it off.
                    self.note(self.failed_text(step));
                    self.state.phase = Phase::Returned { until_us: Some(self.hands.now_us()) };
                    return self.hands.keep(&self.state);
                }
            }
        }
        let now_us = self.hands.now_us();
        if let Some(failback) = &mut self.state.failback {
            let paused = failback.steps.iter().find(|s| s.step == BackStep::Pause).map_or(now_us, |s| s.begun_us);
            failback.down_ms = Some(now_us.saturating_sub(paused) / 1000);
            self.state.phase = Phase::Returned { until_us: Some(now_us + failback.commit_minutes * 60_000_000) };
        }
        self.hands.keep(&self.state)
    }

    fn failed_text(&self, step: BackStep) -> String {
        let steps = self.state.failback.iter().flat_map(|f| &f.steps);
        steps
            .filter(|s| s.step == step)
            .find_map(|s| match &s.outcome {
                Outcome::Failed { text, remedy } => Some(format!("could not {}: {text}; {remedy}", step.title())),
                _ => None,
            })
            .unwrap_or_else(|| format!("could not {}", step.title()))
    }

    fn note(&mut self, text: String) {
        if let Some(failback) = &mut self.state.failback {
            failback.note = Some(text);
        }
    }

    fn failback(&self) -> Result<&Failback, Stop> {
        self.state.failback.as_ref().ok_or_else(|| failed("there is no failback", "begin it again"))
    }

    fn act_back(&mut self, step: BackStep) -> Result<Option<String>, Stop> {
        match step {
            BackStep::Target => self.look_at_target().map(Some),
            BackStep::Copy => self.copy().map(Some),
            BackStep::Pause if *self.state.place() == Place::Export => self.wait_until_off().map(Some),
            BackStep::Pause if self.at_standby() => self.fetch_from_standby().map(Some),
            BackStep::Pause => {
                let clean = self.take_down(true)?;
                let text =
                    "it did not shut down in time and was ended: its file systems will recover as after a power cut";
                Ok(Some(if clean { "it shut itself down".into() } else { text.into() }))
            }
            BackStep::Last => self.last_difference().map(Some),
            BackStep::Own => {
                let groups: Vec<_> = self.state.points.iter().map(|p| p.group).collect();
                let heads: Result<Vec<_>, HandsError> =
                    groups.into_iter().map(|group| Ok((group, self.hands.head(group)?))).collect();
                if let Some(failback) = &mut self.state.failback {
                    failback.heads = heads?;
                }
                if self.state.plan.lease.is_none() {
                    return Ok(None);
                }
                self.hands.give_back(&self.state.plan)?;
                Ok(Some("its lease is granted again when it asks".into()))
            }
            BackStep::Restart => {
                // From here on it may serve.
                self.state.fenced = None;
                self.hands.keep(&self.state)?;
                self.hands.restart_target(&self.failback()?.restore)?;
                Ok(Some(format!("{} was told to restart", self.failback()?.target)))
            }
            BackStep::HostUp => self.host_up(),
            BackStep::HostChecks => match &self.state.plan.hooks.check_host {
                Some(words) => run_hook(words, &self.state, self.state.plan.hooks.hook_seconds_max).map(Some),
                None => Ok(None),
            },
        }
    }

    fn look_at_target(&mut self) -> Result<String, Stop> {
        let disks = self.hands.ship(&self.state, self.failback()?)?;
        let list: Vec<String> = disks.iter().map(|d| format!("{} to {}", d.volume, d.path)).collect();
        if let Some(failback) = &mut self.state.failback {
            failback.disks = disks;
        }
        Ok(list.join(", "))
    }

    /// Somebody wants something else.
    fn go_on(&self) -> Result<(), Stop> {
        let wanted = self.hands.wanted() != Wanted::GoOn || self.hands.is_asked();
        if wanted { Err(Stop::Wanted) } else { Ok(()) }
    }

    fn copy(&mut self) -> Result<String, Stop> {
        loop {
            match self.hands.shipping(&self.failback()?.restore)? {
                Shipping::Following { pass, behind_bytes } if behind_bytes <= LITTLE_BYTES || pass >= PASSES_MAX => {
                    return Ok(format!("after {pass} passes {} KiB are left", behind_bytes / 1024));
                }
                // What the machine wrote since would be missing.
                Shipping::Done { .. } | Shipping::Finishing => {
                    let text = "the restore that ships it was finished while the machine served";
                    return Err(failed(text, "begin the failback again"));
                }
                Shipping::Failed { text, remedy } => return Err(failed(text, remedy)),
                // A machine that has ended meanwhile is started again after this: here it makes the pause shorter.
                Shipping::Copying | Shipping::Following { .. } | Shipping::Waiting { .. } => {}
            }
            self.go_on()?;
            thread::sleep(LOOK_EVERY);
        }
    }

    fn last_difference(&mut self) -> Result<String, Stop> {
        let restore = self.failback()?.restore.clone();
        self.hands.ship_last(&restore)?;
        loop {
            match self.hands.shipping(&restore)? {
                Shipping::Done { shipped_bytes, same_bytes } => {
                    return Ok(format!(
                        "{} MiB were sent, {} MiB were the same already; all compared",
                        shipped_bytes >> 20,
                        same_bytes >> 20
                    ));
                }
                Shipping::Failed { text, remedy } => return Err(failed(text, remedy)),
                _ => {}
            }
            self.go_on()?;
            thread::sleep(LOOK_EVERY);
        }
    }

    fn host_up(&mut self) -> Result<Option<String>, Stop> {
        if let Subject::Groups(_) = self.state.plan.subject {
            return Ok(None);
        }
        let limit = Duration::from_secs(self.failback()?.commit_minutes * 60);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(seen) = self.hands.seen_alive(&self.state.plan.subject) {
                return Ok(Some(seen));
            }
            self.go_on()?;
            if Instant::now() >= deadline {
                let text = format!("its agent was not heard within {} min", limit.as_secs() / 60);
                return Err(failed(text, "look at the host's own console"));
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Before the host has restarted: the machine serves again, if it does not still.
    fn undo(&mut self, why: String) -> Result<(), HandsError> {
        let restore = self.state.failback.as_ref().map(|f| f.restore.clone()).unwrap_or_default();
        self.hands.cancel_shipping(&restore)?;
        // The standby needs its disks back.
        if let Some(collects) = self.state.collects.take() {
            self.hands.cancel_shipping(&collects)?;
        }
        let begun = |step| self.state.failback.iter().flat_map(|f| &f.steps).any(|s| s.step == step);
        let (paused, given) = (begun(BackStep::Pause), begun(BackStep::Own));
        // A standby that is just being stopped has stopped before it is given the host anew.
        if paused && !given && self.at_standby() && self.take_from_standby()?.is_none() {
            return Ok(());
        }
        if given {
            // It may be the host's: taken from it anew.
            self.state.fenced = None;
            self.state.steps.retain(|s| s.step != Step::Fence);
        }
        self.state.now = None;
        if let Some(failback) = &mut self.state.failback {
            failback.ended = Some(BackEnd::RolledBack { why });
        }
        // Elsewhere it may still run, as long as its disks were not closed.
        let still = *self.state.place() == Place::Export && !self.state.sealed;
        if paused && !still {
            self.make_anew();
        } else {
            self.state.phase = Phase::Serving;
        }
        self.hands.keep(&self.state)
    }

    /// The machine serves again, with what it had written when it was paused. What the host has written since stays in its own history.
    pub(super) fn roll_back(&mut self, why: String, source_is_off: Option<String>) -> Result<(), HandsError> {
        let restarted = self.state.failback.iter().flat_map(|f| &f.steps).any(|s| s.step == BackStep::Restart);
        if restarted {
            // As in any takeover, the host must be known to be off, now.
            self.state.source_is_off = source_is_off;
        }
        self.undo(why)
    }

    /// A rollback that could not make sure that the host is off leaves all as it was. Not kept yet.
    pub(super) fn stays_returned(&mut self) -> bool {
        let why = self.state.failure().map(|(_, text, remedy)| format!("not rolled back: {text}; {remedy}"));
        let Some(failback) = &mut self.state.failback else { return false };
        let returned = failback.steps.iter().any(|s| s.step == BackStep::Restart)
            && matches!(failback.ended, Some(BackEnd::RolledBack { .. }));
        if returned {
            failback.ended = None;
            failback.note = why;
            self.state.phase = Phase::Returned { until_us: None };
        }
        returned
    }

    pub(super) fn commit(&mut self, by: String) -> Result<(), HandsError> {
        if let Some(failback) = &mut self.state.failback {
            failback.ended = Some(BackEnd::Committed { by });
        }
        self.state.phase = Phase::Committed;
        self.hands.keep(&self.state)
    }

    pub(super) fn look_at_return(&mut self, until_us: Option<u64>) -> Result<(), HandsError> {
        if until_us.is_none_or(|until| self.hands.now_us() < until) {
            return Ok(());
        }
        // Silence proves something only of a host that was heard on its new disks, and so has this plan and its lease.
        let leased =
            self.state.is_back(BackStep::HostUp) && matches!(self.hands.lease_fences(&self.state.plan), Some(Ok(())));
        if leased || self.state.plan.hooks.fence.is_some() {
            return self.roll_back("nobody was content in time".into(), None);
        }
        self.note(
            "nobody was content in time, and nothing can prove the host off: commit it, or shut it down and roll back with --source-is-off"
                .into(),
        );
        self.state.phase = Phase::Returned { until_us: None };
        self.hands.keep(&self.state)
    }

    /// The machine's disks go when the host's own history holds what they hold.
    pub(super) fn look_at_history(&mut self) -> Result<(), HandsError> {
        for point in self.state.points.clone() {
            let head = self.state.failback.iter().flat_map(|f| &f.heads).find(|(group, _)| *group == point.group);
            // Without it nothing could be proved: nothing is deleted.
            let after = head.map_or(u64::MAX, |(_, lsn)| *lsn);
            if let Some(why) = self.hands.not_whole(point.group, after)? {
                let note = clipped(&format!("what the machine wrote is kept: {}: {why}", point.group_name));
                if self.state.failback.as_ref().is_some_and(|f| f.note.as_ref() != Some(&note)) {
                    self.note(note);
                    self.hands.keep(&self.state)?;
                }
                return Ok(());
            }
        }
        self.note("the host's own history holds everything".into());
        self.state.phase = Phase::Ending { how: Ended::FailedBack };
        self.hands.keep(&self.state)
    }
}
