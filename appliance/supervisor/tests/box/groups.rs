//! Machines whose disks are in several groups: one moment of all of them, and all of them back.

use crate::{
    failback::{begin_failback, content, phase, restarted, state},
    restores::{Machine, wait_target},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
    takeovers::{EndMachines, end, machine_runs, make_vm, plan, settled},
};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Another size than the first group's disk: which one gets what must be plain.
const DATA_SIZE: u64 = 4 << 20;

/// What [`plan`] takes for one name.
const BOTH: &str = "vm\", \"data";

/// The second group of the machine; what its disk holds.
fn make_data(control: &impl Control, rng: &mut Rng) -> Vec<u8> {
    control.make_group("data", &[("data", DATA_SIZE)]);
    let mut image = vec![0; DATA_SIZE as usize];
    (0..10).for_each(|_| writes(control, "data-data", rng, &mut image));
    image
}

/// Somewhere behind the boot sector.
fn writes(control: &impl Control, export: &str, rng: &mut Rng, image: &mut [u8]) {
    let mut client = control.ingest(export);
    let mut bytes = vec![0; 20_480];
    rng.fill(&mut bytes);
    let at = 4096 + rng.below(image.len() as u64 / 4096 - 16) * 4096;
    client.write(at, &bytes, true).expect("written");
    image[at as usize..][..bytes.len()].copy_from_slice(&bytes);
}

/// A moment between what was written before and what comes.
fn moment() -> u64 {
    std::thread::sleep(Duration::from_millis(20));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_micros() as u64;
    std::thread::sleep(Duration::from_millis(20));
    now
}

fn bookmark(control: &impl Control, group: &str, name: &str) {
    control.ok("POST", &format!("groups/{group}/bookmarks"), &json!({ "name": name }).to_string());
}

/// Takes both over at a moment, to where nothing has to run, and looks what the disks of the two branches hold.
fn taken(control: &impl Control, at: Option<Value>) -> [Vec<u8>; 2] {
    let mut wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    if let Some(at) = at {
        wish["at"] = at;
    }
    let id = control.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    let run = wait_for("its disks", || {
        let run = state(control, &id);
        assert!(run["phase"]["is"] == "working", "{run}");
        run["now"].as_str().is_some_and(|now| now.contains("run serves")).then_some(run)
    });
    let branch = |at: usize| content(control, run["points"][at]["branch"].as_str().expect("a branch"));
    let disks = [branch(0), branch(1)];
    end(control, &id);
    disks
}

fn refused(control: &impl Control, at: Option<Value>) -> String {
    let mut wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    if let Some(at) = at {
        wish["at"] = at;
    }
    let id = control.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    let run = settled(control, &id);
    assert_eq!(run["phase"], json!({ "is": "ended", "how": "refused" }), "{run}");
    let steps = run["steps"].as_array().expect("steps");
    assert!(steps.iter().all(|s| s["step"] == "check"), "refused before anything was touched: {run}");
    steps[0]["outcome"]["text"].as_str().expect("a reason").to_owned()
}

#[test]
fn a_takeover_of_several_groups_is_at_one_moment_of_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let mut rng = Rng::new(111);
    let mut vm = make_vm(&inside, &mut rng);
    let mut data = make_data(&inside, &mut rng);
    bookmark(&inside, "vm", "both");
    bookmark(&inside, "data", "both");
    let both = [vm.clone(), data.clone()];
    let first = moment();
    writes(&inside, "vm-root", &mut rng, &mut vm);
    let second = moment();
    let at_second = [vm.clone(), data.clone()];
    writes(&inside, "data-data", &mut rng, &mut data);
    let third = moment();
    let at_third = [vm.clone(), data.clone()];
    writes(&inside, "vm-root", &mut rng, &mut vm);
    bookmark(&inside, "vm", "one");
    let newest = [vm.clone(), data.clone()];
    let last = moment();

    let text = format!("place = \"export\"\n{}", plan(BOTH, 64, ""));
    inside.ok("PUT", "plans/p", &text);
    for dry_run in [false, true] {
        let wish =
            json!({ "plan": "p", "kind": "failover", "at": { "lsn": 3 }, "source_is_off": "me", "dry_run": dry_run });
        assert_eq!(inside.refused("POST", "runs", &wish.to_string()), "several-groups");
    }
    let drill = json!({ "plan": "p", "kind": "drill", "at": { "lsn": 3 } });
    let (status, said) = inside.call("POST", "runs", &drill.to_string());
    assert_eq!(status, 400, "{said}");
    assert!(said.contains("2 groups: vm, data") && said.contains("give a time"), "{said}");
    assert_eq!(inside.get("runs"), json!([]), "nothing was begun");

    let same = |got: &[Vec<u8>; 2], want: &[Vec<u8>; 2], what: &str| {
        assert_same(&got[0], &want[0], format!("vm, {what}"));
        assert_same(&got[1], &want[1], format!("data, {what}"));
    };
    let time = |us: u64| Some(json!({ "time": us }));
    same(&taken(&inside, Some(json!({ "bookmark": "both" }))), &both, "the bookmark");
    same(&taken(&inside, time(first)), &both, "the first time");
    same(&taken(&inside, time(second)), &at_second, "a time when one had written and the other had not");
    same(&taken(&inside, time(third)), &at_third, "a time after the last write of one of them");
    same(&taken(&inside, time(last)), &newest, "a time after the last write of both");
    same(&taken(&inside, None), &newest, "the newest");
    let why = refused(&inside, Some(json!({ "bookmark": "one" })));
    assert!(why.contains("\"data\"") && why.contains("one"), "{why}");
    let why = refused(&inside, time(last + 3_600_000_000));
    assert!(why.contains("\"vm\""), "{why}");
    // By the plan's rule: the newest bookmark that both have, though one has a newer one.
    inside.ok("PUT", "plans/p", &format!("point = \"bookmark\"\n{text}"));
    same(&taken(&inside, None), &both, "the newest bookmark of both");
    inside.ok("DELETE", "groups/data/bookmarks/both", "");
    let why = refused(&inside, None);
    assert!(why.contains("no bookmark that each of these groups has: vm, data"), "{why}");
    inside.stop();
}

#[test]
fn a_failback_of_several_groups_brings_each_its_own_whenever_the_box_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d");
    let _end = EndMachines(path.clone());
    let mut rng = Rng::new(112);
    let mut running = Outside::start(&path);
    let vm = make_vm(&running, &mut rng);
    let data = make_data(&running, &mut rng);
    running.ok("PUT", "plans/p", &plan(BOTH, 64, "agent = false\n"));
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = running.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    // What runs there writes to both of its disks.
    let disks = state(&running, &id)["machine"]["disks"].clone();
    let mut want = [vm.clone(), data.clone()];
    for (at, image) in want.iter_mut().enumerate() {
        let export = disks[at]["export"].as_str().expect("an export");
        (0..20).for_each(|_| writes(&running, export, &mut rng, image));
    }
    // And the old host had, after the moment.
    let mut old = [vm.clone(), data.clone()];
    for image in &mut old {
        let to = 4096 * (1 + rng.below(image.len() as u64 / 4096 - 4));
        rng.fill(&mut image[to as usize..][..8192]);
    }
    let metal = Machine::start(&running, running.listen(), "metal", old.to_vec());
    wait_target(&running, "metal");
    begin_failback(&running, &id);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(rng.below(700)));
        running.kill();
        running = restarted(&path, &metal);
    }
    let run = phase(&running, &id, "returned");
    assert!(run["failback"]["note"].is_null(), "{run}");
    assert!(!machine_runs(&path, &id) && metal.rebooted(), "the host serves, and nobody else");
    let all = running.get("groups");
    let late = |of: &str| {
        let is = |g: &&Value| {
            g["name"].as_str().is_some_and(|n| n.starts_with("late writes of") && n.contains(&format!(", {of}")))
        };
        let found: Vec<&Value> = all.as_array().expect("groups").iter().filter(is).collect();
        assert_eq!(found.len(), 1, "late writes of {of}, however often they were begun: {all}");
        found[0]["id"].as_str().expect("an id").to_owned()
    };
    for (at, name) in ["vm", "data"].into_iter().enumerate() {
        assert_same(&metal.disk(at), &want[at], format!("the host's disk of {name}"));
        let branch = run["points"][at]["branch"].as_str().expect("a branch");
        assert_same(&content(&running, branch), &want[at], format!("the machine's disk of {name}"));
        assert_same(&content(&running, &late(name)), &old[at], format!("the late writes of {name}"));
    }
    running.ok("POST", &format!("runs/{id}/commit"), &json!({ "by": "me" }).to_string());
    assert_eq!(phase(&running, &id, "ended")["phase"]["how"], "failed-back");
    assert_eq!(
        running.get("groups").as_array().map(Vec::len),
        Some(4),
        "both branches are gone, the late writes are not"
    );
    assert_same(&content(&running, "vm"), &vm, "the history of vm");
    assert_same(&content(&running, "data"), &data, "the history of data");
    drop(metal);
    running.terminate();
}
