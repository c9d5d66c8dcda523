//! One host's detector: takes what was seen, and says what follows.

use super::{
    accrual::{Beats, Pulse},
    decision::{Cause, Decision, Doubt, Fact, Points, Reason, Verdict, Witness},
    policy::{Channel, ChannelRule, Policy, PolicyError, ProbeRule, ProbeThen, Weight},
};
use model::MonoTime;
use std::collections::{BTreeMap, VecDeque};

/// Witnesses beyond these are not kept: a hundred hosts prove an uplink no better than these.
const WITNESSES_MAX: usize = 64;
/// Returns remembered; the doubling has long met its bound by then.
const RETURNS_MAX: usize = 16;
/// Who looks more rarely was away: paused, starved, without power. What was not heard then was not missed by the host.
const AWAY_MS: u64 = 1_000;
/// Of a probe's explanation; it is printed with each decision.
const WHY_MAX: usize = 200;

/// How a probe or script ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeSaid {
    Works,
    Fails {
        why: String,
    },
    /// It could not be made, which says nothing of the application.
    Broken {
        why: String,
    },
}

#[derive(Clone, Debug)]
struct ProbeState {
    said: ProbeSaid,
    at: MonoTime,
    since: MonoTime,
    failures: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Detector {
    policy: Policy,
    channels: Vec<(ChannelRule, Beats)>,
    /// Since when each answers without a break, and when it did last.
    witnesses: BTreeMap<Witness, (MonoTime, MonoTime)>,
    probes: BTreeMap<String, ProbeState>,
    /// When the host came back after all required channels had been silent.
    returns: VecDeque<MonoTime>,
    was_silent: bool,
    button: Option<(String, MonoTime)>,
    /// When anything was said or asked last, and since when that happens without a break.
    awake: MonoTime,
    listening: MonoTime,
}

/// The required channels, all together.
enum Together {
    /// All silent, since then; `ever`: at least one had been heard.
    Silent {
        since: MonoTime,
        ever: bool,
    },
    Mixed,
    Alive,
    Late,
}

impl Detector {
    pub fn new(policy: Policy, now: MonoTime) -> Result<Self, PolicyError> {
        policy.check()?;
        let grace = policy.grace_ms;
        let channels =
            policy.channels.iter().map(|r| (*r, Beats::new(r.period_ms, r.missed_max, grace, now))).collect();
        Ok(Self {
            policy,
            channels,
            witnesses: BTreeMap::new(),
            probes: BTreeMap::new(),
            returns: VecDeque::new(),
            was_silent: false,
            button: None,
            awake: now,
            listening: now,
        })
    }
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The host was heard.
    pub fn heard(&mut self, channel: Channel, now: MonoTime) {
        // Looked at first: silence that ends here must be known to have been.
        self.look(now);
        let Some((rule, beats)) = self.channels.iter_mut().find(|(r, _)| r.channel == channel) else { return };
        beats.heard(now);
        if rule.weight == Weight::Required && self.was_silent {
            self.was_silent = false;
            if self.returns.len() == RETURNS_MAX {
                self.returns.pop_front();
            }
            self.returns.push_back(now);
        }
    }
    /// Somebody else was heard, on the same network the host is reached by.
    pub fn witness(&mut self, witness: Witness, now: MonoTime) {
        self.look(now);
        let fresh_ms = self.policy.uplink.fresh_ms;
        if let Some((since, last)) = self.witnesses.get_mut(&witness) {
            if now.ms_since(*last) > fresh_ms {
                *since = now;
            }
            *last = (*last).max(now);
        } else if self.witnesses.len() < WITNESSES_MAX {
            self.witnesses.insert(witness, (now, now));
        }
    }
    /// A probe ended. Names that no rule has are ignored.
    pub fn probe(&mut self, name: &str, said: ProbeSaid, now: MonoTime) {
        if !self.policy.probes.iter().any(|r| r.name == name) {
            return;
        }
        let short = |why: String| why.chars().take(WHY_MAX).collect();
        let said = match said {
            ProbeSaid::Works => ProbeSaid::Works,
            ProbeSaid::Fails { why } => ProbeSaid::Fails { why: short(why) },
            ProbeSaid::Broken { why } => ProbeSaid::Broken { why: short(why) },
        };
        let before = self.probes.get(name);
        let (failures, since) = match (&said, before) {
            (ProbeSaid::Fails { .. }, Some(b)) if b.failures > 0 => (b.failures.saturating_add(1), b.since),
            (ProbeSaid::Fails { .. }, _) => (1, now),
            // It says nothing, so it neither counts nor forgives.
            (ProbeSaid::Broken { .. }, Some(b)) => (b.failures, b.since),
            (_, Some(b)) if b.said == said => (0, b.since),
            _ => (0, now),
        };
        self.probes.insert(name.to_owned(), ProbeState { said, at: now, since, failures });
    }
    /// The button. It needs no proof: who presses it has one.
    pub fn button(&mut self, by: &str, now: MonoTime) {
        self.button = Some((by.chars().take(WHY_MAX).collect(), now));
    }
    /// A takeover has begun, or was called off: what led to it is over.
    pub fn settled(&mut self) {
        self.button = None;
        self.was_silent = false;
    }

    /// What follows, now. The caller has handed over everything that had arrived by then.
    pub fn decide(&mut self, now: MonoTime) -> Decision {
        self.look(now);
        let mut reasons: Vec<Reason> = self.channels.iter().map(|(r, b)| channel_reason(r, b, now)).collect();
        let together = self.together(now);
        let silent = match together {
            Together::Silent { since, .. } => Some(since),
            _ => None,
        };
        let uplink = self.uplink(silent, now, &mut reasons);
        let probes = self.probe_reasons(now, &mut reasons);
        let verdict = match (&self.button, together) {
            (Some((by, at)), _) => {
                let fact = Fact::Button { by: by.clone() };
                reasons.push(Reason { points: Points::For, fact, since: *at, advisory: false });
                Verdict::Takeover(Cause::Manual { by: by.clone() })
            }
            (None, Together::Silent { since, ever }) => self.of_silence(since, ever, uplink, now),
            // What the agent says of its applications counts while it is heard, and only then.
            (None, Together::Mixed) => Verdict::Doubt(Doubt::ChannelsDisagree),
            (None, Together::Late) => probes.unwrap_or(Verdict::Watching),
            (None, Together::Alive) => probes.unwrap_or(Verdict::Well),
        };
        Decision { verdict, at: now, reasons }
    }

    /// When the decision can change although nothing is heard. Who asks more rarely than each second is taken to have been away.
    pub fn next_look(&self, now: MonoTime) -> MonoTime {
        let period = self.channels.iter().map(|(r, _)| r.period_ms).min().unwrap_or(1_000);
        let steps = [period / 4, self.policy.hold_ms.max(50)];
        now.plus_ms(steps.into_iter().min().unwrap_or(250).max(25))
    }

    /// Whether silence has to last longer than the policy says, for what happened lately.
    pub fn is_damped(&self, now: MonoTime) -> bool {
        self.hold_ms(now) > self.policy.hold_ms
    }

    fn of_silence(&self, since: MonoTime, ever: bool, uplink: bool, now: MonoTime) -> Verdict {
        let hold_ms = self.hold_ms(now);
        if !ever && !self.policy.unheard {
            return Verdict::Doubt(Doubt::NeverHeard);
        }
        // What came while nobody listened may still have to be read.
        let listened = now.ms_since(self.listening) >= self.silent_after_ms();
        if now.ms_since(since) < self.policy.hold_ms || !listened {
            return Verdict::Watching;
        }
        if !uplink {
            return Verdict::Doubt(Doubt::UplinkUnproved);
        }
        if now.ms_since(since) < hold_ms {
            return Verdict::Doubt(Doubt::Flapping { hold_ms });
        }
        if !self.policy.automatic {
            return Verdict::Doubt(Doubt::NotAutomatic);
        }
        Verdict::Takeover(Cause::HostSilent)
    }

    fn required(&self) -> impl Iterator<Item = &Beats> {
        self.channels.iter().filter(|(r, _)| r.weight == Weight::Required).map(|(_, beats)| beats)
    }

    /// From the last beat to silence, by the slowest of the required channels.
    fn silent_after_ms(&self) -> u64 {
        self.required().map(Beats::silent_after_ms).max().unwrap_or(0)
    }

    fn together(&self, now: MonoTime) -> Together {
        let (mut silent, mut alive, mut late, mut ever) = (0, 0, 0, false);
        let mut since = MonoTime(0);
        for beats in self.required() {
            match beats.pulse(now) {
                Pulse::Silent { since: last, ever_heard, .. } => {
                    silent += 1;
                    ever |= ever_heard;
                    let quiet = beats.silent_after_ms() + if ever_heard { 0 } else { self.policy.grace_ms };
                    since = since.max(last.plus_ms(quiet));
                }
                Pulse::Alive { .. } => alive += 1,
                Pulse::Late { .. } | Pulse::NotYet { .. } => late += 1,
            }
        }
        match (silent, alive, late) {
            (_, 0, 0) => Together::Silent { since, ever },
            (0, _, 0) => Together::Alive,
            (0, _, _) => Together::Late,
            (_, 0, _) => Together::Late,
            _ => Together::Mixed,
        }
    }

    fn look(&mut self, now: MonoTime) {
        let away = now.ms_since(self.awake);
        self.awake = self.awake.max(now);
        // Beats that came meanwhile are still to be read, and perhaps an answer of the gateway before them.
        if away > AWAY_MS {
            self.listening = now;
            self.channels.iter_mut().for_each(|(_, beats)| beats.excuse(away, now));
        }
        if let Together::Silent { since, ever: true } = self.together(now) {
            self.was_silent |= now.ms_since(since) >= self.policy.hold_ms;
        }
    }

    /// How long silence must last, after what the host did lately.
    fn hold_ms(&self, now: MonoTime) -> u64 {
        let returns = self.returns.iter().filter(|at| now.ms_since(**at) < self.policy.damping.window_ms).count();
        let unsteady = usize::from(self.required().any(|b| b.is_unsteady(now)));
        let doublings = u32::try_from(returns + unsteady).unwrap_or(u32::MAX).min(31);
        // Holding for no time at all cannot be doubled.
        let base = if doublings == 0 { self.policy.hold_ms } else { self.policy.hold_ms.max(1_000) };
        base.saturating_mul(1 << doublings).min(self.policy.damping.hold_ms_max.max(self.policy.hold_ms))
    }

    /// Whether the box's own uplink is proved: by answers that came after the host had fallen silent, and without a break for as long as
    /// silence takes to be one. What cut the host off would have cut these off too, had it been the box's own line; and a line
    /// that has just come back has not had the time to bring the host's beats.
    fn uplink(&self, silent: Option<MonoTime>, now: MonoTime, reasons: &mut Vec<Reason>) -> bool {
        let rule = self.policy.uplink;
        let (mut gateway, mut others) = (false, 0);
        let steady_ms = self.silent_after_ms();
        for (witness, (since, at)) in &self.witnesses {
            let long = now.ms_since(*since) >= steady_ms;
            let fresh = now.ms_since(*at) <= rule.fresh_ms && silent.is_none_or(|silent| long && *at >= silent);
            if fresh {
                match witness {
                    Witness::Gateway => gateway = true,
                    Witness::Peer(_) | Witness::Host(_) => others += 1,
                }
            }
            let (points, fact) = match fresh {
                true => (Points::For, Fact::WitnessAnswers { witness: witness.clone() }),
                false => (Points::Against, Fact::WitnessSilent { witness: witness.clone() }),
            };
            // A working uplink is a reason only beside a silent host.
            let points = if silent.is_none() { Points::Neither } else { points };
            let since = if fresh { *since } else { *at };
            reasons.push(Reason { points, fact, since, advisory: false });
        }
        (gateway || !rule.gateway) && others >= rule.others_min
    }

    fn probe_reasons(&self, now: MonoTime, reasons: &mut Vec<Reason>) -> Option<Verdict> {
        let mut verdict: Option<Verdict> = None;
        let rank = |v: &Verdict| match v {
            Verdict::Takeover(_) => 3,
            Verdict::Doubt(Doubt::ApplicationFails) => 2,
            Verdict::Doubt(_) => 1,
            Verdict::Well | Verdict::Watching => 0,
        };
        for rule in &self.policy.probes {
            let Some(state) = self.probes.get(&rule.name) else { continue };
            let (points, fact, says) = probe_reason(rule, state, self.policy.automatic, now);
            reasons.push(Reason { points, fact, since: state.since, advisory: rule.then == ProbeThen::Alarm });
            if let Some(says) = says
                && verdict.as_ref().is_none_or(|v| rank(v) < rank(&says))
            {
                verdict = Some(says);
            }
        }
        verdict
    }
}

fn channel_reason(rule: &ChannelRule, beats: &Beats, now: MonoTime) -> Reason {
    let channel = rule.channel;
    let (points, fact, since) = match beats.pulse(now) {
        Pulse::Alive { heard } => (Points::Against, Fact::Alive { channel }, heard),
        Pulse::Late { heard, missed } => (Points::Neither, Fact::Late { channel, missed }, heard),
        Pulse::NotYet { since } => (Points::Neither, Fact::NotHeardYet { channel }, since),
        Pulse::Silent { since, missed, .. } => {
            (Points::For, Fact::Silent { channel, missed, unsteady: beats.is_unsteady(now) }, since)
        }
    };
    Reason { points, fact, since, advisory: rule.weight == Weight::Advisory }
}

fn probe_reason(
    rule: &ProbeRule,
    state: &ProbeState,
    automatic: bool,
    now: MonoTime,
) -> (Points, Fact, Option<Verdict>) {
    let name = rule.name.clone();
    if now.ms_since(state.at) > rule.fresh_ms {
        return (Points::Neither, Fact::ProbeOld { name }, None);
    }
    match &state.said {
        ProbeSaid::Works => (Points::Against, Fact::ProbeWorks { name }, None),
        ProbeSaid::Broken { why } => {
            let fact = Fact::ProbeBroken { name, why: why.clone() };
            (Points::Neither, fact, Some(Verdict::Doubt(Doubt::ProbeBroken)))
        }
        ProbeSaid::Fails { why } => {
            let enough = state.failures >= rule.failures_min && now.ms_since(state.since) >= rule.for_ms;
            let verdict = match (enough, rule.then) {
                (false, _) => Verdict::Watching,
                (true, ProbeThen::Alarm) => Verdict::Doubt(Doubt::ApplicationFails),
                (true, ProbeThen::Takeover) if !automatic => Verdict::Doubt(Doubt::NotAutomatic),
                (true, ProbeThen::Takeover) => Verdict::Takeover(Cause::Application { probe: name.clone() }),
            };
            let fact = Fact::ProbeFails { name, times: state.failures, why: why.clone() };
            (if enough { Points::For } else { Points::Neither }, fact, Some(verdict))
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
