//! What an agent says of leases, of its plan and of probes, and what the box says to it of them.

use super::{Agent, Links, refusal};
use crate::ownership::{LINE_MAX, nothing_for};
use model::HostId;
use std::sync::Arc;
use tokio::sync::mpsc;
use wire::{LeaseEnd, LeaseRequest, Message, Refusal, RefuseCode};

/// A control connection is there: what is to be sent over it, as long as it stands.
pub async fn connected(links: &Arc<Links>, agent: &Agent, version: u16) -> mpsc::Receiver<Message> {
    let (to, said) = mpsc::channel(LINE_MAX);
    let host = agent.host;
    blocking(links, move |links| links.ownership.connected(host, version, to)).await;
    said
}

/// Who has no word in another host's ownership is told that it stands by for nobody; what else it says of it is refused.
pub async fn heard(links: &Arc<Links>, agent: &Agent, message: Message) -> Result<Option<Message>, Refusal> {
    let host = agent.host;
    let own = |whose: HostId| {
        let stranger = || refusal(RefuseCode::BadRequest, "this host stands by for no other");
        if whose == host { Ok(()) } else { Err(stranger()) }
    };
    match message {
        Message::Lease(LeaseRequest { whose, .. }) | Message::LeaseReleased(LeaseEnd { whose, .. })
            if whose != host && !links.ownership.is_standby(whose, host) =>
        {
            return Ok(Some(Message::HostPlan(nothing_for(whose))));
        }
        Message::Lease(request) if request.whose != host => {
            blocking(links, move |links| links.ownership.standby_asks(request.whose, host, request)).await;
        }
        Message::LeaseReleased(end) if end.whose != host => {
            blocking(links, move |links| links.ownership.standby_released(end.whose, host, end)).await;
        }
        Message::HostPlanTaken { whose, version, refused } if whose != host => {
            if links.ownership.is_standby(whose, host) {
                blocking(links, move |links| links.ownership.standby_took_plan(whose, version, refused)).await;
            }
        }
        Message::Lease(request) => {
            own(request.whose)?;
            blocking(links, move |links| links.ownership.request(host, request)).await;
        }
        Message::LeaseReleased(end) => {
            own(end.whose)?;
            blocking(links, move |links| links.ownership.released(host, end)).await;
        }
        Message::HostPlanTaken { whose, version, refused } => {
            own(whose)?;
            blocking(links, move |links| links.ownership.plan_taken(host, version, refused)).await;
        }
        Message::Probe(result) => {
            own(result.whose)?;
            links.ears.probe(host, result, links.clock.mono());
        }
        other => {
            let text = format!("a {} on a control connection", other.name());
            return Err(refusal(RefuseCode::OutOfPlace, text));
        }
    }
    Ok(None)
}

/// A desk's file may have to be written.
async fn blocking(links: &Arc<Links>, act: impl FnOnce(&Links) + Send + 'static) {
    let links = Arc::clone(links);
    let _ = tokio::task::spawn_blocking(move || act(&links)).await;
}
