//! The source of a replication session: one for each protection group, on the host.
//!
//! Events and the time go in, actions come out, in order, into a vector of the caller's: `source.on(event, now, &mut actions)`.
//! Payloads never pass through: the caller keeps them under the number of their capture, their read or, once numbered, their record.
//!
//! # States
//!
//! Two that run beside each other. The **link**:
//!
//! ```text
//!   Down ──Connected: Open──▶ Opening ──Ready: where to go on──▶ Ready ──Disconnected / silent──▶ Down
//! ```
//!
//! The **stream**:
//!
//! ```text
//!                        overflow, loss, request, restart,
//!                        box lost or forgot, spool lost: GapBegin
//!   consistent ──────────────────────────────────────────────▶ gap: Marking ◀───────────┐
//!   every write is numbered and sent                           writes only mark the map │ overflow, loss, ...
//!        ▲                                                       │ room, link, position │
//!        │ map empty, no read in flight,                         ▼                      │
//!        │ at a request's end, drained: Consistent             gap: Copying ────────────┘
//!        └────────────────────────────────────────────────────   reads; writes to what is copied or being
//!                                                                read are sent, others only mark
//! ```
//!
//! # Numbers
//!
//! Records are numbered without a hole. The machine is **positioned** when it knows which number the box expects next; after an unclean
//! restart it does not until `Ready`, and only marks. A number that was never sent can be taken back and given to another record
//! ([`Action::Drop`]).
//!
//! # Invariants
//!
//! 1. Outside gaps the stream is the host's sequence of writes, whole and in order: any prefix that ends at a request boundary is a
//!    crash image of the host.
//! 2. Every sector in which host and box may differ is in the dirty map, in a read in flight, or in the window of records that are
//!    not durable yet; but for sectors that no file system used when the copy began, which mean nothing (`survey.rs`).
//! 3. The stored state holds at least 2, except for what capture itself still holds (`ReleaseCapture`, `LossRecorded` come after).
//! 4. A copied piece never covers a sector the host wrote after its read was ordered: those are masked, and sent as the writes they
//!    are. With the two barriers of `ReadVolume` and `ReadDone` a piece holds what every earlier write left there.
//!    What the box found to be the same is left out of a piece: `copy.rs` says why that is right.
//! 5. A payload is kept until its record is durable on the box or taken back.
//! 6. In sync mode a flush is released as durable only when every record before it is.
//! 7. No more is sent than was granted.
//!
//! # Power loss and crashes
//!
//! The box may lose what was written and not durable: it says where to go on, and the window still has everything from there. The agent
//! may die: the stored map covers what was not durable, and only that is copied again. A host that loses power cannot know its
//! last writes: the caller says [`Lost::Everything`].
//!
//! # Limits
//!
//! The window holds at most `spool_bytes_max` charged bytes and `spool_records_max` records (40 bytes each), beyond them only the few
//! marks of a gap; reads in flight are `reads_max`; waiting bookmarks [`BOOKMARKS_MAX`].
//!
//! # Tests
//!
//! `tests.rs` drives random worlds against an oracle disk; the `sim` crate does the same with journal, power cuts and restarts.

mod copy;
mod event;
mod gate;
mod state;
mod survey;
mod window;

pub use event::{
    Action, Alarm, BookmarkRefusal, CaptureNo, Captured, CapturedKind, DisconnectReason, Event, GateState, Lost, Now,
    Numbered, Payload, ReadId,
};
pub use state::StateError;

use crate::granules::GranuleMap;
use crate::pressure::Pressure;
use copy::Copying;
use gate::Gate;
use model::{
    BookmarkName, ByteLen, Consistency, Extent, GapReason, GroupId, Mark, MonoTime, RecordKind, Sectors, SourceSeq,
    StreamId, SyncMode, VolumeId, VolumeSpec, WriteFlags,
};
use state::{Stored, StoredVolume};
use std::collections::VecDeque;
use std::ops::Range;
use survey::Survey;
use window::Window;
use wire::{Ack, AckFlags, Credit, FrameKind, GroupAgentState, MAX_RECORD_BYTES, Message, Resume, charge, encode_mark};

/// Bookmarks wait only for the end of a request; more than this at once is somebody's mistake.
pub const BOOKMARKS_MAX: usize = 64;
/// A source's volume may be this large (1 PiB: a dirty map of 2 GiB); a larger one in a stored state is damage.
pub const VOLUME_SECTORS_MAX: u64 = 1 << 41;
/// No stream gets here: 4 billion records a second for thirty years. A box that says so is not believed.
const SEQ_MAX: SourceSeq = SourceSeq(1 << 62);

/// What a source is told when it is made.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    pub group: GroupId,
    pub volumes: Vec<VolumeSpec>,
    pub mode: SyncMode,
    /// Beyond this the stream gets a gap.
    pub spool_bytes_max: u64,
    pub spool_records_max: usize,
    pub read_bytes_max: u64,
    pub reads_max: usize,
    /// How often a busy and an idle stream get a watermark. Idle ones are rarer: each costs the journal a block.
    pub watermark_ms: u64,
    pub watermark_idle_ms: u64,
    pub heartbeat_ms: u64,
    /// A box that says nothing for this long is gone.
    pub silence_ms: u64,
    /// Captured writes that are not durable on the box after this long, or that are more than `held_bytes_max`, are put into the
    /// stored map, so that capture can let go of them. While the box keeps up nothing is stored at all.
    pub held_ms: u64,
    pub held_bytes_max: u64,
    /// How often the stored map is brought up to date when nothing else asks for it.
    pub store_ms: u64,
    /// Before a copy of at least this much it is asked what no file system uses ([`Action::Survey`]); none: never.
    pub survey_bytes_min: Option<u64>,
}

impl SourceConfig {
    pub fn new(group: GroupId, volumes: Vec<VolumeSpec>, mode: SyncMode) -> Self {
        Self {
            group,
            volumes,
            mode,
            spool_bytes_max: 256 << 20,
            spool_records_max: 262_144,
            read_bytes_max: 1 << 20,
            reads_max: 4,
            watermark_ms: 1_000,
            watermark_idle_ms: 10_000,
            heartbeat_ms: 1_000,
            silence_ms: 15_000,
            held_ms: 500,
            held_bytes_max: 64 << 20,
            store_ms: 30_000,
            survey_bytes_min: None,
        }
    }
}

/// How much of the host's work would be lost if it died now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lag {
    /// Nothing can be recovered yet.
    Never,
    /// Age of the oldest write that is not durable on the box, or of the gap.
    Known { ms: u64 },
    /// The box has not been heard since.
    Unknown { since: MonoTime },
}

/// A look at a source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceStatus {
    pub stream: StreamId,
    pub state: GroupAgentState,
    pub gap: Option<GapReason>,
    pub gate: GateState,
    pub flushes_waiting: usize,
    pub lag: Lag,
    pub window_bytes: ByteLen,
    pub window_records: usize,
    pub dirty: ByteLen,
    pub sync_done: ByteLen,
    pub sync_total: ByteLen,
    /// Looked at and found to be the same on the box, since the agent was started.
    pub same: ByteLen,
    /// Left out of the newest large copy because no file system used it, since the agent was started.
    pub unused: ByteLen,
    /// It is being asked what no file system uses.
    pub surveying: bool,
    pub durable: SourceSeq,
    pub next: Option<SourceSeq>,
    pub journal_full: bool,
    pub captured_bytes: ByteLen,
    pub captured_records: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down { since: Option<MonoTime> },
    Opening,
    Ready,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Marking,
    Copying,
}

#[derive(Debug)]
struct Gap {
    reason: GapReason,
    /// The newest moment that can be recovered; none when a restart forgot it.
    since: Option<MonoTime>,
    phase: Phase,
}

#[derive(Debug)]
struct Volume {
    spec: VolumeSpec,
    /// To be copied.
    dirty: GranuleMap,
    /// In the stored state, whichever of two is found after a crash.
    stable: GranuleMap,
    /// In the state that is being stored.
    storing: Option<GranuleMap>,
}

/// A captured write that capture has to hold on to.
#[derive(Debug)]
struct Held {
    capture: CaptureNo,
    /// None: only in the dirty map.
    seq: Option<SourceSeq>,
    volume: usize,
    run: Range<u64>,
    bytes: u64,
    since: MonoTime,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    stream: StreamId,
    now: Now,
    volumes: Vec<Volume>,
    link: Link,
    gap: Option<Gap>,
    positioned: bool,
    window: Window,
    /// Highest number sent on this connection.
    sent: SourceSeq,
    /// Highest number that may be on the box: sent on any connection since the box last said where to go on.
    sent_ever: SourceSeq,
    durable: SourceSeq,
    credit: Credit,
    spent: Credit,
    journal_full: bool,
    paused: bool,
    pressure: Pressure,
    synced_once: bool,
    /// The number of the newest `Consistent`; MAX when none of this stream is known.
    consistent: SourceSeq,
    /// Where the newest gap began, until its end is durable.
    last_gap_since: Option<MonoTime>,
    /// Payloads of these sent records are lost: they cannot be sent again.
    unsendable: Option<(SourceSeq, SourceSeq)>,
    copying: Copying,
    survey: Survey,
    gate: Gate,
    /// The last captured record said that more of its request follow.
    mid_request: bool,
    bookmarks: VecDeque<(u64, BookmarkName, Consistency)>,
    drain: Option<u64>,
    next_drain: u64,

    held: VecDeque<Held>,
    held_bytes: u64,
    released: CaptureNo,
    /// Losses that are in the dirty map and not stored: with the serial that stores them, once there is one.
    losses: Vec<(u64, Option<u64>)>,
    store_soon: bool,
    storing: Option<u64>,
    next_serial: u64,
    stored_at: MonoTime,
    /// Nothing is sent until this serial is stored: a state that said "stopped cleanly" must not be found again.
    storing_before_send: Option<u64>,

    heard_at: MonoTime,
    sent_at: MonoTime,
    heartbeats: u64,
    watermark_at: MonoTime,
    captured_since_watermark: bool,
    captured_bytes: u64,
    captured_records: u64,
    announced: Option<GroupAgentState>,
}

impl Source {
    /// A new stream. `allocated`: what the first copy reads; none: everything. `stream` must never have been used before.
    pub fn new(
        config: SourceConfig,
        stream: StreamId,
        allocated: Option<&[(VolumeId, Extent)]>,
        now: Now,
        out: &mut Vec<Action>,
    ) -> Self {
        let stored = Stored::new(config.group, stream);
        let maps = match allocated {
            None => config.volumes.iter().map(|v| GranuleMap::full(v.sectors)).collect(),
            Some(extents) => {
                let mut maps: Vec<_> = config.volumes.iter().map(|v| GranuleMap::empty(v.sectors)).collect();
                for (volume, extent) in extents {
                    if let Some(at) = config.volumes.iter().position(|v| v.id == *volume) {
                        let run = maps[at].touching(extent);
                        maps[at].set(run);
                    }
                }
                maps
            }
        };
        let gap = Gap { reason: GapReason::InitialSync, since: None, phase: Phase::Marking };
        let mut source = Self::build(config, &stored, maps, Some(gap), now);
        source.store_soon = true;
        source.settle(out);
        source
    }

    /// Goes on after the agent was restarted, from the newest state that [`Action::Persist`] (or [`Source::final_state`]) stored.
    /// `config` says the volumes as they are now; what was added, resized or replaced is copied.
    pub fn restore(config: SourceConfig, state: &[u8], now: Now, out: &mut Vec<Action>) -> Result<Self, StateError> {
        Self::restore_after(config, state, None, now, out)
    }

    /// As [`restore`](Self::restore), when writes were missed since the state was stored. They are in the first state that is stored
    /// from now on: told by an event afterwards, they would be forgotten if the agent died between the two.
    pub fn restore_after(
        config: SourceConfig,
        state: &[u8],
        missed: Option<&(GapReason, Lost)>,
        now: Now,
        out: &mut Vec<Action>,
    ) -> Result<Self, StateError> {
        let stored = Stored::decode(state)?;
        if stored.group != config.group {
            return Err(StateError::OtherGroup { wanted: config.group, had: stored.group });
        }
        let mut maps = Vec::with_capacity(config.volumes.len());
        let mut same = stored.volumes.len() == config.volumes.len();
        for volume in &config.volumes {
            let (map, unchanged) = stored.map_for(volume)?;
            same &= unchanged;
            maps.push(map);
        }
        match missed {
            None => {}
            Some((_, Lost::Everything)) => maps.iter_mut().for_each(GranuleMap::set_all),
            Some((_, Lost::Extents(extents))) => {
                for (volume, extent) in extents {
                    if let Some(at) = config.volumes.iter().position(|v| v.id == *volume) {
                        let run = maps[at].touching(extent);
                        maps[at].set(run);
                    }
                }
            }
        }
        let clean = stored.clean.filter(|_| same && maps.iter().all(GranuleMap::is_empty));
        let gap = clean.is_none().then_some(Gap {
            reason: match () {
                () if !stored.synced_once => GapReason::InitialSync,
                () if !same => GapReason::VolumeChanged,
                () => missed.map_or(GapReason::AgentRestart, |(reason, _)| *reason),
            },
            since: None,
            phase: Phase::Marking,
        });
        let unclean = gap.is_some();
        let mut source = Self::build(config, &stored, maps, gap, now);
        if unclean {
            // Capture may hand in again what was sent before the restart: until that has passed, the stream runs backwards.
            source.ask_to_drain(out);
        }
        if let Some(next) = clean {
            source.place(next);
            source.consistent = next.prev();
        }
        source.store(out);
        if clean.is_some() {
            source.storing_before_send = source.storing;
        }
        source.settle(out);
        Ok(source)
    }

    fn build(config: SourceConfig, stored: &Stored, maps: Vec<GranuleMap>, gap: Option<Gap>, now: Now) -> Self {
        let volumes = config.volumes.iter().zip(maps).map(|(spec, dirty)| Volume {
            spec: spec.clone(),
            stable: GranuleMap::empty(spec.sectors),
            dirty,
            storing: None,
        });
        Self {
            volumes: volumes.collect(),
            stream: stored.stream,
            now,
            link: Link::Down { since: None },
            gap,
            positioned: false,
            window: Window::starting_at(SourceSeq(1)),
            sent: SourceSeq::ZERO,
            sent_ever: SourceSeq::ZERO,
            durable: stored.durable,
            credit: Credit::default(),
            spent: Credit::default(),
            journal_full: false,
            paused: false,
            pressure: Pressure::None,
            synced_once: stored.synced_once,
            consistent: SourceSeq::MAX,
            last_gap_since: None,
            unsendable: None,
            copying: Copying::new(),
            survey: Survey::default(),
            gate: Gate::new(config.mode, stored.synced_once, now.mono),
            mid_request: false,
            bookmarks: VecDeque::new(),
            drain: None,
            next_drain: 1,
            held: VecDeque::new(),
            held_bytes: 0,
            released: 0,
            losses: Vec::new(),
            store_soon: false,
            storing: None,
            next_serial: 1,
            stored_at: now.mono,
            storing_before_send: None,
            heard_at: now.mono,
            sent_at: now.mono,
            heartbeats: 0,
            watermark_at: now.mono,
            captured_since_watermark: false,
            captured_bytes: 0,
            captured_records: 0,
            announced: None,
            config,
        }
    }

    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// Takes one event; what is to be done is appended to `out`.
    pub fn on(&mut self, event: Event, now: Now, out: &mut Vec<Action>) {
        self.now = now;
        match event {
            Event::Captured(captured) => self.captured(captured, out),
            Event::CaptureLost { id, reason, what } => self.capture_lost(id, reason, what, out),
            Event::Drained { barrier } => {
                if self.drain == Some(barrier) {
                    self.drain = None;
                }
            }
            Event::ReadDone { read, zeroes } => self.read_done(read, &zeroes, out),
            Event::ReadFailed { read } => self.read_failed(read, out),
            Event::Compared { id, differ } => self.compared(id, &differ, out),
            Event::Surveyed { unused } => self.surveyed(unused),
            Event::BoxCompares(compares) => self.copying.box_compares = compares,
            Event::Connected => self.connected(out),
            Event::Ready { resume, credit } => self.ready(resume, credit, out),
            Event::Ack(ack) => self.ack(ack, out),
            Event::Heard => self.heard_at = now.mono,
            Event::Disconnected => self.down(),
            Event::FlushWaiting { id } => {
                let need = if self.gap.is_none() { self.window.next().prev() } else { SourceSeq::MAX };
                self.gate.wait(id, need, self.durable, now.mono, out);
            }
            Event::Bookmark { id, name, consistency } => {
                if self.bookmarks.len() >= BOOKMARKS_MAX {
                    out.push(Action::BookmarkRefused { id, why: BookmarkRefusal::TooMany { max: BOOKMARKS_MAX } });
                } else {
                    self.bookmarks.push_back((id, name, consistency));
                }
            }
            Event::Resync => {
                self.all_dirty();
                self.open_gap(GapReason::Requested, out);
                self.store_soon = true;
            }
            Event::Pause => self.paused = true,
            Event::Unpause => self.paused = false,
            Event::Pressure(pressure) => {
                self.pressure = pressure;
                if pressure == Pressure::DirtyMapOnly {
                    self.open_gap(GapReason::Overflow, out);
                }
            }
            Event::CopyRate(rate) => self.copying.rate = rate,
            Event::Mode(mode) => {
                self.config.mode = mode;
                self.gate.mode(mode, self.synced_once, now.mono, out);
            }
            Event::SpoolFull => self.open_gap(self.overflow_reason(), out),
            Event::SpoolLost { from } => self.spool_lost(from, out),
            Event::Persisted { serial } => self.persisted(serial, out),
            Event::Tick => self.tick(out),
        }
        self.settle(out);
    }

    pub fn status(&self) -> SourceStatus {
        let left = self.to_copy();
        let total = self.copying.total.max(left);
        SourceStatus {
            stream: self.stream,
            state: self.state(),
            gap: self.gap.as_ref().map(|gap| gap.reason),
            gate: self.gate.state(),
            flushes_waiting: self.gate.waiting(),
            lag: self.lag(),
            window_bytes: ByteLen(self.window.bytes()),
            window_records: self.window.len(),
            dirty: ByteLen(left.bytes()),
            sync_done: ByteLen(total.bytes() - left.bytes()),
            sync_total: ByteLen(if self.gap.is_some() { total.bytes() } else { 0 }),
            same: ByteLen(self.copying.same_bytes),
            unused: ByteLen(self.survey.unused_bytes),
            surveying: self.survey.holds_reads(self.now.mono),
            durable: self.durable,
            next: self.positioned.then(|| self.window.next()),
            journal_full: self.journal_full,
            captured_bytes: ByteLen(self.captured_bytes),
            captured_records: self.captured_records,
        }
    }

    /// The state to store when the agent stops, and whether it is a clean one: everything durable, nothing dirty, nothing held. After a
    /// clean stop the stream goes on without a gap, **if** capture hands in everything from the last `ReleaseCapture` on; so this is
    /// called after the last event, and nothing is released after it.
    pub fn final_state(&self) -> (Vec<u8>, bool) {
        let clean = self.positioned
            && self.gap.is_none()
            && self.window.is_empty()
            && self.held.is_empty()
            && self.losses.is_empty()
            && self.bookmarks.is_empty()
            && self.storing_before_send.is_none()
            && !self.mid_request;
        let (mut stored, _) = self.snapshot();
        stored.clean = clean.then(|| self.window.next());
        (stored.encode(), clean)
    }

    /// The state to store now and then for the time after a host that went down without a word: it says which stream goes on, and nothing
    /// of what was written since.
    pub fn boot_state(&self) -> Vec<u8> {
        self.snapshot().0.encode()
    }

    // ---- capture ----------------------------------------------------------------------------------------------------------------

    fn captured(&mut self, captured: Captured, out: &mut Vec<Action>) {
        let Captured { capture, kind, flags, volume, extent, mono, wall_us } = captured;
        self.captured_records += 1;
        self.mid_request = flags.contains(WriteFlags::MORE);
        let Some(at) = self.volumes.iter().position(|v| v.spec.id == volume) else {
            out.push(Action::Alarm(Alarm::UnknownVolume { volume }));
            return self.forget(capture, 0, 0..0, 0, out);
        };
        let record = kind.record();
        let changes = record.changes_volume();
        let extent = if changes { extent } else { Extent::default() };
        // Only the copy may call a record copied.
        let flags = WriteFlags(flags.0 & (WriteFlags::FUA | WriteFlags::PREFLUSH | WriteFlags::MORE).0);
        if changes && !extent.fits(self.volumes[at].spec.sectors) {
            out.push(Action::Alarm(Alarm::OutsideVolume { volume, extent }));
            // What lies inside is protected all the same.
            return self.lose(captured, at, GapReason::VolumeChanged, out);
        }
        let fits_a_record = match kind {
            CapturedKind::Write => extent.bytes() <= MAX_RECORD_BYTES as u64,
            CapturedKind::Zero | CapturedKind::Discard => extent.sectors.0 <= u64::from(u32::MAX),
            CapturedKind::Flush => true,
        };
        if !fits_a_record {
            out.push(Action::Alarm(Alarm::NotSplit { volume, extent }));
            return self.lose(captured, at, GapReason::Overflow, out);
        }
        let run = self.volumes[at].dirty.touching(&extent);
        let bytes = charge(FrameKind::Record(record), extent, 0);
        if changes {
            self.captured_bytes += extent.bytes();
            self.captured_since_watermark = true;
            if run.is_empty() {
                // A write of no sectors changes nothing and is no record.
                return self.forget(capture, at, run, 0, out);
            }
        }
        let full = self.window.bytes() + bytes > self.config.spool_bytes_max
            || self.window.len() >= self.config.spool_records_max;
        let only_mark = match self.gap.as_ref().map(|gap| gap.phase) {
            None => full,
            Some(Phase::Marking) => true,
            // The copy will carry it, unless some of it was copied or is being read.
            Some(Phase::Copying) => (changes && self.volumes[at].dirty.all(run.clone())) || full,
        };
        if changes {
            self.copying.mask(at, &extent);
            self.survey.touch(at, run.clone());
        }
        if only_mark {
            if full {
                self.open_gap(self.overflow_reason(), out);
            }
            self.volumes[at].dirty.set(run.clone());
            return self.forget(capture, at, run, bytes, out);
        }
        let record = Numbered { seq: self.window.next(), kind: record, flags, volume, extent, mono, wall_us };
        self.window.push(&record, 0);
        let payload = if kind == CapturedKind::Write { Payload::Captured(capture) } else { Payload::None };
        out.push(Action::Keep { record, payload });
        self.hold(Held { capture, seq: Some(record.seq), volume: at, run, bytes, since: self.now.mono });
    }

    /// A captured write that cannot be a record: its place is copied.
    fn lose(&mut self, captured: Captured, at: usize, reason: GapReason, out: &mut Vec<Action>) {
        let run = self.volumes[at].dirty.touching(&captured.extent);
        self.copying.mask(at, &captured.extent);
        if !run.is_empty() {
            self.volumes[at].dirty.set(run.clone());
            self.survey.touch(at, run.clone());
            self.open_gap(reason, out);
        }
        self.forget(captured.capture, at, run, 0, out);
    }

    fn forget(&mut self, capture: CaptureNo, volume: usize, run: Range<u64>, bytes: u64, out: &mut Vec<Action>) {
        out.push(Action::Forget { capture });
        self.hold(Held { capture, seq: None, volume, run, bytes, since: self.now.mono });
    }

    fn hold(&mut self, held: Held) {
        self.held_bytes += held.bytes;
        self.held.push_back(held);
    }

    fn capture_lost(&mut self, id: u64, reason: GapReason, what: Lost, out: &mut Vec<Action>) {
        match what {
            Lost::Everything => {
                self.all_dirty();
                self.copying.mask_all();
                self.survey.touch_all();
            }
            Lost::Extents(extents) => {
                for (volume, extent) in extents {
                    if let Some(at) = self.volumes.iter().position(|v| v.spec.id == volume) {
                        // A read in flight may have seen what was there before, and come back behind the one that is ordered now.
                        self.copying.mask(at, &extent);
                        self.survey.touch(at, self.volumes[at].dirty.touching(&extent));
                        self.mark_dirty(at, &extent);
                    }
                }
            }
        }
        // The rest of a request that was being captured may be among what was lost.
        self.mid_request = false;
        self.open_gap(reason, out);
        self.losses.push((id, None));
        self.store_soon = true;
    }

    fn mark_dirty(&mut self, at: usize, extent: &Extent) {
        let map = &mut self.volumes[at].dirty;
        let run = map.touching(extent);
        map.set(run);
    }

    fn all_dirty(&mut self) {
        self.volumes.iter_mut().for_each(|v| v.dirty.set_all());
        self.survey.forget();
    }

    // ---- gaps -------------------------------------------------------------------------------------------------------------------

    fn overflow_reason(&self) -> GapReason {
        if self.journal_full { GapReason::JournalFull } else { GapReason::Overflow }
    }

    /// From here on writes are only marked. What is in the window stays valid and is sent.
    fn open_gap(&mut self, reason: GapReason, out: &mut Vec<Action>) {
        match &mut self.gap {
            Some(gap) => gap.phase = Phase::Marking,
            None => {
                let since = if self.durable < self.consistent { self.last_gap_since } else { Some(self.now.mono) };
                self.gap = Some(Gap { reason, since, phase: Phase::Marking });
                self.copying.total = Sectors(0);
                self.keep_mark(&Mark::GapBegin { reason }, out);
            }
        }
    }

    /// Takes back every number from `from` on: what they stood for is dirty.
    fn take_back(&mut self, from: SourceSeq, out: &mut Vec<Action>) {
        let volumes = &mut self.volumes;
        let mut oldest: Option<MonoTime> = None;
        self.window.truncate(from, |entry| {
            oldest = Some(oldest.unwrap_or(entry.mono).min(entry.mono));
            if let Some(volume) = volumes.iter_mut().find(|v| v.spec.id == entry.volume) {
                let run = volume.dirty.touching(&entry.extent());
                volume.dirty.set(run);
            }
        });
        if let Some(oldest) = oldest {
            out.push(Action::Drop { from });
            if let Some(Gap { since: Some(since), .. }) = &mut self.gap {
                *since = (*since).min(oldest);
            } else if self.gap.is_none() {
                self.last_gap_since = Some(oldest);
            }
        }
        self.held.iter_mut().filter(|held| held.seq.is_some_and(|seq| seq >= from)).for_each(|held| held.seq = None);
        self.gate.taken_back(from);
        if self.consistent >= from {
            self.consistent = SourceSeq::MAX;
        }
    }

    /// Begins a gap at the next number whether or not one is open: an earlier `GapBegin` may never have reached the box.
    fn begin_at_next(&mut self, reason: GapReason, out: &mut Vec<Action>) {
        let since = match &self.gap {
            Some(gap) => gap.since,
            None => {
                self.copying.total = Sectors(0);
                Some(self.last_gap_since.unwrap_or(self.now.mono).min(self.now.mono))
            }
        };
        self.gap = Some(Gap { reason, since, phase: Phase::Marking });
        if self.window.next() == SourceSeq(1) {
            self.keep_mark(&Mark::StreamBegin { stream: self.stream }, out);
        }
        self.keep_mark(&Mark::GapBegin { reason }, out);
    }

    /// Box and source disagree about what was delivered: everything is copied, from number `next` on.
    fn history_lost(&mut self, next: SourceSeq, alarm: Alarm, out: &mut Vec<Action>) {
        out.push(Action::Alarm(alarm));
        self.all_dirty();
        self.durable = next.prev();
        self.start_over(next, GapReason::HistoryLost, out);
        // Which moment the box still has is not known here.
        if let Some(gap) = &mut self.gap {
            gap.since = None;
        }
        self.store_soon = true;
    }

    /// Goes on at `next`, below everything in the window: what was in it is dirty.
    fn start_over(&mut self, next: SourceSeq, reason: GapReason, out: &mut Vec<Action>) {
        self.take_back(self.window.first(), out);
        self.held.iter_mut().for_each(|held| held.seq = None);
        self.gate.taken_back(SourceSeq::ZERO);
        self.consistent = SourceSeq::MAX;
        self.unsendable = None;
        self.place(next);
        self.begin_at_next(reason, out);
    }

    fn place(&mut self, next: SourceSeq) {
        self.positioned = true;
        self.window = Window::starting_at(next);
        self.sent = next.prev();
        self.sent_ever = self.sent;
    }

    fn keep_mark(&mut self, mark: &Mark, out: &mut Vec<Action>) -> Option<SourceSeq> {
        if !self.positioned {
            return None;
        }
        let payload = encode_mark(mark).expect("marks are bounded by their types, well below what a frame may hold");
        let record = Numbered {
            seq: self.window.next(),
            kind: RecordKind::Mark,
            flags: WriteFlags::NONE,
            volume: VolumeId(0),
            extent: Extent::default(),
            mono: self.now.mono,
            wall_us: self.now.wall_us,
        };
        self.window.push(&record, payload.len() as u32);
        out.push(Action::Keep { record, payload: Payload::Mark(payload.into_boxed_slice()) });
        Some(record.seq)
    }

    fn ask_to_drain(&mut self, out: &mut Vec<Action>) {
        let barrier = self.next_drain;
        self.next_drain += 1;
        self.drain = Some(barrier);
        out.push(Action::Drain { barrier });
    }

    // ---- link -------------------------------------------------------------------------------------------------------------------

    fn connected(&mut self, out: &mut Vec<Action>) {
        self.link = Link::Opening;
        self.heard_at = self.now.mono;
        out.push(Action::Open {
            group: self.config.group,
            stream: self.stream,
            first_seq: self.window.first(),
            next_seq: self.positioned.then(|| self.window.next()),
            volumes: self.config.volumes.clone(),
            acked_durable: (self.durable > SourceSeq::ZERO).then_some(self.durable),
        });
    }

    fn down(&mut self) {
        if !matches!(self.link, Link::Down { .. }) {
            self.link = Link::Down { since: Some(self.heard_at) };
        }
        self.journal_full = false;
    }

    fn ready(&mut self, resume: Resume, credit: Credit, out: &mut Vec<Action>) {
        if self.link != Link::Opening {
            return;
        }
        self.link = Link::Ready;
        self.heard_at = self.now.mono;
        self.sent_at = self.now.mono;
        self.credit = credit;
        self.spent = Credit::default();
        let next = match resume {
            Resume::Continue { next } if next > SEQ_MAX => {
                out.push(Action::Disconnect(DisconnectReason::BadResume { next }));
                return self.down();
            }
            // A box that "goes on at 0" knows nothing.
            Resume::Continue { next } if next > SourceSeq::ZERO => Some(next),
            Resume::Continue { .. } | Resume::Restart => None,
        };
        let (durable, ours) = (self.durable, self.window.next());
        match next {
            None if durable > SourceSeq::ZERO => self.history_lost(SourceSeq(1), Alarm::BoxForgot { durable }, out),
            Some(next) if next <= durable => self.history_lost(next, Alarm::BoxLostDurable { durable, next }, out),
            Some(next) if self.positioned && next > ours => {
                self.history_lost(next, Alarm::BoxAhead { ours, next }, out)
            }
            next => self.go_on_at(next.unwrap_or(SourceSeq(1)), out),
        }
    }

    /// The box has everything before `next`, and nothing it had acknowledged is missing.
    fn go_on_at(&mut self, next: SourceSeq, out: &mut Vec<Action>) {
        if !self.positioned {
            let reason = self.gap.as_ref().map_or(GapReason::AgentRestart, |gap| gap.reason);
            self.place(next);
            return self.begin_at_next(reason, out);
        }
        if next < self.window.first() {
            // After a restart of the agent the window begins at what the box had written; the box lost some of that, and had never
            // called it durable. All of it was dirty when the agent started, and is dirty or in the window now.
            return self.start_over(next, GapReason::AgentRestart, out);
        }
        // What earlier connections carried beyond this did not arrive, and will not.
        self.sent = next.prev();
        self.sent_ever = self.sent;
        if let Some((from, through)) = self.unsendable
            && next <= through
        {
            // The spool can send up to here; what follows is lost from it.
            self.unsendable = None;
            let from = next.max(from);
            self.take_back(from, out);
            self.begin_at_next(GapReason::Overflow, out);
        }
    }

    fn ack(&mut self, ack: Ack, out: &mut Vec<Action>) {
        if self.link != Link::Ready {
            return;
        }
        if ack.written > self.sent {
            out.push(Action::Disconnect(DisconnectReason::AckedUnsent { acked: ack.written, sent: self.sent }));
            return self.down();
        }
        self.heard_at = self.now.mono;
        self.credit = self.credit.max(ack.credit);
        self.journal_full = ack.flags.contains(AckFlags::JOURNAL_FULL);
        // The wire refuses an ack that says otherwise.
        let durable = ack.durable.min(ack.written);
        if durable > self.durable {
            self.durable = durable;
            self.window.release(durable);
            out.push(Action::Release { through: durable });
            self.gate.durable(durable, out);
            self.unsendable = self.unsendable.filter(|(_, through)| *through > durable);
            if !self.synced_once && self.durable >= self.consistent {
                self.synced_once = true;
                self.store_soon = true;
            }
        }
    }

    fn spool_lost(&mut self, from: SourceSeq, out: &mut Vec<Action>) {
        let from = from.max(self.window.first());
        if !self.positioned || from >= self.window.next() {
            return;
        }
        out.push(Action::Alarm(Alarm::SpoolLost { from }));
        // What was sent may be on the box: only the next `Ready` tells. What was not is gone for certain.
        if from <= self.sent_ever {
            let earliest = self.unsendable.map_or(from, |(earlier, _)| earlier.min(from));
            self.unsendable = Some((earliest, self.sent_ever));
        }
        let unsent = from.max(self.sent_ever.next());
        if unsent < self.window.next() {
            self.take_back(unsent, out);
            self.begin_at_next(GapReason::Overflow, out);
        }
    }

    // ---- after every event --------------------------------------------------------------------------------------------------------

    fn settle(&mut self, out: &mut Vec<Action>) {
        self.give_up_asking(out);
        if self.gap.is_some() {
            self.work_on_gap(out);
        }
        if !self.bookmarks.is_empty() {
            self.place_bookmarks(out);
        }
        self.send(out);
        self.let_go(out);
        if self.store_soon && self.storing.is_none() {
            self.store(out);
        }
        if self.gate.wants_to_catch_up()
            && self.gap.is_none()
            && self.link == Link::Ready
            && self.durable >= self.consistent
            && let Lag::Known { ms } = self.lag()
        {
            self.gate.caught_up(ms, out);
        }
        let state = self.state();
        if self.announced != Some(state) {
            self.announced = Some(state);
            out.push(Action::State(state));
        }
    }

    fn work_on_gap(&mut self, out: &mut Vec<Action>) {
        if self.gap.as_ref().is_some_and(|gap| gap.phase == Phase::Marking) {
            if !self.may_copy() {
                return;
            }
            if let Some(gap) = &mut self.gap {
                gap.phase = Phase::Copying;
            }
        }
        self.ask_for_unused(out);
        self.issue_reads(out);
        self.copying.total = self.copying.total.max(self.to_copy());
        if self.positioned && self.drain.is_none() && !self.mid_request && self.nothing_to_copy() {
            self.last_gap_since = self.gap.take().and_then(|gap| gap.since);
            self.survey.forget();
            if let Some(seq) = self.keep_mark(&Mark::Consistent, out) {
                self.consistent = seq;
                self.gate.consistent(seq);
            }
            self.watermark_at = self.now.mono;
        }
    }

    fn place_bookmarks(&mut self, out: &mut Vec<Action>) {
        if let Some(gap) = &self.gap {
            let reason = gap.reason;
            for (id, ..) in self.bookmarks.drain(..) {
                out.push(Action::BookmarkRefused { id, why: BookmarkRefusal::InGap { reason } });
            }
        } else if !self.mid_request {
            while let Some((id, name, consistency)) = self.bookmarks.pop_front() {
                if let Some(seq) = self.keep_mark(&Mark::Bookmark { name, consistency }, out) {
                    out.push(Action::BookmarkPlaced { id, seq });
                }
            }
        }
    }

    fn send(&mut self, out: &mut Vec<Action>) {
        if self.link != Link::Ready || self.paused || self.journal_full || self.storing_before_send.is_some() {
            return;
        }
        let first = self.sent.next();
        let mut last = self.sent;
        while let Some(entry) = self.window.get(last.next()) {
            let bytes = self.spent.bytes + u64::from(entry.charge);
            if bytes > self.credit.bytes || self.spent.records >= self.credit.records {
                break;
            }
            self.spent = Credit { bytes, records: self.spent.records + 1 };
            last = last.next();
        }
        if last >= first {
            out.push(Action::Send { first, last });
            self.sent = last;
            self.sent_ever = self.sent_ever.max(last);
            self.sent_at = self.now.mono;
        }
    }

    /// Lets capture go of what is safe, oldest first.
    fn let_go(&mut self, out: &mut Vec<Action>) {
        let mut through = None;
        while let Some(held) = self.held.front() {
            let delivered = held.seq.is_some_and(|seq| seq <= self.durable);
            let stored = || self.volumes.get(held.volume).is_none_or(|v| v.stable.all(held.run.clone()));
            if !delivered && !stored() {
                break;
            }
            through = Some(held.capture);
            self.held_bytes -= held.bytes;
            self.held.pop_front();
        }
        if let Some(through) = through {
            self.released = through;
            out.push(Action::ReleaseCapture { through });
        }
    }

    fn tick(&mut self, out: &mut Vec<Action>) {
        let now = self.now.mono;
        self.gate.tick(now, out);
        if !matches!(self.link, Link::Down { .. }) {
            let ms = now.ms_since(self.heard_at);
            if ms >= self.config.silence_ms {
                out.push(Action::Disconnect(DisconnectReason::Silent { ms }));
                self.down();
            } else if self.link == Link::Ready && now.ms_since(self.sent_at) >= self.config.heartbeat_ms {
                self.heartbeats += 1;
                self.sent_at = now;
                out.push(Action::Message(Message::heartbeat(self.heartbeats, now)));
            }
        }
        self.watermark(out);
        let held_long = self.held.front().is_some_and(|held| now.ms_since(held.since) >= self.config.held_ms);
        let due = now.ms_since(self.stored_at) >= self.config.store_ms;
        if self.storing.is_none() {
            if held_long || self.held_bytes > self.config.held_bytes_max {
                self.store(out);
            } else if due {
                self.stored_at = now;
                let (_, maps) = self.snapshot();
                if maps.iter().zip(&self.volumes).any(|(map, volume)| *map != volume.stable) {
                    self.store(out);
                }
            }
        }
    }

    fn watermark(&mut self, out: &mut Vec<Action>) {
        // While nothing flows a watermark proves nothing and would only pile up.
        let flows =
            self.link == Link::Ready && !self.paused && !self.journal_full && self.sent.next() == self.window.next();
        if !flows || self.gap.is_some() || self.mid_request {
            return;
        }
        let ms = self.now.mono.ms_since(self.watermark_at);
        let due = if self.captured_since_watermark { self.config.watermark_ms } else { self.config.watermark_idle_ms };
        if ms >= due {
            let seq = self.window.next().prev();
            let mark = Mark::Watermark { stream: self.stream, seq, source_wall_us: self.now.wall_us };
            self.keep_mark(&mark, out);
            self.watermark_at = self.now.mono;
            self.captured_since_watermark = false;
        }
    }

    fn state(&self) -> GroupAgentState {
        match (self.link, &self.gap) {
            (Link::Down { .. }, _) => GroupAgentState::Disconnected,
            (Link::Opening, _) => GroupAgentState::Opening,
            (Link::Ready, _) if self.paused => GroupAgentState::Paused,
            (Link::Ready, None) => GroupAgentState::Replicating,
            (Link::Ready, Some(Gap { phase: Phase::Marking, reason, .. })) => {
                GroupAgentState::Marking { reason: *reason }
            }
            (Link::Ready, Some(Gap { phase: Phase::Copying, reason, .. })) => {
                GroupAgentState::Syncing { reason: *reason }
            }
        }
    }

    fn lag(&self) -> Lag {
        match (self.link, &self.gap) {
            _ if !self.synced_once => Lag::Never,
            (Link::Down { since }, _) => Lag::Unknown { since: since.unwrap_or(self.heard_at) },
            (Link::Opening, _) => Lag::Unknown { since: self.heard_at },
            (Link::Ready, Some(Gap { since: Some(since), .. })) => Lag::Known { ms: self.now.mono.ms_since(*since) },
            (Link::Ready, Some(Gap { since: None, .. })) => Lag::Unknown { since: self.heard_at },
            // The gap counts until the box has its end.
            (Link::Ready, None) if self.durable < self.consistent => match self.last_gap_since {
                Some(since) => Lag::Known { ms: self.now.mono.ms_since(since) },
                None => Lag::Unknown { since: self.heard_at },
            },
            (Link::Ready, None) => {
                Lag::Known { ms: self.window.oldest_live().map_or(0, |entry| self.now.mono.ms_since(entry.mono)) }
            }
        }
    }

    // ---- stored state -----------------------------------------------------------------------------------------------------------

    /// Everything in which host and box may differ, as of now.
    fn snapshot(&self) -> (Stored, Vec<GranuleMap>) {
        let mut maps: Vec<GranuleMap> = self.volumes.iter().map(|v| v.dirty.clone()).collect();
        for read in &self.copying.reads {
            let run = maps[read.volume].touching(&read.extent);
            maps[read.volume].set(run);
        }
        for entry in self.window.iter().filter(|entry| entry.kind.changes_volume()) {
            if let Some(at) = self.volumes.iter().position(|v| v.spec.id == entry.volume) {
                let run = maps[at].touching(&entry.extent());
                maps[at].set(run);
            }
        }
        let stored = Stored {
            synced_once: self.synced_once,
            durable: self.durable,
            volumes: self
                .volumes
                .iter()
                .zip(&maps)
                .map(|(v, map)| StoredVolume { spec: v.spec.clone(), map: map.store() })
                .collect(),
            ..Stored::new(self.config.group, self.stream)
        };
        (stored, maps)
    }

    fn store(&mut self, out: &mut Vec<Action>) {
        let (stored, maps) = self.snapshot();
        let serial = self.next_serial;
        self.next_serial += 1;
        self.storing = Some(serial);
        self.store_soon = false;
        self.stored_at = self.now.mono;
        for (volume, map) in self.volumes.iter_mut().zip(maps) {
            // Until it is stored, a crash may find either the one before or this one.
            volume.stable.intersect(&map);
            volume.storing = Some(map);
        }
        self.losses
            .iter_mut()
            .filter(|(_, stored_by)| stored_by.is_none())
            .for_each(|(_, stored_by)| *stored_by = Some(serial));
        out.push(Action::Persist { serial, state: stored.encode() });
    }

    fn persisted(&mut self, serial: u64, out: &mut Vec<Action>) {
        if self.storing != Some(serial) {
            return;
        }
        self.storing = None;
        for volume in &mut self.volumes {
            if let Some(map) = volume.storing.take() {
                volume.stable = map;
            }
        }
        if self.storing_before_send.is_some_and(|wanted| wanted <= serial) {
            self.storing_before_send = None;
        }
        self.losses.retain(|(id, stored_by)| {
            let stored = stored_by.is_some_and(|by| by <= serial);
            if stored {
                out.push(Action::LossRecorded { id: *id });
            }
            !stored
        });
    }
}

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
mod survey_tests;
#[cfg(test)]
mod tests;
