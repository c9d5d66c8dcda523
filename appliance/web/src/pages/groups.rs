//! Groups: the list, and one group with its timeline, where a moment is picked and used.

use super::{overview::GroupRow, show};
use crate::{
    answers::{Event, Group, PlanEntry, Points, Policy, Status, View},
    frame::Frame,
    points::{self, Picked},
    request::encode,
    site::{Fault, Page, Visit},
    timeline::{self, Chart, Window},
};
use askama::Template;
use http::{Method, StatusCode};
use serde_json::{Value, json};

#[derive(Template)]
#[template(path = "pages/groups/list.html")]
struct List {
    p: Frame,
    groups: Vec<GroupRow>,
}

#[derive(Template)]
#[template(path = "pages/groups/page.html")]
struct One {
    p: Frame,
    row: GroupRow,
    policy: Policy,
    is_sync: bool,
    chart: Option<Chart>,
    points: Points,
    /// Why there is no history to draw.
    no_history: String,
    picked: Option<Picked>,
    /// What was typed and is none.
    bad_pick: String,
    views: Vec<View>,
    plans: Vec<String>,
    kept: Vec<(String, u64, u64)>,
    tcp: bool,
    at: String,
}

pub async fn list(v: &Visit) -> Page {
    let groups: Vec<Group> = v.get("groups").await?;
    let mut groups: Vec<GroupRow> = groups.into_iter().map(|g| GroupRow::new(v, g)).collect();
    groups.sort_by(|a, b| a.g.name.cmp(&b.g.name));
    show(&List { p: v.frame("groups", v.lang.t("menu.groups"), "groups"), groups })
}

pub async fn page(v: &Visit, id: &str) -> Page {
    let path = format!("groups/{}", encode(id));
    let group: Group = v.get(&path).await?;
    let status: Status = v.get("status").await?;
    let plans: Vec<PlanEntry> = v.get("plans").await?;
    let history = v.get_with::<Points>(&format!("{path}/points"), &format!("buckets={}", timeline::PIECES)).await;
    let (mut points, no_history) = match history {
        Ok(points) => (points, String::new()),
        Err(fault) => (Points::default(), fault.text),
    };
    for gap in &mut points.gaps {
        gap.reason = crate::words::code(v.lang, "gap", &gap.reason);
    }
    let query = v.ask.query();
    let at = query.get("at").to_owned();
    let picked = Picked::new(v.lang, if at.is_empty() { "latest" } else { &at }, &points);
    let at_us = picked.as_ref().and_then(|p| p.time_us).filter(|_| !at.is_empty());
    let base = format!("/groups/{}", encode(&group.id));
    let mine = |e: &&Event| e.subject == group.name || Some(&e.subject) == group.host_name.as_ref();
    let events: Vec<&Event> = status.events.iter().filter(mine).collect();
    let window = Window::new(query.get("from"), query.get("to"), &points);
    let chart = window.map(|w| timeline::draw(&base, w, &points, &events, &at, at_us));
    let of_group = |e: &PlanEntry| {
        let subject = &e.plan.subject;
        subject.groups.contains(&group.name) || (subject.host.is_some() && subject.host == group.host_name)
    };
    let kept = group.retention.iter().flat_map(|r| r.kept.iter());
    let kept = kept.filter(|(_, k)| k.segments > 0).map(|(why, k)| (why.clone(), k.segments, k.bytes)).collect();
    points.bookmarks.sort_by_key(|b| std::cmp::Reverse(b.time_us));
    let policy = group.policy.clone().unwrap_or_default();
    show(&One {
        p: v.frame("groups", group.name.clone(), &path),
        is_sync: policy.mode.get("sync").is_some(),
        policy,
        chart,
        points,
        no_history,
        bad_pick: if picked.is_none() { at.clone() } else { String::new() },
        picked,
        views: status.views.into_iter().filter(|view| view.group == group.name).collect(),
        plans: plans.into_iter().filter(of_group).map(|e| e.name).collect(),
        kept,
        tcp: status.nbd_listen.is_some(),
        at,
        row: GroupRow::new(v, group),
    })
}

/// An ingest target: for machines without an agent.
pub async fn create(v: &Visit) -> Page {
    let form = v.form();
    let size = form.get("gib").trim().parse::<f64>().ok().filter(|gib| *gib > 0.0 && *gib < 1e9);
    let Some(gib) = size else { return Err(v.refuse("groups.bad_size", "groups.bad_size_remedy")) };
    // Whole sectors.
    let bytes = (gib * f64::from(1 << 21)) as u64 * 512;
    let volume = match form.get("volume").trim() {
        "" => "disk",
        name => name,
    };
    let name = form.get("name").trim();
    let made = v.post("groups", &json!({ "name": name, "volumes": [{ "name": volume, "bytes": bytes }] })).await?;
    v.done(v.lang.fill("groups.made", &[name]), format!("/groups/{}", made["id"].as_str().unwrap_or_default()))
}

pub async fn act(v: &Visit, id: &str, what: &str) -> Page {
    let (form, path) = (v.form(), format!("groups/{}", encode(id)));
    let back = format!("/groups/{}", encode(id));
    match what {
        "bookmark" => {
            let name = form.get("name").trim();
            let consistency = if form.get("consistency") == "filesystem" { "filesystem" } else { "crash" };
            v.post(&format!("{path}/bookmarks"), &json!({ "name": name, "consistency": consistency })).await?;
            v.done(v.lang.fill("groups.bookmarked", &[name]), format!("{back}?at={}", encode(name)))
        }
        "bookmark-delete" => {
            let name = form.get("name");
            if form.get("confirm").trim() != name {
                return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
            }
            v.change(Method::DELETE, &format!("{path}/bookmarks/{}", encode(name)), "", &Value::Null).await?;
            v.done(v.lang.fill("groups.bookmark_deleted", &[name]), back)
        }
        "view" => {
            let at = form.get("at").to_owned();
            let point = points::parse(&at).ok_or_else(|| v.refuse("pick.bad", "pick.bad_remedy"))?;
            let body = json!({ "at": point, "tcp": form.has("tcp"), "opened_by": v.caller.name });
            let view = v.post(&format!("{path}/views"), &body).await?;
            let text = v.lang.fill(
                "groups.view_opened",
                &[&view["open_ms"].as_f64().map_or("?".into(), |ms| format!("{ms:.1} ms"))],
            );
            v.done(text, format!("{back}?at={}#views", encode(&at)))
        }
        "view-close" => {
            v.change(Method::DELETE, &format!("views/{}", encode(form.get("view"))), "", &Value::Null).await?;
            v.done(v.lang.t("groups.view_closed"), format!("{back}#views"))
        }
        "policy" => {
            let policy = policy_of(v)?;
            v.change(Method::PATCH, &format!("{path}/policy"), "", &policy).await?;
            v.done(v.lang.t("groups.policy_kept"), back)
        }
        "resync" => {
            v.post(&format!("{path}/resync"), &json!({})).await?;
            v.done(v.lang.t("groups.resync_begun"), back)
        }
        "delete" => {
            // The API compares the name itself.
            let confirm = form.get("confirm").trim();
            v.change(Method::DELETE, &path, &format!("confirm={}", encode(confirm)), &Value::Null).await?;
            v.done(v.lang.fill("groups.deleted", &[confirm]), "/groups")
        }
        _ => Err(Fault {
            status: StatusCode::NOT_FOUND,
            text: v.lang.t("fault.no_page").into(),
            remedy: v.lang.t("fault.no_page_remedy").into(),
        }),
    }
}

fn policy_of(v: &Visit) -> Result<Value, Fault> {
    let form = v.form();
    let bad = || v.refuse("groups.bad_number", "groups.bad_number_remedy");
    let number = |name: &str| form.get(name).trim().parse::<u64>().map_err(|_| bad());
    let mode = if form.get("mode") == "sync" {
        let hold = form.get("at_bound") == "hold";
        json!({ "sync": { "wait_ms_max": number("wait_ms_max")?, "at_bound": if hold { "hold" } else { "degrade" } } })
    } else {
        json!("async")
    };
    let room = match form.get("journal_gib").trim() {
        "" => Value::Null,
        text => json!(
            (text.parse::<f64>().ok().filter(|g| *g > 0.0 && *g < 1e9).ok_or_else(bad)? * f64::from(1 << 30)) as u64
        ),
    };
    Ok(json!({
        "mode": mode,
        "window_hours": number("window_hours")?,
        "window_hours_floor": number("window_hours_floor")?,
        "journal_bytes_max": room,
        "alarm_below_hours": number("alarm_below_hours")?,
        "priority": number("priority")?,
        "lag_ms_alarm": number("lag_ms_alarm")?,
    }))
}
