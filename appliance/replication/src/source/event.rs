//! What goes into the source machine and what comes out of it.

use model::{
    BookmarkName, Consistency, Extent, GapReason, GroupId, MonoTime, RecordKind, SourceSeq, StreamId, SyncMode,
    VolumeId, VolumeSpec, WriteFlags,
};
use std::fmt;
use wire::{Ack, Credit, GroupAgentState, Message, Resume};

use crate::{GranuleMap, Pressure};

/// The source's clocks as an event is handed in.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Now {
    pub mono: MonoTime,
    /// Wall clock, microseconds since 1970: written into marks for people to read.
    pub wall_us: u64,
}

/// Number of a captured write, given by the caller, growing. It also names the payload until [`Action::Keep`] or [`Action::Forget`].
pub type CaptureNo = u64;

/// What a captured request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CapturedKind {
    Write,
    Zero,
    Discard,
    Flush,
}

impl CapturedKind {
    pub(crate) const fn record(self) -> RecordKind {
        match self {
            Self::Write => RecordKind::Write,
            Self::Zero => RecordKind::Zero,
            Self::Discard => RecordKind::Discard,
            Self::Flush => RecordKind::Flush,
        }
    }
}

/// A write of the host, or a part of one of at most 128 KiB: parts follow each other directly, all but the last flagged `MORE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Captured {
    pub capture: CaptureNo,
    pub kind: CapturedKind,
    pub flags: WriteFlags,
    pub volume: VolumeId,
    /// Empty for a flush.
    pub extent: Extent,
    pub mono: MonoTime,
    pub wall_us: u64,
}

/// What capture missed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lost {
    Extents(Vec<(VolumeId, Extent)>),
    /// It cannot be told: every sector of every volume.
    Everything,
}

/// Something that happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// In the order the host issued them.
    Captured(Captured),
    /// Writes of which only the place is known. Must be handed in before any write captured after them, and a write that had not
    /// completed when it was reported must be reported again when it has. Answered by [`Action::LossRecorded`].
    CaptureLost {
        id: u64,
        reason: GapReason,
        what: Lost,
    },
    /// Everything captured before [`Action::Drain`] was emitted has been handed in.
    Drained {
        barrier: u64,
    },
    /// The read is done **and every write issued before it ended has been handed in**. `zeroes`: parts that are all zero; they go out
    /// without payload.
    ReadDone {
        read: ReadId,
        zeroes: Vec<Extent>,
    },
    ReadFailed {
        read: ReadId,
    },
    /// The box's answer to [`Action::Compare`].
    Compared {
        id: u64,
        differ: Vec<u8>,
    },
    /// The answer to [`Action::Survey`]: what no file system used at some moment **after** the question. What freed it is durable in
    /// the file system's own log, and everything issued before it was has been handed in. Nothing, if that cannot be known.
    Surveyed {
        unused: Vec<(VolumeId, GranuleMap)>,
    },
    /// Whether the box of the connection that is being made understands [`Action::Compare`]; before `Connected`.
    BoxCompares(bool),
    /// TLS is up and `Hello` was accepted.
    Connected,
    Ready {
        resume: Resume,
        credit: Credit,
    },
    Ack(Ack),
    /// Any other sign of life from the box.
    Heard,
    Disconnected,
    /// The host waits for a flush or FUA write (handed in before this) to be durable on the box.
    FlushWaiting {
        id: u64,
    },
    /// Place a bookmark after everything handed in so far.
    Bookmark {
        id: u64,
        name: BookmarkName,
        consistency: Consistency,
    },
    /// Copy everything again.
    Resync,
    Pause,
    Unpause,
    Pressure(Pressure),
    /// Copy at most this many bytes each second; none: no limit.
    CopyRate(Option<u64>),
    Mode(SyncMode),
    /// The spool is nearly full, earlier than the machine's own count says.
    SpoolFull,
    /// Payloads from this number on could not be kept.
    SpoolLost {
        from: SourceSeq,
    },
    /// The state of [`Action::Persist`] survives an agent crash now.
    Persisted {
        serial: u64,
    },
    /// At least ten times a second.
    Tick,
}

/// A read of a volume for the copy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReadId(pub u64);

/// A numbered record of the stream; with codec, length and checksum of its payload it becomes a [`wire::FrameHeader`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numbered {
    pub seq: SourceSeq,
    pub kind: RecordKind,
    pub flags: WriteFlags,
    pub volume: VolumeId,
    pub extent: Extent,
    pub mono: MonoTime,
    pub wall_us: u64,
}

/// Where a record's payload is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    None,
    Captured(CaptureNo),
    /// Part of a finished read: `extent` of the record, counted from the start of the read.
    Read(ReadId),
    /// The encoded mark.
    Mark(Box<[u8]>),
}

/// Something to do, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Put record and payload into the spool under its number, until [`Action::Release`] or [`Action::Drop`].
    Keep {
        record: Numbered,
        payload: Payload,
    },
    /// Write these records to the connection, in order, behind whatever was ordered before.
    Send {
        first: SourceSeq,
        last: SourceSeq,
    },
    /// Durable on the box: payloads up to here are not needed any more.
    Release {
        through: SourceSeq,
    },
    /// Never to be sent: payloads from here on are not needed any more, and their numbers will be given to other records.
    Drop {
        from: SourceSeq,
    },
    /// A captured write that is only marked: its payload is not needed.
    Forget {
        capture: CaptureNo,
    },
    /// An agent that dies from now on loses none of these: capture's own buffer may let go of them (a sync leg may let its write
    /// complete, if it does not wait for the box anyway).
    ReleaseCapture {
        through: CaptureNo,
    },
    /// As above for an [`Event::CaptureLost`].
    LossRecorded {
        id: u64,
    },
    /// Send `OpenStream` with these facts and the clocks of the moment.
    Open {
        group: GroupId,
        stream: StreamId,
        first_seq: SourceSeq,
        next_seq: Option<SourceSeq>,
        volumes: Vec<VolumeSpec>,
        acked_durable: Option<SourceSeq>,
    },
    Message(Message),
    /// Close the connection; [`Event::Disconnected`] follows as for any other end.
    Disconnect(DisconnectReason),
    /// Read the extent from the volume for copying. The read must begin **after every write handed in before this action has
    /// completed** on the device.
    ReadVolume {
        read: ReadId,
        volume: VolumeId,
        extent: Extent,
    },
    /// Hash these runs of the read's buffer in blocks of this size and ask the box which differ ([`wire::Comparison`]); the buffer stays.
    Compare {
        id: u64,
        read: ReadId,
        volume: VolumeId,
        block_sectors: u32,
        runs: Vec<Extent>,
    },
    /// Ask the file systems on the volumes what they do not use; then [`Event::Surveyed`]. One at a time.
    Survey,
    /// The read's buffer is not needed any more (its records were given out by the actions before).
    ReadFinished {
        read: ReadId,
    },
    /// Let the host's flush return. `durable` says whether the box has everything before it.
    ReleaseFlush {
        id: u64,
        durable: bool,
    },
    /// Store this so that it survives a crash of the agent, in place of the state before; then [`Event::Persisted`]. One at a time.
    Persist {
        serial: u64,
        state: Vec<u8>,
    },
    /// Answer with [`Event::Drained`] when everything captured before now has been handed in.
    Drain {
        barrier: u64,
    },
    BookmarkPlaced {
        id: u64,
        seq: SourceSeq,
    },
    BookmarkRefused {
        id: u64,
        why: BookmarkRefusal,
    },
    State(GroupAgentState),
    Gate(GateState),
    Alarm(Alarm),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BookmarkRefusal {
    #[error("no moment can be recovered right now: {reason}")]
    InGap { reason: GapReason },
    #[error("{max} bookmarks are waiting already")]
    TooMany { max: usize },
}

/// Why the machine gives a connection up.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DisconnectReason {
    #[error("nothing was heard from the box for {ms} ms")]
    Silent { ms: u64 },
    #[error("the box acknowledged record {acked}, only {sent} were sent")]
    AckedUnsent { acked: SourceSeq, sent: SourceSeq },
    #[error("the box says the stream goes on at record {next}, which no stream can reach")]
    BadResume { next: SourceSeq },
}

/// How the host's flushes are treated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GateState {
    /// They never wait.
    Async,
    /// Sync mode, before the first copy has ended: they do not wait yet.
    NotYet,
    /// They wait for the box.
    Sync,
    /// Sync mode after the bound was passed: they do not wait until the box has caught up.
    Degraded { since: MonoTime },
}

impl fmt::Display for GateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Async => "async",
            Self::NotYet => "sync once the first copy has ended",
            Self::Sync => "sync",
            Self::Degraded { .. } => "degraded to async",
        })
    }
}

/// What an operator should hear about.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Alarm {
    #[error("sync mode degraded to async: the host waited {waited_ms} ms for the box")]
    Degraded { waited_ms: u64 },
    #[error("the host waits for the box since {waited_ms} ms, as the policy says")]
    Holding { waited_ms: u64 },
    #[error(
        "the box lost records it had acknowledged as durable (up to {durable}, it goes on at {next}): everything is copied again"
    )]
    BoxLostDurable { durable: SourceSeq, next: SourceSeq },
    #[error("the box goes on at record {next}, this host would have sent {ours} next: everything is copied again")]
    BoxAhead { ours: SourceSeq, next: SourceSeq },
    #[error("the box knows nothing of this stream, of which it had acknowledged {durable}: everything is copied again")]
    BoxForgot { durable: SourceSeq },
    #[error("could not read volume {volume} at {extent:?} for copying")]
    ReadFailed { volume: VolumeId, extent: Extent },
    #[error(
        "a write reached past the end of volume {volume} as it was protected, at {extent:?}: the volume was resized"
    )]
    OutsideVolume { volume: VolumeId, extent: Extent },
    #[error("a write to volume {volume} was captured, which is not in the group")]
    UnknownVolume { volume: VolumeId },
    #[error("a captured write of {} bytes was not split: its place is copied", extent.bytes())]
    NotSplit { volume: VolumeId, extent: Extent },
    #[error("payloads from record {from} on were lost from the spool: their places are copied")]
    SpoolLost { from: SourceSeq },
    #[error("the box has not answered a comparison for {ms} ms: everything marked is sent without asking")]
    NotCompared { ms: u64 },
}
