//! Capture backend `bpf-legacy`: what `bpf-rq` does, for kernels with neither BPF ring buffer nor type information (4.18, 4.19: Kylin V10,
//! UOS).
//!
//! The kernel half is `legacy.bpf.c`; its head says what old kernels lack and what stands in its place. This half finds where the fields of
//! a request lie ([`offsets`]), reads one perf buffer per CPU and merges them into one order ([`perf`]), and hands the dirty map's marks out.
//!
//! **Start.** 1. A test disk of the agent's own, in memory ([`testdisk`]). 2. Calibration on it. 3. The programs are loaded and attached.
//! 4. Self-test: what the agent writes to the test disk (pieces of 512 bytes to 1 MiB, from memory that is not aligned to pages) must come out
//! byte for byte, flushes and discards too, and the kernel half's count of what it sent must be what lies in the buffers. Without
//! a pass there is no capture.
//!
//! **Losses.** As with `bpf-rq`: marked first, counted after, and every record carries the count. There are two dirty maps, because a byte
//! that is read by a call cannot be taken atomically: the agent turns the kernel half to the other one, waits until no program is at
//! work that began before, and reads and clears the first. What has been handed out is the caller's: nothing is confirmed.
//!
//! **Limits**
//!
//! | | |
//! |---|---|
//! | the agent ends, in whatever way | capture ends with it: perf buffers live as long as their process, and links of old kernels cannot be pinned (a descriptor kept by systemd would not keep the buffers). The next agent compares all of the disks |
//! | a CPU that comes online later | its writes are marked and copied, until the agent is started again; it says so |
//! | an interrupt that issues a write in the very moment in which the code it interrupted is sending a record | the write is marked and copied |
//! | another program's BPF output on the same CPU in that moment, on kernels before 5.2 | may spoil the record: a fault of those kernels |
//! | requests above 1 MiB, discards of more than 264 ranges | the rest is marked and copied |
//! | disks without a request queue | refused |
//! | marking only (to spare the host) | costs as much as copying: the data is handed out all the same |
//! | memory | at least 2 MiB for each CPU, whatever `ring_mib` says |
//! | needs | x86_64, root, the kernel's loop driver, raw tracepoints (4.17) |
//!
//! **Time.** The start ends: the looking within a minute, the self-test within 20 s; nothing in it waits for randomness, which an old kernel
//! that has just begun may not have for hours.
//!
//! **Tests.** Here and in `perf` without a kernel; `root_legacy.rs` on the running one: identity, cuts, order over CPUs, overflow. In emulated
//! guests (`hw-tests/tests/kernels.rs`): identity and cuts on Ubuntu's 4.18, and on Debian's 6.1 with page tables of five levels; the whole agent
//! on that 4.18 (`without_bpf.rs`).

mod layout;
mod offsets;
mod perf;
mod testdisk;

use super::assemble::Assembler;
use super::bpf::{
    Options, at_rest, attach_loaded, by_bio, granules_of, key_of, layout as shared, lift_memlock, load, map_error,
    merged, push_granule, take_map,
};
use super::{Barrier, Capture, CaptureError, Captured, Counters, LostWhy, Polled, Position, Target, TargetId};
use crate::clock;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, ProgramArray},
    programs::links::FdLink,
};
use layout::{CELL_GRANULES, CELLS, CHUNKS, Cell, Config, State};
use model::{Extent, MonoTime};
use perf::{Buffers, ClockBarrier, Counts};
use shared::{
    BIG_LEN, Big, CountersValue, E_DATA, EVENT_BYTES, Event, GRANULE_BYTES, GRANULES_PER_CHUNK, MAX_RANGES, MAX_SKIPS,
    MAX_TARGETS, Span, TargetValue,
};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    sync::Arc,
    time::Duration,
};
use testdisk::TestDisk;

/// As the status shows it.
pub const NAME: &str = "bpf-legacy";

const SCAN_EVERY_MS: u64 = 100;
const STALE_EVERY_MS: u64 = 5_000;
const SETTLE_EVERY_MS: u64 = 500;
/// As in `bpf-rq`.
const SETTLE_MS: u64 = 2_000;
/// A program runs for a fraction of a millisecond; longer when its virtual CPU is stopped by a host above.
const QUIET_MAX_MS: u64 = 2_000;
const QUIET_PAUSE: Duration = Duration::from_micros(50);
/// The self-test's records are in the buffers when the writes return; that the mark passes them may take as long as a busy host.
const SELFTEST_MAX_MS: u64 = 20_000;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("HOLDFAST_BPF_LEGACY_OBJECT"));

/// Parses the object and makes its maps, for as many CPUs as there can be; no program is loaded yet.
fn load_object() -> Result<Ebpf, CaptureError> {
    if OBJECT.is_empty() {
        return Err(CaptureError::NotBuiltIn);
    }
    if !cfg!(target_arch = "x86_64") {
        return Err(CaptureError::Architecture { arch: std::env::consts::ARCH });
    }
    let possible = cpus("possible")?.last().map_or(1, |last| last + 1);
    let object = without_types(OBJECT).ok_or(CaptureError::NotBuiltIn)?;
    EbpfLoader::new().map_max_entries("credit", possible).load(&object).map_err(|e| CaptureError::Load(Box::new(e)))
}

/// The object with type information that the loader can read, which finds the maps in it, and that no kernel takes: one of 4.18 would take it,
/// and would then refuse the programs, because it does not know the fields by which a program is tied to it. A header with a flag does that:
/// none is defined, and what is not defined is refused. The loader goes on without.
fn without_types(object: &[u8]) -> Option<Vec<u8>> {
    // Magic, version 1, flags, and the header's length, 24; the header of `.BTF.ext` is longer.
    const HEAD: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
    let at = object.windows(HEAD.len()).position(|w| w == HEAD)?;
    let mut out = object.to_vec();
    out[at + 3] = 1;
    Some(out)
}

fn cpus(which: &'static str) -> Result<Vec<u32>, CaptureError> {
    let path = format!("/sys/devices/system/cpu/{which}");
    let text = std::fs::read_to_string(&path);
    let text = text.map_err(|source| CaptureError::File { what: "read", path: path.clone(), source })?;
    perf::cpu_list(&text).filter(|l| !l.is_empty()).ok_or(CaptureError::File {
        what: "understand",
        path,
        source: io::ErrorKind::InvalidData.into(),
    })
}

/// Attaches the first of the programs that this kernel's tracepoint has the arguments for; answers which.
fn pick(ebpf: &mut Ebpf, programs: [&'static str; 2]) -> Result<(&'static str, FdLink), CaptureError> {
    let [first, second] = programs;
    match attach_loaded(load(ebpf, first)?, first, "block_rq_issue") {
        Ok(link) => Ok((first, link)),
        Err(_) => Ok((second, attach_loaded(load(ebpf, second)?, second, "block_rq_issue")?)),
    }
}

/// Puts a perf buffer's descriptor into its place in the map. The entry lives as long as this map's descriptor.
fn set_event(map: &MapData, cpu: u32, fd: i32) -> io::Result<()> {
    const MAP_UPDATE_ELEM: libc::c_int = 2;
    let (key, value) = (cpu, fd);
    // union bpf_attr: the map's descriptor, the addresses of key and value, flags.
    let attr: [u64; 4] = [map.fd().as_fd().as_raw_fd() as u64, &raw const key as u64, &raw const value as u64, 0];
    // SAFETY: key and value are as long as the map's (four bytes each) and live for the call; so do the attributes.
    let done = unsafe { libc::syscall(libc::SYS_bpf, MAP_UPDATE_ELEM, attr.as_ptr(), size_of_val(&attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

struct Held {
    target: Target,
    first_chunk: u32,
    /// The pieces of the dirty map, each twice.
    cells: Vec<[Array<MapData, Cell>; 2]>,
}

struct Resting {
    at: Position,
    issued_before: MonoTime,
    disks: Vec<TargetId>,
}

pub struct LegacyCapture {
    /// Dropped first: no program runs any more when the rest goes.
    links: Vec<FdLink>,
    /// Holds the programs that are called by others.
    _tails: ProgramArray<MapData>,
    _ebpf: Ebpf,
    _events: MapData,
    buffers: Buffers,
    online: Vec<u32>,
    credit: Array<MapData, u64>,
    state: PerCpuArray<MapData, State>,
    targets_map: BpfHashMap<MapData, u64, TargetValue>,
    dirty: ArrayOfMaps<MapData, Array<MapData, Cell>>,
    big: PerCpuArray<MapData, Big>,
    counters: PerCpuArray<MapData, CountersValue>,
    losses: Array<MapData, u64>,
    targets: HashMap<TargetId, Held>,
    next_id: u32,
    assembler: Assembler,
    seen_losses: u64,
    seen_big: Vec<u64>,
    flip: usize,
    last_scan: MonoTime,
    last_stale: MonoTime,
    last_settle: MonoTime,
    resting: Option<Resting>,
    bytes: Vec<u8>,
}

fn data_of(map: Map) -> Option<MapData> {
    match map {
        Map::PerfEventArray(data) => Some(data),
        _ => None,
    }
}

impl LegacyCapture {
    /// Begins; nothing of a process before is gone on with.
    pub fn start(options: &Options) -> Result<Self, CaptureError> {
        lift_memlock();
        let disk = TestDisk::new()?;
        let found = offsets::find(&disk)?;
        let online = cpus("online")?;
        let each = (options.ring_bytes / online.len() as u32).max(perf::BUFFER_MIN).next_power_of_two();
        let mut this = Self::attach(found, online, each)?;
        let ids = this.set_targets(&[Target {
            disk: disk.number,
            sectors: disk.sectors(),
            ranges: vec![Extent::new(0, disk.sectors())],
            skips: Vec::new(),
        }])?;
        this.self_test(&disk, ids.first().copied())?;
        this.set_targets(&[])?;
        Ok(this)
    }

    fn attach(found: Config, online: Vec<u32>, each: u32) -> Result<Self, CaptureError> {
        let mut ebpf = load_object()?;
        let missing = |what| CaptureError::Missing { program: "the capture object", what };
        let events = data_of(take_map(&mut ebpf, "events")?).ok_or(missing("events"))?;
        let buffer = |source| CaptureError::File {
            what: "make the capture buffers",
            path: format!("{each} bytes each"),
            source,
        };
        let buffers = Buffers::open(&online, each).map_err(buffer)?;
        for (cpu, fd) in buffers.fds() {
            set_event(&events, cpu, fd.as_raw_fd()).map_err(buffer)?;
        }
        let mut config: Array<MapData, Config> =
            Array::try_from(take_map(&mut ebpf, "config")?).map_err(map_error("config"))?;
        let told = Config { ring_bytes: u64::from(each), ..found };
        config.set(0, told, 0).map_err(map_error("config"))?;
        let mut tails = ProgramArray::try_from(take_map(&mut ebpf, "tails")?).map_err(map_error("tails"))?;
        for (place, name) in ["hf_copy", "hf_ranges"].into_iter().enumerate() {
            let program = load(&mut ebpf, name)?;
            let fd = program.fd().map_err(|e| CaptureError::Program { program: name, source: Box::new(e) })?;
            tails.set(place as u32, fd, 0).map_err(map_error("tails"))?;
        }
        // Completions first, as with `bpf-rq`.
        let complete = attach_loaded(load(&mut ebpf, "hf_complete")?, "hf_complete", "block_rq_complete")?;
        let (_, issue) = pick(&mut ebpf, ["hf_issue_second", "hf_issue_first"])?;
        let big: PerCpuArray<MapData, Big> =
            PerCpuArray::try_from(take_map(&mut ebpf, "big")?).map_err(map_error("big"))?;
        let seen_big = big.get(&0, 0).map_err(map_error("big"))?.iter().map(|b| b.count).collect();
        Ok(Self {
            links: vec![issue, complete],
            _tails: tails,
            _events: events,
            buffers,
            online,
            credit: Array::try_from(take_map(&mut ebpf, "credit")?).map_err(map_error("credit"))?,
            state: PerCpuArray::try_from(take_map(&mut ebpf, "state")?).map_err(map_error("state"))?,
            targets_map: BpfHashMap::try_from(take_map(&mut ebpf, "targets")?).map_err(map_error("targets"))?,
            dirty: ArrayOfMaps::try_from(take_map(&mut ebpf, "dirty_map_pieces")?).map_err(map_error("dirty"))?,
            big,
            counters: PerCpuArray::try_from(take_map(&mut ebpf, "counters")?).map_err(map_error("counters"))?,
            losses: Array::try_from(take_map(&mut ebpf, "losses")?).map_err(map_error("losses"))?,
            _ebpf: ebpf,
            targets: HashMap::new(),
            next_id: 1,
            assembler: Assembler::new(),
            seen_losses: 0,
            seen_big,
            flip: 0,
            last_scan: MonoTime(0),
            last_stale: MonoTime(0),
            last_settle: MonoTime(0),
            resting: None,
            bytes: Vec::new(),
        })
    }

    fn counts(&self) -> Result<Vec<Counts>, CaptureError> {
        Ok(self.state.get(&0, 0).map_err(map_error("state"))?.iter().map(|s| s.counts).collect())
    }

    fn losses_now(&self) -> Result<u64, CaptureError> {
        self.losses.get(&0, 0).map_err(map_error("losses"))
    }

    /// Writes to the test disk and compares what comes out.
    fn self_test(&mut self, disk: &TestDisk, id: Option<TargetId>) -> Result<(), CaptureError> {
        let failed = |what| move |source| CaptureError::TestDisk { what, source };
        let mut want: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        // Sector and sectors; written one after the other, so that the last flush is last in order.
        let pieces = [(8u64, 8u64), (1001, 1), (4096, 128), (9000, 2048), (12, 3), (20_000, 517)];
        let longest = pieces.iter().map(|(_, n)| n * 512).max().unwrap_or(0) as usize;
        let mut memory = durable::AlignedBuf::with_capacity(longest + 512);
        memory.extend_from_slice(&vec![0; longest + 512]);
        for (n, (sector, sectors)) in pieces.into_iter().enumerate() {
            // Not at the beginning of a page, every other time.
            let from = n % 2 * 512;
            let bytes = &mut memory.as_mut_slice()[from..from + (sectors * 512) as usize];
            let seed = super::bpf::magic();
            bytes.chunks_mut(8).enumerate().for_each(|(i, b)| b.copy_from_slice(&(seed ^ i as u64).to_ne_bytes()));
            disk.file.write_all_at(bytes, sector * 512).map_err(failed("write to the test disk"))?;
            for (i, block) in bytes.chunks(512).enumerate() {
                want.insert(sector + i as u64, block.to_vec());
            }
        }
        disk.discard(30_000 * 512, 64 * 512).map_err(failed("discard on the test disk"))?;
        disk.file.sync_all().map_err(failed("flush the test disk"))?;
        let wrong = |what| CaptureError::LegacySelfTest { what };
        let begun = clock::mono();
        let (mut seen, mut discards, mut flushes) = (BTreeMap::new(), 0, 0);
        while seen.len() < want.len() || discards == 0 || flushes == 0 || self.assembler.in_flight() > 0 {
            let mut out = Vec::new();
            let polled = self.poll(usize::MAX, true, clock::mono(), &mut out)?;
            self.release(polled.position);
            for event in out {
                match event {
                    Captured::Lost { .. } => return Err(wrong("a write was lost")),
                    Captured::Request(r) if Some(r.target) == id => match r.op {
                        super::Op::Write => {
                            let sectors = r.extents.iter().flat_map(|e| e.start()..e.end());
                            seen.extend(sectors.zip(r.data.chunks(512).map(<[u8]>::to_vec)));
                        }
                        super::Op::Discard => discards += usize::from(r.extents == [Extent::new(30_000, 64)]),
                        super::Op::Flush => flushes += 1,
                        super::Op::Zero => {}
                    },
                    _ => {}
                }
            }
            if clock::mono().ms_since(begun) > SELFTEST_MAX_MS {
                return Err(wrong("not everything that was written was seen"));
            }
            std::thread::sleep(QUIET_PAUSE);
        }
        if seen != want {
            return Err(wrong("what was seen is not what was written"));
        }
        self.quiet()?;
        match self.buffers.agrees(&self.counts()?) {
            true => Ok(()),
            false => Err(wrong("the buffers hold another number of bytes than was counted")),
        }
    }

    /// Waits until each CPU has been seen with no program at work; says whether it was.
    fn quiet(&self) -> Result<bool, CaptureError> {
        let begun = clock::mono();
        let mut seen: Vec<bool> = Vec::new();
        loop {
            let counts = self.counts()?;
            seen.resize(counts.len(), false);
            seen.iter_mut().zip(&counts).for_each(|(seen, c)| *seen |= c.enter == c.exit);
            if seen.iter().all(|s| *s) {
                return Ok(true);
            }
            if clock::mono().ms_since(begun) >= QUIET_MAX_MS {
                return Ok(false);
            }
            std::thread::sleep(QUIET_PAUSE);
        }
    }

    /// Hands out every mark, and the long losses.
    fn scan(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        // Count first, marks after: a loss in between is seen by the next scan.
        let losses = self.losses_now()?;
        let old = self.flip;
        self.flip = 1 - old;
        self.losses.set(1, self.flip as u64, 0).map_err(map_error("losses"))?;
        let quiet = self.quiet()?;
        for (id, held) in &mut self.targets {
            let mut extents: Vec<Extent> = Vec::new();
            let cells = granules_of(held.target.sectors).div_ceil(CELL_GRANULES as u64);
            for cell in 0..cells {
                let (piece, at) = ((cell / u64::from(CELLS)) as usize, (cell % u64::from(CELLS)) as u32);
                let Some(map) = held.cells.get_mut(piece).map(|pair| &mut pair[old]) else { continue };
                let value = map.get(&at, 0).map_err(map_error("dirty"))?;
                let first = cell * CELL_GRANULES as u64;
                let marked = value.granule.iter().enumerate().filter(|(_, m)| **m != 0).map(|(i, _)| first + i as u64);
                let mut any = false;
                for granule in marked {
                    push_granule(&mut extents, granule, held.target.sectors);
                    any = true;
                }
                if any {
                    map.set(at, Cell { granule: [0; CELL_GRANULES] }, 0).map_err(map_error("dirty"))?;
                }
            }
            if !quiet {
                // A program that hangs may still mark what has just been read.
                extents = vec![Extent::new(0, held.target.sectors)];
            }
            if !extents.is_empty() {
                self.assembler.doubt(*id, &extents);
                out.push(Captured::Lost { target: *id, extents, why: LostWhy::Overflow });
            }
        }
        self.scan_big(out)?;
        // Positions are times here.
        self.assembler.told_until(Position(clock::mono().0 + 1));
        self.seen_losses = losses;
        Ok(())
    }

    fn scan_big(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        let per_cpu = self.big.get(&0, 0).map_err(map_error("big"))?;
        for (seen, big) in self.seen_big.iter_mut().zip(per_cpu.iter()) {
            let lost: Vec<(TargetId, Extent)> = if big.count - *seen > BIG_LEN as u64 - 1 {
                // More than is remembered: all of every disk.
                self.targets.iter().map(|(id, h)| (*id, Extent::new(0, h.target.sectors))).collect()
            } else {
                let range = |i: u64| &big.range[(i % BIG_LEN as u64) as usize];
                (*seen..big.count)
                    .map(range)
                    .map(|r| (TargetId(r.target as u32), Extent::new(r.sector, r.sectors)))
                    .collect()
            };
            for (target, extent) in lost {
                self.assembler.doubt(target, &[extent]);
                out.push(Captured::Lost { target, extents: vec![extent], why: LostWhy::Overflow });
            }
            *seen = big.count;
        }
        Ok(())
    }

    fn settle(&mut self, now: MonoTime, out: &mut Vec<Captured>) {
        let position = self.buffers.position();
        if let Some(resting) = self.resting.take_if(|r| r.at <= position) {
            for id in resting.disks {
                self.assembler.settle(id, resting.issued_before, out);
            }
        }
        if self.resting.is_some() || now.ms_since(self.last_settle) < SETTLE_EVERY_MS {
            return;
        }
        self.last_settle = now;
        let issued_before = MonoTime(now.0.saturating_sub(SETTLE_MS * 1_000_000));
        let mut disks = self.assembler.waiting_since(issued_before);
        disks.retain(|id| self.targets.get(id).is_some_and(|h| at_rest(h.target.disk)));
        if !disks.is_empty() {
            self.resting = Some(Resting { at: ClockBarrier.now(), issued_before, disks });
        }
    }

    /// CPUs that came later.
    fn tell(&mut self) {
        if let Ok(online) = cpus("online")
            && online.iter().any(|cpu| !self.online.contains(cpu))
        {
            tracing::warn!(
                "a CPU came online: its writes are copied instead of captured until the agent is started again"
            );
            self.online = online;
        }
    }

    /// The first run of `count` unused places among the dirty map's pieces.
    fn free_chunks(&self, count: u32) -> Option<u32> {
        let mut used: Vec<(u32, u32)> =
            self.targets.values().map(|h| (h.first_chunk, h.first_chunk + h.cells.len() as u32)).collect();
        used.sort_unstable();
        let mut at = 0;
        for (start, end) in used {
            if start >= at + count {
                break;
            }
            at = at.max(end);
        }
        (at + count <= CHUNKS).then_some(at)
    }

    fn add(&mut self, target: &Target) -> Result<TargetId, CaptureError> {
        if by_bio(target.disk) {
            let what = "disks without a request queue are not captured by bpf-legacy".to_owned();
            return Err(CaptureError::Feature { what });
        }
        let full =
            CaptureError::DirtyMapFull { max_tib: (u64::from(CHUNKS) * GRANULES_PER_CHUNK * GRANULE_BYTES) >> 40 };
        let chunks = granules_of(target.sectors).div_ceil(GRANULES_PER_CHUNK);
        let Some((count, first)) = u32::try_from(chunks).ok().and_then(|count| Some((count, self.free_chunks(count)?)))
        else {
            return Err(full);
        };
        let mut cells = Vec::new();
        for i in first..first + count {
            let make = || Array::<MapData, Cell>::create(CELLS, 0).map_err(map_error("dirty"));
            let pair = [make()?, make()?];
            for (flip, map) in pair.iter().enumerate() {
                self.dirty.set(i * 2 + flip as u32, map, 0).map_err(map_error("dirty"))?;
            }
            cells.push(pair);
        }
        // Never given twice, and its place among the counters (modulo) is free.
        let id = (self.next_id..)
            .find(|n| self.targets.keys().all(|k| k.0 as usize % MAX_TARGETS != *n as usize % MAX_TARGETS))
            .ok_or(CaptureError::TooManyDisks { asked: self.targets.len() + 1, max: MAX_TARGETS })?;
        self.next_id = id + 1;
        let held = Held { target: target.clone(), first_chunk: first, cells };
        self.write_target(TargetId(id), &held)?;
        self.targets.insert(TargetId(id), held);
        Ok(TargetId(id))
    }

    fn write_target(&mut self, id: TargetId, held: &Held) -> Result<(), CaptureError> {
        let t = &held.target;
        let skips = merged(&t.skips);
        for (what, asked, max) in
            [("protected ranges", t.ranges.len(), MAX_RANGES), ("excluded extents", skips.len(), MAX_SKIPS)]
        {
            if asked > max {
                return Err(CaptureError::TooManyRanges { disk: t.disk, what, asked, max });
            }
        }
        let mut value = TargetValue {
            id: id.0,
            ranges_len: t.ranges.len() as u32,
            skips_len: skips.len() as u32,
            first_chunk: held.first_chunk,
            granules: granules_of(t.sectors),
            ..TargetValue::default()
        };
        for (to, from) in value.ranges.iter_mut().zip(&t.ranges).chain(value.skips.iter_mut().zip(&skips)) {
            *to = Span { start: from.start(), end: from.end() };
        }
        self.targets_map.insert(key_of(t.disk), value, 0).map_err(map_error("targets"))
    }

    fn drop_target(&mut self, id: TargetId) -> Result<(), CaptureError> {
        let Some(held) = self.targets.remove(&id) else { return Ok(()) };
        match self.targets_map.remove(&key_of(held.target.disk)) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(e) => return Err(map_error("targets")(e)),
        }
        self.assembler.drop_target(id);
        Ok(())
    }
}

impl Capture for LegacyCapture {
    fn name(&self) -> &'static str {
        NAME
    }

    fn set_targets(&mut self, targets: &[Target]) -> Result<Vec<TargetId>, CaptureError> {
        if targets.len() > MAX_TARGETS {
            return Err(CaptureError::TooManyDisks { asked: targets.len(), max: MAX_TARGETS });
        }
        let stays = |h: &Held| {
            targets.iter().any(|t| t.disk == h.target.disk && granules_of(t.sectors) == granules_of(h.target.sectors))
        };
        let gone: Vec<TargetId> = self.targets.iter().filter(|(_, h)| !stays(h)).map(|(id, _)| *id).collect();
        for id in gone {
            self.drop_target(id)?;
        }
        let mut ids = Vec::new();
        for target in targets {
            let held = self.targets.iter().find(|(_, h)| h.target.disk == target.disk).map(|(id, _)| *id);
            let Some(id) = held else {
                ids.push(self.add(target)?);
                continue;
            };
            ids.push(id);
            if let Some(mut held) = self.targets.remove(&id) {
                let changed = held.target != *target;
                held.target = target.clone();
                let written = if changed { self.write_target(id, &held) } else { Ok(()) };
                self.targets.insert(id, held);
                written?;
            }
        }
        Ok(ids)
    }

    fn targets(&self) -> Vec<(TargetId, Target)> {
        self.targets.iter().map(|(id, h)| (*id, h.target.clone())).collect()
    }

    /// Writes are handed out in either mode, which is more than [`super::Mode::ExtentsOnly`] asks for and costs what it would save: a mark
    /// of this backend counts as a loss, and on a host with other disks each of their records would look like one after a loss.
    fn set_mode(&mut self, _target: TargetId, _mode: super::Mode) -> Result<(), CaptureError> {
        Ok(())
    }

    fn poll(
        &mut self,
        budget: usize,
        exact: bool,
        now: MonoTime,
        out: &mut Vec<Captured>,
    ) -> Result<Polled, CaptureError> {
        // The clock, then the counts, then the buffers: see `perf`.
        let clock = clock::mono().0;
        let counts = self.counts()?;
        self.buffers.look(clock, &counts)?;
        let (mut taken, mut more) = (0usize, false);
        let mut bytes = std::mem::take(&mut self.bytes);
        while let Some(time) = self.buffers.next(&mut bytes) {
            let damaged = CaptureError::Damaged { at: time, len: bytes.len() as u32 };
            let Some(event) = Event::read(&bytes) else { return Err(damaged) };
            taken += bytes.len();
            let data = match event.has(E_DATA) {
                true => bytes.get(EVENT_BYTES..EVENT_BYTES + event.len as usize),
                false => Some(&[][..]),
            };
            let Some(data) = data else { return Err(damaged) };
            if self.targets.contains_key(&TargetId(event.target)) {
                // A count that runs ahead of ours, with wrapping: losses happened before this record.
                let ahead = event.lost.wrapping_sub(self.seen_losses as u32) as i32 > 0;
                if ahead && exact {
                    self.scan(out)?;
                }
                self.assembler.event(&event, data, Position(time), out);
                if ahead && exact {
                    // The caller opens a gap now and may not want the next loss in order: it is asked again.
                    more = true;
                    break;
                }
            }
            if taken >= budget {
                more = true;
                break;
            }
        }
        self.bytes = bytes;
        if !more {
            self.assembler.give_up_unfinished(now, out);
        }
        let due = exact || now.ms_since(self.last_scan) >= SCAN_EVERY_MS;
        if !more && due && self.losses_now()? != self.seen_losses {
            self.scan(out)?;
            self.last_scan = now;
        }
        self.settle(now, out);
        if now.ms_since(self.last_stale) >= STALE_EVERY_MS {
            self.assembler.forget_stale(now, out);
            self.tell();
            self.last_stale = now;
        }
        Ok(Polled { position: self.buffers.position(), more })
    }

    fn flush_losses(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        if self.losses_now()? == self.seen_losses { Ok(()) } else { self.scan(out) }
    }

    /// Nothing of this outlives the agent: what was handed out is forgotten already.
    fn confirm_losses(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }

    fn release(&mut self, position: Position) {
        let to = self.assembler.oldest_pending().map_or(position, |p| p.min(position));
        for (cpu, freed) in self.buffers.release(to) {
            if let Err(e) = self.credit.set(cpu, freed, 0) {
                // The kernel half believes the buffer fuller than it is: it marks instead of sending.
                tracing::error!(error = %e, "could not tell the kernel what was freed");
            }
        }
    }

    fn barrier(&self) -> Arc<dyn Barrier> {
        Arc::new(ClockBarrier)
    }

    fn handed_out(&self) -> u64 {
        self.assembler.handed_out()
    }

    fn writes_before(&self, number: u64, target: TargetId, extent: &Extent) -> bool {
        self.assembler.writes_before(number, target, extent)
    }

    fn in_flight(&self) -> usize {
        self.assembler.in_flight()
    }

    fn fill(&self) -> (u64, u64) {
        self.buffers.fill()
    }

    fn counters(&self) -> Result<Counters, CaptureError> {
        let mut sum = Counters::default();
        for id in self.targets.keys() {
            let place = id.0 % MAX_TARGETS as u32;
            for c in self.counters.get(&place, 0).map_err(map_error("counters"))?.iter() {
                sum.requests += c.requests;
                sum.bytes += c.bytes;
                sum.drops += c.drops;
                sum.drop_bytes += c.drop_bytes;
                sum.faults += c.faults;
                sum.truncated += c.truncated;
                sum.passthrough += c.passthrough;
                sum.unknown += c.unknown;
            }
        }
        sum.unseen = self.assembler.unseen();
        Ok(sum)
    }

    fn passthrough(&self) -> Result<Vec<(TargetId, u64)>, CaptureError> {
        let one = |id: &TargetId| {
            let place = id.0 % MAX_TARGETS as u32;
            let all = self.counters.get(&place, 0).map_err(map_error("counters"))?;
            Ok((*id, all.iter().map(|c| c.passthrough).sum()))
        };
        self.targets.keys().map(one).collect()
    }

    fn resumed(&self) -> bool {
        false
    }

    fn remove(&mut self) -> Result<(), CaptureError> {
        self.links.clear();
        self.targets.clear();
        Ok(())
    }
}
