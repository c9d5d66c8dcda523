//! "Protect RPO": before data capture has to be given up, what other programs write to protected disks may be held back. **Off by default**: it
//! is the one thing the agent can do that makes the host wait, and only who configured it so gets it.
//!
//! While it is on, the kernel lets each of the configured cgroups (or, with none configured, each child of the root) write so much per second to each
//! protected disk (`io.max`, `wbps`, of cgroup v2) and no more. It is switched on when a group's spool or lag has passed a bound, and off once both
//! have been below half of their bounds for [`CALM_MS`]. A group in a gap asks for nothing: its moments are lost already, and a copy can take hours.
//!
//! **It always ends.** What was set before is noted in `run_dir` (which lives as long as the cgroups do: until the next boot) *before* anything is set,
//! and put back by whoever comes next: the agent when it is calm, when it stops, when it starts; `holdfast-agent remove`; and systemd,
//! whatever the agent died of (`ExecStopPost=`). A limit that somebody else has changed meanwhile is left as it is.
//!
//! **Never ourselves.** A limit holds for all that lies below its cgroup, so none is set on the agent's own cgroup or one above it: those are
//! gone through, and their other children taken. `init.scope` is left alone too.
//!
//! Limits: cgroup v2 with the io controller; at most [`CGROUPS_MAX`] cgroups. Writes through the page cache are held back when they reach the
//! disk, on file systems that know whose they are (ext4, XFS, btrfs).
//!
//! Tests: against a tree in memory that answers as the kernel does, and in a guest against the kernel.

use crate::capture::DevNo;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// More is no list of services but a mistake; each is two small files a second.
pub const CGROUPS_MAX: usize = 256;
/// Below half of both bounds for so long, and it is over.
pub const CALM_MS: u64 = 10_000;
const MIB: u64 = 1 << 20;
const RECORD: &str = "throttle.json";

/// When it is on, and how much is let through. From the configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// For each cgroup and disk.
    pub mib_s: u64,
    pub spool_percent: u64,
    /// 0: lag is not looked at.
    pub lag_ms: u64,
    /// Paths below the cgroup file system; empty: the root's children.
    pub cgroups: Vec<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    #[error("no cgroup v2 file system is mounted")]
    NoCgroups,
    #[error("cgroup v2 has no io controller here (cgroup v1 may have it)")]
    NoController,
    #[error("{} is no cgroup", path.display())]
    NoSuchCgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is the agent's own cgroup: it would hold itself back", path.display())]
    Own { path: PathBuf },
    #[error("more than {CGROUPS_MAX} cgroups: name those that are meant in protect_rpo_cgroups")]
    TooMany,
    #[error("could not {what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be understood; limits that were set may still hold: look for wbps in the io.max of the cgroups", path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// The cgroup file system.
pub trait Tree {
    fn read(&self, path: &Path) -> io::Result<String>;
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
    fn children(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
}

pub struct Kernel;

impl Tree for Kernel {
    fn read(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        // One call, and no file of ours where the kernel has none.
        fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }
    fn children(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut out = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                out.push(entry.path());
            }
        }
        out.sort();
        Ok(out)
    }
}

/// Where the cgroup file system is mounted, and the agent's own cgroup in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub root: PathBuf,
    pub own: PathBuf,
}

impl Place {
    pub fn here() -> Result<Self, ThrottleError> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&text("/proc/self/mountinfo"), &text("/proc/self/cgroup")).ok_or(ThrottleError::NoCgroups)
    }

    fn parse(mountinfo: &str, cgroup: &str) -> Option<Self> {
        let mount = mountinfo.lines().find(|l| l.split_once(" - ").is_some_and(|(_, r)| r.starts_with("cgroup2 ")))?;
        let root = PathBuf::from(mount.split(' ').nth(4)?);
        let own = cgroup.lines().find_map(|l| l.strip_prefix("0::"))?;
        let own = root.join(own.trim_start_matches('/'));
        Some(Self { root, own })
    }
}

/// One limit: what it was and what we made of it, as the kernel writes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    cgroup: PathBuf,
    device: String,
    before: String,
    ours: String,
}

/// What has to be put back.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    limits: Vec<Limit>,
    /// Cgroups whose children got the io controller from us.
    enabled: Vec<PathBuf>,
}

/// What a group says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Need {
    pub spool_percent: u64,
    pub lag_ms: u64,
}

/// Whether to throttle: a machine that takes figures and a time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Decision {
    on: bool,
    calm_since: Option<u64>,
    pub why: String,
}

impl Decision {
    /// The needs of all groups that are in no gap.
    pub fn on(&mut self, now_ms: u64, policy: &Policy, needs: &[Need]) -> bool {
        let spool = needs.iter().map(|n| n.spool_percent).max().unwrap_or(0);
        let lag = needs.iter().map(|n| n.lag_ms).max().unwrap_or(0);
        let heeds_lag = policy.lag_ms > 0;
        if spool >= policy.spool_percent {
            self.why = format!("the spool is {spool} % full");
        } else if heeds_lag && lag >= policy.lag_ms {
            self.why = format!("the box is {lag} ms behind");
        }
        let pressed = spool >= policy.spool_percent || (heeds_lag && lag >= policy.lag_ms);
        let calm = spool < policy.spool_percent.div_ceil(2) && !(heeds_lag && lag >= policy.lag_ms.div_ceil(2));
        self.calm_since = if calm { self.calm_since.or(Some(now_ms)) } else { None };
        if pressed {
            self.on = true;
        } else if self.calm_since.is_some_and(|since| now_ms.saturating_sub(since) >= CALM_MS) {
            self.on = false;
        }
        self.on
    }
}

/// The limits that are set, and the note of them.
pub struct Throttle {
    tree: Box<dyn Tree + Send>,
    note: PathBuf,
    record: Record,
}

impl Throttle {
    /// Finds what an agent before us has left in `run_dir`; nothing is changed yet.
    pub fn open(run_dir: &Path, tree: Box<dyn Tree + Send>) -> Result<Self, ThrottleError> {
        let note = run_dir.join(RECORD);
        let record = match fs::read(&note) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| ThrottleError::Record { path: note.clone(), source })?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(source) => return Err(ThrottleError::File { what: "read", path: note, source }),
        };
        Ok(Self { tree, note, record })
    }

    pub fn is_set(&self) -> bool {
        !self.record.limits.is_empty() || !self.record.enabled.is_empty()
    }
    /// How many limits hold: cgroups times disks.
    pub fn limits(&self) -> usize {
        self.record.limits.len()
    }

    /// Sets the limits that are not set yet. Again every few seconds: services come and go.
    pub fn set(&mut self, place: &Place, policy: &Policy, disks: &[DevNo]) -> Result<(), ThrottleError> {
        let cgroups = self.cgroups(place, &policy.cgroups)?;
        self.enable(place, &cgroups)?;
        let ours = (policy.mib_s * MIB).to_string();
        let mut fresh = Vec::new();
        for cgroup in cgroups {
            let path = cgroup.join("io.max");
            // It ended just now.
            let Ok(text) = self.tree.read(&path) else { continue };
            for disk in disks {
                let device = disk.to_string();
                if self.record.limits.iter().any(|l| l.cgroup == cgroup && l.device == device) {
                    continue;
                }
                let before = wbps(&text, &device);
                // A tighter one of somebody else's stays.
                if before.parse::<u64>().is_ok_and(|b| b <= policy.mib_s * MIB) {
                    continue;
                }
                fresh.push(Limit { cgroup: cgroup.clone(), device, before, ours: ours.clone() });
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        self.record.limits.extend(fresh.iter().cloned());
        self.store()?;
        for limit in fresh {
            let path = limit.cgroup.join("io.max");
            match self.tree.write(&path, &format!("{} wbps={}", limit.device, limit.ours)) {
                Err(source) if !gone(&source) => return Err(ThrottleError::File { what: "write", path, source }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts everything back. What cannot be put back now stays noted, and the first reason is the error.
    pub fn release(&mut self) -> Result<(), ThrottleError> {
        let mut failed = None;
        let mut left = Record::default();
        for limit in std::mem::take(&mut self.record.limits) {
            let path = limit.cgroup.join("io.max");
            let put_back = self.tree.read(&path).and_then(|text| {
                if wbps(&text, &limit.device) != limit.ours {
                    return Ok(());
                }
                self.tree.write(&path, &format!("{} wbps={}", limit.device, limit.before))
            });
            match put_back {
                Err(source) if !gone(&source) => {
                    failed = failed.or(Some(ThrottleError::File { what: "write", path, source }));
                    left.limits.push(limit);
                }
                _ => {}
            }
        }
        // Deepest first: a cgroup cannot be without a controller that a child hands on.
        let mut enabled = std::mem::take(&mut self.record.enabled);
        enabled.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        for cgroup in enabled {
            let path = cgroup.join("cgroup.subtree_control");
            match self.tree.write(&path, "-io") {
                // Somebody below uses it by now: theirs.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(source) if !gone(&source) => {
                    failed = failed.or(Some(ThrottleError::File { what: "write", path, source }));
                    left.enabled.push(cgroup);
                }
                _ => {}
            }
        }
        self.record = left;
        self.store()?;
        failed.map_or(Ok(()), Err)
    }

    /// The cgroups that get a limit: none that we are in.
    fn cgroups(&self, place: &Place, named: &[PathBuf]) -> Result<Vec<PathBuf>, ThrottleError> {
        let wanted: Vec<PathBuf> = if named.is_empty() {
            vec![place.root.clone()]
        } else {
            named.iter().map(|c| place.root.join(c.strip_prefix("/").unwrap_or(c))).collect()
        };
        let mut out = Vec::new();
        for cgroup in wanted {
            if cgroup == place.own && cgroup != place.root {
                return Err(ThrottleError::Own { path: cgroup });
            }
            self.around_us(place, &cgroup, &mut out)
                .map_err(|source| ThrottleError::NoSuchCgroup { path: cgroup, source })?;
            if out.len() > CGROUPS_MAX {
                return Err(ThrottleError::TooMany);
            }
        }
        out.sort();
        out.dedup();
        Ok(out)
    }

    /// `cgroup` itself, or, where we lie below it, all below it that we do not lie in.
    fn around_us(&self, place: &Place, cgroup: &Path, out: &mut Vec<PathBuf>) -> io::Result<()> {
        if cgroup != place.root && !place.own.starts_with(cgroup) {
            // Is it there?
            self.tree.read(&cgroup.join("cgroup.controllers"))?;
            out.push(cgroup.to_owned());
            return Ok(());
        }
        for child in self.tree.children(cgroup)? {
            if child == place.own || child == place.root.join("init.scope") {
                continue;
            }
            match self.around_us(place, &child, out) {
                Err(e) if gone(&e) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Gives cgroups the io controller that have it not, from the top down.
    fn enable(&mut self, place: &Place, cgroups: &[PathBuf]) -> Result<(), ThrottleError> {
        let has = |tree: &dyn Tree, path: PathBuf| {
            tree.read(&path).is_ok_and(|text| text.split_whitespace().any(|c| c == "io"))
        };
        if !has(&*self.tree, place.root.join("cgroup.controllers")) {
            return Err(ThrottleError::NoController);
        }
        let mut parents: Vec<PathBuf> = Vec::new();
        for parent in cgroups.iter().flat_map(|c| c.ancestors().skip(1)).filter(|p| p.starts_with(&place.root)) {
            if !parents.iter().any(|p| p == parent) && !has(&*self.tree, parent.join("cgroup.subtree_control")) {
                parents.push(parent.to_owned());
            }
        }
        if parents.is_empty() {
            return Ok(());
        }
        parents.sort_by_key(|path| path.components().count());
        self.record
            .enabled
            .extend(parents.iter().filter(|p| !self.record.enabled.contains(p)).cloned().collect::<Vec<_>>());
        self.store()?;
        for parent in parents {
            let path = parent.join("cgroup.subtree_control");
            match self.tree.write(&path, "+io") {
                Err(source) if !gone(&source) => return Err(ThrottleError::File { what: "write", path, source }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Replaced by rename; without anything to put back there is no note.
    fn store(&self) -> Result<(), ThrottleError> {
        let error = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ThrottleError::File { what, path, source }
        };
        if !self.is_set() {
            return match fs::remove_file(&self.note) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(error("remove", &self.note)(e)),
                _ => Ok(()),
            };
        }
        let bytes = serde_json::to_vec(&self.record)
            .map_err(|source| ThrottleError::Record { path: self.note.clone(), source })?;
        let new = self.note.with_extension("new");
        fs::write(&new, bytes).map_err(error("write", &new))?;
        fs::rename(&new, &self.note).map_err(error("replace", &self.note))
    }
}

/// The cgroup, or the device, is no more.
fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
        || e.raw_os_error() == Some(libc::ENODEV)
        || e.raw_os_error() == Some(libc::ENXIO)
}

/// What `io.max` says of writing to a device; "max" when it says nothing.
fn wbps(io_max: &str, device: &str) -> String {
    io_max
        .lines()
        .find_map(|line| line.strip_prefix(device)?.strip_prefix(' '))
        .and_then(|rest| rest.split_whitespace().find_map(|f| f.strip_prefix("wbps=")))
        .unwrap_or("max")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::{BTreeMap, BTreeSet},
        sync::{Arc, Mutex},
    };

    /// As the kernel answers: `io.max` is there where the parent hands the controller on; a line is changed by key.
    #[derive(Default, Debug)]
    struct Fake {
        cgroups: BTreeSet<PathBuf>,
        hands_on: BTreeSet<PathBuf>,
        limits: BTreeMap<(PathBuf, String), String>,
        writes: usize,
        /// Writes after which every one fails, as when the agent is killed.
        dies_after: Option<usize>,
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Fake>>);

    impl Fake {
        fn has_io(&self, cgroup: &Path) -> bool {
            cgroup == Path::new("/cg") || cgroup.parent().is_some_and(|p| self.hands_on.contains(p))
        }
    }

    fn no_file() -> io::Error {
        io::ErrorKind::NotFound.into()
    }

    impl Tree for Shared {
        fn read(&self, path: &Path) -> io::Result<String> {
            let fake = self.0.lock().unwrap();
            let cgroup = path.parent().ok_or_else(no_file)?;
            if !fake.cgroups.contains(cgroup) {
                return Err(no_file());
            }
            match path.file_name().and_then(|n| n.to_str()) {
                Some("cgroup.controllers") if fake.has_io(cgroup) => Ok("cpu io memory\n".into()),
                Some("cgroup.controllers") => Ok("cpu memory\n".into()),
                Some("cgroup.subtree_control") if fake.hands_on.contains(cgroup) => Ok("memory io\n".into()),
                Some("cgroup.subtree_control") => Ok("memory\n".into()),
                Some("io.max") if fake.has_io(cgroup) && cgroup != Path::new("/cg") => Ok(fake
                    .limits
                    .iter()
                    .filter(|((c, _), _)| c == cgroup)
                    .map(|((_, dev), w)| format!("{dev} rbps=max wbps={w} riops=max wiops=max\n"))
                    .collect()),
                _ => Err(no_file()),
            }
        }

        fn write(&self, path: &Path, text: &str) -> io::Result<()> {
            self.read(path)?;
            let mut fake = self.0.lock().unwrap();
            if fake.dies_after.is_some_and(|n| fake.writes >= n) {
                return Err(io::ErrorKind::Other.into());
            }
            fake.writes += 1;
            let cgroup = path.parent().unwrap().to_owned();
            match text {
                "+io" if !fake.has_io(&cgroup) => return Err(no_file()),
                "+io" => drop(fake.hands_on.insert(cgroup)),
                "-io" if fake.hands_on.iter().any(|c| c.parent() == Some(&cgroup)) => {
                    return Err(io::Error::from_raw_os_error(libc::EBUSY));
                }
                "-io" => {
                    fake.hands_on.remove(&cgroup);
                    fake.limits.retain(|(c, _), _| c.parent() != Some(&cgroup));
                }
                line => {
                    let (device, rest) = line.split_once(" wbps=").ok_or_else(no_file)?;
                    let key = (cgroup, device.to_owned());
                    if rest == "max" {
                        drop(fake.limits.remove(&key))
                    } else {
                        drop(fake.limits.insert(key, rest.into()))
                    }
                }
            }
            Ok(())
        }

        fn children(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
            let fake = self.0.lock().unwrap();
            Ok(fake.cgroups.iter().filter(|c| c.parent() == Some(path)).cloned().collect())
        }
    }

    const OWN: &str = "/cg/system.slice/holdfast-agent.service";

    fn tree() -> Shared {
        let tree = Shared::default();
        let mut fake = tree.0.lock().unwrap();
        for c in [
            "",
            "/init.scope",
            "/user.slice",
            "/user.slice/a",
            "/system.slice",
            "/system.slice/db",
            "/system.slice/web",
        ] {
            fake.cgroups.insert(PathBuf::from(format!("/cg{c}")));
        }
        fake.cgroups.insert(OWN.into());
        drop(fake);
        tree
    }

    fn place() -> Place {
        Place { root: "/cg".into(), own: OWN.into() }
    }

    fn policy(cgroups: &[&str]) -> Policy {
        Policy { mib_s: 20, spool_percent: 60, lag_ms: 4000, cgroups: cgroups.iter().map(PathBuf::from).collect() }
    }

    const DISKS: [DevNo; 2] = [DevNo { major: 8, minor: 0 }, DevNo { major: 8, minor: 16 }];
    const OURS: &str = "20971520";

    fn open(dir: &Path, tree: &Shared) -> Throttle {
        Throttle::open(dir, Box::new(tree.clone())).unwrap()
    }

    #[test]
    fn everybody_is_held_back_but_us_and_all_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree();
        // Somebody's own limits: a tighter one stays, a looser one is kept for later.
        {
            let mut fake = tree.0.lock().unwrap();
            fake.hands_on.insert("/cg".into());
            fake.limits.insert(("/cg/user.slice".into(), "8:0".into()), "1000".into());
            fake.limits.insert(("/cg/user.slice".into(), "8:16".into()), "99999999999".into());
        }
        let before = format!("{:?}", tree.0.lock().unwrap().limits);
        let mut throttle = open(dir.path(), &tree);
        assert!(!throttle.is_set());
        throttle.set(&place(), &policy(&[]), &DISKS).unwrap();
        {
            let fake = tree.0.lock().unwrap();
            let at =
                |c: &str, d: &str| fake.limits.get(&(PathBuf::from(c), d.to_owned())).map_or("max", |s| s.as_str());
            for c in ["/cg/system.slice/db", "/cg/system.slice/web"] {
                assert_eq!((at(c, "8:0"), at(c, "8:16")), (OURS, OURS), "{c}");
            }
            assert_eq!((at("/cg/user.slice", "8:0"), at("/cg/user.slice", "8:16")), ("1000", OURS));
            for c in [OWN, "/cg/system.slice", "/cg/init.scope", "/cg/user.slice/a"] {
                assert_eq!((at(c, "8:0"), at(c, "8:16")), ("max", "max"), "{c}");
            }
            assert!(fake.hands_on.contains(Path::new("/cg/system.slice")), "its children have io.max now");
        }
        // A service that began meanwhile gets one too; nothing is written twice.
        let writes = tree.0.lock().unwrap().writes;
        throttle.set(&place(), &policy(&[]), &DISKS).unwrap();
        assert_eq!(tree.0.lock().unwrap().writes, writes);
        tree.0.lock().unwrap().cgroups.insert("/cg/system.slice/new".into());
        throttle.set(&place(), &policy(&[]), &DISKS).unwrap();
        assert_eq!((tree.0.lock().unwrap().writes, throttle.limits()), (writes + 2, 7));
        // One ended, and one was changed by its owner, who keeps it.
        {
            let mut fake = tree.0.lock().unwrap();
            fake.cgroups.remove(Path::new("/cg/system.slice/web"));
            fake.limits.retain(|(c, _), _| c != Path::new("/cg/system.slice/web"));
        }
        throttle.release().unwrap();
        assert!(!throttle.is_set() && !dir.path().join(RECORD).exists());
        let fake = tree.0.lock().unwrap();
        assert_eq!(format!("{:?}", fake.limits), before);
        assert_eq!(fake.hands_on.iter().collect::<Vec<_>>(), [Path::new("/cg")], "as it was");
    }

    #[test]
    fn what_somebody_changed_meanwhile_is_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree();
        let mut throttle = open(dir.path(), &tree);
        throttle.set(&place(), &policy(&["system.slice/db", "/user.slice"]), &DISKS[..1]).unwrap();
        assert_eq!(throttle.limits(), 2);
        let key = (PathBuf::from("/cg/user.slice"), "8:0".to_owned());
        tree.0.lock().unwrap().limits.insert(key.clone(), "5".into());
        // And a child of theirs uses the controller.
        tree.0.lock().unwrap().hands_on.insert("/cg/user.slice".into());
        throttle.release().unwrap();
        let fake = tree.0.lock().unwrap();
        assert_eq!(fake.limits.iter().collect::<Vec<_>>(), [(&key, &"5".to_owned())]);
        assert!(fake.hands_on.contains(Path::new("/cg")), "busy: it stays");
        assert!(!throttle.is_set());
    }

    /// Killed after any number of writes, the next agent puts all back.
    #[test]
    fn whenever_the_agent_dies_the_next_one_puts_it_back() {
        for named in [&[][..], &["system.slice"], &["user.slice/a", "system.slice/web"]] {
            for dies_after in 0..12 {
                let dir = tempfile::tempdir().unwrap();
                let tree = tree();
                tree.0.lock().unwrap().limits.insert(("/cg/user.slice".into(), "8:0".into()), "99999999999".into());
                tree.0.lock().unwrap().hands_on.insert("/cg".into());
                let before = format!("{:?}", tree.0.lock().unwrap());
                tree.0.lock().unwrap().dies_after = Some(dies_after);
                let whole = open(dir.path(), &tree).set(&place(), &policy(named), &DISKS).is_ok();
                tree.0.lock().unwrap().dies_after = None;
                let mut next = open(dir.path(), &tree);
                next.release().unwrap();
                tree.0.lock().unwrap().writes = 0;
                assert_eq!(format!("{:?}", tree.0.lock().unwrap()), before, "{named:?}, died after {dies_after}");
                assert!(!dir.path().join(RECORD).exists());
                assert!(whole || dies_after < 11);
            }
        }
    }

    #[test]
    fn what_cannot_be_put_back_stays_noted() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree();
        let mut throttle = open(dir.path(), &tree);
        throttle.set(&place(), &policy(&[]), &DISKS).unwrap();
        tree.0.lock().unwrap().dies_after = Some(0);
        assert!(matches!(throttle.release(), Err(ThrottleError::File { .. })));
        assert!(throttle.is_set());
        tree.0.lock().unwrap().dies_after = None;
        open(dir.path(), &tree).release().unwrap();
        assert!(tree.0.lock().unwrap().limits.is_empty() && tree.0.lock().unwrap().hands_on.is_empty());
        std::fs::write(dir.path().join(RECORD), "{").unwrap();
        let damaged = Throttle::open(dir.path(), Box::new(tree.clone())).err().map(|e| e.to_string()).unwrap();
        assert!(damaged.contains("io.max"), "{damaged}");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree();
        let mut throttle = open(dir.path(), &tree);
        let mut refused = |c: &str| throttle.set(&place(), &policy(&[c]), &DISKS).unwrap_err();
        assert!(matches!(refused("system.slice/holdfast-agent.service"), ThrottleError::Own { .. }));
        assert!(matches!(refused("nowhere"), ThrottleError::NoSuchCgroup { .. }));
        tree.0.lock().unwrap().cgroups.extend((0..300).map(|i| PathBuf::from(format!("/cg/c{i}"))));
        assert!(matches!(throttle.set(&place(), &policy(&[]), &DISKS), Err(ThrottleError::TooMany)));
        assert!(!throttle.is_set());
        let v1 = Shared::default();
        v1.0.lock().unwrap().cgroups.insert("/other".into());
        let place = Place { root: "/other".into(), own: "/other".into() };
        let mut throttle = open(dir.path(), &v1);
        assert!(matches!(throttle.set(&place, &policy(&[]), &DISKS), Err(ThrottleError::NoController)));
    }

    #[test]
    fn it_begins_at_a_bound_and_ends_when_it_has_been_calm() {
        let policy = policy(&[]);
        let mut decision = Decision::default();
        let mut at = |ms: u64, spool_percent, lag_ms| {
            decision.on(ms, &policy, &[Need::default(), Need { spool_percent, lag_ms }])
        };
        assert!(!at(0, 59, 3999));
        assert!(at(1000, 60, 0));
        // Below the bound is not calm.
        assert!((2..60).all(|s| at(s * 1000, 31, 0)));
        assert!(at(60_000, 29, 0) && at(69_999, 29, 0));
        // It came again before the time was over.
        assert!(at(70_000, 10, 2000) && at(71_000, 10, 1000) && at(80_999, 0, 0));
        assert!(!at(81_000, 0, 0));
        assert!(at(82_000, 0, 4000));
        // A group in a gap says nothing.
        assert!(decision.on(83_000, &policy, &[]) && !decision.on(93_000, &policy, &[]));
        let no_lag = Policy { lag_ms: 0, ..policy.clone() };
        assert!(!decision.on(94_000, &no_lag, &[Need { spool_percent: 0, lag_ms: u64::MAX }]));
        assert_eq!(decision.why, "the box is 4000 ms behind");
    }

    #[test]
    fn the_kernels_files_are_read() {
        let text = "8:0 rbps=max wbps=1048576 riops=max wiops=max\n8:16 rbps=5 wbps=max riops=max wiops=max\n";
        assert_eq!(
            (wbps(text, "8:0"), wbps(text, "8:16"), wbps(text, "8:1")),
            ("1048576".into(), "max".into(), "max".into())
        );
        let mounts = "30 1 0:5 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 30 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n";
        let place = Place::parse(mounts, "9:name=systemd:/\n0::/system.slice/x.service\n").unwrap();
        assert_eq!(place.own, Path::new("/sys/fs/cgroup/unified/system.slice/x.service"));
        assert_eq!(Place::parse("", "0::/"), None);
    }
}
