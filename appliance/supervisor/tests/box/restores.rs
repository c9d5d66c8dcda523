//! Restores over the wire: a machine whose disks are in memory, with the real target machine, cut and killed in the middle.

use crate::{
    agent::{Conn, Identity},
    ingest::{Change, History, change},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
};
use model::{ByteLen, RecordKind, SECTOR, VolumeId};
use nbd::client::Client;
use replication::restore::{Target, TargetAction, TargetConfig, TargetEvent};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use wire::{BlockHash, FrameHeader, FrameKind, Message, Purpose, TargetDisk, Unpacker, decode_message};

const SIZE: u64 = 8 << 20;

/// What the machine's thread and its test share.
struct Shared {
    box_at: Mutex<SocketAddr>,
    disks: Mutex<Vec<Vec<u8>>>,
    in_use: AtomicBool,
    /// What is written does not stay so.
    broken: AtomicBool,
    stop: AtomicBool,
    cut: AtomicBool,
    /// Bytes of frames with data that came.
    received: AtomicU64,
    rebooted: AtomicBool,
    connections: AtomicU64,
}

/// A machine that waits for its disks.
pub struct Machine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    pub fn start(control: &impl Control, at: SocketAddr, name: &str, disks: Vec<Vec<u8>>) -> Self {
        let token = control.ok("POST", "tokens", "{}")["token"].as_str().unwrap().to_owned();
        Self::of(Identity::enrol(at, &token, name).unwrap(), at, disks, false)
    }
    /// `steady`: always the same agent, as one that does more than this.
    pub fn of(identity: Identity, at: SocketAddr, disks: Vec<Vec<u8>>, steady: bool) -> Self {
        let shared = Arc::new(Shared {
            box_at: Mutex::new(at),
            disks: Mutex::new(disks),
            in_use: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            received: AtomicU64::new(0),
            rebooted: AtomicBool::new(false),
            connections: AtomicU64::new(0),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let mut identity = identity;
                while !shared.stop.load(Ordering::Acquire) {
                    let _ = Life::new(&shared).live(&identity);
                    // Now and then another agent, which may have lost what was not flushed.
                    if !steady && shared.connections.load(Ordering::Acquire) % 3 == 2 {
                        identity = identity.of_instance([shared.connections.load(Ordering::Acquire) as u8 | 1; 16]);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
        };
        Self { shared, thread: Some(thread) }
    }
    pub fn disk(&self, n: usize) -> Vec<u8> {
        self.shared.disks.lock().unwrap()[n].clone()
    }
    /// As what runs on the machine does, when nothing restores it.
    pub fn write(&self, n: usize, at: usize, data: &[u8]) {
        self.shared.disks.lock().unwrap()[n][at..][..data.len()].copy_from_slice(data);
    }
    /// Whether it was told to restart.
    pub fn rebooted(&self) -> bool {
        self.shared.rebooted.load(Ordering::Acquire)
    }
    /// The box listens elsewhere now.
    pub fn move_to(&self, at: SocketAddr) {
        *self.shared.box_at.lock().unwrap() = at;
    }
    fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Acquire)
    }
    fn cut(&self) {
        let before = self.shared.connections.load(Ordering::Acquire);
        self.shared.cut.store(true, Ordering::Release);
        wait_for("another connection", || (self.shared.connections.load(Ordering::Acquire) > before).then_some(()));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One connection's life.
struct Life<'a> {
    shared: &'a Shared,
    target: Target,
    names: BTreeMap<VolumeId, usize>,
    unpacker: Unpacker,
}

impl<'a> Life<'a> {
    fn new(shared: &'a Shared) -> Self {
        let target = Target::new(TargetConfig { bytes_max: 1 << 20, records_max: 64 });
        Self { shared, target, names: BTreeMap::new(), unpacker: Unpacker::new().unwrap() }
    }

    fn live(&mut self, identity: &Identity) -> io::Result<()> {
        let at = *self.shared.box_at.lock().unwrap();
        let mut conn = identity.dial(at)?;
        let greeted = conn.hello_as(5, identity.host, Purpose::Restore, identity.instance);
        greeted.map_err(|refusal| io::Error::other(refusal.to_string()))?;
        let mut told = None;
        let mut beats = 0;
        self.shared.cut.store(false, Ordering::Release);
        loop {
            let in_use = self.shared.in_use.load(Ordering::Acquire);
            if told != Some(in_use) {
                told = Some(in_use);
                conn.try_say(&Message::RestoreDisks(self.list()))?;
                if beats == 0 {
                    self.shared.connections.fetch_add(1, Ordering::AcqRel);
                }
            }
            beats += 1;
            conn.try_say(&Message::heartbeat(beats, model::MonoTime(0)))?;
            for (header, payload) in conn.frames(Duration::from_millis(50))? {
                self.frame(&mut conn, header, &payload)?;
                if self.shared.cut.swap(false, Ordering::AcqRel) {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
            if self.shared.stop.load(Ordering::Acquire) || self.shared.cut.swap(false, Ordering::AcqRel) {
                return Ok(());
            }
        }
    }

    fn list(&self) -> Vec<TargetDisk> {
        let disks = self.shared.disks.lock().unwrap();
        let in_use = self.shared.in_use.load(Ordering::Acquire).then(|| "mounted at /".to_owned());
        let disk = |(n, disk): (usize, &Vec<u8>)| TargetDisk {
            path: format!("/dev/d{n}"),
            bytes: ByteLen(disk.len() as u64),
            model: "memory".into(),
            serial: format!("M{n}"),
            identity: format!("serial:M{n}"),
            holds: None,
            in_use: in_use.clone(),
        };
        disks.iter().enumerate().map(disk).collect()
    }

    fn frame(&mut self, conn: &mut Conn, header: FrameHeader, payload: &[u8]) -> io::Result<()> {
        let event = match header.kind {
            FrameKind::Record(_) => {
                self.shared.received.fetch_add(payload.len() as u64, Ordering::AcqRel);
                TargetEvent::Record(header)
            }
            FrameKind::Ack => panic!("an ack from a box"),
            FrameKind::Message => match decode_message(&header, payload).unwrap() {
                Message::HeartbeatAck { .. } | Message::RestoreProgress(_) => return Ok(()),
                Message::Refuse(refusal) => return Err(io::Error::other(refusal.to_string())),
                Message::RestoreOpen { restore, disks } => {
                    let number = |path: &str| path.strip_prefix("/dev/d").unwrap().parse().unwrap();
                    self.names = disks.iter().map(|d| (d.disk, number(&d.path))).collect();
                    TargetEvent::Open { restore, disks }
                }
                Message::RestoreLook(look) => TargetEvent::Look(look),
                Message::RestoreFetch { id, disk, extent } => TargetEvent::Fetch { id, disk, extent },
                Message::RestoreEnd { restore, reboot } => TargetEvent::End { restore, reboot },
                other => panic!("{}", other.name()),
            },
        };
        self.event(conn, event, Some((header, payload)))
    }

    fn event(&mut self, conn: &mut Conn, event: TargetEvent, frame: Option<(FrameHeader, &[u8])>) -> io::Result<()> {
        let mut out = Vec::new();
        self.target.on(event, &mut out).expect("an honest box");
        for action in out {
            let done = match action {
                TargetAction::Open { .. } => TargetEvent::Opened { refused: None },
                TargetAction::Close => TargetEvent::Closed { refused: None },
                TargetAction::Hash(look) => {
                    let disks = self.shared.disks.lock().unwrap();
                    let disk = &disks[self.names[&look.disk]];
                    let hash = |e: model::Extent| BlockHash::of(&disk[at(&e)]);
                    let hashes = wire::blocks(&look.runs, look.block_sectors).map(hash).collect();
                    TargetEvent::Hashed { id: look.id, hashes }
                }
                TargetAction::Read { id, disk, extent } => {
                    let data = self.shared.disks.lock().unwrap()[self.names[&disk]][at(&extent)].to_vec();
                    TargetEvent::Read { id, data }
                }
                TargetAction::Write { seq } => {
                    let (header, payload) = frame.expect("a record");
                    let mut disks = self.shared.disks.lock().unwrap();
                    let place = &mut disks[self.names[&header.volume]][at(&header.extent)];
                    match header.kind {
                        FrameKind::Record(RecordKind::Write) => {
                            self.unpacker.unpack(header.codec, payload, place).unwrap();
                        }
                        _ => place.fill(0),
                    }
                    if self.shared.broken.load(Ordering::Acquire) {
                        place[0] ^= 1;
                    }
                    TargetEvent::Wrote { seq }
                }
                TargetAction::Sync { seq } => TargetEvent::Synced { seq },
                TargetAction::Say(message) => {
                    conn.try_say(&message)?;
                    continue;
                }
                TargetAction::Ack(ack) => {
                    let mut bytes = Vec::new();
                    ack.encode(&mut bytes);
                    conn.raw(&bytes)?;
                    continue;
                }
                TargetAction::Reboot => {
                    self.shared.rebooted.store(true, Ordering::Release);
                    continue;
                }
            };
            self.event(conn, done, None)?;
        }
        Ok(())
    }
}

fn at(extent: &model::Extent) -> std::ops::Range<usize> {
    (extent.start() * SECTOR) as usize..(extent.end() * SECTOR) as usize
}

/// An ingest group with one disk, and what was written to it.
struct Group {
    id: Value,
    export: String,
    history: History,
    start: Vec<u8>,
}

impl Group {
    fn make(control: &impl Control, name: &str) -> Self {
        Self::of(&control.make_group(name, &[("system", SIZE)]), vec![0; SIZE as usize])
    }
    fn of(made: &Value, start: Vec<u8>) -> Self {
        let export = made["exports"][0]["export_name"].as_str().unwrap().to_owned();
        Self { id: made["id"].clone(), export, history: History::fresh(), start }
    }
    fn client(&self, control: &impl Control) -> Client<UnixStream> {
        control.ingest(&self.export)
    }
    fn grow(&mut self, control: &impl Control, rng: &mut Rng, changes: usize) {
        let mut client = self.client(control);
        for _ in 0..changes {
            change(&mut client, rng, &mut self.history).unwrap();
        }
        client.flush().unwrap();
    }
    fn at(&self, lsn: u64) -> Vec<u8> {
        let mut image = self.start.clone();
        for (_, change) in self.history.changes.iter().take_while(|(at, _)| *at <= lsn) {
            match change {
                Change::Write(offset, data) => image[*offset as usize..][..data.len()].copy_from_slice(data),
                Change::Zero(offset, len) => image[*offset as usize..][..*len as usize].fill(0),
            }
        }
        image
    }
    fn now(&self) -> Vec<u8> {
        self.at(self.history.lsn)
    }
}

fn wish(id: &str, target: &str, from: &Value, group: &Group, keep_old: bool) -> String {
    json!({
        "id": id,
        "target": target,
        "from": [from],
        "disks": [{ "group": group.id, "volume": 0, "path": "/dev/d0" }],
        "keep_old": keep_old,
    })
    .to_string()
}

fn moment(group: &Group, lsn: u64) -> Value {
    json!({ "point": { "group": group.id, "at": { "lsn": lsn } } })
}
fn newest(group: &Group) -> Value {
    json!({ "branch": { "group": group.id } })
}

fn status(control: &impl Control, id: &str) -> Value {
    control.get(&format!("restores/{id}"))
}
fn wait_phase(control: &impl Control, id: &str, phase: &str) -> Value {
    wait_for(phase, || {
        let status = status(control, id);
        assert!(phase == "failed" || status["phase"]["is"] != "failed", "{status}");
        (status["phase"]["is"] == phase).then_some(status)
    })
}
pub fn wait_target(control: &impl Control, name: &str) -> Value {
    wait_for("the machine", || {
        let targets = control.get("restore-targets");
        targets.as_array().unwrap().iter().find(|t| t["name"] == name).cloned()
    })
}

#[test]
fn a_moment_is_restored_to_a_larger_disk_and_again_for_the_difference_only() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(dir.path(), "");
    let mut rng = Rng::new(71);
    let mut group = Group::make(&inside, "vm");
    group.grow(&inside, &mut rng, 120);
    let past = group.history.changes[80].0;
    let machine = Machine::start(&inside, inside.listen(), "metal", vec![vec![0xee; SIZE as usize + (1 << 20)]]);
    let target = wait_target(&inside, "metal");
    assert_eq!(
        (target["disks"][0]["path"].as_str(), target["disks"][0]["serial"].as_str()),
        (Some("/dev/d0"), Some("M0"))
    );
    let ask = wish("00000001", "metal", &moment(&group, past), &group, false);
    inside.ok("POST", "restores", &ask);
    // The same wish again is the same restore; another one under its id is not.
    assert_eq!(inside.ok("POST", "restores", &ask)["id"], "00000001");
    let other = wish("00000001", "metal", &moment(&group, past + 1), &group, false);
    assert_eq!(inside.refused("POST", "restores", &other), "id-taken");
    let second = wish("00000002", "metal", &moment(&group, past), &group, false);
    assert_eq!(inside.refused("POST", "restores", &second), "target-busy");
    // Nobody writes to a moment: it finishes by itself.
    let done = wait_phase(&inside, "00000001", "done");
    let disk = machine.disk(0);
    assert_same(&disk[..SIZE as usize], &group.at(past), "the disk at the moment");
    assert!(disk[SIZE as usize..].iter().all(|b| *b == 0xee), "nothing is written behind the volume");
    let first = done["shipped_bytes"].as_u64().unwrap();
    assert!(first > 0 && done["zeroed_bytes"].as_u64().unwrap() > 0, "{done}");
    inside.ok("POST", "restores/00000001/release", "{\"reboot\":true}");
    wait_phase(&inside, "00000001", "released");
    assert!(machine.shared.rebooted.load(Ordering::Acquire));
    // The same once more: nothing is sent.
    let before = machine.received();
    inside.ok("POST", "restores", &wish("00000003", "metal", &moment(&group, past), &group, false));
    let done = wait_phase(&inside, "00000003", "done");
    assert_eq!((done["shipped_bytes"].as_u64(), done["zeroed_bytes"].as_u64()), (Some(0), Some(0)), "{done}");
    assert_eq!(machine.received(), before, "a disk that is right is sent nothing");
    inside.ok("POST", "restores/00000003/release", "{}");
    wait_phase(&inside, "00000003", "released");
    // Ten blocks more at the box: ten blocks are sent.
    let (mut want, mut changed) = (group.at(past), 0);
    let made = inside.ok("POST", "groups/vm/branches", &json!({ "name": "more", "at": { "lsn": past } }).to_string());
    let branch = Group::of(&made, Vec::new());
    let mut client = branch.client(&inside);
    for i in 0..10usize {
        let place = &mut want[i * 700_416..][..4096];
        rng.fill(place);
        client.write(i as u64 * 700_416, place, false).unwrap();
        changed += place.len() as u64;
    }
    client.flush().unwrap();
    inside.ok("POST", "restores", &wish("00000004", "metal", &newest(&branch), &branch, false));
    wait_phase(&inside, "00000004", "following");
    inside.ok("POST", "restores/00000004/finish", "");
    let done = wait_phase(&inside, "00000004", "done");
    let sent = done["shipped_bytes"].as_u64().unwrap();
    println!("shipped {sent} bytes for {changed} that changed: {:.2}", sent as f64 / changed as f64);
    assert_eq!((sent, done["zeroed_bytes"].as_u64()), (changed, Some(0)), "{done}");
    assert!(machine.received() - before <= changed, "packed it is no more");
    assert_same(&machine.disk(0)[..SIZE as usize], &want, "the disk the second time");
    inside.ok("POST", "restores/00000004/cancel", "");
    assert_eq!(inside.refused("POST", "restores/00000004/finish", ""), "restore-over");
    drop(machine);
    inside.stop();
}

#[test]
fn what_is_written_meanwhile_follows_through_cuts_until_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(dir.path(), "");
    let mut rng = Rng::new(72);
    let mut group = Group::make(&inside, "vm");
    group.grow(&inside, &mut rng, 100);
    let machine = Machine::start(&inside, inside.listen(), "metal", vec![vec![1; SIZE as usize]]);
    wait_target(&inside, "metal");
    inside.ok("POST", "restores", &wish("0000000a", "metal", &newest(&group), &group, false));
    for _ in 0..4 {
        group.grow(&inside, &mut rng, 40);
        machine.cut();
    }
    assert_eq!(inside.refused("POST", "restores/0000000a/release", "{}"), "not-done");
    wait_phase(&inside, "0000000a", "following");
    group.grow(&inside, &mut rng, 60);
    inside.ok("POST", "restores/0000000a/finish", "");
    let done = wait_phase(&inside, "0000000a", "done");
    assert_eq!(done["phase"]["lsns"][group.id.as_str().unwrap()].as_u64(), Some(group.history.lsn), "{done}");
    assert_same(&machine.disk(0), &group.now(), "the disk at the end");
    inside.ok("POST", "restores/0000000a/release", "{}");
    wait_phase(&inside, "0000000a", "released");
    assert!(!machine.shared.rebooted.load(Ordering::Acquire), "only when told to");
    drop(machine);
    inside.stop();
}

#[test]
fn a_restore_goes_on_after_kills_of_the_box() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Outside::start(dir.path());
    let mut rng = Rng::new(73);
    let mut group = Group::make(&running, "vm");
    group.grow(&running, &mut rng, 100);
    let machine = Machine::start(&running, running.listen(), "metal", vec![vec![1; SIZE as usize]]);
    wait_target(&running, "metal");
    running.ok("POST", "restores", &wish("0000000b", "metal", &newest(&group), &group, false));
    for round in 0..3 {
        group.grow(&running, &mut rng, 40);
        if round > 0 {
            wait_for("data", || (machine.received() > 0).then_some(()));
        }
        running.kill();
        running = Outside::start(dir.path());
        *machine.shared.box_at.lock().unwrap() = running.listen();
    }
    group.grow(&running, &mut rng, 40);
    running.ok("POST", "restores/0000000b/finish", "");
    wait_phase(&running, "0000000b", "done");
    assert_same(&machine.disk(0), &group.now(), "the disk after the kills");
    // Done stays done, and a release that was asked for is carried out by the next daemon too.
    running.kill();
    running = Outside::start(dir.path());
    *machine.shared.box_at.lock().unwrap() = running.listen();
    assert_eq!(status(&running, "0000000b")["phase"]["is"], "done");
    running.ok("POST", "restores/0000000b/release", "{\"reboot\":true}");
    wait_phase(&running, "0000000b", "released");
    assert!(machine.shared.rebooted.load(Ordering::Acquire));
    drop(machine);
    running.terminate();
}

#[test]
fn what_the_old_disk_held_is_kept_as_a_branch_before_it_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(dir.path(), "");
    let mut rng = Rng::new(74);
    let mut trunk = Group::make(&inside, "db1");
    trunk.grow(&inside, &mut rng, 100);
    let fork = trunk.history.changes[90].0;
    let made =
        inside.ok("POST", "groups/db1/branches", &json!({ "name": "takeover", "at": { "lsn": fork } }).to_string());
    let mut branch = Group::of(&made, trunk.at(fork));
    branch.grow(&inside, &mut rng, 60);
    // The old host went on for a while, unheard.
    let mut old = trunk.at(fork);
    for _ in 0..25 {
        let from = rng.below(SIZE - 70_000) as usize;
        let len = 1 + rng.below(65_536) as usize;
        rng.fill(&mut old[from..from + len]);
    }
    let machine = Machine::start(&inside, inside.listen(), "db1-old", vec![old.clone()]);
    wait_target(&inside, "db1-old");
    assert_eq!(
        inside.refused("POST", "restores", &wish("0000000c", "db1-old", &moment(&trunk, fork), &trunk, true)),
        "bad-request"
    );
    inside.ok("POST", "restores", &wish("0000000c", "db1-old", &newest(&branch), &branch, true));
    machine.cut();
    branch.grow(&inside, &mut rng, 30);
    machine.cut();
    wait_phase(&inside, "0000000c", "following");
    inside.ok("POST", "restores/0000000c/finish", "");
    let done = wait_phase(&inside, "0000000c", "done");
    assert_same(&machine.disk(0), &branch.now(), "the disk at the end");
    let late = done["late"][0]["name"].as_str().expect("a late branch").to_owned();
    assert!(late.starts_with("late writes of db1, 20"), "{late}");
    let encoded = late.replace(' ', "%20").replace(',', "%2C").replace(':', "%3A");
    let shown = inside.get(&format!("groups/{encoded}"));
    assert_eq!((shown["branch"]["group_name"].as_str(), shown["branch"]["lsn"].as_u64()), (Some("db1"), Some(fork)));
    let view = inside.view(&encoded, "\"latest\"");
    assert_same(&view.volumes[0], &old, "the late branch is the old disk");
    inside.close_view(&view);
    inside.ok("POST", "restores/0000000c/release", "{}");
    wait_phase(&inside, "0000000c", "released");
    // A disk that holds nothing the box has not: no branch remains.
    *machine.shared.disks.lock().unwrap() = vec![trunk.at(fork)];
    inside.ok("POST", "restores", &wish("0000000d", "db1-old", &newest(&branch), &branch, true));
    inside.ok("POST", "restores/0000000d/finish", "");
    let done = wait_phase(&inside, "0000000d", "done");
    assert_eq!(done["late"], json!([]), "{done}");
    let groups = inside.get("groups").as_array().unwrap().len();
    assert_eq!(groups, 3, "db1, takeover and the first late branch");
    assert_same(&machine.disk(0), &branch.now(), "the disk the second time");
    drop(machine);
    inside.stop();
}

#[test]
fn a_disk_that_cannot_take_it_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(dir.path(), "");
    let mut rng = Rng::new(75);
    let mut group = Group::make(&inside, "vm");
    group.grow(&inside, &mut rng, 20);
    let ask = |id: &str| wish(id, "metal", &newest(&group), &group, false);
    assert_eq!(inside.refused("POST", "restores", &ask("00000001")), "no-such-target");
    let machine = Machine::start(&inside, inside.listen(), "metal", vec![vec![3; SIZE as usize - 512]]);
    wait_target(&inside, "metal");
    assert_eq!(inside.refused("POST", "restores", &ask("1")), "bad-request");
    assert_eq!(inside.refused("POST", "restores", &ask("00000001")), "disk-too-small");
    assert_eq!(inside.refused("POST", "restores", &ask("00000001").replace("/dev/d0", "/dev/d7")), "no-such-disk");
    *machine.shared.disks.lock().unwrap() = vec![vec![3; SIZE as usize]];
    machine.shared.in_use.store(true, Ordering::Release);
    wait_for("the news", || (wait_target(&inside, "metal")["disks"][0]["in_use"] == "mounted at /").then_some(()));
    assert_eq!(inside.refused("POST", "restores", &ask("00000001")), "disk-in-use");
    assert_same(&machine.disk(0), &vec![3; SIZE as usize], "nothing was written");
    // Taken into use while the machine was away: nothing more is written, and it is said.
    machine.shared.in_use.store(false, Ordering::Release);
    wait_for("the news", || wait_target(&inside, "metal")["disks"][0]["in_use"].is_null().then_some(()));
    inside.ok("POST", "restores", &ask("00000001"));
    machine.shared.in_use.store(true, Ordering::Release);
    machine.cut();
    let failed = wait_phase(&inside, "00000001", "failed");
    assert!(failed["phase"]["text"].as_str().unwrap().contains("mounted at /"), "{failed}");
    assert!(!failed["phase"]["remedy"].as_str().unwrap().is_empty(), "{failed}");
    drop(machine);
    inside.stop();
}

#[test]
fn a_disk_that_does_not_hold_what_is_written_to_it_fails_the_restore() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(dir.path(), "");
    let mut rng = Rng::new(76);
    let mut group = Group::make(&inside, "vm");
    group.grow(&inside, &mut rng, 20);
    let machine = Machine::start(&inside, inside.listen(), "metal", vec![vec![3; SIZE as usize]]);
    machine.shared.broken.store(true, Ordering::Release);
    wait_target(&inside, "metal");
    inside.ok("POST", "restores", &wish("00000001", "metal", &moment(&group, group.history.lsn), &group, false));
    let failed = wait_phase(&inside, "00000001", "failed");
    assert!(failed["phase"]["text"].as_str().unwrap().contains("reads differently"), "{failed}");
    // Another disk in its place: what is right already is not sent again, the rest is.
    machine.shared.broken.store(false, Ordering::Release);
    inside.ok("POST", "restores", &wish("00000002", "metal", &moment(&group, group.history.lsn), &group, false));
    wait_phase(&inside, "00000002", "done");
    assert_same(&machine.disk(0), &group.now(), "the disk at the end");
    drop(machine);
    inside.stop();
}
