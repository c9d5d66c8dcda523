//! Our client against our server over narrow pipes, compared with a plain byte vector.

mod support;

use nbd::{
    Access, Allocation, BlockSizes, Errno, ExportFlags, ExportInfo, Exports, HandshakeConfig, ReplyMode,
    ServerHandshake, Session, StatusExtent, Step, TlsPolicy,
    blocking::{Export, ExportError, MemoryExport, Served, serve},
    client::{Answer, Client, ClientError, ConnectError, MAX_IN_FLIGHT, Operation, list, start_tls},
};
use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    ops::Range,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};
use support::{PipeEnd, Rng, pipe};

/// Narrower than any socket: all requests in flight just fit.
const NARROW: usize = 2048;

fn start(name: &'static str, export: Arc<dyn Export + Send + Sync>) -> (PipeEnd, JoinHandle<Served>) {
    let (near, mut far) = pipe(NARROW);
    let server = thread::spawn(move || serve(&mut far, &[(name, &*export)]).expect("the session ends well"));
    (near, server)
}

#[test]
fn random_requests_several_at_a_time_read_back_as_the_oracle_says() {
    for seed in 0..12 {
        let mut rng = Rng::new(seed);
        let replies = if seed % 3 == 0 { ReplyMode::Simple } else { ReplyMode::Structured };
        let mut oracle = rng.bytes(96 * 1024);
        oracle[8192..40_960].fill(0);
        let export = Arc::new(MemoryExport::new(oracle.clone(), Access::ReadWrite));
        let (near, server) = start("disk", export.clone());
        let mut client = Client::connect_as(near, "disk", replies).unwrap();
        assert_eq!(client.export().structured, replies == ReplyMode::Structured);
        // The server carries requests out in order, so a READ's answer is what the oracle held when it was sent.
        let mut expected: HashMap<u64, Vec<u8>> = HashMap::new();
        for _ in 0..1500 {
            while client.in_flight() == MAX_IN_FLIGHT || (client.in_flight() > 0 && rng.chance(4)) {
                check(client.complete().unwrap().unwrap(), &mut expected, seed);
            }
            let offset = rng.below(180) * 512;
            let len = (1 + rng.below(12)).min((oracle.len() as u64 - offset) / 512) as u32 * 512;
            let range = offset as usize..offset as usize + len as usize;
            match rng.below(7) {
                0 | 1 => {
                    let data = rng.bytes(len as usize);
                    client.submit(Operation::Write { offset, data: &data, fua: rng.chance(2) }).unwrap();
                    oracle[range].copy_from_slice(&data);
                }
                2 => {
                    client.submit(Operation::Zero { offset, len, fua: false, no_hole: rng.chance(2) }).unwrap();
                    oracle[range].fill(0);
                }
                3 => {
                    client.submit(Operation::Trim { offset, len, fua: false }).unwrap();
                    oracle[range].fill(0);
                }
                4 => drop(client.submit(Operation::Flush).unwrap()),
                _ => {
                    let cookie = client.submit(Operation::Read { offset, len }).unwrap();
                    expected.insert(cookie, oracle[range].to_vec());
                }
            }
        }
        while let Some(done) = client.complete().unwrap() {
            check(done, &mut expected, seed);
        }
        assert!(expected.is_empty(), "seed {seed}: {} answers missing", expected.len());
        assert!(export.contents() == oracle, "seed {seed}: the export differs");
        client.disconnect().unwrap();
        assert_eq!(server.join().unwrap(), Served::Disconnected, "seed {seed}");
    }
}

fn check(done: nbd::client::Completion, expected: &mut HashMap<u64, Vec<u8>>, seed: u64) {
    match (done.result.expect("nothing fails here"), expected.remove(&done.cookie)) {
        (Answer::Data(data), Some(want)) => assert!(data == want, "seed {seed}: request {} differs", done.cookie),
        (Answer::Done, None) => {}
        (answer, want) => panic!("seed {seed}: {answer:?}, expected data: {}", want.is_some()),
    }
}

#[test]
fn long_reads_and_writes_are_split_as_the_server_wants_them() {
    let export = MemoryExport::new(vec![0; 300 * 512], Access::ReadWrite)
        .with_info(|info| info.blocks = BlockSizes { min: 512, preferred: 1024, max_payload: 5000 });
    let export = Arc::new(export);
    let (near, server) = start("disk", export.clone());
    let mut client = Client::connect(near, "disk").unwrap();
    let data = Rng::new(5).bytes(300 * 512);
    client.write(0, &data, true).unwrap();
    assert!(export.contents() == data);
    let mut back = vec![0; data.len()];
    client.read(0, &mut back).unwrap();
    assert!(back == data);
    let long = client.submit(Operation::Read { offset: 0, len: 5120 });
    assert!(matches!(long, Err(ClientError::TooLong { len: 5120, max: 5000 })), "{long:?}");
    client.disconnect().unwrap();
    server.join().unwrap();
}

#[test]
fn allocation_is_told_in_runs_and_holes_come_as_holes() {
    let mut bytes = vec![9; 64 * 4096];
    bytes[4096 * 10..4096 * 50].fill(0);
    let (near, server) = start("v", Arc::new(MemoryExport::new(bytes.clone(), Access::ReadOnly)));
    let mut client = Client::connect(near, "v").unwrap();
    let run = |blocks: u64, allocation| StatusExtent { len: blocks * 4096, allocation };
    let want = [run(10, Allocation::Data), run(40, Allocation::Zero), run(14, Allocation::Data)];
    assert_eq!(client.allocation(0, 64 * 4096).unwrap(), want);
    assert_eq!(client.allocation(4096 * 49, 8192).unwrap(), [run(1, Allocation::Zero), run(1, Allocation::Data)]);
    let mut back = vec![1; bytes.len()];
    client.read(0, &mut back).unwrap();
    assert!(back == bytes);
    client.disconnect().unwrap();
    server.join().unwrap();
}

/// Fails on demand and writes down what it is asked.
#[derive(Default)]
struct Moody {
    asked: Mutex<Vec<String>>,
    without: Option<fn(&mut ExportInfo)>,
}

impl Moody {
    fn note(&self, what: String) -> Result<(), ExportError> {
        self.asked.lock().unwrap().push(what);
        Ok(())
    }
}

impl Export for Moody {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::read_write(model::ByteLen(1 << 20));
        if let Some(change) = self.without {
            change(&mut info);
        }
        info
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        if offset >= 4096 {
            return Err(ExportError::new(Errno::Io, "segment 41: record checksum at 0x7f000"));
        }
        buf.fill(1);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        if offset >= 4096 {
            return Err(ExportError::new(Errno::NoSpace, "the journal is full"));
        }
        self.note(format!("write {offset}+{} fua={fua}", data.len()))
    }
    fn flush(&self) -> Result<(), ExportError> {
        self.note("flush".into())
    }
    fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        self.note(format!("trim {range:?} fua={fua}"))
    }
    fn zero(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        self.note(format!("zero {range:?} fua={fua}"))
    }
}

#[test]
fn failures_come_back_with_their_words_and_the_session_goes_on() {
    let export = Arc::new(Moody::default());
    let (near, server) = start("m", export.clone());
    let mut client = Client::connect(near, "m").unwrap();
    let read = client.read(8192, &mut [0; 512]).unwrap_err();
    assert!(!read.is_fatal());
    assert_eq!(
        read.to_string(),
        "read of 512 bytes at 8192 failed at the server: input/output error: segment 41: record checksum at 0x7f000"
    );
    let ClientError::Remote(full) = client.write(4096, &[0; 512], false).unwrap_err() else { panic!("not remote") };
    assert_eq!((full.errno, full.text.as_str()), (Errno::NoSpace, "the journal is full"));
    // Refused by the session, not by the export.
    let odd = client.write(1, &[0; 512], false).unwrap_err();
    assert!(odd.to_string().contains("must be multiples of 512"), "{odd}");
    let beyond = client.read(1 << 20, &mut [0; 512]).unwrap_err();
    assert!(matches!(beyond, ClientError::OutOfRange { .. }), "{beyond}");

    client.write(0, &[0; 1024], true).unwrap();
    client.trim(512, 1024).unwrap();
    client.zero(0, 4096, true).unwrap();
    client.flush().unwrap();
    let want = ["write 0+1024 fua=true", "trim 512..1536 fua=false", "zero 0..4096 fua=true", "flush"];
    assert_eq!(*export.asked.lock().unwrap(), want);
    client.disconnect().unwrap();
    server.join().unwrap();
}

#[test]
fn a_read_only_export_is_not_written() {
    let (near, server) = start("v", Arc::new(MemoryExport::new(vec![1; 8192], Access::ReadOnly)));
    let mut client = Client::connect(near, "v").unwrap();
    assert_eq!(client.export().info.access, Access::ReadOnly);
    assert!(client.export().info.flags.contains(ExportFlags::MULTI_CONN));
    assert!(!client.export().info.flags.contains(ExportFlags::TRIM));
    let write = client.write(0, &[0; 512], false);
    assert!(matches!(write, Err(ClientError::Unsupported { .. })), "{write:?}");
    client.disconnect().unwrap();
    server.join().unwrap();
}

/// The server side of a handshake that wants TLS; the secured stream is the same one here.
fn secured_handshake(far: &mut PipeEnd, exports: &dyn Exports) -> Option<(bool, Session)> {
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::Required });
    let mut secured = false;
    loop {
        match handshake.step(exports).ok()? {
            Step::Write(bytes) => far.write_all(&bytes).ok()?,
            Step::Read(len) => {
                let mut buf = vec![0; len];
                far.read_exact(&mut buf).ok()?;
                handshake.feed(&buf);
            }
            Step::StartTls => {
                secured = true;
                handshake.tls_started();
            }
            Step::Ready(session) => return Some((secured, session)),
            Step::Close => return None,
        }
    }
}

struct OneExport;

impl Exports for OneExport {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name == "v").then(|| ExportInfo::read_only(model::ByteLen(4096)))
    }
    fn list(&self) -> Vec<nbd::ExportEntry> {
        Vec::new()
    }
}

#[test]
fn tls_is_asked_for_before_anything_else_is_said() {
    let connect = |with_tls: bool| {
        let (mut near, mut far) = pipe(NARROW);
        let server = thread::spawn(move || secured_handshake(&mut far, &OneExport));
        let connected = if with_tls {
            let secured = start_tls(&mut near).unwrap();
            Client::connect_secured(near, secured, "v")
        } else {
            Client::connect(near, "v")
        };
        let export = connected.map(|client| client.export().clone());
        (export, server.join().unwrap())
    };
    let (export, session) = connect(true);
    let export = export.unwrap();
    assert!(export.structured && export.block_status && export.info.size.0 == 4096, "{export:?}");
    let (secured, session) = session.unwrap();
    assert!(secured && session.block_status());

    let (refused, session) = connect(false);
    assert!(matches!(refused, Err(ConnectError::TlsRequired)), "{refused:?}");
    assert!(session.is_none());

    let (mut near, mut far) = pipe(NARROW);
    let server = thread::spawn(move || serve(&mut far, &[]).map(drop).is_ok());
    let refused = start_tls(&mut near);
    assert!(matches!(refused, Err(ConnectError::Refused { what: "TLS", .. })), "{:?}", refused.err());
    drop(near);
    assert!(!server.join().unwrap());
}

#[test]
fn a_server_without_fua_is_asked_to_flush() {
    let without = |info: &mut ExportInfo| info.flags = info.flags.without(ExportFlags::FUA);
    let export = Arc::new(Moody { without: Some(without), ..Moody::default() });
    let (near, server) = start("m", export.clone());
    let mut client = Client::connect(near, "m").unwrap();
    client.write(0, &[0; 512], true).unwrap();
    assert_eq!(*export.asked.lock().unwrap(), ["write 0+512 fua=false", "flush"]);
    let sent = client.submit(Operation::Write { offset: 0, data: &[0; 512], fua: true });
    assert!(matches!(sent, Err(ClientError::Unsupported { what: "FUA" })), "{sent:?}");
    client.disconnect().unwrap();
    server.join().unwrap();
}

#[test]
fn exports_are_listed_and_a_wrong_name_is_told() {
    let (mut near, mut far) = pipe(NARROW);
    let server = thread::spawn(move || {
        let export = MemoryExport::new(vec![0; 512], Access::ReadOnly).with_info(|i| i.description = "one\u{7}".into());
        serve(&mut far, &[("a", &export as &dyn Export), ("ü b", &export)]).expect("it ends well")
    });
    let names: Vec<(String, String)> = list(&mut near).unwrap().into_iter().map(|e| (e.name, e.description)).collect();
    assert_eq!(names, [("a".into(), "one ".into()), ("ü b".into(), "one ".into())]);
    assert_eq!(server.join().unwrap(), Served::Disconnected);

    for replies in [ReplyMode::Simple, ReplyMode::Structured] {
        let (near, mut far) = pipe(NARROW);
        let server = thread::spawn(move || {
            let export = MemoryExport::new(vec![0; 512], Access::ReadOnly);
            serve(&mut far, &[("a", &export as &dyn Export)]).map(drop).is_ok()
        });
        let refused = Client::connect_as(near, "b", replies);
        assert!(matches!(&refused, Err(ConnectError::NoSuchExport { name }) if name == "b"), "{:?}", refused.err());
        assert!(!server.join().unwrap(), "the client hung up in the handshake");
    }
}
