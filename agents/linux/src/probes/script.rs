//! The operator's scripts: run by a guard, a process of its own for each run.
//!
//! ```text
//! agent ── {"script": name, "limit_ms"} ──▶ guard ── as its user, in a process group of its own ──▶ script
//!       ◀── how it ended, what it printed ──        ◀── code, output
//! ```
//!
//! The guard is this program again ([`GUARD_COMMAND`]). In the installed service systemd starts it, for each connection to
//! [`SOCKET`] one, outside of the agent's sandbox, which could change no user and write nowhere, and with a ceiling of its own for memory
//! and processes: a script that takes everything takes nothing of the agent's. Without that socket (the agent run by hand) the agent
//! starts it itself. Only a name crosses: what runs is in the host's own configuration, which the guard reads for itself.
//!
//! # The end of a script
//!
//! When it ends, or at its limit, nothing of it is left: at the limit its process group gets SIGTERM, and [`GRACE`] later the group and
//! every process that descends from it SIGKILL, those too that made sessions of their own: the guard is the one whom the kernel gives
//! orphans to (`PR_SET_CHILD_SUBREAPER`). Output is read to the end and kept to [`PROBE_OUTPUT_MAX`] bytes, so that a flood blocks nobody.
//!
//! # Limits
//!
//! A process that forks faster than it can be killed for [`REAP_MAX`] is left to the cgroup of the service, and that is said. Killed by hand, the
//! guard leaves its script behind likewise.

use super::{Made, Not, WHY_MAX, plain};
use crate::config::Script;
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    io::{self, BufRead as _, BufReader, Read, Write},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use wire::{PROBE_OUTPUT_MAX, ProbeEnd};

pub const GUARD_COMMAND: &str = "script-guard";
/// Of `holdfast-script.socket`.
pub const SOCKET: &str = "/run/holdfast-script.sock";
/// Between SIGTERM and SIGKILL.
pub const GRACE: Duration = Duration::from_millis(500);
/// For killing what a script has started.
pub const REAP_MAX: Duration = Duration::from_secs(5);
/// What a guard takes beside its script, on a busy host.
const GUARD_EXTRA: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(10);
/// A request, or an answer with its escapes.
const LINE_MAX: u64 = 64 << 10;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How a guard is come by.
#[derive(Clone, Debug)]
pub struct Runner {
    pub socket: PathBuf,
    /// Started where there is no socket: this program, and its configuration if that is not the usual one.
    pub program: PathBuf,
    pub config: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    script: String,
    limit_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    end: ProbeEnd,
    output: String,
}

/// Has a script of the configuration run, within its own limit and this one.
pub fn run(name: &str, scripts: &BTreeMap<String, Script>, runner: &Runner, limit: Duration) -> Made {
    let broken = |why: String| Made {
        end: ProbeEnd::Broken { why: plain(why.as_bytes(), WHY_MAX, false) },
        output: String::new(),
    };
    let Some(script) = scripts.get(name) else {
        return broken(format!("this host's configuration has no [scripts.{name}]"));
    };
    let limit = limit.min(Duration::from_millis(script.limit_ms));
    let request = Request { script: name.to_owned(), limit_ms: limit.as_millis() as u64 };
    match runner.ask(&request, limit + GRACE + REAP_MAX + GUARD_EXTRA) {
        Ok(answer) => Made { end: answer.end, output: answer.output },
        Err(Not::Made(why) | Not::Working(why)) => broken(why),
    }
}

impl Runner {
    fn ask(&self, request: &Request, patience: Duration) -> Result<Answer, Not> {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            Not::Made(format!("{what} the guard of script {}: {e}", request.script))
        };
        let mut line = serde_json::to_vec(request).map_err(|e| failed("could not ask", &e))?;
        line.push(b'\n');
        let mut child = None;
        let mut stream = match UnixStream::connect(&self.socket) {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                let (ours, theirs) = UnixStream::pair().map_err(|e| failed("could not start", &e))?;
                let output = theirs.try_clone().map_err(|e| failed("could not start", &e))?;
                let mut command = Command::new(&self.program);
                if let Some(config) = &self.config {
                    command.arg("--config").arg(config);
                }
                command
                    .arg(GUARD_COMMAND)
                    .stdin(OwnedFd::from(theirs))
                    .stdout(OwnedFd::from(output))
                    .stderr(Stdio::null());
                child = Some(command.spawn().map_err(|e| failed("could not start", &e))?);
                ours
            }
            Err(e) => return Err(failed("could not reach", &e)),
        };
        let asked = speak(&mut stream, &line, patience);
        if let Some(mut child) = child {
            if asked.is_err() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        let heard = asked.map_err(|e| failed("no answer of", &e))?;
        serde_json::from_slice(&heard).map_err(|e| failed("no answer of", &e))
    }
}

fn speak(stream: &mut UnixStream, line: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
    stream.set_write_timeout(Some(patience))?;
    // A guard says all of it at once.
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(line)?;
    let mut heard = Vec::new();
    stream.take(LINE_MAX).read_to_end(&mut heard)?;
    Ok(heard)
}

// ---------------------------------------------------------------- the guard

/// Reads one request, runs the script, answers. `scripts`: of the configuration as it is now.
pub fn guard(scripts: &BTreeMap<String, Script>, input: impl Read, mut output: impl Write) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(input).take(LINE_MAX).read_line(&mut line)?;
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => guarded(scripts, &request),
        Err(e) => Err(Not::Made(format!("no request for a script: {e}"))),
    };
    let answer = answer.unwrap_or_else(|not| {
        let end = match not {
            Not::Working(why) => ProbeEnd::Fails { why: plain(why.as_bytes(), WHY_MAX, false) },
            Not::Made(why) => ProbeEnd::Broken { why: plain(why.as_bytes(), WHY_MAX, false) },
        };
        Answer { end, output: String::new() }
    });
    output.write_all(&serde_json::to_vec(&answer)?)?;
    output.flush()
}

fn guarded(scripts: &BTreeMap<String, Script>, request: &Request) -> Result<Answer, Not> {
    let name = &request.script;
    let script =
        scripts.get(name).ok_or_else(|| Not::Made(format!("this host's configuration has no [scripts.{name}]")))?;
    let limit = Duration::from_millis(request.limit_ms.min(script.limit_ms));
    let user = User::find(&script.user)?;
    // SAFETY: no preconditions; a number that the kernel knows or refuses.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
        return Err(Not::Made(format!("could not become the keeper of orphans: {}", io::Error::last_os_error())));
    }
    let ran = watch(script, &user, limit);
    let clean = reap_all();
    let (ended, output) = ran?;
    let output = plain(&output, PROBE_OUTPUT_MAX, true);
    let said = output.lines().next().map(|l| format!(": {l}")).unwrap_or_default();
    let left = if clean { "" } else { "; it left processes that could not be ended" };
    let end = match ended {
        Ended::Code(0) if clean => ProbeEnd::Works,
        Ended::Code(code) => ProbeEnd::Fails { why: format!("script {name} ended with {code}{said}{left}") },
        Ended::Signal(signal) => ProbeEnd::Fails { why: format!("script {name} was ended by {signal}{said}{left}") },
        Ended::TooLong => ProbeEnd::Fails {
            why: format!("script {name} took longer than {} ms and was killed{said}{left}", limit.as_millis()),
        },
    };
    let end = match end {
        ProbeEnd::Fails { why } => ProbeEnd::Fails { why: plain(why.as_bytes(), WHY_MAX, false) },
        end => end,
    };
    Ok(Answer { end, output })
}

enum Ended {
    Code(i32),
    Signal(Signal),
    TooLong,
}

struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
    shell: String,
    groups: Vec<u32>,
}

impl User {
    /// By `getent`: a static program cannot ask name services.
    fn find(name: &str) -> Result<Self, Not> {
        let bad = |what: &str| Not::Made(format!("user {name} of a script: {what}"));
        let ask = |database: &str| -> Result<String, Not> {
            let out = Command::new("getent").args([database, name]).stdin(Stdio::null()).stderr(Stdio::null()).output();
            let out = out.map_err(|e| bad(&format!("could not run getent: {e}")))?;
            Ok(String::from_utf8_lossy(&out.stdout).trim_end().to_owned())
        };
        let line = ask("passwd")?;
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, uid, gid, _, home, shell] = fields[..] else {
            return Err(bad("there is no such user on this host"));
        };
        let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) else { return Err(bad("its numbers are not numbers")) };
        let groups =
            ask("initgroups")?.split_whitespace().skip(1).filter_map(|g| g.parse().ok()).chain([gid]).collect();
        Ok(Self { name: name.to_owned(), uid, gid, home: home.to_owned(), shell: shell.to_owned(), groups })
    }
}

/// Runs it to its end or its limit, and says how it ended; what it started may still run.
fn watch(script: &Script, user: &User, limit: Duration) -> Result<(Ended, Vec<u8>), Not> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Not::Made(format!("could not {what} {}: {e}", script.program.display()))
    };
    let (reader, writer) = io::pipe().map_err(|e| failed("make a pipe for", &e))?;
    let other = writer.try_clone().map_err(|e| failed("make a pipe for", &e))?;
    let mut command = Command::new(&script.program);
    command
        .args(&script.arguments)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(other)
        .process_group(0)
        .current_dir("/")
        .env_clear();
    let words =
        [("PATH", PATH), ("HOME", &user.home), ("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", &user.shell)];
    command.envs(words);
    become_user(&mut command, user);
    let begun = Instant::now();
    let child = command.spawn();
    // Our ends of the pipe go with it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = child.map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => {
            failed("become the user of", &"this process may not: the service holdfast-script@ may, see its socket")
        }
        _ => failed("start", &e),
    })?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(|e| failed("start", &e))?);
    let collector = thread::spawn(move || collect(reader));
    let mut told = None;
    let ended = loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => break if told.is_some() { Ended::TooLong } else { Ended::Code(code) },
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                break if told.is_some() { Ended::TooLong } else { Ended::Signal(signal) };
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(failed("wait for", &e)),
        }
        match told {
            None if begun.elapsed() >= limit => {
                let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGTERM);
                told = Some(Instant::now());
            }
            Some(at) if at.elapsed() >= GRACE => {
                let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
            }
            _ => {}
        }
        thread::sleep(LOOK);
    };
    // The rest of its group, at once and together: what forks in a group cannot outrun that.
    let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
    reap_all();
    // Nobody has the pipe open any more, or it could not be ended.
    let until = Instant::now() + GRACE;
    while !collector.is_finished() && Instant::now() < until {
        thread::sleep(LOOK);
    }
    let output = if collector.is_finished() { collector.join().unwrap_or_default() } else { Vec::new() };
    Ok((ended, output))
}

/// Reads to the end, keeps the beginning.
fn collect(mut from: io::PipeReader) -> Vec<u8> {
    let (mut kept, mut buf) = (Vec::new(), [0; 16 << 10]);
    while let Ok(n @ 1..) = from.read(&mut buf) {
        let room = PROBE_OUTPUT_MAX.saturating_sub(kept.len()).min(n);
        kept.extend_from_slice(&buf[..room]);
    }
    kept
}

fn become_user(command: &mut Command, user: &User) {
    // SAFETY: no preconditions.
    let us = unsafe { (libc::geteuid(), libc::getegid()) };
    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    let score = CString::from(c"/proc/self/oom_score_adj");
    let act = move || {
        // SAFETY: plain system calls with memory that lives longer than they do, all allowed between fork and exec.
        unsafe {
            // Short of memory, the kernel ends a script before anything else.
            let fd = libc::open(score.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd >= 0 {
                libc::write(fd, b"1000".as_ptr().cast(), 4);
                libc::close(fd);
            }
            if us == (uid, gid) && uid != 0 {
                return Ok(());
            }
            if libc::setgroups(groups.len(), groups.as_ptr()) != 0 || libc::setgid(gid) != 0 || libc::setuid(uid) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: see within.
    unsafe { command.pre_exec(act) };
}

/// Kills everything that descends from this process, until nothing is left; false when that took too long.
fn reap_all() -> bool {
    let begun = Instant::now();
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                // No child, and so no orphan of one either.
                Err(_) => return true,
            }
        }
        if begun.elapsed() >= REAP_MAX {
            return false;
        }
        for pid in children() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        thread::sleep(LOOK);
    }
}

/// Of this process. Those further down become its own when their parents are dead.
fn children() -> Vec<Pid> {
    let us = std::process::id().to_string();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let of_us = |name: &str| -> Option<Pid> {
        let pid = name.parse().ok()?;
        let stat = fs::read_to_string(Path::new("/proc").join(name).join("stat")).ok()?;
        // `12 (a name) S 11 …`: the parent is the second word behind the name.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
        (parent == us).then_some(Pid::from_raw(pid))
    };
    all.filter_map(|e| of_us(e.file_name().to_str()?)).collect()
}

/// The descriptors that a guard is given: its connection is standard input and output.
pub fn stdio() -> io::Result<(fs::File, fs::File)> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    Ok((input.into(), output.into()))
}
