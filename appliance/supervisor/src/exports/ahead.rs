//! Who reads from front to back is known by the places of the requests, and what comes next is fetched before it is asked for.
//!
//! History lies in the order in which it was written: a disk read from front to back is read from all over the journal, and no
//! readahead of the kernel can know where. Pure; one per export, since a client may spread a copy over several connections.

/// Fetched ahead of the reader: enough for a disk to be busy while the last part is sent.
const AHEAD_BYTES: u64 = 4 << 20;
/// Requests of a copy with several in flight come out of order by about this much.
const NEAR_BYTES: u64 = 2 << 20;
/// Requests in a row before anything is fetched.
const STREAK_MIN: u32 = 4;

/// What is known of an export's reader.
#[derive(Default, Debug)]
pub struct Streak {
    /// The farthest end of the requests in a row.
    end: u64,
    length: u32,
    /// Up to here it was asked for.
    fetched: u64,
}

impl Streak {
    /// Takes note of a request; answers which stretch of the disk (its size in bytes) to fetch now, if any.
    pub fn note(&mut self, offset: u64, len: u64, size: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(len);
        if offset.abs_diff(self.end) > NEAR_BYTES || end.saturating_add(NEAR_BYTES) < self.end {
            *self = Self { end, length: 0, fetched: end };
            return None;
        }
        // Only what goes forward counts: what comes late belongs to the same copy.
        if end > self.end {
            self.length = self.length.saturating_add(1);
            self.end = end;
        }
        let start = self.fetched.max(self.end);
        let to = self.end.saturating_add(AHEAD_BYTES).min(size);
        if self.length < STREAK_MIN || to.saturating_sub(start) < AHEAD_BYTES / 2 {
            return None;
        }
        self.fetched = to;
        Some((start, to - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_fetched_ahead_once_and_without_holes() {
        for out_of_order in [0, 1, 3] {
            let (mut streak, mut got) = (Streak::default(), Vec::new());
            let size = 64 << 20;
            let piece = 256 << 10;
            let mut offsets: Vec<u64> = (0..size / piece).map(|i| i * piece).collect();
            offsets.chunks_mut(out_of_order + 1).for_each(<[u64]>::reverse);
            for offset in offsets {
                got.extend(streak.note(offset, piece, size));
            }
            assert!(got.len() >= 16, "{out_of_order}: {got:?}");
            for pair in got.windows(2) {
                assert!(pair[1].0 >= pair[0].0 + pair[0].1, "{out_of_order}: fetched twice: {pair:?}");
            }
            assert!(got.iter().all(|(at, len)| at + len <= size && *len <= AHEAD_BYTES), "{got:?}");
        }
    }

    #[test]
    fn random_reads_fetch_nothing() {
        let (mut streak, mut seed) = (Streak::default(), 88172645463325252u64);
        for size in [1u64 << 40, 1 << 30] {
            for _ in 0..10_000 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                assert_eq!(streak.note(seed % (size / 4096) * 4096, 4096, size), None);
            }
        }
    }
}
