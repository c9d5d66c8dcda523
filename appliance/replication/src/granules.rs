//! One bit for each 64 KiB of a volume: the dirty map.
//!
//! 16 Mi bits (2 MiB) for each TiB. Whole words are handled at a time, so that a discard of a whole disk or the search for the next
//! dirty run costs microseconds.

use model::{Extent, Sectors};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Sectors in a granule: 64 KiB, as the capture program's own map has it.
pub const GRANULE_SECTORS: u64 = 128;

/// A set of granules of one volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GranuleMap {
    words: Vec<u64>,
    sectors: Sectors,
    granules: u64,
    count: u64,
}

/// A set as it is stored: whichever of the two forms is shorter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StoredMap {
    /// Lengths of alternating runs, the first one clear.
    Runs(Vec<u64>),
    /// The words, each with the granule of the lowest number in its lowest bit.
    Words(Vec<u64>),
}

/// A stored map that does not describe the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the stored map covers {had} granules, the volume has {expected}")]
pub struct StoredMapError {
    pub had: u64,
    pub expected: u64,
}

impl GranuleMap {
    pub fn empty(sectors: Sectors) -> Self {
        let granules = sectors.0.div_ceil(GRANULE_SECTORS);
        Self { words: vec![0; granules.div_ceil(64) as usize], sectors, granules, count: 0 }
    }
    pub fn full(sectors: Sectors) -> Self {
        let mut map = Self::empty(sectors);
        map.set_all();
        map
    }
    pub fn sectors(&self) -> Sectors {
        self.sectors
    }
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// How many granules are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }
    /// How many sectors they cover.
    pub fn covered(&self) -> Sectors {
        let tail = self.granules * GRANULE_SECTORS - self.sectors.0;
        let last = self.granules > 0 && self.get(self.granules - 1);
        Sectors(self.count * GRANULE_SECTORS - if last { tail } else { 0 })
    }
    /// The granules an extent touches, cut to the volume.
    pub fn touching(&self, extent: &Extent) -> Range<u64> {
        if extent.is_empty() {
            return 0..0;
        }
        let start = (extent.start() / GRANULE_SECTORS).min(self.granules);
        start..extent.end().div_ceil(GRANULE_SECTORS).min(self.granules)
    }
    /// The granules of which an extent holds every sector.
    pub fn inside(&self, extent: &Extent) -> Range<u64> {
        let start = extent.start().div_ceil(GRANULE_SECTORS).min(self.granules);
        let to_the_end = extent.end() >= self.sectors.0;
        let end = if to_the_end { self.granules } else { extent.end() / GRANULE_SECTORS };
        start..end.max(start)
    }
    /// The sectors of a run of granules, cut to the volume.
    pub fn extent(&self, run: &Range<u64>) -> Extent {
        Extent::between(run.start * GRANULE_SECTORS, (run.end * GRANULE_SECTORS).min(self.sectors.0))
    }
    pub fn get(&self, granule: u64) -> bool {
        self.words.get((granule / 64) as usize).is_some_and(|word| word >> (granule % 64) & 1 == 1)
    }
    /// Adds a run; says whether any of it is new.
    pub fn set(&mut self, run: Range<u64>) -> bool {
        let before = self.count;
        let mut count = self.count;
        self.each_word(run, |word, mask| {
            count += u64::from((mask & !*word).count_ones());
            *word |= mask;
        });
        self.count = count;
        count != before
    }
    pub fn clear(&mut self, run: Range<u64>) {
        let mut count = self.count;
        self.each_word(run, |word, mask| {
            count -= u64::from((mask & *word).count_ones());
            *word &= !mask;
        });
        self.count = count;
    }
    pub fn set_all(&mut self) {
        self.set(0..self.granules);
    }
    pub fn any(&self, run: Range<u64>) -> bool {
        self.count > 0 && Self::masks(self.granules, run).any(|(i, mask)| self.words[i] & mask != 0)
    }
    pub fn all(&self, run: Range<u64>) -> bool {
        Self::masks(self.granules, run).all(|(i, mask)| self.words[i] & mask == mask)
    }
    /// Adds everything in `other`, a map of the same volume.
    pub fn union(&mut self, other: &GranuleMap) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a |= b);
        self.recount();
    }
    /// Keeps only what is in `other` too.
    pub fn intersect(&mut self, other: &GranuleMap) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a &= b);
        self.recount();
    }
    /// Takes out what is in `other`, a map of the same volume.
    pub fn remove(&mut self, other: &GranuleMap) {
        self.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a &= !b);
        self.recount();
    }
    /// The first run at or after `from`, at most `most` granules of it.
    pub fn next_run(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let start = self.next(from, true)?;
        let end = self.next(start, false).unwrap_or(self.granules);
        Some(start..end.min(start.saturating_add(most)))
    }
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(at, u64::MAX)?;
            at = run.end;
            Some(run)
        })
    }

    pub fn store(&self) -> StoredMap {
        // A run's length takes one to five bytes in postcard, a word up to ten: compare by count, it is close enough.
        let mut lengths = Vec::new();
        let mut at = 0;
        for run in self.runs() {
            lengths.push(run.start - at);
            lengths.push(run.end - run.start);
            at = run.end;
            if lengths.len() > 2 * self.words.len() {
                return StoredMap::Words(self.words.clone());
            }
        }
        lengths.push(self.granules - at);
        StoredMap::Runs(lengths)
    }
    /// Reads a stored map of a volume of this size.
    pub fn load(stored: &StoredMap, sectors: Sectors) -> Result<Self, StoredMapError> {
        let mut map = Self::empty(sectors);
        let expected = map.granules;
        match stored {
            StoredMap::Runs(lengths) => {
                let had = lengths.iter().fold(0u64, |sum, len| sum.saturating_add(*len));
                if had != expected {
                    return Err(StoredMapError { had, expected });
                }
                let mut at = 0;
                for (i, len) in lengths.iter().enumerate() {
                    if i % 2 == 1 {
                        map.set(at..at + len);
                    }
                    at += len;
                }
            }
            StoredMap::Words(words) => {
                if words.len() != map.words.len() {
                    return Err(StoredMapError { had: words.len() as u64 * 64, expected });
                }
                map.words.copy_from_slice(words);
                // Bits past the end would be counted for ever and never copied.
                if let Some(last) = map.words.last_mut()
                    && !expected.is_multiple_of(64)
                {
                    *last &= (1 << (expected % 64)) - 1;
                }
                map.recount();
            }
        }
        Ok(map)
    }

    fn recount(&mut self) {
        self.count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
    }
    fn each_word(&mut self, run: Range<u64>, mut change: impl FnMut(&mut u64, u64)) {
        for (i, mask) in Self::masks(self.granules, run) {
            change(&mut self.words[i], mask);
        }
    }
    /// The words a run touches, each with the bits that belong to it.
    fn masks(granules: u64, run: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let (start, end) = (run.start.min(granules), run.end.min(granules));
        let words = if start < end { start / 64..end.div_ceil(64) } else { 0..0 };
        words.map(move |word| {
            let from = start.max(word * 64) - word * 64;
            let to = end.min(word * 64 + 64) - word * 64;
            (word as usize, (u64::MAX >> (64 - (to - from))) << from)
        })
    }
    /// The first granule at or after `from` that is in the set (`set`) or is not.
    fn next(&self, from: u64, set: bool) -> Option<u64> {
        if from >= self.granules {
            return None;
        }
        let flip = if set { 0 } else { u64::MAX };
        let mut i = (from / 64) as usize;
        let mut word = (self.words[i] ^ flip) & (u64::MAX << (from % 64));
        while word == 0 {
            i += 1;
            word = *self.words.get(i)? ^ flip;
        }
        let found = i as u64 * 64 + u64::from(word.trailing_zeros());
        (found < self.granules).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_map_agrees_with_one_flag_per_granule() {
        for seed in 1..300 {
            let mut rng = Rng::new(seed);
            let sectors = Sectors(1 + rng.below(300 * GRANULE_SECTORS));
            let granules = sectors.0.div_ceil(GRANULE_SECTORS);
            let mut map = GranuleMap::empty(sectors);
            let mut flags = vec![false; granules as usize];
            for _ in 0..40 {
                let start = rng.below(granules);
                let run = start..start + rng.below(granules - start + 1);
                let want_new = run.clone().any(|g| !flags[g as usize]);
                let add = rng.below(3) > 0;
                if add {
                    assert_eq!(map.set(run.clone()), want_new, "seed {seed}");
                } else {
                    map.clear(run.clone());
                }
                run.clone().for_each(|g| flags[g as usize] = add);
                let start = rng.below(granules);
                let probe = start..start + rng.below(granules - start + 1);
                assert_eq!(map.any(probe.clone()), probe.clone().any(|g| flags[g as usize]), "seed {seed}");
                assert_eq!(map.all(probe.clone()), probe.clone().all(|g| flags[g as usize]), "seed {seed}");
            }
            let from_map: Vec<u64> = map.runs().flatten().collect();
            let from_flags: Vec<u64> = (0..granules).filter(|g| flags[*g as usize]).collect();
            assert_eq!(from_map, from_flags, "seed {seed}");
            assert_eq!(map.count(), from_flags.len() as u64, "seed {seed}");
            let covered: u64 = map.runs().map(|run| map.extent(&run).sectors.0).sum();
            assert_eq!(map.covered().0, covered, "seed {seed}");
            assert_eq!(GranuleMap::load(&map.store(), sectors), Ok(map.clone()), "seed {seed}");
            let words = StoredMap::Words(map.words.clone());
            assert_eq!(GranuleMap::load(&words, sectors), Ok(map.clone()), "seed {seed}");
            let mut other = GranuleMap::empty(sectors);
            for g in (0..granules).filter(|_| rng.below(2) == 0) {
                other.set(g..g + 1);
            }
            map.remove(&other);
            let left: Vec<u64> = (0..granules).filter(|g| flags[*g as usize] && !other.get(*g)).collect();
            assert_eq!(map.runs().flatten().collect::<Vec<u64>>(), left, "seed {seed}");
            assert_eq!(map.count(), left.len() as u64, "seed {seed}");
        }
    }

    #[test]
    fn a_stored_map_of_another_size_is_refused() {
        let map = GranuleMap::full(Sectors(1000));
        assert!(GranuleMap::load(&map.store(), Sectors(2000)).is_err());
        assert!(GranuleMap::load(&StoredMap::Words(vec![1, 2]), Sectors(1000)).is_err());
        assert!(GranuleMap::load(&StoredMap::Runs(vec![u64::MAX, u64::MAX]), Sectors(1000)).is_err());
        let stray = GranuleMap::load(&StoredMap::Words(vec![u64::MAX]), Sectors(1000)).unwrap();
        assert_eq!(stray, map, "bits past the end are cut");
    }

    #[test]
    fn hostile_extents_are_cut_to_the_volume() {
        let map = GranuleMap::empty(Sectors(1000));
        assert_eq!(map.touching(&Extent::new(u64::MAX - 1, 1)), 8..8);
        assert_eq!(map.touching(&Extent::new(5, u64::MAX)), 0..8);
        assert_eq!(map.touching(&Extent::new(5, 0)), 0..0);
        assert_eq!(map.inside(&Extent::new(0, u64::MAX)), 0..8);
        assert_eq!(map.inside(&Extent::new(u64::MAX - 1, 1)), 8..8);
    }

    #[test]
    fn only_whole_granules_are_inside() {
        // The last granule has 104 sectors.
        let map = GranuleMap::empty(Sectors(1000));
        let inside = |start, len| map.inside(&Extent::new(start, len));
        assert_eq!(inside(0, 128), 0..1);
        assert!(inside(0, 127).is_empty() && inside(1, 128).is_empty() && inside(1, 254).is_empty());
        assert_eq!(inside(1, 255), 1..2);
        assert_eq!(inside(500, 500), 4..8);
        assert_eq!(inside(500, 499), 4..7);
        assert!(inside(897, 103).is_empty() && inside(900, 0).is_empty());
        assert_eq!(inside(896, 104), 7..8);
    }
}
