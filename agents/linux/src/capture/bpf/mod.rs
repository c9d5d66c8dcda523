//! Capture backend `bpf-rq`: a BPF program on the tracepoint `block_rq_issue` copies the data of every write.
//!
//! The kernel half is `capture.bpf.c`, compiled at build time and carried in this binary. This half loads it, tells it the
//! disks, and reads its ring.
//!
//! **Start.** 1. BTF tells what this kernel's tracepoints and types look like; what does not fit is refused with its name.
//! 2. Calibration: one block is read into a page with a known content and frame number; the request shows where the kernel keeps
//! its `struct page`s and its map of all memory. 3. Self-test: [`SELFTEST_PAGES`] other pages are read and must be found by the formula
//! that capture uses. Without a pass there is no capture. 4. The programs are loaded and attached, and maps and links are pinned.
//!
//! **Pins.** Everything lives under one directory of a BPF file system. When the agent dies the kernel half goes on; the next
//! agent opens the pins and reads on where the ring was last released. `meta` says whether the pins are whole and of our
//! layout. A reboot takes it all away.
//!
//! **Losses.** The kernel half marks what it could not send in the dirty map (one byte per 64 KiB) and counts. A byte is 1 when set
//! by the kernel, 2 once handed out, and 0 again when the caller has confirmed that it is safe elsewhere: an agent that dies in between
//! leaves it for the next one.
//!
//! **Marks only.** A disk can be switched to have its writes marked and not copied ([`Capture::set_mode`]): a flag in its entry of the
//! map, so it holds from the next request on and beyond the agent's death. Such marks are not counted as losses (on a host with other disks
//! every record of those would look like one after a loss) and are looked for once a second.
//!
//! **Disks without a request queue** (zram, pmem, the head of NVMe multipath; `bpf-bio`) are captured by a sister program where they are
//! handed bios, into the same ring and so in the same order. It is loaded and pinned where the kernel has what it needs
//! ([`bio_capture`]), and attached only while such a disk is captured: it looks at every bio of the host.
//!
//! **Unseen completions.** With its CPUs overloaded, a 6.18 kernel now and then runs no BPF program for a burst of completions (some
//! tens of 7,000): its own trace has them, every program misses the same ones, and none is counted as a recursion miss. The cause is not
//! found; calls of `bpf` by other processes are not it (tried). The write's data is there all the same, and that it is over is found out by
//! [`super::assemble`]. A write whose issue went unseen shows as a completion of nothing and is read again; one of which both went
//! unseen would not show. None was ever found missing: every test compares all of the disk.
//!
//! **Long bios.** A request is kept at 1 MiB by the disk's own limit, a bio is not: of one longer than 384 pieces of memory (1.5 MiB in
//! single pages) the rest is marked and copied.
//!
//! **Limits.** 64 disks, 8 ranges each, 256 extents left out; x86_64; needs `CAP_BPF` and `CAP_PERFMON` or root. Does not see commands
//! passed through to the device (counted), nor what programs write to memory-like disks by DAX (refused by `disks`).

mod btf;
mod calibrate;
pub mod layout;
mod pins;
pub mod probe;
mod ring;
pub mod watch;

pub use btf::BtfError;
pub(crate) use calibrate::{LockedPage, magic};
pub use pins::{PIN_ROOT, Pins};
pub(crate) use ring::Mapping;

use super::assemble::Assembler;
use super::{
    Barrier, Capture, CaptureError, Captured, Counters, DevNo, LostWhy, Mode, Polled, Position, Target, TargetId,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray},
    programs::{RawTracePoint, links::FdLink},
};
use layout::*;
use model::{Extent, MonoTime};
use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

/// Pages that the self-test reads.
pub const SELFTEST_PAGES: u32 = 8;
/// Between two scans of the dirty map when the caller does not need losses in order.
const SCAN_EVERY_MS: u64 = 100;
/// The same for the marks of disks whose writes are only marked.
const SCAN_MARKS_EVERY_MS: u64 = 1_000;
/// Between two searches for requests that never complete.
const STALE_EVERY_MS: u64 = 5_000;
/// Between two looks whether disks with old requests are at rest.
const SETTLE_EVERY_MS: u64 = 500;
/// A request is old then: far longer than a completion takes from the tracepoint to the reader.
const SETTLE_MS: u64 = 2_000;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("HOLDFAST_BPF_OBJECT"));

/// What the kernel half is told when it is loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    rq_arg: u32,
    bio_arg: u32,
    bio_done_arg: u32,
    fua_bit: u32,
    preflush_bit: u32,
    page_struct_size: u64,
}

/// How to begin.
#[derive(Clone, Debug)]
pub struct Options {
    /// A directory on a BPF file system, ours alone; made when it is not there.
    pub pins: PathBuf,
    /// Rounded up to a power of two.
    pub ring_bytes: u32,
}

pub struct BpfCapture {
    pins: Pins,
    ring: ring::Ring,
    targets_map: BpfHashMap<MapData, u64, TargetValue>,
    dirty: ArrayOfMaps<MapData, Array<MapData, u64>>,
    big: PerCpuArray<MapData, Big>,
    counters: PerCpuArray<MapData, CountersValue>,
    losses: ring::Mapping,
    meta: Array<MapData, u64>,
    targets: HashMap<TargetId, Held>,
    assembler: Assembler,
    resumed: bool,
    /// Losses whose marks have been handed out.
    seen_losses: u64,
    seen_big: Vec<u64>,
    /// Marks handed out and not yet confirmed.
    unconfirmed: Vec<(TargetId, u64)>,
    last_scan: MonoTime,
    last_marks: MonoTime,
    /// A disk's mode has changed: all marks are to be handed out, whatever the count of losses says.
    owed: bool,
    last_stale: MonoTime,
    last_settle: MonoTime,
    resting: Option<Resting>,
    /// To ask how often they were not run.
    programs: Vec<RawTracePoint>,
    /// Of [`Counters::passthrough`], told in the log.
    told_passthrough: u64,
}

/// Disks that had nothing under way when the ring ended at `at`.
struct Resting {
    at: Position,
    issued_before: MonoTime,
    disks: Vec<TargetId>,
}

struct Held {
    target: Target,
    /// Captured by its bios.
    by_bio: bool,
    mode: Mode,
    first_chunk: u32,
    /// The dirty map's maps of this disk, in order.
    chunks: Vec<ring::Mapping>,
}

impl Held {
    fn granules(&self) -> u64 {
        granules_of(self.target.sectors)
    }
    fn cell(&self, granule: u64) -> Option<&AtomicU8> {
        let chunk = self.chunks.get(usize::try_from(granule / GRANULES_PER_CHUNK).ok()?)?;
        let at = (granule % GRANULES_PER_CHUNK) as usize;
        if at >= chunk.len() {
            return None;
        }
        // SAFETY: inside the mapping (just checked), which lives as long as `self`; kernel and agent access single bytes only.
        Some(unsafe { AtomicU8::from_ptr(chunk.as_ptr().add(at)) })
    }
}

pub(crate) fn granules_of(sectors: u64) -> u64 {
    sectors.div_ceil(GRANULE_BYTES / 512)
}

fn chunks_of(sectors: u64) -> u32 {
    granules_of(sectors).div_ceil(GRANULES_PER_CHUNK).min(u64::from(DIRTY_CHUNKS)) as u32
}

pub(crate) fn map_error(map: &'static str) -> impl FnOnce(MapError) -> CaptureError {
    move |e| CaptureError::Map { map, source: Box::new(e) }
}

/// What the running kernel offers, or why capture cannot work on it.
pub(crate) fn constants() -> Result<Constants, CaptureError> {
    constants_of(&facts()?)
}

fn facts() -> Result<btf::Facts, CaptureError> {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    if OBJECT.is_empty() {
        return Err(CaptureError::NotBuiltIn);
    }
    if !cfg!(target_arch = "x86_64") {
        return Err(CaptureError::Architecture { arch: std::env::consts::ARCH });
    }
    let btf_error = |source| CaptureError::Btf { path: PATH, source };
    let bytes = std::fs::read(PATH).map_err(|e| btf_error(BtfError::Read(e)))?;
    btf::read_facts(&bytes).map_err(btf_error)
}

/// Whether disks without a request queue can be captured on this kernel.
pub fn bio_capture() -> crate::disks::BioCapture {
    use crate::disks::BioCapture;
    match facts().and_then(|f| constants_of(&f).map(|_| f)) {
        Err(e) => BioCapture::Not { why: crate::error_chain(&e) },
        Ok(facts) => match bio_arguments(&facts) {
            Ok(_) => BioCapture::Works,
            Err(why) => BioCapture::Not { why },
        },
    }
}

/// Which arguments of the two tracepoints are the bio, or why they do not show all that such disks are written.
fn bio_arguments(facts: &btf::Facts) -> Result<(u32, u32), String> {
    if facts.members.contains("block_device_operations.rw_page") {
        // Swap and some file systems hand single pages to zram, pmem and ramdisks by it, with no bio.
        return Err("this kernel writes single pages past everything that could be watched (rw_page)".to_owned());
    }
    bio_places(facts)
}

/// Which arguments of the two tracepoints are the bio.
fn bio_places(facts: &btf::Facts) -> Result<(u32, u32), String> {
    let place = |name: &str, table: &[(u32, u32)]| match facts.tracepoint_args.get(name) {
        None => Err(format!("this kernel has no tracepoint {name}")),
        Some(have) => table
            .iter()
            .find(|(args, _)| args == have)
            .map(|(_, place)| *place)
            .ok_or_else(|| format!("{name} takes {have} arguments, which is not known")),
    };
    Ok((place("block_bio_queue", &[(1, 0), (2, 1)])?, place("block_bio_complete", &[(2, 1), (3, 1)])?))
}

fn constants_of(facts: &btf::Facts) -> Result<Constants, CaptureError> {
    let missing = |what: String| CaptureError::Feature { what };
    let rq_arg = match facts.tracepoint_args.get("block_rq_issue") {
        Some(1) => 0,
        Some(2) => 1,
        Some(n) => return Err(missing(format!("block_rq_issue takes {n} arguments, 1 or 2 are known"))),
        None => return Err(missing("there is no tracepoint block_rq_issue".to_owned())),
    };
    match facts.tracepoint_args.get("block_rq_complete") {
        Some(3) => {}
        Some(n) => return Err(missing(format!("block_rq_complete takes {n} arguments, 3 are known"))),
        None => return Err(missing("there is no tracepoint block_rq_complete".to_owned())),
    }
    if facts.struct_size.get("bio_vec") != Some(&16) {
        return Err(missing("struct bio_vec does not have 16 bytes".to_owned()));
    }
    let page_struct_size = match facts.struct_size.get("page") {
        Some(size) if *size > 0 => u64::from(*size),
        _ => return Err(missing("struct page is not described".to_owned())),
    };
    for (name, want) in [
        ("REQ_OP_WRITE", OP_WRITE),
        ("REQ_OP_FLUSH", OP_FLUSH),
        ("REQ_OP_DISCARD", OP_DISCARD),
        ("REQ_OP_SECURE_ERASE", OP_SECURE_ERASE),
        ("REQ_OP_WRITE_ZEROES", OP_WRITE_ZEROES),
    ] {
        match facts.enumerator.get(name) {
            Some(have) if *have == want => {}
            Some(have) => return Err(missing(format!("{name} is {have}, {want} is known"))),
            None => return Err(missing(format!("{name} is not described"))),
        }
    }
    let bit = |name: &str| match facts.enumerator.get(name) {
        Some(bit) if *bit < 32 => Ok(*bit),
        _ => Err(missing(format!("the request flag {name} is not described"))),
    };
    // Where bios cannot be captured, nobody attaches what looks at them.
    let (bio_arg, bio_done_arg) = bio_arguments(facts).unwrap_or((0, 1));
    Ok(Constants {
        rq_arg,
        bio_arg,
        bio_done_arg,
        fua_bit: bit("__REQ_FUA")?,
        preflush_bit: bit("__REQ_PREFLUSH")?,
        page_struct_size,
    })
}

/// Where the kernel keeps its pages; found by [`calibrate`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MemoryLayout {
    vmemmap: u64,
    direct: u64,
}

pub(crate) struct Globals {
    pub constants: Constants,
    pub layout: MemoryLayout,
    pub magic: u64,
    pub pfn: u64,
    pub skip_gib: u64,
    pub sector: u64,
}

/// Parses the object and makes its maps; no program is loaded yet.
pub(crate) fn load_object(globals: &Globals, ring_bytes: u32) -> Result<Ebpf, CaptureError> {
    let c = &globals.constants;
    EbpfLoader::new()
        .override_global("rq_arg", &c.rq_arg, true)
        .override_global("bio_arg", &c.bio_arg, true)
        .override_global("bio_done_arg", &c.bio_done_arg, true)
        .override_global("fua_bit", &c.fua_bit, true)
        .override_global("preflush_bit", &c.preflush_bit, true)
        .override_global("page_struct_size", &c.page_struct_size, true)
        .override_global("vmemmap_base", &globals.layout.vmemmap, true)
        .override_global("direct_base", &globals.layout.direct, true)
        .override_global("calib_magic", &globals.magic, true)
        .override_global("calib_pfn", &globals.pfn, true)
        .override_global("calib_skip_gib", &globals.skip_gib, true)
        .override_global("calib_sector", &globals.sector, true)
        .map_max_entries("ring", ring_bytes)
        .load(OBJECT)
        .map_err(|e| CaptureError::Load(Box::new(e)))
}

fn loaded<'a>(ebpf: &'a mut Ebpf, program: &'static str) -> Result<&'a mut RawTracePoint, CaptureError> {
    let missing = CaptureError::Missing { program: "the capture object", what: program };
    let found = ebpf.program_mut(program).ok_or(missing)?;
    found.try_into().map_err(|e| CaptureError::Program { program, source: Box::new(e) })
}

/// Loads one program of the object.
pub(crate) fn load<'a>(ebpf: &'a mut Ebpf, program: &'static str) -> Result<&'a mut RawTracePoint, CaptureError> {
    let raw = loaded(ebpf, program)?;
    raw.load().map_err(|e| CaptureError::Program { program, source: Box::new(e) })?;
    Ok(raw)
}

/// How often the kernel did not run a program because it ran already on that CPU. None before 5.12, where it always runs.
fn missed(program: &RawTracePoint) -> Option<u64> {
    let fd = program.fd().ok()?.as_fd().as_raw_fd();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    info.lines().find_map(|l| l.strip_prefix("recursion_misses:")?.trim().parse().ok())
}

/// Whether the kernel has no write of a disk under way. Unknown counts as no.
pub(crate) fn at_rest(disk: DevNo) -> bool {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{disk}/inflight")).unwrap_or_default();
    text.split_whitespace().nth(1) == Some("0")
}

/// Loads one program of the object and attaches it.
pub(crate) fn attach(ebpf: &mut Ebpf, program: &'static str, tracepoint: &str) -> Result<FdLink, CaptureError> {
    attach_loaded(load(ebpf, program)?, program, tracepoint)
}

pub(crate) fn attach_loaded(
    raw: &mut RawTracePoint,
    program: &'static str,
    tracepoint: &str,
) -> Result<FdLink, CaptureError> {
    let error = |e| CaptureError::Program { program, source: Box::new(e) };
    let id = raw.attach(tracepoint).map_err(error)?;
    Ok(FdLink::from(raw.take_link(id).map_err(error)?))
}

/// Whether a disk takes bios without a request queue. Unknown counts as no: then its requests, if any, are captured.
pub(crate) fn by_bio(disk: DevNo) -> bool {
    let dir = PathBuf::from(format!("/sys/dev/block/{disk}"));
    dir.join("queue").is_dir() && !dir.join("mq").is_dir()
}

pub(crate) fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, CaptureError> {
    ebpf.take_map(name).ok_or(CaptureError::Missing { program: "the capture object", what: name })
}

/// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK instead of the memory cgroup.
pub(crate) fn lift_memlock() {
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the struct is valid for the call. A refusal is harmless: on newer kernels the limit plays no part, on older ones
    // the load then fails with its own error.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &all) };
}

impl BpfCapture {
    /// Goes on with the pinned kernel half when there is one of our layout, else begins anew. `calibrate_on` is a disk to read
    /// from (a device node that can be opened), needed to begin anew.
    pub fn start(options: &Options, calibrate_on: Option<(&Path, DevNo)>) -> Result<Self, CaptureError> {
        let pins = Pins::new(&options.pins)?;
        if pins.complete()? {
            return Self::resume(pins);
        }
        pins.clear()?;
        let (path, disk) = calibrate_on.ok_or(CaptureError::NoDisk)?;
        Self::begin(pins, options, path, disk)
    }

    /// Whether the pins in `dir` can be gone on with.
    pub fn is_pinned(dir: &Path) -> bool {
        Pins::existing(dir).is_some_and(|pins| pins.complete().unwrap_or(false))
    }

    fn begin(pins: Pins, options: &Options, path: &Path, disk: DevNo) -> Result<Self, CaptureError> {
        lift_memlock();
        let constants = constants()?;
        let open = |e| CaptureError::File { what: "open the disk", path: path.display().to_string(), source: e };
        let file: File = calibrate::open_direct(path).map_err(open)?;
        let layout = calibrate::find(constants, &file, disk)?;

        // The kernel wants a power of two of pages; 64 KiB is the least that makes sense.
        let ring_bytes = options.ring_bytes.clamp(1 << 16, 1 << 30).next_power_of_two();
        let globals = Globals { constants, layout, magic: 0, pfn: 0, skip_gib: 0, sector: 0 };
        let mut ebpf = load_object(&globals, ring_bytes)?;
        for name in pins::MAPS {
            let map = ebpf.map(name).ok_or(CaptureError::Missing { program: "the capture object", what: name })?;
            pins.pin_map(name, map)?;
        }
        let mut meta: Array<MapData, u64> = Array::try_from(take_map(&mut ebpf, "meta")?).map_err(map_error("meta"))?;
        for (cell, value) in [
            (META_LAYOUT, META_MAGIC | ABI),
            (META_RING_BYTES, u64::from(ring_bytes)),
            (META_NEXT_ID, 1),
            (META_LOSSES, 0),
            (META_BIG, 0),
        ] {
            meta.set(cell, value, 0).map_err(map_error("meta"))?;
        }
        // Completions first: a write that is issued between the two shows up as a completion without an issue at worst,
        // never as an issue that seems to be in flight for ever.
        pins.pin_link("complete", attach(&mut ebpf, "hf_complete", "block_rq_complete")?)?;
        pins.pin_link("issue", attach(&mut ebpf, "hf_issue", "block_rq_issue")?)?;
        for name in pins::PROGRAMS {
            pins.pin_program(name, loaded(&mut ebpf, name)?)?;
        }
        if matches!(bio_capture(), crate::disks::BioCapture::Works) {
            for (program, _, _) in pins::BIO_PROGRAMS {
                pins.pin_program(program, load(&mut ebpf, program)?)?;
            }
        }
        // Last: from here on the pins are whole.
        meta.set(META_COMPLETE, 1, 0).map_err(map_error("meta"))?;
        Self::open(pins, false)
    }

    fn resume(pins: Pins) -> Result<Self, CaptureError> {
        Self::open(pins, true)
    }

    fn open(pins: Pins, resumed: bool) -> Result<Self, CaptureError> {
        let meta: Array<MapData, u64> = Array::try_from(pins.open_map("meta")?).map_err(map_error("meta"))?;
        let cell = |i: u32| meta.get(&i, 0).map_err(map_error("meta"));
        let (layout, ring_bytes, seen_losses, seen_big) =
            (cell(META_LAYOUT)?, cell(META_RING_BYTES)?, cell(META_LOSSES)?, cell(META_BIG)?);
        if layout != META_MAGIC | ABI {
            return Err(CaptureError::Layout { found: layout & 0xffff, ours: ABI });
        }
        let ring_map = pins.open_data("ring")?;
        let ring =
            ring::Ring::new(ring_map.fd().as_fd(), u32::try_from(ring_bytes).unwrap_or(u32::MAX)).map_err(|e| {
                CaptureError::File {
                    what: "map the capture buffer",
                    path: pins.path("ring").display().to_string(),
                    source: e,
                }
            })?;
        let targets_map = BpfHashMap::try_from(pins.open_map("targets")?).map_err(map_error("targets"))?;
        let dirty = ArrayOfMaps::try_from(pins.open_map("dirty")?).map_err(map_error("dirty"))?;
        let big: PerCpuArray<MapData, Big> = PerCpuArray::try_from(pins.open_map("big")?).map_err(map_error("big"))?;
        let counters = PerCpuArray::try_from(pins.open_map("counters")?).map_err(map_error("counters"))?;
        let losses_map = pins.open_data("losses")?;
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let losses = ring::Mapping::new(losses_map.fd().as_fd(), 0, page, true).map_err(|e| CaptureError::File {
            what: "map the count of losses",
            path: pins.path("losses").display().to_string(),
            source: e,
        })?;
        // How many long losses each CPU had when the last ones were confirmed is not kept, only their sum. When nothing was added
        // since, all of them are old; else all that the rings still hold are told again, which is harmless.
        let counts: Vec<u64> = big.get(&0, 0).map_err(map_error("big"))?.iter().map(|b| b.count).collect();
        let seen = if counts.iter().sum::<u64>() == seen_big { counts } else { vec![0; counts.len()] };
        let programs = pins::PROGRAMS.into_iter().map(|name| pins.open_program(name)).collect::<Result<_, _>>()?;
        let mut this = Self {
            pins,
            ring,
            targets_map,
            dirty,
            big,
            counters,
            losses,
            meta,
            targets: HashMap::new(),
            assembler: Assembler::new(),
            resumed,
            seen_losses,
            seen_big: seen,
            unconfirmed: Vec::new(),
            last_scan: MonoTime(0),
            last_marks: MonoTime(0),
            owed: false,
            last_stale: MonoTime(0),
            last_settle: MonoTime(0),
            resting: None,
            programs,
            told_passthrough: 0,
        };
        this.read_targets()?;
        Ok(this)
    }

    fn read_targets(&mut self) -> Result<(), CaptureError> {
        let entries: Vec<(u64, TargetValue)> =
            self.targets_map.iter().collect::<Result<_, _>>().map_err(map_error("targets"))?;
        for (key, value) in entries {
            let spans = |spans: &[Span], len: u32| {
                spans.iter().take(len as usize).map(|s| Extent::between(s.start, s.end)).collect()
            };
            let target = Target {
                disk: DevNo { major: (key >> 32) as u32, minor: key as u32 },
                sectors: value.granules * (GRANULE_BYTES / 512),
                ranges: spans(&value.ranges, value.ranges_len),
                skips: spans(&value.skips, value.skips_len),
            };
            let chunks = self.map_chunks(value.first_chunk, chunks_of(target.sectors))?;
            let mode = if value.mode == MODE_MARKS { Mode::ExtentsOnly } else { Mode::Data };
            // Should the agent before have died in the middle of a change of mode.
            self.owed = true;
            let held = Held { target, by_bio: value.by_bio != 0, mode, first_chunk: value.first_chunk, chunks };
            // Handed out to an agent that did not confirm: as good as new.
            for granule in marked(&held, 2) {
                if let Some(cell) = held.cell(granule) {
                    cell.store(1, Ordering::Release);
                }
            }
            self.targets.insert(TargetId(value.id), held);
        }
        Ok(())
    }

    fn map_chunks(&self, first: u32, count: u32) -> Result<Vec<ring::Mapping>, CaptureError> {
        (first..first + count)
            .map(|i| {
                let inner: MapData = pins::inner_map(&self.pins, "dirty", i)?;
                ring::Mapping::new(inner.fd().as_fd(), 0, CELLS_PER_CHUNK as usize * 8, true).map_err(|e| {
                    CaptureError::File {
                        what: "map the dirty map",
                        path: self.pins.path("dirty").display().to_string(),
                        source: e,
                    }
                })
            })
            .collect()
    }

    /// The first run of `count` unused places in the outer dirty map.
    fn free_chunks(&self, count: u32) -> Option<u32> {
        let mut used: Vec<(u32, u32)> =
            self.targets.values().map(|h| (h.first_chunk, h.first_chunk + h.chunks.len() as u32)).collect();
        used.sort_unstable();
        let mut at = 0;
        for (start, end) in used {
            if start >= at + count {
                break;
            }
            at = at.max(end);
        }
        (at + count <= DIRTY_CHUNKS).then_some(at)
    }

    fn add(&mut self, target: &Target) -> Result<TargetId, CaptureError> {
        const CHUNK_SECTORS: u64 = GRANULES_PER_CHUNK * GRANULE_BYTES / 512;
        let full = CaptureError::DirtyMapFull { max_tib: (u64::from(DIRTY_CHUNKS) * CHUNK_SECTORS * 512) >> 40 };
        if granules_of(target.sectors).div_ceil(GRANULES_PER_CHUNK) > u64::from(DIRTY_CHUNKS) {
            return Err(full);
        }
        let count = chunks_of(target.sectors);
        let first = self.free_chunks(count).ok_or(full)?;
        for i in first..first + count {
            let chunk: Array<MapData, u64> = Array::create(CELLS_PER_CHUNK, 1 << 10).map_err(map_error("dirty"))?;
            self.dirty.set(i, &chunk, 0).map_err(map_error("dirty"))?;
        }
        let chunks = self.map_chunks(first, count)?;
        let next = self.meta.get(&META_NEXT_ID, 0).map_err(map_error("meta"))?;
        // Never given twice, and its place among the counters (modulo) is free.
        let id = (next..)
            .map(|n| n as u32)
            .find(|n| self.targets.keys().all(|k| k.0 as usize % MAX_TARGETS != *n as usize % MAX_TARGETS))
            .ok_or(CaptureError::TooManyDisks { asked: self.targets.len() + 1, max: MAX_TARGETS })?;
        self.meta.set(META_NEXT_ID, u64::from(id) + 1, 0).map_err(map_error("meta"))?;
        let held =
            Held { target: target.clone(), by_bio: by_bio(target.disk), mode: Mode::Data, first_chunk: first, chunks };
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
            granules: held.granules(),
            by_bio: u32::from(held.by_bio),
            mode: if held.mode == Mode::ExtentsOnly { MODE_MARKS } else { MODE_DATA },
            ..TargetValue::default()
        };
        for (to, from) in value.ranges.iter_mut().zip(&t.ranges).chain(value.skips.iter_mut().zip(&skips)) {
            *to = Span { start: from.start(), end: from.end() };
        }
        self.targets_map.insert(key_of(t.disk), value, 0).map_err(map_error("targets"))
    }

    /// Returns when no program runs any more that was begun before: the kernel waits for that when a map of maps changes.
    fn quiesce(&mut self, chunk: u32) -> Result<(), CaptureError> {
        let same = self.dirty.get(&chunk, 0).map_err(map_error("dirty"))?;
        self.dirty.set(chunk, &same, 0).map_err(map_error("dirty"))
    }

    /// Attaches what looks at bios while a disk needs it, and takes it away after.
    fn bio_links(&self, needed: bool) -> Result<(), CaptureError> {
        // Completions first, as with requests.
        for (program, tracepoint, link) in pins::BIO_PROGRAMS {
            match (needed, self.pins.path(link).exists()) {
                (true, false) => {
                    if !self.pins.path(program).exists() {
                        let what = "disks without a request queue cannot be captured on this kernel".to_owned();
                        return Err(CaptureError::Feature { what });
                    }
                    let mut loaded = self.pins.open_program(program)?;
                    self.pins.pin_link_at(link, attach_loaded(&mut loaded, program, tracepoint)?)?;
                }
                (false, true) => self.pins.remove_file(link)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn drop_target(&mut self, id: TargetId) -> Result<(), CaptureError> {
        let Some(held) = self.targets.remove(&id) else { return Ok(()) };
        match self.targets_map.remove(&key_of(held.target.disk)) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(e) => return Err(map_error("targets")(e)),
        }
        // The dirty chunks stay in the outer map until a new target takes the places; a program that runs just now may still
        // mark in them.
        self.unconfirmed.retain(|(t, _)| *t != id);
        self.assembler.drop_target(id);
        Ok(())
    }

    /// Whether there may be marks that no loss was counted for.
    fn marks_wanted(&self) -> bool {
        self.owed || self.targets.values().any(|h| h.mode == Mode::ExtentsOnly)
    }

    fn losses_now(&self) -> u64 {
        // SAFETY: the page is mapped for as long as `self` lives and begins with the word; the kernel half adds to it atomically.
        unsafe { AtomicU64::from_ptr(self.losses.as_ptr().cast()) }.load(Ordering::Acquire)
    }

    /// Ends the wait for requests whose completion was not seen, once their disk has been at rest.
    fn settle(&mut self, now: MonoTime, out: &mut Vec<Captured>) {
        if let Some(resting) = self.resting.take_if(|r| r.at <= self.ring.position()) {
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
            // A completion is in the ring before the kernel counts its request as over.
            self.resting = Some(Resting { at: self.ring.barrier().now(), issued_before, disks });
        }
    }

    /// Commands that went to a disk past the block layer may have written: nobody saw what.
    fn tell_passthrough(&mut self) {
        let Ok(counters) = self.counters() else { return };
        if counters.passthrough > self.told_passthrough {
            let commands = counters.passthrough - self.told_passthrough;
            tracing::warn!(
                commands,
                "unknown write: commands were sent to a protected disk past the block layer; if they wrote, a resync of the group makes \
                 it right"
            );
        }
        self.told_passthrough = counters.passthrough;
    }

    /// Hands out every mark of the dirty map that is not handed out yet, and the long losses. Disks whose writes are only marked have
    /// marks all the time; without `all` they are left for later.
    fn scan(&mut self, all: bool, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        // Count first, marks after: a loss in between is seen twice at worst.
        let losses = self.losses_now();
        let mut fresh = Vec::new();
        for (id, held) in self.targets.iter().filter(|(_, h)| all || h.mode == Mode::Data) {
            let mut extents: Vec<Extent> = Vec::new();
            for granule in marked(held, 1) {
                // A mark that the kernel sets between the look and the store is told by this very hand-out.
                let Some(cell) = held.cell(granule) else { continue };
                cell.store(2, Ordering::Release);
                fresh.push((*id, granule));
                push_granule(&mut extents, granule, held.target.sectors);
            }
            if !extents.is_empty() {
                self.assembler.doubt(*id, &extents);
                out.push(Captured::Lost { target: *id, extents, why: LostWhy::Overflow });
            }
        }
        self.unconfirmed.append(&mut fresh);
        self.scan_big(out)?;
        self.assembler.told_until(self.ring.barrier().now());
        self.seen_losses = losses;
        self.owed &= !all;
        Ok(())
    }

    fn scan_big(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        let per_cpu = self.big.get(&0, 0).map_err(map_error("big"))?;
        for (cpu, big) in per_cpu.iter().enumerate() {
            let Some(seen) = self.seen_big.get_mut(cpu) else { continue };
            if big.count == *seen {
                continue;
            }
            if big.count - *seen > BIG_LEN as u64 - 1 {
                // More than the ring remembers: all of every disk.
                for (id, held) in &self.targets {
                    let extents = vec![Extent::new(0, held.target.sectors)];
                    self.assembler.doubt(*id, &extents);
                    out.push(Captured::Lost { target: *id, extents, why: LostWhy::Overflow });
                }
            } else {
                for i in *seen..big.count {
                    let range = &big.range[(i % BIG_LEN as u64) as usize];
                    let target = TargetId(range.target as u32);
                    let extents = vec![Extent::new(range.sector, range.sectors)];
                    self.assembler.doubt(target, &extents);
                    out.push(Captured::Lost { target, extents, why: LostWhy::Overflow });
                }
            }
            *seen = big.count;
        }
        Ok(())
    }
}

/// Sorted, with neighbours joined.
pub(crate) fn merged(extents: &[Extent]) -> Vec<Extent> {
    let mut set = model::ExtentSet::new();
    extents.iter().for_each(|e| set.insert(*e));
    set.iter().collect()
}

pub(crate) fn key_of(disk: DevNo) -> u64 {
    u64::from(disk.major) << 32 | u64::from(disk.minor)
}

/// Granules whose byte is `mark`, eight at a time: nearly all are zero.
fn marked(held: &Held, mark: u8) -> Vec<u64> {
    let mut out = Vec::new();
    for (i, chunk) in held.chunks.iter().enumerate() {
        let first = i as u64 * GRANULES_PER_CHUNK;
        let cells = (held.granules().saturating_sub(first)).min(GRANULES_PER_CHUNK).div_ceil(8);
        for cell in 0..cells as usize {
            // SAFETY: inside the mapping (at most CELLS_PER_CHUNK cells of 8 bytes) and aligned; a volatile read of shared memory,
            // whose answer is only a hint: the byte itself is then taken atomically.
            let word = unsafe { chunk.as_ptr().cast::<u64>().add(cell).read_volatile() };
            if word != 0 {
                let bytes = word.to_ne_bytes();
                out.extend((0..8).filter(|b| bytes[*b] == mark).map(|b| first + cell as u64 * 8 + b as u64));
            }
        }
    }
    out
}

pub(crate) fn push_granule(extents: &mut Vec<Extent>, granule: u64, sectors: u64) {
    const PER: u64 = GRANULE_BYTES / 512;
    let extent = Extent::between(granule * PER, ((granule + 1) * PER).min(sectors));
    match extents.last_mut() {
        Some(last) if last.end() == extent.start() => last.sectors.0 += extent.sectors.0,
        _ => extents.push(extent),
    }
}

impl Capture for BpfCapture {
    fn name(&self) -> &'static str {
        "bpf-rq"
    }

    fn set_targets(&mut self, targets: &[Target]) -> Result<Vec<TargetId>, CaptureError> {
        if targets.len() > MAX_TARGETS {
            return Err(CaptureError::TooManyDisks { asked: targets.len(), max: MAX_TARGETS });
        }
        let gone: Vec<TargetId> = self
            .targets
            .iter()
            .filter(|(_, h)| {
                !targets
                    .iter()
                    .any(|t| t.disk == h.target.disk && granules_of(t.sectors) == granules_of(h.target.sectors))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.drop_target(id)?;
        }
        self.bio_links(targets.iter().any(|t| by_bio(t.disk)))?;
        let mut ids = Vec::new();
        for target in targets {
            let held = self.targets.iter().find(|(_, h)| h.target.disk == target.disk).map(|(id, _)| *id);
            match held {
                None => ids.push(self.add(target)?),
                Some(id) => {
                    if let Some(mut held) = self.targets.remove(&id) {
                        if held.target != *target {
                            held.target = target.clone();
                            let written = self.write_target(id, &held);
                            self.targets.insert(id, held);
                            written?;
                        } else {
                            self.targets.insert(id, held);
                        }
                    }
                    ids.push(id);
                }
            }
        }
        Ok(ids)
    }

    fn set_mode(&mut self, target: TargetId, mode: Mode) -> Result<(), CaptureError> {
        let Some(mut held) = self.targets.remove(&target) else { return Ok(()) };
        if held.mode == mode {
            self.targets.insert(target, held);
            return Ok(());
        }
        let before = std::mem::replace(&mut held.mode, mode);
        let written = self.write_target(target, &held);
        if written.is_err() {
            held.mode = before;
        }
        let chunk = held.first_chunk;
        self.targets.insert(target, held);
        written?;
        // A program that still marks without counting must be over before the marks are looked for the last time.
        self.owed = true;
        self.quiesce(chunk)
    }

    fn targets(&self) -> Vec<(TargetId, Target)> {
        self.targets.iter().map(|(id, h)| (*id, h.target.clone())).collect()
    }

    fn poll(
        &mut self,
        budget: usize,
        exact: bool,
        now: MonoTime,
        out: &mut Vec<Captured>,
    ) -> Result<Polled, CaptureError> {
        let mut taken = 0usize;
        let mut more = false;
        loop {
            let at = self.ring.position();
            let Some(bytes) = self.ring.next()? else { break };
            let Some(event) = Event::read(bytes) else {
                return Err(CaptureError::Damaged { at: at.0, len: bytes.len() as u32 });
            };
            taken += bytes.len();
            // A count that runs ahead of ours, with wrapping: losses happened before this record.
            let ahead = event.lost.wrapping_sub(self.seen_losses as u32) as i32 > 0;
            let data = if event.has(E_DATA) {
                bytes.get(EVENT_BYTES..EVENT_BYTES + event.len as usize)
            } else {
                Some(&[][..])
            };
            let data = data.ok_or(CaptureError::Damaged { at: at.0, len: bytes.len() as u32 })?;
            if self.targets.contains_key(&TargetId(event.target)) {
                if ahead && exact {
                    // The borrow of `bytes` has to end before the scan; losses are rare, so the copy does not matter.
                    let copy = data.to_vec();
                    self.scan(false, out)?;
                    self.assembler.event(&event, &copy, at, out);
                    // The caller opens a gap now and may not want the next loss in order: it is asked again.
                    more = true;
                    break;
                } else {
                    self.assembler.event(&event, data, at, out);
                }
            }
            if taken >= budget {
                more = true;
                break;
            }
        }
        if !more {
            self.assembler.give_up_unfinished(now, out);
        }
        let due = exact || now.ms_since(self.last_scan) >= SCAN_EVERY_MS;
        let marks = self.marks_wanted() && now.ms_since(self.last_marks) >= SCAN_MARKS_EVERY_MS;
        if !more && (marks || (due && self.losses_now() != self.seen_losses)) {
            self.scan(marks, out)?;
            self.last_scan = now;
            if marks {
                self.last_marks = now;
            }
        }
        self.settle(now, out);
        if now.ms_since(self.last_stale) >= STALE_EVERY_MS {
            self.assembler.forget_stale(now, out);
            self.tell_passthrough();
            self.last_stale = now;
        }
        Ok(Polled { position: self.ring.position(), more })
    }

    fn flush_losses(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError> {
        let marks = self.marks_wanted();
        if self.losses_now() == self.seen_losses && !marks { Ok(()) } else { self.scan(marks, out) }
    }

    fn confirm_losses(&mut self) -> Result<(), CaptureError> {
        for (id, granule) in std::mem::take(&mut self.unconfirmed) {
            if let Some(cell) = self.targets.get(&id).and_then(|h| h.cell(granule)) {
                // Marked again meanwhile: stays.
                let _ = cell.compare_exchange(2, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
        let stored = self.meta.get(&META_LOSSES, 0).map_err(map_error("meta"))?;
        if stored != self.seen_losses {
            self.meta.set(META_LOSSES, self.seen_losses, 0).map_err(map_error("meta"))?;
            self.meta.set(META_BIG, self.seen_big.iter().sum::<u64>(), 0).map_err(map_error("meta"))?;
        }
        Ok(())
    }

    fn release(&mut self, position: Position) {
        let to = self.assembler.oldest_pending().map_or(position, |p| p.min(position));
        self.ring.release(to);
    }

    fn barrier(&self) -> Arc<dyn Barrier> {
        self.ring.barrier()
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
        self.ring.fill()
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
        sum.missed = self.programs.iter().filter_map(missed).sum();
        sum.unseen = self.assembler.unseen();
        Ok(sum)
    }

    fn passthrough(&self) -> Result<Vec<(TargetId, u64)>, CaptureError> {
        let of = |id: &TargetId| -> Result<(TargetId, u64), CaptureError> {
            let each = self.counters.get(&(id.0 % MAX_TARGETS as u32), 0).map_err(map_error("counters"))?;
            Ok((*id, each.iter().map(|c| c.passthrough).sum()))
        };
        self.targets.keys().map(of).collect()
    }

    fn resumed(&self) -> bool {
        self.resumed
    }

    fn remove(&mut self) -> Result<(), CaptureError> {
        self.pins.clear()
    }
}
