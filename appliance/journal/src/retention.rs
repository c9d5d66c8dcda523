//! Retention: what may be deleted, why the rest is kept, how long the room lasts. A pure plan, made from facts.
//!
//! The **cutoff** is an LSN: moments at or above it stay openable, everything at or below it is folded into the base. It moves
//! in whole segments. Executing a plan: persist the cutoff, fold the base up to it, persist the floor, then delete what the
//! plan lists and drop index generations below [`Plan::first_kept`]. Power lost anywhere, or a fold that fails: the next plan from
//! the facts then found asks for the same cutoff again and no further, until the floor has reached it.
//!
//! # What holds the cutoff back
//!
//! The window, every bookmark (a bookmark pins all history from it on), every open view, every point where a timeline that
//! still matters branches off, the open segment. A timeline *matters* when it is live, has a bookmark or an open view, or
//! another one that matters branched from it. The base belongs to the **trunk**: from the first timeline on, as long as
//! nobody wants the timeline beyond the branch point and exactly one that matters branched from it, over into that one.
//! Segments of timelines that do not matter, and those past the last point anyone needs, are deleted without a fold.
//!
//! # Whose clock
//!
//! Times in [`Facts`] are those of the history as they have *aged* ([`crate::ageing`]): a clock that leaps, or time in which the
//! process did not run, makes nothing old. The plan itself knows of no clock.
//!
//! # When room runs out
//!
//! In order: an alarm while the forecast is below the asked hours; then the window is shortened, down to its floor, the group
//! with the lowest priority first ([`share_out`]); then [`Pressure::Full`]: history is kept and the source marks dirty. A
//! bookmark, view or branch is never given up for room. Some room is reserved for the fold itself, which writes to the base
//! before it can delete ([`reserve`]); what a fold will take is not known before, so a plan counts deletions in full
//! and the next plan, with the disk's new figure, goes on from there.
//!
//! Bounds: one plan folds at most [`Facts::fold_segments_max`] segments, and no more bytes than the disk has free (but at least one).
//!
//! Tests: random histories with branches, bookmarks and views against a slow check that every wanted LSN is still there;
//! cutoff monotone over whole lives of a journal; reasons add up.

use crate::base::CHUNK_BYTES;
use model::{Lsn, TimelineId};
use std::collections::BTreeMap;

/// History of at most this long back makes the rate for the forecast.
const RATE_SPAN_US: u64 = 24 * HOUR_US;
/// Below this there is no forecast: the first minutes of a journal are its initial sync.
const RATE_SPAN_MIN_US: u64 = HOUR_US / 6;
const HOUR_US: u64 = 3_600_000_000;

/// A segment as the plan sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentFact {
    pub timeline: TimelineId,
    pub ordinal: u32,
    pub first_lsn: Lsn,
    /// Below `first_lsn` when the segment holds no record.
    pub last_lsn: Lsn,
    /// As aged.
    pub first_time_us: u64,
    pub last_time_us: u64,
    pub bytes: u64,
    /// Still being appended to, or the last that is known to be durable: never folded.
    pub open: bool,
}

/// A line of history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimelineFact {
    pub id: TimelineId,
    /// Branched from this timeline after this LSN.
    pub parent: Option<(TimelineId, Lsn)>,
    /// Its own tip is wanted. One that is not only matters as far as others branched from it.
    pub live: bool,
}

/// A moment that must stay readable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pin {
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

/// Everything the plan is made from.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// On the history's clock, as far as it is believed.
    pub now_us: u64,
    pub window_us: u64,
    /// The window is never shortened below this.
    pub window_floor_us: u64,
    /// At most this much of segments and `other_bytes` together. An append that needs a whole new segment to stay below a
    /// limit needs the limit given here less that segment, as with `reserve`.
    pub bytes_max: Option<u64>,
    /// What else counts against the limit: the index, segments made ahead. The base does not belong here: it is as large as
    /// the volumes whatever the window is, and would shorten every history to its floor.
    pub other_bytes: u64,
    /// What the disk has free.
    pub available: u64,
    /// To be kept free; see [`reserve`].
    pub reserve: u64,
    /// To be freed at least: this journal's share when several lie on one disk ([`share_out`]). None: it is alone, and what the
    /// disk lacks is its to free.
    pub must_free: Option<u64>,
    pub alarm_below_hours: u32,
    /// Everything at or below is in the base.
    pub floor: Lsn,
    /// The persisted cutoff; never below the floor, above it while a fold is being done.
    pub cutoff: Lsn,
    /// In any order.
    pub segments: &'a [SegmentFact],
    pub timelines: &'a [TimelineFact],
    pub bookmarks: &'a [Pin],
    /// Open views.
    pub leases: &'a [Pin],
    /// Moments that other journals stand on; the beginning, for a journal that stands on one itself.
    pub held: &'a [Pin],
    /// At most this many segments are folded by one plan, so that one round is bounded. At least 1.
    pub fold_segments_max: usize,
}

/// Room to keep free on a journal's disk: what a round of folding may write before anything can be deleted, and two segments
/// that are being prepared.
pub fn reserve(segment_bytes: u64, fold_segments_max: usize) -> u64 {
    segment_bytes.saturating_mul(fold_segments_max as u64 + 2).saturating_add(2 * CHUNK_BYTES as u64)
}

/// Why a segment is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum KeepReason {
    /// It is being written.
    Open,
    /// It is inside the window.
    Window,
    /// A bookmark lies in it or before it.
    Bookmark,
    /// An open view needs it.
    View,
    /// Another timeline, or another journal, branches off in it or before it, or it belongs to one.
    Branch,
    /// Due, but this round folds no more.
    Unfolded,
}

/// Segments kept for one reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    pub segments: u64,
    pub bytes: u64,
}

/// How tight it is. Later ones include the earlier ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pressure {
    Ok,
    /// Less history fits than the operator wants to be told of.
    Alarm {
        hours_left: u64,
    },
    /// The window is being shortened: this much is left of it.
    Shorten {
        window_us: u64,
    },
    /// Nothing more may be deleted and this many bytes are missing.
    Full {
        missing: u64,
    },
}

/// What the recent past says of the future.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forecast {
    pub bytes_per_hour: u64,
    /// Hours of history that fit at this rate, what lies there included.
    pub hours_left: u64,
    /// Hours until the room that is free now is used up, were nothing deleted.
    pub hours_to_limit: u64,
}

/// What to do, and why the rest stays.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Fold up to here (to be persisted first). Never below the persisted one.
    pub new_cutoff: Lsn,
    /// The trunk's stretches, oldest first, each with the last LSN that belongs to it (none: up to the tip): a fold takes records
    /// of these timelines up to these LSNs, and at most up to the cutoff.
    pub trunk: Vec<(TimelineId, Option<Lsn>)>,
    /// To be deleted when the fold is done and the floor persisted, sorted.
    pub delete: Vec<(TimelineId, u32)>,
    pub delete_bytes: u64,
    /// Segments that stay, by reason; with `delete` they are all there are.
    pub kept: BTreeMap<KeepReason, Kept>,
    /// For each timeline the lowest ordinal that stays (one past the highest when none does).
    pub first_kept: Vec<(TimelineId, u32)>,
    /// None while the history is too short to say.
    pub forecast: Option<Forecast>,
    pub pressure: Pressure,
}

impl Plan {
    /// Whether executing it changes anything.
    pub fn is_idle(&self, facts: &Facts<'_>) -> bool {
        self.delete.is_empty() && self.new_cutoff <= facts.floor
    }
}

/// The lines of history, sorted out.
struct Lines {
    /// Timelines that matter, with the last LSN anyone needs of them (none: all).
    needed: BTreeMap<TimelineId, Option<Lsn>>,
    trunk: Vec<(TimelineId, Option<Lsn>)>,
    /// The first point at which something branches off the trunk.
    branch: Option<Lsn>,
    bookmarks: Vec<Pin>,
    leases: Vec<Pin>,
    held: Vec<Pin>,
}

impl Lines {
    fn of(facts: &Facts<'_>) -> Self {
        let by_id: BTreeMap<TimelineId, &TimelineFact> = facts.timelines.iter().map(|t| (t.id, t)).collect();
        // A moment of a branch at or below its branch point is one of the timeline it branched from. A chain of parents
        // is never longer than there are timelines: damaged facts must not hang us.
        let home = |mut pin: Pin| {
            for _ in 0..facts.timelines.len() {
                match by_id.get(&pin.timeline).and_then(|t| t.parent) {
                    Some((parent, branch)) if pin.lsn <= branch => pin.timeline = parent,
                    _ => break,
                }
            }
            pin
        };
        let parent_of = |id: TimelineId| {
            let (timeline, lsn) = by_id.get(&id)?.parent?;
            let pin = home(Pin { timeline, lsn });
            Some((pin.timeline, pin.lsn))
        };
        let bookmarks: Vec<Pin> = facts.bookmarks.iter().map(|pin| home(*pin)).collect();
        let leases: Vec<Pin> = facts.leases.iter().map(|pin| home(*pin)).collect();
        let held: Vec<Pin> = facts.held.iter().map(|pin| home(*pin)).collect();

        let mut needed: BTreeMap<TimelineId, Option<Lsn>> = BTreeMap::new();
        for pin in bookmarks.iter().chain(&leases).chain(&held) {
            let until = needed.entry(pin.timeline).or_insert(Some(Lsn::ZERO));
            *until = until.map(|until| until.max(pin.lsn));
        }
        needed.extend(facts.timelines.iter().filter(|t| t.live).map(|t| (t.id, None)));
        // What the trunk may not leave behind: tips and pins, not branch points.
        let own = needed.clone();
        // Children of a timeline that matter, with their branch points.
        let mut children: BTreeMap<TimelineId, BTreeMap<TimelineId, Lsn>> = BTreeMap::new();
        for id in own.keys() {
            let mut at = *id;
            for _ in 0..facts.timelines.len() {
                let Some((parent, lsn)) = parent_of(at) else { break };
                children.entry(parent).or_default().insert(at, lsn);
                let until = needed.entry(parent).or_insert(Some(Lsn::ZERO));
                *until = until.map(|until| until.max(lsn));
                at = parent;
            }
        }
        let mut trunk = Vec::new();
        let mut branch = None;
        let mut at = facts.timelines.iter().find(|t| t.parent.is_none()).map(|t| t.id);
        while let Some(id) = at.take() {
            let none = BTreeMap::new();
            let branches = children.get(&id).unwrap_or(&none);
            if branches.len() == 1
                && let Some((child, lsn)) = branches.first_key_value()
                && own.get(&id).is_none_or(|until| until.is_some_and(|until| until <= *lsn))
                && trunk.len() < facts.timelines.len()
            {
                trunk.push((id, Some(*lsn)));
                at = Some(*child);
            } else {
                trunk.push((id, None));
                branch = branches.values().min().copied();
            }
        }
        Self { needed, trunk, branch, bookmarks, leases, held }
    }

    /// The last LSN of the segment that is on the trunk; none when the segment is not on it.
    fn on_trunk(&self, segment: &SegmentFact) -> Option<Lsn> {
        let (_, until) = self.trunk.iter().find(|(id, _)| *id == segment.timeline)?;
        match until {
            Some(until) if segment.first_lsn > *until => None,
            Some(until) => Some(segment.last_lsn.min(*until)),
            None => Some(segment.last_lsn),
        }
    }

    /// Whether nobody needs any record of the segment.
    fn abandoned(&self, segment: &SegmentFact) -> bool {
        match self.needed.get(&segment.timeline) {
            None => true,
            Some(None) => false,
            Some(Some(until)) => segment.first_lsn > *until,
        }
    }
}

/// A segment of the trunk that may be folded one day.
#[derive(Clone, Copy)]
struct Step {
    fact: SegmentFact,
    /// The cutoff once it is folded.
    last: Lsn,
}

/// How far the cutoff may go, by what holds it.
struct Limits {
    bookmark: Lsn,
    view: Lsn,
    branch: Lsn,
}

impl Limits {
    fn of(facts: &Facts<'_>, lines: &Lines) -> Self {
        let on_trunk = |pin: &Pin| lines.trunk.iter().any(|(id, _)| *id == pin.timeline);
        let known = |pin: &Pin| facts.timelines.iter().any(|t| t.id == pin.timeline);
        // One on a branch is held by the branch point, and one that lies nowhere we know of holds everything.
        let least = |pins: &[Pin]| {
            let held = pins.iter().filter(|pin| on_trunk(pin) || !known(pin));
            held.map(|pin| if known(pin) { pin.lsn } else { Lsn::ZERO }).min().unwrap_or(Lsn::MAX)
        };
        let branch = lines.branch.unwrap_or(Lsn::MAX).min(least(&lines.held));
        // A bookmark is a record: the segment that has it stays even when it is the last one there, or its name would go.
        let bookmark = match least(&lines.bookmarks) {
            Lsn::MAX => Lsn::MAX,
            lsn => lsn.prev(),
        };
        Self { bookmark, view: least(&lines.leases), branch }
    }
    fn least(&self) -> Lsn {
        self.bookmark.min(self.view).min(self.branch)
    }
}

/// The trunk's sealed segments in order, up to the open one.
fn steps(facts: &Facts<'_>, lines: &Lines) -> Vec<Step> {
    let mut steps: Vec<Step> =
        facts.segments.iter().filter_map(|fact| Some(Step { fact: *fact, last: lines.on_trunk(fact)? })).collect();
    steps.sort_by_key(|step| (step.fact.first_lsn, step.fact.timeline, step.fact.ordinal));
    let open = steps.iter().position(|step| step.fact.open).unwrap_or(steps.len());
    steps.truncate(open);
    steps
}

/// How many of `steps` end before `from_us` and at or below `limit`.
fn foldable(steps: &[Step], from_us: u64, limit: Lsn) -> usize {
    steps.iter().take_while(|step| step.fact.last_time_us < from_us && step.last <= limit).count()
}

fn bytes_of<'a>(segments: impl Iterator<Item = &'a SegmentFact>) -> u64 {
    segments.map(|segment| segment.bytes).fold(0, u64::saturating_add)
}

/// Makes the plan.
pub fn plan(facts: &Facts<'_>) -> Plan {
    let lines = Lines::of(facts);
    let limits = Limits::of(facts, &lines);
    let steps = steps(facts, &lines);
    let used = bytes_of(facts.segments.iter()).saturating_add(facts.other_bytes);
    let abandoned = bytes_of(facts.segments.iter().filter(|s| !s.open && lines.abandoned(s)));
    // How far by the window asked for, and how far at the very most.
    let asked = foldable(&steps, facts.now_us.saturating_sub(facts.window_us), limits.least());
    let floor_us = facts.window_floor_us.min(facts.window_us);
    let most = foldable(&steps, facts.now_us.saturating_sub(floor_us), limits.least());
    // What is at or below the persisted cutoff goes in any case.
    let begun = steps.iter().take_while(|step| step.last <= facts.cutoff).count();
    let need = need(facts, used);
    let mut target = asked.max(begun);
    let mut freed = bytes_of(steps[..target].iter().map(|step| &step.fact)).saturating_add(abandoned);
    while target < most && freed < need {
        freed = freed.saturating_add(steps[target].fact.bytes);
        target += 1;
    }
    let missing = need.saturating_sub(freed);
    // Everything up to here goes sooner or later.
    let target_lsn = steps[..target].iter().map(|step| step.last).max().unwrap_or(Lsn::ZERO);

    // This round: whole segments, as many as may be and as the disk can take.
    let folded = steps.iter().take_while(|step| step.last <= facts.floor).count();
    let (mut round, mut room) = (folded.min(target), facts.available);
    // A fold that was begun is ended first, as it was begun: the base knows what is half done by the LSN it was to reach.
    while round < target && facts.cutoff <= facts.floor {
        let step = &steps[round];
        let first = round == folded;
        if round - folded >= facts.fold_segments_max.max(1) || (step.fact.bytes > room && !first) {
            break;
        }
        room = room.saturating_sub(step.fact.bytes);
        round += 1;
    }
    let round = round.max(begun);
    let reached = steps[..round].iter().map(|step| step.last).max().unwrap_or(Lsn::ZERO);
    let new_cutoff = reached.max(facts.cutoff).max(facts.floor);

    let shortened = target > asked.max(begun);
    let window_from = match steps.get(target) {
        Some(step) if shortened => step.fact.first_time_us.min(facts.now_us),
        _ => facts.now_us.saturating_sub(facts.window_us),
    };
    let sorted = sort(facts, &lines, &limits, &Cut { new_cutoff, target_lsn, window_from });

    let forecast = forecast(facts, used);
    let alarm = forecast.map(|f| f.hours_left).filter(|hours| *hours < u64::from(facts.alarm_below_hours));
    let pressure = if missing > 0 {
        Pressure::Full { missing }
    } else if shortened {
        Pressure::Shorten { window_us: facts.now_us.saturating_sub(window_from) }
    } else if let Some(hours_left) = alarm {
        Pressure::Alarm { hours_left }
    } else {
        Pressure::Ok
    };
    Plan {
        new_cutoff,
        trunk: lines.trunk,
        delete: sorted.delete,
        delete_bytes: sorted.delete_bytes,
        kept: sorted.kept,
        first_kept: sorted.first_kept.into_iter().collect(),
        forecast,
        pressure,
    }
}

/// Where the plan cuts: this round, sooner or later, and the time its window begins at.
struct Cut {
    new_cutoff: Lsn,
    target_lsn: Lsn,
    window_from: u64,
}

/// Every segment, either to go or counted with its reason to stay.
#[derive(Default)]
struct Sorted {
    delete: Vec<(TimelineId, u32)>,
    delete_bytes: u64,
    kept: BTreeMap<KeepReason, Kept>,
    first_kept: BTreeMap<TimelineId, u32>,
}

fn sort(facts: &Facts<'_>, lines: &Lines, limits: &Limits, cut: &Cut) -> Sorted {
    let mut sorted = Sorted::default();
    for segment in facts.segments {
        let lowest = sorted.first_kept.entry(segment.timeline).or_insert(u32::MAX);
        match reason_to_keep(segment, lines, limits, cut) {
            Some(reason) => {
                let sum = sorted.kept.entry(reason).or_default();
                sum.segments += 1;
                sum.bytes = sum.bytes.saturating_add(segment.bytes);
                *lowest = (*lowest).min(segment.ordinal);
            }
            None => {
                sorted.delete.push((segment.timeline, segment.ordinal));
                sorted.delete_bytes = sorted.delete_bytes.saturating_add(segment.bytes);
            }
        }
    }
    sorted.delete.sort_unstable();
    for (timeline, lowest) in &mut sorted.first_kept {
        if *lowest == u32::MAX {
            let ordinals = facts.segments.iter().filter(|s| s.timeline == *timeline).map(|s| s.ordinal);
            *lowest = ordinals.max().map_or(0, |highest| highest.saturating_add(1));
        }
    }
    sorted
}

/// Why a segment stays; none when it goes in this round.
fn reason_to_keep(segment: &SegmentFact, lines: &Lines, limits: &Limits, cut: &Cut) -> Option<KeepReason> {
    if segment.open {
        return Some(KeepReason::Open);
    }
    if lines.abandoned(segment) {
        return None;
    }
    let in_window = segment.last_time_us >= cut.window_from;
    let Some(last) = lines.on_trunk(segment) else {
        return Some(if in_window { KeepReason::Window } else { KeepReason::Branch });
    };
    if last <= cut.new_cutoff {
        return None;
    }
    Some(match () {
        () if last <= cut.target_lsn => KeepReason::Unfolded,
        () if in_window => KeepReason::Window,
        () if limits.bookmark < last => KeepReason::Bookmark,
        () if limits.branch < last => KeepReason::Branch,
        () if limits.view < last => KeepReason::View,
        // Only what comes after the open segment's place is left, or what was shortened for.
        () => KeepReason::Window,
    })
}

/// Bytes to be freed.
fn need(facts: &Facts<'_>, used: u64) -> u64 {
    let over_limit = facts.bytes_max.map_or(0, |max| used.saturating_sub(max));
    let disk = facts.must_free.unwrap_or_else(|| facts.reserve.saturating_sub(facts.available));
    over_limit.max(disk)
}

fn forecast(facts: &Facts<'_>, used: u64) -> Option<Forecast> {
    let from = facts.now_us.saturating_sub(RATE_SPAN_US);
    let recent = || facts.segments.iter().filter(|s| s.last_time_us >= from && s.last_lsn >= s.first_lsn);
    let begin = recent().map(|s| s.first_time_us).min()?.max(from);
    let span = facts.now_us.saturating_sub(begin);
    if span < RATE_SPAN_MIN_US {
        return None;
    }
    // A segment that reaches back beyond the span counts with the part inside.
    let bytes: u128 = recent()
        .map(|s| {
            let whole = u128::from(s.last_time_us.saturating_sub(s.first_time_us)).max(1);
            let inside = u128::from(s.last_time_us.saturating_sub(s.first_time_us.max(begin))).clamp(1, whole);
            u128::from(s.bytes) * inside / whole
        })
        .sum();
    let per_hour = u64::try_from(bytes * u128::from(HOUR_US) / u128::from(span)).unwrap_or(u64::MAX);
    let by_limit = facts.bytes_max.map_or(u64::MAX, |max| max.saturating_sub(used));
    let room = by_limit.min(facts.available.saturating_sub(facts.reserve));
    let history = bytes_of(facts.segments.iter());
    let hours = |bytes: u64| bytes.checked_div(per_hour).unwrap_or(u64::MAX);
    Some(Forecast {
        bytes_per_hour: per_hour,
        hours_left: hours(history.saturating_add(room)),
        hours_to_limit: hours(room),
    })
}

/// What a group could free, for [`share_out`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Share {
    /// Lower gives first.
    pub priority: u8,
    /// Bytes that go anyway: they are outside the window asked for, or nobody needs them.
    pub due: u64,
    /// What shortening the window to its floor would free, oldest first: the time of a segment's last record, its bytes.
    pub spare: Vec<(u64, u64)>,
}

/// What this group could give.
pub fn share(facts: &Facts<'_>, priority: u8) -> Share {
    let lines = Lines::of(facts);
    let limit = Limits::of(facts, &lines).least();
    let steps = steps(facts, &lines);
    let asked = foldable(&steps, facts.now_us.saturating_sub(facts.window_us), limit);
    let begun = steps.iter().take_while(|step| step.last <= facts.cutoff).count();
    let due = asked.max(begun);
    let floor_us = facts.window_floor_us.min(facts.window_us);
    let most = foldable(&steps, facts.now_us.saturating_sub(floor_us), limit).max(due);
    let abandoned = bytes_of(facts.segments.iter().filter(|s| !s.open && lines.abandoned(s)));
    Share {
        priority,
        due: bytes_of(steps[..due].iter().map(|step| &step.fact)).saturating_add(abandoned),
        spare: steps[due..most].iter().map(|step| (step.fact.last_time_us, step.fact.bytes)).collect(),
    }
}

/// Who frees how much.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SharedOut {
    /// For each group, in the order given: what its [`Journal::set_must_free`](crate::Journal::set_must_free) takes.
    pub must_free: Vec<u64>,
    /// What cannot be freed by anyone: new writes will find the disk full.
    pub missing: u64,
}

/// Shares a disk's need among the groups on it: first what goes anyway, then the windows of the lowest priority down to their
/// floors, then the next; groups of one priority give their oldest history first, whoever's it is.
pub fn share_out(groups: &[Share], available: u64, reserve: u64) -> SharedOut {
    let mut must_free: Vec<u64> = groups.iter().map(|group| group.due).collect();
    let due = must_free.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
    let mut need = reserve.saturating_sub(available).saturating_sub(due);
    let mut spare: Vec<(u8, u64, usize, u64)> = groups
        .iter()
        .enumerate()
        .flat_map(|(i, group)| group.spare.iter().map(move |(time, bytes)| (group.priority, *time, i, *bytes)))
        .collect();
    // Stable: a group's own segments stay in their order where times are equal.
    spare.sort_by_key(|(priority, time, group, _)| (*priority, *time, *group));
    for (_, _, group, bytes) in spare {
        if need == 0 {
            break;
        }
        must_free[group] = must_free[group].saturating_add(bytes);
        need = need.saturating_sub(bytes);
    }
    SharedOut { must_free, missing: need }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::rng;

    /// A journal on paper: owns what [`Facts`] borrows.
    #[derive(Clone, Debug)]
    struct Paper {
        now_us: u64,
        window_us: u64,
        window_floor_us: u64,
        bytes_max: Option<u64>,
        available: u64,
        reserve: u64,
        floor: Lsn,
        cutoff: Lsn,
        segments: Vec<SegmentFact>,
        timelines: Vec<TimelineFact>,
        bookmarks: Vec<Pin>,
        leases: Vec<Pin>,
        held: Vec<Pin>,
        fold_segments_max: usize,
        /// How far timelines went whose segments are deleted by now.
        tips: BTreeMap<TimelineId, Lsn>,
    }

    impl Paper {
        fn facts(&self) -> Facts<'_> {
            Facts {
                now_us: self.now_us,
                window_us: self.window_us,
                window_floor_us: self.window_floor_us,
                bytes_max: self.bytes_max,
                other_bytes: 10,
                available: self.available,
                reserve: self.reserve,
                must_free: None,
                alarm_below_hours: 12,
                floor: self.floor,
                cutoff: self.cutoff,
                segments: &self.segments,
                timelines: &self.timelines,
                bookmarks: &self.bookmarks,
                leases: &self.leases,
                held: &self.held,
                fold_segments_max: self.fold_segments_max,
            }
        }

        /// One timeline, `count` segments of ten LSNs, one per hour, 100 bytes each; the last is open.
        fn line(count: u64) -> Self {
            let segments = (0..count).map(|i| SegmentFact {
                timeline: TimelineId(0),
                ordinal: i as u32,
                first_lsn: Lsn(i * 10 + 1),
                last_lsn: Lsn(i * 10 + 10),
                first_time_us: i * HOUR_US,
                last_time_us: (i + 1) * HOUR_US - 1,
                bytes: 100,
                open: i + 1 == count,
            });
            Self {
                now_us: count * HOUR_US,
                window_us: 1000 * HOUR_US,
                window_floor_us: 4 * HOUR_US,
                bytes_max: None,
                available: 1 << 40,
                reserve: 300,
                floor: Lsn(0),
                cutoff: Lsn(0),
                segments: segments.collect(),
                timelines: vec![TimelineFact { id: TimelineId(0), parent: None, live: true }],
                bookmarks: vec![],
                leases: vec![],
                held: vec![],
                fold_segments_max: usize::MAX,
                tips: BTreeMap::new(),
            }
        }

        fn pin(lsn: u64) -> Pin {
            Pin { timeline: TimelineId(0), lsn: Lsn(lsn) }
        }

        /// The timelines and LSN ranges (exclusive, inclusive] that a moment is made of, newest first.
        fn path(&self, timeline: TimelineId, lsn: Lsn) -> Vec<(TimelineId, Lsn, Lsn)> {
            let mut out = Vec::new();
            let (mut at, mut until) = (timeline, lsn);
            loop {
                let fact = self.timelines.iter().find(|t| t.id == at).expect("the paper knows its timelines");
                match fact.parent {
                    Some((parent, branch)) => {
                        out.push((at, branch, until));
                        until = until.min(branch);
                        at = parent;
                    }
                    None => {
                        out.push((at, Lsn(0), until));
                        return out;
                    }
                }
            }
        }

        /// Whether base and the segments left hold every record of the moment, and the base nothing beyond it.
        fn readable(&self, plan: &Plan, timeline: TimelineId, lsn: Lsn) -> Result<(), String> {
            let path = self.path(timeline, lsn);
            if plan.new_cutoff > lsn {
                return Err(format!("the cutoff {} is past {timeline}@{lsn}", plan.new_cutoff));
            }
            for (line, after, until) in &path {
                for record in after.0 + 1..=until.0 {
                    let in_base = record <= plan.new_cutoff.0
                        && plan.trunk.iter().any(|(id, end)| id == line && end.is_none_or(|end| record <= end.0));
                    let in_segment = self.segments.iter().any(|s| {
                        s.timeline == *line
                            && (s.first_lsn.0..=s.last_lsn.0).contains(&record)
                            && !plan.delete.contains(&(s.timeline, s.ordinal))
                    });
                    if !in_base && !in_segment {
                        return Err(format!("{line}@{record} is gone, {timeline}@{lsn} needs it"));
                    }
                }
            }
            // Nothing of another line may have come into the base below the cutoff.
            for (id, end) in &plan.trunk {
                let reach = plan.new_cutoff.min(end.unwrap_or(Lsn::MAX));
                let start = path.iter().find(|(line, ..)| line == id);
                let begins =
                    self.timelines.iter().find(|t| t.id == *id).and_then(|t| t.parent).map_or(Lsn(0), |(_, b)| b);
                let taken = reach > begins;
                if taken && start.is_none_or(|(_, _, until)| reach > *until) {
                    return Err(format!("the base holds {id} up to {reach}, which is not part of {timeline}@{lsn}"));
                }
            }
            Ok(())
        }

        /// Everything a plan must never do, whatever the facts.
        fn check(&self, plan: &Plan, seed: u64) {
            assert!(plan.new_cutoff >= self.cutoff.max(self.floor), "seed {seed}: the cutoff went back");
            for pin in self.bookmarks.iter().chain(&self.leases).chain(&self.held) {
                self.readable(plan, pin.timeline, pin.lsn)
                    .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{self:#?}\n{plan:#?}"));
            }
            let left = |id: TimelineId| self.segments.iter().filter(move |s| s.timeline == id).map(|s| s.last_lsn);
            let tip = |id: TimelineId| left(id).chain(self.tips.get(&id).copied()).max();
            for line in self.timelines.iter().filter(|t| t.live) {
                let branched = line.parent.map_or(Lsn(0), |(_, lsn)| lsn);
                let last = tip(line.id).unwrap_or(branched).max(branched);
                self.readable(plan, line.id, last).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{self:#?}\n{plan:#?}"));
            }
            // The floor of the window: nothing younger goes, unless it is nobody's or was cut off before.
            let from = self.now_us.saturating_sub(self.window_floor_us.min(self.window_us));
            for (timeline, ordinal) in &plan.delete {
                let found = self.segments.iter().find(|s| (s.timeline, s.ordinal) == (*timeline, *ordinal));
                let segment = found.expect("only segments there are can be deleted");
                assert!(!segment.open, "seed {seed}: the open segment");
                let has_records = segment.last_lsn >= segment.first_lsn;
                if has_records && segment.last_time_us >= from && segment.last_lsn > self.cutoff {
                    let lines = Lines::of(&self.facts());
                    assert!(lines.abandoned(segment), "seed {seed}: {segment:?} is inside the floor of the window");
                }
            }
            let kept: u64 = plan.kept.values().map(|kept| kept.segments).sum();
            let kept_bytes: u64 = plan.kept.values().map(|kept| kept.bytes).sum();
            assert_eq!(
                kept + plan.delete.len() as u64,
                self.segments.len() as u64,
                "seed {seed}: reasons do not add up"
            );
            let all: u64 = self.segments.iter().map(|s| s.bytes).sum();
            assert_eq!(kept_bytes + plan.delete_bytes, all, "seed {seed}: bytes do not add up");
            for (timeline, lowest) in &plan.first_kept {
                for s in self.segments.iter().filter(|s| s.timeline == *timeline && s.ordinal < *lowest) {
                    assert!(
                        plan.delete.contains(&(s.timeline, s.ordinal)),
                        "seed {seed}: {s:?} is below the first kept"
                    );
                }
            }
        }

        /// Does what the plan says.
        fn execute(&mut self, plan: &Plan) {
            for s in &self.segments {
                let tip = self.tips.entry(s.timeline).or_default();
                *tip = s.last_lsn.max(*tip);
            }
            self.cutoff = plan.new_cutoff;
            self.floor = plan.new_cutoff;
            self.available = self.available.saturating_add(plan.delete_bytes);
            self.segments.retain(|s| !plan.delete.contains(&(s.timeline, s.ordinal)));
        }
    }

    #[test]
    fn the_window_decides_when_there_is_room() {
        for count in 1..40 {
            for window in 0..45 {
                let mut paper = Paper::line(count);
                paper.window_us = window * HOUR_US;
                let made = plan(&paper.facts());
                paper.check(&made, 0);
                // A segment ends a microsecond before the hour: a window of w hours needs the last w, the open one always.
                let gone = count.saturating_sub(window).min(count - 1);
                assert_eq!(made.new_cutoff, Lsn(gone * 10), "{count} segments, window {window}");
                assert_eq!(made.delete.len() as u64, gone);
                assert_eq!(
                    made.pressure.min(Pressure::Shorten { window_us: 0 }),
                    made.pressure,
                    "never tight: there is room"
                );
            }
        }
    }

    #[test]
    fn bookmarks_views_and_branches_hold_the_cutoff() {
        for lsn in 0..=200 {
            for what in 0..4 {
                let mut paper = Paper::line(20);
                paper.window_us = 0;
                paper.window_floor_us = 0;
                let reason = match what {
                    0 => {
                        paper.bookmarks.push(Paper::pin(lsn));
                        KeepReason::Bookmark
                    }
                    1 => {
                        paper.leases.push(Paper::pin(lsn));
                        KeepReason::View
                    }
                    2 => {
                        paper.held.push(Paper::pin(lsn));
                        KeepReason::Branch
                    }
                    _ => {
                        let parent = Some((TimelineId(0), Lsn(lsn)));
                        paper.timelines.push(TimelineFact { id: TimelineId(1), parent, live: true });
                        KeepReason::Branch
                    }
                };
                let made = plan(&paper.facts());
                paper.check(&made, lsn);
                // The segment with a bookmark's record stays.
                let upto = if what == 0 { lsn.saturating_sub(1) } else { lsn };
                let want = (upto / 10 * 10).min(190);
                assert_eq!(made.new_cutoff, Lsn(want), "{reason:?} at {lsn}");
                let held = made.kept.get(&reason).copied().unwrap_or_default();
                assert_eq!(held.segments, 19 - want / 10, "{reason:?} at {lsn}: {:?}", made.kept);
                assert_eq!(held.bytes, held.segments * 100);
            }
        }
    }

    #[test]
    fn room_shortens_the_window_to_its_floor_and_no_further() {
        for missing in 0..30 {
            let mut paper = Paper::line(20);
            paper.available = 5000;
            paper.reserve = 5000 + missing * 100;
            let made = plan(&paper.facts());
            paper.check(&made, missing);
            // Floor 4 h: the open segment and three more stay.
            let can = 16;
            assert_eq!(made.delete.len() as u64, missing.min(can), "{missing} segments missing");
            match made.pressure {
                Pressure::Full { missing: bytes } => assert_eq!(bytes, (missing - can) * 100),
                Pressure::Shorten { window_us } => {
                    assert!((1..=can).contains(&missing));
                    assert_eq!(window_us, (20 - missing) * HOUR_US);
                }
                other => assert_eq!(missing, 0, "{other:?}"),
            }
        }
    }

    #[test]
    fn a_limit_in_bytes_counts_the_index_too() {
        let mut paper = Paper::line(20);
        paper.bytes_max = Some(20 * 100 + 10);
        assert!(plan(&paper.facts()).delete.is_empty());
        paper.bytes_max = Some(20 * 100 + 9);
        assert_eq!(plan(&paper.facts()).delete, [(TimelineId(0), 0)]);
    }

    #[test]
    fn one_round_folds_no_more_than_it_may_and_the_rest_waits() {
        let mut paper = Paper::line(20);
        paper.window_us = 5 * HOUR_US;
        paper.fold_segments_max = 4;
        let mut rounds = vec![];
        loop {
            let made = plan(&paper.facts());
            paper.check(&made, 0);
            if made.is_idle(&paper.facts()) {
                break;
            }
            let waiting = made.kept.get(&KeepReason::Unfolded).copied().unwrap_or_default().segments;
            rounds.push((made.delete.len(), waiting));
            paper.execute(&made);
            assert!(rounds.len() < 100, "{rounds:?}");
        }
        assert_eq!(rounds, [(4, 11), (4, 7), (4, 3), (3, 0)]);
        // With little room free one at a time, but always one.
        let mut paper = Paper::line(20);
        paper.window_us = 5 * HOUR_US;
        paper.available = 0;
        assert_eq!(plan(&paper.facts()).delete.len(), 1);
        paper.available = 250;
        assert_eq!(plan(&paper.facts()).delete.len(), 2);
    }

    #[test]
    fn a_fold_that_was_begun_is_asked_for_again() {
        let mut paper = Paper::line(20);
        paper.cutoff = Lsn(70);
        paper.floor = Lsn(20);
        paper.fold_segments_max = 1;
        let made = plan(&paper.facts());
        assert_eq!(made.new_cutoff, Lsn(70));
        assert_eq!(made.delete.len(), 7);
        assert!(!made.is_idle(&paper.facts()));
        // And no further, though there is much more to fold: the base finishes the fold it knows of first.
        paper.fold_segments_max = 20;
        assert_eq!(plan(&paper.facts()).new_cutoff, Lsn(70));
        // Even when a bookmark appeared below: the base is past it already.
        paper.bookmarks.push(Paper::pin(30));
        assert_eq!(plan(&paper.facts()).new_cutoff, Lsn(70));
    }

    #[test]
    fn an_abandoned_timeline_goes_and_the_trunk_passes_over() {
        let mut paper = Paper::line(20);
        paper.segments[19].open = false;
        // Branched in the middle of segment 7; nobody wants the old tip.
        paper.timelines[0].live = false;
        paper.timelines.push(TimelineFact { id: TimelineId(1), parent: Some((TimelineId(0), Lsn(75))), live: true });
        for i in 0..5 {
            let at = 20 + i;
            paper.segments.push(SegmentFact {
                timeline: TimelineId(1),
                ordinal: i as u32,
                first_lsn: Lsn(76 + i * 10),
                last_lsn: Lsn(85 + i * 10),
                first_time_us: at * HOUR_US,
                last_time_us: (at + 1) * HOUR_US - 1,
                bytes: 100,
                open: i == 4,
            });
        }
        paper.now_us = 25 * HOUR_US;
        let made = plan(&paper.facts());
        paper.check(&made, 0);
        assert_eq!(made.trunk, [(TimelineId(0), Some(Lsn(75))), (TimelineId(1), None)]);
        assert_eq!(made.delete, (8..20).map(|i| (TimelineId(0), i)).collect::<Vec<_>>(), "the old tip goes at once");
        assert_eq!(made.new_cutoff, Lsn(0));
        paper.window_us = 3 * HOUR_US;
        let made = plan(&paper.facts());
        paper.check(&made, 0);
        assert_eq!(made.new_cutoff, Lsn(95), "the cutoff goes on along the branch");
        // A bookmark on the old tip brings it back among what matters.
        paper.bookmarks.push(Paper::pin(150));
        let made = plan(&paper.facts());
        paper.check(&made, 0);
        assert_eq!(made.new_cutoff, Lsn(70));
        let gone = (0..7).chain(15..20).map(|i| (TimelineId(0), i)).collect::<Vec<_>>();
        assert_eq!(made.delete, gone, "before the branch and after the bookmark");
    }

    #[test]
    fn nothing_wanted_is_lost_over_the_whole_life_of_a_journal() {
        for seed in 1..400 {
            let mut draw = rng(seed);
            let mut paper = Paper::line(1);
            paper.window_us = draw(30) * HOUR_US;
            paper.window_floor_us = draw(8) * HOUR_US;
            paper.fold_segments_max = 1 + draw(6) as usize;
            paper.reserve = draw(600);
            paper.bytes_max = (draw(3) == 0).then(|| 500 + draw(3000));
            let mut current = TimelineId(0);
            for _ in 0..120 {
                paper.available = draw(2000);
                match draw(12) {
                    0..6 => {
                        // The open segment grows, is sealed, a new one begins.
                        paper.now_us += draw(2 * HOUR_US);
                        let now = paper.now_us;
                        let open = paper.segments.iter_mut().find(|s| s.open).expect("there is always an open segment");
                        open.last_lsn = Lsn(open.last_lsn.0 + draw(12));
                        open.last_time_us = now;
                        open.open = false;
                        let (ordinal, next) = (open.ordinal + 1, open.last_lsn.next());
                        paper.segments.push(SegmentFact {
                            timeline: current,
                            ordinal,
                            first_lsn: next,
                            last_lsn: next.prev(),
                            first_time_us: now,
                            last_time_us: now,
                            bytes: 20 + draw(200),
                            open: true,
                        });
                    }
                    6 => {
                        // A pin somewhere readable on the current line.
                        let tip = paper.segments.iter().find(|s| s.open).map_or(Lsn(0), |s| s.last_lsn);
                        let lsn = Lsn(paper.cutoff.0 + draw(tip.0.saturating_sub(paper.cutoff.0) + 1));
                        let pin = Pin { timeline: current, lsn };
                        match draw(3) {
                            0 => paper.bookmarks.push(pin),
                            1 => paper.leases.push(pin),
                            _ => paper.held.push(pin),
                        }
                    }
                    7 => {
                        let pins = match draw(3) {
                            0 => &mut paper.bookmarks,
                            1 => &mut paper.leases,
                            _ => &mut paper.held,
                        };
                        if !pins.is_empty() {
                            pins.swap_remove(draw(pins.len() as u64) as usize);
                        }
                    }
                    8 => {
                        // Branch off the current line and go on there; the old tip may be given up.
                        let open = paper.segments.iter_mut().find(|s| s.open).expect("there is always an open segment");
                        open.open = false;
                        let tip = open.last_lsn;
                        let begin = paper
                            .timelines
                            .iter()
                            .find(|t| t.id == current)
                            .and_then(|t| t.parent)
                            .map_or(0, |(_, b)| b.0);
                        let low = paper.cutoff.0.max(begin);
                        let at = Lsn(low + draw(tip.0.saturating_sub(low) + 1));
                        let id = TimelineId(paper.timelines.len() as u32);
                        let keep = draw(2) == 0;
                        paper.timelines.iter_mut().filter(|t| t.id == current).for_each(|t| t.live = keep);
                        paper.timelines.push(TimelineFact { id, parent: Some((current, at)), live: true });
                        paper.segments.push(SegmentFact {
                            timeline: id,
                            ordinal: 0,
                            first_lsn: at.next(),
                            last_lsn: at,
                            first_time_us: paper.now_us,
                            last_time_us: paper.now_us,
                            bytes: 50,
                            open: true,
                        });
                        current = id;
                    }
                    9 => {
                        // Give up some other line's tip.
                        let at = draw(paper.timelines.len() as u64) as usize;
                        if paper.timelines[at].id != current {
                            paper.timelines[at].live = false;
                        }
                    }
                    _ => {
                        let made = plan(&paper.facts());
                        paper.check(&made, seed);
                        // Power lost after the cutoff was persisted: the next plan asks for at least as much.
                        let mut torn = paper.clone();
                        torn.cutoff = made.new_cutoff;
                        let again = plan(&torn.facts());
                        torn.check(&again, seed);
                        for gone in &made.delete {
                            assert!(
                                again.delete.contains(gone),
                                "seed {seed}: {gone:?} is not deleted after a restart"
                            );
                        }
                        paper.execute(&made);
                    }
                }
            }
        }
    }

    #[test]
    fn a_longer_window_never_deletes_more() {
        for seed in 1..200 {
            let mut draw = rng(seed);
            let mut paper = Paper::line(1 + draw(30));
            if draw(2) == 0 {
                paper.bookmarks.push(Paper::pin(draw(paper.segments.len() as u64 * 10)));
            }
            let mut before = Lsn::MAX;
            for window in 0..35 {
                paper.window_us = window * HOUR_US;
                paper.window_floor_us = 0;
                let made = plan(&paper.facts());
                assert!(made.new_cutoff <= before, "seed {seed}: window {window}");
                before = made.new_cutoff;
            }
        }
    }

    #[test]
    fn the_forecast_follows_the_recent_rate() {
        let mut paper = Paper::line(30);
        paper.available = 700 + paper.reserve;
        let forecast = plan(&paper.facts()).forecast.expect("thirty hours are enough");
        assert!((99..=101).contains(&forecast.bytes_per_hour), "{forecast:?}");
        assert!((36..=37).contains(&forecast.hours_left), "{forecast:?}");
        assert!((6..=7).contains(&forecast.hours_to_limit), "{forecast:?}");
        // Too young to say.
        let mut young = Paper::line(1);
        young.now_us = 5 * 60 * 1_000_000;
        young.segments[0].last_time_us = young.now_us;
        assert_eq!(plan(&young.facts()).forecast, None);
        // An alarm when less fits than asked for.
        let mut tight = Paper::line(8);
        tight.available = tight.reserve;
        assert!(
            matches!(plan(&tight.facts()).pressure, Pressure::Alarm { hours_left: 7..=8 }),
            "{:?}",
            plan(&tight.facts()).pressure
        );
        // Nothing was written for a day: no division by zero, no end in sight.
        let mut idle = Paper::line(1);
        idle.segments[0].bytes = 0;
        idle.now_us = 20 * HOUR_US;
        idle.segments[0].last_time_us = idle.now_us;
        assert_eq!(plan(&idle.facts()).forecast.map(|f| f.hours_left), Some(u64::MAX));
    }

    #[test]
    fn the_lowest_priority_gives_first_and_never_below_its_floor() {
        let group = |priority, spare: &[(u64, u64)], due| Share { priority, due, spare: spare.to_vec() };
        let low = group(10, &[(1, 100), (5, 100)], 50);
        let high = group(200, &[(0, 100), (2, 100)], 30);
        let same = group(10, &[(3, 100)], 0);
        let groups = [high.clone(), low.clone(), same.clone()];
        let out = |need: u64| share_out(&groups, 1000, 1000 + need);
        assert_eq!(out(0), SharedOut { must_free: vec![30, 50, 0], missing: 0 });
        assert_eq!(out(80).must_free, [30, 50, 0], "what goes anyway is enough");
        assert_eq!(out(81).must_free, [30, 150, 0], "the oldest of the lowest priority");
        assert_eq!(out(181).must_free, [30, 150, 100], "then the next oldest of that priority");
        assert_eq!(out(281).must_free, [30, 250, 100]);
        assert_eq!(out(381).must_free, [130, 250, 100], "only then the higher one");
        assert_eq!(out(1000), SharedOut { must_free: vec![230, 250, 100], missing: 420 });
        assert_eq!(share_out(&[], 0, 10), SharedOut { must_free: vec![], missing: 10 });
    }

    #[test]
    fn what_is_shared_out_is_what_the_plans_delete() {
        for seed in 1..200 {
            let mut draw = rng(seed);
            let papers: Vec<(Paper, u8)> = (0..1 + draw(5))
                .map(|_| {
                    let mut paper = Paper::line(1 + draw(30));
                    paper.window_us = draw(40) * HOUR_US;
                    paper.window_floor_us = draw(10) * HOUR_US;
                    if draw(3) == 0 {
                        paper.bookmarks.push(Paper::pin(draw(paper.segments.len() as u64 * 10)));
                    }
                    (paper, draw(3) as u8)
                })
                .collect();
            let shares: Vec<Share> = papers.iter().map(|(paper, priority)| share(&paper.facts(), *priority)).collect();
            let reserve = draw(9000);
            let out = share_out(&shares, 500, reserve);
            let mut freed = 0;
            for ((paper, _), must_free) in papers.iter().zip(&out.must_free) {
                let made = plan(&Facts { must_free: Some(*must_free), ..paper.facts() });
                paper.check(&made, seed);
                assert_eq!(made.delete_bytes, *must_free, "seed {seed}");
                assert!(!matches!(made.pressure, Pressure::Full { .. }), "seed {seed}: asked for more than it has");
                freed += made.delete_bytes;
            }
            assert!(500 + freed + out.missing >= reserve, "seed {seed}");
        }
    }
}
