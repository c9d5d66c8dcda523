//! What a test's writer does to a block device, and what the device must then hold: computed again by whoever checks.
//!
//! A writer has a seed and [`SLOTS`] blocks of its own. Its write number `n` (from 1) goes to a slot drawn from the seed, with content made
//! of seed and number, and is begun only when write `n - 1` was acknowledged. So the state after `n` writes is known whole, and a device
//! that lost power holds exactly the state after some number of writes.

use crate::Draw;
use anyhow::{Result, bail};

pub const BLOCK: usize = 4096;
/// Few, so that most writes are overwrites: a lost one shows as an old one.
pub const SLOTS: u64 = 64;

/// A writer's sequence of slots.
#[derive(Clone, Debug)]
pub struct Sequence {
    seed: u64,
    draw: Draw,
    number: u64,
}

impl Sequence {
    pub fn new(seed: u64) -> Self {
        Self { seed, draw: Draw::new(seed), number: 0 }
    }
    /// The next write: its number, its slot.
    pub fn next_write(&mut self) -> (u64, u64) {
        self.number += 1;
        (self.number, self.draw.below(SLOTS))
    }
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

/// The content of write `number`: says of itself what it is, and fills the rest with what only it holds.
pub fn content(seed: u64, number: u64, slot: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    Draw::new(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(&mut block[24..]);
    for (at, word) in [seed, number, slot].into_iter().enumerate() {
        block[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    block
}

/// Which write a block holds; 0: none yet (zeroes).
fn number_in(seed: u64, slot: u64, block: &[u8]) -> Result<u64> {
    if block.iter().all(|b| *b == 0) {
        return Ok(0);
    }
    let mut word = [0; 8];
    word.copy_from_slice(&block[8..16]);
    let number = u64::from_le_bytes(word);
    if block != content(seed, number, slot) {
        bail!("seed {seed}: slot {slot} holds neither zeroes nor write {number} whole");
    }
    Ok(number)
}

/// After how many writes a writer's area (its slots in order) looks as it does; an error if after none.
pub fn writes_in(seed: u64, area: &[u8]) -> Result<u64> {
    let mut held = Vec::new();
    for (slot, block) in area.chunks_exact(BLOCK).enumerate() {
        held.push(number_in(seed, slot as u64, block)?);
    }
    let newest = held.iter().copied().max().unwrap_or(0);
    let mut expected = vec![0; held.len()];
    let mut sequence = Sequence::new(seed);
    for _ in 0..newest {
        let (number, slot) = sequence.next_write();
        expected[slot as usize] = number;
    }
    if let Some(slot) = (0..held.len()).find(|i| held[*i] != expected[*i]) {
        bail!(
            "seed {seed}: write {newest} is there, but slot {slot} holds write {} instead of {}",
            held[slot],
            expected[slot]
        );
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area_after(seed: u64, writes: u64) -> Vec<u8> {
        let mut area = vec![0; BLOCK * SLOTS as usize];
        let mut sequence = Sequence::new(seed);
        for _ in 0..writes {
            let (number, slot) = sequence.next_write();
            let at = slot as usize * BLOCK;
            area[at..at + BLOCK].copy_from_slice(&content(seed, number, slot));
        }
        area
    }

    #[test]
    fn every_prefix_is_known_and_nothing_else_passes() {
        for writes in [0, 1, 63, 500] {
            assert_eq!(writes_in(7, &area_after(7, writes)).unwrap(), writes);
        }
        let mut sequence = Sequence::new(7);
        let slots: Vec<u64> = (0..500).map(|_| sequence.next_write().1).collect();
        let (old, mut lost) = (area_after(7, 400), area_after(7, 500));
        // The newest write to some slot other than the last one written is taken back.
        let slot = (0..SLOTS).find(|s| *s != slots[499] && slots[400..].contains(s)).unwrap() as usize * BLOCK;
        lost[slot..slot + BLOCK].copy_from_slice(&old[slot..slot + BLOCK]);
        assert!(writes_in(7, &lost).is_err(), "a write lost in the middle");
        let mut torn = area_after(7, 500);
        torn[slots[499] as usize * BLOCK + 2000] ^= 1;
        assert!(writes_in(7, &torn).is_err(), "a torn block");
        assert!(writes_in(8, &area_after(7, 5)).is_err(), "another writer's");
    }
}
