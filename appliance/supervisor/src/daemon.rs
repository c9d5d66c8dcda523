//! The daemon as a whole: start, run, stop.

use crate::{
    api,
    catalog::{Catalog, CatalogError},
    clock::Clock,
    config::Config,
    device::{self, Device},
    events::{Event, Events},
    exports::{Exports, pool::ReadPool},
    face::{self, FaceError},
    files::{self, FileError, Lock, LockError},
    links::{LinkParts, Links},
    ownership::Ownership,
    pki::{self, Pki, PkiError},
    restores::Restores,
    takeovers::Takeovers,
    vault::{Phase, Vault, VaultError, VaultParts},
    views::Views,
    watch::{Ears, Watch},
};
use ::web::{accounts::Accounts, audit::Audit};
use data_encoding::HEXLOWER;
use durable::{Disk, DiskError, OsDisk};
use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
};

/// How often the groups' needs for room are balanced.
const BALANCE_EVERY: Duration = Duration::from_secs(2);
/// Between two of them at least, when a group asks for one.
const BALANCE_PAUSE: Duration = Duration::from_millis(100);
/// How often views are looked at that nobody has open; they are given minutes.
const EXPIRE_EVERY: Duration = Duration::from_secs(2);
/// How often a machine that serves is looked at.
const MACHINES_EVERY: Duration = Duration::from_secs(2);
/// How often ingest groups that have come up are looked for.
const EXPORT_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("could not use the data folder")]
    Disk(#[source] DiskError),
    #[error("could not open the catalogue in {}", data.display())]
    Catalog { data: PathBuf, source: CatalogError },
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Face(#[from] FaceError),
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("could not listen on {what} {at}")]
    Listen { what: &'static str, at: String, source: io::Error },
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("the system gave no random bytes")]
    Random,
}

/// What requests work with.
pub struct App {
    pub(crate) clock: Clock,
    pub(crate) events: Arc<Events>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) pki: Arc<Pki>,
    pub(crate) vault: Arc<Vault>,
    pub(crate) exports: Arc<Exports>,
    pub(crate) views: Views,
    pub(crate) takeovers: Takeovers,
    pub(crate) restores: Restores,
    pub(crate) ownership: Arc<Ownership>,
    pub(crate) watch: Watch,
    pub(crate) device: Device,
    /// What was amiss at start and is put right.
    pub(crate) start_alerts: Vec<String>,
    pub(crate) links: Arc<Links>,
    pub(crate) box_name: String,
    pub(crate) data_dir: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) nbd_listen: Option<SocketAddr>,
    pub(crate) web_listen: Option<SocketAddr>,
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) audit: Audit,
    /// Why what people do is not written down now.
    pub(crate) audit_alert: Mutex<Option<String>>,
    /// True once the daemon stops.
    pub(crate) stop: watch::Sender<bool>,
}

impl App {
    /// How often an event has happened; for tests and monitors inside the process.
    pub fn event_count(&self, event: Event) -> u64 {
        self.events.count(event)
    }
    /// What an administrator should look at and is no group's.
    pub(crate) fn alerts(&self) -> Vec<String> {
        let mut alerts: Vec<String> = self.device.doubt.iter().chain(&self.start_alerts).cloned().collect();
        alerts.extend(self.takeovers.plan_faults());
        alerts.extend(self.ownership.alerts());
        alerts.extend(self.watch.alerts());
        alerts.extend(crate::lock(&self.audit_alert).clone());
        alerts
    }
}

/// A running daemon.
pub struct Daemon {
    pub app: Arc<App>,
    pub control: PathBuf,
    pub metrics: Option<SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
    reads: Arc<ReadPool>,
    _lock: Lock,
}

impl Daemon {
    /// Starts everything; when it returns the listeners are up and every group's recovery has begun.
    ///
    /// ```text
    /// <data>/lock            one daemon at a time
    /// <data>/ca/             the authority                  (pki)
    /// <data>/catalog.{a,b}   hosts, tokens, groups          (catalog)
    /// <data>/groups/<id>/    journals                       (vault)
    /// <data>/metrics.token   for Prometheus
    /// <data>/plans/          what to do when a host is lost (takeovers)
    /// <data>/takeovers/      and what was done
    /// <data>/restores/       machines that get their disks back  (restores)
    /// <data>/ownership/      who runs each leased host   (ownership)
    /// <data>/web/            accounts and audit          (face)
    /// <run>/control.sock     control API                    (api)
    /// <run>/nbd/*.sock       exports                        (exports)
    /// ```
    pub async fn start(config: Config) -> Result<Self, StartError> {
        // rustls asks for a process-wide default in places where ours does not reach; a second start in one process finds it set.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let clock = Clock::start();
        let events = Arc::new(Events::new(clock));
        let (stop, stopping) = watch::channel(false);
        let opened = tokio::task::spawn_blocking({
            let (config, events) = (config.clone(), Arc::clone(&events));
            move || open(&config, clock, &events)
        });
        let opened = opened.await.map_err(|e| StartError::Thread(io::Error::other(e)))??;
        let Opened {
            lock,
            catalog,
            pki,
            reads,
            vault,
            token,
            device,
            start_alerts,
            takeovers,
            restores,
            ownership,
            accounts,
            audit,
        } = opened;

        let exports = Exports::new(config.nbd_dir(), Arc::clone(&events), Arc::clone(&reads), stopping.clone());
        let views = Views::new(Arc::clone(&exports), Arc::clone(&events), clock, config.view_idle());
        let links = Links::new(LinkParts {
            catalog: Arc::clone(&catalog),
            pki: Arc::clone(&pki),
            vault: Arc::clone(&vault),
            events: Arc::clone(&events),
            ownership: Arc::clone(&ownership),
            ears: Arc::<Ears>::default(),
            clock,
            box_name: config.box_name.clone(),
            silence_ms: config.heartbeat_timeout_ms,
            stop: stopping,
        })?;
        let (agents, listen) = bind("agents", config.listen).await?;
        let nbd = bind_wanted("NBD", config.nbd_listen).await?;
        let metrics = bind_wanted("metrics", config.metrics_listen).await?;
        let web = pages(&config, &pki, clock).await?;
        let control = config.control_socket();
        let control_listener = bind_unix(&control)?;
        let nbd_tls = pki.nbd_config()?;
        let app = Arc::new(App {
            clock,
            events,
            catalog,
            pki,
            vault,
            exports: Arc::clone(&exports),
            views,
            takeovers,
            restores,
            ownership,
            watch: Watch::default(),
            device,
            start_alerts,
            links: Arc::clone(&links),
            box_name: config.box_name,
            data_dir: config.data,
            listen,
            nbd_listen: nbd.as_ref().map(|(_, at)| *at),
            web_listen: web.as_ref().map(|web| web.at),
            accounts: Arc::new(accounts),
            audit,
            audit_alert: Mutex::new(None),
            stop,
        });
        let mut tasks = vec![
            tokio::spawn(links.serve(agents)),
            tokio::spawn(api::serve_control(Arc::clone(&app), control_listener)),
            tokio::spawn(export_ingest_groups(Arc::clone(&app))),
            tokio::spawn(balance(Arc::clone(&app))),
            tokio::spawn(close_idle_views(Arc::clone(&app))),
            tokio::spawn(look_after_machines(Arc::clone(&app))),
        ];
        if let Some((listener, _)) = nbd {
            tasks.push(tokio::spawn(exports.serve_tls(listener, nbd_tls)));
        }
        if let Some(Pages { listener, certificate, tls, .. }) = web {
            tasks.push(tokio::spawn(face::serve(Arc::clone(&app), listener, certificate, tls)));
        }
        let metrics_at = metrics.as_ref().map(|(_, at)| *at);
        if let Some((listener, _)) = metrics {
            tasks.push(tokio::spawn(api::serve_metrics(Arc::clone(&app), listener, token)));
        }
        // What the plans want is known before a run goes on; an agent that asks sooner is answered by what is stored.
        let settling = Arc::clone(&app);
        let _ = tokio::task::spawn_blocking(move || settling.takeovers.settle(&settling)).await;
        app.takeovers.go_on(&app);
        app.restores.go_on(&app);
        app.watch.start(&app).map_err(StartError::Thread)?;
        app.events.note(Event::Started, &app.box_name, format!("version {}", env!("CARGO_PKG_VERSION")));
        Ok(Self { app, control, metrics: metrics_at, tasks, reads, _lock: lock })
    }

    pub fn listen(&self) -> SocketAddr {
        self.app.listen
    }
    pub fn nbd_listen(&self) -> Option<SocketAddr> {
        self.app.nbd_listen
    }
    pub fn web_listen(&self) -> Option<SocketAddr> {
        self.app.web_listen
    }

    /// Stops in good order: sessions are told, everything taken is durable, threads are joined.
    pub async fn stop(self) {
        self.app.events.note(Event::Stopping, &self.app.box_name, "");
        self.app.takeovers.ask_pause();
        self.app.stop.send_replace(true);
        for task in self.tasks {
            let _ = task.await;
        }
        // Their machines run on, and wait for the next daemon.
        let app = Arc::clone(&self.app);
        let _ = tokio::task::spawn_blocking(move || {
            app.watch.join();
            app.takeovers.pause();
            app.restores.pause();
        })
        .await;
        for view in self.app.views.list() {
            self.app.views.close(&view.id);
        }
        let (vault, reads) = (Arc::clone(&self.app.vault), self.reads);
        let closed = tokio::task::spawn_blocking(move || {
            vault.close();
            reads.stop();
        });
        let _ = closed.await;
        let _ = std::fs::remove_file(&self.control);
    }
}

/// The listener of the pages, and what they show themselves with.
struct Pages {
    listener: TcpListener,
    at: SocketAddr,
    certificate: Arc<face::Certificate>,
    tls: Arc<rustls::ServerConfig>,
}

async fn pages(config: &Config, pki: &Pki, clock: Clock) -> Result<Option<Pages>, StartError> {
    let Some((listener, at)) = bind_wanted("pages", config.web_listen).await? else { return Ok(None) };
    let (dir, names) = (config.data.join("ca"), config.names.clone());
    let certificate = face::Certificate::open(pki, dir, names, at, clock.wall_us())?;
    let tls = certificate.config()?;
    Ok(Some(Pages { listener, at, certificate, tls }))
}

async fn bind_wanted(
    what: &'static str,
    at: Option<SocketAddr>,
) -> Result<Option<(TcpListener, SocketAddr)>, StartError> {
    match at {
        Some(at) => bind(what, at).await.map(Some),
        None => Ok(None),
    }
}

struct Opened {
    lock: Lock,
    catalog: Arc<Catalog>,
    pki: Arc<Pki>,
    reads: Arc<ReadPool>,
    vault: Arc<Vault>,
    token: String,
    device: Device,
    start_alerts: Vec<String>,
    takeovers: Takeovers,
    restores: Restores,
    ownership: Arc<Ownership>,
    accounts: Accounts,
    audit: Audit,
}

/// Everything that touches the disk. Blocking.
fn open(config: &Config, clock: Clock, events: &Arc<Events>) -> Result<Opened, StartError> {
    files::private_dir(&config.data)?;
    files::private_dir(&config.run)?;
    files::private_dir(&config.nbd_dir())?;
    let lock = files::lock(&config.data)?;
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(&config.data).map_err(StartError::Disk)?);
    disk.cleanup(Path::new("")).map_err(StartError::Disk)?;
    let catalog_error = |source| StartError::Catalog { data: config.data.clone(), source };
    let (catalog, fault) = Catalog::open(Arc::clone(&disk)).map_err(catalog_error)?;
    let mut start_alerts = Vec::new();
    if let Some(fault) = fault {
        events.note(Event::CopyDamaged, "catalog", &fault);
        start_alerts.push(format!(
            "one of the two copies of the box's catalogue was damaged at start ({fault}); the other one was used, and the next change \
             writes both anew: check the disk"
        ));
    }
    let device = device::look(&config.data, &*disk, events);
    let catalog = Arc::new(catalog);
    let hosts = catalog.data().hosts.len();
    let pki = Arc::new(Pki::open(&config.data.join("ca"), &config.names, hosts, clock.wall_us())?);
    let token = metrics_token(&config.data)?;
    sweep_sockets(&config.nbd_dir());
    let reads = Arc::new(ReadPool::start(events).map_err(StartError::Thread)?);
    let vault = Vault::start(VaultParts {
        root: config.data.clone(),
        disk: Arc::clone(&disk),
        journal: config.journal.clone(),
        clock,
        events: Arc::clone(events),
        catalog: Arc::clone(&catalog),
        reads: Arc::clone(&reads),
    })?;
    let mut unreadable = Vec::new();
    let takeovers = Takeovers::open(&config.data, &mut unreadable)?;
    start_alerts.extend(
        unreadable.into_iter().map(|file| format!("a takeover's state cannot be read and is left alone: {file}")),
    );
    let mut unreadable = Vec::new();
    let restores = Restores::open(&config.data, &mut unreadable)?;
    start_alerts.extend(
        unreadable.into_iter().map(|file| format!("a restore's state cannot be read and is left alone: {file}")),
    );
    let ownership = Ownership::open(disk, Arc::clone(events), Arc::clone(&catalog), clock).map_err(StartError::Disk)?;
    let ownership = Arc::new(ownership);
    let (accounts, audit) = face::open(&config.data, clock.wall_us())?;
    Ok(Opened {
        lock,
        catalog,
        pki,
        reads,
        vault,
        token,
        device,
        start_alerts,
        takeovers,
        restores,
        ownership,
        accounts,
        audit,
    })
}

fn metrics_token(data: &Path) -> Result<String, StartError> {
    let path = data.join("metrics.token");
    if let Some(token) = files::read_small(&path)?
        && let Ok(token) = String::from_utf8(token)
        && token.trim().len() >= 32
    {
        return Ok(token.trim().to_owned());
    }
    let token = HEXLOWER.encode(&pki::random_128().ok_or(StartError::Random)?);
    files::write_secret(&path, format!("{token}\n").as_bytes())?;
    Ok(token)
}

/// Removes sockets that a killed daemon left: whoever finds one must find somebody behind it.
fn sweep_sockets(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(".sock") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

async fn bind(what: &'static str, at: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { what, at: at.to_string(), source };
    let listener = TcpListener::bind(at).await.map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    Ok((listener, at))
}

fn bind_unix(path: &Path) -> Result<UnixListener, StartError> {
    let _ = std::fs::remove_file(path); // the lock is ours: nobody is behind it
    let failed = |source| StartError::Listen { what: "the control socket", at: path.display().to_string(), source };
    let listener = UnixListener::bind(path).map_err(failed)?;
    files::make_private(path)?;
    Ok(listener)
}

/// A machine that serves in a host's place and ends must not go unnoticed.
async fn look_after_machines(app: Arc<App>) {
    let mut stop = app.stop.subscribe();
    loop {
        tokio::select! {
            () = tokio::time::sleep(MACHINES_EVERY) => {
                app.takeovers.look_after(&app);
                let due = Arc::clone(&app);
                let look = move || {
                    due.takeovers.drill_what_is_due(&due);
                    due.takeovers.follow(&due);
                };
                let _ = tokio::task::spawn_blocking(look).await;
            }
            () = crate::raised(&mut stop) => return,
        }
    }
}

/// Exports the volumes of ingest groups as soon as their journals are open and say what those are.
async fn export_ingest_groups(app: Arc<App>) {
    let mut stop = app.stop.subscribe();
    loop {
        let mut waiting = false;
        for group in app.vault.groups().iter().filter(|g| g.shared.host.is_none()) {
            if !app.exports.of_group(group.id()).is_empty() || app.takeovers.is_sealed(group.id()) {
                continue;
            }
            match group.shared.phase() {
                Phase::Opening => waiting = true,
                Phase::Running(_) => {
                    let volumes = group.shared.spec().volumes;
                    if let Err(e) = app.exports.add_ingest(group, &volumes, app.nbd_listen.is_some()) {
                        app.events.note(Event::JobFailed, group.name(), crate::chain(&e));
                    }
                    // Deleted or closed while this loop looked at it.
                    if app.vault.get(group.id()).is_none() || app.takeovers.is_sealed(group.id()) {
                        app.exports.remove_group(group.id());
                    }
                }
                Phase::Stopped { .. } | Phase::Closed => {}
            }
        }
        let pause = if waiting { EXPORT_EVERY } else { Duration::from_secs(1) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = crate::raised(&mut stop) => return,
        }
    }
}

/// Closes views that nobody has had open for longer than they were given.
async fn close_idle_views(app: Arc<App>) {
    let mut stop = app.stop.subscribe();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EXPIRE_EVERY) => app.views.close_idle(),
            () = crate::raised(&mut stop) => return,
        }
    }
}

/// Shares the disk's room among the groups.
async fn balance(app: Arc<App>) {
    let mut stop = app.stop.subscribe();
    loop {
        tokio::select! {
            () = tokio::time::sleep(BALANCE_EVERY) => {}
            () = app.vault.room_wanted() => tokio::time::sleep(BALANCE_PAUSE).await,
            () = crate::raised(&mut stop) => return,
        }
        let vault = Arc::clone(&app.vault);
        let _ = tokio::task::spawn_blocking(move || vault.balance()).await;
    }
}
