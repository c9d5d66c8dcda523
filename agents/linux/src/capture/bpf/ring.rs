//! The reader's end of a BPF ring buffer.
//!
//! Own code instead of aya's, for three things aya's does not offer: reading ahead of what is released (a record is released only
//! when it is safe elsewhere, so that a new process finds it again), the producer's position as a barrier for disk reads, and
//! a damaged length as an error.
//!
//! Layout (kernel/bpf/ringbuf.c): page 0 consumer position, page 1 producer position, then the data. A record is a head of 8 bytes (length
//! with two flag bits, then an offset) and the data, rounded up to 8. Positions grow for ever; modulo the size they are places.
//!
//! The kernel offers the data twice in a row, so that no record wraps for who maps both. We map it once and put the few records that do wrap
//! together in a buffer: the second mapping would double what the ring counts for in the agent's resident memory.

use crate::capture::{Barrier, CaptureError, Position};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEAD: u64 = 8;

/// A shared mapping of a BPF map, unmapped at drop.
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is shared memory that lives until drop; all access goes through atomics or through the ring's protocol.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(fd: BorrowedFd<'_>, offset: i64, len: usize, writable: bool) -> io::Result<Self> {
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice; nothing of ours is replaced.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(raw.cast::<u8>()).ok_or_else(|| io::Error::other("mmap gave the null page"))?;
        Ok(Self { ptr, len })
    }
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and nobody holds a reference into it any more (they borrow `self`).
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

struct Shared {
    consumer: Mapping,
    /// Producer page, then the data.
    producer: Mapping,
    page: usize,
}

impl Shared {
    fn consumer_pos(&self) -> &AtomicU64 {
        // SAFETY: the page is mapped, aligned and lives as long as `self`; the kernel accesses the word atomically too.
        unsafe { AtomicU64::from_ptr(self.consumer.as_ptr().cast()) }
    }
    fn producer_pos(&self) -> &AtomicU64 {
        // SAFETY: as above; only ever loaded (the mapping is read-only).
        unsafe { AtomicU64::from_ptr(self.producer.as_ptr().cast()) }
    }
}

impl Barrier for Shared {
    fn now(&self) -> Position {
        Position(self.producer_pos().load(Ordering::Acquire))
    }
}

pub struct Ring {
    shared: Arc<Shared>,
    /// What has been read; at or ahead of what is released.
    read: u64,
    size: u64,
    /// The last record that wrapped, in one piece.
    wrapped: Vec<u8>,
}

impl Ring {
    pub fn new(fd: BorrowedFd<'_>, size: u32) -> io::Result<Self> {
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })
            .map_err(|_| io::Error::other("the page size is not known"))?;
        let consumer = Mapping::new(fd, 0, page, true)?;
        let producer = Mapping::new(fd, page as i64, page + size as usize, false)?;
        let shared = Arc::new(Shared { consumer, producer, page });
        let read = shared.consumer_pos().load(Ordering::Acquire);
        Ok(Self { shared, read, size: u64::from(size), wrapped: Vec::new() })
    }

    /// The next record, if one is there and whole.
    pub fn next(&mut self) -> Result<Option<&[u8]>, CaptureError> {
        loop {
            let produced = self.shared.producer_pos().load(Ordering::Acquire);
            if self.read >= produced {
                return Ok(None);
            }
            let place = (self.read & (self.size - 1)) as usize;
            let at = self.shared.page + place;
            // SAFETY: `place` is below the size and both are multiples of 8: the head lies inside the mapping and does not wrap. The
            // kernel writes it atomically.
            let head =
                unsafe { AtomicU32::from_ptr(self.shared.producer.as_ptr().add(at).cast()) }.load(Ordering::Acquire);
            if head & BUSY != 0 {
                return Ok(None);
            }
            let len = head & !DISCARD;
            let whole = (HEAD + u64::from(len)).next_multiple_of(8);
            if whole > self.size || self.read + whole > produced {
                return Err(CaptureError::Damaged { at: self.read, len });
            }
            self.read += whole;
            if head & DISCARD != 0 {
                continue;
            }
            let data = place + HEAD as usize;
            let here = (len as usize).min((self.size as usize).saturating_sub(data));
            // SAFETY: `data + here` is at most the size, inside the mapping; the kernel does not write to it again before it is
            // released, and `release` needs `&mut self`.
            let first = unsafe {
                std::slice::from_raw_parts(
                    self.shared.producer.as_ptr().add(self.shared.page + data % self.size as usize),
                    here,
                )
            };
            if here == len as usize {
                return Ok(Some(first));
            }
            // A head in the last eight bytes: the data begins at the ring's start.
            self.wrapped.clear();
            self.wrapped.extend_from_slice(first);
            let rest = len as usize - here;
            // SAFETY: as above; a record is shorter than the ring, so the rest ends before it began.
            let second =
                unsafe { std::slice::from_raw_parts(self.shared.producer.as_ptr().add(self.shared.page), rest) };
            self.wrapped.extend_from_slice(second);
            return Ok(Some(&self.wrapped));
        }
    }

    /// Everything before this has been read.
    pub fn position(&self) -> Position {
        Position(self.read)
    }

    /// Gives the memory before `position` back. Never beyond what was read, never backwards.
    pub fn release(&mut self, position: Position) {
        let to = position.0.min(self.read);
        if to > self.shared.consumer_pos().load(Ordering::Relaxed) {
            self.shared.consumer_pos().store(to, Ordering::Release);
        }
    }

    /// Bytes not yet released, and the size.
    pub fn fill(&self) -> (u64, u64) {
        let held = self.shared.now().0.saturating_sub(self.shared.consumer_pos().load(Ordering::Relaxed));
        (held, self.size)
    }

    pub fn barrier(&self) -> Arc<dyn Barrier> {
        self.shared.clone()
    }
}
