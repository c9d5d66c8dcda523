//! Journals of earlier formats, as they were written then: they must open and say the same for ever.
//!
//! Made by `examples/make_fixture.rs`. The version 1 fixture has a base, sealed and open segments, compressed records, zeroes,
//! discards, marks of every kind, a released bookmark and two timelines.

mod common;

use common::*;
use durable::{Disk, OsDisk};
use journal::{IndexChoice, Journal, JournalReader, ResolvedPoint};
use model::{BookmarkName, Consistency, GapReason, HistoryTime, Lsn, RecoveryPoint, TimelineId, VolumeId};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

fn fixture(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(version)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("makes a folder");
    for entry in fs::read_dir(from).expect("the fixture is there") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("copies");
        }
    }
}

fn check(reader: &JournalReader, expected: &str) {
    let mut lines = 0;
    for line in expected.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<u64>().expect("a number");
        let at = ResolvedPoint { timeline: TimelineId(number(1) as u32), lsn: Lsn(number(3)), time: HistoryTime(0) };
        let view = reader.view(at).unwrap_or_else(|e| panic!("{line}: {e}"));
        let volume = VolumeId(number(5) as u32);
        let sectors = view.volumes().iter().find(|v| v.id == volume).expect("the volume is there").sectors;
        let mut image = vec![0; sectors.bytes() as usize];
        view.read(volume, 0, &mut image).unwrap_or_else(|e| panic!("{line}: {}", chain(&e)));
        assert_eq!(format!("{:08x}", crc32fast::hash(&image)), words[7], "{line}");
        lines += 1;
    }
    assert!(lines > 20, "{lines} moments");
    let points = reader.points();
    let names: Vec<(&str, Consistency)> = points.bookmarks.iter().map(|b| (b.name.as_str(), b.consistency)).collect();
    assert_eq!(names, [("before 升级", Consistency::Application)]);
    assert!(points.gaps.iter().any(|g| g.reason == GapReason::Overflow && g.last_lsn.is_some()), "{points:?}");
    assert_eq!(points.valid.len(), 2, "{points:?}");
    let name: BookmarkName = "before 升级".parse().expect("a name");
    reader.resolve(&RecoveryPoint::Bookmark(name)).expect("a point");
    let report = reader.verify(&mut |_| {});
    assert!(report.is_clean() && report.base_blocks > 0 && report.records > 100, "{report:?}");
}

#[test]
fn a_journal_of_version_1_opens_and_says_what_it_said() {
    let expected = fs::read_to_string(fixture("v1").join("expected.txt")).expect("the fixture is there");
    let temp = tempfile::tempdir().expect("a folder");
    copy(&fixture("v1"), temp.path());
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(temp.path()).expect("opens the folder"));
    let dir = Path::new("journal");
    // First as it is, without changing it; then as the daemon does; then once more, to see that this changed no answer.
    let offline = JournalReader::open_offline(Arc::clone(&disk), dir).expect("opens offline");
    assert!(offline.damage().is_empty(), "{:?}", offline.damage());
    check(&offline, &expected);
    let (mut journal, report) =
        Journal::open(Arc::clone(&disk), dir, options(IndexChoice::Memory), HistoryTime(0)).expect("opens");
    assert!(report.cut.is_empty() && report.scanned > 0, "{report:?}");
    assert_eq!(journal.spec().name, "fixture");
    assert_eq!(journal.source_position().expect("a position").appended.0, 250);
    check(&journal.reader(), &expected);
    run_jobs(&mut journal, 0).expect("jobs succeed");
    check(&journal.reader(), &expected);
    journal.close().expect("closes");
    check(&JournalReader::open_offline(disk, dir).expect("opens offline"), &expected);
}
