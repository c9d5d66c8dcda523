//! Plans and runs over the control API: what is refused before anything is touched, and runs whose daemon is killed at any step. What a
//! machine with a system in it does is tested on whole hosts (`hw-tests/tests/takeover.rs`).

use crate::{
    ingest::{History, change},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
};
use nbd::client::Client;
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

pub const SIZE: u64 = 8 << 20;

pub fn plan(groups: &str, memory_mib: u64, more: &str) -> String {
    format!(
        "groups = [\"{groups}\"]\n[machine]\ncpus = 1\nmemory_mib = {memory_mib}\nboot_seconds_max = 2\nshutdown_seconds_max = 1\n{more}"
    )
}

fn drill(control: &impl Control, plan: &str) -> Value {
    control.ok("POST", "runs", &json!({ "plan": plan, "kind": "drill", "hold": true }).to_string())
}

/// A run when it neither works nor ends.
pub fn settled(control: &impl Control, id: &str) -> Value {
    wait_for("the run to settle", || {
        let run = control.get(&format!("runs/{id}"));
        assert!(run["stuck"].is_null(), "{run}");
        matches!(run["phase"]["is"].as_str(), Some("serving" | "failed" | "ended")).then_some(run)
    })
}

/// What a test that fails leaves running.
pub struct EndMachines(pub PathBuf);

impl Drop for EndMachines {
    fn drop(&mut self) {
        for run in fs::read_dir(self.0.join("takeovers")).into_iter().flatten().flatten() {
            if let Ok(pid) = fs::read_to_string(run.path().join("pid")) {
                let _ = std::process::Command::new("kill").args(["-KILL", pid.trim()]).status();
            }
        }
    }
}

/// Ends a takeover for good.
pub fn end(control: &impl Control, id: &str) {
    control.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "p" }).to_string());
    wait_for("the run to end", || (control.get(&format!("runs/{id}"))["phase"]["is"] == "ended").then_some(()));
}

fn failed_step(run: &Value) -> &Value {
    let steps = run["steps"].as_array().expect("steps");
    steps.iter().find(|s| s["outcome"]["is"] == "failed").unwrap_or_else(|| panic!("nothing failed: {run}"))
}

/// A disk whose boot sector waits for ever, and what is written behind it.
pub fn make_vm(control: &impl Control, rng: &mut Rng) -> Vec<u8> {
    let made = control.make_group("vm", &[("root", SIZE)]);
    let export = made["exports"][0]["export_name"].as_str().expect("an export").to_owned();
    let mut client = control.ingest(&export);
    let mut history = History::fresh();
    for _ in 0..30 {
        change(&mut client, rng, &mut history).expect("written");
    }
    let sector = write_boot_sector(&mut client, &WAIT_FOR_EVER);
    let mut image = history.image_at(u64::MAX, SIZE);
    image[..512].copy_from_slice(&sector);
    image
}

/// cli; hlt; jmp back to the hlt
const WAIT_FOR_EVER: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// xor ah, ah; int 0x16 (wait for a key); mov dx, 0x604; mov ax, 0x2000; out dx, ax (ACPI: off)
const OFF_AT_A_KEY: [u8; 15] =
    [0x30, 0xe4, 0xcd, 0x16, 0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xfa, 0xf4, 0xeb, 0xfd];

fn write_boot_sector(client: &mut Client<UnixStream>, code: &[u8]) -> Vec<u8> {
    let mut sector = code.to_vec();
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    client.write(0, &sector, true).expect("the boot sector");
    sector
}

pub fn machine_runs(data: &Path, id: &str) -> bool {
    let pid = fs::read_to_string(data.join("takeovers").join(id).join("pid")).unwrap_or_default();
    !pid.trim().is_empty() && Path::new("/proc").join(pid.trim()).join("exe").exists()
}

#[test]
fn plans_are_checked_whole_and_kept_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let inside = Inside::start(&data, "");
    let (status, example) = inside.call("GET", "plan-example", "");
    assert_eq!(status, 200);
    inside.ok("PUT", "plans/db1", &example);
    assert_eq!(inside.call("GET", "plans/db1", "").1, example);
    let (status, refused) =
        inside.json("PUT", "plans/db1", &plan("a", 1, "[[application]]\nname = \"\"\ncheck = \"x\"\n"));
    assert_eq!((status, refused["error"]["code"].as_str()), (400, Some("bad-plan")), "{refused}");
    let text = refused["error"]["message"].as_str().expect("a message");
    assert!(text.contains("line 4:") && text.contains("line 8:"), "{text}");
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
    let _end = EndMachines(data.clone());
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
    let _end = EndMachines(data.clone());
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

pub fn pid_of(data: &Path, id: &str) -> String {
    fs::read_to_string(data.join("takeovers").join(id).join("pid")).expect("a machine").trim().to_owned()
}

fn kill_machine(data: &Path, id: &str) {
    let done = std::process::Command::new("kill").args(["-KILL", &pid_of(data, id)]).status().expect("kill");
    assert!(done.success());
}

#[test]
fn a_machine_that_ends_by_itself_is_started_again_but_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(7);
    let mut running = Outside::start(&data);
    make_vm(&running, &mut rng);
    running.ok("PUT", "plans/p", &plan("vm", 64, "agent = false\nrestarts_max = 2\n"));
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = running.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    let run = settled(&running, &id);
    assert_eq!(run["phase"]["is"], "serving", "{run}");
    let restarts = |control: &Outside| control.get(&format!("runs/{id}"))["restarts_us"].as_array().map_or(0, Vec::len);
    // Once under the daemon, once with it, as when the box loses its power.
    kill_machine(&data, &id);
    wait_for("the first restart", || (restarts(&running) == 1).then_some(()));
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    let before = pid_of(&data, &id);
    running.kill();
    kill_machine(&data, &id);
    running = Outside::start(&data);
    wait_for("the second restart", || (restarts(&running) == 2).then_some(()));
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    assert_ne!(pid_of(&data, &id), before, "another machine");
    kill_machine(&data, &id);
    let run = wait_for("it to be given up", || {
        let run = running.get(&format!("runs/{id}"));
        (run["phase"]["is"] == "failed").then_some(run)
    });
    let text = failed_step(&run)["outcome"]["text"].as_str().expect("a reason");
    assert!(text.contains("3 times within the hour"), "{text}");
    assert_eq!(running.get("groups").as_array().map(Vec::len), Some(2), "its disks are kept");
    // By hand it goes on, when somebody says once more that the host is off.
    running.ok("POST", &format!("runs/{id}/again"), "{}");
    let run = settled(&running, &id);
    assert_eq!(run["phase"], json!({ "is": "failed", "step": "fence" }), "the word of then is not one of now: {run}");
    running.ok("POST", &format!("runs/{id}/again"), "{\"source_is_off\":\"me\"}");
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    assert!(machine_runs(&data, &id));
    for (what, body) in [("promote", json!({ "confirm": "p" })), ("commit", json!({})), ("rollback", json!({}))] {
        assert_eq!(running.refused("POST", &format!("runs/{id}/{what}"), &body.to_string()), "not-now", "{what}");
    }
    end(&running, &id);
    running.terminate();
}

/// Types at a machine's keyboard.
fn press_a_key(data: &Path, id: &str) {
    let mut qmp = UnixStream::connect(data.join("takeovers").join(id).join("qmp")).expect("the control socket");
    let mut lines = BufReader::new(qmp.try_clone().expect("a handle")).lines();
    lines.next().expect("a greeting").expect("read");
    for command in [
        json!({ "execute": "qmp_capabilities" }),
        json!({ "execute": "send-key", "arguments": { "keys": [{ "type": "qcode", "data": "spc" }] } }),
    ] {
        qmp.write_all(format!("{command}\n").as_bytes()).expect("said");
        let answer = lines.find(|line| line.as_ref().is_ok_and(|l| l.contains("\"return\"")));
        answer.expect("an answer").expect("read");
    }
}

#[test]
fn a_machine_that_is_shut_down_from_inside_stays_off_until_somebody_starts_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let running = Outside::start(&data);
    let made = running.make_group("vm", &[("root", SIZE)]);
    let export = made["exports"][0]["export_name"].as_str().expect("an export").to_owned();
    write_boot_sector(&mut running.ingest(&export), &OFF_AT_A_KEY);
    running.ok("PUT", "plans/p", &plan("vm", 64, "agent = false\n"));
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = running.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    // Keys typed before its firmware reads them are lost.
    let run = wait_for("the machine to be off", || {
        press_a_key(&data, &id);
        let run = running.get(&format!("runs/{id}"));
        (run["phase"]["is"] == "failed").then_some(run)
    });
    let text = failed_step(&run)["outcome"]["text"].as_str().expect("a reason");
    assert!(text.contains("shut down from inside"), "{text}");
    assert_eq!(run["restarts_us"], json!([]), "nobody wanted it started again");
    running.ok("POST", &format!("runs/{id}/again"), "{\"source_is_off\":\"me\"}");
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    end(&running, &id);
    running.terminate();
}

#[test]
fn a_drill_is_begun_when_it_is_due_and_gives_way_to_a_takeover() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(10);
    let running = Outside::start(&data);
    make_vm(&running, &mut rng);
    running.ok("PUT", "plans/p", &plan("vm", 64, "agent = false\n[drill]\nevery_hours = 24\n"));
    // Not due: it was written now. Written two days ago, it is.
    let written = std::time::SystemTime::now() - Duration::from_secs(2 * 86_400);
    fs::File::options().write(true).open(data.join("plans/p.toml")).unwrap().set_modified(written).unwrap();
    let drill = wait_for("the drill", || {
        let runs = running.get("runs");
        let run = runs.as_array()?.first()?.clone();
        (run["phase"]["is"] == "ended").then_some(run)
    });
    assert_eq!((drill["kind"].as_str(), drill["phase"]["how"].as_str()), (Some("drill"), Some("discarded")), "{drill}");
    // The next one is due a day later; and one that goes on ends when a takeover begins.
    running.ok("PUT", "plans/slow", &plan("vm", 64, "").replace("boot_seconds_max = 2", "boot_seconds_max = 3000"));
    let slow = running.ok("POST", "runs", &json!({ "plan": "slow", "kind": "drill" }).to_string());
    let slow = slow["id"].as_str().expect("an id");
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = running.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    wait_for("the drill to give way", || {
        (running.get(&format!("runs/{slow}"))["phase"]["is"] == "ended").then_some(())
    });
    assert_eq!(running.get("runs").as_array().map(Vec::len), Some(3), "one drill was due, once");
    end(&running, &id);
    running.terminate();
}

#[test]
fn a_held_drill_is_promoted_with_what_was_written_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(8);
    let running = Outside::start(&data);
    make_vm(&running, &mut rng);
    running.ok("PUT", "plans/p", &plan("vm", 64, "agent = false\n"));
    let id = drill(&running, "p")["id"].as_str().expect("an id").to_owned();
    let held = settled(&running, &id);
    assert_eq!(
        (held["phase"]["is"].as_str(), held["authority"].as_str()),
        (Some("serving"), Some("the host")),
        "{held}"
    );
    let branch = held["points"][0]["branch"].as_str().expect("a branch").to_owned();
    // As its machine would.
    let export = held["machine"]["disks"][0]["export"].as_str().expect("an export").to_owned();
    let before = pid_of(&data, &id);
    let mut client = running.ingest(&export);
    client.write(1 << 20, &[0x5a; 4096], true).expect("written in the drill");
    drop(client);

    let promote = |body: Value| running.refused("POST", &format!("runs/{id}/promote"), &body.to_string());
    assert_eq!(promote(json!({ "source_is_off": "me" })), "confirm-needed");
    assert_eq!(promote(json!({ "confirm": "p" })), "not-now", "nothing shows that the host is off");
    assert_eq!(pid_of(&data, &id), before, "nothing was touched");
    running.ok("POST", &format!("runs/{id}/promote"), &json!({ "confirm": "p", "source_is_off": "me" }).to_string());
    let run = settled(&running, &id);
    assert_eq!((run["phase"]["is"].as_str(), run["kind"].as_str()), (Some("serving"), Some("failover")), "{run}");
    assert_eq!(run["authority"], "the machine on this box");
    assert_eq!(run["points"], held["points"], "the same moment and the same disks");
    assert_ne!(pid_of(&data, &id), before, "a machine with a way out took the place of the drill's");
    let view = running.view(&branch, "\"latest\"");
    assert_eq!(view.volumes[0][1 << 20..][..4096], [0x5a; 4096], "what was written in the drill");
    running.close_view(&view);
    end(&running, &id);
    running.terminate();
}

#[test]
fn of_two_plans_for_the_same_disks_one_is_carried_out_whatever_they_call_them() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let running = Outside::start(&data);
    make_vm(&running, &mut Rng::new(11));
    running.make_group("other", &[("root", SIZE)]);
    let quiet = "agent = false\n";
    running.ok("PUT", "plans/p", &plan("vm", 64, quiet));
    running.ok("PUT", "plans/q", &plan("other\", \"vm", 64, quiet));
    // Two held drills of the same disks, of which one is promoted.
    let [one, two] = ["p", "q"].map(|name| drill(&running, name)["id"].as_str().expect("an id").to_owned());
    for id in [&one, &two] {
        assert_eq!(settled(&running, id)["phase"]["is"], "serving");
    }
    let body = |confirm: &str| json!({ "confirm": confirm, "source_is_off": "me" }).to_string();
    running.ok("POST", &format!("runs/{one}/promote"), &body("p"));
    assert_eq!(running.refused("POST", &format!("runs/{two}/promote"), &body("q")), "already");
    assert_eq!(settled(&running, &one)["phase"]["is"], "serving");
    assert_eq!(running.refused("POST", &format!("runs/{two}/promote"), &body("q")), "already");
    let takeover = |plan: &str| json!({ "plan": plan, "kind": "failover", "source_is_off": "me" }).to_string();
    assert_eq!(running.refused("POST", "runs", &takeover("q")), "already");
    // Nor is a machine of ours run beside itself, on the disks that it has.
    let branch = running.get(&format!("runs/{one}"))["points"][0]["branch_name"].as_str().expect("a name").to_owned();
    running.ok("PUT", "plans/beside", &plan(&branch, 64, quiet));
    let beside = running.ok("POST", "runs", &takeover("beside"))["id"].as_str().expect("an id").to_owned();
    let run = settled(&running, &beside);
    assert_eq!(run["phase"]["how"], "refused", "{run}");
    let text = failed_step(&run)["outcome"]["text"].as_str().expect("a reason");
    assert!(text.contains(&format!("the machine of run {one} has its disks")), "{text}");
    // A drill of what it wrote so far is nobody's second.
    let apart = drill(&running, "beside")["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &apart)["phase"]["is"], "serving");
    for drill in [&apart, &two] {
        running.ok("POST", &format!("runs/{drill}/end"), "{}");
        wait_for("the drill to end", || {
            (running.get(&format!("runs/{drill}"))["phase"]["is"] == "ended").then_some(())
        });
    }
    end(&running, &one);
    // Its disks are free again.
    let id = running.ok("POST", "runs", &takeover("q"))["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    running.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "q" }).to_string());
    wait_for("the end", || (running.get(&format!("runs/{id}"))["phase"]["is"] == "ended").then_some(()));
    running.terminate();
}

#[test]
fn a_drill_whose_plan_was_changed_since_is_not_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let running = Outside::start(&data);
    make_vm(&running, &mut Rng::new(12));
    running.ok("PUT", "plans/p", &plan("vm", 64, "agent = false\n"));
    let id = drill(&running, "p")["id"].as_str().expect("an id").to_owned();
    assert_eq!(settled(&running, &id)["phase"]["is"], "serving");
    let before = pid_of(&data, &id);
    running.ok("PUT", "plans/p", &plan("vm", 96, "agent = false\n"));
    let body = json!({ "confirm": "p", "source_is_off": "me" }).to_string();
    let (status, answer) = running.json("POST", &format!("runs/{id}/promote"), &body);
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("not-now")), "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains("its plan was changed")), "{answer}");
    assert_eq!(pid_of(&data, &id), before, "nothing was touched");
    running.ok("POST", &format!("runs/{id}/end"), "{}");
    wait_for("the drill to end", || (running.get(&format!("runs/{id}"))["phase"]["is"] == "ended").then_some(()));
    running.terminate();
}
