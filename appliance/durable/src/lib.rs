//! Files that survive power loss.
//!
//! Everything the engine crates put on a disk goes through [`Disk`]: the real one ([`OsDisk`]) or one that lies on purpose
//! ([`SimDisk`]). Paths are relative to the disk's root.

mod disk;
mod os;
mod sim;
mod twin;

pub use disk::{AlignedBuf, Completion, DirEntry, Disk, DiskError, DiskErrorKind, DiskFile, OpenMode, Space, WriteQueue, ALIGN};
