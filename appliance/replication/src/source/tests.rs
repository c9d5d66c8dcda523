//! The source machine step by step, and under random events. Whole worlds with an oracle disk live in the `sim` crate.

use super::*;
use crate::rng::Rng;
use crate::{GRANULE_SECTORS, Lag};
use model::Bound;
use wire::decode_mark;

const GROUP: GroupId = GroupId([1; 16]);
const STREAM: StreamId = StreamId([2; 16]);
/// 40 granules, the last one half.
const SECTORS: u64 = 40 * GRANULE_SECTORS - 64;

fn volume(id: u32, sectors: u64) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId(id),
        name: format!("/dev/v{id}"),
        sectors: Sectors(sectors),
        identity: format!("serial {id}"),
    }
}

fn config() -> SourceConfig {
    SourceConfig {
        reads_max: 2,
        read_bytes_max: 4 << 16,
        ..SourceConfig::new(GROUP, vec![volume(0, SECTORS)], SyncMode::Async)
    }
}

fn sync(wait_ms_max: u64, at_bound: Bound) -> SyncMode {
    SyncMode::Sync { wait_ms_max, at_bound }
}

/// A source with a clock, a list of what it asked for, and checks that hold for every test.
struct Bench {
    source: Source,
    ms: u64,
    actions: Vec<Action>,
    captures: u64,
    /// What the spool holds, by number.
    spool: std::collections::BTreeMap<u64, (Numbered, Payload)>,
    sent: Vec<Numbered>,
    state: Vec<u8>,
    credit: Credit,
    spent: Credit,
}

const PLENTY: Credit = Credit { bytes: 1 << 40, records: 1 << 40 };

impl Bench {
    fn new(config: SourceConfig) -> Self {
        Self::with(config, None)
    }
    fn with(config: SourceConfig, allocated: Option<&[(VolumeId, Extent)]>) -> Self {
        let mut actions = Vec::new();
        let source = Source::new(config, STREAM, allocated, Self::now(0), &mut actions);
        Self::around(source, 0, actions)
    }
    fn restore(config: SourceConfig, state: &[u8], ms: u64) -> Self {
        let mut actions = Vec::new();
        let source = Source::restore(config, state, Self::now(ms), &mut actions).expect("a state it stored itself");
        Self::around(source, ms, actions)
    }
    fn around(source: Source, ms: u64, actions: Vec<Action>) -> Self {
        let mut bench = Self {
            source,
            ms,
            actions: Vec::new(),
            captures: 0,
            spool: Default::default(),
            sent: Vec::new(),
            state: Vec::new(),
            credit: Credit::default(),
            spent: Credit::default(),
        };
        bench.note(actions);
        bench
    }
    fn now(ms: u64) -> Now {
        Now { mono: MonoTime::from_ms(1000 + ms), wall_us: ms * 1000 }
    }
    fn note(&mut self, actions: Vec<Action>) {
        for action in &actions {
            match action {
                Action::Keep { record, payload } => {
                    if let Some((last, _)) = self.spool.last_key_value() {
                        assert_eq!(record.seq.0, last + 1, "numbers without a hole");
                    }
                    self.spool.insert(record.seq.0, (*record, payload.clone()));
                }
                Action::Send { first, last } => {
                    for seq in first.0..=last.0 {
                        let (record, payload) = self.spool.get(&seq).expect("only what is kept is sent");
                        self.sent.push(*record);
                        let len = if let Payload::Mark(bytes) = payload { bytes.len() } else { 0 };
                        self.spent.bytes += charge(FrameKind::Record(record.kind), record.extent, len as u32);
                        self.spent.records += 1;
                    }
                    assert!(self.spent.bytes <= self.credit.bytes && self.spent.records <= self.credit.records);
                }
                Action::Release { through } => self.spool = self.spool.split_off(&(through.0 + 1)),
                Action::Drop { from } => drop(self.spool.split_off(&from.0)),
                Action::Persist { state, .. } => self.state = state.clone(),
                _ => {}
            }
        }
        self.actions.extend(actions);
    }
    fn on(&mut self, event: Event) -> &mut Self {
        let mut actions = Vec::new();
        self.source.on(event, Self::now(self.ms), &mut actions);
        self.note(actions);
        self
    }
    fn wait(&mut self, ms: u64) -> &mut Self {
        self.ms += ms;
        self.on(Event::Tick)
    }
    fn take(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }
    fn write(&mut self, lba: u64, sectors: u64) -> &mut Self {
        self.part(lba, sectors, WriteFlags::NONE)
    }
    fn part(&mut self, lba: u64, sectors: u64, flags: WriteFlags) -> &mut Self {
        self.capture(CapturedKind::Write, Extent::new(lba, sectors), flags)
    }
    fn capture(&mut self, kind: CapturedKind, extent: Extent, flags: WriteFlags) -> &mut Self {
        self.captures += 1;
        let mono = Self::now(self.ms).mono;
        let captured = Captured {
            capture: self.captures,
            kind,
            flags,
            volume: VolumeId(0),
            extent,
            mono,
            wall_us: self.ms * 1000,
        };
        self.on(Event::Captured(captured))
    }
    fn ready(&mut self, resume: Resume, credit: Credit) -> &mut Self {
        self.credit = credit;
        self.spent = Credit::default();
        self.on(Event::Connected).on(Event::Ready { resume, credit })
    }
    fn go_on_at(&mut self, next: u64) -> &mut Self {
        self.ready(Resume::Continue { next: SourceSeq(next) }, PLENTY)
    }
    fn ack(&mut self, written: u64, durable: u64) -> &mut Self {
        let ack = Ack {
            written: SourceSeq(written),
            durable: SourceSeq(durable),
            credit: self.credit,
            flags: AckFlags::NONE,
        };
        self.on(Event::Ack(ack))
    }
    fn ack_all(&mut self) -> &mut Self {
        let last = self.source.window.next().prev().0;
        self.ack(last, last)
    }
    fn reads(&self) -> Vec<(ReadId, Extent)> {
        let read = |action: &Action| match action {
            Action::ReadVolume { read, extent, .. } => Some((*read, *extent)),
            _ => None,
        };
        self.actions.iter().filter_map(read).collect()
    }
    fn persisted(&mut self) -> &mut Self {
        if let Some(serial) = self.source.storing {
            self.on(Event::Persisted { serial });
        }
        self
    }
    /// Answers every read and drain until the copy is over and durable.
    fn settle(&mut self) -> &mut Self {
        for _ in 0..1000 {
            let (reads, drains): (Vec<Action>, Vec<Action>) = self
                .take()
                .into_iter()
                .filter(|action| matches!(action, Action::ReadVolume { .. } | Action::Drain { .. }))
                .partition(|action| matches!(action, Action::ReadVolume { .. }));
            for drain in drains {
                if let Action::Drain { barrier } = drain {
                    self.on(Event::Drained { barrier });
                }
            }
            for read in reads {
                if let Action::ReadVolume { read, .. } = read {
                    self.on(Event::ReadDone { read, zeroes: Vec::new() });
                }
            }
            self.persisted().ack_all();
            if self.source.gap.is_none() && self.source.window.is_empty() && self.source.storing.is_none() {
                self.take();
                return self;
            }
            self.wait(100);
        }
        panic!("does not settle: {:?}", self.source.status());
    }
    /// A source whose first copy is over, connected, with nothing under way.
    fn synced(config: SourceConfig) -> Self {
        let mut bench = Self::new(config);
        bench.ready(Resume::Restart, PLENTY).settle();
        bench.sent.clear();
        bench
    }
    fn marks(&self) -> Vec<(u64, Mark)> {
        let mark = |(seq, (record, payload)): (&u64, &(Numbered, Payload))| match payload {
            Payload::Mark(bytes) => Some((*seq, read_mark(record, bytes))),
            _ => None,
        };
        self.spool.iter().filter_map(mark).collect()
    }
    fn alarms(&self) -> Vec<Alarm> {
        let alarm = |action: &Action| if let Action::Alarm(alarm) = action { Some(alarm.clone()) } else { None };
        self.actions.iter().filter_map(alarm).collect()
    }
    fn flushes(&self) -> Vec<(u64, bool)> {
        let flush = |action: &Action| match action {
            Action::ReleaseFlush { id, durable } => Some((*id, *durable)),
            _ => None,
        };
        self.actions.iter().filter_map(flush).collect()
    }
    fn next(&self) -> u64 {
        self.source.window.next().0
    }
}

fn read_mark(record: &Numbered, bytes: &[u8]) -> Mark {
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
        payload_crc: wire::crc32(bytes),
    };
    decode_mark(&header, bytes).expect("a mark it encoded itself")
}

#[test]
fn a_new_stream_begins_with_its_marks_copies_and_becomes_consistent() {
    let mut bench = Bench::new(config());
    assert_eq!(bench.source.status().lag, Lag::Never);
    // Before it is connected everything is only marked.
    bench.write(0, 8);
    assert!(bench.spool.is_empty());
    bench.ready(Resume::Restart, PLENTY);
    let reason = GapReason::InitialSync;
    assert_eq!(bench.marks(), [(1, Mark::StreamBegin { stream: STREAM }), (2, Mark::GapBegin { reason })]);
    assert_eq!(bench.source.status().state, GroupAgentState::Syncing { reason });
    assert_eq!(bench.reads().len(), 2, "as many reads as allowed");
    let status = bench.source.status();
    assert_eq!(status.sync_total, ByteLen(SECTORS * 512));
    assert_eq!(status.sync_done, ByteLen(0));
    bench.settle();
    assert_eq!(bench.source.status().state, GroupAgentState::Replicating);
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 0 });
    let copied: u64 = bench.sent.iter().filter(|r| r.flags == WriteFlags::SYNC).map(|r| r.extent.sectors.0).sum();
    assert_eq!(copied, SECTORS, "each sector once");
    assert!(bench.sent.iter().all(|record| record.extent.bytes() <= MAX_RECORD_BYTES as u64));
}

#[test]
fn only_what_is_allocated_is_copied_first() {
    let allocated =
        [(VolumeId(0), Extent::new(130, 1)), (VolumeId(0), Extent::new(1000, 300)), (VolumeId(7), Extent::new(0, 9))];
    let mut bench = Bench::with(config(), Some(&allocated));
    bench.ready(Resume::Restart, PLENTY).settle();
    let copied: u64 = bench.sent.iter().filter(|r| r.flags == WriteFlags::SYNC).map(|r| r.extent.sectors.0).sum();
    assert_eq!(copied, (1 + 4) * GRANULE_SECTORS, "granules 1 and 7 to 10");
}

#[test]
fn live_writes_and_the_copy_share_the_volume_without_a_sector_twice() {
    let mut bench = Bench::new(config());
    bench.ready(Resume::Restart, PLENTY);
    let reads = bench.reads();
    assert_eq!(reads[0].1, Extent::new(0, 4 * GRANULE_SECTORS));
    let before = bench.next();
    // Being read: sent, and masked from the read. Not read yet: only marked.
    bench.write(10, 5).write(20 * GRANULE_SECTORS, 8);
    assert_eq!(bench.next(), before + 1);
    bench.on(Event::ReadDone { read: reads[0].0, zeroes: vec![Extent::new(100, 20), Extent::new(0, 12)] });
    let copied: Vec<(RecordKind, Extent)> = bench
        .spool
        .values()
        .filter(|(record, _)| record.flags == WriteFlags::SYNC)
        .map(|(record, _)| (record.kind, record.extent))
        .collect();
    let want = [
        (RecordKind::Zero, Extent::new(100, 20)),
        (RecordKind::Zero, Extent::new(0, 10)),
        (RecordKind::Write, Extent::new(15, 85)),
        (RecordKind::Write, Extent::new(120, 256)),
        (RecordKind::Write, Extent::new(376, 136)),
    ];
    assert_eq!(copied, want);
    // Copied: sent.
    let before = bench.next();
    bench.write(10, 5);
    assert_eq!(bench.next(), before + 1);
    // Partly copied, partly not: sent whole, the rest is copied later all the same.
    bench.write(12 * GRANULE_SECTORS - 4, 8);
    bench.settle();
}

#[test]
fn a_full_spool_opens_a_gap_behind_what_it_holds() {
    let mut config = config();
    config.spool_bytes_max = 1 << 20;
    let mut bench = Bench::synced(config);
    bench.on(Event::Disconnected);
    let first = bench.next();
    for i in 0..40 {
        bench.write(i * 100, 100);
    }
    let kept = bench.spool.len() as u64;
    assert!(bench.source.window.bytes() <= (1 << 20) + 100, "{}", bench.source.window.bytes());
    let reason = GapReason::Overflow;
    assert_eq!(bench.marks(), [(first + kept - 1, Mark::GapBegin { reason })], "after the last record that fitted");
    assert!(bench.source.status().dirty.0 > 0);
    assert!(matches!(bench.source.status().lag, Lag::Unknown { .. }));
    bench.take();
    bench.go_on_at(first);
    assert_eq!(bench.sent.len() as u64, kept, "what the spool holds goes out, its moments stay valid");
    assert_eq!(bench.source.status().state, GroupAgentState::Marking { reason }, "no room to copy into yet");
    assert!(bench.reads().is_empty());
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 0 }, "the gap began this moment");
    bench.wait(700);
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 700 });
    bench.ack(first + kept - 1, first + kept - 1);
    assert!(!bench.reads().is_empty());
    bench.settle();
    let copied: u64 = bench.sent.iter().filter(|r| r.flags == WriteFlags::SYNC).map(|r| r.extent.sectors.0).sum();
    assert!(copied < SECTORS / 2, "only what was marked: {copied}");
}

#[test]
fn a_full_journal_is_the_reason_of_the_gap_it_causes() {
    let mut config = config();
    config.spool_bytes_max = 1 << 20;
    let mut bench = Bench::synced(config);
    let last = SourceSeq(bench.next() - 1);
    let full = Ack { written: last, durable: last, credit: PLENTY, flags: AckFlags::JOURNAL_FULL };
    bench.on(Event::Ack(full));
    for i in 0..40 {
        bench.write(i * 100, 100);
    }
    assert!(bench.sent.is_empty(), "a full box is sent nothing");
    assert_eq!(bench.source.status().gap, Some(GapReason::JournalFull));
    bench.ack(last.0, last.0);
    assert!(!bench.sent.is_empty());
    bench.settle();
}

#[test]
fn credits_are_spent_to_the_last_and_never_beyond() {
    for seed in 1..200 {
        let mut rng = Rng::new(seed);
        let mut bench = Bench::synced(config());
        bench.on(Event::Disconnected);
        let next = bench.next();
        let credit = Credit { bytes: 300_000 + rng.below(300_000), records: 1 + rng.below(20) };
        bench.ready(Resume::Continue { next: SourceSeq(next) }, credit);
        for _ in 0..60 {
            bench.write(rng.below(2000), 1 + rng.below(200));
            // Acks come late, twice, or not at all; limits only grow.
            if rng.one_in(3) {
                bench.credit = Credit {
                    bytes: bench.credit.bytes + rng.below(100_000),
                    records: bench.credit.records + rng.below(3),
                };
                let sent = bench.source.sent.0;
                bench.ack(sent, sent);
            }
        }
        bench.credit = PLENTY;
        let sent = bench.source.sent.0;
        bench.ack(sent, sent);
        assert_eq!(bench.source.sent.next(), bench.source.window.next(), "seed {seed}: more credit, nothing held back");
    }
}

#[test]
fn the_stream_goes_on_where_the_box_says() {
    let mut bench = Bench::synced(config());
    let first = bench.next();
    for i in 0..10 {
        bench.write(i * 8, 8);
    }
    bench.ack(first + 5, first + 2).on(Event::Disconnected).sent.clear();
    bench.go_on_at(first + 7);
    assert_eq!(bench.sent.iter().map(|r| r.seq.0).collect::<Vec<_>>(), [first + 7, first + 8, first + 9]);
    // A box that lost what it had not called durable.
    bench.on(Event::Disconnected).sent.clear();
    bench.go_on_at(first + 3);
    assert_eq!(bench.sent.len(), 7);
    assert!(bench.alarms().is_empty());
    assert_eq!(bench.source.status().gap, None);
    bench.ack_all();
    assert_eq!(bench.source.status().window_records, 0);
}

#[test]
fn a_box_that_disagrees_gets_everything_again_and_an_alarm() {
    type Case = (fn(u64) -> Resume, fn(&Alarm) -> bool);
    let cases: [Case; 4] = [
        (|next| Resume::Continue { next: SourceSeq(next - 5) }, |alarm| matches!(alarm, Alarm::BoxLostDurable { .. })),
        (|next| Resume::Continue { next: SourceSeq(next + 5) }, |alarm| matches!(alarm, Alarm::BoxAhead { .. })),
        (|_| Resume::Restart, |alarm| matches!(alarm, Alarm::BoxForgot { .. })),
        (|_| Resume::Continue { next: SourceSeq(0) }, |alarm| matches!(alarm, Alarm::BoxForgot { .. })),
    ];
    for (at, (resume, is_right)) in cases.into_iter().enumerate() {
        let mut bench = Bench::synced(config());
        bench.on(Event::Disconnected);
        bench.take();
        let resume = resume(bench.next());
        bench.spool.clear();
        bench.ready(resume, PLENTY);
        let alarms = bench.alarms();
        assert!(alarms.len() == 1 && is_right(&alarms[0]), "case {at}: {alarms:?}");
        let status = bench.source.status();
        assert_eq!((status.gap, status.dirty), (Some(GapReason::HistoryLost), ByteLen(SECTORS * 512)), "case {at}");
        let first = match resume {
            Resume::Continue { next } if next > SourceSeq(0) => next.0,
            _ => 1,
        };
        assert_eq!(bench.sent[0].seq.0, first, "case {at}");
        bench.settle();
    }
}

#[test]
fn before_anything_was_durable_a_box_that_knows_nothing_is_sent_all_from_the_first() {
    let mut bench = Bench::new(config());
    bench.ready(Resume::Restart, PLENTY).on(Event::Disconnected).sent.clear();
    bench.ready(Resume::Restart, PLENTY);
    assert!(bench.alarms().is_empty());
    assert_eq!(bench.sent[0].seq, SourceSeq(1));
    bench.settle();
}

#[test]
fn an_agent_that_died_copies_only_what_was_not_durable() {
    let mut bench = Bench::synced(config());
    bench.write(0, 8).write(5 * GRANULE_SECTORS, 8);
    let last = bench.next() - 1;
    bench.ack(last, last - 1).wait(600);
    let Some(state) = bench
        .actions
        .iter()
        .rev()
        .find_map(|a| if let Action::Persist { state, .. } = a { Some(state.clone()) } else { None })
    else {
        panic!("a write that is not durable after half a second is stored");
    };
    let mut bench = Bench::restore(config(), &state, 10_000);
    assert_eq!(bench.source.status().dirty, ByteLen(GRANULE_SECTORS * 512));
    assert_eq!(bench.source.status().gap, Some(GapReason::AgentRestart));
    // It lost count: until the box says where to go on, everything is only marked.
    bench.write(0, 8).go_on_at(last + 1);
    assert_eq!(bench.marks(), [(last + 1, Mark::GapBegin { reason: GapReason::AgentRestart })]);
    // What capture hands in again may be older than what the box has: no end of the gap before that has passed.
    let reads = bench.reads();
    assert_eq!(reads.len(), 2);
    for (read, _) in reads {
        bench.on(Event::ReadDone { read, zeroes: Vec::new() });
    }
    assert!(bench.source.status().gap.is_some(), "not drained");
    bench.settle();
    let copied: u64 = bench.sent.iter().filter(|r| r.flags == WriteFlags::SYNC).map(|r| r.extent.sectors.0).sum();
    assert_eq!(copied, 2 * GRANULE_SECTORS);
}

#[test]
fn after_a_restart_the_box_may_still_lose_what_it_had_only_written() {
    let mut bench = Bench::synced(config());
    bench.write(0, 8);
    let last = bench.next() - 1;
    bench.ack(last, last - 1).wait(600).persisted();
    let state = bench.state.clone();
    let mut bench = Bench::restore(config(), &state, 10_000);
    bench.go_on_at(last + 1).on(Event::Disconnected);
    // Power cut on the box: the record before the restart is gone. It was never durable: nobody broke a promise.
    bench.spool.clear();
    bench.go_on_at(last);
    assert!(bench.alarms().is_empty());
    assert_eq!(bench.marks()[0], (last, Mark::GapBegin { reason: GapReason::AgentRestart }));
    assert!(bench.source.status().dirty.0 <= GRANULE_SECTORS * 512);
    bench.settle();
}

#[test]
fn a_clean_stop_goes_on_without_a_gap() {
    let mut bench = Bench::synced(config());
    bench.write(0, 8);
    assert!(!bench.source.final_state().1, "something is not durable");
    bench.ack_all();
    let (state, clean) = bench.source.final_state();
    assert!(clean);
    let next = bench.next();
    let mut bench = Bench::restore(config(), &state, 50);
    assert_eq!(bench.source.status().gap, None);
    bench.write(8, 8).go_on_at(next);
    assert!(bench.sent.is_empty(), "a state that says 'clean' must be gone before anything is sent");
    let unclean = bench.state.clone();
    bench.persisted();
    assert_eq!(bench.sent.iter().map(|r| r.seq.0).collect::<Vec<_>>(), [next]);
    // Died right after: not clean any more.
    assert!(Bench::restore(config(), &unclean, 60).source.status().gap.is_some());
    // A disk that changed meanwhile is not continued.
    let mut other = config();
    other.volumes[0].identity = "another".into();
    let bench = Bench::restore(other, &state, 50);
    assert_eq!(bench.source.status().gap, Some(GapReason::VolumeChanged));
    assert_eq!(bench.source.status().dirty, ByteLen(SECTORS * 512));
}

#[test]
fn volumes_that_were_resized_or_added_are_copied_where_they_are_new() {
    let bench = Bench::synced(config());
    let (state, _) = bench.source.final_state();
    let dirty = |volumes: Vec<VolumeSpec>| {
        let config = SourceConfig { volumes, ..config() };
        Bench::restore(config, &state, 9).source.status().dirty.0 / 512
    };
    assert_eq!(dirty(vec![volume(0, SECTORS)]), 0);
    assert_eq!(dirty(vec![volume(0, SECTORS + 64)]), GRANULE_SECTORS, "from the granule that was only partly there");
    assert_eq!(dirty(vec![volume(0, SECTORS + 1000)]), 64 + 1000, "and all that follows");
    assert_eq!(dirty(vec![volume(0, SECTORS / 2)]), 0);
    assert_eq!(dirty(vec![volume(0, SECTORS), volume(1, 500)]), 500);
}

#[test]
fn a_damaged_state_is_refused_by_name() {
    let mut bench = Bench::synced(config());
    bench.write(0, 8).wait(600);
    let state = bench.source.final_state().0;
    let restore = |state: &[u8]| Source::restore(config(), state, Bench::now(0), &mut Vec::new()).map(|_| ());
    assert_eq!(restore(&state), Ok(()));
    for bit in 0..state.len() * 8 {
        let mut bad = state.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(restore(&bad), Err(StateError::Checksum { .. })), "bit {bit}");
    }
    assert_eq!(restore(&state[..3]), Err(StateError::Short(3)));
    let mut other = config();
    other.group = GroupId([9; 16]);
    let refused = Source::restore(other, &state, Bench::now(0), &mut Vec::new()).map(|_| ());
    assert!(matches!(refused, Err(StateError::OtherGroup { .. })));
    // With a right checksum around them, random bytes are refused or read, without a panic.
    for seed in 1..2000 {
        let mut rng = Rng::new(seed);
        let mut body = state[..state.len() - 4].to_vec();
        for _ in 0..1 + rng.below(4) {
            let at = rng.below(body.len() as u64) as usize;
            body[at] = rng.next() as u8;
        }
        let crc = wire::crc32(&body);
        body.extend_from_slice(&crc.to_le_bytes());
        let _ = restore(&body);
    }
}

#[test]
fn capture_holds_on_to_what_is_neither_durable_nor_stored() {
    let mut bench = Bench::synced(config());
    let released = |bench: &Bench| {
        bench
            .actions
            .iter()
            .rev()
            .find_map(|a| if let Action::ReleaseCapture { through } = a { Some(*through) } else { None })
    };
    bench.write(0, 8).write(8, 8);
    assert_eq!(released(&bench), None);
    let last = bench.next() - 1;
    bench.ack(last, last - 1);
    assert_eq!(released(&bench), Some(1), "durable");
    bench.wait(499);
    assert_eq!(bench.source.storing, None);
    bench.wait(1);
    assert_eq!(released(&bench), Some(1), "being stored is not stored");
    bench.persisted();
    assert_eq!(released(&bench), Some(2));
    // A write to a place that is stored already needs nothing more; one elsewhere does.
    bench.on(Event::Disconnected).write(9, 1);
    assert_eq!(released(&bench), Some(3));
    bench.write(9 * GRANULE_SECTORS, 1).write(9, 1);
    assert_eq!(released(&bench), Some(3));
    bench.on(Event::CaptureLost {
        id: 77,
        reason: GapReason::Overflow,
        what: Lost::Extents(vec![(VolumeId(0), Extent::new(0, 1)), (VolumeId(5), Extent::new(0, 1))]),
    });
    assert!(!bench.actions.contains(&Action::LossRecorded { id: 77 }));
    bench.persisted();
    assert_eq!(released(&bench), Some(5));
    assert!(bench.actions.contains(&Action::LossRecorded { id: 77 }));
}

#[test]
fn while_the_box_keeps_up_nothing_is_stored() {
    let mut bench = Bench::synced(config());
    for i in 0..2000 {
        bench.write(i % 4000, 1).wait(10).ack_all();
    }
    let stores = bench.actions.iter().filter(|a| matches!(a, Action::Persist { .. })).count();
    assert_eq!(stores, 0);
}

#[test]
fn in_sync_mode_a_flush_waits_for_everything_before_it() {
    let mut config = config();
    config.mode = sync(1000, Bound::Degrade);
    let mut bench = Bench::new(config);
    assert_eq!(bench.source.status().gate, GateState::NotYet);
    bench.on(Event::FlushWaiting { id: 1 });
    assert_eq!(bench.flushes(), [(1, false)], "before the first copy nothing waits");
    bench.ready(Resume::Restart, PLENTY).settle();
    assert_eq!(bench.source.status().gate, GateState::Sync);
    bench.on(Event::FlushWaiting { id: 2 });
    assert_eq!(bench.flushes(), [(2, true)], "nothing is under way");
    bench.take();
    bench.write(0, 8).write(8, 8).on(Event::FlushWaiting { id: 3 }).write(16, 8).on(Event::FlushWaiting { id: 4 });
    let last = bench.next() - 1;
    bench.ack(last, last - 2);
    assert!(bench.flushes().is_empty(), "written is not durable");
    bench.ack(last, last - 1);
    assert_eq!(bench.flushes(), [(3, true)]);
    bench.ack(last, last);
    assert_eq!(bench.flushes(), [(3, true), (4, true)]);
}

#[test]
fn at_the_bound_degrade_lets_the_host_go_on_and_returns_when_caught_up() {
    let mut config = config();
    config.mode = sync(1000, Bound::Degrade);
    let mut bench = Bench::synced(config);
    bench.write(0, 8).on(Event::FlushWaiting { id: 1 }).wait(999);
    assert!(bench.flushes().is_empty());
    bench.wait(1);
    assert_eq!(bench.flushes(), [(1, false)]);
    assert_eq!(bench.alarms(), [Alarm::Degraded { waited_ms: 1000 }]);
    assert!(matches!(bench.source.status().gate, GateState::Degraded { .. }));
    bench.on(Event::FlushWaiting { id: 2 });
    assert_eq!(bench.flushes(), [(1, false), (2, false)], "nobody waits while degraded");
    bench.ack_all();
    assert_eq!(bench.source.status().gate, GateState::Sync);
}

#[test]
fn at_the_bound_hold_holds_and_says_so() {
    let mut config = config();
    config.mode = sync(1000, Bound::Hold);
    let mut bench = Bench::synced(config.clone());
    bench.write(0, 8).on(Event::FlushWaiting { id: 1 }).on(Event::Disconnected);
    bench.take();
    for _ in 0..100 {
        bench.wait(1000);
    }
    assert!(bench.flushes().is_empty());
    assert_eq!(bench.alarms().len(), 2, "at the bound and once a minute: {:?}", bench.alarms());
    // In a gap it waits for the gap's end.
    bench.on(Event::SpoolFull).write(8, 8).on(Event::FlushWaiting { id: 2 });
    let next = bench.source.window.first().0;
    bench.go_on_at(next);
    let begin = bench.next() - 1;
    bench.ack(begin, begin);
    assert_eq!(bench.flushes(), [(1, true)]);
    let state = bench.state.clone();
    bench.settle();
    assert_eq!(bench.source.status().flushes_waiting, 0);
    // What was promised before a restart is promised after it.
    let mut bench = Bench::restore(config, &state, bench.ms);
    bench.on(Event::FlushWaiting { id: 3 });
    assert_eq!((bench.source.status().gate, bench.flushes()), (GateState::Sync, vec![]));
    bench.on(Event::Mode(SyncMode::Async));
    assert_eq!(bench.flushes(), [(3, false)]);
}

#[test]
fn numbers_taken_back_do_not_release_a_flush() {
    let mut config = config();
    config.mode = sync(60_000, Bound::Hold);
    let mut bench = Bench::synced(config);
    bench.on(Event::Disconnected).write(0, 8).write(300, 8).on(Event::FlushWaiting { id: 1 });
    let lost = bench.next() - 1;
    bench.on(Event::SpoolLost { from: SourceSeq(lost) });
    // The number now stands for the mark of the gap.
    assert_eq!(bench.marks(), [(lost, Mark::GapBegin { reason: GapReason::Overflow })]);
    let first = bench.source.window.first().0;
    bench.go_on_at(first).ack(lost, lost);
    assert!(bench.flushes().is_empty());
    let released: Vec<_> = bench.actions.iter().filter(|a| matches!(a, Action::ReleaseCapture { .. })).collect();
    assert_eq!(released, [&Action::ReleaseCapture { through: 1 }], "nor does capture let go of what was taken back");
    bench.settle();
    assert_eq!(bench.source.status().flushes_waiting, 0);
}

#[test]
fn payloads_lost_after_they_were_sent_matter_only_if_the_box_lacks_them() {
    let setup = || {
        let mut bench = Bench::synced(config());
        let first = bench.next();
        bench.write(0, 8).write(300, 8).write(600, 8);
        bench.on(Event::SpoolLost { from: SourceSeq(first + 1) });
        assert_eq!(bench.source.status().gap, None, "all were sent");
        (bench, first)
    };
    let (mut bench, _) = setup();
    bench.ack_all();
    assert_eq!(bench.source.status().window_records, 0);
    let (mut bench, first) = setup();
    bench.on(Event::Disconnected).go_on_at(first);
    assert_eq!(bench.marks(), [(first + 1, Mark::GapBegin { reason: GapReason::Overflow })]);
    bench.settle();
    let copied: u64 = bench.sent.iter().filter(|r| r.flags == WriteFlags::SYNC).map(|r| r.extent.sectors.0).sum();
    assert_eq!(copied, 2 * GRANULE_SECTORS, "the two that were lost");
}

#[test]
fn marks_keep_out_of_requests() {
    let mut bench = Bench::synced(config());
    let name: BookmarkName = "before upgrade".parse().unwrap();
    let bookmark = |id| Event::Bookmark { id, name: name.clone(), consistency: Consistency::Crash };
    bench.part(0, 256, WriteFlags::MORE).on(bookmark(1)).wait(2000);
    assert!(bench.marks().is_empty());
    bench.write(256, 8);
    let last = bench.next() - 1;
    assert_eq!(bench.marks(), [(last, Mark::Bookmark { name: name.clone(), consistency: Consistency::Crash })]);
    assert!(bench.actions.contains(&Action::BookmarkPlaced { id: 1, seq: SourceSeq(last) }));
    // The gap ends at a request's end too.
    bench.on(Event::Resync).on(bookmark(2));
    let why = BookmarkRefusal::InGap { reason: GapReason::Requested };
    assert!(bench.actions.contains(&Action::BookmarkRefused { id: 2, why }));
    bench.part(0, 256, WriteFlags::MORE);
    for _ in 0..50 {
        for (read, _) in bench.reads() {
            bench.on(Event::ReadDone { read, zeroes: Vec::new() });
        }
        bench.ack_all().wait(10);
    }
    assert!(bench.source.nothing_to_copy() && bench.source.gap.is_some());
    bench.write(256, 8);
    assert_eq!(bench.source.status().gap, None);
    bench.part(0, 256, WriteFlags::MORE);
    for id in 0..=BOOKMARKS_MAX as u64 {
        bench.on(bookmark(id));
    }
    let why = BookmarkRefusal::TooMany { max: BOOKMARKS_MAX };
    assert!(bench.actions.contains(&Action::BookmarkRefused { id: BOOKMARKS_MAX as u64, why }));
}

#[test]
fn watermarks_come_each_second_and_rarer_when_idle() {
    let mut bench = Bench::synced(config());
    let count = |bench: &Bench| bench.sent.iter().filter(|r| r.kind == RecordKind::Mark).count();
    for _ in 0..100 {
        bench.write(0, 1).wait(100).ack_all();
    }
    assert_eq!(count(&bench), 10);
    bench.sent.clear();
    for _ in 0..1000 {
        bench.wait(100).ack_all();
    }
    assert!((9..=11).contains(&count(&bench)), "{}", count(&bench));
    bench.sent.clear();
    // Nothing piles up while nothing flows.
    bench.on(Event::Pause);
    for _ in 0..1000 {
        bench.write(0, 1).wait(100).on(Event::Heard);
    }
    assert!(bench.marks().is_empty());
    bench.on(Event::Unpause).ack_all();
    bench.wait(1000);
    let Some((seq, Mark::Watermark { stream, seq: upto, .. })) = bench.marks().pop() else {
        panic!("a watermark is due")
    };
    assert_eq!((stream, upto.0), (STREAM, seq - 1));
}

#[test]
fn lag_is_the_age_of_the_oldest_write_that_is_not_durable() {
    let mut bench = Bench::synced(config());
    bench.write(0, 1).wait(300);
    bench.write(0, 1).wait(200);
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 500 });
    let first = bench.source.window.first().0;
    bench.ack(first + 1, first);
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 200 });
    bench.ack_all();
    assert_eq!(bench.source.status().lag, Lag::Known { ms: 0 });
    let heard = Bench::now(bench.ms).mono;
    bench.wait(500).on(Event::Disconnected).wait(5000);
    assert_eq!(bench.source.status().lag, Lag::Unknown { since: heard });
}

#[test]
fn a_silent_box_is_given_up_and_an_idle_source_shows_life() {
    let mut bench = Bench::synced(config());
    bench.wait(1000);
    assert!(bench.actions.iter().any(|a| matches!(a, Action::Message(Message::Heartbeat { .. }))));
    bench.on(Event::Heard).wait(14_999);
    assert_eq!(bench.source.status().state, GroupAgentState::Replicating);
    bench.wait(1);
    assert!(bench.actions.contains(&Action::Disconnect(DisconnectReason::Silent { ms: 15_000 })));
    assert_eq!(bench.source.status().state, GroupAgentState::Disconnected);
}

#[test]
fn a_box_that_talks_nonsense_is_given_up() {
    let mut bench = Bench::synced(config());
    let (sent, acked) = (bench.source.sent, bench.source.sent.next());
    bench.ack(acked.0, 0);
    assert!(bench.actions.contains(&Action::Disconnect(DisconnectReason::AckedUnsent { acked, sent })));
    let next = SourceSeq(u64::MAX);
    bench.ready(Resume::Continue { next }, PLENTY);
    assert!(bench.actions.contains(&Action::Disconnect(DisconnectReason::BadResume { next })));
    assert_eq!(bench.source.status().gap, None, "and it changed nothing");
}

#[test]
fn writes_that_cannot_be_records_are_copied_instead() {
    let bench = || {
        let mut bench = Bench::synced(config());
        bench.take();
        bench
    };
    let mut big = bench();
    big.write(0, 257);
    assert!(matches!(big.alarms()[..], [Alarm::NotSplit { .. }]));
    assert_eq!(big.source.status().gap, Some(GapReason::Overflow));
    big.settle();
    let mut outside = bench();
    outside.write(SECTORS - 4, 8);
    assert!(matches!(outside.alarms()[..], [Alarm::OutsideVolume { .. }]));
    assert_eq!(outside.source.status().gap, Some(GapReason::VolumeChanged));
    let mut unknown = bench();
    let extent = Extent::new(0, 1);
    let captured = Captured {
        capture: 9,
        kind: CapturedKind::Write,
        flags: WriteFlags::NONE,
        volume: VolumeId(9),
        extent,
        mono: MonoTime(0),
        wall_us: 0,
    };
    unknown.on(Event::Captured(captured));
    assert_eq!(unknown.alarms(), [Alarm::UnknownVolume { volume: VolumeId(9) }]);
    assert!(unknown.actions.contains(&Action::ReleaseCapture { through: 9 }), "the ring is not held up by it");
    // Only the copy calls a record copied.
    let mut flagged = bench();
    flagged.part(0, 1, WriteFlags::SYNC | WriteFlags::FUA);
    assert_eq!(flagged.sent[0].flags, WriteFlags::FUA);
}

#[test]
fn the_copy_yields_to_pressure_rate_and_pause() {
    let mut bench = Bench::new(config());
    bench.on(Event::Pressure(Pressure::SpillOnly)).ready(Resume::Restart, PLENTY);
    assert!(bench.reads().is_empty());
    bench.on(Event::Pressure(Pressure::Delay { ms: 50 }));
    assert_eq!(bench.reads().len(), 1, "one, then a pause");
    bench.wait(49);
    assert_eq!(bench.reads().len(), 1);
    bench.wait(1);
    assert_eq!(bench.reads().len(), 2);
    let done = |bench: &mut Bench| {
        for (read, _) in bench.reads() {
            bench.on(Event::ReadDone { read, zeroes: Vec::new() });
        }
        bench.take();
    };
    bench.on(Event::Pause);
    done(&mut bench);
    bench.wait(10_000);
    assert!(bench.reads().is_empty());
    // 256 KiB a read at 1 MiB a second: four reads each second.
    bench.on(Event::Pressure(Pressure::None)).on(Event::CopyRate(Some(1 << 20))).on(Event::Unpause).ack_all();
    let mut reads = 0;
    for _ in 0..20 {
        bench.wait(100);
        reads += bench.reads().len();
        done(&mut bench);
        bench.ack_all();
    }
    assert!((7..=9).contains(&reads), "{reads} reads in two seconds");
    bench.on(Event::CopyRate(None)).settle();
    bench.on(Event::Pressure(Pressure::DirtyMapOnly));
    assert_eq!(bench.source.status().gap, Some(GapReason::Overflow));
}

#[test]
fn a_read_that_fails_is_tried_again_and_said() {
    let mut bench = Bench::new(config());
    bench.ready(Resume::Restart, PLENTY);
    let (read, extent) = bench.reads()[0];
    bench.take();
    bench.on(Event::ReadFailed { read });
    assert_eq!(bench.alarms(), [Alarm::ReadFailed { volume: VolumeId(0), extent }]);
    assert!(bench.reads().is_empty());
    bench.wait(5000);
    assert!(!bench.reads().is_empty());
    // Events of reads that are not known do nothing.
    bench
        .on(Event::ReadFailed { read })
        .on(Event::ReadDone { read: ReadId(999), zeroes: vec![Extent::new(0, u64::MAX)] });
}

#[test]
fn random_events_never_panic_and_keep_the_rules() {
    for seed in 1..400 {
        let mut rng = Rng::new(seed);
        let mut config = config();
        config.spool_bytes_max = 200_000 + rng.below(2 << 20);
        config.spool_records_max = 5 + rng.below(300) as usize;
        config.mode = [SyncMode::Async, sync(rng.below(500), Bound::Hold), sync(rng.below(500), Bound::Degrade)]
            [rng.below(3) as usize];
        let mut bench = Bench::new(config.clone());
        for step in 0..600 {
            let any = |rng: &mut Rng| match rng.below(10) {
                0 => rng.next(),
                1 => u64::MAX,
                2 => 0,
                _ => rng.below(800),
            };
            let extent = Extent::new(rng.below(SECTORS + 50), rng.below(300));
            match rng.below(22) {
                0..=6 => {
                    let kinds = [CapturedKind::Write, CapturedKind::Zero, CapturedKind::Discard, CapturedKind::Flush];
                    let flags = if rng.one_in(5) { WriteFlags::MORE } else { WriteFlags::NONE };
                    bench.capture(kinds[rng.below(4) as usize], extent, flags);
                }
                7 => {
                    let what = if rng.one_in(5) {
                        Lost::Everything
                    } else {
                        Lost::Extents(vec![(VolumeId(any(&mut rng) as u32), extent)])
                    };
                    bench.on(Event::CaptureLost { id: step, reason: GapReason::Overflow, what });
                }
                8 => {
                    let resume = match rng.below(4) {
                        0 => Resume::Restart,
                        1 => Resume::Continue { next: SourceSeq(any(&mut rng)) },
                        _ => Resume::Continue { next: bench.source.window.next() },
                    };
                    // The box's word may make the source give numbers out again.
                    bench.credit = Credit { bytes: any(&mut rng).saturating_mul(1000), records: any(&mut rng) };
                    if bench.credit.bytes > 1 << 50 {
                        bench.credit.bytes = 1 << 50;
                    }
                    bench.spent = Credit::default();
                    let credit = bench.credit;
                    if resume != (Resume::Continue { next: bench.source.window.next() }) {
                        bench.spool.clear();
                    }
                    let spool_gone = bench.spool.is_empty();
                    bench.on(Event::Connected);
                    let mut actions = Vec::new();
                    bench.source.on(Event::Ready { resume, credit }, Bench::now(bench.ms), &mut actions);
                    if spool_gone {
                        // Rebuilt without payload: only the numbers matter here.
                        for seq in bench.source.window.first().0..bench.source.window.next().0 {
                            let Some(entry) = bench.source.window.get(SourceSeq(seq)) else { continue };
                            let record = Numbered {
                                seq: SourceSeq(seq),
                                kind: entry.kind,
                                flags: WriteFlags::NONE,
                                volume: entry.volume,
                                extent: entry.extent(),
                                mono: entry.mono,
                                wall_us: 0,
                            };
                            bench.spool.insert(seq, (record, Payload::None));
                        }
                        bench.spent = bench.source.spent;
                        bench.actions.extend(actions.into_iter().filter(|a| !matches!(a, Action::Keep { .. })));
                    } else {
                        bench.note(actions);
                    }
                }
                9 => drop(bench.ack(any(&mut rng), any(&mut rng))),
                10..=12 => {
                    let sent = bench.source.sent.0;
                    bench.ack(sent, sent.saturating_sub(rng.below(3)));
                }
                13 => drop(bench.on(Event::Disconnected)),
                14 => drop(bench.on(Event::FlushWaiting { id: step })),
                15 => drop(bench.on(Event::Pressure(
                    [Pressure::None, Pressure::SpillOnly, Pressure::DirtyMapOnly][rng.below(3) as usize],
                ))),
                16 => {
                    let from = SourceSeq(any(&mut rng));
                    bench.on(Event::SpoolLost { from });
                }
                17 => {
                    let reads = bench.reads();
                    bench.actions.retain(|action| !matches!(action, Action::ReadVolume { .. }));
                    for (read, _) in reads {
                        bench.on(Event::ReadDone { read, zeroes: vec![extent] });
                    }
                }
                18 => drop(bench.persisted()),
                19 => drop(bench.on(Event::Persisted { serial: any(&mut rng) })),
                20 => drop(bench.on(Event::Drained { barrier: any(&mut rng) })),
                _ => drop(bench.wait(rng.below(700))),
            }
            let status = bench.source.status();
            let marks = 64 * 300;
            assert!(status.window_bytes.0 <= config.spool_bytes_max + marks, "seed {seed}: {status:?}");
            // A sector that is written in a gap while it is being read counts twice until the read is back.
            assert!(
                status.dirty.0 <= SECTORS * 512 + bench.source.copying.reads.len() as u64 * (4 << 16),
                "seed {seed}"
            );
            if matches!(status.gate, GateState::Async | GateState::NotYet | GateState::Degraded { .. }) {
                assert_eq!(status.flushes_waiting, 0, "seed {seed}");
            }
        }
        let (state, _) = bench.source.final_state();
        Bench::restore(config, &state, bench.ms);
    }
}
