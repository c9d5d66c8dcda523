//! A whole machine with a real database, run by the box in its host's place.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    debian::{DebianImage, Profile, install},
    process::{self, call, wait_for},
    product::{Appliance, At, Binaries, EndMachines, end_machines},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// A boot without acceleration on a busy machine, and the database's start.
const RUN_MAX: Duration = Duration::from_secs(480);
const STEP_MAX: Duration = Duration::from_secs(180);
/// Five boots, a first copy of a whole disk and two comparisons of it, all emulated.
const STORY_MAX: Duration = Duration::from_secs(2400);
const SQL_SECONDS: u64 = 60;

fn repo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
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
    install::put_agent(&disk, &bins.agent, &dir.path().join("mount"), |_| Ok(()))?;

    // A short path: sockets have one of 108 bytes at most.
    let mut appliance = Appliance::start(&bins, &dir.path().join("b"))?;
    let _end = EndMachines::of(&appliance);
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
    let drill_id = drill["id"].as_str().context("an id")?;
    let evidence = dir.path().join("evidence");
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

/// The newcomer's command itself: what it compares, it compares with an error for every difference.
#[test]
fn the_whole_story_of_a_lost_host_is_told_by_one_command_and_every_row_is_compared() -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("the whole story of a host that is lost: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut command = Command::new(bins.beside("xtask")?);
    command.args(["try", "--takeover", "--check", "--built", "--data"]).arg(dir.path().join("s"));
    let done = process::run(command, STORY_MAX);
    // Machines outlive whoever started them, and a story that was ended.
    end_machines(&dir.path().join("s/b/data"));
    let done = done?;
    println!("{}", done.stdout);
    done.ok()?;
    dir.done()
}
