//! A host or standby: its kernel, and the agent that runs there or does not.

use super::clock::Clock;
use model::{MonoTime, Owner};
use replication::ownership::{Holder, HolderRecord, RunRecord};
use wire::{LeaseAnswer, LeaseEnd};

/// What lies in wait for a process that does not run just now.
#[derive(Clone, Copy, Debug)]
pub(super) enum ForAgent {
    Answer(LeaseAnswer),
    Revoke(LeaseEnd),
    /// Send a request and a beat.
    Second,
    Timer,
    Work(Work),
}

/// Steps of an order, each done after some time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Up { order: u64 },
    AddressDown { order: u64 },
    Stopped { order: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Address {
    Down,
    /// Until the kernel takes it down.
    Until(MonoTime),
    Forever,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) owner: Owner,
    pub(super) clock: Clock,
    pub(super) power: bool,
    /// Everything stands still, the kernel too; the clock does not.
    pub(super) frozen: bool,
    /// The agent's process is stopped.
    pub(super) paused: bool,
    pub(super) agent: Option<Holder>,
    /// Counts agents: what was meant for an earlier one is nothing to this.
    pub(super) life: u64,
    pub(super) stored: HolderRecord,
    pub(super) run: Option<RunRecord>,
    pub(super) address: Address,
    pub(super) waiting: Vec<ForAgent>,
}

impl Machine {
    pub(super) fn new(owner: Owner, clock: Clock, stored: HolderRecord) -> Self {
        let address = if stored.fenced { Address::Down } else { Address::Forever };
        Self {
            owner,
            clock,
            power: true,
            frozen: false,
            paused: false,
            agent: None,
            life: 0,
            stored,
            run: None,
            address,
            waiting: Vec::new(),
        }
    }
    /// Whether the service answers here.
    pub(super) fn serves(&self, now_us: u64) -> bool {
        self.power
            && !self.frozen
            && match self.address {
                Address::Down => false,
                Address::Until(end) => self.clock.read(now_us) < end,
                Address::Forever => true,
            }
    }
    pub(super) fn runs(&self) -> bool {
        self.power && !self.frozen && !self.paused && self.agent.is_some()
    }
    pub(super) fn kernel_runs(&self) -> bool {
        self.power && !self.frozen
    }
}
