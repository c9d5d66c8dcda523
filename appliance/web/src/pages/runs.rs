//! Takeovers and drills: what they have come to, step by step as it happens, who is authoritative, and what can be done.

use super::{
    overview::{RunRow, run_rows},
    show,
};
use crate::{
    answers::{Run, Step, Target},
    frame::Frame,
    request::encode,
    site::{Page, Visit},
    words::{self, Tone},
};
use askama::Template;
use serde_json::{Value, json};

#[derive(Template)]
#[template(path = "pages/runs/list.html")]
struct List {
    p: Frame,
    runs: Vec<RunRow>,
}

struct StepRow {
    s: Step,
    title: String,
    tone: Tone,
}

/// Who is authoritative, which way data runs, and whether the host is fenced.
struct Picture {
    host: Tone,
    machine: Tone,
    host_says: String,
    machine_says: String,
    /// `forward`: from the host to the box; `back`: from the machine to the host's disks; empty: none.
    data: &'static str,
    fenced: bool,
    fence_says: String,
}

#[derive(Template)]
#[template(path = "pages/runs/page.html")]
struct One {
    p: Frame,
    r: Run,
    tone: Tone,
    steps: Vec<StepRow>,
    back_steps: Vec<StepRow>,
    picture: Picture,
    targets: Vec<Target>,
    has_screen: bool,
    is_over: bool,
    shipping: String,
}

pub async fn list(v: &Visit) -> Page {
    let runs = run_rows(v.get("runs").await?);
    show(&List { p: v.frame("runs", v.lang.t("menu.runs"), "runs"), runs })
}

fn rows(v: &Visit, steps: &[Step]) -> Vec<StepRow> {
    let row = |s: &Step| StepRow {
        title: v.lang.known(&format!("step.{}", s.step)).unwrap_or(&s.title).to_owned(),
        tone: words::outcome_tone(&s.outcome.is),
        s: s.clone(),
    };
    steps.iter().map(row).collect()
}

pub async fn page(v: &Visit, id: &str) -> Page {
    let path = format!("runs/{}", encode(id));
    let r: Run = v.get(&path).await?;
    let serves = r.kind == "failover" && r.phase.is == "serving";
    let targets = if serves && v.frame_operates() { v.get("restore-targets").await? } else { Vec::new() };
    let taken = r.steps.iter().any(|s| s.step == "picture" && s.outcome.is == "done");
    show(&One {
        p: v.frame("runs", format!("{} {}", words::code(v.lang, "kind", &r.kind), r.plan_name), &path),
        tone: words::run_tone(&r.phase.is, &r.kind),
        steps: rows(v, &r.steps),
        back_steps: r.failback.as_ref().map(|f| rows(v, &f.steps)).unwrap_or_default(),
        picture: picture(v, &r),
        targets,
        has_screen: taken,
        is_over: r.phase.is == "ended",
        shipping: r.shipping.as_ref().map(|s| shipping(v, s)).unwrap_or_default(),
        r,
    })
}

/// How far a copy is, in words.
pub fn shipping(v: &Visit, s: &crate::answers::Shipping) -> String {
    let bytes = crate::format::bytes;
    match s.is.as_str() {
        "waiting" => s.why.clone(),
        "failed" => format!("{}. {}", s.text, s.remedy),
        "keeping" | "copying" => {
            let (done, total) = (s.done_bytes.unwrap_or(0), s.total_bytes.unwrap_or(0));
            v.lang.fill("ship.of", &[&bytes(done), &bytes(total)])
        }
        "following" => v.lang.fill("ship.behind", &[&bytes(s.behind_bytes.unwrap_or(0))]),
        "finishing" => v.lang.fill("ship.left", &[&bytes(s.left_bytes.unwrap_or(0))]),
        _ => String::new(),
    }
}

fn picture(v: &Visit, r: &Run) -> Picture {
    let t = |key: &str| v.lang.t(key).to_owned();
    let phase = r.phase.is.as_str();
    let back = |step: &str| {
        r.failback.as_ref().is_some_and(|f| f.steps.iter().any(|s| s.step == step && s.outcome.is == "done"))
    };
    let runs = r.started && !matches!(phase, "returned" | "committed" | "ending" | "ended");
    let machine_says = if runs { t("picture.runs") } else { t("picture.down") };
    if r.kind != "failover" || phase == "ended" {
        let data = if phase == "ended" { "" } else { "forward" };
        let machine = if runs { Tone::Busy } else { Tone::Idle };
        let machine_says = if runs { t("picture.apart") } else { machine_says };
        return Picture {
            host: Tone::Good,
            machine,
            host_says: t("picture.authoritative"),
            machine_says,
            data,
            fenced: false,
            fence_says: String::new(),
        };
    }
    let fence_says = r.fenced.as_ref().map(|f| match f.by.as_str() {
        "lease" => v.lang.fill("picture.by_lease", &[&f.term.to_string()]),
        "word" => v.lang.fill("picture.by_word", &[&f.who]),
        _ => t("picture.by_hook"),
    });
    let fenced = fence_says.is_some();
    let (host, machine, host_says, machine_says, data) = match phase {
        "serving" => (Tone::Idle, Tone::Good, t("picture.off"), t("picture.authoritative"), ""),
        "failing-back" if !back("pause") => {
            (Tone::Busy, Tone::Good, t("picture.receives"), t("picture.authoritative"), "back")
        }
        "failing-back" if !back("restart") => {
            (Tone::Busy, Tone::Idle, t("picture.receives"), t("picture.down"), "back")
        }
        "failing-back" | "returned" | "committed" => {
            (Tone::Good, Tone::Idle, t("picture.authoritative"), t("picture.kept"), "forward")
        }
        _ if fenced => (Tone::Idle, Tone::Busy, t("picture.off"), machine_says, ""),
        _ => (Tone::Warn, Tone::Idle, t("picture.unsure"), machine_says, ""),
    };
    // Once the host has its ownership back it is no longer fenced.
    let fenced = fenced && host != Tone::Good;
    Picture { host, machine, host_says, machine_says, data, fenced, fence_says: fence_says.unwrap_or_default() }
}

pub async fn act(v: &Visit, id: &str, what: &str) -> Page {
    let (form, path) = (v.form(), format!("runs/{}", encode(id)));
    let word = form.has("off").then(|| v.caller.name.clone());
    let by = &v.caller.name;
    let (body, said) = match what {
        "end" => (json!({ "confirm": form.get("confirm").trim() }), v.lang.t("runs.ending")),
        "again" => (json!({ "source_is_off": word }), v.lang.t("runs.again_begun")),
        "promote" => {
            (json!({ "source_is_off": word, "confirm": form.get("confirm").trim() }), v.lang.t("runs.promoting"))
        }
        "commit" => (json!({ "by": by }), v.lang.t("runs.committed")),
        "rollback" => {
            let run: Run = v.get(&path).await?;
            if form.get("confirm").trim() != run.plan_name {
                return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
            }
            (json!({ "by": by, "source_is_off": word }), v.lang.t("runs.rolling_back"))
        }
        "failback" => {
            let target = form.get("target");
            if target.is_empty() || form.get("confirm").trim() != target {
                return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
            }
            let minutes = form.get("commit_minutes").trim().parse::<u64>();
            let minutes = minutes.map_err(|_| v.refuse("groups.bad_number", "groups.bad_number_remedy"))?;
            let body = json!({ "target": target, "by": by, "commit_minutes": minutes });
            (body, v.lang.t("runs.failback_begun"))
        }
        _ => return Err(v.refuse("fault.no_page", "fault.no_page_remedy")),
    };
    // A restored address of an API that would refuse an empty word is the API's to refuse, with its own words.
    let body = match body {
        Value::Object(map) => Value::Object(map.into_iter().filter(|(_, v)| !v.is_null() && v != "").collect()),
        other => other,
    };
    v.post(&format!("{path}/{what}"), &body).await?;
    v.done(said, format!("/runs/{}", encode(id)))
}
