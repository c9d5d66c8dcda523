//! The `bpf-legacy` backend on this kernel, which has more than it asks for: it may use nothing of that.

mod common;

use agent_linux::capture::{
    Capture, Captured, LostWhy, Op, Request,
    bpf::Options,
    legacy::{LegacyCapture, NAME},
};
use common::*;
use model::Extent;
use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

fn begin(ring_mib: u32, disk: &Loop) -> LegacyCapture {
    let options = Options { pins: "/nonexistent".into(), ring_bytes: ring_mib << 20 };
    let mut capture = LegacyCapture::start(&options).unwrap_or_else(|e| panic!("{}", agent_linux::error_chain(&e)));
    capture.set_targets(&[disk.target()]).unwrap();
    capture
}

fn collect(mut capture: LegacyCapture) -> (Arc<AtomicBool>, thread::JoinHandle<(LegacyCapture, Vec<Captured>)>) {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let handle = thread::spawn(move || {
        let mut out = Vec::new();
        while !told.load(Ordering::Acquire) {
            let polled = capture.poll(8 << 20, true, mono(), &mut out).unwrap();
            capture.release(polled.position);
            if !polled.more {
                thread::sleep(Duration::from_micros(500));
            }
        }
        drain(&mut capture, &mut out);
        let deadline = Instant::now() + Duration::from_secs(30);
        while capture.in_flight() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
            drain(&mut capture, &mut out);
        }
        (capture, out)
    });
    (stop, handle)
}

fn stay_on(cpu: usize) {
    // SAFETY: the set is ours, of the size that is said; a CPU that is not there leaves the thread where it is.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// A is written and made durable on one CPU, then B on another, again and again: each goes into another buffer.
fn ordered_over_two_cpus(dir: &Path, count: u64) {
    let (to_b, from_a) = mpsc::sync_channel(0);
    let (to_a, from_b) = mpsc::sync_channel(0);
    let writer = |name: &str, cpu: usize, wait: mpsc::Receiver<()>, tell: mpsc::SyncSender<()>| {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(name)).unwrap();
        thread::spawn(move || {
            stay_on(cpu);
            for i in 1..=count {
                wait.recv().unwrap();
                let mut block = vec![0u8; 4096];
                block[..8].copy_from_slice(&i.to_le_bytes());
                file.write_all_at(&block, 0).unwrap();
                file.sync_data().unwrap();
                // The other one may have ended.
                let _ = tell.send(());
            }
        })
    };
    let kick = to_a.clone();
    let (a, b) = (writer("A", 0, from_b, to_b), writer("B", 1, from_a, to_a));
    kick.send(()).unwrap();
    // The last word of B finds nobody.
    a.join().unwrap();
    drop(kick);
    b.join().unwrap();
}

#[test]
fn root_legacy_capture_is_the_disk_and_keeps_order_over_cpus() {
    if !root("bpf-legacy: identity") {
        return;
    }
    let disk = Loop::new(128);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let before = disk.image();
    let capture = begin(32, &disk);
    assert_eq!(capture.name(), NAME);
    let (stop, handle) = collect(capture);
    {
        let mount = Mount::new(&disk.device).unwrap();
        let dir = mount.at.clone();
        let writer = thread::spawn(move || ordered_over_two_cpus(&dir, 150));
        fio(&mount.at, &["--name=buf", "--rw=randwrite", "--bs=16k", "--size=16m", "--fsync=32", "--io_size=16m"]);
        let direct = ["--name=dio", "--rw=randwrite", "--bs=4k", "--direct=1", "--size=8m", "--io_size=8m"];
        fio(&mount.at, &[&direct[..], &["--ioengine=libaio", "--iodepth=16", "--numjobs=2"]].concat());
        fio(&mount.at, &["--name=seq", "--rw=write", "--bs=1m", "--size=16m"]);
        writer.join().unwrap();
        std::fs::remove_file(mount.at.join("seq.0.0")).unwrap();
        run("sync", &[]);
        run("fstrim", &[mount.at.to_str().unwrap()]);
    }
    let after = disk.image();
    stop.store(true, Ordering::Release);
    let (mut capture, events) = handle.join().unwrap();
    let counters = capture.counters().unwrap();
    println!("{counters:?}");
    let lost: Vec<_> = events.iter().filter(|e| matches!(e, Captured::Lost { .. })).collect();
    assert!(lost.is_empty(), "{lost:?}");
    assert_eq!((counters.drops, counters.faults, counters.truncated), (0, 0, 0), "{counters:?}");
    assert_eq!(capture.in_flight(), 0);
    let requests: Vec<Request> =
        events.into_iter().filter_map(|e| if let Captured::Request(r) = e { Some(r) } else { None }).collect();
    assert!(requests.iter().any(|r| r.op == Op::Flush), "fsync shows as a flush");
    assert!(requests.iter().any(|r| r.op == Op::Discard), "fstrim shows as discards");
    let mut replica = before.clone();
    requests.iter().for_each(|r| apply(&mut replica, r));
    assert_eq!(first_difference(&replica, &after), None);

    let seed = 43;
    let mut rng = Rng::new(seed);
    let mut with_data = 0;
    for round in 0..6 {
        let cut = rng.below(requests.len() as u64) as usize;
        let mut image = before.clone();
        requests[..cut].iter().for_each(|r| apply(&mut image, r));
        let copy = Loop::of_image(&image);
        {
            let mount =
                Mount::new(&copy.device).unwrap_or_else(|e| panic!("seed {seed} round {round} cut {cut}: mount: {e}"));
            let (a, b) = read_ordered(&mount.at);
            let (a, b) = (a.unwrap_or(0), b.unwrap_or(0));
            assert!(a >= b && a <= b + 1, "seed {seed} round {round} cut {cut}: A={a} B={b}");
            with_data += u64::from(a > 0);
        }
        run("e2fsck", &["-fn", copy.dev()]);
    }
    assert!(with_data > 0, "seed {seed}: no cut fell into the workload");
    capture.remove().unwrap();
}

#[test]
fn root_legacy_an_overflow_leaves_an_exact_dirty_map() {
    if !root("bpf-legacy: overflow") {
        return;
    }
    let disk = Loop::new(256);
    let before = disk.image();
    // 2 MiB for each CPU, and nobody reads: nearly everything is dropped.
    let mut capture = begin(1, &disk);
    let seed = 7;
    let mut rng = Rng::new(seed);
    let file = OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..300u64 {
        stay_on(i as usize % 2);
        let (at, len) = (rng.below(250 << 20) / 4096 * 4096, (1 + rng.below(64)) * 4096);
        file.write_all_at(&vec![i as u8 | 1; len as usize], at).unwrap();
        if i % 20 == 19 {
            file.sync_all().unwrap();
        }
    }
    drop(file);
    // A long discard that is lost too goes the other way, by range.
    run("blkdiscard", &["-o", "0", "-l", &(16u64 << 20).to_string(), disk.dev()]);
    let after = disk.image();
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    assert!(capture.counters().unwrap().drops > 10, "{:?}", capture.counters());
    let mut replica = before;
    let mut lost = model::ExtentSet::new();
    for event in &events {
        match event {
            Captured::Request(r) => apply(&mut replica, r),
            Captured::Lost { extents, .. } => extents.iter().for_each(|e| lost.insert(*e)),
            Captured::Done { .. } => {}
        }
    }
    for granule in 0..after.len() / 65536 {
        let range = granule * 65536..(granule + 1) * 65536;
        if replica[range.clone()] != after[range] {
            let extent = Extent::new(granule as u64 * 128, 128);
            assert!(!lost.overlap(&extent).is_empty(), "seed {seed}: granule {granule} differs and is not marked");
        }
    }
    for extent in lost.iter() {
        let (start, end) = (extent.lba.bytes() as usize, (extent.end() * 512).min(after.len() as u64) as usize);
        replica[start..end].copy_from_slice(&after[start..end]);
    }
    assert_eq!(first_difference(&replica, &after), None, "seed {seed}");
    // Nothing is told twice, and what is written from now on is captured again.
    let mut again = Vec::new();
    drain(&mut capture, &mut again);
    assert!(!again.iter().any(|e| matches!(e, Captured::Lost { why: LostWhy::Overflow, .. })), "{again:?}");
    let file = OpenOptions::new().write(true).open(&disk.device).unwrap();
    file.write_all_at(&[7; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    drain(&mut capture, &mut again);
    let whole = |e: &Captured| matches!(e, Captured::Request(r) if r.op == Op::Write && r.data.contains(&7));
    assert!(again.iter().any(whole), "{again:?}");
}
