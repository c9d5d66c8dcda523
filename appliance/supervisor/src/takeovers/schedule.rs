//! Drills on a schedule: a plan says how often, and one at a time is begun when it is due.

use super::{Arc, END, Ordering, Run, Takeovers, Wish};
use crate::{App, events::Event};
use std::{
    fs,
    time::{Duration, Instant, UNIX_EPOCH},
};
use takeover::state::{Kind, RunState};

const HOUR_US: u64 = 3_600_000_000;
/// A drill that could not be begun is tried again after this.
const AGAIN_US: u64 = 600_000_000;
/// For a drill that gives way to end.
const GIVE_WAY_MAX: Duration = Duration::from_secs(30);

impl Takeovers {
    /// Begins the drill that is due longest, unless one goes on. Blocking, shortly.
    pub fn drill_what_is_due(&self, app: &Arc<App>) {
        let runs = self.list();
        if runs.iter().any(|s| !s.is_over()) {
            // A drill takes memory and processors that a takeover may need.
            return;
        }
        let now_us = app.clock.wall_us();
        let plans = self.drilled_plans();
        let due = plans.into_iter().map(|(name, hours)| (self.last_drill_us(&name, &runs) + hours * HOUR_US, name));
        let Some((_, plan)) = due.filter(|(at, _)| *at <= now_us).min() else { return };
        let tried = crate::lock(&self.tried_us).insert(plan.clone(), now_us);
        if let Some(before) = tried.filter(|before| now_us.saturating_sub(*before) < AGAIN_US) {
            crate::lock(&self.tried_us).insert(plan, before);
            return;
        }
        let wish = Wish {
            plan: plan.clone(),
            kind: Kind::Drill,
            at: None,
            source_is_off: None,
            hold: false,
            planned: false,
            to: None,
            decision: None,
            detection_ms: None,
        };
        if let Err(e) = self.begin(app, wish) {
            app.events.note(
                Event::TakeoverFailed,
                &plan,
                format!("its drill is due and was not begun: {}", crate::chain(&e)),
            );
        }
    }

    /// When the plan was drilled last, by whom ever; never: when it was written.
    fn last_drill_us(&self, name: &str, runs: &[Arc<RunState>]) -> u64 {
        let drilled = runs.iter().filter(|s| s.plan_name == name && s.kind == Kind::Drill).map(|s| s.begun_us).max();
        drilled.unwrap_or_else(|| {
            let written = fs::metadata(self.plans.join(format!("{name}.toml"))).and_then(|meta| meta.modified());
            let since = written.ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            since.map_or(u64::MAX / 2, |since| since.as_micros() as u64)
        })
    }

    /// Drills that nobody looks at end when a takeover begins: it may need what they have.
    pub(super) fn drills_give_way(&self, app: &Arc<App>) {
        for run in self.giving_way() {
            run.wanted.store(END, Ordering::Release);
            if let Err(e) = self.launch(app, &run) {
                app.events.note(Event::TakeoverFailed, &run.state().plan_name, crate::chain(&e));
            }
        }
    }
    /// Waits for those that were told to, for a while.
    pub(super) fn wait_for_way(&self) {
        let deadline = Instant::now() + GIVE_WAY_MAX;
        let ending = || self.giving_way().iter().any(|run| run.wanted.load(Ordering::Acquire) == END);
        while ending() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    fn giving_way(&self) -> Vec<Arc<Run>> {
        let drill = |state: &RunState| state.kind == Kind::Drill && !state.hold && !state.is_over();
        crate::lock(&self.runs).values().filter(|run| drill(&run.state())).cloned().collect()
    }
}
