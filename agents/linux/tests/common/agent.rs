//! The agent as a process, with directories and pins of its own.
#![allow(dead_code, reason = "each test file uses a part")]

use super::{Loop, PinDir, fakebox::FakeBox, first_difference};
use serde_json::Value;
use std::{
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

pub const BIN: &str = env!("CARGO_BIN_EXE_holdfast-agent");

pub struct Agent {
    pub dir: tempfile::TempDir,
    pub config: PathBuf,
    child: Option<Child>,
    // Last: pins go after the process.
    pub pins: PinDir,
}

impl Agent {
    /// Enrolled, not running.
    pub fn enrolled(test: &str, fake: &FakeBox, settings: &str) -> Self {
        let agent = Self::new(test, None, settings);
        let token = fake.token().to_string();
        let out = agent.cli(&["enrol", "--box", &fake.address, "--token", &token, "--name", "test-host"]);
        assert!(out.status.success(), "{}", text(&out));
        agent
    }

    pub fn new(test: &str, state_dir: Option<PathBuf>, settings: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("hf-agent-").tempdir().unwrap();
        let pins = PinDir::new(test);
        let config = dir.path().join("config.toml");
        let state = state_dir.unwrap_or_else(|| dir.path().join("state"));
        // What the machine of the tests suffers is no matter of most of them.
        let heed = if settings.contains("heed_pressure") { "" } else { "heed_pressure = false" };
        // Most of them compare every sector of the disk, free ones too.
        let copy = if settings.contains("copy = ") { "" } else { "copy = \"whole\"" };
        let text = format!(
            "state_dir = {state:?}\nrun_dir = {:?}\npin_dir = {:?}\n{settings}\n{heed}\n{copy}\n[log]\nlevel = \"info\"\n",
            dir.path().join("run"),
            pins.0,
        );
        std::fs::write(&config, text).unwrap();
        Self { dir, config, child: None, pins }
    }

    pub fn cli(&self, args: &[&str]) -> Output {
        Command::new(BIN).arg("--config").arg(&self.config).args(args).output().unwrap()
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.cli(args);
        assert!(out.status.success(), "{args:?}: {}\n{}", text(&out), self.log());
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    pub fn start(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let child = Command::new(BIN)
            .arg("--config")
            .arg(&self.config)
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.wait("the agent answers", |a| a.status().is_some());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| c.try_wait().unwrap().is_none())
    }

    fn memory_kib(&self, line: &str) -> u64 {
        let id = self.child.as_ref().expect("running").id();
        let text = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let value = text.lines().find_map(|l| l.strip_prefix(line)).expect("the kernel says it");
        value.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
    }
    pub fn resident_kib(&self) -> u64 {
        self.memory_kib("VmRSS:")
    }
    pub fn peak_kib(&self) -> u64 {
        self.memory_kib("VmHWM:")
    }

    /// What a reboot takes: the kernel half, and what lies on tmpfs. The agent must be stopped.
    pub fn forget_boot(&self) {
        self.ok(&["remove"]);
        std::fs::remove_dir_all(self.dir.path().join("run")).unwrap();
    }

    /// As SIGKILL finds it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// As systemd stops it.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("running");
        // SAFETY: our own child, not waited for yet.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{status}\n{}", self.log());
                return;
            }
            assert!(Instant::now() < deadline, "the agent does not stop\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn status(&self) -> Option<Value> {
        let out = self.cli(&["status", "--json"]);
        out.status.success().then(|| serde_json::from_slice(&out.stdout).unwrap())
    }

    pub fn group(&self) -> Value {
        self.status().map_or(Value::Null, |s| s["groups"][0].clone())
    }

    pub fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain: {what}\n{}\n{:?}", self.log(), self.status());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn connected(&self) {
        self.wait("connected to the box", |a| a.status().is_some_and(|s| s["box"]["connected"] == true));
    }

    /// Protects one disk as group `g` and waits until the first copy has ended.
    pub fn protect(&self, disk: &Loop) {
        self.connected();
        self.ok(&["protect", disk.dev(), "--group", "g"]);
    }

    /// Nothing of the host is missing on the box.
    pub fn settled(&self) {
        self.wait("everything is on the box", |a| {
            let g = a.group();
            g["state"] == "replicating" && g["dirty_bytes"] == 0 && g["spool_records"] == 0
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() || std::env::var_os("HOLDFAST_TEST_LOG").is_some() {
            eprintln!("---- agent log\n{}", self.log());
        }
    }
}

pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// The box's image of the only volume is what the disk holds. Waits, because what was flushed just now may be on its way.
pub fn identical(agent: &Agent, fake: &FakeBox, disk: &Loop) {
    let image = disk.image();
    agent.settled();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let difference = fake.group(|g| first_difference(&g.images[0], &image));
        match difference {
            None => return,
            Some(at) if Instant::now() > deadline => {
                panic!("differs at byte {at:#x}\n{}\n{:?}", agent.log(), agent.group())
            }
            Some(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
