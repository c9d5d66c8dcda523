//! Writes to the state directory, by a thread that may wait for its disk.
//!
//! The directory may lie on a volume whose writes wait for the box (a root file system at a mirror). The engine is who lets those return: were
//! it to wait for such a write itself, nobody would, until the leg's guard does at the bound, write after write. So everything that the
//! engine stores there goes through here. It waits ([`Scribe::settle`]) where it may, and goes on where it may not: then what was to be
//! stored is on its way, and a host that dies in that moment finds what was stored before, as after any crash in the middle of a write.
//!
//! **Bounded**: of each [`Key`] only the newest waits.

use crate::{
    fence::StoreError,
    state::{HostIdentity, StateDir, StateError},
};
use model::{GroupId, HostId};
use rustls::ClientConfig;
use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};
use wire::HostPlan;

/// What is stored. The newest of each is what counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    Groups,
    /// A group's state for the next boot.
    Boot(GroupId),
    /// Everything of a group goes.
    Gone(GroupId),
    /// A spool file that is not used any more.
    Spool(GroupId),
    Identity,
    Plan,
    /// Of a host that this one stands by for.
    PlanOf(HostId),
}

impl Key {
    /// Whether what waits under `other` is of no use once this is to be done.
    fn replaces(self, other: Self) -> bool {
        self == other
            || matches!((self, other), (Self::Gone(gone), Self::Boot(group) | Self::Spool(group)) if gone == group)
    }
}

/// What the engine goes on with when it is stored, or was not.
pub(super) enum Stored {
    Identity { identity: HostIdentity, tls: Arc<ClientConfig>, result: Result<(), StateError> },
    Plan { plan: HostPlan, result: Result<(), StoreError> },
    OthersPlan { plan: HostPlan, result: Result<(), String> },
}

type Work = Box<dyn FnOnce(&StateDir) -> Option<Stored> + Send>;

#[derive(Default)]
struct Todo {
    waiting: VecDeque<(Key, Work)>,
    busy: bool,
    ended: bool,
    stored: Vec<Stored>,
}

struct Shared {
    todo: Mutex<Todo>,
    changed: Condvar,
}

impl Shared {
    fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Scribe {
    shared: Arc<Shared>,
}

impl Scribe {
    pub fn start(state: Arc<StateDir>) -> io::Result<Self> {
        let shared = Arc::new(Shared { todo: Mutex::default(), changed: Condvar::new() });
        let of = shared.clone();
        thread::Builder::new().name("scribe".to_owned()).spawn(move || write(&of, &state))?;
        Ok(Self { shared })
    }

    /// To be done soon. Never waits.
    pub fn put(&self, key: Key, work: impl FnOnce(&StateDir) -> Option<Stored> + Send + 'static) {
        let mut todo = self.shared.todo();
        todo.waiting.retain(|(other, _)| !key.replaces(*other));
        todo.waiting.push_back((key, Box::new(work)));
        self.shared.changed.notify_all();
    }

    /// Waits until all of it is done. Not while those writes wait for who calls this.
    pub fn settle(&self) {
        let mut todo = self.shared.todo();
        while todo.busy || !todo.waiting.is_empty() {
            todo = self.shared.changed.wait(todo).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What has been stored since this was last asked.
    pub fn stored(&self) -> Vec<Stored> {
        std::mem::take(&mut self.shared.todo().stored)
    }
}

impl Drop for Scribe {
    fn drop(&mut self) {
        self.shared.todo().ended = true;
        self.shared.changed.notify_all();
    }
}

/// No work that was put is left out but by the end of the process.
fn write(shared: &Shared, state: &StateDir) {
    let mut todo = shared.todo();
    loop {
        match todo.waiting.pop_front() {
            Some((_, work)) => {
                todo.busy = true;
                drop(todo);
                let done = work(state);
                todo = shared.todo();
                todo.busy = false;
                todo.stored.extend(done);
                shared.changed.notify_all();
            }
            None if todo.ended => return,
            None => todo = shared.changed.wait(todo).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::HostId;
    use std::sync::mpsc;

    fn scribe(dir: &std::path::Path) -> Scribe {
        Scribe::start(Arc::new(StateDir::open(&dir.join("state"), &dir.join("run")).unwrap())).unwrap()
    }

    /// The disk hangs: whoever puts does not wait, and of what comes meanwhile the newest of each kind is done, in order.
    #[test]
    fn who_puts_never_waits_and_the_newest_is_what_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let scribe = scribe(dir.path());
        let (hangs, disk) = mpsc::channel::<()>();
        let (began, begun) = mpsc::channel();
        let (says, said) = mpsc::channel();
        scribe.put(Key::Identity, move |_| {
            began.send(()).unwrap();
            disk.recv().unwrap_err();
            None
        });
        begun.recv().unwrap();
        let put = |key, what: u32| {
            let says = says.clone();
            scribe.put(key, move |_| {
                says.send(what).unwrap();
                None
            });
        };
        let (one, other) = (GroupId([1; 16]), GroupId([2; 16]));
        for (key, what) in
            [(Key::Groups, 1), (Key::Boot(one), 2), (Key::Boot(other), 3), (Key::Groups, 4), (Key::Gone(one), 5)]
        {
            put(key, what);
        }
        assert!(said.try_recv().is_err(), "done while the disk hangs");
        drop(hangs);
        scribe.settle();
        assert_eq!(said.try_iter().collect::<Vec<_>>(), [3, 4, 5]);
    }

    #[test]
    fn what_becomes_of_it_is_told_once_and_nothing_is_dropped_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let scribe = scribe(dir.path());
        let (addresses, services, probes) = (Vec::new(), Vec::new(), Vec::new());
        let plan = HostPlan { whose: HostId([1; 16]), version: 1, addresses, services, probes, beat: None };
        scribe.put(Key::Plan, move |_| Some(Stored::Plan { plan, result: Ok(()) }));
        scribe.settle();
        assert!(matches!(scribe.stored().as_slice(), [Stored::Plan { result: Ok(()), .. }]));
        assert!(scribe.stored().is_empty());
        let (says, said) = mpsc::channel();
        scribe.put(Key::Groups, move |_| {
            says.send(()).unwrap();
            None
        });
        drop(scribe);
        said.recv().unwrap();
    }
}
