//! Doing something as somebody who is not root, when we are root.

use anyhow::{Context, Result};
use hw_tests::tools;
use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
};

/// `nobody` of every Linux.
const NOBODY: u32 = 65534;

/// A command that steps down and then runs what is added to it.
pub fn step_down() -> Result<Command> {
    let mut command = Command::new(tools::need("setpriv")?);
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]).args(["--clear-groups", "--no-new-privs"]);
    Ok(command)
}

/// A folder of `nobody` in the system's temporary place: the tree may lie where `nobody` cannot look. Removed when dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn make() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("holdfast-nobody-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let this = Self(path);
        this.own(&this.0)?;
        Ok(this)
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// Hands a file in the folder over.
    pub fn own(&self, path: &Path) -> Result<()> {
        if tools::is_root() {
            chown(path, Some(NOBODY), Some(NOBODY)).with_context(|| format!("hand over {}", path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("{} stays: {e}", self.0.display());
        }
    }
}
