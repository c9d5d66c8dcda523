//! The control record: what must be known before a segment is read, kept in a [`Twin`].
//!
//! Body: format version (u32, little-endian), then [`ControlRecord`] in postcard; in version 2 [`Branching`] in postcard behind it. A
//! journal that is no branch and has none is written as version 1. Whoever changes a fact persists it here
//! first and acts upon it afterwards: the incarnation before the first append, the cutoff before the base is touched, the
//! floor before a segment is deleted, a branch before its first segment.
//!
//! A failed store leaves the old value or the new one on the disk. Storing again is safe, so nothing is poisoned; what
//! depended on the value simply has not happened yet.

use crate::{
    ControlError, GapState, SpecError,
    format::{self, CONTROL_VERSION_BRANCHES, FORMAT_VERSION},
};
use durable::{Disk, Twin, TwinError};
use model::{GroupId, GroupSpec, HistoryTime, Lsn, Term, TimelineId, VolumeId};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

/// Volumes in one group, so that the control record stays small.
pub const VOLUMES_MAX: usize = 1024;
/// Bytes of a volume's name or identity, and of a group's name.
pub const DESCRIPTION_MAX: usize = 1024;
/// Lines of history in one journal, dropped ones that others still branch from included.
pub const TIMELINES_MAX: usize = 1024;

/// A line of history.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TimelineRecord {
    pub id: TimelineId,
    pub parent: Option<(TimelineId, Lsn)>,
    /// False: only kept as far as others branch from it.
    pub live: bool,
    /// The highest LSN known to be durable when this record was written: a hint, never too high.
    pub durable: Lsn,
}

/// The oldest moment: what the base holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Floor {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub time: HistoryTime,
    pub gap: GapState,
    /// Whether the floor itself ends a host request.
    pub at_boundary: bool,
}

/// The moment of another group's journal that a branch goes on from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BranchPoint {
    pub group: GroupId,
    pub timeline: TimelineId,
    pub lsn: Lsn,
}

/// How this journal hangs together with others.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Branching {
    /// What was never written here reads as it was there.
    pub on: Option<BranchPoint>,
    /// Journals that stand on this one, and the moment each needs.
    pub branches: BTreeMap<GroupId, (TimelineId, Lsn)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ControlRecord {
    pub spec: GroupSpec,
    pub term: Term,
    pub incarnation: u64,
    pub timelines: Vec<TimelineRecord>,
    pub next_timeline: u32,
    /// Takes the appends.
    pub current: TimelineId,
    pub floor: Floor,
    /// Views below are refused. Above the floor while the base is being moved up to it.
    pub cutoff: Lsn,
    /// Volumes that have taken part in a fold: their base must be there.
    pub based: BTreeSet<VolumeId>,
    /// Bookmarks that were deleted.
    pub released: BTreeSet<(TimelineId, Lsn)>,
    #[serde(skip)]
    pub branching: Branching,
}

impl ControlRecord {
    pub fn new(spec: GroupSpec, term: Term) -> Self {
        let first = TimelineRecord { id: TimelineId(0), parent: None, live: true, durable: Lsn::ZERO };
        Self {
            spec,
            term,
            incarnation: 0,
            timelines: vec![first],
            next_timeline: 1,
            current: TimelineId(0),
            floor: Floor::default(),
            cutoff: Lsn::ZERO,
            based: BTreeSet::new(),
            released: BTreeSet::new(),
            branching: Branching::default(),
        }
    }
    pub fn timeline(&self, id: TimelineId) -> Option<&TimelineRecord> {
        self.timelines.iter().find(|t| t.id == id)
    }
    pub fn timeline_mut(&mut self, id: TimelineId) -> Option<&mut TimelineRecord> {
        self.timelines.iter_mut().find(|t| t.id == id)
    }
    fn encode(&self) -> Vec<u8> {
        let branching = (self.branching != Branching::default()).then_some(&self.branching);
        let version = if branching.is_some() { CONTROL_VERSION_BRANCHES } else { FORMAT_VERSION };
        let mut body = version.to_le_bytes().to_vec();
        body.extend_from_slice(&postcard::to_stdvec(self).expect("a control record encodes into memory"));
        if let Some(branching) = branching {
            body.extend_from_slice(&postcard::to_stdvec(branching).expect("a map encodes into memory"));
        }
        body
    }
    fn decode(body: &[u8]) -> Result<Self, ControlError> {
        let (version, rest) = body.split_first_chunk::<4>().ok_or(ControlError::Damaged)?;
        let found = u32::from_le_bytes(*version);
        if !(FORMAT_VERSION..=CONTROL_VERSION_BRANCHES).contains(&found) {
            return Err(ControlError::Version { found, known: CONTROL_VERSION_BRANCHES });
        }
        let (mut this, behind): (Self, &[u8]) = postcard::take_from_bytes(rest).map_err(|_| ControlError::Damaged)?;
        if found >= CONTROL_VERSION_BRANCHES {
            this.branching = postcard::from_bytes(behind).map_err(|_| ControlError::Damaged)?;
        }
        if this.timeline(this.current).is_none() || this.cutoff < this.floor.lsn {
            return Err(ControlError::Damaged);
        }
        // Parents come before their children: a chain always ends.
        let in_order = this.timelines.windows(2).all(|w| w[0].id < w[1].id)
            && this.timelines.iter().all(|t| t.parent.is_none_or(|(p, _)| p < t.id));
        if !in_order || this.timelines.iter().any(|t| t.id.0 >= this.next_timeline) {
            return Err(ControlError::Damaged);
        }
        check_spec(&this.spec)?;
        Ok(this)
    }
}

/// Refuses descriptions a journal cannot keep.
pub fn check_spec(spec: &GroupSpec) -> Result<(), SpecError> {
    if spec.volumes.len() > VOLUMES_MAX {
        return Err(SpecError::TooManyVolumes { given: spec.volumes.len(), max: VOLUMES_MAX });
    }
    let mut seen = BTreeSet::new();
    for volume in &spec.volumes {
        if !seen.insert(volume.id) {
            return Err(SpecError::DoubleVolume(volume.id));
        }
        let len = volume.name.len().max(volume.identity.len());
        if len > DESCRIPTION_MAX {
            return Err(SpecError::LongDescription { volume: volume.id, len, max: DESCRIPTION_MAX });
        }
    }
    Ok(())
}

impl From<TwinError> for ControlError {
    fn from(e: TwinError) -> Self {
        match e {
            TwinError::TooBig { len } => Self::TooBig { len, max: durable::TWIN_BODY_MAX },
            TwinError::Disk(e) => Self::Disk(e),
            other => Self::Twin(other),
        }
    }
}

/// The control record and where it lies. One lock: stores are rare and short.
#[derive(Debug)]
pub struct Control {
    disk: Arc<dyn Disk>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    record: ControlRecord,
    twin: Twin,
}

impl Control {
    pub fn create(disk: Arc<dyn Disk>, dir: &Path, record: ControlRecord) -> Result<Self, ControlError> {
        let twin = Twin::create(&*disk, dir, format::CONTROL_NAME, &record.encode())?;
        Ok(Self { disk, inner: Mutex::new(Inner { record, twin }) })
    }
    /// None when there is no journal.
    pub fn load(disk: Arc<dyn Disk>, dir: &Path) -> Result<Option<Self>, ControlError> {
        let Some((twin, body)) = Twin::load(&*disk, dir, format::CONTROL_NAME)? else { return Ok(None) };
        let record = ControlRecord::decode(&body)?;
        Ok(Some(Self { disk, inner: Mutex::new(Inner { record, twin }) }))
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
    pub fn record(&self) -> ControlRecord {
        self.lock().record.clone()
    }
    /// What was wrong with one copy, in words; the next store repairs it.
    pub fn fault(&self) -> Option<String> {
        self.lock().twin.fault().map(ToString::to_string)
    }
    /// Changes the record and makes the change durable; on an error the record in memory stays as it was.
    pub fn update(&self, change: impl FnOnce(&mut ControlRecord)) -> Result<(), ControlError> {
        let mut inner = self.lock();
        let mut next = inner.record.clone();
        change(&mut next);
        if next == inner.record && inner.twin.fault().is_none() {
            return Ok(());
        }
        inner.twin.store(&*self.disk, &next.encode())?;
        inner.record = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{GroupId, GroupPolicy, Sectors, VolumeId, VolumeSpec};

    fn spec() -> GroupSpec {
        let volume = |id| VolumeSpec {
            id: VolumeId(id),
            name: format!("/dev/sd{id}"),
            sectors: Sectors(100),
            identity: String::new(),
        };
        GroupSpec {
            id: GroupId([3; 16]),
            name: "db".into(),
            host: None,
            volumes: vec![volume(1), volume(2)],
            policy: GroupPolicy::default(),
        }
    }

    #[test]
    fn a_record_reads_back_and_an_impossible_one_is_refused() {
        let mut record = ControlRecord::new(spec(), Term(4));
        record.released.insert((TimelineId(0), Lsn(9)));
        assert_eq!(ControlRecord::decode(&record.encode()).expect("its own bytes"), record);
        let bytes = record.encode();
        for len in 0..bytes.len() {
            assert!(ControlRecord::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        let mut newer = bytes.clone();
        newer[0] = 3;
        assert!(matches!(ControlRecord::decode(&newer), Err(ControlError::Version { found: 3, .. })));
        let mut branch = record.clone();
        branch.branching.on = Some(BranchPoint { group: GroupId([8; 16]), timeline: TimelineId(2), lsn: Lsn(77) });
        branch.branching.branches.insert(GroupId([9; 16]), (TimelineId(0), Lsn(5)));
        let bytes = branch.encode();
        assert_eq!(bytes[0], 2);
        assert_eq!(ControlRecord::decode(&bytes).expect("its own bytes"), branch);
        for len in 0..bytes.len() {
            assert!(ControlRecord::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        let mut loops = record.clone();
        loops.timelines[0].parent = Some((TimelineId(0), Lsn(1)));
        assert!(matches!(ControlRecord::decode(&loops.encode()), Err(ControlError::Damaged)));
        let mut double = record;
        double.spec.volumes[1].id = VolumeId(1);
        assert!(matches!(ControlRecord::decode(&double.encode()), Err(ControlError::Spec(SpecError::DoubleVolume(_)))));
    }
}
