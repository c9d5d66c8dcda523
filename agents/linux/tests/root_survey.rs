//! A first copy, and a comparison after a crash, that leave out what a mounted file system does not use: on disks that are full of old bytes, under
//! a writer. What must be there is asked of other programs: the file systems' own tools say what is free, and nothing else may differ.

mod common;

use common::{agent::Agent, fakebox::FakeBox, *};
use model::{GapReason, Mark, WriteFlags};
use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const SETTINGS: &str = "copy = \"allocated\"\nring_mib = 64\nmemory_mib = 256\nspool_memory_mib = 128\nspool_mib = 0";
const BLOCK: usize = 4096;
const OLD_FILES: u64 = 24;
const OLD_BYTES: usize = 2 << 20;

struct FileSystem {
    name: &'static str,
    mib: u64,
    /// On a partition that begins in the middle of a granule, with old bytes behind it.
    partition: bool,
    make: &'static [&'static str],
    check: &'static [&'static str],
    reflink: bool,
}

/// Not discarded when it is made, and with groups that are not written out yet.
const EXT4: FileSystem = FileSystem {
    name: "ext4",
    mib: 272,
    partition: true,
    make: &["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=1"],
    check: &["e2fsck", "-fn"],
    reflink: false,
};
const XFS: FileSystem = FileSystem {
    name: "xfs",
    mib: 320,
    partition: false,
    make: &["mkfs.xfs", "-q", "-f", "-K", "-m", "rmapbt=0"],
    check: &["xfs_repair", "-n"],
    reflink: true,
};
const XFS_RMAP: FileSystem = FileSystem { make: &["mkfs.xfs", "-q", "-f", "-K", "-m", "rmapbt=1,reflink=1"], ..XFS };

const PART_START: u64 = 2056;

/// Different for each number, and nothing that would be zeroes.
fn pattern(number: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(number + 77);
    (0..len / 8).flat_map(|_| (rng.below(u64::MAX) | 1).to_le_bytes()).collect()
}

fn old(at: &Path, i: u64) -> PathBuf {
    at.join(format!("old-{i}"))
}

/// Two partitions: the file system's, and one with old bytes.
fn partition(disk: &Loop) -> bool {
    let sectors = disk.sectors() as u32;
    let second = sectors - (8 << 11);
    let mut table = vec![0u8; 512];
    for (i, (start, len)) in [(PART_START as u32, sectors - (16 << 11)), (second, 8 << 11)].into_iter().enumerate() {
        let entry = &mut table[446 + i * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&len.to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let whole = OpenOptions::new().write(true).open(&disk.device).unwrap();
    whole.write_all_at(&table, 0).unwrap();
    whole.sync_all().unwrap();
    drop(whole);
    let out = std::process::Command::new("partx").args(["-a", disk.dev()]).output().unwrap();
    let there = Path::new(&format!("{}p1", disk.dev())).exists();
    if !there {
        println!("SKIPPED: a file system on a partition: no partition nodes for loop devices here: {out:?}");
    }
    there
}

/// Free blocks of a file system that is not mounted, as its own tools list them, by block.
fn free_blocks(fs: &FileSystem, device: &Path) -> Vec<std::ops::Range<usize>> {
    let device = device.to_str().unwrap();
    let mut out = Vec::new();
    if fs.name == "ext4" {
        for line in run("dumpe2fs", &[device]).lines() {
            // The first such line is a number for all, and not indented.
            let Some(list) = line.strip_prefix("  Free blocks: ") else { continue };
            for piece in list.split(", ").filter(|p| !p.is_empty()) {
                let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
                out.push(first.parse().unwrap()..last.parse::<usize>().unwrap() + 1);
            }
        }
    } else {
        let size = run("xfs_db", &["-r", "-c", "sb 0", "-c", "p agblocks", device]);
        let per_group: usize = size.rsplit(' ').next().unwrap().parse().unwrap();
        for line in run("xfs_db", &["-r", "-c", "freesp -d", device]).lines() {
            let numbers: Vec<usize> = line.split_whitespace().map_while(|w| w.parse().ok()).collect();
            // The table of sizes that follows has fractions.
            let [group, start, len] = numbers[..] else { continue };
            out.push(group * per_group + start..group * per_group + start + len);
        }
    }
    assert!(out.len() > 2, "{device}: {out:?}");
    out
}

/// Until told to stop: files made, filled, synced, moved, cut and removed.
fn churn(at: PathBuf, reflink: bool, seed: u64, stop: Arc<AtomicBool>) -> thread::JoinHandle<u64> {
    thread::spawn(move || {
        let mut rng = Rng::new(seed);
        let mut rounds = 0;
        while !stop.load(Ordering::Acquire) {
            rounds += 1;
            let path = at.join(format!("churn-{}", rng.below(24)));
            match rng.below(10) {
                0..=5 => {
                    let mut file = File::create(&path).unwrap();
                    file.write_all(&pattern(rounds, 1 + rng.below(600_000) as usize)).unwrap();
                    if rng.below(3) == 0 {
                        file.sync_all().unwrap();
                    }
                }
                6 => drop(std::fs::remove_file(&path)),
                7 => drop(std::fs::rename(&path, at.join("moved"))),
                8 if reflink => {
                    let (from, to) = (old(&at, 0), at.join("clone"));
                    run("cp", &["--reflink=always", from.to_str().unwrap(), to.to_str().unwrap()]);
                    let clone = OpenOptions::new().write(true).open(&to).unwrap();
                    clone.write_all_at(&pattern(rounds, 8192), rng.below(200) * 8192).unwrap();
                }
                _ => {
                    // Allocated and never written: its old bytes are nobody's, and so these files go before disks are compared.
                    let path = at.join(format!("allocated-{}", rng.below(8)));
                    let file = File::create(&path).unwrap();
                    let out = std::process::Command::new("fallocate").args(["-l", "700000"]).arg(&path).status();
                    assert!(out.unwrap().success());
                    file.write_all_at(&pattern(rounds, 4096), 40_960).unwrap();
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
        rounds
    })
}

fn consistents(fake: &FakeBox) -> usize {
    fake.group(|g| g.marks.iter().filter(|(_, m)| matches!(m, Mark::Consistent)).count())
}

fn wait(what: &str, agent: &Agent, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}\n{}\n{:?}", agent.log(), agent.group());
        thread::sleep(Duration::from_millis(20));
    }
}

/// Mounts an image that a power cut could have left, looks at its files, and has it checked.
fn crash_image(fs: &FileSystem, image: &[u8], what: &str) {
    let copy = Loop::of_image(image);
    {
        let mount = Mount::new(&copy.device).unwrap_or_else(|e| panic!("{what}: mount: {e}"));
        let (a, b) = read_ordered(&mount.at);
        let (a, b) = (a.unwrap_or(0), b.unwrap_or(0));
        assert!(a >= b && a <= b + 1, "{what}: A={a} B={b}");
        for i in 0..OLD_FILES {
            let there = std::fs::read(old(&mount.at, i));
            if i % 3 == 2 {
                // Removed and not synced before the copy began: the moment is one after that was committed.
                assert!(there.is_err(), "{what}: a removed file is back");
            } else {
                assert!(there.unwrap() == pattern(i, OLD_BYTES), "{what}: file {i} is not what it was");
            }
        }
        // Every byte can be read: nothing refers to what is not there.
        run("tar", &["-cf", "/dev/null", "-C", mount.at.to_str().unwrap(), "."]);
    }
    let mut args = fs.check[1..].to_vec();
    args.push(copy.dev());
    run(fs.check[0], &args);
}

fn first_copy(fs: &FileSystem, seed: u64) {
    if !root(&format!("a first copy of {}", fs.name)) {
        return;
    }
    let total = fs.mib << 20;
    let fake = FakeBox::start();
    let disk = Loop::new(fs.mib);
    {
        // What lay on the disk before.
        let garbage = pattern(1 << 40, 1 << 20);
        let raw = OpenOptions::new().write(true).open(&disk.device).unwrap();
        (0..fs.mib).for_each(|i| raw.write_all_at(&garbage, i << 20).unwrap());
        raw.sync_all().unwrap();
    }
    if fs.partition && !partition(&disk) {
        return;
    }
    let device = if fs.partition { PathBuf::from(format!("{}p1", disk.dev())) } else { disk.device.clone() };
    let (offset, len) = match fs.partition {
        true => (PART_START as usize * 512, (fs.mib as usize - 16) << 20),
        false => (0, (fs.mib as usize) << 20),
    };
    let mut make = fs.make[1..].to_vec();
    make.push(device.to_str().unwrap());
    run(fs.make[0], &make);
    let mut agent = Agent::enrolled(&format!("survey-{seed}"), &fake, SETTINGS);
    agent.start();
    agent.connected();
    let mount = Mount::new(&device).unwrap();
    for i in 0..OLD_FILES {
        std::fs::write(old(&mount.at, i), pattern(i, OLD_BYTES)).unwrap();
    }
    run("sync", &["-f", mount.at.to_str().unwrap()]);
    let offered = agent.ok(&["disks", disk.dev()]);
    assert!(offered.contains("that no file system uses now"), "{offered}");

    let stop = Arc::new(AtomicBool::new(false));
    let load = churn(mount.at.clone(), fs.reflink, seed, stop.clone());
    let at = mount.at.clone();
    let ordered = thread::spawn(move || write_ordered(&at, 250));
    (0..OLD_FILES).filter(|i| i % 3 == 2).for_each(|i| std::fs::remove_file(old(&mount.at, i)).unwrap());
    agent.ok(&["protect", disk.dev(), "--group", "g"]);
    fake.group(|g| g.keep = true);
    wait("the first copy has ended", &agent, || consistents(&fake) > 0);
    {
        // Old bytes that the box does not have; or all of this would prove nothing.
        let image = disk.image();
        let differ = |g: &mut common::fakebox::BoxGroup| {
            image.chunks(BLOCK).zip(g.images[0].chunks(BLOCK)).filter(|(a, b)| a != b).count()
        };
        let differ = fake.group(differ) as u64 * BLOCK as u64;
        assert!(differ > total / 3, "{differ} bytes were left out");
    }
    let (copied, zero, gaps) = fake.group(|g| (g.sync_bytes, g.zero_bytes, g.gaps.clone()));
    let unused = agent.group()["unused_bytes"].as_u64().unwrap();
    println!("{}: {total} bytes, {unused} not used, {copied} copied, {zero} zeroes", fs.name);
    assert_eq!(gaps, [GapReason::InitialSync]);
    assert!(unused > total / 3, "{unused} of {total}");
    // Writes under the copy come on top; a tenth is far more than they can be.
    assert!(copied + zero <= total - unused + total / 10, "{copied} and {zero} of {total}, {unused} not used");
    let status = agent.ok(&["status"]);
    assert!(status.contains("no file system used them"), "{status}");
    ordered.join().unwrap();
    run("fstrim", &[mount.at.to_str().unwrap()]);
    thread::sleep(Duration::from_millis(500));
    agent.settled();
    let (base, kept) = fake.group(|g| {
        g.keep = false;
        (std::mem::take(&mut g.at_consistent), std::mem::take(&mut g.kept))
    });

    // A host that crashed: what was written then nobody saw, and the whole disk is suspected, but for what is free.
    agent.stop();
    agent.forget_boot();
    thread::sleep(Duration::from_millis(300));
    std::fs::write(mount.at.join("missed"), pattern(9_000, 3 << 20)).unwrap();
    let (copied, consistent) = (fake.group(|g| g.sync_bytes), consistents(&fake));
    agent.start();
    wait("the comparison has ended", &agent, || consistents(&fake) > consistent);
    let copied = fake.group(|g| g.sync_bytes) - copied;
    let group = agent.group();
    let (unused, same) = (group["unused_bytes"].as_u64().unwrap(), group["found_same_bytes"].as_u64().unwrap());
    println!("{}: after a crash {copied} bytes copied, {same} found the same, {unused} not looked at", fs.name);
    assert!(unused > total / 3 && same + unused <= total, "{unused} not used, {same} the same, of {total}");
    assert!(copied < total / 4, "{copied} of {total}");
    assert_eq!(fake.group(|g| g.gaps.last().copied()), Some(GapReason::Verify));
    stop.store(true, Ordering::Release);
    let rounds = load.join().unwrap();
    for i in 0..8 {
        let _ = std::fs::remove_file(mount.at.join(format!("allocated-{i}")));
    }
    drop(mount);

    // Nothing differs but what the file system's own tools call free.
    agent.settled();
    let image = disk.image();
    let mut free = vec![false; image.len() / BLOCK];
    for range in free_blocks(fs, &device) {
        free[range.start + offset / BLOCK..range.end + offset / BLOCK].fill(true);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (differ, wrong) = fake.group(|g| {
            let blocks = image.chunks(BLOCK).zip(g.images[0].chunks(BLOCK)).enumerate();
            let differ: Vec<usize> = blocks.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
            let wrong: Vec<usize> = differ.iter().copied().filter(|i| !free[*i]).collect();
            (differ.len(), wrong)
        });
        if wrong.is_empty() {
            println!("{}: {differ} blocks differ, all of them free; {rounds} rounds of load", fs.name);
            break;
        }
        assert!(Instant::now() < deadline, "blocks in use differ: {wrong:?}\n{}\n{:?}", agent.log(), agent.group());
        thread::sleep(Duration::from_millis(50));
    }
    agent.stop();
    agent.ok(&["remove"]);
    if fs.partition {
        run("partx", &["-d", disk.dev()]);
    }
    let last = fake.group(|g| g.images[0][offset..offset + len].to_vec());
    drop((disk, image));
    crash_image(fs, &last, &format!("{}, seed {seed}, at the end", fs.name));

    // The first moment that can be opened, the last, and some between.
    let mut rng = Rng::new(seed);
    let mut cuts: Vec<usize> = (0..6).map(|_| rng.below(kept.len() as u64) as usize).collect();
    cuts.extend([0, kept.len()]);
    cuts.sort_unstable();
    let mut images = base;
    let mut applied = 0;
    for mut cut in cuts {
        while cut > applied && kept[cut - 1].flags.contains(WriteFlags::MORE) {
            cut -= 1;
        }
        kept[applied..cut].iter().for_each(|k| k.apply(&mut images));
        applied = cut;
        let what = format!("{}, seed {seed}, cut {cut} of {}", fs.name, kept.len());
        crash_image(fs, &images[0][offset..offset + len], &what);
    }
}

#[test]
fn root_a_first_copy_of_ext4_leaves_out_what_it_does_not_use() {
    first_copy(&EXT4, 31);
}

#[test]
fn root_a_first_copy_of_xfs_leaves_out_what_it_does_not_use() {
    first_copy(&XFS, 32);
}

#[test]
fn root_a_first_copy_of_xfs_with_a_reverse_map_leaves_out_what_it_does_not_use() {
    first_copy(&XFS_RMAP, 33);
}

/// What does not tell, or not for certain, is copied whole, and the reason is shown.
#[test]
fn root_what_is_not_understood_is_copied_whole() {
    if !root("file systems that are copied whole") {
        return;
    }
    let fake = FakeBox::start();
    let mut agent = Agent::enrolled("whole", &fake, SETTINGS);
    agent.start();
    agent.connected();
    let cases: [(&str, &[&str], &str); 4] = [
        ("btrfs", &["mkfs.btrfs", "-q", "-f", "-K"], "btrfs does not tell"),
        ("nojournal", &["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-O", "^has_journal"], "no journal"),
        (
            "bigalloc",
            &["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-O", "bigalloc", "-C", "65536"],
            "features that are not known",
        ),
        ("readonly", &["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], "mounted read-only"),
    ];
    for (group, make, why) in cases {
        let disk = Loop::new(160);
        let garbage = pattern(3, 1 << 20);
        let raw = OpenOptions::new().write(true).open(&disk.device).unwrap();
        (0..160).for_each(|i| raw.write_all_at(&garbage, i << 20).unwrap());
        raw.sync_all().unwrap();
        drop(raw);
        let mut args = make[1..].to_vec();
        args.push(disk.dev());
        run(make[0], &args);
        let mount = Mount::new(&disk.device).unwrap();
        std::fs::write(mount.at.join("f"), pattern(4, 1 << 20)).unwrap();
        if group == "readonly" {
            run("mount", &["-o", "remount,ro", mount.at.to_str().unwrap()]);
        }
        agent.ok(&["protect", disk.dev(), "--group", group]);
        agent.settled();
        let said = agent.group();
        assert_eq!(said["unused_bytes"], 0, "{group}: {said}");
        let whole = said["copied_whole"].to_string();
        assert!(whole.contains(why) && whole.contains("copied whole"), "{group}: {whole}");
        drop(mount);
        common::agent::identical(&agent, &fake, &disk);
        agent.ok(&["unprotect", group]);
    }
}
