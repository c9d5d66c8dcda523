//! Between the control connection and what a takeover plan has this host do: plans in, requests for leases and results of probes out.

use super::scribe::{Key, Stored};
use super::{Engine, Input};
use crate::{
    beats::Beats,
    fence::{Fence, Gate, Services, Store, StoreError},
    probes::{Means, Probes, script},
};
use model::HostId;
use std::sync::Arc;
use wire::{HostPlan, Message, PlanService, ProbeKind, ProbeResult};

impl Engine {
    fn fence_store(&self) -> Store {
        Store::new(&self.config.state_dir, &self.config.run_dir, &self.ctx.boot_id)
    }

    /// Goes on with the plan that is stored, if one is.
    pub(super) fn start_fence(&mut self) {
        match self.fence_store().plan() {
            Ok(Some(plan)) => {
                self.watch(&plan);
                self.begin_fence(plan);
            }
            Ok(None) => {}
            // Without the plan nothing can be put up or taken down; the box says it again when it is heard.
            Err(e) => tracing::error!(error = %crate::error_chain(&e), "the takeover plan cannot be read"),
        }
    }

    fn begin_fence(&mut self, plan: HostPlan) {
        let sender = self.to_self.clone();
        // Never waits: what is lost is said again in a second, and a lease that waits for the engine would run out with it.
        let tell = Box::new(move |message| drop(sender.try_send(Input::Tell(Box::new(message)))));
        let services = Services {
            systemctl: "systemctl".into(),
            configured: self.config.fence.services.clone(),
            orders: crate::fence::Orders::default(),
        };
        let kept = (self.fence_store(), Gate::of(&self.config));
        match Fence::start(self.identity.host, plan, kept, services, tell) {
            Ok(fence) => self.fence = Some(fence),
            Err(e) => tracing::error!(error = %e, "could not start the thread that holds the lease"),
        }
    }

    pub(super) fn host_plan(&mut self, plan: HostPlan) {
        let (whose, version) = (plan.whose, plan.version);
        if let Err(why) = self.check_plan(&plan) {
            return self.answer_plan(whose, version, Some(why));
        }
        let store = self.fence_store();
        self.ctx.scribe.put(Key::Plan, move |_| {
            let result = store.store_plan(&plan);
            Some(Stored::Plan { plan, result })
        });
    }

    fn answer_plan(&self, whose: HostId, version: u64, refused: Option<String>) {
        if let Some(why) = &refused {
            tracing::error!(%why, version, "the takeover plan is refused");
        }
        self.tell(Message::HostPlanTaken { whose, version, refused });
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
            None => self.begin_fence(plan),
        }
        self.answer_plan(whose, version, None);
    }

    fn check_plan(&self, plan: &HostPlan) -> Result<(), String> {
        if plan.whose != self.identity.host {
            return Err("this agent stands by for no other host".to_owned());
        }
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
        if let Some(fence) = &self.fence {
            fence.message(message);
        }
    }

    pub(super) fn tell_of_lease(&mut self, message: Message) {
        if self.box_leases {
            self.tell(message);
        }
    }
}
