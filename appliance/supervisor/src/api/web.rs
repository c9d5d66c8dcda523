//! The routes of who may come in: users, tokens for programs, the audit; and what only the console may.
//!
//! | request | does |
//! |---|---|
//! | `GET /users`, `POST /users` | `name`, `role`, `password` |
//! | `PATCH /users/NAME`, `DELETE /users/NAME` | `role`, `password`; their sessions end |
//! | `GET /api-tokens`, `POST /api-tokens`, `DELETE /api-tokens/ID` | `name`, `role`; the answer has the secret, once |
//! | `GET /audit` | newest first; `before`, `limit`; and whether the chain holds |
//! | `GET /openapi.json` | the API's description |
//! | `POST /web/setup-code` | console only: a code that makes the first administrator |
//! | `POST /web/reset-password` | console only: `name`; the answer has the new password |

use super::{
    ApiError, access, json_answer,
    routes::{Result, bad_request, blocking, body, internal, no_route, ok, parameter},
};
use crate::App;
use ::web::{
    access::{Caller, Role},
    accounts::AccountError,
};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UserWish {
    name: String,
    role: String,
    password: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeWish {
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    password: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenWish {
    name: String,
    role: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NameWish {
    name: String,
}

pub async fn handle(app: &Arc<App>, caller: &Caller, request: Request<Bytes>, parts: &[&str], query: &str) -> Result {
    let method = request.method().clone();
    let accounts = Arc::clone(&app.accounts);
    let now_us = app.clock.wall_us();
    match (&method, parts) {
        (&Method::GET, ["users"]) => Ok(ok(&json!(accounts.users()))),
        (&Method::POST, ["users"]) => {
            let wish: UserWish = body(request).await?;
            let role = role(&wish.role)?;
            accounts.create_user(&wish.name, role, &wish.password, now_us).await.map_err(error)?;
            Ok(json_answer(StatusCode::CREATED, &json!({ "name": wish.name, "role": role })))
        }
        (&Method::PATCH, ["users", name]) => {
            let wish: ChangeWish = body(request).await?;
            let role = wish.role.as_deref().map(role).transpose()?;
            accounts.change_user(name, role, wish.password.as_deref()).await.map_err(error)?;
            Ok(ok(&json!({ "changed": name })))
        }
        (&Method::DELETE, ["users", name]) => {
            let name = (*name).to_owned();
            blocking(app, move |_| {
                accounts.delete_user(&name).map_err(error)?;
                Ok(ok(&json!({ "deleted": name })))
            })
            .await?
        }
        (&Method::GET, ["api-tokens"]) => Ok(ok(&json!(accounts.tokens()))),
        (&Method::POST, ["api-tokens"]) => {
            let wish: TokenWish = body(request).await?;
            let (role, by) = (role(&wish.role)?, caller.name.clone());
            blocking(app, move |_| {
                let (id, token) = accounts.create_token(&wish.name, role, &by, now_us).map_err(error)?;
                Ok(json_answer(
                    StatusCode::CREATED,
                    &json!({ "id": id, "name": wish.name, "role": role, "token": token }),
                ))
            })
            .await?
        }
        (&Method::DELETE, ["api-tokens", id]) => {
            let id = (*id).to_owned();
            blocking(app, move |_| {
                accounts.delete_token(&id).map_err(error)?;
                Ok(ok(&json!({ "deleted": id })))
            })
            .await?
        }
        (&Method::GET, ["audit"]) => {
            let number = |name: &str| match parameter(query, name) {
                None => Ok(None),
                Some(text) => {
                    text.parse::<u64>().map(Some).map_err(|_| bad_request(name, "a number is expected".into()))
                }
            };
            let (before, limit) = (number("before")?, number("limit")?.unwrap_or(100));
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            blocking(app, move |app| {
                let page = app.audit.page(before, limit);
                Ok(ok(&json!(page.map_err(|e| internal(format!("the audit could not be read: {e}")))?)))
            })
            .await?
        }
        (&Method::GET, ["openapi.json"]) => Ok(ok(&access::description())),
        (&Method::POST, ["web", "setup-code"]) => {
            let code = accounts.make_setup_code(now_us / 1000).map_err(error)?;
            Ok(ok(&json!({ "code": code, "minutes": 60, "listen": app.web_listen.map(|at| at.to_string()) })))
        }
        (&Method::POST, ["web", "reset-password"]) => {
            let wish: NameWish = body(request).await?;
            let password = accounts.reset_password(&wish.name).await.map_err(error)?;
            Ok(ok(&json!({ "name": wish.name, "password": password })))
        }
        _ => Err(no_route(&format!("{method} {}", parts.join("/")))),
    }
}

fn role(name: &str) -> Result<Role> {
    Role::given(name).ok_or_else(|| error(AccountError::Role(name.chars().take(64).collect())))
}

fn error(e: AccountError) -> ApiError {
    let text = crate::chain(&e);
    let refuse = |status, code, remedy: &str| ApiError::new(status, code, text.clone(), remedy);
    match e {
        AccountError::Keep(_) | AccountError::Damaged(_) | AccountError::Random | AccountError::Hash => internal(text),
        AccountError::Name(_) => bad_request("name", text),
        AccountError::Password => bad_request("password", text),
        AccountError::Role(_) => bad_request("role", text),
        AccountError::Taken(_) => refuse(StatusCode::CONFLICT, "name-taken", "choose another name"),
        AccountError::NoUser(_) => refuse(StatusCode::NOT_FOUND, "no-such-user", "list them with GET /users"),
        AccountError::NoToken(_) => refuse(StatusCode::NOT_FOUND, "no-such-token", "list them with GET /api-tokens"),
        AccountError::Last(_) => refuse(StatusCode::CONFLICT, "last-administrator", "make another administrator first"),
        AccountError::TooMany => refuse(StatusCode::CONFLICT, "limit", "delete what is not needed any more"),
        AccountError::SetUpAlready => refuse(
            StatusCode::CONFLICT,
            "set-up-already",
            "a lost password is made anew with `holdfast web reset-password`",
        ),
        AccountError::Busy | AccountError::Wait { .. } => {
            refuse(StatusCode::TOO_MANY_REQUESTS, "busy", "try again in a moment")
        }
        AccountError::SetupCode | AccountError::Wrong => refuse(StatusCode::FORBIDDEN, "wrong", "try again"),
    }
}
