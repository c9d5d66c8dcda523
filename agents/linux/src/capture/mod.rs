//! Capture: what the host writes, in the order in which it may be replayed.
//!
//! [`Capture`] is the seam; a backend stands behind it ([`bpf::BpfCapture`], name `bpf-rq`; [`legacy::LegacyCapture`] for old kernels). A backend
//! promises:
//!
//! - **Order.** If write B could depend on write A (A had completed when B was issued), A is handed out before B, over all
//!   disks of the host. So every prefix of what is handed out is an image that a power cut could have left.
//! - **Completeness or a [`Captured::Lost`].** A write is handed out, or its range is in a `Lost` that comes before anything
//!   that depends on it (see [`Capture::poll`] for the one relaxation the caller may ask for).
//! - **No harm.** Nothing the backend does can delay or fail a write of the host.
//!
//! The agent reads disks while they are written to (initial sync, resync). The rule that makes this right: a read's result
//! counts only once everything issued before the read ended has been handed out ([`Capture::barrier`]), and a read of sectors
//! that a handed-out write has not yet reached ([`Captured::Done`]) waits for it.

pub mod assemble;
pub mod bpf;
pub mod choose;
pub mod dm;
pub mod legacy;

use model::{Extent, MonoTime};
use std::{fmt, sync::Arc};

/// A whole disk's device number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DevNo {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A disk to capture: the ranges of it that are protected, and the extents in them that are not to be captured (the agent's
/// own spool file: capturing it would feed itself for ever). In sectors of the whole disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub disk: DevNo,
    pub sectors: u64,
    pub ranges: Vec<Extent>,
    pub skips: Vec<Extent>,
}

/// What becomes of a disk's writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// They are copied and handed out.
    #[default]
    Data,
    /// They are only marked, which costs the host and the agent next to nothing: see [`Capture::set_mode`].
    ExtentsOnly,
}

/// What the backend calls a target; never given twice while the backend's kernel half lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TargetId(pub u32);

/// A request as it was handed to the driver; the address pairs it with its completion and means nothing else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Write,
    Zero,
    Discard,
    Flush,
}

/// A request of the host. Sectors are those of the whole disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    pub target: TargetId,
    pub id: RequestId,
    pub op: Op,
    pub fua: bool,
    /// Only where a driver takes such writes as they are. Where the device has a cache, the block layer sends a flush of its own, which arrives
    /// here first, and then the write without this; without FUA too, and then one more flush, if the device knows none.
    pub preflush: bool,
    /// When it was issued.
    pub mono: MonoTime,
    /// One extent; several for a merged discard; none for a flush. For a write the payload is that of the extents, in order.
    pub extents: Vec<Extent>,
    pub data: Vec<u8>,
}

/// Why ranges must be read again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LostWhy {
    /// The buffer between kernel and agent was full.
    Overflow,
    /// A request was completed whose issue was never seen (capture began in between, or was interrupted).
    Unmatched,
    /// The host's own disk reported an error: what it holds now is unknown.
    WriteError,
    /// A page of the request could not be read, or the request was too long, or of a kind that carries no data.
    Unreadable,
    /// A request has not completed for so long that it is no longer waited for.
    Stale,
}

impl fmt::Display for LostWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overflow => "the capture buffer was full",
            Self::Unmatched => "a write was completed whose begin was not seen",
            Self::WriteError => "the disk reported a write error",
            Self::Unreadable => "a write's data could not be copied",
            Self::Stale => "a write has not completed for a long time",
        })
    }
}

/// What capture hands out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Captured {
    Request(Request),
    /// All of the request has reached the disk.
    Done {
        target: TargetId,
        id: RequestId,
    },
    /// These sectors hold something that was not handed out.
    Lost {
        target: TargetId,
        extents: Vec<Extent>,
        why: LostWhy,
    },
}

/// A place in the backend's stream of events.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Position(pub u64);

/// Tells the position that everything issued so far lies before. Cheap; for reader threads.
pub trait Barrier: Send + Sync {
    fn now(&self) -> Position;
}

/// Sums since the kernel half was attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    pub requests: u64,
    pub bytes: u64,
    pub drops: u64,
    pub drop_bytes: u64,
    pub faults: u64,
    pub truncated: u64,
    /// Commands sent to the device past the block layer; if they wrote, it was not seen.
    pub passthrough: u64,
    /// Requests of a kind not known; their ranges were marked dirty.
    pub unknown: u64,
    /// Times the kernel did not run the program because it was running already on that CPU.
    pub missed: u64,
    /// Writes that were over without their completion being seen.
    pub unseen: u64,
}

/// How one call of [`Capture::poll`] went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Polled {
    /// Everything before this has been handed out.
    pub position: Position,
    /// The budget ended the call, not the lack of events.
    pub more: bool,
}

/// A backend; see the module's documentation for what it promises.
pub trait Capture: Send {
    /// A short fixed name, e.g. `bpf-rq`; shown in the status.
    fn name(&self) -> &'static str;
    /// Makes exactly these disks captured; the answer has the id of each, in the same order. A disk that stays keeps its id.
    fn set_targets(&mut self, targets: &[Target]) -> Result<Vec<TargetId>, CaptureError>;
    /// What is captured now; after a restart with a kernel half that lived on, what the agent before had set.
    fn targets(&self) -> Vec<(TargetId, Target)>;
    /// Changes what becomes of a disk's writes. A disk begins in [`Mode::Data`] and keeps its mode over [`Capture::set_targets`] and over
    /// the agent's death.
    ///
    /// In [`Mode::ExtentsOnly`] writes are not handed out: their places (64 KiB pieces) come as [`Captured::Lost`], within a second
    /// and before a later [`Capture::flush_losses`] returns, also of those that were under way when the mode changed. That is out of
    /// order with everything else, so the caller must be in a gap of every group on the disk from before it asks for this mode until it
    /// has asked for [`Mode::Data`] again and then handled what [`Capture::flush_losses`] hands out. Discards and zeroes are handed
    /// out as ever; they carry no data.
    fn set_mode(&mut self, target: TargetId, mode: Mode) -> Result<(), CaptureError>;
    /// Hands out what is there, up to about `budget` bytes. With `exact`, losses are handed out before anything that may depend on
    /// them; without (the caller is in a gap anyway and recovery points are not offered), they may come up to
    /// 100 ms later, but still before a later [`Capture::flush_losses`] returns.
    fn poll(
        &mut self,
        budget: usize,
        exact: bool,
        now: MonoTime,
        out: &mut Vec<Captured>,
    ) -> Result<Polled, CaptureError>;
    /// Hands out all losses known now.
    fn flush_losses(&mut self, out: &mut Vec<Captured>) -> Result<(), CaptureError>;
    /// Losses handed out so far are safe with the caller (persisted): the backend may forget them.
    fn confirm_losses(&mut self) -> Result<(), CaptureError>;
    /// What was handed out before `position` is safe with the caller: its memory may be used again, and an agent that
    /// starts anew goes on from there.
    fn release(&mut self, position: Position);
    fn barrier(&self) -> Arc<dyn Barrier>;
    /// How many requests have been handed out so far.
    fn handed_out(&self) -> u64;
    /// Whether a request that was among the first `number` handed out, and that touches `extent`, has not reached the disk yet.
    fn writes_before(&self, number: u64, target: TargetId, extent: &Extent) -> bool;
    /// Requests handed out, or begun to be, that have not reached the disk yet.
    fn in_flight(&self) -> usize;
    /// Bytes waiting and room in all, of the buffer between kernel and agent.
    fn fill(&self) -> (u64, u64);
    fn counters(&self) -> Result<Counters, CaptureError>;
    /// [`Counters::passthrough`] of each target.
    fn passthrough(&self) -> Result<Vec<(TargetId, u64)>, CaptureError> {
        Ok(Vec::new())
    }
    /// Whether this run goes on where another process stopped, with nothing missed in between.
    fn resumed(&self) -> bool;
    /// Takes the kernel half out for good.
    fn remove(&mut self) -> Result<(), CaptureError>;
}

/// Why capture does not work here.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("not built in: clang was missing when this binary was built")]
    NotBuiltIn,
    #[error("bpf-rq knows the memory layout of x86_64 only, this host is {arch}")]
    Architecture { arch: &'static str },
    #[error("could not read the kernel's type information {path}")]
    Btf {
        path: &'static str,
        #[source]
        source: bpf::BtfError,
    },
    #[error("the kernel's type information does not show what capture needs: {what}")]
    Feature { what: String },
    #[error("could not {what}: {path}")]
    File {
        what: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "the kernel refused the capture program; it needs root (CAP_BPF and CAP_PERFMON) and no lockdown in mode confidentiality"
    )]
    Load(#[source] Box<aya::EbpfError>),
    #[error("the kernel refused to load program {program}")]
    Program {
        program: &'static str,
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    #[error("could not use the BPF map {map}")]
    Map {
        map: &'static str,
        #[source]
        source: Box<aya::maps::MapError>,
    },
    #[error("could not pin {path}: is a BPF file system mounted there?")]
    Pin {
        path: String,
        #[source]
        source: Box<aya::pin::PinError>,
    },
    #[error("{program} as loaded lacks {what}")]
    Missing { program: &'static str, what: &'static str },
    #[error(
        "calibration failed: {reads} reads of disk {disk} went by and none showed where the kernel keeps its pages; this \
         kernel's memory layout is not known to bpf-rq"
    )]
    Calibration { disk: DevNo, reads: u32 },
    #[error(
        "self-test failed: of {pages} test pages read through the capture formula only {seen} held what was written; capture \
         would send wrong data and stays off"
    )]
    SelfTest { pages: u32, seen: u32 },
    #[error("no disk is given to calibrate on")]
    NoDisk,
    #[error("at most {max} disks can be captured at once, {asked} are asked for")]
    TooManyDisks { asked: usize, max: usize },
    #[error("at most {max} {what} of one disk can be told to the kernel, disk {disk} has {asked}")]
    TooManyRanges { disk: DevNo, what: &'static str, asked: usize, max: usize },
    #[error("the dirty map has room for {max_tib} TiB of disks in all")]
    DirtyMapFull { max_tib: u64 },
    #[error("pinned by another version of the agent (layout {found}, this one has {ours})")]
    Layout { found: u64, ours: u64 },
    #[error("the kernel lost records of CPU {cpu} that it had room for: capture begins anew")]
    BufferFull { cpu: u32 },
    #[error("could not {what}, which bpf-legacy needs for its self-test")]
    TestDisk {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("calibration failed: {what} could not be found; this kernel's requests are not known to bpf-legacy")]
    Unknown { what: &'static str },
    #[error("self-test failed: {what}; capture would send wrong data and stays off")]
    LegacySelfTest { what: &'static str },
    #[error(
        "bpf-rq cannot work on this kernel; if it is an old one (4.18 and later), set capture = \"bpf-legacy\" in the agent's configuration; on \
         5.10 and later volumes of the device mapper (LVM, LUKS) can be captured all the same: unprotect the group and protect them"
    )]
    TooOld {
        #[source]
        source: Box<CaptureError>,
    },
    #[error(
        "the configuration says capture = \"dm-mirror\": only volumes of the device mapper that were chosen as such are captured; protect \
         them anew, or set capture = \"bpf-rq\""
    )]
    MirrorsOnly,
    #[error("the capture buffer is damaged at {at}: a record of {len} bytes")]
    Damaged { at: u64, len: u32 },
}

impl CaptureError {
    /// Whether the kernel lacks what was asked of it, so that a backend that asks for less may do.
    pub fn asks_too_much_of_the_kernel(&self) -> bool {
        matches!(
            self,
            Self::Btf { .. } | Self::Feature { .. } | Self::Load(_) | Self::Program { .. } | Self::Map { .. }
        )
    }
}
