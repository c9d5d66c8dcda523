//! The decision, case by case. Under faults of every kind it is simulated in `sim`.

use super::super::{Damping, UplinkRule};
use super::*;
use model::HostId;

fn at(ms: u64) -> MonoTime {
    MonoTime::from_ms(1_000_000 + ms)
}
fn automatic() -> Policy {
    Policy { automatic: true, ..Policy::default() }
}
const ALL: [Channel; 3] = [Channel::Stream, Channel::Beat, Channel::Icmp];

/// Heard each second on `channels` and the gateway from `from` to `to` (seconds), looked at each quarter of a second; the last decision.
fn live(detector: &mut Detector, channels: &[Channel], gateway: bool, from: u64, to: u64) -> Decision {
    let mut last = None;
    for quarter in from * 4..to * 4 {
        let now = at(quarter * 250);
        if quarter % 4 == 0 {
            channels.iter().for_each(|c| detector.heard(*c, now));
        }
        if gateway && quarter % 2 == 0 {
            detector.witness(Witness::Gateway, now);
        }
        last = Some(detector.decide(now));
    }
    last.unwrap()
}
/// From which second on silence leads to a takeover; none within `to`.
fn taken_over(detector: &mut Detector, gateway: bool, from: u64, to: u64) -> Option<u64> {
    (from * 4..to * 4).map(|quarter| quarter * 250).find(|ms| {
        if gateway && ms % 500 == 0 {
            detector.witness(Witness::Gateway, at(*ms));
        }
        matches!(detector.decide(at(*ms)).verdict, Verdict::Takeover(Cause::HostSilent))
    })
}

#[test]
fn a_dead_host_is_taken_over_within_six_seconds_and_the_reasons_are_printed() {
    let mut detector = Detector::new(automatic(), at(0)).unwrap();
    assert_eq!(live(&mut detector, &ALL, true, 0, 60).verdict, Verdict::Well);
    let last_beat = 59_000;
    let decided = taken_over(&mut detector, true, 60, 90).unwrap();
    assert!(decided - last_beat <= 6_000, "{} ms", decided - last_beat);
    let decision = detector.decide(at(decided));
    let text = decision.to_string();
    for said in [
        "takeover: the host is silent on every required channel",
        "for      the agent's connections: silent, 4 missed",
        "for      ping: silent",
        "for      uplink: the gateway answers",
    ] {
        assert!(text.contains(said), "{said:?} is not in\n{text}");
    }
}

#[test]
fn one_required_channel_that_shows_life_forbids_it() {
    for alive in ALL {
        let mut detector = Detector::new(automatic(), at(0)).unwrap();
        live(&mut detector, &ALL, true, 0, 20);
        for second in 20..200 {
            let decision = live(&mut detector, &[alive], true, second, second + 1);
            assert!(!matches!(decision.verdict, Verdict::Takeover(_)), "{alive}: {decision}");
        }
        let decision = live(&mut detector, &[alive], true, 200, 201);
        assert_eq!(decision.verdict, Verdict::Doubt(Doubt::ChannelsDisagree), "{decision}");
    }
    let mut policy = automatic();
    policy.channels[2].weight = Weight::Advisory;
    let mut detector = Detector::new(policy, at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    let decision = live(&mut detector, &[Channel::Icmp], true, 20, 30);
    assert!(matches!(decision.verdict, Verdict::Takeover(_)), "{decision}");
    assert!(decision.to_string().contains("against  ping: heard (since 0.7 s) (advisory)"), "{decision}");
}

#[test]
fn a_box_that_is_cut_off_itself_takes_nothing_over() {
    let mut detector = Detector::new(automatic(), at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    assert_eq!(taken_over(&mut detector, false, 20, 120), None);
    assert_eq!(detector.decide(at(120_000)).verdict, Verdict::Doubt(Doubt::UplinkUnproved));
    // The line is back: if the host is, it is heard; if it is not, it is taken over.
    let decided = taken_over(&mut detector, true, 121, 140).unwrap();
    assert!(decided >= 126_000, "its beats had no time to come: {decided}");
    // An answer of before the silence proves nothing.
    let mut detector = Detector::new(automatic(), at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    detector.witness(Witness::Gateway, at(22_000));
    assert_eq!(taken_over(&mut detector, false, 22, 30), None);
}

#[test]
fn other_hosts_prove_the_uplink_when_the_policy_says_so() {
    let uplink = UplinkRule { gateway: false, others_min: 2, fresh_ms: 3_000 };
    let mut detector = Detector::new(Policy { uplink, ..automatic() }, at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    let now = at(26_000);
    for half in 40..=52 {
        let now = at(half * 500);
        detector.witness(Witness::Gateway, now);
        detector.witness(Witness::Host(HostId([1; 16])), now);
        assert!(!matches!(detector.decide(now).verdict, Verdict::Takeover(_)));
    }
    assert_eq!(detector.decide(now).verdict, Verdict::Doubt(Doubt::UplinkUnproved));
    for half in 40..=52 {
        detector.witness(Witness::Peer("b".into()), at(half * 500));
    }
    assert_eq!(detector.decide(now).verdict, Verdict::Takeover(Cause::HostSilent));
}

#[test]
fn each_return_makes_silence_last_longer_and_a_dead_host_is_taken_over_all_the_same() {
    let policy = Policy { damping: Damping { window_ms: 600_000, hold_ms_max: 16_000 }, ..automatic() };
    let mut detector = Detector::new(policy, at(0)).unwrap();
    let (mut second, mut waits) = (0, Vec::new());
    for _ in 0..8 {
        live(&mut detector, &ALL, true, second, second + 30);
        let decided = taken_over(&mut detector, true, second + 30, second + 90).expect("in the end");
        waits.push(decided - (second + 29) * 1000);
        second += 90;
    }
    assert!(waits.windows(2).all(|w| w[0] <= w[1]), "{waits:?}");
    assert!(waits[0] <= 6_000 && waits[3] >= 12_000, "{waits:?}");
    assert!(waits.iter().all(|w| *w <= 5_000 + 16_000 + 1_000), "bounded: {waits:?}");
    let quiet = second + 700;
    live(&mut detector, &ALL, true, second, quiet);
    let decided = taken_over(&mut detector, true, quiet, quiet + 60).unwrap();
    assert!(decided - (quiet - 1) * 1000 <= 6_000, "forgotten after the window");
}

#[test]
fn what_was_never_heard_is_an_alarm_unless_the_policy_says_otherwise() {
    let mut detector = Detector::new(automatic(), at(0)).unwrap();
    assert_eq!(taken_over(&mut detector, true, 0, 200), None);
    assert_eq!(detector.decide(at(200_000)).verdict, Verdict::Doubt(Doubt::NeverHeard));
    let mut detector = Detector::new(Policy { unheard: true, ..automatic() }, at(0)).unwrap();
    let decided = taken_over(&mut detector, true, 0, 200).unwrap();
    assert!(decided > 60_000, "not within its grace: {decided}");
}

#[test]
fn without_automatic_it_is_only_said_and_the_button_needs_no_proof() {
    let mut detector = Detector::new(Policy::default(), at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    assert_eq!(live(&mut detector, &[], true, 20, 40).verdict, Verdict::Doubt(Doubt::NotAutomatic));
    live(&mut detector, &ALL, true, 40, 60);
    detector.button("alice", at(60_000));
    let decision = detector.decide(at(60_000));
    assert_eq!(decision.verdict, Verdict::Takeover(Cause::Manual { by: "alice".into() }));
    assert!(decision.to_string().contains("for      alice asked for it"), "{decision}");
    detector.settled();
    assert_eq!(detector.decide(at(60_100)).verdict, Verdict::Well);
}

#[test]
fn an_application_is_judged_by_fresh_results_that_could_be_made() {
    let rule =
        |name: &str, then| ProbeRule { name: name.into(), failures_min: 3, for_ms: 5_000, fresh_ms: 4_000, then };
    let policy = Policy { probes: vec![rule("db", ProbeThen::Takeover), rule("web", ProbeThen::Alarm)], ..automatic() };
    let mut detector = Detector::new(policy.clone(), at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 10);
    let fails = || ProbeSaid::Fails { why: "no answer".into() };
    let mut second = 10;
    let mut step = |detector: &mut Detector, name: &str, said: ProbeSaid| {
        detector.probe(name, said, at(second * 1000));
        let decision = live(detector, &ALL, true, second, second + 1);
        second += 1;
        decision
    };
    for _ in 0..5 {
        assert_eq!(step(&mut detector, "db", fails()).verdict, Verdict::Watching);
    }
    let decision = step(&mut detector, "db", fails());
    assert_eq!(decision.verdict, Verdict::Takeover(Cause::Application { probe: "db".into() }), "{decision}");
    assert!(decision.to_string().contains("probe \"db\" failed 6 times: no answer"), "{decision}");
    assert_eq!(step(&mut detector, "db", ProbeSaid::Works).verdict, Verdict::Well, "one success ends it");
    let broken = ProbeSaid::Broken { why: "no such user".into() };
    for _ in 0..20 {
        assert_eq!(step(&mut detector, "db", broken.clone()).verdict, Verdict::Doubt(Doubt::ProbeBroken));
    }
    step(&mut detector, "db", ProbeSaid::Works);
    for _ in 0..20 {
        step(&mut detector, "web", fails());
    }
    assert_eq!(step(&mut detector, "web", fails()).verdict, Verdict::Doubt(Doubt::ApplicationFails));
    step(&mut detector, "other", fails());
    let decision = live(&mut detector, &ALL, true, 100, 101);
    assert_eq!(decision.verdict, Verdict::Well, "old results say nothing: {decision}");
}

#[test]
fn policies_that_cannot_work_are_refused_with_a_remedy() {
    assert_eq!(automatic().check(), Ok(()));
    type Change = fn(&mut Policy);
    let cases: [(Change, &str); 6] = [
        (|p| p.channels.clear(), "name at least one"),
        (|p| p.uplink.gateway = false, "set `gateway = true`"),
        (|p| p.channels[1].channel = Channel::Stream, "listed twice"),
        (|p| p.channels[0].missed_max = 1, "missed_max is 1: it must be between 2 and 1000"),
        (|p| p.channels[0].period_ms = 0, "period_ms is 0"),
        (|p| p.damping.hold_ms_max = 1, "hold_ms_max is 1"),
    ];
    for (change, said) in cases {
        let mut policy = automatic();
        change(&mut policy);
        let error = policy.check().unwrap_err().to_string();
        assert!(error.contains(said), "{error:?} lacks {said:?}");
    }
}

#[test]
fn time_in_which_nobody_listened_is_not_held_against_the_host() {
    let mut detector = Detector::new(automatic(), at(0)).unwrap();
    live(&mut detector, &ALL, true, 0, 20);
    // Back after a pause: the gateway's answer is read before the beats that wait beside it.
    let back = at(60_000);
    detector.witness(Witness::Gateway, back);
    assert_eq!(detector.decide(back).verdict, Verdict::Well);
    ALL.iter().for_each(|c| detector.heard(*c, back.plus_ms(5)));
    assert_eq!(detector.decide(back.plus_ms(10)).verdict, Verdict::Well);
    let decided = taken_over(&mut detector, true, 61, 90).unwrap();
    assert!((65_000..=67_000).contains(&decided), "no return was counted, and silence counts from there: {decided}");
}
