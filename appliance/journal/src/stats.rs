//! Numbers for people and monitors. Cheap: what takes long to count is counted by jobs and kept here.

use crate::{
    control::Floor,
    error::Corruption,
    retention::{Forecast, KeepReason, Kept, Pressure},
    shared::{Map, Shared},
    types::RateBucket,
};
use model::{ByteLen, HistoryTime, Lsn};
use std::{collections::BTreeMap, sync::PoisonError};

/// What jobs have counted or decided last.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    pub index_bytes: ByteLen,
    pub base_bytes: ByteLen,
    pub prepared_bytes: ByteLen,
    pub retention: Option<RetentionStatus>,
    /// Segments sealed but not yet in the index.
    pub index_behind: bool,
    /// The last failure of each kind of job, until one of its kind succeeds.
    pub failing: BTreeMap<&'static str, String>,
    /// The first damage met since the journal was opened; a verification that finds none takes it back.
    pub damage: Option<Corruption>,
}

/// The last retention plan, as it is shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RetentionStatus {
    pub pressure: Pressure,
    /// None while the history is too short to say.
    pub forecast: Option<Forecast>,
    pub kept: BTreeMap<KeepReason, Kept>,
    /// Of the segments that go with this plan.
    pub delete_bytes: ByteLen,
}

#[derive(Clone, PartialEq, Debug)]
pub struct JournalStats {
    /// Of segment files, the room prepared ahead not included.
    pub segment_bytes: ByteLen,
    /// Of these, what holds records and footers; the rest is room made ahead in segments that are not sealed.
    pub used_bytes: ByteLen,
    pub prepared_bytes: ByteLen,
    pub index_bytes: ByteLen,
    pub base_bytes: ByteLen,
    /// Of payloads as stored.
    pub payload_bytes: ByteLen,
    pub segments: usize,
    /// Of these, not sealed: the open one and those that wait for a job.
    pub unsealed: usize,
    pub records: u64,
    /// The oldest and the newest LSN of the current timeline.
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
    pub first_time: HistoryTime,
    pub last_time: HistoryTime,
    pub floor: Lsn,
    pub cutoff: Lsn,
    pub views: usize,
    pub timelines: usize,
    /// Hours between the first and the last time.
    pub hours_of_history: u64,
    /// Hours of history that fit at the rate of late; none while too little is known.
    pub hours_left: Option<u64>,
    /// None before the first plan.
    pub retention: Option<RetentionStatus>,
    pub index_behind: bool,
    /// Parts of the index found damaged since the journal was opened; each is set aside and rebuilt.
    pub index_damaged: u32,
    pub failing: BTreeMap<&'static str, String>,
    /// The first damage that a read, a job or a verification met since the journal was opened.
    pub damage: Option<Corruption>,
}

impl JournalStats {
    /// Room on the disk that is taken and holds nothing yet.
    pub fn reserved_bytes(&self) -> ByteLen {
        ByteLen(self.segment_bytes.0.saturating_sub(self.used_bytes.0).saturating_add(self.prepared_bytes.0))
    }
    pub fn pressure(&self) -> Pressure {
        self.retention.as_ref().map_or(Pressure::Ok, |r| r.pressure)
    }
}

pub fn stats(shared: &Shared) -> JournalStats {
    let map = shared.map();
    let numbers = shared.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let summaries: Vec<_> = map.segments().map(|s| s.summary()).collect();
    let sum = |f: fn(&crate::segment::Summary) -> u64| summaries.iter().map(f).sum::<u64>();
    let last_lsn = map.current().written();
    let history = map.history(map.current, last_lsn);
    let Floor { lsn: floor, time: floor_time, .. } = map.floor;
    let first_time = match history.first() {
        Some((s, _)) if floor == Lsn::ZERO => s.summary().first_time,
        _ => floor_time,
    };
    let last_time = history.last().map_or(floor_time, |(s, _)| s.summary().last_time);
    let first_lsn = if floor > Lsn::ZERO { floor } else { Lsn(1).min(last_lsn) };
    JournalStats {
        segment_bytes: ByteLen(sum(|s| s.file_bytes)),
        used_bytes: ByteLen(sum(|s| s.used_bytes)),
        prepared_bytes: numbers.prepared_bytes,
        index_bytes: numbers.index_bytes,
        base_bytes: numbers.base_bytes,
        payload_bytes: ByteLen(sum(|s| s.payload_bytes)),
        segments: summaries.len(),
        unsealed: summaries.iter().filter(|s| !s.sealed).count(),
        records: sum(|s| s.records),
        first_lsn,
        last_lsn,
        first_time,
        last_time,
        floor,
        cutoff: map.cutoff,
        views: shared.leases.lock().unwrap_or_else(PoisonError::into_inner).count(),
        timelines: map.lines.values().filter(|l| l.live).count(),
        hours_of_history: last_time.0.saturating_sub(first_time.0) / 3_600_000_000,
        hours_left: numbers.retention.as_ref().and_then(|r| r.forecast).map(|f| f.hours_left),
        retention: numbers.retention,
        index_behind: numbers.index_behind,
        index_damaged: shared.index().map_or(0, |index| index.damaged()),
        failing: numbers.failing,
        damage: numbers.damage,
    }
}

/// Spreads what the segments' curves say over equal steps of time.
pub fn rate_history(map: &Map, buckets: usize) -> Vec<RateBucket> {
    let history = map.history(map.current, map.current().written());
    // Stretches of the curve: from, to, bytes, records.
    let mut stretches: Vec<(u64, u64, u64, u64)> = Vec::new();
    for (segment, upto) in &history {
        let first = segment.summary().first_time.0;
        let (mut time, mut bytes, mut records) = (first, 0, 0);
        for knot in segment.knots() {
            if segment.first_lsn().0 + u64::from(knot.records) - 1 > upto.0 {
                break;
            }
            let seen = u64::from(knot.records);
            let (more, count) = (knot.bytes.saturating_sub(bytes), seen.saturating_sub(records));
            stretches.push((time, knot.time.0.max(time), more, count));
            (time, bytes, records) = (knot.time.0.max(time), knot.bytes, seen);
        }
    }
    // Times of a whole journal never go back; whatever a trailer says, the arithmetic below must hold.
    let (Some(start), Some(end)) = (stretches.iter().map(|s| s.0).min(), stretches.iter().map(|s| s.1).max()) else {
        return Vec::new();
    };
    let width = (end - start) / buckets as u64 + 1;
    let count = ((end - start) / width + 1) as usize;
    let mut out: Vec<RateBucket> = (0..count as u64)
        .map(|i| RateBucket {
            start: HistoryTime(start.saturating_add(i * width)),
            end: HistoryTime(start.saturating_add((i + 1).saturating_mul(width))),
            bytes: ByteLen(0),
            records: 0,
        })
        .collect();
    for (from, to, bytes, records) in stretches {
        let (first, last) = (((from - start) / width) as usize, ((to - start) / width) as usize);
        // Shares by time; what rounding leaves goes into the last one, so that the sum is exact.
        let (mut bytes_left, mut records_left) = (bytes, records);
        let span = u128::from(to - from).max(1);
        for (i, bucket) in out.iter_mut().enumerate().take(last + 1).skip(first) {
            let upto = to.min(bucket.end.0);
            let inside = u128::from(upto - from.max(bucket.start.0).min(upto));
            let share = |whole: u64| (u128::from(whole) * inside / span) as u64;
            let (b, r) = if i == last { (bytes_left, records_left) } else { (share(bytes), share(records)) };
            bucket.bytes.0 += b;
            bucket.records += r;
            bytes_left -= b;
            records_left -= r;
        }
    }
    out
}
