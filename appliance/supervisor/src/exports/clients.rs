//! Who has an export open, and since when nobody has: a view that nobody reads holds history back for nothing.
//!
//! Bounded by the number of connections there may be.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

pub struct Clients {
    open: Mutex<Open>,
    next: AtomicU64,
}

struct Open {
    clients: BTreeMap<u64, String>,
    /// When the last one left, or the export was made.
    idle_since: Instant,
}

impl Default for Clients {
    fn default() -> Self {
        let open = Open { clients: BTreeMap::new(), idle_since: Instant::now() };
        Self { open: Mutex::new(open), next: AtomicU64::new(0) }
    }
}

/// A connection; it leaves when dropped, however it ends.
pub struct Client<'a> {
    of: &'a Clients,
    id: u64,
}

impl Clients {
    pub fn enter(&self, who: &str) -> Client<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        crate::lock(&self.open).clients.insert(id, who.to_owned());
        Client { of: self, id }
    }
    /// Each once, with the number of its connections.
    pub fn list(&self) -> Vec<String> {
        let mut counted: BTreeMap<String, usize> = BTreeMap::new();
        for who in crate::lock(&self.open).clients.values() {
            *counted.entry(who.clone()).or_default() += 1;
        }
        let show = |(who, n): (String, usize)| if n == 1 { who } else { format!("{who}, {n} connections") };
        counted.into_iter().map(show).collect()
    }
    /// None while somebody is there.
    pub fn idle(&self) -> Option<Duration> {
        let open = crate::lock(&self.open);
        open.clients.is_empty().then(|| open.idle_since.elapsed())
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        let mut open = crate::lock(&self.of.open);
        open.clients.remove(&self.id);
        open.idle_since = Instant::now();
    }
}

/// The process at the other end of a local socket, as a person knows it.
pub fn process_behind(stream: &UnixStream) -> String {
    let Some(pid) = stream.peer_cred().ok().and_then(|c| c.pid()) else { return "a local process".into() };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match name.trim() {
        "" => format!("process {pid}"),
        name => format!("{name} (process {pid})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn clients_are_known_while_they_are_there() {
        let clients = Clients::default();
        assert!(clients.idle().is_some());
        let (one, two, three) = (clients.enter("a"), clients.enter("b"), clients.enter("a"));
        assert_eq!((clients.list(), clients.idle()), (vec!["a, 2 connections".to_owned(), "b".to_owned()], None));
        drop((one, two));
        assert_eq!((clients.list(), clients.idle()), (vec!["a".to_owned()], None));
        drop(three);
        assert!(clients.list().is_empty() && clients.idle().is_some());
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert!(process_behind(&theirs).contains(&std::process::id().to_string()), "{}", process_behind(&theirs));
    }
}
