//! Properties of pieces, merges, runs and both stores, against one cell per sector.

use super::{run::MAP_SHARE, sled::SET_ASIDE_MAX, *};
use model::{ExtentSet, Lsn, TimelineId};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A small generator; the seed is printed by whoever fails.
pub(crate) fn rng(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        s % below.max(1)
    }
}

/// A number of fewer than `bits` bits, each width as likely as the others.
pub(crate) fn below_bits(draw: &mut impl FnMut(u64) -> u64, bits: u64) -> u64 {
    let wide = draw(bits);
    draw(1 << wide)
}

const SECTORS: u64 = 160;
const VOLUMES: u32 = 3;
const TIMELINE: TimelineId = TimelineId(4);

/// Where a sector's newest data is: what a piece says of one sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cell {
    ordinal: u32,
    offset: u32,
    skip: u32,
    zero: bool,
}

/// One cell per (volume, sector); the newest version wins because it is written last.
type Cells = BTreeMap<(u32, u64), Cell>;

fn versions(draw: &mut impl FnMut(u64) -> u64, lsn: &mut u64, count: u64) -> Vec<Version> {
    (0..count)
        .map(|i| {
            *lsn += 1;
            let lba = draw(SECTORS);
            let zero = draw(5) == 0;
            Version {
                volume: VolumeId(draw(u64::from(VOLUMES)) as u32),
                lba,
                sectors: draw((SECTORS - lba).min(30) + 1) as u32,
                lsn: Lsn(*lsn),
                offset: 4096 + i as u32 * 608,
                kind: if zero { PieceKind::Zero } else { PieceKind::Data },
            }
        })
        .collect()
}

fn paint(cells: &mut Cells, ordinal: u32, versions: &[Version]) {
    for v in versions {
        for i in 0..u64::from(v.sectors) {
            let zero = v.kind == PieceKind::Zero;
            let cell = if zero {
                Cell { ordinal, offset: 0, skip: 0, zero }
            } else {
                Cell { ordinal, offset: v.offset, skip: i as u32, zero }
            };
            cells.insert((v.volume.0, v.lba + i), cell);
        }
    }
}

fn cells_of(pieces: &[Piece]) -> Cells {
    let mut cells = Cells::new();
    for p in pieces {
        for i in 0..p.sectors {
            let zero = p.kind == PieceKind::Zero;
            let skip = if zero { 0 } else { p.skip + i };
            let cell = Cell { ordinal: p.ordinal, offset: p.offset, skip, zero };
            let before = cells.insert((p.volume.0, p.lba + u64::from(i)), cell);
            assert_eq!(before, None, "pieces overlap at {p:?}");
        }
    }
    cells
}

/// Zero cells compare equal whatever ordinal they carry: their answer needs no record.
fn same(a: &Cells, b: &Cells) -> bool {
    let plain = |cells: &Cells| -> Cells {
        cells.iter().map(|(k, c)| (*k, if c.zero { Cell { ordinal: 0, ..*c } } else { *c })).collect()
    };
    plain(a) == plain(b)
}

fn assert_canonical(pieces: &[Piece], seed: u64) {
    for w in pieces.windows(2) {
        assert!((w[0].volume, w[0].end()) <= (w[1].volume, w[1].lba), "seed {seed}: {w:?} out of order");
        let touch = w[0].volume == w[1].volume && w[0].end() == w[1].lba;
        let both_zero = w[0].kind == PieceKind::Zero && w[1].kind == PieceKind::Zero;
        let one_record = w[0].kind == PieceKind::Data
            && w[1].kind == PieceKind::Data
            && (w[0].ordinal, w[0].offset) == (w[1].ordinal, w[1].offset)
            && w[0].skip + w[0].sectors == w[1].skip;
        assert!(!(touch && (both_zero || one_record)), "seed {seed}: {w:?} could be one");
    }
    assert!(pieces.iter().all(|p| p.sectors > 0), "seed {seed}");
}

fn ok(pieces: &[Piece]) -> impl Iterator<Item = Result<Piece, IndexError>> + '_ {
    pieces.iter().map(|p| Ok(*p))
}

#[test]
fn pieces_agree_with_one_cell_per_sector() {
    for seed in 1..600 {
        let mut draw = rng(seed);
        let count = draw(60);
        let list = versions(&mut draw, &mut 0, count);
        let mut want = Cells::new();
        paint(&mut want, 7, &list);
        // The order in which a footer lists versions must not matter.
        let mut shuffled = list.clone();
        for i in (1..shuffled.len()).rev() {
            shuffled.swap(i, draw(i as u64 + 1) as usize);
        }
        let pieces = pieces_from_versions(7, shuffled);
        assert_canonical(&pieces, seed);
        assert_eq!(cells_of(&pieces), want, "seed {seed}");
    }
}

#[test]
fn extents_at_the_end_of_the_address_space_are_kept() {
    let at = |lba, sectors, lsn| Version {
        volume: VolumeId(0),
        lba,
        sectors,
        lsn: Lsn(lsn),
        offset: 4096,
        kind: PieceKind::Data,
    };
    let pieces = pieces_from_versions(0, [at(u64::MAX - 10, 10, 1), at(u64::MAX - 5, 2, 2), at(u64::MAX, 9, 3)]);
    let ends: Vec<(u64, u64)> = pieces.iter().map(|p| (p.lba, p.end())).collect();
    let max = u64::MAX;
    assert_eq!(ends, [(max - 10, max - 5), (max - 5, max - 3), (max - 3, max)]);
}

#[test]
fn zeroes_longer_than_a_piece_stay_apart() {
    let zero =
        |lba| Version { volume: VolumeId(0), lba, sectors: u32::MAX, lsn: Lsn(1), offset: 0, kind: PieceKind::Zero };
    let pieces = pieces_from_versions(0, [zero(0), zero(u64::from(u32::MAX))]);
    assert_eq!(pieces.iter().map(|p| p.extent().sectors.0).sum::<u64>(), 2 * u64::from(u32::MAX));
}

#[test]
fn a_merge_hides_the_older_and_keeps_the_rest() {
    for seed in 1..600 {
        let mut draw = rng(seed);
        let mut lsn = 0;
        let mut want = Cells::new();
        let mut runs: Vec<Vec<Piece>> = Vec::new();
        for ordinal in 0..1 + draw(9) as u32 {
            let count = draw(30);
            let list = versions(&mut draw, &mut lsn, count);
            paint(&mut want, ordinal, &list);
            runs.push(pieces_from_versions(ordinal, list));
        }
        let keep_from = draw(runs.len() as u64 + 1) as u32;
        runs.reverse();
        let merged: Vec<Piece> = merge(runs.iter().map(|run| ok(run)), 0)
            .map(|p| p.unwrap_or_else(|e| panic!("seed {seed}: {e}")))
            .collect();
        assert_canonical(&merged, seed);
        assert!(same(&cells_of(&merged), &want), "seed {seed}");

        let pruned: Vec<Piece> = merge(runs.iter().map(|run| ok(run)), keep_from)
            .map(|p| p.unwrap_or_else(|e| panic!("seed {seed}: {e}")))
            .collect();
        let kept: Cells = want.iter().filter(|(_, cell)| cell.ordinal >= keep_from).map(|(k, c)| (*k, *c)).collect();
        assert!(same(&cells_of(&pruned), &kept), "seed {seed}: keep from {keep_from}");
    }
}

#[test]
fn a_merge_ends_with_the_error_of_its_input() {
    let piece =
        Piece { volume: VolumeId(0), lba: 5, sectors: 1, ordinal: 0, offset: 4096, skip: 0, kind: PieceKind::Data };
    let far = Piece { lba: 50, ..piece };
    let run = RunId::new(TIMELINE, 0, 0);
    let bad = vec![Ok(piece), Err(IndexError::NoRun(run)), Ok(far)];
    let got: Vec<Result<Piece, IndexError>> = merge([bad.into_iter()], 0).collect();
    assert!(got.iter().any(Result::is_err));
    assert!(!got.iter().any(|p| p.as_ref().is_ok_and(|p| p.lba == 50)), "nothing may follow the error: {got:?}");
}

#[test]
fn taking_what_is_missing_fills_from_the_newest_down() {
    for seed in 1..300 {
        let mut draw = rng(seed);
        let mut lsn = 0;
        let mut want = Cells::new();
        let mut runs = Vec::new();
        for ordinal in 0..6 {
            let list = versions(&mut draw, &mut lsn, 12);
            paint(&mut want, ordinal, &list);
            runs.push(pieces_from_versions(ordinal, list));
        }
        let extent = Extent::new(draw(SECTORS), 1 + draw(SECTORS));
        let mut missing = ExtentSet::from_iter([extent]);
        let mut out = Vec::new();
        for run in runs.iter().rev() {
            let found: Vec<Piece> = run.iter().filter(|p| p.volume == VolumeId(1)).copied().collect();
            take_missing(&mut missing, &found, &mut out);
        }
        let mut got = cells_of(&out);
        let inside = |k: &(u32, u64)| k.0 == 1 && (extent.start()..extent.end()).contains(&k.1);
        want.retain(|k, _| inside(k));
        assert!(same(&got, &want), "seed {seed}");
        got.retain(|k, _| !inside(k));
        assert!(got.is_empty(), "seed {seed}: {got:?} is outside {extent:?}");
        let left: u64 = missing.sectors().0;
        assert_eq!(left, extent.sectors.0 - want.len() as u64, "seed {seed}");
    }
}

// ---- runs -----------------------------------------------------------------------------------------------------------

#[test]
fn only_powers_of_the_fanout_make_a_generation() {
    let right: Vec<u32> = (0..=5000).filter(|n| Shape::new(*n).is_some()).collect();
    assert_eq!(right, [8, 64, 512, 4096]);
    assert_eq!(Shape::new(512), Some(Shape::default()));
}

#[test]
fn a_decomposition_covers_every_range_once_and_is_short() {
    for (segments, limit, per_view) in [(8, 100, 8), (64, 300, 15)] {
        let shape = Shape::new(segments).expect("a power of eight");
        for end in 0..limit {
            for first_kept in 0..=end {
                let runs = shape.decompose(TIMELINE, first_kept, end);
                assert!(runs.len() <= per_view, "[{first_kept}, {end}): {} runs", runs.len());
                let mut at = end;
                for run in &runs {
                    let covers = shape.covers(*run);
                    assert_eq!(covers.end, at, "[{first_kept}, {end}): {run} is out of order");
                    assert!(at > first_kept, "[{first_kept}, {end}): {run} is not needed");
                    at = covers.start;
                    let generation = shape.generation(*run);
                    let stored = shape.segments(generation);
                    assert!(run.is_map() || (stored.start <= covers.start && covers.end <= stored.end), "{run}");
                }
                assert!(at <= first_kept, "[{first_kept}, {end}) is not covered below {at}");
            }
        }
    }
}

#[test]
fn a_cover_uses_what_is_there_and_footers_for_the_rest() {
    let shape = Shape::new(64).expect("a power of eight");
    for seed in 1..2000 {
        let mut draw = rng(seed);
        let end = draw(200) as u32;
        let first_kept = draw(u64::from(end) + 1) as u32;
        let salt = draw(u64::MAX);
        let have = |run: RunId| {
            let mut dice = rng(salt ^ (u64::from(run.level) << 40) ^ u64::from(run.ordinal).wrapping_mul(0x1234_5677));
            dice(3);
            dice(3) > 0
        };
        let mut at = end;
        for source in shape.cover(TIMELINE, first_kept, end, have) {
            assert!(at > first_kept, "seed {seed}");
            let covers = match source {
                Source::Run(run) => {
                    assert!(have(run), "seed {seed}: {run}");
                    shape.covers(run)
                }
                Source::Footer(ordinal) => {
                    assert!(!have(RunId::new(TIMELINE, 0, ordinal)), "seed {seed}: {ordinal}");
                    ordinal..ordinal + 1
                }
            };
            assert_eq!(covers.end, at, "seed {seed}");
            at = covers.start;
        }
        assert!(at <= first_kept, "seed {seed}");
    }
}

/// A history that grows, is folded, and whose index is built and lost at random.
struct World {
    shape: Shape,
    footers: BTreeMap<u32, Vec<Version>>,
    sealed: u32,
    first_kept: u32,
    lsn: u64,
}

impl World {
    fn new(shape: Shape) -> Self {
        Self { shape, footers: BTreeMap::new(), sealed: 0, first_kept: 0, lsn: 0 }
    }

    fn seal(&mut self, draw: &mut impl FnMut(u64) -> u64) {
        let count = draw(12);
        let list = versions(draw, &mut self.lsn, count);
        self.footers.insert(self.sealed, list);
        self.sealed += 1;
    }

    /// Runs the next job; false when nothing is due.
    fn work(&self, store: &dyn IndexStore, seed: u64) -> bool {
        let pieces = |run| store.run(run).map(|info| info.pieces);
        let Some(task) = self.shape.next_due(TIMELINE, self.first_kept, self.sealed, pieces) else { return false };
        assert!(!store.has_run(task.run), "seed {seed}: {} is there already", task.run);
        match &task.inputs {
            Inputs::Footer(ordinal) => {
                assert!(*ordinal >= self.first_kept, "seed {seed}: segment {ordinal} is deleted");
                let list = pieces_from_versions(*ordinal, self.footers[ordinal].iter().copied());
                store.put_run(task.run, 9, &mut ok(&list)).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
            Inputs::Runs { newest_first, keep_from } => {
                let inputs: Vec<RunIter<'_>> = newest_first
                    .iter()
                    .map(|run| {
                        store.run_iter(*run).unwrap_or_else(|e| panic!("seed {seed}: {} from {run}: {e}", task.run))
                    })
                    .collect();
                let mut merged = merge(inputs, *keep_from);
                store.put_run(task.run, 9, &mut merged).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
        }
        true
    }

    fn check(&self, store: &dyn IndexStore, end: u32, extent: Extent, seed: u64) -> usize {
        let mut want = Cells::new();
        // The oracle keeps all footers, deleted or not.
        for (ordinal, list) in self.footers.range(..end) {
            paint(&mut want, *ordinal, list);
        }
        let sources = self.shape.cover(TIMELINE, self.first_kept, end, |run| store.has_run(run));
        for volume in 0..VOLUMES {
            let mut missing = ExtentSet::from_iter([extent]);
            let mut out = Vec::new();
            for source in &sources {
                let mut found = Vec::new();
                match source {
                    Source::Run(run) => store
                        .lookup(*run, VolumeId(volume), extent, &mut found)
                        .unwrap_or_else(|e| panic!("seed {seed}: {run}: {e}")),
                    Source::Footer(ordinal) => {
                        assert!(*ordinal >= self.first_kept, "seed {seed}: footer {ordinal} is deleted");
                        let list = pieces_from_versions(*ordinal, self.footers[ordinal].iter().copied());
                        found.extend(list.iter().filter(|p| p.volume.0 == volume));
                    }
                }
                take_missing(&mut missing, &found, &mut out);
            }
            let got = cells_of(&out);
            for lba in extent.start()..extent.end() {
                let want = want.get(&(volume, lba)).copied();
                let got = got.get(&(volume, lba)).copied();
                let right = match (want, got) {
                    (None, None) => true,
                    // In the base: not there, pointing at a deleted segment, or the zeroes the base has too.
                    (Some(want), None) => want.ordinal < self.first_kept,
                    (Some(want), Some(got)) if want.zero => got.zero,
                    (Some(want), Some(got)) => got == want,
                    (None, Some(_)) => false,
                };
                assert!(
                    right,
                    "seed {seed}: view of segments below {end}, volume {volume} sector {lba}: {got:?}, not {want:?}"
                );
            }
        }
        sources.len()
    }
}

fn live_in_a_world(store: &dyn IndexStore, shape: Shape, steps: u64, seed: u64) {
    let mut draw = rng(seed);
    let mut world = World::new(shape);
    for _ in 0..steps {
        match draw(20) {
            0..8 => world.seal(&mut draw),
            8..17 => {
                world.work(store, seed);
            }
            17 => {
                let ahead = u64::from(world.sealed - world.first_kept);
                world.first_kept += draw(ahead / 3 + 1) as u32;
                for id in store.generations() {
                    if shape.segments(id).end <= world.first_kept {
                        store.drop_generation(id).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                    }
                }
            }
            18 => {
                let all = store.generations();
                if draw(4) == 0 && !all.is_empty() {
                    store
                        .drop_generation(all[draw(all.len() as u64) as usize])
                        .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                }
            }
            _ => {
                let end = world.first_kept + draw(u64::from(world.sealed - world.first_kept) + 1) as u32;
                let extent = Extent::new(draw(SECTORS), 1 + draw(SECTORS));
                world.check(store, end, extent, seed);
            }
        }
    }
    let mut jobs = 0;
    while world.work(store, seed) {
        jobs += 1;
        assert!(jobs < 10_000, "seed {seed}: the schedule does not end");
    }
    let whole = Extent::new(0, SECTORS * 2);
    for end in world.first_kept..=world.sealed {
        world.check(store, end, whole, seed);
        let footers = shape
            .cover(TIMELINE, world.first_kept, end, |run| store.has_run(run))
            .into_iter()
            .filter(|source| matches!(source, Source::Footer(_)))
            .count();
        assert_eq!(footers, 0, "seed {seed}: all is built, but a view below {end} reads footers");
    }
}

#[test]
fn views_are_right_while_the_index_is_built_folded_and_lost() {
    for seed in 1..150 {
        let shape = Shape::new(if seed % 3 == 0 { 64 } else { 8 }).expect("a power of eight");
        live_in_a_world(&MemStore::new(shape), shape, 220, seed);
    }
}

#[test]
fn maps_are_not_written_more_often_than_they_pay() {
    // Every segment writes 1000 sectors nothing else ever writes: the worst case for maps.
    let shape = Shape::new(8).expect("a power of eight");
    let mut have: BTreeMap<RunId, u64> = BTreeMap::new();
    let mut written = 0;
    let generations = 300;
    while let Some(task) = shape.next_due(TIMELINE, 0, 8 * generations, |run| have.get(&run).copied()) {
        let count = match &task.inputs {
            Inputs::Footer(_) => 1000,
            Inputs::Runs { newest_first, .. } => newest_first.iter().map(|run| have[run]).sum(),
        };
        if task.run.is_map() {
            written += count;
        }
        have.insert(task.run, count);
    }
    let history = 8000 * u64::from(generations);
    assert!(written <= (MAP_SHARE + 1) * history + history, "{written} pieces of maps for {history} of history");
    let sources = shape.cover(TIMELINE, 0, 8 * generations, |run| have.contains_key(&run));
    assert!(sources.len() <= 1 + generations as usize / 4 + 1, "{} sources", sources.len());
}

// ---- stores ---------------------------------------------------------------------------------------------------------

fn sled_at(dir: &Path, shape: Shape) -> SledStore {
    let options = SledOptions { cache_bytes: 4 << 20, open_max: 2, ..SledOptions::default() };
    SledStore::open(dir, *b"holdfast-journal", shape, options).expect("a directory of ours can be made")
}

fn many_pieces(draw: &mut impl FnMut(u64) -> u64, volumes: u32, per_volume: u64) -> Vec<Piece> {
    let mut out = Vec::new();
    for volume in 0..volumes {
        let mut lba = draw(1000);
        for _ in 0..per_volume {
            lba += below_bits(draw, 14);
            let kind = if draw(8) == 0 { PieceKind::Zero } else { PieceKind::Data };
            let is_data = u32::from(kind == PieceKind::Data);
            let piece = Piece {
                volume: VolumeId(volume),
                lba,
                sectors: 1 + draw(64) as u32,
                ordinal: draw(8) as u32,
                offset: (4096 + draw(1 << 20) as u32 * 32) * is_data,
                skip: draw(3) as u32 * is_data,
                kind,
            };
            lba = piece.end();
            out.push(piece);
        }
    }
    out
}

fn slow_lookup(pieces: &[Piece], volume: VolumeId, extent: Extent) -> Vec<Piece> {
    pieces.iter().filter(|p| p.volume == volume).filter_map(|p| p.clip(extent.start(), extent.end())).collect()
}

fn probe(draw: &mut impl FnMut(u64) -> u64, pieces: &[Piece]) -> (VolumeId, Extent) {
    let near = if pieces.is_empty() { 0 } else { pieces[draw(pieces.len() as u64) as usize].lba };
    let start = (near + draw(200)).saturating_sub(100);
    let wide = 1 << draw(16);
    (VolumeId(draw(5) as u32), Extent::new(start, draw(wide)))
}

#[test]
fn both_stores_answer_as_a_list_would() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let mem = MemStore::new(shape);
    let store = sled_at(&dir.path().join("index"), shape);
    for seed in 1..40 {
        let mut draw = rng(seed);
        let volumes = draw(5) as u32;
        let per_volume = draw(900);
        let pieces = many_pieces(&mut draw, volumes, per_volume);
        let run = RunId::new(TIMELINE, (seed % 2) as u8, seed as u32);
        for one in [&mem as &dyn IndexStore, &store] {
            let info = one.put_run(run, seed, &mut ok(&pieces)).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert_eq!((info.pieces, info.tag), (pieces.len() as u64, seed), "seed {seed}");
            assert_eq!(one.run(run), Some(info), "seed {seed}");
            let back: Vec<Piece> =
                one.run_iter(run).and_then(Iterator::collect).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert_eq!(back, pieces, "seed {seed}");
            for _ in 0..60 {
                let (volume, extent) = probe(&mut draw, &pieces);
                let mut got = vec![];
                one.lookup(run, volume, extent, &mut got).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                assert_eq!(got, slow_lookup(&pieces, volume, extent), "seed {seed}: {volume} {extent:?} in {one:?}");
            }
        }
    }
    assert_eq!(mem.generations(), store.generations());
}

#[test]
fn runs_in_sled_survive_a_restart_and_generations_are_dropped_whole() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let mut lists = BTreeMap::new();
    {
        let store = sled_at(dir.path(), shape);
        for ordinal in 0..40 {
            let run = RunId::new(TIMELINE, 0, ordinal);
            let pieces = many_pieces(&mut rng(u64::from(ordinal) + 1), 2, 300);
            store.put_run(run, 1, &mut ok(&pieces)).expect("an undamaged store takes runs");
            lists.insert(run, pieces);
        }
        store.flush().expect("an undamaged store can be flushed");
    }
    let store = sled_at(dir.path(), shape);
    assert_eq!(store.generations().len(), 5);
    for (run, pieces) in &lists {
        assert!(store.has_run(*run), "{run}");
        let back: Vec<Piece> = store.run_iter(*run).and_then(Iterator::collect).expect("an undamaged store answers");
        assert_eq!(&back, pieces, "{run}");
    }
    let dropped = GenerationId { timeline: TIMELINE, number: 2 };
    let before = store.bytes();
    store.drop_generation(dropped).expect("a generation can be dropped");
    store.drop_generation(dropped).expect("dropping again is fine");
    assert!(store.bytes() < before);
    for run in lists.keys() {
        assert_eq!(store.has_run(*run), shape.generation(*run) != dropped, "{run}");
    }
    let gone = RunId::new(TIMELINE, 0, 16);
    let answer = store.lookup(gone, VolumeId(0), Extent::new(0, 100), &mut vec![]);
    assert!(matches!(answer, Err(IndexError::NoRun(run)) if run == gone), "{answer:?}");
}

#[test]
fn a_run_cut_short_is_not_seen_and_can_be_written_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let run = RunId::new(TIMELINE, 0, 3);
    let first = many_pieces(&mut rng(1), 3, 700);
    let second = many_pieces(&mut rng(2), 2, 500);
    {
        let store = sled_at(dir.path(), shape);
        let mut broken = ok(&first).chain([Err(IndexError::NoRun(run))]);
        assert!(store.put_run(run, 1, &mut broken).is_err());
        assert!(!store.has_run(run));
        assert!(store.lookup(run, VolumeId(0), Extent::new(0, 1 << 30), &mut vec![]).is_err());
        store.flush().expect("an undamaged store can be flushed");
    }
    let store = sled_at(dir.path(), shape);
    assert!(!store.has_run(run));
    store.put_run(run, 2, &mut ok(&second)).expect("a second attempt is taken");
    let back: Vec<Piece> = store.run_iter(run).and_then(Iterator::collect).expect("an undamaged store answers");
    assert_eq!(back, second);
    assert_eq!(store.damaged(), 0);
}

#[test]
fn a_run_out_of_order_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let piece =
        Piece { volume: VolumeId(1), lba: 10, sectors: 5, ordinal: 0, offset: 64, skip: 0, kind: PieceKind::Data };
    let bad = [
        vec![piece, Piece { lba: 14, ..piece }],
        vec![piece, Piece { volume: VolumeId(0), ..piece }],
        vec![Piece { sectors: 0, ..piece }],
    ];
    for store in [&MemStore::new(shape) as &dyn IndexStore, &sled_at(dir.path(), shape)] {
        for (i, list) in bad.iter().enumerate() {
            let run = RunId::new(TIMELINE, 0, i as u32);
            let answer = store.put_run(run, 0, &mut ok(list));
            assert!(matches!(answer, Err(IndexError::OutOfOrder { .. })), "{answer:?}");
            assert!(!store.has_run(run));
        }
    }
}

#[test]
fn views_are_right_over_sled_too() {
    for seed in 1..12 {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let shape = Shape::new(8).expect("a power of eight");
        let store = sled_at(dir.path(), shape);
        live_in_a_world(&store, shape, 120, seed);
        assert_eq!(store.damaged(), 0, "seed {seed}");
    }
}

#[test]
fn another_journals_index_is_not_believed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let run = RunId::new(TIMELINE, 0, 0);
    sled_at(dir.path(), shape)
        .put_run(run, 0, &mut ok(&many_pieces(&mut rng(3), 1, 50)))
        .expect("an undamaged store takes runs");
    let other = SledStore::open(dir.path(), [7; 16], shape, SledOptions::default()).expect("the directory is there");
    assert!(!other.has_run(run));
    assert_eq!(other.damaged(), 1);
    other.put_run(run, 0, &mut ok(&[])).expect("a new generation takes the place");
    assert!(other.has_run(run));
}

#[test]
fn a_store_that_is_locked_says_so_and_is_left_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let run = RunId::new(TIMELINE, 0, 0);
    let first = sled_at(dir.path(), shape);
    first.put_run(run, 0, &mut ok(&many_pieces(&mut rng(3), 1, 50))).expect("an undamaged store takes runs");
    let second = SledStore::open(
        dir.path(),
        *b"holdfast-journal",
        shape,
        SledOptions { lock_tries: 1, ..SledOptions::default() },
    )
    .expect("the directory is there");
    let answer = second.lookup(run, VolumeId(0), Extent::new(0, 10), &mut vec![]);
    assert!(matches!(answer, Err(IndexError::Unavailable { why: Damage::Locked, .. })), "{answer:?}");
    assert_eq!(second.damaged(), 0);
    drop(first);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !second.has_run(run) {
        assert!(std::time::Instant::now() < deadline, "the lock is not given back");
    }
}

/// Every file below `dir`, with what is in it.
fn files(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of ours can be listed") {
            let path = entry.expect("a folder of ours can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).expect("a file of ours can be read");
                out.push((path, bytes));
            }
        }
    }
    out.sort();
    out
}

#[test]
fn damage_at_rest_never_gives_a_wrong_answer() {
    let shape = Shape::new(8).expect("a power of eight");
    let home = tempfile::tempdir().expect("a temporary directory");
    let clean = home.path().join("clean");
    let mut lists: BTreeMap<RunId, Vec<Piece>> = BTreeMap::new();
    {
        let store = sled_at(&clean, shape);
        for ordinal in 0..8 {
            let run = RunId::new(TIMELINE, 0, ordinal);
            let pieces = many_pieces(&mut rng(u64::from(ordinal) + 50), 2, 2500);
            store.put_run(run, 1, &mut ok(&pieces)).expect("an undamaged store takes runs");
            lists.insert(run, pieces);
        }
        store.flush().expect("an undamaged store can be flushed");
    }
    let originals = files(&clean);
    let (mut noticed, mut harmless) = (0, 0);
    let mut kinds = BTreeSet::new();
    for seed in 1..=120 {
        let mut draw = rng(seed);
        let dir = home.path().join(format!("damaged-{seed}"));
        for (path, bytes) in &originals {
            let to = dir.join(path.strip_prefix(&clean).expect("below the clean store"));
            std::fs::create_dir_all(to.parent().expect("a file has a folder")).expect("a folder can be made");
            std::fs::write(to, bytes).expect("a file can be written");
        }
        let mut all = files(&dir);
        let biggest = all.iter().enumerate().max_by_key(|(_, (_, bytes))| bytes.len()).map_or(0, |(i, _)| i);
        let victim = if draw(3) == 0 { draw(all.len() as u64) as usize } else { biggest };
        let (path, bytes) = &mut all[victim];
        let len = bytes.len() as u64;
        let kind = draw(5);
        kinds.insert(kind);
        match kind {
            0 => (0..8).for_each(|_| bytes[draw(len) as usize] ^= 1 << draw(8)),
            1 => bytes.truncate((len - draw(len.min(1 << 20)) - 1) as usize),
            2 => {
                let start = draw(len) as usize;
                let end = (start + 4096).min(bytes.len());
                bytes[start..end].fill(0);
            }
            3 => {
                let start = draw(len) as usize;
                let end = (start + 1 + draw(100_000) as usize).min(bytes.len());
                bytes[start..end].iter_mut().for_each(|b| *b = draw(256) as u8);
            }
            _ => {}
        }
        if kind == 4 {
            std::fs::remove_file(&*path).expect("a file can be removed");
        } else {
            std::fs::write(&*path, bytes).expect("a file can be written");
        }

        let store = sled_at(&dir, shape);
        let mut errors = 0;
        for round in 0..3 {
            for (run, pieces) in &lists {
                for _ in 0..8 {
                    let (volume, extent) = probe(&mut draw, pieces);
                    let mut got = Vec::new();
                    match store.lookup(*run, volume, extent, &mut got) {
                        Ok(()) => assert_eq!(
                            got,
                            slow_lookup(pieces, volume, extent),
                            "seed {seed}: a wrong answer from {run}"
                        ),
                        Err(_) => {
                            errors += 1;
                            assert!(got.is_empty(), "seed {seed}: pieces beside an error");
                        }
                    }
                }
                // A whole walk reads every page: it must give all pieces or an error.
                match store.run_iter(*run).and_then(Iterator::collect::<Result<Vec<Piece>, _>>) {
                    Ok(back) => assert_eq!(&back, pieces, "seed {seed}: a wrong walk of {run}"),
                    Err(_) => errors += 1,
                }
            }
            // What is not there is due: build it again, and all answers come back.
            for (run, pieces) in &lists {
                if !store.has_run(*run) {
                    let put = store.put_run(*run, 1, &mut ok(pieces));
                    assert!(put.is_ok() || round < 2, "seed {seed}: {run} cannot be rebuilt: {put:?}");
                }
            }
        }
        for (run, pieces) in &lists {
            let back: Vec<Piece> = store
                .run_iter(*run)
                .and_then(Iterator::collect)
                .unwrap_or_else(|e| panic!("seed {seed}: {run} after the rebuild: {e}"));
            assert_eq!(&back, pieces, "seed {seed}: {run} after the rebuild");
        }
        if errors > 0 {
            noticed += 1
        } else {
            harmless += 1
        }
        drop(store);
        std::fs::remove_dir_all(&dir).expect("a folder can be removed");
    }
    assert_eq!(kinds.len(), 5, "every kind of damage was tried");
    println!("damaged at rest: {noticed} noticed, {harmless} without effect");
    assert!(noticed > 20, "the damage does not reach the store: {noticed} of 120 noticed");
}

#[test]
fn the_index_directory_can_be_deleted_under_a_closed_store() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let run = RunId::new(TIMELINE, 0, 0);
    let pieces = many_pieces(&mut rng(4), 2, 100);
    sled_at(&dir.path().join("index"), shape).put_run(run, 0, &mut ok(&pieces)).expect("an undamaged store takes runs");
    std::fs::remove_dir_all(dir.path().join("index")).expect("a folder can be removed");
    let store = sled_at(&dir.path().join("index"), shape);
    assert!(!store.has_run(run) && store.generations().is_empty());
    store.put_run(run, 0, &mut ok(&pieces)).expect("an empty store takes runs");
    let back: Vec<Piece> = store.run_iter(run).and_then(Iterator::collect).expect("an undamaged store answers");
    assert_eq!(back, pieces);
}

#[test]
fn too_much_damage_turns_the_store_off_until_the_next_start() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let store = sled_at(dir.path(), shape);
    for number in 0..=SET_ASIDE_MAX {
        // A file where a directory of sled's is expected, in a generation of its own.
        let name = dir.path().join(format!("g{TIMELINE}-{number}"));
        std::fs::create_dir_all(&name).expect("a folder can be made");
        std::fs::write(name.join("db"), vec![0xa5; 100_000]).expect("a file can be written");
        std::fs::write(name.join("conf"), b"nonsense that is long enough").expect("a file can be written");
        let answer = store.put_run(RunId::new(TIMELINE, 0, number * 8), 0, &mut ok(&[]));
        assert!(matches!(answer, Err(IndexError::Unavailable { .. })), "{number}: {answer:?}");
    }
    assert_eq!(store.damaged(), SET_ASIDE_MAX);
    let bad = std::fs::read_dir(dir.path())
        .expect("a folder of ours can be listed")
        .filter(|e| e.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().ends_with(".bad")))
        .count();
    assert_eq!(bad, 1, "only the last damaged generation is kept");
}

#[test]
fn bytes_per_record_stay_below_the_goal() {
    // One generation of random 4 KiB writes to 512 GiB: nothing repeats, the worst case for an index. Records lie as the
    // writer lays them: 96 bytes of header and the payload, batches of 1 MiB.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(64).expect("a power of eight");
    let store =
        SledStore::open(dir.path(), [1; 16], shape, SledOptions::default()).expect("a directory of ours can be made");
    let mut draw = rng(11);
    let per_segment = 4000;
    let mut footers = BTreeMap::new();
    for ordinal in 0..64 {
        let list: Vec<Version> = (0..per_segment)
            .map(|i| Version {
                volume: VolumeId(0),
                lba: draw(1 << 27) * 8,
                sectors: 8,
                lsn: Lsn(i),
                offset: (4096 + 64 + i * 4192 + i / 250 * 4096) as u32,
                kind: PieceKind::Data,
            })
            .collect();
        footers.insert(ordinal, list);
    }
    let world = World { shape, footers, sealed: 64, first_kept: 0, lsn: 0 };
    let mut packed = 0;
    while world.work(&store, 11) {}
    store.flush().expect("an undamaged store can be flushed");
    let records = per_segment * 64;
    for level in [0, 1, RunId::MAP] {
        let runs = (0..64).map(|ordinal| RunId::new(TIMELINE, level, ordinal)).filter_map(|run| store.run(run));
        let bytes: u64 = runs.map(|info| info.bytes).sum();
        println!("level {level}: {:.2} bytes per record packed", bytes as f64 / records as f64);
        packed += bytes;
    }
    let disk = store.bytes();
    println!(
        "all levels: {:.2} bytes per record packed, {:.2} on the disk",
        packed as f64 / records as f64,
        disk as f64 / records as f64
    );
    // A generation of 512 has one level more.
    assert!((disk * 4 / 3) as f64 / (records as f64) < 40.0, "{disk} bytes for {records} records");
}

#[test]
fn a_closed_generation_is_known_without_opening_it_and_a_wrong_hint_does_no_harm() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shape = Shape::new(8).expect("a power of eight");
    let mut draw = rng(8);
    let mut world = World::new(shape);
    {
        let store = sled_at(dir.path(), shape);
        for _ in 0..20 {
            world.seal(&mut draw);
        }
        while world.work(&store, 8) {}
    }
    let open_files = |number: u32| {
        let name = format!("g{TIMELINE}-{number}/db");
        std::fs::read_dir("/proc/self/fd")
            .expect("Linux lists open files")
            .flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|target| target.starts_with(dir.path()) && target.ends_with(&name))
            .count()
    };
    let store = sled_at(dir.path(), shape);
    assert!(!world.work(&store, 8), "nothing is due after a restart");
    assert_eq!([0, 1, 2].map(open_files), [0, 0, 1], "only the open generation is opened");

    // The hint says more than is there: the first lookup finds out, and the runs are due again.
    std::fs::remove_file(dir.path().join(format!("g{TIMELINE}-0/db"))).expect("a file can be removed");
    let run = RunId::new(TIMELINE, 0, 3);
    assert!(store.has_run(run));
    let answer = store.lookup(run, VolumeId(0), Extent::new(0, SECTORS), &mut vec![]);
    assert!(answer.is_err(), "{answer:?}");
    assert!(!store.has_run(run));
    while world.work(&store, 8) {}
    for end in 0..=20 {
        world.check(&store, end, Extent::new(0, SECTORS), 8);
    }
}

#[test]
fn a_page_that_was_lost_or_is_of_an_earlier_attempt_is_noticed_by_every_read_that_needs_it() {
    let shape = Shape::new(8).expect("a power of eight");
    let run = RunId::new(TIMELINE, 0, 2);
    let old = many_pieces(&mut rng(20), 2, 2000);
    let pieces = many_pieces(&mut rng(21), 2, 2000);
    let pages = 2 * 2000usize.div_ceil(page::PAGE_PIECES);
    for victim in 0..pages {
        for stale in [false, true] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let raw = |act: &dyn Fn(&::sled::Db)| {
                let path = dir.path().join(format!("g{TIMELINE}-0"));
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
                let db = loop {
                    match ::sled::Config::new().path(&path).flush_every_ms(None).open() {
                        Ok(db) => break db,
                        Err(e) => assert!(std::time::Instant::now() < deadline, "{e}"),
                    }
                };
                act(&db);
                db.flush().expect("an undamaged store can be flushed");
            };
            let kept = std::cell::RefCell::new(Vec::new());
            {
                let store = sled_at(dir.path(), shape);
                let mut broken = ok(&old).chain([Err(IndexError::NoRun(run))]);
                assert!(store.put_run(run, 0, &mut broken).is_err());
            }
            raw(&|db| {
                let pages = db.scan_prefix(page::page_prefix(run)).collect::<Result<Vec<_>, _>>();
                *kept.borrow_mut() = pages.expect("an undamaged store can be read");
            });
            sled_at(dir.path(), shape).put_run(run, 0, &mut ok(&pieces)).expect("an undamaged store takes runs");
            raw(&|db| {
                let keys: Vec<_> = db.scan_prefix(page::page_prefix(run)).keys().flatten().collect();
                assert_eq!(keys.len(), pages);
                if stale {
                    // A page of the first attempt, put back below its own key, in place of the one that ends there.
                    db.remove(&keys[victim]).expect("an undamaged store takes changes");
                    for (key, bytes) in kept.borrow().iter() {
                        db.insert(key, bytes).expect("an undamaged store takes changes");
                    }
                } else {
                    db.remove(&keys[victim]).expect("an undamaged store takes changes");
                }
            });
            let store = sled_at(dir.path(), shape);
            let mut draw = rng(victim as u64 + 1);
            let mut errors = 0;
            for _ in 0..40 {
                let (volume, extent) = probe(&mut draw, &pieces);
                let mut got = Vec::new();
                match store.lookup(run, volume, extent, &mut got) {
                    Ok(()) => assert_eq!(got, slow_lookup(&pieces, volume, extent), "page {victim}, stale {stale}"),
                    Err(_) => errors += 1,
                }
            }
            let walk = store.run_iter(run).and_then(Iterator::collect::<Result<Vec<Piece>, _>>);
            assert!(errors > 0 || walk.is_err(), "page {victim}, stale {stale}: nothing was noticed");
            store.put_run(run, 0, &mut ok(&pieces)).expect("what was set aside can be built again");
            let back: Vec<Piece> = store.run_iter(run).and_then(Iterator::collect).expect("an undamaged store answers");
            assert_eq!(back, pieces, "page {victim}, stale {stale}");
        }
    }
}
