//! What this host itself knows: systemd's units and the processes.

use super::Not;
use std::{
    fs,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const LOOK: Duration = Duration::from_millis(10);
/// Four lines; what is longer is not systemd's.
const SHOWN_MAX: u64 = 4096;
/// Of a command line only the first word is looked at.
const LINE_MAX: u64 = 4096;
/// The kernel's own length of a process's name.
const COMM_MAX: usize = 15;

/// Active, or being reloaded.
pub(super) fn unit(systemctl: &Path, unit: &str, limit: Duration) -> Result<(), Not> {
    let broken = |what: &str| Not::Made(format!("could not ask systemd for {unit}: {what}"));
    let mut command = Command::new(systemctl);
    command.args(["show", "--property=LoadState,ActiveState,SubState,Result", "--", unit]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| broken(&e.to_string()))?;
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|e| broken(&e.to_string()))? {
            Some(status) => break status,
            None if begun.elapsed() >= limit => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(broken(&format!("it did not answer within {} ms", limit.as_millis())));
            }
            None => thread::sleep(LOOK),
        }
    };
    let mut shown = String::new();
    if let Some(out) = child.stdout.take() {
        out.take(SHOWN_MAX).read_to_string(&mut shown).map_err(|e| broken(&e.to_string()))?;
    }
    if !status.success() {
        return Err(broken(&format!("systemctl ended with {status}")));
    }
    let of = |key: &str| {
        let found = shown.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        found.unwrap_or_default().to_owned()
    };
    match (of("LoadState").as_str(), of("ActiveState").as_str()) {
        ("", _) | (_, "") => Err(broken("its answer has no state in it")),
        (_, "active" | "reloading") => Ok(()),
        ("not-found", _) => Err(Not::Working(format!("there is no unit {unit} on this host"))),
        ("masked", _) => Err(Not::Working(format!("{unit} is masked"))),
        (_, state) => {
            let why = Some(of("Result")).filter(|r| !r.is_empty() && r != "success");
            let why = why.unwrap_or_else(|| of("SubState"));
            Err(Not::Working(format!("{unit} is {state} ({why})")))
        }
    }
}

/// Somebody has that name: as the kernel shows it, or as the first word of its command line.
pub(super) fn process(name: &str) -> Result<(), Not> {
    let all = fs::read_dir("/proc").map_err(|e| Not::Made(format!("could not list the processes: {e}")))?;
    let mut is_dead = false;
    for entry in all.flatten() {
        // Others may end while they are looked at.
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((comm, state)) = comm_and_state(&stat) else { continue };
        // The dead have no command line left.
        if matches!(state, 'Z' | 'X') {
            is_dead |= comm == name || (comm.len() == COMM_MAX && name.starts_with(comm));
        } else if comm == name || named(&entry.path(), name) {
            return Ok(());
        }
    }
    Err(Not::Working(match is_dead {
        true => format!("the process {name} has ended, and its parent has not noticed"),
        false => format!("no process {name} runs"),
    }))
}

/// `12 (a name) S …`; a name may have brackets in it.
fn comm_and_state(stat: &str) -> Option<(&str, char)> {
    let (head, tail) = stat.rsplit_once(')')?;
    Some((head.split_once('(')?.1, tail.trim_start().chars().next()?))
}

fn named(process: &Path, name: &str) -> bool {
    let mut line = Vec::new();
    let read = fs::File::open(process.join("cmdline")).and_then(|f| f.take(LINE_MAX).read_to_end(&mut line));
    if read.is_err() {
        return false;
    }
    let first = line.split(|b| *b == 0).next().unwrap_or_default();
    first.rsplit(|b| *b == b'/').next() == Some(name.as_bytes())
}
