//! Who runs a host's services: a lease with a term, so that two never do at once, whatever the network does.
//!
//! - [`Grantor`]: the box's side, one for each host. It alone says who owns a host.
//! - [`Holder`]: the side of who serves: the host's own agent, or a standby's.
//!
//! Both take events and a time and return actions. Sockets, files, services and addresses belong to the caller.
//!
//! # The protocol
//!
//! ```text
//! holder (host or standby)                                    grantor (box)
//!   Lease{term, nonce, holding}, each second ───────────────▶
//!        ◀────────────────── LeaseAnswer{term, nonce, Granted{lease, stop}}     counts from its grant
//!   serves until sent(nonce) + lease − stop
//!        ✂ network cut
//!   lease − stop: addresses down, services stopped
//!   lease: it is done, or the last resort is taken
//!                                                             lease · (1+ρ)/(1−ρ): run out for certain
//!                                                             term + 1 stored; the next owner begins
//!   Lease{term, …} ─────────────────────────────────────────▶
//!        ◀────────────────── LeaseAnswer{term + 1, NotYours{owner}}
//!   stores term + 1; stays down: it is a failback target now
//! ```
//!
//! A planned move is quicker: `LeaseRevoke` asks the holder to stop, `LeaseReleased` says that it has.
//!
//! # Opt-in
//!
//! A host without a takeover plan has no lease ([`Hold::Standing`], [`Holding::Unfenced`](wire::Holding)) and nothing is ever stopped on it. A
//! lease makes the way to the box part of what a service depends on: when the box or the network is away for longer than the lease, the
//! service stops, although its host is well. That price is right only where somebody else begins in its place, so a plan has to ask for it.
//! Without it a takeover waits for the host's own word, for power fencing, or for the operator's oath. Before planned maintenance of a box
//! its leases are turned into standing ownership ([`Grantor::disarm`]), and back after it.
//!
//! # Why two never serve at once
//!
//! Let ρ be the bound on either clock's rate ([`DRIFT_PPM_MAX`]), and L the lease.
//!
//! 1. *A holder serves by its last grant only, and not beyond its end.* For a grant that answers a request sent at true time s, it stops by its
//!    own clock L after s, so by true time s + L/(1−ρ). It reads that clock **before** it sends.
//! 2. *The box has read its clock after that.* It reads it at g, **after** the request has arrived, so s ≤ g in true time, however long
//!    request and answer were under way, and whichever copies of them came twice. It waits L·(1+ρ)/(1−ρ) by its own clock, so at least
//!    until g + L/(1−ρ) ≥ s + L/(1−ρ). Delays need no bound; they only cost some of the lease.
//! 3. *No grant comes after the box begins to wait.* `Moving` is stored before anything else; in it nothing is granted, also after a restart.
//!    A restarted box takes the moment of its start for its last grant, which is later than any that it may have made.
//! 4. *Nothing said earlier lets a holder serve later.* A grant counts only with the nonce of a request of the same life of the agent, sent after
//!    the last stop, and not for a term that the holder has released; a standing ownership likewise. A holder that restarts knows no nonces,
//!    and a host that boots is down (the gate) unless it is unfenced.
//! 5. *Silence of an unfenced holder proves nothing*, so the box counts it only after the holder has said, in the current term, that it is
//!    fenced; it has stored that before it says so, and its lease runs already when it does. Every change between standing and leased has
//!    a new term, so that an answer of before the change is refused after it.
//! 6. *The next owner begins only after the record with its term is stored.* By 1 to 5 the last one has stopped by then, or has released, or is
//!    without power.
//!
//! What the caller owes: clocks that count sleep (`CLOCK_BOOTTIME`), read as 1 and 2 say; actions in order, and after a failed
//! `Persist` none that follow (make the machine anew from what is stored); `Stopped` only when it has looked. The host's agent hangs the lease
//! on each address in the kernel too, so that an agent that is stopped, starved or killed cannot keep an address beyond its lease.
//!
//! # Limits
//!
//! - A clock beyond ρ breaks it: a hypervisor that stops a guest together with its clock and lets it go on later. The guest serves until
//!   its next answer then, at most a lease's rest. Power fencing covers that; so do addresses that have moved.
//! - The operator's word ([`Holder::by_hand`], [`GrantorEvent::FencedByPower`]) is believed. A false one makes two owners.
//! - One box grants. Two of a pair will hand this record over with their own term.
//! - A host restored from an image of before it was armed does not know that it is fenced until it hears the box; that is why `Unfenced`
//!   from a leased host makes the box distrust silence at once.
//!
//! # Power loss
//!
//! [`OwnershipRecord`] and [`HolderRecord`] are small and stored whole before what follows from them. Losing the box's record is noticed
//! by a holder that knows a higher term ([`GrantorAction::Behind`]): nothing is granted until an operator says who owns.
//!
//! # Tests
//!
//! Each transition by hand, and noise. In `sim::ownership` ten thousand worlds of box, host, standby and network, and variants broken on
//! purpose, which it must find out.

mod grantor;
mod holder;
mod rules;
#[cfg(test)]
mod tests;

pub use grantor::{ChangeError, EndedBy, Grantor, GrantorAction, GrantorEvent, Hold, MoveWaits, OwnershipRecord};
pub use holder::{ByHandError, Holder, HolderAction, HolderEvent, HolderRecord, HolderState, RunRecord, StopReason};
pub use rules::{DRIFT_PPM_MAX, RENEW_MS, RulesError, Until, certain_ms, check_rules};
