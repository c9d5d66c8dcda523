//! Between the control connection and the fence: plans in, requests for leases out.

use super::{Engine, Input};
use crate::fence::{Fence, Services, Store};
use wire::{HostPlan, Message};

impl Engine {
    fn fence_store(&self) -> Store {
        Store::new(&self.config.state_dir, &self.config.run_dir, &self.ctx.boot_id)
    }

    /// Goes on with the plan that is stored, if one is.
    pub(super) fn start_fence(&mut self) {
        match self.fence_store().plan() {
            Ok(Some(plan)) => self.begin_fence(plan),
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
        match Fence::start(self.identity.host, plan, self.fence_store(), services, tell) {
            Ok(fence) => self.fence = Some(fence),
            Err(e) => tracing::error!(error = %e, "could not start the thread that holds the lease"),
        }
    }

    pub(super) fn host_plan(&mut self, plan: HostPlan) {
        let (whose, version) = (plan.whose, plan.version);
        let refused = self.take_plan(plan).err();
        if let Some(why) = &refused {
            tracing::error!(%why, version, "the takeover plan is refused");
        }
        self.tell(Message::HostPlanTaken { whose, version, refused });
    }

    fn take_plan(&mut self, plan: HostPlan) -> Result<(), String> {
        if plan.whose != self.identity.host {
            return Err("this agent stands by for no other host".to_owned());
        }
        if !plan.probes.is_empty() || plan.beat.is_some() {
            return Err("this agent makes no probes and sends no beats".to_owned());
        }
        plan.check().map_err(|e| e.to_string())?;
        for service in &plan.services {
            if let wire::PlanService::Configured(name) = service
                && !self.config.fence.services.contains_key(name)
            {
                return Err(format!("this host's configuration has no [fence.services.{name}]"));
            }
        }
        self.fence_store().store_plan(&plan).map_err(|e| crate::error_chain(&e))?;
        match &self.fence {
            Some(fence) => fence.plan(plan),
            None => self.begin_fence(plan),
        }
        Ok(())
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
