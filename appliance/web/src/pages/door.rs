//! The pages of somebody who is not signed in: the first administrator, and sign-in.

use crate::{
    Answer,
    access::{Caller, Role, Via},
    accounts::{AccountError, PASSWORD_MIN},
    frame::Frame,
    respond,
    site::Door,
};
use askama::Template;
use http::{Method, StatusCode, header};

#[derive(Template)]
#[template(path = "pages/door/sign_in.html")]
struct SignIn {
    p: Frame,
    name: String,
    to: String,
    wrong: String,
}

#[derive(Template)]
#[template(path = "pages/door/setup.html")]
struct Setup {
    p: Frame,
    name: String,
    wrong: String,
    least: u64,
}

pub async fn handle(d: &Door<'_>) -> Answer {
    let setup = d.ask.parts.first().is_some_and(|p| p == "setup");
    match (setup, d.web.accounts.needs_setup()) {
        (true, false) => return respond::see_other("/sign-in"),
        (false, true) => return respond::see_other("/setup"),
        _ => {}
    }
    if d.ask.method == Method::GET {
        let to = d.ask.query().get("to").to_owned();
        return show(d, setup, StatusCode::OK, String::new(), &to);
    }
    let form = d.ask.form();
    if !d.form_is_ours() {
        return show(d, setup, StatusCode::FORBIDDEN, d.lang.t("door.old_form").into(), form.get("to"));
    }
    let (name, password, now) = (form.get("name").trim(), form.get("password"), d.web.now_ms());
    let done = if setup && password != form.get("again") {
        return show(d, setup, StatusCode::BAD_REQUEST, d.lang.t("door.not_the_same").into(), "");
    } else if setup {
        let code = form.get("code");
        d.web.accounts.set_up(code, name, password, d.ask.from, now).await.map(|id| (id, Role::Administrator))
    } else {
        d.web.accounts.sign_in(name, password, d.ask.from, now).await
    };
    let what = if setup { "set up the first administrator" } else { "sign in" };
    let caller = |role| Caller {
        // Whoever failed may have typed a password here.
        name: if done_name(name) { name.to_owned() } else { "?".into() },
        role,
        via: Via::Page,
        from: d.ask.from.to_string(),
    };
    match done {
        Ok((id, role)) => {
            d.web.backend.deed(caller(role), what, None).await;
            d.signed_in(&id, form.get("to"))
        }
        Err(e) => {
            // One that has to wait was not looked at: the file must not grow by what costs its sender nothing.
            if matches!(e, AccountError::Wrong | AccountError::SetupCode) {
                d.web.backend.deed(caller(Role::Viewer), what, Some(e.to_string())).await;
            }
            let (status, text) = words(d, &e);
            let mut answer = show(d, setup, status, text, form.get("to"));
            if let AccountError::Wait { seconds } = e {
                answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            answer
        }
    }
}

fn done_name(name: &str) -> bool {
    name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn words(d: &Door<'_>, e: &AccountError) -> (StatusCode, String) {
    let lang = d.lang;
    match e {
        AccountError::Wrong => (StatusCode::FORBIDDEN, lang.t("door.wrong").into()),
        AccountError::SetupCode => (StatusCode::FORBIDDEN, lang.t("door.wrong_code").into()),
        AccountError::Wait { seconds } => {
            (StatusCode::TOO_MANY_REQUESTS, lang.fill("door.wait", &[&format!("{seconds} s")]))
        }
        AccountError::Name(_) => (StatusCode::BAD_REQUEST, lang.t("door.bad_name").into()),
        AccountError::Password => {
            (StatusCode::BAD_REQUEST, lang.fill("door.bad_password", &[&PASSWORD_MIN.to_string()]))
        }
        AccountError::Busy => (StatusCode::SERVICE_UNAVAILABLE, lang.t("door.busy").into()),
        e => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
    }
}

fn show(d: &Door<'_>, setup: bool, status: StatusCode, wrong: String, to: &str) -> Answer {
    let form = d.ask.form();
    let name: String = form.get("name").chars().take(64).collect();
    d.page(status, |csrf| {
        let made = if setup {
            let p = d.frame(d.lang.t("door.setup_title"), csrf);
            Setup { p, name, wrong, least: PASSWORD_MIN as u64 }.render()
        } else {
            let p = d.frame(d.lang.t("door.title"), csrf);
            SignIn { p, name, to: to.to_owned(), wrong }.render()
        };
        made.unwrap_or_else(|e| format!("the page could not be made: {e}"))
    })
}
