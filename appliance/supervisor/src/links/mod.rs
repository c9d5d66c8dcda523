//! Agents' connections: one TLS port for enrolment, control and streams.
//!
//! ```text
//! accept ─▶ ClientHello ─┬ ALPN enrol       ─▶ TLS without client certificate ─▶ enrol
//!                        └ ALPN replication ─▶ TLS with client certificate ─▶ host known, not revoked ─▶ Hello ─▶ session
//!                                                                                                  control ┴ stream ┴ restore
//! ```
//!
//! **One identity, one agent.** A host's sessions belong to the instance that opened the first of them. Another instance is refused by
//! name while the first is heard ([`Sessions::claim`]), and the fact is an event: a cloned machine, or a stolen key. The same
//! instance coming again replaces its older connection, which is then half-open. An instance silent for the timeout loses
//! its claim.
//!
//! **Limits.** [`HANDSHAKES_MAX`] connections that nobody knows yet, for [`HANDSHAKE_LIMIT`] each; [`CONNECTIONS_MAX`] known ones;
//! [`SESSIONS_PER_HOST_MAX`] of one host. A connection that says nothing for the heartbeat timeout is closed.

mod control;
mod enrol;
mod fencing;
pub mod frames;
pub mod lane;
mod restore;
mod sessions;
mod stream;

pub use control::{CommandError, risk_of};
pub use lane::{Inbound, LinkLane};
pub use restore::{Follower, FromTarget, TargetInfo, Targets};
use sessions::Sessions;

use crate::{
    catalog::Catalog,
    clock::Clock,
    events::{Event, Events},
    ownership::Ownership,
    pki::{self, Peer, Pki},
    vault::Vault,
    watch::Ears,
};
use frames::{LinkError, Talk};
use model::HostId;
use rustls::ServerConfig;
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use wire::{ALPN_ENROL, ALPN_REPLICATION, Message, PROTOCOL_VERSIONS, Purpose, Refusal, RefuseCode, negotiate};

/// Connections that have not shown who they are.
pub const HANDSHAKES_MAX: usize = 128;
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Control and stream connections of all hosts.
pub const CONNECTIONS_MAX: usize = 2048;
/// Control and one for each group.
pub const SESSIONS_PER_HOST_MAX: usize = 64;
/// How long a refusal may take to be sent.
pub const REFUSE_LIMIT: Duration = Duration::from_secs(2);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

type Tls = TlsStream<TcpStream>;

/// Everything the connections share.
pub struct Links {
    pub catalog: Arc<Catalog>,
    pub pki: Arc<Pki>,
    pub vault: Arc<Vault>,
    pub events: Arc<Events>,
    pub ownership: Arc<Ownership>,
    pub ears: Arc<Ears>,
    pub clock: Clock,
    pub box_name: String,
    pub silence_ms: u64,
    /// For all that must happen before a peer is known.
    handshake_limit: Duration,
    sessions: Sessions,
    pub hosts: control::Hosts,
    pub targets: Targets,
    enrol: Arc<ServerConfig>,
    replication: Arc<ServerConfig>,
    handshakes: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

/// What [`Links`] is made from.
pub struct LinkParts {
    pub catalog: Arc<Catalog>,
    pub pki: Arc<Pki>,
    pub vault: Arc<Vault>,
    pub events: Arc<Events>,
    pub ownership: Arc<Ownership>,
    pub ears: Arc<Ears>,
    pub clock: Clock,
    pub box_name: String,
    pub silence_ms: u64,
    pub stop: watch::Receiver<bool>,
}

/// A host's agent, known by its certificate.
#[derive(Clone, Debug)]
struct Agent {
    host: HostId,
    name: String,
    from: SocketAddr,
}

impl Agent {
    fn subject(&self) -> String {
        format!("{} at {}", self.name, self.from)
    }
}

impl Links {
    pub fn new(parts: LinkParts) -> Result<Arc<Self>, pki::PkiError> {
        let LinkParts { catalog, pki, vault, events, ownership, ears, clock, box_name, silence_ms, stop } = parts;
        let (enrol, replication) = (pki.enrol_config()?, pki.session_config()?);
        Ok(Arc::new(Self {
            catalog,
            pki,
            vault,
            events,
            ownership,
            ears,
            clock,
            box_name,
            silence_ms,
            handshake_limit: HANDSHAKE_LIMIT.min(Duration::from_millis(silence_ms)),
            sessions: Sessions::default(),
            hosts: control::Hosts::default(),
            targets: Targets::default(),
            enrol,
            replication,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            stop,
        }))
    }

    /// Accepts until the daemon stops.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
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
            let Ok(slot) = Arc::clone(&self.handshakes).try_acquire_owned() else {
                self.events.note(Event::ConnectionLimit, from, "too many connections that have not shown who they are");
                continue;
            };
            let _ = tcp.set_nodelay(true);
            let links = Arc::clone(&self);
            tokio::spawn(async move {
                let mut stop = links.stop.clone();
                tokio::select! {
                    () = Arc::clone(&links).connection(tcp, from, slot) => {}
                    // A session ends by itself with a word to the agent; this ends what is still shaking hands.
                    () = async {
                        crate::raised(&mut stop).await;
                        tokio::time::sleep(REFUSE_LIMIT).await;
                    } => {}
                }
            });
        }
    }

    async fn connection(self: Arc<Self>, tcp: TcpStream, from: SocketAddr, slot: OwnedSemaphorePermit) {
        let shaken = timeout(self.handshake_limit, self.shake_hands(tcp)).await;
        let (tls, enrolling) = match shaken {
            Ok(Ok(done)) => done,
            Ok(Err(e)) => return self.events.note(Event::HandshakeFailed, from, e),
            Err(_) => return self.events.note(Event::HandshakeFailed, from, "not finished in time"),
        };
        if enrolling {
            // Still nobody: the slot is kept.
            return enrol::serve(&self, Talk::new(tls), from).await;
        }
        let certificate = tls.get_ref().1.peer_certificates().and_then(|c| c.first()).and_then(|c| pki::peer_of(c));
        let Some(Peer::Host { id, serial }) = certificate else {
            return self.events.note(Event::HandshakeFailed, from, "the certificate is not one of a host");
        };
        let mut talk = Talk::new(tls);
        let agent = match self.known(id, &serial, from) {
            Ok(agent) => agent,
            Err(refusal) => {
                self.events.note(Event::HostRefused, format!("{id} at {from}"), &refusal);
                return talk.refuse(refusal).await;
            }
        };
        let Ok(_connection) = Arc::clone(&self.connections).try_acquire_owned() else {
            self.events.note(Event::ConnectionLimit, agent.subject(), "too many connections");
            return talk.refuse(refusal(RefuseCode::Busy, "too many connections")).await;
        };
        drop(slot);
        if let Err(e) = self.session(&mut talk, &agent).await {
            self.note_error(&agent.subject(), &e);
            if e.is_hostile() {
                talk.refuse(refusal(RefuseCode::BadFrame, crate::chain(&e))).await;
            }
        }
    }

    /// TLS, after a look at what the client wants. True: it wants to enrol.
    async fn shake_hands(&self, tcp: TcpStream) -> io::Result<(Tls, bool)> {
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp).await?;
        let wants = |protocol: &[u8]| hello.client_hello().alpn().is_some_and(|mut a| a.any(|p| p == protocol));
        let (config, enrolling) = match () {
            () if wants(ALPN_REPLICATION) => (&self.replication, false),
            () if wants(ALPN_ENROL) => (&self.enrol, true),
            () => return Err(io::Error::other("the client names no protocol of ours (ALPN)")),
        };
        Ok((hello.into_stream(Arc::clone(config)).await?, enrolling))
    }

    /// The host of a verified certificate, if it is still welcome. Asked at every accept.
    fn known(&self, id: HostId, serial: &str, from: SocketAddr) -> Result<Agent, Refusal> {
        let data = self.catalog.data();
        let Some(host) = data.host(id) else {
            return Err(refusal(RefuseCode::UnknownHost, "this box does not know the host any more; enrol it again"));
        };
        if host.revoked_us.is_some() {
            return Err(refusal(RefuseCode::Revoked, "the host was revoked; enrol it again with a new token"));
        }
        if !host.serials.iter().any(|s| s == serial) {
            return Err(refusal(
                RefuseCode::UnknownHost,
                "this certificate is not one the box made for the host; enrol it again",
            ));
        }
        Ok(Agent { host: id, name: host.name.clone(), from })
    }

    async fn session(self: &Arc<Self>, talk: &mut Talk<Tls>, agent: &Agent) -> Result<(), LinkError> {
        let Some(hello) = self.hello(talk).await? else { return Ok(()) };
        if hello.host != agent.host {
            let text = "the host named is not the one in the certificate";
            self.events.note(Event::FrameRefused, agent.subject(), text);
            talk.refuse(refusal(RefuseCode::BadRequest, text)).await;
            return Ok(());
        }
        if hello.purpose == Purpose::Enrol {
            talk.refuse(refusal(RefuseCode::OutOfPlace, "enrolment has its own protocol (ALPN)")).await;
            return Ok(());
        }
        let now = self.clock.mono();
        let claimed = self.sessions.claim(agent.host, hello.purpose, hello.instance, now, self.silence_ms);
        let session = match claimed {
            Ok(session) => session.heard_for(self.ears.connected(agent.host, agent.from.ip(), now)),
            Err(e) => {
                let code = match e {
                    sessions::ClaimError::Duplicate { .. } => {
                        self.events.note(Event::DuplicateAgent, agent.subject(), &e);
                        RefuseCode::Duplicate
                    }
                    sessions::ClaimError::TooMany(_) => RefuseCode::Busy,
                };
                talk.refuse(refusal(code, e.to_string())).await;
                return Ok(());
            }
        };
        if session.replaced {
            self.events.note(Event::SessionReplaced, agent.subject(), "the same agent connected again");
        }
        // Between the look at the catalogue and the claim the host may have been revoked; from here on a revocation finds the claim.
        if self.catalog.data().host(agent.host).is_none_or(|h| h.revoked_us.is_some()) {
            talk.refuse(refusal(RefuseCode::Revoked, "the host was revoked")).await;
            return Ok(());
        }
        talk.say(&self.hello_ack(hello.version)).await?;
        match hello.purpose {
            Purpose::Control => control::serve(self, talk, agent, &session, &hello).await,
            Purpose::Stream { group } => stream::serve(self, talk, agent, &session, group).await,
            Purpose::Restore => restore::serve(self, talk, agent, &session, hello.instance).await,
            Purpose::Enrol => Ok(()),
        }
    }

    /// The first message of every connection. None: the peer left, or was refused.
    async fn hello<S>(&self, talk: &mut Talk<S>) -> Result<Option<Hello>, LinkError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let heard = timeout(self.handshake_limit, talk.hear()).await;
        match heard.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
            None => Ok(None),
            Some(Message::Hello { versions, agent_version, host, instance, purpose, boot_id: _ }) => {
                match negotiate(&versions) {
                    Some(version) => Ok(Some(Hello { version, agent_version, host, instance, purpose })),
                    None => {
                        let text = format!("the agent speaks versions {versions:?}, this box {PROTOCOL_VERSIONS:?}");
                        talk.refuse(refusal(RefuseCode::Version, text)).await;
                        Ok(None)
                    }
                }
            }
            Some(other) => {
                talk.refuse(refusal(RefuseCode::OutOfPlace, format!("a {} where Hello is expected", other.name())))
                    .await;
                Ok(None)
            }
        }
    }

    fn hello_ack(&self, version: u16) -> Message {
        Message::HelloAck {
            version,
            box_name: self.box_name.clone(),
            box_version: env!("CARGO_PKG_VERSION").to_owned(),
            now_wall_us: self.clock.wall_us(),
        }
    }

    fn note_error(&self, subject: &str, e: &LinkError) {
        let event = if e.is_hostile() { Event::FrameRefused } else { Event::HostDisconnected };
        self.events.note(event, subject, crate::chain(e));
    }

    /// Ends all sessions of a host at once.
    pub fn cut(&self, host: HostId, code: RefuseCode, text: &str) {
        self.sessions.cut(host, &refusal(code, text));
    }

    pub fn connected(&self) -> usize {
        CONNECTIONS_MAX - self.connections.available_permits()
    }
    /// Marks that something was heard.
    fn heard(&self, session: &sessions::Session) {
        let now = self.clock.mono();
        session.heard.store(now.0, Ordering::Relaxed);
        session.host_heard.store(now.0, Ordering::Relaxed);
    }
}

struct Hello {
    version: u16,
    agent_version: String,
    host: HostId,
    instance: [u8; 16],
    purpose: Purpose,
}

fn refusal(code: RefuseCode, text: impl Into<String>) -> Refusal {
    Refusal { code, text: text.into() }
}
