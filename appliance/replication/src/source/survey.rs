//! What no file system uses is neither read, compared nor sent.
//!
//! Before a large copy begins the machine asks ([`Action::Survey`]) which granules the file systems on its volumes do not use, and orders no read
//! until it hears, or for [`HOLD_MS`]. What is answered is taken out of the dirty map, except where the host wrote since the question.
//!
//! **Why a granule may be left out, whatever host and box hold there.** It was free at a moment after the question; what freed it was
//! durable in the file system's own log before the answer; everything issued before the answer has been handed in with it, so no `Consistent` comes before
//! that. In every moment that can be opened from then on the file system may give such a block to anybody, who may have written
//! anything to it and died before that was committed: so nothing that it does, its recovery after a crash included, may depend on what a free block holds.
//! When it is used again it is written, all of it, after the question: that was captured, and is in the stream or in the map. What was captured
//! before the question and only marked is in the map for blocks that were freed since: their content is nobody's any more.
//!
//! Nothing here depends on the kind of the gap, nor on what the box holds: it is the same for a first copy, and for a comparison after a crash.

use super::event::Action;
use super::{Phase, Source};
use crate::granules::GranuleMap;
use model::{MonoTime, SECTOR, VolumeId};
use std::ops::Range;

/// Copying waits this long for an answer; one that comes later counts all the same.
pub(super) const HOLD_MS: u64 = 60_000;

/// A question under way.
#[derive(Debug)]
pub(super) struct Asked {
    since: MonoTime,
    /// Written since, or perhaps written, by volume.
    touched: Vec<GranuleMap>,
    /// All of it: nothing can be learned from the answer, and it is asked again.
    void: bool,
}

#[derive(Debug, Default)]
pub(super) struct Survey {
    asked: Option<Asked>,
    /// Asked and answered since the map last became large.
    answered: bool,
    /// Bytes that the newest answer took out of the map.
    pub(super) unused_bytes: u64,
}

impl Survey {
    pub(super) fn touch(&mut self, volume: usize, run: Range<u64>) {
        if let Some(asked) = &mut self.asked {
            asked.touched[volume].set(run);
        }
    }
    pub(super) fn touch_all(&mut self) {
        if let Some(asked) = &mut self.asked {
            asked.touched.iter_mut().for_each(GranuleMap::set_all);
            asked.void = true;
        }
    }
    /// Everything is dirty once more: the next copy asks anew.
    pub(super) fn forget(&mut self) {
        self.answered = false;
    }
    pub(super) fn holds_reads(&self, now: MonoTime) -> bool {
        self.asked.as_ref().is_some_and(|asked| now.ms_since(asked.since) < HOLD_MS)
    }
}

impl Source {
    /// Asks, if a copy is about to begin that is worth it.
    pub(super) fn ask_for_unused(&mut self, out: &mut Vec<Action>) {
        let copies = self.gap.as_ref().is_some_and(|gap| gap.phase == Phase::Copying);
        let worth = self.config.survey_bytes_min.is_some_and(|min| self.to_copy().bytes() >= min);
        if !copies || !worth || self.survey.asked.is_some() || self.survey.answered {
            return;
        }
        let touched = self.volumes.iter().map(|v| GranuleMap::empty(v.spec.sectors)).collect();
        self.survey.asked = Some(Asked { since: self.now.mono, touched, void: false });
        out.push(Action::Survey);
    }

    pub(super) fn surveyed(&mut self, unused: Vec<(VolumeId, GranuleMap)>) {
        let Some(asked) = self.survey.asked.take() else { return };
        self.survey.answered = !asked.void;
        let before = self.to_copy();
        for (id, mut unused) in unused {
            let volumes = self.volumes.iter_mut().zip(&asked.touched);
            // A map of another size is of what the volume was.
            let same = |v: &super::Volume| v.spec.id == id && v.spec.sectors == unused.sectors();
            if let Some((volume, touched)) = volumes.into_iter().find(|(v, _)| same(v)) {
                unused.remove(touched);
                volume.dirty.remove(&unused);
            }
        }
        let left_out = before.0.saturating_sub(self.to_copy().0);
        self.survey.unused_bytes = left_out * SECTOR;
        self.copying.total.0 = self.copying.total.0.saturating_sub(left_out);
        // The stored map still has them; an agent that dies now would only ask again.
        self.store_soon |= left_out > 0;
    }
}
