//! What lies on a block device, as far as its first 128 KiB tell: own small probe, no library, never writes.

use std::fmt;

/// How much of a device is looked at: btrfs keeps its superblock at 64 KiB.
pub const PROBE_BYTES: usize = 128 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    Ext,
    Xfs,
    Btrfs,
    Swap,
    LvmPv,
    MdMember,
    Luks,
    Gpt,
    Mbr,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Swap => "swap",
            Self::LvmPv => "LVM physical volume",
            Self::MdMember => "RAID member",
            Self::Luks => "LUKS",
            Self::Gpt => "GPT partition table",
            Self::Mbr => "MBR partition table",
        })
    }
}

/// A signature and the identity that it carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    pub kind: Kind,
    /// As tools print it; empty when the format has none.
    pub uuid: String,
    pub label: String,
    /// Devices the file system spans, as it says itself; 1 for all but btrfs.
    pub devices: u64,
}

/// Looks for signatures; the first that fits wins, most specific first.
pub fn probe(bytes: &[u8]) -> Option<Signature> {
    let found = |kind, uuid: String, label: String| Some(Signature { kind, uuid, label, devices: 1 });
    let at = |from: usize, len: usize| bytes.get(from..from + len);
    let is = |from: usize, magic: &[u8]| at(from, magic.len()) == Some(magic);
    let text = |from: usize, len: usize| {
        let raw = at(from, len).unwrap_or_default();
        let end = raw.iter().position(|b| *b == 0).unwrap_or(raw.len());
        String::from_utf8_lossy(&raw[..end]).chars().filter(|c| !c.is_control()).collect::<String>()
    };
    let quad = |from: usize| at(from, 8).map_or(0, |b| u64::from_le_bytes(std::array::from_fn(|i| b[i])));

    if is(0, b"LUKS\xba\xbe") {
        return found(Kind::Luks, text(168, 40), String::new());
    }
    if is(0, b"XFSB") {
        return found(Kind::Xfs, uuid_text(at(32, 16)), text(108, 12));
    }
    if is(65536 + 64, b"_BHRfS_M") {
        let signature = Signature {
            kind: Kind::Btrfs,
            uuid: uuid_text(at(65536 + 32, 16)),
            label: text(65536 + 299, 256),
            devices: quad(65536 + 0x88).max(1),
        };
        return Some(signature);
    }
    // The label of a physical volume lies in one of the first four sectors.
    for sector in 0..4 {
        if is(sector * 512, b"LABELONE") && is(sector * 512 + 24, b"LVM2 001") {
            return found(Kind::LvmPv, pv_uuid(&text(sector * 512 + 32, 32)), String::new());
        }
    }
    // Versions 1.1 at the start and 1.2 at 4 KiB; 1.0 and 0.9 lie at the end and are known from sysfs.
    for start in [0, 4096] {
        if is(start, &0xa92b_4efc_u32.to_le_bytes()) {
            return found(Kind::MdMember, uuid_text(at(start + 16, 16)), text(start + 32, 32));
        }
    }
    if is(4086, b"SWAPSPACE2") {
        return found(Kind::Swap, uuid_text(at(1024 + 12, 16)), text(1024 + 28, 16));
    }
    if is(1024 + 56, &[0x53, 0xef]) {
        return found(Kind::Ext, uuid_text(at(1024 + 104, 16)), text(1024 + 120, 16));
    }
    for start in [512, 4096] {
        if is(start, b"EFI PART") {
            return found(Kind::Gpt, guid_text(at(start + 56, 16)), String::new());
        }
    }
    // Last: a boot sector's two bytes stand at the end of many things.
    if is(510, &[0x55, 0xaa]) && at(446, 64).is_some_and(plausible_partitions) {
        let id = at(440, 4).map_or(0, |b| u32::from_le_bytes(std::array::from_fn(|i| b[i])));
        return found(Kind::Mbr, format!("{id:08x}"), String::new());
    }
    None
}

/// Every entry is empty or has a type, and its status byte is one of two: else it is some file system's boot code.
fn plausible_partitions(table: &[u8]) -> bool {
    table.chunks(16).all(|e| matches!(e[0], 0 | 0x80)) && table.chunks(16).any(|e| e[4] != 0)
}

fn uuid_text(bytes: Option<&[u8]>) -> String {
    let Some(bytes) = bytes.filter(|b| b.iter().any(|x| *x != 0)) else { return String::new() };
    let mut out = String::with_capacity(36);
    for (i, b) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            out.push('-');
        }
        out.push_str(&format!("{b:02x}"));
    }
    out
}

/// GPT stores the first three fields little-endian.
fn guid_text(bytes: Option<&[u8]>) -> String {
    let Some(b) = bytes.filter(|b| b.len() == 16) else { return String::new() };
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let swapped: Vec<u8> = order.iter().map(|i| b[*i]).collect();
    uuid_text(Some(&swapped))
}

fn pv_uuid(raw: &str) -> String {
    let cuts = [6, 10, 14, 18, 22, 26];
    raw.chars().enumerate().fold(String::new(), |mut out, (i, c)| {
        if cuts.contains(&i) {
            out.push('-');
        }
        out.push(c);
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; PROBE_BYTES];
        for (at, data) in parts {
            bytes[*at..*at + data.len()].copy_from_slice(data);
        }
        bytes
    }

    const ID: &[u8] = &[0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8];
    const TEXT: &str = "12345678-9abc-def0-0102-030405060708";

    #[test]
    fn every_kind_is_found() {
        let table: [(Vec<u8>, Kind, &str, &str); 7] = [
            (with(&[(1080, &[0x53, 0xef]), (1128, ID), (1144, b"root")]), Kind::Ext, TEXT, "root"),
            (with(&[(0, b"XFSB"), (32, ID), (108, b"data")]), Kind::Xfs, TEXT, "data"),
            (with(&[(65600, b"_BHRfS_M"), (65568, ID)]), Kind::Btrfs, TEXT, ""),
            (with(&[(4086, b"SWAPSPACE2"), (1036, ID)]), Kind::Swap, TEXT, ""),
            (
                with(&[(512, b"LABELONE"), (536, b"LVM2 001"), (544, b"abcdefghijklmnopqrstuvwxyz012345")]),
                Kind::LvmPv,
                "abcdef-ghij-klmn-opqr-stuv-wxyz-012345",
                "",
            ),
            (with(&[(4096, &0xa92b_4efc_u32.to_le_bytes()), (4112, ID)]), Kind::MdMember, TEXT, ""),
            (
                with(&[(512, b"EFI PART"), (568, ID), (510, &[0x55, 0xaa])]),
                Kind::Gpt,
                "78563412-bc9a-f0de-0102-030405060708",
                "",
            ),
        ];
        for (bytes, kind, uuid, label) in table {
            let found = probe(&bytes).unwrap_or_else(|| panic!("{kind} is not found"));
            assert_eq!((found.kind, found.uuid.as_str(), found.label.as_str()), (kind, uuid, label));
        }
        let luks = probe(&with(&[(0, b"LUKS\xba\xbe"), (168, TEXT.as_bytes())])).unwrap();
        assert_eq!((luks.kind, luks.uuid.as_str()), (Kind::Luks, TEXT));
        let mut entry = [0u8; 16];
        entry[4] = 0x83;
        let mbr = probe(&with(&[(440, &[1, 0, 0, 0]), (446, &entry), (510, &[0x55, 0xaa])])).unwrap();
        assert_eq!((mbr.kind, mbr.uuid.as_str()), (Kind::Mbr, "00000001"));
    }

    #[test]
    fn nothing_is_nothing_and_short_input_does_no_harm() {
        assert_eq!(probe(&vec![0; PROBE_BYTES]), None);
        let full = with(&[(65600, b"_BHRfS_M"), (1080, &[0x53, 0xef]), (510, &[0x55, 0xaa])]);
        for cut in 0..2000 {
            let _ = probe(&full[..cut]);
        }
        assert_eq!(probe(&[]), None);
    }

    #[test]
    fn a_btrfs_says_how_many_devices_it_spans() {
        let bytes = with(&[(65600, b"_BHRfS_M"), (65536 + 0x88, &3u64.to_le_bytes())]);
        assert_eq!(probe(&bytes).map(|s| s.devices), Some(3));
    }
}
