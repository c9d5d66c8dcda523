//! Desks over a simulated disk: what is stored before what, and what cannot be read.

use super::*;
use durable::SimDisk;
use model::Term;
use replication::ownership::{RulesError, check_rules};
use takeover::plan::{LEASE_MS_MAX, LEASE_MS_MIN, Lease, RENEWING_MS, STOP_MS_MIN};
use wire::{Holding, LeaseRules, LeaseVerdict, PlanService};

const HOST: HostId = HostId([1; 16]);
const RULES: LeaseRules = LeaseRules { lease_ms: 3_000, stop_ms: 1_000 };

fn open(disk: &SimDisk) -> Ownership {
    let clock = Clock::start();
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let catalog = Catalog::open(Arc::clone(&disk)).unwrap().0;
    Ownership::open(disk, Arc::new(Events::new(clock)), Arc::new(catalog), clock).unwrap()
}

fn wants(service: &str, all_read: bool) -> Wants {
    let services = vec![PlanService::Configured(service.into())];
    let lease = Some(Lease { rules: RULES, addresses: vec![], services });
    let want = Want { plan: "p".into(), lease, ..Want::default() };
    Wants { of: [(HOST, want)].into(), all_read, ..Wants::default() }
}

/// An agent's half of a connection.
struct Agent {
    said: mpsc::Receiver<Message>,
    nonce: u64,
}

impl Agent {
    fn connect(box_side: &Ownership) -> Self {
        let (to, said) = mpsc::channel(LINE_MAX);
        box_side.connected(HOST, 4, to);
        Self { said, nonce: 0 }
    }
    fn next(&mut self) -> Option<Message> {
        self.said.try_recv().ok()
    }
    fn plan(&mut self) -> Option<wire::HostPlan> {
        std::iter::from_fn(|| self.next()).find_map(|m| match m {
            Message::HostPlan(plan) => Some(plan),
            _ => None,
        })
    }
    fn take_plan(&mut self, box_side: &Ownership) {
        let plan = self.plan().expect("a plan");
        box_side.plan_taken(HOST, plan.version, None);
    }
    /// Asks, and what the box says to it.
    fn ask(&mut self, box_side: &Ownership, term: u64, holding: Holding) -> Option<(u64, LeaseVerdict)> {
        self.nonce += 1;
        let request = LeaseRequest { whose: HOST, term: Term(term), nonce: self.nonce, holding };
        box_side.request(HOST, request);
        std::iter::from_fn(|| self.next()).find_map(|m| match m {
            Message::LeaseAnswer(answer) => Some((answer.term.0, answer.verdict)),
            _ => None,
        })
    }
    /// Until its lease could fence it.
    fn arm(box_side: &Ownership) -> Self {
        box_side.set_wants(wants("web", true));
        let mut agent = Self::connect(box_side);
        agent.take_plan(box_side);
        assert_eq!(agent.ask(box_side, 0, Holding::Unfenced), Some((1, LeaseVerdict::Arm(RULES))));
        assert!(box_side.proof(HOST).is_err(), "it has not said yet that it has stored the lease");
        assert_eq!(agent.ask(box_side, 1, Holding::Serving), Some((1, LeaseVerdict::Granted(RULES))));
        assert_eq!(box_side.proof(HOST), Ok(()));
        agent
    }
}

#[test]
fn a_lease_counts_only_for_the_plan_that_the_agent_has() {
    let disk = SimDisk::new(1, model::ByteLen(64 << 20));
    let box_side = open(&disk);
    let mut agent = Agent::arm(&box_side);
    // Another plan goes out: until it is taken, and whatever is said or restarted meanwhile, nobody knows which one the agent has.
    box_side.set_wants(wants("other", true));
    assert!(box_side.proof(HOST).unwrap_err().contains("has not taken the plan"));
    assert!(agent.plan().is_some());
    box_side.set_wants(wants("web", true));
    assert!(box_side.proof(HOST).is_err(), "it may have the one that was sent in between");
    let again = open(&disk);
    again.set_wants(wants("web", true));
    assert!(again.proof(HOST).is_err(), "also for the next daemon");
    let mut agent = Agent::connect(&again);
    agent.take_plan(&again);
    assert_eq!(again.proof(HOST), Ok(()), "and then it has this one");
}

#[test]
fn what_cannot_be_read_disarms_nobody_and_what_is_gone_does() {
    let disk = SimDisk::new(2, model::ByteLen(64 << 20));
    Agent::arm(&open(&disk));
    let box_side = open(&disk);
    let mut agent = Agent::connect(&box_side);
    box_side.set_wants(Wants { all_read: false, ..Wants::default() });
    assert_eq!(agent.ask(&box_side, 1, Holding::Serving), Some((1, LeaseVerdict::Granted(RULES))));
    box_side.set_wants(Wants { all_read: true, ..Wants::default() });
    assert!(agent.plan().is_none(), "what it has to start again is in the plan it has");
    assert_eq!(agent.ask(&box_side, 1, Holding::Serving), Some((2, LeaseVerdict::Standing)));
    assert_eq!(agent.ask(&box_side, 2, Holding::Unfenced), Some((2, LeaseVerdict::Standing)));
    agent.ask(&box_side, 2, Holding::Unfenced);
    let report = box_side.report(HOST).unwrap();
    assert_eq!((report.hold, report.fences), ("standing", false));
}

#[test]
fn a_host_that_is_taken_is_granted_nothing_by_any_later_daemon_until_it_is_given_back() {
    let disk = SimDisk::new(3, model::ByteLen(64 << 20));
    let box_side = open(&disk);
    let mut agent = Agent::arm(&box_side);
    let begun = box_side.take(HOST).unwrap();
    assert!(matches!(begun, Fencing::Waits { ms: Some(ms) } if ms <= 3_100), "{begun:?}");
    assert!(agent.ask(&box_side, 1, Holding::Serving).is_none(), "nothing is granted");
    let next = open(&disk);
    next.set_wants(wants("web", true));
    let mut agent = Agent::connect(&next);
    assert!(agent.ask(&next, 1, Holding::Serving).is_none());
    let waits = next.take(HOST).unwrap();
    assert!(matches!(waits, Fencing::Waits { ms: Some(ms) } if ms > 2_000), "the whole wait anew: {waits:?}");
    next.released(HOST, LeaseEnd { whose: HOST, term: Term(1) });
    let done = next.take(HOST).unwrap();
    assert!(matches!(done, Fencing::Done { term: Term(2), .. }), "{done:?}");
    let last = open(&disk);
    assert_eq!(last.take(HOST), Ok(done), "who owns it, and how that came, is kept");
    let mut agent = Agent::connect(&last);
    assert_eq!(agent.ask(&last, 1, Holding::Down), Some((2, LeaseVerdict::NotYours { owner: Owner::Box })));
    last.give_back(HOST, Some(RULES)).unwrap();
    last.give_back(HOST, Some(RULES)).unwrap();
    assert_eq!(agent.ask(&last, 2, Holding::Down), Some((3, LeaseVerdict::Granted(RULES))));
}

#[test]
fn a_move_that_is_given_up_leaves_the_host_its_lease_in_a_new_term() {
    let disk = SimDisk::new(4, model::ByteLen(64 << 20));
    let box_side = open(&disk);
    let mut agent = Agent::arm(&box_side);
    box_side.take(HOST).unwrap();
    box_side.give_back(HOST, Some(RULES)).unwrap();
    assert_eq!(agent.ask(&box_side, 1, Holding::Serving), Some((2, LeaseVerdict::Arm(RULES))));
    assert_eq!(agent.ask(&box_side, 2, Holding::Serving), Some((2, LeaseVerdict::Granted(RULES))));
}

#[test]
fn a_record_that_is_lost_or_damaged_grants_nothing_until_somebody_says_who_owns() {
    let disk = SimDisk::new(5, model::ByteLen(64 << 20));
    let box_side = open(&disk);
    // The agent knows of a term that this box never gave.
    let mut agent = Agent::connect(&box_side);
    assert!(agent.ask(&box_side, 7, Holding::Serving).is_none());
    assert!(box_side.alerts()[0].contains("has stored term 7"), "{:?}", box_side.alerts());
    box_side.adopt(HOST, Owner::Host).unwrap();
    assert_eq!(agent.ask(&box_side, 7, Holding::Serving), Some((8, LeaseVerdict::Standing)));
    assert_eq!(box_side.alerts(), Vec::<String>::new());
    for copy in ["a", "b"] {
        disk.replace(&Path::new(DIR).join(format!("{HOST}.{copy}")), b"rot").unwrap();
    }
    let box_side = open(&disk);
    let mut agent = Agent::connect(&box_side);
    assert!(agent.ask(&box_side, 8, Holding::Serving).is_none());
    assert!(box_side.take(HOST).is_err() && box_side.proof(HOST).is_err());
    assert!(box_side.alerts()[0].contains("cannot be read"), "{:?}", box_side.alerts());
    box_side.adopt(HOST, Owner::Host).unwrap();
    assert!(agent.ask(&box_side, 8, Holding::Serving).is_none(), "its term is still above what is known");
    box_side.adopt(HOST, Owner::Host).unwrap();
    assert_eq!(agent.ask(&box_side, 8, Holding::Serving), Some((9, LeaseVerdict::Standing)));
}

#[test]
fn plans_allow_what_leases_allow_and_nothing_else() {
    let check = |lease_ms, stop_ms| check_rules(LeaseRules { lease_ms, stop_ms });
    assert_eq!(check(LEASE_MS_MIN, STOP_MS_MIN), Ok(()));
    assert_eq!(check(LEASE_MS_MAX, LEASE_MS_MAX - RENEWING_MS), Ok(()));
    assert!(matches!(check(LEASE_MS_MIN - 1, STOP_MS_MIN), Err(RulesError::Lease { .. })));
    assert!(matches!(check(LEASE_MS_MAX + 1, STOP_MS_MIN), Err(RulesError::Lease { .. })));
    assert!(matches!(check(LEASE_MS_MIN, STOP_MS_MIN - 1), Err(RulesError::Stop { .. })));
    assert!(matches!(check(LEASE_MS_MIN, LEASE_MS_MIN - RENEWING_MS + 1), Err(RulesError::Stop { .. })));
}
