//! NBD, the network block device protocol: bytes only, sockets stay with the caller.
//!
//! Through this crate the box takes writes in (ingest targets) and gives views out. It holds both ends:
//!
//! - [`ServerHandshake`]: the fixed-newstyle negotiation as a machine without I/O. The caller reads what it asks for,
//!   writes what it hands out, and wraps the stream in TLS when told to.
//! - [`Session`]: what was negotiated. It judges each 28-byte request header ([`Session::request`]) and encodes replies.
//! - [`client::Client`]: a blocking client over anything that is `Read + Write`, with several requests in flight.
//! - [`blocking::serve`]: a small one-thread server over `Read + Write`, for tests and tools.
//!
//! What is spoken: EXPORT_NAME, GO, INFO, LIST, ABORT, STARTTLS, STRUCTURED_REPLY, LIST_META_CONTEXT and
//! SET_META_CONTEXT (`base:allocation`); READ (DF), WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES (NO_HOLE, FAST_ZERO),
//! BLOCK_STATUS (REQ_ONE), all with FUA; simple and structured replies. Not spoken: extended headers, RESIZE, oldstyle.
//!
//! A driver is a loop of this shape (here without TLS and errors):
//!
//! ```text
//! let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::None });
//! let session = loop {
//!     match handshake.step(&exports)? {
//!         Step::Write(bytes) => stream.write_all(&bytes)?,
//!         Step::Read(len) => { buf.resize(len, 0); stream.read_exact(&mut buf)?; handshake.feed(&buf) }
//!         Step::StartTls => { stream = accept_tls(stream)?; handshake.tls_started() }
//!         Step::Ready(session) => break session,
//!         Step::Close => return Ok(()),
//!     }
//! };
//! loop {
//!     stream.read_exact(&mut header)?;                       // REQUEST_LEN bytes
//!     match session.request(&header)? {
//!         Incoming::Request(r) => ..,                         // r.payload_len() bytes follow; answer with session.push_*
//!         Incoming::Refused { refusal, discard } => ..,       // drop `discard` bytes; session.push_refusal(&mut out, &refusal)
//!         Incoming::Disconnect => return Ok(()),
//!     }
//! }
//! ```
//!
//! Invariants. The handshake asks for exactly the bytes it needs and never for more, so that nothing of the next
//! protocol layer (TLS, requests) is ever swallowed, and plain text sent behind a STARTTLS cannot be taken for something
//! said under TLS. A request that reaches the caller lies inside the export, is aligned, is not longer than
//! [`BlockSizes::max_payload`] where it carries data, and is allowed on this export.
//!
//! Limits. An option holds at most [`MAX_OPTION_BYTES`] (longer ones are dropped unread and refused), a handshake at most
//! [`MAX_OPTIONS`] options, a reply of BLOCK_STATUS at most [`MAX_STATUS_EXTENTS`] extents. How long a peer may take is the
//! caller's to limit: there is no clock here.
//!
//! Tests: golden bytes of handshakes and replies (`tests/golden.rs`), random and mutated sessions (`tests/hostile.rs`),
//! client against server over narrow pipes with a slow oracle (`tests/pair.rs`), and other people's clients and servers
//! (`tests/peers.rs`: nbdinfo, nbdcopy, nbdkit, qemu-img where installed).

pub mod blocking;
pub mod client;
mod export;
mod format;
mod handshake;
mod reply;
mod request;

pub use export::{Access, Allocation, BlockSizes, ExportEntry, ExportFlags, ExportInfo, Exports, StatusExtent};
pub use format::{Errno, MAX_NAME_BYTES, MAX_OPTION_BYTES, MAX_OPTIONS, MAX_STATUS_EXTENTS, REQUEST_LEN};
pub use handshake::{HandshakeConfig, HandshakeError, ServerHandshake, Step, TlsPolicy};
pub use reply::ReadHead;
pub use request::{Command, Incoming, ProtocolError, Refusal, RefusalReason, ReplyMode, Request, Session};
