//! Load in a guest. `acks DEVICE OFFSET SEED OUT` writes a [`load::Sequence`] and appends each number to OUT once the write has returned;
//! `stall FILE SECONDS` writes and syncs one block after the other and says how long the longest took; `latency FILE COUNT` says how
//! long a synced block takes, at half and at 99 of 100; `past DEVICE SECTOR` writes a sector
//! by a SCSI command of its own, past the block layer; `flags DEVICE` writes a block at 1 MiB that is durable when it returns, one at 2 MiB and
//! a flush after it, discards 1 MiB at 4 MiB, and zeroes 1 MiB at 8 MiB.

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
        ["latency", file, count] => latency(file, count.parse()?),
        ["past", device, sector] => past(device, sector.parse()?),
        ["flags", device] => flags(device),
        other => bail!("not understood: {other:?}"),
    }
}

fn latency(file: &str, count: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(file).context("open the file")?;
    let (mut block, mut took) = (Aligned([7; BLOCK]), Vec::new());
    // The first ones warm up.
    for i in 0..count + 20 {
        block.0[..8].copy_from_slice(&i.to_le_bytes());
        let begun = Instant::now();
        file.write_all_at(&block.0, i * 37 % 1024 * BLOCK as u64).and_then(|()| file.sync_data()).context("write")?;
        if i >= 20 {
            took.push(begun.elapsed().as_micros() as u64);
        }
    }
    took.sort_unstable();
    let at = |share: usize| took.get(took.len() * share / 100).copied().unwrap_or(0);
    println!("{{\"writes\":{count},\"p50_us\":{},\"p99_us\":{}}}", at(50), at(99));
    Ok(())
}

/// The kernel's `sg_io_hdr`.
#[repr(C)]
struct SgIo {
    interface: i32,
    direction: i32,
    command_len: u8,
    sense_max: u8,
    segments: u16,
    len: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack: i32,
    user: *mut u8,
    status: u8,
    masked: u8,
    message: u8,
    sense_len: u8,
    host: u16,
    driver: u16,
    residue: i32,
    duration: u32,
    info: u32,
}

fn past(device: &str, sector: u32) -> Result<()> {
    use std::os::fd::AsRawFd;
    const SG_IO: libc::c_ulong = 0x2285;
    let device = OpenOptions::new().read(true).write(true).open(device).context("open the device")?;
    let mut data = [0xa7u8; 512];
    let mut sense = [0u8; 64];
    // WRITE(10) of one sector.
    let mut command = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    command[2..6].copy_from_slice(&sector.to_be_bytes());
    // SAFETY: zeroes are a valid value of each field.
    let mut io: SgIo = unsafe { std::mem::zeroed() };
    io.interface = i32::from(b'S');
    // To the device.
    io.direction = -2;
    (io.command_len, io.command) = (command.len() as u8, command.as_ptr());
    (io.sense_max, io.sense) = (sense.len() as u8, sense.as_mut_ptr());
    (io.len, io.data) = (data.len() as u32, data.as_mut_ptr());
    io.timeout_ms = 20_000;
    // SAFETY: the struct has the kernel's layout, and what it points to lives longer than the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), SG_IO, &raw mut io) };
    if done != 0 || io.status != 0 || io.host != 0 {
        bail!("SG_IO: {done}, status {:#x}, host {:#x}, {}", io.status, io.host, std::io::Error::last_os_error());
    }
    Ok(())
}

fn flags(device: &str) -> Result<()> {
    use std::os::fd::AsRawFd;
    const BLKDISCARD: libc::c_ulong = 0x1277;
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    const MIB: u64 = 1 << 20;
    let open = |flags: i32| {
        OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | flags).open(device).context("open the device")
    };
    let block = Aligned([9; BLOCK]);
    open(libc::O_DSYNC)?.write_all_at(&block.0, MIB).context("a durable write")?;
    let device = open(0)?;
    device.write_all_at(&block.0, 2 * MIB).and_then(|()| device.sync_data()).context("a write and a flush")?;
    for (what, at) in [(BLKDISCARD, 4 * MIB), (BLKZEROOUT, 8 * MIB)] {
        let range = [at, MIB];
        // SAFETY: a valid descriptor, and the two numbers that both requests take.
        if unsafe { libc::ioctl(device.as_raw_fd(), what, range.as_ptr()) } != 0 {
            bail!("request {what:#x} at {at}: {}", std::io::Error::last_os_error());
        }
    }
    Ok(())
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
