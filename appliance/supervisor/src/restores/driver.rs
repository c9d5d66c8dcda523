//! The thread of a restore: events of the machine's connection in, looks and records out.

use super::{
    passes::{self, DiskPart, Keeper, NextPass, Part, PassError},
    restore_id,
    state::{Late, RestoreFault, RestorePhase, Run, Said, Stage, State},
};
use crate::{
    App,
    events::Event,
    links::{Follower, FromTarget, Inbound, LinkLane, TargetInfo},
    pki,
    vault::inbox::Wait,
};
use model::{ByteLen, Codec, Extent, GroupId, Lsn, MonoTime, RecordKind, SECTOR, SourceSeq, VolumeId, WriteFlags};
use replication::{
    GRANULE_SECTORS, GranuleMap,
    restore::{Pass, Progress, Source, SourceAction, SourceConfig, SourceEvent},
};
use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};
use wire::{
    Ack, BlockHash, FrameHeader, FrameKind, Look, Message, Packer, Refusal, RefuseCode, RestoreDisk, RestoreId,
    RestoreProgress, crc32, encode_header,
};

/// How long the thread sleeps when nothing comes; what is asked of it is seen then.
const TICK: Duration = Duration::from_millis(50);
/// Between two looks at what was written at a source.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);
/// What cannot be done now is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
const SHOW_EVERY: Duration = Duration::from_millis(500);
/// For an earlier restore of the same machine to let its disks go.
const LET_GO_MAX: Duration = Duration::from_secs(10);
/// So often in a row blocks that were written and flushed may turn out to be different.
const UNTRUE_MAX: u32 = 3;

pub fn drive(app: &Arc<App>, run: &Arc<Run>, dir: &Path) {
    let state = run.state();
    let follower = Follower::default();
    match Driver::new(app, run, dir, &state) {
        Ok(mut driver) => {
            // A restore of the same machine that is over may still be about to say so: its end must come before our beginning.
            let deadline = Instant::now() + LET_GO_MAX;
            while app.links.targets.is_followed(state.host) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(5));
            }
            app.links.targets.follow(state.host, &follower);
            driver.run(&follower);
            app.links.targets.leave(state.host, &follower);
        }
        Err(e) => {
            let remedy = e.remedy().unwrap_or("begin it again");
            fail(app, run, dir, crate::chain(&e), remedy.to_owned());
        }
    }
}

fn fail(app: &App, run: &Run, dir: &Path, text: String, remedy: String) {
    app.events.note(Event::RestoreFailed, &run.state().host_name, format!("restore {}: {text}", run.state().id));
    let kept = run.change(dir, |state| {
        state.stage = Stage::Failed { text, remedy };
        Ok(())
    });
    if let Err(e) = kept {
        tracing::error!(error = crate::chain(&e), "the state of a restore was not kept");
    }
}

/// The machine's connection.
struct Line {
    lane: Arc<LinkLane>,
    instance: [u8; 16],
    open: bool,
    /// The end was said on it; with a reboot.
    ended: Option<bool>,
}

struct Driver<'a> {
    app: &'a Arc<App>,
    run: &'a Run,
    dir: &'a Path,
    id: RestoreId,
    parts: Vec<Part>,
    disks: Vec<DiskPart>,
    keepers: Vec<Keeper>,
    /// Written at the sources, and in no pass yet.
    carried: Vec<GranuleMap>,
    source: Source,
    /// What machines before this one counted.
    sum: Progress,
    line: Option<Line>,
    /// The agent that had the disks last.
    instance: Option<[u8; 16]>,
    compares: VecDeque<(Look, Vec<BlockHash>)>,
    packer: Option<Packer>,
    pass: u64,
    behind_bytes: u64,
    lsns: BTreeMap<GroupId, Lsn>,
    untrue: u32,
    shipped_before: u64,
    looks_at_changes: bool,
    waits: Option<String>,
    next_try: Instant,
    next_show: Instant,
}

impl<'a> Driver<'a> {
    fn new(app: &'a Arc<App>, run: &'a Run, dir: &'a Path, state: &State) -> Result<Self, PassError> {
        let (parts, disks) = passes::parts(state, app)?;
        let now = Instant::now();
        let mut driver = Self {
            app,
            run,
            dir,
            id: restore_id(&state.id).unwrap_or(RestoreId(0)),
            carried: disks.iter().map(|d| GranuleMap::empty(d.sectors)).collect(),
            source: Source::new(SourceConfig::default(), &passes::source_disks(&disks)),
            sum: Progress::default(),
            parts,
            disks,
            keepers: Vec::new(),
            line: None,
            instance: None,
            compares: VecDeque::new(),
            packer: Packer::new().ok(),
            pass: 0,
            behind_bytes: 0,
            lsns: BTreeMap::new(),
            untrue: 0,
            shipped_before: 0,
            looks_at_changes: true,
            waits: None,
            next_try: now,
            next_show: now,
        };
        if state.wish.keep_old && !state.kept {
            driver.prepare_keeping(state)?;
        }
        if state.wish.collect && !state.kept {
            driver.keepers = driver.parts.iter().map(|part| Keeper::into(app, part)).collect::<Result<_, _>>()?;
        }
        Ok(driver)
    }

    fn run(&mut self, follower: &Follower) {
        let mut events = VecDeque::new();
        loop {
            let wait = if self.compares.is_empty() { Wait::AtMost(TICK) } else { Wait::No };
            follower.take(&mut events, wait);
            for event in events.drain(..) {
                self.event(event);
            }
            if self.run.pause.load(Ordering::Acquire) {
                return;
            }
            self.compare_one();
            self.act();
            self.show();
            if let Some(line) = &self.line {
                line.lane.outbox.wake();
            }
            if self.run.state().is_over() {
                self.let_go();
                return;
            }
        }
    }

    // ------------------------------------------------------------ the machine

    fn event(&mut self, event: FromTarget) {
        match event {
            FromTarget::Up(info) => self.came(&info),
            FromTarget::Down { lane } if self.line.as_ref().is_some_and(|l| l.lane.id == lane) => self.went(),
            FromTarget::Down { .. } => {}
            FromTarget::Frame { lane, inbound, cost } => {
                let Some(line) = self.line.as_ref().filter(|l| l.lane.id == lane) else { return };
                line.lane.outbox.put(cost, |_| {});
                self.heard(inbound);
            }
        }
    }

    fn came(&mut self, info: &TargetInfo) {
        self.went();
        self.line = Some(Line { lane: Arc::clone(&info.lane), instance: info.instance, open: false, ended: None });
        if !matches!(self.run.state().stage, Stage::Working) {
            return;
        }
        let mut identities = BTreeMap::new();
        for disk in &self.disks {
            let state = self.run.state();
            let expected = state.identities.get(&disk.path).map(String::as_str);
            match super::fit(info, &disk.path, disk.sectors.bytes(), expected) {
                Ok(identity) => drop(identities.insert(disk.path.clone(), identity)),
                Err(e) => return self.fail(crate::chain(&e), "choose the disks anew: `holdfast restore targets`"),
            }
        }
        let known = self.change(|state| state.identities = identities);
        if known {
            let disks = self.disks.iter().enumerate();
            let disks =
                disks.map(|(i, d)| RestoreDisk { disk: VolumeId(i as u32), path: d.path.clone(), sectors: d.sectors });
            self.say(&Message::RestoreOpen { restore: self.id, disks: disks.collect() });
        }
    }

    fn went(&mut self) {
        let Some(line) = self.line.take() else { return };
        self.compares.clear();
        self.on(SourceEvent::Disconnected);
        // A machine that starts anew has no time to say so.
        if let Some(reboot @ true) = line.ended {
            self.released(reboot);
        }
    }

    fn heard(&mut self, inbound: Inbound) {
        match inbound {
            Inbound::Record { header, payload } => match Ack::decode(&header, &payload) {
                Ok(ack) => self.on(SourceEvent::Acked(ack)),
                Err(e) => self.hang_up(crate::chain(&e)),
            },
            Inbound::Message(Message::RestoreOpened { restore, refused, credit }) if restore == self.id => {
                match refused {
                    Some(text) => self.fail(
                        format!("the machine did not take its disks: {text}"),
                        "see to it that nothing uses them, and begin again",
                    ),
                    None => self.opened(credit),
                }
            }
            Inbound::Message(Message::RestoreLooked { id, hashes }) => self.on(SourceEvent::Looked { id, hashes }),
            Inbound::Message(Message::RestoreFetched { id, data }) => self.fetched(id, &data),
            Inbound::Message(Message::RestoreFailed { restore, text }) if restore == self.id => {
                self.fail(text, "replace the disk, and begin again: what is right already is not sent once more");
            }
            Inbound::Message(Message::RestoreEnded { restore }) if restore == self.id => {
                if let Some(reboot) = self.line.as_ref().and_then(|l| l.ended) {
                    self.released(reboot);
                }
            }
            Inbound::Message(_) => {}
        }
    }

    fn opened(&mut self, credit: wire::Credit) {
        let Some(line) = self.line.as_mut() else { return };
        line.open = true;
        // Another agent, or the same after the machine's power was cut: what it had not flushed is not there.
        if self.instance.replace(line.instance) != Some(line.instance) {
            self.look_at_everything();
        }
        self.on(SourceEvent::Opened { credit });
    }

    /// The pass that runs is given up, and the next one looks at everything, with views taken up anew.
    fn look_at_everything(&mut self) {
        for disk in &mut self.disks {
            disk.unproved.set_all();
        }
        self.parts.iter_mut().for_each(|part| part.last = None);
        self.compares.clear();
        self.sum = self.progress();
        self.source = Source::new(SourceConfig::default(), &passes::source_disks(&self.disks));
        self.next_try = self.next_try.min(Instant::now());
    }
    /// With what earlier machines counted.
    fn progress(&self) -> Progress {
        let now = self.source.progress();
        Progress {
            shipped_bytes: self.sum.shipped_bytes + now.shipped_bytes,
            zeroed_bytes: self.sum.zeroed_bytes + now.zeroed_bytes,
            same_bytes: self.sum.same_bytes + now.same_bytes,
            fetched_bytes: self.sum.fetched_bytes + now.fetched_bytes,
            ..now
        }
    }

    fn say(&self, message: &Message) {
        if let Some(line) = &self.line {
            line.lane.say(message);
        }
    }

    /// The machine broke the rules, or something of ours does not go on with it: a new connection begins anew.
    fn hang_up(&mut self, why: String) {
        let Some(line) = self.line.take() else { return };
        self.app.events.note(Event::FrameRefused, &line.lane.peer, &why);
        line.lane.say(&Message::Refuse(Refusal { code: RefuseCode::OutOfPlace, text: why }));
        line.lane.outbox.close();
        self.compares.clear();
        self.on(SourceEvent::Disconnected);
    }

    // ------------------------------------------------------------ the pass

    fn on(&mut self, event: SourceEvent) {
        let mut out = Vec::new();
        let done = self.source.on(event, &mut out);
        self.carry_out(out);
        if let Err(e) = done {
            self.hang_up(e.to_string());
        }
    }

    fn carry_out(&mut self, actions: Vec<SourceAction>) {
        for action in actions {
            match action {
                SourceAction::Look(look) => self.say(&Message::RestoreLook(look)),
                SourceAction::Compare { look, hashes } => self.compares.push_back((look, hashes)),
                SourceAction::Send { seq, disk, extent, zero } => {
                    if let Err(e) = self.send(seq, disk, extent, zero) {
                        return self.cannot(&e);
                    }
                }
                SourceAction::Flush { seq } => {
                    self.put(RecordKind::Flush, seq, VolumeId(0), Extent::default(), Codec::Raw, &[])
                }
                SourceAction::Fetch { id, disk, extent } => self.say(&Message::RestoreFetch { id, disk, extent }),
                // Only where something was fetched, and that is seen to there.
                SourceAction::Keep { .. } => {}
                SourceAction::PassDone(Pass::Keep) => self.all_kept(),
                SourceAction::PassDone(Pass::Ship) => self.pass_done(),
            }
        }
    }

    fn send(&mut self, seq: SourceSeq, disk: VolumeId, extent: Extent, zero: bool) -> Result<(), PassError> {
        let part = &mut self.disks[disk.0 as usize];
        let run = part.unproved.touching(&extent);
        part.unproved.set(run);
        if zero {
            self.put(RecordKind::Zero, seq, disk, extent, Codec::Raw, &[]);
            return Ok(());
        }
        let mut data = vec![0; extent.bytes() as usize];
        self.parts[part.part].read(part.volume, &extent, &mut data)?;
        let mut packer = self.packer.take();
        let (codec, stored) = match packer.as_mut() {
            Some(packer) => packer.pack(&data),
            None => (Codec::Raw, &data[..]),
        };
        self.put(RecordKind::Write, seq, disk, extent, codec, stored);
        self.packer = packer;
        Ok(())
    }

    fn put(&self, kind: RecordKind, seq: SourceSeq, disk: VolumeId, extent: Extent, codec: Codec, payload: &[u8]) {
        let Some(line) = &self.line else { return };
        let header = FrameHeader {
            kind: FrameKind::Record(kind),
            codec,
            flags: WriteFlags::NONE,
            volume: disk,
            extent,
            seq,
            mono: MonoTime(0),
            wall_us: 0,
            payload_len: payload.len() as u32,
            payload_crc: crc32(payload),
        };
        match encode_header(&header) {
            Ok(bytes) => line.lane.outbox.put(0, |out| {
                out.extend_from_slice(&bytes);
                out.extend_from_slice(payload);
            }),
            Err(e) => tracing::error!(error = %e, "a record of a restore would not be accepted"),
        }
    }

    fn compare_one(&mut self) {
        let Some((look, hashes)) = self.compares.pop_front() else { return };
        let Some(disk) = self.disks.get(look.disk.0 as usize) else { return };
        let (part, volume) = (disk.part, disk.volume);
        let compared = passes::compare(&look, &hashes, |extent, buf| match self.source.pass() {
            Some(Pass::Keep) => self.keepers[part].read(volume, extent, buf),
            _ => self.parts[part].read(volume, extent, buf),
        });
        let (differ, zero) = match compared {
            Ok(bits) => bits,
            Err(e) => return self.cannot(&e),
        };
        if self.source.pass() == Some(Pass::Ship) && u64::from(look.block_sectors) == GRANULE_SECTORS {
            let proved = &mut self.disks[look.disk.0 as usize].unproved;
            for (i, block) in wire::blocks(&look.runs, look.block_sectors).enumerate() {
                if !wire::differs(&differ, i) {
                    proved.clear(proved.touching(&block));
                }
            }
        }
        self.on(SourceEvent::Compared { id: look.id, differ, zero });
    }

    /// Something at the box does not go on. For good, or for a while: then the machine's connection begins anew.
    fn cannot(&mut self, e: &PassError) {
        if let Some(remedy) = e.remedy() {
            return self.fail(crate::chain(e), remedy);
        }
        self.waits = Some(crate::chain(e));
        self.hang_up(crate::chain(e));
        self.look_at_everything();
        self.next_try = Instant::now() + RETRY;
    }

    fn pass_done(&mut self) {
        let shipped = self.shipped();
        // A pass over nothing but what was shipped before finds it the same, or the disk does not hold what is written to it.
        if !self.looks_at_changes && shipped > self.shipped_before {
            self.untrue += 1;
            if self.untrue >= UNTRUE_MAX {
                return self.fail(
                    "what was written and flushed reads differently afterwards".into(),
                    "something else writes to the machine's disks, or one of them is broken: see to it, and begin again",
                );
            }
        } else {
            self.untrue = 0;
        }
        self.next_try = Instant::now();
        if !self.run.state().finish && self.pass > 1 {
            self.next_try += FOLLOW_EVERY;
        }
    }
    fn shipped(&self) -> u64 {
        let progress = self.progress();
        progress.shipped_bytes + progress.zeroed_bytes
    }

    /// What is next, when no pass runs.
    fn act(&mut self) {
        let state = self.run.state();
        match &state.stage {
            Stage::Releasing { reboot, .. } => return self.end(*reboot),
            Stage::Working => {}
            _ => return,
        }
        let open = self.line.as_ref().is_some_and(|l| l.open);
        let wants_now = state.finish && self.waits.is_none();
        if !open || self.source.pass().is_some() || (Instant::now() < self.next_try && !wants_now) {
            return;
        }
        self.next_try = Instant::now() + RETRY;
        let begun = match state.kept {
            false if state.wish.keep_old || state.wish.collect => self.begin_keeping(),
            true if state.wish.collect => {
                self.done();
                Ok(())
            }
            _ => self.begin_pass(&state),
        };
        match begun {
            Ok(()) => self.waits = None,
            Err(e) => match e.remedy() {
                Some(remedy) => self.fail(crate::chain(&e), remedy),
                None => self.waits = Some(crate::chain(&e)),
            },
        }
    }

    fn begin_pass(&mut self, state: &State) -> Result<(), PassError> {
        let next = passes::next_pass(self.app, state, &mut self.parts, &self.disks, &mut self.carried)?;
        let NextPass { maps, behind_bytes, lsns } = next;
        self.lsns = lsns;
        self.behind_bytes = behind_bytes;
        if maps.iter().all(GranuleMap::is_empty) {
            if state.finish {
                self.done();
            } else {
                self.next_try = Instant::now() + FOLLOW_EVERY;
            }
            return Ok(());
        }
        self.pass += 1;
        self.looks_at_changes = behind_bytes > 0;
        self.shipped_before = self.shipped();
        let mut out = Vec::new();
        self.source.begin(Pass::Ship, maps, &mut out);
        self.carry_out(out);
        Ok(())
    }

    // ------------------------------------------------------------ old data

    /// The branches that will hold old data have their numbers and names before any of them is made.
    fn prepare_keeping(&mut self, state: &State) -> Result<(), PassError> {
        let mut late = state.late.clone();
        for (at, part) in self.parts.iter().enumerate().skip(late.len()) {
            let of = part.from.group();
            let failed = |text: &str| PassError::Keep { name: of.to_string(), text: text.into() };
            let branch = pki::random_128().map(GroupId).ok_or_else(|| failed("the system gave no random bytes"))?;
            late.push(Late { of, branch, name: late_name(self.app, of, at, self.parts.len(), state) });
        }
        self.change(|state| state.late = late.clone());
        for (part, late) in self.parts.iter().zip(late) {
            self.keepers.push(Keeper::new(self.app, part, late)?);
        }
        Ok(())
    }

    fn begin_keeping(&mut self) -> Result<(), PassError> {
        for keeper in &mut self.keepers {
            keeper.advance(self.app)?;
        }
        let full = self.disks.iter().map(|d| GranuleMap::full(d.sectors)).collect();
        let mut out = Vec::new();
        self.source.begin(Pass::Keep, full, &mut out);
        self.carry_out(out);
        Ok(())
    }

    fn fetched(&mut self, id: u64, data: &[u8]) {
        let mut out = Vec::new();
        if let Err(e) = self.source.on(SourceEvent::Fetched { id, bytes: data.len() as u64 }, &mut out) {
            return self.hang_up(e.to_string());
        }
        let keeps = out.iter().find_map(|action| match action {
            SourceAction::Keep { disk, extent, .. } => Some((*disk, *extent)),
            _ => None,
        });
        if let Some((disk, extent)) = keeps {
            let disk = &self.disks[disk.0 as usize];
            if let Err(e) = self.keepers[disk.part].write(self.app, disk.volume, &extent, data) {
                return self.cannot(&e);
            }
        }
        self.carry_out(out);
        self.on(SourceEvent::Kept { id });
    }

    /// Durable, then known as kept, then overwritten: what the old disks held is nowhere else.
    fn all_kept(&mut self) {
        for keeper in &mut self.keepers {
            if let Err(e) = keeper.flush() {
                return self.cannot(&e);
            }
        }
        let app = self.app;
        let kept = self.change(|state| {
            state.late.retain(|late| app.vault.get(late.branch).is_some());
            state.kept = true;
        });
        if kept {
            self.keepers.clear();
            self.next_try = Instant::now();
        }
    }

    // ------------------------------------------------------------ the end

    fn done(&mut self) {
        let lsns = self.lsns.clone();
        if self.change(|state| state.stage = Stage::Done { lsns }) {
            let state = self.run.state();
            let shipped = ByteLen(self.progress().shipped_bytes);
            self.app.events.note(Event::RestoreDone, &state.host_name, format!("restore {}: {shipped} sent", state.id));
        }
    }

    fn end(&mut self, reboot: bool) {
        let id = self.id;
        if let Some(line) = self.line.as_mut().filter(|l| l.ended.is_none()) {
            line.ended = Some(reboot);
            line.lane.say(&Message::RestoreEnd { restore: id, reboot });
        }
    }

    fn released(&mut self, reboot: bool) {
        if matches!(self.run.state().stage, Stage::Releasing { .. })
            && self.change(|s| s.stage = Stage::Released { reboot })
        {
            let state = self.run.state();
            self.app.events.note(Event::RestoreEnded, &state.host_name, format!("restore {}", state.id));
        }
    }

    /// Over without the machine having been released: it lets its disks go. A branch that holds a part of what a disk held is of no use; nothing of
    /// that disk was overwritten.
    fn let_go(&mut self) {
        let state = self.run.state();
        if !matches!(state.stage, Stage::Released { .. }) && self.line.as_ref().is_some_and(|l| l.ended.is_none()) {
            self.say(&Message::RestoreEnd { restore: self.id, reboot: false });
            if let Some(line) = &self.line {
                line.lane.outbox.wake();
            }
        }
        if state.kept {
            return;
        }
        self.keepers.clear();
        for late in &state.late {
            let Some(group) = self.app.vault.get(late.branch) else { continue };
            self.app.views.close_group(group.id());
            self.app.exports.remove_group(group.id());
            if let Err(e) = self.app.vault.delete(&group) {
                self.app.events.note(Event::JobFailed, group.name(), crate::chain(&e));
            }
            self.app.exports.remove_group(group.id());
        }
        let forgotten = self.run.change(self.dir, |state| {
            state.late.retain(|late| self.app.vault.get(late.branch).is_some());
            Ok(())
        });
        if let Err(e) = forgotten {
            tracing::warn!(error = crate::chain(&e), "the state of a restore was not kept");
        }
    }

    fn fail(&mut self, text: String, remedy: &str) {
        if matches!(self.run.state().stage, Stage::Working | Stage::Done { .. } | Stage::Releasing { .. }) {
            fail(self.app, self.run, self.dir, text, remedy.to_owned());
        }
    }

    /// False: it could not be stored, and is tried again.
    fn change(&mut self, change: impl FnOnce(&mut State)) -> bool {
        let changed = self.run.change(self.dir, |state| {
            if state.is_over() {
                return Err(RestoreFault::Over);
            }
            change(state);
            Ok(())
        });
        if let Err(e) = &changed {
            self.waits = Some(crate::chain(e));
        }
        changed.is_ok()
    }

    fn following(&self, left_bytes: u64) -> RestorePhase {
        let unproved: u64 = self.disks.iter().map(|d| d.unproved.covered().bytes()).sum();
        RestorePhase::Following {
            pass: self.pass,
            behind_bytes: left_bytes.max(self.behind_bytes).max(unproved),
            lsns: self.lsns.clone(),
        }
    }

    fn show(&mut self) {
        let state = self.run.state();
        let progress = self.progress();
        let done_bytes = progress.total_bytes.saturating_sub(progress.left_bytes);
        let total_bytes = progress.total_bytes;
        let waits = match &self.line {
            None => {
                Some(format!("the machine {:?} is not connected: start `holdfast-agent rescue` on it", state.host_name))
            }
            Some(line) if !line.open => Some("the machine opens its disks".into()),
            Some(_) => self.waits.clone(),
        };
        let phase = match (waits, self.source.pass()) {
            (Some(why), _) => RestorePhase::Waiting { why },
            (None, Some(Pass::Keep)) => RestorePhase::Keeping { done_bytes, total_bytes },
            (None, _) if state.finish && self.pass > 1 => RestorePhase::Finishing { left_bytes: progress.left_bytes },
            // A first pass that found all of it the same is followed by none until something is written.
            (None, None) if self.pass == 1 => self.following(progress.left_bytes),
            (None, _) if self.pass <= 1 => RestorePhase::Copying { done_bytes, total_bytes },
            (None, _) => self.following(progress.left_bytes),
        };
        self.run.say(Said {
            phase: phase.clone(),
            shipped_bytes: progress.shipped_bytes,
            zeroed_bytes: progress.zeroed_bytes,
            same_bytes: progress.same_bytes,
            kept_bytes: progress.fetched_bytes,
        });
        if Instant::now() >= self.next_show && self.line.is_some() {
            self.next_show = Instant::now() + SHOW_EVERY;
            let doing = doing(&state, &phase);
            self.say(&Message::RestoreProgress(RestoreProgress {
                doing,
                done_bytes: ByteLen(done_bytes),
                total_bytes: ByteLen(total_bytes),
                shipped_bytes: ByteLen(progress.shipped_bytes),
            }));
        }
    }
}

fn doing(state: &State, phase: &RestorePhase) -> String {
    let text = match phase {
        _ if matches!(state.stage, Stage::Done { .. }) => "done; waits to be released",
        RestorePhase::Waiting { why } => return why.clone(),
        RestorePhase::Keeping { .. } => "keeping what these disks held",
        RestorePhase::Copying { .. } => "copying",
        RestorePhase::Following { .. } => "following what is written meanwhile",
        _ => "finishing",
    };
    text.into()
}

/// `late writes of db1, 2026-11-23 02:10`; with the group's name where there are several.
fn late_name(app: &App, of: GroupId, at: usize, count: usize, state: &State) -> String {
    let trunk = app.vault.get(of).and_then(|g| g.shared.branch).and_then(|on| app.vault.get(on.group));
    let host = trunk.as_ref().and_then(|t| t.shared.host).map(|host| super::known_host(app, host));
    let host = host.or_else(|| trunk.as_ref().map(|t| t.name().to_owned())).unwrap_or_else(|| of.to_string());
    let micros = i64::try_from(state.begun_us).unwrap_or_default();
    let time = jiff::Timestamp::from_microsecond(micros).unwrap_or_default().to_zoned(jiff::tz::TimeZone::UTC);
    let mut name = format!("late writes of {host}, {}", time.strftime("%Y-%m-%d %H:%M"));
    if count > 1 {
        name = format!("{name}, {}", trunk.map_or_else(|| at.to_string(), |t| t.name().to_owned()));
    }
    if app.vault.find(&name).is_some() {
        name = format!("{name}, {}", state.id);
    }
    name.chars().take(120).collect()
}

/// A sector is what extents are counted in; a volume's bytes are whole ones.
const _: () = assert!(SECTOR == 512);
