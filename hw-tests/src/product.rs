//! The product as its user has it: three binaries, a box and an agent in folders of their own, nothing outside them.

use crate::{
    control::Control,
    nbd,
    net::Cable,
    process::{self, Finished, Program, wait_for},
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    collections::hash_map::RandomState,
    env, fs,
    hash::{BuildHasher, Hasher},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

/// From start to the READY line; a box with a long journal to recover needs some of it.
const START_MAX: Duration = Duration::from_secs(120);
/// From SIGTERM to the end.
const STOP_MAX: Duration = Duration::from_secs(30);
/// For a command of the CLI that does not move whole disks.
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// Where the three programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    pub holdfastd: PathBuf,
    pub holdfast: PathBuf,
    pub agent: PathBuf,
}

impl Binaries {
    /// Those built together with this program: in the same target folder.
    pub fn beside_us() -> Result<Self> {
        let us = env::current_exe().context("find our own program")?;
        let mut dir = us.parent().context("our own program is in no folder")?;
        if dir.ends_with("deps") {
            dir = dir.parent().unwrap_or(dir);
        }
        Self::in_dir(dir)
    }

    /// Another program built together with them.
    pub fn beside(&self, name: &str) -> Result<PathBuf> {
        let dir = self.holdfastd.parent().context("the programs are in no folder")?;
        let file = dir.join(name);
        if !file.is_file() {
            bail!("{} is not built: run `cargo build --workspace` first", file.display());
        }
        Ok(file)
    }

    /// An example built together with them.
    pub fn example(&self, name: &str) -> Result<PathBuf> {
        let dir = self.holdfastd.parent().context("the programs are in no folder")?;
        let file = dir.join("examples").join(name);
        if !file.is_file() {
            bail!("{} is not built: run `cargo build --workspace --examples` first", file.display());
        }
        Ok(file)
    }

    pub fn in_dir(dir: &Path) -> Result<Self> {
        let built = |name: &str| -> Result<PathBuf> {
            let file = dir.join(name);
            if !file.is_file() {
                bail!("{} is not built: run `cargo build --workspace` first", file.display());
            }
            Ok(file)
        };
        Ok(Self { holdfastd: built("holdfastd")?, holdfast: built("holdfast")?, agent: built("holdfast-agent")? })
    }
}

/// A port for a listener that must have the same one again after a restart, so that it cannot be left to the kernel each time.
///
/// Taken from below the range the kernel gives to outgoing connections: a port out of that range, free a moment ago, is often the
/// source port of somebody's connection when the listener starts, and again whenever the listener is away. Programs of one machine
/// that look for one at the same time begin at different places, and none is given twice by one process.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 10_240;
    static NEXT: OnceLock<AtomicU32> = OnceLock::new();
    let end = outgoing_ports_begin()?;
    let count = end.checked_sub(FIRST).filter(|n| *n >= 1024).with_context(|| {
        format!("outgoing connections may use ports from {end} on: leave some above {FIRST} with sysctl net.ipv4.ip_local_port_range")
    })?;
    let next = NEXT.get_or_init(|| AtomicU32::new(RandomState::new().build_hasher().finish() as u32));
    for _ in 0..count {
        let port = FIRST + next.fetch_add(1, Relaxed) % count;
        let port = u16::try_from(port).context("a port above 65535")?;
        // Every address of the machine: the box may listen on one that guests reach.
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port from {FIRST} to {end}")
}

/// The first port the kernel may give to an outgoing connection.
fn outgoing_ports_begin() -> Result<u32> {
    const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    text.split_whitespace().next().and_then(|n| n.parse().ok()).with_context(|| format!("{FILE} says {text:?}"))
}

/// A box in a folder, on loopback.
#[derive(Debug)]
pub struct Appliance {
    bins: Binaries,
    dir: PathBuf,
    listen: SocketAddr,
    nbd_listen: SocketAddr,
    control: Control,
    program: Option<Program>,
}

impl Appliance {
    /// Starts a box with everything in `dir`: `box.toml`, `data/`, `box.log`.
    pub fn start(bins: &Binaries, dir: &Path) -> Result<Self> {
        Self::start_on(bins, dir, "127.0.0.1")
    }

    /// As [`start`](Self::start), with TLS listeners on another address, e.g. one that guests reach.
    pub fn start_on(bins: &Binaries, dir: &Path, address: &str) -> Result<Self> {
        Self::start_configured(bins, dir, address, "")
    }

    /// As [`start`](Self::start), with further lines in its configuration.
    pub fn start_with(bins: &Binaries, dir: &Path, more: &str) -> Result<Self> {
        Self::start_configured(bins, dir, "127.0.0.1", more)
    }

    fn start_configured(bins: &Binaries, dir: &Path, address: &str, more: &str) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let at = |port: u16| -> Result<SocketAddr> { Ok(format!("{address}:{port}").parse()?) };
        let (listen, nbd_listen) = (at(free_port()?)?, at(free_port()?)?);
        let data = dir.join("data");
        // Boxes of several tests run at once: pages are served where they are asked for.
        let web = if more.contains("web.listen") { "" } else { "web.listen = \"none\"\n" };
        let config = format!(
            "data = {}\nnames = [\"localhost\"]\nlisten = \"{listen}\"\nnbd_listen = \"{nbd_listen}\"\nmetrics_listen = \"127.0.0.1:{}\"\n{web}{more}",
            toml_text(&data),
            free_port()?
        );
        fs::write(dir.join("box.toml"), config)?;
        let control = Control::new(&data.join("run/control.sock"));
        let mut this = Self { bins: bins.clone(), dir, listen, nbd_listen, control, program: None };
        this.run()?;
        Ok(this)
    }

    /// Starts the daemon again after [`kill`](Self::kill) or [`stop`](Self::stop), on the same ports and data.
    pub fn run(&mut self) -> Result<()> {
        let mut command = Command::new(&self.bins.holdfastd);
        command.arg("--config").arg(self.dir.join("box.toml"));
        let mut program = Program::start("holdfastd", command, &self.dir.join("box.log"))?;
        program.wait_line("READY", START_MAX)?;
        self.program = Some(program);
        Ok(())
    }

    /// SIGKILL: what the box has not made durable is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.program.take().map_or(Ok(()), |mut p| p.kill())
    }

    /// SIGTERM: everything durable, and a clean exit.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut program) = self.program.take() else { return Ok(()) };
        let status = program.stop(STOP_MAX)?;
        if !status.success() {
            bail!("holdfastd ended with {status}:\n{}", program.tail());
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("box.log")
    }
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }
    pub fn nbd_listen(&self) -> SocketAddr {
        self.nbd_listen
    }
    pub fn control(&self) -> &Control {
        &self.control
    }
    pub fn program(&mut self) -> Result<&mut Program> {
        self.program.as_mut().context("the box is not running")
    }

    /// The records of the only group's journal, as `holdfast inspect` lists them. The box must be stopped.
    pub fn records(&self) -> Result<Vec<Value>> {
        let groups = fs::read_dir(self.data_dir().join("groups"))?.collect::<Result<Vec<_>, _>>()?;
        let [group] = groups.as_slice() else { bail!("{} groups, one was expected", groups.len()) };
        let mut command = Command::new(&self.bins.holdfast);
        command.arg("inspect").arg(group.path()).args(["--records", "--json", "--limit", "1000000"]);
        let listed = process::run(command, COMMAND_MAX)?.ok()?.stdout;
        // What comes before them is one object over many lines.
        let records = listed.lines().filter(|l| l.starts_with("{\""));
        records.map(|l| serde_json::from_str(l).with_context(|| l.to_owned())).collect()
    }

    /// The command line program, pointed at this box.
    pub fn cli(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.bins.holdfast);
        command.arg("--socket").arg(self.control.socket()).args(args);
        command
    }
    pub fn run_cli(&self, args: &[&str]) -> Result<Finished> {
        process::run(self.cli(args), COMMAND_MAX)?.ok()
    }

    pub fn token(&self) -> Result<String> {
        let answer = self.control.post("/tokens", &json!({}))?;
        Ok(answer["token"].as_str().with_context(|| format!("no token in {answer}"))?.to_owned())
    }

    /// A group with no host: one ingest target per volume.
    pub fn create_ingest(&self, name: &str, volumes: &[(&str, u64)]) -> Result<()> {
        let volumes: Vec<Value> = volumes.iter().map(|(name, bytes)| json!({ "name": name, "bytes": bytes })).collect();
        self.control.post("/groups", &json!({ "name": name, "volumes": volumes })).map(drop)
    }

    /// Where a group's ingest target listens; after a restart it is there once the group's journal is open.
    pub fn ingest_target(&self, group: &str, volume: &str) -> Result<Export> {
        let id = self.group(group)?["id"].clone();
        let found = wait_for(&format!("the ingest target of {group}/{volume}"), START_MAX, || {
            let targets = self.control.get("/ingest-targets")?;
            let mut list = targets.as_array().into_iter().flatten();
            Ok(list.find(|t| t["group"] == id && t["volume_name"] == volume).cloned())
        })?;
        Export::from_json(&found)
    }

    pub fn group(&self, name: &str) -> Result<Value> {
        self.control.get(&format!("/groups/{name}"))
    }

    /// Waits until the group's state is `state`.
    pub fn wait_state(&self, group: &str, state: &str, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait_for(&format!("group {group} to be {state}"), limit, || {
            last = self.group(group)?;
            Ok((last["state"] == state).then(|| last.clone()))
        });
        found.with_context(|| {
            format!("last seen: state {} reason {} sync {}", last["state"], last["reason"], last["sync"])
        })
    }

    /// A bookmark, made as an administrator does: with the command line.
    pub fn bookmark(&self, group: &str, name: &str) -> Result<Moment> {
        let answer = self.run_cli(&["bookmark", "create", name, "--group", group, "--json"])?;
        let made: Value =
            serde_json::from_str(&answer.stdout).with_context(|| format!("bookmark answered {:?}", answer.stdout))?;
        let number = |key: &str| made[key].as_u64().with_context(|| format!("no {key} in {made}"));
        Ok(Moment { name: name.to_owned(), lsn: number("lsn")?, time_us: number("time_us")? })
    }

    /// Opens a view; it closes with its guard.
    pub fn view(&self, group: &str, at: &At) -> Result<View> {
        let opened =
            self.control.post(&format!("/groups/{group}/views"), &json!({ "at": at.to_json(), "tcp": false }))?;
        let exports = opened["exports"].as_array().with_context(|| format!("no exports in {opened}"))?;
        Ok(View {
            control: self.control.clone(),
            id: text_or_number(&opened["id"]),
            open: true,
            lsn: opened["lsn"].as_u64().with_context(|| format!("no lsn in {opened}"))?,
            exports: exports.iter().map(Export::from_json).collect::<Result<_>>()?,
        })
    }

    /// Writes a client certificate in the layout QEMU and libnbd look for.
    pub fn client_certificate(&self, name: &str, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        let made = self.control.post("/client-certs", &json!({ "name": name }))?;
        for (key, file) in
            [("ca_pem", "ca-cert.pem"), ("certificate_pem", "client-cert.pem"), ("key_pem", "client-key.pem")]
        {
            let pem = made[key].as_str().with_context(|| format!("no {key} in the answer"))?;
            fs::write(dir.join(file), pem)?;
        }
        Ok(())
    }
}

/// Ends the machines that a box runs, when dropped: they outlive the box, and must not outlive a test that fails.
#[derive(Debug)]
pub struct EndMachines(PathBuf);

impl EndMachines {
    pub fn of(appliance: &Appliance) -> Self {
        Self(appliance.data_dir())
    }
}

impl Drop for EndMachines {
    fn drop(&mut self) {
        end_machines(&self.0);
    }
}

/// Ends the machines that a box with this folder of data runs, or has left.
pub fn end_machines(data: &Path) {
    for run in fs::read_dir(data.join("takeovers")).into_iter().flatten().flatten() {
        let Ok(pid) = fs::read_to_string(run.path().join("pid")) else { continue };
        let pid = pid.trim();
        // The number may be another process's by now.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&*run.path().to_string_lossy()) {
            let _ = Command::new("kill").args(["-KILL", pid]).status();
        }
    }
}

/// A recovery point as one asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    Latest,
    Lsn(u64),
    Time(u64),
    Bookmark(String),
}

impl At {
    fn to_json(&self) -> Value {
        match self {
            Self::Latest => json!("latest"),
            Self::Lsn(lsn) => json!({ "lsn": lsn }),
            Self::Time(us) => json!({ "time": us }),
            Self::Bookmark(name) => json!({ "bookmark": name }),
        }
    }
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Latest => f.write_str("the newest moment"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Time(us) => write!(f, "time {}.{:06}", us / 1_000_000, us % 1_000_000),
            Self::Bookmark(name) => write!(f, "bookmark {name}"),
        }
    }
}

/// A bookmark as the box made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    pub name: String,
    pub lsn: u64,
    pub time_us: u64,
}

/// One NBD export of the box.
#[derive(Clone, Debug)]
pub struct Export {
    pub volume_name: String,
    pub export_name: String,
    pub unix_socket: PathBuf,
}

impl Export {
    fn from_json(value: &Value) -> Result<Self> {
        let text =
            |key: &str| value[key].as_str().map(str::to_owned).with_context(|| format!("no {key} in export {value}"));
        Ok(Self {
            volume_name: text("volume_name")?,
            export_name: text("export_name")?,
            unix_socket: text("unix_socket")?.into(),
        })
    }
    pub fn connect(&self) -> Result<nbd::Client> {
        nbd::Client::connect(&self.unix_socket, &self.export_name)
    }
    /// The address in the form libnbd and QEMU read.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.export_name, self.unix_socket.display())
    }
}

/// An open view; closed when dropped.
#[derive(Debug)]
pub struct View {
    control: Control,
    id: String,
    open: bool,
    pub lsn: u64,
    pub exports: Vec<Export>,
}

impl View {
    pub fn only(&self) -> Result<&Export> {
        match self.exports.as_slice() {
            [one] => Ok(one),
            more => bail!("the view has {} exports, one was expected", more.len()),
        }
    }
    pub fn close(mut self) -> Result<()> {
        self.open = false;
        self.control.delete(&format!("/views/{}", self.id)).map(drop)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // The box may have been killed meanwhile, and the view with it: said, and no more.
        if self.open
            && let Err(e) = self.control.delete(&format!("/views/{}", self.id))
        {
            eprintln!("view {} was not closed: {e:#}", self.id);
        }
    }
}

/// An agent in a folder: `agent.toml`, `state/`, `run/`, `agent.log`. Nothing under `/etc` or `/var` is touched; its capture
/// is pinned in a folder of its own on the BPF file system.
#[derive(Debug)]
pub struct Agent {
    bins: Binaries,
    dir: PathBuf,
    pins: PathBuf,
    cable: Option<Cable>,
    program: Option<Program>,
}

/// What is not as usual with an agent.
#[derive(Debug, Default)]
pub struct Setup<'a> {
    /// Lines of its configuration.
    pub config: &'a str,
    /// Its host is behind this cable; everything but the network it shares with us.
    pub cable: Option<Cable>,
    /// Where it reaches the box; none: where the box listens.
    pub address: Option<SocketAddr>,
}

impl Agent {
    /// Writes the configuration, enrols with the box, and starts the daemon.
    pub fn start(bins: &Binaries, dir: &Path, appliance: &Appliance) -> Result<Self> {
        Self::start_with(bins, dir, appliance, Setup::default())
    }

    pub fn start_with(bins: &Binaries, dir: &Path, appliance: &Appliance, setup: Setup<'_>) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let pins = pin_dir(&dir);
        let places = [("state_dir", dir.join("state")), ("run_dir", dir.join("run")), ("pin_dir", pins.clone())];
        let config: String = places.iter().map(|(key, path)| format!("{key} = {}\n", toml_text(path))).collect();
        // Disks are compared with the box sector by sector, free ones too.
        let copy = if setup.config.contains("copy = ") { "" } else { "copy = \"whole\"\n" };
        fs::write(dir.join("agent.toml"), config + copy + setup.config)?;
        let mut this = Self { bins: bins.clone(), dir, pins, cable: setup.cable, program: None };
        if !this.dir.join("state").join("enrolled").exists() {
            let token = appliance.token()?;
            this.run_cli(&[
                "enrol",
                "--box",
                &setup.address.unwrap_or(appliance.listen()).to_string(),
                "--token",
                &token,
            ])?;
        }
        this.run()?;
        wait_for("the agent to reach the box", START_MAX, || {
            let hosts = appliance.control().get("/hosts")?;
            let connected = hosts.as_array().into_iter().flatten().any(|h| h["connected"] == true);
            Ok(connected.then_some(()))
        })?;
        Ok(this)
    }

    /// Starts the daemon again after [`kill`](Self::kill).
    pub fn run(&mut self) -> Result<()> {
        let program = Program::start("holdfast-agent", self.cli(&["run"]), &self.dir.join("agent.log"))?;
        let program = self.program.insert(program);
        let socket = self.dir.join("state/agent.sock");
        wait_for("the agent to answer", Duration::from_secs(30), || {
            program.expect_running()?;
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok().then_some(()))
        })
    }

    pub fn kill(&mut self) -> Result<()> {
        self.program.take().map_or(Ok(()), |mut p| p.kill())
    }
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut program) = self.program.take() else { return Ok(()) };
        program.stop(STOP_MAX).map(drop)
    }
    pub fn program(&mut self) -> Result<&mut Program> {
        self.program.as_mut().context("the agent is not running")
    }
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("agent.log")
    }
    pub fn cli(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.bins.agent);
        command.arg("--config").arg(self.dir.join("agent.toml")).args(args);
        match &self.cable {
            Some(cable) => cable.host(&command),
            None => command,
        }
    }
    /// The cable it was set up with.
    pub fn cable(&self) -> Result<&Cable> {
        self.cable.as_ref().context("this agent's host has no cable of its own")
    }
    /// What keeps capturing while the agent is away; gone once nothing of it is left in the kernel.
    pub fn pins(&self) -> &Path {
        &self.pins
    }
    pub fn run_cli(&self, args: &[&str]) -> Result<Finished> {
        process::run(self.cli(args), COMMAND_MAX)?.ok()
    }
    pub fn protect(&self, device: &Path, group: &str) -> Result<()> {
        self.run_cli(&["protect", &device.to_string_lossy(), "--group", group]).map(drop)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(e) = self.kill().and_then(|()| unpin(&self.pins)) {
            eprintln!("agent in {}: {e:#}", self.dir.display());
        }
    }
}

/// Where the capture of the agent in `dir` is pinned. The same for each run in one folder, so that a later one can clean up.
pub fn pin_dir(dir: &Path) -> PathBuf {
    let name = dir
        .to_string_lossy()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    Path::new("/sys/fs/bpf").join(format!("holdfast-{name:016x}"))
}

/// Takes a capture out of the kernel that outlived its agent.
pub fn unpin(pins: &Path) -> Result<()> {
    if pins.exists() {
        fs::remove_dir_all(pins).with_context(|| format!("remove {}", pins.display()))?;
    }
    Ok(())
}

/// A path as a TOML string.
fn toml_text(path: &Path) -> String {
    // JSON's escapes are a subset of a TOML basic string's.
    Value::String(path.to_string_lossy().into_owned()).to_string()
}

fn text_or_number(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_none_the_kernel_gives_to_connections_and_is_given_once() {
        let end = outgoing_ports_begin().unwrap();
        let ports: Vec<u16> = (0..50).map(|_| free_port().unwrap()).collect();
        assert!(ports.iter().all(|p| u32::from(*p) < end), "{ports:?}");
        let mut distinct = ports.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), ports.len(), "{ports:?}");
    }
}
