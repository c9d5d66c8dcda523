//! What a process must be that stands in the path of its host's writes.
//!
//! A page of it that has to come from the disk whose write it is to answer, or memory that can only be freed by writing to that disk,
//! would hold the host until a bound passes. So: all of it in memory, its allocations never wait for I/O, and others go first when memory
//! runs out. Each of these can be refused (an old kernel, a service without the capability): then the bound and the guard are what
//! is left, and the log says so.

use std::io;

const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// To be called before the threads are made that serve a leg: they inherit it. Says whether the process is locked in memory.
pub fn stand_firm() -> bool {
    let mut locked = true;
    // What is there now is brought in at once; what comes later stays once it was touched.
    let calls: [(&str, libc::c_int); 2] =
        [("what it has now", libc::MCL_CURRENT), ("what it gets later", libc::MCL_FUTURE | libc::MCL_ONFAULT)];
    for (what, flags) in calls {
        // SAFETY: plain flags; the call changes no memory of ours.
        if unsafe { libc::mlockall(flags) } != 0 {
            warn(&format!("could not lock its memory ({what})"));
            locked = false;
        }
    }
    if !flush_for_others() {
        warn("could not say that it does I/O for others (PR_SET_IO_FLUSHER)");
    }
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(error = %e, "sync leg: could not exempt itself from the OOM killer");
    }
    locked
}

/// Allocations of this thread, and of those it makes, wait for no I/O. Called at the agent's start as well: the threads that are made then
/// share an allocator, and so its locks, with those that serve a leg later. Says whether the kernel took it.
pub fn flush_for_others() -> bool {
    // SAFETY: plain numbers; the unused arguments must be zero.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 }
}

fn warn(what: &str) {
    let error = io::Error::last_os_error();
    tracing::warn!(%error, "sync leg: the agent {what}; under memory pressure the host may wait up to the bound");
}
