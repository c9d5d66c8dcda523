//! What an export is, and how a server finds it.

use crate::format::flag;
use model::ByteLen;
use std::ops::BitOr;

/// What a client learns of an export before it uses it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    pub size: ByteLen,
    pub access: Access,
    pub flags: ExportFlags,
    pub blocks: BlockSizes,
    /// For people; may be empty. At most [`MAX_NAME_BYTES`](crate::MAX_NAME_BYTES) are sent.
    pub description: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// What an export can do. Whether it may be written is [`Access`]; DF comes with structured replies by itself.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ExportFlags(u16);

impl ExportFlags {
    pub const NONE: Self = Self(0);
    pub const FLUSH: Self = Self(flag::SEND_FLUSH);
    pub const FUA: Self = Self(flag::SEND_FUA);
    pub const ROTATIONAL: Self = Self(flag::ROTATIONAL);
    pub const TRIM: Self = Self(flag::SEND_TRIM);
    pub const WRITE_ZEROES: Self = Self(flag::SEND_WRITE_ZEROES);
    /// Several connections see each other's completed writes, and a flush on one covers what completed on all.
    pub const MULTI_CONN: Self = Self(flag::CAN_MULTI_CONN);
    pub const CACHE: Self = Self(flag::SEND_CACHE);
    /// Zeroing can be asked for "only if it is faster than writing".
    pub const FAST_ZERO: Self = Self(flag::SEND_FAST_ZERO);

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub(crate) const fn from_wire(bits: u16) -> Self {
        Self(
            bits & (flag::SEND_FLUSH
                | flag::SEND_FUA
                | flag::ROTATIONAL
                | flag::SEND_TRIM
                | flag::SEND_WRITE_ZEROES
                | flag::CAN_MULTI_CONN
                | flag::SEND_CACHE
                | flag::SEND_FAST_ZERO),
        )
    }
}

impl BitOr for ExportFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which offsets and lengths an export takes, in bytes. Many clients honour them (QEMU, libnbd); those that do not ask
/// get an error for a request that breaks them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this; a power of two.
    pub min: u32,
    pub preferred: u32,
    /// At most this many bytes of data in one READ or WRITE. TRIM, WRITE_ZEROES and BLOCK_STATUS may span more.
    pub max_payload: u32,
}

impl BlockSizes {
    /// The protocol promises 32 MiB to clients that do not ask; more would only grow buffers.
    pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;
    /// For exports that are written: the journal counts in sectors of 512 bytes.
    pub const SECTORS: Self = Self { min: 512, preferred: 4096, max_payload: Self::MAX_PAYLOAD };
    /// For exports that are only read: any byte may be asked for.
    pub const BYTES: Self = Self { min: 1, preferred: 4096, max_payload: Self::MAX_PAYLOAD };
}

impl ExportInfo {
    /// An export that is only read: any number of connections, any alignment.
    pub fn read_only(size: ByteLen) -> Self {
        Self {
            size,
            access: Access::ReadOnly,
            flags: ExportFlags::FLUSH | ExportFlags::MULTI_CONN | ExportFlags::CACHE,
            blocks: BlockSizes::BYTES,
            description: String::new(),
        }
    }
    /// An export that takes writes in sectors, with FUA, flush, trim and zeroing, over one connection.
    pub fn read_write(size: ByteLen) -> Self {
        Self {
            size,
            access: Access::ReadWrite,
            flags: ExportFlags::FLUSH
                | ExportFlags::FUA
                | ExportFlags::TRIM
                | ExportFlags::WRITE_ZEROES
                | ExportFlags::FAST_ZERO
                | ExportFlags::CACHE,
            blocks: BlockSizes::SECTORS,
            description: String::new(),
        }
    }
    #[must_use]
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }
    /// The flags of a session that nobody negotiates ([`Session::agreed`](crate::Session::agreed)), for the client to be told.
    pub fn agreed_flags(&self) -> u16 {
        self.wire_flags(false)
    }
    pub(crate) fn wire_flags(&self, structured: bool) -> u16 {
        // A read-only export does not announce what changes it: a client would only learn EPERM.
        let (access, can) = match self.access {
            Access::ReadOnly => (
                flag::READ_ONLY,
                self.flags
                    .without(ExportFlags::TRIM)
                    .without(ExportFlags::WRITE_ZEROES)
                    .without(ExportFlags::FAST_ZERO)
                    .without(ExportFlags::FUA),
            ),
            Access::ReadWrite => (0, self.flags),
        };
        flag::HAS_FLAGS | access | can.0 | if structured { flag::SEND_DF } else { 0 }
    }
}

/// An export as it is listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportEntry {
    pub name: String,
    pub description: String,
}

/// Where a handshake looks exports up. Called during [`ServerHandshake::step`](crate::ServerHandshake::step): answer from
/// memory, and only what this peer may see.
pub trait Exports {
    fn find(&self, name: &str) -> Option<ExportInfo>;
    fn list(&self) -> Vec<ExportEntry>;
}

/// Whether a range holds data or reads as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    Data,
    /// Reads as zeroes and takes no room.
    Zero,
}

/// One run of a BLOCK_STATUS answer, in bytes; runs follow each other from the request's offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusExtent {
    pub len: u64,
    pub allocation: Allocation,
}
