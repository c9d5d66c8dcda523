//! What a pass reads: the sources' views, what changed in them since the pass before, and the branches that keep old data.

use super::state::{Late, RestoreFrom, State};
use crate::{
    App,
    vault::{Group, GroupError},
};
use journal::{OpenViewError, ReadError, ReadViewError, ResolveError, ResolvedPoint, ViewHandle};
use model::{Extent, GroupId, HistoryTime, Lsn, RecoveryPoint, SECTOR, Sectors, VolumeId};
use nbd::client::{Client, ClientError, ConnectError};
use replication::{GranuleMap, restore::SourceDisk};
use std::{collections::BTreeMap, io, os::unix::net::UnixStream, sync::Arc, time::Duration};
use wire::{BlockHash, Look};

/// How long a server of our own may take to answer.
const OWN_LIMIT: Duration = Duration::from_secs(60);

/// Why a pass cannot be begun or gone on with.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    #[error("group {0} is gone")]
    Gone(GroupId),
    #[error("the moment is not kept any more")]
    Folded(#[source] OpenViewError),
    /// From here on it may be another time.
    #[error("group {name:?}")]
    Group { name: String, source: GroupError },
    #[error("group {name:?} has no moment yet that is as old as its standby is to be")]
    Early { name: String, source: Box<ResolveError> },
    #[error("group {name:?} cannot be opened")]
    View { name: String, source: OpenViewError },
    #[error("group {name:?}: its changes cannot be listed")]
    Changes { name: String, source: ReadError },
    #[error("group {name:?} cannot be read")]
    Read { name: String, source: ReadViewError },
    #[error("old data of {name:?} cannot be kept: {text}")]
    Keep { name: String, text: String },
    #[error("a client of the branch that keeps old data")]
    Connect(#[source] ConnectError),
    #[error("the branch that keeps old data")]
    Write(#[source] ClientError),
    #[error("the socket of the branch that keeps old data")]
    Socket(#[source] io::Error),
}

impl PassError {
    /// What to do about it, where time alone does not help.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Gone(_) => Some("begin a restore from a group that is there"),
            Self::Folded(_) => Some("begin it again with a newer moment; bookmarks are kept longer"),
            Self::Keep { .. } | Self::Write(_) => {
                Some("nothing was overwritten; make room on the box, or begin again without keeping old data")
            }
            _ => None,
        }
    }
}

/// A group of the restore.
pub struct Part {
    pub from: RestoreFrom,
    name: String,
    /// Which life of the journal `last` counts in.
    life: u64,
    /// Everything up to here was looked at since the last full pass began.
    pub last: Option<Lsn>,
    view: Option<Arc<ViewHandle>>,
}

/// A disk of the restore, with what is not proved of it.
pub struct DiskPart {
    /// Its place among the parts.
    pub part: usize,
    pub volume: VolumeId,
    pub path: String,
    pub sectors: Sectors,
    /// Granules that were not found the same since they were written last.
    pub unproved: GranuleMap,
}

pub fn parts(state: &State, app: &App) -> Result<(Vec<Part>, Vec<DiskPart>), PassError> {
    let mut parts = Vec::new();
    for from in &state.wish.from {
        let group = app.vault.get(from.group()).ok_or(PassError::Gone(from.group()))?;
        let (name, life) = (group.name().to_owned(), group.shared.life());
        parts.push(Part { from: from.clone(), name, life, last: None, view: None });
    }
    let mut disks = Vec::new();
    for (map, bytes) in state.wish.disks.iter().zip(&state.sizes) {
        let part = parts.iter().position(|p| p.from.group() == map.group).ok_or(PassError::Gone(map.group))?;
        let sectors = Sectors(bytes / SECTOR);
        let unproved = GranuleMap::full(sectors);
        disks.push(DiskPart { part, volume: map.volume, path: map.path.clone(), sectors, unproved });
    }
    Ok((parts, disks))
}

pub fn source_disks(disks: &[DiskPart]) -> Vec<SourceDisk> {
    disks.iter().enumerate().map(|(i, d)| SourceDisk { disk: VolumeId(i as u32), sectors: d.sectors }).collect()
}

impl Part {
    fn group(&self, app: &App) -> Result<Arc<Group>, PassError> {
        app.vault.get(self.from.group()).ok_or(PassError::Gone(self.from.group()))
    }
    fn trouble(&self) -> impl Fn(GroupError) -> PassError + '_ {
        |source| PassError::Group { name: self.name.clone(), source }
    }

    /// Takes up the newest state; answers which LSNs came since the last time, or none when everything must be looked at.
    fn advance(&mut self, app: &App, points: &State) -> Result<(Option<Lsn>, Lsn), PassError> {
        let group = self.group(app)?;
        if let RestoreFrom::Point { group: id, .. } = &self.from {
            let at: ResolvedPoint = (*points.points.get(id).ok_or(PassError::Gone(*id))?).into();
            if self.view.is_none() {
                let life = group.shared.life();
                let view = group.reader().map_err(self.trouble())?.view(at).map_err(|e| match e {
                    e @ OpenViewError::BeforeFloor { .. } => PassError::Folded(e),
                    source => PassError::View { name: self.name.clone(), source },
                })?;
                self.view = Some(group.keep_view(life, view).map_err(self.trouble())?);
            }
            let since = self.last.replace(at.lsn);
            return Ok((since, at.lsn));
        }
        // Everything that was answered as durable is below what is looked at now; and a journal that fails now is seen by its life.
        let life = group.shared.life();
        group.wait_durable().map_err(self.trouble())?;
        let reader = group.reader().map_err(self.trouble())?;
        let pinned = points.points.get(&group.id()).map(|at| ResolvedPoint::from(*at));
        let at = match (pinned, points.wish.lag_seconds) {
            (Some(at), _) => Some(at),
            (None, 0) => None,
            (None, lag) => {
                let then = app.clock.wall_us().saturating_sub(lag * 1_000_000);
                let at = reader.resolve(&RecoveryPoint::Time(HistoryTime(then)));
                Some(at.map_err(|source| PassError::Early { name: self.name.clone(), source: Box::new(source) })?)
            }
        };
        let view = match at {
            None => reader.head_view(),
            Some(at) => reader.view(at).map_err(|e| match e {
                e @ OpenViewError::BeforeFloor { .. } => PassError::Folded(e),
                source => PassError::View { name: self.name.clone(), source },
            })?,
        };
        if life != group.shared.life() {
            return Err(self.trouble()(GroupError::Opening));
        }
        let head = view.point().lsn;
        self.view = Some(ViewHandle::new(view));
        // In another life the same numbers may be other writes.
        let since = self.last.replace(head).filter(|last| life == self.life && (pinned.is_some() || *last <= head));
        self.life = life;
        Ok((since, head))
    }

    fn changed(
        &self,
        app: &App,
        volume: VolumeId,
        after: Lsn,
        upto: Lsn,
        map: &mut GranuleMap,
    ) -> Result<(), PassError> {
        // A moment that lies before what the disks were brought to: what came between them is undone.
        let (after, upto) = (after.min(upto), after.max(upto));
        if after == upto {
            return Ok(());
        }
        let reader = self.group(app)?.reader().map_err(self.trouble())?;
        let changed = reader.changed(volume, after, upto);
        for extent in changed.map_err(|source| PassError::Changes { name: self.name.clone(), source })?.iter() {
            map.set(map.touching(&extent));
        }
        Ok(())
    }

    pub fn read(&self, volume: VolumeId, extent: &Extent, buf: &mut [u8]) -> Result<(), PassError> {
        let Some(view) = &self.view else { return Err(PassError::Gone(self.from.group())) };
        let read = view.get().read(volume, extent.start() * SECTOR, buf);
        read.map_err(|source| PassError::Read { name: self.name.clone(), source })
    }
}

/// What the next pass has to look at.
pub struct NextPass {
    pub maps: Vec<GranuleMap>,
    /// Of what was written at the sources since the pass before.
    pub behind_bytes: u64,
    pub lsns: BTreeMap<GroupId, Lsn>,
}

/// Takes up the newest state of all sources. What was written there since the pass before and what is not proved yet is to be looked at.
pub fn next_pass(
    app: &App,
    state: &State,
    parts: &mut [Part],
    disks: &[DiskPart],
    carried: &mut [GranuleMap],
) -> Result<NextPass, PassError> {
    let mut lsns = BTreeMap::new();
    for (at, part) in parts.iter_mut().enumerate() {
        let (since, head) = part.advance(app, state)?;
        lsns.insert(part.from.group(), head);
        for (disk, map) in disks.iter().zip(carried.iter_mut()).filter(|(d, _)| d.part == at) {
            // Kept in `carried` until a pass has taken it: what is taken up and then fails is not forgotten.
            match since {
                None => map.set_all(),
                Some(after) => {
                    if let Err(e) = part.changed(app, disk.volume, after, head, map) {
                        part.last = None;
                        return Err(e);
                    }
                }
            }
        }
    }
    let behind_bytes = carried.iter().map(|m| m.covered().bytes()).sum();
    let maps = disks.iter().zip(carried).map(|(disk, changed)| {
        let mut map = changed.clone();
        map.union(&disk.unproved);
        *changed = GranuleMap::empty(disk.sectors);
        map
    });
    Ok(NextPass { maps: maps.collect(), behind_bytes, lsns })
}

/// Bits for each block: what differs from the hashes, and where there are only zeroes.
pub fn compare(
    look: &Look,
    hashes: &[BlockHash],
    mut read: impl FnMut(&Extent, &mut [u8]) -> Result<(), PassError>,
) -> Result<(Vec<u8>, Vec<u8>), PassError> {
    let (mut differ, mut zero) = (vec![0u8; hashes.len().div_ceil(8)], vec![0u8; hashes.len().div_ceil(8)]);
    let step = look.block_sectors as usize * SECTOR as usize;
    let (mut buf, mut at) = (Vec::new(), 0);
    for run in &look.runs {
        // One read for the whole run: bounded by what a look may cover.
        buf.resize(run.bytes() as usize, 0);
        read(run, &mut buf)?;
        for block in buf.chunks(step) {
            let same = hashes.get(at).is_some_and(|hash| BlockHash::of(block) == *hash);
            differ[at / 8] |= u8::from(!same) << (at % 8);
            zero[at / 8] |= u8::from(is_zero(block)) << (at % 8);
            at += 1;
        }
    }
    Ok((differ, zero))
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|b| *b == 0)
}

/// What keeps a machine's old data: for each part a branch beside the one that is restored from, at the moment where that begins.
pub struct Keeper {
    trunk: Arc<Group>,
    at: ResolvedPoint,
    pub late: Late,
    /// The moment where nothing is kept yet, the branch's newest state otherwise.
    view: Option<Arc<ViewHandle>>,
    clients: BTreeMap<VolumeId, Client<UnixStream>>,
}

impl Keeper {
    pub fn new(app: &App, part: &Part, late: Late) -> Result<Self, PassError> {
        let branch = part.group(app)?;
        let on = branch.shared.branch.ok_or(PassError::Gone(branch.id()))?;
        let trunk = app.vault.get(on.group).ok_or(PassError::Gone(on.group))?;
        let at = ResolvedPoint { timeline: on.timeline, lsn: on.lsn, time: model::HistoryTime(0) };
        Ok(Self { trunk, at, late, view: None, clients: BTreeMap::new() })
    }
    /// One that brings what the disks hold into the group itself.
    pub fn into(app: &App, part: &Part) -> Result<Self, PassError> {
        let group = part.group(app)?;
        let late = Late { of: group.id(), branch: group.id(), name: group.name().to_owned() };
        // Never asked for: the group is there, and its newest state is what is compared.
        let at = ResolvedPoint { timeline: model::TimelineId(0), lsn: Lsn(0), time: HistoryTime(0) };
        Ok(Self { trunk: group, at, late, view: None, clients: BTreeMap::new() })
    }
    fn trouble(&self, source: GroupError) -> PassError {
        PassError::Group { name: self.late.name.clone(), source }
    }
    /// Takes up what is kept so far, or the moment itself.
    pub fn advance(&mut self, app: &App) -> Result<(), PassError> {
        self.view = Some(match app.vault.get(self.late.branch) {
            None => {
                let life = self.trunk.shared.life();
                let reader = self.trunk.reader().map_err(|e| self.trouble(e))?;
                let view = reader.view(self.at);
                let view = view.map_err(|source| PassError::View { name: self.trunk.name().into(), source })?;
                self.trunk.keep_view(life, view).map_err(|e| self.trouble(e))?
            }
            Some(kept) => {
                kept.wait_durable().map_err(|e| self.trouble(e))?;
                ViewHandle::new(kept.reader().map_err(|e| self.trouble(e))?.head_view())
            }
        });
        Ok(())
    }
    pub fn read(&self, volume: VolumeId, extent: &Extent, buf: &mut [u8]) -> Result<(), PassError> {
        let Some(view) = &self.view else { return Err(PassError::Gone(self.late.branch)) };
        let read = view.get().read(volume, extent.start() * SECTOR, buf);
        read.map_err(|source| PassError::Read { name: self.late.name.clone(), source })
    }
    /// Writes what a disk held into the branch; makes it first.
    pub fn write(&mut self, app: &App, volume: VolumeId, extent: &Extent, data: &[u8]) -> Result<(), PassError> {
        if !self.clients.contains_key(&volume) {
            let client = self.connect(app, volume)?;
            self.clients.insert(volume, client);
        }
        let Some(client) = self.clients.get_mut(&volume) else { return Ok(()) };
        client.write(extent.start() * SECTOR, data, false).map_err(PassError::Write)
    }
    fn connect(&self, app: &App, volume: VolumeId) -> Result<Client<UnixStream>, PassError> {
        let failed = |text: String| PassError::Keep { name: self.late.name.clone(), text };
        let kept = match app.vault.get(self.late.branch) {
            Some(kept) => kept,
            None => {
                let made = app.vault.create_branch(&self.trunk, self.at, self.late.branch, &self.late.name);
                made.map_err(|e| failed(crate::chain(&e)))?
            }
        };
        kept.wait_durable().map_err(|e| self.trouble(e))?;
        let volumes = kept.shared.spec().volumes;
        app.exports.add_ingest(&kept, &volumes, app.nbd_listen.is_some()).map_err(|e| failed(crate::chain(&e)))?;
        let export = app.exports.of_group(kept.id()).into_iter().find(|e| e.volume == volume && e.is_ingest());
        let export = export.ok_or_else(|| failed("its volume is not exported".into()))?;
        let socket = UnixStream::connect(&export.socket).map_err(PassError::Socket)?;
        let limits = socket.set_read_timeout(Some(OWN_LIMIT)).and_then(|()| socket.set_write_timeout(Some(OWN_LIMIT)));
        limits.map_err(PassError::Socket)?;
        Client::connect(socket, &export.name).map_err(PassError::Connect)
    }
    /// Everything kept survives a power cut.
    pub fn flush(&mut self) -> Result<(), PassError> {
        self.clients.values_mut().try_for_each(|client| client.flush()).map_err(PassError::Write)
    }
}
