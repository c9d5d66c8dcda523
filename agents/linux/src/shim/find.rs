//! What a disk or partition is known by, from the kernel's own lists and its partition table: in an initramfs, before udev has named it.

use super::{UUID_PREFIX, list::Over};
use crate::{
    capture::DevNo,
    disks::{Identity, Roots},
};
use model::SECTOR;
use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// A device as sysfs has it.
#[derive(Clone, Debug)]
pub struct Raw {
    /// As the kernel calls it now.
    pub name: String,
    pub number: DevNo,
    pub sectors: u64,
    dir: PathBuf,
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

fn number(path: &Path) -> Option<DevNo> {
    let text = text(path)?;
    let (major, minor) = text.split_once(':')?;
    Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

impl Raw {
    /// By the kernel's name.
    pub fn named(roots: &Roots, name: &str) -> Option<Self> {
        Self::at(&roots.sys.join("class/block").join(name))
    }

    pub fn numbered(roots: &Roots, number: DevNo) -> Option<Self> {
        Self::at(&roots.sys.join("dev/block").join(number.to_string()))
    }

    fn at(dir: &Path) -> Option<Self> {
        let dir = fs::canonicalize(dir).ok()?;
        Some(Self {
            name: dir.file_name()?.to_str()?.to_owned(),
            number: number(&dir.join("dev"))?,
            sectors: text(&dir.join("size"))?.parse().ok()?,
            dir,
        })
    }

    /// What it is known by, from now on and wherever it is plugged in; none where nothing tells it from another one.
    pub fn known_by(&self, roots: &Roots) -> Option<Over> {
        match text(&self.dir.join("partition")) {
            Some(index) => self.partition_id(roots, index.parse().ok()?).map(Over::Partition),
            None => Identity::read(&self.dir, None, None)
                .hard
                .into_iter()
                .find(|id| id.starts_with("wwn:") || id.starts_with("serial:") || id.starts_with("vpd:"))
                .map(Over::Disk),
        }
    }

    fn partition_id(&self, roots: &Roots, index: u64) -> Option<String> {
        let disk = self.dir.parent()?;
        let block: u64 = text(&disk.join("queue/logical_block_size"))?.parse().ok()?;
        let start: u64 = text(&self.dir.join("start"))?.parse().ok()?;
        let node = roots.dev.join(disk.file_name()?.to_str()?.replace('!', "/"));
        let table = fs::File::open(node).ok()?;
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            table.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
        };
        gpt_id(&read, block, index, start).or_else(|| mbr_id(&read(0, 512)?, index))
    }

    /// The volume of ours that lies over it, by the kernel's name; also while it is mirrored, when the mirror's device lies between.
    pub fn shim_over(&self) -> Option<String> {
        let holders = fs::read_dir(self.dir.join("holders")).ok()?;
        let names = holders.filter_map(|e| e.ok()?.file_name().into_string().ok());
        let of = |name: &String, file: &str| text(&self.dir.join("holders").join(name).join(file));
        for name in names {
            let uuid = of(&name, "dm/uuid").unwrap_or_default();
            if uuid.starts_with(UUID_PREFIX) {
                return Some(name);
            }
            if uuid.strip_prefix(crate::capture::dm::mirror::UUID_PREFIX).is_some_and(|u| u.starts_with(UUID_PREFIX)) {
                let above = fs::read_dir(self.dir.join("holders").join(&name).join("holders")).ok()?;
                return above.flatten().next()?.file_name().into_string().ok();
            }
        }
        None
    }

    /// Has udev look at it again.
    pub fn ask_udev_again(&self) -> std::io::Result<()> {
        fs::write(self.dir.join("uevent"), "change")
    }
}

/// From a GUID partition table; the entry must lie where the kernel says that the partition begins.
fn gpt_id(read: &dyn Fn(u64, usize) -> Option<Vec<u8>>, block: u64, index: u64, start: u64) -> Option<String> {
    let head = read(block, 92)?;
    let long = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let short = |bytes: &[u8], at: usize| u64::from(u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i])));
    let (entries, count, len) = (long(&head, 72), short(&head, 80), short(&head, 84));
    if !head.starts_with(b"EFI PART") || !(1..=count).contains(&index) || !(128..=4096).contains(&len) {
        return None;
    }
    let at = entries.checked_mul(block)?.checked_add((index - 1).checked_mul(len)?)?;
    let entry = read(at, 128)?;
    if long(&entry, 32).checked_mul(block)? != start * SECTOR || entry[16..32].iter().all(|b| *b == 0) {
        return None;
    }
    let id = &entry[16..32];
    let hex = |bytes: &mut dyn Iterator<Item = &u8>| bytes.map(|b| format!("{b:02x}")).collect::<String>();
    // The first three fields are little endian.
    Some(
        [
            hex(&mut id[..4].iter().rev()),
            hex(&mut id[4..6].iter().rev()),
            hex(&mut id[6..8].iter().rev()),
            hex(&mut id[8..10].iter()),
            hex(&mut id[10..].iter()),
        ]
        .join("-"),
    )
}

/// From a DOS partition table: the disk's number and the partition's.
fn mbr_id(sector: &[u8], index: u64) -> Option<String> {
    let id = u32::from_le_bytes(std::array::from_fn(|i| sector[440 + i]));
    (sector[510..] == [0x55, 0xaa] && id != 0).then(|| format!("{id:08x}-{index:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn reader(bytes: Vec<u8>) -> impl Fn(u64, usize) -> Option<Vec<u8>> {
        move |at, len| bytes.get(at as usize..at as usize + len).map(<[u8]>::to_vec)
    }

    /// As sgdisk, which wrote the table, says it.
    #[test]
    fn a_partition_is_known_by_the_identifier_in_its_table() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let wanted = "9D2F6A34-3A0B-4A7E-8F43-0C1E2D3F4A52";
        let words = ["-n1:2048:4095", "-n2:4096:8191", &format!("-u2:{wanted}")];
        match Command::new("sgdisk").args(words).arg(&image).output() {
            Ok(done) if done.status.success() => {}
            Ok(done) => panic!("{}", String::from_utf8_lossy(&done.stderr)),
            Err(_) => return println!("SKIPPED: sgdisk is missing"),
        }
        let bytes = fs::read(&image).unwrap();
        let read = reader(bytes[..1 << 20].to_vec());
        assert_eq!(gpt_id(&read, 512, 2, 4096), Some(wanted.to_lowercase()));
        assert_eq!(gpt_id(&read, 512, 2, 2048), None, "the table says that it begins elsewhere");
        assert_eq!(
            (gpt_id(&read, 512, 3, 0), gpt_id(&read, 4096, 2, 4096), gpt_id(&read, 512, 0, 0)),
            (None, None, None)
        );
    }

    #[test]
    fn a_dos_table_has_a_number_for_the_disk() {
        let mut sector = vec![0; 512];
        assert_eq!(mbr_id(&sector, 1), None);
        sector[440..444].copy_from_slice(&[0x78, 0x56, 0x34, 0x12]);
        assert_eq!(mbr_id(&sector, 1), None, "no table");
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(mbr_id(&sector, 11).as_deref(), Some("12345678-0b"));
    }
}
