//! `cargo xtask try --takeover`: the whole story of a host that is lost, on one machine.
//!
//! ```text
//!                       a bridge in a network of our own
//!   host db1 ───────────┬────────────┬──────────── the box, and a client that commits rows at 192.0.2.10
//!   Debian, PostgreSQL, │            │
//!   agent; 192.0.2.10   │            └ later: the machine on the box, with the same address on another card
//!                       └ later: the same host from the rescue medium, then from its own disk again
//! ```
//!
//! The host is protected and its power goes. The box notices, waits until the host's lease has run out for certain, and runs it; the client finds
//! the address again by what the machine tells its neighbours. Then the host boots from the rescue medium, gets what the machine wrote while that
//! serves, and after one pause serves again. At the end every row the client was told to be committed is looked for.
//!
//! `--check` also cuts the host off first, alive: it must have stopped before the box begins, and serve again when it is given back. Every
//! difference ends it with an error.
//!
//! # Limits
//!
//! Root, for the bridge and for making the host's disk. Both hosts and machines are emulated where acceleration does not work, which is said:
//! then the times say little. The bridge's own address stands for the gateway by which the box proves its uplink.

mod rows;
mod site;

use super::{Options, prepare};
use crate::{
    deps::{self, Purpose},
    repo::Repo,
    rescue, stop,
};
use anyhow::{Context, Result, bail, ensure};
use hw_tests::{
    debian::DebianImage,
    net, process,
    product::{Appliance, Binaries, EndMachines},
};
use rows::Writer;
use serde_json::{Value, json};
use site::{ADDRESS, BOX, BRIDGE, Host, MAC, MACHINE_MAC, RESCUE_ADDRESS};
use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Everything is emulated, and the machine may be busy with other things.
const STEP_MAX: Duration = Duration::from_secs(600);
const SYNC_MAX: Duration = Duration::from_secs(1200);
const COMMAND_MAX: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// On each side.
const ROWS: usize = 20;
const LEASE_MS: u64 = 40_000;
/// This small Debian has nobody who hears its power button, which costs the pause of the failback all of this: it is ended as by a power cut.
const SHUTDOWN_MAX: u64 = 20;
const PLAN: &str = "db1";

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        bail!("the story needs root: {why}, and its network is made");
    }
    if !options.built {
        let missing = deps::install(repo, Some(Purpose::Story))?;
        ensure!(missing.tools.is_empty(), "missing: {}", missing.tools.join(", "));
        println!("building");
        repo.build_programs()?;
    }
    let bins = Binaries::beside_us()?;
    stop::listen();
    let target = repo.target_dir()?;
    let dir = prepare(&options.data.clone().unwrap_or_else(|| target.join("try-takeover")))?;
    println!("everything goes into {}", dir.display());
    println!("making the host's disk and the rescue medium (the first time, Debian's packages are fetched)");
    let disk = site::host_disk(&bins, &target, &dir)?;
    let medium = dir.join("rescue.iso");
    rescue::make_asking(repo, &target, &medium)?;

    net::leave_for_a_bridge(BRIDGE, &[&format!("{BOX}/24"), "192.0.2.1/24"])?;
    net::believe_neighbours(BRIDGE)?;
    net::tap(site::TAP, BRIDGE)?;
    let appliance = Appliance::start_on(&bins, &dir.join("b"), BOX)?;
    let _end = EndMachines::of(&appliance);
    let mut story = Story { appliance, started: Instant::now(), marks: Vec::new(), automatic: !options.by_hand };
    story.say(format!("the box is up: agents at {}", story.appliance.listen()));

    let mut host = Host::boot(&disk, &dir.join("host"))?;
    story.say("the host is up: Debian with PostgreSQL, emulated");
    let writer = story.protect(&mut host, &dir)?;
    if options.check {
        story.cut_off(&mut host, &writer)?;
    }
    let run = story.lose_power(host, &writer)?;
    let host = story.failback(&run, &disk, &dir, &medium, &writer)?;
    let end = story.compare(&run, writer)?;
    host.shut_down()?;
    story.appliance.stop()?;
    println!("{end}");
    Ok(())
}

struct Story {
    appliance: Appliance,
    started: Instant,
    /// For the table at the end: from, to, milliseconds.
    marks: Vec<(&'static str, &'static str, Option<u64>)>,
    automatic: bool,
}

/// What has to be known of the takeover afterwards.
struct Lost {
    id: String,
    /// In the client's list: proved to be on the box before the power went; committed by then.
    safe: usize,
    by_then: usize,
    off_us: u64,
    lag_ms: Option<u64>,
}

fn client_at() -> SocketAddr {
    (ADDRESS, 5432).into()
}

/// Waits for something that takes its time; Ctrl-C ends it.
fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look().with_context(|| format!("while waiting for {what}"))? {
            return Ok(found);
        }
        if stop::asked() {
            bail!("stopped");
        }
        ensure!(Instant::now() < deadline, "{what}: not seen within {} s", limit.as_secs());
        thread::sleep(LOOK_EVERY);
    }
}

impl Story {
    fn say(&self, text: impl std::fmt::Display) {
        println!("[{:6.1} s] {text}", self.started.elapsed().as_secs_f32());
    }

    /// Enrols and protects the host, gives it a plan, and lets the client commit.
    fn protect(&mut self, host: &mut Host, dir: &std::path::Path) -> Result<Writer> {
        let (token, at) = (self.appliance.token()?, self.appliance.listen());
        host.sh(&format!("ip address replace {ADDRESS}/24 dev eth0"))?;
        host.sh(&format!("hostname db1; holdfast-agent enrol --box {at} --token {token}"))?;
        host.sh("systemctl enable -q --now holdfast-agent")?;
        host.sh("holdfast-agent protect /dev/vda --group db1")?;
        self.say("its agent is enrolled, its disk protected: authoritative is the host, its data runs to the box");
        until("the database to be up", STEP_MAX, || Ok(host.sh(&site::sql("select 1")).ok()))?;
        host.sh(&site::sql("create table story (number bigint, word text)"))?;
        let file = dir.join("plan.toml");
        fs::write(&file, self.plan())?;
        self.appliance.run_cli(&["plan", "set", PLAN, &file.to_string_lossy()])?;
        let writer = Writer::start(client_at());
        self.wait_rows(&writer, 1, "the host")?;
        self.knows(MAC)?;
        self.wait_ready(&writer)?;
        self.say("all of its disk is on the box; from here on it may be lost");
        Ok(writer)
    }

    fn plan(&self) -> String {
        format!(
            "host = \"db1\"\n[machine]\ncpus = 2\nmemory_mib = 640\nboot_seconds_max = 540\nshutdown_seconds_max = {SHUTDOWN_MAX}\n\
             [[network]]\nmac = \"{MACHINE_MAC}\"\nbridge = \"{BRIDGE}\"\naddresses = [\"{ADDRESS}/24\"]\n\
             [[application]]\nname = \"postgresql\"\nstart = \"systemctl start {unit}\"\ncheck = '''{check}'''\nseconds_max = 240\n\
             [lease]\nlease_ms = {LEASE_MS}\nstop_ms = 25000\n\
             addresses = [{{ address = \"{ADDRESS}/24\", device = \"eth0\" }}]\nservices = [{{ unit = \"{unit}\" }}]\n\
             [detect]\nautomatic = {automatic}\naddress = \"{host}\"\n\
             channels = [{{ channel = \"stream\", missed_max = 8 }}, {{ channel = \"icmp\", missed_max = 8 }}]\n\
             [detect.uplink]\ngateway = \"192.0.2.1\"\n",
            unit = site::UNIT,
            check = site::sql("select 1"),
            automatic = self.automatic,
            host = site::HOST,
        )
    }

    /// Until a takeover could begin, and what was committed is on the box: how many rows that are.
    fn wait_ready(&self, writer: &Writer) -> Result<usize> {
        let mut last = Value::Null;
        until("the host to be leased, well and in step", SYNC_MAX, || {
            last = self.appliance.control().get("/plan-status")?[0].clone();
            let group = self.appliance.group("db1")?;
            let ready = last["ownership"]["fences"] == true
                && last["seen"]["verdict"] == "well"
                && (!self.automatic || last["seen"]["in_the_way"].is_null())
                && group["state"] == "replicating"
                && group["lag_ms"].is_u64();
            Ok(ready.then_some(()))
        })
        .with_context(|| format!("last seen: {last}"))?;
        // What was committed by now was written before, and is proved to be there by any later proof.
        let (rows, now_us) = (writer.count()?, now_us());
        until("what was committed to be on the box", SYNC_MAX, || {
            let proven = self.appliance.group("db1")?["lag_proven_us"].as_u64();
            Ok(proven.is_some_and(|us| us > now_us).then_some(rows))
        })
    }

    fn wait_rows(&self, writer: &Writer, more: usize, who: &str) -> Result<()> {
        let before = writer.count()?;
        let count = until("rows to be committed", STEP_MAX, || {
            let count = writer.count()?;
            Ok((count >= before + more).then_some(count))
        })
        .with_context(|| format!("at {who}"))?;
        self.say(format!("{who} commits: the client was told of {count} rows by now"));
        Ok(())
    }

    /// Whose card the client holds for the address.
    fn knows(&self, mac: &str) -> Result<()> {
        let held = net::neighbour(ADDRESS)?;
        ensure!(held.as_deref() == Some(mac), "the client reaches {ADDRESS} and holds {held:?} for it, not {mac}");
        self.say(format!("{ADDRESS} answers from {mac}"));
        Ok(())
    }

    /// Cut off, the host stops by itself before the box may begin; given back, it serves again.
    fn cut_off(&mut self, host: &mut Host, writer: &Writer) -> Result<()> {
        self.say("the host's cable is pulled; it lives");
        host.link(false)?;
        let id = self.begun(0)?;
        let run = until("the lease to have run out", STEP_MAX, || {
            let run = self.run(&id)?;
            Ok(step(&run, "fence").map(|_| run.clone()))
        })?;
        ensure!(host.is_stopped()?, "the host serves although the box has begun");
        ensure!(run["fenced"]["by"] == "lease", "fenced otherwise: {}", run["fenced"]);
        self.say("its lease has run out: the box begins, and the host had stopped its database and dropped its address before");
        host.link(true)?;
        let term = run["fenced"]["term"].as_u64().context("a term")?;
        until("the host to know who owns it", STEP_MAX, || {
            let known = host.sh("cat /var/lib/holdfast-agent/ownership.json")?;
            let known: Value = serde_json::from_str(&known).with_context(|| format!("{known:?}"))?;
            Ok((known["term"] == term).then_some(()))
        })?;
        ensure!(host.is_stopped()?, "a host that was taken over serves again");
        self.say("plugged in again, it is told so and stays down");
        let mut end = self.appliance.cli(&["run", "end", &id, "--confirm", PLAN]);
        end.stdout(std::process::Stdio::null());
        process::run(end, STEP_MAX)?.ok()?;
        self.wait_rows(writer, 1, "the host, which was given back,")?;
        self.knows(MAC)?;
        Ok(())
    }

    /// The takeover that begins after so many others.
    fn begun(&self, after: usize) -> Result<String> {
        if !self.automatic {
            self.say("holdfast takeover db1");
            let wish = json!({ "plan": PLAN, "kind": "failover" });
            // By hand too it is only done when the host's silence proves something.
            return until("the takeover to be possible", STEP_MAX, || {
                let begun = self.appliance.control().post("/runs", &wish).ok();
                Ok(begun.and_then(|run| run["id"].as_str().map(str::to_owned)))
            });
        }
        let id = until("a takeover with no hand on it", STEP_MAX, || {
            let runs = self.appliance.control().get("/runs")?;
            let new = runs.as_array().into_iter().flatten().nth(after);
            Ok(new.and_then(|r| r["id"].as_str()).map(str::to_owned))
        })?;
        self.say(format!("the box has decided, by itself: run {id}"));
        Ok(id)
    }

    fn run(&self, id: &str) -> Result<Value> {
        let run = self.appliance.control().get(&format!("/runs/{id}"))?;
        let is = &run["phase"]["is"];
        if is == "failed" || !run["stuck"].is_null() {
            bail!("the run does not go on: {run}");
        }
        Ok(run)
    }

    /// Shows every step as it ends, and who is authoritative, until the run is what it shall be.
    fn follow(&self, id: &str, steps: impl Fn(&Value) -> &Value, wanted: &str) -> Result<Value> {
        let (mut shown, mut authority) = (BTreeSet::new(), String::new());
        until(&format!("run {id} to be {wanted}"), SYNC_MAX, || {
            let run = self.run(id)?;
            for step in steps(&run).as_array().into_iter().flatten() {
                let outcome = &step["outcome"];
                let said = outcome["text"].as_str().unwrap_or_default();
                if outcome["is"] == "running" || !shown.insert(step["step"].to_string()) || outcome["is"] == "skipped" {
                    continue;
                }
                self.say(format!("  {}: {said}", step["title"].as_str().unwrap_or_default()));
            }
            let now = run["authority"].as_str().unwrap_or_default();
            if authority != now {
                authority = now.to_owned();
                let fenced = run["fenced"]["by"]
                    .as_str()
                    .map_or_else(String::new, |by| format!("; the host is fenced by its {by}"));
                self.say(format!("  authoritative: {now}{fenced}"));
            }
            let is = run["phase"]["is"].as_str().unwrap_or_default();
            let undone = !run["failback"].is_null() && is == "serving";
            ensure!(is == wanted || !undone, "the failback was undone: {}", run["failback"]["ended"]["why"]);
            Ok((is == wanted).then_some(run))
        })
    }

    /// The power goes. By itself the box runs what it has, and the client commits again.
    fn lose_power(&mut self, host: Host, writer: &Writer) -> Result<Lost> {
        self.wait_rows(writer, ROWS, "the host")?;
        let safe = self.wait_ready(writer)?;
        let runs = self.appliance.control().get("/runs")?.as_array().map_or(0, Vec::len);
        let lag_ms = self.appliance.group("db1")?["lag_ms"].as_u64();
        host.power_off_hard()?;
        let (off_us, by_then) = (now_us(), writer.count()?);
        self.say(format!(
            "THE HOST'S POWER IS OFF. {by_then} rows were committed, {safe} of them proved to be on the box; lag shown: {} ms",
            lag_ms.unwrap_or_default()
        ));
        let id = self.begun(runs)?;
        let run = self.follow(&id, |run| &run["steps"], "serving")?;
        self.say("the machine on the box serves; what it writes is journalled beside the host's own history");
        self.wait_rows(writer, ROWS, "the machine")?;
        self.knows(MACHINE_MAC)?;
        let committed = writer.committed(0)?;
        let again = committed.get(by_then).map(|c| c.at_us.saturating_sub(off_us) / 1000);
        let begun = run["begun_us"].as_u64().unwrap_or_default();
        let after_begun = |us: Option<u64>| us.map(|us| us.saturating_sub(begun) / 1000);
        let measured = |key: &str| run["measured"][key].as_u64();
        self.marks.extend([
            ("power off", "decision", Some(begun.saturating_sub(off_us) / 1000)),
            (
                "decision",
                "the host's lease has run out",
                after_begun(step(&run, "fence").and_then(|s| s["ended_us"].as_u64())),
            ),
            ("decision", "first guest instruction", measured("first_instruction_ms")),
            ("decision", "booted", measured("booted_ms")),
            ("decision", "the address answers (NRO)", measured("address_ms")),
            ("decision", "PostgreSQL answers (RTO)", measured("serving_ms")),
            ("power off", "the client's next commit", again),
        ]);
        Ok(Lost { id, safe, by_then, off_us, lag_ms })
    }

    /// The same host from the rescue medium gets what the machine wrote, and serves again.
    fn failback(
        &mut self,
        lost: &Lost,
        disk: &std::path::Path,
        dir: &std::path::Path,
        medium: &std::path::Path,
        writer: &Writer,
    ) -> Result<Host> {
        let mut host = Host::from_medium(disk, &dir.join("rescued"), medium)?;
        self.say("the host is switched on with the rescue medium in it");
        let answers = [
            ("Box (HOST or HOST:PORT): ", self.appliance.listen().to_string()),
            ("Token: ", self.appliance.token()?),
            ("Name of this machine [", "metal".to_owned()),
            ("[by DHCP]: ", format!("{RESCUE_ADDRESS}/24")),
        ];
        for (question, answer) in answers {
            host.answer(question, &answer)?;
        }
        until("the host to wait for its disk", STEP_MAX, || {
            let targets = self.appliance.control().get("/restore-targets")?;
            Ok(targets.as_array().into_iter().flatten().any(|t| t["name"] == "metal").then_some(()))
        })
        .with_context(|| host.log())?;
        let back = ["failback", PLAN, "--to", "metal", "--yes", "--commit-minutes", "30", "--json"];
        process::run(self.appliance.cli(&back), COMMAND_MAX)?.ok()?;
        self.say(format!("holdfast failback {PLAN} --to metal"));
        let from = writer.count()?;
        let run = self.follow(&lost.id, |run| &run["failback"]["steps"], "returned").with_context(|| host.log())?;
        ensure!(run["failback"]["note"].is_null(), "{}", run["failback"]["note"]);
        let at = writer.count()?;
        until("the client to be served by the host", STEP_MAX, || {
            Ok((net::neighbour(ADDRESS)?.as_deref() == Some(MAC) && writer.count()? >= at + ROWS).then_some(()))
        })?;
        self.knows(MAC)?;
        host.wait_shell()?;
        let pause = rows::longest_pause_us(&writer.committed(0)?, from).map(|us| us / 1000);
        self.marks.extend([
            ("the machine's end", "the host answers (pause of the failback)", run["failback"]["down_ms"].as_u64()),
            ("the last commit on the machine", "the first on the host", pause),
        ]);
        self.appliance.run_cli(&["run", "commit", &lost.id])?;
        self.say(format!(
            "holdfast run commit {}: what the machine wrote goes when the host's own history holds it",
            lost.id
        ));
        let over = self.follow(&lost.id, |_| &Value::Null, "ended")?;
        ensure!(over["phase"]["how"] == "failed-back", "{}", over["phase"]);
        self.say("it does: authoritative is the host, its data runs to the box");
        Ok(host)
    }

    /// Every row the client was told of is looked for.
    fn compare(&self, lost: &Lost, writer: Writer) -> Result<String> {
        let (committed, in_doubt) = writer.stop()?;
        let table = rows::table(client_at())?;
        let outcome = rows::compare(&table, &committed, &in_doubt)?;
        let early = outcome.lost.iter().find(|place| **place < lost.safe);
        if let Some(place) = early {
            bail!("{:?} was proved to be on the box before the power went, and is not there", committed[*place]);
        }
        let late = outcome.lost.iter().find(|place| **place >= lost.by_then);
        if let Some(place) = late {
            bail!(
                "{:?} was committed after the power had gone, and is not there: no row may be lost there",
                committed[*place]
            );
        }
        let first_lost = outcome.lost.first().map(|place| lost.off_us.saturating_sub(committed[*place].at_us) / 1000);
        let mut text = String::from("\n| from | to | s |\n|---|---|---|\n");
        for (from, to, ms) in &self.marks {
            let s = ms.map_or_else(|| "–".to_owned(), |ms| format!("{:.1}", ms as f64 / 1000.0));
            text += &format!("| {from} | {to} | {s} |\n");
        }
        let rpo = first_lost.map_or_else(|| "0".to_owned(), |ms| format!("{:.2}", ms as f64 / 1000.0));
        text += &format!(
            "| the first row that was lost | power off (RPO; lag shown {} ms) | {rpo} |\n",
            lost.lag_ms.unwrap_or_default()
        );
        text += &format!(
            "\n{} rows were committed. Of {} before the power went, {} had been proved to be on the box and are there; {} of the others had not come \
             and are lost. Of {} afterwards none is lost. {} that were sent without an answer are there. No row is there twice.\n",
            committed.len(),
            lost.by_then,
            lost.safe,
            outcome.lost.len(),
            committed.len() - lost.by_then,
            outcome.unanswered
        );
        Ok(text)
    }
}

/// A step that has ended.
fn step<'a>(run: &'a Value, name: &str) -> Option<&'a Value> {
    run["steps"].as_array()?.iter().find(|s| s["step"] == name && !s["ended_us"].is_null())
}
