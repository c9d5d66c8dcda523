//! A stream connection: one group's records, from the socket to the journal thread.
//!
//! The task only cuts frames out of bytes and hands them on in batches; the journal thread judges and appends them and puts acks into
//! the outbox (see [`crate::vault`]).

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
    vault::{Command, Group, StreamOpening},
};
use bytes::BytesMut;
use model::{GroupId, MonoTime};
use replication::OpenFacts;
use std::{io, sync::Arc, time::Duration};
use tokio::time::timeout;
use wire::{FrameKind, HEADER_LEN, Message, Refusal, RefuseCode, decode_message};

/// Frames handed on at once: more would only make the journal thread answer later.
const BATCH_MAX: usize = 1024;
/// How long a group may take to answer an opening: its recovery may be running.
const ATTACH_LIMIT: Duration = Duration::from_secs(120);

pub async fn serve(
    links: &Arc<Links>,
    talk: &mut Talk<Tls>,
    agent: &Agent,
    session: &Session,
    purpose: GroupId,
) -> Result<(), LinkError> {
    let opened = tokio::select! {
        opened = open(links, talk, agent, purpose) => opened?,
        why = session.ended() => Err(why),
    };
    let (group, lane) = match opened {
        Ok(Some(opened)) => opened,
        Ok(None) => return Ok(()),
        Err(refusal) => {
            links.events.note(Event::StreamClosed, agent.subject(), &refusal);
            talk.refuse(refusal).await;
            return Ok(());
        }
    };
    // Whatever ends this future, the journal thread learns it.
    let attached = Attached { group: &group, link: lane.id };
    let mut records = Records { links, session, group: &group, lane: &lane };
    let input = std::mem::take(&mut talk.input);
    let mut stop = links.stop.clone();
    let ended = tokio::select! {
        ended = pump(&mut talk.stream, &lane.outbox, &mut records, BUDGET_BYTES, input) => ended,
        why = session.ended() => {
            links.events.note(Event::StreamClosed, agent.subject(), &why);
            talk.refuse(why).await;
            Ok(())
        }
        () = crate::raised(&mut stop) => {
            talk.refuse(refusal(RefuseCode::ShuttingDown, "the box is shutting down")).await;
            Ok(())
        }
    };
    drop(attached);
    if ended.is_ok() {
        // A refusal of the journal thread's may be the last that was said.
        let _ = timeout(super::REFUSE_LIMIT, linger(&mut talk.stream)).await;
    }
    ended
}

/// Hears `OpenStream` and attaches to the group. Ok(None): the peer left.
async fn open(
    links: &Arc<Links>,
    talk: &mut Talk<Tls>,
    agent: &Agent,
    purpose: GroupId,
) -> Result<Result<Option<(Arc<Group>, Arc<LinkLane>)>, Refusal>, LinkError> {
    let heard = timeout(links.handshake_limit, talk.hear()).await;
    let message = match heard.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
        None => return Ok(Ok(None)),
        Some(message) => message,
    };
    let Message::OpenStream { group, stream, first_seq, next_seq, volumes, acked_durable, mono_ns, wall_us: _ } =
        message
    else {
        let text = format!("a {} where OpenStream is expected", message.name());
        return Ok(Err(refusal(RefuseCode::OutOfPlace, text)));
    };
    if group != purpose {
        return Ok(Err(refusal(RefuseCode::BadRequest, "the stream is of another group than the connection")));
    }
    let Some(group) = links.vault.get(group) else {
        return Ok(Err(refusal(RefuseCode::UnknownGroup, "the box has no such group")));
    };
    if group.shared.host != Some(agent.host) {
        return Ok(Err(refusal(RefuseCode::NotYours, "the group belongs to another host")));
    }
    if group.shared.released.load(std::sync::atomic::Ordering::Relaxed) {
        return Ok(Err(refusal(RefuseCode::UnknownGroup, "the group is not protected any more; protect it again")));
    }
    let lane = Arc::new(LinkLane::new(agent.subject()));
    let opening = StreamOpening {
        facts: OpenFacts { stream, first_seq, next_seq, acked_durable },
        volumes,
        mono: MonoTime(mono_ns),
        silence_ms: links.silence_ms,
    };
    match timeout(ATTACH_LIMIT, group.attach(Arc::clone(&lane), opening)).await {
        Ok(Ok(())) => Ok(Ok(Some((group, lane)))),
        Ok(Err(refusal)) => Ok(Err(refusal)),
        Err(_) => {
            group.detach(lane.id);
            Ok(Err(refusal(RefuseCode::Busy, "the group is being opened")))
        }
    }
}

struct Attached<'a> {
    group: &'a Group,
    link: u64,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.group.detach(self.link);
    }
}

struct Records<'a> {
    links: &'a Links,
    session: &'a Session,
    group: &'a Group,
    lane: &'a Arc<LinkLane>,
}

impl Parser for Records<'_> {
    type Error = LinkError;

    fn parse(&mut self, input: &mut BytesMut, _: &mut Vec<u8>, room: usize) -> Result<Parsed, LinkError> {
        let (mut frames, mut cost) = (Vec::new(), 0);
        let mut failed = None;
        let parsed = loop {
            if cost >= room || frames.len() >= BATCH_MAX {
                break Parsed::NoRoom;
            }
            let (header, payload) = match take_frame(input) {
                Ok(Ok(frame)) => frame,
                Ok(Err(wanted)) => break Parsed::Wants(wanted),
                Err(e) => {
                    failed = Some(e.into());
                    break Parsed::NoRoom;
                }
            };
            cost += HEADER_LEN + payload.len();
            match header.kind {
                FrameKind::Message => match decode_message(&header, &payload) {
                    Ok(message) => frames.push(Inbound::Message(message)),
                    Err(e) => {
                        failed = Some(e.into());
                        break Parsed::NoRoom;
                    }
                },
                // An ack has no business here: the target says so.
                FrameKind::Record(_) | FrameKind::Ack => frames.push(Inbound::Record { header, payload }),
            }
        };
        if !frames.is_empty() {
            self.links.heard(self.session);
            self.lane.outbox.take_on(cost);
            let command = Command::Frames { link: Arc::clone(self.lane), frames, cost };
            if self.group.push(command).is_err() {
                return Err(io::Error::other("the group was closed").into());
            }
        }
        match failed {
            None => Ok(parsed),
            Some(e) => Err(e),
        }
    }
}
