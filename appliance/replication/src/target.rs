//! The target of a replication session: one for each stream connection, on the box.
//!
//! Frames go in, appends come out. The machine checks everything a frame claims before anything is appended; what is wrong is refused
//! by name and ends the connection. The caller appends (`Journal::append`, which checks the payload's checksum as it must before
//! writing anyway), says under which LSN, and reports the journal's progress.
//!
//! # States
//!
//! ```text
//!   Restart ──▶ Begin ──StreamBegin──▶ Begun ──GapBegin──▶ InGap ◀──GapBegin── Consistent
//!                                                            └─────Consistent──────▶┘
//!   Continue ──▶ InGap or Consistent, as the journal ends
//!   any ──refusal──▶ Refused (everything after is ignored)
//! ```
//!
//! # Invariants
//!
//! 1. Records are appended in the order of their numbers, without a hole, beginning where `StreamReady` said.
//! 2. Copied pieces only in gaps; bookmarks and watermarks only outside and only at a request's end; `Consistent` only in a gap.
//! 3. Every extent lies on its volume; every mark and packed payload says what it claims to be.
//! 4. An ack names as durable only what the journal reported durable.
//! 5. A source that sends more than granted is refused: what the box holds for it is bounded by the grant.
//! 6. History time never goes backwards and never lies in the box's future.
//!
//! # When the journal is full
//!
//! The caller keeps the one record that did not fit, reads no further from the connection, hands in `Room(false)`, and appends it when
//! there is room again (`Room(true)`). Acks go on each second, so the source does not take the box for dead; it keeps what comes in
//! spool and dirty map.
//!
//! # One at a time
//!
//! Before `StreamReady` is sent, the caller must have ended an earlier connection of the same group: what that one still had in its
//! buffers must not be appended any more.
//!
//! # Limits
//!
//! One entry of 24 bytes for each record between append and durable: at most the record grant. [`COMPARISONS_MAX`] comparisons that are not
//! answered yet.

use crate::clock::HistoryClock;
use model::{
    Codec, GapReason, GroupId, HistoryTime, Lsn, Mark, MonoTime, RecordKind, SECTOR, SourceSeq, StreamId, VolumeId,
    VolumeSpec, WriteFlags,
};
use std::collections::VecDeque;
use wire::{
    Ack, AckFlags, Comparison, Credit, FrameHeader, FrameKind, MAX_RECORD_BYTES, Message, Refusal, RefuseCode, Resume,
    claimed_len, decode_mark,
};

/// A source has as many under way as it has reads; each may make the box read 4 MiB.
pub const COMPARISONS_MAX: usize = 64;

/// What `OpenStream` says, as far as it decides where to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenFacts {
    pub stream: StreamId,
    pub first_seq: SourceSeq,
    pub next_seq: Option<SourceSeq>,
    pub acked_durable: Option<SourceSeq>,
}

/// Where a stream goes on: `had` is the newest stream in the journal and the highest number appended of it.
///
/// What the source believes does not change the answer: it is told what the box has, and decides by itself whether that can be.
pub fn resume(had: Option<(StreamId, SourceSeq)>, open: &OpenFacts) -> Resume {
    match had {
        Some((stream, appended)) if stream == open.stream => Resume::Continue { next: appended.next() },
        Some(_) | None => Resume::Restart,
    }
}

/// What the journal has of the stream as it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Had {
    pub durable: SourceSeq,
    /// Everything appended so far is durable when the journal's durable position reaches this.
    pub appended_lsn: Lsn,
}

#[derive(Clone, Debug)]
pub struct TargetConfig {
    pub group: GroupId,
    pub stream: StreamId,
    pub volumes: Vec<VolumeSpec>,
    pub resume: Resume,
    /// For [`Resume::Continue`].
    pub had: Option<Had>,
    /// Why the journal offers no points at its end, if so.
    pub in_gap: Option<GapReason>,
    /// How far ahead of the journal's writes a source may send.
    pub window: Credit,
    /// An ack goes out at least this often.
    pub ack_ms: u64,
    /// A source that says nothing for this long is gone.
    pub silence_ms: u64,
    /// The newest time in the journal.
    pub last_time: HistoryTime,
}

impl TargetConfig {
    pub fn new(group: GroupId, stream: StreamId, volumes: Vec<VolumeSpec>, resume: Resume) -> Self {
        Self {
            group,
            stream,
            volumes,
            resume,
            had: None,
            in_gap: None,
            // 64 MiB: what 1 Gbit/s carries in half a second. 16 Ki records: the same in writes of 4 KiB.
            window: Credit { bytes: 64 << 20, records: 16_384 },
            ack_ms: 1_000,
            silence_ms: 30_000,
            last_time: HistoryTime(0),
        }
    }
}

/// Where the stream is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TargetState {
    /// A stream the journal does not know: `StreamBegin` must come first.
    Begin,
    /// Then a gap.
    Begun,
    InGap {
        reason: GapReason,
    },
    Consistent,
    Refused,
}

/// Something that happened on the box.
#[derive(Clone, Debug)]
pub enum TargetEvent<'a> {
    /// A record or mark. The payload stays with the caller until the actions are carried out.
    Frame {
        header: &'a FrameHeader,
        payload: &'a [u8],
    },
    Message(&'a Message),
    /// The journal took the record of the last `Append` or `AppendMark`.
    Appended {
        seq: SourceSeq,
        lsn: Lsn,
    },
    /// The journal's own progress.
    Progress {
        written: Lsn,
        durable: Lsn,
    },
    /// The answer to [`TargetAction::Compare`].
    Compared {
        id: u64,
        differ: Vec<u8>,
    },
    /// Whether the journal has room; see the module's documentation.
    Room(bool),
    /// At least ten times a second.
    Tick,
}

/// Something to do, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetAction {
    /// Append the event's frame with this time.
    Append {
        time: HistoryTime,
    },
    /// Append this mark.
    AppendMark {
        mark: Mark,
        time: HistoryTime,
        seq: SourceSeq,
    },
    /// When everything appended so far is durable, compare with the newest state (later or earlier makes no difference to what
    /// is right, only to how much is sent) and answer with [`TargetEvent::Compared`].
    Compare(Comparison),
    SendAck(Ack),
    Send(Message),
    /// Send it and close the connection.
    Refuse(Refusal),
    /// The host's writes up to this time are durable here.
    Proven {
        until: HistoryTime,
        source_wall_us: u64,
        seq: SourceSeq,
    },
    State(TargetState),
}

#[derive(Debug)]
struct Appended {
    seq: SourceSeq,
    lsn: Lsn,
    /// Sum of all charges on this connection up to and including this record.
    charged: Credit,
}

#[derive(Debug)]
struct Proof {
    seq: SourceSeq,
    until: HistoryTime,
    source_wall_us: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    state: TargetState,
    clock: HistoryClock,
    expected: SourceSeq,
    mid_request: bool,
    received: Credit,
    granted: Credit,
    /// Told to be appended, and not yet confirmed by `Appended`.
    pending: VecDeque<(SourceSeq, Credit)>,
    appended: VecDeque<Appended>,
    written: SourceSeq,
    durable: SourceSeq,
    /// Charges of what is written: the grant is this and the window.
    written_charge: Credit,
    proofs: VecDeque<Proof>,
    room: bool,
    acked: Option<Ack>,
    acked_at: MonoTime,
    heard_at: MonoTime,
    /// Comparisons not answered yet.
    comparing: usize,
}

/// Watermarks come once a second and are durable within milliseconds; older proofs than this many are superseded anyway.
const PROOFS_MAX: usize = 64;

impl Target {
    /// `source`: the source's monotonic clock in `OpenStream`. Gives the machine and the `StreamReady` to send.
    pub fn open(
        config: TargetConfig,
        spec: model::GroupSpec,
        source: MonoTime,
        box_now: HistoryTime,
        now: MonoTime,
    ) -> (Self, Message) {
        let (state, expected) = match (config.resume, config.in_gap) {
            (Resume::Restart, _) => (TargetState::Begin, SourceSeq(1)),
            (Resume::Continue { next }, Some(reason)) => (TargetState::InGap { reason }, next),
            (Resume::Continue { next }, None) => (TargetState::Consistent, next),
        };
        // One record must always fit, or the stream would stand still for ever.
        let least = 2 * (MAX_RECORD_BYTES + wire::HEADER_LEN) as u64;
        let granted = Credit { bytes: config.window.bytes.max(least), records: config.window.records.max(2) };
        let mut target = Self {
            clock: HistoryClock::open(source, box_now, now, config.last_time),
            state,
            expected,
            mid_request: false,
            received: Credit::default(),
            granted,
            pending: VecDeque::new(),
            appended: VecDeque::new(),
            written: SourceSeq::ZERO,
            durable: SourceSeq::ZERO,
            written_charge: Credit::default(),
            proofs: VecDeque::new(),
            room: true,
            acked: None,
            acked_at: now,
            heard_at: now,
            comparing: 0,
            config: TargetConfig { window: granted, ..config },
        };
        if let (Resume::Continue { next }, Some(had)) = (target.config.resume, target.config.had) {
            target.durable = had.durable.min(next.prev());
            target.written = target.durable;
            target.appended.push_back(Appended { seq: next.prev(), lsn: had.appended_lsn, charged: Credit::default() });
        }
        let ready = Message::StreamReady { resume: target.config.resume, credit: granted, spec };
        (target, ready)
    }

    pub fn state(&self) -> TargetState {
        self.state
    }
    pub fn durable(&self) -> SourceSeq {
        self.durable
    }
    pub fn expected(&self) -> SourceSeq {
        self.expected
    }
    /// The newest history time given to a record.
    pub fn last_time(&self) -> HistoryTime {
        self.clock.last()
    }

    /// Takes one event; what is to be done is appended to `out`. `box_now` is the box's wall clock, `now` its monotonic one.
    pub fn on(&mut self, event: TargetEvent<'_>, now: MonoTime, box_now: HistoryTime, out: &mut Vec<TargetAction>) {
        if self.state == TargetState::Refused {
            return;
        }
        match event {
            TargetEvent::Frame { header, payload } => {
                self.heard_at = now;
                if let Err(refusal) = self.frame(header, payload, now, box_now, out) {
                    self.refuse(refusal, out);
                }
            }
            TargetEvent::Message(message) => {
                self.heard_at = now;
                self.message(message, now, box_now, out);
            }
            TargetEvent::Appended { seq, lsn } => self.appended(seq, lsn, out),
            TargetEvent::Progress { written, durable } => self.progress(written, durable, now, out),
            TargetEvent::Compared { id, differ } => {
                self.comparing = self.comparing.saturating_sub(1);
                out.push(TargetAction::Send(Message::Compared { id, differ }));
            }
            TargetEvent::Room(room) => {
                if self.room != room {
                    self.room = room;
                    // While nothing is read from the connection, its silence says nothing.
                    self.heard_at = now;
                    self.ack(now, out);
                }
            }
            TargetEvent::Tick => {
                let ms = now.ms_since(self.heard_at);
                if self.room && ms >= self.config.silence_ms {
                    self.refuse(refusal(RefuseCode::Silent, format!("nothing was heard for {ms} ms")), out);
                } else if now.ms_since(self.acked_at) >= self.config.ack_ms {
                    self.ack(now, out);
                }
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal, out: &mut Vec<TargetAction>) {
        self.state = TargetState::Refused;
        out.push(TargetAction::Refuse(refusal));
        out.push(TargetAction::State(self.state));
    }

    fn frame(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        now: MonoTime,
        box_now: HistoryTime,
        out: &mut Vec<TargetAction>,
    ) -> Result<(), Refusal> {
        let FrameKind::Record(kind) = header.kind else {
            return Err(refusal(
                RefuseCode::OutOfPlace,
                format!("a {:?} frame where a record is expected", header.kind),
            ));
        };
        let charged =
            Credit { bytes: self.received.bytes.saturating_add(header.charge()), records: self.received.records + 1 };
        if charged.bytes > self.granted.bytes || charged.records > self.granted.records {
            let text = format!(
                "{} records and {} bytes were sent, {} and {} granted",
                charged.records, charged.bytes, self.granted.records, self.granted.bytes
            );
            return Err(refusal(RefuseCode::CreditOverrun, text));
        }
        if header.seq != self.expected {
            let text = format!("record {} came, {} is expected", header.seq, self.expected);
            return Err(refusal(RefuseCode::Sequence, text));
        }
        if payload.len() as u64 != u64::from(header.payload_len) {
            let text = format!("payload has {} bytes, its header says {}", payload.len(), header.payload_len);
            return Err(refusal(RefuseCode::BadFrame, text));
        }
        let was = self.state;
        let mark = match kind {
            RecordKind::Mark => Some(self.check_mark(header, payload)?),
            RecordKind::Write | RecordKind::Zero | RecordKind::Discard | RecordKind::Flush => {
                self.check_record(kind, header, payload)?;
                None
            }
        };
        // Nothing fails from here on.
        self.received = charged;
        self.expected = self.expected.next();
        self.pending.push_back((header.seq, charged));
        self.clock.sample(header.mono, box_now, now);
        let time = self.clock.map(header.mono, box_now);
        match mark {
            None => {
                if !header.flags.contains(WriteFlags::SYNC) {
                    self.mid_request = header.flags.contains(WriteFlags::MORE);
                }
                out.push(TargetAction::Append { time });
            }
            Some(mark) => {
                if let Mark::Watermark { seq, source_wall_us, .. } = mark {
                    if self.proofs.len() == PROOFS_MAX {
                        self.proofs.pop_front();
                    }
                    self.proofs.push_back(Proof { seq, until: time, source_wall_us });
                }
                out.push(TargetAction::AppendMark { mark, time, seq: header.seq });
            }
        }
        if self.state != was {
            out.push(TargetAction::State(self.state));
        }
        Ok(())
    }

    fn check_record(&self, kind: RecordKind, header: &FrameHeader, payload: &[u8]) -> Result<(), Refusal> {
        let copied = header.flags.contains(WriteFlags::SYNC);
        match self.state {
            TargetState::Begin | TargetState::Begun => {
                let text = format!("a {kind:?} where the stream must begin");
                return Err(refusal(RefuseCode::OutOfPlace, text));
            }
            TargetState::Consistent if copied => {
                return Err(refusal(RefuseCode::OutOfPlace, "a copied piece outside a gap".into()));
            }
            TargetState::InGap { .. } | TargetState::Consistent | TargetState::Refused => {}
        }
        if copied && !matches!(kind, RecordKind::Write | RecordKind::Zero) {
            return Err(refusal(RefuseCode::OutOfPlace, format!("a copied piece that is a {kind:?}")));
        }
        let volume = self.volume(header.volume)?;
        if !header.extent.fits(volume.sectors) {
            let text = format!(
                "{:?} of volume {} ({}), which has {} sectors",
                header.extent, volume.id, volume.name, volume.sectors.0
            );
            return Err(refusal(RefuseCode::BadExtent, text));
        }
        if header.codec == Codec::Zstd && claimed_len(payload) != Some(header.extent.sectors.0 * SECTOR) {
            let text = format!(
                "packed payload of record {} does not say that it is {} bytes",
                header.seq,
                header.extent.bytes()
            );
            return Err(refusal(RefuseCode::BadFrame, text));
        }
        Ok(())
    }

    fn volume(&self, id: VolumeId) -> Result<&VolumeSpec, Refusal> {
        self.config
            .volumes
            .iter()
            .find(|volume| volume.id == id)
            .ok_or_else(|| refusal(RefuseCode::UnknownVolume, format!("volume {id} is not in the group")))
    }

    /// Checks a mark and takes the step it stands for.
    fn check_mark(&mut self, header: &FrameHeader, payload: &[u8]) -> Result<Mark, Refusal> {
        let mark = decode_mark(header, payload)
            .map_err(|error| refusal(RefuseCode::BadFrame, format!("mark {}: {}", header.seq, chain(&error))))?;
        let out_of_place =
            |what: &str| Err(refusal(RefuseCode::OutOfPlace, format!("{what} at record {}", header.seq)));
        if header.flags != WriteFlags::NONE {
            return out_of_place("a mark with flags");
        }
        match (&mark, self.state) {
            (Mark::StreamBegin { stream }, TargetState::Begin) if *stream == self.config.stream => {
                self.state = TargetState::Begun;
            }
            (Mark::StreamBegin { .. }, _) => return out_of_place("a stream's begin"),
            (_, TargetState::Begin) => return out_of_place("a mark before the stream's begin"),
            (Mark::GapBegin { reason }, _) => self.state = TargetState::InGap { reason: *reason },
            (_, TargetState::Begun) => return out_of_place("a mark where a new stream's gap must begin"),
            (Mark::Consistent, TargetState::InGap { .. }) => {
                self.state = TargetState::Consistent;
                // A request that the gap cut off is part of what was copied.
                self.mid_request = false;
            }
            (Mark::Consistent, _) => return out_of_place("a gap's end without a gap"),
            (Mark::Watermark { stream, seq, .. }, TargetState::Consistent) => {
                if *stream != self.config.stream || *seq >= header.seq {
                    return out_of_place("a watermark of another stream or of the future");
                }
                if self.mid_request {
                    return out_of_place("a watermark inside a request");
                }
            }
            (Mark::Watermark { .. }, _) => return out_of_place("a watermark in a gap"),
            (Mark::Bookmark { .. }, TargetState::Consistent) if !self.mid_request => {}
            (Mark::Bookmark { .. }, TargetState::Consistent) => return out_of_place("a bookmark inside a request"),
            (Mark::Bookmark { .. }, _) => return out_of_place("a bookmark in a gap"),
        }
        Ok(mark)
    }

    fn message(&mut self, message: &Message, now: MonoTime, box_now: HistoryTime, out: &mut Vec<TargetAction>) {
        match message {
            Message::Heartbeat { number, mono_ns } => {
                self.clock.sample(MonoTime(*mono_ns), box_now, now);
                out.push(TargetAction::Send(Message::HeartbeatAck { number: *number }));
            }
            Message::Compare(ask) => match self.check_comparison(ask) {
                Ok(()) => {
                    self.comparing += 1;
                    out.push(TargetAction::Compare(ask.clone()));
                }
                Err(refusal) => self.refuse(refusal, out),
            },
            other => {
                let text = format!("a {} on a stream connection", other.name());
                self.refuse(refusal(RefuseCode::OutOfPlace, text), out);
            }
        }
    }

    fn check_comparison(&self, ask: &Comparison) -> Result<(), Refusal> {
        if self.comparing >= COMPARISONS_MAX {
            let text = format!("more than {COMPARISONS_MAX} comparisons at once");
            return Err(refusal(RefuseCode::CreditOverrun, text));
        }
        let volume = self.volume(ask.volume)?;
        ask.check(volume.sectors).map_err(|e| refusal(RefuseCode::BadExtent, format!("comparison {}: {e}", ask.id)))
    }

    fn appended(&mut self, seq: SourceSeq, lsn: Lsn, out: &mut Vec<TargetAction>) {
        // The caller's word against ours: a mismatch would make an ack lie.
        match self.pending.pop_front() {
            Some((expected, charged)) if expected == seq => self.appended.push_back(Appended { seq, lsn, charged }),
            Some(_) | None => {
                let text = format!("record {seq} was reported as appended out of turn");
                self.refuse(refusal(RefuseCode::Internal, text), out);
            }
        }
    }

    fn progress(&mut self, written: Lsn, durable: Lsn, now: MonoTime, out: &mut Vec<TargetAction>) {
        // Both prefixes grow through the same queue; entries leave it when they are durable.
        let up_to = self.appended.partition_point(|entry| entry.lsn <= written);
        if let Some(entry) = up_to.checked_sub(1).and_then(|at| self.appended.get(at)) {
            self.written = self.written.max(entry.seq);
            self.written_charge = self.written_charge.max(entry.charged);
        }
        while let Some(front) = self.appended.front()
            && front.lsn <= durable
        {
            self.durable = self.durable.max(front.seq);
            self.written = self.written.max(front.seq);
            self.written_charge = self.written_charge.max(front.charged);
            self.appended.pop_front();
        }
        let ack = self.make_ack();
        if self
            .acked
            .is_none_or(|last| last.durable != ack.durable || last.written != ack.written || last.credit != ack.credit)
        {
            self.ack(now, out);
        }
        let mut proven = None;
        while let Some(proof) = self.proofs.front()
            && proof.seq <= self.durable
        {
            proven = self.proofs.pop_front();
        }
        if let Some(Proof { seq, until, source_wall_us }) = proven {
            out.push(TargetAction::Proven { until, source_wall_us, seq });
        }
    }

    fn make_ack(&self) -> Ack {
        let credit = Credit {
            bytes: self.written_charge.bytes.saturating_add(self.config.window.bytes),
            records: self.written_charge.records.saturating_add(self.config.window.records),
        };
        let flags = if self.room { AckFlags::NONE } else { AckFlags::JOURNAL_FULL };
        Ack { written: self.written, durable: self.durable, credit: credit.max(self.granted), flags }
    }

    fn ack(&mut self, now: MonoTime, out: &mut Vec<TargetAction>) {
        let ack = self.make_ack();
        self.granted = ack.credit;
        self.acked = Some(ack);
        self.acked_at = now;
        out.push(TargetAction::SendAck(ack));
    }
}

fn refusal(code: RefuseCode, text: String) -> Refusal {
    Refusal { code, text }
}

/// An error and its causes as one sentence.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
