//! Which regions of 1 MiB a run touches, so that a lookup passes over runs that cannot answer.
//!
//! A Bloom filter of at most 4 KiB per run, written with the run and kept in memory while its generation is open: at most
//! 586 runs a generation and four open generations, so below 10 MiB for a journal. A run that touches more than
//! [`REGIONS_MAX`] regions has none and is always asked: the filter could not tell anything then. A wrong "maybe" costs a
//! page, a wrong "no" cannot happen.

use super::Piece;
use model::{Extent, VolumeId};
use serde::{Deserialize, Serialize};

/// log2 of the sectors of a region (1 MiB).
const REGION_SHIFT: u32 = 11;
/// With 8 bits a region and two probes about one lookup in twenty is asked in vain.
const BITS_PER_REGION: usize = 8;
/// 32 Ki bits = 4 KiB.
pub(super) const REGIONS_MAX: usize = 4096;
/// A lookup over more regions than this asks the run at once.
const PROBES_MAX: u64 = 16;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Filter {
    /// A power of two of words.
    words: Vec<u64>,
}

impl Filter {
    pub(super) fn may_meet(&self, volume: VolumeId, extent: Extent) -> bool {
        if extent.is_empty() {
            return false;
        }
        let (first, last) = (extent.start() >> REGION_SHIFT, (extent.end() - 1) >> REGION_SHIFT);
        if last - first >= PROBES_MAX {
            return true;
        }
        (first..=last).any(|region| self.has(hash(volume, region)))
    }

    /// Whether the filter has a shape that [`FilterBuilder`] makes.
    pub(super) fn is_sound(&self) -> bool {
        self.words.len().is_power_of_two() && self.words.len() * 64 <= REGIONS_MAX * BITS_PER_REGION
    }

    fn bits(&self, hash: u64) -> [(usize, u64); 2] {
        let mask = self.words.len() * 64 - 1;
        [hash as usize & mask, (hash >> 32) as usize & mask].map(|bit| (bit / 64, 1 << (bit % 64)))
    }
    fn has(&self, hash: u64) -> bool {
        self.bits(hash).iter().all(|(word, bit)| self.words[*word] & bit != 0)
    }
    fn add(&mut self, hash: u64) {
        for (word, bit) in self.bits(hash) {
            self.words[word] |= bit;
        }
    }
}

fn hash(volume: VolumeId, region: u64) -> u64 {
    // The finaliser of splitmix64: every input bit reaches every output bit.
    let mut x = region ^ (u64::from(volume.0) << 44);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Collects regions while a run is written; its pieces come sorted.
#[derive(Default, Debug)]
pub(super) struct FilterBuilder {
    hashes: Vec<u64>,
    last: Option<(VolumeId, u64)>,
    too_many: bool,
}

impl FilterBuilder {
    pub(super) fn add(&mut self, piece: &Piece) {
        if self.too_many {
            return;
        }
        let last = (piece.end() - 1) >> REGION_SHIFT;
        let mut region = piece.lba >> REGION_SHIFT;
        if let Some((volume, done)) = self.last
            && volume == piece.volume
        {
            region = region.max(done + 1);
        }
        while region <= last {
            if self.hashes.len() == REGIONS_MAX {
                self.too_many = true;
                self.hashes = Vec::new();
                return;
            }
            self.hashes.push(hash(piece.volume, region));
            region += 1;
        }
        self.last = Some((piece.volume, last));
    }

    pub(super) fn finish(self) -> Option<Filter> {
        if self.too_many {
            return None;
        }
        let words = (self.hashes.len() * BITS_PER_REGION).div_ceil(64).max(1).next_power_of_two();
        let mut filter = Filter { words: vec![0; words] };
        self.hashes.iter().for_each(|hash| filter.add(*hash));
        Some(filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::PieceKind;

    fn piece(volume: u32, lba: u64, sectors: u32) -> Piece {
        Piece { volume: VolumeId(volume), lba, sectors, ordinal: 0, offset: 0, skip: 0, kind: PieceKind::Data }
    }

    #[test]
    fn what_was_added_is_never_denied() {
        for seed in 1..100u64 {
            let mut draw = crate::index::tests::rng(seed);
            let mut builder = FilterBuilder::default();
            let mut pieces = Vec::new();
            for volume in 0..3 {
                let mut lba = 0;
                for _ in 0..draw(1500) {
                    lba += draw(20_000);
                    let one = piece(volume, lba, 1 + draw(5000) as u32);
                    lba = one.end();
                    builder.add(&one);
                    pieces.push(one);
                }
            }
            let Some(filter) = builder.finish() else { continue };
            assert!(filter.is_sound(), "seed {seed}");
            for one in &pieces {
                let inside = Extent::new(one.lba + draw(u64::from(one.sectors)), 1);
                assert!(filter.may_meet(one.volume, inside), "seed {seed}: {one:?} denied at {inside:?}");
            }
        }
    }

    #[test]
    fn most_of_what_was_not_added_is_denied() {
        let mut builder = FilterBuilder::default();
        (0..1000).for_each(|i| builder.add(&piece(0, i * 4096, 8)));
        let filter = builder.finish().expect("1000 regions fit");
        let maybe =
            (0..10_000).filter(|i| filter.may_meet(VolumeId(0), Extent::new((i * 2 + 1) << REGION_SHIFT, 8))).count();
        assert!(maybe < 2000, "{maybe} of 10000 passed in vain");
    }

    #[test]
    fn a_run_over_too_many_regions_has_no_filter() {
        let mut builder = FilterBuilder::default();
        builder.add(&piece(0, 0, u32::MAX));
        assert_eq!(builder.finish(), None);
    }
}
