//! What a choice of disks gets and what it costs: shown before anybody says yes.

use super::{Disks, DisksError, Resolution};
use crate::config::Config;
use model::ByteLen;
use std::fmt;

/// The capture backend of a leaf.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Backend {
    /// At the request queue of the disk.
    BpfRq,
    /// The same for kernels without type information and BPF ring buffer.
    BpfLegacy,
    /// At the bios, for disks without a queue.
    BpfBio,
    /// At a mirror's second leg, for volumes of the device mapper in sync mode.
    DmMirror,
    /// The same where the host does not wait for the box: for kernels that refuse BPF.
    DmMirrorAsync,
}

impl Backend {
    pub fn name(self) -> &'static str {
        match self {
            Self::BpfRq => "bpf-rq",
            Self::BpfLegacy => crate::capture::legacy::NAME,
            Self::BpfBio => "bpf-bio",
            Self::DmMirror => crate::capture::dm::NAME,
            Self::DmMirrorAsync => crate::capture::dm::NAME_ASYNC,
        }
    }
    /// What may be expected of it, in a sentence for the one who chooses.
    pub fn promise(self) -> &'static str {
        match self {
            Self::BpfRq => {
                "every write, in one order over all disks of the host: each moment is what a power cut would have left; \
                 asynchronous, the lag is shown; nothing of it stands in the way of the host's writes"
            }
            Self::BpfLegacy => {
                "as bpf-rq, on a kernel that is too old for it; the agent's end, in whatever way, ends capture: the next one compares all \
                 of the disks"
            }
            Self::BpfBio => {
                "as bpf-rq, taken before the disk's driver sees the write, because the disk has no request queue; memory that \
                 programs map from the disk itself (DAX) is not seen and such mounts are refused"
            }
            Self::DmMirror => {
                "a write returns when the box has it durable, or a stated time later with an alarm; what is written while the agent does \
                 not run is marked by the kernel and compared afterwards (where BPF is refused, and after a reboot, the whole volume is)"
            }
            Self::DmMirrorAsync => {
                "every write, in one order over all mirrored volumes of the host: each moment is what a power cut would have left; \
                 asynchronous, the lag is shown; each write of the host passes through the agent's memory before it returns; an agent that ends \
                 is left out by the kernel at once, and the next one compares all of the volume"
            }
        }
    }
}

/// Whether disks without a request queue can be captured on this kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BioCapture {
    Works,
    Not { why: String },
}

impl Default for BioCapture {
    fn default() -> Self {
        Self::Not { why: "this kernel was not asked".to_owned() }
    }
}

/// What protecting a set of leaves takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cost {
    /// Read from the disks once, by the first copy.
    pub read: ByteLen,
    /// What is left out of it, because no file system uses it about now.
    pub unused: ByteLen,
    /// Sent by the first copy at most; compressed, and blocks of zeroes are not sent.
    pub network_max: ByteLen,
    /// Of the first copy; 0 is without a limit.
    pub read_mib_s_max: u32,
    /// Memory between kernel and agent, shared by all groups.
    pub ring: ByteLen,
    /// Memory for what the box does not have yet.
    pub spool: ByteLen,
    /// Kernel memory of the dirty map.
    pub dirty_map: ByteLen,
    /// In the state directory.
    pub spool_file: ByteLen,
}

impl Cost {
    /// `unused`: what file systems do not use ([`crate::survey::estimate`]).
    pub fn of(resolution: &Resolution, disks: &Disks, config: &Config, unused: ByteLen) -> Self {
        use crate::capture::bpf::layout::{CELLS_PER_CHUNK, GRANULE_BYTES, GRANULES_PER_CHUNK};
        let all: u64 = resolution.leaves.iter().map(|l| l.range.bytes()).sum();
        let unused = ByteLen(unused.0.min(all));
        let read = ByteLen(all - unused.0);
        // One map for each disk, however many of its partitions are taken.
        let mut names: Vec<&str> = resolution.leaves.iter().map(|l| l.disk.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let chunks: u64 = names
            .iter()
            .filter_map(|n| disks.get(n))
            .map(|d| d.bytes().0.div_ceil(GRANULE_BYTES).div_ceil(GRANULES_PER_CHUNK))
            .sum();
        Self {
            read,
            unused,
            network_max: read,
            read_mib_s_max: config.copy_mib_s,
            ring: ByteLen(u64::from(config.ring_bytes())),
            spool: config.spool_memory(),
            dirty_map: ByteLen(chunks * u64::from(CELLS_PER_CHUNK) * 8),
            spool_file: config.spool_file(),
        }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "first_copy_read_bytes": self.read.0,
            "first_copy_unused_bytes": self.unused.0,
            "first_copy_sent_bytes_max": self.network_max.0,
            "first_copy_mib_s_max": self.read_mib_s_max,
            "memory_ring_bytes": self.ring.0,
            "memory_spool_bytes_max": self.spool.0,
            "memory_dirty_map_bytes": self.dirty_map.0,
            "spool_file_bytes_max": self.spool_file.0,
        })
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk     the first copy reads {} once", self.read)?;
        if self.unused.0 > 0 {
            write!(f, ", and not {} that no file system uses now", self.unused)?;
        }
        match self.read_mib_s_max {
            0 => writeln!(f, ", as fast as the host's pressure allows")?,
            limit => writeln!(f, ", at most {limit} MiB in a second")?,
        }
        writeln!(
            f,
            "network  at most {} for it, compressed; blocks of zeroes are not sent; later what is written",
            self.network_max
        )?;
        write!(
            f,
            "memory   {} between kernel and agent (shared by all groups), up to {} for what the box does not have yet, {} in the \
             kernel to mark blocks",
            self.ring, self.spool, self.dirty_map
        )?;
        if self.spool_file.0 > 0 {
            write!(f, "\nfile     up to {} in the state directory, once that memory is used up", self.spool_file)?;
        }
        Ok(())
    }
}

impl Disks {
    /// How writes of a leaf disk are captured, or why not.
    pub fn backend(&self, disk: &super::Device) -> Result<Backend, DisksError> {
        let no = |why: String| Err(DisksError::NoQueue { device: disk.title(), why });
        if let Some(mirrors) = &self.mirrors {
            let device = disk.title();
            return match (&disk.class, mirrors.refused.get(&disk.name)) {
                (super::Class::Dm { .. }, None) => Ok(Backend::DmMirrorAsync),
                (super::Class::Dm { .. }, Some(why)) => Err(DisksError::NoMirror { device, why: why.clone() }),
                _ => Err(DisksError::NeedsDm { device, why: mirrors.why.clone() }),
            };
        }
        if disk.zoned {
            return Err(DisksError::Zoned { device: disk.title() });
        }
        if disk.queue {
            return Ok(if self.legacy { Backend::BpfLegacy } else { Backend::BpfRq });
        }
        if let BioCapture::Not { why } = &self.bio {
            return no(why.clone());
        }
        // These pass the bio on as it is, and the kernel shows each bio once only: to the array.
        let passed_on = |name: &str| {
            let level = self.get(name).map(|d| &d.class);
            matches!(level, Some(super::Class::Md { level }) if level == "raid0" || level == "linear")
        };
        let mut carriers = std::iter::once(disk).chain(self.partitions(&disk.name));
        if let Some(array) = carriers.find_map(|d| d.holders.iter().find(|h| passed_on(h))) {
            return no(format!("the writes of array {array} on it are not shown by the kernel"));
        }
        if let Some(mount) = std::iter::once(disk).chain(self.partitions(&disk.name)).find_map(|d| d.dax_mount.as_ref())
        {
            return no(format!(
                "{mount} is mounted with DAX: programs write to the disk's memory with no write that could be seen"
            ));
        }
        Ok(Backend::BpfBio)
    }
}
