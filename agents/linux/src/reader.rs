//! Threads that read disks for initial sync and resync.
//!
//! Reads go past the page cache (`O_DIRECT`): what the disk holds is what was captured, and the host's cache is left alone. After each
//! read the capture barrier is taken: the result counts once capture has handed out everything before it.

use crate::capture::{Barrier, Position};
use durable::AlignedBuf;
use model::{Extent, GroupId, SECTOR};
use replication::ReadId;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, Mutex, mpsc},
    thread,
};

/// Zeroes are told in runs of at least this much: finer, and a half-empty disk becomes a flood of small records.
const ZERO_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub struct Job {
    pub group: GroupId,
    pub read: ReadId,
    pub file: Arc<File>,
    /// On the file.
    pub offset: u64,
    pub len: usize,
}

#[derive(Debug)]
pub struct Outcome {
    pub group: GroupId,
    pub read: ReadId,
    pub result: io::Result<Data>,
    /// What was issued before the read ended lies before this.
    pub barrier: Position,
}

#[derive(Debug)]
pub struct Data {
    pub bytes: AlignedBuf,
    /// All-zero runs, in sectors from the start of the read.
    pub zeroes: Vec<Extent>,
}

pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path)
}

/// Runs of zeroes, in whole [`ZERO_BYTES`] from the start.
pub fn zero_runs(bytes: &[u8]) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for (i, chunk) in bytes.chunks(ZERO_BYTES).enumerate() {
        if !is_zero(chunk) {
            continue;
        }
        let sectors = (chunk.len() as u64) / SECTOR;
        let start = (i * ZERO_BYTES) as u64 / SECTOR;
        match runs.last_mut() {
            Some(last) if last.end() == start => last.sectors.0 += sectors,
            _ => runs.push(Extent::new(start, sectors)),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    // Words first: the compiler makes vectors of it, and data gives up at once.
    let (head, words, tail) = {
        // SAFETY: any bytes are a u128.
        unsafe { bytes.align_to::<u128>() }
    };
    head.iter().chain(tail).all(|b| *b == 0) && words.chunks(64).all(|c| c.iter().fold(0, |a, w| a | w) == 0)
}

pub struct Pool {
    jobs: Option<mpsc::Sender<Job>>,
}

impl Pool {
    /// `threads` bounds what is read at once; each job carries its own buffer.
    pub fn start(
        threads: usize,
        barrier: Arc<dyn Barrier>,
        deliver: impl Fn(Outcome) + Send + Clone + 'static,
    ) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let inbox = Arc::new(Mutex::new(inbox));
        for i in 0..threads {
            let (inbox, barrier, deliver) = (inbox.clone(), barrier.clone(), deliver.clone());
            thread::Builder::new().name(format!("reader-{i}")).spawn(move || {
                low_priority();
                loop {
                    let job = inbox.lock().unwrap_or_else(|e| e.into_inner()).recv();
                    let Ok(job) = job else { return };
                    let result = read(&job);
                    deliver(Outcome { group: job.group, read: job.read, result, barrier: barrier.now() });
                }
            })?;
        }
        Ok(Self { jobs: Some(jobs) })
    }

    pub fn read(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The threads live as long as the sender.
            let _ = jobs.send(job);
        }
    }
}

fn read(job: &Job) -> io::Result<Data> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut bytes = AlignedBuf::with_capacity(job.len);
    while bytes.len() < job.len {
        bytes.extend_from_slice(&ZEROES[..(job.len - bytes.len()).min(ZEROES.len())]);
    }
    job.file.read_exact_at(bytes.as_mut_slice(), job.offset)?;
    let zeroes = zero_runs(bytes.as_slice());
    Ok(Data { bytes, zeroes })
}

/// Copying gives way to the host's own reads and writes where the scheduler knows priorities.
pub(crate) fn low_priority() {
    const WHO_PROCESS: i32 = 1;
    const BEST_EFFORT_LOWEST: i32 = (2 << 13) | 7;
    // SAFETY: plain numbers; 0 is this thread. A refusal changes nothing.
    unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, BEST_EFFORT_LOWEST) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_runs_are_whole_and_right() {
        let mut bytes = vec![0u8; ZERO_BYTES * 5 + 4096];
        assert_eq!(zero_runs(&bytes), [Extent::new(0, bytes.len() as u64 / 512)]);
        bytes[ZERO_BYTES] = 1;
        bytes[ZERO_BYTES * 4 - 1] = 1;
        let per = ZERO_BYTES as u64 / 512;
        assert_eq!(zero_runs(&bytes), [Extent::new(0, per), Extent::new(2 * per, per), Extent::new(4 * per, per + 8)]);
        bytes.fill(1);
        assert!(zero_runs(&bytes).is_empty());
        assert!(zero_runs(&[]).is_empty());
    }

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [1, 15, 16, 17, 4096, ZERO_BYTES] {
            for at in [0, len / 2, len - 1] {
                let mut bytes = vec![0u8; len];
                assert!(is_zero(&bytes));
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{len} {at}");
            }
        }
    }
}
