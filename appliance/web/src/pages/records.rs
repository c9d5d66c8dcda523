//! Events, users and tokens, one's own account, the audit.

use super::{
    overview::{EventRow, event_rows},
    show,
};
use crate::{
    accounts::{AccountError, PASSWORD_MIN},
    answers::{ApiToken, AuditPage, User},
    frame::Frame,
    request::encode,
    site::{Fault, Page, Visit},
};
use askama::Template;
use http::{Method, StatusCode};
use serde_json::{Value, json};

#[derive(Template)]
#[template(path = "pages/records/events.html")]
struct Events {
    p: Frame,
    events: Vec<EventRow>,
}

#[derive(Template)]
#[template(path = "pages/records/users.html")]
struct Users {
    p: Frame,
    users: Vec<User>,
    tokens: Vec<ApiToken>,
    /// Just made: shown this once.
    secret: String,
    least: u64,
}

#[derive(Template)]
#[template(path = "pages/records/account.html")]
struct Account {
    p: Frame,
    least: u64,
}

#[derive(Template)]
#[template(path = "pages/records/audit.html")]
struct Audit {
    p: Frame,
    page: AuditPage,
    older: Option<u64>,
}

pub async fn events(v: &Visit) -> Page {
    let events = event_rows(v.get("events").await?);
    show(&Events { p: v.frame("events", v.lang.t("menu.events"), "events"), events })
}

pub async fn users(v: &Visit) -> Page {
    all_users(v, String::new()).await
}

async fn all_users(v: &Visit, secret: String) -> Page {
    show(&Users {
        users: v.get("users").await?,
        tokens: v.get("api-tokens").await?,
        p: v.frame("users", v.lang.t("menu.users"), ""),
        secret,
        least: PASSWORD_MIN as u64,
    })
}

pub async fn change_users(v: &Visit, what: &str) -> Page {
    let form = v.form();
    let name = form.get("name").trim();
    let confirmed = || match form.get("confirm").trim() == name {
        true => Ok(()),
        false => Err(v.refuse("fault.confirm", "fault.confirm_remedy")),
    };
    let said = match what {
        "create" => {
            let body = json!({ "name": name, "role": form.get("role"), "password": form.get("password") });
            v.post("users", &body).await?;
            "users.made"
        }
        "change" => {
            let mut body = json!({ "role": form.get("role") });
            if !form.get("password").is_empty() {
                body["password"] = json!(form.get("password"));
            }
            v.change(Method::PATCH, &format!("users/{}", encode(name)), "", &body).await?;
            "users.changed"
        }
        "delete" => {
            confirmed()?;
            v.change(Method::DELETE, &format!("users/{}", encode(name)), "", &Value::Null).await?;
            "users.deleted"
        }
        "token" => {
            let made = v.post("api-tokens", &json!({ "name": name, "role": form.get("role") })).await?;
            // Not through a redirect: it is kept nowhere.
            return all_users(v, made["token"].as_str().unwrap_or_default().to_owned()).await;
        }
        "token-delete" => {
            confirmed()?;
            v.change(Method::DELETE, &format!("api-tokens/{}", encode(form.get("id"))), "", &Value::Null).await?;
            "users.token_deleted"
        }
        _ => return Err(v.refuse("fault.no_page", "fault.no_page_remedy")),
    };
    v.done(v.lang.fill(said, &[name]), "/users")
}

pub async fn account(v: &Visit) -> Page {
    show(&Account { p: v.frame("account", v.lang.t("account.title"), ""), least: PASSWORD_MIN as u64 })
}

/// One's own password is nobody else's business: not a route of the API, where a token could do it.
pub async fn change_own(v: &Visit) -> Page {
    let form = v.form();
    if form.get("password") != form.get("again") {
        return Err(v.refuse("door.not_the_same", "account.remedy"));
    }
    let accounts = &v.web.accounts;
    let now = v.web.backend.now_us() / 1000;
    let done = accounts
        .change_own(&v.session_id, &v.caller.name, form.get("old"), form.get("password"), v.ask.from, now)
        .await;
    v.web.backend.deed(v.caller.clone(), "change own password", done.as_ref().err().map(ToString::to_string)).await;
    let text = match done {
        Ok(()) => return v.done(v.lang.t("account.changed"), "/account"),
        Err(AccountError::Wrong) => v.lang.t("account.wrong").to_owned(),
        Err(AccountError::Password) => v.lang.fill("door.bad_password", &[&PASSWORD_MIN.to_string()]),
        Err(AccountError::Wait { seconds }) => v.lang.fill("door.wait", &[&format!("{seconds} s")]),
        Err(e) => e.to_string(),
    };
    Err(Fault { status: StatusCode::BAD_REQUEST, text, remedy: v.lang.t("account.remedy").into() })
}

pub async fn audit(v: &Visit) -> Page {
    let before = v.ask.query().get("before").parse::<u64>().ok();
    let query = before.map(|n| format!("before={n}&limit=100")).unwrap_or_else(|| "limit=100".into());
    let page: AuditPage = v.get_with("audit", &query).await?;
    let older = page.entries.last().map(|e| e.n).filter(|n| *n > 1 && page.entries.len() == 100);
    show(&Audit { p: v.frame("audit", v.lang.t("menu.audit"), ""), page, older })
}
