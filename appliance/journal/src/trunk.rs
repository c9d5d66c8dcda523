//! What a branch stands on: a moment of another group's journal, in the place of a base.
//!
//! A branch is a journal of its own: own folder, own writer, own recovery. A sector that was never written in it reads as it was at
//! the branch point. Nothing is copied when it is made, however large the volumes are, and the journal it came from goes on
//! taking writes of its own meanwhile.
//!
//! ```text
//! trunk's journal   1 ── 2 ── 3 ── 4 ── 5 ── 6 ──▶   the old host's writes, should it still write
//!                             │ branch point, held
//! branch's journal            └── 1 ── 2 ── 3 ──▶    what is written during a takeover or a drill
//! ```
//!
//! # Invariants
//!
//! - The branch point is in the branch's control record: without a view of just that moment the branch is not opened
//!   ([`OpenError::NeedsTrunk`](crate::OpenError)), for zeroes in the place of the trunk's data would be a lie.
//! - The trunk's control record names the branch and the moment before the branch is made: its window never passes that moment
//!   while the branch exists.
//! - A branch has no base and is never folded: everything written in it stays readable at every moment until it is deleted.
//!
//! # Power loss
//!
//! Held before made, released after deleted: what a crash leaves behind is a moment held for a branch that is not there, which
//! whoever keeps the list of branches finds and releases.
//!
//! Tests: `tests/branches`.

use crate::{
    Corruption, ReadViewError,
    base::{Base, BaseError, FoldPiece, FoldReport, VerifiedBase},
    types::Allocation,
    view::{View, ViewHandle},
};
use model::{ByteLen, Extent, Lsn, SECTOR, Sectors, VolumeId};
use std::sync::Arc;

/// A view in the place of a base.
#[derive(Debug)]
pub struct Trunk {
    view: Arc<ViewHandle>,
}

impl Trunk {
    pub fn new(view: Arc<ViewHandle>) -> Self {
        Self { view }
    }

    /// As much of the extent as the trunk's volume has: a branch's volume may have been grown.
    fn inside(view: &View, volume: VolumeId, extent: Extent) -> Extent {
        let size = view.volumes().iter().find(|v| v.id == volume).map_or(Sectors(0), |v| v.sectors);
        Extent::between(extent.start().min(size.0), extent.end().min(size.0))
    }
}

fn failed(e: ReadViewError) -> BaseError {
    match e {
        ReadViewError::Corrupt(found) => BaseError::Corruption(found),
        ReadViewError::Disk(e) => BaseError::Disk(e),
        ReadViewError::Base(e) => *e,
        other => BaseError::Source(Box::new(other)),
    }
}

impl Base for Trunk {
    fn begins_empty(&self) -> bool {
        false
    }
    fn ensure_volume(&self, _volume: VolumeId, _sectors: Sectors, _must_exist: bool) -> Result<(), BaseError> {
        Ok(())
    }
    fn read(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> Result<(), BaseError> {
        if !(buf.len() as u64).is_multiple_of(SECTOR) {
            return Err(BaseError::NotSectors { bytes: buf.len() });
        }
        let view = self.view.get();
        let inside = Self::inside(&view, volume, Extent::new(lba, buf.len() as u64 / SECTOR));
        let (there, beyond) = buf.split_at_mut(inside.bytes() as usize);
        beyond.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        view.read(volume, lba * SECTOR, there).map_err(failed)
    }
    fn read_at_once(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> bool {
        self.view.get().read_at_once(volume, lba * SECTOR, buf)
    }
    fn written(&self, volume: VolumeId, extent: Extent) -> Result<Vec<Extent>, BaseError> {
        let view = self.view.get();
        let inside = Self::inside(&view, volume, extent);
        if inside.is_empty() {
            return Ok(Vec::new());
        }
        let made_of = view.allocation(volume, inside).map_err(failed)?;
        Ok(made_of.into_iter().filter(|(_, kind)| *kind == Allocation::Data).map(|(extent, _)| extent).collect())
    }
    fn prefetch(&self, volume: VolumeId, extent: Extent) {
        // Only a hint: a read that fails says why.
        let _ = self.view.get().prefetch(volume, extent.start() * SECTOR, extent.bytes());
    }
    fn fold(
        &self,
        _fold: Lsn,
        _volume: VolumeId,
        _pieces: &mut dyn Iterator<Item = Result<FoldPiece, BaseError>>,
    ) -> Result<FoldReport, BaseError> {
        Err(BaseError::ReadOnly)
    }
    fn fold_done(&self, _fold: Lsn) {}
    fn bytes(&self) -> Result<ByteLen, BaseError> {
        Ok(ByteLen(0))
    }
    fn verify(&self, _volume: VolumeId, _found: &mut dyn FnMut(Corruption)) -> Result<VerifiedBase, BaseError> {
        // The trunk's own verification looks at it.
        Ok(VerifiedBase::default())
    }
}
