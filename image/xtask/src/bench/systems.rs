//! The systems that are measured: the raw file, the peers, and Holdfast.

use super::{
    Results,
    fio::{self, Job, READS, Target, WRITES},
};
use crate::{demo::size, nobody};
use anyhow::{Context, Result};
use hw_tests::{
    disk::{self, LoopDisk},
    process::{self, Program, wait_for},
    product::{Agent, Appliance, At, Binaries, Export},
    tools,
};
use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    time::{Duration, Instant},
};

pub const RAW: &str = "raw file";
pub const HOLDFAST: &str = "Holdfast, unix socket";
pub const HOLDFAST_TLS: &str = "Holdfast, TLS";

const GROUP: &str = "bench";
const VOLUME: &str = "disk";
/// The captured disk: an agent copies it slowly while the host is under pressure, as it must.
const LOOP_BYTES: u64 = 256 << 20;
const START_MAX: Duration = Duration::from_secs(30);
const FILL_MAX: Duration = Duration::from_secs(600);
const DRAIN_MAX: Duration = Duration::from_secs(120);

pub struct Bench<'a> {
    pub bins: &'a Binaries,
    pub dir: &'a Path,
    pub seconds: u32,
    pub bytes: u64,
}

/// An NBD server of somebody else, gone with its handle.
struct Peer {
    name: &'static str,
    _program: Program,
    socket: PathBuf,
}

impl Peer {
    fn start(name: &'static str, mut command: Command, socket: &Path, dir: &Path) -> Result<Self> {
        if socket.exists() {
            fs::remove_file(socket)?;
        }
        command.current_dir(dir);
        let mut program = Program::start(name, command, &dir.join("peer.log"))?;
        wait_for(name, START_MAX, || {
            program.expect_running()?;
            Ok(UnixStream::connect(socket).is_ok().then_some(()))
        })?;
        Ok(Self { name, _program: program, socket: socket.to_owned() })
    }
    fn target(&self) -> Target {
        Target::Nbd { uri: format!("nbd+unix:///?socket={}", self.socket.display()), home: None }
    }
}

impl Bench<'_> {
    /// Durable writes against every system, once: all are up, and each job goes to one after the other, beginning with another one each
    /// round. So what the machine does meanwhile, for seconds or for minutes, falls on all of them alike.
    pub fn ingest_round(&self, results: &mut Results, round: usize, last: bool) -> Result<()> {
        let mut systems = vec![(RAW, Target::Direct(self.filled("raw.img", self.bytes)?))];
        let mut peers = Vec::new();
        for start in [Self::qemu_nbd_raw, Self::qemu_nbd_qcow2, Self::nbdkit] {
            match start(self) {
                Ok(peer) => peers.push(peer),
                Err(e) => results.failed("a peer could not be started", &e),
            }
        }
        systems.extend(peers.iter().map(|peer| (peer.name, peer.target())));
        let mut boxes = Vec::new();
        for (name, tls) in [(HOLDFAST, false), (HOLDFAST_TLS, true)] {
            match self.ingest_box(tls) {
                Ok((appliance, target)) => {
                    boxes.push((name, appliance));
                    systems.push((name, target));
                }
                Err(e) => results.failed(name, &e),
            }
        }
        for job in WRITES {
            for turn in 0..systems.len() {
                let (name, target) = &systems[(turn + round) % systems.len()];
                self.measure(name, std::slice::from_ref(job), target, results);
            }
        }
        for (name, mut appliance) in boxes {
            if last {
                results.fact(format!("{name}: memory of the daemon"), size(appliance.program()?.rss()?));
            }
            appliance.stop()?;
            fs::remove_dir_all(appliance.dir())?;
        }
        if last { self.cost(results) } else { Ok(()) }
    }

    fn ingest_box(&self, tls: bool) -> Result<(Appliance, Target)> {
        let appliance = Appliance::start(self.bins, &self.dir.join(if tls { "box-tls" } else { "box-unix" }))?;
        appliance.create_ingest(GROUP, &[(VOLUME, self.bytes)])?;
        let export = appliance.ingest_target(GROUP, VOLUME)?;
        let target =
            if tls { self.tls_target(&appliance, &export)? } else { Target::Nbd { uri: export.uri(), home: None } };
        Ok((appliance, target))
    }

    /// What a host's byte takes of the box's disk, by how it was written.
    fn cost(&self, results: &mut Results) -> Result<()> {
        let dir = self.dir.join("cost");
        let mut appliance = Appliance::start(self.bins, &dir)?;
        let mut groups = Vec::new();
        for (number, job) in WRITES.iter().enumerate() {
            let name = format!("cost-{number}");
            appliance.create_ingest(&name, &[(VOLUME, self.bytes)])?;
            let target = Target::Nbd { uri: appliance.ingest_target(&name, VOLUME)?.uri(), home: None };
            let written = fio::run(job, &target, self.bytes, self.seconds, true, &self.dir.join("fio.json"))?.bytes;
            let id = appliance.group(&name)?["id"].as_str().context("a group has an id")?.to_owned();
            groups.push((name, id, job, written.max(1) as f64));
        }
        // Segments are made full-size ahead of use; a restart seals each at its last record.
        appliance.stop()?;
        appliance.run()?;
        for (name, id, job, written) in groups {
            appliance.ingest_target(&name, VOLUME)?;
            let folder = appliance.data_dir().join("groups").join(id);
            let journal = bytes_in(&folder.join("seg"), Some("seg"))? as f64 / written;
            let index = bytes_in(&folder.join("index"), None)? as f64 / written;
            results.fact(
                format!("bytes kept per host byte, {}", job.name),
                format!("journal {journal:.3}, index {index:.4}"),
            );
        }
        appliance.stop()?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// Reading a view beside reading the file it was written from.
    pub fn view_round(&self, results: &mut Results) -> Result<()> {
        let raw = self.filled("raw.img", self.bytes)?;
        self.measure(RAW, READS, &Target::Direct(raw.clone()), results);
        let peer = self.nbdkit()?;
        self.measure(peer.name, READS, &peer.target(), results);
        drop(peer);
        let dir = self.dir.join("box");
        let mut appliance = Appliance::start(self.bins, &dir)?;
        appliance.create_ingest(GROUP, &[(VOLUME, self.bytes)])?;
        let export = appliance.ingest_target(GROUP, VOLUME)?;
        process::call("nbdcopy", &[&raw.to_string_lossy(), &export.uri()], FILL_MAX)?;
        // A history, so that reads have versions to choose from.
        let scatter = Job { name: "scatter", pattern: "randwrite", block: "4k", workers: 16 };
        fio::run(
            &scatter,
            &Target::Nbd { uri: export.uri(), home: None },
            self.bytes,
            self.seconds,
            false,
            &self.dir.join("fio.json"),
        )?;
        let view = appliance.view(GROUP, &At::Latest)?;
        let target = Target::Nbd { uri: view.only()?.uri(), home: None };
        self.measure(HOLDFAST, READS, &target, results);
        view.close()?;
        appliance.stop()?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// A loop disk written to with and without the agent's capture.
    pub fn agent(&self, results: &mut Results) -> Result<()> {
        if let Err(why) = disk::loop_disks_work().and_then(|()| disk::capture_works()) {
            println!("SKIPPED: the agent was not measured: {why}");
            return Ok(());
        }
        let bytes = LOOP_BYTES;
        let disk = LoopDisk::over(&self.filled("loop.img", bytes)?)?;
        let target = Target::Direct(disk.device().to_owned());
        let jobs = &WRITES[..2];
        let run = |job: &Job| fio::run(job, &target, bytes, self.seconds, false, &self.dir.join("fio.json"));
        // The first pass over a loop disk pays for bringing its file into memory: it does not count.
        jobs.iter().try_for_each(|job| run(job).map(drop))?;
        let before: Vec<_> = jobs.iter().map(run).collect::<Result<_>>()?;
        let dir = self.dir.join("box");
        let mut appliance = Appliance::start(self.bins, &dir)?;
        let mut agent = Agent::start(self.bins, &self.dir.join("agent"), &appliance)?;
        agent.protect(disk.device(), GROUP)?;
        appliance.wait_state(GROUP, "replicating", FILL_MAX)?;
        for (job, alone) in jobs.iter().zip(before) {
            let with = run(job)?;
            let ended = Instant::now();
            let share = with.per_second / alone.per_second;
            let what = format!("agent: {} on a captured loop disk", job.name);
            results.fact(
                what,
                format!("{:.0}/s, {share:.2} of {:.0}/s without capture", with.per_second, alone.per_second),
            );
            wait_for("the lag to end", DRAIN_MAX, || Ok((appliance.group(GROUP)?["lag_ms"] == 0).then_some(())))?;
            results.fact("agent: until the box had all of it", format!("{:.2} s", ended.elapsed().as_secs_f32()));
        }
        results.fact("agent: its memory", size(agent.program()?.rss()?));
        results.fact("agent: memory of the daemon", size(appliance.program()?.rss()?));
        agent.run_cli(&["unprotect", GROUP])?;
        agent.stop()?;
        appliance.stop()?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// Runs the jobs; one that fails is said in the table, and the others go on.
    fn measure(&self, system: &str, jobs: &[Job], target: &Target, results: &mut Results) {
        for job in jobs {
            match fio::run(job, target, self.bytes, self.seconds, false, &self.dir.join("fio.json")) {
                Ok(outcome) => {
                    let rate = outcome.per_second;
                    println!("  {system}: {}: {rate:.0}/s, 99 % within {:.0} us", job.name, outcome.p99_us);
                    results.rates.entry((system.to_owned(), job.name.to_owned())).or_default().push(rate);
                }
                Err(e) => results.failed(&format!("{system}: {}", job.name), &e),
            }
        }
    }

    /// A file with every byte written: holes and unwritten extents would cost at the first write. Made once for all rounds, one for each
    /// system: what goes around the page cache would throw out what another keeps in it.
    fn filled(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if fs::metadata(&path).is_ok_and(|m| m.len() == bytes) {
            return Ok(path);
        }
        let mut file = fs::File::create(&path)?;
        let (mut block, mut draw) = (vec![0; 1 << 20], hw_tests::Draw::new(7));
        for _ in 0..bytes >> 20 {
            draw.fill(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(path)
    }

    fn qemu_nbd_raw(&self) -> Result<Peer> {
        let raw = self.filled("qemu.img", self.bytes)?;
        self.qemu_nbd("qemu-nbd, raw", "raw", &raw)
    }
    fn qemu_nbd_qcow2(&self) -> Result<Peer> {
        let (raw, path) = (self.filled("raw.img", self.bytes)?, self.dir.join("disk.qcow2"));
        if !path.exists() {
            process::call(
                "qemu-img",
                &["convert", "-f", "raw", "-O", "qcow2", &raw.to_string_lossy(), &path.to_string_lossy()],
                FILL_MAX,
            )?;
        }
        self.qemu_nbd("qemu-nbd, qcow2", "qcow2", &path)
    }
    fn qemu_nbd(&self, name: &'static str, format: &str, image: &Path) -> Result<Peer> {
        let socket = self.dir.join(format!("qemu-{format}.sock"));
        let mut command = Command::new(tools::need("qemu-nbd")?);
        // Its best for this machine: around the page cache, the kernel's own queue, as many clients as we have writers.
        command.args([
            "--persistent",
            "--shared=64",
            "--cache=none",
            "--aio=native",
            "--discard=unmap",
            "--format",
            format,
        ]);
        command.arg("--socket").arg(&socket).arg(image);
        Peer::start(name, command, &socket, self.dir)
    }
    fn nbdkit(&self) -> Result<Peer> {
        let raw = self.filled("nbdkit.img", self.bytes)?;
        let socket = self.dir.join("nbdkit.sock");
        let mut command = Command::new(tools::need("nbdkit")?);
        command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(&raw);
        Peer::start("nbdkit file", command, &socket, self.dir)
    }

    fn tls_target(&self, appliance: &Appliance, export: &Export) -> Result<Target> {
        let home = nobody::Folder::make()?;
        let certificates = home.path().join(".pki/libnbd");
        appliance.client_certificate("bench", &certificates)?;
        home.own(&certificates)?;
        for entry in fs::read_dir(&certificates)? {
            home.own(&entry?.path())?;
        }
        // The name our box's certificate has, not its address.
        let uri = format!("nbds://localhost:{}/{}", appliance.nbd_listen().port(), export.export_name);
        Ok(Target::Nbd { uri, home: Some(Rc::new(home)) })
    }
}

/// What the files of a folder take, those with one ending or all; a folder that is not there takes nothing.
fn bytes_in(dir: &Path, ending: Option<&str>) -> Result<u64> {
    if !dir.exists() {
        return Ok(0);
    }
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.is_dir() {
            bytes += bytes_in(&path, ending)?;
        } else if ending.is_none_or(|e| path.extension().is_some_and(|x| x == e)) {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}
