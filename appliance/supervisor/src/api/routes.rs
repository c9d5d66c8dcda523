//! The routes: from a request to what is done, and from errors to words.

use super::{Answer, ApiError, BODY_MAX, Lines, json_answer, plain};
use crate::{
    App,
    catalog::{CatalogRefusal, ChangeError, TokenEntry},
    config::VIEW_IDLE_MINUTES_MAX,
    events::Event,
    pki, status,
    vault::{CreateGroupError, DeleteGroupError, Group, GroupError, Phase, VOLUME_BYTES_MAX},
    views::{Idle, ViewError, Wish},
};
use ::web::access::Caller;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use journal::ResolveError;
use model::{
    BookmarkName, ByteLen, Consistency, GroupId, GroupPolicy, GroupSpec, Mark, RecoveryPoint, SECTOR, Sectors,
    VolumeId, VolumeSpec,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use wire::{Command, CommandResult, EnrolToken, RefuseCode};

const TOKEN_MINUTES: u64 = 60;
const TOKEN_MINUTES_MAX: u64 = 7 * 24 * 60;
/// Points on a picture; nobody's screen has more.
const BUCKETS_MAX: usize = 4096;
/// A bookmark the agent says it has placed must come through the stream within this.
const BOOKMARK_LIMIT: Duration = Duration::from_secs(60);
/// How long a new group may take to open before its maker is answered all the same.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
const BOOKMARK_POLL: Duration = Duration::from_millis(10);
const VOLUMES_MAX: usize = 64;

pub(super) type Result<T = Answer> = std::result::Result<T, ApiError>;

/// The parts of an address below `/api/v1/`, decoded.
pub(super) fn parts_of(path: &str) -> Result<Vec<String>> {
    let Some(rest) = path.strip_prefix("/api/v1/") else { return Err(no_route(path)) };
    rest.split('/').map(decode).collect::<Option<Vec<String>>>().ok_or_else(|| no_route(path))
}

/// What each of these needs is in [`super::access`]; who asks has been looked at there.
pub async fn handle(app: &Arc<App>, caller: &Caller, request: Request<Bytes>) -> Result {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let parts = parts_of(&path)?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let method = request.method().clone();
    match (&method, &parts[..]) {
        (&Method::GET, ["status"]) => Ok(blocking(app, |app| ok(&status::status_json(app))).await?),
        (&Method::GET, ["tokens"]) => Ok(tokens(app)),
        (&Method::POST, ["tokens"]) => make_token(app, body_or_default(request).await?).await,
        (&Method::GET, ["hosts"]) => Ok(ok(&status::hosts_json(app))),
        (&Method::POST, ["hosts", host, "revoke"]) => revoke(app, host).await,
        (&Method::GET, ["groups"]) => {
            let groups = |app: &Arc<App>| app.vault.groups().iter().map(|g| group_json(app, g)).collect::<Value>();
            Ok(blocking(app, move |app| ok(&groups(app))).await?)
        }
        (&Method::POST, ["groups"]) => create_group(app, body(request).await?).await,
        (&Method::GET, ["groups", group]) => {
            let group = find(app, group)?;
            Ok(blocking(app, move |app| ok(&group_json(app, &group))).await?)
        }
        (&Method::DELETE, ["groups", group]) => delete_group(app, find(app, group)?, &query).await,
        (&Method::PATCH, ["groups", group, "policy"]) => set_policy(app, find(app, group)?, body(request).await?).await,
        (&Method::POST, ["groups", group, "resync"]) => resync(app, find(app, group)?).await,
        (&Method::GET, ["groups", group, "points"]) => points(app, find(app, group)?, &query).await,
        (&Method::POST, ["groups", group, "bookmarks"]) => bookmark(app, find(app, group)?, body(request).await?).await,
        (&Method::DELETE, ["groups", group, "bookmarks", name]) => {
            let (group, name) = (find(app, group)?, bookmark_name((*name).to_owned())?);
            group.release_bookmark(name.clone()).await.map_err(group_error)?;
            app.events.note(Event::BookmarkDeleted, group.name(), &name);
            Ok(ok(&json!({ "deleted": name })))
        }
        (&Method::POST, ["groups", group, "views"]) => open_view(app, find(app, group)?, body(request).await?).await,
        (&Method::POST, ["groups", group, "branches"]) => {
            create_branch(app, find(app, group)?, body(request).await?).await
        }
        (&Method::POST, ["groups", group, "verify"]) => verify(app, find(app, group)?),
        (&Method::GET, ["views"]) => {
            Ok(ok(&app.views.list().iter().map(|v| status::view_json(app, v)).collect::<Value>()))
        }
        (&Method::DELETE, ["views", id]) => match app.views.close(id) {
            true => Ok(ok(&json!({ "closed": id }))),
            false => Err(not_found("no-such-view", format!("there is no view {id:?}"), "list them with GET /views")),
        },
        (&Method::GET, ["ingest-targets"]) => {
            let targets = app.exports.ingest_targets();
            Ok(ok(&targets.iter().map(|e| status::export_json(app, e)).collect::<Value>()))
        }
        (_, ["plans" | "plan-example" | "plan-status" | "owners" | "runs" | "records-key", ..]) => {
            super::takeovers::handle(app, request, &parts, &query).await
        }
        (_, ["restores" | "restore-targets", ..]) => super::restores::handle(app, request, &parts).await,
        (&Method::GET, ["events"]) => Ok(ok(&json!(app.events.recent()))),
        (&Method::GET, ["ca"]) => Ok(plain(StatusCode::OK, "application/x-pem-file", app.pki.ca_pem().to_owned())),
        (&Method::POST, ["client-certs"]) => client_certificate(app, body(request).await?).await,
        (_, ["web" | "users" | "api-tokens" | "audit" | "openapi.json", ..]) => {
            super::web::handle(app, caller, request, &parts, &query).await
        }
        _ => Err(no_route(&format!("{method} {path}"))),
    }
}

// ---- hosts and tokens

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct TokenWish {
    host_name: Option<String>,
    valid_minutes: Option<u64>,
}

async fn make_token(app: &Arc<App>, wish: TokenWish) -> Result {
    let minutes = wish.valid_minutes.unwrap_or(TOKEN_MINUTES);
    if !(1..=TOKEN_MINUTES_MAX).contains(&minutes) {
        return Err(bad_request(
            "valid_minutes",
            format!("{minutes} minutes are not possible: 1 to {TOKEN_MINUTES_MAX}"),
        ));
    }
    let host_name = wish.host_name.map(|name| crate::catalog::clean_name(&name, "")).filter(|name| !name.is_empty());
    blocking(app, move |app| {
        let secret = pki::random_128().ok_or_else(no_random)?;
        let print = app.pki.ca_fingerprint();
        let ca_fingerprint = u128::from_str_radix(&print[..32], 16).map_err(|_| no_random())?.to_be_bytes();
        let now_us = app.clock.wall_us();
        let expires_us = now_us.saturating_add(minutes * 60_000_000);
        let entry = TokenEntry { hash: pki::sha256_hex(&secret), host_name, created_us: now_us, expires_us };
        app.catalog.change(|data| data.add_token(entry, now_us)).map_err(change_error)?;
        app.events.note(Event::TokenMade, "", format!("valid for {minutes} minutes"));
        let token = EnrolToken { secret, ca_fingerprint }.to_string();
        let listen = app.listen.to_string();
        Ok(ok(&json!({ "token": token, "expires_us": expires_us, "ca_fingerprint": print, "listen": listen })))
    })
    .await?
}

fn tokens(app: &App) -> Answer {
    let (data, now_us) = (app.catalog.data(), app.clock.wall_us());
    let valid = data.tokens.iter().filter(|t| t.expires_us > now_us);
    // The hash's beginning tells tokens apart and says nothing of the secret.
    let token = |t: &TokenEntry| json!({ "id": t.hash[..8], "host_name": t.host_name, "created_us": t.created_us, "expires_us": t.expires_us });
    ok(&valid.map(token).collect::<Value>())
}

async fn revoke(app: &Arc<App>, host: &str) -> Result {
    let host = host.to_owned();
    blocking(app, move |app| {
        let now_us = app.clock.wall_us();
        let revoked = app.catalog.change(|data| data.revoke(&host, now_us)).map_err(change_error)?;
        // Persisted first: a session that ends now cannot come back.
        app.links.cut(revoked.id, RefuseCode::Revoked, "the host was revoked");
        app.events.note(Event::HostRevoked, &revoked.name, revoked.id);
        Ok(ok(&json!({ "id": revoked.id, "name": revoked.name, "revoked": true })))
    })
    .await?
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientWish {
    name: String,
}

async fn client_certificate(app: &Arc<App>, wish: ClientWish) -> Result {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if wish.name.is_empty() || wish.name.len() > 64 || !wish.name.chars().all(fine) {
        return Err(bad_request("name", "1 to 64 letters, digits, dashes, dots or underscores are expected".into()));
    }
    blocking(app, move |app| {
        let made = app.pki.make_client(&wish.name, app.clock.wall_us());
        let (bundle, serial) = made.map_err(|e| internal(crate::chain(&e)))?;
        app.events.note(Event::ClientCertificateMade, &wish.name, serial);
        Ok(ok(&json!(bundle)))
    })
    .await?
}

// ---- groups

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeWish {
    name: String,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupWish {
    name: String,
    volumes: Vec<VolumeWish>,
    #[serde(default)]
    policy: Option<GroupPolicy>,
}

async fn create_group(app: &Arc<App>, wish: GroupWish) -> Result {
    let name: BookmarkName = wish.name.parse().map_err(|_| {
        bad_request("name", "1 to 128 characters are expected, no control characters, no space at the ends".into())
    })?;
    if wish.volumes.is_empty() || wish.volumes.len() > VOLUMES_MAX {
        return Err(bad_request("volumes", format!("1 to {VOLUMES_MAX} volumes are expected")));
    }
    let mut volumes: Vec<VolumeSpec> = Vec::new();
    for (i, volume) in wish.volumes.iter().enumerate() {
        if volume.bytes == 0 || !volume.bytes.is_multiple_of(SECTOR) || volume.bytes > VOLUME_BYTES_MAX {
            let text = format!(
                "{} bytes are not possible for {:?}: a multiple of {SECTOR}, at most {}",
                volume.bytes,
                volume.name,
                ByteLen(VOLUME_BYTES_MAX)
            );
            return Err(bad_request("volumes", text));
        }
        let volume_name: BookmarkName = volume
            .name
            .parse()
            .map_err(|_| bad_request("volumes", format!("{:?} is no name for a volume", volume.name)))?;
        if volumes.iter().any(|v| v.name == volume_name.as_str()) {
            return Err(bad_request("volumes", format!("{:?} is named twice", volume.name)));
        }
        volumes.push(VolumeSpec {
            id: VolumeId(u32::try_from(i).map_err(|_| bad_request("volumes", "too many".into()))?),
            name: volume_name.clone().into(),
            sectors: Sectors(volume.bytes / SECTOR),
            identity: format!("ingest:{volume_name}"),
        });
    }
    let policy = wish.policy.unwrap_or_default();
    check_policy(&policy)?;
    let app = Arc::clone(app);
    let created = blocking(&app, move |app| {
        let id = GroupId(pki::random_128().ok_or_else(no_random)?);
        let spec = GroupSpec { id, name: name.into(), host: None, volumes, policy };
        let group = app.vault.create(spec.clone()).map_err(|e| match e {
            CreateGroupError::Catalog(e) => change_error(e),
            e => internal(crate::chain(&e)),
        })?;
        let exported = app.exports.add_ingest(&group, &spec.volumes, app.nbd_listen.is_some());
        exported.map_err(|e| internal(crate::chain(&e)))?;
        Ok::<_, ApiError>(group)
    })
    .await??;
    Ok(created_json(&app, &created).await)
}

/// A group that was just made, with its exports, once it is open.
async fn created_json(app: &Arc<App>, created: &Arc<Group>) -> Answer {
    // Its journal was just made; opening it takes a moment, and who made it wants to use it.
    let deadline = Instant::now() + OPEN_LIMIT;
    while matches!(created.shared.phase(), Phase::Opening) && Instant::now() < deadline {
        tokio::time::sleep(BOOKMARK_POLL).await;
    }
    let exports: Vec<Value> = app.exports.of_group(created.id()).iter().map(|e| status::export_json(app, e)).collect();
    let mut value = group_json(app, created);
    value["exports"] = json!(exports);
    json_answer(StatusCode::CREATED, &value)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BranchWish {
    name: String,
    at: RecoveryPoint,
}

/// The group's disks as of a moment, to be written: a group of its own that goes on from there.
async fn create_branch(app: &Arc<App>, group: Arc<Group>, wish: BranchWish) -> Result {
    let name: BookmarkName = wish.name.parse().map_err(|_| {
        bad_request("name", "1 to 128 characters are expected, no control characters, no space at the ends".into())
    })?;
    // What a client was told is written must be in the newest moment.
    group.barrier().await.map_err(group_error)?;
    let created = blocking(app, move |app| {
        let reader = group.reader().map_err(group_error)?;
        let at = reader.resolve(&wish.at).map_err(|e| view_error(ViewError::Resolve(e)))?;
        let id = GroupId(pki::random_128().ok_or_else(no_random)?);
        let branch = app.vault.create_branch(&group, at, id, name.as_str()).map_err(|e| match e {
            CreateGroupError::Catalog(e) => change_error(e),
            CreateGroupError::Trunk(e) => group_error(e),
            CreateGroupError::View(e) => view_error(ViewError::Open(e)),
            e => internal(crate::chain(&e)),
        })?;
        let exported = app.exports.add_ingest(&branch, &branch.shared.spec().volumes, app.nbd_listen.is_some());
        exported.map_err(|e| internal(crate::chain(&e)))?;
        Ok::<_, ApiError>(branch)
    })
    .await??;
    Ok(created_json(app, &created).await)
}

fn check_policy(policy: &GroupPolicy) -> Result<()> {
    if policy.window_hours == 0 || policy.window_hours > 24 * 366 {
        return Err(bad_request("window_hours", "1 to 8784 hours are expected".into()));
    }
    if policy.window_hours_floor > policy.window_hours {
        return Err(bad_request("window_hours_floor", "it cannot be more than window_hours".into()));
    }
    if let model::SyncMode::Sync { wait_ms_max, .. } = policy.mode
        && !(1..=600_000).contains(&wait_ms_max)
    {
        return Err(bad_request("mode", "wait_ms_max: 1 to 600000 is expected".into()));
    }
    Ok(())
}

async fn set_policy(app: &Arc<App>, group: Arc<Group>, policy: GroupPolicy) -> Result {
    check_policy(&policy)?;
    group.reader().map_err(group_error)?;
    let spec = GroupSpec { policy, ..group.shared.spec() };
    group.replace_spec(spec.clone()).await.map_err(group_error)?;
    app.events.note(Event::PolicyChanged, group.name(), "");
    if let Some(host) = group.shared.host {
        // An agent that is away learns it when its stream opens.
        let (app, told) = (Arc::clone(app), spec);
        tokio::spawn(async move {
            let _ = app.links.hosts.command(host, Command::Spec { spec: told }).await;
        });
    }
    Ok(ok(&group_json(app, &group)))
}

async fn resync(app: &App, group: Arc<Group>) -> Result {
    let Some(host) = group.shared.host else {
        let text = "an ingest group has no agent to copy again";
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "not-an-agent-group",
            text,
            "write to its ingest target instead",
        ));
    };
    app.links.hosts.command(host, Command::Resync { group: group.id() }).await.map_err(command_error)?;
    Ok(ok(&json!({ "resync": "started" })))
}

async fn delete_group(app: &Arc<App>, group: Arc<Group>, query: &str) -> Result {
    if parameter(query, "confirm").as_deref() != Some(group.name()) {
        let text = format!("this deletes all history of group {:?}", group.name());
        let remedy = "repeat it with ?confirm= and the group's name";
        return Err(ApiError::new(StatusCode::CONFLICT, "confirm-needed", text, remedy));
    }
    if let Some(host) = group.shared.host {
        // Asked to stop capturing, but not waited for: the host may be long gone.
        let (app, id) = (Arc::clone(app), group.id());
        tokio::spawn(async move {
            let _ = app.links.hosts.command(host, Command::Release { group: id }).await;
        });
    }
    app.views.close_group(group.id());
    app.exports.remove_group(group.id());
    blocking(app, move |app| {
        app.vault.delete(&group).map_err(|e| match e {
            DeleteGroupError::Catalog(e) => change_error(e),
            e => internal(crate::chain(&e)),
        })?;
        // What was opened while it was still there.
        app.views.close_group(group.id());
        app.exports.remove_group(group.id());
        Ok(ok(&json!({ "deleted": group.name() })))
    })
    .await?
}

async fn points(app: &Arc<App>, group: Arc<Group>, query: &str) -> Result {
    let buckets = match parameter(query, "buckets") {
        None => 60,
        Some(text) => text
            .parse()
            .ok()
            .filter(|n| (1..=BUCKETS_MAX).contains(n))
            .ok_or_else(|| bad_request("buckets", format!("1 to {BUCKETS_MAX} are expected")))?,
    };
    let reader = group.reader().map_err(group_error)?;
    blocking(app, move |_| {
        let points = reader.points();
        ok(&json!({
            "timeline": points.timeline,
            "valid": points.valid.iter().map(|r| json!({
                "first_lsn": r.first_lsn, "last_lsn": r.last_lsn, "first_time_us": r.first_time, "last_time_us": r.last_time,
            })).collect::<Vec<_>>(),
            "gaps": points.gaps.iter().filter(|g| !is_empty(g)).map(|g| json!({
                "first_lsn": g.first_lsn, "last_lsn": g.last_lsn, "reason": g.reason,
                "first_time_us": g.first_time, "last_time_us": g.last_time,
            })).collect::<Vec<_>>(),
            "bookmarks": points.bookmarks.iter().map(|b| json!({
                "name": b.name, "lsn": b.lsn, "time_us": b.time, "consistency": b.consistency,
            })).collect::<Vec<_>>(),
            "rate": reader.rate_history(buckets).iter().map(|b| json!({
                "start_us": b.start, "end_us": b.end, "bytes": b.bytes, "writes": b.records,
            })).collect::<Vec<_>>(),
        }))
    })
    .await
}

/// An ingest group begins consistent: the gap before its first record holds nothing.
fn is_empty(gap: &journal::Gap) -> bool {
    gap.last_lsn.is_some_and(|last| last < gap.first_lsn)
}

// ---- bookmarks

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BookmarkWish {
    name: String,
    #[serde(default)]
    consistency: Option<Consistency>,
}

fn bookmark_name(name: String) -> Result<BookmarkName> {
    name.parse().map_err(|e: model::BookmarkNameError| bad_request("name", e.to_string()))
}

async fn bookmark(app: &Arc<App>, group: Arc<Group>, wish: BookmarkWish) -> Result {
    let name = bookmark_name(wish.name)?;
    let consistency = wish.consistency.unwrap_or(Consistency::Crash);
    let reader = group.reader().map_err(group_error)?;
    if reader.points().bookmarks.iter().any(|b| b.name == name) {
        let text = format!("group {:?} has a bookmark {:?} already", group.name(), name.as_str());
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "bookmark-exists",
            text,
            "choose another name or delete the old one",
        ));
    }
    let (lsn, time) = match group.shared.host {
        None if consistency != Consistency::Crash => {
            let text = "an ingest target cannot freeze its client's file systems";
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                "not-possible",
                text,
                "ask for a crash-consistent bookmark",
            ));
        }
        None => {
            let mark = Mark::Bookmark { name: name.clone(), consistency };
            let marked = group.mark(mark).await.map_err(group_error)?;
            app.events.note(Event::BookmarkMade, group.name(), &name);
            (marked.lsn, marked.time)
        }
        Some(host) => {
            let what = Command::Bookmark { group: group.id(), name: name.clone(), consistency };
            let done = app.links.hosts.command(host, what).await.map_err(command_error)?;
            let CommandResult::Bookmarked { .. } = done else {
                return Err(internal("the agent did not say where the bookmark is".into()));
            };
            // It exists when the stream has brought it.
            let deadline = Instant::now() + BOOKMARK_LIMIT;
            loop {
                if let Some(b) = reader.points().bookmarks.iter().find(|b| b.name == name)
                    && b.lsn <= group.shared.live().progress.durable
                {
                    break (b.lsn, b.time);
                }
                if Instant::now() >= deadline {
                    let text = "the agent placed the bookmark, but its stream has not brought it yet";
                    let remedy = "look at the group's lag; the bookmark appears when the stream has caught up";
                    return Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "bookmark-late", text, remedy));
                }
                tokio::time::sleep(BOOKMARK_POLL).await;
            }
        }
    };
    Ok(json_answer(
        StatusCode::CREATED,
        &json!({ "name": name, "lsn": lsn, "time_us": time, "consistency": consistency }),
    ))
}

// ---- views

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ViewWish {
    at: RecoveryPoint,
    #[serde(default)]
    tcp: bool,
    /// Closed when nobody has had it open for so long; 0: never. Left out: as the box is set.
    #[serde(default)]
    idle_minutes: Option<u64>,
    /// As whoever asks calls itself, for people.
    #[serde(default)]
    opened_by: Option<String>,
}

async fn open_view(app: &Arc<App>, group: Arc<Group>, wish: ViewWish) -> Result {
    if wish.tcp && app.nbd_listen.is_none() {
        let text = "this box does not listen for NBD over TLS";
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "no-nbd-listener",
            text,
            "set nbd_listen in the configuration",
        ));
    }
    let idle = match wish.idle_minutes {
        None => Idle::Default,
        Some(0) => Idle::Never,
        Some(minutes @ 1..=VIEW_IDLE_MINUTES_MAX) => Idle::After(Duration::from_secs(minutes * 60)),
        Some(minutes) => {
            let text = format!("{minutes} minutes are not possible: 0 (never) to {VIEW_IDLE_MINUTES_MAX}");
            return Err(bad_request("idle_minutes", text));
        }
    };
    let opened_by = wish.opened_by.map(|by| crate::catalog::clean_name(&by, "")).filter(|by| !by.is_empty());
    let (at, wish) = (wish.at, Wish { tcp: wish.tcp, opened_by, idle });
    // What a client was told is written must be in the newest moment.
    group.barrier().await.map_err(group_error)?;
    blocking(app, move |app| {
        let view = app.views.open(&group, &at, wish).map_err(view_error)?;
        Ok(json_answer(StatusCode::CREATED, &status::view_json(app, &view)))
    })
    .await?
}

fn view_error(e: ViewError) -> ApiError {
    let text = crate::chain(&e);
    match e {
        ViewError::Group(e) => group_error(e),
        ViewError::Resolve(ResolveError::NoSuchBookmark { .. }) => {
            not_found("no-such-bookmark", text, "list the bookmarks with `holdfast points`")
        }
        ViewError::Resolve(ResolveError::Corrupt(_) | ResolveError::Disk(_)) => internal(text),
        ViewError::Resolve(_) => {
            let remedy = "pick a point from `holdfast points`";
            ApiError::new(StatusCode::CONFLICT, "no-such-point", text, remedy)
        }
        ViewError::Open(_) | ViewError::TooMany => {
            ApiError::new(StatusCode::CONFLICT, "view-not-opened", text, "close views that are not needed any more")
        }
        ViewError::Export(_) | ViewError::Random => internal(text),
    }
}

fn verify(app: &Arc<App>, group: Arc<Group>) -> Result {
    let reader = group.reader().map_err(group_error)?;
    // A slow reader of lines slows the verification down: that is its bound.
    let (sender, receiver) = mpsc::channel::<Bytes>(16);
    let name = group.name().to_owned();
    let app = Arc::clone(app);
    tokio::task::spawn_blocking(move || {
        let line = |value: &Value| Bytes::from(format!("{value}\n"));
        let report = reader.verify(&mut |p| {
            let progress = json!({ "file": p.file, "done_bytes": p.done, "total_bytes": p.total });
            let _ = sender.blocking_send(line(&progress));
        });
        if !report.is_clean() {
            app.events.note(Event::ViewDamaged, &name, format!("verification found {} damages", report.damage_count));
        }
        let report = json!({
            "clean": report.is_clean(),
            "segments": report.segments,
            "records": report.records,
            "bytes": report.bytes,
            "base_blocks": report.base_blocks,
            "index_runs": report.index_runs,
            "index_wrong": report.index_wrong,
            "damage": report.damage.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "damage_count": report.damage_count,
            "unreadable": report.unreadable,
        });
        let _ = sender.blocking_send(line(&json!({ "report": report })));
    });
    let mut answer = Response::new(Lines(receiver).boxed());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    Ok(answer)
}

// ---- helpers

fn group_json(app: &App, group: &Group) -> Value {
    status::group_json(&status::group_report(app, group))
}

fn find(app: &App, id_or_name: &str) -> Result<Arc<Group>> {
    app.vault.find(id_or_name).ok_or_else(|| {
        not_found("no-such-group", format!("there is no group {id_or_name:?}"), "list them with `holdfast group list`")
    })
}

pub(super) fn ok(value: &Value) -> Answer {
    json_answer(StatusCode::OK, value)
}

pub(super) async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Arc<App>) -> T + Send + 'static,
) -> Result<T> {
    let app = Arc::clone(app);
    let done = tokio::task::spawn_blocking(move || work(&app)).await;
    done.map_err(|_| internal("the request failed on the box; its log says why".into()))
}

pub(super) async fn body<T: DeserializeOwned>(request: Request<Bytes>) -> Result<T> {
    let bytes = read_body(request).await?;
    serde_json::from_slice(&bytes)
        .map_err(|e| bad_request("body", format!("the request's JSON is not understood: {e}")))
}

async fn body_or_default<T: DeserializeOwned + Default>(request: Request<Bytes>) -> Result<T> {
    let bytes = read_body(request).await?;
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes)
        .map_err(|e| bad_request("body", format!("the request's JSON is not understood: {e}")))
}

pub(super) async fn read_body(request: Request<Bytes>) -> Result<Bytes> {
    Ok(request.into_body())
}

/// The body as it comes over a connection, bounded.
pub(super) async fn collect(request: Request<Incoming>) -> Result<Request<Bytes>> {
    let (head, body) = request.into_parts();
    let limited = Limited::new(body, BODY_MAX).collect().await;
    let body = limited.map_err(|_| bad_request("body", format!("it broke off or is longer than {BODY_MAX} bytes")))?;
    Ok(Request::from_parts(head, body.to_bytes()))
}

/// A parameter of the query, decoded.
pub(super) fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then(|| decode(value)).flatten()
    })
}

/// Undoes percent-encoding; None for what is none or no text.
fn decode(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok().filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

// ---- words for errors

pub(super) fn not_found(code: &'static str, message: String, remedy: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, code, message, remedy)
}
pub(super) fn no_route(path: &str) -> ApiError {
    let path: String = path.chars().take(200).collect();
    not_found(
        "no-such-route",
        format!("{path} is nothing this box answers"),
        "holdfast and holdfastd may be of different versions",
    )
}
pub(super) fn bad_request(field: &str, text: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "bad-request", format!("{field}: {text}"), "correct the request")
}
pub(super) fn internal(text: String) -> ApiError {
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        text,
        "look at the daemon's log (journalctl -u holdfastd)",
    )
}
fn no_random() -> ApiError {
    internal("the system gave no random bytes".into())
}

fn change_error(e: ChangeError<CatalogRefusal>) -> ApiError {
    let text = crate::chain(&e);
    match e {
        ChangeError::Catalog(_) => internal(text),
        ChangeError::Refused(CatalogRefusal::NoHost(_)) => {
            not_found("no-such-host", text, "list them with `holdfast host list`")
        }
        ChangeError::Refused(CatalogRefusal::RevokedAlready(_)) => {
            ApiError::new(StatusCode::CONFLICT, "revoked-already", text, "nothing is left to do")
        }
        ChangeError::Refused(CatalogRefusal::GroupName(_)) => {
            ApiError::new(StatusCode::CONFLICT, "name-taken", text, "choose another name")
        }
        ChangeError::Refused(CatalogRefusal::HasBranches(_)) => {
            ApiError::new(StatusCode::CONFLICT, "has-branches", text, "delete the branch first, or end what uses it")
        }
        ChangeError::Refused(CatalogRefusal::TooManyGroups | CatalogRefusal::TooManyTokens) => {
            ApiError::new(StatusCode::CONFLICT, "limit", text, "remove what is not needed any more")
        }
    }
}

fn group_error(e: GroupError) -> ApiError {
    let text = crate::chain(&e);
    match e {
        GroupError::Stopped { .. } => {
            let remedy =
                "`holdfast status` has the reason; a journal can be read with `holdfast inspect` and `holdfast export`";
            ApiError::new(StatusCode::CONFLICT, "group-stopped", text, remedy)
        }
        GroupError::Opening => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "group-opening", text, "try again in a moment")
        }
        GroupError::Closed => ApiError::new(StatusCode::CONFLICT, "group-closed", text, "the group is being deleted"),
        GroupError::Full { .. } => {
            let remedy = "make room on the data disk, shorten the window, or delete bookmarks";
            ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "journal-full", text, remedy)
        }
        GroupError::Bookmark(journal::BookmarkError::NoSuchBookmark { similar, .. }) => {
            let remedy = match similar.first() {
                Some(name) => format!("did you mean {:?}?", name.as_str()),
                None => "list the bookmarks with `holdfast points`".into(),
            };
            ApiError::new(StatusCode::NOT_FOUND, "no-such-bookmark", text, remedy)
        }
        GroupError::Hold(journal::HoldError::TooMany { .. }) => {
            ApiError::new(StatusCode::CONFLICT, "limit", text, "delete branches that are not needed any more")
        }
        GroupError::Hold(_) | GroupError::Append(_) | GroupError::Bookmark(_) | GroupError::Control(_) => {
            internal(text)
        }
    }
}

fn command_error(e: crate::links::CommandError) -> ApiError {
    use crate::links::CommandError as E;
    let text = e.to_string();
    match e {
        E::NotConnected | E::Disconnected => {
            let remedy = "start the agent on the host (systemctl start holdfast-agent) and look at its status";
            ApiError::new(StatusCode::CONFLICT, "host-disconnected", text, remedy)
        }
        E::Busy | E::NoAnswer => {
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "agent-busy", text, "look at the agent's status on the host")
        }
        E::Failed(_) => {
            ApiError::new(StatusCode::CONFLICT, "agent-refused", text, "look at the agent's log on the host")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_decoded_whatever_is_in_them() {
        assert_eq!(decode("a%2Fb%20%C3%BC"), Some("a/b ü".into()));
        for bad in ["%", "%2", "%zz", "%+1", "%ff", "%é"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
        assert_eq!(parameter("x=1&confirm=a%20b", "confirm"), Some("a b".into()));
        assert_eq!(parameter("x=1&confirm=a%20b", "y"), None);
    }

    #[test]
    fn recovery_points_are_written_as_the_document_says() {
        for (text, want) in [
            (r#"{"at":"latest"}"#, RecoveryPoint::Latest),
            (r#"{"at":{"lsn":7}}"#, RecoveryPoint::Lsn(model::Lsn(7))),
            (r#"{"at":{"time":9},"tcp":true}"#, RecoveryPoint::Time(model::HistoryTime(9))),
            (r#"{"at":{"bookmark":"x"}}"#, RecoveryPoint::Bookmark("x".parse().unwrap())),
        ] {
            assert_eq!(serde_json::from_str::<ViewWish>(text).unwrap().at, want);
        }
        assert!(serde_json::from_str::<ViewWish>(r#"{"at":"newest"}"#).is_err());
    }
}
