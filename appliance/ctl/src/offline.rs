//! Reading a journal's folder with no daemon and no index: on the box when the daemon will not start, or on any machine the
//! folder was copied to. Nothing in the folder is changed.

use crate::{
    Outcome, api,
    args::{ExportArgs, InspectArgs},
    copy::{self, Sink, Source},
    online,
    picture::{Canvas, Table, count, grouped},
    points,
    target::{Allowed, Target},
    times::{Clock, show_span_us},
};
use anyhow::Context as _;
use durable::{Disk, DiskError, OsDisk};
use journal::{
    Allocation, JournalReader, OpenError, OpenViewError, ReadError, ReadViewError, ResolveError, VerifyReport, View,
};
use model::{ByteLen, Extent, GroupSpec, Lsn, Mark, Record, RecordKind, SECTOR, Sectors, VolumeSpec, WriteFlags};
use serde_json::{Value, json};
use std::{
    io::{self, Write as _},
    ops::Range,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

/// Columns of the curve in `--json`.
const BUCKETS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error("there is no journal in {}", dir.display())]
    NotAJournal { dir: PathBuf },
    #[error("could not look at {}", dir.display())]
    Folder { dir: PathBuf, source: io::Error },
    #[error("could not read {}", dir.display())]
    Disk { dir: PathBuf, source: DiskError },
    #[error("could not open the journal in {}", dir.display())]
    Open { dir: PathBuf, source: OpenError },
    #[error("could not open the moment")]
    Resolve(#[source] ResolveError),
    #[error("could not open the moment")]
    View(#[source] OpenViewError),
    #[error("could not read volume {volume} at {offset:#x}")]
    Read { volume: String, offset: u64, source: ReadViewError },
    #[error("could not read record {lsn}")]
    Record { lsn: Lsn, source: ReadError },
}

impl OfflineError {
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::NotAJournal { .. } => {
                "name the folder that holds control.a and seg/, e.g. /var/lib/holdfast/groups/GROUP-ID".into()
            }
            Self::Resolve(ResolveError::BeforeFloor { floor, floor_time }) => {
                format!("the oldest moment is {} (LSN {floor})", Clock::local().show(floor_time.0))
            }
            Self::Resolve(ResolveError::AfterEnd { end, end_time }) => {
                format!("the newest moment is {} (LSN {end})", Clock::local().show(end_time.0))
            }
            Self::Resolve(_) | Self::View(_) => "`holdfast inspect` shows which moments there are".into(),
            Self::Read { .. } | Self::Record { .. } => {
                "`holdfast verify --journal` lists all damage; a moment that does not need the damaged part can still be read"
                    .into()
            }
            Self::Folder { .. } | Self::Disk { .. } | Self::Open { .. } => return None,
        })
    }
}

/// An open journal and what its folder looks like.
struct Journal {
    dir: PathBuf,
    reader: JournalReader,
    files: Files,
}

#[derive(Default)]
struct Files {
    segments: u64,
    segment_bytes: u64,
    base_bytes: u64,
    index_bytes: u64,
}

impl Journal {
    fn open(dir: &Path) -> Result<Self, OfflineError> {
        let real = dir.canonicalize().map_err(|source| OfflineError::Folder { dir: dir.to_owned(), source })?;
        let not_a_journal = || OfflineError::NotAJournal { dir: dir.to_owned() };
        let (Some(root), Some(name)) = (real.parent(), real.file_name()) else { return Err(not_a_journal()) };
        if !real.join("control.a").exists() && !real.join("control.b").exists() {
            return Err(not_a_journal());
        }
        warn_of_daemon(&real);
        let disk = OsDisk::new(root).map_err(|source| OfflineError::Disk { dir: dir.to_owned(), source })?;
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let reader = JournalReader::open_offline(disk, Path::new(name));
        let reader = reader.map_err(|source| OfflineError::Open { dir: dir.to_owned(), source })?;
        let (segments, segment_bytes) = bytes_below(&real.join("seg"));
        let files = Files {
            segments,
            segment_bytes,
            base_bytes: bytes_below(&real.join("base")).1,
            index_bytes: bytes_below(&real.join("index")).1,
        };
        Ok(Self { dir: real, reader, files })
    }

    /// In the shape of the control API, so that the same picture shows both.
    fn points(&self, buckets: usize) -> api::Points {
        let points = self.reader.points();
        let rate = self.reader.rate_history(buckets);
        api::Points {
            valid: points
                .valid
                .iter()
                .map(|r| api::PointRange {
                    first_lsn: r.first_lsn.0,
                    last_lsn: r.last_lsn.0,
                    first_time_us: r.first_time.0,
                    last_time_us: r.last_time.0,
                })
                .collect(),
            gaps: points
                .gaps
                .iter()
                .map(|g| api::Gap {
                    first_lsn: g.first_lsn.0,
                    last_lsn: g.last_lsn.map(|lsn| lsn.0),
                    reason: g.reason.to_string(),
                    first_time_us: g.first_time.0,
                    last_time_us: g.last_time.map(|time| time.0),
                })
                .collect(),
            bookmarks: points
                .bookmarks
                .iter()
                .map(|b| api::Bookmark {
                    name: b.name.to_string(),
                    lsn: b.lsn.0,
                    time_us: b.time.0,
                    consistency: Some(b.consistency),
                })
                .collect(),
            rate: rate
                .iter()
                .map(|b| api::Rate { start_us: b.start.0, end_us: b.end.0, bytes: b.bytes.0, writes: b.records })
                .collect(),
        }
    }
}

/// Files below a folder and the room they take (not their length: they are sparse).
fn bytes_below(dir: &Path) -> (u64, u64) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => {
                let (files, bytes) = bytes_below(&entry.path());
                sum = (sum.0 + files, sum.1 + bytes);
            }
            Ok(meta) => sum = (sum.0 + 1, sum.1 + std::os::unix::fs::MetadataExt::blocks(&meta) * 512),
            Err(_) => {}
        }
    }
    sum
}

/// A daemon that is at work on this very folder goes on writing while we read.
fn warn_of_daemon(dir: &Path) {
    let socket = dir.parent().and_then(Path::parent).map(|data| data.join("run/control.sock"));
    if socket.is_some_and(|socket| UnixStream::connect(socket).is_ok()) {
        eprintln!("note: holdfastd is running on this journal; what it is writing at this moment may look unfinished");
    }
}

pub fn inspect(args: &InspectArgs) -> anyhow::Result<Outcome> {
    let journal = Journal::open(&args.dir)?;
    let outcome = if journal.reader.damage().is_empty() { Outcome::Done } else { Outcome::Damaged };
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", to_json(&journal))?;
    } else {
        out.write_all(page(&journal).as_bytes())?;
    }
    if args.records {
        records(&journal, args, &mut out)?;
    }
    out.flush()?;
    Ok(outcome)
}

fn page(journal: &Journal) -> String {
    let spec = journal.reader.spec();
    let files = &journal.files;
    let mut lines = vec![
        format!("journal of group {} ({}) in {}", spec.name, spec.id, journal.dir.display()),
        format!(
            "{} in {}, base {}, index {} (disposable)",
            ByteLen(files.segment_bytes),
            count(files.segments as usize, "segment file"),
            ByteLen(files.base_bytes),
            ByteLen(files.index_bytes)
        ),
    ];
    if let Some(host) = spec.host {
        lines.push(format!("written by host {host}"));
    }
    lines.push(String::new());
    let mut volumes = Table::new(&["VOLUME", "NAME", "SIZE", "IDENTITY"]);
    for volume in &spec.volumes {
        let size = ByteLen(volume.sectors.bytes()).to_string();
        volumes.row([volume.id.to_string(), volume.name.clone(), size, volume.identity.clone()]);
    }
    lines.extend(volumes.lines(0));
    let timelines = journal.reader.timelines();
    if timelines.len() > 1 {
        lines.push(String::new());
        let mut table = Table::new(&["TIMELINE", "BRANCHES FROM", "LAST LSN", ""]);
        for line in timelines {
            table.row([
                line.id.to_string(),
                line.parent.map_or_else(|| "-".into(), |(parent, at)| format!("timeline {parent} at LSN {at}")),
                line.last_lsn.to_string(),
                if line.current { "current" } else { "" }.to_owned(),
            ]);
        }
        lines.extend(table.lines(0));
    }
    lines.push(String::new());
    let canvas = Canvas::of_terminal();
    lines.push(points::render(&spec.name, &journal.points(canvas.width), &Clock::local(), canvas));
    match journal.reader.damage() {
        [] => lines.push("no damage seen on opening; `holdfast verify --journal` reads everything".into()),
        damage => {
            lines.push(format!("DAMAGED in {}:", count(damage.len(), "place")));
            lines.extend(damage.iter().map(|corruption| format!("  {corruption}")));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn to_json(journal: &Journal) -> Value {
    let points = journal.points(BUCKETS);
    let files = &journal.files;
    json!({
        "group": journal.reader.spec(),
        "files": {
            "segments": files.segments,
            "segment_bytes": files.segment_bytes,
            "base_bytes": files.base_bytes,
            "index_bytes": files.index_bytes,
        },
        "timelines": journal.reader.timelines().iter().map(|line| json!({
            "id": line.id,
            "parent": line.parent.map(|(parent, at)| json!({ "timeline": parent, "lsn": at })),
            "last_lsn": line.last_lsn,
            "current": line.current,
        })).collect::<Vec<_>>(),
        "valid": points.valid.iter().map(|r| json!({
            "first_lsn": r.first_lsn, "last_lsn": r.last_lsn,
            "first_time_us": r.first_time_us, "last_time_us": r.last_time_us,
        })).collect::<Vec<_>>(),
        "gaps": points.gaps.iter().map(|g| json!({
            "first_lsn": g.first_lsn, "last_lsn": g.last_lsn, "reason": g.reason,
            "first_time_us": g.first_time_us, "last_time_us": g.last_time_us,
        })).collect::<Vec<_>>(),
        "bookmarks": points.bookmarks.iter().map(|b| json!({
            "name": b.name, "lsn": b.lsn, "time_us": b.time_us, "consistency": b.consistency,
        })).collect::<Vec<_>>(),
        "rate": points.rate.iter().map(|r| json!({
            "start_us": r.start_us, "end_us": r.end_us, "bytes": r.bytes, "writes": r.writes,
        })).collect::<Vec<_>>(),
        "damage": journal.reader.damage().iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn records(journal: &Journal, args: &InspectArgs, out: &mut impl io::Write) -> anyhow::Result<()> {
    let clock = Clock::local();
    if !args.json {
        writeln!(
            out,
            "\n{:>12}  {:<23}  {:<8} {:>6} {:>14} {:>8} {:>8}  WHAT",
            "LSN", "TIME", "KIND", "VOLUME", "SECTOR", "SECTORS", "STORED"
        )?;
    }
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    for record in journal.reader.records(Lsn(args.from)).take(limit) {
        // A damaged record is said in its place, and the list goes on behind it.
        let record = match record {
            Ok(record) => record,
            Err(e) => {
                let text = crate::sentence(&e.into());
                if args.json {
                    writeln!(out, "{}", json!({ "damage": text }))?
                } else {
                    writeln!(out, "  DAMAGED {text}")?
                }
                continue;
            }
        };
        let r = &record.record;
        let mark = record.mark().map_err(|source| OfflineError::Record { lsn: r.lsn, source })?;
        let what = [flags(r.flags), mark.as_ref().map(describe).unwrap_or_default()].concat();
        if args.json {
            let at = json!({
                "lsn": r.lsn, "time_us": r.time, "kind": kind(r), "volume": r.volume, "lba": r.extent.lba,
                "sectors": r.extent.sectors, "stored_bytes": r.stored_len, "what": what.trim_end(),
                "term": r.term, "stream": r.stream, "seq": r.seq, "offset": record.offset,
            });
            writeln!(out, "{at}")?;
            continue;
        }
        let place = |n: u64| if r.extent.is_empty() { "-".to_owned() } else { n.to_string() };
        let line = format!(
            "{:>12}  {:<23}  {:<8} {:>6} {:>14} {:>8} {:>8}  {what}",
            r.lsn.0,
            clock.show(r.time.0),
            kind(r),
            if r.extent.is_empty() { "-".to_owned() } else { r.volume.to_string() },
            place(r.extent.start()),
            place(r.extent.sectors.0),
            r.stored_len,
        );
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn kind(record: &Record) -> &'static str {
    match record.kind {
        RecordKind::Write => "write",
        RecordKind::Zero => "zero",
        RecordKind::Discard => "discard",
        RecordKind::Flush => "flush",
        RecordKind::Mark => "mark",
    }
}

fn flags(flags: WriteFlags) -> String {
    let names = [
        (WriteFlags::FUA, "FUA "),
        (WriteFlags::PREFLUSH, "PREFLUSH "),
        (WriteFlags::MORE, "MORE "),
        (WriteFlags::SYNC, "SYNC "),
    ];
    names.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect()
}

fn describe(mark: &Mark) -> String {
    match mark {
        Mark::GapBegin { reason } => format!("gap begins: {reason}"),
        Mark::Consistent => "consistent from here on".into(),
        Mark::Watermark { seq, .. } => format!("watermark at {seq}"),
        Mark::Bookmark { name, consistency } => format!("bookmark {name} ({consistency})"),
        Mark::StreamBegin { stream } => format!("stream {stream} begins"),
    }
}

pub fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let clock = Clock::local();
    let point = clock.point(&args.at)?;
    let journal = Journal::open(&args.dir)?;
    let GroupSpec { name, volumes, .. } = journal.reader.spec();
    let volume = online::pick_volume(&volumes, &name, args.volume.as_deref())?;
    let at = journal.reader.resolve(&point).map_err(OfflineError::Resolve)?;
    let view = journal.reader.view(at).map_err(OfflineError::View)?;
    let allowed = Allowed { overwrite: args.to.force, onto_protected: args.to.onto_protected };
    let mut target = Target::open(&args.to.to, allowed, &[])?;
    copy::catch_interrupts();
    let started = Instant::now();
    let mut source = ViewSource { view, volume: volume.clone() };
    let copied = copy::copy(&mut source, &mut target).with_context(|| match target.is_device() {
        true => format!("{} holds a part of the volume only", args.to.to.display()),
        false => format!("nothing was left at {}", args.to.to.display()),
    })?;
    target.finish()?;
    println!(
        "exported {} as of {} (LSN {}) to {}: {}, {} of it written, in {:.1} s",
        volume.name,
        clock.show(at.time.0),
        at.lsn,
        args.to.to.display(),
        copied.size,
        copied.data,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// A volume of a view.
struct ViewSource {
    view: View,
    volume: VolumeSpec,
}

impl Source for ViewSource {
    fn size(&self) -> ByteLen {
        ByteLen(self.volume.sectors.bytes())
    }

    fn allocation(&mut self, range: Range<u64>) -> anyhow::Result<Vec<(u64, bool)>> {
        let extent =
            Extent { lba: model::Lba(range.start / SECTOR), sectors: Sectors((range.end - range.start) / SECTOR) };
        let failed = |source| OfflineError::Read { volume: self.volume.name.clone(), offset: range.start, source };
        let runs = self.view.allocation(self.volume.id, extent).map_err(failed)?;
        Ok(runs.iter().map(|(extent, allocation)| (extent.bytes(), *allocation == Allocation::Data)).collect())
    }

    fn read(&mut self, range: Range<u64>, sink: Sink<'_>) -> anyhow::Result<()> {
        copy::read_pieces(range, sink, |offset, buf| {
            let failed = |source| OfflineError::Read { volume: self.volume.name.clone(), offset, source };
            Ok(self.view.read(self.volume.id, offset, buf).map_err(failed)?)
        })
    }
}

pub fn verify(dir: &Path, as_json: bool) -> anyhow::Result<Outcome> {
    let journal = Journal::open(dir)?;
    let bar = copy::progress_bar(0);
    let started = Instant::now();
    let report = journal.reader.verify(&mut |progress| {
        bar.set_length(progress.total.0);
        bar.set_position(progress.done.0);
    });
    bar.finish_and_clear();
    let verified = Verified::from_report(&report);
    let mut out = io::stdout().lock();
    if as_json {
        writeln!(out, "{:#}", verified.json())?;
    } else {
        out.write_all(verified.text(&format!("journal in {}", dir.display())).as_bytes())?;
        writeln!(out, "it took {}", show_span_us(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX)))?;
    }
    Ok(verified.outcome())
}

/// What a verification found, by the daemon or by ourselves.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verified {
    segments: u64,
    records: u64,
    bytes: u64,
    base_blocks: u64,
    index_runs: u64,
    index_wrong: u64,
    damage: Vec<String>,
    damage_count: u64,
    unreadable: Vec<String>,
}

impl Verified {
    fn from_report(report: &VerifyReport) -> Self {
        Self {
            segments: report.segments as u64,
            records: report.records,
            bytes: report.bytes.0,
            base_blocks: report.base_blocks,
            index_runs: report.index_runs,
            index_wrong: report.index_wrong,
            damage: report.damage.iter().map(ToString::to_string).collect(),
            damage_count: report.damage_count,
            unreadable: report.unreadable.clone(),
        }
    }

    /// From the daemon's report.
    pub fn from_json(report: &Value) -> Self {
        let number = |name: &str| report.get(name).and_then(Value::as_u64).unwrap_or(0);
        let texts = |name: &str| -> Vec<String> {
            let list = report.get(name).and_then(Value::as_array);
            let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            list.map(|list| list.iter().map(text).collect()).unwrap_or_default()
        };
        let damage = texts("damage");
        Self {
            segments: number("segments"),
            records: number("records"),
            bytes: number("bytes"),
            base_blocks: number("base_blocks"),
            index_runs: number("index_runs"),
            index_wrong: number("index_wrong"),
            damage_count: number("damage_count").max(damage.len() as u64),
            damage,
            unreadable: texts("unreadable"),
        }
    }

    fn json(&self) -> Value {
        json!({
            "segments": self.segments, "records": self.records, "bytes": self.bytes, "base_blocks": self.base_blocks,
            "index_runs": self.index_runs, "index_wrong": self.index_wrong, "damage": self.damage,
            "damage_count": self.damage_count, "unreadable": self.unreadable,
        })
    }

    pub fn outcome(&self) -> Outcome {
        if self.damage_count == 0 && self.unreadable.is_empty() { Outcome::Done } else { Outcome::Damaged }
    }

    pub fn text(&self, what: &str) -> String {
        let checked = format!(
            "{} records in {} ({}), {} base blocks, {} index runs",
            grouped(self.records),
            count(self.segments as usize, "segment"),
            ByteLen(self.bytes),
            grouped(self.base_blocks),
            grouped(self.index_runs)
        );
        let mut lines = match self.outcome() {
            Outcome::Done => vec![format!("{what} is whole: {checked}, every checksum right")],
            Outcome::Damaged => {
                let mut lines = vec![format!("{what} is DAMAGED in {} places; checked: {checked}", self.damage_count)];
                lines.extend(self.damage.iter().map(|damage| format!("  {damage}")));
                lines.extend(self.unreadable.iter().map(|file| format!("  cannot be read: {file}")));
                if self.damage_count > self.damage.len() as u64 {
                    lines.push(format!("  and {} more", self.damage_count - self.damage.len() as u64));
                }
                lines.push("moments that do not need the damaged parts can still be opened and restored".into());
                lines
            }
        };
        if self.index_wrong > 0 {
            lines.push(format!(
                "{} of the index disagreed with the segments: it is disposable and rebuilt, nothing is lost",
                count(self.index_wrong as usize, "run")
            ));
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_the_same_from_the_daemon_and_from_here() {
        let clean = Verified { segments: 3, records: 12_345, bytes: 4096, ..Default::default() };
        assert_eq!(Verified::from_json(&clean.json()), clean);
        assert_eq!(clean.outcome(), Outcome::Done);
        assert_eq!(
            clean.text("group g"),
            "group g is whole: 12,345 records in 3 segments (4.0 KiB), 0 base blocks, 0 index runs, every checksum right\n"
        );
        let bad = Verified {
            damage: vec!["seg/x: record checksum at 0x7f000".into()],
            damage_count: 3,
            index_wrong: 1,
            ..clean
        };
        assert_eq!(Verified::from_json(&bad.json()), bad);
        assert_eq!(bad.outcome(), Outcome::Damaged);
        let text = bad.text("group g");
        for want in ["DAMAGED in 3 places", "seg/x: record checksum at 0x7f000", "and 2 more", "1 run of the index"] {
            assert!(text.contains(want), "{text}");
        }
    }

    #[test]
    fn what_is_no_journal_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            inspect(&InspectArgs { dir: dir.path().to_owned(), records: false, from: 0, limit: 1, json: false });
        let error = error.unwrap_err();
        assert!(error.to_string().starts_with("there is no journal in"), "{error}");
        assert!(crate::remedy(&error).unwrap().contains("control.a"));
        let missing = verify(&dir.path().join("no"), false).unwrap_err();
        assert!(crate::sentence(&missing).contains("No such file"), "{missing:#}");
    }
}
