//! What the tests share: a seeded generator, a narrow pipe, a played-back peer.
#![allow(dead_code)] // each test binary uses a part

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    sync::{Arc, Condvar, Mutex},
};

/// xorshift64*
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
    pub fn fill(&mut self, buf: &mut [u8]) {
        for byte in buf {
            *byte = (self.next() >> 32) as u8;
        }
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }
}

/// One end of a two-way pipe that holds at most `capacity` bytes each way: a socket with a small buffer.
pub struct PipeEnd {
    from: Arc<Lane>,
    to: Arc<Lane>,
}

struct Lane {
    state: Mutex<LaneState>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct LaneState {
    bytes: VecDeque<u8>,
    closed: bool,
}

pub fn pipe(capacity: usize) -> (PipeEnd, PipeEnd) {
    let lane = || Arc::new(Lane { state: Mutex::default(), changed: Condvar::new(), capacity });
    let (a, b) = (lane(), lane());
    (PipeEnd { from: a.clone(), to: b.clone() }, PipeEnd { from: b, to: a })
}

impl Read for PipeEnd {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.from.state.lock().unwrap();
        while state.bytes.is_empty() && !state.closed && !buf.is_empty() {
            state = self.from.changed.wait(state).unwrap();
        }
        let n = buf.len().min(state.bytes.len());
        for (to, from) in buf.iter_mut().zip(state.bytes.drain(..n)) {
            *to = from;
        }
        self.from.changed.notify_all();
        Ok(n)
    }
}

impl Write for PipeEnd {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut state = self.to.state.lock().unwrap();
        while state.bytes.len() == self.to.capacity && !state.closed {
            state = self.to.changed.wait(state).unwrap();
        }
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = buf.len().min(self.to.capacity - state.bytes.len());
        state.bytes.extend(&buf[..n]);
        self.to.changed.notify_all();
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        for lane in [&self.from, &self.to] {
            if let Ok(mut state) = lane.state.lock() {
                state.closed = true;
            }
            lane.changed.notify_all();
        }
    }
}

/// A peer that says what is in `input` whatever it hears, and then hangs up.
pub struct Script {
    pub input: io::Cursor<Vec<u8>>,
    pub heard: Vec<u8>,
}

impl Script {
    pub fn new(input: Vec<u8>) -> Self {
        Self { input: io::Cursor::new(input), heard: Vec::new() }
    }
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.input.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.heard.extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps a copy of what is read and what is written.
pub struct Recorded<S> {
    pub stream: S,
    pub read: Vec<u8>,
    pub written: Vec<u8>,
}

impl<S> Recorded<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, read: Vec::new(), written: Vec::new() }
    }
}

impl<S: Read> Read for Recorded<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        self.read.extend_from_slice(&buf[..n]);
        Ok(n)
    }
}

impl<S: Write> Write for Recorded<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.stream.write(buf)?;
        self.written.extend_from_slice(&buf[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
