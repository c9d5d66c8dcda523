//! Restores to machines that wait.

use super::{runs::shipping, show};
use crate::{
    answers::{Group, Restore, Target},
    frame::Frame,
    points,
    request::encode,
    site::{Page, Visit},
};
use askama::Template;
use serde_json::{Value, json};

struct Row {
    r: Restore,
    says: String,
    percent: Option<u64>,
}

#[derive(Template)]
#[template(path = "pages/restores/list.html")]
struct List {
    p: Frame,
    restores: Vec<Row>,
    targets: Vec<Target>,
    groups: Vec<Group>,
}

#[derive(Template)]
#[template(path = "pages/restores/choose.html")]
struct Choose {
    p: Frame,
    group: Group,
    target: Target,
    at: String,
}

pub async fn list(v: &Visit) -> Page {
    let restores: Vec<Restore> = v.get("restores").await?;
    let row = |r: Restore| {
        let (done, total) = (r.phase.done_bytes, r.phase.total_bytes.filter(|t| *t > 0));
        Row { says: shipping(v, &r.phase), percent: done.zip(total).map(|(d, t)| d.min(t) * 100 / t), r }
    };
    show(&List {
        p: v.frame("restores", v.lang.t("menu.restores"), "restores"),
        restores: restores.into_iter().map(row).collect(),
        targets: v.get("restore-targets").await?,
        groups: v.get("groups").await?,
    })
}

pub async fn choose(v: &Visit) -> Page {
    let query = v.ask.query();
    let group = v.get(&format!("groups/{}", encode(query.get("group")))).await?;
    let targets: Vec<Target> = v.get("restore-targets").await?;
    let target = targets.into_iter().find(|t| t.host == query.get("target"));
    let target = target.ok_or_else(|| v.refuse("restores.gone", "restores.gone_remedy"))?;
    let at = match query.get("at").trim() {
        "" => "latest",
        at => at,
    };
    show(&Choose { p: v.frame("restores", v.lang.t("restores.new"), ""), group, target, at: at.into() })
}

pub async fn begin(v: &Visit) -> Page {
    let form = v.form();
    if form.get("target_name").is_empty() || form.get("confirm").trim() != form.get("target_name") {
        return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
    }
    let at = points::parse(form.get("at")).ok_or_else(|| v.refuse("pick.bad", "pick.bad_remedy"))?;
    let group = form.get("group");
    let disk = |(volume, path): (&str, &str)| {
        let volume: u32 = volume.parse().ok()?;
        (!path.is_empty()).then(|| json!({ "group": group, "volume": volume, "path": path }))
    };
    let disks: Vec<Value> = form.with_prefix("disk.").filter_map(disk).collect();
    let body = json!({
        "target": form.get("target"),
        "from": [{ "point": { "group": group, "at": at } }],
        "disks": disks,
    });
    v.post("restores", &body).await?;
    v.done(v.lang.t("restores.begun"), "/restores")
}

pub async fn act(v: &Visit, id: &str, what: &str) -> Page {
    let (path, form) = (format!("restores/{}/{}", encode(id), encode(what)), v.form());
    let (body, said) = match what {
        "release" => (json!({ "reboot": form.has("reboot") }), v.lang.t("restores.released")),
        "cancel" => (json!({}), v.lang.t("restores.cancelled")),
        _ => return Err(v.refuse("fault.no_page", "fault.no_page_remedy")),
    };
    v.post(&path, &body).await?;
    v.done(said, "/restores")
}
