//! Freezing file systems for the moment of a bookmark, so that they are let go whatever happens to the agent.
//!
//! A frozen file system blocks every writer of the host. So before anything is frozen a guard process is started that holds the mount
//! points open and lets them go when the agent says so, when the agent dies (its end of a pipe closes), or after
//! [`FREEZE_MAX`], whichever is first. It ends only with the pipe: a freeze that comes about later than that is ended too. The guard does
//! nothing else: no log, no allocation on the way, no write to a file system.
//!
//! What somebody else froze is theirs to let go: the freeze is refused, and the guard is told by the number of the mount to leave
//! that one alone. Until it is told it would let go: of the two mistakes, a host that hangs for ever is the worse one.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Writers of the host wait this long at most.
pub const FREEZE_MAX: Duration = Duration::from_secs(10);
/// The hidden subcommand that the guard runs.
pub const GUARD_COMMAND: &str = "thaw-guard";

#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("could not open the mount point {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not start the process that ends the freeze")]
    Guard(#[source] io::Error),
    #[error("the process that ends the freeze did not get ready")]
    GuardDead,
    #[error("{} cannot be frozen", path.display())]
    Freeze {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is frozen by somebody else already: wait for its end or let it go (fsfreeze -u), then try again", path.display())]
    Foreign { path: PathBuf },
    #[error("nothing of this group is mounted: there is no file system to freeze; use --consistency crash")]
    NothingMounted,
}

mod ioctl {
    // FIFREEZE and FITHAW of linux/fs.h.
    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
}

fn freeze(dir: &File) -> io::Result<()> {
    let mut zero = 0;
    // SAFETY: a valid descriptor; the argument is not used by the kernel.
    unsafe { ioctl::fifreeze(dir.as_raw_fd(), &mut zero) }.map(drop).map_err(io::Error::from)
}

fn thaw(dir: &File) -> io::Result<()> {
    let mut zero = 0;
    // SAFETY: as above.
    unsafe { ioctl::fithaw(dir.as_raw_fd(), &mut zero) }.map(drop).map_err(io::Error::from)
}

/// File systems held still until this is dropped.
pub struct Frozen {
    dirs: Vec<File>,
    guard: Guard,
    since: Instant,
}

struct Guard {
    child: Child,
}

/// Freezes what is mounted at `mounts`, in that order; all or none.
pub fn freeze_all(mounts: &[String]) -> Result<Frozen, FreezeError> {
    if mounts.is_empty() {
        return Err(FreezeError::NothingMounted);
    }
    let program = std::env::current_exe().map_err(FreezeError::Guard)?;
    freeze_with(&program, mounts)
}

/// As [`freeze_all`], with the program that has [`GUARD_COMMAND`].
pub fn freeze_with(program: &Path, mounts: &[String]) -> Result<Frozen, FreezeError> {
    let (mounts, dirs) = one_of_each(mounts)?;
    let child = Command::new(program)
        .arg(GUARD_COMMAND)
        .args(&mounts)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(FreezeError::Guard)?;
    let mut guard = Guard { child };
    let mut ready = [0u8; 1];
    let said = guard.child.stdout.as_mut().map(|out| out.read_exact(&mut ready));
    if !matches!(said, Some(Ok(()))) {
        return Err(FreezeError::GuardDead);
    }
    // From when the guard counts, not from when the last one is frozen.
    let mut frozen = Frozen { dirs: Vec::new(), guard, since: Instant::now() };
    for (number, (dir, mount)) in dirs.into_iter().zip(&mounts).enumerate() {
        match freeze(&dir) {
            Ok(()) => frozen.dirs.push(dir),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                frozen.guard.leave_alone(number);
                return Err(FreezeError::Foreign { path: mount.into() });
            }
            Err(source) => return Err(FreezeError::Freeze { path: mount.into(), source }),
        }
    }
    Ok(frozen)
}

/// The mounts, opened, each file system once: a second freeze of ours would look like somebody else's.
fn one_of_each(mounts: &[String]) -> Result<(Vec<String>, Vec<File>), FreezeError> {
    let (mut seen, mut names, mut dirs) = (Vec::new(), Vec::new(), Vec::new());
    for mount in mounts {
        let wrong = |source| FreezeError::Open { path: mount.into(), source };
        let dir = File::open(mount).map_err(wrong)?;
        let device = dir.metadata().map_err(wrong)?.dev();
        if !seen.contains(&device) {
            seen.push(device);
            names.push(mount.clone());
            dirs.push(dir);
        }
    }
    Ok((names, dirs))
}

impl Guard {
    /// A guard that is gone has let go of it before: nothing can be done about that.
    fn leave_alone(&mut self, number: usize) {
        if let (Some(pipe), Ok(number)) = (self.child.stdin.as_mut(), u16::try_from(number)) {
            let _ = pipe.write_all(&number.to_le_bytes());
        }
    }
}

impl Frozen {
    /// Whether the guard cannot have let go yet.
    pub fn surely_frozen(&self) -> bool {
        self.since.elapsed() + Duration::from_secs(1) < FREEZE_MAX
    }
    /// For the test of the guard: what we hold, and the guard.
    pub fn into_parts(mut self) -> (Vec<File>, impl Drop) {
        let dirs = std::mem::take(&mut self.dirs);
        (dirs, self)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for dir in self.dirs.iter().rev() {
            // EINVAL: the guard was first.
            let _ = thaw(dir);
        }
        // The pipe closes, the guard sees it and ends.
        drop(self.guard.child.stdin.take());
        let _ = self.guard.child.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// What the guard process does. Opens everything, says that it is ready, waits, lets go.
pub fn guard(mounts: &[PathBuf]) -> io::Result<()> {
    let mut dirs: Vec<Option<File>> = mounts.iter().map(|m| File::open(m).map(Some)).collect::<Result<_, _>>()?;
    let mut out = io::stdout();
    out.write_all(b"r")?;
    out.flush()?;
    // Not buffered: what lies in a buffer, poll does not see.
    let mut pipe = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut until = Instant::now() + FREEZE_MAX;
    loop {
        let wait = until.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry. Whatever ends the wait, what follows is the same.
        let said = unsafe { libc::poll(&mut poll, 1, wait.as_millis() as i32) } > 0;
        let mut number = [0u8; 2];
        let ours = said.then(|| pipe.read_exact(&mut number).is_ok());
        if ours == Some(true) {
            if let Some(dir) = dirs.get_mut(usize::from(u16::from_le_bytes(number))) {
                *dir = None;
            }
            continue;
        }
        for dir in dirs.iter().flatten().rev() {
            let _ = thaw(dir);
        }
        if ours.is_some() {
            return Ok(());
        }
        // The agent still holds on: what it may freeze from now on is let go at once.
        until = Instant::now() + Duration::from_millis(200);
    }
}
