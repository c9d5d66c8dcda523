//! The threads that do the journals' background work: preparing segments, building the index, folding and deleting.
//!
//! Shared by all groups. A long fold of one group may take a thread for a while, so there are always at least two: a group's next
//! prepared segment does not wait behind another's fold. The queue holds at most [`PER_GROUP`] jobs of each group.

use super::{Command, inbox::Inbox};
use journal::Job;
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

/// Jobs of one group handed out at once: one that prepares and one that folds or indexes go together, more only queue up.
pub const PER_GROUP: usize = 2;

struct Task {
    job: Job,
    home: Arc<Inbox<Command>>,
}

pub struct JobPool {
    queue: Arc<Inbox<Task>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl JobPool {
    pub fn start() -> io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
        let queue = Arc::new(Inbox::<Task>::default());
        let threads = (0..count)
            .map(|i| {
                let queue = Arc::clone(&queue);
                std::thread::Builder::new().name(format!("job-{i}")).spawn(move || {
                    while let Some(task) = queue.next() {
                        work(task);
                    }
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { queue, threads: Mutex::new(threads) })
    }

    /// Hands a job to a thread; its result comes to `home`. Gives the job back when the pool has stopped.
    pub fn push(&self, job: Job, home: &Arc<Inbox<Command>>) -> Result<(), Box<Job>> {
        self.queue.push(Task { job, home: Arc::clone(home) }).map_err(|closed| Box::new(closed.0.job))
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
    let Task { job, home } = task;
    let what = job.what();
    let command = match catch_unwind(AssertUnwindSafe(|| job.run())) {
        Ok(done) => Command::JobDone(Box::new(done)),
        // A defect; the group is opened again, which puts right whatever was left half done.
        Err(_) => Command::JobPanicked { what },
    };
    // A group that is gone needs no result.
    let _ = home.push(command);
}
