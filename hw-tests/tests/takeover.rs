//! A whole machine with a real database, run by the box in its host's place.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    debian::{DebianGuest, DebianImage, Options, Profile},
    process::{self, call, wait_for},
    product::{Appliance, At, Binaries},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{FileExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// A boot without acceleration on a busy machine, and the database's start.
const RUN_MAX: Duration = Duration::from_secs(480);
const STEP_MAX: Duration = Duration::from_secs(180);
const SYNC_MAX: Duration = Duration::from_secs(600);
const SQL_SECONDS: u64 = 60;

fn repo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Puts the agent into a disk's root file system, as its package does.
fn install_agent(disk: &Path, agent: &Path, mount: &Path) -> Result<()> {
    install(disk, agent, mount, |_| Ok(()))
}

fn install(disk: &Path, agent: &Path, mount: &Path, more: impl Fn(&Path) -> Result<()>) -> Result<()> {
    // GPT: 128 bytes for each partition from the third sector on; first and last sector at 32 and 40. The fourth is the root.
    let mut entry = [0; 128];
    fs::File::open(disk)?.read_exact_at(&mut entry, 2 * 512 + 3 * 128)?;
    let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
    let (first, last) = (number(32), number(40));
    let options = format!("loop,offset={},sizelimit={}", first * 512, (last + 1 - first) * 512);
    fs::create_dir_all(mount)?;
    call("mount", &["-o", &options, &disk.to_string_lossy(), &mount.to_string_lossy()], STEP_MAX)?;
    let put = || -> Result<()> {
        let packaging = repo().join("agents/linux/packaging");
        for (from, to, mode) in [
            (agent.to_owned(), "usr/bin/holdfast-agent", 0o755),
            (packaging.join("holdfast-inside.service"), "usr/lib/systemd/system/holdfast-inside.service", 0o644),
            (packaging.join("60-holdfast-inside.rules"), "usr/lib/udev/rules.d/60-holdfast-inside.rules", 0o644),
        ] {
            let to = mount.join(to);
            fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        }
        more(mount)
    };
    let done = put();
    call("umount", &[&mount.to_string_lossy()], STEP_MAX)?;
    done
}

/// Asks the agent inside, as the box does.
fn inside(socket: &Path, command: &str) -> Result<(Option<i64>, String)> {
    let mut stream = UnixStream::connect(socket).context("the machine's port")?;
    stream.set_read_timeout(Some(Duration::from_secs(SQL_SECONDS + 30)))?;
    let wish = json!({ "id": 1, "do": "run", "command": command, "seconds_max": SQL_SECONDS });
    stream.write_all(format!("{wish}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).with_context(|| format!("{line:?}"))?;
    Ok((answer["ok"]["code"].as_i64(), answer["ok"]["output"].as_str().unwrap_or_default().to_owned()))
}

fn sql(text: &str) -> String {
    format!("runuser -u postgres -- psql -v ON_ERROR_STOP=1 -qtAc \"{text}\"")
}

fn plan(groups: &str, check: &str) -> String {
    format!(
        "groups = [\"{groups}\"]\n[machine]\ncpus = 2\nmemory_mib = 640\nboot_seconds_max = 400\n\
         [[application]]\nname = \"postgresql\"\nstart = \"systemctl start postgresql\"\ncheck = '''{check}'''\nseconds_max = 180\n"
    )
}

/// The machine's process must not outlive a test that fails.
struct EndMachines(PathBuf);

impl Drop for EndMachines {
    fn drop(&mut self) {
        for run in fs::read_dir(self.0.join("takeovers")).into_iter().flatten().flatten() {
            if let Ok(pid) = fs::read_to_string(run.path().join("pid")) {
                let _ = std::process::Command::new("kill").args(["-KILL", pid.trim()]).status();
            }
        }
    }
}

#[test]
fn a_machine_with_a_database_is_taken_over_outlives_its_box_and_is_proved_by_a_drill() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a takeover of a Debian host: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let image = DebianImage::get(Profile::POSTGRESQL, &repo().join("target/guest"))?;
    let disk = dir.path().join("host.raw");
    call("cp", &["--sparse=always", &image.path().to_string_lossy(), &disk.to_string_lossy()], STEP_MAX)?;
    install_agent(&disk, &bins.agent, &dir.path().join("mount"))?;

    // A short path: sockets have one of 108 bytes at most.
    let mut appliance = Appliance::start(&bins, &dir.path().join("b"))?;
    let _end = EndMachines(appliance.data_dir());
    appliance.create_ingest("vm", &[("root", image.bytes())])?;
    let target = appliance.ingest_target("vm", "root")?;
    call("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &disk.to_string_lossy(), &target.uri()], STEP_MAX)?;

    let file = dir.path().join("plan.toml");
    fs::write(&file, plan("vm", &sql("select 1")))?;
    appliance.run_cli(&["plan", "set", "vm", &file.to_string_lossy()])?;
    let refused = process::run(appliance.cli(&["takeover", "vm"]), RUN_MAX)?;
    ensure!(!refused.status.success() && refused.stderr.contains("--source-is-off"), "{}", refused.stderr);

    // In earnest.
    let done = process::run(appliance.cli(&["takeover", "vm", "--source-is-off"]), RUN_MAX)?.ok()?;
    println!("{}", done.stdout);
    let runs = appliance.control().get("/runs")?;
    let run =
        runs.as_array().into_iter().flatten().find(|r| r["phase"]["is"] == "serving").context("a run that serves")?;
    let id = run["id"].as_str().context("an id")?.to_owned();
    let port = appliance.data_dir().join("takeovers").join(&id).join("port");
    let must = |command: &str| -> Result<String> {
        let (code, output) = inside(&port, command)?;
        ensure!(code == Some(0), "{command}: {code:?} {output}");
        Ok(output)
    };
    must(&sql("create table t (n int primary key)"))?;
    let mut rows = 0;
    let mut insert = |count: u32| -> Result<u32> {
        must(&sql(&format!("insert into t select generate_series({}, {})", rows + 1, rows + count)))?;
        rows += count;
        Ok(rows)
    };
    insert(100)?;
    // The box dies under it and comes back: what was committed is there, and it goes on.
    appliance.kill()?;
    appliance.run()?;
    insert(100)?;
    wait_for("the run to be taken up again", STEP_MAX, || {
        let run = appliance.control().get(&format!("/runs/{id}"))?;
        Ok((run["phase"]["is"] == "serving").then_some(()))
    })?;
    let committed = insert(50)?;
    // Power off, in the middle of everything.
    let pid = fs::read_to_string(appliance.data_dir().join("takeovers").join(&id).join("pid"))?;
    call("kill", &["-KILL", pid.trim()], STEP_MAX)?;
    // It serves again by itself, with every committed row.
    wait_for("the machine to be started again", RUN_MAX, || {
        let run = appliance.control().get(&format!("/runs/{id}"))?;
        ensure!(run["phase"]["is"] != "failed", "{run}");
        let again = run["restarts_us"].as_array().is_some_and(|at| at.len() == 1);
        Ok((again && run["phase"]["is"] == "serving").then_some(()))
    })?;
    assert_eq!(must(&sql("select count(*) = max(n), max(n) from t"))?.trim(), format!("t|{committed}"));

    // A drill of what the machine left: every committed row is there, none twice.
    let counted = sql("select case when count(*) = max(n) then count(*) else -1 end from t");
    fs::write(&file, plan(&format!("{id} of vm"), &format!("{counted} | grep -qx {committed}")))?;
    appliance.run_cli(&["plan", "set", "left", &file.to_string_lossy()])?;
    let drilled = process::run(appliance.cli(&["drill", "left"]), RUN_MAX)?.ok()?;
    println!("{}", drilled.stdout);
    let runs = appliance.control().get("/runs")?;
    let drill = runs.as_array().into_iter().flatten().find(|r| r["kind"] == "drill").context("the drill")?;
    assert_eq!(drill["phase"], json!({ "is": "ended", "how": "discarded" }), "{drill}");
    assert!(
        drill["volumes"].as_array().is_some_and(|v| v.iter().any(|v| v["mount"] == "/" && v["fault"].is_null())),
        "{drill}"
    );
    let evidence = dir.path().join("evidence");
    let drill_id = drill["id"].as_str().context("an id")?;
    appliance.run_cli(&["run", "evidence", drill_id, &evidence.to_string_lossy()])?;
    assert_eq!(fs::read(evidence.join("screen.png"))?[1..4], *b"PNG");
    let record: Value = serde_json::from_slice(&fs::read(evidence.join("record.json"))?)?;
    assert_eq!(record["run"]["id"], drill["id"]);
    assert_eq!(fs::read_to_string(evidence.join("record.sig"))?.trim().len(), 128);

    // Ended: the branch is gone, and the host's own history is what it was, bit for bit.
    let refused = process::run(appliance.cli(&["run", "end", &id]), STEP_MAX)?;
    ensure!(!refused.status.success() && refused.stderr.contains("thrown away"), "{}", refused.stderr);
    process::run(appliance.cli(&["run", "end", &id, "--confirm", "vm"]), STEP_MAX)?.ok()?;
    let groups = appliance.control().get("/groups")?;
    assert_eq!(groups.as_array().map(Vec::len), Some(1), "{groups}");
    let view = appliance.view("vm", &At::Latest)?;
    let mut client = view.only()?.connect()?;
    let difference = compare::export_with_file(&mut client, &disk)?;
    assert!(difference.is_none(), "{difference:?}");
    drop(client);
    appliance.stop()?;
    dir.done()
}

/// A host's own agent, with its unit and configuration, in a disk that will be a guest's.
fn install_host_agent(root: &Path) -> Result<()> {
    let packaging = repo().join("agents/linux/packaging");
    fs::copy(packaging.join("holdfast-agent.service"), root.join("usr/lib/systemd/system/holdfast-agent.service"))?;
    fs::create_dir_all(root.join("etc/holdfast-agent"))?;
    // An emulated guest is always short of processor.
    fs::write(root.join("etc/holdfast-agent/config.toml"), "heed_pressure = false\n")?;
    Ok(())
}

/// A Debian host with PostgreSQL and an agent, whose committing client says on a serial line what was committed.
struct DbHost {
    guest: DebianGuest,
    said: PathBuf,
}

const UNIT: &str = "postgresql@15-main.service";
const ADDRESS: &str = "192.0.2.10/24";
const LEASE_MS: u64 = 40_000;
/// Rows with the numbers from the first that is missing on; each line that comes out was committed before.
const CLIENT: &str = "(n=$(runuser -u postgres -- psql -qtAc 'select coalesce(max(n), 0) from t'); while [ -e /run/client ]; do \
    n=$((n+1)); echo \"insert into t values ($n) returning n;\"; sleep 0.1; done | runuser -u postgres -- stdbuf -oL psql -qtA >/dev/ttyS2) \
    </dev/null >/dev/null 2>&1 &";

impl DbHost {
    fn boot(disk: &Path, dir: &Path) -> Result<Self> {
        let said = dir.join("said");
        let serial = format!("file,id=said,path={}", said.display());
        let args = ["-chardev", &serial, "-serial", "chardev:said"].map(str::to_owned).to_vec();
        let guest = DebianGuest::boot(disk, &dir.join("guest"), &Options { args, ..Options::default() })?;
        let mut this = Self { guest, said };
        this.sh("stty -F /dev/ttyS2 raw -echo")?;
        Ok(this)
    }
    fn sh(&mut self, line: &str) -> Result<String> {
        let log = self.guest.log_path().display().to_string();
        self.guest.sh(line, STEP_MAX).with_context(|| format!("see {log}"))
    }
    /// The last row that its client has heard to be committed.
    fn committed(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.said)?;
        // The last line may not be whole.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        Ok(whole.lines().filter_map(|l| l.trim().parse().ok()).max().unwrap_or(0))
    }
    fn start_client(&mut self) -> Result<()> {
        self.sh(&format!("touch /run/client; {CLIENT}"))?;
        let before = self.committed()?;
        wait_for("rows to be committed", STEP_MAX, || Ok((self.committed()? > before + 5).then_some(())))
    }
    fn link(&mut self, up: bool) -> Result<()> {
        self.guest.guest().qmp.execute("set_link", json!({ "name": "net", "up": up })).map(drop)
    }
    fn is_stopped(&mut self) -> Result<bool> {
        let said = self.sh(&format!("systemctl is-active {UNIT} || true; ip -o address show dev eth0"))?;
        Ok(!said.lines().any(|l| l == "active" || l == "deactivating") && !said.contains("192.0.2.10"))
    }
}

fn leased_plan() -> String {
    format!(
        "host = \"db1\"\n[machine]\ncpus = 2\nmemory_mib = 640\nboot_seconds_max = 420\n\
         [[application]]\nname = \"postgresql\"\nstart = \"systemctl start {UNIT}\"\ncheck = '''{}'''\nseconds_max = 180\n\
         [lease]\nlease_ms = {LEASE_MS}\nstop_ms = 25000\n\
         addresses = [{{ address = \"{ADDRESS}\", device = \"eth0\" }}]\nservices = [{{ unit = \"{UNIT}\" }}]\n\
         [detect]\nautomatic = true\nchannels = [{{ channel = \"stream\", missed_max = 8 }}]\n\
         [detect.uplink]\ngateway = \"127.0.0.1\"\n",
        sql("select 1")
    )
}

fn plan_status(appliance: &Appliance) -> Result<Value> {
    Ok(appliance.control().get("/plan-status")?[0].clone())
}

/// Until a takeover would begin by itself, and everything written so far is on the box.
fn wait_ready(appliance: &Appliance, host: &DbHost) -> Result<u64> {
    let mut last = Value::Null;
    wait_for("the host to be leased, well and in step", SYNC_MAX, || {
        last = plan_status(appliance)?;
        let group = appliance.group("db1")?;
        let ready = last["ownership"]["fences"] == true
            && last["seen"]["verdict"] == "well"
            && last["seen"]["in_the_way"].is_null()
            && group["state"] == "replicating"
            && group["lag_ms"].is_u64();
        Ok(ready.then_some(()))
    })
    .with_context(|| format!("last seen: {last}; the console is in {}", host.guest.log_path().display()))?;
    // What was committed by now was written before, and is proved to be there by any later proof.
    let (rows, now_us) = (host.committed()?, now_us());
    wait_for("what was committed to be on the box", SYNC_MAX, || {
        let proven = appliance.group("db1")?["lag_proven_us"].as_u64();
        Ok(proven.is_some_and(|us| us > now_us).then_some(()))
    })?;
    Ok(rows)
}

fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

fn automatic_run(appliance: &Appliance, after: usize) -> Result<String> {
    wait_for("a takeover with no hand on it", STEP_MAX, || {
        let runs = appliance.control().get("/runs")?;
        let new = runs.as_array().into_iter().flatten().nth(after);
        Ok(new.and_then(|r| r["id"].as_str()).map(str::to_owned))
    })
}

fn step_of<'a>(run: &'a Value, name: &str) -> Option<&'a Value> {
    run["steps"].as_array()?.iter().find(|s| s["step"] == name && !s["ended_us"].is_null())
}

#[test]
fn a_host_that_is_lost_is_taken_over_by_itself_and_one_that_is_only_cut_off_has_stopped_before() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a takeover of a Debian host by itself: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let image = DebianImage::get(Profile::POSTGRESQL, &repo().join("target/guest"))?;
    let raw = dir.path().join("host.raw");
    call("cp", &["--sparse=always", &image.path().to_string_lossy(), &raw.to_string_lossy()], STEP_MAX)?;
    install(&raw, &bins.agent, &dir.path().join("mount"), install_host_agent)?;
    let disk = dir.path().join("host.qcow2");
    let (from, to) = (raw.to_string_lossy(), disk.to_string_lossy());
    call("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &from, "-F", "raw", &to], STEP_MAX)?;

    let mut appliance = Appliance::start(&bins, &dir.path().join("b"))?;
    let _end = EndMachines(appliance.data_dir());
    let mut host = DbHost::boot(&disk, dir.path())?;
    let (token, port) = (appliance.token()?, appliance.listen().port());
    host.sh(&format!("ip address add {ADDRESS} dev eth0"))?;
    host.sh(&format!("hostname db1; holdfast-agent enrol --box 10.0.2.2:{port} --token {token}"))?;
    host.sh("systemctl enable -q --now holdfast-agent")?;
    host.sh("holdfast-agent protect /dev/vda --group db1")?;
    host.sh(&sql("create table t (n int primary key)"))?;
    let file = dir.path().join("plan.toml");
    fs::write(&file, leased_plan())?;
    appliance.run_cli(&["plan", "set", "db1", &file.to_string_lossy()])?;
    host.start_client()?;
    wait_ready(&appliance, &host)?;

    // Only cut off: it stops by itself, before the box may begin.
    host.link(false)?;
    let id = automatic_run(&appliance, 0)?;
    let fenced = wait_for("the lease to have run out", STEP_MAX, || {
        let run = appliance.control().get(&format!("/runs/{id}"))?;
        ensure!(run["phase"]["is"] != "failed" && run["phase"]["is"] != "ended", "{run}");
        Ok(step_of(&run, "fence").map(|_| run.clone()))
    })?;
    ensure!(host.is_stopped()?, "the host serves although the box has begun");
    assert_eq!(fenced["fenced"]["by"], "lease", "{fenced}");
    println!("{}", appliance.run_cli(&["plan", "status"])?.stdout);
    println!("{}", appliance.run_cli(&["run", "show", &id])?.stdout);
    // Back again, it is told who owns it now and stays down.
    host.link(true)?;
    let term = fenced["fenced"]["term"].as_u64().context("a term")?;
    wait_for("the host to know", STEP_MAX, || {
        let known = host.sh("cat /var/lib/holdfast-agent/ownership.json")?;
        let known: Value = serde_json::from_str(&known).with_context(|| format!("{known:?}"))?;
        Ok((known["term"] == term).then_some(()))
    })?;
    ensure!(host.is_stopped()?, "a host that was taken over serves again");
    process::run(appliance.cli(&["run", "end", &id, "--confirm", "db1"]), RUN_MAX)?.ok()?;
    wait_for("the host to serve again", STEP_MAX, || {
        let said = host.sh(&format!("systemctl is-active {UNIT} || true; ip -o address show dev eth0"))?;
        Ok((said.starts_with("active") && said.contains("192.0.2.10")).then_some(()))
    })?;

    // Without power: it is run on the box, and every row that had come is there.
    host.start_client()?;
    let safe = wait_ready(&appliance, &host)?;
    let lag = appliance.group("db1")?["lag_ms"].clone();
    let DbHost { guest, said } = host;
    guest.power_off_hard()?;
    let off_us = now_us();
    let id = automatic_run(&appliance, 1)?;
    let run = wait_for("the machine to serve", RUN_MAX, || {
        let run = appliance.control().get(&format!("/runs/{id}"))?;
        ensure!(run["phase"]["is"] != "failed" && run["phase"]["is"] != "ended", "{run}");
        Ok((run["phase"]["is"] == "serving").then(|| run.clone()))
    })?;
    println!("{}", appliance.run_cli(&["run", "show", &id])?.stdout);
    let text = fs::read_to_string(&said)?;
    let last: u64 = text.lines().filter_map(|l| l.trim().parse().ok()).max().context("no row at all")?;
    let port = appliance.data_dir().join("takeovers").join(&id).join("port");
    let (code, rows) = inside(&port, &sql("select count(*) || ' ' || max(n) from t"))?;
    ensure!(code == Some(0), "{code:?} {rows}");
    let (count, max) = rows.trim().split_once(' ').with_context(|| format!("{rows:?}"))?;
    assert_eq!(count, max, "a row is missing in the middle");
    let max: u64 = max.parse()?;
    ensure!(max >= safe, "row {safe} was on the box before the power went, and {max} is the last one there");
    table(
        &run,
        off_us,
        &lag,
        &[("committed by then", last), ("proved to be on the box", safe), ("there afterwards", max)],
    );
    process::run(appliance.cli(&["run", "end", &id, "--confirm", "db1"]), RUN_MAX)?.ok()?;
    appliance.stop()?;
    dir.done()
}

/// What was measured; emulated, so that only the order of things and the first two lines tell something.
fn table(run: &Value, off_us: u64, lag: &Value, rows: &[(&str, u64)]) {
    let begun = run["begun_us"].as_u64().unwrap_or(0);
    let ms = |name: &str| run["measured"][name].as_u64();
    println!("| from | to | s |\n|---|---|---|");
    let line = |from: &str, to: &str, ms: Option<u64>| match ms {
        Some(ms) => println!("| {from} | {to} | {:.1} |", ms as f64 / 1000.0),
        None => println!("| {from} | {to} | – |"),
    };
    line("power off", "decision", Some(begun.saturating_sub(off_us) / 1000));
    line("last heard", "decision", ms("detection_ms"));
    let fenced = step_of(run, "fence").and_then(|s| s["ended_us"].as_u64());
    line("decision", "its lease has run out", fenced.map(|us| us.saturating_sub(begun) / 1000));
    line("decision", "first instruction", ms("first_instruction_ms"));
    line("decision", "booted", ms("booted_ms"));
    line("decision", "PostgreSQL answers", ms("serving_ms"));
    println!("rows: {rows:?}; lag shown before: {lag} ms");
}
