//! Identities. All are opaque to everyone but their maker; the bytes come from the caller, never from here.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

/// A text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an id: 32 hexadecimal digits are expected")]
pub struct ParseIdError {
    text: String,
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
            pub const fn bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let bad = || ParseIdError { text: text.chars().take(64).collect() };
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut id = [0u8; 16];
                for (i, byte) in id.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).map_err(|_| bad())?;
                }
                Ok(Self(id))
            }
        }
        // Text where a person reads it (JSON, TOML), bytes where only machines do (postcard).
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 16]>::deserialize(d).map(Self)
                }
            }
        }
    };
}

id128!(/// A protected host; given by the box at enrolment and written into the host's certificate.
    HostId);
id128!(/// A protection group: volumes that are recovered together. One journal each.
    GroupId);
id128!(/// One uninterrupted run of capture on a source. Within it, [`SourceSeq`](crate::SourceSeq) counts without a hole;
    /// a source that cannot continue its numbering starts a new stream and a resync.
    StreamId);

/// A volume inside its protection group: a small number, stable for the life of the group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub u32);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_was_written() {
        let id = GroupId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<GroupId>().unwrap(), id);
        assert_eq!(serde_json::from_str::<GroupId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
    }

    #[test]
    fn a_text_that_is_no_id_is_refused() {
        for text in [
            "",
            "12",
            "zz112233445566778899aabbccddeeff",
            "00112233445566778899aabbccddeeff0",
            "ü0112233445566778899aabbccddeef",
        ] {
            assert!(text.parse::<HostId>().is_err(), "{text}");
        }
    }
}
