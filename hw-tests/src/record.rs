//! What the agent's recorder (`agents/linux/examples/record.rs`, which has the format) wrote in a guest, read and replayed here.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// Where the recorder is: built with the tests, beside this program.
pub fn recorder() -> Result<PathBuf> {
    let us = std::env::current_exe().context("find our own program")?;
    let dir = us.ancestors().find(|d| d.join("examples").is_dir()).context("no folder of examples beside us")?;
    let file = dir.join("examples/record");
    ensure!(
        file.is_file(),
        "{} is not built: run `cargo build --package agent-linux --examples` first",
        file.display()
    );
    Ok(file)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Write,
    Zero,
    Discard,
    Flush,
}

/// One request of the guest, in the order in which it may be replayed.
#[derive(Clone, Debug)]
pub struct Request {
    pub op: Op,
    pub disk: usize,
    /// Byte ranges.
    pub ranges: Vec<(usize, usize)>,
    /// The device is to flush its cache before it writes this.
    pub preflush: bool,
    /// It is to return when it lies on the medium.
    pub fua: bool,
    data: (usize, usize),
}

/// A whole record; a loss in it is an error.
#[derive(Debug)]
pub struct Record {
    bytes: Vec<u8>,
    pub requests: Vec<Request>,
}

impl Record {
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let (mut at, mut requests) = (0, Vec::new());
        let take = |at: &mut usize, len: usize| -> Result<&[u8]> {
            let part = bytes.get(*at..at.checked_add(len).context("a length that cannot be")?);
            *at += len;
            part.context("the record is cut off")
        };
        let quad = |at: &mut usize| -> Result<usize> { Ok(u64::from_le_bytes(take(at, 8)?.try_into()?) as usize) };
        loop {
            match take(&mut at, 2)? {
                [0xfe, 0xed] => {}
                [0xed, 0xfe] => break,
                other => bail!("the record is out of step at {at}: {other:?}"),
            }
            let head = take(&mut at, 2)?;
            let (op, disk) = (head[0], usize::from(head[1]));
            let count = u32::from_le_bytes(take(&mut at, 4)?.try_into()?);
            let mut ranges = Vec::new();
            for _ in 0..count {
                let (sector, sectors) = (quad(&mut at)?, quad(&mut at)?);
                ranges.push((sector * 512, sectors * 512));
            }
            let len = quad(&mut at)?;
            let data = (at, len);
            take(&mut at, len)?;
            ensure!(op != 255, "disk {disk}: {ranges:?} were lost");
            let (preflush, fua) = (op & 64 != 0, op & 128 != 0);
            let op = match op & 63 {
                0 => Op::Write,
                1 => Op::Zero,
                2 => Op::Discard,
                3 => Op::Flush,
                other => bail!("disk {disk}: operation {other}"),
            };
            requests.push(Request { op, disk, ranges, preflush, fua, data });
        }
        Ok(Self { bytes, requests })
    }

    /// What a write carries.
    pub fn data(&self, request: &Request) -> &[u8] {
        &self.bytes[request.data.0..request.data.0 + request.data.1]
    }

    /// Replays requests `from..to` into the images of the disks.
    pub fn apply(&self, from: usize, to: usize, images: &mut [Vec<u8>]) {
        for r in &self.requests[from..to] {
            let mut data = &self.bytes[r.data.0..r.data.0 + r.data.1];
            for (start, len) in &r.ranges {
                let place = &mut images[r.disk][*start..start + len];
                match r.op {
                    Op::Write => {
                        let (now, later) = data.split_at(*len);
                        place.copy_from_slice(now);
                        data = later;
                    }
                    Op::Zero | Op::Discard => place.fill(0),
                    Op::Flush => {}
                }
            }
        }
    }
}

/// Where two images differ first.
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.chunks(65536)
        .zip(b.chunks(65536))
        .enumerate()
        .find(|(_, (x, y))| x != y)
        .map(|(i, (x, y))| i * 65536 + x.iter().zip(y).position(|(p, q)| p != q).unwrap_or(0))
}
