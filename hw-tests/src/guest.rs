//! QEMU guests: Debian's kernel, a busybox initramfs made here, and a shell on the second serial port.
//!
//! A guest is booted in software emulation (`-accel tcg`): KVM inside a virtual machine hangs on some hosts, and a test
//! that hangs is worth nothing. It runs no service; each step of a test is a command sent by [`Guest::sh`], whose output
//! and status come back. Everything the guest prints on its console is in the log named by [`Guest::log_path`].
//!
//! The kernel comes as a Debian package by `apt-get download` (no root needed), which checks it against the archive's signed index, and
//! is kept in a cache folder. A kernel of another release, Debian's or Ubuntu's, comes by a list of sources of its own in that folder: the
//! system's sources are not touched.

use crate::{
    process::{Program, call, run, wait_for},
    qmp::Qmp,
    tools,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// From power-on to the shell; a busy machine without KVM needs most of it.
pub const BOOT_MAX: Duration = Duration::from_secs(240);
const DOWNLOAD_MAX: Duration = Duration::from_secs(600);
const UNPACK_MAX: Duration = Duration::from_secs(300);
const TOOL_MAX: Duration = Duration::from_secs(60);

/// Debian's kernel, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    root: PathBuf,
    pub version: String,
}

/// A release whose kernel is not the system's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Name of its folder in the cache.
    pub name: &'static str,
    /// Base address and suite.
    archive: &'static str,
    suite: &'static str,
    /// What the kernel is in; empty where `linux-image-amd64` names it.
    packages: &'static [&'static str],
    keys: Keys,
}

/// Who signs an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    Debian,
    /// Ubuntu's keys come as a package of Debian's, signed by Debian.
    Ubuntu,
}

const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Linux 6.12.
pub const BOOKWORM_BACKPORTS: Release = debian("6.12", "http://deb.debian.org/debian", "bookworm-backports");
/// Linux 5.10.
pub const BULLSEYE_SECURITY: Release = debian("5.10", "http://deb.debian.org/debian-security", "bullseye-security");
/// Linux 4.18, which has neither BPF ring buffer nor type information: the last of those that Ubuntu 18.04 had for newer hardware.
pub const UBUNTU_4_18: Release = Release {
    name: "4.18",
    archive: "http://archive.ubuntu.com/ubuntu",
    suite: "bionic-updates",
    packages: &["linux-image-4.18.0-25-generic", "linux-modules-4.18.0-25-generic"],
    keys: Keys::Ubuntu,
};
/// Brings Ubuntu's keys.
const TRIXIE: Release = debian("ubuntu-keys", "http://deb.debian.org/debian", "trixie");

const fn debian(name: &'static str, archive: &'static str, suite: &'static str) -> Release {
    Release { name, archive, suite, packages: &[], keys: Keys::Debian }
}

impl Release {
    /// Options that make apt use this release alone, with all it keeps in `dir`.
    fn apt_options(&self, dir: &Path) -> Result<Vec<String>> {
        fs::create_dir_all(dir.join("lists/partial"))?;
        fs::create_dir_all(dir.join("archives/partial"))?;
        let keys = match self.keys {
            Keys::Debian => PathBuf::from(DEBIAN_KEYS),
            Keys::Ubuntu => ubuntu_keys(&dir.join("keys"))?,
        };
        let keys = keys.display();
        let list = format!("deb [arch=amd64 signed-by={keys}] {} {} main\n", self.archive, self.suite);
        fs::write(dir.join("sources.list"), list)?;
        let at = |name: &str| dir.join(name).display().to_string();
        let pairs = [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "-".to_owned()),
            ("Dir::State::lists", at("lists")),
            ("Dir::Cache", dir.display().to_string()),
            ("APT::Architectures", "amd64".to_owned()),
        ];
        Ok(pairs.into_iter().flat_map(|(key, value)| ["-o".to_owned(), format!("{key}={value}")]).collect())
    }
}

/// The keys of Ubuntu's archive, fetched into `dir`.
fn ubuntu_keys(dir: &Path) -> Result<PathBuf> {
    let keys = dir.join("usr/share/keyrings/ubuntu-archive-keyring.gpg");
    if keys.exists() {
        return Ok(keys);
    }
    let options = TRIXIE.apt_options(&dir.join("apt"))?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    call("apt-get", &[&options[..], &["--quiet=2", "update"]].concat(), DOWNLOAD_MAX)?;
    let packages = Kernel::download(&["ubuntu-keyring"], &dir.join("deb"), &options)?;
    for package in packages {
        call("dpkg-deb", &["-x", &package.to_string_lossy(), &dir.to_string_lossy()], UNPACK_MAX)?;
    }
    ensure!(keys.exists(), "{} is not in Debian's package any more", keys.display());
    Ok(keys)
}

impl Kernel {
    /// The kernel of another release, downloaded once into `cache`.
    pub fn of_release(release: &Release, cache: &Path) -> Result<Self> {
        // Absolute: apt is started in another folder.
        fs::create_dir_all(cache)?;
        let cache = cache.canonicalize()?;
        let _lock = lock(&cache.join("lock"))?;
        let name = format!("linux-image-{}", release.name);
        Self::unpacked(&name, &cache, || {
            let options = release.apt_options(&cache.join(format!("{name}.apt")))?;
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let dir = cache.join(format!("{name}.deb"));
            if Self::kept(&dir)?.is_empty() {
                call("apt-get", &[&options[..], &["--quiet=2", "update"]].concat(), DOWNLOAD_MAX)?;
            }
            match release.packages {
                [] => Self::package("linux-image-amd64", &name, &cache, &options),
                packages => Self::download(packages, &dir, &options),
            }
        })
    }

    /// The kernel that `meta`, e.g. `linux-image-amd64`, stands for; downloaded once into `cache`.
    pub fn debian(meta: &str, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache)?;
        let _lock = lock(&cache.join("lock"))?;
        Self::unpacked(meta, cache, || Self::package(meta, meta, cache, &[]))
    }

    fn unpacked(name: &str, cache: &Path, packages: impl FnOnce() -> Result<Vec<PathBuf>>) -> Result<Self> {
        let root = cache.join(name);
        if !root.join("complete").exists() {
            let packages = packages()?;
            let fresh = cache.join(format!("{name}.unpacking"));
            if fresh.exists() {
                fs::remove_dir_all(&fresh)?;
            }
            fs::create_dir_all(&fresh)?;
            let to = fresh.to_string_lossy();
            for package in packages {
                call("dpkg-deb", &["-x", &package.to_string_lossy(), &to], UNPACK_MAX)?;
            }
            let version = Self::version_in(&fresh)?;
            call("depmod", &["-b", &to, &version], UNPACK_MAX)?;
            File::create(fresh.join("complete"))?;
            if root.exists() {
                fs::remove_dir_all(&root)?;
            }
            fs::rename(&fresh, &root)?;
        }
        Ok(Self { version: Self::version_in(&root)?, root })
    }

    fn version_in(root: &Path) -> Result<String> {
        let modules = root.join("lib/modules");
        let entry = fs::read_dir(&modules)?.next().with_context(|| format!("{} is empty", modules.display()))??;
        entry.file_name().into_string().map_err(|name| anyhow::anyhow!("kernel version {name:?}"))
    }

    /// The packages in a folder of the cache.
    fn kept(dir: &Path) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// The package file, from the cache or from Debian. `options` are for apt.
    fn package(meta: &str, name: &str, cache: &Path, options: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = cache.join(format!("{name}.deb"));
        let kept = Self::kept(&dir)?;
        if !kept.is_empty() {
            return Ok(kept);
        }
        let depends = call("apt-cache", &[options, &["depends", meta]].concat(), TOOL_MAX)?;
        let real = depends.stdout.lines().find_map(|l| l.trim().strip_prefix("Depends: linux-image-"));
        let real = real.with_context(|| format!("apt knows no kernel behind {meta}: run apt-get update"))?;
        Self::download(&[&format!("linux-image-{real}")], &dir, options)
    }

    /// Packages by name, from the folder or from where apt has them. All of them or none are in the folder.
    fn download(packages: &[&str], dir: &Path, options: &[&str]) -> Result<Vec<PathBuf>> {
        let kept = Self::kept(dir)?;
        if kept.len() == packages.len() {
            return Ok(kept);
        }
        let mut download = Command::new(tools::need("apt-get")?);
        download.args(options).arg("download").args(packages).current_dir(dir);
        run(download, DOWNLOAD_MAX)?.ok()?;
        let kept = Self::kept(dir)?;
        ensure!(kept.len() == packages.len(), "apt-get brought {kept:?} for {packages:?}");
        Ok(kept)
    }

    /// The unpacked package: `boot/`, `lib/modules/`.
    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The files of a module and of what it depends on, in loading order. None for one built into the kernel.
    fn module_files(&self, module: &str) -> Result<Vec<PathBuf>> {
        let root = self.root.to_string_lossy();
        let listed = call("modprobe", &["-d", &root, "-S", &self.version, "--show-depends", module], TOOL_MAX)?;
        let insmod =
            |l: &str| l.strip_prefix("insmod ").map(|f| PathBuf::from(f.split_whitespace().next().unwrap_or("")));
        Ok(listed.stdout.lines().filter_map(insmod).collect())
    }
}

/// Held as long as the answer lives; others wait.
pub(crate) fn lock(path: &Path) -> Result<File> {
    let file = File::create(path)?;
    // SAFETY: flock takes a descriptor we own for as long as `file` lives.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("lock {}", path.display()));
    }
    Ok(file)
}

/// What goes into a guest's initramfs.
#[derive(Debug, Default)]
pub struct Initramfs {
    files: BTreeMap<String, (u32, Vec<u8>)>,
    modules: Vec<String>,
    /// Process 1, where it is not the one of the tests' guests.
    init: Option<String>,
}

/// Loaded in every guest.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4"];

impl Initramfs {
    /// Busybox and the modules every guest has.
    pub fn new(kernel: &Kernel) -> Result<Self> {
        let mut this = Self::default();
        this.file("bin/busybox", 0o755, fs::read(tools::need("busybox")?)?);
        for module in MODULES {
            this.module(kernel, module)?;
        }
        Ok(this)
    }
    /// Nothing but a process 1 of the caller's.
    pub fn bare(init: String) -> Self {
        Self { init: Some(init), ..Self::default() }
    }
    pub fn file(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        self.files.insert(path.to_owned(), (0o100_000 | mode, bytes));
    }
    pub fn module(&mut self, kernel: &Kernel, name: &str) -> Result<()> {
        for file in kernel.module_files(name)? {
            let base = file
                .file_name()
                .with_context(|| format!("module file {}", file.display()))?
                .to_string_lossy()
                .into_owned();
            // Newer kernels come with compressed modules, which busybox cannot load.
            let (base, bytes) = match base.strip_suffix(".xz") {
                Some(plain) => (plain.to_owned(), unpack_xz(&file)?),
                None => (base, fs::read(&file)?),
            };
            if !self.modules.contains(&base) {
                self.file(&format!("modules/{base}"), 0o644, bytes);
                self.modules.push(base);
            }
        }
        Ok(())
    }
    /// A program of this machine with the libraries it is linked to, in `/programs`. It is called by that path:
    /// busybox prefers its own.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        let name =
            path.file_name().with_context(|| format!("program {}", path.display()))?.to_string_lossy().into_owned();
        self.file(&format!("programs/{name}"), 0o755, fs::read(path)?);
        // ldd fails for a static program: then there is nothing more to take along.
        let mut ldd = Command::new(tools::need("ldd")?);
        ldd.arg(path);
        let listed = run(ldd, TOOL_MAX)?;
        for word in listed.stdout.split_whitespace().filter(|w| w.starts_with('/')) {
            self.file(word.trim_start_matches('/'), 0o755, fs::read(word).with_context(|| format!("library {word}"))?);
        }
        Ok(())
    }

    /// Writes the archive the kernel unpacks (cpio, "newc").
    pub fn write(&self, to: &Path) -> Result<()> {
        let mut out = Vec::new();
        let mut dirs = BTreeSet::new();
        let fixed =
            ["bin", "dev", "etc", "proc", "sys", "tmp", "run", "mnt", "root", "var", "modules"].map(String::from);
        for path in self.files.keys().chain(&fixed) {
            let parts: Vec<&str> = path.split('/').collect();
            dirs.extend((1..parts.len()).map(|n| parts[..n].join("/")));
        }
        dirs.extend(fixed);
        for dir in &dirs {
            cpio_entry(&mut out, dir, 0o040_755, &[]);
        }
        for (path, (mode, bytes)) in &self.files {
            cpio_entry(&mut out, path, *mode, bytes);
        }
        cpio_entry(&mut out, "init", 0o100_755, self.init().as_bytes());
        cpio_entry(&mut out, "TRAILER!!!", 0, &[]);
        fs::write(to, out).with_context(|| format!("write {}", to.display()))
    }

    fn init(&self) -> String {
        if let Some(init) = &self.init {
            return init.clone();
        }
        let insmods: String = self.modules.iter().map(|m| format!("insmod /modules/{m}\n")).collect();
        INIT.replace("INSMODS\n", &insmods)
    }
}

fn unpack_xz(file: &Path) -> Result<Vec<u8>> {
    let out = Command::new(tools::need("xz")?).arg("-dc").arg(file).output()?;
    ensure!(out.status.success(), "xz -dc {}: {}", file.display(), String::from_utf8_lossy(&out.stderr));
    Ok(out.stdout)
}

/// Runs as process 1: file systems, modules, network, then commands from the second serial port, one per line:
/// a number, a space, the command. The answer is its output and a line `HF-END number status`. `head` reads the line, not the shell's own
/// `read`: busybox's begins anew when a child of the shell ends meanwhile, and forgets what it has read of the line.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /sys/fs/bpf /sys/kernel/debug /var/lock
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
INSMODS
ip link set lo up
ip link set eth0 up 2>/dev/null && ip addr add 10.0.2.15/24 dev eth0 && ip route add default via 10.0.2.2
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo HF-SHELL >&3
while command=$(head -n 1 <&3) && [ -n "$command" ]; do
	number=${command%% *} line=${command#* }
	eval "$line" >/tmp/output 2>&1 </dev/null
	status=$?
	cat /tmp/output >&3
	printf '\nHF-END %s %s\n' "$number" "$status" >&3
done
"#;

/// One file of a "newc" archive.
fn cpio_entry(out: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) {
    let inode = out.len() as u32 + 1;
    let fields = [inode, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    out.extend(b"070701");
    fields.iter().for_each(|f| out.extend(format!("{f:08x}").bytes()));
    out.extend(name.bytes().chain([0]));
    pad(out);
    out.extend(bytes);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A running guest; powered off hard when dropped.
#[derive(Debug)]
pub struct Guest {
    qemu: Program,
    shell: UnixStream,
    pub qmp: Qmp,
    /// What came from the shell and has not been handed out.
    unread: String,
    commands: u64,
}

impl Guest {
    /// Boots with `args` added to QEMU's command line: disks and networks.
    pub fn boot(kernel: &Kernel, initramfs: &Initramfs, dir: &Path, args: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let archive = dir.join("initramfs");
        initramfs.write(&archive)?;
        fs::set_permissions(&archive, fs::Permissions::from_mode(0o600))?;
        let mut all = vec!["-no-reboot".to_owned(), "-kernel".to_owned(), kernel.image().display().to_string()];
        all.extend(["-initrd".to_owned(), archive.display().to_string()]);
        let line = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on";
        all.extend(["-append".to_owned(), line.to_owned()]);
        all.extend(args.iter().map(|a| (*a).to_owned()));
        Self::power_on(dir, &all)
    }

    /// Starts a machine that boots from what `args` give it, and waits for its shell.
    pub fn power_on(dir: &Path, args: &[String]) -> Result<Self> {
        let mut guest = Self::switch_on(dir, args)?;
        guest.wait_shell()?;
        Ok(guest)
    }

    /// Starts a machine that boots from what `args` give it, and waits for nothing in it.
    pub fn switch_on(dir: &Path, args: &[String]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let at = |name: &str| dir.join(name);
        for socket in ["qmp", "shell"] {
            if at(socket).exists() {
                fs::remove_file(at(socket))?;
            }
        }
        let mut command = Command::new(tools::need("qemu-system-x86_64")?);
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768"]);
        command.args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
        let socket = |name: &str| format!("socket,id={name},path={},server=on,wait=off", at(name).display());
        command.args(["-chardev", &socket("shell"), "-serial", "chardev:shell"]);
        command.args(["-chardev", &socket("qmp"), "-mon", "chardev=qmp,mode=control"]);
        command.args(args);
        let mut qemu = Program::start("qemu", command, &at("console.log"))?;
        let mut connect = |name: &str| {
            wait_for(&format!("QEMU's socket {name}"), TOOL_MAX, || {
                qemu.expect_running()?;
                Ok(UnixStream::connect(at(name)).ok())
            })
        };
        let (shell, qmp) = (connect("shell")?, Qmp::over(connect("qmp")?)?);
        Ok(Self { qemu, shell, qmp, unread: String::new(), commands: 0 })
    }

    /// Waits for words on the second serial port and answers them with a line, as somebody who sits there does.
    pub fn answer(&mut self, words: &str, line: &str, limit: Duration) -> Result<()> {
        self.until(words, limit).with_context(|| format!("nobody has asked for {words:?}"))?;
        Ok(self.shell.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Waits for the shell of a boot that is under way.
    pub fn wait_shell(&mut self) -> Result<()> {
        self.until("HF-SHELL\n", BOOT_MAX).context("the guest did not come up").map(drop)
    }

    /// Waits until the guest has switched itself off.
    pub fn wait_end(mut self, limit: Duration) -> Result<()> {
        let status = self.qemu.wait(limit)?;
        ensure!(status.success(), "QEMU ended with {status}:\n{}", self.qemu.tail());
        Ok(())
    }

    pub fn log_path(&self) -> &Path {
        self.qemu.log_path()
    }

    /// Runs a command in the guest and returns its output; fails when it fails.
    pub fn sh(&mut self, line: &str, limit: Duration) -> Result<String> {
        ensure!(!line.contains('\n'), "a command is one line");
        self.commands += 1;
        let number = self.commands;
        self.shell.write_all(format!("{number} {line}\n").as_bytes())?;
        let mark = format!("\nHF-END {number} ");
        let output = self.until(&mark, limit).with_context(|| format!("in the guest: {line}"))?;
        let status = self.until("\n", TOOL_MAX)?;
        match status.trim() {
            "0" => Ok(output),
            failed => bail!("in the guest: {line}: status {failed}:\n{output}"),
        }
    }

    /// The power goes: nothing in the guest's caches survives.
    pub fn power_off(mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// Takes what the shell has sent up to and with `mark`; returns what was before it.
    fn until(&mut self, mark: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        self.shell.set_read_timeout(Some(Duration::from_millis(200)))?;
        loop {
            if let Some(at) = self.unread.find(mark) {
                let before = self.unread[..at].to_owned();
                self.unread.drain(..at + mark.len());
                return Ok(before);
            }
            let mut buffer = [0; 4096];
            match self.shell.read(&mut buffer) {
                Ok(0) => bail!("the guest is gone; its console said:\n{}", self.qemu.tail()),
                Ok(n) => self.unread += &String::from_utf8_lossy(&buffer[..n]).replace('\r', ""),
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).context("read from the guest"),
            }
            if Instant::now() > end {
                let heard = &self.unread;
                bail!(
                    "no answer within {} s; heard {heard:?}; its console said:\n{}",
                    limit.as_secs(),
                    self.qemu.tail()
                );
            }
        }
    }
}

/// Carries TCP connections from a guest to a unix socket of this machine, as a tunnel would. Loopback only; ends when dropped.
#[derive(Debug)]
pub struct Bridge {
    port: u16,
    stop: Arc<AtomicBool>,
}

impl Bridge {
    pub fn to(socket: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (stop, socket) = (Arc::new(AtomicBool::new(false)), socket.to_owned());
        let stopped = stop.clone();
        thread::spawn(move || {
            for arrived in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(e) = arrived.map_err(Into::into).and_then(|guest| carry(guest, &socket)) {
                    eprintln!("bridge to {}: {e:#}", socket.display());
                }
            }
        });
        Ok(Self { port, stop })
    }
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener; if it is already gone, so much the better.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn carry(guest: TcpStream, socket: &Path) -> Result<()> {
    let ours = UnixStream::connect(socket).with_context(|| format!("connect {}", socket.display()))?;
    guest.set_nodelay(true)?;
    let (mut from_guest, mut to_guest) = (guest.try_clone()?, guest);
    let (mut from_us, mut to_us) = (ours.try_clone()?, ours);
    // Either end's close is passed on; what is then unsent has nobody left to read it.
    thread::spawn(move || {
        drop(io::copy(&mut from_guest, &mut to_us));
        drop(to_us.shutdown(Shutdown::Both));
    });
    thread::spawn(move || {
        drop(io::copy(&mut from_us, &mut to_guest));
        drop(to_guest.shutdown(Shutdown::Both));
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_one_cpio_can_list() {
        let mut initramfs = Initramfs::default();
        initramfs.file("a/b/deep", 0o755, b"bytes".to_vec());
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("archive");
        initramfs.write(&archive).unwrap();
        let bytes = fs::read(&archive).unwrap();
        // Walk it as the kernel does: each header names the lengths that lead to the next.
        let (mut at, mut names) = (0, Vec::new());
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701", "at {at}");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + n * 8..at + 14 + n * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (size, name_len) = (field(6), field(11));
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_len - 1].to_vec()).unwrap();
            if name == "TRAILER!!!" {
                break;
            }
            names.push(name);
            at = ((at + 110 + name_len).next_multiple_of(4) + size).next_multiple_of(4);
        }
        let place =
            |n: &str| names.iter().position(|x| x == n).unwrap_or_else(|| panic!("{n} is missing in {names:?}"));
        assert!(place("a") < place("a/b") && place("a/b") < place("a/b/deep"), "{names:?}");
        assert!(place("init") > place("bin"));
    }
}
