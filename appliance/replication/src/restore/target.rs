//! The machine's side: looks, writes and says what it has. It holds nothing but what is on the way.

use crate::granules::GRANULE_SECTORS;
use model::{Extent, RecordKind, Sectors, SourceSeq, VolumeId};
use std::collections::BTreeMap;
use wire::{
    Ack, AckFlags, BlockHash, ComparisonError, Credit, FrameHeader, FrameKind, HEADER_LEN, Look, READ_BACK_MAX,
    RestoreDisk, RestoreId, TARGET_DISKS_MAX,
};

/// Looks and fetches that are not answered; the box asks for fewer.
const ASKED_MAX: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TargetConfig {
    /// Of records that are not written yet.
    pub bytes_max: u64,
    pub records_max: u64,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self { bytes_max: 16 << 20, records_max: 4096 }
    }
}

#[derive(Debug)]
pub enum TargetEvent {
    Open {
        restore: RestoreId,
        disks: Vec<RestoreDisk>,
    },
    /// What became of [`TargetAction::Open`].
    Opened {
        refused: Option<String>,
    },
    Look(Look),
    Hashed {
        id: u64,
        hashes: Vec<BlockHash>,
    },
    Fetch {
        id: u64,
        disk: VolumeId,
        extent: Extent,
    },
    Read {
        id: u64,
        data: Vec<u8>,
    },
    /// A record's header; its payload stays with the caller.
    Record(FrameHeader),
    /// Everything up to this number is written.
    Wrote {
        seq: SourceSeq,
    },
    /// Everything up to this number survives a power cut.
    Synced {
        seq: SourceSeq,
    },
    /// A disk did not do what it was asked.
    Failed {
        text: String,
    },
    End {
        restore: RestoreId,
        reboot: bool,
    },
    /// What became of [`TargetAction::Close`].
    Closed {
        refused: Option<String>,
    },
    Disconnected,
}

/// Disk work is done in the order it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetAction {
    /// Take hold of all of them, or of none.
    Open {
        disks: Vec<RestoreDisk>,
    },
    Hash(Look),
    Read {
        id: u64,
        disk: VolumeId,
        extent: Extent,
    },
    Write {
        seq: SourceSeq,
    },
    Sync {
        seq: SourceSeq,
    },
    /// Make everything durable and let go.
    Close,
    Say(wire::Message),
    Ack(Ack),
    /// Told to; the disks are durable and closed.
    Reboot,
}

/// What a box said that cannot be. The connection ends, the disks are let go.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TargetError {
    #[error("the box asks for disks while it has some")]
    OpenAlready,
    #[error("the box asks for something before it has any disk")]
    NotOpen,
    #[error("the box asks for {0} disks, from 1 to {TARGET_DISKS_MAX} are possible")]
    Disks(usize),
    #[error("the box asks for disk {0} twice")]
    Twice(String),
    #[error("the box calls a disk {0}, and none of that number is open")]
    NoSuchDisk(VolumeId),
    #[error("the box asks for something past the end of disk {disk}: sectors {start} to {end} of {sectors}")]
    PastEnd { disk: VolumeId, start: u64, end: u64, sectors: u64 },
    #[error("the box asks for hashes that cannot be")]
    Look(#[source] ComparisonError),
    #[error("the box asks for {0} bytes at once")]
    FetchLength(u64),
    #[error("the box asks for more than {ASKED_MAX} things at once")]
    TooMuch,
    #[error("the box sent record {got} where {wanted} was due")]
    Sequence { wanted: SourceSeq, got: SourceSeq },
    #[error("the box sent more than was granted")]
    Credit,
    #[error("the box sent a {0:?}, which no restore has")]
    Kind(FrameKind),
    #[error("the box speaks of restore {got}, and {have} is open")]
    OtherRestore { have: RestoreId, got: RestoreId },
}

#[derive(Debug)]
struct Open {
    restore: RestoreId,
    disks: BTreeMap<VolumeId, Sectors>,
    stage: Stage,
    expected: SourceSeq,
    /// Records that are not written, with what they cost.
    unwritten: std::collections::VecDeque<(SourceSeq, u64)>,
    written: SourceSeq,
    durable: SourceSeq,
    /// Worked off, and so free again.
    freed: Credit,
    charged: Credit,
    asked: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Opening,
    Open,
    Closing { reboot: bool },
}

/// See the module's page.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    open: Option<Open>,
}

impl Target {
    pub fn new(config: TargetConfig) -> Self {
        Self { config, open: None }
    }
    /// Which restore holds the disks.
    pub fn restore(&self) -> Option<RestoreId> {
        self.open.as_ref().map(|open| open.restore)
    }

    /// An error ends the connection; [`TargetEvent::Disconnected`] must follow.
    pub fn on(&mut self, event: TargetEvent, out: &mut Vec<TargetAction>) -> Result<(), TargetError> {
        match event {
            TargetEvent::Open { restore, disks } => self.begin(restore, disks, out),
            TargetEvent::Opened { refused } => {
                self.opened(refused, out);
                Ok(())
            }
            TargetEvent::Look(look) => {
                let (_, sectors) = self.disk(look.disk)?;
                look.check(sectors).map_err(TargetError::Look)?;
                self.ask()?;
                out.push(TargetAction::Hash(look));
                Ok(())
            }
            TargetEvent::Fetch { id, disk, extent } => {
                self.inside(disk, &extent)?;
                if extent.is_empty() || extent.bytes() > READ_BACK_MAX as u64 {
                    return Err(TargetError::FetchLength(extent.bytes()));
                }
                self.ask()?;
                out.push(TargetAction::Read { id, disk, extent });
                Ok(())
            }
            TargetEvent::Hashed { id, hashes } => {
                self.answered(wire::Message::RestoreLooked { id, hashes }, out);
                Ok(())
            }
            TargetEvent::Read { id, data } => {
                self.answered(wire::Message::RestoreFetched { id, data }, out);
                Ok(())
            }
            TargetEvent::Record(header) => self.record(&header, out),
            TargetEvent::Wrote { seq } => {
                self.wrote(seq, None, out);
                Ok(())
            }
            TargetEvent::Synced { seq } => {
                self.wrote(seq, Some(seq), out);
                Ok(())
            }
            TargetEvent::Failed { text } => {
                if let Some(open) = self.open.take() {
                    // What it holds must not look as if it went on.
                    out.push(TargetAction::Close);
                    out.push(TargetAction::Say(wire::Message::RestoreFailed { restore: open.restore, text }));
                }
                Ok(())
            }
            TargetEvent::End { restore, reboot } => self.end(restore, reboot, out),
            TargetEvent::Closed { refused } => {
                self.closed(refused, out);
                Ok(())
            }
            TargetEvent::Disconnected => {
                if self.open.take().is_some() {
                    out.push(TargetAction::Close);
                }
                Ok(())
            }
        }
    }

    fn begin(
        &mut self,
        restore: RestoreId,
        disks: Vec<RestoreDisk>,
        out: &mut Vec<TargetAction>,
    ) -> Result<(), TargetError> {
        if self.open.is_some() {
            return Err(TargetError::OpenAlready);
        }
        if disks.is_empty() || disks.len() > TARGET_DISKS_MAX {
            return Err(TargetError::Disks(disks.len()));
        }
        for (i, disk) in disks.iter().enumerate() {
            if disks[..i].iter().any(|d| d.path == disk.path || d.disk == disk.disk) {
                return Err(TargetError::Twice(disk.path.clone()));
            }
        }
        self.open = Some(Open {
            restore,
            disks: disks.iter().map(|d| (d.disk, d.sectors)).collect(),
            stage: Stage::Opening,
            expected: SourceSeq(1),
            unwritten: std::collections::VecDeque::new(),
            written: SourceSeq::ZERO,
            durable: SourceSeq::ZERO,
            freed: Credit::default(),
            charged: Credit::default(),
            asked: 0,
        });
        out.push(TargetAction::Open { disks });
        Ok(())
    }

    fn opened(&mut self, refused: Option<String>, out: &mut Vec<TargetAction>) {
        let credit = Credit { bytes: self.config.bytes_max, records: self.config.records_max };
        let Some(open) = self.open.as_mut().filter(|o| o.stage == Stage::Opening) else { return };
        let restore = open.restore;
        open.stage = Stage::Open;
        if refused.is_some() {
            self.open = None;
        }
        out.push(TargetAction::Say(wire::Message::RestoreOpened { restore, refused, credit }));
    }

    fn live(&mut self) -> Result<&mut Open, TargetError> {
        self.open.as_mut().filter(|o| o.stage == Stage::Open).ok_or(TargetError::NotOpen)
    }
    fn disk(&mut self, disk: VolumeId) -> Result<(&mut Open, Sectors), TargetError> {
        let open = self.live()?;
        let sectors = open.disks.get(&disk).copied().ok_or(TargetError::NoSuchDisk(disk))?;
        Ok((open, sectors))
    }
    fn inside(&mut self, disk: VolumeId, extent: &Extent) -> Result<(), TargetError> {
        let (_, sectors) = self.disk(disk)?;
        let end = extent.lba.0.checked_add(extent.sectors.0).filter(|end| *end <= sectors.0);
        end.map(|_| ()).ok_or(TargetError::PastEnd {
            disk,
            start: extent.lba.0,
            end: extent.lba.0.saturating_add(extent.sectors.0),
            sectors: sectors.0,
        })
    }
    fn ask(&mut self) -> Result<(), TargetError> {
        let open = self.live()?;
        if open.asked >= ASKED_MAX {
            return Err(TargetError::TooMuch);
        }
        open.asked += 1;
        Ok(())
    }
    fn answered(&mut self, message: wire::Message, out: &mut Vec<TargetAction>) {
        if let Some(open) = self.open.as_mut() {
            open.asked = open.asked.saturating_sub(1);
            out.push(TargetAction::Say(message));
        }
    }

    fn record(&mut self, header: &FrameHeader, out: &mut Vec<TargetAction>) -> Result<(), TargetError> {
        let (bytes_max, records_max) = (self.config.bytes_max, self.config.records_max);
        let FrameKind::Record(kind @ (RecordKind::Write | RecordKind::Zero | RecordKind::Flush)) = header.kind else {
            return Err(TargetError::Kind(header.kind));
        };
        if kind != RecordKind::Flush {
            self.inside(header.volume, &header.extent)?;
        }
        let open = self.live()?;
        if header.seq != open.expected {
            return Err(TargetError::Sequence { wanted: open.expected, got: header.seq });
        }
        let charge = header.charge();
        open.charged.bytes = open.charged.bytes.saturating_add(charge);
        open.charged.records += 1;
        if open.charged.bytes > open.freed.bytes + bytes_max || open.charged.records > open.freed.records + records_max
        {
            return Err(TargetError::Credit);
        }
        open.expected = header.seq.next();
        open.unwritten.push_back((header.seq, charge));
        out.push(if kind == RecordKind::Flush {
            TargetAction::Sync { seq: header.seq }
        } else {
            TargetAction::Write { seq: header.seq }
        });
        Ok(())
    }

    fn wrote(&mut self, seq: SourceSeq, durable: Option<SourceSeq>, out: &mut Vec<TargetAction>) {
        let (bytes_max, records_max) = (self.config.bytes_max, self.config.records_max);
        let Some(open) = self.open.as_mut().filter(|o| seq > o.written && seq < o.expected) else { return };
        while open.unwritten.front().is_some_and(|(first, _)| *first <= seq)
            && let Some((_, charge)) = open.unwritten.pop_front()
        {
            open.freed.bytes += charge;
            open.freed.records += 1;
        }
        open.written = seq;
        open.durable = durable.unwrap_or(open.durable);
        let credit = Credit { bytes: open.freed.bytes + bytes_max, records: open.freed.records + records_max };
        out.push(TargetAction::Ack(Ack { written: seq, durable: open.durable, credit, flags: AckFlags::NONE }));
    }

    fn end(&mut self, restore: RestoreId, reboot: bool, out: &mut Vec<TargetAction>) -> Result<(), TargetError> {
        match self.open.as_mut() {
            Some(open) if open.restore != restore => {
                Err(TargetError::OtherRestore { have: open.restore, got: restore })
            }
            Some(open) => {
                open.stage = Stage::Closing { reboot };
                out.push(TargetAction::Close);
                Ok(())
            }
            // Of one that it let go already: an answer was lost on the way.
            None => {
                out.push(TargetAction::Say(wire::Message::RestoreEnded { restore }));
                if reboot {
                    out.push(TargetAction::Reboot);
                }
                Ok(())
            }
        }
    }

    fn closed(&mut self, refused: Option<String>, out: &mut Vec<TargetAction>) {
        let Some(Open { restore, stage: Stage::Closing { reboot }, .. }) = self.open else { return };
        self.open = None;
        if let Some(text) = refused {
            out.push(TargetAction::Say(wire::Message::RestoreFailed { restore, text }));
            return;
        }
        out.push(TargetAction::Say(wire::Message::RestoreEnded { restore }));
        if reboot {
            out.push(TargetAction::Reboot);
        }
    }
}

/// A record never covers more than the box's own unit of looking; kept here because both sides rely on it.
const _: () = assert!(GRANULE_SECTORS * 512 <= wire::MAX_RECORD_BYTES as u64 && HEADER_LEN > 0);
