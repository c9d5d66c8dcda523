//! Every moment of a random history reads as a slow model says: with the index, without it, while it is being built, after a
//! restart, and without a daemon.

mod common;

use common::*;
use journal::{Allocation, IndexChoice, Journal, JournalReader, ResolvedPoint};
use model::{Extent, HistoryTime, Lsn, TimelineId, VolumeId};

const SECTORS: [u64; 3] = [700, 64, 1500];

fn fill(journal: &mut Journal, oracle: &mut Oracle, rng: &mut Rng, count: usize, jobs: bool) {
    for _ in 0..count {
        let seq = oracle.log.len() as u64 + 1;
        let entry = draw(rng, &SECTORS, seq * 10);
        let lsn = append(journal, &entry, seq).expect("appends");
        oracle.log.push(entry);
        assert_eq!(lsn, oracle.last());
        if jobs && rng.below(10) == 0 {
            run_jobs(journal, seq * 10).expect("jobs succeed");
        }
    }
    let progress = journal.drain().expect("becomes durable");
    assert_eq!(progress.durable, oracle.last());
}

fn check_all(reader: &JournalReader, oracle: &Oracle, step: usize, what: &str) {
    let mut images = oracle.start.clone();
    for (i, entry) in oracle.log.iter().enumerate() {
        Oracle::apply(&mut images, &entry.change);
        if i % step == 0 || i + 1 == oracle.log.len() {
            check_view(reader, TimelineId(0), Lsn(oracle.first + i as u64), &images, what);
        }
    }
}

#[test]
fn every_lsn_reads_as_the_model_says() {
    every_lsn(IndexChoice::Memory);
}

#[test]
fn every_lsn_reads_as_the_model_says_without_an_index() {
    every_lsn(IndexChoice::None);
}

fn every_lsn(index: IndexChoice) {
    for seed in 1..=seeds(1) {
        let what = format!("seed {seed}, {index:?}");
        let mut rng = Rng::new(seed);
        let disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, index.clone());
        let mut oracle = Oracle::new(&SECTORS);
        fill(&mut journal, &mut oracle, &mut rng, 500, true);
        check_all(&journal.reader(), &oracle, 1, &what);
        run_jobs(&mut journal, 1_000_000).expect("jobs succeed");
        let stats = journal.stats();
        assert!(stats.segments > 12, "{what}: {stats:?}");
        assert_eq!(stats.records, 500, "{what}");
        assert_eq!(stats.unsealed, 1, "{what}");
        check_all(&journal.reader(), &oracle, 3, &what);
        journal.close().expect("closes");

        let offline = JournalReader::open_offline(arc(&disk), dir()).expect("opens offline");
        assert!(offline.damage().is_empty(), "{what}: {:?}", offline.damage());
        check_all(&offline, &oracle, 7, &what);

        let mut journal = open(&disk, index.clone());
        check_all(&journal.reader(), &oracle, 7, &what);
        fill(&mut journal, &mut oracle, &mut rng, 100, true);
        check_all(&journal.reader(), &oracle, 11, &what);
        let report = journal.reader().verify(&mut |_| {});
        assert!(report.is_clean() && report.index_wrong == 0, "{what}: {report:?}");
        assert_eq!(report.records, 600, "{what}");
    }
}

#[test]
fn sled_answers_as_the_footers_do_and_its_loss_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let index = IndexChoice::Sled { dir: folder.path().join("index") };
    let mut rng = Rng::new(77);
    let disk = disk(77);
    let mut journal = create(&disk, &SECTORS, index.clone());
    let mut oracle = Oracle::new(&SECTORS);
    fill(&mut journal, &mut oracle, &mut rng, 700, true);
    run_jobs(&mut journal, 1_000_000).expect("jobs succeed");
    check_all(&journal.reader(), &oracle, 5, "with sled");
    assert!(journal.stats().index_bytes.0 > 0);
    journal.close().expect("closes");

    let mut journal = open(&disk, index.clone());
    run_jobs(&mut journal, 2_000_000).expect("jobs succeed");
    check_all(&journal.reader(), &oracle, 13, "sled opened again");
    journal.close().expect("closes");

    std::fs::remove_dir_all(folder.path().join("index")).expect("the index is there");
    let mut journal = open(&disk, index);
    check_all(&journal.reader(), &oracle, 29, "sled deleted");
    run_jobs(&mut journal, 3_000_000).expect("jobs succeed");
    check_all(&journal.reader(), &oracle, 13, "sled rebuilt");
    let report = journal.reader().verify(&mut |_| {});
    assert!(report.is_clean() && report.index_wrong == 0 && report.index_runs > 5, "{report:?}");
}

#[test]
fn reads_of_any_bytes_and_allocation_agree_with_the_model() {
    for seed in 20..26 {
        let mut rng = Rng::new(seed);
        let disk = disk(seed);
        let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
        let mut oracle = Oracle::new(&SECTORS);
        fill(&mut journal, &mut oracle, &mut rng, 200, true);
        let reader = journal.reader();
        for _ in 0..60 {
            let lsn = Lsn(1 + rng.below(200));
            let images = oracle.images_at(lsn);
            let view =
                reader.view(ResolvedPoint { timeline: TimelineId(0), lsn, time: HistoryTime(0) }).expect("opens");
            let which = rng.below(3) as usize;
            let volume = VolumeId(which as u32 + 1);
            let image = &images[which];
            let offset = rng.below(image.len() as u64);
            let len = rng.below((image.len() as u64 - offset).min(5000) + 1);
            let mut got = vec![0xaa; len as usize];
            view.read(volume, offset, &mut got).expect("reads");
            let want = &image[offset as usize..(offset + len) as usize];
            assert!(got == want, "seed {seed}: LSN {lsn} volume {volume} bytes {offset}+{len}");

            let extent = Extent::new(offset / 512, rng.below(SECTORS[which] - offset / 512 + 1));
            let parts = view.allocation(volume, extent).expect("allocation");
            let mut at = extent.start();
            for (i, (part, kind)) in parts.iter().enumerate() {
                assert_eq!(part.start(), at, "seed {seed}: no holes");
                assert!(!part.is_empty(), "seed {seed}");
                assert!(i == 0 || parts[i - 1].1 != *kind, "seed {seed}: neighbours are joined");
                at = part.end();
                if *kind == Allocation::Zero {
                    let bytes = &image[(part.start() * 512) as usize..(part.end() * 512) as usize];
                    assert!(bytes.iter().all(|b| *b == 0), "seed {seed}: {part:?} said to be zero");
                }
            }
            assert_eq!(at, extent.end(), "seed {seed}: the whole extent");
        }
        let view = reader.head_view();
        assert!(view.read(VolumeId(1), SECTORS[0] * 512 - 1, &mut [0; 2]).is_err());
        assert!(view.read(VolumeId(9), 0, &mut [0; 2]).is_err());
        assert!(view.read(VolumeId(1), u64::MAX, &mut [0; 2]).is_err());
        assert!(view.allocation(VolumeId(1), Extent::new(u64::MAX, 2)).is_err());
    }
}

#[test]
fn records_come_back_in_order_with_their_payloads() {
    let mut rng = Rng::new(3);
    let disk = disk(3);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    fill(&mut journal, &mut oracle, &mut rng, 400, true);
    for from in [0, 1, 57, 399, 400, 401] {
        let mut images = oracle.images_at(Lsn(u64::max(from, 1) - 1));
        let mut next = u64::max(from, 1);
        for record in journal.reader().records(Lsn(from)) {
            let record = record.expect("reads");
            assert_eq!(record.record.lsn, Lsn(next));
            let data = record.data().expect("data");
            let extent = record.record.extent;
            let volume = (record.record.volume.0 as usize).saturating_sub(1);
            let change = match record.record.kind {
                model::RecordKind::Write => Change::Write { volume, lba: extent.start(), data },
                k if k.changes_volume() => Change::Zero { volume, lba: extent.start(), sectors: extent.sectors.0 },
                _ => Change::None,
            };
            Oracle::apply(&mut images, &change);
            next += 1;
        }
        assert_eq!(next, 401.max(from), "from {from}");
        assert!(images == oracle.images_at(Lsn(400)), "from {from}: replaying the records gives the last state");
    }
}

#[test]
fn a_view_is_not_moved_by_what_comes_after_it() {
    let mut rng = Rng::new(4);
    let disk = disk(4);
    let mut journal = create(&disk, &SECTORS, IndexChoice::Memory);
    let mut oracle = Oracle::new(&SECTORS);
    fill(&mut journal, &mut oracle, &mut rng, 120, true);
    let head = journal.reader().head_view();
    let want = oracle.images_at(Lsn(120));
    fill(&mut journal, &mut oracle, &mut rng, 300, true);
    for (i, image) in want.iter().enumerate() {
        let mut got = vec![0; image.len()];
        head.read(VolumeId(i as u32 + 1), 0, &mut got).expect("reads");
        assert!(got == *image, "volume {i}");
    }
    assert_eq!(head.point().lsn, Lsn(120));
}

#[test]
fn the_rate_curve_adds_up() {
    let mut rng = Rng::new(5);
    let disk = disk(5);
    let mut journal = create(&disk, &SECTORS, IndexChoice::None);
    let mut oracle = Oracle::new(&SECTORS);
    assert!(journal.reader().rate_history(10).is_empty());
    fill(&mut journal, &mut oracle, &mut rng, 300, true);
    let bytes: u64 =
        oracle.log.iter().map(|e| if let Change::Write { data, .. } = &e.change { data.len() as u64 } else { 0 }).sum();
    for buckets in [1, 7, 100, 5000] {
        let rate = journal.reader().rate_history(buckets);
        assert!(rate.len() <= buckets + 1, "{buckets}");
        assert_eq!(rate.iter().map(|b| b.bytes.0).sum::<u64>(), bytes, "{buckets}");
        assert_eq!(rate.iter().map(|b| b.records).sum::<u64>(), 300, "{buckets}");
        assert!(rate.windows(2).all(|w| w[0].end == w[1].start), "{buckets}");
    }
}
