//! Sync mode: which flushes of the host wait for the box, and for how long.
//!
//! ```text
//!            mode sync            caught up after the first copy
//!   Async ─────────────▶ NotYet ───────────────────────────────▶ Sync ──┐ bound passed, policy "hold":
//!     ▲                                  caught up again ▲        │ ◀───┘ alarm, they go on waiting
//!     └── mode async, from anywhere                      │        ▼ bound passed, policy "degrade": alarm, all released
//!                                                        └── Degraded
//! ```
//!
//! A flush waits for the number `need`: everything handed in before it was numbered at or below. In a gap some of that is only
//! marked as dirty, so `need` is unknown until the gap's `Consistent` has a number.

use super::event::{Action, Alarm, GateState};
use model::{Bound, MonoTime, SourceSeq, SyncMode};
use std::collections::VecDeque;

/// Alarms of a held host are repeated this often.
const HOLDING_ALARM_MS: u64 = 60_000;

#[derive(Debug)]
struct Waiting {
    id: u64,
    need: SourceSeq,
    since: MonoTime,
}

#[derive(Debug)]
pub(super) struct Gate {
    mode: SyncMode,
    state: GateState,
    /// Ascending in `need`. As many as the host has requests outstanding: its own queue depth is the bound.
    waiting: VecDeque<Waiting>,
    alarmed: Option<MonoTime>,
}

impl Gate {
    pub(super) fn new(mode: SyncMode, synced_once: bool, now: MonoTime) -> Self {
        let state = match mode {
            SyncMode::Async => GateState::Async,
            SyncMode::Sync { .. } if !synced_once => GateState::NotYet,
            // What was promised before a restart is promised after it.
            SyncMode::Sync { at_bound: Bound::Hold, .. } => GateState::Sync,
            SyncMode::Sync { at_bound: Bound::Degrade, .. } => GateState::Degraded { since: now },
        };
        Self { mode, state, waiting: VecDeque::new(), alarmed: None }
    }
    pub(super) fn state(&self) -> GateState {
        self.state
    }
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }
    pub(super) fn mode(&mut self, mode: SyncMode, synced_once: bool, now: MonoTime, out: &mut Vec<Action>) {
        let was = self.state;
        self.mode = mode;
        match (mode, was) {
            (SyncMode::Async, _) => self.state = GateState::Async,
            (SyncMode::Sync { .. }, GateState::Async) if synced_once => self.state = GateState::Degraded { since: now },
            (SyncMode::Sync { .. }, GateState::Async) => self.state = GateState::NotYet,
            // Only the bound changed.
            (SyncMode::Sync { .. }, _) => {}
        }
        // The state first: who watches must not see a flush pass a gate that is still called closed.
        if self.state != was {
            out.push(Action::Gate(self.state));
        }
        if self.state == GateState::Async {
            self.release_all(out);
        }
    }
    /// `need`: what must be durable for this flush; [`SourceSeq::MAX`] while that is unknown.
    pub(super) fn wait(&mut self, id: u64, need: SourceSeq, durable: SourceSeq, now: MonoTime, out: &mut Vec<Action>) {
        match self.state {
            GateState::Sync if need > durable => self.waiting.push_back(Waiting { id, need, since: now }),
            GateState::Sync => out.push(Action::ReleaseFlush { id, durable: true }),
            GateState::Async | GateState::NotYet | GateState::Degraded { .. } => {
                out.push(Action::ReleaseFlush { id, durable: false })
            }
        }
    }
    pub(super) fn durable(&mut self, durable: SourceSeq, out: &mut Vec<Action>) {
        while let Some(front) = self.waiting.front()
            && front.need <= durable
        {
            out.push(Action::ReleaseFlush { id: front.id, durable: true });
            self.waiting.pop_front();
            self.alarmed = None;
        }
    }
    /// The gap ended with this number: who waited for an unknown one waits for it.
    pub(super) fn consistent(&mut self, seq: SourceSeq) {
        self.waiting.iter_mut().filter(|w| w.need == SourceSeq::MAX).for_each(|w| w.need = seq);
    }
    /// Numbers from here on were taken back: what they stood for is dirty now.
    pub(super) fn taken_back(&mut self, from: SourceSeq) {
        self.waiting.iter_mut().filter(|w| w.need >= from).for_each(|w| w.need = SourceSeq::MAX);
    }
    /// Everything the host wrote is on the box or on its way there, and recently so (`lag_ms`).
    pub(super) fn caught_up(&mut self, lag_ms: u64, out: &mut Vec<Action>) {
        let SyncMode::Sync { wait_ms_max, .. } = self.mode else { return };
        if matches!(self.state, GateState::NotYet | GateState::Degraded { .. }) && lag_ms <= wait_ms_max / 4 {
            self.state = GateState::Sync;
            out.push(Action::Gate(self.state));
        }
    }
    /// Whether [`Gate::caught_up`] has anything to decide.
    pub(super) fn wants_to_catch_up(&self) -> bool {
        matches!(self.state, GateState::NotYet | GateState::Degraded { .. })
    }
    pub(super) fn tick(&mut self, now: MonoTime, out: &mut Vec<Action>) {
        let (GateState::Sync, SyncMode::Sync { wait_ms_max, at_bound }) = (self.state, self.mode) else { return };
        let Some(front) = self.waiting.front() else { return };
        let waited_ms = now.ms_since(front.since);
        if waited_ms < wait_ms_max {
            return;
        }
        match at_bound {
            Bound::Degrade => {
                self.state = GateState::Degraded { since: now };
                out.push(Action::Alarm(Alarm::Degraded { waited_ms }));
                out.push(Action::Gate(self.state));
                self.release_all(out);
            }
            Bound::Hold => {
                if self.alarmed.is_none_or(|at| now.ms_since(at) >= HOLDING_ALARM_MS) {
                    self.alarmed = Some(now);
                    out.push(Action::Alarm(Alarm::Holding { waited_ms }));
                }
            }
        }
    }
    fn release_all(&mut self, out: &mut Vec<Action>) {
        out.extend(self.waiting.drain(..).map(|w| Action::ReleaseFlush { id: w.id, durable: false }));
        self.alarmed = None;
    }
}
