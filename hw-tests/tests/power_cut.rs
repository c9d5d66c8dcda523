//! Power cuts under the real disk: ext4 on a device whose every write is recorded, cut anywhere, opened again.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch,
    guest::{Guest, Initramfs, Kernel},
    power::Log,
    product::Binaries,
    tools,
};
use std::{fs, path::PathBuf, time::Duration};

const STEP_MAX: Duration = Duration::from_secs(200);
const DISK_BYTES: u64 = 48 << 20;
const LOG_BYTES: u64 = 512 << 20;
const RECORDS: u64 = 1500;
/// Each is a disk of the second guest.
const CUTS: usize = 8;
/// Looked at for one cut.
const PLACES: usize = 40;
const SEED: u64 = 20_261_122;
const MARK: &str = "durable";

/// A guest that records what the journal writes; returns the log.
fn record(dir: &Scratch, kernel: &Kernel, program: &std::path::Path) -> Result<Log> {
    let (disk, log) = (dir.path().join("disk.img"), dir.path().join("log.img"));
    fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    fs::File::create(&log)?.set_len(LOG_BYTES)?;
    let mut initramfs = Initramfs::new(kernel)?;
    initramfs.module(kernel, "dm-log-writes")?;
    for tool in ["dmsetup", "mke2fs"] {
        initramfs.program(&tools::need(tool)?)?;
    }
    initramfs.program(program)?;
    let drive = |file: &std::path::Path| format!("file={},if=virtio,format=raw,cache=writeback", file.display());
    let (disk, recorded) = (drive(&disk), drive(&log));
    let args = ["-drive", &disk, "-drive", &recorded];
    let mut guest = Guest::boot(kernel, &initramfs, &dir.path().join("writer"), &args)?;
    let table = "echo \"0 $(cat /sys/block/vda/size) log-writes /dev/vda /dev/vdb\"";
    guest.sh(&format!("{table} | /programs/dmsetup --noudevsync create rec"), STEP_MAX)?;
    // No discards: a disk of zeroes is what the replay begins with anyway.
    guest.sh("/programs/mke2fs -q -t ext4 -E nodiscard -J size=4 /dev/dm-0 && mount /dev/dm-0 /mnt", STEP_MAX)?;
    let mark = "/programs/dmsetup message rec 0 mark";
    let said = guest.sh(&format!("/programs/power_cut write /mnt {SEED} {RECORDS} {mark}"), STEP_MAX)?;
    ensure!(said.contains("written through"), "{said}");
    println!("{}", said.trim());
    guest.sh(&format!("{mark} end && sync"), STEP_MAX)?;
    guest.power_off()?;
    Log::read(&log)
}

#[test]
fn a_journal_on_a_real_file_system_survives_power_cuts_at_any_write() -> Result<()> {
    let dir = Scratch::new()?;
    let program = Binaries::beside_us()?.example("power_cut")?;
    let kernel =
        Kernel::debian("linux-image-amd64", &PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest"))?;
    let log = record(&dir, &kernel, &program)?;
    let marks = log.marks();
    let first = marks.iter().position(|(_, text)| text.starts_with(MARK)).context("nothing became durable")?;
    let durable_marks = marks.len() - first;
    ensure!(durable_marks > 30, "only {durable_marks} promises: the cuts would all be alike");

    // Half of the cuts come right behind a promise, where nothing of what was promised may be missing; the others where most may be lost.
    let mut draw = Draw::new(SEED);
    let (mut cuts, mut drives, mut lost) = (Vec::new(), Vec::new(), 0);
    for n in 0..CUTS {
        let at = if n % 2 == 0 {
            marks[first + draw.below((marks.len() - first) as u64) as usize].0 + 1
        } else {
            // Where much may be lost: on a quick disk most places are right behind a flush.
            let from = marks[first].0 + 1;
            let drawn: Vec<usize> =
                (0..PLACES).map(|_| from + draw.below((log.len() - from) as u64) as usize).collect();
            drawn.into_iter().max_by_key(|at| log.at_risk(*at)).context("no place")?
        };
        let image = dir.path().join(format!("cut-{n}.img"));
        fs::File::create(&image)?.set_len(DISK_BYTES)?;
        lost += log.at(at, &mut draw, &image)?;
        let durable = log.last_mark(at, MARK)?.context("a cut before the first promise")?;
        cuts.push((at, durable));
        drives.extend(["-drive".to_owned(), format!("file={},if=virtio,format=raw", image.display())]);
    }
    ensure!(lost > 0, "seed {SEED}: no cut lost a write, nothing was tried");

    let mut initramfs = Initramfs::new(&kernel)?;
    initramfs.program(&program)?;
    let args: Vec<&str> = drives.iter().map(String::as_str).collect();
    let mut guest = Guest::boot(&kernel, &initramfs, &dir.path().join("reader"), &args)?;
    for (n, (at, durable)) in cuts.iter().enumerate() {
        let device = format!("/dev/vd{}", char::from(b'a' + n as u8));
        let line = format!("mount {device} /mnt && /programs/power_cut check /mnt {SEED} {durable} && umount /mnt");
        let said = guest.sh(&line, STEP_MAX).with_context(|| {
            format!("seed {SEED}: cut {n} after entry {at} of {}, durable through LSN {durable}", log.len())
        })?;
        ensure!(said.contains("ok "), "cut {n}: {said}");
    }
    guest.power_off()?;
    dir.done()
}
