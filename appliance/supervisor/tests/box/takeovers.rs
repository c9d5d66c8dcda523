//! Plans and runs over the control API: what is refused before anything is touched, and runs whose daemon is killed at any step. What a
//! machine with a system in it does is tested on whole hosts (`hw-tests/tests/takeover.rs`).

use crate::{
    ingest::{History, change},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
};
use serde_json::{Value, json};
use std::{fs, path::Path, time::Duration};

const SIZE: u64 = 8 << 20;

fn plan(groups: &str, memory_mib: u64, more: &str) -> String {
    format!("groups = [\"{groups}\"]\n[machine]\ncpus = 1\nmemory_mib = {memory_mib}\nboot_seconds_max = 2\n{more}")
}

fn drill(control: &impl Control, plan: &str) -> Value {
    control.ok("POST", "runs", &json!({ "plan": plan, "kind": "drill", "hold": true }).to_string())
}

/// A run when it neither works nor ends.
fn settled(control: &impl Control, id: &str) -> Value {
    wait_for("the run to settle", || {
        let run = control.get(&format!("runs/{id}"));
        assert!(run["stuck"].is_null(), "{run}");
        matches!(run["phase"]["is"].as_str(), Some("serving" | "failed" | "ended")).then_some(run)
    })
}

fn failed_step(run: &Value) -> &Value {
    let steps = run["steps"].as_array().expect("steps");
    steps.iter().find(|s| s["outcome"]["is"] == "failed").unwrap_or_else(|| panic!("nothing failed: {run}"))
}

/// A disk whose boot sector waits for ever, and what is written behind it.
fn make_vm(control: &impl Control, rng: &mut Rng) -> Vec<u8> {
    let made = control.make_group("vm", &[("root", SIZE)]);
    let export = made["exports"][0]["export_name"].as_str().expect("an export").to_owned();
    let mut client = control.ingest(&export);
    let mut history = History::fresh();
    for _ in 0..30 {
        change(&mut client, rng, &mut history).expect("written");
    }
    // cli; hlt; jmp back to the hlt
    let mut sector = vec![0xfa, 0xf4, 0xeb, 0xfd];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    client.write(0, &sector, true).expect("the boot sector");
    let mut image = history.image_at(u64::MAX, SIZE);
    image[..512].copy_from_slice(&sector);
    image
}

fn machine_runs(data: &Path, id: &str) -> bool {
    let pid = fs::read_to_string(data.join("takeovers").join(id).join("pid")).unwrap_or_default();
    !pid.trim().is_empty() && Path::new("/proc").join(pid.trim()).join("exe").exists()
}

#[test]
fn plans_are_checked_whole_and_kept_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let (status, example) = inside.call("GET", "plan-example", "");
    assert_eq!(status, 200);
    inside.ok("PUT", "plans/db1", &example);
    assert_eq!(inside.call("GET", "plans/db1", "").1, example);
    let (status, refused) =
        inside.json("PUT", "plans/db1", &plan("a", 1, "[[application]]\nname = \"\"\ncheck = \"x\"\n"));
    assert_eq!((status, refused["error"]["code"].as_str()), (400, Some("bad-plan")), "{refused}");
    let text = refused["error"]["message"].as_str().expect("a message");
    assert!(text.contains("line 4:") && text.contains("line 7:"), "{text}");
    assert_eq!(inside.call("GET", "plans/db1", "").1, example, "a refused plan replaces nothing");
    assert_eq!(inside.ok("PUT", "plans/x?check=1", &example)["kept"], false);
    assert_eq!(inside.refused("GET", "plans/x", ""), "no-such-plan");
    for name in [".hidden", "a%2Fb", "a%20b", "%2E%2E"] {
        assert_eq!(inside.refused("PUT", &format!("plans/{name}"), &example), "bad-request", "{name}");
    }
    fs::write(data.join("plans/broken.toml"), "host = ").unwrap();
    let list = inside.get("plans");
    let names: Vec<&str> = list.as_array().expect("a list").iter().filter_map(|p| p["name"].as_str()).collect();
    assert_eq!(names, ["broken", "db1"]);
    assert!(list[0]["fault"].as_str().expect("a fault").contains("line 1"), "{list}");
    inside.ok("DELETE", "plans/db1", "");
    assert_eq!(inside.refused("DELETE", "plans/db1", ""), "no-such-plan");
    inside.stop();
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let mut rng = Rng::new(5);
    make_vm(&inside, &mut rng);
    let try_plan = |text: &str, body: Value| {
        inside.ok("PUT", "plans/p", text);
        let begun = inside.ok("POST", "runs", &body.to_string());
        let run = settled(&inside, begun["id"].as_str().expect("an id"));
        assert_eq!(run["phase"], json!({ "is": "ended", "how": "refused" }), "{run}");
        let outcome = &failed_step(&run)["outcome"];
        assert!(!outcome["remedy"].as_str().expect("a remedy").is_empty(), "{run}");
        outcome["text"].as_str().expect("a reason").to_owned()
    };
    let wish = |kind: &str| json!({ "plan": "p", "kind": kind });
    let reason = try_plan(&plan("nobody", 64, ""), wish("drill"));
    assert!(reason.contains("no group \"nobody\""), "{reason}");
    let reason = try_plan(&plan("vm", 64, ""), wish("failover"));
    assert!(reason.contains("nothing shows that the host is off"), "{reason}");
    let reason = try_plan(&plan("vm", 4 << 20, "[degraded]\ncpus = 1\nmemory_mib = 4000000\n"), wish("drill"));
    assert!(reason.contains("4000000 MiB of memory are needed"), "{reason}");
    let network = "[[network]]\nmac = \"52:54:00:00:00:01\"\nbridge = \"nobridge0\"\n";
    let reason = try_plan(&plan("vm", 64, network), json!({ "plan": "p", "kind": "failover", "source_is_off": "me" }));
    assert!(reason.contains("no bridge \"nobridge0\""), "{reason}");
    let reason = try_plan(
        &plan("vm", 64, "[hooks]\nbefore = [\"/nonexistent/hook\"]\n"),
        json!({ "plan": "p", "kind": "failover", "source_is_off": "me" }),
    );
    assert!(reason.contains("/nonexistent/hook"), "{reason}");
    let slow = "[hooks]\nfence = [\"/bin/sh\", \"-c\", \"echo begun; sleep 300 & sleep 300\"]\nhook_seconds_max = 1\n";
    let reason = try_plan(&plan("vm", 64, slow), wish("failover"));
    assert!(reason.contains("did not end within 1 s"), "{reason}");
    let reason = try_plan(&plan("vm", 64, "[hooks]\nfence = [\"/bin/false\"]\n"), wish("failover"));
    assert!(reason.contains("/bin/false ended with"), "{reason}");
    // Said and not done.
    let said = inside.ok("POST", "runs", &json!({ "plan": "p", "kind": "failover", "dry_run": true }).to_string());
    let steps: Vec<&str> = said["steps"].as_array().expect("steps").iter().filter_map(|s| s["step"].as_str()).collect();
    assert_eq!(steps, ["check", "fence", "point", "branch", "machine", "start", "boot", "volumes", "picture"]);
    assert_eq!(inside.get("groups").as_array().map(Vec::len), Some(1), "nothing was made");
    assert_eq!(inside.refused("POST", "runs", &json!({ "plan": "q", "kind": "drill" }).to_string()), "no-such-plan");
    inside.stop();
}

#[test]
fn a_run_is_gone_on_with_whenever_its_box_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(6);
    let mut running = Outside::start(&data);
    let image = make_vm(&running, &mut rng);
    running.ok("PUT", "plans/p", &plan("vm", 64, ""));
    let id = drill(&running, "p")["id"].as_str().expect("an id").to_owned();
    for _ in 0..8 {
        // Wherever the run has come to by then: that is the point.
        std::thread::sleep(Duration::from_millis(rng.below(250)));
        running.kill();
        running = Outside::start(&data);
    }
    let run = settled(&running, &id);
    let text = failed_step(&run)["outcome"]["text"].as_str().expect("a reason").to_owned();
    assert_eq!(run["phase"], json!({ "is": "failed", "step": "boot" }), "{text}");
    assert!(text.contains("nothing inside has answered"), "{text}");
    let groups = running.get("groups");
    assert_eq!(groups.as_array().map(Vec::len), Some(2), "one branch, however often it was begun: {groups}");
    let picture = fs::read(data.join("takeovers").join(&id).join("screen.png")).expect("a picture of what failed");
    assert_eq!(picture[1..4], *b"PNG");
    assert!(machine_runs(&data, &id), "what failed stays to be looked at");
    // Ended, and its box killed on the way.
    running.ok("POST", &format!("runs/{id}/end"), "{}");
    running.kill();
    let running = Outside::start(&data);
    let over = wait_for("the run to end", || {
        let run = running.get(&format!("runs/{id}"));
        match run["phase"]["is"].as_str() {
            Some("ended") => Some(run),
            // Killed before its end was kept.
            Some("failed") => {
                running.ok("POST", &format!("runs/{id}/end"), "{}");
                None
            }
            _ => None,
        }
    });
    assert_eq!(over["phase"]["how"], "discarded", "{over}");
    assert!(!machine_runs(&data, &id), "its machine is gone");
    assert_eq!(running.get("groups").as_array().map(Vec::len), Some(1), "and its branch");
    wait_for("its record", || data.join("takeovers").join(&id).join("record.sig").exists().then_some(()));
    let view = running.view("vm", "\"latest\"");
    assert_same(&view.volumes[0], &image, "the group it was made of");
    running.close_view(&view);
    assert_eq!(running.refused("POST", &format!("runs/{id}/end"), "{}"), "run-over");
    running.terminate();
}
