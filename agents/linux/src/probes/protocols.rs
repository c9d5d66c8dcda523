//! Applications that answer on the network: a few bytes of each one's own protocol, so that a server that accepts and does nothing is found out.
//!
//! | kind | what is said | it works when |
//! |---|---|---|
//! | tcp | nothing | somebody accepts |
//! | http, https | `GET path`, and nothing of the answer after its first line is read | the status is below 400 |
//! | postgres | start-up as user `holdfast` of `postgres`; let in without a password: `SELECT 1` | it answers the query, asks for a password, or does not know user or database |
//! | mysql | the handshake as user `holdfast` without a password; let in: ping | it answers the ping, or refuses the user |
//! | redis | `PING` | it answers `PONG`, or that a password is missing |
//!
//! No password crosses the network or lies anywhere: a server that refuses us has understood us, and that is what is asked. Who wants more gives the
//! user `holdfast` a login without rights and without a password from this host, or writes a script. The certificate behind `https` is not
//! checked: whose it is says nothing about whether it works. Servers without TLS 1.3 cannot be asked.
//!
//! **Hostile answers.** Every length that comes is checked before anything is read by it; at most [`ANSWER_MAX`] bytes are read, by one
//! deadline over all of them.

use super::{Not, plain};
use crate::tls;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};
use wire::ProbeKind;

/// More of an answer is not read.
pub const ANSWER_MAX: usize = 16 << 10;
/// No packet that is waited for is longer.
const PACKET_MAX: usize = 4096;
/// Of what a server says of itself.
const SAID_MAX: usize = 160;
const USER: &str = "holdfast";

pub(super) fn ask(kind: &ProbeKind, limit: Duration) -> Result<(), Not> {
    match kind {
        ProbeKind::Tcp { address } => Wire::connect(address, limit).map(drop),
        ProbeKind::Http { address, path } => http(&mut Wire::connect(address, limit)?, address, path),
        ProbeKind::Https { address, name, path } => {
            https(Wire::connect(address, limit)?, address, name.as_deref(), path)
        }
        ProbeKind::Postgres { address } => postgres(&mut Wire::connect(address, limit)?),
        ProbeKind::Mysql { address } => mysql(&mut Wire::connect(address, limit)?),
        ProbeKind::Redis { address } => redis(&mut Wire::connect(address, limit)?),
        ProbeKind::Unit(_) | ProbeKind::Process(_) | ProbeKind::Script(_) => {
            Err(Not::Made("this is asked of the host, not of the network".into()))
        }
    }
}

/// A connection with one deadline for all that is done on it.
struct Wire {
    stream: TcpStream,
    at: SocketAddr,
    limit: Duration,
    until: Instant,
    left: usize,
}

impl Wire {
    fn connect(address: &str, limit: Duration) -> Result<Self, Not> {
        let until = Instant::now() + limit;
        let at: SocketAddr =
            address.parse().map_err(|_| Not::Made(format!("{address:?} is no address with its port")))?;
        let stream = TcpStream::connect_timeout(&at, limit).map_err(|e| match e.kind() {
            io::ErrorKind::ConnectionRefused => Not::Working(format!("nobody accepts connections at {at}")),
            io::ErrorKind::TimedOut => Not::Working(format!("{at} did not answer within {} ms", limit.as_millis())),
            _ if lacks_means(&e) => Not::Made(format!("could not connect to {at}: {e}")),
            _ => Not::Working(format!("could not connect to {at}: {e}")),
        })?;
        Ok(Self { stream, at, limit, until, left: ANSWER_MAX })
    }

    fn rest(&self) -> io::Result<Duration> {
        let left = self.until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero());
        left.ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
    fn fault(&self, e: &io::Error) -> Not {
        let at = self.at;
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Not::Working(format!(
                "{at} accepted the connection and gave no whole answer within {} ms",
                self.limit.as_millis()
            )),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Not::Working(format!("{at} closed the connection before it had answered"))
            }
            io::ErrorKind::OutOfMemory => Not::Working(format!("{at} answered with more than {ANSWER_MAX} bytes")),
            _ if lacks_means(e) => Not::Made(format!("could not speak with {at}: {e}")),
            _ => Not::Working(format!("the connection to {at} broke: {e}")),
        }
    }
    fn garbage(&self, of: &str, said: &[u8]) -> Not {
        Not::Working(format!("what answers at {} is not {of}: {:?}", self.at, plain(said, 32, false)))
    }

    fn say(&mut self, bytes: &[u8]) -> Result<(), Not> {
        self.write_all(bytes).map_err(|e| self.fault(&e))
    }
    fn hear<const N: usize>(&mut self) -> Result<[u8; N], Not> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes).map_err(|e| self.fault(&e))?;
        Ok(bytes)
    }
    fn hear_len(&mut self, len: usize) -> Result<Vec<u8>, Not> {
        let mut bytes = vec![0; len.min(PACKET_MAX)];
        self.read_exact(&mut bytes).map_err(|e| self.fault(&e))?;
        Ok(bytes)
    }
}

/// What this host lacks, not the application.
fn lacks_means(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(
            libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
                | libc::EADDRNOTAVAIL
                | libc::EPERM
                | libc::EACCES
        )
    )
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.stream.set_read_timeout(Some(self.rest()?))?;
        let len = buf.len().min(self.left);
        let n = self.stream.read(&mut buf[..len])?;
        self.left -= n;
        Ok(n)
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.rest()?))?;
        self.stream.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// ---------------------------------------------------------------- HTTP

fn http(wire: &mut Wire, address: &str, path: &str) -> Result<(), Not> {
    let done = get(wire, address, path);
    status(done, wire)
}

fn get(stream: &mut (impl Read + Write), host: &str, path: &str) -> io::Result<Vec<u8>> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: holdfast-agent/{}\r\nAccept: */*\r\nConnection: close\r\n\r\n",
        crate::VERSION
    );
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < SAID_MAX && !line.ends_with(b"\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
        // What does not begin so needs not be waited for.
        if !b"HTTP/1.".starts_with(&line[..line.len().min(7)]) {
            break;
        }
    }
    Ok(line)
}

fn status(line: io::Result<Vec<u8>>, wire: &Wire) -> Result<(), Not> {
    let line = line.map_err(|e| wire.fault(&e))?;
    let text = plain(&line, SAID_MAX, false);
    let (version, rest) = text.split_once(' ').unwrap_or((&text, ""));
    let code = rest.get(..3).and_then(|c| c.parse::<u16>().ok()).filter(|_| version.starts_with("HTTP/1."));
    match code {
        Some(100..=399) => Ok(()),
        Some(400..=999) => Err(Not::Working(format!("{} answers {rest}", wire.at))),
        _ => Err(wire.garbage("an HTTP server", &line)),
    }
}

fn https(mut wire: Wire, address: &str, name: Option<&str>, path: &str) -> Result<(), Not> {
    let broken = |what: String| Not::Made(format!("could not begin TLS with {address}: {what}"));
    let server: ServerName<'static> = match name {
        Some(name) => ServerName::try_from(name.to_owned()).map_err(|e| broken(e.to_string()))?,
        None => wire.at.ip().into(),
    };
    let config = whoever().map_err(|e| broken(e.to_string()))?;
    let mut tls = ClientConnection::new(config, server).map_err(|e| broken(e.to_string()))?;
    while tls.is_handshaking() {
        if let Err(e) = tls.complete_io(&mut wire) {
            return Err(match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
                Some(
                    rustls::Error::AlertReceived(rustls::AlertDescription::ProtocolVersion)
                    | rustls::Error::PeerIncompatible(_),
                ) => Not::Made(format!("{address} speaks no TLS 1.3, which this probe needs: use a script")),
                Some(rustls::Error::InvalidMessage(_)) => {
                    Not::Working(format!("what answers at {address} speaks no TLS"))
                }
                Some(e) => Not::Working(format!("TLS with {address}: {e}")),
                None => wire.fault(&e),
            });
        }
    }
    let line = get(&mut rustls::Stream::new(&mut tls, &mut wire), name.unwrap_or(address), path);
    status(line, &wire)
}

fn whoever() -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Whoever(tls::provider())))
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Takes every certificate: nothing secret is said, and nothing that is heard is believed of anybody but this server. That the server has the
/// certificate's key is checked all the same.
#[derive(Debug)]
struct Whoever(Arc<CryptoProvider>);

impl ServerCertVerifier for Whoever {
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
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

// ---------------------------------------------------------------- PostgreSQL

/// Messages before the first that says something: parameters and notices.
const MESSAGES_MAX: usize = 64;

fn postgres(wire: &mut Wire) -> Result<(), Not> {
    let mut startup = 196_608_u32.to_be_bytes().to_vec();
    for word in ["user", USER, "database", "postgres", "application_name", "holdfast-probe", ""] {
        startup.extend(word.as_bytes());
        startup.push(0);
    }
    let len = 4 + startup.len() as u32;
    wire.say(&[&len.to_be_bytes()[..], &startup].concat())?;
    // Let in, asks for a password, or refuses.
    match postgres_until(wire, b"R", true)? {
        None => return Ok(()),
        Some((_, body)) if body.get(..4) != Some(&[0; 4]) => return Ok(()),
        Some(_) => {}
    }
    if postgres_until(wire, b"Z", true)?.is_none() {
        return Ok(());
    }
    wire.say(b"Q\0\0\0\x0dSELECT 1\0")?;
    let row = postgres_until(wire, b"D", false)?;
    // One column of one byte.
    match row {
        Some((_, body)) if body == [0, 1, 0, 0, 0, 1, b'1'] => {}
        row => return Err(wire.garbage("a PostgreSQL that knows SELECT 1", &row.unwrap_or_default().1)),
    }
    // It need not be heard any more: the answer is there.
    let _ = wire.say(b"X\0\0\0\x04");
    Ok(())
}

/// The next message of that kind. None: it refused us, and so understood us; that is good only while it lets nobody in.
fn postgres_until(wire: &mut Wire, wanted: &[u8; 1], may_refuse: bool) -> Result<Option<(u8, Vec<u8>)>, Not> {
    for _ in 0..MESSAGES_MAX {
        let head: [u8; 5] = wire.hear()?;
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if !head[0].is_ascii_alphabetic() || !(4..=PACKET_MAX).contains(&len) {
            return Err(wire.garbage("PostgreSQL", &head));
        }
        let body = wire.hear_len(len - 4)?;
        match head[0] {
            kind if kind == wanted[0] => return Ok(Some((kind, body))),
            b'E' => {
                let field = |of: u8| {
                    let mut fields = body.split(|b| *b == 0);
                    plain(fields.find_map(|f| f.strip_prefix(&[of])).unwrap_or_default(), SAID_MAX, false)
                };
                let code = field(b'C');
                // 28: who are you; 3D: there is no such database; 42501: you may not.
                if may_refuse && (code.starts_with("28") || code.starts_with("3D") || code == "42501") {
                    return Ok(None);
                }
                return Err(Not::Working(format!("PostgreSQL at {} says: {} ({code})", wire.at, field(b'M'))));
            }
            b'S' | b'K' | b'N' | b'T' | b'v' => {}
            _ => return Err(wire.garbage("PostgreSQL", &head)),
        }
    }
    Err(wire.garbage("PostgreSQL", b"notices without end"))
}

// ---------------------------------------------------------------- MySQL

/// Who refuses us so has understood us: access, host, plugin, lock, transport.
const MYSQL_REFUSALS: [u16; 10] = [1044, 1045, 1130, 1251, 1275, 1698, 1862, 3118, 3159, 4151];

fn mysql(wire: &mut Wire) -> Result<(), Not> {
    let (_, greeting) = mysql_packet(wire)?;
    match greeting.first() {
        Some(10) if greeting[1..].contains(&0) => {}
        Some(0xff) => return mysql_refusal(wire, &greeting),
        _ => return Err(wire.garbage("MySQL", &greeting)),
    }
    // Protocol 4.1 with its own authentication; 16 MiB packets, UTF-8, 23 bytes reserved.
    let mut answer = 0x8200_u32.to_le_bytes().to_vec();
    answer.extend((16_u32 << 20).to_le_bytes());
    answer.push(33);
    answer.extend([0; 23]);
    answer.extend(USER.as_bytes());
    answer.extend([0, 0]);
    mysql_say(wire, 1, &answer)?;
    // Let in, refused, or asked to authenticate in another way: that is answered with nothing, and refused.
    for _ in 0..3 {
        let (number, packet) = mysql_packet(wire)?;
        match packet.first() {
            Some(0) => {
                mysql_say(wire, 0, &[0x0e])?;
                let (_, pong) = mysql_packet(wire)?;
                let _ = mysql_say(wire, 0, &[1]);
                return match pong.first() {
                    Some(0) => Ok(()),
                    Some(0xff) => mysql_refusal(wire, &pong),
                    _ => Err(wire.garbage("MySQL", &pong)),
                };
            }
            Some(0xff) => return mysql_refusal(wire, &packet),
            Some(0xfe | 1) => mysql_say(wire, number.wrapping_add(1), &[])?,
            _ => return Err(wire.garbage("MySQL", &packet)),
        }
    }
    // It goes on asking for what we do not have.
    Ok(())
}

fn mysql_packet(wire: &mut Wire) -> Result<(u8, Vec<u8>), Not> {
    let head: [u8; 4] = wire.hear()?;
    let len = u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize;
    if !(1..=PACKET_MAX).contains(&len) {
        return Err(wire.garbage("MySQL", &head));
    }
    Ok((head[3], wire.hear_len(len)?))
}

fn mysql_say(wire: &mut Wire, number: u8, body: &[u8]) -> Result<(), Not> {
    let len = (body.len() as u32).to_le_bytes();
    wire.say(&[&[len[0], len[1], len[2], number][..], body].concat())
}

fn mysql_refusal(wire: &Wire, packet: &[u8]) -> Result<(), Not> {
    let Some(code) = packet.get(1..3).map(|c| u16::from_le_bytes([c[0], c[1]])) else {
        return Err(wire.garbage("MySQL", packet));
    };
    if MYSQL_REFUSALS.contains(&code) {
        return Ok(());
    }
    let text = &packet[3..];
    // `#` and a state of five characters, once both know each other.
    let text = if text.first() == Some(&b'#') { text.get(6..).unwrap_or_default() } else { text };
    Err(Not::Working(format!("MySQL at {} says: {} ({code})", wire.at, plain(text, SAID_MAX, false))))
}

// ---------------------------------------------------------------- Redis

fn redis(wire: &mut Wire) -> Result<(), Not> {
    wire.say(b"*1\r\n$4\r\nPING\r\n")?;
    let mut line = Vec::new();
    while line.len() < SAID_MAX && !line.ends_with(b"\n") {
        let [byte] = wire.hear()?;
        line.push(byte);
        if !matches!(line[0], b'+' | b'-') {
            break;
        }
    }
    let text = plain(&line, SAID_MAX, false);
    // A password is missing, or this user or address may not: it has understood us.
    let refused = ["-NOAUTH", "-NOPERM", "-DENIED"].iter().any(|r| text.starts_with(r));
    match text.strip_prefix('-') {
        _ if text == "+PONG" || refused => Ok(()),
        Some(said) => Err(Not::Working(format!("Redis at {} says: {said}", wire.at))),
        None => Err(wire.garbage("Redis", &line)),
    }
}
