//! Every route, and which role it needs: one table, from which the API's description is made too.
//!
//! A route that has no row here can be reached over the control socket only, and a test refuses that it stays so. What can run a program
//! on the box – a plan has hooks – is the administrator's.

use ::web::access::Role;
use http::Method;
use serde_json::{Map, Value, json};

/// A route.
pub struct Row {
    pub method: &'static str,
    /// Its parts; `{…}` stands for any.
    pub path: &'static str,
    pub role: Role,
    /// Its body holds a password: it is written nowhere.
    pub secret: bool,
    /// What it does, for the description.
    pub does: &'static str,
}

const fn row(method: &'static str, path: &'static str, role: Role, does: &'static str) -> Row {
    Row { method, path, role, secret: false, does }
}
const fn secret(method: &'static str, path: &'static str, role: Role, does: &'static str) -> Row {
    Row { method, path, role, secret: true, does }
}

use Role::{Administrator, Console, Operator, Viewer};

pub const ROUTES: &[Row] = &[
    row("GET", "status", Viewer, "the box, its hosts, groups, open views and latest events"),
    row("GET", "tokens", Operator, "enrolment tokens nobody has used"),
    row("POST", "tokens", Operator, "makes an enrolment token for one host"),
    row("GET", "hosts", Viewer, "enrolled hosts"),
    row("POST", "hosts/{host}/revoke", Administrator, "refuses a host from now on"),
    row("GET", "groups", Viewer, "protection groups"),
    row("POST", "groups", Operator, "makes an ingest target"),
    row("GET", "groups/{group}", Viewer, "one group"),
    row("DELETE", "groups/{group}", Administrator, "deletes a group and all its history; confirm= its name"),
    row("PATCH", "groups/{group}/policy", Operator, "replaces a group's policy"),
    row("POST", "groups/{group}/resync", Operator, "has the host compare everything again"),
    row("GET", "groups/{group}/points", Viewer, "the moments that can be opened; buckets= pieces of the write rate"),
    row("POST", "groups/{group}/bookmarks", Operator, "names the newest moment and keeps it"),
    row("DELETE", "groups/{group}/bookmarks/{name}", Administrator, "deletes a bookmark"),
    row("POST", "groups/{group}/views", Operator, "opens a moment as read-only disks"),
    row("POST", "groups/{group}/branches", Operator, "makes a group that goes on from a moment"),
    row("POST", "groups/{group}/verify", Operator, "checks every checksum; answers in lines"),
    row("GET", "views", Viewer, "open views"),
    row("DELETE", "views/{view}", Operator, "closes a view"),
    row("GET", "ingest-targets", Viewer, "ingest targets and their addresses"),
    row("GET", "plans", Viewer, "takeover plans"),
    row("GET", "plans/{plan}", Viewer, "a plan as it was written"),
    row("PUT", "plans/{plan}", Administrator, "checks a plan and keeps it; check=1 only checks"),
    row("DELETE", "plans/{plan}", Administrator, "deletes a plan"),
    row("GET", "plan-example", Viewer, "a plan with every key"),
    row("GET", "plan-status", Viewer, "who owns each host of a plan, and what is seen of it"),
    row("POST", "owners/{host}", Administrator, "says who owns a host when the box does not know"),
    row("GET", "runs", Viewer, "takeovers and drills"),
    row("POST", "runs", Operator, "begins a takeover or a drill"),
    row("GET", "runs/{run}", Viewer, "one of them, step by step"),
    row("POST", "runs/{run}/end", Operator, "takes its machine down; a takeover asks for confirm"),
    row("POST", "runs/{run}/again", Operator, "tries what failed again"),
    row("POST", "runs/{run}/promote", Operator, "makes a drill a takeover"),
    row("POST", "runs/{run}/failback", Operator, "brings what the machine wrote to the host's disks"),
    row("POST", "runs/{run}/serves", Operator, "a machine elsewhere serves"),
    row("POST", "runs/{run}/stopped", Operator, "a machine elsewhere was stopped"),
    row("POST", "runs/{run}/commit", Operator, "the host does well after a failback"),
    row("POST", "runs/{run}/rollback", Operator, "the machine shall serve again"),
    row("GET", "runs/{run}/screen", Viewer, "picture of its screen"),
    row("GET", "runs/{run}/serial", Viewer, "log of its serial line"),
    row("GET", "runs/{run}/record", Viewer, "its record"),
    row("GET", "runs/{run}/signature", Viewer, "the record's signature"),
    row("GET", "records-key", Viewer, "the public key records are signed with"),
    row("GET", "restore-targets", Viewer, "machines that wait for their disks' content"),
    row("GET", "restores", Viewer, "restores to machines"),
    row("POST", "restores", Operator, "begins one: disks are overwritten"),
    row("GET", "restores/{restore}", Viewer, "one of them"),
    row("POST", "restores/{restore}/finish", Operator, "one last pass: the source is not written any more"),
    row("POST", "restores/{restore}/release", Operator, "the machine lets its disks go"),
    row("POST", "restores/{restore}/cancel", Operator, "ends it where it is"),
    row("GET", "events", Viewer, "the latest events"),
    row("GET", "ca", Viewer, "the box's authority"),
    row("POST", "client-certs", Administrator, "makes a certificate for an NBD client"),
    row("GET", "users", Administrator, "who may sign in"),
    secret("POST", "users", Administrator, "makes a user"),
    secret("PATCH", "users/{user}", Administrator, "changes a user's role or password"),
    row("DELETE", "users/{user}", Administrator, "deletes a user"),
    row("GET", "api-tokens", Administrator, "tokens for programs, without their secrets"),
    row("POST", "api-tokens", Administrator, "makes a token for a program"),
    row("DELETE", "api-tokens/{token}", Administrator, "deletes a token"),
    row("GET", "audit", Administrator, "who changed what; before= and limit="),
    row("GET", "openapi.json", Viewer, "this description"),
    row("POST", "web/setup-code", Console, "a code that makes the first administrator"),
    row("POST", "web/reset-password", Console, "a new password for a user"),
];

fn row_of(method: &str, parts: &[&str]) -> Option<&'static Row> {
    ROUTES.iter().find(|row| {
        let mut pattern = row.path.split('/');
        row.method == method
            && parts.iter().all(|part| pattern.next().is_some_and(|p| p.starts_with('{') || p == *part))
            && pattern.next().is_none()
    })
}

/// The row of a request.
pub fn find(method: &Method, parts: &[&str]) -> Option<&'static Row> {
    row_of(method.as_str(), parts)
}

/// Whether a request that could change something only asks what it would do.
pub fn only_asks(parts: &[&str], query: &str, body: &[u8]) -> bool {
    match parts {
        ["plans", _] => super::routes::parameter(query, "check").is_some(),
        ["runs"] => serde_json::from_slice::<Value>(body).is_ok_and(|wish| wish["dry_run"] == true),
        _ => false,
    }
}

/// The API in OpenAPI's form, as far as the table has it: routes, roles and refusals. Bodies are described beside the routes' code.
pub fn description() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for row in ROUTES.iter().filter(|row| row.role < Console) {
        let named = row.path.split('/').filter_map(|p| p.strip_prefix('{')?.strip_suffix('}'));
        let parameters: Vec<Value> = named
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        let refusal = json!({
            "description": "refused",
            "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Refusal" } } },
        });
        let operation = json!({
            "summary": row.does,
            "operationId": format!("{} {}", row.method.to_lowercase(), row.path),
            "x-role": row.role.name(),
            "parameters": parameters,
            "responses": { "2XX": { "description": "done" }, "4XX": refusal, "5XX": refusal },
        });
        let entry = paths.entry(format!("/{}", row.path)).or_insert_with(|| json!({}));
        entry[row.method.to_lowercase()] = operation;
    }
    let text = |what: &str| json!({ "type": "string", "description": what });
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Holdfast", "version": env!("CARGO_PKG_VERSION"),
            "description": "A request that changes something may carry Idempotency-Key: asked again with it within a day (and until the \
                            daemon restarts), the same answer is given and nothing is done twice." },
        "servers": [{ "url": "/api/v1" }],
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": { "Refusal": { "type": "object", "required": ["error"], "properties": { "error": { "type": "object",
                "required": ["code", "message", "remedy"],
                "properties": { "code": text("stable"), "message": text("what is wrong"), "remedy": text("what to do") } } } } },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The routes as the code has them: what `match` arms over method and parts say.
    fn arms(code: &str) -> Vec<(String, Vec<String>)> {
        let code = code.split("mod tests {").next().unwrap();
        let code = code.split_whitespace().collect::<Vec<_>>().join(" ").replace("( &Method::", "(&Method::");
        let mut found = Vec::new();
        for (at, _) in code.match_indices("(&Method::") {
            let rest = &code[at + "(&Method::".len()..];
            let Some((method, rest)) = rest.split_once(", [") else { continue };
            if !method.bytes().all(|b| b.is_ascii_uppercase()) {
                continue;
            }
            let parts = &rest[..rest.find(']').unwrap()];
            // Each part: a text, several texts, or a name for anything.
            let mut all = vec![Vec::new()];
            for part in parts.split(',') {
                let words: Vec<&str> = part.split('"').skip(1).step_by(2).collect();
                let words = if words.is_empty() { vec!["ANY"] } else { words };
                let longer = |one: &Vec<String>, word: &&str| [one.clone(), vec![(*word).to_owned()]].concat();
                all = all.iter().flat_map(|one| words.iter().map(move |word| longer(one, word))).collect();
            }
            found.extend(all.into_iter().map(|parts| (method.to_owned(), parts)));
        }
        found
    }

    #[test]
    fn every_route_has_a_row_and_every_row_a_route() {
        let files = [
            include_str!("routes.rs"),
            include_str!("takeovers.rs"),
            include_str!("restores.rs"),
            include_str!("web.rs"),
        ];
        let arms: Vec<(String, Vec<String>)> = files.iter().flat_map(|code| arms(code)).collect();
        assert!(arms.len() >= 55, "the search finds too few routes: {arms:?}");
        let mut used = std::collections::BTreeSet::new();
        for (method, parts) in &arms {
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            let row =
                row_of(method, &parts).unwrap_or_else(|| panic!("{method} {} has no row in ROUTES", parts.join("/")));
            used.insert((row.method, row.path));
        }
        for row in ROUTES {
            assert!(used.contains(&(row.method, row.path)), "{} {} is no route", row.method, row.path);
        }
    }

    #[test]
    fn what_destroys_is_the_administrators_and_nothing_is_for_nobody() {
        let role = |method: &str, parts: &[&str]| row_of(method, parts).unwrap().role;
        assert_eq!(role("DELETE", &["groups", "x"]), Administrator);
        assert_eq!(role("PUT", &["plans", "x"]), Administrator, "a plan's hooks run as root");
        assert_eq!(role("POST", &["web", "setup-code"]), Console);
        assert!(row_of("GET", &["groups", "x", "y", "z"]).is_none() && row_of("PUT", &["status"]).is_none());
        for row in ROUTES.iter().filter(|row| row.method != "GET") {
            assert!(row.role >= Operator, "{} {} changes something", row.method, row.path);
        }
        let text = description().to_string();
        assert!(text.contains("/groups/{group}/views") && !text.contains("setup-code"));
    }

    #[test]
    fn asking_what_would_be_done_is_no_change() {
        assert!(only_asks(&["runs"], "", br#"{"dry_run":true}"#) && !only_asks(&["runs"], "", br#"{"dry_run":false}"#));
        assert!(only_asks(&["plans", "x"], "check=1", b"") && !only_asks(&["plans", "x"], "", b"{}"));
        assert!(!only_asks(&["groups"], "check=1", br#"{"dry_run":true}"#));
    }
}
