//! The threads that compare a host's disk with what its group holds (see [`wire::Comparison`]).
//!
//! Shared by all groups and few, so that a host that looks through its whole disk after a crash takes neither the journal thread's time nor
//! the readers of views. What is queued is bounded by [`replication::COMPARISONS_MAX`] for each connection.

use super::{Command, inbox::Inbox};
use journal::JournalReader;
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};
use wire::Comparison;

/// One hashes while the other waits for the disk.
const THREADS: usize = 2;

struct Task {
    link: u64,
    ask: Comparison,
    reader: JournalReader,
    home: Arc<Inbox<Command>>,
}

pub struct ComparePool {
    queue: Arc<Inbox<Task>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ComparePool {
    pub fn start() -> io::Result<Self> {
        let queue = Arc::new(Inbox::<Task>::default());
        let threads = (0..THREADS)
            .map(|i| {
                let queue = Arc::clone(&queue);
                std::thread::Builder::new().name(format!("compare-{i}")).spawn(move || {
                    while let Some(task) = queue.next() {
                        work(task);
                    }
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { queue, threads: Mutex::new(threads) })
    }

    /// Hands a comparison of the connection `link` to a thread; the answer comes to `home`. A pool that has stopped answers nothing: its
    /// connections have ended.
    pub fn push(&self, link: u64, ask: Comparison, reader: JournalReader, home: &Arc<Inbox<Command>>) {
        let _ = self.queue.push(Task { link, ask, reader, home: Arc::clone(home) });
    }

    /// Finishes what is queued and ends the threads. Blocking.
    pub fn stop(&self) {
        self.queue.close();
        for thread in crate::lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(task: Task) {
    let Task { link, ask, reader, home } = task;
    let id = ask.id;
    // A defect or damage on the way: the host sends what it has, which is right whatever the matter was.
    let differ = catch_unwind(AssertUnwindSafe(|| compare(&ask, &reader))).unwrap_or_default();
    // A group that is gone needs no answer.
    let _ = home.push(Command::Compared { link, id, differ });
}

fn compare(ask: &Comparison, reader: &JournalReader) -> Vec<u8> {
    let view = reader.head_view();
    let mut failed = false;
    ask.answer(|block, buf| match view.read(ask.volume, block.lba.bytes(), buf) {
        Ok(()) => true,
        Err(e) => {
            if !failed {
                tracing::warn!(volume = %ask.volume, ?block, error = crate::chain(&e), "could not read what a host compares with");
                failed = true;
            }
            false
        }
    })
}
