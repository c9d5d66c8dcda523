//! An agent as small as can be: a certificate, two connections, a disk in memory and the real source machine.

use crate::support::{Control, DEADLINE, Inside, Rng, assert_same, wait_for};
use model::{
    Codec, Extent, GroupId, GroupSpec, HostId, MonoTime, SECTOR, Sectors, StreamId, SyncMode, VolumeId, VolumeSpec,
    WriteFlags,
};
use replication::{Action, Captured, CapturedKind, Event, Lost, Now, Numbered, Payload, ReadId, Source, SourceConfig};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};
use wire::{
    ALPN_ENROL, ALPN_REPLICATION, Ack, BlockHash, Command, CommandResult, Comparison, FrameHeader, FrameKind,
    HEADER_LEN, Message, Packer, Purpose, Refusal, RefuseCode, decode_header, decode_message, encode_header,
    encode_message,
};

/// A host's certificate and what it needs to verify the box.
#[derive(Clone, Debug)]
pub struct Identity {
    pub host: HostId,
    pub instance: [u8; 16],
    certificate: CertificateDer<'static>,
    key: Arc<rcgen::KeyPair>,
    ca: CertificateDer<'static>,
}

/// A connection, blocking.
pub struct Conn {
    stream: StreamOwned<ClientConnection, TcpStream>,
    input: Vec<u8>,
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Conn")
    }
}

/// Believes any box; for enrolment, where the token says whom to believe, and for showing that the box does not.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &known)
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Dials without believing or disbelieving the box.
pub fn dial(at: SocketAddr, identity: Option<&Identity>, alpn: &[u8]) -> io::Result<Conn> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone));
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            builder.with_client_auth_cert(vec![identity.certificate.clone()], identity.key_der()).unwrap()
        }
    };
    handshake(at, config, alpn)
}

/// TLS for NBD clients, which name no protocol.
pub fn nbd_tls(
    ca: &CertificateDer<'static>,
    certificate: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let builder = builder.with_root_certificates(roots);
    match certificate {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
    }
}

fn handshake(at: SocketAddr, mut config: ClientConfig, alpn: &[u8]) -> io::Result<Conn> {
    config.alpn_protocols = vec![alpn.to_vec()];
    let tcp = TcpStream::connect(at)?;
    tcp.set_read_timeout(Some(DEADLINE))?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(wire::BOX_TLS_NAME).unwrap();
    let tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(tls, tcp);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(Conn { stream, input: Vec::new() })
}

impl Identity {
    fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.serialize_der()).unwrap()
    }
    /// The same certificate in another agent's hands.
    pub fn of_instance(&self, instance: [u8; 16]) -> Self {
        Self { instance, ..self.clone() }
    }
    /// The TLS side of an NBD client that shows this host's certificate.
    pub fn as_nbd_client(&self) -> ClientConfig {
        nbd_tls(&self.ca, Some((self.certificate.clone(), self.key_der())))
    }
    fn csr(key: &rcgen::KeyPair) -> Vec<u8> {
        rcgen::CertificateParams::new(vec![]).unwrap().serialize_request(key).unwrap().der().to_vec()
    }
    fn from_answer(answer: Message, key: rcgen::KeyPair) -> Self {
        let Message::Enrolled { host, certificate_pem, ca_pem } = answer else { panic!("{}", answer.name()) };
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        Self { host, instance: [1; 16], certificate: der(&certificate_pem), key: Arc::new(key), ca: der(&ca_pem) }
    }
    pub fn enrol(at: SocketAddr, token: &str, name: &str) -> Result<Self, Refusal> {
        let mut conn = dial(at, None, ALPN_ENROL).unwrap();
        conn.hello(HostId::default(), Purpose::Enrol, [0; 16])?;
        let key = rcgen::KeyPair::generate().unwrap();
        conn.say(&Message::Enrol { token: token.into(), csr_der: Self::csr(&key), host_name: name.into() });
        Ok(Self::from_answer(conn.hear()?, key))
    }
    pub fn renew(&self, control: &mut Conn) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        control.say(&Message::Renew { csr_der: Self::csr(&key) });
        Self::from_answer(control.hear().unwrap(), key)
    }
    /// Dials as an agent does: only the box of its own authority is believed.
    pub fn dial(&self, at: SocketAddr) -> io::Result<Conn> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
        let builder = builder.with_root_certificates(roots);
        let config = builder.with_client_auth_cert(vec![self.certificate.clone()], self.key_der()).unwrap();
        handshake(at, config, ALPN_REPLICATION)
    }
    pub fn connect(&self, at: SocketAddr, purpose: Purpose) -> Result<Conn, Refusal> {
        let mut conn = self.dial(at).unwrap();
        conn.hello(self.host, purpose, self.instance)?;
        Ok(conn)
    }
}

impl Conn {
    pub fn hello(&mut self, host: HostId, purpose: Purpose, instance: [u8; 16]) -> Result<(), Refusal> {
        self.hello_as(2, host, purpose, instance)
    }
    /// As an agent that speaks that version at best.
    pub fn hello_as(&mut self, best: u16, host: HostId, purpose: Purpose, instance: [u8; 16]) -> Result<(), Refusal> {
        self.try_hello_as(best, host, purpose, instance).unwrap()
    }
    /// The same where the box may die in between.
    pub fn try_hello_as(
        &mut self,
        best: u16,
        host: HostId,
        purpose: Purpose,
        instance: [u8; 16],
    ) -> io::Result<Result<(), Refusal>> {
        self.try_say(&Message::Hello {
            versions: vec![7, best, 1],
            agent_version: "test".into(),
            host,
            boot_id: "boot".into(),
            instance,
            purpose,
        })?;
        Ok(match self.try_hear()? {
            Message::Refuse(refusal) | Message::Declined(refusal) => Err(refusal),
            Message::HelloAck { version, .. } if version == best => Ok(()),
            other => panic!("{other:?}"),
        })
    }
    /// Nothing within this is an error of kind `WouldBlock`.
    pub fn set_patience(&mut self, patience: Duration) {
        self.stream.sock.set_read_timeout(Some(patience)).unwrap();
    }
    pub fn try_say(&mut self, message: &Message) -> io::Result<()> {
        let mut out = Vec::new();
        encode_message(message, &mut out).unwrap();
        self.stream.write_all(&out)
    }
    pub fn say(&mut self, message: &Message) {
        self.try_say(message).unwrap();
    }
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }
    /// What is there within a moment: frames, and whether the box is still there.
    pub fn frames(&mut self, wait: Duration) -> io::Result<Vec<(FrameHeader, Vec<u8>)>> {
        self.stream.sock.set_read_timeout(Some(wait))?;
        match self.read() {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) => return Err(e),
        }
        Ok(std::iter::from_fn(|| self.frame()).collect())
    }
    /// A whole frame, if one is there.
    fn frame(&mut self) -> Option<(FrameHeader, Vec<u8>)> {
        let head = self.input.first_chunk::<HEADER_LEN>()?;
        let header = decode_header(head).unwrap();
        let whole = HEADER_LEN + header.payload_len as usize;
        if self.input.len() < whole {
            return None;
        }
        let payload = self.input[HEADER_LEN..whole].to_vec();
        self.input.drain(..whole);
        Some((header, payload))
    }
    fn read(&mut self) -> io::Result<usize> {
        let mut buf = [0; 65536];
        let n = self.stream.read(&mut buf)?;
        self.input.extend_from_slice(&buf[..n]);
        Ok(n)
    }
    /// The next message; acks between are passed over.
    pub fn try_hear(&mut self) -> io::Result<Message> {
        loop {
            if let Some((header, payload)) = self.frame() {
                if header.kind == FrameKind::Ack {
                    continue;
                }
                return Ok(decode_message(&header, &payload).unwrap());
            }
            if self.read()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    /// The next message, or the refusal that it is.
    pub fn hear(&mut self) -> Result<Message, Refusal> {
        match self.try_hear().unwrap() {
            Message::Refuse(refusal) | Message::Declined(refusal) => Err(refusal),
            message => Ok(message),
        }
    }
    pub fn hear_refusal(&mut self) -> Refusal {
        loop {
            if let Err(refusal) = self.hear() {
                return refusal;
            }
        }
    }
    /// Whether the box has closed the connection, after whatever it had to say.
    pub fn ends(&mut self) -> bool {
        loop {
            match self.read() {
                Ok(0) | Err(_) => return true,
                Ok(_) => {}
            }
        }
    }
}

/// A host with one protected disk in memory.
pub struct Host {
    identity: Identity,
    at: SocketAddr,
    pub spec: GroupSpec,
    pub disk: Vec<u8>,
    source: Source,
    started: Instant,
    actions: Vec<Action>,
    events: VecDeque<Event>,
    acting: bool,
    captures: HashMap<u64, Vec<u8>>,
    next_capture: u64,
    spool: BTreeMap<u64, (Numbered, Vec<u8>)>,
    reads: HashMap<ReadId, (Extent, Vec<u8>)>,
    control: Conn,
    stream: Option<Conn>,
    /// Bookmarks asked for by the box: id of the command.
    orders: Vec<u64>,
    /// The disk as it was when each bookmark was placed.
    pub at_bookmark: HashMap<u64, Vec<u8>>,
    pub cuts: u32,
    /// How far the host's wall clock was set off.
    pub wall_shift_us: i64,
    /// Payload of copied pieces that were sent.
    copied: u64,
    ticked: Instant,
}

impl Host {
    pub fn protect(inside: &Inside, name: &str, disk: Vec<u8>) -> Self {
        let token = inside.ok("POST", "tokens", "{}")["token"].as_str().unwrap().to_owned();
        let identity = Identity::enrol(inside.listen(), &token, name).unwrap();
        let mut control = identity.connect(inside.listen(), Purpose::Control).unwrap();
        let volume = VolumeSpec {
            id: VolumeId(7),
            name: "/dev/sdb".into(),
            sectors: Sectors(disk.len() as u64 / SECTOR),
            identity: format!("serial:{name}"),
        };
        control.say(&Message::Protect { group_name: name.into(), volumes: vec![volume], mode: SyncMode::Async });
        let Message::Protected { spec } = control.hear().unwrap() else { panic!("not protected") };
        assert_eq!(spec.volumes[0].id, VolumeId(0), "the box gives the numbers");
        Self::with(identity, inside.listen(), control, spec, disk)
    }

    fn with(identity: Identity, at: SocketAddr, control: Conn, spec: GroupSpec, disk: Vec<u8>) -> Self {
        let mut actions = Vec::new();
        let mut config = SourceConfig::new(spec.id, spec.volumes.clone(), SyncMode::Async);
        config.read_bytes_max = 256 << 10;
        config.watermark_ms = 50;
        config.watermark_idle_ms = 100;
        config.heartbeat_ms = 300;
        let started = Instant::now();
        let now = Now { mono: MonoTime(1), wall_us: 1 };
        let source = Source::new(config, StreamId(rand_128()), None, now, &mut actions);
        Self {
            identity,
            at,
            spec,
            disk,
            source,
            started,
            actions,
            events: VecDeque::new(),
            acting: false,
            captures: HashMap::new(),
            next_capture: 1,
            spool: BTreeMap::new(),
            reads: HashMap::new(),
            control,
            stream: None,
            orders: Vec::new(),
            at_bookmark: HashMap::new(),
            cuts: 0,
            wall_shift_us: 0,
            copied: 0,
            ticked: started,
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The same group, served by another agent with another disk, once the box lets it in.
    fn in_other_hands(self, identity: Identity, disk: Vec<u8>) -> Self {
        let Self { at, spec, control, .. } = self;
        drop(control);
        let control = wait_for("the place to be free", || identity.connect(at, Purpose::Control).ok());
        Self::with(identity, at, control, spec, disk)
    }

    fn now(&self) -> Now {
        let us = self.started.elapsed().as_micros() as u64;
        Now {
            mono: MonoTime(1_000_000_000 + us * 1000),
            wall_us: (1_790_000_000_000_000 + us).saturating_add_signed(self.wall_shift_us),
        }
    }

    /// Hands an event in. What is done about it may bring further ones: they wait until all of it is done.
    fn on(&mut self, event: Event) {
        self.events.push_back(event);
        if self.acting {
            return;
        }
        self.acting = true;
        // The first actions are those of the source's making.
        for action in std::mem::take(&mut self.actions) {
            self.action(action);
        }
        while let Some(event) = self.events.pop_front() {
            let mut actions = Vec::new();
            self.source.on(event, self.now(), &mut actions);
            for action in actions {
                self.action(action);
            }
        }
        self.acting = false;
    }

    fn action(&mut self, action: Action) {
        match action {
            Action::Keep { record, payload } => {
                let data = match payload {
                    Payload::None => Vec::new(),
                    Payload::Captured(n) => self.captures[&n].clone(),
                    Payload::Mark(bytes) => bytes.into_vec(),
                    Payload::Read(id) => {
                        let (extent, data) = &self.reads[&id];
                        let from = ((record.extent.start() - extent.start()) * SECTOR) as usize;
                        data[from..from + record.extent.bytes() as usize].to_vec()
                    }
                };
                self.spool.insert(record.seq.0, (record, data));
            }
            Action::Send { first, last } => {
                let mut packer = Packer::new().unwrap();
                for seq in first.0..=last.0 {
                    let (record, data) = &self.spool[&seq];
                    let kind = FrameKind::Record(record.kind);
                    let (codec, stored) = match record.kind {
                        model::RecordKind::Write => packer.pack(data),
                        _ => (Codec::Raw, data.as_slice()),
                    };
                    let header = FrameHeader {
                        kind,
                        codec,
                        flags: record.flags,
                        volume: record.volume,
                        extent: record.extent,
                        seq: record.seq,
                        mono: record.mono,
                        wall_us: record.wall_us,
                        payload_len: stored.len() as u32,
                        payload_crc: wire::crc32(stored),
                    };
                    let mut bytes = encode_header(&header).unwrap().to_vec();
                    bytes.extend_from_slice(stored);
                    if record.flags.contains(WriteFlags::SYNC) {
                        self.copied += data.len() as u64;
                    }
                    if self.stream.as_mut().is_some_and(|s| s.raw(&bytes).is_err()) {
                        self.cut();
                        return;
                    }
                }
            }
            Action::Release { through } => self.spool = self.spool.split_off(&(through.0 + 1)),
            Action::Drop { from } => drop(self.spool.split_off(&from.0)),
            Action::Forget { capture } => drop(self.captures.remove(&capture)),
            Action::ReleaseCapture { through } => self.captures.retain(|n, _| *n > through),
            Action::Open { group, stream, first_seq, next_seq, volumes, acked_durable } => {
                let now = self.now();
                let (mono_ns, wall_us) = (now.mono.0, now.wall_us);
                let open = Message::OpenStream {
                    group,
                    stream,
                    first_seq,
                    next_seq,
                    volumes,
                    acked_durable,
                    mono_ns,
                    wall_us,
                };
                if self.stream.as_mut().is_some_and(|s| s.try_say(&open).is_err()) {
                    self.cut();
                }
            }
            Action::Message(message) => {
                if self.stream.as_mut().is_some_and(|s| s.try_say(&message).is_err()) {
                    self.cut();
                }
            }
            Action::ReadVolume { read, extent, .. } => {
                let (from, to) = (extent.start() * SECTOR, extent.end() * SECTOR);
                self.reads.insert(read, (extent, self.disk[from as usize..to as usize].to_vec()));
                // Writes are handed in as they are made: the barriers are passed already.
                self.on(Event::ReadDone { read, zeroes: Vec::new() });
            }
            Action::Compare { id, read, volume, block_sectors, runs } => {
                let (extent, data) = &self.reads[&read];
                let at = |lba: u64| ((lba - extent.start()) * SECTOR) as usize;
                let hash = |block: Extent| BlockHash::of(&data[at(block.start())..at(block.end())]);
                let hashes = wire::blocks(&runs, block_sectors).map(hash).collect();
                let ask = Message::Compare(Comparison { id, volume, block_sectors, runs, hashes });
                if self.stream.as_mut().is_some_and(|s| s.try_say(&ask).is_err()) {
                    self.cut();
                }
            }
            Action::ReadFinished { read } => drop(self.reads.remove(&read)),
            Action::Persist { serial, .. } => self.on(Event::Persisted { serial }),
            Action::Survey => unreachable!("no source here asks what its file systems do not use"),
            Action::Drain { barrier } => self.on(Event::Drained { barrier }),
            Action::BookmarkPlaced { id, seq } => {
                let order = self.orders.remove(0);
                assert_eq!(order, id);
                let result = CommandResult::Bookmarked { stream: self.source.stream(), seq };
                self.at_bookmark.insert(id, self.disk.clone());
                self.control.say(&Message::CommandDone { id, result });
            }
            Action::BookmarkRefused { id, why } => {
                let result = CommandResult::Failed { text: why.to_string() };
                self.control.say(&Message::CommandDone { id, result });
            }
            Action::Disconnect(why) => panic!("the source gave the box up: {why}"),
            Action::LossRecorded { .. } | Action::ReleaseFlush { .. } | Action::State(_) | Action::Gate(_) => {}
            Action::Alarm(alarm) => panic!("{alarm}"),
        }
    }

    /// Writes to the disk, and captures it.
    pub fn write(&mut self, lba: u64, data: &[u8]) {
        self.disk[(lba * SECTOR) as usize..][..data.len()].copy_from_slice(data);
        let capture = self.next_capture;
        self.next_capture += 1;
        self.captures.insert(capture, data.to_vec());
        let now = self.now();
        self.on(Event::Captured(Captured {
            capture,
            kind: CapturedKind::Write,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent: Extent::new(lba, data.len() as u64 / SECTOR),
            mono: now.mono,
            wall_us: now.wall_us,
        }));
    }

    pub fn write_some(&mut self, rng: &mut Rng) {
        let sectors = self.disk.len() as u64 / SECTOR;
        let len = 1 + rng.below(32);
        let mut data = vec![0; (len * SECTOR) as usize];
        if rng.below(3) > 0 {
            rng.fill(&mut data);
        } else {
            data.fill(rng.below(256) as u8); // packs well
        }
        self.write(rng.below(sectors - len), &data);
    }

    pub fn connect(&mut self) {
        let purpose = Purpose::Stream { group: self.spec.id };
        let conn = self.identity.connect(self.at, purpose).unwrap();
        conn.stream.sock.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        self.stream = Some(conn);
        self.on(Event::BoxCompares(true));
        self.on(Event::Connected);
    }

    /// The network goes away in the middle of whatever is under way.
    pub fn cut(&mut self) {
        if let Some(conn) = self.stream.take() {
            let _ = conn.stream.sock.shutdown(std::net::Shutdown::Both);
            self.cuts += 1;
        }
        self.on(Event::Disconnected);
    }

    /// What came on both connections, and the time.
    pub fn step(&mut self) {
        let mut silent = false;
        if let Some(mut conn) = self.stream.take() {
            let alive = !matches!(conn.read(), Ok(0));
            let mut frames = Vec::new();
            while let Some(frame) = conn.frame() {
                frames.push(frame);
            }
            self.stream = Some(conn);
            for (header, payload) in frames {
                match header.kind {
                    FrameKind::Ack => self.on(Event::Ack(Ack::decode(&header, &payload).unwrap())),
                    _ => match decode_message(&header, &payload).unwrap() {
                        Message::StreamReady { resume, credit, .. } => self.on(Event::Ready { resume, credit }),
                        Message::HeartbeatAck { .. } => self.on(Event::Heard),
                        Message::Compared { id, differ } => self.on(Event::Compared { id, differ }),
                        // This thread was away, reading a view on a busy machine.
                        Message::Refuse(Refusal { code: RefuseCode::Silent, .. }) => silent = true,
                        other => panic!("{other:?}"),
                    },
                }
            }
            if !alive || silent {
                self.cut();
            }
        }
        if silent {
            self.connect();
        }
        self.control.stream.sock.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        if matches!(self.control.read(), Ok(0)) {
            self.control = self.identity.connect(self.at, Purpose::Control).unwrap();
        }
        while let Some((header, payload)) = self.control.frame() {
            match decode_message(&header, &payload).unwrap() {
                Message::Command { id, what: Command::Bookmark { name, consistency, .. } } => {
                    self.orders.push(id);
                    self.on(Event::Bookmark { id, name, consistency });
                }
                Message::Command { id, what: Command::Resync { .. } } => {
                    self.on(Event::Resync);
                    self.control.say(&Message::CommandDone { id, result: CommandResult::Done });
                }
                Message::Command { id, .. } => {
                    self.control.say(&Message::CommandDone { id, result: CommandResult::Done })
                }
                Message::HeartbeatAck { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        if self.ticked.elapsed() > Duration::from_millis(50) {
            self.ticked = Instant::now();
            if self.control.try_say(&Message::heartbeat(1, MonoTime(1))).is_err() {
                self.control = self.identity.connect(self.at, Purpose::Control).unwrap();
            }
            self.on(Event::Tick);
        }
    }

    pub fn is_settled(&self) -> bool {
        let status = self.source.status();
        status.gap.is_none() && status.window_records == 0
    }
    pub fn settle(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.is_settled() {
            assert!(Instant::now() < deadline, "the source does not settle: {:?}", self.source.status());
            self.step();
        }
    }
    /// The host lost its power: what was written last may be undone or not have been captured, and nobody knows where. The same stream
    /// goes on, from a state stored some time before.
    fn crash(&mut self, boot: &[u8], change: impl FnOnce(&mut [u8])) {
        self.cut();
        change(&mut self.disk);
        self.captures.clear();
        self.spool.clear();
        self.reads.clear();
        let mut config = SourceConfig::new(self.spec.id, self.spec.volumes.clone(), SyncMode::Async);
        config.read_bytes_max = 256 << 10;
        config.watermark_ms = 50;
        let now = self.now();
        self.source = Source::restore(config, boot, now, &mut self.actions).unwrap();
        self.on(Event::CaptureLost { id: 1, reason: model::GapReason::Verify, what: Lost::Everything });
        self.connect();
    }
    pub fn lose(&mut self, extent: Extent) {
        let reason = model::GapReason::Overflow;
        self.on(Event::CaptureLost { id: 1, reason, what: Lost::Extents(vec![(VolumeId(0), extent)]) });
    }
}

fn rand_128() -> [u8; 16] {
    use ring::rand::SecureRandom as _;
    let mut bytes = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut bytes).unwrap();
    bytes
}

fn disk(len: usize, seed: u64) -> Vec<u8> {
    let mut disk = vec![0; len];
    Rng::new(seed).fill(&mut disk[len / 4..]);
    disk
}

#[test]
fn after_a_host_crash_only_what_differs_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let mut host = Host::protect(&inside, "db", disk(8 << 20, 1));
    let mut rng = Rng::new(5);
    host.connect();
    host.settle();
    let boot = host.source.boot_state();
    for round in 0..4u64 {
        for _ in 0..200 {
            host.write_some(&mut rng);
            host.step();
        }
        host.settle();
        let before = host.disk.clone();
        let old = inside.view("db", "\"latest\"");
        let copied = host.copied;
        // Behind its back: some bytes here and there, and one longer stretch.
        let (sectors, spots) = (before.len() as u64 / SECTOR, 30);
        let (from, len) = (rng.below(sectors - 600), 1 + rng.below(500));
        let bytes: Vec<u64> = (0..spots).map(|_| rng.below(before.len() as u64)).collect();
        host.crash(&boot, |disk| {
            bytes.iter().for_each(|at| disk[*at as usize] ^= 0x55);
            disk[(from * SECTOR) as usize..((from + len) * SECTOR) as usize].fill(round as u8 + 1);
        });
        // Capture goes on meanwhile.
        let mut live = Vec::new();
        for _ in 0..20 {
            let at = rng.below(sectors - 8);
            host.write(at, &vec![round as u8; 4096]);
            live.push(at);
            host.step();
        }
        host.settle();
        let now = inside.view("db", "\"latest\"");
        assert_same(&now.volumes[0], &host.disk, ("seed 5, round", round));
        inside.close_view(&now);
        inside.close_view(&old);
        let again = inside.view("db", &format!("{{\"lsn\":{}}}", old.lsn));
        assert_same(&again.volumes[0], &before, ("the moment before, round", round));
        inside.close_view(&again);
        let differ = host.disk.chunks(4096).zip(before.chunks(4096)).filter(|(a, b)| a != b).count() as u64 * 4096;
        let sent = host.copied - copied;
        println!("round {round}: {differ} bytes in blocks that differ, {sent} sent of {}", host.disk.len());
        assert!(sent <= differ, "round {round}: {sent} bytes were sent, {differ} differ");
    }
}

#[test]
fn a_host_is_copied_followed_cut_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let mut host = Host::protect(&inside, "db", disk(4 << 20, 1));
    wait_for("the new group", || (inside.group_state("db")["state"] == "never-synced").then_some(()));
    assert_eq!(inside.refused("POST", "groups/db/views", r#"{"at":"latest"}"#), "no-such-point");
    let mut rng = Rng::new(2);
    host.connect();
    // Initial sync under live writes.
    for _ in 0..50 {
        host.write_some(&mut rng);
        host.step();
    }
    host.settle();
    let state = wait_for("replicating", || {
        host.step();
        let state = inside.group_state("db");
        (state["state"] == "replicating" && state["lag_ms"].is_u64()).then_some(state)
    });
    assert_eq!(state["host_name"], "db");
    let view = inside.view("db", "\"latest\"");
    assert_same(&view.volumes[0], &host.disk, "after the initial sync");
    inside.close_view(&view);

    // Live writes with cuts at any moment; writes go on while the line is down.
    let mut images = Vec::new();
    for round in 0..6 {
        for i in 0..60 {
            host.write_some(&mut rng);
            if i % 7 == 0 {
                host.step();
            }
            if rng.below(40) == 0 {
                host.cut();
                host.write_some(&mut rng);
                host.connect();
            }
        }
        host.settle();
        let view = inside.view("db", "\"latest\"");
        assert_same(&view.volumes[0], &host.disk, ("round", round));
        images.push((view.lsn, host.disk.clone()));
        inside.close_view(&view);
    }
    assert!(host.cuts > 0, "no cut was tried");

    // A gap: old moments stay open, none is offered inside, and the end is right.
    host.lose(Extent::new(100, 500));
    host.settle();
    for (lsn, image) in &images {
        let view = inside.view("db", &format!("{{\"lsn\":{lsn}}}"));
        assert_same(&view.volumes[0], image, ("LSN", lsn));
        inside.close_view(&view);
    }
    let gaps = inside.get("groups/db/points")["gaps"].as_array().unwrap().len();
    assert!(gaps >= 2, "{gaps} gaps");
    let view = inside.view("db", "\"latest\"");
    assert_same(&view.volumes[0], &host.disk, "after the gap");

    // A bookmark asked for at the box holds what the host wrote before.
    let socket = inside.socket();
    struct At(std::path::PathBuf);
    impl Control for At {
        fn socket(&self) -> std::path::PathBuf {
            self.0.clone()
        }
    }
    host.write_some(&mut rng);
    let asking = std::thread::spawn(move || At(socket).ok("POST", "groups/db/bookmarks", r#"{"name":"noon"}"#));
    let deadline = Instant::now() + DEADLINE;
    while !asking.is_finished() {
        assert!(Instant::now() < deadline, "no bookmark");
        host.step();
        host.write_some(&mut rng);
    }
    let made = asking.join().unwrap();
    let noon = host.at_bookmark.values().next().unwrap().clone();
    let view = inside.view("db", r#"{"bookmark":"noon"}"#);
    assert_eq!(made["lsn"].as_u64(), Some(view.lsn));
    assert_same(&view.volumes[0], &noon, "the bookmark");
    // Asked for a resync by the operator.
    let socket = inside.socket();
    let asking = std::thread::spawn(move || At(socket).ok("POST", "groups/db/resync", ""));
    while !asking.is_finished() {
        host.step();
    }
    asking.join().unwrap();
    host.settle();
    let view = inside.view("db", "\"latest\"");
    assert_same(&view.volumes[0], &host.disk, "after the resync");
    // Gone: said so, nothing guessed.
    host.cut();
    let state = wait_for("disconnected", || {
        let state = inside.group_state("db");
        (state["state"] == "disconnected").then_some(state)
    });
    assert!(state["lag_ms"].is_null() && state["lag_since_us"].is_u64(), "{state}");
    assert!(state["risks"].as_array().unwrap().iter().any(|r| r["kind"] == "host-silent"), "{state}");
}

#[test]
fn a_restarted_box_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut inside = Inside::start(&data, "");
    let mut host = Host::protect(&inside, "db", disk(2 << 20, 5));
    let mut rng = Rng::new(6);
    host.connect();
    host.settle();
    for round in 0..3 {
        for _ in 0..100 {
            host.write_some(&mut rng);
        }
        host.step();
        // Whatever is under way is cut off by the box's end.
        inside.stop();
        host.cut();
        for _ in 0..20 {
            host.write_some(&mut rng);
        }
        inside = Inside::start(&data, "");
        host.at = inside.listen();
        host.control = host.identity.connect(inside.listen(), Purpose::Control).unwrap();
        host.connect();
        host.settle();
        let view = inside.view("db", "\"latest\"");
        assert_same(&view.volumes[0], &host.disk, ("round", round));
        assert_eq!(
            inside.get("groups/db/points")["gaps"].as_array().unwrap().len(),
            1,
            "only the initial sync is a gap"
        );
    }
}

#[test]
fn a_box_out_of_room_is_waited_for() {
    // A window that may be shortened to nothing, but at most 24 MiB of journal: the stream stalls and goes on.
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let mut host = Host::protect(&inside, "db", disk(2 << 20, 5));
    host.connect();
    host.settle();
    let mut policy = inside.group_state("db")["policy"].clone();
    policy["journal_bytes_max"] = (30u64 << 20).into();
    let socket = inside.socket();
    struct At(std::path::PathBuf);
    impl Control for At {
        fn socket(&self) -> std::path::PathBuf {
            self.0.clone()
        }
    }
    inside.ok("PATCH", "groups/db/policy", &policy.to_string());
    let mut rng = Rng::new(8);
    let deadline = Instant::now() + DEADLINE;
    while inside.group_state("db")["reason"].is_null() {
        assert!(Instant::now() < deadline, "the journal does not fill: {}", inside.group_state("db"));
        for _ in 0..50 {
            host.write_some(&mut rng);
        }
        host.step();
    }
    let full = inside.group_state("db");
    assert!(full["risks"].as_array().unwrap().iter().any(|r| r["kind"] == "journal-full"), "{full}");
    policy["journal_bytes_max"] = serde_json::Value::Null;
    let text = policy.to_string();
    let asking = std::thread::spawn(move || At(socket).ok("PATCH", "groups/db/policy", &text));
    while !asking.is_finished() {
        host.step();
    }
    asking.join().unwrap();
    host.settle();
    let view = inside.view("db", "\"latest\"");
    assert_same(&view.volumes[0], &host.disk, "after room came back");
}

#[test]
fn a_hosts_clock_that_jumps_moves_no_moment() {
    const YEAR_US: i64 = 365 * 24 * 3_600_000_000;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let mut host = Host::protect(&inside, "db", disk(2 << 20, 5));
    let mut rng = Rng::new(12);
    host.connect();
    host.settle();
    let mut moments = Vec::new();
    // Ahead, back before the epoch's first years, a second back, and right again.
    for shift in [0, 10 * YEAR_US, -50 * YEAR_US, -1_000_000, 0] {
        host.wall_shift_us = shift;
        for i in 0..40 {
            host.write_some(&mut rng);
            if i % 8 == 0 {
                host.step();
            }
        }
        host.settle();
        let state = wait_for("lag to be known", || {
            host.step();
            let state = inside.group_state("db");
            (state["state"] == "replicating" && state["lag_ms"].is_u64()).then_some(state)
        });
        // Lag is proved by the box's own clock and the host's monotonic one: no jump is in it.
        assert!(state["lag_ms"].as_u64().unwrap() < 3_600_000, "shift {shift}: {state}");
        let view = inside.view("db", "\"latest\"");
        assert_same(&view.volumes[0], &host.disk, ("shift", shift));
        moments.push((view.lsn, view.answer["time_us"].as_u64().unwrap(), host.disk.clone()));
        inside.close_view(&view);
    }
    assert!(moments.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "time went back in the history");
    let span = moments[4].1 - moments[0].1;
    assert!(span < 3_600_000_000, "a jump of the host's clock is in the history: {span} us");
    for (lsn, time, image) in &moments {
        let view = inside.view("db", &format!("{{\"lsn\":{lsn}}}"));
        assert_same(&view.volumes[0], image, ("LSN", lsn));
        inside.close_view(&view);
        // By its time: the same state. Watermarks of the same microsecond may follow it; they change nothing.
        let view = inside.view("db", &format!("{{\"time\":{time}}}"));
        assert_same(&view.volumes[0], image, ("time", time));
        inside.close_view(&view);
    }
    assert_eq!(inside.get("groups/db/points")["gaps"].as_array().unwrap().len(), 1, "a jump made a gap");
}

#[test]
fn of_two_agents_with_one_identity_one_writes_and_neither_spoils_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    // Nobody falls silent here, however busy the machine is.
    let inside = Inside::start(&data, "heartbeat_timeout_ms = 60000");
    let mut host = Host::protect(&inside, "db", disk(2 << 20, 5));
    let mut rng = Rng::new(3);
    host.connect();
    host.settle();
    // A cloned machine: the same certificate, another instance, another disk.
    let clone = host.identity.of_instance([9; 16]);
    let purpose = Purpose::Stream { group: host.spec.id };
    for _ in 0..5 {
        host.write_some(&mut rng);
        host.step();
        assert_eq!(clone.connect(inside.listen(), Purpose::Control).err().unwrap().code, wire::RefuseCode::Duplicate);
        let refused = clone.connect(inside.listen(), purpose).err().unwrap();
        assert_eq!(refused.code, wire::RefuseCode::Duplicate, "{refused}");
        assert!(refused.text.contains("identity") || refused.text.contains("agent"), "{refused}");
    }
    host.settle();
    let old = inside.view("db", "\"latest\"");
    assert_same(&old.volumes[0], &host.disk, "the first agent's disk");
    inside.close_view(&old);
    let first_disk = host.disk.clone();
    // The first falls silent; the clone may come, begins a stream of its own, and its disk is copied whole behind a gap.
    drop(host.stream.take());
    let mut second = host.in_other_hands(clone, disk(2 << 20, 99));
    second.connect();
    second.settle();
    let view = inside.view("db", "\"latest\"");
    assert_same(&view.volumes[0], &second.disk, "the second agent's disk");
    let view = inside.view("db", &format!("{{\"lsn\":{}}}", old.lsn));
    assert_same(&view.volumes[0], &first_disk, "what the first agent had sent stays what it was");
    assert_eq!(inside.get("groups/db/points")["gaps"].as_array().unwrap().len(), 2, "a gap between the two disks");
}

#[test]
fn what_a_host_may_protect_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let host = Host::protect(&inside, "db", disk(1 << 20, 1));
    let other = Host::protect(&inside, "web", disk(1 << 20, 1));
    let mut control = host.control;
    let volume = host.spec.volumes[0].clone();
    let wished = std::cell::Cell::new(SyncMode::Async);
    let mut protect = |name: &str, volumes: Vec<VolumeSpec>| {
        control.say(&Message::Protect { group_name: name.into(), volumes, mode: wished.get() });
        loop {
            match control.hear() {
                Ok(Message::HeartbeatAck { .. } | Message::Command { .. }) => {}
                Ok(Message::Protected { spec }) => return Ok(spec),
                Ok(other) => panic!("{other:?}"),
                Err(refusal) => return Err(refusal.code),
            }
        }
    };
    use wire::RefuseCode as Code;
    assert_eq!(protect("db", vec![volume.clone()]).unwrap(), host.spec, "asked again: the same group");
    let second = VolumeSpec { identity: "serial:2".into(), name: "/dev/sdc".into(), ..volume.clone() };
    let grown = protect("db", vec![second.clone(), volume.clone()]).unwrap();
    assert_eq!(
        grown.volumes.iter().map(|v| (v.id.0, &*v.identity)).collect::<Vec<_>>(),
        [(0, "serial:db"), (1, "serial:2")]
    );
    // What the operator set on the box stays, whatever a host that protects again says.
    let mut policy = inside.get("groups/db")["policy"].clone();
    policy["window_hours"] = 5.into();
    policy["mode"] = serde_json::json!({ "sync": { "wait_ms_max": 100, "at_bound": "degrade" } });
    let set = inside.ok("PATCH", "groups/db/policy", &policy.to_string())["policy"].clone();
    let again = protect("db", vec![second.clone(), volume.clone()]).unwrap();
    assert_eq!(serde_json::to_value(&again.policy).unwrap(), set);
    assert!(matches!(again.policy.mode, SyncMode::Sync { .. }), "{again:?}");
    let waiting = SyncMode::Sync { wait_ms_max: 7, at_bound: model::Bound::Hold };
    wished.set(waiting);
    let again = protect("db", vec![second.clone(), volume.clone()]).unwrap();
    assert_eq!((again.policy.mode, again.policy.window_hours), (waiting, 5), "what it asks for by name it gets");
    wished.set(SyncMode::Async);
    assert_eq!(protect("db", vec![volume.clone()]), Err(Code::VolumeChanged));
    assert_eq!(protect("web", vec![volume.clone()]), Err(Code::NameTaken));
    assert_eq!(protect("x", vec![]), Err(Code::BadRequest));
    assert_eq!(protect("x", vec![volume.clone(), volume.clone()]), Err(Code::BadRequest));
    assert_eq!(protect("a\nb", vec![volume.clone()]), Err(Code::BadRequest));
    // A size whose bytes no number holds would break every sum of sizes.
    let endless = VolumeSpec { sectors: Sectors(u64::MAX), ..volume.clone() };
    assert_eq!(protect("x", vec![endless]), Err(Code::BadRequest));
    let shrunk = VolumeSpec { sectors: Sectors(5), ..volume };
    assert_eq!(protect("db", vec![shrunk, second]), Err(Code::VolumeChanged));
    // Another host's group is not its to open.
    let purpose = Purpose::Stream { group: other.spec.id };
    let mut stream = host.identity.connect(inside.listen(), purpose).unwrap();
    stream.say(&open_stream(other.spec.id, &other.spec.volumes));
    assert_eq!(stream.hear_refusal().code, Code::NotYours);
}

/// An `OpenStream` of a stream the box does not know.
pub fn open_stream(group: GroupId, volumes: &[VolumeSpec]) -> Message {
    Message::OpenStream {
        group,
        stream: StreamId([3; 16]),
        first_seq: model::SourceSeq(1),
        next_seq: Some(model::SourceSeq(1)),
        volumes: volumes.to_vec(),
        acked_durable: None,
        mono_ns: 1,
        wall_us: 1,
    }
}
