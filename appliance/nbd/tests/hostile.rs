//! Peers that lie: random bytes and valid sessions with damage, against the server and against the client. Nothing may
//! panic, hang or take memory in proportion to a lie.

mod support;

use nbd::{
    Access, ExportEntry, ExportInfo, Exports, HandshakeConfig, MAX_OPTION_BYTES, ServerHandshake, Step, TlsPolicy,
    blocking::{Export, MemoryExport, serve},
    client::{Client, ConnectError, MAX_IN_FLIGHT, Operation},
};
use support::{Recorded, Rng, Script, pipe};

const SIZE: usize = 256 * 1024;

/// Both sides of a valid session that uses everything: (what the client said, what the server said).
fn valid_session(seed: u64) -> (Vec<u8>, Vec<u8>) {
    let (near, far) = pipe(1 << 20);
    let server = std::thread::spawn(move || {
        let export = MemoryExport::new(Rng::new(seed).bytes(SIZE), Access::ReadWrite);
        let mut far = far;
        serve(&mut far, &[("disk", &export as &dyn Export)]).expect("a valid session")
    });
    let mut client = Client::connect(Recorded::new(near), "disk").expect("it is there");
    exercise(&mut client, &mut Rng::new(seed)).expect("all is well");
    let recorded = client.disconnect().expect("it is still there");
    let both = (recorded.written, recorded.read);
    drop(recorded.stream);
    server.join().expect("no panic");
    both
}

/// Some of every request, several under way; errors of single requests are fine.
fn exercise<S: std::io::Read + std::io::Write>(
    client: &mut Client<S>,
    rng: &mut Rng,
) -> Result<(), nbd::client::ClientError> {
    let data = rng.bytes(4096);
    for round in 0..6 {
        let offset = rng.below(30) * 4096;
        let len = 4096 * (1 + rng.below(8) as u32);
        client.submit(Operation::Write { offset, data: &data, fua: round % 2 == 0 })?;
        client.submit(Operation::Zero { offset: offset + 8192, len, fua: false, no_hole: false })?;
        client.submit(Operation::Trim { offset, len: 512, fua: false })?;
        client.submit(Operation::BlockStatus { offset, len })?;
        client.submit(Operation::Read { offset, len })?;
        client.submit(Operation::Cache { offset, len })?;
        client.submit(Operation::Flush)?;
        while let Some(done) = client.complete()? {
            drop(done.result);
        }
    }
    Ok(())
}

fn damage(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..1 + rng.below(3) {
        if bytes.is_empty() {
            return;
        }
        let at = rng.below(bytes.len() as u64) as usize;
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = if rng.chance(2) { 0xff } else { 0 },
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 1 + rng.below(40) as usize).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let end = (at + 1 + rng.below(40) as usize).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            // Lengths and numbers sit on whole words: put a nasty one there.
            _ => {
                let nasty = [0u32, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, 0xffff_fe00, 1 << 25, (1 << 25) + 1];
                let word = nasty[rng.below(8) as usize].to_be_bytes();
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&word[..end - at]);
            }
        }
    }
}

#[test]
fn a_server_survives_damaged_sessions() {
    let (said, _) = valid_session(1);
    let mut errors = 0;
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let mut bytes = said.clone();
        damage(&mut rng, &mut bytes);
        let export = MemoryExport::new(vec![3; SIZE], Access::ReadWrite);
        let mut script = Script::new(bytes);
        let served = serve(&mut script, &[("disk", &export as &dyn Export)]);
        errors += u32::from(served.is_err());
        assert_eq!(export.contents().len(), SIZE, "seed {seed}");
        // Answers are never much more than what valid requests can ask for.
        assert!(script.heard.len() < 4 << 20, "seed {seed}: {} bytes of answers", script.heard.len());
    }
    assert!(errors > 400, "the damage does some damage: {errors}");
}

#[test]
fn a_server_survives_noise() {
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let len = rng.below(600) as usize;
        let noise = rng.bytes(len);
        // Noise at each depth: from the start, behind the flags, behind an option's magic, in the transmission.
        let prefix: &[u8] = match seed % 4 {
            0 => b"",
            1 => b"\x00\x00\x00\x03",
            2 => b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x40",
            _ => b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04disk",
        };
        let export = MemoryExport::new(vec![3; 4096], Access::ReadOnly);
        let mut script = Script::new([prefix, &noise].concat());
        let served = serve(&mut script, &[("disk", &export as &dyn Export)]);
        assert!(served.is_err() || seed % 4 == 3, "seed {seed}: {served:?}");
        assert_eq!(export.contents(), vec![3; 4096], "seed {seed}: a read-only export was changed");
    }
}

#[test]
fn the_handshake_asks_for_no_more_than_its_bound() {
    struct One;
    impl Exports for One {
        fn find(&self, name: &str) -> Option<ExportInfo> {
            (name == "disk").then(|| ExportInfo::read_only(model::ByteLen(4096)))
        }
        fn list(&self) -> Vec<ExportEntry> {
            vec![ExportEntry { name: "disk".into(), description: "d".repeat(10_000) }]
        }
    }
    for seed in 0..2000 {
        let mut rng = Rng::new(seed);
        let tls = if rng.chance(2) { TlsPolicy::None } else { TlsPolicy::Required };
        let mut handshake = ServerHandshake::new(HandshakeConfig { tls });
        // Well-formed headers with random options and lengths, so that it gets far.
        let mut stream = b"\x00\x00\x00\x03".to_vec();
        for _ in 0..20 {
            let len = if rng.chance(4) { rng.below(200_000) } else { rng.below(40) } as u32;
            let header = [b"IHAVEOPT".as_slice(), &(1 + rng.below(11) as u32).to_be_bytes(), &len.to_be_bytes()];
            stream.extend(header.concat());
            stream.resize(stream.len() + len as usize, rng.below(3) as u8);
        }
        let mut rest = stream.as_slice();
        loop {
            match handshake.step(&One) {
                Ok(Step::Read(len)) => {
                    assert!((1..=MAX_OPTION_BYTES).contains(&len), "seed {seed}: {len}");
                    let n = len.min(rest.len());
                    if n == 0 {
                        break;
                    }
                    handshake.feed(&rest[..n]);
                    rest = &rest[n..];
                }
                Ok(Step::Write(bytes)) => assert!(bytes.len() < 64 * 1024, "seed {seed}: {}", bytes.len()),
                Ok(Step::StartTls) => handshake.tls_started(),
                Ok(Step::Ready(_) | Step::Close) | Err(_) => break,
            }
        }
        // Whatever it was, it can be asked again.
        let again = handshake.step(&One);
        assert!(matches!(again, Ok(Step::Read(_) | Step::Close)), "seed {seed}: {again:?}");
    }
}

#[test]
fn a_client_survives_damaged_answers() {
    let (_, said) = valid_session(1);
    let mut failed = 0;
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let mut bytes = said.clone();
        damage(&mut rng, &mut bytes);
        let result = match Client::connect(Script::new(bytes), "disk") {
            Ok(mut client) => exercise(&mut client, &mut Rng::new(1)).map_err(|e| {
                let fatal = e.is_fatal();
                if fatal {
                    assert!(client.submit(Operation::Flush).is_err(), "seed {seed}: it goes on after {e}");
                }
                e.to_string()
            }),
            Err(e) => Err(e.to_string()),
        };
        failed += u32::from(result.is_err());
    }
    assert!(failed > 400, "the damage does some damage: {failed}");
}

#[test]
fn a_client_survives_noise_and_says_what_is_wrong() {
    for seed in 0..2000 {
        let mut rng = Rng::new(seed);
        let len = rng.below(300) as usize;
        let noise = rng.bytes(len);
        let prefix: &[u8] = if seed % 2 == 0 { b"" } else { b"NBDMAGICIHAVEOPT\x00\x03" };
        let connected = Client::connect(Script::new([prefix, &noise].concat()), "disk");
        assert!(connected.is_err(), "seed {seed}");
    }
    let says = |bytes: &[u8]| Client::connect(Script::new(bytes.to_vec()), "x").err().expect("refused").to_string();
    assert!(says(b"HTTP/1.1 400 Bad Request\r\n").contains("does not greet as an NBD server"));
    assert!(says(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00").contains("oldstyle"));
    let tls = [
        b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9".as_slice(),
        b"\x00\x00\x00\x08\x80\x00\x00\x05\x00\x00\x00\x00",
    ];
    let refused = Client::connect(Script::new(tls.concat()), "x");
    assert!(matches!(refused, Err(ConnectError::TlsRequired)), "{:?}", refused.err());
}

#[test]
fn a_client_takes_only_so_many_requests() {
    let (near, far) = pipe(1 << 20);
    let server = std::thread::spawn(move || {
        let export = MemoryExport::new(vec![1; 4096], Access::ReadOnly);
        let mut far = far;
        serve(&mut far, &[("", &export as &dyn Export)]).map(drop).map_err(|e| e.to_string())
    });
    let mut client = Client::connect(near, "").unwrap();
    for _ in 0..MAX_IN_FLIGHT {
        client.submit(Operation::Read { offset: 0, len: 512 }).unwrap();
    }
    let more = client.submit(Operation::Read { offset: 0, len: 512 });
    assert!(matches!(more, Err(nbd::client::ClientError::TooManyInFlight)), "{more:?}");
    let mut completed = 0;
    while let Some(done) = client.complete().unwrap() {
        assert!(done.result.is_ok());
        completed += 1;
    }
    assert_eq!(completed, MAX_IN_FLIGHT);
    client.disconnect().unwrap();
    server.join().unwrap().unwrap();
}
