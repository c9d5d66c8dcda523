//! What capture costs a host that writes: the same fio job with capture off and on, turn and turn about.
//!
//! On is the kernel half with the agent's recorder, which reads everything and throws it away: no box and no network, so that the
//! two CPUs of a small machine are not shared with one. Two disks: a loop disk over memory, which answers within some ten microseconds
//! and shows the cost at its worst; and one that takes 100 µs and more for each write, as a disk array over a network does: a loop disk
//! over a file that comes through FUSE from QEMU's empty disk with that latency.
//!
//! Where the time goes is asked in one more round of each job, in which the kernel takes the times of BPF programs (that costs by itself, so
//! it is not done in the others): beside what a write took longer stands what our programs ran for it and what the recorder computed for it.

use super::Results;
use crate::demo::size;
use anyhow::{Context, Result, ensure};
use hw_tests::{
    disk::{self, LoopDisk},
    process::{self, Program, wait_for},
    record, tools,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 256 << 20;
pub const DELAY_US: u32 = 100;
/// Of throughput on a disk with that delay.
pub const GOAL: f64 = 0.97;

pub struct Job {
    pub name: &'static str,
    pub args: &'static [&'static str],
    depth: u32,
}

pub const JOBS: &[Job] = &[
    Job { name: "4 KiB random, depth 1", args: &["--rw=randwrite", "--bs=4k", "--iodepth=1"], depth: 1 },
    Job { name: "4 KiB random, depth 16", args: &["--rw=randwrite", "--bs=4k", "--iodepth=16"], depth: 16 },
    Job { name: "64 KiB random, depth 4", args: &["--rw=randwrite", "--bs=64k", "--iodepth=4"], depth: 4 },
    Job { name: "1 MiB sequential, depth 2", args: &["--rw=write", "--bs=1m", "--iodepth=2"], depth: 2 },
];

pub fn run(dir: &Path, quick: bool, results: &mut Results) -> Result<()> {
    if let Err(why) = disk::loop_disks_work().and_then(|()| disk::capture_works()) {
        println!("SKIPPED: the cost of capture was not measured: {why}");
        return Ok(());
    }
    let recorder = record::recorder()?;
    let (rounds, seconds) = if quick { (3, 2) } else { (7, 3) };
    let memory = InMemory::folder()?;
    let fast = LoopDisk::create(&memory.0.join("fast.img"), DISK_BYTES)?;
    let bench = Bench { recorder, dir, rounds, seconds };
    bench.disk("loop disk in memory", fast.device(), None, results)?;
    drop(fast);
    match Slow::start(dir) {
        Ok(slow) => {
            bench.disk(&format!("disk of {DELAY_US} µs and the way to it"), slow.disk.device(), Some(GOAL), results)?
        }
        Err(e) => println!("SKIPPED: capture on a disk of {DELAY_US} µs: {e:#}"),
    }
    Ok(())
}

/// A folder in memory, gone when dropped.
struct InMemory(PathBuf);

impl InMemory {
    fn folder() -> Result<Self> {
        let dir = PathBuf::from(format!("/dev/shm/holdfast-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {e}", self.0.display());
        }
    }
}

/// A loop disk whose writes take their time.
struct Slow {
    // In this order: who uses the file goes first.
    disk: LoopDisk,
    _fuse: Fuse,
    _server: Program,
}

/// The file that FUSE shows; unmounted when dropped.
struct Fuse {
    at: PathBuf,
    _program: Program,
}

impl Drop for Fuse {
    fn drop(&mut self) {
        if let Err(e) = process::call("umount", &["-l", &self.at.to_string_lossy()], LIMIT) {
            eprintln!("{}: {e:#}", self.at.display());
        }
    }
}

impl Slow {
    fn start(dir: &Path) -> Result<Self> {
        let socket = dir.join("slow.sock");
        let mut command = Command::new(tools::need("qemu-nbd")?);
        command.args(["--persistent", "--shared=16", "--image-opts"]);
        command.arg(format!("driver=null-co,size={DISK_BYTES},latency-ns={},read-zeroes=on", DELAY_US * 1000));
        command.arg("--socket").arg(&socket);
        let mut server = Program::start("qemu-nbd", command, &dir.join("slow-server.log"))?;
        wait_for("qemu-nbd", LIMIT, || {
            server.expect_running()?;
            Ok(socket.exists().then_some(()))
        })?;
        let at = dir.join("slow");
        fs::create_dir_all(&at)?;
        let mut command = Command::new(tools::need("nbdfuse")?);
        command.arg(&at).arg("--unix").arg(&socket);
        let mut program = Program::start("nbdfuse", command, &dir.join("slow-fuse.log"))?;
        let file = at.join("nbd");
        wait_for("nbdfuse", LIMIT, || {
            program.expect_running()?;
            Ok(file.exists().then_some(()))
        })?;
        let fuse = Fuse { at, _program: program };
        let disk = LoopDisk::over(&file)?;
        // Else the page cache would answer.
        process::call("losetup", &["--direct-io=on", &disk.device().to_string_lossy()], LIMIT)?;
        Ok(Self { disk, _fuse: fuse, _server: server })
    }
}

/// The kernel takes the times of BPF programs while this lives.
struct BpfStats(String);

const BPF_STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl BpfStats {
    fn on() -> Result<Self> {
        let before = fs::read_to_string(BPF_STATS).with_context(|| format!("read {BPF_STATS}"))?;
        fs::write(BPF_STATS, "1").with_context(|| format!("write {BPF_STATS}"))?;
        Ok(Self(before))
    }
}

impl Drop for BpfStats {
    fn drop(&mut self) {
        if let Err(e) = fs::write(BPF_STATS, &self.0) {
            eprintln!("{BPF_STATS}: {e}");
        }
    }
}

/// Nanoseconds and runs of all BPF programs that a process holds open.
fn bpf_time(process: u32) -> Result<(u64, u64)> {
    let (mut ns, mut runs) = (0, 0);
    // One program may be held by several descriptors.
    let mut seen = std::collections::BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        // A descriptor may be closed by now.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let value = |key: &str| -> Option<u64> { text.lines().find_map(|l| l.strip_prefix(key)?.trim().parse().ok()) };
        let (Some(id), Some(time), Some(count)) = (value("prog_id:"), value("run_time_ns:"), value("run_cnt:")) else {
            continue;
        };
        if seen.insert(id) {
            ns += time;
            runs += count;
        }
    }
    ensure!(!seen.is_empty(), "the recorder holds no BPF program");
    Ok((ns, runs))
}

/// A run of the recorder.
struct Recording {
    program: Program,
    stop: PathBuf,
}

/// What the recorder took for its work.
struct Taken {
    cpu_seconds: f64,
    rss: u64,
    counters: Value,
}

struct Bench<'a> {
    recorder: PathBuf,
    dir: &'a Path,
    rounds: u32,
    seconds: u32,
}

impl Bench<'_> {
    fn disk(&self, what: &str, device: &Path, goal: Option<f64>, results: &mut Results) -> Result<()> {
        // The first pass brings the disk's memory into being.
        self.fio(&Job { name: "fill", args: &["--rw=write", "--bs=1m", "--iodepth=2"], depth: 2 }, device)?;
        for job in JOBS {
            let (mut ratios, mut alone, mut cpu, mut rss, mut drops) = (vec![], vec![], vec![], 0, 0);
            for _ in 0..self.rounds {
                let off = self.fio(job, device)?;
                let recording = self.record(device)?;
                let on = self.fio(job, device)?;
                let taken = recording.end()?;
                ratios.push(on.0 / off.0);
                alone.push(off.0);
                cpu.push(taken.cpu_seconds / (on.1 as f64 / 100e6));
                rss = rss.max(taken.rss);
                drops += taken.counters["drops"].as_u64().unwrap_or(0);
            }
            let ratio = median(&mut ratios);
            let verdict = match goal {
                Some(goal) if ratio >= goal => format!("; goal {goal} met"),
                Some(goal) => format!("; goal {goal} **missed**"),
                None => String::new(),
            };
            results.fact(
                format!("capture on a {what}: {}", job.name),
                format!(
                    "{ratio:.3} of {:.0}/s without ({} rounds, {:.3} to {:.3}){verdict}; reader {:.2} s of CPU per 100 MB, {} of memory, {drops} writes dropped",
                    median(&mut alone),
                    self.rounds,
                    ratios[0],
                    ratios[ratios.len() - 1],
                    median(&mut cpu),
                    size(rss),
                ),
            );
            match self.where_time_goes(job, device, median(&mut alone)) {
                Ok(text) => results.fact(format!("where the time goes on a {what}: {}", job.name), text),
                Err(e) => results.failed(&format!("where the time goes: {}", job.name), &e),
            }
        }
        Ok(())
    }

    /// What a write takes longer by capture, and what of it is ours by the kernel's own clocks.
    fn where_time_goes(&self, job: &Job, device: &Path, alone: f64) -> Result<String> {
        let recording = self.record(device)?;
        let stats = BpfStats::on()?;
        let before = bpf_time(recording.program.id())?;
        let on = self.fio(job, device)?;
        let after = bpf_time(recording.program.id())?;
        drop(stats);
        let taken = recording.end()?;
        let writes = on.2.max(1) as f64;
        let us = |rate: f64| f64::from(job.depth) * 1e6 / rate.max(1.0);
        Ok(format!(
            "a write took {:.1} µs alone and {:.1} µs captured and timed; our programs ran {:.1} times and {:.2} µs for it, the reader computed {:.2} µs for it on another CPU",
            us(alone),
            us(on.0),
            (after.1 - before.1) as f64 / writes,
            (after.0 - before.0) as f64 / 1000.0 / writes,
            taken.cpu_seconds * 1e6 / writes,
        ))
    }

    /// Writes per second, bytes written, writes.
    fn fio(&self, job: &Job, device: &Path) -> Result<(f64, u64, u64)> {
        let report = self.dir.join("fio.json");
        let mut command = Command::new(tools::need("fio")?);
        command.args(["--name=job", "--ioengine=libaio", "--direct=1", "--time_based", "--randrepeat=0"]);
        command.args(["--norandommap", "--output-format=json"]).args(job.args);
        command.arg(format!("--runtime={}", self.seconds)).arg(format!("--size={DISK_BYTES}"));
        command.arg(format!("--filename={}", device.display())).arg(format!("--output={}", report.display()));
        process::run(command, Duration::from_secs(u64::from(self.seconds) + 120))?.ok()?;
        let text = fs::read_to_string(&report)?;
        let value: Value = serde_json::from_str(text.find("\n{").map_or(text.as_str(), |at| &text[at..]))?;
        let side = &value["jobs"][0]["write"];
        Ok((
            side["iops"].as_f64().context("fio reports no rate")?,
            side["io_bytes"].as_u64().context("fio reports no bytes")?,
            side["total_ios"].as_u64().context("fio reports no count")?,
        ))
    }

    fn record(&self, device: &Path) -> Result<Recording> {
        let stop = self.dir.join("record-stop");
        let ready = stop.with_extension("ready");
        for file in [&stop, &ready] {
            if file.exists() {
                fs::remove_file(file)?;
            }
        }
        let mut command = Command::new(&self.recorder);
        command.arg("/dev/null").arg(&stop).arg(device);
        let mut program = Program::start("record", command, &self.dir.join("record.log"))?;
        wait_for("capture", LIMIT, || {
            program.expect_running()?;
            Ok(ready.exists().then_some(()))
        })?;
        Ok(Recording { program, stop })
    }
}

impl Recording {
    fn end(mut self) -> Result<Taken> {
        let cpu_seconds = process::cpu_seconds_of(self.program.id())?;
        let rss = self.program.rss()?;
        fs::write(&self.stop, b"")?;
        let status = self.program.wait(LIMIT)?;
        ensure!(status.success(), "the recorder ended with {status}: {}", self.program.tail());
        let said = self.program.output()?;
        let line = said.lines().rev().find(|l| l.starts_with('{')).context("the recorder said nothing")?;
        Ok(Taken { cpu_seconds, rss, counters: serde_json::from_str(line)? })
    }
}

/// Sorts them, too.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
