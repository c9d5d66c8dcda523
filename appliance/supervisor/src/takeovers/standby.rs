//! Standbys: hosts whose disks follow another host's groups by a restore that is never finished until a run takes it.
//!
//! For each plan with a standby there is one such restore, begun when the standby's agent is there, begun anew when it ended, and cancelled when the
//! plan goes or wants other disks. While a run of the plan is at the standby its disks are its own, and nothing follows.

use super::{Takeovers, hands::members_of};
use crate::{
    App,
    restores::{DiskMap, RestoreFault, RestoreFrom, RestorePhase, RestoreStatus, RestoreWish},
};
use model::{GroupId, SECTOR, VolumeSpec};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use takeover::{
    plan::{Place, Plan, Standby},
    run::HandsError,
    state::{BackDisk, Kind, PointTaken, RunState},
};
use wire::TargetDisk;

/// What could not be begun is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Of a plan whose standby does not follow.
pub(super) struct Trouble {
    why: String,
    next_try: Instant,
}

impl Takeovers {
    /// Begins and ends what standbys follow by. Blocking, shortly.
    pub fn follow(&self, app: &Arc<App>) {
        let plans = self.standby_plans();
        let open = app.restores.of_plans();
        for (id, wish) in &open {
            let name = wish.plan.as_deref().unwrap_or_default();
            let wanted = plans.iter().any(|(n, ..)| n == name) || self.has_run_at_standby(name);
            if !wanted {
                let _ = app.restores.cancel(app, id);
            }
        }
        crate::lock(&self.not_following).retain(|name, _| plans.iter().any(|(n, ..)| n == name));
        for (name, plan, who, standby) in &plans {
            if self.has_run_at_standby(name) {
                continue;
            }
            let mine = open.iter().find(|(_, wish)| wish.plan.as_ref() == Some(name));
            let waits = |t: &Trouble| Instant::now() < t.next_try;
            if mine.is_none() && crate::lock(&self.not_following).get(name).is_some_and(waits) {
                continue;
            }
            let begun = match (wish(app, name, plan, who, standby), mine) {
                // Its agent is away, say: what follows goes on when it is back.
                (Err(_), Some(_)) => Ok(()),
                (Err(why), None) => Err(why),
                (Ok(wish), Some((_, had))) if wish == *had => Ok(()),
                (Ok(_), Some((id, _))) => app.restores.cancel(app, id).map(drop).map_err(|e| crate::chain(&e)),
                (Ok(wish), None) => self
                    .fresh_id()
                    .map_err(|e| crate::chain(&e))
                    .and_then(|id| app.restores.begin(app, &id, wish).map(drop).map_err(|e| crate::chain(&e))),
            };
            let mut troubles = crate::lock(&self.not_following);
            match begun {
                Ok(()) => drop(troubles.remove(name)),
                Err(why) => drop(troubles.insert(name.clone(), Trouble { why, next_try: Instant::now() + AGAIN })),
            }
        }
    }

    fn has_run_at_standby(&self, plan: &str) -> bool {
        let is = |s: &RunState| {
            s.plan_name == plan && s.kind == Kind::Failover && !s.is_over() && matches!(s.place(), Place::Standby(_))
        };
        self.list().iter().any(|s| is(s))
    }

    /// How the standby of a plan follows, to be shown; none when it has none.
    pub fn standby_report(&self, app: &App, name: &str) -> Option<Value> {
        let (_, _, who, standby) = self.standby_plans().into_iter().find(|(n, ..)| n == name)?;
        let open = app.restores.of_plans().into_iter().find(|(_, wish)| wish.plan.as_deref() == Some(name));
        let restore = open.and_then(|(id, _)| app.restores.status(&id).ok());
        let why = crate::lock(&self.not_following).get(name).map(|t| t.why.clone());
        let state = match (&restore, self.has_run_at_standby(name)) {
            (Some(restore), _) => in_words(restore),
            (None, true) => "its disks are its own: a run of this plan is at the standby".to_owned(),
            (None, false) => why.unwrap_or_else(|| "it is about to follow".into()),
        };
        Some(json!({ "host": who, "lag_seconds": standby.lag_seconds, "state": state, "restore": restore }))
    }
}

fn in_words(restore: &RestoreStatus) -> String {
    let mib = |bytes: &u64| bytes >> 20;
    match &restore.phase {
        RestorePhase::Waiting { why } => why.clone(),
        RestorePhase::Keeping { .. } => "it is being looked at".into(),
        RestorePhase::Copying { done_bytes, total_bytes } => {
            format!("copying, {} of {} MiB", mib(done_bytes), mib(total_bytes))
        }
        RestorePhase::Following { behind_bytes, lsns, .. } => {
            let at: Vec<String> = lsns.values().map(|lsn| lsn.0.to_string()).collect();
            format!("follows, {} KiB behind, at LSN {}", behind_bytes / 1024, at.join(", "))
        }
        RestorePhase::Finishing { .. } => "finishing".into(),
        _ => "it has come to its moment".into(),
    }
}

/// What its plan wants of the standby, as far as it can be told now.
fn wish(app: &App, name: &str, plan: &Plan, who: &str, standby: &Standby) -> Result<RestoreWish, String> {
    let said = |e: HandsError| format!("{e}: {}", e.remedy);
    let host = app.catalog.data().find_host(who).map(|h| h.id);
    let host = host.ok_or_else(|| format!("there is no host {who:?}: list them with `holdfast host list`"))?;
    let target = app.links.targets.get(host).ok_or_else(|| {
        format!("{who} offers no disks: give its agent's configuration a [standby] with them, and see that it runs")
    })?;
    let (mut from, mut wanted) = (Vec::new(), Vec::new());
    for member in members_of(app, &plan.subject).map_err(said)? {
        let group = app.vault.get(member.id).ok_or_else(|| format!("group {:?} is gone", member.name))?;
        group.reader().map_err(|e| format!("group {:?}: {}", member.name, crate::chain(&e)))?;
        from.push(RestoreFrom::Branch { group: member.id });
        wanted.extend(group.shared.spec().volumes.into_iter().map(|volume| (member.id, member.name.clone(), volume)));
    }
    let mut disks = Vec::new();
    for (group, group_name, volume) in &wanted {
        let named = standby
            .disks
            .iter()
            .find(|d| d.volume == volume.name && d.group.as_ref().map_or(from.len() == 1, |named| named == group_name));
        let path = match named {
            Some(named) => named.disk.clone(),
            None => by_size(&wanted, volume, &target.disks).ok_or_else(|| {
                format!(
                    "{group_name}/{}: no disk of {who}, or more than one, has just its size: say which in [standby] disks",
                    volume.name
                )
            })?,
        };
        disks.push(DiskMap { group: *group, volume: volume.id, path });
    }
    Ok(RestoreWish {
        target: host.to_string(),
        from,
        disks,
        keep_old: false,
        lag_seconds: standby.lag_seconds,
        collect: false,
        plan: Some(name.to_owned()),
    })
}

fn by_size(wanted: &[(GroupId, String, VolumeSpec)], volume: &VolumeSpec, disks: &[TargetDisk]) -> Option<String> {
    let alone = wanted.iter().filter(|(_, _, other)| other.sectors == volume.sectors).count() == 1;
    let mut fits = disks.iter().filter(|d| d.bytes.0 == volume.sectors.0 * SECTOR);
    match (fits.next(), fits.next(), alone) {
        (Some(disk), None, true) => Some(disk.path.clone()),
        _ => None,
    }
}

fn trouble(e: &RestoreFault) -> HandsError {
    HandsError::new(crate::chain(e), "look at `holdfast plan status`")
}

fn open_of(app: &App, state: &RunState) -> Option<(String, RestoreWish)> {
    app.restores.of_plans().into_iter().find(|(_, wish)| wish.plan.as_ref() == Some(&state.plan_name))
}

pub fn ready(app: &App, state: &RunState) -> Result<String, HandsError> {
    let report = app.takeovers.standby_report(app, &state.plan_name);
    let words =
        report.map_or_else(|| "the plan has no standby".to_owned(), |r| r["state"].as_str().unwrap_or_default().into());
    let remedy = "see `holdfast plan status`: it must follow before it can serve";
    let status = open_of(app, state).and_then(|(id, _)| app.restores.status(&id).ok());
    let Some(status) = status else {
        return Err(HandsError::new(format!("the standby does not follow: {words}"), remedy));
    };
    if !matches!(status.phase, RestorePhase::Following { .. }) {
        return Err(HandsError::new(format!("the standby does not follow yet: {words}"), remedy));
    }
    let host = app.catalog.data().find_host(subject_host(&state.plan)).map(|h| h.id);
    let host =
        host.ok_or_else(|| HandsError::new("the plan's host is not known", "list them with `holdfast host list`"))?;
    app.ownership
        .standby_knows(host)
        .map_err(|why| HandsError::new(why, "see what its agent says, and correct the plan"))?;
    Ok(words)
}

fn subject_host(plan: &Plan) -> &str {
    match &plan.subject {
        takeover::plan::Subject::Host(name) => name,
        takeover::plan::Subject::Groups(_) => "",
    }
}

pub fn follows(app: &App, state: &RunState) -> Result<(String, Vec<BackDisk>), HandsError> {
    let (id, wish) = open_of(app, state)
        .ok_or_else(|| HandsError::new("the standby does not follow any more", "see `holdfast plan status`"))?;
    let disk = |map: &DiskMap| {
        let group = app.vault.get(map.group)?;
        let volume = group.shared.spec().volumes.into_iter().find(|v| v.id == map.volume)?;
        Some(BackDisk { group: map.group, volume: volume.name, path: map.path.clone() })
    };
    Ok((id, wish.disks.iter().filter_map(disk).collect()))
}

pub fn finish(app: &App, restore: &str, points: &[PointTaken]) -> Result<(), HandsError> {
    let points: BTreeMap<_, _> = points.iter().map(|p| (p.group, p.at())).collect();
    match app.restores.finish_at(restore, &points) {
        // After a failback that was undone its disks are its own already.
        Ok(_) => Ok(()),
        Err(e) => Err(trouble(&e)),
    }
}

pub fn let_go(app: &App, restore: &str) -> Result<bool, HandsError> {
    match app.restores.release(restore, false) {
        Ok(status) => Ok(matches!(status.phase, RestorePhase::Released { .. })),
        Err(e) => Err(trouble(&e)),
    }
}

pub fn collect(app: &Arc<App>, state: &RunState, restore: &str) -> Result<(), HandsError> {
    let Place::Standby(who) = state.place() else {
        return Err(HandsError::new("the run is at no standby", "end it"));
    };
    let host = app.catalog.data().find_host(who).map(|h| h.id);
    let host = host
        .ok_or_else(|| HandsError::new(format!("there is no host {who:?}"), "list them with `holdfast host list`"))?;
    let mut disks = Vec::new();
    for disk in &state.standby_disks {
        let point = state.points.iter().find(|p| p.group == disk.group);
        let branch = point.and_then(|p| app.vault.get(p.branch));
        let volume = branch.as_ref().and_then(|b| b.shared.spec().volumes.into_iter().find(|v| v.name == disk.volume));
        let (Some(branch), Some(volume)) = (branch, volume) else {
            return Err(HandsError::new(format!("the branch of {} is gone", disk.volume), "roll the failback back"));
        };
        disks.push(DiskMap { group: branch.id(), volume: volume.id, path: disk.path.clone() });
    }
    let wish = RestoreWish {
        target: host.to_string(),
        from: state.points.iter().map(|p| RestoreFrom::Branch { group: p.branch }).collect(),
        disks,
        keep_old: false,
        lag_seconds: 0,
        collect: true,
        plan: None,
    };
    app.restores.begin(app, restore, wish).map(drop).map_err(|e| trouble(&e))
}
