//! Acknowledgements: how far the box is, and how much more it takes.

use crate::format::{ACK_LEN, RawAck};
use crate::frame::{FrameHeader, FrameKind, PayloadError, push_ack};
use model::SourceSeq;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

/// How much a source may have sent on this connection **in all** since it opened. Absolute, so that a lost or repeated ack does no
/// harm: the highest limit heard counts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Credit {
    /// Sum of [`FrameHeader::charge`].
    pub bytes: u64,
    pub records: u64,
}

impl Credit {
    /// The higher limit of each kind.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), records: self.records.max(other.records) }
    }
}

/// State of the box that a source should know; unknown bits are refused.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct AckFlags(u32);

impl AckFlags {
    pub const NONE: Self = Self(0);
    /// The journal has no room: nothing more is taken until a later ack comes without this flag.
    pub const JOURNAL_FULL: Self = Self(1);
    const ALL: u32 = 1;

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Cumulative: everything up to and including these numbers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Ack {
    /// In the journal file, perhaps not yet past a power cut.
    pub written: SourceSeq,
    /// Survives a power cut of the box. Never above `written`.
    pub durable: SourceSeq,
    pub credit: Credit,
    pub flags: AckFlags,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    #[error("frame is a {0:?}, not an ack")]
    NotAnAck(FrameKind),
    #[error("ack is damaged")]
    Payload(#[source] PayloadError),
    #[error("ack flags {0:#x} have bits that are not known here")]
    UnknownFlags(u32),
    #[error("reserved ack field is {0:#x} instead of zero")]
    Reserved(u32),
    #[error("ack says that {durable} is durable and only {written} written")]
    DurableBeforeWritten { written: SourceSeq, durable: SourceSeq },
}

impl Ack {
    /// Appends the whole frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawAck {
            written: self.written.0.into(),
            durable: self.durable.0.into(),
            credit_bytes: self.credit.bytes.into(),
            credit_records: self.credit.records.into(),
            flags: self.flags.0.into(),
            reserved: 0.into(),
        };
        let mut payload = [0u8; ACK_LEN];
        payload.copy_from_slice(raw.as_bytes());
        push_ack(&payload, out);
    }

    /// Reads the payload of an ack frame.
    pub fn decode(header: &FrameHeader, payload: &[u8]) -> Result<Self, AckError> {
        if header.kind != FrameKind::Ack {
            return Err(AckError::NotAnAck(header.kind));
        }
        header.check_payload(payload).map_err(AckError::Payload)?;
        let Ok(raw) = RawAck::read_from_bytes(payload) else {
            return Err(AckError::Payload(PayloadError::Length { said: ACK_LEN as u32, had: payload.len() }));
        };
        if raw.flags.get() & !AckFlags::ALL != 0 {
            return Err(AckError::UnknownFlags(raw.flags.get()));
        }
        if raw.reserved.get() != 0 {
            return Err(AckError::Reserved(raw.reserved.get()));
        }
        let (written, durable) = (SourceSeq(raw.written.get()), SourceSeq(raw.durable.get()));
        if durable > written {
            return Err(AckError::DurableBeforeWritten { written, durable });
        }
        Ok(Self {
            written,
            durable,
            credit: Credit { bytes: raw.credit_bytes.get(), records: raw.credit_records.get() },
            flags: AckFlags(raw.flags.get()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HEADER_LEN;
    use crate::frame::{crc32, decode_header};

    fn frame(ack: &Ack) -> (FrameHeader, Vec<u8>) {
        let mut out = Vec::new();
        ack.encode(&mut out);
        let header: &[u8; HEADER_LEN] = out[..HEADER_LEN].try_into().unwrap();
        (decode_header(header).unwrap(), out[HEADER_LEN..].to_vec())
    }

    #[test]
    fn an_ack_reads_back_and_its_bytes_are_fixed() {
        let ack = Ack {
            written: SourceSeq(9),
            durable: SourceSeq(7),
            credit: Credit { bytes: 1 << 20, records: 300 },
            flags: AckFlags::JOURNAL_FULL,
        };
        let (header, payload) = frame(&ack);
        assert_eq!(Ack::decode(&header, &payload), Ok(ack));
        let hex: String = payload.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "0900000000000000070000000000000000001000000000002c010000000000000100000000000000");
    }

    #[test]
    fn an_ack_that_cannot_be_is_refused_by_name() {
        let (header, good) = frame(&Ack { written: SourceSeq(9), durable: SourceSeq(9), ..Ack::default() });
        let refuse = |change: fn(&mut Vec<u8>)| {
            let mut payload = good.clone();
            change(&mut payload);
            let header = FrameHeader { payload_crc: crc32(&payload), ..header };
            Ack::decode(&header, &payload).unwrap_err()
        };
        assert_eq!(
            refuse(|p| p[8] = 10),
            AckError::DurableBeforeWritten { written: SourceSeq(9), durable: SourceSeq(10) }
        );
        assert_eq!(refuse(|p| p[32] = 2), AckError::UnknownFlags(2));
        assert_eq!(refuse(|p| p[36] = 1), AckError::Reserved(1));
        assert!(matches!(refuse(|p| p.truncate(39)), AckError::Payload(PayloadError::Length { .. })));
        let mut damaged = good.clone();
        damaged[0] ^= 1;
        assert!(matches!(Ack::decode(&header, &damaged), Err(AckError::Payload(PayloadError::Checksum { .. }))));
    }
}
