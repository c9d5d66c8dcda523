//! Comparing before sending: worlds of one source and one box, with an oracle.
//!
//! The box's image is what the records that reached it made of it, and its answers come from that image, at any time after the question.

use super::*;
use crate::rng::Rng;
use std::collections::{BTreeMap, BTreeSet};

const SECTORS: u64 = 30 * crate::GRANULE_SECTORS - 45;
const FINE: u64 = 8;

struct World {
    rng: Rng,
    seed: u64,
    source: Source,
    ms: u64,
    disk: Vec<u64>,
    image: Vec<u64>,
    /// By number: the record and what it makes of its sectors.
    spool: BTreeMap<u64, (Numbered, Vec<u64>)>,
    captures: BTreeMap<u64, Vec<u64>>,
    ordered: Vec<(ReadId, Extent)>,
    reads: BTreeMap<ReadId, (Extent, Vec<u64>)>,
    asked: Vec<(u64, u32, Vec<Extent>, Vec<u64>)>,
    arrived: u64,
    next_tag: u64,
    connected: bool,
    copied: BTreeSet<u64>,
    copied_sectors: u64,
    questions: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let spec = VolumeSpec { id: VolumeId(3), name: "v".into(), sectors: Sectors(SECTORS), identity: "i".into() };
        let mut config = SourceConfig::new(GroupId([1; 16]), vec![spec], SyncMode::Async);
        config.read_bytes_max = (1 + rng.below(6)) << 16;
        config.reads_max = 1 + rng.below(4) as usize;
        let mut actions = Vec::new();
        let source = Source::new(config, StreamId([2; 16]), Some(&[]), Self::now(0), &mut actions);
        let disk: Vec<u64> = (0..SECTORS).map(|_| rng.below(3)).collect();
        let mut world = Self {
            rng,
            seed,
            source,
            ms: 0,
            image: disk.clone(),
            disk,
            spool: BTreeMap::new(),
            captures: BTreeMap::new(),
            ordered: Vec::new(),
            reads: BTreeMap::new(),
            asked: Vec::new(),
            arrived: 0,
            next_tag: 10,
            connected: false,
            copied: BTreeSet::new(),
            copied_sectors: 0,
            questions: 0,
        };
        world.act(actions);
        world.connect(Resume::Restart, true);
        world.settle();
        assert_eq!(world.copied_sectors, 0, "nothing was to be copied at first");
        world
    }
    fn now(ms: u64) -> Now {
        Now { mono: MonoTime::from_ms(1000 + ms), wall_us: ms * 1000 }
    }
    fn on(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.source.on(event, Self::now(self.ms), &mut actions);
        self.act(actions);
    }
    fn connect(&mut self, resume: Resume, compares: bool) {
        self.connected = true;
        let credit = Credit { bytes: 1 << 40, records: 1 << 40 };
        self.on(Event::BoxCompares(compares));
        self.on(Event::Connected);
        self.on(Event::Ready { resume, credit });
    }
    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Keep { record, payload } => {
                    let len = record.extent.sectors.0 as usize;
                    let data = match payload {
                        Payload::Captured(capture) => self.captures[&capture].clone(),
                        Payload::Read(id) => {
                            let (extent, tags) = &self.reads[&id];
                            tags[(record.extent.start() - extent.start()) as usize..][..len].to_vec()
                        }
                        Payload::None | Payload::Mark(_) => vec![0; len],
                    };
                    if record.flags.contains(WriteFlags::SYNC) {
                        self.copied.extend(record.extent.start()..record.extent.end());
                        self.copied_sectors += record.extent.sectors.0;
                    }
                    self.spool.insert(record.seq.0, (record, data));
                }
                Action::Send { first, last } => {
                    assert!(self.connected, "seed {}", self.seed);
                    for seq in first.0..=last.0 {
                        let (record, data) = &self.spool[&seq];
                        let at = record.extent.start() as usize;
                        if record.kind.changes_volume() {
                            self.image[at..at + data.len()].copy_from_slice(data);
                        }
                        self.arrived = seq;
                    }
                }
                Action::Release { through } => self.spool = self.spool.split_off(&(through.0 + 1)),
                Action::Drop { from } => drop(self.spool.split_off(&from.0)),
                Action::ReadVolume { read, extent, .. } => self.ordered.push((read, extent)),
                Action::ReadFinished { read } => {
                    self.reads.remove(&read).expect("a read that was made");
                }
                Action::Compare { id, read, volume, block_sectors, runs } => {
                    assert_eq!(volume, VolumeId(3));
                    self.questions += 1;
                    let (extent, tags) = &self.reads[&read];
                    let of = |run: &Extent| &tags[(run.start() - extent.start()) as usize..][..run.sectors.0 as usize];
                    let tags = runs.iter().flat_map(|run| of(run).to_vec()).collect();
                    self.asked.push((id, block_sectors, runs, tags));
                }
                Action::Persist { serial, .. } => self.on(Event::Persisted { serial }),
                Action::Drain { barrier } => self.on(Event::Drained { barrier }),
                Action::Alarm(alarm) => panic!("seed {}: {alarm}", self.seed),
                _ => {}
            }
        }
    }
    fn pick(&mut self, len: usize) -> usize {
        self.rng.below(len as u64) as usize
    }
    fn read_one(&mut self) {
        if self.ordered.is_empty() {
            return;
        }
        let at = self.pick(self.ordered.len());
        let (id, extent) = self.ordered.swap_remove(at);
        let tags = self.disk[extent.start() as usize..extent.end() as usize].to_vec();
        self.reads.insert(id, (extent, tags));
        self.on(Event::ReadDone { read: id, zeroes: Vec::new() });
    }
    fn answer_one(&mut self) {
        if self.asked.is_empty() {
            return;
        }
        let at = self.pick(self.asked.len());
        let (id, block_sectors, runs, tags) = self.asked.swap_remove(at);
        let mut differ = Vec::new();
        let mut from = 0;
        for (i, block) in wire::blocks(&runs, block_sectors).enumerate() {
            let len = block.sectors.0 as usize;
            let same = self.image[block.start() as usize..block.end() as usize] == tags[from..from + len];
            from += len;
            differ.resize(i / 8 + 1, 0);
            differ[i / 8] |= u8::from(!same) << (i % 8);
        }
        self.on(Event::Compared { id, differ });
    }
    fn write_one(&mut self) {
        let extent = {
            let start = self.rng.below(SECTORS);
            Extent::new(start, 1 + self.rng.below((SECTORS - start).min(40)))
        };
        self.next_tag += 1;
        let tags = vec![self.next_tag; extent.sectors.0 as usize];
        self.disk[extent.start() as usize..extent.end() as usize].copy_from_slice(&tags);
        self.captures.insert(self.next_tag, tags);
        let captured = Captured {
            capture: self.next_tag,
            kind: CapturedKind::Write,
            flags: WriteFlags::NONE,
            volume: VolumeId(3),
            extent,
            mono: Self::now(self.ms).mono,
            wall_us: 0,
        };
        self.on(Event::Captured(captured));
    }
    fn ack(&mut self) {
        let seq = SourceSeq(self.arrived);
        let credit = Credit { bytes: 1 << 40, records: 1 << 40 };
        if self.connected && self.arrived > 0 {
            self.on(Event::Ack(Ack { written: seq, durable: seq, credit, flags: AckFlags::NONE }));
        }
    }
    fn cut(&mut self) {
        self.connected = false;
        self.asked.clear();
        self.on(Event::Disconnected);
        for _ in 0..self.rng.below(4) {
            self.write_one();
            self.read_one();
        }
        let compares = self.rng.below(4) > 0;
        self.connect(Resume::Continue { next: SourceSeq(self.arrived + 1) }, compares);
    }
    fn settle(&mut self) {
        for _ in 0..5000 {
            self.ms += 20;
            self.read_one();
            self.answer_one();
            self.ack();
            self.on(Event::Tick);
            let status = self.source.status();
            if status.gap.is_none() && status.window_records == 0 {
                return;
            }
        }
        panic!("seed {}: does not settle: {:?}", self.seed, self.source.status());
    }
    /// What nobody saw being written, and the blocks that it makes differ.
    fn lose_some(&mut self) -> BTreeSet<u64> {
        for _ in 0..self.rng.below(12) {
            let start = self.rng.below(SECTORS);
            for sector in start..(start + 1 + self.rng.below(30)).min(SECTORS) {
                self.next_tag += 1;
                self.disk[sector as usize] = self.next_tag;
            }
        }
        let differ = (0..SECTORS).filter(|s| self.disk[*s as usize] != self.image[*s as usize]);
        differ.flat_map(|s| s / FINE * FINE..(s / FINE * FINE + FINE).min(SECTORS)).collect()
    }
    fn lost(&mut self) {
        self.on(Event::CaptureLost { id: 7, reason: GapReason::Verify, what: Lost::Everything });
    }
    fn check(&self) {
        assert!(self.image == self.disk, "seed {}: the box does not hold what the disk does", self.seed);
        assert!(self.asked.is_empty() && self.reads.is_empty(), "seed {}", self.seed);
    }
}

#[test]
fn exactly_the_blocks_that_differ_are_sent() {
    for seed in 1..200 {
        let mut world = World::new(seed);
        let differ = world.lose_some();
        world.lost();
        world.settle();
        world.check();
        assert_eq!(world.copied, differ, "seed {seed}");
        assert_eq!(world.copied_sectors, differ.len() as u64, "seed {seed}: none twice");
        assert!(world.questions > 0);
        let same = world.source.status().same.0;
        assert_eq!(same, (SECTORS - differ.len() as u64) * 512, "seed {seed}");
    }
}

#[test]
fn live_writes_and_cuts_do_not_confuse_it() {
    let mut questions = 0;
    for seed in 1..600 {
        let mut world = World::new(seed);
        for _ in 0..1 + world.rng.below(3) {
            world.lose_some();
            world.lost();
            for _ in 0..world.rng.below(200) {
                world.ms += world.rng.below(20);
                match world.rng.below(12) {
                    0..=3 => world.write_one(),
                    4..=6 => world.read_one(),
                    7..=8 => world.answer_one(),
                    9 => world.ack(),
                    10 if world.rng.below(6) == 0 => world.cut(),
                    11 if world.rng.below(10) == 0 => world.on(Event::SpoolFull),
                    _ => world.on(Event::Tick),
                }
            }
            world.settle();
            world.check();
        }
        questions += world.questions;
    }
    assert!(questions > 1000, "{questions}");
}

#[test]
fn a_box_that_never_answers_is_not_asked_again() {
    let mut world = World::new(1);
    world.lose_some();
    world.lost();
    for _ in 0..10 {
        world.read_one();
    }
    assert!(!world.asked.is_empty());
    world.asked.clear();
    world.ms += 59_000;
    let mut actions = Vec::new();
    world.source.on(Event::Heard, World::now(world.ms), &mut actions);
    world.act(actions);
    world.ms += 2_000;
    let mut actions = Vec::new();
    world.source.on(Event::Heard, World::now(world.ms), &mut actions);
    let before = actions.len();
    actions.retain(|a| !matches!(a, Action::Alarm(Alarm::NotCompared { .. })));
    assert_eq!(actions.len(), before - 1, "the administrator hears of it once");
    world.act(actions);
    let questions = world.questions;
    world.settle();
    world.check();
    assert_eq!(world.questions, questions);
}

#[test]
fn answers_that_make_no_sense_cost_traffic_and_nothing_else() {
    for seed in 1..50 {
        let mut world = World::new(seed);
        world.lose_some();
        world.lost();
        for _ in 0..20 {
            world.read_one();
            if let Some((id, ..)) = world.asked.pop() {
                // Too short, of another question, and of none.
                world.on(Event::Compared { id: id + 1000, differ: vec![0; 500] });
                world.on(Event::Compared { id, differ: Vec::new() });
                world.on(Event::Compared { id, differ: vec![0; 500] });
            }
        }
        world.settle();
        world.check();
    }
}
