//! One host's desk.

use crate::{
    clock::Clock,
    events::{Event, Events},
    pki,
};
use durable::{Disk, Twin};
use model::{HostId, MonoTime, Owner, Term};
use replication::ownership::{
    ChangeError, EndedBy, Grantor, GrantorAction, GrantorEvent, Hold, MoveWaits, OwnershipRecord,
};
use serde::{Deserialize, Serialize};
use std::path::Path;
use takeover::plan::Lease;
use tokio::sync::mpsc;
use wire::{
    Holding, HostPlan, LeaseEnd, LeaseRequest, LeaseRules, Message, PlanAddress, PlanBeat, PlanProbe, PlanService,
    ProbeKind, VERSION_OWNERSHIP, VERSION_PROBES,
};

/// A plan that was sent and not answered is sent again.
const AGAIN_MS: u64 = 10_000;
/// Of an agent's words.
const WHY_MAX: usize = 300;

pub(super) struct Context<'a> {
    pub disk: &'a dyn Disk,
    pub dir: &'a Path,
    pub events: &'a Events,
    pub clock: Clock,
    pub name: String,
    pub lines: &'a super::Lines,
}

impl Context<'_> {
    /// Says something to another host's agent, as far as it is there.
    fn say_to(&self, host: HostId, message: Message) {
        if let Some((_, to)) = crate::lock(self.lines).get(&host) {
            let _ = to.try_send(message);
        }
    }
}

/// What a plan wants of a host.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Want {
    pub plan: String,
    pub lease: Option<Lease>,
    pub probes: Vec<PlanProbe>,
    /// Port and period of the datagrams.
    pub beat: Option<(u16, u64)>,
    pub standby: Option<StandbyWant>,
}

/// Who stands by for it, and what that one has to start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StandbyWant {
    pub host: HostId,
    pub addresses: Vec<PlanAddress>,
    pub services: Vec<PlanService>,
}

/// What went to a standby's agent, over which line, and what it said to that.
#[derive(Default)]
struct StandbySide {
    sent: Option<(u64, mpsc::Sender<Message>)>,
    taken: bool,
    refused: Option<String>,
}

/// What survives the daemon.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    record: OwnershipRecord,
    /// How the owner before ended.
    by: Option<EndedBy>,
    /// The agent was sent a plan with something in it, and none without since.
    planned: bool,
    /// The checksum of the plan that it surely has.
    taken: Option<String>,
}

/// One whose receiver is gone is over.
struct Line {
    version: u16,
    to: mpsc::Sender<Message>,
    /// The plan that went over it last, and when.
    sent: Option<(u64, MonoTime)>,
    /// It said over this line that no lease can stop it.
    unfenced: bool,
}

/// How far a move to the box has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fencing {
    /// None is under way.
    NotBegun,
    /// Until the host says that it has stopped, or for so long.
    Waits { ms: Option<u64> },
    /// The box owns it.
    Done { term: Term, by: Option<EndedBy> },
}

/// A desk as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub plan: Option<String>,
    pub owner: Owner,
    pub term: u64,
    /// `standing`, `arming`, `leased`, `moving`.
    pub hold: &'static str,
    pub rules: Option<LeaseRules>,
    /// What the owner said of itself last, and how long ago.
    pub holding: Option<Holding>,
    pub holding_age_ms: Option<u64>,
    pub moving_to: Option<Owner>,
    pub waits_ms: Option<u64>,
    pub plan_taken: bool,
    pub plan_refused: Option<String>,
    /// Whether its lease could fence it now; else why not.
    pub fences: bool,
    pub why_not: Option<String>,
    pub alerts: Vec<String>,
    #[serde(skip)]
    pub matters: bool,
}

pub(super) struct Desk {
    host: HostId,
    kept: Kept,
    twin: Option<Twin>,
    /// None: what is stored cannot be read.
    grantor: Option<Grantor>,
    /// Why nothing is granted or was not stored.
    trouble: Option<String>,
    /// A holder knows a higher term.
    behind: Option<Term>,
    want: Want,
    /// What the plans want has been heard, and nothing holds it off.
    settled: bool,
    digest: String,
    version: u64,
    key: [u8; 32],
    line: Option<Line>,
    refused: Option<String>,
    standby: StandbySide,
}

impl Desk {
    pub fn load(context: &Context<'_>, host: HostId) -> Self {
        let fresh = Kept { record: OwnershipRecord::new(host), by: None, planned: false, taken: None };
        let mut this = Self {
            host,
            kept: fresh,
            twin: None,
            grantor: None,
            trouble: None,
            behind: None,
            want: Want::default(),
            settled: false,
            digest: String::new(),
            version: 0,
            key: [0; 32],
            line: None,
            refused: None,
            standby: StandbySide::default(),
        };
        this.reload(context);
        this.renew_plan(context);
        this
    }

    /// From what is stored, as after a start.
    fn reload(&mut self, context: &Context<'_>) {
        let why = match Twin::load(context.disk, context.dir, &self.host.to_string()) {
            Ok(None) => None,
            Ok(Some((twin, bytes))) => {
                if let Some(fault) = twin.fault() {
                    context.events.note(Event::CopyDamaged, &context.name, fault);
                }
                self.twin = Some(twin);
                match serde_json::from_slice::<Kept>(&bytes) {
                    Ok(kept) if kept.record.whose == self.host => {
                        self.kept = kept;
                        None
                    }
                    Ok(_) => Some("it is another host's".to_owned()),
                    Err(e) => Some(e.to_string()),
                }
            }
            Err(e) => Some(crate::chain(&e)),
        };
        self.grantor = None;
        // An earlier life may have granted until now.
        let made = match why {
            None => Grantor::new(self.kept.record, context.clock.boot()).map_err(|e| e.to_string()),
            Some(why) => Err(why),
        };
        match made {
            Ok(grantor) => self.grantor = Some(grantor),
            Err(why) => self.fail(context, format!("who owns {} cannot be read: {why}", context.name)),
        }
    }

    fn fail(&mut self, context: &Context<'_>, text: String) {
        if self.trouble.as_ref() != Some(&text) {
            context.events.note(Event::OwnershipUnsure, &context.name, &text);
        }
        self.trouble = Some(text);
    }

    /// Durable when it answers true. Else all begins from what is stored.
    fn store(&mut self, context: &Context<'_>, kept: Kept) -> bool {
        let name = self.host.to_string();
        let stored = serde_json::to_vec(&kept).map_err(|e| e.to_string()).and_then(|bytes| {
            match &mut self.twin {
                Some(twin) => twin.store(context.disk, &bytes),
                none => Twin::create(context.disk, context.dir, &name, &bytes).map(|twin| *none = Some(twin)),
            }
            .map_err(|e| crate::chain(&e))
        });
        match stored {
            Ok(()) => {
                self.kept = kept;
                self.trouble = None;
                true
            }
            Err(why) => {
                self.reload(context);
                self.fail(context, format!("who owns {} could not be stored: {why}", context.name));
                false
            }
        }
    }

    /// In order; when something cannot be stored nothing after it is done.
    fn act(&mut self, context: &Context<'_>, actions: Vec<GrantorAction>) -> bool {
        let ended = actions.iter().find_map(|a| match a {
            GrantorAction::Owned { by, .. } => Some(*by),
            _ => None,
        });
        for action in actions {
            match action {
                GrantorAction::Persist(record) => {
                    let by = ended.or(self.kept.by.filter(|_| record.owner == self.kept.record.owner));
                    let was = self.kept.record;
                    if !self.store(context, Kept { record, by, ..self.kept.clone() }) {
                        return false;
                    }
                    self.tell_change(context, was, record);
                }
                GrantorAction::Answer { to: Owner::Host, answer } => self.say(Message::LeaseAnswer(answer)),
                GrantorAction::Revoke { to: Owner::Host, end } => self.say(Message::LeaseRevoke(end)),
                GrantorAction::Answer { to: Owner::Standby(id), answer } => {
                    context.say_to(id, Message::LeaseAnswer(answer));
                }
                GrantorAction::Revoke { to: Owner::Standby(id), end } => context.say_to(id, Message::LeaseRevoke(end)),
                // The box asks nobody.
                GrantorAction::Answer { to: Owner::Box, .. } | GrantorAction::Revoke { to: Owner::Box, .. } => {}
                GrantorAction::Owned { owner, term, by } => {
                    let text = format!("{owner} owns it now, term {}: {by}", term.0);
                    context.events.note(Event::OwnerChanged, &context.name, text);
                }
                GrantorAction::Behind { theirs, .. } => {
                    if self.behind.is_none() {
                        let text = format!(
                            "its agent has stored term {}, this box only {}: the box's record is older than the truth",
                            theirs.0, self.kept.record.term.0
                        );
                        context.events.note(Event::OwnershipUnsure, &context.name, text);
                    }
                    self.behind = self.behind.max(Some(theirs));
                }
            }
        }
        true
    }

    fn tell_change(&self, context: &Context<'_>, was: OwnershipRecord, now: OwnershipRecord) {
        let is_leased = |r: &OwnershipRecord| matches!(r.hold, Hold::Leased { .. });
        let text = match now.hold {
            Hold::Leased { rules } if !is_leased(&was) && now.owner == was.owner => {
                format!("holds a lease of {} ms, term {}", rules.lease_ms, now.term.0)
            }
            Hold::Standing if is_leased(&was) && now.owner == was.owner => "has no lease any more".to_owned(),
            Hold::Arming { before: None, .. } if is_leased(&was) => {
                "serves without its lease: somebody there said so, or its state was lost".to_owned()
            }
            Hold::Moving { to, .. } => format!("is being given to {to}"),
            _ => return,
        };
        context.events.note(Event::LeaseChanged, &context.name, text);
    }

    fn say(&self, message: Message) {
        if let Some(line) = &self.line {
            // With no room it is lost: the agent asks again in a second.
            let _ = line.to.try_send(message);
        }
    }

    // ------------------------------------------------------------ the agent

    pub fn connected(&mut self, context: &Context<'_>, version: u16, to: mpsc::Sender<Message>) {
        self.line = Some(Line { version, to, sent: None, unfenced: false });
        self.refused = None;
        self.settle(context);
    }

    pub fn on(&mut self, context: &Context<'_>, event: GrantorEvent) {
        // After the event has arrived: a lease counts from here at the latest.
        let now = context.clock.boot();
        if let Some(grantor) = &mut self.grantor {
            let actions = grantor.on(event, now);
            self.act(context, actions);
        }
    }

    pub fn request(&mut self, context: &Context<'_>, request: LeaseRequest) {
        self.on(context, GrantorEvent::Request { from: Owner::Host, request });
        if let Some(line) = &mut self.line {
            line.unfenced = request.holding == Holding::Unfenced && request.term == self.kept.record.term;
        }
        self.settle(context);
    }

    pub fn plan_taken(&mut self, context: &Context<'_>, version: u64, refused: Option<String>) {
        if self.line.as_ref().and_then(|l| l.sent).is_none_or(|(sent, _)| sent != version) || version != self.version {
            return;
        }
        match refused {
            Some(why) => {
                let why: String = why.chars().filter(|c| !c.is_control()).take(WHY_MAX).collect();
                if self.refused.as_ref() != Some(&why) {
                    context.events.note(
                        Event::HostPlanRefused,
                        &context.name,
                        format!("plan {}: {why}", self.want.plan),
                    );
                }
                self.refused = Some(why);
            }
            None => {
                self.refused = None;
                let planned = !is_empty(&self.host_plan());
                if self.kept.taken.as_ref() != Some(&self.digest) || self.kept.planned != planned {
                    let kept = Kept { taken: Some(self.digest.clone()), planned, ..self.kept.clone() };
                    if !self.store(context, kept) {
                        return;
                    }
                }
                self.settle(context);
            }
        }
    }

    // ------------------------------------------------------------ its standby

    /// Whether this host has a word in the ownership here.
    pub fn has_standby(&self, host: HostId) -> bool {
        self.kept.record.owner == Owner::Standby(host) || self.want.standby.as_ref().is_some_and(|s| s.host == host)
    }
    pub fn standby_asks(&mut self, context: &Context<'_>, from: HostId, request: LeaseRequest) {
        self.send_standby_plan(context);
        self.on(context, GrantorEvent::Request { from: Owner::Standby(from), request });
    }
    pub fn standby_released(&mut self, context: &Context<'_>, from: HostId, end: LeaseEnd) {
        self.on(context, GrantorEvent::Released { from: Owner::Standby(from), end });
    }
    pub fn standby_took_plan(&mut self, context: &Context<'_>, version: u64, refused: Option<String>) {
        if self.standby.sent.as_ref().is_none_or(|(sent, _)| *sent != version) {
            return;
        }
        let refused = refused.map(|why| why.chars().filter(|c| !c.is_control()).take(WHY_MAX).collect::<String>());
        if let Some(why) = &refused {
            let text = format!("plan {}, by the standby: {why}", self.want.plan);
            context.events.note(Event::HostPlanRefused, &context.name, text);
        }
        self.standby.taken = refused.is_none();
        self.standby.refused = refused;
    }
    /// Whether the standby would know what to start; else why not.
    pub fn standby_knows(&self) -> Result<(), String> {
        match (&self.standby.refused, self.standby.taken) {
            (Some(why), _) => Err(format!("the standby's agent refuses the plan: {why}")),
            (None, true) => Ok(()),
            (None, false) => Err("the standby's agent has not taken the plan as it is now".into()),
        }
    }
    fn standby_plan(&self, standby: &StandbyWant) -> HostPlan {
        HostPlan {
            addresses: standby.addresses.clone(),
            services: standby.services.clone(),
            version: self.version,
            ..nothing_for(self.host)
        }
    }
    /// Over each new line, and when it has changed.
    pub fn send_standby_plan(&mut self, context: &Context<'_>) {
        let Some(standby) = &self.want.standby else { return };
        let line = crate::lock(context.lines).get(&standby.host).cloned();
        let Some((_, to)) = line.filter(|(version, _)| *version >= VERSION_OWNERSHIP) else { return };
        let has_it =
            |(version, line): &(u64, mpsc::Sender<Message>)| *version == self.version && line.same_channel(&to);
        if self.standby.sent.as_ref().is_some_and(has_it) {
            return;
        }
        if to.try_send(Message::HostPlan(self.standby_plan(standby))).is_ok() {
            self.standby = StandbySide { sent: Some((self.version, to)), taken: false, refused: None };
        }
    }

    // ------------------------------------------------------------ the plan

    pub fn set_want(&mut self, context: &Context<'_>, want: Option<Want>, is_busy: bool, all_read: bool) {
        // Nothing wanted, or in the plan that could not be read: what was armed stays so.
        if want.is_none() && !all_read {
            self.settled = false;
            return;
        }
        self.settled = !is_busy;
        let want = want.unwrap_or_default();
        // After a start in the middle of a takeover it is the one that was there before: plans in use are not changed.
        if want != self.want && (!is_busy || self.want == Want::default()) {
            let before = self.want.standby.as_ref().map(|s| s.host);
            self.want = want;
            self.renew_plan(context);
            self.standby = StandbySide::default();
            if let Some(gone) = before.filter(|host| !self.has_standby(*host)) {
                context.say_to(gone, Message::HostPlan(nothing_for(self.host)));
            }
        }
        self.send_standby_plan(context);
        self.settle(context);
    }

    fn renew_plan(&mut self, context: &Context<'_>) {
        // One that the system gives no bytes for is never used: the datagrams are off then.
        self.key = match (pki::random_128(), pki::random_128()) {
            (Some(a), Some(b)) => [a, b].concat().try_into().unwrap_or([0; 32]),
            _ => [0; 32],
        };
        self.version = context.clock.wall_us().max(self.version + 1);
        self.refused = None;
        let plan = HostPlan {
            version: 0,
            beat: self.host_plan().beat.map(|b| PlanBeat { key: [0; 32], ..b }),
            ..self.host_plan()
        };
        self.digest = pki::sha256_hex(&serde_json::to_vec(&plan).unwrap_or_default());
    }

    fn host_plan(&self) -> HostPlan {
        let lease = self.want.lease.as_ref();
        HostPlan {
            whose: self.host,
            version: self.version,
            addresses: lease.map(|l| l.addresses.clone()).unwrap_or_default(),
            services: lease.map(|l| l.services.clone()).unwrap_or_default(),
            probes: self.want.probes.clone(),
            beat: self.want.beat.map(|(port, period_ms)| PlanBeat { port, period_ms, key: self.key }),
        }
    }
    pub fn beat_key(&self) -> Option<[u8; 32]> {
        self.want.beat.map(|_| self.key).filter(|key| *key != [0; 32])
    }
    fn is_taken(&self) -> bool {
        self.kept.taken.as_ref() == Some(&self.digest)
    }

    /// Brings the lease and the agent's plan to what is wanted, as far as that may be done now.
    fn settle(&mut self, context: &Context<'_>) {
        let record = self.kept.record;
        let at_rest = record.owner == Owner::Host && !matches!(record.hold, Hold::Moving { .. });
        if !self.settled || !at_rest || self.behind.is_some() || self.grantor.is_none() {
            return;
        }
        let have = match record.hold {
            Hold::Arming { rules, .. } | Hold::Leased { rules } => Some(rules),
            Hold::Standing | Hold::Moving { .. } => None,
        };
        match self.want.lease.as_ref().map(|l| l.rules) {
            None if have.is_some() => {
                let _ = self.change(context, Grantor::disarm);
            }
            Some(rules) if have != Some(rules) && self.is_taken() => {
                if let Err(why) = self.change(context, |g| g.arm(rules)) {
                    self.fail(context, format!("{} cannot be leased: {why}", context.name));
                }
            }
            _ => {}
        }
        self.send_plan(context);
    }

    fn change(
        &mut self,
        context: &Context<'_>,
        change: impl FnOnce(&mut Grantor) -> Result<Vec<GrantorAction>, ChangeError>,
    ) -> Result<(), String> {
        let unread = || self.trouble.clone().unwrap_or_else(|| "who owns it cannot be read".into());
        let grantor = match &mut self.grantor {
            Some(grantor) => grantor,
            None => return Err(unread()),
        };
        let actions = change(grantor).map_err(|e| e.to_string())?;
        if self.act(context, actions) {
            return Ok(());
        }
        Err(self.trouble.clone().unwrap_or_else(|| "it could not be stored".into()))
    }

    fn send_plan(&mut self, context: &Context<'_>) {
        let now = context.clock.boot();
        let plan = self.host_plan();
        let Some(line) = self.line.as_ref().filter(|l| l.version >= VERSION_OWNERSHIP) else { return };
        let answered = self.is_taken() || self.refused.is_some();
        let has_it = line.sent.is_some_and(|(v, at)| v == self.version && (answered || now.ms_since(at) < AGAIN_MS));
        if has_it || is_empty(&plan) && !self.kept.planned {
            return;
        }
        // What it would need to serve again is in the plan it has: it must be its own again before it gets one without.
        let record = self.kept.record;
        let its_own = record.hold == Hold::Standing && line.unfenced;
        if self.want.lease.is_none() && record.term > Term::ZERO && !its_own {
            return;
        }
        // It could not even read it; refused in its place, as it would refuse the others.
        let new = plan.probes.iter().find(|p| matches!(p.kind, ProbeKind::Https { .. }));
        if let Some(probe) = new.filter(|_| line.version < VERSION_PROBES) {
            let why = format!("it is too old for the https probe {}: update it", probe.name);
            if self.refused.as_ref() != Some(&why) {
                context.events.note(Event::HostPlanRefused, &context.name, format!("plan {}: {why}", self.want.plan));
                self.refused = Some(why);
            }
            return;
        }
        let planned = self.kept.planned || !is_empty(&plan);
        let strikes = self.kept.taken.is_some() && !self.is_taken();
        if strikes || planned != self.kept.planned {
            let taken = self.kept.taken.clone().filter(|_| !strikes);
            if !self.store(context, Kept { planned, taken, ..self.kept.clone() }) {
                return;
            }
        }
        if let Some(line) = &mut self.line
            && line.to.try_send(Message::HostPlan(plan)).is_ok()
        {
            line.sent = Some((self.version, now));
        }
    }

    // ------------------------------------------------------------ moves

    pub fn proof(&self) -> Result<(), String> {
        if let Some(trouble) = &self.trouble {
            return Err(trouble.clone());
        }
        if let Some(theirs) = self.behind {
            return Err(format!("its agent knows term {} and the box does not: say who owns it", theirs.0));
        }
        let Some(grantor) = &self.grantor else { return Err("who owns it cannot be read".into()) };
        match self.kept.record.owner {
            Owner::Box => return Ok(()),
            Owner::Standby(_) => return Err("a standby owns it".into()),
            Owner::Host => {}
        }
        if self.want.lease.is_none() {
            return Err("no plan has leased it".into());
        }
        if let Some(why) = &self.refused {
            return Err(format!("its agent refuses the plan: {why}"));
        }
        if !self.is_taken() {
            return Err(match &self.line {
                Some(line) if line.version < VERSION_OWNERSHIP => "its agent is too old for a lease".into(),
                _ => "its agent has not taken the plan as it is now".into(),
            });
        }
        if !grantor.can_expire() {
            return Err("its agent does not hold a lease: its silence proves nothing".into());
        }
        Ok(())
    }

    pub fn take(&mut self, context: &Context<'_>) -> Result<Fencing, String> {
        let record = self.kept.record;
        let under_way = matches!(record.hold, Hold::Moving { to: Owner::Box, .. });
        if record.owner != Owner::Box && !under_way {
            self.change(context, |g| g.begin_move(Owner::Box, None))?;
        }
        self.fencing(context)
    }

    pub fn fencing(&mut self, context: &Context<'_>) -> Result<Fencing, String> {
        self.on(context, GrantorEvent::Tick);
        let Some(grantor) = &self.grantor else {
            return Err(self.trouble.clone().unwrap_or_else(|| "who owns it cannot be read".into()));
        };
        let record = self.kept.record;
        Ok(match (record.owner, grantor.waits()) {
            (Owner::Box, None) => Fencing::Done { term: record.term, by: self.kept.by },
            (_, None) => Fencing::NotBegun,
            (_, Some(MoveWaits::ForProof)) => Fencing::Waits { ms: None },
            (_, Some(MoveWaits::UntilSilent { at })) => Fencing::Waits { ms: Some(at.ms_since(context.clock.boot())) },
        })
    }

    /// From the box, which does not serve, to the standby of the plan. By lease from the first moment on.
    pub fn give_to_standby(&mut self, context: &Context<'_>) -> Result<(), String> {
        let (Some(standby), Some(lease)) = (&self.want.standby, &self.want.lease) else {
            return Err("its plan has no standby".into());
        };
        let (to, rules) = (Owner::Standby(standby.host), lease.rules);
        let record = self.kept.record;
        match (record.owner, record.hold) {
            (owner, _) if owner == to => return Ok(()),
            (Owner::Box, Hold::Moving { to: under_way, .. }) if under_way == to => {}
            (Owner::Box, _) => self.change(context, |g| g.begin_move(to, Some(rules)))?,
            (owner, _) => return Err(format!("{owner} owns it, and not the box")),
        }
        self.on(context, GrantorEvent::BoxStopped);
        if self.kept.record.owner == to {
            return Ok(());
        }
        Err(self.trouble.clone().unwrap_or_else(|| "it could not be stored".into()))
    }

    pub fn give_back(&mut self, context: &Context<'_>, rules: Option<LeaseRules>) -> Result<(), String> {
        let record = self.kept.record;
        match (record.owner, record.hold) {
            (Owner::Box, Hold::Moving { to: Owner::Host, .. }) => {}
            (Owner::Box, _) => self.change(context, |g| g.begin_move(Owner::Host, rules))?,
            (_, Hold::Moving { to: Owner::Box, .. }) => return self.change(context, Grantor::abandon),
            _ => return Ok(()),
        }
        self.on(context, GrantorEvent::BoxStopped);
        match self.kept.record.owner {
            Owner::Box => Err(self.trouble.clone().unwrap_or_else(|| "it could not be stored".into())),
            _ => Ok(()),
        }
    }

    pub fn adopt(&mut self, context: &Context<'_>, owner: Owner) -> Result<(), String> {
        if self.grantor.is_none() {
            self.set_aside(context)?;
            self.kept.record = OwnershipRecord::new(self.host);
            self.twin = None;
            self.trouble = None;
            self.grantor = Grantor::new(self.kept.record, context.clock.boot()).ok();
        }
        self.change(context, |g| Ok(g.adopt(owner)))?;
        self.behind = None;
        self.settle(context);
        Ok(())
    }

    /// What cannot be read is kept beside, for who wants to know.
    fn set_aside(&self, context: &Context<'_>) -> Result<(), String> {
        for copy in ["a", "b"] {
            let from = context.dir.join(format!("{}.{copy}", self.host));
            match context.disk.rename(&from, &from.with_extension(format!("{copy}.damaged"))) {
                Err(e) if !e.is_not_found() => return Err(crate::chain(&e)),
                _ => {}
            }
        }
        Ok(())
    }

    // ------------------------------------------------------------ shown

    pub fn report(&self, context: &Context<'_>) -> Report {
        let record = self.kept.record;
        let (hold, rules, moving_to) = match record.hold {
            Hold::Standing => ("standing", None, None),
            Hold::Arming { rules, .. } => ("arming", Some(rules), None),
            Hold::Leased { rules } => ("leased", Some(rules), None),
            Hold::Moving { to, silence, .. } => ("moving", silence, Some(to)),
        };
        let now = context.clock.boot();
        let holding = self.grantor.as_ref().and_then(Grantor::holding);
        let waits_ms = match self.grantor.as_ref().and_then(Grantor::waits) {
            Some(MoveWaits::UntilSilent { at }) => Some(at.ms_since(now)),
            _ => None,
        };
        let proof = self.proof();
        let wanted = self.want.lease.is_some();
        Report {
            plan: Some(self.want.plan.clone()).filter(|p| !p.is_empty()),
            owner: record.owner,
            term: record.term.0,
            hold,
            rules,
            holding: holding.map(|(_, h)| h),
            holding_age_ms: holding.map(|(at, _)| now.ms_since(at)),
            moving_to,
            waits_ms,
            plan_taken: self.is_taken(),
            plan_refused: self.refused.clone(),
            fences: proof.is_ok(),
            alerts: self.alerts(context),
            why_not: proof.err().filter(|_| wanted),
            matters: wanted || self.twin.is_some() || self.trouble.is_some() || self.behind.is_some(),
        }
    }

    fn alerts(&self, context: &Context<'_>) -> Vec<String> {
        let name = &context.name;
        let mut alerts = Vec::new();
        if let Some(trouble) = &self.trouble {
            alerts.push(format!("{trouble}; nothing is granted to it and nothing taken over by itself: look at the data disk, then say who \
                                 owns it with `holdfast plan owner {name} host` or `… box`"));
        }
        if let Some(theirs) = self.behind {
            alerts.push(format!("the agent of {name} has stored term {}, this box knows only {}: nothing is granted until somebody says who \
                                 owns it with `holdfast plan owner {name} host` or `… box`", theirs.0, self.kept.record.term.0));
        }
        if let Some(why) = &self.refused {
            alerts.push(format!(
                "the agent of {name} refuses the plan {}: {why}; until it takes it no lease fences it",
                self.want.plan
            ));
        }
        if self.want.lease.is_some() && self.line.as_ref().is_some_and(|l| l.version < VERSION_OWNERSHIP) {
            alerts.push(format!("the agent of {name} is too old for the lease of plan {}: update it", self.want.plan));
        }
        alerts
    }
}

/// For who stands by no more.
pub fn nothing_for(whose: HostId) -> HostPlan {
    HostPlan { whose, version: 0, addresses: Vec::new(), services: Vec::new(), probes: Vec::new(), beat: None }
}

fn is_empty(plan: &HostPlan) -> bool {
    plan.addresses.is_empty() && plan.services.is_empty() && plan.probes.is_empty() && plan.beat.is_none()
}
