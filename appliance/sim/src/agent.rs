//! An agent: the source machine, a spool, reads, and what survives its death.
//!
//! It does what the machine says and nothing more. A death loses the machine, the spool and the reads; the stored state stays (or, when
//! the death hits a store, the one before), and so does the ring from the last release on.

use crate::host::{Host, RingItem, part_tags};
use crate::net::{Connection, ToAgent, ToBox};
use crate::oracle::{Request, fill};
use crate::rng::Rng;
use crate::world::{Failure, FailureKind, Trace};
use model::{Codec, Extent, GapReason, GroupId, Mark, MonoTime, RecordKind, SECTOR, SourceSeq, StreamId, SyncMode};
use replication::{
    Action, Captured, CapturedKind, Event, GateState, Lost, Now, Numbered, OpenFacts, Payload, ReadId, Source,
    SourceConfig,
};
use std::collections::{BTreeMap, VecDeque};
use wire::{BlockHash, Comparison, FrameHeader, FrameKind, Message, Packer, crc32};

/// A record in the spool.
#[derive(Debug)]
struct Kept {
    record: Numbered,
    data: Data,
    after: Request,
}

#[derive(Debug)]
enum Data {
    None,
    Tags(Vec<u64>),
    Mark(Box<[u8]>),
}

/// A read of the copy.
#[derive(Debug)]
struct Reading {
    id: ReadId,
    volume: usize,
    extent: Extent,
    stage: Stage,
    tags: Vec<u64>,
    fails: bool,
}

#[derive(Debug)]
enum Stage {
    /// Until these have completed.
    Blocked(Vec<Request>),
    /// The first half is read.
    Half,
    /// All is read; everything in the ring before this position must be handed in first.
    Barrier(u64),
    /// The machine knows.
    Told,
}

#[derive(Debug)]
enum Waiting {
    Drain { barrier: u64, position: u64 },
    Store { serial: u64, state: Vec<u8>, done_at: u64 },
}

pub(crate) struct Agent {
    pub(crate) rng: Rng,
    pub(crate) source: Source,
    spool: BTreeMap<u64, Kept>,
    reads: Vec<Reading>,
    waiting: VecDeque<Waiting>,
    /// Ring position of the next item to hand in.
    position: u64,
    pub(crate) handed: Request,
    pub(crate) connection: Option<u64>,
    pub(crate) reconnect_at: u64,
    pub(crate) gate: GateState,
    /// Losses handed in and not recorded: the ring positions stay.
    losses: VecDeque<(u64, bool)>,
    released_capture: u64,
    actions: Vec<Action>,
    packer: Packer,
    pub(crate) counts: AgentCounts,
}

/// What an agent's death leaves behind.
#[derive(Debug, Default)]
pub(crate) struct Surviving {
    pub(crate) state: Option<Vec<u8>>,
    /// Stored now and then for the time after a reboot.
    pub(crate) boot: Option<Vec<u8>>,
    /// The host crashed, and no state that knows of it is stored: what was written last is not known.
    pub(crate) tail_lost: bool,
    pub(crate) streams: u64,
}

impl Surviving {
    /// A state of this boot: it knows of what the crash before lost.
    fn store(&mut self, state: Vec<u8>) {
        self.state = Some(state);
        self.tail_lost = false;
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AgentCounts {
    pub(crate) records: u64,
    pub(crate) reads: u64,
    pub(crate) stores: u64,
    pub(crate) alarms: u64,
    pub(crate) bookmarks: u64,
    pub(crate) bookmarks_refused: u64,
    pub(crate) flushes_durable: u64,
    pub(crate) flushes_released: u64,
    pub(crate) degraded: u64,
    pub(crate) clean_restarts: u64,
    pub(crate) unclean_restarts: u64,
    pub(crate) same_bytes: u64,
}

/// What the agent needs of the rest of the world for one event.
pub(crate) struct Around<'a> {
    pub(crate) now_ms: u64,
    pub(crate) host: &'a mut Host,
    pub(crate) surviving: &'a mut Surviving,
    pub(crate) connection: &'a mut Option<Connection>,
    pub(crate) next_connection: &'a mut u64,
    pub(crate) trace: &'a mut Trace,
    /// Requests that the box has durable, recoverable: what a flush may count on.
    pub(crate) covered: Request,
    /// Highest number of the newest stream that is durable on the box, and that stream.
    pub(crate) durable: Option<(StreamId, SourceSeq)>,
    /// A box that was made to lose what it had acknowledged cannot be held to it.
    pub(crate) betrayed: bool,
    pub(crate) mode: SyncMode,
    pub(crate) seed: u64,
}

fn now(now_ms: u64) -> Now {
    Now { mono: MonoTime::from_ms(now_ms + 5_000), wall_us: now_ms * 1000 }
}

impl Agent {
    pub(crate) fn group() -> GroupId {
        GroupId(*b"simulated group!")
    }

    fn config(around: &Around<'_>, rng: &mut Rng) -> SourceConfig {
        let mut config = SourceConfig::new(Self::group(), around.host.specs.clone(), around.mode);
        config.spool_bytes_max = rng.between(600, 4000) << 10;
        config.spool_records_max = rng.between(50, 2000) as usize;
        config.read_bytes_max = rng.between(1, 8) << 16;
        config.reads_max = rng.between(1, 4) as usize;
        config.heartbeat_ms = 300;
        config.silence_ms = 2_000;
        config.watermark_ms = 200;
        config.watermark_idle_ms = 1_000;
        config.held_ms = rng.between(20, 500);
        config.held_bytes_max = 256 << 10;
        config.store_ms = 3_000;
        config
    }

    /// Starts from what survived.
    pub(crate) fn start(around: &mut Around<'_>) -> Result<Self, Failure> {
        let mut rng = Rng::new(around.seed, 100 + around.now_ms);
        let config = Self::config(around, &mut rng);
        let mut actions = Vec::new();
        let at = now(around.now_ms);
        let missed = around.surviving.tail_lost.then_some((GapReason::Verify, Lost::Everything));
        let restored = match around.surviving.state.clone() {
            Some(state) => Some(
                Source::restore_after(config.clone(), &state, missed.as_ref(), at, &mut actions)
                    .map_err(|source| around.trace.fail(FailureKind::StoredState { source }))?,
            ),
            None => None,
        };
        let (mut clean, mut unclean) = (0, 0);
        let source = match restored {
            Some(source) => {
                match source.status().gap {
                    None => clean += 1,
                    Some(_) => unclean += 1,
                }
                source
            }
            None => {
                around.surviving.streams += 1;
                let mut stream = [7; 16];
                stream[..8].copy_from_slice(&around.surviving.streams.to_le_bytes());
                Source::new(config, StreamId(stream), None, at, &mut actions)
            }
        };
        let packer = Packer::new().map_err(|source| around.trace.fail(FailureKind::Packer { source }))?;
        let mut agent = Self {
            rng,
            gate: source.status().gate,
            source,
            spool: BTreeMap::new(),
            reads: Vec::new(),
            waiting: VecDeque::new(),
            position: around.host.ring_first,
            // What was handed in before and released; what follows is handed in again.
            handed: around.host.ring_item(around.host.ring_first).map_or(around.host.issued, |item| item.request() - 1),
            connection: None,
            reconnect_at: around.now_ms + 20,
            losses: VecDeque::new(),
            released_capture: 0,
            actions,
            packer,
            counts: AgentCounts { clean_restarts: clean, unclean_restarts: unclean, ..AgentCounts::default() },
        };
        agent.carry_out(around)?;
        Ok(agent)
    }

    pub(crate) fn counts(&self) -> AgentCounts {
        AgentCounts { same_bytes: self.source.status().same.0, ..self.counts }
    }

    /// Dies. A store in progress happened or did not.
    pub(crate) fn die(mut self, surviving: &mut Surviving) -> AgentCounts {
        for waiting in self.waiting.drain(..) {
            if let Waiting::Store { state, .. } = waiting
                && self.rng.one_in(2)
            {
                surviving.store(state);
            }
        }
        self.counts()
    }

    /// Stops in order, if it can be done without a gap.
    pub(crate) fn stop(self, surviving: &mut Surviving) -> (AgentCounts, bool) {
        let (state, clean) = self.source.final_state();
        surviving.store(state);
        (self.counts(), clean)
    }

    pub(crate) fn on(&mut self, event: Event, around: &mut Around<'_>) -> Result<(), Failure> {
        if around.trace.on() {
            around.trace.line("source", "event", &format!("{event:?}"));
        }
        self.source.on(event, now(around.now_ms), &mut self.actions);
        self.carry_out(around)
    }

    /// One step of its loops.
    pub(crate) fn step(&mut self, hand_in: u64, around: &mut Around<'_>) -> Result<(), Failure> {
        for _ in 0..hand_in {
            if !self.hand_in(around)? {
                break;
            }
        }
        self.read_on(around)?;
        self.finish_waiting(around)?;
        self.receive(around)?;
        if self.connection.is_none() && around.now_ms >= self.reconnect_at {
            let number = *around.next_connection;
            *around.next_connection += 1;
            *around.connection = Some(Connection::new(number, self.rng.below(30)));
            self.connection = Some(number);
            // A box of last year does not compare.
            self.on(Event::BoxCompares(!around.seed.is_multiple_of(4)), around)?;
            self.on(Event::Connected, around)?;
        }
        self.on(Event::Tick, around)
    }

    pub(crate) fn is_idle(&self, host: &Host) -> bool {
        let status = self.source.status();
        self.position == host.ring_end()
            && self.reads.is_empty()
            && status.gap.is_none()
            && status.window_records == 0
            && status.state == wire::GroupAgentState::Replicating
    }

    pub(crate) fn spool_range(&self) -> Option<(u64, u64)> {
        Some((*self.spool.first_key_value()?.0, *self.spool.last_key_value()?.0))
    }

    /// The spool loses payloads; the machine is told.
    pub(crate) fn lose_spool(&mut self, from: u64, around: &mut Around<'_>) -> Result<(), Failure> {
        self.spool.split_off(&from);
        self.on(Event::SpoolLost { from: SourceSeq(from) }, around)
    }

    fn hand_in(&mut self, around: &mut Around<'_>) -> Result<bool, Failure> {
        let Some(item) = around.host.ring_item(self.position).cloned() else { return Ok(false) };
        let capture = self.position + 1;
        self.position += 1;
        self.handed = self.handed.max(item.request());
        match item {
            RingItem::Part { request, kind, flags, volume, extent, mono_ms } => {
                let id = around.host.specs[volume].id;
                let mono = MonoTime::from_ms(mono_ms + 5_000);
                let captured = Captured { capture, kind, flags, volume: id, extent, mono, wall_us: mono_ms * 1000 };
                self.on(Event::Captured(captured), around)?;
                if kind == CapturedKind::Flush && around.host.flushes.contains(&request) {
                    self.on(Event::FlushWaiting { id: request }, around)?;
                }
            }
            RingItem::Lost { volume, extent, .. } => {
                self.losses.push_back((capture, false));
                let what = Lost::Extents(vec![(around.host.specs[volume].id, extent)]);
                self.on(Event::CaptureLost { id: capture, reason: GapReason::Overflow, what }, around)?;
            }
        }
        Ok(true)
    }

    fn read_on(&mut self, around: &mut Around<'_>) -> Result<(), Failure> {
        let mut done = Vec::new();
        for read in &mut self.reads {
            let (start, end) = (read.extent.start() as usize, read.extent.end() as usize);
            let half = start + (end - start) / 2;
            match &mut read.stage {
                Stage::Blocked(requests) => {
                    requests.retain(|request| around.host.is_in_flight(*request));
                    if requests.is_empty() {
                        read.tags = around.host.disks[read.volume][start..half].to_vec();
                        read.stage = Stage::Half;
                    }
                }
                Stage::Half if self.rng.one_in(3) => {
                    read.tags.extend_from_slice(&around.host.disks[read.volume][half..end]);
                    read.stage = Stage::Barrier(around.host.ring_end());
                }
                Stage::Half | Stage::Told => {}
                Stage::Barrier(position) => {
                    if self.position >= *position {
                        done.push(read.id);
                        read.stage = Stage::Told;
                    }
                }
            }
        }
        for id in done {
            let Some(read) = self.reads.iter().find(|read| read.id == id) else { continue };
            let event = if read.fails {
                Event::ReadFailed { read: id }
            } else {
                // Runs of zero tags, now and then kept from the machine: a caller need not look for them.
                let mut zeroes = Vec::new();
                if !self.rng.one_in(4) {
                    let base = read.extent.start();
                    let mut from = None;
                    for (at, tag) in read.tags.iter().chain([&1]).enumerate() {
                        match (from, *tag == 0) {
                            (None, true) => from = Some(at as u64),
                            (Some(start), false) => {
                                zeroes.push(Extent::between(base + start, base + at as u64));
                                from = None;
                            }
                            (None, false) | (Some(_), true) => {}
                        }
                    }
                }
                Event::ReadDone { read: id, zeroes }
            };
            self.on(event, around)?;
        }
        Ok(())
    }

    fn finish_waiting(&mut self, around: &mut Around<'_>) -> Result<(), Failure> {
        let mut events = Vec::new();
        let (position, now_ms) = (self.position, around.now_ms);
        self.waiting.retain_mut(|waiting| match waiting {
            Waiting::Drain { barrier, position: wanted } if position >= *wanted => {
                events.push((Event::Drained { barrier: *barrier }, None));
                false
            }
            Waiting::Store { serial, state, done_at } if now_ms >= *done_at => {
                events.push((Event::Persisted { serial: *serial }, Some(std::mem::take(state))));
                false
            }
            Waiting::Drain { .. } | Waiting::Store { .. } => true,
        });
        for (event, state) in events {
            if let Some(state) = state {
                around.surviving.store(state);
                self.counts.stores += 1;
            }
            self.on(event, around)?;
        }
        Ok(())
    }

    fn receive(&mut self, around: &mut Around<'_>) -> Result<(), Failure> {
        while let Some(packet) = around
            .connection
            .as_mut()
            .filter(|connection| Some(connection.number) == self.connection)
            .and_then(|connection| connection.at_agent(around.now_ms))
        {
            match packet {
                ToAgent::Ready { resume, credit } => self.on(Event::Ready { resume, credit }, around)?,
                ToAgent::Ack(ack) => self.on(Event::Ack(ack), around)?,
                ToAgent::Message(Message::Refuse(refusal)) => {
                    return Err(around.trace.fail(FailureKind::Refused { refusal }));
                }
                ToAgent::Message(Message::Compared { id, differ }) => {
                    self.on(Event::Compared { id, differ }, around)?;
                }
                ToAgent::Message(_) => self.on(Event::Heard, around)?,
            }
        }
        Ok(())
    }

    /// The connection is gone and the agent hears of it.
    pub(crate) fn disconnected(&mut self, around: &mut Around<'_>) -> Result<(), Failure> {
        self.connection = None;
        self.reconnect_at = around.now_ms + self.rng.below(400);
        self.on(Event::Disconnected, around)
    }

    fn carry_out(&mut self, around: &mut Around<'_>) -> Result<(), Failure> {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                if around.trace.on() {
                    around.trace.line("source", "action", &short(&action));
                }
                self.act(action, around)?;
            }
        }
        Ok(())
    }

    fn act(&mut self, action: Action, around: &mut Around<'_>) -> Result<(), Failure> {
        match action {
            Action::Keep { record, payload } => self.keep(record, payload, around)?,
            Action::Send { first, last } => {
                for seq in first.0..=last.0 {
                    let Some((header, payload, after)) = self.frame(seq) else {
                        return Err(around.trace.fail(FailureKind::SendUnkept { seq: SourceSeq(seq) }));
                    };
                    if let Some(connection) = around.connection
                        && Some(connection.number) == self.connection
                    {
                        let packet = ToBox::Frame { header: Box::new(header), payload, after };
                        connection.send_to_box(around.now_ms, packet);
                    }
                }
            }
            Action::Release { through } => {
                let stream = self.source.stream();
                let durable = around.durable.filter(|(s, _)| *s == stream).map(|(_, seq)| seq);
                if !around.betrayed && durable.is_none_or(|durable| durable < through) {
                    return Err(around.trace.fail(FailureKind::ReleasedEarly { through, durable }));
                }
                self.spool = self.spool.split_off(&(through.0 + 1));
            }
            Action::Drop { from } => {
                self.spool.split_off(&from.0);
            }
            Action::Forget { .. } => {}
            Action::ReleaseCapture { through } => {
                self.released_capture = through;
                self.release_ring(around);
            }
            Action::LossRecorded { id } => {
                self.losses.iter_mut().filter(|(capture, _)| *capture == id).for_each(|(_, recorded)| *recorded = true);
                self.release_ring(around);
            }
            Action::Open { stream, first_seq, next_seq, acked_durable, .. } => {
                if let Some(connection) = around.connection
                    && Some(connection.number) == self.connection
                {
                    let facts = OpenFacts { stream, first_seq, next_seq, acked_durable };
                    connection.send_to_box(around.now_ms, ToBox::Open { facts, source: now(around.now_ms).mono });
                }
            }
            Action::Message(message) => {
                if let Some(connection) = around.connection
                    && Some(connection.number) == self.connection
                {
                    connection.send_to_box(around.now_ms, ToBox::Message(message));
                }
            }
            Action::Disconnect(reason) => {
                if !matches!(reason, replication::DisconnectReason::Silent { .. }) {
                    return Err(around.trace.fail(FailureKind::SourceGaveUp { reason }));
                }
                self.disconnected(around)?;
            }
            Action::ReadVolume { read, volume, extent } => {
                self.counts.reads += 1;
                let Some(volume) = around.host.specs.iter().position(|spec| spec.id == volume) else {
                    return Err(around.trace.fail(FailureKind::UnknownVolume { volume }));
                };
                let blocked = around.host.in_flight_on(volume, &extent, self.handed);
                let stage = Stage::Blocked(blocked);
                let fails = self.rng.one_in(200);
                self.reads.push(Reading { id: read, volume, extent, stage, tags: Vec::new(), fails });
            }
            Action::Compare { id, read, volume, block_sectors, runs } => {
                let ask = Comparison { id, volume, block_sectors, runs, hashes: Vec::new() };
                self.compare(read, ask, around)?;
            }
            Action::ReadFinished { read } => self.reads.retain(|reading| reading.id != read),
            Action::ReleaseFlush { id, durable } => self.flush_released(id, durable, around)?,
            Action::Persist { serial, state } => {
                // A disk under load takes its time now and then.
                let slow = if self.rng.one_in(4) { 400 } else { 40 };
                let done_at = around.now_ms + self.rng.below(slow);
                self.waiting.push_back(Waiting::Store { serial, state, done_at });
            }
            Action::Survey => unreachable!("no source here asks what its file systems do not use"),
            Action::Drain { barrier } => {
                let position = around.host.ring_end();
                self.waiting.push_back(Waiting::Drain { barrier, position });
            }
            Action::BookmarkPlaced { .. } => self.counts.bookmarks += 1,
            Action::BookmarkRefused { .. } => self.counts.bookmarks_refused += 1,
            Action::State(_) => {}
            Action::Gate(gate) => {
                self.gate = gate;
                if matches!(gate, GateState::Degraded { .. }) {
                    self.counts.degraded += 1;
                }
            }
            Action::Alarm(_) => self.counts.alarms += 1,
        }
        Ok(())
    }

    fn flush_released(&mut self, id: Request, durable: bool, around: &mut Around<'_>) -> Result<(), Failure> {
        around.host.flushes.retain(|flush| *flush != id);
        if durable {
            self.counts.flushes_durable += 1;
            if !around.betrayed && around.covered < id {
                let covered = around.covered;
                return Err(around.trace.fail(FailureKind::FlushTooEarly { flush: id, covered }));
            }
        } else {
            self.counts.flushes_released += 1;
            if self.gate == GateState::Sync {
                return Err(around.trace.fail(FailureKind::FlushNotGated { flush: id }));
            }
        }
        Ok(())
    }

    /// Hashes what a read found and asks the box.
    fn compare(&mut self, read: ReadId, mut ask: Comparison, around: &mut Around<'_>) -> Result<(), Failure> {
        let Some(reading) = self.reads.iter().find(|reading| reading.id == read) else {
            return Err(around.trace.fail(FailureKind::UnknownRead { id: read }));
        };
        let from = reading.extent.start();
        let tags = |block: Extent| &reading.tags[(block.start() - from) as usize..(block.end() - from) as usize];
        let hash = |block| BlockHash::of(&fill(tags(block)));
        ask.hashes = wire::blocks(&ask.runs, ask.block_sectors).map(hash).collect();
        if let Some(connection) = around.connection
            && Some(connection.number) == self.connection
        {
            connection.send_to_box(around.now_ms, ToBox::Message(Message::Compare(ask)));
        }
        Ok(())
    }

    /// The ring goes up to the newest capture released, but not past a loss that is not recorded.
    fn release_ring(&mut self, around: &mut Around<'_>) {
        while self.losses.front().is_some_and(|(_, recorded)| *recorded) {
            self.losses.pop_front();
        }
        let mut through = self.released_capture;
        // Recorded losses behind the newest released capture go with the next one.
        if let Some((loss, _)) = self.losses.front() {
            through = through.min(loss - 1);
        }
        around.host.release_ring(through);
    }

    fn keep(&mut self, record: Numbered, payload: Payload, around: &mut Around<'_>) -> Result<(), Failure> {
        self.counts.records += 1;
        let extent = record.extent;
        let data = match payload {
            Payload::None => Data::None,
            Payload::Mark(bytes) => Data::Mark(bytes),
            Payload::Captured(capture) => {
                let Some(item) = around.host.ring_item(capture - 1) else {
                    return Err(around.trace.fail(FailureKind::RingReleasedEarly { capture }));
                };
                Data::Tags(part_tags(item.request(), &extent))
            }
            Payload::Read(id) => {
                let Some(read) = self.reads.iter().find(|read| read.id == id) else {
                    return Err(around.trace.fail(FailureKind::UnknownRead { id }));
                };
                let from = (extent.start() - read.extent.start()) as usize;
                Data::Tags(read.tags[from..from + extent.sectors.0 as usize].to_vec())
            }
        };
        self.spool.insert(record.seq.0, Kept { record, data, after: self.handed });
        Ok(())
    }

    fn frame(&mut self, seq: u64) -> Option<(FrameHeader, Vec<u8>, Request)> {
        let kept = self.spool.get(&seq)?;
        let (codec, payload) = match &kept.data {
            Data::None => (Codec::Raw, Vec::new()),
            Data::Mark(bytes) => (Codec::Raw, bytes.to_vec()),
            Data::Tags(tags) => {
                let raw = fill(tags);
                let (codec, stored) = self.packer.pack(&raw);
                (codec, stored.to_vec())
            }
        };
        debug_assert!(kept.record.kind != RecordKind::Write || kept.record.extent.sectors.0 * SECTOR <= 128 << 10);
        let header = FrameHeader {
            kind: FrameKind::Record(kept.record.kind),
            codec,
            flags: kept.record.flags,
            volume: kept.record.volume,
            extent: kept.record.extent,
            seq: kept.record.seq,
            mono: kept.record.mono,
            wall_us: kept.record.wall_us,
            payload_len: payload.len() as u32,
            payload_crc: crc32(&payload),
        };
        Some((header, payload, kept.after))
    }
}

/// An action in one line.
fn short(action: &Action) -> String {
    match action {
        Action::Keep { record, payload } => {
            let mark = match payload {
                Payload::Mark(bytes) => mark_text(bytes),
                Payload::None | Payload::Captured(_) | Payload::Read(_) => String::new(),
            };
            format!(
                "keep {} {:?} v{} {:?} flags {} {mark}",
                record.seq, record.kind, record.volume, record.extent, record.flags.0
            )
        }
        Action::Persist { serial, state } => format!("persist {serial}, {} bytes", state.len()),
        other => format!("{other:?}"),
    }
}

fn mark_text(bytes: &[u8]) -> String {
    let header = FrameHeader {
        kind: FrameKind::Record(RecordKind::Mark),
        codec: Codec::Raw,
        flags: model::WriteFlags::NONE,
        volume: model::VolumeId(0),
        extent: Extent::default(),
        seq: SourceSeq(1),
        mono: MonoTime(0),
        wall_us: 0,
        payload_len: bytes.len() as u32,
        payload_crc: crc32(bytes),
    };
    match wire::decode_mark(&header, bytes) {
        Ok(Mark::Watermark { seq, .. }) => format!("watermark {seq}"),
        Ok(mark) => format!("{mark:?}"),
        Err(error) => format!("{error}"),
    }
}
