//! QEMU's machine protocol: JSON lines over a unix socket.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// For the answer to a command; long work is told by events.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Events kept for a later [`Qmp::event`]; the oldest go first.
const EVENTS_MAX: usize = 256;

/// A session with a running QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// A line of which only a part has come.
    partial: String,
}

impl Qmp {
    /// Over a connection just made: QEMU greets first.
    pub fn over(stream: UnixStream) -> Result<Self> {
        let mut this = Self { reader: BufReader::new(stream), events: VecDeque::new(), partial: String::new() };
        let greeting = this.line(ANSWER_MAX)?;
        if greeting.get("QMP").is_none() {
            bail!("no QMP greeting: {greeting}");
        }
        this.execute("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let line = self.line(ANSWER_MAX).with_context(|| format!("answer to {command}"))?;
            if let Some(value) = line.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = line.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
            self.keep(line);
        }
    }

    /// Waits for an event that `wanted` accepts; earlier ones that came meanwhile count.
    pub fn event(&mut self, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(&wanted) {
                return self.events.remove(at).context("an event that was just found");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what}: no such event within {} s", limit.as_secs());
            }
            let line = self.line(left).with_context(|| format!("while waiting for {what}"))?;
            self.keep(line);
        }
    }

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(line);
        }
    }

    fn line(&mut self, limit: Duration) -> Result<Value> {
        self.reader.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        // A time-out may come in mid-line; what was read stays for the next call.
        let got = self.reader.read_line(&mut self.partial).context("read from QEMU")?;
        if got == 0 {
            bail!("QEMU has closed its control socket");
        }
        let line = std::mem::take(&mut self.partial);
        serde_json::from_str(&line).with_context(|| format!("QEMU sent {line:?}"))
    }
}
