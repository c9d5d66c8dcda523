//! A view against its oracle, byte by byte.

use crate::nbd::{CHUNK, Client};
use anyhow::{Context, Result, bail};
use std::{fs::File, os::unix::fs::FileExt, path::Path};

/// Where two images differ first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub offset: u64,
    /// Sectors of 512 bytes that differ in the whole image.
    pub sectors: u64,
    pub want: Vec<u8>,
    pub have: Vec<u8>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { offset, sectors, want, have } = self;
        write!(
            f,
            "first difference at byte {offset} ({sectors} sectors differ): want {}, have {}",
            hex(want),
            hex(have)
        )
    }
}

/// Reads the whole export and compares it with the file.
pub fn export_with_file(client: &mut Client, oracle: &Path) -> Result<Option<Difference>> {
    let file = File::open(oracle).with_context(|| format!("open oracle {}", oracle.display()))?;
    let size = file.metadata()?.len();
    if client.size() != size {
        bail!("the view has {} bytes, the oracle {} has {size}", client.size(), oracle.display());
    }
    images(size, |offset, buf| client.read(offset, buf), |offset, buf| Ok(file.read_exact_at(buf, offset)?))
}

/// Reads the whole export and compares it with a part of the file that begins at `from`.
pub fn export_with_part(client: &mut Client, oracle: &Path, from: u64) -> Result<Option<Difference>> {
    let file = File::open(oracle).with_context(|| format!("open oracle {}", oracle.display()))?;
    let want = |offset: u64, buf: &mut [u8]| Ok(file.read_exact_at(buf, from + offset)?);
    images(client.size(), |offset, buf| client.read(offset, buf), want)
}

/// Compares two files of one size.
pub fn file_with_file(have: &Path, want: &Path) -> Result<Option<Difference>> {
    let open = |p: &Path| File::open(p).with_context(|| format!("open {}", p.display()));
    let (have, want) = (open(have)?, open(want)?);
    let (h, w) = (have.metadata()?.len(), want.metadata()?.len());
    if h != w {
        bail!("sizes differ: {h} bytes, wanted {w}");
    }
    images(w, |offset, buf| Ok(have.read_exact_at(buf, offset)?), |offset, buf| Ok(want.read_exact_at(buf, offset)?))
}

fn images(
    size: u64,
    mut read_have: impl FnMut(u64, &mut [u8]) -> Result<()>,
    mut read_want: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Option<Difference>> {
    let (mut have, mut want) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut found: Option<Difference> = None;
    let mut start = 0;
    while start < size {
        let len = CHUNK.min((size - start) as usize);
        read_have(start, &mut have[..len])?;
        read_want(start, &mut want[..len])?;
        if have[..len] != want[..len] {
            let sectors = have[..len].chunks(512).zip(want[..len].chunks(512)).filter(|(h, w)| h != w).count() as u64;
            let at = have[..len].iter().zip(&want[..len]).position(|(h, w)| h != w).unwrap_or(0);
            let part = at..len.min(at + 16);
            let first = || Difference {
                offset: start + at as u64,
                sectors: 0,
                want: want[part.clone()].to_vec(),
                have: have[part].to_vec(),
            };
            found.get_or_insert_with(first).sectors += sectors;
        }
        start += len as u64;
    }
    Ok(found)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_and_all_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut bytes = vec![7u8; 3 * CHUNK + 512];
        std::fs::write(&a, &bytes).unwrap();
        std::fs::write(&b, &bytes).unwrap();
        assert_eq!(file_with_file(&a, &b).unwrap(), None);
        let last = bytes.len() - 1;
        (bytes[CHUNK + 5], bytes[last]) = (1, 2);
        std::fs::write(&a, &bytes).unwrap();
        let found = file_with_file(&a, &b).unwrap().unwrap();
        assert_eq!((found.offset, found.sectors), (CHUNK as u64 + 5, 2));
        assert!(found.to_string().contains("want 0707"), "{found}");
        std::fs::write(&a, b"short").unwrap();
        assert!(file_with_file(&a, &b).is_err());
    }
}
