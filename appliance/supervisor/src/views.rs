//! Open views: which recovery points are exported, and where.
//!
//! A view holds a lease of its journal, so that nothing it needs is folded or deleted; it lasts until it is closed, its group is
//! deleted, or the daemon ends. Views are read-only.
//!
//! A view that is forgotten would hold history back for ever, so each closes by itself when no client has had any of its exports
//! open for as long as it was given (`view_idle_minutes` of the configuration, or what its maker asked for; 0 is for ever). One
//! that a client has open is never closed so, however long the client says nothing.
//!
//! **Limit.** [`VIEWS_MAX`] at once.

use crate::{
    clock::Clock,
    events::{Event, Events},
    exports::{Export, ExportError, Exports},
    pki,
    vault::{Group, GroupError, Phase},
};
use data_encoding::HEXLOWER;
use journal::{OpenViewError, ResolveError, ResolvedPoint};
use model::{GroupId, RecoveryPoint};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Each holds back the folding of its group; more than this is a forgotten script.
pub const VIEWS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("could not open the view")]
    Open(#[from] OpenViewError),
    #[error("could not export the view")]
    Export(#[from] ExportError),
    #[error("{VIEWS_MAX} views are open, which is the limit")]
    TooMany,
    #[error("the system gave no random bytes")]
    Random,
}

pub struct OpenView {
    pub id: String,
    pub group: GroupId,
    pub group_name: String,
    pub point: ResolvedPoint,
    pub exports: Vec<Arc<Export>>,
    pub opened_us: u64,
    /// From the request to the last export being there.
    pub open_ms: f64,
    /// As its maker calls itself.
    pub opened_by: Option<String>,
    /// How long nobody may have it open; none: for ever.
    pub idle_limit: Option<Duration>,
}

/// What is asked of a view beside its moment.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    pub tcp: bool,
    pub opened_by: Option<String>,
    pub idle: Idle,
}

/// How long a view stays without anybody having it open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Idle {
    /// As the box is set.
    #[default]
    Default,
    Never,
    After(Duration),
}

impl OpenView {
    /// Who has it open.
    pub fn clients(&self) -> Vec<String> {
        let mut clients: Vec<String> = self.exports.iter().flat_map(|e| e.clients()).collect();
        clients.sort_unstable();
        clients.dedup();
        clients
    }
    /// For how long nobody has had it open; none while somebody has.
    pub fn idle(&self) -> Option<Duration> {
        self.exports.iter().map(|export| export.idle()).try_fold(Duration::MAX, |least, idle| Some(least.min(idle?)))
    }
    /// None while somebody has it open, and when it stays for ever.
    pub fn closes_in(&self) -> Option<Duration> {
        Some(self.idle_limit?.saturating_sub(self.idle()?))
    }
}

pub struct Views {
    exports: Arc<Exports>,
    events: Arc<Events>,
    clock: Clock,
    /// None: views stay until they are closed.
    idle_limit: Option<Duration>,
    open: Mutex<BTreeMap<String, Arc<OpenView>>>,
}

impl Views {
    pub fn new(exports: Arc<Exports>, events: Arc<Events>, clock: Clock, idle_limit: Option<Duration>) -> Self {
        Self { exports, events, clock, idle_limit, open: Mutex::default() }
    }

    /// Finds the point, opens it and exports its volumes. Blocking: the search may read a segment's index. Within a runtime.
    pub fn open(&self, group: &Group, at: &RecoveryPoint, wish: Wish) -> Result<Arc<OpenView>, ViewError> {
        let started = Instant::now();
        let life = group.shared.life();
        let reader = group.reader()?;
        let point = reader.resolve(at)?;
        let handle = group.keep_view(life, reader.view(point)?)?;
        if crate::lock(&self.open).len() >= VIEWS_MAX {
            return Err(ViewError::TooMany);
        }
        let id = HEXLOWER.encode(&pki::random_128().ok_or(ViewError::Random)?[..4]);
        let mut exports: Vec<Arc<Export>> = Vec::new();
        for volume in handle.get().volumes() {
            match self.exports.add_view(format!("view-{id}-{}", volume.id), group.id(), volume, wish.tcp, &handle) {
                Ok(export) => exports.push(export),
                Err(e) => {
                    exports.iter().for_each(|e| self.exports.remove(&e.name));
                    return Err(e.into());
                }
            }
        }
        let open = Arc::new(OpenView {
            id: id.clone(),
            group: group.id(),
            group_name: group.name().to_owned(),
            point,
            exports,
            opened_us: self.clock.wall_us(),
            open_ms: started.elapsed().as_secs_f64() * 1000.0,
            opened_by: wish.opened_by,
            idle_limit: match wish.idle {
                Idle::Default => self.idle_limit,
                Idle::Never => None,
                Idle::After(limit) => Some(limit),
            },
        });
        crate::lock(&self.open).insert(id, Arc::clone(&open));
        // Deleted meanwhile: who deleted it has closed its views before this one was among them.
        if matches!(group.shared.phase(), Phase::Closed) {
            self.close(&open.id);
            return Err(GroupError::Closed.into());
        }
        self.events.note(Event::ViewOpened, group.name(), format!("{} at LSN {}", open.id, point.lsn));
        Ok(open)
    }

    /// False: there is no such view.
    pub fn close(&self, id: &str) -> bool {
        let Some(view) = crate::lock(&self.open).remove(id) else { return false };
        self.take_down(&view);
        true
    }
    /// Closes what nobody has had open for longer than it was given.
    pub fn close_idle(&self) {
        for view in self.list() {
            if view.closes_in() == Some(Duration::ZERO) && self.close(&view.id) {
                let limit = view.idle_limit.unwrap_or_default().as_secs();
                let text = format!("{}: nobody had it open for {} min {:02} s", view.id, limit / 60, limit % 60);
                self.events.note(Event::ViewExpired, &view.group_name, text);
            }
        }
    }
    pub fn close_group(&self, group: GroupId) {
        let of_group: Vec<_> = self.list().into_iter().filter(|v| v.group == group).collect();
        for view in of_group {
            self.close(&view.id);
        }
    }
    fn take_down(&self, view: &OpenView) {
        view.exports.iter().for_each(|e| self.exports.remove(&e.name));
        self.events.note(Event::ViewClosed, &view.group_name, &view.id);
    }

    pub fn list(&self) -> Vec<Arc<OpenView>> {
        crate::lock(&self.open).values().cloned().collect()
    }
}
