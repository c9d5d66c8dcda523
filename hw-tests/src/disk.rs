//! Loop disks with a file system and a workload on them. Needs root.

use crate::{
    Draw,
    process::{self, call},
    tools,
};
use anyhow::{Context, Result, bail};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

const TOOL_MAX: Duration = Duration::from_secs(60);

/// Copies a file without the holes' bytes.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    call("cp", &["--sparse=always", "--reflink=auto", &text(from), &text(to)], TOOL_MAX).map(drop)
}

/// A loop device over a sparse file; detached when dropped, unmounted before that.
#[derive(Debug)]
pub struct LoopDisk {
    backing: PathBuf,
    device: PathBuf,
    mounted: Option<PathBuf>,
    frozen: bool,
}

impl LoopDisk {
    pub fn create(backing: &Path, bytes: u64) -> Result<Self> {
        let file = File::create(backing).with_context(|| format!("create {}", backing.display()))?;
        file.set_len(bytes)?;
        Self::over(backing)
    }

    /// Over a file that is there.
    pub fn over(backing: &Path) -> Result<Self> {
        let made = call("losetup", &["--find", "--show", &text(backing)], TOOL_MAX)?;
        let device = PathBuf::from(made.stdout.trim());
        if !device.starts_with("/dev") {
            bail!("losetup answered {:?}", made.stdout);
        }
        Ok(Self { backing: backing.to_owned(), device, mounted: None, frozen: false })
    }
    pub fn device(&self) -> &Path {
        &self.device
    }
    pub fn backing(&self) -> &Path {
        &self.backing
    }
    pub fn mount_point(&self) -> Option<&Path> {
        self.mounted.as_deref()
    }

    pub fn make_ext4(&self) -> Result<()> {
        // No lazy initialisation: a kernel thread writing inode tables for minutes would be a second workload.
        let lazy = "lazy_itable_init=0,lazy_journal_init=0";
        call("mke2fs", &["-q", "-t", "ext4", "-F", "-E", lazy, &text(&self.device)], TOOL_MAX).map(drop)
    }
    pub fn mount(&mut self, at: &Path) -> Result<()> {
        fs::create_dir_all(at)?;
        call("mount", &[&text(&self.device), &text(at)], TOOL_MAX)?;
        self.mounted = Some(at.to_owned());
        Ok(())
    }
    pub fn unmount(&mut self) -> Result<()> {
        self.thaw()?;
        if let Some(at) = self.mounted.take() {
            call("umount", &[&text(&at)], TOOL_MAX)?;
        }
        Ok(())
    }

    /// Everything written so far is on the device, and nothing more comes until [`thaw`](Self::thaw).
    pub fn freeze(&mut self) -> Result<()> {
        let at = self.mounted.as_deref().context("nothing is mounted")?;
        call("fsfreeze", &["--freeze", &text(at)], TOOL_MAX)?;
        self.frozen = true;
        Ok(())
    }
    pub fn thaw(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.frozen) {
            return Ok(());
        }
        let at = self.mounted.as_deref().context("nothing is mounted")?;
        call("fsfreeze", &["--unfreeze", &text(at)], TOOL_MAX).map(drop)
    }

    fn take_down(&mut self) -> Result<()> {
        let unmounted = self.unmount();
        call("losetup", &["--detach", &text(&self.device)], TOOL_MAX)?;
        unmounted
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if let Err(e) = self.take_down() {
            eprintln!("{} was not taken down: {e:#}", self.device.display());
        }
    }
}

/// Whether loop disks can be had here; why not otherwise.
pub fn loop_disks_work() -> Result<(), String> {
    if !tools::is_root() {
        return Err("needs root".into());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("this kernel has no loop devices (/dev/loop-control is missing)".into());
    }
    Ok(())
}

/// Whether the kernel's capture can be had here; why not otherwise.
pub fn capture_works() -> Result<(), String> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    if !tools::is_root() {
        return Err("needs root".into());
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
    if effective.is_none_or(|e| e & CAP_SYS_ADMIN == 0) {
        return Err("root, but without CAP_SYS_ADMIN: a container?".into());
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err("this kernel has no type information (/sys/kernel/btf/vmlinux is missing)".into());
    }
    Ok(())
}

/// Checks a file system image; journal replay first when `replay`, as a mount after a crash would.
pub fn check_ext4(image: &Path, replay: bool) -> Result<()> {
    let e2fsck = tools::need("e2fsck")?;
    let mut rounds = vec!["-fn"];
    if replay {
        rounds.insert(0, "-fy");
    }
    for (round, flags) in rounds.iter().enumerate() {
        let mut command = Command::new(&e2fsck);
        command.arg(flags).arg(image);
        let done = process::run(command, TOOL_MAX)?;
        // Bit 0 says "errors corrected": replaying the journal counts as that, in the first round only.
        let well = match done.status.code() {
            Some(0) => true,
            Some(1) => replay && round == 0 && !done.stdout.contains("UNEXPECTED INCONSISTENCY"),
            _ => false,
        };
        if !well {
            bail!("e2fsck {flags} {} ended with {}:\n{}{}", image.display(), done.status, done.stdout, done.stderr);
        }
    }
    Ok(())
}

/// Writes, fsyncs, overwrites, renames and removes files until stopped.
///
/// Every tenth step counts up file `A` and fsyncs it, then file `B`: at any moment of history A ≥ B ≥ A - 1.
#[derive(Debug)]
pub struct Workload {
    stop: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Workload {
    /// `pause` between steps sets the rate.
    pub fn start(dir: &Path, seed: u64, pause: Duration) -> Self {
        let (stop, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (dir, stop2, steps2) = (dir.to_owned(), stop.clone(), steps.clone());
        let thread = thread::spawn(move || {
            let mut draw = Draw::new(seed);
            while !stop2.load(Ordering::Relaxed) {
                let step = steps2.load(Ordering::Relaxed);
                one_step(&dir, step, &mut draw).with_context(|| format!("workload in {}", dir.display()))?;
                steps2.store(step + 1, Ordering::Relaxed);
                thread::sleep(pause);
            }
            Ok(())
        });
        Self { stop, steps, thread: Some(thread) }
    }
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }
    /// Fails when the workload has: the protected disk must never see an error of ours.
    pub fn check(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.stop().context("the workload ended by itself")
        } else {
            Ok(())
        }
    }
    pub fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the workload panicked"),
        }
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("workload: {e:#}");
        }
    }
}

/// How many files the workload keeps at most.
const FILES: u64 = 48;
/// Largest file it writes.
const FILE_BYTES_MAX: u64 = 256 << 10;

fn one_step(dir: &Path, step: u64, draw: &mut Draw) -> Result<()> {
    if step.is_multiple_of(10) {
        for name in ["A", "B"] {
            let file = OpenOptions::new().create(true).write(true).truncate(false).open(dir.join(name))?;
            file.write_all_at(format!("{:020}", step / 10).as_bytes(), 0)?;
            file.sync_data()?;
        }
    }
    let path = dir.join(format!("file-{}", draw.below(FILES)));
    match draw.below(10) {
        0..4 => {
            let mut bytes = vec![0; draw.below(FILE_BYTES_MAX) as usize + 1];
            draw.fill(&mut bytes);
            let mut file = File::create(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
        }
        4..8 => {
            if let Ok(file) = OpenOptions::new().write(true).open(&path) {
                let mut bytes = vec![0; 4096];
                draw.fill(&mut bytes);
                file.write_all_at(&bytes, draw.below(FILE_BYTES_MAX / 4096) * 4096)?;
                if draw.below(2) == 0 {
                    file.sync_data()?;
                }
            }
        }
        8 => {
            if path.exists() {
                fs::rename(&path, dir.join(format!("file-{}", draw.below(FILES))))?;
            }
        }
        _ => {
            if path.exists() {
                fs::remove_file(&path)?;
            }
        }
    }
    Ok(())
}

/// The two counters of the workload in a file-system image: (A, B).
pub fn counters(image: &Path) -> Result<(u64, u64)> {
    let read = |name: &str| -> Result<u64> {
        let done = call("debugfs", &["-R", &format!("cat /{name}"), &text(image)], TOOL_MAX)?;
        done.stdout.trim().parse().with_context(|| format!("counter {name} reads {:?}", done.stdout))
    };
    Ok((read("A")?, read("B")?))
}

pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
