//! What tells a disk from another one put in its place.

use super::Signature;
use serde::{Deserialize, Serialize};
use std::{fmt, fs, path::Path};

/// `hard` is brought along by the disk itself and never changes. `place` is where it is plugged in. `content` is what was found on it, and
/// changes when somebody formats it.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// `wwn:…`, `serial:…`, `loop:…`; sorted.
    pub hard: Vec<String>,
    pub place: String,
    pub content: String,
}

/// How a disk that is there compares with the one that was recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Same {
    Yes,
    No,
    /// Nothing that could tell: same place, and nothing on either.
    Unknown,
}

impl Identity {
    /// From a device's directory in sysfs. A partition has its disk's identity and a number.
    pub fn read(dir: &Path, parent: Option<&Identity>, signature: Option<&Signature>) -> Self {
        let text = |name: &str| {
            let text = fs::read_to_string(dir.join(name)).ok()?;
            let text: String = text.trim().chars().filter(|c| !c.is_control()).collect();
            (!text.is_empty()).then_some(text)
        };
        let content =
            signature.filter(|s| !s.uuid.is_empty()).map_or(String::new(), |s| format!("{:?}:{}", s.kind, s.uuid));
        if let Some(parent) = parent {
            let number = text("partition").unwrap_or_default();
            let tail = |s: &String| format!("{s}#{number}");
            return Self { hard: parent.hard.iter().map(tail).collect(), place: tail(&parent.place), content };
        }
        let mut hard = Vec::new();
        for file in ["wwid", "device/wwid", "wwn"] {
            if let Some(wwn) = text(file) {
                hard.push(format!("wwn:{}", wwn.split_whitespace().collect::<Vec<_>>().join(" ")));
                break;
            }
        }
        for file in ["serial", "device/serial"] {
            if let Some(serial) = text(file) {
                hard.push(format!("serial:{serial}"));
                break;
            }
        }
        if let Some(serial) = vpd_serial(dir) {
            hard.push(format!("vpd:{serial}"));
        }
        if let Some(file) = text("loop/backing_file") {
            hard.push(format!("loop:{file}"));
        }
        if let Some(uuid) = text("dm/uuid") {
            hard.push(format!("dm:{uuid}"));
        }
        hard.sort();
        let place = fs::canonicalize(dir.join("device")).map(|p| p.display().to_string()).unwrap_or_default();
        Self { hard, place, content }
    }

    pub fn compare(&self, now: &Identity) -> Same {
        let kind = |s: &str| s.split(':').next().unwrap_or_default().to_owned();
        let mut told = false;
        for had in &self.hard {
            for has in now.hard.iter().filter(|h| kind(h) == kind(had)) {
                if has != had {
                    return Same::No;
                }
                told = true;
            }
        }
        if told {
            return Same::Yes;
        }
        match (self.content.is_empty(), now.content.is_empty()) {
            (false, false) if self.content == now.content => Same::Yes,
            (false, false) => Same::No,
            // Something that carried an identity carries none now: another disk, or wiped; either way not what was protected.
            (false, true) => Same::No,
            _ if !self.place.is_empty() && self.place == now.place => Same::Unknown,
            _ => Same::Unknown,
        }
    }
}

/// The text recorded with the volume on the box: what never changes, or else place and content as they were at first.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.hard.is_empty() {
            return f.write_str(&self.hard.join(" "));
        }
        match (self.place.is_empty(), self.content.is_empty()) {
            (_, false) => f.write_str(&self.content),
            (false, true) => write!(f, "place:{}", self.place),
            (true, true) => f.write_str("unknown"),
        }
    }
}

/// SCSI vital product data, page 0x80: the unit's serial number.
fn vpd_serial(dir: &Path) -> Option<String> {
    let bytes = fs::read(dir.join("device/vpd_pg80")).ok()?;
    let len = usize::from(*bytes.get(3)?);
    let text: String =
        String::from_utf8_lossy(bytes.get(4..4 + len)?).trim().chars().filter(|c| !c.is_control()).collect();
    (!text.is_empty()).then_some(text)
}
