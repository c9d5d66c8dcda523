//! What an agent says of its host: risks of its groups while it holds, and events.

use crate::agent::{Identity, open_stream};
use crate::support::{Control as _, Inside, wait_for};
use model::{GroupId, Sectors, SyncMode, VolumeId, VolumeSpec};
use supervisor::Event;
use wire::{Message, Notice, Purpose};

fn kinds(inside: &Inside, group: &str) -> Vec<String> {
    let risks = inside.group_state(group)["risks"].as_array().cloned().unwrap_or_default();
    risks.iter().filter_map(|r| r["kind"].as_str().map(str::to_owned)).collect()
}

#[test]
fn what_an_agent_says_of_its_host_is_a_risk_and_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let protect = |name: &str| {
        let token = inside.ok("POST", "tokens", "{}")["token"].as_str().unwrap().to_owned();
        let identity = Identity::enrol(inside.listen(), &token, name).unwrap();
        let mut control = identity.connect(inside.listen(), Purpose::Control).unwrap();
        let volume = VolumeSpec {
            id: VolumeId(0),
            name: "/dev/sdb".into(),
            sectors: Sectors(2048),
            identity: format!("serial:{name}"),
        };
        control.say(&Message::Protect { group_name: name.into(), volumes: vec![volume], mode: SyncMode::Async });
        let Message::Protected { spec } = control.hear().unwrap() else { panic!("not protected") };
        (identity, control, spec)
    };
    let (identity, mut control, spec) = protect("db");
    let (_, _other_control, other) = protect("web");
    let all = vec![
        Notice::UnknownWrites { group: spec.id, commands: 2 },
        Notice::CaptureReduced { group: spec.id, why: "the agent\u{7} takes 300 % of a processor".into() },
        Notice::HostThrottled { mib_s: 20, why: "x".repeat(100_000 / 2) },
        // Of a group that is another host's, and of none: nobody's risk.
        Notice::UnknownWrites { group: other.id, commands: 9 },
        Notice::CaptureReduced { group: GroupId([7; 16]), why: String::new() },
    ];
    control.say(&Message::Notices(all.clone()));
    let told = ["unknown-writes", "capture-reduced", "host-throttled"];
    wait_for("three risks", || {
        let kinds = kinds(&inside, "db");
        told.iter().all(|t| kinds.iter().any(|k| k == t)).then_some(())
    });
    let state = inside.group_state("db");
    let risk = |kind: &str| state["risks"].as_array().unwrap().iter().find(|r| r["kind"] == kind).unwrap().clone();
    assert_eq!(risk("unknown-writes")["commands"], 2);
    assert_eq!(risk("capture-reduced")["why"], "the agent takes 300 % of a processor");
    assert_eq!(risk("host-throttled")["why"].as_str().unwrap().len(), 300, "bounded");
    assert!(kinds(&inside, "web").iter().all(|k| !told.contains(&k.as_str())), "another host's");
    let events = || [Event::UnknownWrite, Event::CaptureReduced, Event::HostThrottled].map(|e| inside.events(e));
    let first = events();
    assert_eq!((first[0], first[2]), (2, 1));
    // Said again, with more: no new event. The connection ends: what holds still does.
    let mut more = all.clone();
    more[0] = Notice::UnknownWrites { group: spec.id, commands: 5 };
    control.say(&Message::Notices(more));
    wait_for("more", || {
        let state = inside.group_state("db");
        state["risks"].as_array().unwrap().iter().any(|r| r["commands"] == 5).then_some(())
    });
    assert_eq!(events(), first);
    drop(control);
    wait_for("gone", || (inside.events(Event::HostDisconnected) > 0).then_some(()));
    assert!(kinds(&inside, "db").iter().any(|k| k == "unknown-writes"));
    let mut control = identity.connect(inside.listen(), Purpose::Control).unwrap();
    control.say(&Message::Notices(vec![]));
    wait_for("over", || kinds(&inside, "db").iter().all(|k| !told.contains(&k.as_str())).then_some(()));
    assert_eq!(inside.events(Event::HostNoticeOver), 5);
    // Not on a stream's connection.
    let mut stream = identity.connect(inside.listen(), Purpose::Stream { group: spec.id }).unwrap();
    stream.say(&open_stream(spec.id, &spec.volumes));
    let _ready = stream.hear().unwrap();
    stream.say(&Message::Notices(vec![]));
    assert_eq!(stream.hear_refusal().code, wire::RefuseCode::OutOfPlace);
}
