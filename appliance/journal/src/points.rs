//! Recovery points: which LSNs are offered, and which one a wish for a time, an LSN or a bookmark means.
//!
//! An LSN is a recovery point when it ends a host request (no [`WriteFlags::MORE`], and a mark in the middle of a request does
//! not end it) and no gap is open there. Gaps and bookmarks come from the marks, which every segment keeps in memory; only
//! the edges are looked up in record tables.

use crate::{
    Corruption, Damage, ReadError, ResolveError,
    format::{GapState, MarkEntry, TableEntry},
    shared::{Map, Shared},
    types::{BookmarkInfo, Gap, PointRange, Points, ResolvedPoint},
};
use model::{BookmarkName, GapReason, HistoryTime, Lsn, Mark, RecordKind, RecoveryPoint, TimelineId, WriteFlags};
use std::path::PathBuf;

/// Names offered when a bookmark is not there.
const SIMILAR_MAX: usize = 3;

/// The history of one timeline up to an LSN, as points are looked for in it.
pub struct History<'a> {
    shared: &'a Shared,
    map: &'a Map,
    timeline: TimelineId,
    end: Lsn,
    /// Stretches without a gap, in order; the first LSN of each is that of the mark that ended the gap, or the cutoff.
    regions: Vec<(Lsn, Lsn)>,
    gaps: Vec<GapSpan>,
    marks: Vec<MarkEntry>,
}

#[derive(Clone, Copy)]
struct GapSpan {
    first: Lsn,
    /// The mark that ended it; none while it lasts.
    ended: Option<Lsn>,
    first_time: HistoryTime,
    end_time: Option<HistoryTime>,
    reason: GapReason,
}

impl<'a> History<'a> {
    /// The history up to `end`, which is not past what is written.
    pub fn new(shared: &'a Shared, map: &'a Map, timeline: TimelineId, end: Lsn) -> Self {
        let segments = map.history(timeline, end);
        let first_time = segments.first().map_or(map.floor.time, |(s, _)| s.summary().first_time);
        let marks: Vec<MarkEntry> = segments.iter().flat_map(|(s, upto)| s.marks(*upto)).collect();
        let mut this = Self { shared, map, timeline, end, regions: Vec::new(), gaps: Vec::new(), marks };
        let mut state = map.floor.gap;
        let mut from = map.floor.lsn;
        let (mut gap_time, mut gap_reason) = (first_time, GapReason::InitialSync);
        if let GapState::Gap { reason, .. } = state {
            gap_reason = reason;
        }
        for entry in &this.marks {
            let next = state.after(entry.lsn, &entry.mark);
            match (state.is_consistent(), next.is_consistent()) {
                (true, false) => {
                    this.regions.push((from, entry.lsn.prev()));
                    from = entry.lsn;
                    gap_time = entry.time;
                    gap_reason = next.reason().map_or(GapReason::Requested, |(_, reason)| reason);
                }
                (false, true) => {
                    let (first, ended) = (from.max(Lsn(1)), Some(entry.lsn));
                    let end_time = Some(entry.time);
                    this.gaps.push(GapSpan { first, ended, first_time: gap_time, end_time, reason: gap_reason });
                    from = entry.lsn;
                }
                _ => {}
            }
            state = next;
        }
        if state.is_consistent() {
            this.regions.push((from, end));
        } else {
            let first = from.max(Lsn(1));
            this.gaps.push(GapSpan { first, ended: None, first_time: gap_time, end_time: None, reason: gap_reason });
        }
        // Below the cutoff nothing can be opened any more, even before the base has got there.
        this.regions.iter_mut().for_each(|(first, _)| *first = (*first).max(map.cutoff));
        this.regions.retain(|(first, last)| first <= last && *last > Lsn::ZERO);
        this.gaps.retain(|gap| gap.ended.is_none_or(|ended| ended > map.cutoff));
        this
    }

    /// Kind and MORE flag of a record; None at or below the floor and past the end.
    fn looks(&self, lsn: Lsn, page: &mut Page) -> Result<Option<(RecordKind, bool, HistoryTime)>, ReadError> {
        if lsn > self.end || lsn <= self.map.floor.lsn {
            return Ok(None);
        }
        if page.get(lsn).is_none() {
            let Some(segment) = self.map.segment_of(self.timeline, lsn) else { return Ok(None) };
            let Some((first, entries)) = self.shared.table_page(segment, lsn)? else { return Ok(None) };
            *page = Page { first, entries };
        }
        let Some(entry) = page.get(lsn) else {
            // A whole page that is too short: the trailer says that this record is in it.
            let file = self.map.segment_of(self.timeline, lsn).map_or_else(PathBuf::new, |s| s.path(&self.shared.dir));
            return Err(Corruption { file, offset: 0, what: Damage::FooterTable }.into());
        };
        Ok(Some((entry.kind, entry.flags.contains(WriteFlags::MORE), entry.time)))
    }

    /// The last request boundary at or below `lsn` that is not below `low`.
    fn boundary_before(&self, lsn: Lsn, low: Lsn) -> Result<Option<Lsn>, ReadError> {
        let mut page = Page::default();
        let mut candidate = lsn;
        let mut at = lsn;
        loop {
            if candidate < low {
                return Ok(None);
            }
            match self.looks(at, &mut page)? {
                Some((RecordKind::Mark, _, _)) => {}
                Some((_, false, _)) => return Ok(Some(candidate)),
                Some((_, true, _)) => candidate = at.prev(),
                // The floor, or the beginning of everything.
                None => {
                    let ends = self.map.floor.lsn == Lsn::ZERO || self.map.floor.at_boundary;
                    return Ok((ends && candidate >= low && candidate > Lsn::ZERO).then_some(candidate));
                }
            }
            at = at.prev();
        }
    }

    /// The first request boundary at or above `lsn` that is not above `high`.
    fn boundary_after(&self, lsn: Lsn, high: Lsn) -> Result<Option<Lsn>, ReadError> {
        if lsn > high {
            return Ok(None);
        }
        if let Some(here) = self.boundary_before(lsn, lsn)? {
            return Ok(Some(here));
        }
        let mut page = Page::default();
        let mut at = lsn.next();
        while at <= high {
            match self.looks(at, &mut page)? {
                Some((RecordKind::Mark, _, _)) | Some((_, true, _)) => at = at.next(),
                Some((_, false, _)) => return Ok(Some(at)),
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// The last recovery point at or below `lsn`.
    pub fn point_before(&self, lsn: Lsn) -> Result<Option<Lsn>, ReadError> {
        for (first, last) in self.regions.iter().rev().filter(|(first, _)| *first <= lsn) {
            if let Some(point) = self.boundary_before(lsn.min(*last), *first)? {
                return Ok(Some(point));
            }
        }
        Ok(None)
    }
    /// The first recovery point at or above `lsn`.
    pub fn point_after(&self, lsn: Lsn) -> Result<Option<Lsn>, ReadError> {
        for (first, last) in self.regions.iter().filter(|(_, last)| *last >= lsn) {
            if let Some(point) = self.boundary_after(lsn.max(*first), *last)? {
                return Ok(Some(point));
            }
        }
        Ok(None)
    }
    fn region_of(&self, lsn: Lsn) -> Option<(Lsn, Lsn)> {
        self.regions.iter().copied().find(|(first, last)| (*first..=*last).contains(&lsn))
    }
    fn gap_of(&self, lsn: Lsn) -> Option<&GapSpan> {
        self.gaps.iter().find(|g| g.first <= lsn && g.ended.is_none_or(|end| lsn < end))
    }
    pub fn time_of(&self, lsn: Lsn) -> Result<HistoryTime, ReadError> {
        if lsn == self.map.floor.lsn {
            return Ok(self.map.floor.time);
        }
        Ok(self.looks(lsn, &mut Page::default())?.map_or(self.map.floor.time, |(_, _, time)| time))
    }
    /// Whether the LSN ends a host request, gap or not.
    pub fn is_boundary(&self, lsn: Lsn) -> Result<bool, ReadError> {
        Ok(self.boundary_before(lsn, lsn)?.is_some())
    }
    fn end_time(&self) -> HistoryTime {
        self.time_of(self.end).unwrap_or(self.map.floor.time)
    }
    /// The last record at or before a time; the floor when it is none of them; None for times before the floor.
    fn lsn_at(&self, time: HistoryTime) -> Result<Option<Lsn>, ReadError> {
        let segments = self.map.history(self.timeline, self.end);
        let above = segments.partition_point(|(s, _)| s.summary().first_time <= time);
        let Some((segment, upto)) = above.checked_sub(1).map(|at| &segments[at]) else {
            let floor = &self.map.floor;
            return Ok((floor.lsn > Lsn::ZERO && floor.time <= time).then_some(floor.lsn));
        };
        // First record above the time, by halves: low is known to be at or before it.
        let (mut low, mut high) = (segment.first_lsn().0, segment.last_lsn().min(*upto).0 + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match self.shared.entry(segment, Lsn(middle))? {
                Some(entry) if entry.time <= time => low = middle,
                _ => high = middle,
            }
        }
        Ok(Some(Lsn(low)))
    }

    fn bookmarks(&self) -> Vec<BookmarkInfo> {
        self.marks
            .iter()
            .filter_map(|entry| match &entry.mark {
                Mark::Bookmark { name, consistency } => {
                    let line = self.map.chain(self.timeline, entry.lsn).first().map(|l| l.timeline)?;
                    let kept = !self.map.released.contains(&(line, entry.lsn));
                    let (name, lsn, time, consistency) = (name.clone(), entry.lsn, entry.time, *consistency);
                    kept.then_some(BookmarkInfo { name, lsn, time, consistency })
                }
                _ => None,
            })
            .collect()
    }

    pub fn points(&self) -> Points {
        let valid = self.regions.iter().filter_map(|(first, last)| {
            // An unreadable table is met again, and named, when such a point is opened; the picture stays.
            let first = self.boundary_after(*first, *last).unwrap_or(Some(*first))?;
            let last = self.boundary_before(*last, first).unwrap_or(Some(*last))?;
            let time = |lsn| self.time_of(lsn).unwrap_or(self.map.floor.time);
            Some(PointRange { first_lsn: first, last_lsn: last, first_time: time(first), last_time: time(last) })
        });
        let gaps = self.gaps.iter().map(|g| Gap {
            first_lsn: g.first,
            last_lsn: g.ended.map(Lsn::prev),
            first_time: g.first_time,
            last_time: g.end_time,
            reason: g.reason,
        });
        Points { timeline: self.timeline, valid: valid.collect(), gaps: gaps.collect(), bookmarks: self.bookmarks() }
    }

    fn found(&self, lsn: Lsn) -> Result<ResolvedPoint, ResolveError> {
        Ok(ResolvedPoint { timeline: self.timeline, lsn, time: self.time_of(lsn)? })
    }
    /// Why an LSN inside the history is no point.
    fn refusal(&self, lsn: Lsn) -> Result<ResolveError, ReadError> {
        let before = if lsn > Lsn::ZERO { self.point_before(lsn.prev())? } else { None };
        let after = self.point_after(lsn.next())?;
        Ok(match self.gap_of(lsn.max(Lsn(1))) {
            Some(_) if before.is_none() && after.is_none() => ResolveError::NeverConsistent,
            Some(gap) => ResolveError::InGap { lsn, reason: gap.reason, before, after },
            None => ResolveError::InsideRequest { lsn, before, after },
        })
    }
    /// The point at `lsn` or, with `nearest`, the last one before it that no gap parts from it.
    fn at(&self, lsn: Lsn, nearest: bool) -> Result<ResolvedPoint, ResolveError> {
        if let Some((first, _)) = self.region_of(lsn) {
            let low = if nearest { first } else { lsn };
            if let Some(point) = self.boundary_before(lsn, low)? {
                return self.found(point);
            }
        }
        Err(self.refusal(lsn)?)
    }

    pub fn resolve(&self, point: &RecoveryPoint) -> Result<ResolvedPoint, ResolveError> {
        let floor = &self.map.floor;
        match point {
            RecoveryPoint::Latest => match self.point_before(self.end)? {
                Some(lsn) => self.found(lsn),
                None => Err(ResolveError::NeverConsistent),
            },
            RecoveryPoint::Lsn(lsn) if *lsn < self.map.cutoff || *lsn == Lsn::ZERO => {
                Err(ResolveError::BeforeFloor { floor: self.map.cutoff.max(Lsn(1)), floor_time: floor.time })
            }
            RecoveryPoint::Lsn(lsn) if *lsn > self.end => {
                Err(ResolveError::AfterEnd { end: self.end, end_time: self.end_time() })
            }
            RecoveryPoint::Lsn(lsn) => self.at(*lsn, false),
            RecoveryPoint::Time(time) => {
                if self.end == floor.lsn && floor.lsn == Lsn::ZERO {
                    return Err(ResolveError::NeverConsistent);
                }
                if *time > self.end_time() {
                    return Err(ResolveError::AfterEnd { end: self.end, end_time: self.end_time() });
                }
                match self.lsn_at(*time)? {
                    Some(lsn) if lsn >= self.map.cutoff => self.at(lsn, true),
                    _ => {
                        let oldest = self.map.cutoff.max(Lsn(1));
                        Err(ResolveError::BeforeFloor { floor: oldest, floor_time: self.time_of(oldest)? })
                    }
                }
            }
            RecoveryPoint::Bookmark(name) => {
                let bookmarks = self.bookmarks();
                // Of several with one name the newest is meant.
                match bookmarks.iter().rev().find(|b| b.name == *name) {
                    Some(found) => self.at(found.lsn, true),
                    None => {
                        Err(ResolveError::NoSuchBookmark { name: name.clone(), similar: similar(name, &bookmarks) })
                    }
                }
            }
        }
    }
    /// Where a name stands, newest first.
    pub fn bookmark_places(&self, name: &BookmarkName) -> Vec<(TimelineId, Lsn)> {
        let all = self.bookmarks().into_iter().rev().filter(|b| b.name == *name);
        all.filter_map(|b| Some((self.map.chain(self.timeline, b.lsn).first()?.timeline, b.lsn))).collect()
    }
    pub fn similar_to(&self, name: &BookmarkName) -> Vec<BookmarkName> {
        similar(name, &self.bookmarks())
    }
}

/// One page of a record table, so that a walk does not read it for each step.
#[derive(Default)]
struct Page {
    first: Lsn,
    entries: Vec<TableEntry>,
}

impl Page {
    fn get(&self, lsn: Lsn) -> Option<&TableEntry> {
        self.entries.get(usize::try_from(lsn.0.checked_sub(self.first.0)?).ok()?)
    }
}

/// Names that someone may have meant: fewest differences first, and not more than a third of the name.
fn similar(name: &BookmarkName, all: &[BookmarkInfo]) -> Vec<BookmarkName> {
    let wanted: Vec<char> = name.as_str().to_lowercase().chars().collect();
    let mut near: Vec<(usize, &BookmarkName)> = all
        .iter()
        .map(|b| {
            let other: Vec<char> = b.name.as_str().to_lowercase().chars().collect();
            let inside = b.name.as_str().contains(name.as_str()) || name.as_str().contains(b.name.as_str());
            (if inside { 0 } else { distance(&wanted, &other) }, &b.name)
        })
        .filter(|(d, _)| *d <= wanted.len().div_ceil(3))
        .collect();
    near.sort();
    near.dedup();
    near.into_iter().take(SIMILAR_MAX).map(|(_, n)| n.clone()).collect()
}

/// Characters to insert, delete or change (names have at most 128).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Consistency;

    #[test]
    fn a_misspelt_bookmark_finds_its_likes() {
        let bookmark = |name: &str| BookmarkInfo {
            name: name.parse().expect("a name"),
            lsn: Lsn(1),
            time: HistoryTime(0),
            consistency: Consistency::Crash,
        };
        let all = [bookmark("before upgrade"), bookmark("nightly"), bookmark("每日")];
        let near = |name: &str| similar(&name.parse().expect("a name"), &all);
        assert_eq!(near("befor upgrade"), [all[0].name.clone()]);
        assert_eq!(near("Nightly"), [all[1].name.clone()]);
        assert_eq!(near("something else"), []);
        let chars = |s: &str| s.chars().collect::<Vec<_>>();
        assert_eq!(distance(&chars("kitten"), &chars("sitting")), 3);
        assert_eq!(distance(&chars(""), &chars("abc")), 3);
    }
}
