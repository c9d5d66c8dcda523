//! Tables and status lines: which volumes may carry a mirror, what ours looks like, what the kernel says of it.

use super::ioctl::Target;
use crate::capture::DevNo;

/// Targets that keep nothing of their own: two devices over one such table are harmless. A second instance of a thin pool, a cache, a
/// snapshot or a RAID over the same metadata would destroy it.
const STATELESS: &[&str] = &["linear", "striped", "crypt", "delay", "flakey", "error", "zero"];

/// Region size in sectors (512 KiB). With a core log and `nosync` it only bounds how finely the kernel keeps order inside the mirror.
const REGION_SECTORS: u32 = 1024;

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TableRefusal {
    #[error("it has no table: it is not active")]
    Empty,
    #[error(
        "its target {kind:?} keeps data of its own, which a mirror cannot be put above while it runs; protect it without --sync"
    )]
    Stateful { kind: String },
    #[error("its table has a hole at sector {at}")]
    Hole { at: u64 },
    #[error("it carries a mirror that is not ours")]
    ForeignMirror,
}

/// A volume's table as we find it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// What it was made as.
    Plain { sectors: u64 },
    /// Our mirror: the device with its old table, and the leg.
    Mirrored { inner: DevNo, leg: DevNo, sectors: u64 },
}

/// The table of a mirrored volume. `nosync`: the agent copies by itself. `handle_errors keep_log`: a leg that fails is left out and the
/// host goes on; without the second, the host's I/O would be held until somebody acts, without both a failure of the local disk would
/// be reported as success.
pub fn mirror(sectors: u64, inner: DevNo, leg: DevNo) -> Target {
    Target {
        start: 0,
        sectors,
        kind: "mirror".to_owned(),
        params: format!("core 2 {REGION_SECTORS} nosync 2 {inner} 0 {leg} 0 2 handle_errors keep_log"),
    }
}

fn number(text: &str) -> Option<DevNo> {
    let (major, minor) = text.split_once(':')?;
    Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The two legs of a mirror's table line.
fn legs(params: &str) -> Option<(DevNo, DevNo)> {
    let mut words = params.split_whitespace();
    let _log = words.next()?;
    let args: usize = words.next()?.parse().ok()?;
    let mut words = words.skip(args);
    if words.next()? != "2" {
        return None;
    }
    let inner = number(words.next()?)?;
    let zero = words.next()? == "0";
    let leg = number(words.next()?)?;
    (zero && words.next()? == "0").then_some((inner, leg))
}

/// Judges a table. `ours`: the number of the device that holds this volume's old table, if there is one.
pub fn judge(table: &[Target], ours: Option<DevNo>) -> Result<Found, TableRefusal> {
    let mut end = 0;
    for target in table {
        if target.start != end {
            return Err(TableRefusal::Hole { at: end });
        }
        end = target.start + target.sectors;
    }
    if let [only] = table
        && only.kind == "mirror"
    {
        return match legs(&only.params) {
            Some((inner, leg)) if ours == Some(inner) => Ok(Found::Mirrored { inner, leg, sectors: end }),
            _ => Err(TableRefusal::ForeignMirror),
        };
    }
    if end == 0 {
        return Err(TableRefusal::Empty);
    }
    match table.iter().find(|t| !STATELESS.contains(&t.kind.as_str())) {
        Some(target) => Err(TableRefusal::Stateful { kind: target.kind.clone() }),
        None => Ok(Found::Plain { sectors: end }),
    }
}

/// How a leg is, as the kernel says it: one letter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    Alive,
    /// A write failed.
    WriteFailed,
    /// A read failed.
    ReadFailed,
    /// A flush failed, or anything else the kernel calls an error.
    Failed,
}

impl Health {
    fn from_letter(letter: char) -> Self {
        match letter {
            'A' => Self::Alive,
            'D' => Self::WriteFailed,
            'R' => Self::ReadFailed,
            _ => Self::Failed,
        }
    }
}

/// The health of both legs from a mirror's status line: `2 253:1 43:0 192/192 1 AA 1 core`.
pub fn health(status: &str) -> Option<(Health, Health)> {
    let mut words = status.split_whitespace();
    let count: usize = words.next()?.parse().ok()?;
    let mut letters = words.nth(count.checked_add(2)?)?.chars();
    let (inner, leg) = (letters.next()?, letters.next()?);
    Some((Health::from_letter(inner), Health::from_letter(leg)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: DevNo = DevNo { major: 253, minor: 7 };
    const LEG: DevNo = DevNo { major: 43, minor: 32 };

    fn line(start: u64, sectors: u64, kind: &str) -> Target {
        Target { start, sectors, kind: kind.to_owned(), params: "253:0 0".to_owned() }
    }

    #[test]
    fn our_table_is_known_again() {
        let ours = mirror(98304, INNER, LEG);
        assert_eq!(ours.params, "core 2 1024 nosync 2 253:7 0 43:32 0 2 handle_errors keep_log");
        let found = Found::Mirrored { inner: INNER, leg: LEG, sectors: 98304 };
        assert_eq!(judge(std::slice::from_ref(&ours), Some(INNER)), Ok(found));
        assert_eq!(judge(&[ours], None), Err(TableRefusal::ForeignMirror));
        let three =
            Target { params: "disk 2 253:9 1024 3 253:7 0 43:32 0 253:8 0".to_owned(), ..mirror(98304, INNER, LEG) };
        assert_eq!(judge(&[three], Some(INNER)), Err(TableRefusal::ForeignMirror));
    }

    #[test]
    fn only_what_keeps_nothing_of_its_own_is_taken() {
        assert_eq!(judge(&[line(0, 8, "linear"), line(8, 8, "striped")], None), Ok(Found::Plain { sectors: 16 }));
        assert_eq!(judge(&[line(0, 8, "crypt")], Some(INNER)), Ok(Found::Plain { sectors: 8 }));
        assert_eq!(judge(&[line(0, 8, "thin")], None), Err(TableRefusal::Stateful { kind: "thin".to_owned() }));
        assert_eq!(judge(&[line(0, 8, "linear"), line(16, 8, "linear")], None), Err(TableRefusal::Hole { at: 8 }));
        assert_eq!(judge(&[], None), Err(TableRefusal::Empty));
    }

    #[test]
    fn the_kernels_letters_are_read() {
        assert_eq!(health("2 253:1 43:0 192/192 1 AA 1 core"), Some((Health::Alive, Health::Alive)));
        assert_eq!(health("2 253:1 43:0 192/192 1 DA 1 core"), Some((Health::WriteFailed, Health::Alive)));
        assert_eq!(health("2 253:1 43:0 192/192 1 AR 3 disk 253:3 A"), Some((Health::Alive, Health::ReadFailed)));
        for bad in ["", "2", "x 253:1", "2 253:1 43:0 192/192 1 A", "999999999 1"] {
            assert_eq!(health(bad), None, "{bad:?}");
        }
    }
}
