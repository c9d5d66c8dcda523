//! Writes the small journal that `tests/fixtures.rs` must be able to open for ever: `make_fixture DIR`.
//!
//! Run once for each format version, when it is new; a fixture that is in the tree is never written again.

use durable::{Disk, OsDisk};
use journal::{AppendError, IndexChoice, Journal, JournalOptions, NewRecord};
use model::{
    BookmarkName, ByteLen, Codec, Consistency, Extent, GapReason, GroupId, GroupPolicy, GroupSpec, HistoryTime, Mark,
    RecordKind, Sectors, SourceSeq, StreamId, Term, TimelineId, VolumeId, VolumeSpec, WriteFlags,
};
use std::{fmt::Write, path::Path, sync::Arc};

const VOLUMES: [u64; 2] = [64, 96];
const HOUR_US: u64 = 3_600_000_000;

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn append(journal: &mut Journal, record: &NewRecord<'_>) {
    loop {
        match journal.append(record) {
            Ok(_) => return,
            Err(AppendError::Busy { .. }) => drop(journal.poll(true).expect("polls")),
            Err(e) => panic!("append: {e}"),
        }
    }
}

fn mark(journal: &mut Journal, mark: &Mark, time: u64) {
    journal.append_mark(mark, HistoryTime(time), StreamId::default(), SourceSeq(0)).expect("appends");
}

fn records(journal: &mut Journal, state: &mut u64, from: u64, count: u64) {
    for seq in from..from + count {
        let volume = next(state) % 2;
        let size = VOLUMES[volume as usize];
        let lba = next(state) % size;
        let sectors = 1 + next(state) % (size - lba).min(16);
        let (kind, codec, payload) = match next(state) % 8 {
            0 => (RecordKind::Zero, Codec::Raw, Vec::new()),
            1 => (RecordKind::Discard, Codec::Raw, Vec::new()),
            2 => (RecordKind::Flush, Codec::Raw, Vec::new()),
            n => {
                let byte = next(state) as u8;
                let data: Vec<u8> = (0..sectors * 512).map(|i| byte.wrapping_add((i / 7) as u8)).collect();
                match n {
                    3 => (RecordKind::Write, Codec::Zstd, zstd::bulk::compress(&data, 1).expect("compresses")),
                    _ => (RecordKind::Write, Codec::Raw, data),
                }
            }
        };
        let extent = if kind == RecordKind::Flush { Extent::default() } else { Extent::new(lba, sectors) };
        let flags = match next(state) % 6 {
            0 => WriteFlags::FUA,
            1 => WriteFlags::MORE,
            2 => WriteFlags::SYNC,
            _ => WriteFlags::NONE,
        };
        let record = NewRecord {
            kind,
            flags,
            volume: VolumeId(volume as u32 + 1),
            extent,
            codec,
            payload_crc: None,
            payload: &payload,
            time: HistoryTime(seq * HOUR_US / 30),
            source_wall_us: seq,
            stream: StreamId([4; 16]),
            seq: SourceSeq(seq),
        };
        append(journal, &record);
    }
}

fn jobs(journal: &mut Journal, now: u64) {
    while let Some(job) = journal.next_job(HistoryTime(now)) {
        journal.job_done(job.run()).expect("the job succeeds");
    }
}

fn main() {
    let dir = std::env::args().nth(1).expect("make_fixture DIR");
    std::fs::create_dir_all(&dir).expect("makes the folder");
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(&dir).expect("opens the folder"));
    let volume = |i: usize| VolumeSpec {
        id: VolumeId(i as u32 + 1),
        name: format!("/dev/sd{}", ["b", "c"][i]),
        sectors: Sectors(VOLUMES[i]),
        identity: format!("serial-{i}"),
    };
    let spec = GroupSpec {
        id: GroupId([0xf1; 16]),
        name: "fixture".into(),
        host: None,
        volumes: vec![volume(0), volume(1)],
        policy: GroupPolicy { window_hours: 4, window_hours_floor: 1, ..GroupPolicy::default() },
    };
    let options = JournalOptions {
        segment_bytes: ByteLen(160 * 1024),
        batch_bytes: 8192,
        prepared_ahead: 1,
        segments_per_generation: 8,
        index: IndexChoice::None,
        ..JournalOptions::default()
    };
    let mut journal =
        Journal::create(disk, Path::new("journal"), &spec, Term(3), options, HistoryTime(0)).expect("creates");
    let mut state = 0x1234_5678_9abc_def0;
    mark(&mut journal, &Mark::StreamBegin { stream: StreamId([4; 16]) }, 1);
    mark(&mut journal, &Mark::Consistent, 2);
    records(&mut journal, &mut state, 1, 150);
    journal.drain().expect("durable");
    jobs(&mut journal, 150 * HOUR_US / 30);
    let name = |text: &str| text.parse::<BookmarkName>().expect("a name");
    mark(&mut journal, &Mark::Bookmark { name: name("before 升级"), consistency: Consistency::Application }, 0);
    mark(&mut journal, &Mark::Bookmark { name: name("gone"), consistency: Consistency::Crash }, 0);
    mark(&mut journal, &Mark::GapBegin { reason: GapReason::Overflow }, 0);
    records(&mut journal, &mut state, 151, 20);
    mark(&mut journal, &Mark::Consistent, 0);
    mark(&mut journal, &Mark::Watermark { stream: StreamId([4; 16]), seq: SourceSeq(170), source_wall_us: 5 }, 0);
    records(&mut journal, &mut state, 171, 60);
    journal.drain().expect("durable");
    journal.release_bookmark(&name("gone")).expect("releases");
    let at = journal.progress().durable;
    let branch = journal.branch(model::Lsn(at.0 - 10), TimelineId(0)).expect("branches");
    journal.switch_timeline(branch).expect("switches");
    records(&mut journal, &mut state, 1000, 30);
    journal.drain().expect("durable");
    journal.switch_timeline(TimelineId(0)).expect("switches back");
    records(&mut journal, &mut state, 231, 20);
    journal.drain().expect("durable");
    jobs(&mut journal, 250 * HOUR_US / 30);

    // What it must say: a checksum of each volume at some moments.
    let mut expected = String::new();
    let reader = journal.reader();
    let stats = journal.stats();
    assert!(stats.floor.0 > 0, "the fixture has a base: {stats:?}");
    for line in reader.timelines() {
        let step = (line.last_lsn.0 - stats.cutoff.0) / 9 + 1;
        let mut lsns: Vec<u64> = (stats.cutoff.0..=line.last_lsn.0).step_by(step as usize).collect();
        lsns.push(line.last_lsn.0);
        for lsn in lsns {
            let at = journal::ResolvedPoint { timeline: line.id, lsn: model::Lsn(lsn), time: HistoryTime(0) };
            let view = reader.view(at).expect("opens");
            for (i, sectors) in VOLUMES.iter().enumerate() {
                let mut image = vec![0; (sectors * 512) as usize];
                view.read(VolumeId(i as u32 + 1), 0, &mut image).expect("reads");
                let crc = crc32fast::hash(&image);
                writeln!(expected, "timeline {} lsn {lsn} volume {} crc {crc:08x}", line.id, i + 1).expect("a text");
            }
        }
    }
    drop(reader);
    // Not closed: the last segment stays open, as after a power cut.
    drop(journal);
    std::fs::write(Path::new(&dir).join("expected.txt"), expected).expect("writes");
    println!("floor {}, cutoff {}, {} segments, {} records", stats.floor, stats.cutoff, stats.segments, stats.records);
}
