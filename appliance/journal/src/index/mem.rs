//! Runs in memory: for tests and the simulated disk, where nothing may lie on a real one. Forgets everything when dropped,
//! as the index may.

use super::{GenerationId, IndexError, IndexStore, Piece, RunId, RunInfo, RunIter, Shape};
use model::{Extent, VolumeId};
use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

#[derive(Debug)]
struct MemRun {
    info: RunInfo,
    pieces: Vec<Piece>,
}

/// An [`IndexStore`] in memory. Not bounded: its size follows the history.
#[derive(Debug, Default)]
pub struct MemStore {
    shape: Shape,
    runs: RwLock<BTreeMap<RunId, Arc<MemRun>>>,
}

impl MemStore {
    pub fn new(shape: Shape) -> Self {
        Self { shape, runs: RwLock::default() }
    }
    fn get(&self, run: RunId) -> Result<Arc<MemRun>, IndexError> {
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        runs.get(&run).cloned().ok_or(IndexError::NoRun(run))
    }
}

impl IndexStore for MemStore {
    fn put_run(
        &self,
        run: RunId,
        tag: u64,
        pieces: &mut dyn Iterator<Item = Result<Piece, IndexError>>,
    ) -> Result<RunInfo, IndexError> {
        if let Some(info) = self.run(run) {
            return Ok(info);
        }
        let mut list: Vec<Piece> = Vec::new();
        for piece in pieces {
            let piece = piece?;
            if piece.sectors == 0
                || list.last().is_some_and(|last| (piece.volume, piece.lba) < (last.volume, last.end()))
            {
                return Err(IndexError::OutOfOrder { run, piece });
            }
            list.push(piece);
        }
        let info =
            RunInfo { pieces: list.len() as u64, pages: 0, bytes: (list.len() * size_of::<Piece>()) as u64, tag };
        let mut runs = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        Ok(runs.entry(run).or_insert_with(|| Arc::new(MemRun { info, pieces: list })).info)
    }

    fn run(&self, run: RunId) -> Option<RunInfo> {
        self.get(run).ok().map(|found| found.info)
    }

    fn lookup(&self, run: RunId, volume: VolumeId, extent: Extent, out: &mut Vec<Piece>) -> Result<(), IndexError> {
        let found = self.get(run)?;
        let first = found.pieces.partition_point(|p| (p.volume, p.end()) <= (volume, extent.start()));
        let meeting = found.pieces[first..].iter().take_while(|p| p.volume == volume && p.lba < extent.end());
        out.extend(meeting.filter_map(|p| p.clip(extent.start(), extent.end())));
        Ok(())
    }

    fn run_iter(&self, run: RunId) -> Result<RunIter<'_>, IndexError> {
        let found = self.get(run)?;
        Ok(Box::new((0..found.pieces.len()).map(move |i| Ok(found.pieces[i]))))
    }

    fn generations(&self) -> Vec<GenerationId> {
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<GenerationId> = runs.keys().map(|run| self.shape.generation(*run)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn drop_generation(&self, generation: GenerationId) -> Result<(), IndexError> {
        let mut runs = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        runs.retain(|run, _| self.shape.generation(*run) != generation);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        runs.values().map(|run| run.info.bytes).sum()
    }

    fn flush(&self) -> Result<(), IndexError> {
        Ok(())
    }
}
