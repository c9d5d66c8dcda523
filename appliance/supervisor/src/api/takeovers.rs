//! Routes of plans, takeovers and drills.
//!
//! | request | does |
//! |---|---|
//! | `GET /plans`, `GET /plans/NAME` | names; a plan as it was written |
//! | `GET /plan-example` | a plan with every key |
//! | `PUT /plans/NAME` | checks a plan whole and keeps it; with `?check=1` only checks |
//! | `DELETE /plans/NAME` | |
//! | `GET /plan-status` | of each host that a plan leases or watches: who owns it, by what, and what is seen of it, with every reason |
//! | `POST /owners/HOST` | `owner` (`host`, `box`), `confirm` (the host's name): an operator says who owns it, when the box does not know |
//! | `GET /runs`, `GET /runs/ID` | what takeovers and drills have come to |
//! | `POST /runs` | begins one: `plan`, `kind` (`failover`, `drill`), `at`, `source_is_off`, `hold`, `dry_run`; a migration of a host that lives: `planned`, and `to` (`box`, `export`) where it is to go elsewhere than the plan says |
//! | `POST /runs/ID/end` | takes its machine down and throws away what it wrote; a failover asks for `confirm`, its plan's name |
//! | `POST /runs/ID/again` | tries what failed again; starts a machine again that has ended |
//! | `POST /runs/ID/promote` | makes a drill a takeover, with what was written in it: `source_is_off`, `confirm` |
//! | `POST /runs/ID/failback` | brings what the machine wrote to the host's own disks: `target`, `disks`, `by`, `commit_minutes` |
//! | `POST /runs/ID/serves`, `stopped` | of an export: the machine at the other hypervisor serves; is off: `by` |
//! | `POST /runs/ID/commit` | the host serves well after a failback: `by` |
//! | `POST /runs/ID/rollback` | the machine shall serve again: `by`, `source_is_off` |
//! | `GET /runs/ID/screen`, `serial`, `record`, `signature` | its evidence |
//! | `GET /records-key` | the public key records are signed with |

use super::{
    ApiError, json_answer, plain,
    routes::{Result, bad_request, blocking, body, internal, no_route, not_found, ok, read_body},
};
use crate::{
    App,
    takeovers::{PlanFault, RunFault, Wish, run_json},
};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use model::{HostId, Owner, RecoveryPoint};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc};
use takeover::{
    plan::{Place, Plan, Subject},
    run::{Asked, FailbackWish},
    state::{BackDisk, Kind, Step},
};

pub async fn handle(app: &Arc<App>, request: Request<Bytes>, parts: &[&str], query: &str) -> Result {
    let method = request.method().clone();
    match (&method, parts) {
        (&Method::GET, ["plans"]) => blocking(app, |app| plans(app)).await?,
        (&Method::GET, ["plan-example"]) => Ok(plain(StatusCode::OK, "application/toml", takeover::plan::EXAMPLE)),
        (&Method::GET, ["plans", name]) => {
            let name = (*name).to_owned();
            blocking(app, move |app| {
                let text = app.takeovers.plan_text(&name).map_err(plan_error)?;
                Ok(plain(StatusCode::OK, "application/toml", text))
            })
            .await?
        }
        (&Method::PUT, ["plans", name]) => {
            let (name, only_check) = ((*name).to_owned(), super::routes::parameter(query, "check").is_some());
            let text = read_body(request).await?;
            let text =
                String::from_utf8(text.to_vec()).map_err(|_| bad_request("body", "a plan is text in UTF-8".into()))?;
            blocking(app, move |app| set_plan(app, &name, &text, only_check)).await?
        }
        (&Method::DELETE, ["plans", name]) => {
            let name = (*name).to_owned();
            blocking(app, move |app| {
                app.takeovers.delete_plan(&name).map_err(plan_error)?;
                app.takeovers.settle(app);
                Ok(ok(&json!({ "deleted": name })))
            })
            .await?
        }
        (&Method::GET, ["plan-status"]) => blocking(app, |app| Ok(ok(&plan_status(app)))).await?,
        (&Method::POST, ["owners", host]) => {
            let wish: OwnerWish = body(request).await?;
            let host = (*host).to_owned();
            blocking(app, move |app| adopt(app, &host, &wish)).await?
        }
        (&Method::GET, ["runs"]) => {
            let runs: Vec<Value> = app.takeovers.list().iter().map(|s| run_json(app, s)).collect();
            Ok(ok(&json!(runs)))
        }
        (&Method::POST, ["runs"]) => {
            let wish: RunWish = body(request).await?;
            blocking(app, move |app| begin(app, wish)).await?
        }
        (&Method::GET, ["runs", id]) => {
            let state = app.takeovers.state(id).map_err(run_error)?;
            Ok(ok(&run_json(app, &state)))
        }
        (&Method::POST, ["runs", id, "end"]) => {
            let wish: EndWish = body(request).await?;
            let id = (*id).to_owned();
            blocking(app, move |app| end(app, &id, &wish)).await?
        }
        (
            &Method::POST,
            ["runs", id, what @ ("again" | "promote" | "failback" | "serves" | "stopped" | "commit" | "rollback")],
        ) => {
            let wish: AskWish = body(request).await?;
            let (id, what) = ((*id).to_owned(), (*what).to_owned());
            blocking(app, move |app| ask(app, &id, &what, wish)).await?
        }
        (&Method::GET, ["runs", id, what @ ("screen" | "serial" | "record" | "signature")]) => {
            let (id, what) = ((*id).to_owned(), (*what).to_owned());
            blocking(app, move |app| evidence(app, &id, &what)).await?
        }
        (&Method::GET, ["records-key"]) => {
            Ok(ok(&json!({ "algorithm": "ed25519", "public_key": app.takeovers.public_key() })))
        }
        _ => Err(no_route(&format!("{method} {}", parts.join("/")))),
    }
}

fn plans(app: &App) -> Result {
    let names = app.takeovers.plan_names().map_err(|e| internal(crate::chain(&e)))?;
    let list: Vec<Value> = names
        .iter()
        .map(|name| match app.takeovers.plan(name) {
            Ok(plan) => json!({ "name": name, "plan": plan }),
            // One that an editor on the box has spoilt.
            Err(e) => json!({ "name": name, "fault": crate::chain(&e) }),
        })
        .collect();
    Ok(ok(&json!(list)))
}

fn set_plan(app: &App, name: &str, text: &str, only_check: bool) -> Result {
    let plan = if only_check {
        Plan::parse(text).map_err(|e| plan_error(e.into()))?
    } else {
        app.takeovers.set_plan(name, text).map_err(plan_error)?
    };
    if !only_check {
        app.takeovers.settle(app);
    }
    Ok(ok(&json!({ "name": name, "plan": plan, "kept": !only_check })))
}

/// One entry for each host that a plan leases or watches, or has.
pub(super) fn plan_status(app: &App) -> Value {
    let data = app.catalog.data();
    let name = |id: HostId| data.host(id).map_or_else(|| id.to_string(), |h| h.name.clone());
    let mut hosts: BTreeMap<HostId, Value> = BTreeMap::new();
    for (id, report) in app.ownership.reports() {
        hosts.insert(id, json!({ "host": name(id), "host_id": id, "plan": report.plan, "ownership": report }));
    }
    for watched in app.takeovers.watched(app) {
        let entry =
            hosts.entry(watched.host).or_insert_with(|| json!({ "host": watched.name, "host_id": watched.host }));
        entry["plan"] = json!(watched.plan);
        entry["seen"] = json!(app.watch.seen(watched.host));
    }
    for entry in hosts.values_mut() {
        let standby = entry["plan"].as_str().and_then(|plan| app.takeovers.standby_report(app, plan));
        if let Some(standby) = standby {
            entry["standby"] = standby;
        }
    }
    hosts.into_values().collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnerWish {
    owner: Owner,
    #[serde(default)]
    confirm: Option<String>,
}

fn adopt(app: &Arc<App>, name: &str, wish: &OwnerWish) -> Result {
    let data = app.catalog.data();
    let host = data.find_host(name);
    let host = host.ok_or_else(|| {
        not_found("no-such-host", format!("there is no host {name:?}"), "list them with `holdfast host list`")
    })?;
    if matches!(wish.owner, Owner::Standby(_)) {
        return Err(bad_request("owner", "host or box is expected".into()));
    }
    if let Some(run) = app.takeovers.open_failover(&Subject::Host(host.name.clone())) {
        let text = format!("run {} of plan {:?} is open", run.id, run.plan_name);
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "plan-in-use",
            text,
            "end it: the host gets back what is its own",
        ));
    }
    if wish.confirm.as_deref() != Some(&host.name) {
        let text = format!("{} will own {}: if that is false, two may serve at once", wish.owner, host.name);
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "confirm-needed",
            text,
            "repeat it with the host's name as confirm",
        ));
    }
    app.ownership.adopt(host.id, wish.owner).map_err(internal)?;
    Ok(ok(&json!(app.ownership.report(host.id))))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RunWish {
    plan: String,
    kind: Kind,
    #[serde(default)]
    at: Option<RecoveryPoint>,
    /// Whoever presses the button says that the host is off, and who that is.
    #[serde(default)]
    source_is_off: Option<String>,
    #[serde(default)]
    hold: bool,
    #[serde(default)]
    planned: bool,
    #[serde(default)]
    to: Option<Place>,
    #[serde(default)]
    dry_run: bool,
}

fn begin(app: &Arc<App>, wish: RunWish) -> Result {
    if wish.planned && (wish.kind == Kind::Drill || wish.at.is_some() || wish.source_is_off.is_some()) {
        let text =
            "a migration is of a host that lives, to its newest moment: no drill, no `at` and no `source_is_off`";
        return Err(bad_request("planned", text.into()));
    }
    if wish.to.is_some() && !wish.planned {
        return Err(bad_request(
            "to",
            "a takeover goes where its plan says; only a migration is sent elsewhere".into(),
        ));
    }
    if let Some(to @ Place::Standby(_)) = &wish.to
        && app.takeovers.plan(&wish.plan).map_err(plan_error)?.place != *to
    {
        return Err(bad_request("to", "the plan has no such standby: it must say what that one starts".into()));
    }
    if let Some(at) = &wish.at {
        let plan = app.takeovers.plan(&wish.plan).map_err(plan_error)?;
        let fits = app.takeovers.one_moment(app, &plan, at);
        fits.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, "several-groups", e.text, e.remedy))?;
    }
    if wish.dry_run {
        let plan = app.takeovers.plan(&wish.plan).map_err(plan_error)?;
        let skipped = |step: &Step| {
            let is_drill = wish.kind == Kind::Drill;
            let away = !is_drill && wish.to.as_ref().unwrap_or(&plan.place) != &Place::Box;
            match step {
                Step::Volumes | Step::Address | Step::Applications | Step::Picture if away => true,
                Step::HookBefore => is_drill || plan.hooks.before.is_none(),
                Step::HookAfter => is_drill || plan.hooks.after.is_none(),
                Step::Fence => is_drill,
                Step::Volumes => !plan.machine.agent,
                Step::Address => plan.networks.iter().all(|n| n.addresses.is_empty()),
                Step::Applications => plan.applications.is_empty(),
                _ => false,
            }
        };
        let steps: Vec<Value> = Step::ALL
            .into_iter()
            .filter(|s| !skipped(s))
            .map(|step| json!({ "step": step, "title": step.title() }))
            .collect();
        return Ok(ok(&json!({ "dry_run": true, "plan": plan, "steps": steps })));
    }
    let source_is_off = wish.source_is_off.map(|who| crate::catalog::clean_name(&who, "somebody"));
    let wish = Wish {
        plan: wish.plan,
        kind: wish.kind,
        at: wish.at,
        source_is_off,
        hold: wish.hold,
        planned: wish.planned,
        to: wish.to,
        decision: None,
        detection_ms: None,
    };
    let state = app.takeovers.begin(app, wish).map_err(run_error)?;
    Ok(json_answer(StatusCode::CREATED, &run_json(app, &state)))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct EndWish {
    confirm: Option<String>,
}

fn end(app: &Arc<App>, id: &str, wish: &EndWish) -> Result {
    let state = app.takeovers.state(id).map_err(run_error)?;
    if state.kind == Kind::Failover && !state.points.is_empty() && wish.confirm.as_deref() != Some(&state.plan_name) {
        let text = format!("the machine of {:?} ends, and what was written in it is thrown away", state.plan_name);
        let remedy = "repeat it with the plan's name as confirm";
        return Err(ApiError::new(StatusCode::CONFLICT, "confirm-needed", text, remedy));
    }
    let state = app.takeovers.end(app, id).map_err(run_error)?;
    Ok(ok(&run_json(app, &state)))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct AskWish {
    confirm: Option<String>,
    source_is_off: Option<String>,
    by: Option<String>,
    target: Option<String>,
    disks: Vec<BackDisk>,
    commit_minutes: Option<u64>,
}

/// Nobody is content at once, and nobody waits a month.
const COMMIT_MINUTES: std::ops::RangeInclusive<u64> = 1..=43_200;
const COMMIT_MINUTES_DEFAULT: u64 = 60;

fn ask(app: &Arc<App>, id: &str, what: &str, wish: AskWish) -> Result {
    let clean = |who: Option<String>| who.map(|who| crate::catalog::clean_name(&who, "somebody"));
    let by = clean(wish.by).unwrap_or_else(|| "somebody".into());
    let source_is_off = clean(wish.source_is_off);
    let asked = match what {
        "again" => Asked::Again { source_is_off },
        "promote" => {
            let state = app.takeovers.state(id).map_err(run_error)?;
            if wish.confirm.as_deref() != Some(&state.plan_name) {
                let text = format!(
                    "the drill of {:?} becomes a takeover: its machine gets the host's addresses",
                    state.plan_name
                );
                let remedy = "repeat it with the plan's name as confirm";
                return Err(ApiError::new(StatusCode::CONFLICT, "confirm-needed", text, remedy));
            }
            Asked::Promote { source_is_off }
        }
        "serves" => Asked::Serves { by },
        "stopped" => Asked::Stopped { by },
        "commit" => Asked::Commit { by },
        "rollback" => Asked::RollBack { by, source_is_off },
        _ => {
            let target =
                wish.target.ok_or_else(|| bad_request("target", "which restore target gets the data?".into()))?;
            let commit_minutes = wish.commit_minutes.unwrap_or(COMMIT_MINUTES_DEFAULT);
            if !COMMIT_MINUTES.contains(&commit_minutes) {
                let (least, most) = COMMIT_MINUTES.into_inner();
                return Err(bad_request("commit_minutes", format!("give {least} to {most} minutes")));
            }
            let restore = app.takeovers.fresh_id().map_err(run_error)?;
            Asked::Failback(FailbackWish { restore, target, disks: wish.disks, by, commit_minutes })
        }
    };
    let state = app.takeovers.ask(app, id, asked).map_err(run_error)?;
    Ok(ok(&run_json(app, &state)))
}

fn evidence(app: &App, id: &str, what: &str) -> Result {
    let (file, kind) = match what {
        "screen" => ("screen.png", "image/png"),
        "serial" => ("serial.log", "text/plain; charset=utf-8"),
        "record" => ("record.json", "application/json"),
        _ => ("record.sig", "text/plain; charset=utf-8"),
    };
    let bytes = app.takeovers.evidence(id, file).map_err(run_error)?;
    let bytes = bytes
        .ok_or_else(|| not_found("no-evidence", format!("run {id} has no {file}"), "it may not have come so far"))?;
    Ok(plain(StatusCode::OK, kind, bytes))
}

fn plan_error(e: PlanFault) -> ApiError {
    let text = crate::chain(&e);
    match e {
        PlanFault::Unknown(_) => not_found("no-such-plan", text, "list them with `holdfast plan list`"),
        PlanFault::Name(_) => bad_request("name", text),
        PlanFault::Plan(_) => {
            ApiError::new(StatusCode::BAD_REQUEST, "bad-plan", text, "correct the lines named; nothing was kept")
        }
        PlanFault::TooMany => {
            ApiError::new(StatusCode::CONFLICT, "limit", text, "delete plans that are not needed any more")
        }
        PlanFault::Twice { .. } => {
            ApiError::new(StatusCode::CONFLICT, "plan-twice", text, "take [lease] and [detect] out of one of them")
        }
        PlanFault::Agent(_) => ApiError::new(StatusCode::BAD_REQUEST, "bad-plan", text, "correct it; nothing was kept"),
        PlanFault::InUse(_) => ApiError::new(StatusCode::CONFLICT, "plan-in-use", text, "end the run first"),
        PlanFault::File(_) => internal(text),
    }
}

fn run_error(e: RunFault) -> ApiError {
    let text = crate::chain(&e);
    match e {
        RunFault::Plan(e) => plan_error(e),
        RunFault::Unknown(_) => not_found("no-such-run", text, "list them with `holdfast run list`"),
        RunFault::Already { .. } => {
            ApiError::new(StatusCode::CONFLICT, "already", text, "look at it with `holdfast run show`")
        }
        RunFault::TooMany => {
            ApiError::new(StatusCode::CONFLICT, "limit", text, "end runs that are not needed any more")
        }
        RunFault::Unreadable(_) => {
            let remedy = "see that no machine of theirs runs, then move their folders out of takeovers/ in the data folder and restart the daemon";
            ApiError::new(StatusCode::CONFLICT, "runs-unreadable", text, remedy)
        }
        RunFault::NotNow { .. } => {
            ApiError::new(StatusCode::CONFLICT, "not-now", text, "look at it with `holdfast run show`")
        }
        RunFault::Over => ApiError::new(StatusCode::CONFLICT, "run-over", text, "nothing is left to do"),
        RunFault::Hands(e) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", text, &e.remedy),
        RunFault::Thread(_) | RunFault::Random => internal(text),
    }
}
