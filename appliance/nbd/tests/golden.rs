//! Bytes as the protocol document gives them, written out by hand: what we send and take must never drift.

use model::ByteLen;
use nbd::{
    Allocation, Command, Errno, ExportEntry, ExportFlags, ExportInfo, Exports, HandshakeConfig, HandshakeError,
    Incoming, MAX_OPTION_BYTES, MAX_OPTIONS, ProtocolError, RefusalReason, ReplyMode, Request, ServerHandshake,
    Session, StatusExtent, Step, TlsPolicy,
};

struct Two;

impl Exports for Two {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        match name {
            "view" => Some(ExportInfo::read_only(ByteLen(1 << 20)).with_description("a moment")),
            "disk" => Some(ExportInfo::read_write(ByteLen(1 << 20))),
            _ => None,
        }
    }
    fn list(&self) -> Vec<ExportEntry> {
        vec![
            ExportEntry { name: "view".into(), description: "a moment".into() },
            ExportEntry { name: "disk".into(), description: String::new() },
        ]
    }
}

/// What happened to a client that said `input`.
struct Outcome {
    /// Everything the server sent, the greeting included.
    said: Vec<u8>,
    end: End,
}

#[derive(Debug)]
enum End {
    Ready(Box<Session>),
    Closed,
    Error(HandshakeError),
    /// The input was used up.
    Waiting,
}

/// Plays a client. `tls` says what to do at STARTTLS: the bytes behind it are then said under TLS.
fn play(tls: TlsPolicy, input: &[u8]) -> Outcome {
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls });
    let mut rest = input;
    let mut said = Vec::new();
    let end = loop {
        match handshake.step(&Two) {
            Err(e) => break End::Error(e),
            Ok(Step::Write(bytes)) => said.extend(bytes),
            Ok(Step::StartTls) => handshake.tls_started(),
            Ok(Step::Ready(session)) => {
                assert!(rest.is_empty(), "the handshake left {} bytes", rest.len());
                break End::Ready(Box::new(session));
            }
            Ok(Step::Close) => break End::Closed,
            Ok(Step::Read(len)) => {
                assert!((1..=MAX_OPTION_BYTES).contains(&len));
                if rest.is_empty() {
                    break End::Waiting;
                }
                // By halves, so that partial reads are tried too.
                let n = len.div_ceil(2).min(rest.len());
                handshake.feed(&rest[..n]);
                rest = &rest[n..];
            }
        }
    };
    Outcome { said, end }
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
const FLAGS: &[u8] = b"\x00\x00\x00\x03";

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    let magic = b"\x00\x03\xe8\x89\x04\x55\x65\xa9".as_slice();
    [magic, &option.to_be_bytes(), &kind.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| data.extend(text(q)));
    data
}

/// After the greeting: the kinds of the answers.
fn kinds(said: &[u8]) -> Vec<(u32, u32)> {
    let mut rest = said.strip_prefix(GREETING).expect("a greeting");
    let mut kinds = Vec::new();
    while !rest.is_empty() {
        assert_eq!(&rest[..8], b"\x00\x03\xe8\x89\x04\x55\x65\xa9");
        let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        kinds.push((number(8), number(12)));
        rest = &rest[20 + number(16) as usize..];
    }
    kinds
}

const ACK: u32 = 1;
const UNSUP: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const TLS_REQD: u32 = (1 << 31) + 5;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;

#[test]
fn export_name_is_answered_with_size_flags_and_zeroes_unless_they_are_waived() {
    let mut want = GREETING.to_vec();
    want.extend(b"\x00\x00\x00\x00\x00\x10\x00\x00"); // 1 MiB
    want.extend(b"\x05\x07"); // flags, read-only, flush, multi-conn, cache
    let waived = play(TlsPolicy::None, &[FLAGS, &option(1, b"view")].concat());
    assert_eq!(waived.said, want);
    let End::Ready(session) = waived.end else { panic!("{:?}", waived.end) };
    assert_eq!((session.export_name(), session.replies(), session.block_status()), ("view", ReplyMode::Simple, false));

    let full = play(TlsPolicy::None, &[b"\x00\x00\x00\x01", option(1, b"view").as_slice()].concat());
    want.extend([0; 124]);
    assert_eq!(full.said, want);
}

#[test]
fn go_with_structured_replies_and_a_context() {
    let go = [text("disk"), b"\x00\x01\x00\x03".to_vec()].concat();
    let input = [FLAGS, &option(8, b""), &option(10, &meta("disk", &["base:allocation", "qemu:x"])), &option(7, &go)];
    let outcome = play(TlsPolicy::None, &input.concat());
    let want = [
        GREETING.to_vec(),
        answer(8, ACK, b""),
        answer(10, 4, b"\x00\x00\x00\x01base:allocation"),
        answer(10, ACK, b""),
        // size, then flags: has, flush, FUA, trim, zeroes, DF, cache, fast zero
        answer(7, 3, b"\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x0c\xed"),
        answer(7, 3, b"\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00"),
        answer(7, ACK, b""),
    ];
    assert_eq!(outcome.said, want.concat());
    let End::Ready(session) = outcome.end else { panic!("{:?}", outcome.end) };
    assert_eq!((session.replies(), session.block_status()), (ReplyMode::Structured, true));
}

#[test]
fn info_answers_what_is_asked_and_the_session_goes_on() {
    // name, description, block size, and description again
    let info = [text("view"), b"\x00\x04\x00\x01\x00\x02\x00\x03\x00\x02".to_vec()].concat();
    let outcome = play(TlsPolicy::None, &[FLAGS, &option(6, &info), &option(2, b"")].concat());
    let want = [
        GREETING.to_vec(),
        answer(6, 3, b"\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x05\x07"),
        answer(6, 3, b"\x00\x01view"),
        answer(6, 3, b"\x00\x02a moment"),
        answer(6, 3, b"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00"),
        answer(6, ACK, b""),
        answer(2, ACK, b""),
    ];
    assert_eq!(outcome.said, want.concat());
    assert!(matches!(outcome.end, End::Closed), "{:?}", outcome.end);
}

#[test]
fn the_list_names_every_export() {
    let outcome = play(TlsPolicy::None, &[FLAGS, &option(3, b"")].concat());
    let want = [
        GREETING.to_vec(),
        answer(3, 2, b"\x00\x00\x00\x04viewa moment"),
        answer(3, 2, b"\x00\x00\x00\x04disk"),
        answer(3, ACK, b""),
    ];
    assert_eq!(outcome.said, want.concat());
    assert!(matches!(outcome.end, End::Waiting));
}

#[test]
fn before_required_tls_nothing_but_starttls_and_abort_is_answered() {
    let go = [text("view"), b"\x00\x00".to_vec()].concat();
    let all = [option(3, b""), option(6, &go), option(7, &go), option(8, b""), option(10, &meta("view", &[]))];
    let all = [all.concat(), option(99, b"x")].concat();
    let plain = play(TlsPolicy::Required, &[FLAGS, &all].concat());
    assert!(kinds(&plain.said).iter().all(|(_, kind)| *kind == TLS_REQD), "{:?}", kinds(&plain.said));
    assert_eq!(kinds(&plain.said).len(), 6);
    assert!(matches!(plain.end, End::Waiting));

    let name = play(TlsPolicy::Required, &[FLAGS, &option(1, b"view")].concat());
    assert!(matches!(name.end, End::Error(HandshakeError::TlsRequired)), "{:?}", name.end);
    let abort = play(TlsPolicy::Required, &[FLAGS, &option(2, b"")].concat());
    assert!(matches!(abort.end, End::Closed));

    // Structured replies asked for under TLS count; a second STARTTLS does not.
    let input = [FLAGS, &option(5, b""), &option(8, b""), &option(5, b""), &option(7, &go)].concat();
    let secured = play(TlsPolicy::Required, &input);
    assert_eq!(kinds(&secured.said), [(5, ACK), (8, ACK), (5, INVALID), (7, 3), (7, 3), (7, ACK)]);
    let End::Ready(session) = secured.end else { panic!("{:?}", secured.end) };
    assert_eq!(session.replies(), ReplyMode::Structured);

    let none = play(TlsPolicy::None, &[FLAGS, &option(5, b"")].concat());
    assert_eq!(kinds(&none.said), [(5, POLICY)]);
}

#[test]
fn the_machine_never_asks_for_a_byte_behind_starttls() {
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::Required });
    let input = [FLAGS, &option(5, b""), b"plain text smuggled in before TLS"].concat();
    let mut used = 0;
    loop {
        match handshake.step(&Two).unwrap() {
            Step::Write(_) => {}
            Step::Read(len) => {
                handshake.feed(&input[used..used + len]);
                used += len;
            }
            Step::StartTls => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(used, 4 + 16);
}

#[test]
fn what_makes_no_sense_is_refused_and_the_handshake_goes_on() {
    let bad_utf8 = [b"\x00\x00\x00\x02\xff\xfe".as_slice(), b"\x00\x00"].concat();
    let long_name = text(&"x".repeat(4097));
    let go = |name: &str| [text(name), b"\x00\x00".to_vec()].concat();
    let cases: Vec<(u32, Vec<u8>, u32)> = vec![
        (4, vec![], UNSUP),
        (11, vec![], UNSUP), // extended headers
        (0xdead, vec![1, 2, 3], UNSUP),
        (3, vec![0], INVALID),
        (8, vec![0], INVALID),
        (7, vec![], INVALID),
        (7, vec![0, 0, 0, 9, b'v'], INVALID), // the name is longer than the option
        (7, [text("view"), vec![0, 2, 0, 3]].concat(), INVALID), // two kinds announced, one there
        (7, [go("view"), vec![0]].concat(), INVALID), // something behind it
        (7, bad_utf8, INVALID),
        (7, [long_name, vec![0, 0]].concat(), INVALID),
        (7, go("nothing"), UNKNOWN),
        (6, go(""), UNKNOWN),
        (9, meta("nothing", &[]), UNKNOWN),
        (9, vec![0xff; 40], INVALID),
        (9, [text("view"), vec![0xff; 4]].concat(), INVALID), // four billion queries, none there
        (10, meta("view", &["base:allocation"]), INVALID),    // before structured replies
        (6, vec![0; MAX_OPTION_BYTES + 1], TOO_BIG),
        (77, vec![0; 300_000], TOO_BIG),
    ];
    let input: Vec<u8> = cases.iter().flat_map(|(number, data, _)| option(*number, data)).collect();
    let outcome = play(TlsPolicy::None, &[FLAGS, &input, &option(7, &go("view"))].concat());
    let mut want: Vec<(u32, u32)> = cases.iter().map(|(number, _, kind)| (*number, *kind)).collect();
    want.extend([(7, 3), (7, 3), (7, ACK)]);
    assert_eq!(kinds(&outcome.said), want);
    assert!(matches!(outcome.end, End::Ready(_)), "{:?}", outcome.end);
}

#[test]
fn what_cannot_be_answered_ends_the_connection_by_name() {
    let error = |input: &[u8]| match play(TlsPolicy::None, input).end {
        End::Error(e) => e,
        other => panic!("{other:?}"),
    };
    assert_eq!(error(b"\x00\x00\x00\x07"), HandshakeError::UnknownFlags { flags: 7 });
    assert_eq!(error(b"\x00\x00\x00\x02"), HandshakeError::NotFixedNewstyle { flags: 2 });
    assert_eq!(
        error(&[FLAGS, b"GET / HTTP/1.1\r\n"].concat()),
        HandshakeError::BadOptionMagic { got: u64::from_be_bytes(*b"GET / HT") }
    );
    assert_eq!(error(&[FLAGS, &option(1, b"x")].concat()), HandshakeError::UnknownExport { name: "x".into() });
    assert_eq!(error(&[FLAGS, &option(1, b"\xff")].concat()), HandshakeError::BadExportName);
    assert_eq!(error(&[FLAGS, &option(1, &vec![b'x'; 70_000])].concat()), HandshakeError::BadExportName);
    let huge = [FLAGS, b"IHAVEOPT", b"\x00\x00\x00\x07\xff\xff\xff\xff"].concat();
    assert_eq!(error(&huge), HandshakeError::OptionTooLong { option: 7, len: u32::MAX });
    let many: Vec<u8> = (0..=MAX_OPTIONS).flat_map(|_| option(50, b"")).collect();
    assert_eq!(error(&[FLAGS, &many].concat()), HandshakeError::TooManyOptions);
}

#[test]
fn contexts_are_listed_and_hold_for_their_export_only() {
    let listed = |queries: &[&str]| {
        let outcome = play(TlsPolicy::None, &[FLAGS, &option(9, &meta("view", queries))].concat());
        kinds(&outcome.said).iter().filter(|(_, kind)| *kind == 4).count()
    };
    assert_eq!([listed(&[]), listed(&["base:"]), listed(&["base:allocation"]), listed(&["qemu:"])], [1, 1, 1, 0]);

    let go = |name: &str| option(7, &[text(name), b"\x00\x00".to_vec()].concat());
    let session = |sets: &[Vec<u8>], name: &str| {
        let outcome = play(TlsPolicy::None, &[FLAGS.to_vec(), option(8, b""), sets.concat(), go(name)].concat());
        let End::Ready(session) = outcome.end else { panic!("{:?}", outcome.end) };
        session.block_status()
    };
    let set = |name: &str, queries: &[&str]| option(10, &meta(name, queries));
    assert!(session(&[set("view", &["base:allocation"])], "view"));
    assert!(!session(&[set("view", &["base:allocation"])], "disk"));
    assert!(!session(&[set("view", &["base:"])], "view"), "a namespace is for listing only");
    assert!(!session(&[set("view", &["base:allocation"]), set("view", &[])], "view"), "the last one counts");
    assert!(!session(&[set("view", &["base:allocation"]), set("nothing", &[])], "view"), "even a refused one");
}

fn session(name: &str, structured: bool) -> Session {
    let mut input = FLAGS.to_vec();
    if structured {
        input.extend(option(8, b""));
        input.extend(option(10, &meta(name, &["base:allocation"])));
    }
    input.extend(option(7, &[text(name), b"\x00\x00".to_vec()].concat()));
    match play(TlsPolicy::None, &input).end {
        End::Ready(session) => *session,
        other => panic!("{other:?}"),
    }
}

fn header(command: u16, flags: u16, offset: u64, len: u32) -> [u8; 28] {
    let mut header = [0; 28];
    header[..4].copy_from_slice(b"\x25\x60\x95\x13");
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(b"COOKIE!!");
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&len.to_be_bytes());
    header
}

const COOKIE: u64 = u64::from_be_bytes(*b"COOKIE!!");

#[test]
fn requests_are_judged() {
    const MIB: u64 = 1 << 20;
    let disk = session("disk", true);
    let view = session("view", false);
    let ok = |s: &Session, h: [u8; 28]| match s.request(&h).unwrap() {
        Incoming::Request(r) => (r.command, r.offset, r.len, r.payload_len()),
        other => panic!("{other:?}"),
    };
    let no = |s: &Session, h: [u8; 28]| match s.request(&h).unwrap() {
        Incoming::Refused { refusal, discard } => {
            assert_eq!(refusal.cookie, COOKIE);
            (refusal.reason.errno(), discard)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(ok(&disk, header(0, 0, 512, 512)), (Command::Read { df: false }, 512, 512, 0));
    assert_eq!(ok(&disk, header(0, 4, 0, MIB as u32)), (Command::Read { df: true }, 0, MIB as u32, 0));
    assert_eq!(ok(&disk, header(1, 1, MIB - 512, 512)), (Command::Write { fua: true }, MIB - 512, 512, 512));
    assert_eq!(ok(&disk, header(3, 0, 77, 99)), (Command::Flush, 0, 0, 0));
    assert_eq!(ok(&disk, header(4, 0, 0, 512)), (Command::Trim { fua: false }, 0, 512, 0));
    assert_eq!(ok(&disk, header(5, 0, 0, 512)), (Command::Cache, 0, 512, 0));
    assert_eq!(
        ok(&disk, header(6, 0b10011, 0, 1024)),
        (Command::WriteZeroes { fua: true, no_hole: true, fast: true }, 0, 1024, 0)
    );
    assert_eq!(ok(&disk, header(7, 8, 0, 512)), (Command::BlockStatus { one: true }, 0, 512, 0));
    assert_eq!(ok(&view, header(0, 0, 3, 5)), (Command::Read { df: false }, 3, 5, 0));
    assert_eq!(disk.request(&header(2, 0, 0, 0)), Ok(Incoming::Disconnect));

    assert_eq!(no(&view, header(1, 0, 0, 512)), (Errno::Perm, 512));
    assert_eq!(no(&view, header(4, 0, 0, 512)), (Errno::Perm, 0));
    assert_eq!(no(&view, header(6, 0, 0, 512)), (Errno::Perm, 0));
    assert_eq!(no(&view, header(7, 0, 0, 512)), (Errno::Invalid, 0), "block status was not negotiated");
    assert_eq!(no(&disk, header(0, 0, MIB, 512)), (Errno::Invalid, 0));
    assert_eq!(no(&disk, header(0, 0, u64::MAX, 512)), (Errno::Invalid, 0));
    assert_eq!(no(&disk, header(1, 0, MIB, 512)), (Errno::NoSpace, 512));
    assert_eq!(no(&disk, header(1, 0, u64::MAX - 511, 512)), (Errno::NoSpace, 512));
    assert_eq!(no(&disk, header(1, 0, 1, 512)), (Errno::Invalid, 512));
    assert_eq!(no(&disk, header(1, 0, 0, 513)), (Errno::Invalid, 513));
    assert_eq!(no(&disk, header(1, 0, 0, 0)), (Errno::Invalid, 0));
    assert_eq!(no(&disk, header(1, 0, 0, (32 << 20) + 512)), (Errno::Invalid, (32 << 20) + 512));
    assert_eq!(no(&disk, header(0, 0, 0, u32::MAX)), (Errno::Invalid, 0));
    assert_eq!(no(&disk, header(0, 32, 0, 512)), (Errno::Invalid, 0), "a flag nobody knows");
    assert_eq!(no(&disk, header(1, 4, 0, 512)), (Errno::Invalid, 512), "DF on a write");
    assert_eq!(no(&disk, header(8, 0, 0, 512)), (Errno::Invalid, 0), "resize");
    assert_eq!(no(&disk, header(999, 0, 0, 512)), (Errno::Invalid, 0));

    let mut bad = header(0, 0, 0, 512);
    bad[0] = 0;
    assert_eq!(disk.request(&bad), Err(ProtocolError::BadRequestMagic { got: 0x0060_9513 }));
    let long = ProtocolError::PayloadTooLong { len: u32::MAX, max: 32 << 20 };
    assert_eq!(disk.request(&header(1, 0, 0, u32::MAX)), Err(long));
}

#[test]
fn a_command_the_export_does_not_announce_is_refused() {
    struct Bare;
    impl Exports for Bare {
        fn find(&self, _: &str) -> Option<ExportInfo> {
            let mut info = ExportInfo::read_write(ByteLen(4096));
            info.flags = ExportFlags::NONE;
            Some(info)
        }
        fn list(&self) -> Vec<ExportEntry> {
            Vec::new()
        }
    }
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::None });
    let input = [FLAGS, &option(1, b"")].concat();
    let mut rest = input.as_slice();
    let session = loop {
        match handshake.step(&Bare).unwrap() {
            Step::Read(n) => {
                handshake.feed(&rest[..n]);
                rest = &rest[n..];
            }
            Step::Ready(session) => break session,
            Step::Write(_) => {}
            other => panic!("{other:?}"),
        }
    };
    for command in [3, 4, 5, 6] {
        let Ok(Incoming::Refused { refusal, .. }) = session.request(&header(command, 0, 0, 512)) else {
            panic!("command {command} was taken");
        };
        assert_eq!(refusal.reason, RefusalReason::UnsupportedCommand { command });
    }
}

#[test]
fn simple_replies() {
    let session = session("disk", false);
    let request = Request { cookie: COOKIE, command: Command::Read { df: false }, offset: 0, len: 4 };
    let mut out = Vec::new();
    session.push_done(&mut out, COOKIE);
    session.push_error(&mut out, COOKIE, Errno::NoSpace, "not sent");
    session.push_read(&mut out, &request, b"data");
    let want = [
        b"\x67\x44\x66\x98\x00\x00\x00\x00COOKIE!!".as_slice(),
        b"\x67\x44\x66\x98\x00\x00\x00\x1cCOOKIE!!",
        b"\x67\x44\x66\x98\x00\x00\x00\x00COOKIE!!data",
    ];
    assert_eq!(out, want.concat());
}

#[test]
fn structured_replies() {
    let session = session("disk", true);
    let read = |len, df| Request { cookie: COOKIE, command: Command::Read { df }, offset: 4096, len };
    let reply = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        out
    };
    assert_eq!(
        reply(&|out| session.push_error(out, COOKIE, Errno::Io, "torn")),
        b"\x66\x8e\x33\xef\x00\x01\x80\x01COOKIE!!\x00\x00\x00\x0a\x00\x00\x00\x05\x00\x04torn"
    );
    assert_eq!(
        reply(&|out| session.push_read(out, &read(4, false), b"data")),
        b"\x66\x8e\x33\xef\x00\x01\x00\x01COOKIE!!\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x10\x00data"
    );
    // Data, a hole, data; in one piece with DF.
    let data = [vec![7; 4096], vec![0; 8192], vec![8; 100]].concat();
    let want = [
        b"\x66\x8e\x33\xef\x00\x00\x00\x01COOKIE!!\x00\x00\x10\x08\x00\x00\x00\x00\x00\x00\x10\x00".as_slice(),
        &[7; 4096],
        b"\x66\x8e\x33\xef\x00\x00\x00\x02COOKIE!!\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00\x20\x00",
        b"\x66\x8e\x33\xef\x00\x01\x00\x01COOKIE!!\x00\x00\x00\x6c\x00\x00\x00\x00\x00\x00\x40\x00",
        &[8; 100],
    ];
    assert_eq!(reply(&|out| session.push_read(out, &read(12388, false), &data)), want.concat());
    let whole = reply(&|out| session.push_read(out, &read(12388, true), &data));
    assert_eq!(whole.len(), 28 + data.len());
    assert_eq!(&whole[28..], data);
    assert_eq!(whole[..28], *session.read_head(&read(12388, true)).as_slice());
    let hole =
        b"\x66\x8e\x33\xef\x00\x01\x00\x02COOKIE!!\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x30\x00";
    for df in [true, false] {
        assert_eq!(reply(&|out| session.push_read(out, &read(12288, df), &[0; 12288])), hole);
    }
}

#[test]
fn block_status_replies() {
    let session = session("disk", true);
    let request = |one| Request { cookie: COOKIE, command: Command::BlockStatus { one }, offset: 0, len: 4096 };
    let run = |len, allocation| StatusExtent { len, allocation };
    let runs = [
        run(512, Allocation::Data),
        run(512, Allocation::Data),
        run(0, Allocation::Zero),
        run(1024, Allocation::Zero),
        run(1 << 40, Allocation::Data), // reaches beyond the request
        run(1, Allocation::Zero),
    ];
    let mut out = Vec::new();
    session.push_block_status(&mut out, &request(false), &runs);
    session.push_block_status(&mut out, &request(true), &runs);
    session.push_block_status(&mut out, &request(false), &[]);
    let want = [
        b"\x66\x8e\x33\xef\x00\x01\x00\x05COOKIE!!\x00\x00\x00\x1c\x00\x00\x00\x01".as_slice(),
        b"\x00\x00\x04\x00\x00\x00\x00\x00",
        b"\x00\x00\x04\x00\x00\x00\x00\x03",
        b"\x00\x00\x08\x00\x00\x00\x00\x00",
        b"\x66\x8e\x33\xef\x00\x01\x00\x05COOKIE!!\x00\x00\x00\x0c\x00\x00\x00\x01",
        b"\x00\x00\x04\x00\x00\x00\x00\x00",
        b"\x66\x8e\x33\xef\x00\x01\x80\x01COOKIE!!\x00\x00\x00\x32\x00\x00\x00\x05\x00\x2c",
        b"the allocation of this range is not known",
    ];
    // The text's length, so that the line above cannot drift from it.
    let text = "the allocation of this range is not known".len();
    let mut want = want.concat();
    let at = want.len() - text;
    want[at - 2..at].copy_from_slice(&(text as u16).to_be_bytes());
    want[at - 10..at - 6].copy_from_slice(&(text as u32 + 6).to_be_bytes());
    assert_eq!(out, want);
}
