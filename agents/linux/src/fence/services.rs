//! Services: systemd units, and what the host's own configuration has under a name. Every command has a limit and is killed at it, or when its
//! order was overtaken by another.

use crate::config::FenceCommands;
use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use wire::PlanService;

const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("this host's configuration has no service {name:?}: add [fence.services.{name}]")]
    NotConfigured { name: String },
    #[error("could not run {what}")]
    Run {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{what} ended with {status}")]
    Failed { what: String, status: String },
    #[error("{what} took longer than {ms} ms and was killed")]
    TooLong { what: String, ms: u128 },
    #[error("{what} was overtaken by another order")]
    Overtaken { what: String },
}

/// Which order is being carried out: a command of an earlier one is killed.
#[derive(Clone, Debug, Default)]
pub struct Orders(Arc<AtomicU64>);

impl Orders {
    pub fn begin(&self, order: u64) {
        self.0.store(order, Ordering::SeqCst);
    }
    fn is(&self, order: u64) -> bool {
        self.0.load(Ordering::SeqCst) == order
    }
}

#[derive(Clone, Debug)]
pub struct Services {
    /// `systemctl`, or what a test puts in its place.
    pub systemctl: PathBuf,
    pub configured: BTreeMap<String, FenceCommands>,
    pub orders: Orders,
}

#[derive(Clone, Copy)]
enum Wish {
    Start,
    Stop,
    Kill,
    Look,
}

impl Services {
    pub fn start(&self, order: u64, service: &PlanService, limit: Duration) -> Result<(), ServiceError> {
        self.run(order, service, Wish::Start, limit)
    }
    pub fn stop(&self, order: u64, service: &PlanService, limit: Duration) -> Result<(), ServiceError> {
        self.run(order, service, Wish::Stop, limit)
    }
    pub fn kill(&self, order: u64, service: &PlanService, limit: Duration) -> Result<(), ServiceError> {
        self.run(order, service, Wish::Kill, limit)
    }
    /// Looked at: an answer that cannot be had is not "stopped".
    pub fn is_stopped(&self, order: u64, service: &PlanService, limit: Duration) -> bool {
        matches!(self.run(order, service, Wish::Look, limit), Err(ServiceError::Failed { .. }))
    }

    fn run(&self, order: u64, service: &PlanService, wish: Wish, limit: Duration) -> Result<(), ServiceError> {
        let (program, arguments): (PathBuf, Vec<String>) = match service {
            PlanService::Unit(unit) => {
                let words: &[&str] = match wish {
                    Wish::Start => &["start"],
                    Wish::Stop => &["stop"],
                    Wish::Kill => &["kill", "--signal=KILL"],
                    Wish::Look => &["is-active", "--quiet"],
                };
                let words = words.iter().copied().chain(["--", unit]).map(str::to_owned).collect();
                (self.systemctl.clone(), words)
            }
            PlanService::Configured(name) => {
                let not_there = || ServiceError::NotConfigured { name: name.clone() };
                let commands = self.configured.get(name).ok_or_else(not_there)?;
                let words = match wish {
                    Wish::Start => &commands.start,
                    Wish::Stop => &commands.stop,
                    Wish::Kill => &commands.kill,
                    Wish::Look => &commands.check,
                };
                let (program, arguments) = words.split_first().ok_or_else(not_there)?;
                (program.into(), arguments.to_vec())
            }
        };
        let mut command = Command::new(&program);
        command.args(&arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.limited(order, command, format!("{} {}", program.display(), arguments.join(" ")), limit)
    }

    fn limited(&self, order: u64, mut command: Command, what: String, limit: Duration) -> Result<(), ServiceError> {
        let begun = Instant::now();
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(source) => return Err(ServiceError::Run { what, source }),
        };
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(ServiceError::Failed { what, status: status.to_string() }),
                Ok(None) => {}
                Err(source) => return Err(ServiceError::Run { what, source }),
            }
            let overtaken = !self.orders.is(order);
            if overtaken || begun.elapsed() >= limit {
                let _ = child.kill();
                let _ = child.wait();
                let ms = limit.as_millis();
                return Err(if overtaken {
                    ServiceError::Overtaken { what }
                } else {
                    ServiceError::TooLong { what, ms }
                });
            }
            thread::sleep(LOOK);
        }
    }
}
