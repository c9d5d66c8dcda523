//! A blocking client over anything that is `Read + Write`.
//!
//! ```text
//! let mut client = Client::connect(UnixStream::connect(path)?, "export-name")?;
//! client.read(0, &mut buf)?;                                    // one at a time, any length
//! let cookie = client.submit(Operation::Read { offset, len })?; // or up to MAX_IN_FLIGHT at once ..
//! while let Some(done) = client.complete()? { .. }              // .. completing in any order
//! client.disconnect()?;
//! ```
//!
//! Invariants. A server is not trusted: every length is checked against what was asked before memory is taken, data must
//! cover a READ exactly and without overlap, and once the framing is broken ([`ClientError::is_fatal`]) the client
//! refuses to go on. It cannot deadlock with a server that answers in order over narrow pipes: data is only sent when no
//! READ is outstanding, and what then can be under way without being taken ([`MAX_IN_FLIGHT`] requests one way, as many
//! answers without data the other) fits any socket buffer.
//!
//! TLS: [`start_tls`] on the plain stream, wrap it, then [`Client::connect_secured`].

use crate::{
    Access, Allocation, BlockSizes, Errno, ExportEntry, ExportFlags, ExportInfo, ReplyMode, StatusExtent,
    format::{self, *},
};
use model::ByteLen;
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::{self, BufReader, Read, Write},
};

/// Requests under way or completed and not yet collected. Enough to hide a network round trip; 28 bytes each, so that
/// all of them fit a socket's buffer.
pub const MAX_IN_FLIGHT: usize = 64;
/// Entries of a list we take from a server.
const MAX_LISTED: usize = 65_536;
/// Extents of one BLOCK_STATUS answer we take from a server (8 MiB of answer).
const MAX_EXTENTS: usize = 1 << 20;
/// READ data that arrives in one chunk or many; one buffer per request.
const READ_BUFFER: usize = 64 * 1024;

/// A connection to one export.
#[derive(Debug)]
pub struct Client<S> {
    stream: BufReader<S>,
    export: RemoteExport,
    next_cookie: u64,
    pending: BTreeMap<u64, Pending>,
    done: VecDeque<Completion>,
    broken: bool,
}

/// What the server says about its export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteExport {
    pub name: String,
    pub info: ExportInfo,
    pub structured: bool,
    /// Whether the server answers BLOCK_STATUS.
    pub block_status: bool,
}

/// A request. Offsets and lengths are bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation<'a> {
    Read { offset: u64, len: u32 },
    Write { offset: u64, data: &'a [u8], fua: bool },
    Flush,
    Trim { offset: u64, len: u32, fua: bool },
    Zero { offset: u64, len: u32, fua: bool, no_hole: bool },
    Cache { offset: u64, len: u32 },
    BlockStatus { offset: u64, len: u32 },
}

/// A request that has been answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    pub cookie: u64,
    pub result: Result<Answer, RemoteError>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Done,
    /// A READ's data.
    Data(Vec<u8>),
    /// A BLOCK_STATUS: runs from the request's offset on, at least one, none beyond its end; may end before it.
    Status(Vec<StatusExtent>),
}

/// The server could not do it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct RemoteError {
    pub operation: &'static str,
    pub offset: u64,
    pub len: u64,
    pub errno: Errno,
    /// The server's own words; empty when it sent none.
    pub text: String,
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes at {} failed at the server: {}", self.operation, self.len, self.offset, self.errno)?;
        if self.text.is_empty() { Ok(()) } else { write!(f, ": {}", self.text) }
    }
}

/// A violation of the protocol by the server, by name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("it does not greet as an NBD server")]
    NotNbd,
    #[error("it speaks only the oldstyle protocol")]
    Oldstyle,
    #[error("it does not speak the fixed newstyle protocol")]
    NotFixedNewstyle,
    #[error("{got:#x} stands where the answer to an option must begin")]
    BadOptionMagic { got: u64 },
    #[error("it answered option {got} when {wanted} was asked")]
    OtherOption { wanted: u32, got: u32 },
    #[error("its answer to option {option} is malformed (type {kind:#x})")]
    BadOptionReply { option: u32, kind: u32 },
    #[error("its answer to option {option} has {len} bytes")]
    OptionReplyTooLong { option: u32, len: u32 },
    #[error("block sizes of {min} to {max} bytes")]
    BadBlockSizes { min: u32, max: u32 },
    #[error("{got:#010x} stands where a reply must begin")]
    BadReplyMagic { got: u32 },
    #[error("a reply to a request that is not under way ({cookie})")]
    UnknownCookie { cookie: u64 },
    #[error("a chunk of type {kind} and {len} bytes that does not fit its request")]
    BadChunk { kind: u16, len: u32 },
    #[error("data outside the request or twice the same")]
    BadDataRange,
    #[error("a READ was ended with {missing} bytes missing")]
    DataMissing { missing: u64 },
    #[error("a BLOCK_STATUS was ended without an extent")]
    StatusMissing,
    #[error("a READ was answered without chunks after chunks were agreed on")]
    UnstructuredRead,
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("NBD handshake: the connection failed")]
    Io(#[from] io::Error),
    #[error("NBD handshake: the server is not understood: {0}")]
    Protocol(#[from] Violation),
    #[error("NBD handshake: the server has no export {name:?}")]
    NoSuchExport { name: String },
    #[error("NBD handshake: the server requires TLS")]
    TlsRequired,
    #[error("NBD handshake: the server refused {what} ({reason}){}{text}", if text.is_empty() { "" } else { ": " })]
    Refused { what: &'static str, reason: &'static str, text: String },
    #[error("NBD handshake: an export's name has at most {MAX_NAME_BYTES} bytes, this one {len}")]
    NameTooLong { len: usize },
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the NBD connection failed while {during}")]
    Io { during: &'static str, source: io::Error },
    #[error("the NBD server is not understood: {0}")]
    Protocol(#[from] Violation),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error("{len} bytes at {offset} reach beyond the export's {size}")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error("{len} bytes in one request; the server takes at most {max}")]
    TooLong { len: u64, max: u32 },
    #[error("a request for no bytes")]
    Empty,
    #[error("the server's export cannot do {what}")]
    Unsupported { what: &'static str },
    #[error("{MAX_IN_FLIGHT} requests are under way already: collect some first")]
    TooManyInFlight,
    #[error("the NBD connection failed earlier and cannot be used any more")]
    Broken,
}

impl ClientError {
    /// Whether the connection is lost with it.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Protocol(_) | Self::Broken)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Status,
    Other,
}

#[derive(Debug)]
struct Pending {
    kind: Kind,
    name: &'static str,
    offset: u64,
    len: u64,
    data: Vec<u8>,
    /// What of `data` has arrived: disjoint runs that do not touch, start → end.
    arrived: BTreeMap<u64, u64>,
    status: Vec<StatusExtent>,
    error: Option<(Errno, String)>,
}

impl<S: Read + Write> Client<S> {
    /// Opens an export over a plain stream.
    pub fn connect(stream: S, name: &str) -> Result<Self, ConnectError> {
        Self::connect_as(stream, name, ReplyMode::Structured)
    }

    /// As [`Client::connect`]; with [`ReplyMode::Simple`] nothing newer than simple replies is asked for (no holes, no
    /// block status, no error texts), as the Linux kernel's client does it.
    pub fn connect_as(mut stream: S, name: &str, replies: ReplyMode) -> Result<Self, ConnectError> {
        let hello = Hello::exchange(&mut stream)?;
        Self::negotiate(stream, hello, name, replies)
    }

    /// Opens an export over the stream that was secured after [`start_tls`].
    pub fn connect_secured(stream: S, secured: Secured, name: &str) -> Result<Self, ConnectError> {
        Self::negotiate(stream, secured.0, name, ReplyMode::Structured)
    }

    pub fn export(&self) -> &RemoteExport {
        &self.export
    }
    pub fn size(&self) -> ByteLen {
        self.export.info.size
    }

    /// Fills `buf` from `offset`, in as many requests as it takes.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), ClientError> {
        let max = self.max_payload();
        for (i, piece) in buf.chunks_mut(max).enumerate() {
            let at = offset.saturating_add((i * max) as u64);
            let cookie = self.submit(Operation::Read { offset: at, len: piece.len() as u32 })?;
            match self.wait(cookie)? {
                Answer::Data(data) => piece.copy_from_slice(&data),
                Answer::Done | Answer::Status(_) => unreachable!("a READ completes with data"),
            }
        }
        Ok(())
    }

    /// With `fua` the data is durable when this returns; a server without FUA is asked to flush instead.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        let flush = fua && !self.export.info.flags.contains(ExportFlags::FUA);
        let fua = fua && !flush;
        let max = self.max_payload();
        for (i, piece) in data.chunks(max).enumerate() {
            let offset = offset.saturating_add((i * max) as u64);
            let cookie = self.submit(Operation::Write { offset, data: piece, fua })?;
            self.wait(cookie)?;
        }
        if flush { self.flush() } else { Ok(()) }
    }

    /// Returns when everything that completed before is durable.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let cookie = self.submit(Operation::Flush)?;
        self.wait(cookie).map(drop)
    }

    pub fn trim(&mut self, offset: u64, len: u64) -> Result<(), ClientError> {
        self.in_pieces(offset, len, |offset, len| Operation::Trim { offset, len, fua: false })
    }

    pub fn zero(&mut self, offset: u64, len: u64, fua: bool) -> Result<(), ClientError> {
        self.in_pieces(offset, len, |offset, len| Operation::Zero { offset, len, fua, no_hole: false })
    }

    /// What is data and what is zero in the whole range, neighbours of a kind merged. Without BLOCK_STATUS at the server
    /// all is data; so is the rest of a range that is finer grained than [`MAX_EXTENTS`] runs. Ask for a large export in
    /// parts.
    pub fn allocation(&mut self, offset: u64, len: u64) -> Result<Vec<StatusExtent>, ClientError> {
        if !self.export.block_status {
            return Ok(vec![StatusExtent { len, allocation: Allocation::Data }]);
        }
        let end = offset.saturating_add(len);
        let mut runs: Vec<StatusExtent> = Vec::new();
        let mut at = offset;
        while at < end {
            if runs.len() > MAX_EXTENTS {
                runs.push(StatusExtent { len: end - at, allocation: Allocation::Data });
                break;
            }
            let piece = (end - at).min(self.max_span());
            let cookie = self.submit(Operation::BlockStatus { offset: at, len: piece as u32 })?;
            let Answer::Status(extents) = self.wait(cookie)? else {
                unreachable!("a BLOCK_STATUS completes with extents");
            };
            for extent in extents {
                at += extent.len;
                match runs.last_mut() {
                    Some(last) if last.allocation == extent.allocation => last.len += extent.len,
                    _ => runs.push(extent),
                }
            }
        }
        Ok(runs)
    }

    /// Says goodbye and gives the stream back. What is in flight is not waited for.
    pub fn disconnect(mut self) -> Result<S, ClientError> {
        if !self.broken {
            self.send(cmd::DISC, 0, 0, 0, 0, &[])?;
        }
        Ok(self.stream.into_inner())
    }

    /// Requests under way or not yet collected.
    pub fn in_flight(&self) -> usize {
        self.pending.len() + self.done.len()
    }

    /// Sends a request without waiting for its answer; the cookie comes back with the completion.
    pub fn submit(&mut self, operation: Operation<'_>) -> Result<u64, ClientError> {
        if self.broken {
            return Err(ClientError::Broken);
        }
        if self.in_flight() >= MAX_IN_FLIGHT {
            return Err(ClientError::TooManyInFlight);
        }
        self.check(&operation)?;
        let fua = |on: bool| if on { cmd::FLAG_FUA } else { 0 };
        let mut data: &[u8] = &[];
        let (kind, name, command, flags, offset, len) = match operation {
            Operation::Read { offset, len } => (Kind::Read, "read", cmd::READ, 0, offset, len),
            Operation::Write { offset, data: bytes, fua: durable } => {
                data = bytes;
                (Kind::Other, "write", cmd::WRITE, fua(durable), offset, bytes.len() as u32)
            }
            Operation::Flush => (Kind::Other, "flush", cmd::FLUSH, 0, 0, 0),
            Operation::Trim { offset, len, fua: durable } => {
                (Kind::Other, "trim", cmd::TRIM, fua(durable), offset, len)
            }
            Operation::Zero { offset, len, fua: durable, no_hole } => {
                let flags = fua(durable) | if no_hole { cmd::FLAG_NO_HOLE } else { 0 };
                (Kind::Other, "zeroing", cmd::WRITE_ZEROES, flags, offset, len)
            }
            Operation::Cache { offset, len } => (Kind::Other, "prefetch", cmd::CACHE, 0, offset, len),
            Operation::BlockStatus { offset, len } => (Kind::Status, "block status", cmd::BLOCK_STATUS, 0, offset, len),
        };
        if !data.is_empty() {
            // The server may be busy sending what was read; it would not take our data until we take its.
            while self.pending.values().any(|p| p.kind != Kind::Other) {
                self.receive_one()?;
            }
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.send(command, flags, cookie, offset, len, data)?;
        self.pending.insert(
            cookie,
            Pending {
                kind,
                name,
                offset,
                len: u64::from(len),
                data: Vec::new(),
                arrived: BTreeMap::new(),
                status: Vec::new(),
                error: None,
            },
        );
        Ok(cookie)
    }

    /// The next completed request; `None` when nothing is in flight.
    pub fn complete(&mut self) -> Result<Option<Completion>, ClientError> {
        while self.done.is_empty() {
            if self.broken {
                return Err(ClientError::Broken);
            }
            if self.pending.is_empty() {
                return Ok(None);
            }
            self.receive_one()?;
        }
        Ok(self.done.pop_front())
    }

    /// Waits for one request; completions of others are kept for [`Client::complete`].
    pub fn wait(&mut self, cookie: u64) -> Result<Answer, ClientError> {
        loop {
            if let Some(at) = self.done.iter().position(|done| done.cookie == cookie) {
                let done = self.done.remove(at).expect("it was found there");
                return Ok(done.result?);
            }
            if self.broken || !self.pending.contains_key(&cookie) {
                return Err(ClientError::Broken);
            }
            self.receive_one()?;
        }
    }

    fn in_pieces(
        &mut self,
        offset: u64,
        len: u64,
        operation: impl Fn(u64, u32) -> Operation<'static>,
    ) -> Result<(), ClientError> {
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(self.max_span());
            let cookie = self.submit(operation(offset.saturating_add(at), piece as u32))?;
            self.wait(cookie)?;
            at += piece;
        }
        Ok(())
    }

    /// Longest request without data: 1 GiB, a multiple of every block size.
    fn max_span(&self) -> u64 {
        1 << 30
    }

    fn max_payload(&self) -> usize {
        let blocks = self.export.info.blocks;
        (blocks.max_payload - blocks.max_payload % blocks.min) as usize
    }

    fn check(&self, operation: &Operation<'_>) -> Result<(), ClientError> {
        let info = &self.export.info;
        let (offset, len, changes, needs, what) = match *operation {
            Operation::Read { offset, len } => (offset, u64::from(len), false, ExportFlags::NONE, "reads"),
            Operation::Write { offset, data, .. } => (offset, data.len() as u64, true, ExportFlags::NONE, "writes"),
            Operation::Trim { offset, len, .. } => (offset, u64::from(len), true, ExportFlags::TRIM, "trim"),
            Operation::Zero { offset, len, .. } => (offset, u64::from(len), true, ExportFlags::WRITE_ZEROES, "zeroing"),
            Operation::Cache { offset, len } => (offset, u64::from(len), false, ExportFlags::CACHE, "prefetch"),
            Operation::BlockStatus { .. } if !self.export.block_status => {
                return Err(ClientError::Unsupported { what: "block status" });
            }
            Operation::BlockStatus { offset, len } => {
                (offset, u64::from(len), false, ExportFlags::NONE, "block status")
            }
            Operation::Flush if info.flags.contains(ExportFlags::FLUSH) => return Ok(()),
            Operation::Flush => return Err(ClientError::Unsupported { what: "flush" }),
        };
        if changes && info.access == Access::ReadOnly {
            return Err(ClientError::Unsupported { what: "changes: it is read-only" });
        }
        if !info.flags.contains(needs) {
            return Err(ClientError::Unsupported { what });
        }
        let fua = match *operation {
            Operation::Write { fua, .. } | Operation::Trim { fua, .. } | Operation::Zero { fua, .. } => fua,
            _ => false,
        };
        if fua && !info.flags.contains(ExportFlags::FUA) {
            return Err(ClientError::Unsupported { what: "FUA" });
        }
        if len == 0 {
            return Err(ClientError::Empty);
        }
        if matches!(operation, Operation::Read { .. } | Operation::Write { .. })
            && len > u64::from(info.blocks.max_payload)
        {
            return Err(ClientError::TooLong { len, max: info.blocks.max_payload });
        }
        if offset.checked_add(len).is_none_or(|end| end > info.size.0) {
            return Err(ClientError::OutOfRange { offset, len, size: info.size.0 });
        }
        Ok(())
    }

    fn send(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Result<(), ClientError> {
        // Header and a small payload go out in one piece.
        let mut head = Vec::with_capacity(REQUEST_LEN + data.len().min(READ_BUFFER));
        head.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head.extend_from_slice(&flags.to_be_bytes());
        head.extend_from_slice(&command.to_be_bytes());
        head.extend_from_slice(&cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&len.to_be_bytes());
        let rest = if data.len() <= READ_BUFFER {
            head.extend_from_slice(data);
            &[]
        } else {
            data
        };
        let stream = self.stream.get_mut();
        let sent = stream.write_all(&head).and_then(|()| stream.write_all(rest)).and_then(|()| stream.flush());
        sent.map_err(|source| {
            self.broken = true;
            ClientError::Io { during: "sending a request", source }
        })
    }

    /// Takes in one reply or chunk.
    fn receive_one(&mut self) -> Result<(), ClientError> {
        let received = self.receive();
        if let Err(e) = &received {
            self.broken = e.is_fatal();
        }
        received
    }

    fn receive(&mut self) -> Result<(), ClientError> {
        match u32::from_be_bytes(self.array()?) {
            SIMPLE_REPLY_MAGIC => self.receive_simple(),
            STRUCTURED_REPLY_MAGIC if self.export.structured => self.receive_chunk(),
            got => Err(Violation::BadReplyMagic { got }.into()),
        }
    }

    fn receive_simple(&mut self) -> Result<(), ClientError> {
        let code = u32::from_be_bytes(self.array()?);
        let cookie = u64::from_be_bytes(self.array()?);
        let mut pending = self.pending.remove(&cookie).ok_or(Violation::UnknownCookie { cookie })?;
        if code != 0 {
            pending.error.get_or_insert((Errno::from_code(code), String::new()));
        } else if pending.kind != Kind::Other {
            if self.export.structured {
                return Err(Violation::UnstructuredRead.into());
            }
            pending.data = vec![0; pending.len as usize];
            self.fill(&mut pending.data)?;
            pending.arrived.insert(0, pending.len);
        }
        self.finish(cookie, pending)
    }

    fn receive_chunk(&mut self) -> Result<(), ClientError> {
        let flags = u16::from_be_bytes(self.array()?);
        let kind = u16::from_be_bytes(self.array()?);
        let cookie = u64::from_be_bytes(self.array()?);
        let len = u32::from_be_bytes(self.array()?);
        let mut pending = self.pending.remove(&cookie).ok_or(Violation::UnknownCookie { cookie })?;
        let bad = || ClientError::Protocol(Violation::BadChunk { kind, len });
        match (kind, pending.kind) {
            (chunk::NONE, _) if len == 0 && flags & chunk::FLAG_DONE != 0 => {}
            (chunk::OFFSET_DATA, Kind::Read) if len > 8 => {
                let offset = u64::from_be_bytes(self.array()?);
                let range = pending.arrive(offset, u64::from(len - 8))?;
                self.fill(&mut pending.data[range])?;
            }
            (chunk::OFFSET_HOLE, Kind::Read) if len == 12 => {
                let offset = u64::from_be_bytes(self.array()?);
                let hole = u32::from_be_bytes(self.array()?);
                if hole == 0 {
                    return Err(bad());
                }
                pending.arrive(offset, u64::from(hole))?; // the buffer is zero there
            }
            (chunk::BLOCK_STATUS, Kind::Status) if len >= 12 && (len - 4).is_multiple_of(8) => {
                self.receive_status(&mut pending, (len as usize - 4) / 8).map_err(|e| e.unwrap_or_else(bad))?;
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                let (errno, text) = self.receive_error(len).map_err(|e| e.unwrap_or_else(bad))?;
                pending.error.get_or_insert((errno, text));
            }
            _ => return Err(bad()),
        }
        if flags & chunk::FLAG_DONE != 0 {
            return self.finish(cookie, pending);
        }
        self.pending.insert(cookie, pending);
        Ok(())
    }

    /// `Err(None)`: malformed.
    fn receive_status(&mut self, pending: &mut Pending, count: usize) -> Result<(), Option<ClientError>> {
        if count > MAX_EXTENTS {
            return Err(None);
        }
        let _context = u32::from_be_bytes(self.array()?); // we asked for one only
        let mut left = pending.len;
        let mut extents: Vec<StatusExtent> = Vec::new();
        for _ in 0..count {
            let len = u64::from(u32::from_be_bytes(self.array()?));
            let state = u32::from_be_bytes(self.array()?);
            if len == 0 {
                return Err(None);
            }
            // The last extent may reach beyond what was asked.
            let len = len.min(left);
            left -= len;
            let allocation = if state & STATE_ZERO != 0 { Allocation::Zero } else { Allocation::Data };
            if len > 0 {
                extents.push(StatusExtent { len, allocation });
            }
        }
        pending.status = extents;
        Ok(())
    }

    /// `Err(None)`: malformed.
    fn receive_error(&mut self, len: u32) -> Result<(Errno, String), Option<ClientError>> {
        if !(6..=6 + u32::from(u16::MAX) + 8).contains(&len) {
            return Err(None);
        }
        let mut body = vec![0; len as usize];
        self.fill(&mut body)?;
        let mut fields = Fields(&body);
        let (Some(code), Some(text_len)) = (fields.u32(), fields.u16()) else { return Err(None) };
        // What follows the text (the offset of ERROR_OFFSET, or what later versions add) tells us nothing we need.
        let text = fields.bytes(usize::from(text_len)).ok_or(None)?;
        Ok((Errno::from_code(code), readable(text)))
    }

    fn finish(&mut self, cookie: u64, pending: Pending) -> Result<(), ClientError> {
        let result = match (pending.error, pending.kind) {
            (Some((errno, text)), _) => {
                let (operation, offset, len) = (pending.name, pending.offset, pending.len);
                Err(RemoteError { operation, offset, len, errno, text })
            }
            (None, Kind::Other) => Ok(Answer::Done),
            (None, Kind::Status) if pending.status.is_empty() => return Err(Violation::StatusMissing.into()),
            (None, Kind::Status) => Ok(Answer::Status(pending.status)),
            (None, Kind::Read) => {
                let arrived: u64 = pending.arrived.iter().map(|(start, end)| end - start).sum();
                if arrived < pending.len {
                    return Err(Violation::DataMissing { missing: pending.len - arrived }.into());
                }
                Ok(Answer::Data(pending.data))
            }
        };
        self.done.push_back(Completion { cookie, result });
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ClientError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), ClientError> {
        self.stream.read_exact(buf).map_err(|source| ClientError::Io { during: "reading a reply", source })
    }

    fn negotiate(mut stream: S, hello: Hello, name: &str, replies: ReplyMode) -> Result<Self, ConnectError> {
        if name.len() > MAX_NAME_BYTES {
            return Err(ConnectError::NameTooLong { len: name.len() });
        }
        let structured = replies == ReplyMode::Structured
            && match ask(&mut stream, opt::STRUCTURED_REPLY, &[], |_, _| None)? {
                Err(refusal) if refusal.code == rep::ERR_TLS_REQD => return Err(ConnectError::TlsRequired),
                answer => answer.is_ok(),
            };
        let block_status = structured && choose_allocation(&mut stream, name)?;
        let info = match go(&mut stream, name)? {
            Some(info) => info,
            None => export_name(&mut stream, hello, name)?,
        };
        Ok(Self {
            stream: BufReader::with_capacity(READ_BUFFER, stream),
            export: RemoteExport { name: name.to_owned(), info, structured, block_status },
            next_cookie: 1,
            pending: BTreeMap::new(),
            done: VecDeque::new(),
            broken: false,
        })
    }
}

impl Pending {
    /// Notes that data of an absolute range arrives; gives its place in the buffer.
    fn arrive(&mut self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, Violation> {
        let start = offset.checked_sub(self.offset).ok_or(Violation::BadDataRange)?;
        let end = start.checked_add(len).filter(|end| *end <= self.len).ok_or(Violation::BadDataRange)?;
        let before = self.arrived.range(..end).next_back().map(|(s, e)| (*s, *e));
        if before.is_some_and(|(_, e)| e > start) {
            return Err(Violation::BadDataRange);
        }
        // Chunks come in order as a rule; growing the last run keeps the map small.
        match before {
            Some((s, e)) if e == start => self.arrived.insert(s, end),
            _ => self.arrived.insert(start, end),
        };
        if self.data.is_empty() {
            self.data = vec![0; self.len as usize];
        }
        Ok(start as usize..end as usize)
    }
}

/// The exports a server lists.
pub fn list<S: Read + Write>(stream: &mut S) -> Result<Vec<ExportEntry>, ConnectError> {
    Hello::exchange(stream)?;
    let mut entries = Vec::new();
    let listed = ask(stream, opt::LIST, &[], |kind, data| {
        let mut fields = Fields(data);
        let name = fields.text().filter(|_| kind == rep::SERVER && entries.len() < MAX_LISTED)?;
        entries.push(ExportEntry { name: readable(name), description: readable(fields.0) });
        Some(())
    })?;
    listed.map_err(|e| e.refused("the list of exports"))?;
    ask(stream, opt::ABORT, &[], |_, _| Some(()))?.map_err(|e| e.refused("to end"))?;
    Ok(entries)
}

/// The plain-text beginning of a session was done and the server waits for TLS.
#[derive(Debug)]
pub struct Secured(Hello);

/// Asks for TLS on a plain stream. Afterwards wrap the stream and call [`Client::connect_secured`].
pub fn start_tls<S: Read + Write>(stream: &mut S) -> Result<Secured, ConnectError> {
    let hello = Hello::exchange(stream)?;
    ask(stream, opt::STARTTLS, &[], |_, _| None)?.map_err(|e| e.refused("TLS"))?;
    Ok(Secured(hello))
}

/// The greeting as the server sent it.
#[derive(Debug)]
struct Hello {
    no_zeroes: bool,
}

impl Hello {
    fn exchange<S: Read + Write>(stream: &mut S) -> Result<Self, ConnectError> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut fields = Fields(&greeting);
        let (magic, style, flags) = (fields.u64(), fields.u64(), fields.u16());
        if magic != Some(MAGIC) {
            return Err(Violation::NotNbd.into());
        }
        if style != Some(OPTION_MAGIC) {
            return Err(Violation::Oldstyle.into());
        }
        let flags = flags.unwrap_or(0);
        if flags & format::greeting::FIXED_NEWSTYLE == 0 {
            return Err(Violation::NotFixedNewstyle.into());
        }
        let ours = flags & (format::greeting::FIXED_NEWSTYLE | format::greeting::NO_ZEROES);
        stream.write_all(&u32::from(ours).to_be_bytes())?;
        stream.flush()?;
        Ok(Self { no_zeroes: flags & format::greeting::NO_ZEROES != 0 })
    }
}

/// A refused option.
struct Refusal {
    code: u32,
    text: String,
}

impl Refusal {
    fn refused(self, what: &'static str) -> ConnectError {
        if self.code == rep::ERR_TLS_REQD {
            return ConnectError::TlsRequired;
        }
        let reason = match self.code {
            rep::ERR_UNSUP => "not supported",
            rep::ERR_POLICY => "not allowed",
            rep::ERR_INVALID => "invalid",
            rep::ERR_PLATFORM => "not supported on its platform",
            rep::ERR_UNKNOWN => "unknown export",
            rep::ERR_SHUTDOWN => "it is shutting down",
            rep::ERR_BLOCK_SIZE_REQD => "it wants block sizes honoured",
            rep::ERR_TOO_BIG => "too big",
            _ => "for a reason unknown to us",
        };
        ConnectError::Refused { what, reason, text: self.text }
    }
}

/// Sends an option and takes its answers up to ACK or an error. `each` is handed the others; `None` from it: malformed.
fn ask<S: Read + Write>(
    stream: &mut S,
    option: u32,
    data: &[u8],
    mut each: impl FnMut(u32, &[u8]) -> Option<()>,
) -> Result<Result<(), Refusal>, ConnectError> {
    send_option(stream, option, data)?;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let mut fields = Fields(&header);
        let (Some(magic), Some(got), Some(kind), Some(len)) = (fields.u64(), fields.u32(), fields.u32(), fields.u32())
        else {
            unreachable!("a header has all its fields");
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(Violation::BadOptionMagic { got: magic }.into());
        }
        if got != option {
            return Err(Violation::OtherOption { wanted: option, got }.into());
        }
        if len as usize > MAX_OPTION_BYTES {
            return Err(Violation::OptionReplyTooLong { option, len }.into());
        }
        let mut body = vec![0; len as usize];
        stream.read_exact(&mut body)?;
        match kind {
            rep::ACK => return Ok(Ok(())),
            _ if kind & rep::ERROR_BIT != 0 => return Ok(Err(Refusal { code: kind, text: readable(&body) })),
            _ => each(kind, &body).ok_or(Violation::BadOptionReply { option, kind })?,
        }
    }
}

fn send_option<S: Write>(stream: &mut S, option: u32, data: &[u8]) -> Result<(), ConnectError> {
    let mut out = Vec::with_capacity(OPTION_HEADER_LEN + data.len());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    stream.write_all(&out)?;
    stream.flush()?;
    Ok(())
}

/// Asks for `base:allocation`; whether the server gives it.
fn choose_allocation<S: Read + Write>(stream: &mut S, name: &str) -> Result<bool, ConnectError> {
    let mut data = Vec::new();
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&1u32.to_be_bytes());
    data.extend_from_slice(&(CONTEXT_ALLOCATION.len() as u32).to_be_bytes());
    data.extend_from_slice(CONTEXT_ALLOCATION.as_bytes());
    let mut given = false;
    let answer = ask(stream, opt::SET_META_CONTEXT, &data, |kind, data| {
        given |= kind == rep::META_CONTEXT && data.get(4..) == Some(CONTEXT_ALLOCATION.as_bytes());
        Some(())
    })?;
    // A refusal only costs sparseness; a wrong name is told by GO.
    Ok(answer.is_ok() && given)
}

/// `None`: the server does not know GO.
fn go<S: Read + Write>(stream: &mut S, name: &str) -> Result<Option<ExportInfo>, ConnectError> {
    let mut data = Vec::new();
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&2u16.to_be_bytes());
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    data.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
    let mut export = None;
    let mut blocks = BlockSizes::BYTES;
    let mut description = String::new();
    let answer = ask(stream, opt::GO, &data, |kind, data| {
        let mut fields = Fields(data);
        match (kind, fields.u16()?) {
            (rep::INFO, info::EXPORT) => export = Some((fields.u64()?, fields.u16()?)),
            (rep::INFO, info::DESCRIPTION) => description = readable(fields.0),
            (rep::INFO, info::BLOCK_SIZE) => {
                blocks = BlockSizes { min: fields.u32()?, preferred: fields.u32()?, max_payload: fields.u32()? };
            }
            _ => {} // later kinds of information
        }
        Some(())
    })?;
    match answer {
        Ok(()) => {}
        Err(refusal) if refusal.code == rep::ERR_UNSUP => return Ok(None),
        Err(refusal) if refusal.code == rep::ERR_UNKNOWN => {
            return Err(ConnectError::NoSuchExport { name: name.to_owned() });
        }
        Err(refusal) => return Err(refusal.refused("the export")),
    }
    let (size, flags) = export.ok_or(Violation::BadOptionReply { option: opt::GO, kind: rep::ACK })?;
    remote_info(size, flags, blocks, description).map(Some)
}

fn export_name<S: Read + Write>(stream: &mut S, hello: Hello, name: &str) -> Result<ExportInfo, ConnectError> {
    send_option(stream, opt::EXPORT_NAME, name.as_bytes())?;
    let mut answer = [0; 10 + format::greeting::ZEROES];
    let len = if hello.no_zeroes { 10 } else { answer.len() };
    match stream.read_exact(&mut answer[..len]) {
        // The one way a server says no to this option.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(ConnectError::NoSuchExport { name: name.to_owned() });
        }
        read => read?,
    }
    let mut fields = Fields(&answer);
    let (size, flags) = (fields.u64().unwrap_or(0), fields.u16().unwrap_or(0));
    remote_info(size, flags, BlockSizes::BYTES, String::new())
}

fn remote_info(size: u64, flags: u16, blocks: BlockSizes, description: String) -> Result<ExportInfo, ConnectError> {
    let BlockSizes { min, preferred, max_payload } = blocks;
    if !min.is_power_of_two() || min > 64 * 1024 || max_payload < min {
        return Err(Violation::BadBlockSizes { min, max: max_payload }.into());
    }
    let access = if flags & flag::READ_ONLY != 0 { Access::ReadOnly } else { Access::ReadWrite };
    Ok(ExportInfo {
        size: ByteLen(size),
        access,
        flags: ExportFlags::from_wire(flags),
        // A server that takes more than we ever want to hold is asked for less.
        blocks: BlockSizes { min, preferred, max_payload: max_payload.min(BlockSizes::MAX_PAYLOAD) },
        description,
    })
}

/// A foreign text, made fit for a terminal.
fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
