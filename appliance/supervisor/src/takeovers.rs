//! Plans, and the takeovers and drills that carry them out.
//!
//! ```text
//! <data>/plans/NAME.toml           one plan each, as its author wrote it
//! <data>/takeovers/ID/state.json   what a run has come to, replaced whole after each step
//!                     qmp port     sockets of its machine
//!                     serial.log screen.png qemu.log
//!                     record.json record.sig
//! <data>/records.key               signs records: Ed25519, PKCS#8
//! ```
//!
//! A run has a thread of its own, which drives [`takeover::run::Driver`]; this file is its hands. A machine outlives the daemon: when the
//! daemon starts again it takes up every run that is not over, at the step it was killed in.
//!
//! **Limits.** [`PLANS_MAX`], [`RUNS_MAX`] that are not over; records of [`RECORDS_MAX`] runs that are over are kept, the oldest go first.

mod asks;
mod export;
mod hands;
mod plans;
mod schedule;
mod ship;
mod standby;

pub use plans::Watched;

use crate::{
    App,
    events::Event,
    files::{self, FileError},
    pki,
};
use data_encoding::HEXLOWER;
use hands::BoxHands;
use model::{GroupId, RecoveryPoint};
use plans::Read;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use takeover::{
    plan::{Place, Plan, PlanError, Subject},
    run::{Asked, Driver, HandsError, one_moment},
    state::{Kind, Measured, Phase, PointTaken, RunState},
};

pub const PLANS_MAX: usize = 500;
/// Machines and what is left of failed ones.
pub const RUNS_MAX: usize = 16;
const RECORDS_MAX: usize = 200;
/// What could not be done is tried again after this.
const STUCK_AGAIN: Duration = Duration::from_secs(30);
const PLAN_NAME_MAX: usize = 64;
/// Of the box's memory no machine gets.
const KEEP_MIB: u64 = 512;
/// How long a branch that was just made may take to open.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// What a host that stopped by its own word wrote before may take so long to come.
const DRAIN_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum PlanFault {
    #[error("{0:?} is no name of a plan: 1 to {PLAN_NAME_MAX} letters, digits, - . _, and no . at the beginning")]
    Name(String),
    #[error("there is no plan {0:?}")]
    Unknown(String),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("{PLANS_MAX} plans are kept, which is the limit")]
    TooMany,
    #[error("the plan {0:?} is being carried out")]
    InUse(String),
    #[error("no agent would take it: {0}")]
    Agent(String),
    #[error("the plan {other:?} watches or leases {host:?} already: one plan does that for a host")]
    Twice { other: String, host: String },
    #[error(transparent)]
    File(#[from] FileError),
}

#[derive(Debug, thiserror::Error)]
pub enum RunFault {
    #[error(transparent)]
    Plan(#[from] PlanFault),
    #[error("the plan {plan:?} is being carried out already, as run {id}")]
    Already { plan: String, id: String },
    #[error("{RUNS_MAX} runs are not over, which is the limit")]
    TooMany,
    #[error("there is no run {0:?}")]
    Unknown(String),
    #[error("what has become of these runs cannot be read, and one of them may serve already: {0}")]
    Unreadable(String),
    #[error("the run is over")]
    Over,
    #[error("{what}: {why}")]
    NotNow { what: &'static str, why: String },
    #[error("{0}")]
    Hands(#[source] HandsError),
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("the system gave no random bytes")]
    Random,
}

/// What is asked of a run beside its plan.
#[derive(Clone, Debug)]
pub struct Wish {
    pub plan: String,
    pub kind: Kind,
    pub at: Option<RecoveryPoint>,
    pub source_is_off: Option<String>,
    pub hold: bool,
    /// A migration: the host lives.
    pub planned: bool,
    /// None: where the plan says.
    pub to: Option<Place>,
    /// Of the detector, when nobody pressed a button.
    pub decision: Option<String>,
    pub detection_ms: Option<u64>,
}

struct Run {
    state: Mutex<Arc<RunState>>,
    wanted: AtomicU8,
    /// Not kept: who asked sees by the run that it was not done, and asks again.
    asked: Mutex<Option<Asked>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stuck_at: Mutex<Option<Instant>>,
    /// Why the box could not do its part last, when the driver gave up.
    stuck: Mutex<Option<String>>,
}

const GO_ON: u8 = 0;
const PAUSE: u8 = 1;
const END: u8 = 2;

impl Run {
    fn state(&self) -> Arc<RunState> {
        Arc::clone(&crate::lock(&self.state))
    }
}

pub struct Takeovers {
    plans: PathBuf,
    runs_dir: PathBuf,
    key: Ed25519KeyPair,
    runs: Mutex<BTreeMap<String, Arc<Run>>>,
    read: Mutex<Arc<Read>>,
    /// What the hosts' desks were told last, so that they are told changes only.
    told: Mutex<Option<String>>,
    /// Runs whose state could not be read.
    unreadable: Vec<String>,
    /// When a scheduled drill of a plan was tried last.
    tried_us: Mutex<BTreeMap<String, u64>>,
    /// Plans whose standby does not follow, and why.
    not_following: Mutex<BTreeMap<String, standby::Trouble>>,
}

impl Takeovers {
    /// Reads what there is. Blocking. What cannot be read is said and left alone.
    pub fn open(data: &Path, unreadable: &mut Vec<String>) -> Result<Self, FileError> {
        let (plans, runs_dir) = (data.join("plans"), data.join("takeovers"));
        files::private_dir(&plans)?;
        files::private_dir(&runs_dir)?;
        let key = record_key(&data.join("records.key"))?;
        let (mut runs, mut lost) = (BTreeMap::new(), Vec::new());
        for id in names_in(&runs_dir)? {
            let file = runs_dir.join(&id).join("state.json");
            match files::read_small(&file)?.map(|bytes| serde_json::from_slice::<RunState>(&bytes)) {
                Some(Ok(state)) => {
                    runs.insert(id, Arc::new(Run::of(state)));
                }
                Some(Err(e)) => {
                    unreadable.push(format!("{}: {e}", file.display()));
                    lost.push(id);
                }
                // Killed before its first state was kept: nothing was done.
                None => drop(fs::remove_dir(runs_dir.join(&id))),
            }
        }
        let this = Self {
            plans,
            runs_dir,
            key,
            runs: Mutex::new(runs),
            read: Mutex::default(),
            told: Mutex::default(),
            unreadable: lost,
            tried_us: Mutex::default(),
            not_following: Mutex::default(),
        };
        this.read_plans()?;
        Ok(this)
    }

    /// Goes on with every run that is not over. When the groups' journals are being opened.
    pub fn go_on(&self, app: &Arc<App>) {
        let runs: Vec<Arc<Run>> = crate::lock(&self.runs).values().cloned().collect();
        for run in runs.into_iter().filter(|run| !run.state().is_over()) {
            if let Err(e) = self.launch(app, &run) {
                app.events.note(Event::TakeoverFailed, &run.state().id, crate::chain(&e));
            }
        }
    }

    /// Sees whether the machines that serve still do, and goes on with what waits.
    pub fn look_after(&self, app: &Arc<App>) {
        let runs: Vec<Arc<Run>> = crate::lock(&self.runs).values().cloned().collect();
        let waits = |run: &Arc<Run>| {
            let phase = &run.state().phase;
            let rests =
                matches!(phase, Phase::Serving | Phase::FailingBack | Phase::Returned { .. } | Phase::Committed);
            // What could not be done, for a full disk say, is tried again.
            let stuck = crate::lock(&run.stuck_at).is_some_and(|at| at.elapsed() >= STUCK_AGAIN);
            (rests && crate::lock(&run.stuck_at).is_none()) || stuck || crate::lock(&run.asked).is_some()
        };
        for run in runs.into_iter().filter(waits) {
            if let Err(e) = self.launch(app, &run) {
                app.events.note(Event::TakeoverFailed, &run.state().id, crate::chain(&e));
            }
        }
    }

    /// Has every driver stop where it is. Before anything that a step needs goes away: its failure then is none.
    pub fn ask_pause(&self) {
        for run in crate::lock(&self.runs).values() {
            let _ = run.wanted.compare_exchange(GO_ON, PAUSE, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Waits until every driver has stopped; the machines run on. Blocking.
    pub fn pause(&self) {
        self.ask_pause();
        let runs: Vec<Arc<Run>> = crate::lock(&self.runs).values().cloned().collect();
        for run in runs {
            if let Some(thread) = crate::lock(&run.thread).take() {
                let _ = thread.join();
            }
        }
    }

    // ------------------------------------------------------------ runs

    pub fn list(&self) -> Vec<Arc<RunState>> {
        let mut list: Vec<_> = crate::lock(&self.runs).values().map(|run| run.state()).collect();
        list.sort_by_key(|s| (s.begun_us, s.id.clone()));
        list
    }
    fn get(&self, id: &str) -> Result<Arc<Run>, RunFault> {
        crate::lock(&self.runs).get(id).cloned().ok_or_else(|| RunFault::Unknown(id.into()))
    }
    pub fn state(&self, id: &str) -> Result<Arc<RunState>, RunFault> {
        Ok(self.get(id)?.state())
    }
    /// Why a run does not go on though it is not over.
    pub fn stuck(&self, id: &str) -> Option<String> {
        self.get(id).ok().and_then(|run| crate::lock(&run.stuck).clone())
    }
    /// A file of a run's evidence.
    pub fn evidence(&self, id: &str, name: &str) -> Result<Option<Vec<u8>>, RunFault> {
        self.get(id)?;
        let file = self.runs_dir.join(id).join(name);
        Ok(fs::read(file).ok())
    }
    /// Whether the disks of a branch are closed to everybody, for what they hold is being brought to its host.
    pub fn is_sealed(&self, group: GroupId) -> bool {
        let of = |s: &RunState| s.sealed && !s.is_over() && s.points.iter().any(|p| p.branch == group);
        crate::lock(&self.runs).values().any(|run| of(&run.state()))
    }
    /// The key that records are checked with, in hexadecimal.
    pub fn public_key(&self) -> String {
        HEXLOWER.encode(self.key.public_key().as_ref())
    }

    /// Refuses a moment that the groups of a plan cannot have in common.
    pub fn one_moment(&self, app: &App, plan: &Plan, at: &RecoveryPoint) -> Result<(), HandsError> {
        // Whose groups cannot be found is said by the run's own check.
        hands::members_of(app, &plan.subject).map_or(Ok(()), |members| one_moment(at, &members))
    }

    /// Begins a run. Blocking.
    pub fn begin(&self, app: &Arc<App>, wish: Wish) -> Result<Arc<RunState>, RunFault> {
        if wish.kind == Kind::Failover && !self.unreadable.is_empty() {
            return Err(RunFault::Unreadable(self.unreadable.join(", ")));
        }
        let plan = self.plan(&wish.plan)?;
        let id = HEXLOWER.encode(&pki::random_128().ok_or(RunFault::Random)?[..4]);
        let state = RunState {
            id: id.clone(),
            kind: wish.kind,
            plan_name: wish.plan,
            place: wish.to.unwrap_or_else(|| plan.place.clone()),
            planned: wish.planned,
            plan,
            at: wish.at,
            source_is_off: wish.source_is_off,
            decision: wish.decision,
            now: None,
            hold: wish.hold,
            begun_us: app.clock.wall_us(),
            phase: Phase::Working,
            steps: Vec::new(),
            fenced: None,
            fenced_boot: None,
            points: Vec::new(),
            machine: None,
            profile: None,
            started: false,
            volumes: Vec::new(),
            applications: Vec::new(),
            measured: Measured { detection_ms: wish.detection_ms, ..Measured::default() },
            serves: None,
            stopped: None,
            sealed: false,
            follows: None,
            standby_disks: Vec::new(),
            collects: None,
            restarts_us: Vec::new(),
            failback: None,
        };
        let run = Arc::new(Run::of(state));
        {
            let mut runs = crate::lock(&self.runs);
            // A drill may go on beside anything; of failovers there is one.
            if run.state().kind == Kind::Failover {
                one_at_most(app, &runs, &run.state())?;
            }
            if runs.values().filter(|r| !r.state().is_over()).count() >= RUNS_MAX {
                return Err(RunFault::TooMany);
            }
            runs.insert(id.clone(), Arc::clone(&run));
        }
        if run.state().kind == Kind::Failover {
            self.drills_give_way(app);
        }
        let kept = keep(&self.runs_dir, &run.state()).and_then(|()| self.launch(app, &run));
        if let Err(e) = kept {
            crate::lock(&self.runs).remove(&id);
            // The next daemon must not do what was said to have failed.
            let _ = fs::remove_dir_all(self.runs_dir.join(&id));
            return Err(e);
        }
        self.forget_old();
        let what = match wish.kind {
            Kind::Drill => "drill",
            Kind::Failover if wish.planned => "migration",
            Kind::Failover => "takeover",
        };
        app.events.note(Event::TakeoverBegun, &run.state().plan_name, format!("{what} {id}"));
        Ok(run.state())
    }

    /// Takes a run down and throws away what its machine wrote.
    pub fn end(&self, app: &Arc<App>, id: &str) -> Result<Arc<RunState>, RunFault> {
        let run = self.get(id)?;
        let state = run.state();
        match state.phase {
            Phase::Ended { .. } => return Err(RunFault::Over),
            // The only copy of what the machine wrote may be the one that would go.
            Phase::FailingBack | Phase::Returned { .. } => {
                let why = "a failback goes on: commit it or roll it back first".to_owned();
                return Err(RunFault::NotNow { what: "the run is not ended", why });
            }
            _ => {}
        }
        // The host would get its ownership back beside it.
        let clients = match state.place() {
            Place::Export => clients(app, &state.points),
            Place::Box | Place::Standby(_) => Vec::new(),
        };
        if !clients.is_empty() {
            let why = format!("a machine has its disks open, shut it down first: {}", clients.join(", "));
            return Err(RunFault::NotNow { what: "the run is not ended", why });
        }
        run.wanted.store(END, Ordering::Release);
        self.launch(app, &run)?;
        Ok(run.state())
    }

    /// Starts a run's thread, unless it has one that works.
    fn launch(&self, app: &Arc<App>, run: &Arc<Run>) -> Result<(), RunFault> {
        let mut thread = crate::lock(&run.thread);
        if thread.as_ref().is_some_and(|t| !t.is_finished()) {
            // It looks at what is wanted after each step, and once more at its end.
            return Ok(());
        }
        let (app, run, dir) = (Arc::clone(app), Arc::clone(run), self.runs_dir.clone());
        let name = format!("run-{}", run.state().id);
        let started = std::thread::Builder::new().name(name).spawn(move || drive(&app, &run, &dir));
        *thread = Some(started.map_err(RunFault::Thread)?);
        Ok(())
    }

    fn forget_old(&self) {
        let mut runs = crate::lock(&self.runs);
        let mut over: Vec<(u64, String)> =
            runs.values().map(|r| r.state()).filter(|s| s.is_over()).map(|s| (s.begun_us, s.id.clone())).collect();
        over.sort();
        let surplus = over.len().saturating_sub(RECORDS_MAX);
        for (_, id) in over.into_iter().take(surplus) {
            runs.remove(&id);
            // What stays behind is read at the next start and forgotten then.
            let _ = fs::remove_dir_all(self.runs_dir.join(id));
        }
    }
}

impl Run {
    /// Whether it is a takeover, or is to become one.
    fn is_failover(&self) -> bool {
        let state = self.state();
        let promoted = matches!(&*crate::lock(&self.asked), Some(Asked::Promote { .. }));
        !state.is_over() && (state.kind == Kind::Failover || promoted)
    }
    fn of(state: RunState) -> Self {
        let state = Mutex::new(Arc::new(state));
        let wanted = AtomicU8::new(GO_ON);
        Self {
            state,
            wanted,
            asked: Mutex::default(),
            thread: Mutex::default(),
            stuck_at: Mutex::default(),
            stuck: Mutex::default(),
        }
    }
}

/// Refuses a takeover of disks that another one has, whatever the plans of the two call them: by their host, or one by one.
fn one_at_most(app: &App, runs: &BTreeMap<String, Arc<Run>>, begun: &RunState) -> Result<(), RunFault> {
    let ids = |subject: &Subject| -> BTreeSet<GroupId> {
        // What cannot be found has no disks; its run says so by itself.
        hands::members_of(app, subject).unwrap_or_default().iter().map(|m| m.id).collect()
    };
    let wanted = ids(&begun.plan.subject);
    let others = runs.values().filter(|r| r.is_failover()).map(|r| r.state()).filter(|s| s.id != begun.id);
    for other in others {
        let taken = other.points.iter().map(|p| p.group).chain(ids(&other.plan.subject));
        if other.plan.subject == begun.plan.subject || taken.into_iter().any(|id| wanted.contains(&id)) {
            return Err(RunFault::Already { plan: other.plan_name.clone(), id: other.id.clone() });
        }
    }
    Ok(())
}

fn names_in(dir: &Path) -> Result<Vec<String>, FileError> {
    let failed = |source| FileError { op: "list", path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// The key that signs records; made at the first start.
fn record_key(file: &Path) -> Result<Ed25519KeyPair, FileError> {
    let broken = |what: &'static str| {
        move |_| FileError { op: what, path: file.to_owned(), source: io::Error::from(io::ErrorKind::InvalidData) }
    };
    if let Some(bytes) = files::read_small(file)? {
        return Ed25519KeyPair::from_pkcs8(&bytes).map_err(broken("read the key"));
    }
    let made = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new());
    let made = made.map_err(|_| FileError {
        op: "make the key",
        path: file.to_owned(),
        source: io::Error::other("no random bytes"),
    })?;
    files::write_secret(file, made.as_ref())?;
    Ed25519KeyPair::from_pkcs8(made.as_ref()).map_err(broken("read the key"))
}

fn keep(dir: &Path, state: &RunState) -> Result<(), RunFault> {
    let failed = |e: FileError| {
        RunFault::Hands(HandsError::new(
            format!("the state of the run was not kept: {}", crate::chain(&e)),
            "make room on the data disk",
        ))
    };
    let dir = dir.join(&state.id);
    files::private_dir(&dir).map_err(failed)?;
    let bytes = serde_json::to_vec_pretty(state).map_err(|e| {
        RunFault::Hands(HandsError::new(
            format!("the state of the run cannot be written: {e}"),
            "this is a defect: report it",
        ))
    })?;
    files::write_secret(&dir.join("state.json"), &bytes).map_err(failed)
}

/// The thread of a run.
fn drive(app: &Arc<App>, run: &Arc<Run>, dir: &Path) {
    *crate::lock(&run.stuck) = None;
    *crate::lock(&run.stuck_at) = None;
    let hands = BoxHands { app, run, dir };
    let begun = RunState::clone(&run.state());
    let (was, restarts) = (begun.phase.clone(), begun.restarts_us.last().copied());
    let mut driver = Driver::new(&hands, begun);
    // A defect here must not take the daemon along.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.drive()));
    let state = run.state();
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(e)) => stuck(app, run, format!("{e}: {}", e.remedy)),
        Err(_) => stuck(app, run, "the run's thread panicked; the daemon's log says why".into()),
    }
    if state.restarts_us.last().copied() != restarts {
        let text = format!("run {}: its machine had ended by itself and was started again", state.id);
        app.events.note(Event::TakeoverRestarted, &state.plan_name, text);
    }
    match &state.phase {
        // Told already, perhaps by an earlier daemon.
        now if *now == was => {}
        Phase::Serving => app.events.note(Event::TakeoverServing, &state.plan_name, measured_text(&state)),
        Phase::Failed { step } => {
            let why = state.failure().map(|(_, text, _)| text.to_owned()).unwrap_or_default();
            app.events.note(
                Event::TakeoverFailed,
                &state.plan_name,
                format!("run {}, {}: {why}", state.id, step.title()),
            );
        }
        Phase::Ended { .. } => {
            if let Err(e) = write_record(&app.takeovers, dir, &state) {
                app.events.note(
                    Event::TakeoverFailed,
                    &state.plan_name,
                    format!("the record was not written: {}", crate::chain(&e)),
                );
            }
            app.events.note(Event::TakeoverEnded, &state.plan_name, format!("run {}", state.id));
        }
        Phase::FailingBack => app.events.note(Event::FailbackBegun, &state.plan_name, format!("run {}", state.id)),
        Phase::Returned { .. } => {
            let note = state.failback.as_ref().and_then(|f| f.note.clone());
            let text = note.unwrap_or_else(|| "the host serves again: commit it or roll it back".into());
            app.events.note(Event::FailbackReturned, &state.plan_name, format!("run {}: {text}", state.id));
        }
        Phase::Committed => app.events.note(Event::FailbackCommitted, &state.plan_name, format!("run {}", state.id)),
        Phase::Working | Phase::Ending { .. } => {}
    }
    // A host that was being taken over may have a plan that waits.
    app.takeovers.settle(app);
}

fn stuck(app: &App, run: &Run, text: String) {
    app.events.note(Event::TakeoverFailed, &run.state().plan_name, &text);
    *crate::lock(&run.stuck) = Some(text);
    *crate::lock(&run.stuck_at) = Some(Instant::now());
}

fn measured_text(state: &RunState) -> String {
    let seconds = |ms: Option<u64>| ms.map_or("not known".into(), |ms| format!("{:.1} s", ms as f64 / 1000.0));
    let m = &state.measured;
    format!(
        "run {}: serving after {}, first instruction after {}",
        state.id,
        seconds(m.serving_ms),
        seconds(m.first_instruction_ms)
    )
}

/// What happened, with the checksums of what was seen, signed: `record.sig` is the Ed25519 signature over the bytes of `record.json`.
fn write_record(takeovers: &Takeovers, dir: &Path, state: &RunState) -> Result<(), FileError> {
    let dir = dir.join(&state.id);
    let sum = |name: &str| fs::read(dir.join(name)).ok().map(|bytes| pki::sha256_hex(&bytes));
    let record = json!({
        "run": state,
        "screen_sha256": sum("screen.png"),
        "serial_sha256": sum("serial.log"),
        "public_key": takeovers.public_key(),
    });
    let bytes = record.to_string().into_bytes();
    let signature = HEXLOWER.encode(takeovers.key.sign(&bytes).as_ref());
    files::write_secret(&dir.join("record.json"), &bytes)?;
    files::write_secret(&dir.join("record.sig"), format!("{signature}\n").as_bytes())
}

/// Who has disks of these branches open.
fn clients(app: &App, points: &[PointTaken]) -> Vec<String> {
    points.iter().flat_map(|p| app.exports.of_group(p.branch)).flat_map(|export| export.clients()).collect()
}

/// A run as the API shows it.
pub fn run_json(app: &App, state: &RunState) -> Value {
    let mut value = json!(state);
    value["authority"] = json!(state.authority());
    if *state.place() == Place::Export && !state.points.is_empty() && !state.sealed && !state.is_over() {
        value["export"] = export::shown(app, state);
    }
    if let (Phase::FailingBack, Some(failback)) = (&state.phase, &state.failback) {
        value["shipping"] = json!(app.restores.status(&failback.restore).ok().map(|status| status.phase));
    }
    if let Some(steps) = value["failback"]["steps"].as_array_mut() {
        for step in steps {
            let title =
                takeover::state::BackStep::ALL.into_iter().find(|s| json!(s) == step["step"]).map(|s| s.title());
            step["title"] = json!(title);
        }
    }
    value["stuck"] = json!(app.takeovers.stuck(&state.id));
    for step in value["steps"].as_array_mut().into_iter().flatten() {
        let title = takeover::state::Step::ALL.into_iter().find(|s| json!(s) == step["step"]).map(|s| s.title());
        step["title"] = json!(title);
    }
    value
}
