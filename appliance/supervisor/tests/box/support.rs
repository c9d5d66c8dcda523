//! Boxes to test: in this process or as a process of its own, a small HTTP client, an oracle disk.

use nbd::client::Client;
use serde_json::Value;
use std::{
    fmt::Debug,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use supervisor::{
    Daemon,
    config::{CommandLine, Config},
};

/// Nothing here takes so long; what does is stuck.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Small segments, so that a test sees many; everything on loopback with ports of the system's choice.
pub const CONFIG: &str = r#"
listen = "127.0.0.1:0"
nbd_listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
web.listen = "none"
heartbeat_timeout_ms = 2000
[log]
level = "warn"
[journal]
segment_mib = 4
prepared_ahead = 1
"#;

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Whatever speaks the control API.
pub trait Control {
    fn socket(&self) -> PathBuf;

    /// Sends a request; status and answer.
    fn call(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.socket()).expect("the control socket is there");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = format!(
            "{method} /api/v1/{path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        split_answer(&answer)
    }
    fn json(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, text) = self.call(method, path, body);
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{method} {path}: {e}: {text}")))
    }
    /// A request that must succeed.
    fn ok(&self, method: &str, path: &str, body: &str) -> Value {
        let (status, value) = self.json(method, path, body);
        assert!((200..300).contains(&status), "{method} {path} {body}: {status} {value}");
        value
    }
    fn get(&self, path: &str) -> Value {
        self.ok("GET", path, "")
    }
    /// A request that must be refused; its code.
    fn refused(&self, method: &str, path: &str, body: &str) -> String {
        let (status, value) = self.json(method, path, body);
        assert!(status >= 400, "{method} {path} {body} was not refused: {value}");
        let error = &value["error"];
        assert!(
            !error["message"].as_str().unwrap().is_empty() && !error["remedy"].as_str().unwrap().is_empty(),
            "{value}"
        );
        error["code"].as_str().unwrap().to_owned()
    }

    fn make_group(&self, name: &str, volumes: &[(&str, u64)]) -> Value {
        let volumes: Vec<Value> = volumes.iter().map(|(n, b)| serde_json::json!({ "name": n, "bytes": b })).collect();
        self.ok("POST", "groups", &serde_json::json!({ "name": name, "volumes": volumes }).to_string())
    }
    /// An NBD client of an ingest target.
    fn ingest(&self, export: &str) -> Client<UnixStream> {
        let socket = self.nbd_socket(export);
        wait_for("the ingest target", || {
            UnixStream::connect(&socket).ok().and_then(|s| Client::connect(s, export).ok())
        })
    }
    fn nbd_socket(&self, export: &str) -> PathBuf {
        self.socket().with_file_name("nbd").join(format!("{export}.sock"))
    }
    /// Opens a view; its id, LSN and the contents of each volume.
    fn view(&self, group: &str, at: &str) -> View {
        let value = self.ok("POST", &format!("groups/{group}/views"), &format!("{{\"at\":{at}}}"));
        let read = |e: &Value| {
            let socket = e["unix_socket"].as_str().unwrap();
            let stream = UnixStream::connect(socket).unwrap_or_else(|x| panic!("{socket}: {x}"));
            let mut client = Client::connect(stream, e["export_name"].as_str().unwrap()).unwrap();
            let mut data = vec![0; usize::try_from(client.size().0).unwrap()];
            client.read(0, &mut data).unwrap();
            client.disconnect().unwrap();
            data
        };
        let volumes = value["exports"].as_array().unwrap().iter().map(read).collect();
        View {
            id: value["id"].as_str().unwrap().to_owned(),
            lsn: value["lsn"].as_u64().unwrap(),
            volumes,
            answer: value,
        }
    }
    fn close_view(&self, view: &View) {
        self.ok("DELETE", &format!("views/{}", view.id), "");
    }
    fn group_state(&self, group: &str) -> Value {
        self.get(&format!("groups/{group}"))
    }
}

pub struct View {
    pub id: String,
    pub lsn: u64,
    pub volumes: Vec<Vec<u8>>,
    pub answer: Value,
}

fn split_answer(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status: {head}"));
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (status, body.to_owned());
    }
    let (mut out, mut rest) = (String::new(), body);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        if size == 0 {
            break;
        }
        out.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    (status, out)
}

/// Asks until there is an answer.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A box in this process.
pub struct Inside {
    pub daemon: Option<Daemon>,
    control: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Inside {
    pub fn start(data: &Path, more: &str) -> Self {
        Self::try_start(data, more).unwrap_or_else(|e| panic!("{e}"))
    }
    pub fn try_start(data: &Path, more: &str) -> Result<Self, String> {
        let config = data.with_extension("toml");
        // A test may have its own idea of when somebody is silent.
        let common = if more.contains("heartbeat_timeout_ms") {
            CONFIG.replace("heartbeat_timeout_ms = 2000\n", "")
        } else {
            CONFIG.to_owned()
        };
        let common = if more.contains("web.listen") { common.replace("web.listen = \"none\"\n", "") } else { common };
        std::fs::write(&config, format!("{more}\n{common}")).unwrap();
        let line = CommandLine { config: Some(config), data: Some(data.to_owned()), ..CommandLine::default() };
        let config = Config::load(&line).map_err(|e| e.report())?;
        let _ = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).try_init();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let daemon = runtime.block_on(Daemon::start(config)).map_err(|e| supervisor::chain(&e))?;
        Ok(Self { control: daemon.control.clone(), daemon: Some(daemon), runtime })
    }
    pub fn listen(&self) -> SocketAddr {
        self.daemon.as_ref().unwrap().listen()
    }
    pub fn nbd_listen(&self) -> SocketAddr {
        self.daemon.as_ref().unwrap().nbd_listen().unwrap()
    }
    pub fn events(&self, event: supervisor::Event) -> u64 {
        self.daemon.as_ref().unwrap().app.event_count(event)
    }
    pub fn metrics(&self, data: &Path) -> String {
        let token = std::fs::read_to_string(data.join("metrics.token")).unwrap();
        let at = self.daemon.as_ref().unwrap().metrics.unwrap();
        let (status, body) = http_get(at, "/metrics", Some(token.trim()));
        assert_eq!(status, 200);
        body
    }
    pub fn stop(mut self) {
        if let Some(daemon) = self.daemon.take() {
            self.runtime.block_on(daemon.stop());
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            self.runtime.block_on(daemon.stop());
        }
    }
}

impl Control for Inside {
    fn socket(&self) -> PathBuf {
        self.control.clone()
    }
}

pub fn http_get(at: SocketAddr, path: &str, token: Option<&str>) -> (u16, String) {
    let mut stream = std::net::TcpStream::connect(at).unwrap();
    let bearer = token.map(|t| format!("authorization: Bearer {t}\r\n")).unwrap_or_default();
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{bearer}\r\n").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    split_answer(&answer)
}

/// A box as a process that can be killed.
pub struct Outside {
    child: Child,
    control: PathBuf,
    listen: SocketAddr,
}

impl Outside {
    fn spawn(data: &Path, stdout: Stdio) -> Child {
        let config = data.with_extension("toml");
        std::fs::write(&config, CONFIG).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfastd"));
        command.arg("--config").arg(&config).arg("--data").arg(data).stdout(stdout).spawn().unwrap()
    }

    pub fn start(data: &Path) -> Self {
        let mut child = Self::spawn(data, Stdio::piped());
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("READY listen=127.0.0.1:"), "{line:?}");
        let control = line.split_whitespace().find_map(|w| w.strip_prefix("control=")).unwrap().into();
        let listen = line.split_whitespace().find_map(|w| w.strip_prefix("listen=")).unwrap().parse().unwrap();
        Self { child, control, listen }
    }
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }
    /// A start that is killed after a while, wherever it has come to by then.
    pub fn kill_on_the_way_up(data: &Path, after: Duration) {
        let mut child = Self::spawn(data, Stdio::null());
        std::thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap()
    }
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Control for Outside {
    fn socket(&self) -> PathBuf {
        self.control.clone()
    }
}

/// Compares two images and says where they first differ.
pub fn assert_same(got: &[u8], want: &[u8], context: impl Debug) {
    assert_eq!(got.len(), want.len(), "{context:?}: the lengths differ");
    if let Some(at) = (0..got.len()).find(|i| got[*i] != want[*i]) {
        panic!("{context:?}: byte {at} (sector {}) is {:#x} and should be {:#x}", at / 512, got[at], want[at]);
    }
}

/// Whether a program is there; says so when not.
pub fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("SKIPPED: {program} is not installed");
    }
    found
}
