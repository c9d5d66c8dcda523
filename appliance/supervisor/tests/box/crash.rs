//! kill -9 at any moment: what was acknowledged is there, and what is there was written.

use crate::support::{Control, Outside, Rng, assert_same, wait_for};
use nbd::client::{Client, Operation};
use std::{collections::HashMap, os::unix::net::UnixStream, time::Duration};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 512;
const SIZE: u64 = BLOCK * BLOCKS;
/// Requests under way at once.
const DEPTH: usize = 8;

/// The log of all writes over all lives of the box: what was issued, and up to where it was acknowledged as durable.
struct WriteLog {
    /// The block of each write; its version is its index plus one.
    issued: Vec<u64>,
    /// Writes before this index are durable.
    durable: usize,
}

fn content(block: u64, version: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    Rng::new(block * 1_000_003 + version).fill(&mut data[16..]);
    data[..8].copy_from_slice(&version.to_le_bytes());
    data[8..16].copy_from_slice(&block.to_le_bytes());
    data
}

impl WriteLog {
    fn image(&self, len: usize) -> Vec<u8> {
        let mut image = vec![0; SIZE as usize];
        for (i, block) in self.issued[..len].iter().enumerate() {
            image[(block * BLOCK) as usize..][..BLOCK as usize].copy_from_slice(&content(*block, i as u64 + 1));
        }
        image
    }

    /// Checks an image found after a crash: it is that of a prefix of what was issued, no shorter than what was acknowledged. Cuts the
    /// log to what is there.
    fn settle(&mut self, image: &[u8], seed: u64) {
        // The last write of a prefix is always to be seen, so the newest version is the prefix's length.
        let version = |b: u64| u64::from_le_bytes(image[(b * BLOCK) as usize..][..8].try_into().unwrap());
        let len = (0..BLOCKS).map(version).max().unwrap() as usize;
        assert!(len <= self.issued.len(), "seed {seed}: version {len} was never written");
        assert!(
            len >= self.durable,
            "seed {seed}: {} writes were acknowledged as durable, {len} are there",
            self.durable
        );
        assert_same(image, &self.image(len), ("seed", seed, "writes", len));
        self.issued.truncate(len);
        self.durable = len;
    }
}

enum Flight {
    /// The write of this index.
    Write { index: usize, fua: bool },
    /// Covers the writes before this index: all had been answered when it was sent.
    Flush { covers: usize },
}

/// Writes until `limit` writes are issued and answered, or the box is gone.
fn write_until(client: &mut Client<UnixStream>, rng: &mut Rng, log: &mut WriteLog, limit: usize) {
    let mut flights: HashMap<u64, Flight> = HashMap::new();
    loop {
        while flights.len() < DEPTH && log.issued.len() < limit {
            let sent = if rng.below(10) == 0 {
                let under_way = flights.values().filter_map(|f| match f {
                    Flight::Write { index, .. } => Some(*index),
                    Flight::Flush { .. } => None,
                });
                let covers = under_way.min().unwrap_or(log.issued.len());
                client.submit(Operation::Flush).map(|cookie| (cookie, Flight::Flush { covers }))
            } else {
                let (block, fua) = (rng.below(BLOCKS), rng.below(8) == 0);
                let index = log.issued.len();
                log.issued.push(block);
                let data = content(block, index as u64 + 1);
                let write = Operation::Write { offset: block * BLOCK, data: &data, fua };
                client.submit(write).map(|cookie| (cookie, Flight::Write { index, fua }))
            };
            let Ok((cookie, flight)) = sent else { return };
            flights.insert(cookie, flight);
        }
        if flights.is_empty() {
            return;
        }
        let Ok(Some(done)) = client.complete() else { return };
        if done.result.is_err() {
            return;
        }
        match flights.remove(&done.cookie) {
            Some(Flight::Flush { covers }) => log.durable = log.durable.max(covers),
            // One connection's writes are journalled in the order they were sent: a durable one proves those before it.
            Some(Flight::Write { index, fua: true }) => log.durable = log.durable.max(index + 1),
            Some(Flight::Write { .. }) => {}
            None => panic!("an answer to nothing"),
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_to_kill_9() {
    let seed = 20_261_122;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(seed);
    let mut log = WriteLog { issued: Vec::new(), durable: 0 };
    for life in 0..6 {
        let outside = Outside::start(&data);
        if life == 0 {
            outside.make_group("g", &[("v", SIZE)]);
        }
        let mut client = outside.ingest("g-v");
        let mut image = vec![0; SIZE as usize];
        client.read(0, &mut image).unwrap();
        log.settle(&image, seed + life);
        let view = outside.view("g", "\"latest\"");
        assert_same(&view.volumes[0], &image, ("view after life", life));
        if life == 5 {
            assert!(outside.terminate().success(), "SIGTERM must end in good order");
            break;
        }
        // Killed by another thread while requests are under way, after a number of writes the seed says.
        let limit = log.issued.len() + 50 + rng.below(3000) as usize;
        let kill_at = log.issued.len() + 20 + rng.below((limit - log.issued.len()) as u64) as usize;
        write_until(&mut client, &mut rng, &mut log, kill_at);
        let killer = std::thread::spawn({
            let pid = nix::unistd::Pid::from_raw(i32::try_from(outside.pid()).unwrap());
            move || nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
        });
        write_until(&mut client, &mut rng, &mut log, limit);
        killer.join().unwrap().unwrap();
        outside.kill();
        assert!(log.durable > 0, "seed {seed}, life {life}: the test acknowledged nothing");
    }
}

/// Nothing has to be kept for a time, only for its bookmark.
fn limit_journal(outside: &Outside, bytes_max: Option<u64>) {
    let mut policy = outside.group_state("g")["policy"].clone();
    policy["window_hours_floor"] = 0.into();
    policy["journal_bytes_max"] = bytes_max.into();
    outside.ok("PATCH", "groups/g/policy", &policy.to_string());
}

#[test]
fn kills_while_starting_folding_and_marking_lose_neither_a_bookmark_nor_a_write() {
    let seed = 77;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let mut rng = Rng::new(seed);
    let mut log = WriteLog { issued: Vec::new(), durable: 0 };
    // Name, and the number of writes before it: all of them had been answered when it was asked for.
    let mut bookmark: Option<(String, usize)> = None;
    for life in 0..5 {
        // Starts that are killed on the way up, after a time the seed says: recovery, first writes of control records, listeners.
        for _ in 0..3 {
            Outside::kill_on_the_way_up(&data, Duration::from_millis(rng.below(60)));
        }
        let outside = Outside::start(&data);
        if life == 0 {
            outside.make_group("g", &[("v", SIZE)]);
        }
        wait_for("the group", || (outside.group_state("g")["state"] == "ingest").then_some(()));
        limit_journal(&outside, None);
        let mut client = outside.ingest("g-v");
        let mut image = vec![0; SIZE as usize];
        client.read(0, &mut image).unwrap();
        log.settle(&image, seed + life);
        if let Some((name, writes)) = bookmark.take() {
            let view = outside.view("g", &format!("{{\"bookmark\":\"{name}\"}}"));
            assert_same(&view.volumes[0], &log.image(writes), ("seed", seed, "life", life, "bookmark", &name));
            outside.close_view(&view);
            // What it held may be folded from here on.
            outside.ok("DELETE", &format!("groups/g/bookmarks/{name}"), "");
        }
        let (before, after) = (1500 + rng.below(1500) as usize, 1500 + rng.below(1500) as usize);
        let limit = log.issued.len() + before;
        write_until(&mut client, &mut rng, &mut log, limit);
        let name = format!("life-{life}");
        outside.ok("POST", "groups/g/bookmarks", &format!("{{\"name\":\"{name}\"}}"));
        // The mark is durable, so is everything before it.
        log.durable = log.issued.len();
        bookmark = Some((name, log.issued.len()));
        let limit = log.issued.len() + after;
        write_until(&mut client, &mut rng, &mut log, limit);
        // Too much by far: what the bookmark does not hold is folded into the base, and the kill comes somewhere on the way.
        limit_journal(&outside, Some(8 << 20));
        std::thread::sleep(Duration::from_millis(rng.below(150)));
        outside.kill();
    }
    let outside = Outside::start(&data);
    let mut client = outside.ingest("g-v");
    let mut image = vec![0; SIZE as usize];
    client.read(0, &mut image).unwrap();
    log.settle(&image, seed);
    wait_for("a fold", || (outside.group_state("g")["retention"]["floor_lsn"].as_u64()? > 0).then_some(()));
    client.read(0, &mut image).unwrap();
    assert_same(&image, &log.image(log.issued.len()), ("seed", seed, "after the fold"));
}
