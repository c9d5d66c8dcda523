//! Both machines over messages that are cut anywhere.

use super::*;
use crate::granules::GranuleMap;
use crate::rng::Rng;
use model::{Codec, Extent, MonoTime, RecordKind, SECTOR, Sectors, SourceSeq, VolumeId, WriteFlags};
use std::collections::{BTreeMap, VecDeque};
use wire::{Ack, AckFlags, BlockHash, Credit, FrameHeader, FrameKind, Look, Message, RestoreDisk, RestoreId};

const ID: RestoreId = RestoreId(7);

fn at(extent: &Extent) -> std::ops::Range<usize> {
    (extent.start() * SECTOR) as usize..(extent.end() * SECTOR) as usize
}

fn record(kind: RecordKind, seq: u64, disk: u32, extent: Extent) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Record(kind),
        codec: Codec::Raw,
        flags: WriteFlags::NONE,
        volume: VolumeId(disk),
        extent,
        seq: SourceSeq(seq),
        mono: MonoTime(0),
        wall_us: 0,
        payload_len: 0,
        payload_crc: 0,
    }
}

/// A disk that loses what was not flushed, in part.
#[derive(Clone)]
struct Disk {
    now: Vec<u8>,
    durable: Vec<u8>,
    loose: Vec<Extent>,
}

enum ToTarget {
    Say(Message),
    Record(FrameHeader, Vec<u8>),
}
enum ToBox {
    Say(Message),
    Ack(Ack),
}
enum Work {
    Hash(Look),
    Read(u64, VolumeId, Extent),
    Write(SourceSeq),
    Sync(SourceSeq),
}

struct World {
    rng: Rng,
    images: Vec<Vec<u8>>,
    /// Written at the source since the pass before the one that runs began.
    changed: Vec<GranuleMap>,
    disks: Vec<Disk>,
    source: Source,
    target: Target,
    down: VecDeque<ToTarget>,
    up: VecDeque<ToBox>,
    work: VecDeque<Work>,
    compares: VecDeque<(Look, Vec<BlockHash>)>,
    payloads: BTreeMap<SourceSeq, (FrameHeader, Vec<u8>)>,
    connected: bool,
    passes_done: u64,
    interrupted: bool,
    /// For passes that keep: what the late branch is.
    late: Vec<Vec<u8>>,
    keeping: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (mut images, mut disks) = (Vec::new(), Vec::new());
        for _ in 0..1 + rng.below(2) {
            let sectors = 100 + rng.below(3000);
            let mut image = vec![0u8; (sectors * SECTOR) as usize];
            scribble(&mut rng, &mut image, 6);
            // A target of any content: nothing, the same, nearly the same, something else; and it may be larger.
            let mut now = match rng.below(3) {
                0 => vec![0; image.len()],
                1 => image.clone(),
                _ => vec![0x5a; image.len()],
            };
            now.extend(vec![9; rng.below(3) as usize * 512]);
            scribble(&mut rng, &mut now, 3);
            images.push(image);
            disks.push(Disk { durable: now.clone(), now, loose: Vec::new() });
        }
        let (source, target) = Self::machines(&mut rng, &images);
        let changed = images.iter().map(|i| GranuleMap::empty(Sectors(i.len() as u64 / SECTOR))).collect();
        let mut late = images.clone();
        for image in &mut late {
            scribble(&mut rng, image, 2);
        }
        Self {
            rng,
            images,
            changed,
            disks,
            source,
            target,
            down: VecDeque::new(),
            up: VecDeque::new(),
            work: VecDeque::new(),
            compares: VecDeque::new(),
            payloads: BTreeMap::new(),
            connected: false,
            passes_done: 0,
            interrupted: false,
            late,
            keeping: false,
        }
    }

    fn machines(rng: &mut Rng, images: &[Vec<u8>]) -> (Source, Target) {
        let small = rng.below(2) == 0;
        let source = SourceConfig {
            looks_max: 1 + rng.below(3) as usize,
            bytes_max: if small { 300_000 } else { 32 << 20 },
            flush_bytes: if small { 150_000 } else { 16 << 20 },
            fetches_max: 1 + rng.below(8) as usize,
        };
        let disks: Vec<SourceDisk> = images
            .iter()
            .enumerate()
            .map(|(i, image)| SourceDisk { disk: VolumeId(i as u32), sectors: Sectors(image.len() as u64 / SECTOR) })
            .collect();
        let target = TargetConfig { bytes_max: if small { 140_000 } else { 16 << 20 }, records_max: 3 + rng.below(50) };
        (Source::new(source, &disks), Target::new(target))
    }

    fn full(&self) -> Vec<GranuleMap> {
        self.images.iter().map(|i| GranuleMap::full(Sectors(i.len() as u64 / SECTOR))).collect()
    }

    fn begin(&mut self, pass: Pass, maps: Vec<GranuleMap>) {
        let mut out = Vec::new();
        self.source.begin(pass, maps, &mut out);
        self.box_acts(out);
    }
    fn begin_with_changes(&mut self) {
        let empty = self.images.iter().map(|i| GranuleMap::empty(Sectors(i.len() as u64 / SECTOR))).collect();
        let maps = std::mem::replace(&mut self.changed, empty);
        self.begin(Pass::Ship, maps);
    }

    fn connect(&mut self) {
        self.connected = true;
        let disks = self.images.iter().enumerate().map(|(i, image)| RestoreDisk {
            disk: VolumeId(i as u32),
            path: format!("/dev/{i}"),
            sectors: Sectors(image.len() as u64 / SECTOR),
        });
        self.down.push_back(ToTarget::Say(Message::RestoreOpen { restore: ID, disks: disks.collect() }));
    }

    fn cut(&mut self) {
        self.connected = false;
        self.down.clear();
        self.up.clear();
        self.tell_source(SourceEvent::Disconnected);
        self.tell_target(TargetEvent::Disconnected);
        // What was taken in before is still done, in order; nobody hears of it.
        while let Some(work) = self.work.pop_front() {
            self.do_work(work, false);
        }
        self.payloads.clear();
        self.interrupted = true;
    }

    /// Of what was not flushed any part is lost.
    fn power_cut(&mut self) {
        self.work.clear();
        self.cut();
        for disk in &mut self.disks {
            for extent in std::mem::take(&mut disk.loose) {
                for sector in extent.start()..extent.end() {
                    if self.rng.below(2) == 0 {
                        let range = at(&Extent::new(sector, 1));
                        disk.durable[range.clone()].copy_from_slice(&disk.now[range]);
                    }
                }
            }
            disk.now = disk.durable.clone();
        }
        let (_, target) = Self::machines(&mut self.rng, &self.images);
        self.target = target;
        self.again();
    }

    fn box_forgets(&mut self) {
        self.cut();
        self.compares.clear();
        let (source, _) = Self::machines(&mut self.rng, &self.images);
        self.source = source;
        self.again();
    }

    fn again(&mut self) {
        let pass = if self.keeping { Pass::Keep } else { Pass::Ship };
        let full = self.full();
        self.begin(pass, full);
    }

    fn tell_source(&mut self, event: SourceEvent) {
        let mut out = Vec::new();
        self.source.on(event, &mut out).expect("an honest target");
        self.box_acts(out);
    }
    fn tell_target(&mut self, event: TargetEvent) {
        let mut out = Vec::new();
        self.target.on(event, &mut out).expect("an honest box");
        self.target_acts(out);
    }

    fn box_acts(&mut self, actions: Vec<SourceAction>) {
        for action in actions {
            match action {
                SourceAction::Look(look) => self.down.push_back(ToTarget::Say(Message::RestoreLook(look))),
                SourceAction::Compare { look, hashes } => self.compares.push_back((look, hashes)),
                SourceAction::Send { seq, disk, extent, zero } => {
                    let data = self.images[disk.0 as usize][at(&extent)].to_vec();
                    // The source may have been written since it was compared; then the next pass brings it.
                    let (kind, data) = if zero { (RecordKind::Zero, Vec::new()) } else { (RecordKind::Write, data) };
                    self.down.push_back(ToTarget::Record(record(kind, seq.0, disk.0, extent), data));
                }
                SourceAction::Flush { seq } => {
                    self.down.push_back(ToTarget::Record(
                        record(RecordKind::Flush, seq.0, 0, Extent::default()),
                        Vec::new(),
                    ));
                }
                SourceAction::Fetch { id, disk, extent } => {
                    self.down.push_back(ToTarget::Say(Message::RestoreFetch { id, disk, extent }));
                }
                SourceAction::Keep { .. } => unreachable!("see `heard`"),
                SourceAction::PassDone(_) => self.passes_done += 1,
            }
        }
    }

    fn target_acts(&mut self, actions: Vec<TargetAction>) {
        for action in actions {
            match action {
                TargetAction::Open { .. } => self.tell_target(TargetEvent::Opened { refused: None }),
                TargetAction::Hash(look) => self.work.push_back(Work::Hash(look)),
                TargetAction::Read { id, disk, extent } => self.work.push_back(Work::Read(id, disk, extent)),
                TargetAction::Write { seq } => self.work.push_back(Work::Write(seq)),
                TargetAction::Sync { seq } => self.work.push_back(Work::Sync(seq)),
                TargetAction::Close | TargetAction::Reboot => {}
                TargetAction::Say(message) => self.up.push_back(ToBox::Say(message)),
                TargetAction::Ack(ack) => self.up.push_back(ToBox::Ack(ack)),
            }
        }
    }

    fn do_work(&mut self, work: Work, tell: bool) {
        let event = match work {
            Work::Hash(look) => {
                let disk = &self.disks[look.disk.0 as usize].now;
                let hash = |block: Extent| BlockHash::of(&disk[at(&block)]);
                TargetEvent::Hashed {
                    id: look.id,
                    hashes: wire::blocks(&look.runs, look.block_sectors).map(hash).collect(),
                }
            }
            Work::Read(id, disk, extent) => {
                TargetEvent::Read { id, data: self.disks[disk.0 as usize].now[at(&extent)].to_vec() }
            }
            Work::Write(seq) => {
                let (header, data) = self.payloads.remove(&seq).expect("its payload");
                let disk = &mut self.disks[header.volume.0 as usize];
                let place = &mut disk.now[at(&header.extent)];
                if data.is_empty() {
                    place.fill(0)
                } else {
                    place.copy_from_slice(&data)
                }
                disk.loose.push(header.extent);
                TargetEvent::Wrote { seq }
            }
            Work::Sync(seq) => {
                for disk in &mut self.disks {
                    disk.durable = disk.now.clone();
                    disk.loose.clear();
                }
                TargetEvent::Synced { seq }
            }
        };
        if tell {
            self.tell_target(event);
        }
    }

    fn heard(&mut self, up: ToBox) {
        let event = match up {
            ToBox::Ack(ack) => SourceEvent::Acked(ack),
            ToBox::Say(Message::RestoreOpened { refused: None, credit, .. }) => SourceEvent::Opened { credit },
            ToBox::Say(Message::RestoreLooked { id, hashes }) => SourceEvent::Looked { id, hashes },
            ToBox::Say(Message::RestoreFetched { id, data }) => {
                let mut out = Vec::new();
                self.source
                    .on(SourceEvent::Fetched { id, bytes: data.len() as u64 }, &mut out)
                    .expect("what was asked for");
                let kept: Vec<u64> = out
                    .iter()
                    .filter_map(|action| match action {
                        SourceAction::Keep { id, disk, extent } => {
                            self.late[disk.0 as usize][at(extent)].copy_from_slice(&data);
                            Some(*id)
                        }
                        _ => None,
                    })
                    .collect();
                out.retain(|action| !matches!(action, SourceAction::Keep { .. }));
                self.box_acts(out);
                kept.into_iter().for_each(|id| self.tell_source(SourceEvent::Kept { id }));
                return;
            }
            ToBox::Say(other) => panic!("{} from a target", other.name()),
        };
        self.tell_source(event);
    }

    fn compare(&mut self, look: &Look, hashes: &[BlockHash]) {
        let image = if self.keeping { &self.late } else { &self.images };
        let image = &image[look.disk.0 as usize];
        let (mut differ, mut zero) = (vec![0u8; hashes.len().div_ceil(8)], vec![0u8; hashes.len().div_ceil(8)]);
        for (i, block) in wire::blocks(&look.runs, look.block_sectors).enumerate() {
            let data = &image[at(&block)];
            differ[i / 8] |= u8::from(BlockHash::of(data) != hashes[i]) << (i % 8);
            zero[i / 8] |= u8::from(data.iter().all(|b| *b == 0)) << (i % 8);
        }
        self.tell_source(SourceEvent::Compared { id: look.id, differ, zero });
    }

    fn write_at_the_source(&mut self) {
        let disk = self.rng.below(self.images.len() as u64) as usize;
        let sectors = self.images[disk].len() as u64 / SECTOR;
        let start = self.rng.below(sectors);
        let extent = Extent::new(start, 1 + self.rng.below((sectors - start).min(300)));
        let byte = self.rng.below(4) as u8;
        self.images[disk][at(&extent)].fill(byte);
        let run = self.changed[disk].touching(&extent);
        self.changed[disk].set(run);
    }

    /// One thing that could happen; false: nothing can.
    fn step(&mut self) -> bool {
        if !self.connected {
            self.connect();
            return true;
        }
        let kinds = [!self.down.is_empty(), !self.up.is_empty(), !self.work.is_empty(), !self.compares.is_empty()];
        let able: Vec<usize> = (0..4).filter(|i| kinds[*i]).collect();
        if able.is_empty() {
            return false;
        }
        match able[self.rng.below(able.len() as u64) as usize] {
            0 => match self.down.pop_front() {
                Some(ToTarget::Say(Message::RestoreOpen { restore, disks })) => {
                    self.tell_target(TargetEvent::Open { restore, disks });
                }
                Some(ToTarget::Say(Message::RestoreLook(look))) => self.tell_target(TargetEvent::Look(look)),
                Some(ToTarget::Say(Message::RestoreFetch { id, disk, extent })) => {
                    self.tell_target(TargetEvent::Fetch { id, disk, extent });
                }
                Some(ToTarget::Record(header, data)) => {
                    self.payloads.insert(header.seq, (header, data));
                    self.tell_target(TargetEvent::Record(header));
                }
                _ => panic!("nothing else is sent"),
            },
            1 => {
                if let Some(up) = self.up.pop_front() {
                    self.heard(up);
                }
            }
            2 => {
                if let Some(work) = self.work.pop_front() {
                    self.do_work(work, true);
                }
            }
            _ => {
                if let Some((look, hashes)) = self.compares.pop_front() {
                    self.compare(&look, &hashes);
                }
            }
        }
        true
    }

    /// Runs the pass that was begun to its end; with what may go wrong, while `faults` last.
    fn finish_pass(&mut self, faults: &mut u64, writes: &mut u64) {
        let before = self.passes_done;
        while self.passes_done == before {
            let moved = self.step();
            assert!(moved || self.passes_done > before, "stuck: {:?}", self.source.progress());
            if *writes > 0 && self.rng.below(20) == 0 {
                *writes -= 1;
                self.write_at_the_source();
            }
            if *faults > 0 && self.rng.below(60) == 0 && self.passes_done == before {
                *faults -= 1;
                match self.rng.below(4) {
                    0 => self.power_cut(),
                    1 => self.box_forgets(),
                    _ => self.cut(),
                }
            }
        }
    }
}

fn scribble(rng: &mut Rng, image: &mut [u8], most: u64) {
    for _ in 0..rng.below(most + 1) {
        let from = rng.below(image.len() as u64) as usize;
        let len = (1 + rng.below(150_000) as usize).min(image.len() - from);
        for byte in &mut image[from..from + len] {
            *byte = rng.below(256) as u8;
        }
    }
}

#[test]
fn whatever_is_cut_the_disks_end_as_the_source_and_a_right_disk_is_shipped_nothing() {
    for seed in 1..=300 {
        let mut world = World::new(seed);
        let (mut faults, mut writes) = (world.rng.below(6), world.rng.below(12));
        let full = world.full();
        world.begin(Pass::Ship, full);
        world.finish_pass(&mut faults, &mut writes);
        // What was written meanwhile, until nothing is.
        while writes > 0 || world.changed.iter().any(|m| !m.is_empty()) {
            if world.changed.iter().all(|m| m.is_empty()) {
                writes -= 1;
                world.write_at_the_source();
            }
            world.begin_with_changes();
            world.finish_pass(&mut faults, &mut writes);
        }
        let mut none = 0;
        let full = world.full();
        world.begin(Pass::Ship, full);
        world.finish_pass(&mut none, &mut 0);
        for (disk, image) in world.disks.iter().zip(&world.images) {
            assert!(disk.durable[..image.len()] == image[..], "seed {seed}: the disk is not the source");
            assert!(disk.durable[image.len()..].len() <= 1024, "nothing is written behind the mapped size");
        }
        let before = world.source.progress();
        let full = world.full();
        world.begin(Pass::Ship, full);
        world.finish_pass(&mut none, &mut 0);
        let after = world.source.progress();
        assert_eq!(
            (after.shipped_bytes, after.zeroed_bytes, after.left_bytes),
            (before.shipped_bytes, before.zeroed_bytes, 0),
            "seed {seed}: a disk that is right is shipped nothing"
        );
    }
}

#[test]
fn what_the_old_disk_held_is_kept_bit_for_bit_and_nothing_is_written_there() {
    for seed in 1..=150 {
        let mut world = World::new(seed);
        world.keeping = true;
        let old: Vec<Vec<u8>> = world.disks.iter().map(|d| d.now.clone()).collect();
        let mut faults = world.rng.below(5);
        let full = world.full();
        world.begin(Pass::Keep, full);
        world.finish_pass(&mut faults, &mut 0);
        for ((late, old), disk) in world.late.iter().zip(&old).zip(&world.disks) {
            assert!(late[..] == old[..late.len()], "seed {seed}: the late branch is not the old disk");
            assert!(disk.now == *old, "seed {seed}: the old disk was written");
        }
        let fetched = world.source.progress().fetched_bytes;
        let full = world.full();
        world.begin(Pass::Keep, full);
        world.finish_pass(&mut 0, &mut 0);
        assert_eq!(world.source.progress().fetched_bytes, fetched, "seed {seed}: what is the same is not fetched");
    }
}

/// A small change costs a small part of a granule.
#[test]
fn a_small_change_ships_its_blocks_and_not_its_granules() {
    let mut world = World::new(3);
    let full = world.full();
    world.begin(Pass::Ship, full);
    world.finish_pass(&mut 0, &mut 0);
    let before = world.source.progress().shipped_bytes;
    world.images[0][70_000] ^= 0x80;
    let full = world.full();
    world.begin(Pass::Ship, full);
    world.finish_pass(&mut 0, &mut 0);
    assert_eq!(world.source.progress().shipped_bytes - before, 4096);
    // The same where just the granules that have changed are looked at: each differs, and each by one block.
    let before = world.source.progress().shipped_bytes;
    for granule in [1usize, 2, 3, 5] {
        let at = granule * 65_536 + 9_000;
        world.images[0][at] ^= 0x40;
        world.changed[0].set(granule as u64..granule as u64 + 1);
    }
    world.begin_with_changes();
    world.finish_pass(&mut 0, &mut 0);
    assert_eq!(world.source.progress().shipped_bytes - before, 4 * 4096);
    assert!(world.disks[0].durable[..world.images[0].len()] == world.images[0][..]);
}

#[test]
fn a_target_that_says_what_cannot_be_is_refused_by_name() {
    let disks = [SourceDisk { disk: VolumeId(0), sectors: Sectors(1000) }];
    let opened = || {
        let mut source = Source::new(SourceConfig::default(), &disks);
        let mut out = Vec::new();
        source.begin(Pass::Ship, vec![GranuleMap::full(Sectors(1000))], &mut out);
        assert!(out.is_empty(), "nobody is there");
        source.on(SourceEvent::Opened { credit: Credit { bytes: u64::MAX, records: u64::MAX } }, &mut out).unwrap();
        let Some(SourceAction::Look(look)) = out.first().cloned() else { panic!("{out:?}") };
        (source, look)
    };
    let refused = |event: SourceEvent| {
        let (mut source, _) = opened();
        source.on(event, &mut Vec::new()).unwrap_err()
    };
    let hash = BlockHash([0; 16]);
    assert_eq!(refused(SourceEvent::Looked { id: 99, hashes: vec![hash] }), SourceError::NoSuchLook(99));
    assert_eq!(
        refused(SourceEvent::Looked { id: 1, hashes: vec![hash; 3] }),
        SourceError::Hashes { id: 1, had: 3, due: 8 }
    );
    assert_eq!(refused(SourceEvent::Fetched { id: 5, bytes: 1 }), SourceError::NoSuchFetch(5));
    let ahead = Ack { written: SourceSeq(1), durable: SourceSeq(1), credit: Credit::default(), flags: AckFlags::NONE };
    assert_eq!(refused(SourceEvent::Acked(ahead)), SourceError::AckAhead { said: SourceSeq(1), sent: SourceSeq(0) });
    // Twice the same answer, and acks that go back, change nothing.
    let (mut source, look) = opened();
    let answer = || SourceEvent::Looked { id: look.id, hashes: vec![hash; 8] };
    source.on(answer(), &mut Vec::new()).unwrap();
    assert_eq!(source.on(answer(), &mut Vec::new()), Err(SourceError::NoSuchLook(look.id)));
    source.on(SourceEvent::Compared { id: 77, differ: vec![0xff], zero: vec![] }, &mut Vec::new()).unwrap();
    let mut unasked = Source::new(SourceConfig::default(), &disks);
    assert_eq!(unasked.on(SourceEvent::Acked(ahead), &mut Vec::new()), Err(SourceError::NotOpen));
}

#[test]
fn a_box_that_says_what_cannot_be_is_refused_by_name() {
    let disk = |n: u32, path: &str| RestoreDisk { disk: VolumeId(n), path: path.into(), sectors: Sectors(1000) };
    let opened = || {
        let mut target = Target::new(TargetConfig { bytes_max: 1000, records_max: 2 });
        let mut out = Vec::new();
        target.on(TargetEvent::Open { restore: ID, disks: vec![disk(0, "a")] }, &mut out).unwrap();
        target.on(TargetEvent::Opened { refused: None }, &mut out).unwrap();
        assert!(
            matches!(out[..], [TargetAction::Open { .. }, TargetAction::Say(Message::RestoreOpened { .. })]),
            "{out:?}"
        );
        target
    };
    let refused = |event: TargetEvent| opened().on(event, &mut Vec::new()).unwrap_err();
    let write = |seq, disk, extent| TargetEvent::Record(record(RecordKind::Write, seq, disk, extent));
    assert_eq!(refused(TargetEvent::Open { restore: ID, disks: vec![disk(0, "a")] }), TargetError::OpenAlready);
    assert_eq!(
        refused(write(2, 0, Extent::new(0, 1))),
        TargetError::Sequence { wanted: SourceSeq(1), got: SourceSeq(2) }
    );
    assert_eq!(refused(write(1, 4, Extent::new(0, 1))), TargetError::NoSuchDisk(VolumeId(4)));
    let past = TargetError::PastEnd { disk: VolumeId(0), start: 999, end: 1001, sectors: 1000 };
    assert_eq!(refused(write(1, 0, Extent::new(999, 2))), past);
    assert!(matches!(refused(write(1, 0, Extent::new(u64::MAX, 2))), TargetError::PastEnd { .. }));
    assert_eq!(refused(write(1, 0, Extent::new(0, 4))), TargetError::Credit);
    let discard = TargetEvent::Record(record(RecordKind::Discard, 1, 0, Extent::new(0, 1)));
    assert_eq!(refused(discard), TargetError::Kind(FrameKind::Record(RecordKind::Discard)));
    let fetch = |extent| TargetEvent::Fetch { id: 1, disk: VolumeId(0), extent };
    assert_eq!(refused(fetch(Extent::new(0, 100))), TargetError::FetchLength(51_200));
    assert!(matches!(refused(fetch(Extent::new(990, 20))), TargetError::PastEnd { .. }));
    let look = |runs| TargetEvent::Look(Look { id: 1, disk: VolumeId(0), block_sectors: 128, runs });
    assert!(matches!(refused(look(vec![Extent::new(999, 2)])), TargetError::Look(_)));
    let end = TargetEvent::End { restore: RestoreId(8), reboot: true };
    assert_eq!(refused(end), TargetError::OtherRestore { have: ID, got: RestoreId(8) });
    let mut target = Target::new(TargetConfig::default());
    let mut on = |event| target.on(event, &mut Vec::new());
    assert_eq!(on(TargetEvent::Open { restore: ID, disks: vec![] }), Err(TargetError::Disks(0)));
    let twice = vec![disk(0, "a"), disk(1, "a")];
    assert_eq!(on(TargetEvent::Open { restore: ID, disks: twice }), Err(TargetError::Twice("a".into())));
    assert_eq!(on(look(vec![Extent::new(0, 1)])), Err(TargetError::NotOpen));
    // Asked for more than anybody does.
    let mut target = opened();
    let asked = (0..1000).find_map(|_| target.on(look(vec![Extent::new(0, 1)]), &mut Vec::new()).err());
    assert_eq!(asked, Some(TargetError::TooMuch));
}

/// Only after an order, only when everything is durable and closed; and not when that failed.
#[test]
fn a_target_reboots_after_its_disks_are_durable_and_closed() {
    let mut target = Target::new(TargetConfig::default());
    let mut out = Vec::new();
    let disks = vec![RestoreDisk { disk: VolumeId(0), path: "a".into(), sectors: Sectors(8) }];
    let mut on = |target: &mut Target, event| {
        out.clear();
        target.on(event, &mut out).unwrap();
        out.clone()
    };
    on(&mut target, TargetEvent::Open { restore: ID, disks: disks.clone() });
    on(&mut target, TargetEvent::Opened { refused: None });
    assert_eq!(on(&mut target, TargetEvent::End { restore: ID, reboot: true }), [TargetAction::Close]);
    let ended = TargetAction::Say(Message::RestoreEnded { restore: ID });
    assert_eq!(on(&mut target, TargetEvent::Closed { refused: None }), [ended.clone(), TargetAction::Reboot]);
    // Once more, for the first answer was lost.
    assert_eq!(on(&mut target, TargetEvent::End { restore: ID, reboot: false }), [ended]);
    on(&mut target, TargetEvent::Open { restore: ID, disks });
    on(&mut target, TargetEvent::Opened { refused: None });
    on(&mut target, TargetEvent::End { restore: ID, reboot: true });
    let failed = on(&mut target, TargetEvent::Closed { refused: Some("disk on fire".into()) });
    assert!(matches!(failed[..], [TargetAction::Say(Message::RestoreFailed { .. })]), "{failed:?}");
}
