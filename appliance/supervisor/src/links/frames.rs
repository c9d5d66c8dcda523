//! Frames of a connection one by one: for everything but the records of a running stream.

use bytes::{Buf as _, Bytes, BytesMut};
use std::{io, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use wire::{
    FrameError, FrameHeader, FrameKind, HEADER_LEN, Message, MessageError, decode_header, decode_message,
    encode_message,
};

/// How long one message may take to be taken by the peer's side; a line so slow is of no use.
const SAY_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("bytes that are no frame")]
    Frame(#[from] FrameError),
    #[error("a message that cannot be read")]
    Message(#[from] MessageError),
    #[error("a {0:?} frame where a message is expected")]
    NotAMessage(FrameKind),
    #[error("the connection broke")]
    Io(#[from] io::Error),
}

impl LinkError {
    /// Whether the peer broke the protocol, rather than the network the connection.
    pub fn is_hostile(&self) -> bool {
        !matches!(self, Self::Io(_))
    }
}

/// A frame that is whole in `input` is taken off it; otherwise the number of bytes that must be there.
pub fn take_frame(input: &mut BytesMut) -> Result<Result<(FrameHeader, Bytes), usize>, FrameError> {
    let Some(bytes) = input.first_chunk::<HEADER_LEN>() else { return Ok(Err(HEADER_LEN)) };
    let header = decode_header(bytes)?;
    let whole = HEADER_LEN + header.payload_len as usize;
    if input.len() < whole {
        return Ok(Err(whole));
    }
    input.advance(HEADER_LEN);
    Ok(Ok((header, input.split_to(header.payload_len as usize).freeze())))
}

/// Reads and writes messages on a stream.
pub struct Talk<S> {
    pub stream: S,
    pub input: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, input: BytesMut::new() }
    }

    /// The next message; `None` when the peer has ended. May be dropped and called again: what was read is kept.
    pub async fn hear(&mut self) -> Result<Option<Message>, LinkError> {
        loop {
            let wanted = match take_frame(&mut self.input)? {
                Ok((header, payload)) => {
                    return match header.kind {
                        FrameKind::Message => Ok(Some(decode_message(&header, &payload)?)),
                        kind => Err(LinkError::NotAMessage(kind)),
                    };
                }
                Err(wanted) => wanted,
            };
            self.input.reserve(wanted.saturating_sub(self.input.len()));
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return if self.input.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
    }

    pub async fn say(&mut self, message: &Message) -> Result<(), LinkError> {
        let mut out = Vec::new();
        encode_message(message, &mut out)?;
        let sent = async {
            self.stream.write_all(&out).await?;
            self.stream.flush().await
        };
        // A peer that fetches nothing would otherwise hold its task for ever, deaf to silence, revocation and the daemon's end.
        tokio::time::timeout(SAY_LIMIT, sent).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(())
    }

    /// Says why and ends the connection; what becomes of it is no longer of interest.
    pub async fn refuse(&mut self, refusal: wire::Refusal) {
        let ending = async {
            if self.say(&Message::Refuse(refusal)).await.is_ok() {
                linger(&mut self.stream).await;
            }
        };
        let _ = tokio::time::timeout(super::REFUSE_LIMIT, ending).await;
    }
}

/// Ends our side and drops what still comes until the peer has ended too: closing with bytes unread makes the kernel reset the
/// connection, and the peer would never see what was said last. The caller limits the time.
pub async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut dropped = [0; 4096];
    while matches!(stream.read(&mut dropped).await, Ok(n) if n > 0) {}
}
