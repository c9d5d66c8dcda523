//! Enrolment: from a token to an identity.

use crate::{
    clock,
    link::{Conn, LinkError, Who},
    state::{self, HostIdentity, StateDir},
    tls,
};
use model::HostId;
use std::{
    io::{self, BufRead as _},
    time::{Duration, Instant},
};
use wire::{EnrolToken, Message, ParseTokenError, Purpose};

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("this is no token")]
    Token(#[source] ParseTokenError),
    #[error(
        "the box at {address} is not the one that made the token: its certificate authority has another fingerprint; nothing was \
         sent to it. Check the address, and whether somebody stands between"
    )]
    WrongBox { address: String },
    #[error("could not enrol at {address}")]
    Link {
        address: String,
        #[source]
        source: LinkError,
    },
    #[error("the box at {address} did not take the token: {why}; make a new one on the box with `holdfast host token`")]
    Refused { address: String, why: String },
    #[error("could not make a key")]
    Key(#[source] rcgen::Error),
    #[error("could not set up TLS")]
    Tls(#[source] tls::TlsError),
    #[error("the box sent certificates that do not fit the key it was asked to sign")]
    Useless(#[source] tls::TlsError),
    #[error("the box sent a CA that is not the one in the token")]
    OtherCa,
    #[error("could not keep the identity")]
    State(#[source] state::StateError),
}

/// A token has 59 characters; a file named by mistake must not be read whole.
const TOKEN_LINE_MAX: u64 = 1024;

/// A key of this host and the request to sign it.
pub struct Request {
    pub key_pem: String,
    pub csr_der: Vec<u8>,
}

/// Makes a P-256 key. What the request says beside the key is the box's to decide.
pub fn request(host_name: &str) -> Result<Request, rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, host_name);
    let csr = params.serialize_request(&key)?;
    Ok(Request { key_pem: key.serialize_pem(), csr_der: csr.der().to_vec() })
}

pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(128).collect();
    if name.is_empty() { "unnamed".to_owned() } else { name }
}

/// The token an administrator named: itself, or `-` for the first line of `input`. What stands on a command line is seen by every user of
/// the host for as long as the command runs, and the first to use a token has it.
pub fn token_from(argument: &str, input: impl io::Read) -> io::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut line = String::new();
    io::BufReader::new(input.take(TOKEN_LINE_MAX)).read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

/// Enrols this host and stores its identity. The token is sent only to a box whose CA has the token's fingerprint.
pub fn enrol(state: &StateDir, address: &str, token_text: &str, name: &str) -> Result<HostIdentity, EnrolError> {
    let token: EnrolToken = token_text.parse().map_err(EnrolError::Token)?;
    let request = request(name).map_err(EnrolError::Key)?;
    let link = |source| match source {
        LinkError::Tls(rustls::Error::General(text)) if text == tls::WRONG_CA => {
            EnrolError::WrongBox { address: address.to_owned() }
        }
        LinkError::Refused(refusal) => EnrolError::Refused { address: address.to_owned(), why: refusal.to_string() },
        source => EnrolError::Link { address: address.to_owned(), source },
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    let config = tls::enrol_config(token.ca_fingerprint).map_err(EnrolError::Tls)?;
    let mut conn = Conn::open(address, config, deadline).map_err(link)?;
    let who = Who { host: HostId([0; 16]), boot_id: state::boot_id(), instance: [0; 16] };
    conn.hello(&who, Purpose::Enrol, deadline).map_err(link)?;
    let ask =
        Message::Enrol { token: token_text.trim().to_owned(), csr_der: request.csr_der, host_name: name.to_owned() };
    let (host, certificate, ca) = match conn.ask(&ask, deadline).map_err(link)? {
        Message::Enrolled { host, certificate_pem, ca_pem } => (host, certificate_pem, ca_pem),
        Message::Declined(refusal) => {
            return Err(EnrolError::Refused { address: address.to_owned(), why: refusal.to_string() });
        }
        other => return Err(link(LinkError::Unexpected { got: other.name(), wanted: "Enrolled" })),
    };
    check(&token, &ca)?;
    tls::session_config(ca.as_bytes(), certificate.as_bytes(), request.key_pem.as_bytes())
        .map_err(EnrolError::Useless)?;
    let identity = HostIdentity { host, box_address: address.to_owned(), enrolled_us: clock::wall_us() };
    state.store_identity(&identity, &request.key_pem, &certificate, &ca).map_err(EnrolError::State)?;
    Ok(identity)
}

/// The CA that is kept is the one that was verified.
fn check(token: &EnrolToken, ca_pem: &str) -> Result<(), EnrolError> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(|_| EnrolError::OtherCa)?;
    let print = ring::digest::digest(&ring::digest::SHA256, &ca);
    if print.as_ref().starts_with(&token.ca_fingerprint) { Ok(()) } else { Err(EnrolError::OtherCa) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_from_the_command_line_or_from_the_input() {
        assert_eq!(token_from("ABC.12", io::empty()).unwrap(), "ABC.12");
        assert_eq!(token_from("-", &b" ABC.12 \nmore"[..]).unwrap(), "ABC.12");
        assert_eq!(token_from("-", io::empty()).unwrap(), "", "refused as no token");
        assert_eq!(token_from("-", io::repeat(b'x')).unwrap().len() as u64, TOKEN_LINE_MAX);
    }
}
