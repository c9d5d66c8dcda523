//! What the box is told that an administrator should know of this host: see [`Notice`].

use super::{Engine, group::Running};
use model::GroupId;
use replication::Pressure;
use wire::{Message, Notice};

impl Engine {
    /// What holds now.
    pub(super) fn notices(&self) -> Vec<Notice> {
        let mut notices = Vec::new();
        for group in &self.groups {
            let id = group.id();
            let Some(running) = &group.running else { continue };
            if group.record.unknown.seen {
                let count = self.passthrough_of(running);
                let mut unknown = group.record.unknown.clone();
                notices.push(Notice::UnknownWrites { group: id, commands: unknown.look(&self.ctx.boot_id, count).0 });
            }
            if running.pressure == Pressure::DirtyMapOnly {
                let mut why = running.pressure_cause.clone();
                if running.marked_in_kernel {
                    why.push_str("; data is not copied in the kernel either");
                }
                notices.push(Notice::CaptureReduced { group: id, why });
            }
        }
        if let Some(why) = self.rpo.why() {
            notices.push(Notice::HostThrottled { mib_s: self.config.protect_rpo_mib_s.into(), why: why.to_owned() });
        }
        notices
    }

    fn passthrough_of(&self, running: &Running) -> u64 {
        let counts = self.ctx.capture.as_ref().and_then(|c| c.passthrough().ok()).unwrap_or_default();
        counts.iter().filter(|(id, _)| running.volumes.iter().any(|v| v.target == *id)).map(|(_, n)| n).sum()
    }

    /// Looks for commands past the block layer, and tells the box what has changed.
    pub(super) fn tell_notices(&mut self) {
        let boot_id = self.ctx.boot_id.clone();
        let mut changed = false;
        for i in 0..self.groups.len() {
            let Some(running) = self.groups[i].running.as_ref().filter(|_| !self.groups[i].record.sync) else {
                continue;
            };
            let count = self.passthrough_of(running);
            let (commands, store) = self.groups[i].record.unknown.look(&boot_id, count);
            if store && commands > 0 {
                tracing::warn!(group = %self.groups[i].id(), commands, "unknown write: it is told to the box until a resync");
            }
            changed |= store;
        }
        if changed {
            self.store_groups();
        }
        if !self.box_hears_notices || self.control_up.is_none() {
            return;
        }
        let notices = self.notices();
        if self.told_notices.as_ref() != Some(&notices) {
            self.tell(Message::Notices(notices.clone()));
            self.told_notices = Some(notices);
        }
    }

    pub(super) fn unknown_writes_settled(&mut self, id: GroupId) {
        let boot_id = self.ctx.boot_id.clone();
        let Some(i) = self.groups.iter().position(|g| g.id() == id) else { return };
        let Some(running) = &self.groups[i].running else { return };
        let count = self.passthrough_of(running);
        if self.groups[i].record.unknown.seen {
            self.groups[i].record.unknown.settled(&boot_id, count);
            self.store_groups();
        }
    }
}
