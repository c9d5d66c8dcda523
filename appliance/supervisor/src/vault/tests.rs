//! The journal thread on a disk that lies on purpose: power cuts with torn and lost writes, failed writes, two groups on one disk.

use super::*;
use crate::exports::{driver::Op, lane::Lane};
use bytes::Bytes;
use durable::SimDisk;
use model::{Lsn, RecoveryPoint, Sectors, VolumeId, VolumeSpec};
use nbd::{Command as Nbd, ExportInfo, Exports, HandshakeConfig, Request, ServerHandshake, Session, Step, TlsPolicy};
use std::task::Waker;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

struct One;

impl Exports for One {
    fn find(&self, _: &str) -> Option<ExportInfo> {
        Some(ExportInfo::read_write(ByteLen(BLOCK * BLOCKS)))
    }
    fn list(&self) -> Vec<nbd::ExportEntry> {
        Vec::new()
    }
}

fn session() -> Session {
    let mut handshake = ServerHandshake::new(HandshakeConfig { tls: TlsPolicy::None });
    // Flags, then EXPORT_NAME with an empty name.
    let said = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat();
    let mut said = &said[..];
    loop {
        match handshake.step(&One).unwrap() {
            Step::Write(_) => {}
            Step::Read(len) => {
                let (now, later) = said.split_at(len);
                handshake.feed(now);
                said = later;
            }
            Step::Ready(session) => return session,
            other => panic!("{other:?}"),
        }
    }
}

/// A client without sockets.
struct Client {
    group: Arc<Group>,
    lane: Arc<Lane>,
    cookie: u64,
}

impl Client {
    fn of(vault: &Vault) -> Self {
        let group = vault.find("g").unwrap();
        let lane = Arc::new(Lane::new(session(), VolumeId(0)).in_life(group.shared.life()));
        Self { group, lane, cookie: 0 }
    }
    fn send(&mut self, command: Nbd, offset: u64, payload: Vec<u8>) {
        self.cookie += 1;
        let request = Request { cookie: self.cookie, command, offset, len: payload.len() as u32 };
        self.lane.outbox.take_on(crate::exports::lane::cost(&request));
        let ops = vec![Op { request, payload: Bytes::from(payload) }];
        self.group.push(Command::Nbd { lane: Arc::clone(&self.lane), ops }).ok().unwrap();
    }
    /// Errors of the answers that came, in the order they came: 16 bytes each.
    fn answers(&self) -> Vec<(u64, u32)> {
        let mut out = Vec::new();
        self.lane.outbox.collect(&mut out, Waker::noop(), true);
        let word = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
        out.chunks(16).map(|r| (u64::from_be_bytes(r[8..16].try_into().unwrap()), word(&r[4..8]))).collect()
    }
    fn wait_all(&self) -> Vec<(u64, u32)> {
        let mut all = Vec::new();
        until("answers", || {
            all.extend(self.answers());
            self.lane.outbox.owed() == 0
        });
        all.extend(self.answers());
        all
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + DEADLINE;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

struct World {
    vault: Arc<Vault>,
    events: Arc<Events>,
    _index: tempfile::TempDir,
}

fn start(disk: &SimDisk) -> World {
    start_keeping(disk, 0)
}

/// With room that is to be kept free on the disk.
fn start_keeping(disk: &SimDisk, keep_free_mib: u64) -> World {
    let index = tempfile::tempdir().unwrap();
    let clock = Clock::start();
    let events = Arc::new(Events::new(clock));
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let vault = Vault::start(VaultParts {
        root: index.path().to_owned(),
        disk: Arc::clone(&disk),
        journal: JournalConfig {
            segment_mib: 1,
            prepared_ahead: 1,
            batch_kib: 256,
            keep_free_mib,
            ..JournalConfig::default()
        },
        clock,
        events: Arc::clone(&events),
        catalog: Arc::new(Catalog::open(disk).unwrap().0),
        reads: Arc::new(ReadPool::start(&events).unwrap()),
    });
    World { vault: vault.unwrap(), events, _index: index }
}

fn spec() -> GroupSpec {
    let volume =
        VolumeSpec { id: VolumeId(0), name: "v".into(), sectors: Sectors(BLOCK * BLOCKS / 512), identity: "i".into() };
    GroupSpec {
        id: GroupId([4; 16]),
        name: "g".into(),
        host: None,
        volumes: vec![volume],
        policy: GroupPolicy::default(),
    }
}

fn content(version: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(BLOCK as usize / 8)
}

/// The image of a view: the version of each block.
fn versions(group: &Group, at: &RecoveryPoint) -> (Lsn, Vec<u64>) {
    let reader = group.reader().unwrap();
    let view = reader.view(reader.resolve(at).unwrap()).unwrap();
    let mut image = vec![0; (BLOCK * BLOCKS) as usize];
    view.read(VolumeId(0), 0, &mut image).unwrap();
    let version = |block: &[u8]| {
        let version = u64::from_le_bytes(block[..8].try_into().unwrap());
        assert!(block.chunks(8).all(|w| w == version.to_le_bytes()), "a torn block");
        version
    };
    (view.point().lsn, image.chunks(BLOCK as usize).map(version).collect())
}

fn wait_running(group: &Group) {
    until("the group to run", || matches!(group.shared.phase(), Phase::Running(_)));
}

#[test]
fn a_power_cut_loses_nothing_that_was_acknowledged() {
    for seed in 1..=40u64 {
        let mut disk = SimDisk::new(seed, ByteLen(1 << 30));
        let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut draw = |n: u64| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            rng % n
        };
        // Blocks in the order they were written; the version is the index plus one.
        let (mut issued, mut durable) = (Vec::<u64>::new(), 0usize);
        for life in 0..3 {
            let world = start(&disk);
            if life == 0 {
                world.vault.create(spec()).unwrap();
            }
            let mut client = Client::of(&world.vault);
            wait_running(&client.group);
            let (lsn, found) = versions(&client.group, &RecoveryPoint::Latest);
            let len = found.iter().copied().max().unwrap() as usize;
            assert!(
                len >= durable && len <= issued.len(),
                "seed {seed}, life {life}: {len} of {durable}..={}",
                issued.len()
            );
            assert_eq!(lsn, Lsn(1 + len as u64), "seed {seed}, life {life}");
            let mut want = vec![0; BLOCKS as usize];
            issued[..len].iter().enumerate().for_each(|(i, block)| want[*block as usize] = i as u64 + 1);
            assert_eq!(found, want, "seed {seed}, life {life}");
            issued.truncate(len);
            // Which write a cookie stands for, and whether its answer proves it durable.
            let mut sent = BTreeMap::new();
            for _ in 0..30 + draw(300) {
                let fua = draw(6) == 0;
                if draw(12) == 0 {
                    client.send(Nbd::Flush, 0, Vec::new());
                    sent.insert(client.cookie, issued.len());
                } else {
                    let block = draw(BLOCKS);
                    issued.push(block);
                    client.send(Nbd::Write { fua }, block * BLOCK, content(issued.len() as u64));
                    if fua {
                        sent.insert(client.cookie, issued.len());
                    }
                }
            }
            // The power goes while some of it is under way.
            let wait = draw(3);
            until("some answers", || {
                for (cookie, error) in client.answers() {
                    assert_eq!(error, 0, "seed {seed}");
                    durable = durable.max(sent.get(&cookie).copied().unwrap_or(0));
                }
                wait == 0 || client.lane.outbox.owed() == 0 || (wait == 1 && durable > 0)
            });
            let next = disk.power_cut();
            world.vault.close();
            // What was acknowledged up to the cut counts, and what failed after it does not.
            for (cookie, error) in client.answers() {
                if error == 0 && sent.contains_key(&cookie) {
                    // Sent before the power went, or by a thread that had its completion already.
                    durable = durable.max(sent[&cookie]);
                }
            }
            disk = next;
        }
    }
}

#[test]
fn after_a_failed_write_the_group_opens_again_by_itself() {
    let disk = SimDisk::new(3, ByteLen(1 << 30));
    let world = start(&disk);
    let group = world.vault.create(spec()).unwrap();
    wait_running(&group);
    let mut client = Client::of(&world.vault);
    client.send(Nbd::Write { fua: true }, 0, content(1));
    assert_eq!(client.wait_all(), [(1, 0)]);
    // Two connections of one client: what is flushed on one covers what was answered on both.
    let mut other = Client::of(&world.vault);
    disk.fail_write_at(Path::new("groups").join(group.id().to_string()).join("seg"));
    other.send(Nbd::Write { fua: false }, 3 * BLOCK, content(4));
    assert_eq!(other.wait_all(), [(1, 0)], "a plain write is answered at once");
    client.send(Nbd::Write { fua: true }, BLOCK, content(2));
    let answers = client.wait_all();
    assert!(answers.len() == 1 && answers[0].1 == 5, "{answers:?}");
    until("the group to stop", || world.events.count(Event::GroupStopped) == 1);
    // While it is stopped everything is refused by name, and nobody waits for ever.
    client.send(Nbd::Flush, 0, Vec::new());
    client.wait_all();
    until("the group to come back", || world.events.count(Event::GroupReopened) == 1);
    wait_running(&group);
    // What was answered and not flushed may be lost: a flush on a connection from before must not say that it is safe.
    for old in [&mut client, &mut other] {
        old.send(Nbd::Flush, 0, Vec::new());
        let answers = old.wait_all();
        assert!(answers.len() == 1 && answers[0].1 == 5, "{answers:?}");
        let end = old.lane.outbox.collect(&mut Vec::new(), Waker::noop(), false);
        assert!(end.closing, "the client is made to connect again");
    }
    let mut client = Client::of(&world.vault);
    client.send(Nbd::Write { fua: true }, 2 * BLOCK, content(3));
    assert!(client.wait_all().iter().all(|(_, error)| *error == 0));
    let (_, found) = versions(&group, &RecoveryPoint::Latest);
    assert_eq!((found[0], found[2]), (1, 3));
    assert!(found[1] == 0 || found[1] == 2, "the failed write is there or not: {}", found[1]);
    world.vault.close();
}

#[test]
fn what_a_crash_left_half_made_or_half_deleted_is_finished() {
    for cut in 0..60 {
        let disk = SimDisk::new(cut + 1, ByteLen(1 << 30));
        let world = start(&disk);
        disk.cut_after(cut);
        let created = world.vault.create(spec());
        let next = disk.power_cut();
        world.vault.close();
        let world = start(&next);
        match world.vault.find("g") {
            Some(group) => {
                wait_running(&group);
                until("the first moment", || group.reader().is_ok_and(|r| r.resolve(&RecoveryPoint::Latest).is_ok()));
            }
            None => {
                assert!(created.is_err(), "cut {cut}: a group that was made is gone");
                // And its name and id are free.
                world.vault.create(spec()).unwrap();
            }
        }
        assert_eq!(world.events.count(Event::Stray), 0, "cut {cut}: something was left behind");
        // The other way round.
        let group = world.vault.find("g").unwrap();
        wait_running(&group);
        next.cut_after(cut);
        let deleted = world.vault.delete(&group);
        let last = next.power_cut();
        world.vault.close();
        let world = start(&last);
        if deleted.is_ok() {
            assert!(world.vault.find("g").is_none(), "cut {cut}: a deleted group is back");
        }
        match world.vault.find("g") {
            Some(group) => wait_running(&group),
            None => assert!(last.paths().iter().all(|p| !p.starts_with("groups")), "cut {cut}: {:?}", last.paths()),
        }
        world.vault.close();
    }
}

#[test]
fn a_branch_is_made_and_deleted_whole_or_not_at_all_whenever_power_is_cut() {
    let branch_id = GroupId([77; 16]);
    for cut in 0..90 {
        let disk = SimDisk::new(cut + 1, ByteLen(1 << 30));
        let world = start(&disk);
        let trunk = world.vault.create(spec()).unwrap();
        wait_running(&trunk);
        let latest = || {
            let mut found = None;
            until("the first moment", || {
                found = trunk.reader().ok().and_then(|r| r.resolve(&RecoveryPoint::Latest).ok());
                found.is_some()
            });
            found.unwrap()
        };
        let at = latest();
        disk.cut_after(cut);
        let made = world.vault.create_branch(&trunk, at, branch_id, "b");
        let next = disk.power_cut();
        world.vault.close();
        let world = start(&next);
        let trunk = world.vault.find("g").unwrap();
        wait_running(&trunk);
        let held = |trunk: &Group| trunk.reader().unwrap().branches();
        match world.vault.find("b") {
            Some(branch) => {
                wait_running(&branch);
                assert_eq!(held(&trunk), [(branch_id, at.timeline, at.lsn)], "cut {cut}");
            }
            None => {
                assert!(made.is_err(), "cut {cut}: a branch that was made is gone");
                assert!(held(&trunk).is_empty(), "cut {cut}: a moment is held for nothing");
                let branch = world.vault.create_branch(&trunk, at, branch_id, "b").unwrap();
                wait_running(&branch);
            }
        }
        assert_eq!(world.events.count(Event::Stray), 0, "cut {cut}: something was left behind");
        let branch = world.vault.find("b").unwrap();
        assert!(world.vault.delete(&trunk).is_err(), "cut {cut}: deleted under its branch");
        next.cut_after(cut);
        let deleted = world.vault.delete(&branch);
        let last = next.power_cut();
        world.vault.close();
        let world = start(&last);
        let trunk = world.vault.find("g").unwrap();
        wait_running(&trunk);
        if deleted.is_ok() {
            assert!(world.vault.find("b").is_none(), "cut {cut}: a deleted branch is back");
        }
        match world.vault.find("b") {
            Some(branch) => wait_running(&branch),
            None => {
                assert!(held(&trunk).is_empty(), "cut {cut}: a moment is held for nothing");
                let folder = format!("groups/{branch_id}");
                assert!(last.paths().iter().all(|p| !p.starts_with(&folder)), "cut {cut}: {:?}", last.paths());
            }
        }
        world.vault.close();
    }
}

#[test]
fn groups_that_share_a_disk_give_up_history_by_priority() {
    let disk = SimDisk::new(9, ByteLen(64 << 20));
    // With seven segments for a fold and two prepared ones 29 MiB: more than two histories leave, less than one does.
    let world = start_keeping(&disk, 20);
    let make = |name: &str, id: u8, priority: u8| {
        let policy = GroupPolicy { priority, window_hours: 72, window_hours_floor: 0, ..GroupPolicy::default() };
        world.vault.create(GroupSpec { id: GroupId([id; 16]), name: name.into(), policy, ..spec() }).unwrap()
    };
    let (low, high) = (make("g", 1, 1), make("h", 2, 200));
    wait_running(&low);
    wait_running(&high);
    for group in [&low, &high] {
        let mut client =
            Client { group: Arc::clone(group), lane: Arc::new(Lane::new(session(), VolumeId(0))), cookie: 0 };
        for round in 0..5000u64 {
            client.send(Nbd::Write { fua: false }, round % BLOCKS * BLOCK, content(round));
            if round % 256 == 0 {
                client.wait_all();
            }
        }
        client.send(Nbd::Flush, 0, Vec::new());
        let answers = client.wait_all();
        assert!(answers.iter().all(|(_, e)| *e == 0), "{answers:?}");
        world.vault.balance();
    }
    // 40 MiB of history and what is prepared do not leave the reserve: the one of low priority gives up its own first.
    let floor = |group: &Group| group.reader().unwrap().stats().floor;
    until("history to be given up", || {
        world.vault.balance();
        floor(&low) > Lsn::ZERO
    });
    assert_eq!(floor(&high), Lsn::ZERO, "the group of high priority gave up history");
    // Neither lost a write by it: block b was written last in round 4992 + b, or 4928 + b where that is past the end.
    let want: Vec<u64> = (0..BLOCKS).map(|b| if 4992 + b < 5000 { 4992 + b } else { 4928 + b }).collect();
    // And the one of high priority has its old moments still: LSN n + 2 is right behind round n.
    for n in [64, 500, 2500, 4999] {
        let then: Vec<u64> = (0..BLOCKS).map(|b| n - (n + BLOCKS - b) % BLOCKS).collect();
        assert_eq!(versions(&high, &RecoveryPoint::Lsn(Lsn(n + 2))).1, then, "behind round {n}");
    }
    for group in [&low, &high] {
        assert_eq!(versions(group, &RecoveryPoint::Latest).1, want, "{group:?}");
    }
    world.vault.close();
}
