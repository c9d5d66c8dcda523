//! A control connection: what the agent says of itself, what it wants protected, what the box asks of it.

use super::{
    Agent, Hello, Links, Tls, fencing,
    frames::{LinkError, Talk},
    refusal,
    sessions::Session,
};
use crate::{
    catalog::clean_name,
    events::Event,
    pki,
    vault::{Group, VOLUME_BYTES_MAX},
};
use model::{
    BookmarkName, ByteLen, Extent, GroupId, GroupPolicy, GroupSpec, HostId, RiskReason, SECTOR, SyncMode, VolumeId,
    VolumeSpec,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use wire::{AgentStatus, Command, CommandResult, Message, Notice, READ_BACK_MAX, Refusal, RefuseCode};

/// Commands waiting to be sent to one agent; the operator's clicks, not a data path.
const COMMANDS_QUEUED_MAX: usize = 32;
/// Each takes a thread and prepared segments of the box, and a connection of the host's: beside the control connection no more fit.
const GROUPS_PER_HOST_MAX: usize = super::SESSIONS_PER_HOST_MAX - 1;
/// Commands sent and not answered.
const COMMANDS_OPEN_MAX: usize = 64;
/// Three of each group at most, and one of the host.
const NOTICES_MAX: usize = 3 * GROUPS_PER_HOST_MAX + 1;
/// Of what an agent says in words.
const NOTICE_CHARS_MAX: usize = 300;
/// How long an agent may take; a file-system freeze is in it.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// What is known of a host beyond the catalogue.
#[derive(Clone, Debug, Default)]
pub struct HostLive {
    pub connected: bool,
    pub last_heard_us: Option<u64>,
    pub agent_version: Option<String>,
    pub status: Option<AgentStatus>,
    /// When the status came, by the box's clock.
    pub status_us: u64,
    /// What the agent said last that holds of the host; stays when it goes away.
    pub notices: Vec<Notice>,
}

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("the host's agent is not connected")]
    NotConnected,
    #[error("the agent is busy with other commands")]
    Busy,
    #[error("the agent did not answer within {} s", COMMAND_LIMIT.as_secs())]
    NoAnswer,
    #[error("the connection ended before the agent answered")]
    Disconnected,
    #[error("the agent could not do it: {0}")]
    Failed(String),
}

struct Order {
    what: Command,
    answer: oneshot::Sender<CommandResult>,
}

/// The hosts that have been heard since the daemon started.
#[derive(Default)]
pub struct Hosts {
    known: Mutex<BTreeMap<HostId, Known>>,
}

#[derive(Default)]
struct Known {
    live: HostLive,
    /// The connection it speaks on, newest last to have come.
    orders: Option<(u64, mpsc::Sender<Order>)>,
}

impl Hosts {
    pub fn live(&self, host: HostId) -> HostLive {
        crate::lock(&self.known).get(&host).map(|k| k.live.clone()).unwrap_or_default()
    }
    fn change(&self, host: HostId, change: impl FnOnce(&mut Known)) {
        change(crate::lock(&self.known).entry(host).or_default());
    }

    /// Asks a host's agent to do something and waits for what became of it.
    pub async fn command(&self, host: HostId, what: Command) -> Result<CommandResult, CommandError> {
        let orders = crate::lock(&self.known).get(&host).and_then(|k| k.orders.as_ref().map(|(_, o)| o.clone()));
        let orders = orders.ok_or(CommandError::NotConnected)?;
        let (answer, answered) = oneshot::channel();
        orders.try_send(Order { what, answer }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => CommandError::Busy,
            mpsc::error::TrySendError::Closed(_) => CommandError::NotConnected,
        })?;
        match timeout(COMMAND_LIMIT, answered).await {
            Err(_) => Err(CommandError::NoAnswer),
            Ok(Err(_)) => Err(CommandError::Disconnected),
            Ok(Ok(CommandResult::Failed { text })) => Err(CommandError::Failed(text)),
            Ok(Ok(result)) => Ok(result),
        }
    }
}

/// Marks the host as gone when the connection ends, however it ends.
struct Presence<'a> {
    links: &'a Links,
    agent: &'a Agent,
    number: u64,
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        let mut gone = false;
        self.links.hosts.change(self.agent.host, |known| {
            // A newer connection of the same host stays.
            if known.orders.as_ref().is_some_and(|(number, _)| *number == self.number) {
                known.orders = None;
                known.live.connected = false;
                gone = true;
            }
        });
        if gone {
            self.links.events.note(Event::HostDisconnected, self.agent.subject(), "control connection ended");
        }
    }
}

pub async fn serve(
    links: &Arc<Links>,
    talk: &mut Talk<Tls>,
    agent: &Agent,
    session: &Session,
    hello: &Hello,
) -> Result<(), LinkError> {
    let (sender, mut orders) = mpsc::channel(COMMANDS_QUEUED_MAX);
    let agent_version = &hello.agent_version;
    let number = session_number();
    let now_us = links.clock.wall_us();
    links.hosts.change(agent.host, |known| {
        known.orders = Some((number, sender));
        known.live.connected = true;
        known.live.last_heard_us = Some(now_us);
        known.live.agent_version = Some(clean_name(agent_version, "unknown"));
    });
    let _presence = Presence { links, agent, number };
    links.events.note(Event::HostConnected, agent.subject(), format!("agent {agent_version}"));
    let silence = Duration::from_millis(links.silence_ms);
    let mut deadline = Instant::now() + silence;
    let mut owner_says = fencing::connected(links, agent, hello.version).await;
    let mut open: BTreeMap<u64, oneshot::Sender<CommandResult>> = BTreeMap::new();
    let mut next_id = 1u64;
    let mut stop = links.stop.clone();
    loop {
        tokio::select! {
            heard = talk.hear() => {
                let Some(message) = heard? else { return Ok(()) };
                deadline = Instant::now() + silence;
                links.heard(session);
                let now_us = links.clock.wall_us();
                links.hosts.change(agent.host, |known| known.live.last_heard_us = Some(now_us));
                match answer(links, agent, message, &mut open).await {
                    Ok(None) => {}
                    Ok(Some(message)) => talk.say(&message).await?,
                    Err(refusal) => {
                        links.events.note(Event::FrameRefused, agent.subject(), &refusal);
                        talk.refuse(refusal).await;
                        return Ok(());
                    }
                }
            }
            Some(order) = orders.recv() => {
                open.retain(|_, answer| !answer.is_closed());
                if open.len() >= COMMANDS_OPEN_MAX {
                    let _ = order.answer.send(CommandResult::Failed { text: "too many commands are waiting".into() });
                    continue;
                }
                open.insert(next_id, order.answer);
                talk.say(&Message::Command { id: next_id, what: order.what }).await?;
                next_id += 1;
            }
            Some(message) = owner_says.recv() => talk.say(&message).await?,
            () = sleep_until(deadline) => {
                let text = format!("nothing was heard for {} ms", links.silence_ms);
                links.events.note(Event::HostSilent, agent.subject(), &text);
                talk.refuse(refusal(RefuseCode::Silent, text)).await;
                return Ok(());
            }
            why = session.ended() => {
                talk.refuse(why).await;
                return Ok(());
            }
            () = crate::raised(&mut stop) => {
                talk.refuse(refusal(RefuseCode::ShuttingDown, "the box is shutting down")).await;
                return Ok(());
            }
        }
    }
}

fn session_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Work that may wait for a disk, which no runtime worker may.
type Blocking = Box<dyn FnOnce(&Arc<Links>) -> Result<Message, Refusal> + Send>;

/// What the box says to a message. An error ends the connection.
async fn answer(
    links: &Arc<Links>,
    agent: &Agent,
    message: Message,
    open: &mut BTreeMap<u64, oneshot::Sender<CommandResult>>,
) -> Result<Option<Message>, Refusal> {
    let blocking = |work: Blocking| {
        let links = Arc::clone(links);
        async move {
            let done = tokio::task::spawn_blocking(move || work(&links)).await;
            let done = done.unwrap_or_else(|_| Err(refusal(RefuseCode::Internal, "it failed on the box")));
            Ok(Some(done.unwrap_or_else(Message::Declined)))
        }
    };
    match message {
        Message::Heartbeat { number, .. } => Ok(Some(Message::HeartbeatAck { number })),
        Message::HeartbeatAck { .. } => Ok(None),
        Message::Status(status) => {
            let now_us = links.clock.wall_us();
            links.hosts.change(agent.host, |known| {
                known.live.status = Some(status);
                known.live.status_us = now_us;
            });
            Ok(None)
        }
        Message::Notices(notices) => {
            heard_notices(links, agent, notices);
            Ok(None)
        }
        Message::CommandDone { id, result } => {
            // An answer to nothing is one that came after its asker had given up.
            if let Some(answer) = open.remove(&id) {
                let _ = answer.send(result);
            }
            Ok(None)
        }
        Message::ListGroups => {
            let of_host = |g: &Arc<Group>| g.shared.host == Some(agent.host) && !is_released(g);
            let specs = links.vault.groups().iter().filter(|g| of_host(g)).map(|g| g.shared.spec()).collect();
            Ok(Some(Message::Groups(specs)))
        }
        Message::Protect { group_name, volumes, mode } => {
            let host = agent.host;
            // `replace_spec` asks the journal thread and waits: it runs here, the rest may block.
            match plan_protection(links, host, &group_name, &volumes, mode) {
                Err(refusal) => Ok(Some(Message::Declined(refusal))),
                Ok(Protection::New(spec)) => {
                    blocking(Box::new(move |links| match links.vault.create(spec) {
                        Ok(group) => Ok(Message::Protected { spec: group.shared.spec() }),
                        Err(e) => Err(refusal(RefuseCode::Internal, crate::chain(&e))),
                    }))
                    .await
                }
                Ok(Protection::Again { group, spec }) => {
                    if spec != group.shared.spec()
                        && let Err(e) = group.replace_spec(spec.clone()).await
                    {
                        return Ok(Some(Message::decline(RefuseCode::Internal, crate::chain(&e))));
                    }
                    blocking(Box::new(move |links| match links.vault.set_released(&group, false) {
                        Ok(()) => Ok(Message::Protected { spec }),
                        Err(e) => Err(refusal(RefuseCode::Internal, crate::chain(&e))),
                    }))
                    .await
                }
            }
        }
        Message::Unprotect { group } => {
            let Some(found) = links.vault.get(group).filter(|g| g.shared.host == Some(agent.host)) else {
                return Ok(Some(Message::decline(RefuseCode::UnknownGroup, "the box has no such group of this host")));
            };
            let host = agent.host;
            blocking(Box::new(move |links| match links.vault.set_released(&found, true) {
                Ok(()) => {
                    let why = refusal(RefuseCode::UnknownGroup, "the group is not protected any more");
                    links.sessions.cut_stream(host, group, &why);
                    Ok(Message::Unprotected { group })
                }
                Err(e) => Err(refusal(RefuseCode::Internal, crate::chain(&e))),
            }))
            .await
        }
        Message::Renew { csr_der } => {
            let (host, subject) = (agent.host, agent.subject());
            blocking(Box::new(move |links| renew(links, host, &subject, &csr_der))).await
        }
        Message::ReadBack { id, group, volume, extent } => {
            let found = links.vault.get(group).filter(|g| g.shared.host == Some(agent.host));
            blocking(Box::new(move |_| {
                let data = found.and_then(|group| read_back(&group, volume, extent));
                Ok(Message::ReadBackDone { id, data })
            }))
            .await
        }
        Message::Lease(_) | Message::LeaseReleased(_) | Message::HostPlanTaken { .. } | Message::Probe(_) => {
            fencing::heard(links, agent, message).await
        }
        other => Err(refusal(RefuseCode::OutOfPlace, format!("a {} on a control connection", other.name()))),
    }
}

/// Keeps what an agent says of its host; what is new and what is over becomes an event.
fn heard_notices(links: &Links, agent: &Agent, mut notices: Vec<Notice>) {
    notices.truncate(NOTICES_MAX);
    for notice in &mut notices {
        if let Notice::CaptureReduced { why, .. } | Notice::HostThrottled { why, .. } = notice {
            *why = why.chars().filter(|c| !c.is_control()).take(NOTICE_CHARS_MAX).collect();
        }
    }
    let mut before = Vec::new();
    links.hosts.change(agent.host, |known| {
        before = std::mem::replace(&mut known.live.notices, notices.clone());
    });
    let what = |n: &Notice| match n {
        Notice::UnknownWrites { group, .. } => (Event::UnknownWrite, Some(*group)),
        Notice::CaptureReduced { group, .. } => (Event::CaptureReduced, Some(*group)),
        Notice::HostThrottled { .. } => (Event::HostThrottled, None),
    };
    let subject = |group: Option<GroupId>| {
        let found = group.and_then(|id| links.vault.get(id)).filter(|g| g.shared.host == Some(agent.host));
        found.map_or_else(|| agent.subject(), |g| g.name().to_owned())
    };
    for notice in notices.iter().filter(|n| !before.iter().any(|b| what(b) == what(n))) {
        let (event, group) = what(notice);
        links.events.note(event, subject(group), risk_of(notice));
    }
    for notice in before.iter().filter(|b| !notices.iter().any(|n| what(b) == what(n))) {
        let (event, group) = what(notice);
        links.events.note(Event::HostNoticeOver, subject(group), event.name());
    }
}

/// What a notice means for the host's groups.
pub fn risk_of(notice: &Notice) -> RiskReason {
    match notice {
        Notice::UnknownWrites { commands, .. } => RiskReason::UnknownWrites { commands: *commands },
        Notice::CaptureReduced { why, .. } => RiskReason::CaptureReduced { why: why.clone() },
        Notice::HostThrottled { mib_s, why } => RiskReason::HostThrottled { mib_s: *mib_s, why: why.clone() },
    }
}

fn is_released(group: &Group) -> bool {
    group.shared.released.load(std::sync::atomic::Ordering::Relaxed)
}

/// What the group's volume holds now, for a host whose own disk has failed.
fn read_back(group: &Group, volume: VolumeId, extent: Extent) -> Option<Vec<u8>> {
    let len = usize::try_from(extent.bytes()).ok().filter(|len| *len <= READ_BACK_MAX)?;
    let mut data = vec![0; len];
    let read = group.reader().map_err(|e| crate::chain(&e)).and_then(|reader| {
        let offset = extent.start().checked_mul(SECTOR).ok_or_else(|| "beyond every volume".to_owned())?;
        reader.head_view().read(volume, offset, &mut data).map_err(|e| crate::chain(&e))
    });
    match read {
        Ok(()) => Some(data),
        Err(why) => {
            tracing::warn!(group = group.name(), %why, "could not read back what a host asked for");
            None
        }
    }
}

fn renew(links: &Links, host: HostId, subject: &str, csr_der: &[u8]) -> Result<Message, Refusal> {
    let issued = links.pki.sign_host(csr_der, host, links.clock.wall_us());
    let issued = issued.map_err(|e| refusal(RefuseCode::BadRequest, crate::chain(&e)))?;
    let kept = links.catalog.change(|data| data.add_serial(host, issued.serial.clone()));
    kept.map_err(|e| refusal(RefuseCode::Internal, crate::chain(&e)))?;
    links.events.note(Event::HostRenewed, subject, &issued.serial);
    Ok(Message::Enrolled { host, certificate_pem: issued.certificate_pem, ca_pem: links.pki.ca_pem().to_owned() })
}

enum Protection {
    New(GroupSpec),
    /// The host had it before; the same disks, perhaps more.
    Again {
        group: Arc<Group>,
        spec: GroupSpec,
    },
}

/// Decides what a wish to protect means. Volumes keep their numbers by identity; the box gives the numbers of new ones.
fn plan_protection(
    links: &Links,
    host: HostId,
    group_name: &str,
    volumes: &[VolumeSpec],
    mode: SyncMode,
) -> Result<Protection, Refusal> {
    let name = group_name.parse::<BookmarkName>().map_err(|_| {
        refusal(RefuseCode::BadRequest, "a group's name has 1 to 128 characters, none of them a control character")
    })?;
    if volumes.is_empty() {
        return Err(refusal(RefuseCode::BadRequest, "a group needs at least one volume"));
    }
    for (i, volume) in volumes.iter().enumerate() {
        if volume.sectors.0 == 0 {
            return Err(refusal(RefuseCode::BadRequest, format!("{} has no size", volume.name)));
        }
        if volume.sectors.0 > VOLUME_BYTES_MAX / SECTOR {
            let text = format!("{} is larger than {}", volume.name, ByteLen(VOLUME_BYTES_MAX));
            return Err(refusal(RefuseCode::BadRequest, text));
        }
        let same = |other: &VolumeSpec| other.identity == volume.identity;
        if volumes[..i].iter().any(same) {
            return Err(refusal(RefuseCode::BadRequest, format!("{} is named twice", volume.name)));
        }
    }
    let Some(group) = links.vault.find(name.as_str()) else {
        let of_host = links.vault.groups().iter().filter(|g| g.shared.host == Some(host)).count();
        if of_host >= GROUPS_PER_HOST_MAX {
            let text = format!(
                "the box has {of_host} groups of this host, which is the limit: delete some, or protect more disks in one"
            );
            return Err(refusal(RefuseCode::Busy, text));
        }
        let id = pki::random_128().ok_or_else(|| refusal(RefuseCode::Internal, "no random bytes"))?;
        let policy = GroupPolicy { mode, ..GroupPolicy::default() };
        let volumes = number(&[], volumes);
        return Ok(Protection::New(GroupSpec {
            id: GroupId(id),
            name: name.into(),
            host: Some(host),
            volumes,
            policy,
        }));
    };
    if group.shared.host != Some(host) {
        return Err(refusal(RefuseCode::NameTaken, "the box has a group of this name already; choose another one"));
    }
    group.reader().map_err(|e| refusal(RefuseCode::Stopped, e.to_string()))?;
    let have = group.shared.spec();
    if let Some(missing) = have.volumes.iter().find(|h| volumes.iter().all(|v| v.identity != h.identity)) {
        let text =
            format!("the group also protects {}: name all its disks, or give the group another name", missing.name);
        return Err(refusal(RefuseCode::VolumeChanged, text));
    }
    if let Some(changed) =
        have.volumes.iter().find(|h| volumes.iter().any(|v| v.identity == h.identity && v.sectors < h.sectors))
    {
        return Err(refusal(RefuseCode::VolumeChanged, format!("{} is smaller than it was", changed.name)));
    }
    let volumes = number(&have.volumes, volumes);
    // The policy is the operator's by now: a host that protects again changes of it only what it asks for by name.
    let mode = if mode == SyncMode::Async { have.policy.mode } else { mode };
    let spec = GroupSpec { volumes, policy: GroupPolicy { mode, ..have.policy.clone() }, ..have };
    Ok(Protection::Again { group, spec })
}

/// Gives volumes their numbers: those known by identity keep theirs, new ones get the next.
fn number(have: &[VolumeSpec], wanted: &[VolumeSpec]) -> Vec<VolumeSpec> {
    let mut next = have.iter().map(|v| v.id.0 + 1).max().unwrap_or(0);
    let mut volumes: Vec<VolumeSpec> = wanted
        .iter()
        .map(|volume| {
            let id = have.iter().find(|h| h.identity == volume.identity).map_or_else(
                || {
                    next += 1;
                    VolumeId(next - 1)
                },
                |h| h.id,
            );
            VolumeSpec { id, ..volume.clone() }
        })
        .collect();
    volumes.sort_by_key(|v| v.id);
    volumes
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Sectors;

    fn volume(id: u32, identity: &str) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(id),
            name: format!("/dev/{identity}"),
            sectors: Sectors(8),
            identity: identity.into(),
        }
    }

    #[test]
    fn volumes_keep_their_numbers() {
        let first = number(&[], &[volume(7, "a"), volume(9, "b")]);
        assert_eq!(first.iter().map(|v| (v.id.0, &*v.identity)).collect::<Vec<_>>(), [(0, "a"), (1, "b")]);
        let more = number(&first, &[volume(0, "c"), volume(1, "b"), volume(2, "a")]);
        assert_eq!(more.iter().map(|v| (v.id.0, &*v.identity)).collect::<Vec<_>>(), [(0, "a"), (1, "b"), (2, "c")]);
    }
}
