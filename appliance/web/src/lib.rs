//! The face of the box: pages for people and the API for programs, over TLS, with sign-in.
//!
//! ```text
//!  browser ─TLS─▶ server ─▶ site: static files, sign-in, pages ─┐
//!  program ─TLS─▶   ″    ─▶ api: bearer token ──────────────────┴─▶ Backend::call(caller, request) ─▶ the box's own routes
//! ```
//!
//! The heart is one trait, [`Backend`]: *make this API request as this caller*. The supervisor serves it with the same routes that the
//! command line uses, and checks there what each role may. Pages hold no engine and no state of the box: each asks the API, reads the answer
//! ([`answers`]), and shows the API's own error and remedy where it refuses. So pages, command line and API cannot drift apart.
//!
//! What is here besides: accounts ([`accounts`]), sessions, growing delays, the audit file ([`audit`]), two languages. Templates and static
//! files lie in `ui-templates/` and are built in.
//!
//! **Useful without scripts.** Every page is whole as it is sent, every act is a form, a moment is picked by a link. Scripts only keep
//! the part of a page that is marked live up to date (`/live` says *changed*, and the page is fetched again) and write times in the
//! viewer's zone. The content security policy allows neither inline scripts nor inline styles.
//!
//! **Bounds.** [`server::CONNECTIONS_MAX`] connections, [`BODY_MAX`] of a body, sessions, delays and live streams as their modules say. HTTP/1.1
//! only: a browser has six connections to a box, and a session at most four live streams.

pub mod access;
pub mod accounts;
pub mod answers;
mod assets;
pub mod audit;
mod format;
mod frame;
mod idempotency;
mod lang;
mod limits;
mod live;
mod pages;
mod points;
mod request;
mod respond;
mod secret;
pub mod server;
mod sessions;
mod site;
mod timeline;
mod words;

#[cfg(test)]
mod tests;

use access::Caller;
use accounts::Accounts;
use bytes::Bytes;
use http::{Method, Response};
use http_body_util::combinators::BoxBody;
use std::{convert::Infallible, future::Future, pin::Pin, sync::Arc};
use tokio::sync::watch;

pub use server::serve;

pub type Answer = Response<BoxBody<Bytes, Infallible>>;
pub type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A policy, a plan: nothing we take is longer.
pub const BODY_MAX: usize = 64 * 1024;

/// A request of the API: `path` is what follows `/api/v1/`, its parts still percent-encoded.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub body: Bytes,
}

/// The box, as its face sees it.
pub trait Backend: Send + Sync + 'static {
    /// Makes a request of the API as `caller`, whose role is checked there.
    fn call(&self, caller: Caller, request: ApiRequest) -> Answering;
    /// Something that nobody asked the API for and that changes who may come in: for the audit.
    fn deed(
        &self,
        caller: Caller,
        what: &'static str,
        refused: Option<String>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>>;
    /// Microseconds since 1970.
    fn now_us(&self) -> u64;
    fn box_name(&self) -> String;
    /// Changes with each event of the box.
    fn changes(&self) -> watch::Receiver<u64>;
}

/// What pages and API work with.
pub struct Web {
    pub accounts: Arc<Accounts>,
    backend: Arc<dyn Backend>,
    answered: idempotency::Answered,
}

impl Web {
    pub fn new(accounts: Arc<Accounts>, backend: Arc<dyn Backend>) -> Self {
        Self { accounts, backend, answered: idempotency::Answered::default() }
    }
    fn now_ms(&self) -> u64 {
        self.backend.now_us() / 1000
    }
}
