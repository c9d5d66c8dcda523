//! Frame headers: encoding, decoding, and what a header may say.

use crate::format::{
    ACK_LEN, HEADER_LEN, HEADER_VERSION, MAGIC, MAX_MARK, MAX_MESSAGE, MAX_PAYLOAD, MAX_RECORD_BYTES, RawHeader,
};
use crate::message::{Message, MessageError};
use model::{Codec, Extent, Mark, MonoTime, RecordKind, SECTOR, SourceSeq, VolumeId, WriteFlags};
use zerocopy::{FromBytes, IntoBytes};

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrameKind {
    /// A numbered record of the stream: write, zero, discard, flush, or a mark (postcard of [`Mark`]).
    Record(RecordKind),
    /// See [`Ack`](crate::Ack); from the box only.
    Ack,
    /// See [`Message`].
    Message,
}

const ACK: u8 = 0x40;
const MESSAGE: u8 = 0x41;

impl FrameKind {
    const fn to_u8(self) -> u8 {
        match self {
            Self::Record(kind) => kind as u8,
            Self::Ack => ACK,
            Self::Message => MESSAGE,
        }
    }
    const fn from_u8(kind: u8) -> Option<Self> {
        match kind {
            ACK => Some(Self::Ack),
            MESSAGE => Some(Self::Message),
            _ => match RecordKind::from_u8(kind) {
                Some(kind) => Some(Self::Record(kind)),
                None => None,
            },
        }
    }
}

/// A checked header. Acks and messages use only the payload fields; the others are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    pub kind: FrameKind,
    pub codec: Codec,
    pub flags: WriteFlags,
    pub volume: VolumeId,
    /// Empty for flushes and marks.
    pub extent: Extent,
    pub seq: SourceSeq,
    /// The source's monotonic clock at capture.
    pub mono: MonoTime,
    /// The source's wall clock at capture, microseconds since 1970; for showing, never for ordering.
    pub wall_us: u64,
    /// Bytes that follow, as stored.
    pub payload_len: u32,
    /// CRC-32 (IEEE) of those bytes.
    pub payload_crc: u32,
}

/// Bytes that are not a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("not a frame: it begins with {0:02x?}")]
    BadMagic([u8; 3]),
    #[error("frame version {0:#04x} is not known here")]
    BadVersion(u8),
    #[error("frame header checksum is {computed:#010x}, the header says {stored:#010x}")]
    HeaderChecksum { stored: u32, computed: u32 },
    #[error("frame kind {0} is not known here")]
    UnknownKind(u8),
    #[error("payload codec {0} is not known here")]
    UnknownCodec(u8),
    #[error("record flags {0:#06x} have bits that are not known here")]
    UnknownFlags(u16),
    #[error("reserved header field is {0:#x} instead of zero")]
    Reserved(u32),
    #[error("{kind:?} frame of {len} bytes, at most {max} are allowed")]
    TooLong { kind: FrameKind, len: u32, max: u32 },
    #[error("{kind:?} frame of {len} bytes, {expected} are expected")]
    WrongLength { kind: FrameKind, len: u32, expected: u32 },
    #[error("{kind:?} frame over {sectors} sectors, which that kind cannot cover")]
    WrongExtent { kind: FrameKind, sectors: u32 },
    #[error("{kind:?} frame with codec {codec:?}, which that kind cannot have")]
    WrongCodec { kind: FrameKind, codec: Codec },
    #[error("{kind:?} frame numbered {seq}, which that kind cannot be")]
    WrongSeq { kind: FrameKind, seq: SourceSeq },
}

/// A payload that does not match its header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    #[error("payload has {had} bytes, its header says {said}")]
    Length { said: u32, had: usize },
    #[error("payload checksum is {computed:#010x}, its header says {stored:#010x}")]
    Checksum { stored: u32, computed: u32 },
}

/// CRC-32 (IEEE), the one checksum of frames and records.
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

impl FrameHeader {
    /// A header for a frame without number or extent.
    fn plain(kind: FrameKind, payload: &[u8]) -> Self {
        Self {
            kind,
            codec: Codec::Raw,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent: Extent::default(),
            seq: SourceSeq::ZERO,
            mono: MonoTime(0),
            wall_us: 0,
            payload_len: payload.len() as u32,
            payload_crc: crc32(payload),
        }
    }

    /// What the frame costs of the byte credit: header and payload **unpacked**, so that both ends count the same whatever the
    /// sender compressed, and so that a grant bounds what the receiver must hold. Only records are charged.
    pub fn charge(&self) -> u64 {
        charge(self.kind, self.extent, self.payload_len)
    }

    /// Length and checksum of the payload.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), PayloadError> {
        if payload.len() as u64 != u64::from(self.payload_len) {
            return Err(PayloadError::Length { said: self.payload_len, had: payload.len() });
        }
        let computed = crc32(payload);
        if computed != self.payload_crc {
            return Err(PayloadError::Checksum { stored: self.payload_crc, computed });
        }
        Ok(())
    }

    /// What a header may say, beyond being intact; the same for who writes one and who reads one.
    fn check(&self) -> Result<(), FrameError> {
        let kind = self.kind;
        let len = self.payload_len;
        let sectors = u32::try_from(self.extent.sectors.0).unwrap_or(u32::MAX);
        let at_most = |max: usize| {
            if len as usize > max { Err(FrameError::TooLong { kind, len, max: max as u32 }) } else { Ok(()) }
        };
        let exactly = |expected: u64| {
            if u64::from(len) != expected {
                Err(FrameError::WrongLength { kind, len, expected: expected as u32 })
            } else {
                Ok(())
            }
        };
        let extent_if = |allowed: bool| if allowed { Ok(()) } else { Err(FrameError::WrongExtent { kind, sectors }) };
        let raw = || {
            if self.codec == Codec::Raw { Ok(()) } else { Err(FrameError::WrongCodec { kind, codec: self.codec }) }
        };
        let numbered = |wanted: bool| {
            if (self.seq != SourceSeq::ZERO) == wanted {
                Ok(())
            } else {
                Err(FrameError::WrongSeq { kind, seq: self.seq })
            }
        };
        // A sum past the end of the address space is nobody's volume; refusing it here lets later code add without care.
        extent_if(self.extent.lba.0.checked_add(self.extent.sectors.0).is_some())?;
        match kind {
            FrameKind::Record(record) => {
                numbered(true)?;
                match record {
                    RecordKind::Write => {
                        extent_if(sectors > 0 && self.extent.bytes() <= MAX_RECORD_BYTES as u64)?;
                        match self.codec {
                            Codec::Raw => exactly(self.extent.bytes()),
                            // Stored longer than it is: somebody did not look at the result.
                            Codec::Zstd => at_most((self.extent.bytes() as usize - 1).min(MAX_PAYLOAD)),
                        }
                    }
                    RecordKind::Zero | RecordKind::Discard => {
                        extent_if(sectors > 0)?;
                        raw()?;
                        exactly(0)
                    }
                    RecordKind::Flush => {
                        extent_if(self.extent.is_empty())?;
                        raw()?;
                        exactly(0)
                    }
                    RecordKind::Mark => {
                        extent_if(self.extent.is_empty())?;
                        raw()?;
                        at_most(MAX_MARK)
                    }
                }
            }
            FrameKind::Ack => {
                numbered(false)?;
                extent_if(self.extent.is_empty())?;
                raw()?;
                exactly(ACK_LEN as u64)
            }
            FrameKind::Message => {
                numbered(false)?;
                extent_if(self.extent.is_empty())?;
                raw()?;
                at_most(MAX_MESSAGE)
            }
        }
    }
}

/// See [`FrameHeader::charge`]; for who has not built the header yet.
pub fn charge(kind: FrameKind, extent: Extent, payload_len: u32) -> u64 {
    HEADER_LEN as u64
        + match kind {
            FrameKind::Record(RecordKind::Write) => extent.sectors.0 * SECTOR,
            FrameKind::Record(_) => u64::from(payload_len),
            FrameKind::Ack | FrameKind::Message => 0,
        }
}

/// Reads a header and checks everything that can be known from it alone.
pub fn decode_header(bytes: &[u8; HEADER_LEN]) -> Result<FrameHeader, FrameError> {
    // Infallible: the type is unaligned and of this length. Written so that no panic path exists.
    let Ok(raw) = RawHeader::read_from_bytes(bytes) else { return Err(FrameError::BadMagic(*b"???")) };
    if raw.magic != MAGIC {
        return Err(FrameError::BadMagic(raw.magic));
    }
    if raw.version != HEADER_VERSION {
        return Err(FrameError::BadVersion(raw.version));
    }
    let computed = crc32(&bytes[..HEADER_LEN - 4]);
    if computed != raw.header_crc.get() {
        return Err(FrameError::HeaderChecksum { stored: raw.header_crc.get(), computed });
    }
    if raw.reserved.get() != 0 {
        return Err(FrameError::Reserved(raw.reserved.get()));
    }
    let header = FrameHeader {
        kind: FrameKind::from_u8(raw.kind).ok_or(FrameError::UnknownKind(raw.kind))?,
        codec: Codec::from_u8(raw.codec).ok_or(FrameError::UnknownCodec(raw.codec))?,
        flags: WriteFlags::from_bits(raw.flags.get()).ok_or(FrameError::UnknownFlags(raw.flags.get()))?,
        volume: VolumeId(raw.volume.get()),
        extent: Extent::new(raw.lba.get(), u64::from(raw.sectors.get())),
        seq: SourceSeq(raw.seq.get()),
        mono: MonoTime(raw.mono_ns.get()),
        wall_us: raw.wall_us.get(),
        payload_len: raw.payload_len.get(),
        payload_crc: raw.payload_crc.get(),
    };
    header.check()?;
    Ok(header)
}

/// Writes a header; refuses one that a receiver would refuse.
pub fn encode_header(header: &FrameHeader) -> Result<[u8; HEADER_LEN], FrameError> {
    header.check()?;
    let sectors = u32::try_from(header.extent.sectors.0)
        .map_err(|_| FrameError::WrongExtent { kind: header.kind, sectors: u32::MAX })?;
    let raw = RawHeader {
        magic: MAGIC,
        version: HEADER_VERSION,
        kind: header.kind.to_u8(),
        codec: header.codec as u8,
        flags: header.flags.0.into(),
        volume: header.volume.0.into(),
        payload_len: header.payload_len.into(),
        lba: header.extent.lba.0.into(),
        sectors: sectors.into(),
        payload_crc: header.payload_crc.into(),
        seq: header.seq.0.into(),
        mono_ns: header.mono.0.into(),
        wall_us: header.wall_us.into(),
        reserved: 0.into(),
        header_crc: 0.into(),
    };
    let mut bytes = [0u8; HEADER_LEN];
    bytes.copy_from_slice(raw.as_bytes());
    let crc = crc32(&bytes[..HEADER_LEN - 4]);
    bytes[HEADER_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// Appends a whole message frame to `out`.
pub fn encode_message(message: &Message, out: &mut Vec<u8>) -> Result<(), MessageError> {
    let payload = postcard::to_allocvec(message).map_err(MessageError::Encode)?;
    let header = FrameHeader::plain(FrameKind::Message, &payload);
    out.extend_from_slice(&encode_header(&header).map_err(MessageError::Frame)?);
    out.extend_from_slice(&payload);
    Ok(())
}

/// The payload of a mark's record.
pub fn encode_mark(mark: &Mark) -> Result<Vec<u8>, MessageError> {
    let payload = postcard::to_allocvec(mark).map_err(MessageError::Encode)?;
    if payload.len() > MAX_MARK {
        let kind = FrameKind::Record(RecordKind::Mark);
        return Err(MessageError::Frame(FrameError::TooLong { kind, len: payload.len() as u32, max: MAX_MARK as u32 }));
    }
    Ok(payload)
}

/// Appends a whole ack frame to `out`.
pub(crate) fn push_ack(payload: &[u8; ACK_LEN], out: &mut Vec<u8>) {
    let header = FrameHeader::plain(FrameKind::Ack, payload);
    let bytes = encode_header(&header).expect("an ack's header is always valid: fixed kind, length and no extent");
    out.extend_from_slice(&bytes);
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_rng::Rng;

    fn write_header(payload: &[u8]) -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Record(RecordKind::Write),
            codec: Codec::Raw,
            flags: WriteFlags::FUA | WriteFlags::MORE,
            volume: VolumeId(3),
            extent: Extent::new(0x1122_3344_5566, (payload.len() / 512) as u64),
            seq: SourceSeq(77),
            mono: MonoTime(0x0102_0304_0506_0708),
            wall_us: 0x1112_1314_1516_1718,
            payload_len: payload.len() as u32,
            payload_crc: crc32(payload),
        }
    }

    #[test]
    fn golden_bytes_of_a_write() {
        let bytes = encode_header(&write_header(&[0xAB; 1024])).unwrap();
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "48465731",
                "01",
                "00",
                "0500",
                "03000000",
                "00040000",
                "6655443322110000",
                "02000000",
                "4eb95829",
                "4d00000000000000",
                "0807060504030201",
                "1817161514131211",
                "00000000",
                "c8ab86dc"
            )
        );
        assert_eq!(decode_header(&bytes).unwrap(), write_header(&[0xAB; 1024]));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let bytes = encode_header(&write_header(&[1; 512])).unwrap();
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_header(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn random_bytes_never_panic_and_what_decodes_encodes_back() {
        for seed in 1..2000u64 {
            let mut rng = Rng::new(seed);
            let mut bytes = [0u8; HEADER_LEN];
            rng.fill(&mut bytes);
            assert!(decode_header(&bytes).is_err(), "seed {seed}: random bytes passed for a header");
            // The same with a right frame around it, so that the fields are reached.
            bytes[..4].copy_from_slice(b"HFW1");
            bytes[4] = [1, 2, 3, 4, 5, ACK, MESSAGE, 9][rng.below(8) as usize];
            bytes[5] = rng.below(3) as u8;
            bytes[6] = rng.below(32) as u8;
            bytes[7] = 0;
            if rng.below(2) == 0 {
                bytes[12..16].copy_from_slice(&(rng.below(300_000) as u32).to_le_bytes());
                bytes[24..28].copy_from_slice(&(rng.below(300) as u32).to_le_bytes());
            }
            bytes[56..60].fill(0);
            let crc = crc32(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(header) = decode_header(&bytes) {
                assert_eq!(encode_header(&header).unwrap(), bytes, "seed {seed}");
                assert!(header.payload_len as usize <= MAX_PAYLOAD, "seed {seed}");
            }
        }
    }

    #[test]
    fn each_broken_rule_has_its_name() {
        let good = write_header(&[1; 1024]);
        type Break = fn(&mut FrameHeader);
        let cases: [(Break, &str); 8] = [
            (|h| h.payload_len = 5, "Record(Write) frame of 5 bytes, 1024 are expected"),
            (|h| h.extent = Extent::new(0, 257), "Record(Write) frame over 257 sectors, which that kind cannot cover"),
            (|h| h.extent = Extent::new(0, 0), "Record(Write) frame over 0 sectors, which that kind cannot cover"),
            (
                |h| h.extent = Extent::new(u64::MAX, 2),
                "Record(Write) frame over 2 sectors, which that kind cannot cover",
            ),
            (|h| h.seq = SourceSeq(0), "Record(Write) frame numbered 0, which that kind cannot be"),
            (|h| h.kind = FrameKind::Message, "Message frame numbered 77, which that kind cannot be"),
            (
                |h| h.kind = FrameKind::Record(RecordKind::Mark),
                "Record(Mark) frame over 2 sectors, which that kind cannot cover",
            ),
            (|h| h.codec = Codec::Zstd, "Record(Write) frame of 1024 bytes, at most 1023 are allowed"),
        ];
        for (change, text) in cases {
            let mut header = good;
            change(&mut header);
            assert_eq!(encode_header(&header).unwrap_err().to_string(), text);
        }
        let mut bytes = encode_header(&good).unwrap();
        bytes[3] = b'2';
        assert_eq!(decode_header(&bytes), Err(FrameError::BadVersion(b'2')));
        bytes[0] = b'G';
        assert_eq!(decode_header(&bytes), Err(FrameError::BadMagic(*b"GFW")));
    }

    #[test]
    fn a_payload_is_checked_against_its_header() {
        let header = write_header(&[7; 512]);
        assert_eq!(header.check_payload(&[7; 512]), Ok(()));
        assert_eq!(header.check_payload(&[7; 511]), Err(PayloadError::Length { said: 512, had: 511 }));
        assert!(matches!(header.check_payload(&[8; 512]), Err(PayloadError::Checksum { .. })));
        assert_eq!(header.charge(), 64 + 512);
    }
}
