//! TLS 1.3 to the box, and whom it trusts.
//!
//! After enrolment: the box's own CA and the name `holdfast-box`, whatever address was dialled; this host's certificate is shown. At
//! enrolment nothing is known yet but the CA's fingerprint in the token: the CA certificate that the box shows must have it, and the
//! box's own certificate must be signed by that CA. Only then is the token sent.

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::sync::Arc;
use wire::{ALPN_ENROL, ALPN_REPLICATION, BOX_TLS_NAME};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{file} in the state directory is not a PEM file; enrol this host again with `holdfast-agent enrol`")]
    Pem {
        file: &'static str,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("the stored certificates cannot be used; enrol this host again with `holdfast-agent enrol`")]
    Setup(#[source] rustls::Error),
}

pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The name in the box's certificate.
pub fn box_name() -> ServerName<'static> {
    ServerName::try_from(BOX_TLS_NAME).expect("a DNS name")
}

/// For sessions of an enrolled host.
pub fn session_config(ca_pem: &[u8], cert_pem: &[u8], key_pem: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
    let pem = |file| move |source| TlsError::Pem { file, source };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem).map_err(pem("ca.pem"))?).map_err(TlsError::Setup)?;
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(cert_pem).collect::<Result<_, _>>().map_err(pem("host.pem"))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(pem("host.pem"))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(TlsError::Setup)?;
    config.alpn_protocols = vec![ALPN_REPLICATION.to_vec()];
    // A session that is resumed would not show the certificate again.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For the one connection that enrols.
pub fn enrol_config(ca_fingerprint: [u8; 16]) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = Arc::new(PinnedCa { ca_fingerprint, provider: provider() });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Trusts the CA whose SHA-256 begins as the token says, and what that CA signed, in the usual way.
#[derive(Debug)]
struct PinnedCa {
    ca_fingerprint: [u8; 16],
    provider: Arc<CryptoProvider>,
}

/// What a peer is told that shows another CA; recognised by the enrolment to give its own message.
pub const WRONG_CA: &str = "the CA certificate has not the fingerprint in the token";

impl PinnedCa {
    fn fits(&self, certificate: &CertificateDer<'_>) -> bool {
        ring::digest::digest(&ring::digest::SHA256, certificate).as_ref().starts_with(&self.ca_fingerprint)
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca =
            intermediates.iter().find(|c| self.fits(c)).ok_or_else(|| rustls::Error::General(WRONG_CA.to_owned()))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        inner.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
