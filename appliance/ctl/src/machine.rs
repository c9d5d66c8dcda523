//! `holdfast restore GROUP --to MACHINE`: a machine that waits gets its disks' content back.
//!
//! What is going to be overwritten, and what it holds, is shown first and asked about. The restore runs on the box; this shows how far it is,
//! and Ctrl-C ends the showing, not the restore.

use crate::{
    api::Group,
    args::{RestoreArgs, RestoreCommand},
    client::{Client, Route},
    online::{self, print, print_json, print_table},
    picture::Table,
    times::Clock,
};
use anyhow::{Context as _, bail, ensure};
use http::Method;
use indicatif::{ProgressBar, ProgressStyle};
use model::{ByteLen, RecoveryPoint, SECTOR, VolumeSpec};
use serde_json::{Value, json};
use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    time::Duration,
};

const LOOK_EVERY: Duration = Duration::from_millis(300);

pub fn command(client: &Client, command: &RestoreCommand) -> anyhow::Result<()> {
    match command {
        RestoreCommand::Targets { json } => targets(client, *json),
        RestoreCommand::List { json } => list(client, *json),
        RestoreCommand::Show { id } => watch(client, id, false),
        RestoreCommand::Cancel { id } => {
            let status: Value = client.call(Method::POST, &Route::new(&["restores", id, "cancel"]), None)?;
            print(&format!("restore {} is {}\n", text(&status["id"]), text(&status["phase"]["is"])))
        }
    }
}

fn targets(client: &Client, as_json: bool) -> anyhow::Result<()> {
    let targets: Value = client.get(&Route::new(&["restore-targets"]))?;
    if as_json {
        return print_json(&targets);
    }
    let mut table = Table::new(&["MACHINE", "DISK", "SIZE", "MODEL, SERIAL", "HOLDS", ""]);
    let list = items(&targets);
    for target in &list {
        for disk in items(&target["disks"]) {
            table.row([
                text(&target["name"]),
                text(&disk["path"]),
                size(&disk),
                make(&disk),
                holds(&disk),
                used(&disk),
            ]);
        }
    }
    print_table(&table, "no machine waits: start `holdfast-agent rescue` on it, from any live Linux", list.len())
}

fn list(client: &Client, as_json: bool) -> anyhow::Result<()> {
    let restores: Value = client.get(&Route::new(&["restores"]))?;
    if as_json {
        return print_json(&restores);
    }
    let clock = Clock::local();
    let mut table = Table::new(&["RESTORE", "MACHINE", "BEGUN", "IS", "SENT"]);
    let list = items(&restores);
    for restore in &list {
        let (begun, sent) = (restore["begun_us"].as_u64(), restore["shipped_bytes"].as_u64());
        table.row([
            text(&restore["id"]),
            text(&restore["target_name"]),
            begun.map_or_else(String::new, |us| clock.show(us)),
            text(&restore["phase"]["is"]),
            ByteLen(sent.unwrap_or_default()).to_string(),
        ]);
    }
    print_table(&table, "nothing was restored to a machine yet", list.len())
}

/// A volume and the disk that gets it.
struct Map<'a> {
    group: &'a Group,
    volume: &'a VolumeSpec,
    disk: Value,
}

pub fn restore(client: &Client, args: &RestoreArgs) -> anyhow::Result<()> {
    let clock = Clock::local();
    let point = clock.point(args.at.as_deref().unwrap_or("latest"))?;
    let groups = online::groups(client)?;
    let chosen = choose(&groups, &args.groups)?;
    one_moment(&point, chosen.len())?;
    let Some(wanted) = args.to.as_ref().and_then(|to| to.to.to_str()) else {
        bail!("the machine is missing, or its name is no text")
    };
    let targets: Value = client.get(&Route::new(&["restore-targets"]))?;
    let target = items(&targets).into_iter().find(|t| t["name"] == wanted || t["host"] == wanted);
    let target = target.with_context(|| {
        format!("no machine {wanted:?} waits for a restore: start `holdfast-agent rescue` on it, then `holdfast restore targets`")
    })?;
    let maps = map(&chosen, &args.disks, &items(&target["disks"]))?;
    show(&target, &maps)?;
    if !args.yes {
        confirm(wanted)?;
    }
    let from: Vec<Value> = chosen.iter().map(|g| json!({ "point": { "group": g.id, "at": point } })).collect();
    let disks: Vec<Value> =
        maps.iter().map(|m| json!({ "group": m.group.id, "volume": m.volume.id, "path": m.disk["path"] })).collect();
    let wish = json!({ "target": target["host"], "from": from, "disks": disks });
    let begun: Value = client.call(Method::POST, &Route::new(&["restores"]), Some(&wish))?;
    let id = text(&begun["id"]);
    eprintln!(
        "restore {id}; it goes on when this is interrupted: `holdfast restore show {id}`, `holdfast restore cancel {id}`"
    );
    watch(client, &id, true)?;
    let release = json!({ "reboot": args.reboot });
    let _: Value = client.call(Method::POST, &Route::new(&["restores", &id, "release"]), Some(&release))?;
    print(match args.reboot {
        true => "the machine is started anew\n",
        false => "the machine has let its disks go; start it anew without the rescue medium\n",
    })
}

/// Groups by name, or all groups of a host by the host's.
fn choose<'a>(groups: &'a [Group], names: &[String]) -> anyhow::Result<Vec<&'a Group>> {
    let mut chosen: Vec<&Group> = Vec::new();
    for name in names {
        let of_host: Vec<&Group> = groups.iter().filter(|g| g.host_name.as_deref() == Some(name)).collect();
        let is_group = groups.iter().any(|g| g.name == *name || g.id == *name);
        let found =
            if is_group || of_host.is_empty() { vec![online::pick_group(groups, Some(name))?] } else { of_host };
        for group in found {
            ensure!(!chosen.iter().any(|g| g.id == group.id), "group {:?} is named twice", group.name);
            chosen.push(group);
        }
    }
    Ok(chosen)
}

/// Disks of several groups are restored as of one moment, or each as of its newest.
fn one_moment(point: &RecoveryPoint, groups: usize) -> anyhow::Result<()> {
    ensure!(
        groups == 1 || !matches!(point, RecoveryPoint::Lsn(_)),
        "an LSN is a position in one group's history, and {groups} groups are to be restored: give a time, or a bookmark that each of them has"
    );
    Ok(())
}

/// What was said with `--disk`, and for the rest the disk with the same serial, else the only one of the same size.
fn map<'a>(groups: &[&'a Group], said: &[String], disks: &[Value]) -> anyhow::Result<Vec<Map<'a>>> {
    let volumes: Vec<(&Group, &VolumeSpec)> =
        groups.iter().flat_map(|g| g.volumes.iter().map(move |v| (*g, v))).collect();
    let mut paths: Vec<Option<String>> = vec![None; volumes.len()];
    for text in said {
        let (name, path) = text
            .split_once('=')
            .with_context(|| format!("{text:?} names no volume and its disk: write it like /dev/sda=/dev/vda"))?;
        let fits = |(g, v): &(&Group, &VolumeSpec)| {
            let of_group = name.strip_prefix(&g.name).and_then(|rest| rest.strip_prefix('/'));
            [Some(name), of_group].into_iter().flatten().any(|name| v.name == name || v.id.to_string() == name)
        };
        let mut found = volumes.iter().enumerate().filter(|(_, gv)| fits(gv)).map(|(i, _)| i);
        let (first, second) = (found.next(), found.next());
        let at = first.with_context(|| format!("no volume {name:?} is restored"))?;
        ensure!(second.is_none(), "several volumes are called {name:?}: write GROUP/VOLUME=/dev/DISK");
        paths[at] = Some(path.to_owned());
    }
    let taken = |paths: &[Option<String>], disk: &Value| paths.iter().flatten().any(|p| disk["path"] == p.as_str());
    for at in 0..volumes.len() {
        if paths[at].is_some() {
            continue;
        }
        let (_, volume) = volumes[at];
        let free: Vec<&Value> = disks.iter().filter(|d| d["in_use"].is_null() && !taken(&paths, d)).collect();
        let same = |d: &&&Value| shares_identity(&volume.identity, d["identity"].as_str().unwrap_or_default());
        let sized: Vec<&&Value> = free.iter().filter(|d| d["bytes"] == volume.sectors.0 * SECTOR).collect();
        let disk = free.iter().find(same).copied().or(match sized[..] {
            [only] => Some(*only),
            _ => None,
        });
        let disk = disk.with_context(|| {
            format!("which disk gets {} ({})? Say it with --disk {}=/dev/…", volume.name, bytes(volume), volume.name)
        })?;
        paths[at] = disk["path"].as_str().map(str::to_owned);
    }
    let pair = |((group, volume), path): ((&'a Group, &'a VolumeSpec), Option<String>)| {
        let path = path.unwrap_or_default();
        let disk = disks.iter().find(|d| d["path"] == path.as_str()).cloned();
        let disk =
            disk.with_context(|| format!("the machine has no disk {path}: `holdfast restore targets` lists them"))?;
        Ok(Map { group, volume, disk })
    };
    volumes.into_iter().zip(paths).map(pair).collect()
}

/// `serial:X wwn:Y` and the like: one thing that a disk brings along is enough to know it again.
fn shares_identity(volume: &str, disk: &str) -> bool {
    let parts = |text: &str| text.split(' ').filter(|p| p.contains(':')).map(str::to_owned).collect::<Vec<_>>();
    let of_disk = parts(disk);
    parts(volume).iter().any(|p| of_disk.contains(p))
}

fn show(target: &Value, maps: &[Map<'_>]) -> anyhow::Result<()> {
    let mut table = Table::new(&["VOLUME", "SIZE", "", "DISK", "SIZE", "MODEL, SERIAL", "HOLDS", ""]);
    for map in maps {
        table.row([
            map.volume.name.clone(),
            bytes(map.volume).to_string(),
            "onto".into(),
            text(&map.disk["path"]),
            size(&map.disk),
            make(&map.disk),
            holds(&map.disk),
            used(&map.disk),
        ]);
    }
    let heading =
        format!("on {} at {}, everything these disks hold is lost:\n", text(&target["name"]), text(&target["address"]));
    print(&heading)?;
    print_table(&table, "", maps.len())
}

/// The name is typed, not a letter: this is the last look at it.
fn confirm(machine: &str) -> anyhow::Result<()> {
    ensure!(
        std::io::stdin().is_terminal(),
        "nobody can be asked whether this is to be overwritten; say --yes if it is"
    );
    print!("type the machine's name to overwrite them: ");
    std::io::stdout().flush()?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    ensure!(line.trim() == machine, "not restored: {:?} is not the machine's name", line.trim());
    Ok(())
}

/// Shows how far a restore is; to its end, or until it is done.
fn watch(client: &Client, id: &str, to_done: bool) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {msg}")?;
    let bar = ProgressBar::new(0).with_style(style);
    loop {
        let status: Value = client.get(&Route::new(&["restores", id]))?;
        let phase = &status["phase"];
        let number = |name: &str| phase[name].as_u64().unwrap_or_default();
        let sent = ByteLen(status["shipped_bytes"].as_u64().unwrap_or_default());
        match phase["is"].as_str().unwrap_or_default() {
            "failed" => {
                bar.finish_and_clear();
                bail!("restore {id} failed: {}; {}", text(&phase["text"]), text(&phase["remedy"]));
            }
            "cancelled" => {
                bar.finish_and_clear();
                bail!("restore {id} was cancelled; the disks hold a part of it");
            }
            "done" | "releasing" | "released" => {
                bar.finish_and_clear();
                return print(&format!("restore {id} is {}: {sent} sent, all of it compared\n", text(&phase["is"])));
            }
            "keeping" | "copying" => {
                bar.set_length(number("total_bytes"));
                bar.set_position(number("done_bytes"));
                bar.set_message(format!("{}, {sent} sent", text(&phase["is"])));
            }
            "waiting" => bar.set_message(text(&phase["why"])),
            "following" if !to_done => {
                bar.finish_and_clear();
                return print(&format!(
                    "restore {id} follows its source, {} behind\n",
                    ByteLen(number("behind_bytes"))
                ));
            }
            other => bar.set_message(format!("{other}, {} left", ByteLen(number("left_bytes")))),
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn bytes(volume: &VolumeSpec) -> ByteLen {
    ByteLen(volume.sectors.0 * SECTOR)
}
fn items(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}
/// What the box passes on from a machine: nothing of it may steer the terminal.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).collect()
}
fn size(disk: &Value) -> String {
    ByteLen(disk["bytes"].as_u64().unwrap_or_default()).to_string()
}
fn make(disk: &Value) -> String {
    [text(&disk["model"]), text(&disk["serial"])].join(" ").trim().to_owned()
}
fn holds(disk: &Value) -> String {
    if disk["holds"].is_null() { "nothing that is known".into() } else { text(&disk["holds"]) }
}
fn used(disk: &Value) -> String {
    if disk["in_use"].is_null() { String::new() } else { format!("not offered: {}", text(&disk["in_use"])) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{HistoryTime, Lsn, Sectors, VolumeId};

    fn group() -> Group {
        let volume = |id, name: &str, sectors, identity: &str| VolumeSpec {
            id: VolumeId(id),
            name: name.into(),
            sectors: Sectors(sectors),
            identity: identity.into(),
        };
        Group {
            id: "g".into(),
            name: "db".into(),
            volumes: vec![volume(0, "/dev/sda", 100, "serial:A wwn:1"), volume(1, "/dev/sdb", 200, "serial:B")],
            ..Group::default()
        }
    }
    fn disk(path: &str, sectors: u64, identity: &str) -> Value {
        json!({ "path": path, "bytes": sectors * 512, "identity": identity, "in_use": null })
    }
    fn paths(maps: anyhow::Result<Vec<Map<'_>>>) -> Result<Vec<String>, String> {
        let paths = |maps: Vec<Map<'_>>| maps.iter().map(|m| m.disk["path"].as_str().unwrap().to_owned()).collect();
        maps.map(paths).map_err(|e| e.to_string())
    }

    #[test]
    fn disks_are_found_by_serial_then_by_size_and_never_guessed() {
        let group = group();
        let groups = [&group];
        let both = [disk("/dev/x", 200, ""), disk("/dev/y", 999, "serial:A"), disk("/dev/z", 100, "")];
        assert_eq!(paths(map(&groups, &[], &both)), Ok(vec!["/dev/y".to_owned(), "/dev/x".to_owned()]));
        let twice = [disk("/dev/x", 200, ""), disk("/dev/y", 200, ""), disk("/dev/z", 100, "")];
        assert!(paths(map(&groups, &[], &twice)).unwrap_err().contains("which disk gets /dev/sdb"));
        let said = ["/dev/sdb=/dev/y".to_owned()];
        assert_eq!(paths(map(&groups, &said, &twice)), Ok(vec!["/dev/z".to_owned(), "/dev/y".to_owned()]));
        let mut used = both.clone();
        used[1]["in_use"] = json!("mounted at /");
        assert_eq!(paths(map(&groups, &[], &used)), Ok(vec!["/dev/z".to_owned(), "/dev/x".to_owned()]));
        assert!(paths(map(&groups, &["/dev/sdb".to_owned()], &both)).is_err());
        assert!(paths(map(&groups, &["/dev/sdq=/dev/x".to_owned()], &both)).is_err());
        assert!(paths(map(&groups, &["/dev/sdb=/dev/nothing".to_owned()], &both)).unwrap_err().contains("no disk"));
    }

    #[test]
    fn several_groups_are_restored_as_of_one_time_and_their_volumes_told_apart() {
        let (system, mut data) = (group(), group());
        (data.id, data.name) = ("h".into(), "db-data".into());
        data.volumes.truncate(1);
        data.volumes[0].sectors = Sectors(300);
        let mut groups = [system, data];
        groups.iter_mut().for_each(|g| g.host_name = Some("db1".into()));
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
            let chosen = choose(&groups, &wanted).map_err(|e| e.to_string());
            chosen.map(|list| list.iter().map(|g| g.name.clone()).collect::<Vec<_>>())
        };
        assert_eq!(names(&["db1"]), Ok(vec!["db".to_owned(), "db-data".into()]), "all of a host");
        assert_eq!(names(&["db-data"]), Ok(vec!["db-data".to_owned()]));
        assert!(names(&["db1", "db"]).unwrap_err().contains("twice"));
        assert!(names(&["nobody"]).is_err());

        assert!(one_moment(&RecoveryPoint::Lsn(Lsn(7)), 1).is_ok());
        assert!(one_moment(&RecoveryPoint::Lsn(Lsn(7)), 2).unwrap_err().to_string().contains("give a time"));
        assert!(one_moment(&RecoveryPoint::Time(HistoryTime(7)), 2).is_ok());

        let disks = [disk("/dev/x", 300, ""), disk("/dev/y", 200, ""), disk("/dev/z", 300, "")];
        let both: Vec<&Group> = groups.iter().collect();
        let twice = ["/dev/sda=/dev/x".to_owned()];
        assert!(paths(map(&both, &twice, &disks)).unwrap_err().contains("GROUP/VOLUME"));
        let said = ["db-data//dev/sda=/dev/x".to_owned(), "db//dev/sda=/dev/z".to_owned()];
        assert_eq!(paths(map(&both, &said, &disks)), Ok(["/dev/z", "/dev/y", "/dev/x"].map(str::to_owned).to_vec()));
    }
}
