//! Who is connected: the claims of hosts' agents.

use super::SESSIONS_PER_HOST_MAX;
use model::{GroupId, HostId, MonoTime};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;
use wire::{Purpose, Refusal, RefuseCode};

#[derive(Debug, thiserror::Error)]
#[error("{SESSIONS_PER_HOST_MAX} connections of one host are open, which is the limit")]
pub struct SessionsMaxReached;

#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(
        "another agent with this host's identity is connected and was heard {heard_ms} ms ago: a cloned machine, or a copied key; \
         enrol one of the two anew"
    )]
    Duplicate { heard_ms: u64 },
    #[error(transparent)]
    TooMany(SessionsMaxReached),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Key {
    Control,
    Stream(GroupId),
    Restore,
}

#[derive(Default)]
struct Claims {
    instance: [u8; 16],
    sessions: BTreeMap<Key, Claim>,
}

struct Claim {
    number: u64,
    heard: Arc<AtomicU64>,
    cut: watch::Sender<Option<Refusal>>,
}

impl Claims {
    /// When any of the sessions was heard last.
    fn heard(&self) -> MonoTime {
        MonoTime(self.sessions.values().map(|c| c.heard.load(Ordering::Relaxed)).max().unwrap_or(0))
    }
    fn cut(&self, refusal: &Refusal) {
        for claim in self.sessions.values() {
            claim.cut.send_replace(Some(refusal.clone()));
        }
    }
}

/// All claims.
#[derive(Default)]
pub struct Sessions {
    hosts: Arc<Mutex<BTreeMap<HostId, Claims>>>,
}

/// A claim held; gone when dropped.
pub struct Session {
    hosts: Arc<Mutex<BTreeMap<HostId, Claims>>>,
    host: HostId,
    key: Key,
    number: u64,
    /// Nanoseconds on the box's monotonic clock.
    pub heard: Arc<AtomicU64>,
    /// The same of all connections of its host, over all of them.
    pub host_heard: Arc<AtomicU64>,
    /// Set when the session must end, to why.
    pub cut: watch::Receiver<Option<Refusal>>,
    /// An older connection of the same agent was cut for it.
    pub replaced: bool,
}

impl Sessions {
    /// Takes a place for a connection, or says who has it.
    pub fn claim(
        &self,
        host: HostId,
        purpose: Purpose,
        instance: [u8; 16],
        now: MonoTime,
        silence_ms: u64,
    ) -> Result<Session, ClaimError> {
        let key = match purpose {
            Purpose::Stream { group } => Key::Stream(group),
            Purpose::Restore => Key::Restore,
            Purpose::Control | Purpose::Enrol => Key::Control,
        };
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut hosts = crate::lock(&self.hosts);
        let claims = hosts.entry(host).or_default();
        if claims.instance != instance && !claims.sessions.is_empty() {
            let heard_ms = now.ms_since(claims.heard());
            if heard_ms < silence_ms {
                return Err(ClaimError::Duplicate { heard_ms });
            }
            claims.cut(&Refusal {
                code: RefuseCode::Silent,
                text: "another agent took over after this one was silent".into(),
            });
            claims.sessions.clear();
        }
        claims.instance = instance;
        let replaced = claims.sessions.remove(&key);
        if let Some(old) = &replaced {
            let text = "the same agent connected again".into();
            old.cut.send_replace(Some(Refusal { code: RefuseCode::Duplicate, text }));
        }
        if claims.sessions.len() >= SESSIONS_PER_HOST_MAX {
            return Err(ClaimError::TooMany(SessionsMaxReached));
        }
        let heard = Arc::new(AtomicU64::new(now.0));
        let (sender, cut) = watch::channel(None);
        claims.sessions.insert(key, Claim { number, heard: Arc::clone(&heard), cut: sender });
        let replaced = replaced.is_some();
        let host_heard = Arc::clone(&heard);
        Ok(Session { hosts: Arc::clone(&self.hosts), host, key, number, heard, host_heard, cut, replaced })
    }

    /// Tells all sessions of a host to end.
    pub fn cut(&self, host: HostId, refusal: &Refusal) {
        if let Some(claims) = crate::lock(&self.hosts).get(&host) {
            claims.cut(refusal);
        }
    }
    /// Tells the stream of one group to end.
    pub fn cut_stream(&self, host: HostId, group: GroupId, refusal: &Refusal) {
        if let Some(claim) = crate::lock(&self.hosts).get(&host).and_then(|c| c.sessions.get(&Key::Stream(group))) {
            claim.cut.send_replace(Some(refusal.clone()));
        }
    }
}

impl Session {
    /// What is heard on it is heard of the host.
    #[must_use]
    pub fn heard_for(mut self, host_heard: Arc<AtomicU64>) -> Self {
        self.host_heard = host_heard;
        self
    }

    /// Waits until the session must end.
    pub async fn ended(&self) -> Refusal {
        let mut cut = self.cut.clone();
        let ended = cut.wait_for(Option::is_some).await.ok().and_then(|r| r.clone());
        // The sender goes only when the claim was replaced or taken over, and that is said before.
        ended.unwrap_or(Refusal { code: RefuseCode::Duplicate, text: "the session was replaced".into() })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut hosts = crate::lock(&self.hosts);
        let Some(claims) = hosts.get_mut(&self.host) else { return };
        // A later connection may have the place already.
        if claims.sessions.get(&self.key).is_some_and(|c| c.number == self.number) {
            claims.sessions.remove(&self.key);
        }
        if claims.sessions.is_empty() {
            hosts.remove(&self.host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId([1; 16]);
    const A: [u8; 16] = [0xA; 16];
    const B: [u8; 16] = [0xB; 16];
    fn stream(n: u8) -> Purpose {
        Purpose::Stream { group: GroupId([n; 16]) }
    }

    #[test]
    fn a_second_agent_waits_until_the_first_is_silent() {
        let sessions = Sessions::default();
        let claim = |purpose, instance, ms| sessions.claim(HOST, purpose, instance, MonoTime::from_ms(ms), 1000);
        let control = claim(Purpose::Control, A, 0).unwrap();
        let first = claim(stream(1), A, 0).unwrap();
        assert!(matches!(claim(stream(2), B, 999), Err(ClaimError::Duplicate { heard_ms: 999 })));
        assert!(matches!(claim(Purpose::Control, B, 10), Err(ClaimError::Duplicate { .. })));
        // heard again on one connection: alive on all
        first.heard.store(MonoTime::from_ms(500).0, Ordering::Relaxed);
        assert!(claim(stream(1), B, 1400).is_err());
        assert!(
            sessions.claim(HostId([2; 16]), Purpose::Control, B, MonoTime(0), 1000).is_ok(),
            "another host is another matter"
        );
        let second = claim(stream(1), B, 1500).unwrap();
        assert!(first.cut.borrow().is_some() && control.cut.borrow().is_some());
        assert!(claim(Purpose::Control, A, 1600).is_err(), "now the first is the second");
        drop((first, control));
        assert!(claim(Purpose::Control, A, 1600).is_err(), "an ended session must not free its successor's place");
        drop(second);
        assert!(claim(Purpose::Control, A, 1600).is_ok());
    }

    #[test]
    fn the_same_agent_replaces_its_half_open_connection() {
        let sessions = Sessions::default();
        let old = sessions.claim(HOST, stream(1), A, MonoTime(0), 1000).unwrap();
        let new = sessions.claim(HOST, stream(1), A, MonoTime(1), 1000).unwrap();
        assert!(new.replaced && !old.replaced);
        assert_eq!(old.cut.borrow().as_ref().map(|r| r.code), Some(RefuseCode::Duplicate));
        assert!(new.cut.borrow().is_none());
        sessions.cut(HOST, &Refusal { code: RefuseCode::Revoked, text: String::new() });
        assert_eq!(new.cut.borrow().as_ref().map(|r| r.code), Some(RefuseCode::Revoked));
    }

    #[test]
    fn one_host_cannot_take_all_places() {
        let sessions = Sessions::default();
        let held: Vec<_> = (0..SESSIONS_PER_HOST_MAX)
            .map(|i| sessions.claim(HOST, stream(i as u8), A, MonoTime(0), 1000).unwrap())
            .collect();
        assert!(matches!(sessions.claim(HOST, Purpose::Control, A, MonoTime(0), 1000), Err(ClaimError::TooMany(_))));
        drop(held);
        assert!(sessions.claim(HOST, Purpose::Control, B, MonoTime(0), 1000).is_ok());
    }
}
