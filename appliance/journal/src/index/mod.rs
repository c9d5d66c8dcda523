//! The index: where the newest version of a sector lies, for any segment boundary of the history. Disposable: everything in
//! it can be made again from the segments' footers, and a reader that cannot use it reads the footers instead.
//!
//! - [`piece`](self): versions become non-overlapping pieces, runs merge ([`pieces_from_versions`], [`merge`]);
//! - runs and generations: which run covers what, what a view needs, what to build next ([`Shape`]);
//! - [`IndexStore`]: where runs lie. [`SledStore`] keeps them in one sled directory per generation, [`MemStore`] in memory.
//!
//! The law of every store: **a lookup answers completely and rightly, or with an error**. Damage, a lost page, a panic of the
//! library below: all end as [`IndexError::Unavailable`] for that generation, the reader falls back to footers, and the
//! runs of that generation are due again ([`IndexStore::run`] answers none).

mod filter;
mod mem;
mod page;
mod piece;
mod run;
mod sled;

pub use mem::MemStore;
pub use piece::{Piece, PieceKind, Version, merge, pieces_from_versions, take_missing};
pub use run::{GenerationId, Inputs, RunId, RunTask, Shape, Source};
pub use sled::{SledOptions, SledStore};

use model::{Extent, VolumeId};
use serde::{Deserialize, Serialize};

/// Why the index did not answer.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The generation's store is damaged or cannot be opened. It has been set aside: its runs are due again.
    #[error("the index of generation {generation} is not available and will be rebuilt")]
    Unavailable {
        generation: GenerationId,
        #[source]
        why: Damage,
    },
    /// The run was never written, or its generation was dropped or set aside.
    #[error("the index has no {0}")]
    NoRun(RunId),
    /// What was to be stored is no run: a piece is empty, or not after the one before it.
    #[error("{run}: the piece at volume {} sector {} is out of order", piece.volume, piece.lba)]
    OutOfOrder { run: RunId, piece: Piece },
}

/// What is wrong with a store of index pages.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    #[error("the store cannot be locked: another process has it open")]
    Locked,
    #[error("the store failed")]
    Store(#[source] Box<::sled::Error>),
    #[error("the store panicked: {0}")]
    Panicked(String),
    #[error("the directory cannot be used")]
    Directory(#[source] std::io::Error),
    #[error("{what}")]
    Content { what: &'static str },
    /// It was found damaged before and has not been set aside yet.
    #[error("found damaged earlier")]
    Earlier,
}

/// Facts of a stored run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RunInfo {
    pub pieces: u64,
    pub pages: u64,
    /// Of the packed pages, without the store's own overhead.
    pub bytes: u64,
    /// What the writer gave with it; see [`IndexStore::put_run`].
    pub tag: u64,
}

/// Pieces of a stored run, in order.
pub type RunIter<'a> = Box<dyn Iterator<Item = Result<Piece, IndexError>> + Send + 'a>;

/// Where runs lie. All methods may block; none may be called from an async worker.
pub trait IndexStore: Send + Sync + std::fmt::Debug {
    /// Stores a whole run. After `Ok` it is found by [`IndexStore::run`] and, after [`IndexStore::flush`], also when power
    /// was lost. A run that was cut short is never seen. One that exists already is left as it is.
    ///
    /// `tag` is the caller's fingerprint of what the run was made from (e.g. checksums of footers), handed back in
    /// [`RunInfo`]: a run whose tag is not the expected one is not to be used.
    fn put_run(
        &self,
        run: RunId,
        tag: u64,
        pieces: &mut dyn Iterator<Item = Result<Piece, IndexError>>,
    ) -> Result<RunInfo, IndexError>;
    /// Whether the run is there, and its facts. Cheap.
    fn run(&self, run: RunId) -> Option<RunInfo>;
    #[cfg(test)]
    fn has_run(&self, run: RunId) -> bool {
        self.run(run).is_some()
    }
    /// Appends the run's pieces that meet `extent`, in order, clipped to it. On an error nothing is appended.
    fn lookup(&self, run: RunId, volume: VolumeId, extent: Extent, out: &mut Vec<Piece>) -> Result<(), IndexError>;
    /// All pieces of the run.
    fn run_iter(&self, run: RunId) -> Result<RunIter<'_>, IndexError>;
    /// The generations that have anything stored.
    fn generations(&self) -> Vec<GenerationId>;
    /// Removes a generation and gives its room back; one that is not there is fine.
    fn drop_generation(&self, generation: GenerationId) -> Result<(), IndexError>;
    /// How many generations were found damaged since the store was opened.
    fn damaged(&self) -> u32 {
        0
    }
    /// Bytes on disk (or in memory).
    fn bytes(&self) -> u64;
    /// After `Ok`, all runs put before survive power loss.
    fn flush(&self) -> Result<(), IndexError>;
}

#[cfg(test)]
pub(crate) mod tests;
