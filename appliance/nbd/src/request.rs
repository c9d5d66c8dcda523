//! A negotiated session and the requests in it.

use crate::{
    export::{Access, ExportFlags, ExportInfo},
    format::*,
};

/// How replies are framed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyMode {
    Simple,
    Structured,
}

/// What the handshake agreed on. Judges requests here, encodes replies in `reply.rs`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Session {
    export_name: String,
    info: ExportInfo,
    replies: ReplyMode,
    block_status: bool,
}

/// A request that may be carried out as it stands: in range, aligned, allowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The client's name for the request, to be sent back.
    pub cookie: u64,
    pub command: Command,
    pub offset: u64,
    /// Bytes; zero only for FLUSH.
    pub len: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// With `df` the answer must be one chunk.
    Read {
        df: bool,
    },
    /// The data follows the header.
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    /// The client will read this soon; doing nothing is allowed.
    Cache,
    /// `no_hole`: keep the room allocated. `fast`: fail with [`Errno::NotSupported`] rather than write zeroes one by one.
    WriteZeroes {
        fua: bool,
        no_hole: bool,
        fast: bool,
    },
    /// With `one`, at most one extent, and not beyond the request.
    BlockStatus {
        one: bool,
    },
}

/// What a request header asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Incoming {
    Request(Request),
    /// Answer with [`Session::push_refusal`] after dropping `discard` bytes of data; the session goes on.
    Refused {
        refusal: Refusal,
        discard: u32,
    },
    /// The client is done: finish what is under way and close, without an answer.
    Disconnect,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub cookie: u64,
    pub reason: RefusalReason,
}

/// Why a request is refused; what the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RefusalReason {
    #[error("the export is read-only")]
    ReadOnly,
    #[error("{len} bytes at {offset} reach beyond the export's {size} bytes")]
    OutOfRange { offset: u64, len: u32, size: u64, write: bool },
    #[error("{len} bytes at {offset}: offset and length must be multiples of {min}")]
    Unaligned { offset: u64, len: u32, min: u32 },
    #[error("{len} bytes in one request; at most {max} are taken")]
    TooLong { len: u32, max: u32 },
    #[error("a request for no bytes")]
    Empty,
    #[error("command {command} is not supported by this export")]
    UnsupportedCommand { command: u16 },
    #[error("flags {flags:#x} are not known for command {command}")]
    UnknownFlags { command: u16, flags: u16 },
    #[error("block status was not negotiated")]
    NoMetaContext,
}

impl RefusalReason {
    pub const fn errno(&self) -> Errno {
        match self {
            Self::ReadOnly => Errno::Perm,
            Self::OutOfRange { write: true, .. } => Errno::NoSpace,
            _ => Errno::Invalid,
        }
    }
}

/// The peer broke the framing: nothing behind it can be trusted, close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("NBD: {got:#010x} stands where a request must begin")]
    BadRequestMagic { got: u32 },
    #[error("NBD: a write announces {len} bytes of data, at most {max} are taken")]
    PayloadTooLong { len: u32, max: u32 },
}

impl Request {
    /// Bytes of data that follow the header.
    pub const fn payload_len(&self) -> usize {
        match self.command {
            Command::Write { .. } => self.len as usize,
            _ => 0,
        }
    }
    /// Whether the answer must wait until the change is durable.
    pub const fn fua(&self) -> bool {
        match self.command {
            Command::Write { fua } | Command::Trim { fua } | Command::WriteZeroes { fua, .. } => fua,
            Command::Read { .. } | Command::Flush | Command::Cache | Command::BlockStatus { .. } => false,
        }
    }
}

impl Session {
    pub(crate) fn new(export_name: String, info: ExportInfo, replies: ReplyMode, block_status: bool) -> Self {
        Self { export_name, info, replies, block_status }
    }
    /// A session that nobody negotiates: both ends know what is served, as when the kernel's client was set up by the server itself.
    /// Simple replies.
    pub fn agreed(info: ExportInfo) -> Self {
        Self::new(String::new(), info, ReplyMode::Simple, false)
    }
    pub fn export_name(&self) -> &str {
        &self.export_name
    }
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }
    pub fn replies(&self) -> ReplyMode {
        self.replies
    }
    /// Whether `base:allocation` was chosen.
    pub fn block_status(&self) -> bool {
        self.block_status
    }

    /// Judges a request header.
    pub fn request(&self, header: &[u8; REQUEST_LEN]) -> Result<Incoming, ProtocolError> {
        let mut fields = Fields(header);
        let (Some(magic), Some(flags), Some(command), Some(cookie), Some(offset), Some(len)) =
            (fields.u32(), fields.u16(), fields.u16(), fields.u64(), fields.u64(), fields.u32())
        else {
            unreachable!("a header has all its fields");
        };
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::BadRequestMagic { got: magic });
        }
        if command == cmd::DISC {
            return Ok(Incoming::Disconnect);
        }
        let discard = if command == cmd::WRITE { len } else { 0 };
        // Dropping twice the largest honest write keeps a careless client alive; more is no client.
        let max = self.info.blocks.max_payload;
        if discard > max.saturating_mul(2) {
            return Err(ProtocolError::PayloadTooLong { len, max });
        }
        Ok(match self.judge(command, flags, offset, len) {
            Ok(command) => {
                let (offset, len) = if command == Command::Flush { (0, 0) } else { (offset, len) };
                Incoming::Request(Request { cookie, command, offset, len })
            }
            Err(reason) => Incoming::Refused { refusal: Refusal { cookie, reason }, discard },
        })
    }

    fn judge(&self, command: u16, flags: u16, offset: u64, len: u32) -> Result<Command, RefusalReason> {
        // FUA is taken (and means nothing) on commands that change nothing, as the protocol recommends.
        let fua = flags & cmd::FLAG_FUA != 0;
        let (allowed, needs, parsed) = match command {
            cmd::READ => (cmd::FLAG_DF, ExportFlags::NONE, Command::Read { df: flags & cmd::FLAG_DF != 0 }),
            cmd::WRITE => (0, ExportFlags::NONE, Command::Write { fua }),
            cmd::FLUSH => (0, ExportFlags::FLUSH, Command::Flush),
            cmd::TRIM => (0, ExportFlags::TRIM, Command::Trim { fua }),
            cmd::CACHE => (0, ExportFlags::CACHE, Command::Cache),
            cmd::WRITE_ZEROES => {
                let mut allowed = cmd::FLAG_NO_HOLE;
                if self.info.flags.contains(ExportFlags::FAST_ZERO) {
                    allowed |= cmd::FLAG_FAST_ZERO;
                }
                let no_hole = flags & cmd::FLAG_NO_HOLE != 0;
                let fast = flags & cmd::FLAG_FAST_ZERO != 0;
                (allowed, ExportFlags::WRITE_ZEROES, Command::WriteZeroes { fua, no_hole, fast })
            }
            cmd::BLOCK_STATUS => {
                let one = flags & cmd::FLAG_REQ_ONE != 0;
                (cmd::FLAG_REQ_ONE, ExportFlags::NONE, Command::BlockStatus { one })
            }
            _ => return Err(RefusalReason::UnsupportedCommand { command }),
        };
        let changes = matches!(parsed, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. });
        if changes && self.info.access == Access::ReadOnly {
            return Err(RefusalReason::ReadOnly);
        }
        if !self.info.flags.contains(needs) {
            return Err(RefusalReason::UnsupportedCommand { command });
        }
        if flags & !(allowed | cmd::FLAG_FUA) != 0 {
            return Err(RefusalReason::UnknownFlags { command, flags });
        }
        if matches!(parsed, Command::BlockStatus { .. }) && !self.block_status {
            return Err(RefusalReason::NoMetaContext);
        }
        if parsed == Command::Flush {
            return Ok(parsed);
        }
        self.judge_range(parsed, changes, offset, len)?;
        Ok(parsed)
    }

    fn judge_range(&self, command: Command, write: bool, offset: u64, len: u32) -> Result<(), RefusalReason> {
        let size = self.info.size.0;
        let blocks = self.info.blocks;
        if len == 0 {
            return Err(RefusalReason::Empty);
        }
        if matches!(command, Command::Read { .. } | Command::Write { .. }) && len > blocks.max_payload {
            return Err(RefusalReason::TooLong { len, max: blocks.max_payload });
        }
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
            return Err(RefusalReason::OutOfRange { offset, len, size, write });
        }
        let min = blocks.min.max(1);
        if !offset.is_multiple_of(u64::from(min)) || !len.is_multiple_of(min) {
            return Err(RefusalReason::Unaligned { offset, len, min });
        }
        Ok(())
    }
}
