//! Sparing the host: while a group's writes are only marked anyway, the kernel half does not copy them either.
//!
//! ```text
//!            pressure asks for marks only           every group on the disk is in its gap
//!   sent  ───────────────────────────────▶ marked ────────────────────────────────────────▶ marked by the kernel half
//!    ▲                                                                                         │ pressure has gone
//!    │  the machine hears of the pressure      what was marked is handed in                    ▼
//!    └──────────────── copying ◀──────────────────────────────────────────────── captured again, still in the gap
//! ```
//!
//! That leaves of our cost in the host's writes a mark or two for each, and nothing of it in this process: no copy into the ring, nothing to take out.
//!
//! **The gap is there first and ends last.** Marks come out of order ([`Capture::set_mode`](crate::capture::Capture::set_mode)), so a disk is switched
//! over only once every group on it is in a gap that only pressure holds open, and the machine hears of less pressure only once the disk is captured
//! again and all marks are handed in. An agent that died in between left the mode in the kernel: the next one switches it back before anything else is
//! handed in, and hands in the marks first.

use super::{Engine, EngineError, Event, group::Running};
use crate::capture::{Mode, Position, TargetId};
use replication::Pressure;
use std::collections::BTreeSet;

fn spares(running: &Running) -> bool {
    running.pressure == Pressure::DirtyMapOnly
        && running.pressure_then.is_none()
        && running.source.status().gap.is_some()
}

impl Engine {
    /// Disks on which every group only marks are told to the kernel half as such, the others not.
    pub(super) fn fit_modes(&mut self) -> Result<(), EngineError> {
        let Some(capture) = &mut self.ctx.capture else { return Ok(()) };
        let on = |target: TargetId, running: &Running| running.volumes.iter().any(|v| v.target == target);
        let running = || self.groups.iter().filter(|g| !g.record.sync).filter_map(|g| g.running.as_ref());
        let (mut marked, mut back) = (BTreeSet::new(), false);
        for (target, _) in capture.targets() {
            let mut groups = running().filter(|r| on(target, r)).peekable();
            let may = groups.peek().is_some() && groups.all(spares);
            let was = running().any(|r| on(target, r) && r.marked_in_kernel);
            let mode = if may { Mode::ExtentsOnly } else { Mode::Data };
            capture.set_mode(target, mode).map_err(EngineError::Capture)?;
            if may {
                marked.insert(target);
            }
            back |= was && !may;
        }
        if back {
            self.hand_in_marks()?;
        }
        for group in self.groups.iter_mut().filter(|g| !g.record.sync) {
            let id = group.id();
            let Some(running) = &mut group.running else { continue };
            let before = running.marked_in_kernel;
            running.marked_in_kernel = running.volumes.iter().any(|v| marked.contains(&v.target));
            if running.marked_in_kernel != before {
                tracing::warn!(group = %id, marked = running.marked_in_kernel, "whether the kernel half only marks the group's writes");
            }
            if let Some(pressure) = running.pressure_then.take().filter(|_| !running.marked_in_kernel) {
                running.pressure = pressure;
                running.on(&mut self.ctx, id, Event::Pressure(pressure));
            }
        }
        Ok(())
    }

    /// All disks are captured again. For when groups come or go; those that may go on marking do so within a second.
    pub(super) fn capture_data(&mut self) -> Result<(), EngineError> {
        let Some(capture) = &mut self.ctx.capture else { return Ok(()) };
        for (target, _) in capture.targets() {
            capture.set_mode(target, Mode::Data).map_err(EngineError::Capture)?;
        }
        self.hand_in_marks()?;
        for running in self.groups.iter_mut().filter_map(|g| g.running.as_mut()) {
            running.marked_in_kernel = false;
        }
        Ok(())
    }

    fn hand_in_marks(&mut self) -> Result<(), EngineError> {
        let Some(capture) = &mut self.ctx.capture else { return Ok(()) };
        let mut events = Vec::new();
        capture.flush_losses(&mut events).map_err(EngineError::Capture)?;
        if !events.is_empty() {
            let at = self.batches.back().map_or(Position(0), |b| b.position);
            self.hand_in(at, events);
        }
        Ok(())
    }
}
