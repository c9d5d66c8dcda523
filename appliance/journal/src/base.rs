//! The base: each volume as it was at the floor of the history.
//!
//! ```text
//! base/vN.img    the volume, sparse; a block (4096 bytes) that reads as zeroes is a hole where the file system allows
//! base/vN.sum    4096 bytes of header, then for each block a CRC-32 (4 bytes, LE); 0 means "this block is all zeroes"
//!                (a block whose CRC-32 happens to be 0 has 1)
//! base/vN.redo   the new contents of the blocks that the fold's current chunk covers in part
//! ```
//!
//! # Invariants
//!
//! - Outside of a fold, every block of the image matches its checksum; a checksum of 0 matches zeroes only, so a lost
//!   checksum is noticed as well as a lost block.
//! - The base changes by folds only. A fold is done again, whole, until it succeeds: what it is made from is deleted only after
//!   the caller has persisted the new floor.
//! - No reader ever sees a block and another version of its checksum: each block and its checksum are written under the
//!   volume's lock.
//!
//! # A fold and power loss
//!
//! A fold comes as sorted pieces and is done in chunks of whole blocks (at most [`CHUNK_BYTES`]). For each chunk:
//!
//! 1. blocks that pieces cover **in part** are read (checked) and completed; their new contents go to `vN.redo`, which is
//!    replaced in one step and durable;
//! 2. blocks and checksums are written;
//! 3. image and checksums are flushed. Only then the next chunk may replace the redo file.
//!
//! Power lost in 1: the blocks are as before. In 2 or 3: any sector of the chunk's blocks and checksums is old or new. The
//! caller's control record says that the fold was begun, so it opens the base with `interrupted`: blocks of the redo file are
//! put right at once; blocks that the pieces cover whole are written again by the fold, and nobody reads them before,
//! because a view above the cutoff finds these sectors in segments. Checksums of blocks beside the chunk's share sectors with
//! its own, but their bytes are the same before and after. A redo file of a chunk that had been finished is the same
//! content once more. One of another fold (the LSN in it differs) is not used.
//!
//! So at no time is a block that was not rewritten given a fresh checksum: damage is never blessed.
//!
//! An *error* in the middle (disk full, failed flush) leaves the same state without a restart: reads of a block that does not
//! match answer [`BaseError::FoldInterrupted`], and the next fold starts with the redo file, on fresh handles.
//!
//! # Limits
//!
//! One fold per volume at a time; memory about twice [`CHUNK_BYTES`]. Reads wait for at most one stretch of blocks of a fold.
//!
//! Tests: an oracle of bytes over random folds; every crash point of a fold on the simulated disk; bit flips; a full disk.

use crate::error::{Corruption, Damage};
use durable::{Disk, DiskError, DiskErrorKind, DiskFile, OpenMode};
use model::{ByteLen, Extent, Lsn, SECTOR, Sectors, VolumeId};
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

/// Bytes covered by one checksum of the base.
pub const BASE_BLOCK: usize = 4096;

/// Blocks of one chunk of a fold: what is lost of a fold's work in a crash, and half of what it takes of memory.
pub const CHUNK_BYTES: usize = 8 << 20;

/// A chunk has at most so many stretches, so that a fold of nothing but zeroes is bounded too.
const CHUNK_STRETCHES: usize = 4096;

/// Blocks read at once.
const READ_BLOCKS: usize = 256;

/// Blocks of a read that does not wait (128 KiB): their checksums fit the stack.
const AT_ONCE_BLOCKS_MAX: usize = 32;

/// Checksums read at once (64 KiB), when a stretch is looked through.
const SUMS_AT_ONCE: u64 = 16 * 1024;

const BLOCK: u64 = BASE_BLOCK as u64;
const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;
const SUM_BYTES: u64 = 4;
const SUM_HEADER: u64 = 4096;
const SUM_MAGIC: &[u8; 8] = b"HFBASE1\n";
const REDO_MAGIC: &[u8; 8] = b"HFREDO1\n";

fn image_path(dir: &Path, volume: VolumeId) -> PathBuf {
    dir.join(format!("v{volume}.img"))
}
fn sums_path(dir: &Path, volume: VolumeId) -> PathBuf {
    dir.join(format!("v{volume}.sum"))
}
fn redo_path(dir: &Path, volume: VolumeId) -> PathBuf {
    dir.join(format!("v{volume}.redo"))
}

/// Why an operation on the base failed.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("the base is damaged")]
    Corruption(#[source] Corruption),
    #[error("the base cannot be reached")]
    Disk(#[from] DiskError),
    #[error("volume {0} has no base")]
    NoVolume(VolumeId),
    #[error("{extent:?} is outside volume {volume} of {} sectors", size.0)]
    Outside { volume: VolumeId, extent: Extent, size: Sectors },
    #[error("{bytes} bytes are not whole sectors")]
    NotSectors { bytes: usize },
    /// A fold was cut short; it has to be done again before this block can be read.
    #[error("the fold of volume {volume} to LSN {fold} was cut short and must be done again")]
    FoldInterrupted { volume: VolumeId, fold: Lsn },
    #[error("the piece at sector {lba} of volume {volume} is out of order, empty or not whole sectors")]
    BadPiece { volume: VolumeId, lba: u64 },
    /// What is to be folded could not be read.
    #[error("the records to fold cannot be read")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the base was opened for reading only")]
    ReadOnly,
}

/// What a fold writes into a stretch of the base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FoldData {
    /// Whole sectors.
    Data(Vec<u8>),
    /// This many sectors of zeroes; their room is given back.
    Zero(u64),
}

/// One stretch of a fold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoldPiece {
    pub lba: u64,
    pub data: FoldData,
}

/// What a fold did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FoldReport {
    pub pieces: u64,
    /// Of whole blocks, as written.
    pub bytes_written: u64,
    pub bytes_zeroed: u64,
}

/// What a check of a base looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VerifiedBase {
    /// Blocks that hold something.
    pub blocks: u64,
    pub damaged: u64,
}

/// The image at the floor of the window. The archive will take this one's place behind the same trait.
///
/// A fold, as the caller does it: persist "a fold to LSN x has begun" in the control record; [`Base::fold`] for each volume
/// with `fold = x`; persist the new floor; only then delete segments. When it stopped anywhere between, the base is
/// opened with `interrupted = Some(x)` and the same fold is done, whole: its segments are still there. Not one further: the LSN
/// persisted must stay that of the redo file until all of it is done.
pub trait Base: Send + Sync + fmt::Debug {
    /// Whether it holds nothing but zeroes until the first fold is done.
    fn begins_empty(&self) -> bool {
        true
    }
    /// Opens the volume's base. Makes it when it is not there, unless `must_exist` (a fold has been done): then its loss
    /// is damage. Grows it to `sectors` if it is smaller; never shrinks it.
    fn ensure_volume(&self, volume: VolumeId, sectors: Sectors, must_exist: bool) -> Result<(), BaseError>;
    /// Fills `buf` (whole sectors) from sector `lba` on. What no fold wrote reads as zeroes.
    fn read(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> Result<(), BaseError>;
    /// The same from what memory holds, without waiting for anything; false when that cannot be, or when anything is not as
    /// it should be: [`Base::read`] says what.
    fn read_at_once(&self, _volume: VolumeId, _lba: u64, _buf: &mut [u8]) -> bool {
        false
    }
    /// Has the disk bring the extent into memory, without waiting for it, where that is worth anything.
    fn prefetch(&self, _volume: VolumeId, _extent: Extent) {}
    /// The parts of `extent` that may hold something else than zeroes, in order, disjoint, in whole blocks but for the ends.
    fn written(&self, volume: VolumeId, extent: Extent) -> Result<Vec<Extent>, BaseError>;
    /// Writes sorted, disjoint pieces and makes them durable. Reads go on meanwhile. An item that is an error ends it; what
    /// came before may be in the base.
    fn fold(
        &self,
        fold: Lsn,
        volume: VolumeId,
        pieces: &mut dyn Iterator<Item = Result<FoldPiece, BaseError>>,
    ) -> Result<FoldReport, BaseError>;
    /// The caller has persisted the floor: the fold was done for all volumes.
    fn fold_done(&self, fold: Lsn);
    /// Bytes of blocks that hold something. The first call counts and takes a while on a large volume.
    fn bytes(&self) -> Result<ByteLen, BaseError>;
    /// Checks every block of the volume; damage is handed to `found`, and the walk goes on.
    fn verify(&self, volume: VolumeId, found: &mut dyn FnMut(Corruption)) -> Result<VerifiedBase, BaseError>;
}

/// A [`Base`] of image files on a [`Disk`].
#[derive(Debug)]
pub struct ImageBase {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    mode: OpenMode,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Volume>>>,
    /// Held while a volume's files are opened or made.
    opening: Mutex<()>,
    /// The fold that was begun and not finished.
    interrupted: Mutex<Option<Lsn>>,
}

#[derive(Debug)]
struct Volume {
    id: VolumeId,
    /// Write-locked while a block and its checksum are written.
    files: RwLock<Files>,
    /// Held by the one fold.
    folding: Mutex<()>,
}

#[derive(Debug)]
struct Files {
    /// None in a base opened for reading only that never had this volume, and in one for which there was no room to make it: it
    /// reads as zeroes, and a fold makes it first.
    open: Option<(Arc<dyn DiskFile>, Arc<dyn DiskFile>)>,
    sectors: Sectors,
    /// Blocks of an interrupted fold that are not put right on the disk: by a base opened for reading only, or for want of room.
    overlay: BTreeMap<u64, Vec<u8>>,
    /// Blocks and checksums may not match: see [`BaseError::FoldInterrupted`].
    interrupted: Option<Lsn>,
    /// Blocks that hold something, once counted.
    filled: Option<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block's checksum as it is stored.
fn sum_of(block: &[u8]) -> u32 {
    if is_zero(block) { 0 } else { crc32fast::hash(block).max(1) }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|byte| *byte == 0)
}

impl Files {
    fn blocks(&self) -> u64 {
        self.sectors.0.div_ceil(SECTORS_PER_BLOCK)
    }

    fn check(&self, volume: VolumeId, extent: Extent) -> Result<(), BaseError> {
        if extent.fits(self.sectors) { Ok(()) } else { Err(BaseError::Outside { volume, extent, size: self.sectors }) }
    }
}

impl Volume {
    /// Checksums of `count` blocks from `first` on.
    fn sums(&self, dir: &Path, sums: &dyn DiskFile, first: u64, count: u64) -> Result<Vec<u32>, BaseError> {
        let mut bytes = vec![0; (count * SUM_BYTES) as usize];
        read_whole(
            sums,
            &sums_path(dir, self.id),
            SUM_HEADER + first * SUM_BYTES,
            &mut bytes,
            Damage::BaseSums { volume: self.id },
        )?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|sum| u32::from_le_bytes(*sum)).collect())
    }

    /// Reads whole blocks and checks each one. `buf` is a multiple of a block.
    fn blocks(&self, dir: &Path, files: &Files, first: u64, buf: &mut [u8]) -> Result<(), BaseError> {
        let Some((image, sums)) = &files.open else {
            buf.fill(0);
            return Ok(());
        };
        let count = (buf.len() / BASE_BLOCK) as u64;
        let sums = self.sums(dir, sums.as_ref(), first, count)?;
        let path = image_path(dir, self.id);
        read_whole(image.as_ref(), &path, first * BLOCK, buf, Damage::BaseBlock { volume: self.id })?;
        for (i, (block, sum)) in buf.as_chunks_mut::<BASE_BLOCK>().0.iter_mut().zip(sums).enumerate() {
            let number = first + i as u64;
            if let Some(right) = files.overlay.get(&number) {
                block.copy_from_slice(right);
            } else if sum_of(block) != sum {
                return Err(match files.interrupted {
                    Some(fold) => BaseError::FoldInterrupted { volume: self.id, fold },
                    None => corruption(path, number * BLOCK, Damage::BaseBlock { volume: self.id }),
                });
            }
        }
        Ok(())
    }
}

/// None for want of room.
fn if_room<T>(made: Result<T, DiskError>) -> Result<Option<T>, DiskError> {
    match made {
        Err(e) if e.is_full() => Ok(None),
        made => made.map(Some),
    }
}

fn corruption(file: PathBuf, offset: u64, what: Damage) -> BaseError {
    BaseError::Corruption(Corruption { file, offset, what })
}

/// A read inside a file's known length: when the file is shorter, it is damaged.
fn read_whole(file: &dyn DiskFile, path: &Path, offset: u64, buf: &mut [u8], what: Damage) -> Result<(), BaseError> {
    file.read_at(offset, buf).map_err(|e| match e.kind {
        DiskErrorKind::ShortRead { .. } => corruption(path.to_owned(), offset, what),
        _ => BaseError::Disk(e),
    })
}

impl ImageBase {
    /// Opens the base in `dir`, made when it is not there. `interrupted`: the control record says that a fold to this LSN was
    /// begun and its end was not persisted.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, interrupted: Option<Lsn>) -> Result<Self, BaseError> {
        disk.create_dir(dir)?;
        Ok(Self::new(disk, dir, interrupted, OpenMode::ReadWrite))
    }

    /// Opens for reading only: changes nothing on the disk. Blocks that an interrupted fold left half written are taken from
    /// its redo file.
    pub fn open_read_only(disk: Arc<dyn Disk>, dir: &Path, interrupted: Option<Lsn>) -> Self {
        Self::new(disk, dir, interrupted, OpenMode::Read)
    }

    fn new(disk: Arc<dyn Disk>, dir: &Path, interrupted: Option<Lsn>, mode: OpenMode) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            mode,
            volumes: RwLock::default(),
            opening: Mutex::default(),
            interrupted: Mutex::new(interrupted),
        }
    }

    fn volume(&self, id: VolumeId) -> Result<Arc<Volume>, BaseError> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.get(&id).cloned().ok_or(BaseError::NoVolume(id))
    }

    /// Opens or makes the two files, at least as long as `sectors` need.
    fn open_files(&self, id: VolumeId, sectors: Sectors, must_exist: bool) -> Result<Files, BaseError> {
        let blocks = sectors.0.div_ceil(SECTORS_PER_BLOCK);
        let image_path = image_path(&self.dir, id);
        let sums_path = sums_path(&self.dir, id);
        let may_make = self.mode == OpenMode::ReadWrite && !must_exist;
        // A power loss between the two leaves an image without checksums, all zero: the checksums are made then. Were one
        // of the two lost, the other one would not match what is made in its place, and reads say so.
        let image = match self.disk.open(&image_path, self.mode) {
            Err(e) if e.is_not_found() && may_make => {
                if_room(self.disk.create_sparse(&image_path, ByteLen(blocks * BLOCK)))?
            }
            Err(e) if e.is_not_found() && !must_exist => None,
            Err(e) if e.is_not_found() => return Err(corruption(image_path, 0, Damage::Short { len: 0 })),
            other => Some(other?),
        };
        let sums_len = SUM_HEADER + blocks * SUM_BYTES;
        let sums = match self.disk.open(&sums_path, self.mode) {
            Err(e) if e.is_not_found() && may_make => if_room(self.disk.create_sparse(&sums_path, ByteLen(sums_len)))?,
            Err(e) if e.is_not_found() && !must_exist => None,
            Err(e) if e.is_not_found() => return Err(corruption(sums_path, 0, Damage::Short { len: 0 })),
            other => Some(other?),
        };
        let open = match (image, sums) {
            (Some(image), Some(sums)) => match self.settle_header(id, sums.as_ref(), &sums_path, must_exist) {
                // Just made, and holds nothing.
                Err(BaseError::Disk(e)) if e.is_full() && !must_exist => None,
                settled => {
                    settled?;
                    if self.mode == OpenMode::ReadWrite {
                        grow(image.as_ref(), blocks * BLOCK)?;
                        grow(sums.as_ref(), sums_len)?;
                    }
                    Some((image, sums))
                }
            },
            _ => None,
        };
        Ok(Files { open, sectors, overlay: BTreeMap::new(), interrupted: None, filled: None })
    }

    /// Checks whose checksums these are; a file made just before the power went has no header yet.
    fn settle_header(&self, id: VolumeId, sums: &dyn DiskFile, path: &Path, must_exist: bool) -> Result<(), BaseError> {
        let mut want = [0; 16];
        want[..8].copy_from_slice(SUM_MAGIC);
        want[8..12].copy_from_slice(&id.0.to_le_bytes());
        let crc = crc32fast::hash(&want[..12]);
        want[12..].copy_from_slice(&crc.to_le_bytes());
        let mut have = [0; 16];
        let damage = Damage::BaseSums { volume: id };
        read_whole(sums, path, 0, &mut have, damage.clone())?;
        if have == want {
            return Ok(());
        }
        if have != [0; 16] || must_exist {
            return Err(corruption(path.to_owned(), 0, damage));
        }
        if self.mode == OpenMode::ReadWrite {
            sums.write_at(0, &want)?;
            sums.flush()?;
        }
        Ok(())
    }

    /// The blocks of the redo file, if it belongs to `fold`. One that cannot be read gives none: a block that would have
    /// needed it does not match its checksum, and is reported when it is read or folded.
    fn redo_blocks(&self, id: VolumeId, fold: Lsn) -> Result<BTreeMap<u64, Vec<u8>>, BaseError> {
        let path = redo_path(&self.dir, id);
        let file = match self.disk.open(&path, OpenMode::Read) {
            Err(e) if e.is_not_found() => return Ok(BTreeMap::new()),
            other => other?,
        };
        let len = file.len()?.0;
        // A chunk's blocks with their numbers; more was never written.
        if len > (CHUNK_BYTES + CHUNK_BYTES / BASE_BLOCK * 16 + 4096) as u64 {
            return Ok(BTreeMap::new());
        }
        let mut bytes = vec![0; len as usize];
        file.read_at(0, &mut bytes)?;
        Ok(parse_redo(&bytes, id, fold).unwrap_or_default())
    }

    /// Puts the half-covered blocks of an interrupted fold right. Until that has succeeded they are read from memory.
    fn apply_redo(&self, volume: &Volume, fold: Lsn) -> Result<(), BaseError> {
        let blocks = self.redo_blocks(volume.id, fold)?;
        if blocks.is_empty() {
            return Ok(());
        }
        let mut files = volume.files.write().unwrap_or_else(PoisonError::into_inner);
        files.overlay = blocks;
        if self.mode == OpenMode::Read {
            return Ok(());
        }
        let end = files.blocks();
        if let Some((image, sums)) = &files.open {
            for (number, block) in files.overlay.iter().filter(|(number, _)| **number < end) {
                image.write_at(number * BLOCK, block)?;
                sums.write_at(SUM_HEADER + number * SUM_BYTES, &sum_of(block).to_le_bytes())?;
            }
            image.flush()?;
            sums.flush()?;
        }
        files.overlay.clear();
        files.filled = None;
        Ok(())
    }

    /// Writes one chunk; see the module's text for the order.
    fn commit(&self, volume: &Volume, fold: Lsn, chunk: &mut Chunk, again: bool) -> Result<(), BaseError> {
        if !chunk.partial.is_empty() {
            let blocks = chunk.partial.iter().map(|number| (*number, chunk.block(*number)));
            self.disk.replace(&redo_path(&self.dir, volume.id), &make_redo(volume.id, fold, blocks))?;
        }
        for stretch in &chunk.stretches {
            // Per stretch, so that readers do not wait for the whole chunk.
            let mut files = volume.files.write().unwrap_or_else(PoisonError::into_inner);
            let Some((image, sums)) = files.open.clone() else { return Err(BaseError::ReadOnly) };
            let change = match &stretch.bytes {
                Some(bytes) => {
                    self.write_stretch(volume, &image, &sums, stretch.first, bytes, files.filled.is_some())?
                }
                None => self.zero_stretch(volume, &image, &sums, stretch.first, stretch.count, again)?,
            };
            files.filled = files.filled.and_then(|filled| filled.checked_add_signed(change));
        }
        let open = volume.files.read().unwrap_or_else(PoisonError::into_inner).open.clone();
        let Some((image, sums)) = open else { return Err(BaseError::ReadOnly) };
        image.flush()?;
        sums.flush()?;
        chunk.clear();
        Ok(())
    }

    /// Writes blocks and their checksums; answers by how much the count of filled blocks changes.
    fn write_stretch(
        &self,
        volume: &Volume,
        image: &Arc<dyn DiskFile>,
        sums: &Arc<dyn DiskFile>,
        first: u64,
        bytes: &[u8],
        count_old: bool,
    ) -> Result<i64, BaseError> {
        let new: Vec<u32> = bytes.as_chunks::<BASE_BLOCK>().0.iter().map(|block| sum_of(block)).collect();
        let mut change = new.iter().filter(|sum| **sum != 0).count() as i64;
        if count_old {
            let old = volume.sums(&self.dir, sums.as_ref(), first, new.len() as u64)?;
            change -= old.iter().filter(|sum| **sum != 0).count() as i64;
        }
        image.write_at(first * BLOCK, bytes)?;
        let packed: Vec<u8> = new.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        sums.write_at(SUM_HEADER + first * SUM_BYTES, &packed)?;
        Ok(change)
    }

    /// Makes blocks holes. The first time only those that hold something; when the fold is done `again` all of them, because
    /// a checksum of 0 may be of the first attempt and its hole not.
    fn zero_stretch(
        &self,
        volume: &Volume,
        image: &Arc<dyn DiskFile>,
        sums: &Arc<dyn DiskFile>,
        first: u64,
        count: u64,
        again: bool,
    ) -> Result<i64, BaseError> {
        let mut change = 0;
        let mut at = first;
        if again {
            image.punch_hole(first * BLOCK, count * BLOCK)?;
        }
        while at < first + count {
            let some = (first + count - at).min(SUMS_AT_ONCE);
            let old = volume.sums(&self.dir, sums.as_ref(), at, some)?;
            for stretch in old.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
                let len = stretch.len() as u64;
                if stretch[0] != 0 {
                    image.punch_hole(at * BLOCK, len * BLOCK)?;
                    sums.write_at(SUM_HEADER + at * SUM_BYTES, &vec![0; (len * SUM_BYTES) as usize])?;
                    change -= len as i64;
                } else if again {
                    sums.write_at(SUM_HEADER + at * SUM_BYTES, &vec![0; (len * SUM_BYTES) as usize])?;
                }
                at += len;
            }
        }
        Ok(change)
    }

    /// The body of [`Base::fold`]; whoever calls it notes a failure.
    fn fold_volume(
        &self,
        volume: &Volume,
        fold: Lsn,
        again: bool,
        pieces: &mut dyn Iterator<Item = Result<FoldPiece, BaseError>>,
    ) -> Result<FoldReport, FoldStop> {
        let sectors = volume.files.read().unwrap_or_else(PoisonError::into_inner).sectors;
        let mut report = FoldReport::default();
        let mut chunk = Chunk::default();
        let mut held: Option<HalfBlock> = None;
        let mut end = 0;
        for piece in pieces {
            let piece = piece.map_err(FoldStop::Source)?;
            let bad = || FoldStop::Source(BaseError::BadPiece { volume: volume.id, lba: piece.lba });
            let count = match &piece.data {
                FoldData::Data(bytes) if (bytes.len() as u64).is_multiple_of(SECTOR) => bytes.len() as u64 / SECTOR,
                FoldData::Data(_) => return Err(bad()),
                FoldData::Zero(count) => *count,
            };
            let extent = Extent::new(piece.lba, count);
            if extent.is_empty() || piece.lba < end {
                return Err(bad());
            }
            if !extent.fits(sectors) {
                return Err(FoldStop::Source(BaseError::Outside { volume: volume.id, extent, size: sectors }));
            }
            end = extent.end();
            report.pieces += 1;
            let mut at = piece.lba;
            while at < end {
                let block = at / SECTORS_PER_BLOCK;
                if held.as_ref().is_some_and(|half| half.number != block)
                    && let Some(half) = held.take()
                {
                    self.finish_block(volume, half, &mut chunk, &mut report)?;
                }
                let bytes = |from: u64, to: u64| match &piece.data {
                    FoldData::Data(bytes) => {
                        Some(&bytes[((from - piece.lba) * SECTOR) as usize..((to - piece.lba) * SECTOR) as usize])
                    }
                    FoldData::Zero(_) => None,
                };
                let whole = at.is_multiple_of(SECTORS_PER_BLOCK) && end - at >= SECTORS_PER_BLOCK;
                if whole && held.is_none() {
                    let mut blocks = (end - at) / SECTORS_PER_BLOCK;
                    if bytes(at, at).is_some() {
                        blocks = blocks.min(chunk.room());
                    }
                    let to = at + blocks * SECTORS_PER_BLOCK;
                    match bytes(at, to) {
                        Some(data) => report.bytes_written += chunk.push(block, data),
                        None => report.bytes_zeroed += chunk.push_zero(block, blocks),
                    }
                    at = to;
                } else {
                    let to = end.min((block + 1) * SECTORS_PER_BLOCK);
                    held.get_or_insert_with(|| HalfBlock::new(block, sectors)).take(at, to, bytes(at, to));
                    at = to;
                }
                if chunk.is_full() {
                    self.commit(volume, fold, &mut chunk, again).map_err(FoldStop::Base)?;
                }
            }
        }
        if let Some(half) = held.take() {
            self.finish_block(volume, half, &mut chunk, &mut report)?;
        }
        if !chunk.stretches.is_empty() {
            self.commit(volume, fold, &mut chunk, again).map_err(FoldStop::Base)?;
        }
        Ok(report)
    }

    /// Completes a block from what the base has and puts it into the chunk.
    fn finish_block(
        &self,
        volume: &Volume,
        mut half: HalfBlock,
        chunk: &mut Chunk,
        report: &mut FoldReport,
    ) -> Result<(), FoldStop> {
        if half.covered != u8::MAX {
            let mut old = vec![0; BASE_BLOCK];
            let files = volume.files.read().unwrap_or_else(PoisonError::into_inner);
            // Damage here is damage: a block that is covered in part was put right before the fold began. It stops the
            // fold before anything of this chunk is written.
            volume.blocks(&self.dir, &files, half.number, &mut old).map_err(|e| match e {
                BaseError::FoldInterrupted { .. } => FoldStop::Source(corruption(
                    image_path(&self.dir, volume.id),
                    half.number * BLOCK,
                    Damage::BaseBlock { volume: volume.id },
                )),
                other => FoldStop::Source(other),
            })?;
            for sector in 0..SECTORS_PER_BLOCK as usize {
                if half.covered & 1 << sector == 0 {
                    let bytes = sector * SECTOR as usize..(sector + 1) * SECTOR as usize;
                    half.bytes[bytes.clone()].copy_from_slice(&old[bytes]);
                }
            }
            chunk.partial.push(half.number);
        }
        report.bytes_written += chunk.push(half.number, half.bytes.as_slice());
        Ok(())
    }
}

/// Why a fold ended early.
enum FoldStop {
    /// Nothing half done is on the disk.
    Source(BaseError),
    /// A chunk may be written in part.
    Base(BaseError),
}

/// Blocks to be written together.
#[derive(Default)]
struct Chunk {
    /// Sorted, disjoint.
    stretches: Vec<Stretch>,
    /// Of those, blocks whose old contents went into them.
    partial: Vec<u64>,
    bytes: usize,
}

struct Stretch {
    first: u64,
    count: u64,
    /// None for zeroes.
    bytes: Option<Vec<u8>>,
}

impl Chunk {
    fn is_full(&self) -> bool {
        self.bytes >= CHUNK_BYTES || self.stretches.len() >= CHUNK_STRETCHES
    }
    /// Blocks that may still be added; never 0.
    fn room(&self) -> u64 {
        (CHUNK_BYTES.saturating_sub(self.bytes) / BASE_BLOCK).max(1) as u64
    }
    /// Adds whole blocks after all others; those that are zero become holes. Answers how many bytes came.
    fn push(&mut self, first: u64, bytes: &[u8]) -> u64 {
        for (i, block) in bytes.as_chunks::<BASE_BLOCK>().0.iter().enumerate() {
            let number = first + i as u64;
            if is_zero(block) {
                self.push_zero(number, 1);
                continue;
            }
            self.bytes += BASE_BLOCK;
            match self.stretches.last_mut() {
                Some(Stretch { first, count, bytes: Some(bytes) }) if *first + *count == number => {
                    *count += 1;
                    bytes.extend_from_slice(block);
                }
                _ => self.stretches.push(Stretch { first: number, count: 1, bytes: Some(block.to_vec()) }),
            }
        }
        bytes.len() as u64
    }
    fn push_zero(&mut self, number: u64, blocks: u64) -> u64 {
        match self.stretches.last_mut() {
            Some(Stretch { first, count, bytes: None }) if *first + *count == number => *count += blocks,
            _ => self.stretches.push(Stretch { first: number, count: blocks, bytes: None }),
        }
        blocks * BLOCK
    }
    /// A block of this chunk as it will be.
    fn block(&self, number: u64) -> &[u8] {
        const ZERO: &[u8] = &[0; BASE_BLOCK];
        let at = self.stretches.partition_point(|stretch| stretch.first <= number);
        let stretch = &self.stretches[at - 1];
        let from = (number - stretch.first) as usize * BASE_BLOCK;
        stretch.bytes.as_ref().map_or(ZERO, |bytes| &bytes[from..from + BASE_BLOCK])
    }
    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A block that pieces have covered in part so far.
struct HalfBlock {
    number: u64,
    bytes: Box<[u8; BASE_BLOCK]>,
    /// A bit per sector.
    covered: u8,
}

impl HalfBlock {
    /// Sectors behind the volume's end count as covered: they are zero.
    fn new(number: u64, size: Sectors) -> Self {
        let inside = (size.0 - number * SECTORS_PER_BLOCK).min(SECTORS_PER_BLOCK);
        let covered = if inside == SECTORS_PER_BLOCK { 0 } else { u8::MAX << inside };
        Self { number, bytes: Box::new([0; BASE_BLOCK]), covered }
    }
    /// Takes sectors `from..to` of the volume; zeroes when there are no bytes.
    fn take(&mut self, from: u64, to: u64, bytes: Option<&[u8]>) {
        let base = self.number * SECTORS_PER_BLOCK;
        for sector in from - base..to - base {
            self.covered |= 1 << sector;
        }
        if let Some(bytes) = bytes {
            let at = ((from - base) * SECTOR) as usize;
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// `REDO_MAGIC`, fold (8), volume (4), count (4), then number (8) and contents of each block, CRC-32 of all before (4).
fn make_redo<'a>(volume: VolumeId, fold: Lsn, blocks: impl ExactSizeIterator<Item = (u64, &'a [u8])>) -> Vec<u8> {
    let mut out = Vec::with_capacity(28 + blocks.len() * (8 + BASE_BLOCK));
    out.extend_from_slice(REDO_MAGIC);
    out.extend_from_slice(&fold.0.to_le_bytes());
    out.extend_from_slice(&volume.0.to_le_bytes());
    out.extend_from_slice(&(blocks.len() as u32).to_le_bytes());
    for (number, bytes) in blocks {
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(bytes);
    }
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

fn parse_redo(bytes: &[u8], volume: VolumeId, fold: Lsn) -> Option<BTreeMap<u64, Vec<u8>>> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    let head = body.strip_prefix(REDO_MAGIC)?;
    let (head, blocks) = head.split_first_chunk::<16>()?;
    let right = crc32fast::hash(body) == u32::from_le_bytes(*crc)
        && head[..8] == fold.0.to_le_bytes()
        && head[8..12] == volume.0.to_le_bytes();
    if !right || blocks.len() % (8 + BASE_BLOCK) != 0 {
        return None;
    }
    let blocks = blocks.chunks_exact(8 + BASE_BLOCK).filter_map(|block| {
        let (number, contents) = block.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*number), contents.to_vec()))
    });
    Some(blocks.collect())
}

fn grow(file: &dyn DiskFile, len: u64) -> Result<(), DiskError> {
    if file.len()?.0 < len {
        file.set_len(ByteLen(len))?;
        file.flush()?;
    }
    Ok(())
}

impl Base for ImageBase {
    fn read_at_once(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> bool {
        let (blocks, odd) = buf.as_chunks_mut::<BASE_BLOCK>();
        if !odd.is_empty() || !lba.is_multiple_of(SECTORS_PER_BLOCK) || blocks.len() > AT_ONCE_BLOCKS_MAX {
            return false;
        }
        let Ok(found) = self.volume(volume) else { return false };
        // A fold that is writing is not waited for.
        let Ok(files) = found.files.try_read() else { return false };
        let first = lba / SECTORS_PER_BLOCK;
        let inside = Extent::new(lba, blocks.len() as u64 * SECTORS_PER_BLOCK).fits(files.sectors);
        let Some((image, sums)) = files.open.as_ref().filter(|_| inside && files.overlay.is_empty()) else {
            return false;
        };
        let mut bytes = [0; AT_ONCE_BLOCKS_MAX * SUM_BYTES as usize];
        let bytes = &mut bytes[..blocks.len() * SUM_BYTES as usize];
        if !sums.read_cached_at(SUM_HEADER + first * SUM_BYTES, bytes)
            || !image.read_cached_at(first * BLOCK, blocks.as_flattened_mut())
        {
            return false;
        }
        blocks.iter().zip(bytes.as_chunks::<4>().0).all(|(block, sum)| sum_of(block) == u32::from_le_bytes(*sum))
    }

    fn ensure_volume(&self, volume: VolumeId, sectors: Sectors, must_exist: bool) -> Result<(), BaseError> {
        // A policy may change while a fold makes the same volume.
        let _one = lock(&self.opening);
        let known = self.volumes.read().unwrap_or_else(PoisonError::into_inner).get(&volume).cloned();
        if let Some(known) = known {
            let mut files = known.files.write().unwrap_or_else(PoisonError::into_inner);
            if files.sectors < sectors {
                if let (Some((image, sums)), OpenMode::ReadWrite) = (&files.open, self.mode) {
                    let blocks = sectors.0.div_ceil(SECTORS_PER_BLOCK);
                    grow(image.as_ref(), blocks * BLOCK)?;
                    grow(sums.as_ref(), SUM_HEADER + blocks * SUM_BYTES)?;
                }
                files.sectors = sectors;
            }
            return Ok(());
        }
        let mut files = self.open_files(volume, sectors, must_exist)?;
        let interrupted = *lock(&self.interrupted);
        files.interrupted = interrupted;
        let made = Arc::new(Volume { id: volume, files: RwLock::new(files), folding: Mutex::new(()) });
        if let Some(fold) = interrupted {
            match self.apply_redo(&made, fold) {
                // Reads have what they need, and a fold begins with the same.
                Err(BaseError::Disk(e)) if e.is_full() => {}
                applied => applied?,
            }
        }
        self.volumes.write().unwrap_or_else(PoisonError::into_inner).insert(volume, made);
        Ok(())
    }

    fn read(&self, volume: VolumeId, lba: u64, buf: &mut [u8]) -> Result<(), BaseError> {
        if !(buf.len() as u64).is_multiple_of(SECTOR) {
            return Err(BaseError::NotSectors { bytes: buf.len() });
        }
        let found = self.volume(volume)?;
        let extent = Extent::new(lba, buf.len() as u64 / SECTOR);
        let mut blocks = Vec::new();
        let mut at = lba;
        while at < extent.end() {
            let files = found.files.read().unwrap_or_else(PoisonError::into_inner);
            files.check(volume, extent)?;
            let first = at / SECTORS_PER_BLOCK;
            let count = (extent.end().div_ceil(SECTORS_PER_BLOCK) - first).min(READ_BLOCKS as u64);
            let to = extent.end().min((first + count) * SECTORS_PER_BLOCK);
            let out = &mut buf[((at - lba) * SECTOR) as usize..((to - lba) * SECTOR) as usize];
            if out.len() == count as usize * BASE_BLOCK {
                found.blocks(&self.dir, &files, first, out)?;
            } else {
                blocks.resize(count as usize * BASE_BLOCK, 0);
                found.blocks(&self.dir, &files, first, &mut blocks)?;
                let skip = ((at - first * SECTORS_PER_BLOCK) * SECTOR) as usize;
                out.copy_from_slice(&blocks[skip..skip + out.len()]);
            }
            at = to;
        }
        Ok(())
    }

    fn written(&self, volume: VolumeId, extent: Extent) -> Result<Vec<Extent>, BaseError> {
        let found = self.volume(volume)?;
        let files = found.files.read().unwrap_or_else(PoisonError::into_inner);
        files.check(volume, extent)?;
        let mut out: Vec<Extent> = Vec::new();
        let Some((_, sums)) = &files.open else { return Ok(out) };
        let end = extent.end().div_ceil(SECTORS_PER_BLOCK);
        let mut at = extent.start() / SECTORS_PER_BLOCK;
        while at < end && !extent.is_empty() {
            let sums = found.sums(&self.dir, sums.as_ref(), at, (end - at).min(SUMS_AT_ONCE))?;
            for sum in sums {
                let filled = sum != 0 || files.overlay.contains_key(&at);
                let block = Extent::new(at * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK);
                if let Some(part) = block.intersect(&extent).filter(|_| filled) {
                    match out.last_mut() {
                        Some(last) if last.end() == part.start() => *last = Extent::between(last.start(), part.end()),
                        _ => out.push(part),
                    }
                }
                at += 1;
            }
        }
        Ok(out)
    }

    fn fold(
        &self,
        fold: Lsn,
        volume: VolumeId,
        pieces: &mut dyn Iterator<Item = Result<FoldPiece, BaseError>>,
    ) -> Result<FoldReport, BaseError> {
        if self.mode == OpenMode::Read {
            return Err(BaseError::ReadOnly);
        }
        let found = self.volume(volume)?;
        let _folding = lock(&found.folding);
        let interrupted = found.files.read().unwrap_or_else(PoisonError::into_inner).interrupted;
        let made = found.files.read().unwrap_or_else(PoisonError::into_inner).open.is_some();
        if interrupted.is_some() || !made {
            // Fresh handles: those of a failed flush take nothing any more.
            let mut files = found.files.write().unwrap_or_else(PoisonError::into_inner);
            let fresh = self.open_files(volume, files.sectors, made)?;
            if fresh.open.is_none() {
                let path = image_path(&self.dir, volume);
                return Err(DiskError::new("make the base", &path, DiskErrorKind::Full).into());
            }
            files.open = fresh.open;
            files.filled = None;
        }
        if let Some(before) = interrupted {
            self.apply_redo(&found, before)?;
        }
        let done = self.fold_volume(&found, fold, interrupted.is_some(), pieces);
        let mut files = found.files.write().unwrap_or_else(PoisonError::into_inner);
        match done {
            Ok(report) => {
                files.interrupted = None;
                Ok(report)
            }
            // Whole chunks only are in the base; what was interrupted before stays so.
            Err(FoldStop::Source(e)) => Err(e),
            Err(FoldStop::Base(e)) => {
                files.interrupted = Some(fold);
                files.filled = None;
                Err(e)
            }
        }
    }

    fn fold_done(&self, fold: Lsn) {
        let mut interrupted = lock(&self.interrupted);
        if interrupted.is_some_and(|before| before <= fold) {
            *interrupted = None;
        }
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        for volume in volumes.values() {
            // A volume without pieces in the fold was not asked to fold; nothing of it was interrupted either.
            let mut files = volume.files.write().unwrap_or_else(PoisonError::into_inner);
            if files.interrupted.is_some_and(|before| before <= fold) {
                files.interrupted = None;
            }
        }
    }

    fn bytes(&self) -> Result<ByteLen, BaseError> {
        let volumes: Vec<Arc<Volume>> =
            self.volumes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut total = 0;
        for volume in volumes {
            // A fold changes the count while it is taken: none runs meanwhile.
            let _folding = lock(&volume.folding);
            let files = volume.files.read().unwrap_or_else(PoisonError::into_inner);
            let (blocks, known, open) = (files.blocks(), files.filled, files.open.clone());
            drop(files);
            let filled = match (known, open) {
                (Some(filled), _) => filled,
                (None, None) => 0,
                (None, Some((_, sums))) => {
                    let mut filled = 0;
                    let mut at = 0;
                    while at < blocks {
                        let some = (blocks - at).min(SUMS_AT_ONCE);
                        let sums = volume.sums(&self.dir, sums.as_ref(), at, some)?;
                        filled += sums.iter().filter(|sum| **sum != 0).count() as u64;
                        at += some;
                    }
                    volume.files.write().unwrap_or_else(PoisonError::into_inner).filled = Some(filled);
                    filled
                }
            };
            total += filled * BLOCK;
        }
        Ok(ByteLen(total))
    }

    fn verify(&self, volume: VolumeId, found: &mut dyn FnMut(Corruption)) -> Result<VerifiedBase, BaseError> {
        let checked = self.volume(volume)?;
        let mut report = VerifiedBase::default();
        let mut at = 0;
        let mut buf = vec![0; READ_BLOCKS * BASE_BLOCK];
        loop {
            let files = checked.files.read().unwrap_or_else(PoisonError::into_inner);
            let (end, Some((image, sums))) = (files.blocks(), &files.open) else { return Ok(report) };
            if at >= end {
                return Ok(report);
            }
            let some = (end - at).min(READ_BLOCKS as u64);
            let buf = &mut buf[..some as usize * BASE_BLOCK];
            let path = image_path(&self.dir, volume);
            let read = checked.sums(&self.dir, sums.as_ref(), at, some).and_then(|sums| {
                let what = Damage::BaseBlock { volume };
                read_whole(image.as_ref(), &path, at * BLOCK, buf, what).map(|()| sums)
            });
            match read {
                Ok(sums) => {
                    for (i, (block, sum)) in buf.as_chunks::<BASE_BLOCK>().0.iter().zip(sums).enumerate() {
                        let number = at + i as u64;
                        let real = sum_of(block);
                        report.blocks += u64::from(sum != 0 || real != 0);
                        if real != sum && !files.overlay.contains_key(&number) {
                            // Blocks of a fold that was cut short are made new by it, not damaged.
                            if files.interrupted.is_none() {
                                report.damaged += 1;
                                let what = Damage::BaseBlock { volume };
                                found(Corruption { file: path.clone(), offset: number * BLOCK, what });
                            }
                        }
                    }
                }
                Err(BaseError::Corruption(damage)) => {
                    report.damaged += some;
                    found(damage);
                }
                Err(other) => return Err(other),
            }
            at += some;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::rng;
    use durable::SimDisk;

    /// Not whole blocks, so that the last one is short.
    const SECTORS: u64 = 8 * 40 + 3;
    const VOLUME: VolumeId = VolumeId(2);

    fn dir() -> &'static Path {
        Path::new("group/base")
    }

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(seed, ByteLen(64 << 20))
    }

    fn open(disk: &SimDisk, interrupted: Option<Lsn>, must_exist: bool) -> Result<ImageBase, BaseError> {
        let base = ImageBase::open(Arc::new(disk.clone()), dir(), interrupted)?;
        base.ensure_volume(VOLUME, Sectors(SECTORS), must_exist)?;
        Ok(base)
    }

    /// Random sorted pieces: single sectors, whole blocks, long zeroes, data that is zero.
    fn pieces(draw: &mut impl FnMut(u64) -> u64) -> Vec<FoldPiece> {
        let mut out = Vec::new();
        let mut lba = draw(20);
        while lba < SECTORS {
            let left = SECTORS - lba;
            let count = match draw(4) {
                0 => 1,
                1 => 8,
                _ => 1 + draw(40),
            };
            let count = count.min(left);
            let data = match draw(5) {
                0 => FoldData::Zero(count),
                1 => FoldData::Data(vec![0; (count * SECTOR) as usize]),
                _ => FoldData::Data((0..count * SECTOR).map(|_| draw(256) as u8).collect()),
            };
            out.push(FoldPiece { lba, data });
            lba += count + if draw(3) == 0 { 0 } else { draw(30) };
            if draw(3) == 0 {
                lba = lba.next_multiple_of(8);
            }
        }
        out
    }

    fn paint(image: &mut [u8], pieces: &[FoldPiece]) {
        for piece in pieces {
            let at = (piece.lba * SECTOR) as usize;
            match &piece.data {
                FoldData::Data(bytes) => image[at..at + bytes.len()].copy_from_slice(bytes),
                FoldData::Zero(count) => image[at..at + (count * SECTOR) as usize].fill(0),
            }
        }
    }

    fn fold(base: &ImageBase, to: u64, pieces: &[FoldPiece]) -> Result<FoldReport, BaseError> {
        base.fold(Lsn(to), VOLUME, &mut pieces.iter().map(|piece| Ok(piece.clone())))
    }

    fn whole(base: &ImageBase) -> Result<Vec<u8>, BaseError> {
        let mut out = vec![0xee; (SECTORS * SECTOR) as usize];
        base.read(VOLUME, 0, &mut out)?;
        Ok(out)
    }

    fn check(base: &ImageBase, image: &[u8], draw: &mut impl FnMut(u64) -> u64, what: &str) {
        assert!(whole(base).unwrap_or_else(|e| panic!("{what}: {e:?}")) == image, "{what}: the image differs");
        for _ in 0..10 {
            let lba = draw(SECTORS);
            let count = 1 + draw(SECTORS - lba);
            let mut out = vec![0xee; (count * SECTOR) as usize];
            base.read(VOLUME, lba, &mut out).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let at = (lba * SECTOR) as usize;
            assert!(out == image[at..at + out.len()], "{what}: sectors {lba}+{count} differ");
            let written = base.written(VOLUME, Extent::new(lba, count)).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            for sector in lba..lba + count {
                let filled = image[(sector * SECTOR) as usize..][..SECTOR as usize].iter().any(|b| *b != 0);
                let said = written.iter().any(|e| e.start() <= sector && sector < e.end());
                assert!(said || !filled, "{what}: sector {sector} is said to be empty");
            }
            assert!(written.windows(2).all(|w| w[0].end() < w[1].start()), "{what}: {written:?}");
        }
        let mut damage = Vec::new();
        let verified = base.verify(VOLUME, &mut |d| damage.push(d)).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert!(damage.is_empty() && verified.damaged == 0, "{what}: {damage:?}");
        let mut padded = image.to_vec();
        padded.resize(image.len().next_multiple_of(BASE_BLOCK), 0);
        let filled = padded.chunks(BASE_BLOCK).filter(|block| !is_zero(block)).count() as u64;
        assert_eq!(verified.blocks, filled, "{what}");
        assert_eq!(base.bytes().unwrap_or_else(|e| panic!("{what}: {e:?}")), ByteLen(filled * BLOCK), "{what}");
    }

    #[test]
    fn folds_agree_with_an_array_of_bytes() {
        for seed in 1..150 {
            let mut draw = rng(seed);
            let disk = disk(seed);
            let mut base = open(&disk, None, false).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let mut image = vec![0; (SECTORS * SECTOR) as usize];
            check(&base, &image, &mut draw, "a new base");
            for round in 1..6 {
                let list = pieces(&mut draw);
                let report = fold(&base, round, &list).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
                base.fold_done(Lsn(round));
                assert_eq!(report.pieces, list.len() as u64, "seed {seed}");
                paint(&mut image, &list);
                let what = format!("seed {seed}, round {round}");
                check(&base, &image, &mut draw, &what);
                if draw(3) == 0 {
                    // What a finished fold wrote survives power loss.
                    base = open(&disk.fork(seed).power_cut(), None, true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    check(&base, &image, &mut draw, &what);
                    base = open(&disk, None, true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                }
            }
        }
    }

    /// What a view above the cutoff still needs of the base while the fold is not done: sectors no piece covers.
    fn uncovered(pieces: &[FoldPiece]) -> Vec<u64> {
        let count = |piece: &FoldPiece| match &piece.data {
            FoldData::Data(bytes) => bytes.len() as u64 / SECTOR,
            FoldData::Zero(count) => *count,
        };
        let covered = |sector: &u64| pieces.iter().any(|p| (p.lba..p.lba + count(p)).contains(sector));
        (0..SECTORS).filter(|sector| !covered(sector)).collect()
    }

    #[test]
    fn power_lost_at_every_operation_of_a_fold_is_made_good() {
        let mut points = 0;
        for seed in 1..16 {
            let mut draw = rng(seed);
            let (first, second) = (pieces(&mut draw), pieces(&mut draw));
            let mut image = vec![0; (SECTORS * SECTOR) as usize];
            paint(&mut image, &first);
            let before = image.clone();
            paint(&mut image, &second);
            let prepare = |luck: u64| {
                let disk = disk(luck);
                let base = open(&disk, None, false).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
                fold(&base, 1, &first).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
                (disk, base)
            };
            let (probe, base) = prepare(seed);
            let start = probe.operations();
            fold(&base, 2, &second).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let operations = probe.operations() - start;
            for cut in 0..operations {
                for luck in 0..3 {
                    points += 1;
                    let what = format!("seed {seed}, cut {cut} of {operations}, luck {luck}");
                    let (disk, base) = prepare(seed * 1000 + luck);
                    disk.cut_after(cut);
                    assert!(fold(&base, 2, &second).is_err(), "{what}: the power did not go");
                    let after = disk.power_cut();

                    // Reading only, nothing repaired on the disk: what a view needs is there.
                    let frozen = ImageBase::open_read_only(Arc::new(after.fork(1)), dir(), Some(Lsn(2)));
                    frozen.ensure_volume(VOLUME, Sectors(SECTORS), true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    let base = open(&after, Some(Lsn(2)), true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    for sector in uncovered(&second) {
                        for base in [&base, &frozen] {
                            let mut out = [0xee; SECTOR as usize];
                            base.read(VOLUME, sector, &mut out)
                                .unwrap_or_else(|e| panic!("{what}: sector {sector}: {e:?}"));
                            let at = (sector * SECTOR) as usize;
                            assert!(out == before[at..at + out.len()], "{what}: sector {sector} differs");
                        }
                    }
                    // A block that does not match is never damage now.
                    match whole(&base) {
                        Ok(_) | Err(BaseError::FoldInterrupted { .. }) => {}
                        Err(other) => panic!("{what}: {other:?}"),
                    }
                    // The power goes again inside the redo, every other time.
                    let after = if luck % 2 == 1 {
                        after.cut_after(cut / 2);
                        let again = fold(&base, 2, &second);
                        drop(again);
                        after.power_cut()
                    } else {
                        after
                    };
                    let base = open(&after, Some(Lsn(2)), true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    fold(&base, 2, &second).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    base.fold_done(Lsn(2));
                    check(&base, &image, &mut draw, &what);
                    let base = open(&after.power_cut(), None, true).unwrap_or_else(|e| panic!("{what}: {e:?}"));
                    check(&base, &image, &mut draw, &what);
                }
            }
        }
        println!("{points} crash points");
    }

    #[test]
    fn power_lost_while_a_volume_is_made_or_grows_is_made_good() {
        for cut in 0..12 {
            let disk = disk(cut);
            disk.cut_after(cut);
            // Whether it came to the end does not matter.
            let made = open(&disk, None, false).is_ok();
            let after = disk.power_cut();
            let base = open(&after, None, false).unwrap_or_else(|e| panic!("cut {cut}, made {made}: {e:?}"));
            assert!(is_zero(&whole(&base).unwrap_or_else(|e| panic!("cut {cut}: {e:?}"))));
            let list = [FoldPiece { lba: 5, data: FoldData::Data(vec![7; 512]) }];
            fold(&base, 1, &list).unwrap_or_else(|e| panic!("cut {cut}: {e:?}"));
            let before = whole(&base).unwrap_or_else(|e| panic!("cut {cut}: {e:?}"));

            after.cut_after(cut);
            let grown = base.ensure_volume(VOLUME, Sectors(SECTORS * 2), true).is_ok();
            let base =
                open(&after.power_cut(), None, true).unwrap_or_else(|e| panic!("cut {cut}, grown {grown}: {e:?}"));
            base.ensure_volume(VOLUME, Sectors(SECTORS * 2), true).unwrap_or_else(|e| panic!("cut {cut}: {e:?}"));
            let mut out = vec![0xee; (SECTORS * 2 * SECTOR) as usize];
            base.read(VOLUME, 0, &mut out).unwrap_or_else(|e| panic!("cut {cut}: {e:?}"));
            assert!(out[..before.len()] == before && is_zero(&out[before.len()..]), "cut {cut}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found_and_named() {
        let disk = disk(3);
        let base = open(&disk, None, false).expect("an empty disk takes a base");
        let list = pieces(&mut rng(9));
        fold(&base, 1, &list).expect("an undamaged disk takes a fold");
        let image = whole(&base).expect("an undamaged base can be read");
        let mut draw = rng(1);
        let (mut in_image, mut in_sums) = (0, 0);
        for _ in 0..300 {
            let sums = draw(4) == 0;
            let path = if sums { sums_path(dir(), VOLUME) } else { image_path(dir(), VOLUME) };
            let blocks = SECTORS.div_ceil(8);
            let offset = if sums { SUM_HEADER + draw(blocks * SUM_BYTES) } else { draw(blocks * BLOCK) };
            let block = if sums { (offset - SUM_HEADER) / SUM_BYTES } else { offset / BLOCK };
            let bit = draw(8) as u8;
            disk.flip_bit(&path, offset, bit).expect("the file is that long");
            match whole(&base) {
                Err(BaseError::Corruption(damage)) => {
                    assert_eq!(damage.file, image_path(dir(), VOLUME));
                    assert_eq!(damage.offset, block * BLOCK, "named wrongly: {damage:?}");
                }
                other => panic!(
                    "bit {bit} of {offset} in {}: {:?}",
                    path.display(),
                    other.map(|_| "read as if nothing were")
                ),
            }
            let mut found = Vec::new();
            let report = base.verify(VOLUME, &mut |damage| found.push(damage.offset)).expect("the disk can be read");
            assert_eq!((found, report.damaged), (vec![block * BLOCK], 1));
            // A fold over a part of the block must not bless it.
            if block * 8 + 1 < SECTORS {
                let part = [FoldPiece { lba: block * 8, data: FoldData::Data(vec![1; 512]) }];
                let folded = fold(&base, 2, &part);
                assert!(matches!(folded, Err(BaseError::Corruption(_))), "{folded:?}");
            }
            disk.flip_bit(&path, offset, bit).expect("the file is that long");
            assert!(whole(&base).expect("the bit is back") == image);
            if sums { in_sums += 1 } else { in_image += 1 }
        }
        assert!(in_image > 50 && in_sums > 20, "both files were tried");
    }

    #[test]
    fn lost_files_are_damage_once_a_fold_was_done() {
        for lost in [image_path(dir(), VOLUME), sums_path(dir(), VOLUME)] {
            let disk = disk(4);
            let base = open(&disk, None, false).expect("an empty disk takes a base");
            fold(&base, 1, &[FoldPiece { lba: 8, data: FoldData::Data(vec![5; 4096]) }])
                .expect("an undamaged disk takes a fold");
            disk.remove(&lost).expect("the file is there");
            let opened = open(&disk, None, true);
            assert!(matches!(&opened, Err(BaseError::Corruption(damage)) if damage.file == lost), "{opened:?}");
            // Even a caller who does not know that a fold was done is not told zeroes.
            let base = open(&disk, None, false).expect("a missing file is made anew");
            assert!(matches!(whole(&base), Err(BaseError::Corruption(_))), "{} was lost", lost.display());
        }
        let disk = disk(5);
        let base = ImageBase::open_read_only(Arc::new(disk.clone()), dir(), None);
        base.ensure_volume(VOLUME, Sectors(SECTORS), false).expect("nothing was folded yet: no files are needed");
        assert!(is_zero(&whole(&base).expect("a base without files is empty")));
        assert!(disk.paths().is_empty(), "a base opened for reading made files");
        assert!(matches!(fold(&base, 1, &[]), Err(BaseError::ReadOnly)));
    }

    #[test]
    fn a_full_disk_and_a_failed_flush_leave_a_fold_that_can_be_done_again() {
        for seed in 1..80 {
            let mut draw = rng(seed);
            let disk = disk(seed);
            let base = open(&disk, None, false).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let (first, second) = (pieces(&mut draw), pieces(&mut draw));
            fold(&base, 1, &first).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let mut image = whole(&base).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let before = image.clone();
            paint(&mut image, &second);
            let failed = match draw(3) {
                0 => {
                    disk.set_capacity(ByteLen(0));
                    let failed = fold(&base, 2, &second);
                    disk.set_capacity(ByteLen(64 << 20));
                    failed
                }
                1 => {
                    disk.fail_next_flush();
                    fold(&base, 2, &second)
                }
                _ => {
                    disk.fail_write_at(image_path(dir(), VOLUME));
                    fold(&base, 2, &second)
                }
            };
            if failed.is_err() {
                for sector in uncovered(&second) {
                    let mut out = [0xee; SECTOR as usize];
                    let at = (sector * SECTOR) as usize;
                    match base.read(VOLUME, sector, &mut out) {
                        Ok(()) => assert!(out == before[at..at + out.len()], "seed {seed}: sector {sector} differs"),
                        Err(BaseError::FoldInterrupted { .. }) => {}
                        Err(other) => panic!("seed {seed}: {other:?}"),
                    }
                }
            }
            fold(&base, 2, &second).unwrap_or_else(|e| panic!("seed {seed}: again: {e:?}"));
            base.fold_done(Lsn(2));
            check(&base, &image, &mut draw, &format!("seed {seed}"));
            let base = open(&disk.power_cut(), None, true).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            check(&base, &image, &mut draw, &format!("seed {seed}"));
        }
    }

    #[test]
    fn pieces_that_are_wrong_are_refused_before_they_are_written() {
        let disk = disk(6);
        let base = open(&disk, None, false).expect("an empty disk takes a base");
        let data = |lba, bytes| FoldPiece { lba, data: FoldData::Data(vec![1; bytes]) };
        let bad: [(&str, Vec<FoldPiece>); 6] = [
            ("overlap", vec![data(8, 4096), data(15, 512)]),
            ("order", vec![data(80, 512), data(8, 512)]),
            ("not whole sectors", vec![data(8, 511)]),
            ("empty", vec![data(8, 0)]),
            ("beyond the end", vec![data(SECTORS - 1, 1024)]),
            ("wraps", vec![FoldPiece { lba: 8, data: FoldData::Zero(u64::MAX) }]),
        ];
        for (what, list) in &bad {
            let folded = fold(&base, 1, list);
            assert!(
                matches!(folded, Err(BaseError::BadPiece { .. } | BaseError::Outside { .. })),
                "{what}: {folded:?}"
            );
            assert!(is_zero(&whole(&base).expect("an undamaged base can be read")), "{what}");
        }
        let source = BaseError::Source("no such segment".into());
        let mut items = vec![Ok(data(0, 4096)), Err(source)].into_iter();
        assert!(matches!(base.fold(Lsn(1), VOLUME, &mut items), Err(BaseError::Source(_))));
        assert!(matches!(base.read(VolumeId(9), 0, &mut [0; 512]), Err(BaseError::NoVolume(VolumeId(9)))));
        assert!(matches!(base.read(VOLUME, SECTORS, &mut [0; 512]), Err(BaseError::Outside { .. })));
        assert!(matches!(base.read(VOLUME, 0, &mut [0; 100]), Err(BaseError::NotSectors { bytes: 100 })));
    }

    #[test]
    fn a_fold_larger_than_a_chunk_and_a_discard_of_everything() {
        let disk = SimDisk::new(8, ByteLen(256 << 20));
        let sectors = Sectors((3 * CHUNK_BYTES) as u64 / SECTOR + 5);
        let base = ImageBase::open(Arc::new(disk.clone()), dir(), None).expect("an empty disk takes a base");
        base.ensure_volume(VOLUME, sectors, false).expect("an empty disk takes a base");
        let mut draw = rng(2);
        let mut expected = Vec::new();
        let mut list = Vec::new();
        let mut lba = 0;
        while lba < sectors.0 {
            let count = 201.min(sectors.0 - lba);
            let bytes = vec![1 + draw(255) as u8; (count * SECTOR) as usize];
            expected.extend_from_slice(&bytes);
            list.push(FoldPiece { lba, data: FoldData::Data(bytes) });
            lba += count;
        }
        fold(&base, 1, &list).expect("an undamaged disk takes a fold");
        let mut out = vec![0; expected.len()];
        base.read(VOLUME, 0, &mut out).expect("an undamaged base can be read");
        assert!(out == expected);
        let used = disk.space().expect("the disk answers").available;
        fold(&base, 2, &[FoldPiece { lba: 0, data: FoldData::Zero(sectors.0) }])
            .expect("an undamaged disk takes a fold");
        base.read(VOLUME, 0, &mut out).expect("an undamaged base can be read");
        assert!(is_zero(&out));
        assert_eq!(base.bytes().expect("the checksums can be read"), ByteLen(0));
        let free = disk.space().expect("the disk answers").available;
        assert!(free.0 >= used.0 + expected.len() as u64, "the room is given back");
    }

    #[test]
    fn readers_beside_a_fold_never_see_half_a_block() {
        let disk = disk(9);
        let base = Arc::new(open(&disk, None, false).expect("an empty disk takes a base"));
        // The first sector of each block is folded again and again, the second stays as it is.
        let blocks = SECTORS / 8;
        let list = |fill: u8, from: u64| -> Vec<FoldPiece> {
            (0..blocks).map(|b| FoldPiece { lba: b * 8 + from, data: FoldData::Data(vec![fill; 512]) }).collect()
        };
        fold(&base, 1, &list(200, 1)).expect("an undamaged disk takes a fold");
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !done.load(std::sync::atomic::Ordering::Acquire) || reads == 0 {
                    let seen = whole(&base).expect("a fold that goes well is not noticed");
                    assert!((0..blocks as usize).all(|b| seen[b * 4096 + 512..b * 4096 + 1024] == [200; 512]));
                    reads += 1;
                }
                reads
            });
            for round in 2..60 {
                fold(&base, round, &list(round as u8, 0)).expect("an undamaged disk takes a fold");
            }
            done.store(true, std::sync::atomic::Ordering::Release);
            assert!(reader.join().expect("the reader is content") > 0);
        });
    }

    #[test]
    fn hostile_redo_files_are_not_believed() {
        let good = make_redo(VOLUME, Lsn(7), [(3u64, &[9u8; BASE_BLOCK][..])].into_iter());
        assert_eq!(parse_redo(&good, VOLUME, Lsn(7)).map(|blocks| blocks.len()), Some(1));
        assert_eq!(parse_redo(&good, VOLUME, Lsn(8)), None);
        assert_eq!(parse_redo(&good, VolumeId(1), Lsn(7)), None);
        for len in 0..good.len() {
            assert_eq!(parse_redo(&good[..len], VOLUME, Lsn(7)), None, "cut to {len}");
        }
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 16;
            assert_eq!(parse_redo(&bad, VOLUME, Lsn(7)), None, "byte {byte}");
        }
    }
}
