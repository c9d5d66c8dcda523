//! The box's side: who owns a host, in which term, and when another may.
//!
//! ```text
//!                  Arm                       the holder says it has stored it
//!   Standing ────────────────▶ Arming ───────────────────────────────────────▶ Leased ◀── grants, each second
//!       ▲  ◀── Disarm ──────────┴───────────────── Disarm ──────────────────────┘ │
//!       │                                                                         │ Move (from any)
//!       │                    released, run out for certain, or fenced by power    ▼
//!   next owner, term + 1 ◀──────────────────────────────────────────────────── Moving ── Abandon ──▶ Arming, term + 1
//! ```
//!
//! The owner `Box` has no lease: who grants them is its own authority, and ends its own service before it says `BoxStopped`.
//!
//! Every change of owner or of the kind of hold has a new term, and is in an [`GrantorAction::Persist`] before anything that
//! follows from it. Actions are carried out in order; when one cannot be stored, nothing after it is done and the machine is made anew from what
//! is stored, as after a crash.

use super::rules::{RulesError, certain_ms, check_rules};
use model::{HostId, MonoTime, Owner, Term};
use serde::{Deserialize, Serialize};
use std::fmt;
use wire::{Holding, LeaseAnswer, LeaseEnd, LeaseRequest, LeaseRules, LeaseVerdict};

/// What the owner holds its ownership by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// Without end, until it says that it has stopped. Also the box's own.
    Standing,
    /// A lease was offered; whether it is held is not known. `before`: what the holder certainly had until now, so that silence still
    /// ends it; none when it may serve without a lease.
    Arming { rules: LeaseRules, before: Option<LeaseRules> },
    /// By a lease: silence ends it.
    Leased { rules: LeaseRules },
    /// Nothing is granted any more. `silence`: the longest lease that may be out, none when silence proves nothing.
    Moving { to: Owner, rules: Option<LeaseRules>, silence: Option<LeaseRules> },
}

/// What survives the box's power loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnershipRecord {
    pub whose: HostId,
    pub term: Term,
    pub owner: Owner,
    pub hold: Hold,
}

impl OwnershipRecord {
    /// A host that was never leased or taken over.
    pub const fn new(whose: HostId) -> Self {
        Self { whose, term: Term::ZERO, owner: Owner::Host, hold: Hold::Standing }
    }
}

/// Why somebody may own now what another owned.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndedBy {
    /// It said that it has stopped.
    Release,
    /// Its lease has run out, whatever its clock says.
    Silence,
    /// Its power is off, or the operator has sworn to that.
    Power,
}

impl fmt::Display for EndedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Release => "it said that it has stopped",
            Self::Silence => "its lease has run out",
            Self::Power => "its power is off",
        })
    }
}

/// What a move waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MoveWaits {
    /// The release, or this moment.
    UntilSilent { at: MonoTime },
    /// The release or power fencing: silence proves nothing about who serves without a lease.
    ForProof,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantorEvent {
    /// From `from`, as its certificate says. The clock is read after the request has arrived.
    Request {
        from: Owner,
        request: LeaseRequest,
    },
    Released {
        from: Owner,
        end: LeaseEnd,
    },
    /// The box's own instance of the host has been stopped.
    BoxStopped,
    /// The owner's power is off for certain.
    FencedByPower,
    Tick,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantorAction {
    Persist(OwnershipRecord),
    Answer {
        to: Owner,
        answer: LeaseAnswer,
    },
    Revoke {
        to: Owner,
        end: LeaseEnd,
    },
    /// `owner` may serve from now on; when it is the box, it begins.
    Owned {
        owner: Owner,
        term: Term,
        by: EndedBy,
    },
    /// A holder has stored a higher term than this box has: the box's record is older than the truth. Nothing is granted until somebody
    /// says who owns ([`Grantor::adopt`]).
    Behind {
        from: Owner,
        theirs: Term,
    },
}

/// A change that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("{owner} owns it already")]
    OwnsAlready { owner: Owner },
    #[error("a move to {to} is under way")]
    Moving { to: Owner },
    #[error("no move is under way")]
    NotMoving,
    #[error("{owner} serves: only a host or standby holds a lease")]
    NoHolder { owner: Owner },
    #[error("a standby serves by lease only: give its rules")]
    StandbyNeedsRules,
    #[error(transparent)]
    Rules(#[from] RulesError),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Grantor {
    record: OwnershipRecord,
    /// The last grant, or when this machine was made: an earlier life may have granted until then.
    granted: MonoTime,
    /// The highest term that anybody said it has stored.
    heard: Term,
    holding: Option<(MonoTime, Holding)>,
}

impl Grantor {
    /// `record`: what was stored last. Anything may have been granted until `now`.
    pub fn new(record: OwnershipRecord, now: MonoTime) -> Result<Self, RulesError> {
        let rules = match record.hold {
            Hold::Standing => [None, None],
            Hold::Arming { rules, before } => [Some(rules), before],
            Hold::Leased { rules } => [Some(rules), None],
            Hold::Moving { rules, silence, .. } => [rules, silence],
        };
        rules.into_iter().flatten().try_for_each(check_rules)?;
        Ok(Self { record, granted: now, heard: record.term, holding: None })
    }
    pub fn record(&self) -> OwnershipRecord {
        self.record
    }
    /// What the owner said of itself last, and when.
    pub fn holding(&self) -> Option<(MonoTime, Holding)> {
        self.holding
    }
    /// What a move under way waits for.
    pub fn waits(&self) -> Option<MoveWaits> {
        let Hold::Moving { silence, .. } = self.record.hold else { return None };
        Some(match silence {
            Some(rules) => MoveWaits::UntilSilent { at: self.silent_at(rules) },
            None => MoveWaits::ForProof,
        })
    }
    /// Whether silence of the owner would end its ownership: what an automatic takeover needs.
    pub fn can_expire(&self) -> bool {
        self.silence().is_some()
    }
    pub fn next_tick(&self) -> Option<MonoTime> {
        match self.waits()? {
            MoveWaits::UntilSilent { at } => Some(at),
            MoveWaits::ForProof => None,
        }
    }

    /// From now on by lease.
    pub fn arm(&mut self, rules: LeaseRules) -> Result<Vec<GrantorAction>, ChangeError> {
        check_rules(rules)?;
        self.must_rest()?;
        if self.record.owner == Owner::Box {
            return Err(ChangeError::NoHolder { owner: Owner::Box });
        }
        let before = self.silence();
        Ok(self.change(self.record.owner, Hold::Arming { rules, before }))
    }

    /// From now on without: nobody will take over unless the owner has said that it stopped.
    pub fn disarm(&mut self) -> Result<Vec<GrantorAction>, ChangeError> {
        self.must_rest()?;
        if matches!(self.record.owner, Owner::Standby(_)) {
            return Err(ChangeError::StandbyNeedsRules);
        }
        Ok(self.change(self.record.owner, Hold::Standing))
    }

    /// Gives the host to `to`, as soon as its owner has stopped for certain. `rules`: of the new owner's lease.
    pub fn begin_move(&mut self, to: Owner, rules: Option<LeaseRules>) -> Result<Vec<GrantorAction>, ChangeError> {
        self.must_rest()?;
        rules.map_or(Ok(()), check_rules)?;
        match to {
            to if to == self.record.owner => return Err(ChangeError::OwnsAlready { owner: to }),
            Owner::Standby(_) if rules.is_none() => return Err(ChangeError::StandbyNeedsRules),
            _ => {}
        }
        let silence = self.silence();
        self.record.hold = Hold::Moving { to, rules, silence };
        let end = LeaseEnd { whose: self.record.whose, term: self.record.term };
        let mut out = vec![GrantorAction::Persist(self.record)];
        if self.record.owner != Owner::Box {
            out.push(GrantorAction::Revoke { to: self.record.owner, end });
        }
        Ok(out)
    }

    /// Leaves the owner what it has. In a new term: it may have released the old one already.
    pub fn abandon(&mut self) -> Result<Vec<GrantorAction>, ChangeError> {
        let Hold::Moving { silence, .. } = self.record.hold else { return Err(ChangeError::NotMoving) };
        let hold = match (self.record.owner, silence) {
            (Owner::Box, _) | (_, None) => Hold::Standing,
            (_, Some(rules)) => Hold::Arming { rules, before: Some(rules) },
        };
        Ok(self.change(self.record.owner, hold))
    }

    /// The operator says who owns, after the box lost its record (see [`GrantorAction::Behind`]) or a holder its own.
    pub fn adopt(&mut self, owner: Owner) -> Vec<GrantorAction> {
        self.record.term = self.record.term.max(self.heard);
        self.change(owner, Hold::Standing)
    }

    pub fn on(&mut self, event: GrantorEvent, now: MonoTime) -> Vec<GrantorAction> {
        match event {
            GrantorEvent::Request { from, request } => self.request(from, request, now),
            GrantorEvent::Released { from, end } => {
                let ours = end.whose == self.record.whose && end.term == self.record.term && from == self.record.owner;
                if ours && from != Owner::Box { self.ended(EndedBy::Release, now) } else { Vec::new() }
            }
            GrantorEvent::BoxStopped if self.record.owner == Owner::Box => self.ended(EndedBy::Release, now),
            GrantorEvent::BoxStopped => Vec::new(),
            GrantorEvent::FencedByPower => self.ended(EndedBy::Power, now),
            GrantorEvent::Tick => match self.waits() {
                Some(MoveWaits::UntilSilent { at }) if now >= at => self.ended(EndedBy::Silence, now),
                _ => Vec::new(),
            },
        }
    }

    fn request(&mut self, from: Owner, request: LeaseRequest, now: MonoTime) -> Vec<GrantorAction> {
        let LeaseRequest { whose, term, nonce, holding } = request;
        // No honest term comes near the limit; one that does would leave no room for the next.
        if whose != self.record.whose || from == Owner::Box || term.0 > u64::MAX / 2 {
            return Vec::new();
        }
        self.heard = self.heard.max(term);
        if term > self.record.term {
            return vec![GrantorAction::Behind { from, theirs: term }];
        }
        let mut out = Vec::new();
        if from != self.record.owner {
            let verdict = LeaseVerdict::NotYours { owner: self.record.owner };
            return vec![self.answer(from, nonce, verdict)];
        }
        self.holding = Some((now, holding));
        let free = matches!(holding, Holding::Unfenced | Holding::ByHand);
        match self.record.hold {
            Hold::Standing => out.push(self.answer(from, nonce, LeaseVerdict::Standing)),
            Hold::Moving { .. } => {
                let end = LeaseEnd { whose, term: self.record.term };
                out.push(GrantorAction::Revoke { to: from, end });
            }
            // It serves without a lease although it had one: its state was lost, or somebody there said so. Silence proves nothing until
            // it has stored a lease again.
            Hold::Leased { rules } | Hold::Arming { rules, before: Some(_) } if free => {
                out.extend(self.change(from, Hold::Arming { rules, before: None }));
                out.push(self.answer(from, nonce, LeaseVerdict::Arm(rules)));
            }
            Hold::Arming { rules, .. } if free || term < self.record.term => {
                out.push(self.answer(from, nonce, LeaseVerdict::Arm(rules)));
            }
            Hold::Arming { rules, .. } => {
                self.record.hold = Hold::Leased { rules };
                self.granted = now;
                out.push(GrantorAction::Persist(self.record));
                out.push(self.answer(from, nonce, LeaseVerdict::Granted(rules)));
            }
            Hold::Leased { rules } => {
                self.granted = now;
                out.push(self.answer(from, nonce, LeaseVerdict::Granted(rules)));
            }
        }
        out
    }

    /// The owner has stopped: the next one's turn.
    fn ended(&mut self, by: EndedBy, now: MonoTime) -> Vec<GrantorAction> {
        let Hold::Moving { to, rules, .. } = self.record.hold else { return Vec::new() };
        let hold = rules.filter(|_| to != Owner::Box).map_or(Hold::Standing, |rules| Hold::Leased { rules });
        self.granted = now;
        let mut out = self.change(to, hold);
        out.push(GrantorAction::Owned { owner: to, term: self.record.term, by });
        out
    }

    fn change(&mut self, owner: Owner, hold: Hold) -> Vec<GrantorAction> {
        if owner != self.record.owner {
            self.holding = None;
        }
        self.record = OwnershipRecord { term: self.record.term.next(), owner, hold, ..self.record };
        vec![GrantorAction::Persist(self.record)]
    }
    fn answer(&self, to: Owner, nonce: u64, verdict: LeaseVerdict) -> GrantorAction {
        let answer = LeaseAnswer { whose: self.record.whose, term: self.record.term, nonce, verdict };
        GrantorAction::Answer { to, answer }
    }
    fn must_rest(&self) -> Result<(), ChangeError> {
        match self.record.hold {
            Hold::Moving { to, .. } => Err(ChangeError::Moving { to }),
            _ => Ok(()),
        }
    }
    /// The longest lease that may be out, if there is nothing but leases.
    fn silence(&self) -> Option<LeaseRules> {
        match self.record.hold {
            _ if self.record.owner == Owner::Box => None,
            Hold::Standing | Hold::Arming { before: None, .. } => None,
            Hold::Leased { rules } => Some(rules),
            // It may have stored the new one, by which it counts from then on.
            Hold::Arming { rules, before: Some(before) } => {
                Some(if rules.lease_ms > before.lease_ms { rules } else { before })
            }
            Hold::Moving { silence, .. } => silence,
        }
    }
    fn silent_at(&self, rules: LeaseRules) -> MonoTime {
        self.granted.plus_ms(certain_ms(rules))
    }
}
