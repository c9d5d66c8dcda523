//! Constants and the layout of a frame header.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// ALPN of connections that carry a client certificate.
pub const ALPN_REPLICATION: &[u8] = b"holdfast/1";
/// ALPN of the enrolment handshake, the one thing the box answers without a client certificate.
pub const ALPN_ENROL: &[u8] = b"holdfast-enrol/1";
/// The name in the box's certificate that agents verify, whatever address they dialled.
pub const BOX_TLS_NAME: &str = "holdfast-box";
/// A host's certificate says who it is in a URI name that begins so, followed by the host id.
pub const HOST_URI_PREFIX: &str = "holdfast:host:";

/// Versions of the message set this build speaks, best first.
pub const PROTOCOL_VERSIONS: &[u16] = &[6, 5, 4, 3, 2, 1];
/// The first version that has [`Message::Compare`](crate::Message::Compare).
pub const VERSION_COMPARE: u16 = 2;
/// The first version that has leases, plans and probes.
pub const VERSION_OWNERSHIP: u16 = 3;
/// The first version that has [`Message::Notices`](crate::Message::Notices).
pub const VERSION_NOTICES: u16 = 4;
/// The first version that has restores.
pub const VERSION_RESTORE: u16 = 5;
/// The first version that has [`ProbeKind::Https`](crate::ProbeKind::Https), and whose agents make probes at all.
pub const VERSION_PROBES: u16 = 6;

pub const HEADER_LEN: usize = 64;
/// The most payload a write may carry as stored: one journal record.
pub const MAX_PAYLOAD: usize = 128 * 1024;
/// The most a write may cover, unpacked: larger host requests come split, flagged `MORE`.
pub const MAX_RECORD_BYTES: usize = 128 * 1024;
/// A message is small talk; 64 KiB hold a group of some hundred volumes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most of a volume that is read back in one message: with what is around it, it must fit one.
pub const READ_BACK_MAX: usize = 32 * 1024;
/// The longest mark is a bookmark: 128 characters of at most 4 bytes, and its tags.
pub const MAX_MARK: usize = 1024;
/// An [`Ack`](crate::Ack) is always this long.
pub(crate) const ACK_LEN: usize = 40;

pub(crate) const MAGIC: [u8; 3] = *b"HFW";
pub(crate) const HEADER_VERSION: u8 = b'1';

/// ```text
///  0  magic "HFW"   3  version '1'
///  4  kind u8       5  codec u8       6  flags u16
///  8  volume u32   12  payload_len u32
/// 16  lba u64      24  sectors u32   28  payload_crc u32
/// 32  seq u64      40  mono_ns u64   48  wall_us u64
/// 56  reserved u32 (zero)            60  header_crc u32 (CRC-32 of bytes 0..60)
/// ```
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 3],
    pub version: u8,
    pub kind: u8,
    pub codec: u8,
    pub flags: U16,
    pub volume: U32,
    pub payload_len: U32,
    pub lba: U64,
    pub sectors: U32,
    pub payload_crc: U32,
    pub seq: U64,
    pub mono_ns: U64,
    pub wall_us: U64,
    pub reserved: U32,
    pub header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// ```text
///  0 written u64   8 durable u64   16 credit bytes u64   24 credit records u64   32 flags u32   36 reserved u32 (zero)
/// ```
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawAck {
    pub written: U64,
    pub durable: U64,
    pub credit_bytes: U64,
    pub credit_records: U64,
    pub flags: U32,
    pub reserved: U32,
}

const _: () = assert!(size_of::<RawAck>() == ACK_LEN);
