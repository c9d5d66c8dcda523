//! The `bpf-rq` backend on this kernel, with real disks (loop devices), real file systems and real load.

mod common;

use agent_linux::capture::{Capture, Captured, LostWhy, Mode, Op, TargetId, bpf::BpfCapture};
use common::*;
use model::Extent;
use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Drains in a thread until told to stop, then once more to the end.
fn collect(mut capture: BpfCapture) -> (Arc<AtomicBool>, thread::JoinHandle<(BpfCapture, Vec<Captured>)>) {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let handle = thread::spawn(move || {
        let mut out = Vec::new();
        while !told.load(Ordering::Acquire) {
            let polled = capture.poll(8 << 20, true, mono(), &mut out).unwrap();
            capture.release(polled.position);
            if !polled.more {
                thread::sleep(std::time::Duration::from_micros(500));
            }
        }
        drain(&mut capture, &mut out);
        (capture, out)
    });
    (stop, handle)
}

#[test]
fn root_a_replayed_capture_is_the_disk_and_every_cut_is_a_crash_image() {
    if !root("capture identity") {
        return;
    }
    let disk = Loop::new(192);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let before = disk.image();
    let pins = PinDir::new("identity");
    let (stop, handle) = collect(start(&pins, 128, &disk));
    {
        let mount = Mount::new(&disk.device).unwrap();
        let dir = mount.at.clone();
        let writer = thread::spawn(move || write_ordered(&dir, 300));
        fio(&mount.at, &["--name=buf", "--rw=randwrite", "--bs=16k", "--size=24m", "--fsync=32", "--io_size=32m"]);
        fio(
            &mount.at,
            &[
                "--name=dio",
                "--rw=randwrite",
                "--bs=4k",
                "--direct=1",
                "--size=16m",
                "--io_size=16m",
                "--ioengine=libaio",
                "--iodepth=16",
            ],
        );
        fio(&mount.at, &["--name=seq", "--rw=write", "--bs=1m", "--size=32m"]);
        writer.join().unwrap();
        std::fs::remove_file(mount.at.join("seq.0.0")).unwrap();
        run("sync", &[]);
        run("fstrim", &[mount.at.to_str().unwrap()]);
    }
    let after = disk.image();
    stop.store(true, Ordering::Release);
    let (capture, events) = handle.join().unwrap();

    // Completions may go unseen; the writes are then known to be over in another way, within seconds of rest.
    let (mut capture, mut events) = (capture, events);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while capture.in_flight() > 0 && std::time::Instant::now() < deadline {
        thread::sleep(std::time::Duration::from_millis(50));
        drain(&mut capture, &mut events);
    }
    let counters = capture.counters().unwrap();
    assert_eq!((counters.drops, counters.faults, counters.truncated), (0, 0, 0), "{counters:?}");
    let requests: Vec<_> =
        events.iter().filter_map(|e| if let Captured::Request(r) = e { Some(r) } else { None }).collect();
    let lost: Vec<_> = events.iter().filter(|e| matches!(e, Captured::Lost { .. })).collect();
    assert!(lost.is_empty(), "{lost:?}");
    println!("{counters:?}");
    let open = never_completed(&events);
    assert!(open.is_empty(), "requests that seem to be under way for ever: {open:#?}");
    assert!(requests.iter().any(|r| r.op == Op::Flush), "fsync shows as a flush");
    assert!(requests.iter().any(|r| r.op == Op::Discard), "fstrim shows as discards");

    let mut replica = before.clone();
    requests.iter().for_each(|r| apply(&mut replica, r));
    assert_eq!(first_difference(&replica, &after), None);

    let seed = 41;
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
}

/// Requests that were issued and not seen to complete, in words.
fn never_completed(events: &[Captured]) -> Vec<String> {
    let mut open: std::collections::HashMap<_, (usize, &agent_linux::capture::Request)> =
        std::collections::HashMap::new();
    let mut out = Vec::new();
    let say = |n: usize, r: &agent_linux::capture::Request, why: &str| {
        format!("event {n}: {:?} of {:?} {why}", r.op, r.extents)
    };
    for (n, event) in events.iter().enumerate() {
        match event {
            Captured::Request(r) if r.op != Op::Flush => {
                if let Some((before, old)) = open.insert(r.id, (n, r)) {
                    out.push(say(
                        before,
                        old,
                        &format!("was in flight when event {n} took its place with {:?}", r.extents),
                    ));
                }
            }
            Captured::Done { id, .. } => drop(open.remove(id)),
            _ => {}
        }
    }
    out.extend(open.into_values().map(|(n, r)| say(n, r, "was in flight at the end")));
    out
}

#[test]
fn root_an_overflow_leaves_an_exact_dirty_map() {
    if !root("overflow") {
        return;
    }
    let disk = Loop::new(256);
    let pins = PinDir::new("overflow");
    let before = disk.image();
    // A ring of 1 MiB and nobody reads: nearly everything is dropped.
    let mut capture = start(&pins, 1, &disk);
    let seed = 7;
    let mut rng = Rng::new(seed);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..200u64 {
        let (at, len) = (rng.below(250 << 20) / 4096 * 4096, (1 + rng.below(64)) * 4096);
        file.write_all_at(&vec![i as u8 + 1; len as usize], at).unwrap();
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
    // What differs is marked: nothing is missed.
    for granule in 0..after.len() / 65536 {
        let range = granule * 65536..(granule + 1) * 65536;
        if replica[range.clone()] != after[range] {
            let extent = Extent::new(granule as u64 * 128, 128);
            assert!(!lost.overlap(&extent).is_empty(), "seed {seed}: granule {granule} differs and is not marked");
        }
    }
    // Reading just those again makes the replica whole.
    for extent in lost.iter() {
        let (start, end) = (extent.lba.bytes() as usize, (extent.end() * 512).min(after.len() as u64) as usize);
        replica[start..end].copy_from_slice(&after[start..end]);
    }
    assert_eq!(first_difference(&replica, &after), None, "seed {seed}");
    // Confirmed marks are gone, and nothing is told twice.
    capture.confirm_losses().unwrap();
    let mut again = Vec::new();
    drain(&mut capture, &mut again);
    assert!(!again.iter().any(|e| matches!(e, Captured::Lost { why: LostWhy::Overflow, .. })), "{again:?}");
}

/// Writes in random places, some of it synced at once.
fn scatter(disk: &Loop, rng: &mut Rng, count: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..count {
        let (at, len) = (rng.below(60 << 20) / 4096 * 4096, (1 + rng.below(40)) * 4096);
        file.write_all_at(&vec![(rng.below(255) + 1) as u8; len as usize], at).unwrap();
        if i % 8 == 7 {
            file.sync_all().unwrap();
        }
    }
    file.sync_all().unwrap();
}

/// What was captured, put on `replica`; answers what has to be read again.
fn replay(events: &[Captured], of: TargetId, replica: &mut [u8]) -> model::ExtentSet {
    let mut lost = model::ExtentSet::new();
    for event in events {
        match event {
            Captured::Request(r) if r.target == of => apply(replica, r),
            Captured::Lost { target, extents, .. } if *target == of => extents.iter().for_each(|e| lost.insert(*e)),
            _ => {}
        }
    }
    lost
}

fn reread(lost: &model::ExtentSet, after: &[u8], replica: &mut [u8]) {
    for extent in lost.iter() {
        let (start, end) = (extent.lba.bytes() as usize, (extent.end() * 512).min(after.len() as u64) as usize);
        replica[start..end].copy_from_slice(&after[start..end]);
    }
}

/// A disk that is switched to marks has its writes told as places, exactly; the other disk's are captured as ever, and an agent that
/// dies in between changes nothing.
#[test]
fn root_a_disk_switched_to_marks_tells_where_it_was_written() {
    if !root("marks only") {
        return;
    }
    let (marked, captured) = (Loop::new(64), Loop::new(64));
    let pins = PinDir::new("marks");
    let mut capture = start(&pins, 16, &marked);
    let ids = capture.set_targets(&[marked.target(), captured.target()]).unwrap();
    let seed = 20_261_122;
    let mut rng = Rng::new(seed);
    let (mut replica, mut other) = (marked.image(), captured.image());
    capture.set_mode(ids[0], Mode::ExtentsOnly).unwrap();
    let data = capture.counters().unwrap().bytes;
    scatter(&marked, &mut rng, 60);
    assert_eq!(capture.counters().unwrap().bytes, data, "data was copied");
    // The next agent finds the mode and the marks.
    drop(capture);
    let mut capture = BpfCapture::start(&pins.options(16), None).unwrap();
    scatter(&marked, &mut rng, 20);
    scatter(&captured, &mut rng, 40);
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    capture.flush_losses(&mut events).unwrap();
    let after = marked.image();
    let lost = replay(&events, ids[0], &mut replica);
    for (granule, (now, then)) in after.chunks(65536).zip(replica.chunks(65536)).enumerate() {
        let place = Extent::new(granule as u64 * 128, 128);
        assert!(now == then || !lost.overlap(&place).is_empty(), "seed {seed}: {place:?} differs and is not marked");
    }
    reread(&lost, &after, &mut replica);
    assert_eq!(first_difference(&replica, &after), None, "seed {seed}");
    let none = replay(&events, ids[1], &mut other);
    assert!(none.is_empty(), "the other disk lost {none:?}");
    assert_eq!(first_difference(&other, &captured.image()), None, "seed {seed}: the other disk");

    // Marked once more, and back to data: what is left of the marks comes, and then everything is captured again.
    scatter(&marked, &mut rng, 10);
    capture.set_mode(ids[0], Mode::Data).unwrap();
    let mut events = Vec::new();
    capture.flush_losses(&mut events).unwrap();
    let lost = replay(&events, ids[0], &mut replica);
    reread(&lost, &marked.image(), &mut replica);
    capture.confirm_losses().unwrap();
    scatter(&marked, &mut rng, 30);
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    capture.flush_losses(&mut events).unwrap();
    let none = replay(&events, ids[0], &mut replica);
    assert!(none.is_empty(), "told again or lost: {none:?}");
    assert_eq!(first_difference(&replica, &marked.image()), None, "seed {seed}");
    capture.remove().unwrap();
}

#[test]
fn root_losses_that_were_not_confirmed_are_told_to_the_next_agent() {
    if !root("losses across agents") {
        return;
    }
    let disk = Loop::new(64);
    let pins = PinDir::new("losses");
    let mut capture = start(&pins, 1, &disk);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    file.write_all_at(&vec![9; 32 << 20], 0).unwrap();
    file.sync_all().unwrap();
    let lost_bytes = |events: &[Captured]| -> u64 {
        let mut set = model::ExtentSet::new();
        for e in events {
            if let Captured::Lost { extents, .. } = e {
                extents.iter().for_each(|e| set.insert(*e));
            }
        }
        set.sectors().bytes()
    };
    let mut first = Vec::new();
    drain(&mut capture, &mut first);
    let told = lost_bytes(&first);
    assert!(told > 16 << 20, "{told}");
    drop(capture);
    let mut next = BpfCapture::start(&pins.options(1), None).unwrap();
    assert!(next.resumed());
    let mut second = Vec::new();
    next.flush_losses(&mut second).unwrap();
    assert!(lost_bytes(&second) > 16 << 20, "{}", lost_bytes(&second));
    next.confirm_losses().unwrap();
    drop(next);
    let mut third = BpfCapture::start(&pins.options(1), None).unwrap();
    let mut again = Vec::new();
    third.flush_losses(&mut again).unwrap();
    assert_eq!(lost_bytes(&again), 0);
}

#[test]
fn root_only_the_chosen_ranges_are_captured_and_skips_are_not() {
    if !root("ranges") {
        return;
    }
    let disk = Loop::new(64);
    let pins = PinDir::new("ranges");
    let mut capture = BpfCapture::start(&pins.options(4), Some((&disk.device, disk.no()))).unwrap();
    let mut target = disk.target();
    target.ranges = vec![Extent::new(2048, 2048), Extent::new(8192, 2048)];
    target.skips = vec![Extent::new(8192, 64)];
    let ids = capture.set_targets(&[target.clone()]).unwrap();
    let write = |sector: u64| {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&disk.device).unwrap();
        let mut buf = durable::AlignedBuf::with_capacity(4096);
        buf.extend_from_slice(&[1; 4096]);
        file.write_all_at(buf.as_slice(), sector * 512).unwrap();
    };
    for sector in [0, 2048, 4088, 4096, 8192, 8248, 8256, 10232, 10240] {
        write(sector);
    }
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    let seen: Vec<u64> = events
        .iter()
        .filter_map(|e| if let Captured::Request(r) = e { Some(r.extents[0].start()) } else { None })
        .collect();
    assert_eq!(seen, [2048, 4088, 8256, 10232]);
    // The same disk with other ranges keeps its id; another set of disks replaces.
    target.ranges = vec![Extent::new(0, 8)];
    assert_eq!(capture.set_targets(&[target]).unwrap(), ids);
    write(0);
    write(2048);
    events.clear();
    drain(&mut capture, &mut events);
    assert_eq!(events.iter().filter(|e| matches!(e, Captured::Request(_))).count(), 1, "{events:?}");
    assert!(capture.set_targets(&[]).unwrap().is_empty());
    write(0);
    events.clear();
    drain(&mut capture, &mut events);
    assert!(events.is_empty(), "{events:?}");
}

const CHILD: &str = "HOLDFAST_TEST_CHILD";

/// Not a test of its own: the process that the next test kills. It tells on stdout what it took before it releases it.
#[test]
fn root_child_that_captures_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let options = agent_linux::capture::bpf::Options { pins: dir.into(), ring_bytes: 256 << 20 };
    let mut capture = BpfCapture::start(&options, None).unwrap();
    let mut out = std::fs::File::create(std::env::var("HOLDFAST_TEST_OUT").unwrap()).unwrap();
    loop {
        let mut events = Vec::new();
        let polled = capture.poll(256 << 10, true, mono(), &mut events).unwrap();
        for event in &events {
            if let Captured::Request(r) = event {
                write_request(&mut out, r);
            }
        }
        capture.release(polled.position);
        if !polled.more {
            thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

#[test]
fn root_a_killed_agent_loses_nothing() {
    if !root("kill and resume") {
        return;
    }
    let disk = Loop::new(96);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let before = disk.image();
    let pins = PinDir::new("kill");
    // Sets the kernel half up; two children in turn read from it and are killed, then this process reads the rest.
    drop(start(&pins, 256, &disk));
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::new(&disk.device).unwrap();
    let at = mount.at.clone();
    let writer = thread::spawn(move || write_ordered(&at, 400));
    let mut files = Vec::new();
    for round in 0..2 {
        let file = dir.path().join(format!("{round}"));
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "root_child_that_captures_until_it_is_killed", "--nocapture"])
            .env(CHILD, &pins.0)
            .env("HOLDFAST_TEST_OUT", &file)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Killed in the middle of it: after it has taken something.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::fs::metadata(&file).map_or(0, |m| m.len()) < 200_000 {
            assert!(std::time::Instant::now() < deadline, "the child takes nothing");
            fio(&mount.at, &["--name=more", "--rw=randwrite", "--bs=8k", "--size=4m", "--io_size=2m", "--fsync=8"]);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        files.push(file);
        // Nobody reads now.
        fio(&mount.at, &["--name=gap", "--rw=randwrite", "--bs=16k", "--size=4m", "--io_size=4m", "--fsync=8"]);
    }
    writer.join().unwrap();
    drop(mount);
    let after = disk.image();
    let mut capture = BpfCapture::start(&pins.options(256), None).unwrap();
    assert!(capture.resumed());
    let mut events = Vec::new();
    drain(&mut capture, &mut events);
    assert_eq!(capture.counters().unwrap().drops, 0);
    let mut replica = before;
    for file in &files {
        read_requests(&std::fs::read(file).unwrap(), &mut replica);
    }
    for event in &events {
        match event {
            Captured::Request(r) => apply(&mut replica, r),
            // A request that was in flight while nobody was there; it was captured all the same.
            Captured::Lost { why: LostWhy::Unmatched, .. } | Captured::Done { .. } => {}
            lost @ Captured::Lost { .. } => panic!("{lost:?}"),
        }
    }
    assert_eq!(first_difference(&replica, &after), None);
}

/// Replays what [`write_request`] wrote; a torn end was not released, so the next one has it.
fn read_requests(mut bytes: &[u8], image: &mut [u8]) {
    fn quad(bytes: &mut &[u8]) -> Option<u64> {
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        *bytes = rest;
        Some(u64::from_le_bytes(*head))
    }
    fn one(bytes: &mut &[u8]) -> Option<agent_linux::capture::Request> {
        let ([0xfe, 0xed, op, extents], rest) = bytes.split_first_chunk::<4>()? else { panic!("out of step") };
        *bytes = rest;
        let op = [Op::Write, Op::Zero, Op::Discard, Op::Flush][*op as usize];
        let extents =
            (0..*extents).map(|_| Some(Extent::new(quad(bytes)?, quad(bytes)?))).collect::<Option<Vec<_>>>()?;
        let len = quad(bytes)? as usize;
        let data = bytes.get(..len)?.to_vec();
        *bytes = &bytes[len..];
        Some(agent_linux::capture::Request {
            target: agent_linux::capture::TargetId(0),
            id: agent_linux::capture::RequestId(0),
            op,
            fua: false,
            preflush: false,
            mono: mono(),
            extents,
            data,
        })
    }
    while let Some(request) = one(&mut bytes) {
        apply(image, &request);
    }
}

fn write_request(mut to: impl std::io::Write, r: &agent_linux::capture::Request) {
    let mut bytes = vec![0xfe, 0xed, r.op as u8, r.extents.len() as u8];
    for e in &r.extents {
        bytes.extend_from_slice(&e.start().to_le_bytes());
        bytes.extend_from_slice(&e.sectors.0.to_le_bytes());
    }
    bytes.extend_from_slice(&(r.data.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&r.data);
    to.write_all(&bytes).unwrap();
}
