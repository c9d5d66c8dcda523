//! The base: each volume as it was at the floor of the history.

use durable::{Disk, DiskError, DiskFile, OpenMode};
use model::{ByteLen, Extent, Lsn, SECTOR, Sectors, VolumeId};
use std::{path::{Path, PathBuf}, sync::Arc};

/// Bytes covered by one checksum of the base.
pub const BASE_BLOCK: usize = 4096;

/// Damage in the base: what is on the disk is not what a finished fold wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseCorruption {
    pub file: PathBuf,
    pub offset: u64,
    pub what: &'static str,
}

/// Why an operation on the base failed.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("the base is damaged: {} at {}: {}", .0.file.display(), .0.offset, .0.what)]
    Corruption(BaseCorruption),
    #[error("the base cannot be reached")]
    Disk(#[from] DiskError),
    #[error("volume {0} has no base")]
    NoVolume(VolumeId),
    #[error("{extent:?} is outside volume {volume} of {} sectors", size.0)]
    Outside { volume: VolumeId, extent: Extent, size: Sectors },
    /// A fold was cut short by an error of the disk; it has to be done again before this block can be read.
    #[error("a fold of volume {volume} was cut short: it must be done again")]
    FoldInterrupted { volume: VolumeId },
    #[error("the piece at sector {lba} of volume {volume} is out of order, empty or has data of the wrong length")]
    BadPiece { volume: VolumeId, lba: u64 },
}

/// What a fold writes into a stretch of the base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FoldData {
    /// Whole sectors.
    Data(Vec<u8>),
    /// This many sectors of zeroes; their room is given back.
    Zero(u64),
}

/// One stretch of a fold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoldPiece {
    pub lba: u64,
    pub data: FoldData,
}

/// The image at the floor of the window. The archive will take this one's place behind the same trait.
///
/// A fold: the caller persists "fold to LSN x has begun" in its control record, calls [`Base::fold`] for each volume with
/// `fold = x`, then persists the new floor and only then deletes segments. When it stopped anywhere between, the base is
/// opened with `interrupted = Some(x)` and the same fold is done again, whole: the segments it needs are still there.
pub trait Base: Send + Sync + std::fmt::Debug {
    /// Makes the volume's base if it is not there; grows it to `sectors` if it is smaller. Never shrinks.
    fn ensure_volume(&self, volume: VolumeId, sectors: Sectors) -> Result<(), BaseError>;
    /// Fills `buf` (whole sectors) from sector `lba` on. What no fold wrote reads as zeroes.
    fn read(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> Result<(), BaseError>;
    /// The parts of `extent` that may hold something else than zeroes, in order, disjoint.
    fn written(&self, volume: VolumeId, extent: Extent) -> Result<Vec<Extent>, BaseError>;
    /// Writes sorted, disjoint pieces and makes them durable. Runs beside reads. An item that is an error ends it.
    fn fold(
        &self,
        fold: Lsn,
        volume: VolumeId,
        pieces: &mut dyn Iterator<Item = Result<FoldPiece, BaseError>>,
    ) -> Result<FoldReport, BaseError>;
    /// Bytes that hold data (holes are not counted).
    fn bytes(&self) -> u64;
    /// Checks every block that was ever written; damage is handed to `found`, and the walk goes on.
    fn verify(&self, volume: VolumeId, found: &mut dyn FnMut(BaseCorruption)) -> Result<VerifiedBase, BaseError>;
}

/// What a fold did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FoldReport {
    pub pieces: u64,
    pub bytes_written: u64,
    pub bytes_zeroed: u64,
}

/// What a check of a base looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VerifiedBase {
    pub blocks: u64,
    pub damaged: u64,
}
