//! The first page – what is protected, what is at risk and why, what runs now – and the same for a wall.

use super::show;
use crate::{
    answers::{Event, Group, Run, Status},
    frame::Frame,
    site::{Page, Visit},
    words::{self, Tone},
};
use askama::Template;

/// A group as a row or a tile.
pub struct GroupRow {
    pub g: Group,
    pub tone: Tone,
    pub risks: Vec<String>,
    /// Percent of a copy that runs.
    pub percent: Option<u64>,
}

impl GroupRow {
    pub fn new(v: &Visit, g: Group) -> Self {
        let risks = g.risks.iter().map(|r| words::risk(v.lang, r)).chain(g.alerts.iter().cloned()).collect();
        let percent = g
            .sync
            .as_ref()
            .filter(|s| s.total_bytes > 0)
            .map(|s| s.done_bytes.min(s.total_bytes) * 100 / s.total_bytes);
        Self { tone: words::group_tone(&g), risks, percent, g }
    }
    pub fn hours(&self) -> String {
        crate::format::span_ms((self.g.hours_of_history * 3.6e6) as u64)
    }
    pub fn forecast(&self) -> Option<String> {
        self.g.hours_forecast.map(|h| crate::format::span_ms((h * 3.6e6) as u64))
    }
    pub fn rate(&self) -> String {
        crate::format::rate(self.g.write_rate_bytes_s)
    }
    pub fn writes(&self) -> String {
        format!("{:.0}/s", self.g.write_rate_ops_s)
    }
    pub fn volume_bytes(&self) -> u64 {
        self.g.volumes.iter().map(crate::answers::Volume::bytes).sum()
    }
}

pub struct EventRow {
    pub e: Event,
    pub tone: Tone,
}

pub fn event_rows(events: Vec<Event>) -> Vec<EventRow> {
    let mut rows: Vec<EventRow> =
        events.into_iter().map(|e| EventRow { tone: words::event_tone(&e.event), e }).collect();
    rows.reverse();
    rows
}

/// A run that is not over, or was lately.
pub struct RunRow {
    pub r: Run,
    pub tone: Tone,
}

pub fn run_rows(runs: Vec<Run>) -> Vec<RunRow> {
    let mut rows: Vec<RunRow> =
        runs.into_iter().map(|r| RunRow { tone: words::run_tone(&r.phase.is, &r.kind), r }).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.r.begun_us));
    rows
}

/// What both pages show.
struct Look {
    status: Status,
    groups: Vec<GroupRow>,
    runs: Vec<RunRow>,
    events: Vec<EventRow>,
    at_risk: u64,
    protected: u64,
    volume_bytes: u64,
    hosts_up: u64,
    used_percent: Option<u64>,
}

async fn look(v: &Visit, events: usize) -> Result<Look, crate::site::Fault> {
    let mut status: Status = v.get("status").await?;
    let runs: Vec<Run> = v.get("runs").await?;
    let mut groups: Vec<GroupRow> =
        std::mem::take(&mut status.groups).into_iter().map(|g| GroupRow::new(v, g)).collect();
    // What is worst comes first.
    groups.sort_by(|a, b| b.tone.cmp(&a.tone).then_with(|| a.g.name.cmp(&b.g.name)));
    let mut rows = event_rows(std::mem::take(&mut status.events));
    rows.truncate(events);
    let disk = &status.disk;
    let used_percent = disk
        .total
        .zip(disk.available)
        .filter(|(total, _)| *total > 0)
        .map(|(total, left)| (total - left.min(total)) * 100 / total);
    let is_risky = |g: &&GroupRow| matches!(g.tone, Tone::Warn | Tone::Bad);
    Ok(Look {
        at_risk: groups.iter().filter(is_risky).count() as u64,
        protected: groups.iter().filter(|g| g.tone != Tone::Idle).count() as u64,
        volume_bytes: groups.iter().map(GroupRow::volume_bytes).sum(),
        hosts_up: status.hosts.iter().filter(|h| h.connected && !h.revoked).count() as u64,
        runs: run_rows(runs).into_iter().filter(|r| r.r.phase.is != "ended").collect(),
        events: rows,
        used_percent,
        groups,
        status,
    })
}

#[derive(Template)]
#[template(path = "pages/overview/page.html")]
struct Overview {
    p: Frame,
    b: Look,
}

#[derive(Template)]
#[template(path = "pages/overview/wall.html")]
struct Wall {
    p: Frame,
    b: Look,
}

pub async fn page(v: &Visit) -> Page {
    let b = look(v, 8).await?;
    show(&Overview { p: v.frame("overview", v.lang.t("menu.overview"), "status"), b })
}

pub async fn wall(v: &Visit) -> Page {
    let b = look(v, 12).await?;
    show(&Wall { p: v.frame("wall", v.lang.t("wall.title"), "status"), b })
}
