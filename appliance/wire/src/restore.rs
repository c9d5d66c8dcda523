//! What box and rescue agent say to each other when a machine gets its disks back. The machines that say it are in `replication::restore`.
//!
//! All of it is in version [`VERSION_RESTORE`](crate::VERSION_RESTORE) and goes over a connection of its own
//! ([`Purpose::Restore`](crate::Purpose)). The box leads: the target looks, writes and tells what it has; it decides nothing but what it refuses.
//!
//! ```text
//! agent                                                box
//!   Hello{Restore} ─────────────────────────────────▶
//!                  ◀───────────────────────────────── HelloAck
//!   RestoreDisks, and again when they change ───────▶
//!                  ◀───────────────────────────────── RestoreOpen        these disks, exclusively
//!   RestoreOpened{credit} ──────────────────────────▶
//!                  ◀───────────────────────────────── RestoreLook        hash these blocks
//!   RestoreLooked ──────────────────────────────────▶
//!                  ◀───────────────────────────────── records: what differs, numbered from 1; Flush where it must be durable
//!   Ack{written, durable, credit} ──────────────────▶
//!                  ◀───────────────────────────────── RestoreFetch       only where old data is kept
//!   RestoreFetched ─────────────────────────────────▶
//!                  ◀───────────────────────────────── RestoreEnd{reboot}
//!   RestoreEnded ───────────────────────────────────▶
//! ```
//!
//! # What the box may make a target do
//!
//! Read and overwrite whole disks that nothing on the machine uses, and that its operator did not keep from it with `--allow`; reboot it
//! afterwards. Nothing else: no command and no file crosses the network.

use crate::compare::{Comparison, ComparisonError};
use model::{ByteLen, Extent, Sectors, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Disks of one target.
pub const TARGET_DISKS_MAX: usize = 128;
/// The longest text about one of them.
pub const TARGET_TEXT_MAX: usize = 256;

/// Which restore; eight hexadecimal digits before people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct RestoreId(pub u32);

impl fmt::Display for RestoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// A whole disk of a machine that waits for a restore.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TargetDisk {
    /// Its node: `/dev/sda`.
    pub path: String,
    pub bytes: ByteLen,
    pub model: String,
    pub serial: String,
    /// As a protected volume's is written, to find the same disk again.
    pub identity: String,
    /// What lies on it, in words; none: nothing that is known.
    pub holds: Option<String>,
    /// Who uses it, in words; such a disk is not written.
    pub in_use: Option<String>,
}

/// A disk that is to be written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestoreDisk {
    /// What it is called in looks and records of this restore.
    pub disk: VolumeId,
    pub path: String,
    /// How much of it is written: it must not be smaller.
    pub sectors: Sectors,
}

/// Blocks to be hashed, cut as those of a [`Comparison`] are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Look {
    /// The answer has it.
    pub id: u64,
    pub disk: VolumeId,
    pub block_sectors: u32,
    pub runs: Vec<Extent>,
}

impl Look {
    /// What [`Comparison::check`] checks, before anything is read; answers how many hashes are due.
    pub fn check(&self, sectors: Sectors) -> Result<usize, ComparisonError> {
        let mut sum = 0u64;
        // Counted without walking: a run may be as long as it says.
        let due: u64 = self
            .runs
            .iter()
            .map(|run| run.sectors.0.div_ceil(u64::from(self.block_sectors.max(1))))
            .fold(0, u64::saturating_add);
        for run in &self.runs {
            sum = sum.saturating_add(run.sectors.0);
        }
        if sum > crate::COMPARE_SECTORS_MAX {
            return Err(ComparisonError::TooMuch);
        }
        let due = usize::try_from(due).map_err(|_| ComparisonError::TooMuch)?;
        let asked = Comparison {
            id: self.id,
            volume: self.disk,
            block_sectors: self.block_sectors,
            runs: self.runs.clone(),
            hashes: vec![crate::BlockHash([0; 16]); due],
        };
        asked.check(sectors)?;
        Ok(due)
    }
}

/// What the operator at the target is shown.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestoreProgress {
    /// In words.
    pub doing: String,
    pub done_bytes: ByteLen,
    pub total_bytes: ByteLen,
    pub shipped_bytes: ByteLen,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_bounded_before_anything_is_read() {
        let look = |block_sectors, runs| Look { id: 1, disk: VolumeId(0), block_sectors, runs };
        let size = Sectors(100_000);
        assert_eq!(look(128, vec![Extent::new(0, 256), Extent::new(512, 130)]).check(size), Ok(4));
        assert_eq!(look(128, vec![]).check(size), Err(ComparisonError::Runs(0)));
        assert_eq!(look(8, vec![Extent::new(0, u64::MAX)]).check(size), Err(ComparisonError::TooMuch));
        assert_eq!(
            look(8, vec![Extent::new(u64::MAX, 1)]).check(size),
            Err(ComparisonError::Run { lba: u64::MAX, sectors: 1 })
        );
        assert_eq!(look(0, vec![Extent::new(0, 8)]).check(size), Err(ComparisonError::BlockSize(0)));
        assert_eq!(
            look(8, vec![Extent::new(99_999, 2)]).check(size),
            Err(ComparisonError::Run { lba: 99_999, sectors: 2 })
        );
        assert_eq!(look(8, vec![Extent::new(0, 8); 257]).check(size), Err(ComparisonError::Runs(257)));
    }
}
