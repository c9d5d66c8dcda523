//! A small server over `Read + Write`: one thread, one connection, one request at a time.
//!
//! For tests, tools and the agent's local legs; the box drives [`ServerHandshake`] and [`Session`] itself. Memory: one
//! request's data ([`BlockSizes::max_payload`](crate::BlockSizes)) and one reply of the same size.

use crate::{
    Access, Allocation, Command, Errno, ExportEntry, ExportInfo, Exports, HandshakeConfig, HandshakeError, Incoming,
    ProtocolError, REQUEST_LEN, Request, ServerHandshake, Session, StatusExtent, Step, TlsPolicy,
};
use model::ByteLen;
use std::{
    io::{self, Read, Write},
    ops::Range,
    sync::{Mutex, PoisonError},
};

/// Something that can be served. Ranges are in bytes and always inside [`Export::info`]'s size.
pub trait Export {
    fn info(&self) -> ExportInfo;
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError>;
    /// With `fua` the data is durable before `Ok`.
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError>;
    /// Makes everything written before durable.
    fn flush(&self) -> Result<(), ExportError>;
    fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError>;
    fn zero(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError>;
    /// Runs that follow each other from the range's start; may end early, but not before it has begun.
    fn allocation(&self, range: Range<u64>) -> Result<Vec<StatusExtent>, ExportError> {
        Ok(vec![StatusExtent { len: range.end - range.start, allocation: Allocation::Data }])
    }
}

/// What the client is told when a request fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({errno})")]
pub struct ExportError {
    pub errno: Errno,
    pub message: String,
}

impl ExportError {
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into() }
    }
}

/// How a connection ended without an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Served {
    /// The client said goodbye, in the handshake or after it.
    Disconnected,
    /// The stream ended between two messages.
    HungUp,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("NBD connection failed while {during}")]
    Io { during: &'static str, source: io::Error },
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// Serves one connection to its end. `exports` are (name, export); clients without TLS only.
pub fn serve<S: Read + Write>(stream: &mut S, exports: &[(&str, &dyn Export)]) -> Result<Served, ServeError> {
    let directory = Directory(exports);
    let Some(session) = shake_hands(stream, &directory)? else {
        return Ok(Served::Disconnected);
    };
    let export = directory.get(session.export_name()).expect("the handshake found it in the same list");
    let mut connection = Connection { stream, export, session, data: Vec::new(), out: Vec::new() };
    while let Some(incoming) = connection.next()? {
        match incoming {
            Incoming::Disconnect => return Ok(Served::Disconnected),
            Incoming::Request(request) => connection.carry_out(&request)?,
            Incoming::Refused { refusal, discard } => {
                connection.discard(discard)?;
                connection.session.push_refusal(&mut connection.out, &refusal);
                connection.send()?;
            }
        }
    }
    Ok(Served::HungUp)
}

/// The handshake alone, without TLS; `None` when the client ended it.
pub fn shake_hands<S: Read + Write>(stream: &mut S, exports: &dyn Exports) -> Result<Option<Session>, ServeError> {
    let io = |source| ServeError::Io { during: "shaking hands", source };
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::None });
    let mut buf = Vec::new();
    loop {
        match handshake.step(exports)? {
            Step::Write(bytes) => {
                stream.write_all(&bytes).map_err(io)?;
                stream.flush().map_err(io)?;
            }
            Step::Read(len) => {
                buf.resize(len, 0);
                stream.read_exact(&mut buf).map_err(io)?;
                handshake.feed(&buf);
            }
            Step::StartTls => unreachable!("the policy is to have none"),
            Step::Ready(session) => return Ok(Some(session)),
            Step::Close => return Ok(None),
        }
    }
}

struct Directory<'a>(&'a [(&'a str, &'a dyn Export)]);

impl<'a> Directory<'a> {
    fn get(&self, name: &str) -> Option<&'a dyn Export> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, export)| *export)
    }
}

impl Exports for Directory<'_> {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.get(name).map(|export| export.info())
    }
    fn list(&self) -> Vec<ExportEntry> {
        let entry = |(name, export): &(&str, &dyn Export)| ExportEntry {
            name: (*name).to_owned(),
            description: export.info().description,
        };
        self.0.iter().map(entry).collect()
    }
}

struct Connection<'a, S> {
    stream: &'a mut S,
    export: &'a dyn Export,
    session: Session,
    data: Vec<u8>,
    out: Vec<u8>,
}

impl<S: Read + Write> Connection<'_, S> {
    /// The next request, its data in `self.data`; `None` when the stream ended before one began.
    fn next(&mut self) -> Result<Option<Incoming>, ServeError> {
        let io = |source| ServeError::Io { during: "reading a request", source };
        let mut header = [0; REQUEST_LEN];
        loop {
            match self.stream.read(&mut header[..1]) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io(e)),
            }
        }
        self.stream.read_exact(&mut header[1..]).map_err(io)?;
        let incoming = self.session.request(&header)?;
        if let Incoming::Request(request) = &incoming
            && request.payload_len() > 0
        {
            self.data.resize(request.payload_len(), 0);
            self.stream.read_exact(&mut self.data).map_err(io)?;
        }
        Ok(Some(incoming))
    }

    fn carry_out(&mut self, request: &Request) -> Result<(), ServeError> {
        let range = request.offset..request.offset + u64::from(request.len);
        let result = match request.command {
            Command::Read { .. } => {
                self.data.resize(request.len as usize, 0);
                let read = self.export.read(request.offset, &mut self.data);
                if read.is_ok() {
                    self.session.push_read(&mut self.out, request, &self.data);
                }
                read
            }
            Command::BlockStatus { .. } => self.export.allocation(range).map(|extents| {
                self.session.push_block_status(&mut self.out, request, &extents);
            }),
            Command::Write { fua } => self.export.write(request.offset, &self.data, fua),
            Command::Flush => self.export.flush(),
            Command::Trim { fua } => self.export.trim(range, fua),
            Command::WriteZeroes { fua, .. } => self.export.zero(range, fua),
            Command::Cache => Ok(()),
        };
        match result {
            Err(e) => self.session.push_error(&mut self.out, request.cookie, e.errno, &e.message),
            Ok(()) if self.out.is_empty() => self.session.push_done(&mut self.out, request.cookie),
            Ok(()) => {}
        }
        self.send()
    }

    fn discard(&mut self, len: u32) -> Result<(), ServeError> {
        let io = |source| ServeError::Io { during: "reading refused data", source };
        let mut refused = Read::take(&mut *self.stream, u64::from(len));
        let dropped = io::copy(&mut refused, &mut io::sink()).map_err(io)?;
        if dropped < u64::from(len) {
            return Err(io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), ServeError> {
        let io = |source| ServeError::Io { during: "sending a reply", source };
        self.stream.write_all(&self.out).map_err(io)?;
        self.stream.flush().map_err(io)?;
        self.out.clear();
        Ok(())
    }
}

/// An export in memory, for tests.
#[derive(Debug)]
pub struct MemoryExport {
    info: ExportInfo,
    bytes: Mutex<Vec<u8>>,
}

impl MemoryExport {
    pub fn new(bytes: Vec<u8>, access: Access) -> Self {
        let size = ByteLen(bytes.len() as u64);
        let info = match access {
            Access::ReadOnly => ExportInfo::read_only(size),
            Access::ReadWrite => ExportInfo::read_write(size),
        };
        Self { info, bytes: Mutex::new(bytes) }
    }
    #[must_use]
    pub fn with_info(mut self, change: impl FnOnce(&mut ExportInfo)) -> Self {
        change(&mut self.info);
        self
    }
    /// What it holds now.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().clone()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range inside an export that is in memory fits the address space.
fn in_memory(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl Export for MemoryExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        buf.copy_from_slice(&self.lock()[in_memory(&(offset..offset + buf.len() as u64))]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8], _fua: bool) -> Result<(), ExportError> {
        self.lock()[in_memory(&(offset..offset + data.len() as u64))].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        self.zero(range, fua)
    }
    fn zero(&self, range: Range<u64>, _fua: bool) -> Result<(), ExportError> {
        self.lock()[in_memory(&range)].fill(0);
        Ok(())
    }
    fn allocation(&self, range: Range<u64>) -> Result<Vec<StatusExtent>, ExportError> {
        let bytes = self.lock();
        let run = |block: &[u8]| StatusExtent {
            len: block.len() as u64,
            allocation: if block.iter().all(|b| *b == 0) { Allocation::Zero } else { Allocation::Data },
        };
        Ok(bytes[in_memory(&range)].chunks(4096).map(run).collect())
    }
}
