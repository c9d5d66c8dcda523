//! A connection to the box: one thread that dials, shakes hands, sends and receives, and begins again when it is cut.
//!
//! The thread knows frames and nothing of what they mean; the engine decides. Between the two: a queue to the thread (records are bounded by
//! the credit and the spool, messages by the engine's own pace) and the engine's bounded inbox. What was queued for one connection is
//! never sent on the next: each has a generation.
//!
//! The socket does not block and one `poll` waits for it and for the queue. Every step before the connection is up has one deadline, so a
//! box that drips bytes cannot hold the thread. What the box may send is bounded before it is read: acks, and messages of at most
//! 64 KiB; records are refused.

use crate::{
    net::{self, DialError},
    spool::{Body, Scratch},
    tls,
};
use model::{Codec, GroupId, HostId, RecordKind, SourceSeq};
use replication::Numbered;
use rustls::{ClientConfig, ClientConnection};
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use wire::{
    Ack, AckError, FrameError, FrameHeader, FrameKind, HEADER_LEN, MAX_MESSAGE, Message, MessageError,
    PROTOCOL_VERSIONS, Packer, PayloadError, Purpose, Refusal, RefuseCode, crc32, decode_header, decode_message,
    encode_header, encode_message,
};

/// From dialling to `HelloAck`.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// Plain bytes are handed to TLS up to here; more waits in the queue.
const STAGED_MAX: usize = 512 << 10;
const BACKOFF_MIN_MS: u64 = 500;
/// A box that is back is found within this, and as long an agent knows nothing of it; a thousand hosts are two hundred greetings a
/// second then, which it can bear.
const BACKOFF_MAX_MS: u64 = 5_000;
/// After a refusal that will not go away by itself.
const BACKOFF_REFUSED_MS: u64 = 60_000;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("could not set up TLS")]
    Setup(#[source] rustls::Error),
    #[error("TLS with the box failed")]
    Tls(#[source] rustls::Error),
    #[error("the connection to the box broke")]
    Io(#[source] io::Error),
    #[error("the box closed the connection")]
    Closed,
    #[error("the box did not answer within {seconds} s")]
    Timeout { seconds: u64 },
    #[error("the box sent something that is no frame")]
    Frame(#[source] FrameError),
    #[error("the box sent a damaged payload")]
    Payload(#[source] PayloadError),
    #[error("the box sent an ack that cannot be")]
    Ack(#[source] AckError),
    #[error("the box sent a message that cannot be understood")]
    Message(#[source] MessageError),
    #[error("the box sent a {kind:?} frame, which is not its to send")]
    OutOfPlace { kind: FrameKind },
    #[error("the box answered {got} where {wanted} was due")]
    Unexpected { got: &'static str, wanted: &'static str },
    #[error("the box picked protocol version {picked}, this agent speaks {PROTOCOL_VERSIONS:?}")]
    Version { picked: u16 },
    #[error("the box refused: {0}")]
    Refused(Refusal),
    #[error("could not read record {seq} from the spool file")]
    Spool {
        seq: SourceSeq,
        #[source]
        source: io::Error,
    },
    #[error("a frame of ours would not be accepted")]
    OwnFrame(#[source] FrameError),
    #[error("{0}")]
    Given(String),
}

impl LinkError {
    /// Refusals that time alone does not mend.
    pub(crate) fn lasting(&self) -> bool {
        let Self::Refused(refusal) = self else { return false };
        matches!(
            refusal.code,
            RefuseCode::Revoked
                | RefuseCode::UnknownHost
                | RefuseCode::UnknownGroup
                | RefuseCode::NotYours
                | RefuseCode::VolumeChanged
                | RefuseCode::Version
                | RefuseCode::Stopped
        )
    }
}

/// A descriptor that wakes a thread out of `poll`.
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no preconditions; the descriptor is new and ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: a valid descriptor and 8 bytes. When the counter is full the thread is being woken already.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), 8) };
    }
    fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: as above; nothing to read is fine.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
    }
}

/// Waits for the socket to be readable (and writable if asked), or for the wake; answers whether the wake came.
fn wait(sock: RawFd, write: bool, wake: Option<&Wake>, timeout: Duration) -> io::Result<bool> {
    let events = libc::POLLIN | if write { libc::POLLOUT } else { 0 };
    let mut fds = [
        libc::pollfd { fd: sock, events, revents: 0 },
        libc::pollfd { fd: wake.map_or(-1, |w| w.0.as_raw_fd()), events: libc::POLLIN, revents: 0 },
    ];
    let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1);
    // SAFETY: two valid entries; a negative descriptor is skipped.
    let got = unsafe { libc::poll(fds.as_mut_ptr(), 2, ms) };
    if got < 0 {
        let e = io::Error::last_os_error();
        return if e.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(e) };
    }
    let woken = fds[1].revents != 0;
    if let (true, Some(wake)) = (woken, wake) {
        wake.clear();
    }
    Ok(woken)
}

/// TLS over a socket that does not block, and frames on top.
pub struct Conn {
    tls: ClientConnection,
    sock: TcpStream,
    inbox: Vec<u8>,
    /// How much of `inbox` has been used up.
    used: usize,
    eof: bool,
    /// The box may send records on it: a restore.
    takes_records: bool,
}

impl Conn {
    /// Dials and completes the handshake.
    pub fn open(address: &str, config: Arc<ClientConfig>, deadline: Instant) -> Result<Self, LinkError> {
        let sock = net::dial(address)?;
        sock.set_nonblocking(true).map_err(LinkError::Io)?;
        let mut tls = ClientConnection::new(config, tls::box_name()).map_err(LinkError::Setup)?;
        // We bound what is staged ourselves.
        tls.set_buffer_limit(None);
        let mut this = Self { tls, sock, inbox: Vec::new(), used: 0, eof: false, takes_records: false };
        while this.tls.is_handshaking() {
            this.step(Some(deadline), None)?;
            if this.eof && this.tls.is_handshaking() {
                return Err(LinkError::Closed);
            }
        }
        Ok(this)
    }

    /// Writes what is staged as far as the socket takes it, waits, reads what is there.
    pub(crate) fn step(&mut self, deadline: Option<Instant>, wake: Option<&Wake>) -> Result<(), LinkError> {
        self.write_out()?;
        let timeout = match deadline {
            None => Duration::from_millis(500),
            Some(deadline) => deadline
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())
                .ok_or(LinkError::Timeout { seconds: HANDSHAKE.as_secs() })?,
        };
        wait(self.sock.as_raw_fd(), self.tls.wants_write(), wake, timeout).map_err(LinkError::Io)?;
        self.write_out()?;
        self.read_in()
    }

    fn write_out(&mut self) -> Result<(), LinkError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.sock) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(LinkError::Io(e)),
            }
        }
        Ok(())
    }

    fn read_in(&mut self) -> Result<(), LinkError> {
        loop {
            match self.tls.read_tls(&mut self.sock) {
                Ok(0) => {
                    self.eof = true;
                    break;
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(LinkError::Io(e)),
            }
            if let Err(e) = self.tls.process_new_packets() {
                // The alert tells the other side; whether it gets there does not matter.
                let _ = self.tls.write_tls(&mut self.sock);
                return Err(LinkError::Tls(e));
            }
            let mut chunk = [0u8; 16 << 10];
            loop {
                match self.tls.reader().read(&mut chunk) {
                    Ok(0) => {
                        self.eof = true;
                        break;
                    }
                    Ok(n) => self.inbox.extend_from_slice(&chunk[..n]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(LinkError::Io(e)),
                }
            }
            // Enough for now: the frames that are here are handled first, so that the inbox stays small.
            if self.inbox.len() - self.used > 2 * (HEADER_LEN + MAX_MESSAGE) {
                break;
            }
        }
        Ok(())
    }

    /// The next whole frame that has arrived.
    pub(crate) fn next_frame(&mut self) -> Result<Option<(FrameHeader, Vec<u8>)>, LinkError> {
        let here = &self.inbox[self.used..];
        let frame = if let Some((head, rest)) = here.split_first_chunk::<HEADER_LEN>() {
            let header = decode_header(head).map_err(LinkError::Frame)?;
            if matches!(header.kind, FrameKind::Record(_)) && !self.takes_records {
                return Err(LinkError::OutOfPlace { kind: header.kind });
            }
            rest.get(..header.payload_len as usize).map(|p| (header, p.to_vec()))
        } else {
            None
        };
        match frame {
            Some((header, payload)) => {
                self.used += HEADER_LEN + payload.len();
                header.check_payload(&payload).map_err(LinkError::Payload)?;
                Ok(Some((header, payload)))
            }
            None => {
                self.inbox.drain(..self.used);
                self.used = 0;
                if self.eof { Err(LinkError::Closed) } else { Ok(None) }
            }
        }
    }

    pub fn stage(&mut self, message: &Message) -> Result<(), LinkError> {
        let mut bytes = Vec::new();
        encode_message(message, &mut bytes).map_err(LinkError::Message)?;
        self.tls.writer().write_all(&bytes).map_err(LinkError::Io)
    }

    /// From here on the box may send records.
    pub(crate) fn take_records(&mut self) {
        self.takes_records = true;
    }
    pub(crate) fn stage_bytes(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.tls.writer().write_all(bytes).map_err(LinkError::Io)
    }

    /// Sends a message and waits for one.
    pub fn ask(&mut self, message: &Message, deadline: Instant) -> Result<Message, LinkError> {
        self.stage(message)?;
        loop {
            if let Some((header, payload)) = self.next_frame()? {
                return match decode_message(&header, &payload).map_err(LinkError::Message)? {
                    Message::Refuse(refusal) => Err(LinkError::Refused(refusal)),
                    message => Ok(message),
                };
            }
            self.step(Some(deadline), None)?;
        }
    }

    /// Says hello; answers the box's name and the version it picked.
    pub fn hello(&mut self, who: &Who, purpose: Purpose, deadline: Instant) -> Result<(String, u16), LinkError> {
        let hello = Message::Hello {
            versions: PROTOCOL_VERSIONS.to_vec(),
            agent_version: crate::VERSION.to_owned(),
            host: who.host,
            boot_id: who.boot_id.clone(),
            instance: who.instance,
            purpose,
        };
        match self.ask(&hello, deadline)? {
            Message::HelloAck { version, box_name, .. } => {
                if PROTOCOL_VERSIONS.contains(&version) {
                    Ok((box_name, version))
                } else {
                    Err(LinkError::Version { picked: version })
                }
            }
            other => Err(LinkError::Unexpected { got: other.name(), wanted: "HelloAck" }),
        }
    }

    /// Says goodbye as TLS wants it, without waiting.
    pub(crate) fn close(&mut self) {
        self.tls.send_close_notify();
        let _ = self.write_out();
    }
}

/// What every `Hello` says.
#[derive(Clone, Debug)]
pub struct Who {
    pub host: HostId,
    pub boot_id: String,
    /// Drawn when the agent started.
    pub instance: [u8; 16],
}

/// Where and as whom; the TLS part changes when the certificate is renewed.
#[derive(Clone)]
pub struct Peer {
    pub address: String,
    pub who: Who,
    pub config: Arc<Mutex<Arc<ClientConfig>>>,
}

/// What the connection is for, as the engine tells links apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LinkId {
    Control,
    Stream(GroupId),
}

/// From the engine.
#[derive(Debug)]
enum ToLink {
    Records { generation: u64, items: Vec<(Numbered, Body)> },
    Message { generation: u64, message: Box<Message> },
    Close { generation: u64, why: String },
}

/// To the engine.
#[derive(Debug)]
pub enum FromLink {
    /// `HelloAck` came.
    Up {
        box_name: String,
        version: u16,
    },
    Message(Box<Message>),
    Ack(Ack),
    /// Down, or could not come up; the next attempt comes by itself.
    Down {
        why: String,
        refusal: Option<Refusal>,
        /// This record's payload cannot be had any more: a new connection would end at it too.
        unreadable: Option<SourceSeq>,
    },
}

/// How the engine holds a link.
pub struct Link {
    to: mpsc::Sender<ToLink>,
    wake: Arc<Wake>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Takes what links say: link, generation, what. False when nobody listens any more.
pub type Deliver = Box<dyn Fn(LinkId, u64, FromLink) -> bool + Send>;

impl Link {
    pub fn start(id: LinkId, peer: Peer, deliver: Deliver) -> io::Result<Self> {
        let (to, from_engine) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            id,
            peer,
            deliver,
            inbox: from_engine,
            wake: wake.clone(),
            stop: stop.clone(),
            generation: 0,
            jitter: u64::from_ne_bytes(crate::state::random_128()?[..8].try_into().unwrap_or([1; 8])) | 1,
        };
        let name = match id {
            LinkId::Control => "link-control".to_owned(),
            LinkId::Stream(group) => format!("link-{}", &group.to_string()[..8]),
        };
        let thread = thread::Builder::new().name(name).spawn(move || worker.run())?;
        Ok(Self { to, wake, stop, thread: Some(thread) })
    }

    fn put(&self, what: ToLink) {
        // The thread is gone only when it was told to stop.
        if self.to.send(what).is_ok() {
            self.wake.wake();
        }
    }
    pub fn records(&self, generation: u64, items: Vec<(Numbered, Body)>) {
        self.put(ToLink::Records { generation, items });
    }
    pub fn message(&self, generation: u64, message: Message) {
        self.put(ToLink::Message { generation, message: Box::new(message) });
    }
    /// Ends the connection of that generation; a new one is made.
    pub fn close(&self, generation: u64, why: String) {
        self.put(ToLink::Close { generation, why });
    }
    /// Ends the thread without waiting for it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake.wake();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop();
        // Not joined: it may be dialling, for seconds. It holds nothing that anyone waits for.
        drop(self.thread.take());
    }
}

struct Worker {
    id: LinkId,
    peer: Peer,
    deliver: Deliver,
    inbox: mpsc::Receiver<ToLink>,
    wake: Arc<Wake>,
    stop: Arc<AtomicBool>,
    generation: u64,
    jitter: u64,
}

impl Worker {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn say(&self, what: FromLink) {
        if !(self.deliver)(self.id, self.generation, what) {
            self.stop.store(true, Ordering::Release);
        }
    }

    fn run(&mut self) {
        let mut attempt = 0u32;
        while !self.stopped() {
            self.generation += 1;
            let begun = Instant::now();
            let error = match self.session() {
                Ok(()) => return,
                Err(e) => e,
            };
            // A connection that lasted makes the next attempt come soon again.
            if begun.elapsed() > Duration::from_secs(30) {
                attempt = 0;
            }
            let delay = self.delay_ms(attempt, error.lasting());
            attempt = attempt.saturating_add(1);
            let why = crate::error_chain(&error);
            tracing::info!(link = ?self.id, %why, retry_ms = delay, "no connection to the box");
            let (refusal, unreadable) = match error {
                LinkError::Refused(refusal) => (Some(refusal), None),
                LinkError::Spool { seq, .. } => (None, Some(seq)),
                _ => (None, None),
            };
            self.say(FromLink::Down { why, refusal, unreadable });
            self.pause(Duration::from_millis(delay));
        }
    }

    /// Doubles from attempt to attempt; half of it is random, so that many hosts do not come back at once.
    fn delay_ms(&mut self, attempt: u32, lasting: bool) -> u64 {
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        let whole = if lasting { BACKOFF_REFUSED_MS } else { (BACKOFF_MIN_MS << attempt.min(8)).min(BACKOFF_MAX_MS) };
        whole / 2 + self.jitter % (whole / 2)
    }

    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.stopped() {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else { return };
            if wait(-1, false, Some(&self.wake), left).is_err() {
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// One connection, from dialling to its end. `Ok` only when told to stop.
    fn session(&mut self) -> Result<(), LinkError> {
        let deadline = Instant::now() + HANDSHAKE;
        let config = self.peer.config.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let mut conn = Conn::open(&self.peer.address, config, deadline)?;
        let purpose = match self.id {
            LinkId::Control => Purpose::Control,
            LinkId::Stream(group) => Purpose::Stream { group },
        };
        let (box_name, version) = conn.hello(&self.peer.who, purpose, deadline)?;
        self.say(FromLink::Up { box_name, version });
        let mut packer = Packer::new().map_err(LinkError::Io)?;
        let mut waiting: std::collections::VecDeque<(Numbered, Body)> = std::collections::VecDeque::new();
        let (mut staged, mut scratch) = (Vec::new(), Scratch::default());
        loop {
            if self.stopped() {
                conn.close();
                return Ok(());
            }
            // One stage is made ready while TLS still holds the one before.
            let mut drained = false;
            while staged.len() < STAGED_MAX {
                if let Some((record, body)) = waiting.pop_front() {
                    encode(&record, &body, &mut packer, &mut scratch, &mut staged)?;
                    continue;
                }
                match self.inbox.try_recv() {
                    Ok(ToLink::Records { generation, items }) if generation == self.generation => waiting.extend(items),
                    Ok(ToLink::Message { generation, message }) if generation == self.generation => {
                        encode_message(&message, &mut staged).map_err(LinkError::Message)?;
                    }
                    Ok(ToLink::Close { generation, why }) if generation == self.generation => {
                        conn.close();
                        return Err(LinkError::Given(why));
                    }
                    // Of a connection before this one.
                    Ok(_) => {}
                    Err(mpsc::TryRecvError::Empty) => {
                        drained = true;
                        break;
                    }
                    Err(mpsc::TryRecvError::Disconnected) => {
                        conn.close();
                        return Ok(());
                    }
                }
            }
            if !staged.is_empty() && !conn.tls.wants_write() {
                conn.tls.writer().write_all(&staged).map_err(LinkError::Io)?;
                staged.clear();
            }
            conn.write_out()?;
            // There is something to wait for when the socket is full, or when there is nothing left to send.
            if conn.tls.wants_write() || (drained && staged.is_empty()) {
                conn.step(None, Some(&self.wake))?;
            } else {
                conn.read_in()?;
            }
            while let Some((header, payload)) = conn.next_frame()? {
                self.received(&header, &payload)?;
            }
        }
    }

    fn received(&self, header: &FrameHeader, payload: &[u8]) -> Result<(), LinkError> {
        match header.kind {
            FrameKind::Ack => self.say(FromLink::Ack(Ack::decode(header, payload).map_err(LinkError::Ack)?)),
            FrameKind::Message => match decode_message(header, payload).map_err(LinkError::Message)? {
                Message::Refuse(refusal) => return Err(LinkError::Refused(refusal)),
                message => self.say(FromLink::Message(Box::new(message))),
            },
            kind @ FrameKind::Record(_) => return Err(LinkError::OutOfPlace { kind }),
        }
        Ok(())
    }
}

/// Appends a record's frame.
fn encode(
    record: &Numbered,
    body: &Body,
    packer: &mut Packer,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Result<(), LinkError> {
    let raw = body.read(scratch).map_err(|source| LinkError::Spool { seq: record.seq, source })?;
    let (codec, stored) = if record.kind == RecordKind::Write { packer.pack(raw) } else { (Codec::Raw, raw) };
    let header = FrameHeader {
        kind: FrameKind::Record(record.kind),
        codec,
        flags: record.flags,
        volume: record.volume,
        extent: record.extent,
        seq: record.seq,
        mono: record.mono,
        wall_us: record.wall_us,
        payload_len: stored.len() as u32,
        payload_crc: crc32(stored),
    };
    out.extend_from_slice(&encode_header(&header).map_err(LinkError::OwnFrame)?);
    out.extend_from_slice(stored);
    Ok(())
}
