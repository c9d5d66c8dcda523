//! What goes wrong between real programs: wrong configurations, cut and half-open lines, kills of either side.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    disk::{LoopDisk, Workload, capture_works, copy_sparse, loop_disks_work},
    line::Line,
    process::{self, wait_for},
    product::{Agent, Appliance, At, Binaries, Setup},
    skip,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const START_MAX: Duration = Duration::from_secs(60);
const BACK_MAX: Duration = Duration::from_secs(120);
const GROUP: &str = "g";

/// Every file below a folder with its content, sockets left out.
fn contents(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let (mut found, mut todo) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let kind = fs::symlink_metadata(&path)?.file_type();
            if kind.is_dir() {
                todo.push(path);
            } else if kind.is_file() {
                found.push((path.clone(), fs::read(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[test]
fn a_wrong_configuration_ends_the_box_before_it_touches_anything() -> Result<()> {
    let dir = Scratch::new()?;
    let bins = Binaries::beside_us()?;
    let mut appliance = Appliance::start(&bins, &dir.path().join("box"))?;
    appliance.create_ingest(GROUP, &[("disk", 4 << 20)])?;
    let mut client = appliance.ingest_target(GROUP, "disk")?.connect()?;
    client.write_fua(8192, &[9; 4096])?;
    drop(client);
    let moment = appliance.bookmark(GROUP, "before")?;
    appliance.stop()?;
    let before = contents(&appliance.data_dir())?;
    let good = fs::read_to_string(appliance.dir().join("box.toml"))?;

    let wrong = dir.path().join("wrong.toml");
    let nowhere = dir.path().join("wrong.toml").join("data");
    for (text, says) in [
        (format!("{good}listne = \"127.0.0.1:1\"\n"), vec!["listne", "line 7"]),
        (format!("{good}[journal]\nsegment_mib = \"big\"\n"), vec!["line 8"]),
        (format!("{good}[journal]\nsegment_mib = 1\n"), vec!["journal.segment_mib = 1", "4 to 1024"]),
        (
            good.replace("metrics_listen = \"127.0.0.1", "metrics_listen = \"0.0.0.0"),
            vec!["metrics_listen", "loopback"],
        ),
        (good[..good.len() / 2].to_owned() + "\u{7}", vec!["wrong.toml", "line"]),
        (good.replace("/data\"", "/box.toml\""), vec!["box.toml"]),
        (format!("data = {:?}\n{}", nowhere, good.split_once('\n').context("lines")?.1), vec!["wrong.toml"]),
    ] {
        fs::write(&wrong, &text)?;
        let mut command = Command::new(&bins.holdfastd);
        command.arg("--config").arg(&wrong);
        let done = process::run(command, START_MAX)?;
        ensure!(!done.status.success(), "this was taken:\n{text}");
        ensure!(!done.stdout.contains("READY"), "it said it was ready:\n{text}");
        for word in says {
            ensure!(done.stderr.contains(word), "{word:?} is not in {:?}, the refusal of:\n{text}", done.stderr);
        }
        ensure!(!done.stderr.contains("panicked"), "{}", done.stderr);
    }
    let missing = process::run(
        {
            let mut command = Command::new(&bins.holdfastd);
            command.arg("--config").arg(dir.path().join("none.toml"));
            command
        },
        START_MAX,
    )?;
    ensure!(!missing.status.success() && missing.stderr.contains("none.toml"), "{}", missing.stderr);
    ensure!(contents(&appliance.data_dir())? == before, "a start that was refused changed the data");

    appliance.run()?;
    appliance.ingest_target(GROUP, "disk")?;
    let view = appliance.view(GROUP, &At::Lsn(moment.lsn))?;
    let mut block = [0; 4096];
    view.only()?.connect()?.read(8192, &mut block)?;
    assert_eq!(block, [9; 4096]);
    view.close()?;
    appliance.stop()?;
    dir.done()
}

/// A box, an agent behind a line, and a mounted disk that is written to all the time.
struct World {
    workload: Workload,
    disk: LoopDisk,
    agent: Agent,
    line: Line,
    appliance: Appliance,
    dir: PathBuf,
    /// Bookmarks, each with a copy of the disk as it was.
    taken: Vec<(String, PathBuf)>,
}

impl World {
    fn new(dir: &Path) -> Result<Self> {
        let bins = Binaries::beside_us()?;
        let appliance = Appliance::start_with(&bins, &dir.join("box"), "heartbeat_timeout_ms = 3000\n")?;
        let line = Line::to(appliance.listen())?;
        let mut disk = LoopDisk::create(&dir.join("disk.img"), 48 << 20)?;
        disk.make_ext4()?;
        disk.mount(&dir.join("mnt"))?;
        let workload = Workload::start(&dir.join("mnt"), 7, Duration::from_millis(20));
        // The test's machine is under pressure by the test itself.
        let more = "heed_pressure = false\nring_mib = 32\n";
        let setup = Setup { config: more, address: Some(line.at()), ..Setup::default() };
        let agent = Agent::start_with(&bins, &dir.join("agent"), &appliance, setup)?;
        agent.protect(disk.device(), GROUP)?;
        let this = Self { workload, disk, agent, line, appliance, dir: dir.to_owned(), taken: Vec::new() };
        this.in_step().context("the first copy")?;
        Ok(this)
    }

    fn in_step(&self) -> Result<()> {
        let ready = |g: &serde_json::Value| g["state"] == "replicating" && g["lag_ms"].is_u64();
        let mut last = serde_json::Value::Null;
        let waited = wait_for("the group to be in step", BACK_MAX, || {
            last = self.appliance.group(GROUP)?;
            Ok(ready(&last).then_some(()))
        });
        waited.with_context(|| format!("last seen: {last}; see {}", self.agent.log_path().display()))?;
        wait_for("the host to be connected", BACK_MAX, || {
            let hosts = self.appliance.control().get("/hosts")?;
            Ok(hosts.as_array().into_iter().flatten().any(|h| h["connected"] == true).then_some(()))
        })
    }

    /// The disk goes on being written to, whatever is wrong with us.
    fn write_on(&mut self, steps: u64) -> Result<()> {
        let goal = self.workload.steps() + steps;
        wait_for("the disk to be written to", BACK_MAX, || {
            self.workload.check()?;
            Ok((self.workload.steps() >= goal).then_some(()))
        })
    }

    /// The agent has come again through the line, with both of its connections.
    fn came_again(&self, before: u64) -> Result<()> {
        wait_for("the agent to come again", BACK_MAX, || Ok((self.line.accepted() >= before + 2).then_some(())))?;
        self.in_step()
    }

    fn take(&mut self, name: &str) -> Result<()> {
        self.write_on(5)?;
        let oracle = self.dir.join(format!("{name}.img"));
        self.disk.freeze()?;
        let taken = copy_sparse(self.disk.backing(), &oracle)
            .and_then(|()| self.appliance.bookmark(GROUP, name).with_context(|| format!("bookmark after {name}")));
        self.disk.thaw()?;
        taken?;
        self.taken.push((name.to_owned(), oracle));
        // While it is written on, every moment taken so far is what it was.
        for (name, oracle) in &self.taken {
            let view = self.appliance.view(GROUP, &At::Bookmark(name.clone()))?;
            let difference = compare::export_with_file(&mut view.only()?.connect()?, oracle)?;
            ensure!(difference.is_none(), "{name}: {}", difference.map(|d| d.to_string()).unwrap_or_default());
            view.close()?;
        }
        Ok(())
    }
}

#[test]
fn a_real_agent_and_a_real_box_live_through_cuts_stalls_and_kills() -> Result<()> {
    if let Err(why) = loop_disks_work().and_then(|()| capture_works()) {
        skip(why);
        return Ok(());
    }
    let dir = Scratch::new()?;
    let mut world = World::new(dir.path())?;
    world.take("before")?;

    let before = world.line.accepted();
    world.line.cut();
    world.write_on(20)?;
    world.line.mend();
    world.came_again(before)?;
    world.take("after-a-cut")?;

    let before = world.line.accepted();
    world.line.half_open();
    // The box hears nothing for its timeout and says so, rather than guess.
    wait_for("the box to miss the host", BACK_MAX, || {
        let group = world.appliance.group(GROUP)?;
        Ok((group["state"] == "disconnected" && group["lag_ms"].is_null()).then_some(()))
    })?;
    world.write_on(20)?;
    world.came_again(before)?;
    world.take("after-a-half-open-line")?;

    let before = world.line.accepted();
    world.agent.kill()?;
    world.write_on(20)?;
    world.agent.run()?;
    world.came_again(before)?;
    world.take("after-a-kill-of-the-agent")?;

    let before = world.line.accepted();
    world.appliance.kill()?;
    world.write_on(20)?;
    world.appliance.run()?;
    world.came_again(before)?;
    world.take("after-a-kill-of-the-box")?;

    // The box first comes back to a cut line, then to an agent that was killed meanwhile.
    let before = world.line.accepted();
    world.line.cut();
    world.appliance.kill()?;
    world.agent.kill()?;
    world.write_on(20)?;
    world.appliance.run()?;
    world.agent.run()?;
    world.line.mend();
    world.came_again(before)?;
    world.take("after-all-at-once")?;

    // Its memory stays where its configuration says, after all of that: 512 MiB for its buffers, and itself.
    let resident = world.agent.program()?.rss()?;
    ensure!(resident < 700 << 20, "the agent takes {} MiB", resident >> 20);
    let World { mut workload, mut disk, mut agent, mut appliance, line, .. } = world;
    workload.stop()?;
    disk.unmount()?;
    agent.stop()?;
    appliance.stop()?;
    drop((line, disk));
    dir.done()
}
