//! Programs under test: each dies with us, each wait has a limit.
//!
//! A [`Program`] is in a process group of its own, so that Ctrl-C reaches only us and we stop things in order; the kernel
//! kills it should we die first. Its output goes to a log file, which failing tests name.
//!
//! The kernel sends the parent-death signal when the *thread* that started the program ends: start programs from a thread
//! that lives as long as they should.

use anyhow::{Context, Result, bail};
use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// How often a waited-for value is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Looks until `look` finds something or the limit has passed.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look().with_context(|| format!("while waiting for {what}"))? {
            return Ok(found);
        }
        if start.elapsed() > limit {
            bail!("{what}: not seen within {} s", limit.as_secs_f32());
        }
        sleep(POLL);
    }
}

/// Makes the kernel kill `command`'s process when we die, and keeps the terminal's Ctrl-C from it.
fn bind_to_us(command: &mut Command) {
    command.process_group(0);
    let us = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // We may have died before the line above took effect.
            if libc::getppid() as u32 != us {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    name: String,
    log: PathBuf,
    /// Where this run's output begins in the log, which is appended to over restarts.
    log_start: u64,
}

impl Program {
    /// Starts `command` with its output appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out =
            File::options().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))?;
        let log_start = out.metadata()?.len();
        bind_to_us(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {name} ({})", command.get_program().to_string_lossy()))?;
        Ok(Self { child, name: name.to_owned(), log: log.to_owned(), log_start })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What this run has printed so far.
    pub fn output(&self) -> Result<String> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.log_start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last lines of the output, for messages.
    pub fn tail(&self) -> String {
        tail(&self.output().unwrap_or_default(), 15)
    }

    /// Waits for a line that begins with `prefix` and returns it; says what was printed when the program ends first.
    pub fn wait_line(&mut self, prefix: &str, limit: Duration) -> Result<String> {
        let start = Instant::now();
        loop {
            let ended = self.child.try_wait()?;
            let output = self.output()?;
            // Only whole lines: the last one may still be being written.
            let whole = output.rfind('\n').map_or("", |end| &output[..end]);
            if let Some(line) = whole.lines().find(|l| l.starts_with(prefix)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = ended {
                bail!("{} ended ({status}) before printing {prefix}:\n{}", self.name, self.tail());
            }
            if start.elapsed() > limit {
                bail!("{} did not print {prefix} within {} s:\n{}", self.name, limit.as_secs(), self.tail());
            }
            sleep(POLL);
        }
    }

    /// None while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails with the program's last words when it has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, self.tail()),
        }
    }

    /// Waits for the end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || Ok(self.child.try_wait()?)).with_context(|| self.tail())
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill takes plain numbers; the id is of a child we have not reaped, so it cannot be another's.
        if unsafe { libc::kill(self.child.id() as i32, signal) } != 0 {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("signal {}", self.name));
        }
        Ok(())
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            self.child.kill().with_context(|| format!("kill {}", self.name))?;
            self.child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and SIGKILL with an error when that is not obeyed in time.
    pub fn stop(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(libc::SIGTERM)?;
        match self.wait(limit) {
            Ok(status) => Ok(status),
            Err(e) => {
                self.kill()?;
                Err(e.context(format!("{} ignored SIGTERM", self.name)))
            }
        }
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> Result<u64> {
        rss_of(self.id())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(e) = self.kill() {
            eprintln!("{}: {e:#}", self.name);
        }
    }
}

/// Seconds of processor time that a process has used, user and system, all its threads; in steps of 10 ms.
pub fn cpu_seconds_of(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // Behind the name in brackets; clock ticks of user and system time are fields 14 and 15, a hundred to the second on Linux.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |n: usize| fields.get(n - 3).and_then(|f| f.parse::<f64>().ok()).context("a short stat line");
    Ok((ticks(14)? + ticks(15)?) / 100.0)
}

/// Resident memory of a process in bytes.
pub fn rss_of(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).with_context(|| format!("{path} has no VmRSS"))?;
    let kib: u64 = line.split_whitespace().nth(1).unwrap_or("").parse().with_context(|| format!("{path}: {line}"))?;
    Ok(kib * 1024)
}

/// What a finished command printed.
#[derive(Debug)]
pub struct Finished {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// An error that carries the command's own words unless it ended well.
    pub fn ok(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        let words = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        bail!("{} failed ({}):\n{}", self.what, self.status, tail(words, 15))
    }
}

/// Runs a command to its end, or kills its whole process group at the limit.
pub fn run(mut command: Command, limit: Duration) -> Result<Finished> {
    let what = command_line(&command);
    // Files, not pipes: nothing has to be drained while we wait, and a grandchild that keeps them open holds up nobody.
    let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    bind_to_us(&mut command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("start {what}"))?;
    let waited = wait_for(&what, limit, || Ok(child.try_wait()?));
    let read = |file: &mut File| -> Result<String> {
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match waited {
        Ok(status) => Ok(Finished { what, status, stdout: read(&mut out)?, stderr: read(&mut err)? }),
        Err(e) => {
            // SAFETY: plain numbers; the group is the one `bind_to_us` made for this child, not yet reaped.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
            child.wait()?;
            let words = tail(&read(&mut err)?, 10);
            Err(e.context(format!("{what} was stopped; it had said: {words}")))
        }
    }
}

/// Runs a tool by name with arguments, as [`run`], and insists on success.
pub fn call(tool: &str, args: &[&str], limit: Duration) -> Result<Finished> {
    let mut command = Command::new(crate::tools::need(tool)?);
    command.args(args);
    run(command, limit)?.ok()
}

/// The command as one would type it.
pub fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| quoted(&w.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// A word as a shell takes it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut c = Command::new("/bin/sh");
        c.args(["-c", script]);
        c
    }

    #[test]
    fn a_command_that_hangs_is_stopped_with_its_children_and_its_words_are_kept() {
        let error = run(sh("echo words >&2; sleep 1000 & wait"), Duration::from_millis(300)).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("words") && text.contains("not seen within"), "{text}");
    }

    #[test]
    fn a_failing_command_says_what_it_said() {
        let error = run(sh("echo no room >&2; exit 3"), Duration::from_secs(20)).unwrap().ok().unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
    }

    #[test]
    fn a_program_is_waited_for_by_its_line_and_dies_with_its_handle() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut program = Program::start("sleeper", sh("echo READY now; sleep 1000"), &log).unwrap();
        assert_eq!(program.wait_line("READY", Duration::from_secs(20)).unwrap(), "READY now");
        assert!(program.rss().unwrap() > 0);
        let id = program.id();
        drop(program);
        assert!(!Path::new(&format!("/proc/{id}")).exists());
        let mut gone = Program::start("ender", sh("echo sorry; exit 1"), &log).unwrap();
        let error = gone.wait_line("READY", Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("sorry"), "the earlier run's line must not count: {error}");
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a/b-c.d"), "a/b-c.d");
        assert_eq!(quoted("a b'c"), r"'a b'\''c'");
        assert_eq!(quoted(""), "''");
    }
}
