//! The box's own certificate authority and the TLS configurations made from it.
//!
//! ```text
//! ca/ca.key    the authority's key, PKCS#8, written first     ca/ca.pem    its certificate, written second
//! ca/node.key  the box's server key                           ca/node.pem  its certificate
//! ca/web.key   that of its pages                              ca/web.pem   its certificate
//! ```
//! All ECDSA P-256, mode 0600 in a folder of mode 0700.
//!
//! **Who is who** is said by one URI in the subject alternative names, because only we sign: `holdfast:host:<id>` is an agent,
//! `holdfast:nbd:<name>` an NBD client. Neither is accepted in the other's place. A certificate is made with our own
//! parameters; of a signing request only the public key is used, after its signature proved possession.
//!
//! **Invariants.** The authority is made once. A certificate without its key is an error, never a reason to make a new one: every
//! enrolled host pins the old one. A key without a certificate is what a crash during the very first start leaves, nothing was
//! ever signed with it, and it is replaced. The node certificate can always be made again.
//!
//! **Revocation** is not done by CRL: the catalogue knows every host and the serials of its certificates, and is asked at every
//! accept (see [`crate::links`]).
//!
//! TLS is 1.3 only, through `ring`. Agents say by ALPN what they want: [`ALPN_REPLICATION`] demands a client certificate,
//! [`ALPN_ENROL`] takes none and can do nothing but enrol.

use crate::files::{self, FileError};
use data_encoding::HEXLOWER;
use model::HostId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber,
};
use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    sign::CertifiedKey,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use time::{Duration, OffsetDateTime};
use wire::{ALPN_ENROL, ALPN_REPLICATION, BOX_TLS_NAME, HOST_URI_PREFIX};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const HOST_DAYS: i64 = 90;
const CLIENT_DAYS: i64 = 825;
const NODE_DAYS: i64 = 5 * 365;
/// A node certificate with less left is made anew at start.
const NODE_DAYS_LEFT: i64 = 365;
/// Browsers refuse what is valid for longer.
const WEB_DAYS: i64 = 397;
const WEB_DAYS_LEFT: i64 = 60;
const NBD_URI: &str = "holdfast:nbd:";

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the certificate {} is there but its key {} is not: put the key back from a backup; a new authority would lock every host out", cert.display(), key.display())]
    KeyLost { cert: PathBuf, key: PathBuf },
    #[error("{} hosts are enrolled but the authority in {} is gone: put the folder back from a backup; a new authority would lock every host out", hosts, dir.display())]
    AuthorityLost { dir: PathBuf, hosts: usize },
    #[error("{} does not belong to {}", cert.display(), key.display())]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf, source: rcgen::Error },
    #[error("{} holds no certificate", path.display())]
    NoCertificate { path: PathBuf },
    #[error("could not make a certificate")]
    Make(#[source] rcgen::Error),
    #[error("the system gave no random bytes")]
    Random,
    #[error("could not set up TLS")]
    Tls(#[source] rustls::Error),
    #[error("could not set up the check of client certificates")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// Why a certificate request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the certificate request cannot be read or is not signed with its own key")]
    Request(#[source] rcgen::Error),
    #[error("the certificate request is for a {got} key; ECDSA P-256 is expected")]
    KeyKind { got: String },
    #[error("could not make the certificate")]
    Make(#[source] rcgen::Error),
    #[error("the system gave no random bytes")]
    Random,
}

/// What a verified client certificate says its holder is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    Host { id: HostId, serial: String },
    NbdClient { name: String, serial: String },
}

/// A certificate made for a host.
#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate_pem: String,
    pub serial: String,
}

/// What an NBD client over TLS needs (the layout of QEMU's `tls-creds-x509`).
#[derive(Clone, Debug, serde::Serialize)]
pub struct ClientBundle {
    pub certificate_pem: String,
    pub key_pem: String,
    pub ca_pem: String,
}

/// The authority, loaded.
pub struct Pki {
    ca_pem: String,
    ca_der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    provider: Arc<CryptoProvider>,
    node_chain: Vec<CertificateDer<'static>>,
    node_key_der: Vec<u8>,
}

impl Pki {
    /// Loads the authority in `dir`, or makes it when there never was one. `hosts_enrolled` guards against making a second.
    pub fn open(dir: &Path, names: &[String], hosts_enrolled: usize, now_us: u64) -> Result<Self, PkiError> {
        files::private_dir(dir)?;
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let (cert, key) = (files::read_small(&cert_path)?, files::read_small(&key_path)?);
        let (ca_pem, key) = match (cert, key) {
            (Some(cert), Some(key)) => {
                let key = KeyPair::from_pem(&String::from_utf8_lossy(&key))
                    .map_err(|source| PkiError::Damaged { path: key_path.clone(), source })?;
                (String::from_utf8_lossy(&cert).into_owned(), key)
            }
            (Some(_), None) => return Err(PkiError::KeyLost { cert: cert_path, key: key_path }),
            (None, _) if hosts_enrolled > 0 => {
                return Err(PkiError::AuthorityLost { dir: dir.to_owned(), hosts: hosts_enrolled });
            }
            (None, _) => {
                // Key first: a certificate on disk then always has its key.
                let key = KeyPair::generate().map_err(PkiError::Make)?;
                files::write_secret(&key_path, key.serialize_pem().as_bytes())?;
                let cert = authority_params()?.self_signed(&key).map_err(PkiError::Make)?;
                files::write_secret(&cert_path, cert.pem().as_bytes())?;
                (cert.pem(), key)
            }
        };
        let ca_der = first_certificate(&cert_path, ca_pem.as_bytes())?;
        if !same_key(&ca_der, &key) {
            return Err(PkiError::Mismatch { cert: cert_path, key: key_path });
        }
        let issuer = Issuer::from_ca_cert_der(&ca_der, key)
            .map_err(|source| PkiError::Damaged { path: cert_path.clone(), source })?;
        let (node_chain, node_key_der) = node(dir, names, &issuer, &ca_der, now_us)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(Self { ca_pem, ca_der, issuer, provider, node_chain, node_key_der })
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// SHA-256 of the authority's certificate, 64 hexadecimal digits.
    pub fn ca_fingerprint(&self) -> String {
        HEXLOWER.encode(digest::digest(&digest::SHA256, &self.ca_der).as_ref())
    }

    /// Signs the key of `csr_der` for `host`; whatever else the request wishes for is not looked at.
    pub fn sign_host(&self, csr_der: &[u8], host: HostId, now_us: u64) -> Result<Issued, SignError> {
        let csr = CertificateSigningRequestDer::from(csr_der);
        let mut request = CertificateSigningRequestParams::from_der(&csr).map_err(SignError::Request)?;
        if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(SignError::KeyKind { got: format!("{:?}", request.public_key.algorithm()) });
        }
        let uri = format!("{HOST_URI_PREFIX}{host}");
        let (params, serial) = client_params(&host.to_string(), &uri, HOST_DAYS, now_us)?;
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(SignError::Make)?;
        Ok(Issued { certificate_pem: certificate.pem(), serial })
    }

    /// Makes a key and certificate for an NBD client called `name` (checked by the caller: letters, digits, `-_.`).
    pub fn make_client(&self, name: &str, now_us: u64) -> Result<(ClientBundle, String), SignError> {
        let key = KeyPair::generate().map_err(SignError::Make)?;
        let (params, serial) = client_params(name, &format!("{NBD_URI}{name}"), CLIENT_DAYS, now_us)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(SignError::Make)?;
        let bundle = ClientBundle {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            ca_pem: self.ca_pem.clone(),
        };
        Ok((bundle, serial))
    }

    /// For [`ALPN_REPLICATION`] connections: a client certificate of ours is demanded.
    pub fn session_config(&self) -> Result<Arc<ServerConfig>, PkiError> {
        self.server_config(true, &[ALPN_REPLICATION])
    }
    /// For [`ALPN_ENROL`] connections: nobody is known yet.
    pub fn enrol_config(&self) -> Result<Arc<ServerConfig>, PkiError> {
        self.server_config(false, &[ALPN_ENROL])
    }
    /// For NBD after STARTTLS: a client certificate of ours is demanded.
    pub fn nbd_config(&self) -> Result<Arc<ServerConfig>, PkiError> {
        self.server_config(true, &[])
    }

    /// What browsers see: kept in `web.key` and `web.pem` of `dir` while it has `names` and enough time left, else made anew. Blocking.
    pub fn web_certificate(&self, dir: &Path, names: &[String], now_us: u64) -> Result<Arc<CertifiedKey>, PkiError> {
        let (cert_path, key_path) = (dir.join("web.pem"), dir.join("web.key"));
        let certified = |cert: CertificateDer<'static>, key: &KeyPair| {
            let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            let key = rustls::crypto::ring::sign::any_supported_type(&der).map_err(PkiError::Tls)?;
            Ok(Arc::new(CertifiedKey::new(vec![cert, self.ca_der.clone()], key)))
        };
        if let (Some(cert), Some(key)) = (files::read_small(&cert_path)?, files::read_small(&key_path)?)
            && let Ok(cert) = CertificateDer::from_pem_slice(&cert)
            && let Ok(key) = KeyPair::from_pem(&String::from_utf8_lossy(&key))
            && same_key(&cert, &key)
            && still_good(&cert, names, &self.ca_der, WEB_DAYS_LEFT, now_us)
        {
            return certified(cert, &key);
        }
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = server_params(names.to_vec())?;
        params.not_before = from_us(now_us) - Duration::days(1);
        params.not_after = from_us(now_us) + Duration::days(WEB_DAYS);
        let cert = params.signed_by(&key, &self.issuer).map_err(PkiError::Make)?;
        files::write_secret(&key_path, key.serialize_pem().as_bytes())?;
        files::write_secret(&cert_path, cert.pem().as_bytes())?;
        certified(cert.der().clone(), &key)
    }

    fn server_config(&self, client_certificate: bool, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, PkiError> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?;
        let builder = if client_certificate {
            let mut roots = RootCertStore::empty();
            roots.add(self.ca_der.clone()).map_err(PkiError::Tls)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(PkiError::Verifier)?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.node_key_der.clone()));
        let mut config = builder.with_single_cert(self.node_chain.clone(), key).map_err(PkiError::Tls)?;
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        // Resumption would let a session begin without the certificate being shown again; revocation is checked on it.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// Reads who the holder of a verified certificate is. None: signed by us, but for neither purpose.
pub fn peer_of(certificate: &[u8]) -> Option<Peer> {
    let (_, x509) = X509Certificate::from_der(certificate).ok()?;
    let serial = HEXLOWER.encode(x509.raw_serial());
    let names = x509.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next()?;
    if uris.next().is_some() {
        return None; // we never sign two
    }
    if let Some(id) = uri.strip_prefix(HOST_URI_PREFIX) {
        return id.parse().ok().map(|id| Peer::Host { id, serial });
    }
    uri.strip_prefix(NBD_URI).map(|name| Peer::NbdClient { name: name.to_owned(), serial })
}

/// 128 random bits, for ids, serials and tokens. None only if the system has no random source.
pub fn random_128() -> Option<[u8; 16]> {
    let mut bytes = [0u8; 16];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}

/// SHA-256 as 64 hexadecimal digits.
pub fn sha256_hex(data: &[u8]) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, data).as_ref())
}

fn authority_params() -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    // A name of its own, so that two boxes' authorities on one host are told apart.
    let tag = HEXLOWER.encode(&random_128().ok_or(PkiError::Random)?[..4]);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Holdfast authority {tag}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&random_128().ok_or(PkiError::Random)?));
    // Fixed dates: the clock of a box at its first start may be anything, and an authority that is "not yet valid" on a host
    // whose clock is a day behind is of no use.
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2064, 1, 1);
    Ok(params)
}

fn client_params(
    common_name: &str,
    uri: &str,
    days: i64,
    now_us: u64,
) -> Result<(CertificateParams, String), SignError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(SignError::Make)?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let mut serial = random_128().ok_or(SignError::Random)?;
    serial[0] = serial[0] & 0x3f | 0x40; // positive and of full length, so that it reads back as it was written
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let now = from_us(now_us);
    params.not_before = now - Duration::days(1);
    params.not_after = now + Duration::days(days);
    Ok((params, HEXLOWER.encode(&serial)))
}

/// The node's key and chain, kept if they are good for another year, else made anew.
fn node(
    dir: &Path,
    names: &[String],
    issuer: &Issuer<'static, KeyPair>,
    ca: &CertificateDer<'static>,
    now_us: u64,
) -> Result<(Vec<CertificateDer<'static>>, Vec<u8>), PkiError> {
    let (cert_path, key_path) = (dir.join("node.pem"), dir.join("node.key"));
    let mut wanted: Vec<String> = vec![BOX_TLS_NAME.into(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
    wanted.extend(names.iter().filter(|n| !wanted.contains(n)).cloned().collect::<Vec<_>>());
    if let (Some(cert), Some(key)) = (files::read_small(&cert_path)?, files::read_small(&key_path)?)
        && let Ok(cert) = CertificateDer::from_pem_slice(&cert)
        && let Ok(key) = KeyPair::from_pem(&String::from_utf8_lossy(&key))
        && same_key(&cert, &key)
        && still_good(&cert, &wanted, ca, NODE_DAYS_LEFT, now_us)
    {
        return Ok((vec![cert, ca.clone()], key.serialize_der()));
    }
    let key = KeyPair::generate().map_err(PkiError::Make)?;
    let mut params = server_params(wanted)?;
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = from_us(now_us).max(rcgen::date_time_ymd(2026, 1, 1)) + Duration::days(NODE_DAYS);
    let cert = params.signed_by(&key, issuer).map_err(PkiError::Make)?;
    files::write_secret(&key_path, key.serialize_pem().as_bytes())?;
    files::write_secret(&cert_path, cert.pem().as_bytes())?;
    Ok((vec![cert.der().clone(), ca.clone()], key.serialize_der()))
}

/// Of a server that has these names; its dates are the caller's.
fn server_params(names: Vec<String>) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(names).map_err(PkiError::Make)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, BOX_TLS_NAME);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&random_128().ok_or(PkiError::Random)?));
    Ok(params)
}

fn still_good(
    cert: &CertificateDer<'_>,
    wanted: &[String],
    ca: &CertificateDer<'_>,
    days_left: i64,
    now_us: u64,
) -> bool {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else { return false };
    let Ok((_, ca)) = X509Certificate::from_der(ca) else { return false };
    let left = cert.validity().not_after.timestamp() - from_us(now_us).unix_timestamp();
    let Ok(Some(names)) = cert.subject_alternative_name() else { return false };
    let has = |name: &String| {
        names.value.general_names.iter().any(|g| match (g, name.parse::<std::net::IpAddr>()) {
            (GeneralName::DNSName(dns), Err(_)) => dns == name,
            (GeneralName::IPAddress(bytes), Ok(std::net::IpAddr::V4(ip))) => *bytes == ip.octets(),
            (GeneralName::IPAddress(bytes), Ok(std::net::IpAddr::V6(ip))) => *bytes == ip.octets(),
            _ => false,
        })
    };
    let exact = names.value.general_names.len() == wanted.len() && wanted.iter().all(has);
    exact && left > days_left * 86_400 && cert.verify_signature(Some(ca.public_key())).is_ok()
}

fn first_certificate(path: &Path, pem: &[u8]) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem).map_err(|_| PkiError::NoCertificate { path: path.to_owned() })
}

fn same_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, c)| c.public_key().raw == key.subject_public_key_info())
}

fn from_us(us: u64) -> OffsetDateTime {
    // Past year 9999 there is no date; such a clock is broken and the epoch says so as well as anything.
    i64::try_from(us / 1_000_000)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    const NOW: u64 = 1_790_000_000_000_000;

    fn csr() -> (KeyPair, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap().serialize_request(&key).unwrap();
        (key, csr.der().to_vec())
    }

    #[test]
    fn the_authority_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let first = Pki::open(&ca, &[], 0, NOW).unwrap();
        let again = Pki::open(&ca, &[], 3, NOW).unwrap();
        assert_eq!(first.ca_pem(), again.ca_pem());
        assert_eq!(first.node_chain, again.node_chain, "the node's certificate was made anew without need");
        assert_eq!(first.ca_fingerprint().len(), 64);
        for name in ["ca.pem", "ca.key", "node.pem", "node.key"] {
            let mode = fs::metadata(ca.join(name)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{name}");
        }
        assert_eq!(fs::metadata(&ca).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn the_node_certificate_follows_names_and_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Pki::open(dir.path(), &[], 0, NOW).unwrap();
        let names = ["box.example".to_owned(), "10.0.0.1".to_owned()];
        let named = Pki::open(dir.path(), &names, 0, NOW).unwrap();
        assert_ne!(first.node_chain, named.node_chain);
        assert_eq!(named.node_chain, Pki::open(dir.path(), &names, 0, NOW).unwrap().node_chain);
        let late = NOW + (NODE_DAYS - 10) as u64 * 86_400_000_000;
        assert_ne!(named.node_chain, Pki::open(dir.path(), &names, 0, late).unwrap().node_chain);
        // a crash between key and certificate
        files::write_secret(&dir.path().join("node.key"), KeyPair::generate().unwrap().serialize_pem().as_bytes())
            .unwrap();
        let mended = Pki::open(dir.path(), &names, 0, NOW).unwrap();
        mended.session_config().unwrap();
    }

    #[test]
    fn a_lost_authority_is_not_replaced_under_enrolled_hosts() {
        let dir = tempfile::tempdir().unwrap();
        drop(Pki::open(dir.path(), &[], 0, NOW).unwrap());
        fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(matches!(Pki::open(dir.path(), &[], 0, NOW), Err(PkiError::KeyLost { .. })));
        fs::remove_file(dir.path().join("ca.pem")).unwrap();
        assert!(matches!(Pki::open(dir.path(), &[], 1, NOW), Err(PkiError::AuthorityLost { hosts: 1, .. })));
        drop(Pki::open(dir.path(), &[], 0, NOW).unwrap());
        // a crash of the first start between key and certificate
        fs::remove_file(dir.path().join("ca.pem")).unwrap();
        drop(Pki::open(dir.path(), &[], 0, NOW).unwrap());
        files::write_secret(&dir.path().join("ca.key"), KeyPair::generate().unwrap().serialize_pem().as_bytes())
            .unwrap();
        assert!(matches!(Pki::open(dir.path(), &[], 0, NOW), Err(PkiError::Mismatch { .. })));
        fs::write(dir.path().join("ca.pem"), "nonsense").unwrap();
        assert!(matches!(Pki::open(dir.path(), &[], 0, NOW), Err(PkiError::NoCertificate { .. })));
    }

    #[test]
    fn a_host_certificate_is_ours_whatever_the_request_wished() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &[], 0, NOW).unwrap();
        let host = HostId::from_bytes([7; 16]);
        let (_, csr) = csr();
        let issued = pki.sign_host(&csr, host, NOW).unwrap();
        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        assert_eq!(peer_of(&der), Some(Peer::Host { id: host, serial: issued.serial.clone() }));
        let (_, x) = X509Certificate::from_der(&der).unwrap();
        assert!(!format!("{:?}", x.subject_alternative_name().unwrap().unwrap().value).contains("evil"));
        let eku = x.extended_key_usage().unwrap().unwrap();
        assert!(eku.value.client_auth && !eku.value.server_auth);
        assert!(!x.is_ca());
        let days = (x.validity().not_after.timestamp() - (NOW / 1_000_000) as i64) / 86_400;
        assert_eq!(days, HOST_DAYS);
        assert_ne!(pki.sign_host(&csr, host, NOW).unwrap().serial, issued.serial);
    }

    #[test]
    fn requests_that_prove_nothing_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &[], 0, NOW).unwrap();
        let (_, good) = csr();
        let host = HostId::from_bytes([7; 16]);
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        assert!(pki.sign_host(&forged, host, NOW).is_err());
        assert!(pki.sign_host(b"", host, NOW).is_err());
        for cut in 0..good.len() {
            assert!(pki.sign_host(&good[..cut], host, NOW).is_err(), "cut at {cut}");
        }
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let csr = CertificateParams::new(vec![]).unwrap().serialize_request(&other).unwrap();
        assert!(matches!(pki.sign_host(csr.der(), host, NOW), Err(SignError::KeyKind { .. })));
    }

    #[test]
    fn an_nbd_client_is_no_host() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &[], 0, NOW).unwrap();
        let (bundle, serial) = pki.make_client("qemu-1", NOW).unwrap();
        let der = CertificateDer::from_pem_slice(bundle.certificate_pem.as_bytes()).unwrap();
        assert_eq!(peer_of(&der), Some(Peer::NbdClient { name: "qemu-1".into(), serial }));
        let node = &pki.node_chain[0];
        assert_eq!(peer_of(node), None);
        assert_eq!(peer_of(b"junk"), None);
    }
}
