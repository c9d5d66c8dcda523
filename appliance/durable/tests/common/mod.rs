//! A small generator with a printed seed, so that a failure can be repeated.

// Each test binary compiles this file for itself and uses a part of it.
#![allow(dead_code)]

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % bound
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        // Never 0, so that data is never mistaken for a hole.
        (0..len).map(|_| self.below(255) as u8 + 1).collect()
    }
}
