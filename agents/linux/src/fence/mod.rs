//! The host's end of a takeover plan: holds the lease, and when it runs out takes the addresses down and stops the services before anybody
//! else may begin. The protocol, and why two never serve, is in `replication::ownership`; this page is what it does to a host.
//!
//! ```text
//!  box ◀── control connection (engine) ──▶ Fence thread: Holder ── addresses, itself, by netlink
//!                                              │ order                └─ each with the lease's rest as its lifetime: the kernel's own end
//!                                              ▼
//!                                          worker: services, one order at a time, each command limited
//! ```
//!
//! A thread of its own, because the engine may be slow and a lease may not. It never waits for the engine, for a service or for the box. It
//! begins when the box has sent a plan for this host, and at each start after that; a host without a plan has no such thread, and nothing
//! is ever stopped on it.
//!
//! # What holds when the agent does not
//!
//! The agent killed: it is started again within seconds and goes on with the lease of this boot. The agent stopped or starved: the kernel takes the
//! addresses down when their lifetime ends, at the end of the lease rounded down to whole seconds. The host frozen whole: the same, when it goes on.
//! Rebooted: down until the box grants; units are not started and addresses answer nobody before that, from the beginning of the boot ([`gate`]).
//!
//! # Addresses
//!
//! Before services are started for a grant, each IPv4 address that is not up here is asked for on its link; when another machine has it, nothing
//! is started, that machine is named in the log, and it is tried again later. Put up, addresses are announced, again and again over
//! seconds ([`crate::arp`]). For an IPv6 address the kernel asks, when it is put up: one that another machine has is taken down again.
//!
//! # Limits
//!
//! Services without an
//! address in the plan that are stopped too late are stopped too late: what must not serve twice has its address in the plan. A thread that
//! is stopped between reading the clock and the system call gives an address as many seconds more as it was stopped; it looks at the clock again
//! after it and takes the address down then.
//!
//! # Power loss
//!
//! `ownership.json` and `takeover-plan.json` are replaced whole and flushed before what follows from them; a damaged one counts as fenced.

pub mod addresses;
pub mod filter;
pub mod gate;
mod services;
mod store;

pub use gate::Gate;
pub use services::{Orders, ServiceError, Services};
pub use store::{Store, StoreError};

use crate::{arp, clock};
use addresses::Lifetime;
use model::{HostId, MonoTime, Term};
use replication::ownership::{
    Holder, HolderAction, HolderEvent, HolderRecord, HolderState, RENEW_MS, StopReason, Until,
};
use std::{
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use wire::{Holding, HostPlan, Message, PlanService};

/// How long stopping may take where no lease has said so.
const STOP_MS: u64 = 10_000;
/// One service may take this long to start; databases replay their logs.
const START_LIMIT: Duration = Duration::from_secs(300);
/// The kernel asks once for an IPv6 address, after up to a second.
const KERNEL_ASKS: Duration = Duration::from_secs(5);
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// What is not yet as ordered is looked at again after this.
const AGAIN: Duration = Duration::from_millis(200);
/// Messages that wait for the thread; it takes them at once.
const INBOX_MAX: usize = 64;

/// To the thread.
enum Input {
    Message(Box<Message>),
    Plan(Box<HostPlan>),
    /// All of an order's services are as it says; or starting one failed.
    Done {
        order: u64,
    },
    Failed {
        order: u64,
    },
    Stop,
}

/// Takes what is to be sent to the box. Must not wait.
pub type Tell = Box<dyn Fn(Message) + Send>;

/// How the engine holds it.
pub struct Fence {
    to: mpsc::SyncSender<Input>,
    thread: Option<thread::JoinHandle<()>>,
    up: Arc<AtomicBool>,
}

impl Fence {
    /// Goes on with what is stored for `plan`'s host. The network namespace is that of the calling thread.
    pub fn start(
        whose: HostId,
        plan: HostPlan,
        (store, gate): (Store, Gate),
        services: Services,
        tell: Tell,
    ) -> io::Result<Self> {
        let (to, inbox) = mpsc::sync_channel(INBOX_MAX);
        let random = crate::state::random_128()?;
        let nonce = u64::from_ne_bytes(random[..8].try_into().unwrap_or([0; 8]));
        let up = Arc::new(AtomicBool::new(true));
        let of_keeper = Arc::clone(&up);
        let mut keeper = Keeper { whose, plan, store, gate, services, tell, to_self: to.clone(), nonce, up: of_keeper };
        let thread = thread::Builder::new().name("fence".to_owned()).spawn(move || keeper.run(&inbox))?;
        Ok(Self { to, thread: Some(thread), up })
    }
    /// Whether anything of it may be up.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }
    /// From the box. Dropped when the thread has no room for it: it will be said again.
    pub fn message(&self, message: Message) {
        let _ = self.to.try_send(Input::Message(Box::new(message)));
    }
    pub fn plan(&self, plan: HostPlan) {
        let _ = self.to.try_send(Input::Plan(Box::new(plan)));
    }
}

impl Drop for Fence {
    /// Ends the thread and stops nothing: the next agent goes on with the lease, and the kernel ends the addresses if there is none.
    fn drop(&mut self) {
        let _ = self.to.send(Input::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Keeper {
    whose: HostId,
    plan: HostPlan,
    store: Store,
    gate: Gate,
    services: Services,
    tell: Tell,
    to_self: mpsc::SyncSender<Input>,
    nonce: u64,
    up: Arc<AtomicBool>,
}

impl Keeper {
    fn run(&mut self, inbox: &mpsc::Receiver<Input>) {
        self.list();
        let mut holder = self.begin();
        let mut next_request = clock::boot();
        loop {
            self.up.store(holder.holding() != Holding::Down, Ordering::Release);
            let now = clock::boot();
            if now >= next_request {
                next_request = now.plus_ms(RENEW_MS);
                // The clock is read before it is sent: the lease counts from here.
                let request = holder.request(clock::boot());
                (self.tell)(Message::Lease(request));
            }
            let wake = holder.next_tick().map_or(next_request, |tick| tick.min(next_request));
            let wait = Duration::from_millis(wake.ms_since(clock::boot()) + 1);
            let event = match inbox.recv_timeout(wait) {
                Ok(Input::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(Input::Plan(plan)) => {
                    let gone = self.plan.addresses.iter().filter(|a| !plan.addresses.contains(a));
                    keep(gone);
                    self.plan = *plan;
                    self.list();
                    continue;
                }
                Ok(Input::Message(message)) => match *message {
                    Message::LeaseAnswer(answer) => HolderEvent::Answer(answer),
                    Message::LeaseRevoke(end) => HolderEvent::Revoke(end),
                    _ => continue,
                },
                Ok(Input::Failed { order }) => HolderEvent::RaiseFailed { order },
                Ok(Input::Done { order }) => match self.finish(&holder, order) {
                    Some(event) => event,
                    None => continue,
                },
                Err(mpsc::RecvTimeoutError::Timeout) => HolderEvent::Tick,
            };
            // Read after the event has arrived.
            let actions = holder.on(event, clock::boot());
            self.act(&mut holder, actions);
        }
    }

    fn begin(&mut self) -> Holder {
        let record = match self.store.holder() {
            Ok(record) => record.unwrap_or_else(|| self.store.fresh()),
            Err(e) => {
                tracing::error!(error = %crate::error_chain(&e), "what this host knows of its ownership cannot be read: it stays down until the box says that it may serve");
                HolderRecord { fenced: true, term: Term::ZERO }
            }
        };
        // Another life, other nonces: no answer to the one before is taken for one to this.
        self.nonce = self.nonce.wrapping_add(1 << 32);
        let (mut holder, actions) =
            Holder::new(self.whose, record, self.store.lease(), self.nonce, STOP_MS, clock::boot());
        // Of an agent before this one, which may have been killed on the way or have known no gate.
        let serves =
            matches!(holder.state(), HolderState::Raising { .. } | HolderState::Serving { .. } | HolderState::ByHand);
        let agreed = self.gate.mark(record.fenced).and_then(|()| if serves { self.gate.let_serve() } else { Ok(()) });
        if let Err(e) = agreed {
            tracing::error!(error = %crate::error_chain(&e), "the gate of the next boot is not as it should be");
        }
        self.act(&mut holder, actions);
        holder
    }

    /// What the next boot holds.
    fn list(&self) {
        if let Err(e) = self.gate.list(&self.plan) {
            tracing::error!(error = %crate::error_chain(&e), "the next boot may start services of the plan before the agent stops them");
        }
    }

    /// In order; when something cannot be stored nothing after it is done, and all begins from what is stored.
    fn act(&mut self, holder: &mut Holder, actions: Vec<HolderAction>) {
        for action in actions {
            if let Err(e) = self.act_one(action) {
                tracing::error!(error = %crate::error_chain(&e), "could not store who owns this host");
                thread::sleep(AGAIN);
                *holder = self.begin();
                return;
            }
        }
    }

    fn act_one(&mut self, action: HolderAction) -> Result<(), StoreError> {
        match action {
            HolderAction::Persist(record) => {
                tracing::info!(fenced = record.fenced, term = record.term.0, "ownership of this host");
                let gate = |done: Result<(), gate::GateError>| done.map_err(|e| StoreError::Gate(Box::new(e)));
                // Held and not fenced is put right by the next start; fenced and not held would serve at a boot.
                if record.fenced {
                    gate(self.gate.mark(true))?;
                }
                self.store.store_holder(record)?;
                if !record.fenced {
                    gate(self.gate.mark(false))?;
                }
            }
            HolderAction::Remember(run) => self.store.store_lease(run)?,
            HolderAction::Extend { until } => self.extend(until),
            HolderAction::Raise { order, .. } => {
                tracing::warn!("this host serves again: its services are started");
                match self.gate.let_serve() {
                    Ok(()) => self.work(order, Work::Start),
                    Err(e) => {
                        tracing::error!(error = %crate::error_chain(&e), "its services cannot be started: the gate does not open");
                        let _ = self.to_self.try_send(Input::Failed { order });
                    }
                }
            }
            HolderAction::Stop { order, why, by } => {
                tracing::error!(%why, "this host stops serving: its addresses are taken down and its services stopped");
                // First, and here: nothing that can wait stands before it.
                self.addresses_down();
                // From here on nobody else starts them either.
                if let Err(e) = self.gate.hold() {
                    tracing::error!(error = %crate::error_chain(&e), "somebody else may start a service of the plan");
                }
                let limit = Duration::from_millis(by.ms_since(clock::boot()).max(1));
                self.work(order, Work::Stop { limit, boot: why == StopReason::Booted });
            }
            HolderAction::LastResort { order } => {
                tracing::error!("services did not stop in time and are killed");
                self.addresses_down();
                self.work(order, Work::Kill);
            }
            HolderAction::Released(end) => (self.tell)(Message::LeaseReleased(end)),
        }
        Ok(())
    }

    /// The services of an order are done: the addresses' turn, and what the machine is told.
    fn finish(&mut self, holder: &Holder, order: u64) -> Option<HolderEvent> {
        match holder.state() {
            HolderState::Raising { until, order: current } if current == order => {
                let raised = self.raise_addresses(until);
                if raised {
                    self.announce();
                }
                Some(if raised { HolderEvent::Raised { order } } else { HolderEvent::RaiseFailed { order } })
            }
            HolderState::ByHand => {
                if self.raise_addresses(Until::Forever) {
                    self.announce();
                }
                None
            }
            HolderState::Stopping { order: current, .. } if current == order => {
                self.addresses_down();
                if self.addresses_are_down() {
                    return Some(HolderEvent::Stopped { order });
                }
                let to = self.to_self.clone();
                again(move || {
                    let _ = to.try_send(Input::Done { order });
                });
                None
            }
            _ => None,
        }
    }

    fn addresses_down(&self) {
        for address in &self.plan.addresses {
            if let Err(e) = addresses::down(address) {
                tracing::error!(error = %crate::error_chain(&e), "an address stays up");
            }
        }
    }
    fn addresses_are_down(&self) -> bool {
        self.plan.addresses.iter().all(|a| matches!(addresses::is_up(a), Ok(false)))
    }

    fn raise_addresses(&self, until: Until) -> bool {
        self.plan.addresses.iter().all(|address| match put_up(address, until) {
            Ok(up) => up,
            Err(e) => {
                tracing::error!(error = %crate::error_chain(&e), "an address could not be put up");
                false
            }
        })
    }

    /// Tells the neighbours, from threads of their own: it takes seconds.
    fn announce(&self) {
        for address in &self.plan.addresses {
            let address = address.clone();
            let spawned = thread::Builder::new().name("fence-announce".to_owned()).spawn(move || announce(&address));
            if let Err(e) = spawned {
                tracing::error!(error = %e, "could not start a thread that announces an address");
            }
        }
    }

    /// Those that are up stay until then; one that has gone is not brought back by a renewal.
    fn extend(&self, until: Until) {
        for address in &self.plan.addresses {
            let done = match addresses::is_up(address) {
                Ok(true) => put_up(address, until).map(drop),
                Ok(false) => continue,
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                tracing::warn!(error = %crate::error_chain(&e), "the lease of an address could not be renewed in the kernel");
            }
        }
    }

    fn work(&self, order: u64, work: Work) {
        self.services.orders.begin(order);
        let (plan, services, to) = (self.plan.services.clone(), self.services.clone(), self.to_self.clone());
        let addresses = self.plan.addresses.clone();
        let name = "fence-work".to_owned();
        let spawned = thread::Builder::new().name(name).spawn(move || {
            let input = match work {
                Work::Start if !all_free(&addresses) => Some(Input::Failed { order }),
                Work::Start => start_all(&services, order, &plan),
                Work::Stop { limit, boot } => stop_all(&services, order, &plan, limit, boot),
                Work::Kill => kill_all(&services, order, &plan),
            };
            if let Some(input) = input {
                let _ = to.send(input);
            }
        });
        if let Err(e) = spawned {
            tracing::error!(error = %e, "could not start a thread for the services");
            let _ = self.to_self.try_send(Input::Failed { order });
        }
    }
}

/// Addresses that no lease ends any more stay for good, if they are up; the kernel would take them down at the end of the last lease.
fn keep<'a>(all: impl Iterator<Item = &'a wire::PlanAddress>) {
    for address in all {
        let kept = match addresses::is_up(address) {
            Ok(true) => addresses::up(address, Lifetime::Forever),
            Ok(false) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = kept {
            tracing::error!(error = %crate::error_chain(&e), "an address will go with its last lease");
        }
    }
}

/// The host is its own again, as before it had a plan; what serves goes on, and what is down stays down. Answers whether there was a plan. The
/// agent must not run.
pub fn let_go(store: &Store, gate: &Gate) -> Result<bool, StoreError> {
    // A plan that cannot be read must not keep the agent from being removed.
    match store.plan() {
        Ok(plan) => keep(plan.iter().flat_map(|p| &p.addresses)),
        Err(e) => {
            tracing::error!(error = %crate::error_chain(&e), "addresses of the plan may go with their last lease")
        }
    }
    let was = store.forget()?;
    // After the record: a host that is held and has none is let go by nobody.
    gate.forget().map_err(|e| StoreError::Gate(Box::new(e)))?;
    Ok(was)
}

enum Work {
    Start,
    Stop { limit: Duration, boot: bool },
    Kill,
}

/// False: it may not be up any more, and is down again.
fn put_up(address: &wire::PlanAddress, until: Until) -> Result<bool, addresses::AddressError> {
    let end = match until {
        Until::Forever => return addresses::up(address, Lifetime::Forever).map(|()| true),
        Until::At { end, .. } => end,
    };
    let seconds = |now: MonoTime| u32::try_from(end.ms_since(now) / 1000).unwrap_or(u32::MAX);
    let before = seconds(clock::boot());
    if before == 0 {
        addresses::down(address)?;
        return Ok(false);
    }
    addresses::up(address, Lifetime::Seconds(before))?;
    // Stopped in between, this thread would have given it as much more.
    if seconds(clock::boot()) + 1 < before {
        addresses::down(address)?;
        return Ok(false);
    }
    Ok(true)
}

fn ip_of(address: &wire::PlanAddress) -> Option<IpAddr> {
    address.address.split('/').next()?.parse().ok()
}

/// Asks for those that are not up here, all at once; who has one of them is named.
fn all_free(addresses: &[wire::PlanAddress]) -> bool {
    let free = |address: &wire::PlanAddress| {
        let Some(IpAddr::V4(v4)) = ip_of(address) else { return true };
        if matches!(addresses::is_up(address), Ok(true)) {
            return true;
        }
        match arp::Arp::open(&address.device).and_then(|arp| arp.map_or(Ok(None), |arp| arp.who_has(v4))) {
            Ok(None) => true,
            Ok(Some(other)) => {
                tracing::error!(address = %address.address, device = %address.device, %other, "another machine has this address: nothing is started");
                false
            }
            Err(e) => {
                tracing::error!(error = %crate::error_chain(&e), address = %address.address, "whether another machine has this address could not be asked");
                false
            }
        }
    };
    thread::scope(|scope| {
        let asked: Vec<_> = addresses.iter().map(|address| scope.spawn(move || free(address))).collect();
        asked.into_iter().all(|one| one.join().unwrap_or(false))
    })
}

fn announce(address: &wire::PlanAddress) {
    let Some(ip) = ip_of(address) else { return };
    if let IpAddr::V6(v6) = ip {
        let begun = Instant::now();
        loop {
            match arp::asked_by_kernel(&address.device, v6) {
                Ok(arp::Asked::Still) if begun.elapsed() < KERNEL_ASKS => thread::sleep(AGAIN),
                Ok(arp::Asked::Taken) => {
                    tracing::error!(address = %address.address, device = %address.device, "another machine has this address: it is taken down again");
                    if let Err(e) = addresses::down(address) {
                        tracing::error!(error = %crate::error_chain(&e), "an address stays up");
                    }
                    return;
                }
                Ok(arp::Asked::Gone) => {
                    // One with an end the kernel takes away by itself when another machine has it.
                    tracing::error!(address = %address.address, device = %address.device, "this address is gone: another machine has it, or its lease has ended");
                    return;
                }
                _ => break,
            }
        }
    }
    if let Err(e) = arp::announce(&address.device, ip, || matches!(addresses::is_up(address), Ok(true))) {
        tracing::warn!(error = %crate::error_chain(&e), address = %address.address, "neighbours were not told that this address is here now");
    }
}

fn start_all(services: &Services, order: u64, plan: &[PlanService]) -> Option<Input> {
    for service in plan {
        match services.start(order, service, START_LIMIT) {
            Ok(()) => {}
            Err(ServiceError::Overtaken { .. }) => return None,
            Err(e) => {
                tracing::error!(error = %crate::error_chain(&e), "a service could not be started");
                return Some(Input::Failed { order });
            }
        }
    }
    Some(Input::Done { order })
}

/// In the order's time, the last first; done when each has been looked at and is stopped.
fn stop_all(services: &Services, order: u64, plan: &[PlanService], limit: Duration, boot: bool) -> Option<Input> {
    let begun = Instant::now();
    for service in plan.iter().rev() {
        let left = limit.saturating_sub(begun.elapsed()).max(AGAIN);
        match services.stop(order, service, left) {
            Ok(()) => {}
            Err(ServiceError::Overtaken { .. }) => return None,
            // At a boot a unit may not be known yet; it is looked at below like the others.
            Err(e) if boot => tracing::info!(error = %crate::error_chain(&e), "a service was not stopped"),
            Err(e) => tracing::error!(error = %crate::error_chain(&e), "a service did not stop"),
        }
    }
    until_stopped(services, order, plan)
}

fn kill_all(services: &Services, order: u64, plan: &[PlanService]) -> Option<Input> {
    for service in plan.iter().rev() {
        if let Err(e) = services.kill(order, service, KILL_LIMIT) {
            tracing::error!(error = %crate::error_chain(&e), "a service could not be killed");
        }
    }
    until_stopped(services, order, plan)
}

fn until_stopped(services: &Services, order: u64, plan: &[PlanService]) -> Option<Input> {
    loop {
        let running = plan.iter().find(|s| !services.is_stopped(order, s, KILL_LIMIT));
        let Some(service) = running else { return Some(Input::Done { order }) };
        // Somebody else may have started it, or it would not stop.
        match services.stop(order, service, KILL_LIMIT) {
            Err(ServiceError::Overtaken { .. }) => return None,
            _ => thread::sleep(AGAIN),
        }
    }
}

fn again(f: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name("fence-again".to_owned()).spawn(move || {
        thread::sleep(AGAIN);
        f();
    });
    if let Err(e) = spawned {
        tracing::error!(error = %e, "could not start a thread");
    }
}
