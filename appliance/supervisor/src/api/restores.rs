//! The routes of restores to machines.
//!
//! | request | does |
//! |---|---|
//! | `GET /restore-targets` | machines that wait, and their disks |
//! | `GET /restores`, `GET /restores/ID` | how far each is |
//! | `POST /restores` | begins one: `target`, `from` (a list of `{"point":{"group","at"}}` or `{"branch":{"group"}}`), `disks` (`group`, `volume`, `path`), `keep_old`, and an `id` of eight hexadecimal digits: the same wish under the same id is the same restore |
//! | `POST /restores/ID/finish` | the source is not written any more: one last pass |
//! | `POST /restores/ID/release` | of one that is done: the machine lets its disks go; `reboot` |
//! | `POST /restores/ID/cancel` | ends it where it is |

use super::{
    Answer, ApiError, json_answer,
    routes::{Result, bad_request, blocking, body, internal, no_route, not_found, ok},
};
use crate::{
    App, pki,
    restores::{DiskMap, RestoreFault, RestoreFrom, RestoreStatus, RestoreWish},
};
use bytes::Bytes;
use data_encoding::HEXLOWER;
use http::{Method, Request, StatusCode};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

pub async fn handle(app: &Arc<App>, request: Request<Bytes>, parts: &[&str]) -> Result {
    let method = request.method().clone();
    match (&method, parts) {
        (&Method::GET, ["restore-targets"]) => Ok(ok(&json!(app.restores.targets(app)))),
        (&Method::GET, ["restores"]) => Ok(ok(&json!(app.restores.list()))),
        (&Method::POST, ["restores"]) => {
            let wish: Wish = body(request).await?;
            blocking(app, move |app| begin(app, wish)).await?
        }
        (&Method::GET, ["restores", id]) => answer(app.restores.status(id)),
        (&Method::POST, ["restores", id, what @ ("finish" | "release" | "cancel")]) => {
            let (id, what) = ((*id).to_owned(), (*what).to_owned());
            let how: How = if what == "release" { body(request).await? } else { How::default() };
            blocking(app, move |app| {
                if app.restores.of_plans().iter().any(|(of, _)| *of == id) {
                    let text = format!("a standby follows by restore {id}: its plan begins it and ends it");
                    let remedy = "delete the plan, or give it another place";
                    return Err(ApiError::new(StatusCode::CONFLICT, "of-a-standby", text, remedy));
                }
                let of_run = app.takeovers.list().into_iter().find(|s| {
                    !s.is_over() && s.failback.as_ref().is_some_and(|f| f.restore == id && f.ended.is_none())
                });
                if let Some(run) = of_run {
                    let text =
                        format!("restore {id} is the failback's of run {}, which finishes and ends it itself", run.id);
                    let remedy = "look at the run with `holdfast run show`; `holdfast run rollback` ends its failback";
                    return Err(ApiError::new(StatusCode::CONFLICT, "of-a-failback", text, remedy));
                }
                answer(match what.as_str() {
                    "finish" => app.restores.finish(&id),
                    "release" => app.restores.release(&id, how.reboot),
                    _ => app.restores.cancel(app, &id),
                })
            })
            .await?
        }
        _ => Err(no_route(&format!("{method} {}", parts.join("/")))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    /// Made by who asks, so that it may ask again; else one is made here.
    #[serde(default)]
    id: Option<String>,
    target: String,
    from: Vec<RestoreFrom>,
    disks: Vec<DiskMap>,
    #[serde(default)]
    keep_old: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct How {
    reboot: bool,
}

fn begin(app: &Arc<App>, wish: Wish) -> Result {
    let Wish { id, target, from, disks, keep_old } = wish;
    let id = match id {
        Some(id) => id,
        None => {
            let random = pki::random_128().ok_or_else(|| internal("the system gave no random bytes".into()))?;
            HEXLOWER.encode(&random[..4])
        }
    };
    let wish = RestoreWish { target, from, disks, keep_old, lag_seconds: 0, collect: false, plan: None };
    let status = app.restores.begin(app, &id, wish).map_err(error)?;
    Ok(json_answer(StatusCode::CREATED, &json!(status)))
}

fn answer(status: std::result::Result<RestoreStatus, RestoreFault>) -> Result<Answer> {
    status.map(|status| ok(&json!(status))).map_err(error)
}

fn error(e: RestoreFault) -> ApiError {
    let text = crate::chain(&e);
    let conflict = |code, remedy: &str| ApiError::new(StatusCode::CONFLICT, code, text.clone(), remedy);
    match e {
        RestoreFault::Unknown(_) => not_found("no-such-restore", text, "list them with GET /restores"),
        RestoreFault::NoTarget(_) => not_found("no-such-target", text, "list them with `holdfast restore targets`"),
        RestoreFault::NoGroup(_) => not_found("no-such-group", text, "list them with `holdfast group list`"),
        RestoreFault::NoVolume { .. } => not_found("no-such-volume", text, "`holdfast group show` lists them"),
        RestoreFault::NoDisk { .. } => not_found("no-such-disk", text, "list them with `holdfast restore targets`"),
        RestoreFault::Id(_) => bad_request("id", text),
        RestoreFault::Disks | RestoreFault::Twice(_) => bad_request("disks", text),
        RestoreFault::KeepsNothing(_) => bad_request("keep_old", text),
        RestoreFault::Point { .. } => not_found("no-such-point", text, "list them with `holdfast points`"),
        RestoreFault::Group { .. } => conflict("group-stopped", "look at `holdfast status`"),
        RestoreFault::IdTaken(_) => conflict("id-taken", "take another id"),
        RestoreFault::Busy { .. } => conflict("target-busy", "cancel the other restore first"),
        RestoreFault::TooMany => conflict("limit", "cancel restores that are not needed any more"),
        RestoreFault::InUse { .. } => conflict("disk-in-use", "unmount it on the machine"),
        RestoreFault::Smaller { .. } => conflict("disk-too-small", "choose a disk that is as large"),
        RestoreFault::OtherDisk { .. } => {
            conflict("other-disk", "begin the restore again with the disks that are there")
        }
        RestoreFault::Over => conflict("restore-over", "begin another one: what is right already is not sent again"),
        RestoreFault::Pinned => conflict("not-now", "wait until it is done, or cancel it"),
        RestoreFault::NotDone => conflict("not-done", "wait until it is done, or cancel it"),
        RestoreFault::Thread(_) | RestoreFault::File(_) | RestoreFault::Encode(_) => internal(text),
    }
}
