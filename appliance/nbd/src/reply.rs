//! Replies of a server. Each `push_*` appends whole, final replies to a buffer the caller sends; only
//! [`Session::read_head`] leaves the data to be sent behind it, so that it need not be copied.
//!
//! A READ is answered with chunks when structured replies were negotiated (the protocol demands it); everything else that
//! succeeds gets a simple reply, which is allowed in both modes and shorter. Errors carry their text when they can.

use crate::{
    export::{Allocation, StatusExtent},
    format::*,
    request::{Command, Refusal, ReplyMode, Request, Session},
};

/// Holes shorter than this are sent as data: a chunk header costs 20 bytes and a system call at the other end.
const MIN_HOLE_BYTES: usize = 4096;

/// What goes before the data of a READ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadHead {
    bytes: [u8; CHUNK_HEADER_LEN + 8],
    len: usize,
}

impl ReadHead {
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Session {
    /// The request was carried out (anything but READ and BLOCK_STATUS).
    pub fn push_done(&self, out: &mut Vec<u8>, cookie: u64) {
        push_simple(out, 0, cookie);
    }

    /// The request failed. `text` tells an operator why; it is sent in structured mode only.
    pub fn push_error(&self, out: &mut Vec<u8>, cookie: u64, errno: Errno, text: &str) {
        match self.replies() {
            ReplyMode::Simple => push_simple(out, errno.code(), cookie),
            ReplyMode::Structured => {
                let text = clip(text, MAX_NAME_BYTES).as_bytes();
                push_chunk(out, chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + text.len());
                out.extend_from_slice(&errno.code().to_be_bytes());
                out.extend_from_slice(&u16::try_from(text.len()).expect("clipped to the limit").to_be_bytes());
                out.extend_from_slice(text);
            }
        }
    }

    pub fn push_refusal(&self, out: &mut Vec<u8>, refusal: &Refusal) {
        self.push_error(out, refusal.cookie, refusal.reason.errno(), &refusal.reason.to_string());
    }

    /// Head of a READ's answer in one piece: exactly `request.len` bytes of data must follow.
    pub fn read_head(&self, request: &Request) -> ReadHead {
        let mut head = ReadHead { bytes: [0; CHUNK_HEADER_LEN + 8], len: 0 };
        let mut out = Vec::with_capacity(head.bytes.len());
        match self.replies() {
            ReplyMode::Simple => push_simple(&mut out, 0, request.cookie),
            ReplyMode::Structured => {
                push_chunk(&mut out, chunk::FLAG_DONE, chunk::OFFSET_DATA, request.cookie, 8 + request.len as usize);
                out.extend_from_slice(&request.offset.to_be_bytes());
            }
        }
        head.len = out.len();
        head.bytes[..head.len].copy_from_slice(&out);
        head
    }

    /// The whole answer to a READ. In structured mode runs of zero blocks are sent as holes, so that a copy stays
    /// sparse; with DF it is one chunk.
    pub fn push_read(&self, out: &mut Vec<u8>, request: &Request, data: &[u8]) {
        assert_eq!(data.len(), request.len as usize, "a READ is answered with what it asked for");
        let df = matches!(request.command, Command::Read { df: true });
        if self.replies() == ReplyMode::Simple || (df && !is_zero(data)) {
            out.extend_from_slice(self.read_head(request).as_slice());
            out.extend_from_slice(data);
            return;
        }
        let mut at = 0;
        while at < data.len() {
            let (len, hole) = next_piece(&data[at..]);
            let flags = if at + len == data.len() { chunk::FLAG_DONE } else { 0 };
            let offset = request.offset + at as u64;
            if hole {
                push_chunk(out, flags, chunk::OFFSET_HOLE, request.cookie, 12);
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&u32::try_from(len).expect("inside the request").to_be_bytes());
            } else {
                push_chunk(out, flags, chunk::OFFSET_DATA, request.cookie, 8 + len);
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&data[at..at + len]);
            }
            at += len;
        }
    }

    /// Whether the whole answer to a READ with this data is [`Session::read_head`] and the data: nothing of it is worth
    /// sending as a hole.
    pub fn sends_whole(&self, data: &[u8]) -> bool {
        self.replies() == ReplyMode::Simple || next_piece(data) == (data.len(), false)
    }

    /// The answer to BLOCK_STATUS. `extents` follow each other from the request's offset and must cover at least its
    /// beginning; what lies beyond the request is cut, neighbours of the same kind are merged, and the answer ends after
    /// [`MAX_STATUS_EXTENTS`] (one with REQ_ONE). No extents at all is answered as an input/output error.
    pub fn push_block_status(&self, out: &mut Vec<u8>, request: &Request, extents: &[StatusExtent]) {
        let max = if matches!(request.command, Command::BlockStatus { one: true }) { 1 } else { MAX_STATUS_EXTENTS };
        let merged = merge(extents, request.len, max);
        if merged.is_empty() || self.replies() == ReplyMode::Simple {
            self.push_error(out, request.cookie, Errno::Io, "the allocation of this range is not known");
            return;
        }
        push_chunk(out, chunk::FLAG_DONE, chunk::BLOCK_STATUS, request.cookie, 4 + 8 * merged.len());
        out.extend_from_slice(&CONTEXT_ALLOCATION_ID.to_be_bytes());
        for (len, allocation) in merged {
            let state = match allocation {
                Allocation::Data => 0,
                Allocation::Zero => STATE_HOLE | STATE_ZERO,
            };
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(&state.to_be_bytes());
        }
    }
}

fn push_simple(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

fn push_chunk(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, len: usize) {
    out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&u32::try_from(len).expect("a chunk is not larger than its request").to_be_bytes());
}

/// Length of the run at the front that is all hole or all data, in steps of [`MIN_HOLE_BYTES`].
fn next_piece(data: &[u8]) -> (usize, bool) {
    let mut blocks = data.chunks(MIN_HOLE_BYTES);
    let Some(first) = blocks.next() else { return (0, false) };
    let hole = is_zero(first);
    let rest: usize = blocks.take_while(|block| is_zero(block) == hole).map(<[u8]>::len).sum();
    (first.len() + rest, hole)
}

fn is_zero(data: &[u8]) -> bool {
    // Sixteen bytes at a time: this runs over everything that is read.
    let (words, tail) = data.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && tail.iter().all(|byte| *byte == 0)
}

fn merge(extents: &[StatusExtent], len: u32, max: usize) -> Vec<(u32, Allocation)> {
    let mut merged: Vec<(u32, Allocation)> = Vec::new();
    let mut left = len;
    for extent in extents {
        let piece = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        if piece == 0 {
            continue;
        }
        let full = merged.len() == max;
        match merged.last_mut() {
            Some((len, allocation)) if *allocation == extent.allocation => *len += piece,
            _ if full => break,
            _ => merged.push((piece, extent.allocation)),
        }
        left -= piece;
    }
    merged
}
