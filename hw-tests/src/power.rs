//! Disks that lose power: what the kernel's `dm-log-writes` recorded, and any state that a cut could have left.
//!
//! The target records every write in the order the device had them: a write that was completed but not flushed stands before the next
//! FLUSH entry, a forced-unit-access write where it completed, a **mark** where somebody asked for one. At a cut after entry `k`
//! everything up to the last FLUSH before `k` is on the disk, and so is every FUA write; each other write is there, or not, or in part.
//! [`Log::at`] draws one such disk.
//!
//! The log: a block of 512 bytes with magic, version, number of entries and sector size; then for each entry a block with sector, number
//! of sectors, flags and length of inline data (a mark's text, in the same block), then the sectors written. All little-endian u64 but
//! the sector size (u32).

use crate::Draw;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: u64 = 512;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// A log of a test is far smaller; a damaged count must not make us read for ever.
const ENTRIES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Write {
        fua: bool,
    },
    Discard,
    /// Nothing but the flush.
    Empty,
    Mark(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    what: What,
    flush: bool,
    sector: u64,
    sectors: u64,
    /// Where the data lies in the log.
    data: u64,
}

#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    entries: Vec<Entry>,
}

impl Log {
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut block = [0; SECTOR as usize];
        file.read_exact_at(&mut block, 0)?;
        let word = |block: &[u8], n: usize| u64::from_le_bytes(block[n * 8..][..8].try_into().unwrap_or_default());
        ensure!(word(&block, 0) == MAGIC, "{} is no log of dm-log-writes", path.display());
        let count = word(&block, 2);
        let sector_bytes = word(&block, 3) & u64::from(u32::MAX);
        ensure!(sector_bytes == SECTOR && count <= ENTRIES_MAX, "{count} entries, sectors of {sector_bytes} bytes");
        let (mut entries, mut at) = (Vec::new(), SECTOR);
        for _ in 0..count {
            file.read_exact_at(&mut block, at)?;
            let (sector, sectors, flags, inline) = (word(&block, 0), word(&block, 1), word(&block, 2), word(&block, 3));
            let data = at + SECTOR;
            let what = match () {
                () if flags & MARK != 0 => {
                    let text = block.get(32..32 + inline as usize).context("a mark longer than its block")?;
                    What::Mark(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
                }
                () if flags & DISCARD != 0 => What::Discard,
                () if sectors == 0 => What::Empty,
                () => What::Write { fua: flags & FUA != 0 },
            };
            at = data + if matches!(what, What::Write { .. }) { sectors * SECTOR } else { 0 };
            entries.push(Entry { what, flush: flags & FLUSH != 0, sector, sectors, data });
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Marks in their order: how many entries come before each, and its text.
    pub fn marks(&self) -> Vec<(usize, &str)> {
        self.entries.iter().enumerate().filter_map(|(at, entry)| Some((at, mark_text(entry)?))).collect()
    }

    /// How many writes a cut after `entries` entries may lose: what no flush has covered.
    pub fn at_risk(&self, entries: usize) -> usize {
        let before = self.entries.get(..entries).unwrap_or(&self.entries);
        let open = before.iter().rev().take_while(|e| !e.flush);
        open.filter(|e| matches!(e.what, What::Discard | What::Write { fua: false })).count()
    }

    /// Writes to `to`, which must be empty and as large as the device, what a cut after `entries` entries could have left. Returns how
    /// many writes it lost or tore.
    pub fn at(&self, entries: usize, draw: &mut Draw, to: &Path) -> Result<u64> {
        let log = File::open(&self.path)?;
        let disk = File::options().write(true).open(to).with_context(|| format!("open {}", to.display()))?;
        let before = self.entries.get(..entries).context("a cut behind the log's end")?;
        let safe = before.iter().rposition(|e| e.flush).map_or(0, |at| at + 1);
        let mut lost = 0;
        for (at, entry) in before.iter().enumerate() {
            let mut sectors = entry.sectors;
            let (discard, fua) = match entry.what {
                What::Mark(_) | What::Empty => continue,
                What::Discard => (true, false),
                What::Write { fua } => (false, fua),
            };
            if at >= safe && !fua && draw.below(2) == 0 {
                lost += 1;
                // Gone, or only its beginning arrived.
                sectors = if draw.below(2) == 0 { 0 } else { draw.below(entry.sectors) };
            }
            let mut bytes = vec![0; (sectors * SECTOR) as usize];
            if !discard {
                log.read_exact_at(&mut bytes, entry.data)?;
            }
            disk.write_all_at(&bytes, entry.sector * SECTOR)?;
        }
        Ok(lost)
    }

    /// The number that the last mark `PREFIX-N` before a cut carries.
    pub fn last_mark(&self, entries: usize, prefix: &str) -> Result<Option<u64>> {
        let Some((_, text)) = self.marks().into_iter().rfind(|(at, text)| *at < entries && text.starts_with(prefix))
        else {
            return Ok(None);
        };
        match text.strip_prefix(prefix).and_then(|t| t.strip_prefix('-')).map(str::parse) {
            Some(Ok(number)) => Ok(Some(number)),
            _ => bail!("mark {text:?} carries no number"),
        }
    }
}

fn mark_text(entry: &Entry) -> Option<&str> {
    match &entry.what {
        What::Mark(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A log as the kernel writes it.
    fn log(dir: &Path, entries: &[(u64, u64, u64, &[u8])]) -> PathBuf {
        let mut out = Vec::new();
        let block = |words: &[u64], tail: &[u8]| {
            let mut block: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).chain(tail.iter().copied()).collect();
            block.resize(SECTOR as usize, 0);
            block
        };
        out.extend(block(&[MAGIC, 1, entries.len() as u64, SECTOR], &[]));
        for (sector, sectors, flags, data) in entries {
            if flags & MARK != 0 {
                out.extend(block(&[*sector, 0, *flags, data.len() as u64], data));
            } else {
                out.extend(block(&[*sector, *sectors, *flags, 0], &[]));
                out.extend(*data);
            }
        }
        let path = dir.join("log");
        fs::write(&path, out).unwrap();
        path
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_forced_and_loses_some_of_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two, three) = ([1; 1024], [2; 512], [3; 512]);
        let path = log(
            dir.path(),
            &[
                (0, 2, 0, &one),
                (0, 0, FLUSH, &[]),
                (0, 0, MARK, b"durable-7\0"),
                (4, 1, FUA, &two),
                (0, 0, MARK, b"durable-9\0"),
                (6, 1, 0, &three),
                (0, 2, DISCARD, &[]),
            ],
        );
        let log = Log::read(&path).unwrap();
        assert_eq!((log.len(), log.is_empty()), (7, false));
        assert_eq!(log.marks(), [(2, "durable-7"), (4, "durable-9")]);
        let last = |entries| log.last_mark(entries, "durable").unwrap();
        assert_eq!((last(2), last(3), last(7)), (None, Some(7), Some(9)));
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..60 {
            let to = dir.path().join("disk");
            fs::File::create(&to).unwrap().set_len(4096).unwrap();
            log.at(6, &mut Draw::new(seed), &to).unwrap();
            let disk = fs::read(&to).unwrap();
            assert!(disk[..1024] == one && disk[2048..2560] == two, "seed {seed}: what was flushed is lost");
            seen.insert(disk[3072]);
            fs::File::create(&to).unwrap().set_len(4096).unwrap();
            log.at(7, &mut Draw::new(seed), &to).unwrap();
            let disk = fs::read(&to).unwrap();
            assert!([0, 1].contains(&disk[0]) && disk[2048..2560] == two, "seed {seed}");
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 3], "the last write was there, and was not");
    }

    #[test]
    fn what_is_no_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, [7; 4096]).unwrap();
        assert!(Log::read(&path).unwrap_err().to_string().contains("no log"));
    }
}
