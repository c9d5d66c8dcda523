//! Answers kept under the key a program gave its request, so that it can ask again when it did not hear.
//!
//! A request that changes something and carries `Idempotency-Key` is done once: asked again with the same key by the same caller within
//! [`KEPT_MS`], the same request gets the same answer; another request gets a refusal; one whose first try still runs gets one too. In
//! memory: a restart of the daemon forgets them, which the API's description says. Bounded: [`KEYS_MAX`], answers up to [`ANSWER_MAX`].

use crate::{ApiRequest, secret};
use bytes::Bytes;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

const KEPT_MS: u64 = 24 * 60 * 60 * 1000;
const KEYS_MAX: usize = 1024;
/// Longer ones are not kept; asking again then does it again, and the answers that long are of requests that only look.
const ANSWER_MAX: usize = 64 * 1024;
pub const KEY_MAX: usize = 128;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    pub status: u16,
    pub kind: String,
    pub body: Bytes,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Begun {
    /// Do it, and say how it went with [`Answered::done`].
    New,
    Same(Kept),
    /// The first one has not been answered yet.
    Running,
    /// The key was given with another request.
    Other,
}

struct Entry {
    request: String,
    at_ms: u64,
    answer: Option<Kept>,
}

#[derive(Default)]
pub struct Answered(Mutex<HashMap<String, Entry>>);

impl Answered {
    pub fn begin(&self, caller: &str, key: &str, request: &ApiRequest, now_ms: u64) -> Begun {
        let body = secret::hash(&String::from_utf8_lossy(&request.body));
        let request = format!("{} {}?{} {body}", request.method, request.path, request.query);
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, e| now_ms.saturating_sub(e.at_ms) < KEPT_MS);
        match entries.get(&full(caller, key)) {
            Some(e) if e.request != request => Begun::Other,
            Some(Entry { answer: Some(kept), .. }) => Begun::Same(kept.clone()),
            Some(_) => Begun::Running,
            None => {
                if entries.len() >= KEYS_MAX {
                    let oldest = entries.iter().min_by_key(|(_, e)| e.at_ms).map(|(key, _)| key.clone());
                    oldest.and_then(|key| entries.remove(&key));
                }
                entries.insert(full(caller, key), Entry { request, at_ms: now_ms, answer: None });
                Begun::New
            }
        }
    }

    /// `None`: not kept, and the key is free again.
    pub fn done(&self, caller: &str, key: &str, answer: Option<Kept>) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match answer.filter(|a| a.body.len() <= ANSWER_MAX) {
            Some(answer) => {
                if let Some(entry) = entries.get_mut(&full(caller, key)) {
                    entry.answer = Some(answer);
                }
            }
            None => drop(entries.remove(&full(caller, key))),
        }
    }
}

fn full(caller: &str, key: &str) -> String {
    format!("{caller}\n{key}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;

    #[test]
    fn a_key_does_its_request_once() {
        let request = |body: &'static str| ApiRequest {
            method: Method::POST,
            path: "tokens".into(),
            query: String::new(),
            body: Bytes::from_static(body.as_bytes()),
        };
        let kept = Kept { status: 201, kind: "application/json".into(), body: Bytes::from_static(b"{}") };
        let a = Answered::default();
        assert_eq!(a.begin("x", "k", &request("1"), 0), Begun::New);
        assert_eq!(a.begin("x", "k", &request("1"), 0), Begun::Running);
        a.done("x", "k", Some(kept.clone()));
        assert_eq!(a.begin("x", "k", &request("1"), 1), Begun::Same(kept));
        assert_eq!(a.begin("x", "k", &request("2"), 1), Begun::Other);
        assert_eq!(a.begin("y", "k", &request("2"), 1), Begun::New, "another's key");
        a.done("y", "k", None);
        assert_eq!(a.begin("y", "k", &request("3"), 1), Begun::New);
        assert_eq!(a.begin("x", "k", &request("2"), KEPT_MS), Begun::New, "a day later");
        for i in 0..2 * KEYS_MAX {
            a.begin("z", &i.to_string(), &request(""), KEPT_MS + i as u64);
        }
        assert_eq!(a.0.lock().unwrap().len(), KEYS_MAX);
    }
}
