//! A host: disks, a workload, and capture's ring.
//!
//! A request is captured into the ring when it is **issued**, in one order over all volumes, and changes the disk some time
//! before it **completes**. Requests in flight never overlap, as no file system lets them. The ring survives the agent; when it is
//! full the write is lost from it and only its place is known, reported where it would have stood and once more when it has completed.

use crate::oracle::{Request, WriteLog};
use crate::rng::Rng;
use model::{Extent, Sectors, VolumeId, VolumeSpec, WriteFlags};
use replication::CapturedKind;
use std::collections::VecDeque;

/// Sectors of a captured part: 128 KiB.
const PART: u64 = 256;

#[derive(Clone, Debug)]
pub(crate) enum RingItem {
    Part { request: Request, kind: CapturedKind, flags: WriteFlags, volume: usize, extent: Extent, mono_ms: u64 },
    Lost { request: Request, volume: usize, extent: Extent },
}

impl RingItem {
    pub(crate) fn request(&self) -> Request {
        match self {
            Self::Part { request, .. } | Self::Lost { request, .. } => *request,
        }
    }
    fn bytes(&self) -> u64 {
        match self {
            Self::Part { kind: CapturedKind::Write, extent, .. } => 64 + extent.bytes(),
            Self::Part { .. } => 64,
            // Kept beside the ring, in the map.
            Self::Lost { .. } => 0,
        }
    }
}

#[derive(Debug)]
struct InFlight {
    request: Request,
    kind: CapturedKind,
    volume: usize,
    extent: Extent,
    /// Half of it is on the disk at this time, all of it at the next.
    half_at: u64,
    done_at: u64,
    lost: bool,
}

#[derive(Debug)]
pub(crate) struct Host {
    rng: Rng,
    pub(crate) specs: Vec<VolumeSpec>,
    pub(crate) disks: Vec<Vec<u64>>,
    pub(crate) log: WriteLog,
    pub(crate) issued: Request,
    in_flight: Vec<InFlight>,
    ring: VecDeque<RingItem>,
    ring_bytes: u64,
    ring_bytes_max: u64,
    /// Position in the ring of its oldest item, and of the next to be handed in.
    pub(crate) ring_first: u64,
    /// Flushes that wait for the agent.
    pub(crate) flushes: Vec<Request>,
    pub(crate) lost: u64,
    /// Completed since the last flush of their disk: the next power cut may undo them.
    unflushed: Vec<(Request, usize, Extent)>,
    /// The application works on a small part of the disk most of the time.
    hot: u64,
}

impl Host {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 1);
        let specs: Vec<VolumeSpec> = (0..rng.between(1, 3))
            .map(|id| {
                let sectors = Sectors(rng.between(300, 4000));
                // Ids need not be dense.
                let id = VolumeId(id as u32 * 3);
                VolumeSpec { id, name: format!("/dev/sim{}", id.0), sectors, identity: format!("sim:{}", id.0) }
            })
            .collect();
        let sizes: Vec<Sectors> = specs.iter().map(|spec| spec.sectors).collect();
        let mut host = Self {
            disks: sizes.iter().map(|size| vec![0; size.0 as usize]).collect(),
            log: WriteLog::new(&sizes),
            specs,
            issued: 0,
            in_flight: Vec::new(),
            ring: VecDeque::new(),
            ring_bytes: 0,
            ring_bytes_max: rng.between(256, 3072) << 10,
            ring_first: 0,
            flushes: Vec::new(),
            lost: 0,
            unflushed: Vec::new(),
            hot: rng.between(1, 100),
            rng,
        };
        // What was on the disks before anybody protected them.
        for volume in 0..host.disks.len() {
            let sectors = host.specs[volume].sectors.0;
            for _ in 0..host.rng.below(20) {
                let start = host.rng.below(sectors);
                let extent = Extent::new(start, host.rng.between(1, sectors - start));
                host.issued += 1;
                let request = host.issued;
                host.log.write(request, volume, extent, |sector| tag(request, sector));
                for sector in extent.start()..extent.end() {
                    host.disks[volume][sector as usize] = tag(request, sector);
                }
            }
        }
        host
    }

    /// Issues one request, or none when it would touch what is in flight. Captured at once.
    pub(crate) fn issue(&mut self, now_ms: u64) -> Option<Request> {
        let volume = self.rng.below(self.specs.len() as u64) as usize;
        let sectors = self.specs[volume].sectors.0;
        let kind = match self.rng.below(100) {
            0..=9 => CapturedKind::Flush,
            10..=13 => CapturedKind::Zero,
            14..=17 => CapturedKind::Discard,
            _ => CapturedKind::Write,
        };
        let extent = if kind == CapturedKind::Flush {
            Extent::default()
        } else {
            let most = match self.rng.below(20) {
                0..=1 => 700,
                2..=6 => 128,
                _ => 16,
            };
            let start =
                if self.rng.below(100) < self.hot { self.rng.below(1 + sectors / 8) } else { self.rng.below(sectors) };
            Extent::new(start, self.rng.between(1, most.min(sectors - start)))
        };
        if self.in_flight.iter().any(|other| other.volume == volume && other.extent.intersect(&extent).is_some()) {
            return None;
        }
        self.issued += 1;
        let request = self.issued;
        match kind {
            CapturedKind::Write => self.log.write(request, volume, extent, |sector| tag(request, sector)),
            CapturedKind::Zero | CapturedKind::Discard => self.log.write(request, volume, extent, |_| 0),
            CapturedKind::Flush => self.flushes.push(request),
        }
        let half_at = now_ms + self.rng.below(20);
        let lost = !self.capture(request, kind, volume, extent, now_ms);
        self.in_flight.push(InFlight {
            request,
            kind,
            volume,
            extent,
            half_at,
            done_at: half_at + self.rng.below(30),
            lost,
        });
        Some(request)
    }

    /// Whether the ring took it.
    fn capture(&mut self, request: Request, kind: CapturedKind, volume: usize, extent: Extent, mono_ms: u64) -> bool {
        let mut parts = Vec::new();
        if kind == CapturedKind::Write {
            let mut at = extent.start();
            while at < extent.end() {
                let part = Extent::between(at, extent.end().min(at + PART));
                at = part.end();
                let flags = if at < extent.end() { WriteFlags::MORE } else { WriteFlags::NONE };
                parts.push(RingItem::Part { request, kind, flags, volume, extent: part, mono_ms });
            }
        } else {
            parts.push(RingItem::Part { request, kind, flags: WriteFlags::NONE, volume, extent, mono_ms });
        }
        let bytes: u64 = parts.iter().map(RingItem::bytes).sum();
        if self.ring_bytes + bytes > self.ring_bytes_max {
            self.lost += 1;
            // Nobody will ask for it: as with a sync leg that was dropped, the host goes on.
            self.flushes.retain(|flush| *flush != request);
            self.ring.push_back(RingItem::Lost { request, volume, extent });
            return false;
        }
        self.ring_bytes += bytes;
        self.ring.extend(parts);
        true
    }

    /// The disks as time goes by.
    pub(crate) fn advance(&mut self, now_ms: u64) {
        let disks = &mut self.disks;
        let unflushed = &mut self.unflushed;
        let mut reports = Vec::new();
        self.in_flight.retain(|write| {
            let half = write.extent.start() + write.extent.sectors.0 / 2;
            let until = match () {
                () if now_ms >= write.done_at => write.extent.end(),
                () if now_ms >= write.half_at => half,
                () => write.extent.start(),
            };
            for sector in write.extent.start()..until {
                disks[write.volume][sector as usize] =
                    if write.kind == CapturedKind::Write { tag(write.request, sector) } else { 0 };
            }
            if now_ms >= write.done_at {
                // One cache for all disks: a flush of one empties it.
                match write.kind {
                    CapturedKind::Flush => unflushed.clear(),
                    _ => unflushed.push((write.request, write.volume, write.extent)),
                }
            }
            if now_ms >= write.done_at && write.lost {
                reports.push(RingItem::Lost { request: write.request, volume: write.volume, extent: write.extent });
            }
            now_ms < write.done_at
        });
        self.ring.extend(reports);
    }

    /// Loses its power. Writes in flight have reached the disks in part; completed ones that were never flushed may be undone, in
    /// any selection; the ring is gone. Whatever the disks hold then is what was written, by a request of its own, as far as the oracle goes.
    pub(crate) fn crash(&mut self, now_ms: u64) {
        self.advance(now_ms);
        for (request, volume, extent) in std::mem::take(&mut self.unflushed).into_iter().rev() {
            if self.rng.one_in(2) {
                continue;
            }
            let tag_before = |sector| self.log.tag(volume, sector, request - 1);
            let undone: Vec<u64> = (extent.start()..extent.end()).map(tag_before).collect();
            let place = extent.start() as usize..extent.end() as usize;
            self.disks[volume][place].copy_from_slice(&undone);
        }
        for write in std::mem::take(&mut self.in_flight) {
            for sector in write.extent.start()..write.extent.end() {
                if self.rng.one_in(2) {
                    let tag = if write.kind == CapturedKind::Write { tag(write.request, sector) } else { 0 };
                    self.disks[write.volume][sector as usize] = tag;
                }
            }
        }
        self.issued += 1;
        for (volume, disk) in self.disks.iter().enumerate() {
            for (sector, tag) in disk.iter().enumerate() {
                if self.log.tag(volume, sector as u64, Request::MAX) != *tag {
                    self.log.write(self.issued, volume, Extent::new(sector as u64, 1), |_| *tag);
                }
            }
        }
        self.ring_first = self.ring_end();
        self.ring.clear();
        self.ring_bytes = 0;
        self.flushes.clear();
    }

    /// Requests handed in so far that touch the extent and have not completed.
    pub(crate) fn in_flight_on(&self, volume: usize, extent: &Extent, handed: Request) -> Vec<Request> {
        let touches = |write: &&InFlight| {
            write.volume == volume && write.request <= handed && write.extent.intersect(extent).is_some()
        };
        self.in_flight.iter().filter(touches).map(|write| write.request).collect()
    }
    pub(crate) fn is_in_flight(&self, request: Request) -> bool {
        self.in_flight.iter().any(|write| write.request == request)
    }
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    pub(crate) fn ring_item(&self, position: u64) -> Option<&RingItem> {
        self.ring.get(usize::try_from(position.checked_sub(self.ring_first)?).ok()?)
    }
    /// Position behind the newest item.
    pub(crate) fn ring_end(&self) -> u64 {
        self.ring_first + self.ring.len() as u64
    }
    /// The agent lets go of everything before `position`.
    pub(crate) fn release_ring(&mut self, position: u64) {
        while self.ring_first < position
            && let Some(item) = self.ring.pop_front()
        {
            self.ring_bytes -= item.bytes();
            self.ring_first += 1;
        }
    }
}

/// What a request writes into a sector.
fn tag(request: Request, sector: u64) -> u64 {
    // Now and then zeroes, as disks are full of them.
    if request.is_multiple_of(11) { 0 } else { request << 16 | sector }
}

/// The data a part carries.
pub(crate) fn part_tags(request: Request, extent: &Extent) -> Vec<u64> {
    (extent.start()..extent.end()).map(|sector| tag(request, sector)).collect()
}
