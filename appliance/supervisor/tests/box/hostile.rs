//! Peers that lie: NBD clients and agents that break their protocol hurt nobody but themselves.

use crate::{
    agent::{Host, open_stream},
    support::{Control, Inside, Rng, assert_same, wait_for},
};
use model::{Codec, Extent, Mark, MonoTime, RecordKind, SourceSeq, StreamId, VolumeId, WriteFlags};
use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::Duration,
};
use supervisor::Event;
use wire::{FrameHeader, FrameKind, Message, Purpose, RefuseCode, encode_header};

const SIZE: u64 = 1 << 20;

/// The whole handshake of a client that asks for the default export, as bytes.
fn greet() -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(b"IHAVEOPT");
    bytes.extend_from_slice(&7u32.to_be_bytes()); // GO
    bytes.extend_from_slice(&6u32.to_be_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes
}

fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&0u16.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn hostile_nbd_clients_hurt_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    inside.make_group("g", &[("v", SIZE)]);
    let mut honest = inside.ingest("g-v");
    let mut want = vec![0; SIZE as usize];
    let mut rng = Rng::new(4);
    let socket = inside.nbd_socket("g-v");
    for round in 0..60u64 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut bytes = match round % 6 {
            // noise instead of a handshake
            0 => {
                let mut noise = vec![0; 1000];
                rng.fill(&mut noise);
                noise
            }
            // a handshake, then noise
            1 => {
                let mut noise = vec![0; 1000];
                rng.fill(&mut noise);
                [greet(), noise].concat()
            }
            // reads far beyond, unaligned writes, unknown commands
            2 => {
                [greet(), request(0, 1, u64::MAX - 5, 4096), request(1, 2, 7, 512), vec![1; 512], request(77, 3, 0, 0)]
                    .concat()
            }
            // a write larger than anybody's, announced
            3 => [greet(), request(1, 1, 0, u32::MAX)].concat(),
            // a write broken off in its data
            4 => [greet(), request(1, 1, 0, 65536), vec![9; 100]].concat(),
            // many large reads whose answers are never fetched
            _ => [greet(), (0..2000u64).flat_map(|i| request(0, i, 0, SIZE as u32)).collect()].concat(),
        };
        bytes.truncate(1 << 20);
        // The box may hang up or stop reading while we still write: both are fine.
        let _ = stream.write_all(&bytes);
        if round % 2 == 0 {
            drop(stream);
        } else {
            std::mem::forget(stream); // stays open, says and reads nothing more
        }
        let at = rng.below(SIZE / 512 - 8) * 512;
        let mut data = vec![0; 4096];
        rng.fill(&mut data);
        honest.write(at, &data, true).unwrap();
        want[at as usize..][..4096].copy_from_slice(&data);
    }
    let mut read = vec![0; SIZE as usize];
    honest.read(0, &mut read).unwrap();
    assert_same(&read, &want, "what the honest client wrote");
    wait_for("the clients to be named", || (inside.events(Event::NbdRefused) > 10).then_some(()));
    assert!(inside.get("status")["rss_bytes"].as_u64().unwrap() < 2 << 30);
}

#[test]
fn too_many_nbd_clients_are_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    inside.make_group("g", &[("v", SIZE)]);
    let mut honest = inside.ingest("g-v");
    let socket = inside.nbd_socket("g-v");
    let crowd: Vec<_> = (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    wait_for("the limit", || (inside.events(Event::ConnectionLimit) > 0).then_some(()));
    honest.write(0, &[1; 512], true).unwrap();
    drop(crowd);
    wait_for("room for one more", || nbd::client::Client::connect(UnixStream::connect(&socket).ok()?, "g-v").ok());
}

/// Strangers on the TLS port have places of their own.
#[test]
fn strangers_do_not_keep_clients_out() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    inside.make_group("g", &[("v", SIZE)]);
    let before = inside.events(Event::ConnectionLimit);
    let strangers: Vec<TcpStream> = (0..140).map(|_| TcpStream::connect(inside.nbd_listen()).unwrap()).collect();
    wait_for("the last of them to be turned away", || {
        (inside.events(Event::ConnectionLimit) >= before + 140 - 64).then_some(())
    });
    let mut client = inside.ingest("g-v");
    client.write(0, &[1; 512], true).unwrap();
    drop(strangers);
}

/// A write's header; the payload is 512 bytes of 5.
fn write_frame(seq: u64, change: impl FnOnce(&mut FrameHeader)) -> Vec<u8> {
    let payload = [5u8; 512];
    let mut header = FrameHeader {
        kind: FrameKind::Record(RecordKind::Write),
        codec: Codec::Raw,
        flags: WriteFlags::SYNC,
        volume: VolumeId(0),
        extent: Extent::new(0, 1),
        seq: SourceSeq(seq),
        mono: MonoTime(2),
        wall_us: 2,
        payload_len: 512,
        payload_crc: wire::crc32(&payload),
    };
    change(&mut header);
    [&encode_header(&header).unwrap()[..], &payload[..]].concat()
}

fn mark_frame(seq: u64, mark: &Mark) -> Vec<u8> {
    let payload = wire::encode_mark(mark).unwrap();
    let header = FrameHeader {
        kind: FrameKind::Record(RecordKind::Mark),
        codec: Codec::Raw,
        flags: WriteFlags::NONE,
        volume: VolumeId(0),
        extent: Extent::default(),
        seq: SourceSeq(seq),
        mono: MonoTime(2),
        wall_us: 2,
        payload_len: payload.len() as u32,
        payload_crc: wire::crc32(&payload),
    };
    [&encode_header(&header).unwrap()[..], &payload].concat()
}

#[test]
fn hostile_frames_end_their_connection_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    // An honest host beside it, and the hostile one's own group.
    let mut honest = Host::protect(&inside, "honest", vec![3; SIZE as usize]);
    honest.connect();
    let hostile = Host::protect(&inside, "hostile", vec![0; SIZE as usize]);
    let group = hostile.spec.id;
    let begin = [
        mark_frame(1, &Mark::StreamBegin { stream: StreamId([3; 16]) }),
        mark_frame(2, &Mark::GapBegin { reason: model::GapReason::InitialSync }),
    ]
    .concat();
    type Bytes = Vec<u8>;
    let mut flipped = write_frame(3, |_| {});
    flipped[20] ^= 1;
    let mut damaged = write_frame(3, |_| {});
    *damaged.last_mut().unwrap() ^= 1;
    let mut noise = vec![0; 4096];
    Rng::new(1).fill(&mut noise);
    let mut message = Vec::new();
    wire::encode_message(&Message::ListGroups, &mut message).unwrap();
    let cases: Vec<(&str, Bytes, RefuseCode)> = vec![
        ("noise", noise, RefuseCode::BadFrame),
        ("a flipped header bit", [begin.clone(), flipped].concat(), RefuseCode::BadFrame),
        ("a damaged payload", [begin.clone(), damaged].concat(), RefuseCode::BadFrame),
        ("a record before the stream's begin", write_frame(1, |_| {}), RefuseCode::OutOfPlace),
        ("a hole in the numbers", [begin.clone(), write_frame(9, |_| {})].concat(), RefuseCode::Sequence),
        (
            "an unknown volume",
            [begin.clone(), write_frame(3, |h| h.volume = VolumeId(9))].concat(),
            RefuseCode::UnknownVolume,
        ),
        (
            "past the end",
            [begin.clone(), write_frame(3, |h| h.extent = Extent::new(SIZE / 512, 1))].concat(),
            RefuseCode::BadExtent,
        ),
        ("an end without a gap", [mark_frame(1, &Mark::Consistent)].concat(), RefuseCode::OutOfPlace),
        ("a message of the control connection", [begin.clone(), message].concat(), RefuseCode::OutOfPlace),
    ];
    for (refused, (what, bytes, code)) in (1..).zip(cases) {
        honest.step();
        // Each has a stream of its own that the box has not met, as each begins anew.
        let mut conn = hostile.identity().connect(inside.listen(), Purpose::Stream { group }).unwrap();
        conn.say(&open_stream(group, &hostile.spec.volumes));
        let ready = conn.hear().unwrap_or_else(|e| panic!("{what}: {e}"));
        // What the earlier ones began is known by now: then the numbers go on from there.
        let Message::StreamReady { resume, .. } = ready else { panic!("{what}: {ready:?}") };
        let bytes = if let wire::Resume::Continue { next } = resume { renumber(what, bytes, next.0) } else { bytes };
        let _ = conn.raw(&bytes);
        let refusal = conn.hear_refusal();
        assert_eq!(refusal.code, code, "{what}: {refusal}");
        assert!(conn.ends(), "{what}: the connection stays");
        wait_for("the event", || (inside.events(Event::FrameRefused) >= refused).then_some(()));
    }
    honest.settle();
    let view = inside.view("honest", "\"latest\"");
    assert_same(&view.volumes[0], &honest.disk, "the honest host");
}

/// The hostile stream is known from its first two marks on: what follows is sent with the numbers that are due then.
fn renumber(what: &str, bytes: Vec<u8>, next: u64) -> Vec<u8> {
    let fresh = |seq, change: fn(&mut FrameHeader)| write_frame(seq, change);
    match what {
        "a flipped header bit" => {
            let mut bytes = fresh(next, |_| {});
            bytes[20] ^= 1;
            bytes
        }
        "a damaged payload" => {
            let mut bytes = fresh(next, |_| {});
            *bytes.last_mut().unwrap() ^= 1;
            bytes
        }
        "a record before the stream's begin" => mark_frame(next, &Mark::StreamBegin { stream: StreamId([3; 16]) }),
        "a hole in the numbers" => fresh(next + 5, |_| {}),
        "an unknown volume" => fresh(next, |h| h.volume = VolumeId(9)),
        "past the end" => fresh(next, |h| h.extent = Extent::new(SIZE / 512, 1)),
        "an end without a gap" => {
            [mark_frame(next, &Mark::Consistent), mark_frame(next + 1, &Mark::Consistent)].concat()
        }
        "a message of the control connection" => {
            let mut message = Vec::new();
            wire::encode_message(&Message::ListGroups, &mut message).unwrap();
            message
        }
        _ => bytes,
    }
}

#[test]
fn a_half_open_stream_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let host = Host::protect(&inside, "h", vec![0; SIZE as usize]);
    let group = host.spec.id;
    let mut conn = host.identity().connect(inside.listen(), Purpose::Stream { group }).unwrap();
    conn.say(&open_stream(group, &host.spec.volumes));
    let ready = conn.hear().unwrap();
    assert!(matches!(ready, Message::StreamReady { .. }), "{ready:?}");
    // Says nothing more; acks come, then the refusal.
    assert_eq!(conn.hear_refusal().code, RefuseCode::Silent);
    assert!(inside.events(Event::HostSilent) >= 1);
    // One that connects and says nothing at all holds its place for the handshake's limit only; the box goes on.
    let idle = std::net::TcpStream::connect(inside.listen()).unwrap();
    idle.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut byte = [0];
    assert_eq!((&idle).read(&mut byte).unwrap_or(0), 0, "an idle connection is closed");
}
