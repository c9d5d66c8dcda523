//! How the command line shows what the agent says.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use model::ByteLen;
use serde_json::Value;
use std::{collections::HashMap, fmt::Write, time::Duration};

pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn bytes(value: &Value) -> String {
    ByteLen(value.as_u64().unwrap_or(0)).to_string()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn protected(value: &Value) {
    println!("protected as group {} ({})", text(&value["name"]), text(&value["group"]));
    for volume in list(&value["volumes"]) {
        println!("  {:<20} {:>10}  {}", text(&volume["device"]), bytes(&volume["bytes"]), text(&volume["why"]));
    }
    list(&value["notes"]).iter().for_each(|note| println!("{}", text(note)));
    println!("the first copy runs now: holdfast-agent status --watch");
}

fn lag(group: &Value) -> String {
    match (group["lag_ms"].as_u64(), group["unknown_for_ms"].as_u64()) {
        (Some(ms), _) => format!("lag {ms} ms"),
        (None, Some(ms)) => format!("lag unknown since {} s", ms / 1000),
        (None, None) => "nothing can be recovered yet".to_owned(),
    }
}

/// A few lines for each group.
pub fn status(value: &Value) -> String {
    let mut out = String::new();
    let connected = value["box"]["connected"].as_bool().unwrap_or(false);
    let how =
        if connected { "connected".to_owned() } else { format!("not connected: {}", text(&value["box"]["reason"])) };
    let _ = writeln!(out, "box      {} ({}), {how}", text(&value["box"]["name"]), text(&value["box"]["address"]));
    let _ = writeln!(
        out,
        "capture  {}, ring {} of {}, agent memory {}",
        text(&value["backend"]),
        bytes(&value["ring"]["used_bytes"]),
        bytes(&value["ring"]["size_bytes"]),
        bytes(&value["rss_bytes"])
    );
    let count = |key: &str| value["capture"][key].as_u64().unwrap_or(0);
    if count("dropped") > 0 {
        let _ = writeln!(out, "         {} writes did not fit the ring and were copied instead", count("dropped"));
    }
    if count("passthrough") > 0 {
        let _ = writeln!(
            out,
            "         {} commands went to protected disks past the block layer; what they wrote, if anything, was not captured",
            count("passthrough")
        );
    }
    let rpo = &value["protect_rpo"];
    if let Some(why) = rpo["why"].as_str() {
        let _ = writeln!(out, "         other programs may write {} MiB/s each: {why}", rpo["mib_s"]);
    }
    if let Some(trouble) = rpo["trouble"].as_str().filter(|t| !t.is_empty()) {
        let _ = writeln!(out, "         other programs cannot be held back: {trouble}");
    }
    let groups = list(&value["groups"]);
    if groups.is_empty() {
        out.push_str("nothing is protected: holdfast-agent protect DEVICE\n");
    }
    for group in groups {
        let _ = writeln!(out, "group    {}: {}", text(&group["name"]), text(&group["state"]));
        if let Some(reason) = group["reason"].as_str().filter(|r| !r.is_empty()) {
            let _ = writeln!(out, "         {reason}");
        }
        for volume in list(&group["volumes"]) {
            let _ = writeln!(out, "         {} {}", text(&volume["device"]), bytes(&volume["bytes"]));
        }
        if group["state"] == "stopped" {
            continue;
        }
        let _ = writeln!(
            out,
            "         {}, spool {} of {}, to copy {}, captured {}",
            lag(group),
            bytes(&group["spool_bytes"]),
            bytes(&group["spool_bytes_max"]),
            bytes(&group["dirty_bytes"]),
            bytes(&group["captured_bytes"])
        );
        if let Some(gate) = group["gate"].as_str() {
            let _ = writeln!(out, "         writes of the host: {gate}");
        }
        if let Some(held) = group["pressure"].as_str().filter(|p| *p != "none") {
            let _ = writeln!(out, "         {held}");
        }
        if group["surveying"] == true {
            let _ = writeln!(out, "         asking the file systems what they do not use; copying begins then");
        }
        if group["unused_bytes"].as_u64() > Some(0) {
            let _ = writeln!(
                out,
                "         {} were not copied: no file system used them (copy = \"allocated\")",
                bytes(&group["unused_bytes"])
            );
        }
        for why in list(&group["copied_whole"]) {
            let _ = writeln!(out, "         {}", text(why));
        }
        if let Some(note) = group["spool_note"].as_str().filter(|n| !n.is_empty()) {
            let _ = writeln!(out, "         {note}");
        }
    }
    out
}

/// One line for each group, redrawn each second, until interrupted.
pub fn watch(mut ask: impl FnMut() -> Result<Value, agent_linux::local::AskError>) -> anyhow::Result<()> {
    let all = MultiProgress::new();
    let mut bars: HashMap<String, ProgressBar> = HashMap::new();
    let copying = ProgressStyle::with_template("{prefix:<24} {bar:30} {bytes}/{total_bytes} {msg}")?;
    let steady = ProgressStyle::with_template("{prefix:<24} {msg}")?;
    loop {
        let value = ask()?;
        let groups = list(&value["groups"]);
        if groups.is_empty() {
            println!("nothing is protected");
            return Ok(());
        }
        let names: Vec<String> = groups.iter().map(|g| text(&g["name"])).collect();
        bars.retain(|name, bar| {
            let stays = names.contains(name);
            if !stays {
                bar.finish_and_clear();
            }
            stays
        });
        for (name, group) in names.into_iter().zip(groups) {
            let bar = bars.entry(name.clone()).or_insert_with(|| all.add(ProgressBar::new(0)));
            bar.set_prefix(name);
            let total = group["sync_total_bytes"].as_u64().unwrap_or(0);
            bar.set_style(if total > 0 { copying.clone() } else { steady.clone() });
            bar.set_length(total);
            bar.set_position(group["sync_done_bytes"].as_u64().unwrap_or(0));
            let mut message = format!("{}, {}", text(&group["state"]), lag(group));
            if let Some(reason) = group["reason"].as_str().filter(|r| !r.is_empty()) {
                message.push_str(&format!(" ({reason})"));
            }
            bar.set_message(message);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
