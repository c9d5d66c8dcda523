//! Servers that answer, hang, drip, flood and lie; units and processes of this machine.

use super::*;
use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
};

/// A server that does with each connection what it is told, until the test ends.
fn server(mut serve: impl FnMut(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || listener.incoming().flatten().for_each(&mut serve));
    at
}

fn means() -> Means {
    let runner = script::Runner { socket: "/nonexistent".into(), program: "/nonexistent".into(), config: None };
    Means { systemctl: "/nonexistent".into(), scripts: BTreeMap::new(), runner }
}

fn probe(kind: ProbeKind, timeout_ms: u64) -> PlanProbe {
    PlanProbe { name: "p".into(), kind, every_ms: 500, timeout_ms }
}

fn kinds(at: SocketAddr) -> Vec<ProbeKind> {
    let address = at.to_string();
    let path = "/".to_owned();
    vec![
        ProbeKind::Http { address: address.clone(), path: path.clone() },
        ProbeKind::Https { address: address.clone(), path, name: None },
        ProbeKind::Postgres { address: address.clone() },
        ProbeKind::Mysql { address: address.clone() },
        ProbeKind::Redis { address },
    ]
}

fn why(made: &Made) -> &str {
    match &made.end {
        ProbeEnd::Works => "works",
        ProbeEnd::Fails { why } => why,
        ProbeEnd::Broken { why } => panic!("the probe could not be made: {why}"),
    }
}

fn answers_with(kind: fn(String) -> ProbeKind, bytes: &'static [u8]) -> String {
    let at = server(move |mut stream| {
        let mut request = [0; 512];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(bytes);
        // Closed only when the other side has: a reset could overtake the answer.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    why(&make(&probe(kind(at.to_string()), 20_000), &means())).to_owned()
}
fn http(address: String) -> ProbeKind {
    ProbeKind::Http { address, path: "/health".into() }
}
fn postgres(address: String) -> ProbeKind {
    ProbeKind::Postgres { address }
}
fn redis(address: String) -> ProbeKind {
    ProbeKind::Redis { address }
}

/// One that speaks first.
fn mysql_says(bytes: &'static [u8]) -> String {
    let at = server(move |mut stream| {
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    why(&make(&probe(ProbeKind::Mysql { address: at.to_string() }, 20_000), &means())).to_owned()
}

#[test]
fn answers_are_told_in_words_of_their_protocol() {
    assert_eq!(answers_with(http, b"HTTP/1.1 204 No Content\r\n\r\n"), "works");
    assert!(answers_with(http, b"HTTP/1.0 503 Service Unavailable\r\n").ends_with("answers 503 Service Unavailable"));
    assert!(answers_with(http, b"SSH-2.0-OpenSSH_9.2\r\n").contains("is not an HTTP server: \"S\""));
    assert!(answers_with(http, b"HTTP/1.1 banana\r\n").contains("is not an HTTP server"));
    assert_eq!(answers_with(redis, b"+PONG\r\n"), "works");
    assert_eq!(answers_with(redis, b"-NOAUTH Authentication required.\r\n"), "works");
    let loading = answers_with(redis, b"-LOADING Redis is loading the dataset in memory\r\n");
    assert!(loading.ends_with("says: LOADING Redis is loading the dataset in memory"), "{loading}");
    assert!(answers_with(redis, b"HTTP/1.1 400\r\n").contains("is not Redis: \"H\""));
    // Asks for a password.
    assert_eq!(answers_with(postgres, b"R\0\0\0\x08\0\0\0\x03"), "works");
    let starting = answers_with(postgres, b"E\0\0\0\x30SFATAL\0C57P03\0Mthe database is starting up\0\0");
    assert!(starting.ends_with("says: the database is starting up (57P03)"), "{starting}");
    assert_eq!(answers_with(postgres, b"E\0\0\0\x21SFATAL\0C28000\0Mno such role\0\0"), "works");
    let row =
        b"R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0Z\0\0\0\x05IT\0\0\0\x06\0\x01D\0\0\0\x0b\0\x01\0\0\0\x011C\0\0\0\x05\0";
    assert_eq!(answers_with(postgres, row), "works");
    let wrong = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05ID\0\0\0\x0b\0\x01\0\0\0\x012";
    assert!(answers_with(postgres, wrong).contains("is not a PostgreSQL that knows SELECT 1"));
    // Lets us in and then fails the query: that is no refusal.
    let fails = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05IE\0\0\0\x21SERROR\0C28000\0Mno such role\0\0";
    assert!(answers_with(postgres, fails).contains("no such role (28000)"));
    assert!(mysql_says(b"\x17\0\0\0\xff\x10\x04Too many connections").contains("says: Too many connections (1040)"));
    assert_eq!(mysql_says(b"\x10\0\0\0\xff\x6a\x04Host not allo"), "works");
    assert!(mysql_says(b"SSH-2.0-OpenSSH\r\n").contains("is not MySQL"));
    assert_eq!(mysql_says(b"\x07\0\0\0\x0a8.0.1\0\x05\0\0\x02\xff\x15\x04no"), "works");
}

#[test]
fn a_server_that_is_not_there_is_the_applications_fault_and_one_that_only_accepts_too() {
    let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for kind in kinds(at).into_iter().chain([ProbeKind::Tcp { address: at.to_string() }]) {
        let made = make(&probe(kind, 20_000), &means());
        assert_eq!(why(&made), format!("nobody accepts connections at {at}"));
    }
    // Accepts and says nothing, as a stopped server does: its kernel accepts for it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    for kind in kinds(at) {
        let made = make(&probe(kind, 100), &means());
        assert!(why(&made).contains("gave no whole answer within 100 ms"), "{made:?}");
    }
    let tcp = make(&probe(ProbeKind::Tcp { address: at.to_string() }, 20_000), &means());
    assert_eq!(tcp.end, ProbeEnd::Works, "that is all that tcp asks");
    // Closes at once.
    let at = server(drop);
    for kind in kinds(at) {
        let made = make(&probe(kind, 20_000), &means());
        assert!(why(&made).contains("closed the connection") || why(&made).contains("broke"), "{made:?}");
    }
}

#[test]
fn slow_endless_and_random_answers_end_at_the_limit_or_before() {
    // A byte at a time, each within any patience of its own: only a deadline over all of them ends it.
    for bytes in [&b"HTTP/1.1 "[..], b"+", b"S\0\0\0\x04", b"\x01\0\0\0\x0a"] {
        let at = server(move |mut stream| {
            thread::spawn(move || {
                for byte in bytes.iter().cycle() {
                    if stream.write_all(&[*byte]).is_err() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
        });
        for kind in kinds(at) {
            let made = make(&probe(kind, 300), &means());
            assert_ne!(made.end, ProbeEnd::Works, "{made:?}");
            let _ = why(&made);
        }
    }
    // As much as can be sent, of each protocol's own beginning and of noise.
    let (told, seen) = mpsc::channel();
    let mut seed = 88_172_645_463_325_252_u64;
    let at = server(move |mut stream| {
        let mut bytes = vec![0_u8; 64 << 10];
        for byte in &mut bytes {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            *byte = (seed >> 32) as u8;
        }
        let beginnings: [&[u8]; 6] =
            [b"", b"HTTP/1.1 ", b"+", b"S\0\0\0\x04", b"\xff\x0f\0\0\x0a", b"\x16\x03\x03\x40\0"];
        let begin = beginnings[(seed % 6) as usize];
        let told = told.clone();
        thread::spawn(move || {
            let _ = stream.write_all(begin);
            let mut sent = 0_usize;
            while stream.write_all(&bytes).is_ok() && sent < (8 << 20) {
                sent += bytes.len();
            }
            let _ = told.send(sent);
        });
    });
    for _ in 0..20 {
        for kind in kinds(at) {
            let made = make(&probe(kind, 20_000), &means());
            assert_ne!(made.end, ProbeEnd::Works, "{made:?}");
            assert!(why(&made).len() <= WHY_MAX && !why(&made).chars().any(char::is_control), "{made:?}");
        }
    }
    // Nobody took all of it.
    let sent = seen.recv().unwrap();
    assert!(sent < (8 << 20), "{sent} bytes were taken");
}

#[test]
fn what_a_host_says_cannot_steer_a_terminal() {
    assert_eq!(
        plain(b"a\x1b[31mred\x07\r\n b\xff\xe2\x80\xae", 100, false),
        "a\u{fffd}[31mred\u{fffd}   b\u{fffd}\u{fffd}"
    );
    assert_eq!(plain("zwei\nZeilen ü".as_bytes(), 100, true), "zwei\nZeilen ü");
    assert_eq!(plain("üüü".as_bytes(), 5, true), "üü");
}

#[test]
fn units_and_processes_are_asked_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let systemctl = dir.path().join("systemctl");
    let says = |text: &str| {
        let script = format!("#!/bin/sh\n[ \"$1 $3 $4\" = 'show -- x.service' ] || exit 9\n{text}\n");
        std::fs::write(&systemctl, script).unwrap();
        std::fs::set_permissions(&systemctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let means = Means { systemctl: systemctl.clone(), ..means() };
        make(&probe(ProbeKind::Unit("x.service".into()), 2_000), &means).end
    };
    let state = |load: &str, active: &str, sub: &str, result: &str| {
        says(&format!("printf 'Result={result}\\nLoadState={load}\\nActiveState={active}\\nSubState={sub}\\n'"))
    };
    let fails = |why: &str| ProbeEnd::Fails { why: why.into() };
    assert_eq!(state("loaded", "active", "running", "success"), ProbeEnd::Works);
    assert_eq!(state("loaded", "failed", "failed", "exit-code"), fails("x.service is failed (exit-code)"));
    assert_eq!(state("loaded", "activating", "start-pre", "success"), fails("x.service is activating (start-pre)"));
    assert_eq!(state("not-found", "inactive", "dead", "success"), fails("there is no unit x.service on this host"));
    // systemd itself does not answer: that is nobody's fault.
    for text in ["exit 1", "sleep 60", "echo ActiveState=active"] {
        assert!(matches!(says(text), ProbeEnd::Broken { .. }), "{text}");
    }
    let process = |name: &str| make(&probe(ProbeKind::Process(name.into()), 1_000), &means()).end;
    let copy = dir.path().join("a-name-longer-than-15");
    std::fs::copy("/bin/sleep", &copy).unwrap();
    assert_eq!(process("a-name-longer-than-15"), fails("no process a-name-longer-than-15 runs"));
    let mut child = std::process::Command::new(&copy).arg("600").spawn().unwrap();
    assert_eq!(process("a-name-longer-than-15"), ProbeEnd::Works);
    assert_eq!(process("a-name-longer-"), fails("no process a-name-longer- runs"), "a part of a name is another");
    child.kill().unwrap();
    let begun = Instant::now();
    while process("a-name-longer-than-15") == ProbeEnd::Works && begun.elapsed() < Duration::from_secs(20) {}
    let dead = fails("the process a-name-longer-than-15 has ended, and its parent has not noticed");
    assert_eq!(process("a-name-longer-than-15"), dead);
    child.wait().unwrap();
}

#[test]
fn probes_are_made_again_and_again_and_a_slow_one_holds_up_no_other() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let slow = silent.local_addr().unwrap().to_string();
    let working = server(|mut stream| drop(stream.write_all(b"+PONG\r\n"))).to_string();
    let plan = [
        PlanProbe { name: "slow".into(), kind: ProbeKind::Redis { address: slow }, every_ms: 500, timeout_ms: 60_000 },
        PlanProbe { name: "db".into(), kind: ProbeKind::Tcp { address: working }, every_ms: 500, timeout_ms: 1_000 },
    ];
    let (to, from) = mpsc::channel();
    let tell: Tell = Arc::new(move |result| drop(to.send(result)));
    let host = HostId([7; 16]);
    let probes = Probes::start(host, &plan, &means(), &tell).unwrap();
    assert!(probes.makes(&plan) && !probes.makes(&plan[..1]));
    for _ in 0..3 {
        let result = from.recv_timeout(Duration::from_secs(60)).expect("a result");
        assert_eq!((result.whose, result.name.as_str(), &result.end), (host, "db", &ProbeEnd::Works));
    }
    drop(probes);
    drop(tell);
    // The thread of the fast one ends; the slow one's holds the other end until its limit, and tells nothing.
    thread::sleep(Duration::from_millis(600));
    while from.try_recv().is_ok() {}
    thread::sleep(Duration::from_millis(700));
    assert!(from.try_recv().is_err(), "dropped, nothing more is told");
}
