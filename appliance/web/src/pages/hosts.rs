//! Hosts: who is enrolled, and how another one comes in.

use super::show;
use crate::{
    answers::{Host, NewToken, PendingToken, Status},
    frame::Frame,
    request::encode,
    site::{Page, Visit},
};
use askama::Template;
use serde_json::json;

#[derive(Template)]
#[template(path = "pages/hosts/page.html")]
struct Hosts {
    p: Frame,
    hosts: Vec<HostRow>,
    pending: Vec<PendingToken>,
}

struct HostRow {
    h: Host,
    groups: Vec<(String, String)>,
}

#[derive(Template)]
#[template(path = "pages/hosts/token.html")]
struct Token {
    p: Frame,
    token: NewToken,
    /// The box as the new host reaches it, as far as the browser's address tells.
    reach: String,
}

pub async fn page(v: &Visit) -> Page {
    let status: Status = v.get("status").await?;
    let pending = if v.frame_operates() { v.get("tokens").await? } else { Vec::new() };
    let groups_of = |h: &Host| {
        let own = status.groups.iter().filter(|g| g.host_name.as_deref() == Some(&h.name) && g.branch.is_none());
        own.map(|g| (g.id.clone(), g.name.clone())).collect()
    };
    let hosts = status.hosts.iter().map(|h| HostRow { h: h.clone(), groups: groups_of(h) }).collect();
    show(&Hosts { p: v.frame("hosts", v.lang.t("menu.hosts"), "hosts"), hosts, pending })
}

/// Not kept anywhere: the page that answers is the only one that shows it.
pub async fn make_token(v: &Visit) -> Page {
    let form = v.form();
    let name = form.get("host_name").trim();
    let wish = if name.is_empty() { json!({}) } else { json!({ "host_name": name }) };
    let token: NewToken = serde_json::from_value(v.post("tokens", &wish).await?).unwrap_or_default();
    let port = token.listen.rsplit(':').next().unwrap_or("7440").to_owned();
    let reach = format!("{}:{port}", v.ask.host_name());
    show(&Token { p: v.frame("hosts", v.lang.t("hosts.new_token"), ""), token, reach })
}

pub async fn revoke(v: &Visit, id: &str) -> Page {
    let hosts: Vec<Host> = v.get("hosts").await?;
    let name = hosts.iter().find(|h| h.id == id).map_or(String::new(), |h| h.name.clone());
    if v.form().get("confirm").trim() != name {
        return Err(v.refuse("fault.confirm", "fault.confirm_remedy"));
    }
    v.post(&format!("hosts/{}/revoke", encode(id)), &json!({})).await?;
    v.done(v.lang.fill("hosts.revoked", &[&name]), "/hosts")
}
