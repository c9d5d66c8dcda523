//! From a request to whoever answers it: static files, the API, sign-in, pages.
//!
//! **Cookies.** `__Host-hf-session` is the session; `__Host-hf-form` guards the forms of somebody who is not signed in yet (the same number in
//! cookie and form); `__Host-hf-look` holds language and colours. **Forms** carry the session's token; a browser that says the form
//! was another site's is refused before that.

use crate::{
    Answer, ApiRequest, BODY_MAX, Web,
    access::{Caller, Role, Via},
    assets,
    frame::Frame,
    idempotency::{Begun, KEY_MAX, Kept},
    lang::Lang,
    live, pages,
    request::{Ask, Fields, encode, local_place},
    respond, secret,
    sessions::{Flash, Session, WHOLE_MS},
};
use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::watch;

pub const SESSION_COOKIE: &str = "__Host-hf-session";
const FORM_COOKIE: &str = "__Host-hf-form";
const LOOK_COOKIE: &str = "__Host-hf-look";
/// Of an answer that a page shows.
const ANSWER_MAX: usize = 8 << 20;
const YEAR_S: u64 = 365 * 86_400;

/// Why a page is not shown or an act not done, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub status: StatusCode,
    pub text: String,
    pub remedy: String,
}

/// What a page is made from.
pub struct Visit {
    pub web: Arc<Web>,
    pub ask: Ask,
    pub lang: Lang,
    theme: &'static str,
    pub caller: Caller,
    pub session_id: String,
    session: Session,
}

pub enum Reply {
    Html(String),
    /// To another page, after something was done.
    To(String),
    Whole(Answer),
}

pub type Page = Result<Reply, Fault>;

pub async fn handle(web: Arc<Web>, ask: Ask, stop: watch::Receiver<bool>) -> Answer {
    let parts: Vec<&str> = ask.parts.iter().map(String::as_str).collect();
    match (&ask.method, &parts[..]) {
        (&Method::GET, ["static", _, name]) => return assets::serve(name),
        (_, ["api", "v1", ..]) => return api(&web, &ask).await,
        _ => {}
    }
    if ask.method != Method::GET && ask.method != Method::POST {
        return respond::plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "pages are fetched with GET, and forms sent with POST\n",
        );
    }
    if ask.method == Method::POST && !ask.is_same_origin() {
        return respond::plain(StatusCode::FORBIDDEN, "this form is not of this box\n");
    }
    let (lang, theme) = look_of(&ask);
    let session = ask.cookie(SESSION_COOKIE).and_then(|id| {
        let session = web.accounts.session(&id, web.now_ms(), parts.first() != Some(&"live"))?;
        Some((id, session))
    });
    match (&ask.method, &parts[..]) {
        (&Method::POST, ["look"]) => return set_look(&ask),
        (_, ["setup" | "sign-in"]) if session.is_none() => {
            return pages::door::handle(&Door { web: &web, ask: &ask, lang, theme }).await;
        }
        _ => {}
    }
    let Some((session_id, session)) = session else {
        if parts.first() == Some(&"live") {
            return respond::plain(StatusCode::UNAUTHORIZED, "signed out\n");
        }
        if web.accounts.needs_setup() {
            return respond::see_other("/setup");
        }
        let to = if ask.method == Method::GET { local_place(&here(&ask)).to_owned() } else { "/".into() };
        return respond::see_other(&format!("/sign-in?to={}", encode(&to)));
    };
    let caller = Caller { name: session.user.clone(), role: session.role, via: Via::Page, from: ask.from.to_string() };
    if ask.method == Method::GET && parts == ["live"] {
        return live::begin(&web, &ask, session_id, caller, stop);
    }
    if ask.method == Method::POST && !secret::same(ask.form().get("csrf"), &session.csrf) {
        return respond::plain(
            StatusCode::FORBIDDEN,
            "this form is too old: go back, load the page again and repeat it\n",
        );
    }
    let visit = Visit { web, lang, theme, caller, session_id, session, ask };
    finish(&visit, pages::handle(&visit).await)
}

fn finish(visit: &Visit, page: Page) -> Answer {
    match page {
        Ok(Reply::Html(text)) => respond::html(StatusCode::OK, text),
        Ok(Reply::To(place)) => respond::see_other(&place),
        Ok(Reply::Whole(answer)) => answer,
        // A form that was refused goes back to where it came from, which says why.
        Err(fault) if visit.ask.method == Method::POST => {
            let back = visit.ask.form().get("back").to_owned();
            visit.web.accounts.say(&visit.session_id, Flash { good: false, text: fault.text, remedy: fault.remedy });
            respond::see_other(local_place(&back))
        }
        Err(fault) => {
            let status = fault.status;
            respond::html(status, pages::refusal(visit, fault))
        }
    }
}

fn here(ask: &Ask) -> String {
    if ask.query.is_empty() { ask.path.clone() } else { format!("{}?{}", ask.path, ask.query) }
}

fn look_of(ask: &Ask) -> (Lang, &'static str) {
    let cookie = ask.cookie(LOOK_COOKIE).unwrap_or_default();
    let (lang, theme) = cookie.split_once('.').unwrap_or((&cookie, ""));
    let lang = Lang::of_code(lang).unwrap_or_else(|| Lang::accepted(ask.header(header::ACCEPT_LANGUAGE)));
    (lang, ["light", "dark"].into_iter().find(|t| *t == theme).unwrap_or("auto"))
}

/// Language and colours: nothing of the box's, and so for anybody.
fn set_look(ask: &Ask) -> Answer {
    let (lang, theme) = look_of(ask);
    let form = ask.form();
    let lang = Lang::of_code(form.get("lang")).unwrap_or(lang);
    let theme = ["auto", "light", "dark"].into_iter().find(|t| *t == form.get("theme")).unwrap_or(theme);
    let mut answer = respond::see_other(local_place(form.get("back")));
    respond::cookie(&mut answer, LOOK_COOKIE, Some(&format!("{}.{theme}", lang.code())), YEAR_S);
    answer
}

/// For somebody who is not signed in.
pub struct Door<'a> {
    pub web: &'a Arc<Web>,
    pub ask: &'a Ask,
    pub lang: Lang,
    theme: &'static str,
}

impl Door<'_> {
    pub fn frame(&self, title: &str, csrf: String) -> Frame {
        Frame {
            lang: self.lang,
            theme: self.theme,
            title: title.into(),
            area: "",
            box_name: self.web.backend.box_name(),
            user: String::new(),
            role: Role::Viewer,
            csrf,
            here: here(self.ask),
            flash: None,
            watch: String::new(),
        }
    }
    /// Whether cookie and form have the same number.
    pub fn form_is_ours(&self) -> bool {
        let cookie = self.ask.cookie(FORM_COOKIE).unwrap_or_default();
        cookie.len() == 32 && secret::same(&cookie, self.ask.form().get("csrf"))
    }
    /// A page with a form, and the cookie that goes with it.
    pub fn page(&self, status: StatusCode, make: impl FnOnce(String) -> String) -> Answer {
        let had = self.ask.cookie(FORM_COOKIE).filter(|c| c.len() == 32 && c.bytes().all(|b| b.is_ascii_hexdigit()));
        let Some(number) = had.or_else(secret::random_hex::<16>) else {
            return respond::plain(StatusCode::INTERNAL_SERVER_ERROR, "the system gave no random bytes\n");
        };
        let mut answer = respond::html(status, make(number.clone()));
        respond::cookie(&mut answer, FORM_COOKIE, Some(&number), 3600);
        answer
    }
    pub fn signed_in(&self, session: &str, to: &str) -> Answer {
        let mut answer = respond::see_other(local_place(to));
        respond::cookie(&mut answer, SESSION_COOKIE, Some(session), WHOLE_MS / 1000);
        respond::cookie(&mut answer, FORM_COOKIE, None, 0);
        answer
    }
}

impl Visit {
    pub fn frame(&self, area: &'static str, title: impl Into<String>, watch: &str) -> Frame {
        Frame {
            lang: self.lang,
            theme: self.theme,
            title: title.into(),
            area,
            box_name: self.web.backend.box_name(),
            user: self.session.user.clone(),
            role: self.session.role,
            csrf: self.session.csrf.clone(),
            here: here(&self.ask),
            // The live part is fetched by script, which must not swallow what the page has to say.
            flash: if self.ask.headers.contains_key("hx-request") {
                None
            } else {
                self.web.accounts.said(&self.session_id)
            },
            watch: watch.into(),
        }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Fault> {
        self.get_with(path, "").await
    }
    pub async fn get_with<T: DeserializeOwned>(&self, path: &str, query: &str) -> Result<T, Fault> {
        let bytes = call(&self.web, &self.caller, Method::GET, path, query, Bytes::new()).await?;
        serde_json::from_slice(&bytes).map_err(|e| Fault {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            text: format!("the API's answer to {path} is not understood: {e}"),
            remedy: "report it: pages and API of one box belong together".into(),
        })
    }
    pub async fn text(&self, path: &str) -> Result<String, Fault> {
        let bytes = call(&self.web, &self.caller, Method::GET, path, "", Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
    pub async fn change(&self, method: Method, path: &str, query: &str, body: &Value) -> Result<Value, Fault> {
        let bytes = call(&self.web, &self.caller, method, path, query, body.to_string().into()).await?;
        Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Fault> {
        self.change(Method::POST, path, "", body).await
    }
    /// An answer as it is: evidence.
    pub async fn whole(&self, path: &str) -> Answer {
        let request = ApiRequest { method: Method::GET, path: path.into(), query: String::new(), body: Bytes::new() };
        let mut answer = self.web.backend.call(self.caller.clone(), request).await;
        respond::guard(&mut answer);
        answer
    }
    /// Done: the page that comes next says so.
    pub fn done(&self, text: impl Into<String>, to: impl Into<String>) -> Page {
        let flash = Flash { good: true, text: text.into(), remedy: String::new() };
        self.web.accounts.say(&self.session_id, flash);
        Ok(Reply::To(to.into()))
    }
    pub fn refuse(&self, key: &str, remedy: &str) -> Fault {
        Fault { status: StatusCode::BAD_REQUEST, text: self.lang.t(key).into(), remedy: self.lang.t(remedy).into() }
    }
    pub fn form(&self) -> Fields {
        self.ask.form()
    }
    pub fn frame_operates(&self) -> bool {
        self.caller.role >= Role::Operator
    }
    pub fn sign_out(&self) -> Answer {
        self.web.accounts.sign_out(&self.session_id);
        let mut answer = respond::see_other("/sign-in");
        respond::cookie(&mut answer, SESSION_COOKIE, None, 0);
        answer
    }
}

/// Asks the API.
pub async fn call(
    web: &Arc<Web>,
    caller: &Caller,
    method: Method,
    path: &str,
    query: &str,
    body: Bytes,
) -> Result<Bytes, Fault> {
    let request = ApiRequest { method, path: path.into(), query: query.into(), body };
    let answer = web.backend.call(caller.clone(), request).await;
    let status = answer.status();
    let Ok(bytes) =
        Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map(http_body_util::Collected::to_bytes)
    else {
        return Err(Fault {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            text: format!("the API's answer to {path} is longer than a page can show"),
            remedy: "use the command line".into(),
        });
    };
    if status.is_success() {
        return Ok(bytes);
    }
    let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let text = |name: &str| value["error"][name].as_str().unwrap_or_default().to_owned();
    Err(Fault { status, text: text("message"), remedy: text("remedy") })
}

/// `/api/v1/…` with a bearer token. A browser's session is nothing here: another site's page could use it.
async fn api(web: &Arc<Web>, ask: &Ask) -> Answer {
    let Some(token) = ask.header(header::AUTHORIZATION).strip_prefix("Bearer ") else {
        let mut answer = respond::api_error(
            StatusCode::UNAUTHORIZED,
            "token-needed",
            "the API over the network takes a bearer token",
            "make one on the page Users, and send it as Authorization: Bearer …",
        );
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, http::HeaderValue::from_static("Bearer"));
        return answer;
    };
    let caller = match web.accounts.bearer(token.trim(), ask.from, web.now_ms()) {
        Ok(caller) => caller,
        Err(e) => {
            let wait = matches!(e, crate::accounts::AccountError::Wait { .. });
            let status = if wait { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::UNAUTHORIZED };
            let text = if wait { e.to_string() } else { "this token is not known".into() };
            return respond::api_error(status, "token-refused", &text, "make a new one on the page Users");
        }
    };
    let request = ApiRequest {
        method: ask.method.clone(),
        path: ask.path.strip_prefix("/api/v1/").unwrap_or_default().to_owned(),
        query: ask.query.clone(),
        body: ask.body.clone(),
    };
    let key = ask.headers.get("idempotency-key").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    if ask.method == Method::GET || key.is_empty() {
        let mut answer = web.backend.call(caller, request).await;
        respond::guard(&mut answer);
        return answer;
    }
    once(web, caller, request, &key).await
}

async fn once(web: &Arc<Web>, caller: Caller, request: ApiRequest, key: &str) -> Answer {
    if key.len() > KEY_MAX {
        let text = format!("an idempotency key has at most {KEY_MAX} characters");
        return respond::api_error(StatusCode::BAD_REQUEST, "bad-request", &text, "correct the request");
    }
    let who = caller.name.clone();
    match web.answered.begin(&who, key, &request, web.now_ms()) {
        Begun::Same(kept) => whole(&kept),
        Begun::Running => respond::api_error(
            StatusCode::CONFLICT,
            "still-running",
            "the first request with this key has not been answered yet",
            "ask again later",
        ),
        Begun::Other => respond::api_error(
            StatusCode::UNPROCESSABLE_ENTITY,
            "key-used",
            "this key was given with another request",
            "take another key for another request",
        ),
        Begun::New => {
            // In a task of its own: a program that breaks off does not leave the key as "running" for ever.
            let (web, key) = (Arc::clone(web), key.to_owned());
            let done = tokio::spawn(async move {
                let answer = web.backend.call(caller, request).await;
                let (parts, body) = answer.into_parts();
                let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
                let body = Limited::new(body, BODY_MAX * 16).collect().await.map(http_body_util::Collected::to_bytes);
                let kept = body.ok().map(|body| Kept { status: parts.status.as_u16(), kind: kind.to_owned(), body });
                // What went wrong on the box may go well the next time.
                let keeps = kept.clone().filter(|k| k.status < 500);
                web.answered.done(&who, &key, keeps);
                kept
            });
            match done.await {
                Ok(Some(kept)) => whole(&kept),
                _ => respond::api_error(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    "the request failed on the box",
                    "look at the daemon's log (journalctl -u holdfastd)",
                ),
            }
        }
    }
}

fn whole(kept: &Kept) -> Answer {
    let kind = if kept.kind.starts_with("application/json") { "application/json" } else { "text/plain; charset=utf-8" };
    respond::bytes(StatusCode::from_u16(kept.status).unwrap_or(StatusCode::OK), kind, kept.body.clone())
}
