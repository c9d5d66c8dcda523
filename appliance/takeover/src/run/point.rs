//! Which moment is taken. Of several groups it is one moment of all, by their host's clock or by a bookmark that each of them has.
//!
//! Each group is an order of its own: an LSN says nothing of another group's. A bookmark of several groups was set in one after the other: that
//! it means one moment is believed as long as that took no longer than [`BOOKMARK_SPREAD_MAX`].

use super::{Driver, Hands, HandsError, Member, Stop};
use crate::{plan::PointRule, state::PointTaken};
use journal::ResolvedPoint;
use model::{BookmarkName, RecoveryPoint};
use std::time::Duration;

/// Between the first and the last of several groups' bookmarks of one name: each may wait for its file system, or for its stream.
pub const BOOKMARK_SPREAD_MAX: Duration = Duration::from_secs(60);

/// Refuses a moment that cannot be one of all these groups.
///
/// # Errors
///
/// An LSN, and more than one group.
pub fn one_moment(at: &RecoveryPoint, members: &[Member]) -> Result<(), HandsError> {
    let RecoveryPoint::Lsn(lsn) = at else { return Ok(()) };
    if members.len() < 2 {
        return Ok(());
    }
    let names: Vec<&str> = members.iter().map(|m| m.name.as_str()).collect();
    let text = format!(
        "LSN {} is a position in one group's history, and these are {} groups: {}",
        lsn.0,
        members.len(),
        names.join(", ")
    );
    Err(HandsError::new(text, "give a time, or a bookmark that each of them has"))
}

/// Refuses a bookmark that was not set in all groups together.
fn close_enough(name: &BookmarkName, found: &[(Member, ResolvedPoint)]) -> Result<(), HandsError> {
    let first = found.iter().min_by_key(|(_, at)| at.time);
    let last = found.iter().max_by_key(|(_, at)| at.time);
    let (Some((early, from)), Some((late, to))) = (first, last) else { return Ok(()) };
    let apart = Duration::from_micros(to.time.0.saturating_sub(from.time.0));
    if apart <= BOOKMARK_SPREAD_MAX {
        return Ok(());
    }
    let text = format!(
        "the bookmark {:?} is no moment of all groups: {} has it {} s before {}",
        name.as_str(),
        early.name,
        apart.as_secs(),
        late.name
    );
    Err(HandsError::new(text, "give a time; `holdfast bookmark create --host` sets one in all of them"))
}

impl<H: Hands> Driver<'_, H> {
    /// The moment of each group, as it would be taken now.
    pub(super) fn moments(&self) -> Result<Vec<(Member, ResolvedPoint)>, HandsError> {
        let members = self.hands.members(&self.state.plan.subject)?;
        let wish = match (&self.state.at, self.state.plan.point) {
            (Some(at), _) => at.clone(),
            (None, PointRule::Latest) => RecoveryPoint::Latest,
            (None, PointRule::Bookmark) => self.hands.newest_bookmark(&members)?,
        };
        one_moment(&wish, &members)?;
        let found: Result<Vec<_>, HandsError> =
            members.into_iter().map(|member| Ok((member.clone(), self.hands.resolve(member.id, &wish)?))).collect();
        let found = found?;
        if let RecoveryPoint::Bookmark(name) = &wish {
            close_enough(name, &found)?;
        }
        Ok(found)
    }

    /// What was asked for is there, or nothing is touched. The newest moment is whatever it is when the host has stopped.
    pub(super) fn check_point(&self) -> Result<(), HandsError> {
        let newest = matches!(
            (&self.state.at, self.state.plan.point),
            (Some(RecoveryPoint::Latest), _) | (None, PointRule::Latest)
        );
        // A drill that is promoted has its moment.
        if newest || !self.state.points.is_empty() { Ok(()) } else { self.moments().map(drop) }
    }

    pub(super) fn choose(&mut self) -> Result<String, Stop> {
        if self.state.points.is_empty() {
            let mut points = Vec::new();
            for (member, at) in self.moments()? {
                points.push(PointTaken {
                    branch: self.hands.fresh_group_id()?,
                    branch_name: format!("{} of {}", self.state.id, member.name),
                    group: member.id,
                    group_name: member.name,
                    timeline: at.timeline.0,
                    lsn: at.lsn.0,
                    time_us: at.time.0,
                });
            }
            let oldest = points.iter().map(|p| p.time_us).min().unwrap_or(0);
            self.state.measured.point_age_ms = Some(self.state.begun_us.saturating_sub(oldest) / 1000);
            self.state.points = points;
            // Kept before anything is made of it.
            self.hands.keep(&self.state)?;
        }
        let list: Vec<String> =
            self.state.points.iter().map(|p| format!("{} at LSN {}", p.group_name, p.lsn)).collect();
        Ok(list.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{GroupId, HistoryTime, Lsn, TimelineId};

    fn member(n: u8) -> Member {
        Member { id: GroupId([n; 16]), name: format!("g{n}") }
    }

    #[test]
    fn a_bookmark_set_at_different_times_is_no_moment_of_all() {
        let name: BookmarkName = "before".parse().unwrap();
        let at = |n: u8, seconds: u64| {
            let time = HistoryTime(1_000_000 * (1_790_000_000 + seconds));
            (member(n), ResolvedPoint { timeline: TimelineId(0), lsn: Lsn(5), time })
        };
        assert!(close_enough(&name, &[]).is_ok());
        assert!(close_enough(&name, &[at(1, 60), at(2, 0), at(3, 59)]).is_ok());
        let refused = close_enough(&name, &[at(1, 61), at(2, 0), at(3, 59)]).unwrap_err();
        assert!(refused.text.contains("g2 has it 61 s before g1"), "{refused}");
    }

    #[test]
    fn an_lsn_is_of_one_group() {
        let (one, two) = (vec![member(1)], vec![member(1), member(2)]);
        assert!(one_moment(&RecoveryPoint::Lsn(Lsn(7)), &one).is_ok());
        let refused = one_moment(&RecoveryPoint::Lsn(Lsn(7)), &two).unwrap_err();
        assert!(refused.text.contains("2 groups: g1, g2") && refused.remedy.contains("give a time"), "{refused}");
        assert!(one_moment(&RecoveryPoint::Time(HistoryTime(7)), &two).is_ok());
        assert!(one_moment(&RecoveryPoint::Latest, &two).is_ok());
    }
}
