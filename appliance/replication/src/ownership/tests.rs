//! Transitions by hand, and noise.

use super::*;
use crate::rng::Rng;
use model::{HostId, MonoTime, Owner, Term};
use wire::{Holding, LeaseAnswer, LeaseEnd, LeaseRequest, LeaseRules, LeaseVerdict};

const HOST: HostId = HostId([1; 16]);
const RULES: LeaseRules = LeaseRules { lease_ms: 10_000, stop_ms: 3_000 };
const SINCE: MonoTime = MonoTime(5_000_000_000);

fn at(ms: u64) -> MonoTime {
    SINCE.plus_ms(ms)
}
fn end(term: u64) -> LeaseEnd {
    LeaseEnd { whose: HOST, term: Term(term) }
}
fn unfenced() -> Holder {
    let (holder, actions) = Holder::new(HOST, HolderRecord::UNFENCED, None, 100, 3_000, at(0));
    assert_eq!(actions, []);
    holder
}
fn boxed() -> Grantor {
    Grantor::new(OwnershipRecord::new(HOST), at(0)).unwrap()
}
/// A request from the host and its answer, at one moment.
fn round(holder: &mut Holder, grantor: &mut Grantor, now: MonoTime) -> (Vec<GrantorAction>, Vec<HolderAction>) {
    let request = holder.request(now);
    let said = grantor.on(GrantorEvent::Request { from: Owner::Host, request }, now);
    let heard = said.iter().flat_map(|action| match action {
        GrantorAction::Answer { answer, .. } => holder.on(HolderEvent::Answer(*answer), now),
        GrantorAction::Revoke { end, .. } => holder.on(HolderEvent::Revoke(*end), now),
        _ => Vec::new(),
    });
    let heard = heard.collect();
    (said, heard)
}
/// Armed at 0 and granted at 1000.
fn leased() -> (Holder, Grantor) {
    let (mut holder, mut grantor) = (unfenced(), boxed());
    grantor.arm(RULES).unwrap();
    round(&mut holder, &mut grantor, at(0));
    round(&mut holder, &mut grantor, at(1000));
    assert_eq!(grantor.record().hold, Hold::Leased { rules: RULES });
    (holder, grantor)
}
/// Carries out the last order as if it had worked.
fn done(holder: &mut Holder, now: MonoTime) -> Vec<HolderAction> {
    match holder.state() {
        HolderState::Raising { order, .. } => holder.on(HolderEvent::Raised { order }, now),
        HolderState::Stopping { order, .. } => holder.on(HolderEvent::Stopped { order }, now),
        _ => Vec::new(),
    }
}

#[test]
fn without_a_plan_nothing_is_ever_stopped() {
    let (mut holder, mut grantor) = (unfenced(), boxed());
    round(&mut holder, &mut grantor, at(0));
    for day in 0..100 {
        assert_eq!(holder.on(HolderEvent::Tick, at(day * 86_400_000)), []);
    }
    assert_eq!((holder.state(), holder.next_tick()), (HolderState::Unfenced, None));
    grantor.begin_move(Owner::Box, None).unwrap();
    assert_eq!(grantor.waits(), Some(MoveWaits::ForProof));
    assert_eq!(grantor.on(GrantorEvent::Tick, at(86_400_000)), [], "silence of who has no lease proves nothing");
}

#[test]
fn a_host_is_armed_only_when_it_says_that_it_has_stored_it() {
    let (mut holder, mut grantor) = (unfenced(), boxed());
    assert_eq!(
        grantor.arm(RULES).unwrap(),
        [GrantorAction::Persist(OwnershipRecord {
            whose: HOST,
            term: Term(1),
            owner: Owner::Host,
            hold: Hold::Arming { rules: RULES, before: None }
        })]
    );
    assert!(!grantor.can_expire());
    let (_, heard) = round(&mut holder, &mut grantor, at(0));
    let until = Until::At { stop: at(7_000), end: at(10_000) };
    assert_eq!(
        heard,
        [
            HolderAction::Persist(HolderRecord { fenced: true, term: Term(1) }),
            HolderAction::Remember(Some(RunRecord::Leased { stop: at(7_000), end: at(10_000), raised: true })),
            HolderAction::Extend { until },
        ]
    );
    assert!(!grantor.can_expire(), "it has not said so yet");
    let (said, _) = round(&mut holder, &mut grantor, at(1000));
    assert!(matches!(said[..], [GrantorAction::Persist(_), GrantorAction::Answer { .. }]), "{said:?}");
    assert!(grantor.can_expire());
    assert_eq!(holder.state(), HolderState::Serving { until: Until::At { stop: at(8_000), end: at(11_000) } });
}

#[test]
fn a_lease_counts_from_the_request_and_the_box_waits_longer() {
    let (mut holder, mut grantor) = leased();
    // Asked at 2000, granted at 6000, heard at 7500.
    let request = holder.request(at(2000));
    let said = grantor.on(GrantorEvent::Request { from: Owner::Host, request }, at(6000));
    let [GrantorAction::Answer { answer, .. }] = said[..] else { panic!("{said:?}") };
    holder.on(HolderEvent::Answer(answer), at(7_500));
    assert_eq!(holder.state(), HolderState::Serving { until: Until::At { stop: at(9_000), end: at(12_000) } });
    assert_eq!(holder.on(HolderEvent::Tick, at(8_999)), []);
    let stopped = holder.on(HolderEvent::Tick, at(9_000));
    assert_eq!(stopped, [HolderAction::Stop { by: at(12_000), order: 1, why: StopReason::LeaseRanOut }]);
    // An answer that comes now is too late, and what is not done in time is done by force.
    holder.on(HolderEvent::Answer(answer), at(9_500));
    assert_eq!(holder.on(HolderEvent::Tick, at(12_000)), [HolderAction::LastResort { order: 1 }]);
    assert_eq!(holder.on(HolderEvent::Tick, at(12_500)), [], "once");
    grantor.begin_move(Owner::Box, None).unwrap();
    let Some(MoveWaits::UntilSilent { at: silent }) = grantor.waits() else { panic!() };
    assert!(silent > at(16_000) && silent < at(16_100), "{silent:?}");
    assert_eq!(grantor.on(GrantorEvent::Tick, at(16_000)), []);
    let moved = grantor.on(GrantorEvent::Tick, silent);
    assert!(
        matches!(
            moved[..],
            [
                GrantorAction::Persist(OwnershipRecord { term: Term(2), owner: Owner::Box, hold: Hold::Standing, .. }),
                GrantorAction::Owned { owner: Owner::Box, term: Term(2), by: EndedBy::Silence }
            ]
        ),
        "{moved:?}"
    );
}

#[test]
fn nothing_is_granted_while_it_moves_and_a_release_ends_it_at_once() {
    let (mut holder, mut grantor) = leased();
    grantor.begin_move(Owner::Box, None).unwrap();
    let granted_before = holder.request(at(1500));
    let (_, heard) = round(&mut holder, &mut grantor, at(2000));
    assert_eq!(heard, [HolderAction::Stop { by: at(5_000), order: 1, why: StopReason::Revoked }]);
    let released = done(&mut holder, at(2_300));
    assert_eq!(released, [HolderAction::Remember(None), HolderAction::Released(end(1))]);
    // A grant of the released term that was on its way for long, even with a good nonce, lets nobody serve.
    let late =
        LeaseAnswer { whose: HOST, term: Term(1), nonce: granted_before.nonce, verdict: LeaseVerdict::Granted(RULES) };
    assert_eq!(holder.on(HolderEvent::Answer(late), at(2_400)), []);
    let asked = holder.request(at(2_500));
    let late = LeaseAnswer { nonce: asked.nonce, ..late };
    assert_eq!(holder.on(HolderEvent::Answer(late), at(2_600)), []);
    for (from, wrong) in [(Owner::Standby(HOST), end(1)), (Owner::Host, end(0)), (Owner::Host, end(2))] {
        assert_eq!(grantor.on(GrantorEvent::Released { from, end: wrong }, at(2_400)), []);
    }
    let moved = grantor.on(GrantorEvent::Released { from: Owner::Host, end: end(1) }, at(2_400));
    assert!(matches!(moved[1], GrantorAction::Owned { owner: Owner::Box, term: Term(2), by: EndedBy::Release }));
    let (_, heard) = round(&mut holder, &mut grantor, at(3_000));
    assert_eq!(heard, [HolderAction::Persist(HolderRecord { fenced: true, term: Term(2) })]);
    assert!(matches!(holder.state(), HolderState::Down { why: StopReason::NotOwner { owner: Owner::Box }, .. }));
}

#[test]
fn failback_gives_the_host_a_term_of_its_own() {
    let (mut holder, mut grantor) = leased();
    grantor.begin_move(Owner::Box, None).unwrap();
    round(&mut holder, &mut grantor, at(2_000));
    done(&mut holder, at(2_100));
    grantor.on(GrantorEvent::Released { from: Owner::Host, end: end(1) }, at(2_100));
    grantor.begin_move(Owner::Host, Some(RULES)).unwrap();
    round(&mut holder, &mut grantor, at(3_000));
    assert!(matches!(holder.state(), HolderState::Down { .. }), "the box still serves");
    grantor.on(GrantorEvent::BoxStopped, at(4_000));
    let (_, heard) = round(&mut holder, &mut grantor, at(5_000));
    let until = Until::At { stop: at(12_000), end: at(15_000) };
    assert_eq!(
        heard,
        [
            HolderAction::Persist(HolderRecord { fenced: true, term: Term(3) }),
            HolderAction::Remember(Some(RunRecord::Leased { stop: at(12_000), end: at(15_000), raised: false })),
            HolderAction::Raise { until, order: 2 },
        ]
    );
    done(&mut holder, at(6_000));
    assert_eq!(holder.state(), HolderState::Serving { until });
}

#[test]
fn a_fenced_host_boots_down_and_a_restarted_agent_stops_nothing() {
    let fenced = HolderRecord { fenced: true, term: Term(4) };
    let (holder, actions) = Holder::new(HOST, fenced, None, 7, 3_000, at(0));
    assert_eq!(actions, [HolderAction::Stop { by: at(3_000), order: 1, why: StopReason::Booted }]);
    assert_eq!(holder.holding(), Holding::Stopping);
    let run = |raised| Some(RunRecord::Leased { stop: at(500), end: at(3_500), raised });
    let (holder, actions) = Holder::new(HOST, fenced, run(true), 7, 3_000, at(0));
    assert_eq!((holder.holding(), actions), (Holding::Serving, vec![]));
    let (holder, actions) = Holder::new(HOST, fenced, run(false), 7, 3_000, at(0));
    assert_eq!((holder.holding(), actions.len()), (Holding::Raising, 2), "half raised: once more");
    let (holder, actions) = Holder::new(HOST, fenced, run(true), 7, 3_000, at(500));
    assert_eq!((holder.holding(), actions.len()), (Holding::Stopping, 1), "it ran out while there was no agent");
    let (holder, actions) = Holder::new(HOST, HolderRecord::UNFENCED, None, 7, 3_000, at(0));
    assert_eq!((holder.holding(), actions), (Holding::Unfenced, vec![]));
}

#[test]
fn an_answer_to_an_earlier_life_counts_for_nothing() {
    let (mut holder, mut grantor) = leased();
    let request = holder.request(at(1_500));
    let said = grantor.on(GrantorEvent::Request { from: Owner::Host, request }, at(1_500));
    let [GrantorAction::Answer { answer, .. }] = said[..] else { panic!("{said:?}") };
    let (mut reborn, _) = Holder::new(HOST, holder.record(), None, 90_000, 3_000, at(1_600));
    done(&mut reborn, at(1_700));
    for verdict in [answer.verdict, LeaseVerdict::Standing, LeaseVerdict::Arm(RULES)] {
        assert_eq!(reborn.on(HolderEvent::Answer(LeaseAnswer { verdict, ..answer }), at(1_800)), [], "{verdict:?}");
    }
}

#[test]
fn maintenance_of_the_box_takes_the_lease_away_and_gives_it_back() {
    let (mut holder, mut grantor) = leased();
    grantor.disarm().unwrap();
    let (_, heard) = round(&mut holder, &mut grantor, at(2_000));
    assert_eq!(heard[0], HolderAction::Persist(HolderRecord { fenced: false, term: Term(2) }));
    assert_eq!(holder.on(HolderEvent::Tick, at(99_000_000)), []);
    // Armed again, with an answer of before on its way.
    let request = holder.request(at(99_000_000));
    let said = grantor.on(GrantorEvent::Request { from: Owner::Host, request }, at(99_000_000));
    let [GrantorAction::Answer { answer: standing, .. }] = said[..] else { panic!("{said:?}") };
    grantor.arm(RULES).unwrap();
    round(&mut holder, &mut grantor, at(99_001_000));
    round(&mut holder, &mut grantor, at(99_002_000));
    assert!(grantor.can_expire());
    assert_eq!(holder.on(HolderEvent::Answer(standing), at(99_003_000)), []);
    assert_eq!(holder.holding(), Holding::Serving);
}

#[test]
fn an_abandoned_move_leaves_the_host_its_own_in_a_new_term() {
    let (mut holder, mut grantor) = leased();
    grantor.begin_move(Owner::Box, None).unwrap();
    round(&mut holder, &mut grantor, at(2_000));
    done(&mut holder, at(2_100));
    grantor.abandon().unwrap();
    // The release comes too late to give anything away.
    assert_eq!(grantor.on(GrantorEvent::Released { from: Owner::Host, end: end(1) }, at(2_200)), []);
    for ms in [3_000, 4_000] {
        round(&mut holder, &mut grantor, at(ms));
    }
    assert_eq!(holder.holding(), Holding::Raising);
    assert_eq!((grantor.record().owner, grantor.record().term), (Owner::Host, Term(2)));
}

#[test]
fn who_serves_by_hand_is_not_taken_for_silent() {
    let (mut holder, mut grantor) = leased();
    assert_eq!(holder.by_hand(), Err(ByHandError::Serves));
    holder.on(HolderEvent::Tick, at(8_000));
    assert_eq!(holder.by_hand(), Err(ByHandError::Stopping));
    done(&mut holder, at(8_100));
    let actions = holder.by_hand().unwrap();
    assert!(matches!(actions[1], HolderAction::Raise { until: Until::Forever, .. }), "{actions:?}");
    assert_eq!(holder.on(HolderEvent::Tick, at(99_000)), []);
    assert!(grantor.can_expire());
    let request = holder.request(at(100_000));
    grantor.on(GrantorEvent::Request { from: Owner::Host, request }, at(100_000));
    assert!(!grantor.can_expire(), "until it has stored a lease again");
    for ms in [101_000, 102_000] {
        round(&mut holder, &mut grantor, at(ms));
    }
    assert!(grantor.can_expire());
    assert_eq!(holder.holding(), Holding::Serving);
}

#[test]
fn a_box_that_lost_its_record_grants_nothing_until_somebody_says_who_owns() {
    let (mut holder, _) = leased();
    let mut forgot = boxed();
    let (said, heard) = round(&mut holder, &mut forgot, at(2_000));
    assert_eq!(said, [GrantorAction::Behind { from: Owner::Host, theirs: Term(1) }]);
    assert_eq!(heard, []);
    forgot.adopt(Owner::Host);
    assert_eq!(forgot.record().term, Term(2));
    round(&mut holder, &mut forgot, at(3_000));
    assert_eq!(holder.holding(), Holding::Unfenced);
    let absurd = LeaseRequest { whose: HOST, term: Term::MAX, nonce: 1, holding: Holding::Down };
    assert_eq!(forgot.on(GrantorEvent::Request { from: Owner::Host, request: absurd }, at(4_000)), []);
}

#[test]
fn changes_that_make_no_sense_are_refused_by_name() {
    let mut grantor = boxed();
    let standby = Owner::Standby(HostId([9; 16]));
    assert_eq!(grantor.begin_move(Owner::Host, None), Err(ChangeError::OwnsAlready { owner: Owner::Host }));
    assert_eq!(grantor.begin_move(standby, None), Err(ChangeError::StandbyNeedsRules));
    assert_eq!(grantor.abandon(), Err(ChangeError::NotMoving));
    assert!(matches!(grantor.arm(LeaseRules { lease_ms: 1, stop_ms: 1 }), Err(ChangeError::Rules(_))));
    grantor.begin_move(standby, Some(RULES)).unwrap();
    assert_eq!(grantor.arm(RULES), Err(ChangeError::Moving { to: standby }));
    grantor.on(GrantorEvent::FencedByPower, at(1));
    assert_eq!(grantor.record().owner, standby);
    assert_eq!(grantor.disarm(), Err(ChangeError::StandbyNeedsRules));
    let bad = OwnershipRecord {
        hold: Hold::Leased { rules: LeaseRules { lease_ms: u64::MAX, stop_ms: 0 } },
        ..grantor.record()
    };
    assert!(Grantor::new(bad, at(0)).is_err(), "a damaged record is refused, not computed with");
}

#[test]
fn whatever_is_said_nothing_panics_and_terms_never_go_back() {
    for seed in 1..300 {
        let mut rng = Rng::new(seed);
        let record = HolderRecord { fenced: rng.below(2) == 0, term: Term(rng.below(4)) };
        let (mut holder, _) = Holder::new(HOST, record, None, rng.below(5), rng.below(9_000), at(0));
        let mut grantor = boxed();
        let mut now = at(0);
        let (mut low, mut low_box) = (record.term, Term(0));
        for _ in 0..200 {
            now = now.plus_ms(rng.below(3_000));
            let rules =
                [RULES, LeaseRules { lease_ms: u64::MAX, stop_ms: u64::MAX }, LeaseRules { lease_ms: 0, stop_ms: 9 }]
                    [rng.below(3) as usize];
            let term = Term([rng.below(8), u64::MAX][(rng.below(50) == 0) as usize]);
            let whose = if rng.below(9) == 0 { HostId([3; 16]) } else { HOST };
            let verdict = [
                LeaseVerdict::Granted(rules),
                LeaseVerdict::Standing,
                LeaseVerdict::Arm(rules),
                LeaseVerdict::NotYours { owner: Owner::Box },
            ][rng.below(4) as usize];
            let nonce = holder.request(now).nonce.wrapping_sub(rng.below(3));
            let order = rng.below(9);
            let event = [
                HolderEvent::Answer(LeaseAnswer { whose, term, nonce, verdict }),
                HolderEvent::Revoke(LeaseEnd { whose, term }),
                HolderEvent::Raised { order },
                HolderEvent::RaiseFailed { order },
                HolderEvent::Stopped { order },
                HolderEvent::Tick,
            ][rng.below(6) as usize];
            holder.on(event, now);
            let _ = holder.by_hand();
            assert!(holder.record().term >= low, "seed {seed}");
            low = holder.record().term;
            let holding = [Holding::Unfenced, Holding::Down, Holding::Serving, Holding::ByHand][rng.below(4) as usize];
            let from = [Owner::Host, Owner::Box, Owner::Standby(HOST)][rng.below(3) as usize];
            let event = [
                GrantorEvent::Request { from, request: LeaseRequest { whose, term, nonce, holding } },
                GrantorEvent::Released { from, end: LeaseEnd { whose, term } },
                GrantorEvent::BoxStopped,
                GrantorEvent::FencedByPower,
                GrantorEvent::Tick,
            ][rng.below(5) as usize];
            grantor.on(event, now);
            let _ = [grantor.arm(rules), grantor.disarm(), grantor.begin_move(from, Some(rules)), grantor.abandon()];
            assert!(grantor.record().term >= low_box, "seed {seed}");
            low_box = grantor.record().term;
        }
    }
}
