//! Where the groups' spool files lie, and that capture leaves them out.
//!
//! A file's places are told to the kernel half before the group begins, whether or not their disk is protected by then: the next
//! group may protect it. They are looked at again every [`LOOK_AGAIN_MS`]: a file or volume that somebody moved is left out at its new place,
//! what lies at the old one is copied, and a file whose place cannot be told any more is written no more. A file whose place was never
//! told, because nobody protects what it lies on, is written no more either once somebody does.

use super::Engine;
use super::group::VolumeAt;
use super::scribe::Key;
use crate::{
    capture::{DevNo, bpf::layout::MAX_SKIPS},
    disks::Disks,
    extents::{self, ExtentsError, Here},
    spool::{self, Spool},
};
use model::{Extent, GroupId, MonoTime};
use std::{fs::File, os::unix::fs::MetadataExt, path::Path};

/// Moving a volume takes longer, and by then nothing else lies where the file lay.
const LOOK_AGAIN_MS: u64 = 10_000;

/// Why a group has no spool file.
#[derive(Debug, thiserror::Error)]
enum NoFile {
    #[error("the state directory lies on a protected disk and cannot be left out")]
    WouldFeedItself(#[source] ExtentsError),
    #[error("the state directory lies on {disk}, whose file is on a protected disk")]
    OnALoop { disk: String },
    #[error("all groups together have too many pieces of spool files on one disk to leave out ({MAX_SKIPS} at most)")]
    TooManyPieces,
    #[error(
        "the state directory lies on a volume whose writes wait for the box, and a spool that waits for it would be of no use"
    )]
    WouldWait,
    #[error(transparent)]
    Spool(#[from] spool::SpoolError),
}

fn no_file(why: &NoFile) -> String {
    format!("no spool file, writes are only marked once memory is used up: {}", crate::error_chain(why))
}

impl Engine {
    fn remove_spool(&self, group: GroupId) {
        self.ctx.scribe.put(Key::Spool(group), move |dir| {
            // It takes space, and nothing else.
            let _ = std::fs::remove_file(dir.spool_path(group));
            None
        });
    }

    /// A mirror is in whose writes wait for this thread, and the state directory lies on it: no group may write to a spool there.
    pub(super) fn give_up_spools(&mut self) {
        let mut told = false;
        for i in 0..self.groups.len() {
            let group = &mut self.groups[i];
            let Some(running) = group.running.as_mut().filter(|r| r.spool.file_io().is_some()) else { continue };
            let note = no_file(&NoFile::WouldWait);
            tracing::warn!(group = %group.record.spec.id, %note, "spool");
            running.give_up_spool_file(note);
            told |= !std::mem::take(&mut group.record.skips).is_empty();
            let id = group.id();
            self.remove_spool(id);
        }
        if told {
            self.tell_skips();
        }
    }

    /// Whether ranges of disks overlap something that is protected, by groups that run or `volumes`.
    fn overlaps_protected(&self, disk: &str, extents: &[Extent], volumes: &[VolumeAt]) -> bool {
        let running = self.groups.iter().filter_map(|g| g.running.as_ref()).flat_map(|r| &r.volumes);
        running
            .chain(volumes)
            .filter(|v| v.disk == disk)
            .any(|v| extents.iter().any(|e| e.intersect(&v.range).is_some()))
    }

    /// Makes the file of a group that is about to begin, and notes where it lies, for the kernel half to leave it out.
    pub(super) fn place_spool(&mut self, disks: &Disks, i: usize) {
        self.groups[i].record.skips.clear();
        if self.config.spool_mib == 0 || self.ctx.sync.holds_state() {
            return;
        }
        let path = self.ctx.state.spool_path(self.groups[i].id());
        // Tried again, and told, when the group begins.
        let Ok((file, _)) = spool::open_spool_file(&path, self.config.spool_file().0) else { return };
        let Ok(places) = extents::places(disks, &file, &Here) else { return };
        let record = |(disk, e): &(String, Extent)| (disk.clone(), e.start(), e.sectors.0);
        let mine: Vec<_> = places.iter().map(record).collect();
        let all = self.groups.iter().flat_map(|g| &g.record.skips).chain(&mine);
        let mut of_disk = std::collections::BTreeMap::<&str, usize>::new();
        all.for_each(|(disk, _, _)| *of_disk.entry(disk).or_default() += 1);
        if of_disk.values().all(|pieces| *pieces <= MAX_SKIPS) {
            self.groups[i].record.skips = mine;
        }
    }

    /// The spool of a group, how much it takes, and what is to be said of it.
    pub(super) fn make_spool(&self, i: usize, volumes: &[VolumeAt]) -> (Spool, u64, String) {
        let id = self.groups[i].id();
        let mut spool = Spool::new(self.config.spool_memory().0);
        let mut spool_max = spool.memory_max();
        if self.config.spool_mib == 0 {
            return (spool, spool_max, String::new());
        }
        let (path, bytes) = (self.ctx.state.spool_path(id), self.config.spool_file().0);
        if self.ctx.sync.holds_state() {
            let note = no_file(&NoFile::WouldWait);
            tracing::warn!(group = %id, %note, "spool");
            self.remove_spool(id);
            return (spool, spool_max, note);
        }
        let note = match self.add_file(i, volumes, &mut spool, &path, bytes) {
            Ok(note) => {
                spool_max += spool::usable(bytes);
                note
            }
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                no_file(&e)
            }
        };
        if !note.is_empty() {
            tracing::warn!(group = %id, %note, "spool");
        }
        (spool, spool_max, note)
    }

    fn add_file(
        &self,
        i: usize,
        volumes: &[VolumeAt],
        spool: &mut Spool,
        path: &Path,
        bytes: u64,
    ) -> Result<String, NoFile> {
        let disks = Disks::here().unwrap_or_default();
        if let Ok(file) = File::open(path) {
            self.may_spill_to(&disks, i, volumes, &file)?;
            if extents::in_memory(&file) {
                spool.add_file(path, bytes)?;
                return Ok(
                    "the state directory lies in memory, so the spool file takes memory beyond memory_mib".to_owned()
                );
            }
        }
        spool.add_file(path, bytes)?;
        Ok(match spool.file_io() {
            Some("buffered") => {
                "the state directory's file system knows no direct I/O: the spool file takes up page cache".to_owned()
            }
            _ => String::new(),
        })
    }

    /// Whether what is written to the file would not be captured again.
    fn may_spill_to(&self, disks: &Disks, i: usize, volumes: &[VolumeAt], file: &File) -> Result<(), NoFile> {
        if extents::in_memory(file) {
            return Ok(());
        }
        let skips = &self.groups[i].record.skips;
        for (disk, _, _) in skips {
            let Some(under) = extents::file_of_loop(disk) else { continue };
            // Of a file that cannot be found nothing can be said, and the loop itself is what people protect in tests only.
            let Ok(under) = File::open(&under) else { continue };
            if !extents::in_memory(&under) && self.lies_on_protected(disks, &under, volumes) == Some(true) {
                return Err(NoFile::OnALoop { disk: disk.clone() });
            }
        }
        if !skips.is_empty() {
            return Ok(());
        }
        match extents::places(disks, file, &Here) {
            // Told when it was placed, or there was no room to tell it.
            Ok(places) => {
                let hit = places.iter().any(|(disk, e)| self.overlaps_protected(disk, &[*e], volumes));
                if hit { Err(NoFile::TooManyPieces) } else { Ok(()) }
            }
            // Something layered: what it lies on decides. On a device that is not known it may lie anywhere.
            Err(e) => match self.lies_on_protected(disks, file, volumes) {
                Some(false) => Ok(()),
                Some(true) | None => Err(NoFile::WouldFeedItself(e)),
            },
        }
    }

    /// Whether the file system of a file lies on a protected disk; None when nobody knows.
    fn lies_on_protected(&self, disks: &Disks, file: &File, volumes: &[VolumeAt]) -> Option<bool> {
        let dev = file.metadata().ok()?.dev();
        let number = DevNo { major: libc::major(dev), minor: libc::minor(dev) };
        // btrfs has a number of its own; its mount is known.
        let device =
            disks.by_number(number).or_else(|| disks.iter().find(|d| d.mounts.iter().any(|m| mounted(m, dev))))?;
        // A mirrored volume is captured where it is a volume, above its leaves.
        let mut below = vec![device.name.clone()];
        let mut at = 0;
        while let Some(name) = below.get(at).cloned() {
            let mirrored = |v: &VolumeAt| v.disk == name && v.device == name;
            let running = self.groups.iter().filter_map(|g| g.running.as_ref()).flat_map(|r| &r.volumes);
            if running.chain(volumes).any(mirrored) {
                return Some(true);
            }
            let slaves = disks.get(&name).map(|d| d.slaves.clone()).unwrap_or_default();
            slaves.into_iter().for_each(|s| {
                if !below.contains(&s) {
                    below.push(s)
                }
            });
            at += 1;
        }
        let leaves = disks.resolve(std::slice::from_ref(&device.name)).ok()?.leaves;
        if leaves.is_empty() {
            return None;
        }
        Some(leaves.iter().any(|l| self.overlaps_protected(&l.disk, &[l.range], volumes)))
    }

    /// Sees to it that what is left out is what the files take, every few seconds.
    pub(super) fn watch_spools(&mut self, now: MonoTime) {
        if now.ms_since(self.last_spool_look) < LOOK_AGAIN_MS {
            return;
        }
        self.last_spool_look = now;
        self.close_what_feeds_itself();
        let look = |path: &Path| -> Result<(Disks, Vec<(String, Extent)>), String> {
            let file = File::open(path).map_err(|e| format!("could not open {}: {e}", path.display()))?;
            let chain = |e: &dyn std::error::Error| crate::error_chain(e);
            let disks = Disks::here().map_err(|e| chain(&e))?;
            let places = extents::places(&disks, &file, &Here).map_err(|e| chain(&e))?;
            Ok((disks, places))
        };
        let files: Vec<(GroupId, std::path::PathBuf)> = self
            .groups
            .iter()
            .filter(|g| g.running.is_some() && !g.record.skips.is_empty())
            .map(|g| (g.id(), self.ctx.state.spool_path(g.id())))
            .collect();
        let mut moved = false;
        for (id, path) in files {
            let Some(i) = self.groups.iter().position(|g| g.id() == id) else { continue };
            let found = look(&path).map(|(_, places)| {
                places.into_iter().map(|(disk, e)| (disk, e.start(), e.sectors.0)).collect::<Vec<_>>()
            });
            let group = &mut self.groups[i];
            match found {
                Ok(found) if found == group.record.skips => continue,
                Ok(found) => {
                    tracing::warn!(group = %id, "the spool file lies elsewhere now; what lies at its old place is copied");
                    group.record.skips = found;
                }
                Err(why) => {
                    let note = format!("the spool file is not used any more: {why}");
                    tracing::warn!(group = %id, %note, "spool");
                    group.record.skips.clear();
                    if let Some(running) = &mut group.running {
                        running.give_up_spool_file(note);
                    }
                }
            }
            moved = true;
        }
        if moved {
            self.tell_skips();
        }
    }

    /// Files that are not left out, on a disk that is protected by now.
    pub(super) fn close_what_feeds_itself(&mut self) {
        let unplaced = |g: &super::Group| {
            g.record.skips.is_empty() && g.running.as_ref().is_some_and(|r| r.spool.file_io().is_some())
        };
        if !self.groups.iter().any(unplaced) {
            return;
        }
        let disks = Disks::here().unwrap_or_default();
        for i in 0..self.groups.len() {
            let Ok(file) = File::open(self.ctx.state.spool_path(self.groups[i].id())) else { continue };
            if !unplaced(&self.groups[i]) {
                continue;
            }
            let Err(e) = self.may_spill_to(&disks, i, &[], &file) else { continue };
            let note = format!("the spool file is not used any more: {}", crate::error_chain(&e));
            tracing::warn!(group = %self.groups[i].id(), %note, "spool");
            if let Some(running) = &mut self.groups[i].running {
                running.give_up_spool_file(note);
            }
        }
    }

    fn tell_skips(&mut self) {
        let before = self.before();
        let told = Disks::here()
            .map_err(|e| crate::error_chain(&e))
            .and_then(|disks| self.tell_targets(&disks, &mut []).map_err(|e| crate::error_chain(&e)));
        match told {
            Ok(()) => {
                self.skips_gone(&before);
                self.store_groups();
            }
            // The old places stay left out: nothing may be trusted of them, so no file either, and a new start.
            Err(why) => tracing::error!(%why, "could not tell the kernel where the spool files lie now"),
        }
    }
}

/// Whether a mount point shows files of this device number.
fn mounted(at: &str, dev: u64) -> bool {
    std::fs::metadata(at).is_ok_and(|m| m.dev() == dev)
}
