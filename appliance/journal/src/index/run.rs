//! Runs: which stretches of a timeline's segments have been merged, which a view needs, which to build next.
//!
//! Sealed segments of a timeline are counted by *ordinals* from 0 without a hole. Run (level 0, k) holds the pieces of segment
//! k; run (level l, k) merges the eight runs 8k..8k+8 of level l-1 and so covers 8^l segments. A *generation* is 8^T
//! segments (512 by default, T = 3) and has levels 0..T-1 plus one of two closing runs:
//! - the *map*, level [`RunId::MAP`], k = generation: everything up to the end of that generation;
//! - the *top*, level T, k = generation: the generation alone.
//!
//! A map lets a view stop; a top does not but is never larger than its generation. A map is written when what has come since
//! the last one is at least a quarter of it ([`MAP_SHARE`]), so that maps cost at most five pieces for each piece of history
//! even when a host writes every sector once, and a view passes few tops. Both answers are always right; only cost differs.
//!
//! Segments below the first kept one are in the base: their versions may be in a run or not, the answer is the same. So a
//! run may reach below the first kept ordinal, and after the index was lost it is rebuilt from what segments are left.
//!
//! Everything here is pure and tested against brute force.

use model::TimelineId;
use std::{fmt, ops::Range};

/// How many runs of one level make one of the next.
pub const FANOUT: u32 = 8;

/// A map is written when `MAP_SHARE` times the pieces since the last map are at least as many as the map's.
pub const MAP_SHARE: u64 = 4;

/// A run's name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RunId {
    pub timeline: TimelineId,
    pub level: u8,
    /// Counts runs of this level, not segments.
    pub ordinal: u32,
}

impl RunId {
    /// The level of map snapshots; their ordinal is the generation they end with.
    pub const MAP: u8 = 15;

    pub const fn new(timeline: TimelineId, level: u8, ordinal: u32) -> Self {
        Self { timeline, level, ordinal }
    }
    pub const fn is_map(&self) -> bool {
        self.level == Self::MAP
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_map() {
            write!(f, "timeline {} map {}", self.timeline, self.ordinal)
        } else {
            write!(f, "timeline {} level {} run {}", self.timeline, self.level, self.ordinal)
        }
    }
}

/// A stretch of a timeline whose index lives and dies together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GenerationId {
    pub timeline: TimelineId,
    pub number: u32,
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}-{}", self.timeline, self.number)
    }
}

/// Where a view finds versions: a run, or a segment's footer when the run is not there (yet).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    Run(RunId),
    /// A segment's ordinal.
    Footer(u32),
}

/// What a run to be built is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Inputs {
    /// The footer of the segment with this ordinal.
    Footer(u32),
    /// These runs, newest first; pieces below `keep_from` are to be left out (0: none).
    Runs { newest_first: Vec<RunId>, keep_from: u32 },
}

/// A run that is due.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunTask {
    pub run: RunId,
    pub inputs: Inputs,
}

/// How a timeline's segments are grouped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Level of the top run; a generation is 8^top segments.
    top: u8,
}

impl Default for Shape {
    /// 512 segments a generation.
    fn default() -> Self {
        Self { top: 3 }
    }
}

impl Shape {
    /// None unless a generation is 8, 64, 512 or 4096 segments.
    pub fn new(segments_per_generation: u32) -> Option<Self> {
        (1..=4).map(|top| Self { top }).find(|shape| shape.segments_per_generation() == segments_per_generation)
    }
    pub fn segments_per_generation(&self) -> u32 {
        span(self.top)
    }
    /// The generation that stores the run.
    pub fn generation(&self, run: RunId) -> GenerationId {
        let number = if run.is_map() { run.ordinal } else { self.covers(run).start / self.segments_per_generation() };
        GenerationId { timeline: run.timeline, number }
    }
    pub fn map(&self, generation: GenerationId) -> RunId {
        RunId::new(generation.timeline, RunId::MAP, generation.number)
    }
    pub fn top(&self, generation: GenerationId) -> RunId {
        RunId::new(generation.timeline, self.top, generation.number)
    }
    /// The segments whose versions the run holds; for a map everything from 0.
    pub fn covers(&self, run: RunId) -> Range<u32> {
        if run.is_map() {
            return 0..(run.ordinal.saturating_add(1)).saturating_mul(self.segments_per_generation());
        }
        let span = span(run.level.min(10));
        run.ordinal.saturating_mul(span)..run.ordinal.saturating_add(1).saturating_mul(span)
    }
    pub fn segments(&self, generation: GenerationId) -> Range<u32> {
        let size = self.segments_per_generation();
        generation.number.saturating_mul(size)..generation.number.saturating_add(1).saturating_mul(size)
    }

    /// The runs a view needs that starts below segment `end` and may stop at `first_kept`, newest first, when all are built.
    #[cfg(test)]
    pub fn decompose(&self, timeline: TimelineId, first_kept: u32, end: u32) -> Vec<RunId> {
        self.cover(timeline, first_kept, end, |_| true)
            .into_iter()
            .map(|source| match source {
                Source::Run(run) => run,
                Source::Footer(ordinal) => RunId::new(timeline, 0, ordinal),
            })
            .collect()
    }

    /// What a view needs that starts below segment `end` and may stop at `first_kept`, newest first: the largest run that `have`
    /// knows, else the footer.
    pub fn cover(&self, timeline: TimelineId, first_kept: u32, end: u32, have: impl Fn(RunId) -> bool) -> Vec<Source> {
        let mut out = Vec::new();
        let size = self.segments_per_generation();
        let mut at = end;
        while at > first_kept {
            if at.is_multiple_of(size) {
                let generation = GenerationId { timeline, number: at / size - 1 };
                let map = self.map(generation);
                if have(map) {
                    out.push(Source::Run(map));
                    return out; // a map holds everything below
                }
            }
            let step = (0..=self.top)
                .rev()
                .filter(|level| at.is_multiple_of(span(*level)))
                .map(|level| (span(level), RunId::new(timeline, level, at / span(level) - 1)))
                .find(|(_, run)| have(*run));
            match step {
                Some((width, run)) => {
                    out.push(Source::Run(run));
                    at -= width;
                }
                None => {
                    at -= 1;
                    out.push(Source::Footer(at));
                }
            }
        }
        out
    }

    /// The next run to build, or none: newest generation first, since recent moments are asked for most; within it small
    /// runs before the larger ones made of them. `end` is one past the last sealed segment; `pieces` tells how many pieces a
    /// run has, none when it is not there.
    ///
    /// Older generations are only looked at when all newer ones are done, and a generation with its map or top is done.
    pub fn next_due(
        &self,
        timeline: TimelineId,
        first_kept: u32,
        end: u32,
        pieces: impl Fn(RunId) -> Option<u64>,
    ) -> Option<RunTask> {
        if end <= first_kept {
            return None;
        }
        let size = self.segments_per_generation();
        let newest = (end - 1) / size;
        let oldest = first_kept / size;
        for number in (oldest..=newest).rev() {
            let generation = GenerationId { timeline, number };
            if self.is_closed(generation, &pieces) {
                continue;
            }
            if let Some(task) = self.due_inside(generation, first_kept, end, &pieces) {
                return Some(task);
            }
        }
        // Closing runs, oldest first: a map builds upon those before it.
        for number in oldest..=newest {
            let generation = GenerationId { timeline, number };
            if self.segments(generation).end > end {
                break;
            }
            if !self.is_closed(generation, &pieces) {
                return Some(self.closing(generation, first_kept, &pieces));
            }
        }
        None
    }

    fn is_closed(&self, generation: GenerationId, pieces: impl Fn(RunId) -> Option<u64>) -> bool {
        pieces(self.map(generation)).is_some() || pieces(self.top(generation)).is_some()
    }

    /// What is due below the closing run of one generation.
    fn due_inside(
        &self,
        generation: GenerationId,
        first_kept: u32,
        end: u32,
        pieces: impl Fn(RunId) -> Option<u64>,
    ) -> Option<RunTask> {
        let timeline = generation.timeline;
        let segments = self.segments(generation);
        for level in 0..self.top {
            let width = span(level);
            // Runs that are complete by now and not altogether below the first kept segment.
            let runs = (segments.start / width)..(segments.end.min(end) / width);
            for ordinal in runs {
                let run = RunId::new(timeline, level, ordinal);
                if self.covers(run).end <= first_kept || pieces(run).is_some() {
                    continue;
                }
                let inputs = if level == 0 {
                    Inputs::Footer(ordinal)
                } else {
                    Inputs::Runs { newest_first: self.children(run, first_kept), keep_from: 0 }
                };
                return Some(RunTask { run, inputs });
            }
        }
        None
    }

    /// The runs one level below, newest first, without those that are altogether in the base.
    fn children(&self, run: RunId, first_kept: u32) -> Vec<RunId> {
        let level = run.level - 1;
        (run.ordinal * FANOUT..(run.ordinal + 1) * FANOUT)
            .rev()
            .map(|ordinal| RunId::new(run.timeline, level, ordinal))
            .filter(|child| self.covers(*child).end > first_kept)
            .collect()
    }

    fn closing(&self, generation: GenerationId, first_kept: u32, pieces: impl Fn(RunId) -> Option<u64>) -> RunTask {
        let top = self.top(generation);
        let own = self.children(top, first_kept);
        let mut fresh: u64 = own.iter().filter_map(|run| pieces(*run)).sum();
        let mut inputs = own.clone();
        let size = self.segments_per_generation();
        let mut number = generation.number;
        let mut last_map = 0;
        while number > 0 && number * size > first_kept {
            number -= 1;
            let before = GenerationId { timeline: generation.timeline, number };
            if let Some(count) = pieces(self.map(before)) {
                inputs.push(self.map(before));
                last_map = count;
                break;
            }
            let Some(count) = pieces(self.top(before)) else {
                // Something older is missing (it is being rebuilt): a map now would leave it out for good.
                return RunTask { run: top, inputs: Inputs::Runs { newest_first: own, keep_from: 0 } };
            };
            inputs.push(self.top(before));
            fresh += count;
        }
        if fresh.saturating_mul(MAP_SHARE) >= last_map {
            RunTask { run: self.map(generation), inputs: Inputs::Runs { newest_first: inputs, keep_from: first_kept } }
        } else {
            RunTask { run: top, inputs: Inputs::Runs { newest_first: own, keep_from: 0 } }
        }
    }
}

/// Segments a run of this level covers.
const fn span(level: u8) -> u32 {
    FANOUT.pow(level as u32)
}
