//! Comparing what a host's disk holds with what the box has, without sending it: hashes go to the box, a bit for each block comes back.
//!
//! A comparison names runs of sectors of one volume and cuts each, from its start, into blocks of one size; the last block of a run may be
//! shorter. The answer has a bit for each block in that order, lowest bit first: 1 where the box's newest image differs.
//!
//! The hash is BLAKE3, cut to 128 bits: two blocks of one disk being taken for the same by chance is out of the question (10⁻²⁰ for
//! 10⁹ blocks), and who can write to the disk at will harms only the copy of his own disk.
//!
//! Limits: see [`Comparison::check`]; whoever receives one knows the most it will have to read.

use model::{Extent, VolumeId};
use serde::{Deserialize, Serialize};

/// Blocks that a comparison may be cut into, in sectors: 4 KiB to 1 MiB.
pub const COMPARE_BLOCK_SECTORS: std::ops::RangeInclusive<u32> = 8..=2048;
/// 4 MiB of disk for each comparison: what the box holds in memory for one.
pub const COMPARE_SECTORS_MAX: u64 = 8192;
/// Runs of sectors in one comparison: half of a megabyte in granules of 64 KiB could differ in turns.
pub const COMPARE_RUNS_MAX: usize = 256;

/// The first 128 bits of BLAKE3 of a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub [u8; 16]);

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}{:02x}…", self.0[0], self.0[1])
    }
}

impl BlockHash {
    pub fn of(block: &[u8]) -> Self {
        let mut cut = [0; 16];
        cut.copy_from_slice(&blake3::hash(block).as_bytes()[..16]);
        Self(cut)
    }
}

/// What is compared.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// Given by who asks; the answer has it.
    pub id: u64,
    pub volume: VolumeId,
    pub block_sectors: u32,
    pub runs: Vec<Extent>,
    /// One for each block of each run, in order.
    pub hashes: Vec<BlockHash>,
}

/// A comparison that is not one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ComparisonError {
    #[error("blocks of {0} sectors, which is not a power of two from 8 to 2048")]
    BlockSize(u32),
    #[error("{0} runs, from 1 to {COMPARE_RUNS_MAX} are allowed")]
    Runs(usize),
    #[error("a run of {sectors} sectors at {lba}, past the end or empty")]
    Run { lba: u64, sectors: u64 },
    #[error("more than {COMPARE_SECTORS_MAX} sectors at once")]
    TooMuch,
    #[error("{had} hashes for {blocks} blocks")]
    Hashes { had: usize, blocks: usize },
}

/// The blocks of some runs, in the order of a comparison.
pub fn blocks(runs: &[Extent], block_sectors: u32) -> impl Iterator<Item = Extent> + '_ {
    let step = u64::from(block_sectors.max(1));
    runs.iter().flat_map(move |run| {
        let count = run.sectors.0.div_ceil(step);
        (0..count).map(move |i| {
            let start = run.start() + i * step;
            Extent::between(start, run.end().min(start + step))
        })
    })
}

impl Comparison {
    /// Everything but whether the volume exists; `sectors`: the volume's size.
    pub fn check(&self, sectors: model::Sectors) -> Result<(), ComparisonError> {
        if !self.block_sectors.is_power_of_two() || !COMPARE_BLOCK_SECTORS.contains(&self.block_sectors) {
            return Err(ComparisonError::BlockSize(self.block_sectors));
        }
        if self.runs.is_empty() || self.runs.len() > COMPARE_RUNS_MAX {
            return Err(ComparisonError::Runs(self.runs.len()));
        }
        let mut sum = 0u64;
        for run in &self.runs {
            if run.is_empty() || !run.fits(sectors) {
                return Err(ComparisonError::Run { lba: run.lba.0, sectors: run.sectors.0 });
            }
            sum = sum.saturating_add(run.sectors.0);
        }
        if sum > COMPARE_SECTORS_MAX {
            return Err(ComparisonError::TooMuch);
        }
        let blocks = blocks(&self.runs, self.block_sectors).count();
        if blocks != self.hashes.len() {
            return Err(ComparisonError::Hashes { had: self.hashes.len(), blocks });
        }
        Ok(())
    }

    /// The answer for which `read` fills a block; a block that cannot be read counts as different.
    pub fn answer(&self, mut read: impl FnMut(Extent, &mut [u8]) -> bool) -> Vec<u8> {
        let mut differ = vec![0u8; self.hashes.len().div_ceil(8)];
        let mut buf = Vec::new();
        for (i, (block, hash)) in blocks(&self.runs, self.block_sectors).zip(&self.hashes).enumerate() {
            buf.resize(block.bytes() as usize, 0);
            if !read(block, &mut buf) || BlockHash::of(&buf) != *hash {
                differ[i / 8] |= 1 << (i % 8);
            }
        }
        differ
    }
}

/// Whether block `i` differs; what the answer does not say counts as different.
pub fn differs(answer: &[u8], i: usize) -> bool {
    answer.get(i / 8).is_none_or(|byte| byte >> (i % 8) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_rng::Rng;
    use model::Sectors;

    /// Random disks and images: the bits are exactly the blocks that differ.
    #[test]
    fn the_answer_is_the_blocks_that_differ() {
        for seed in 1..200 {
            let mut rng = Rng::new(seed);
            let sectors = 100 + rng.below(900);
            let disk: Vec<u8> = (0..sectors * 512).map(|_| rng.below(256) as u8).collect();
            let mut image = disk.clone();
            for _ in 0..rng.below(6) {
                image[rng.below(sectors * 512) as usize] ^= 1;
            }
            let at = |e: &Extent| (e.start() * 512) as usize..(e.end() * 512) as usize;
            let mut runs = Vec::new();
            let mut from = rng.below(20);
            while from + 1 < sectors && runs.len() < 5 {
                let run = Extent::between(from, (from + 1 + rng.below(300)).min(sectors));
                from = run.end() + rng.below(50);
                runs.push(run);
            }
            let block_sectors = 8 << rng.below(6) as u32;
            let all: Vec<Extent> = blocks(&runs, block_sectors).collect();
            assert_eq!(all.iter().map(|b| b.sectors.0).sum::<u64>(), runs.iter().map(|r| r.sectors.0).sum::<u64>());
            let hashes = all.iter().map(|b| BlockHash::of(&disk[at(b)])).collect();
            let ask = Comparison { id: 1, volume: VolumeId(0), block_sectors, runs, hashes };
            ask.check(Sectors(sectors)).unwrap();
            let answer = ask.answer(|block, buf| {
                buf.copy_from_slice(&image[at(&block)]);
                true
            });
            for (i, block) in all.iter().enumerate() {
                assert_eq!(differs(&answer, i), disk[at(block)] != image[at(block)], "seed {seed} block {i}");
            }
            assert!(differs(&answer, 8 * answer.len()), "what is not answered differs");
            let none = ask.answer(|_, _| false);
            assert!((0..all.len()).all(|i| differs(&none, i)), "what cannot be read differs");
        }
    }

    #[test]
    fn what_is_no_comparison_is_refused_by_name() {
        let good = Comparison {
            id: 1,
            volume: VolumeId(0),
            block_sectors: 8,
            runs: vec![Extent::new(0, 20)],
            hashes: vec![BlockHash([0; 16]); 3],
        };
        let with = |change: fn(&mut Comparison)| {
            let mut ask = good.clone();
            change(&mut ask);
            ask.check(Sectors(10_000)).unwrap_err()
        };
        good.check(Sectors(20)).unwrap();
        assert!(matches!(good.check(Sectors(19)), Err(ComparisonError::Run { .. })));
        assert_eq!(with(|a| a.block_sectors = 12), ComparisonError::BlockSize(12));
        assert_eq!(with(|a| a.block_sectors = 0), ComparisonError::BlockSize(0));
        assert_eq!(with(|a| a.block_sectors = 4096), ComparisonError::BlockSize(4096));
        assert_eq!(with(|a| a.runs.clear()), ComparisonError::Runs(0));
        assert!(matches!(with(|a| a.runs[0] = Extent::new(u64::MAX, 2)), ComparisonError::Run { .. }));
        assert!(matches!(with(|a| a.runs[0].sectors.0 = 0), ComparisonError::Run { .. }));
        assert_eq!(with(|a| a.runs[0].sectors.0 = COMPARE_SECTORS_MAX + 1), ComparisonError::TooMuch);
        assert_eq!(with(|a| a.hashes.truncate(2)), ComparisonError::Hashes { had: 2, blocks: 3 });
    }
}
