//! Capture proved on what runs on real hosts: three file systems, several disks as one order, a database, a disk without a request
//! queue, a disk that fails. Everything is compared bit for bit.

mod common;

use agent_linux::{
    capture::{
        Capture, Captured, DevNo, LostWhy, Op, Request, Target,
        bpf::{self, BpfCapture},
    },
    disks::BioCapture,
};
use common::*;
use model::Extent;
use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Drains in a thread until told to stop, then once more to the end.
struct Collector {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<(BpfCapture, Vec<Captured>)>,
}

impl Collector {
    fn start(mut capture: BpfCapture) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || {
            let mut out = Vec::new();
            while !told.load(Ordering::Acquire) {
                let polled = capture.poll(8 << 20, true, mono(), &mut out).unwrap();
                capture.release(polled.position);
                if !polled.more {
                    thread::sleep(Duration::from_micros(500));
                }
            }
            drain(&mut capture, &mut out);
            (capture, out)
        });
        Self { stop, thread }
    }

    /// All that was captured; nothing may have been lost.
    fn finish(self) -> (BpfCapture, Vec<Request>) {
        let (capture, events) = self.finish_with_losses();
        let lost: Vec<_> = events.iter().filter(|e| matches!(e, Captured::Lost { .. })).collect();
        assert!(lost.is_empty(), "{lost:?}");
        let counters = capture.counters().unwrap();
        assert_eq!((counters.drops, counters.faults, counters.truncated), (0, 0, 0), "{counters:?}");
        let take = |e| if let Captured::Request(r) = e { Some(r) } else { None };
        (capture, events.into_iter().filter_map(take).collect())
    }

    fn finish_with_losses(self) -> (BpfCapture, Vec<Captured>) {
        self.stop.store(true, Ordering::Release);
        let (mut capture, mut events) = self.thread.join().unwrap();
        // What went unseen is known to be over within seconds of rest.
        let deadline = Instant::now() + Duration::from_secs(30);
        while capture.in_flight() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
            drain(&mut capture, &mut events);
        }
        (capture, events)
    }
}

/// A file system under test.
struct FileSystem {
    name: &'static str,
    mib: u64,
    make: &'static [&'static str],
    check: &'static [&'static str],
    cuts: usize,
}

const EXT4: FileSystem =
    FileSystem { name: "ext4", mib: 64, make: &["mkfs.ext4", "-q", "-F"], check: &["e2fsck", "-fn"], cuts: 40 };
/// mkfs.xfs makes none smaller than 300 MiB.
const XFS: FileSystem =
    FileSystem { name: "xfs", mib: 320, make: &["mkfs.xfs", "-q", "-f"], check: &["xfs_repair", "-n"], cuts: 30 };
const BTRFS: FileSystem = FileSystem {
    name: "btrfs",
    mib: 160,
    make: &["mkfs.btrfs", "-q", "-f"],
    check: &["btrfs", "check", "--readonly"],
    cuts: 30,
};

impl FileSystem {
    fn known(&self) -> bool {
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let ok = known.lines().any(|l| l.split_whitespace().last() == Some(self.name));
        if !ok {
            println!("SKIPPED: cuts of {}: this kernel has no {}", self.name, self.name);
        }
        ok
    }
    fn run(&self, tool: &[&str], device: &Path) -> String {
        let mut args = tool[1..].to_vec();
        args.push(device.to_str().unwrap());
        run(tool[0], &args)
    }
}

/// Files made, overwritten, synced and removed beside the ordered writer.
fn workload(at: &Path, ordered: u64) {
    let dir = at.to_owned();
    let writer = thread::spawn(move || write_ordered(&dir, ordered));
    fio(at, &["--name=buf", "--rw=randwrite", "--bs=16k", "--size=12m", "--fsync=16", "--io_size=12m"]);
    fio(
        at,
        &[
            "--name=dio",
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
            "--size=4m",
            "--io_size=4m",
            "--ioengine=libaio",
            "--iodepth=16",
        ],
    );
    for i in 0..40 {
        let path = at.join(format!("small-{}", i % 8));
        std::fs::write(&path, vec![i as u8; 3000 * (i + 1)]).unwrap();
        if i % 5 == 4 {
            File::open(&path).unwrap().sync_all().unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }
    writer.join().unwrap();
}

/// Each cut mounts, passes its check and keeps A before B; all of it is the disk.
fn cuts_of(fs: &FileSystem, seed: u64) {
    if !root(&format!("cuts of {}", fs.name)) || !fs.known() {
        return;
    }
    let disk = Loop::new(fs.mib);
    fs.run(fs.make, &disk.device);
    let before = disk.image();
    let pins = PinDir::new(fs.name);
    let collector = Collector::start(start(&pins, 64, &disk));
    {
        let mount = Mount::new(&disk.device).unwrap();
        workload(&mount.at, 120);
        run("sync", &["-f", mount.at.to_str().unwrap()]);
    }
    let after = disk.image();
    let (_, requests) = collector.finish();
    let mut image = before;
    {
        let mut whole = image.clone();
        requests.iter().for_each(|r| apply(&mut whole, r));
        assert_eq!(first_difference(&whole, &after), None, "{}", fs.name);
    }
    // The same file system twice is refused by some kernels.
    drop(disk);
    let mut rng = Rng::new(seed);
    let mut cuts: Vec<usize> = (0..fs.cuts).map(|_| rng.below(requests.len() as u64 + 1) as usize).collect();
    cuts.sort_unstable();
    let (mut applied, mut with_data) = (0, 0);
    for cut in cuts {
        requests[applied..cut].iter().for_each(|r| apply(&mut image, r));
        applied = cut;
        let at = format!("{}, seed {seed}, cut {cut} of {}", fs.name, requests.len());
        let copy = Loop::of_image(&image);
        {
            let mount = Mount::new(&copy.device).unwrap_or_else(|e| panic!("{at}: mount: {e}"));
            let (a, b) = read_ordered(&mount.at);
            let (a, b) = (a.unwrap_or(0), b.unwrap_or(0));
            assert!(a >= b && a <= b + 1, "{at}: A={a} B={b}");
            with_data += u64::from(a > 0);
        }
        println!("{at}");
        fs.run(fs.check, &copy.device);
    }
    assert!(with_data > 0, "seed {seed}: no cut fell into the workload");
}

#[test]
fn root_forty_cuts_of_ext4_are_crash_images() {
    cuts_of(&EXT4, 11);
}

#[test]
fn root_thirty_cuts_of_xfs_are_crash_images() {
    cuts_of(&XFS, 12);
}

#[test]
fn root_thirty_cuts_of_btrfs_are_crash_images() {
    cuts_of(&BTRFS, 13);
}

#[test]
fn root_several_disks_are_one_order() {
    if !root("several disks") {
        return;
    }
    let disks = [Loop::new(48), Loop::new(48), Loop::new(32)];
    disks[..2].iter().for_each(|d| drop(run("mkfs.ext4", &["-q", "-F", d.dev()])));
    let before: Vec<Vec<u8>> = disks.iter().map(Loop::image).collect();
    let pins = PinDir::new("several");
    let mut capture = start(&pins, 64, &disks[0]);
    let targets: Vec<Target> = disks.iter().map(Loop::target).collect();
    let ids = capture.set_targets(&targets).unwrap();
    let collector = Collector::start(capture);
    {
        let (one, two) = (Mount::new(&disks[0].device).unwrap(), Mount::new(&disks[1].device).unwrap());
        let raw =
            OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(&disks[2].device).unwrap();
        let open = |dir: &Path, name: &str| {
            OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(name)).unwrap()
        };
        let (a, b) = (open(&one.at, "A"), open(&two.at, "B"));
        let mut block = durable::AlignedBuf::with_capacity(4096);
        // A on the first disk, then B on the second, then C on the third without a file system.
        for i in 1..=150u64 {
            let mut bytes = vec![0u8; 4096];
            bytes[..8].copy_from_slice(&i.to_le_bytes());
            a.write_all_at(&bytes, 0).unwrap();
            a.sync_data().unwrap();
            b.write_all_at(&bytes, 0).unwrap();
            b.sync_data().unwrap();
            block.clear();
            block.extend_from_slice(&bytes);
            raw.write_all_at(block.as_slice(), 0).unwrap();
        }
    }
    let after: Vec<Vec<u8>> = disks.iter().map(Loop::image).collect();
    let (_, requests) = collector.finish();
    let place = |r: &Request| ids.iter().position(|id| *id == r.target).unwrap();
    let replay = |upto: usize| {
        let mut images = before.clone();
        requests[..upto].iter().for_each(|r| apply(&mut images[place(r)], r));
        images
    };
    let whole = replay(requests.len());
    whole.iter().zip(&after).enumerate().for_each(|(i, (x, y))| assert_eq!(first_difference(x, y), None, "disk {i}"));
    let seed = 21;
    let mut rng = Rng::new(seed);
    for _ in 0..12 {
        let cut = rng.below(requests.len() as u64) as usize;
        let images = replay(cut);
        let read = |image: &[u8], name: usize| {
            let copy = Loop::of_image(image);
            let counters = read_ordered(&Mount::new(&copy.device).unwrap().at);
            run("e2fsck", &["-fn", copy.dev()]);
            [counters.0, counters.1][name].unwrap_or(0)
        };
        let (a, b) = (read(&images[0], 0), read(&images[1], 1));
        let c = u64::from_le_bytes(images[2][..8].try_into().unwrap());
        assert!(a >= b && b >= c && a <= c + 1, "seed {seed} cut {cut}: A={a} B={b} C={c}");
    }
}

#[test]
fn root_a_copy_taken_under_load_becomes_the_disk_by_replay() {
    if !root("fuzzy copy") {
        return;
    }
    let disk = Loop::new(64);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mount = Mount::new(&disk.device).unwrap();
    let pins = PinDir::new("fuzzy");
    let collector = Collector::start(start(&pins, 64, &disk));
    let at = mount.at.clone();
    let writer = thread::spawn(move || workload(&at, 100));
    // Round and round until the writer ends; the last copy counts.
    let mut copy = vec![0u8; 64 << 20];
    let from = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&disk.device).unwrap();
    let mut buffer = durable::AlignedBuf::with_capacity(1 << 20);
    buffer.extend_from_slice(&vec![0; 1 << 20]);
    loop {
        for (i, part) in copy.chunks_mut(1 << 20).enumerate() {
            from.read_exact_at(buffer.as_mut_slice(), (i as u64) << 20).unwrap();
            part.copy_from_slice(buffer.as_slice());
        }
        if writer.is_finished() {
            break;
        }
    }
    writer.join().unwrap();
    drop((from, mount));
    let after = disk.image();
    let (_, requests) = collector.finish();
    requests.iter().for_each(|r| apply(&mut copy, r));
    assert_eq!(first_difference(&copy, &after), None);
}

/// A file system in memory that is full after a few blocks: the loop disk over a file on it then fails writes.
struct SmallTmpfs(PathBuf, #[allow(dead_code, reason = "kept for its drop")] tempfile::TempDir);

impl SmallTmpfs {
    fn new(kib: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("hf-full-").tempdir().unwrap();
        let at = dir.path().join("t");
        std::fs::create_dir(&at).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs", at.to_str().unwrap()]);
        Self(at, dir)
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn root_what_the_disk_failed_to_write_is_read_again() {
    if !root("write errors") {
        return;
    }
    let full = SmallTmpfs::new(4096);
    let disk = Loop::on(&full.0.join("disk.img"), 32);
    let before = disk.image();
    let pins = PinDir::new("errors");
    let collector = Collector::start(start(&pins, 64, &disk));
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&disk.device).unwrap();
    let mut buffer = durable::AlignedBuf::with_capacity(65536);
    let mut failed = model::ExtentSet::new();
    for i in 0..128u64 {
        buffer.clear();
        buffer.extend_from_slice(&vec![i as u8 + 1; 65536]);
        if file.write_all_at(buffer.as_slice(), i * 65536).is_err() {
            failed.insert(Extent::new(i * 128, 128));
        }
    }
    drop(file);
    assert!(!failed.is_empty(), "a disk of 4 MiB took 8 MiB");
    let after = disk.image();
    let (_, events) = collector.finish_with_losses();
    let (mut replica, mut lost) = (before, model::ExtentSet::new());
    for event in &events {
        match event {
            Captured::Request(r) => apply(&mut replica, r),
            Captured::Lost { extents, why, .. } => {
                assert_eq!(*why, LostWhy::WriteError, "{event:?}");
                extents.iter().for_each(|e| lost.insert(*e));
            }
            Captured::Done { .. } => {}
        }
    }
    assert!(first_difference(&replica, &after).is_some(), "the failed writes are not on the disk");
    for extent in failed.iter() {
        let told: u64 = lost.overlap(&extent).iter().map(|e| e.sectors.0).sum();
        assert_eq!(told, extent.sectors.0, "{extent:?} failed and is not told");
    }
    for extent in lost.iter() {
        let range = extent.lba.bytes() as usize..(extent.end() * 512) as usize;
        replica[range.clone()].copy_from_slice(&after[range]);
    }
    assert_eq!(first_difference(&replica, &after), None);
}

#[test]
fn root_two_hundred_pieces_of_a_spool_file_are_left_out() {
    if !root("pieces left out") {
        return;
    }
    let disk = Loop::new(64);
    let pins = PinDir::new("pieces");
    let mut capture = BpfCapture::start(&pins.options(8), Some((&disk.device, disk.no()))).unwrap();
    let mut target = disk.target();
    // In no order, as a file's pieces lie.
    target.skips = (0..200u64).map(|i| Extent::new((i * 77 % 200) * 512 + 256, 64)).collect();
    capture.set_targets(&[target.clone()]).unwrap();
    let seed = 31;
    let mut rng = Rng::new(seed);
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(&disk.device).unwrap();
    let mut buffer = durable::AlignedBuf::with_capacity(4096);
    buffer.extend_from_slice(&[7; 4096]);
    let mut want = Vec::new();
    for _ in 0..600 {
        let sector = rng.below(110_000 / 8) * 8;
        file.write_all_at(buffer.as_slice(), sector * 512).unwrap();
        let inside = target.skips.iter().any(|s| sector >= s.start() && sector + 8 <= s.end());
        if !inside {
            want.push(sector);
        }
    }
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    let seen: Vec<u64> = events
        .iter()
        .filter_map(|e| match e {
            Captured::Request(r) if r.op == Op::Write => Some(r.extents[0].start()),
            _ => None,
        })
        .collect();
    assert!(want.len() < 600, "seed {seed}: no write fell into a piece");
    assert_eq!(seen, want, "seed {seed}");
    target.skips = (0..300u64).map(|i| Extent::new(i * 200, 64)).collect();
    let refused = capture.set_targets(&[target]).unwrap_err().to_string();
    assert!(refused.contains("at most 256 excluded extents"), "{refused}");
}

/// A compressed disk in memory, which has no request queue.
struct Zram(PathBuf);

impl Zram {
    fn new(mib: u64) -> Option<Self> {
        let id = std::fs::read_to_string("/sys/class/zram-control/hot_add").ok()?;
        let this = Self(PathBuf::from(format!("/dev/zram{}", id.trim())));
        std::fs::write(this.sys().join("disksize"), format!("{mib}M")).unwrap();
        Some(this)
    }
    fn sys(&self) -> PathBuf {
        Path::new("/sys/block").join(self.0.file_name().unwrap())
    }
    fn dev(&self) -> &str {
        self.0.to_str().unwrap()
    }
    fn no(&self) -> DevNo {
        let rdev = std::fs::metadata(&self.0).unwrap().rdev();
        DevNo { major: libc::major(rdev), minor: libc::minor(rdev) }
    }
    fn image(&self) -> Vec<u8> {
        run("blockdev", &["--flushbufs", self.dev()]);
        std::fs::read(&self.0).unwrap()
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let id = self.dev().trim_start_matches("/dev/zram").to_owned();
        let gone = std::fs::write(self.sys().join("reset"), "1")
            .and_then(|()| std::fs::write("/sys/class/zram-control/hot_remove", id));
        if let Err(e) = gone {
            eprintln!("{} stays: {e}", self.dev());
        }
    }
}

#[test]
fn root_a_disk_without_a_request_queue_is_captured_at_its_bios() {
    if !root("bpf-bio") {
        return;
    }
    if let BioCapture::Not { why } = bpf::bio_capture() {
        println!("SKIPPED: bpf-bio: {why}");
        return;
    }
    let Some(disk) = Zram::new(96) else {
        println!("SKIPPED: bpf-bio: this kernel has no zram to try it on");
        return;
    };
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let before = disk.image();
    let sectors = before.len() as u64 / 512;
    let pins = PinDir::new("zram");
    let target = Target { disk: disk.no(), sectors, ranges: vec![Extent::new(0, sectors)], skips: vec![] };
    let mut capture = BpfCapture::start(&pins.options(64), Some((&disk.0, disk.no()))).unwrap_or_else(|e| {
        panic!("{}", agent_linux::error_chain(&e));
    });
    // A disk with a queue beside it: one order over both, and none is captured twice.
    let beside = Loop::new(16);
    let ids = capture.set_targets(&[target, beside.target()]).unwrap();
    assert!(pins.0.join("link-bio-queue").exists());
    let collector = Collector::start(capture);
    {
        let mount = Mount::new(&disk.0).unwrap();
        workload(&mount.at, 120);
        // Larger ones may be more than the kernel half walks, which is a loss that is told.
        fio(&mount.at, &["--name=big", "--rw=write", "--bs=1m", "--direct=1", "--size=16m"]);
        std::fs::remove_file(mount.at.join("big.0.0")).unwrap();
        run("sync", &["-f", mount.at.to_str().unwrap()]);
        run("fstrim", &[mount.at.to_str().unwrap()]);
        let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&beside.device).unwrap();
        let mut buffer = durable::AlignedBuf::with_capacity(4096);
        buffer.extend_from_slice(&[9; 4096]);
        (0..64u64).for_each(|i| file.write_all_at(buffer.as_slice(), i * 4096).unwrap());
    }
    let (after, after_beside) = (disk.image(), beside.image());
    let (mut capture, requests) = collector.finish();
    let mut replica = before.clone();
    requests.iter().filter(|r| r.target == ids[0]).for_each(|r| apply(&mut replica, r));
    assert_eq!(first_difference(&replica, &after), None);
    assert_eq!(capture.in_flight(), 0, "every bio completed");
    let mut other = vec![0; after_beside.len()];
    let of_beside: Vec<&Request> = requests.iter().filter(|r| r.target == ids[1] && r.op == Op::Write).collect();
    of_beside.iter().for_each(|r| apply(&mut other, r));
    assert_eq!(first_difference(&other, &after_beside), None);
    assert_eq!(of_beside.iter().map(|r| r.data.len()).sum::<usize>(), 64 * 4096, "no write is captured twice");
    assert!(requests.iter().any(|r| r.op == Op::Discard && r.target == ids[0]), "fstrim shows as discards");
    let seed = 51;
    let mut rng = Rng::new(seed);
    let own: Vec<&Request> = requests.iter().filter(|r| r.target == ids[0]).collect();
    for _ in 0..10 {
        let cut = rng.below(own.len() as u64) as usize;
        let mut image = before.clone();
        own[..cut].iter().for_each(|r| apply(&mut image, r));
        let copy = Loop::of_image(&image);
        {
            let mount = Mount::new(&copy.device).unwrap_or_else(|e| panic!("seed {seed} cut {cut}: mount: {e}"));
            let (a, b) = read_ordered(&mount.at);
            let (a, b) = (a.unwrap_or(0), b.unwrap_or(0));
            assert!(a >= b && a <= b + 1, "seed {seed} cut {cut}: A={a} B={b}");
        }
        run("e2fsck", &["-fn", copy.dev()]);
    }
    // With the last such disk goes what looks at every bio of the host.
    capture.set_targets(&[beside.target()]).unwrap();
    assert!(!pins.0.join("link-bio-queue").exists() && !pins.0.join("link-bio-complete").exists());
}

/// A PostgreSQL server of its own user on a data directory; ended at drop.
struct Postgres {
    child: Child,
    sockets: PathBuf,
}

fn postgres_bin() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> =
        std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|e| e.path()).collect();
    versions.sort();
    versions.pop().map(|v| v.join("bin")).filter(|b| b.join("postgres").exists())
}

/// A command of the database's own user: it refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command.current_dir("/");
    command
}

impl Postgres {
    fn start(bin: &Path, data: &Path, sockets: &Path) -> Self {
        let log = File::create(sockets.join("server.log")).unwrap();
        let mut command = as_postgres(&bin.join("postgres"));
        command.arg("-D").arg(data).args([
            "-c",
            "listen_addresses=",
            "-c",
            "shared_buffers=8MB",
            "-c",
            "autovacuum=off",
        ]);
        command.arg("-c").arg(format!("unix_socket_directories={}", sockets.display()));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut this = Self { child, sockets: sockets.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(60);
        while this.query("select 1").is_none() {
            let ended = this.child.try_wait().unwrap();
            let log = || std::fs::read_to_string(sockets.join("server.log")).unwrap_or_default();
            assert!(ended.is_none(), "the database ended: {}", log());
            assert!(Instant::now() < deadline, "the database does not answer: {}", log());
            thread::sleep(Duration::from_millis(50));
        }
        this
    }
    fn psql(&self) -> Command {
        let mut command = as_postgres(Path::new("/usr/bin/psql"));
        command.args(["-X", "-q", "-A", "-t", "-d", "postgres", "-h"]).arg(&self.sockets);
        command
    }
    fn query(&self, sql: &str) -> Option<String> {
        let out = self.psql().args(["-c", sql]).output().unwrap();
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }
    fn signal(&mut self, signal: i32) {
        // SAFETY: a process that we started and have not waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
        self.child.wait().unwrap();
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(libc::SIGQUIT);
        }
    }
}

#[test]
fn root_a_cut_of_a_databases_disk_has_every_row_committed_before_its_marker() {
    if !root("PostgreSQL") {
        return;
    }
    let Some(bin) = postgres_bin() else {
        println!("SKIPPED: PostgreSQL: the package postgresql is not installed");
        return;
    };
    let disk = Loop::new(160);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let sockets = tempfile::Builder::new().prefix("hf-pg-").tempdir_in("/tmp").unwrap();
    run("chown", &["postgres:", sockets.path().to_str().unwrap()]);
    let mounted = |device: &Path| {
        let mount = Mount::new(device).unwrap();
        // The way to it is for root alone at first.
        let above = mount.at.parent().unwrap();
        std::fs::set_permissions(above, std::fs::Permissions::from_mode(0o755)).unwrap();
        mount
    };
    {
        let mount = mounted(&disk.device);
        let data = mount.at.join("data");
        std::fs::create_dir(&data).unwrap();
        run("chown", &["postgres:", data.to_str().unwrap()]);
        let mut init = as_postgres(&bin.join("initdb"));
        init.args(["--auth=trust", "--wal-segsize=1", "--no-locale", "--encoding=UTF8", "-D"]).arg(&data);
        let out = init.output().unwrap();
        assert!(out.status.success(), "initdb: {}", String::from_utf8_lossy(&out.stderr));
    }
    let before = disk.image();
    let pins = PinDir::new("postgres");
    let collector = Collector::start(start(&pins, 128, &disk));
    {
        let mount = mounted(&disk.device);
        let mut server = Postgres::start(&bin, &mount.at.join("data"), sockets.path());
        server.query("create table t (id bigint primary key, pad text)").unwrap();
        let marker = OpenOptions::new().create(true).truncate(false).write(true).open(mount.at.join("marker")).unwrap();
        let mut client = server.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut to, mut from) = (client.stdin.take().unwrap(), BufReader::new(client.stdout.take().unwrap()));
        for id in 1..=250u64 {
            writeln!(to, "insert into t values ({id}, repeat('{id} ', 60)) returning id;").unwrap();
            let mut line = String::new();
            from.read_line(&mut line).unwrap();
            assert_eq!(line.trim(), id.to_string());
            // Committed: the marker may say so.
            marker.write_all_at(&id.to_le_bytes(), 0).unwrap();
            marker.sync_data().unwrap();
            if id % 100 == 0 {
                server.query("checkpoint").unwrap();
            }
        }
        drop(to);
        client.wait().unwrap();
        server.signal(libc::SIGINT);
    }
    let after = disk.image();
    let (_, requests) = collector.finish();
    let mut whole = before.clone();
    requests.iter().for_each(|r| apply(&mut whole, r));
    assert_eq!(first_difference(&whole, &after), None);
    drop(disk);

    let seed = 61;
    let mut rng = Rng::new(seed);
    let mut with_rows = 0;
    for round in 0..4 {
        // The first part is the server's start.
        let (low, len) = (requests.len() as u64 / 4, requests.len() as u64 * 3 / 4);
        let cut = (low + rng.below(len)) as usize;
        let mut image = before.clone();
        requests[..cut].iter().for_each(|r| apply(&mut image, r));
        let copy = Loop::of_image(&image);
        {
            let mount = mounted(&copy.device);
            let mut marker = [0u8; 8];
            if let Ok(mut file) = File::open(mount.at.join("marker")) {
                let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read(&mut marker));
            }
            let marked = u64::from_le_bytes(marker);
            let mut server = Postgres::start(&bin, &mount.at.join("data"), sockets.path());
            if marked > 0 {
                let rows = server.query(&format!("select count(*) from t where id <= {marked}")).unwrap();
                assert_eq!(rows, marked.to_string(), "seed {seed} round {round} cut {cut}: rows are missing");
                let more = server.query("select count(*) from t").unwrap().parse::<u64>().unwrap();
                assert!(more <= marked + 1, "seed {seed} round {round} cut {cut}: {more} rows, marker {marked}");
                with_rows += 1;
            }
            server.signal(libc::SIGINT);
        }
        run("e2fsck", &["-fn", copy.dev()]);
    }
    assert!(with_rows > 0, "seed {seed}: no cut fell into the workload");
}
