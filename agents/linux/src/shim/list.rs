//! The file that says which disks get a shim: a copy of it lies in the initramfs.
//!
//! A line for each: name, sectors of 512 bytes, and what it lies over, `partition` or `disk` with an identifier that goes with it
//! wherever it is plugged in. Never the kernel's name of it: that is another one at the next boot.

use super::ShimError;
use std::{
    fmt, fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

pub const PATH: &str = "/etc/holdfast-agent/shims";
const HEAD: &str =
    "# Made by `holdfast-agent shim`, and a copy of it lies in the initramfs: change it with that command.\n";

/// What a shim lies over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Over {
    /// By the identifier in its partition table, as in `/dev/disk/by-partuuid`.
    Partition(String),
    /// By what the disk itself brings along (`serial:…`, `wwn:…`).
    Disk(String),
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partition(id) => write!(f, "partition {id}"),
            Self::Disk(id) => write!(f, "disk {id}"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shim {
    /// Of the volume, below `/dev/mapper`.
    pub name: String,
    /// What the disk had when it was chosen, in sectors of 512 bytes.
    pub sectors: u64,
    pub over: Over,
}

/// Names are written into links and shell scripts.
pub fn good_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 64 && name.chars().all(good) && !name.starts_with(['.', '-'])
}

fn parse(line: &str) -> Option<Shim> {
    let mut words = line.splitn(4, ' ');
    let (name, sectors, kind, id) = (words.next()?, words.next()?, words.next()?, words.next()?.trim());
    let over = match kind {
        _ if id.is_empty() => return None,
        "partition" => Over::Partition(id.to_owned()),
        "disk" => Over::Disk(id.to_owned()),
        _ => return None,
    };
    good_name(name).then_some(())?;
    Some(Shim { name: name.to_owned(), sectors: sectors.parse().ok()?, over })
}

/// The file.
#[derive(Clone, Debug)]
pub struct List {
    pub path: PathBuf,
}

impl Default for List {
    fn default() -> Self {
        Self { path: PATH.into() }
    }
}

impl List {
    /// None is as good as an empty one.
    pub fn load(&self) -> Result<Vec<Shim>, ShimError> {
        let text = match fs::read_to_string(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| self.failed("read", source))?,
        };
        let meant = |(_, line): &(usize, &str)| !line.trim().is_empty() && !line.starts_with('#');
        let read = |(at, line)| {
            parse(line).ok_or_else(|| ShimError::Line { path: self.path.clone(), line: at + 1, text: line.to_owned() })
        };
        text.lines().enumerate().filter(meant).map(read).collect()
    }

    /// At once and durable; an empty list is no file.
    pub fn store(&self, shims: &[Shim]) -> Result<(), ShimError> {
        if shims.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.failed("remove", e)),
                _ => self.flush_folder(),
            };
        }
        let mut text = HEAD.to_owned();
        for shim in shims {
            text.push_str(&format!("{} {} {}\n", shim.name, shim.sectors, shim.over));
        }
        let temporary = self.path.with_extension("new");
        let write = || -> io::Result<()> {
            if let Some(folder) = self.path.parent() {
                fs::create_dir_all(folder)?;
            }
            let mut file = fs::File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)
        };
        write().map_err(|source| self.failed("write", source))?;
        self.flush_folder()
    }

    fn flush_folder(&self) -> Result<(), ShimError> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        match fs::File::open(folder).and_then(|d| d.sync_all()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.failed("flush the folder of", e)),
            _ => Ok(()),
        }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> ShimError {
        ShimError::Io { what, path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_back_and_an_empty_list_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let list = List { path: dir.path().join("etc/shims") };
        assert_eq!(list.load().unwrap(), []);
        let shims = [
            Shim { name: "holdfast-root".to_owned(), sectors: 8, over: Over::Partition("5b1d0c52-01".to_owned()) },
            Shim { name: "holdfast-a".to_owned(), sectors: 9, over: Over::Disk("wwn:t10.ATA x y".to_owned()) },
        ];
        list.store(&shims).unwrap();
        assert_eq!(list.load().unwrap(), shims);
        list.store(&[]).unwrap();
        assert!(!list.path.exists());
        list.store(&[]).unwrap();
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let list = List { path: dir.path().join("shims") };
        for bad in [
            "a",
            "a 8 partition",
            "a 8 partition ",
            "a x partition y",
            "a 8 file y",
            "../a 8 partition y",
            "-a 8 disk y",
        ] {
            fs::write(&list.path, format!("# shims\n\n{bad}\n")).unwrap();
            let said = list.load().unwrap_err().to_string();
            assert!(said.contains("line 3") && said.contains(bad), "{said}");
        }
    }
}
