//! The holder's side: on the host itself, and on a standby for the host it stands by for.
//!
//! ```text
//!                    Arm                              NotYours, Revoke
//!   Unfenced ──────────────────▶ Serving ──────────────────────────────▶ Stopping ──▶ Down
//!      ▲  Standing                ▲    └── the lease's end less stop_ms ──▶ ▲          │ Granted, Standing
//!      └──────────────────────────┤                                        │ failed    ▼
//!                                 └────────────────── all is up ────────── Raising ◀───┘
//!   ByHand: the operator's word instead of a grant, until the box is heard again
//! ```
//!
//! Two things are stored. [`HolderRecord`] survives a reboot: whether this host is fenced, and the highest term it knows; a fenced host that
//! boots is down until it is told otherwise. [`RunRecord`] survives only the agent (it lies in a memory file system): until when the lease
//! runs, by a clock that one boot of the host has, so that a restart of the agent stops nothing.

use super::rules::{Until, check_rules};
use model::{HostId, MonoTime, Owner, Term};
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, fmt};
use wire::{Holding, LeaseAnswer, LeaseEnd, LeaseRequest, LeaseRules, LeaseVerdict};

/// Requests whose answers are waited for: one a second, and no lease is asked for longer than a few of them.
const REQUESTS_MAX: usize = 32;
/// After services could not be started, the next try.
const RAISE_AGAIN_MS: u64 = 15_000;

/// What survives a reboot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HolderRecord {
    /// Down at boot until told to serve.
    pub fenced: bool,
    pub term: Term,
}

impl HolderRecord {
    /// Of a host that was never leased. Nothing is ever stopped on it.
    pub const UNFENCED: Self = Self { fenced: false, term: Term::ZERO };
    /// Of a standby: it serves by grant only.
    pub const STANDBY: Self = Self { fenced: true, term: Term::ZERO };
}

/// What survives the agent, within one boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunRecord {
    /// `raised`: everything was up already.
    Leased {
        stop: MonoTime,
        end: MonoTime,
        raised: bool,
    },
    ByHand,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// The host booted, or nothing is known of a lease of this boot.
    Booted,
    LeaseRanOut,
    /// The box wants to move it.
    Revoked,
    /// Somebody else owns it.
    NotOwner {
        owner: Owner,
    },
    RaiseFailed,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Booted => f.write_str("nobody has said since the boot that it is the owner"),
            Self::LeaseRanOut => f.write_str("the box was not heard and the lease has run out"),
            Self::Revoked => f.write_str("the box moves it elsewhere"),
            Self::NotOwner { owner } => write!(f, "{owner} serves"),
            Self::RaiseFailed => f.write_str("it could not be started"),
        }
    }
}

/// Where a holder stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HolderState {
    Unfenced,
    Raising {
        until: Until,
        order: u64,
    },
    Serving {
        until: Until,
    },
    /// `by`: when it must be done; `hard`: that has passed and the last resort was ordered.
    Stopping {
        why: StopReason,
        by: MonoTime,
        order: u64,
        hard: bool,
    },
    Down {
        why: StopReason,
        not_before: MonoTime,
    },
    ByHand,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HolderEvent {
    /// The clock is read when it arrived, not before.
    Answer(LeaseAnswer),
    Revoke(LeaseEnd),
    /// Everything of the order is up.
    Raised {
        order: u64,
    },
    /// Something of it is not, and will not be.
    RaiseFailed {
        order: u64,
    },
    /// Every address is down and every service stopped: looked at, not believed.
    Stopped {
        order: u64,
    },
    Tick,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HolderAction {
    Persist(HolderRecord),
    /// None: a restart finds nothing and stops everything.
    Remember(Option<RunRecord>),
    /// Start services, put addresses up, and let the kernel take them down at the lease's end by itself.
    Raise {
        until: Until,
        order: u64,
    },
    /// Addresses that are up stay so until then.
    Extend {
        until: Until,
    },
    /// Addresses down at once, then services stopped; done by then.
    Stop {
        by: MonoTime,
        order: u64,
        why: StopReason,
    },
    /// It is not done, and the next owner may begin now: kill what is left, or the host.
    LastResort {
        order: u64,
    },
    Released(LeaseEnd),
}

/// A word of the operator that makes no sense here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ByHandError {
    #[error("it serves already")]
    Serves,
    #[error("it is being stopped; wait until it is down")]
    Stopping,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Holder {
    whose: HostId,
    record: HolderRecord,
    state: HolderState,
    next_nonce: u64,
    /// When requests were sent, oldest first.
    asked: VecDeque<(u64, MonoTime)>,
    orders: u64,
    /// What a lease gave for stopping, for when there is none.
    stop_ms: u64,
    /// To be told when all is down.
    release: Option<Term>,
    /// Said to be over: no grant of this term or an earlier one counts any more.
    released: Option<Term>,
}

impl Holder {
    /// `run`: of this boot, none after a reboot. `nonce`: drawn by chance, so that no answer to an earlier life is taken for one to this.
    /// `stop_ms`: how long stopping may take where no lease says so.
    pub fn new(
        whose: HostId,
        record: HolderRecord,
        run: Option<RunRecord>,
        nonce: u64,
        stop_ms: u64,
        now: MonoTime,
    ) -> (Self, Vec<HolderAction>) {
        let mut this = Self {
            whose,
            record,
            state: HolderState::Unfenced,
            next_nonce: nonce,
            asked: VecDeque::new(),
            orders: 0,
            stop_ms,
            release: None,
            released: None,
        };
        let mut out = Vec::new();
        match run {
            _ if !record.fenced => {}
            Some(RunRecord::Leased { stop, end, raised }) => match (Until::At { stop, end }) {
                until if until.has_ended(now) => this.stop(StopReason::LeaseRanOut, now, &mut out),
                until if raised => this.state = HolderState::Serving { until },
                until => this.raise(until, &mut out),
            },
            Some(RunRecord::ByHand) => this.state = HolderState::ByHand,
            None => this.stop(StopReason::Booted, now, &mut out),
        }
        (this, out)
    }

    pub fn state(&self) -> HolderState {
        self.state
    }
    pub fn record(&self) -> HolderRecord {
        self.record
    }
    pub fn holding(&self) -> Holding {
        match self.state {
            HolderState::Unfenced => Holding::Unfenced,
            HolderState::Raising { .. } => Holding::Raising,
            HolderState::Serving { .. } => Holding::Serving,
            HolderState::Stopping { .. } => Holding::Stopping,
            HolderState::Down { .. } => Holding::Down,
            HolderState::ByHand => Holding::ByHand,
        }
    }
    /// When `Tick` has something to do.
    pub fn next_tick(&self) -> Option<MonoTime> {
        match self.state {
            HolderState::Raising { until: Until::At { stop, .. }, .. }
            | HolderState::Serving { until: Until::At { stop, .. } } => Some(stop),
            HolderState::Stopping { by, hard: false, .. } => Some(by),
            _ => None,
        }
    }

    /// A request to be sent now. The clock is read before this is called, and it is sent after: the lease counts from there.
    pub fn request(&mut self, now: MonoTime) -> LeaseRequest {
        let nonce = self.next_nonce;
        self.next_nonce = nonce.wrapping_add(1);
        if self.asked.len() >= REQUESTS_MAX {
            self.asked.pop_front();
        }
        self.asked.push_back((nonce, now));
        LeaseRequest { whose: self.whose, term: self.record.term, nonce, holding: self.holding() }
    }

    /// The operator's word instead of the box's: serve. When the word was wrong, two serve.
    pub fn by_hand(&mut self) -> Result<Vec<HolderAction>, ByHandError> {
        match self.state {
            HolderState::Down { .. } => {
                let order = self.order();
                self.state = HolderState::ByHand;
                self.asked.clear();
                Ok(vec![
                    HolderAction::Remember(Some(RunRecord::ByHand)),
                    HolderAction::Raise { until: Until::Forever, order },
                ])
            }
            HolderState::Stopping { .. } => Err(ByHandError::Stopping),
            _ => Err(ByHandError::Serves),
        }
    }

    pub fn on(&mut self, event: HolderEvent, now: MonoTime) -> Vec<HolderAction> {
        let mut out = Vec::new();
        // Whatever is said, what has run out has run out: no event is handled as if the lease were still there.
        self.tick(now, &mut out);
        match event {
            HolderEvent::Answer(answer) => self.answer(answer, now, &mut out),
            HolderEvent::Revoke(end) => self.revoke(end, now, &mut out),
            HolderEvent::Raised { order } => match self.state {
                HolderState::Raising { until: Until::Forever, order: current } if order == current => {
                    // Not before: a crash while services are started must not leave them down and unfenced.
                    self.persist(false, self.record.term, &mut out);
                    self.state = HolderState::Unfenced;
                }
                HolderState::Raising { until, order: current } if order == current => {
                    self.state = HolderState::Serving { until };
                    remember(until, true, &mut out);
                }
                _ => {}
            },
            HolderEvent::RaiseFailed { order } => match self.state {
                HolderState::Raising { order: current, .. } if order == current => {
                    self.stop(StopReason::RaiseFailed, now, &mut out);
                }
                _ => {}
            },
            HolderEvent::Stopped { order } => match self.state {
                HolderState::Stopping { why, order: current, .. } if order == current => {
                    let wait = if why == StopReason::RaiseFailed { RAISE_AGAIN_MS } else { 0 };
                    self.state = HolderState::Down { why, not_before: now.plus_ms(wait) };
                    // Grants that are on their way were asked for before everything was stopped; a new one is a second away.
                    self.asked.clear();
                    out.push(HolderAction::Remember(None));
                    self.say_released(&mut out);
                }
                _ => {}
            },
            HolderEvent::Tick => {}
        }
        out
    }

    fn tick(&mut self, now: MonoTime, out: &mut Vec<HolderAction>) {
        match &mut self.state {
            HolderState::Raising { until, .. } | HolderState::Serving { until } if until.has_ended(now) => {
                self.stop(StopReason::LeaseRanOut, now, out);
            }
            HolderState::Stopping { by, order, hard, .. } if !*hard && now >= *by => {
                *hard = true;
                out.push(HolderAction::LastResort { order: *order });
            }
            _ => {}
        }
    }

    fn answer(&mut self, answer: LeaseAnswer, now: MonoTime, out: &mut Vec<HolderAction>) {
        let LeaseAnswer { whose, term, nonce, verdict } = answer;
        let over = term < self.record.term || self.released.is_some_and(|released| term <= released);
        if whose != self.whose || over {
            return;
        }
        let sent = self.asked.iter().find(|(n, _)| *n == nonce).map(|(_, sent)| *sent);
        // What lets us serve must answer a request of this life that was sent after the last stop; what stops us needs no such proof.
        match (verdict, sent) {
            (LeaseVerdict::NotYours { owner }, _) => self.not_ours(owner, term, now, out),
            (LeaseVerdict::Standing, Some(_)) => self.standing(term, now, out),
            (LeaseVerdict::Arm(rules), Some(_)) if check_rules(rules).is_ok() => self.arm(rules, term, now, out),
            // Who is not fenced would go on serving at the next boot, whatever was granted: it has to be armed first.
            (LeaseVerdict::Granted(rules), Some(sent)) if check_rules(rules).is_ok() && self.record.fenced => {
                self.granted(rules, term, sent, now, out);
            }
            (LeaseVerdict::Standing | LeaseVerdict::Arm(_) | LeaseVerdict::Granted(_), _) => {}
        }
    }

    fn granted(&mut self, rules: LeaseRules, term: Term, sent: MonoTime, now: MonoTime, out: &mut Vec<HolderAction>) {
        let lease = Until::leased(sent, rules);
        if lease.has_ended(now) {
            return;
        }
        self.persist(true, term, out);
        self.stop_ms = rules.stop_ms;
        let raised = matches!(self.state, HolderState::Serving { .. });
        match &mut self.state {
            HolderState::Serving { until } | HolderState::Raising { until, .. } => {
                *until = until.or_later(lease);
                let until = *until;
                remember(until, raised, out);
                out.push(HolderAction::Extend { until });
            }
            HolderState::Down { not_before, .. } if now >= *not_before => self.raise(lease, out),
            // By hand, the box arms first: it must not count the silence of one who does not.
            HolderState::Down { .. } | HolderState::Stopping { .. } | HolderState::ByHand | HolderState::Unfenced => {}
        }
    }

    fn standing(&mut self, term: Term, now: MonoTime, out: &mut Vec<HolderAction>) {
        match self.state {
            HolderState::Unfenced => self.persist(false, term, out),
            HolderState::Serving { .. } | HolderState::ByHand => {
                self.persist(false, term, out);
                self.state = HolderState::Unfenced;
                out.extend([HolderAction::Extend { until: Until::Forever }, HolderAction::Remember(None)]);
            }
            HolderState::Raising { order, .. } => {
                self.persist(true, term, out);
                self.state = HolderState::Raising { until: Until::Forever, order };
                out.extend([HolderAction::Extend { until: Until::Forever }, HolderAction::Remember(None)]);
            }
            HolderState::Down { not_before, .. } if now >= not_before => {
                self.persist(true, term, out);
                self.raise(Until::Forever, out);
            }
            HolderState::Down { .. } | HolderState::Stopping { .. } => {}
        }
    }

    fn arm(&mut self, rules: LeaseRules, term: Term, now: MonoTime, out: &mut Vec<HolderAction>) {
        if term == self.record.term && self.record.fenced && self.state != HolderState::ByHand {
            return;
        }
        self.persist(true, term, out);
        self.stop_ms = rules.stop_ms;
        // The box counts from a request that says so, and none such has been sent yet: a lease from now ends before it.
        let until = Until::leased(now, rules);
        match self.state {
            HolderState::Unfenced | HolderState::ByHand => {
                self.state = HolderState::Serving { until };
                remember(until, true, out);
                out.push(HolderAction::Extend { until });
            }
            HolderState::Raising { until: Until::Forever, order } => {
                self.state = HolderState::Raising { until, order };
                remember(until, false, out);
                out.push(HolderAction::Extend { until });
            }
            HolderState::Raising { .. }
            | HolderState::Serving { .. }
            | HolderState::Stopping { .. }
            | HolderState::Down { .. } => {}
        }
    }

    fn not_ours(&mut self, owner: Owner, term: Term, now: MonoTime, out: &mut Vec<HolderAction>) {
        self.persist(true, term, out);
        match &mut self.state {
            HolderState::Down { why, .. } | HolderState::Stopping { why, .. } => *why = StopReason::NotOwner { owner },
            _ => self.stop(StopReason::NotOwner { owner }, now, out),
        }
    }

    fn revoke(&mut self, end: LeaseEnd, now: MonoTime, out: &mut Vec<HolderAction>) {
        if end.whose != self.whose || end.term < self.record.term {
            return;
        }
        // Fenced first: a crash in between must not boot into serving what was given away.
        self.persist(true, end.term, out);
        self.release = Some(end.term);
        match self.state {
            HolderState::Down { .. } => self.say_released(out),
            HolderState::Stopping { .. } => {}
            _ => self.stop(StopReason::Revoked, now, out),
        }
    }

    fn say_released(&mut self, out: &mut Vec<HolderAction>) {
        let Some(term) = self.release.take() else { return };
        self.released = self.released.max(Some(term));
        self.asked.clear();
        out.push(HolderAction::Released(LeaseEnd { whose: self.whose, term }));
    }

    fn raise(&mut self, until: Until, out: &mut Vec<HolderAction>) {
        let order = self.order();
        self.state = HolderState::Raising { until, order };
        remember(until, false, out);
        out.push(HolderAction::Raise { until, order });
    }

    fn stop(&mut self, why: StopReason, now: MonoTime, out: &mut Vec<HolderAction>) {
        let by = match self.state {
            HolderState::Raising { until: Until::At { end, .. }, .. }
            | HolderState::Serving { until: Until::At { end, .. } } => end.min(now.plus_ms(self.stop_ms)),
            _ => now.plus_ms(self.stop_ms),
        };
        let order = self.order();
        self.state = HolderState::Stopping { why, by, order, hard: false };
        out.push(HolderAction::Stop { by, order, why });
    }

    fn order(&mut self) -> u64 {
        self.orders += 1;
        self.orders
    }

    fn persist(&mut self, fenced: bool, term: Term, out: &mut Vec<HolderAction>) {
        let record = HolderRecord { fenced, term };
        if record != self.record {
            self.record = record;
            out.push(HolderAction::Persist(record));
        }
    }
}

fn remember(until: Until, raised: bool, out: &mut Vec<HolderAction>) {
    out.push(HolderAction::Remember(match until {
        Until::At { stop, end } => Some(RunRecord::Leased { stop, end, raised }),
        Until::Forever => None,
    }));
}
