//! The agent inside a machine, over virtio-serial: one JSON line out, one JSON line back.
//!
//! The box asks; the agent answers and never begins. Requests carry a number, and answers repeat it: what an earlier daemon asked and did
//! not wait for is passed over.
//!
//! | `do` | with | answer |
//! |---|---|---|
//! | `hello` | | `{"version", "host_name", "system": "running" \| "degraded" \| "starting" \| …}` |
//! | `volumes` | | `[{"mount", "source", "fs", "read_only", "total_bytes", "free_bytes", "fault"?}]` |
//! | `network` | `mac`, `addresses`, `gateway` | `{"interface"}` |
//! | `run` | `command`, `seconds_max` | `{"code", "output"}` |
//!
//! Every answer is `{"id": n, "ok": …}` or `{"id": n, "error": "text"}`.
//!
//! **Limits.** The guest is not trusted: a line of [`LINE_MAX`] bytes at most, and every wait has its end.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// One answer: the output of a command is the longest.
const LINE_MAX: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error("the machine's port cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the machine's port broke")]
    Io(#[from] io::Error),
    #[error("nothing inside the machine has answered within {seconds} s")]
    Silent { seconds: u64 },
    #[error("inside the machine: {0}")]
    Refused(String),
    #[error("what came from inside the machine is no answer")]
    Garbage,
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Hello {
    pub version: String,
    pub host_name: String,
    /// As `systemctl is-system-running` says.
    pub system: String,
}

/// A file system that is mounted inside.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, serde::Serialize)]
pub struct Mounted {
    pub mount: String,
    pub source: String,
    pub fs: String,
    pub read_only: bool,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// What is wrong with it, if anything is.
    #[serde(default)]
    pub fault: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Ran {
    /// None: it was ended for taking too long, or by a signal.
    pub code: Option<i32>,
    pub output: String,
}

/// A conversation with the agent inside.
#[derive(Debug)]
pub struct Port {
    stream: UnixStream,
    read: Vec<u8>,
    next: u64,
}

impl Port {
    pub fn connect(socket: &Path) -> Result<Self, PortError> {
        let stream = UnixStream::connect(socket).map_err(PortError::Connect)?;
        // Numbers that an earlier daemon has not used.
        let next = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |since| since.as_micros() as u64);
        Ok(Self { stream, read: Vec::new(), next })
    }

    pub fn hello(&mut self, limit: Duration) -> Result<Hello, PortError> {
        self.ask(json!({ "do": "hello" }), limit)
    }
    pub fn volumes(&mut self, limit: Duration) -> Result<Vec<Mounted>, PortError> {
        self.ask(json!({ "do": "volumes" }), limit)
    }
    pub fn network(&mut self, network: &crate::plan::Network, limit: Duration) -> Result<Value, PortError> {
        let addresses: Vec<String> = network.addresses.iter().map(ToString::to_string).collect();
        let wish = json!({ "do": "network", "mac": network.mac, "addresses": addresses, "gateway": network.gateway });
        self.ask(wish, limit)
    }
    pub fn run(&mut self, command: &str, seconds_max: u64) -> Result<Ran, PortError> {
        let wish = json!({ "do": "run", "command": command, "seconds_max": seconds_max });
        // The agent ends the command; the answer needs a moment more.
        self.ask(wish, Duration::from_secs(seconds_max + 10))
    }

    fn ask<T: DeserializeOwned>(&mut self, mut wish: Value, limit: Duration) -> Result<T, PortError> {
        let id = self.next;
        self.next += 1;
        wish["id"] = json!(id);
        self.stream.set_write_timeout(Some(limit))?;
        self.stream.write_all(format!("{wish}\n").as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            let Some(line) = self.line(deadline)? else { return Err(PortError::Silent { seconds: limit.as_secs() }) };
            // A guest that starts may leave half a line of an earlier life behind.
            let Ok(mut answer) = serde_json::from_slice::<Value>(&line) else { continue };
            if answer["id"].as_u64() != Some(id) {
                continue;
            }
            if let Some(text) = answer["error"].as_str() {
                return Err(PortError::Refused(text.chars().take(1000).collect()));
            }
            return serde_json::from_value(answer["ok"].take()).map_err(|_| PortError::Garbage);
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>, PortError> {
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let rest = self.read.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.read, rest);
                line.pop();
                return Ok(Some(line));
            }
            if self.read.len() > LINE_MAX {
                return Err(PortError::Garbage);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buf = [0; 16 << 10];
            match self.stream.read(&mut buf) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => self.read.extend_from_slice(&buf[..n]),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixListener, thread};

    fn guest(answer: impl Fn(&Value) -> String + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("port");
        let listener = UnixListener::bind(&path).expect("binds");
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a box");
            let mut out = stream.try_clone().expect("a handle");
            for line in io::BufRead::lines(io::BufReader::new(stream)) {
                let Ok(line) = line else { return };
                let asked: Value = serde_json::from_str(&line).expect("a request");
                if out.write_all(answer(&asked).as_bytes()).is_err() {
                    return;
                }
            }
        });
        (dir, path)
    }

    #[test]
    fn an_answer_is_that_of_its_question() {
        let (_dir, path) = guest(|asked| {
            let ok = json!({ "id": asked["id"], "ok": { "code": 3, "output": asked["command"] } });
            format!("half a li\n{{\"id\":1,\"ok\":{{\"code\":0,\"output\":\"old\"}}}}\n{ok}\n")
        });
        let mut port = Port::connect(&path).expect("connects");
        for command in ["a", "b"] {
            assert_eq!(port.run(command, 5).expect("ran"), Ran { code: Some(3), output: command.into() });
        }
    }

    #[test]
    fn silence_refusals_and_floods_end() {
        let (_dir, path) = guest(|_| String::new());
        let mut port = Port::connect(&path).expect("connects");
        assert!(matches!(port.hello(Duration::from_millis(30)), Err(PortError::Silent { .. })));
        let (_dir, path) = guest(|asked| format!("{}\n", json!({ "id": asked["id"], "error": "no such program" })));
        let mut port = Port::connect(&path).expect("connects");
        let refused = port.run("x", 5).expect_err("refused");
        assert!(refused.to_string().contains("no such program"), "{refused}");
        let (_dir, path) = guest(|_| "x".repeat(LINE_MAX * 2));
        let mut port = Port::connect(&path).expect("connects");
        assert!(matches!(port.hello(Duration::from_secs(10)), Err(PortError::Garbage)));
        let (_dir, path) = guest(|asked| format!("{}\n", json!({ "id": asked["id"], "ok": 7 })));
        let mut port = Port::connect(&path).expect("connects");
        assert!(matches!(port.hello(Duration::from_secs(10)), Err(PortError::Garbage)));
    }
}
