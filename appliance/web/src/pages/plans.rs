//! Plans: what is to be done when a host is lost, as a text that is checked as a whole; and the page a run begins from.

use super::show;
use crate::{
    answers::{PlanEntry, PlanStatus},
    frame::Frame,
    points,
    request::encode,
    site::{Fault, Page, Visit},
    words::Tone,
};
use askama::Template;
use http::Method;
use serde_json::{Value, json};

#[derive(Template)]
#[template(path = "pages/plans/list.html")]
struct List {
    p: Frame,
    plans: Vec<PlanEntry>,
    status: Vec<StatusRow>,
}

struct StatusRow {
    s: PlanStatus,
    owner: String,
    tone: Tone,
}

#[derive(Template)]
#[template(path = "pages/plans/edit.html")]
struct Edit {
    p: Frame,
    /// Empty: a new one.
    name: String,
    typed_name: String,
    text: String,
    faults: Vec<String>,
    remedy: String,
    checked: bool,
}

#[derive(Template)]
#[template(path = "pages/plans/begin.html")]
struct Begin {
    p: Frame,
    name: String,
    drill: bool,
    at: String,
    subject: String,
    steps: Vec<String>,
    leased: bool,
}

fn owner_text(v: &Visit, owner: &Value) -> String {
    match owner.as_str() {
        Some("host") => v.lang.t("owner.host").into(),
        Some("box") => v.lang.t("owner.box").into(),
        _ => v.lang.t("owner.standby").into(),
    }
}

pub async fn list(v: &Visit) -> Page {
    let plans = v.get("plans").await?;
    let status: Vec<PlanStatus> = v.get("plan-status").await?;
    let row = |s: PlanStatus| StatusRow {
        owner: s.ownership.as_ref().map(|o| owner_text(v, &o.owner)).unwrap_or_default(),
        tone: match s.seen.as_ref().map(|s| s.verdict.as_str()) {
            Some("well") => Tone::Good,
            Some("watching") => Tone::Busy,
            Some("doubt") => Tone::Warn,
            Some("takeover") => Tone::Bad,
            _ => Tone::Idle,
        },
        s,
    };
    let status = status.into_iter().map(row).collect();
    show(&List { p: v.frame("plans", v.lang.t("menu.plans"), "plan-status"), plans, status })
}

pub async fn edit(v: &Visit, name: Option<&str>) -> Page {
    let text = match name {
        Some(name) => v.text(&format!("plans/{}", encode(name))).await?,
        None => v.text("plan-example").await?,
    };
    let title = name.map_or_else(|| v.lang.t("plans.new").to_owned(), str::to_owned);
    show(&Edit {
        p: v.frame("plans", title, ""),
        name: name.unwrap_or_default().into(),
        typed_name: String::new(),
        text,
        faults: Vec::new(),
        remedy: String::new(),
        checked: false,
    })
}

pub async fn keep(v: &Visit, name: Option<&str>) -> Page {
    let form = v.form();
    let typed = form.get("name").trim().to_owned();
    let called = name.unwrap_or(&typed).to_owned();
    let path = format!("plans/{}", encode(&called));
    match form.get("do") {
        "delete" => {
            if form.get("confirm").trim() != called {
                return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
            }
            v.change(Method::DELETE, &path, "", &Value::Null).await?;
            return v.done(v.lang.fill("plans.deleted", &[&called]), "/plans");
        }
        "check" | "keep" => {}
        _ => return Err(v.refuse("fault.no_page", "fault.no_page_remedy")),
    }
    // Browsers send CRLF.
    let text = form.get("text").replace("\r\n", "\n");
    let only_check = form.get("do") == "check";
    let to = if only_check && called.is_empty() { "plans/check".to_owned() } else { path };
    let query = if only_check { "check=1" } else { "" };
    let body = bytes::Bytes::from(text.clone());
    let (faults, remedy) = match crate::site::call(&v.web, &v.caller, Method::PUT, &to, query, body).await {
        Ok(_) if !only_check => return v.done(v.lang.fill("plans.kept", &[&called]), "/plans"),
        Ok(_) => (Vec::new(), String::new()),
        Err(fault) => (list_of(&fault), fault.remedy),
    };
    // What was typed is not lost with a fault in it.
    show(&Edit {
        p: v.frame("plans", if called.is_empty() { v.lang.t("plans.new").to_owned() } else { called }, ""),
        name: name.unwrap_or_default().into(),
        typed_name: typed,
        text,
        checked: faults.is_empty(),
        faults,
        remedy,
    })
}

/// The API names all faults in one sentence.
fn list_of(fault: &Fault) -> Vec<String> {
    let all = match fault.text.split_once(": ") {
        Some((head, rest)) if head.starts_with("the plan has") => rest,
        _ => fault.text.as_str(),
    };
    all.split("; ").map(str::to_owned).collect()
}

pub async fn begin(v: &Visit, name: &str) -> Page {
    let query = v.ask.query();
    let drill = query.get("kind") != "failover";
    let kind = if drill { "drill" } else { "failover" };
    let dry = if v.caller.role >= crate::access::Role::Operator {
        v.post("runs", &json!({ "plan": name, "kind": kind, "dry_run": true })).await?
    } else {
        return Err(v.refuse("fault.role", "fault.role_remedy"));
    };
    let plan: crate::answers::Plan = serde_json::from_value(dry["plan"].clone()).unwrap_or_default();
    let step = |s: &Value| crate::words::code(v.lang, "step", s["step"].as_str().unwrap_or_default());
    let title = v.lang.fill(if drill { "begin.drill_title" } else { "begin.takeover_title" }, &[name]);
    show(&Begin {
        p: v.frame("plans", title, ""),
        name: name.into(),
        drill,
        at: query.get("at").into(),
        subject: plan.subject.name(),
        steps: dry["steps"].as_array().into_iter().flatten().map(step).collect(),
        leased: plan.lease.is_some(),
    })
}

pub async fn begun(v: &Visit, name: &str) -> Page {
    let form = v.form();
    let drill = form.get("kind") == "drill";
    if !drill && form.get("confirm").trim() != form.get("subject") {
        return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
    }
    let at = match form.get("at").trim() {
        "" => Value::Null,
        text => json!(points::parse(text).ok_or_else(|| v.refuse("pick.bad", "pick.bad_remedy"))?),
    };
    let word = form.has("off").then(|| v.caller.name.clone());
    let body = json!({
        "plan": name,
        "kind": if drill { "drill" } else { "failover" },
        "at": at,
        "hold": form.has("hold"),
        "source_is_off": if drill { None } else { word },
    });
    let run = v.post("runs", &body).await?;
    v.done(v.lang.t("begin.begun"), format!("/runs/{}", run["id"].as_str().unwrap_or_default()))
}
