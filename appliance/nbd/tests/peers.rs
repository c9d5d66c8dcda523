//! Other people's clients against our server and other people's servers against our client, over unix sockets.
//! What is not installed is skipped and says so.

mod support;

use nbd::{
    Access, Allocation,
    blocking::{Export, MemoryExport, serve},
    client::{Client, ConnectError, Operation, Violation},
};
use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use support::Rng;

fn installed(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Serves an export to every connection, until the process ends.
fn listen(dir: &Path, export: Arc<MemoryExport>) -> PathBuf {
    let path = dir.join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, export) = (stream.unwrap(), export.clone());
            // A peer that leaves without a goodbye is not our failure; what it got is checked by the test.
            std::thread::spawn(move || serve(&mut stream, &[("disk", &*export as &dyn Export)]).map(drop).ok());
        }
    });
    path
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command:?}: {} {text} {}", out.status, String::from_utf8_lossy(&out.stderr));
    text
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///disk?socket={}", socket.display())
}

/// Random data with a hole of a third in the middle.
fn sample(len: usize) -> Vec<u8> {
    let mut bytes = Rng::new(11).bytes(len);
    bytes[len / 3 / 4096 * 4096..len * 2 / 3 / 4096 * 4096].fill(0);
    bytes
}

#[test]
fn nbdinfo_reads_size_flags_list_and_map() {
    if !installed("nbdinfo") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = listen(dir.path(), Arc::new(MemoryExport::new(sample(3 << 20), Access::ReadOnly)));
    let info = run(Command::new("nbdinfo").arg(uri(&socket)));
    for want in [
        "newstyle-fixed",
        "structured packets",
        "export-size: 3145728",
        "base:allocation",
        "is_read_only: true",
        "can_multi_conn: true",
        "can_df: true",
    ] {
        assert!(info.contains(want), "{want:?} is missing in {info}");
    }
    assert!(info.contains("block_size_preferred: 4096") && info.contains("block_size_maximum: 33554432"), "{info}");
    let all = run(Command::new("nbdinfo").arg("--list").arg(format!("nbd+unix://?socket={}", socket.display())));
    assert!(all.contains("export=\"disk\""), "{all}");
    let map = run(Command::new("nbdinfo").arg("--map").arg(uri(&socket)));
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(lines, [["0", "1048576", "0"], ["1048576", "1048576", "3"], ["2097152", "1048576", "0"]], "{map}");
}

#[test]
fn nbdcopy_copies_out_and_in() {
    if !installed("nbdcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample(6 << 20);
    let socket = listen(dir.path(), Arc::new(MemoryExport::new(bytes.clone(), Access::ReadOnly)));
    let file = dir.path().join("out.img");
    run(Command::new("nbdcopy").arg(uri(&socket)).arg(&file));
    assert!(std::fs::read(&file).unwrap() == bytes, "nbdcopy read something else");

    let dir = tempfile::tempdir().unwrap();
    let target = Arc::new(MemoryExport::new(vec![0xee; bytes.len()], Access::ReadWrite));
    let socket = listen(dir.path(), target.clone());
    run(Command::new("nbdcopy").arg("--flush").arg(&file).arg(uri(&socket)));
    assert!(target.contents() == bytes, "nbdcopy wrote something else");
}

#[test]
fn qemu_img_converts_out_and_in() {
    if !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample(6 << 20);
    let socket = listen(dir.path(), Arc::new(MemoryExport::new(bytes.clone(), Access::ReadOnly)));
    let (qcow, raw) = (dir.path().join("out.qcow2"), dir.path().join("out.raw"));
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(uri(&socket)).arg(&qcow));
    run(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&qcow).arg(&raw));
    assert!(std::fs::read(&raw).unwrap() == bytes, "qemu-img read something else");

    let dir = tempfile::tempdir().unwrap();
    let target = Arc::new(MemoryExport::new(vec![0xee; bytes.len()], Access::ReadWrite));
    let socket = listen(dir.path(), target.clone());
    run(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&raw).arg(uri(&socket)));
    assert!(target.contents() == bytes, "qemu-img wrote something else");
}

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn nbdkit(socket: &Path, args: &[&str]) -> Server {
    let child = Command::new("nbdkit").arg("-f").arg("--exit-with-parent").arg("-U").arg(socket).args(args).spawn();
    let server = Server(child.unwrap());
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "nbdkit did not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    server
}

#[test]
fn our_client_works_with_nbdkit() {
    if !installed("nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kit.sock");
    let _server = nbdkit(&socket, &["memory", "size=8M"]);
    let mut client = Client::connect(UnixStream::connect(&socket).unwrap(), "").unwrap();
    assert_eq!(client.size().0, 8 << 20);
    assert!(client.export().structured && client.export().block_status);
    let data = Rng::new(3).bytes(1 << 20);
    client.write(1 << 20, &data, true).unwrap();
    client.zero((1 << 20) + 65_536, 65_536, false).unwrap();
    client.trim(1 << 20, 32_768).unwrap();
    client.flush().unwrap();
    let mut want = data;
    want[..32_768].fill(0);
    want[65_536..131_072].fill(0);
    for i in 0..16u64 {
        client.submit(Operation::Read { offset: (1 << 20) + i * 65_536, len: 65_536 }).unwrap();
    }
    let mut back = std::collections::BTreeMap::new();
    while let Some(done) = client.complete().unwrap() {
        let nbd::client::Answer::Data(data) = done.result.unwrap() else { panic!("no data") };
        back.insert(done.cookie, data);
    }
    assert!(back.into_values().collect::<Vec<_>>().concat() == want);
    let runs = client.allocation(0, 8 << 20).unwrap();
    assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), 8 << 20);
    assert_eq!((runs[0].allocation, runs[0].len >= 1 << 20), (Allocation::Zero, true), "{runs:?}");
    assert!(runs.iter().any(|run| run.allocation == Allocation::Data), "{runs:?}");
    let beyond = client.read(8 << 20, &mut [0; 1]).unwrap_err();
    assert!(!beyond.is_fatal(), "{beyond}");
    client.disconnect().unwrap();
}

#[test]
fn our_client_tells_older_protocols_apart() {
    if !installed("nbdkit") {
        return;
    }
    let connect = |args: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("kit.sock");
        let _server = nbdkit(&socket, args);
        Client::connect(UnixStream::connect(&socket).unwrap(), "").map(|mut client| {
            let mut buf = [1; 4096];
            client.read(0, &mut buf).unwrap();
            assert_eq!(buf, [0; 4096]);
            (client.export().structured, client.disconnect().is_ok())
        })
    };
    let old = connect(&["-o", "memory", "1M"]);
    assert!(matches!(old, Err(ConnectError::Protocol(Violation::Oldstyle))), "{old:?}");
    let not_fixed = connect(&["--mask-handshake=0", "memory", "1M"]);
    assert!(matches!(not_fixed, Err(ConnectError::Protocol(Violation::NotFixedNewstyle))), "{not_fixed:?}");
    assert_eq!(connect(&["--no-sr", "memory", "1M"]).unwrap(), (false, true));
    assert_eq!(connect(&["--mask-handshake=1", "memory", "1M"]).unwrap(), (true, true), "with the zeroes");
    let failing = connect(&["--filter=error", "memory", "1M"]);
    assert_eq!(failing.unwrap(), (true, true));
}
