//! Serves the face of the box ([`web`]): its backend, its certificate, and what it keeps.
//!
//! ```text
//! <data>/web/accounts.json   users and tokens, replaced whole     <data>/web/audit.log   who changed what
//! <data>/ca/web.{key,pem}    the certificate browsers see: made by the box's own authority, 397 days, anew when less than 60 are left or
//!                            when the box got other names or addresses; looked at every hour, without a restart
//! ```
//! An audit that cannot be written holds nothing up – a takeover must go on with a full disk – but is an alert until it can be again.

use crate::{
    App, api,
    events::Event,
    files::{self, FileError},
    pki::{Pki, PkiError},
};
use ::web::{
    Answering, ApiRequest, Backend, Web,
    access::Caller,
    accounts::{AccountError, Accounts, Keep},
    audit::{Audit, Deed},
};
use http::{Request, Uri};
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};

const CERTIFICATE_EVERY: Duration = Duration::from_secs(3600);
/// Of a machine with more, the first ones get into the certificate; `names` in the configuration adds others.
const ADDRESSES_MAX: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum FaceError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("could not open {}", path.display())]
    Accounts { path: PathBuf, source: AccountError },
    #[error("could not open the audit {}", path.display())]
    Audit { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Pki(#[from] PkiError),
}

struct AccountsFile(PathBuf);

impl Keep for AccountsFile {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        files::read_small(&self.0).map_err(|e| e.source)
    }
    fn save(&self, data: &[u8]) -> io::Result<()> {
        files::write_secret(&self.0, data).map_err(|e| e.source)
    }
}

/// Blocking.
pub fn open(data: &Path, now_us: u64) -> Result<(Accounts, Audit), FaceError> {
    let dir = data.join("web");
    files::private_dir(&dir)?;
    let path = dir.join("accounts.json");
    let accounts = Accounts::open(Box::new(AccountsFile(path.clone())));
    let accounts = accounts.map_err(|source| FaceError::Accounts { path, source })?;
    let path = dir.join("audit.log");
    let audit = Audit::open(&path, now_us).map_err(|source| FaceError::Audit { path, source })?;
    Ok((accounts, audit))
}

/// Writes down what somebody did.
pub async fn record(app: &Arc<App>, caller: Caller, what: String, asked: String, status: u16, result: String) {
    let app = Arc::clone(app);
    let written = tokio::task::spawn_blocking(move || {
        let time_us = app.clock.wall_us();
        let deed = Deed { caller: &caller, what, asked: &asked, status, result: &result, time_us };
        let failed = app.audit.record(&deed).err().map(|e| format!("the audit could not be written: {e}"));
        let mut alert = crate::lock(&app.audit_alert);
        if let Some(text) = &failed
            && alert.is_none()
        {
            app.events.note(Event::AuditFailed, "audit", text);
        }
        *alert = failed;
    });
    let _ = written.await;
}

/// The box, as its face sees it.
struct Face(Arc<App>);

impl Backend for Face {
    fn call(&self, caller: Caller, request: ApiRequest) -> Answering {
        let app = Arc::clone(&self.0);
        Box::pin(async move {
            let ApiRequest { method, path, query, body } = request;
            let mark = if query.is_empty() { "" } else { "?" };
            // Whatever is no address is one that nothing answers.
            let uri = format!("/api/v1/{path}{mark}{query}").parse::<Uri>().unwrap_or_else(|_| Uri::from_static("/"));
            let mut asked = Request::new(body);
            *asked.method_mut() = method;
            *asked.uri_mut() = uri;
            api::serve(&app, &caller, asked).await
        })
    }
    fn deed(
        &self,
        caller: Caller,
        what: &'static str,
        refused: Option<String>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let app = Arc::clone(&self.0);
        Box::pin(async move {
            let status = if refused.is_some() { 403 } else { 200 };
            record(&app, caller, what.into(), String::new(), status, refused.unwrap_or_default()).await;
        })
    }
    fn now_us(&self) -> u64 {
        self.0.clock.wall_us()
    }
    fn box_name(&self) -> String {
        self.0.box_name.clone()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.0.events.changes()
    }
}

/// The certificate in force, which may change under open connections.
#[derive(Debug)]
pub struct Certificate {
    dir: PathBuf,
    names: Vec<String>,
    listen: SocketAddr,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Blocking.
    pub fn open(
        pki: &Pki,
        dir: PathBuf,
        names: Vec<String>,
        listen: SocketAddr,
        now_us: u64,
    ) -> Result<Arc<Self>, FaceError> {
        let wanted = wanted_names(&names, listen);
        let current = RwLock::new(pki.web_certificate(&dir, &wanted, now_us)?);
        Ok(Arc::new(Self { dir, names, listen, current }))
    }

    fn look(&self, pki: &Pki, now_us: u64) -> Result<(), PkiError> {
        let fresh = pki.web_certificate(&self.dir, &wanted_names(&self.names, self.listen), now_us)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, PkiError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(PkiError::Tls)?;
        let resolver = Arc::<Self>::clone(self);
        let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// What the box may be called by a browser.
fn wanted_names(names: &[String], listen: SocketAddr) -> Vec<String> {
    let mut wanted: Vec<String> = vec!["localhost".into(), "127.0.0.1".into(), "::1".into()];
    let addresses = if listen.ip().is_unspecified() { own_addresses() } else { vec![listen.ip()] };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim().to_ascii_lowercase();
    let fine = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
    let more = addresses.into_iter().take(ADDRESSES_MAX).map(|ip| ip.to_string());
    let host = Some(host).filter(|h| !h.is_empty() && h.len() <= 253 && h.chars().all(fine));
    for name in names.iter().cloned().chain(host).chain(more) {
        if !wanted.contains(&name) {
            wanted.push(name);
        }
    }
    wanted
}

/// As the kernel lists them in text; no address of one link only.
fn own_addresses() -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let mut found = local_v4(&v4);
    found.extend(v6.lines().filter_map(|line| {
        let bits = u128::from_str_radix(line.get(..32)?, 16).ok()?;
        let ip = Ipv6Addr::from(bits);
        (!ip.is_loopback() && !ip.is_unicast_link_local()).then_some(IpAddr::V6(ip))
    }));
    found.sort();
    found.dedup();
    found
}

/// A leaf, and below it what it is.
fn local_v4(trie: &str) -> Vec<IpAddr> {
    let mut leaf = None;
    let mut found = Vec::new();
    for line in trie.lines() {
        if let Some(address) = line.trim().strip_prefix("|-- ") {
            leaf = address.parse::<std::net::Ipv4Addr>().ok();
        } else if line.contains("/32 host LOCAL")
            && let Some(ip) = leaf.take().filter(|ip| !ip.is_loopback())
        {
            found.push(IpAddr::V4(ip));
        }
    }
    found
}

/// Serves the pages and the API until the daemon stops.
pub async fn serve(app: Arc<App>, listener: TcpListener, certificate: Arc<Certificate>, tls: Arc<ServerConfig>) {
    let web = Arc::new(Web::new(Arc::clone(&app.accounts), Arc::new(Face(Arc::clone(&app)))));
    let mut stop = app.stop.subscribe();
    let renewing = async {
        loop {
            tokio::time::sleep(CERTIFICATE_EVERY).await;
            let (app, certificate) = (Arc::clone(&app), Arc::clone(&certificate));
            let looked = tokio::task::spawn_blocking(move || {
                if let Err(e) = certificate.look(&app.pki, app.clock.wall_us()) {
                    app.events.note(Event::CertificateFailed, "web", crate::chain(&e));
                }
            });
            let _ = looked.await;
        }
    };
    tokio::select! {
        () = ::web::serve(web, listener, tls, app.stop.subscribe()) => {}
        () = renewing => {}
        () = crate::raised(&mut stop) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n        /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(local_v4(trie), ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        let names = wanted_names(&["box.example".into(), "127.0.0.1".into()], "192.0.2.1:8443".parse().unwrap());
        assert!(names.contains(&"box.example".into()) && names.contains(&"192.0.2.1".into()), "{names:?}");
        assert_eq!(names.iter().filter(|n| *n == "127.0.0.1").count(), 1);
    }

    #[test]
    fn the_certificate_is_kept_renewed_in_time_and_follows_the_names() {
        let dir = tempfile::tempdir().unwrap();
        const NOW: u64 = 1_790_000_000_000_000;
        let pki = Pki::open(dir.path(), &[], 0, NOW).unwrap();
        let listen: SocketAddr = "192.0.2.1:8443".parse().unwrap();
        let open = |names: &[&str], now| {
            let names = names.iter().map(|n| (*n).to_owned()).collect();
            let c = Certificate::open(&pki, dir.path().to_owned(), names, listen, now).unwrap();
            c.config().unwrap();
            let key = Arc::clone(&c.current.read().unwrap());
            (c, key.cert[0].clone())
        };
        let (_, first) = open(&[], NOW);
        assert_eq!(open(&[], NOW + 1).1, first);
        let (named, second) = open(&["box.example"], NOW);
        assert_ne!(second, first);
        let late = NOW + 350 * 86_400_000_000;
        named.look(&pki, late).unwrap();
        assert_ne!(named.current.read().unwrap().cert[0], second, "renewed while it runs");
    }
}
