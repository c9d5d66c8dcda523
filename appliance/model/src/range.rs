//! Ranges of a volume, in sectors of 512 bytes: the unit every Linux block driver reports writes in.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Bytes in a sector. Disks with larger physical blocks are still addressed in this unit.
pub const SECTOR: u64 = 512;

/// A sector's number on its volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lba(pub u64);

/// A count of sectors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sectors(pub u64);

/// A count of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteLen(pub u64);

impl Lba {
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR
    }
}

impl Sectors {
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR
    }
    /// The sectors that hold `len` bytes, the last one perhaps in part.
    pub const fn covering(len: ByteLen) -> Self {
        Self(len.0.div_ceil(SECTOR))
    }
}

impl fmt::Display for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {}", UNITS[unit]) }
    }
}

/// A contiguous run of sectors of one volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Extent {
    pub lba: Lba,
    pub sectors: Sectors,
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}+{}]", self.lba.0, self.sectors.0)
    }
}

impl Extent {
    pub const fn new(lba: u64, sectors: u64) -> Self {
        Self { lba: Lba(lba), sectors: Sectors(sectors) }
    }
    /// The extent between two sector numbers; empty when `end` is not past `start`.
    pub const fn between(start: u64, end: u64) -> Self {
        Self::new(start, end.saturating_sub(start))
    }
    pub const fn start(&self) -> u64 {
        self.lba.0
    }
    /// One past the last sector. Saturates: a hostile length cannot wrap round to a small end.
    pub const fn end(&self) -> u64 {
        self.lba.0.saturating_add(self.sectors.0)
    }
    pub const fn is_empty(&self) -> bool {
        self.sectors.0 == 0
    }
    pub const fn bytes(&self) -> u64 {
        self.sectors.bytes()
    }
    pub fn intersect(&self, other: &Extent) -> Option<Extent> {
        let both = Extent::between(self.start().max(other.start()), self.end().min(other.end()));
        (!both.is_empty()).then_some(both)
    }
    pub fn contains(&self, other: &Extent) -> bool {
        self.start() <= other.start() && other.end() <= self.end()
    }
    /// Whether the whole extent lies on a volume of `size`.
    pub fn fits(&self, size: Sectors) -> bool {
        self.lba.0.checked_add(self.sectors.0).is_some_and(|end| end <= size.0)
    }
}

/// A set of sectors, kept as disjoint runs that never touch: what still has to be read, copied or looked up.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ExtentSet {
    /// start → end
    runs: BTreeMap<u64, u64>,
}

impl ExtentSet {
    pub fn new() -> Self {
        Self::default()
    }
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
    /// How many separate runs the set has.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }
    pub fn sectors(&self) -> Sectors {
        Sectors(self.runs.iter().map(|(s, e)| e - s).sum())
    }
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs.iter().map(|(s, e)| Extent::between(*s, *e))
    }
    pub fn first(&self) -> Option<Extent> {
        self.runs.first_key_value().map(|(s, e)| Extent::between(*s, *e))
    }
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let (mut start, mut end) = (extent.start(), extent.end());
        // Runs that overlap or touch are swallowed; at most one begins before us.
        if let Some((s, e)) = self.runs.range(..=start).next_back().map(|(s, e)| (*s, *e))
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        let swallowed: Vec<u64> = self.runs.range(start..=end).map(|(s, _)| *s).collect();
        for s in swallowed {
            if let Some(e) = self.runs.remove(&s) {
                end = end.max(e);
            }
        }
        self.runs.insert(start, end);
    }
    pub fn remove(&mut self, extent: &Extent) {
        if extent.is_empty() {
            return;
        }
        let (start, end) = (extent.start(), extent.end());
        let hit: Vec<(u64, u64)> =
            self.runs.range(..end).rev().take_while(|(_, e)| **e > start).map(|(s, e)| (*s, *e)).collect();
        for (s, e) in hit {
            self.runs.remove(&s);
            if s < start {
                self.runs.insert(s, start);
            }
            if e > end {
                self.runs.insert(end, e);
            }
        }
    }
    /// The parts of `extent` that are in the set, in order.
    pub fn overlap(&self, extent: &Extent) -> Vec<Extent> {
        let mut out: Vec<Extent> = self
            .runs
            .range(..extent.end())
            .rev()
            .take_while(|(_, e)| **e > extent.start())
            .filter_map(|(s, e)| Extent::between(*s, *e).intersect(extent))
            .collect();
        out.reverse();
        out
    }
    pub fn contains(&self, extent: &Extent) -> bool {
        self.overlap(extent) == [*extent]
    }
    pub fn clear(&mut self) {
        self.runs.clear();
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        extents.into_iter().for_each(|e| set.insert(e));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator with a printed seed, so that a failure can be repeated.
    fn rng(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move |below| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s % below
        }
    }

    #[test]
    fn the_set_agrees_with_one_flag_per_sector() {
        for seed in 1..200 {
            let mut draw = rng(seed);
            let mut flags = [false; 64];
            let mut set = ExtentSet::new();
            for _ in 0..60 {
                let start = draw(64);
                let extent = Extent::new(start, draw(64 - start + 1));
                let add = draw(2) == 0;
                if add {
                    set.insert(extent)
                } else {
                    set.remove(&extent)
                }
                (extent.start()..extent.end()).for_each(|i| flags[i as usize] = add);
                let from_set: Vec<u64> = set.iter().flat_map(|e| e.start()..e.end()).collect();
                let from_flags: Vec<u64> = (0..64).filter(|i| flags[*i as usize]).collect();
                assert_eq!(from_set, from_flags, "seed {seed}");
                let runs: Vec<Extent> = set.iter().collect();
                assert!(runs.windows(2).all(|w| w[0].end() < w[1].start()), "seed {seed}: runs touch: {runs:?}");
                let probe = Extent::new(draw(64), draw(20));
                let seen: u64 = set.overlap(&probe).iter().map(|e| e.sectors.0).sum();
                let want = (probe.start()..probe.end().min(64)).filter(|i| flags[*i as usize]).count() as u64;
                assert_eq!(seen, want, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_hostile_length_does_not_wrap() {
        let extent = Extent::new(u64::MAX - 3, 10);
        assert!(!extent.fits(Sectors(u64::MAX)));
        assert_eq!(extent.end(), u64::MAX);
    }

    #[test]
    fn sizes_are_printed_with_a_unit() {
        assert_eq!(ByteLen(512).to_string(), "512 B");
        assert_eq!(ByteLen(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteLen(3 << 40).to_string(), "3.0 TiB");
    }
}
