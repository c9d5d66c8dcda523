//! Who owns each host that a plan leases: [`replication::ownership::Grantor`] with its file, its clock and its agent's connection.
//!
//! ```text
//! control connection ── lease requests, releases, plans taken ──▶ Desk of the host ── answers, revokes, its plan ──▶ control connection
//! plans (set, deleted, read at the start) ── what is wanted ────▶   │ Grantor
//! a run's fence step ── move to the box, its end ── back ───────▶   └── <data>/ownership/HOST.{a,b}, before anything follows from it
//! ```
//!
//! A host gets a desk when a plan wants something of it, and keeps it: its term must never begin anew.
//!
//! # What a lease is worth
//!
//! [`Ownership::proof`]: the host's silence ends its ownership only when it has stored that it is leased *and* has taken the plan as it is now; what
//! the plan before stopped says nothing about an address that came later. So before another plan is sent, "taken" is struck out in the file,
//! and it is entered again when the agent has said so.
//!
//! A plan that goes gives the host back to itself: first the lease ends, by the agent's own word in the new term; only then the agent is told
//! that nothing is listed any more, for what a host that is down has to start again is in the plan it has.
//!
//! # Power loss
//!
//! A desk's file is a twin record, stored before what follows from it is said or done. A store that fails makes the machine anew from what is
//! there; a file that cannot be read grants nothing, moves nothing and is an alert until somebody says who owns ([`Ownership::adopt`]).

mod desk;
#[cfg(test)]
mod tests;

pub use desk::{Fencing, Report, StandbyWant, Want, nothing_for};

use crate::{
    catalog::Catalog,
    clock::Clock,
    events::{Event, Events},
};
use desk::{Context, Desk};
use durable::{Disk, DiskError};
use model::{HostId, Owner};
use replication::ownership::GrantorEvent;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
};
use tokio::sync::mpsc;
use wire::{LeaseEnd, LeaseRequest, LeaseRules, Message};

/// In the data folder.
const DIR: &str = "ownership";
/// Messages that wait for one agent's connection; what finds no room is said again.
pub const LINE_MAX: usize = 64;

/// See the module.
pub struct Ownership {
    disk: Arc<dyn Disk>,
    events: Arc<Events>,
    catalog: Arc<Catalog>,
    clock: Clock,
    desks: Mutex<BTreeMap<HostId, Arc<Mutex<Desk>>>>,
    lines: Lines,
}

/// Every agent's control connection, with the version it speaks: a standby is told of another host's ownership.
type Lines = Mutex<BTreeMap<HostId, (u16, mpsc::Sender<Message>)>>;

/// What the plans want, all of it.
#[derive(Default, Debug)]
pub struct Wants {
    pub of: BTreeMap<HostId, Want>,
    /// Hosts that are being run or taken over: nothing changes for them until that is over.
    pub busy: BTreeSet<HostId>,
    /// Every plan could be read. Otherwise a host without one may have it in the file that cannot.
    pub all_read: bool,
}

impl Ownership {
    /// Reads every desk. Blocking.
    pub fn open(
        disk: Arc<dyn Disk>,
        events: Arc<Events>,
        catalog: Arc<Catalog>,
        clock: Clock,
    ) -> Result<Self, DiskError> {
        let dir = Path::new(DIR);
        disk.create_dir(dir)?;
        disk.cleanup(dir)?;
        let mut hosts = BTreeSet::new();
        for entry in disk.list(dir)? {
            let name = entry.name;
            let host: Option<HostId> =
                name.strip_suffix(".a").or_else(|| name.strip_suffix(".b")).and_then(|id| id.parse().ok());
            hosts.extend(host);
        }
        let this = Self { disk, events, catalog, clock, desks: Mutex::default(), lines: Mutex::default() };
        for host in hosts {
            this.desk(host);
        }
        Ok(this)
    }

    fn context(&self, host: HostId) -> Context<'_> {
        let name = self.catalog.data().host(host).map_or_else(|| host.to_string(), |h| h.name.clone());
        Context {
            disk: &*self.disk,
            dir: Path::new(DIR),
            events: &self.events,
            clock: self.clock,
            name,
            lines: &self.lines,
        }
    }
    fn find(&self, host: HostId) -> Option<Arc<Mutex<Desk>>> {
        crate::lock(&self.desks).get(&host).cloned()
    }
    fn desk(&self, host: HostId) -> Arc<Mutex<Desk>> {
        let mut desks = crate::lock(&self.desks);
        let desk = desks.entry(host).or_insert_with(|| Arc::new(Mutex::new(Desk::load(&self.context(host), host))));
        Arc::clone(desk)
    }
    /// Does something at a desk; none when there is no such.
    fn at<T>(&self, host: HostId, act: impl FnOnce(&mut Desk, &Context<'_>) -> T) -> Option<T> {
        let desk = self.find(host)?;
        let context = self.context(host);
        let mut desk = crate::lock(&desk);
        Some(act(&mut desk, &context))
    }

    // ------------------------------------------------------------ the host's agent. All of it may wait for the disk.

    /// Its control connection is there; what the box has to say goes to `to`.
    pub fn connected(&self, host: HostId, version: u16, to: mpsc::Sender<Message>) {
        // An agent whose box lost everything still has its lease: it is told the truth, which is that nobody knows.
        crate::lock(&self.lines).insert(host, (version, to.clone()));
        let desk = self.desk(host);
        crate::lock(&desk).connected(&self.context(host), version, to);
        // It may stand by for others.
        let known: Vec<HostId> = crate::lock(&self.desks).keys().copied().collect();
        for other in known.into_iter().filter(|other| *other != host) {
            self.at(other, |desk, context| desk.send_standby_plan(context));
        }
    }
    pub fn request(&self, host: HostId, request: LeaseRequest) {
        self.at(host, |desk, context| desk.request(context, request));
    }
    pub fn released(&self, host: HostId, end: LeaseEnd) {
        self.at(host, |desk, context| desk.on(context, GrantorEvent::Released { from: Owner::Host, end }));
    }
    pub fn plan_taken(&self, host: HostId, version: u64, refused: Option<String>) {
        self.at(host, |desk, context| desk.plan_taken(context, version, refused));
    }

    // ------------------------------------------------------------ standbys' agents

    /// Whether an agent has a word in another host's ownership.
    pub fn is_standby(&self, whose: HostId, agent: HostId) -> bool {
        self.at(whose, |desk, _| desk.has_standby(agent)).unwrap_or(false)
    }
    pub fn standby_asks(&self, whose: HostId, from: HostId, request: LeaseRequest) {
        self.at(whose, |desk, context| desk.standby_asks(context, from, request));
    }
    pub fn standby_released(&self, whose: HostId, from: HostId, end: LeaseEnd) {
        self.at(whose, |desk, context| desk.standby_released(context, from, end));
    }
    pub fn standby_took_plan(&self, whose: HostId, version: u64, refused: Option<String>) {
        self.at(whose, |desk, context| desk.standby_took_plan(context, version, refused));
    }
    /// Whether the standby would know what to start.
    pub fn standby_knows(&self, whose: HostId) -> Result<(), String> {
        self.at(whose, |desk, _| desk.standby_knows()).unwrap_or_else(|| Err("no plan has a standby for it".into()))
    }
    /// From the box, which does not serve.
    pub fn give_to_standby(&self, whose: HostId) -> Result<(), String> {
        self.at(whose, Desk::give_to_standby).unwrap_or_else(|| Err("no plan has a standby for it".into()))
    }

    // ------------------------------------------------------------ plans

    /// What the plans want from now on.
    pub fn set_wants(&self, mut wants: Wants) {
        let known: Vec<HostId> = crate::lock(&self.desks).keys().copied().collect();
        let all: BTreeSet<HostId> = known.into_iter().chain(wants.of.keys().copied()).collect();
        for host in all {
            let desk = self.desk(host);
            let want = wants.of.remove(&host);
            let is_busy = wants.busy.contains(&host);
            crate::lock(&desk).set_want(&self.context(host), want, is_busy, wants.all_read);
        }
    }
    /// The key of the host's datagrams, when its plan has them.
    pub fn beat_key(&self, host: HostId) -> Option<[u8; 32]> {
        self.at(host, |desk, _| desk.beat_key())?
    }

    // ------------------------------------------------------------ runs

    /// Whether the host's silence, or its own word, will end its ownership for certain; else why not.
    pub fn proof(&self, host: HostId) -> Result<(), String> {
        self.at(host, |desk, _| desk.proof()).unwrap_or_else(|| Err("no plan has leased it".into()))
    }
    /// Begins to take the host from its owner, or goes on with that; how far it has come.
    pub fn take(&self, host: HostId) -> Result<Fencing, String> {
        self.at(host, Desk::take).unwrap_or_else(|| Err("no plan has leased it".into()))
    }
    /// The host's power is off, or somebody has sworn to it.
    pub fn fenced_by_power(&self, host: HostId) -> Result<Fencing, String> {
        let done = self.at(host, |desk, context| {
            desk.on(context, GrantorEvent::FencedByPower);
            desk.fencing(context)
        });
        done.unwrap_or_else(|| Err("no plan has leased it".into()))
    }
    /// The box serves no more, or will not begin to: the host may.
    pub fn give_back(&self, host: HostId, rules: Option<LeaseRules>) -> Result<(), String> {
        self.at(host, |desk, context| desk.give_back(context, rules)).unwrap_or(Ok(()))
    }
    /// An operator says who owns.
    pub fn adopt(&self, host: HostId, owner: Owner) -> Result<(), String> {
        let desk = self.desk(host);
        let done = crate::lock(&desk).adopt(&self.context(host), owner);
        if done.is_ok() {
            let name = self.context(host).name;
            self.events.note(Event::OwnerChanged, name, format!("{owner} owns it: somebody said so"));
        }
        done
    }

    // ------------------------------------------------------------ to be looked at

    pub fn report(&self, host: HostId) -> Option<Report> {
        self.at(host, |desk, context| desk.report(context))
    }
    pub fn reports(&self) -> Vec<(HostId, Report)> {
        let hosts: Vec<HostId> = crate::lock(&self.desks).keys().copied().collect();
        // A host that was only ever connected is nobody's concern here.
        hosts.into_iter().filter_map(|h| Some((h, self.report(h)?))).filter(|(_, r)| r.matters).collect()
    }
    /// What an administrator has to look at.
    pub fn alerts(&self) -> Vec<String> {
        self.reports().into_iter().flat_map(|(_, report)| report.alerts).collect()
    }
}
