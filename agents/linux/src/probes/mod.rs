//! Probes of applications: made here, where the application is, and told to the box, which decides ([`takeover::detect`] there).
//!
//! ```text
//! plan ─▶ Probes ─▶ a thread for each probe: made, told, then silent until its next turn
//!                     ├─ unit, process          asked of this host                        [`here`]
//!                     ├─ tcp, http, https, …    a few bytes of the application's protocol [`protocols`]
//!                     └─ script                 a guard process runs it as its user       [`script`]
//! ```
//!
//! # What a result says
//!
//! *Works*; *fails*: the application's fault, which may lead to a takeover; or *broken*: the probe itself could not be made (no script of that
//! name, no process to be had), which proves nothing about the application and never leads to one.
//!
//! # Limits
//!
//! Each probe ends at its `timeout_ms`, whatever the other side does: the limit is for the whole of it, not for each byte. At most
//! [`PLAN_ITEMS_MAX`](wire::PLAN_ITEMS_MAX) threads; those of a plan before end with the probe that they are at. Of what an application answers so
//! much is read as its protocol needs, at most [`protocols::ANSWER_MAX`] bytes. A result that the box cannot be told is lost: old ones prove nothing.

mod here;
mod protocols;
pub mod script;

use crate::config::Script;
use model::HostId;
use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use wire::{PROBE_OUTPUT_MAX, PlanProbe, ProbeEnd, ProbeKind, ProbeResult};

/// A probe's thread reads a few kilobytes and starts processes.
const STACK: usize = 512 << 10;
/// The longest reason that is told.
const WHY_MAX: usize = 300;

/// Takes a result to the box. Must not wait.
pub type Tell = Arc<dyn Fn(ProbeResult) + Send + Sync>;

/// What probes need of this host.
#[derive(Clone, Debug)]
pub struct Means {
    /// `systemctl`, or what a test puts in its place.
    pub systemctl: PathBuf,
    pub scripts: BTreeMap<String, Script>,
    pub runner: script::Runner,
}

/// See the module. Dropped, it makes no more.
pub struct Probes {
    made: Vec<PlanProbe>,
    over: Arc<Over>,
}

#[derive(Default)]
struct Over {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Over {
    fn end(&self) {
        *self.is.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
    /// Until then, or the end; whether it is over.
    fn wait_until(&self, then: Instant) -> bool {
        let mut is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        while !*is {
            let Some(left) = then.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else { return false };
            is = self.changed.wait_timeout(is, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Probes {
    pub fn start(whose: HostId, probes: &[PlanProbe], means: &Means, tell: &Tell) -> io::Result<Self> {
        let this = Self { made: probes.to_vec(), over: Arc::default() };
        for (at, probe) in probes.iter().enumerate() {
            let (probe, means, tell, over) = (probe.clone(), means.clone(), Arc::clone(tell), Arc::clone(&this.over));
            let builder = thread::Builder::new().name(format!("probe-{at}")).stack_size(STACK);
            builder.spawn(move || run(whose, &probe, &means, &tell, &over))?;
        }
        Ok(this)
    }
    /// Whether these are the ones that are made.
    pub fn makes(&self, probes: &[PlanProbe]) -> bool {
        self.made == probes
    }
}

impl Drop for Probes {
    /// Does not wait for those that are being made; what they find is told to nobody.
    fn drop(&mut self) {
        self.over.end();
    }
}

fn run(whose: HostId, probe: &PlanProbe, means: &Means, tell: &Tell, over: &Over) {
    let every = Duration::from_millis(probe.every_ms);
    let mut next = Instant::now();
    while !over.wait_until(next) {
        let begun = Instant::now();
        let Made { end, output } = make(probe, means);
        let result = ProbeResult {
            whose,
            name: probe.name.clone(),
            end,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            output: plain(output.as_bytes(), PROBE_OUTPUT_MAX, true),
        };
        if over.wait_until(begun) {
            return;
        }
        tell(result);
        // A probe that took longer than its period is made again at once, not as often as was missed.
        next = (next + every).max(Instant::now());
    }
}

/// How a probe ended, and what a script printed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    pub end: ProbeEnd,
    pub output: String,
}

/// Why a probe does not say that the application works.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Not {
    /// The application's fault.
    Working(String),
    /// The probe's own.
    Made(String),
}

/// Makes one probe, within its time.
pub fn make(probe: &PlanProbe, means: &Means) -> Made {
    let limit = Duration::from_millis(probe.timeout_ms);
    if let ProbeKind::Script(name) = &probe.kind {
        return script::run(name, &means.scripts, &means.runner, limit);
    }
    let asked = match &probe.kind {
        ProbeKind::Unit(unit) => here::unit(&means.systemctl, unit, limit),
        ProbeKind::Process(name) => here::process(name),
        kind => protocols::ask(kind, limit),
    };
    let end = match asked {
        Ok(()) => ProbeEnd::Works,
        Err(Not::Working(why)) => ProbeEnd::Fails { why: plain(why.as_bytes(), WHY_MAX, false) },
        Err(Not::Made(why)) => ProbeEnd::Broken { why: plain(why.as_bytes(), WHY_MAX, false) },
    };
    Made { end, output: String::new() }
}

/// What came from elsewhere, fit for a terminal and a log: no control characters, none that turn the writing about, and not more than so
/// many bytes. Lines stay lines where they may.
pub(crate) fn plain(bytes: &[u8], max: usize, lines: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    for c in text.chars() {
        let c = match c {
            '\n' if lines => c,
            '\t' | '\r' | '\n' => ' ',
            c if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}') =>
            {
                '\u{fffd}'
            }
            c => c,
        };
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests;
