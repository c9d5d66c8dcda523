//! A disk changed without root: an ext4 image, changed in rounds by `debugfs -w`, whose changed blocks are written to an
//! NBD export the way a client with a write-back cache would: blocks, then a flush.
//!
//! The image file is the oracle: after a round and its flush, the export must read as the file.

use crate::{
    Draw,
    disk::text,
    nbd::Client,
    process::{self, call},
    tools,
};
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const TOOL_MAX: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// The image, and what of it the export already has.
#[derive(Debug)]
pub struct ImageDisk {
    image: PathBuf,
    scratch: PathBuf,
    sent: Vec<u8>,
    /// Offsets written since the last flush returned: a server that dies may have lost them.
    unflushed: BTreeSet<usize>,
    draw: Draw,
    files: Vec<String>,
    rounds: u64,
}

impl ImageDisk {
    /// Makes the file system in `dir`; nothing of it is sent before the first [`send`](Self::send).
    pub fn create(dir: &Path, bytes: u64, seed: u64) -> Result<Self> {
        let image = dir.join("disk.img");
        File::create(&image).with_context(|| format!("create {}", image.display()))?.set_len(bytes)?;
        call("mke2fs", &["-q", "-t", "ext4", "-F", &text(&image)], TOOL_MAX)?;
        let sent = vec![0; bytes as usize];
        Ok(Self {
            image,
            scratch: dir.join("scratch"),
            sent,
            unflushed: BTreeSet::new(),
            draw: Draw::new(seed),
            files: Vec::new(),
            rounds: 0,
        })
    }
    pub fn path(&self) -> &Path {
        &self.image
    }
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Writes some files, removes some.
    pub fn change(&mut self) -> Result<()> {
        fs::create_dir_all(&self.scratch)?;
        let mut script = String::new();
        for i in 0..3 {
            let name = format!("file-{}-{i}", self.rounds);
            let mut bytes = vec![0; self.draw.below(200_000) as usize + 1];
            self.draw.fill(&mut bytes);
            let source = self.scratch.join(&name);
            fs::write(&source, &bytes)?;
            script += &format!("write {} {name}\n", source.display());
            self.files.push(name);
        }
        while self.files.len() > 20 {
            let gone = self.files.remove(self.draw.below(self.files.len() as u64) as usize);
            script += &format!("rm {gone}\n");
        }
        let commands = self.scratch.join("commands");
        fs::write(&commands, script)?;
        let mut debugfs = Command::new(tools::need("debugfs")?);
        debugfs.args(["-w", "-f"]).arg(&commands).arg(&self.image).current_dir(&self.scratch);
        process::run(debugfs, TOOL_MAX)?.ok()?;
        fs::remove_dir_all(&self.scratch)?;
        self.rounds += 1;
        Ok(())
    }

    /// Sends every block that differs from what the export has or may have lost, then a flush. Returns the bytes sent.
    pub fn send(&mut self, client: &mut Client) -> Result<u64> {
        ensure!(
            client.size() == self.sent.len() as u64,
            "the export has {} bytes, the image {}",
            client.size(),
            self.sent.len()
        );
        let file = File::open(&self.image)?;
        let (mut block, mut bytes) = ([0; BLOCK], 0);
        for offset in (0..self.sent.len()).step_by(BLOCK) {
            file.read_exact_at(&mut block, offset as u64)?;
            let had = &mut self.sent[offset..offset + BLOCK];
            if had == block && !self.unflushed.contains(&offset) {
                continue;
            }
            self.unflushed.insert(offset);
            // Every way a client has of writing: plain, FUA, zeroes.
            if block.iter().all(|b| *b == 0) {
                client.write_zeroes(offset as u64, BLOCK as u32)?;
            } else if self.draw.below(8) == 0 {
                client.write_fua(offset as u64, &block)?;
            } else {
                client.write(offset as u64, &block)?;
            }
            had.copy_from_slice(&block);
            bytes += BLOCK as u64;
        }
        client.flush()?;
        self.unflushed.clear();
        Ok(bytes)
    }
}
