//! Bringing groups to work: finding their disks again, capture, spool, machine, connection.

use super::group::{self, Group, Running, VolumeAt};
use super::scribe::Key;
use super::{Engine, EngineError, Input, READERS};
use crate::{
    capture::{CaptureError, Captured, DevNo, LostWhy, Target, TargetId},
    config::{Config, CopyWhat},
    disks::{Class, Device, Disks, identity::Same},
    link::LinkId,
    reader::{self, Pool},
    state::{GroupRecord, StateError, VolumeRecord},
    survey,
};
use model::{ByteLen, Extent, GapReason, StreamId, SyncMode};
use replication::{Lost, Source, SourceConfig};
use std::{collections::HashMap, io, path::PathBuf, sync::Arc};

/// Requests must fit into what the kernel half walks.
const MAX_SECTORS_KB: u32 = 1024;

/// 10 MiB of memory in the worst case, for a spool full of small writes.
const SPOOL_RECORDS_MAX: usize = 65_536;

/// Why a group's volume cannot be protected as it is now.
#[derive(Debug, thiserror::Error)]
pub enum VolumeRefusal {
    #[error("{device} ({identity}) is missing: connect the disk again, or unprotect the group")]
    Missing { device: String, identity: String },
    #[error(
        "{device} is another disk than the one that was protected ({had} then, {has} now): put the old one back, or unprotect the group \
         and protect it anew"
    )]
    Replaced { device: String, had: String, has: String },
    #[error("{device} shrank from {} to {}: what was protected is gone; unprotect the group and protect it anew", ByteLen(had * 512), ByteLen(has * 512))]
    Shrank { device: String, had: u64, has: u64 },
    #[error("{device} grew from {} to {}: unprotect the group and protect it anew to protect all of it", ByteLen(had * 512), ByteLen(has * 512))]
    Grew { device: String, had: u64, has: u64 },
    #[error("{device} cannot be captured any more: it has no request queue")]
    NoQueue { device: String },
    #[error("could not open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The device that a record means, whatever it is called now.
pub fn find<'a>(disks: &'a Disks, record: &VolumeRecord) -> Result<&'a Device, VolumeRefusal> {
    let title = format!("/dev/{}", record.device);
    let named = disks.get(&record.device).filter(|d| d.sectors > 0);
    let same = |d: &Device| record.identity.compare(&d.identity);
    let device = match named.map(|d| (d, same(d))) {
        Some((d, Same::Yes)) => d,
        other => match disks.iter().find(|d| d.sectors > 0 && same(d) == Same::Yes) {
            Some(d) => {
                tracing::info!(was = %title, now = %d.title(), "a protected disk has another name now");
                d
            }
            None => match other {
                // Nothing to tell it by: the name has to do.
                Some((d, Same::Unknown)) => d,
                Some((d, _)) => {
                    let (had, has) = (record.identity.to_string(), d.identity.to_string());
                    return Err(VolumeRefusal::Replaced { device: title, had, has });
                }
                None => return Err(VolumeRefusal::Missing { device: title, identity: record.identity.to_string() }),
            },
        },
    };
    let (had, has) = (record.sectors, device.sectors);
    match has.cmp(&had) {
        std::cmp::Ordering::Less => Err(VolumeRefusal::Shrank { device: device.title(), had, has }),
        std::cmp::Ordering::Greater => Err(VolumeRefusal::Grew { device: device.title(), had, has }),
        std::cmp::Ordering::Equal => Ok(device),
    }
}

/// Where a volume's writes are captured.
fn locate(disks: &Disks, device: &Device, id: model::VolumeId) -> Result<VolumeAt, VolumeRefusal> {
    let (disk, start) = match &device.class {
        Class::Partition { of, start } => (disks.get(of).unwrap_or(device), *start),
        _ => (device, 0),
    };
    if !disk.queue {
        return Err(VolumeRefusal::NoQueue { device: disk.title() });
    }
    let path = disk.node();
    let file = reader::open(&path).map_err(|source| VolumeRefusal::Open { path, source })?;
    Ok(VolumeAt {
        id,
        device: device.name.clone(),
        disk: disk.name.clone(),
        range: Extent::new(start, device.sectors),
        file: Arc::new(file),
        target: TargetId(0),
    })
}

/// Lowers the longest request of a disk to what is captured whole; answers what it was.
pub(super) fn clamp_requests(disk: &str) -> Option<(String, u32)> {
    let path = queue_file(disk);
    let was: u32 = std::fs::read_to_string(&path).ok()?.trim().parse().ok()?;
    if was <= MAX_SECTORS_KB {
        return None;
    }
    match std::fs::write(&path, MAX_SECTORS_KB.to_string()) {
        Ok(()) => {
            tracing::info!(
                disk,
                was,
                now = MAX_SECTORS_KB,
                "lowered max_sectors_kb, so that every request is captured whole"
            );
            Some((disk.to_owned(), was))
        }
        Err(e) => {
            // Longer requests are then marked dirty and copied.
            tracing::warn!(disk, error = %e, "could not lower max_sectors_kb; long writes will be copied instead of captured");
            None
        }
    }
}

/// Sets `max_sectors_kb` of a group's disks back to what it was.
pub fn restore_requests(record: &GroupRecord) {
    for (disk, was) in record.volumes.iter().filter_map(|v| v.max_sectors_kb.as_ref()) {
        if let Err(e) = std::fs::write(queue_file(disk), was.to_string()) {
            tracing::warn!(disk, error = %e, "could not set max_sectors_kb back to {was}");
        }
    }
}

fn queue_file(disk: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/{disk}/queue/max_sectors_kb"))
}

pub(super) fn source_config(config: &Config, record: &GroupRecord, spool_max: u64) -> SourceConfig {
    // Only a mirror's leg can make the host wait; what the policy asks for is shown beside what is done.
    let mode = if record.sync { record.spec.policy.mode } else { SyncMode::Async };
    let mut source = SourceConfig::new(record.spec.id, record.spec.volumes.clone(), mode);
    source.spool_bytes_max = spool_max;
    // Each record costs some 150 bytes of memory wherever its payload lies.
    source.spool_records_max = ((spool_max / 8192) as usize).clamp(4096, SPOOL_RECORDS_MAX);
    // A write of 512 bytes takes eight times as much of the ring as it is counted for.
    source.held_bytes_max = u64::from(config.ring_bytes()) / 16;
    source.reads_max = READERS;
    // A mirror answers reads of its local disk's sectors: there the box has to have them all.
    let leaves_out = config.copy == CopyWhat::Allocated && !record.sync;
    source.survey_bytes_min = leaves_out.then_some(survey::BYTES_MIN);
    source
}

/// What was captured before this start, as the kernel half remembers it.
pub(super) struct Before {
    targets: Vec<(TargetId, Target)>,
    resumed: bool,
    /// Of mirrored volumes: where they may have been written since the group's state was stored.
    marks: HashMap<TargetId, Vec<Extent>>,
}

impl Before {
    /// What was written until now was seen by nobody.
    pub(super) fn nothing() -> Self {
        Self { targets: Vec::new(), resumed: false, marks: HashMap::new() }
    }

    pub(super) fn marked(&mut self, marks: HashMap<TargetId, Vec<Extent>>) {
        self.marks = marks;
    }

    /// What was written to a volume and seen by nobody, as far as it is known; all of it may have been when `stored` is not of this boot.
    fn missed(&self, volume: &VolumeAt, stored: bool) -> Vec<Extent> {
        match self.marks.get(&volume.target) {
            _ if stored && self.covers(volume.target, &volume.range) => Vec::new(),
            Some(marks) if stored => marks.clone(),
            _ => vec![Extent::new(0, volume.range.sectors.0)],
        }
    }

    /// Whether nothing of the volume was missed since.
    fn covers(&self, target: TargetId, range: &Extent) -> bool {
        self.resumed && self.targets.iter().any(|(id, t)| *id == target && t.ranges.iter().any(|r| r.contains(range)))
    }

    /// The same for a disk that has not been told to the kernel half again yet.
    fn covers_range(&self, disk: DevNo, sectors: u64, range: &Extent) -> bool {
        let same = |t: &Target| t.disk == disk && t.sectors == sectors;
        self.resumed && self.targets.iter().any(|(_, t)| same(t) && t.ranges.iter().any(|r| r.contains(range)))
    }
}

impl Engine {
    /// Starts every group that does not run and can.
    pub(super) fn start_stopped(&mut self) -> Result<(), EngineError> {
        if self.groups.is_empty() {
            return Ok(());
        }
        let disks = match Disks::here() {
            Ok(disks) => disks,
            Err(e) => {
                let why = crate::error_chain(&e);
                self.groups.iter_mut().filter(|g| g.running.is_none()).for_each(|g| g.stopped = why.clone());
                return Ok(());
            }
        };
        self.start_sync(&disks)?;
        let mut found: HashMap<usize, Vec<VolumeAt>> = HashMap::new();
        for (i, group) in self.groups.iter_mut().enumerate().filter(|(_, g)| g.running.is_none() && !g.record.sync) {
            let volumes: Result<Vec<VolumeAt>, VolumeRefusal> =
                group.record.volumes.iter().map(|v| locate(&disks, find(&disks, v)?, v.id)).collect();
            match volumes {
                Ok(volumes) => {
                    found.insert(i, volumes);
                }
                Err(e) => {
                    let why = crate::error_chain(&e);
                    if group.stopped != why {
                        tracing::error!(group = %group.record.spec.name, %why, "group is stopped");
                        group.stopped = why;
                    }
                }
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        if let Err(e) = self.ensure_capture(&disks, found.values().flatten().next()) {
            let why = crate::error_chain(&e);
            if self.capture_error != why {
                tracing::error!(%why, "nothing can be captured: all groups are stopped");
            }
            for i in found.keys() {
                self.groups[*i].stopped = why.clone();
            }
            self.capture_error = why;
            return Ok(());
        }
        let before = self.before();
        // All groups are known before the first begins, so that the disks are told to the kernel once.
        let mut order: Vec<usize> = found.keys().copied().collect();
        order.sort_unstable();
        let mut all: Vec<(usize, Vec<VolumeAt>)> =
            order.into_iter().filter_map(|i| found.remove(&i).map(|v| (i, v))).collect();
        for (i, _) in &all {
            self.place_spool(&disks, *i);
        }
        let told = match self.forget_uncovered(&disks, &all, &before) {
            Ok(()) => self.tell_targets(&disks, &mut all).map_err(|e| crate::error_chain(&e)),
            Err(e) => Err(crate::error_chain(&e)),
        };
        if let Err(why) = told {
            for (i, _) in &all {
                self.groups[*i].stopped = why.clone();
            }
            self.capture_error = why;
            return Ok(());
        }
        for (i, volumes) in all {
            self.begin_group(i, volumes, &before, false)?;
        }
        self.skips_gone(&before);
        // The agent before may have left disks whose writes are only marked: from now on they are captured, and the marks come first.
        self.capture_data()
    }

    /// Starts capture unless it runs; `on` is a volume whose disk can be read for calibration.
    pub(super) fn ensure_capture(&mut self, disks: &Disks, on: Option<&VolumeAt>) -> Result<(), CaptureError> {
        if self.ctx.capture.is_some() {
            return Ok(());
        }
        let disk = on.and_then(|v| disks.get(&v.disk));
        let node = disk.map(|d| (d.node(), d.number));
        let capture = (self.start_capture)(node.as_ref().map(|(p, n)| (p.as_path(), *n)))?;
        let sender = self.to_self.clone();
        let deliver = move |outcome| {
            // The engine is gone when nobody takes it.
            let _ = sender.send(Input::Read(outcome));
        };
        let pool = Pool::start(READERS, capture.barrier(), deliver).map_err(|source| CaptureError::File {
            what: "start",
            path: "reader threads".to_owned(),
            source,
        })?;
        tracing::info!(backend = capture.name(), resumed = capture.resumed(), "capture");
        self.ctx.capture = Some(capture);
        self.ctx.pool = Some(pool);
        self.capture_error.clear();
        Ok(())
    }

    pub(super) fn before(&self) -> Before {
        match &self.ctx.capture {
            Some(c) => Before { targets: c.targets(), resumed: c.resumed(), marks: HashMap::new() },
            None => Before::nothing(),
        }
    }

    /// Makes the kernel half capture exactly the disks of what runs and of `new`; fills in the targets' ids.
    pub(super) fn tell_targets(
        &mut self,
        disks: &Disks,
        new: &mut [(usize, Vec<VolumeAt>)],
    ) -> Result<(), CaptureError> {
        let number = |name: &str| disks.get(name).map(|d| (d.number, d.sectors));
        let running = self
            .groups
            .iter()
            .filter(|g| !g.record.sync)
            .filter_map(|g| g.running.as_ref().map(|r| (&r.volumes[..], &g.record.skips[..])));
        let fresh = new.iter().map(|(i, v)| (&v[..], &self.groups[*i].record.skips[..]));
        let named = group::targets(running.chain(fresh), &number);
        let Some(capture) = &mut self.ctx.capture else { return Ok(()) };
        let list: Vec<Target> = named.iter().map(|(_, t)| t.clone()).collect();
        let ids = capture.set_targets(&list)?;
        let id_of: HashMap<&str, TargetId> = named.iter().map(|(n, _)| n.as_str()).zip(ids).collect();
        let set = |volume: &mut VolumeAt| {
            if let Some(id) = id_of.get(volume.disk.as_str()) {
                volume.target = *id;
            }
        };
        new.iter_mut().flat_map(|(_, v)| v).for_each(set);
        self.groups
            .iter_mut()
            .filter(|g| !g.record.sync)
            .filter_map(|g| g.running.as_mut())
            .flat_map(|r| &mut r.volumes)
            .for_each(set);
        Ok(())
    }

    /// Makes spool, machine and connection of a group whose targets are set. `new`: protected just now.
    pub(super) fn begin_group(
        &mut self,
        i: usize,
        volumes: Vec<VolumeAt>,
        before: &Before,
        new: bool,
    ) -> Result<(), EngineError> {
        let id = self.groups[i].id();
        let (spool, spool_max, note) = self.make_spool(i, &volumes);
        let config = source_config(&self.config, &self.groups[i].record, spool_max);
        let mut actions = Vec::new();
        let source = self.make_source(i, config, new, &volumes, before, &mut actions)?;
        let link = self.link(LinkId::Stream(id))?;
        let mut running = Running::new(source, spool, link, volumes, spool_max, note);
        running.begin(&mut self.ctx, id, actions);
        let rate = if self.config.copy_schedule.is_empty() { self.config.copy_mib_s } else { self.copy_mib_s };
        running.on(&mut self.ctx, id, super::copy_rate(rate));
        self.groups[i].running = Some(running);
        self.groups[i].stopped.clear();
        Ok(())
    }

    /// The machine as it was, if that can be gone on with, with what must be copied because nobody saw what happened to it; else a new
    /// stream.
    fn make_source(
        &mut self,
        i: usize,
        config: SourceConfig,
        new: bool,
        volumes: &[VolumeAt],
        before: &Before,
        actions: &mut Vec<replication::Action>,
    ) -> Result<Source, EngineError> {
        let id = self.groups[i].id();
        let now = group::now();
        let fresh = |config: SourceConfig, actions: &mut Vec<replication::Action>| -> Result<Source, EngineError> {
            let stream = StreamId(crate::state::random_128().map_err(EngineError::System)?);
            Ok(Source::new(config, stream, None, now, actions))
        };
        if new {
            return fresh(config, actions);
        }
        let run = self.ctx.state.load_run(id, &self.ctx.boot_id);
        let carried = self.carried.iter().position(|(group, _)| *group == id).map(|at| self.carried.swap_remove(at).1);
        if run.is_none() && carried.is_some() {
            tracing::info!(group = %id, "goes on over the reboot: only what was written on the way is copied");
        }
        // Either way nothing was missed while capture was there.
        let same_boot = run.is_some() || carried.is_some();
        let Some(stored) = run.map(|r| r.source).or(carried).or_else(|| self.ctx.state.load_boot(id)) else {
            tracing::warn!(group = %id, "nothing is stored of this group: everything is copied");
            return fresh(config, actions);
        };
        let missed: Vec<_> =
            volumes.iter().flat_map(|v| before.missed(v, same_boot).into_iter().map(|extent| (v.id, extent))).collect();
        let bytes: u64 = missed.iter().map(|(_, e)| e.bytes()).sum();
        let missed = (bytes > 0).then_some((GapReason::Verify, Lost::Extents(missed)));
        match Source::restore_after(config.clone(), &stored, missed.as_ref(), now, actions) {
            Ok(source) => {
                if bytes > 0 {
                    tracing::warn!(group = %id, bytes, same_boot, "what was written while nobody captured is not known: these places are compared");
                }
                Ok(source)
            }
            Err(e) => {
                tracing::warn!(group = %id, error = %crate::error_chain(&e), "the stored state of this group cannot be used: everything is copied");
                actions.clear();
                fresh(config, actions)
            }
        }
    }

    /// Forgets what the agent before stored in this boot of groups whose writes somebody missed, **before** capture begins for them: should we
    /// die right after that, the next agent finds capture there and would take the old state for whole.
    fn forget_uncovered(
        &self,
        disks: &Disks,
        all: &[(usize, Vec<VolumeAt>)],
        before: &Before,
    ) -> Result<(), StateError> {
        let covered = |v: &VolumeAt| {
            disks.get(&v.disk).is_some_and(|disk| before.covers_range(disk.number, disk.sectors, &v.range))
        };
        for (i, volumes) in all {
            if !volumes.iter().all(covered) {
                self.ctx.state.forget_run(self.groups[*i].id())?;
            }
        }
        Ok(())
    }

    /// Extents that were left out of capture before and are not any more may hold something else now.
    pub(super) fn skips_gone(&mut self, before: &Before) {
        let Some(capture) = &self.ctx.capture else { return };
        let now = capture.targets();
        let mut gone = Vec::new();
        for (id, old) in &before.targets {
            let kept: &[Extent] = now.iter().find(|(n, _)| n == id).map_or(&[], |(_, t)| &t.skips);
            let lost: Vec<Extent> = old.skips.iter().filter(|s| !kept.contains(s)).copied().collect();
            if !lost.is_empty() {
                gone.push(Captured::Lost { target: *id, extents: lost, why: LostWhy::Unmatched });
            }
        }
        if !gone.is_empty() {
            let at = self.batches.back().map_or(crate::capture::Position(0), |b| b.position);
            self.hand_in(at, gone);
        }
    }

    /// Starts a group that the box has just accepted.
    pub(super) fn add_group(&mut self, record: GroupRecord, disks: &Disks) -> Result<(), String> {
        let chain = |e: &dyn std::error::Error| crate::error_chain(e);
        if record.sync {
            return self.add_sync_group(record, disks);
        }
        let mut volumes = Vec::new();
        for v in &record.volumes {
            let device = disks.get(&v.device).ok_or_else(|| format!("/dev/{} went away", v.device))?;
            volumes.push(locate(disks, device, v.id).map_err(|e| chain(&e))?);
        }
        self.ensure_capture(disks, volumes.first()).map_err(|e| chain(&e))?;
        self.capture_data().map_err(|e| chain(&e))?;
        let before = self.before();
        self.groups.push(Group { record, running: None, stopped: String::new() });
        let i = self.groups.len() - 1;
        self.place_spool(disks, i);
        let mut new = vec![(i, volumes)];
        if let Err(e) = self.tell_targets(disks, &mut new) {
            self.groups.pop();
            return Err(chain(&e));
        }
        let Some((i, volumes)) = new.pop() else { return Ok(()) };
        self.begin_group(i, volumes, &before, true).map_err(|e| chain(&e))?;
        self.close_what_feeds_itself();
        if !self.store_groups() {
            return Err("could not store the list of groups; see the log".to_owned());
        }
        Ok(())
    }

    /// Takes a group out: capture first, then everything that is kept of it.
    pub(super) fn remove_group(&mut self, i: usize) {
        let group = self.groups.remove(i);
        let id = group.id();
        drop(group.running);
        self.stop_watching(id);
        self.take_out_mirrors(Some(id));
        restore_requests(&group.record);
        self.ctx.open_losses.retain(|(g, _)| *g != id);
        let before = self.before();
        if self.groups.iter().all(|g| g.running.is_none() || g.record.sync) {
            self.stop_capture();
        } else if let Ok(disks) = Disks::here() {
            if let Err(e) = self.tell_targets(&disks, &mut []) {
                tracing::error!(error = %crate::error_chain(&e), "could not take disks out of capture");
            }
            self.skips_gone(&before);
        }
        self.store_groups();
        self.ctx.scribe.put(Key::Gone(id), move |dir| {
            if let Err(e) = dir.forget_group(id) {
                tracing::warn!(group = %id, error = %crate::error_chain(&e), "could not remove everything of the group");
            }
            None
        });
        self.settle();
    }

    fn stop_capture(&mut self) {
        if let Some(mut capture) = self.ctx.capture.take()
            && let Err(e) = capture.remove()
        {
            tracing::error!(error = %crate::error_chain(&e), "could not take capture out of the kernel");
        }
        self.ctx.pool = None;
        // What waits is handed out with the next round: nothing is captured any more that it could wait for.
        self.batches.clear();
    }
}
