//! What the connections hear of hosts, for whoever watches them.

use model::{HostId, MonoTime};
use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use wire::ProbeResult;

/// Results that wait to be looked at, which happens many times a second; the oldest go first.
const PROBES_MAX: usize = 4096;

struct Heard {
    at: Arc<AtomicU64>,
    from: IpAddr,
    connections: u64,
}

/// One host as it was heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeardOf {
    pub host: HostId,
    /// Where its agent connected from last.
    pub from: IpAddr,
    pub at: MonoTime,
    /// How often it has connected.
    pub connections: u64,
}

#[derive(Default)]
pub struct Ears {
    hosts: Mutex<BTreeMap<HostId, Heard>>,
    probes: Mutex<VecDeque<(HostId, ProbeResult, MonoTime)>>,
}

impl Ears {
    /// A connection of the host, known by its certificate; what is heard on it is put into what this returns.
    pub fn connected(&self, host: HostId, from: IpAddr, now: MonoTime) -> Arc<AtomicU64> {
        let mut hosts = crate::lock(&self.hosts);
        let heard = hosts.entry(host).or_insert_with(|| Heard { at: Arc::default(), from, connections: 0 });
        heard.from = from.to_canonical();
        heard.connections += 1;
        heard.at.store(now.0, Ordering::Relaxed);
        Arc::clone(&heard.at)
    }
    pub fn all(&self) -> Vec<HeardOf> {
        let hosts = crate::lock(&self.hosts);
        let of = |(host, heard): (&HostId, &Heard)| HeardOf {
            host: *host,
            from: heard.from,
            at: MonoTime(heard.at.load(Ordering::Relaxed)),
            connections: heard.connections,
        };
        hosts.iter().map(of).collect()
    }
    pub fn probe(&self, host: HostId, result: ProbeResult, now: MonoTime) {
        let mut probes = crate::lock(&self.probes);
        if probes.len() >= PROBES_MAX {
            probes.pop_front();
        }
        probes.push_back((host, result, now));
    }
    pub fn take_probes(&self) -> Vec<(HostId, ProbeResult, MonoTime)> {
        crate::lock(&self.probes).drain(..).collect()
    }
}
