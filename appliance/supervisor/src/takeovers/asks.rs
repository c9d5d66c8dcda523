//! What is asked of a run that does not work: again, promote, failback, commit, roll back. Refused here by name where it has no sense.

use super::{Arc, Run, RunFault, Takeovers, one_at_most};
use crate::{App, pki};
use data_encoding::HEXLOWER;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use takeover::{
    plan::Place,
    run::Asked,
    state::{BackStep, Kind, Outcome, Phase, RunState, Step},
};

/// For the run's thread to take what was asked.
const TAKEN_MAX: Duration = Duration::from_secs(10);

impl Takeovers {
    /// Eight hexadecimal digits that nothing has yet.
    pub fn fresh_id(&self) -> Result<String, RunFault> {
        Ok(HEXLOWER.encode(&pki::random_128().ok_or(RunFault::Random)?[..4]))
    }

    /// Hands over what is asked; the run's state when its thread has taken it. Blocking.
    pub fn ask(&self, app: &Arc<App>, id: &str, asked: Asked) -> Result<Arc<RunState>, RunFault> {
        let run = self.get(id)?;
        {
            // Under the lock that a takeover begins under: of two that want to be the host's only one, one comes too late.
            let runs = crate::lock(&self.runs);
            self.may(app, &run, &asked, &runs)?;
            let mut waiting = crate::lock(&run.asked);
            if waiting.is_some() {
                let why = "something else was just asked".to_owned();
                return Err(RunFault::NotNow { what: "it is not done", why });
            }
            *waiting = Some(asked);
        }
        self.launch(app, &run)?;
        self.wait_until_taken(app, &run)?;
        Ok(run.state())
    }

    fn wait_until_taken(&self, app: &Arc<App>, run: &Arc<Run>) -> Result<(), RunFault> {
        let deadline = Instant::now() + TAKEN_MAX;
        while crate::lock(&run.asked).is_some() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            // A thread that was at its end when it was asked has not seen it.
            self.launch(app, run)?;
        }
        Ok(())
    }

    fn may(&self, app: &App, run: &Arc<Run>, asked: &Asked, runs: &BTreeMap<String, Arc<Run>>) -> Result<(), RunFault> {
        let state: &RunState = &run.state();
        let refuse = |what, why: &str| Err(RunFault::NotNow { what, why: why.to_owned() });
        let rests = matches!(state.phase, Phase::Serving | Phase::Failed { .. });
        match asked {
            _ if state.is_over() => Err(RunFault::Over),
            Asked::Again { .. } if !rests => refuse("it is not tried again", "the run works"),
            Asked::Promote { .. } if state.kind == Kind::Failover => {
                refuse("it is not promoted", "it is a takeover already")
            }
            Asked::Promote { .. } if matches!(state.place, Place::Standby(_)) => refuse(
                "it is not promoted",
                "its plan's place is a standby, which has disks of its own: take it over instead",
            ),
            Asked::Promote { .. } if !rests => refuse("it is not promoted", "the drill works; hold it with --hold"),
            Asked::Promote { source_is_off } => {
                one_at_most(app, runs, state)?;
                // A lease that it has got since would fence nothing here.
                if self.plan(&state.plan_name).ok().as_ref() != Some(&state.plan) {
                    return refuse(
                        "it is not promoted",
                        "its plan was changed since the drill began: end it and drill again",
                    );
                }
                self.proof(state, source_is_off.as_deref())
            }
            Asked::Failback(_) if state.kind == Kind::Drill => refuse("it does not fail back", "a drill serves nobody"),
            Asked::Failback(_) if state.phase != Phase::Serving => {
                refuse("it does not fail back", "only what serves can go back to its host")
            }
            Asked::Serves { .. } => {
                let waits = state.step(Step::Boot).is_some_and(|s| s.outcome == Outcome::Running);
                match *state.place() == Place::Export && state.phase == Phase::Working && waits {
                    true => Ok(()),
                    false => {
                        refuse("it is not taken down", "the run does not wait for a machine at another hypervisor")
                    }
                }
            }
            Asked::Stopped { .. } => {
                let steps = state.failback.iter().flat_map(|f| &f.steps);
                let waits = steps.filter(|s| s.step == BackStep::Pause).any(|s| s.outcome == Outcome::Running);
                let back = state.phase == Phase::FailingBack && waits;
                match *state.place() == Place::Export && back {
                    true => Ok(()),
                    false => refuse(
                        "it is not taken down",
                        "no failback waits for a machine at another hypervisor to be off",
                    ),
                }
            }
            Asked::Commit { .. } if !matches!(state.phase, Phase::Returned { .. }) => {
                refuse("nothing is committed", "no host has returned")
            }
            Asked::RollBack { .. } if !matches!(state.phase, Phase::FailingBack | Phase::Returned { .. }) => {
                refuse("nothing is rolled back", "no failback goes on")
            }
            Asked::RollBack { source_is_off, .. } => {
                let restarted = state.failback.iter().flat_map(|f| &f.steps).any(|step| step.step == BackStep::Restart);
                if restarted { self.proof(state, source_is_off.as_deref()) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    /// That the host can be known to be off.
    fn proof(&self, state: &RunState, source_is_off: Option<&str>) -> Result<(), RunFault> {
        // Whether the lease does is known when the run asks it; of a host that was not heard since its disks were overwritten it does not.
        let restarted = state.failback.iter().flat_map(|f| &f.steps).any(|step| step.step == BackStep::Restart);
        let leased = state.plan.lease.is_some() && (!restarted || state.is_back(BackStep::HostUp));
        if state.plan.hooks.fence.is_some() || leased || source_is_off.is_some() {
            return Ok(());
        }
        let what = "nothing shows that the host is off, and two that serve at once destroy each other's work";
        Err(RunFault::NotNow {
            what,
            why: "shut it down and say so with --source-is-off, or give the plan a fence hook".into(),
        })
    }
}
