//! Hosts that go on at another hypervisor: disks that the box exports, the words it shows run in a real QEMU, the box killed while it waits.

use crate::{
    failback::{begin_failback, content, phase, restarted, state},
    ingest::{History, change},
    restores::{Machine, wait_target},
    support::{Control, Outside, Rng, assert_same, wait_for},
    takeovers::{end, make_vm, plan},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

fn place(more: &str) -> String {
    format!("place = \"export\"\n{}", plan("vm", 64, more))
}

/// A takeover whose disks are open.
fn opened(control: &impl Control, more: &str) -> String {
    control.ok("PUT", "plans/p", &place(more));
    let wish = json!({ "plan": "p", "kind": "failover", "source_is_off": "me" });
    let id = control.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    waits_for(control, &id, "run serves");
    id
}

fn waits_for(control: &impl Control, id: &str, what: &str) -> Value {
    wait_for(what, || {
        let run = state(control, id);
        assert!(run["stuck"].is_null(), "{run}");
        run["now"].as_str().is_some_and(|now| now.contains(what)).then_some(run)
    })
}

/// The very words that a person is shown, with the certificate where this test has it.
fn other_hypervisor(control: &impl Control, run: &Value, dir: &Path) -> Child {
    let creds = dir.join("creds");
    fs::create_dir_all(&creds).unwrap();
    let made = control.ok("POST", "client-certs", "{\"name\":\"hypervisor\"}");
    for (file, key) in
        [("ca-cert.pem", "ca_pem"), ("client-cert.pem", "certificate_pem"), ("client-key.pem", "key_pem")]
    {
        fs::write(creds.join(file), made[key].as_str().expect("a certificate")).unwrap();
    }
    let words = run["export"]["qemu"].as_array().expect("the words");
    let words = words.iter().map(|w| w.as_str().unwrap().replace("/etc/pki/holdfast", creds.to_str().unwrap()));
    let log = fs::File::create(dir.join("qemu.log")).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-display", "none", "-accel", "tcg"]).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("QEMU")
}

fn clients(control: &impl Control, id: &str) -> usize {
    state(control, id)["export"]["disks"][0]["clients"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_host_goes_on_at_another_hypervisor_and_what_was_written_there_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(91);
    let mut running = Outside::start(&data);
    let image = make_vm(&running, &mut rng);
    let id = opened(&running, "");
    running.kill();
    running = Outside::start(&data);
    let run = wait_for("its disks", || Some(state(&running, &id)).filter(|run| run["export"]["disks"][0].is_object()));
    assert_eq!(running.get("groups").as_array().map(Vec::len), Some(2), "one branch, however often it was begun");
    let xml = run["export"]["libvirt"].as_str().expect("for libvirt");
    let name = run["export"]["disks"][0]["export_name"].as_str().expect("a name").to_owned();
    assert!(xml.contains(&format!("name='{name}'")) && xml.contains("tls='yes'"), "{xml}");
    // A real machine takes the words as they are, and has its disk open over TLS.
    let mut qemu = other_hypervisor(&running, &run, dir.path());
    wait_for("the machine to open its disk", || {
        let ended = qemu.try_wait().unwrap();
        assert!(ended.is_none(), "{}", fs::read_to_string(dir.path().join("qemu.log")).unwrap_or_default());
        (clients(&running, &id) > 0).then_some(())
    });
    let serves = || running.ok("POST", &format!("runs/{id}/serves"), "{\"by\":\"me\"}");
    serves();
    let run = phase(&running, &id, "serving");
    assert!(run["measured"]["serving_ms"].is_u64(), "{run}");
    assert!(run["authority"].as_str().is_some_and(|a| a.contains("another hypervisor")), "{run}");
    assert_eq!(
        running.refused("POST", &format!("runs/{id}/serves"), "{}"),
        "not-now",
        "it does not wait for that any more"
    );
    assert_eq!(running.refused("POST", &format!("runs/{id}/stopped"), "{}"), "not-now");
    let ending = json!({ "confirm": "p" }).to_string();
    assert_eq!(running.refused("POST", &format!("runs/{id}/end"), &ending), "not-now", "it may serve there");
    let mut client = running.ingest(&name);
    let mut history = History::fresh();
    for _ in 0..40 {
        change(&mut client, &mut rng, &mut history).expect("written");
    }
    client.write(0, &image[..512], true).expect("the boot sector");

    let machine = Machine::start(&running, running.listen(), "metal", vec![image.clone()]);
    wait_target(&running, "metal");
    begin_failback(&running, &id);
    waits_for(&running, &id, "run stopped");
    running.kill();
    running = restarted(&data, &machine);
    waits_for(&running, &id, "run stopped");
    // Said, but not so: somebody has connected again. (The box of a test has another port after each start, which QEMU cannot know.)
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    let client = running.ingest(&name);
    running.ok("POST", &format!("runs/{id}/stopped"), "{\"by\":\"me\"}");
    waits_for(&running, &id, "has its disks open");
    drop(client);
    let run = phase(&running, &id, "returned");
    let branch = run["points"][0]["branch"].as_str().expect("a branch").to_owned();
    assert!(!running.nbd_socket(&name).exists(), "nobody can write to it any more");
    let machines = content(&running, &branch);
    assert_same(&machine.disk(0), &machines, "the host's disk");
    assert_ne!(machines, image, "something was written there");
    running.kill();
    running = restarted(&data, &machine);
    // Any group's disks are exported by then, this one's must not be.
    wait_for("the other exports", || running.nbd_socket("vm-root").exists().then_some(()));
    assert!(!running.nbd_socket(&name).exists(), "closed over a restart too");
    running.ok("POST", &format!("runs/{id}/commit"), "{\"by\":\"me\"}");
    assert_eq!(phase(&running, &id, "ended")["phase"]["how"], "failed-back");
    drop(machine);
    running.terminate();
}

#[test]
fn a_failback_that_is_undone_leaves_another_hypervisor_its_disks() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(92);
    let running = Outside::start(&data);
    let image = make_vm(&running, &mut rng);
    let id = opened(&running, "");
    running.ok("POST", &format!("runs/{id}/serves"), "{}");
    let run = phase(&running, &id, "serving");
    let name = run["export"]["disks"][0]["export_name"].as_str().expect("a name").to_owned();
    let machine = Machine::start(&running, running.listen(), "metal", vec![vec![7; image.len()]]);
    wait_target(&running, "metal");
    // Before it was off: it serves on.
    begin_failback(&running, &id);
    waits_for(&running, &id, "run stopped");
    running.ok("POST", &format!("runs/{id}/rollback"), "{\"by\":\"me\"}");
    let run = phase(&running, &id, "serving");
    assert_eq!(run["failback"]["ended"]["is"], "rolled-back", "{run}");
    running.ingest(&name).write(1 << 20, &[0x5a; 4096], true).expect("written");
    // After it: its disks are open again, and somebody says again that it serves.
    begin_failback(&running, &id);
    waits_for(&running, &id, "run stopped");
    running.ok("POST", &format!("runs/{id}/stopped"), "{\"by\":\"me\"}");
    phase(&running, &id, "returned");
    running.ok("POST", &format!("runs/{id}/rollback"), "{\"by\":\"me\",\"source_is_off\":\"me\"}");
    waits_for(&running, &id, "run serves");
    let mut want = image;
    want[1 << 20..][..4096].fill(0x5a);
    let mut read = vec![0; want.len()];
    running.ingest(&name).read(0, &mut read).expect("read");
    assert_same(&read, &want, "the machine's disk");
    running.ok("POST", &format!("runs/{id}/serves"), "{}");
    phase(&running, &id, "serving");
    end(&running, &id);
    let groups = running.get("groups");
    let names: Vec<&str> = groups.as_array().unwrap().iter().filter_map(|g| g["name"].as_str()).collect();
    assert!(names.len() == 2 && names.iter().any(|n| n.starts_with("late writes of")), "its branch is gone: {names:?}");
    drop(machine);
    running.terminate();
}
