//! What is right: every version of every sector the host ever wrote.
//!
//! A sector's content is one number, its **tag**: 0 is zeroes, anything else spreads to 512 bytes by [`fill_sector`]. Slow and
//! obvious on purpose.

use model::{Extent, SECTOR, Sectors};

/// Bytes of a tag: zeroes, something that packs well, or noise.
pub(crate) fn fill_sector(tag: u64, out: &mut [u8]) {
    if tag == 0 {
        return out.fill(0);
    }
    let mut word = tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in out.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        if tag % 2 == 1 {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
        }
    }
}

pub(crate) fn fill(tags: &[u64]) -> Vec<u8> {
    let mut out = vec![0; tags.len() * SECTOR as usize];
    tags.iter().zip(out.chunks_exact_mut(SECTOR as usize)).for_each(|(tag, sector)| fill_sector(*tag, sector));
    out
}

/// Number of a request of the host, in the order it issued them; the first is 1.
pub(crate) type Request = u64;

/// The write log.
#[derive(Debug)]
pub(crate) struct WriteLog {
    /// By volume, by sector: since which request it has which tag. Before the first: 0.
    versions: Vec<Vec<Vec<(Request, u64)>>>,
}

impl WriteLog {
    pub(crate) fn new(volumes: &[Sectors]) -> Self {
        Self { versions: volumes.iter().map(|sectors| vec![Vec::new(); sectors.0 as usize]).collect() }
    }
    pub(crate) fn write(&mut self, request: Request, volume: usize, extent: Extent, tag_of: impl Fn(u64) -> u64) {
        for sector in extent.start()..extent.end() {
            self.versions[volume][sector as usize].push((request, tag_of(sector)));
        }
    }
    /// What the sector held after this request and all before it.
    pub(crate) fn tag(&self, volume: usize, sector: u64, after: Request) -> u64 {
        let versions = &self.versions[volume][sector as usize];
        match versions.partition_point(|(request, _)| *request <= after) {
            0 => 0,
            count => versions[count - 1].1,
        }
    }
}
