//! The reader's end of perf buffers, one per CPU, merged into one order.
//!
//! **Order.** Every record carries the time at which its program began. In one CPU's buffer later records are given at least the time of
//! those before them (an interrupt's records may lie between those of what it interrupted). If write B depends on write A, all of A's
//! records lay in their buffer before B's program began, so none of them is given a time after B's: to hand out by time, over all CPUs, is
//! to hand out in order.
//!
//! **When a record may be handed out.** Once no CPU can still send one with an earlier time. For each CPU one of two things proves that: a
//! record of its own with a later time; or the counts of programs begun and ended, read after the clock and found equal: then what it sends
//! later begins later. The smallest proof over all CPUs is the *mark*: everything before it is handed out, everything from it on waits.
//! A processor's clock must not run behind another's by more than the time from a request's completion to the issue of one that depends
//! on it; the kernel itself relies on that for its monotonic clock.
//!
//! **Room.** Kernels before 5.1 do not tell a BPF program that a buffer was full. So the kernel half counts what it sends, we tell it what we
//! have freed ([`Buffers::release`]), and it does not send what does not fit. Should the kernel say all the same that it lost a record
//! ([`Buffers::next`]), the count is of no use any more, and that is an error.
//!
//! Layout (include/uapi/linux/perf_event.h): a page with `data_head` at 1024 and `data_tail` at 1032, then the data. A record is a head of 8
//! bytes (type, flags, size), then for a sample a u32 length and the data.

use crate::capture::{
    Barrier, CaptureError, Position,
    bpf::{Mapping, layout::Event},
};
use crate::clock;
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

const PAGE: usize = 4096;
const HEAD_AT: usize = 1024;
const TAIL_AT: usize = 1032;
const RECORD_LOST: u32 = 2;
const RECORD_SAMPLE: u32 = 9;
const HEAD: u64 = 8;

/// A request of 1 MiB must fit, with what interrupts send meanwhile.
pub const BUFFER_MIN: u32 = 2 << 20;

/// How far the kernel half of one CPU is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub enter: u64,
    pub exit: u64,
    pub produced: u64,
}

/// The clock is the barrier: what was issued until now has an earlier time.
pub struct ClockBarrier;

impl Barrier for ClockBarrier {
    fn now(&self) -> Position {
        Position(clock::mono().0 + 1)
    }
}

/// Where a record lies.
#[derive(Clone, Copy, Debug)]
struct Found {
    time: u64,
    /// Of its data, and of what follows it.
    at: u64,
    len: u32,
    end: u64,
}

struct Buffer {
    fd: OwnedFd,
    mapping: Mapping,
    size: u64,
    /// What has been looked at; between this and `released` lies what we hold.
    parsed: u64,
    released: u64,
    /// Looked at, not handed out.
    waiting: VecDeque<Found>,
    /// Handed out, not released: time and end.
    held: VecDeque<(u64, u64)>,
    last_time: u64,
    mark: u64,
}

impl Buffer {
    fn open(cpu: u32, size: u32) -> io::Result<Self> {
        // struct perf_event_attr, version 0: 64 bytes. A software event (type 1) of BPF's own (config 10), every sample taken
        // (period 1), with raw data only (1 << 10). Woken by bytes (watermark, flag 1 << 14), and those beyond the buffer: never.
        let mut attr = [0u8; 64];
        let mut put = |at: usize, bytes: &[u8]| attr[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &1u32.to_ne_bytes());
        put(4, &64u32.to_ne_bytes());
        put(8, &10u64.to_ne_bytes());
        put(16, &1u64.to_ne_bytes());
        put(24, &(1u64 << 10).to_ne_bytes());
        put(40, &(1u64 << 14).to_ne_bytes());
        put(48, &u32::MAX.to_ne_bytes());
        const FLAG_CLOEXEC: libc::c_ulong = 8;
        // SAFETY: the attributes are as long as they say; the other arguments are numbers (any process, this CPU, no group).
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), -1, cpu, -1, FLAG_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mapping = Mapping::new(fd.as_fd(), 0, PAGE + size as usize, true)?;
        Ok(Self {
            fd,
            mapping,
            size: u64::from(size),
            parsed: 0,
            released: 0,
            waiting: VecDeque::new(),
            held: VecDeque::new(),
            last_time: 0,
            mark: 0,
        })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: inside the first page of the mapping and aligned; the kernel accesses the word atomically too.
        unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(at).cast()) }
    }

    /// Copies `len` bytes at a position into `out`, around the end where need be.
    fn copy(&self, at: u64, len: usize, out: &mut Vec<u8>) {
        out.clear();
        let place = (at % self.size) as usize;
        let here = len.min(self.size as usize - place);
        for (from, len) in [(place, here), (0, len - here)] {
            // SAFETY: `from + len` is at most the size, behind the first page. Between tail and head the kernel does not write.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().add(PAGE + from), len) });
        }
    }

    /// Looks at what is new.
    fn look(&mut self, cpu: u32, buffer: &mut Vec<u8>) -> Result<(), CaptureError> {
        let head = self.word(HEAD_AT).load(Ordering::Acquire);
        while self.parsed < head {
            let damaged = |len: u64| CaptureError::Damaged { at: self.parsed, len: len as u32 };
            self.copy(self.parsed, HEAD as usize, buffer);
            let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| buffer[at + i]));
            let (kind, size) = (word(0), u64::from(word(4) >> 16));
            if size < HEAD || self.parsed + size > head {
                return Err(damaged(size));
            }
            match kind {
                RECORD_LOST => return Err(CaptureError::BufferFull { cpu }),
                RECORD_SAMPLE => {
                    let have = (size - HEAD) as usize;
                    self.copy(self.parsed + HEAD, have.min(4 + crate::capture::bpf::layout::EVENT_BYTES), buffer);
                    let len = buffer.get(..4).map(|b| u32::from_ne_bytes(std::array::from_fn(|i| b[i])));
                    let event = buffer.get(4..).and_then(Event::read);
                    let (Some(len), Some(event)) = (len, event) else { return Err(damaged(size)) };
                    if len as usize + 4 > have {
                        return Err(damaged(size));
                    }
                    self.last_time = self.last_time.max(event.mono_ns);
                    self.mark = self.mark.max(self.last_time);
                    let (at, end) = (self.parsed + HEAD + 4, self.parsed + size);
                    self.waiting.push_back(Found { time: self.last_time, at, len, end });
                }
                // Throttling and the like: nothing of ours, and let go with the record before.
                _ => {
                    if let Some(last) = self.waiting.back_mut() {
                        last.end = self.parsed + size;
                    }
                }
            }
            self.parsed += size;
        }
        Ok(())
    }
}

/// The buffers of all CPUs.
pub struct Buffers {
    cpus: Vec<(u32, Buffer)>,
    /// Everything before this can be handed out.
    mark: u64,
    scratch: Vec<u8>,
}

impl Buffers {
    /// A buffer for each CPU that is online; `bytes` of each, a power of two.
    pub fn open(online: &[u32], bytes: u32) -> io::Result<Self> {
        let cpus = online.iter().map(|cpu| Ok((*cpu, Buffer::open(*cpu, bytes)?))).collect::<io::Result<_>>()?;
        Ok(Self { cpus, mark: 0, scratch: Vec::new() })
    }

    pub fn fds(&self) -> impl Iterator<Item = (u32, std::os::fd::BorrowedFd<'_>)> {
        self.cpus.iter().map(|(cpu, b)| (*cpu, b.fd.as_fd()))
    }

    /// Looks at all buffers. `now` was read before `counts` (by CPU), and those before this call.
    pub fn look(&mut self, now: u64, counts: &[Counts]) -> Result<(), CaptureError> {
        for (cpu, buffer) in &mut self.cpus {
            buffer.look(*cpu, &mut self.scratch)?;
            if counts.get(*cpu as usize).is_some_and(|c| c.enter == c.exit) {
                buffer.mark = buffer.mark.max(now);
            }
        }
        self.mark = self.cpus.iter().map(|(_, b)| b.mark).min().unwrap_or(0).max(self.mark);
        Ok(())
    }

    /// The next record in order, if it may be handed out: its time and its bytes.
    pub fn next(&mut self, into: &mut Vec<u8>) -> Option<u64> {
        let first = |(_, b): &(u32, Buffer)| b.waiting.front().map(|f| f.time);
        let (time, at) = self.cpus.iter().enumerate().filter_map(|(i, c)| Some((first(c)?, i))).min()?;
        if time >= self.mark {
            return None;
        }
        let buffer = &mut self.cpus[at].1;
        let found = buffer.waiting.pop_front()?;
        buffer.copy(found.at, found.len as usize, into);
        buffer.held.push_back((found.time, found.end));
        Some(found.time)
    }

    /// Everything before this has been handed out.
    pub fn position(&self) -> Position {
        let waiting = self.cpus.iter().filter_map(|(_, b)| b.waiting.front().map(|f| f.time)).min();
        Position(waiting.map_or(self.mark, |w| w.min(self.mark)))
    }

    /// Gives the room of what was handed out before `position` back; answers, by CPU, the bytes freed in all where that has changed.
    pub fn release(&mut self, position: Position) -> Vec<(u32, u64)> {
        let mut changed = Vec::new();
        for (cpu, buffer) in &mut self.cpus {
            let mut to = buffer.released;
            while let Some((_, end)) = buffer.held.front().filter(|(time, _)| *time < position.0) {
                to = *end;
                buffer.held.pop_front();
            }
            if to > buffer.released {
                buffer.released = to;
                // First the room, then the word that it is there.
                buffer.word(TAIL_AT).store(to, Ordering::Release);
                changed.push((*cpu, to));
            }
        }
        changed
    }

    /// Bytes not yet released and the size, of the buffer that is fullest: it is the first to overflow.
    pub fn fill(&self) -> (u64, u64) {
        let held = |b: &Buffer| b.word(HEAD_AT).load(Ordering::Acquire).saturating_sub(b.released);
        self.cpus.iter().map(|(_, b)| (held(b), b.size)).max().unwrap_or((0, 1))
    }

    /// What the kernel half says it has sent is what lies in the buffers; else its count of the room is wrong.
    pub fn agrees(&self, counts: &[Counts]) -> bool {
        self.cpus.iter().all(|(cpu, b)| {
            counts.get(*cpu as usize).is_some_and(|c| c.produced == b.word(HEAD_AT).load(Ordering::Acquire))
        })
    }
}

/// The CPUs in a list of the kernel's: `0-3,8`.
pub fn cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut out = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // More than any kernel is built for.
        if last < first || last > 65_535 {
            return None;
        }
        out.extend(first..=last);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::bpf::layout::EVENT_BYTES;
    use std::fs::File;

    /// A buffer over a file, filled by hand as the kernel does.
    fn buffer(size: u32) -> (Buffer, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE as u64 + u64::from(size)).unwrap();
        let mapping = Mapping::new(file.as_fd(), 0, PAGE + size as usize, true).unwrap();
        let buffer = Buffer {
            fd: file.try_clone().unwrap().into(),
            mapping,
            size: u64::from(size),
            parsed: 0,
            released: 0,
            waiting: VecDeque::new(),
            held: VecDeque::new(),
            last_time: 0,
            mark: 0,
        };
        (buffer, file)
    }

    fn record(kind: u32, payload: &[u8]) -> Vec<u8> {
        let len = (payload.len() + 4).next_multiple_of(8);
        let mut out = kind.to_ne_bytes().to_vec();
        out.extend_from_slice(&(((8 + len) as u32) << 16).to_ne_bytes());
        out.extend_from_slice(&((len - 4) as u32).to_ne_bytes());
        out.extend_from_slice(payload);
        out.resize(8 + len, 0);
        out
    }

    fn put(buffer: &Buffer, bytes: &[u8]) {
        let head = buffer.word(HEAD_AT).load(Ordering::Relaxed);
        for (i, byte) in bytes.iter().enumerate() {
            let place = PAGE + ((head + i as u64) % buffer.size) as usize;
            // SAFETY: inside the mapping.
            unsafe { buffer.mapping.as_ptr().add(place).write(*byte) };
        }
        buffer.word(HEAD_AT).store(head + bytes.len() as u64, Ordering::Release);
    }

    fn event(time: u64, sector: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let event = Event { mono_ns: time, sector, rq: 1, len: 0, total: 0, lost: 0, target: 1, flags: 0, error: 0 };
        event.write(&mut out);
        out
    }

    fn two() -> Buffers {
        let cpus = (0..2).map(|cpu| (cpu, buffer(8192).0)).collect();
        Buffers { cpus, mark: 0, scratch: Vec::new() }
    }

    fn sectors(buffers: &mut Buffers) -> Vec<u64> {
        let (mut out, mut bytes) = (Vec::new(), Vec::new());
        while buffers.next(&mut bytes).is_some() {
            out.push(Event::read(&bytes).unwrap().sector);
        }
        out
    }

    const IDLE: Counts = Counts { enter: 3, exit: 3, produced: 0 };
    const BUSY: Counts = Counts { enter: 4, exit: 3, produced: 0 };

    #[test]
    fn records_of_two_cpus_come_out_by_time_and_only_when_nothing_earlier_can_come() {
        let mut b = two();
        put(&b.cpus[0].1, &record(RECORD_SAMPLE, &event(10, 1)));
        put(&b.cpus[0].1, &record(RECORD_SAMPLE, &event(30, 3)));
        put(&b.cpus[1].1, &record(RECORD_SAMPLE, &event(20, 2)));
        // The second CPU is at work since 20 at the latest: what it sends next may be of 20 too.
        b.look(100, &[IDLE, BUSY]).unwrap();
        assert_eq!(sectors(&mut b), [1]);
        assert_eq!(b.position(), Position(20));
        put(&b.cpus[1].1, &record(RECORD_SAMPLE, &event(20, 4)));
        b.look(110, &[IDLE, IDLE]).unwrap();
        assert_eq!(sectors(&mut b), [2, 4, 3]);
        assert_eq!(b.position(), Position(110));
        // Neither has said anything, and one is at work: no mark moves.
        b.look(200, &[IDLE, BUSY]).unwrap();
        assert_eq!(b.position(), Position(110));
    }

    #[test]
    fn what_an_interrupt_sent_in_between_does_not_turn_the_order_around() {
        let mut b = two();
        for (time, sector) in [(10, 1), (50, 2), (10, 3)] {
            put(&b.cpus[0].1, &record(RECORD_SAMPLE, &event(time, sector)));
        }
        put(&b.cpus[1].1, &record(RECORD_SAMPLE, &event(60, 4)));
        b.look(100, &[IDLE, IDLE]).unwrap();
        assert_eq!(sectors(&mut b), [1, 2, 3, 4]);
    }

    #[test]
    fn room_is_given_back_up_to_a_time_and_records_wrap() {
        let mut b = two();
        let mut freed = 0;
        for round in 1..400u64 {
            let one = record(RECORD_SAMPLE, &event(round * 10, round));
            put(&b.cpus[0].1, &one);
            b.look(round * 10 + 5, &[IDLE, IDLE]).unwrap();
            assert_eq!(sectors(&mut b), [round]);
            assert_eq!(b.release(Position(round * 10)), [], "its own time is not before itself");
            freed += one.len() as u64;
            assert_eq!(b.release(Position(round * 10 + 1)), [(0, freed)]);
        }
        assert!(freed > 2 * 8192);
    }

    #[test]
    fn a_loss_that_the_kernel_tells_and_damage_are_errors() {
        let mut b = two();
        put(&b.cpus[1].1, &record(RECORD_LOST, &[0; 16]));
        assert!(matches!(b.look(1, &[IDLE, IDLE]), Err(CaptureError::BufferFull { cpu: 1 })));
        for seed in 1..200u64 {
            let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut b = two();
            let mut bytes = record(RECORD_SAMPLE, &event(1, 2));
            for _ in 0..4 {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                let at = s as usize % (8 + 4);
                bytes[at] ^= (s >> 40) as u8;
            }
            put(&b.cpus[0].1, &bytes);
            // An answer, whatever it is.
            if b.look(5, &[IDLE, IDLE]).is_ok() {
                let mut into = Vec::new();
                while b.next(&mut into).is_some() {}
            }
        }
        assert_eq!(EVENT_BYTES % 8, 0);
    }

    #[test]
    fn the_kernels_lists_of_cpus_are_read() {
        assert_eq!(cpu_list("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(cpu_list("0"), Some(vec![0]));
        for bad in ["3-1", "x", "0-99999999"] {
            assert_eq!(cpu_list(bad), None, "{bad}");
        }
    }
}
