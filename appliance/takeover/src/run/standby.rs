//! A host that goes on at its standby: another host, whose disks were brought to the chosen moment and whose agent starts what the plan says.
//!
//! ```text
//! follows … ─▶ finished at the moment ─▶ disks let go ─▶ ownership, by lease ─▶ its agent: mounts, services, addresses ─▶ serves
//!                                                                                                                     │ failback
//!              branch ◀── what its disks hold that the branch does not ◀── ownership taken back, it has stopped ◀─────┘
//! ```
//!
//! Its ownership is a lease like the host's own: it serves only while it hears the box, so whoever takes it back knows when it has stopped.
//! What it writes is on its own disks until a failback fetches it; only what differs crosses the network.

use super::{Driver, Hands, HandsError, LeaseWait, Shipping, Stop, Wanted, failed};
use crate::plan::Place;
use std::{
    thread,
    time::{Duration, Instant},
};

const LOOK_EVERY: Duration = Duration::from_millis(100);

impl<H: Hands> Driver<'_, H> {
    pub(super) fn at_standby(&self) -> bool {
        matches!(self.state.place(), Place::Standby(_))
    }

    fn go_on_or_stop(&self) -> Result<(), Stop> {
        thread::sleep(LOOK_EVERY);
        if self.hands.wanted() == Wanted::GoOn { Ok(()) } else { Err(Stop::Wanted) }
    }

    /// The standby's disks are brought to the moment that was chosen, and compared whole.
    pub(super) fn finish_standby(&mut self) -> Result<String, Stop> {
        let restore = match &self.state.follows {
            Some(restore) => restore.clone(),
            None => {
                let (restore, disks) = self.hands.standby_follows(&self.state)?;
                self.state.follows = Some(restore.clone());
                self.state.standby_disks = disks;
                self.hands.keep(&self.state)?;
                restore
            }
        };
        self.hands.standby_finish(&restore, &self.state.points)?;
        self.ship_to_end(&restore)
    }

    fn ship_to_end(&mut self, restore: &str) -> Result<String, Stop> {
        loop {
            match self.hands.shipping(restore)? {
                Shipping::Done { shipped_bytes, same_bytes } => {
                    self.state.now = None;
                    let (sent, same) = (shipped_bytes >> 20, same_bytes >> 20);
                    return Ok(format!("{sent} MiB were sent, {same} MiB were the same already; all compared"));
                }
                Shipping::Failed { text, remedy } => return Err(failed(text, remedy)),
                Shipping::Waiting { why } => self.say_now(&why)?,
                Shipping::Copying | Shipping::Following { .. } | Shipping::Finishing => {}
            }
            self.go_on_or_stop()?;
        }
    }

    fn release_disks(&mut self, restore: &str) -> Result<(), Stop> {
        while !self.hands.let_disks_go(restore)? {
            self.go_on_or_stop()?;
        }
        Ok(())
    }

    pub(super) fn give_to_standby(&mut self) -> Result<String, Stop> {
        if let Some(restore) = self.state.follows.clone() {
            self.release_disks(&restore)?;
        }
        // After a kill it may be the standby's already.
        if self.hands.standby_serves(&self.state.plan)?.is_none() {
            self.may_serve()?;
            self.hands.give_to_standby(&self.state.plan)?;
        }
        self.state.started = true;
        Ok("its disks are its own, and so is the host's ownership, by lease".into())
    }

    pub(super) fn wait_for_standby(&mut self) -> Result<String, Stop> {
        let limit = Duration::from_secs(self.state.plan.machine.boot_seconds_max);
        let deadline = Instant::now() + limit;
        loop {
            match self.hands.standby_serves(&self.state.plan)? {
                Some(true) => break,
                Some(false) => {}
                None => {
                    let remedy = "end this run; who owns the host is in `holdfast plan status`";
                    return Err(failed("the standby does not own the host any more", remedy));
                }
            }
            if Instant::now() >= deadline {
                let text =
                    format!("the standby has not said within {} s that all of the plan is started", limit.as_secs());
                let remedy = "look at its agent's log: what did not start, or an address that answers elsewhere; it tries again by itself, \
                              and `holdfast run again` waits once more";
                return Err(failed(text, remedy));
            }
            self.go_on_or_stop()?;
        }
        // Its agent says so when the last address is up.
        let elapsed_ms = self.elapsed_ms();
        self.state.measured.address_ms.get_or_insert(elapsed_ms);
        self.serves_now();
        Ok("its mounts, services and addresses are up".into())
    }

    /// It serves by lease: one that has gone silent has stopped.
    pub(super) fn look_at_standby(&mut self) -> Result<(), HandsError> {
        let text = match self.hands.standby_serves(&self.state.plan)? {
            Some(true) => None,
            Some(false) => Some("the standby does not serve at the moment: look at its agent's log"),
            None => Some("the standby does not own the host any more: look at `holdfast plan status`"),
        };
        if self.state.now.as_deref() == text {
            return Ok(());
        }
        self.state.now = text.map(str::to_owned);
        self.hands.keep(&self.state)
    }

    /// Waits until the standby has stopped, by its own word or its lease's end; none: the daemon ends first.
    pub(super) fn take_from_standby(&mut self) -> Result<Option<String>, HandsError> {
        let plan = self.state.plan.clone();
        loop {
            match self.hands.take(&plan)? {
                LeaseWait::Done { how, .. } => return Ok(Some(how)),
                LeaseWait::Waits { .. } => {
                    self.say_now("waits until the standby says that it has stopped, or its lease has run out")?
                }
            }
            if self.hands.wanted() == Wanted::Pause {
                return Ok(None);
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// At the end of a run: nothing of it serves there any more, and nothing holds its disks. False: the daemon ends first.
    pub(super) fn leave_standby(&mut self) -> Result<bool, HandsError> {
        for restore in self.state.follows.iter().chain(&self.state.collects) {
            self.hands.cancel_shipping(restore)?;
        }
        // Whose the host is by then, after a failback say, is nothing to take.
        if self.hands.standby_serves(&self.state.plan)?.is_none() {
            return Ok(true);
        }
        Ok(self.take_from_standby()?.is_some())
    }

    /// The standby stops, and what it wrote comes into the branches.
    pub(super) fn fetch_from_standby(&mut self) -> Result<String, Stop> {
        let Some(how) = self.take_from_standby()? else { return Err(Stop::Wanted) };
        let restore = match &self.state.collects {
            Some(restore) => restore.clone(),
            None => {
                let restore = self.hands.fresh_restore()?;
                self.state.collects = Some(restore.clone());
                self.hands.keep(&self.state)?;
                restore
            }
        };
        self.hands.collect(&self.state, &restore)?;
        loop {
            match self.hands.shipping(&restore)? {
                Shipping::Done { .. } => break,
                Shipping::Failed { text, remedy } => return Err(failed(text, remedy)),
                Shipping::Waiting { why } => self.say_now(&why)?,
                _ => {}
            }
            if self.hands.is_asked() {
                return Err(Stop::Wanted);
            }
            self.go_on_or_stop()?;
        }
        self.state.now = None;
        self.release_disks(&restore)?;
        Ok(format!("{how}; what its disks held that the box did not is fetched"))
    }
}
