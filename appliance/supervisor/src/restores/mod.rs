//! Restores: machines that wait for their disks' content, and what is written to them.
//!
//! ```text
//! <data>/restores/ID.json    one restore each, replaced whole whenever something is decided
//! ```
//!
//! A restore has a thread of its own, which drives [`replication::restore::Source`] between the group's views and the machine's connection
//! ([`crate::links`]). What is stored is what was decided, never how far it is: a daemon that starts again has the machine's hashes looked at
//! again, and ships only what differs.
//!
//! ```text
//!            keep_old                                      finish
//! waiting ─▶ keeping ─▶ copying ─▶ following, pass by pass ─────▶ finishing ─▶ done ─▶ released
//!    ▲  target gone / there again  │
//!    └─────────────────────────────┘            failed (with a remedy), cancelled: the disks are let go
//! ```
//!
//! **Done** means: each granule of each disk was found the same, by hash, after whatever was last written to it had been flushed and the target's
//! cache of it dropped; and the source has not been written since. A restore from a fixed moment finishes by itself.
//!
//! **Limits.** [`RESTORES_MAX`] that are not over, one for each machine; of those that are over [`RECORDS_MAX`] are remembered.

mod driver;
mod passes;
pub mod state;

pub use state::{DiskMap, RestoreFault, RestoreFrom, RestorePhase, RestoreStatus, RestoreWish, Target};

use crate::{
    App,
    events::Event,
    files::{self, FileError},
    links::TargetInfo,
};
use journal::ResolvedPoint;
use model::{GroupId, HostId, SECTOR};
use state::{Run, Stage, State, StoredPoint};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering},
};
use wire::{RestoreId, TARGET_DISKS_MAX};

pub const RESTORES_MAX: usize = 32;
const RECORDS_MAX: usize = 200;

pub struct Restores {
    dir: PathBuf,
    runs: Mutex<BTreeMap<String, Arc<Run>>>,
}

impl Restores {
    /// Reads what there is. Blocking. What cannot be read is said and left alone.
    pub fn open(data: &Path, unreadable: &mut Vec<String>) -> Result<Self, FileError> {
        let dir = data.join("restores");
        files::private_dir(&dir)?;
        let failed = |source| FileError { op: "list", path: dir.clone(), source };
        let mut runs = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match files::read_small(&path)?.map(|bytes| serde_json::from_slice::<State>(&bytes)) {
                Some(Ok(state)) => drop(runs.insert(state.id.clone(), Arc::new(Run::of(state)))),
                Some(Err(e)) => unreadable.push(format!("{}: {e}", path.display())),
                None => {}
            }
        }
        Ok(Self { dir, runs: Mutex::new(runs) })
    }

    /// Goes on with every restore that is not over.
    pub fn go_on(&self, app: &Arc<App>) {
        let runs: Vec<Arc<Run>> = crate::lock(&self.runs).values().cloned().collect();
        for run in runs.into_iter().filter(|run| !run.state().is_over()) {
            if let Err(e) = self.launch(app, &run) {
                app.events.note(Event::RestoreFailed, &run.state().id, crate::chain(&e));
            }
        }
    }

    /// Has every thread stop where it is. Blocking.
    pub fn pause(&self) {
        let runs: Vec<Arc<Run>> = crate::lock(&self.runs).values().cloned().collect();
        runs.iter().for_each(|run| run.pause.store(true, Ordering::Release));
        for run in runs {
            if let Some(thread) = crate::lock(&run.thread).take() {
                let _ = thread.join();
            }
        }
    }

    /// The machines that wait, whether or not a restore has them.
    pub fn targets(&self, app: &App) -> Vec<Target> {
        app.links.targets.list().into_iter().map(Target::of).collect()
    }

    /// Begins a restore under an id that the caller made: eight hexadecimal digits. The same wish under the same id again changes nothing.
    /// Blocking.
    pub fn begin(&self, app: &Arc<App>, id: &str, wish: RestoreWish) -> Result<RestoreStatus, RestoreFault> {
        restore_id(id)?;
        if let Some(run) = crate::lock(&self.runs).get(id).cloned() {
            return if run.state().wish == wish { Ok(run.status()) } else { Err(RestoreFault::IdTaken(id.into())) };
        }
        let state = self.plan(app, id, wish)?;
        let run = Arc::new(Run::of(state));
        {
            let mut runs = crate::lock(&self.runs);
            let open: Vec<Arc<State>> = runs.values().map(|r| r.state()).filter(|s| !s.is_over()).collect();
            if let Some(other) = open.iter().find(|s| s.host == run.state().host) {
                return Err(RestoreFault::Busy { target: other.host_name.clone(), id: other.id.clone() });
            }
            if open.len() >= RESTORES_MAX {
                return Err(RestoreFault::TooMany);
            }
            runs.insert(id.to_owned(), Arc::clone(&run));
        }
        let kept = run.keep(&self.dir).and_then(|()| self.launch(app, &run));
        if let Err(e) = kept {
            crate::lock(&self.runs).remove(id);
            return Err(e);
        }
        self.forget_old();
        app.events.note(Event::RestoreBegun, &run.state().host_name, format!("restore {id}"));
        Ok(run.status())
    }

    /// Everything that can be known of a wish before anything is done.
    fn plan(&self, app: &App, id: &str, wish: RestoreWish) -> Result<State, RestoreFault> {
        let data = app.catalog.data();
        let host = data.find_host(&wish.target).ok_or_else(|| RestoreFault::NoTarget(wish.target.clone()))?;
        if wish.disks.is_empty() || wish.disks.len() > TARGET_DISKS_MAX || wish.from.is_empty() {
            return Err(RestoreFault::Disks);
        }
        let mut state = State::new(id, &wish, host.id, &host.name, app.clock.wall_us());
        let mut paths = BTreeSet::new();
        for from in &wish.from {
            let group = app.vault.get(from.group()).ok_or(RestoreFault::NoGroup(from.group()))?;
            let reader = group.reader().map_err(|e| RestoreFault::Group { name: group.name().into(), source: e })?;
            match from {
                RestoreFrom::Branch { .. } if wish.keep_old && group.shared.branch.is_none() => {
                    return Err(RestoreFault::KeepsNothing(group.name().into()));
                }
                RestoreFrom::Point { .. } if wish.keep_old => {
                    return Err(RestoreFault::KeepsNothing(group.name().into()));
                }
                RestoreFrom::Branch { .. } => {}
                RestoreFrom::Point { at, .. } => {
                    let point = reader.resolve(at);
                    let point =
                        point.map_err(|e| RestoreFault::Point { name: group.name().into(), source: Box::new(e) })?;
                    state.points.insert(group.id(), point.into());
                }
            }
        }
        let there = app.links.targets.get(host.id);
        for map in &wish.disks {
            let group = app.vault.get(map.group).filter(|_| wish.from.iter().any(|f| f.group() == map.group));
            let group = group.ok_or(RestoreFault::NoGroup(map.group))?;
            let volumes = group.shared.spec().volumes;
            let volume = volumes.iter().find(|v| v.id == map.volume);
            let volume =
                volume.ok_or_else(|| RestoreFault::NoVolume { group: group.name().into(), volume: map.volume })?;
            if !paths.insert(map.path.clone()) {
                return Err(RestoreFault::Twice(map.path.clone()));
            }
            let bytes = volume.sectors.0 * SECTOR;
            state.sizes.push(bytes);
            if let Some(info) = &there {
                let identity = fit(info, &map.path, bytes, None)?;
                state.identities.insert(map.path.clone(), identity);
            }
        }
        Ok(state)
    }

    pub fn list(&self) -> Vec<RestoreStatus> {
        let mut list: Vec<RestoreStatus> = crate::lock(&self.runs).values().map(|run| run.status()).collect();
        list.sort_by_key(|s| (s.begun_us, s.id.clone()));
        list
    }
    fn get(&self, id: &str) -> Result<Arc<Run>, RestoreFault> {
        crate::lock(&self.runs).get(id).cloned().ok_or_else(|| RestoreFault::Unknown(id.into()))
    }
    pub fn status(&self, id: &str) -> Result<RestoreStatus, RestoreFault> {
        Ok(self.get(id)?.status())
    }

    /// The source is not written any more: one last pass, and the restore is done. Blocking.
    pub fn finish(&self, id: &str) -> Result<RestoreStatus, RestoreFault> {
        let run = self.get(id)?;
        run.change(&self.dir, |state| {
            if matches!(state.stage, Stage::Cancelled | Stage::Failed { .. }) {
                return Err(RestoreFault::Over);
            }
            state.finish = true;
            Ok(())
        })?;
        Ok(run.status())
    }

    /// The disks end at just these moments, newer or older than what they were brought to. Blocking.
    pub fn finish_at(
        &self,
        id: &str,
        points: &BTreeMap<GroupId, ResolvedPoint>,
    ) -> Result<RestoreStatus, RestoreFault> {
        let run = self.get(id)?;
        let points: BTreeMap<GroupId, StoredPoint> = points.iter().map(|(group, at)| (*group, (*at).into())).collect();
        run.change(&self.dir, |state| match state.stage {
            Stage::Cancelled | Stage::Failed { .. } => Err(RestoreFault::Over),
            _ if state.finish && state.points == points => Ok(()),
            Stage::Working if state.points.is_empty() => {
                state.points = points;
                state.finish = true;
                Ok(())
            }
            _ => Err(RestoreFault::Pinned),
        })?;
        Ok(run.status())
    }
    /// Those that standbys follow by and that are not over.
    pub fn of_plans(&self) -> Vec<(String, RestoreWish)> {
        let runs: Vec<Arc<State>> = crate::lock(&self.runs).values().map(|run| run.state()).collect();
        let of = runs.into_iter().filter(|s| s.wish.plan.is_some() && !s.is_over());
        of.map(|s| (s.id.clone(), s.wish.clone())).collect()
    }

    /// The machine lets its disks go, and starts anew if so asked. Only of a restore that is done. Blocking.
    pub fn release(&self, id: &str, reboot: bool) -> Result<RestoreStatus, RestoreFault> {
        let run = self.get(id)?;
        run.change(&self.dir, |state| match state.stage.clone() {
            Stage::Done { lsns } => {
                state.stage = Stage::Releasing { lsns, reboot };
                Ok(())
            }
            Stage::Releasing { .. } | Stage::Released { .. } => Ok(()),
            Stage::Working => Err(RestoreFault::NotDone),
            Stage::Cancelled | Stage::Failed { .. } => Err(RestoreFault::Over),
        })?;
        Ok(run.status())
    }

    /// Ends a restore where it is; the machine lets its disks go. What is written stays written. Blocking.
    pub fn cancel(&self, app: &Arc<App>, id: &str) -> Result<RestoreStatus, RestoreFault> {
        let run = self.get(id)?;
        let mut was_over = false;
        run.change(&self.dir, |state| {
            was_over = state.is_over();
            if !was_over {
                state.stage = Stage::Cancelled;
            }
            Ok(())
        })?;
        if !was_over {
            app.events.note(Event::RestoreEnded, &run.state().host_name, format!("restore {id} was cancelled"));
        }
        Ok(run.status())
    }

    fn launch(&self, app: &Arc<App>, run: &Arc<Run>) -> Result<(), RestoreFault> {
        let (app, for_thread, dir) = (Arc::clone(app), Arc::clone(run), self.dir.clone());
        let name = format!("re-{}", run.state().id);
        let started = std::thread::Builder::new().name(name).spawn(move || {
            // A defect here must not take the daemon along.
            let driven = std::panic::AssertUnwindSafe(|| driver::drive(&app, &for_thread, &dir));
            if std::panic::catch_unwind(driven).is_err() {
                let text = "the restore's thread panicked; the daemon's log says why";
                app.events.note(Event::RestoreFailed, &for_thread.state().host_name, text);
                let failed = Stage::Failed { text: text.into(), remedy: "begin it again, and report this".into() };
                let _ = for_thread.change(&dir, |state| {
                    state.stage = failed;
                    Ok(())
                });
            }
        });
        *crate::lock(&run.thread) = Some(started.map_err(RestoreFault::Thread)?);
        Ok(())
    }

    fn forget_old(&self) {
        let mut runs = crate::lock(&self.runs);
        let over = runs.values().map(|r| r.state()).filter(|s| s.is_over()).map(|s| (s.begun_us, s.id.clone()));
        let mut over: Vec<(u64, String)> = over.collect();
        over.sort();
        let surplus = over.len().saturating_sub(RECORDS_MAX);
        for (_, id) in over.into_iter().take(surplus) {
            runs.remove(&id);
            // What stays behind is read at the next start and forgotten then.
            let _ = fs::remove_file(self.dir.join(format!("{id}.json")));
        }
    }
}

fn restore_id(text: &str) -> Result<RestoreId, RestoreFault> {
    let fits = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let id = u32::from_str_radix(text, 16).ok().filter(|_| fits);
    id.map(RestoreId).ok_or_else(|| RestoreFault::Id(text.chars().take(64).collect()))
}

/// Whether a machine's disk can take so much; its identity. `expected`: what the disk was when the restore began.
fn fit(info: &TargetInfo, path: &str, bytes: u64, expected: Option<&str>) -> Result<String, RestoreFault> {
    let target = || info.name.clone();
    let disk = info.disks.iter().find(|d| d.path == path);
    let disk = disk.ok_or_else(|| RestoreFault::NoDisk { target: target(), path: path.into() })?;
    if let Some(by) = &disk.in_use {
        return Err(RestoreFault::InUse { target: target(), path: path.into(), by: by.clone() });
    }
    if disk.bytes.0 < bytes {
        let (has, needs) = (disk.bytes, model::ByteLen(bytes));
        return Err(RestoreFault::Smaller { target: target(), path: path.into(), has, needs });
    }
    if expected.is_some_and(|identity| identity != disk.identity) {
        return Err(RestoreFault::OtherDisk { target: target(), path: path.into() });
    }
    Ok(disk.identity.clone())
}

impl Target {
    fn of(info: TargetInfo) -> Self {
        Self { host: info.host, name: info.name, address: info.address, since_us: info.since_us, disks: info.disks }
    }
}

/// For who has only the number.
pub fn known_host(app: &App, id: HostId) -> String {
    app.catalog.data().host(id).map_or_else(|| id.to_string(), |h| h.name.clone())
}
