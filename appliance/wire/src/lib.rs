//! What an agent and the box say to each other: bytes only. TLS, TCP and time belong to the caller.
//!
//! # Connections
//!
//! An agent holds one **control connection** (status, commands, changes of what is protected) and one **stream connection**
//! for each protection group. All are TLS 1.3 on the box's one port and are told apart by ALPN ([`ALPN_REPLICATION`], client
//! certificate demanded; [`ALPN_ENROL`], none) and by the [`Purpose`] of the [`Message::Hello`] that opens every connection.
//!
//! ```text
//! enrol     agent: Hello{Enrol} Enrol{token, csr}          box: HelloAck Enrolled{certificate} | Refuse
//! control   agent: Hello{Control} Protect… AgentStatus…    box: HelloAck Protected… Command…
//!           agent: Lease… LeaseReleased Probe… (version 3) box: LeaseAnswer… LeaseRevoke HostPlan HostOrder…
//! stream    agent: Hello{Stream} OpenStream records marks  box: HelloAck StreamReady Ack…
//! restore   agent: Hello{Restore} RestoreDisks…          box: HelloAck RestoreOpen… records (version 5)
//! both ways, any time after HelloAck: Heartbeat / HeartbeatAck; Refuse ends a connection and says why
//! ```
//!
//! Beside them an agent with a plan sends [`Beat`]s, 64 bytes each in a datagram of its own: a channel that shares nothing with the others but
//! the wire.
//!
//! # Frame
//!
//! A header of [`HEADER_LEN`] bytes ([`FrameHeader`], layout in `format.rs`) with its own checksum, then `payload_len` bytes
//! covered by a checksum in the header. Records and marks of a stream are numbered by [`model::SourceSeq`] without a hole; control
//! frames carry no number. A payload of a write travels as it is stored in the journal: [`pack`](Packer::pack) compresses where it pays and
//! nobody on the way has to unpack it.
//!
//! # Limits
//!
//! A write's payload is at most [`MAX_PAYLOAD`] stored and [`MAX_RECORD_BYTES`] unpacked, a message at most [`MAX_MESSAGE`], a
//! mark at most [`MAX_MARK`]: whoever reads a header knows the most it will have to hold before it reads on. Anything else is a
//! named [`FrameError`]; no input can panic.
//!
//! # Versions
//!
//! The fourth byte of a header is the version of the header; it has been `1` so far. [`Message`] is encoded with postcard:
//! variants are appended, never reordered, and a variant's fields never change; `Hello` lists the versions an agent speaks and
//! `HelloAck` picks one ([`PROTOCOL_VERSIONS`]). Golden bytes in the tests keep old encodings readable.
//!
//! # Power loss
//!
//! Nothing here is stored. A connection that ends in the middle of a frame ends between two numbered records for the one who
//! reads: the half frame is dropped, and the sender begins again where `StreamReady` says.
//!
//! # Tests
//!
//! Round trips and golden bytes of every header and message; every single-bit flip of a header is refused; random bytes never
//! panic; packing is undone bit for bit.

mod ack;
mod beat;
mod compare;
mod format;
mod frame;
mod message;
mod ownership;
mod pack;
mod restore;
#[cfg(test)]
mod test_rng;
mod token;

pub use ack::{Ack, AckError, AckFlags, Credit};
pub use beat::{BEAT_LEN, Beat, BeatError, BeatFilter, BeatFrom};
pub use compare::{
    BlockHash, COMPARE_BLOCK_SECTORS, COMPARE_RUNS_MAX, COMPARE_SECTORS_MAX, Comparison, ComparisonError, blocks,
    differs,
};
pub use format::{
    ALPN_ENROL, ALPN_REPLICATION, BOX_TLS_NAME, HEADER_LEN, HOST_URI_PREFIX, MAX_MARK, MAX_MESSAGE, MAX_PAYLOAD,
    MAX_RECORD_BYTES, PROTOCOL_VERSIONS, READ_BACK_MAX, VERSION_COMPARE, VERSION_NOTICES, VERSION_OWNERSHIP,
    VERSION_PROBES, VERSION_RESTORE,
};
pub use frame::{
    FrameError, FrameHeader, FrameKind, PayloadError, charge, crc32, decode_header, encode_header, encode_mark,
    encode_message,
};
pub use message::{
    AgentStatus, Command, CommandResult, GroupAgentState, GroupAgentStatus, Message, MessageError, Notice, Purpose,
    Refusal, RefuseCode, Resume, decode_mark, decode_message, negotiate,
};
pub use ownership::{
    Holding, HostOrder, HostPlan, LeaseAnswer, LeaseEnd, LeaseRequest, LeaseRules, LeaseVerdict, PLAN_ITEMS_MAX,
    PLAN_TEXT_MAX, PROBE_OUTPUT_MAX, PlanAddress, PlanBeat, PlanError, PlanProbe, PlanService, ProbeEnd, ProbeKind,
    ProbeResult,
};
pub use pack::{Packer, UnpackError, Unpacker, claimed_len};
pub use restore::{Look, RestoreDisk, RestoreId, RestoreProgress, TARGET_DISKS_MAX, TARGET_TEXT_MAX, TargetDisk};
pub use token::{EnrolToken, ParseTokenError};
