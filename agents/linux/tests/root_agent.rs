//! The agent as a process against a box in this process: protect a real disk under load, and everything that goes wrong on the way.

mod common;

use common::{
    agent::{Agent, identical, text},
    fakebox::FakeBox,
    *,
};
use model::{GapReason, Mark};
use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const SMALL: &str = "ring_mib = 64\nmemory_mib = 256\nspool_memory_mib = 32\nspool_mib = 0";

/// Writes to random places until told to stop; answers how much.
fn writer(disk: &Loop, seed: u64) -> (Arc<AtomicBool>, thread::JoinHandle<u64>) {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let (path, bytes) = (disk.device.clone(), disk.sectors() * 512);
    let handle = thread::spawn(move || {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let mut rng = Rng::new(seed);
        let mut total = 0;
        while !told.load(Ordering::Acquire) {
            let len = (1 + rng.below(16)) * 4096;
            let at = rng.below(bytes - len) / 4096 * 4096;
            let mut buf = durable::AlignedBuf::with_capacity(len as usize);
            let word = rng.below(u64::MAX).to_le_bytes();
            (0..len / 8).for_each(|_| buf.extend_from_slice(&word));
            file.write_all_at(buf.as_slice(), at).unwrap();
            total += len;
            if rng.below(8) == 0 {
                file.sync_data().unwrap();
            }
            thread::sleep(Duration::from_micros(300));
        }
        total
    });
    (stop, handle)
}

fn finish((stop, handle): (Arc<AtomicBool>, thread::JoinHandle<u64>)) -> u64 {
    stop.store(true, Ordering::Release);
    handle.join().unwrap()
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn consistents(fake: &FakeBox) -> usize {
    fake.group(|g| g.marks.iter().filter(|(_, m)| *m == Mark::Consistent).count())
}

#[test]
fn root_initial_sync_under_live_writes_and_every_cut_after_it() {
    if !root("initial sync") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(160);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let settings = "ring_mib = 64\nmemory_mib = 256\nspool_memory_mib = 128\nspool_mib = 0";
    let mut agent = Agent::enrolled("sync", &fake, settings);
    agent.start();
    let mount = Mount::new(&disk.device).unwrap();
    let at = mount.at.clone();
    fio(&at, &["--name=old", "--rw=write", "--bs=256k", "--size=40m", "--end_fsync=1"]);
    let ordered = thread::spawn(move || write_ordered(&at, 600));
    agent.protect(&disk);
    fake.group(|g| g.keep = true);
    fio(&mount.at, &["--name=buf", "--rw=randwrite", "--bs=8k", "--size=16m", "--fsync=32", "--io_size=24m"]);
    wait("the first copy has ended", || consistents(&fake) > 0);
    fio(&mount.at, &["--name=more", "--rw=randwrite", "--bs=4k", "--size=16m", "--fsync=16", "--io_size=16m"]);
    ordered.join().unwrap();
    run("fstrim", &[mount.at.to_str().unwrap()]);
    drop(mount);
    identical(&agent, &fake, &disk);
    let (gaps, zero, copied) = fake.group(|g| (g.gaps.clone(), g.zero_bytes, g.sync_bytes));
    assert_eq!(gaps, [GapReason::InitialSync]);
    assert!(zero > 30 << 20, "empty parts go as zeroes: {zero}");
    assert!(copied >= 40 << 20, "{copied}");
    assert!(fake.state.lock().unwrap().refused.is_empty());
    let status = agent.ok(&["status"]);
    assert!(status.contains("replicating") && status.contains("bpf-rq") && status.contains("lag"), "{status}");
    assert!(agent.ok(&["disks"]).contains(disk.dev().trim_start_matches("/dev/")));

    // Any boundary of the stream after the copy is a disk that a power cut could have left.
    let (base, kept) = fake.group(|g| (g.at_consistent.clone(), std::mem::take(&mut g.kept)));
    let seed = 5;
    let mut rng = Rng::new(seed);
    for round in 0..4 {
        let mut cut = rng.below(kept.len() as u64) as usize;
        while cut > 0 && kept[cut - 1].flags.contains(model::WriteFlags::MORE) {
            cut -= 1;
        }
        let mut images = base.clone();
        kept[..cut].iter().for_each(|k| k.apply(&mut images));
        let copy = Loop::of_image(&images[0]);
        {
            let mount = Mount::new(&copy.device).unwrap_or_else(|e| panic!("seed {seed} round {round} cut {cut}: {e}"));
            let (a, b) = read_ordered(&mount.at);
            let (a, b) = (a.unwrap_or(0), b.unwrap_or(0));
            assert!(a >= b && a <= b + 1, "seed {seed} round {round} cut {cut}: A={a} B={b}");
        }
        run("e2fsck", &["-fn", copy.dev()]);
    }
}

#[test]
fn root_a_killed_agent_goes_on_and_does_not_copy_everything() {
    if !root("agent kill") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(192);
    let mut agent = Agent::enrolled("killed", &fake, SMALL);
    std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap().write_all_at(&vec![7; 192 << 20], 0).unwrap();
    run("sync", &[]);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    for round in 0..3u64 {
        let load = writer(&disk, round + 1);
        wait("live writes arrive", || fake.group(|g| g.live_writes) > 100 * (round + 1));
        agent.kill();
        let before = fake.group(|g| g.sync_bytes);
        let written = disk.written();
        wait("the host goes on writing without an agent", || disk.written() > written + (1 << 20));
        agent.start();
        agent.wait("replicating again", |a| a.group()["state"] == "replicating");
        finish(load);
        identical(&agent, &fake, &disk);
        let copied = fake.group(|g| g.sync_bytes) - before;
        assert!(copied < 110 << 20, "round {round}: {copied} bytes were copied again of {}", 192 << 20);
    }
    let gaps = fake.group(|g| g.gaps.clone());
    assert_eq!(gaps[0], GapReason::InitialSync);
    assert!(gaps[1..].iter().all(|g| matches!(g, GapReason::AgentRestart | GapReason::Verify)), "{gaps:?}");
    assert_eq!(agent.status().unwrap()["capture"]["dropped"], 0);
}

#[test]
fn root_after_a_host_crash_only_what_differs_is_sent() {
    if !root("host crash") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(192);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mut agent = Agent::enrolled("crash", &fake, SMALL);
    agent.start();
    let mount = Mount::new(&disk.device).unwrap();
    fio(&mount.at, &["--name=old", "--rw=write", "--bs=256k", "--size=60m", "--end_fsync=1"]);
    agent.protect(&disk);
    agent.settled();
    drop(mount);
    identical(&agent, &fake, &disk);
    for version in [2, 1] {
        agent.stop();
        // As after a power cut: what lived in the kernel and on tmpfs is gone, and the disk is not what was captured last.
        agent.forget_boot();
        fake.knobs.version.store(version, Ordering::Release);
        let before = disk.image();
        let seed = 40 + version;
        let mut rng = Rng::new(seed);
        let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
        for _ in 0..60 {
            let at = rng.below(before.len() as u64 - 20_000);
            file.write_all_at(&vec![rng.below(256) as u8; 1 + rng.below(10_000) as usize], at).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        let after = disk.image();
        let differ = before.chunks(4096).zip(after.chunks(4096)).filter(|(a, b)| a != b).count() as u64 * 4096;
        let sent = || fake.group(|g| (g.sync_bytes + g.zero_bytes, g.wire_bytes + g.compare_bytes));
        let (copied, wire) = sent();
        let consistent = consistents(&fake);
        agent.start();
        // The disk goes on being written to while it is looked through.
        let load = writer(&disk, seed);
        wait("the comparison has ended", || consistents(&fake) > consistent);
        let (copied_now, wire_now) = sent();
        let live = finish(load);
        identical(&agent, &fake, &disk);
        let reason = fake.group(|g| g.gaps.last().copied());
        assert_eq!(reason, Some(GapReason::Verify), "seed {seed}\n{}", agent.log());
        let (copied, wire) = (copied_now - copied, wire_now - wire);
        println!("version {version}: {differ} bytes differ, {copied} copied, {wire} on the wire, {live} live");
        if version == 1 {
            // Less what was written meanwhile and sent as it is.
            assert!(copied > before.len() as u64 / 2, "a box that cannot compare gets everything: {copied}");
            continue;
        }
        // Live writes may make more of the disk differ than did at the crash.
        assert!(copied <= differ + live, "seed {seed}: {copied} copied, {differ} differ, {live} written meanwhile");
        let hashes = before.len() as u64 / 4096;
        let bound = (differ + live) * 12 / 10 + hashes;
        assert!(wire <= bound, "seed {seed}: {wire} bytes on the wire, {bound} allowed");
        assert!(agent.group()["found_same_bytes"].as_u64() > Some(before.len() as u64 / 2));
    }
}

/// Shutdown hook, "reboot" (everything that lives in memory is taken away, the loop device is a new one), initramfs hook, agent.
#[test]
fn root_a_clean_reboot_copies_only_what_was_written_on_the_way() {
    if !root("clean reboot") {
        return;
    }
    let fake = FakeBox::start();
    let (disk, home) = (Loop::new(128), Loop::new(96));
    run("mkfs.ext4", &["-q", "-F", home.dev()]);
    let mut mount = Some(Mount::new(&home.device).unwrap());
    let state = mount.as_ref().unwrap().at.join("state");
    let mut agent = Agent::new("reboot", Some(state), SMALL);
    let token = fake.token().to_string();
    agent.ok(&["enrol", "--box", &fake.address, "--token", &token]);
    agent.start();
    let write = |at: u64, len: usize, byte: u8| {
        let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
        file.write_all_at(&vec![byte; len], at).unwrap();
        file.sync_all().unwrap();
    };
    write(0, 64 << 20, 3);
    agent.protect(&disk);
    agent.settled();
    for round in 0..3u8 {
        agent.stop();
        // After the agent, before the root file system is read-only.
        if round > 0 {
            write(u64::from(round) << 23, 300 << 10, round + 10);
        }
        let said = text(&agent.cli(&["carry-out", "--call-boot", "the boot before"]));
        if said.contains("Operation not permitted") || said.contains("busy") {
            println!("SKIPPED: clean reboot: this kernel lets nobody write to a disk that is mounted: {said}");
            return;
        }
        assert!(said.contains("is carried over"), "round {round}: {said}\n{}", agent.log());
        agent.forget_boot();
        let at = mount.take().unwrap();
        let path = at.at.clone();
        run("umount", &[path.to_str().unwrap()]);
        run("mount", &[home.dev(), path.to_str().unwrap()]);
        mount = Some(at);
        disk.replug();
        // In the last round somebody writes before capture begins.
        if round == 2 {
            write(100 << 20, 4096, 99);
        }
        let early = text(&agent.cli(&["early"]));
        let gaps = fake.group(|g| g.gaps.len());
        let copied = fake.group(|g| g.sync_bytes + g.zero_bytes);
        // Captured before the agent runs.
        write(90 << 20, 8192, round + 50);
        agent.start();
        identical(&agent, &fake, &disk);
        let new: Vec<GapReason> = fake.group(|g| g.gaps[gaps..].to_vec());
        let copied = fake.group(|g| g.sync_bytes + g.zero_bytes) - copied;
        match round {
            0 => assert_eq!((new.as_slice(), copied), (&[][..], 0), "{early}\n{}", agent.log()),
            1 => {
                assert_eq!(new, [GapReason::AgentRestart], "{early}\n{}", agent.log());
                assert!(copied <= 448 << 10, "{copied} bytes were copied");
            }
            _ => assert!(new.len() == 1 && early.contains("0 groups go on"), "{new:?} {early}\n{}", agent.log()),
        }
    }
}

#[test]
fn root_a_stopped_agent_goes_on_without_a_gap() {
    if !root("clean stop") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(64);
    let mut agent = Agent::enrolled("clean", &fake, SMALL);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..3u8 {
        agent.stop();
        // Written while no agent runs: the kernel half keeps it.
        file.write_all_at(&vec![i + 1; 4 << 20], u64::from(i) << 22).unwrap();
        file.sync_all().unwrap();
        agent.start();
        agent.wait("connected", |a| a.group()["state"] == "replicating");
        identical(&agent, &fake, &disk);
    }
    let (gaps, streams) =
        fake.group(|g| (g.gaps.clone(), g.marks.iter().filter(|(_, m)| matches!(m, Mark::StreamBegin { .. })).count()));
    assert_eq!((gaps.as_slice(), streams), (&[GapReason::InitialSync][..], 1), "{}", agent.log());
}

#[test]
fn root_a_cut_connection_is_made_again_and_nothing_is_missing() {
    if !root("cut") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(64);
    let mut agent = Agent::enrolled("cut", &fake, SMALL);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..3u8 {
        fake.set(|k| &k.cut, true);
        agent.wait("disconnected", |a| a.group()["state"] == "disconnected");
        file.write_all_at(&vec![i + 10; 6 << 20], u64::from(i) << 22).unwrap();
        file.sync_all().unwrap();
        fake.set(|k| &k.cut, false);
        identical(&agent, &fake, &disk);
    }
    assert_eq!(fake.group(|g| g.gaps.clone()), [GapReason::InitialSync], "the spool held what was written meanwhile");
}

#[test]
fn root_a_spool_that_overflows_becomes_a_gap_and_is_copied() {
    if !root("spool overflow") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(128);
    let settings = "ring_mib = 8\nmemory_mib = 64\nspool_memory_mib = 8\nspool_mib = 4";
    let mut agent = Agent::enrolled("overflow", &fake, settings);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    let copied = fake.group(|g| g.sync_bytes + g.zero_bytes);
    fake.set(|k| &k.hold_acks, true);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    let mut rng = Rng::new(3);
    for i in 0..40u8 {
        file.write_all_at(&vec![i + 1; 1 << 20], rng.below(120) << 20).unwrap();
        file.sync_all().unwrap();
    }
    agent.wait("a gap", |a| a.group()["state"] == "marking" || a.group()["state"] == "syncing");
    fake.set(|k| &k.hold_acks, false);
    identical(&agent, &fake, &disk);
    let (gaps, all) = fake.group(|g| (g.gaps.clone(), g.sync_bytes + g.zero_bytes));
    assert!(gaps.contains(&GapReason::Overflow), "{gaps:?}");
    assert!(all - copied < 60 << 20, "only what was marked is copied: {}", all - copied);
    assert_eq!(consistents(&fake), gaps.len());
    // What was lost is recorded, so the ring is free again: nothing more is lost.
    let before = agent.status().unwrap()["capture"]["dropped"].as_u64().unwrap();
    for i in 0..20u64 {
        file.write_all_at(&vec![i as u8; 1 << 20], i << 20).unwrap();
        file.sync_all().unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    identical(&agent, &fake, &disk);
    let status = agent.status().unwrap();
    assert_eq!(status["capture"]["dropped"].as_u64(), Some(before), "{status}");
    assert!(status["ring"]["used_bytes"].as_u64().unwrap() < 1 << 20, "{status}");
}

#[test]
fn root_bookmarks_hold_what_was_written_before_them() {
    if !root("bookmarks") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(96);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mut agent = Agent::enrolled("bookmark", &fake, SMALL);
    agent.start();
    let mount = Mount::new(&disk.device).unwrap();
    agent.protect(&disk);
    agent.settled();
    std::fs::write(mount.at.join("first"), vec![1; 100_000]).unwrap();
    let said = agent.ok(&["bookmark", "frozen", "--consistency", "filesystem"]);
    assert!(said.contains("durable"), "{said}");
    // Thawed again: a write comes through.
    std::fs::write(mount.at.join("second"), vec![2; 100_000]).unwrap();
    run("sync", &[]);
    agent.ok(&["bookmark", "crash"]);
    let images = fake.group(|g| g.bookmarks.clone());
    let at = |name: &str| images[&name.parse().unwrap()][0].clone();
    let frozen = Loop::of_image(&at("frozen"));
    // A frozen file system needs no recovery: the file is there, and the journal is clean (mounted without replay).
    run("mount", &["-o", "ro,noload", frozen.dev(), "/mnt"]);
    let (first, second) = (std::fs::read("/mnt/first"), std::fs::exists("/mnt/second").unwrap());
    run("umount", &["/mnt"]);
    assert_eq!(first.unwrap(), vec![1; 100_000]);
    assert!(!second);
    let crash = Loop::of_image(&at("crash"));
    let again = Mount::new(&crash.device).unwrap();
    assert_eq!(std::fs::read(again.at.join("second")).unwrap(), vec![2; 100_000]);
    // From the box's side.
    let group = fake.group(|g| g.spec.id);
    let command = wire::Command::Bookmark {
        group,
        name: "from the box".parse().unwrap(),
        consistency: model::Consistency::Crash,
    };
    fake.state.lock().unwrap().commands.push((77, command));
    wait("the command is answered", || {
        let state = fake.state.lock().unwrap();
        state.results.iter().any(|(id, r)| *id == 77 && matches!(r, wire::CommandResult::Bookmarked { .. }))
    });
    // Bad ones are refused.
    assert!(text(&agent.cli(&["bookmark", " x"])).contains("no space at its ends"));
    assert!(text(&agent.cli(&["bookmark", "x", "--group", "nope"])).contains("no group"));
}

#[test]
fn root_a_guard_thaws_when_the_agent_dies() {
    if !root("thaw guard") {
        return;
    }
    let disk = Loop::new(64);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mount = Mount::new(&disk.device).unwrap();
    let mounts = vec![mount.at.display().to_string()];
    let frozen = agent_linux::freeze::freeze_with(std::path::Path::new(common::agent::BIN), &mounts).unwrap();
    let file = mount.at.join("x");
    let blocked = Arc::new(AtomicBool::new(true));
    let told = blocked.clone();
    let (tell, thread_of) = std::sync::mpsc::channel();
    let writer = thread::spawn(move || {
        tell.send(nix::unistd::gettid()).unwrap();
        std::fs::write(file, b"y").unwrap();
        told.store(false, Ordering::Release);
    });
    let stat = format!("/proc/self/task/{}/stat", thread_of.recv().unwrap());
    // Waiting in the kernel, which nothing but the freeze makes it do for good.
    wait("the writer to be held", || {
        std::fs::read_to_string(&stat).is_ok_and(|s| s.rsplit(')').next().is_some_and(|s| s.starts_with(" D")))
    });
    assert!(blocked.load(Ordering::Acquire), "a frozen file system takes no write");
    // As when the process dies: the pipe to the guard closes, and nothing else is done.
    let (dirs, guard) = frozen.into_parts();
    std::mem::forget(dirs);
    drop(guard);
    writer.join().unwrap();
    assert!(!blocked.load(Ordering::Acquire));
}

#[test]
fn root_a_freeze_of_somebody_else_is_left_to_them() {
    if !root("foreign freeze") {
        return;
    }
    let (ours, theirs) = (Loop::new(64), Loop::new(64));
    let mut mounts = Vec::new();
    for disk in [&ours, &theirs] {
        run("mkfs.ext4", &["-q", "-F", disk.dev()]);
        mounts.push(Mount::new(&disk.device).unwrap());
    }
    let names: Vec<String> = mounts.iter().map(|m| m.at.display().to_string()).collect();
    run("fsfreeze", &["--freeze", &names[1]]);
    let refused = agent_linux::freeze::freeze_with(std::path::Path::new(common::agent::BIN), &names);
    let said = refused.err().map(|e| e.to_string());
    // By now the guard has ended: who froze can still let go, and ours is let go already.
    let theirs_held = std::process::Command::new("fsfreeze").args(["--unfreeze", &names[1]]).output().unwrap();
    std::fs::write(mounts[0].at.join("x"), b"y").unwrap();
    assert!(said.as_ref().is_some_and(|s| s.contains(&names[1]) && s.contains("fsfreeze -u")), "{said:?}");
    assert!(theirs_held.status.success(), "their freeze was let go: {theirs_held:?}");
    // Two mounts of one file system are frozen once, and both are ours.
    let twice = vec![names[0].clone(), names[0].clone()];
    drop(agent_linux::freeze::freeze_with(std::path::Path::new(common::agent::BIN), &twice).unwrap());
    std::fs::write(mounts[0].at.join("x"), b"z").unwrap();
}

#[test]
fn root_a_disk_that_is_not_what_it_was_is_refused_by_name() {
    if !root("replaced disk") {
        return;
    }
    let fake = FakeBox::start();
    let (disk, other) = (Loop::new(64), Loop::new(64));
    let mut agent = Agent::enrolled("replaced", &fake, SMALL);
    agent.start();
    agent.connected();
    agent.ok(&["protect", disk.dev(), "--group", "one"]);
    agent.ok(&["protect", other.dev(), "--group", "two"]);
    let group = |agent: &Agent, name: &str| {
        let status = agent.status().unwrap();
        status["groups"].as_array().unwrap().iter().find(|g| g["name"] == name).unwrap().clone()
    };
    agent.wait("both replicate", |a| {
        group(a, "one")["state"] == "replicating" && group(a, "two")["state"] == "replicating"
    });
    let refused = |agent: &mut Agent, word: &str| {
        agent.start();
        let one = group(agent, "one");
        assert_eq!(one["state"], "stopped", "{one}");
        let reason = one["reason"].as_str().unwrap().to_owned();
        assert!(reason.contains(word) && reason.contains(disk.dev()), "{reason}");
        // The other one goes on.
        agent.wait("two replicates", |a| group(a, "two")["state"] == "replicating");
        assert!(agent.ok(&["status"]).contains(word));
        agent.stop();
    };
    agent.stop();
    // Shrunk.
    std::fs::OpenOptions::new().write(true).open(&disk.file).unwrap().set_len(32 << 20).unwrap();
    run("losetup", &["-c", disk.dev()]);
    refused(&mut agent, "shrank");
    std::fs::OpenOptions::new().write(true).open(&disk.file).unwrap().set_len(64 << 20).unwrap();
    run("losetup", &["-c", disk.dev()]);
    // Missing.
    run("losetup", &["-d", disk.dev()]);
    refused(&mut agent, "missing");
    // Replaced by another of the same size.
    let stranger = agent.dir.path().join("stranger.img");
    std::fs::File::create(&stranger).unwrap().set_len(64 << 20).unwrap();
    run("losetup", &[disk.dev(), stranger.to_str().unwrap()]);
    refused(&mut agent, "another disk");
    run("losetup", &["-d", disk.dev()]);
    // The right one again.
    run("losetup", &[disk.dev(), disk.file.to_str().unwrap()]);
    agent.start();
    agent.wait("one replicates", |a| group(a, "one")["state"] == "replicating");
}

#[test]
fn root_a_hostile_box_does_no_harm() {
    if !root("hostile box") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(64);
    let mut agent = Agent::enrolled("hostile", &fake, SMALL);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    fake.set(|k| &k.garbage, true);
    fake.set(|k| &k.cut, true);
    agent.wait("disconnected", |a| a.group()["state"] == "disconnected");
    fake.set(|k| &k.cut, false);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    let hellos = || fake.state.lock().unwrap().hellos;
    let begun = hellos();
    let mut i = 0u8;
    wait("rubbish of every kind was sent", || {
        i = i.wrapping_add(1);
        file.write_all_at(&vec![i; 65536], u64::from(i % 64) << 16).unwrap();
        file.sync_all().unwrap();
        hellos() > begun + 7
    });
    assert!(agent.running(), "{}", agent.log());
    fake.set(|k| &k.garbage, false);
    identical(&agent, &fake, &disk);
}

#[test]
fn root_unprotect_takes_everything_out_of_the_kernel() {
    if !root("unprotect") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(64);
    let kb = || {
        let name = disk.dev().trim_start_matches("/dev/");
        std::fs::read_to_string(format!("/sys/block/{name}/queue/max_sectors_kb"))
            .unwrap()
            .trim()
            .parse::<u32>()
            .unwrap()
    };
    let was = kb();
    let mut agent = Agent::enrolled("unprotect", &fake, SMALL);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    assert!(kb() <= 1024);
    assert!(agent.pins.0.join("link-issue").exists());
    let twice = text(&agent.cli(&["protect", disk.dev(), "--group", "again"]));
    assert!(twice.contains("protected already"), "{twice}");
    let busy = text(&agent.cli(&["remove"]));
    assert!(busy.contains("stop it first"), "{busy}");
    agent.ok(&["unprotect", "g"]);
    assert!(!agent.pins.0.join("link-issue").exists());
    assert_eq!(kb(), was);
    assert!(agent.ok(&["status"]).contains("nothing is protected"));
    // Protect again, stop, and remove as the package does.
    agent.protect(&disk);
    agent.settled();
    agent.stop();
    assert!(agent.pins.0.join("link-issue").exists(), "capture goes on while the agent is stopped");
    agent.ok(&["remove", "--purge"]);
    assert!(!agent.pins.0.exists());
    assert_eq!(kb(), was);
    assert!(text(&agent.cli(&["run"])).contains("not enrolled"));
}

#[test]
fn root_a_partition_is_a_volume_of_its_own() {
    if !root("partition") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(96);
    // A partition table by hand: two entries of type Linux.
    let mut table = vec![0u8; 512];
    for (i, (start, len)) in [(2048u32, 65536u32), (67584, 65536)].into_iter().enumerate() {
        let entry = &mut table[446 + i * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&len.to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let whole = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    whole.write_all_at(&table, 0).unwrap();
    whole.sync_all().unwrap();
    drop(whole);
    let out = std::process::Command::new("partx").args(["-a", disk.dev()]).output().unwrap();
    let part = format!("{}p2", disk.dev());
    if !std::path::Path::new(&part).exists() {
        println!("SKIPPED: partition: no partition nodes for loop devices here: {out:?}");
        return;
    }
    run("mkfs.ext4", &["-q", "-F", &part]);
    let mut agent = Agent::enrolled("partition", &fake, SMALL);
    agent.start();
    agent.connected();
    agent.ok(&["protect", &part, "--group", "g"]);
    agent.settled();
    let inside = std::fs::OpenOptions::new().write(true).open(&part).unwrap();
    let outside = std::fs::OpenOptions::new().write(true).open(format!("{}p1", disk.dev())).unwrap();
    inside.write_all_at(&[5; 8192], 4096).unwrap();
    outside.write_all_at(&[6; 8192], 4096).unwrap();
    inside.sync_all().unwrap();
    outside.sync_all().unwrap();
    agent.settled();
    let image = disk.image();
    let range = 67584 * 512..(67584 + 65536) * 512;
    wait("identical", || fake.group(|g| first_difference(&g.images[0], &image[range.clone()]).is_none()));
    assert_eq!(fake.group(|g| g.images[0].len()), 65536 * 512);
    drop((inside, outside));
    agent.stop();
    agent.ok(&["remove"]);
    run("partx", &["-d", disk.dev()]);
}

#[test]
fn root_a_spool_file_on_the_protected_disk_does_not_feed_itself() {
    if !root("own spool") {
        return;
    }
    let fake = FakeBox::start();
    let disk = Loop::new(192);
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mount = Mount::new(&disk.device).unwrap();
    let settings = "ring_mib = 64\nmemory_mib = 128\nspool_memory_mib = 8\nspool_mib = 64";
    let mut agent = Agent::new("ownspool", Some(mount.at.join("state")), settings);
    let token = fake.token().to_string();
    agent.ok(&["enrol", "--box", &fake.address, "--token", &token]);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    let group = agent.group();
    assert_eq!((&group["spool_note"], &group["spool_file_io"]), (&"".into(), &"direct".into()), "{group}");
    assert!(group["spool_pieces_left_out"].as_u64() >= Some(1), "{group}");
    // Filled ahead, in requests that are left out as well.
    agent.wait("the file is filled", |a| a.group()["spool_file_filled_bytes"] == 64 << 20);
    let captured = agent.group()["captured_bytes"].as_u64().unwrap();
    assert!(captured < 32 << 20, "filling the file was captured: {captured}");
    fake.set(|k| &k.cut, true);
    agent.wait("disconnected", |a| a.group()["state"] == "disconnected");
    let data: Vec<u8> = (0..24u32 << 20).map(|i| (i / 4096 * 7) as u8 | 1).collect();
    std::fs::write(mount.at.join("data"), &data).unwrap();
    run("sync", &[]);
    agent.wait("the file is used", |a| a.group()["spool_file_bytes"].as_u64() > Some(8 << 20));
    // A write made after the spool's own: once it is seen, so would those be.
    let before = agent.group()["captured_bytes"].as_u64().unwrap();
    std::fs::write(mount.at.join("data"), &data).unwrap();
    run("sync", &[]);
    agent.wait("written again", |a| a.group()["captured_bytes"].as_u64() >= Some(before + (24 << 20)));
    let held = agent.group()["spool_bytes"].as_u64().unwrap();
    assert!(held < 64 << 20, "the spool captured itself: {held}");
    let mib = agent.group()["captured_bytes"].as_u64().unwrap() >> 20;
    assert!(mib < 80, "{mib} MiB were captured of 48 MiB written");
    fake.set(|k| &k.cut, false);
    agent.settled();
    assert_eq!(fake.group(|g| g.gaps.clone()), [GapReason::InitialSync]);
    agent.stop();
    drop(mount);
    // The agent is stopped; what it did not send yet is little, so compare what matters: the data that was written.
    let copy = Loop::of_image(&fake.group(|g| g.images[0].clone()));
    let again = Mount::new(&copy.device).unwrap();
    assert!(std::fs::read(again.at.join("data")).unwrap() == data);
}

/// What a disk is asked for besides data, and in which order, is what the box gets; below a file system its barriers too.
#[test]
fn root_flushes_barriers_discards_and_zeroes_arrive_as_what_they_are() {
    use model::{RecordKind, WriteFlags};
    use std::os::{fd::AsRawFd, unix::fs::OpenOptionsExt};
    const BLKDISCARD: libc::c_ulong = 0x1277;
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    const MIB: u64 = 1 << 20;
    if !root("flags") {
        return;
    }
    let fake = FakeBox::start();
    // Not in memory: tmpfs zeroes no range, and what a disk refuses is a gap.
    let dir = tempfile::tempdir().unwrap();
    let disk = Loop::on(&dir.path().join("disk.img"), 64);
    let mut agent = Agent::enrolled("flags", &fake, SMALL);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    fake.group(|g| g.keep = true);
    let queue = |name: &str| {
        let path = format!("/sys/block/{}/queue/{name}", disk.dev().trim_start_matches("/dev/"));
        std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
    };
    let open = |flags: i32| {
        std::fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | flags).open(&disk.device).unwrap()
    };
    let mut block = durable::AlignedBuf::with_capacity(4096);
    block.extend_from_slice(&[7; 4096]);
    open(libc::O_DSYNC).write_all_at(block.as_slice(), MIB).unwrap();
    let plain = open(0);
    plain.write_all_at(block.as_slice(), 2 * MIB).unwrap();
    plain.sync_data().unwrap();
    for (what, at) in [(BLKDISCARD, 4 * MIB), (BLKZEROOUT, 8 * MIB)] {
        let range = [at, MIB];
        // SAFETY: a valid descriptor, and the two numbers that both requests take.
        let done = unsafe { libc::ioctl(plain.as_raw_fd(), what, range.as_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
    drop(plain);
    wait("the last of it", || fake.group(|g| g.kept.iter().any(|k| (8 * MIB..9 * MIB).contains(&(k.start as u64)))));
    agent.settled();
    let taken = || fake.group(|g| std::mem::take(&mut g.kept));
    let kept = taken();
    let write =
        |at: u64| kept.iter().position(|k| k.kind == RecordKind::Write && k.start as u64 == at).expect("the write");
    let listed: Vec<_> = kept.iter().map(|k| (k.kind, k.start as u64 / 512, k.len / 512, k.flags)).collect();
    println!("kind, sector, sectors, flags: {listed:?}");
    let (dsync, synced) = (write(MIB), write(2 * MIB));
    let flush_in = |range: std::ops::Range<usize>| kept[range].iter().any(|k| k.kind == RecordKind::Flush);
    let fua = queue("fua") == "1";
    println!("the loop disk's own FUA: {fua}");
    assert_eq!(kept[dsync].flags.contains(WriteFlags::FUA), fua);
    assert!(fua || flush_in(dsync..synced), "a disk without it is asked to flush instead");
    assert!(!kept[synced].flags.contains(WriteFlags::FUA) && flush_in(synced..kept.len()));
    let covered = |kind: RecordKind, at: u64| {
        let inside = |k: &&fakebox::Kept| k.kind == kind && (at..at + MIB).contains(&(k.start as u64));
        kept.iter().filter(inside).map(|k| k.len as u64).sum::<u64>()
    };
    assert_eq!(covered(RecordKind::Discard, 4 * MIB), MIB);
    if queue("write_zeroes_max_bytes") == "0" {
        println!("SKIPPED: write-zeroes: loop disks of this kernel have none");
    } else {
        assert_eq!(covered(RecordKind::Zero, 8 * MIB), MIB);
    }

    // Below a file system: A is durable before B is written. The block layer makes a flush of its own of what a commit asks for.
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mount = Mount::new(&disk.device).unwrap();
    agent.settled();
    taken();
    const LAST: u64 = 8;
    write_ordered(&mount.at, LAST);
    let of = |k: &fakebox::Kept, i: u64| {
        k.len == 4096 && k.data.starts_with(&i.to_le_bytes()) && k.data[8..].iter().all(|b| *b == 0)
    };
    wait("the last B", || fake.group(|g| g.kept.iter().filter(|k| of(k, LAST)).count() >= 2));
    agent.settled();
    let kept = taken();
    for i in 1..=LAST {
        let places: Vec<usize> = (0..kept.len()).filter(|n| of(&kept[*n], i)).collect();
        let (Some(a), Some(b)) = (places.first(), places.last()) else { panic!("write {i} is missing") };
        assert!(a < b, "round {i}: A and B");
        assert!(kept[*a..*b].iter().any(|k| k.kind == RecordKind::Flush), "round {i}: no flush between A and B");
    }
    drop(mount);
    identical(&agent, &fake, &disk);
}

/// Writes at random places until told to stop, never the same place half; answers how much.
fn load_until(disk: &Loop, seed: u64, stop: &AtomicBool, pause: Duration) -> u64 {
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    let mut rng = Rng::new(seed);
    let mut written = 0;
    while !stop.load(Ordering::Acquire) {
        let len = (1 + rng.below(32)) * 4096;
        file.write_all_at(&vec![rng.below(255) as u8 + 1; len as usize], rng.below(60 << 8) * 4096).unwrap();
        file.sync_data().unwrap();
        written += len;
        thread::sleep(pause);
    }
    written
}

/// The box takes nothing for a while: the spool runs full, writes are only marked, and then the kernel half stops copying them.
/// An agent that is killed meanwhile leaves it so; the next one goes on and nothing differs in the end.
#[test]
fn root_while_writes_are_only_marked_the_kernel_copies_none() {
    if !root("marked in the kernel") {
        return;
    }
    let seed = 77;
    let fake = FakeBox::start();
    let disk = Loop::new(128);
    let settings = "ring_mib = 8\nmemory_mib = 64\nspool_memory_mib = 8\nspool_mib = 4";
    let mut agent = Agent::enrolled("kernelmarks", &fake, settings);
    agent.start();
    agent.protect(&disk);
    agent.settled();
    for killed in [false, true] {
        let (gaps, ended) = (fake.group(|g| g.gaps.len()), consistents(&fake));
        fake.set(|k| &k.hold_acks, true);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let writer = scope.spawn(|| load_until(&disk, seed, &stop, Duration::from_millis(1)));
            agent.wait("only marked, in the kernel", |a| a.group()["marked_in_kernel"] == true);
            let captured = |a: &Agent| {
                let status = a.status().unwrap_or_default();
                (status["capture"]["requests"].as_u64().unwrap(), status["capture"]["bytes"].as_u64().unwrap())
            };
            let (requests, bytes) = captured(&agent);
            agent.wait("more was written", |a| captured(a).0 > requests + 500);
            let (_, now) = captured(&agent);
            assert_eq!(now, bytes, "data was copied");
            if killed {
                agent.kill();
                agent.start();
            }
            fake.set(|k| &k.hold_acks, false);
            agent.wait("captured again", |a| a.group()["marked_in_kernel"] == false);
            stop.store(true, Ordering::Release);
            writer.join().unwrap();
        });
        identical(&agent, &fake, &disk);
        let all = fake.group(|g| g.gaps.clone());
        assert!(all[gaps..].contains(&GapReason::Overflow), "{all:?}");
        // A restarted agent says that a gap begins whether or not one is open.
        assert!(consistents(&fake) > ended);
    }
}

/// The agent's own processor time is far above what it may take: it stops copying data in the kernel for a while, says so, and comes back.
#[test]
fn root_an_agent_that_costs_too_much_turns_capture_down() {
    if !root("cost watch") {
        return;
    }
    let seed = 78;
    let fake = FakeBox::start();
    let disk = Loop::new(128);
    let settings = "ring_mib = 16\nmemory_mib = 64\nspool_memory_mib = 16\nspool_mib = 0\ncpu_percent_max = 1\nheed_pressure = true";
    let mut agent = Agent::enrolled("cost", &fake, settings);
    agent.start();
    agent.protect(&disk);
    agent.wait("copied", |a| a.group()["state"] == "replicating");
    let stop = AtomicBool::new(false);
    let (cpu, gaps) = thread::scope(|scope| {
        let writer = scope.spawn(|| load_until(&disk, seed, &stop, Duration::from_millis(2)));
        agent.wait("turned down", |a| a.group()["marked_in_kernel"] == true);
        let said = agent.group()["pressure"].as_str().unwrap().to_owned();
        assert!(said.contains("only marked: the agent itself takes"), "{said}");
        wait("the box is told", || {
            fake.state.lock().unwrap().notices.iter().any(|n| matches!(n, wire::Notice::CaptureReduced { .. }))
        });
        let gaps = fake.group(|g| g.gaps.len());
        agent.wait("captured again", |a| a.group()["marked_in_kernel"] == false);
        stop.store(true, Ordering::Release);
        writer.join().unwrap();
        (agent.status().unwrap()["cpu_percent"].as_u64().unwrap(), gaps)
    });
    identical(&agent, &fake, &disk);
    assert!(gaps >= 2, "a gap is open while writes are only marked");
    wait("every gap has ended", || consistents(&fake) == fake.group(|g| g.gaps.len()));
    wait("the box is told that it is over", || fake.state.lock().unwrap().notices.is_empty());
    println!("{cpu} % of a processor at the end");
}

/// Two groups: the spool file of one lies on the disk that the other protects from then on. Then its blocks move.
#[test]
fn root_a_spool_file_that_moves_is_left_out_at_its_new_place() {
    if !root("moved spool") {
        return;
    }
    let fake = FakeBox::start();
    let (disk, other) = (Loop::new(192), Loop::new(32));
    run("mkfs.ext4", &["-q", "-F", disk.dev()]);
    let mount = Mount::new(&disk.device).unwrap();
    let settings = "ring_mib = 16\nmemory_mib = 64\nspool_memory_mib = 4\nspool_mib = 32";
    let mut agent = Agent::new("movedspool", Some(mount.at.join("state")), settings);
    agent.ok(&["enrol", "--box", &fake.address, "--token", &fake.token().to_string()]);
    agent.start();
    agent.connected();
    agent.ok(&["protect", other.dev(), "--group", "other"]);
    agent.wait("left out before anybody protects its disk", |a| a.group()["spool_pieces_left_out"].as_u64() >= Some(1));
    agent.protect(&disk);
    let group = |a: &Agent, name: &str| {
        let status = a.status().unwrap_or_default();
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        groups.into_iter().find(|g| g["name"] == name).unwrap_or_default()
    };
    agent.wait("copied", |a| group(a, "g")["state"] == "replicating" && group(a, "g")["dirty_bytes"] == 0);
    // The file of the same name lies elsewhere now, as after a move.
    let id = group(&agent, "other")["id"].as_str().unwrap().to_owned();
    let file = mount.at.join(format!("state/spool-{id}.bin"));
    let filler = mount.at.join("filler");
    std::fs::copy(&file, &filler).unwrap();
    std::fs::rename(&filler, &file).unwrap();
    run("sync", &[]);
    agent.wait("the move is seen", |a| a.log().contains("the spool file lies elsewhere now"));
    // What was left out at the old place is a part of the disk again: it is copied, and nothing differs but what is left out now.
    agent.wait("copied again", |a| {
        let g = group(a, "g");
        g["state"] == "replicating" && g["dirty_bytes"] == 0 && g["spool_records"] == 0
    });
    // Where the file cannot be found any more, nothing is spilled.
    std::fs::remove_file(&file).unwrap();
    agent.wait("given up", |a| {
        group(a, "other")["spool_note"].as_str().is_some_and(|n| n.contains("is not used any more"))
    });
    assert_eq!(group(&agent, "other")["spool_pieces_left_out"], 0);
    agent.stop();
    agent.ok(&["remove"]);
}

/// On btrfs no block stays where it is: a spool file there is used while nobody protects its disk, and not a moment longer.
#[test]
fn root_a_spool_file_that_cannot_be_left_out_is_not_written() {
    if !root("spool on btrfs") {
        return;
    }
    let fake = FakeBox::start();
    let (disk, other) = (Loop::new(256), Loop::new(32));
    run("mkfs.btrfs", &["-q", "-f", disk.dev()]);
    let mount = match Mount::new(&disk.device) {
        Ok(mount) => mount,
        Err(e) => return println!("SKIPPED: spool on btrfs: {e}"),
    };
    let settings = "ring_mib = 16\nmemory_mib = 64\nspool_memory_mib = 4\nspool_mib = 32";
    let mut agent = Agent::new("btrfsspool", Some(mount.at.join("state")), settings);
    agent.ok(&["enrol", "--box", &fake.address, "--token", &fake.token().to_string()]);
    agent.start();
    agent.connected();
    agent.ok(&["protect", other.dev(), "--group", "other"]);
    let group = |a: &Agent, name: &str| {
        let status = a.status().unwrap_or_default();
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        groups.into_iter().find(|g| g["name"] == name).unwrap_or_default()
    };
    let first = group(&agent, "other");
    assert_eq!((&first["spool_note"], &first["spool_file_io"]), (&"".into(), &"direct".into()), "{first}");
    agent.ok(&["protect", disk.dev(), "--group", "g"]);
    for name in ["g", "other"] {
        let now = group(&agent, name);
        let note = now["spool_note"].as_str().unwrap();
        assert!(note.contains("its file system (btrfs)"), "{name}: {note}");
        assert!(now["spool_file_io"].is_null(), "{now}");
    }
    agent.wait("copied", |a| group(a, "g")["state"] == "replicating");
    agent.stop();
    agent.ok(&["remove"]);
}

/// With the configuration as it is packaged, whatever the host does and however slow the box is.
#[test]
fn root_memory_stays_below_its_ceiling() {
    if !root("memory ceiling") {
        return;
    }
    const CEILING_KIB: u64 = 64 << 10;
    let fake = FakeBox::start();
    let disk = Loop::new(256);
    let mut agent = Agent::enrolled("memory", &fake, "spool_mib = 96");
    agent.start();
    // Right after the start: `protect` waits for the connection by itself.
    agent.ok(&["protect", disk.dev(), "--group", "g"]);
    let mut highest = 0;
    let mut look = |agent: &Agent, what: &str| {
        let kib = agent.resident_kib();
        highest = highest.max(kib);
        assert!(kib <= CEILING_KIB, "{what}: {kib} KiB are resident\n{}", agent.log());
    };
    agent.wait("replicating", |a| {
        look(a, "first copy");
        a.group()["state"] == "replicating"
    });
    // More than ring, memory and file take, in large and in small writes, while the box takes nothing durably.
    fake.set(|k| &k.hold_acks, true);
    let file = std::fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    for i in 0..160u64 {
        file.write_all_at(&vec![i as u8 | 1; 1 << 20], i << 20).unwrap();
        file.sync_all().unwrap();
        look(&agent, "large writes");
    }
    let mut rng = Rng::new(9);
    for i in 0..3000u64 {
        file.write_all_at(&vec![i as u8 | 1; 4096], rng.below(60_000) << 12).unwrap();
        file.sync_all().unwrap();
        if i % 100 == 0 {
            look(&agent, "small writes");
        }
    }
    fake.set(|k| &k.hold_acks, false);
    agent.wait("settled", |a| {
        look(a, "copying again");
        let g = a.group();
        g["state"] == "replicating" && g["spool_records"] == 0
    });
    identical(&agent, &fake, &disk);
    println!("at most {highest} KiB resident; peak, the start included: {} KiB", agent.peak_kib());
}

#[test]
fn enrolment_shows_the_token_only_to_the_right_box() {
    let (right, wrong) = (FakeBox::start(), FakeBox::start());
    let agent = Agent::new("enrol", None, "");
    let token = right.token().to_string();
    let out = agent.cli(&["enrol", "--box", &wrong.address, "--token", &token]);
    let said = text(&out);
    assert!(!out.status.success() && said.contains("not the one that made the token"), "{said}");
    assert!(wrong.state.lock().unwrap().enrols.is_empty(), "the token was sent");
    assert!(!agent.dir.path().join("state/identity.json").exists());
    // A token is good once.
    agent.ok(&["enrol", "--box", &right.address, "--token", &token]);
    use std::os::unix::fs::PermissionsExt;
    for name in ["host.pem", "ca.pem", "identity.json"] {
        let mode = std::fs::metadata(agent.dir.path().join("state").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let again = text(&agent.cli(&["enrol", "--box", &right.address, "--token", &token]));
    assert!(again.contains("did not take the token") && again.contains("holdfast host token"), "{again}");
    let mangled = text(&agent.cli(&["enrol", "--box", &right.address, "--token", "abc"]));
    assert!(mangled.contains("no token"), "{mangled}");
    let nobody = text(&agent.cli(&["enrol", "--box", "127.0.0.1:1", "--token", &token]));
    assert!(nobody.contains("could not reach the box at 127.0.0.1:1"), "{nobody}");
}

#[test]
fn configuration_errors_say_what_to_do() {
    let agent = Agent::new("config", None, "");
    let said = |config: &str| {
        std::fs::write(&agent.config, config).unwrap();
        let out = agent.cli(&["run"]);
        assert!(!out.status.success());
        text(&out)
    };
    let name = agent.config.display().to_string();
    let unknown = said("ring_mib = 8\nrig_mib = 3\n");
    assert!(unknown.contains(&name) && unknown.contains("line 2") && unknown.contains("rig_mib"), "{unknown}");
    assert!(said("").contains("is empty"));
    assert!(said("ring_mib = 3").contains("a power of two"));
    std::fs::remove_file(&agent.config).unwrap();
    let missing = text(&agent.cli(&["run"]));
    assert!(missing.contains("could not read") && missing.contains(&name), "{missing}");
}
