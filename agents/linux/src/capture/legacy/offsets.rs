//! Where the fields of a request lie, on a kernel that does not say so: found by looking, then proved.
//!
//! The agent reads and writes its own test disk at places and lengths that it draws, and a BPF program shows the memory of exactly those
//! requests (they hold the sector). What is searched for is known: a sector, a length, the pages of our own buffer, the disk's numbers, and
//! an operation that is 0 for reads, 1 for writes and 3 for discards. A place counts when it holds what it must in every sample.
//!
//! | field | how it is told |
//! |---|---|
//! | sector, length | hold them |
//! | first bio | points at memory with a sector and a length behind it (`bi_iter`); the next word, the last bio, is the same |
//! | `bi_io_vec` | points at a page, 4096, 0; two pages give the size of `struct page` |
//! | disk | points at the disk's numbers; in the request (until 5.15), or in its queue, which is the request's first word |
//! | flags | the low byte is the operation |
//! | map of all memory | the multiple of 1 GiB below the request where our page is found at its frame number |
//!
//! What is taken for granted, because it has been so in every kernel from 4.18 to 6.18: the queue is a request's first word, `bi_next` a bio's,
//! a disk begins with its two numbers, and `struct bvec_iter` and `struct bio_vec` are as they are. The self-test writes afterwards and
//! compares byte for byte, so what is wrong in spite of all this is refused, never used.

use super::{
    layout::{Config, LOOK_WORDS, PEEK_BYTES, Peek},
    load_object, pick,
    testdisk::TestDisk,
};
use crate::capture::{
    CaptureError,
    bpf::{LockedPage, magic, map_error, take_map},
};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::links::FdLink,
};
use durable::AlignedBuf;
use std::{
    io,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

const PAGE: usize = 4096;
/// Each program looks at so many GiB.
const SEARCH_GIB: u64 = 64;
/// 64 TiB: the most that x86_64 maps one to one with four-level page tables.
const SEARCHES: u64 = 1024;
/// A request that was split, or one of somebody else's with the same word.
const TRIES: u32 = 8;
/// Of each operation, to tell its flags from what only happens to fit.
const ROUNDS: usize = 6;
/// All of it, on an emulated machine too; whoever looks for longer finds nothing.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// Where a queue's pointer to its disk is looked for.
const QUEUE_BYTES: u32 = 2048;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Io {
    Read,
    Write,
    Discard,
}

impl Io {
    fn op(self) -> u8 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Discard => 3,
        }
    }
}

struct Sample {
    sector: u64,
    len: u32,
    request: Vec<u8>,
    data: Vec<u8>,
}

fn quad(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
/// An address of the kernel's half that is aligned as an object of its would be. With page tables of five levels that half begins lower.
fn pointer(value: u64) -> bool {
    (0xff00_0000_0000_0000..0xffff_ffff_ffff_f000).contains(&value) && value.is_multiple_of(8)
}

struct Looker<'a> {
    disk: &'a TestDisk,
    _ebpf: Ebpf,
    _link: FdLink,
    config: Array<MapData, Config>,
    peeked: Array<MapData, Peek>,
    base: Config,
    begun: Instant,
}

impl<'a> Looker<'a> {
    fn new(disk: &'a TestDisk, programs: [&'static str; 2], base: Config) -> Result<Self, CaptureError> {
        let mut ebpf = load_object()?;
        let link = pick(&mut ebpf, programs)?.1;
        let config = Array::try_from(take_map(&mut ebpf, "config")?).map_err(map_error("config"))?;
        let peeked = Array::try_from(take_map(&mut ebpf, "peeked")?).map_err(map_error("peeked"))?;
        Ok(Self { disk, _ebpf: ebpf, _link: link, config, peeked, base, begun: Instant::now() })
    }

    /// One request of ours that was seen, at a place nobody else uses.
    fn seen(&mut self, io: Io, buffer: &mut [u8], config: Config) -> Result<(Peek, u64), CaptureError> {
        let failed = |what| move |source: io::Error| CaptureError::TestDisk { what, source };
        for _ in 0..TRIES {
            if self.begun.elapsed() > LOOK_MAX {
                return Err(unknown("the layout of this kernel's requests, within the time for it,"));
            }
            // In whole pages; numbers that other fields of a request do not hold.
            let at = (magic() >> 16) % (self.disk.sectors() / 16 - (1 << 17)) * 8 + (1 << 20);
            let config = Config { want_sector: at, ..config };
            self.config.set(0, config, 0).map_err(map_error("config"))?;
            self.peeked.set(0, Peek::default(), 0).map_err(map_error("peeked"))?;
            match io {
                Io::Read => {
                    self.disk.file.read_exact_at(buffer, at * 512).map_err(failed("read from the test disk"))?
                }
                Io::Write => self.disk.file.write_all_at(buffer, at * 512).map_err(failed("write to the test disk"))?,
                Io::Discard => {
                    self.disk.discard(at * 512, buffer.len() as u64).map_err(failed("discard on the test disk"))?;
                }
            }
            let peek = self.peeked.get(&0, 0).map_err(map_error("peeked"))?;
            if peek.hits > 0 {
                return Ok((peek, at));
            }
        }
        Err(CaptureError::Unknown { what: "none of the agent's own requests was seen" })
    }

    fn sample(&mut self, io: Io, buffer: &mut [u8], hops: &[u32], from: u32) -> Result<Sample, CaptureError> {
        let mut config = Config { hops: hops.len() as u32, from, ..self.base };
        config.hop.iter_mut().zip(hops).for_each(|(to, hop)| *to = *hop);
        let (peek, sector) = self.seen(io, buffer, config)?;
        let request = peek.request.iter().flat_map(|w| w.to_ne_bytes()).collect();
        Ok(Sample { sector, len: buffer.len() as u32, request, data: peek.data.to_vec() })
    }
}

/// The first place, stepping by `step`, that holds in every sample.
fn place(samples: &[Sample], step: usize, holds: impl Fn(&Sample, usize) -> bool) -> Option<u32> {
    (0..LOOK_WORDS * 8).step_by(step).find(|at| samples.iter().all(|s| holds(s, *at))).map(|at| at as u32)
}

fn unknown(what: &'static str) -> CaptureError {
    CaptureError::Unknown { what }
}

/// Finds everything that capture must know of this kernel.
pub fn find(disk: &TestDisk) -> Result<Config, CaptureError> {
    let mut looker = Looker::new(disk, ["hf_look_second", "hf_look_first"], Config::default())?;
    let mut buffer = AlignedBuf::with_capacity(3 * PAGE);
    buffer.extend_from_slice(&[0; 3 * PAGE]);
    let mut samples = Vec::new();
    for pages in [1, 2, 3, 1, 2, 3] {
        samples.push(looker.sample(Io::Read, &mut buffer.as_mut_slice()[..pages * PAGE], &[], 0)?);
    }
    let mut found = Config {
        sector: place(&samples, 8, |s, at| quad(&s.request, at) == Some(s.sector))
            .ok_or(unknown("a request's sector"))?,
        len: place(&samples, 4, |s, at| word(&s.request, at) == Some(s.len)).ok_or(unknown("a request's length"))?,
        ..Config::default()
    };
    flags(&mut looker, &mut found, &mut samples, buffer.as_mut_slice())?;
    bio(&mut looker, &mut found, &samples, buffer.as_mut_slice())?;
    let pages = [(); 2].map(|()| LockedPage::new());
    let [Ok(mut first), Ok(mut second)] = pages else { return Err(unknown("memory that stays where it is")) };
    vector(&mut looker, &mut found, [&mut first, &mut second])?;
    self::disk(&mut looker, &mut found, &samples, buffer.as_mut_slice())?;
    drop(looker);
    direct(disk, &mut found, &mut first)?;
    tracing::debug!(?found, "where a request's fields lie");
    Ok(found)
}

fn flags(
    looker: &mut Looker<'_>,
    found: &mut Config,
    samples: &mut Vec<Sample>,
    buffer: &mut [u8],
) -> Result<(), CaptureError> {
    let what = "a request's operation";
    let mut candidates: Vec<usize> = (8..found.sector as usize).step_by(4).collect();
    for round in 0..ROUNDS {
        for io in [Io::Read, Io::Write, Io::Discard] {
            let sample = looker.sample(io, &mut buffer[..(round % 3 + 1) * PAGE], &[], 0)?;
            candidates.retain(|at| word(&sample.request, *at).is_some_and(|w| w as u8 == io.op()));
            if io == Io::Read {
                samples.push(sample);
            }
        }
    }
    match candidates.as_slice() {
        [only] => found.cmd = *only as u32,
        _ => return Err(unknown(what)),
    }
    Ok(())
}

fn bio(looker: &mut Looker<'_>, found: &mut Config, samples: &[Sample], buffer: &mut [u8]) -> Result<(), CaptureError> {
    let first =
        |s: &Sample, at: usize| quad(&s.request, at).is_some_and(|p| pointer(p) && quad(&s.request, at + 8) == Some(p));
    for at in (8..LOOK_WORDS * 8 - 8).step_by(8).filter(|at| samples.iter().all(|s| first(s, *at))) {
        let mut seen = Vec::new();
        for pages in [1, 2, 3] {
            seen.push(looker.sample(Io::Read, &mut buffer[..pages * PAGE], &[at as u32], 0)?);
        }
        let iter = |s: &Sample, i: usize| quad(&s.data, i) == Some(s.sector) && word(&s.data, i + 8) == Some(s.len);
        if let Some(iter) = (0..PEEK_BYTES / 2).step_by(8).find(|i| seen.iter().all(|s| iter(s, *i))) {
            (found.bio, found.iter) = (at as u32, iter as u32);
            return Ok(());
        }
    }
    Err(unknown("a request's bio"))
}

fn vector(looker: &mut Looker<'_>, found: &mut Config, mut pages: [&mut LockedPage; 2]) -> Result<(), CaptureError> {
    let frame = |page: &LockedPage| {
        page.frame().map_err(|source| CaptureError::TestDisk { what: "find a page's frame", source })
    };
    let frames = [frame(pages[0])?, frame(pages[1])?];
    let bio = looker.sample(Io::Read, pages[0].as_mut_slice(), &[found.bio], 0)?;
    for at in (8..PEEK_BYTES / 2).step_by(8).filter(|at| quad(&bio.data, *at).is_some_and(pointer)) {
        let mut at_page = [0; 2];
        for (page, to) in pages.iter_mut().zip(&mut at_page) {
            let sample = looker.sample(Io::Read, page.as_mut_slice(), &[found.bio, at as u32], 0)?;
            let fits = word(&sample.data, 8) == Some(PAGE as u32) && word(&sample.data, 12) == Some(0);
            *to = quad(&sample.data, 0).filter(|p| fits && pointer(*p)).unwrap_or(0);
        }
        if at_page.contains(&0) || frames[0] == frames[1] {
            continue;
        }
        let (apart, frames_apart) = (at_page[0].abs_diff(at_page[1]), frames[0].abs_diff(frames[1]));
        let size = apart / frames_apart;
        let same_way = (at_page[0] > at_page[1]) == (frames[0] > frames[1]);
        if same_way && apart.is_multiple_of(frames_apart) && (32..=512).contains(&size) {
            found.vec = at as u32;
            found.page_size = size;
            found.vmemmap = at_page[0].wrapping_sub(frames[0].wrapping_mul(size));
            return Ok(());
        }
    }
    Err(unknown("a bio's pages"))
}

fn disk(
    looker: &mut Looker<'_>,
    found: &mut Config,
    samples: &[Sample],
    buffer: &mut [u8],
) -> Result<(), CaptureError> {
    let number = looker.disk.number;
    let is_disk = |data: &[u8]| word(data, 0) == Some(number.major) && word(data, 4) == Some(number.minor);
    let page = &mut buffer[..PAGE];
    for at in (8..LOOK_WORDS * 8).step_by(8) {
        if samples.iter().all(|s| quad(&s.request, at).is_some_and(pointer))
            && is_disk(&looker.sample(Io::Read, page, &[at as u32], 0)?.data)
        {
            (found.disk, found.by_queue) = (at as u32, 0);
            return Ok(());
        }
    }
    for from in (0..QUEUE_BYTES).step_by(PEEK_BYTES) {
        let queue = looker.sample(Io::Read, page, &[0], from)?;
        for i in (0..PEEK_BYTES).step_by(8).filter(|i| quad(&queue.data, *i).is_some_and(pointer)) {
            let at = from + i as u32;
            if is_disk(&looker.sample(Io::Read, page, &[0, at], 0)?.data) {
                (found.disk, found.by_queue) = (at, 1);
                return Ok(());
            }
        }
    }
    Err(unknown("a request's disk"))
}

fn direct(disk: &TestDisk, found: &mut Config, page: &mut LockedPage) -> Result<(), CaptureError> {
    let pfn = page.frame().map_err(|source| CaptureError::TestDisk { what: "find a page's frame", source })?;
    let word = magic();
    let mut looker = Looker::new(disk, ["hf_direct_second", "hf_direct_first"], Config::default())?;
    for search in 0..SEARCHES {
        page.fill(word);
        let config = Config { magic: word, pfn, skip_gib: search * SEARCH_GIB, ..Config::default() };
        // A write: the page keeps its word.
        let (peek, _) = looker.seen(Io::Write, page.as_mut_slice(), config)?;
        if peek.direct != 0 {
            found.direct = peek.direct;
            return Ok(());
        }
    }
    Err(unknown("the map of all memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_must_hold_in_every_sample() {
        let sample = |sector: u64, other: u64| {
            let mut request = vec![0; LOOK_WORDS * 8];
            request[40..48].copy_from_slice(&sector.to_ne_bytes());
            request[16..24].copy_from_slice(&other.to_ne_bytes());
            Sample { sector, len: 0, request, data: Vec::new() }
        };
        let samples = [sample(7000, 7000), sample(9000, 1)];
        assert_eq!(place(&samples, 8, |s, at| quad(&s.request, at) == Some(s.sector)), Some(40));
        assert_eq!(place(&samples, 8, |s, at| quad(&s.request, at) == Some(s.sector + 1)), None);
        assert!(
            pointer(0xffff_8880_0000_1000)
                && pointer(0xff32_9f29_8322_5e40)
                && !pointer(0x7fff_0000_0000)
                && !pointer(u64::MAX)
        );
    }
}
