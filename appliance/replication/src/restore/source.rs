//! The box's side: what is to be looked at, what is on the way, what is durable at the target.

use crate::granules::{GRANULE_SECTORS, GranuleMap};
use model::{Extent, SECTOR, Sectors, SourceSeq, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use wire::{
    Ack, BlockHash, COMPARE_RUNS_MAX, COMPARE_SECTORS_MAX, Credit, HEADER_LEN, Look, MAX_RECORD_BYTES, READ_BACK_MAX,
};

const COARSE_SECTORS: u32 = GRANULE_SECTORS as u32;
const FINE_SECTORS: u32 = 8;
/// Of a look's granules differ so many in sixteen: they are shipped as they are. Only where the look is a long run: a short one is what was
/// written lately, of which each granule has changed somewhere.
const WHOLE_FROM_16THS: usize = 12;
const WHOLE_FROM_GRANULES: usize = 32;
/// Zeroes cost a disk less to write than data: so many bytes of them count as one when a flush is due.
const ZEROES_FOR_ONE: u64 = 16;
const RECORD_SECTORS: u64 = MAX_RECORD_BYTES as u64 / SECTOR;
const FETCH_SECTORS: u64 = READ_BACK_MAX as u64 / SECTOR;

/// A disk of the restore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceDisk {
    /// As looks and records call it.
    pub disk: VolumeId,
    pub sectors: Sectors,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceConfig {
    /// Looks asked and not worked off; each is at most 4 MiB of disk.
    pub looks_max: usize,
    /// Of records that are not durable at the target; and of what was compared and waits to be sent.
    pub bytes_max: u64,
    /// A flush is asked for after so much.
    pub flush_bytes: u64,
    /// Fetches on the way.
    pub fetches_max: usize,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self { looks_max: 4, bytes_max: 32 << 20, flush_bytes: 16 << 20, fetches_max: 32 }
    }
}

/// What is done with blocks that differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// They are written at the target.
    Ship,
    /// What the target has is fetched.
    Keep,
}

#[derive(Debug)]
pub enum SourceEvent {
    /// The target has opened its disks; records are numbered from 1 again.
    Opened {
        credit: Credit,
    },
    Disconnected,
    Looked {
        id: u64,
        hashes: Vec<BlockHash>,
    },
    /// A bit for each block as in [`wire::differs`]; and whether the source has only zeroes there.
    Compared {
        id: u64,
        differ: Vec<u8>,
        zero: Vec<u8>,
    },
    Acked(Ack),
    Fetched {
        id: u64,
        bytes: u64,
    },
    /// What was fetched under that number is kept, or need not be durable before the pass is.
    Kept {
        id: u64,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceAction {
    Look(Look),
    /// Compare the hashes with the source, in the background; answered by [`SourceEvent::Compared`].
    Compare {
        look: Look,
        hashes: Vec<BlockHash>,
    },
    /// Read the source and send it as a record with this number.
    Send {
        seq: SourceSeq,
        disk: VolumeId,
        extent: Extent,
        zero: bool,
    },
    Flush {
        seq: SourceSeq,
    },
    Fetch {
        id: u64,
        disk: VolumeId,
        extent: Extent,
    },
    /// The data that came with the event belongs there.
    Keep {
        id: u64,
        disk: VolumeId,
        extent: Extent,
    },
    /// All of the pass is the same, or durable at the target, or kept.
    PassDone(Pass),
}

/// What a target said that cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SourceError {
    #[error("an answer to look {0}, which was not asked")]
    NoSuchLook(u64),
    #[error("{had} hashes for the {due} blocks of look {id}")]
    Hashes { id: u64, had: usize, due: usize },
    #[error("record {said} acknowledged, of {sent} that were sent")]
    AckAhead { said: SourceSeq, sent: SourceSeq },
    #[error("data for fetch {0}, which was not asked")]
    NoSuchFetch(u64),
    #[error("{had} bytes for fetch {id}, {due} were asked for")]
    Fetched { id: u64, had: u64, due: u64 },
    #[error("an answer before the disks were opened")]
    NotOpen,
}

/// How far a pass is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Progress {
    pub total_bytes: u64,
    /// Not yet known to be right at the target.
    pub left_bytes: u64,
    /// Sent as data since the machine was made; a range of zeroes counts nothing.
    pub shipped_bytes: u64,
    /// Of records of zeroes.
    pub zeroed_bytes: u64,
    /// Looked at and found the same.
    pub same_bytes: u64,
    pub fetched_bytes: u64,
}

#[derive(Debug)]
struct Disk {
    disk: VolumeId,
    todo: GranuleMap,
}

#[derive(Clone, Debug)]
struct Asked {
    /// Its place among the disks.
    at: usize,
    look: Look,
    hashed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    at: usize,
    extent: Extent,
    zero: bool,
}

impl Piece {
    /// What a record of it costs of the credit, as [`wire::charge`] counts.
    fn charge(&self) -> u64 {
        HEADER_LEN as u64 + if self.zero { 0 } else { self.extent.bytes() }
    }
}

#[derive(Debug)]
struct Connection {
    granted: Credit,
    charged: Credit,
    next: SourceSeq,
    sent: VecDeque<(SourceSeq, Piece)>,
    sent_bytes: u64,
    unflushed: u64,
    /// Something may be written and not durable: records behind the last flush, or what an earlier connection left behind, which looks the
    /// same already.
    loose: bool,
    last_flush: SourceSeq,
    durable: SourceSeq,
}

/// See the module's page.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    disks: Vec<Disk>,
    pass: Option<Pass>,
    connection: Option<Connection>,
    next_id: u64,
    /// Answers to what was asked before this number mean nothing any more.
    forgotten: u64,
    /// Where the next look is looked for.
    cursor: (usize, u64),
    looks: BTreeMap<u64, Asked>,
    queue: VecDeque<Piece>,
    queue_bytes: u64,
    fetches: BTreeMap<u64, (Piece, bool)>,
    total: Sectors,
    progress: Progress,
}

impl Source {
    pub fn new(config: SourceConfig, disks: &[SourceDisk]) -> Self {
        let disk = |d: &SourceDisk| Disk { disk: d.disk, todo: GranuleMap::empty(d.sectors) };
        Self {
            config,
            disks: disks.iter().map(disk).collect(),
            pass: None,
            connection: None,
            next_id: 1,
            forgotten: 0,
            cursor: (0, 0),
            looks: BTreeMap::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            fetches: BTreeMap::new(),
            total: Sectors(0),
            progress: Progress::default(),
        }
    }

    /// Begins a pass over these granules, one map for each disk, and forgets what an unfinished one had left. What was compared and not yet
    /// sent, and what is on the way, is looked at again.
    pub fn begin(&mut self, pass: Pass, maps: Vec<GranuleMap>, out: &mut Vec<SourceAction>) {
        self.take_back();
        for (disk, map) in self.disks.iter_mut().zip(maps) {
            // What was on the way in an unfinished pass stays to be looked at.
            disk.todo.union(&map);
        }
        self.pass = Some(pass);
        self.cursor = (0, 0);
        self.total = self.left();
        self.go_on(out);
    }
    pub fn pass(&self) -> Option<Pass> {
        self.pass
    }
    pub fn progress(&self) -> Progress {
        Progress { total_bytes: self.total.bytes(), left_bytes: self.left().bytes(), ..self.progress }
    }
    /// What is not known to be right.
    fn left(&self) -> Sectors {
        let marked: u64 = self.disks.iter().map(|d| d.todo.covered().0).sum();
        let looks: u64 = self.looks.values().flat_map(|a| &a.look.runs).map(|r| r.sectors.0).sum();
        let queued: u64 = self.queue.iter().map(|p| p.extent.sectors.0).sum();
        let sent: u64 = self.connection.iter().flat_map(|c| &c.sent).map(|(_, p)| p.extent.sectors.0).sum();
        let fetched: u64 = self.fetches.values().map(|(p, _)| p.extent.sectors.0).sum();
        Sectors(marked + looks + queued + sent + fetched)
    }

    /// An error ends the connection; [`SourceEvent::Disconnected`] must follow.
    pub fn on(&mut self, event: SourceEvent, out: &mut Vec<SourceAction>) -> Result<(), SourceError> {
        match event {
            SourceEvent::Opened { credit } => {
                self.take_back();
                self.connection = Some(Connection {
                    granted: credit,
                    charged: Credit::default(),
                    next: SourceSeq(1),
                    sent: VecDeque::new(),
                    sent_bytes: 0,
                    unflushed: 0,
                    loose: true,
                    last_flush: SourceSeq::ZERO,
                    durable: SourceSeq::ZERO,
                });
            }
            SourceEvent::Disconnected => {
                self.take_back();
                self.connection = None;
            }
            SourceEvent::Looked { id, hashes } => self.looked(id, hashes, out)?,
            SourceEvent::Compared { id, differ, zero } => self.compared(id, &differ, &zero, out),
            SourceEvent::Acked(ack) => self.acked(ack)?,
            SourceEvent::Fetched { id, bytes } => self.fetched(id, bytes, out)?,
            SourceEvent::Kept { id } => {
                if let Some((piece, true)) = self.fetches.get(&id) {
                    self.progress.fetched_bytes += piece.extent.bytes();
                    self.fetches.remove(&id);
                }
            }
        }
        self.go_on(out);
        Ok(())
    }

    /// Everything on the way is to be looked at again.
    fn take_back(&mut self) {
        self.forgotten = self.next_id;
        let mut again: Vec<(usize, Extent)> = Vec::new();
        for asked in std::mem::take(&mut self.looks).into_values() {
            again.extend(asked.look.runs.iter().map(|run| (asked.at, *run)));
        }
        again.extend(std::mem::take(&mut self.queue).iter().map(|p| (p.at, p.extent)));
        again.extend(std::mem::take(&mut self.fetches).values().map(|(p, _)| (p.at, p.extent)));
        if let Some(connection) = &mut self.connection {
            again.extend(std::mem::take(&mut connection.sent).iter().map(|(_, p)| (p.at, p.extent)));
            connection.sent_bytes = 0;
        }
        self.queue_bytes = 0;
        for (at, extent) in again {
            let todo = &mut self.disks[at].todo;
            todo.set(todo.touching(&extent));
        }
    }

    fn go_on(&mut self, out: &mut Vec<SourceAction>) {
        let Some(pass) = self.pass.filter(|_| self.connection.is_some()) else { return };
        while self.looks.len() < self.config.looks_max
            && self.queue_bytes < self.config.bytes_max
            && let Some((at, run)) = self.next_run()
        {
            let disk = &mut self.disks[at];
            let extent = disk.todo.extent(&run);
            disk.todo.clear(run.clone());
            self.cursor = (at, run.end);
            self.look(at, COARSE_SECTORS, vec![extent], out);
        }
        match pass {
            Pass::Ship => self.send(out),
            Pass::Keep => self.fetch(out),
        }
        let all_durable =
            |c: &Connection| c.sent.is_empty() && (pass == Pass::Keep || !c.loose && c.durable >= c.last_flush);
        let nothing_on_the_way = self.looks.is_empty()
            && self.queue.is_empty()
            && self.fetches.is_empty()
            && self.connection.as_ref().is_some_and(all_durable);
        if nothing_on_the_way && self.disks.iter().all(|d| d.todo.is_empty()) {
            self.pass = None;
            out.push(SourceAction::PassDone(pass));
        }
    }

    fn next_run(&self) -> Option<(usize, std::ops::Range<u64>)> {
        let most = COMPARE_SECTORS_MAX / GRANULE_SECTORS;
        let (at, from) = self.cursor;
        let count = self.disks.len();
        (0..=count).find_map(|step| {
            let disk = (at + step) % count.max(1);
            let run = self.disks.get(disk)?.todo.next_run(if step == 0 { from } else { 0 }, most)?;
            Some((disk, run))
        })
    }

    fn look(&mut self, at: usize, block_sectors: u32, runs: Vec<Extent>, out: &mut Vec<SourceAction>) {
        let look = Look { id: self.next_id, disk: self.disks[at].disk, block_sectors, runs };
        self.next_id += 1;
        out.push(SourceAction::Look(look.clone()));
        self.looks.insert(look.id, Asked { at, look, hashed: false });
    }

    fn looked(&mut self, id: u64, hashes: Vec<BlockHash>, out: &mut Vec<SourceAction>) -> Result<(), SourceError> {
        if id < self.forgotten {
            return Ok(());
        }
        let asked = self.looks.get_mut(&id).filter(|a| !a.hashed).ok_or(SourceError::NoSuchLook(id))?;
        let due = wire::blocks(&asked.look.runs, asked.look.block_sectors).count();
        if hashes.len() != due {
            return Err(SourceError::Hashes { id, had: hashes.len(), due });
        }
        asked.hashed = true;
        out.push(SourceAction::Compare { look: asked.look.clone(), hashes });
        Ok(())
    }

    /// The caller's own answer; one that belongs to a look taken back means nothing any more.
    fn compared(&mut self, id: u64, differ: &[u8], zero: &[u8], out: &mut Vec<SourceAction>) {
        if !self.looks.get(&id).is_some_and(|a| a.hashed) {
            return;
        }
        let Some(Asked { at, look, .. }) = self.looks.remove(&id) else { return };
        // What differs, and whether the source has zeroes there, joined where they touch.
        let mut differing: Vec<(Extent, bool)> = Vec::new();
        let (mut blocks, mut count) = (0, 0);
        for (i, block) in wire::blocks(&look.runs, look.block_sectors).enumerate() {
            blocks += 1;
            if !wire::differs(differ, i) {
                self.progress.same_bytes += block.bytes();
                continue;
            }
            count += 1;
            let zero = self.pass == Some(Pass::Ship) && zero.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1);
            match differing.last_mut() {
                Some((last, was)) if last.end() == block.start() && *was == zero => last.sectors.0 += block.sectors.0,
                _ => differing.push((block, zero)),
            }
        }
        let mostly = blocks >= WHOLE_FROM_GRANULES && count * 16 >= blocks * WHOLE_FROM_16THS;
        let whole = look.block_sectors == FINE_SECTORS || mostly;
        let mut finer = Vec::new();
        for (extent, zero) in differing {
            if whole || zero {
                self.enqueue(at, extent, zero);
            } else {
                finer.push(extent);
            }
        }
        for runs in finer.chunks(COMPARE_RUNS_MAX) {
            self.look(at, FINE_SECTORS, runs.to_vec(), out);
        }
    }

    fn enqueue(&mut self, at: usize, extent: Extent, zero: bool) {
        let most = match (self.pass, zero) {
            (Some(Pass::Keep), _) => FETCH_SECTORS,
            (_, true) => COMPARE_SECTORS_MAX,
            _ => RECORD_SECTORS,
        };
        let mut from = extent.start();
        while from < extent.end() {
            let piece = Piece { at, extent: Extent::between(from, extent.end().min(from + most)), zero };
            from = piece.extent.end();
            self.queue_bytes += piece.charge();
            self.queue.push_back(piece);
        }
    }

    fn send(&mut self, out: &mut Vec<SourceAction>) {
        let (Some(Pass::Ship), Some(connection)) = (self.pass, &mut self.connection) else { return };
        let room = |c: &Connection, charge: u64| {
            c.charged.bytes + charge <= c.granted.bytes && c.charged.records < c.granted.records
        };
        while let Some(piece) = self.queue.front().copied()
            && connection.sent_bytes + piece.charge() <= self.config.bytes_max.max(piece.charge())
            && room(connection, piece.charge())
        {
            self.queue.pop_front();
            self.queue_bytes -= piece.charge();
            let seq = connection.take(piece.charge());
            connection.sent.push_back((seq, piece));
            connection.sent_bytes += piece.charge();
            connection.unflushed +=
                if piece.zero { piece.extent.bytes() / ZEROES_FOR_ONE } else { piece.extent.bytes() };
            connection.loose = true;
            match piece.zero {
                true => self.progress.zeroed_bytes += piece.extent.bytes(),
                false => self.progress.shipped_bytes += piece.extent.bytes(),
            }
            let disk = self.disks[piece.at].disk;
            out.push(SourceAction::Send { seq, disk, extent: piece.extent, zero: piece.zero });
            if connection.unflushed >= self.config.flush_bytes && room(connection, HEADER_LEN as u64) {
                connection.flush(out);
            }
        }
        // The last of a pass, or one there was no credit for.
        let last = self.queue.is_empty() && self.looks.is_empty() && self.disks.iter().all(|d| d.todo.is_empty());
        if connection.loose
            && (last || connection.unflushed >= self.config.flush_bytes)
            && room(connection, HEADER_LEN as u64)
        {
            connection.flush(out);
        }
    }

    fn acked(&mut self, ack: Ack) -> Result<(), SourceError> {
        let connection = self.connection.as_mut().ok_or(SourceError::NotOpen)?;
        let sent = connection.next.prev();
        let said = ack.written.max(ack.durable);
        if said > sent {
            return Err(SourceError::AckAhead { said, sent });
        }
        connection.granted = connection.granted.max(ack.credit);
        connection.durable = connection.durable.max(ack.durable);
        while connection.sent.front().is_some_and(|(seq, _)| *seq <= ack.durable)
            && let Some((_, piece)) = connection.sent.pop_front()
        {
            connection.sent_bytes -= piece.charge();
        }
        Ok(())
    }

    fn fetch(&mut self, out: &mut Vec<SourceAction>) {
        while self.fetches.len() < self.config.fetches_max
            && let Some(piece) = self.queue.pop_front()
        {
            self.queue_bytes -= piece.charge();
            let id = self.next_id;
            self.next_id += 1;
            self.fetches.insert(id, (piece, false));
            out.push(SourceAction::Fetch { id, disk: self.disks[piece.at].disk, extent: piece.extent });
        }
    }

    fn fetched(&mut self, id: u64, had: u64, out: &mut Vec<SourceAction>) -> Result<(), SourceError> {
        if id < self.forgotten {
            return Ok(());
        }
        let (piece, here) = self.fetches.get_mut(&id).filter(|(_, here)| !here).ok_or(SourceError::NoSuchFetch(id))?;
        let due = piece.extent.bytes();
        if had != due {
            return Err(SourceError::Fetched { id, had, due });
        }
        *here = true;
        out.push(SourceAction::Keep { id, disk: self.disks[piece.at].disk, extent: piece.extent });
        Ok(())
    }
}

impl Connection {
    fn take(&mut self, charge: u64) -> SourceSeq {
        self.charged.bytes += charge;
        self.charged.records += 1;
        let seq = self.next;
        self.next = seq.next();
        seq
    }
    fn flush(&mut self, out: &mut Vec<SourceAction>) {
        let seq = self.take(HEADER_LEN as u64);
        self.unflushed = 0;
        self.loose = false;
        self.last_flush = seq;
        out.push(SourceAction::Flush { seq });
    }
}
