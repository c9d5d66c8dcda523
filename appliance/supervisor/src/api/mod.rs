//! The control API: HTTP/1.1 with JSON over `run/control.sock` (mode 0600: who may open it may do everything), and `/metrics`.
//!
//! `GET|POST|PATCH|DELETE /api/v1/…`; every refusal is `{"error":{"code","message","remedy"}}`. Bodies are limited to
//! [`BODY_MAX`]; [`REQUESTS_MAX`] requests at once. What may touch a disk runs on the blocking threads, never on a worker.
//!
//! The same routes serve the pages and, with a bearer token, programs over TLS: all of them come through [`serve`], which asks [`access`]
//! whether the caller's role is enough and has every change written into the audit.

mod access;
mod restores;
mod routes;
mod takeovers;
mod web;

use crate::App;
use ::web::{
    access::{Caller, Role},
    server::serve_connection,
};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming};
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use subtle::ConstantTimeEq as _;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Semaphore, mpsc},
};

pub type Answer = Response<BoxBody<Bytes, Infallible>>;

/// A policy, a list of volumes: nothing we take is longer.
pub const BODY_MAX: usize = 64 * 1024;
/// Connections at once; a request may wait for an agent or a verification.
pub const REQUESTS_MAX: usize = 64;
const HEADER_LIMIT: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A refusal as the caller reads it.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    pub remedy: String,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), remedy: remedy.into() }
    }
    fn answer(self) -> Answer {
        let error = json!({ "code": self.code, "message": self.message, "remedy": self.remedy });
        json_answer(self.status, &json!({ "error": error }))
    }
}

pub fn json_answer(status: StatusCode, value: &Value) -> Answer {
    plain(status, "application/json", value.to_string())
}

pub fn plain(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()).boxed());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A body of lines that somebody else is still making.
pub struct Lines(pub mpsc::Receiver<Bytes>);

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

/// Makes a request as somebody: their role is asked, and what is changed is written down.
pub async fn serve(app: &Arc<App>, caller: &Caller, request: Request<Bytes>) -> Answer {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let query = request.uri().query().unwrap_or_default().to_owned();
    let parts = match routes::parts_of(&path) {
        Ok(parts) => parts,
        Err(e) => return e.answer(),
    };
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let row = access::find(&method, &parts);
    let needs = row.map_or(Role::Console, |row| row.role);
    let changes = method != Method::GET && !access::only_asks(&parts, &query, request.body());
    let asked = match row {
        Some(row) if changes && !row.secret => String::from_utf8_lossy(request.body()).into_owned(),
        _ => String::new(),
    };
    let done = if caller.role < needs {
        let text = format!("{} needs the role {needs}, and {} is {}", parts.join("/"), caller.name, caller.role);
        Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", text, "ask an administrator"))
    } else {
        routes::handle(app, caller, request).await
    };
    let refused = done.as_ref().err().map(|e| e.message.clone());
    let answer = done.unwrap_or_else(ApiError::answer);
    if changes {
        let what = format!("{method} {}", path.strip_prefix("/api/v1/").unwrap_or(&path));
        let status = answer.status().as_u16();
        crate::face::record(app, caller.clone(), what, asked, status, refused.unwrap_or_default()).await;
    }
    answer
}

/// Serves the control socket until the daemon stops.
pub async fn serve_control(app: Arc<App>, listener: UnixListener) {
    let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut stop = app.stop.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = crate::raised(&mut stop) => break,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (app, stop) = (Arc::clone(&app), app.stop.subscribe());
        tokio::spawn(async move {
            let _slot = slot;
            serve_connection(stream, stop, HEADER_LIMIT, move |request| {
                let app = Arc::clone(&app);
                async move {
                    match routes::collect(request).await {
                        Ok(request) => serve(&app, &Caller::console(), request).await,
                        Err(e) => e.answer(),
                    }
                }
            })
            .await;
        });
    }
}

/// Serves `/metrics` until the daemon stops. `token` must be shown as a bearer token.
pub async fn serve_metrics(app: Arc<App>, listener: TcpListener, token: String) {
    let slots = Arc::new(Semaphore::new(8));
    let token: Arc<str> = token.into();
    let mut stop = app.stop.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = crate::raised(&mut stop) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (app, token, stop) = (Arc::clone(&app), Arc::clone(&token), app.stop.subscribe());
        tokio::spawn(async move {
            let _slot = slot;
            serve_connection(stream, stop, HEADER_LIMIT, move |request| {
                let answer = metrics(&app, &token, &request);
                async move { answer }
            })
            .await;
        });
    }
}

fn metrics(app: &App, token: &str, request: &Request<Incoming>) -> Answer {
    let shown = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let shown = shown.strip_prefix(b"Bearer ").unwrap_or_default();
    if !bool::from(shown.ct_eq(token.as_bytes())) {
        let mut answer =
            plain(StatusCode::UNAUTHORIZED, "text/plain", "the bearer token in <data>/metrics.token is needed\n");
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return answer;
    }
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "text/plain", "only /metrics is here\n");
    }
    plain(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", crate::export_metrics::page(app))
}
