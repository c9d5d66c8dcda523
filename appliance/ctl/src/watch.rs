//! `holdfast status --watch`: the page again every second, in place on a terminal, with a bar per running copy.

use crate::{
    api::Status,
    client::{Client, Route},
    picture::Canvas,
    status::{LagHistory, render},
    times::Clock,
};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

const INTERVAL: Duration = Duration::from_secs(1);

/// Looks `count` times, or until interrupted. A box that goes away for a while is said and waited for.
pub fn run(client: &Client, count: Option<u64>) -> anyhow::Result<()> {
    let mut lag = LagHistory::default();
    let mut screen = Screen::new();
    let mut looks = 0;
    loop {
        match client.get::<Status>(&Route::new(&["status"])) {
            Ok(status) => {
                lag.note(&status);
                screen.show(&status, &lag)?;
            }
            // The first look tells a wrong socket at once; later ones outlive a restart of the daemon.
            Err(e) if looks > 0 => screen.trouble(&crate::sentence(&e.into()))?,
            Err(e) => return Err(e.into()),
        }
        looks += 1;
        if count.is_some_and(|count| looks >= count) {
            screen.leave();
            return Ok(());
        }
        std::thread::sleep(INTERVAL);
    }
}

/// A terminal is drawn over, anything else gets page after page.
enum Screen {
    Terminal { all: MultiProgress, page: ProgressBar, copies: BTreeMap<String, ProgressBar> },
    Stream,
}

impl Screen {
    fn new() -> Self {
        if !std::io::stdout().is_terminal() {
            return Self::Stream;
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        let page = all.add(ProgressBar::new_spinner().with_style(style("{msg}")));
        Self::Terminal { all, page, copies: BTreeMap::new() }
    }

    fn show(&mut self, status: &Status, lag: &LagHistory) -> std::io::Result<()> {
        let text = render(status, lag, &Clock::local(), Canvas::of_terminal());
        let Self::Terminal { all, page, copies } = self else {
            return writeln!(std::io::stdout(), "{text}");
        };
        page.set_message(text);
        page.tick();
        copies.retain(|id, bar| {
            let running = status.groups.iter().any(|group| group.id == *id && group.sync.is_some());
            if !running {
                bar.finish_and_clear();
            }
            running
        });
        for group in &status.groups {
            let Some(sync) = group.sync else { continue };
            let bar = copies.entry(group.id.clone()).or_insert_with(|| {
                let shape =
                    "{msg} [{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
                let bar = ProgressBar::new(sync.total_bytes).with_style(style(shape)).with_message(group.name.clone());
                // What was copied before anyone looked says nothing about the speed.
                all.add(bar.with_position(sync.done_bytes).with_elapsed(Duration::ZERO))
            });
            bar.set_length(sync.total_bytes);
            bar.set_position(sync.done_bytes);
        }
        Ok(())
    }

    /// Ends with the last page standing.
    fn leave(&self) {
        if let Self::Terminal { page, copies, .. } = self {
            copies.values().for_each(ProgressBar::abandon);
            page.abandon();
        }
    }

    fn trouble(&mut self, what: &str) -> std::io::Result<()> {
        match self {
            Self::Terminal { page, .. } => {
                page.set_message(format!("{what}\nwaiting for it to come back"));
                page.tick();
                Ok(())
            }
            Self::Stream => writeln!(std::io::stdout(), "{what}; waiting for it to come back"),
        }
    }
}

/// A style of a template that is fixed in this program.
pub fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is well-formed").progress_chars("#>-")
}
