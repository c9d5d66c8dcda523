//! What a protected host sees over time: how far the box is behind at a sustained rate, and what a cut of the network costs.
//!
//! **Lag** is how long it takes until everything that has been written is durable on the box: while fio writes at a fixed rate, one bookmark after
//! the other is asked of the agent, and answered when the box has it and all before it durable. That is more than the writes' own lag by
//! what the question takes, and never less. Beside it, from the same run, stands what the disk under box and host itself takes for a
//! durable write of 4 KiB: below that no lag can be.
//!
//! **A cut** pulls the cable of a host in a network namespace while it writes. What crosses the cable after it is plugged in again, all
//! protocols, both what is sent and what is sent twice, is held against what was dirtied meanwhile: once with a spool that holds it, when every
//! write has to cross so that every moment is kept; and once with none, when only the dirty map knows the places. The data does not compress.

use super::Results;
use crate::demo::size;
use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw,
    disk::{self, LoopDisk},
    net::{self, Cable},
    process::{self, wait_for},
    product::{Agent, Appliance, Binaries, Setup},
    tools,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

const GROUP: &str = "bench";
const LIMIT: Duration = Duration::from_secs(300);
const BLOCK: usize = 16 << 10;
/// Of bytes that cross the network after a cut, for each that was dirtied.
const CUT_GOAL: f64 = 1.2;
/// How fast the disk is dirtied during a cut.
const CUT_BYTES_S: u64 = 4 << 20;

/// A loop disk under the agent's protection, the first copy done.
struct Scene {
    // In this order: who uses the disk goes first.
    agent: Agent,
    appliance: Appliance,
    disk: LoopDisk,
    socket: PathBuf,
}

impl Scene {
    fn set(bins: &Binaries, dir: &Path, bytes: u64, cable: Option<Cable>, config: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let address = cable.as_ref().map_or("127.0.0.1".to_owned(), |c| c.address().to_string());
        let appliance = Appliance::start_on(bins, &dir.join("box"), &address)?;
        let agent =
            Agent::start_with(bins, &dir.join("agent"), &appliance, Setup { config, cable, ..Setup::default() })?;
        let disk = LoopDisk::create(&dir.join("disk.img"), bytes)?;
        fill(disk.device(), bytes)?;
        agent.protect(disk.device(), GROUP)?;
        appliance.wait_state(GROUP, "replicating", LIMIT)?;
        let socket = dir.canonicalize()?.join("agent/state/agent.sock");
        let this = Self { agent, appliance, disk, socket };
        this.in_step()?;
        Ok(this)
    }

    fn ask(&self, request: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        serde_json::from_str(&line).context("the agent's answer")
    }

    /// The group as the agent sees it.
    fn group(&self) -> Result<Value> {
        Ok(self.ask(&json!({ "op": "status" }))?["ok"]["groups"][0].clone())
    }

    /// Milliseconds until all that was written before is durable on the box; none in a gap.
    fn lag_now(&self, name: &str) -> Result<Option<f64>> {
        let begun = Instant::now();
        let asked = json!({ "op": "bookmark", "group": GROUP, "name": name, "consistency": "crash" });
        let answer = self.ask(&asked)?;
        Ok((!answer["ok"].is_null()).then(|| begun.elapsed().as_secs_f64() * 1000.0))
    }

    fn in_step(&self) -> Result<()> {
        wait_for("the box to have everything", LIMIT, || {
            let group = self.group()?;
            let nothing = |key: &str| group[key].as_u64() == Some(0);
            let there = group["state"] == "replicating" && nothing("spool_records") && nothing("dirty_bytes");
            Ok(there.then_some(()))
        })
    }

    fn end(mut self) -> Result<()> {
        self.agent.run_cli(&["unprotect", GROUP])?;
        self.agent.stop()?;
        self.appliance.stop()
    }
}

/// Random bytes all over: nothing is zero, nothing compresses.
fn fill(device: &Path, bytes: u64) -> Result<()> {
    let (mut block, mut draw) = (vec![0; 1 << 20], Draw::new(5));
    let mut file = fs::OpenOptions::new().write(true).open(device)?;
    for _ in 0..bytes >> 20 {
        draw.fill(&mut block);
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

fn why_not() -> Option<String> {
    disk::loop_disks_work().and_then(|()| disk::capture_works()).err()
}

/// The values at half and at 99 of 100; sorts them.
fn spread(values: &mut [f64]) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: usize| values.get((values.len() * share / 100).min(values.len().saturating_sub(1))).copied();
    (at(50).unwrap_or(0.0), at(99).unwrap_or(0.0))
}

/// Milliseconds that the folder's disk takes to make 4 KiB durable.
fn own_sync_ms(dir: &Path) -> Result<(f64, f64)> {
    #[repr(align(4096))]
    struct Aligned([u8; 4096]);
    let path = dir.join("sync.img");
    let flags = libc::O_DIRECT;
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&path)?;
    file.set_len(4 << 20)?;
    let (block, mut took) = (Aligned([7; 4096]), Vec::new());
    for i in 0..600u64 {
        let begun = Instant::now();
        file.write_all_at(&block.0, i % 1024 * 4096)?;
        file.sync_data()?;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    fs::remove_file(&path)?;
    // The first writes make the file's blocks.
    Ok(spread(took.get_mut(100..).context("some writes")?))
}

pub fn lag(bins: &Binaries, dir: &Path, quick: bool, results: &mut Results) -> Result<()> {
    if let Some(why) = why_not() {
        println!("SKIPPED: lag was not measured: {why}");
        return Ok(());
    }
    const BYTES: u64 = 256 << 20;
    let dir = dir.join("lag");
    let config = "ring_mib = 16\nmemory_mib = 48\nspool_memory_mib = 8\nspool_mib = 256\nheed_pressure = false\n";
    let mut scene = Scene::set(bins, &dir, BYTES, None, config)?;
    let (half, most) = own_sync_ms(&dir)?;
    results.fact("lag: the disk's own durable write of 4 KiB", format!("{half:.2} ms, 99 % within {most:.2} ms"));
    let rates: &[u32] = if quick { &[4, 64] } else { &[2, 8, 32, 64, 128, 0] };
    for rate in rates {
        let job = scene.lag_at(&dir, *rate, if quick { 3 } else { 8 })?;
        results.fact(
            match rate {
                0 => "lag with no limit on the rate, 16 KiB random, depth 8".to_owned(),
                rate => format!("lag at {rate} MiB/s, 16 KiB random, depth 8"),
            },
            job.text(half),
        );
        scene.in_step()?;
    }
    scene.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

struct Lagged {
    mib_s: f64,
    samples: Vec<f64>,
    /// Of the samples, those in which writes were only marked or copied.
    in_gap: usize,
    spool_most: u64,
    until_in_step: Duration,
    /// Of the agent, from before the first write until all is on the box.
    cpu_seconds: f64,
    /// Bytes, the most that was seen.
    agent_rss: u64,
    written: f64,
}

impl Lagged {
    fn text(mut self, own_ms: f64) -> String {
        let agent = format!(
            "; agent {:.2} s of CPU per 100 MB (compression, TLS and what the bookmarks of this measurement take in it), {} of memory",
            self.cpu_seconds * 100e6 / self.written.max(1.0),
            size(self.agent_rss)
        );
        let all = self.samples.len() + self.in_gap;
        if self.samples.is_empty() {
            return format!(
                "{:.0} MiB/s reached: more than can be sent; in a gap all the time ({all} samples), in step {:.2} s after the last write{agent}",
                self.mib_s,
                self.until_in_step.as_secs_f64()
            );
        }
        let (half, most) = spread(&mut self.samples);
        let gap = if self.in_gap > 0 {
            format!("; in a gap {} % of the time: more than can be sent", self.in_gap * 100 / all.max(1))
        } else {
            String::new()
        };
        format!(
            "{:.0} MiB/s reached; p50 {half:.1} ms ({:.0} × the disk's own), p99 {most:.1} ms, {all} samples; at most {} in the spool; in step {:.2} s after the last write{gap}{agent}",
            self.mib_s,
            half / own_ms.max(0.001),
            size(self.spool_most),
            self.until_in_step.as_secs_f64(),
        )
    }
}

impl Scene {
    fn lag_at(&mut self, dir: &Path, rate: u32, seconds: u32) -> Result<Lagged> {
        let report = dir.join("fio.json");
        let mut command = Command::new(tools::need("fio")?);
        command.args(["--name=job", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=16k", "--iodepth=8"]);
        command.args(["--time_based", "--randrepeat=0", "--norandommap", "--refill_buffers", "--output-format=json"]);
        command.arg(format!("--runtime={seconds}")).arg(format!("--filename={}", self.disk.device().display()));
        command.arg(format!("--output={}", report.display()));
        if rate > 0 {
            command.arg(format!("--rate={rate}m"));
        }
        let writer = thread::spawn(move || process::run(command, Duration::from_secs(u64::from(seconds) + 60)));
        let mut lagged = Lagged {
            mib_s: 0.0,
            samples: vec![],
            in_gap: 0,
            spool_most: 0,
            until_in_step: Duration::ZERO,
            cpu_seconds: 0.0,
            agent_rss: 0,
            written: 0.0,
        };
        let agent = self.agent.program()?.id();
        let computed = process::cpu_seconds_of(agent)?;
        // The first second is the writer's start.
        thread::sleep(Duration::from_secs(1));
        while !writer.is_finished() {
            let name = format!("{rate} {}", lagged.samples.len() + lagged.in_gap);
            match self.lag_now(&name)? {
                Some(ms) => lagged.samples.push(ms),
                None => lagged.in_gap += 1,
            }
            let group = self.group()?;
            lagged.agent_rss = lagged.agent_rss.max(process::rss_of(agent)?);
            lagged.spool_most = lagged.spool_most.max(group["spool_bytes"].as_u64().unwrap_or(0));
            thread::sleep(Duration::from_millis(20));
        }
        let ended = Instant::now();
        writer.join().ok().context("the writer's thread")??.ok()?;
        self.in_step()?;
        lagged.until_in_step = ended.elapsed();
        let text = fs::read_to_string(&report)?;
        let value: Value = serde_json::from_str(text.find("\n{").map_or(text.as_str(), |at| &text[at..]))?;
        let bytes_s = value["jobs"][0]["write"]["bw_bytes"].as_f64().context("fio reports no rate")?;
        lagged.mib_s = bytes_s / f64::from(1 << 20);
        lagged.written = value["jobs"][0]["write"]["io_bytes"].as_f64().context("fio reports no bytes")?;
        lagged.cpu_seconds = process::cpu_seconds_of(agent)? - computed;
        Ok(lagged)
    }

    /// Dirties the disk for so long; bytes written, and bytes of the disk that were.
    fn dirty(&self, bytes: u64, seconds: u64) -> Result<(u64, u64)> {
        #[repr(align(4096))]
        struct Aligned([u8; BLOCK]);
        let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(self.disk.device())?;
        let (mut block, mut draw) = (Box::new(Aligned([0; BLOCK])), Draw::new(11));
        let (mut written, mut places) = (0, BTreeSet::new());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(seconds) {
            draw.fill(&mut block.0);
            let place = draw.below(bytes / BLOCK as u64);
            file.write_all_at(&block.0, place * BLOCK as u64)?;
            places.insert(place);
            written += BLOCK as u64;
            let due = Duration::from_micros(written * 1_000_000 / CUT_BYTES_S);
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        file.sync_all()?;
        Ok((written, places.len() as u64 * BLOCK as u64))
    }
}

pub fn cut(bins: &Binaries, dir: &Path, seconds: u64, results: &mut Results) -> Result<()> {
    if let Some(why) = why_not().or_else(|| net::cables_work().err()) {
        println!("SKIPPED: the cut of the network was not measured: {why}");
        return Ok(());
    }
    const BYTES: u64 = 512 << 20;
    let cases = [
        ("in the spool", true, "ring_mib = 16\nspool_memory_mib = 8\nspool_mib = 1024\nheed_pressure = false\n"),
        ("in the dirty map only", false, "ring_mib = 16\nspool_memory_mib = 4\nspool_mib = 0\nheed_pressure = false\n"),
    ];
    for (what, kept, config) in cases {
        let dir = dir.join("cut");
        let scene = Scene::set(bins, &dir, BYTES, Some(Cable::new()?), config)?;
        let cable = scene.agent.cable()?;
        cable.pull()?;
        let (written, dirtied) = scene.dirty(BYTES, seconds)?;
        let group = scene.group()?;
        let waits = |key: &str| group[key].as_u64() > Some(0);
        ensure!(waits("spool_bytes") || waits("dirty_bytes"), "nothing waits for the cable: {group}");
        let before = cable.received()?;
        cable.plug()?;
        let plugged = Instant::now();
        scene.in_step()?;
        let took = plugged.elapsed();
        let sent = cable.received()? - before;
        let (of_writes, of_places) = (sent as f64 / written as f64, sent as f64 / dirtied as f64);
        let ratio = if kept { of_writes } else { of_places };
        let verdict = if ratio <= CUT_GOAL { "met" } else { "**missed**" };
        results.fact(
            format!("a cut of {seconds} s, what was written {what}"),
            format!(
                "{of_writes:.3} bytes on the wire for each that was written, {of_places:.3} for each of the disk that changed; goal {CUT_GOAL} of {} {verdict} ({} written to {}, {} sent; in step {:.1} s after the cable was plugged in)",
                if kept { "the first" } else { "the second" },
                size(written),
                size(dirtied),
                size(sent),
                took.as_secs_f64()
            ),
        );
        scene.end()?;
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}
