//! The page Prometheus reads.

use crate::{
    App,
    events::Event,
    metrics::{Kind, Page},
    status::{self, GroupReport, GroupState},
    vault::{Counters, Group},
};
use model::Owner;
use std::sync::Arc;

/// Makes the page. Cheap: numbers the box has anyway.
pub fn page(app: &App) -> String {
    let mut page = Page::default();
    box_metrics(app, &mut page);
    let groups: Vec<(Arc<Group>, GroupReport)> =
        app.vault.groups().into_iter().map(|g| (Arc::clone(&g), status::group_report(app, &g))).collect();
    group_metrics(&groups, app.clock.wall_us(), &mut page);
    journal_metrics(&groups, &mut page);
    host_metrics(app, &mut page);
    owner_metrics(app, &mut page);
    page.family("holdfast_events_total", "Events by name since the daemon started.", Kind::Counter);
    for event in Event::ALL {
        page.sample(&[("event", event.name())], app.events.count(*event));
    }
    page.finish()
}

fn box_metrics(app: &App, page: &mut Page) {
    let mut one = |name, help, kind, value: u64| {
        page.family(name, help, kind);
        page.sample(&[], value);
    };
    one("holdfast_uptime_seconds", "Time since the daemon started.", Kind::Gauge, app.clock.uptime_s());
    one("holdfast_resident_memory_bytes", "Resident memory of the daemon.", Kind::Gauge, status::rss_bytes());
    one("holdfast_nbd_connections", "Open NBD connections.", Kind::Gauge, app.exports.connections() as u64);
    one(
        "holdfast_agent_connections",
        "Open control and stream connections.",
        Kind::Gauge,
        app.links.connected() as u64,
    );
    one("holdfast_views", "Open views.", Kind::Gauge, app.views.list().len() as u64);
    one(
        "holdfast_views_held",
        "Open views that a client has open.",
        Kind::Gauge,
        app.views.list().iter().filter(|v| v.idle().is_none()).count() as u64,
    );
    one(
        "holdfast_journal_device_doubtful",
        "Whether something about the journals' device may cost acknowledged writes.",
        Kind::Gauge,
        app.device.doubt.is_some().into(),
    );
    if let Ok(space) = app.vault.space() {
        one("holdfast_disk_total_bytes", "Size of the data disk.", Kind::Gauge, space.total.0);
        one("holdfast_disk_available_bytes", "Free room on the data disk.", Kind::Gauge, space.available.0);
    }
}

type Row = (Arc<Group>, GroupReport);

/// A figure of one group; none when it is not known.
type Of<'a> = &'a dyn Fn(&Row) -> Option<f64>;

/// A family with a sample for each group.
fn each(groups: &[Row], page: &mut Page, name: &'static str, help: &str, kind: Kind, value: Of<'_>) {
    page.family(name, help, kind);
    for row in groups {
        // What is not known has no sample: a zero would be a promise.
        if let Some(value) = value(row) {
            page.sample(&[("group", &row.1.spec.name)], value);
        }
    }
}

fn journal_metrics(groups: &[Row], page: &mut Page) {
    let mut each = |name, help, kind, value: Of<'_>| each(groups, page, name, help, kind, value);
    let stat = |f: fn(&journal::JournalStats) -> u64| move |r: &Row| r.1.stats.as_ref().map(|s| f(s) as f64);
    each(
        "holdfast_journal_bytes",
        "Size of what the journal's segments hold, room made ahead left out.",
        Kind::Gauge,
        &stat(|s| s.used_bytes.0),
    );
    each(
        "holdfast_journal_reserved_bytes",
        "Room taken on the disk that holds nothing yet: in open segments and prepared ones.",
        Kind::Gauge,
        &stat(|s| s.reserved_bytes().0),
    );
    each(
        "holdfast_journal_index_damaged",
        "Parts of the index found damaged since the group was opened; each is rebuilt.",
        Kind::Gauge,
        &stat(|s| s.index_damaged.into()),
    );
    each(
        "holdfast_group_jobs_failing",
        "Kinds of background jobs whose last run failed.",
        Kind::Gauge,
        &stat(|s| s.failing.len() as u64),
    );
    each("holdfast_group_alerts", "Things an administrator should look at, as in the status.", Kind::Gauge, &|r| {
        Some(r.1.alerts().len() as f64)
    });
    each("holdfast_journal_prepared_bytes", "Room prepared ahead.", Kind::Gauge, &stat(|s| s.prepared_bytes.0));
    each("holdfast_journal_index_bytes", "Size of the index.", Kind::Gauge, &stat(|s| s.index_bytes.0));
    each("holdfast_journal_base_bytes", "Size of the base.", Kind::Gauge, &stat(|s| s.base_bytes.0));
    each("holdfast_journal_segments", "Number of segments.", Kind::Gauge, &stat(|s| s.segments as u64));
    each("holdfast_journal_records", "Records in the journal.", Kind::Gauge, &stat(|s| s.records));
    each("holdfast_journal_history_seconds", "Time between the oldest and the newest record.", Kind::Gauge, &|r| {
        r.1.stats.as_ref().map(|s| s.last_time.0.saturating_sub(s.first_time.0) as f64 / 1e6)
    });
    each(
        "holdfast_journal_history_forecast_hours",
        "Hours of history that fit at the rate of late.",
        Kind::Gauge,
        &|r| r.1.stats.as_ref().and_then(|s| s.hours_left).map(|h| h as f64),
    );
}

fn group_metrics(groups: &[Row], now_us: u64, page: &mut Page) {
    let mut each = |name, help, kind, value: Of<'_>| each(groups, page, name, help, kind, value);
    each(
        "holdfast_group_lag_seconds",
        "Age of the oldest write not known to be durable, 0 when all is proven to be in; absent while unknown.",
        Kind::Gauge,
        &|r| r.1.verdict.lag_ms.map(|ms| ms as f64 / 1000.0),
    );
    each(
        "holdfast_group_lag_proof_age_seconds",
        "Time since the host's writes were last proven to be durable up to a moment; absent before the first proof.",
        Kind::Gauge,
        &|r| r.1.verdict.lag_proven_us.map(|us| now_us.saturating_sub(us) as f64 / 1e6),
    );
    each("holdfast_group_up", "Whether the group takes writes.", Kind::Gauge, &|r| {
        let up = matches!(
            r.1.verdict.state,
            GroupState::Ingest | GroupState::Replicating | GroupState::Syncing | GroupState::Resyncing
        );
        Some(f64::from(u8::from(up)))
    });
    each("holdfast_group_risks", "Reasons why the group is not as safe as it should be.", Kind::Gauge, &|r| {
        Some(r.1.verdict.risks.len() as f64)
    });
    each("holdfast_group_journal_full", "Whether new writes are refused for lack of room.", Kind::Gauge, &|r| {
        Some(f64::from(u8::from(r.1.live.full.is_some())))
    });
    each("holdfast_group_appended_lsn", "Position of the last record.", Kind::Gauge, &|r| {
        Some(r.1.live.progress.appended.0 as f64)
    });
    each("holdfast_group_durable_lsn", "Position of the last durable record.", Kind::Gauge, &|r| {
        Some(r.1.live.progress.durable.0 as f64)
    });
    each("holdfast_group_write_rate_bytes_per_second", "Data written by the host of late.", Kind::Gauge, &|r| {
        Some(r.1.live.write_rate_bytes)
    });
    let counter = |f: fn(&Counters) -> u64| move |r: &Row| Some(f(&r.0.shared.counters) as f64);
    each(
        "holdfast_group_written_bytes_total",
        "Data appended since the daemon started.",
        Kind::Counter,
        &counter(|c| Counters::get(&c.bytes)),
    );
    each(
        "holdfast_group_records_total",
        "Records appended since the daemon started.",
        Kind::Counter,
        &counter(|c| Counters::get(&c.records)),
    );
    each(
        "holdfast_group_submits_total",
        "Batches handed to the disk by the group's thread.",
        Kind::Counter,
        &counter(|c| Counters::get(&c.batches)),
    );
    each(
        "holdfast_group_flushes_total",
        "Flushes asked for by NBD clients.",
        Kind::Counter,
        &counter(|c| Counters::get(&c.flushes)),
    );
    each(
        "holdfast_group_refused_full_total",
        "Writes refused for lack of room.",
        Kind::Counter,
        &counter(|c| Counters::get(&c.refused_full)),
    );
    page.family("holdfast_group_state", "The group's state: 1 for the one it is in.", Kind::Gauge);
    for (_, report) in groups {
        page.sample(&[("group", &report.spec.name), ("state", report.verdict.state.name())], 1u64);
    }
}

fn host_metrics(app: &App, page: &mut Page) {
    let data = app.catalog.data();
    let hosts: Vec<_> = data.hosts.iter().filter(|h| h.revoked_us.is_none()).collect();
    page.family("holdfast_host_connected", "Whether the host's agent is connected.", Kind::Gauge);
    for host in &hosts {
        page.sample(&[("host", &host.name)], app.links.hosts.live(host.id).connected);
    }
    page.family("holdfast_host_agent_memory_bytes", "Resident memory of the host's agent.", Kind::Gauge);
    for host in &hosts {
        if let Some(status) = app.links.hosts.live(host.id).status {
            page.sample(&[("host", &host.name)], status.rss_bytes.0);
        }
    }
}

fn owner_metrics(app: &App, page: &mut Page) {
    let data = app.catalog.data();
    let name = |id| data.host(id).map_or_else(|| format!("{id}"), |h| h.name.clone());
    let owned: Vec<_> = app.ownership.reports().into_iter().map(|(id, report)| (name(id), report)).collect();
    page.family("holdfast_host_owner", "Who runs the host's services: 1 for the one who does.", Kind::Gauge);
    for (host, report) in &owned {
        let owner = match report.owner {
            Owner::Host => "host",
            Owner::Box => "box",
            Owner::Standby(_) => "standby",
        };
        page.sample(&[("host", host), ("owner", owner)], 1u64);
    }
    page.family("holdfast_host_term", "The term of the host's owner; it grows with each change.", Kind::Gauge);
    for (host, report) in &owned {
        page.sample(&[("host", host)], report.term);
    }
    page.family("holdfast_host_lease_fences", "Whether the host's lease would fence it now.", Kind::Gauge);
    for (host, report) in owned.iter().filter(|(_, r)| r.rules.is_some() || r.why_not.is_some()) {
        page.sample(&[("host", host)], report.fences);
    }
    let seen: Vec<_> =
        app.takeovers.watched(app).into_iter().filter_map(|w| Some((w.name, app.watch.seen(w.host)?))).collect();
    page.family("holdfast_host_verdict", "What is seen of a watched host: 1 for the verdict.", Kind::Gauge);
    for (host, seen) in &seen {
        page.sample(&[("host", host), ("verdict", seen.verdict)], 1u64);
    }
    page.family("holdfast_host_alarm", "Whether something about a watched host needs a person.", Kind::Gauge);
    for (host, seen) in &seen {
        page.sample(&[("host", host)], seen.alarm.is_some());
    }
}
