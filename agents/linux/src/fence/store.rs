//! What the fence keeps: the plan and the record that survive a reboot, and the lease that survives the agent.

use crate::state::{self, StateError};
use model::HostId;
use replication::ownership::{HolderRecord, RunRecord};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use wire::HostPlan;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Write(#[from] StateError),
    #[error("could not read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is damaged", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("could not keep this host held at its next boot")]
    Gate(#[source] Box<super::gate::GateError>),
    #[error("could not remove {}", path.display())]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A lease is of one boot: its times mean nothing to another.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunFile {
    boot_id: String,
    run: RunRecord,
}

/// A folder for each host that this one stands by for.
const OTHERS: &str = "standby";

#[derive(Clone, Debug)]
pub struct Store {
    plan: PathBuf,
    holder: PathBuf,
    lease: PathBuf,
    boot_id: String,
    /// Of another host, which this one stands by for.
    of_other: bool,
}

impl Store {
    pub fn new(state_dir: &Path, run_dir: &Path, boot_id: &str) -> Self {
        Self {
            plan: state_dir.join("takeover-plan.json"),
            holder: state_dir.join("ownership.json"),
            lease: run_dir.join("lease.json"),
            boot_id: boot_id.to_owned(),
            of_other: false,
        }
    }
    /// For a host that this one stands by for, in folders of its own.
    pub fn of_other(state_dir: &Path, run_dir: &Path, boot_id: &str, whose: HostId) -> io::Result<Self> {
        let (state, run) = (Self::folder_of(state_dir, whose), Self::folder_of(run_dir, whose));
        [&state, &run].into_iter().try_for_each(fs::create_dir_all)?;
        Ok(Self { of_other: true, ..Self::new(&state, &run, boot_id) })
    }
    pub fn folder_of(dir: &Path, whose: HostId) -> PathBuf {
        dir.join(OTHERS).join(whose.to_string())
    }
    /// The hosts that this one stands by for, or did.
    pub fn others(state_dir: &Path) -> Vec<HostId> {
        let entries = fs::read_dir(state_dir.join(OTHERS)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }
    /// What holds where nothing is stored: a host serves, and one that stands by does not.
    pub fn fresh(&self) -> HolderRecord {
        if self.of_other { HolderRecord::STANDBY } else { HolderRecord::UNFENCED }
    }
    pub fn plan(&self) -> Result<Option<HostPlan>, StoreError> {
        read(&self.plan)
    }
    pub fn store_plan(&self, plan: &HostPlan) -> Result<(), StoreError> {
        write(&self.plan, plan)
    }
    /// None: this host was never leased.
    pub fn holder(&self) -> Result<Option<HolderRecord>, StoreError> {
        read(&self.holder)
    }
    pub fn store_holder(&self, record: HolderRecord) -> Result<(), StoreError> {
        write(&self.holder, &record)
    }
    /// The lease of this boot; what cannot be read is none, and everything is stopped then.
    pub fn lease(&self) -> Option<RunRecord> {
        let file: RunFile = read(&self.lease).ok().flatten()?;
        (file.boot_id == self.boot_id).then_some(file.run)
    }
    pub fn store_lease(&self, run: Option<RunRecord>) -> Result<(), StoreError> {
        match run {
            Some(run) => write(&self.lease, &RunFile { boot_id: self.boot_id.clone(), run }),
            None => remove(&self.lease),
        }
    }
    /// The host is its own again; answers whether there was anything.
    pub fn forget(&self) -> Result<bool, StoreError> {
        let was = self.plan.exists() || self.holder.exists();
        // The record last: a plan without it is never leased.
        [&self.lease, &self.plan, &self.holder].into_iter().try_for_each(|path| remove(path))?;
        Ok(was)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| StoreError::Damaged { path: path.to_owned(), source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Read { path: path.to_owned(), source }),
    }
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(value).map_err(|source| StoreError::Damaged { path: path.to_owned(), source })?;
    Ok(state::write_secret(path, &bytes)?)
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::Remove { path: path.to_owned(), source: e }),
        _ => Ok(()),
    }
}
