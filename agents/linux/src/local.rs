//! The control socket of a running agent: one JSON object per line, asked and answered.
//!
//! `<state_dir>/agent.sock`, mode 0600. A request is at most [`LINE_MAX`] bytes; at most [`CLIENTS_MAX`] clients at once.

use model::{Consistency, SyncMode};
use serde::{Deserialize, Serialize};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

pub const LINE_MAX: u64 = 64 << 10;
pub const CLIENTS_MAX: usize = 16;
/// A bookmark waits for the box; longer than this and the client is told to look at the status.
const ANSWER_MAX: Duration = Duration::from_secs(120);

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Status,
    Protect {
        devices: Vec<String>,
        group: Option<String>,
        /// The whole disks under the choice, boot sectors and all.
        whole_image: bool,
        /// Other than async: the volumes are mirrored and the host waits.
        #[serde(default = "async_mode")]
        mode: SyncMode,
    },
    Unprotect {
        group: String,
    },
    Bookmark {
        /// None: the only group.
        group: Option<String>,
        name: String,
        consistency: Consistency,
    },
    Resync {
        group: String,
    },
}

fn async_mode() -> SyncMode {
    SyncMode::Async
}

/// What went wrong, for programs, for people, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}{remedy}", if remedy.is_empty() { "" } else { "; " })]
pub struct Failure {
    pub code: String,
    pub message: String,
    pub remedy: String,
}

impl Failure {
    /// Nothing was asked of the box yet: the same can be asked again.
    pub const NO_BOX: &str = "no-box";

    pub fn new(code: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), remedy: remedy.into() }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    Ok(serde_json::Value),
    Error(Failure),
}

pub type Answer = mpsc::Sender<Reply>;

/// Listens; each request goes to `handle` with where its answer is to go.
pub fn serve(path: &Path, handle: impl Fn(Request, Answer) -> bool + Send + Sync + 'static) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Its directory is 0700, so nobody gets in between these two.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let handle = Arc::new(handle);
    let clients = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("local".to_owned()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, most likely; it passes.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
                clients.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let (handle, mine) = (handle.clone(), clients.clone());
            let spawned = thread::Builder::new().name("local-client".to_owned()).spawn(move || {
                if let Err(e) = client(&stream, handle.as_ref()) {
                    tracing::debug!(error = %e, "a client of the control socket went away");
                }
                mine.fetch_sub(1, Ordering::AcqRel);
            });
            if spawned.is_err() {
                clients.fetch_sub(1, Ordering::AcqRel);
            }
        }
    })?;
    Ok(())
}

fn client(stream: &UnixStream, handle: &dyn Fn(Request, Answer) -> bool) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(300)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        if reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let reply = match serde_json::from_slice::<Request>(&line) {
            Err(e) => Reply::Error(Failure::new("bad-request", format!("the request is not understood: {e}"), "")),
            Ok(request) => {
                let (answer, wait) = mpsc::channel();
                if handle(request, answer) {
                    wait.recv_timeout(ANSWER_MAX).unwrap_or_else(|_| {
                        Reply::Error(Failure::new(
                            "no-answer",
                            "the agent has not finished within two minutes",
                            "look at `holdfast-agent status`",
                        ))
                    })
                } else {
                    Reply::Error(Failure::new("stopping", "the agent is stopping", "try again"))
                }
            }
        };
        let mut text = serde_json::to_vec(&reply).map_err(io::Error::other)?;
        text.push(b'\n');
        let mut out = stream;
        out.write_all(&text)?;
        if line.last() != Some(&b'\n') {
            return Ok(());
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("the agent does not run (no answer at {}); start it with `systemctl start holdfast-agent`", path.display())]
    NotRunning {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent went away before it answered")]
    Gone(#[source] io::Error),
    #[error("the agent's answer is not understood; is it of another version?")]
    Answer(#[source] serde_json::Error),
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Asks a running agent.
pub fn ask(path: &Path, request: &Request) -> Result<serde_json::Value, AskError> {
    let not_running = |source| AskError::NotRunning { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).map_err(not_running)?;
    let mut line = serde_json::to_vec(request).map_err(AskError::Answer)?;
    line.push(b'\n');
    let mut out = &stream;
    out.write_all(&line).map_err(AskError::Gone)?;
    let mut text = Vec::new();
    // A status of many groups is longer than any request.
    BufReader::new(&stream).take(16 << 20).read_until(b'\n', &mut text).map_err(AskError::Gone)?;
    match serde_json::from_slice(&text).map_err(AskError::Answer)? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(failure) => Err(failure.into()),
    }
}
