//! The host's storage as a tree, for people and as JSON: disk → partition → RAID → LUKS → volume group → logical volume → file
//! system and where it is mounted.

use super::{Class, Device, Disks, Leaf, Resolution};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Names of volume group and logical volume in a device-mapper name: joined by a dash, own dashes doubled.
pub(super) fn lvm_names(dm_name: &str) -> Option<(String, String)> {
    let bytes = dm_name.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'-' {
            if bytes.get(i + 1) == Some(&b'-') {
                i += 2;
                continue;
            }
            let (group, volume) = (dm_name.get(..i)?, dm_name.get(i + 1..)?);
            let plain = |s: &str| s.replace("--", "-");
            return (!group.is_empty() && !volume.is_empty()).then(|| (plain(group), plain(volume)));
        }
        i += 1;
    }
    None
}

impl Device {
    /// Volume group and name, for a logical volume.
    pub fn logical_volume(&self) -> Option<(String, String)> {
        match &self.class {
            Class::Dm { maker, name } if maker == "LVM" => lvm_names(name),
            _ => None,
        }
    }

    /// What it is, in a word or two.
    pub fn kind_text(&self) -> String {
        match &self.class {
            Class::Disk => "disk".to_owned(),
            Class::Partition { .. } => "partition".to_owned(),
            Class::Md { level } if level.is_empty() => "RAID array".to_owned(),
            Class::Md { level } => format!("RAID array, {level}"),
            Class::Dm { maker, .. } => match maker.as_str() {
                "LVM" => "logical volume".to_owned(),
                "CRYPT" => "opened encrypted volume".to_owned(),
                "mpath" => "multipath map".to_owned(),
                "part" => "partition of a map".to_owned(),
                "HFSHIM" => "shim over a plain disk or partition".to_owned(),
                "" => "device-mapper volume".to_owned(),
                other => format!("device-mapper volume ({other})"),
            },
        }
    }

    fn shown_name(&self) -> String {
        match (&self.class, self.logical_volume()) {
            (_, Some((_, volume))) => volume,
            (Class::Dm { name, .. }, None) if !name.is_empty() => name.clone(),
            _ => self.name.clone(),
        }
    }

    /// For machines: one word.
    fn kind_word(&self) -> &'static str {
        match &self.class {
            Class::Disk => "disk",
            Class::Partition { .. } => "partition",
            Class::Md { .. } => "raid",
            Class::Dm { maker, .. } => match maker.as_str() {
                "LVM" => "logical-volume",
                "CRYPT" => "encrypted",
                "mpath" => "multipath",
                _ => "device-mapper",
            },
        }
    }
}

/// What hangs below a line of the tree.
enum Child<'a> {
    Device(&'a Device),
    Group(String, Vec<&'a Device>),
}

impl Disks {
    fn children<'a>(&'a self, d: &'a Device) -> Vec<Child<'a>> {
        let mut out: Vec<Child<'a>> = self.partitions(&d.name).map(Child::Device).collect();
        let mut groups: BTreeMap<String, Vec<&Device>> = BTreeMap::new();
        for up in d.holders.iter().filter_map(|h| self.get(h)) {
            // Only what lies on the physical volume itself; a logical volume may hold parts of another (a mirror, a pool).
            match up.logical_volume() {
                Some((group, _)) if d.logical_volume().is_none() => groups.entry(group).or_default().push(up),
                _ => out.push(Child::Device(up)),
            }
        }
        out.extend(groups.into_iter().map(|(name, volumes)| Child::Group(name, volumes)));
        out
    }

    /// Whether the tree begins here.
    fn is_root(&self, d: &Device) -> bool {
        d.sectors > 0 && !matches!(d.class, Class::Partition { .. }) && self.below_any(d).is_empty()
    }

    fn below_any(&self, d: &Device) -> Vec<&Device> {
        d.slaves.iter().filter_map(|s| self.get(s)).collect()
    }

    fn line(
        &self,
        f: &mut fmt::Formatter<'_>,
        d: &Device,
        depth: usize,
        printed: &mut BTreeSet<String>,
    ) -> fmt::Result {
        let width = 32usize.saturating_sub(depth * 2);
        let indent = depth * 2;
        write!(f, "{:indent$}{:width$} {:>10}  {}", "", d.shown_name(), d.bytes().to_string(), d.kind_text())?;
        if let Some(s) = &d.signature {
            write!(f, ", {}", s.kind)?;
            if !s.label.is_empty() {
                write!(f, " {:?}", s.label)?;
            }
        }
        for mount in &d.mounts {
            write!(f, "  {mount}")?;
        }
        if d.swap {
            write!(f, "  [swap]")?;
        }
        if d.read_only {
            write!(f, "  [read-only]")?;
        }
        if !d.model.is_empty() && matches!(d.class, Class::Disk) {
            write!(f, "  ({})", d.model)?;
        }
        if self.is_capture_point(d) {
            match self.backend(d) {
                Ok(backend) => write!(f, "  {}", backend.name())?,
                Err(_) => write!(f, "  cannot be captured")?,
            }
        }
        writeln!(f)?;
        // Something over two disks is shown under each, its own tree only once.
        if !printed.insert(d.name.clone()) {
            return Ok(());
        }
        for child in self.children(d) {
            match child {
                Child::Device(up) => self.line(f, up, depth + 1, printed)?,
                Child::Group(name, volumes) => {
                    let (indent, width) = ((depth + 1) * 2, 32usize.saturating_sub((depth + 1) * 2));
                    writeln!(f, "{:indent$}{:width$} {:>10}  LVM volume group", "", name, "")?;
                    for volume in volumes {
                        self.line(f, volume, depth + 2, printed)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether writes are captured here and not at something below.
    fn is_capture_point(&self, d: &Device) -> bool {
        if self.mirrors.is_some() {
            return matches!(&d.class, Class::Dm { .. }) || (d.slaves.is_empty() && d.holders.is_empty());
        }
        match d.class {
            Class::Disk => true,
            Class::Partition { .. } => false,
            _ => d.slaves.is_empty() || (d.is_multipath() && d.queue),
        }
    }

    /// The layers under a choice, from what is on it down to the leaves: one line each.
    pub fn stack_of(&self, device: &Device) -> Vec<String> {
        let mut out = Vec::new();
        if let Some(s) = &device.signature {
            let at = device.mounts.first().map_or(String::new(), |m| format!(" at {m}"));
            out.push(format!("{}{at}", s.kind));
        }
        let mut level = vec![device];
        let mut seen = BTreeSet::new();
        while !level.is_empty() {
            let mut next: Vec<&Device> = Vec::new();
            let mut groups = BTreeSet::new();
            let mut titles = Vec::new();
            for d in level {
                if !seen.insert(d.name.clone()) {
                    continue;
                }
                titles.push(format!("{} {}", d.kind_text(), d.title()));
                groups.extend(d.logical_volume().map(|(group, _)| group));
                match &d.class {
                    Class::Partition { of, .. } => next.extend(self.get(of)),
                    _ => next.extend(self.below_any(d)),
                }
            }
            if !titles.is_empty() {
                out.push(titles.join(" + "));
            }
            out.extend(groups.into_iter().map(|g| format!("LVM volume group {g}")));
            level = next;
        }
        out
    }

    /// What it takes to mirror a plain disk or partition.
    pub fn how_to_mirror(&self, d: &Device) -> String {
        format!(
            "to be mirrored (protect --sync) {0} needs a volume of the device mapper over it, which is put there at a boot: \
             `holdfast-agent shim add {0}`",
            d.title()
        )
    }

    fn device_json(&self, d: &Device) -> Value {
        let resolved = self.resolve(std::slice::from_ref(&d.name));
        let (captured_on, takes_along, refused) = match &resolved {
            Ok(_) if self.mirrors.is_some() => (vec![d.name.clone()], Vec::new(), None),
            Ok(r) => {
                let mut own = BTreeSet::new();
                self.leaves_under(d, &mut own);
                let (on, along): (Vec<&Leaf>, Vec<&Leaf>) = r.leaves.iter().partition(|l| own.contains(&l.volume));
                let names = |list: Vec<&Leaf>| list.iter().map(|l| l.volume.clone()).collect::<Vec<_>>();
                (names(on), names(along), None)
            }
            Err(e) => (Vec::new(), Vec::new(), Some(crate::error_chain(e))),
        };
        let backends: BTreeSet<_> = resolved.iter().flat_map(|r| &r.leaves).map(|l| l.backend).collect();
        let start = if let Class::Partition { start, .. } = d.class { Some(start) } else { None };
        json!({
            "name": d.name,
            "path": d.title(),
            "number": d.number.to_string(),
            "kind": d.kind_word(),
            "raid_level": if let Class::Md { level } = &d.class { Some(level) } else { None },
            "partition_start_sector": start,
            "partition_of": if let Class::Partition { of, .. } = &d.class { Some(of) } else { None },
            "volume_group": d.logical_volume().map(|(group, _)| group),
            "bytes": d.bytes().0,
            "model": d.model,
            "identity": d.identity.to_string(),
            "content": d.signature.as_ref().map(|s| json!({ "kind": s.kind.to_string(), "uuid": s.uuid, "label": s.label })),
            "mounts": d.mounts,
            "swap": d.swap,
            "read_only": d.read_only,
            "lies_on": d.slaves,
            "carries": d.holders,
            "captured_on": captured_on,
            "takes_along": takes_along,
            "backends": backends.iter().map(|b| b.name()).collect::<Vec<_>>(),
            "promise": backends.iter().last().map(|b| b.promise()),
            "refused": refused,
        })
    }

    /// Every device, and what choosing it would mean.
    pub fn json(&self) -> Value {
        let devices: Vec<Value> = self.iter().filter(|d| d.sectors > 0).map(|d| self.device_json(d)).collect();
        json!({ "devices": devices, "at_mirrors": self.why_mirrors() })
    }

    /// A choice: layers, leaves, notes.
    pub fn choice_json(&self, choices: &[String], resolution: &Resolution) -> Value {
        let stacks: Vec<Value> = choices
            .iter()
            .filter_map(|c| self.find(c).ok())
            .map(|d| json!({ "choice": d.title(), "stack": self.stack_of(d) }))
            .collect();
        let leaves: Vec<Value> = resolution
            .leaves
            .iter()
            .map(|l| {
                json!({
                    "volume": l.volume, "disk": l.disk, "start_sector": l.range.start(), "bytes": l.range.bytes(),
                    "why": l.why, "backend": l.backend.name(), "promise": l.backend.promise(),
                })
            })
            .collect();
        json!({ "choices": stacks, "volumes": leaves, "notes": resolution.notes })
    }
}

/// The tree as `holdfast-agent disks` prints it.
impl fmt::Display for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printed = BTreeSet::new();
        for device in self.iter().filter(|d| self.is_root(d)) {
            self.line(f, device, 0, &mut printed)?;
        }
        let disks: Vec<&Device> = self.iter().filter(|d| d.sectors > 0 && self.is_capture_point(d)).collect();
        let backends: BTreeSet<_> = disks.iter().filter_map(|d| self.backend(d).ok()).collect();
        for backend in backends {
            write!(f, "\n{}: {}\n", backend.name(), backend.promise())?;
        }
        if let Some(why) = self.why_mirrors() {
            write!(f, "\n{why}\n")?;
        }
        let plain = |d: &&Device| !d.mounts.is_empty() && crate::shim::is_for(self, d);
        for device in self.iter().filter(plain) {
            write!(f, "\n{}\n", self.how_to_mirror(device))?;
        }
        let refused: BTreeSet<String> =
            disks.iter().filter_map(|d| self.backend(d).err()).map(|e| e.to_string()).collect();
        refused.iter().try_for_each(|why| write!(f, "\n{why}\n"))
    }
}
