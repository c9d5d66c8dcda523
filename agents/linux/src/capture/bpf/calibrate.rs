//! Where the kernel keeps its pages: found by looking, then proved.
//!
//! `struct page` pointers in a request become addresses of data by
//! `(page - vmemmap) / sizeof(struct page) * 4096 + direct`. Both bases are random per boot. They are found from one read of a disk
//! into a page whose content and frame number we know. Symbols (kallsyms, kcore) are not needed and not used.

use super::{
    CalibrationValue, Constants, Globals, MemoryLayout, SELFTEST_PAGES, attach, by_bio, key_of, layout::*, load_object,
    map_error, take_map,
};
use crate::capture::{CaptureError, DevNo};
use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, MapData},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Seek},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    ptr::NonNull,
};

const PAGE: usize = 4096;
/// One search covers 2 TiB below the request; memory may be spread further.
const SEARCH_GIB: u64 = 2048;
/// 64 TiB, the most that x86_64 maps one to one with four-level page tables.
const SEARCHES: u64 = 32;
/// Reads per search. One does; the others are for a read that the block layer splits or merges.
const READS: u32 = 4;
/// Calibration and self-test together, before it is given up.
const TRIES: u32 = 3;

pub(crate) fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path)
}

/// A page of memory that stays where it is.
pub(crate) struct LockedPage {
    ptr: NonNull<u8>,
}

impl LockedPage {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(raw.cast()).ok_or_else(|| io::Error::other("mmap gave the null page"))?;
        Ok(Self { ptr })
    }
    /// Fills the page with a word. Volatile, so that the kernel sees it whatever the compiler thinks.
    pub(crate) fn fill(&self, word: u64) {
        for i in 0..PAGE / 8 {
            // SAFETY: inside the page, aligned.
            unsafe { self.ptr.as_ptr().cast::<u64>().add(i).write_volatile(word) };
        }
    }
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the whole page is ours and initialised.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), PAGE) }
    }
    pub(crate) fn frame(&self) -> io::Result<u64> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut entry = [0u8; 8];
        pagemap.read_exact_at(&mut entry, self.ptr.as_ptr() as u64 / PAGE as u64 * 8)?;
        let entry = u64::from_ne_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(io::Error::other("the kernel does not tell the page's frame (CAP_SYS_ADMIN is needed)"));
        }
        Ok(frame)
    }
}

impl Drop for LockedPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nobody holds a reference into it.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), PAGE) };
    }
}

fn file_error(what: &'static str, path: &str) -> impl FnOnce(io::Error) -> CaptureError {
    let path = path.to_owned();
    move |source| CaptureError::File { what, path, source }
}

/// A word that memory does not hold by chance; the low 16 bits are zero.
pub(crate) fn magic() -> u64 {
    let mut bytes = [0u8; 8];
    // Never waited for: early in the boot of an old kernel, whose pool is not filled yet, that may take for ever, and nothing here is a secret.
    // SAFETY: the buffer is ours and as long as said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), 8, libc::GRND_NONBLOCK) };
    let mut word = u64::from_ne_bytes(bytes);
    if got != 8 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        word = now.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(std::process::id()) << 32;
    }
    (word | 1 << 63 | 1 << 16) & !0xffff
}

fn watch(ebpf: &mut Ebpf, disk: DevNo) -> Result<(), CaptureError> {
    // Borrowed, not taken: the program that is loaded next refers to the map by its descriptor.
    let map =
        ebpf.map_mut("targets").ok_or(CaptureError::Missing { program: "the capture object", what: "targets" })?;
    let mut targets: BpfHashMap<&mut MapData, u64, TargetValue> =
        BpfHashMap::try_from(map).map_err(map_error("targets"))?;
    targets.insert(key_of(disk), TargetValue { id: 1, ..TargetValue::default() }, 0).map_err(map_error("targets"))
}

fn answer(map: &Array<MapData, CalibrationValue>) -> Result<CalibrationValue, CaptureError> {
    map.get(&0, 0).map_err(map_error("calibration"))
}

/// Finds the layout and proves it.
pub(crate) fn find(constants: Constants, file: &File, disk: DevNo) -> Result<MemoryLayout, CaptureError> {
    let mut tries = 1;
    loop {
        let layout = calibrate(constants, file, disk)?;
        match self_test(constants, layout, file, disk) {
            Ok(()) => return Ok(layout),
            Err(e @ CaptureError::SelfTest { .. }) if tries < TRIES => {
                tracing::warn!(error = %e, "calibrating again");
                tries += 1;
            }
            Err(e) => return Err(e),
        }
    }
}

/// A block of the disk, drawn at random: nobody else reads just that one just now.
fn draw_block(file: &File) -> io::Result<u64> {
    let bytes = file.metadata()?.len().max((&*file).seek(io::SeekFrom::End(0))?);
    let blocks = (bytes / PAGE as u64).max(1);
    Ok(magic() / 0x1_0000 % blocks * PAGE as u64)
}

fn calibrate(constants: Constants, file: &File, disk: DevNo) -> Result<MemoryLayout, CaptureError> {
    let mut page = LockedPage::new().map_err(file_error("lock a page in memory", "RAM"))?;
    let word = magic();
    page.fill(word);
    let pfn = page.frame().map_err(file_error("read", "/proc/self/pagemap"))?;
    let mut reads = 0;
    for search in 0..SEARCHES {
        let layout = MemoryLayout { vmemmap: 0, direct: 0 };
        let at = draw_block(file).map_err(file_error("find the size of disk", &disk.to_string()))?;
        let globals = Globals { constants, layout, magic: word, pfn, skip_gib: search * SEARCH_GIB, sector: at / 512 };
        let mut ebpf = load_object(&globals, PAGE as u32)?;
        watch(&mut ebpf, disk)?;
        let (program, tracepoint) =
            if by_bio(disk) { ("hf_bio_calibrate", "block_bio_queue") } else { ("hf_calibrate", "block_rq_issue") };
        let link = attach(&mut ebpf, program, tracepoint)?;
        let map: Array<MapData, CalibrationValue> =
            Array::try_from(take_map(&mut ebpf, "calibration")?).map_err(map_error("calibration"))?;
        for _ in 0..READS {
            page.fill(word);
            file.read_exact_at(page.as_mut_slice(), at)
                .map_err(file_error("read a block of disk", &disk.to_string()))?;
            reads += 1;
            let seen = answer(&map)?;
            if seen.hits > 0 {
                let vmemmap = seen.page.wrapping_sub(pfn.wrapping_mul(constants.page_struct_size));
                return Ok(MemoryLayout { vmemmap, direct: seen.direct });
            }
        }
        drop(link);
    }
    Err(CaptureError::Calibration { disk, reads })
}

/// Reads into pages spread over memory and lets the kernel half find each of them by the formula.
fn self_test(constants: Constants, layout: MemoryLayout, file: &File, disk: DevNo) -> Result<(), CaptureError> {
    let word = magic();
    let globals = Globals { constants, layout, magic: word, pfn: 0, skip_gib: 0, sector: 0 };
    let mut ebpf = load_object(&globals, PAGE as u32)?;
    watch(&mut ebpf, disk)?;
    let (program, tracepoint) =
        if by_bio(disk) { ("hf_bio_selftest", "block_bio_queue") } else { ("hf_selftest", "block_rq_issue") };
    let _link = attach(&mut ebpf, program, tracepoint)?;
    let map: Array<MapData, CalibrationValue> =
        Array::try_from(take_map(&mut ebpf, "calibration")?).map_err(map_error("calibration"))?;
    // All at once, so that they are different frames.
    let pages: Vec<LockedPage> = (0..SELFTEST_PAGES)
        .map(|_| LockedPage::new())
        .collect::<Result<_, _>>()
        .map_err(file_error("lock a page in memory", "RAM"))?;
    for (i, mut page) in pages.into_iter().enumerate() {
        page.fill(word | i as u64);
        file.read_exact_at(page.as_mut_slice(), (i as u64 % 4) * PAGE as u64)
            .map_err(file_error("read a block of disk", &disk.to_string()))?;
    }
    let seen = answer(&map)?.page.count_ones();
    if seen == SELFTEST_PAGES { Ok(()) } else { Err(CaptureError::SelfTest { pages: SELFTEST_PAGES, seen }) }
}
