//! The threads that do the journals' background work: preparing segments, building the index, folding and deleting.
//!
//! Shared by all groups. A long fold of one group may take a thread for a while, so there are always at least two: a group's next
//! prepared segment does not wait behind another's fold. The queue holds at most [`PER_GROUP`] jobs of each group.
//!
//! They run at the usual priority. What they make is waited for: a writer without a prepared segment makes a small one itself, one with too
//! many unsealed ones seals them itself, a full group waits for a fold; and they hold locks that writers and readers take. Tried and taken
//! back: at nice 10, beside a dozen busy threads of others, they got a hundredth of a processor, and ingest with them.

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

#[cfg(test)]
mod tests {
    use super::*;

    /// With a lower one, ingest stood still on a busy machine: see the module's documentation.
    #[test]
    fn jobs_run_at_the_priority_of_those_who_wait_for_them() {
        // SAFETY: asks for a number of the calling thread; no memory is handed over.
        let ours = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let pool = JobPool::start().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        // A thread gives itself its name, which may take it a moment.
        let seen = loop {
            let seen = nice_of_threads("job-");
            if seen.len() >= 2 {
                break seen;
            }
            assert!(std::time::Instant::now() < deadline, "{} job threads", seen.len());
            std::thread::yield_now();
        };
        assert!(seen.iter().all(|nice| *nice == ours), "{seen:?} instead of {ours}");
        pool.stop();
    }

    fn nice_of_threads(prefix: &str) -> Vec<i32> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        // One that has ended meanwhile is not of the pool.
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.join("stat")).ok());
        // The name is in brackets; behind it come the fields from the third on, and nice is the 19th.
        let stats = stats.filter(|stat| stat.split_once('(').is_some_and(|(_, name)| name.starts_with(prefix)));
        let nice = |stat: String| stat.rsplit_once(") ")?.1.split(' ').nth(16)?.parse().ok();
        stats.map(|stat| nice(stat).expect("field 19 of stat")).collect()
    }
}
