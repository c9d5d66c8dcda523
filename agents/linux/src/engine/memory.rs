//! What is remembered of mirrored volumes while no mirror is in them, and when it may be forgotten.
//!
//! The watch ([`crate::capture::bpf::watch`]) marks every write of a mirrored volume, with the mirror in or out, agent or no agent. When a
//! mirror is put in again, only what is marked is compared with the box. So a mark may go only when its write cannot be needed
//! again: it has completed **with the mirror whole**, so that the leg had it, and the machine has let go of it, so that it is durable on the
//! box or in the stored dirty map. That takes some seconds, one step of [`Memory`] after the other; what is marked and not forgotten
//! when the agent dies is compared again, and no more.
//!
//! ```text
//!  Open ──some writes, CLOSE_EVERY_MS──▶ Closed ──all completed──▶ Drained{last request of the leg} ──all heard by the engine──▶
//!     ▲                                                                                     Heard{last write} ──let go of──┐
//!     └────────────────────────────── forgotten, if the mirror is still whole ◀──────────────────────────────────────────┘
//! ```
//!
//! **Order of two writes.** A volume that begins to be watched has its group's stored state removed first: should the agent die right
//! after, the next one finds the watch and must not take an older state for one that the marks complete.
//!
//! **Where it is not known** (BPF refused, the device made anew, … see [`Unknown`]) everything is compared, and the status says why.

use super::{
    Engine,
    sync::{Legs, Mirrored},
};
use crate::{
    capture::{
        CaptureError, DevNo, TargetId,
        bpf::watch::{self, Unknown, Watch},
        dm::leg::LegNo,
    },
    state::StateError,
};
use model::{Extent, GroupId, MonoTime};
use std::path::Path;

/// What is written in so long is compared needlessly after a kill at the worst; each round costs a look at all marks.
const CLOSE_EVERY_MS: u64 = 3_000;

/// How far forgetting has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Memory {
    Open { since: MonoTime },
    Closed,
    Drained { last: LegNo },
    Heard { capture: u64 },
}

/// The watch, or why there is none.
#[derive(Default)]
pub(super) struct Remembering {
    watch: Option<Watch>,
    /// Why it does not work; not tried again by this agent.
    refused: String,
    /// Of each group, why everything was compared when it was last put in; for the status.
    whole: Vec<(GroupId, String)>,
}

/// A volume that is about to be mirrored.
pub(super) struct About {
    pub disk: DevNo,
    pub sectors: u64,
    /// Our mirror is in its table: nobody can have made the device anew since.
    pub mirrored: bool,
}

impl Remembering {
    fn watch(&mut self, pins: &Path) -> Option<&mut Watch> {
        if self.watch.is_none() && self.refused.is_empty() {
            match Watch::open(&watch::dir_beside(pins)) {
                Ok(watch) => self.watch = Some(watch),
                Err(e) => self.refuse(&e),
            }
        }
        self.watch.as_mut()
    }

    fn refuse(&mut self, e: &CaptureError) {
        self.refused = crate::error_chain(e);
        self.watch = None;
        tracing::warn!(why = %self.refused, "mirrored volumes cannot be watched: after a mirror was out, everything is compared");
    }

    /// For people: why everything of a group was, or will be, compared.
    pub fn note(&self, group: GroupId) -> String {
        let whole = self.whole.iter().find(|(id, _)| *id == group).map(|(_, why)| why.as_str());
        match (self.refused.as_str(), whole) {
            ("", None) => String::new(),
            ("", Some(why)) => format!("everything was compared: {why}"),
            (refused, _) => format!("everything is compared after the mirror was out: {refused}"),
        }
    }

    /// Whether what is remembered of all these volumes can be gone on with; begins to watch them if not, after `forget` has removed the
    /// stored state that would no longer be true.
    pub fn prepare(
        &mut self,
        pins: &Path,
        group: GroupId,
        volumes: &[About],
        forget: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<bool, StateError> {
        self.whole.retain(|(id, _)| *id != group);
        let Some(watch) = self.watch(pins) else { return Ok(false) };
        let looks: Result<Vec<_>, CaptureError> =
            volumes.iter().map(|v| watch.knows(v.disk, v.sectors, v.mirrored)).collect();
        let unknown = match looks {
            Ok(looks) => looks.into_iter().find_map(Result::err),
            Err(e) => {
                self.refuse(&e);
                return Ok(false);
            }
        };
        let Some(why) = unknown else { return Ok(true) };
        forget()?;
        let added = volumes.iter().try_for_each(|v| watch.add(v.disk, v.sectors));
        if why != Unknown::NotWatched {
            self.whole.push((group, why.to_string()));
        }
        if let Err(e) = added {
            self.refuse(&e);
        }
        Ok(false)
    }

    /// Where a volume may have been written since what was stored of its group; all of it was written before this call.
    pub fn marks(&self, disk: DevNo) -> Vec<Extent> {
        self.watch.as_ref().map(|w| w.marks(disk)).unwrap_or_default()
    }

    pub fn drop_device(&mut self, disk: DevNo) {
        if let Some(watch) = &mut self.watch
            && let Err(e) = watch.drop_device(disk)
        {
            self.refuse(&e);
        }
    }

    /// With the last mirrored volume gone, nothing stays in the kernel.
    pub fn end(&mut self, pins: &Path) {
        self.watch = None;
        self.whole.clear();
        if let Err(e) = watch::remove(&watch::dir_beside(pins)) {
            tracing::warn!(error = %crate::error_chain(&e), "could not take the watch over mirrored volumes out of the kernel");
        }
    }
}

impl Legs {
    /// One step of forgetting, for a mirror that was just seen whole. `let_go`: the last write of its group that the machine has let go
    /// of, if its state is stored.
    pub(super) fn forget_step(&mut self, target: TargetId, let_go: Option<u64>, now: MonoTime) {
        let Some(watch) = &mut self.remembering.watch else { return };
        let Some(at) = self.mirrors.iter_mut().find(|m| m.target == target) else { return };
        let disk = at.mirror.outer();
        let step = match at.memory {
            // What was marked since the last close arrives after it.
            Memory::Open { since } if at.order.count() != at.arrived && now.ms_since(since) >= CLOSE_EVERY_MS => {
                at.arrived = at.order.count();
                watch.close(disk, now).map(|()| Memory::Closed)
            }
            Memory::Closed => {
                let last = at.mirror.leg.last();
                watch.drained(disk, now).map(|all| if all { Memory::Drained { last } } else { Memory::Closed })
            }
            Memory::Drained { last } if at.heard >= last => Ok(Memory::Heard { capture: at.last_capture }),
            Memory::Heard { capture } if let_go.is_some_and(|to| to >= capture) => {
                watch.forget_closed(disk).map(|forgotten| {
                    tracing::debug!(volume = at.mirror.name, forgotten, "marks of what the box has are forgotten");
                    Memory::Open { since: now }
                })
            }
            waits => Ok(waits),
        };
        match step {
            Ok(memory) => at.memory = memory,
            Err(e) => self.remembering.refuse(&e),
        }
    }

    /// How much of a group is marked as written and not forgotten yet: what the mirror's being out would cost at least.
    pub(super) fn marked_bytes(&self, group: GroupId) -> u64 {
        let of = |m: &Mirrored| self.remembering.marks(m.mirror.outer()).iter().map(Extent::bytes).sum::<u64>();
        self.mirrors.iter().filter(|m| m.group == group).map(of).sum()
    }

    /// A mirror is in: whatever was written before is remembered as one, and forgotten like the rest.
    pub(super) fn begin_memory(&mut self, disk: DevNo, now: MonoTime) -> Memory {
        match &mut self.remembering.watch {
            None => Memory::Open { since: now },
            Some(watch) => {
                if let Err(e) = watch.close(disk, now) {
                    self.remembering.refuse(&e);
                }
                Memory::Closed
            }
        }
    }
}

impl Engine {
    /// One step of forgetting for each mirror that was just seen whole.
    pub(super) fn forget_written(&mut self, whole: &[(TargetId, GroupId)], now: MonoTime) {
        for (target, group) in whole {
            let stored = self.ctx.retry_persist.iter().all(|(id, ..)| id != group)
                && self.ctx.open_losses.iter().all(|(id, _)| id != group);
            let running = self.groups.iter().find(|g| g.id() == *group).and_then(|g| g.running.as_ref());
            let let_go = running.filter(|_| stored).map(|r| r.released);
            self.ctx.sync.forget_step(*target, let_go, now);
        }
    }
}
