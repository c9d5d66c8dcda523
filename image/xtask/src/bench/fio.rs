//! fio: one job, its result.

use crate::nobody;
use anyhow::{Context, Result};
use hw_tests::{process, tools};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    time::Duration,
};

/// What the job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub name: &'static str,
    /// fio's `rw`.
    pub pattern: &'static str,
    pub block: &'static str,
    /// Each has one request outstanding.
    pub workers: u32,
}

/// Durable writes.
pub const WRITES: &[Job] = &[
    Job { name: "4 KiB random, 1 writer", pattern: "randwrite", block: "4k", workers: 1 },
    Job { name: "4 KiB random, 16 writers", pattern: "randwrite", block: "4k", workers: 16 },
    Job { name: "4 KiB random, 64 writers", pattern: "randwrite", block: "4k", workers: 64 },
    Job { name: "1 MiB sequential, 4 writers", pattern: "write", block: "1m", workers: 4 },
];

pub const READS: &[Job] = &[
    Job { name: "4 KiB random read, 16 readers", pattern: "randread", block: "4k", workers: 16 },
    Job { name: "1 MiB sequential read, 1 reader", pattern: "read", block: "1m", workers: 1 },
];

/// Where the job goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file or device, around the page cache.
    Direct(PathBuf),
    /// An NBD export. With a home, certificates come from there: libnbd looks below HOME for everyone but root.
    Nbd { uri: String, home: Option<Rc<nobody::Folder>> },
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    pub per_second: f64,
    pub bytes: u64,
    /// From submission to durable, 99 of 100.
    pub p99_us: f64,
}

/// One job. The first second warms up and does not count, unless `whole`.
pub fn run(job: &Job, target: &Target, bytes: u64, seconds: u32, whole: bool, out: &Path) -> Result<Outcome> {
    let fio = tools::need("fio")?;
    let home = if let Target::Nbd { home: Some(home), .. } = target { Some(home) } else { None };
    let mut command = match home {
        Some(_) if tools::is_root() => nobody::step_down()?,
        _ => Command::new("env"),
    };
    let report = home.map_or_else(|| out.to_owned(), |h| h.path().join("fio.json"));
    command.arg(fio).args([
        "--name=job",
        "--thread",
        "--group_reporting",
        "--time_based",
        "--iodepth=1",
        "--randrepeat=0",
    ]);
    command.args(["--refill_buffers", "--norandommap", "--output-format=json"]);
    command.arg(format!("--output={}", report.display()));
    command
        .arg(format!("--rw={}", job.pattern))
        .arg(format!("--bs={}", job.block))
        .arg(format!("--numjobs={}", job.workers));
    command.arg(format!("--runtime={seconds}")).arg(format!("--ramp_time={}", u32::from(!whole)));
    if job.pattern == "write" || job.pattern == "read" {
        // Each in its own part, or they would write the same block one after the other.
        let part = bytes / u64::from(job.workers);
        command.arg(format!("--size={part}")).arg(format!("--offset_increment={part}"));
    } else {
        command.arg(format!("--size={bytes}"));
    }
    match target {
        Target::Direct(path) => {
            command
                .args(["--ioengine=psync", "--direct=1", "--fdatasync=1"])
                .arg(format!("--filename={}", path.display()));
        }
        Target::Nbd { uri, home } => {
            command.args(["--ioengine=nbd", "--fsync=1"]).arg(format!("--uri={uri}"));
            if let Some(home) = home {
                command.env("HOME", home.path()).current_dir(home.path());
            }
        }
    }
    process::run(command, Duration::from_secs(u64::from(seconds) + 120))?.ok()?;
    parse(&fs::read_to_string(report)?, job.pattern.ends_with("write"))
}

/// fio writes chatter of its engines before the JSON.
fn parse(text: &str, write: bool) -> Result<Outcome> {
    let json = text.find("\n{").map_or(text, |at| &text[at..]);
    let value: Value = serde_json::from_str(json).context("fio's output")?;
    let job = &value["jobs"][0];
    let side = if write { &job["write"] } else { &job["read"] };
    let per_second = side["iops"].as_f64().context("fio reports no rate")?;
    let p99 = |v: &Value| v["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1000.0;
    // The write, and then its flush.
    let p99_us = p99(&side["clat_ns"]) + if write { p99(&job["sync"]["lat_ns"]) } else { 0.0 };
    Ok(Outcome { per_second, bytes: side["io_bytes"].as_u64().unwrap_or(0), p99_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_read_behind_the_chatter() {
        let text = "fio: connected to NBD server\n{\"jobs\":[{\"write\":{\"iops\":12.5,\"io_bytes\":4096,\"clat_ns\":{\"percentile\":{\"99.000000\":2000}}},\"sync\":{\"lat_ns\":{\"percentile\":{\"99.000000\":3000}}}}]}";
        assert_eq!(parse(text, true).unwrap(), Outcome { per_second: 12.5, bytes: 4096, p99_us: 5.0 });
        assert!(parse("fio: no server\n", true).is_err());
    }
}
