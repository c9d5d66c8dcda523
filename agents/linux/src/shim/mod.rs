//! A volume of the device mapper over a partition, or a disk that is used whole: what a mirror needs, and what cannot be put under a file
//! system that is mounted.
//!
//! A mirror goes live into a *volume* ([`crate::capture::dm`]). A plain partition is none, and nothing can be slid under it while somebody has
//! it open. So `holdfast-agent shim add` notes it, and at the next boot, before anything is mounted, a `linear` volume is laid over it that is the
//! partition, sector for sector: nothing is written to the disk, and without the shim the disk is what it was.
//!
//! **Who does it.** udev, in the initramfs and after it (`packaging/59-holdfast-shim.rules`): for each disk or partition it asks
//! `holdfast-agent shim up`, which looks into the list ([`list`]), finds the disk by its identifier ([`find`]), and makes the volume. From then on the
//! raw device has no links any more, and the volume has those by UUID, label and PARTUUID, so mounts by these go to the volume. A root file system
//! that is named by its kernel name is handed over by the initramfs (`shim root`).
//!
//! **A shim must never keep a host from booting.** Whatever is not as it was noted (the disk is not there, has another size, is in use, the
//! list cannot be read, the kernel refuses) leaves the raw device with its links, and the host boots from that. `holdfast.noshim` on the kernel's
//! command line does so too. What would fail is refused at the beginning: a disk that `/etc/fstab` mounts by its kernel name, which could not be
//! mounted any more, for the volume holds it.
//!
//! **GRUB's tools** do not look through such a volume (seen on Debian 12: `grub-probe: cannot find a GRUB drive`, and `update-grub` then writes
//! `root=/dev/mapper/…`). `packaging/grub.cfg` tells `update-grub` what lies under it; `grub-install` onto a shim fails. A shim that a boot would wait
//! for by its name is not removed.
//!
//! **Not [`mirror::UUID_PREFIX`]:** devices with that are a mirror's own, which `remove` and the packages take out of the running kernel. A shim
//! that is mounted stays until the next boot, and harms nobody.

pub mod find;
pub mod list;

pub use list::{List, Over, Shim};

use crate::{
    capture::{
        DevNo,
        dm::{
            ioctl::{DeviceMapper, DmError, Target},
            mirror,
        },
    },
    disks::{Class, Device, Disks, DisksError, Kind, Roots},
    inside,
};
use find::Raw;
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// With it begin the identifiers of shims.
pub const UUID_PREFIX: &str = "HFSHIM-";
const CONTROL: &str = "/dev/mapper/control";
const OFF: &str = "holdfast.noshim";
/// How long udev may take to name the volume that the root is to be mounted from; its plain node is there at once.
const NAME_WAIT: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} line {line} is no shim: {text:?}; take the line out, or the whole file, and make the initramfs anew", path.display())]
    Line { path: PathBuf, line: usize, text: String },
    #[error(transparent)]
    Disks(#[from] DisksError),
    #[error(transparent)]
    Dm(#[from] DmError),
    #[error(
        "{device} is a volume of the device mapper: it can be mirrored as it is, with `holdfast-agent protect --sync {device}`"
    )]
    IsVolume { device: String },
    #[error("{device} gets no shim: {why}")]
    Unfit { device: String, why: String },
    #[error(
        "/etc/fstab line {line} mounts {device} as {source_word}, which could not be mounted under a shim: write UUID=, LABEL= or PARTUUID= there \
         first"
    )]
    Fstab { device: String, line: usize, source_word: String },
    #[error("{name:?} is no name for a volume: letters, digits, `-`, `_` and `.`, at most 64")]
    BadName { name: String },
    #[error("there is a shim {name:?} already; choose another name with --name")]
    NameTaken { name: String },
    #[error("no shim {name:?} is noted; `holdfast-agent shim list` shows them")]
    Unknown { name: String },
    #[error(
        "{file} names /dev/mapper/{name}, which would not be there any more: write the UUID there first (update-grub does so in GRUB's)"
    )]
    Named { file: &'static str, name: String },
    #[error("{name} is mirrored: unprotect its group first")]
    Mirrored { name: String },
    #[error("{device} has {has} sectors, {had} were noted for {name}: it is left as it is")]
    Size { device: String, name: String, had: u64, has: u64 },
    #[error("could not make the initramfs anew with {program}, so nothing is changed: {why}")]
    Initramfs { program: &'static str, why: String },
    #[error(
        "neither update-initramfs nor dracut is here to make the initramfs anew, without which {device} cannot get a shim in time"
    )]
    NoInitramfs { device: String },
}

/// The identifier of a shim's volume; udev's rule takes the PARTUUID out of it.
fn uuid_of(over: &Over) -> String {
    match over {
        Over::Partition(id) => format!("{UUID_PREFIX}part-{id}"),
        // Free text, as long as the disk's maker liked.
        Over::Disk(id) => {
            let folded =
                id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
            format!("{UUID_PREFIX}disk-{folded:016x}")
        }
    }
}

/// What became of a device that udev asked about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Up {
    /// Nobody asked for a shim here.
    NotNoted,
    /// It lies over it now, or did before.
    There { name: String },
}

fn kernel_name(device: &Path) -> String {
    let node = fs::canonicalize(device).unwrap_or_else(|_| device.to_owned());
    node.strip_prefix("/dev").unwrap_or(&node).to_string_lossy().replace('/', "!")
}

/// Lays a shim over a device, if one is noted for it. Every error leaves the device as it is.
pub fn up(list: &List, device: &Path) -> Result<Up, ShimError> {
    let shims = list.load()?;
    let off = fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|w| w == OFF));
    // In a machine that a box runs in this host's place the disks are the box's own.
    if shims.is_empty() || off || inside::taken_over().is_some() {
        return Ok(Up::NotNoted);
    }
    let roots = Roots::default();
    let Some(raw) = Raw::named(&roots, &kernel_name(device)) else { return Ok(Up::NotNoted) };
    let Some(over) = raw.known_by(&roots) else { return Ok(Up::NotNoted) };
    let Some(shim) = shims.into_iter().find(|s| s.over == over) else { return Ok(Up::NotNoted) };
    if raw.shim_over().is_none() {
        lay(&raw, &shim)?;
    }
    Ok(Up::There { name: shim.name })
}

fn lay(raw: &Raw, shim: &Shim) -> Result<(), ShimError> {
    if raw.sectors != shim.sectors {
        let (name, device) = (shim.name.clone(), format!("/dev/{}", raw.name));
        return Err(ShimError::Size { device, name, had: shim.sectors, has: raw.sectors });
    }
    if !Path::new(CONTROL).exists() {
        // What comes of it is seen at once.
        let _ = Command::new("/sbin/modprobe").arg("dm-mod").stdin(Stdio::null()).status();
    }
    let dm = DeviceMapper::open()?;
    let uuid = uuid_of(&shim.over);
    // One of that name without a table was left by somebody who was killed here.
    if let Some(left) = dm.by_uuid(&uuid)?
        && dm.table(left.number)?.is_empty()
    {
        dm.remove(left.number)?;
    }
    let volume = dm.create(&shim.name, &uuid)?;
    let params = format!("{} 0", raw.number);
    let table = [Target { start: 0, sectors: shim.sectors, kind: "linear".to_owned(), params }];
    let laid = dm.load(volume, &table, false).and_then(|()| dm.start_for_all(volume));
    if laid.is_err() {
        // The device below is to be as if nobody had been here.
        let _ = dm.remove(volume);
    }
    Ok(laid?)
}

/// What the root file system is to be mounted from, if there is a shim over `device`.
pub fn root_of(device: &Path) -> Option<PathBuf> {
    let rdev = fs::metadata(device).ok()?.rdev();
    let raw = Raw::numbered(&Roots::default(), DevNo { major: libc::major(rdev), minor: libc::minor(rdev) })?;
    let volume = raw.shim_over()?;
    let name = fs::read_to_string(format!("/sys/class/block/{volume}/dm/name")).ok()?;
    let named = Path::new("/dev/mapper").join(name.trim());
    let begun = Instant::now();
    while !named.exists() {
        if begun.elapsed() >= NAME_WAIT {
            return Some(Path::new("/dev").join(volume));
        }
        std::thread::sleep(LOOK);
    }
    Some(named)
}

/// What lies under a shim, by today's name.
pub fn under(volume: &Path) -> Option<PathBuf> {
    let rdev = fs::metadata(volume).ok()?.rdev();
    let roots = Roots::default();
    let volume = Raw::numbered(&roots, DevNo { major: libc::major(rdev), minor: libc::minor(rdev) })?;
    let names = fs::read_dir(roots.sys.join("class/block")).ok()?;
    let raws = names.filter_map(|e| Raw::named(&roots, e.ok()?.file_name().to_str()?));
    let raw = raws.into_iter().find(|raw| raw.shim_over().as_ref() == Some(&volume.name))?;
    Some(Path::new("/dev").join(raw.name.replace('!', "/")))
}

/// Which file would have a boot wait for a volume that is gone.
fn named_by_boot(name: &str) -> Option<&'static str> {
    const FILES: [&str; 4] = ["/proc/cmdline", "/etc/fstab", "/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"];
    let wanted = format!("/dev/mapper/{name}");
    let names = |text: String| {
        let mut words = text.lines().filter(|l| !l.trim_start().starts_with('#')).flat_map(str::split_whitespace);
        words.any(|w| w == wanted || w.strip_prefix("root=") == Some(&wanted))
    };
    FILES.into_iter().find(|file| fs::read_to_string(file).is_ok_and(names))
}

/// What makes the initramfs of this host.
fn initramfs() -> Option<(&'static str, &'static [&'static str])> {
    let there = |name: &str| ["/usr/sbin", "/sbin", "/usr/bin"].iter().any(|d| Path::new(d).join(name).exists());
    if there("update-initramfs") {
        return Some(("update-initramfs", &["-u"]));
    }
    there("dracut").then_some(("dracut", &["-f"]))
}

/// Makes it anew.
fn make_initramfs() -> Result<Option<&'static str>, ShimError> {
    let Some((program, words)) = initramfs() else { return Ok(None) };
    let failed = |why: String| ShimError::Initramfs { program, why };
    let done = Command::new(program).args(words).stdin(Stdio::null()).output().map_err(|e| failed(e.to_string()))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(failed(format!("{}: {}", done.status, said.trim())));
    }
    Ok(Some(program))
}

/// A list that the initramfs does not have is not kept.
fn change(list: &List, old: &[Shim], new: &[Shim]) -> Result<Option<&'static str>, ShimError> {
    list.store(new)?;
    make_initramfs().inspect_err(|_| {
        if let Err(e) = list.store(old) {
            eprintln!("holdfast-agent: {}", crate::error_chain(&e));
        }
    })
}

/// The first line of `/etc/fstab` that mounts a device by a name that only the raw device has.
fn mounted_by_raw_name(fstab: &str, is_device: impl Fn(&Path) -> bool) -> Option<(usize, String)> {
    const FINE: [&str; 3] = ["/dev/disk/by-uuid/", "/dev/disk/by-label/", "/dev/disk/by-partuuid/"];
    fstab.lines().enumerate().find_map(|(at, line)| {
        let mut words = line.split_whitespace();
        let (source, target) = (words.next()?, words.next()?);
        // The root is handed over by the initramfs, and never mounted by this line again.
        let raw = source.starts_with("/dev/") && !FINE.iter().any(|f| source.starts_with(f)) && target != "/";
        let by_partition_label = source.starts_with("PARTLABEL=");
        let path = match source.strip_prefix("PARTLABEL=") {
            Some(label) => Path::new("/dev/disk/by-partlabel").join(label.trim_matches('"')),
            None => PathBuf::from(source),
        };
        ((raw || by_partition_label && target != "/") && is_device(&path)).then(|| (at + 1, source.to_owned()))
    })
}

/// Why a device cannot have one.
fn unfit(disks: &Disks, device: &Device) -> Option<String> {
    let parent = match &device.class {
        Class::Dm { .. } => return None,
        Class::Md { .. } => return Some("shims lie over disks and partitions, not over RAID arrays".to_owned()),
        Class::Disk => device,
        Class::Partition { of, .. } => disks.get(of).unwrap_or(device),
    };
    if !matches!(parent.class, Class::Disk) {
        return Some(format!("it is a partition of {}, which is no plain disk", parent.title()));
    }
    if device.sectors == 0 || device.read_only {
        return Some("it is empty or read-only".to_owned());
    }
    if matches!(device.class, Class::Disk) && disks.partitions(&device.name).next().is_some() {
        return Some("it has partitions: choose one of those".to_owned());
    }
    if let Some(holder) = device.holders.first().and_then(|h| disks.get(h)) {
        return Some(format!("{} lies on it: choose the volumes above it", holder.title()));
    }
    if device.swap {
        return Some("it is swap space".to_owned());
    }
    match &device.signature {
        Some(s) if s.kind == Kind::Btrfs && s.devices > 1 => Some("its btrfs spans several devices".to_owned()),
        _ => None,
    }
}

/// Whether a disk or partition is one that `shim add` is for.
pub fn is_for(disks: &Disks, device: &Device) -> bool {
    !matches!(device.class, Class::Dm { .. }) && unfit(disks, device).is_none()
}

/// A name that tells what it is, not where it is plugged in.
fn name_for(device: &Device, over: &Over) -> String {
    let plain = |text: &str| {
        text.chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect::<String>()
            .trim_matches('-')
            .to_owned()
    };
    let label = device.signature.as_ref().map(|s| plain(&s.label)).unwrap_or_default();
    let mount =
        device.mounts.iter().map(|m| if m == "/" { "root".to_owned() } else { plain(m) }).min_by_key(String::len);
    let id = match over {
        Over::Partition(id) => plain(id.split('-').next().unwrap_or_default()),
        Over::Disk(id) => plain(id.rsplit(':').next().unwrap_or_default()),
    };
    let word = mount.filter(|m| !m.is_empty()).or(Some(label).filter(|l| !l.is_empty())).unwrap_or(id);
    format!("holdfast-{}", word.chars().take(40).collect::<String>())
}

/// What was done, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Done {
    pub name: String,
    pub device: String,
    /// The volume is there, or gone, already; else it needs a boot.
    pub at_once: bool,
    pub initramfs: Option<&'static str>,
}

/// Notes a device. One that nobody uses has its shim when this returns.
pub fn add(list: &List, choice: &str, name: Option<&str>) -> Result<Done, ShimError> {
    let disks = Disks::here()?;
    let device = disks.find(choice)?;
    let title = device.title();
    let no = |why: String| ShimError::Unfit { device: title.clone(), why };
    if matches!(device.class, Class::Dm { .. }) {
        return Err(ShimError::IsVolume { device: title });
    }
    if let Some(why) = unfit(&disks, device) {
        return Err(no(why));
    }
    let roots = Roots::default();
    let raw = Raw::named(&roots, &device.name).ok_or_else(|| no("the kernel does not know it any more".to_owned()))?;
    let over = raw.known_by(&roots).ok_or_else(|| {
        no("nothing tells it from another one at the next boot: it has no identifier in a partition table, no WWN and no serial number"
            .to_owned())
    })?;
    let same = |path: &Path| {
        fs::metadata(path)
            .is_ok_and(|m| device.number == DevNo { major: libc::major(m.rdev()), minor: libc::minor(m.rdev()) })
    };
    let fstab = fs::read_to_string("/etc/fstab").unwrap_or_default();
    if let Some((line, source_word)) = mounted_by_raw_name(&fstab, same) {
        return Err(ShimError::Fstab { device: title, line, source_word });
    }
    let is_root = device.mounts.iter().any(|m| m == "/");
    match initramfs() {
        None if !device.mounts.is_empty() => return Err(ShimError::NoInitramfs { device: title }),
        // Where initramfs-tools makes it, our script there hands the root over.
        Some(("dracut", _)) if is_root => {
            let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
            let by = |word: &str| ["root=UUID=", "root=LABEL=", "root=PARTUUID="].iter().any(|r| word.starts_with(r));
            if !line.split_whitespace().any(by) {
                return Err(no(
                    "the kernel's command line names the root by its kernel name: boot with root=UUID=… first"
                        .to_owned(),
                ));
            }
        }
        _ => {}
    }
    let old = list.load()?;
    if let Some(had) = old.iter().find(|s| s.over == over) {
        return Err(ShimError::NameTaken { name: had.name.clone() });
    }
    let name = name.map_or_else(|| name_for(device, &over), str::to_owned);
    if !list::good_name(&name) {
        return Err(ShimError::BadName { name });
    }
    let in_use = DeviceMapper::open().and_then(|dm| dm.list()).unwrap_or_default();
    if old.iter().any(|s| s.name == name) || in_use.iter().any(|(_, n)| *n == name) {
        return Err(ShimError::NameTaken { name });
    }
    let mut new = old.clone();
    new.push(Shim { name: name.clone(), sectors: device.sectors, over });
    let initramfs = change(list, &old, &new)?;
    let mut at_once = false;
    if device.mounts.is_empty() {
        match up(list, &device.node()) {
            Ok(Up::There { .. }) => {
                at_once = true;
                udev_again(&raw);
            }
            Ok(Up::NotNoted) => {}
            // Somebody has it open; the boot comes before them.
            Err(e) => eprintln!("holdfast-agent: not now: {}", crate::error_chain(&e)),
        }
    }
    Ok(Done { name, device: title, at_once, initramfs })
}

fn udev_again(raw: &Raw) {
    if let Err(e) = raw.ask_udev_again() {
        eprintln!("holdfast-agent: udev was not told to look at /dev/{} again: {e}", raw.name);
    }
}

/// Shims that are there: number and name of each.
fn there(dm: &DeviceMapper) -> Result<Vec<(DevNo, String)>, DmError> {
    let ours = |number: &DevNo| dm.info(*number).is_ok_and(|i| i.uuid.starts_with(UUID_PREFIX));
    Ok(dm.list()?.into_iter().filter(|(number, _)| ours(number)).collect())
}

/// Takes a shim away, if nobody has it open.
fn take_away(dm: &DeviceMapper, volume: DevNo) -> Result<bool, DmError> {
    if dm.info(volume)?.open_count > 0 {
        return Ok(false);
    }
    let under = dm.table(volume)?.first().and_then(|t| {
        let (major, minor) = t.params.split_whitespace().next()?.split_once(':')?;
        Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
    });
    match dm.remove(volume) {
        Ok(()) => {}
        Err(DmError::Call { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => return Ok(false),
        Err(e) => return Err(e),
    }
    if let Some(raw) = under.and_then(|number| Raw::numbered(&Roots::default(), number)) {
        udev_again(&raw);
    }
    Ok(true)
}

/// Strikes one out. It goes now, if nobody uses it, else it is not there any more after the next boot.
pub fn remove(list: &List, choice: &str) -> Result<Done, ShimError> {
    let old = list.load()?;
    let wanted = choice.strip_prefix("/dev/mapper/").unwrap_or(choice);
    let Some(shim) = old.iter().find(|s| s.name == wanted) else {
        return Err(ShimError::Unknown { name: choice.to_owned() });
    };
    let dm = DeviceMapper::open().ok();
    let uuid = uuid_of(&shim.over);
    let volume = match &dm {
        Some(dm) => dm.by_uuid(&uuid)?.map(|i| i.number),
        None => None,
    };
    if let (Some(dm), Some(volume)) = (&dm, volume)
        && mirror::is_in(dm, volume)?
    {
        return Err(ShimError::Mirrored { name: shim.name.clone() });
    }
    if let Some(file) = named_by_boot(&shim.name) {
        return Err(ShimError::Named { file, name: shim.name.clone() });
    }
    let new: Vec<Shim> = old.iter().filter(|s| s.name != shim.name).cloned().collect();
    let initramfs = change(list, &old, &new)?;
    let at_once = match (&dm, volume) {
        (Some(dm), Some(volume)) => take_away(dm, volume)?,
        _ => true,
    };
    Ok(Done { name: shim.name.clone(), device: shim.over.to_string(), at_once, initramfs })
}

/// Forgets all of them, and takes away those that nobody uses; answers the names of those that stay until the next boot.
pub fn remove_all(list: &List) -> Result<Vec<String>, ShimError> {
    for shim in list.load().unwrap_or_default() {
        if let Some(file) = named_by_boot(&shim.name) {
            return Err(ShimError::Named { file, name: shim.name });
        }
    }
    // One that cannot be read is to go as well.
    if list.path.exists() {
        list.store(&[])?;
        make_initramfs()?;
    }
    let Ok(dm) = DeviceMapper::open() else { return Ok(Vec::new()) };
    let mut stay = Vec::new();
    for (volume, name) in there(&dm)? {
        if !take_away(&dm, volume)? {
            stay.push(name);
        }
    }
    Ok(stay)
}

/// How a shim is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    pub name: String,
    pub over: String,
    /// The raw device under it, by today's name.
    pub device: Option<String>,
    pub state: String,
}

/// All that are noted or there.
pub fn list(list: &List) -> Result<Vec<Seen>, ShimError> {
    let shims = list.load()?;
    let disks = Disks::here()?;
    let roots = Roots::default();
    let raws: Vec<(Raw, Option<Over>)> = disks
        .iter()
        .filter(|d| matches!(d.class, Class::Disk | Class::Partition { .. }) && d.sectors > 0)
        .filter_map(|d| Raw::named(&roots, &d.name))
        .map(|raw| (raw.clone(), raw.known_by(&roots)))
        .collect();
    let mut out: Vec<Seen> = shims
        .iter()
        .map(|shim| {
            let raw = raws.iter().find(|(_, over)| over.as_ref() == Some(&shim.over)).map(|(raw, _)| raw);
            let state = match raw {
                None => "its disk is not on this host".to_owned(),
                Some(raw) if raw.shim_over().is_some() => "in use".to_owned(),
                Some(raw) if raw.sectors != shim.sectors => {
                    format!(
                        "left as it is: it has {} sectors, {} were noted; remove the shim and add it again",
                        raw.sectors, shim.sectors
                    )
                }
                Some(_) => "waits for the next boot".to_owned(),
            };
            let device = raw.map(|r| format!("/dev/{}", r.name));
            Seen { name: shim.name.clone(), over: shim.over.to_string(), device, state }
        })
        .collect();
    if let Ok(dm) = DeviceMapper::open() {
        for (_, name) in there(&dm)?.into_iter().filter(|(_, n)| !shims.iter().any(|s| s.name == *n)) {
            let state = "goes with the next boot".to_owned();
            out.push(Seen { name, over: String::new(), device: None, state });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_by_the_raw_name_is_found_and_the_root_is_not() {
        let fstab = "# x\nUUID=1 / ext4\n/dev/vdb1 /srv ext4\n/dev/disk/by-uuid/2 /a ext4\n/dev/vda4 / ext4\nPARTLABEL=x /b ext4\n";
        let is = |wanted: &'static str| move |path: &Path| path == Path::new(wanted);
        assert_eq!(mounted_by_raw_name(fstab, is("/dev/vdb1")), Some((3, "/dev/vdb1".to_owned())));
        assert_eq!(mounted_by_raw_name(fstab, is("/dev/disk/by-uuid/2")), None);
        assert_eq!(mounted_by_raw_name(fstab, is("/dev/vda4")), None);
        assert_eq!(mounted_by_raw_name(fstab, is("/dev/disk/by-partlabel/x")), Some((6, "PARTLABEL=x".to_owned())));
    }

    #[test]
    fn identifiers_fit_and_are_told_from_those_of_mirrors() {
        let part = uuid_of(&Over::Partition("9d2f6a34-3a0b-4a7e-8f43-0c1e2d3f4a52".to_owned()));
        assert_eq!(part, "HFSHIM-part-9d2f6a34-3a0b-4a7e-8f43-0c1e2d3f4a52");
        let disk = uuid_of(&Over::Disk(format!("wwn:{}", "x".repeat(300))));
        assert!(disk.len() < 64 && disk != uuid_of(&Over::Disk("wwn:y".to_owned())));
        assert!(!part.starts_with(mirror::UUID_PREFIX) && !mirror::UUID_PREFIX.starts_with(UUID_PREFIX));
    }
}
