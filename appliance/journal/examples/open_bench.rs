//! How long it takes to open any moment, to read from it, and to start again after a kill, by the length of the history.
//!
//! Records are small by default (512 bytes, segments of 20 MiB), so that 10^7 of them fit where 4 KiB records of a full-size
//! journal would not: the numbers of records, segments and index entries are the same as with 4 KiB and 128 MiB.
//!
//! `open_bench [DIR] [--records 10000,1000000,10000000] [--payload 512] [--segment-mib 20] [--index sled|none] [--json]`

use durable::{Disk, OsDisk};
use journal::{AppendError, IndexChoice, Journal, JournalOptions, NewRecord, ResolvedPoint};
use model::{
    ByteLen, Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Mark, RecordKind, RecoveryPoint,
    Sectors, SourceSeq, StreamId, Term, VolumeId, VolumeSpec, WriteFlags,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

const VOLUME_SECTORS: u64 = (256 << 30) / 512;
/// Microseconds of history per record: 2000 a second.
const STEP_US: u64 = 500;

struct Rng(u64);

impl Rng {
    fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

struct Settings {
    dir: Option<PathBuf>,
    records: Vec<u64>,
    payload: usize,
    segment_mib: u64,
    sled: bool,
    json: bool,
}

fn settings() -> Settings {
    let mut out = Settings {
        dir: None,
        records: vec![10_000, 1_000_000, 10_000_000],
        payload: 512,
        segment_mib: 20,
        sled: true,
        json: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<u64>().ok()).expect("a number");
        match arg.as_str() {
            "--payload" => out.payload = number() as usize,
            "--segment-mib" => out.segment_mib = number(),
            "--index" => out.sled = args.next().as_deref() == Some("sled"),
            "--records" => {
                let text = args.next().unwrap_or_default();
                out.records = text.split(',').map(|n| n.parse().expect("a number")).collect();
            }
            "--json" => out.json = true,
            other if !other.starts_with('-') => out.dir = Some(PathBuf::from(other)),
            other => panic!("unknown option {other}"),
        }
    }
    out
}

fn spec() -> GroupSpec {
    GroupSpec {
        id: GroupId([7; 16]),
        name: "bench".into(),
        host: None,
        volumes: vec![VolumeSpec {
            id: VolumeId(1),
            name: "/dev/bench".into(),
            sectors: Sectors(VOLUME_SECTORS),
            identity: String::new(),
        }],
        policy: GroupPolicy { window_hours: 1_000_000, ..GroupPolicy::default() },
    }
}

fn jobs(journal: &mut Journal, now: HistoryTime) {
    while let Some(job) = journal.next_job(now) {
        journal.job_done(job.run()).expect("the job succeeds");
    }
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

fn fill(journal: &mut Journal, count: u64, payload: &[u8]) {
    let sectors = payload.len() as u64 / 512;
    let mut rng = Rng(88172645463325252);
    journal.append_mark(&Mark::Consistent, HistoryTime(0), StreamId::default(), SourceSeq(0)).expect("appends");
    for seq in 1..count {
        let record = NewRecord {
            kind: RecordKind::Write,
            flags: WriteFlags::NONE,
            volume: VolumeId(1),
            // 4 KiB places all over the volume, whatever the payload's length.
            extent: Extent::new(rng.below(VOLUME_SECTORS / 8 - 32) * 8, sectors),
            codec: Codec::Raw,
            payload,
            payload_crc: None,
            time: HistoryTime(seq * STEP_US),
            source_wall_us: 0,
            stream: StreamId([1; 16]),
            seq: SourceSeq(seq),
        };
        append(journal, &record);
        if seq.is_multiple_of(8192) {
            jobs(journal, HistoryTime(seq * STEP_US));
        }
    }
    journal.drain().expect("durable");
}

/// Median and worst, in milliseconds.
fn spread(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() - 1])
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn main() {
    let settings = settings();
    let temp = tempfile::tempdir_in(settings.dir.as_deref().unwrap_or(Path::new("."))).expect("a folder to write to");
    let root = temp.path().canonicalize().expect("an absolute path");
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(&root).expect("opens the folder"));
    let payload = vec![0x5a; settings.payload];
    for count in &settings.records {
        let dir = PathBuf::from(format!("g{count}"));
        let index =
            if settings.sled { IndexChoice::Sled { dir: root.join(&dir).join("index") } } else { IndexChoice::None };
        let options =
            JournalOptions { segment_bytes: ByteLen(settings.segment_mib << 20), index, ..JournalOptions::default() };
        let make = || -> Journal {
            Journal::create(Arc::clone(&disk), &dir, &spec(), Term(1), options.clone(), HistoryTime(1))
                .expect("creates")
        };
        let begin = Instant::now();
        let mut journal = make();
        fill(&mut journal, *count, &payload);
        let filled_s = begin.elapsed().as_secs_f64();
        jobs(&mut journal, HistoryTime(count * STEP_US));
        let indexed_s = begin.elapsed().as_secs_f64() - filled_s;
        let stats = journal.stats();
        let host_bytes = (count * settings.payload as u64) as f64;
        // As after a kill: nothing is closed, the last segment is open.
        drop(journal);
        let begin = Instant::now();
        let (mut journal, _) =
            Journal::open(Arc::clone(&disk), &dir, options.clone(), HistoryTime(1)).expect("opens again");
        let restart_ms = ms(begin);
        jobs(&mut journal, HistoryTime(count * STEP_US));
        let reader = journal.reader();
        let mut rng = Rng(362436069);
        let (mut resolves, mut opens, mut firsts, mut reads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut buf = vec![0; 4096];
        for round in 0..30u64 {
            let lsn = Lsn(1 + (count - 1) * round / 30 + rng.below(count / 40 + 1).min(count / 31));
            let begin = Instant::now();
            let point: ResolvedPoint =
                reader.resolve(&RecoveryPoint::Time(HistoryTime(lsn.0 * STEP_US))).expect("a point");
            resolves.push(ms(begin));
            let begin = Instant::now();
            let view = reader.view(point).expect("opens");
            opens.push(ms(begin));
            for i in 0..50 {
                let offset = rng.below(VOLUME_SECTORS / 8) * 4096;
                let begin = Instant::now();
                view.read(VolumeId(1), offset, &mut buf).expect("reads");
                if i == 0 { firsts.push(ms(begin)) } else { reads.push(ms(begin)) }
            }
        }
        let ((resolve, _), (open, open_max)) = (spread(resolves), spread(opens));
        let ((first, first_max), (read, read_max)) = (spread(firsts), spread(reads));
        let per_host = stats.segment_bytes.0 as f64 / host_bytes;
        let index_per_record = stats.index_bytes.0 as f64 / *count as f64;
        if settings.json {
            println!(
                "{{\"bench\":\"journal-open\",\"records\":{count},\"segments\":{},\"index\":\"{}\",\"open_ms\":{open:.3},\
                 \"open_ms_max\":{open_max:.3},\"resolve_ms\":{resolve:.3},\"first_read_ms\":{first:.3},\
                 \"first_read_ms_max\":{first_max:.3},\"read_ms\":{read:.4},\"read_ms_max\":{read_max:.3},\
                 \"restart_ms\":{restart_ms:.1},\"index_bytes\":{},\"index_bytes_per_record\":{index_per_record:.1},\
                 \"journal_bytes_per_host_byte\":{per_host:.3},\"fill_s\":{filled_s:.1},\"index_s\":{indexed_s:.1}}}",
                stats.segments,
                if settings.sled { "sled" } else { "none" },
                stats.index_bytes.0
            );
        } else {
            println!(
                "{count:>9} records, {:>4} segments: open {open:.3} ms (max {open_max:.3}), resolve {resolve:.2} ms, first read \
                 {first:.2} ms (max {first_max:.1}), read {read:.3} ms (max {read_max:.2}), restart {restart_ms:.0} ms, index {} \
                 ({index_per_record:.0} B per record), filled in {filled_s:.1} s, indexed {indexed_s:.1} s later",
                stats.segments, stats.index_bytes
            );
        }
        drop(reader);
        drop(journal);
        std::fs::remove_dir_all(root.join(&dir)).expect("removes what it wrote");
    }
}
