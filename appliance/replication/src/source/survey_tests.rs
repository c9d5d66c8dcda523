//! What no file system uses: step by step, and worlds of a file system that takes, writes and frees blocks under a copy, with an oracle.

use super::*;
use crate::GRANULE_SECTORS;
use crate::rng::Rng;
use std::collections::BTreeMap;

const GRANULES: u64 = 24;
const SECTORS: u64 = GRANULES * GRANULE_SECTORS - 64;
const VOLUME: VolumeId = VolumeId(3);
/// A block of the file system.
const BLOCK: u64 = 8;
const BLOCKS: u64 = SECTORS / BLOCK;

/// A host's file system on one disk, a source, and a box. What each block means is known: a version, or nothing while it is free.
struct World {
    rng: Rng,
    seed: u64,
    source: Source,
    ms: u64,
    /// What lies on the disk, by block.
    disk: Vec<u64>,
    /// In use, by block.
    used: Vec<bool>,
    image: Vec<u64>,
    spool: BTreeMap<u64, (Numbered, Vec<u64>)>,
    captures: BTreeMap<u64, u64>,
    /// Issued and not handed in yet: the ring.
    ring: std::collections::VecDeque<(Captured, u64)>,
    ordered: Vec<(ReadId, Extent)>,
    reads: BTreeMap<ReadId, Vec<u64>>,
    /// A question: free granules, once they were looked at, and how much of the ring must be handed in before the answer.
    asked: Option<Option<(GranuleMap, usize)>>,
    surveys: u64,
    next_tag: u64,
    read_blocks: u64,
    state: Vec<u8>,
    consistent: bool,
}

impl World {
    fn new(seed: u64, survey: bool) -> Self {
        let mut rng = Rng::new(seed);
        let mut actions = Vec::new();
        let config = Self::config(survey, 1 + rng.below(4) as usize);
        let source = Source::new(config, StreamId([2; 16]), None, Self::now(0), &mut actions);
        let mut world = Self {
            disk: (0..BLOCKS).map(|_| 1 + rng.below(3)).collect(),
            used: (0..BLOCKS).map(|_| rng.below(8) == 0).collect(),
            rng,
            seed,
            source,
            ms: 0,
            image: vec![0; BLOCKS as usize],
            spool: BTreeMap::new(),
            captures: BTreeMap::new(),
            ring: Default::default(),
            ordered: Vec::new(),
            reads: BTreeMap::new(),
            asked: None,
            surveys: 0,
            next_tag: 10,
            read_blocks: 0,
            state: Vec::new(),
            consistent: false,
        };
        world.act(actions);
        world
    }
    fn config(survey: bool, reads_max: usize) -> SourceConfig {
        let spec = VolumeSpec { id: VOLUME, name: "v".into(), sectors: Sectors(SECTORS), identity: "i".into() };
        let mut config = SourceConfig::new(GroupId([1; 16]), vec![spec], SyncMode::Async);
        config.read_bytes_max = 3 << 16;
        config.reads_max = reads_max;
        config.survey_bytes_min = survey.then_some(1);
        config
    }
    fn now(ms: u64) -> Now {
        Now { mono: MonoTime::from_ms(1000 + ms), wall_us: ms * 1000 }
    }
    fn on(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.source.on(event, Self::now(self.ms), &mut actions);
        self.act(actions);
    }
    fn connect(&mut self, resume: Resume) {
        self.on(Event::Connected);
        self.on(Event::Ready { resume, credit: Credit { bytes: 1 << 40, records: 1 << 40 } });
    }
    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Keep { record, payload } => {
                    let blocks = (record.extent.sectors.0 / BLOCK) as usize;
                    let data = match payload {
                        Payload::Captured(capture) => vec![self.captures[&capture]; blocks],
                        Payload::Read(id) => {
                            let from = &self.reads[&id];
                            let first = (record.extent.start() / BLOCK) as usize - from[0] as usize;
                            from[1 + first..][..blocks].to_vec()
                        }
                        Payload::None => vec![0; blocks],
                        Payload::Mark(bytes) => {
                            let header = wire::FrameHeader {
                                kind: FrameKind::Record(RecordKind::Mark),
                                codec: model::Codec::Raw,
                                flags: record.flags,
                                volume: record.volume,
                                extent: record.extent,
                                seq: record.seq,
                                mono: record.mono,
                                wall_us: record.wall_us,
                                payload_len: bytes.len() as u32,
                                payload_crc: wire::crc32(&bytes),
                            };
                            match wire::decode_mark(&header, &bytes).unwrap() {
                                Mark::Consistent => self.consistent = true,
                                Mark::GapBegin { .. } => self.consistent = false,
                                _ => {}
                            }
                            Vec::new()
                        }
                    };
                    self.spool.insert(record.seq.0, (record, data));
                }
                Action::Send { first, last } => {
                    for seq in first.0..=last.0 {
                        let (record, data) = &self.spool[&seq];
                        let at = (record.extent.start() / BLOCK) as usize;
                        if record.kind.changes_volume() {
                            self.image[at..at + data.len()].copy_from_slice(data);
                        }
                    }
                    let credit = Credit { bytes: 1 << 40, records: 1 << 40 };
                    self.on(Event::Ack(Ack { written: last, durable: last, credit, flags: AckFlags::NONE }));
                }
                Action::Drop { from } => drop(self.spool.split_off(&from.0)),
                Action::ReadVolume { read, extent, .. } => self.ordered.push((read, extent)),
                Action::ReadFinished { read } => drop(self.reads.remove(&read)),
                Action::Survey => {
                    assert!(self.asked.is_none(), "seed {}: one at a time", self.seed);
                    self.asked = Some(None);
                    self.surveys += 1;
                }
                Action::Persist { serial, state } => {
                    self.state = state;
                    self.on(Event::Persisted { serial });
                }
                Action::Drain { barrier } => {
                    self.hand_in(usize::MAX);
                    self.on(Event::Drained { barrier });
                }
                Action::Alarm(alarm) => panic!("seed {}: {alarm}", self.seed),
                _ => {}
            }
        }
    }
    fn hand_in(&mut self, most: usize) {
        for _ in 0..most {
            let Some((captured, tag)) = self.ring.pop_front() else { return };
            self.captures.insert(captured.capture, tag);
            if let Some(Some((_, before))) = &mut self.asked {
                *before = before.saturating_sub(1);
            }
            self.on(Event::Captured(captured));
        }
    }
    fn write(&mut self, block: u64, blocks: u64) {
        self.next_tag += 1;
        self.disk[block as usize..(block + blocks) as usize].fill(self.next_tag);
        let captured = Captured {
            capture: self.next_tag,
            kind: CapturedKind::Write,
            flags: WriteFlags::NONE,
            volume: VOLUME,
            extent: Extent::new(block * BLOCK, blocks * BLOCK),
            mono: Self::now(self.ms).mono,
            wall_us: 0,
        };
        self.ring.push_back((captured, self.next_tag));
    }
    fn some_blocks(&mut self) -> (u64, u64) {
        let start = self.rng.below(BLOCKS);
        (start, 1 + self.rng.below((BLOCKS - start).min(30)))
    }
    /// What a file system does: takes free blocks and writes them, writes its own again, frees.
    fn file_system(&mut self) {
        let (start, blocks) = self.some_blocks();
        match self.rng.below(3) {
            0 => self.used[start as usize..(start + blocks) as usize].fill(false),
            _ => {
                let any_free = self.used[start as usize..(start + blocks) as usize].iter().any(|used| !used);
                self.used[start as usize..(start + blocks) as usize].fill(true);
                if any_free || self.rng.below(2) == 0 {
                    self.write(start, blocks);
                }
            }
        }
    }
    fn look(&mut self) {
        if let Some(looked @ None) = &mut self.asked {
            let mut map = GranuleMap::empty(Sectors(SECTORS));
            for granule in 0..GRANULES {
                let extent = map.extent(&(granule..granule + 1));
                let blocks = (extent.start() / BLOCK) as usize..(extent.end() / BLOCK) as usize;
                if self.used[blocks].iter().all(|used| !used) {
                    map.set(granule..granule + 1);
                }
            }
            *looked = Some((map, self.ring.len()));
        }
    }
    fn answer(&mut self) {
        if let Some(Some((_, 0))) = &self.asked
            && let Some(Some((map, _))) = self.asked.take()
        {
            self.on(Event::Surveyed { unused: vec![(VOLUME, map)] });
        }
    }
    fn read_one(&mut self) {
        if self.ordered.is_empty() {
            return;
        }
        let at = self.rng.below(self.ordered.len() as u64) as usize;
        let (id, extent) = self.ordered.swap_remove(at);
        let blocks = (extent.start() / BLOCK) as usize..(extent.end() / BLOCK) as usize;
        self.read_blocks += blocks.len() as u64;
        // First the block at which it begins.
        let data = std::iter::once(blocks.start as u64).chain(self.disk[blocks].iter().copied()).collect();
        self.reads.insert(id, data);
        self.hand_in(usize::MAX);
        self.on(Event::ReadDone { read: id, zeroes: Vec::new() });
    }
    fn step(&mut self) {
        self.ms += self.rng.below(30);
        match self.rng.below(14) {
            0..=3 => self.file_system(),
            4..=5 => {
                let most = 1 + self.rng.below(3) as usize;
                self.hand_in(most);
            }
            6..=8 => self.read_one(),
            9 => self.look(),
            10 => self.answer(),
            11 if self.rng.below(30) == 0 => self.on(Event::SpoolFull),
            12 if self.rng.below(60) == 0 => self.on(Event::Resync),
            13 if self.rng.below(60) == 0 => self.lose(),
            _ => self.on(Event::Tick),
        }
    }
    /// Writes that nobody saw, told as places or as anything.
    fn lose(&mut self) {
        self.hand_in(usize::MAX);
        let (start, blocks) = self.some_blocks();
        self.used[start as usize..(start + blocks) as usize].fill(true);
        self.write(start, blocks);
        self.ring.clear();
        let what = match self.rng.below(2) {
            0 => Lost::Everything,
            _ => Lost::Extents(vec![(VOLUME, Extent::new(start * BLOCK, blocks * BLOCK))]),
        };
        self.on(Event::CaptureLost { id: self.next_tag, reason: GapReason::Verify, what });
    }
    /// An agent that dies and one that comes: what it asked is forgotten, what the ring holds is not.
    fn restart(&mut self) {
        let config = Self::config(true, 2);
        let mut actions = Vec::new();
        self.source = Source::restore(config, &self.state, Self::now(self.ms), &mut actions).unwrap();
        (self.asked, self.ordered, self.reads) = (None, Vec::new(), BTreeMap::new());
        let arrived = self.spool.last_key_value().map_or(0, |(seq, _)| *seq);
        self.act(actions);
        self.connect(Resume::Continue { next: SourceSeq(arrived + 1) });
    }
    fn settle(&mut self) {
        for _ in 0..5000 {
            self.ms += 20;
            self.hand_in(usize::MAX);
            self.look();
            self.answer();
            self.read_one();
            self.on(Event::Tick);
            if self.consistent && self.source.status().window_records == 0 {
                return;
            }
        }
        panic!("seed {}: does not settle: {:?}", self.seed, self.source.status());
    }
    /// Every block that is in use is what the disk holds. What is free is nobody's.
    fn check(&self) {
        for block in (0..BLOCKS as usize).filter(|b| self.used[*b]) {
            assert_eq!(self.image[block], self.disk[block], "seed {}, block {block}", self.seed);
        }
    }
}

#[test]
fn what_is_in_use_is_copied_whatever_a_file_system_does_meanwhile() {
    let (mut surveys, mut spared, mut whole) = (0, 0, 0);
    for seed in 1..800 {
        let mut world = World::new(seed, true);
        world.connect(Resume::Restart);
        for round in 0..1 + world.rng.below(4) {
            if round > 0 {
                match world.rng.below(3) {
                    0 => world.restart(),
                    1 => world.on(Event::Resync),
                    _ => world.lose(),
                }
            }
            for _ in 0..world.rng.below(250) {
                world.step();
                // Any moment that can be opened, not only the last one.
                if world.consistent && world.ring.is_empty() && world.source.status().window_records == 0 {
                    world.check();
                }
            }
            world.settle();
            world.check();
            spared += world.source.status().unused.0 / 512 / BLOCK;
            whole += BLOCKS;
        }
        surveys += world.surveys;
    }
    assert!(surveys > 800 && spared > whole / 20, "{surveys} surveys spared {spared} of {whole} blocks");
}

/// The same worlds with a rule broken: the file system was looked at before the question.
#[test]
fn a_look_before_the_question_is_found_out_by_this_oracle() {
    let mut wrong = 0;
    for seed in 1..200 {
        let mut world = World::new(seed, true);
        world.asked = Some(None);
        world.look();
        let early = world.asked.take().flatten().expect("looked at");
        for _ in 0..60 {
            world.file_system();
            world.hand_in(usize::MAX);
        }
        world.connect(Resume::Restart);
        assert_eq!(world.asked.take(), Some(None), "seed {seed}: asked when the copy begins");
        world.on(Event::Surveyed { unused: vec![(VOLUME, early.0)] });
        world.settle();
        wrong += u64::from((0..BLOCKS as usize).any(|b| world.used[b] && world.image[b] != world.disk[b]));
    }
    assert!(wrong > 50, "{wrong}");
}

#[test]
fn reads_wait_for_the_answer_but_not_for_ever() {
    let mut world = World::new(1, true);
    world.connect(Resume::Restart);
    assert!(world.source.status().surveying && world.ordered.is_empty());
    for _ in 0..5 {
        world.ms += 10_000;
        world.on(Event::Heard);
    }
    world.ms += super::survey::HOLD_MS - 50_001;
    world.on(Event::Heard);
    assert!(world.ordered.is_empty());
    world.ms += 1;
    world.on(Event::Tick);
    assert!(!world.ordered.is_empty() && !world.source.status().surveying);
    // It counts all the same, where nothing was read or written yet.
    world.write(BLOCKS - 1, 1);
    world.hand_in(1);
    let mut map = GranuleMap::full(Sectors(SECTORS));
    let left = world.source.status().dirty.0;
    world.on(Event::Surveyed { unused: vec![(VOLUME, map.clone()), (VolumeId(9), map.clone())] });
    let status = world.source.status();
    let in_flight: u64 = world.ordered.iter().map(|(_, extent)| extent.bytes()).sum();
    let last = map.extent(&(GRANULES - 1..GRANULES)).bytes();
    assert_eq!((status.dirty.0, status.unused.0), (in_flight + last, left - in_flight - last));
    assert_eq!(status.sync_total, status.dirty, "what is left out is no part of the whole");
    // Nobody asked.
    world.lose();
    map.clear(0..1);
    world.on(Event::Surveyed { unused: vec![(VOLUME, map)] });
    world.settle();
}

#[test]
fn a_small_copy_is_not_worth_the_question() {
    let mut world = World::new(1, false);
    world.connect(Resume::Restart);
    assert!(world.asked.is_none() && !world.ordered.is_empty());
    let mut config = World::config(true, 1);
    config.survey_bytes_min = Some(SECTORS * 512 + 1);
    let mut actions = Vec::new();
    world.source = Source::new(config, StreamId([2; 16]), None, World::now(0), &mut actions);
    world.ordered.clear();
    world.act(actions);
    world.connect(Resume::Restart);
    assert!(world.asked.is_none() && !world.ordered.is_empty());
}
