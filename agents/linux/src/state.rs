//! What the agent keeps on disk, and what it keeps only until the next boot.
//!
//! `state_dir` (survives reboots; mode 0700):
//!
//! | file | content |
//! |---|---|
//! | `identity.json`, `host.pem`, `ca.pem` | who this host is, 0600; `host.pem` holds certificate and key, so that a renewal replaces both at once |
//! | `groups.a` `groups.b` | what is protected (twin record of JSON) |
//! | `source-<group>.a` `.b` | the source machine's state, now and then; for the time after a reboot |
//! | `spool-<group>.bin` | spool file; its content is of no use to the next agent |
//! | `carry.bin` | what is known of the disks, carried over a clean reboot ([`crate::carry`]) |
//! | `agent.sock`, `lock` | control socket, and that only one agent runs |
//!
//! `run_dir` (tmpfs: survives the agent, not the host): `source-<group>.run`, the source machine's state as of its last `Persist`. Writing
//! it costs no disk write of the host and so nothing that would be captured again. Replaced by rename: a killed agent leaves the old or the
//! new one. After a reboot it is gone. Unless the hooks have carried it over ([`crate::carry`]), everything is compared then, because nobody saw
//! the writes at boot.

use crate::disks::Identity;
use durable::{Disk, OsDisk, Twin};
use model::{GroupId, GroupSpec, HostId, VolumeId};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not use the state directory")]
    Disk(#[source] durable::DiskError),
    #[error("could not {what}")]
    Twin {
        what: &'static str,
        #[source]
        source: durable::TwinError,
    },
    #[error("{} cannot be understood; enrol this host again with `holdfast-agent enrol`", path.display())]
    Identity {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the list of protected groups in {} cannot be understood", path.display())]
    Groups {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("this host is not enrolled: run `holdfast-agent enrol --box HOST:PORT --token TOKEN` first")]
    NotEnrolled,
    #[error("another holdfast-agent uses {}; stop it first (systemctl stop holdfast-agent)", path.display())]
    Running {
        path: PathBuf,
        #[source]
        source: durable::LockError,
    },
}

/// Who this host is to its box.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostIdentity {
    pub host: HostId,
    /// HOST:PORT as it was given.
    pub box_address: String,
    pub enrolled_us: u64,
}

/// A volume of a protected group, and the disk behind it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    pub id: VolumeId,
    /// The kernel's name when it was protected, e.g. `sda1`; it may have another after a reboot.
    pub device: String,
    pub sectors: u64,
    pub identity: Identity,
    /// `queue/max_sectors_kb` of its disk before it was lowered for capture, and the disk.
    pub max_sectors_kb: Option<(String, u32)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRecord {
    pub spec: GroupSpec,
    pub volumes: Vec<VolumeRecord>,
    /// The extents of the spool file that the kernel was told to leave out: disk, start and length in sectors.
    #[serde(default)]
    pub skips: Vec<(String, u64, u64)>,
    /// Captured by a mirror's leg that makes the host wait (`dm-mirror-nbd`), not by `bpf-rq`.
    #[serde(default)]
    pub sync: bool,
    #[serde(default)]
    pub unknown: UnknownWrites,
}

/// Commands that went to a group's disks past the block layer since it was copied whole. Outlives reboots: until a resync nobody knows what
/// they wrote.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnknownWrites {
    /// The boot that `base` counts in.
    pub boot_id: String,
    /// The kernel half's count when the group was last copied whole.
    pub base: u64,
    /// Some were seen.
    pub seen: bool,
}

impl UnknownWrites {
    /// How many are known of, when the kernel half counts `count` in this boot; whether anything has to be stored.
    pub fn look(&mut self, boot_id: &str, count: u64) -> (u64, bool) {
        let mut changed = false;
        if self.boot_id != boot_id || count < self.base {
            // The kernel half is a new one and began at zero.
            changed = !self.boot_id.is_empty();
            *self = Self { boot_id: boot_id.to_owned(), base: 0, seen: self.seen };
        }
        let commands = (count - self.base).max(u64::from(self.seen));
        if commands > 0 && !self.seen {
            self.seen = true;
            changed = true;
        }
        (commands, changed)
    }

    /// All of the group is copied from here on.
    pub fn settled(&mut self, boot_id: &str, count: u64) {
        *self = Self { boot_id: boot_id.to_owned(), base: count, seen: false };
    }
}

/// PEM texts; each may hold more than what it is named for.
pub struct HostPem {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

const HOST_PEM: &str = "host.pem";
const KEY_BEGIN: &[u8] = b"PRIVATE KEY-----";

pub struct StateDir {
    root: PathBuf,
    run: PathBuf,
    disk: OsDisk,
    /// Behind a lock: whoever writes may be another thread than whoever decides (`engine/scribe.rs`).
    groups: Mutex<Option<Twin>>,
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { what, path, source }
}

/// Writes a file that only root may read, and replaces an old one at once.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let temporary = path.with_extension("new");
    // One left behind by a crash may have other permissions.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &temporary)(e)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error("create", &temporary))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("put in place", path))?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent).and_then(|d| d.sync_all()).map_err(io_error("flush", parent))
}

fn private_dir(path: &Path) -> Result<(), StateError> {
    fs::create_dir_all(path).map_err(io_error("make the directory", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(io_error("set the mode of", path))
}

impl StateDir {
    pub fn open(root: &Path, run: &Path) -> Result<Self, StateError> {
        private_dir(root)?;
        private_dir(run)?;
        let disk = OsDisk::new(root).map_err(StateError::Disk)?;
        Ok(Self { root: root.to_owned(), run: run.to_owned(), disk, groups: Mutex::default() })
    }

    /// For the hooks of shutdown and boot: nothing is made or changed, both may be read-only.
    pub fn open_read_only(root: &Path, run: &Path) -> Result<Self, StateError> {
        let disk = OsDisk::new(root).map_err(StateError::Disk)?;
        Ok(Self { root: root.to_owned(), run: run.to_owned(), disk, groups: Mutex::default() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Holds the directory for one agent. What one before it left half made is removed: a twin record must not be acted on while a rename
    /// before it may still be undone (see [`durable::Twin`]).
    pub fn lock(&self) -> Result<durable::DirLock, StateError> {
        let lock = self
            .disk
            .lock(Path::new("lock"))
            .map_err(|source| StateError::Running { path: self.root.clone(), source })?;
        self.disk.cleanup(Path::new("")).map_err(StateError::Disk)?;
        Ok(lock)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn identity(&self) -> Result<HostIdentity, StateError> {
        let path = self.path("identity.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| StateError::Identity { path, source }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(StateError::NotEnrolled),
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Stores key, certificate and identity; the identity last, because with it the host counts as enrolled. Certificate and key go into
    /// one file: a renewal that is cut off must not leave a key without its certificate, for only the operator could mend that.
    pub fn store_identity(
        &self,
        identity: &HostIdentity,
        key: &str,
        certificate: &str,
        ca: &str,
    ) -> Result<(), StateError> {
        write_secret(&self.path("ca.pem"), ca.as_bytes())?;
        write_secret(&self.path(HOST_PEM), format!("{}\n{key}", certificate.trim_end()).as_bytes())?;
        let path = self.path("identity.json");
        let text = serde_json::to_vec_pretty(identity)
            .map_err(|source| StateError::Identity { path: path.clone(), source })?;
        write_secret(&path, &text)
    }

    /// Certificate and key of this host; earlier agents kept the key in a file of its own.
    pub fn host_pem(&self) -> Result<HostPem, StateError> {
        let certificate = self.read(HOST_PEM)?;
        let with_key = certificate.windows(KEY_BEGIN.len()).any(|w| w == KEY_BEGIN);
        let key = if with_key { certificate.clone() } else { self.read("host.key")? };
        Ok(HostPem { certificate, key })
    }

    pub fn read(&self, name: &str) -> Result<Vec<u8>, StateError> {
        let path = self.path(name);
        fs::read(&path).map_err(io_error("read", &path))
    }

    pub fn load_groups(&self) -> Result<Vec<GroupRecord>, StateError> {
        let loaded = Twin::load(&self.disk, Path::new(""), "groups")
            .map_err(|source| StateError::Twin { what: "read the list of protected groups", source })?;
        let Some((twin, body)) = loaded else { return Ok(Vec::new()) };
        if let Some(fault) = twin.fault() {
            tracing::warn!(%fault, "one copy of the list of protected groups is not good; the other is used and both are written next time");
        }
        *self.twin() = Some(twin);
        serde_json::from_slice(&body).map_err(|source| StateError::Groups { path: self.path("groups"), source })
    }

    pub fn store_groups(&self, groups: &[GroupRecord]) -> Result<(), StateError> {
        let body = serde_json::to_vec(groups)
            .map_err(|source| StateError::Groups { path: self.root.join("groups"), source })?;
        let what = "store the list of protected groups";
        let mut kept = self.twin();
        match &mut *kept {
            Some(twin) => twin.store(&self.disk, &body).map_err(|source| StateError::Twin { what, source }),
            None => {
                let twin = Twin::create(&self.disk, Path::new(""), "groups", &body)
                    .map_err(|source| StateError::Twin { what, source })?;
                *kept = Some(twin);
                Ok(())
            }
        }
    }

    fn twin(&self) -> MutexGuard<'_, Option<Twin>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_path(&self, group: GroupId) -> PathBuf {
        self.run.join(format!("source-{group}.run"))
    }

    /// Keeps a source's state over the agent's death. Not flushed: it need not survive more.
    pub fn store_run(&self, group: GroupId, state: &RunState) -> Result<(), StateError> {
        let path = self.run_path(group);
        let temporary = path.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&state.encode())?;
            drop(file);
            fs::rename(&temporary, &path)
        };
        write().map_err(io_error("store", &path))
    }

    /// What the agent before left in this boot is not to be gone on with.
    pub fn forget_run(&self, group: GroupId) -> Result<(), StateError> {
        let path = self.run_path(group);
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(io_error("remove", &path)),
        }
    }

    /// The state as the agent before left it, if that was in this boot.
    pub fn load_run(&self, group: GroupId, boot_id: &str) -> Option<RunState> {
        let bytes = fs::read(self.run_path(group)).ok()?;
        RunState::decode(&bytes).filter(|s| s.boot_id == boot_id)
    }

    /// Keeps a source's state over a reboot. A map that is too large for a twin record is left out: after a reboot everything is
    /// compared anyway, and only the stream's name is of use.
    pub fn store_boot(&self, group: GroupId, state: &[u8]) -> Result<(), StateError> {
        if state.len() > durable::TWIN_BODY_MAX {
            return Ok(());
        }
        let name = format!("source-{group}");
        let what = "store the state of a group";
        let error = |source| StateError::Twin { what, source };
        match Twin::load(&self.disk, Path::new(""), &name) {
            Ok(Some((mut twin, _))) => twin.store(&self.disk, state).map_err(error),
            Ok(None) => Twin::create(&self.disk, Path::new(""), &name, state).map(drop).map_err(error),
            Err(e) => {
                tracing::warn!(group = %group, error = %crate::error_chain(&e), "the stored state of a group is damaged; it is made anew");
                self.forget_boot(&name)?;
                Twin::create(&self.disk, Path::new(""), &name, state).map(drop).map_err(error)
            }
        }
    }

    pub fn load_boot(&self, group: GroupId) -> Option<Vec<u8>> {
        match Twin::load(&self.disk, Path::new(""), &format!("source-{group}")) {
            Ok(found) => found.map(|(_, body)| body),
            Err(e) => {
                tracing::warn!(group = %group, error = %crate::error_chain(&e), "the stored state of a group is damaged: a new stream begins");
                None
            }
        }
    }

    fn forget_boot(&self, name: &str) -> Result<(), StateError> {
        for side in ["a", "b"] {
            match self.disk.remove(Path::new(&format!("{name}.{side}"))) {
                Err(e) if !e.is_not_found() => return Err(StateError::Disk(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes everything of a group but its entry in the list.
    pub fn forget_group(&self, group: GroupId) -> Result<(), StateError> {
        self.forget_boot(&format!("source-{group}"))?;
        for path in [self.run_path(group), self.spool_path(group)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &path)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    pub fn spool_path(&self, group: GroupId) -> PathBuf {
        self.path(&format!("spool-{group}.bin"))
    }

    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.disk.clone())
    }
}

/// A source's state with what tells whether it can be gone on with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunState {
    pub boot_id: String,
    pub source: Vec<u8>,
}

const RUN_MAGIC: &[u8; 8] = b"HFRUN\x01\r\n";

impl RunState {
    /// Magic, length of the boot id (one byte), boot id, the machine's bytes (which carry their own checksum).
    fn encode(&self) -> Vec<u8> {
        let boot = &self.boot_id.as_bytes()[..self.boot_id.len().min(255)];
        let mut out = RUN_MAGIC.to_vec();
        out.push(boot.len() as u8);
        out.extend_from_slice(boot);
        out.extend_from_slice(&self.source);
        out
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(RUN_MAGIC)?;
        let (len, rest) = rest.split_first()?;
        let boot_id = String::from_utf8(rest.get(..usize::from(*len))?.to_vec()).ok()?;
        Some(Self { boot_id, source: rest[usize::from(*len)..].to_vec() })
    }
}

/// Drawn by the kernel at each boot.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Random bytes from the kernel.
pub fn random_128() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is ours and as long as said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 16 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{GroupPolicy, Sectors, VolumeSpec};

    fn group() -> GroupRecord {
        let volume =
            VolumeSpec { id: VolumeId(0), name: "/dev/sdb".into(), sectors: Sectors(8), identity: "serial:1".into() };
        GroupRecord {
            spec: GroupSpec {
                id: GroupId([1; 16]),
                name: "db".into(),
                host: Some(HostId([2; 16])),
                volumes: vec![volume],
                policy: GroupPolicy::default(),
            },
            volumes: vec![VolumeRecord {
                id: VolumeId(0),
                device: "sdb".into(),
                sectors: 8,
                identity: Identity { hard: vec!["serial:1".into()], ..Identity::default() },
                max_sectors_kb: Some(("sdb".into(), 1280)),
            }],
            skips: vec![("sdb".into(), 1, 2)],
            sync: false,
            unknown: UnknownWrites::default(),
        }
    }

    #[test]
    fn unknown_writes_are_known_until_all_is_copied() {
        let mut unknown = UnknownWrites::default();
        assert_eq!(unknown.look("a", 0), (0, false));
        assert_eq!(unknown.look("a", 2), (2, true));
        assert_eq!(unknown.look("a", 3), (3, false), "told once");
        // Over a reboot the kernel's count is lost, that there were some is not.
        assert_eq!(unknown.look("b", 0), (1, true));
        assert_eq!(unknown.look("b", 5), (5, false));
        unknown.settled("b", 5);
        assert_eq!(unknown.look("b", 5), (0, false));
        assert_eq!(unknown.look("b", 6), (1, true));
        // Capture was taken out and put in again.
        assert_eq!(unknown.look("b", 0), (1, true));
    }

    #[test]
    fn groups_and_identity_read_back_and_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let (root, run) = (dir.path().join("s"), dir.path().join("r"));
        let state = StateDir::open(&root, &run).unwrap();
        assert!(state.load_groups().unwrap().is_empty());
        assert!(matches!(state.identity(), Err(StateError::NotEnrolled)));
        state.store_groups(&[group()]).unwrap();
        state.store_groups(&[group(), group()]).unwrap();
        let identity = HostIdentity { host: HostId([3; 16]), box_address: "b:1".into(), enrolled_us: 5 };
        state.store_identity(&identity, "key", "cert", "ca").unwrap();
        let again = StateDir::open(&root, &run).unwrap();
        assert_eq!(again.load_groups().unwrap(), [group(), group()]);
        assert_eq!(again.identity().unwrap(), identity);
        for name in ["host.pem", "identity.json"] {
            assert_eq!(fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        let _held = state.lock().unwrap();
        assert!(matches!(again.lock(), Err(StateError::Running { .. })));
    }

    #[test]
    fn a_key_never_parts_from_its_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
        let make = || {
            let made = rcgen::generate_simple_self_signed(vec!["h".to_owned()]).unwrap();
            (made.signing_key.serialize_pem(), made.cert.pem())
        };
        let good = |state: &StateDir| {
            let pem = state.host_pem().unwrap();
            let ca = state.read("ca.pem").unwrap();
            crate::tls::session_config(&ca, &pem.certificate, &pem.key).is_ok()
        };
        // As earlier agents stored it.
        let (key, certificate) = make();
        for (name, text) in [("host.key", &key), ("host.pem", &certificate), ("ca.pem", &certificate)] {
            write_secret(&state.path(name), text.as_bytes()).unwrap();
        }
        assert!(good(&state));
        // A renewal that ends after any of its files leaves the old pair or the new one.
        let identity = HostIdentity { host: HostId([3; 16]), box_address: "b:1".into(), enrolled_us: 5 };
        let (new_key, new_certificate) = make();
        fs::create_dir(state.path("identity.json")).unwrap(); // the last file cannot be written
        state.store_identity(&identity, &new_key, &new_certificate, &certificate).unwrap_err();
        assert!(good(&state));
        assert!(String::from_utf8(state.host_pem().unwrap().key).unwrap().contains(new_key.trim()));
        fs::remove_dir(state.path("identity.json")).unwrap();
        fs::create_dir(state.path("host.new")).unwrap(); // not even the first
        let (third_key, third) = make();
        state.store_identity(&identity, &third_key, &third, &certificate).unwrap_err();
        assert!(good(&state));
    }

    #[test]
    fn run_state_is_of_one_boot() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
        let id = GroupId([1; 16]);
        let run = RunState { boot_id: "boot-1".into(), source: vec![1, 2, 3] };
        state.store_run(id, &run).unwrap();
        assert_eq!(state.load_run(id, "boot-1"), Some(run));
        assert_eq!(state.load_run(id, "boot-2"), None);
        for cut in 0..12 {
            assert!(RunState::decode(&RunState { boot_id: "b".repeat(9), source: vec![] }.encode()[..cut]).is_none());
        }
        state.store_boot(id, b"x").unwrap();
        state.store_boot(id, b"y").unwrap();
        assert_eq!(state.load_boot(id).as_deref(), Some(&b"y"[..]));
        // Both copies damaged: a new stream, and storing works again.
        for side in ["a", "b"] {
            fs::write(dir.path().join(format!("s/source-{id}.{side}")), b"rubbish").unwrap();
        }
        assert_eq!(state.load_boot(id), None);
        state.store_boot(id, b"z").unwrap();
        assert_eq!(state.load_boot(id).as_deref(), Some(&b"z"[..]));
        state.forget_group(id).unwrap();
        assert_eq!(state.load_boot(id), None);
    }
}
