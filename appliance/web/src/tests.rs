//! Every page from fixtures, in both languages, with hostile texts in all of them; and sign-in attacked over real TLS.

use crate::{
    Answer, Answering, ApiRequest, Backend, Web,
    access::{Caller, Role},
    accounts::{Accounts, Keep},
    respond,
};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    future::Future,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    pin::Pin,
    sync::{Arc, Mutex},
};
use tokio::sync::watch;

/// In every text that somebody else chose.
const EVIL: &str = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>";
const NOW: u64 = 1_795_429_867_250_123;
const PASSWORD: &str = "correct horse 7";

#[derive(Default)]
struct Memory(Mutex<Option<Vec<u8>>>);

impl Keep for Memory {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().unwrap().clone())
    }
    fn save(&self, data: &[u8]) -> io::Result<()> {
        *self.0.lock().unwrap() = Some(data.to_vec());
        Ok(())
    }
}

struct Fake {
    asked: Mutex<Vec<(String, ApiRequest)>>,
    deeds: Mutex<Vec<String>>,
    changes: watch::Sender<u64>,
    now_us: Mutex<u64>,
}

fn group() -> Value {
    json!({
        "id": "ab12", "name": EVIL, "host_name": EVIL, "branch": { "group_name": EVIL, "lsn": 7 }, "branches": [EVIL],
        "volumes": [{ "id": 0, "name": EVIL, "sectors": 4096 }],
        "policy": { "mode": { "sync": { "wait_ms_max": 9, "at_bound": "hold" } }, "window_hours": 72, "window_hours_floor": 4,
            "journal_bytes_max": 1u64 << 40, "alarm_below_hours": 12, "priority": 100, "lag_ms_alarm": 10_000 },
        "state": "resyncing", "reason": EVIL, "sync": { "done_bytes": 1, "total_bytes": 2 }, "lag_ms": 12, "lag_since_us": NOW,
        "durable_lsn": 17, "write_rate_bytes_s": 1e6, "write_rate_ops_s": 17.0, "journal_bytes": 1, "hours_of_history": 2.5,
        "hours_forecast": 60.0, "risks": [{ "kind": "corrupt", "what": EVIL }, { "kind": "unheard", "x": EVIL }], "alerts": [EVIL],
        "retention": { "kept": { "window": { "segments": 2, "bytes": 3 } } }, "spool_bytes": 1, "dirty_bytes": 2,
    })
}

fn run(kind: &str, phase: &str) -> Value {
    let step = |step: &str, is: &str| json!({ "step": step, "title": EVIL, "begun_us": NOW, "ended_us": NOW, "outcome": { "is": is, "text": EVIL, "remedy": EVIL } });
    json!({
        "id": "0a0b0c0d", "kind": kind, "plan_name": EVIL, "plan": { "subject": { "host": EVIL } }, "decision": EVIL, "now": EVIL,
        "begun_us": NOW, "phase": { "is": phase, "until_us": NOW }, "steps": [step("fence", "done"), step("boot", "failed"), step("picture", "done")],
        "fenced": { "by": "word", "who": EVIL }, "points": [{ "group_name": EVIL, "time_us": NOW, "lsn": 7 }], "started": true,
        "applications": [{ "name": EVIL, "up": false, "ms": 7, "output": EVIL }], "measured": { "serving_ms": 17 },
        "failback": { "target": EVIL, "steps": [step("copy", "running")], "note": EVIL, "down_ms": 7 }, "authority": EVIL, "stuck": EVIL,
        "shipping": { "is": "waiting", "why": EVIL },
    })
}

fn fixture(path: &str) -> Option<Value> {
    let view = json!({ "id": "v1", "group": EVIL, "lsn": 7, "time_us": NOW, "opened_us": NOW, "opened_by": EVIL, "clients": [EVIL], "closes_in_s": 9,
        "exports": [{ "volume_name": EVIL, "bytes": 4096, "uri": EVIL, "tcp_uri": EVIL }] });
    let event = json!({ "time_us": NOW, "event": EVIL, "subject": EVIL, "text": EVIL });
    let host = json!({ "id": "h1", "name": EVIL, "connected": false, "last_heard_us": NOW, "enrolled_us": NOW, "agent_version": EVIL, "backend": EVIL,
        "kernel": EVIL, "agent_rss_bytes": 9 });
    let disk = json!({ "path": EVIL, "bytes": 9, "model": EVIL, "serial": EVIL, "holds": EVIL, "in_use": null });
    let target = json!({ "host": "t1", "name": EVIL, "address": EVIL, "since_us": NOW, "disks": [disk] });
    Some(match path {
        "status" => {
            json!({ "version": EVIL, "hosts": [host], "groups": [group()], "views": [view], "disk": { "total": 100, "available": 40 },
            "alerts": [EVIL], "events": [event], "nbd_listen": "x", "listen": "0.0.0.0:7440" })
        }
        "hosts" => json!([host]),
        "groups" => json!([group()]),
        "groups/ab12" => group(),
        "groups/ab12/points" => json!({
            "valid": [{ "first_lsn": 1, "last_lsn": 9, "first_time_us": NOW - 3_600_000_000, "last_time_us": NOW }],
            "gaps": [{ "first_lsn": 3, "reason": EVIL, "first_time_us": NOW - 9_000_000, "last_time_us": NOW - 5_000_000 }],
            "bookmarks": [{ "name": EVIL, "lsn": 4, "time_us": NOW - 60_000_000, "consistency": EVIL }],
            "rate": [{ "start_us": NOW - 3_600_000_000, "end_us": NOW, "bytes": 1u64 << 30, "writes": 1000 }],
        }),
        "tokens" => json!([{ "host_name": EVIL, "expires_us": NOW }]),
        "plans" => json!([
            { "name": EVIL, "plan": { "subject": { "host": EVIL }, "machine": { "size": { "cpus": 2, "memory_mib": 512 } },
                "applications": [{ "name": EVIL }], "detect": { "automatic": true } } },
            { "name": "b", "fault": EVIL },
        ]),
        "plan-status" => json!([{ "host": EVIL, "plan": EVIL,
            "ownership": { "owner": "box", "term": 3, "hold": EVIL, "rules": { "lease_ms": 9 }, "waits_ms": 9, "why_not": EVIL, "alerts": [EVIL] },
            "seen": { "verdict": "doubt", "text": EVIL, "reasons": [{ "text": EVIL, "since_ms": 7 }], "alarm": EVIL, "in_the_way": EVIL } }]),
        "runs" => json!([run("failover", "serving"), run("drill", "ended")]),
        "runs/1" => run("failover", "serving"),
        "runs/2" => run("drill", "serving"),
        "runs/3" => run("failover", "returned"),
        "runs/4" => run("failover", "failing-back"),
        "runs/5" => run("failover", "failed"),
        "runs/6" => run("drill", "ended"),
        "restore-targets" => json!([target]),
        "restores" => {
            json!([{ "id": "r", "target_name": EVIL, "begun_us": NOW, "phase": { "is": "copying", "done_bytes": 1, "total_bytes": 2 } },
            { "id": "s", "target_name": EVIL, "begun_us": NOW, "phase": { "is": "done" } }])
        }
        "events" => json!([event]),
        "users" => json!([{ "name": EVIL, "role": EVIL, "created_us": NOW }]),
        "api-tokens" => json!([{ "id": EVIL, "name": EVIL, "role": "viewer", "created_us": NOW, "by": EVIL }]),
        "audit" => {
            json!({ "total": 2, "broken_at": 1, "entries": [{ "n": 1, "time_us": NOW, "who": EVIL, "via": EVIL, "from": EVIL, "what": EVIL,
            "asked": EVIL, "status": 200, "result": EVIL }] })
        }
        _ => return None,
    })
}

impl Backend for Fake {
    fn call(&self, caller: Caller, request: ApiRequest) -> Answering {
        self.asked.lock().unwrap().push((caller.name.clone(), request.clone()));
        let answer: Answer = match (&request.method, request.path.as_str()) {
            (&Method::GET, "plan-example" | "plans/p") => {
                respond::bytes(StatusCode::OK, "application/toml", format!("x = 1 # {EVIL}"))
            }
            (&Method::GET, path) => match fixture(path) {
                Some(value) => respond::bytes(StatusCode::OK, "application/json", value.to_string()),
                None => respond::api_error(StatusCode::NOT_FOUND, "none", EVIL, EVIL),
            },
            (_, "runs") => respond::bytes(
                StatusCode::OK,
                "application/json",
                json!({ "id": "1", "plan": { "subject": { "host": EVIL } },
                "steps": [{ "step": EVIL }] })
                .to_string(),
            ),
            (_, "tokens") => respond::bytes(
                StatusCode::CREATED,
                "application/json",
                json!({ "token": EVIL, "ca_fingerprint": EVIL,
                "listen": "0.0.0.0:7440", "expires_us": NOW })
                .to_string(),
            ),
            (&Method::PUT, _) => respond::api_error(
                StatusCode::BAD_REQUEST,
                "bad-plan",
                &format!("the plan has 2 faults: line 1: {EVIL}; line 2: b"),
                EVIL,
            ),
            _ => respond::api_error(StatusCode::CONFLICT, "no", EVIL, EVIL),
        };
        Box::pin(async move { answer })
    }
    fn deed(
        &self,
        caller: Caller,
        what: &'static str,
        refused: Option<String>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.deeds.lock().unwrap().push(format!("{} {what} {}", caller.name, refused.is_none()));
        Box::pin(async {})
    }
    fn now_us(&self) -> u64 {
        *self.now_us.lock().unwrap()
    }
    fn box_name(&self) -> String {
        EVIL.into()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

/// A face on loopback, in TLS with a certificate of its own.
struct Site {
    fake: Arc<Fake>,
    accounts: Arc<Accounts>,
    at: SocketAddr,
    client: Arc<rustls::ClientConfig>,
    stop: watch::Sender<bool>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Got {
    status: u16,
    head: String,
    body: String,
}

impl Got {
    fn cookie(&self, name: &str) -> Option<String> {
        let start = format!("set-cookie: {name}=");
        let line = self.head.lines().find(|l| l.to_ascii_lowercase().starts_with(&start.to_ascii_lowercase()))?;
        Some(line[start.len()..].split(';').next().unwrap().to_owned())
    }
    fn csrf(&self) -> String {
        self.body
            .split("name=\"csrf\" value=\"")
            .nth(1)
            .unwrap_or_else(|| panic!("no form: {self:?}"))
            .split('"')
            .next()
            .unwrap()
            .into()
    }
}

impl Site {
    fn start() -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
        let der = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], der)
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let fake = Arc::new(Fake {
            asked: Mutex::default(),
            deeds: Mutex::default(),
            changes: watch::Sender::new(0),
            now_us: Mutex::new(NOW),
        });
        let accounts = Arc::new(Accounts::open(Box::new(Memory::default())).unwrap());
        let web = Arc::new(Web::new(Arc::clone(&accounts), Arc::clone(&fake) as Arc<dyn Backend>));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (stop, stopping) = watch::channel(false);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let at = listener.local_addr().unwrap();
        runtime.spawn(crate::serve(web, listener, Arc::new(tls), stopping));
        Self { fake, accounts, at, client: Arc::new(client), stop, _runtime: runtime }
    }

    fn ask(&self, method: &str, path: &str, more: &str, body: &str) -> Got {
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let tls = rustls::ClientConnection::new(Arc::clone(&self.client), name).unwrap();
        let mut stream = rustls::StreamOwned::new(tls, TcpStream::connect(self.at).unwrap());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{more}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut all = Vec::new();
        // A connection that is not closed in TLS's own words is as good here.
        let _ = stream.read_to_end(&mut all);
        let all = String::from_utf8_lossy(&all).into_owned();
        let (head, body) =
            all.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer to {method} {path}: {all:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Got { status, head: head.to_owned(), body: body.to_owned() }
    }

    fn set_up(&self) -> String {
        let code = self.accounts.make_setup_code(NOW / 1000).unwrap();
        let form = self.ask("GET", "/setup", "", "");
        let cookie = form.cookie("__Host-hf-form").unwrap();
        let body =
            format!("csrf={}&code={}&name=ada&password={PASSWORD}&again={PASSWORD}", form.csrf(), code.to_lowercase());
        let done = self.ask("POST", "/setup", &format!("cookie: __Host-hf-form={cookie}\r\n"), &body.replace(' ', "+"));
        assert_eq!(done.status, 303, "{done:?}");
        done.cookie("__Host-hf-session").expect("a session")
    }

    fn sign_in(&self, name: &str, password: &str) -> Got {
        let form = self.ask("GET", "/sign-in", "", "");
        let cookie = form.cookie("__Host-hf-form").unwrap();
        let body = format!("csrf={}&name={name}&password={}&to=/groups", form.csrf(), password.replace(' ', "+"));
        self.ask("POST", "/sign-in", &format!("cookie: __Host-hf-form={cookie}\r\n"), &body)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Tags that are opened and closed, attributes quoted, nothing of ours inline. A strict reader, for pages that are made by us.
fn check_page(html: &str, what: &str) {
    const VOID: [&str; 6] = ["meta", "link", "input", "br", "img", "!doctype"];
    assert!(!html.contains("<script>alert") && !html.contains("<img src=x"), "{what}: a text became markup");
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some((_, tail)) = rest.split_once('<') {
        let mut quote = None;
        let end = tail.char_indices().find(|(_, c)| match (quote, c) {
            (None, '>') => true,
            (None, '"' | '\'') => {
                quote = Some(*c);
                false
            }
            (Some(q), c) if q == *c => {
                quote = None;
                false
            }
            _ => false,
        });
        let (end, _) = end.unwrap_or_else(|| panic!("{what}: a tag without end: {}", &tail[..tail.len().min(80)]));
        let tag = &tail[..end];
        rest = &tail[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        assert!(
            !tag.contains(" style=") && !tag.contains(" onclick=") && !tag.contains(" onerror=\""),
            "{what}: inline: <{tag}>"
        );
        assert!(
            name != "style" && (name != "script" || tag.contains(" src=") || tag.starts_with('/')),
            "{what}: inline <{tag}>"
        );
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "{what}: </{name}> closes something else");
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{what}: not closed: {open:?}");
}

#[test]
fn every_page_is_well_formed_and_keeps_texts_texts_in_both_languages() {
    let site = Site::start();
    let session = site.set_up();
    for lang in ["en", "zh-CN"] {
        let cookies = format!("cookie: __Host-hf-session={session}; __Host-hf-look={lang}.dark\r\n");
        for path in [
            "/",
            "/wall",
            "/hosts",
            "/groups",
            "/groups/ab12",
            "/groups/ab12?at=latest",
            "/groups/ab12?at=%3Cb%3E%22",
            "/groups/ab12?from=0&to=9&at=7",
            "/plans",
            "/plans/new",
            "/plans/p",
            "/plans/p/begin?kind=drill&at=%3C%22",
            "/plans/p/begin?kind=failover",
            "/runs",
            "/runs/1",
            "/runs/2",
            "/runs/3",
            "/runs/4",
            "/runs/5",
            "/runs/6",
            "/restores",
            "/restores/new?group=ab12&target=t1&at=%3Cb%3E",
            "/events",
            "/users",
            "/account",
            "/audit",
        ] {
            let got = site.ask("GET", path, &cookies, "");
            assert_eq!(got.status, 200, "{path}: {}", got.body);
            check_page(&got.body, path);
            assert!(
                got.body.contains(&format!("lang=\"{lang}\"")) && got.body.contains("data-theme=\"dark\""),
                "{path}"
            );
            assert!(!got.body.contains("…\n"), "{path} lacks a text");
            for header in [
                "content-security-policy: default-src 'none'",
                "x-content-type-options: nosniff",
                "cache-control: no-store",
            ] {
                assert!(got.head.to_lowercase().contains(header), "{path}: {header}: {}", got.head);
            }
        }
        for (path, body) in [("/hosts/token", "host_name=x"), ("/plans/new", "name=x&do=check&text=%3Cx%3E")] {
            let csrf = site.ask("GET", "/account", &cookies, "").csrf();
            let got = site.ask("POST", path, &cookies, &format!("csrf={csrf}&{body}"));
            assert_eq!(got.status, 200, "{path}: {}", got.body);
            check_page(&got.body, path);
        }
        let missing = site.ask("GET", "/nowhere/%3Cscript%3E", &cookies, "");
        assert_eq!(missing.status, 404);
        check_page(&missing.body, "404");
        // A refusal of the API is shown in its own words, on the page the form came from.
        let csrf = site.ask("GET", "/account", &cookies, "").csrf();
        let refused =
            site.ask("POST", "/groups/ab12/bookmark", &cookies, &format!("csrf={csrf}&name=x&back=/groups/ab12"));
        assert_eq!(refused.status, 303);
        let page = site.ask("GET", "/groups/ab12", &cookies, "");
        assert!(
            page.body.contains("say bad") && page.body.contains("&#60;script&#62;alert"),
            "the refusal is not shown"
        );
        check_page(&page.body, "flash");
    }
    let setup = Site::start().ask("GET", "/setup", "accept-language: zh\r\n", "");
    check_page(&setup.body, "setup");
    assert!(setup.body.contains("设置码"));
}

#[test]
fn nobody_comes_in_without_the_code_and_it_works_once() {
    let site = Site::start();
    assert_eq!(site.ask("GET", "/", "", "").head.lines().find(|l| l.starts_with("location")), Some("location: /setup"));
    let code = site.accounts.make_setup_code(NOW / 1000).unwrap();
    let form = site.ask("GET", "/setup", "", "");
    let cookie = format!("cookie: __Host-hf-form={}\r\n", form.cookie("__Host-hf-form").unwrap());
    let fields = |csrf: &str, code: &str, password: &str| {
        format!("csrf={csrf}&code={code}&name=ada&password={password}&again={password}")
    };
    assert_eq!(site.ask("POST", "/setup", &cookie, &fields("0", &code, "long-enough-1")).status, 403, "another form");
    assert_eq!(site.ask("POST", "/setup", "", &fields(&form.csrf(), &code, "long-enough-1")).status, 403, "no cookie");
    assert_eq!(
        site.ask("POST", "/setup", &cookie, &fields(&form.csrf(), "AAAA-AAAA-AAAA-AAAA", "long-enough-1")).status,
        403
    );
    assert_eq!(site.ask("POST", "/setup", &cookie, &fields(&form.csrf(), &code, "short")).status, 400);
    let cross = format!("{cookie}sec-fetch-site: cross-site\r\n");
    assert_eq!(site.ask("POST", "/setup", &cross, &fields(&form.csrf(), &code, "long-enough-1")).status, 403);
    let done = site.ask("POST", "/setup", &cookie, &fields(&form.csrf(), &code, "long-enough-1"));
    assert_eq!(done.status, 303);
    let set = done.head.lines().find(|l| l.contains("__Host-hf-session")).unwrap();
    for word in ["Secure", "HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(set.contains(word), "{set}");
    }
    assert_eq!(site.ask("GET", "/setup", "", "").status, 303, "there is an administrator");
    assert!(site.accounts.make_setup_code(NOW / 1000).is_err());
    // An hour later a code is worth nothing.
    let other = Site::start();
    let code = other.accounts.make_setup_code(NOW / 1000).unwrap();
    *other.fake.now_us.lock().unwrap() = NOW + 3_600_000_000;
    let form = other.ask("GET", "/setup", "", "");
    let cookie = format!("cookie: __Host-hf-form={}\r\n", form.cookie("__Host-hf-form").unwrap());
    assert_eq!(other.ask("POST", "/setup", &cookie, &fields(&form.csrf(), &code, "long-enough-1")).status, 403);
}

#[test]
fn guessing_gets_slower_and_a_session_ends() {
    let site = Site::start();
    let first = site.set_up();
    let statuses: Vec<u16> = (0..6).map(|_| site.sign_in("ada", "wrong password").status).collect();
    assert_eq!(statuses, [403, 403, 403, 403, 403, 429]);
    let waiting = site.sign_in("ada", PASSWORD);
    assert_eq!(waiting.status, 429, "the right one has to wait too");
    assert!(waiting.head.to_lowercase().contains("retry-after: 1"), "{}", waiting.head);
    let tried = site.fake.deeds.lock().unwrap().clone();
    assert_eq!(
        tried.iter().filter(|d| *d == "ada sign in false").count(),
        5,
        "what was not looked at is not written down: {tried:?}"
    );
    *site.fake.now_us.lock().unwrap() += 2_000_000;
    let done = site.sign_in("ada", PASSWORD);
    assert_eq!(done.status, 303);
    assert!(done.head.contains("location: /groups"));
    let cookie = |id: &str| format!("cookie: __Host-hf-session={id}\r\n");
    let session = done.cookie("__Host-hf-session").unwrap();
    assert_ne!(first, session);
    let page = site.ask("GET", "/account", &cookie(&session), "");
    let out = site.ask("POST", "/sign-out", &cookie(&session), &format!("csrf={}", page.csrf()));
    assert_eq!(out.status, 303);
    assert_eq!(site.ask("GET", "/account", &cookie(&session), "").status, 303, "a session that ended is one no more");
    // The console gets a password at once, whatever was guessed.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let fresh = runtime.block_on(site.accounts.reset_password("ada")).unwrap();
    assert_eq!(site.ask("GET", "/account", &cookie(&first), "").status, 303, "and ends the sessions");
    assert_eq!(site.sign_in("ada", PASSWORD).status, 403);
    // This address has to wait for its own failures; the account does not.
    assert_eq!(site.sign_in("ada", &fresh).status, 429);
    *site.fake.now_us.lock().unwrap() += 4_000_000;
    assert_eq!(site.sign_in("ada", &fresh).status, 303);
}

#[test]
fn forms_need_their_token_and_requests_of_other_sites_are_refused() {
    let site = Site::start();
    let cookie = format!("cookie: __Host-hf-session={}\r\n", site.set_up());
    let csrf = site.ask("GET", "/account", &cookie, "").csrf();
    let posts = [
        "/hosts/token",
        "/hosts/h1/revoke",
        "/groups/new",
        "/groups/ab12/view",
        "/groups/ab12/delete",
        "/plans/new",
        "/plans/p/begin",
        "/runs/1/end",
        "/restores/new",
        "/users/create",
        "/account",
        "/sign-out",
    ];
    for path in posts {
        let before = site.fake.asked.lock().unwrap().len();
        for (more, body) in [
            (cookie.clone(), String::new()),
            (cookie.clone(), "csrf=0".into()),
            (format!("{cookie}sec-fetch-site: cross-site\r\n"), format!("csrf={csrf}")),
            (format!("{cookie}sec-fetch-site: same-site\r\n"), format!("csrf={csrf}")),
            (format!("{cookie}origin: https://evil.example\r\n"), format!("csrf={csrf}")),
        ] {
            assert_eq!(site.ask("POST", path, &more, &body).status, 403, "{path} {more} {body}");
        }
        assert_eq!(site.fake.asked.lock().unwrap().len(), before, "{path} reached the API");
    }
    // A wrong name typed does nothing.
    let typed = site.ask("POST", "/hosts/h1/revoke", &cookie, &format!("csrf={csrf}&confirm=other&back=/hosts"));
    assert_eq!(typed.status, 303);
    assert!(!site.fake.asked.lock().unwrap().iter().any(|(_, r)| r.path.contains("revoke")));
    assert_eq!(site.ask("PUT", "/account", &cookie, "").status, 405);
    assert_eq!(site.ask("POST", "/account", &cookie, &"x".repeat(crate::BODY_MAX + 1)).status, 400);
}

#[test]
fn programs_need_a_token_and_ask_once() {
    let site = Site::start();
    let session = site.set_up();
    assert_eq!(site.ask("GET", "/api/v1/status", "", "").status, 401);
    let cookie = format!("cookie: __Host-hf-session={session}\r\n");
    assert_eq!(site.ask("GET", "/api/v1/status", &cookie, "").status, 401, "a browser's session is none here");
    let (id, token) = site.accounts.create_token("ci", Role::Viewer, "ada", NOW).unwrap();
    let bearer = format!("authorization: Bearer {token}\r\n");
    assert_eq!(site.ask("GET", "/api/v1/status", &bearer, "").status, 200);
    let last = site.fake.asked.lock().unwrap().last().unwrap().0.clone();
    assert_eq!(last, "token:ci");
    let keyed = format!("{bearer}idempotency-key: k1\r\n");
    let first = site.ask("POST", "/api/v1/tokens", &keyed, "{}");
    let count = || site.fake.asked.lock().unwrap().iter().filter(|(_, r)| r.path == "tokens").count();
    assert_eq!((first.status, count()), (201, 1));
    let again = site.ask("POST", "/api/v1/tokens", &keyed, "{}");
    assert_eq!((again.status, again.body, count()), (201, first.body, 1));
    assert_eq!(site.ask("POST", "/api/v1/tokens", &keyed, "{\"a\":1}").status, 422);
    site.accounts.delete_token(&id).unwrap();
    let refused: Vec<u16> = (0..6).map(|_| site.ask("GET", "/api/v1/status", &bearer, "").status).collect();
    assert_eq!(refused, [401, 401, 401, 401, 401, 429]);
}

#[test]
fn users_have_the_role_they_were_given_and_the_last_administrator_stays() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let site = Site::start();
    site.set_up();
    let accounts = &site.accounts;
    runtime.block_on(async {
        accounts.create_user("bob", Role::Viewer, PASSWORD, NOW).await.unwrap();
        assert!(accounts.create_user("bob", Role::Viewer, PASSWORD, NOW).await.is_err());
        for name in ["", "a b", "é", "../x", &"x".repeat(65)] {
            assert!(accounts.create_user(name, Role::Viewer, PASSWORD, NOW).await.is_err(), "{name:?}");
        }
        assert!(accounts.change_user("ada", Some(Role::Viewer), None).await.is_err(), "the last one");
        assert!(accounts.delete_user("ada").is_err());
        accounts.change_user("bob", Some(Role::Administrator), None).await.unwrap();
        accounts.delete_user("ada").unwrap();
    });
    let session = site.sign_in("bob", PASSWORD).cookie("__Host-hf-session").unwrap();
    let cookie = format!("cookie: __Host-hf-session={session}\r\n");
    assert!(site.ask("GET", "/", &cookie, "").body.contains("href=\"/users\""));
    runtime.block_on(accounts.create_user("eve", Role::Viewer, PASSWORD, NOW)).unwrap();
    let session = site.sign_in("eve", PASSWORD).cookie("__Host-hf-session").unwrap();
    let page = site.ask("GET", "/groups/ab12", &format!("cookie: __Host-hf-session={session}\r\n"), "").body;
    assert!(
        !page.contains("href=\"/users\"") && !page.contains("open-view") && !page.contains("/policy\""),
        "a viewer is offered what they may not"
    );
}

#[test]
fn a_live_page_is_told_of_changes_and_streams_are_bounded() {
    let site = Site::start();
    let session = site.set_up();
    let cookie = format!("cookie: __Host-hf-session={session}\r\n");
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let open = || {
        let tls = rustls::ClientConnection::new(Arc::clone(&site.client), name.clone()).unwrap();
        let mut stream = rustls::StreamOwned::new(tls, TcpStream::connect(site.at).unwrap());
        stream
            .write_all(format!("GET /live?of=events HTTP/1.1\r\nhost: localhost\r\n{cookie}\r\n").as_bytes())
            .unwrap();
        let mut seen = String::new();
        while !seen.contains("retry:") && !seen.contains("204") {
            let mut piece = [0; 4096];
            let n = stream.read(&mut piece).unwrap();
            assert!(n > 0, "ended: {seen}");
            seen.push_str(&String::from_utf8_lossy(&piece[..n]));
        }
        (stream, seen)
    };
    let streams: Vec<_> = (0..crate::sessions::STREAMS_MAX).map(|_| open()).collect();
    assert!(streams.iter().all(|(_, seen)| seen.contains("text/event-stream")));
    assert!(open().1.contains(" 204 "), "one too many is told not to come again");
    assert_eq!(site.ask("GET", "/live?of=events", "", "").status, 401);
    // The daemon's end ends them.
    site.stop.send_replace(true);
    for (mut stream, _) in streams {
        let _ = stream.read_to_end(&mut Vec::new());
    }
}
