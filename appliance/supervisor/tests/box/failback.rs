//! Failbacks over the control API: a takeover's machine, a restore target whose disk is in memory, and the box killed in between.

use crate::{
    ingest::{History, change},
    restores::{Machine, wait_target},
    support::{Control, Outside, Rng, assert_same, wait_for},
    takeovers::{EndMachines, SIZE, end, machine_runs, make_vm, pid_of, plan, settled},
};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// A takeover that serves; what its disk held at the moment it began at.
fn takeover(control: &impl Control, rng: &mut Rng, hooks: &str) -> (String, Vec<u8>) {
    let image = make_vm(control, rng);
    control.ok("PUT", "plans/p", &plan("vm", 64, &format!("agent = false\n{hooks}")));
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = control.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(control, &id)["phase"]["is"], "serving");
    (id, image)
}

pub fn state(control: &impl Control, id: &str) -> Value {
    control.get(&format!("runs/{id}"))
}

/// Writes to the machine's disk, as what runs in it would; all but the boot sector may change.
fn machine_writes(control: &impl Control, id: &str, rng: &mut Rng, boot: &[u8]) {
    let export = state(control, id)["machine"]["disks"][0]["export"].as_str().expect("an export").to_owned();
    let mut client = control.ingest(&export);
    let mut history = History::fresh();
    for _ in 0..40 {
        change(&mut client, rng, &mut history).expect("written");
    }
    client.write(0, &boot[..512], true).expect("the boot sector");
}

/// The whole of a group's only disk, now.
pub fn content(control: &impl Control, group: &str) -> Vec<u8> {
    let view = control.view(group, "\"latest\"");
    let content = view.volumes[0].clone();
    control.close_view(&view);
    content
}

pub fn phase(control: &impl Control, id: &str, wanted: &str) -> Value {
    wait_for(wanted, || {
        let run = state(control, id);
        assert!(run["stuck"].is_null(), "{run}");
        assert!(wanted != "returned" || run["failback"]["ended"].is_null(), "undone: {}", run["failback"]);
        (run["phase"]["is"] == wanted).then_some(run)
    })
}

pub fn begin_failback(control: &impl Control, id: &str) {
    let wish = json!({ "target": "metal", "by": "me", "commit_minutes": 5 });
    control.ok("POST", &format!("runs/{id}/failback"), &wish.to_string());
}

pub fn restarted(data: &Path, machine: &Machine) -> Outside {
    let running = Outside::start(data);
    machine.move_to(running.listen());
    running
}

#[test]
fn a_host_gets_back_what_the_machine_wrote_and_its_own_late_writes_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(81);
    let mut running = Outside::start(&data);
    let (id, image) = takeover(&running, &mut rng, "");
    machine_writes(&running, &id, &mut rng, &image);
    // The old host wrote on after the moment, and nobody heard of it.
    let mut old = image.clone();
    for at in [4096, 1 << 20, 5 << 20] {
        rng.fill(&mut old[at..at + 8192]);
    }
    let machine = Machine::start(&running, running.listen(), "metal", vec![old.clone()]);
    wait_target(&running, "metal");
    begin_failback(&running, &id);
    assert_eq!(running.refused("POST", &format!("runs/{id}/end"), &json!({ "confirm": "p" }).to_string()), "not-now");
    let restore = state(&running, &id)["failback"]["restore"].as_str().expect("an id").to_owned();
    for what in ["finish", "release", "cancel"] {
        assert_eq!(running.refused("POST", &format!("restores/{restore}/{what}"), "{}"), "of-a-failback", "{what}");
    }
    // The box dies while it ships, and once more whenever it likes.
    for _ in 0..2 {
        running.kill();
        running = restarted(&data, &machine);
    }
    let run = phase(&running, &id, "returned");
    assert!(run["failback"]["note"].is_null(), "{run}");
    assert!(!machine_runs(&data, &id), "two must not serve");
    assert!(machine.rebooted(), "the host starts from its own disks");
    assert_eq!(run["authority"], "the host");
    let branch = run["points"][0]["branch"].as_str().expect("a branch").to_owned();
    assert_same(&machine.disk(0), &content(&running, &branch), "the host's disk");
    let groups = running.get("groups");
    let groups = groups.as_array().expect("groups");
    let late = groups.iter().find(|g| g["name"].as_str().is_some_and(|n| n.starts_with("late writes of")));
    let late = late.expect("its late writes")["id"].as_str().expect("an id").to_owned();
    assert_same(&content(&running, &late), &old, "what the host's disk held");

    running.ok("POST", &format!("runs/{id}/commit"), &json!({ "by": "me" }).to_string());
    let over = phase(&running, &id, "ended");
    assert_eq!(over["phase"]["how"], "failed-back", "{over}");
    assert_eq!(over["failback"]["ended"], json!({ "is": "committed", "by": "me" }));
    assert_eq!(
        running.get("groups").as_array().map(Vec::len),
        Some(2),
        "the machine's branch is gone, the late writes are not"
    );
    assert_same(&content(&running, "vm"), &image, "the host's own history");
    drop(machine);
    running.terminate();
}

#[test]
fn what_goes_wrong_before_the_host_serves_is_undone_and_after_it_needs_proof() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(82);
    let running = Outside::start(&data);
    let (id, image) = takeover(&running, &mut rng, "");
    let pid = pid_of(&data, &id);
    // Nobody is there: the machine serves on.
    begin_failback(&running, &id);
    let run = wait_for("it to be undone", || {
        let run = state(&running, &id);
        (run["failback"]["ended"]["is"] == "rolled-back" && run["phase"]["is"] == "serving").then_some(run)
    });
    let why = run["failback"]["ended"]["why"].as_str().expect("a reason");
    assert!(why.contains("no restore target \"metal\"") && why.contains("holdfast-agent rescue"), "{why}");
    assert_eq!(pid_of(&data, &id), pid, "it was not touched");
    // Its disk does not fit, and nothing says which one is meant.
    let small = Machine::start(&running, running.listen(), "metal", vec![vec![0; SIZE as usize / 2]]);
    wait_target(&running, "metal");
    begin_failback(&running, &id);
    let run = wait_for("it to be undone again", || {
        let run = state(&running, &id);
        (run["phase"]["is"] == "serving" && run["failback"]["ended"]["why"] != json!(why)).then_some(run)
    });
    assert!(run["failback"]["ended"]["why"].as_str().is_some_and(|why| why.contains("--disk")), "{run}");
    assert!(small.disk(0).iter().all(|b| *b == 0), "nothing was written to it");
    drop(small);

    let metal = Machine::start(&running, running.listen(), "other", vec![vec![7; SIZE as usize]]);
    wait_target(&running, "other");
    let wish = json!({ "target": "other", "by": "me", "commit_minutes": 5 });
    running.ok("POST", &format!("runs/{id}/failback"), &wish.to_string());
    phase(&running, &id, "returned");
    let roll_back = |body: Value| running.call("POST", &format!("runs/{id}/rollback"), &body.to_string());
    assert_eq!(roll_back(json!({ "by": "me" })).0, 409, "nothing shows that the host is off");
    assert_eq!(roll_back(json!({ "by": "me", "source_is_off": "me" })).0, 200);
    let run = phase(&running, &id, "serving");
    assert_eq!(run["failback"]["ended"]["is"], "rolled-back", "{run}");
    assert_ne!(pid_of(&data, &id), pid, "another machine, on the same disks");
    let branch = run["points"][0]["branch"].as_str().expect("a branch");
    assert_same(&content(&running, branch), &image, "the machine's disk");
    end(&running, &id);
    drop(metal);
    running.terminate();
}

#[test]
fn nobody_content_in_time_is_a_way_back_where_the_host_can_be_proved_off() {
    for (hooks, goes_back) in [("[hooks]\nfence = [\"/bin/true\"]\n", true), ("", false)] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("d");
        let _end = EndMachines(data.clone());
        let mut rng = Rng::new(83);
        let running = Outside::start(&data);
        let (id, _) = takeover(&running, &mut rng, hooks);
        let machine = Machine::start(&running, running.listen(), "metal", vec![vec![7; SIZE as usize]]);
        wait_target(&running, "metal");
        begin_failback(&running, &id);
        phase(&running, &id, "returned");
        // The time is over while the box is off.
        running.kill();
        let file = data.join("takeovers").join(&id).join("state.json");
        let mut kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        kept["phase"]["until_us"] = json!(1);
        fs::write(&file, kept.to_string()).unwrap();
        let running = restarted(&data, &machine);
        if goes_back {
            let run = phase(&running, &id, "serving");
            assert_eq!(run["failback"]["ended"]["why"], "nobody was content in time", "{run}");
            end(&running, &id);
        } else {
            let run = wait_for("a person to be asked", || {
                let run = state(&running, &id);
                (!run["failback"]["note"].is_null()).then_some(run)
            });
            assert_eq!(run["phase"], json!({ "is": "returned", "until_us": null }), "{run}");
            assert!(!machine_runs(&data, &id), "the host may serve");
            running.ok("POST", &format!("runs/{id}/commit"), &json!({ "by": "me" }).to_string());
            phase(&running, &id, "ended");
        }
        drop(machine);
        running.terminate();
    }
}
