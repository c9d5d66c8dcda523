//! Groups at mirrors: mirrors in the host's volumes, and in sync mode the writes that wait at their legs.
//!
//! ```text
//!  leg ──Input::Leg──▶ Running::request ──▶ machine: Captured, FlushWaiting
//!                                            machine: ReleaseFlush ──▶ leg.done ──▶ the host's write returns
//! ```
//!
//! Every write waits, not only flushes: what the host's disk has acknowledged, the box has. The machine's gate decides (see
//! `replication`): **sync** they wait; **degraded** after the bound, until the box has caught up; **not yet** during the first copy.
//!
//! **Async** (where BPF is refused): the leg answers as soon as the write lies in this engine's inbox, and marks what has no room there
//! ([`crate::capture::dm::budget`]). So this thread may wait for a disk that it mirrors, and the host never waits for this thread.
//!
//! **A leg that is out stops its group**: nothing may be called consistent while writes go unseen. A second later, then ever
//! more seldom, up to [`RETRY_MS_MAX`], the mirror is put in again, and what was written meanwhile is compared with the box: the watch
//! knows it ([`super::memory`]). Where there is no watch, everything is.
//!
//! The guard of a leg answers for an engine that is late; what it let pass was not on the box, so the machine is made to degrade.

use super::group::{Group, VolumeAt};
use super::memory::{About, Memory, Remembering};
use super::start::{self, Before, VolumeRefusal};
use super::{Engine, EngineError, Input, READERS};
use crate::{
    capture::{
        self, Barrier, Op, Position, RequestId, TargetId,
        dm::{
            budget::{Budget, Charge, REQUEST_BYTES},
            ioctl::{DeviceMapper, DmError},
            leg::{Answers, FromLeg, LegNo, LegWrite},
            mirror::{self, Bounds, Hold, Mirror, MirrorError, Seen},
            order::Order,
            process,
        },
    },
    config::Config,
    disks::{Class, Device, Disks, DisksError},
    reader::{self, Pool},
    state::{GroupRecord, StateError},
};
use model::{Bound, Extent, GroupId, MonoTime, SECTOR, SyncMode};
use replication::{Event, GateState};
use std::{
    collections::HashMap,
    fmt, io,
    path::PathBuf,
    sync::{Arc, mpsc},
};
use wire::{Message, READ_BACK_MAX};

/// Requests of the legs and what they lost must fit into the engine's inbox beside everything else: whoever finds it full waits.
const LEGS_BYTES_MAX: u64 = (super::INBOX_MAX as u64 / 2 - 128) * REQUEST_BYTES;
/// Mirrors' targets are numbered from here; the ring's are counted from one.
const FIRST_TARGET: u32 = 1 << 31;
const RETRY_MS_MIN: u64 = 1_000;
pub(super) const RETRY_MS_MAX: u64 = 30_000;
/// In async mode only a read of a failed disk waits for an answer; with the kernel's margin it also bounds how long a hung agent is waited for.
const ASYNC_ANSWER_MS: u64 = 1_000;

#[derive(Debug, thiserror::Error)]
pub(super) enum SyncRefusal {
    #[error(transparent)]
    Volume(#[from] VolumeRefusal),
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    #[error(transparent)]
    Dm(#[from] DmError),
    #[error(transparent)]
    Disks(#[from] DisksError),
    #[error(
        "{device} is not a volume of the device mapper (LVM, LUKS): only those can be mirrored while they are in use; protect it without \
         --sync, or have a volume put over it at the next boot: `holdfast-agent shim add {device}`"
    )]
    NotDm { device: String },
    #[error(
        "{device} holds {what}: under the strict policy the host's writes wait for the next agent when one dies, and that one may have to \
         write there itself before it runs. Protect it under the policy that lets the host go on (--sync, or at_bound = degrade)"
    )]
    Strict { device: String, what: Own },
    #[error(
        "{device} holds {what}, and the agent could not lock its memory: it might have to be read from the volume while that stands still. \
         Let it lock memory (CAP_IPC_LOCK, LimitMEMLOCK=infinity)"
    )]
    NotInMemory { device: String, what: Own },
    #[error("could not open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not start reader threads")]
    Threads(#[source] io::Error),
    #[error(transparent)]
    State(#[from] StateError),
}

/// What the agent itself needs of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Own {
    State(PathBuf),
    Program(PathBuf),
    Root,
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(dir) => write!(f, "the agent's state ({})", dir.display()),
            Self::Program(file) => write!(f, "the agent's program ({})", file.display()),
            Self::Root => f.write_str("the root file system"),
        }
    }
}

/// Whether a mirror may be put beneath what the agent itself needs. `in_memory`: whether the process is locked in memory, if that is known.
fn may_hold(device: &str, own: &[Own], mode: SyncMode, in_memory: Option<bool>) -> Result<(), SyncRefusal> {
    let Some(what) = own.first().cloned() else { return Ok(()) };
    let device = device.to_owned();
    match mode {
        SyncMode::Sync { at_bound: Bound::Hold, .. } => Err(SyncRefusal::Strict { device, what }),
        _ if in_memory == Some(false) => Err(SyncRefusal::NotInMemory { device, what }),
        _ => Ok(()),
    }
}

/// Nothing a read could wait for comes by the ring.
struct NoBarrier;

impl Barrier for NoBarrier {
    fn now(&self) -> Position {
        Position(0)
    }
}

pub(super) struct Mirrored {
    pub target: TargetId,
    pub group: GroupId,
    pub mirror: Mirror,
    pub order: Order,
    fencing: bool,
    local_failed: bool,
    /// The state directory lies on it.
    under_state: bool,
    pub memory: Memory,
    /// How many writes had arrived when what is remembered was last closed.
    pub arrived: u64,
    /// The last request of the leg that the engine has handled, and the last number a write of it got.
    pub heard: LegNo,
    pub last_capture: u64,
    /// The leg's connection has ended, and the kernel holds the host's writes until it is made again.
    parted: bool,
}

/// A piece of a read that the local disk could not serve.
struct Asked {
    target: TargetId,
    id: LegNo,
    /// Where in the read it belongs, in bytes.
    at: usize,
    len: usize,
}

/// A read that is being put together.
struct Reading {
    target: TargetId,
    id: LegNo,
    data: Vec<u8>,
    missing: usize,
}

/// All mirrors of this host, and who waits at their legs.
pub(super) struct Legs {
    dm: Option<Arc<DeviceMapper>>,
    pub pool: Option<Pool>,
    pub(super) mirrors: Vec<Mirrored>,
    pub(super) remembering: Remembering,
    waiting: HashMap<u64, (TargetId, LegNo)>,
    /// For the legs that answer at once.
    budget: Arc<Budget>,
    /// What the box is asked for.
    asked: HashMap<u64, Asked>,
    reading: Vec<Reading>,
    next_number: u64,
    next_target: u32,
    retry_at: MonoTime,
    retry_ms: u64,
    to_engine: mpsc::SyncSender<Input>,
    /// What came of [`process::stand_firm`], once it was called.
    firm: Option<bool>,
    /// Their local disk failed before the box had everything: not tried again by this agent.
    barred: Vec<GroupId>,
}

impl Legs {
    pub fn new(to_engine: mpsc::SyncSender<Input>, now: MonoTime, inbox_bytes: u64) -> Self {
        Self {
            dm: None,
            pool: None,
            mirrors: Vec::new(),
            remembering: Remembering::default(),
            waiting: HashMap::new(),
            budget: Budget::new(inbox_bytes.min(LEGS_BYTES_MAX)),
            asked: HashMap::new(),
            reading: Vec::new(),
            next_number: 0,
            next_target: FIRST_TARGET,
            retry_at: now,
            retry_ms: RETRY_MS_MIN,
            to_engine,
            firm: None,
            barred: Vec::new(),
        }
    }

    fn dm(&mut self) -> Result<Arc<DeviceMapper>, DmError> {
        match &self.dm {
            Some(dm) => Ok(dm.clone()),
            None => Ok(self.dm.insert(Arc::new(DeviceMapper::open()?)).clone()),
        }
    }

    fn get(&mut self, target: TargetId) -> Option<&mut Mirrored> {
        self.mirrors.iter_mut().find(|m| m.target == target)
    }

    /// A host that was to be held went on alone before its mirror was put in as it is now: it must be said, for as long as that is in.
    pub fn let_go_note(&self, group: GroupId) -> String {
        let let_go = self.mirrors.iter().any(|m| m.group == group && m.mirror.let_go);
        let told = "the host went on without the box before: nobody took its writes up in time (sync_hold_s)";
        if let_go { told.to_owned() } else { String::new() }
    }

    /// Whether what is written to the state directory may wait for the engine.
    pub fn holds_state(&self) -> bool {
        self.mirrors.iter().any(|m| m.under_state && !m.mirror.leg.answers_at_once())
    }

    /// How many writes have arrived; none for a target of the ring.
    pub fn handed_out(&self, target: TargetId) -> Option<u64> {
        self.mirrors.iter().find(|m| m.target == target).map(|m| m.order.count())
    }

    /// Whether a copy of `extent` must wait; none for a target of the ring.
    pub fn writes_before(&mut self, number: u64, target: TargetId, extent: &Extent) -> Option<bool> {
        let dm = self.dm.clone();
        let to_engine = self.to_engine.clone();
        let at = self.get(target)?;
        if !at.order.may_be_under_way(number, extent) {
            return Some(false);
        }
        let count = at.order.count();
        if at.mirror.local_writes_under_way() == Some(0) {
            at.order.idle(count);
            return Some(false);
        }
        if at.order.wants_fence(crate::clock::mono())
            && !at.fencing
            && let Some(dm) = dm
        {
            // Not in this thread: it takes as long as what is under way on the disk.
            let inner = at.mirror.inner();
            let fence = move || {
                let made = mirror::fence(&dm, inner);
                if let Err(e) = &made {
                    tracing::error!(error = %crate::error_chain(e), "could not bring a mirrored volume to rest for a moment");
                }
                let _ = to_engine.send(Input::Fenced(target, if made.is_ok() { count } else { 0 }));
            };
            at.fencing = std::thread::Builder::new().name("fence".to_owned()).spawn(fence).is_ok();
        }
        Some(true)
    }

    fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub fn fenced(&mut self, target: TargetId, number: u64) {
        if let Some(at) = self.get(target) {
            at.fencing = false;
            at.order.idle(number);
        }
    }

    /// The machine lets a write return.
    pub fn release(&mut self, flush: u64) {
        if let Some((target, id)) = self.waiting.remove(&flush)
            && let Some(at) = self.get(target)
        {
            at.mirror.leg.done(id);
        }
    }

    /// The box's answer to a piece.
    pub fn read_back(&mut self, number: u64, data: Option<Vec<u8>>) {
        let Some(piece) = self.asked.remove(&number) else { return };
        let Some(i) = self.reading.iter().position(|r| r.target == piece.target && r.id == piece.id) else { return };
        let reading = &mut self.reading[i];
        match data.filter(|d| d.len() == piece.len) {
            Some(data) => {
                reading.data[piece.at..piece.at + piece.len].copy_from_slice(&data);
                reading.missing -= piece.len;
            }
            None => {
                let failed = self.reading.swap_remove(i);
                if let Some(at) = self.get(failed.target) {
                    at.mirror.leg.failed(failed.id);
                }
                return;
            }
        }
        if reading.missing == 0 {
            let whole = self.reading.swap_remove(i);
            if let Some(at) = self.get(whole.target) {
                at.mirror.leg.data(whole.id, &whole.data);
            }
        }
    }

    /// The box will not answer what it was asked.
    pub fn reads_failed(&mut self) {
        self.asked.clear();
        for read in std::mem::take(&mut self.reading) {
            if let Some(at) = self.get(read.target) {
                at.mirror.leg.failed(read.id);
            }
        }
    }

    fn take(&mut self, group: Option<GroupId>) -> Vec<Mirrored> {
        let (out, stay) = std::mem::take(&mut self.mirrors)
            .into_iter()
            .partition::<Vec<_>, _>(|m| group.is_none_or(|g| g == m.group));
        self.mirrors = stay;
        let stays = |target: TargetId| out.iter().all(|m| m.target != target);
        self.waiting.retain(|_, (target, _)| stays(*target));
        self.asked.retain(|_, piece| stays(piece.target));
        self.reading.retain(|r| stays(r.target));
        out
    }
}

fn bounds(config: &Config, mode: SyncMode) -> Bounds {
    match mode {
        SyncMode::Sync { wait_ms_max, at_bound: Bound::Degrade } => Bounds { answer_ms: wait_ms_max, hold: None },
        SyncMode::Sync { wait_ms_max, at_bound: Bound::Hold } => {
            let reconnect_ms = u64::from(config.sync_hold_s) * 1000;
            let hold = Hold { wait_ms: wait_ms_max, reconnect_ms };
            // By then the kernel has what waits; the guard is for a kernel that does not keep its time limit.
            Bounds { answer_ms: reconnect_ms.max(wait_ms_max), hold: Some(hold) }
        }
        SyncMode::Async => Bounds { answer_ms: ASYNC_ANSWER_MS, hold: None },
    }
}

/// Whether `device` is `below` or lies on it.
fn lies_on(disks: &Disks, device: &Device, below: &Device) -> bool {
    let under: Vec<&str> = match &device.class {
        Class::Partition { of, .. } => vec![of],
        _ => device.slaves.iter().map(String::as_str).collect(),
    };
    device.name == below.name || under.into_iter().filter_map(|n| disks.get(n)).any(|d| lies_on(disks, d, below))
}

fn node(device: capture::DevNo) -> PathBuf {
    let link = std::fs::read_link(format!("/sys/dev/block/{device}")).unwrap_or_default();
    PathBuf::from("/dev").join(link.file_name().unwrap_or_default())
}

impl Engine {
    /// Says why volumes cannot be mirrored, before anything is changed.
    pub(super) fn may_mirror(&mut self, disks: &Disks, choices: &[String], mode: SyncMode) -> Result<(), SyncRefusal> {
        for choice in choices {
            let device = disks.find(choice)?;
            if !matches!(device.class, Class::Dm { .. }) {
                return Err(SyncRefusal::NotDm { device: device.title() });
            }
            may_hold(&device.title(), &self.own_on(disks, device), mode, self.ctx.sync.firm)?;
            mirror::check(&*self.ctx.sync.dm()?, device.number)?;
        }
        Ok(())
    }

    /// What the agent itself needs of a device.
    fn own_on(&self, disks: &Disks, device: &Device) -> Vec<Own> {
        use std::os::unix::fs::MetadataExt;
        let holds = |path: &std::path::Path| {
            let under = std::fs::metadata(path).ok().and_then(|m| {
                disks.by_number(capture::DevNo { major: libc::major(m.dev()), minor: libc::minor(m.dev()) })
            });
            under.is_some_and(|under| lies_on(disks, under, device))
        };
        let mut own = vec![(PathBuf::from("/"), Own::Root)];
        own.extend(std::env::current_exe().ok().map(|file| (file.clone(), Own::Program(file))));
        own.push((self.config.state_dir.clone(), Own::State(self.config.state_dir.clone())));
        own.into_iter().filter(|(path, _)| holds(path)).map(|(_, own)| own).collect()
    }

    /// Starts every sync group that does not run and can.
    pub(super) fn start_sync(&mut self, disks: &Disks) -> Result<(), EngineError> {
        for i in 0..self.groups.len() {
            let group = &self.groups[i];
            if !group.record.sync || group.running.is_some() || self.ctx.sync.barred.contains(&group.id()) {
                continue;
            }
            match self.put_in(&self.groups[i].record.clone(), disks) {
                Ok((volumes, before)) => {
                    self.begin_group(i, volumes, &before, false)?;
                    let told = self.ctx.sync.let_go_note(self.groups[i].id());
                    if !told.is_empty() {
                        tracing::error!(group = %self.groups[i].record.spec.name, %told, "the promise to hold the host was broken");
                    }
                    self.ctx.sync.retry_ms = RETRY_MS_MIN;
                }
                Err(e) => self.stopped_because(i, &crate::error_chain(&e)),
            }
        }
        Ok(())
    }

    fn stopped_because(&mut self, i: usize, why: &str) {
        let group = &mut self.groups[i];
        if group.stopped != why {
            tracing::error!(group = %group.record.spec.name, %why, "group is stopped: the host's writes are not protected");
            group.stopped = why.to_owned();
        }
    }

    /// Starts a sync group that the box has just accepted.
    pub(super) fn add_sync_group(&mut self, record: GroupRecord, disks: &Disks) -> Result<(), String> {
        let chain = |e: &dyn std::error::Error| crate::error_chain(e);
        let id = record.spec.id;
        self.groups.push(Group { record: record.clone(), running: None, stopped: String::new() });
        // First: with the mirror in, whether it could be stored may not be waited for.
        let added = if self.store_groups() {
            self.put_in(&record, disks).map_err(|e| chain(&e)).and_then(|(volumes, before)| {
                self.begin_group(self.groups.len() - 1, volumes, &before, true).map_err(|e| chain(&e))
            })
        } else {
            Err("could not store the list of groups; see the log".to_owned())
        };
        if added.is_err() {
            self.take_out_mirrors(Some(id));
            self.groups.retain(|g| g.id() != id);
            self.store_groups();
        }
        added
    }

    /// Puts a group's mirrors in; all of them or none.
    fn put_in(&mut self, record: &GroupRecord, disks: &Disks) -> Result<(Vec<VolumeAt>, Before), SyncRefusal> {
        let id = record.spec.id;
        let put = self.put_in_each(record, disks);
        if put.is_err() {
            self.take_out_mirrors(Some(id));
        }
        put
    }

    fn put_in_each(&mut self, record: &GroupRecord, disks: &Disks) -> Result<(Vec<VolumeAt>, Before), SyncRefusal> {
        let dm = self.ctx.sync.dm()?;
        let in_memory = *self.ctx.sync.firm.get_or_insert_with(process::stand_firm);
        if self.ctx.sync.pool.is_none() {
            let sender = self.to_self.clone();
            let deliver = move |outcome| {
                // The engine is gone when nobody takes it.
                let _ = sender.send(Input::Read(outcome));
            };
            self.ctx.sync.pool =
                Some(Pool::start(READERS, Arc::new(NoBarrier), deliver).map_err(SyncRefusal::Threads)?);
        }
        let known = self.remembered(&dm, record, disks)?;
        let mut volumes = Vec::new();
        for volume in &record.volumes {
            let device = start::find(disks, volume)?;
            let mode = record.spec.policy.mode;
            let own = self.own_on(disks, device);
            may_hold(&device.title(), &own, mode, Some(in_memory))?;
            let legs = &mut self.ctx.sync;
            let target = TargetId(legs.next_target);
            legs.next_target += 1;
            let to_engine = self.to_self.clone();
            let deliver = move |what| to_engine.send(Input::Leg(target, what)).is_ok();
            let bounds = bounds(&self.config, mode);
            let answers = match mode {
                SyncMode::Async => Answers::AtOnce(legs.budget.clone(), target),
                SyncMode::Sync { .. } => Answers::Engine,
            };
            let mirror = Mirror::put_in(&dm, device.number, volume.sectors, bounds, answers, deliver)?;
            tracing::info!(group = %record.spec.name, volume = mirror.name, stall_ms_max = bounds.stall_ms_max(), "mirror is in");
            let path = node(mirror.inner());
            let memory = legs.begin_memory(device.number, crate::clock::mono());
            legs.mirrors.push(Mirrored {
                target,
                group: record.spec.id,
                mirror,
                order: Order::default(),
                fencing: false,
                local_failed: false,
                under_state: own.iter().any(|o| matches!(o, Own::State(_))),
                memory,
                arrived: 0,
                heard: 0,
                last_capture: 0,
                parted: false,
            });
            let file = reader::open(&path).map_err(|source| SyncRefusal::Open { path, source })?;
            volumes.push(VolumeAt {
                id: volume.id,
                device: device.name.clone(),
                disk: device.name.clone(),
                range: Extent::new(0, volume.sectors),
                file: Arc::new(file),
                target,
            });
        }
        if self.ctx.sync.holds_state() {
            self.give_up_spools();
        }
        // Read when all writes go by the new legs: what went past them is marked.
        let mut before = Before::nothing();
        if known {
            let legs = &self.ctx.sync;
            let of = |m: &Mirrored| (m.target, legs.remembering.marks(m.mirror.outer()));
            before.marked(legs.mirrors.iter().filter(|m| m.group == record.spec.id).map(of).collect());
        }
        Ok((volumes, before))
    }

    /// Whether it is known where all of a group's volumes were written since its state was stored.
    fn remembered(&mut self, dm: &DeviceMapper, record: &GroupRecord, disks: &Disks) -> Result<bool, SyncRefusal> {
        let mut about = Vec::new();
        for volume in &record.volumes {
            let disk = start::find(disks, volume)?.number;
            about.push(About { disk, sectors: volume.sectors, mirrored: mirror::is_in(dm, disk)? });
        }
        let (state, id) = (&self.ctx.state, record.spec.id);
        let forget = || state.forget_run(id);
        Ok(self.ctx.sync.remembering.prepare(&self.config.pin_dir, id, &about, forget)?)
    }

    /// Takes the mirrors of a group, or all, out of the host's volumes.
    pub(super) fn take_out_mirrors(&mut self, group: Option<GroupId>) {
        let taken = self.ctx.sync.take(group);
        // All of them first: one may lie on another.
        taken.iter().for_each(|m| m.mirror.leg.open_up());
        // Open files keep the inner devices.
        for running in self.groups.iter_mut().filter(|g| group.is_none_or(|id| g.id() == id)).filter_map(|g| {
            let sync = g.record.sync;
            g.running.as_mut().filter(|_| sync)
        }) {
            running.volumes.clear();
        }
        for at in taken {
            let name = at.mirror.name.clone();
            let done = match self.ctx.sync.dm() {
                Ok(dm) => at.mirror.take_out(&dm, at.parted),
                Err(e) => Err(e.into()),
            };
            match done {
                Ok(()) => tracing::info!(volume = name, "mirror is out"),
                Err(e) => {
                    tracing::error!(volume = name, error = %crate::error_chain(&e), "could not take a mirror out; `holdfast-agent remove` tries again");
                }
            }
        }
    }

    pub(super) fn heard_from_leg(&mut self, target: TargetId, what: FromLeg) {
        // Of all volumes, also when the one whose leg tells is out by now.
        if let FromLeg::Lost(lost) = what {
            return self.legs_lost(lost);
        }
        let Some(at) = self.ctx.sync.get(target) else { return };
        let group = at.group;
        if let FromLeg::Read { id, .. } = &what {
            at.heard = *id;
        }
        match what {
            FromLeg::Write(write, charge) => self.leg_write(target, group, write, charge),
            FromLeg::Lost(_) => {}
            FromLeg::Read { id, extent } => self.leg_read(target, group, id, extent),
            FromLeg::Overran { requests } => {
                self.alarm(
                    group,
                    format!("{requests} writes of the host were let go before the box had them: the agent was late"),
                );
                let mode = self.groups.iter().find(|g| g.id() == group).map(|g| g.record.spec.policy.mode);
                if let (Some(mode), Some((running, ctx))) = (mode, self.running(group)) {
                    // There and back: the way a machine comes to "degraded".
                    running.on(ctx, group, Event::Mode(SyncMode::Async));
                    running.on(ctx, group, Event::Mode(mode));
                }
            }
            FromLeg::Gone { why } if self.held_by_kernel(target) => {
                tracing::warn!(%group, %why, "the kernel holds the host's writes until the box has answered, as the policy says");
            }
            FromLeg::Gone { why } => self.stop_sync(group, &format!("a mirror's leg is out: {why}")),
        }
    }

    /// Notes that a leg's connection ended; says whether the kernel holds the host's writes meanwhile.
    fn held_by_kernel(&mut self, target: TargetId) -> bool {
        let Some(at) = self.ctx.sync.get(target) else { return false };
        at.parted = at.mirror.holds();
        at.parted
    }

    /// A leg that the kernel gave up because the box was late comes back when the box has what was under way then: what the kernel sends
    /// again is answered soon.
    fn come_back(&mut self, target: TargetId, group: GroupId) {
        let legs = &self.ctx.sync;
        let parted = legs.mirrors.iter().any(|m| m.target == target && m.parted);
        if !parted || legs.waiting.values().any(|(waits, _)| *waits == target) {
            return;
        }
        let Some(mode) = self.groups.iter().find(|g| g.id() == group).map(|g| g.record.spec.policy.mode) else {
            return;
        };
        let bounds = bounds(&self.config, mode);
        let to_engine = self.to_self.clone();
        let deliver = move |what| to_engine.send(Input::Leg(target, what)).is_ok();
        let Ok(dm) = self.ctx.sync.dm() else { return };
        let Some(at) = self.ctx.sync.get(target) else { return };
        match at.mirror.again(&dm, bounds, deliver) {
            Ok(()) => {
                at.parted = false;
                tracing::info!(%group, "the box has answered: the host's writes go on");
            }
            // The next look at the mirror tells whether the kernel has let the host go.
            Err(e) => {
                tracing::warn!(%group, error = %crate::error_chain(&e), "could not take the host's writes up again")
            }
        }
    }

    /// The local disk could not serve a read: the box can, as long as it has everything.
    fn leg_read(&mut self, target: TargetId, group: GroupId, id: LegNo, extent: Extent) {
        let volume = self.running(group).and_then(|(running, _)| {
            let status = running.source.status();
            let whole = status.gap.is_none() && status.gate == GateState::Sync;
            running.volumes.iter().find(|v| whole && v.target == target).map(|v| v.id)
        });
        let Some(at) = self.ctx.sync.get(target) else { return };
        let name = at.mirror.name.clone();
        let (Some(volume), true) = (volume, self.control_up.is_some()) else {
            at.mirror.leg.failed(id);
            let what = "cannot be read, and the box has not everything or cannot be reached: reads fail";
            return self.alarm(group, format!("the local disk of /dev/mapper/{name} {what}"));
        };
        let len = extent.bytes() as usize;
        self.ctx.sync.reading.push(Reading { target, id, data: vec![0; len], missing: len });
        let mut from = 0;
        while from < len {
            let piece = (len - from).min(READ_BACK_MAX);
            let number = self.ctx.sync.next_number();
            self.ctx.sync.asked.insert(number, Asked { target, id, at: from, len: piece });
            let part = Extent::new(extent.start() + from as u64 / SECTOR, piece as u64 / SECTOR);
            self.tell(Message::ReadBack { id: number, group, volume, extent: part });
            from += piece;
        }
        self.alarm(group, format!("the local disk of /dev/mapper/{name} cannot be read: the host reads from the box"));
    }

    /// Takes what legs have lost and not told yet. False while one is telling it: it waits for this thread.
    pub(super) fn take_lost_of_legs(&mut self) -> bool {
        let lost = self.ctx.sync.budget.take_lost();
        let told = lost.is_some();
        self.legs_lost(lost.unwrap_or_default());
        told
    }

    /// Writes that had no room.
    fn legs_lost(&mut self, lost: Vec<(TargetId, Extent)>) {
        for (target, extent) in lost {
            // Of a mirror that was taken out meanwhile: then everything is compared.
            let Some(at) = self.ctx.sync.get(target) else { continue };
            at.order.arrived(extent);
            let group = at.group;
            if let Some((running, ctx)) = self.running(group) {
                running.lost(ctx, group, target, &[extent], capture::LostWhy::Overflow);
            }
        }
    }

    /// `charge`: what the write takes of the inbox's budget, until it is the spool's.
    fn leg_write(&mut self, target: TargetId, group: GroupId, write: LegWrite, charge: Option<Charge>) {
        let LegWrite { id, op, fua, extent, data, mono } = write;
        let Some(at) = self.ctx.sync.get(target) else { return };
        if op != Op::Flush {
            at.order.arrived(extent);
        }
        let flush = self.ctx.sync.next_number();
        self.ctx.sync.waiting.insert(flush, (target, id));
        let extents = if op == Op::Flush { Vec::new() } else { vec![extent] };
        let request =
            capture::Request { target, id: RequestId(id), op, fua, preflush: false, mono, extents, data: Vec::new() };
        let mut last = None;
        match self.running(group) {
            Some((running, ctx)) => {
                last = running.request(ctx, group, &request, &Arc::new(data));
                running.on(ctx, group, Event::FlushWaiting { id: flush });
            }
            // Everything is copied when it starts.
            None => self.ctx.sync.release(flush),
        }
        if let Some(at) = self.ctx.sync.get(target) {
            at.heard = id;
            at.last_capture = last.unwrap_or(at.last_capture);
        }
        drop(charge);
    }

    fn alarm(&mut self, group: GroupId, what: String) {
        if let Some((running, _)) = self.running(group)
            && running.last_alarm != what
        {
            tracing::error!(%group, alarm = %what, "alarm");
            running.last_alarm = what;
            running.waited = false;
        }
    }

    /// Nothing of a group that is protected no longer is watched; with the last sync group, nothing at all.
    pub(super) fn stop_watching(&mut self, group: GroupId) {
        let legs = &mut self.ctx.sync;
        let of: Vec<_> = legs.mirrors.iter().filter(|m| m.group == group).map(|m| m.mirror.outer()).collect();
        of.into_iter().for_each(|disk| legs.remembering.drop_device(disk));
        if self.groups.iter().all(|g| !g.record.sync || g.id() == group) {
            self.ctx.sync.remembering.end(&self.config.pin_dir);
        }
    }

    /// Writes may go unseen from here on: the group stops, and starts anew with what is marked meanwhile.
    fn stop_sync(&mut self, group: GroupId, why: &str) {
        let Some(i) = self.groups.iter().position(|g| g.id() == group) else { return };
        self.groups[i].running = None;
        self.ctx.open_losses.retain(|(g, _)| *g != group);
        // Legs close with the mirrors; the tables stay, and the next start goes on with them.
        drop(self.ctx.sync.take(Some(group)));
        let legs = &mut self.ctx.sync;
        legs.retry_at = crate::clock::mono().plus_ms(legs.retry_ms);
        legs.retry_ms = (legs.retry_ms * 2).clamp(RETRY_MS_MIN, RETRY_MS_MAX);
        self.stopped_because(i, why);
    }

    /// The operator has changed a policy on the box.
    pub(super) fn mode_of_sync(&mut self, group: GroupId, mode: SyncMode) {
        if !self.groups.iter().any(|g| g.id() == group && g.record.sync) {
            return;
        }
        let bounds = bounds(&self.config, mode);
        let of = |m: &&Mirrored| m.group == group;
        let other_kind = |m: &Mirrored| {
            m.mirror.holds() != bounds.hold.is_some() || m.mirror.leg.answers_at_once() != (mode == SyncMode::Async)
        };
        if self.ctx.sync.mirrors.iter().filter(of).any(other_kind) {
            // Another kind of leg: out and in again, which costs what is written in that moment.
            self.ctx.sync.retry_ms = 0;
            return self.stop_sync(group, "the policy has changed: the mirror is put in anew");
        }
        for at in self.ctx.sync.mirrors.iter().filter(of) {
            if let Err(e) = at.mirror.set_bounds(bounds) {
                tracing::warn!(%group, error = %crate::error_chain(&e), "the kernel's own time limit for the leg stays as it was");
            }
        }
        if let Some((running, ctx)) = self.running(group) {
            running.on(ctx, group, Event::Mode(mode));
        }
    }

    /// Once a second: what the kernel says of the mirrors, and groups that wait to start again.
    pub(super) fn watch_mirrors(&mut self, now: MonoTime) {
        let dm = self.ctx.sync.dm.clone();
        let look = |m: &Mirrored| Some((m.target, m.group, m.mirror.name.clone(), m.mirror.look(dm.as_ref()?)));
        let looks: Vec<_> = self.ctx.sync.mirrors.iter().filter_map(look).collect();
        let mut whole = Vec::new();
        for (target, group, name, seen) in looks {
            match seen {
                Ok(Seen::Whole) => {
                    self.come_back(target, group);
                    whole.push((target, group));
                }
                Ok(Seen::LocalFailed) => self.local_failed(target, group, &name),
                Ok(Seen::LegOut) => self.stop_sync(group, "the kernel has left the mirror's second leg out"),
                Ok(Seen::Replaced) => {
                    self.stop_sync(group, &format!("somebody (LVM?) has changed the table of /dev/mapper/{name}"));
                }
                Ok(Seen::Gone) => {
                    // The inner device must not keep what is below it busy.
                    self.take_out_mirrors(Some(group));
                    self.stop_sync(group, &format!("/dev/mapper/{name} is not active"));
                }
                Err(e) => tracing::warn!(volume = name, error = %crate::error_chain(&e), "could not look at a mirror"),
            }
        }
        self.forget_written(&whole, now);
        let waits = self.groups.iter().any(|g| g.record.sync && g.running.is_none());
        if waits && now >= self.ctx.sync.retry_at {
            let legs = &mut self.ctx.sync;
            legs.retry_at = now.plus_ms(legs.retry_ms);
            legs.retry_ms = (legs.retry_ms * 2).min(RETRY_MS_MAX);
            let started = Disks::here()
                .map_err(|e| crate::error_chain(&e))
                .and_then(|disks| self.start_sync(&disks).map_err(|e| crate::error_chain(&e)));
            if let Err(why) = started {
                tracing::error!(%why, "could not start a stopped group");
            }
        }
    }

    fn local_failed(&mut self, target: TargetId, group: GroupId, name: &str) {
        let Some(at) = self.ctx.sync.get(target) else { return };
        if std::mem::replace(&mut at.local_failed, true) {
            return;
        }
        // Only what waited for the box is on it for certain.
        let sync = !at.mirror.leg.answers_at_once();
        let whole = self.running(group).is_some_and(|(r, _)| r.source.status().gap.is_none());
        if whole && sync {
            self.alarm(
                group,
                format!("the local disk of /dev/mapper/{name} has failed: new writes are on the box only"),
            );
            return;
        }
        // The box has not all of it: the host must hear of its disk's errors itself.
        self.take_out_mirrors(Some(group));
        self.ctx.sync.barred.push(group);
        let when = if sync { " before everything was copied" } else { "" };
        let why = format!("the local disk of /dev/mapper/{name} failed{when}: mend it and start the agent again");
        self.stop_sync(group, &why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_that_the_agent_lives_on_is_mirrored_where_nothing_can_wait_for_itself() {
        let degrade = SyncMode::Sync { wait_ms_max: 5_000, at_bound: Bound::Degrade };
        let hold = SyncMode::Sync { wait_ms_max: 5_000, at_bound: Bound::Hold };
        let own = [Own::Root, Own::State(PathBuf::from("/var/lib/holdfast-agent"))];
        for mode in [SyncMode::Async, degrade] {
            assert!(
                may_hold("vg-root", &own, mode, None).is_ok(),
                "not known yet: found out before anything is changed"
            );
            assert!(may_hold("vg-root", &own, mode, Some(true)).is_ok());
            let refused = may_hold("vg-root", &own, mode, Some(false)).unwrap_err();
            assert!(refused.to_string().contains("lock its memory"), "{refused}");
        }
        let refused = may_hold("vg-root", &own, hold, Some(true)).unwrap_err();
        assert!(
            refused.to_string().contains("vg-root holds the root file system: under the strict policy"),
            "{refused}"
        );
        for mode in [SyncMode::Async, degrade, hold] {
            assert!(may_hold("vg-data", &[], mode, Some(false)).is_ok());
        }
    }
}
