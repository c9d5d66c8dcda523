//! What the root tests share: loop disks, mounts and capture runs that clean up after themselves, also on failure.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod agent;
pub mod fakebox;

use agent_linux::capture::{
    Capture, Captured, DevNo, Op, Request, Target,
    bpf::{BpfCapture, Options, Pins},
};
use model::{Extent, MonoTime};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Whether this test can run; prints why not.
pub fn root(test: &str) -> bool {
    // SAFETY: no preconditions.
    let ok = unsafe { libc::geteuid() } == 0;
    if !ok {
        println!("SKIPPED: {test}: needs root (loop devices, mounts, BPF)");
    }
    ok
}

pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        out.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A loop device on a file of its own; both are gone at drop.
pub struct Loop {
    pub device: PathBuf,
    pub file: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

impl Loop {
    pub fn new(mib: u64) -> Self {
        Self::with_dir(mib, tempfile::Builder::new().prefix("hf-loop-").tempdir_in("/dev/shm").unwrap())
    }
    fn with_dir(mib: u64, dir: tempfile::TempDir) -> Self {
        let file = dir.path().join("disk.img");
        Self::over(file, mib, Some(dir))
    }
    /// A loop device on a file at a place of the caller's choice, who sees to its removal.
    pub fn on(file: &Path, mib: u64) -> Self {
        Self::over(file.to_owned(), mib, None)
    }
    fn over(file: PathBuf, mib: u64, dir: Option<tempfile::TempDir>) -> Self {
        File::create(&file).unwrap().set_len(mib << 20).unwrap();
        let device = PathBuf::from(run("losetup", &["-f", "--show", file.to_str().unwrap()]));
        Self { device, file, _dir: dir }
    }
    /// Takes the device away and brings it back under the same name, with the kernel's counters at zero.
    pub fn replug(&self) {
        use std::os::fd::AsRawFd;
        const LOOP_CTL_ADD: libc::c_ulong = 0x4c80;
        const LOOP_CTL_REMOVE: libc::c_ulong = 0x4c81;
        run("losetup", &["-d", self.dev()]);
        let number: libc::c_long = self.dev().trim_start_matches("/dev/loop").parse().unwrap();
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        // The last user may be a probe of udev's.
        // SAFETY: a valid descriptor and a number.
        while unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_REMOVE, number) } < 0 {
            assert!(Instant::now() < deadline, "{}: {}", self.dev(), io::Error::last_os_error());
            std::thread::sleep(Duration::from_millis(20));
        }
        // SAFETY: as above.
        let added = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_ADD, number) };
        assert!(added >= 0, "{}: {}", self.dev(), io::Error::last_os_error());
        run("losetup", &[self.dev(), self.file.to_str().unwrap()]);
    }
    /// A loop device on a copy of `image`.
    pub fn of_image(image: &[u8]) -> Self {
        let dir = tempfile::Builder::new().prefix("hf-loop-").tempdir_in("/dev/shm").unwrap();
        let this = Self::with_dir(image.len() as u64 >> 20, dir);
        let file = OpenOptions::new().write(true).open(&this.file).unwrap();
        // Holes stay holes: most of an image is empty.
        const PIECE: usize = 65536;
        for (i, piece) in image.chunks(PIECE).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
            file.write_all_at(piece, (i * PIECE) as u64).unwrap();
        }
        this
    }
    pub fn dev(&self) -> &str {
        self.device.to_str().unwrap()
    }
    pub fn no(&self) -> DevNo {
        let rdev = std::fs::metadata(&self.device).unwrap().rdev();
        DevNo { major: libc::major(rdev), minor: libc::minor(rdev) }
    }
    pub fn sectors(&self) -> u64 {
        std::fs::metadata(&self.file).unwrap().len() / 512
    }
    pub fn target(&self) -> Target {
        Target { disk: self.no(), sectors: self.sectors(), ranges: vec![Extent::new(0, self.sectors())], skips: vec![] }
    }
    /// Bytes written to the device so far, by anybody.
    pub fn written(&self) -> u64 {
        let stat =
            std::fs::read_to_string(format!("/sys/block/{}/stat", self.dev().trim_start_matches("/dev/"))).unwrap();
        stat.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
    }
    /// What the disk holds, once everything written has reached it.
    pub fn image(&self) -> Vec<u8> {
        run("blockdev", &["--flushbufs", self.dev()]);
        std::fs::read(&self.file).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A device that is still busy for a moment is detached by the kernel once it is free.
        let out = Command::new("losetup").arg("-d").arg(&self.device).output();
        if !out.as_ref().is_ok_and(|o| o.status.success()) {
            eprintln!("losetup -d {}: {out:?}", self.device.display());
        }
    }
}

pub struct Mount {
    pub at: PathBuf,
    _dir: tempfile::TempDir,
}

impl Mount {
    pub fn new(device: &Path) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("hf-mnt-").tempdir().unwrap();
        let at = dir.path().join("m");
        std::fs::create_dir(&at).unwrap();
        let out = Command::new("mount").arg(device).arg(&at).output()?;
        if !out.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&out.stderr).into_owned()));
        }
        Ok(Self { at, _dir: dir })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let out = Command::new("umount").arg(&self.at).output();
        if !out.as_ref().is_ok_and(|o| o.status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.at).output();
        }
    }
}

/// A pin directory of this test's own.
pub struct PinDir(pub PathBuf);

impl PinDir {
    pub fn new(test: &str) -> Self {
        let dir = Self(PathBuf::from(format!("/sys/fs/bpf/holdfast-test-{}-{test}", std::process::id())));
        dir.clear();
        dir
    }
    fn clear(&self) {
        if let Some(pins) = Pins::existing(&self.0)
            && let Err(e) = pins.remove()
        {
            eprintln!("{e}");
        }
    }
    pub fn options(&self, ring_mib: u32) -> Options {
        Options { pins: self.0.clone(), ring_bytes: ring_mib << 20 }
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        self.clear();
    }
}

pub fn start(pins: &PinDir, ring_mib: u32, disk: &Loop) -> BpfCapture {
    let mut capture = BpfCapture::start(&pins.options(ring_mib), Some((&disk.device, disk.no()))).unwrap_or_else(|e| {
        panic!("{}", agent_linux::error_chain(&e));
    });
    capture.set_targets(&[disk.target()]).unwrap();
    capture
}

pub fn mono() -> MonoTime {
    agent_linux::clock::mono()
}

/// Polls until everything issued so far has been handed out.
pub fn drain(capture: &mut dyn Capture, out: &mut Vec<Captured>) {
    let barrier = capture.barrier().now();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let polled = capture.poll(64 << 20, true, mono(), out).unwrap();
        capture.release(polled.position);
        if polled.position >= barrier && !polled.more {
            return;
        }
        assert!(Instant::now() < deadline, "the ring does not drain");
    }
}

/// Replays requests into an image.
pub fn apply(image: &mut [u8], request: &Request) {
    let mut at = 0;
    for extent in &request.extents {
        let (start, len) = (extent.lba.bytes() as usize, extent.bytes() as usize);
        match request.op {
            Op::Write => {
                image[start..start + len].copy_from_slice(&request.data[at..at + len]);
                at += len;
            }
            Op::Zero | Op::Discard => image[start..start + len].fill(0),
            Op::Flush => {}
        }
    }
}

pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    assert_eq!(a.len(), b.len());
    a.chunks(65536)
        .zip(b.chunks(65536))
        .enumerate()
        .find(|(_, (x, y))| x != y)
        .map(|(i, (x, y))| i * 65536 + x.iter().zip(y).position(|(p, q)| p != q).unwrap_or(0))
}

pub fn fio(dir: &Path, args: &[&str]) {
    let directory = format!("--directory={}", dir.display());
    let mut all = vec![directory.as_str(), "--minimal", "--allow_file_create=1"];
    all.extend_from_slice(args);
    run("fio", &all);
}

/// Writes A, makes it durable, then writes B: in every crash image A is at B or one ahead.
pub fn write_ordered(dir: &Path, count: u64) {
    let open = |name: &str| OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(name)).unwrap();
    let (a, b) = (open("A"), open("B"));
    for i in 1..=count {
        let mut block = vec![0u8; 4096];
        block[..8].copy_from_slice(&i.to_le_bytes());
        a.write_all_at(&block, 0).unwrap();
        a.sync_data().unwrap();
        b.write_all_at(&block, 0).unwrap();
        b.sync_data().unwrap();
    }
}

/// A and B as a mounted image shows them; None for a file that is not there yet.
pub fn read_ordered(dir: &Path) -> (Option<u64>, Option<u64>) {
    let read = |name: &str| {
        let bytes = std::fs::read(dir.join(name)).ok()?;
        Some(bytes.get(..8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap())))
    };
    (read("A"), read("B"))
}

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}
