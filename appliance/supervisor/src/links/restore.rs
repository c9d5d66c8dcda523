//! The connection of a machine that waits for its disks' content, and the list of those machines.
//!
//! The task cuts frames out of bytes and hands them to the restore that has the machine, which answers into the outbox; disks and
//! heartbeats it takes itself. A machine that no restore wants waits.

use super::{
    Agent, Links, Tls,
    frames::{LinkError, Talk, linger, take_frame},
    lane::{BUDGET_BYTES, Inbound, LinkLane},
    refusal,
    sessions::Session,
};
use crate::{
    events::Event,
    pump::{Parsed, Parser, pump},
    vault::inbox::Inbox,
};
use bytes::BytesMut;
use model::HostId;
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};
use tokio::time::timeout;
use wire::{FrameKind, HEADER_LEN, Message, RefuseCode, TARGET_DISKS_MAX, TARGET_TEXT_MAX, TargetDisk, decode_message};

/// How often it is looked whether the machine is still heard.
const LISTEN_EVERY: Duration = Duration::from_millis(500);

/// A machine that is connected.
#[derive(Clone)]
pub struct TargetInfo {
    pub host: HostId,
    pub name: String,
    pub address: String,
    pub since_us: u64,
    /// Drawn when its agent started: another one may have lost what was not flushed.
    pub instance: [u8; 16],
    pub disks: Vec<TargetDisk>,
    pub lane: Arc<LinkLane>,
}

/// What a restore hears of its machine.
pub enum FromTarget {
    Up(Box<TargetInfo>),
    Frame { lane: u64, inbound: Inbound, cost: usize },
    Down { lane: u64 },
}

/// Takes what machines say; false when it wants no more.
pub type Follower = Arc<Inbox<FromTarget>>;

/// All machines that wait, and who has which.
#[derive(Default)]
pub struct Targets {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<HostId, TargetInfo>,
    followers: BTreeMap<HostId, Follower>,
}

impl Targets {
    pub fn list(&self) -> Vec<TargetInfo> {
        crate::lock(&self.state).known.values().cloned().collect()
    }
    pub fn get(&self, host: HostId) -> Option<TargetInfo> {
        crate::lock(&self.state).known.get(&host).cloned()
    }
    /// Gives a machine to a restore; if it is there, the restore hears so at once.
    pub fn follow(&self, host: HostId, follower: &Follower) {
        let mut state = crate::lock(&self.state);
        state.followers.insert(host, Arc::clone(follower));
        if let Some(info) = state.known.get(&host) {
            let _ = follower.push(FromTarget::Up(Box::new(info.clone())));
        }
    }
    pub fn is_followed(&self, host: HostId) -> bool {
        crate::lock(&self.state).followers.contains_key(&host)
    }
    pub fn leave(&self, host: HostId, follower: &Follower) {
        let mut state = crate::lock(&self.state);
        if state.followers.get(&host).is_some_and(|f| Arc::ptr_eq(f, follower)) {
            state.followers.remove(&host);
        }
    }
    fn come(&self, info: TargetInfo) {
        let mut state = crate::lock(&self.state);
        let known = state.known.get(&info.host).is_some_and(|old| old.lane.id == info.lane.id);
        if !known && let Some(follower) = state.followers.get(&info.host) {
            let _ = follower.push(FromTarget::Up(Box::new(info.clone())));
        }
        state.known.insert(info.host, info);
    }
    fn go(&self, host: HostId, lane: u64) {
        let mut state = crate::lock(&self.state);
        if state.known.get(&host).is_some_and(|info| info.lane.id == lane) {
            state.known.remove(&host);
        }
        if let Some(follower) = state.followers.get(&host) {
            let _ = follower.push(FromTarget::Down { lane });
        }
    }
    /// False: nobody has the machine, so nothing was asked of it.
    fn hand_on(&self, host: HostId, lane: u64, inbound: Inbound, cost: usize) -> bool {
        let state = crate::lock(&self.state);
        let follower = state.followers.get(&host);
        follower.is_some_and(|f| f.push(FromTarget::Frame { lane, inbound, cost }).is_ok())
    }
}

pub async fn serve(
    links: &Arc<Links>,
    talk: &mut Talk<Tls>,
    agent: &Agent,
    session: &Session,
    instance: [u8; 16],
) -> Result<(), LinkError> {
    let lane = Arc::new(LinkLane::new(agent.subject()));
    let info = TargetInfo {
        host: agent.host,
        name: agent.name.clone(),
        address: agent.from.ip().to_string(),
        since_us: links.clock.wall_us(),
        instance,
        disks: Vec::new(),
        lane: Arc::clone(&lane),
    };
    // Whatever ends this future, its restore learns it.
    let _here = Here { links, host: agent.host, lane: lane.id };
    links.events.note(Event::TargetConnected, agent.subject(), "waits as a restore target");
    let mut frames = Frames { links, session, agent, info, lane: &lane };
    let input = std::mem::take(&mut talk.input);
    let mut stop = links.stop.clone();
    let ended = tokio::select! {
        ended = pump(&mut talk.stream, &lane.outbox, &mut frames, BUDGET_BYTES, input) => ended,
        why = session.ended() => {
            talk.refuse(why).await;
            Ok(())
        }
        () = silent(links, session) => {
            let text = format!("nothing was heard for {} ms", links.silence_ms);
            links.events.note(Event::HostSilent, agent.subject(), &text);
            talk.refuse(refusal(RefuseCode::Silent, text)).await;
            Ok(())
        }
        () = crate::raised(&mut stop) => {
            talk.refuse(refusal(RefuseCode::ShuttingDown, "the box is shutting down")).await;
            Ok(())
        }
    };
    if ended.is_ok() {
        let _ = timeout(super::REFUSE_LIMIT, linger(&mut talk.stream)).await;
    }
    ended
}

/// Ends when the machine has not been heard for too long.
async fn silent(links: &Links, session: &Session) {
    loop {
        tokio::time::sleep(LISTEN_EVERY).await;
        let heard = model::MonoTime(session.heard.load(Ordering::Relaxed));
        if links.clock.mono().ms_since(heard) >= links.silence_ms {
            return;
        }
    }
}

struct Here<'a> {
    links: &'a Links,
    host: HostId,
    lane: u64,
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.links.targets.go(self.host, self.lane);
        self.links.events.note(Event::TargetGone, self.host, "the restore target's connection ended");
    }
}

struct Frames<'a> {
    links: &'a Links,
    session: &'a Session,
    agent: &'a Agent,
    info: TargetInfo,
    lane: &'a Arc<LinkLane>,
}

impl Frames<'_> {
    /// False: the message has no business here.
    fn message(&mut self, message: Message, out: &mut Vec<u8>, cost: usize) -> Result<bool, LinkError> {
        match message {
            Message::Heartbeat { number, .. } => {
                wire::encode_message(&Message::HeartbeatAck { number }, out)?;
                Ok(true)
            }
            Message::HeartbeatAck { .. } => Ok(true),
            Message::RestoreDisks(mut disks) => {
                disks.truncate(TARGET_DISKS_MAX);
                disks.iter_mut().for_each(clean);
                self.info.disks = disks;
                self.links.targets.come(self.info.clone());
                Ok(true)
            }
            Message::RestoreOpened { .. }
            | Message::RestoreLooked { .. }
            | Message::RestoreFetched { .. }
            | Message::RestoreFailed { .. }
            | Message::RestoreEnded { .. } => Ok(self.hand_on(Inbound::Message(message), cost)),
            _ => Ok(false),
        }
    }
    fn hand_on(&self, inbound: Inbound, cost: usize) -> bool {
        self.lane.outbox.take_on(cost);
        // What comes after a restore has let go answers nothing any more.
        if !self.links.targets.hand_on(self.agent.host, self.lane.id, inbound, cost) {
            self.lane.outbox.put(cost, |_| {});
        }
        true
    }
}

/// Texts from a machine: no control characters, not too long.
fn clean(disk: &mut TargetDisk) {
    let TargetDisk { path, bytes: _, model, serial, identity, holds, in_use } = disk;
    let texts = [path, model, serial, identity].into_iter().chain(holds.as_mut()).chain(in_use.as_mut());
    for text in texts {
        *text = text.chars().filter(|c| !c.is_control()).take(TARGET_TEXT_MAX).collect();
    }
}

impl Parser for Frames<'_> {
    type Error = LinkError;

    fn parse(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, room: usize) -> Result<Parsed, LinkError> {
        let mut cost = 0;
        loop {
            if cost >= room {
                return Ok(Parsed::NoRoom);
            }
            let (header, payload) = match take_frame(input)? {
                Ok(frame) => frame,
                Err(wanted) => return Ok(Parsed::Wants(wanted)),
            };
            self.links.heard(self.session);
            let size = HEADER_LEN + payload.len();
            cost += size;
            match header.kind {
                FrameKind::Message => {
                    let message = decode_message(&header, &payload)?;
                    let name = message.name();
                    if !self.message(message, out, size)? {
                        return Err(io::Error::other(format!("a {name} from a restore target")).into());
                    }
                }
                FrameKind::Ack => {
                    self.hand_on(Inbound::Record { header, payload }, size);
                }
                kind @ FrameKind::Record(_) => return Err(LinkError::NotAMessage(kind)),
            }
        }
    }
}
