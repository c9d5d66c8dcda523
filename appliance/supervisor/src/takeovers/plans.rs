//! The plans: as files, as they were read, and what they want of the hosts.

use super::{PLAN_NAME_MAX, PLANS_MAX, PlanFault, Takeovers, names_in};
use crate::{
    App,
    files::{self, FileError},
    ownership::{StandbyWant, Want, Wants},
};
use model::HostId;
use std::{collections::BTreeSet, fs, io, path::PathBuf, sync::Arc};
use takeover::{
    detect::Channel,
    plan::{Detect, Place, Plan, Standby, Subject},
    state::{Kind, RunState},
};
use wire::HostPlan;

/// A plan that watches a host.
#[derive(Clone, Debug)]
pub struct Watched {
    pub plan: String,
    pub host: HostId,
    pub name: String,
    pub subject: Subject,
    pub detect: Detect,
    pub leased: bool,
    pub has_hook: bool,
}

/// The plans as they were read last: at the start and at each change.
#[derive(Default)]
pub(super) struct Read {
    plans: Vec<(String, Arc<Plan>)>,
    faults: Vec<String>,
}

impl Takeovers {
    fn plan_file(&self, name: &str) -> Result<PathBuf, PlanFault> {
        let fine = !name.is_empty()
            && name.len() <= PLAN_NAME_MAX
            && !name.starts_with('.')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if fine { Ok(self.plans.join(format!("{name}.toml"))) } else { Err(PlanFault::Name(name.into())) }
    }
    pub fn plan_names(&self) -> Result<Vec<String>, FileError> {
        let names = names_in(&self.plans)?;
        Ok(names.into_iter().filter_map(|n| n.strip_suffix(".toml").map(str::to_owned)).collect())
    }
    /// As it was written.
    pub fn plan_text(&self, name: &str) -> Result<String, PlanFault> {
        let bytes = files::read_small(&self.plan_file(name)?)?.ok_or_else(|| PlanFault::Unknown(name.into()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
    pub fn plan(&self, name: &str) -> Result<Plan, PlanFault> {
        Ok(Plan::parse(&self.plan_text(name)?)?)
    }
    /// Keeps a plan that makes sense. Blocking.
    pub fn set_plan(&self, name: &str, text: &str) -> Result<Plan, PlanFault> {
        let file = self.plan_file(name)?;
        let plan = Plan::parse(text)?;
        if !file.exists() && self.plan_names()?.len() >= PLANS_MAX {
            return Err(PlanFault::TooMany);
        }
        self.may_be_set(name, &plan)?;
        files::write_secret(&file, text.as_bytes())?;
        self.read_plans()?;
        Ok(plan)
    }
    pub fn delete_plan(&self, name: &str) -> Result<(), PlanFault> {
        let file = self.plan_file(name)?;
        if self.list().iter().any(|s| s.plan_name == name && !s.is_over()) {
            return Err(PlanFault::InUse(name.into()));
        }
        match fs::remove_file(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(PlanFault::Unknown(name.into())),
            Err(source) => Err(FileError { op: "remove", path: file, source }.into()),
            Ok(()) => Ok(self.read_plans()?),
        }
    }

    /// Plans as they are now, for who looks at them many times a second.
    pub(super) fn read_plans(&self) -> Result<(), FileError> {
        let mut read = Read::default();
        for name in self.plan_names()? {
            match self.plan(&name) {
                Ok(plan) => read.plans.push((name, Arc::new(plan))),
                Err(e) => read.faults.push(format!("plan {name}: {}", crate::chain(&e))),
            }
        }
        *crate::lock(&self.read) = Arc::new(read);
        Ok(())
    }
    /// Those that are drilled on a schedule, and every how many hours.
    pub(super) fn drilled_plans(&self) -> Vec<(String, u64)> {
        let read = Arc::clone(&crate::lock(&self.read));
        read.plans.iter().filter_map(|(name, plan)| Some((name.clone(), plan.drill?.every_hours.into()))).collect()
    }
    /// Those with a standby: name, plan, the standby's name, what is wanted of it.
    pub(super) fn standby_plans(&self) -> Vec<(String, Arc<Plan>, String, Standby)> {
        let read = Arc::clone(&crate::lock(&self.read));
        let of = |(name, plan): &(String, Arc<Plan>)| match (&plan.place, &plan.standby) {
            (Place::Standby(who), Some(standby)) => {
                Some((name.clone(), Arc::clone(plan), who.clone(), standby.clone()))
            }
            _ => None,
        };
        read.plans.iter().filter_map(of).collect()
    }
    /// Plans that cannot be read: what they armed stays armed.
    pub fn plan_faults(&self) -> Vec<String> {
        crate::lock(&self.read).faults.clone()
    }

    /// What one plan alone cannot know.
    fn may_be_set(&self, name: &str, plan: &Plan) -> Result<(), PlanFault> {
        if self.list().iter().any(|s| s.plan_name == name && s.kind == Kind::Failover && !s.is_over()) {
            return Err(PlanFault::InUse(name.into()));
        }
        let works_before = |plan: &Plan| plan.lease.is_some() || plan.detect.is_some();
        let Subject::Host(host) = &plan.subject else { return Ok(()) };
        let read = Arc::clone(&crate::lock(&self.read));
        let other = read.plans.iter().find(|(n, p)| n != name && p.subject == plan.subject && works_before(p));
        if let (true, Some((other, _))) = (works_before(plan), other) {
            return Err(PlanFault::Twice { other: other.clone(), host: host.clone() });
        }
        // By the rules that agents have, whatever this box thinks of them.
        let whole = HostPlan {
            whose: HostId([0; 16]),
            version: 0,
            addresses: plan.lease.iter().flat_map(|l| l.addresses.clone()).collect(),
            services: plan.lease.iter().flat_map(|l| l.services.clone()).collect(),
            probes: plan.detect.iter().flat_map(|d| d.probes.clone()).collect(),
            beat: None,
        };
        whole.check().map_err(|e| PlanFault::Agent(e.to_string()))?;
        let rules = plan.lease.as_ref().map_or(Ok(()), |l| replication::ownership::check_rules(l.rules));
        rules.map_err(|e| PlanFault::Agent(e.to_string()))
    }

    /// Those that watch a host which is enrolled.
    pub fn watched(&self, app: &App) -> Vec<Watched> {
        let read = Arc::clone(&crate::lock(&self.read));
        let data = app.catalog.data();
        let of = |(plan, p): &(String, Arc<Plan>)| {
            let Subject::Host(host) = &p.subject else { return None };
            let host = data.find_host(host)?;
            Some(Watched {
                plan: plan.clone(),
                host: host.id,
                name: host.name.clone(),
                subject: p.subject.clone(),
                detect: p.detect.clone()?,
                leased: p.lease.is_some(),
                has_hook: p.hooks.fence.is_some(),
            })
        };
        read.plans.iter().filter_map(of).collect()
    }

    /// Who is being taken over or run.
    pub fn open_subjects(&self) -> Vec<Subject> {
        let open = self.list().into_iter().filter(|s| s.kind == Kind::Failover && !s.is_over());
        open.map(|s| s.plan.subject.clone()).collect()
    }
    pub fn open_failover(&self, subject: &Subject) -> Option<Arc<RunState>> {
        self.list().into_iter().find(|s| s.kind == Kind::Failover && !s.is_over() && s.plan.subject == *subject)
    }

    /// Tells the hosts' desks what the plans want, when that has changed: a plan, an enrolment, the begin or end of a takeover. Blocking.
    pub fn settle(&self, app: &App) {
        let read = Arc::clone(&crate::lock(&self.read));
        let data = app.catalog.data();
        let mut wants = Wants { all_read: read.faults.is_empty(), ..Wants::default() };
        let busy = self.list().into_iter().filter(|s| s.kind == Kind::Failover && !s.is_over());
        let busy: BTreeSet<HostId> = busy
            .filter_map(|s| match &s.plan.subject {
                Subject::Host(name) => data.find_host(name).map(|h| h.id),
                Subject::Groups(_) => None,
            })
            .collect();
        wants.busy = busy;
        for (name, plan) in &read.plans {
            let Subject::Host(host) = &plan.subject else { continue };
            let Some(host) = data.find_host(host) else { continue };
            if plan.lease.is_none() && plan.detect.is_none() {
                continue;
            }
            let beat = plan.detect.as_ref().and_then(|d| d.policy.channels.iter().find(|c| c.channel == Channel::Beat));
            let standby = match (&plan.place, &plan.standby) {
                (Place::Standby(who), Some(standby)) => data.find_host(who).map(|h| StandbyWant {
                    host: h.id,
                    addresses: standby.addresses.clone(),
                    services: standby.services.clone(),
                }),
                _ => None,
            };
            let want = Want {
                standby,
                plan: name.clone(),
                lease: plan.lease.clone(),
                probes: plan.detect.as_ref().map(|d| d.probes.clone()).unwrap_or_default(),
                beat: beat.map(|rule| (app.listen.port(), rule.period_ms)),
            };
            // Two for one host are refused when they are kept; files by hand may be so.
            wants.of.entry(host.id).or_insert(want);
        }
        let tells = format!("{wants:?}");
        let mut told = crate::lock(&self.told);
        if told.as_ref() != Some(&tells) {
            app.ownership.set_wants(wants);
            *told = Some(tells);
        }
    }
}
