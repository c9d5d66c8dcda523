//! Standbys: a host with a stream and a lease, another one that follows it with disks in memory and the real holder of a lease, and boxes that
//! are killed. With the real agent, mounts and services: `agents/linux`.

use crate::{
    agent::{Host, Identity},
    failback::{begin_failback, phase, state},
    fencing::{Leased, status, wait_fences},
    restores::{Machine, wait_target},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
    takeovers::{EndMachines, machine_runs},
};
use serde_json::{Value, json};
use std::path::Path;
use wire::Holding;

const SIZE: usize = 4 << 20;

fn plan(lag_seconds: u64) -> String {
    format!(
        "host = \"db1\"\nplace = {{ standby = \"db2\" }}\n[machine]\ncpus = 1\nmemory_mib = 64\n\
         [lease]\nlease_ms = 3000\nstop_ms = 1000\nservices = [{{ configured = \"web\" }}]\n\
         [standby]\nlag_seconds = {lag_seconds}\nservices = [{{ unit = \"srv.mount\" }}, {{ configured = \"web\" }}]\n"
    )
}

/// The protected host, first as who writes, then as who holds a lease; the standby's agent and its disks.
struct Cast {
    db1: Host,
    host: Option<Leased>,
    standby: Leased,
    disks: Machine,
    group: String,
}

fn cast(inside: &Inside, rng: &mut Rng) -> Cast {
    let mut disk = vec![0; SIZE];
    rng.fill(&mut disk);
    let mut db1 = Host::protect(inside, "db1", disk);
    db1.connect();
    db1.settle();
    let token = inside.ok("POST", "tokens", "{}")["token"].as_str().unwrap().to_owned();
    let db2 = Identity::enrol(inside.listen(), &token, "db2").unwrap();
    let standby = Leased::stand_by(db2.clone(), db1.identity().host, inside.listen());
    let disks = Machine::of(db2, inside.listen(), vec![vec![9; SIZE]], true);
    let group = db1.spec.id.to_string();
    Cast { db1, host: None, standby, disks, group }
}

impl Cast {
    fn writes(&mut self, rng: &mut Rng) {
        (0..20).for_each(|_| self.db1.write_some(rng));
        self.db1.settle();
    }
    /// From here on it writes no more.
    fn lease(&mut self, at: std::net::SocketAddr) {
        self.host = Some(Leased::start((self.db1.identity().clone(), self.db1.spec.id), at));
    }
    fn host(&self) -> &Leased {
        self.host.as_ref().expect("a lease")
    }
    fn move_to(&self, running: &Outside) {
        if let Some(host) = &self.host {
            host.see().at = running.listen();
        }
        self.standby.see().at = running.listen();
        self.disks.move_to(running.listen());
    }
    fn never_two(&self) {
        assert!(!(self.host().serves() && self.standby.serves()), "two serve");
    }
}

fn follows(control: &impl Control) {
    wait_for("the standby to follow", || {
        status(control)["standby"]["state"].as_str().is_some_and(|s| s.contains("follows")).then_some(())
    });
}

/// Until the run rests; whatever is seen of it meanwhile, one serves at most.
fn settled(control: &impl Control, cast: &Cast, id: &str) -> Value {
    wait_for("the run to settle", || {
        let run = state(control, id);
        assert!(run["stuck"].is_null(), "{run}");
        cast.never_two();
        matches!(run["phase"]["is"].as_str(), Some("serving" | "failed" | "ended")).then_some(run)
    })
}

/// Begins a run; refused it is begun again, for after a start of the box not everybody is there at once.
fn begun(control: &impl Control, wish: &Value) -> String {
    wait_for("it to begin", || {
        let id = control.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
        let goes_on = wait_for("its check", || {
            let run = state(control, &id);
            let steps = run["steps"].as_array().map_or(0, Vec::len);
            (steps > 1 || run["phase"]["is"] == "ended").then_some(steps > 1)
        });
        goes_on.then_some(id)
    })
}

fn killed(running: Outside, data: &Path, cast: &Cast, rng: &mut Rng, times: usize) -> Outside {
    let mut running = running;
    for _ in 0..times {
        // Wherever it has come to by then: that is the point.
        std::thread::sleep(std::time::Duration::from_millis(rng.below(900)));
        running.kill();
        running = Outside::start(data);
        cast.move_to(&running);
        cast.never_two();
    }
    running
}

#[test]
fn a_standby_follows_serves_by_lease_and_what_it_wrote_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(95);
    // The host in memory says nothing while somebody waits for the standby.
    let inside = Inside::start(&data, "heartbeat_timeout_ms = 30000\n");
    let mut cast = cast(&inside, &mut rng);
    inside.ok("PUT", "plans/p", &plan(0));
    follows(&inside);
    cast.writes(&mut rng);
    let first = inside.view(&cast.group, "\"latest\"");
    let chosen = first.volumes[0].clone();
    inside.close_view(&first);
    wait_for("the standby's disk to be the host's", || (cast.disks.disk(0) == chosen).then_some(()));
    cast.writes(&mut rng);
    let second = inside.view(&cast.group, "\"latest\"");
    let newest = second.volumes[0].clone();
    inside.close_view(&second);
    wait_for("the standby's disk to follow", || (cast.disks.disk(0) == newest).then_some(()));
    let standing = status(&inside)["standby"]["restore"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(inside.refused("POST", &format!("restores/{standing}/finish"), ""), "of-a-standby");
    assert!(!cast.standby.serves(), "it follows and serves nobody");
    assert!(cast.standby.see().plan.as_ref().is_some_and(|p| p.services.len() == 2), "its agent has the plan");
    inside.stop();

    // To an older moment than its disks were brought to, and the box is killed on the way.
    let mut running = Outside::start(&data);
    cast.move_to(&running);
    cast.lease(running.listen());
    wait_fences(&running);
    follows(&running);
    let wish = json!({ "plan": "p", "kind": "failover", "at": { "lsn": first.lsn } });
    let id = begun(&running, &wish);
    running = killed(running, &data, &cast, &mut rng, 4);
    let run = settled(&running, &cast, &id);
    assert_eq!(run["phase"]["is"], "serving", "{run}");
    assert_eq!(run["authority"], "the standby db2", "{run}");
    assert!(run["measured"]["serving_ms"].is_u64(), "{run}");
    assert!(cast.standby.serves() && !cast.host().serves());
    assert_same(&cast.disks.disk(0), &chosen, "the standby's disk at the chosen moment");
    let owned = status(&running)["ownership"].clone();
    assert!(owned["owner"]["standby"].is_string() && owned["hold"] == "leased", "{owned}");
    // Cut off from the box it stops by itself; when it hears it again it serves again.
    cast.standby.see().is_cut = true;
    cast.standby.wait("the end of its lease", |s| s.holding == Holding::Down);
    wait_for("it to be said", || state(&running, &id)["now"].is_string().then_some(()));
    cast.standby.see().is_cut = false;
    cast.standby.wait("its services again", |s| s.holding == Holding::Serving);

    // What it writes is on its own disks, and comes back with the host's.
    let mut written = vec![0; 200_000];
    rng.fill(&mut written);
    cast.disks.write(0, 1 << 20, &written);
    let mut want = chosen.clone();
    want[1 << 20..][..written.len()].copy_from_slice(&written);
    let metal = Machine::start(&running, running.listen(), "metal", vec![newest.clone()]);
    wait_target(&running, "metal");
    begin_failback(&running, &id);
    running = killed(running, &data, &cast, &mut rng, 2);
    metal.move_to(running.listen());
    phase(&running, &id, "returned");
    assert_same(&metal.disk(0), &want, "the host's disk");
    assert_same(&cast.disks.disk(0), &want, "the standby's disk is as it left it");
    assert!(!cast.standby.serves(), "it has stopped for the host");
    let groups = running.get("groups");
    let late = groups.as_array().unwrap().iter().find(|g| g["name"].as_str().unwrap().starts_with("late writes of"));
    let late = late.expect("what the host had written after the moment")["id"].as_str().unwrap().to_owned();
    let view = running.view(&late, "\"latest\"");
    assert_same(&view.volumes[0], &newest, "the late writes");
    running.close_view(&view);
    cast.host().wait("the host to serve", |h| h.holding == Holding::Serving);

    // Not content: the standby serves again, on its own disks as they are.
    running.ok("POST", &format!("runs/{id}/rollback"), "{\"by\":\"me\"}");
    let run = wait_for("the standby to serve again", || {
        cast.never_two();
        let run = state(&running, &id);
        (run["phase"]["is"] == "serving").then_some(run)
    });
    assert_eq!(run["failback"]["ended"]["is"], "rolled-back", "{run}");
    assert!(cast.standby.serves() && !cast.host().serves());
    assert_same(&cast.disks.disk(0), &want, "the standby's disk");
    // Ended: the host is its own, and the standby follows it again.
    running.ok("POST", &format!("runs/{id}/end"), "{\"confirm\":\"p\"}");
    assert_eq!(phase(&running, &id, "ended")["phase"]["how"], "discarded");
    cast.host().wait("the host to serve once more", |h| h.holding == Holding::Serving);
    wait_for("it to follow again", || (cast.disks.disk(0) == newest).then_some(()));
    drop((metal, cast));
    running.terminate();
}

#[test]
fn a_standby_that_cannot_serve_is_refused_in_words_before_the_host_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(96);
    let inside = Inside::start(&dir.path().join("d"), "");
    let mut cast = cast(&inside, &mut rng);
    cast.writes(&mut rng);
    cast.lease(inside.listen());
    let begin = || {
        let wish = json!({ "plan": "p", "kind": "failover", "planned": true });
        let id = inside.ok("POST", "runs", &wish.to_string())["id"].as_str().unwrap().to_owned();
        settled(&inside, &cast, &id)
    };
    let why = |run: &Value| {
        assert_eq!(run["phase"], json!({ "is": "ended", "how": "refused" }), "{run}");
        let steps = run["steps"].as_array().unwrap();
        steps.iter().find_map(|s| s["outcome"]["text"].as_str().filter(|_| s["step"] == "check")).unwrap().to_owned()
    };
    // So late that there is no such moment yet: it waits, and says so.
    inside.ok("PUT", "plans/p", &plan(3600));
    wait_fences(&inside);
    wait_for("it to be said", || {
        status(&inside)["standby"]["state"].as_str().is_some_and(|s| s.contains("as old as")).then_some(())
    });
    let refused = why(&begin());
    assert!(refused.contains("does not follow yet") && refused.contains("as old as"), "{refused}");
    assert_same(&cast.disks.disk(0), &vec![9; SIZE], "nothing is brought to it yet");
    // Its agent does not know a service of the plan.
    cast.standby.see().refuses = Some("no [fence.services.web]".into());
    inside.ok("PUT", "plans/p", &plan(0).replace("srv.mount", "data.mount"));
    wait_fences(&inside);
    follows(&inside);
    let refused = why(&begin());
    assert!(refused.contains("no [fence.services.web]"), "{refused}");
    assert!(cast.host().serves(), "the host was not touched");
    // A plan that goes ends what follows.
    inside.ok("DELETE", "plans/p", "");
    wait_for("it to end", || {
        let restores = inside.get("restores");
        restores.as_array().unwrap().iter().all(|r| r["phase"]["is"] == "cancelled").then_some(())
    });
    // Moved by its own word: nothing that was written is missing.
    cast.standby.see().refuses = None;
    inside.ok("PUT", "plans/p", &plan(0));
    wait_fences(&inside);
    follows(&inside);
    let view = inside.view(&cast.group, "\"latest\"");
    let run = wait_for("the standby's word", || Some(begin()).filter(|run| run["phase"]["is"] == "serving"));
    assert!(run["measured"]["pause_ms"].is_u64(), "{run}");
    assert_same(&cast.disks.disk(0), &view.volumes[0], "the standby's disk");
    inside.close_view(&view);
    assert!(cast.standby.serves() && !cast.host().serves());
    drop(cast);
    inside.stop();
}

#[test]
fn a_drill_for_a_standby_is_a_machine_on_the_box_and_the_standby_goes_on_following() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut rng = Rng::new(97);
    let inside = Inside::start(&data, "heartbeat_timeout_ms = 30000\n");
    let mut cast = cast(&inside, &mut rng);
    cast.writes(&mut rng);
    // A bridge that there is not: a drill's card leads nowhere.
    let text = plan(0).replace("memory_mib = 64\n", "memory_mib = 64\nagent = false\n")
        + "[[network]]\nmac = \"52:54:00:00:00:01\"\nbridge = \"nobridge0\"\n";
    inside.ok("PUT", "plans/p", &text);
    follows(&inside);
    let view = inside.view(&cast.group, "\"latest\"");
    let before = view.volumes[0].clone();
    inside.close_view(&view);
    let wish = json!({ "plan": "p", "kind": "drill", "hold": true });
    let id = inside.ok("POST", "runs", &wish.to_string())["id"].as_str().expect("an id").to_owned();
    let run = phase(&inside, &id, "serving");
    assert!(machine_runs(&data, &id), "{run}");
    assert_eq!(run["machine"]["nics"][0]["wire"], "Isolated", "{run}");
    assert_eq!((&run["machine"]["marker"], &run["authority"]), (&json!("drill"), &json!("the host")), "{run}");
    assert!(
        run["follows"].is_null() && run["fenced"].is_null(),
        "neither host nor standby is asked for anything: {run}"
    );
    let branch = run["points"][0]["branch"].as_str().expect("a branch");
    let view = inside.view(branch, "\"latest\"");
    assert_same(&view.volumes[0], &before, "the drill's disk");
    inside.close_view(&view);
    // What the host writes meanwhile is its own history's, and the standby's.
    cast.writes(&mut rng);
    let view = inside.view(&cast.group, "\"latest\"");
    let newest = view.volumes[0].clone();
    inside.close_view(&view);
    assert_ne!(newest, before, "something was written");
    wait_for("the standby's disk to follow", || (cast.disks.disk(0) == newest).then_some(()));
    assert!(!cast.standby.serves());
    let promote = json!({ "confirm": "p", "source_is_off": "me" }).to_string();
    let (status, said) = inside.call("POST", &format!("runs/{id}/promote"), &promote);
    assert!(status == 409 && said.contains("a standby, which has disks of its own"), "{said}");
    inside.ok("POST", &format!("runs/{id}/end"), "{}");
    assert_eq!(phase(&inside, &id, "ended")["phase"]["how"], "discarded");
    assert!(!machine_runs(&data, &id), "its machine is gone");
    follows(&inside);
    drop(cast);
    inside.stop();
}
