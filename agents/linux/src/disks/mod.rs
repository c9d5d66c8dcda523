//! The host's block devices: what they are, what lies on them, which belong together, and which disk's requests must be captured
//! to protect one.
//!
//! Everything is read from sysfs and procfs (no tool is run) and from the first bytes of each device ([`probe`]).
//!
//! **Leaves.** Writes are captured where they are requests to a driver: on *leaves*, disks with a request queue. A file system, a
//! logical volume, an encrypted volume or a RAID array lies on one or more leaves, perhaps on a partition of each; protecting it
//! means protecting those. A disk that takes bios without a queue (zram, pmem, DRBD, the head of NVMe multipath) is captured at the
//! bios where the kernel shows them ([`offer`]), else refused with a sentence. A multipath map of the device mapper has a queue of its own and is a leaf; its paths
//! are not.
//!
//! **Together.** Whatever shares a holder (an LV over two PVs, an array's members, a btrfs over several devices) is useless without the
//! rest and is taken along: [`Disks::resolve`] answers with the whole set and says why each is in it.
//!
//! **Identity.** A disk is known by what it brings along (WWN, serial number, a loop's backing file) or, when it brings nothing, by its
//! place and what lies on it. [`identity`] compares.

pub mod identity;
pub mod offer;
pub mod probe;
mod tree;

pub use identity::Identity;
pub use offer::{Backend, BioCapture, Cost};
pub use probe::{Kind, Signature};

use crate::capture::DevNo;
use model::{ByteLen, Extent, SECTOR};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Class {
    /// A whole disk of some driver.
    Disk,
    Partition {
        of: String,
        start: u64,
    },
    /// A device-mapper device; what made it, from its UUID ("LVM", "CRYPT", "mpath"), and its name.
    Dm {
        maker: String,
        name: String,
    },
    /// An md array and its level.
    Md {
        level: String,
    },
}

/// One block device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// As the kernel calls it, e.g. `sda1`, `dm-0`.
    pub name: String,
    pub number: DevNo,
    pub class: Class,
    pub sectors: u64,
    /// What it lies on (partitions: see `class`).
    pub slaves: Vec<String>,
    pub holders: Vec<String>,
    /// It has a request queue: its writes can be captured here.
    pub queue: bool,
    /// Host-managed zones, which capture does not know.
    pub zoned: bool,
    pub read_only: bool,
    pub model: String,
    pub identity: Identity,
    pub signature: Option<Signature>,
    pub mounts: Vec<String>,
    /// Where it is mounted so that programs may write to the device's memory without a write call.
    pub dax_mount: Option<String>,
    pub swap: bool,
}

impl Device {
    pub fn node(&self) -> PathBuf {
        // sysfs writes a slash in a name as an exclamation mark.
        Path::new("/dev").join(self.name.replace('!', "/"))
    }
    pub fn bytes(&self) -> ByteLen {
        ByteLen(self.sectors * SECTOR)
    }
    /// What to call it before people.
    pub fn title(&self) -> String {
        match &self.class {
            Class::Dm { name, .. } if !name.is_empty() => format!("/dev/mapper/{name}"),
            _ => format!("/dev/{}", self.name),
        }
    }
    fn is_multipath(&self) -> bool {
        matches!(&self.class, Class::Dm { maker, .. } if maker == "mpath")
    }
}

/// Where sysfs, procfs and device nodes are; other places in tests.
#[derive(Clone, Debug)]
pub struct Roots {
    pub sys: PathBuf,
    pub proc: PathBuf,
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    #[error("could not read {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{choice} is neither a block device nor a mount point")]
    NotABlockDevice { choice: String },
    #[error(
        "{device} cannot be captured: it takes writes without a request queue (as zram, pmem, DRBD and the heads of NVMe \
         multipath do), and {why}; protect it through an ingest target instead"
    )]
    NoQueue { device: String, why: String },
    #[error(
        "{device} cannot be captured: it is a zoned disk (SMR or ZNS), whose write commands capture backend bpf-rq does not know"
    )]
    Zoned { device: String },
    #[error(
        "{device} cannot be captured: {why}, and without BPF only volumes of the device mapper (LVM, LUKS) can be; choose the volumes that lie \
         on it, or put one over it at the next boot: `holdfast-agent shim add {device}`"
    )]
    NeedsDm { device: String, why: String },
    #[error("{device} cannot be captured: {why}")]
    NoMirror { device: String, why: String },
    #[error("{device} has no room: its size is zero")]
    Empty { device: String },
    #[error("{file_system} on {device} spans {spans} devices, only {found} of them are on this host")]
    MissingMember { file_system: String, device: String, spans: u64, found: usize },
}

/// A range of a leaf disk that must be captured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The disk with the queue.
    pub disk: String,
    pub disk_number: DevNo,
    pub disk_sectors: u64,
    /// What becomes the volume: the disk itself or one of its partitions.
    pub volume: String,
    /// In sectors of the disk.
    pub range: Extent,
    pub backend: Backend,
    /// Why it is in the set.
    pub why: String,
}

/// What a choice comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolution {
    pub leaves: Vec<Leaf>,
    /// Sentences for the one who chose: what was taken along, what lies above.
    pub notes: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Disks {
    devices: BTreeMap<String, Device>,
    /// Whether disks without a request queue can be captured here.
    pub bio: BioCapture,
    /// The configuration asks for `bpf-legacy`.
    pub legacy: bool,
    mirrors: Option<Mirrors>,
}

/// Volumes are captured at mirrors, not the disks they lie on.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mirrors {
    why: String,
    /// Names of volumes that cannot carry one, and why.
    refused: BTreeMap<String, String>,
}

fn read_trimmed(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned()).filter(|s| !s.is_empty())
}

/// Whether a device is the served leg of a mirror of ours. Not to be read: it holds nothing of its own, and while it waits for an agent a
/// read waits too, which the agent that comes must not.
fn is_our_leg(block: &Path, dir: &Path, name: &str) -> bool {
    let ours = |device: &str| {
        let uuid = read_trimmed(&block.join(device).join("dm/uuid")).unwrap_or_default();
        uuid.starts_with(crate::capture::dm::mirror::UUID_PREFIX)
    };
    let mirrored = |holder: &String| names_in(&block.join(holder).join("slaves")).iter().any(|lower| ours(lower));
    name.starts_with("nbd") && names_in(&dir.join("holders")).iter().any(mirrored)
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|entries| entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

fn number(text: &str) -> Option<DevNo> {
    let (major, minor) = text.split_once(':')?;
    Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// Mount points by device number, and the numbers of swap areas' nodes by path.
fn mounts(proc: &Path) -> BTreeMap<DevNo, Vec<String>> {
    let mut out: BTreeMap<DevNo, Vec<String>> = BTreeMap::new();
    for line in fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default().lines() {
        let mut fields = line.split(' ');
        let (Some(dev), Some(at)) = (fields.nth(2).and_then(number), fields.nth(1)) else { continue };
        let at = unescape(at);
        let list = out.entry(dev).or_default();
        if !list.contains(&at) {
            list.push(at);
        }
    }
    out
}

/// Octal escapes of mountinfo (`\040` is a space).
pub(crate) fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = bytes
            .get(i + 1..i + 4)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match (bytes[i], octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                i += 4;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Disks {
    /// Reads the host. `read_head` reads the first bytes of a device node; what cannot be read has no signature.
    pub fn discover(roots: &Roots, read_head: &dyn Fn(&Path) -> Option<Vec<u8>>) -> Result<Self, DisksError> {
        let block = roots.sys.join("block");
        let entries =
            fs::read_dir(&block).map_err(|source| DisksError::Read { path: block.display().to_string(), source })?;
        let mounts = mounts(&roots.proc);
        let swaps: BTreeSet<String> = fs::read_to_string(roots.proc.join("swaps"))
            .unwrap_or_default()
            .lines()
            .skip(1)
            .filter_map(|l| l.split_whitespace().next()?.rsplit('/').next().map(str::to_owned))
            .collect();
        let mut devices = BTreeMap::new();
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let dir = block.join(&name);
            let Some(disk) = Self::read_device(roots, &dir, &name, None, &mounts, &swaps, read_head) else { continue };
            for part in names_in(&dir) {
                if dir.join(&part).join("partition").exists()
                    && let Some(device) =
                        Self::read_device(roots, &dir.join(&part), &part, Some(&disk), &mounts, &swaps, read_head)
                {
                    devices.insert(part, device);
                }
            }
            devices.insert(name, disk);
        }
        let mut this = Self { devices, bio: BioCapture::default(), legacy: false, mirrors: None };
        this.dax_mounts(&roots.proc);
        this.mounts_of_btrfs(&roots.proc);
        Ok(this)
    }

    /// The running host.
    pub fn here() -> Result<Self, DisksError> {
        let mut this = Self::discover(&Roots::default(), &read_head)?;
        if this.devices.values().any(|d| matches!(d.class, Class::Disk) && d.sectors > 0 && !d.queue) {
            this.bio = crate::capture::bpf::bio_capture();
        }
        Ok(this)
    }

    /// Volumes are captured at mirrors, if there is a reason for it, and it is asked which of them can carry one.
    pub fn at_mirrors(&mut self, why: Option<String>) {
        use crate::capture::dm::{ioctl::DeviceMapper, mirror};
        self.mirrors = why.map(|why| {
            let mut refused = BTreeMap::new();
            let dm = DeviceMapper::open();
            for device in self.devices.values().filter(|d| matches!(d.class, Class::Dm { .. })) {
                let check = match &dm {
                    Ok(dm) => mirror::check(dm, device.number).map_err(|e| crate::error_chain(&e)),
                    Err(e) => Err(crate::error_chain(e)),
                };
                refused.extend(check.err().map(|why| (device.name.clone(), why)));
            }
            Mirrors { why, refused }
        });
    }

    /// Why volumes are captured at mirrors; none where they are not.
    pub fn why_mirrors(&self) -> Option<&str> {
        self.mirrors.as_ref().map(|m| m.why.as_str())
    }

    fn read_device(
        roots: &Roots,
        dir: &Path,
        name: &str,
        parent: Option<&Device>,
        mounts: &BTreeMap<DevNo, Vec<String>>,
        swaps: &BTreeSet<String>,
        read_head: &dyn Fn(&Path) -> Option<Vec<u8>>,
    ) -> Option<Device> {
        let number = number(&read_trimmed(&dir.join("dev"))?)?;
        let sectors: u64 = read_trimmed(&dir.join("size"))?.parse().ok()?;
        let class = if let Some(parent) = parent {
            Class::Partition { of: parent.name.clone(), start: read_trimmed(&dir.join("start"))?.parse().ok()? }
        } else if dir.join("dm").is_dir() {
            let uuid = read_trimmed(&dir.join("dm/uuid")).unwrap_or_default();
            let maker = uuid.split('-').next().unwrap_or_default().to_owned();
            Class::Dm { maker, name: read_trimmed(&dir.join("dm/name")).unwrap_or_default() }
        } else if dir.join("md").is_dir() {
            Class::Md { level: read_trimmed(&dir.join("md/level")).unwrap_or_default() }
        } else {
            Class::Disk
        };
        // Empty drives and unused loops have no size and nothing to probe.
        let probed = sectors > 0 && !is_our_leg(&roots.sys.join("block"), dir, name);
        let signature = probed.then(|| read_head(&roots.dev.join(name))).flatten().and_then(|b| probe::probe(&b));
        Some(Device {
            name: name.to_owned(),
            number,
            sectors,
            slaves: names_in(&dir.join("slaves")),
            holders: names_in(&dir.join("holders")),
            queue: parent.map_or_else(|| dir.join("mq").is_dir(), |p| p.queue),
            zoned: parent
                .map_or_else(|| read_trimmed(&dir.join("queue/zoned")).is_some_and(|z| z != "none"), |p| p.zoned),
            read_only: read_trimmed(&dir.join("ro")).as_deref() == Some("1"),
            model: read_trimmed(&dir.join("device/model")).unwrap_or_default(),
            identity: Identity::read(dir, parent.map(|p| &p.identity), signature.as_ref()),
            mounts: mounts.get(&number).cloned().unwrap_or_default(),
            dax_mount: None,
            swap: swaps.contains(name),
            signature,
            class,
        })
    }

    /// Mounts with DAX on, which only file systems on memory-like disks can have.
    fn dax_mounts(&mut self, proc: &Path) {
        for line in fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default().lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let dax = right.split(' ').nth(2).is_some_and(|o| o.split(',').any(|o| o == "dax" || o == "dax=always"));
            let mut fields = left.split(' ');
            let (Some(dev), Some(at)) = (fields.nth(2).and_then(number), fields.nth(1)) else { continue };
            if dax && let Some(device) = self.devices.values_mut().find(|d| d.number == dev) {
                device.dax_mount = Some(unescape(at));
            }
        }
    }

    /// A btrfs mount has a device number of its own; mountinfo names one of its devices by path.
    fn mounts_of_btrfs(&mut self, proc: &Path) {
        for line in fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default().lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let mut right = right.split(' ');
            if right.next() != Some("btrfs") {
                continue;
            }
            let (Some(source), Some(at)) = (right.next(), left.split(' ').nth(4)) else { continue };
            let node = source.rsplit('/').next().unwrap_or_default();
            let at = unescape(at);
            let found = self
                .devices
                .values_mut()
                .find(|d| d.name == node || matches!(&d.class, Class::Dm { name, .. } if name == node));
            if let Some(device) = found
                && !device.mounts.contains(&at)
            {
                device.mounts.push(at);
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<&Device> {
        self.devices.get(name)
    }
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.devices.values()
    }
    pub fn by_number(&self, number: DevNo) -> Option<&Device> {
        self.devices.values().find(|d| d.number == number)
    }
    pub fn partitions<'a>(&'a self, disk: &'a str) -> impl Iterator<Item = &'a Device> {
        self.devices.values().filter(move |d| matches!(&d.class, Class::Partition { of, .. } if of == disk))
    }

    /// Finds the device that someone means by a path of a node, a link to one, a mount point, or a kernel name.
    pub fn find(&self, choice: &str) -> Result<&Device, DisksError> {
        let not = || DisksError::NotABlockDevice { choice: choice.to_owned() };
        if let Some(device) = self.devices.get(choice) {
            return Ok(device);
        }
        let wanted = choice.strip_suffix('/').filter(|c| !c.is_empty()).unwrap_or(choice);
        if let Some(device) = self.devices.values().find(|d| d.mounts.iter().any(|m| m == wanted)) {
            return Ok(device);
        }
        if let Some(device) = self.devices.values().find(|d| d.title() == choice || d.node() == Path::new(choice)) {
            return Ok(device);
        }
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let meta = fs::metadata(choice).map_err(|_| not())?;
        if !meta.file_type().is_block_device() {
            return Err(not());
        }
        let rdev = meta.rdev();
        self.by_number(DevNo { major: libc::major(rdev), minor: libc::minor(rdev) }).ok_or_else(not)
    }

    /// What lies directly under a device; empty for a leaf.
    fn below(&self, device: &Device) -> Vec<&Device> {
        if device.is_multipath() && device.queue {
            return Vec::new();
        }
        device.slaves.iter().filter_map(|s| self.devices.get(s)).collect()
    }

    /// The leaves under a device: disks, or partitions of disks.
    fn leaves_under<'a>(&'a self, device: &'a Device, out: &mut BTreeSet<String>) {
        let below = self.below(device);
        if !below.is_empty() {
            below.into_iter().for_each(|d| self.leaves_under(d, out));
            return;
        }
        // A partition of something that has slaves itself (md0p1): what the whole lies on.
        if let Class::Partition { of, .. } = &device.class
            && let Some(disk) = self.devices.get(of)
            && !self.below(disk).is_empty()
        {
            return self.leaves_under(disk, out);
        }
        out.insert(device.name.clone());
    }

    /// A device and everything above it.
    pub fn with_above(&self, name: &str) -> Vec<&Device> {
        let Some(device) = self.devices.get(name) else { return Vec::new() };
        let mut names = BTreeSet::from([name.to_owned()]);
        self.above(device, &mut names);
        names.iter().filter_map(|n| self.devices.get(n)).collect()
    }

    /// What lies above a device: holders, those of its partitions, and so on.
    fn above<'a>(&'a self, device: &'a Device, out: &mut BTreeSet<String>) {
        let mut next: Vec<&Device> = device.holders.iter().filter_map(|h| self.devices.get(h)).collect();
        next.extend(self.partitions(&device.name));
        for up in next {
            if out.insert(up.name.clone()) {
                self.above(up, out);
            }
        }
    }

    /// The leaves that a choice needs, with everything that belongs together.
    pub fn resolve(&self, choices: &[String]) -> Result<Resolution, DisksError> {
        if self.mirrors.is_some() {
            return self.volumes(choices, "chosen; captured at a mirror");
        }
        let mut why: BTreeMap<String, String> = BTreeMap::new();
        let mut notes = Vec::new();
        for choice in choices {
            let device = self.find(choice)?;
            let mut under = BTreeSet::new();
            self.leaves_under(device, &mut under);
            for leaf in &under {
                let reason =
                    if *leaf == device.name { "chosen".to_owned() } else { format!("{} lies on it", device.title()) };
                why.entry(leaf.clone()).or_insert(reason);
            }
            if !under.contains(&device.name) {
                let list: Vec<String> = under.iter().map(|l| format!("/dev/{l}")).collect();
                notes.push(format!(
                    "{} lies on {}: that is what is captured and recovered",
                    device.title(),
                    list.join(", ")
                ));
            }
        }
        // Until nothing is added: whoever lies on a leaf needs all its other leaves, and a file system all its devices.
        loop {
            let mut added: Vec<(String, String)> = Vec::new();
            for leaf in why.keys() {
                let Some(device) = self.devices.get(leaf) else { continue };
                let mut above = BTreeSet::new();
                self.above(device, &mut above);
                for name in &above {
                    let Some(up) = self.devices.get(name) else { continue };
                    if matches!(up.class, Class::Partition { .. }) && self.below(up).is_empty() && up.holders.is_empty()
                    {
                        continue;
                    }
                    let mut under = BTreeSet::new();
                    self.leaves_under(up, &mut under);
                    for other in under {
                        // A partition of a disk that is taken whole is there already.
                        let whole = matches!(self.devices.get(&other).map(|d| &d.class), Some(Class::Partition { of, .. }) if why.contains_key(of));
                        if !whole && !why.contains_key(&other) {
                            added.push((other, format!("{} lies on it too", up.title())));
                        }
                    }
                }
                for (other, reason) in self.members(device)? {
                    let whole = matches!(self.devices.get(&other).map(|d| &d.class), Some(Class::Partition { of, .. }) if why.contains_key(of));
                    if !whole && !why.contains_key(&other) {
                        added.push((other, reason));
                    }
                }
            }
            if added.is_empty() {
                break;
            }
            for (name, reason) in added {
                if let std::collections::btree_map::Entry::Vacant(free) = why.entry(name) {
                    notes.push(format!("/dev/{} is taken along: {reason}", free.key()));
                    free.insert(reason);
                }
            }
        }
        // A partition of a disk that is taken whole is part of it.
        let whole: BTreeSet<String> = why.keys().cloned().collect();
        let mut leaves = Vec::new();
        for (name, why) in why {
            let Some(device) = self.devices.get(&name) else { continue };
            match &device.class {
                Class::Partition { of, .. } if whole.contains(of) => continue,
                _ => leaves.push(self.leaf(device, why)?),
            }
        }
        Ok(Resolution { leaves, notes })
    }

    /// The volumes of a choice, each as it is: what lies under a mirrored volume is its own business.
    pub fn volumes(&self, choices: &[String], why: &str) -> Result<Resolution, DisksError> {
        let mut leaves: Vec<Leaf> = Vec::new();
        for choice in choices {
            let device = self.find(choice)?;
            if leaves.iter().any(|l| l.volume == device.name) {
                continue;
            }
            let backend = match &self.mirrors {
                Some(_) => self.backend(device)?,
                None => Backend::DmMirror,
            };
            leaves.push(Leaf {
                disk: device.name.clone(),
                disk_number: device.number,
                disk_sectors: device.sectors,
                volume: device.name.clone(),
                range: Extent::new(0, device.sectors),
                backend,
                why: why.to_owned(),
            });
        }
        Ok(Resolution { leaves, notes: Vec::new() })
    }

    /// Other devices of the same file system.
    fn members(&self, device: &Device) -> Result<Vec<(String, String)>, DisksError> {
        let mut out = Vec::new();
        let own = std::iter::once(device).chain(self.partitions(&device.name));
        for one in own {
            let Some(signature) = &one.signature else { continue };
            if signature.kind != Kind::Btrfs || signature.devices < 2 {
                continue;
            }
            let all: Vec<&Device> = self
                .devices
                .values()
                .filter(|d| d.signature.as_ref().is_some_and(|s| s.kind == signature.kind && s.uuid == signature.uuid))
                .collect();
            if (all.len() as u64) < signature.devices {
                return Err(DisksError::MissingMember {
                    file_system: "btrfs".to_owned(),
                    device: one.title(),
                    spans: signature.devices,
                    found: all.len(),
                });
            }
            for other in all {
                let mut under = BTreeSet::new();
                self.leaves_under(other, &mut under);
                out.extend(under.into_iter().map(|l| (l, format!("the btrfs on {} spans it", one.title()))));
            }
        }
        Ok(out)
    }

    fn leaf(&self, device: &Device, why: String) -> Result<Leaf, DisksError> {
        let (disk, range) = match &device.class {
            Class::Partition { of, start } => {
                let disk = self.devices.get(of).unwrap_or(device);
                (disk, Extent::new(*start, device.sectors))
            }
            _ => (device, Extent::new(0, device.sectors)),
        };
        if device.sectors == 0 {
            return Err(DisksError::Empty { device: device.title() });
        }
        let backend = self.backend(disk)?;
        Ok(Leaf {
            disk: disk.name.clone(),
            disk_number: disk.number,
            disk_sectors: disk.sectors,
            volume: device.name.clone(),
            range,
            backend,
            why,
        })
    }

    /// Mount points of everything on a device, itself included: what must be frozen for a file-system-consistent bookmark.
    pub fn mounts_above(&self, name: &str) -> Vec<String> {
        let Some(device) = self.devices.get(name) else { return Vec::new() };
        let mut all = BTreeSet::from([name.to_owned()]);
        self.above(device, &mut all);
        let mut out = BTreeSet::new();
        for name in all {
            let Some(device) = self.devices.get(&name) else { continue };
            out.extend(device.mounts.iter().cloned());
            // A btrfs is mounted once, by one of its devices.
            if let Some(signature) = device.signature.as_ref().filter(|s| s.kind == Kind::Btrfs) {
                for other in self.devices.values().filter(|d| d.signature.as_ref() == Some(signature)) {
                    out.extend(other.mounts.iter().cloned());
                }
            }
        }
        out.into_iter().collect()
    }
}

/// Reads what [`probe`] looks at. Opened without O_EXCL: nothing is claimed.
pub fn read_head(node: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(node).ok()?.take(probe::PROBE_BYTES as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests;
