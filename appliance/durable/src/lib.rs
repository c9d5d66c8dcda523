//! Files that survive power loss.
//!
//! Everything the engine crates put on a disk goes through [`Disk`]: the real one ([`OsDisk`]) or one that lies on purpose
//! ([`SimDisk`]). Paths are relative to the disk's root. [`Twin`] keeps one small value in two copies; [`Corruption`] names
//! damage that power loss cannot explain.
//!
//! What a caller may rely on, and what it may not:
//! - `create_*`, `rename`, `remove`, `create_dir`, `replace` are durable when they return `Ok`. After `Err` the outcome is
//!   unknown until the next power cycle: the old state or the new one.
//! - `write_at`, `set_len`, `punch_hole` are durable after `flush` returned `Ok`, in any order and torn anywhere before.
//! - A queued write is durable when its completion says `Ok`.
//! - What a *restarted process* reads may be not durable yet: the process before it died between write and flush, and the
//!   bytes are in the page cache only. Recovery must flush a file (and [`Disk::cleanup`] its directory) before it relies on what it read.

mod corruption;
mod disk;
mod os;
mod rng;
mod sim;
mod twin;

pub use corruption::Corruption;
pub use disk::{
    ALIGN, AlignedBuf, Completion, DirEntry, Disk, DiskError, DiskErrorKind, DiskFile, OpenMode, Space, TEMP_PREFIX,
    WriteQueue,
};
pub use os::{DirLock, LockError, OsDisk, QUEUE_DEPTH_MAX, QueueChoice};
pub use sim::SimDisk;
pub use twin::{CopyFault, FaultReason, TWIN_BODY_MAX, Twin, TwinError};
