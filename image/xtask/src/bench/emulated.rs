//! What capture costs on a disk that takes exactly 100 µs: the kernel's null_blk with that completion time, in a guest.
//!
//! A kernel with modules is needed, so this is a guest, and in software emulation, where what a processor does takes ten times as long and more
//! while the disk's 100 µs stay what they are: the ratio shown is a lower bound of what a real host would keep.

use super::{
    Results,
    capture::{DELAY_US, GOAL, JOBS, Job, median},
};
use crate::deps::GUEST_KERNEL;
use anyhow::{Context, Result};
use hw_tests::{
    guest::{Guest, Initramfs, Kernel},
    record, tools,
};
use serde_json::Value;
use std::{fs, path::Path, time::Duration};

const STEP_MAX: Duration = Duration::from_secs(120);
const DISK_MIB: u32 = 256;

pub fn run(dir: &Path, cache: &Path, quick: bool, results: &mut Results) -> Result<()> {
    let kernel = Kernel::debian(GUEST_KERNEL, cache)?;
    let dir = dir.join("emulated");
    fs::create_dir_all(&dir)?;
    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.module(&kernel, "null_blk")?;
    initramfs.program(&tools::need("fio")?)?;
    initramfs.program(&record::recorder()?)?;
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.join("guest"), &[])?;
    // The disk that the module makes by itself has another latency: ours is made by configfs.
    guest.sh(
        &format!(
            "mount -t configfs none /sys/kernel/config; mount -t bpf none /sys/fs/bpf; d=/sys/kernel/config/nullb/nullb1; mkdir $d && echo {DISK_MIB} >$d/size && \
             echo 2 >$d/irqmode && echo {} >$d/completion_nsec && echo 2 >$d/queue_mode && echo 2 >$d/submit_queues && echo 1 >$d/power && ls /dev/nullb*",
            DELAY_US * 1000
        ),
        STEP_MAX,
    )?;
    // Named by its folder on newer kernels, counted on older ones.
    let device = "/dev/nullb1";
    guest
        .sh(&format!("[ $(cat /sys/block/nullb1/size) -eq {} ]", DISK_MIB << 11), STEP_MAX)
        .context("null_blk made no disk")?;
    let (rounds, seconds) = if quick { (2, 2) } else { (5, 4) };
    for job in JOBS {
        let (mut ratios, mut alone, mut drops) = (vec![], vec![], 0);
        for _ in 0..rounds {
            let off = fio(&mut guest, job, device, seconds)?;
            guest.sh(
                &format!(
                    "rm -f /tmp/stop /tmp/stop.ready; (/programs/record /dev/null /tmp/stop {device} >/tmp/record 2>&1; touch /tmp/record.done) & \
                     n=0; while ! [ -e /tmp/stop.ready ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; [ -e /tmp/stop.ready ] || {{ cat /tmp/record; false; }}"
                ),
                STEP_MAX,
            )?;
            let on = fio(&mut guest, job, device, seconds)?;
            let said = guest.sh(
                "touch /tmp/stop; n=0; while ! [ -e /tmp/record.done ] && [ $n -lt 60 ]; do n=$((n+1)); sleep 1; done; rm /tmp/record.done && cat /tmp/record",
                STEP_MAX,
            )?;
            let line = said
                .lines()
                .rev()
                .find(|l| l.starts_with('{'))
                .with_context(|| format!("the recorder said {said:?}"))?;
            let counters: Value = serde_json::from_str(line)?;
            drops += counters["drops"].as_u64().context("no count of drops")?;
            ratios.push(on / off);
            alone.push(off);
        }
        let ratio = median(&mut ratios);
        let verdict = if ratio >= GOAL { "met" } else { "**missed**" };
        results.fact(
            format!("capture on null_blk of {DELAY_US} µs in an emulated guest: {}", job.name),
            format!(
                "{ratio:.3} of {:.0}/s without ({rounds} rounds, {:.3} to {:.3}); goal {GOAL} {verdict}; {drops} writes dropped",
                median(&mut alone),
                ratios[0],
                ratios[ratios.len() - 1],
            ),
        );
    }
    guest.power_off()?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// Writes per second.
fn fio(guest: &mut Guest, job: &Job, device: &str, seconds: u32) -> Result<f64> {
    let said = guest.sh(
        &format!(
            "/programs/fio --name=job --ioengine=libaio --direct=1 --time_based --randrepeat=0 --norandommap --output-format=json {} --runtime={seconds} --filename={device}",
            job.args.join(" ")
        ),
        STEP_MAX,
    )?;
    let from = said.find('{').with_context(|| format!("fio said {said:?}"))?;
    let value: Value = serde_json::from_str(&said[from..]).with_context(|| format!("fio said {said:?}"))?;
    value["jobs"][0]["write"]["iops"].as_f64().context("fio reports no rate")
}
