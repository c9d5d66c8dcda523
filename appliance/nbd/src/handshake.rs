//! The fixed-newstyle handshake, server side, without I/O.
//!
//! ```text
//!  Greeting ──> ClientFlags ──> OptionHeader ──> OptionData ─┬─> OptionHeader   (any answer)
//!                                    │  └─> Discard ─────────┤   (longer than MAX_OPTION_BYTES)
//!                                    │                       ├─> Tls ──(tls_started)──> OptionHeader
//!                                    │                       ├─> Ready  (GO, EXPORT_NAME)
//!                                    └── refused by name     └─> Closed (ABORT)
//! ```
//!
//! Once an error has been returned the connection is to be closed; the machine answers nothing more.

use crate::{
    export::{ExportInfo, Exports},
    format::*,
    request::{ReplyMode, Session},
};

/// Whether the transport must be secured before anything is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlsPolicy {
    /// No TLS on this listener (a local socket guarded by its file mode); STARTTLS is refused.
    None,
    /// Nothing but STARTTLS and ABORT is answered before TLS.
    Required,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HandshakeConfig {
    pub tls: TlsPolicy,
}

/// What the caller does next.
#[derive(Debug)]
pub enum Step {
    /// Send these bytes.
    Write(Vec<u8>),
    /// Read exactly this many bytes (or fewer) and hand them to [`ServerHandshake::feed`]. Never more than
    /// [`MAX_OPTION_BYTES`].
    Read(usize),
    /// Everything was sent: do the TLS handshake on the stream, then call [`ServerHandshake::tls_started`].
    StartTls,
    /// The handshake is over; the next bytes are requests.
    Ready(Session),
    /// The client ended the session in good order: close.
    Close,
}

/// Why a connection is closed during the handshake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("NBD handshake: the client does not speak the fixed newstyle protocol (its flags are {flags:#x})")]
    NotFixedNewstyle { flags: u32 },
    #[error("NBD handshake: the client sent unknown flags {flags:#x}")]
    UnknownFlags { flags: u32 },
    #[error("NBD handshake: {got:#018x} stands where an option must begin")]
    BadOptionMagic { got: u64 },
    #[error("NBD handshake: option {option} announces {len} bytes, more than anyone needs")]
    OptionTooLong { option: u32, len: u32 },
    #[error("NBD handshake: more than {MAX_OPTIONS} options")]
    TooManyOptions,
    #[error("NBD handshake: the client asked for an export without TLS; this listener requires it")]
    TlsRequired,
    /// EXPORT_NAME has no way to say no but hanging up.
    #[error("NBD handshake: there is no export {name:?}")]
    UnknownExport { name: String },
    #[error("NBD handshake: the export's name is not UTF-8 or too long")]
    BadExportName,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Greeting,
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, len: usize },
    Discard { option: u32, left: usize },
    Tls,
    Ready,
    Closed,
}

/// See the [module](self).
#[derive(Debug)]
pub struct ServerHandshake {
    config: HandshakeConfig,
    state: State,
    secured: bool,
    no_zeroes: bool,
    replies: ReplyMode,
    /// The export `base:allocation` was chosen for.
    allocation_for: Option<String>,
    options: u32,
    input: Vec<u8>,
    output: Vec<u8>,
    session: Option<Session>,
}

/// How an option was taken.
enum Answer {
    Ack,
    /// The answer is written already.
    Done,
    Refuse(u32, &'static str),
}

impl ServerHandshake {
    pub fn new(config: HandshakeConfig) -> Self {
        Self {
            config,
            state: State::Greeting,
            secured: false,
            no_zeroes: false,
            replies: ReplyMode::Simple,
            allocation_for: None,
            options: 0,
            input: Vec::new(),
            output: Vec::new(),
            session: None,
        }
    }

    /// Hands in bytes that [`Step::Read`] asked for. Panics when they are more than it asked for: that is the driver's
    /// mistake, never the peer's.
    pub fn feed(&mut self, bytes: &[u8]) {
        let missing = self.wanted().saturating_sub(self.input.len());
        assert!(bytes.len() <= missing, "the handshake asked for {missing} bytes and was given {}", bytes.len());
        self.input.extend_from_slice(bytes);
    }

    /// The stream is under TLS now. What was negotiated in plain text is forgotten, as the protocol demands.
    pub fn tls_started(&mut self) {
        assert_eq!(self.state, State::Tls, "TLS starts when the handshake says so");
        self.secured = true;
        self.replies = ReplyMode::Simple;
        self.allocation_for = None;
        self.state = State::OptionHeader;
    }

    /// Goes on as far as the bytes at hand allow and says what is to be done next.
    pub fn step(&mut self, exports: &dyn Exports) -> Result<Step, HandshakeError> {
        let step = self.advance(exports);
        if step.is_err() {
            self.state = State::Closed;
            self.output.clear();
        }
        step
    }

    fn advance(&mut self, exports: &dyn Exports) -> Result<Step, HandshakeError> {
        loop {
            if !self.output.is_empty() {
                return Ok(Step::Write(std::mem::take(&mut self.output)));
            }
            let wanted = self.wanted();
            if self.input.len() < wanted {
                return Ok(Step::Read(wanted - self.input.len()));
            }
            let input = std::mem::take(&mut self.input);
            match self.state {
                State::Greeting => {
                    self.output.extend_from_slice(&MAGIC.to_be_bytes());
                    self.output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
                    self.output.extend_from_slice(&(greeting::FIXED_NEWSTYLE | greeting::NO_ZEROES).to_be_bytes());
                    self.state = State::ClientFlags;
                }
                State::ClientFlags => {
                    self.on_client_flags(Fields(&input).u32().expect("four bytes were asked for"))?;
                    self.state = State::OptionHeader;
                }
                State::OptionHeader => self.on_option_header(&input)?,
                State::OptionData { option, .. } => {
                    self.state = State::OptionHeader;
                    self.on_option(option, &input, exports)?;
                }
                State::Discard { option, left } => match left - input.len() {
                    0 => {
                        self.state = State::OptionHeader;
                        self.refuse(option, rep::ERR_TOO_BIG, "more data than this option needs");
                    }
                    left => self.state = State::Discard { option, left },
                },
                State::Tls => return Ok(Step::StartTls),
                State::Ready => {
                    self.state = State::Closed;
                    if let Some(session) = self.session.take() {
                        return Ok(Step::Ready(session));
                    }
                }
                State::Closed => return Ok(Step::Close),
            }
        }
    }

    fn wanted(&self) -> usize {
        match self.state {
            State::ClientFlags => 4,
            State::OptionHeader => OPTION_HEADER_LEN,
            State::OptionData { len, .. } => len,
            State::Discard { left, .. } => left.min(MAX_OPTION_BYTES),
            State::Greeting | State::Tls | State::Ready | State::Closed => 0,
        }
    }

    fn on_client_flags(&mut self, flags: u32) -> Result<(), HandshakeError> {
        let known = u32::from(greeting::FIXED_NEWSTYLE | greeting::NO_ZEROES);
        if flags & !known != 0 {
            return Err(HandshakeError::UnknownFlags { flags });
        }
        if flags & u32::from(greeting::FIXED_NEWSTYLE) == 0 {
            return Err(HandshakeError::NotFixedNewstyle { flags });
        }
        self.no_zeroes = flags & u32::from(greeting::NO_ZEROES) != 0;
        Ok(())
    }

    fn on_option_header(&mut self, header: &[u8]) -> Result<(), HandshakeError> {
        let mut fields = Fields(header);
        let (Some(magic), Some(option), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) else {
            unreachable!("a whole option header was asked for");
        };
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::BadOptionMagic { got: magic });
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(HandshakeError::TooManyOptions);
        }
        if len > MAX_DISCARD_BYTES {
            return Err(HandshakeError::OptionTooLong { option, len });
        }
        let len = len as usize;
        self.state = if len > MAX_OPTION_BYTES {
            if option == opt::EXPORT_NAME {
                return Err(HandshakeError::BadExportName);
            }
            State::Discard { option, left: len }
        } else {
            State::OptionData { option, len }
        };
        Ok(())
    }

    fn on_option(&mut self, option: u32, data: &[u8], exports: &dyn Exports) -> Result<(), HandshakeError> {
        let needs_tls = self.config.tls == TlsPolicy::Required && !self.secured;
        if needs_tls && !matches!(option, opt::STARTTLS | opt::ABORT) {
            if option == opt::EXPORT_NAME {
                return Err(HandshakeError::TlsRequired);
            }
            self.refuse(option, rep::ERR_TLS_REQD, "this listener requires TLS: send STARTTLS first");
            return Ok(());
        }
        let answer = match option {
            opt::EXPORT_NAME => return self.on_export_name(data, exports),
            opt::ABORT => {
                self.reply(option, rep::ACK, &[]);
                self.state = State::Closed;
                return Ok(());
            }
            opt::LIST => self.on_list(data, exports),
            opt::STARTTLS => self.on_starttls(data),
            opt::INFO | opt::GO => self.on_info(option, data, exports),
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.replies = ReplyMode::Structured;
                Answer::Ack
            }
            opt::STRUCTURED_REPLY => Answer::Refuse(rep::ERR_INVALID, "this option takes no data"),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.on_meta_context(option, data, exports),
            _ => Answer::Refuse(rep::ERR_UNSUP, "option not supported"),
        };
        match answer {
            Answer::Ack => self.reply(option, rep::ACK, &[]),
            Answer::Refuse(code, text) => self.refuse(option, code, text),
            Answer::Done => {}
        }
        Ok(())
    }

    fn on_export_name(&mut self, data: &[u8], exports: &dyn Exports) -> Result<(), HandshakeError> {
        let name = export_name(data).ok_or(HandshakeError::BadExportName)?;
        let info = exports.find(name).ok_or_else(|| HandshakeError::UnknownExport { name: name.to_owned() })?;
        self.output.extend_from_slice(&info.size.0.to_be_bytes());
        self.output.extend_from_slice(&info.wire_flags(self.replies == ReplyMode::Structured).to_be_bytes());
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; greeting::ZEROES]);
        }
        self.enter(name, info);
        Ok(())
    }

    fn on_list(&mut self, data: &[u8], exports: &dyn Exports) -> Answer {
        if !data.is_empty() {
            return Answer::Refuse(rep::ERR_INVALID, "this option takes no data");
        }
        for entry in exports.list() {
            let name = clip(&entry.name, MAX_NAME_BYTES);
            let mut body = Vec::with_capacity(4 + name.len() + entry.description.len().min(MAX_NAME_BYTES));
            push_text(&mut body, name);
            body.extend_from_slice(clip(&entry.description, MAX_NAME_BYTES).as_bytes());
            self.reply(opt::LIST, rep::SERVER, &body);
        }
        Answer::Ack
    }

    fn on_starttls(&mut self, data: &[u8]) -> Answer {
        match self.config.tls {
            _ if !data.is_empty() => Answer::Refuse(rep::ERR_INVALID, "this option takes no data"),
            TlsPolicy::None => Answer::Refuse(rep::ERR_POLICY, "this listener has no TLS"),
            TlsPolicy::Required if self.secured => Answer::Refuse(rep::ERR_INVALID, "TLS has started already"),
            TlsPolicy::Required => {
                self.state = State::Tls;
                Answer::Ack
            }
        }
    }

    fn on_info(&mut self, option: u32, data: &[u8], exports: &dyn Exports) -> Answer {
        let Some((name, wanted)) = parse_info(data) else {
            return Answer::Refuse(rep::ERR_INVALID, "malformed request for an export");
        };
        let Some(name) = export_name(name) else {
            return Answer::Refuse(rep::ERR_INVALID, "the export's name is not UTF-8 or too long");
        };
        let Some(info) = exports.find(name) else {
            return Answer::Refuse(rep::ERR_UNKNOWN, "there is no export of this name");
        };
        let mut body = Vec::with_capacity(16);
        body.extend_from_slice(&info::EXPORT.to_be_bytes());
        body.extend_from_slice(&info.size.0.to_be_bytes());
        body.extend_from_slice(&info.wire_flags(self.replies == ReplyMode::Structured).to_be_bytes());
        self.reply(option, rep::INFO, &body);
        // Each kind is answered once, however often it was asked for: the answer stays small.
        if wanted.contains(&info::NAME) {
            self.reply(option, rep::INFO, &[&info::NAME.to_be_bytes(), name.as_bytes()].concat());
        }
        if wanted.contains(&info::DESCRIPTION) && !info.description.is_empty() {
            let text = clip(&info.description, MAX_NAME_BYTES);
            self.reply(option, rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), text.as_bytes()].concat());
        }
        // Sent unasked too: a client that understands INFO answers may always make use of it.
        let mut body = Vec::with_capacity(14);
        body.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        for size in [info.blocks.min, info.blocks.preferred, info.blocks.max_payload] {
            body.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, rep::INFO, &body);
        self.reply(option, rep::ACK, &[]);
        if option == opt::GO {
            self.enter(name, info);
        }
        Answer::Done
    }

    fn on_meta_context(&mut self, option: u32, data: &[u8], exports: &dyn Exports) -> Answer {
        if option == opt::SET_META_CONTEXT {
            self.allocation_for = None;
            if self.replies == ReplyMode::Simple {
                return Answer::Refuse(rep::ERR_INVALID, "meta contexts need structured replies: ask for them first");
            }
        }
        let Some((name, queries)) = parse_meta(data) else {
            return Answer::Refuse(rep::ERR_INVALID, "malformed request for meta contexts");
        };
        let Some(name) = export_name(name) else {
            return Answer::Refuse(rep::ERR_INVALID, "the export's name is not UTF-8 or too long");
        };
        if exports.find(name).is_none() {
            return Answer::Refuse(rep::ERR_UNKNOWN, "there is no export of this name");
        }
        let exact = queries.contains(&CONTEXT_ALLOCATION.as_bytes());
        let (chosen, id) = if option == opt::SET_META_CONTEXT {
            (exact, CONTEXT_ALLOCATION_ID)
        } else {
            // An empty list asks for everything, `base:` for everything of that namespace.
            (exact || queries.is_empty() || queries.contains(&b"base:".as_slice()), 0)
        };
        if chosen {
            self.reply(option, rep::META_CONTEXT, &[&id.to_be_bytes(), CONTEXT_ALLOCATION.as_bytes()].concat());
            if option == opt::SET_META_CONTEXT {
                self.allocation_for = Some(name.to_owned());
            }
        }
        Answer::Ack
    }

    fn enter(&mut self, name: &str, info: ExportInfo) {
        // A context chosen for another export does not count.
        let block_status = self.allocation_for.as_deref() == Some(name);
        self.session = Some(Session::new(name.to_owned(), info, self.replies, block_status));
        self.state = State::Ready;
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("answers are a few KiB");
        self.output.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&option.to_be_bytes());
        self.output.extend_from_slice(&kind.to_be_bytes());
        self.output.extend_from_slice(&len.to_be_bytes());
        self.output.extend_from_slice(data);
    }

    fn refuse(&mut self, option: u32, code: u32, text: &'static str) {
        self.reply(option, code, text.as_bytes());
    }
}

fn export_name(name: &[u8]) -> Option<&str> {
    if name.len() > MAX_NAME_BYTES {
        return None;
    }
    std::str::from_utf8(name).ok()
}

/// Name and wanted kinds of information; `None` when the lengths do not add up.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.text()?;
    let count = usize::from(fields.u16()?);
    let wanted: Vec<u16> = (0..count).map_while(|_| fields.u16()).collect();
    (wanted.len() == count && fields.is_empty()).then_some((name, wanted))
}

/// Name and queries; `None` when the lengths do not add up.
fn parse_meta(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.text()?;
    let count = fields.u32()?;
    let mut queries = Vec::new(); // grows with bytes that are really there, not with the announced count
    for _ in 0..count {
        queries.push(fields.text()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u32::try_from(text.len()).expect("clipped to the limit").to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
