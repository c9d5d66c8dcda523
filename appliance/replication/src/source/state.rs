//! What a source stores, so that an agent that dies does not copy everything again.
//!
//! # Format
//!
//! Postcard of [`Stored`], then its CRC-32, little endian. `format` is 1. The caller keeps two copies and replaces the older one
//! (`durable::Twin`): a torn write must leave the one before.
//!
//! # Invariant
//!
//! At any moment the stored map holds every granule in which box and host may differ, except those whose writes capture still
//! holds ([`Action::ReleaseCapture`](crate::Action::ReleaseCapture) comes only after).

use crate::granules::{GranuleMap, StoredMap, StoredMapError};
use model::{GroupId, Sectors, SourceSeq, StreamId, VolumeId, VolumeSpec};
use serde::{Deserialize, Serialize};

const FORMAT: u16 = 1;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    pub format: u16,
    pub group: GroupId,
    pub stream: StreamId,
    /// Some copy has ended once: the group has recovery points, and sync mode holds what it promised.
    pub synced_once: bool,
    /// Highest number known to be durable on the box when this was stored.
    pub durable: SourceSeq,
    /// Stopped with everything durable and nothing dirty: the stream goes on at this number without a gap.
    pub clean: Option<SourceSeq>,
    pub volumes: Vec<StoredVolume>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct StoredVolume {
    pub spec: VolumeSpec,
    pub map: StoredMap,
}

/// A stored state that cannot be used. The caller starts a new stream and copies everything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("stored state has {0} bytes, too few for one")]
    Short(usize),
    #[error("stored state's checksum is {computed:#010x}, it says {stored:#010x}")]
    Checksum { stored: u32, computed: u32 },
    #[error("stored state cannot be understood")]
    Decode(#[source] postcard::Error),
    #[error("stored state is followed by {0} bytes that do not belong to it")]
    Trailing(usize),
    #[error("stored state has format {0}, which is not known here")]
    Format(u16),
    #[error("stored state is of group {had}, not of {wanted}")]
    OtherGroup { wanted: GroupId, had: GroupId },
    #[error("stored state has volume {volume} with {} sectors, more than any volume has", sectors.0)]
    VolumeTooLarge { volume: VolumeId, sectors: Sectors },
    #[error("dirty map of volume {volume}")]
    Map {
        volume: VolumeId,
        #[source]
        cause: StoredMapError,
    },
}

impl Stored {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = postcard::to_allocvec(self).expect("plain data into memory: nothing there can fail");
        let crc = wire::crc32(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(StateError::Short(bytes.len()))?;
        let (stored, computed) = (u32::from_le_bytes(*crc), wire::crc32(body));
        if stored != computed {
            return Err(StateError::Checksum { stored, computed });
        }
        let (state, rest) = postcard::take_from_bytes::<Self>(body).map_err(StateError::Decode)?;
        if !rest.is_empty() {
            return Err(StateError::Trailing(rest.len()));
        }
        if state.format != FORMAT {
            return Err(StateError::Format(state.format));
        }
        // Before anything is allocated by it.
        if let Some(large) = state.volumes.iter().find(|v| v.spec.sectors.0 > super::VOLUME_SECTORS_MAX) {
            return Err(StateError::VolumeTooLarge { volume: large.spec.id, sectors: large.spec.sectors });
        }
        Ok(state)
    }

    pub(super) fn new(group: GroupId, stream: StreamId) -> Self {
        Self {
            format: FORMAT,
            group,
            stream,
            synced_once: false,
            durable: SourceSeq::ZERO,
            clean: None,
            volumes: Vec::new(),
        }
    }

    /// The stored map of a volume as it is now: whatever was added, or belongs to another disk, is dirty.
    /// Also says whether the volume is the one that was stored, unchanged.
    pub(super) fn map_for(&self, now: &VolumeSpec) -> Result<(GranuleMap, bool), StateError> {
        let Some(had) = self.volumes.iter().find(|had| had.spec.id == now.id && had.spec.identity == now.identity)
        else {
            return Ok((GranuleMap::full(now.sectors), false));
        };
        let loaded =
            GranuleMap::load(&had.map, had.spec.sectors).map_err(|cause| StateError::Map { volume: now.id, cause })?;
        if had.spec.sectors == now.sectors {
            return Ok((loaded, true));
        }
        let mut map = GranuleMap::empty(now.sectors);
        for run in loaded.runs() {
            map.set(run);
        }
        let Sectors(old) = had.spec.sectors;
        if now.sectors.0 > old {
            // From the granule that held the old end: it was only partly there.
            let grown = model::Extent::between(old, now.sectors.0);
            map.set(map.touching(&grown));
        }
        Ok((map, false))
    }
}
