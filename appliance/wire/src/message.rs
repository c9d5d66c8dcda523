//! Messages: everything that is not a record or an ack.
//!
//! Encoded with postcard. **Append variants, never reorder; never change a variant's fields**: an agent of last year talks to
//! the box of today. What is new is used only when the version that [`Message::HelloAck`] picked has it.
//!
//! | version | what it brought |
//! |---|---|
//! | 1 | everything but what follows |
//! | 2 | `Compare` and `Compared`, on stream connections; `ReadBack` and `ReadBackDone`, on the control connection |
//! | 3 | `Lease` to `HostOrder`, on the control connection |
//! | 4 | `Notices`, on the control connection |
//! | 5 | `RestoreDisks` to `RestoreEnded`, on the connection of a machine that waits for its disks ([`Purpose::Restore`]) |
//! | 6 | `ProbeKind::Https` in `HostPlan`; agents before it refuse every probe and the datagrams |

use crate::ack::Credit;
use crate::compare::{BlockHash, Comparison};
use crate::format::{MAX_MARK, PROTOCOL_VERSIONS};
use crate::frame::{FrameError, FrameHeader, FrameKind, PayloadError};
use crate::ownership::{HostOrder, HostPlan, LeaseAnswer, LeaseEnd, LeaseRequest, ProbeResult};
use crate::restore::{Look, RestoreDisk, RestoreId, RestoreProgress, TargetDisk};
use model::{
    BookmarkName, ByteLen, Consistency, Extent, GapReason, GroupId, GroupSpec, HostId, Mark, MonoTime, RecordKind,
    SourceSeq, StreamId, SyncMode, VolumeId, VolumeSpec,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Purpose {
    /// Status, commands, changes of what is protected. One for each agent.
    Control,
    /// Records of one group.
    Stream { group: GroupId },
    /// The one thing that needs no client certificate.
    Enrol,
    /// Version 5: a machine that waits for its disks' content. One for each agent.
    Restore,
}

/// Where the stream goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Resume {
    /// The box has everything before `next`; send from there.
    Continue { next: SourceSeq },
    /// The box knows nothing of this stream: it begins at 1 with `StreamBegin`, then a gap, then a copy.
    Restart,
}

/// Why something was refused; the text beside it is for people, this is for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefuseCode {
    /// No version in common.
    Version,
    /// Bytes that are not a frame, or a payload that does not match its header.
    BadFrame,
    /// A message or record that does not belong here now.
    OutOfPlace,
    /// More was sent than was granted.
    CreditOverrun,
    /// A record's number is not the one expected.
    Sequence,
    UnknownVolume,
    /// A record reaches past the end of its volume.
    BadExtent,
    UnknownHost,
    /// The host's certificate was taken back.
    Revoked,
    /// Not a token, used already, or too old; which of them is for the box's log only.
    BadToken,
    UnknownGroup,
    /// The group belongs to another host.
    NotYours,
    /// Another living agent with this identity is connected.
    Duplicate,
    NameTaken,
    /// A volume's size or identity is not what the box recorded.
    VolumeChanged,
    /// The group is stopped on the box; the text says why.
    Stopped,
    JournalFull,
    Busy,
    ShuttingDown,
    /// A fault of the box.
    Internal,
    BadRequest,
    /// Nothing was heard for too long.
    Silent,
}

impl fmt::Display for RefuseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "no version in common",
            Self::BadFrame => "bad frame",
            Self::OutOfPlace => "out of place",
            Self::CreditOverrun => "more sent than granted",
            Self::Sequence => "wrong number",
            Self::UnknownVolume => "unknown volume",
            Self::BadExtent => "past the end of the volume",
            Self::UnknownHost => "unknown host",
            Self::Revoked => "host revoked",
            Self::BadToken => "token not accepted",
            Self::UnknownGroup => "unknown group",
            Self::NotYours => "group of another host",
            Self::Duplicate => "identity in use",
            Self::NameTaken => "name taken",
            Self::VolumeChanged => "volume changed",
            Self::Stopped => "group stopped",
            Self::JournalFull => "journal full",
            Self::Busy => "busy",
            Self::ShuttingDown => "shutting down",
            Self::Internal => "internal fault",
            Self::BadRequest => "bad request",
            Self::Silent => "silent for too long",
        })
    }
}

/// A refusal with its reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Refusal {
    pub code: RefuseCode,
    pub text: String,
}

/// What the box asks of an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Place a bookmark after everything the host wrote before this command arrived.
    Bookmark {
        group: GroupId,
        name: BookmarkName,
        consistency: Consistency,
    },
    /// Copy everything again; older moments stay open.
    Resync {
        group: GroupId,
    },
    /// Keep capturing into spool and dirty map, send nothing.
    Pause {
        group: GroupId,
        reason: String,
    },
    Resume {
        group: GroupId,
    },
    /// The group's policy or name changed.
    Spec {
        spec: GroupSpec,
    },
    /// Stop protecting the group; capture is taken out of the host.
    Release {
        group: GroupId,
    },
}

/// How a command ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CommandResult {
    Done,
    /// The bookmark's mark has this number in the stream; it exists when that number is durable.
    Bookmarked {
        stream: StreamId,
        seq: SourceSeq,
    },
    Failed {
        text: String,
    },
}

/// A group as its agent sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")] // No tag: postcard cannot read one back.
pub enum GroupAgentState {
    /// No connection to the box; writes go to the spool or the dirty map.
    Disconnected,
    /// The stream connection is being set up.
    Opening,
    /// In a gap and copying.
    Syncing {
        reason: GapReason,
    },
    /// In a gap and only marking: no room to copy into yet.
    Marking {
        reason: GapReason,
    },
    Replicating,
    Paused,
    /// Capture does not work; the status text says why.
    Stopped,
}

/// One group in an [`AgentStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupAgentStatus {
    pub group: GroupId,
    pub state: GroupAgentState,
    /// For people: the reason behind the state, if there is more to say.
    pub text: String,
    /// Age of the oldest write that is not yet durable on the box; none when that is unknown.
    pub lag_ms: Option<u64>,
    pub spool_bytes: ByteLen,
    pub spool_bytes_max: ByteLen,
    /// Known to differ from the box and still to be copied.
    pub dirty_bytes: ByteLen,
    pub sync_done: ByteLen,
    pub sync_total: ByteLen,
    /// Highest number the box has durable.
    pub durable: SourceSeq,
    /// How the host's flushes are treated right now, e.g. "async", "sync", "degraded to async".
    pub gate: String,
    pub captured_bytes: ByteLen,
    pub captured_records: u64,
}

/// Sent by an agent every second on its control connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    pub agent_version: String,
    pub kernel: String,
    /// The capture backend in use.
    pub backend: String,
    pub uptime_s: u64,
    pub rss_bytes: ByteLen,
    pub mono_ns: u64,
    pub wall_us: u64,
    pub groups: Vec<GroupAgentStatus>,
}

/// Something about a host that its administrator should know, for as long as it lasts. As with messages: variants are appended, with a
/// version that has them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Notice {
    /// Commands that may have written went to a disk of the group past the block layer: nobody saw what. Over with the next resync.
    UnknownWrites { group: GroupId, commands: u64 },
    /// To spare the host, writes of the group are only marked, to be copied later.
    CaptureReduced { group: GroupId, why: String },
    /// So that the box can keep up, what other programs write is held back to so much per second each.
    HostThrottled { mib_s: u64, why: String },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Message {
    /// First on every connection. `instance` is drawn when the agent starts, `boot_id` when its kernel does: two living agents with
    /// one identity differ in them.
    Hello {
        versions: Vec<u16>,
        agent_version: String,
        host: HostId,
        boot_id: String,
        instance: [u8; 16],
        purpose: Purpose,
    },
    HelloAck {
        version: u16,
        box_name: String,
        box_version: String,
        now_wall_us: u64,
    },
    /// Ends the connection.
    Refuse(Refusal),
    Enrol {
        token: String,
        csr_der: Vec<u8>,
        host_name: String,
    },
    Enrolled {
        host: HostId,
        certificate_pem: String,
        ca_pem: String,
    },
    Protect {
        group_name: String,
        volumes: Vec<VolumeSpec>,
        mode: SyncMode,
    },
    Protected {
        spec: GroupSpec,
    },
    Unprotect {
        group: GroupId,
    },
    Unprotected {
        group: GroupId,
    },
    ListGroups,
    Groups(Vec<GroupSpec>),
    /// `first_seq`: the oldest record the source can still send. `next_seq`: the number its next new record will get, or none when
    /// it lost count (agent restart). `mono_ns` and `wall_us` are the source's clocks now: the base of history time.
    OpenStream {
        group: GroupId,
        stream: StreamId,
        first_seq: SourceSeq,
        next_seq: Option<SourceSeq>,
        volumes: Vec<VolumeSpec>,
        acked_durable: Option<SourceSeq>,
        mono_ns: u64,
        wall_us: u64,
    },
    StreamReady {
        resume: Resume,
        credit: Credit,
        spec: GroupSpec,
    },
    Command {
        id: u64,
        what: Command,
    },
    CommandDone {
        id: u64,
        result: CommandResult,
    },
    Status(AgentStatus),
    Heartbeat {
        number: u64,
        mono_ns: u64,
    },
    HeartbeatAck {
        number: u64,
    },
    /// Answers a request that cannot be fulfilled; the connection goes on.
    Declined(Refusal),
    /// A new certificate for the same host, answered by `Enrolled`.
    Renew {
        csr_der: Vec<u8>,
    },
    /// What the box holds of a volume now, written records included: the host's own disk has failed. At most
    /// [`READ_BACK_MAX`](crate::READ_BACK_MAX) bytes.
    ReadBack {
        id: u64,
        group: GroupId,
        volume: VolumeId,
        extent: Extent,
    },
    /// None: it cannot be read.
    ReadBackDone {
        id: u64,
        data: Option<Vec<u8>>,
    },
    /// Version 2, from an agent: which of these blocks differ from the newest state of the volume? Answered, in any order, once everything
    /// the box had taken in before is durable: what was found equal must not be lost by a power cut that the agent does not hear of.
    Compare(Comparison),
    /// A bit for each block; see [`differs`](crate::differs).
    Compared {
        id: u64,
        differ: Vec<u8>,
    },
    /// Version 3, from an agent: see `replication::ownership` for this and the next three.
    Lease(LeaseRequest),
    LeaseAnswer(LeaseAnswer),
    LeaseRevoke(LeaseEnd),
    LeaseReleased(LeaseEnd),
    /// Version 3, from the box: what to watch, to stop and to start. Answered by `HostPlanTaken`.
    HostPlan(HostPlan),
    /// `refused`: why the plan cannot be followed; the one before stays.
    HostPlanTaken {
        whose: HostId,
        version: u64,
        refused: Option<String>,
    },
    /// Version 3, from an agent: how a probe of the plan ended.
    Probe(ProbeResult),
    /// Version 3, from the box: a step of a planned move, on what the plan for `whose` lists. Answered by `CommandDone`.
    HostOrder {
        id: u64,
        whose: HostId,
        order: HostOrder,
    },
    /// Version 4, from an agent: all that holds now, whenever it changes and at the begin of a connection.
    Notices(Vec<Notice>),
    /// Version 5, from a restore target, like all that follow on its connection: see `replication::restore`. Its disks; sent first, and when
    /// they change.
    RestoreDisks(Vec<TargetDisk>),
    /// From the box: take hold of these disks. Answered by `RestoreOpened`.
    RestoreOpen {
        restore: RestoreId,
        disks: Vec<RestoreDisk>,
    },
    /// `credit`: what may be sent to begin with; acks raise it. `refused`: why none of the disks was taken.
    RestoreOpened {
        restore: RestoreId,
        refused: Option<String>,
        credit: Credit,
    },
    /// From the box: answered by `RestoreLooked`, in order.
    RestoreLook(Look),
    /// One hash for each block.
    RestoreLooked {
        id: u64,
        hashes: Vec<BlockHash>,
    },
    /// From the box: what does the disk hold there? At most [`READ_BACK_MAX`](crate::READ_BACK_MAX) bytes; answered by `RestoreFetched`.
    RestoreFetch {
        id: u64,
        disk: VolumeId,
        extent: Extent,
    },
    RestoreFetched {
        id: u64,
        data: Vec<u8>,
    },
    /// A disk does not do what was asked; the disks were let go. The connection goes on.
    RestoreFailed {
        restore: RestoreId,
        text: String,
    },
    /// From the box, for the operator at the target.
    RestoreProgress(RestoreProgress),
    /// From the box: make everything durable, let the disks go, and start the machine anew if so asked.
    RestoreEnd {
        restore: RestoreId,
        reboot: bool,
    },
    RestoreEnded {
        restore: RestoreId,
    },
}

impl Message {
    pub fn refuse(code: RefuseCode, text: impl Into<String>) -> Self {
        Self::Refuse(Refusal { code, text: text.into() })
    }
    pub fn decline(code: RefuseCode, text: impl Into<String>) -> Self {
        Self::Declined(Refusal { code, text: text.into() })
    }
    /// The variant's name, for logs: the content may hold a token.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::HelloAck { .. } => "HelloAck",
            Self::Refuse(_) => "Refuse",
            Self::Enrol { .. } => "Enrol",
            Self::Enrolled { .. } => "Enrolled",
            Self::Protect { .. } => "Protect",
            Self::Protected { .. } => "Protected",
            Self::Unprotect { .. } => "Unprotect",
            Self::Unprotected { .. } => "Unprotected",
            Self::ListGroups => "ListGroups",
            Self::Groups(_) => "Groups",
            Self::OpenStream { .. } => "OpenStream",
            Self::StreamReady { .. } => "StreamReady",
            Self::Command { .. } => "Command",
            Self::CommandDone { .. } => "CommandDone",
            Self::Status(_) => "Status",
            Self::Heartbeat { .. } => "Heartbeat",
            Self::HeartbeatAck { .. } => "HeartbeatAck",
            Self::Declined(_) => "Declined",
            Self::Renew { .. } => "Renew",
            Self::ReadBack { .. } => "ReadBack",
            Self::ReadBackDone { .. } => "ReadBackDone",
            Self::Compare(_) => "Compare",
            Self::Compared { .. } => "Compared",
            Self::Lease(_) => "Lease",
            Self::LeaseAnswer(_) => "LeaseAnswer",
            Self::LeaseRevoke(_) => "LeaseRevoke",
            Self::LeaseReleased(_) => "LeaseReleased",
            Self::HostPlan(_) => "HostPlan",
            Self::HostPlanTaken { .. } => "HostPlanTaken",
            Self::Probe(_) => "Probe",
            Self::HostOrder { .. } => "HostOrder",
            Self::Notices(_) => "Notices",
            Self::RestoreDisks(_) => "RestoreDisks",
            Self::RestoreOpen { .. } => "RestoreOpen",
            Self::RestoreOpened { .. } => "RestoreOpened",
            Self::RestoreLook(_) => "RestoreLook",
            Self::RestoreLooked { .. } => "RestoreLooked",
            Self::RestoreFetch { .. } => "RestoreFetch",
            Self::RestoreFetched { .. } => "RestoreFetched",
            Self::RestoreFailed { .. } => "RestoreFailed",
            Self::RestoreProgress(_) => "RestoreProgress",
            Self::RestoreEnd { .. } => "RestoreEnd",
            Self::RestoreEnded { .. } => "RestoreEnded",
        }
    }
    pub fn heartbeat(number: u64, now: MonoTime) -> Self {
        Self::Heartbeat { number, mono_ns: now.0 }
    }
}

/// A message or mark that could not be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("frame is a {found:?}, a {wanted} is expected")]
    WrongKind { wanted: &'static str, found: FrameKind },
    #[error("{what} is damaged")]
    Payload {
        what: &'static str,
        #[source]
        cause: PayloadError,
    },
    #[error("{what} cannot be understood")]
    Decode {
        what: &'static str,
        #[source]
        cause: postcard::Error,
    },
    #[error("{what} is followed by {bytes} bytes that do not belong to it")]
    Trailing { what: &'static str, bytes: usize },
    #[error("could not encode")]
    Encode(#[source] postcard::Error),
    #[error("would not be accepted as a frame")]
    Frame(#[source] FrameError),
}

fn decode<'a, T: Deserialize<'a>>(
    what: &'static str,
    header: &FrameHeader,
    payload: &'a [u8],
) -> Result<T, MessageError> {
    header.check_payload(payload).map_err(|cause| MessageError::Payload { what, cause })?;
    let (value, rest) = postcard::take_from_bytes(payload).map_err(|cause| MessageError::Decode { what, cause })?;
    if rest.is_empty() { Ok(value) } else { Err(MessageError::Trailing { what, bytes: rest.len() }) }
}

/// Reads a message frame's payload, checksum first.
pub fn decode_message(header: &FrameHeader, payload: &[u8]) -> Result<Message, MessageError> {
    match header.kind {
        FrameKind::Message => decode("message", header, payload),
        found => Err(MessageError::WrongKind { wanted: "message", found }),
    }
}

/// Reads a mark frame's payload, checksum first.
pub fn decode_mark(header: &FrameHeader, payload: &[u8]) -> Result<Mark, MessageError> {
    match header.kind {
        FrameKind::Record(RecordKind::Mark) if payload.len() <= MAX_MARK => decode("mark", header, payload),
        found => Err(MessageError::WrongKind { wanted: "mark", found }),
    }
}

/// The best version that both sides speak.
pub fn negotiate(theirs: &[u16]) -> Option<u16> {
    PROTOCOL_VERSIONS.iter().copied().find(|ours| theirs.contains(ours))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{HEADER_LEN, MAX_MESSAGE};
    use crate::frame::{crc32, decode_header, encode_header, encode_mark, encode_message};
    use crate::ownership::{
        Holding, LeaseRules, LeaseVerdict, PlanAddress, PlanBeat, PlanProbe, PlanService, ProbeEnd, ProbeKind,
    };
    use crate::test_rng::Rng;
    use model::{Codec, Extent, GroupPolicy, Sectors, Term, VolumeId, WriteFlags};

    fn spec() -> GroupSpec {
        let volume = VolumeSpec {
            id: VolumeId(0),
            name: "/dev/sdb".into(),
            sectors: Sectors(2048),
            identity: "serial:1".into(),
        };
        GroupSpec {
            id: GroupId([1; 16]),
            name: "db".into(),
            host: Some(HostId([2; 16])),
            volumes: vec![volume],
            policy: GroupPolicy::default(),
        }
    }

    /// One of each, in the order of the enum: the first payload byte is the variant's number for ever.
    fn all() -> Vec<Message> {
        let group = GroupId([1; 16]);
        let whose = HostId([2; 16]);
        let status = AgentStatus {
            agent_version: "0.1.0".into(),
            kernel: "6.1".into(),
            backend: "bpf".into(),
            uptime_s: 5,
            rss_bytes: ByteLen(1),
            mono_ns: 2,
            wall_us: 3,
            groups: vec![GroupAgentStatus {
                group,
                state: GroupAgentState::Syncing { reason: GapReason::Overflow },
                text: String::new(),
                lag_ms: Some(4),
                spool_bytes: ByteLen(1),
                spool_bytes_max: ByteLen(2),
                dirty_bytes: ByteLen(3),
                sync_done: ByteLen(4),
                sync_total: ByteLen(5),
                durable: SourceSeq(6),
                gate: "async".into(),
                captured_bytes: ByteLen(7),
                captured_records: 8,
            }],
        };
        vec![
            Message::Hello {
                versions: vec![1],
                agent_version: "0.1.0".into(),
                host: HostId([2; 16]),
                boot_id: "b".into(),
                instance: [3; 16],
                purpose: Purpose::Stream { group },
            },
            Message::HelloAck { version: 1, box_name: "box".into(), box_version: "0.1.0".into(), now_wall_us: 9 },
            Message::refuse(RefuseCode::Sequence, "x"),
            Message::Enrol { token: "t".into(), csr_der: vec![1, 2], host_name: "h".into() },
            Message::Enrolled { host: HostId([2; 16]), certificate_pem: "c".into(), ca_pem: "a".into() },
            Message::Protect {
                group_name: "db".into(),
                volumes: spec().volumes,
                mode: SyncMode::Sync { wait_ms_max: 5000, at_bound: model::Bound::Hold },
            },
            Message::Protected { spec: spec() },
            Message::Unprotect { group },
            Message::Unprotected { group },
            Message::ListGroups,
            Message::Groups(vec![spec()]),
            Message::OpenStream {
                group,
                stream: StreamId([4; 16]),
                first_seq: SourceSeq(1),
                next_seq: Some(SourceSeq(2)),
                volumes: vec![],
                acked_durable: None,
                mono_ns: 7,
                wall_us: 8,
            },
            Message::StreamReady {
                resume: Resume::Continue { next: SourceSeq(3) },
                credit: Credit { bytes: 1, records: 2 },
                spec: spec(),
            },
            Message::Command { id: 1, what: Command::Resync { group } },
            Message::CommandDone {
                id: 1,
                result: CommandResult::Bookmarked { stream: StreamId([4; 16]), seq: SourceSeq(5) },
            },
            Message::Status(status),
            Message::Heartbeat { number: 1, mono_ns: 2 },
            Message::HeartbeatAck { number: 1 },
            Message::decline(RefuseCode::NameTaken, "x"),
            Message::Renew { csr_der: vec![3] },
            Message::ReadBack { id: 9, group, volume: VolumeId(2), extent: Extent::new(8, 64) },
            Message::ReadBackDone { id: 9, data: Some(vec![7; 3]) },
            Message::Compare(Comparison {
                id: 1,
                volume: VolumeId(2),
                block_sectors: 128,
                runs: vec![Extent::new(256, 130)],
                hashes: vec![BlockHash([9; 16]), BlockHash([8; 16])],
            }),
            Message::Compared { id: 1, differ: vec![2] },
            Message::Lease(LeaseRequest { whose, term: Term(3), nonce: 4, holding: Holding::Serving }),
            Message::LeaseAnswer(LeaseAnswer {
                whose,
                term: Term(3),
                nonce: 4,
                verdict: LeaseVerdict::Granted(LeaseRules { lease_ms: 10_000, stop_ms: 3_000 }),
            }),
            Message::LeaseRevoke(LeaseEnd { whose, term: Term(3) }),
            Message::LeaseReleased(LeaseEnd { whose, term: Term(3) }),
            Message::HostPlan(HostPlan {
                whose,
                version: 1,
                addresses: vec![PlanAddress { address: "192.0.2.7/24".into(), device: "eth0".into() }],
                services: vec![PlanService::Unit("a.service".into())],
                probes: vec![PlanProbe {
                    name: "p".into(),
                    kind: ProbeKind::Tcp { address: "127.0.0.1:1".into() },
                    every_ms: 1000,
                    timeout_ms: 500,
                }],
                beat: Some(PlanBeat { port: 7440, period_ms: 1000, key: [5; 32] }),
            }),
            Message::HostPlanTaken { whose, version: 1, refused: None },
            Message::Probe(ProbeResult {
                whose,
                name: "p".into(),
                end: ProbeEnd::Fails { why: "x".into() },
                took_ms: 5,
                output: "o".into(),
            }),
            Message::HostOrder { id: 1, whose, order: HostOrder::StopServices },
            Message::Notices(vec![
                Notice::UnknownWrites { group: GroupId([5; 16]), commands: 7 },
                Notice::CaptureReduced { group: GroupId([5; 16]), why: "x".into() },
                Notice::HostThrottled { mib_s: 20, why: "y".into() },
            ]),
            Message::RestoreDisks(vec![TargetDisk {
                path: "/dev/sda".into(),
                bytes: ByteLen(512),
                model: "m".into(),
                serial: "s".into(),
                identity: "serial:s".into(),
                holds: Some("ext4".into()),
                in_use: None,
            }]),
            Message::RestoreOpen {
                restore: RestoreId(0x0102_0304),
                disks: vec![RestoreDisk { disk: VolumeId(3), path: "/dev/sda".into(), sectors: Sectors(2048) }],
            },
            Message::RestoreOpened {
                restore: RestoreId(1),
                refused: Some("x".into()),
                credit: Credit { bytes: 1, records: 2 },
            },
            Message::RestoreLook(Look {
                id: 1,
                disk: VolumeId(2),
                block_sectors: 128,
                runs: vec![Extent::new(256, 130)],
            }),
            Message::RestoreLooked { id: 1, hashes: vec![BlockHash([9; 16])] },
            Message::RestoreFetch { id: 1, disk: VolumeId(2), extent: Extent::new(8, 64) },
            Message::RestoreFetched { id: 1, data: vec![7; 3] },
            Message::RestoreFailed { restore: RestoreId(1), text: "x".into() },
            Message::RestoreProgress(RestoreProgress {
                doing: "d".into(),
                done_bytes: ByteLen(1),
                total_bytes: ByteLen(2),
                shipped_bytes: ByteLen(3),
            }),
            Message::RestoreEnd { restore: RestoreId(1), reboot: true },
            Message::RestoreEnded { restore: RestoreId(1) },
        ]
    }

    fn framed(message: &Message) -> (FrameHeader, Vec<u8>) {
        let mut out = Vec::new();
        encode_message(message, &mut out).unwrap();
        let bytes: &[u8; HEADER_LEN] = out[..HEADER_LEN].try_into().unwrap();
        (decode_header(bytes).unwrap(), out[HEADER_LEN..].to_vec())
    }

    #[test]
    fn every_message_reads_back_and_keeps_its_number() {
        for (number, message) in all().into_iter().enumerate() {
            let (header, payload) = framed(&message);
            assert_eq!(payload[0] as usize, number, "{}: a variant was moved", message.name());
            assert_eq!(decode_message(&header, &payload).unwrap(), message);
        }
    }

    #[test]
    fn golden_bytes_of_messages() {
        let hex = |message: &Message| framed(message).1.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let all = all();
        assert_eq!(
            hex(&all[0]),
            "00010105302e312e30020202020202020202020202020202020162030303030303030303030303030303030101010101010101010101010101010101"
        );
        assert_eq!(hex(&all[2]), "02040178");
        assert_eq!(hex(&all[5]), "050264620100082f6465762f73646280100873657269616c3a3101882701");
        assert_eq!(hex(&all[11]), "0b010101010101010101010101010101010404040404040404040404040404040401010200000708");
        assert_eq!(hex(&all[16]), "100102");
        assert_eq!(
            hex(&all[22]),
            concat!("1601028001018002820102", "09090909090909090909090909090909", "08080808080808080808080808080808")
        );
        assert_eq!(hex(&all[23]), "17010102");
        assert_eq!(hex(&all[24]), "1802020202020202020202020202020202030403");
        assert_eq!(hex(&all[25]), "1902020202020202020202020202020202030400904eb817");
        assert_eq!(hex(&all[27]), "1b0202020202020202020202020202020203");
        let five = "05".repeat(16);
        assert_eq!(hex(&all[32]), format!("200300{five}0701{five}017802140179"));
        assert_eq!(hex(&all[33]), "2101082f6465762f7364618004016d01730873657269616c3a730104657874340".to_owned() + "0");
        assert_eq!(hex(&all[34]), "2284868808010308".to_owned() + "2f6465762f7364618010");
        assert_eq!(hex(&all[35]), "230101017801".to_owned() + "02");
        assert_eq!(hex(&all[36]), "240102800101800282".to_owned() + "01");
        assert_eq!(hex(&all[37]), format!("250101{}", "09".repeat(16)));
        assert_eq!(hex(&all[38]), "2601020840");
        assert_eq!(hex(&all[42]), "2a0101");
    }

    #[test]
    fn a_mark_reads_back_and_nothing_else_passes_for_one() {
        let marks = [
            Mark::GapBegin { reason: GapReason::Overflow },
            Mark::Consistent,
            Mark::Watermark { stream: StreamId([1; 16]), seq: SourceSeq(u64::MAX), source_wall_us: u64::MAX },
            Mark::Bookmark { name: "字".repeat(128).parse().unwrap(), consistency: Consistency::Application },
            Mark::StreamBegin { stream: StreamId([1; 16]) },
        ];
        for mark in marks {
            let payload = encode_mark(&mark).unwrap();
            let header = FrameHeader {
                kind: FrameKind::Record(RecordKind::Mark),
                codec: Codec::Raw,
                flags: WriteFlags::NONE,
                volume: VolumeId(0),
                extent: Extent::default(),
                seq: SourceSeq(1),
                mono: MonoTime(0),
                wall_us: 0,
                payload_len: payload.len() as u32,
                payload_crc: crc32(&payload),
            };
            encode_header(&header).unwrap();
            assert_eq!(decode_mark(&header, &payload).unwrap(), mark);
            assert!(matches!(decode_message(&header, &payload), Err(MessageError::WrongKind { .. })));
            let longer = [payload.as_slice(), &[0]].concat();
            let header = FrameHeader { payload_len: longer.len() as u32, payload_crc: crc32(&longer), ..header };
            assert!(decode_mark(&header, &longer).is_err(), "{mark:?} with a byte too many");
        }
    }

    #[test]
    fn damaged_and_random_messages_are_refused_without_panic() {
        for seed in 1..3000 {
            let mut rng = Rng::new(seed);
            let (header, mut payload) = framed(&all()[rng.below(all().len() as u64) as usize]);
            if payload.len() > 1 && rng.below(2) == 0 {
                payload.truncate(rng.below(payload.len() as u64) as usize);
            }
            if !payload.is_empty() {
                let at = rng.below(payload.len() as u64) as usize;
                payload[at] ^= 1 << rng.below(8);
            }
            assert!(matches!(decode_message(&header, &payload), Err(MessageError::Payload { .. })), "seed {seed}");
            // With a right checksum: any answer but a panic, and what decodes is a message again.
            let header = FrameHeader { payload_len: payload.len() as u32, payload_crc: crc32(&payload), ..header };
            if let Ok(message) = decode_message(&header, &payload) {
                let (header, again) = framed(&message);
                assert_eq!(decode_message(&header, &again).unwrap(), message, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_message_too_long_is_refused_by_its_sender() {
        let message = Message::Renew { csr_der: vec![0; MAX_MESSAGE] };
        let error = encode_message(&message, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, MessageError::Frame(FrameError::TooLong { .. })), "{error}");
    }

    #[test]
    fn the_best_common_version_is_taken() {
        assert_eq!(negotiate(&[9, 1]), Some(1), "an agent of last year");
        assert_eq!(negotiate(&[7, 6, 5, 4, 3, 2, 1]), Some(6), "an agent of next year");
        assert_eq!(negotiate(&[5, 4, 3, 2, 1]), Some(5), "an agent that makes no probes by HTTPS");
        assert_eq!(negotiate(&[4, 3, 2, 1]), Some(4), "an agent that takes no restores");
        assert_eq!(negotiate(&[2, 1]), Some(2), "an agent that tells no notices");
        assert_eq!(negotiate(&[9]), None);
        assert_eq!(negotiate(&[]), None);
    }
}
