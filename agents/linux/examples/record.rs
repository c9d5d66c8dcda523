//! Records what `bpf-rq` captures, for tests in guests: `record OUT STOP DISK…` begins to capture the disks, makes the file
//! `STOP.ready`, and writes every request to `OUT` (a file or a whole disk) until the file `STOP` is there; then it prints the
//! counters as JSON. `HOLDFAST_CAPTURE` names the backend, if not the one that fits this kernel best. The test replays the record and compares it with the disks, outside of the guest.
//!
//! Format, all numbers little-endian: per request `fe ed`, operation (0 write, 1 zero, 2 discard, 3 flush, and 64 if the request carries PREFLUSH, 128 if FUA; 255: a loss, by range), disk
//! number, u32 count of extents, each u64 sector and u64 sectors, u64 length of data, data. `ed fe` ends it.

use agent_linux::capture::{Captured, DevNo, Op, Target, bpf, choose};
use model::Extent;
use std::{
    fs::File,
    io::{BufWriter, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(out), Some(stop)) = (args.next(), args.next()) else { anyhow::bail!("record OUT STOP DISK…") };
    let mut targets = Vec::new();
    let mut first = None;
    for disk in args {
        let meta = std::fs::metadata(&disk)?;
        anyhow::ensure!(meta.file_type().is_block_device(), "{} is not a disk", disk.display());
        let number = DevNo { major: libc::major(meta.rdev()), minor: libc::minor(meta.rdev()) };
        let sectors = File::open(&disk)?.seek(std::io::SeekFrom::End(0))? / 512;
        first.get_or_insert((disk, number));
        targets.push(Target { disk: number, sectors, ranges: vec![Extent::new(0, sectors)], skips: Vec::new() });
    }
    let options = bpf::Options { pins: "/sys/fs/bpf/holdfast-record".into(), ring_bytes: 64 << 20 };
    // One that was killed left its capture behind.
    if let Some(pins) = bpf::Pins::existing(&options.pins) {
        pins.clear()?;
    }
    let on = first.as_ref().map(|(path, number)| (path.as_path(), *number));
    let choice = match std::env::var("HOLDFAST_CAPTURE").as_deref() {
        Ok("bpf-legacy") => choose::Choice::BpfLegacy,
        Ok("bpf-rq") => choose::Choice::BpfRq,
        _ => choose::Choice::BpfRq,
    };
    let mut capture = choose::start(&options, on, choice).map_err(|e| anyhow::anyhow!(agent_linux::error_chain(&e)))?;
    let ids = capture.set_targets(&targets)?;
    File::create(ready(&stop))?;
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&out)?;
    let mut to = BufWriter::with_capacity(1 << 20, file);
    let mut last_round = false;
    let (mut requests, mut lost) = (0u64, 0u64);
    loop {
        let mut events = Vec::new();
        let polled = capture.poll(4 << 20, true, agent_linux::clock::mono(), &mut events)?;
        for event in &events {
            match event {
                Captured::Request(r) => {
                    requests += 1;
                    let op = match r.op {
                        Op::Write => 0,
                        Op::Zero => 1,
                        Op::Discard => 2,
                        Op::Flush => 3,
                    };
                    let op = op | if r.preflush { 64 } else { 0 } | if r.fua { 128 } else { 0 };
                    write(&mut to, op, ids.iter().position(|id| *id == r.target), &r.extents, &r.data)?;
                }
                Captured::Lost { target, extents, .. } => {
                    lost += 1;
                    write(&mut to, 255, ids.iter().position(|id| id == target), extents, &[])?;
                }
                Captured::Done { .. } => {}
            }
        }
        capture.release(polled.position);
        if !polled.more {
            if last_round {
                break;
            }
            // What was issued before the file came is in the ring by now: one more round takes it.
            last_round = stop.exists();
            thread::sleep(Duration::from_millis(2));
        }
    }
    to.write_all(&[0xed, 0xfe])?;
    let file = to.into_inner()?;
    // Not for /dev/null, where the bench sends everything.
    if !file.metadata()?.file_type().is_char_device() {
        file.sync_all()?;
    }
    let c = capture.counters()?;
    println!(
        "{}",
        serde_json::json!({
            "backend": capture.name(), "requests": requests, "lost": lost, "drops": c.drops, "faults": c.faults, "truncated": c.truncated,
            "passthrough": c.passthrough, "in_flight": capture.in_flight(),
        })
    );
    capture.remove()?;
    Ok(())
}

fn ready(stop: &Path) -> PathBuf {
    stop.with_extension("ready")
}

fn write(to: &mut impl Write, op: u8, disk: Option<usize>, extents: &[Extent], data: &[u8]) -> anyhow::Result<()> {
    let disk = u8::try_from(disk.ok_or_else(|| anyhow::anyhow!("a request of a disk that was not asked for"))?)?;
    to.write_all(&[0xfe, 0xed, op, disk])?;
    to.write_all(&u32::try_from(extents.len())?.to_le_bytes())?;
    for e in extents {
        to.write_all(&e.start().to_le_bytes())?;
        to.write_all(&e.sectors.0.to_le_bytes())?;
    }
    to.write_all(&(data.len() as u64).to_le_bytes())?;
    to.write_all(data)?;
    Ok(())
}
