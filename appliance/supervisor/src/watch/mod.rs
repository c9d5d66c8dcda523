//! Watching hosts: a [`takeover::detect::Detector`] for each host whose plan asks for one, what it is fed with, and what follows.
//!
//! ```text
//! connections ─▶ ears ──┐
//! requests ─ ping, arp ─┼─▶ Detector of each host ──▶ alarm, once for each cause, or a takeover begun with no hand on it
//! datagrams ───── beats ┘
//! ```
//!
//! One thread does all of it, many times a second. It waits for no connection, and for the disk only when a plan changes or the owner of a host is
//! being stored; what it begins runs on threads of its own.
//!
//! # When a takeover begins by itself
//!
//! When the detector says so, which it does only for a plan that is automatic; no takeover of the host is open; the box can ping, if that is part of
//! the proof; and the host's lease would fence it, or the plan has a hook that does. Otherwise it is an alarm that says what is in the way. One
//! attempt for each time that the host falls silent: what was refused or has failed is not tried again until the host was heard.
//!
//! # Limits
//!
//! What was heard is not kept: after a start of the daemon a host that was not heard since is left to a person, unless its plan says
//! `unheard = true`.

mod arp;
mod beats;
mod ears;
mod ping;

pub use ears::{Ears, HeardOf};

use crate::{
    App,
    events::Event,
    pki,
    takeovers::{Watched, Wish},
};
use arp::Arp;
use beats::Beats;
use model::{HostId, MonoTime};
use ping::Pinger;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Duration,
};
use takeover::{
    detect::{Cause, Channel, Decision, Detector, Fact, Points, ProbeSaid, Verdict, Witness},
    state::Kind,
};
use wire::{PROBE_OUTPUT_MAX, ProbeEnd, ProbeResult};

/// Between two looks; silence is counted in hundreds of milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const IDLE_EVERY: Duration = Duration::from_millis(200);
/// How often plans, names and connections are looked at anew.
const PLANS_EVERY_MS: u64 = 500;
/// Gateway and others are asked so often.
const WITNESS_MS: u64 = 500;
/// What is not so for longer is no alarm: between a host's silence and the first proof of the uplink after it there is always a doubt.
const ALARM_AFTER_MS: u64 = 3_000;
/// A probe whose end comes and goes is told of no more often.
const PROBE_TOLD_MS: u64 = 60_000;
/// Of a probe's reason so much is kept.
const PROBE_WHY_MAX: usize = 400;

/// One reason of a decision, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct ReasonShown {
    /// `for`, `against` or `neither`.
    pub points: &'static str,
    pub text: String,
    pub since_ms: u64,
    pub advisory: bool,
}

/// The last result of a probe, as its host's agent told it.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeShown {
    pub name: String,
    /// `works`, `fails`, `broken`.
    pub end: &'static str,
    pub why: String,
    /// What a script printed.
    pub output: String,
    pub took_ms: u64,
    pub age_ms: u64,
}

/// What is seen of a host.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    pub plan: String,
    pub automatic: bool,
    /// `well`, `watching`, `doubt`, `takeover`.
    pub verdict: &'static str,
    pub text: String,
    pub reasons: Vec<ReasonShown>,
    pub probes: Vec<ProbeShown>,
    /// What an administrator is asked to look at, as long as it is so.
    pub alarm: Option<String>,
    /// Why no takeover would begin by itself now, should the host fall silent; none: it would.
    pub in_the_way: Option<String>,
}

/// How the rest of the daemon holds it.
#[derive(Default)]
pub struct Watch {
    seen: Mutex<BTreeMap<HostId, Seen>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    pub fn start(&self, app: &Arc<App>) -> io::Result<()> {
        let watcher_app = Arc::clone(app);
        let started = thread::Builder::new().name("watch".into()).spawn(move || run(&watcher_app))?;
        *crate::lock(&self.thread) = Some(started);
        Ok(())
    }
    /// After the daemon was told to stop. Blocking.
    pub fn join(&self) {
        if let Some(thread) = crate::lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
    pub fn seen(&self, host: HostId) -> Option<Seen> {
        crate::lock(&self.seen).get(&host).cloned()
    }
    pub fn alerts(&self) -> Vec<String> {
        crate::lock(&self.seen).values().filter_map(|seen| seen.alarm.clone()).collect()
    }
}

fn run(app: &Arc<App>) {
    let draw = || pki::random_128().map(|b| u64::from_ne_bytes(b[..8].try_into().unwrap_or([0; 8])));
    let key = draw().unwrap_or_default().to_ne_bytes();
    let mut round = Round {
        pinger: Pinger::new(key),
        arp: Arp::new(),
        beats: None,
        hosts: BTreeMap::new(),
        witnesses: BTreeMap::new(),
        planned: None,
    };
    while !*app.stop.borrow() {
        // A defect here must be seen, and must not end the watching.
        let turn = std::panic::AssertUnwindSafe(|| round.turn(app, &draw));
        if std::panic::catch_unwind(turn).is_err() {
            app.events.note(
                Event::JobFailed,
                "watch",
                "the thread that watches hosts panicked; the daemon's log says why",
            );
            round.hosts.clear();
        }
        thread::sleep(if round.hosts.is_empty() { IDLE_EVERY } else { LOOK_EVERY });
    }
}

struct Host {
    watched: Watched,
    address: Option<IpAddr>,
    detector: Detector,
    /// The last beats that were handed on.
    stream: MonoTime,
    /// Since when something is amiss without a break.
    amiss: Option<MonoTime>,
    /// The alarm that was told.
    told: Option<String>,
    /// Silence has led to a takeover already, whatever became of it.
    tried: bool,
    probed: BTreeMap<String, Probed>,
}

/// A probe's last result.
struct Probed {
    result: ProbeResult,
    at: MonoTime,
    /// The end that was told last, and when if that was an event.
    told: (&'static str, Option<MonoTime>),
}

struct Round {
    pinger: Pinger,
    arp: Arp,
    beats: Option<Beats>,
    hosts: BTreeMap<HostId, Host>,
    /// Hosts' beats that were handed on as witnesses.
    witnesses: BTreeMap<HostId, MonoTime>,
    planned: Option<MonoTime>,
}

impl Round {
    fn turn(&mut self, app: &Arc<App>, draw: &dyn Fn() -> Option<u64>) {
        let now = app.clock.mono();
        let heard = app.links.ears.all();
        if self.planned.is_none_or(|at| now.ms_since(at) >= PLANS_EVERY_MS) {
            self.planned = Some(now);
            app.takeovers.settle(app);
            self.plans(app, &heard, now);
        }
        self.pinger.send(now);
        self.arp.send(now);
        self.feed(app, &heard, now, draw);
        // What had arrived by then has been handed over.
        let open = app.takeovers.open_subjects();
        for (host, at) in &mut self.hosts {
            let is_open = open.contains(&at.watched.subject);
            let seen = at.decide(app, *host, (&self.pinger, &self.arp, self.beats.as_ref()), is_open, now);
            crate::lock(&app.watch.seen).insert(*host, seen);
        }
    }

    /// Takes over what the plans say now.
    fn plans(&mut self, app: &App, heard: &[HeardOf], now: MonoTime) {
        let mut wanted: BTreeMap<HostId, Watched> =
            app.takeovers.watched(app).into_iter().map(|w| (w.host, w)).collect();
        self.hosts.retain(|host, at| wanted.get(host).is_some_and(|w| w.detect.policy == at.watched.detect.policy));
        crate::lock(&app.watch.seen).retain(|host, _| wanted.contains_key(host));
        let hosts: Vec<HostId> = wanted.keys().copied().collect();
        for host in hosts {
            let Some(watched) = wanted.remove(&host) else { continue };
            let from = heard.iter().find(|h| h.host == host).map(|h| h.from);
            let address = watched.detect.address.or(from);
            if let Some(at) = self.hosts.get_mut(&host) {
                at.probed.retain(|name, _| watched.detect.probes.iter().any(|p| p.name == *name));
                (at.watched, at.address) = (watched, address);
                continue;
            }
            // A plan that was checked when it was kept has a policy that works.
            let Ok(detector) = Detector::new(watched.detect.policy.clone(), now) else { continue };
            let at = Host {
                watched,
                address,
                detector,
                stream: MonoTime(0),
                amiss: None,
                told: None,
                tried: false,
                probed: BTreeMap::new(),
            };
            self.hosts.insert(host, at);
        }
        self.pinger.set(&self.pinged(), now);
        self.arp.set(&self.asked_by_arp(), now);
        self.listen(app, heard);
    }

    fn pinged(&self) -> BTreeMap<IpAddr, u64> {
        let mut pinged: BTreeMap<IpAddr, u64> = BTreeMap::new();
        let mut ask = |address: IpAddr, period_ms: u64| {
            let period = pinged.entry(address).or_insert(period_ms);
            *period = (*period).min(period_ms);
        };
        for at in self.hosts.values() {
            let detect = &at.watched.detect;
            let rule = detect.policy.channels.iter().find(|r| r.channel == Channel::Icmp);
            if let (Some(address), Some(rule)) = (at.address, rule) {
                ask(address, rule.period_ms);
            }
            detect.gateway.iter().chain(&detect.others).for_each(|address| ask(*address, WITNESS_MS));
        }
        pinged
    }

    fn asked_by_arp(&self) -> BTreeMap<IpAddr, u64> {
        let of = |at: &Host| {
            let rule = at.watched.detect.policy.channels.iter().find(|r| r.channel == Channel::Arp)?;
            Some((at.address?, rule.period_ms))
        };
        self.hosts.values().filter_map(of).collect()
    }

    fn listen(&mut self, app: &App, heard: &[HeardOf]) {
        let keys: BTreeMap<HostId, ([u8; 32], u64)> = self
            .hosts
            .keys()
            .filter_map(|host| {
                let connections = heard.iter().find(|h| h.host == *host).map_or(0, |h| h.connections);
                Some((*host, (app.ownership.beat_key(*host)?, connections)))
            })
            .collect();
        if self.beats.is_none() && !keys.is_empty() {
            self.beats = Some(Beats::open(app.listen));
        }
        if let Some(beats) = &mut self.beats {
            beats.set(&keys);
        }
    }

    fn feed(&mut self, app: &App, heard: &[HeardOf], now: MonoTime, draw: &dyn Fn() -> Option<u64>) {
        for of in heard {
            if let Some(at) = self.hosts.get_mut(&of.host)
                && of.at > at.stream
            {
                at.stream = of.at;
                at.detector.heard(Channel::Stream, of.at);
            }
            let last = self.witnesses.entry(of.host).or_default();
            if of.at > *last {
                *last = of.at;
                for (_, other) in self.hosts.iter_mut().filter(|(host, _)| **host != of.host) {
                    other.detector.witness(Witness::Host(of.host), of.at);
                }
            }
        }
        let answered: BTreeSet<IpAddr> = self.pinger.receive().into_iter().collect();
        let has_card: BTreeSet<IpAddr> = self.arp.receive().into_iter().collect();
        for at in self.hosts.values_mut() {
            let detect = &at.watched.detect;
            if at.address.is_some_and(|a| has_card.contains(&a)) {
                at.detector.heard(Channel::Arp, now);
            }
            if at.address.is_some_and(|a| answered.contains(&a)) {
                at.detector.heard(Channel::Icmp, now);
            }
            if detect.gateway.is_some_and(|a| answered.contains(&a)) {
                at.detector.witness(Witness::Gateway, now);
            }
            for other in detect.others.iter().filter(|a| answered.contains(a)) {
                at.detector.witness(Witness::Peer(other.to_string()), now);
            }
        }
        for host in self.beats.as_mut().map(|b| b.hear(now, draw)).unwrap_or_default() {
            if let Some(at) = self.hosts.get_mut(&host) {
                at.detector.heard(Channel::Beat, now);
            }
        }
        for (host, result, at) in app.links.ears.take_probes() {
            let result = readable(result);
            let said = match &result.end {
                ProbeEnd::Works => ProbeSaid::Works,
                ProbeEnd::Fails { why } => ProbeSaid::Fails { why: why.clone() },
                ProbeEnd::Broken { why } => ProbeSaid::Broken { why: why.clone() },
            };
            if let Some(watching) = self.hosts.get_mut(&host) {
                watching.detector.probe(&result.name, said, at);
                watching.probed(app, result, at);
            }
        }
    }
}

impl Host {
    /// Keeps a result, and tells of a change; one that comes and goes is told once a minute.
    fn probed(&mut self, app: &App, result: ProbeResult, at: MonoTime) {
        if !self.watched.detect.probes.iter().any(|p| p.name == result.name) {
            return;
        }
        let end = end_name(&result.end);
        let before = self.probed.get(&result.name).map(|p| p.told);
        let is_new =
            before.is_none_or(|(told, when)| told != end && when.is_none_or(|when| at.ms_since(when) >= PROBE_TOLD_MS));
        // The first that works is no news.
        let is_news = is_new && !(before.is_none() && end == "works");
        if is_news {
            let printed = if result.output.is_empty() {
                String::new()
            } else {
                format!("; it printed: {}", one_line(&result.output))
            };
            let text = format!("probe {}: {end}{}{printed}", result.name, why_of(&result.end));
            app.events.note(Event::ProbeChanged, &self.watched.name, text);
        }
        let told = if is_new { (end, is_news.then_some(at)) } else { before.unwrap_or((end, None)) };
        self.probed.insert(result.name.clone(), Probed { result, at, told });
    }

    fn decide(
        &mut self,
        app: &Arc<App>,
        host: HostId,
        tools: (&Pinger, &Arp, Option<&Beats>),
        is_open: bool,
        now: MonoTime,
    ) -> Seen {
        let decision = self.detector.decide(now);
        let in_the_way = self.in_the_way(app, host, tools);
        // Silence of a host that is being taken over is no news.
        let name = self.watched.name.clone();
        let mut alarm = None;
        match &decision.verdict {
            _ if is_open => self.told = None,
            Verdict::Well => (self.told, self.tried) = (None, false),
            Verdict::Watching => {}
            Verdict::Doubt(doubt) => alarm = Some(format!("{name}: {}", Verdict::Doubt(*doubt))),
            Verdict::Takeover(cause) => match &in_the_way {
                Some(why) => alarm = Some(format!("{name}: {cause}; nothing is taken over by itself: {why}")),
                None if self.tried => {
                    alarm = Some(format!(
                        "{name}: {cause}; one takeover was begun for it, and none is open: look at `holdfast run list`"
                    ));
                }
                None => self.begin(app, cause, &decision),
            },
        }
        self.amiss = alarm.as_ref().map(|_| self.amiss.unwrap_or(now));
        let alarm = alarm.filter(|_| self.amiss.is_some_and(|at| now.ms_since(at) >= ALARM_AFTER_MS));
        match &alarm {
            Some(text) if self.told.as_ref() != Some(text) => {
                app.events.note(Event::TakeoverDoubt, &name, format!("{text}: {}", reasons_text(&decision)));
                self.told = Some(text.clone());
            }
            _ => {}
        }
        let standing = self.told.clone().filter(|_| !is_open);
        Seen {
            plan: self.watched.plan.clone(),
            automatic: self.watched.detect.policy.automatic,
            verdict: verdict_name(&decision.verdict),
            text: decision.verdict.to_string(),
            reasons: decision.reasons.iter().map(|r| shown(r, now)).collect(),
            probes: self.probed.values().map(|p| p.shown(now)).collect(),
            alarm: alarm.or(standing),
            in_the_way: if is_open { Some("a takeover is open".into()) } else { in_the_way },
        }
    }

    /// Why no takeover may begin by itself, whatever is seen.
    fn in_the_way(
        &self,
        app: &App,
        host: HostId,
        (pinger, arp, beats): (&Pinger, &Arp, Option<&Beats>),
    ) -> Option<String> {
        let detect = &self.watched.detect;
        if !detect.policy.automatic {
            return Some("the plan leaves it to a person".into());
        }
        let asks_host = detect.policy.channels.iter().any(|r| r.channel == Channel::Icmp);
        let asked =
            self.address.filter(|_| asks_host).into_iter().chain(detect.gateway).chain(detect.others.iter().copied());
        if let Some(fault) = asked.filter_map(|address| pinger.fault(address)).next() {
            return Some(fault.to_owned());
        }
        let by_arp = detect.policy.channels.iter().any(|r| r.channel == Channel::Arp);
        if let Some(fault) = self.address.filter(|_| by_arp).and_then(|address| arp.fault(address)) {
            return Some(fault);
        }
        let hears_beats = detect.policy.channels.iter().any(|r| r.channel == Channel::Beat);
        if let Some(fault) = beats.filter(|_| hears_beats).and_then(Beats::fault) {
            return Some(fault.to_owned());
        }
        match (self.watched.leased, self.watched.has_hook) {
            (true, _) => {
                if app.ownership.report(host).is_some_and(|r| r.owner != model::Owner::Host) {
                    return Some("the host does not own its services".into());
                }
                app.ownership.proof(host).err().filter(|_| !self.watched.has_hook)
            }
            (false, true) => None,
            (false, false) => Some("nothing would fence it".into()),
        }
    }

    fn begin(&mut self, app: &Arc<App>, cause: &Cause, decision: &Decision) {
        self.tried = true;
        self.detector.settled();
        let (plan, name) = (self.watched.plan.clone(), self.watched.name.clone());
        let text = decision.to_string();
        app.events.note(Event::TakeoverDecided, &name, format!("{cause}; plan {plan} is carried out"));
        let wish = Wish {
            plan,
            kind: Kind::Failover,
            at: None,
            source_is_off: None,
            hold: false,
            planned: false,
            to: None,
            decision: Some(text),
            detection_ms: detection_ms(decision),
        };
        let app_of_thread = Arc::clone(app);
        // State is kept before it begins, which may take a slow disk's time.
        let begun = thread::Builder::new().name("begin-takeover".into()).spawn(move || {
            if let Err(e) = app_of_thread.takeovers.begin(&app_of_thread, wish) {
                app_of_thread.events.note(Event::TakeoverFailed, &name, crate::chain(&e));
            }
        });
        if let Err(e) = begun {
            app.events.note(Event::TakeoverFailed, &self.watched.name, format!("could not start a thread: {e}"));
        }
    }
}

/// From the last that was heard of it to the decision.
fn detection_ms(decision: &Decision) -> Option<u64> {
    let last =
        decision.reasons.iter().filter(|r| !r.advisory && matches!(r.fact, Fact::Silent { .. })).map(|r| r.since);
    last.max().map(|at| decision.at.ms_since(at))
}

impl Probed {
    fn shown(&self, now: MonoTime) -> ProbeShown {
        ProbeShown {
            name: self.result.name.clone(),
            end: end_name(&self.result.end),
            why: match &self.result.end {
                ProbeEnd::Works => String::new(),
                ProbeEnd::Fails { why } | ProbeEnd::Broken { why } => why.clone(),
            },
            output: self.result.output.clone(),
            took_ms: self.result.took_ms,
            age_ms: now.ms_since(self.at),
        }
    }
}

fn end_name(end: &ProbeEnd) -> &'static str {
    match end {
        ProbeEnd::Works => "works",
        ProbeEnd::Fails { .. } => "fails",
        ProbeEnd::Broken { .. } => "broken",
    }
}
fn why_of(end: &ProbeEnd) -> String {
    match end {
        ProbeEnd::Works => String::new(),
        ProbeEnd::Fails { why } | ProbeEnd::Broken { why } => format!(": {why}"),
    }
}
fn one_line(text: &str) -> String {
    text.lines().collect::<Vec<_>>().join(" / ")
}

/// A host's words are not this box's: bounded, and without what a terminal would obey.
fn readable(result: ProbeResult) -> ProbeResult {
    let clean = |text: &str, max: usize| -> String {
        let mut out = String::new();
        for c in text.chars() {
            let obeyed = c.is_control() && c != '\n'
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
            let c = if obeyed { '\u{fffd}' } else { c };
            if out.len() + c.len_utf8() > max {
                break;
            }
            out.push(c);
        }
        out
    };
    let end = match result.end {
        ProbeEnd::Works => ProbeEnd::Works,
        ProbeEnd::Fails { why } => ProbeEnd::Fails { why: one_line(&clean(&why, PROBE_WHY_MAX)) },
        ProbeEnd::Broken { why } => ProbeEnd::Broken { why: one_line(&clean(&why, PROBE_WHY_MAX)) },
    };
    ProbeResult { end, output: clean(&result.output, PROBE_OUTPUT_MAX), ..result }
}

fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Well => "well",
        Verdict::Watching => "watching",
        Verdict::Doubt(_) => "doubt",
        Verdict::Takeover(_) => "takeover",
    }
}

fn shown(reason: &takeover::detect::Reason, now: MonoTime) -> ReasonShown {
    ReasonShown {
        points: match reason.points {
            Points::For => "for",
            Points::Against => "against",
            Points::Neither => "neither",
        },
        text: reason.fact.to_string(),
        since_ms: now.ms_since(reason.since),
        advisory: reason.advisory,
    }
}

fn reasons_text(decision: &Decision) -> String {
    decision.reasons.iter().map(|r| r.fact.to_string()).collect::<Vec<_>>().join("; ")
}
