//! The box at a glance.

use crate::{
    api::{Group, Host, Status},
    online::{closes, held_by, plain},
    picture::{Canvas, Table, count, grouped},
    times::{Clock, show_span_us},
};
use model::{ByteLen, GroupPolicy, SyncMode};
use std::collections::{BTreeMap, VecDeque};

/// Views listed on the page; a script that forgets them opens more.
const VIEWS_SHOWN: usize = 8;
/// Samples of lag kept per group: one a second, a minute of them fits a line.
const LAG_SAMPLES: usize = 60;

/// Lag as it was while someone watched.
#[derive(Debug, Default)]
pub struct LagHistory(BTreeMap<String, VecDeque<Option<u64>>>);

impl LagHistory {
    pub fn note(&mut self, status: &Status) {
        self.0.retain(|id, _| status.groups.iter().any(|group| group.id == *id));
        for group in &status.groups {
            let samples = self.0.entry(group.id.clone()).or_default();
            samples.push_back(group.lag_ms);
            if samples.len() > LAG_SAMPLES {
                samples.pop_front();
            }
        }
    }
    fn curve(&self, group: &str, canvas: Canvas) -> Option<String> {
        let samples = self.0.get(group).filter(|samples| samples.len() > 1)?;
        // A lag of nothing is still a lag that was measured: draw it as the lowest step.
        let values: Vec<f64> = samples.iter().map(|ms| ms.map_or(0.0, |ms| ms as f64 + 0.001)).collect();
        Some(canvas.curve(&values))
    }
}

/// The whole page; `lag` adds a curve to groups that were watched for a while.
pub fn render(status: &Status, lag: &LagHistory, clock: &Clock, canvas: Canvas) -> String {
    let mut lines = vec![headline(status, canvas)];
    lines.push(format!("  data in {}, CA {}", status.data_dir, status.ca_fingerprint));
    if let Some(listen) = &status.listen {
        lines.push(format!("  agents connect to {listen}"));
    }
    if let Some(device) = &status.journal_device {
        lines.push(format!(
            "  journals on {}, write cache: {}, durable writes: {}",
            device.name, device.write_cache, device.durable_writes
        ));
    }
    lines.extend(status.alerts.iter().map(|alert| format!("  ! {alert}")));
    hosts(&mut lines, &status.hosts, status.now_us);
    if status.groups.is_empty() {
        lines.push(String::new());
        lines.push(
            "nothing is protected yet: `holdfast host token`, then `holdfast-agent enrol` and `protect` on a host,"
                .into(),
        );
        lines.push("or `holdfast group create` for a disk that comes in over NBD".into());
    }
    for group in &status.groups {
        lines.push(String::new());
        lines.extend(group_lines(group, status.now_us, lag, clock, canvas));
    }
    if !status.views.is_empty() {
        lines.push(String::new());
        lines.push(format!("{} open, holding history back (`holdfast view list`)", count(status.views.len(), "view")));
        for view in status.views.iter().take(VIEWS_SHOWN) {
            let moment = clock.show(view.time_us);
            lines.push(format!(
                "  {} of {} at {moment}: {}; closes {}",
                plain(&view.id),
                view.group,
                held_by(view),
                closes(view)
            ));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn headline(status: &Status, canvas: Canvas) -> String {
    let disk = match status.disk.total {
        0 => String::new(),
        total => {
            let used = 1.0 - status.disk.available as f64 / total as f64;
            let free = ByteLen(status.disk.available);
            format!(" · disk [{}] {free} free of {}", canvas.bar(used, 10), ByteLen(total))
        }
    };
    format!(
        "box {} · holdfastd {} · up {} · memory {}{disk}",
        status.box_name,
        status.version,
        show_span_us(status.uptime_s.saturating_mul(1_000_000)),
        ByteLen(status.rss_bytes),
    )
}

fn hosts(lines: &mut Vec<String>, hosts: &[Host], now_us: u64) {
    if hosts.is_empty() {
        return;
    }
    lines.push(String::new());
    lines.extend(hosts_table(hosts, now_us).lines(0));
}

pub fn hosts_table(hosts: &[Host], now_us: u64) -> Table {
    let mut table = Table::new(&["HOST", "STATE", "LAST HEARD", "AGENT", "CAPTURE", "MEMORY", "ID"]);
    for host in hosts {
        let state = match (host.revoked, host.connected) {
            (true, _) => "revoked",
            (false, true) => "connected",
            (false, false) => "silent",
        };
        let heard = host.last_heard_us.map(|us| format!("{} ago", show_span_us(now_us.saturating_sub(us))));
        table.row([
            host.name.clone(),
            state.to_owned(),
            heard.unwrap_or_else(|| "never".into()),
            host.agent_version.clone().unwrap_or_else(|| "-".into()),
            host.backend.clone().unwrap_or_else(|| "-".into()),
            host.agent_rss_bytes.map_or_else(|| "-".into(), |bytes| ByteLen(bytes).to_string()),
            host.id.clone(),
        ]);
    }
    table
}

fn group_lines(group: &Group, now_us: u64, lag: &LagHistory, clock: &Clock, canvas: Canvas) -> Vec<String> {
    let bytes: u64 = group.volumes.iter().map(|volume| volume.sectors.bytes()).sum();
    let host = group.host_name.as_ref().map_or_else(|| "over NBD".to_owned(), |name| format!("host {name}"));
    let mut lines = vec![format!(
        "group {} · {host} · {} · {} of {}",
        group.name,
        group.state,
        count(group.volumes.len(), "volume"),
        ByteLen(bytes)
    )];
    if let Some(reason) = &group.reason {
        lines.push(format!("  because   {reason}"));
    }
    if let Some(sync) = group.sync {
        let share = if sync.total_bytes == 0 { 1.0 } else { sync.done_bytes as f64 / sync.total_bytes as f64 };
        let (done, total) = (ByteLen(sync.done_bytes), ByteLen(sync.total_bytes));
        lines.push(format!("  copying   [{}] {:.1} %, {done} of {total}", canvas.bar(share, 30), share * 100.0));
    }
    lines.push(format!("  lag       {}", lag_text(group, now_us, lag, canvas)));
    let rate = ByteLen(group.write_rate_bytes_s.max(0.0) as u64);
    lines.push(format!("  writes    {rate}/s in {:.0} writes/s", group.write_rate_ops_s));
    lines.push(format!("  history   {}", history_text(group, canvas)));
    if let (Some(first), Some(last)) = (group.first_time_us, group.last_time_us) {
        lines.push(format!("  moments   {} to {}", clock.show(first), clock.show(last)));
    }
    lines.push(format!(
        "  journal   {} used and {} reserved in {}, index {}, base {}",
        ByteLen(group.journal_bytes),
        ByteLen(group.reserved_bytes),
        count(group.segments as usize, "segment"),
        ByteLen(group.index_bytes),
        ByteLen(group.base_bytes),
    ));
    lines.push(format!(
        "  records   {}; LSN {} durable, {} appended",
        grouped(group.records),
        group.durable_lsn,
        group.appended_lsn
    ));
    if let Some(kept) = kept_text(&group.retention) {
        lines.push(format!("  kept for  {kept}"));
    }
    if let Some(pressure) = group.pressure.as_deref().filter(|p| !p.eq_ignore_ascii_case("ok")) {
        lines.push(format!("  ! room    {pressure}"));
    }
    lines.extend(group.risks.iter().chain(&group.alerts).map(|what| format!("  ! {what}")));
    lines
}

fn lag_text(group: &Group, now_us: u64, lag: &LagHistory, canvas: Canvas) -> String {
    let now = match (group.lag_ms, group.lag_since_us) {
        (Some(0), _) => match group.lag_proven_us {
            Some(proven) => format!("none, proven {} ago", show_span_us(now_us.saturating_sub(proven))),
            None => "none".to_owned(),
        },
        (Some(ms), _) => show_span_us(ms.saturating_mul(1000)),
        (None, Some(since)) => format!("unknown for {}", show_span_us(now_us.saturating_sub(since))),
        (None, None) => "unknown".to_owned(),
    };
    let alarm = group.policy.as_ref().map(|p| format!(" (alarm at {})", show_span_us(p.lag_ms_alarm * 1000)));
    let curve = lag.curve(&group.id, canvas).map(|curve| format!("  {curve}"));
    format!("{now}{}{}", alarm.unwrap_or_default(), curve.unwrap_or_default())
}

fn history_text(group: &Group, canvas: Canvas) -> String {
    if group.first_time_us.is_none() {
        return "none yet".to_owned();
    }
    let hours = group.hours_of_history;
    let wanted = group.policy.as_ref().map_or_else(String::new, |policy| {
        let share = hours / f64::from(policy.window_hours.max(1));
        format!(" of {} h wanted [{}]", policy.window_hours, canvas.bar(share, 20))
    });
    let forecast = group.hours_forecast.map_or_else(String::new, |hours| format!(", {hours:.0} h will fit"));
    format!("{hours:.1} h{wanted}{forecast}")
}

/// `bookmark 3 segments, window 12 segments`: how many files are kept for which reason.
fn kept_text(retention: &serde_json::Value) -> Option<String> {
    let kept = retention.get("kept").unwrap_or(retention).as_object()?;
    let reasons: Vec<String> = kept
        .iter()
        .filter_map(|(reason, kept)| {
            // A number in older boxes.
            let n = kept.get("segments").unwrap_or(kept).as_u64().filter(|n| *n > 0)?;
            Some(format!("{reason} {}", count(n as usize, "segment")))
        })
        .collect();
    (!reasons.is_empty()).then(|| reasons.join(", "))
}

/// A policy, one line per promise.
pub fn policy_lines(policy: &GroupPolicy) -> Vec<String> {
    let mode = match policy.mode {
        SyncMode::Async => "async: the host never waits".to_owned(),
        SyncMode::Sync { wait_ms_max, at_bound } => {
            let then = match at_bound {
                model::Bound::Degrade => "then goes on and raises an alarm",
                model::Bound::Hold => "and is held until the box answers",
            };
            format!("sync: a flush waits up to {wait_ms_max} ms {then}")
        }
    };
    vec![
        format!("mode      {mode}"),
        format!("window    {} h, never below {} h", policy.window_hours, policy.window_hours_floor),
        format!(
            "journal   {}",
            policy.journal_bytes_max.map_or("what the disk has".into(), |max| format!("at most {max}"))
        ),
        format!("alarms    below {} h of history, above {} ms of lag", policy.alarm_below_hours, policy.lag_ms_alarm),
        format!("priority  {} (lower is shortened first)", policy.priority),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::Glyphs;
    use jiff::tz::TimeZone;

    const PLAIN: Canvas = Canvas { width: 100, glyphs: Glyphs::Ascii };

    fn status(groups: &str) -> Status {
        serde_json::from_str(&format!(
            r#"{{"version":"0.1.0","box_name":"b1","data_dir":"/d","now_us":2000000,"uptime_s":3700,"rss_bytes":1048576,
                "ca_fingerprint":"ab","disk":{{"total":100,"available":25}},
                "hosts":[{{"id":"1","name":"web1","connected":false,"last_heard_us":500000}}],"groups":[{groups}]}}"#
        ))
        .unwrap()
    }

    fn page(status: &Status, lag: &LagHistory) -> String {
        let clock = Clock { zone: TimeZone::UTC, now: jiff::Timestamp::UNIX_EPOCH };
        render(status, lag, &clock, PLAIN)
    }

    #[test]
    fn a_group_shows_lag_history_and_what_is_wrong() {
        let status = status(
            r#"{"id":"9","name":"g","host_name":"web1","state":"replicating","lag_ms":40,"write_rate_bytes_s":2097152.0,
                "write_rate_ops_s":310.4,"hours_of_history":36.0,"hours_forecast":50,"first_time_us":0,"last_time_us":1500000,
                "policy":{"mode":"async","window_hours":72,"window_hours_floor":4,"journal_bytes_max":null,
                "alarm_below_hours":12,"priority":100,"lag_ms_alarm":10000},"segments":3,"records":12345,"pressure":"alarm",
                "retention":{"kept":{"window":{"segments":2,"bytes":9},"bookmark":1,"view":{"segments":0}}},"alerts":["job x fails"],"risks":[{"kind":"journal-full"}],
                "volumes":[{"id":0,"name":"/dev/sdb","sectors":2048,"identity":"x"}]}"#,
        );
        let page = page(&status, &LagHistory::default());
        for want in [
            "box b1 · holdfastd 0.1.0 · up 1 h 01 min · memory 1.0 MiB · disk [########--] 25 B free of 100 B",
            "web1  silent   1.5 s ago",
            "group g · host web1 · replicating · 1 volume of 1.0 MiB",
            "lag       40 ms (alarm at 10.0 s)",
            "writes    2.0 MiB/s in 310 writes/s",
            "history   36.0 h of 72 h wanted [##########----------], 50 h will fit",
            "moments   1970-01-01 00:00:00.000 to 1970-01-01 00:00:01.500",
            "0 B used and 0 B reserved in 3 segments, index",
            "records   12,345; LSN",
            "kept for  bookmark 1 segment, window 2 segments",
            "! room    alarm",
            "! the journal is full",
            "! job x fails",
        ] {
            assert!(page.contains(want), "{want:?} is missing in\n{page}");
        }
    }

    #[test]
    fn a_copy_shows_a_bar_and_an_unknown_lag_since_when() {
        let status = status(
            r#"{"id":"9","name":"g","state":"syncing","sync":{"done_bytes":50,"total_bytes":200},"lag_ms":null,
                "lag_since_us":1000000,"reason":"initial sync"}"#,
        );
        let page = page(&status, &LagHistory::default());
        assert!(page.contains("copying   [########----------------------] 25.0 %, 50 B of 200 B"), "{page}");
        assert!(page.contains("lag       unknown for 1.0 s"), "{page}");
        assert!(page.contains("because   initial sync"), "{page}");
        assert!(page.contains("history   none yet"), "{page}");
    }

    #[test]
    fn lag_is_drawn_while_it_is_watched() {
        let mut lag = LagHistory::default();
        let mut last = status("");
        for ms in [10, 80, 20] {
            last = status(&format!(r#"{{"id":"9","name":"g","state":"replicating","lag_ms":{ms}}}"#));
            lag.note(&last);
        }
        assert!(page(&last, &lag).contains("lag       20 ms  .#:"), "{}", page(&last, &lag));
        for _ in 0..200 {
            lag.note(&last);
        }
        assert_eq!(lag.0["9"].len(), LAG_SAMPLES);
        lag.note(&status(""));
        assert!(lag.0.is_empty());
        assert!(page(&status(""), &lag).contains("nothing is protected yet"));
    }
}
