//! Drives one NBD connection over any stream: the handshake, then requests in and answers out.
//!
//! All requests that came with one read are handed on as one batch; nothing is spawned per request and no request passes through a
//! second task. See [`pump`](crate::pump) for how answers go out.
//!
//! **Limits.** [`BUDGET_BYTES`](super::lane::BUDGET_BYTES) of unanswered requests: beyond it nothing is read, and the socket holds the
//! client back. Refusals cost nothing and are bounded by the pump's output limit. [`HANDSHAKE_SECONDS_MAX`] for the whole
//! handshake, kept by the caller.

use super::lane::{self, Lane};
use crate::pump::{Parsed, Parser, pump};
use bytes::{Buf as _, Bytes, BytesMut};
use nbd::{HandshakeError, Incoming, ProtocolError, REQUEST_LEN, Request, ServerHandshake, Session, Step};
use std::{io, sync::Arc};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// An honest handshake is a few round trips; this also covers a slow line.
pub const HANDSHAKE_SECONDS_MAX: u64 = 20;
/// Requests handed on at once: more would only make the thread behind them answer later.
const BATCH_MAX: usize = 1024;
/// Refusals answered at once, before what they put out is sent.
const REFUSALS_MAX: usize = 1024;

/// How a connection ended otherwise than in good order.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the connection broke")]
    Io(#[from] io::Error),
}

/// A request with the data that came with it.
pub struct Op {
    pub request: Request,
    pub payload: Bytes,
}

/// Where requests are carried out. Every request is answered into the lane, sooner or later, whatever happens.
pub trait Backend: Send + Sync {
    fn take(&self, lane: &Arc<Lane>, ops: Vec<Op>);
}

/// What a handshake came to.
pub enum Agreed {
    Session(Session),
    /// The client wants TLS now; go on with the same handshake over it.
    StartTls,
    Closed,
}

/// Goes on with a handshake until it ends or asks for TLS.
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    handshake: &mut ServerHandshake,
    exports: &(dyn nbd::Exports + Sync),
) -> Result<Agreed, ConnectionError> {
    let mut buf = Vec::new();
    loop {
        match handshake.step(exports)? {
            Step::Write(bytes) => {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
            }
            Step::Read(len) => {
                buf.resize(len, 0);
                stream.read_exact(&mut buf).await?;
                handshake.feed(&buf);
            }
            Step::StartTls => return Ok(Agreed::StartTls),
            Step::Ready(session) => return Ok(Agreed::Session(session)),
            Step::Close => return Ok(Agreed::Closed),
        }
    }
}

/// Serves a negotiated session until the client ends it.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    lane: Arc<Lane>,
    backend: &dyn Backend,
) -> Result<(), ConnectionError> {
    let outbox = Arc::clone(&lane.outbox);
    let mut requests = Requests { lane, backend, discard: 0 };
    pump(stream, &outbox, &mut requests, lane::BUDGET_BYTES, BytesMut::new()).await?;
    // Ends TLS properly; a client that hung up already has no use for it.
    let _ = stream.shutdown().await;
    Ok(())
}

struct Requests<'a> {
    lane: Arc<Lane>,
    backend: &'a dyn Backend,
    /// Data of a refused request, still to be dropped.
    discard: usize,
}

impl Parser for Requests<'_> {
    type Error = ConnectionError;

    fn parse(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, room: usize) -> Result<Parsed, ConnectionError> {
        let (mut ops, mut taken, mut refused) = (Vec::new(), 0, 0);
        let parsed = loop {
            if taken >= room || ops.len() >= BATCH_MAX || refused >= REFUSALS_MAX {
                break Parsed::NoRoom;
            }
            let drop = self.discard.min(input.len());
            input.advance(drop);
            self.discard -= drop;
            let Some(header) = input.first_chunk::<REQUEST_LEN>() else { break Parsed::Wants(REQUEST_LEN) };
            match self.lane.session.request(header)? {
                Incoming::Request(request) => {
                    let len = request.payload_len();
                    if input.len() < REQUEST_LEN + len {
                        break Parsed::Wants(REQUEST_LEN + len);
                    }
                    input.advance(REQUEST_LEN);
                    taken += lane::cost(&request);
                    ops.push(Op { request, payload: input.split_to(len).freeze() });
                }
                Incoming::Refused { refusal, discard } => {
                    input.advance(REQUEST_LEN);
                    self.discard = discard as usize;
                    refused += 1;
                    self.lane.session.push_refusal(out, &refusal);
                }
                Incoming::Disconnect => break Parsed::Ending,
            }
        };
        if !ops.is_empty() {
            self.lane.outbox.take_on(taken);
            self.backend.take(&self.lane, ops);
        }
        // While data is dropped, any byte is progress.
        Ok(if self.discard > 0 && matches!(parsed, Parsed::Wants(_)) { Parsed::Wants(1) } else { parsed })
    }

    fn between_units(&self, input: &BytesMut) -> bool {
        input.is_empty() && self.discard == 0
    }
}
