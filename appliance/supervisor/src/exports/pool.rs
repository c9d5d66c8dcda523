//! The threads that read views: a read may wait for a disk, which no runtime worker may.
//!
//! The queue is bounded by what the connections may have unanswered ([`super::lane::BUDGET_BYTES`] each), and one reading ahead per
//! export.

use super::lane::Lane;
use crate::{
    events::{Event, Events},
    vault::inbox::Inbox,
};
use journal::{JournalReader, ReadViewError, View};
use model::{Extent, SECTOR, VolumeId};
use nbd::{Command, Errno, Request, StatusExtent};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

/// What is read from.
#[derive(Clone)]
pub enum Source {
    View(Arc<View>),
    /// An ingest target: the newest state. Queued only when what it must see has been written.
    Head(JournalReader),
}

pub struct ReadJob {
    pub lane: Arc<Lane>,
    pub request: Request,
    pub source: Source,
}

/// From here on an answer is not copied into the outbox: it would cost more than a buffer of its own.
const LARGE_BYTES: u32 = 64 << 10;

/// A stretch of a view that will be read soon.
pub struct Ahead {
    pub view: Arc<View>,
    pub volume: VolumeId,
    pub offset: u64,
    pub len: u64,
}

enum Work {
    Read(ReadJob),
    Ahead(Ahead),
}

pub struct ReadPool {
    queue: Arc<Inbox<Work>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ReadPool {
    /// Starts the threads: two for each processor, so that some wait for the disk while others copy.
    pub fn start(events: &Arc<Events>) -> std::io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(4, |n| (n.get() * 2).clamp(4, 16));
        let queue = Arc::new(Inbox::default());
        let threads = (0..count)
            .map(|i| {
                let (queue, events) = (Arc::clone(&queue), Arc::clone(events));
                std::thread::Builder::new().name(format!("read-{i}")).spawn(move || work(&queue, &events))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { queue, threads: Mutex::new(threads) })
    }

    pub fn push(&self, job: ReadJob) {
        if let Err(closed) = self.queue.push(Work::Read(job))
            && let Work::Read(job) = closed.0
        {
            job.lane.fail(&job.request, Errno::Shutdown, "the box is shutting down");
            job.lane.wake();
        }
    }

    /// Has a stretch brought into memory; nobody waits for it, and when the pool is closed nobody misses it.
    pub fn push_ahead(&self, ahead: Ahead) {
        drop(self.queue.push(Work::Ahead(ahead)));
    }

    /// Answers what is queued and ends the threads. Blocking.
    pub fn stop(&self) {
        self.queue.close();
        for thread in crate::lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(queue: &Inbox<Work>, events: &Events) {
    let mut buf = Vec::new();
    while let Some(work) = queue.next() {
        let ReadJob { lane, request, source } = match work {
            Work::Read(job) => job,
            Work::Ahead(ahead) => {
                // What is wrong is said to the one who reads it.
                let _ = catch_unwind(AssertUnwindSafe(|| ahead.view.prefetch(ahead.volume, ahead.offset, ahead.len)));
                continue;
            }
        };
        // A panic here is a defect, but one client's read must not take a thread from all the others.
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&lane, &request, &source, &mut buf)));
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(crate::chain(&e)),
            Err(_) => Some("the read panicked".to_owned()),
        };
        if let Some(text) = failure {
            events.note(Event::ViewDamaged, lane.session.export_name(), &text);
            lane.fail(&request, Errno::Io, &text);
        }
        lane.wake();
        if buf.capacity() > 4 << 20 {
            buf = Vec::new();
        }
    }
}

fn run(lane: &Lane, request: &Request, source: &Source, buf: &mut Vec<u8>) -> Result<(), ReadViewError> {
    let head;
    let view: &View = match source {
        Source::View(view) => view,
        Source::Head(reader) => {
            head = reader.head_view();
            &head
        }
    };
    match request.command {
        Command::Read { .. } if request.len >= LARGE_BYTES => {
            let head = lane.session.read_head(request);
            let head = head.as_slice();
            let mut answer = Vec::with_capacity(head.len() + request.len as usize);
            answer.extend_from_slice(head);
            answer.resize(head.len() + request.len as usize, 0);
            view.read(lane.volume, request.offset, &mut answer[head.len()..])?;
            if lane.session.sends_whole(&answer[head.len()..]) {
                lane.answer_large(request, answer);
            } else {
                lane.answer(request, |session, out| session.push_read(out, request, &answer[head.len()..]));
            }
        }
        Command::Read { .. } => {
            buf.resize(request.len as usize, 0);
            view.read(lane.volume, request.offset, buf)?;
            lane.answer(request, |session, out| session.push_read(out, request, buf));
        }
        Command::BlockStatus { .. } => {
            let extents = status(view, lane, request)?;
            lane.answer(request, |session, out| session.push_block_status(out, request, &extents));
        }
        // CACHE promises nothing; the others never come here.
        _ => lane.done(request),
    }
    Ok(())
}

/// Allocation of the request's range, from its first byte on.
fn status(view: &View, lane: &Lane, request: &Request) -> Result<Vec<StatusExtent>, ReadViewError> {
    let end = request.offset + u64::from(request.len);
    let sectors = Extent::between(request.offset / SECTOR, end.div_ceil(SECTOR));
    let runs = view.allocation(lane.volume, sectors)?;
    let piece = |(extent, allocation): &(Extent, journal::Allocation)| {
        let from = (extent.start() * SECTOR).max(request.offset);
        let to = (extent.end() * SECTOR).min(end);
        let allocation = match allocation {
            journal::Allocation::Data => nbd::Allocation::Data,
            journal::Allocation::Zero => nbd::Allocation::Zero,
        };
        StatusExtent { len: to.saturating_sub(from), allocation }
    };
    Ok(runs.iter().map(piece).collect())
}
