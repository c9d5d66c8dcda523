//! QEMU's machine protocol: JSON lines over a unix socket. Small and blocking: one thread drives one machine.
//!
//! **Limits.** A line of [`LINE_MAX`] bytes, [`EVENTS_MAX`] events not yet asked for. QEMU is ours, but the guest in it is not: what it can
//! make QEMU say is bounded all the same.

use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

const ANSWER_MAX: Duration = Duration::from_secs(30);
const LINE_MAX: u64 = 1 << 20;
const EVENTS_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("the machine's control socket cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the machine's control socket broke")]
    Io(#[from] io::Error),
    #[error("the machine has ended")]
    Ended,
    #[error("no answer to {command} within {seconds} s")]
    NoAnswer { command: String, seconds: u64 },
    #[error("the machine refused {command}: {text}")]
    Refused { command: String, text: String },
    #[error("what came from the machine is no QMP")]
    Garbage,
}

/// A session with a running machine.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// A line of which only a part has come.
    partial: Vec<u8>,
}

impl Qmp {
    pub fn connect(socket: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(socket).map_err(QmpError::Connect)?;
        let mut this = Self { reader: BufReader::new(stream), events: VecDeque::new(), partial: Vec::new() };
        let greeting = this.line(Instant::now() + ANSWER_MAX)?.ok_or(QmpError::Garbage)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Garbage);
        }
        this.execute("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().set_write_timeout(Some(ANSWER_MAX))?;
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER_MAX;
        loop {
            let Some(line) = self.line(deadline)? else {
                return Err(QmpError::NoAnswer { command: command.to_owned(), seconds: ANSWER_MAX.as_secs() });
            };
            if let Some(value) = line.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = line.get("error") {
                let text = error["desc"].as_str().unwrap_or("it does not say why").to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), text });
            }
            self.keep(line);
        }
    }

    /// The next event of this name, if one has come or comes before the deadline.
    pub fn event(&mut self, name: &str, deadline: Instant) -> Result<Option<Value>, QmpError> {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let Some(line) = self.line(deadline)? else { return Ok(None) };
            self.keep(line);
        }
    }

    /// `running`, `paused`, `shutdown`, `io-error`, …
    pub fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.execute("query-status", json!({}))?;
        answer["status"].as_str().map(str::to_owned).ok_or(QmpError::Garbage)
    }

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(line);
        }
    }

    /// None: the deadline has come.
    fn line(&mut self, deadline: Instant) -> Result<Option<Value>, QmpError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.reader.get_ref().set_read_timeout(Some(left))?;
            // A time-out may come in the middle of a line; what was read stays for the next call.
            let room = LINE_MAX.saturating_sub(self.partial.len() as u64);
            match (&mut self.reader).take(room).read_until(b'\n', &mut self.partial) {
                Ok(0) if room == 0 => return Err(QmpError::Garbage),
                Ok(0) => return Err(QmpError::Ended),
                Ok(_) if self.partial.last() == Some(&b'\n') => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line).map(Some).map_err(|_| QmpError::Garbage);
                }
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if Instant::now() >= deadline {
                        return Ok(None);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(QmpError::Ended),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixListener, thread};

    /// A machine that says these lines, each after one line was read (the greeting before any).
    fn machine(says: Vec<&'static str>) -> (tempfile::TempDir, thread::JoinHandle<()>) {
        let dir = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(dir.path().join("qmp")).expect("binds");
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let mut reader = BufReader::new(stream.try_clone().expect("a handle"));
            let mut out = stream;
            for (i, line) in says.into_iter().enumerate() {
                let mut said = String::new();
                if i > 0 && reader.read_line(&mut said).unwrap_or(0) == 0 {
                    return;
                }
                if out.write_all(line.as_bytes()).is_err() {
                    return;
                }
            }
        });
        (dir, thread)
    }

    const HELLO: &str = "{\"QMP\":{\"version\":{}}}\n";
    const OK: &str = "{\"return\":{}}\n";

    #[test]
    fn answers_and_events_are_told_apart() {
        let events =
            "{\"event\":\"RESUME\"}\n{\"event\":\"STOP\",\"data\":{\"n\":1}}\n{\"return\":{\"status\":\"running\"}}\n";
        let (dir, thread) = machine(vec![HELLO, OK, events]);
        let mut qmp = Qmp::connect(&dir.path().join("qmp")).expect("connects");
        assert_eq!(qmp.status().expect("a status"), "running");
        let soon = Instant::now() + Duration::from_secs(5);
        assert_eq!(qmp.event("STOP", soon).expect("whole").expect("it came")["data"]["n"], 1);
        assert!(qmp.event("RESUME", soon).expect("whole").is_some());
        thread.join().expect("the machine");
        assert!(matches!(qmp.event("RESUME", soon), Err(QmpError::Ended)));
    }

    #[test]
    fn refusals_garbage_and_ends_are_told() {
        let (dir, _thread) = machine(vec![HELLO, OK, "{\"error\":{\"class\":\"x\",\"desc\":\"no such thing\"}}\n"]);
        let mut qmp = Qmp::connect(&dir.path().join("qmp")).expect("connects");
        let refused = qmp.execute("cont", json!({})).expect_err("refused");
        assert!(refused.to_string().contains("no such thing"), "{refused}");
        let (dir, _thread) = machine(vec!["hello\n"]);
        assert!(matches!(Qmp::connect(&dir.path().join("qmp")), Err(QmpError::Garbage)));
        let (dir, _thread) = machine(vec![""]);
        assert!(matches!(Qmp::connect(&dir.path().join("qmp")), Err(QmpError::Ended)));
        assert!(matches!(Qmp::connect(&dir.path().join("other")), Err(QmpError::Connect(_))));
    }
}
