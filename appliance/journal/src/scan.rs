//! Reads a segment batch by batch: what recovery and the verifier see of a segment that has no footer to trust.
//!
//! A batch counts only as a whole: its header, every record's header and payload, the count and the LSNs must all hold. The
//! scan stops at the first batch that does not, and then looks *behind* it: later batches of the same segment may claim that
//! what is damaged had been durable.

use crate::{
    ReadError,
    format::{self, BATCH_HEADER, BLOCK, BatchHeader, RECORD_HEADER, SegmentHeader},
    segment::MemIndex,
};
use durable::DiskFile;
use model::{Codec, Lsn, Mark, Record, RecordKind};

/// Read at once when looking behind the stop.
const CHUNK: usize = 1 << 20;

/// How the readable part of a segment ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tail {
    /// Nothing but zeroes follows.
    Clean,
    /// Something follows that is no whole batch.
    Torn,
}

/// What a scan found.
pub struct Scan {
    pub index: MemIndex,
    /// End of the last whole batch.
    pub data_end: u64,
    pub tail: Tail,
    /// The highest LSN any batch says was durable, whole or not, before or behind the stop.
    pub claim: Lsn,
    /// Records that batches behind the stop say they hold.
    pub behind_records: u64,
    /// From the stop to the last byte that is not zero.
    pub behind_bytes: u64,
}

/// A record as it stands in a batch.
pub struct Scanned<'a> {
    pub record: Record,
    /// Of its header in the segment file.
    pub offset: u64,
    pub payload: &'a [u8],
    pub mark: Option<Mark>,
}

/// Where and why a batch is not whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchFault {
    pub offset: u64,
    pub what: FaultKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    BatchHeader,
    RecordHeader,
    Payload,
}

/// Splits the body of a batch (the bytes after its header) into records; all are checked before the first is given out.
pub fn split_batch<'a>(
    header: &BatchHeader,
    body: &'a [u8],
    batch_offset: u64,
    expected: Lsn,
) -> Result<Vec<Scanned<'a>>, BatchFault> {
    if header.first_lsn != expected || body.len() != header.body_len as usize {
        return Err(BatchFault { offset: batch_offset, what: FaultKind::BatchHeader });
    }
    let mut out = Vec::with_capacity((header.record_count as usize).min(body.len() / RECORD_HEADER));
    let mut at = 0;
    for i in 0..header.record_count {
        let offset = batch_offset + (BATCH_HEADER + at) as u64;
        let fault = |what| BatchFault { offset, what };
        let rest = &body[at..];
        let record = format::decode_record(rest, header.tag)
            .filter(|r| r.lsn.0 == header.first_lsn.0 + u64::from(i) && is_possible(r))
            .ok_or(fault(FaultKind::RecordHeader))?;
        let payload = rest
            .get(RECORD_HEADER..RECORD_HEADER + record.stored_len as usize)
            .ok_or(fault(FaultKind::RecordHeader))?;
        if crc32fast::hash(payload) != record.payload_crc {
            return Err(fault(FaultKind::Payload));
        }
        // A mark this program does not know changes nothing it could act upon.
        let mark = if record.kind == RecordKind::Mark { postcard::from_bytes(payload).ok() } else { None };
        at += RECORD_HEADER + payload.len();
        out.push(Scanned { record, offset, payload, mark });
    }
    if at != body.len() {
        return Err(BatchFault { offset: batch_offset + (BATCH_HEADER + at) as u64, what: FaultKind::RecordHeader });
    }
    Ok(out)
}

/// Whether append would have taken such a record; everything that reads relies on it.
pub fn is_possible(record: &Record) -> bool {
    if record.stored_len as usize > format::MAX_RECORD_BYTES {
        return false;
    }
    let extent = &record.extent;
    match record.kind {
        RecordKind::Write => {
            !extent.is_empty()
                && extent.bytes() <= format::MAX_DECODED_BYTES as u64
                && extent.lba.0.checked_add(extent.sectors.0).is_some()
                && (record.codec != Codec::Raw || extent.bytes() == u64::from(record.stored_len))
        }
        RecordKind::Zero | RecordKind::Discard => {
            !extent.is_empty() && record.stored_len == 0 && extent.lba.0.checked_add(extent.sectors.0).is_some()
        }
        RecordKind::Flush => extent.is_empty() && record.stored_len == 0,
        RecordKind::Mark => extent.is_empty() && record.stored_len > 0,
    }
}

/// Reads a segment from its first batch on, up to LSN `upto` (later records belong to no one) or to where it ends.
pub fn scan(file: &dyn DiskFile, header: &SegmentHeader, upto: Option<Lsn>) -> Result<Scan, ReadError> {
    let len = file.len()?.0.min(format::MAX_SEGMENT_BYTES * 2);
    let mut index = MemIndex::new(header);
    let tag = header.tag();
    let mut at = BLOCK as u64;
    let mut claim = Lsn::ZERO;
    let mut buf = Vec::new();
    while at + BLOCK as u64 <= len && upto.is_none_or(|upto| index.last_lsn() < upto) {
        let expected = index.last_lsn().next();
        buf.resize(BLOCK, 0);
        file.read_at(at, &mut buf)?;
        let Some(batch) = BatchHeader::decode(&buf, tag, header.incarnation) else { break };
        claim = claim.max(batch.durable_lsn);
        let room = u64::from(format::MAX_SEGMENT_RECORDS) * 2;
        if batch.span() > len - at || u64::from(index.records()) + u64::from(batch.record_count) > room {
            break;
        }
        buf.resize(batch.span() as usize, 0);
        file.read_at(at + BLOCK as u64, &mut buf[BLOCK..])?;
        let body = &buf[BATCH_HEADER..BATCH_HEADER + batch.body_len as usize];
        let Ok(records) = split_batch(&batch, body, at, expected) else { break };
        for scanned in &records {
            // Offsets fit: a segment is at most 1 GiB.
            index.insert(&scanned.record, scanned.offset as u32, scanned.mark.as_ref());
        }
        at += batch.span();
    }
    let mut scan = Scan { index, data_end: at, tail: Tail::Clean, claim, behind_records: 0, behind_bytes: 0 };
    look_behind(file, header, len, &mut scan)?;
    Ok(scan)
}

/// What lies behind the last whole batch.
fn look_behind(file: &dyn DiskFile, header: &SegmentHeader, len: u64, scan: &mut Scan) -> Result<(), ReadError> {
    let tag = header.tag();
    let last = scan.index.last_lsn();
    let mut chunk = vec![0; CHUNK];
    let mut at = scan.data_end;
    while at < len {
        let part = &mut chunk[..CHUNK.min((len - at) as usize)];
        file.read_at(at, part)?;
        for (i, block) in part.chunks(BLOCK).enumerate() {
            let Some(used) = block.iter().rposition(|b| *b != 0) else { continue };
            scan.tail = Tail::Torn;
            scan.behind_bytes = at + (i * BLOCK + used + 1) as u64 - scan.data_end;
            if let Some(batch) = BatchHeader::decode(block, tag, header.incarnation)
                && batch.first_lsn > last
            {
                scan.claim = scan.claim.max(batch.durable_lsn);
                scan.behind_records += u64::from(batch.record_count);
            }
        }
        at += part.len() as u64;
    }
    Ok(())
}
