//! The vault: all groups of the box, one journal thread each.

mod compare;
mod group;
pub mod inbox;
mod jobs;
#[cfg(test)]
mod tests;
mod writer;

pub use group::{Command, Counters, Group, GroupError, LinkInfo, Live, Marked, Phase, Shared, StreamOpening};

use crate::{
    catalog::{Catalog, CatalogRefusal, ChangeError, GroupEntry, GroupState},
    clock::Clock,
    config::JournalConfig,
    events::{Event, Events},
    exports::pool::ReadPool,
};
use compare::ComparePool;
use durable::{Disk, DiskError};
use inbox::Inbox;
use jobs::JobPool;
use journal::{BranchPoint, CreateError, IndexChoice, Journal, JournalOptions, OpenViewError, ResolvedPoint};
use model::{ByteLen, GroupId, GroupPolicy, GroupSpec, Term};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tokio::sync::Notify;

#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("could not read the data folder")]
    Disk(#[source] DiskError),
    #[error("the catalogue")]
    Catalog(#[source] Box<ChangeError<CatalogRefusal>>),
}

#[derive(Debug, thiserror::Error)]
pub enum CreateGroupError {
    #[error(transparent)]
    Catalog(#[from] ChangeError<CatalogRefusal>),
    #[error("could not make the journal")]
    Journal(#[source] CreateError),
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("the group it is to go on from")]
    Trunk(#[from] GroupError),
    #[error("the moment it is to go on from")]
    View(#[from] OpenViewError),
}

#[derive(Debug, thiserror::Error)]
pub enum DeleteGroupError {
    #[error(transparent)]
    Catalog(#[from] ChangeError<CatalogRefusal>),
    #[error("could not remove the group's folder; it is removed at the next start")]
    Disk(#[source] DiskError),
}

pub struct Vault {
    /// The data folder, absolute.
    root: PathBuf,
    disk: Arc<dyn Disk>,
    journal: JournalConfig,
    clock: Clock,
    events: Arc<Events>,
    catalog: Arc<Catalog>,
    jobs: Arc<JobPool>,
    reads: Arc<ReadPool>,
    compares: Arc<ComparePool>,
    groups: Mutex<BTreeMap<GroupId, Arc<Group>>>,
    room_wanted: Arc<Notify>,
    /// One creation or deletion at a time: they are rare, and their steps must not mix.
    changing: Mutex<()>,
}

/// What the vault is made from.
pub struct VaultParts {
    pub root: PathBuf,
    pub disk: Arc<dyn Disk>,
    pub journal: JournalConfig,
    pub clock: Clock,
    pub events: Arc<Events>,
    pub catalog: Arc<Catalog>,
    pub reads: Arc<ReadPool>,
}

impl Vault {
    /// Finishes what a crash left half done and starts every group's thread; recovery goes on in those. Blocking.
    pub fn start(parts: VaultParts) -> Result<Arc<Self>, VaultError> {
        let VaultParts { root, disk, journal, clock, events, catalog, reads } = parts;
        let jobs = Arc::new(JobPool::start().map_err(VaultError::Thread)?);
        let compares = Arc::new(ComparePool::start().map_err(VaultError::Thread)?);
        let (groups, changing, room_wanted) = (Mutex::default(), Mutex::default(), Arc::default());
        let vault = Arc::new(Self {
            root,
            disk,
            journal,
            clock,
            events,
            catalog,
            jobs,
            reads,
            compares,
            groups,
            room_wanted,
            changing,
        });
        vault.disk.create_dir(Path::new(GROUPS)).map_err(VaultError::Disk)?;
        vault.tidy()?;
        for entry in &vault.catalog.data().groups {
            if entry.state != GroupState::Deleting {
                // In the order they were made: what a branch goes on from comes before it.
                vault
                    .launch(nominal_spec(entry), entry.state == GroupState::Released, entry.branch, None)
                    .map_err(VaultError::Thread)?;
            }
        }
        Ok(vault)
    }

    /// Ends what a crash cut short: deletions go on, creations without a journal are undone. What nobody knows is left alone.
    fn tidy(&self) -> Result<(), VaultError> {
        let data = self.catalog.data();
        let folders = self.disk.list(Path::new(GROUPS)).map_err(VaultError::Disk)?;
        let has_journal = |id| {
            let files = self.disk.list(&group_dir(id)).unwrap_or_default();
            files.iter().any(|f| f.name.starts_with("control."))
        };
        for entry in &data.groups {
            let unfinished = entry.state == GroupState::Creating && !has_journal(entry.id);
            if unfinished || entry.state == GroupState::Deleting {
                match remove_tree(&*self.disk, &group_dir(entry.id)) {
                    Ok(()) => self.forget(entry.id)?,
                    Err(e) => self.events.note(Event::Stray, &entry.name, crate::chain(&e)),
                }
            } else if entry.state == GroupState::Creating {
                self.keep_state(entry.id, GroupState::Ready).map_err(|e| VaultError::Catalog(Box::new(e)))?;
            }
        }
        for folder in folders {
            let known = folder.name.parse().is_ok_and(|id| data.group(id).is_some());
            if !known {
                let text = "a folder in groups/ that the catalogue does not know; it is left alone";
                self.events.note(Event::Stray, &folder.name, text);
            }
        }
        Ok(())
    }

    fn forget(&self, id: GroupId) -> Result<(), VaultError> {
        let forgotten = self.catalog.change(|data| {
            data.remove_group(id);
            Ok::<_, CatalogRefusal>(())
        });
        forgotten.map_err(|e| VaultError::Catalog(Box::new(e)))
    }

    fn keep_state(&self, id: GroupId, state: GroupState) -> Result<(), ChangeError<CatalogRefusal>> {
        self.catalog.change(|data| {
            data.set_group_state(id, state);
            Ok(())
        })
    }

    fn options(&self, id: GroupId) -> JournalOptions {
        JournalOptions {
            segment_bytes: ByteLen(self.journal.segment_mib << 20),
            batch_bytes: self.journal.batch_kib << 10,
            depth: self.journal.depth,
            prepared_ahead: self.journal.prepared_ahead,
            index: IndexChoice::Sled { dir: self.root.join(group_dir(id)).join("index") },
            ..JournalOptions::default()
        }
    }

    fn launch(
        &self,
        spec: GroupSpec,
        released: bool,
        branch: Option<BranchPoint>,
        made: Option<Journal>,
    ) -> io::Result<Arc<Group>> {
        let id = spec.id;
        let inbox = Arc::new(Inbox::default());
        let shared = Arc::new(Shared::new(spec, released, branch));
        let trunk = branch.map(|on| {
            let trunk = self.get(on.group).ok_or_else(|| {
                io::Error::other(format!("group {} goes on from group {}, which is not known", shared.name, on.group))
            })?;
            Ok::<_, io::Error>((trunk, on))
        });
        let context = writer::Context {
            disk: Arc::clone(&self.disk),
            dir: group_dir(id),
            options: self.options(id),
            clock: self.clock,
            events: Arc::clone(&self.events),
            jobs: Arc::clone(&self.jobs),
            reads: Arc::clone(&self.reads),
            compares: Arc::clone(&self.compares),
            room_wanted: Arc::clone(&self.room_wanted),
            catalog: Arc::clone(&self.catalog),
            trunk: trunk.transpose()?,
        };
        let runtime = writer::runtime()?;
        let here = runtime.handle().clone();
        let thread = {
            let (shared, inbox) = (Arc::clone(&shared), Arc::clone(&inbox));
            let name = format!("j-{}", &id.to_string()[..8]);
            std::thread::Builder::new().name(name).spawn(move || {
                writer::run(&runtime, &context, &shared, &inbox, made);
                // Its connections end with it.
            })?
        };
        let group = Arc::new(Group { shared, inbox, here, thread: Mutex::new(Some(thread)) });
        crate::lock(&self.groups).insert(id, Arc::clone(&group));
        Ok(group)
    }

    /// Makes a group and its journal. Blocking.
    pub fn create(&self, spec: GroupSpec) -> Result<Arc<Group>, CreateGroupError> {
        let _one = crate::lock(&self.changing);
        let entry = GroupEntry {
            id: spec.id,
            name: spec.name.clone(),
            host: spec.host,
            state: GroupState::Creating,
            created_us: self.clock.wall_us(),
            branch: None,
        };
        self.catalog.change(|data| data.add_group(entry))?;
        let made = Journal::create(
            Arc::clone(&self.disk),
            &group_dir(spec.id),
            &spec,
            Term(1),
            self.options(spec.id),
            self.clock.history(),
        );
        let journal = match made {
            Ok(journal) => journal,
            Err(e) => {
                // Undone as well as can be; what remains is undone at the next start.
                if remove_tree(&*self.disk, &group_dir(spec.id)).is_ok() {
                    let _ = self.forget(spec.id);
                }
                return Err(CreateGroupError::Journal(e));
            }
        };
        self.keep_state(spec.id, GroupState::Ready)?;
        let name = spec.name.clone();
        let group = self.launch(spec, false, None, Some(journal)).map_err(CreateGroupError::Thread)?;
        self.events.note(Event::GroupCreated, name, group.id());
        Ok(group)
    }

    /// Makes a group that goes on from a moment of another one: its disks read as they were then, and are written in a journal of
    /// their own. Nothing is copied. Blocking.
    pub fn create_branch(
        &self,
        trunk: &Arc<Group>,
        at: ResolvedPoint,
        id: GroupId,
        name: &str,
    ) -> Result<Arc<Group>, CreateGroupError> {
        let _one = crate::lock(&self.changing);
        let life = trunk.shared.life();
        let view = trunk.reader()?.view(at)?;
        let on = view.branch_point();
        let parent = trunk.shared.spec();
        let spec = GroupSpec { id, name: name.to_owned(), host: None, ..parent };
        let entry = GroupEntry {
            id,
            name: spec.name.clone(),
            host: None,
            state: GroupState::Creating,
            created_us: self.clock.wall_us(),
            branch: Some(on),
        };
        // Known, then held, then made: whatever a crash leaves is undone at the next start.
        self.catalog.change(|data| data.add_group(entry))?;
        let made = trunk.hold(id, at).map_err(CreateGroupError::Trunk).and_then(|()| {
            let on = trunk.keep_view(life, view)?;
            let (disk, now) = (Arc::clone(&self.disk), self.clock.history());
            Journal::create_branch(disk, &group_dir(id), &spec, Term(1), self.options(id), now, on)
                .map_err(CreateGroupError::Journal)
        });
        let journal = match made {
            Ok(journal) => journal,
            Err(e) => {
                if remove_tree(&*self.disk, &group_dir(id)).is_ok() && self.forget(id).is_ok() {
                    let _ = trunk.release_hold(id);
                }
                return Err(e);
            }
        };
        self.keep_state(id, GroupState::Ready)?;
        let group = self.launch(spec, false, Some(on), Some(journal)).map_err(CreateGroupError::Thread)?;
        self.events.note(Event::GroupCreated, name, format!("{id}, from LSN {} of {:?}", on.lsn, trunk.name()));
        Ok(group)
    }

    /// Marks that the host stopped protecting the group, or began again. Blocking.
    pub fn set_released(&self, group: &Group, released: bool) -> Result<(), ChangeError<CatalogRefusal>> {
        let _one = crate::lock(&self.changing);
        self.keep_state(group.id(), if released { GroupState::Released } else { GroupState::Ready })?;
        group.shared.released.store(released, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// Ends the group's thread and removes its history. The caller has taken down what uses it. Blocking.
    pub fn delete(&self, group: &Group) -> Result<(), DeleteGroupError> {
        let _one = crate::lock(&self.changing);
        self.catalog.change(|data| {
            if let Some(branch) = data.branches_of(group.id()).next() {
                return Err(CatalogRefusal::HasBranches(branch.name.clone()));
            }
            data.set_group_state(group.id(), GroupState::Deleting);
            Ok(())
        })?;
        crate::lock(&self.groups).remove(&group.id());
        group.close();
        group.join();
        remove_tree(&*self.disk, &group_dir(group.id())).map_err(DeleteGroupError::Disk)?;
        self.catalog.change(|data| {
            data.remove_group(group.id());
            Ok::<_, CatalogRefusal>(())
        })?;
        // Gone: nothing needs the moment it went on from. Where this fails, the next opening of that journal does it.
        if let Some(trunk) = group.shared.branch.and_then(|on| self.get(on.group)) {
            let _ = trunk.release_hold(group.id());
        }
        self.events.note(Event::GroupDeleted, group.name(), group.id());
        Ok(())
    }

    pub fn groups(&self) -> Vec<Arc<Group>> {
        crate::lock(&self.groups).values().cloned().collect()
    }
    pub fn get(&self, id: GroupId) -> Option<Arc<Group>> {
        crate::lock(&self.groups).get(&id).cloned()
    }
    /// By id or name.
    pub fn find(&self, id_or_name: &str) -> Option<Arc<Group>> {
        let by_id = id_or_name.parse().ok().and_then(|id| self.get(id));
        by_id.or_else(|| self.groups().into_iter().find(|g| g.name() == id_or_name))
    }
    pub fn space(&self) -> Result<durable::Space, DiskError> {
        self.disk.space()
    }

    /// Shares the disk's room among the groups: who has to give up history so that all can go on. Blocking.
    ///
    /// A group that is alone sees to itself; with several, what the disk lacks is taken from the lowest priority first
    /// ([`journal::share_out`]).
    pub fn balance(&self) {
        let groups = self.groups();
        if groups.len() < 2 {
            groups.iter().for_each(|g| g.must_free(None));
            return;
        }
        let Ok(space) = self.space() else { return };
        let (members, shares): (Vec<_>, Vec<_>) = groups.iter().filter_map(|g| Some((g, g.share()?))).unzip();
        let out = journal::share_out(&shares, space.available.0, self.reserve(members.len()));
        for (group, bytes) in members.iter().zip(out.must_free) {
            group.must_free(Some(bytes));
        }
    }

    /// Waits until a group has met a record that does not fit.
    pub async fn room_wanted(&self) {
        self.room_wanted.notified().await;
    }

    /// Room to keep free: each journal leaves alone what a fold needs (six segments), and each needs its prepared ones.
    fn reserve(&self, groups: usize) -> u64 {
        let segment = self.journal.segment_mib << 20;
        let prepared = (self.journal.prepared_ahead as u64).saturating_mul(groups as u64);
        segment.saturating_mul(prepared.saturating_add(7)).saturating_add(self.journal.keep_free_mib << 20)
    }

    /// Closes all groups, all at once, and waits. Blocking.
    pub fn close(&self) {
        let groups = self.groups();
        groups.iter().for_each(|g| g.close());
        groups.iter().for_each(|g| g.join());
        self.jobs.stop();
        self.compares.stop();
    }
}

/// A volume larger than this is a typing error or a lie; NBD and the journal would take it, but sums of sizes must not overflow.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;

const GROUPS: &str = "groups";

/// The one place where a group's folder gets its name.
fn group_dir(id: GroupId) -> PathBuf {
    Path::new(GROUPS).join(id.to_string())
}

/// Until the journal has said its own.
fn nominal_spec(entry: &GroupEntry) -> GroupSpec {
    GroupSpec {
        id: entry.id,
        name: entry.name.clone(),
        host: entry.host,
        volumes: Vec::new(),
        policy: GroupPolicy::default(),
    }
}

/// Removes a folder and what is in it; one that is not there is fine.
fn remove_tree(disk: &dyn Disk, dir: &Path) -> Result<(), DiskError> {
    // What interrupted creations left is not listed.
    match disk.cleanup(dir) {
        Err(e) if e.is_not_found() => return Ok(()),
        cleaned => cleaned?,
    };
    let entries = disk.list(dir)?;
    for entry in entries {
        let path = dir.join(&entry.name);
        if entry.is_dir { remove_tree(disk, &path)? } else { disk.remove(&path)? }
    }
    disk.remove(dir)
}
