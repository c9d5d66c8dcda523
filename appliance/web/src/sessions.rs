//! Who is signed in: server-side, in memory, gone with the daemon.
//!
//! A session ends [`IDLE_MS`] after its last request, and [`WHOLE_MS`] after its beginning whatever happens. What the browser holds is a
//! random 256-bit number; here only its SHA-256 is kept. Pure: time is an argument, in milliseconds.
//!
//! Bounded: [`SESSIONS_MAX`]; a new one ends the one that was used longest ago.

use crate::{access::Role, secret};
use std::collections::HashMap;

pub const IDLE_MS: u64 = 30 * 60 * 1000;
pub const WHOLE_MS: u64 = 12 * 60 * 60 * 1000;
const SESSIONS_MAX: usize = 512;
/// Live streams of one session: a browser has six connections to a box, and pages need some of them.
pub const STREAMS_MAX: usize = 4;

/// What a page says once, after something was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flash {
    pub good: bool,
    pub text: String,
    pub remedy: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Session {
    pub user: String,
    pub role: Role,
    /// Shown in every form, and asked back.
    pub csrf: String,
    begun_ms: u64,
    used_ms: u64,
    flash: Option<Flash>,
    streams: usize,
}

#[derive(Default)]
pub struct Sessions {
    by_hash: HashMap<String, Session>,
}

impl Sessions {
    /// Begins a session; what the cookie gets. None: the system gave no random bytes.
    pub fn begin(&mut self, user: &str, role: Role, now_ms: u64) -> Option<String> {
        self.by_hash.retain(|_, s| s.lives(now_ms));
        if self.by_hash.len() >= SESSIONS_MAX {
            let oldest = self.by_hash.iter().min_by_key(|(_, s)| s.used_ms).map(|(hash, _)| hash.clone());
            oldest.and_then(|hash| self.by_hash.remove(&hash));
        }
        let (id, csrf) = (secret::random_hex::<32>()?, secret::random_hex::<16>()?);
        let session =
            Session { user: user.into(), role, csrf, begun_ms: now_ms, used_ms: now_ms, flash: None, streams: 0 };
        self.by_hash.insert(secret::hash(&id), session);
        Some(id)
    }

    /// The session of a cookie; `uses`: its idle time begins anew.
    pub fn find(&mut self, id: &str, now_ms: u64, uses: bool) -> Option<Session> {
        let hash = secret::hash(id);
        let session = self.by_hash.get_mut(&hash)?;
        if !session.lives(now_ms) {
            self.by_hash.remove(&hash);
            return None;
        }
        if uses {
            session.used_ms = now_ms;
        }
        Some(session.clone())
    }

    pub fn end(&mut self, id: &str) {
        self.by_hash.remove(&secret::hash(id));
    }
    /// Of somebody whose role or password has changed; `but` is the session it was done in.
    pub fn end_user(&mut self, user: &str, but: Option<&str>) {
        let but = but.map(secret::hash);
        self.by_hash.retain(|hash, s| s.user != user || Some(hash) == but.as_ref());
    }

    pub fn say(&mut self, id: &str, flash: Flash) {
        if let Some(session) = self.by_hash.get_mut(&secret::hash(id)) {
            session.flash = Some(flash);
        }
    }
    pub fn said(&mut self, id: &str) -> Option<Flash> {
        self.by_hash.get_mut(&secret::hash(id)).and_then(|s| s.flash.take())
    }

    /// Whether another stream may begin; it must be given back.
    pub fn stream_begins(&mut self, id: &str) -> bool {
        let session = self.by_hash.get_mut(&secret::hash(id)).filter(|s| s.streams < STREAMS_MAX);
        session.map(|s| s.streams += 1).is_some()
    }
    pub fn stream_ends(&mut self, id: &str) {
        if let Some(session) = self.by_hash.get_mut(&secret::hash(id)) {
            session.streams = session.streams.saturating_sub(1);
        }
    }
}

impl Session {
    fn lives(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.used_ms) < IDLE_MS && now_ms.saturating_sub(self.begun_ms) < WHOLE_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_when_idle_and_when_old() {
        let mut s = Sessions::default();
        let id = s.begin("ada", Role::Operator, 0).unwrap();
        assert_eq!(s.find(&id, IDLE_MS - 1, false).unwrap().user, "ada");
        assert_eq!(s.find(&id, IDLE_MS, true), None, "looking without using is no use");
        let id = s.begin("ada", Role::Operator, 0).unwrap();
        let mut now = 0;
        while now < WHOLE_MS {
            assert!(s.find(&id, now, true).is_some(), "{now}");
            now += IDLE_MS - 1;
        }
        assert_eq!(s.find(&id, WHOLE_MS, true), None);
        assert_eq!(s.find("guessed", 0, true), None);
    }

    #[test]
    fn ending_ends_and_the_table_is_bounded() {
        let mut s = Sessions::default();
        let (a, b) = (s.begin("a", Role::Viewer, 0).unwrap(), s.begin("a", Role::Viewer, 0).unwrap());
        assert_ne!(s.find(&a, 0, true).unwrap().csrf, s.find(&b, 0, true).unwrap().csrf);
        s.end_user("a", Some(&b));
        assert!(s.find(&a, 0, true).is_none() && s.find(&b, 0, true).is_some());
        s.end(&b);
        assert!(s.find(&b, 0, true).is_none());
        let first = s.begin("x", Role::Viewer, 1).unwrap();
        for i in 0..SESSIONS_MAX as u64 {
            s.begin("y", Role::Viewer, 2 + i);
        }
        assert_eq!(s.by_hash.len(), SESSIONS_MAX);
        assert!(s.find(&first, 2, true).is_none());
    }

    #[test]
    fn streams_are_bounded_and_given_back() {
        let mut s = Sessions::default();
        let id = s.begin("x", Role::Viewer, 1).unwrap();
        assert_eq!((0..9).filter(|_| s.stream_begins(&id)).count(), STREAMS_MAX);
        s.stream_ends(&id);
        assert!(s.stream_begins(&id) && !s.stream_begins(&id) && !s.stream_begins("none"));
    }
}
