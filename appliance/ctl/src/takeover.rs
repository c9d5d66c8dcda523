//! Plans, takeovers and drills: `holdfast plan`, `takeover`, `drill`, `run`.
//!
//! A takeover or a drill is watched until it serves, is over or has failed: each step as it ends, with the time since the decision, and at
//! the end what was measured and who is authoritative. Ctrl-C ends the watching, not the run.

use crate::{
    args::{DrillArgs, FailbackArgs, MigrateArgs, OwnerName, PlaceName, PlanCommand, RunCommand, TakeoverArgs},
    client::{Client, Route},
    online::{print, print_json},
    picture::Table,
    times::Clock,
};
use anyhow::{Context as _, bail};
use http::Method;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    path::Path,
    time::Duration,
};

const LOOK_EVERY: Duration = Duration::from_millis(200);

pub fn plan(client: &Client, command: PlanCommand) -> anyhow::Result<()> {
    match command {
        PlanCommand::List { json } => {
            let plans: Value = client.get(&Route::new(&["plans"]))?;
            if json {
                return print_json(&plans);
            }
            let mut table = Table::new(&["PLAN", "FOR", "MACHINE", "APPLICATIONS"]);
            let list = plans.as_array().cloned().unwrap_or_default();
            for entry in &list {
                let plan = &entry["plan"];
                let name = text(&entry["name"]);
                if let Some(fault) = entry["fault"].as_str() {
                    table.row([name, fault.to_owned(), String::new(), String::new()]);
                    continue;
                }
                let subject = match plan["subject"]["host"].as_str() {
                    Some(host) => host.to_owned(),
                    None => names(&plan["subject"]["groups"]),
                };
                let size = &plan["machine"]["size"];
                table.row([
                    name,
                    subject,
                    format!("{} CPUs, {} MiB", size["cpus"], size["memory_mib"]),
                    plan["applications"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .map(|a| text(&a["name"]))
                        .collect::<Vec<_>>()
                        .join(", "),
                ]);
            }
            crate::online::print_table(&table, "no plan yet: `holdfast plan example` prints one", list.len())
        }
        PlanCommand::Example => {
            print(&String::from_utf8_lossy(&client.raw(Method::GET, &Route::new(&["plan-example"]), "")?))
        }
        PlanCommand::Show { name } => {
            print(&String::from_utf8_lossy(&client.raw(Method::GET, &Route::new(&["plans", &name]), "")?))
        }
        PlanCommand::Set { name, file } => {
            client.raw(Method::PUT, &Route::new(&["plans", &name]), &read_plan(&file)?)?;
            print(&format!("plan {name} is kept; `holdfast drill {name}` tries it\n"))
        }
        PlanCommand::Check { file } => {
            client.raw(Method::PUT, &Route::new(&["plans", "check"]).query("check", "1"), &read_plan(&file)?)?;
            print("the plan makes sense; nothing was kept\n")
        }
        PlanCommand::Delete { name } => {
            let _: Value = client.call(Method::DELETE, &Route::new(&["plans", &name]), None)?;
            print(&format!("plan {name} is deleted\n"))
        }
        PlanCommand::Status { name, json } => {
            let all: Value = client.get(&Route::new(&["plan-status"]))?;
            let of: Vec<Value> = all.as_array().cloned().unwrap_or_default();
            let of: Vec<Value> =
                of.into_iter().filter(|e| name.is_none() || e["plan"].as_str() == name.as_deref()).collect();
            if json {
                return print_json(&json!(of));
            }
            if of.is_empty() {
                return print(
                    "no plan leases or watches a host: see [lease] and [detect] in `holdfast plan example`\n",
                );
            }
            print(&of.iter().map(status_lines).collect::<String>())
        }
        PlanCommand::Owner { host, owner, confirm } => {
            let owner = if owner == OwnerName::Host { "host" } else { "box" };
            let body = json!({ "owner": owner, "confirm": confirm });
            let _: Value = client.call(Method::POST, &Route::new(&["owners", &host]), Some(&body))?;
            print(&format!("the {owner} owns {host} now\n"))
        }
    }
}

/// One host: who owns it, what is seen of it, why.
fn status_lines(entry: &Value) -> String {
    let (owned, seen) = (&entry["ownership"], &entry["seen"]);
    let mut lines = format!("{} (plan {})\n", text(&entry["host"]), entry["plan"].as_str().unwrap_or("none"));
    let mut line = |title: &str, said: String| lines += &format!("  {title:<12} {said}\n");
    if !owned.is_null() {
        line("owner", format!("{}, term {}", text(&owned["owner"]), owned["term"]));
        let rules = match owned["rules"]["lease_ms"].as_u64() {
            Some(ms) => format!(" ({:.1} s)", ms as f64 / 1000.0),
            None => String::new(),
        };
        let holding = owned["holding"].as_str().map(|h| format!(", {h} {} ago", seconds(&owned["holding_age_ms"])));
        line("lease", format!("{}{rules}{}", text(&owned["hold"]), holding.unwrap_or_default()));
        if owned["waits_ms"].is_u64() {
            line("waits", format!("{} at most", seconds(&owned["waits_ms"])));
        }
        match owned["why_not"].as_str() {
            Some(why) => line("fenced", format!("not by its lease: {why}")),
            None if owned["fences"] == true => line("fenced", "by its lease".into()),
            None => {}
        }
    }
    let standby = &entry["standby"];
    if !standby.is_null() {
        let lag = match standby["lag_seconds"].as_u64() {
            Some(lag @ 1..) => format!(", {lag} s late by choice"),
            _ => String::new(),
        };
        line("standby", format!("{}{lag}: {}", text(&standby["host"]), text(&standby["state"])));
    }
    if !seen.is_null() {
        line("seen", text(&seen["text"]));
        for reason in seen["reasons"].as_array().into_iter().flatten() {
            let advisory = if reason["advisory"] == true { " (advisory)" } else { "" };
            let points = text(&reason["points"]).replace("neither", "");
            line(
                "",
                format!("{points:<8} {} (since {}){advisory}", text(&reason["text"]), seconds(&reason["since_ms"])),
            );
        }
        for probe in seen["probes"].as_array().into_iter().flatten() {
            let why = Some(text(&probe["why"])).filter(|w| !w.is_empty()).map(|w| format!(": {w}")).unwrap_or_default();
            let age = seconds(&probe["age_ms"]);
            line(
                "probe",
                format!("{} {}{why} ({} ms, {age} ago)", text(&probe["name"]), text(&probe["end"]), probe["took_ms"]),
            );
            for printed in probe["output"].as_str().unwrap_or_default().lines() {
                line("", format!("  | {printed}"));
            }
        }
        match seen["in_the_way"].as_str() {
            Some(why) => line("by itself", format!("no: {why}")),
            None => line("by itself", "yes".into()),
        }
        if let Some(alarm) = seen["alarm"].as_str() {
            line("ALARM", alarm.to_owned());
        }
    }
    for alert in owned["alerts"].as_array().into_iter().flatten() {
        line("ALARM", text(alert));
    }
    lines
}

fn read_plan(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut plan = String::new();
        std::io::stdin().read_to_string(&mut plan).context("read the plan from standard input")?;
        return Ok(plan);
    }
    std::fs::read_to_string(file).with_context(|| format!("read the plan {}", file.display()))
}

pub fn takeover(client: &Client, args: &TakeoverArgs) -> anyhow::Result<()> {
    let body = json!({
        "plan": args.plan,
        "kind": "failover",
        "source_is_off": args.source_is_off.then(who),
        "dry_run": args.dry_run,
    });
    begin(client, body, args.at.as_deref(), args.dry_run, args.json)
}

pub fn migrate(client: &Client, args: &MigrateArgs) -> anyhow::Result<()> {
    let to = args.to.map(|to| if to == PlaceName::Box { "box" } else { "export" });
    let body = json!({ "plan": args.plan, "kind": "failover", "planned": true, "to": to, "dry_run": args.dry_run });
    begin(client, body, None, args.dry_run, args.json)
}

fn who() -> String {
    std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| "root".into())
}

pub fn drill(client: &Client, args: &DrillArgs) -> anyhow::Result<()> {
    let body = json!({ "plan": args.plan, "kind": "drill", "hold": args.hold, "dry_run": args.dry_run });
    begin(client, body, args.at.as_deref(), args.dry_run, args.json)
}

fn begin(client: &Client, mut body: Value, at: Option<&str>, dry_run: bool, json: bool) -> anyhow::Result<()> {
    if let Some(at) = at {
        body["at"] = serde_json::to_value(Clock::local().point(at)?).context("write the moment down")?;
    }
    let begun: Value = client.call(Method::POST, &Route::new(&["runs"]), Some(&body))?;
    if json {
        return print_json(&begun);
    }
    if dry_run {
        let mut lines = String::from("would do, in this order; nothing was touched:\n");
        for step in begun["steps"].as_array().into_iter().flatten() {
            lines += &format!("  {}\n", text(&step["title"]));
        }
        return print(&lines);
    }
    watch(client, &text(&begun["id"]))
}

/// Begins a failback, after the target's disks were shown and somebody agreed to lose what they hold.
pub fn failback(client: &Client, args: &FailbackArgs) -> anyhow::Result<()> {
    let runs: Value = client.get(&Route::new(&["runs"]))?;
    let mut serving = runs.as_array().into_iter().flatten().filter(|run| {
        let named = [&run["id"], &run["plan_name"], &run["plan"]["subject"]["host"]];
        run["kind"] == "failover" && run["phase"]["is"] == "serving" && named.contains(&&json!(args.what))
    });
    let Some(run) = serving.next() else {
        bail!("no takeover of {:?} serves\n  what to do: `holdfast run list` shows all of them", args.what);
    };
    let id = text(&run["id"]);
    let targets: Value = client.get(&Route::new(&["restore-targets"]))?;
    let target = targets
        .as_array()
        .into_iter()
        .flatten()
        .find(|target| target["name"] == json!(args.to) || target["host"] == json!(args.to))
        .with_context(|| {
            format!(
                "no restore target {:?} is connected\n  what to do: start the machine from a rescue medium and run `holdfast-agent rescue` on it",
                args.to
            )
        })?;
    let mut lines = format!("{} has these disks:\n", args.to);
    for disk in target["disks"].as_array().into_iter().flatten() {
        let holds = disk["in_use"].as_str().or(disk["holds"].as_str()).unwrap_or("nothing that is known");
        lines += &format!("  {:<16} {:>15} bytes  {holds}\n", text(&disk["path"]), disk["bytes"]);
    }
    eprint!("{lines}");
    if !args.yes {
        agree(&format!("What those that get a volume hold is overwritten. Type {:?} to go on: ", args.to), &args.to)?;
    }
    let body = json!({
        "target": args.to,
        "disks": back_disks(run, &args.disks)?,
        "by": who(),
        "commit_minutes": args.commit_minutes,
    });
    let begun: Value = client.call(Method::POST, &Route::new(&["runs", &id, "failback"]), Some(&body))?;
    if args.json {
        return print_json(&begun);
    }
    watch_back(client, &id)
}

fn agree(question: &str, word: &str) -> anyhow::Result<()> {
    if !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        bail!("disks are overwritten, and nobody is there to be asked\n  what to do: repeat it with --yes");
    }
    eprint!("{question}");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("read the answer")?;
    if line.trim() != word {
        bail!("nothing was done");
    }
    Ok(())
}

/// `GROUP/VOLUME=DISK` or, where that is plain, `VOLUME=DISK`.
fn back_disks(run: &Value, words: &[String]) -> anyhow::Result<Vec<Value>> {
    let points = run["points"].as_array().cloned().unwrap_or_default();
    words
        .iter()
        .map(|word| {
            let (volume, path) = word.split_once('=').with_context(|| format!("{word:?} is not VOLUME=DISK"))?;
            let named = volume.split_once('/');
            let group = match named {
                Some((group, _)) => points.iter().find(|p| p["group_name"] == group),
                None if points.len() == 1 => points.first(),
                None => bail!("{word:?} does not say of which group: give GROUP/VOLUME=DISK"),
            };
            let group = group.with_context(|| format!("the takeover has no group of {word:?}"))?;
            Ok(json!({ "group": group["group"], "volume": named.map_or(volume, |(_, v)| v), "path": path }))
        })
        .collect()
}

/// Shows a failback's steps as they end, until the host serves or the machine does again.
fn watch_back(client: &Client, id: &str) -> anyhow::Result<()> {
    let mut shown = BTreeSet::new();
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
    loop {
        let run: Value = match client.get(&Route::new(&["runs", id])) {
            Ok(run) => run,
            Err(e) if e.is_away() => {
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        let back = &run["failback"];
        let mut now = String::new();
        for step in back["steps"].as_array().into_iter().flatten() {
            match step["outcome"]["is"].as_str() {
                Some("running") => {
                    let waits = run["now"].as_str().map_or_else(|| progress(&run["shipping"]), str::to_owned);
                    now = format!("{} {waits}", text(&step["title"]));
                }
                Some(_) if shown.insert(text(&step["step"])) => {
                    if terminal {
                        print("\r\x1b[K")?;
                    }
                    print(&step_line(back, step))?;
                }
                _ => {}
            }
        }
        if let Some(stuck) = run["stuck"].as_str() {
            bail!("the failback does not go on: {stuck}");
        }
        match run["phase"]["is"].as_str().unwrap_or_default() {
            "failing-back" => {}
            "returned" => {
                if let Some(note) = back["note"].as_str() {
                    bail!("{note}");
                }
                let down = seconds(&back["down_ms"]);
                return print(&format!(
                    "\nthe host serves; nothing served for {down}\n  `holdfast run commit {id}` when it does well, else `holdfast run rollback {id}`; \
                     rolled back by itself after {} min\n",
                    back["commit_minutes"]
                ));
            }
            _ => bail!("{}", back["ended"]["why"].as_str().unwrap_or("the failback has ended")),
        }
        if !terminal && now.contains("run stopped") {
            return print(&format!("{now}\n"));
        }
        if terminal && !now.is_empty() {
            print(&format!("\r\x1b[K{:>8}  {now} …", "")).and_then(|()| Ok(std::io::stdout().flush()?))?;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn progress(shipping: &Value) -> String {
    let (done, total) = (shipping["done_bytes"].as_u64(), shipping["total_bytes"].as_u64());
    match (done, total) {
        (Some(done), Some(total)) if total > 0 => format!("{} of {} MiB", done >> 20, total >> 20),
        _ => shipping["why"].as_str().unwrap_or_default().to_owned(),
    }
}

pub fn run(client: &Client, command: RunCommand) -> anyhow::Result<()> {
    match command {
        RunCommand::List { json } => {
            let runs: Value = client.get(&Route::new(&["runs"]))?;
            if json {
                return print_json(&runs);
            }
            let mut table = Table::new(&["RUN", "KIND", "PLAN", "BEGUN", "IS", "SERVING AFTER"]);
            let list = runs.as_array().cloned().unwrap_or_default();
            for run in &list {
                table.row([
                    text(&run["id"]),
                    text(&run["kind"]),
                    text(&run["plan_name"]),
                    Clock::local().show_seconds(run["begun_us"].as_u64().unwrap_or_default()),
                    phase(run),
                    seconds(&run["measured"]["serving_ms"]),
                ]);
            }
            crate::online::print_table(&table, "no takeover and no drill yet", list.len())
        }
        RunCommand::Show { id, json } => {
            let run: Value = client.get(&Route::new(&["runs", &id]))?;
            if json {
                return print_json(&run);
            }
            let mut lines = String::new();
            for step in run["steps"].as_array().into_iter().flatten() {
                lines += &step_line(&run, step);
            }
            if run["export"].is_object() {
                lines += &open_lines(&run);
            }
            print(&(lines + &summary(&run)))
        }
        RunCommand::Watch { id } => watch(client, &id),
        RunCommand::Again { id, source_is_off } => {
            let body = json!({ "source_is_off": source_is_off.then(who) });
            let _: Value = client.call(Method::POST, &Route::new(&["runs", &id, "again"]), Some(&body))?;
            watch(client, &id)
        }
        RunCommand::Promote { id, source_is_off, confirm } => {
            let body = json!({ "confirm": confirm, "source_is_off": source_is_off.then(who) });
            let _: Value = client.call(Method::POST, &Route::new(&["runs", &id, "promote"]), Some(&body))?;
            watch(client, &id)
        }
        RunCommand::Serves { id } => {
            say(client, &id, "serves")?;
            watch(client, &id)
        }
        RunCommand::Stopped { id } => {
            say(client, &id, "stopped")?;
            watch_back(client, &id)
        }
        RunCommand::Commit { id } => {
            say(client, &id, "commit")?;
            print(&format!("run {id} is committed; what its machine wrote goes when the host's own history holds it\n"))
        }
        RunCommand::Rollback { id, source_is_off } => {
            let body = json!({ "by": who(), "source_is_off": source_is_off.then(who) });
            let _: Value = client.call(Method::POST, &Route::new(&["runs", &id, "rollback"]), Some(&body))?;
            watch(client, &id)
        }
        RunCommand::End { id, confirm } => {
            let body = json!({ "confirm": confirm });
            let _: Value = client.call(Method::POST, &Route::new(&["runs", &id, "end"]), Some(&body))?;
            loop {
                let run: Value = client.get(&Route::new(&["runs", &id]))?;
                if run["phase"]["is"] == "ended" {
                    return print(&format!("run {id} is over; what its machine wrote is gone\n"));
                }
                if let Some(stuck) = run["stuck"].as_str() {
                    bail!("run {id} could not be ended: {stuck}");
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
        RunCommand::Evidence { id, dir } => {
            std::fs::create_dir_all(&dir).with_context(|| format!("make the folder {}", dir.display()))?;
            for (what, file) in [
                ("screen", "screen.png"),
                ("serial", "serial.log"),
                ("record", "record.json"),
                ("signature", "record.sig"),
            ] {
                match client.raw(Method::GET, &Route::new(&["runs", &id, what]), "") {
                    Ok(bytes) => {
                        let path = dir.join(file);
                        std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
                        print(&format!("{}\n", path.display()))?;
                    }
                    // Not every run comes so far.
                    Err(e) if e.code() == Some("no-evidence") => print(&format!("no {file} yet\n"))?,
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(())
        }
    }
}

/// Somebody's word about a run.
fn say(client: &Client, id: &str, what: &str) -> anyhow::Result<()> {
    let body = json!({ "by": who() });
    let _: Value = client.call(Method::POST, &Route::new(&["runs", id, what]), Some(&body))?;
    Ok(())
}

/// Shows each step as it ends, until the run serves, is over or has failed.
fn watch(client: &Client, id: &str) -> anyhow::Result<()> {
    let mut shown = BTreeSet::new();
    let (mut away, mut open) = (false, false);
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
    loop {
        let run: Value = match client.get(&Route::new(&["runs", id])) {
            Ok(run) => run,
            // The run goes on without us, and over a restart of the daemon.
            Err(e) if e.is_away() => {
                if !std::mem::replace(&mut away, true) {
                    print("the box does not answer; waiting\n")?;
                }
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        away = false;
        let mut now = String::new();
        for step in run["steps"].as_array().into_iter().flatten() {
            let name = text(&step["step"]);
            match step["outcome"]["is"].as_str() {
                Some("running") => {
                    now = text(&step["title"]);
                    if let Some(waits) = run["now"].as_str() {
                        now = format!("{now}: {waits}");
                    }
                }
                Some(_) if shown.insert(name) => {
                    if terminal {
                        print("\r\x1b[K")?;
                    }
                    print(&step_line(&run, step))?;
                }
                _ => {}
            }
        }
        let is = run["phase"]["is"].as_str().unwrap_or_default();
        if is == "working"
            && run["export"].is_object()
            && now.contains("run serves")
            && !std::mem::replace(&mut open, true)
        {
            print(&open_lines(&run))?;
            if !terminal {
                // Nobody there would see that it waits for a person.
                return Ok(());
            }
        }
        if let Some(stuck) = run["stuck"].as_str() {
            bail!("the run does not go on: {stuck}");
        }
        if matches!(is, "serving" | "failed" | "ended") {
            print(&summary(&run))?;
            let failure = run["steps"].as_array().into_iter().flatten().find(|s| s["outcome"]["is"] == "failed");
            if let Some(step) = failure {
                let outcome = &step["outcome"];
                bail!(
                    "could not {}: {}\n  what to do: {}",
                    text(&step["title"]),
                    text(&outcome["text"]),
                    text(&outcome["remedy"])
                );
            }
            return Ok(());
        }
        if terminal && !now.is_empty() {
            print(&format!("\r\x1b[K{:>8}  {now} …", "")).and_then(|()| Ok(std::io::stdout().flush()?))?;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// How another hypervisor opens a run's disks.
fn open_lines(run: &Value) -> String {
    let export = &run["export"];
    let mut lines = String::from("\nits disks are open to another hypervisor:\n");
    for disk in export["disks"].as_array().into_iter().flatten() {
        let tls = disk["tls"].as_str().map(|at| format!(", over TLS at {at}")).unwrap_or_default();
        let (name, socket) = (text(&disk["export_name"]), text(&disk["unix_socket"]));
        lines += &format!("  {}: NBD export {name}, on this box {socket}{tls}\n", text(&disk["volume"]));
    }
    if let Some(cert) = export["client_cert"].as_str() {
        lines += &format!("for TLS first: {cert}\n");
    }
    let words: Vec<&str> = export["qemu"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    lines += &format!("QEMU:\n  qemu-system-x86_64 {}\n", words.join(" ").replace(" -", " \\\n    -"));
    lines += &format!("libvirt:\n  {}\n", text(&export["libvirt"]).trim().replace('\n', "\n  "));
    lines + &format!("start the machine, see that it serves, then: holdfast run serves {}\n", text(&run["id"]))
}

fn step_line(run: &Value, step: &Value) -> String {
    let outcome = &step["outcome"];
    let (mark, said) = match outcome["is"].as_str() {
        Some("done") => ("", text(&outcome["text"])),
        Some("skipped") => return String::new(),
        Some("running") => ("", run["now"].as_str().unwrap_or("…").to_owned()),
        _ => ("FAILED: ", text(&outcome["text"])),
    };
    let begun = run["begun_us"].as_u64().unwrap_or_default();
    let at = step["ended_us"].as_u64().unwrap_or_default().saturating_sub(begun) as f64 / 1e6;
    format!("{at:>7.1} s  {}: {mark}{said}\n", text(&step["title"]))
}

fn summary(run: &Value) -> String {
    let measured = &run["measured"];
    let mut lines =
        format!("\nrun {} ({} of {}): {}\n", text(&run["id"]), text(&run["kind"]), text(&run["plan_name"]), phase(run));
    if let Some(decision) = run["decision"].as_str() {
        lines += &format!("  begun with no hand on it: {}\n", decision.replace('\n', "\n  "));
    }
    for (title, key) in [
        ("from the last that was heard to the decision", "detection_ms"),
        ("age of the moment at the decision (RPO)", "point_age_ms"),
        ("nobody served for (migration)", "pause_ms"),
        ("first instruction", "first_instruction_ms"),
        ("booted", "booted_ms"),
        ("address answers (NRO)", "address_ms"),
        ("applications answer (RTO)", "serving_ms"),
    ] {
        if !measured[key].is_null() {
            lines += &format!("  {title:<42} {}\n", seconds(&measured[key]));
        }
    }
    lines += &format!("  {:<42} {}\n", "authoritative", text(&run["authority"]));
    if run["phase"]["is"] == "serving" || run["phase"]["is"] == "failed" {
        lines += &format!(
            "  `holdfast run end {}` takes its machine down and throws away what it wrote\n",
            text(&run["id"])
        );
    }
    lines
}

fn phase(run: &Value) -> String {
    let phase = &run["phase"];
    match phase["is"].as_str().unwrap_or_default() {
        "failed" => format!("failed at {}", text(&phase["step"])),
        "ended" => text(&phase["how"]),
        other => other.to_owned(),
    }
}

fn seconds(ms: &Value) -> String {
    ms.as_u64().map_or_else(|| "–".to_owned(), |ms| format!("{:.1} s", ms as f64 / 1000.0))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn names(list: &Value) -> String {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
}
