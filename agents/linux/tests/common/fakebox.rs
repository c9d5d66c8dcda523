//! A box in this process: real TLS, real frames, the real target machine; images in memory instead of a journal.
#![allow(dead_code, reason = "each test file uses a part")]

use super::mono;
use model::{
    BookmarkName, Codec, GapReason, GroupId, GroupPolicy, GroupSpec, HistoryTime, HostId, Lsn, Mark, RecordKind,
    SECTOR, SourceSeq, StreamId, WriteFlags,
};
use replication::{Had, Target, TargetAction, TargetConfig, TargetEvent, TargetState};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{Acceptor, WebPkiClientVerifier},
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use wire::{
    ALPN_ENROL, ALPN_REPLICATION, BOX_TLS_NAME, Command, CommandResult, Credit, EnrolToken, FrameHeader, FrameKind,
    HEADER_LEN, HOST_URI_PREFIX, Message, Purpose, RefuseCode, Resume, Unpacker, decode_header, decode_message,
    encode_message,
};

/// A record as it arrived, unpacked.
#[derive(Clone)]
pub struct Kept {
    pub seq: SourceSeq,
    pub kind: RecordKind,
    pub flags: WriteFlags,
    pub volume: usize,
    pub start: usize,
    pub len: usize,
    pub data: Vec<u8>,
}

pub struct BoxGroup {
    pub spec: GroupSpec,
    pub images: Vec<Vec<u8>>,
    pub stream: Option<(StreamId, SourceSeq)>,
    pub gap: Option<GapReason>,
    pub gaps: Vec<GapReason>,
    pub marks: Vec<(SourceSeq, Mark)>,
    pub sync_bytes: u64,
    pub zero_bytes: u64,
    pub wire_bytes: u64,
    /// Hashes that came.
    pub compare_bytes: u64,
    pub live_writes: u64,
    /// Records since the newest `Consistent`, and the images as they were there; only when asked for.
    pub keep: bool,
    pub kept: Vec<Kept>,
    pub at_consistent: Vec<Vec<u8>>,
    /// Images at each bookmark.
    pub bookmarks: HashMap<BookmarkName, Vec<Vec<u8>>>,
}

#[derive(Default)]
pub struct State {
    pub groups: HashMap<GroupId, BoxGroup>,
    /// As the agent said last.
    pub notices: Vec<wire::Notice>,
    /// Sent to the control connection as soon as there is one.
    pub commands: Vec<(u64, Command)>,
    pub results: Vec<(u64, CommandResult)>,
    pub statuses: Vec<wire::AgentStatus>,
    pub tokens: Vec<EnrolToken>,
    /// Every `Enrol` that reached us, good or not.
    pub enrols: Vec<String>,
    pub refused: Vec<String>,
    pub hellos: u64,
}

pub struct Knobs {
    /// New connections are closed at once, and old ones cut.
    pub cut: AtomicBool,
    /// Records are read and not acknowledged.
    pub hold_acks: AtomicBool,
    /// After the handshake rubbish is sent.
    pub garbage: AtomicBool,
    pub credit_bytes: AtomicU64,
    /// Of the protocol; 1 does not compare.
    pub version: AtomicU64,
    pub stop: AtomicBool,
}

pub struct FakeBox {
    pub address: String,
    pub state: Arc<Mutex<State>>,
    pub knobs: Arc<Knobs>,
    ca_der: Vec<u8>,
}

struct Pki {
    ca_pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    session: Arc<ServerConfig>,
    enrol: Arc<ServerConfig>,
}

fn pki() -> (Pki, Vec<u8>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "test ca");
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let node_key = rcgen::KeyPair::generate().unwrap();
    let node =
        rcgen::CertificateParams::new(vec![BOX_TLS_NAME.to_owned()]).unwrap().signed_by(&node_key, &issuer).unwrap();
    let chain = vec![node.der().clone(), ca_cert.der().clone()];
    let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(node_key.serialize_der()));
    let provider = agent_linux::tls::provider();
    let builder = || {
        ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
    };
    let mut enrol = builder().with_no_client_auth().with_single_cert(chain.clone(), key()).unwrap();
    enrol.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    let mut roots = RootCertStore::empty();
    roots.add(ca_cert.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let mut session = builder().with_client_cert_verifier(verifier).with_single_cert(chain, key()).unwrap();
    session.alpn_protocols = vec![ALPN_REPLICATION.to_vec()];
    let der = ca_cert.der().to_vec();
    (Pki { ca_pem: ca_cert.pem(), issuer, session: Arc::new(session), enrol: Arc::new(enrol) }, der)
}

impl FakeBox {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (pki, ca_der) = pki();
        let pki = Arc::new(pki);
        let state = Arc::new(Mutex::new(State::default()));
        let knobs = Arc::new(Knobs {
            cut: AtomicBool::new(false),
            hold_acks: AtomicBool::new(false),
            garbage: AtomicBool::new(false),
            credit_bytes: AtomicU64::new(32 << 20),
            version: AtomicU64::new(u64::from(wire::PROTOCOL_VERSIONS[0])),
            stop: AtomicBool::new(false),
        });
        let (s, k) = (state.clone(), knobs.clone());
        thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { continue };
                if k.stop.load(Ordering::Acquire) {
                    return;
                }
                let (pki, state, knobs) = (pki.clone(), s.clone(), k.clone());
                thread::spawn(move || {
                    if knobs.cut.load(Ordering::Acquire) {
                        return;
                    }
                    // However a connection ends, the agent makes the next.
                    let _ = serve(socket, &pki, &state, &knobs);
                });
            }
        });
        Self { address, state, knobs, ca_der }
    }

    pub fn token(&self) -> EnrolToken {
        let print = ring::digest::digest(&ring::digest::SHA256, &self.ca_der);
        let mut ca_fingerprint = [0; 16];
        ca_fingerprint.copy_from_slice(&print.as_ref()[..16]);
        let token = EnrolToken { secret: agent_linux::state::random_128().unwrap(), ca_fingerprint };
        self.state.lock().unwrap().tokens.push(token.clone());
        token
    }

    /// Looks at the only group.
    pub fn group<T>(&self, look: impl FnOnce(&mut BoxGroup) -> T) -> T {
        let mut state = self.state.lock().unwrap();
        look(state.groups.values_mut().next().expect("a group"))
    }
    pub fn has_group(&self) -> bool {
        !self.state.lock().unwrap().groups.is_empty()
    }
    pub fn set(&self, knob: impl FnOnce(&Knobs) -> &AtomicBool, value: bool) {
        knob(&self.knobs).store(value, Ordering::Release);
    }
}

impl Drop for FakeBox {
    fn drop(&mut self) {
        self.knobs.stop.store(true, Ordering::Release);
        self.knobs.cut.store(true, Ordering::Release);
        let _ = TcpStream::connect(&self.address);
    }
}

struct Conn {
    tls: StreamOwned<ServerConnection, TcpStream>,
    inbox: Vec<u8>,
    used: usize,
}

impl Conn {
    fn send(&mut self, message: &Message) -> io::Result<()> {
        let mut bytes = Vec::new();
        encode_message(message, &mut bytes).map_err(io::Error::other)?;
        self.raw(&bytes)
    }
    fn raw(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.tls.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
        while self.tls.conn.wants_write() {
            match self.tls.flush() {
                Ok(()) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
    /// The next frame, or none within the read timeout.
    fn frame(&mut self) -> io::Result<Option<(FrameHeader, Vec<u8>)>> {
        loop {
            if let Some((head, rest)) = self.inbox[self.used..].split_first_chunk::<HEADER_LEN>() {
                let header = decode_header(head).map_err(io::Error::other)?;
                if let Some(payload) = rest.get(..header.payload_len as usize) {
                    let payload = payload.to_vec();
                    self.used += HEADER_LEN + payload.len();
                    header.check_payload(&payload).map_err(io::Error::other)?;
                    return Ok(Some((header, payload)));
                }
            }
            self.inbox.drain(..self.used);
            self.used = 0;
            let mut chunk = [0; 65536];
            match self.tls.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.inbox.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
    /// Whether another whole frame has arrived already.
    fn more(&self) -> bool {
        let rest = &self.inbox[self.used..];
        let header = rest.first_chunk::<HEADER_LEN>().and_then(|h| decode_header(h).ok());
        header.is_some_and(|h| rest.len() >= HEADER_LEN + h.payload_len as usize)
    }
    fn message(&mut self) -> io::Result<Message> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some((header, payload)) = self.frame()? {
                return decode_message(&header, &payload).map_err(io::Error::other);
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

fn serve(mut socket: TcpStream, pki: &Pki, state: &Mutex<State>, knobs: &Knobs) -> io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    socket.set_nodelay(true)?;
    let mut acceptor = Acceptor::default();
    let accepted = loop {
        match acceptor.read_tls(&mut socket) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            other => other?,
        };
        if let Some(accepted) = acceptor.accept().map_err(|(e, _)| io::Error::other(e))? {
            break accepted;
        }
    };
    let enrols = accepted.client_hello().alpn().is_some_and(|mut a| a.any(|p| p == ALPN_ENROL));
    let config = if enrols { pki.enrol.clone() } else { pki.session.clone() };
    let tls = accepted.into_connection(config).map_err(|(e, _)| io::Error::other(e))?;
    let mut conn = Conn { tls: StreamOwned::new(tls, socket), inbox: Vec::new(), used: 0 };
    let Message::Hello { host, purpose, .. } = conn.message()? else { return Err(io::Error::other("no hello")) };
    state.lock().unwrap().hellos += 1;
    let version = knobs.version.load(Ordering::Acquire) as u16;
    conn.send(&Message::HelloAck { version, box_name: "fake".into(), box_version: "0".into(), now_wall_us: 1 })?;
    if knobs.garbage.load(Ordering::Acquire) {
        return rubbish(&mut conn, state.lock().unwrap().hellos);
    }
    match purpose {
        Purpose::Enrol => enrol(&mut conn, pki, state),
        Purpose::Control => control(&mut conn, host, state, knobs),
        Purpose::Stream { group } => stream(&mut conn, group, state, knobs),
        Purpose::Restore => Err(io::Error::other("this box restores nothing")),
    }
}

/// Different every time: noise, a good header with a lie behind it, frames that are not ours to send, endless drips.
fn rubbish(conn: &mut Conn, turn: u64) -> io::Result<()> {
    let mut rng = super::Rng::new(turn + 1);
    let mut noise: Vec<u8> = (0..5000).map(|_| rng.below(256) as u8).collect();
    match turn % 5 {
        0 => conn.raw(&noise)?,
        1 => {
            // A message whose payload is noise.
            let mut bytes = Vec::new();
            encode_message(&Message::ListGroups, &mut bytes).map_err(io::Error::other)?;
            noise.truncate(40);
            bytes.extend_from_slice(&noise);
            conn.raw(&bytes)?;
        }
        2 => {
            let ack = wire::Ack { written: SourceSeq(u64::MAX), durable: SourceSeq(u64::MAX), ..wire::Ack::default() };
            let mut bytes = Vec::new();
            ack.encode(&mut bytes);
            conn.raw(&bytes)?;
        }
        3 => {
            let credit = Credit { bytes: u64::MAX, records: u64::MAX };
            let spec = GroupSpec {
                id: GroupId([9; 16]),
                name: "x".into(),
                host: None,
                volumes: vec![],
                policy: GroupPolicy::default(),
            };
            let next = SourceSeq(u64::MAX - 1);
            conn.send(&Message::StreamReady { resume: Resume::Continue { next }, credit, spec: spec.clone() })?;
            conn.send(&Message::Protected { spec })?;
            conn.send(&Message::Command { id: 1, what: Command::Release { group: GroupId([8; 16]) } })?;
        }
        _ => {
            for byte in &noise[..60] {
                conn.raw(std::slice::from_ref(byte))?;
            }
        }
    }
    thread::sleep(Duration::from_millis(100));
    Ok(())
}

fn enrol(conn: &mut Conn, pki: &Pki, state: &Mutex<State>) -> io::Result<()> {
    let Message::Enrol { token, csr_der, .. } = conn.message()? else { return Err(io::Error::other("no enrol")) };
    let known = {
        let mut state = state.lock().unwrap();
        state.enrols.push(token.clone());
        let token: EnrolToken = token.parse().map_err(io::Error::other)?;
        let at = state.tokens.iter().position(|t| *t == token);
        at.map(|at| state.tokens.remove(at)).is_some()
    };
    if !known {
        conn.send(&Message::refuse(RefuseCode::BadToken, "token not accepted"))?;
        return Ok(());
    }
    let host = HostId(agent_linux::state::random_128()?);
    let mut request =
        rcgen::CertificateSigningRequestParams::from_der(&csr_der.as_slice().into()).map_err(io::Error::other)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, host.to_string());
    let uri = format!("{HOST_URI_PREFIX}{host}");
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().map_err(io::Error::other)?)];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    request.params = params;
    let certificate = request.signed_by(&pki.issuer).map_err(io::Error::other)?;
    conn.send(&Message::Enrolled { host, certificate_pem: certificate.pem(), ca_pem: pki.ca_pem.clone() })?;
    thread::sleep(Duration::from_millis(100));
    Ok(())
}

fn control(conn: &mut Conn, host: HostId, state: &Mutex<State>, knobs: &Knobs) -> io::Result<()> {
    loop {
        if knobs.cut.load(Ordering::Acquire) {
            return Ok(());
        }
        let commands = std::mem::take(&mut state.lock().unwrap().commands);
        for (id, what) in commands {
            conn.send(&Message::Command { id, what })?;
        }
        let Some((header, payload)) = conn.frame()? else { continue };
        let answer = {
            let mut state = state.lock().unwrap();
            match decode_message(&header, &payload).map_err(io::Error::other)? {
                Message::ListGroups => Some(Message::Groups(state.groups.values().map(|g| g.spec.clone()).collect())),
                Message::Heartbeat { number, .. } => Some(Message::HeartbeatAck { number }),
                Message::Notices(notices) => {
                    state.notices = notices;
                    None
                }
                Message::Status(status) => {
                    state.statuses.push(status);
                    None
                }
                Message::CommandDone { id, result } => {
                    state.results.push((id, result));
                    None
                }
                Message::Protect { group_name, volumes, .. } => {
                    if state.groups.values().any(|g| g.spec.name == group_name) {
                        Some(Message::decline(RefuseCode::NameTaken, group_name))
                    } else {
                        let id = GroupId(agent_linux::state::random_128()?);
                        let images = volumes.iter().map(|v| vec![0x5a; v.sectors.bytes() as usize]).collect();
                        let policy = GroupPolicy::default();
                        let spec = GroupSpec { id, name: group_name, host: Some(host), volumes, policy };
                        let group = BoxGroup {
                            spec: spec.clone(),
                            images,
                            stream: None,
                            gap: None,
                            gaps: vec![],
                            marks: vec![],
                            sync_bytes: 0,
                            zero_bytes: 0,
                            wire_bytes: 0,
                            compare_bytes: 0,
                            live_writes: 0,
                            keep: false,
                            kept: vec![],
                            at_consistent: vec![],
                            bookmarks: HashMap::new(),
                        };
                        state.groups.insert(id, group);
                        Some(Message::Protected { spec })
                    }
                }
                Message::Unprotect { group } => {
                    state.groups.remove(&group);
                    Some(Message::Unprotected { group })
                }
                _ => None,
            }
        };
        if let Some(answer) = answer {
            conn.send(&answer)?;
        }
    }
}

fn stream(conn: &mut Conn, id: GroupId, state: &Mutex<State>, knobs: &Knobs) -> io::Result<()> {
    let Message::OpenStream { stream, volumes, mono_ns, .. } = conn.message()? else {
        return Err(io::Error::other("no open"));
    };
    let now = || HistoryTime(mono().0 / 1000);
    let (mut target, ready) = {
        let state = state.lock().unwrap();
        let Some(group) = state.groups.get(&id) else {
            drop(state);
            return conn.send(&Message::refuse(RefuseCode::UnknownGroup, "unknown group"));
        };
        assert_eq!(volumes, group.spec.volumes, "the volumes are those that were protected");
        let (resume, had) = match group.stream {
            Some((had, seq)) if had == stream => {
                (Resume::Continue { next: seq.next() }, Some(Had { durable: seq, appended_lsn: Lsn(seq.0) }))
            }
            _ => (Resume::Restart, None),
        };
        let mut config = TargetConfig::new(id, stream, volumes, resume);
        config.had = had;
        config.in_gap = group.gap;
        config.window = Credit { bytes: knobs.credit_bytes.load(Ordering::Acquire), records: 8192 };
        Target::open(config, group.spec.clone(), model::MonoTime(mono_ns), now(), mono())
    };
    conn.send(&ready)?;
    let mut unpacker = Unpacker::new()?;
    let mut actions = Vec::new();
    loop {
        if knobs.cut.load(Ordering::Acquire) {
            return Ok(());
        }
        let frame = conn.frame()?;
        let held = knobs.hold_acks.load(Ordering::Acquire);
        match &frame {
            None => target.on(TargetEvent::Tick, mono(), now(), &mut actions),
            Some((header, payload)) if header.kind == FrameKind::Message => {
                let message = decode_message(header, payload).map_err(io::Error::other)?;
                if let Message::Refuse(why) = &message {
                    return Err(io::Error::other(why.to_string()));
                }
                target.on(TargetEvent::Message(&message), mono(), now(), &mut actions);
            }
            Some((header, payload)) => {
                target.on(TargetEvent::Frame { header, payload }, mono(), now(), &mut actions);
            }
        }
        while !actions.is_empty() {
            for action in std::mem::take(&mut actions) {
                match action {
                    TargetAction::Append { .. } | TargetAction::AppendMark { .. } => {
                        let (header, payload) = frame.as_ref().expect("a frame is what is appended");
                        {
                            let mut state = state.lock().unwrap();
                            let Some(group) = state.groups.get_mut(&id) else { return Ok(()) };
                            let mark =
                                if let TargetAction::AppendMark { mark, .. } = action { Some(mark) } else { None };
                            append(group, stream, header, payload, mark, &mut unpacker)?;
                        }
                        let (seq, lsn) = (header.seq, Lsn(header.seq.0));
                        target.on(TargetEvent::Appended { seq, lsn }, mono(), now(), &mut actions);
                        if !held {
                            target.on(
                                TargetEvent::Progress { written: lsn, durable: lsn },
                                mono(),
                                now(),
                                &mut actions,
                            );
                        }
                    }
                    TargetAction::SendAck(ack) => {
                        let mut bytes = Vec::new();
                        ack.encode(&mut bytes);
                        conn.raw(&bytes)?;
                    }
                    TargetAction::Send(message) => conn.send(&message)?,
                    TargetAction::Compare(ask) => {
                        let differ = {
                            let mut state = state.lock().unwrap();
                            let Some(group) = state.groups.get_mut(&id) else { return Ok(()) };
                            group.compare_bytes += ask.hashes.len() as u64 * 16;
                            let at = group.spec.volumes.iter().position(|v| v.id == ask.volume).expect("checked");
                            let image = &group.images[at];
                            ask.answer(|block, buf| {
                                let start = (block.start() * SECTOR) as usize;
                                buf.copy_from_slice(&image[start..start + buf.len()]);
                                true
                            })
                        };
                        target.on(TargetEvent::Compared { id: ask.id, differ }, mono(), now(), &mut actions);
                    }
                    TargetAction::Refuse(refusal) => {
                        state.lock().unwrap().refused.push(refusal.to_string());
                        conn.send(&Message::Refuse(refusal))?;
                        thread::sleep(Duration::from_millis(50));
                        return Ok(());
                    }
                    TargetAction::State(TargetState::InGap { reason }) => {
                        if let Some(group) = state.lock().unwrap().groups.get_mut(&id) {
                            group.gap = Some(reason);
                        }
                    }
                    TargetAction::State(TargetState::Consistent) => {
                        if let Some(group) = state.lock().unwrap().groups.get_mut(&id) {
                            group.gap = None;
                        }
                    }
                    TargetAction::State(_) | TargetAction::Proven { .. } => {}
                }
            }
        }
        // Held acks are made up for when they are let go.
        if !held && frame.is_none() && target.durable() < target.expected().prev() {
            let lsn = Lsn(target.expected().prev().0);
            target.on(TargetEvent::Progress { written: lsn, durable: lsn }, mono(), now(), &mut actions);
            for action in std::mem::take(&mut actions) {
                if let TargetAction::SendAck(ack) = action {
                    let mut bytes = Vec::new();
                    ack.encode(&mut bytes);
                    conn.raw(&bytes)?;
                }
            }
        }
    }
}

fn append(
    group: &mut BoxGroup,
    stream: StreamId,
    header: &FrameHeader,
    payload: &[u8],
    mark: Option<Mark>,
    unpacker: &mut Unpacker,
) -> io::Result<()> {
    group.stream = Some((stream, header.seq));
    group.wire_bytes += (HEADER_LEN + payload.len()) as u64;
    if let Some(mark) = mark {
        match &mark {
            Mark::GapBegin { reason } => group.gaps.push(*reason),
            Mark::Consistent if group.keep => {
                group.at_consistent = group.images.clone();
                group.kept.clear();
            }
            Mark::Bookmark { name, .. } => {
                group.bookmarks.insert(name.clone(), group.images.clone());
            }
            _ => {}
        }
        group.marks.push((header.seq, mark));
        return Ok(());
    }
    let FrameKind::Record(kind) = header.kind else { return Ok(()) };
    let sync = header.flags.contains(WriteFlags::SYNC);
    let at = group.spec.volumes.iter().position(|v| v.id == header.volume).expect("checked by the target");
    let (start, len) = ((header.extent.start() * SECTOR) as usize, header.extent.bytes() as usize);
    let mut data = Vec::new();
    match kind {
        RecordKind::Write => {
            data.resize(len, 0);
            match header.codec {
                Codec::Raw => data.copy_from_slice(payload),
                Codec::Zstd => unpacker.unpack(Codec::Zstd, payload, &mut data).map_err(io::Error::other)?,
            }
            group.images[at][start..start + len].copy_from_slice(&data);
            if sync { group.sync_bytes += len as u64 } else { group.live_writes += 1 }
        }
        RecordKind::Zero | RecordKind::Discard => {
            group.images[at][start..start + len].fill(0);
            if sync {
                group.zero_bytes += len as u64;
            }
        }
        RecordKind::Flush | RecordKind::Mark => {}
    }
    if group.keep {
        group.kept.push(Kept { seq: header.seq, kind, flags: header.flags, volume: at, start, len, data });
    }
    Ok(())
}

impl Kept {
    pub fn apply(&self, images: &mut [Vec<u8>]) {
        let range = self.start..self.start + self.len;
        match self.kind {
            RecordKind::Write => images[self.volume][range].copy_from_slice(&self.data),
            RecordKind::Zero | RecordKind::Discard => images[self.volume][range].fill(0),
            RecordKind::Flush | RecordKind::Mark => {}
        }
    }
}
