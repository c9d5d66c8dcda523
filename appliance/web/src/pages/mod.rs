//! The pages: each asks the API, and hands what it needs to a template.

pub mod door;
mod groups;
mod hosts;
mod overview;
mod plans;
mod records;
mod restores;
mod runs;

use crate::{
    frame::Frame,
    site::{Fault, Page, Reply, Visit},
};
use askama::Template;
use http::{Method, StatusCode};

/// For somebody who is signed in; a form's token has been looked at.
pub async fn handle(v: &Visit) -> Page {
    let parts: Vec<&str> = v.ask.parts.iter().map(String::as_str).collect();
    let (get, post) = (v.ask.method == Method::GET, v.ask.method == Method::POST);
    match &parts[..] {
        [] if get => overview::page(v).await,
        ["wall"] if get => overview::wall(v).await,
        ["sign-out"] if post => Ok(Reply::Whole(v.sign_out())),
        ["setup" | "sign-in"] => Ok(Reply::To("/".into())),
        ["hosts"] if get => hosts::page(v).await,
        ["hosts", "token"] if post => hosts::make_token(v).await,
        ["hosts", id, "revoke"] if post => hosts::revoke(v, id).await,
        ["groups"] if get => groups::list(v).await,
        ["groups", "new"] if post => groups::create(v).await,
        ["groups", id] if get => groups::page(v, id).await,
        ["groups", id, what] if post => groups::act(v, id, what).await,
        ["plans"] if get => plans::list(v).await,
        ["plans", "new"] if get => plans::edit(v, None).await,
        ["plans", "new"] if post => plans::keep(v, None).await,
        ["plans", name] if get => plans::edit(v, Some(name)).await,
        ["plans", name] if post => plans::keep(v, Some(name)).await,
        ["plans", name, "begin"] if get => plans::begin(v, name).await,
        ["plans", name, "begin"] if post => plans::begun(v, name).await,
        ["runs"] if get => runs::list(v).await,
        ["runs", id] if get => runs::page(v, id).await,
        ["runs", id, what @ ("screen" | "serial" | "record" | "signature")] if get => {
            Ok(Reply::Whole(v.whole(&format!("runs/{}/{what}", crate::request::encode(id))).await))
        }
        ["runs", id, what] if post => runs::act(v, id, what).await,
        ["restores"] if get => restores::list(v).await,
        ["restores", "new"] if get => restores::choose(v).await,
        ["restores", "new"] if post => restores::begin(v).await,
        ["restores", id, what] if post => restores::act(v, id, what).await,
        ["events"] if get => records::events(v).await,
        ["users"] if get => records::users(v).await,
        ["users", what] if post => records::change_users(v, what).await,
        ["account"] if get => records::account(v).await,
        ["account"] if post => records::change_own(v).await,
        ["audit"] if get => records::audit(v).await,
        _ => Err(Fault {
            status: StatusCode::NOT_FOUND,
            text: v.lang.t("fault.no_page").into(),
            remedy: v.lang.t("fault.no_page_remedy").into(),
        }),
    }
}

/// A template as a page.
fn show(template: &impl Template) -> Page {
    match template.render() {
        Ok(text) => Ok(Reply::Html(text)),
        Err(e) => Err(Fault {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            text: format!("the page could not be made: {e}"),
            remedy: String::new(),
        }),
    }
}

#[derive(Template)]
#[template(path = "pages/refusal.html")]
struct Refusal {
    p: Frame,
    fault: Fault,
}

/// Instead of a page that cannot be shown.
pub fn refusal(v: &Visit, fault: Fault) -> String {
    let p = v.frame("", v.lang.t("fault.title"), "");
    let text = fault.text.clone();
    Refusal { p, fault }.render().unwrap_or(text)
}
