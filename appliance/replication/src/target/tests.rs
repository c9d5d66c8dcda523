//! The target machine: what it takes, what it refuses, and what it says in return.

use super::*;
use crate::rng::Rng;
use model::{BookmarkName, Consistency, Extent, GroupPolicy, GroupSpec, Sectors};
use wire::{Packer, crc32, encode_mark};

const STREAM: StreamId = StreamId([7; 16]);
const BOX: HistoryTime = HistoryTime(1_000_000_000);

fn volumes() -> Vec<VolumeSpec> {
    let volume = |id, sectors| VolumeSpec {
        id: VolumeId(id),
        name: format!("v{id}"),
        sectors: Sectors(sectors),
        identity: String::new(),
    };
    vec![volume(0, 1000), volume(4, 64)]
}

struct Bench {
    target: Target,
    ms: u64,
    seq: u64,
    lsn: u64,
}

impl Bench {
    fn open(resume: Resume, in_gap: Option<GapReason>, window: Credit) -> Self {
        let mut config = TargetConfig::new(GroupId([1; 16]), STREAM, volumes(), resume);
        config.in_gap = in_gap;
        config.window = window;
        let spec = GroupSpec {
            id: GroupId([1; 16]),
            name: "g".into(),
            host: None,
            volumes: volumes(),
            policy: GroupPolicy::default(),
        };
        let (target, ready) = Target::open(config, spec, MonoTime(0), BOX, MonoTime(0));
        assert!(matches!(ready, Message::StreamReady { .. }));
        Self { seq: target.expected().0, target, ms: 0, lsn: 0 }
    }
    fn consistent() -> Self {
        Self::open(Resume::Continue { next: SourceSeq(10) }, None, Credit { bytes: 1 << 30, records: 1 << 20 })
    }
    fn on(&mut self, event: TargetEvent<'_>) -> Vec<TargetAction> {
        let mut out = Vec::new();
        self.target.on(event, MonoTime::from_ms(self.ms), HistoryTime(BOX.0 + self.ms * 1000), &mut out);
        out
    }
    fn header(&self, kind: RecordKind, extent: Extent, payload: &[u8]) -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Record(kind),
            codec: Codec::Raw,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent,
            seq: SourceSeq(self.seq),
            mono: MonoTime::from_ms(self.ms),
            wall_us: 0,
            payload_len: payload.len() as u32,
            payload_crc: crc32(payload),
        }
    }
    fn frame(&mut self, header: FrameHeader, payload: &[u8]) -> Vec<TargetAction> {
        let actions = self.on(TargetEvent::Frame { header: &header, payload });
        if actions.iter().any(|a| matches!(a, TargetAction::Append { .. } | TargetAction::AppendMark { .. })) {
            self.lsn += 1;
            let appended = TargetEvent::Appended { seq: SourceSeq(self.seq), lsn: Lsn(self.lsn) };
            assert!(self.on(appended).is_empty());
            self.seq += 1;
        }
        actions
    }
    fn write(&mut self, flags: WriteFlags) -> Vec<TargetAction> {
        let header = FrameHeader { flags, ..self.header(RecordKind::Write, Extent::new(0, 1), &[1; 512]) };
        self.frame(header, &[1; 512])
    }
    fn mark(&mut self, mark: &Mark) -> Vec<TargetAction> {
        let payload = encode_mark(mark).unwrap();
        let header = self.header(RecordKind::Mark, Extent::default(), &payload);
        self.frame(header, &payload)
    }
    fn progress(&mut self, written: u64, durable: u64) -> Vec<TargetAction> {
        self.on(TargetEvent::Progress { written: Lsn(written), durable: Lsn(durable) })
    }
}

fn code(actions: &[TargetAction]) -> Option<RefuseCode> {
    actions.iter().find_map(|action| if let TargetAction::Refuse(refusal) = action { Some(refusal.code) } else { None })
}

fn ack(actions: &[TargetAction]) -> Option<Ack> {
    actions.iter().find_map(|action| if let TargetAction::SendAck(ack) = action { Some(*ack) } else { None })
}

const BEGIN: Mark = Mark::StreamBegin { stream: STREAM };
const GAP: Mark = Mark::GapBegin { reason: GapReason::InitialSync };

#[test]
fn a_stream_goes_on_only_in_the_journal_that_has_it() {
    let open = OpenFacts { stream: STREAM, first_seq: SourceSeq(1), next_seq: None, acked_durable: Some(SourceSeq(9)) };
    assert_eq!(resume(None, &open), Resume::Restart);
    assert_eq!(resume(Some((StreamId([8; 16]), SourceSeq(5))), &open), Resume::Restart);
    assert_eq!(resume(Some((STREAM, SourceSeq(5))), &open), Resume::Continue { next: SourceSeq(6) });
}

#[test]
fn a_new_stream_must_begin_begin_a_gap_and_end_it() {
    let mut bench =
        Bench::open(Resume::Restart, Some(GapReason::InitialSync), Credit { bytes: 1 << 30, records: 1000 });
    assert_eq!(code(&bench.mark(&BEGIN)), None);
    assert_eq!(code(&bench.mark(&GAP)), None);
    assert_eq!(code(&bench.write(WriteFlags::SYNC)), None);
    assert_eq!(code(&bench.write(WriteFlags::NONE)), None);
    assert_eq!(code(&bench.mark(&Mark::Consistent)), None);
    assert_eq!(bench.target.state(), TargetState::Consistent);
    assert_eq!(code(&bench.write(WriteFlags::NONE)), None);
    assert_eq!(bench.target.expected(), SourceSeq(7));
}

#[test]
fn what_does_not_belong_is_refused_by_name_and_ends_it() {
    let bookmark = || Mark::Bookmark { name: "b".parse::<BookmarkName>().unwrap(), consistency: Consistency::Crash };
    let watermark = |seq| Mark::Watermark { stream: STREAM, seq: SourceSeq(seq), source_wall_us: 0 };
    let restart = || Bench::open(Resume::Restart, None, Credit { bytes: 1 << 30, records: 1000 });
    let in_gap = || {
        Bench::open(
            Resume::Continue { next: SourceSeq(10) },
            Some(GapReason::Overflow),
            Credit { bytes: 1 << 30, records: 1000 },
        )
    };
    type Case = Box<dyn Fn() -> (Bench, Vec<TargetAction>)>;
    fn case(start: impl Fn() -> Bench + 'static, act: impl Fn(&mut Bench) -> Vec<TargetAction> + 'static) -> Case {
        Box::new(move || {
            let mut bench = start();
            let actions = act(&mut bench);
            (bench, actions)
        })
    }
    let write = |change: fn(&mut FrameHeader)| {
        move |bench: &mut Bench| {
            let mut header = bench.header(RecordKind::Write, Extent::new(0, 1), &[1; 512]);
            change(&mut header);
            bench.frame(header, &[1; 512])
        }
    };
    let cases: Vec<(RefuseCode, Case)> = vec![
        (RefuseCode::OutOfPlace, case(restart, |b| b.write(WriteFlags::NONE))),
        (RefuseCode::OutOfPlace, case(restart, |b| b.mark(&GAP))),
        (RefuseCode::OutOfPlace, case(restart, |b| b.mark(&Mark::StreamBegin { stream: StreamId([0; 16]) }))),
        (
            RefuseCode::OutOfPlace,
            case(restart, |b| {
                b.mark(&BEGIN);
                b.mark(&Mark::Consistent)
            }),
        ),
        (
            RefuseCode::OutOfPlace,
            case(restart, |b| {
                b.mark(&BEGIN);
                b.write(WriteFlags::SYNC)
            }),
        ),
        (RefuseCode::OutOfPlace, case(Bench::consistent, |b| b.mark(&BEGIN))),
        (RefuseCode::OutOfPlace, case(Bench::consistent, |b| b.mark(&Mark::Consistent))),
        (RefuseCode::OutOfPlace, case(Bench::consistent, |b| b.write(WriteFlags::SYNC))),
        (
            RefuseCode::OutOfPlace,
            case(Bench::consistent, move |b| {
                b.write(WriteFlags::MORE);
                b.mark(&bookmark())
            }),
        ),
        (
            RefuseCode::OutOfPlace,
            case(Bench::consistent, move |b| {
                b.write(WriteFlags::MORE);
                b.mark(&watermark(1))
            }),
        ),
        (RefuseCode::OutOfPlace, case(Bench::consistent, move |b| b.mark(&watermark(10)))),
        (
            RefuseCode::OutOfPlace,
            case(Bench::consistent, |b| {
                b.mark(&Mark::Watermark { stream: StreamId([0; 16]), seq: SourceSeq(1), source_wall_us: 0 })
            }),
        ),
        (RefuseCode::OutOfPlace, case(in_gap, move |b| b.mark(&bookmark()))),
        (RefuseCode::OutOfPlace, case(in_gap, move |b| b.mark(&watermark(1)))),
        (
            RefuseCode::OutOfPlace,
            case(in_gap, |b| {
                let h = b.header(RecordKind::Flush, Extent::default(), &[]);
                b.frame(FrameHeader { flags: WriteFlags::SYNC, ..h }, &[])
            }),
        ),
        (
            RefuseCode::OutOfPlace,
            case(Bench::consistent, |b| {
                let h = b.header(RecordKind::Write, Extent::new(0, 1), &[]);
                b.frame(FrameHeader { kind: FrameKind::Ack, ..h }, &[])
            }),
        ),
        (RefuseCode::OutOfPlace, case(Bench::consistent, |b| b.on(TargetEvent::Message(&Message::ListGroups)))),
        (
            RefuseCode::OutOfPlace,
            case(Bench::consistent, |b| {
                let p = encode_mark(&GAP).unwrap();
                let h = b.header(RecordKind::Mark, Extent::default(), &p);
                b.frame(FrameHeader { flags: WriteFlags::MORE, ..h }, &p)
            }),
        ),
        (RefuseCode::Sequence, case(Bench::consistent, write(|h| h.seq = SourceSeq(11)))),
        (RefuseCode::Sequence, case(Bench::consistent, write(|h| h.seq = SourceSeq(9)))),
        (RefuseCode::UnknownVolume, case(Bench::consistent, write(|h| h.volume = VolumeId(1)))),
        (RefuseCode::BadExtent, case(Bench::consistent, write(|h| h.extent = Extent::new(1000, 1)))),
        (
            RefuseCode::BadExtent,
            case(
                Bench::consistent,
                write(|h| {
                    h.volume = VolumeId(4);
                    h.extent = Extent::new(64, 1)
                }),
            ),
        ),
        (RefuseCode::BadFrame, case(Bench::consistent, write(|h| h.payload_len = 511))),
        (RefuseCode::BadFrame, case(Bench::consistent, write(|h| h.codec = Codec::Zstd))),
        (
            RefuseCode::BadFrame,
            case(Bench::consistent, |b| {
                let h = b.header(RecordKind::Mark, Extent::default(), &[99]);
                b.frame(h, &[99])
            }),
        ),
        (
            RefuseCode::Internal,
            case(Bench::consistent, |b| b.on(TargetEvent::Appended { seq: SourceSeq(10), lsn: Lsn(1) })),
        ),
    ];
    for (number, (want, case)) in cases.into_iter().enumerate() {
        let (mut bench, actions) = case();
        assert_eq!(code(&actions), Some(want), "case {number}: {actions:?}");
        assert!(
            !actions.iter().any(|a| matches!(a, TargetAction::Append { .. } | TargetAction::AppendMark { .. })),
            "case {number}"
        );
        assert_eq!(bench.target.state(), TargetState::Refused);
        assert!(bench.write(WriteFlags::NONE).is_empty(), "case {number}: nothing after a refusal");
    }
}

#[test]
fn a_packed_payload_must_say_what_it_unpacks_to() {
    let mut packer = Packer::new().unwrap();
    let (codec, stored) = packer.pack(&[0; 1024]);
    let stored = stored.to_vec();
    let mut bench = Bench::consistent();
    let header = FrameHeader { codec, ..bench.header(RecordKind::Write, Extent::new(0, 2), &stored) };
    assert_eq!(code(&bench.frame(header, &stored)), None);
    let header = FrameHeader { codec, ..bench.header(RecordKind::Write, Extent::new(0, 3), &stored) };
    assert_eq!(code(&bench.frame(header, &stored)), Some(RefuseCode::BadFrame));
}

#[test]
fn acks_say_what_the_journal_said_and_give_back_what_it_wrote() {
    let window = Credit { bytes: 1 << 20, records: 8 };
    let mut bench = Bench::open(Resume::Continue { next: SourceSeq(10) }, None, window);
    for _ in 0..8 {
        assert_eq!(code(&bench.write(WriteFlags::NONE)), None);
    }
    let first = ack(&bench.progress(3, 1)).unwrap();
    assert_eq!((first.written, first.durable), (SourceSeq(12), SourceSeq(10)));
    assert_eq!(first.credit, Credit { bytes: (1 << 20) + 3 * 576, records: 11 });
    assert_eq!(ack(&bench.progress(3, 1)), None, "nothing new, nothing said");
    // Durable runs ahead of what was told as written: both count.
    let second = ack(&bench.progress(3, 5)).unwrap();
    assert_eq!((second.written, second.durable), (SourceSeq(14), SourceSeq(14)));
    bench.ms += 1000;
    assert_eq!(ack(&bench.on(TargetEvent::Tick)), Some(second), "and once a second all the same");
}

#[test]
fn what_an_earlier_connection_brought_is_acknowledged_when_it_is_durable() {
    let mut config = TargetConfig::new(GroupId([1; 16]), STREAM, volumes(), Resume::Continue { next: SourceSeq(10) });
    config.had = Some(Had { durable: SourceSeq(6), appended_lsn: Lsn(40) });
    let spec = GroupSpec {
        id: GroupId([1; 16]),
        name: "g".into(),
        host: None,
        volumes: volumes(),
        policy: GroupPolicy::default(),
    };
    let (target, _) = Target::open(config, spec, MonoTime(0), BOX, MonoTime(0));
    let mut bench = Bench { target, ms: 0, seq: 10, lsn: 40 };
    let early = ack(&bench.progress(39, 39)).unwrap();
    assert_eq!((early.written, early.durable), (SourceSeq(6), SourceSeq(6)));
    assert_eq!(ack(&bench.progress(40, 40)).map(|ack| ack.durable), Some(SourceSeq(9)));
}

#[test]
fn more_than_granted_is_refused() {
    let mut bench = Bench::open(Resume::Continue { next: SourceSeq(1) }, None, Credit { bytes: 0, records: 0 });
    // One record always fits, whatever the configuration says.
    assert_eq!(code(&bench.write(WriteFlags::NONE)), None);
    assert_eq!(code(&bench.write(WriteFlags::NONE)), None);
    assert_eq!(code(&bench.write(WriteFlags::NONE)), Some(RefuseCode::CreditOverrun));
}

#[test]
fn a_full_journal_is_said_and_its_silence_forgiven() {
    let mut bench = Bench::consistent();
    let full = ack(&bench.on(TargetEvent::Room(false))).unwrap();
    assert!(full.flags.contains(AckFlags::JOURNAL_FULL));
    assert!(bench.on(TargetEvent::Room(false)).is_empty());
    bench.ms += 60_000;
    assert_eq!(code(&bench.on(TargetEvent::Tick)), None, "nothing is read, so nothing can be heard");
    assert!(!ack(&bench.on(TargetEvent::Room(true))).unwrap().flags.contains(AckFlags::JOURNAL_FULL));
    bench.ms += 29_999;
    assert_eq!(code(&bench.on(TargetEvent::Tick)), None);
    bench.ms += 1;
    assert_eq!(code(&bench.on(TargetEvent::Tick)), Some(RefuseCode::Silent));
}

#[test]
fn a_watermark_proves_its_time_when_it_is_durable() {
    let mut bench = Bench::consistent();
    bench.ms = 5000;
    bench.write(WriteFlags::NONE);
    bench.mark(&Mark::Watermark { stream: STREAM, seq: SourceSeq(10), source_wall_us: 77 });
    assert!(!bench.progress(1, 0).iter().any(|a| matches!(a, TargetAction::Proven { .. })));
    let until = HistoryTime(BOX.0 + 5_000_000);
    let proven = TargetAction::Proven { until, source_wall_us: 77, seq: SourceSeq(10) };
    assert!(bench.progress(2, 1).contains(&proven));
    for i in 0..3 * PROOFS_MAX as u64 {
        let seq = SourceSeq(bench.seq - 1);
        bench.mark(&Mark::Watermark { stream: STREAM, seq, source_wall_us: i });
    }
    assert_eq!(bench.target.proofs.len(), PROOFS_MAX);
}

#[test]
fn heartbeats_are_answered() {
    let mut bench = Bench::consistent();
    let actions = bench.on(TargetEvent::Message(&Message::Heartbeat { number: 5, mono_ns: u64::MAX }));
    assert_eq!(actions, [TargetAction::Send(Message::HeartbeatAck { number: 5 })]);
}

#[test]
fn random_frames_never_panic_and_appends_stay_in_order() {
    for seed in 1..600 {
        let mut rng = Rng::new(seed);
        let resume =
            if rng.one_in(2) { Resume::Restart } else { Resume::Continue { next: SourceSeq(1 + rng.below(5)) } };
        let in_gap = if rng.one_in(2) { Some(GapReason::Overflow) } else { None };
        let mut bench = Bench::open(resume, in_gap, Credit { bytes: 1 << 20, records: 100 });
        let mut last_time = HistoryTime(0);
        for _ in 0..200 {
            bench.ms += rng.below(100);
            let marks = [
                BEGIN,
                GAP,
                Mark::Consistent,
                Mark::Watermark { stream: STREAM, seq: SourceSeq(rng.below(3)), source_wall_us: 0 },
            ];
            let (kind, payload) = match rng.below(6) {
                0..=1 => (RecordKind::Mark, encode_mark(&marks[rng.below(4) as usize]).unwrap()),
                2 => (RecordKind::Zero, vec![]),
                3 => (RecordKind::Flush, vec![]),
                _ => (RecordKind::Write, vec![0; 512]),
            };
            let extent = match kind {
                RecordKind::Write | RecordKind::Zero => Extent::new(rng.below(1000), 1),
                _ => Extent::default(),
            };
            let mut header = bench.header(kind, extent, &payload);
            if bench.target.state() == TargetState::Consistent || rng.one_in(4) {
                header.flags = WriteFlags([0, 0, 0, 4, 8][rng.below(5) as usize]);
            }
            if rng.one_in(60) {
                header.seq = SourceSeq(rng.next());
            }
            header.mono = if rng.one_in(10) { MonoTime(rng.next()) } else { header.mono };
            let expected = bench.target.expected();
            for action in bench.frame(header, &payload) {
                let (TargetAction::Append { time } | TargetAction::AppendMark { time, .. }) = action else { continue };
                assert_eq!(header.seq, expected, "seed {seed}");
                assert!(time >= last_time && time.0 <= BOX.0 + bench.ms * 1000, "seed {seed}");
                last_time = time;
            }
            if rng.one_in(5) {
                let lsn = bench.lsn;
                for action in bench.progress(lsn, rng.below(lsn + 1)) {
                    let TargetAction::SendAck(ack) = action else { continue };
                    assert!(ack.durable <= ack.written && ack.written < bench.target.expected(), "seed {seed}");
                }
            }
        }
    }
}

#[test]
fn comparisons_are_checked_bounded_and_answered() {
    let mut bench = Bench::consistent();
    let ask = |id, volume, sectors: u64| Comparison {
        id,
        volume: VolumeId(volume),
        block_sectors: 8,
        runs: vec![Extent::new(0, sectors)],
        hashes: vec![wire::BlockHash([0; 16]); sectors.div_ceil(8) as usize],
    };
    let say = |bench: &mut Bench, ask: Comparison| bench.on(TargetEvent::Message(&Message::Compare(ask)));
    assert_eq!(say(&mut bench, ask(5, 4, 64)), [TargetAction::Compare(ask(5, 4, 64))]);
    let answer = Message::Compared { id: 5, differ: vec![3] };
    assert_eq!(bench.on(TargetEvent::Compared { id: 5, differ: vec![3] }), [TargetAction::Send(answer)]);
    for id in 0..COMPARISONS_MAX as u64 {
        assert_eq!(code(&say(&mut bench, ask(id, 0, 100))), None, "{id}");
    }
    assert_eq!(code(&say(&mut bench, ask(99, 0, 100))), Some(RefuseCode::CreditOverrun));
    for (bad, why) in [(ask(1, 9, 8), RefuseCode::UnknownVolume), (ask(1, 4, 65), RefuseCode::BadExtent)] {
        assert_eq!(code(&say(&mut Bench::consistent(), bad)), Some(why));
    }
}
