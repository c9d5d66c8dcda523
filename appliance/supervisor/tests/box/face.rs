//! The face of a real box: roles at every route, over TLS; and the story of a first day in a real browser.

use crate::{
    agent::Identity,
    chrome::Chrome,
    support::{Control, Inside, have, wait_for},
};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

const WITH_PAGES: &str = "web.listen = \"127.0.0.1:0\"\nbox_name = \"holdfast-1\"\n";
const PASSWORD: &str = "correct horse battery";

fn web(inside: &Inside) -> std::net::SocketAddr {
    inside.daemon.as_ref().unwrap().web_listen().unwrap()
}

/// A request of a program that trusts the box's authority and nobody else.
fn ask(inside: &Inside, method: &str, path: &str, head: &str, body: &str) -> (u16, String) {
    let (_, ca) = inside.call("GET", "ca", "");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let tls = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
    let mut stream = rustls::StreamOwned::new(tls, TcpStream::connect(web(inside)).unwrap());
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{head}\r\n{body}").unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let all = String::from_utf8_lossy(&all).into_owned();
    let status = all.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no answer: {all:?}"));
    (status, all.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn token(inside: &Inside, role: &str) -> String {
    let made = inside.ok("POST", "api-tokens", &json!({ "name": format!("t-{role}"), "role": role }).to_string());
    format!("authorization: Bearer {}\r\n", made["token"].as_str().unwrap())
}

#[test]
fn each_route_takes_the_role_its_row_says_and_changes_are_audited() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, WITH_PAGES);
    let roles = ["viewer", "operator", "administrator"];
    let tokens: Vec<String> = roles.iter().map(|r| token(&inside, r)).collect();
    // The description has every route with its role; what is refused is refused before anything is done.
    let (status, text) = ask(&inside, "GET", "/api/v1/openapi.json", &tokens[0], "");
    assert_eq!(status, 200, "{text}");
    let description: Value = serde_json::from_str(&text).unwrap();
    let mut looked_at = 0;
    for (path, methods) in description["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let needs = roles.iter().position(|r| operation["x-role"] == **r).unwrap();
            let path: String =
                path.split('/').map(|p| if p.starts_with('{') { "nothing" } else { p }).collect::<Vec<_>>().join("/");
            for (have, token) in tokens.iter().enumerate() {
                // With the role it is answered by the route itself; a body that is none makes sure that nothing comes of it.
                let (status, text) = ask(&inside, &method.to_uppercase(), &format!("/api/v1{path}"), token, "no body");
                assert!(!text.contains("no-such-route"), "{method} {path} is no route: {text}");
                assert_eq!(
                    status == 403 && text.contains("forbidden"),
                    have < needs,
                    "{method} {path} as {}: {status} {text}",
                    roles[have]
                );
                looked_at += 1;
            }
        }
    }
    assert!(looked_at > 150, "{looked_at}");
    let (status, _) = ask(&inside, "POST", "/api/v1/web/setup-code", &tokens[2], "");
    assert_eq!(status, 403, "the console's own");
    let audit = inside.get("audit?limit=500");
    assert!(audit["broken_at"].is_null(), "{audit}");
    let refused = audit["entries"]
        .as_array()
        .unwrap()
        .iter()
        .find(|e| e["what"] == "DELETE groups/nothing" && e["who"] == "token:t-viewer");
    assert_eq!(refused.unwrap()["status"], 403);
    inside.ok("POST", "users", &json!({ "name": "ada", "role": "administrator", "password": PASSWORD }).to_string());
    let audit = inside.get("audit?limit=1");
    let entry = &audit["entries"][0];
    assert_eq!(
        (entry["what"].as_str(), entry["who"].as_str(), entry["asked"].as_str()),
        (Some("POST users"), Some("root"), Some(""))
    );
    let total = audit["total"].as_u64().unwrap();
    // A restart keeps users, tokens and the chain.
    inside.stop();
    for file in ["web/accounts.json", "web/audit.log"] {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(data.join(file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    assert!(!std::fs::read_to_string(data.join("web/audit.log")).unwrap().contains(PASSWORD));
    let inside = Inside::start(&data, WITH_PAGES);
    assert_eq!(ask(&inside, "GET", "/api/v1/hosts", &tokens[0], "").0, 200);
    let (status, _) = ask(&inside, "DELETE", "/api/v1/users/ada", &tokens[2], "");
    assert_eq!(status, 409, "the last administrator");
    let audit = inside.get("audit");
    assert_eq!((audit["total"].as_u64(), audit["broken_at"].is_null()), (Some(total + 1), true));
    assert_eq!(inside.refused("POST", "web/setup-code", ""), "set-up-already");
    let fresh = inside.ok("POST", "web/reset-password", r#"{"name":"ada"}"#);
    assert!(fresh["password"].as_str().unwrap().len() > 20);
}

fn pictures() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages")
}

/// An ingest group whose history has bursts, a quiet stretch and a bookmark.
fn history(inside: &Inside) -> String {
    let made = inside.make_group("erp-db", &[("system", 64 << 20), ("data", 64 << 20)]);
    let id = made["id"].as_str().unwrap().to_owned();
    let export = made["exports"][1]["export_name"].as_str().unwrap().to_owned();
    let mut disk = inside.ingest(&export);
    let block = vec![7u8; 64 << 10];
    for burst in 0..12u64 {
        for i in 0..=(burst * 5 % 17) {
            disk.write(((burst * 31 + i * 7) % 900) << 16, &block, false).unwrap();
        }
        disk.flush().unwrap();
        if burst == 6 {
            inside.ok("POST", &format!("groups/{id}/bookmarks"), r#"{"name":"before-upgrade"}"#);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
    disk.disconnect().unwrap();
    id
}

/// The story in one language, from the overview on.
fn story(chrome: &mut Chrome, inside: &Inside, base: &str, group: &str, lang: &str) {
    let shot = |chrome: &mut Chrome, name: &str| {
        chrome.quiet(name);
        chrome.picture(&pictures().join(format!("{name}-{lang}.png")));
    };
    chrome.go(base);
    chrome.wait("document.querySelector('#live table a')");
    // What happens on the box appears without loading the page anew.
    chrome.wait("document.documentElement.hasAttribute('data-live')");
    inside.ok(
        "POST",
        &format!("groups/{group}/bookmarks"),
        &json!({ "name": format!("seen-live-{lang}") }).to_string(),
    );
    chrome.wait(&format!("document.querySelector('#live').innerText.includes('seen-live-{lang}')"));
    chrome.wait("document.querySelector('#live time[data-local]')");
    shot(chrome, "overview");
    chrome.click("nav a[href='/hosts']");
    chrome.fill("input[name=host_name]", "web-1");
    shot(chrome, "hosts");
    chrome.click("form[action='/hosts/token'] button");
    chrome.wait("document.querySelector('#enrol').innerText.includes('holdfast-agent enrol --box')");
    shot(chrome, "token");
    chrome.click("nav a[href='/groups']");
    chrome.click("#live table a");
    chrome.wait("document.querySelectorAll('.timeline .bar').length > 100");
    // A moment is picked by a click into the drawing.
    chrome.click(".timeline a:nth-of-type(80)");
    chrome.wait("location.search.includes('at=') && document.querySelector('.timeline .pick') && document.querySelector('#moment .say.good')");
    shot(chrome, "moment");
    chrome.click("#open-view");
    chrome.wait("document.querySelector('#views dl code').innerText.includes('nbd')");
    chrome.eval("document.querySelector('#views').scrollIntoView()");
    shot(chrome, "view");
    chrome.click("#views form button");
    chrome.wait("!document.querySelector('#views dl')");
    for page in [
        "plans",
        "plans/new",
        "plans/erp/begin?kind=failover",
        "runs",
        "restores",
        "events",
        "users",
        "account",
        "audit",
    ] {
        chrome.go(&format!("{base}/{page}"));
        shot(chrome, &page.split('?').next().unwrap().replace('/', "-"));
    }
    chrome.size(1920, 1080);
    chrome.go(&format!("{base}/wall"));
    shot(chrome, "wall");
    chrome.size(390, 844);
    chrome.go(&format!("{base}/groups/{group}"));
    shot(chrome, "phone");
    chrome.size(1280, 900);
}

#[test]
fn a_first_day_in_a_real_browser_in_both_languages() {
    if !have("chromium") {
        return;
    }
    let begun = Instant::now();
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), WITH_PAGES);
    let enrolment = inside.ok("POST", "tokens", "")["token"].as_str().unwrap().to_owned();
    Identity::enrol(inside.listen(), &enrolment, "web-0").unwrap();
    let group = history(&inside);
    let plan = inside
        .call("GET", "plan-example", "")
        .1
        .replace("host = \"db1\" ", "groups = [\"erp-db\"] #")
        .replace("agent = true ", "agent = false #");
    let plan =
        without(&plan, &["[[network]]", "[[application]]", "[hooks]", "[drill]", "[lease]", "[detect", "[[detect"]);
    let (status, said) = inside.call("PUT", "plans/erp", &plan);
    assert_eq!(status, 200, "{said}");
    let code = inside.ok("POST", "web/setup-code", "")["code"].as_str().unwrap().to_owned();
    let base = format!("https://localhost:{}", web(&inside).port());
    let mut chrome = Chrome::start(&dir.path().join("chrome"));
    chrome.go(&base);
    chrome.wait("location.pathname === '/setup'");
    chrome.fill("input[name=code]", &code);
    chrome.fill("input[name=name]", "ada");
    chrome.fill("input[name=password]", PASSWORD);
    chrome.fill("input[name=again]", PASSWORD);
    chrome.quiet("setup");
    chrome.picture(&pictures().join("setup.png"));
    chrome.click("button.main");
    chrome.wait("location.pathname === '/' && document.querySelector('nav')");
    // Out and in again.
    chrome.click("form[action='/sign-out'] button");
    chrome.wait("location.pathname === '/sign-in'");
    chrome.fill("input[name=name]", "ada");
    chrome.fill("input[name=password]", PASSWORD);
    chrome.picture(&pictures().join("sign-in.png"));
    chrome.click("button.main");
    chrome.wait("document.querySelector('nav')");
    story(&mut chrome, &inside, &base, &group, "en");
    chrome.go(&base);
    chrome.click("button[value='zh-CN']");
    chrome.wait("document.documentElement.lang === 'zh-CN'");
    chrome.click("button[value='dark']");
    chrome.wait("document.documentElement.dataset.theme === 'dark'");
    story(&mut chrome, &inside, &base, &group, "zh-CN");
    wait_for("the views to be closed", || inside.get("views").as_array().unwrap().is_empty().then_some(()));
    let audit = inside.get("audit?limit=500");
    let by_ada =
        audit["entries"].as_array().unwrap().iter().filter(|e| e["who"] == "ada" && e["via"] == "page").count();
    assert!(by_ada >= 8 && audit["broken_at"].is_null(), "{audit}");
    println!("pictures are in {}; {:?}", pictures().display(), begun.elapsed());
}

/// A plan without some of its tables.
fn without(plan: &str, tables: &[&str]) -> String {
    let mut drop = false;
    let keep = |line: &&str| {
        if line.starts_with('[') {
            drop = tables.iter().any(|t| line.starts_with(t));
        }
        !drop
    };
    plan.lines().filter(keep).collect::<Vec<_>>().join("\n")
}
