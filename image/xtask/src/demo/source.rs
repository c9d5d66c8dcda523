//! The protected disk of `cargo xtask try`, in its two forms.

use super::GROUP;
use anyhow::{Context, Result, bail};
use hw_tests::{
    disk::{LoopDisk, Workload, copy_sparse},
    image::ImageDisk,
    nbd,
    process::wait_for,
    product::{Agent, Appliance, Binaries, Export},
};
use std::{
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Small enough to be compared whole several times within a minute, and to be copied within one even where the machine is so
/// busy that the agent holds itself back.
const LOOP_BYTES: u64 = 96 << 20;
const IMAGE_BYTES: u64 = 64 << 20;
/// Between two steps of the loop disk's workload.
const STEP_PAUSE: Duration = Duration::from_millis(10);
/// Between two rounds on the image.
const ROUND_PAUSE: Duration = Duration::from_millis(30);
/// How long a box that was killed and started again may be away.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// A disk under a changing workload. Fields go down in order: the writer first.
pub enum Source {
    Kernel(Box<Kernel>),
    Ingest(Ingest),
}

pub struct Kernel {
    workload: Workload,
    agent: Agent,
    disk: LoopDisk,
}

pub struct Ingest {
    writer: Writer,
}

impl Source {
    /// Root: a loop disk with ext4, mounted, written to by files, captured by an agent.
    pub fn kernel(bins: &Binaries, appliance: &Appliance, dir: &Path) -> Result<Self> {
        let mut disk = LoopDisk::create(&dir.join("disk.img"), LOOP_BYTES)?;
        disk.make_ext4()?;
        let at = dir.join("mnt");
        disk.mount(&at)?;
        let workload = Workload::start(&at, 1, STEP_PAUSE);
        let agent = Agent::start(bins, &dir.join("agent"), appliance)?;
        agent.protect(disk.device(), GROUP)?;
        Ok(Self::Kernel(Box::new(Kernel { workload, agent, disk })))
    }

    /// Anyone: an ext4 image, changed by debugfs, its changed blocks written over NBD.
    pub fn ingest(appliance: &Appliance, dir: &Path) -> Result<Self> {
        appliance.create_ingest(GROUP, &[("disk", IMAGE_BYTES)])?;
        let target = appliance.ingest_target(GROUP, "disk")?;
        let image = ImageDisk::create(dir, IMAGE_BYTES, 1)?;
        Ok(Self::Ingest(Ingest { writer: Writer::start(image, target)? }))
    }

    pub fn describe(&self) -> String {
        match self {
            Self::Kernel(k) => {
                let at = k.disk.mount_point().unwrap_or(k.disk.device());
                format!("{} mounted on {}", k.disk.device().display(), at.display())
            }
            Self::Ingest(i) => i.writer.target.uri(),
        }
    }

    pub fn agent(&mut self) -> Option<&mut Agent> {
        match self {
            Self::Kernel(k) => Some(&mut k.agent),
            Self::Ingest(_) => None,
        }
    }

    /// The group's state when all that was written is on the box or on its way there.
    pub fn steady_state(&self) -> &'static str {
        match self {
            Self::Kernel(_) => "replicating",
            Self::Ingest(_) => "ingest",
        }
    }
    pub fn in_step(&self, state: &str) -> bool {
        match self {
            Self::Kernel(_) => state == self.steady_state(),
            Self::Ingest(i) => state == self.steady_state() && i.writer.rounds() > 0,
        }
    }

    /// Fails when the writer has: nothing of ours may ever fail the disk.
    pub fn check(&mut self) -> Result<()> {
        match self {
            Self::Kernel(k) => k.workload.check(),
            Self::Ingest(i) => i.writer.check(),
        }
    }

    /// How many changes were made so far; grows as long as the writer writes.
    pub fn changes(&self) -> u64 {
        match self {
            Self::Kernel(k) => k.workload.steps(),
            Self::Ingest(i) => i.writer.rounds(),
        }
    }

    /// Holds the disk still, lets `take` make its moment, and copies the content aside as `oracle`.
    pub fn hold<T>(&mut self, oracle: &Path, take: impl FnOnce() -> Result<T>) -> Result<T> {
        match self {
            Self::Kernel(k) => {
                k.disk.freeze()?;
                let taken = take().and_then(|t| copy_sparse(k.disk.backing(), oracle).map(|()| t));
                k.disk.thaw()?;
                taken
            }
            Self::Ingest(i) => {
                let held = i.writer.hold()?;
                let taken = take()?;
                copy_sparse(held.image.path(), oracle)?;
                Ok(taken)
            }
        }
    }

    pub fn end(self) -> Result<()> {
        match self {
            Self::Kernel(kernel) => {
                let Kernel { mut workload, mut agent, mut disk } = *kernel;
                let ended = workload.stop();
                // The capture leaves the kernel with this; a killed agent's would stay for its successor.
                let released = agent.run_cli(&["unprotect", GROUP]).map(drop).context("end the protection");
                let stopped = agent.stop();
                disk.unmount()?;
                ended.and(released).and(stopped)
            }
            Self::Ingest(mut i) => i.writer.stop(),
        }
    }
}

/// What the writer's thread and a holder share.
struct State {
    image: ImageDisk,
    /// All of the image is on the box, flushed.
    sent: bool,
    failed: Option<anyhow::Error>,
}

/// Changes the image and sends what changed until stopped. Survives a box that goes away for a while.
struct Writer {
    target: Export,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(image: ImageDisk, target: Export) -> Result<Self> {
        let state = Arc::new(Mutex::new(State { image, sent: false, failed: None }));
        let stop = Arc::new(AtomicBool::new(false));
        let (state2, stop2, target2) = (state.clone(), stop.clone(), target.clone());
        let thread = thread::spawn(move || {
            let mut client = None;
            while !stop2.load(Ordering::Relaxed) {
                let Ok(mut state) = state2.lock() else { return };
                if let Err(e) = round(&mut state, &mut client, &target2) {
                    state.failed = Some(e);
                    return;
                }
                drop(state);
                thread::sleep(ROUND_PAUSE);
            }
        });
        Ok(Self { target, state, stop, thread: Some(thread) })
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        let Ok(mut state) = self.state.lock() else { bail!("the writer panicked") };
        match state.failed.take() {
            Some(e) => Err(e.context("the writer ended")),
            None => Ok(state),
        }
    }
    fn check(&self) -> Result<()> {
        self.lock().map(drop)
    }
    fn rounds(&self) -> u64 {
        self.state.lock().map_or(0, |s| if s.sent { s.image.rounds() } else { 0 })
    }

    /// Waits until the box has all of the image; no round begins while the guard lives.
    fn hold(&self) -> Result<MutexGuard<'_, State>> {
        wait_for("the image to be on the box", AWAY_MAX, || {
            let state = self.lock()?;
            Ok(state.sent.then_some(state))
        })
    }

    fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            bail!("the writer panicked");
        }
        self.check()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("writer: {e:#}");
        }
    }
}

/// One change of the image, sent. A box that is away is an answer, not an error: what was not flushed is sent again.
fn round(state: &mut State, client: &mut Option<nbd::Client>, target: &Export) -> Result<()> {
    if state.sent {
        state.image.change()?;
        state.sent = false;
    }
    let connected = match client {
        Some(c) => c,
        None => match target.connect() {
            Ok(c) => client.insert(c),
            Err(_) => return Ok(()),
        },
    };
    match state.image.send(connected) {
        Ok(_) => state.sent = true,
        Err(_) => *client = None,
    }
    Ok(())
}
