//! Bytes shared with `capture.bpf.c`. Change both, and [`ABI`].

use aya::Pod;

/// Grows with every change of what a pinned kernel half and another version of the agent would understand differently.
pub const ABI: u64 = 4;
/// First cell of `meta`, with [`ABI`]: "HFBPF" in ASCII.
pub const META_MAGIC: u64 = 0x4846_4250_4600_0000;
/// Cells of `meta`.
pub const META_LAYOUT: u32 = 0;
pub const META_RING_BYTES: u32 = 1;
pub const META_NEXT_ID: u32 = 2;
/// Losses that have been confirmed.
pub const META_LOSSES: u32 = 3;
/// Long losses (`big`), over all CPUs, that have been confirmed.
pub const META_BIG: u32 = 4;
/// Set last: the pinned maps are whole.
pub const META_COMPLETE: u32 = 5;

pub const CHUNK: usize = 4096;
pub const LARGE: usize = 65536;
pub const MAX_TARGETS: usize = 64;
pub const MAX_RANGES: usize = 8;
pub const MAX_SKIPS: usize = 256;
pub const GRANULE_BYTES: u64 = 65536;
pub const CELLS_PER_CHUNK: u32 = 65536;
pub const GRANULES_PER_CHUNK: u64 = CELLS_PER_CHUNK as u64 * 8;
pub const DIRTY_CHUNKS: u32 = 32768;
pub const BIG_LEN: usize = 512;

pub const E_DATA: u32 = 1;
pub const E_FIRST: u32 = 2;
pub const E_LAST: u32 = 4;
pub const E_FUA: u32 = 8;
pub const E_PREFLUSH: u32 = 16;
pub const E_COMPLETE: u32 = 32;
pub const E_FAULT: u32 = 64;
pub const E_MARKED: u32 = 128;
pub const E_OP_SHIFT: u32 = 16;

pub const OP_WRITE: u32 = 1;
pub const OP_FLUSH: u32 = 2;
pub const OP_DISCARD: u32 = 3;
pub const OP_SECURE_ERASE: u32 = 5;
pub const OP_WRITE_ZEROES: u32 = 9;

/// Of a target: what becomes of its writes.
pub const MODE_DATA: u32 = 0;
pub const MODE_MARKS: u32 = 1;

pub const EVENT_BYTES: usize = 48;

/// One record's head as the kernel half wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    pub mono_ns: u64,
    pub sector: u64,
    pub rq: u64,
    pub len: u32,
    pub total: u32,
    pub lost: u32,
    pub target: u32,
    pub flags: u32,
    pub error: i32,
}

impl Event {
    /// None when the record is too short to be one.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let head: &[u8; EVENT_BYTES] = bytes.get(..EVENT_BYTES)?.try_into().ok()?;
        let quad = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        Some(Self {
            mono_ns: quad(0),
            sector: quad(8),
            rq: quad(16),
            len: word(24),
            total: word(28),
            lost: word(32),
            target: word(36),
            flags: word(40),
            error: word(44) as i32,
        })
    }
    pub fn op(&self) -> u32 {
        self.flags >> E_OP_SHIFT
    }
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
    #[cfg(test)]
    pub fn write(&self, out: &mut Vec<u8>) {
        for quad in [self.mono_ns, self.sector, self.rq] {
            out.extend_from_slice(&quad.to_ne_bytes());
        }
        for word in [self.len, self.total, self.lost, self.target, self.flags, self.error as u32] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TargetValue {
    pub id: u32,
    pub ranges_len: u32,
    pub skips_len: u32,
    pub first_chunk: u32,
    pub granules: u64,
    pub by_bio: u32,
    pub mode: u32,
    pub ranges: [Span; MAX_RANGES],
    /// Sorted, and apart from each other: the kernel half looks by halves.
    pub skips: [Span; MAX_SKIPS],
}

impl Default for TargetValue {
    fn default() -> Self {
        let none = Span::default();
        Self {
            id: 0,
            ranges_len: 0,
            skips_len: 0,
            first_chunk: 0,
            granules: 0,
            by_bio: 0,
            mode: MODE_DATA,
            ranges: [none; MAX_RANGES],
            skips: [none; MAX_SKIPS],
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Big {
    pub count: u64,
    pub range: [BigRange; BIG_LEN],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BigRange {
    pub target: u64,
    pub sector: u64,
    pub sectors: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct CountersValue {
    pub requests: u64,
    pub bytes: u64,
    pub drops: u64,
    pub drop_bytes: u64,
    pub faults: u64,
    pub truncated: u64,
    pub passthrough: u64,
    pub unknown: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct CalibrationValue {
    pub hits: u64,
    pub page: u64,
    pub direct: u64,
    pub offset: u64,
}

// SAFETY: plain integers without padding (every struct is a run of u32 pairs and u64), any bytes are a value.
unsafe impl Pod for TargetValue {}
// SAFETY: as above.
unsafe impl Pod for Big {}
// SAFETY: as above.
unsafe impl Pod for CountersValue {}
// SAFETY: as above.
unsafe impl Pod for CalibrationValue {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes that clang gives the same structs in `capture.bpf.c`.
    #[test]
    fn the_layout_is_that_of_the_kernel_half() {
        assert_eq!(size_of::<TargetValue>(), 16 + 8 + 8 + 16 * (MAX_RANGES + MAX_SKIPS));
        assert_eq!(size_of::<Big>(), 8 + 24 * BIG_LEN);
        assert_eq!(size_of::<CountersValue>(), 64);
        assert_eq!(size_of::<CalibrationValue>(), 32);
        assert_eq!((EVENT_BYTES + CHUNK) % 8, 0);
        assert_eq!((EVENT_BYTES + LARGE) % 8, 0);
        assert!(MAX_SKIPS.is_power_of_two());
    }

    #[test]
    fn an_event_reads_back_and_a_short_one_is_refused() {
        let event =
            Event { mono_ns: 1, sector: 2, rq: 3, len: 4, total: 5, lost: 6, target: 7, flags: 9 << 16 | 3, error: -5 };
        let mut bytes = Vec::new();
        event.write(&mut bytes);
        assert_eq!(Event::read(&bytes), Some(event));
        assert_eq!(event.op(), OP_WRITE_ZEROES);
        assert_eq!(Event::read(&bytes[..EVENT_BYTES - 1]), None);
    }
}
