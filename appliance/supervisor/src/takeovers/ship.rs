//! The shipping half of a failback, by the box's restores: the machine's branches to the disks of a restore target.

use crate::{
    App,
    restores::{DiskMap, RestoreFault, RestoreFrom, RestorePhase, RestoreWish},
};
use model::VolumeSpec;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use takeover::{
    run::{HandsError, Shipping},
    state::{BackDisk, Failback, PointTaken, RunState},
};
use wire::TargetDisk;

const SECTOR: u64 = 512;
/// For a target to connect again.
const TARGET_MAX: Duration = Duration::from_secs(10);

/// A volume of the machine, and the group people know it by.
struct Wanted {
    point: PointTaken,
    volume: VolumeSpec,
}

pub fn begin(app: &Arc<App>, state: &RunState, failback: &Failback) -> Result<Vec<BackDisk>, HandsError> {
    let find = || {
        let targets = app.restores.targets(app);
        targets.into_iter().find(|t| t.name == failback.target || t.host.to_string() == failback.target)
    };
    // When the box was restarted the target is not back at once.
    let deadline = Instant::now() + TARGET_MAX;
    let mut target = find();
    while target.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        target = find();
    }
    let target = target.ok_or_else(|| {
        let remedy = "start the machine from a rescue medium and run `holdfast-agent rescue` on it";
        HandsError::new(format!("no restore target {:?} is connected", failback.target), remedy)
    })?;
    let mut wanted = Vec::new();
    for point in &state.points {
        let branch = app.vault.get(point.branch);
        let branch = branch.ok_or_else(|| HandsError::new("what the machine wrote is gone", "end this run"))?;
        let volumes = branch.shared.spec().volumes;
        wanted.extend(volumes.into_iter().map(|volume| Wanted { point: point.clone(), volume }));
    }
    let disks = if failback.disks.is_empty() { fitting(&wanted, &target.disks)? } else { failback.disks.clone() };
    let maps = wanted.iter().map(|w| {
        let disk = disks.iter().find(|d| d.group == w.point.group && d.volume == w.volume.name);
        let disk = disk.ok_or_else(|| no_disk(w, "no disk was named for it"))?;
        Ok(DiskMap { group: w.point.branch, volume: w.volume.id, path: disk.path.clone() })
    });
    let wish = RestoreWish {
        target: target.host.to_string(),
        from: state.points.iter().map(|p| RestoreFrom::Branch { group: p.branch }).collect(),
        disks: maps.collect::<Result<_, HandsError>>()?,
        keep_old: true,
        lag_seconds: 0,
        collect: false,
        plan: None,
    };
    app.restores.begin(app, &failback.restore, wish).map_err(|e| trouble(&e))?;
    Ok(disks)
}

fn no_disk(wanted: &Wanted, why: &str) -> HandsError {
    let name = format!("{}/{}", wanted.point.group_name, wanted.volume.name);
    HandsError::new(format!("{name}: {why}"), format!("say which disk gets it: --disk {name}=/dev/…"))
}

/// A disk for each volume by its size, where that leaves no choice.
fn fitting(wanted: &[Wanted], disks: &[TargetDisk]) -> Result<Vec<BackDisk>, HandsError> {
    let mut found: Vec<BackDisk> = Vec::new();
    for w in wanted {
        let bytes = w.volume.sectors.0 * SECTOR;
        let same = wanted.iter().filter(|other| other.volume.sectors == w.volume.sectors).count();
        let mut fits = disks.iter().filter(|d| d.bytes.0 == bytes && d.in_use.is_none());
        let (Some(disk), None, 1) = (fits.next(), fits.next(), same) else {
            return Err(no_disk(w, "no disk of the target, or more than one, has just its size"));
        };
        found.push(BackDisk { group: w.point.group, volume: w.volume.name.clone(), path: disk.path.clone() });
    }
    Ok(found)
}

fn trouble(e: &RestoreFault) -> HandsError {
    HandsError::new(crate::chain(e), "look at `holdfast restore targets`")
}

pub fn shipping(app: &App, restore: &str) -> Result<Shipping, HandsError> {
    let status = app.restores.status(restore).map_err(|e| trouble(&e))?;
    Ok(match status.phase {
        RestorePhase::Waiting { why } => Shipping::Waiting { why },
        RestorePhase::Keeping { .. } | RestorePhase::Copying { .. } => Shipping::Copying,
        RestorePhase::Following { pass, behind_bytes, .. } => Shipping::Following { pass, behind_bytes },
        RestorePhase::Finishing { .. } => Shipping::Finishing,
        RestorePhase::Done { .. } | RestorePhase::Releasing { .. } | RestorePhase::Released { .. } => {
            Shipping::Done { shipped_bytes: status.shipped_bytes, same_bytes: status.same_bytes }
        }
        RestorePhase::Cancelled => Shipping::Failed {
            text: "the restore that ships it was cancelled".into(),
            remedy: "begin the failback again".into(),
        },
        RestorePhase::Failed { text, remedy } => Shipping::Failed { text, remedy },
    })
}

pub fn last(app: &App, restore: &str) -> Result<(), HandsError> {
    app.restores.finish(restore).map(drop).map_err(|e| trouble(&e))
}

/// Waits a while for the target's word: one that goes down may not get it out any more.
pub fn restart_target(app: &App, restore: &str) -> Result<(), HandsError> {
    app.restores.release(restore, true).map_err(|e| trouble(&e))?;
    let deadline = Instant::now() + TARGET_MAX;
    let told = || app.restores.status(restore).is_ok_and(|s| matches!(s.phase, RestorePhase::Released { .. }));
    while !told() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

pub fn cancel(app: &Arc<App>, restore: &str) -> Result<(), HandsError> {
    match app.restores.cancel(app, restore) {
        Ok(_) | Err(RestoreFault::Unknown(_) | RestoreFault::Over) => Ok(()),
        Err(e) => Err(trouble(&e)),
    }
}
