//! `holdfast-agent`: the command line and the daemon.

mod show;

use agent_linux::{
    capture::{
        Capture, CaptureError,
        bpf::{BpfCapture, Options, Pins, watch},
        choose,
        dm::{ioctl::DeviceMapper, mirror, process},
    },
    carry,
    config::{Config, CopyWhat, LogFormat},
    disks::{Backend, Cost, Disks},
    engine::Engine,
    enrol, fence, freeze, inside,
    local::{self, Failure},
    premount, probes, rescue, shim,
    state::{StateDir, boot_id},
    survey,
    throttle::{Kernel, Throttle},
};
use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Ends with it what has no business on this machine; the units know it.
const NOT_HERE: u8 = 77;
/// From dialling over a refusal's pause to the second try.
const CONNECT_WAIT: std::time::Duration = std::time::Duration::from_secs(20);

#[derive(Parser)]
#[command(name = "holdfast-agent", version, about = "Sends every write of this host's disks to a Holdfast box")]
struct Cli {
    /// Configuration file [default: /etc/holdfast-agent/config.toml, if it is there]
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this host known to a box, with a token made there (`holdfast host token`)
    Enrol {
        /// HOST:PORT of the box
        #[arg(long = "box")]
        box_address: String,
        /// The token, or `-` to read it from standard input: a command line is seen by every user of this host
        #[arg(long, allow_hyphen_values = true)]
        token: String,
        /// Name of this host on the box [default: its host name]
        #[arg(long)]
        name: Option<String>,
    },
    /// Run the agent (what the service does)
    Run,
    /// Wait for a box to write this machine's disks: from a live Linux or an initramfs, never on a machine that serves
    Rescue {
        /// HOST:PORT of the box
        #[arg(long = "box")]
        box_address: String,
        /// The token, or `-` to read it from standard input
        #[arg(long, allow_hyphen_values = true)]
        token: String,
        /// Name of this machine on the box [default: its host name]
        #[arg(long)]
        name: Option<String>,
        /// Disks that may be written [default: every whole disk that nothing uses]
        #[arg(long = "allow", value_name = "DISK")]
        allow: Vec<String>,
        /// Go on running when the box says that the machine is to be started anew
        #[arg(long)]
        no_reboot: bool,
        /// Where the identity is kept; should be in memory
        #[arg(long, default_value = "/run/holdfast-rescue")]
        dir: PathBuf,
    },
    /// In a machine that a box runs in this host's place: answer the box
    #[command(hide = true)]
    Inside,
    /// Show the disks of this host as a tree; with a choice, what it takes along, what it gets and what it costs
    Disks {
        /// Device, mount point or volume to look at
        choice: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Protect disks, partitions, volumes or what is mounted somewhere
    Protect {
        #[arg(required = true)]
        devices: Vec<String>,
        /// Name of the protection group
        #[arg(long)]
        group: Option<String>,
        /// Protect the whole disks under the choice, boot sectors and all
        #[arg(long)]
        whole_image: bool,
        /// Mirror LVM, LUKS or other device-mapper volumes: the host's writes return when the box has them durable. When the box does not
        /// answer in time: `available` (the default) goes on without it and raises an alarm, `strict` waits on
        #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "available")]
        sync: Option<SyncPolicy>,
        /// With --sync: milliseconds a write may wait for the box
        #[arg(long, requires = "sync", default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
        wait_ms: u64,
    },
    /// Stop protecting a group; the box keeps its history
    Unprotect { group: String },
    /// Show what the agent is doing
    Status {
        #[arg(long)]
        json: bool,
        /// Keep showing, with a bar while a copy runs
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// Name this moment, so that it can be opened later and is kept
    Bookmark {
        name: String,
        #[arg(long)]
        group: Option<String>,
        #[arg(long, value_enum, default_value_t = Level::Crash)]
        consistency: Level,
    },
    /// Copy a group again
    Resync { group: String },
    /// Make a plain partition, or a disk that is used whole, ready to be mirrored (`protect --sync`): from the next boot on a volume of the
    /// device mapper lies over it
    #[command(subcommand)]
    Shim(ShimCommand),
    /// Take everything of the agent out of the running kernel (the agent must be stopped)
    Remove {
        /// Remove identity and state too
        #[arg(long)]
        purge: bool,
    },
    /// Carries what is known of the disks over a reboot; run by systemd's shutdown hook
    #[command(hide = true)]
    CarryOut {
        /// What to call the boot that ends [default: as the kernel does]; for tests, which cannot boot
        #[arg(long)]
        call_boot: Option<String>,
    },
    /// Lets go what the agent held back; run by systemd when the agent has ended, however it did
    #[command(hide = true)]
    ReleaseThrottle,
    /// Begins capture before the host's first write; run by the initramfs
    #[command(hide = true)]
    Early {
        /// Where the root file system is mounted
        #[arg(long, default_value = "/")]
        sysroot: PathBuf,
        /// What the root file system is going to be mounted from
        #[arg(long, conflicts_with = "sysroot")]
        device: Option<PathBuf>,
    },
    /// Ends a freeze; started by the agent itself
    #[command(name = freeze::GUARD_COMMAND, hide = true)]
    ThawGuard { mounts: Vec<PathBuf> },
    /// Keeps the addresses of a takeover plan unanswered until the box says that this host may serve; run before the network is configured
    #[command(hide = true)]
    Gate,
    /// Runs one script of the configuration as its user; started by systemd or by the agent, with a connection as standard input and output
    #[command(name = probes::script::GUARD_COMMAND, hide = true)]
    ScriptGuard,
}

#[derive(Subcommand)]
enum ShimCommand {
    /// Note a partition or disk. What is written on it is not touched; without the shim it is mounted as before
    Add {
        /// Device or mount point
        device: String,
        /// Name of the volume below /dev/mapper [default: holdfast- and where it is mounted]
        #[arg(long)]
        name: Option<String>,
    },
    /// Strike one out
    Remove { name: String },
    /// Show them
    List {
        #[arg(long)]
        json: bool,
    },
    /// Lays a shim over a device that is noted; run by udev
    #[command(hide = true)]
    Up { device: PathBuf },
    /// Says what lies under a shim; run by update-grub
    #[command(hide = true)]
    Under { volume: PathBuf },
    /// Says from what the root is to be mounted; run by the initramfs
    #[command(hide = true)]
    Root { device: PathBuf },
}

#[derive(Clone, Copy, ValueEnum)]
enum SyncPolicy {
    Available,
    Strict,
}

impl SyncPolicy {
    fn mode(self, wait_ms_max: u64) -> model::SyncMode {
        let at_bound = match self {
            Self::Available => model::Bound::Degrade,
            Self::Strict => model::Bound::Hold,
        };
        model::SyncMode::Sync { wait_ms_max, at_bound }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Level {
    /// As after a power cut
    Crash,
    /// File systems are frozen for the moment
    Filesystem,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Nobody else asks: the guard of a freeze depends on nothing.
    let begins_capture = matches!(cli.command, Command::Run | Command::Early { .. });
    let asks = begins_capture || matches!(cli.command, Command::Inside);
    match asks.then(inside::taken_over) {
        Some(Some(kind)) if begins_capture => {
            eprintln!("holdfast-agent: a box runs this machine in its host's place ({kind}): nothing is captured here");
            if matches!(cli.command, Command::Run) {
                notify_ready();
                return ExitCode::from(NOT_HERE);
            }
            return ExitCode::SUCCESS;
        }
        Some(None) if !begins_capture => {
            eprintln!("holdfast-agent: no box runs this machine");
            return ExitCode::from(NOT_HERE);
        }
        _ => {}
    }
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("holdfast-agent: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    // The guard must not depend on anything, not even a readable configuration.
    if let Command::ThawGuard { mounts } = &cli.command {
        return Ok(freeze::guard(mounts)?);
    }
    if matches!(cli.command, Command::Inside) {
        return inside::serve().context("speak with the box over its port");
    }
    if let Command::Rescue { box_address, token, name, allow, no_reboot, dir } = cli.command {
        let token = enrol::token_from(&token, std::io::stdin()).context("could not read the token")?;
        let name = name.unwrap_or_else(enrol::host_name);
        let options = rescue::Options { box_address, token, name, allow, reboot: !no_reboot, dir };
        let Err(e) = rescue::run(&options);
        return Err(e.into());
    }
    if let Command::Early { sysroot, device } = &cli.command {
        return match device {
            Some(device) => early_before_mount(cli.config.as_deref(), device),
            None => early(cli.config.as_deref(), sysroot).map(drop),
        };
    }
    // Nor must a boot.
    if let Command::Shim(command) = cli.command {
        return shim_command(command);
    }
    let config = Config::load(cli.config.as_deref())?;
    let ask = |request| local::ask(&config.socket(), &request);
    match cli.command {
        Command::ThawGuard { .. }
        | Command::Early { .. }
        | Command::Inside
        | Command::Rescue { .. }
        | Command::Shim(_) => Ok(()),
        Command::Gate => close_gate(&config),
        Command::ScriptGuard => {
            let (input, output) = probes::script::stdio()?;
            Ok(probes::script::guard(&config.scripts, input, output)?)
        }
        Command::CarryOut { call_boot } => carry_out(&config, call_boot),
        Command::Enrol { box_address, token, name } => {
            let state = StateDir::open(&config.state_dir, &config.run_dir)?;
            let _lock = state.lock()?;
            let name = name.unwrap_or_else(enrol::host_name);
            let token = enrol::token_from(&token, std::io::stdin()).context("could not read the token")?;
            let identity = enrol::enrol(&state, &box_address, &token, &name)?;
            println!("enrolled as host {} ({name}) at {box_address}", identity.host);
            println!("next: systemctl enable --now holdfast-agent, then holdfast-agent protect DEVICE");
            Ok(())
        }
        Command::Run => run(config),
        Command::Disks { choice, json } => show_disks(&config, &choice, json),
        Command::Protect { devices, group, whole_image, sync, wait_ms } => {
            let mode = sync.map_or(model::SyncMode::Async, |policy| policy.mode(wait_ms));
            let request = local::Request::Protect { devices, group, whole_image, mode };
            let value = when_connected(|| ask(request.clone()))?;
            show::protected(&value);
            Ok(())
        }
        Command::Unprotect { group } => {
            when_connected(|| ask(local::Request::Unprotect { group: group.clone() }))?;
            println!("{group} is not protected any more; its history stays on the box");
            Ok(())
        }
        Command::Status { json, watch } => {
            if watch {
                return show::watch(|| ask(local::Request::Status));
            }
            let value = ask(local::Request::Status)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&value)?);
            } else {
                print!("{}", show::status(&value));
            }
            Ok(())
        }
        Command::Bookmark { name, group, consistency } => {
            let consistency = match consistency {
                Level::Crash => model::Consistency::Crash,
                Level::Filesystem => model::Consistency::Filesystem,
            };
            let value = ask(local::Request::Bookmark { group, name: name.clone(), consistency })?;
            println!(
                "bookmark {name:?} is durable on the box (record {} of stream {})",
                value["seq"],
                show::text(&value["stream"])
            );
            Ok(())
        }
        Command::Resync { group } => {
            ask(local::Request::Resync { group: group.clone() })?;
            println!("{group} is copied again; older moments stay open");
            Ok(())
        }
        Command::Remove { purge } => remove(&config, purge),
        Command::ReleaseThrottle => release_throttle(&config),
    }
}

fn show_disks(config: &Config, choice: &[String], json: bool) -> anyhow::Result<()> {
    let mut disks = Disks::here()?;
    disks.legacy = config.capture == choose::Choice::BpfLegacy;
    disks.at_mirrors(choose::why_mirrors(config.capture));
    if choice.is_empty() {
        match json {
            true => println!("{}", serde_json::to_string_pretty(&disks.json())?),
            false => print!("{disks}"),
        }
        return Ok(());
    }
    let resolution = disks.resolve(choice)?;
    let (unused, whole) = match config.copy {
        CopyWhat::Allocated if disks.why_mirrors().is_none() => {
            let on_disk = |(i, l): (usize, &agent_linux::disks::Leaf)| survey::OnDisk {
                id: model::VolumeId(i as u32),
                device: l.volume.clone(),
                disk: l.disk.clone(),
                range: l.range,
            };
            survey::estimate(&disks, &resolution.leaves.iter().enumerate().map(on_disk).collect::<Vec<_>>())
        }
        _ => (model::ByteLen(0), Vec::new()),
    };
    let cost = Cost::of(&resolution, &disks, config, unused);
    if json {
        let mut value = disks.choice_json(choice, &resolution);
        value["cost"] = cost.json();
        value["copied_whole"] = serde_json::json!(whole);
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    for choice in choice {
        let stack = disks.stack_of(disks.find(choice)?);
        println!("{choice} is");
        stack.iter().enumerate().for_each(|(depth, layer)| println!("{:width$}{layer}", "", width = 2 + depth * 2));
    }
    println!("captured would be");
    for leaf in &resolution.leaves {
        println!(
            "  /dev/{:<20} {:>10}  {:<8}  {}",
            leaf.volume,
            model::ByteLen(leaf.range.bytes()).to_string(),
            leaf.backend.name(),
            leaf.why
        );
    }
    resolution.notes.iter().chain(&whole).for_each(|note| println!("  {note}"));
    for choice in choice {
        let device = disks.find(choice)?;
        if shim::is_for(&disks, device) {
            println!("  {}", disks.how_to_mirror(device));
        }
    }
    if let Some(why) = disks.why_mirrors() {
        println!("  {why}");
    }
    let mut backends: Vec<Backend> = resolution.leaves.iter().map(|l| l.backend).collect();
    backends.sort();
    backends.dedup();
    backends.iter().for_each(|b| println!("promise  {}: {}", b.name(), b.promise()));
    println!("{cost}");
    Ok(())
}

fn shim_command(command: ShimCommand) -> anyhow::Result<()> {
    let list = shim::List::default();
    let made = |initramfs: Option<&str>| match initramfs {
        Some(program) => println!("the initramfs was made anew ({program})"),
        None => println!("there is no initramfs to be made anew; udev does it once the host is up"),
    };
    match command {
        ShimCommand::Add { device, name } => {
            let done = shim::add(&list, &device, name.as_deref())?;
            made(done.initramfs);
            match done.at_once {
                true => println!("{} is now /dev/mapper/{}", done.device, done.name),
                false => println!("from the next boot on {} is mounted as /dev/mapper/{}", done.device, done.name),
            }
            println!(
                "mounts by UUID, label or PARTUUID go there by themselves; should anything not be as it is now, the host boots as before. Then:"
            );
            println!("  holdfast-agent protect --sync /dev/mapper/{}", done.name);
        }
        ShimCommand::Remove { name } => {
            let done = shim::remove(&list, &name)?;
            made(done.initramfs);
            match done.at_once {
                true => println!("{} is gone", done.name),
                false => {
                    println!("{} is in use, and gone after the next boot; until then it changes nothing", done.name)
                }
            }
        }
        ShimCommand::List { json } => {
            let seen = shim::list(&list)?;
            if json {
                let all: Vec<_> = seen
                    .iter()
                    .map(
                        |s| serde_json::json!({ "name": s.name, "over": s.over, "device": s.device, "state": s.state }),
                    )
                    .collect();
                println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "shims": all }))?);
                return Ok(());
            }
            if seen.is_empty() {
                println!("no shims");
            }
            for s in seen {
                println!("/dev/mapper/{:<24} {:<12} {}  ({})", s.name, s.device.unwrap_or_default(), s.state, s.over);
            }
        }
        // By what this prints and returns udev's rule and the initramfs tell what to do.
        ShimCommand::Up { device } => match shim::up(&list, &device)? {
            shim::Up::There { name } => println!("{name}"),
            shim::Up::NotNoted => std::process::exit(i32::from(NOT_HERE)),
        },
        ShimCommand::Under { volume } => {
            if let Some(raw) = shim::under(&volume) {
                println!("{}", raw.display());
            }
        }
        ShimCommand::Root { device } => {
            if let Some(volume) = shim::root_of(&device) {
                println!("{}", volume.display());
            }
        }
    }
    Ok(())
}

fn carry_out(config: &Config, call_boot: Option<String>) -> anyhow::Result<()> {
    let state = StateDir::open_read_only(&config.state_dir, &config.run_dir)?;
    if !config.carry_over || !BpfCapture::is_pinned(&config.pin_dir) {
        return Ok(carry::forget(&state)?);
    }
    let written = write_out(config, call_boot, &state);
    if written.is_err() {
        carry::forget(&state)?;
    }
    written
}

fn write_out(config: &Config, call_boot: Option<String>, state: &StateDir) -> anyhow::Result<()> {
    let options = Options { pins: config.pin_dir.clone(), ring_bytes: config.ring_bytes() };
    let mut capture = BpfCapture::start(&options, None)?;
    let boot = boot_id();
    let called = call_boot.unwrap_or_else(|| boot.clone());
    for (group, done) in carry::write_out(state, &config.run_dir, &boot, &called, &mut capture)? {
        match done {
            Ok(()) => carry::tell(&format!("group {group} is carried over the reboot")),
            Err(why) => carry::tell(&format!("group {group} is not carried over the reboot: {why}")),
        }
    }
    Ok(())
}

/// Ends with [`NOT_HERE`] when capture could not begin yet: then the next hook tries, with the root file system mounted.
fn early_before_mount(config: Option<&Path>, device: &Path) -> anyhow::Result<()> {
    let begun = match premount::Looked::into(device, Path::new("/run/holdfast-agent.root"))? {
        Some(looked) => early(config, looked.path())?,
        None => false,
    };
    if !begun {
        std::process::exit(i32::from(NOT_HERE));
    }
    Ok(())
}

/// Answers whether there is anything to capture.
fn early(config: Option<&Path>, sysroot: &Path) -> anyhow::Result<bool> {
    let inside = |path: &Path| sysroot.join(path.strip_prefix("/").unwrap_or(path));
    let default = inside(Path::new(agent_linux::config::DEFAULT_PATH));
    let config = match config {
        Some(path) => Config::load(Some(path))?,
        None if default.exists() => Config::load(Some(&default))?,
        None => Config::default(),
    };
    let state_dir = inside(&config.state_dir);
    if !config.carry_over || !state_dir.join("identity.json").exists() {
        return Ok(false);
    }
    let state = StateDir::open_read_only(&state_dir, &config.run_dir)?;
    let targets = carry::targets(&Disks::here()?, &state.load_groups()?);
    let Some((node, first)) = targets.first().map(|(node, t)| (node.clone(), t.disk)) else { return Ok(false) };
    let options = Options { pins: config.pin_dir.clone(), ring_bytes: config.ring_bytes() };
    let mut capture = BpfCapture::start(&options, Some((&node, first)))?;
    capture.set_targets(&targets.into_iter().map(|(_, t)| t).collect::<Vec<_>>())?;
    std::fs::create_dir_all(&config.run_dir)?;
    let early = carry::check_early(&state, &config.run_dir, &boot_id(), Path::new("/sys"))?;
    carry::tell(&format!("capture begins; {} groups go on over the reboot", early.groups.len()));
    Ok(true)
}

/// An agent that was started a moment ago is still on its way to the box: what needs the box waits for that, for a while, and says so.
fn when_connected(ask: impl Fn() -> Result<serde_json::Value, local::AskError>) -> anyhow::Result<serde_json::Value> {
    let begun = std::time::Instant::now();
    let mut said = 0;
    loop {
        let refused = match ask() {
            Err(local::AskError::Failed(failure)) if failure.code == Failure::NO_BOX => failure,
            other => return Ok(other?),
        };
        let waited = begun.elapsed();
        if waited >= CONNECT_WAIT {
            return Err(local::AskError::Failed(refused).into());
        }
        if waited.as_secs() >= said {
            said = waited.as_secs() + 5;
            let left = (CONNECT_WAIT - waited).as_secs();
            eprintln!("waiting up to {left} s more: {}", refused.message);
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn close_gate(config: &Config) -> anyhow::Result<()> {
    if let Some(kind) = inside::taken_over() {
        println!("a box runs this machine in its host's place ({kind}): nothing is held");
        return Ok(());
    }
    let store = fence::Store::new(&config.state_dir, &config.run_dir, &boot_id());
    if fence::Gate::of(config).close(&store)? {
        println!("this host serves by lease: its addresses answer nobody until the box grants it");
    }
    Ok(())
}

fn release_throttle(config: &Config) -> anyhow::Result<()> {
    Ok(Throttle::open(&config.run_dir, Box::new(Kernel))?.release()?)
}

fn remove(config: &Config, purge: bool) -> anyhow::Result<()> {
    let state = StateDir::open(&config.state_dir, &config.run_dir)?;
    let lock = state.lock()?;
    release_throttle(config)?;
    if fence::let_go(&fence::Store::new(&config.state_dir, &config.run_dir, &boot_id()), &fence::Gate::of(config))? {
        println!("no takeover plan fences this host any more; tell the box, which does not know");
    }
    if let Some(pins) = Pins::existing(&config.pin_dir) {
        pins.remove()?;
        println!("capture is out of the kernel");
    }
    watch::remove(&watch::dir_beside(&config.pin_dir))?;
    // A host without the device mapper has no mirrors.
    if let Ok(dm) = DeviceMapper::open() {
        for name in mirror::take_out_all(&dm)? {
            println!("/dev/mapper/{name} has its own table again");
        }
    }
    for name in shim::remove_all(&shim::List::default())? {
        println!("/dev/mapper/{name} is in use, and gone after the next boot; until then it changes nothing");
    }
    match state.load_groups() {
        Ok(groups) => groups.iter().for_each(agent_linux::engine::restore_requests),
        Err(e) if purge => eprintln!("holdfast-agent: {}", agent_linux::error_chain(&e)),
        Err(e) => return Err(e.into()),
    }
    if purge {
        drop(lock);
        for dir in [&config.run_dir, &config.state_dir] {
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    bail!("could not remove {}: {e}", dir.display());
                }
                _ => println!("removed {}", dir.display()),
            }
        }
    }
    Ok(())
}

/// A log that does not take a line loses it: the journal may be writing to a volume whose writes wait for this very process.
struct LogLine(std::io::Stderr);

impl std::io::Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.0.write(bytes) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Only for the journal's socket, which is this process's alone: a terminal or a file is shared with others.
fn log_without_waiting() {
    use nix::{
        fcntl::{FcntlArg, OFlag, fcntl},
        sys::stat::fstat,
    };
    let stderr = std::io::stderr();
    // Inherited by programs whose standard error is something else.
    let journal = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    if !fstat(&stderr).is_ok_and(|s| format!("{}:{}", s.st_dev, s.st_ino) == journal) {
        return;
    }
    let set = fcntl(&stderr, FcntlArg::F_GETFL)
        .and_then(|flags| fcntl(&stderr, FcntlArg::F_SETFL(OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK)));
    if let Err(e) = set {
        tracing::debug!(error = %e, "a log that stands still will be waited for");
    }
}

fn log(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::new(&config.log.level);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogLine(std::io::stderr()));
    match config.log.format {
        LogFormat::Json => builder.json().init(),
        // The journal has its own times.
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            builder.without_time().with_ansi(false).init()
        }
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

/// Under memory pressure others go first: a killed agent is made anew by systemd and goes on, but it costs a gap.
fn lower_oom_score() {
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-500") {
        tracing::debug!(error = %e, "could not lower the OOM score");
    }
}

/// The allocator gives back what a burst took: without this each thread keeps a heap of its own, and a heap keeps its largest size.
fn keep_memory_small() {
    // SAFETY: plain numbers, before any other thread is made. A refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    keep_memory_small();
    // Refused by old kernels; a mirror's leg says so when it matters.
    process::flush_for_others();
    log(&config);
    log_without_waiting();
    lower_oom_score();
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed"))?;
    // Blocked before any thread is made, so that all inherit it and only the wait below gets them.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("could not block signals")?;
    let options = Options { pins: config.pin_dir.clone(), ring_bytes: config.ring_bytes() };
    let choice = config.capture;
    let start = move |on: Option<(&Path, agent_linux::capture::DevNo)>| start_capture(&options, on, choice);
    let engine = Engine::new(config, Box::new(start))?;
    let stopper = engine.stopper();
    let worker = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let _wake = WakeMain;
        engine.run()
    })?;
    notify_ready();
    tracing::info!(version = agent_linux::VERSION, "agent runs");
    loop {
        match signals.wait().context("could not wait for signals")? {
            // From a terminal that went away, or from the engine's end.
            Signal::SIGHUP if !worker.is_finished() => {
                // The engine sends it as its very last act; give it the moment to end.
                std::thread::sleep(std::time::Duration::from_millis(50));
                if worker.is_finished() {
                    break;
                }
            }
            _ => break,
        }
    }
    stopper.stop();
    match worker.join() {
        Ok(result) => Ok(result?),
        Err(_) => bail!("the engine thread panicked"),
    }
}

/// Wakes the wait for signals when the engine ends by itself, in whatever way.
struct WakeMain;

impl Drop for WakeMain {
    fn drop(&mut self) {
        // SAFETY: our own process id and a signal that is blocked everywhere but in the wait.
        unsafe { libc::kill(libc::getpid(), libc::SIGHUP) };
    }
}

/// The kernel half of another version of the agent is taken out and made anew; what it held is copied.
fn start_capture(
    options: &Options,
    on: Option<(&Path, agent_linux::capture::DevNo)>,
    choice: choose::Choice,
) -> Result<Box<dyn Capture>, CaptureError> {
    match choose::start(options, on, choice) {
        Err(e @ CaptureError::Layout { .. }) => {
            tracing::warn!(why = %e, "the capture in the kernel is made anew");
            if let Some(pins) = Pins::existing(&options.pins) {
                pins.clear()?;
            }
            choose::start(options, on, choice)
        }
        other => other,
    }
}

/// Tells systemd that the agent is up, if it asked.
fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", path));
    if let Err(e) = told {
        tracing::debug!(error = %e, "could not tell systemd");
    }
}
