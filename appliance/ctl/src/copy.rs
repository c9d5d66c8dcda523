//! Copies a volume from where it can be read to a target: data as data, zeroes as holes.

use crate::{target::Target, watch};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget};
use model::ByteLen;
use nbd::{
    Allocation,
    client::{Answer, Client, Operation},
};
use std::{
    collections::HashMap,
    io::{IsTerminal as _, Read, Write},
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

/// Ranges whose allocation is asked for at once: bounds the list that comes back.
const WINDOW: u64 = 1 << 30;
/// One read.
const PIECE: u64 = 1 << 20;
/// Reads under way over NBD: 8 MiB in memory, enough for a disk and a socket to be busy at the same time.
const DEPTH: usize = 8;
/// Zeroes inside data are left out in blocks of this size.
const BLOCK: usize = 4096;

/// Something a volume is read from.
pub trait Source {
    fn size(&self) -> ByteLen;
    /// Runs that cover the range: length, and whether it may hold anything but zeroes.
    fn allocation(&mut self, range: Range<u64>) -> anyhow::Result<Vec<(u64, bool)>>;
    /// Hands over the range in pieces, in any order.
    fn read(&mut self, range: Range<u64>, sink: Sink<'_>) -> anyhow::Result<()>;
}

/// Takes an offset and the bytes there.
pub type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> anyhow::Result<()>;

/// What was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copied {
    pub size: ByteLen,
    /// Bytes that had to be written; the rest is zero.
    pub data: ByteLen,
}

/// Copies everything. The target is not finished yet afterwards.
pub fn copy(source: &mut dyn Source, target: &mut Target) -> anyhow::Result<Copied> {
    let size = source.size();
    let mut data = 0;
    for window in windows(size.0) {
        data += source.allocation(window)?.iter().filter(|(_, data)| *data).map(|(len, _)| len).sum::<u64>();
    }
    target.prepare(size, ByteLen(data))?;
    let bar = progress_bar(data);
    let mut written = 0;
    for window in windows(size.0) {
        let mut at = window.start;
        for (len, is_data) in source.allocation(window)? {
            if !is_data {
                target.zero(at, len)?;
            } else {
                source.read(at..at + len, &mut |offset, bytes| {
                    written += write_sparse(target, offset, bytes)?;
                    bar.inc(bytes.len() as u64);
                    check_interrupt()
                })?;
            }
            check_interrupt()?;
            at += len;
        }
    }
    bar.finish_and_clear();
    Ok(Copied { size, data: ByteLen(written) })
}

fn windows(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size.div_ceil(WINDOW)).map(move |i| i * WINDOW..((i + 1) * WINDOW).min(size))
}

/// Writes what is not zero, in runs of whole blocks; gives the bytes written.
fn write_sparse(target: &Target, offset: u64, bytes: &[u8]) -> anyhow::Result<u64> {
    let is_zero = |block: &[u8]| block.iter().all(|b| *b == 0);
    let mut at = 0;
    let mut written = 0;
    while at < bytes.len() {
        let hole = is_zero(&bytes[at..(at + BLOCK).min(bytes.len())]);
        let run = bytes[at..].chunks(BLOCK).take_while(|block| is_zero(block) == hole);
        let len: usize = run.map(<[u8]>::len).sum();
        let piece = &bytes[at..at + len];
        if hole {
            target.zero(offset + at as u64, len as u64)?;
        } else {
            target.write(offset + at as u64, piece)?;
            written += len as u64;
        }
        at += len;
    }
    Ok(written)
}

pub fn progress_bar(total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let shape = "[{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.with_style(watch::style(shape))
}

impl<S: Read + Write> Source for Client<S> {
    fn size(&self) -> ByteLen {
        Client::size(self)
    }

    fn allocation(&mut self, range: Range<u64>) -> anyhow::Result<Vec<(u64, bool)>> {
        let runs =
            Client::allocation(self, range.start, range.end - range.start).context("ask the view what it holds")?;
        Ok(runs.iter().map(|run| (run.len, run.allocation == Allocation::Data)).collect())
    }

    fn read(&mut self, range: Range<u64>, sink: Sink<'_>) -> anyhow::Result<()> {
        let piece = PIECE.min(u64::from(self.export().info.blocks.max_payload));
        let mut offsets: HashMap<u64, u64> = HashMap::with_capacity(DEPTH);
        let mut next = range.start;
        loop {
            while next < range.end && offsets.len() < DEPTH {
                let len = piece.min(range.end - next);
                let cookie = self.submit(Operation::Read { offset: next, len: len as u32 }).context("read the view")?;
                offsets.insert(cookie, next);
                next += len;
            }
            let Some(done) = self.complete().context("read the view")? else { return Ok(()) };
            let offset = offsets.remove(&done.cookie).context("the view answered what was not asked")?;
            match done.result.context("read the view")? {
                Answer::Data(data) => sink(offset, &data)?,
                Answer::Done | Answer::Status(_) => anyhow::bail!("the view answered a read without data"),
            }
        }
    }
}

/// Reads a range piece by piece; for sources without requests in flight.
pub fn read_pieces(
    range: Range<u64>,
    sink: Sink<'_>,
    mut read: impl FnMut(u64, &mut [u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut buf = vec![0; PIECE.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(PIECE) as usize;
        read(at, &mut buf[..len])?;
        sink(at, &buf[..len])?;
        at += len as u64;
    }
    Ok(())
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on the first Ctrl-C (or SIGTERM) is noted, so that a view is closed and a partial file removed; the second
/// one ends the program as usual.
pub fn catch_interrupts() {
    extern "C" fn note(signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
        // SAFETY: `signal` is async-signal-safe and restores the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let handler = note as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic and calls async-signal-safe functions.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// An error once the person has interrupted.
pub fn check_interrupt() -> anyhow::Result<()> {
    anyhow::ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Allowed;

    /// Bytes with a made-up allocation.
    struct Memory {
        bytes: Vec<u8>,
        zero: Range<u64>,
    }

    impl Source for Memory {
        fn size(&self) -> ByteLen {
            ByteLen(self.bytes.len() as u64)
        }
        fn allocation(&mut self, range: Range<u64>) -> anyhow::Result<Vec<(u64, bool)>> {
            let steps = (range.start..range.end).step_by(512);
            Ok(steps.map(|at| (512.min(range.end - at), !self.zero.contains(&at))).collect())
        }
        fn read(&mut self, range: Range<u64>, sink: Sink<'_>) -> anyhow::Result<()> {
            read_pieces(range, sink, |at, buf| {
                buf.copy_from_slice(&self.bytes[at as usize..at as usize + buf.len()]);
                Ok(())
            })
        }
    }

    #[test]
    fn a_copy_is_the_same_and_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes: Vec<u8> = (0..3_000_832u32).map(|i| (i / 512) as u8 | 1).collect();
        bytes[512 * 100..512 * 900].fill(0); // told as zero
        bytes[1_000_000..2_500_000].fill(0); // zeroes in what is told as data
        let mut source = Memory { bytes: bytes.clone(), zero: 51_200..460_800 };
        let path = dir.path().join("copy");
        let mut target = Target::open(&path, Allowed { overwrite: false, onto_protected: false }, &[]).unwrap();
        let copied = copy(&mut source, &mut target).unwrap();
        target.finish().unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "the copy differs");
        assert_eq!(copied.size, ByteLen(bytes.len() as u64));
        assert!(copied.data.0 < 1_200_000, "{copied:?}");
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
        assert!(used < 1_400_000, "{used} bytes used");
    }
}
