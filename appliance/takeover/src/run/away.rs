//! A host that goes on at another hypervisor: its disks are exports of this box, and what becomes of the machine there only people say.

use super::{Asked, Driver, Hands, HandsError, Stop, Wanted};
use crate::state::PointTaken;
use std::{thread, time::Duration};

/// Between two looks at what was said.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl<H: Hands> Driver<'_, H> {
    pub(super) fn open_disks(&mut self) -> Result<String, Stop> {
        self.leave_the_drill()?;
        self.may_serve()?;
        // Open again after a failback that was undone: kept before, or the next daemon would keep them closed.
        self.state.sealed = false;
        self.state.stopped = None;
        self.state.serves = None;
        self.hands.keep(&self.state)?;
        let mut names = Vec::new();
        for point in self.state.points.clone() {
            names.extend(self.hands.branch(&point)?.into_iter().map(|disk| disk.export));
        }
        let open = if names.len() == 1 { "is" } else { "are" };
        Ok(format!("{} {open} open to another hypervisor", names.join(", ")))
    }

    /// Nothing inside can be asked: a person looks, and says so.
    pub(super) fn wait_for_word(&mut self) -> Result<String, Stop> {
        self.may_serve()?;
        // After a restart of the daemon they may not be exported yet.
        for point in self.state.points.clone() {
            self.hands.branch(&point)?;
        }
        self.say_now("start the machine at the other hypervisor, then say so with `holdfast run serves`")?;
        let by = loop {
            match self.hands.asked() {
                Some(Asked::Serves { by }) => break by,
                // What was asked before it came to this has no sense here.
                Some(_) => self.hands.answered(),
                None => {}
            }
            if self.hands.wanted() != Wanted::GoOn {
                return Err(Stop::Wanted);
            }
            thread::sleep(LOOK_EVERY);
        };
        self.state.now = None;
        self.state.serves = Some(by.clone());
        self.serves_now();
        self.hands.keep(&self.state)?;
        // Kept first: who was told that it is heard is not asked again.
        self.hands.answered();
        Ok(format!("{by} says that it serves"))
    }

    /// Waits until the machine is off: by somebody's word, and nobody has its disks open any more.
    pub(super) fn wait_until_off(&mut self) -> Result<String, Stop> {
        loop {
            match self.hands.asked() {
                Some(Asked::Stopped { by }) => {
                    self.state.stopped = Some(by);
                    self.hands.keep(&self.state)?;
                    self.hands.answered();
                }
                // Taken up by who called us.
                Some(Asked::RollBack { .. }) => return Err(Stop::Wanted),
                Some(_) => self.hands.answered(),
                None => {}
            }
            let clients = self.hands.clients(&self.state.points);
            match (&self.state.stopped, clients.is_empty()) {
                (Some(by), true) => {
                    let by = by.clone();
                    self.state.now = None;
                    self.seal()?;
                    return Ok(format!("{by} says that it is off, and nobody has its disks open: they are closed now"));
                }
                (Some(_), false) => {
                    self.say_now(&format!("it is said to be off, but has its disks open: {}", clients.join(", ")))?
                }
                (None, _) => self.say_now(
                    "shut the machine at the other hypervisor down, then say so with `holdfast run stopped`",
                )?,
            }
            if self.hands.wanted() != Wanted::GoOn {
                return Err(Stop::Wanted);
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Before the host gets its ownership back: a machine that has its disks open may serve.
    pub(super) fn close_for_good(&mut self) -> Result<(), HandsError> {
        let clients = self.hands.clients(&self.state.points);
        if !clients.is_empty() {
            let text = format!("a machine at another hypervisor has its disks open: {}", clients.join(", "));
            return Err(HandsError::new(text, "shut it down there; then this goes on by itself"));
        }
        self.seal()
    }

    /// From here on nobody can write to the disks; over restarts of the daemon too.
    pub(super) fn seal(&mut self) -> Result<(), HandsError> {
        self.state.sealed = true;
        self.hands.keep(&self.state)?;
        let points: &[PointTaken] = &self.state.points;
        self.hands.close_disks(points);
        Ok(())
    }

    pub(super) fn say_now(&mut self, text: &str) -> Result<(), HandsError> {
        if self.state.now.as_deref() == Some(text) {
            return Ok(());
        }
        self.state.now = Some(text.to_owned());
        self.hands.keep(&self.state)
    }
}
