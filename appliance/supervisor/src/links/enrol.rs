//! Enrolment: a token and a certificate request in, a certificate out. The one thing the box does for a peer it does not know.

use super::{Links, Tls, frames::Talk, refusal};
use crate::{
    catalog::{ChangeError, EnrolRefusal},
    events::Event,
    pki,
};
use model::HostId;
use std::{net::SocketAddr, sync::Arc};
use tokio::time::timeout;
use wire::{EnrolToken, Message, Purpose, RefuseCode};

/// Serves one enrolment; a connection gets one attempt.
pub async fn serve(links: &Arc<Links>, mut talk: Talk<Tls>, from: SocketAddr) {
    let attempt = async {
        let Some(hello) = links.hello(&mut talk).await? else { return Ok(()) };
        if hello.purpose != Purpose::Enrol {
            talk.refuse(refusal(RefuseCode::OutOfPlace, "this connection can only enrol")).await;
            return Ok(());
        }
        talk.say(&links.hello_ack(hello.version)).await?;
        match talk.hear().await? {
            Some(Message::Enrol { token, csr_der, host_name }) => {
                let links = Arc::clone(links);
                // Signs and flushes: not on a runtime worker.
                let answer =
                    tokio::task::spawn_blocking(move || enrol(&links, &token, &csr_der, &host_name, from)).await;
                let answer =
                    answer.unwrap_or_else(|_| Err(refusal(RefuseCode::Internal, "the enrolment failed on the box")));
                match answer {
                    Ok(enrolled) => talk.say(&enrolled).await?,
                    Err(refusal) => talk.refuse(refusal).await,
                }
            }
            Some(other) => {
                talk.refuse(refusal(RefuseCode::OutOfPlace, format!("a {} where Enrol is expected", other.name())))
                    .await;
            }
            None => {}
        }
        Ok(())
    };
    match timeout(links.handshake_limit, attempt).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => links.note_error(&from.to_string(), &e),
        Err(_) => links.events.note(Event::HandshakeFailed, from, "enrolment not finished in time"),
    }
}

/// Blocking. The token is used up, durably, before the answer exists.
fn enrol(
    links: &Links,
    token: &str,
    csr_der: &[u8],
    host_name: &str,
    from: SocketAddr,
) -> Result<Message, wire::Refusal> {
    // Why exactly is for our log; the peer is nobody yet and learns nothing.
    let not_accepted = |why: &dyn std::fmt::Display| {
        links.events.note(Event::TokenRefused, from, why);
        refusal(RefuseCode::BadToken, "the token is not accepted: it was used, has expired, or belongs to another box")
    };
    let token: EnrolToken = token.parse().map_err(|e| not_accepted(&e))?;
    let internal = |text: String| {
        tracing::error!(error = %text, "enrolment failed");
        refusal(RefuseCode::Internal, "the enrolment failed on the box; its log says why")
    };
    let now_us = links.clock.wall_us();
    let host = HostId::from_bytes(pki::random_128().ok_or_else(|| internal("no random bytes".into()))?);
    // Signed first: a request that cannot be signed must not cost the operator's token.
    let issued = links.pki.sign_host(csr_der, host, now_us).map_err(|e| {
        links.events.note(Event::TokenRefused, from, crate::chain(&e));
        refusal(RefuseCode::BadRequest, crate::chain(&e))
    })?;
    let entered =
        links.catalog.change(|data| data.enrol(&token.secret, host, host_name, issued.serial.clone(), now_us));
    let entry = entered.map_err(|e| match e {
        ChangeError::Refused(e @ EnrolRefusal::TooManyHosts) => refusal(RefuseCode::Busy, e.to_string()),
        ChangeError::Refused(e) => not_accepted(&e),
        ChangeError::Catalog(e) => internal(crate::chain(&e)),
    })?;
    links.events.note(Event::HostEnrolled, &entry.name, format!("{host} from {from}"));
    Ok(Message::Enrolled { host, certificate_pem: issued.certificate_pem, ca_pem: links.pki.ca_pem().to_owned() })
}
