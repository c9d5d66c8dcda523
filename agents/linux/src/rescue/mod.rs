//! A machine that waits for its disks' content: `holdfast-agent rescue`, from any live Linux or initramfs.
//!
//! It enrols, connects, says what disks there are, and does what a restore of the box's asks ([`replication::restore`]). Nothing is captured and
//! nothing is kept: the identity lies in a directory that should be a tmpfs, so that an agent that is killed can be started again without
//! another token; after a reboot the machine is another host.
//!
//! ```text
//! main thread    connection, heartbeats, restore::Target ──▶ jobs ──▶ disk thread    (see `disks`)
//!                                                        ◀── events ◀──
//! ```
//!
//! **What it writes.** Whole disks, named by the box after its operator mapped them; never one that is mounted, swapped to, or has anything of the
//! device mapper or md on it; never one that is smaller than what comes; with `--allow`, none but those. Each is opened with
//! `O_EXCL`, so nothing can begin to use it meanwhile.
//!
//! **Standing by.** An agent whose configuration has `[standby]` disks offers these, and no others, beside its own work for as long as it runs
//! ([`stand_by`]); it never starts its host anew.
//!
//! **Reboot.** Only when the box says so after a restore, and only when everything is durable and the disks are closed.

mod disks;

pub use disks::{Chosen, list, refusal};

use crate::{
    enrol,
    link::{Conn, LinkError, Peer, Wake, Who},
    state::{self, StateDir, StateError},
    tls,
};
use disks::{Job, Worker};
use indicatif::{ProgressBar, ProgressStyle};
use replication::restore::{Target, TargetAction, TargetConfig, TargetEvent};
use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};
use wire::{
    FrameHeader, FrameKind, Message, MessageError, Purpose, RefuseCode, RestoreProgress, TargetDisk, VERSION_RESTORE,
    decode_message,
};

const HANDSHAKE: Duration = Duration::from_secs(15);
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked for disks that came or went.
const LIST_EVERY: Duration = Duration::from_secs(5);
/// A box that answers no heartbeat for this long is gone.
const SILENCE: Duration = Duration::from_secs(15);
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// After a refusal that will not go away by itself.
const BACKOFF_REFUSED: Duration = Duration::from_secs(15);

/// What the operator chose.
pub struct Options {
    pub box_address: String,
    pub token: String,
    pub name: String,
    /// Nodes of the disks that may be written; empty: any.
    pub allow: Vec<String>,
    pub reboot: bool,
    /// For the identity; a tmpfs.
    pub dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Enrol(#[from] enrol::EnrolError),
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error(transparent)]
    Disks(#[from] crate::disks::DisksError),
    #[error("could not start the thread of the disks")]
    Thread(#[source] io::Error),
    #[error("the system gave no random bytes")]
    Random(#[source] io::Error),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Rules(#[from] replication::restore::TargetError),
    #[error("the box speaks version {0} and cannot restore a machine: update it")]
    Version(u16),
    #[error("the box answered nothing for {} s", SILENCE.as_secs())]
    Silent,
    #[error("the box sent a {0}, which has no business here")]
    OutOfPlace(&'static str),
}

/// Waits for restores and does them, until the machine is rebooted or the process is ended.
pub fn run(options: &Options) -> Result<std::convert::Infallible, RescueError> {
    let state = StateDir::open(&options.dir, &options.dir)?;
    let _lock = state.lock()?;
    let identity = match state.identity() {
        Ok(identity) if identity.box_address == options.box_address => identity,
        Ok(_) | Err(StateError::NotEnrolled) => {
            enrol::enrol(&state, &options.box_address, &options.token, &options.name)?
        }
        Err(e) => return Err(e.into()),
    };
    let pem = state.host_pem()?;
    let config = tls::session_config(&state.read("ca.pem")?, &pem.certificate, &pem.key)?;
    let instance = state::random_128().map_err(RescueError::Random)?;
    let who = Who { host: identity.host, boot_id: state::boot_id(), instance };
    let chosen = Chosen { allow: options.allow.clone(), named_only: false };
    let here = list(&chosen)?;
    println!("this machine is restore target {:?} of the box at {}; its disks:", options.name, options.box_address);
    here.iter().for_each(|disk| println!("  {}", disks::line(disk)));
    println!("on the box: `holdfast restore targets`, then `holdfast restore GROUP --to` the name it shows");
    let rescue = Rescue::new(chosen, Screen::new(), options.reboot).map_err(RescueError::Thread)?;
    rescue.connect_for_ever(&options.box_address, || Arc::clone(&config), &who)
}

/// Offers these disks of a host that stands by for others, in a thread of its own, for as long as the process runs. None: nothing is offered.
pub fn stand_by(peer: Peer, disks: Vec<String>) -> io::Result<()> {
    if disks.is_empty() {
        return Ok(());
    }
    let chosen = Chosen { allow: disks, named_only: true };
    let rescue = Rescue::new(chosen, Screen::log(), false)?;
    let run = move || {
        let config = || match peer.config.lock() {
            Ok(config) => Arc::clone(&config),
            Err(poisoned) => Arc::clone(&poisoned.into_inner()),
        };
        let Err(e) = rescue.connect_for_ever(&peer.address, config, &peer.who);
        tracing::error!(error = %crate::error_chain(&e), "this host stands by no more");
    };
    std::thread::Builder::new().name("standby".to_owned()).spawn(run).map(drop)
}

impl Rescue {
    fn new(chosen: Chosen, screen: Screen, reboot: bool) -> io::Result<Self> {
        let wake = Arc::new(Wake::new()?);
        let (events, heard) = mpsc::channel();
        let worker = Worker::start(chosen.clone(), events, Arc::clone(&wake))?;
        let target = Target::new(TargetConfig::default());
        Ok(Self { target, worker, heard, wake, chosen, generation: 0, payload: None, screen, reboot })
    }

    fn connect_for_ever(
        mut self,
        address: &str,
        config: impl Fn() -> Arc<rustls::ClientConfig>,
        who: &Who,
    ) -> Result<std::convert::Infallible, RescueError> {
        let rescue = &mut self;
        let mut pause = BACKOFF_MIN;
        loop {
            let begun = Instant::now();
            let ended = rescue.session(address, config(), who);
            rescue.drop_connection();
            let Err(e) = ended;
            if begun.elapsed() > Duration::from_secs(30) {
                pause = BACKOFF_MIN;
            }
            // What may go away by itself is tried soon again; an identity that a dead agent of ours still has is one of these.
            let lasting = matches!(&e, SessionError::Link(e) if e.lasting());
            let wait = if lasting { BACKOFF_REFUSED } else { pause };
            rescue.screen.say(&format!(
                "not connected: {}; again in {:.1} s",
                crate::error_chain(&e),
                wait.as_secs_f32()
            ));
            std::thread::sleep(wait);
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }
}

struct Rescue {
    target: Target,
    worker: Worker,
    heard: mpsc::Receiver<(u64, TargetEvent)>,
    wake: Arc<Wake>,
    chosen: Chosen,
    /// Of the connection: what the disks answer to an earlier one is of no interest.
    generation: u64,
    /// Of the record that is being judged.
    payload: Option<(FrameHeader, Vec<u8>)>,
    screen: Screen,
    reboot: bool,
}

impl Rescue {
    fn session(
        &mut self,
        address: &str,
        config: Arc<rustls::ClientConfig>,
        who: &Who,
    ) -> Result<std::convert::Infallible, SessionError> {
        let deadline = Instant::now() + HANDSHAKE;
        let mut conn = Conn::open(address, config, deadline)?;
        let (box_name, version) = conn.hello(who, Purpose::Restore, deadline)?;
        if version < VERSION_RESTORE {
            return Err(SessionError::Version(version));
        }
        conn.take_records();
        self.screen.say(&format!("connected to {box_name}; waiting for a restore"));
        let mut told: Vec<TargetDisk> = Vec::new();
        let (mut next_list, mut next_beat, mut beats) = (Instant::now(), Instant::now(), 0);
        let mut last_heard = Instant::now();
        loop {
            let now = Instant::now();
            // While a restore has the disks they do not change; they are looked at again when it has let go.
            if now >= next_list && self.target.restore().is_none() {
                next_list = now + LIST_EVERY;
                let here = list(&self.chosen).unwrap_or_default();
                if here != told || beats == 0 {
                    conn.stage(&Message::RestoreDisks(here.clone()))?;
                    told = here;
                }
            }
            if now >= next_beat {
                next_beat = now + BEAT_EVERY;
                beats += 1;
                conn.stage(&Message::Heartbeat { number: beats, mono_ns: 0 })?;
            }
            if now.duration_since(last_heard) >= SILENCE {
                return Err(SessionError::Silent);
            }
            conn.step(None, Some(&self.wake))?;
            while let Some((header, payload)) = conn.next_frame()? {
                last_heard = Instant::now();
                self.frame(&mut conn, header, payload)?;
            }
            while let Ok((generation, event)) = self.heard.try_recv() {
                if generation == self.generation {
                    self.event(&mut conn, event)?;
                }
            }
        }
    }

    fn frame(&mut self, conn: &mut Conn, header: FrameHeader, payload: Vec<u8>) -> Result<(), SessionError> {
        let event = match header.kind {
            FrameKind::Record(_) => {
                self.payload = Some((header, payload));
                TargetEvent::Record(header)
            }
            FrameKind::Ack => return Err(SessionError::OutOfPlace("ack")),
            FrameKind::Message => match decode_message(&header, &payload)? {
                Message::HeartbeatAck { .. } => return Ok(()),
                Message::Refuse(refusal) => return Err(LinkError::Refused(refusal).into()),
                Message::RestoreOpen { restore, disks } => {
                    for disk in &disks {
                        self.screen.say(&format!(
                            "restore {restore}: {} of {} is going to be written",
                            model::ByteLen(disk.sectors.bytes()),
                            disk.path
                        ));
                    }
                    TargetEvent::Open { restore, disks }
                }
                Message::RestoreLook(look) => TargetEvent::Look(look),
                Message::RestoreFetch { id, disk, extent } => TargetEvent::Fetch { id, disk, extent },
                Message::RestoreEnd { restore, reboot } => TargetEvent::End { restore, reboot },
                Message::RestoreProgress(progress) => {
                    self.screen.show(&progress);
                    return Ok(());
                }
                other => return Err(SessionError::OutOfPlace(other.name())),
            },
        };
        self.event(conn, event)
    }

    fn event(&mut self, conn: &mut Conn, event: TargetEvent) -> Result<(), SessionError> {
        let mut out = Vec::new();
        let done = self.target.on(event, &mut out);
        for action in out {
            self.act(Some(conn), action)?;
        }
        if let Err(e) = done {
            // The box learns why; what becomes of it is no longer of interest.
            let _ = conn.stage(&Message::refuse(RefuseCode::OutOfPlace, e.to_string()));
            conn.close();
            return Err(e.into());
        }
        Ok(())
    }

    fn act(&mut self, conn: Option<&mut Conn>, action: TargetAction) -> Result<(), SessionError> {
        let job = match action {
            TargetAction::Open { disks } => Job::Open(disks),
            TargetAction::Hash(look) => Job::Hash(look),
            TargetAction::Read { id, disk, extent } => Job::Read { id, disk, extent },
            TargetAction::Write { seq } => match self.payload.take().filter(|(header, _)| header.seq == seq) {
                Some((header, payload)) => Job::Write { header, payload },
                None => return Ok(()),
            },
            TargetAction::Sync { seq } => Job::Sync { seq },
            TargetAction::Close => Job::Close,
            TargetAction::Say(message) => {
                if let Some(text) = said(&message) {
                    self.screen.say(&text);
                }
                return conn.map_or(Ok(()), |conn| Ok(conn.stage(&message)?));
            }
            TargetAction::Ack(ack) => {
                let mut bytes = Vec::new();
                ack.encode(&mut bytes);
                return conn.map_or(Ok(()), |conn| Ok(conn.stage_bytes(&bytes)?));
            }
            TargetAction::Reboot => {
                self.start_anew(conn);
                return Ok(());
            }
        };
        self.worker.push(self.generation, job);
        Ok(())
    }

    /// The disks are let go; what was on its way to them is still written.
    fn drop_connection(&mut self) {
        let mut out = Vec::new();
        let _ = self.target.on(TargetEvent::Disconnected, &mut out);
        for action in out {
            let _ = self.act(None, action);
        }
        self.payload = None;
        self.generation += 1;
    }

    fn start_anew(&mut self, conn: Option<&mut Conn>) {
        if !self.reboot {
            return self.screen.say("the machine would be started anew now; --no-reboot keeps it running");
        }
        self.screen.say("the machine is started anew");
        if let Some(conn) = conn {
            // The answer goes out; the box takes the end of the connection for one too.
            conn.close();
        }
        // SAFETY: no preconditions; what other disks hold in memory is written first.
        unsafe {
            libc::sync();
            libc::reboot(libc::RB_AUTOBOOT);
        }
        self.screen.say("the kernel did not start the machine anew: do it by hand");
    }
}

/// What of the answers the operator at the machine is told.
fn said(message: &Message) -> Option<String> {
    match message {
        Message::RestoreOpened { restore, refused: Some(why), .. } => {
            Some(format!("restore {restore} is refused: {why}"))
        }
        Message::RestoreFailed { restore, text } => Some(format!("restore {restore} failed: {text}")),
        Message::RestoreEnded { restore } => Some(format!("restore {restore} has let the disks go")),
        _ => None,
    }
}

/// What the operator sees: a bar on a terminal, lines elsewhere.
struct Screen {
    bar: Option<ProgressBar>,
    doing: String,
    /// There is none: what happens goes to the agent's log.
    log: bool,
}

impl Screen {
    fn new() -> Self {
        Self { bar: None, doing: String::new(), log: false }
    }
    fn log() -> Self {
        Self { log: true, ..Self::new() }
    }
    fn say(&mut self, text: &str) {
        match &self.bar {
            _ if self.log => tracing::info!("standby: {text}"),
            Some(bar) => bar.println(text),
            None => println!("{text}"),
        }
    }
    fn show(&mut self, progress: &RestoreProgress) {
        if self.log || !io::stderr().is_terminal() {
            if self.log {
                return;
            }
            if self.doing != progress.doing {
                self.doing.clone_from(&progress.doing);
                println!("{} ({} of {})", progress.doing, progress.done_bytes, progress.total_bytes);
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_length(progress.total_bytes.0);
        bar.set_position(progress.done_bytes.0);
        bar.set_message(format!("{}, {} sent", progress.doing, progress.shipped_bytes));
    }
}
