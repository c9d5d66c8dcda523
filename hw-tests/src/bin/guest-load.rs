//! Load in a guest. `acks DEVICE OFFSET SEED OUT` writes a [`load::Sequence`] and appends each number to OUT once the write has returned;
//! `stall FILE SECONDS` writes and syncs one block after the other and says how long the longest took.

use anyhow::{Context, Result, bail};
use hw_tests::load::{self, BLOCK};
use std::{
    env,
    fs::OpenOptions,
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

/// Both end when this file is there.
const STOP: &str = "/tmp/stop-load";

/// A block where O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["acks", device, offset, seed, out] => acks(device, offset.parse()?, seed.parse()?, out),
        ["stall", file, seconds] => stall(file, seconds.parse()?),
        other => bail!("not understood: {other:?}"),
    }
}

fn acks(device: &str, offset: u64, seed: u64, out: &str) -> Result<()> {
    let device = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device).context("open the device")?;
    let mut out = OpenOptions::new().append(true).create(true).open(out).context("open the list")?;
    let mut sequence = load::Sequence::new(seed);
    let mut block = Aligned([0; BLOCK]);
    while !Path::new(STOP).exists() {
        let (number, slot) = sequence.next_write();
        block.0.copy_from_slice(&load::content(seed, number, slot));
        device.write_all_at(&block.0, offset + slot * BLOCK as u64).with_context(|| format!("write {number}"))?;
        out.write_all(format!("{seed} {number}\n").as_bytes()).context("say so")?;
    }
    Ok(())
}

fn stall(file: &str, seconds: u64) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(file)
        .context("open the file")?;
    let block = Aligned([7; BLOCK]);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut count, mut errors, mut longest, mut sum) = (0u64, 0u64, Duration::ZERO, Duration::ZERO);
    while Instant::now() < end && !Path::new(STOP).exists() {
        let begun = Instant::now();
        let wrote = file.write_all_at(&block.0, count % 64 * BLOCK as u64).and_then(|()| file.sync_data());
        errors += u64::from(wrote.is_err());
        let took = begun.elapsed();
        longest = longest.max(took);
        sum += took;
        count += 1;
    }
    let mean_us = sum.as_micros() as u64 / count.max(1);
    println!("{{\"writes\":{count},\"errors\":{errors},\"mean_us\":{mean_us},\"longest_ms\":{}}}", longest.as_millis());
    Ok(())
}
