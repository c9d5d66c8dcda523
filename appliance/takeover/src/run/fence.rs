//! The step that makes sure that the host does not serve any more: by its lease, by the plan's hook, or by somebody's word.

use super::{Driver, HandsError, LeaseWait, Stop, Wanted, failed};
use crate::{plan::Plan, state::Fenced};
use std::{thread, time::Duration};

/// Between two looks at a lease that runs out.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// For the word of a host whose silence proves nothing.
const WORD_MAX: Duration = Duration::from_secs(60);

impl<H: super::Hands> Driver<'_, H> {
    /// A migration needs a host that lives, and can be told to stop.
    pub(super) fn check_source(&self) -> Result<(), Stop> {
        let plan = &self.state.plan;
        match self.hands.lease_fences(plan) {
            Some(Ok(())) => {}
            Some(Err(why)) => {
                let remedy = "wait until its agent has it: `holdfast plan status`";
                return Err(failed(format!("the host cannot be told to stop: {why}"), remedy));
            }
            None => {
                let remedy = "give the plan a [lease] with what the agent is to stop; without an agent, shut it down and take it over";
                return Err(failed("the host cannot be told to stop: its plan has no [lease]", remedy));
            }
        }
        if self.hands.seen_alive(&plan.subject).is_none() {
            let remedy = "`holdfast takeover` goes on without it";
            return Err(failed("the host is not there: a migration loses nothing only while it lives", remedy));
        }
        Ok(())
    }

    /// What shows that the host is off, or will; an error when nothing would.
    pub(super) fn check_fence(&self) -> Result<(), Stop> {
        let plan = &self.state.plan;
        let lease = self.hands.lease_fences(plan);
        if matches!(lease, Some(Ok(()))) {
            return Ok(());
        }
        let no_lease = match &lease {
            Some(Err(why)) => format!("its lease does not fence it ({why}), and "),
            _ => String::new(),
        };
        if plan.hooks.fence.is_none() && self.state.source_is_off.is_none() {
            let text = format!(
                "{no_lease}nothing shows that the host is off: two that serve at once destroy each other's work"
            );
            let remedy = "give the plan a fence hook or a [lease], or say so yourself with --source-is-off";
            return Err(failed(text, remedy));
        }
        if let (Some(seen), None) = (self.hands.seen_alive(&plan.subject), &plan.hooks.fence) {
            let remedy = "shut the host down first, or give the plan a fence hook";
            return Err(failed(format!("the host is said to be off, but {seen}"), remedy));
        }
        Ok(())
    }

    pub(super) fn fence(&mut self) -> Result<String, Stop> {
        match self.hands.lease_fences(&self.state.plan) {
            Some(ready) => self.fence_leased(ready.is_ok()),
            None => self.fence_without_lease(),
        }
    }

    fn fence_without_lease(&mut self) -> Result<String, Stop> {
        let (fenced, text) = match self.hook(|plan| plan.hooks.fence.clone())? {
            Some(output) => (Fenced::Hook { output: output.clone() }, format!("the fence hook says so: {output}")),
            None => {
                let who = self.state.source_is_off.clone();
                let remedy = "shut it down and say so with --source-is-off, or give the plan a fence hook";
                let who = who.ok_or_else(|| failed("nothing shows that the host is off", remedy))?;
                // The word may be older than what is seen.
                if let Some(seen) = self.hands.seen_alive(&self.state.plan.subject) {
                    return Err(failed(format!("the host is said to be off, but {seen}"), "shut the host down first"));
                }
                (Fenced::Word { who: who.clone() }, format!("{who} says so"))
            }
        };
        self.state.fenced = Some(fenced);
        Ok(text)
    }

    /// Nothing is granted any more from the first line on, whatever shows then that the host is off: the sooner of its own word, its
    /// lease's end, the hook and somebody's word.
    fn fence_leased(&mut self, expires: bool) -> Result<String, Stop> {
        let plan = self.state.plan.clone();
        let mut wait = self.hands.take(&plan)?;
        let mut hook_failed = String::new();
        // A host that is to stop in its own way must not have its power cut.
        if matches!(wait, LeaseWait::Waits { .. }) && !self.state.planned {
            let alive = self.hands.seen_alive(&plan.subject);
            let sworn = match self.hook(|plan| plan.hooks.fence.clone()) {
                Ok(Some(output)) => {
                    Some((Fenced::Hook { output: output.clone() }, format!("the fence hook says so: {output}")))
                }
                Ok(None) => None,
                Err(Stop::Failed { text, remedy }) if !expires => return self.let_go(&plan, text, remedy),
                Err(Stop::Failed { text, .. }) => {
                    hook_failed = format!("; {text}");
                    None
                }
                Err(stop) => return Err(stop),
            };
            // A word against what is seen is not believed; the lease needs none.
            let word = self.state.source_is_off.clone().filter(|_| alive.is_none());
            let sworn = sworn.or_else(|| word.map(|who| (Fenced::Word { who: who.clone() }, format!("{who} says so"))));
            if let Some((fenced, text)) = sworn {
                self.hands.fenced_by_power(&plan)?;
                self.state.fenced = Some(fenced);
                return Ok(text);
            }
        }
        let begun_us = self.hands.now_us();
        loop {
            match wait {
                LeaseWait::Done { released: false, how, .. } if self.state.planned => {
                    let text = format!(
                        "the host did not give its services up by its own word ({how}): what it wrote last may not be here"
                    );
                    let remedy = "see what became of it; `holdfast takeover` goes on without it";
                    return self.let_go(&plan, text, remedy.into());
                }
                LeaseWait::Done { term, how, released } => {
                    if released && let Err(why) = self.hands.drain(&plan) {
                        let remedy = "see why with `holdfast status`, or shut the host down and try again";
                        return self.let_go(&plan, why.text, remedy.into());
                    }
                    self.state.now = None;
                    self.state.fenced = Some(Fenced::Lease { term, how: how.clone() });
                    return Ok(format!("{how}, term {term}{hook_failed}"));
                }
                LeaseWait::Waits { ms } => self.say_waiting(ms)?,
            }
            if self.hands.wanted() != Wanted::GoOn {
                return Err(Stop::Wanted);
            }
            let waited_us = self.hands.now_us().saturating_sub(begun_us);
            if matches!(wait, LeaseWait::Waits { ms: None }) && waited_us > WORD_MAX.as_micros() as u64 {
                let text =
                    format!("the host has not said within {} s that it has stopped{hook_failed}", WORD_MAX.as_secs());
                return self.let_go(&plan, text, "shut it down, and say so with --source-is-off".into());
            }
            thread::sleep(LOOK_EVERY);
            wait = self.hands.take(&plan)?;
        }
    }

    fn say_waiting(&mut self, ms: Option<u64>) -> Result<(), HandsError> {
        if self.state.now.is_some() {
            return Ok(());
        }
        let until = ms.map_or_else(String::new, |ms| {
            format!(", or until its lease has run out, at most {:.1} s", ms as f64 / 1000.0)
        });
        self.state.now =
            Some(format!("nothing is granted to it any more; waits until it says that it has stopped{until}"));
        self.hands.keep(&self.state)
    }

    /// The host keeps what it has.
    fn let_go(&mut self, plan: &Plan, text: String, remedy: String) -> Result<String, Stop> {
        self.state.now = None;
        // It serves again: what somebody said of it is of the past.
        self.state.source_is_off = None;
        self.hands.give_back(plan)?;
        Err(failed(text, remedy))
    }
}
