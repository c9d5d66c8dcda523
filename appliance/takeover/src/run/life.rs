//! What becomes of a run after its steps: the machine watched and started again, tried again by hand, a drill made a takeover.

use super::{Asked, Driver, Hands, HandsError, failed, words};
use crate::{
    machine::{DRILL, Machine},
    plan::Place,
    state::{Fenced, Kind, Measured, Outcome, Phase, Step, StepState},
};

/// Restarts are counted over this.
const RESTARTS_WITHIN_US: u64 = 3_600_000_000;

/// How a machine was found.
enum Found {
    Runs,
    /// It was shut down from inside.
    ShutDown,
    /// A disk had no room or failed; it stands still, and nothing is lost.
    StandsStill,
    Gone,
    /// It could not be asked: looked at again.
    Unknown,
}

impl<H: Hands> Driver<'_, H> {
    pub(super) fn look_after(&mut self) -> Result<(), HandsError> {
        match self.state.phase {
            // What runs at another hypervisor only people see.
            Phase::Serving if *self.state.place() == Place::Export => Ok(()),
            Phase::Serving if self.at_standby() => self.look_at_standby(),
            Phase::Serving => self.look_at_machine(),
            Phase::Returned { until_us } => self.look_at_return(until_us),
            Phase::Committed => self.look_at_history(),
            _ => Ok(()),
        }
    }

    pub(super) fn answer(&mut self, asked: Asked) -> Result<(), HandsError> {
        match (asked, &self.state.phase) {
            (Asked::Again { source_is_off }, Phase::Failed { .. } | Phase::Serving) => self.again(source_is_off),
            (Asked::Promote { source_is_off }, Phase::Failed { .. } | Phase::Serving)
                if self.state.kind == Kind::Drill =>
            {
                self.promote(source_is_off)
            }
            (Asked::Failback(wish), Phase::Serving) if self.state.kind == Kind::Failover => self.begin_failback(wish),
            (Asked::Commit { by }, Phase::Returned { .. }) => self.commit(by),
            (Asked::RollBack { by, source_is_off }, Phase::Returned { .. }) => {
                self.roll_back(format!("{by} said so"), source_is_off)
            }
            // What was asked had its sense when it was asked; the run has gone on since.
            _ => Ok(()),
        }
    }

    fn found(&mut self) -> Found {
        let of = |status: &str| match status {
            "shutdown" | "guest-panicked" => Found::ShutDown,
            "io-error" => Found::StandsStill,
            _ => Found::Runs,
        };
        // Its control socket answers one at a time.
        if let Some(machine) = &mut self.machine {
            if let Ok(status) = machine.status() {
                return of(&status);
            }
            self.machine = None;
        }
        let Some(spec) = &self.state.machine else { return Found::Unknown };
        match Machine::adopt(spec) {
            Ok(None) => Found::Gone,
            Err(_) => Found::Unknown,
            Ok(Some(mut machine)) => machine.status().map_or(Found::Unknown, |status| of(&status)),
        }
    }

    /// Whether the machine still runs: one that has ended by itself, or with its box, serves nobody.
    fn look_at_machine(&mut self) -> Result<(), HandsError> {
        let (text, remedy) = match self.found() {
            Found::Runs | Found::Unknown => return Ok(()),
            Found::ShutDown => (
                "the machine was shut down from inside".to_owned(),
                "start it again with `holdfast run again`, or end the run".to_owned(),
            ),
            Found::StandsStill => (
                "the machine stands still: one of its disks had no room or failed; nothing it was told is written is lost".to_owned(),
                "make room on the box, then `holdfast run again` lets it go on".to_owned(),
            ),
            Found::Gone => {
                let now_us = self.hands.now_us();
                self.state.restarts_us.retain(|at| now_us.saturating_sub(*at) < RESTARTS_WITHIN_US);
                let most = self.state.plan.machine.restarts_max as usize;
                if let Some(Fenced::Word { .. }) = &self.state.fenced
                    && self.state.fenced_boot.as_ref() != Some(&self.hands.boot_id())
                {
                    let text = "the machine ended with the box, and nobody knows whether the host has been off since";
                    let remedy = "make sure that it is, then `holdfast run again --source-is-off`; or end this run";
                    return self.fail_at(Step::Start, text.into(), remedy.into());
                }
                // A drill shows what happens; one that ends has shown it.
                if self.state.kind == Kind::Failover && self.state.restarts_us.len() < most {
                    self.state.restarts_us.push(now_us);
                    self.make_anew();
                    return self.hands.keep(&self.state);
                }
                (
                    format!("the machine has ended by itself, {} times within the hour", self.state.restarts_us.len() + 1),
                    "what it was told is written is there: look at qemu.log in the run's folder, then `holdfast run again`"
                        .to_owned(),
                )
            }
        };
        self.fail_at(Step::Start, text, remedy)
    }

    pub(super) fn fail_at(&mut self, step: Step, text: String, remedy: String) -> Result<(), HandsError> {
        if let Some(entry) = self.state.steps.iter_mut().find(|s| s.step == step) {
            entry.outcome = Outcome::Failed { text, remedy };
        }
        self.state.phase = Phase::Failed { step };
        self.hands.keep(&self.state)
    }

    /// The machine's steps once more, on the same disks. Not kept yet.
    pub(super) fn make_anew(&mut self) {
        self.machine = None;
        self.state.started = false;
        self.state.applications.clear();
        self.state.volumes.clear();
        self.state.steps.retain(|s| s.step < Step::Machine && s.is_done());
        // A hook can prove it once more, and at no cost.
        if self.state.plan.lease.is_none() && self.state.plan.hooks.fence.is_some() {
            self.state.steps.retain(|s| s.step != Step::Fence);
        }
        self.state.phase = Phase::Working;
    }

    fn again(&mut self, source_is_off: Option<String>) -> Result<(), HandsError> {
        if self.at_standby() {
            // While it owns the host nobody else does.
            if self.hands.standby_serves(&self.state.plan)?.is_none() {
                self.state.source_is_off = source_is_off;
                self.state.steps.retain(|s| s.step != Step::Fence);
            }
            self.make_anew();
            return self.hands.keep(&self.state);
        }
        let found = self.found();
        let runs = matches!(found, Found::StandsStill | Found::Runs | Found::Unknown) && self.state.started;
        if !runs && self.state.kind == Kind::Failover {
            // Time has passed: the host must be known to be off now.
            self.state.source_is_off = source_is_off;
            self.state.steps.retain(|s| s.step != Step::Fence);
        }
        match found {
            Found::ShutDown => {
                self.take_down(false)?;
                self.make_anew();
            }
            Found::Gone => self.make_anew(),
            Found::StandsStill | Found::Runs | Found::Unknown => {
                if matches!(found, Found::StandsStill) {
                    let on = self.machine().and_then(|machine| Ok(machine.go_on()?));
                    on.map_err(|_| {
                        HandsError::new("the machine does not go on", "look at qemu.log in the run's folder")
                    })?;
                }
                self.state.steps.retain(StepState::is_done);
                self.state.phase = Phase::Working;
            }
        }
        self.hands.keep(&self.state)
    }

    /// The drill's machine runs on until the host is known to be off; then one takes its place that has a way out.
    fn promote(&mut self, source_is_off: Option<String>) -> Result<(), HandsError> {
        let now_us = self.hands.now_us();
        let oldest = self.state.points.iter().map(|p| p.time_us).min().unwrap_or(now_us);
        self.state.kind = Kind::Failover;
        self.state.source_is_off = source_is_off;
        self.state.hold = false;
        // The decision is this one; times count from here.
        self.state.begun_us = now_us;
        self.state.measured =
            Measured { point_age_ms: Some(now_us.saturating_sub(oldest) / 1000), ..Measured::default() };
        self.state.steps.retain(|s| matches!(s.step, Step::Point | Step::Branch) && s.is_done());
        self.state.phase = Phase::Working;
        self.hands.keep(&self.state)
    }

    /// Takes the machine of the drill this takeover was down: its cards lead nowhere.
    pub(super) fn leave_the_drill(&mut self) -> Result<(), super::Stop> {
        let of_drill = self.state.machine.as_ref().is_some_and(|spec| spec.marker == DRILL);
        if self.state.kind == Kind::Drill || !of_drill {
            return Ok(());
        }
        self.take_down(true).map_err(|e| failed(words(&e), e.remedy))?;
        self.state.machine = None;
        self.state.started = false;
        self.state.applications.clear();
        self.state.volumes.clear();
        self.hands.keep(&self.state)?;
        Ok(())
    }
}
