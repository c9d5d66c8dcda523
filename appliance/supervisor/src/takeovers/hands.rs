//! What the box does for a run.

use super::{DRAIN_MAX, END, GO_ON, KEEP_MIB, OPEN_MAX, PAUSE, Run, RunFault, keep, ship, standby};
use crate::{
    App,
    ownership::Fencing,
    pki,
    vault::{CreateGroupError, DeleteGroupError, Group, Phase as GroupPhase},
};
use journal::{ResolveError, ResolvedPoint};
use model::{BookmarkName, GroupId, HostId, Owner, RecoveryPoint};
use replication::ownership::EndedBy;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use takeover::{
    machine::MachineDisk,
    plan::{Plan, Subject},
    run::{Asked, Hands, HandsError, LeaseWait, Member, Shipping, Wanted},
    state::{BackDisk, Failback, Kind, PointTaken, RunState},
};
use wire::Holding;

/// It says what it does each second.
const HOLDING_MS_MAX: u64 = 5_000;

pub(super) struct BoxHands<'a> {
    pub app: &'a Arc<App>,
    pub run: &'a Run,
    pub dir: &'a Path,
}

impl BoxHands<'_> {
    fn host(&self, name: &str) -> Result<HostId, HandsError> {
        let host = self.app.catalog.data().find_host(name).map(|h| h.id);
        host.ok_or_else(|| HandsError::new(format!("there is no host {name:?}"), "list them with `holdfast host list`"))
    }
    fn leased(&self, plan: &Plan) -> Result<HostId, HandsError> {
        match &plan.subject {
            Subject::Host(name) => self.host(name),
            Subject::Groups(_) => Err(HandsError::new("groups have no lease", "correct the plan")),
        }
    }
    fn group(&self, id: GroupId) -> Result<Arc<Group>, HandsError> {
        let gone = || HandsError::new(format!("group {id} is gone"), "it was deleted: end this run");
        let group = self.app.vault.get(id).ok_or_else(gone)?;
        // After a start of the daemon its journal may still be opening.
        let deadline = Instant::now() + OPEN_MAX;
        while matches!(group.shared.phase(), GroupPhase::Opening) && Instant::now() < deadline {
            if self.wanted() == Wanted::Pause {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(group)
    }
}

fn owner_trouble(text: String) -> HandsError {
    HandsError::new(text, "look at `holdfast plan status` and at the data disk")
}

fn group_trouble(name: &str, e: &dyn std::error::Error) -> HandsError {
    HandsError::new(format!("group {name:?}: {}", crate::chain(e)), "look at `holdfast status` and `holdfast points`")
}

impl Hands for BoxHands<'_> {
    fn now_us(&self) -> u64 {
        self.app.clock.wall_us()
    }
    fn keep(&self, state: &RunState) -> Result<(), HandsError> {
        match keep(self.dir, state) {
            Ok(()) => {}
            Err(RunFault::Hands(e)) => return Err(e),
            Err(e) => return Err(HandsError::new(crate::chain(&e), "look at the daemon's log")),
        }
        *crate::lock(&self.run.state) = Arc::new(state.clone());
        Ok(())
    }
    fn never_mind(&self) {
        let _ = self.run.wanted.compare_exchange(END, GO_ON, Ordering::AcqRel, Ordering::Acquire);
    }
    fn boot_id(&self) -> String {
        fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
    }
    fn wanted(&self) -> Wanted {
        match self.run.wanted.load(Ordering::Acquire) {
            PAUSE => Wanted::Pause,
            END => Wanted::End,
            _ => Wanted::GoOn,
        }
    }

    fn members(&self, subject: &Subject) -> Result<Vec<Member>, HandsError> {
        members_of(self.app, subject)
    }

    fn seen_alive(&self, subject: &Subject) -> Option<String> {
        let heard = |host: HostId| {
            let name = self.app.catalog.data().host(host).map_or_else(|| host.to_string(), |h| h.name.clone());
            self.app.links.hosts.live(host).connected.then(|| format!("the agent of {name} is connected"))
        };
        match subject {
            Subject::Host(name) => heard(self.host(name).ok()?),
            // Named one by one they are still some host's disks, or a machine of ours runs on them.
            Subject::Groups(names) => {
                let groups = self.app.vault.groups();
                let named: Vec<&Arc<Group>> = groups.iter().filter(|g| names.iter().any(|n| n == g.name())).collect();
                let runs_on = |run: &Arc<RunState>| {
                    let serves = !run.is_over() && run.machine.is_some() && run.id != self.run.state().id;
                    let branch = run.points.iter().map(|p| p.branch).find(|b| named.iter().any(|g| g.id() == *b));
                    (serves && branch.is_some()).then(|| format!("the machine of run {} has its disks", run.id))
                };
                named
                    .iter()
                    .filter_map(|g| g.shared.host)
                    .find_map(heard)
                    .or_else(|| self.app.takeovers.list().iter().find_map(runs_on))
            }
        }
    }

    fn lease_fences(&self, plan: &Plan) -> Option<Result<(), String>> {
        plan.lease.as_ref()?;
        let Subject::Host(name) = &plan.subject else { return None };
        Some(self.host(name).map_err(|e| e.text).and_then(|host| self.app.ownership.proof(host)))
    }

    fn take(&self, plan: &Plan) -> Result<LeaseWait, HandsError> {
        let host = self.leased(plan)?;
        let fencing = self.app.ownership.take(host).map_err(owner_trouble)?;
        Ok(match fencing {
            Fencing::Done { term, by } => LeaseWait::Done {
                term: term.0,
                how: by.map_or_else(|| "the box owns it".to_owned(), |by| by.to_string()),
                released: by == Some(EndedBy::Release),
            },
            Fencing::Waits { ms } => LeaseWait::Waits { ms },
            Fencing::NotBegun => LeaseWait::Waits { ms: None },
        })
    }

    fn fenced_by_power(&self, plan: &Plan) -> Result<(), HandsError> {
        let host = self.leased(plan)?;
        match self.app.ownership.fenced_by_power(host).map_err(owner_trouble)? {
            Fencing::Done { .. } => Ok(()),
            _ => Err(owner_trouble("the host could not be taken from its owner".into())),
        }
    }

    fn drain(&self, plan: &Plan) -> Result<(), HandsError> {
        let begun_us = self.app.clock.wall_us();
        let deadline = Instant::now() + DRAIN_MAX;
        for member in self.members(&plan.subject)? {
            let group = self.group(member.id)?;
            loop {
                let proven = crate::status::group_report(self.app, &group).verdict.lag_proven_us;
                // One that has gone meanwhile sends nothing any more: what is here is what there is.
                if proven.is_some_and(|us| us >= begun_us) || self.seen_alive(&plan.subject).is_none() {
                    break;
                }
                if self.wanted() != Wanted::GoOn || Instant::now() >= deadline {
                    let text = format!(
                        "what the host wrote last to {:?} has not come within {} s",
                        member.name,
                        DRAIN_MAX.as_secs()
                    );
                    return Err(HandsError::new(text, "look at `holdfast status`"));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    fn is_ours(&self, plan: &Plan) -> bool {
        let owner =
            self.leased(plan).ok().and_then(|host| self.app.ownership.report(host)).map(|r| (r.owner, r.moving_to));
        owner == Some((Owner::Box, None))
    }

    fn give_back(&self, plan: &Plan) -> Result<(), HandsError> {
        let Some(lease) = &plan.lease else { return Ok(()) };
        let host = self.leased(plan)?;
        self.app.ownership.give_back(host, Some(lease.rules)).map_err(owner_trouble)
    }

    fn resolve(&self, group: GroupId, at: &RecoveryPoint) -> Result<ResolvedPoint, HandsError> {
        let group = self.group(group)?;
        let reader = group.reader().map_err(|e| group_trouble(group.name(), &e))?;
        match (reader.resolve(at), at) {
            // What writes without an agent waits for each write: after the last one nothing is missing, until now.
            (Err(ResolveError::AfterEnd { .. }), RecoveryPoint::Time(time))
                if group.shared.host.is_none() && time.0 <= self.now_us() =>
            {
                reader.resolve(&RecoveryPoint::Latest)
            }
            (found, _) => found,
        }
        .map_err(|e| group_trouble(group.name(), &e))
    }

    fn newest_bookmark(&self, members: &[Member]) -> Result<RecoveryPoint, HandsError> {
        let (mut common, mut names): (Option<Vec<BookmarkName>>, Vec<&str>) = (None, Vec::new());
        for member in members {
            let group = self.group(member.id)?;
            let reader = group.reader().map_err(|e| group_trouble(group.name(), &e))?;
            // Newest first, as the first group has them.
            let its: Vec<BookmarkName> = reader.points().bookmarks.into_iter().rev().map(|b| b.name).collect();
            common = Some(match common {
                None => its,
                Some(had) => had.into_iter().filter(|name| its.contains(name)).collect(),
            });
            names.push(&member.name);
        }
        let newest = common.unwrap_or_default().into_iter().next();
        newest.map(RecoveryPoint::Bookmark).ok_or_else(|| {
            HandsError::new(
                match names[..] {
                    [name] => format!("group {name:?} has no bookmark"),
                    _ => format!("there is no bookmark that each of these groups has: {}", names.join(", ")),
                },
                "make one, or have the plan take the latest moment",
            )
        })
    }

    fn fresh_group_id(&self) -> Result<GroupId, HandsError> {
        pki::random_128().map(GroupId).ok_or_else(|| HandsError::new("the system gave no random bytes", "try again"))
    }

    fn branch(&self, point: &PointTaken) -> Result<Vec<MachineDisk>, HandsError> {
        if self.app.vault.get(point.branch).is_none() {
            let trunk = self.group(point.group)?;
            let made = self.app.vault.create_branch(&trunk, point.at(), point.branch, &point.branch_name);
            made.map_err(|e| match e {
                CreateGroupError::Trunk(e) => group_trouble(trunk.name(), &e),
                e => HandsError::new(crate::chain(&e), "look at `holdfast status`"),
            })?;
        }
        let branch = self.group(point.branch)?;
        branch.reader().map_err(|e| group_trouble(branch.name(), &e))?;
        let volumes = branch.shared.spec().volumes;
        self.app
            .exports
            .add_ingest(&branch, &volumes, self.app.nbd_listen.is_some())
            .map_err(|e| HandsError::new(crate::chain(&e), "look at the daemon's log"))?;
        let exports = self.app.exports.of_group(branch.id());
        volumes
            .iter()
            .map(|volume| {
                let export = exports.iter().find(|e| e.volume == volume.id);
                let export = export.ok_or_else(|| {
                    HandsError::new(format!("{} is not exported", volume.name), "look at the daemon's log")
                })?;
                Ok(MachineDisk {
                    socket: export.socket.clone(),
                    export: export.name.clone(),
                    serial: volume.name.clone(),
                })
            })
            .collect()
    }

    fn standby_ready(&self, state: &RunState) -> Result<String, HandsError> {
        standby::ready(self.app, state)
    }
    fn standby_follows(&self, state: &RunState) -> Result<(String, Vec<BackDisk>), HandsError> {
        standby::follows(self.app, state)
    }
    fn standby_finish(&self, restore: &str, points: &[PointTaken]) -> Result<(), HandsError> {
        standby::finish(self.app, restore, points)
    }
    fn let_disks_go(&self, restore: &str) -> Result<bool, HandsError> {
        standby::let_go(self.app, restore)
    }
    fn give_to_standby(&self, plan: &Plan) -> Result<(), HandsError> {
        self.app.ownership.give_to_standby(self.leased(plan)?).map_err(owner_trouble)
    }
    fn standby_serves(&self, plan: &Plan) -> Result<Option<bool>, HandsError> {
        let report = self.app.ownership.report(self.leased(plan)?);
        let report = report.filter(|r| matches!(r.owner, Owner::Standby(_)));
        Ok(report
            .map(|r| r.holding == Some(Holding::Serving) && r.holding_age_ms.is_some_and(|ms| ms < HOLDING_MS_MAX)))
    }
    fn fresh_restore(&self) -> Result<String, HandsError> {
        self.app.takeovers.fresh_id().map_err(|e| HandsError::new(crate::chain(&e), "try again"))
    }
    fn collect(&self, state: &RunState, restore: &str) -> Result<(), HandsError> {
        for point in &state.points {
            let branch = self.group(point.branch)?;
            branch.reader().map_err(|e| group_trouble(branch.name(), &e))?;
        }
        standby::collect(self.app, state, restore)
    }
    fn clients(&self, points: &[PointTaken]) -> Vec<String> {
        super::clients(self.app, points)
    }
    fn close_disks(&self, points: &[PointTaken]) {
        points.iter().for_each(|point| self.app.exports.remove_group(point.branch));
    }

    fn drop_branch(&self, point: &PointTaken) -> Result<(), HandsError> {
        let Some(branch) = self.app.vault.get(point.branch) else { return Ok(()) };
        self.app.views.close_group(branch.id());
        self.app.exports.remove_group(branch.id());
        match self.app.vault.delete(&branch) {
            Ok(()) => {}
            Err(DeleteGroupError::Disk(e)) => {
                return Err(HandsError::new(crate::chain(&e), "the folder is removed at the daemon's next start"));
            }
            Err(e) => return Err(HandsError::new(crate::chain(&e), "delete what goes on from it first")),
        }
        self.app.exports.remove_group(branch.id());
        Ok(())
    }

    fn memory_mib(&self) -> Result<u64, HandsError> {
        if self.run.state().kind == Kind::Failover {
            self.app.takeovers.wait_for_way();
        }
        let failed =
            || HandsError::new("/proc/meminfo does not say how much memory there is", "this system is not supported");
        let text = fs::read_to_string("/proc/meminfo").map_err(|_| failed())?;
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")).ok_or_else(failed)?;
        let kib: u64 = line.split_whitespace().next().and_then(|n| n.parse().ok()).ok_or_else(failed)?;
        Ok((kib / 1024).saturating_sub(KEEP_MIB))
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    fn is_asked(&self) -> bool {
        crate::lock(&self.run.asked).is_some()
    }
    fn asked(&self) -> Option<Asked> {
        crate::lock(&self.run.asked).clone()
    }
    fn answered(&self) {
        *crate::lock(&self.run.asked) = None;
    }
    fn ship(&self, state: &RunState, failback: &Failback) -> Result<Vec<BackDisk>, HandsError> {
        // After a start of the daemon their journals may still be opening.
        for point in &state.points {
            let branch = self.group(point.branch)?;
            branch.reader().map_err(|e| group_trouble(branch.name(), &e))?;
        }
        ship::begin(self.app, state, failback)
    }
    fn shipping(&self, restore: &str) -> Result<Shipping, HandsError> {
        ship::shipping(self.app, restore)
    }
    fn ship_last(&self, restore: &str) -> Result<(), HandsError> {
        ship::last(self.app, restore)
    }
    fn restart_target(&self, restore: &str) -> Result<(), HandsError> {
        ship::restart_target(self.app, restore)
    }
    fn cancel_shipping(&self, restore: &str) -> Result<(), HandsError> {
        ship::cancel(self.app, restore)
    }
    fn head(&self, group: GroupId) -> Result<u64, HandsError> {
        let group = self.group(group)?;
        group.reader().map_err(|e| group_trouble(group.name(), &e))?;
        Ok(group.shared.live().progress.written.0)
    }
    fn not_whole(&self, group: GroupId, after: u64) -> Result<Option<String>, HandsError> {
        let group = self.group(group)?;
        // What no agent writes to is not told of what its disk holds now, and never will be.
        if group.shared.host.is_none() {
            return Ok(None);
        }
        let reader = group.reader().map_err(|e| group_trouble(group.name(), &e))?;
        if reader.points().valid.iter().any(|range| range.first_lsn.0 > after) {
            return Ok(None);
        }
        let live = group.shared.live();
        Ok(Some(match live.gap {
            Some((_, reason)) => format!("its host's disks are being compared ({reason})"),
            None => "its host's agent has not compared the disks yet".into(),
        }))
    }
}

/// The groups whose disks a plan speaks of.
pub(super) fn members_of(app: &App, subject: &Subject) -> Result<Vec<Member>, HandsError> {
    let groups = app.vault.groups();
    let members: Vec<Member> = match subject {
        Subject::Host(name) => {
            let host = app.catalog.data().find_host(name).map(|h| h.id);
            let host = host.ok_or_else(|| {
                HandsError::new(format!("there is no host {name:?}"), "list them with `holdfast host list`")
            })?;
            let mut of_host: Vec<&Arc<Group>> = groups.iter().filter(|g| g.shared.host == Some(host)).collect();
            let data = app.catalog.data();
            of_host.sort_by_key(|g| data.group(g.id()).map(|entry| entry.created_us));
            of_host.into_iter().map(|g| Member { id: g.id(), name: g.name().to_owned() }).collect()
        }
        Subject::Groups(names) => names
            .iter()
            .map(|name| {
                let found = groups.iter().find(|g| g.name() == name);
                let found = found.ok_or_else(|| {
                    HandsError::new(format!("there is no group {name:?}"), "list them with `holdfast group list`")
                })?;
                Ok(Member { id: found.id(), name: name.clone() })
            })
            .collect::<Result<_, HandsError>>()?,
    };
    if members.is_empty() {
        return Err(HandsError::new("no disk of it is protected", "protect its disks first: `holdfast-agent protect`"));
    }
    Ok(members)
}
