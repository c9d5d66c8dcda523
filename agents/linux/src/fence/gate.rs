//! The early-boot gate: a host that is leased comes up with its services off and its addresses unanswered, *before* anything could start them.
//!
//! ```text
//! plan taken ─▶ /etc/holdfast-agent/gate/{units,condition.conf}        boot: systemd's generator hangs the condition at each unit
//! armed ──────▶ /var/lib/holdfast-agent/fenced (until disarmed)        boot: holdfast-gate.service, before network-pre.target:
//!                                                                        `holdfast-agent gate` drops the addresses' packets
//! granted ────▶ /run/holdfast-agent/may-serve (until stopped, or the next boot), and the packets go through again
//! ```
//!
//! The condition of a listed unit is that the host is not fenced, or was granted its lease in this boot: systemd looks at two files and no process of
//! ours has to run, let alone in time. It holds for whoever starts the unit, an administrator too. Nobody waits: the boot goes on without
//! what is held, and the agent starts it when the box grants. When the box cannot be reached nothing is granted: a host with a lease does not
//! serve without it, however long that takes; `holdfast-agent` on it says so. A host without a plan, or whose plan has no lease, has none of the
//! three files and is never held.
//!
//! **A machine that a box runs in this host's place** starts from this host's disks, with all of these files on them: generator and gate ask the
//! firmware first ([`crate::inside::taken_over`]) and hold nothing there.
//!
//! # Limits
//!
//! Configured commands (`[fence.services]`) are no units: what starts them at boot is not held, and is stopped when the agent runs. A unit with
//! triggering conditions (`|`) of its own starts when one of those is met. Without nf_tables addresses answer until the agent runs.
//!
//! # Power loss
//!
//! The mark is flushed before the record that says "fenced", and goes after it: between the two a host is held that need not be, and
//! the agent lets it go. The list of units is replaced whole, each file; units that the plan before had stay held until then.

use super::{Store, StoreError, filter};
use crate::{
    config::Config,
    state::{self, StateError},
};
use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};
use wire::{HostPlan, PlanService};

/// Of the package; read by the generator.
pub const DIR: &str = "/etc/holdfast-agent/gate";

#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("could not {what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the kernel's packet filter does not keep addresses unanswered: they may answer until the agent runs")]
    Filter(#[source] io::Error),
}

/// The files of one host.
#[derive(Clone, Debug)]
pub struct Gate {
    /// None: no generator reads it, as where no package was installed.
    pub dir: Option<PathBuf>,
    /// There as long as this host may serve by lease only.
    pub mark: PathBuf,
    /// There when it was granted, in this boot.
    pub may_serve: PathBuf,
    /// The packet filter was closed, in this boot.
    pub closed: PathBuf,
}

impl Gate {
    pub fn new(state_dir: &Path, run_dir: &Path, dir: Option<PathBuf>) -> Self {
        Self {
            dir,
            mark: state_dir.join("fenced"),
            may_serve: run_dir.join("may-serve"),
            closed: run_dir.join("gate-closed"),
        }
    }

    /// As the units of the package know it: with another state directory than theirs, nothing is listed.
    pub fn of(config: &Config) -> Self {
        let usual = config.state_dir == Config::default().state_dir;
        let dir = Some(PathBuf::from(DIR)).filter(|dir| usual && dir.parent().is_some_and(Path::is_dir));
        Self::new(&config.state_dir, &config.run_dir, dir)
    }

    /// Which units the next boot holds.
    pub fn list(&self, plan: &HostPlan) -> Result<(), GateError> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let units: String = plan
            .services
            .iter()
            .filter_map(|service| match service {
                PlanService::Unit(unit) => Some(format!("{unit}\n")),
                PlanService::Configured(_) => None,
            })
            .collect();
        if units.is_empty() {
            return self.unlist();
        }
        match fs::create_dir(dir) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(GateError::File { what: "make", path: dir.clone(), source });
            }
            _ => {}
        }
        let folder = self.mark.parent().unwrap_or(Path::new("/"));
        let condition = format!(
            "# Of the Holdfast agent: this unit is part of a takeover plan, and starts only while this host may serve.\n\
             [Unit]\nRequiresMountsFor={}\nConditionPathExists=|!{}\nConditionPathExists=|{}\n",
            folder.display(),
            self.mark.display(),
            self.may_serve.display(),
        );
        state::write_secret(&dir.join("condition.conf"), condition.as_bytes())?;
        Ok(state::write_secret(&dir.join("units"), units.as_bytes())?)
    }

    fn unlist(&self) -> Result<(), GateError> {
        let Some(dir) = &self.dir else { return Ok(()) };
        remove(&dir.join("units"))?;
        remove(&dir.join("condition.conf"))?;
        match fs::remove_dir(dir) {
            // Half a file of a crash, or somebody else's: nothing reads it.
            Err(source) if !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
                Err(GateError::File { what: "remove", path: dir.clone(), source })
            }
            _ => Ok(()),
        }
    }

    pub fn mark(&self, fenced: bool) -> Result<(), GateError> {
        match fenced {
            true if self.mark.exists() => Ok(()),
            true => Ok(state::write_secret(&self.mark, b"this host serves by lease only; of the Holdfast agent\n")?),
            false => remove(&self.mark),
        }
    }

    /// It was granted: units may start, and addresses that are put up answer.
    pub fn let_serve(&self) -> Result<(), GateError> {
        state::write_secret(&self.may_serve, b"")?;
        if self.closed.exists() {
            filter::open().map_err(GateError::Filter)?;
            remove(&self.closed)?;
        }
        Ok(())
    }
    /// It has to stop: nobody starts them again.
    pub fn hold(&self) -> Result<(), GateError> {
        remove(&self.may_serve)
    }

    /// At boot, before any network: whether anything is held. What cannot be read counts as fenced.
    pub fn close(&self, store: &Store) -> Result<bool, GateError> {
        let fenced = store.holder().map_or(true, |record| record.is_some_and(|r| r.fenced));
        if !fenced {
            return Ok(false);
        }
        self.mark(true)?;
        let plan = store.plan()?;
        let ip = |address: &wire::PlanAddress| address.address.split('/').next().and_then(|ip| ip.parse().ok());
        let addresses: Vec<IpAddr> = plan.iter().flat_map(|p| &p.addresses).filter_map(ip).collect();
        if !addresses.is_empty() {
            let run = self.closed.parent().unwrap_or(Path::new("/"));
            let made = fs::create_dir_all(run);
            made.map_err(|source| GateError::File { what: "make", path: run.to_owned(), source })?;
            // First the note: rules that nobody remembers would never go.
            state::write_secret(&self.closed, b"")?;
            filter::close(&addresses).map_err(GateError::Filter)?;
        }
        Ok(true)
    }

    /// Nothing holds this host any more.
    pub fn forget(&self) -> Result<(), GateError> {
        if self.closed.exists() {
            filter::open().map_err(GateError::Filter)?;
        }
        [&self.closed, &self.may_serve, &self.mark].into_iter().try_for_each(|path| remove(path))?;
        self.unlist()
    }
}

fn remove(path: &Path) -> Result<(), GateError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(GateError::File { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
