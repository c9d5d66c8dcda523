//! Exports: what NBD clients see. Ingest targets are written, views are read.
//!
//! Each export has a Unix socket of its own in `run/nbd/` (mode 0600, in a folder of mode 0700). Where `nbd_listen` is set,
//! ingest targets and the views opened for it are also reached over TCP, under mutual TLS only and by name.
//!
//! Connections of an ingest target are served by its journal's own thread ([`Group::here`]), those of a view by the daemon's runtime.
//!
//! # Reading a view
//!
//! What memory holds is answered by the connection's own task, there and then ([`View::read_at_once`]): no other thread is woken for
//! it. Everything else goes to the [`pool`], several requests of a connection at a time. Who reads from front to back has the
//! next megabytes brought into memory before they are asked for ([`ahead`]).
//!
//! **Limits.** [`CONNECTIONS_MAX`] connections in all, and [`HANDSHAKES_MAX`] that nobody knows yet; each is bounded by [`lane::BUDGET_BYTES`].

mod ahead;
mod clients;
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
use ahead::Streak;
use clients::{Client, Clients};
use driver::{Agreed, Backend, ConnectionError, HANDSHAKE_SECONDS_MAX, Op};
use journal::{View, ViewHandle};
use lane::Lane;
use model::{ByteLen, GroupId, VolumeId, VolumeSpec};
use nbd::{
    Command as Nbd, Errno, ExportEntry, ExportFlags, ExportInfo, HandshakeConfig, Request, ServerHandshake, Session,
    TlsPolicy,
};
use pool::{Ahead, ReadJob, ReadPool, Source};
use rustls::ServerConfig;
use shared::Movable;
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
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// NBD connections at once. A client opens a few per disk; the bound keeps what hostile ones could hold below the memory of a box.
pub const CONNECTIONS_MAX: usize = 128;
/// TLS connections that have not shown a certificate: strangers must not take the places of clients, local ones least of all.
const HANDSHAKES_MAX: usize = 64;
/// Read for a batch of requests by the connection's own task (some 50 us of copying); the rest is the pool's, beside it.
const AT_ONCE_BYTES_MAX: usize = 256 << 10;
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
    View(Arc<ViewHandle>),
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
    streak: Mutex<Streak>,
    clients: Clients,
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
            Behind::View(handle) => {
                let view = &handle.get();
                let mut at_once = AtOnce::default();
                for op in ops {
                    match op.request.command {
                        Nbd::Read { .. } | Nbd::BlockStatus { .. } => {
                            self.look_ahead(view, &op.request);
                            if at_once.answer(view, lane, &op.request) {
                                continue;
                            }
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

/// Answers reads of what is in memory, in the connection's own task.
#[derive(Default)]
struct AtOnce {
    buf: Vec<u8>,
    /// Of this batch of requests.
    bytes: usize,
}

impl AtOnce {
    fn answer(&mut self, view: &View, lane: &Lane, request: &Request) -> bool {
        let len = request.len as usize;
        if !matches!(request.command, Nbd::Read { .. }) || self.bytes + len > AT_ONCE_BYTES_MAX {
            return false;
        }
        self.buf.resize(len, 0);
        if !view.read_at_once(lane.volume, request.offset, &mut self.buf) {
            return false;
        }
        self.bytes += len;
        lane.answer(request, |session, out| session.push_read(out, request, &self.buf));
        true
    }
}

impl Export {
    /// Who has it open.
    pub fn clients(&self) -> Vec<String> {
        self.clients.list()
    }
    /// For how long nobody has had it open; none while somebody has.
    pub fn idle(&self) -> Option<Duration> {
        self.clients.idle()
    }
    fn look_ahead(&self, view: &Arc<View>, request: &Request) {
        if !matches!(request.command, Nbd::Read { .. }) {
            return;
        }
        let wanted = crate::lock(&self.streak).note(request.offset, request.len.into(), self.size.0);
        if let Some((offset, len)) = wanted {
            self.reads.push_ahead(Ahead { view: Arc::clone(view), volume: self.volume, offset, len });
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
    handshakes: Arc<Semaphore>,
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
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        Arc::new(Self { dir, events, reads, table: Mutex::default(), slots, handshakes, stop })
    }

    /// Opens an ingest target for every volume of a group that has none. Its name follows from the group and the volume alone: after a
    /// restart, in whatever order groups come up, a client finds the same disk under the same name.
    pub fn add_ingest(
        self: &Arc<Self>,
        group: &Arc<Group>,
        volumes: &[VolumeSpec],
        tcp: bool,
    ) -> Result<(), ExportError> {
        for volume in volumes {
            let known = self.of_group(group.id()).iter().any(|e| e.volume == volume.id && e.is_ingest());
            if !known {
                let name = export_name(group.id(), group.name(), volume);
                match self.add(name, group.id(), volume, tcp, Behind::Ingest(Arc::clone(group))) {
                    // Who made the group and who looks for new ones may both come here.
                    Err(ExportError::Exists(name)) if self.serves(&name, group.id(), volume.id) => {}
                    added => drop(added?),
                }
            }
        }
        Ok(())
    }

    fn serves(&self, name: &str, group: GroupId, volume: VolumeId) -> bool {
        crate::lock(&self.table).get(name).is_some_and(|e| e.group == group && e.volume == volume && e.is_ingest())
    }

    /// Opens a read-only export of one volume of a view.
    pub fn add_view(
        self: &Arc<Self>,
        name: String,
        group: GroupId,
        volume: &VolumeSpec,
        tcp: bool,
        view: &Arc<ViewHandle>,
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
        // Whose thread serves the clients: the journal's own for those who write.
        let home = match &behind {
            Behind::Ingest(group) => group.here().clone(),
            Behind::View(_) => Handle::current(),
        };
        let listener = {
            let _in = home.enter();
            bind(&socket)?
        };
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
            streak: Mutex::default(),
            clients: Clients::default(),
            down: watch::Sender::new(false),
        });
        table.insert(name, Arc::clone(&export));
        drop(table);
        home.spawn(accept_unix(Arc::clone(self), Arc::clone(&export), listener));
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
            let Ok(stranger) = Arc::clone(&self.handshakes).try_acquire_owned() else {
                self.events.note(
                    Event::ConnectionLimit,
                    from,
                    "too many NBD connections that have not shown who they are",
                );
                continue;
            };
            let _ = tcp.set_nodelay(true);
            let (exports, acceptor) = (Arc::clone(&self), acceptor.clone());
            tokio::spawn(async move {
                let from = from.to_string();
                let ended = exports.connection_tls(tcp, &acceptor, &from, stranger).await;
                exports.note_end(&from, ended);
            });
        }
    }

    async fn connection_tls(
        &self,
        mut tcp: tokio::net::TcpStream,
        acceptor: &TlsAcceptor,
        from: &str,
        stranger: OwnedSemaphorePermit,
    ) -> Result<(), ConnectionError> {
        let limit = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
        let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::Required });
        let nothing = Shown { exports: Vec::new(), default: None };
        match timed(limit, driver::negotiate(&mut tcp, &mut handshake, &nothing)).await? {
            Agreed::StartTls => {}
            Agreed::Session(_) | Agreed::Closed => return Ok(()),
        }
        let mut tls = match timeout(limit, acceptor.accept(Movable::new(tcp))).await {
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
        let Ok(_slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            self.events.note(Event::ConnectionLimit, format!("{name} at {from}"), "an NBD client was turned away");
            return Ok(());
        };
        drop(stranger);
        handshake.tls_started();
        let shown =
            Shown { exports: crate::lock(&self.table).values().filter(|e| e.tcp).cloned().collect(), default: None };
        let from = format!("{name} at {from}");
        let Some((export, session)) = self.agree(&mut tls, &mut handshake, &shown, &from).await? else { return Ok(()) };
        let serving = |tls| self.serve(tls, None, Arc::clone(&export), session, from.clone());
        match &export.behind {
            Behind::View(_) => serving(tls).await,
            Behind::Ingest(group) => {
                tls.get_mut().0.lift()?;
                // A thread that ended, with its group, has dropped the connection.
                group.here().spawn(serving(tls)).await.unwrap_or(Ok(()))
            }
        }
    }

    /// Agrees with a client on an export; none: it left in good order.
    async fn agree<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        handshake: &mut ServerHandshake,
        shown: &Shown,
        from: &str,
    ) -> Result<Option<(Arc<Export>, Session)>, ConnectionError> {
        let limit = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
        let session = match timed(limit, driver::negotiate(stream, handshake, shown)).await? {
            Agreed::Session(session) => session,
            Agreed::StartTls | Agreed::Closed => return Ok(None),
        };
        let Some(export) = shown.get(session.export_name()) else { return Ok(None) };
        self.events.note(Event::NbdConnected, &export.name, from);
        Ok(Some((Arc::clone(export), session)))
    }

    /// Serves a client until it leaves, the export is taken down or the daemon stops. On whichever thread it is polled.
    fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        mut stream: S,
        direct: Option<Arc<dyn Direct>>,
        export: Arc<Export>,
        session: Session,
        from: String,
    ) -> impl Future<Output = Result<(), ConnectionError>> + Send + 'static {
        let lane = Lane::new(session, export.volume);
        if let Some(direct) = direct {
            lane.outbox.set_direct(direct);
        }
        let lane = Arc::new(lane.in_life(export.life()));
        let mut down = export.down.subscribe();
        let mut stop = self.stop.clone();
        async move {
            let _client: Client<'_> = export.clients.enter(&from);
            tokio::select! {
                ended = driver::serve(&mut stream, lane, &*export) => ended,
                () = crate::raised(&mut down) => Ok(()),
                () = crate::raised(&mut stop) => Ok(()),
            }
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
    fn life(&self) -> u64 {
        match &self.behind {
            Behind::Ingest(group) => group.shared.life(),
            Behind::View(_) => 0,
        }
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
            let from = clients::process_behind(&stream);
            let (mut stream, direct) = shared::split(stream);
            let ended = match exports.agree(&mut stream, &mut handshake, &shown, &from).await {
                Ok(Some((export, session))) => exports.serve(stream, Some(direct), export, session, from).await,
                Ok(None) => Ok(()),
                Err(e) => Err(e),
            };
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

/// Longest parts of an export's name: with the dash, the mark of a name that was changed and `.sock` the file name stays within
/// [`SOCKET_NAME_MAX`](crate::config::SOCKET_NAME_MAX).
const GROUP_CHARS_MAX: usize = 22;
const VOLUME_CHARS_MAX: usize = 10;
const MARK_CHARS: usize = 8;

/// `<group>-<volume>`, fit for a file name and a URI. Where that is not what they are called, or where the dash could be another one's,
/// a mark made from their ids follows: no two volumes ever have one name, and none ever takes over another's.
fn export_name(group_id: GroupId, group: &str, volume: &VolumeSpec) -> String {
    let plain = |text: &str, max: usize| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).take(max).collect()
    };
    let last = volume.name.rsplit('/').find(|part| !part.is_empty()).unwrap_or("disk");
    // A dot in front would hide the file, and `..` is a folder.
    let group_part = plain(group, GROUP_CHARS_MAX).trim_start_matches('.').to_owned();
    let volume_part = plain(last, VOLUME_CHARS_MAX);
    let exact = group_part == group && volume_part == volume.name && !volume_part.contains('-') && !group.is_empty();
    if exact {
        return format!("{group_part}-{volume_part}");
    }
    let mark = pki::sha256_hex(&[&group_id.bytes()[..], &volume.id.0.to_le_bytes()].concat());
    format!("{group_part}-{volume_part}.{}", &mark[..MARK_CHARS])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(group: u8, group_name: &str, volume: u32, volume_name: &str) -> String {
        let (name, identity) = (volume_name.to_owned(), String::new());
        let volume = VolumeSpec { id: VolumeId(volume), name, sectors: model::Sectors(8), identity };
        export_name(GroupId([group; 16]), group_name, &volume)
    }

    #[test]
    fn names_are_fit_for_files_whatever_they_were() {
        assert_eq!(name(1, "vm1", 0, "root"), "vm1-root");
        assert_eq!(name(1, "vm-1.b", 0, "data_1"), "vm-1.b-data_1");
        assert!(name(1, "db 1", 0, "/dev/sdb").starts_with("db-1-sdb."));
        for (group, volume) in
            [("..", ".."), ("", ""), ("日本", "/"), ("../../etc", "../x/"), (&*"x".repeat(200), &*"y".repeat(200))]
        {
            let name = name(1, group, 0, volume);
            assert!(name.len() + ".sock".len() <= crate::config::SOCKET_NAME_MAX, "{name}");
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
        }
    }

    /// Two names that look alike must not depend on which of them came first: after a restart a client would write to the other's disk.
    #[test]
    fn no_two_volumes_share_a_name() {
        let long = "production-database-server-";
        let alike = [
            (1, format!("{long}1"), 0, "root"),
            (2, format!("{long}2"), 0, "root"),
            (3, "a-b".into(), 0, "c"),
            (4, "a".into(), 0, "b-c"),
            (5, "db 1".into(), 0, "x"),
            (6, "db-1".into(), 0, "x"),
            (7, "g".into(), 0, "backup-volume-1"),
            (7, "g".into(), 1, "backup-volume-2"),
            (8, ".g".into(), 0, "v"),
            (9, "g".into(), 0, "v"),
        ];
        let names: Vec<String> = alike.iter().map(|(id, group, n, volume)| name(*id, group, *n, volume)).collect();
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    }
}
