//! What NBD clients of an ingest target ask for.

use super::{Reading, Refused, Step, Waiter, Who, Work, Writer};
use crate::{
    exports::{
        driver::Op,
        lane::Lane,
        pool::{ReadJob, Source},
    },
    vault::Counters,
};
use journal::{MAX_RECORD_BYTES, NewRecord};
use model::{Codec, Extent, RecordKind, SECTOR, SourceSeq, StreamId, WriteFlags};
use nbd::{Command as Nbd, Errno};
use std::sync::Arc;

impl Writer<'_> {
    pub(super) fn op(&mut self, lane: &Arc<Lane>, op: Op) -> Step {
        let request = op.request;
        match request.command {
            Nbd::Write { .. } => self.write(Arc::clone(lane), op, 0),
            Nbd::WriteZeroes { .. } | Nbd::Trim { .. } => self.write(Arc::clone(lane), op, 0),
            Nbd::Flush => {
                Counters::add(&self.shared.counters.flushes, 1);
                let progress = self.journal.progress();
                if progress.durable >= progress.appended {
                    lane.done(&request);
                    self.touch(&lane.outbox);
                } else {
                    let who = Who::Client { lane: Arc::clone(lane), op };
                    self.waiters.push_back(Waiter { lsn: progress.appended, who });
                }
                Step::Done
            }
            Nbd::Read { .. } | Nbd::BlockStatus { .. } => {
                let progress = self.journal.progress();
                let reading = Reading { lsn: progress.appended, lane: Arc::clone(lane), op };
                if reading.lsn <= progress.written {
                    self.read(reading)
                } else {
                    self.reads.push_back(reading)
                }
                Step::Done
            }
            Nbd::Cache => {
                lane.done(&request);
                self.touch(&lane.outbox);
                Step::Done
            }
        }
    }

    pub(super) fn read(&self, reading: Reading) {
        let source = Source::Head(self.reader.clone());
        self.context.reads.push(ReadJob { lane: reading.lane, request: reading.op.request, source });
    }

    /// Appends a write, trim or zeroing from byte `done` on, and sees to its answer.
    pub(super) fn write(&mut self, lane: Arc<Lane>, op: Op, mut done: usize) -> Step {
        let request = op.request;
        let len = request.len as usize;
        let fua = request.fua();
        let kind = match request.command {
            Nbd::Trim { .. } => RecordKind::Discard,
            Nbd::WriteZeroes { .. } => RecordKind::Zero,
            _ => RecordKind::Write,
        };
        let time = self.context.clock.history();
        while done < len {
            // Only data is split: a range without data fits one record whatever its length.
            let piece = if kind == RecordKind::Write { (len - done).min(MAX_RECORD_BYTES) } else { len };
            let mut flags = WriteFlags::NONE;
            if fua {
                flags = flags | WriteFlags::FUA;
            }
            if done + piece < len {
                flags = flags | WriteFlags::MORE;
            }
            let payload = if kind == RecordKind::Write { &op.payload[done..done + piece] } else { &[][..] };
            let record = NewRecord {
                kind,
                flags,
                volume: lane.volume,
                extent: Extent::new((request.offset + done as u64) / SECTOR, piece as u64 / SECTOR),
                codec: Codec::Raw,
                payload,
                payload_crc: None,
                time,
                source_wall_us: time.0,
                stream: StreamId::default(),
                seq: SourceSeq::ZERO,
            };
            match self.append(&record) {
                Ok(_) => done += piece,
                Err(Refused::NoRoom(text)) => {
                    if self.hold(&text) {
                        return Step::Held(Work::Write { lane, op, done });
                    }
                    Counters::add(&self.shared.counters.refused_full, 1);
                    return self.fail_op(&lane, &op, Errno::NoSpace, &format!("the journal is full: {text}"));
                }
                Err(Refused::Record(e)) => return self.fail_op(&lane, &op, Errno::Io, &crate::chain(&e)),
                Err(Refused::Failed(text)) => {
                    self.fail_op(&lane, &op, Errno::Io, &text);
                    self.failed = Some(text);
                    return Step::Done;
                }
            }
        }
        if fua {
            let lsn = self.journal.progress().appended;
            self.waiters.push_back(Waiter { lsn, who: Who::Client { lane, op } });
        } else {
            lane.done(&request);
            self.touch(&lane.outbox);
        }
        Step::Done
    }

    pub(super) fn fail_op(&mut self, lane: &Arc<Lane>, op: &Op, errno: Errno, text: &str) -> Step {
        lane.fail(&op.request, errno, text);
        self.touch(&lane.outbox);
        Step::Done
    }
}
