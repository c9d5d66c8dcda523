//! Durable appends per second with N writers that each wait for their acknowledgement, as a table or (`--json`) as JSON lines.
//!
//! One thread owns the journal, one plays all writers: a writer sends its next record when the last one is durable, so `N` records
//! are under way at most. Segments are prepared beside, by a third thread, as on the box.
//!
//! `append_bench [DIR] [--seconds S] [--writers 1,16,64] [--sizes 4096,65536] [--json]`

use durable::{Disk, OsDisk};
use journal::{AppendError, IndexChoice, Job, JobDone, Journal, JournalOptions, NewRecord};
use model::{
    Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, RecordKind, Sectors, SourceSeq, StreamId, Term,
    VolumeId, VolumeSpec, WriteFlags,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

const VOLUME_SECTORS: u64 = (64 << 30) / 512;

struct Settings {
    dir: Option<PathBuf>,
    seconds: f64,
    writers: Vec<usize>,
    sizes: Vec<usize>,
    json: bool,
}

fn settings() -> Settings {
    let mut out =
        Settings { dir: None, seconds: 2.0, writers: vec![1, 16, 64, 256], sizes: vec![4096, 65536], json: false };
    let mut args = std::env::args().skip(1);
    let list = |text: Option<String>| -> Vec<usize> {
        text.unwrap_or_default().split(',').map(|n| n.parse().expect("a number")).collect()
    };
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => out.seconds = args.next().and_then(|n| n.parse().ok()).expect("seconds"),
            "--writers" => out.writers = list(args.next()),
            "--sizes" => out.sizes = list(args.next()),
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
        policy: GroupPolicy::default(),
    }
}

struct Outcome {
    acks: u64,
    seconds: f64,
    p50_ms: f64,
    p99_ms: f64,
    backend: &'static str,
}

/// All writers: each sends its next record when its last one is durable. Returns how long each waited, in ms.
fn play_writers(
    writers: usize,
    size: usize,
    stop: Instant,
    record_tx: &mpsc::Sender<u64>,
    ack_rx: &mpsc::Receiver<u64>,
) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let blocks = VOLUME_SECTORS * 512 / size as u64;
    let mut started = std::collections::VecDeque::with_capacity(writers);
    let mut latencies: Vec<f32> = Vec::new();
    let mut send = |started: &mut std::collections::VecDeque<Instant>| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        started.push_back(Instant::now());
        record_tx.send(state % blocks * (size as u64 / 512)).is_ok()
    };
    for _ in 0..writers {
        send(&mut started);
    }
    while !started.is_empty() {
        let Ok(count) = ack_rx.recv() else { break };
        let now = Instant::now();
        for _ in 0..count {
            let since = started.pop_front().expect("an ack for something sent");
            latencies.push((now - since).as_secs_f32() * 1e3);
            if now < stop {
                send(&mut started);
            }
        }
    }
    latencies
}

fn run(disk: &Arc<dyn Disk>, writers: usize, size: usize, seconds: f64) -> Outcome {
    let options = JournalOptions { index: IndexChoice::None, prepared_ahead: 4, ..JournalOptions::default() };
    let dir = PathBuf::from(format!("bench-{writers}-{size}"));
    let mut journal = Journal::create(Arc::clone(disk), &dir, &spec(), Term(1), options, HistoryTime(1))
        .expect("creates the journal");
    // Let what a running box has ready be ready.
    while let Some(job) = journal.next_job(HistoryTime(1)) {
        journal.job_done(job.run()).expect("prepares");
    }
    let (job_tx, job_rx) = mpsc::channel::<Job>();
    let (done_tx, done_rx) = mpsc::channel::<JobDone>();
    let worker = std::thread::spawn(move || job_rx.into_iter().for_each(|job| drop(done_tx.send(job.run()))));
    let (record_tx, record_rx) = mpsc::channel::<u64>();
    let (ack_tx, ack_rx) = mpsc::channel::<u64>();
    let stop = Instant::now() + Duration::from_secs_f64(seconds);

    let generator = std::thread::spawn(move || play_writers(writers, size, stop, &record_tx, &ack_rx));

    let begin = Instant::now();
    let payload = vec![0x5a; size];
    let (mut seq, mut acked, mut open) = (0u64, 0u64, true);
    let mut pending: Option<u64> = None;
    while open || acked < seq {
        let mut took = false;
        // Take what is there; block only when there is nothing else to do.
        loop {
            let lba = match pending.take() {
                Some(lba) => lba,
                None => {
                    let progress = journal.progress();
                    let idle = progress.in_flight == 0 && progress.unsent_bytes == 0;
                    let next = if idle && open {
                        record_rx.recv().map_err(|_| mpsc::TryRecvError::Disconnected)
                    } else {
                        record_rx.try_recv()
                    };
                    match next {
                        Ok(lba) => lba,
                        Err(mpsc::TryRecvError::Empty) => break,
                        Err(mpsc::TryRecvError::Disconnected) => {
                            open = false;
                            break;
                        }
                    }
                }
            };
            let record = NewRecord {
                kind: RecordKind::Write,
                flags: WriteFlags::NONE,
                volume: VolumeId(1),
                extent: Extent::new(lba, size as u64 / 512),
                codec: Codec::Raw,
                payload: &payload,
                payload_crc: None,
                time: HistoryTime(seq),
                source_wall_us: 0,
                stream: StreamId([1; 16]),
                seq: SourceSeq(seq + 1),
            };
            match journal.append(&record) {
                Ok(_) => {
                    seq += 1;
                    took = true;
                }
                Err(AppendError::Busy { .. }) => {
                    pending = Some(lba);
                    break;
                }
                Err(e) => panic!("append: {e}"),
            }
        }
        journal.submit().expect("submits");
        let progress = journal.poll(!took || pending.is_some()).expect("polls");
        if progress.durable.0 > acked {
            if ack_tx.send(progress.durable.0 - acked).is_err() {
                break;
            }
            acked = progress.durable.0;
        }
        while let Ok(done) = done_rx.try_recv() {
            journal.job_done(done).expect("the job succeeds");
        }
        while let Some(job) = journal.next_job(HistoryTime(seq)) {
            job_tx.send(job).expect("the worker is there");
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    drop(job_tx);
    let backend = journal.backend();
    let mut latencies = generator.join().expect("the generator ends");
    worker.join().expect("the worker ends");
    latencies.sort_by(f32::total_cmp);
    let at = |share: usize| latencies.get(latencies.len() * share / 100).copied().unwrap_or(0.0).into();
    Outcome { acks: acked, seconds, p50_ms: at(50), p99_ms: at(99), backend }
}

fn main() {
    let settings = settings();
    let temp = tempfile::tempdir_in(settings.dir.as_deref().unwrap_or(Path::new("."))).expect("a folder to write to");
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(temp.path()).expect("opens the folder"));
    for size in &settings.sizes {
        for writers in &settings.writers {
            let o = run(&disk, *writers, *size, settings.seconds);
            let (rate, mib) =
                (o.acks as f64 / o.seconds, o.acks as f64 * *size as f64 / o.seconds / f64::from(1 << 20));
            if settings.json {
                println!(
                    "{{\"bench\":\"journal-append\",\"writers\":{writers},\"record_bytes\":{size},\"acks_per_s\":{rate:.0},\
                     \"mib_per_s\":{mib:.1},\"p50_ms\":{:.3},\"p99_ms\":{:.3},\"backend\":\"{}\"}}",
                    o.p50_ms, o.p99_ms, o.backend
                );
            } else {
                println!(
                    "{writers:>4} writers x {:>4} KiB: {rate:>8.0} durable/s {mib:>7.0} MiB/s  p50 {:.2} ms  p99 {:.2} ms  ({})",
                    size / 1024,
                    o.p50_ms,
                    o.p99_ms,
                    o.backend
                );
            }
            std::fs::remove_dir_all(temp.path().join(format!("bench-{writers}-{size}")))
                .expect("removes what it wrote");
        }
    }
}
