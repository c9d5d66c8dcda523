//! Between the control connection and what a takeover plan has this host do: plans in, requests for leases and results of probes out. One
//! fence for this host, and one for each that it stands by for.

use super::scribe::{Key, Stored};
use super::{Engine, Input};
use crate::{
    beats::Beats,
    fence::{Fence, Gate, Services, Store, StoreError},
    probes::{Means, Probes, script},
};
use model::HostId;
use std::{io, path::PathBuf, sync::Arc};
use wire::{HostPlan, Message, PlanService, ProbeKind, ProbeResult};

/// A host that stands by for more has no disks for them.
const OTHERS_MAX: usize = 8;

/// What became of a plan at once.
enum Taken {
    Done,
    Waits,
}

/// Where plans of hosts that this one stands by for are kept.
struct Places {
    state: PathBuf,
    run: PathBuf,
    boot_id: String,
}

impl Places {
    /// Its units are no part of this host's boot: nothing is listed for the gate.
    fn kept_of(&self, whose: HostId) -> io::Result<(Store, Gate)> {
        let (state, run) = (&self.state, &self.run);
        let store = Store::of_other(state, run, &self.boot_id, whose)?;
        let gate = Gate::new(&Store::folder_of(state, whose), &Store::folder_of(run, whose), None);
        Ok((store, gate))
    }
}

impl Engine {
    fn fence_store(&self) -> Store {
        Store::new(&self.config.state_dir, &self.config.run_dir, &self.ctx.boot_id)
    }

    fn places(&self) -> Places {
        Places {
            state: self.config.state_dir.clone(),
            run: self.config.run_dir.clone(),
            boot_id: self.ctx.boot_id.clone(),
        }
    }

    /// Goes on with the plans that are stored.
    pub(super) fn start_fence(&mut self) {
        match self.fence_store().plan() {
            Ok(Some(plan)) => {
                self.watch(&plan);
                let kept = (self.fence_store(), Gate::of(&self.config));
                self.fence = self.begin_fence(self.identity.host, plan, kept);
            }
            Ok(None) => {}
            // Without the plan nothing can be put up or taken down; the box says it again when it is heard.
            Err(e) => tracing::error!(error = %crate::error_chain(&e), "the takeover plan cannot be read"),
        }
        for whose in Store::others(&self.config.state_dir) {
            let Ok(kept) = self.places().kept_of(whose) else { continue };
            match kept.0.plan() {
                Ok(Some(plan)) => {
                    if let Some(fence) = self.begin_fence(whose, plan, kept) {
                        self.other_fences.insert(whose, fence);
                    }
                }
                Ok(None) => {}
                Err(e) => {
                    tracing::error!(error = %crate::error_chain(&e), %whose, "another host's takeover plan cannot be read");
                }
            }
        }
    }

    fn begin_fence(&self, whose: HostId, plan: HostPlan, kept: (Store, Gate)) -> Option<Fence> {
        let sender = self.to_self.clone();
        // Never waits: what is lost is said again in a second, and a lease that waits for the engine would run out with it.
        let tell = Box::new(move |message| drop(sender.try_send(Input::Tell(Box::new(message)))));
        let services = Services {
            systemctl: "systemctl".into(),
            configured: self.config.fence.services.clone(),
            orders: crate::fence::Orders::default(),
        };
        match Fence::start(whose, plan, kept, services, tell) {
            Ok(fence) => Some(fence),
            Err(e) => {
                tracing::error!(error = %e, "could not start the thread that holds the lease");
                None
            }
        }
    }

    pub(super) fn host_plan(&mut self, plan: HostPlan) {
        let (whose, version) = (plan.whose, plan.version);
        let taken = if whose == self.identity.host { self.take_plan(plan) } else { self.take_others_plan(plan) };
        match taken {
            // Answered when it is stored.
            Ok(Taken::Waits) => {}
            Ok(Taken::Done) => self.answer_plan(whose, version, None),
            Err(why) => self.answer_plan(whose, version, Some(why)),
        }
    }

    fn answer_plan(&self, whose: HostId, version: u64, refused: Option<String>) {
        if let Some(why) = &refused {
            tracing::error!(%why, version, "the takeover plan is refused");
        }
        self.tell(Message::HostPlanTaken { whose, version, refused });
    }

    fn take_plan(&mut self, plan: HostPlan) -> Result<Taken, String> {
        self.may_take(&plan)?;
        let store = self.fence_store();
        self.ctx.scribe.put(Key::Plan, move |_| {
            let result = store.store_plan(&plan);
            Some(Stored::Plan { plan, result })
        });
        Ok(Taken::Waits)
    }

    /// It is followed from when it would outlive this agent.
    pub(super) fn plan_stored(&mut self, plan: HostPlan, result: Result<(), StoreError>) {
        let (whose, version) = (plan.whose, plan.version);
        if let Err(e) = result {
            return self.answer_plan(whose, version, Some(crate::error_chain(&e)));
        }
        self.watch(&plan);
        match &self.fence {
            Some(fence) => fence.plan(plan),
            None => {
                let kept = (self.fence_store(), Gate::of(&self.config));
                self.fence = self.begin_fence(self.identity.host, plan, kept);
            }
        }
        self.answer_plan(whose, version, None);
    }

    fn may_take(&self, plan: &HostPlan) -> Result<(), String> {
        plan.check().map_err(|e| e.to_string())?;
        for service in &plan.services {
            if let PlanService::Configured(name) = service
                && !self.config.fence.services.contains_key(name)
            {
                return Err(format!("this host's configuration has no [fence.services.{name}]"));
            }
        }
        for probe in &plan.probes {
            if let ProbeKind::Script(name) = &probe.kind
                && !self.config.scripts.contains_key(name)
            {
                return Err(format!("this host's configuration has no [scripts.{name}]"));
            }
        }
        Ok(())
    }

    fn take_others_plan(&mut self, plan: HostPlan) -> Result<Taken, String> {
        let whose = plan.whose;
        if plan.addresses.is_empty() && plan.services.is_empty() {
            return Ok(self.stand_by_no_more(plan));
        }
        if self.config.standby.disks.is_empty() {
            return Err("this host stands by for no other: its agent's configuration has no [standby] disks".to_owned());
        }
        if !plan.probes.is_empty() || plan.beat.is_some() {
            return Err("this agent watches no other host".to_owned());
        }
        self.may_take(&plan)?;
        if !self.other_fences.contains_key(&whose) && self.other_fences.len() >= OTHERS_MAX {
            return Err(format!("this host stands by for {OTHERS_MAX} others already"));
        }
        let places = self.places();
        self.ctx.scribe.put(Key::PlanOf(whose), move |_| {
            let stored = || -> Result<(), String> {
                let (store, _) =
                    places.kept_of(whose).map_err(|e| format!("could not make a folder for the plan: {e}"))?;
                store.store_plan(&plan).map_err(|e| crate::error_chain(&e))
            };
            let result = stored();
            Some(Stored::OthersPlan { plan, result })
        });
        Ok(Taken::Waits)
    }

    pub(super) fn others_plan_stored(&mut self, plan: HostPlan, result: Result<(), String>) {
        let (whose, version) = (plan.whose, plan.version);
        let taken = result.and_then(|()| self.follow_others_plan(plan));
        self.answer_plan(whose, version, taken.err());
    }

    fn follow_others_plan(&mut self, plan: HostPlan) -> Result<(), String> {
        let whose = plan.whose;
        if plan.addresses.is_empty() && plan.services.is_empty() {
            return Ok(());
        }
        if let Some(fence) = self.other_fences.get(&whose) {
            fence.plan(plan);
            return Ok(());
        }
        let kept = self.places().kept_of(whose).map_err(|e| format!("could not make a folder for the plan: {e}"))?;
        let fence = self.begin_fence(whose, plan, kept).ok_or("could not start a thread")?;
        self.other_fences.insert(whose, fence);
        Ok(())
    }

    /// What is still up goes with its lease, by the plan that put it up; the box says this again until then.
    fn stand_by_no_more(&mut self, plan: HostPlan) -> Taken {
        let whose = plan.whose;
        if self.other_fences.get(&whose).is_some_and(Fence::is_up) {
            return Taken::Done;
        }
        self.other_fences.remove(&whose);
        let places = self.places();
        self.ctx.scribe.put(Key::PlanOf(whose), move |_| {
            let forgotten = || -> Result<(), String> {
                let (store, _) = places.kept_of(whose).map_err(|e| e.to_string())?;
                store.forget().map(drop).map_err(|e| crate::error_chain(&e))
            };
            let result = forgotten();
            Some(Stored::OthersPlan { plan, result })
        });
        Taken::Waits
    }

    /// Probes and beats from now on. Those that are the same go on; a thread that cannot be had is tried for again with the next plan or start.
    fn watch(&mut self, plan: &HostPlan) {
        if self.beats.as_ref().is_none_or(|b| plan.beat.is_none_or(|plan| !b.is(plan))) {
            self.beats = None;
            let started =
                plan.beat.map(|beat| Beats::start(self.identity.host, self.identity.box_address.clone(), beat));
            match started.transpose() {
                Ok(beats) => self.beats = beats,
                Err(e) => tracing::error!(error = %e, "could not start the thread that sends heartbeat datagrams"),
            }
        }
        if self.probes.as_ref().is_some_and(|p| p.makes(&plan.probes)) {
            return;
        }
        self.probes = None;
        let sender = self.to_self.clone();
        // Never waits: an old result is worth nothing.
        let tell =
            Arc::new(move |result: ProbeResult| drop(sender.try_send(Input::Tell(Box::new(Message::Probe(result))))));
        let means = Means {
            systemctl: "systemctl".into(),
            scripts: self.config.scripts.clone(),
            runner: script::Runner {
                socket: script::SOCKET.into(),
                program: "/proc/self/exe".into(),
                config: self.config.loaded_from.clone(),
            },
        };
        let tell: crate::probes::Tell = tell;
        match Probes::start(self.identity.host, &plan.probes, &means, &tell) {
            Ok(probes) => self.probes = Some(probes),
            Err(e) => tracing::error!(error = %e, "could not start the threads that make probes"),
        }
    }

    pub(super) fn lease(&mut self, message: Message) {
        let whose = match &message {
            Message::LeaseAnswer(answer) => answer.whose,
            Message::LeaseRevoke(end) => end.whose,
            _ => return,
        };
        let fence = if whose == self.identity.host { self.fence.as_ref() } else { self.other_fences.get(&whose) };
        if let Some(fence) = fence {
            fence.message(message);
        }
    }

    pub(super) fn tell_of_lease(&mut self, message: Message) {
        if self.box_leases {
            self.tell(message);
        }
    }
}
