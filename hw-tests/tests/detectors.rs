//! What shows that a host is lost, from real agents: their probes and scripts, their heartbeat datagrams beside a stream that is cut.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    line::Line,
    process::wait_for,
    product::{Agent, Appliance, Binaries, Setup},
};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(90);

/// A box, a real agent behind a line that can be cut, and a script that does what a file says.
struct World {
    agent: Agent,
    line: Line,
    appliance: Appliance,
    host: String,
    dir: PathBuf,
}

impl World {
    fn new(dir: &Path) -> Result<Self> {
        let bins = Binaries::beside_us()?;
        let appliance = Appliance::start(&bins, &dir.join("box"))?;
        let line = Line::to(appliance.listen())?;
        let script = dir.join("orders");
        let says = dir.join("says");
        fs::write(&script, format!("#!/bin/sh\n. {}\n", says.display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        fs::write(&says, "echo 'orders: 17'\n")?;
        // Another user takes root, which this is about in the agent's own tests.
        let user = std::process::Command::new("id").arg("-un").output()?;
        let user = String::from_utf8(user.stdout)?;
        let config =
            format!("[scripts.orders]\nprogram = {:?}\nuser = {:?}\n", script.display().to_string(), user.trim());
        let setup = Setup { config: &config, address: Some(line.at()), ..Setup::default() };
        let agent = Agent::start_with(&bins, &dir.join("agent"), &appliance, setup)?;
        let hosts = appliance.control().get("/hosts")?;
        let host = hosts[0]["name"].as_str().context("a host")?.to_owned();
        Ok(Self { agent, line, appliance, host, dir: dir.to_owned() })
    }
    fn script(&self, text: &str) -> Result<()> {
        // Whole at any time: it is read while it is written.
        let new = self.dir.join("new");
        fs::write(&new, text)?;
        Ok(fs::rename(new, self.dir.join("says"))?)
    }
    fn plan(&self, script: &str, then: &str) -> Result<()> {
        let text = format!(
            "host = {:?}\n[machine]\ncpus = 1\nmemory_mib = 64\n[hooks]\nfence = [\"/bin/true\"]\n\
             [detect]\nautomatic = true\nhold_ms = 100\nchannels = [\n\
             {{ channel = \"stream\", period_ms = 500, missed_max = 4 }},\n{{ channel = \"beat\", period_ms = 500, missed_max = 4 }},\n]\n\
             [detect.uplink]\nothers = [\"127.0.0.1\"]\n\
             [[detect.probe]]\nname = \"orders\"\nkind = {{ script = {script:?} }}\nevery_ms = 500\ntimeout_ms = 5000\nfailures_min = 2\nthen = {then:?}\n\
             [[detect.probe]]\nname = \"box\"\nkind = {{ tcp = {{ address = \"{}\" }} }}\nevery_ms = 500\n",
            self.host,
            self.appliance.listen(),
        );
        let file = self.dir.join("plan.toml");
        fs::write(&file, text)?;
        self.appliance.run_cli(&["plan", "set", "watched", &file.to_string_lossy()]).map(drop)
    }
    fn seen(&self) -> Result<Value> {
        Ok(self.appliance.control().get("/plan-status")?[0]["seen"].clone())
    }
    fn wait(&self, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait_for(what, STEP_MAX, || {
            last = self.seen()?;
            Ok(is(&last).then(|| last.clone()))
        });
        let logs = (self.agent.log_path(), self.appliance.log_path());
        found.with_context(|| format!("last seen: {last}; logs: {} {}", logs.0.display(), logs.1.display()))
    }
    fn wait_well(&self) -> Result<Value> {
        self.wait("the host to be well on both channels", |seen| {
            let reasons = seen["reasons"].to_string();
            seen["verdict"] == "well"
                && seen["alarm"].is_null()
                && seen["in_the_way"].is_null()
                && reasons.contains("the heartbeat datagrams: heard")
                && reasons.contains("uplink: peer 127.0.0.1 answers")
        })
    }
    fn runs(&self) -> Result<Vec<Value>> {
        Ok(self.appliance.control().get("/runs")?.as_array().cloned().unwrap_or_default())
    }
    fn events(&self, kind: &str) -> Result<String> {
        let status = self.appliance.control().get("/status")?;
        let all = status["events"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().filter(|e| e["event"] == kind || e["kind"] == kind).map(Value::to_string).collect())
    }
}

fn probe<'a>(seen: &'a Value, name: &str) -> &'a Value {
    seen["probes"].as_array().into_iter().flatten().find(|p| p["name"] == name).unwrap_or(&Value::Null)
}

#[test]
fn probes_and_beats_of_a_real_agent_decide_on_the_box() -> Result<()> {
    let dir = Scratch::new()?;
    let mut world = World::new(dir.path())?;

    // A name that the host does not have is refused by the host, and said on the box.
    world.plan("missing", "alarm")?;
    wait_for("the refusal", STEP_MAX, || {
        let owned = world.appliance.control().get("/plan-status")?[0]["ownership"].to_string();
        Ok(owned.contains("no [scripts.missing]").then_some(()))
    })?;
    world.plan("orders", "alarm")?;
    world.wait_well()?;
    let seen =
        world.wait("the probes", |s| probe(s, "orders")["end"] == "works" && probe(s, "box")["end"] == "works")?;
    assert_eq!(probe(&seen, "orders")["output"], "orders: 17", "{seen}");

    // The script fails: an alarm with its words, its output on the box, and no takeover.
    world.script("printf 'no orders since noon\\n\\033[2Jdetails\\n'; exit 3\n")?;
    let seen = world.wait("the alarm", |s| s["alarm"].as_str().is_some_and(|a| a.contains("an application fails")))?;
    let of = probe(&seen, "orders");
    assert_eq!(of["why"], "script orders ended with 3: no orders since noon", "{seen}");
    let status = world.appliance.run_cli(&["plan", "status"])?.stdout;
    ensure!(status.contains("| no orders since noon") && status.contains("| \u{fffd}[2Jdetails"), "{status}");
    let told = world.events("probe-changed")?;
    ensure!(
        told.contains("script orders ended with 3") && told.contains("it printed: no orders since noon / "),
        "{told}"
    );
    ensure!(world.events("takeover-doubt")?.contains("script orders ended with 3"), "the doubt says why");
    world.script("echo well\n")?;
    world.wait_well()?;

    // The stream is cut and beats are heard: the host lives, so an alarm and no takeover.
    world.line.cut();
    let seen = world.wait("the stream to be silent", |s| {
        s["alarm"].as_str().is_some_and(|a| a.contains("some channels are silent and others show life"))
    })?;
    let reasons = seen["reasons"].to_string();
    ensure!(reasons.contains("connections: silent") && reasons.contains("datagrams: heard"), "{reasons}");
    // Much longer than silence would have to last.
    std::thread::sleep(Duration::from_secs(6));
    ensure!(world.runs()?.is_empty(), "a host that sends beats was taken over: {:?}", world.runs()?);
    ensure!(world.seen()?["verdict"] == "doubt", "{}", world.seen()?);
    world.line.mend();
    world.wait_well()?;

    // Half-open: the same, with connections that stand and carry nothing.
    world.line.half_open();
    world.wait("the stream to be silent again", |s| s["reasons"].to_string().contains("connections: silent"))?;
    ensure!(world.runs()?.is_empty());
    world.wait_well()?;

    // An application that the plan takes the host over for.
    world.plan("orders", "takeover")?;
    world.wait_well()?;
    world.script("echo broken; exit 9\n")?;
    let run = wait_for("a takeover with no hand on it", STEP_MAX, || Ok(world.runs()?.first().cloned()))?;
    let decision = run["decision"].as_str().unwrap_or_default();
    ensure!(decision.contains("orders") && decision.contains("script orders ended with 9: broken"), "{run}");
    // Nothing of it is protected here; that is found before anything is touched.
    wait_for("the run to be over", STEP_MAX, || {
        Ok(world.runs()?.first().filter(|r| r["phase"]["is"] == "ended").map(drop))
    })?;
    world.script("echo well\n")?;
    world.wait_well()?;

    // Dead: both fall silent, and that is a takeover.
    world.agent.kill()?;
    let run = wait_for("a takeover of a dead agent's host", STEP_MAX, || {
        Ok(world.runs()?.into_iter().find(|r| r["id"] != run["id"]))
    })?;
    let decision = run["decision"].as_str().unwrap_or_default();
    ensure!(decision.contains("silent on every required channel") && decision.contains("datagrams: silent"), "{run}");
    world.appliance.stop()?;
    drop(world);
    dir.done()
}
