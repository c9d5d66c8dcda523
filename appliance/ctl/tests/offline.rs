//! `inspect`, `export` and `verify --journal` on journals made here: with no daemon, compared bit for bit with what was
//! written, also after damage.

use durable::{Disk, OsDisk};
use journal::{AppendError, IndexChoice, Journal, JournalOptions, NewRecord};
use model::{
    ByteLen, Codec, Consistency, Extent, GapReason, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Mark,
    RecordKind, Sectors, SourceSeq, StreamId, Term, VolumeId, VolumeSpec, WriteFlags,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

/// 2025-11-22 09:30:00 UTC
const T0: u64 = 1_763_803_800_000_000;
const VOLUME_BYTES: usize = 2 << 20;
const STREAM: StreamId = StreamId::from_bytes([7; 16]);

/// xorshift64*
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// A journal of two volumes and what they held at some moments.
struct Made {
    _root: tempfile::TempDir,
    dir: PathBuf,
    /// LSN → what volume 0 and 1 held right after it.
    moments: BTreeMap<u64, [Vec<u8>; 2]>,
    bookmark: u64,
    gap: (u64, u64),
}

struct Maker {
    journal: Journal,
    seq: u64,
    time: u64,
}

impl Maker {
    fn put(&mut self, mut append: impl FnMut(&mut Journal, HistoryTime, SourceSeq) -> Result<Lsn, AppendError>) -> u64 {
        self.seq += 1;
        self.time += 10_000;
        loop {
            match append(&mut self.journal, HistoryTime(self.time), SourceSeq(self.seq)) {
                Ok(lsn) => return lsn.0,
                Err(AppendError::Busy { .. }) => drop(self.journal.poll(true).unwrap()),
                // The next segment is still being prepared: that is a job, and ours to run.
                Err(AppendError::NoSpace { .. }) => self.jobs(),
                Err(e) => panic!("{e}"),
            }
        }
    }
    fn jobs(&mut self) {
        while let Some(job) = self.journal.next_job(HistoryTime(self.time)) {
            let done = job.run();
            self.journal.job_done(done).unwrap();
        }
    }
    fn mark(&mut self, mark: &Mark) -> u64 {
        self.put(|journal, time, seq| journal.append_mark(mark, time, STREAM, seq))
    }
    fn record(&mut self, kind: RecordKind, volume: u32, lba: u64, sectors: u64, payload: &[u8]) -> u64 {
        self.put(|journal, time, seq| {
            journal.append(&NewRecord {
                kind,
                flags: WriteFlags::NONE,
                volume: VolumeId(volume),
                extent: Extent::new(lba, sectors),
                codec: Codec::Raw,
                payload,
                payload_crc: None,
                time,
                source_wall_us: time.0,
                stream: STREAM,
                seq,
            })
        })
    }
}

fn make(seed: u64) -> Made {
    let root = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(root.path()).unwrap());
    let volume = |id: u32, name: &str| VolumeSpec {
        id: VolumeId(id),
        name: name.into(),
        sectors: Sectors(VOLUME_BYTES as u64 / 512),
        identity: format!("serial-{id}"),
    };
    let spec = GroupSpec {
        id: GroupId::from_bytes([3; 16]),
        name: "web1".into(),
        host: None,
        volumes: vec![volume(0, "/dev/sdb"), volume(1, "/dev/sdc")],
        policy: GroupPolicy::default(),
    };
    let options = JournalOptions {
        segment_bytes: ByteLen(1 << 20),
        batch_bytes: 64 * 1024,
        prepared_ahead: 1,
        index: IndexChoice::None,
        ..JournalOptions::default()
    };
    let dir = Path::new("group");
    let journal = Journal::create(disk, dir, &spec, Term(1), options, HistoryTime(T0)).unwrap();
    let mut maker = Maker { journal, seq: 0, time: T0 };
    let mut rng = Rng(seed | 1);
    let mut volumes = [vec![0; VOLUME_BYTES], vec![0; VOLUME_BYTES]];
    let mut moments = BTreeMap::new();

    maker.mark(&Mark::StreamBegin { stream: STREAM });
    maker.mark(&Mark::Consistent);
    let mut bookmark = 0;
    let mut gap = (0, 0);
    for step in 0..600 {
        let which = rng.below(2) as usize;
        let lba = rng.below(VOLUME_BYTES as u64 / 512 - 64);
        let sectors = 1 + rng.below(32);
        let range = lba as usize * 512..(lba + sectors) as usize * 512;
        let lsn = if rng.below(6) == 0 {
            volumes[which][range].fill(0);
            maker.record(RecordKind::Zero, which as u32, lba, sectors, &[])
        } else {
            let byte = 1 + rng.below(255) as u8;
            let data: Vec<u8> = (0..range.len()).map(|i| byte.wrapping_add((i / 512) as u8) | 1).collect();
            volumes[which][range].copy_from_slice(&data);
            maker.record(RecordKind::Write, which as u32, lba, sectors, &data)
        };
        match step {
            300 => {
                let name = "before upgrade".parse().unwrap();
                bookmark = maker.mark(&Mark::Bookmark { name, consistency: Consistency::Filesystem });
                moments.insert(bookmark, volumes.clone());
            }
            400 => gap.0 = maker.mark(&Mark::GapBegin { reason: GapReason::Overflow }),
            420 => gap.1 = maker.mark(&Mark::Consistent),
            _ if step % 97 == 5 && !(400..=420).contains(&step) => drop(moments.insert(lsn, volumes.clone())),
            _ => {}
        }
        maker.jobs();
    }
    let last = maker.record(RecordKind::Write, 0, 0, 1, &[9; 512]);
    volumes[0][..512].fill(9);
    moments.insert(last, volumes);
    maker.journal.close().unwrap();
    Made { dir: root.path().join("group"), _root: root, moments, bookmark, gap }
}

fn holdfast(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    command.env("TZ", "UTC").env("COLUMNS", "100").env("LC_ALL", "C").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn good(output: Output) -> String {
    assert!(output.status.success(), "{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

impl Made {
    fn dir(&self) -> &str {
        self.dir.to_str().unwrap()
    }
    fn export(&self, at: &str, volume: &str, to: &Path) -> Output {
        holdfast(&["export", self.dir(), "--at", at, "--volume", volume, "--to", to.to_str().unwrap(), "--force"])
    }
    /// Segment files, oldest first.
    fn segments(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(self.dir.join("seg")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| !file.file_name().unwrap().to_str().unwrap().starts_with("prepared"));
        files.sort();
        files
    }
}

#[test]
fn every_moment_is_exported_bit_for_bit() {
    let seed = 11;
    let made = make(seed);
    let out = made._root.path().join("out.img");
    assert!(made.segments().len() > 3, "several segments: {:?}", made.segments());
    for (lsn, volumes) in &made.moments {
        for (name, want) in ["/dev/sdb", "/dev/sdc"].iter().zip(volumes) {
            let told = good(made.export(&format!("lsn:{lsn}"), name, &out));
            assert!(told.contains(&format!("(LSN {lsn})")), "{told}");
            assert!(std::fs::read(&out).unwrap() == *want, "seed {seed}: {name} at LSN {lsn} differs");
        }
    }
    let at_bookmark = &made.moments[&made.bookmark];
    good(made.export("before upgrade", "1", &out));
    assert!(std::fs::read(&out).unwrap() == at_bookmark[1], "seed {seed}: the bookmark differs");
    let (_, last) = made.moments.last_key_value().unwrap();
    good(made.export("latest", "0", &out));
    assert!(std::fs::read(&out).unwrap() == last[0], "seed {seed}: the latest differs");
    // Each record came 10 ms after the one before, LSN 1 at 10 ms.
    let (lsn, volumes) = made.moments.iter().next().unwrap();
    let time = format!("2025-11-22T09:30:{:02}.{:03}", lsn / 100, lsn % 100 * 10);
    good(made.export(&time, "0", &out));
    assert!(std::fs::read(&out).unwrap() == volumes[0], "seed {seed}: {time} differs");
}

#[test]
fn a_moment_that_is_none_is_refused_with_its_neighbours() {
    let made = make(12);
    let out = made._root.path().join("out.img");
    let refused = |at: &str| {
        let output = made.export(at, "0", &out);
        assert_eq!(output.status.code(), Some(1), "{at}: {}", text(&output.stdout));
        text(&output.stderr)
    };
    let in_gap = refused(&format!("lsn:{}", made.gap.0 + 3));
    assert!(in_gap.contains("gap") && in_gap.contains(&format!("LSN {}", made.gap.1)), "{in_gap}");
    let unknown = refused("before upgrad");
    assert!(unknown.contains("did you mean \"before upgrade\""), "{unknown}");
    let future = refused("lsn:99999999");
    assert!(future.contains("past the end") && future.contains("the newest moment is"), "{future}");
    assert!(!out.exists());
}

#[test]
fn inspect_shows_volumes_moments_and_records() {
    let made = make(13);
    let page = good(holdfast(&["inspect", made.dir(), "--records", "--limit", "700"]));
    for want in [
        "journal of group web1 (03030303030303030303030303030303)",
        "/dev/sdc",
        "serial-1",
        "the host's buffers overflowed",
        "before upgrade",
        "bookmark before upgrade (filesystem)",
        "gap begins: the host's buffers overflowed",
        "no damage seen",
        "2025-11-22 09:30:00.010",
    ] {
        assert!(page.contains(want), "{want:?} is missing in\n{page}");
    }
    let json: serde_json::Value = serde_json::from_str(&good(holdfast(&["inspect", made.dir(), "--json"]))).unwrap();
    assert_eq!(json["group"]["volumes"][0]["name"], "/dev/sdb");
    assert_eq!(json["bookmarks"][0]["lsn"], made.bookmark);
    assert_eq!(json["damage"], serde_json::json!([]));
    let before = snapshot(&made.dir);
    good(holdfast(&["inspect", made.dir()]));
    good(holdfast(&["verify", "--journal", made.dir()]));
    assert!(snapshot(&made.dir) == before, "reading changed the folder");
}

/// Every file below a folder and its content.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn damage_is_named_and_what_does_not_need_it_is_still_read() {
    let made = make(14);
    assert!(good(holdfast(&["verify", "--journal", made.dir()])).contains("every checksum right"));
    // In the middle of the last but one segment: far from headers, inside some payload.
    let segments = made.segments();
    let victim = &segments[segments.len() - 2];
    let mut bytes = std::fs::read(victim).unwrap();
    let at = bytes.len() / 2;
    bytes[at..at + 4096].fill(0xa5);
    std::fs::write(victim, &bytes).unwrap();

    let output = holdfast(&["verify", "--journal", made.dir()]);
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{report}{}", text(&output.stderr));
    let name = victim.file_name().unwrap().to_str().unwrap();
    assert!(report.contains("DAMAGED") && report.contains(name), "{name} is missing in\n{report}");

    // An early moment does not need that segment.
    let out = made._root.path().join("out.img");
    let (lsn, volumes) = made.moments.iter().next().unwrap();
    good(made.export(&format!("lsn:{lsn}"), "0", &out));
    assert!(std::fs::read(&out).unwrap() == volumes[0], "LSN {lsn} differs");
    // The latest of both volumes does: at least one of them says so and leaves nothing behind.
    std::fs::remove_file(&out).unwrap();
    let both: Vec<Output> = ["0", "1"].iter().map(|volume| made.export("latest", volume, &out)).collect();
    let failed: Vec<String> = both.iter().filter(|o| !o.status.success()).map(|o| text(&o.stderr)).collect();
    assert!(failed.iter().any(|told| told.contains(name) && told.contains("what to do")), "{failed:?}");
}
