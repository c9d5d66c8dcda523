//! Small files of the box itself: keys, certificates, tokens, the lock.
//!
//! A secret is written to a new file of mode 0600, flushed, renamed into place and its folder flushed: after `Ok` it is there
//! whole and survives power loss, before that the old one is. The journal's and the catalogue's files do not come through
//! here but through `durable`.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

#[derive(Debug, thiserror::Error)]
#[error("could not {op} {}", path.display())]
pub struct FileError {
    pub op: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

fn at<T>(op: &'static str, path: &Path, result: io::Result<T>) -> Result<T, FileError> {
    result.map_err(|source| FileError { op, path: path.to_owned(), source })
}

/// Makes a folder (and its parents) that only its owner may enter.
pub fn private_dir(dir: &Path) -> Result<(), FileError> {
    at("make the folder", dir, fs::DirBuilder::new().recursive(true).mode(0o700).create(dir))
}

/// Replaces `path` by `data`, mode 0600, durable when it returns.
pub fn write_secret(path: &Path, data: &[u8]) -> Result<(), FileError> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary); // left by a crash; its mode could be anything
    let mut file =
        at("create", &temporary, OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary))?;
    at("write", &temporary, file.write_all(data).and_then(|()| file.sync_all()))?;
    at("rename into", path, fs::rename(&temporary, path))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    at("flush the folder", dir, File::open(dir).and_then(|d| d.sync_all()))
}

/// Reads a small file; `None` when it is not there. At most 1 MiB: nothing of ours is larger, and a path set to a device by
/// mistake must not fill the memory.
pub fn read_small(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return at("open", path, Err(e)),
    };
    let mut data = Vec::new();
    at("read", path, file.take(1 << 20).read_to_end(&mut data))?;
    Ok(Some(data))
}

/// Sets a socket's or file's mode to 0600.
pub fn make_private(path: &Path) -> Result<(), FileError> {
    at("set the mode of", path, fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
}

/// Held for as long as the daemon owns the data folder.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another holdfastd is using {}; two on one folder would destroy its journals", path.display())]
    Taken { path: PathBuf },
    #[error("could not lock the data folder")]
    File(#[from] FileError),
}

/// Takes the data folder for this process. The kernel releases it however the process ends.
pub fn lock(data: &Path) -> Result<Lock, LockError> {
    let path = data.join("lock");
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = at("open", &path, options)?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(LockError::Taken { path: data.to_owned() }),
        Err(TryLockError::Error(source)) => Err(FileError { op: "lock", path, source }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.key");
        write_secret(&path, b"one").unwrap();
        fs::write(path.with_extension("new"), b"left by a crash").unwrap();
        write_secret(&path, b"two").unwrap();
        assert_eq!(read_small(&path).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read_small(&dir.path().join("none")).unwrap(), None);
    }

    #[test]
    fn a_folder_is_used_by_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(LockError::Taken { .. })));
        drop(first);
        lock(dir.path()).unwrap();
    }
}
