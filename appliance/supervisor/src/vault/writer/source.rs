//! The agent's stream: frames to the target machine, what it says to the journal, acks back.

use super::{Attached, Held, Refused, Step, Waiter, Who, Work, Writer};
use crate::{
    events::Event,
    links::lane::{Inbound, LinkLane},
    vault::{LinkInfo, StreamOpening},
};
use journal::NewRecord;
use model::{HistoryTime, Mark, SourceSeq};
use replication::{Had, Target, TargetAction, TargetConfig, TargetEvent, TargetState};
use std::sync::Arc;
use wire::{FrameHeader, Message, Refusal, RefuseCode, Resume};

impl Writer<'_> {
    pub(super) fn is_current(&self, link: &LinkLane) -> bool {
        self.link.as_ref().is_some_and(|l| l.lane.id == link.id)
    }

    pub(super) fn attach(&mut self, lane: Arc<LinkLane>, open: &StreamOpening) -> Result<(), Refusal> {
        let spec = self.journal.spec().clone();
        if let Some(text) = volumes_differ(&spec.volumes, &open.volumes) {
            return Err(Refusal { code: RefuseCode::VolumeChanged, text });
        }
        // What the connection before had sent and was not appended is dropped; its source sends it again.
        self.drop_link();
        // The resume point is then all durable, and the first ack tells the source so.
        self.settle();
        if let Some(reason) = &self.failed {
            return Err(Refusal { code: RefuseCode::Stopped, text: reason.clone() });
        }
        let position = self.journal.source_position();
        let resume = replication::resume(position.map(|p| (p.stream, p.appended)), &open.facts);
        let config = TargetConfig {
            in_gap: self.journal.in_gap().map(|(_, reason)| reason),
            silence_ms: open.silence_ms,
            last_time: self.journal.last_time(),
            had: position.map(|p| Had { durable: p.durable, appended_lsn: self.journal.progress().appended }),
            ..TargetConfig::new(spec.id, open.facts.stream, spec.volumes.clone(), resume)
        };
        let clock = &self.context.clock;
        let (target, ready) = Target::open(config, spec, open.mono, clock.history(), clock.mono());
        lane.say(&ready);
        let text = match resume {
            Resume::Continue { next } => format!("stream {} goes on at {next}", open.facts.stream),
            Resume::Restart => format!("stream {} begins", open.facts.stream),
        };
        self.context.events.note(Event::StreamOpened, &self.shared.name, text);
        let link = LinkInfo { id: lane.id, since_us: clock.wall_us() };
        self.shared.change_live(|live| live.link = Some(link));
        self.touch(&lane.outbox);
        self.link = Some(Attached { lane, stream: open.facts.stream, target });
        if self.full {
            self.target_event(TargetEvent::Room(false), None);
        }
        Ok(())
    }

    pub(super) fn drop_link(&mut self) {
        let Some(link) = self.link.take() else { return };
        link.lane.outbox.close();
        let now = self.context.clock.wall_us();
        self.shared.change_live(|live| (live.link, live.link_lost_us) = (None, Some(now)));
        self.context.events.note(Event::StreamClosed, &self.shared.name, &link.lane.peer);
        self.compares.clear();
        let before = self.pending.len();
        self.pending.retain(|work| !matches!(work, Work::Record { .. } | Work::SourceMark { .. }));
        if self.pending.len() != before {
            self.held = None;
        }
    }

    pub(super) fn frame(&mut self, link: &Arc<LinkLane>, frame: Inbound) {
        match frame {
            Inbound::Message(message) => self.target_event(TargetEvent::Message(&message), None),
            Inbound::Record { header, payload } => {
                let event = TargetEvent::Frame { header: &header, payload: &payload };
                let work = |time| Work::Record { link: Arc::clone(link), header, payload: payload.clone(), time };
                self.target_event(event, Some(&work));
            }
        }
    }

    /// Hands on the comparisons before which everything is durable.
    pub(super) fn begin_compares(&mut self) {
        let durable = self.journal.progress().durable;
        while let Some(link) = &self.link
            && self.compares.front().is_some_and(|(lsn, _)| *lsn <= durable)
            && let Some((_, ask)) = self.compares.pop_front()
        {
            self.context.compares.push(link.lane.id, ask, self.reader.clone(), self.inbox);
        }
    }

    /// Lets the target see an event and does what it says. Appends go to the front of the queue.
    pub(super) fn target_event(&mut self, event: TargetEvent<'_>, append: Option<&dyn Fn(HistoryTime) -> Work>) {
        let Some(link) = &mut self.link else { return };
        let (now, wall) = (self.context.clock.mono(), self.context.clock.history());
        let mut actions = std::mem::take(&mut self.actions);
        link.target.on(event, now, wall, &mut actions);
        let lane = Arc::clone(&link.lane);
        for action in actions.drain(..) {
            match action {
                TargetAction::Append { time } => {
                    if let Some(work) = append {
                        self.pending.push_front(work(time));
                    }
                }
                TargetAction::AppendMark { mark, time, seq } => {
                    self.pending.push_front(Work::SourceMark { link: Arc::clone(&lane), mark, time, seq });
                }
                TargetAction::Compare(ask) => {
                    self.compares.push_back((self.journal.progress().appended, ask));
                    self.begin_compares();
                }
                TargetAction::SendAck(ack) => {
                    lane.outbox.put(0, |out| ack.encode(out));
                    self.touch(&lane.outbox);
                }
                TargetAction::Send(message) => {
                    lane.say(&message);
                    self.touch(&lane.outbox);
                }
                TargetAction::Refuse(refusal) => {
                    let event =
                        if refusal.code == RefuseCode::Silent { Event::HostSilent } else { Event::FrameRefused };
                    self.context.events.note(event, &lane.peer, &refusal);
                    lane.say(&Message::Refuse(refusal));
                    self.drop_link();
                }
                TargetAction::Proven { until, .. } => {
                    self.shared.change_live(|live| live.proven = live.proven.max(Some(until)));
                }
                TargetAction::State(state) => {
                    if state != TargetState::Refused {
                        tracing::debug!(group = %self.shared.name, ?state, "stream");
                    }
                }
            }
        }
        self.actions = actions;
    }

    pub(super) fn record(
        &mut self,
        link: Arc<LinkLane>,
        header: FrameHeader,
        payload: bytes::Bytes,
        time: HistoryTime,
    ) -> Step {
        let wire::FrameKind::Record(kind) = header.kind else { return Step::Done };
        let Some(stream) = self.link.as_ref().filter(|l| l.lane.id == link.id).map(|l| l.stream) else {
            return Step::Done;
        };
        let record = NewRecord {
            kind,
            flags: header.flags,
            volume: header.volume,
            extent: header.extent,
            codec: header.codec,
            payload: &payload,
            payload_crc: Some(header.payload_crc),
            time,
            source_wall_us: header.wall_us,
            stream,
            seq: header.seq,
        };
        match self.append(&record) {
            Ok(lsn) => {
                self.waiters.push_back(Waiter { lsn, who: Who::Source });
                self.target_event(TargetEvent::Appended { seq: header.seq, lsn }, None);
                Step::Done
            }
            Err(refused) => {
                self.source_refused(&link, refused, Work::Record { link: Arc::clone(&link), header, payload, time })
            }
        }
    }

    pub(super) fn source_mark(&mut self, link: Arc<LinkLane>, mark: Mark, time: HistoryTime, seq: SourceSeq) -> Step {
        let Some(stream) = self.link.as_ref().filter(|l| l.lane.id == link.id).map(|l| l.stream) else {
            return Step::Done;
        };
        match self.append_mark(&mark, time, stream, seq) {
            Ok(lsn) => {
                if let Mark::Bookmark { name, .. } = &mark {
                    self.context.events.note(Event::BookmarkMade, &self.shared.name, name);
                }
                self.waiters.push_back(Waiter { lsn, who: Who::Source });
                self.target_event(TargetEvent::Appended { seq, lsn }, None);
                Step::Done
            }
            Err(refused) => {
                self.source_refused(&link, refused, Work::SourceMark { link: Arc::clone(&link), mark, time, seq })
            }
        }
    }

    pub(super) fn source_refused(&mut self, link: &Arc<LinkLane>, refused: Refused, work: Work) -> Step {
        match refused {
            Refused::NoRoom(text) => {
                // Full or not, the record stays: the source is told, and what it sent is appended when there is room.
                if !self.hold(&text) {
                    self.held = Some(Held::at(self.context.clock.mono()));
                }
                Step::Held(work)
            }
            Refused::Record(e) => {
                let refusal = Refusal { code: RefuseCode::BadFrame, text: crate::chain(&e) };
                self.context.events.note(Event::FrameRefused, &link.peer, &refusal);
                link.say(&Message::Refuse(refusal));
                self.drop_link();
                Step::Done
            }
            Refused::Failed(text) => {
                self.failed = Some(text);
                Step::Held(work)
            }
        }
    }
}

/// Says how what a source calls its volumes differs from what the journal recorded.
fn volumes_differ(have: &[model::VolumeSpec], said: &[model::VolumeSpec]) -> Option<String> {
    for volume in have {
        let Some(s) = said.iter().find(|s| s.id == volume.id) else {
            return Some(format!("volume {} ({}) is missing", volume.id, volume.name));
        };
        if s.sectors != volume.sectors {
            return Some(format!(
                "{} had {} sectors and has {} now: its size changed",
                volume.name, volume.sectors.0, s.sectors.0
            ));
        }
        if s.identity != volume.identity {
            return Some(format!(
                "{} is another disk than before: {:?} instead of {:?}",
                volume.name, s.identity, volume.identity
            ));
        }
    }
    said.iter()
        .find(|s| !have.iter().any(|h| h.id == s.id))
        .map(|s| format!("volume {} ({}) is not part of the group", s.id, s.name))
}
