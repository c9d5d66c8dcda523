//! Ingest targets and views: what was written is read back, now and as of any moment, while writing goes on.

use crate::{
    agent::{Host, nbd_tls},
    support::{Control, Inside, Rng, assert_same, have, http_get, wait_for},
};
use nbd::client::{Client, ClientError};
use rustls::{
    ClientConfig, ClientConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use std::{
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use supervisor::Event;

const SIZE: u64 = 8 << 20;

/// A change as a client made it, and the LSN it must have got.
#[derive(Clone)]
pub enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
}

/// The history as the client knows it; the slow oracle of every view.
#[derive(Clone, Default)]
pub struct History {
    /// The last LSN of each change.
    pub changes: Vec<(u64, Change)>,
    pub lsn: u64,
}

impl History {
    /// A fresh ingest group begins with `Consistent` at LSN 1.
    pub fn fresh() -> Self {
        Self { changes: Vec::new(), lsn: 1 }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.lsn += (data.len() as u64).div_ceil(128 << 10);
        self.changes.push((self.lsn, Change::Write(offset, data.to_vec())));
    }
    fn zero(&mut self, offset: u64, len: u64) {
        self.lsn += 1;
        self.changes.push((self.lsn, Change::Zero(offset, len)));
    }
    pub fn image_at(&self, lsn: u64, size: u64) -> Vec<u8> {
        let mut image = vec![0; size as usize];
        for (at, change) in &self.changes {
            if *at > lsn {
                break;
            }
            match change {
                Change::Write(offset, data) => image[*offset as usize..][..data.len()].copy_from_slice(data),
                Change::Zero(offset, len) => image[*offset as usize..][..*len as usize].fill(0),
            }
        }
        image
    }
}

/// One random change through `client`.
pub fn change(client: &mut Client<UnixStream>, rng: &mut Rng, history: &mut History) -> Result<(), ClientError> {
    let sectors = SIZE / 512;
    match rng.below(20) {
        0 => {
            let (offset, len) = range(rng, sectors, 2000);
            client.trim(offset, len)?;
            history.zero(offset, len);
        }
        1 => {
            let (offset, len) = range(rng, sectors, 2000);
            client.zero(offset, len, rng.below(2) == 0)?;
            history.zero(offset, len);
        }
        2 => client.flush()?,
        kind => {
            let (offset, len) = range(rng, sectors, if kind == 3 { 1500 } else { 16 });
            let mut data = vec![0; len as usize];
            rng.fill(&mut data);
            client.write(offset, &data, rng.below(4) == 0)?;
            history.write(offset, &data);
        }
    }
    Ok(())
}

fn range(rng: &mut Rng, sectors: u64, most: u64) -> (u64, u64) {
    let len = 1 + rng.below(most);
    (rng.below(sectors - len) * 512, len * 512)
}

#[test]
fn any_moment_is_opened_while_writing_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let made = inside.make_group("vm 1", &[("root", SIZE)]);
    assert_eq!((made["state"].as_str(), made["lag_ms"].as_u64()), (Some("ingest"), Some(0)), "{made}");
    let export = made["exports"][0]["export_name"].as_str().unwrap().to_owned();
    assert!(export.starts_with("vm-1-root."), "{export}");
    let group = "vm%201";

    // A fresh group is valid at once: an empty disk.
    let empty = inside.view(group, "\"latest\"");
    assert_eq!(empty.lsn, 1);
    assert_same(&empty.volumes[0], &vec![0; SIZE as usize], "the empty disk");
    inside.close_view(&empty);
    let points = inside.get(&format!("groups/{group}/points?buckets=5"));
    assert_eq!(points["gaps"], serde_json::json!([]), "{points}");

    let history = Arc::new(Mutex::new(History::fresh()));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (history, stop, mut client) = (Arc::clone(&history), Arc::clone(&stop), inside.ingest(&export));
        std::thread::spawn(move || {
            let mut rng = Rng::new(7);
            while !stop.load(Ordering::Relaxed) {
                // The lock is held over the request, so that whoever has it knows exactly what is in the journal.
                let mut history = history.lock().unwrap();
                change(&mut client, &mut rng, &mut history).unwrap();
                drop(history);
                std::thread::yield_now();
            }
            client.flush().unwrap();
            let mut image = vec![0; SIZE as usize];
            client.read(0, &mut image).unwrap();
            client.disconnect().unwrap();
            image
        })
    };
    wait_for("some history", || (history.lock().unwrap().changes.len() > 300).then_some(()));

    // A bookmark lies exactly after what was written before it was asked for.
    let (bookmark, at_bookmark) = {
        let mut history = history.lock().unwrap();
        let made = inside.ok("POST", &format!("groups/{group}/bookmarks"), r#"{"name":"before upgrade"}"#);
        history.lsn += 1;
        assert_eq!(made["lsn"].as_u64(), Some(history.lsn), "{made}");
        (made, history.image_at(u64::MAX, SIZE))
    };
    assert_eq!(
        inside.refused("POST", &format!("groups/{group}/bookmarks"), r#"{"name":"before upgrade"}"#),
        "bookmark-exists"
    );
    assert_eq!(
        inside.refused("POST", &format!("groups/{group}/bookmarks"), r#"{"name":"x","consistency":"filesystem"}"#),
        "not-possible"
    );
    wait_for("more history", || (history.lock().unwrap().changes.len() > 900).then_some(()));

    // Views of past LSNs, against the oracle, while the writer goes on.
    let mut rng = Rng::new(9);
    for round in 0..6 {
        let (lsn, want) = {
            let history = history.lock().unwrap();
            let (lsn, _) = history.changes[rng.below(history.changes.len() as u64) as usize];
            (lsn, history.image_at(lsn, SIZE))
        };
        let view = inside.view(group, &format!("{{\"lsn\":{lsn}}}"));
        assert_eq!(view.lsn, lsn);
        assert_same(&view.volumes[0], &want, ("LSN", lsn, "round", round));
        assert!(view.answer["open_ms"].as_f64().unwrap() > 0.0);
        inside.close_view(&view);
    }
    // By bookmark and by time.
    let view = inside.view(group, r#"{"bookmark":"before upgrade"}"#);
    assert_same(&view.volumes[0], &at_bookmark, "the bookmark");
    let by_time = inside.view(group, &format!("{{\"time\":{}}}", bookmark["time_us"]));
    assert!(by_time.lsn >= view.lsn, "{} {}", by_time.lsn, view.lsn);
    assert_same(&by_time.volumes[0], &history.lock().unwrap().image_at(by_time.lsn, SIZE), "by time");

    // Other people's programs read the same.
    other_readers(&view.answer["exports"][0], &at_bookmark, dir.path());

    // Refusals are named.
    assert_eq!(inside.refused("POST", &format!("groups/{group}/views"), r#"{"at":{"lsn":99999999}}"#), "no-such-point");
    assert_eq!(
        inside.refused("POST", &format!("groups/{group}/views"), r#"{"at":{"bookmark":"befor upgrade"}}"#),
        "no-such-bookmark"
    );
    assert_eq!(inside.refused("POST", "groups/none/views", r#"{"at":"latest"}"#), "no-such-group");
    assert_eq!(inside.refused("POST", &format!("groups/{group}/views"), r#"{"at":"soon"}"#), "bad-request");
    assert_eq!(
        inside.refused("POST", "groups", r#"{"name":"vm 1","volumes":[{"name":"r","bytes":512}]}"#),
        "name-taken"
    );
    assert_eq!(inside.refused("POST", "groups", r#"{"name":"x","volumes":[{"name":"r","bytes":513}]}"#), "bad-request");
    assert_eq!(inside.refused("GET", "nothing", ""), "no-such-route");

    stop.store(true, Ordering::Relaxed);
    let read_back = writer.join().unwrap();
    let want = history.lock().unwrap().image_at(u64::MAX, SIZE);
    assert_same(&read_back, &want, "read back through the ingest target");

    // The metrics page is well formed, with a name that needs escapes about.
    let metrics = inside.metrics(&data);
    let samples = supervisor::metrics::check(&metrics).unwrap_or_else(|e| panic!("{e}\n{metrics}"));
    assert!(samples > 60, "{samples} samples\n{metrics}");
    assert!(metrics.contains("holdfast_group_lag_seconds{group=\"vm 1\"} 0\n"), "{metrics}");
    let at = inside.daemon.as_ref().unwrap().metrics.unwrap();
    assert_eq!(http_get(at, "/metrics", None).0, 401);
    assert_eq!(http_get(at, "/metrics", Some("wrong")).0, 401);

    // Verification reads everything and ends with a report.
    let (status, lines) = inside.call("POST", &format!("groups/{group}/verify"), "");
    let report: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((status, report["report"]["clean"].as_bool()), (200, Some(true)), "{report}");
    let records = history.lock().unwrap().lsn;
    assert_eq!(report["report"]["records"].as_u64(), Some(records), "{report}");

    // The view keeps its socket until it is closed; deleting the group closes it.
    let socket = view.answer["exports"][0]["unix_socket"].as_str().unwrap().to_owned();
    assert!(UnixStream::connect(&socket).is_ok());
    assert_eq!(inside.refused("DELETE", &format!("groups/{group}"), ""), "confirm-needed");
    inside.ok("DELETE", &format!("groups/{group}?confirm=vm%201"), "");
    assert!(UnixStream::connect(&socket).is_err());
    assert_eq!(inside.get("views"), serde_json::json!([]));
    assert_eq!(inside.get("groups"), serde_json::json!([]));
    assert_eq!(std::fs::read_dir(data.join("groups")).unwrap().count(), 0, "the group's folder is left");
}

/// qemu-img and nbdcopy read a view, and it is the oracle's image.
fn other_readers(export: &serde_json::Value, want: &[u8], dir: &Path) {
    let uri = export["uri"].as_str().unwrap();
    if have("qemu-img") {
        let out = dir.join("qemu.raw");
        let done =
            Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&out).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_same(&std::fs::read(&out).unwrap(), want, "qemu-img convert");
    }
    if have("nbdcopy") {
        let out = dir.join("nbdcopy.raw");
        let done = Command::new("nbdcopy").arg(uri).arg(&out).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_same(&std::fs::read(&out).unwrap(), want, "nbdcopy");
    }
}

#[test]
fn volumes_of_a_group_keep_the_order_of_their_writes_among_each_other() {
    const BLOCK: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    inside.make_group("db", &[("data", SIZE), ("log", SIZE), ("temp", SIZE)]);
    let mut clients = ["db-data", "db-log", "db-temp"].map(|export| inside.ingest(export));
    let mut images = [vec![0; SIZE as usize], vec![0; SIZE as usize], vec![0; SIZE as usize]];
    let mut rng = Rng::new(21);
    // Each write is answered before the next is sent, on whatever volume: as a database waits for its log.
    let mut moments = Vec::new();
    for lsn in 2..=400u64 {
        let (volume, block) = (rng.below(3) as usize, rng.below(SIZE / BLOCK as u64) as usize * BLOCK);
        let bytes = lsn.to_le_bytes().repeat(BLOCK / 8);
        clients[volume].write(block as u64, &bytes, rng.below(5) == 0).unwrap();
        images[volume][block..block + BLOCK].copy_from_slice(&bytes);
        if rng.below(80) == 0 || lsn == 400 {
            moments.push((lsn, images.clone()));
        }
    }
    clients.iter_mut().for_each(|c| c.flush().unwrap());
    let check = |inside: &Inside| {
        for (lsn, images) in &moments {
            let view = inside.view("db", &format!("{{\"lsn\":{lsn}}}"));
            for (volume, (got, want)) in view.volumes.iter().zip(images).enumerate() {
                assert_same(got, want, ("LSN", lsn, "volume", volume));
            }
            inside.close_view(&view);
        }
    };
    check(&inside);
    drop(clients);
    inside.stop();
    let inside = Inside::start(&data, "");
    wait_for("the group", || (inside.group_state("db")["state"] == "ingest").then_some(()));
    check(&inside);
}

#[test]
fn other_writers_are_journalled() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let made = inside.make_group("copies", &[("a", SIZE), ("b", SIZE)]);
    let mut image = vec![0; SIZE as usize];
    let mut rng = Rng::new(3);
    rng.fill(&mut image[100 << 10..3 << 20]);
    rng.fill(&mut image[5 << 20..(5 << 20) + 513]);
    let source = dir.path().join("source.raw");
    std::fs::write(&source, &image).unwrap();
    let mut before = 0;
    for (program, args, export) in
        [("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw"][..], 0), ("nbdcopy", &[][..], 1)]
    {
        if !have(program) {
            continue;
        }
        let uri = made["exports"][export]["uri"].as_str().unwrap();
        let done = Command::new(program).args(args).arg(&source).arg(uri).output().unwrap();
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        let view = inside.view("copies", "\"latest\"");
        assert_same(&view.volumes[export], &image, program);
        assert!(view.lsn > before);
        before = view.lsn;
    }
    // And the other volume of the group was not touched by the first copy.
    if before > 0 && have("qemu-img") {
        let first = inside.view("copies", "{\"lsn\":1}");
        assert_same(&first.volumes[0], &vec![0; SIZE as usize], "before everything");
    }
}

#[test]
fn over_tls_only_nbd_clients_get_in() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let made = inside.make_group("g", &[("v", SIZE)]);
    assert_eq!(made["exports"][0]["tcp_uri"], format!("nbds://{}/g-v", inside.nbd_listen()));
    assert_eq!(inside.refused("POST", "client-certs", r#"{"name":"a b"}"#), "bad-request");
    let bundle = inside.ok("POST", "client-certs", r#"{"name":"qemu-1"}"#);
    let pem = |name: &str| bundle[name].as_str().unwrap().as_bytes();
    let ca = CertificateDer::from_pem_slice(pem("ca_pem")).unwrap();
    let certificate = CertificateDer::from_pem_slice(pem("certificate_pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pem("key_pem")).unwrap();
    let connect = |config: ClientConfig| {
        let mut tcp = TcpStream::connect(inside.nbd_listen()).unwrap();
        let secured = nbd::client::start_tls(&mut tcp).map_err(|e| e.to_string())?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let tls = ClientConnection::new(Arc::new(config), name).unwrap();
        Client::connect_secured(StreamOwned::new(tls, tcp), secured, "g-v").map_err(|e| e.to_string())
    };
    let mut client = connect(nbd_tls(&ca, Some((certificate, key)))).unwrap();
    client.write(4096, &[7; 4096], true).unwrap();
    let mut read = [0; 8192];
    client.read(0, &mut read).unwrap();
    assert_eq!((read[4095], read[4096]), (0, 7));
    // Without a certificate, with that of a host, without TLS: nothing.
    let before = inside.events(Event::HandshakeFailed);
    assert!(connect(nbd_tls(&ca, None)).is_err());
    let host = Host::protect(&inside, "h", vec![0; 4096]);
    assert!(connect(host.identity().as_nbd_client()).is_err());
    wait_for("both to be noted", || (inside.events(Event::HandshakeFailed) >= before + 2).then_some(()));
    let plain = Client::connect(TcpStream::connect(inside.nbd_listen()).unwrap(), "g-v");
    assert!(plain.is_err());
    // A view is reached over TLS only when that was asked for.
    let view = inside.ok("POST", "groups/g/views", r#"{"at":"latest","tcp":true}"#);
    let uri = view["exports"][0]["tcp_uri"].as_str().unwrap();
    assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
    let hidden = inside.ok("POST", "groups/g/views", r#"{"at":"latest"}"#);
    assert!(hidden["exports"][0]["tcp_uri"].is_null());
    if have("qemu-img") {
        let creds = dir.path().join("creds");
        std::fs::create_dir(&creds).unwrap();
        for (file, name) in
            [("ca-cert.pem", "ca_pem"), ("client-cert.pem", "certificate_pem"), ("client-key.pem", "key_pem")]
        {
            std::fs::write(creds.join(file), pem(name)).unwrap();
        }
        let at = inside.nbd_listen();
        let done = Command::new("qemu-img")
            .args(["info", "--object"])
            .arg(format!("tls-creds-x509,id=t,endpoint=client,dir={}", creds.display()))
            .arg("--image-opts")
            .arg(format!("driver=nbd,host={},port={},export=g-v,tls-creds=t", at.ip(), at.port()))
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(String::from_utf8_lossy(&done.stdout).contains("8 MiB"), "{done:?}");
    }
}

#[test]
fn several_connections_write_one_history() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    inside.make_group("g", &[("v", SIZE)]);
    let writers: Vec<_> = (0..4u64)
        .map(|n| {
            let mut client = inside.ingest("g-v");
            std::thread::spawn(move || {
                let part = SIZE / 4;
                let mut mine = vec![0; part as usize];
                let mut rng = Rng::new(n + 1);
                let mut data = vec![0; 4096];
                for _ in 0..200 {
                    let at = rng.below(part / 4096) * 4096;
                    rng.fill(&mut data);
                    client.write(n * part + at, &data, rng.below(3) == 0).unwrap();
                    mine[at as usize..][..4096].copy_from_slice(&data);
                }
                client.flush().unwrap();
                mine
            })
        })
        .collect();
    let want: Vec<u8> = writers.into_iter().flat_map(|w| w.join().unwrap()).collect();
    let view = inside.view("g", "\"latest\"");
    assert_same(&view.volumes[0], &want, "four writers");
    assert_eq!(view.lsn, 1 + 4 * 200);
}

#[test]
fn a_restart_in_good_order_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut history = History::fresh();
    let mut rng = Rng::new(11);
    for round in 0..3 {
        let inside = Inside::start(&data, "");
        if round == 0 {
            inside.make_group("g", &[("v", SIZE)]);
        }
        let mut client = inside.ingest("g-v");
        for _ in 0..200 {
            change(&mut client, &mut rng, &mut history).unwrap();
        }
        // Not flushed: a stop in good order makes it durable all the same.
        client.disconnect().unwrap();
        inside.stop();
    }
    let inside = Inside::start(&data, "");
    wait_for("the group", || (inside.group_state("g")["state"] == "ingest").then_some(()));
    let view = inside.view("g", "\"latest\"");
    assert_eq!(view.lsn, history.lsn);
    assert_same(&view.volumes[0], &history.image_at(u64::MAX, SIZE), "after three restarts");
    let (lsn, _) = history.changes[history.changes.len() / 3];
    let view = inside.view("g", &format!("{{\"lsn\":{lsn}}}"));
    assert_same(&view.volumes[0], &history.image_at(lsn, SIZE), ("LSN", lsn));
}

#[test]
fn two_daemons_cannot_share_a_folder_and_strays_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let refused = Inside::try_start(&data, "").err().expect("a second daemon on the same folder");
    assert!(refused.contains("another holdfastd"), "{refused}");
    inside.stop();
    let stray = data.join("groups").join("00112233445566778899aabbccddeeff");
    std::fs::create_dir(&stray).unwrap();
    std::fs::write(stray.join("precious"), "x").unwrap();
    let inside = Inside::start(&data, "");
    assert_eq!(inside.events(Event::Stray), 1);
    assert!(stray.join("precious").exists());
}

#[test]
fn policies_are_checked_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let made = inside.make_group("g", &[("v", SIZE)]);
    let mut policy = made["policy"].clone();
    policy["window_hours"] = 5.into();
    policy["window_hours_floor"] = 9.into();
    assert_eq!(inside.refused("PATCH", "groups/g/policy", &policy.to_string()), "bad-request");
    policy["window_hours_floor"] = 1.into();
    let changed = inside.ok("PATCH", "groups/g/policy", &policy.to_string());
    assert_eq!(changed["policy"], policy);
    policy["unheard"] = 1.into();
    assert_eq!(inside.refused("PATCH", "groups/g/policy", &policy.to_string()), "bad-request");
    inside.stop();
    let inside = Inside::start(&data, "");
    wait_for("the group", || (inside.group_state("g")["state"] == "ingest").then_some(()));
    assert_eq!(inside.group_state("g")["policy"]["window_hours"], 5);
}
