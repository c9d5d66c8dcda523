//! Readers, jobs and the writer at once: what a view shows never moves and is never wrong, while segments are sealed, indexed,
//! folded and deleted under it.

mod common;

use common::*;
use journal::{IndexChoice, Job, JobDone, Journal, OpenViewError, ResolvedPoint};
use model::{HistoryTime, Lsn, Term, TimelineId, VolumeId};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
    mpsc,
};

const SECTORS: [u64; 2] = [300, 500];
const HOUR: u64 = 3_600_000_000;

#[test]
fn views_stay_right_while_everything_moves() {
    for (seed, index) in [(1, IndexChoice::Memory), (2, IndexChoice::None)] {
        let disk = disk(seed);
        let mut spec = spec(&SECTORS);
        spec.policy.window_hours = 2;
        spec.policy.window_hours_floor = 0;
        let mut journal = Journal::create(arc(&disk), dir(), &spec, Term(1), options(index.clone()), HistoryTime(1))
            .expect("creates");
        let oracle = Arc::new(Mutex::new(Oracle::new(&SECTORS)));
        let durable = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let checked = Arc::new(AtomicU64::new(0));
        let readers: Vec<_> = (0..2)
            .map(|n| {
                let (reader, oracle, durable) = (journal.reader(), Arc::clone(&oracle), Arc::clone(&durable));
                let (stop, checked) = (Arc::clone(&stop), Arc::clone(&checked));
                std::thread::spawn(move || {
                    let mut rng = Rng::new(seed * 10 + n);
                    while !stop.load(Ordering::Relaxed) {
                        let end = durable.load(Ordering::Acquire);
                        if end == 0 {
                            std::thread::yield_now();
                            continue;
                        }
                        let lsn = Lsn(end - rng.below(end.min(200)));
                        let at = ResolvedPoint { timeline: TimelineId(0), lsn, time: HistoryTime(0) };
                        let view = match reader.view(at) {
                            Ok(view) => view,
                            Err(OpenViewError::BeforeFloor { .. }) => continue,
                            Err(e) => panic!("seed {seed}: {e}"),
                        };
                        let images = oracle.lock().expect("no panic").images_at(lsn);
                        for _ in 0..3 {
                            for (i, image) in images.iter().enumerate() {
                                let mut got = vec![0; image.len()];
                                let read = view.read(VolumeId(i as u32 + 1), 0, &mut got);
                                read.unwrap_or_else(|e| panic!("seed {seed}, LSN {lsn}: {}", chain(&e)));
                                assert!(got == *image, "seed {seed}: LSN {lsn} volume {i}");
                            }
                        }
                        checked.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let (job_tx, job_rx) = mpsc::channel::<Job>();
        let (done_tx, done_rx) = mpsc::channel::<JobDone>();
        let worker = std::thread::spawn(move || job_rx.into_iter().for_each(|job| drop(done_tx.send(job.run()))));
        let mut rng = Rng::new(seed);
        let mut handed = 0;
        for seq in 1..=2500u64 {
            let mut entry = draw(&mut rng, &SECTORS, seq * HOUR / 60);
            entry.more = false;
            // The model knows of a record before anyone can be told that it is durable.
            let mut model = oracle.lock().expect("no panic");
            append(&mut journal, &entry, seq).expect("appends");
            model.log.push(entry);
            drop(model);
            journal.submit().expect("submits");
            durable.store(journal.poll(false).expect("polls").durable.0, Ordering::Release);
            while let Ok(done) = done_rx.try_recv() {
                handed -= 1;
                journal.job_done(done).unwrap_or_else(|e| panic!("seed {seed}: {}", chain(&e)));
            }
            while let Some(job) = journal.next_job(HistoryTime(seq * HOUR / 60)) {
                handed += 1;
                job_tx.send(job).expect("the worker is there");
            }
        }
        while handed > 0 {
            journal.job_done(done_rx.recv().expect("the worker is there")).expect("succeeds");
            handed -= 1;
        }
        // On a busy machine the worker lags behind; the readers go on while the rest is done.
        run_jobs(&mut journal, 2500 * HOUR / 60).unwrap_or_else(|e| panic!("seed {seed}: {}", chain(&e)));
        // At least some views were checked against the end of it all.
        let before = checked.load(Ordering::Relaxed);
        while checked.load(Ordering::Relaxed) < before + 4 && readers.iter().all(|r| !r.is_finished()) {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader found nothing wrong");
        }
        drop(job_tx);
        worker.join().expect("the worker ends");
        let stats = journal.stats();
        assert!(stats.floor > Lsn(1000), "seed {seed}: {stats:?}");
        assert!(checked.load(Ordering::Relaxed) > 10, "seed {seed}");
    }
}

#[test]
fn a_job_of_a_closed_journal_does_not_begin() {
    let disk = disk(5);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let job = journal.next_job(HistoryTime(1)).expect("something is due");
    drop(journal);
    let before = disk.operations();
    let done = job.run();
    assert_eq!(disk.operations(), before, "it touched the disk");
    let mut journal = open(&disk, IndexChoice::None);
    let e = journal.job_done(done).expect_err("refused");
    assert!(e.to_string().contains("closed meanwhile"), "{e}");
}

#[test]
fn a_dropped_job_is_due_again_and_appends_seal_when_nobody_does() {
    let disk = disk(6);
    let mut rng = Rng::new(6);
    let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    for seq in 1..=900u64 {
        let entry = draw(&mut rng, &SECTORS, seq);
        append(&mut journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
        if seq.is_multiple_of(50) {
            drop(journal.next_job(HistoryTime(seq)));
        }
    }
    journal.drain().expect("durable");
    let stats = journal.stats();
    assert!(stats.segments > 15 && stats.unsealed <= 9, "{stats:?}");
    run_jobs(&mut journal, 1000).expect("jobs succeed");
    assert_eq!(journal.stats().unsealed, 1);
    check_view(&journal.reader(), TimelineId(0), Lsn(900), &oracle.images_at(Lsn(900)), "after all");
}
