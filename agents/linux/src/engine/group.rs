//! One protection group at work: its source machine, its spool, its connection, and the map from disks to volumes.

use super::{Ctx, HostLoad, Wait};
use crate::{
    capture::{self, Op, Position, Target, TargetId},
    clock,
    link::{FromLink, Link},
    reader::{Data, Job, Outcome},
    spool::{Body, Piece, Spool},
    state::{GroupRecord, RunState},
    survey::{Answer, OnDisk},
};
use durable::AlignedBuf;
use model::{Extent, GapReason, GroupId, SECTOR, VolumeId, WriteFlags};
use replication::{
    Action, Alarm, Captured, CapturedKind, Event, GateState, Lost, Now, Numbered, Payload, Pressure, PressureInput,
    ReadId, Source, pressure_and_cause,
};
use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    sync::Arc,
};
use wire::{BlockHash, Comparison, GroupAgentState, MAX_RECORD_BYTES, Message};

const RECORD_SECTORS: u64 = MAX_RECORD_BYTES as u64 / SECTOR;

/// A volume and where it lies.
pub(super) struct VolumeAt {
    pub id: VolumeId,
    /// Kernel name of the device that is the volume now.
    pub device: String,
    /// Disk to capture on, and the range of it.
    pub disk: String,
    pub range: Extent,
    /// Whole disk, opened for copying.
    pub file: Arc<File>,
    pub target: TargetId,
}

/// A read ordered by the machine that waits until it may begin.
struct Ordered {
    read: ReadId,
    at: usize,
    extent: Extent,
    /// Requests handed out before it was ordered; those in its way must have completed.
    number: u64,
}

/// Everything a group needs to work; none while it is stopped.
pub(super) struct Running {
    pub source: Source,
    pub spool: Spool,
    pub link: Link,
    /// The connection's generation while it is up.
    pub up: Option<u64>,
    pub volumes: Vec<VolumeAt>,
    pub box_reason: String,
    pub spool_note: String,
    pub pressure: Pressure,
    /// What asked for it, for people.
    pub pressure_cause: String,
    /// Disks of the group have their writes marked by the kernel half and not copied; see [`super::spare`].
    pub marked_in_kernel: bool,
    /// What the machine is told once they are copied again.
    pub pressure_then: Option<Pressure>,
    pub state: GroupAgentState,
    /// Sum over both of what is in the spool's memory and file.
    pub spool_max: u64,
    ordered: VecDeque<Ordered>,
    /// Payloads of writes being handed in, until the machine says what becomes of them.
    captures: HashMap<u64, Piece>,
    reads: HashMap<ReadId, (Extent, AlignedBuf)>,
    /// The question to the file systems that is under way.
    survey: Option<u64>,
    /// File systems that were copied whole, and why.
    pub copied_whole: Vec<String>,
    pub bookmarks: Vec<PlacedBookmark>,
    /// Answers to commands of the box, to go out on the control connection.
    pub box_answers: Vec<(u64, wire::CommandResult)>,
    pub last_alarm: String,
    /// The alarm is about the box's lateness: over when it has caught up.
    pub waited: bool,
    next_loss: u64,
    lost_bytes: u64,
    lost_why: Option<capture::LostWhy>,
    /// Last capture number that the machine lets go of.
    pub released: u64,
}

/// Where a bookmark's answer goes.
pub(super) enum BookmarkFor {
    Local(crate::local::Answer),
    Box { id: u64 },
}

pub(super) struct PlacedBookmark {
    pub id: u64,
    pub seq: Option<model::SourceSeq>,
    pub name: model::BookmarkName,
    pub answer: BookmarkFor,
    /// Dropped when the mark is placed: the file systems go on.
    pub frozen: Option<crate::freeze::Frozen>,
}

pub(super) struct Group {
    pub record: GroupRecord,
    pub running: Option<Running>,
    /// Why it does not run.
    pub stopped: String,
}

impl Group {
    pub fn id(&self) -> GroupId {
        self.record.spec.id
    }
}

/// Volumes of a group on one target, with the part of an extent that lies on each, in the volume's own sectors.
fn clip<'a>(
    volumes: &'a [VolumeAt],
    target: TargetId,
    extent: &'a Extent,
) -> impl Iterator<Item = (&'a VolumeAt, Extent, u64)> {
    volumes.iter().filter(move |v| v.target == target).filter_map(move |v| {
        let both = v.range.intersect(extent)?;
        // Third: how far into the extent the part begins.
        Some((v, Extent::new(both.start() - v.range.start(), both.sectors.0), both.start() - extent.start()))
    })
}

impl Running {
    pub fn new(
        source: Source,
        spool: Spool,
        link: Link,
        volumes: Vec<VolumeAt>,
        spool_max: u64,
        spool_note: String,
    ) -> Self {
        Self {
            source,
            spool,
            link,
            up: None,
            volumes,
            box_reason: "not connected yet".to_owned(),
            spool_note,
            pressure: Pressure::None,
            pressure_cause: String::new(),
            marked_in_kernel: false,
            pressure_then: None,
            state: GroupAgentState::Disconnected,
            spool_max,
            ordered: VecDeque::new(),
            captures: HashMap::new(),
            reads: HashMap::new(),
            survey: None,
            copied_whole: Vec::new(),
            bookmarks: Vec::new(),
            box_answers: Vec::new(),
            last_alarm: String::new(),
            waited: false,
            next_loss: 1,
            lost_bytes: 0,
            lost_why: None,
            released: 0,
        }
    }

    /// What comes from now on stays in memory; what is in the file is still read.
    pub fn give_up_spool_file(&mut self, note: String) {
        self.spool.close_file();
        self.spool_max = self.spool.memory_max();
        self.spool_note = note;
    }

    /// Hands a request of the host in, as far as it touches this group's volumes. Answers the last capture number given.
    pub fn request(
        &mut self,
        ctx: &mut Ctx,
        group: GroupId,
        request: &capture::Request,
        data: &Arc<Vec<u8>>,
    ) -> Option<u64> {
        let mut flags = WriteFlags::NONE;
        if request.fua {
            flags = flags | WriteFlags::FUA;
        }
        if request.preflush {
            flags = flags | WriteFlags::PREFLUSH;
        }
        let mut parts: Vec<(CapturedKind, VolumeId, Extent, Option<Piece>)> = Vec::new();
        if request.op == Op::Flush {
            let volume = self.volumes.iter().find(|v| v.target == request.target)?;
            parts.push((CapturedKind::Flush, volume.id, Extent::default(), None));
        }
        let mut before = 0u64;
        for extent in &request.extents {
            for (volume, part, skipped) in clip(&self.volumes, request.target, extent) {
                let kind = match request.op {
                    Op::Write => CapturedKind::Write,
                    Op::Zero => CapturedKind::Zero,
                    Op::Discard => CapturedKind::Discard,
                    Op::Flush => continue,
                };
                let most = if kind == CapturedKind::Write { RECORD_SECTORS } else { u64::from(u32::MAX) };
                let mut at = part.start();
                while at < part.end() {
                    let piece = Extent::between(at, part.end().min(at + most));
                    let payload = (kind == CapturedKind::Write).then(|| {
                        let from = ((before + skipped + at - part.start()) * SECTOR) as usize;
                        Piece { bytes: data.clone(), range: from..from + piece.bytes() as usize }
                    });
                    parts.push((kind, volume.id, piece, payload));
                    at = piece.end();
                }
            }
            before += extent.sectors.0;
        }
        let last = parts.len().checked_sub(1)?;
        let now = clock::mono();
        let wall_us = clock::wall_us().saturating_sub(now.0.saturating_sub(request.mono.0) / 1000);
        let mut no = None;
        for (i, (kind, volume, extent, payload)) in parts.into_iter().enumerate() {
            let capture = ctx.next_capture();
            if let Some(payload) = payload {
                self.captures.insert(capture, payload);
            }
            let more = if i < last { WriteFlags::MORE } else { WriteFlags::NONE };
            let captured = Captured { capture, kind, flags: flags | more, volume, extent, mono: request.mono, wall_us };
            self.on(ctx, group, Event::Captured(captured));
            no = Some(capture);
        }
        no
    }

    /// Hands losses in; answers the loss's number if this group is touched.
    pub fn lost(
        &mut self,
        ctx: &mut Ctx,
        group: GroupId,
        target: TargetId,
        extents: &[Extent],
        why: capture::LostWhy,
    ) -> Option<u64> {
        let mut out = Vec::new();
        for extent in extents {
            out.extend(clip(&self.volumes, target, extent).map(|(v, part, _)| (v.id, part)));
        }
        if out.is_empty() {
            return None;
        }
        let sectors: u64 = out.iter().map(|(_, e)| e.sectors.0).sum();
        self.lost_bytes += sectors * SECTOR;
        self.lost_why = Some(why);
        let reason = match why {
            capture::LostWhy::Overflow => GapReason::Overflow,
            capture::LostWhy::Unmatched
            | capture::LostWhy::WriteError
            | capture::LostWhy::Unreadable
            | capture::LostWhy::Stale => GapReason::Verify,
        };
        Some(self.report_loss(ctx, group, reason, Lost::Extents(out)))
    }

    pub fn report_loss(&mut self, ctx: &mut Ctx, group: GroupId, reason: GapReason, what: Lost) -> u64 {
        let id = self.next_loss;
        self.next_loss += 1;
        // Before the machine hears of it: it may answer at once that the loss is stored.
        ctx.open_losses.insert((group, id));
        self.on(ctx, group, Event::CaptureLost { id, reason, what });
        id
    }

    /// One event into the machine, and all its actions out, with the events that those bring about.
    pub fn on(&mut self, ctx: &mut Ctx, group: GroupId, event: Event) {
        let mut events = VecDeque::from([event]);
        // A spool that fails is told once for each run of actions.
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            self.source.on(event, now(), &mut actions);
            self.execute(ctx, group, actions, &mut events);
        }
    }

    /// The actions that making a machine brought about.
    pub fn begin(&mut self, ctx: &mut Ctx, group: GroupId, actions: Vec<Action>) {
        let mut events = VecDeque::new();
        self.execute(ctx, group, actions, &mut events);
        while let Some(event) = events.pop_front() {
            self.on(ctx, group, event);
        }
    }

    fn execute(&mut self, ctx: &mut Ctx, group: GroupId, actions: Vec<Action>, events: &mut VecDeque<Event>) {
        let mut spool_failed = false;
        for action in actions {
            match action {
                Action::Keep { record, payload } => {
                    let seq = record.seq;
                    let piece = self.payload(&record, payload);
                    if let Err(e) = self.spool.keep(record, piece) {
                        // Everything after it fails too, because numbers may not be skipped; one report covers all.
                        if !spool_failed {
                            tracing::warn!(group = %group, error = %crate::error_chain(&e), "the spool cannot keep a record");
                            events.push_back(Event::SpoolLost { from: seq });
                            spool_failed = true;
                        }
                    }
                }
                Action::Send { first, last } => self.send(first, last),
                Action::Release { through } => {
                    self.spool.release(through);
                    self.durable(through);
                }
                Action::Drop { from } => {
                    self.spool.drop_from(from);
                    self.taken_back(from);
                }
                Action::Forget { capture } => {
                    self.captures.remove(&capture);
                }
                Action::ReleaseCapture { through } => self.released = through,
                Action::LossRecorded { id } => ctx.loss_recorded(group, id),
                Action::Open { group, stream, first_seq, next_seq, volumes, acked_durable } => {
                    let clocks = now();
                    let (mono_ns, wall_us) = (clocks.mono.0, clocks.wall_us);
                    self.say(Message::OpenStream {
                        group,
                        stream,
                        first_seq,
                        next_seq,
                        volumes,
                        acked_durable,
                        mono_ns,
                        wall_us,
                    });
                }
                Action::Message(message) => self.say(message),
                Action::Disconnect(why) => {
                    if let Some(generation) = self.up.take() {
                        self.link.close(generation, why.to_string());
                    }
                }
                Action::ReadVolume { read, volume, extent } => {
                    if let Some(at) = self.volumes.iter().position(|v| v.id == volume) {
                        let volume = self.volumes[at].target;
                        self.ordered.push_back(Ordered { read, at, extent, number: ctx.handed_out(volume) });
                    } else {
                        events.push_back(Event::ReadFailed { read });
                    }
                }
                Action::Compare { id, read, volume, block_sectors, runs } => {
                    self.compare(id, read, volume, block_sectors, runs);
                }
                Action::Survey => self.begin_survey(ctx, group, events),
                Action::ReadFinished { read } => drop(self.reads.remove(&read)),
                Action::ReleaseFlush { id, .. } => ctx.sync.release(id),
                Action::Persist { serial, state } => {
                    let run = RunState { boot_id: ctx.boot_id.clone(), source: state };
                    match ctx.state.store_run(group, &run) {
                        Ok(()) => events.push_back(Event::Persisted { serial }),
                        // Not told as stored: the capture ring holds on, and what overflows it is marked in the kernel. Tried
                        // again with the next state, which the machine makes only after this one: so report it as an alarm.
                        Err(e) => {
                            self.last_alarm = crate::error_chain(&e);
                            tracing::error!(group = %group, error = %self.last_alarm, "could not keep the group's state; trying again");
                            ctx.retry_persist.push((group, serial, run));
                        }
                    }
                }
                Action::Drain { barrier } => ctx.wait(Wait::Drained { group, barrier }),
                Action::BookmarkPlaced { id, seq } => self.placed(id, seq),
                Action::BookmarkRefused { id, why } => self.refused(id, &why.to_string()),
                Action::State(state) => {
                    tracing::info!(group = %group, ?state, "group");
                    self.state = state;
                }
                Action::Gate(state) => self.gate(group, state),
                Action::Alarm(alarm) => self.raise(group, &alarm),
            }
        }
    }

    fn send(&mut self, first: model::SourceSeq, last: model::SourceSeq) {
        let Some(generation) = self.up else { return };
        let items: Vec<(Numbered, Body)> = self.spool.range(first, last).collect();
        let whole = items.len() as u64 == last.0 + 1 - first.0;
        self.link.records(generation, items);
        if !whole {
            // The machine believes them sent; what the box has is settled when the connection is made anew.
            self.link.close(generation, "the spool could not keep what was to be sent".to_owned());
        }
    }

    fn begin_survey(&mut self, ctx: &mut Ctx, group: GroupId, events: &mut VecDeque<Event>) {
        let on_disk =
            |v: &VolumeAt| OnDisk { id: v.id, device: v.device.clone(), disk: v.disk.clone(), range: v.range };
        self.survey = ctx.survey(group, self.volumes.iter().map(on_disk).collect());
        if self.survey.is_none() {
            events.push_back(Event::Surveyed { unused: Vec::new() });
        }
    }

    fn gate(&mut self, group: GroupId, state: GateState) {
        tracing::info!(group = %group, %state, "the host's writes");
        if state == GateState::Sync && std::mem::take(&mut self.waited) {
            self.last_alarm.clear();
        }
    }

    fn raise(&mut self, group: GroupId, alarm: &Alarm) {
        self.waited = matches!(alarm, Alarm::Degraded { .. } | Alarm::Holding { .. });
        self.last_alarm = alarm.to_string();
        tracing::warn!(group = %group, %alarm, "alarm");
    }

    fn payload(&mut self, record: &Numbered, payload: Payload) -> Option<Piece> {
        match payload {
            Payload::None => None,
            Payload::Captured(capture) => self.captures.remove(&capture),
            Payload::Mark(bytes) => Some(Piece::whole(bytes.into_vec())),
            Payload::Read(read) => {
                let (extent, data) = self.reads.get(&read)?;
                let from = ((record.extent.start().checked_sub(extent.start())?) * SECTOR) as usize;
                let bytes = data.as_slice().get(from..from + record.extent.bytes() as usize)?;
                // Copied: a small piece would otherwise keep the whole read in memory, beyond what is counted.
                Some(Piece::whole(bytes.to_vec()))
            }
        }
    }

    fn compare(&self, id: u64, read: ReadId, volume: VolumeId, block_sectors: u32, runs: Vec<Extent>) {
        if let Some(ask) = self.comparison(id, read, volume, block_sectors, runs) {
            self.say(Message::Compare(ask));
        }
    }

    /// Hashes a part of a finished read. None only when the read is not here, which the machine would not ask for; it gives up by itself.
    fn comparison(
        &self,
        id: u64,
        read: ReadId,
        volume: VolumeId,
        block_sectors: u32,
        runs: Vec<Extent>,
    ) -> Option<Comparison> {
        let (extent, data) = self.reads.get(&read)?;
        let hash = |block: Extent| {
            let from = (block.start().checked_sub(extent.start())? * SECTOR) as usize;
            data.as_slice().get(from..from + block.bytes() as usize).map(BlockHash::of)
        };
        let hashes = wire::blocks(&runs, block_sectors).map(hash).collect::<Option<Vec<_>>>()?;
        Some(Comparison { id, volume, block_sectors, runs, hashes })
    }

    fn say(&self, message: Message) {
        if let Some(generation) = self.up {
            self.link.message(generation, message);
        }
    }

    /// Reads whose way is clear are begun.
    pub fn begin_reads(&mut self, ctx: &mut Ctx, group: GroupId) {
        let mut stay = VecDeque::new();
        while let Some(ordered) = self.ordered.pop_front() {
            let Some(volume) = self.volumes.get(ordered.at) else { continue };
            let on_disk = Extent::new(volume.range.start() + ordered.extent.start(), ordered.extent.sectors.0);
            if ctx.writes_before(ordered.number, volume.target, &on_disk) {
                stay.push_back(ordered);
                continue;
            }
            self.reads.insert(ordered.read, (ordered.extent, AlignedBuf::with_capacity(1)));
            ctx.read(Job {
                group,
                read: ordered.read,
                file: volume.file.clone(),
                offset: on_disk.lba.bytes(),
                len: on_disk.bytes() as usize,
            });
        }
        self.ordered = stay;
    }

    /// A read is done and everything before its end has been handed in.
    pub fn read_done(&mut self, ctx: &mut Ctx, group: GroupId, outcome: Outcome) {
        let read = outcome.read;
        let Some((extent, buffer)) = self.reads.get_mut(&read) else { return };
        let event = match outcome.result {
            Ok(Data { bytes, zeroes }) => {
                *buffer = bytes;
                let zeroes = zeroes.iter().map(|z| Extent::new(extent.start() + z.start(), z.sectors.0)).collect();
                Event::ReadDone { read, zeroes }
            }
            Err(e) => {
                tracing::warn!(group = %group, ?extent, error = %e, "could not read a volume");
                Event::ReadFailed { read }
            }
        };
        self.on(ctx, group, event);
    }

    /// The file systems have answered, and everything issued before that has been handed in.
    pub fn surveyed(&mut self, ctx: &mut Ctx, group: GroupId, number: u64, answer: Answer) {
        // An answer to the machine before this one says nothing about what was written since this one asked.
        if self.survey != Some(number) {
            return;
        }
        self.survey = None;
        self.on(ctx, group, Event::Surveyed { unused: answer.unused });
        let bytes = self.source.status().unused.0;
        tracing::info!(group = %group, bytes, "no file system uses so much: it is not copied");
        answer.whole.iter().for_each(|why| tracing::info!(group = %group, why));
        self.copied_whole = answer.whole;
    }

    pub fn heard_link(&mut self, ctx: &mut Ctx, group: GroupId, generation: u64, what: FromLink) {
        match what {
            FromLink::Up { version, .. } => {
                self.up = Some(generation);
                self.box_reason.clear();
                self.on(ctx, group, Event::BoxCompares(version >= wire::VERSION_COMPARE));
                self.on(ctx, group, Event::Connected);
            }
            FromLink::Down { why, refusal, unreadable } => {
                self.up = None;
                self.box_reason = refusal.map_or(why, |r| r.to_string());
                self.on(ctx, group, Event::Disconnected);
                if let Some(from) = unreadable {
                    // Or every connection would end at this record: what follows from it is copied instead.
                    self.on(ctx, group, Event::SpoolLost { from });
                }
            }
            // Of a connection that was given up meanwhile.
            _ if self.up != Some(generation) => {}
            FromLink::Ack(ack) => self.on(ctx, group, Event::Ack(ack)),
            FromLink::Message(message) => match *message {
                Message::StreamReady { resume, credit, .. } => self.on(ctx, group, Event::Ready { resume, credit }),
                Message::Heartbeat { number, .. } => {
                    self.say(Message::HeartbeatAck { number });
                    self.on(ctx, group, Event::Heard);
                }
                Message::HeartbeatAck { .. } => self.on(ctx, group, Event::Heard),
                Message::Compared { id, differ } => self.on(ctx, group, Event::Compared { id, differ }),
                Message::Declined(refusal) => {
                    self.box_reason = refusal.to_string();
                    if let Some(generation) = self.up.take() {
                        self.link.close(generation, refusal.to_string());
                    }
                }
                other => tracing::debug!(group = %group, message = other.name(), "not for a stream connection"),
            },
        }
    }

    pub fn tick(&mut self, ctx: &mut Ctx, group: GroupId, host: &HostLoad, each_second: bool) {
        if each_second {
            // Said once a second: an overflow brings thousands.
            if let Some(why) = self.lost_why.take() {
                let bytes = std::mem::take(&mut self.lost_bytes);
                if self.marked_in_kernel {
                    tracing::debug!(group = %group, bytes, "writes were marked");
                } else {
                    tracing::warn!(group = %group, bytes, last = %why, "some writes were not captured: their places are copied");
                }
            }
            let status = self.source.status();
            let lag_ms = if let replication::Lag::Known { ms } = status.lag { ms } else { 0 };
            let input = PressureInput {
                spool_used: status.window_bytes.0,
                spool_max: self.spool_max,
                lag_ms,
                copying: status.gap.is_some(),
                ..host.pressure
            };
            let (asked, cause) = pressure_and_cause(&input);
            let cause = cause.map(|cause| cause.to_string()).unwrap_or_default();
            let own = format!("the agent itself takes {} % of a processor", host.cost_percent);
            let (now, cause) = if host.cost > asked { (host.cost, own) } else { (asked, cause) };
            self.pressure_cause = cause;
            self.pressure_then = None;
            if now != self.pressure && self.marked_in_kernel && now != Pressure::DirtyMapOnly {
                // The machine must stay in its gap until everything is captured again.
                self.pressure_then = Some(now);
            } else if now != self.pressure {
                self.pressure = now;
                self.on(ctx, group, Event::Pressure(now));
            }
        }
        self.on(ctx, group, Event::Tick);
    }

    fn placed(&mut self, id: u64, seq: model::SourceSeq) {
        let Some(at) = self.bookmarks.iter().position(|b| b.id == id) else { return };
        let bookmark = &mut self.bookmarks[at];
        bookmark.seq = Some(seq);
        bookmark.frozen = None;
        // The box watches for itself when it is durable.
        if let BookmarkFor::Box { id } = bookmark.answer {
            let bookmark = self.bookmarks.swap_remove(at);
            drop(bookmark);
            let result = wire::CommandResult::Bookmarked { stream: self.source.stream(), seq };
            self.box_answers.push((id, result));
        }
    }

    fn refused(&mut self, id: u64, why: &str) {
        let Some(at) = self.bookmarks.iter().position(|b| b.id == id) else { return };
        let bookmark = self.bookmarks.swap_remove(at);
        match bookmark.answer {
            BookmarkFor::Local(answer) => {
                let failure = crate::local::Failure::new("no-bookmark", why, "look at `holdfast-agent status`");
                let _ = answer.send(crate::local::Reply::Error(failure));
            }
            BookmarkFor::Box { id } => {
                self.box_answers.push((id, wire::CommandResult::Failed { text: why.to_owned() }));
            }
        }
    }

    /// Numbers from here on will be given to other records: bookmarks that had one are lost.
    fn taken_back(&mut self, from: model::SourceSeq) {
        let lost: Vec<u64> = self.bookmarks.iter().filter(|b| b.seq.is_some_and(|s| s >= from)).map(|b| b.id).collect();
        for id in lost {
            self.refused(id, "the stream was cut before the bookmark reached the box; set it again");
        }
    }

    /// Bookmarks that are durable on the box now are answered.
    fn durable(&mut self, through: model::SourceSeq) {
        let stream = self.source.stream();
        let mut i = 0;
        while i < self.bookmarks.len() {
            match self.bookmarks[i].seq {
                Some(seq) if seq <= through => {
                    let bookmark = self.bookmarks.swap_remove(i);
                    if let BookmarkFor::Local(answer) = bookmark.answer {
                        let value = serde_json::json!({
                            "name": bookmark.name, "stream": stream, "seq": seq, "time_us": clock::wall_us(),
                        });
                        let _ = answer.send(crate::local::Reply::Ok(value));
                    }
                }
                _ => i += 1,
            }
        }
    }
}

pub(super) fn now() -> Now {
    Now { mono: clock::mono(), wall_us: clock::wall_us() }
}

/// Targets of all groups that run, one for each disk.
pub(super) fn targets<'a>(
    groups: impl Iterator<Item = (&'a [VolumeAt], &'a [(String, u64, u64)])>,
    disk: &dyn Fn(&str) -> Option<(capture::DevNo, u64)>,
) -> Vec<(String, Target)> {
    let mut out: Vec<(String, Target)> = Vec::new();
    let mut skips: Vec<&(String, u64, u64)> = Vec::new();
    for (volumes, group_skips) in groups {
        skips.extend(group_skips);
        for volume in volumes {
            let Some((number, sectors)) = disk(&volume.disk) else { continue };
            let at = out.iter().position(|(name, _)| *name == volume.disk).unwrap_or_else(|| {
                let target = Target { disk: number, sectors, ranges: Vec::new(), skips: Vec::new() };
                out.push((volume.disk.clone(), target));
                out.len() - 1
            });
            if !out[at].1.ranges.contains(&volume.range) {
                out[at].1.ranges.push(volume.range);
            }
        }
    }
    for (disk, start, len) in skips {
        if let Some((_, target)) = out.iter_mut().find(|(name, _)| name == disk) {
            target.skips.push(Extent::new(*start, *len));
        }
    }
    out.iter_mut().for_each(|(_, t)| t.ranges.sort());
    out
}

/// What a batch handed out of capture waits for before its memory may go.
pub(super) struct Batch {
    pub position: Position,
    /// The last capture of each group in it.
    pub captures: Vec<(GroupId, u64)>,
    pub losses: Vec<(GroupId, u64)>,
}
