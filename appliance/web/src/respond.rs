//! Answers, each with the headers that bind the browser.

use crate::Answer;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};

/// Nothing inline, nothing from elsewhere, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; \
                      frame-ancestors 'none'; base-uri 'none'";

// Of referrers, "same-origin" and not "no-referrer": with the latter a browser sends `Origin: null` with our own forms.
const HEADERS: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

pub fn bytes(status: StatusCode, kind: &'static str, data: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(data.into()).boxed());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    guard(&mut answer);
    answer
}

/// Puts on every answer what must be on every answer; what the answer has of it already stays.
pub fn guard(answer: &mut Answer) {
    for (name, value) in HEADERS {
        answer.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
}

pub fn html(status: StatusCode, text: String) -> Answer {
    bytes(status, "text/html; charset=utf-8", text)
}

pub fn plain(status: StatusCode, text: &'static str) -> Answer {
    bytes(status, "text/plain; charset=utf-8", text)
}

/// To be fetched with GET.
pub fn see_other(to: &str) -> Answer {
    let mut answer = plain(StatusCode::SEE_OTHER, "");
    let to = HeaderValue::from_str(to).unwrap_or(HeaderValue::from_static("/"));
    answer.headers_mut().insert(header::LOCATION, to);
    answer
}

/// A refusal in the API's form.
pub fn api_error(status: StatusCode, code: &str, message: &str, remedy: &str) -> Answer {
    let error = serde_json::json!({ "error": { "code": code, "message": message, "remedy": remedy } });
    bytes(status, "application/json", error.to_string())
}

/// A cookie that only this box gets, only over TLS, and no script reads. `None` ends it.
pub fn cookie(answer: &mut Answer, name: &str, value: Option<&str>, seconds: u64) {
    let (value, seconds) = value.map_or(("", 0), |v| (v, seconds));
    let text = format!("{name}={value}; Path=/; Max-Age={seconds}; Secure; HttpOnly; SameSite=Strict");
    if let Ok(text) = HeaderValue::from_str(&text) {
        answer.headers_mut().append(header::SET_COOKIE, text);
    }
}
