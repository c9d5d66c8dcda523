//! The binary against a made-up box: canned answers over a unix socket, views served by our own NBD server.

use model::{Sectors, VolumeId, VolumeSpec};
use nbd::{
    Access,
    blocking::{Export, ExportError, MemoryExport, serve},
};
use serde_json::{Value, json};
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    ops::Range,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Condvar, Mutex},
};

/// A request as the box saw it.
#[derive(Clone, PartialEq, Debug)]
struct Seen {
    line: String,
    body: Value,
}

type Answer = Box<dyn Fn(&Seen) -> (u16, String) + Send + Sync>;

/// A box that answers as it is told and remembers what it was asked.
struct FakeBox {
    dir: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl FakeBox {
    fn new(answer: Answer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer_one(stream.unwrap(), &answer, &log);
            }
        });
        Self { dir, seen }
    }
    fn path(&self) -> &Path {
        self.dir.path()
    }
    fn run(&self, args: &[&str]) -> Output {
        holdfast().arg("--socket").arg(self.path().join("control.sock")).args(args).output().unwrap()
    }
    fn lines(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|seen| seen.line.clone()).collect()
    }
    fn body_of(&self, line: &str) -> Value {
        let seen = self.seen.lock().unwrap();
        let found = seen.iter().find(|seen| seen.line == line);
        found.unwrap_or_else(|| panic!("no {line} among {seen:?}")).body.clone()
    }
}

fn holdfast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    command.env("TZ", "UTC").env("COLUMNS", "84").env("LC_ALL", "C").env_remove("HOLDFAST_SOCKET");
    command
}

fn answer_one(mut stream: UnixStream, answer: &Answer, log: &Mutex<Vec<Seen>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap() == 0 || header.trim().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let line = first.trim().trim_end_matches(" HTTP/1.1").replace("/api/v1", "");
    let seen = Seen { line, body: serde_json::from_slice(&body).unwrap_or(Value::Null) };
    let (status, text) = answer(&seen);
    log.lock().unwrap().push(seen);
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn good(output: Output) -> String {
    assert!(output.status.success(), "{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// stderr of a command that fails with this code.
#[track_caller]
fn bad(output: Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stderr)
}

fn volume(id: u32, name: &str, bytes: u64) -> Value {
    let spec = VolumeSpec {
        id: VolumeId(id),
        name: name.into(),
        sectors: Sectors(bytes / 512),
        identity: format!("serial-of-{name}"),
    };
    serde_json::to_value(spec).unwrap()
}

fn group(volumes: &[Value]) -> Value {
    json!({
        "id": "0123456789abcdef0123456789abcdef", "name": "web1", "host_name": "web1", "volumes": volumes,
        "policy": model::GroupPolicy::default(), "state": "replicating", "reason": null, "sync": null, "lag_ms": 40,
        "appended_lsn": 900, "durable_lsn": 899, "first_time_us": 1_763_803_800_000_000u64,
        "last_time_us": 1_763_807_400_000_000u64, "write_rate_bytes_s": 1048576, "write_rate_ops_s": 100,
        "journal_bytes": 1 << 30, "index_bytes": 1 << 20, "base_bytes": 1 << 30, "segments": 8, "records": 900,
        "hours_of_history": 1.0, "hours_forecast": 40, "pressure": "ok", "risks": [], "retention": {},
    })
}

fn status() -> Value {
    json!({
        "version": "0.1.0", "box_name": "b1", "data_dir": "/d", "now_us": 1_763_807_400_000_000u64, "listen": "0.0.0.0:7440",
        "uptime_s": 60, "rss_bytes": 1 << 20, "ca_fingerprint": "ab", "hosts": [], "groups": [group(&[volume(0, "/dev/sdb", 4096)])],
        "views": [], "ingest_targets": [], "disk": { "total": 100, "available": 50 },
    })
}

fn ok(value: Value) -> (u16, String) {
    (200, value.to_string())
}

#[test]
fn status_is_shown_as_a_page_as_json_and_again_and_again() {
    let fake = FakeBox::new(Box::new(|_| ok(status())));
    let page = good(fake.run(&["status"]));
    for want in [
        "box b1",
        "group web1 · host web1 · replicating · 1 volume of 4.0 KiB",
        "lag       40 ms",
        "1.0 MiB/s in 100 writes/s",
    ] {
        assert!(page.contains(want), "{want:?} is missing in\n{page}");
    }
    let json: Value = serde_json::from_str(&good(fake.run(&["status", "--json"]))).unwrap();
    assert_eq!(json, status());
    let watched = good(fake.run(&["status", "--watch", "--count", "2"]));
    assert_eq!(watched.matches("box b1").count(), 2, "{watched}");
    assert!(watched.contains("40 ms (alarm at 10.0 s)  ##"), "the second look has a curve\n{watched}");
    assert!(fake.lines().iter().all(|line| line == "GET /status"), "{:?}", fake.lines());
}

#[test]
fn watching_outlives_a_restart_of_the_daemon() {
    let looks = Mutex::new(0);
    let fake = FakeBox::new(Box::new(move |_| {
        let mut looks = looks.lock().unwrap();
        *looks += 1;
        if *looks == 2 { (503, String::new()) } else { ok(status()) }
    }));
    let watched = good(fake.run(&["status", "--watch", "--count", "3"]));
    assert_eq!(watched.matches("box b1").count(), 2, "{watched}");
    assert!(watched.contains("503 Service Unavailable without saying why; waiting for it to come back"), "{watched}");
}

#[test]
fn points_are_drawn() {
    let fake = FakeBox::new(Box::new(|seen| match seen.line.as_str() {
        "GET /groups" => ok(json!([group(&[])])),
        "GET /groups/0123456789abcdef0123456789abcdef/points?buckets=84" => ok(json!({
            "valid": [{ "first_lsn": 1, "last_lsn": 500, "first_time_us": 1_763_803_800_000_000u64, "last_time_us": 1_763_805_600_000_000u64 }],
            "gaps": [{ "first_lsn": 501, "last_lsn": null, "reason": "overflow", "first_time_us": 1_763_805_600_000_001u64 }],
            "bookmarks": [{ "name": "before upgrade", "lsn": 250, "time_us": 1_763_804_700_000_000u64, "consistency": "filesystem" }],
            "rate": [],
        })),
        other => panic!("{other}"),
    }));
    let page = good(fake.run(&["points", "web1"]));
    for want in [
        "group web1: 500 records",
        "1 gap, 1 bookmark",
        "2025-11-22 09:30:00",
        "the host's buffers overflowed",
        "before upgrade",
        "filesystem",
        "= any",
    ] {
        assert!(page.contains(want), "{want:?} is missing in\n{page}");
    }
    let json: Value = serde_json::from_str(&good(fake.run(&["points", "--json"]))).unwrap();
    assert_eq!(json["gaps"][0]["reason"], "overflow");
    let none = bad(fake.run(&["points", "web2"]), 1);
    assert_eq!(none, "holdfast: the box has no protection group \"web2\"\n  what to do: name one of web1\n");
}

#[test]
fn refusals_are_shown_in_the_boxs_words_with_the_remedy() {
    let fake = FakeBox::new(Box::new(|_| {
        let error = json!({ "error": { "code": "group-has-views", "message": "group web1 has 2 open views", "remedy": "close them first" } });
        (409, error.to_string())
    }));
    let told = bad(fake.run(&["group", "delete", "web1", "--confirm", "web1"]), 1);
    assert_eq!(told, "holdfast: group web1 has 2 open views\n  what to do: close them first\n");
    assert_eq!(fake.lines(), ["DELETE /groups/web1?confirm=web1"]);

    let silent = FakeBox::new(Box::new(|_| (500, "<html>".into())));
    assert!(bad(silent.run(&["status"]), 1).contains("500"));
    let odd = FakeBox::new(Box::new(|_| (200, "{".into())));
    assert!(bad(odd.run(&["status"]), 1).contains("is not understood"));
    let gone = holdfast().args(["--socket", "/nonexistent/s", "status"]).output().unwrap();
    let told = bad(gone, 1);
    assert!(
        told.contains("could not reach holdfastd at /nonexistent/s") && told.contains("what to do: start the daemon"),
        "{told}"
    );
    let by_env = holdfast().env("HOLDFAST_SOCKET", "/nonexistent/e").arg("status").output().unwrap();
    assert!(bad(by_env, 1).contains("/nonexistent/e"));
    assert_eq!(holdfast().arg("no-such-command").output().unwrap().status.code(), Some(2));
}

#[test]
fn requests_are_what_the_box_expects() {
    let fake = FakeBox::new(Box::new(|seen| match seen.line.as_str() {
        "GET /groups" => ok(json!([group(&[])])),
        "GET /groups/web1" => ok(group(&[])),
        "POST /tokens" => ok(json!({ "token": "TOKEN", "expires_us": 1_763_807_400_000_000u64, "ca_fingerprint": "ab",
              "listen": "[::]:17440" })),
        "GET /hosts" => ok(json!([{ "id": "7", "name": "web1", "connected": true, "revoked": false }])),
        "GET /ingest-targets" => ok(json!([
            { "export_name": "vm-system", "volume_name": "system", "bytes": 1 << 20,
              "uri": "nbd+unix:///vm-system?socket=/x" },
            { "export_name": "web-other", "volume_name": "other", "bytes": 512,
              "uri": "nbd+unix:///web-other?socket=/y" },
        ])),
        "GET /views" => {
            ok(json!([{ "id": 3, "group": "web1", "lsn": 9, "time_us": 1_763_807_400_000_000u64, "exports": [] }]))
        }
        line if line.ends_with("/bookmarks") => {
            ok(json!({ "name": "升级", "lsn": 77, "time_us": 1_763_807_400_000_000u64 }))
        }
        _ => ok(Value::Null),
    }));
    let said = good(fake.run(&["host", "token", "--name", "web1", "--minutes", "5"]));
    assert!(said.contains("holdfast-agent enrol --box THIS-BOX:17440"), "{said}");
    assert_eq!(fake.body_of("POST /tokens"), json!({ "host_name": "web1", "valid_minutes": 5 }));
    assert!(good(fake.run(&["host", "list"])).contains("connected"));
    good(fake.run(&["host", "revoke", "web 1"]));
    assert!(fake.lines().contains(&"POST /hosts/web%201/revoke".into()), "{:?}", fake.lines());
    assert!(good(fake.run(&["group", "list"])).contains("replicating"));
    let made = good(fake.run(&["group", "create", "vm", "--volume", "system:1MiB", "--window-hours", "9"]));
    assert!(made.contains("system (1.0 MiB)") && made.contains("nbd+unix:///vm-system"), "{made}");
    assert!(!made.contains("web-other"), "another group's target is no business of this command: {made}");
    let body = fake.body_of("POST /groups");
    assert_eq!(body["volumes"], json!([{ "name": "system", "bytes": 1 << 20 }]));
    assert_eq!(body["policy"]["window_hours"], 9);
    assert!(good(fake.run(&["group", "policy", "web1", "--mode", "sync"])).contains("mode      sync"));
    assert_eq!(fake.body_of("PATCH /groups/web1/policy")["mode"]["sync"]["wait_ms_max"], 1000);
    good(fake.run(&["group", "resync", "web1"]));
    let made = good(fake.run(&["bookmark", "create", "升级", "--consistency", "filesystem"]));
    assert!(made.contains("LSN 77"), "{made}");
    let line = "POST /groups/0123456789abcdef0123456789abcdef/bookmarks";
    assert_eq!(fake.body_of(line), json!({ "name": "升级", "consistency": "filesystem" }));
    good(fake.run(&["bookmark", "delete", "升级", "--group", "web1"]));
    assert!(good(fake.run(&["view", "list"])).contains("web1"));
    good(fake.run(&["view", "close", "3"]));
    let lines = fake.lines();
    for want in [
        "POST /groups/web1/resync",
        "DELETE /views/3",
        "DELETE /groups/0123456789abcdef0123456789abcdef/bookmarks/%E5%8D%87%E7%BA%A7",
    ] {
        assert!(lines.contains(&want.into()), "{want} is missing in {lines:?}");
    }
}

#[test]
fn a_view_is_opened_at_what_was_meant() {
    let fake = FakeBox::new(Box::new(|seen| match seen.line.as_str() {
        "GET /groups" => ok(json!({ "groups": [group(&[volume(0, "/dev/sdb", 4096)])] })),
        _ => ok(
            json!({ "id": "v1", "group": "web1", "lsn": 9, "time_us": 1_763_807_400_000_000u64, "open_ms": 3, "exports": [{
                "volume": 0, "volume_name": "/dev/sdb", "export_name": "v1-0", "bytes": 4096, "unix_socket": "/r/v1.sock",
                "uri": "nbd+unix:///v1-0?socket=/r/v1.sock", "tcp_uri": "nbds://box/v1-0",
            }]}),
        ),
    }));
    let line = "POST /groups/0123456789abcdef0123456789abcdef/views";
    for (at, want) in [
        ("latest", json!("latest")),
        ("lsn:9", json!({ "lsn": 9 })),
        ("2025-11-22T10:30:00", json!({ "time": 1_763_807_400_000_000u64 })),
        ("2025-11-22T10:30:00+02:00", json!({ "time": 1_763_800_200_000_000u64 })),
        ("before upgrade", json!({ "bookmark": "before upgrade" })),
    ] {
        fake.seen.lock().unwrap().clear();
        let page = good(fake.run(&["view", "open", "--at", at, "--tcp"]));
        for want in ["nbd+unix:///v1-0?socket=/r/v1.sock", "nbds://box/v1-0", "opened in 3 ms", "view close v1"] {
            assert!(page.contains(want), "{want:?} is missing in\n{page}");
        }
        let body = fake.body_of(line);
        assert_eq!((&body["at"], &body["tcp"], &body["idle_minutes"]), (&want, &json!(true), &Value::Null), "{at}");
        assert!(body["opened_by"].as_str().is_some_and(|by| by.starts_with("holdfast (process ")), "{body}");
    }
    let unclear = bad(fake.run(&["view", "open", "--at", "2025-13-01"]), 1);
    assert!(unclear.contains("looks like a time but is none") && unclear.contains("what to do"), "{unclear}");
}

#[test]
fn verification_tells_damage_by_its_exit_code() {
    let lines = |report: Value| {
        let progress = json!({ "file": "seg/1", "done_bytes": 5, "total_bytes": 10 });
        format!("{progress}\n{}\n", json!({ "report": report }))
    };
    let box_with = |report: Value| {
        FakeBox::new(Box::new(move |seen| match seen.line.as_str() {
            "GET /groups" => ok(json!([group(&[])])),
            _ => (200, lines(report.clone())),
        }))
    };
    let clean = box_with(json!({ "segments": 2, "records": 7, "bytes": 4096, "damage": [], "damage_count": 0 }));
    assert!(good(clean.run(&["verify"])).contains("group web1 is whole: 7 records in 2 segments"));
    let damaged =
        box_with(json!({ "segments": 2, "damage": ["seg/x: record checksum at 0x7f000"], "damage_count": 1 }));
    let output = damaged.run(&["verify", "web1"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).contains("seg/x: record checksum at 0x7f000"));
    let cut = FakeBox::new(Box::new(|seen| match seen.line.as_str() {
        "GET /groups" => ok(json!([group(&[])])),
        _ => (200, "{\"done_bytes\":1,\"total_bytes\":2}\n".into()),
    }));
    assert!(bad(cut.run(&["verify"]), 1).contains("ended its answer to verify group web1 early"));
}

#[test]
fn a_client_certificate_is_laid_out_for_qemu() {
    let fake = FakeBox::new(Box::new(|_| ok(json!({ "certificate_pem": "CERT", "key_pem": "KEY", "ca_pem": "CA" }))));
    let out = fake.path().join("certs");
    let run = || fake.run(&["client-cert", "desk", "--out", out.to_str().unwrap()]);
    good(run());
    for (name, pem) in [("ca-cert.pem", "CA"), ("client-cert.pem", "CERT"), ("client-key.pem", "KEY")] {
        assert_eq!(std::fs::read_to_string(out.join(name)).unwrap(), pem);
        assert_eq!(std::fs::metadata(out.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert!(bad(run(), 1).contains("exists already"));
}

/// A box with one view to open: volume 0 of the group, served over NBD.
struct Restorable {
    fake: FakeBox,
    bytes: Vec<u8>,
}

impl Restorable {
    fn new(bytes: Vec<u8>) -> Self {
        let export = Arc::new(MemoryExport::new(bytes.clone(), Access::ReadOnly));
        Self::serving(bytes, export, "serial:S4EVNX0R")
    }
    fn serving(bytes: Vec<u8>, export: Arc<dyn Export + Send + Sync>, identity: &str) -> Self {
        let identity = identity.to_owned();
        let nbd_dir = tempfile::tempdir().unwrap();
        let socket = nbd_dir.path().join("v.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, export) = (stream.unwrap(), export.clone());
                // How a connection ends is the command's business; what it wrote is compared.
                std::thread::spawn(move || serve(&mut stream, &[("v1-0", &*export as &dyn Export)]).map(drop).ok());
            }
        });
        let len = bytes.len() as u64;
        let fake = FakeBox::new(Box::new(move |seen| {
            let _alive = &nbd_dir;
            match seen.line.as_str() {
                "GET /groups" => {
                    let mut protected = volume(0, "/dev/sdb", len);
                    protected["identity"] = identity.clone().into();
                    ok(json!([group(&[protected, volume(1, "/dev/sdc", 512)])]))
                }
                "DELETE /views/v1" => ok(Value::Null),
                line if line.ends_with("/views") => ok(json!({
                    "id": "v1", "group": "web1", "lsn": 9, "time_us": 1_763_807_400_000_000u64, "exports": [{
                        "volume": 0, "volume_name": "/dev/sdb", "export_name": "v1-0", "bytes": len,
                        "unix_socket": socket.to_str().unwrap(),
                        "uri": format!("nbd+unix:///v1-0?socket={}", socket.display()), "tcp_uri": null,
                    }]
                })),
                other => panic!("{other}"),
            }
        }));
        Self { fake, bytes }
    }
    fn restore(&self, to: &Path, more: &[&str]) -> Output {
        let to = to.to_str().unwrap();
        self.fake.run(&[&["restore", "--at", "latest", "--volume", "/dev/sdb", "--to", to], more].concat())
    }
    /// Whether every view that was opened was closed.
    fn views_closed(&self) -> bool {
        let lines = self.fake.lines();
        let opened = lines.iter().filter(|line| line.starts_with("POST") && line.ends_with("/views")).count();
        opened == lines.iter().filter(|line| *line == "DELETE /views/v1").count()
    }
    fn path(&self, name: &str) -> PathBuf {
        self.fake.path().join(name)
    }
}

fn sample(len: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 24) as u8
        })
        .collect();
    bytes[len / 4..len - len / 4].fill(0);
    bytes
}

#[test]
fn a_restored_file_is_the_volume_bit_for_bit_and_sparse() {
    let restorable = Restorable::new(sample(16 << 20));
    let out = restorable.path("out.img");
    let told = good(restorable.restore(&out, &[]));
    assert!(told.contains("restored /dev/sdb as of 2025-11-22 10:30:00.000 (LSN 9)"), "{told}");
    assert!(told.contains("16.0 MiB, 8.0 MiB of it written"), "{told}");
    assert!(std::fs::read(&out).unwrap() == restorable.bytes, "the file differs from the volume");
    let meta = std::fs::metadata(&out).unwrap();
    assert!(meta.blocks() * 512 < 10 << 20, "{} bytes on the disk: not sparse", meta.blocks() * 512);
    assert!(restorable.views_closed(), "{:?}", restorable.fake.lines());
    assert_eq!(std::fs::read_dir(restorable.fake.path()).unwrap().count(), 2, "the socket and the file, nothing else");
}

#[test]
fn an_existing_file_is_kept_unless_forced() {
    let restorable = Restorable::new(sample(1 << 20));
    let out = restorable.path("out.img");
    std::fs::write(&out, "precious").unwrap();
    let told = bad(restorable.restore(&out, &[]), 1);
    assert!(told.contains("out.img exists already") && told.contains("--force"), "{told}");
    assert_eq!(std::fs::read(&out).unwrap(), b"precious");
    assert_eq!(restorable.fake.lines(), ["GET /groups"], "no view was opened for it");
    good(restorable.restore(&out, &["--force"]));
    assert!(std::fs::read(&out).unwrap() == restorable.bytes);
}

#[test]
fn wrong_wishes_are_refused_before_anything_is_opened() {
    let restorable = Restorable::new(sample(1 << 20));
    let folder = bad(restorable.restore(restorable.fake.path(), &[]), 1);
    assert!(folder.contains("is a folder"), "{folder}");
    let no_volume = restorable.fake.run(&["restore", "--at", "latest", "--to", "/tmp/never"]);
    let no_volume = bad(no_volume, 1);
    assert!(no_volume.contains("several volumes") && no_volume.contains("/dev/sdb, /dev/sdc"), "{no_volume}");
    assert!(!restorable.fake.lines().iter().any(|line| line.starts_with("POST")), "{:?}", restorable.fake.lines());
}

#[test]
fn a_copy_that_breaks_off_leaves_nothing_and_closes_the_view() {
    // The view lacks what the group promises: its server knows no such export.
    let restorable = Restorable::new(Vec::new());
    let out = restorable.path("out.img");
    let output = restorable.restore(&out, &[]);
    // An empty volume is restored as an empty file.
    good(output);
    assert_eq!(std::fs::metadata(&out).unwrap().len(), 0);

    let fake = FakeBox::new(Box::new(|seen| match seen.line.as_str() {
        "GET /groups" => ok(json!([group(&[volume(0, "/dev/sdb", 4096)])])),
        "DELETE /views/v1" => ok(Value::Null),
        _ => ok(
            json!({ "id": "v1", "lsn": 9, "exports": [{ "volume": 0, "export_name": "x", "unix_socket": "/nonexistent/s" }] }),
        ),
    }));
    let out = fake.path().join("out.img");
    let told = bad(fake.run(&["restore", "--at", "9", "--to", out.to_str().unwrap()]), 1);
    assert!(told.contains("nothing was left at") && told.contains("connect to the view at /nonexistent/s"), "{told}");
    assert_eq!(std::fs::read_dir(fake.path()).unwrap().count(), 1, "only the socket");
    assert_eq!(fake.lines().last().map(String::as_str), Some("DELETE /views/v1"));
}

/// Lets reads through only when told so, and tells when the first one came.
struct Gated {
    inner: MemoryExport,
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gated {
    fn wait_for(&self, is_it: impl Fn(&(bool, bool)) -> bool) {
        let state = self.state.lock().unwrap();
        let limit = std::time::Duration::from_secs(30);
        let waited = self.changed.wait_timeout_while(state, limit, |state| !is_it(state)).unwrap().1;
        assert!(!waited.timed_out(), "what was waited for never came");
    }
    fn set(&self, change: impl Fn(&mut (bool, bool))) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }
}

impl Export for Gated {
    fn info(&self) -> nbd::ExportInfo {
        self.inner.info()
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.set(|(came, _)| *came = true);
        self.wait_for(|(_, open)| *open);
        self.inner.read(offset, buf)
    }
    fn write(&self, _: u64, _: &[u8], _: bool) -> Result<(), ExportError> {
        Err(ExportError::new(nbd::Errno::Perm, "a view"))
    }
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    fn trim(&self, _: Range<u64>, _: bool) -> Result<(), ExportError> {
        Err(ExportError::new(nbd::Errno::Perm, "a view"))
    }
    fn zero(&self, _: Range<u64>, _: bool) -> Result<(), ExportError> {
        Err(ExportError::new(nbd::Errno::Perm, "a view"))
    }
}

#[test]
fn an_interrupted_restore_closes_its_view_and_leaves_nothing() {
    let bytes = sample(32 << 20);
    let inner = MemoryExport::new(bytes.clone(), Access::ReadOnly);
    let gated = Arc::new(Gated { inner, state: Mutex::default(), changed: Condvar::new() });
    let restorable = Restorable::serving(bytes, gated.clone(), "serial:S4EVNX0R");
    let out = restorable.path("out.img");
    let child = holdfast()
        .arg("--socket")
        .arg(restorable.path("control.sock"))
        .args(["restore", "--at", "latest", "--volume", "0", "--to"])
        .arg(&out)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    gated.wait_for(|(came, _)| *came);
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    gated.set(|(_, open)| *open = true);
    let told = bad(child.wait_with_output().unwrap(), 1);
    assert!(told.contains("nothing was left at") && told.contains("interrupted"), "{told}");
    assert!(restorable.views_closed(), "{:?}", restorable.fake.lines());
    assert_eq!(std::fs::read_dir(restorable.fake.path()).unwrap().count(), 1, "only the socket");
}

#[test]
fn qcow2_is_made_by_qemu_img() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("SKIPPED: qemu-img is not installed");
        return;
    }
    let restorable = Restorable::new(sample(4 << 20));
    let (out, raw) = (restorable.path("out.qcow2"), restorable.path("back.raw"));
    good(restorable.restore(&out, &["--format", "qcow2"]));
    let back =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&out).arg(&raw).output().unwrap();
    assert!(back.status.success(), "{}", text(&back.stderr));
    assert!(std::fs::read(&raw).unwrap() == restorable.bytes, "the image differs from the volume");
    assert_eq!(std::fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(restorable.views_closed());
}

/// A loop device over a file of this size; None (and a word why) where that cannot be had.
struct Loop {
    device: PathBuf,
    file: tempfile::NamedTempFile,
}

impl Loop {
    fn new(bytes: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output();
        match output {
            Ok(output) if output.status.success() => Some(Self { device: text(&output.stdout).trim().into(), file }),
            Ok(output) => {
                println!("SKIPPED: no loop device: {}", text(&output.stderr).trim());
                None
            }
            Err(e) => {
                println!("SKIPPED: losetup: {e}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.device).status().ok();
    }
}

#[test]
fn a_device_is_guarded_and_then_written_whole() {
    let Some(target) = Loop::new((4 << 20) + 4096) else { return };
    let restorable = Restorable::new(sample(4 << 20));
    // What was there before must be gone, also where the volume is zero.
    std::fs::write(&target.device, vec![0xee; 4 << 20]).unwrap();
    let unforced = bad(restorable.restore(&target.device, &[]), 1);
    assert!(unforced.contains("is a block device") && unforced.contains("--force"), "{unforced}");
    good(restorable.restore(&target.device, &["--force"]));
    let mut back = vec![0; 4 << 20];
    std::fs::File::open(&target.device).unwrap().read_exact(&mut back).unwrap();
    assert!(back == restorable.bytes, "the device differs from the volume");
    let qcow2 = bad(restorable.restore(&target.device, &["--force", "--format", "qcow2"]), 1);
    assert!(qcow2.contains("--format raw"), "{qcow2}");
    assert!(restorable.views_closed());
}

#[test]
fn a_device_that_is_too_small_is_not_touched() {
    let Some(target) = Loop::new(1 << 20) else { return };
    let restorable = Restorable::new(sample(4 << 20));
    std::fs::write(&target.device, vec![0xee; 1 << 20]).unwrap();
    let told = bad(restorable.restore(&target.device, &["--force"]), 1);
    assert!(told.contains("holds 1.0 MiB, the volume has 4.0 MiB") && told.contains("4194304"), "{told}");
    assert!(std::fs::read(&target.device).unwrap().iter().all(|b| *b == 0xee), "it was written to");
    assert!(restorable.views_closed());
}

#[test]
fn a_device_that_is_protected_itself_is_refused() {
    let Some(target) = Loop::new(2 << 20) else { return };
    let bytes = sample(2 << 20);
    let export = Arc::new(MemoryExport::new(bytes.clone(), Access::ReadOnly));
    let identity = format!("loop:{}", target.file.path().display());
    let restorable = Restorable::serving(bytes, export, &identity);
    let told = bad(restorable.restore(&target.device, &["--force"]), 1);
    assert!(told.contains("is volume /dev/sdb of protection group web1") && told.contains("unprotect"), "{told}");
    good(restorable.restore(&target.device, &["--force", "--onto-protected"]));
    assert!(std::fs::read(&target.device).unwrap() == restorable.bytes);
}

#[test]
fn a_mounted_device_is_refused() {
    let Some(target) = Loop::new(16 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&target.device).output();
    if !made.is_ok_and(|made| made.status.success()) {
        println!("SKIPPED: mkfs.ext4 is not installed");
        return;
    }
    let mounted = Command::new("mount").arg(&target.device).arg(dir.path()).output().unwrap();
    if !mounted.status.success() {
        println!("SKIPPED: cannot mount: {}", text(&mounted.stderr).trim());
        return;
    }
    let restorable = Restorable::new(sample(4 << 20));
    let output = restorable.restore(&target.device, &["--force"]);
    let unmounted = Command::new("umount").arg(dir.path()).status().unwrap();
    let told = bad(output, 1);
    assert!(told.contains("is mounted at") && told.contains("umount"), "{told}");
    assert!(unmounted.success());
}
