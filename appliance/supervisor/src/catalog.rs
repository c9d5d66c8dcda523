//! What the box knows besides its journals: hosts, tokens, groups and who was revoked.
//!
//! One JSON document in a twin record (`catalog.a`, `catalog.b`: see [`durable::Twin`]), written whole at every change. Changes
//! are rare (an enrolment, a new group) and small, so nothing cleverer is needed.
//!
//! **Invariants.** A change is made on a copy, written, and only then seen: nobody acts on what could be lost. A token is taken
//! out in the same change that puts its host in, before the host hears of it: it cannot be used twice, whenever the power goes. A
//! group is entered as [`GroupState::Creating`] before its folder is made and marked [`GroupState::Deleting`] before its folder is
//! removed, so that a start after a crash knows which of the two to finish.
//!
//! **Limits.** [`HOSTS_MAX`], [`GROUPS_MAX`], [`TOKENS_MAX`]; with names of the longest allowed kind the document stays inside the
//! twin's limit.
//!
//! The specification of a group (volumes, policy) is not here but in its journal, so that a journal can be read alone.

use crate::pki;
use durable::{CopyFault, Disk, Twin};
use journal::BranchPoint;
use model::{GroupId, HostId};
use serde::{Deserialize, Serialize};
use std::{
    path::Path,
    sync::{Arc, Mutex},
};
use subtle::ConstantTimeEq as _;

pub const HOSTS_MAX: usize = 1000;
pub const GROUPS_MAX: usize = 500;
/// Tokens that are neither used nor expired.
pub const TOKENS_MAX: usize = 100;
/// Serials kept per host: renewals of five years.
const SERIALS_MAX: usize = 24;
const NAME_MAX: usize = 128;
const VERSION: u32 = 1;
const NAME: &str = "catalog";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostEntry {
    pub id: HostId,
    /// For people; unique among hosts that are not revoked.
    pub name: String,
    pub enrolled_us: u64,
    /// Certificates made for it, newest last.
    pub serials: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_us: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupState {
    Creating,
    Ready,
    /// The host stopped protecting it; its history stays.
    Released,
    Deleting,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupEntry {
    pub id: GroupId,
    /// Unique on the box.
    pub name: String,
    /// None: filled through ingest targets.
    pub host: Option<HostId>,
    pub state: GroupState,
    pub created_us: u64,
    /// The moment of another group it goes on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<BranchPoint>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenEntry {
    /// SHA-256 of the secret; the secret itself is nowhere.
    pub hash: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_name: Option<String>,
    pub created_us: u64,
    pub expires_us: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Data {
    version: u32,
    pub hosts: Vec<HostEntry>,
    pub groups: Vec<GroupEntry>,
    pub tokens: Vec<TokenEntry>,
}

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("the catalogue cannot be read or written")]
    Twin(#[source] durable::TwinError),
    #[error("the catalogue is whole but not understood")]
    Parse(#[source] serde_json::Error),
    #[error("the catalogue has format version {found}, this program knows {VERSION}")]
    Version { found: u32 },
}

/// Why an enrolment was refused. The agent is told less: only that the token was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum EnrolRefusal {
    #[error("no such token: it was used already, or never made here")]
    UnknownToken,
    #[error("the token expired")]
    Expired,
    #[error("{HOSTS_MAX} hosts are enrolled, which is the limit")]
    TooManyHosts,
}

#[derive(Debug, thiserror::Error)]
pub enum CatalogRefusal {
    #[error("there is no host {0:?}")]
    NoHost(String),
    #[error("the host {0:?} was revoked already")]
    RevokedAlready(String),
    #[error("{TOKENS_MAX} tokens are waiting to be used, which is the limit; they expire by themselves")]
    TooManyTokens,
    #[error("there is a group {0:?} already")]
    GroupName(String),
    #[error("{GROUPS_MAX} groups exist, which is the limit")]
    TooManyGroups,
    #[error("{0:?} goes on from a moment of this group, and cannot be read without it")]
    HasBranches(String),
}

/// A failed change: refused, or not kept.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<R: std::error::Error + 'static> {
    #[error(transparent)]
    Refused(R),
    #[error("the change was not kept")]
    Catalog(#[source] CatalogError),
}

impl Data {
    pub fn host(&self, id: HostId) -> Option<&HostEntry> {
        self.hosts.iter().find(|h| h.id == id)
    }
    /// By id, or by name: the one that is not revoked goes before.
    pub fn find_host(&self, id_or_name: &str) -> Option<&HostEntry> {
        let by_id = id_or_name.parse::<HostId>().ok().and_then(|id| self.host(id));
        by_id.or_else(|| {
            let mut named: Vec<_> = self.hosts.iter().filter(|h| h.name == id_or_name).collect();
            named.sort_by_key(|h| (h.revoked_us.is_some(), h.enrolled_us));
            named.first().copied()
        })
    }
    /// Groups whose journals go on from a moment of this one's.
    pub fn branches_of(&self, id: GroupId) -> impl Iterator<Item = &GroupEntry> {
        self.groups.iter().filter(move |g| g.branch.is_some_and(|on| on.group == id))
    }
    pub fn group(&self, id: GroupId) -> Option<&GroupEntry> {
        self.groups.iter().find(|g| g.id == id)
    }

    pub fn add_token(&mut self, entry: TokenEntry, now_us: u64) -> Result<(), CatalogRefusal> {
        self.tokens.retain(|t| t.expires_us > now_us);
        if self.tokens.len() >= TOKENS_MAX {
            return Err(CatalogRefusal::TooManyTokens);
        }
        self.tokens.push(entry);
        Ok(())
    }

    /// Uses up the token and enters the host, in one step.
    pub fn enrol(
        &mut self,
        secret: &[u8; 16],
        host: HostId,
        said_name: &str,
        serial: String,
        now_us: u64,
    ) -> Result<HostEntry, EnrolRefusal> {
        let hash = pki::sha256_hex(secret);
        // Every entry is compared, in constant time: an answer's delay says nothing about how near a guess was.
        let mut found = None;
        for (i, token) in self.tokens.iter().enumerate() {
            if bool::from(token.hash.as_bytes().ct_eq(hash.as_bytes())) {
                found = Some(i);
            }
        }
        let token = found.map(|i| self.tokens[i].clone()).ok_or(EnrolRefusal::UnknownToken)?;
        if token.expires_us <= now_us {
            return Err(EnrolRefusal::Expired);
        }
        if self.hosts.len() >= HOSTS_MAX {
            return Err(EnrolRefusal::TooManyHosts);
        }
        self.tokens.retain(|t| t.hash != token.hash);
        let wanted = clean_name(token.host_name.as_deref().unwrap_or(said_name), "host");
        let taken = |name: &str| self.hosts.iter().any(|h| h.revoked_us.is_none() && h.name == name);
        let entry = HostEntry {
            id: host,
            name: free_name(&wanted, taken),
            enrolled_us: now_us,
            serials: vec![serial],
            revoked_us: None,
        };
        self.hosts.push(entry.clone());
        Ok(entry)
    }

    pub fn add_serial(&mut self, host: HostId, serial: String) -> Result<(), CatalogRefusal> {
        let entry =
            self.hosts.iter_mut().find(|h| h.id == host).ok_or_else(|| CatalogRefusal::NoHost(host.to_string()))?;
        if entry.serials.len() == SERIALS_MAX {
            entry.serials.remove(0);
        }
        entry.serials.push(serial);
        Ok(())
    }

    pub fn revoke(&mut self, id_or_name: &str, now_us: u64) -> Result<HostEntry, CatalogRefusal> {
        let found = self.find_host(id_or_name).ok_or_else(|| CatalogRefusal::NoHost(id_or_name.into()))?;
        if found.revoked_us.is_some() {
            return Err(CatalogRefusal::RevokedAlready(found.name.clone()));
        }
        let id = found.id;
        let mut revoked = found.clone();
        revoked.revoked_us = Some(now_us);
        self.hosts.iter_mut().filter(|h| h.id == id).for_each(|h| h.revoked_us = Some(now_us));
        Ok(revoked)
    }

    pub fn add_group(&mut self, entry: GroupEntry) -> Result<(), CatalogRefusal> {
        if self.groups.iter().any(|g| g.name == entry.name) {
            return Err(CatalogRefusal::GroupName(entry.name));
        }
        if self.groups.len() >= GROUPS_MAX {
            return Err(CatalogRefusal::TooManyGroups);
        }
        self.groups.push(entry);
        Ok(())
    }

    pub fn set_group_state(&mut self, id: GroupId, state: GroupState) {
        self.groups.iter_mut().filter(|g| g.id == id).for_each(|g| g.state = state);
    }
    pub fn remove_group(&mut self, id: GroupId) {
        self.groups.retain(|g| g.id != id);
    }
}

/// A name fit for listings: no control characters, no space at the ends, not too long, not empty.
pub fn clean_name(name: &str, if_empty: &str) -> String {
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
    let name = name.trim();
    if name.is_empty() { if_empty.into() } else { name.into() }
}

fn free_name(wanted: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(wanted) {
        return wanted.to_owned();
    }
    // Ends: at most HOSTS_MAX names are taken.
    (2u32..).map(|n| format!("{wanted}-{n}")).find(|name| !taken(name)).unwrap_or_else(|| wanted.to_owned())
}

struct Inner {
    twin: Option<Twin>,
    data: Arc<Data>,
}

/// The catalogue, on disk and in memory.
pub struct Catalog {
    disk: Arc<dyn Disk>,
    inner: Mutex<Inner>,
}

impl Catalog {
    /// Opens `catalog.{a,b}` at the disk's root, or begins an empty one. Blocking. Says what is wrong with one of the two
    /// copies, if anything is: the other one was used.
    pub fn open(disk: Arc<dyn Disk>) -> Result<(Self, Option<CopyFault>), CatalogError> {
        let loaded = Twin::load(&*disk, Path::new(""), NAME).map_err(CatalogError::Twin)?;
        let (twin, data, fault) = match loaded {
            None => (None, Data { version: VERSION, ..Data::default() }, None),
            Some((twin, bytes)) => {
                let data: Data = serde_json::from_slice(&bytes).map_err(CatalogError::Parse)?;
                if data.version != VERSION {
                    return Err(CatalogError::Version { found: data.version });
                }
                let fault = twin.fault().cloned();
                (Some(twin), data, fault)
            }
        };
        Ok((Self { disk, inner: Mutex::new(Inner { twin, data: Arc::new(data) }) }, fault))
    }

    /// What is known now.
    pub fn data(&self) -> Arc<Data> {
        Arc::clone(&crate::lock(&self.inner).data)
    }

    /// Changes a copy, keeps it, then shows it. **Blocking** (flushes): never on a runtime worker.
    ///
    /// After a failed write the old catalogue stays in force; whichever of the two a restart finds is a valid one.
    pub fn change<T, R: std::error::Error + 'static>(
        &self,
        change: impl FnOnce(&mut Data) -> Result<T, R>,
    ) -> Result<T, ChangeError<R>> {
        let mut inner = crate::lock(&self.inner);
        let mut next = Data::clone(&inner.data);
        let result = change(&mut next).map_err(ChangeError::Refused)?;
        let bytes = serde_json::to_vec(&next).map_err(|e| ChangeError::Catalog(CatalogError::Parse(e)))?;
        let stored = match &mut inner.twin {
            Some(twin) => twin.store(&*self.disk, &bytes),
            none => Twin::create(&*self.disk, Path::new(""), NAME, &bytes).map(|twin| *none = Some(twin)),
        };
        stored.map_err(|e| ChangeError::Catalog(CatalogError::Twin(e)))?;
        inner.data = Arc::new(next);
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use durable::OsDisk;
    use std::convert::Infallible;

    fn open(dir: &Path) -> Catalog {
        Catalog::open(Arc::new(OsDisk::new(dir).unwrap())).unwrap().0
    }
    fn token(secret: &[u8; 16], expires_us: u64) -> TokenEntry {
        TokenEntry { hash: pki::sha256_hex(secret), host_name: None, created_us: 0, expires_us }
    }
    const HOST: HostId = HostId([9; 16]);

    #[test]
    fn what_was_changed_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = open(dir.path());
        catalog.change(|d| d.add_token(token(b"0123456789abcdef", 100), 1)).unwrap();
        let entry = catalog.change(|d| d.enrol(b"0123456789abcdef", HOST, " db 1\n", "aa".into(), 50)).unwrap();
        assert_eq!(entry.name, "db 1");
        let again = open(dir.path());
        assert_eq!(again.data(), catalog.data());
        assert!(again.data().tokens.is_empty());
        // one copy destroyed: the other is used, and said so
        std::fs::write(dir.path().join("catalog.a"), b"junk").unwrap();
        let (again, fault) = Catalog::open(Arc::new(OsDisk::new(dir.path()).unwrap())).unwrap();
        assert_eq!(again.data(), catalog.data());
        assert!(fault.is_some());
        std::fs::write(dir.path().join("catalog.b"), b"junk").unwrap();
        assert!(Catalog::open(Arc::new(OsDisk::new(dir.path()).unwrap())).is_err());
    }

    #[test]
    fn a_token_is_used_once_and_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = open(dir.path());
        let secret = b"0123456789abcdef";
        let enrol = |secret: &[u8; 16], now| catalog.change(|d| d.enrol(secret, HOST, "h", "aa".into(), now));
        assert!(matches!(enrol(secret, 1), Err(ChangeError::Refused(EnrolRefusal::UnknownToken))));
        catalog.change(|d| d.add_token(token(secret, 100), 1)).unwrap();
        assert!(matches!(enrol(secret, 100), Err(ChangeError::Refused(EnrolRefusal::Expired))));
        enrol(secret, 99).unwrap();
        assert!(matches!(enrol(secret, 99), Err(ChangeError::Refused(EnrolRefusal::UnknownToken))));
        assert_eq!(catalog.data().hosts.len(), 1);
    }

    #[test]
    fn tokens_are_bounded_and_old_ones_make_room() {
        let mut data = Data::default();
        for i in 0..TOKENS_MAX as u64 {
            data.add_token(token(&(u128::from(i)).to_le_bytes(), 100), 1).unwrap();
        }
        assert!(matches!(data.add_token(token(&[1; 16], 100), 1), Err(CatalogRefusal::TooManyTokens)));
        data.add_token(token(&[1; 16], 200), 100).unwrap();
        assert_eq!(data.tokens.len(), 1);
    }

    #[test]
    fn names_stay_unique_and_a_revoked_one_is_free_again() {
        let mut data = Data::default();
        let add = |data: &mut Data, n: u8| {
            data.add_token(token(&[n; 16], 100), 1).unwrap();
            data.enrol(&[n; 16], HostId([n; 16]), "db", "aa".into(), 1).unwrap().name
        };
        assert_eq!(add(&mut data, 1), "db");
        assert_eq!(add(&mut data, 2), "db-2");
        assert_eq!(data.revoke("db", 5).unwrap().id, HostId([1; 16]));
        assert_eq!(add(&mut data, 3), "db");
        assert_eq!(data.find_host("db").unwrap().id, HostId([3; 16]));
        assert!(matches!(data.revoke(&HostId([1; 16]).to_string(), 6), Err(CatalogRefusal::RevokedAlready(_))));
        assert!(matches!(data.revoke("nobody", 6), Err(CatalogRefusal::NoHost(_))));
    }

    #[test]
    fn a_full_catalogue_fits_its_file() {
        let long = "\u{1F4BE}".repeat(NAME_MAX);
        let mut data = Data { version: VERSION, ..Data::default() };
        for i in 0..HOSTS_MAX as u128 {
            data.hosts.push(HostEntry {
                id: HostId(i.to_le_bytes()),
                name: long.clone(),
                enrolled_us: u64::MAX,
                serials: vec!["f".repeat(32); SERIALS_MAX],
                revoked_us: Some(u64::MAX),
            });
        }
        for i in 0..GROUPS_MAX as u128 {
            let id = GroupId(i.to_le_bytes());
            let name = format!("{i}{long}");
            let state = GroupState::Deleting;
            let branch = Some(BranchPoint {
                group: GroupId([255; 16]),
                timeline: model::TimelineId(u32::MAX),
                lsn: model::Lsn(u64::MAX),
            });
            data.add_group(GroupEntry { id, name, host: Some(HOST), state, created_us: u64::MAX, branch }).unwrap();
        }
        let len = serde_json::to_vec(&data).unwrap().len();
        assert!(len < durable::TWIN_BODY_MAX, "{len}");
        let refused = data.add_group(GroupEntry {
            id: GroupId([0; 16]),
            name: "x".into(),
            host: None,
            state: GroupState::Ready,
            created_us: 0,
            branch: None,
        });
        assert!(matches!(refused, Err(CatalogRefusal::TooManyGroups)));
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = open(dir.path());
        let before = catalog.data();
        let refused: Result<(), _> = catalog.change(|d| {
            d.version = 77;
            Err(CatalogRefusal::NoHost("x".into()))
        });
        assert!(matches!(refused, Err(ChangeError::Refused(_))));
        assert_eq!(catalog.data(), before);
        let cleared = catalog.change(|d| {
            d.hosts.clear();
            Ok::<_, Infallible>(())
        });
        cleared.unwrap();
    }
}
