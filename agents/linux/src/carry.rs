//! What is known of the disks, carried over a reboot, so that a clean one copies only what it must.
//!
//! ```text
//!  agent stops          states in run_dir; the plan: where carry.bin lies on its disk
//!  shutdown hook        root is read-only: what the kernel half caught since goes into the states; states → carry.bin, past the file system
//!  ── reboot ──
//!  initramfs hook       the root file system is looked into without its journal; capture begins before it is mounted; carry.bin is
//!                       checked → early.json in run_dir
//!  agent starts         early.json names the groups that go on as if the host had not been away; carry.bin is made void first
//! ```
//!
//! A group is carried over when **all** of this holds; otherwise it is compared as after a crash, which costs a read of its disks and is
//! always right:
//!
//! - its state was written by the hook, whole (checksum), in the boot before this one;
//! - capture was there before the disk's first write of this boot: the kernel's own count of writes and discards was zero after capture
//!   had begun. Mounting ext4 or XFS writes even when it is mounted read-only, so the hook comes before that mount ([`crate::premount`]); one
//!   after it is for what the first left alone;
//! - the first MiB of each volume, and of each partition in it, is what it was: whoever mounts a file system for writing elsewhere (a rescue system)
//!   changes its superblock there. What such a system writes without touching these, as to a logical volume, is not found out: after one,
//!   `holdfast-agent resync`.
//! - no disk of it is a member of an md array: the array writes its superblocks after the hook.
//!
//! # Format of carry.bin
//!
//! Its blocks are marked in every state that is written to it: on a protected disk they are copied after the reboot like anything else.
//!
//! Magic, length and CRC-32 of what follows (little endian, 8 + 8 + 4 bytes), then JSON of [`Carried`]; the machine's states in
//! it carry their own checksums. Zeroes to the end of [`FILE_BYTES`]. The file is written whole with zeroes when it is made, so that its blocks are
//! where they will be and are read back as they are.
//!
//! # Power loss
//!
//! A torn write by the hook has a wrong checksum. The agent makes the file void, durably, before it acts on what it said: a crash from
//! then on finds nothing.

use crate::{
    capture::{Capture, CaptureError, Captured, Op, Target, TargetId},
    clock,
    disks::{Class, Disks},
    extents,
    state::{GroupRecord, StateDir, StateError},
};
use durable::AlignedBuf;
use model::{Extent, GapReason, GroupId, SECTOR, SyncMode, VolumeId};
use replication::{Action, Event, Lost, Now, Source, SourceConfig};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Room for the states: 2 MiB of map for each TiB in the worst case, a few bytes for each run of marks in most.
pub const FILE_BYTES: u64 = 8 << 20;
const MAGIC: &[u8; 8] = b"HFCARRY1";
const HEAD: usize = 20;
const FINGERPRINT_BYTES: u64 = 1 << 20;
const PAGE: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    #[error("could not {what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent left no plan in this boot: it was not stopped in order")]
    NoPlan,
    #[error("{} cannot be understood", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("it is not known where carry.bin lies")]
    Place(#[source] extents::ExtentsError),
    #[error("carry.bin lies in memory, which a reboot takes")]
    InMemory,
    #[error("the states take {bytes} bytes, carry.bin has room for {FILE_BYTES}")]
    TooLarge { bytes: usize },
    #[error("could not use the state directory")]
    State(#[from] StateError),
    #[error("capture cannot be gone on with")]
    Capture(#[from] CaptureError),
    #[error("could not look at the disks")]
    Disks(#[from] crate::disks::DisksError),
    #[error("carry.bin holds nothing: {0}")]
    Void(&'static str),
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CarryError {
    let path = path.to_owned();
    move |source| CarryError::File { what, path, source }
}

/// Where carry.bin lies; in run_dir, which outlives the file systems.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    boot_id: String,
    disk: String,
    /// Start and length in sectors.
    extents: Vec<(u64, u64)>,
}

/// One group's state as of the last moment before the reboot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedGroup {
    pub group: GroupId,
    /// Of the source machine, in hexadecimal.
    pub state: String,
    /// BLAKE3 of the first MiB of each volume and of each partition in it, in their order.
    pub fingerprints: Vec<(VolumeId, String)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Carried {
    /// The boot that ended with this.
    pub boot_id: String,
    pub groups: Vec<CarriedGroup>,
}

impl Carried {
    pub fn encode(&self) -> Result<Vec<u8>, CarryError> {
        let body = serde_json::to_vec(self).map_err(|source| CarryError::Json { path: "carry.bin".into(), source })?;
        if body.len() + HEAD > FILE_BYTES as usize {
            return Err(CarryError::TooLarge { bytes: body.len() });
        }
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&(body.len() as u64).to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, CarryError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(CarryError::Void("it was not written at the last shutdown"))?;
        let short = CarryError::Void("it is cut short");
        let Some((len, rest)) = rest.split_first_chunk::<8>() else { return Err(short) };
        let Some((crc, rest)) = rest.split_first_chunk::<4>() else { return Err(short) };
        let len = usize::try_from(u64::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let Some(body) = rest.get(..len) else { return Err(short) };
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(CarryError::Void("its checksum is wrong: the last shutdown was cut short"));
        }
        serde_json::from_slice(body).map_err(|source| CarryError::Json { path: "carry.bin".into(), source })
    }
}

/// The disks of all groups as they are told to the kernel half, and one to calibrate it on.
pub fn targets(disks: &Disks, records: &[GroupRecord]) -> Vec<(PathBuf, Target)> {
    let mut out: Vec<(PathBuf, Target)> = Vec::new();
    // Mirrored volumes are not captured here: nobody would take what their disks' writes leave in the kernel.
    for record in records.iter().filter(|r| !r.sync) {
        // A group with a disk that is not there is not captured: the agent says why when it runs.
        let Ok(placed) = place(disks, record) else { continue };
        for p in placed {
            let Some(device) = disks.get(&p.disk) else { continue };
            let at = out.iter().position(|(_, t)| t.disk == device.number).unwrap_or_else(|| {
                let target =
                    Target { disk: device.number, sectors: device.sectors, ranges: Vec::new(), skips: Vec::new() };
                out.push((device.node(), target));
                out.len() - 1
            });
            out[at].1.ranges.push(p.range);
            let skips = record.skips.iter().filter(|(disk, ..)| *disk == p.disk);
            out[at].1.skips.extend(skips.map(|(_, start, len)| Extent::new(*start, *len)));
        }
    }
    for (_, target) in &mut out {
        target.ranges.sort();
        target.ranges.dedup();
        target.skips.sort();
        target.skips.dedup();
    }
    out
}

/// What the initramfs hook found, for the agent of this boot.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Early {
    pub boot_id: String,
    /// Groups that were captured before the first write of this boot, and whose disks are as they were left.
    pub groups: Vec<GroupId>,
    /// Of the others, why not; for the log.
    pub refused: Vec<(GroupId, String)>,
}

fn carry_path(state: &StateDir) -> PathBuf {
    state.path("carry.bin")
}
fn plan_path(run: &Path) -> PathBuf {
    run.join("carry.plan")
}
fn early_path(run: &Path) -> PathBuf {
    run.join("early.json")
}

fn put_json(path: &Path, value: &impl Serialize) -> Result<(), CarryError> {
    let text = serde_json::to_vec(value).map_err(|source| CarryError::Json { path: path.to_owned(), source })?;
    crate::state::write_secret(path, &text).map_err(CarryError::State)
}

fn get_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>, CarryError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| CarryError::Json { path: path.to_owned(), source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(file_error("read", path)(e)),
    }
}

/// When the agent stops in order: makes sure of carry.bin and says where it lies. Nothing is carried over without.
pub fn plan(state: &StateDir, run: &Path, boot_id: &str, disks: &Disks) -> Result<(), CarryError> {
    let path = carry_path(state);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(file_error("open", &path))?;
    if extents::in_memory(&file) {
        return Err(CarryError::InMemory);
    }
    let whole = file.metadata().map_err(file_error("look at", &path))?.len() == FILE_BYTES;
    if !whole {
        let zeroes = vec![0; 1 << 20];
        file.set_len(0).map_err(file_error("empty", &path))?;
        for i in 0..FILE_BYTES >> 20 {
            file.write_all_at(&zeroes, i << 20).map_err(file_error("write", &path))?;
        }
    }
    void(&file).map_err(file_error("write", &path))?;
    let (disk, extents) = extents::on_disk(disks, &file).map_err(CarryError::Place)?;
    let extents = extents.iter().map(|e| (e.start(), e.sectors.0)).collect();
    put_json(&plan_path(run), &Plan { boot_id: boot_id.to_owned(), disk, extents })
}

/// Durably.
fn void(file: &File) -> io::Result<()> {
    file.write_all_at(&[0; PAGE], 0)?;
    file.sync_all()
}

/// A volume of a group on a disk: which, and the range of the disk.
struct Placed {
    volume: VolumeId,
    disk: String,
    range: Extent,
}

fn place(disks: &Disks, record: &GroupRecord) -> Result<Vec<Placed>, String> {
    record
        .volumes
        .iter()
        .map(|v| {
            let device = crate::engine::find_volume(disks, v).map_err(|e| crate::error_chain(&e))?;
            let (disk, start) = match &device.class {
                Class::Partition { of, start } => (of.clone(), *start),
                _ => (device.name.clone(), 0),
            };
            if disks.iter().any(|d| matches!(d.class, Class::Md { .. }) && lies_on(disks, &d.name, &disk)) {
                return Err(format!("/dev/{disk} is a member of an md array"));
            }
            Ok(Placed { volume: v.id, disk, range: Extent::new(start, device.sectors) })
        })
        .collect()
}

/// Whether a device lies on a disk or on one of its partitions, at any depth.
fn lies_on(disks: &Disks, device: &str, disk: &str) -> bool {
    let Some(d) = disks.get(device) else { return false };
    if device == disk || matches!(&d.class, Class::Partition { of, .. } if of == disk) {
        return true;
    }
    d.slaves.iter().any(|s| s != device && lies_on(disks, s, disk))
}

fn fingerprint(disks: &Disks, placed: &Placed) -> io::Result<String> {
    let node = disks.get(&placed.disk).map(|d| d.node()).ok_or(io::ErrorKind::NotFound)?;
    let file = crate::reader::open(&node)?;
    let mut parts = vec![placed.range];
    parts.extend(disks.iter().filter_map(|d| match &d.class {
        Class::Partition { of, start } if *of == placed.disk => {
            Some(Extent::new(*start, d.sectors)).filter(|p| placed.range.contains(p))
        }
        _ => None,
    }));
    parts.sort();
    parts.dedup();
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        let len = FINGERPRINT_BYTES.min(part.bytes()) as usize;
        let mut buf = aligned(&vec![0; len.next_multiple_of(SECTOR as usize)]);
        file.read_exact_at(buf.as_mut_slice(), part.start() * SECTOR)?;
        hasher.update(buf.as_slice());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn aligned(bytes: &[u8]) -> AlignedBuf {
    let mut buf = AlignedBuf::with_capacity(bytes.len());
    buf.extend_from_slice(bytes);
    buf
}

/// Everything that the kernel half has and nobody has stored, by target.
fn drain(capture: &mut dyn Capture) -> Result<Vec<(TargetId, Extent)>, CaptureError> {
    let mut out = Vec::new();
    loop {
        let mut events = Vec::new();
        let polled = capture.poll(4 << 20, true, clock::mono(), &mut events)?;
        if !polled.more {
            capture.flush_losses(&mut events)?;
        }
        let nothing = events.is_empty();
        for event in events {
            match event {
                Captured::Request(request) if request.op != Op::Flush => {
                    out.extend(request.extents.iter().map(|e| (request.target, *e)));
                }
                Captured::Lost { target, extents, .. } => out.extend(extents.iter().map(|e| (target, *e))),
                Captured::Request(_) | Captured::Done { .. } => {}
            }
        }
        if nothing && !polled.more {
            return Ok(out);
        }
    }
}

/// A stored state with what was written since. A state that ended clean and to which nothing is added stays clean.
pub fn add_to_state(record: &GroupRecord, state: &[u8], since: Vec<(VolumeId, Extent)>) -> Result<Vec<u8>, String> {
    let config = SourceConfig::new(record.spec.id, record.spec.volumes.clone(), SyncMode::Async);
    let now = Now { mono: clock::mono(), wall_us: clock::wall_us() };
    let mut actions = Vec::new();
    let missed = (!since.is_empty()).then_some((GapReason::AgentRestart, Lost::Extents(since)));
    let restored = Source::restore_after(config, state, missed.as_ref(), now, &mut actions);
    let mut source = restored.map_err(|e| crate::error_chain(&e))?;
    // What it wants stored is stored by what comes of this.
    while let Some(at) = actions.iter().position(|a| matches!(a, Action::Persist { .. })) {
        if let Action::Persist { serial, .. } = actions.swap_remove(at) {
            source.on(Event::Persisted { serial }, now, &mut actions);
        }
    }
    Ok(source.final_state().0)
}

/// A group and whether it is carried over; else why not.
pub type WrittenOut = (GroupId, Result<(), String>);

/// The shutdown hook's work. Answers what was written for each group, or why not. `called`: the name under which the boot that ends
/// is remembered.
pub fn write_out(
    state: &StateDir,
    run: &Path,
    boot_id: &str,
    called: &str,
    capture: &mut dyn Capture,
) -> Result<Vec<WrittenOut>, CarryError> {
    let disks = Disks::here()?;
    let plan = get_json::<Plan>(&plan_path(run))?.filter(|plan| plan.boot_id == boot_id);
    let plan = plan.ok_or(CarryError::NoPlan)?;
    let records = state.load_groups()?;
    let targets = capture.targets();
    let since = drain(capture)?;
    let mut carried = Carried { boot_id: called.to_owned(), groups: Vec::new() };
    let mut said = Vec::new();
    for record in &records {
        let group = record.spec.id;
        let made = place(&disks, record).and_then(|placed| {
            let run = state.load_run(group, boot_id).ok_or("the agent stored no state of it in this boot")?;
            let mut added = Vec::new();
            for p in &placed {
                let number = disks.get(&p.disk).map(|d| d.number);
                let target = targets
                    .iter()
                    .find(|(_, t)| Some(t.disk) == number && t.ranges.iter().any(|r| r.contains(&p.range)))
                    .ok_or_else(|| format!("/dev/{} was not captured to the end", p.disk))?;
                let of_it = since.iter().filter(|(id, _)| *id == target.0).filter_map(|(_, e)| p.range.intersect(e));
                added.extend(of_it.map(|e| (p.volume, Extent::new(e.start() - p.range.start(), e.sectors.0))));
                // What is written below, past the file system, is caught by nobody any more: the box must get it when it lies on a disk of
                // the group.
                let own =
                    plan.extents.iter().filter(|_| p.disk == plan.disk).map(|(start, len)| Extent::new(*start, *len));
                let own = own.filter_map(|e| p.range.intersect(&e));
                added.extend(own.map(|e| (p.volume, Extent::new(e.start() - p.range.start(), e.sectors.0))));
            }
            let bytes = add_to_state(record, &run.source, added)?;
            let fingerprints = placed
                .iter()
                .map(|p| fingerprint(&disks, p).map(|f| (p.volume, f)))
                .collect::<io::Result<_>>()
                .map_err(|e| format!("could not read its first MiB: {e}"))?;
            Ok(CarriedGroup { group, state: data_encoding::HEXLOWER.encode(&bytes), fingerprints })
        });
        said.push((group, made.map(|group| carried.groups.push(group))));
    }
    write_raw(&disks, &plan, &carried.encode()?)?;
    Ok(said)
}

/// A boot ends of which nothing is carried over: what an earlier one left in carry.bin, if no agent has taken it up since, must not be
/// taken for what this one leaves.
pub fn forget(state: &StateDir) -> Result<(), CarryError> {
    let path = carry_path(state);
    let file = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(file_error("open", &path))?,
    };
    let disks = Disks::here()?;
    let (disk, extents) = extents::on_disk(&disks, &file).map_err(CarryError::Place)?;
    let extents = extents.iter().map(|e| (e.start(), e.sectors.0)).collect();
    write_raw(&disks, &Plan { boot_id: String::new(), disk, extents }, &[0; PAGE])
}

/// To the file's blocks on the disk, past the file system, which is read-only by now.
fn write_raw(disks: &Disks, plan: &Plan, bytes: &[u8]) -> Result<(), CarryError> {
    let node = disks.get(&plan.disk).map_or_else(|| Path::new("/dev").join(&plan.disk), |d| d.node());
    let disk = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_SYNC | libc::O_CLOEXEC)
        .open(&node)
        .map_err(file_error("open", &node))?;
    // Behind the head first, the head last: a torn write never looks whole even if the checksum were lucky.
    let mut padded = bytes.to_vec();
    padded.resize(padded.len().next_multiple_of(PAGE), 0);
    let mut pieces: Vec<(u64, AlignedBuf)> = Vec::new();
    let mut from = 0usize;
    for (start, len) in &plan.extents {
        let n = ((len * SECTOR) as usize).min(padded.len() - from);
        if n == 0 {
            break;
        }
        pieces.push((start * SECTOR, aligned(&padded[from..from + n])));
        from += n;
    }
    if from < padded.len() {
        return Err(CarryError::TooLarge { bytes: bytes.len() });
    }
    for (at, piece) in pieces.iter().rev() {
        disk.write_all_at(piece.as_slice(), *at).map_err(file_error("write", &node))?;
    }
    Ok(())
}

fn read_file(state: &StateDir) -> Result<Carried, CarryError> {
    let path = carry_path(state);
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(FILE_BYTES).read_to_end(&mut bytes))
        .map_err(file_error("read", &path))?;
    Carried::decode(&bytes)
}

/// Writes and discards that a disk has completed since it came, and writes under way, as the kernel counts them.
pub fn writes_so_far(sys: &Path, disk: &str) -> Option<u64> {
    let numbers = |file: &str| -> Option<Vec<u64>> {
        let text = fs::read_to_string(sys.join("block").join(disk).join(file)).ok()?;
        text.split_whitespace().map(|f| f.parse().ok()).collect()
    };
    let (stat, under_way) = (numbers("stat")?, numbers("inflight")?);
    // 5th: writes completed; 12th, where there is one: discards. Under way: reads, then writes.
    Some(stat.get(4)? + stat.get(11).unwrap_or(&0) + under_way.get(1)?)
}

/// The initramfs hook's work, once capture of all groups has begun: which of them may be carried over.
pub fn check_early(state: &StateDir, run: &Path, boot_id: &str, sys: &Path) -> Result<Early, CarryError> {
    let disks = Disks::here()?;
    let records = state.load_groups()?;
    let carried = read_file(state);
    let mut early = Early { boot_id: boot_id.to_owned(), ..Early::default() };
    for record in &records {
        let group = record.spec.id;
        let fits = || -> Result<(), String> {
            let carried = carried.as_ref().map_err(|e| crate::error_chain(e))?;
            if carried.boot_id == boot_id {
                return Err("carry.bin is of this very boot".to_owned());
            }
            let of_group = carried.groups.iter().find(|g| g.group == group);
            let of_group = of_group.ok_or("it was not carried over by the last shutdown")?;
            for p in place(&disks, record)? {
                match writes_so_far(sys, &p.disk) {
                    Some(0) => {}
                    Some(n) => return Err(format!("/dev/{} had {n} writes before capture began", p.disk)),
                    None => return Err(format!("the kernel does not count the writes of /dev/{}", p.disk)),
                }
                let now = fingerprint(&disks, &p).map_err(|e| format!("could not read its first MiB: {e}"))?;
                if !of_group.fingerprints.contains(&(p.volume, now)) {
                    return Err(format!("/dev/{} was changed since the last shutdown", p.disk));
                }
            }
            Ok(())
        };
        match fits() {
            Ok(()) => early.groups.push(group),
            Err(why) => early.refused.push((group, why)),
        }
    }
    put_json(&early_path(run), &early)?;
    Ok(early)
}

/// What an agent that starts may go on with. carry.bin is void from then on, whatever it held.
pub fn take(state: &StateDir, run: &Path, boot_id: &str) -> Result<Vec<(GroupId, Vec<u8>)>, CarryError> {
    let path = carry_path(state);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let carried = read_file(state);
    let file = OpenOptions::new().write(true).open(&path).map_err(file_error("open", &path))?;
    void(&file).map_err(file_error("write", &path))?;
    let Some(early) = get_json::<Early>(&early_path(run))?.filter(|early| early.boot_id == boot_id) else {
        return Ok(Vec::new());
    };
    for (group, why) in &early.refused {
        tracing::info!(%group, %why, "not carried over the reboot: it is compared");
    }
    let carried = carried?;
    let states = carried.groups.iter().filter(|g| early.groups.contains(&g.group));
    Ok(states.filter_map(|g| Some((g.group, data_encoding::HEXLOWER.decode(g.state.as_bytes()).ok()?))).collect())
}

/// For the hooks' own messages: the console is all they have.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "holdfast-agent: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{GroupPolicy, GroupSpec, Sectors, SourceSeq, StreamId, VolumeSpec};
    use wire::{Ack, AckFlags, Credit, Resume};

    fn carried() -> Carried {
        let group = CarriedGroup {
            group: GroupId([1; 16]),
            state: "0a0b".into(),
            fingerprints: vec![(VolumeId(0), "ab".into())],
        };
        Carried { boot_id: "b1".into(), groups: vec![group] }
    }

    #[test]
    fn what_is_torn_or_void_is_refused() {
        let bytes = carried().encode().unwrap();
        assert_eq!(Carried::decode(&bytes).unwrap(), carried());
        let mut padded = bytes.clone();
        padded.resize(FILE_BYTES as usize, 0);
        assert_eq!(Carried::decode(&padded).unwrap(), carried());
        assert!(matches!(Carried::decode(&[0; 8192]), Err(CarryError::Void(_))));
        for cut in 0..bytes.len() {
            assert!(Carried::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            let mut flipped = bytes.clone();
            flipped[cut] ^= 4;
            assert!(Carried::decode(&flipped).is_err(), "flipped at {cut}");
        }
        let mut large = carried();
        large.groups[0].state = "0".repeat(FILE_BYTES as usize);
        assert!(matches!(large.encode(), Err(CarryError::TooLarge { .. })));
    }

    fn record() -> GroupRecord {
        let volume =
            VolumeSpec { id: VolumeId(0), name: "/dev/sdb".into(), sectors: Sectors(128 * 100), identity: "s".into() };
        let spec = GroupSpec {
            id: GroupId([1; 16]),
            name: "g".into(),
            host: None,
            volumes: vec![volume],
            policy: GroupPolicy::default(),
        };
        GroupRecord { spec, volumes: vec![], skips: vec![], sync: false, unknown: Default::default() }
    }

    /// A machine whose stream is complete on the box.
    fn clean_state() -> Vec<u8> {
        let record = record();
        let config = SourceConfig::new(record.spec.id, record.spec.volumes, SyncMode::Async);
        let now = Now::default();
        let mut out = Vec::new();
        let mut source = Source::new(config, StreamId([2; 16]), Some(&[]), now, &mut out);
        let credit = Credit { bytes: 1 << 30, records: 1 << 20 };
        source.on(Event::Connected, now, &mut out);
        source.on(Event::Ready { resume: Resume::Restart, credit }, now, &mut out);
        for _ in 0..5 {
            let drains: Vec<Action> = std::mem::take(&mut out);
            for action in drains {
                match action {
                    Action::Drain { barrier } => source.on(Event::Drained { barrier }, now, &mut out),
                    Action::Persist { serial, .. } => source.on(Event::Persisted { serial }, now, &mut out),
                    Action::Send { last, .. } => {
                        let ack = Ack { written: last, durable: last, credit, flags: AckFlags::NONE };
                        source.on(Event::Ack(ack), now, &mut out);
                    }
                    _ => {}
                }
            }
        }
        let (state, clean) = source.final_state();
        assert!(clean, "{:?}", source.status());
        state
    }

    fn restored(state: &[u8]) -> replication::SourceStatus {
        let record = record();
        let config = SourceConfig::new(record.spec.id, record.spec.volumes, SyncMode::Async);
        Source::restore(config, state, Now::default(), &mut Vec::new()).unwrap().status()
    }

    #[test]
    fn a_state_carries_exactly_what_was_written_since() {
        let clean = clean_state();
        let same = restored(&add_to_state(&record(), &clean, vec![]).unwrap());
        assert_eq!((same.gap, same.dirty.0), (None, 0), "nothing was written: no gap");
        assert!(same.next > Some(SourceSeq(1)));
        let since = vec![(VolumeId(0), Extent::new(130, 1)), (VolumeId(0), Extent::new(1279, 2))];
        let added = restored(&add_to_state(&record(), &clean, since).unwrap());
        assert_eq!(added.gap, Some(GapReason::AgentRestart));
        assert_eq!(added.dirty.0, 3 * 65536, "granules 1, 9 and 10");
        // And again, on top of what was there.
        let state = add_to_state(&record(), &clean, vec![(VolumeId(0), Extent::new(0, 1))]).unwrap();
        let both = restored(&add_to_state(&record(), &state, vec![(VolumeId(0), Extent::new(200, 1))]).unwrap());
        assert_eq!(both.dirty.0, 2 * 65536);
        assert!(add_to_state(&record(), b"rubbish", vec![]).is_err());
    }

    #[test]
    fn the_kernels_count_of_writes() {
        let dir = tempfile::tempdir().unwrap();
        let count = |stat: &str, inflight: &str| {
            fs::create_dir_all(dir.path().join("block/sda")).unwrap();
            fs::write(dir.path().join("block/sda/stat"), stat).unwrap();
            fs::write(dir.path().join("block/sda/inflight"), inflight).unwrap();
            writes_so_far(dir.path(), "sda")
        };
        assert_eq!(count("  10 0 80 1 0 0 0 0 3 1 1 0 0 0 0 0 0\n", "       3        0\n"), Some(0), "reads only");
        assert_eq!(count("  10 0 80 1 3 0 24 0 0 1 1 2 0 16 0 0 0\n", "0 0"), Some(5));
        assert_eq!(count("  10 0 80 1 0 0 0 0 1 1 1\n", "0 1"), Some(1), "one under way");
        assert_eq!(count("rubbish", "0 0"), None);
        assert_eq!(count("10 0 80 1 0", "0"), None);
        assert_eq!(writes_so_far(dir.path(), "sdb"), None);
    }
}
