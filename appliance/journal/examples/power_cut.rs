//! The two halves of the power-cut test on a real file system (`hw-tests/tests/power_cut.rs`).
//!
//! `power_cut write DIR SEED RECORDS PROGRAM [ARGUMENT…]` appends records through the real disk, sealing and preparing segments as it goes.
//! Whenever more of it is durable it calls `PROGRAM ARGUMENT… durable-LSN` before it goes on: whoever records that call knows what had
//! been promised by then.
//!
//! `power_cut check DIR SEED LSN` opens what a power cut left: everything up to `LSN` must be there, and every record that is there must
//! be the one that was appended, byte for byte.

use durable::{Disk, OsDisk};
use journal::{AppendError, IndexChoice, Journal, JournalOptions, NewRecord};
use model::{
    ByteLen, Codec, Extent, GroupId, GroupPolicy, GroupSpec, HistoryTime, Lsn, Mark, RecordKind, Sectors, SourceSeq,
    StreamId, Term, VolumeId, VolumeSpec, WriteFlags,
};
use std::{path::Path, process::Command, process::ExitCode, sync::Arc};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const GROUP: &str = "group";
const VOLUME_SECTORS: u64 = 4096;
/// So many appends, then one wait: several batches are under way when the power goes.
const BURST: u64 = 12;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["write", dir, seed, records, program, rest @ ..] => write(dir, seed, records, program, rest),
        ["check", dir, seed, lsn] => check(dir, seed, lsn),
        _ => Err("usage: power_cut write DIR SEED RECORDS PROGRAM [ARGUMENT…] | check DIR SEED LSN".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let mut text = e.to_string();
            let mut cause = e.source();
            while let Some(e) = cause {
                text = format!("{text}: {e}");
                cause = e.source();
            }
            eprintln!("power_cut: {text}");
            ExitCode::FAILURE
        }
    }
}

/// What record `lsn` is: where it goes and what it holds.
fn record(seed: u64, lsn: u64) -> (Extent, Vec<u8>) {
    let mut state = (seed ^ lsn.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let sectors = 1 + next() % 16;
    let extent = Extent::new(next() % (VOLUME_SECTORS - sectors), sectors);
    let payload = (0..sectors * 64).flat_map(|_| next().to_le_bytes()).collect();
    (extent, payload)
}

fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes: ByteLen(1 << 20),
        batch_bytes: 64 << 10,
        depth: 4,
        prepared_ahead: 1,
        index: IndexChoice::None,
        ..JournalOptions::default()
    }
}

fn spec() -> GroupSpec {
    GroupSpec {
        id: GroupId(*b"power cut group!"),
        name: "g".into(),
        host: None,
        volumes: vec![VolumeSpec {
            id: VolumeId(0),
            name: "v".into(),
            sectors: Sectors(VOLUME_SECTORS),
            identity: String::new(),
        }],
        policy: GroupPolicy::default(),
    }
}

fn write(dir: &str, seed: &str, records: &str, program: &str, rest: &[&str]) -> Outcome {
    let (seed, records): (u64, u64) = (seed.parse()?, records.parse()?);
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(Path::new(dir))?);
    let mut journal = Journal::create(disk, Path::new(GROUP), &spec(), Term(1), options(), HistoryTime(1))?;
    journal.append_mark(&Mark::Consistent, HistoryTime(1), StreamId::default(), SourceSeq(1))?;
    let mut told = Lsn::ZERO;
    let mut tell = |durable: Lsn| -> Outcome {
        if durable > told {
            let status = Command::new(program).args(rest).arg(format!("durable-{durable}")).status()?;
            if !status.success() {
                return Err(format!("{program} failed: {status}").into());
            }
            told = durable;
        }
        Ok(())
    };
    tell(journal.drain()?.durable)?;
    let mut lsn = 1;
    while lsn <= records {
        for _ in 0..BURST {
            lsn += 1;
            append(&mut journal, seed, lsn)?;
            journal.submit()?;
        }
        tell(journal.poll(true)?.durable)?;
        let now = HistoryTime(lsn * 100_000);
        while let Some(job) = journal.next_job(now) {
            journal.job_done(job.run())?;
        }
    }
    tell(journal.drain()?.durable)?;
    println!("written through LSN {lsn} ({})", journal.backend());
    // No close: nothing more is said to the disk than what the records themselves needed.
    Ok(())
}

fn append(journal: &mut Journal, seed: u64, lsn: u64) -> Outcome {
    let (extent, payload) = record(seed, lsn);
    let record = NewRecord {
        kind: RecordKind::Write,
        flags: WriteFlags::NONE,
        volume: VolumeId(0),
        extent,
        codec: Codec::Raw,
        payload: &payload,
        payload_crc: None,
        time: HistoryTime(lsn * 100_000),
        source_wall_us: lsn,
        stream: StreamId::default(),
        seq: SourceSeq(lsn),
    };
    loop {
        match journal.append(&record) {
            Ok(got) if got.0 == lsn => return Ok(()),
            Ok(got) => return Err(format!("record {lsn} got LSN {got}").into()),
            Err(AppendError::Busy { .. }) => drop(journal.poll(true)?),
            Err(e) => return Err(e.into()),
        }
    }
}

fn check(dir: &str, seed: &str, lsn: &str) -> Outcome {
    let (seed, durable): (u64, u64) = (seed.parse()?, lsn.parse()?);
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::new(Path::new(dir))?);
    let (journal, report) = Journal::open(disk, Path::new(GROUP), options(), HistoryTime(u64::MAX >> 1))?;
    let end = journal.progress().durable.0;
    if end < durable {
        return Err(format!("LSN {durable} was durable, the journal ends at {end}: {report:?}").into());
    }
    let mut image = vec![0u8; (VOLUME_SECTORS * 512) as usize];
    let mut count = 0;
    for found in journal.reader().records(Lsn(1)) {
        let found = found?;
        count += 1;
        if found.record.lsn.0 != count {
            return Err(format!("record {} comes after {}", found.record.lsn, count - 1).into());
        }
        if found.record.kind != RecordKind::Write {
            continue;
        }
        let (extent, payload) = record(seed, count);
        if found.record.extent != extent || found.data()? != payload {
            return Err(format!("record {count} is not what was appended").into());
        }
        image[(extent.start() * 512) as usize..][..payload.len()].copy_from_slice(&payload);
    }
    if count != end {
        return Err(format!("{count} records of {end} can be read").into());
    }
    let mut view = vec![0u8; image.len()];
    journal.reader().head_view().read(VolumeId(0), 0, &mut view)?;
    if view != image {
        return Err("the newest state is not what the records make".into());
    }
    println!("ok {end}");
    Ok(())
}
