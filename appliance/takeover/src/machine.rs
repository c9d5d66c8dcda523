//! A machine: QEMU with a group's disks, started so that it outlives the daemon, and taken up again by the next one.
//!
//! ```text
//! daemon ── QMP socket ──▶ qemu-system-x86_64 ── NBD over unix sockets ──▶ daemon's exports of the branch
//!                            │ org.holdfast.0 (virtio-serial) ◀──▶ the agent inside, if the host has one
//!                            └ serial.log, screen (QMP screendump)
//! ```
//!
//! # Invariants
//!
//! - **What the guest was told is written is in the journal.** The disks have no write cache (`cache.writeback=off`): each write
//!   is answered when it is durable. So the daemon may be killed and come back at any time; QEMU connects again (`reconnect-delay`) and
//!   repeats only what was not answered. Meanwhile the guest's I/O waits.
//! - A write that finds no room, or a disk that fails, stops the machine (`werror=stop`, `rerror=stop`) and loses nothing; it goes on when
//!   told to.
//! - The machine knows that it is one: SMBIOS says so ([`MARKER`]), and the agent inside does not capture.
//! - A drill's machine has a network of its own with no way out, not even to the box.
//!
//! # Outside of the daemon
//!
//! The daemon's service may do very little, and a machine must not end with it. Where the unit says `HOLDFAST_MACHINES=systemd`, machines
//! (`holdfast-machine-ID.service`), the commands that plug them into bridges, and hooks are started by systemd in units of their own
//! ([`outside`]); elsewhere they are started by the daemon itself, in process groups of their own.
//!
//! # What must be there
//!
//! `qemu-system-x86_64` 7.1 or newer (screens as PNG), and for UEFI the OVMF firmware. Hardware acceleration is used when it truly works:
//! [`kvm_works`] runs a guest instruction, for a device node alone says nothing.

use crate::{
    plan::{DiskModel, Firmware, Mac, NicModel, Size},
    qmp::{Qmp, QmpError},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// The program, as found in `PATH`.
pub const QEMU: &str = "qemu-system-x86_64";
/// SMBIOS OEM string by which what runs inside knows that it was taken over.
pub const MARKER: &str = "holdfast.takeover";
/// What a drill's machine is told that it is.
pub const DRILL: &str = "drill";
/// The virtio-serial port of the agent inside.
pub const PORT: &str = "org.holdfast.0";
/// Where Debian and Buildroot put the UEFI firmware.
const OVMF: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];
/// A guest's I/O waits so long for a daemon that is away, in seconds; then it gets errors, which stop the machine.
const RECONNECT_SECONDS: u32 = 3600;
/// From the start of the program to its control socket.
const START_MAX: Duration = Duration::from_secs(20);
/// A guest of one sector that does not end in this is one that hangs.
const KVM_PROBE_MAX: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{QEMU} is not installed on this box: apt-get install qemu-system-x86")]
    NoQemu,
    #[error("the firmware for UEFI machines is not installed on this box: apt-get install ovmf")]
    NoFirmware,
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("could not start {QEMU}")]
    Spawn(#[source] io::Error),
    #[error("the machine ended while it was being started: {log}")]
    Ended { log: String },
    #[error("the machine did not open its control socket within {} s: {log}", START_MAX.as_secs())]
    Silent { log: String },
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// One disk of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineDisk {
    pub socket: PathBuf,
    pub export: String,
    /// Shown to the guest as the disk's serial number; at most 20 bytes are.
    pub serial: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Wire {
    /// A port of a bridge of the box.
    Bridge(String),
    /// A network of its own, with no way out.
    Isolated,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineNic {
    pub mac: Mac,
    pub wire: Wire,
}

/// A command that is started where the daemon's own limits do not hold: in a unit of systemd's, whose standard streams are ours and
/// for whose end is waited; or, where the daemon has no such limits, as it is.
pub fn outside(program: &str) -> Command {
    if !by_systemd() {
        return Command::new(program);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--collect", "--wait", "--pipe", "--", program]);
    command
}

fn by_systemd() -> bool {
    std::env::var_os("HOLDFAST_MACHINES").is_some_and(|how| how == "systemd")
}

/// All that a machine is made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineSpec {
    /// For people: the process's name.
    pub name: String,
    /// A folder of its own, for sockets, logs and firmware variables; a short path, for sockets.
    pub dir: PathBuf,
    pub size: Size,
    pub firmware: Firmware,
    pub disk_model: DiskModel,
    pub nic_model: NicModel,
    /// In this order; the firmware tries the first one first.
    pub disks: Vec<MachineDisk>,
    pub nics: Vec<MachineNic>,
    /// Said to the guest behind [`MARKER`].
    pub marker: String,
    pub kvm: bool,
}

impl MachineSpec {
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp")
    }
    pub fn port_socket(&self) -> PathBuf {
        self.dir.join("port")
    }
    pub fn serial_log(&self) -> PathBuf {
        self.dir.join("serial.log")
    }
    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }
    /// Locked as long as the machine lives: it is its standard input.
    fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }
    fn own_log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }
    fn vars(&self) -> PathBuf {
        self.dir.join("vars.fd")
    }

    /// What starts it.
    fn command(&self) -> Command {
        let mut command = if by_systemd() {
            let mut command = Command::new("systemd-run");
            let run = self.dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            command.args(["--quiet", "--collect", &format!("--unit=holdfast-machine-{run}")]);
            command.args([
                "--property=KillMode=mixed",
                &format!("--property=StandardError=append:{}", self.own_log().display()),
            ]);
            command.args(["--", QEMU]);
            command
        } else {
            Command::new(QEMU)
        };
        command.args(self.arguments());
        command
    }

    /// The arguments, for a machine that is stopped before its first instruction.
    pub fn arguments(&self) -> Vec<String> {
        let path = |p: PathBuf| escaped(&p.to_string_lossy());
        let mut args: Vec<String> = Vec::new();
        let mut add = |list: &[&str]| args.extend(list.iter().map(|a| (*a).to_owned()));
        let accel = if self.kvm { "kvm" } else { "tcg,thread=multi" };
        let cpu = if self.kvm { "host" } else { "max" };
        add(&["-name", &format!("{},process=holdfast-{}", escaped(&self.name), escaped(&self.name))]);
        add(&["-nodefaults", "-no-user-config", "-S", "-machine", "q35,usb=off", "-accel", accel, "-cpu", cpu]);
        add(&["-smp", &self.size.cpus.to_string(), "-m", &format!("{}M", self.size.memory_mib)]);
        add(&["-smbios", &format!("type=11,value={MARKER}={}", escaped(&self.marker))]);
        // QEMU's own seccomp: a guest that breaks out finds no way to start anything.
        add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
        add(&["-display", "none", "-vga", "std", "-rtc", "base=utc,driftfix=slew"]);
        // A guest that shuts down is told from a machine that died; one that restarts does so, except in a drill, which shall show it.
        let reboot = if self.marker == DRILL { "shutdown" } else { "reset" };
        add(&["-action", &format!("shutdown=pause,reboot={reboot}")]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", path(self.qmp_socket()))]);
        add(&["-pidfile", &self.pid_file().to_string_lossy()]);
        add(&[
            "-chardev",
            &format!("file,id=serial,path={},append=on", path(self.serial_log())),
            "-serial",
            "chardev:serial",
        ]);
        add(&["-device", "virtio-serial-pci", "-device", "virtio-rng-pci"]);
        add(&["-chardev", &format!("socket,id=port,path={},server=on,wait=off", path(self.port_socket()))]);
        add(&["-device", &format!("virtserialport,chardev=port,name={PORT}")]);
        if self.firmware == Firmware::Uefi
            && let Some((code, _)) = firmware()
        {
            add(&["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={code}")]);
            add(&["-drive", &format!("if=pflash,unit=1,format=raw,file={}", path(self.vars()))]);
        }
        if self.disk_model == DiskModel::Ahci {
            add(&["-device", "ich9-ahci,id=ahci"]);
        }
        for (i, disk) in self.disks.iter().enumerate() {
            add(&[
                "-blockdev",
                &format!(
                    "driver=nbd,node-name=disk{i},server.type=unix,server.path={},export={},reconnect-delay={RECONNECT_SECONDS},cache.direct=on,discard=unmap",
                    path(disk.socket.clone()),
                    escaped(&disk.export)
                ),
            ]);
            let serial: String = disk.serial.chars().filter(char::is_ascii_alphanumeric).take(20).collect();
            let common = format!("drive=disk{i},serial={serial},bootindex={i},write-cache=off");
            let on_error = "rerror=stop,werror=stop";
            add(&[
                "-device",
                &match self.disk_model {
                    DiskModel::Virtio => format!("virtio-blk-pci,{common},{on_error}"),
                    DiskModel::Ahci => format!("ide-hd,bus=ahci.{i},{common},{on_error}"),
                    DiskModel::Nvme => format!("nvme,{common}"),
                },
            ]);
        }
        let nic = match self.nic_model {
            NicModel::Virtio => "virtio-net-pci",
            NicModel::E1000e => "e1000e",
        };
        for (i, card) in self.nics.iter().enumerate() {
            add(&[
                "-netdev",
                &match &card.wire {
                    Wire::Bridge(_) => format!("tap,id=net{i},ifname={},script=no,downscript=no", self.tap(i)),
                    Wire::Isolated => format!("user,id=net{i},restrict=on"),
                },
            ]);
            add(&["-device", &format!("{nic},netdev=net{i},mac={},bootindex={}", card.mac, 100 + i)]);
        }
        args
    }

    /// Name of the interface behind a card, at most 15 bytes; the folder's name is its run's.
    pub fn tap(&self, card: usize) -> String {
        let run = self.dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        format!("hf{}-{card}", run.chars().take(8).collect::<String>())
    }
}

/// A comma inside a value is written twice.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

fn firmware() -> Option<(&'static str, &'static str)> {
    OVMF.into_iter().find(|(code, vars)| Path::new(code).is_file() && Path::new(vars).is_file())
}

/// What a machine of this plan needs and the box lacks.
pub fn missing(wanted: Firmware) -> Result<(), MachineError> {
    if find(QEMU).is_none() {
        return Err(MachineError::NoQemu);
    }
    if wanted == Firmware::Uefi && firmware().is_none() {
        return Err(MachineError::NoFirmware);
    }
    Ok(())
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Whether a guest runs on the processor itself: a boot sector is run on a processor as our machines get it, and must say
/// so. Asked once; takes some seconds on a box whose acceleration hangs.
pub fn kvm_works() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| Path::new("/dev/kvm").exists() && guest_instruction_runs("kvm"))
}

/// `mov al, 42; out 0xf4, al; hlt`: QEMU's debug port ends the machine with status 2 * 42 + 1.
fn guest_instruction_runs(accel: &str) -> bool {
    let run = || -> io::Result<bool> {
        let dir = std::env::temp_dir().join(format!("holdfast-probe-{}-{accel}", std::process::id()));
        fs::create_dir(&dir)?;
        let image = dir.join("boot");
        let mut sector = vec![0xb0, 0x2a, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        let outcome = fs::write(&image, sector).and_then(|()| {
            let mut child = outside(QEMU)
                .args([
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                    "-m",
                    "16M",
                    "-accel",
                    accel,
                    "-cpu",
                    if accel == "kvm" { "host" } else { "max" },
                ])
                .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01"])
                .args(["-drive", &format!("format=raw,snapshot=on,if=ide,file={}", image.display())])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            let deadline = Instant::now() + KVM_PROBE_MAX;
            loop {
                if let Some(status) = child.try_wait()? {
                    return Ok(status.code() == Some(85));
                }
                if Instant::now() >= deadline {
                    child.kill()?;
                    child.wait()?;
                    return Ok(false);
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        fs::remove_dir_all(&dir)?;
        outcome
    };
    run().unwrap_or(false)
}

/// A machine that runs, or is stopped before its first instruction.
#[derive(Debug)]
pub struct Machine {
    pub spec: MachineSpec,
    qmp: Qmp,
}

impl Machine {
    /// Starts a machine, stopped before its first instruction; one that runs already is taken up instead.
    pub fn start(spec: &MachineSpec) -> Result<Self, MachineError> {
        let file = |what, path: &Path| {
            let path = path.to_owned();
            move |source| MachineError::File { what, path, source }
        };
        fs::create_dir_all(&spec.dir).map_err(file("make", &spec.dir))?;
        fs::set_permissions(&spec.dir, fs::Permissions::from_mode(0o700)).map_err(file("close", &spec.dir))?;
        let lock = fs::File::create(spec.lock()).map_err(file("make", &spec.lock()))?;
        let deadline = Instant::now() + START_MAX;
        // One that an earlier daemon began may not have opened its socket yet.
        loop {
            if let Some(running) = Self::adopt(spec)? {
                return Ok(running);
            }
            match lock.try_lock() {
                Ok(()) => break,
                Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10))
                }
                Err(fs::TryLockError::WouldBlock) => return Err(MachineError::Silent { log: spec.said() }),
                Err(fs::TryLockError::Error(e)) => return Err(file("lock", &spec.lock())(e)),
            }
        }
        missing(spec.firmware)?;
        for old in [spec.qmp_socket(), spec.port_socket(), spec.pid_file()] {
            match fs::remove_file(&old) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(file("remove", &old)(e)),
                _ => {}
            }
        }
        if spec.firmware == Firmware::Uefi && !spec.vars().exists() {
            let (_, vars) = firmware().ok_or(MachineError::NoFirmware)?;
            fs::copy(vars, spec.vars()).map_err(file("copy", Path::new(vars)))?;
        }
        let log = fs::File::create(spec.own_log()).map_err(file("make", &spec.own_log()))?;
        let mut command = spec.command();
        command.stdin(lock).stdout(Stdio::null()).stderr(log);
        // Away from our terminal's signals: it must outlive us.
        command.process_group(0);
        let mut child = command.spawn().map_err(MachineError::Spawn)?;
        // The lock is the machine's alone from here on.
        drop(command);
        loop {
            match Qmp::connect(&spec.qmp_socket()) {
                Ok(qmp) => {
                    // Whoever ends it later may be another process; as long as it is us, no zombie stays.
                    thread::spawn(move || child.wait());
                    return Ok(Self { spec: spec.clone(), qmp });
                }
                // Not there yet, or gone with a machine that could not begin: it says why itself.
                Err(QmpError::Connect(_) | QmpError::Ended | QmpError::Io(_)) => {}
                Err(e) => return Err(e.into()),
            }
            let ended = child.try_wait().map_err(MachineError::Spawn)?;
            // Who asked systemd to start it has done so and is gone; or has found that an earlier daemon did.
            if ended.is_some() && !by_systemd() {
                return Err(MachineError::Ended { log: spec.said() });
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(MachineError::Silent { log: spec.said() });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The machine of an earlier life of the daemon, if it still runs.
    pub fn adopt(spec: &MachineSpec) -> Result<Option<Self>, MachineError> {
        match Qmp::connect(&spec.qmp_socket()) {
            Ok(qmp) => Ok(Some(Self { spec: spec.clone(), qmp })),
            Err(QmpError::Connect(_) | QmpError::Ended) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Lets it run, from its first instruction or from where it was stopped.
    pub fn go_on(&mut self) -> Result<(), MachineError> {
        self.qmp.execute("cont", serde_json::json!({}))?;
        Ok(())
    }
    /// Stops it between two instructions.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.qmp.execute("stop", serde_json::json!({}))?;
        Ok(())
    }
    /// `running`, `paused`, `io-error`, `shutdown`, `prelaunch`, …
    pub fn status(&mut self) -> Result<String, MachineError> {
        Ok(self.qmp.status()?)
    }
    /// The screen as a PNG file.
    pub fn screenshot(&mut self, file: &Path) -> Result<(), MachineError> {
        let arguments = serde_json::json!({ "filename": file, "format": "png" });
        self.qmp.execute("screendump", arguments)?;
        Ok(())
    }
    /// Presses the power button: the guest shuts down in its own way, or does not.
    pub fn press_power(&mut self) -> Result<(), MachineError> {
        self.qmp.execute("system_powerdown", serde_json::json!({}))?;
        Ok(())
    }
    /// Whether it has ended, now or before the deadline.
    pub fn ended_by(&mut self, deadline: Instant) -> Result<bool, MachineError> {
        match self.qmp.event("SHUTDOWN", deadline) {
            Ok(found) => Ok(found.is_some()),
            Err(QmpError::Ended) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }
    /// Ends it at once. What the guest was told is written, is.
    pub fn end(mut self) -> Result<(), MachineError> {
        match self.qmp.execute("quit", serde_json::json!({})) {
            Ok(_) | Err(QmpError::Ended | QmpError::Io(_)) => {}
            Err(e) => return Err(e.into()),
        }
        // Once it is gone its socket answers nobody, and its lock is free.
        let locked = || fs::File::open(self.spec.lock()).is_ok_and(|lock| lock.try_lock().is_err());
        let deadline = Instant::now() + STOP_MAX;
        while (locked() || Qmp::connect(&self.spec.qmp_socket()).is_ok()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl MachineSpec {
    /// The end of what QEMU said for itself.
    fn said(&self) -> String {
        let text = fs::read(self.own_log()).unwrap_or_default();
        let tail = text.len().saturating_sub(2000);
        String::from_utf8_lossy(&text[tail..]).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dir: &Path) -> MachineSpec {
        MachineSpec {
            name: "db1, the drill".into(),
            dir: dir.join("0a1b2c3d4e"),
            size: Size { cpus: 2, memory_mib: 64 },
            firmware: Firmware::Bios,
            disk_model: DiskModel::Virtio,
            nic_model: NicModel::Virtio,
            disks: vec![MachineDisk {
                socket: "/run/a,b.sock".into(),
                export: "vm-root.1".into(),
                serial: "a-b".into(),
            }],
            nics: vec![
                MachineNic { mac: Mac([0x52, 0x54, 0, 1, 2, 3]), wire: Wire::Isolated },
                MachineNic { mac: Mac([0x52, 0x54, 0, 1, 2, 4]), wire: Wire::Bridge("br0".into()) },
            ],
            marker: "drill".into(),
            kvm: false,
        }
    }

    #[test]
    fn disks_have_no_write_cache_and_names_with_commas_stay_whole() {
        let args = spec(Path::new("/run/t")).arguments().join(" ");
        assert!(args.contains("server.path=/run/a,,b.sock,export=vm-root.1,"), "{args}");
        assert!(args.contains("write-cache=off") && args.contains("werror=stop"), "{args}");
        assert!(args.contains("-name db1,, the drill,process="), "{args}");
        assert!(
            args.contains("user,id=net0,restrict=on") && args.contains("tap,id=net1,ifname=hf0a1b2c3d-1,"),
            "{args}"
        );
        assert!(spec(Path::new("/run/t")).tap(1).len() <= 15);
    }

    #[test]
    fn a_guest_instruction_is_run_to_know_that_one_can_be() {
        if find(QEMU).is_none() {
            panic!("{QEMU} is needed by this test: cargo xtask deps");
        }
        assert!(guest_instruction_runs("tcg"));
        assert!(!guest_instruction_runs("no-such-accelerator"));
    }

    #[test]
    fn a_machine_is_started_taken_up_again_and_ended() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spec = spec(dir.path());
        spec.disks.clear();
        spec.nics.pop();
        let mut machine = Machine::start(&spec).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(machine.status().expect("a status"), "prelaunch");
        drop(machine);
        let mut again = Machine::start(&spec).expect("the same one");
        again.go_on().expect("runs");
        assert_eq!(again.status().expect("a status"), "running");
        let picture = dir.path().join("screen.png");
        again.screenshot(&picture).expect("a picture");
        assert_eq!(fs::read(&picture).expect("a file")[1..4], *b"PNG");
        again.end().expect("ends");
        assert!(Machine::adopt(&spec).expect("asked").is_none());
        // One that cannot be started says why.
        spec.disks.push(MachineDisk { socket: dir.path().join("nobody"), export: "x".into(), serial: "x".into() });
        let failed = Machine::start(&spec).expect_err("no disk");
        assert!(failed.to_string().contains("nobody"), "{failed}");
    }
}
