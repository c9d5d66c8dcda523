//! A request, taken apart.

use crate::BODY_MAX;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, header, request::Parts};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use std::{net::IpAddr, time::Duration};

/// A body that takes longer to come is given up.
const BODY_LIMIT: Duration = Duration::from_secs(20);
/// Fields of a form; no page of ours has more.
const FIELDS_MAX: usize = 400;

/// A request with its body.
#[derive(Clone, Debug)]
pub struct Ask {
    pub method: Method,
    /// As it came.
    pub path: String,
    pub query: String,
    /// Decoded, without empty ones.
    pub parts: Vec<String>,
    pub headers: HeaderMap,
    pub from: IpAddr,
    pub body: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("the address of the page is not understood")]
    Path,
    #[error("the request broke off, took too long, or is longer than {BODY_MAX} bytes")]
    Body,
}

impl Ask {
    pub async fn read(request: Request<Incoming>, from: IpAddr) -> Result<Self, AskError> {
        let (Parts { method, uri, headers, .. }, body) = request.into_parts();
        let path = uri.path().to_owned();
        let parts = path.split('/').filter(|p| !p.is_empty()).map(|p| decode(p, false)).collect::<Option<Vec<_>>>();
        let parts = parts.ok_or(AskError::Path)?;
        let limited = Limited::new(body, BODY_MAX).collect();
        let body = match tokio::time::timeout(BODY_LIMIT, limited).await {
            Ok(Ok(body)) => body.to_bytes(),
            _ => return Err(AskError::Body),
        };
        Ok(Self { method, path, query: uri.query().unwrap_or_default().to_owned(), parts, headers, from, body })
    }

    pub fn header(&self, name: header::HeaderName) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    pub fn cookie(&self, name: &str) -> Option<String> {
        let all = self.headers.get_all(header::COOKIE);
        let mut pairs = all.iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
        pairs.find_map(|pair| {
            let (key, value) = pair.trim().split_once('=')?;
            (key == name).then(|| value.to_owned())
        })
    }

    pub fn query(&self) -> Fields {
        Fields::parse(&self.query)
    }
    pub fn form(&self) -> Fields {
        Fields::parse(std::str::from_utf8(&self.body).unwrap_or_default())
    }

    /// Whether a browser says that the request came from a page of ours. What is no browser says nothing and is believed: it has no cookie of
    /// a person's either.
    pub fn is_same_origin(&self) -> bool {
        match self.headers.get("sec-fetch-site").map(|v| v.as_bytes()) {
            None | Some(b"same-origin" | b"none") => {}
            Some(_) => return false,
        }
        let (origin, host) = (self.header(header::ORIGIN), self.header(header::HOST));
        origin.is_empty() || origin.strip_prefix("https://").is_some_and(|o| o.eq_ignore_ascii_case(host))
    }

    /// The host's name or address as the browser knows the box, without a port.
    pub fn host_name(&self) -> String {
        let host = self.header(header::HOST);
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        let fine = |c: char| c.is_ascii_alphanumeric() || ".-:".contains(c);
        let name: String = name.chars().filter(|c| fine(*c)).take(253).collect();
        if name.contains(':') { format!("[{name}]") } else { name }
    }
}

/// Fields of a form or a query.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    pub fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|p| !p.is_empty()).take(FIELDS_MAX);
        Self(
            pairs
                .filter_map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    Some((decode(key, true)?, decode(value, true)?))
                })
                .collect(),
        )
    }
    /// Empty when it is not there.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
    }
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }
    /// Fields whose name begins with `prefix`, by what follows it.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, value.as_str())))
    }
}

/// Undoes percent-encoding; None for what is none, or no text.
pub fn decode(part: &str, plus_is_space: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        match first {
            b'%' => {
                let hex =
                    std::str::from_utf8(tail.get(..2)?).ok().filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))?;
                bytes.push(u8::from_str_radix(hex, 16).ok()?);
                rest = &tail[2..];
            }
            b'+' if plus_is_space => bytes.push(b' '),
            byte => bytes.push(*byte),
        }
    }
    String::from_utf8(bytes).ok()
}

/// A part of a path, or a value of a query, encoded.
pub fn encode(part: &str) -> String {
    let mut out = String::with_capacity(part.len());
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// A place on this box to go to, as somebody else's address may ask for it; else the first page.
pub fn local_place(to: &str) -> &str {
    let fine =
        to.starts_with('/') && !to.starts_with("//") && !to.contains(['\\', '\r', '\n', '\t']) && to.len() < 2000;
    if fine { to } else { "/" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded_whatever_is_in_them() {
        let f = Fields::parse("a=1+2&b=%C3%BC%26&c&a=3&bad=%zz&=x&disk.0=/dev/sda");
        assert_eq!((f.get("a"), f.get("b"), f.get("c"), f.get("none")), ("1 2", "ü&", "", ""));
        assert!(f.has("c") && !f.has("bad"));
        assert_eq!(f.with_prefix("disk.").collect::<Vec<_>>(), [("0", "/dev/sda")]);
        assert_eq!(Fields::parse(&"a=1&".repeat(10_000)).0.len(), FIELDS_MAX);
        for bad in ["%", "%2", "%+1", "%ff", "%é"] {
            assert_eq!(decode(bad, true), None, "{bad}");
        }
        let hostile = "a/b ü?&#%\"<";
        assert_eq!(decode(&encode(hostile), false).as_deref(), Some(hostile));
    }

    #[test]
    fn nobody_is_sent_away_from_the_box() {
        for (to, place) in [
            ("/groups/x?at=1", "/groups/x?at=1"),
            ("//evil.example/", "/"),
            ("https://evil.example/", "/"),
            ("/\\evil.example", "/"),
            ("/a\r\nSet-Cookie: x", "/"),
            ("", "/"),
        ] {
            assert_eq!(local_place(to), place);
        }
    }
}
