//! `/live`: says *change* whenever what a page shows has changed, so that its live part is fetched again.
//!
//! The stream asks the API as the page's user, about once a second and at each event of the box, and compares the answers; nothing of them is
//! sent. It ends with the session, with the daemon, and after [`LIFE`], when the browser begins a new one.

use crate::{Answer, Web, access::Caller, request::Ask, respond, site};
use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame};
use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::{mpsc, watch};

const LOOK_EVERY: Duration = Duration::from_millis(1000);
/// A burst of events is one change.
const CHANGE_PAUSE: Duration = Duration::from_millis(300);
const LIFE: Duration = Duration::from_secs(600);
/// After so many looks without a change a comment shows that the line stands.
const QUIET_LOOKS: u32 = 15;

struct Stream(mpsc::Receiver<Bytes>);

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

/// Gives the session's stream back however the task ends.
struct Slot(Arc<Web>, String);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.accounts.stream_ends(&self.1);
    }
}

pub fn begin(web: &Arc<Web>, ask: &Ask, session: String, caller: Caller, stop: watch::Receiver<bool>) -> Answer {
    let what = ask.query().get("of").to_owned();
    if what.is_empty() || what.contains(['?', '#']) {
        return respond::plain(StatusCode::BAD_REQUEST, "of= names what of the API is followed\n");
    }
    if !web.accounts.stream_begins(&session) {
        // The browser's word for "do not come again": this page stays as it is until it is loaded anew.
        return respond::bytes(StatusCode::NO_CONTENT, "text/plain", "");
    }
    let slot = Slot(Arc::clone(web), session);
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(follow(slot, what, caller, sender, stop));
    let mut answer = Response::new(Stream(receiver).boxed());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    respond::guard(&mut answer);
    answer
}

async fn follow(
    slot: Slot,
    what: String,
    caller: Caller,
    sender: mpsc::Sender<Bytes>,
    mut stop: watch::Receiver<bool>,
) {
    let Slot(web, session) = &slot;
    let mut changes = web.backend.changes();
    let until = tokio::time::Instant::now() + LIFE;
    let (mut before, mut quiet) = (None, 0u32);
    while tokio::time::Instant::now() < until {
        // Looking is no use of the session: an abandoned page does not keep it.
        if web.accounts.session(session, web.now_ms(), false).is_none() {
            return;
        }
        let seen = look(web, &caller, &what).await;
        let changed = before.as_ref().is_some_and(|b| *b != seen);
        quiet = if changed { 0 } else { quiet + 1 };
        let line: Option<&'static [u8]> = match &before {
            None => Some(b"retry: 2000\n\n"),
            Some(_) if changed => Some(b"event: change\ndata: 1\n\n"),
            Some(_) if quiet.is_multiple_of(QUIET_LOOKS) => Some(b": here\n\n"),
            Some(_) => None,
        };
        before = Some(seen);
        if let Some(line) = line
            && sender.send(Bytes::from_static(line)).await.is_err()
        {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            Ok(()) = changes.changed() => tokio::time::sleep(CHANGE_PAUSE).await,
            () = sender.closed() => return,
            () = crate::server::raised(&mut stop) => return,
        }
    }
}

/// What is there now, as far as it has to be compared.
async fn look(web: &Arc<Web>, caller: &Caller, what: &str) -> String {
    match site::call(web, caller, Method::GET, what, "", Bytes::new()).await {
        Ok(bytes) => crate::secret::hash(&String::from_utf8_lossy(&bytes)),
        Err(fault) => fault.text,
    }
}
