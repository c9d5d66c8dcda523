//! HTTP/1.1 over the daemon's unix socket, one connection per request.
//!
//! Bounds: an answer at most [`ANSWER_MAX`], a line of a stream at most [`LINE_MAX`]. No deadline: a view or a bookmark may
//! take as long as it takes, and the person at the terminal can interrupt.

use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};
use tokio::{net::UnixStream, runtime};

/// Of one answer: a list of a million points is 100 MiB of nobody's use.
const ANSWER_MAX: usize = 64 << 20;
/// Of one line of a stream.
const LINE_MAX: usize = 1 << 20;

/// The box, as seen from the command line.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: runtime::Runtime,
}

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("could not start")]
    Runtime(#[source] io::Error),
    #[error("could not reach holdfastd at {}", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    #[error("the connection to holdfastd failed")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The box said no, in its own words.
    #[error("{message}")]
    Refused { status: StatusCode, code: String, message: String, remedy: Option<String> },
    #[error("holdfastd answered {status} without saying why")]
    Unexplained { status: StatusCode },
    #[error("holdfastd's answer to {what} is not understood")]
    Answer { what: String, source: serde_json::Error },
    #[error("holdfastd's answer is longer than {ANSWER_MAX} bytes")]
    TooLong,
    #[error("holdfastd ended its answer to {what} early")]
    Unfinished { what: String },
}

impl ApiError {
    /// The box's word for why it refused.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
    /// Whether nobody answers; that may pass.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Http(_))
    }
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Refused { remedy, .. } => remedy.clone(),
            Self::Connect { source, .. } => Some(match source.kind() {
                io::ErrorKind::PermissionDenied => "run as root, or as the user the daemon runs as".to_owned(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "start the daemon (systemctl start holdfastd), or name its socket with --socket or HOLDFAST_SOCKET"
                        .to_owned()
                }
                _ => "look at the daemon's log (journalctl -u holdfastd)".to_owned(),
            }),
            Self::Answer { .. } => {
                Some("holdfast and holdfastd are of different versions; use the ones of one release".to_owned())
            }
            Self::Http(_) | Self::Unexplained { .. } | Self::Unfinished { .. } => {
                Some("look at the daemon's log (journalctl -u holdfastd)".to_owned())
            }
            Self::Runtime(_) | Self::TooLong => None,
        }
    }
}

/// A path below /api/v1, its parts escaped.
#[derive(Clone, Debug)]
pub struct Route(String);

impl Route {
    pub fn new(parts: &[&str]) -> Self {
        let mut path = "/api/v1".to_owned();
        for part in parts {
            path.push('/');
            escape(part, &mut path);
        }
        Self(path)
    }
    #[must_use]
    pub fn query(mut self, name: &str, value: &str) -> Self {
        self.0.push(if self.0.contains('?') { '&' } else { '?' });
        escape(name, &mut self.0);
        self.0.push('=');
        escape(value, &mut self.0);
        self
    }
}

fn escape(part: &str, out: &mut String) {
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("a String takes everything");
        }
    }
}

impl Client {
    pub fn new(socket: &Path) -> Result<Self, ApiError> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(ApiError::Runtime)?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    pub fn get<T: DeserializeOwned>(&self, route: &Route) -> Result<T, ApiError> {
        self.call(Method::GET, route, None)
    }

    /// Sends a request and reads its answer; an empty answer reads as `null`.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        route: &Route,
        body: Option<&Value>,
    ) -> Result<T, ApiError> {
        let answer = self.runtime.block_on(async {
            let incoming = self.send(method, route, body.map(Value::to_string).unwrap_or_default()).await?;
            read_all(incoming).await
        })?;
        let text: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(text).map_err(|source| ApiError::Answer { what: route.0.clone(), source })
    }

    /// Sends a text and hands over the answer as it came.
    pub fn raw(&self, method: Method, route: &Route, body: &str) -> Result<Bytes, ApiError> {
        self.runtime.block_on(async {
            let incoming = self.send(method, route, body.to_owned()).await?;
            read_all(incoming).await
        })
    }

    /// Sends a request and hands over its answer line by line, each a JSON value.
    pub fn stream(
        &self,
        method: Method,
        route: &Route,
        mut each: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let parse = |line: &[u8]| {
            serde_json::from_slice(line).map_err(|source| ApiError::Answer { what: route.0.clone(), source })
        };
        self.runtime.block_on(async {
            let mut incoming = self.send(method, route, String::new()).await?;
            let mut pending: Vec<u8> = Vec::new();
            while let Some(frame) = incoming.frame().await {
                let frame = frame.map_err(|e| ApiError::Http(e.into()))?;
                let Ok(data) = frame.into_data() else { continue };
                pending.extend_from_slice(&data);
                while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    if !line.trim_ascii().is_empty() {
                        each(parse(&line)?)?;
                    }
                }
                if pending.len() > LINE_MAX {
                    return Err(ApiError::TooLong.into());
                }
            }
            if !pending.trim_ascii().is_empty() {
                each(parse(&pending)?)?;
            }
            Ok(())
        })
    }

    async fn send(&self, method: Method, route: &Route, body: String) -> Result<Incoming, ApiError> {
        let connect = |source| ApiError::Connect { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).await.map_err(connect)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| ApiError::Http(e.into()))?;
        // Its errors come back through the request as well.
        tokio::spawn(async move {
            drop(connection.await);
        });
        let request = Request::builder()
            .method(method)
            .uri(&route.0)
            .header(header::HOST, "holdfast")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| ApiError::Http(e.into()))?;
        let response = sender.send_request(request).await.map_err(|e| ApiError::Http(e.into()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let text = read_all(response.into_body()).await?;
        #[derive(Deserialize)]
        struct Envelope {
            error: Refusal,
        }
        #[derive(Deserialize)]
        struct Refusal {
            #[serde(default)]
            code: String,
            message: String,
            remedy: Option<String>,
        }
        let Ok(Envelope { error }) = serde_json::from_slice(&text) else {
            return Err(ApiError::Unexplained { status });
        };
        let remedy = error.remedy.filter(|remedy| !remedy.is_empty());
        Err(ApiError::Refused { status, code: error.code, message: error.message, remedy })
    }
}

async fn read_all(body: Incoming) -> Result<Bytes, ApiError> {
    match Limited::new(body, ANSWER_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => Err(ApiError::TooLong),
        Err(e) => Err(ApiError::Http(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_paths() {
        let route = Route::new(&["groups", "a/b ü?", "points"]).query("buckets", "10").query("x", "&=");
        assert_eq!(route.0, "/api/v1/groups/a%2Fb%20%C3%BC%3F/points?buckets=10&x=%26%3D");
    }

    #[test]
    fn a_box_that_is_not_there_is_told_with_a_remedy() {
        let client = Client::new(Path::new("/nonexistent/holdfast.sock")).unwrap();
        let error = client.get::<Value>(&Route::new(&["status"])).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/holdfast.sock"), "{error}");
        assert!(error.remedy().is_some_and(|r| r.contains("--socket")), "{error}");
    }
}
