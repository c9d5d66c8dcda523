//! The directory of a BPF file system in which maps and links are kept alive beyond the agent.
//!
//! Files: one per map (by its name), `link-issue`, `link-complete`, the two programs for disks without a request queue where
//! the kernel can run them, and their links while such a disk is captured. Nothing else is ever put there. Without the links the
//! programs are detached by the kernel, so removing them first stops capture whatever happens next.

use super::{layout::*, map_error};
use crate::capture::CaptureError;
use aya::{
    maps::{Array, ArrayOfMaps, Map, MapData},
    programs::{RawTracePoint, links::FdLink},
};
use std::{
    ffi::CString,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Where BPF file systems are mounted by custom.
pub const BPF_FS: &str = "/sys/fs/bpf";
/// The agent's own directory.
pub const PIN_ROOT: &str = "/sys/fs/bpf/holdfast";
/// `statfs` says so of a BPF file system.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

pub(crate) const MAPS: [&str; 7] = ["ring", "targets", "dirty", "big", "counters", "losses", "meta"];
/// Kept by name to ask how often the kernel did not run them.
pub(crate) const PROGRAMS: [&str; 2] = ["hf_issue", "hf_complete"];
const LINKS: [&str; 2] = ["link-issue", "link-complete"];
/// Programs for disks without a request queue, where they go, and what their links are called. Completions first.
pub(crate) const BIO_PROGRAMS: [(&str, &str, &str); 2] = [
    ("hf_bio_complete", "block_bio_complete", "link-bio-complete"),
    ("hf_bio_queue", "block_bio_queue", "link-bio-queue"),
];

#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Makes the directory, and mounts a BPF file system at [`BPF_FS`] when there is none and the directory is to lie there.
    pub fn new(dir: &Path) -> Result<Self, CaptureError> {
        let error = |what, path: &Path| {
            let path = path.display().to_string();
            move |source| CaptureError::File { what, path, source }
        };
        let root = Path::new(BPF_FS);
        if dir.starts_with(root) && !is_bpf_fs(root) {
            nix::mount::mount(
                Some("bpf"),
                root,
                Some("bpf"),
                nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC,
                Some("mode=0700"),
            )
            .map_err(|e| error("mount a BPF file system", root)(io::Error::from(e)))?;
        }
        std::fs::create_dir_all(dir).map_err(error("make the directory for pins", dir))?;
        if !is_bpf_fs(dir) {
            return Err(error("use the directory for pins", dir)(io::Error::other("it is not on a BPF file system")));
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// The pins in `dir`, if the directory is there.
    pub fn existing(dir: &Path) -> Option<Self> {
        dir.is_dir().then(|| Self { dir: dir.to_owned() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether maps and links are all there and were marked whole. Another layout is an error: the kernel half then works, but we
    /// would not understand it.
    pub fn complete(&self) -> Result<bool, CaptureError> {
        if MAPS.iter().chain(&LINKS).chain(&PROGRAMS).any(|name| !self.path(name).exists()) {
            return Ok(false);
        }
        let meta: Array<MapData, u64> = Array::try_from(self.open_map("meta")?).map_err(map_error("meta"))?;
        let whole = meta.get(&META_COMPLETE, 0).map_err(map_error("meta"))? == 1;
        let layout = meta.get(&META_LAYOUT, 0).map_err(map_error("meta"))?;
        if whole && layout != META_MAGIC | ABI {
            return Err(CaptureError::Layout { found: layout & 0xffff, ours: ABI });
        }
        Ok(whole)
    }

    /// Removes all pins, links first, and the directory when it is empty then.
    pub fn clear(&self) -> Result<(), CaptureError> {
        let links = LINKS.into_iter().chain(BIO_PROGRAMS.map(|(_, _, link)| link));
        let programs = PROGRAMS.into_iter().chain(BIO_PROGRAMS.map(|(program, _, _)| program));
        let names = links.chain(programs).chain(MAPS);
        names.into_iter().try_for_each(|name| self.remove_file(name))
    }

    pub(crate) fn remove_file(&self, name: &str) -> Result<(), CaptureError> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(CaptureError::File { what: "unpin", path: path.display().to_string(), source: e })
            }
            _ => Ok(()),
        }
    }

    /// Removes the directory too.
    pub fn remove(&self) -> Result<(), CaptureError> {
        self.clear()?;
        match std::fs::remove_dir(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CaptureError::File {
                what: "remove the directory of pins",
                path: self.dir.display().to_string(),
                source: e,
            }),
            _ => Ok(()),
        }
    }

    pub(crate) fn pin_map(&self, name: &'static str, map: &Map) -> Result<(), CaptureError> {
        let path = self.path(name);
        map.pin(&path).map_err(|e| CaptureError::Pin { path: path.display().to_string(), source: Box::new(e) })
    }

    pub(crate) fn pin_program(&self, name: &'static str, program: &mut RawTracePoint) -> Result<(), CaptureError> {
        let path = self.path(name);
        program.pin(&path).map_err(|e| CaptureError::Pin { path: path.display().to_string(), source: Box::new(e) })
    }

    pub(crate) fn open_program(&self, name: &'static str) -> Result<RawTracePoint, CaptureError> {
        RawTracePoint::from_pin(self.path(name))
            .map_err(|e| CaptureError::Program { program: name, source: Box::new(e) })
    }

    pub(crate) fn pin_link(&self, name: &str, link: FdLink) -> Result<(), CaptureError> {
        self.pin_link_at(&format!("link-{name}"), link)
    }

    pub(crate) fn pin_link_at(&self, name: &str, link: FdLink) -> Result<(), CaptureError> {
        let path = self.path(name);
        let pinned = link.pin(&path);
        pinned.map(drop).map_err(|e| CaptureError::Pin { path: path.display().to_string(), source: Box::new(e) })
    }

    pub(crate) fn open_data(&self, name: &'static str) -> Result<MapData, CaptureError> {
        MapData::from_pin(self.path(name)).map_err(map_error(name))
    }

    pub(crate) fn open_map(&self, name: &'static str) -> Result<Map, CaptureError> {
        Map::from_map_data(self.open_data(name)?).map_err(map_error(name))
    }
}

/// One of the maps inside the outer map `name`, as plain data (its descriptor can be mapped into memory).
pub(crate) fn inner_map(pins: &Pins, name: &'static str, index: u32) -> Result<MapData, CaptureError> {
    let outer: ArrayOfMaps<MapData, MapData> = ArrayOfMaps::try_from(pins.open_map(name)?).map_err(map_error(name))?;
    outer.get(&index, 0).map_err(map_error(name))
}

fn is_bpf_fs(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is NUL-terminated and the struct is ours to be written.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: statfs succeeded, so it filled the struct.
    #[allow(clippy::unnecessary_cast, reason = "the field's type differs between C libraries")]
    let magic = unsafe { stat.assume_init() }.f_type as i64;
    magic == BPF_FS_MAGIC
}
