//! Exports: what NBD clients see. Ingest targets are written, views are read.
//!
//! Each export has a Unix socket of its own in `run/nbd/` (mode 0600, in a folder of mode 0700). Where `nbd_listen` is set,
//! ingest targets and the views opened for it are also reached over TCP, under mutual TLS only and by name.
//!
//! **Limits.** [`CONNECTIONS_MAX`] connections in all; each is bounded by [`lane::BUDGET_BYTES`].

pub mod driver;
pub mod lane;
pub mod pool;
mod shared;

use crate::{
    events::{Event, Events},
    files::{self, FileError},
    outbox::Direct,
    pki::{self, Peer},
    vault::{Command, Group},
};
use driver::{Agreed, Backend, ConnectionError, HANDSHAKE_SECONDS_MAX, Op};
use journal::View;
use lane::Lane;
use model::{ByteLen, GroupId, VolumeId, VolumeSpec};
use nbd::{Command as Nbd, Errno, ExportEntry, ExportFlags, ExportInfo, HandshakeConfig, ServerHandshake, TlsPolicy};
use pool::{ReadJob, ReadPool, Source};
use rustls::ServerConfig;
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// NBD connections at once. A client opens a few per disk; the bound keeps what hostile ones could hold below the memory of a box.
pub const CONNECTIONS_MAX: usize = 128;
/// An accept that failed (no file descriptor left) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("there is an export {0:?} already")]
    Exists(String),
    #[error("could not open the socket {}", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error(transparent)]
    File(#[from] FileError),
}

/// What is behind an export.
enum Behind {
    Ingest(Arc<Group>),
    View(Arc<View>),
}

/// One disk that NBD clients can open.
pub struct Export {
    pub name: String,
    pub group: GroupId,
    pub volume: VolumeId,
    pub volume_name: String,
    pub size: ByteLen,
    pub socket: PathBuf,
    /// Reached over TLS too.
    pub tcp: bool,
    behind: Behind,
    reads: Arc<ReadPool>,
    /// True once the export is being taken down.
    down: watch::Sender<bool>,
}

impl Export {
    fn info(&self) -> ExportInfo {
        match &self.behind {
            Behind::View(_) => ExportInfo::read_only(self.size),
            Behind::Ingest(_) => {
                let mut info = ExportInfo::read_write(self.size);
                // One thread takes the writes of all connections in one order, and a flush covers all of it.
                info.flags = info.flags | ExportFlags::MULTI_CONN;
                info
            }
        }
        .with_description(format!("{} {}", self.volume_name, self.size))
    }
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.name, self.socket.display())
    }
}

impl Backend for Export {
    fn take(&self, lane: &Arc<Lane>, ops: Vec<Op>) {
        match &self.behind {
            Behind::Ingest(group) => {
                if let Err(closed) = group.push(Command::Nbd { lane: Arc::clone(lane), ops })
                    && let Command::Nbd { ops, .. } = closed.0
                {
                    ops.iter().for_each(|op| lane.fail(&op.request, Errno::Shutdown, "the group is closed"));
                    lane.wake();
                }
            }
            Behind::View(view) => {
                for op in ops {
                    match op.request.command {
                        Nbd::Read { .. } | Nbd::BlockStatus { .. } => {
                            let source = Source::View(Arc::clone(view));
                            self.reads.push(ReadJob { lane: Arc::clone(lane), request: op.request, source });
                        }
                        // Nothing was ever written, so everything is flushed.
                        Nbd::Flush | Nbd::Cache => lane.done(&op.request),
                        Nbd::Write { .. } | Nbd::Trim { .. } | Nbd::WriteZeroes { .. } => {
                            lane.fail(&op.request, Errno::Perm, "a view is read-only");
                        }
                    }
                }
                lane.wake();
            }
        }
    }
}

/// All exports of the box.
pub struct Exports {
    dir: PathBuf,
    events: Arc<Events>,
    reads: Arc<ReadPool>,
    table: Mutex<BTreeMap<String, Arc<Export>>>,
    slots: Arc<Semaphore>,
    /// True once the daemon stops.
    stop: watch::Receiver<bool>,
}

/// The exports one listener shows.
struct Shown {
    exports: Vec<Arc<Export>>,
    /// The one that the empty name means, if there is only one.
    default: Option<Arc<Export>>,
}

impl Shown {
    fn get(&self, name: &str) -> Option<&Arc<Export>> {
        self.exports.iter().find(|e| e.name == name).or(self.default.as_ref().filter(|_| name.is_empty()))
    }
}

impl nbd::Exports for Shown {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.get(name).map(|e| e.info())
    }
    fn list(&self) -> Vec<ExportEntry> {
        let entry = |e: &Arc<Export>| ExportEntry { name: e.name.clone(), description: e.info().description };
        self.exports.iter().map(entry).collect()
    }
}

impl Exports {
    pub fn new(dir: PathBuf, events: Arc<Events>, reads: Arc<ReadPool>, stop: watch::Receiver<bool>) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        Arc::new(Self { dir, events, reads, table: Mutex::default(), slots, stop })
    }

    /// Opens an ingest target for every volume of a group that has none.
    pub fn add_ingest(
        self: &Arc<Self>,
        group: &Arc<Group>,
        volumes: &[VolumeSpec],
        tcp: bool,
    ) -> Result<(), ExportError> {
        for volume in volumes {
            let known = self.of_group(group.id()).iter().any(|e| e.volume == volume.id && e.is_ingest());
            if !known {
                let name = self.free_name(&export_name(group.name(), &volume.name));
                self.add(name, group.id(), volume, tcp, Behind::Ingest(Arc::clone(group)))?;
            }
        }
        Ok(())
    }

    /// Opens a read-only export of one volume of a view.
    pub fn add_view(
        self: &Arc<Self>,
        name: String,
        group: GroupId,
        volume: &VolumeSpec,
        tcp: bool,
        view: &Arc<View>,
    ) -> Result<Arc<Export>, ExportError> {
        self.add(name, group, volume, tcp, Behind::View(Arc::clone(view)))
    }

    fn add(
        self: &Arc<Self>,
        name: String,
        group: GroupId,
        volume: &VolumeSpec,
        tcp: bool,
        behind: Behind,
    ) -> Result<Arc<Export>, ExportError> {
        let socket = self.dir.join(format!("{name}.sock"));
        let mut table = crate::lock(&self.table);
        if table.contains_key(&name) {
            return Err(ExportError::Exists(name));
        }
        let listener = bind(&socket)?;
        let export = Arc::new(Export {
            name: name.clone(),
            group,
            volume: volume.id,
            volume_name: volume.name.clone(),
            size: ByteLen(volume.sectors.bytes()),
            socket,
            tcp,
            behind,
            reads: Arc::clone(&self.reads),
            down: watch::Sender::new(false),
        });
        table.insert(name, Arc::clone(&export));
        drop(table);
        tokio::spawn(accept_unix(Arc::clone(self), Arc::clone(&export), listener));
        Ok(export)
    }

    /// Takes an export down: its connections are cut, its socket goes.
    pub fn remove(&self, name: &str) {
        let export = crate::lock(&self.table).remove(name);
        if let Some(export) = export {
            export.down.send_replace(true);
            let _ = std::fs::remove_file(&export.socket);
        }
    }
    pub fn remove_group(&self, group: GroupId) {
        self.of_group(group).iter().for_each(|e| self.remove(&e.name));
    }

    pub fn of_group(&self, group: GroupId) -> Vec<Arc<Export>> {
        crate::lock(&self.table).values().filter(|e| e.group == group).cloned().collect()
    }
    pub fn ingest_targets(&self) -> Vec<Arc<Export>> {
        crate::lock(&self.table).values().filter(|e| e.is_ingest()).cloned().collect()
    }
    pub fn connections(&self) -> usize {
        CONNECTIONS_MAX - self.slots.available_permits()
    }

    fn free_name(&self, wanted: &str) -> String {
        let table = crate::lock(&self.table);
        if !table.contains_key(wanted) {
            return wanted.to_owned();
        }
        (2u32..).map(|n| format!("{wanted}.{n}")).find(|n| !table.contains_key(n)).unwrap_or_else(|| wanted.to_owned())
    }

    /// Serves NBD over TLS until the daemon stops.
    pub async fn serve_tls(self: Arc<Self>, listener: TcpListener, config: Arc<ServerConfig>) {
        let acceptor = TlsAcceptor::from(config);
        let mut stop = self.stop.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = crate::raised(&mut stop) => return,
            };
            let Ok((tcp, from)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
                self.events.note(Event::ConnectionLimit, from, "an NBD client was turned away");
                continue;
            };
            let _ = tcp.set_nodelay(true);
            let (exports, acceptor) = (Arc::clone(&self), acceptor.clone());
            tokio::spawn(async move {
                let _slot = slot;
                let from = from.to_string();
                let ended = exports.connection_tls(tcp, &acceptor, &from).await;
                exports.note_end(&from, ended);
            });
        }
    }

    async fn connection_tls(
        &self,
        mut tcp: tokio::net::TcpStream,
        acceptor: &TlsAcceptor,
        from: &str,
    ) -> Result<(), ConnectionError> {
        let limit = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
        let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::Required });
        let nothing = Shown { exports: Vec::new(), default: None };
        match timed(limit, driver::negotiate(&mut tcp, &mut handshake, &nothing)).await? {
            Agreed::StartTls => {}
            Agreed::Session(_) | Agreed::Closed => return Ok(()),
        }
        let mut tls = match timeout(limit, acceptor.accept(tcp)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(e)) => {
                self.events.note(Event::HandshakeFailed, from, &e);
                return Ok(());
            }
            Err(_) => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        };
        let certificate = tls.get_ref().1.peer_certificates().and_then(|c| c.first()).and_then(|c| pki::peer_of(c));
        let Some(Peer::NbdClient { name, .. }) = certificate else {
            self.events.note(Event::HandshakeFailed, from, "the certificate is not one of an NBD client");
            return Ok(());
        };
        handshake.tls_started();
        let shown =
            Shown { exports: crate::lock(&self.table).values().filter(|e| e.tcp).cloned().collect(), default: None };
        self.session(&mut tls, None, &mut handshake, &shown, &format!("{name} at {from}")).await
    }

    async fn session<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        direct: Option<Arc<dyn Direct>>,
        handshake: &mut ServerHandshake,
        shown: &Shown,
        from: &str,
    ) -> Result<(), ConnectionError> {
        let limit = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
        let session = match timed(limit, driver::negotiate(stream, handshake, shown)).await? {
            Agreed::Session(session) => session,
            Agreed::StartTls | Agreed::Closed => return Ok(()),
        };
        let Some(export) = shown.get(session.export_name()) else { return Ok(()) };
        self.events.note(Event::NbdConnected, &export.name, from);
        let lane = Arc::new(Lane::new(session, export.volume));
        if let Some(direct) = direct {
            lane.outbox.set_direct(direct);
        }
        let mut down = export.down.subscribe();
        let mut stop = self.stop.clone();
        tokio::select! {
            ended = driver::serve(stream, lane, &**export) => ended,
            () = crate::raised(&mut down) => Ok(()),
            () = crate::raised(&mut stop) => Ok(()),
        }
    }

    fn note_end(&self, from: &str, ended: Result<(), ConnectionError>) {
        match ended {
            Ok(()) => {}
            Err(e @ (ConnectionError::Protocol(_) | ConnectionError::Handshake(_))) => {
                self.events.note(Event::NbdRefused, from, crate::chain(&e));
            }
            Err(e) => self.events.note(Event::NbdClosed, from, crate::chain(&e)),
        }
    }
}

impl Export {
    pub fn is_ingest(&self) -> bool {
        matches!(self.behind, Behind::Ingest(_))
    }
}

async fn timed<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, ConnectionError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

async fn accept_unix(exports: Arc<Exports>, export: Arc<Export>, listener: UnixListener) {
    let (mut down, mut stop) = (export.down.subscribe(), exports.stop.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = crate::raised(&mut down) => return,
            () = crate::raised(&mut stop) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(slot) = Arc::clone(&exports.slots).try_acquire_owned() else {
            exports.events.note(Event::ConnectionLimit, &export.name, "an NBD client was turned away");
            continue;
        };
        let (exports, export) = (Arc::clone(&exports), Arc::clone(&export));
        tokio::spawn(async move {
            let _slot = slot;
            let shown = Shown { exports: vec![Arc::clone(&export)], default: Some(Arc::clone(&export)) };
            let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::None });
            let (mut stream, direct) = shared::split(stream);
            let ended = exports.session(&mut stream, Some(direct), &mut handshake, &shown, "local").await;
            exports.note_end(&export.name, ended);
        });
    }
}

fn bind(path: &Path) -> Result<UnixListener, ExportError> {
    let _ = std::fs::remove_file(path); // left by a daemon that was killed
    let listener = UnixListener::bind(path).map_err(|source| ExportError::Bind { path: path.to_owned(), source })?;
    files::make_private(path)?;
    Ok(listener)
}

/// Longest parts of an export's name: with the dash, a number against doubles and `.sock` the file name stays within
/// [`SOCKET_NAME_MAX`](crate::config::SOCKET_NAME_MAX).
const GROUP_CHARS_MAX: usize = 22;
const VOLUME_CHARS_MAX: usize = 12;

/// `<group>-<volume>`, fit for a file name and a URI.
fn export_name(group: &str, volume: &str) -> String {
    let plain = |text: &str, max: usize| -> String {
        let last = text.rsplit('/').find(|part| !part.is_empty()).unwrap_or("disk");
        last.chars().map(|c| if c.is_ascii_alphanumeric() || "._".contains(c) { c } else { '-' }).take(max).collect()
    };
    let group: String = plain(&group.replace('/', "-"), GROUP_CHARS_MAX);
    // A dot in front would hide the file, and `..` is a folder.
    format!("{}-{}", group.trim_start_matches('.'), plain(volume, VOLUME_CHARS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_files_whatever_they_were() {
        assert_eq!(export_name("vm1", "root"), "vm1-root");
        assert_eq!(export_name("db 1", "/dev/sdb"), "db-1-sdb");
        assert_eq!(export_name("../../etc", "../x/"), "-..-etc-x".trim_start_matches('.'));
        for (group, volume) in [("..", ".."), ("", ""), ("日本", "/"), (&*"x".repeat(200), &*"y".repeat(200))] {
            let name = export_name(group, volume);
            assert!(name.len() + ".123.sock".len() <= crate::config::SOCKET_NAME_MAX, "{name}");
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
        }
    }
}
