//! Checks everything a journal keeps: every byte of its segments, footers against records, the base, the index.
//!
//! A segment's used area is covered completely: header and trailer blocks by their checksums, records by theirs, padding by the
//! rule that it is zero, footer pages by theirs and by comparison with what the records say. Of a segment that is not sealed the
//! part up to what is written is checked.
//!
//! The index is disposable: a run that says something else than the segments is set aside and built again, and counted as
//! such, not as damage.

use crate::{
    Corruption, Damage, ReadError,
    base::BaseError,
    format::{self, BATCH_HEADER, BLOCK, BatchHeader, SegmentHeader, SegmentTrailer},
    index::{IndexStore, Piece, PieceKind, RunId, Version, pieces_from_versions},
    scan::{FaultKind, split_batch},
    segment::{Footer, MemIndex, Segment, State, read_or_short},
    shared::{Line, Shared},
    types::{VERIFY_DAMAGE_MAX, VerifyProgress, VerifyReport},
};
use durable::{DiskFile, OpenMode};
use model::{ByteLen, Lsn, RecordKind};
use std::{path::Path, sync::Arc};

struct Verifier<'a> {
    shared: &'a Shared,
    report: VerifyReport,
    done: u64,
    total: u64,
}

/// Checks all of it; slow: it reads everything.
pub fn verify(shared: &Shared, progress: &mut dyn FnMut(VerifyProgress)) -> VerifyReport {
    let map = shared.map();
    let segments: Vec<(Arc<Segment>, Lsn)> =
        map.lines.values().flat_map(|l| l.segments.iter().map(|s| (Arc::clone(s), l.written()))).collect();
    let total = segments.iter().map(|(s, _)| s.summary().file_bytes).sum();
    let mut this = Verifier { shared, report: VerifyReport::default(), done: 0, total };
    for (segment, written) in segments {
        let file = segment.path(&shared.dir);
        progress(VerifyProgress { file: file.clone(), done: ByteLen(this.done), total: ByteLen(this.total) });
        if let Err(e) = this.segment(&segment, written) {
            this.failed(&file, e);
        }
        this.report.segments += 1;
        this.done += segment.summary().file_bytes;
    }
    if map.floor.lsn > Lsn::ZERO {
        for volume in &map.spec.volumes {
            let file = format::base_image_path(&shared.dir, volume.id);
            progress(VerifyProgress { file: file.clone(), done: ByteLen(this.done), total: ByteLen(this.total) });
            let mut found = Vec::new();
            match shared.base.verify(volume.id, &mut |damage| found.push(damage)) {
                Ok(checked) => this.report.base_blocks += checked.blocks,
                Err(BaseError::Corruption(damage)) => found.push(damage),
                Err(e) => this.report.unreadable.push(format!("{}: {e}", file.display())),
            }
            found.into_iter().for_each(|damage| this.damage(damage));
        }
    }
    if let Some(index) = shared.index() {
        for line in map.lines.values() {
            this.runs(&*index, line);
        }
    }
    let (done, total) = (ByteLen(this.done), ByteLen(this.total));
    progress(VerifyProgress { file: shared.dir.clone(), done, total });
    this.report
}

impl Verifier<'_> {
    fn damage(&mut self, damage: Corruption) {
        self.report.damage_count += 1;
        if self.report.damage.len() < VERIFY_DAMAGE_MAX {
            self.report.damage.push(damage);
        }
    }
    fn found(&mut self, file: &Path, offset: u64, what: Damage) {
        self.damage(Corruption { file: file.to_owned(), offset, what });
    }
    fn failed(&mut self, file: &Path, e: ReadError) {
        match e {
            ReadError::Corrupt(damage) => self.damage(damage),
            // A file that a fold deleted meanwhile has nothing left to check.
            ReadError::Disk(e) if e.is_not_found() && self.is_gone(file) => {}
            other => self.report.unreadable.push(format!("{}: {other}", file.display())),
        }
    }
    fn is_gone(&self, file: &Path) -> bool {
        self.shared.map().segments().all(|s| s.path(&self.shared.dir) != file)
    }

    fn segment(&mut self, segment: &Segment, written: Lsn) -> Result<(), ReadError> {
        // A handle of its own: what another one has cached in memory is not what lies on the disk.
        let path = segment.path(&self.shared.dir);
        let file = self.shared.disk.open(&path, OpenMode::Read)?;
        let mut block = [0; BLOCK];
        read_or_short(&*file, &path, 0, &mut block)?;
        match SegmentHeader::decode(&block) {
            Ok(header) if header == segment.header => {}
            _ => self.found(&path, 0, Damage::SegmentHeader),
        }
        let sealed = match &*segment.state() {
            State::Sealed(sealed) => Some(Arc::clone(sealed)),
            State::Unsealed(_) => None,
        };
        let (last, data_end) = match &sealed {
            Some(sealed) => (sealed.trailer.last_lsn, sealed.trailer.data_end),
            None => (segment.last_lsn().min(written), u64::MAX),
        };
        let index = self.batches(segment, &*file, &path, last, data_end)?;
        if let (Some(sealed), Some(index)) = (sealed, index) {
            self.footer(segment, &*file, &path, &sealed.trailer, &index)?;
        }
        Ok(())
    }

    /// Reads all batches; None when damage kept some records from being read.
    fn batches(
        &mut self,
        segment: &Segment,
        file: &dyn DiskFile,
        path: &Path,
        last: Lsn,
        data_end: u64,
    ) -> Result<Option<MemIndex>, ReadError> {
        let mut index = MemIndex::new(&segment.header);
        let mut whole = true;
        let mut at = BLOCK as u64;
        let mut next = segment.first_lsn();
        let mut buf = Vec::new();
        while at < data_end && next <= last {
            buf.resize(BLOCK, 0);
            read_or_short(file, path, at, &mut buf)?;
            let header = BatchHeader::decode(&buf, segment.tag, segment.header.incarnation)
                .filter(|h| h.span() <= data_end - at && h.first_lsn == next && h.span() <= format::MAX_SEGMENT_BYTES);
            let Some(header) = header else {
                // Where the next batch begins is not known any more: look for it.
                self.found(path, at, Damage::Batch { durable: last, readable: next.prev() });
                whole = false;
                match self.next_batch(segment, file, path, at + BLOCK as u64, data_end, next, last)? {
                    Some((found, first)) => (at, next) = (found, first),
                    None => return Ok(None),
                }
                continue;
            };
            buf.resize(header.span() as usize, 0);
            read_or_short(file, path, at + BLOCK as u64, &mut buf[BLOCK..])?;
            let used = BATCH_HEADER + header.body_len as usize;
            if let Some(dirt) = buf[used..].iter().position(|b| *b != 0) {
                self.found(path, at + (used + dirt) as u64, Damage::Padding);
            }
            self.report.bytes.0 += header.span();
            match split_batch(&header, &buf[BATCH_HEADER..used], at, next) {
                Ok(records) => {
                    self.report.records += records.len() as u64;
                    for scanned in records {
                        index.insert_if(whole, &scanned.record, scanned.offset as u32, scanned.mark.as_ref());
                        if let Err(damage) = payload_decodes(&scanned.record, scanned.payload, path, scanned.offset) {
                            self.damage(damage);
                        }
                    }
                }
                Err(fault) => {
                    whole = false;
                    let what = match fault.what {
                        FaultKind::BatchHeader => Damage::Batch { durable: last, readable: next.prev() },
                        FaultKind::RecordHeader => Damage::RecordHeader,
                        FaultKind::Payload => Damage::PayloadChecksum,
                    };
                    self.found(path, fault.offset, what);
                }
            }
            next = Lsn(header.first_lsn.0 + u64::from(header.record_count));
            at += header.span();
        }
        if data_end != u64::MAX && whole && (at != data_end || next != last.next()) {
            self.found(path, at, Damage::Batch { durable: last, readable: next.prev() });
            whole = false;
        }
        Ok(whole.then_some(index))
    }

    #[allow(clippy::too_many_arguments, reason = "one place in the file, and what it has to fit")]
    fn next_batch(
        &self,
        segment: &Segment,
        file: &dyn DiskFile,
        path: &Path,
        from: u64,
        data_end: u64,
        after: Lsn,
        last: Lsn,
    ) -> Result<Option<(u64, Lsn)>, ReadError> {
        let end = data_end.min(file.len()?.0);
        let mut block = [0; BLOCK];
        let mut at = from;
        while at + BLOCK as u64 <= end {
            read_or_short(file, path, at, &mut block)?;
            if let Some(header) = BatchHeader::decode(&block, segment.tag, segment.header.incarnation)
                && header.first_lsn > after
                && header.first_lsn <= last
            {
                return Ok(Some((at, header.first_lsn)));
            }
            at += BLOCK as u64;
        }
        Ok(None)
    }

    /// The footer must be exactly what these records give.
    fn footer(
        &mut self,
        segment: &Segment,
        file: &dyn DiskFile,
        path: &Path,
        trailer: &SegmentTrailer,
        index: &MemIndex,
    ) -> Result<(), ReadError> {
        let (want, _) = index.footer(&segment.header, trailer.data_end);
        let len = file.len()?.0;
        if len != trailer.data_end + want.len() as u64 {
            self.found(path, len, Damage::Short { len });
        }
        let mut have = vec![0; want.len()];
        read_or_short(file, path, trailer.data_end, &mut have)?;
        self.report.bytes.0 += have.len() as u64;
        for (i, (have, want)) in have.chunks(BLOCK).zip(want.chunks(BLOCK)).enumerate() {
            let Some(at) = have.iter().zip(want).position(|(a, b)| a != b) else { continue };
            let block = trailer.data_end + (i * BLOCK) as u64;
            let offset = block + at as u64;
            let inside = |s: &format::Section| (s.offset..s.offset + s.len).contains(&offset);
            let what = match () {
                () if inside(&trailer.table) => Damage::FooterTable,
                () if inside(&trailer.extents) => Damage::FooterExtents,
                () if inside(&trailer.fences) => Damage::FooterFences,
                () if inside(&trailer.marks) => Damage::FooterMarks,
                () if block + BLOCK as u64 == len => Damage::Trailer,
                () => Damage::Padding,
            };
            self.found(path, offset, what);
        }
        // The same parts once more as a reader takes them, so that a fault of ours shows up here and not in a restore.
        let footer = Footer { file, path, trailer };
        footer.fences()?;
        footer.marks()?;
        Ok(())
    }

    /// Level-0 runs must be what the footers give; higher ones must at least be whole.
    fn runs(&mut self, index: &dyn IndexStore, line: &Line) {
        for segment in &line.segments {
            let run = RunId::new(line.id, 0, segment.header.ordinal);
            if !self.shared.has_run(index, line, run) {
                continue;
            }
            // A footer that cannot be read is damage that was found above.
            let Ok(extents) = self.shared.all_extents(segment) else { continue };
            let versions = extents.into_iter().map(|e| Version {
                volume: e.volume,
                lba: e.extent.start(),
                sectors: e.extent.sectors.0 as u32,
                lsn: e.lsn,
                offset: e.offset,
                kind: if e.kind == RecordKind::Write { PieceKind::Data } else { PieceKind::Zero },
            });
            let want = pieces_from_versions(segment.header.ordinal, versions);
            let have: Result<Vec<Piece>, _> = index.run_iter(run).and_then(Iterator::collect);
            self.report.index_runs += 1;
            if have.ok().as_ref() != Some(&want) {
                self.report.index_wrong += 1;
                // If it cannot be set aside now, the store refuses it by itself.
                let _ = index.drop_generation(self.shared.shape.generation(run));
            }
        }
    }
}

/// Whether a compressed payload opens to what it stands for. Raw ones were checked by length.
fn payload_decodes(record: &model::Record, payload: &[u8], path: &Path, offset: u64) -> Result<(), Corruption> {
    if record.kind == RecordKind::Write && record.codec != model::Codec::Raw {
        format::decode_payload(record, payload, path, offset)?;
    }
    Ok(())
}
