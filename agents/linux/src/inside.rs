//! The agent inside a machine that a box runs in the place of this host.
//!
//! The box says in the machine's SMBIOS tables that it is one ([`taken_over`]). Then nothing is captured here: the disks are the box's
//! own, and what is written to them is kept anyway. Instead the box asks over a virtio-serial port, and this answers: how far the boot
//! is, which file systems are there, set these addresses, run this command of the plan. The table of requests is in the box's
//! `takeover::port`.
//!
//! A service of its own, `holdfast-inside`: it runs the plan's commands as root, which the agent's own unit may not.
//!
//! **Addresses.** An IPv4 address is first asked for three times (RFC 5227): when another machine answers it is not set, and that machine is
//! named. For IPv6 the kernel asks. Once set, both are announced three times over some seconds ([`crate::arp`]).
//!
//! **Limits.** One request at a time; a line of [`LINE_MAX`], output of [`OUTPUT_MAX`] bytes; a command and all it started are killed when its
//! time is up.

use crate::arp::{Arp, Asked};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const MARKER: &str = "holdfast.takeover=";
const PORT: &str = "/dev/virtio-ports/org.holdfast.0";
const DMI: &str = "/sys/firmware/dmi/tables/DMI";
const LINE_MAX: usize = 64 << 10;
const OUTPUT_MAX: usize = 32 << 10;
/// A box that is away: its end of the port reads as empty.
const AWAY: Duration = Duration::from_millis(200);
const PORT_WAIT: Duration = Duration::from_secs(60);
/// The kernel asks once for an IPv6 address, after up to a second.
const KERNEL_ASKS: Duration = Duration::from_secs(5);
/// For `ip` and `systemctl`.
const TOOL_SECONDS: u64 = 15;

/// Whether this is a machine that a box runs, and as what: `drill` or `failover`.
pub fn taken_over() -> Option<String> {
    marker_in(&fs::read(DMI).ok()?)
}

/// The OEM strings (type 11) of an SMBIOS table: structures of a header (type, length, handle), a formatted part, then strings that end in
/// zero, and one more zero.
fn marker_in(table: &[u8]) -> Option<String> {
    let mut rest = table;
    while let [kind, length, ..] = *rest {
        let strings = rest.get(usize::from(length).max(4)..)?;
        let end = strings.windows(2).position(|w| w == [0, 0])?;
        if kind == 11 {
            let found =
                strings[..end].split(|b| *b == 0).find_map(|s| std::str::from_utf8(s).ok()?.strip_prefix(MARKER));
            if let Some(found) = found {
                return Some(found.to_owned());
            }
        }
        if kind == 127 {
            return None;
        }
        rest = &strings[end + 2..];
    }
    None
}

/// Answers the box until the machine ends.
pub fn serve() -> io::Result<()> {
    let begun = Instant::now();
    let mut port = loop {
        match fs::File::options().read(true).write(true).open(PORT) {
            Ok(port) => break port,
            // udev names it when its driver is there.
            Err(e) if e.kind() == io::ErrorKind::NotFound && begun.elapsed() < PORT_WAIT => thread::sleep(AWAY),
            Err(e) => return Err(e),
        }
    };
    let mut read: Vec<u8> = Vec::new();
    let mut buf = [0; 4096];
    loop {
        match port.read(&mut buf) {
            Ok(0) => {
                // Nobody is at the other end; what an earlier box began is nobody's.
                read.clear();
                thread::sleep(AWAY);
            }
            Ok(n) => read.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        while let Some(end) = read.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = read.drain(..=end).collect();
            let answer = answer(&line);
            // The box may have gone meanwhile.
            let _ = port.write_all(format!("{answer}\n").as_bytes());
        }
        if read.len() > LINE_MAX {
            read.clear();
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
enum Wish {
    Hello,
    Volumes,
    Network { mac: String, addresses: Vec<String>, gateway: Option<IpAddr> },
    Run { command: String, seconds_max: u64 },
}

fn answer(line: &[u8]) -> Value {
    let value: Value = match serde_json::from_slice(line) {
        Ok(value) => value,
        Err(e) => return json!({ "id": null, "error": format!("no request: {e}") }),
    };
    let id = value["id"].clone();
    let done = serde_json::from_value(value).map_err(|e| format!("not understood: {e}")).and_then(|wish| match wish {
        Wish::Hello => Ok(hello()),
        Wish::Volumes => volumes(),
        Wish::Network { mac, addresses, gateway } => network(&mac, &addresses, gateway),
        Wish::Run { command, seconds_max } => {
            let (code, output) = run(Command::new("/bin/sh").args(["-c", &command]), seconds_max)?;
            Ok(json!({ "code": code, "output": output }))
        }
    });
    match done {
        Ok(ok) => json!({ "id": id, "ok": ok }),
        Err(text) => json!({ "id": id, "error": text }),
    }
}

fn hello() -> Value {
    let system = run(Command::new("systemctl").arg("is-system-running"), TOOL_SECONDS);
    let system = system.map(|(_, said)| said.trim().to_owned()).unwrap_or_else(|_| "running".into());
    let host_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    json!({ "version": env!("CARGO_PKG_VERSION"), "host_name": host_name.trim(), "system": system })
}

/// File systems on disks: those mounted, and those that should be.
fn volumes() -> Result<Value, String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("read mountinfo: {e}"))?;
    let fstab = fs::read_to_string("/etc/fstab").unwrap_or_default();
    let mut seen = BTreeSet::new();
    let mut list = Vec::new();
    let mut mounted = BTreeSet::new();
    for line in mounts.lines() {
        let Some(mount) = Mount::parse(line) else { continue };
        mounted.insert(mount.at.clone());
        if !mount.source.starts_with("/dev/") || mount.fs == "squashfs" || !seen.insert(mount.device.clone()) {
            continue;
        }
        let space = nix::sys::statvfs::statvfs(Path::new(&mount.at));
        let (total, free, statfs) = match &space {
            Ok(s) => (s.blocks() * s.fragment_size(), s.blocks_available() * s.fragment_size(), None),
            Err(e) => (0, 0, Some(format!("it does not answer: {e}"))),
        };
        list.push(json!({
            "mount": mount.at, "source": mount.source, "fs": mount.fs, "read_only": mount.read_only,
            "total_bytes": total, "free_bytes": free, "fault": statfs.or_else(|| fault_of(&mount, &fstab)),
        }));
    }
    for (source, at, fs_type) in wanted(&fstab) {
        if !mounted.contains(at) {
            list.push(json!({
                "mount": at, "source": source, "fs": fs_type, "read_only": false, "total_bytes": 0, "free_bytes": 0,
                "fault": "fstab has it and it is not mounted",
            }));
        }
    }
    Ok(Value::Array(list))
}

struct Mount {
    device: String,
    at: String,
    fs: String,
    source: String,
    read_only: bool,
}

impl Mount {
    /// `36 35 98:0 /root /mount rw,noatime master:1 - ext4 /dev/vda1 rw,errors=remount-ro`
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let mut right = right.split(' ');
        let (fs, source, options) = (right.next()?, right.next()?, right.next()?);
        Some(Self {
            device: (*left.get(2)?).to_owned(),
            at: unescaped(left.get(4)?),
            fs: fs.to_owned(),
            source: unescaped(source),
            read_only: options.split(',').any(|o| o == "ro"),
        })
    }
}

/// Blanks are written `\040`.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Lines of fstab that a boot mounts and that it fails without.
fn wanted(fstab: &str) -> Vec<(&str, &str, &str)> {
    let lines = fstab.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (source, at, fs_type) = (words.next()?, words.next()?, words.next()?);
            let options = words.next().unwrap_or_default();
            let optional = options.split(',').any(|o| matches!(o, "noauto" | "nofail"));
            (at.starts_with('/')
                && !optional
                && !matches!(fs_type, "tmpfs" | "proc" | "sysfs" | "nfs" | "cifs" | "nfs4"))
            .then_some((source, at, fs_type))
        })
        .collect()
}

fn fault_of(mount: &Mount, fstab: &str) -> Option<String> {
    if mount.fs == "ext4" {
        let name = fs::canonicalize(format!("/sys/dev/block/{}", mount.device)).ok()?;
        let errors = fs::read_to_string(Path::new("/sys/fs/ext4").join(name.file_name()?).join("errors_count"));
        if let Some(count) = errors.ok().and_then(|e| e.trim().parse::<u64>().ok()).filter(|n| *n > 0) {
            return Some(format!("{count} errors are noted in it"));
        }
    }
    let asked_ro = fstab.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(1) == Some(&mount.at) && words.nth(1).is_some_and(|o| o.split(',').any(|o| o == "ro"))
    });
    (mount.read_only && !asked_ro && !matches!(mount.fs.as_str(), "iso9660" | "udf"))
        .then(|| "it is mounted read-only".into())
}

// ---------------------------------------------------------------- addresses

fn network(mac: &str, addresses: &[String], gateway: Option<IpAddr>) -> Result<Value, String> {
    let name = interface_of(mac)?;
    tool("ip", &["link", "set", "dev", &name, "up"])?;
    let mut announce = Vec::new();
    for address in addresses {
        let ip: IpAddr =
            address.split('/').next().and_then(|ip| ip.parse().ok()).ok_or(format!("{address:?} is no address"))?;
        if let IpAddr::V4(v4) = ip {
            let ours = run(Command::new("ip").args(["-4", "-o", "addr", "show", "dev", &name]), TOOL_SECONDS)?.1;
            if !ours.contains(&format!(" {v4}/")) {
                let asked = Arp::open(&name).and_then(|arp| arp.map_or(Ok(None), |arp| arp.who_has(v4)));
                if let Some(other) = asked.map_err(|e| crate::error_chain(&e))? {
                    return Err(format!("{v4} answers already, from {other}: it is not set here"));
                }
            }
        }
        announce.push(ip);
        tool("ip", &["addr", "replace", address, "dev", &name])?;
    }
    if let Some(gateway) = gateway {
        let via = gateway.to_string();
        let family = if gateway.is_ipv4() { "-4" } else { "-6" };
        tool("ip", &[family, "route", "replace", "default", "via", &via, "dev", &name])?;
    }
    for ip in announce {
        // An IPv6 address that the kernel still asks for cannot be announced; the first waits for it.
        if let IpAddr::V6(v6) = ip {
            let begun = Instant::now();
            while begun.elapsed() < KERNEL_ASKS {
                match crate::arp::asked_by_kernel(&name, v6).map_err(|e| format!("look at {v6}: {e}"))? {
                    Asked::Still => thread::sleep(AWAY),
                    Asked::Taken => return Err(format!("another machine has {v6}: the kernel does not use it")),
                    Asked::Free | Asked::Gone => break,
                }
            }
        }
        let device = name.clone();
        // Again and again, over seconds; the box need not wait for it.
        thread::spawn(move || crate::arp::announce(&device, ip, || true));
    }
    Ok(json!({ "interface": name }))
}

fn interface_of(mac: &str) -> Result<String, String> {
    let mut have = Vec::new();
    for entry in fs::read_dir("/sys/class/net").map_err(|e| format!("list interfaces: {e}"))?.flatten() {
        let its = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        let name = entry.file_name().to_string_lossy().into_owned();
        // A bond or a bridge has its member's address too; the card is the one with a device.
        if its.trim().eq_ignore_ascii_case(mac) && entry.path().join("device").exists() {
            return Ok(upper_of(&entry.path()).unwrap_or(name));
        }
        have.push(format!("{name} {}", its.trim()));
    }
    Err(format!("there is no network card {mac}; there are: {}", have.join(", ")))
}

/// The bridge or bond a card is in: the addresses belong there.
fn upper_of(card: &Path) -> Option<String> {
    let master: PathBuf = fs::canonicalize(card.join("master")).ok()?;
    Some(master.file_name()?.to_string_lossy().into_owned())
}

fn tool(program: &str, args: &[&str]) -> Result<(), String> {
    let (code, said) = run(Command::new(program).args(args), TOOL_SECONDS)?;
    if code == Some(0) { Ok(()) } else { Err(format!("{program} {}: {}", args.join(" "), said.trim())) }
}

// ---------------------------------------------------------------- programs

/// Runs a program for so long at most; its status and what it printed, the last part of it.
fn run(command: &mut Command, seconds_max: u64) -> Result<(Option<i32>, String), String> {
    let (mut reader, writer) = io::pipe().map_err(|e| format!("make a pipe: {e}"))?;
    let other = writer.try_clone().map_err(|e| format!("make a pipe: {e}"))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(other).process_group(0);
    let spawned = command.spawn();
    // Our ends of the pipe go with it: otherwise reading would never end.
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = spawned.map_err(|e| format!("start {program}: {e}"))?;
    let output = thread::spawn(move || {
        let (mut kept, mut buf) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = reader.read(&mut buf) {
            kept.extend_from_slice(&buf[..n]);
            if kept.len() > 2 * OUTPUT_MAX {
                kept.drain(..kept.len() - OUTPUT_MAX);
            }
        }
        let from = kept.len().saturating_sub(OUTPUT_MAX);
        String::from_utf8_lossy(&kept[from..]).into_owned()
    });
    let deadline = Instant::now() + Duration::from_secs(seconds_max);
    let group = nix::unistd::Pid::from_raw(-i32::try_from(child.id()).map_err(|e| e.to_string())?);
    let mut code = None;
    loop {
        match child.try_wait().map_err(|e| format!("wait for {program}: {e}"))? {
            Some(status) => {
                code = status.code();
                break;
            }
            None if Instant::now() >= deadline => {
                let _ = nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGKILL);
                let _ = child.wait();
                break;
            }
            None => thread::sleep(Duration::from_millis(10)),
        }
    }
    // A daemon that the command started may keep the pipe open for ever: it is not waited for.
    let wait = Instant::now() + Duration::from_millis(500);
    while !output.is_finished() && Instant::now() < wait {
        thread::sleep(Duration::from_millis(5));
    }
    let output = if output.is_finished() { output.join().unwrap_or_default() } else { String::new() };
    Ok((code, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn structure(kind: u8, strings: &[&str]) -> Vec<u8> {
        let mut bytes = vec![kind, 5, 0, 0, strings.len() as u8];
        strings.iter().for_each(|s| bytes.extend([s.as_bytes(), &[0]].concat()));
        if strings.is_empty() {
            bytes.push(0);
        }
        bytes.push(0);
        bytes
    }

    #[test]
    fn the_marker_is_found_among_other_strings_and_nowhere_else() {
        let other = structure(1, &["QEMU", "holdfast.takeover=no"]);
        let oem = structure(11, &["vendor", "holdfast.takeover=drill"]);
        let end = structure(127, &[]);
        let table = [&other[..], &structure(4, &[]), &oem, &end].concat();
        assert_eq!(marker_in(&table).as_deref(), Some("drill"));
        assert_eq!(marker_in(&[&other[..], &end].concat()), None);
        assert_eq!(marker_in(&[&end[..], &oem].concat()), None, "behind the end");
        for len in 0..table.len() {
            let _ = marker_in(&table[..len]);
        }
        let mut seed = 9_u64;
        for _ in 0..20_000 {
            let junk: Vec<u8> = (0..64)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    (seed % 13) as u8
                })
                .collect();
            let _ = marker_in(&junk);
        }
    }

    #[test]
    fn commands_end_in_time_with_what_they_printed() {
        let ask = |wish: Value| answer(format!("{wish}\n").as_bytes());
        let ran = ask(json!({ "id": 7, "do": "run", "command": "echo out; echo err >&2; exit 3", "seconds_max": 20 }));
        assert_eq!(ran["id"], 7);
        assert_eq!(ran["ok"]["code"], 3);
        assert_eq!(ran["ok"]["output"], "out\nerr\n");
        let late =
            ask(json!({ "id": 8, "do": "run", "command": "echo begun; sleep 300 & sleep 300", "seconds_max": 1 }));
        assert_eq!(late["ok"]["code"], Value::Null, "{late}");
        let much = ask(
            json!({ "id": 9, "do": "run", "command": "head -c 1000000 /dev/zero | tr '\\0' x; echo end", "seconds_max": 20 }),
        );
        let output = much["ok"]["output"].as_str().expect("text");
        assert!(output.len() <= OUTPUT_MAX && output.ends_with("xend\n"), "{} bytes", output.len());
        assert!(ask(json!({ "id": 1, "do": "format" }))["error"].as_str().expect("refused").contains("format"));
        assert!(answer(b"junk\n")["error"].is_string());
    }

    #[test]
    fn mounts_and_what_should_be_mounted_are_read() {
        let line = "36 35 254:4 / /with\\040blank rw,noatime master:1 - ext4 /dev/vda4 ro,errors=remount-ro";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!((mount.at.as_str(), mount.device.as_str(), mount.read_only), ("/with blank", "254:4", true));
        assert_eq!(fault_of(&Mount { fs: "xfs".into(), ..mount }, "").as_deref(), Some("it is mounted read-only"));
        let fstab = "# c\n/dev/vda4 / ext4 defaults 0 1\n/dev/vdb /data xfs nofail 0 0\nUUID=1 /srv ext4 ro 0 2\nswap none swap sw 0 0\n";
        let wanted: Vec<&str> = wanted(fstab).into_iter().map(|(_, at, _)| at).collect();
        assert_eq!(wanted, ["/", "/srv"]);
        let here = volumes().expect("of this machine");
        assert!(here.as_array().is_some(), "{here}");
    }
}
