//! Bytes shared with `legacy.bpf.c`, apart from what both capture programs share. Change both.

use aya::Pod;

/// Words of a request that calibration is shown, and bytes of what it points to.
pub const LOOK_WORDS: usize = 32;
pub const PEEK_BYTES: usize = 512;
/// Granules in one value of the dirty map.
pub const CELL_GRANULES: usize = 4096;
/// Values in one piece of it.
pub const CELLS: u32 = 128;
/// Pieces; there are two of each.
pub const CHUNKS: u32 = 32768;
pub const DEFERRED: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Config {
    pub vmemmap: u64,
    pub direct: u64,
    pub page_size: u64,
    pub ring_bytes: u64,
    pub sector: u32,
    pub len: u32,
    pub cmd: u32,
    pub bio: u32,
    pub iter: u32,
    pub vec: u32,
    pub disk: u32,
    pub by_queue: u32,
    pub want_sector: u64,
    pub magic: u64,
    pub pfn: u64,
    pub skip_gib: u64,
    pub hops: u32,
    pub hop: [u32; 3],
    pub from: u32,
    pub pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Peek {
    pub hits: u64,
    pub page: u64,
    pub direct: u64,
    pub pad: u64,
    pub request: [u64; LOOK_WORDS],
    pub data: [u8; PEEK_BYTES],
}

impl Default for Peek {
    fn default() -> Self {
        Self { hits: 0, page: 0, direct: 0, pad: 0, request: [0; LOOK_WORDS], data: [0; PEEK_BYTES] }
    }
}

/// `struct state`: the counts, and what only the kernel half uses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct State {
    pub counts: super::perf::Counts,
    pub busy: u32,
    pub depth: u32,
    pub waiting: u64,
    pub deferred: [[u64; 6]; DEFERRED],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub granule: [u8; CELL_GRANULES],
}

// SAFETY: plain integers without padding, any bytes are a value.
unsafe impl Pod for Config {}
// SAFETY: as above.
unsafe impl Pod for Peek {}
// SAFETY: as above.
unsafe impl Pod for State {}
// SAFETY: as above.
unsafe impl Pod for Cell {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes that clang gives the same structs in `legacy.bpf.c`.
    #[test]
    fn the_layout_is_that_of_the_kernel_half() {
        assert_eq!(size_of::<Config>(), 32 + 32 + 32 + 24);
        assert_eq!(size_of::<Peek>(), 32 + 8 * LOOK_WORDS + PEEK_BYTES);
        assert_eq!(size_of::<State>(), 24 + 8 + 8 + 48 * DEFERRED);
        assert_eq!(size_of::<Cell>() as u64 * u64::from(CELLS), 1 << 19);
    }
}
