//! The token that lets a host enrol once.
//!
//! Text: `<BASE32 of a 128-bit secret>.<first 32 hexadecimal digits of SHA-256 of the CA certificate's DER>`. The secret proves
//! to the box that its operator asked for this host; the fingerprint lets the agent know the box before it says the secret.

use std::{fmt, str::FromStr};

/// A token, taken apart. Its `Debug` form does not show the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct EnrolToken {
    pub secret: [u8; 16],
    /// The first 16 bytes of the SHA-256 of the CA certificate (DER).
    pub ca_fingerprint: [u8; 16],
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTokenError {
    #[error("a token has two parts with a dot between them; was it copied whole?")]
    Parts,
    #[error("the part before the dot is not 26 characters of base 32; was it copied whole?")]
    Secret,
    #[error("the part after the dot is not 32 hexadecimal digits; was it copied whole?")]
    Fingerprint,
}

impl FromStr for EnrolToken {
    type Err = ParseTokenError;
    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        let (secret, print) = text.trim().split_once('.').ok_or(ParseTokenError::Parts)?;
        let bytes = |decoded: Option<Vec<u8>>| decoded.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        let secret = data_encoding::BASE32_NOPAD.decode(secret.to_ascii_uppercase().as_bytes()).ok();
        let print = data_encoding::HEXLOWER_PERMISSIVE.decode(print.as_bytes()).ok();
        Ok(Self {
            secret: bytes(secret).ok_or(ParseTokenError::Secret)?,
            ca_fingerprint: bytes(print).ok_or(ParseTokenError::Fingerprint)?,
        })
    }
}

impl fmt::Display for EnrolToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret = data_encoding::BASE32_NOPAD.encode(&self.secret);
        write!(f, "{secret}.{}", data_encoding::HEXLOWER.encode(&self.ca_fingerprint))
    }
}

impl fmt::Debug for EnrolToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnrolToken(hidden.{})", data_encoding::HEXLOWER.encode(&self.ca_fingerprint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_whatever_its_case() {
        let token = EnrolToken { secret: *b"0123456789abcdef", ca_fingerprint: [0xAB; 16] };
        let text = token.to_string();
        assert_eq!(text, "GAYTEMZUGU3DOOBZMFRGGZDFMY.abababababababababababababababab");
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {} \n", text.to_lowercase()).parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("GAYT"), "a secret must not reach a log");
    }

    #[test]
    fn a_text_that_is_no_token_is_refused_by_part() {
        let parse = |text: &str| text.parse::<EnrolToken>().unwrap_err();
        assert_eq!(parse("GAYTEMZUGU3DOOBZMFRGGZDFMY"), ParseTokenError::Parts);
        assert_eq!(parse("GAYTEMZ.abababababababababababababababab"), ParseTokenError::Secret);
        assert_eq!(parse("GAYTEMZUGU3DOOBZMFRGGZDFMY.ab"), ParseTokenError::Fingerprint);
        assert_eq!(parse("日本.語"), ParseTokenError::Secret);
    }
}
