//! Who changed what: a file that is only appended to, each line bound to the one before by its hash.
//!
//! ```text
//! audit.log      {"n":7,"time_us":…,"who":…,"role":…,"via":…,"from":…,"what":…,"asked":…,"status":200,"result":…,"prev":"…","hash":"…"}
//! audit-1.log    older: renamed when it had grown to FILE_MAX; FILES_MAX of them are kept
//! ```
//! `hash` is SHA-256 over `prev` and the line without `hash`. A line that was changed, taken out or put in breaks the chain from there on,
//! and the page says where. Whoever can write the file can also write all of it anew; the chain shows clumsier hands, and a copy of the
//! last hash elsewhere shows those too.
//!
//! **Power loss**: a line is flushed before its change is answered. One that was torn is cut at the next start, and that is said in a line.

use crate::{access::Caller, secret};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

const FILE_MAX: u64 = 16 << 20;
const FILES_MAX: u32 = 8;
/// Of what was asked.
const TEXT_MAX: usize = 512;
/// Of one line; what is longer was not written by us.
const LINE_MAX: usize = 16 << 10;
/// Entries of one answer.
pub const PAGE_MAX: usize = 500;

/// One change, or an attempt at one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    pub n: u64,
    pub time_us: u64,
    pub who: String,
    pub role: String,
    pub via: String,
    pub from: String,
    pub what: String,
    /// What came with it; empty where that would hold a secret.
    pub asked: String,
    /// HTTP's, as the box answered.
    pub status: u16,
    /// What a refusal said.
    pub result: String,
    pub prev: String,
    #[serde(default)]
    pub hash: String,
}

/// What is recorded of a request.
#[derive(Clone, Debug)]
pub struct Deed<'a> {
    pub caller: &'a Caller,
    pub what: String,
    pub asked: &'a str,
    pub status: u16,
    pub result: &'a str,
    pub time_us: u64,
}

/// The newest entries, and whether the chain holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// In this file.
    pub total: u64,
    /// The number of the first entry that does not follow from the one before.
    pub broken_at: Option<u64>,
}

pub struct Audit {
    path: PathBuf,
    tail: Mutex<Tail>,
}

struct Tail {
    file: File,
    bytes: u64,
    n: u64,
    hash: String,
}

impl Audit {
    /// Blocking.
    pub fn open(path: &Path, now_us: u64) -> io::Result<Self> {
        let mut file = append_to(path)?;
        let bytes = file.metadata()?.len();
        let (last, whole) = scan(path, |_| {})?;
        // A kill between turning over and the first line leaves an empty file; the chain goes on from the older one.
        let last = match last {
            None if older(path, 1).exists() => scan(&older(path, 1), |_| {})?.0,
            last => last,
        };
        let (n, hash) = last.map_or((0, String::new()), |e| (e.n, e.hash));
        let torn = bytes - whole;
        if torn > 0 {
            file.set_len(whole)?;
            file.seek(SeekFrom::End(0))?;
        }
        let audit = Self { path: path.to_owned(), tail: Mutex::new(Tail { file, bytes: whole, n, hash }) };
        if torn > 0 {
            let caller = Caller { name: "holdfastd".into(), ..Caller::console() };
            let result = &format!("the last line was torn by a power loss; {torn} bytes were cut");
            audit.record(&Deed {
                caller: &caller,
                what: "open".into(),
                asked: "",
                status: 500,
                result,
                time_us: now_us,
            })?;
        }
        Ok(audit)
    }

    /// Durable when it returns. Blocking.
    pub fn record(&self, deed: &Deed<'_>) -> io::Result<()> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.bytes >= FILE_MAX {
            self.turn_over()?;
            tail.file = append_to(&self.path)?;
            tail.bytes = 0;
        }
        let mut entry = Entry {
            n: tail.n + 1,
            time_us: deed.time_us,
            who: clean(&deed.caller.name),
            role: deed.caller.role.name().into(),
            via: format!("{:?}", deed.caller.via).to_lowercase(),
            from: clean(&deed.caller.from),
            what: clean(&deed.what),
            asked: clean(deed.asked),
            status: deed.status,
            result: clean(deed.result),
            prev: tail.hash.clone(),
            hash: String::new(),
        };
        entry.hash = hash_of(&entry)?;
        let mut line = serde_json::to_vec(&entry).map_err(io::Error::other)?;
        line.push(b'\n');
        let done = tail.file.write_all(&line).and_then(|()| tail.file.sync_data());
        if let Err(e) = done {
            // Half a line would swallow the next one.
            let _ = tail.file.set_len(tail.bytes);
            return Err(e);
        }
        tail.bytes += line.len() as u64;
        tail.n = entry.n;
        tail.hash = entry.hash;
        Ok(())
    }

    fn turn_over(&self) -> io::Result<()> {
        for i in (1..FILES_MAX).rev() {
            if older(&self.path, i).exists() {
                std::fs::rename(older(&self.path, i), older(&self.path, i + 1))?;
            }
        }
        std::fs::rename(&self.path, older(&self.path, 1))
    }

    /// The newest `limit` entries before `before`, newest first, and the chain of the whole file looked at. Blocking.
    pub fn page(&self, before: Option<u64>, limit: usize) -> io::Result<Page> {
        let limit = limit.clamp(1, PAGE_MAX);
        let mut kept = std::collections::VecDeque::with_capacity(limit);
        let (mut total, mut broken_at, mut prev) = (0, None, None::<Entry>);
        // Not under the lock: a line that is being written is not whole yet and not shown.
        scan(&self.path, |entry| {
            total += 1;
            let follows = prev.as_ref().is_none_or(|p| entry.prev == p.hash && entry.n == p.n + 1);
            let whole = hash_of(entry).is_ok_and(|hash| hash == entry.hash);
            if broken_at.is_none() && !(follows && whole) {
                broken_at = Some(entry.n);
            }
            prev = Some(entry.clone());
            if before.is_none_or(|before| entry.n < before) {
                if kept.len() == limit {
                    kept.pop_front();
                }
                kept.push_back(entry.clone());
            }
        })?;
        Ok(Page { entries: kept.into_iter().rev().collect(), total, broken_at })
    }
}

fn older(path: &Path, i: u32) -> PathBuf {
    path.with_file_name(format!("audit-{i}.log"))
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn hash_of(entry: &Entry) -> io::Result<String> {
    let bare = Entry { hash: String::new(), ..entry.clone() };
    let text = serde_json::to_string(&bare).map_err(io::Error::other)?;
    Ok(secret::hash(&format!("{}\n{text}", entry.prev)))
}

/// Each whole line, the last entry, and the length of all whole lines. A line that is no entry is handed on as a broken one.
fn scan(path: &Path, mut each: impl FnMut(&Entry)) -> io::Result<(Option<Entry>, u64)> {
    let mut reader = BufReader::new(File::open(path)?);
    let (mut last, mut whole, mut line) = (None::<Entry>, 0, Vec::new());
    loop {
        line.clear();
        let read = io::Read::take(&mut reader, LINE_MAX as u64).read_until(b'\n', &mut line)?;
        if read == 0 || (line.last() != Some(&b'\n') && read < LINE_MAX) {
            return Ok((last, whole));
        }
        whole += read as u64;
        let n = last.as_ref().map_or(0, |e| e.n) + 1;
        let entry = serde_json::from_slice(&line).unwrap_or_else(|_| unreadable(n));
        each(&entry);
        last = Some(entry);
    }
}

fn unreadable(n: u64) -> Entry {
    let text = || "?".to_owned();
    Entry {
        n,
        time_us: 0,
        who: text(),
        role: text(),
        via: text(),
        from: text(),
        what: "a line that cannot be read".into(),
        asked: String::new(),
        status: 0,
        result: String::new(),
        prev: String::new(),
        hash: String::new(),
    }
}

fn clean(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deed<'a>(caller: &'a Caller, what: &str) -> Deed<'a> {
        Deed { caller, what: what.into(), asked: "{\"a\":\n1}", status: 200, result: "", time_us: 7 }
    }

    #[test]
    fn a_chain_that_was_tampered_with_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let caller = Caller::console();
        let audit = Audit::open(&path, 0).unwrap();
        for i in 0..20 {
            audit.record(&deed(&caller, &format!("POST groups/{i}\u{7}"))).unwrap();
        }
        drop(audit);
        let audit = Audit::open(&path, 0).unwrap();
        audit.record(&deed(&caller, "after a restart")).unwrap();
        let page = audit.page(None, 5).unwrap();
        assert_eq!((page.total, page.broken_at, page.entries.len()), (21, None, 5));
        assert_eq!((page.entries[0].n, page.entries[0].what.as_str()), (21, "after a restart"));
        assert_eq!(audit.page(Some(3), 5).unwrap().entries.iter().map(|e| e.n).collect::<Vec<_>>(), [2, 1]);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let broken = |lines: &[&str]| {
            std::fs::write(&path, format!("{}\n", lines.join("\n"))).unwrap();
            audit.page(None, 1).unwrap().broken_at
        };
        let changed = lines[9].replace("\"status\":200", "\"status\":403");
        let mut with_change = lines.clone();
        with_change[9] = &changed;
        assert_eq!(broken(&with_change), Some(10), "a changed line");
        let without: Vec<&str> = lines.iter().enumerate().filter(|(i, _)| *i != 9).map(|(_, l)| *l).collect();
        assert_eq!(broken(&without), Some(11), "a line taken out");
        let mut junk = lines.clone();
        junk[3] = "junk";
        assert_eq!(broken(&junk), Some(4));
        assert_eq!(broken(&lines), None);
    }

    #[test]
    fn a_torn_line_is_cut_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let caller = Caller::console();
        Audit::open(&path, 0).unwrap().record(&deed(&caller, "one")).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..whole.len() {
            let mut torn = whole.clone();
            torn.extend_from_slice(&whole[..cut]);
            std::fs::write(&path, &torn).unwrap();
            let page = Audit::open(&path, 9).unwrap().page(None, 9).unwrap();
            assert_eq!((page.total, page.broken_at), (2, None), "cut at {cut}");
            assert!(page.entries[0].result.contains("torn"), "{page:?}");
        }
    }

    #[test]
    fn a_full_file_is_turned_over_and_the_chain_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let caller = Caller::console();
        let audit = Audit::open(&path, 0).unwrap();
        audit.record(&deed(&caller, "one")).unwrap();
        audit.tail.lock().unwrap().bytes = FILE_MAX;
        audit.record(&deed(&caller, "two")).unwrap();
        let page = audit.page(None, 9).unwrap();
        assert_eq!((page.total, page.broken_at, page.entries[0].n), (1, None, 2));
        assert!(dir.path().join("audit-1.log").exists());
        drop(audit);
        assert_eq!(Audit::open(&path, 0).unwrap().tail.lock().unwrap().n, 2);
    }
}
