//! From chunks to requests.
//!
//! Chunks of requests that run on several CPUs at once lie interleaved in the ring. A request is handed out whole, at the
//! place of its last chunk: the driver got it only after that, so nothing that depends on it can have come before.
//! Completions are matched here too; what does not match is a loss.
//!
//! ```text
//!   FIRST … LAST ──► handed out, in flight ──► COMPLETE (all bytes) ──► Done
//!     │ no LAST                                COMPLETE with an error ─► Lost(WriteError) + Done
//!     └► COMPLETE or FIRST again ─► Lost       COMPLETE of nothing ────► Lost(Unmatched)
//! ```
//!
//! A completion may go unseen (see [`super::bpf`]). The data is there all the same; what is missing is the word that it has reached the disk. It is made up for when the
//! request's memory is used again, and by [`Assembler::settle`] when the disk itself says that nothing is under way. What is then not
//! known is whether the disk failed that write: on a disk that has reported an error, its sectors are read again.
//!
//! Bounds: [`PENDING_BYTES_MAX`] of unfinished requests and [`IN_FLIGHT_MAX`] requests in flight. Past a bound the oldest are given up
//! as lost, never kept silently.

use super::bpf::layout::{
    E_COMPLETE, E_DATA, E_FAULT, E_FIRST, E_FUA, E_LAST, E_MARKED, E_PREFLUSH, Event, OP_DISCARD, OP_FLUSH,
    OP_SECURE_ERASE, OP_WRITE, OP_WRITE_ZEROES,
};
use super::{Captured, LostWhy, Op, Position, Request, RequestId, TargetId};
use model::{Extent, ExtentSet, MonoTime};
use std::collections::{HashMap, HashSet, VecDeque};

/// Requests whose last chunk has not come: a driver takes them one by one per hardware queue, so more than this means that
/// chunks were lost.
pub const PENDING_BYTES_MAX: usize = 32 << 20;
/// Far above what disks of one host hold in their queues.
pub const IN_FLIGHT_MAX: usize = 1 << 17;
/// A request that has not completed for this long is no longer waited for; block drivers time out after 30 s by default.
pub const STALE_MS: u64 = 60_000;
/// A request is copied into the ring within a millisecond. When the ring is empty and its last chunk has not come for this long, it
/// was dropped.
pub const UNFINISHED_MS: u64 = 1_000;
/// A disk that fails writes reports it within as many requests.
pub const UNSEEN_MAX: usize = 1024;

struct Pending {
    request: Request,
    /// Sectors of the whole request, for when it must be given up.
    whole: Extent,
    faults: Vec<Extent>,
    begun: Position,
    lossy: bool,
}

struct InFlight {
    target: TargetId,
    extents: Vec<Extent>,
    bytes_left: u64,
    /// Could not be copied: lost when handed out, and lost again once it has reached the disk.
    faults: Vec<Extent>,
    /// Its completion may be among what was lost: nobody waits for it, and should it come its sectors are read again.
    doubtful: bool,
    since: MonoTime,
    /// Counts requests handed out, so that a reader can ask for those before its own begin.
    number: u64,
}

#[derive(Default)]
pub struct Assembler {
    pending: HashMap<u64, Pending>,
    pending_bytes: usize,
    in_flight: HashMap<u64, InFlight>,
    handed_out: u64,
    /// Requests that are known to be over though no completion of them was seen.
    unseen: u64,
    /// The last ones, for when their disk reports an error.
    unseen_last: VecDeque<(TargetId, Vec<Extent>)>,
    /// Targets whose disk has reported a write error.
    failed: HashSet<TargetId>,
    /// Places of losses that were told ahead of records which lie before them in time; sorted.
    ///
    /// A scan of the marks tells of every loss up to now, while there may still be records of what was issued before some of them. Whoever
    /// copies such a place and then hears of the older write would put its data over what the disk has by now. So it is told as lost once
    /// more, behind that write.
    told: HashMap<TargetId, Vec<Extent>>,
    /// What begins from here on was issued after every loss that was told.
    told_until: Position,
}

impl Assembler {
    pub fn new() -> Self {
        Self::default()
    }

    /// How many requests have been handed out; the argument of [`Assembler::writes_before`].
    pub fn handed_out(&self) -> u64 {
        self.handed_out
    }

    /// Whether a request that was handed out before `number` and touches `extent` has not reached the disk yet.
    pub fn writes_before(&self, number: u64, target: TargetId, extent: &Extent) -> bool {
        self.in_flight.values().any(|f| {
            !f.doubtful
                && f.number < number
                && f.target == target
                && f.extents.iter().any(|e| e.intersect(extent).is_some())
        })
    }

    /// Where the oldest unfinished request begins: nothing from there on may be released.
    pub fn oldest_pending(&self) -> Option<Position> {
        self.pending.values().map(|p| p.begun).min()
    }

    /// Takes one record of the ring that begins at `at`.
    pub fn event(&mut self, event: &Event, data: &[u8], at: Position, out: &mut Vec<Captured>) {
        if event.has(E_COMPLETE) { self.completed(event, out) } else { self.issued(event, data, at, out) }
    }

    fn issued(&mut self, event: &Event, data: &[u8], at: Position, out: &mut Vec<Captured>) {
        let extent = Extent::new(event.sector, u64::from(event.len).div_ceil(512));
        if event.has(E_FIRST) {
            // The address was used before and no completion came: issued again after a requeue (then what is in flight is this
            // very request), or chunks were lost.
            self.give_up(event.rq, LostWhy::Unreadable, out);
            let op = match event.op() {
                OP_WRITE => Op::Write,
                OP_WRITE_ZEROES => Op::Zero,
                OP_DISCARD | OP_SECURE_ERASE => Op::Discard,
                OP_FLUSH => Op::Flush,
                // The kernel half marks all others dirty instead of sending them.
                _ => return,
            };
            let whole = Extent::new(event.sector, u64::from(event.total).div_ceil(512));
            let request = Request {
                target: TargetId(event.target),
                id: RequestId(event.rq),
                op,
                fua: event.has(E_FUA),
                preflush: event.has(E_PREFLUSH),
                mono: MonoTime(event.mono_ns),
                extents: Vec::new(),
                // The length is a hint from outside: bounded by what the kernel half copies at most.
                data: Vec::with_capacity(if op == Op::Write { (event.total as usize).min(2 << 20) } else { 0 }),
            };
            self.pending.insert(event.rq, Pending { request, whole, faults: Vec::new(), begun: at, lossy: false });
        }
        // A chunk whose first was not seen: an agent before us took it and died. Its completion will not match and tells.
        let Some(pending) = self.pending.get_mut(&event.rq) else { return };
        if event.has(E_FAULT) {
            pending.faults.push(extent);
        } else if event.has(E_DATA) {
            let len = data.len().min(event.len as usize);
            let contiguous = pending.request.extents.last().is_some_and(|last| last.end() == extent.start());
            match pending.request.extents.last_mut() {
                Some(last) if contiguous => last.sectors.0 += extent.sectors.0,
                _ => pending.request.extents.push(extent),
            }
            pending.request.data.extend_from_slice(&data[..len]);
            self.pending_bytes += len;
            pending.lossy |= len != event.len as usize || !len.is_multiple_of(512);
        } else if !extent.is_empty() {
            pending.request.extents.push(extent);
        }
        if event.has(E_LAST) {
            self.finish(event.rq, out);
        }
        if self.pending_bytes > PENDING_BYTES_MAX {
            let oldest = self.pending.iter().min_by_key(|(_, p)| p.begun).map(|(rq, _)| *rq);
            if let Some(rq) = oldest {
                self.give_up(rq, LostWhy::Unreadable, out);
            }
        }
    }

    fn finish(&mut self, rq: u64, out: &mut Vec<Captured>) {
        let Some(done) = self.pending.remove(&rq) else { return };
        self.pending_bytes -= done.request.data.len();
        let target = done.request.target;
        if done.lossy {
            out.push(Captured::Lost { target, extents: vec![done.whole], why: LostWhy::Unreadable });
            return;
        }
        if !done.faults.is_empty() {
            out.push(Captured::Lost { target, extents: done.faults.clone(), why: LostWhy::Unreadable });
        }
        if done.request.op != Op::Flush {
            let mut extents = done.request.extents.clone();
            extents.extend(done.faults.iter().copied());
            let bytes_left = extents.iter().map(Extent::bytes).sum();
            let number = self.handed_out;
            let flight = InFlight {
                target,
                extents,
                bytes_left,
                faults: done.faults,
                doubtful: false,
                since: done.request.mono,
                number,
            };
            // Its memory is used again, or the driver gave it back and it is issued once more: either way what was before is over.
            self.over_unseen(rq, out);
            self.in_flight.insert(rq, flight);
            if self.in_flight.len() > IN_FLIGHT_MAX {
                self.forget_oldest(out);
            }
        }
        self.handed_out += 1;
        let again = self.told_already(&done.request, done.begun);
        if done.request.op == Op::Flush || !done.request.extents.is_empty() {
            out.push(Captured::Request(done.request));
        }
        if !again.is_empty() {
            out.push(Captured::Lost { target, extents: again, why: LostWhy::Overflow });
        }
    }

    /// What of a request lies where a loss was told that may be younger than it.
    fn told_already(&mut self, request: &Request, begun: Position) -> Vec<Extent> {
        if begun >= self.told_until {
            if !self.told.is_empty() && self.pending.values().all(|p| p.begun >= self.told_until) {
                self.told.clear();
            }
            return Vec::new();
        }
        let Some(told) = self.told.get(&request.target) else { return Vec::new() };
        request.extents.iter().filter(|e| touches(told, e)).copied().collect()
    }

    /// An unfinished request is dropped; its sectors must be read again.
    fn give_up(&mut self, rq: u64, why: LostWhy, out: &mut Vec<Captured>) {
        if let Some(old) = self.pending.remove(&rq) {
            self.pending_bytes -= old.request.data.len();
            let mut extents = old.request.extents;
            extents.push(old.whole);
            extents.retain(|e| !e.is_empty());
            if !extents.is_empty() {
                out.push(Captured::Lost { target: old.request.target, extents, why });
            }
        }
    }

    fn completed(&mut self, event: &Event, out: &mut Vec<Captured>) {
        let target = TargetId(event.target);
        let extent = Extent::new(event.sector, u64::from(event.len).div_ceil(512));
        if self.pending.contains_key(&event.rq) {
            // Completed, and its last chunk never came: that chunk was lost.
            self.give_up(event.rq, LostWhy::Overflow, out);
            return;
        }
        let Some(flight) = self.in_flight.get_mut(&event.rq) else {
            // Marked: its issue was not recorded because nobody wanted it, and the marks tell of it.
            if !extent.is_empty() && !event.has(E_MARKED) {
                out.push(Captured::Lost { target, extents: vec![extent], why: LostWhy::Unmatched });
            }
            return;
        };
        // One address, two disks: the first one's completion was lost and the memory went to another queue.
        if flight.target != target {
            let lost =
                Captured::Lost { target: flight.target, extents: flight.extents.clone(), why: LostWhy::Overflow };
            self.in_flight.remove(&event.rq);
            out.push(lost);
            out.push(Captured::Lost { target, extents: vec![extent], why: LostWhy::Unmatched });
            return;
        }
        if event.error != 0 {
            let mut extents = flight.extents.clone();
            self.failed.insert(target);
            // Those whose completion was not seen may have failed as well.
            let (same, others) = std::mem::take(&mut self.unseen_last).into_iter().partition(|(t, _)| *t == target);
            self.unseen_last = others;
            let same: VecDeque<(TargetId, Vec<Extent>)> = same;
            extents.extend(same.into_iter().flat_map(|(_, extents)| extents));
            out.push(Captured::Lost { target, extents, why: LostWhy::WriteError });
        }
        flight.bytes_left = flight.bytes_left.saturating_sub(u64::from(event.len));
        if flight.bytes_left == 0 {
            self.done(event.rq, out);
        }
    }

    /// A request is over, and nobody saw how it went.
    fn over_unseen(&mut self, rq: u64, out: &mut Vec<Captured>) {
        let Some(flight) = self.in_flight.get(&rq) else { return };
        let (target, extents) = (flight.target, flight.extents.clone());
        self.unseen += 1;
        self.done(rq, out);
        if self.failed.contains(&target) {
            out.push(Captured::Lost { target, extents, why: LostWhy::WriteError });
            return;
        }
        self.unseen_last.push_back((target, extents));
        if self.unseen_last.len() > UNSEEN_MAX {
            self.unseen_last.pop_front();
        }
    }

    /// A request has reached the disk.
    fn done(&mut self, rq: u64, out: &mut Vec<Captured>) {
        let Some(flight) = self.in_flight.remove(&rq) else { return };
        let target = flight.target;
        if !flight.faults.is_empty() {
            out.push(Captured::Lost { target, extents: flight.faults, why: LostWhy::Unreadable });
        }
        if flight.doubtful {
            out.push(Captured::Lost { target, extents: flight.extents, why: LostWhy::Overflow });
        }
        out.push(Captured::Done { target, id: RequestId(rq) });
    }

    /// Whether anything has been in flight since `before`.
    fn old(flight: &InFlight, before: MonoTime) -> bool {
        flight.since <= before
    }

    /// Targets with requests that were issued before a time and have not completed.
    pub fn waiting_since(&self, before: MonoTime) -> Vec<TargetId> {
        let mut out: Vec<TargetId> =
            self.in_flight.values().filter(|f| Self::old(f, before)).map(|f| f.target).collect();
        out.sort_unstable();
        out.dedup();
        out
    }

    /// The disk of `target` had nothing under way at a moment after `before`, and every record from before that moment has been taken:
    /// what was issued before is over, though its completion was not seen.
    pub fn settle(&mut self, target: TargetId, before: MonoTime, out: &mut Vec<Captured>) {
        let over = |f: &InFlight| f.target == target && Self::old(f, before);
        let rqs: Vec<u64> = self.in_flight.iter().filter(|(_, f)| over(f)).map(|(rq, _)| *rq).collect();
        for rq in rqs {
            self.over_unseen(rq, out);
        }
    }

    /// Requests that were over without a completion being seen.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }

    fn forget_oldest(&mut self, out: &mut Vec<Captured>) {
        let oldest = self.in_flight.iter().min_by_key(|(_, f)| f.number).map(|(rq, _)| *rq);
        if let Some(rq) = oldest {
            self.forget(rq, out);
        }
    }

    fn forget(&mut self, rq: u64, out: &mut Vec<Captured>) {
        if let Some(old) = self.in_flight.remove(&rq) {
            out.push(Captured::Lost { target: old.target, extents: old.extents, why: LostWhy::Stale });
            out.push(Captured::Done { target: old.target, id: RequestId(rq) });
        }
    }

    /// Gives up waiting for what has been in flight for [`STALE_MS`] (its completion record was lost, or the disk hangs).
    pub fn forget_stale(&mut self, now: MonoTime, out: &mut Vec<Captured>) {
        let stale: Vec<u64> =
            self.in_flight.iter().filter(|(_, f)| now.ms_since(f.since) >= STALE_MS).map(|(rq, _)| *rq).collect();
        for rq in stale {
            self.forget(rq, out);
        }
    }

    /// What is in flight or unfinished of a target that is captured no longer.
    pub fn drop_target(&mut self, target: TargetId) {
        self.failed.remove(&target);
        self.told.remove(&target);
        self.unseen_last.retain(|(t, _)| *t != target);
        self.in_flight.retain(|_, f| f.target != target);
        self.pending.retain(|_, p| p.request.target != target);
        self.pending_bytes = self.pending.values().map(|p| p.request.data.len()).sum();
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.values().filter(|f| !f.doubtful).count() + self.pending.len()
    }

    /// These sectors were lost, perhaps because the completion of a request to them was. The loss has them read again; a request that
    /// is still in flight has them read once more when it completes.
    pub fn doubt(&mut self, target: TargetId, lost: &[Extent]) {
        // Sorted by the scan that made them, or few.
        for flight in self.in_flight.values_mut().filter(|f| f.target == target) {
            flight.doubtful |= flight.extents.iter().any(|e| touches(lost, e));
        }
        let told = self.told.entry(target).or_default();
        let mut all = ExtentSet::new();
        told.iter().chain(lost).for_each(|e| all.insert(*e));
        *told = all.iter().collect();
    }

    /// All that was lost before `until`, where records end now, has been told.
    pub fn told_until(&mut self, until: Position) {
        self.told_until = until;
    }

    /// With the ring empty: gives up requests whose last chunk was dropped. Their first chunks would hold the ring for ever.
    pub fn give_up_unfinished(&mut self, now: MonoTime, out: &mut Vec<Captured>) {
        let old: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, p)| now.ms_since(p.request.mono) >= UNFINISHED_MS)
            .map(|(rq, _)| *rq)
            .collect();
        for rq in old {
            self.give_up(rq, LostWhy::Overflow, out);
        }
    }
}

/// Whether an extent touches one of these, which are sorted and apart.
fn touches(sorted: &[Extent], extent: &Extent) -> bool {
    let after = sorted.partition_point(|s| s.end() <= extent.start());
    sorted[after..].first().is_some_and(|s| s.intersect(extent).is_some())
}

#[cfg(test)]
mod tests {
    use super::super::bpf::layout::E_OP_SHIFT;
    use super::*;

    fn chunk(rq: u64, sector: u64, len: u32, total: u32, flags: u32) -> Event {
        Event {
            mono_ns: 7,
            sector,
            rq,
            len,
            total,
            lost: 0,
            target: 1,
            flags: flags | OP_WRITE << E_OP_SHIFT,
            error: 0,
        }
    }

    fn feed(a: &mut Assembler, e: Event, fill: u8) -> Vec<Captured> {
        let mut out = Vec::new();
        let data = if e.has(E_DATA) { vec![fill; e.len as usize] } else { Vec::new() };
        a.event(&e, &data, Position(e.sector), &mut out);
        out
    }

    #[test]
    fn a_write_that_is_older_than_a_loss_told_before_it_has_its_place_lost_once_more() {
        let mut a = Assembler::new();
        let issued = |a: &mut Assembler, rq: u64, sector: u64, at: u64| {
            let mut out = Vec::new();
            let event = chunk(rq, sector, 4096, 4096, E_FIRST | E_LAST | E_DATA);
            a.event(&event, &[1; 4096], Position(at), &mut out);
            out
        };
        // The scan saw a loss at 128..256 that happened anywhere before 100.
        a.doubt(TargetId(1), &[Extent::new(128, 128)]);
        a.told_until(Position(100));
        let lost = |extent| Captured::Lost { target: TargetId(1), extents: vec![extent], why: LostWhy::Overflow };
        let older = issued(&mut a, 1, 136, 50);
        assert!(matches!(&older[..], [Captured::Request(_), l] if *l == lost(Extent::new(136, 8))), "{older:?}");
        let elsewhere = issued(&mut a, 2, 256, 60);
        assert!(matches!(&elsewhere[..], [Captured::Request(_)]), "{elsewhere:?}");
        // Begun before and finished after: still perhaps older.
        let mut out = Vec::new();
        a.event(&chunk(3, 200, 4096, 8192, E_FIRST | E_DATA), &[1; 4096], Position(90), &mut out);
        let younger = issued(&mut a, 4, 136, 110);
        assert!(matches!(&younger[..], [Captured::Request(_)]), "{younger:?}");
        a.event(&chunk(3, 208, 4096, 8192, E_LAST | E_DATA), &[1; 4096], Position(120), &mut out);
        assert!(matches!(&out[..], [Captured::Request(_), l] if *l == lost(Extent::new(200, 16))), "{out:?}");
        // And then all of it is past.
        issued(&mut a, 5, 136, 130);
        assert!(a.told.is_empty());
    }

    #[test]
    fn interleaved_chunks_become_whole_requests_at_their_last_chunk() {
        let mut a = Assembler::new();
        assert!(feed(&mut a, chunk(1, 0, 4096, 8192, E_FIRST | E_DATA), 1).is_empty());
        let b = feed(&mut a, chunk(2, 100, 4096, 4096, E_FIRST | E_LAST | E_DATA), 2);
        assert!(matches!(&b[..], [Captured::Request(r)] if r.id == RequestId(2) && r.data == vec![2; 4096]), "{b:?}");
        assert_eq!(a.oldest_pending(), Some(Position(0)));
        let c = feed(&mut a, chunk(1, 8, 4096, 8192, E_LAST | E_DATA), 3);
        assert!(
            matches!(&c[..], [Captured::Request(r)] if r.extents == [Extent::new(0, 16)] && r.data.len() == 8192 && r.data[8191] == 3),
            "{c:?}"
        );
        assert_eq!(a.oldest_pending(), None);
        assert!(a.writes_before(2, TargetId(1), &Extent::new(15, 1)));
        assert!(!a.writes_before(1, TargetId(1), &Extent::new(15, 1)), "handed out second");
        let d = feed(&mut a, chunk(1, 0, 8192, 0, E_COMPLETE), 0);
        assert_eq!(d, [Captured::Done { target: TargetId(1), id: RequestId(1) }]);
        assert!(!a.writes_before(9, TargetId(1), &Extent::new(15, 1)));
    }

    #[test]
    fn a_request_completes_in_parts() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 4096, E_FIRST | E_LAST | E_DATA), 1);
        assert!(feed(&mut a, chunk(1, 0, 1024, 0, E_COMPLETE), 0).is_empty());
        assert_eq!(feed(&mut a, chunk(1, 2, 3072, 0, E_COMPLETE), 0).len(), 1);
        assert_eq!(a.in_flight(), 0);
    }

    #[test]
    fn what_does_not_match_is_lost() {
        let mut a = Assembler::new();
        let lost = |why| Captured::Lost { target: TargetId(1), extents: vec![Extent::new(8, 8)], why };
        assert_eq!(feed(&mut a, chunk(1, 8, 4096, 0, E_COMPLETE), 0), [lost(LostWhy::Unmatched)]);
        // A chunk whose first was taken by an agent before us: nothing, until its completion.
        assert!(feed(&mut a, chunk(2, 8, 4096, 8192, E_LAST | E_DATA), 0).is_empty());
        assert_eq!(feed(&mut a, chunk(2, 8, 4096, 0, E_COMPLETE), 0), [lost(LostWhy::Unmatched)]);
        // An error of the host's disk.
        feed(&mut a, chunk(3, 8, 4096, 4096, E_FIRST | E_LAST | E_DATA), 0);
        let failed = Event { error: -5, ..chunk(3, 8, 4096, 0, E_COMPLETE) };
        assert_eq!(feed(&mut a, failed, 0)[0], lost(LostWhy::WriteError));
    }

    #[test]
    fn a_request_without_its_end_is_lost_whole() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 12288, E_FIRST | E_DATA), 0);
        let out = feed(&mut a, chunk(1, 0, 12288, 0, E_COMPLETE), 0);
        assert!(
            matches!(&out[..], [Captured::Lost { extents, .. }] if extents.contains(&Extent::new(0, 24))),
            "{out:?}"
        );
        feed(&mut a, chunk(2, 0, 4096, 12288, E_FIRST | E_DATA), 0);
        let out = feed(&mut a, chunk(2, 64, 4096, 4096, E_FIRST | E_LAST | E_DATA), 0);
        assert!(matches!(&out[..], [Captured::Lost { .. }, Captured::Request(_)]), "{out:?}");
    }

    #[test]
    fn a_page_that_could_not_be_read_is_lost_and_the_rest_is_kept() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 12288, E_FIRST | E_DATA), 1);
        feed(&mut a, chunk(1, 8, 4096, 12288, E_FAULT), 0);
        let out = feed(&mut a, chunk(1, 16, 4096, 12288, E_LAST | E_DATA), 2);
        assert!(
            matches!(&out[..], [Captured::Lost { extents, .. }, Captured::Request(r)]
                if extents == &[Extent::new(8, 8)] && r.extents == [Extent::new(0, 8), Extent::new(16, 8)] && r.data.len() == 8192),
            "{out:?}"
        );
        let out = feed(&mut a, chunk(1, 0, 12288, 0, E_COMPLETE), 0);
        assert!(
            matches!(&out[..], [Captured::Lost { extents, .. }, Captured::Done { .. }] if extents == &[Extent::new(8, 8)]),
            "read again once it is on the disk: {out:?}"
        );
    }

    #[test]
    fn a_discard_of_several_ranges_is_one_request() {
        let mut a = Assembler::new();
        let one = |sector, flags| Event { flags: flags | OP_DISCARD << E_OP_SHIFT, ..chunk(1, sector, 4096, 8192, 0) };
        assert!(feed(&mut a, one(0, E_FIRST), 0).is_empty());
        let out = feed(&mut a, one(64, E_LAST), 0);
        assert!(
            matches!(&out[..], [Captured::Request(r)] if r.op == Op::Discard && r.extents == [Extent::new(0, 8), Extent::new(64, 8)]),
            "{out:?}"
        );
        assert_eq!(feed(&mut a, Event { len: 8192, ..one(0, E_COMPLETE) }, 0).len(), 1);
    }

    #[test]
    fn what_never_completes_is_given_up_and_read_again() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 4096, E_FIRST | E_LAST | E_DATA), 1);
        let mut out = Vec::new();
        a.forget_stale(MonoTime(7).plus_ms(STALE_MS - 1), &mut out);
        assert!(out.is_empty());
        a.forget_stale(MonoTime(7).plus_ms(STALE_MS), &mut out);
        assert!(matches!(&out[..], [Captured::Lost { why: LostWhy::Stale, .. }, Captured::Done { .. }]), "{out:?}");
    }

    #[test]
    fn a_completion_that_was_not_seen_is_made_up_for() {
        let mut a = Assembler::new();
        let write = |rq, sector| chunk(rq, sector, 4096, 4096, E_FIRST | E_LAST | E_DATA);
        feed(&mut a, write(1, 8), 1);
        // The same memory again: what it was before is over.
        let out = feed(&mut a, write(1, 64), 2);
        assert!(matches!(&out[..], [Captured::Done { .. }, Captured::Request(_)]), "{out:?}");
        assert_eq!((a.in_flight(), a.unseen()), (1, 1));
        // The disk rests: what was issued before is over, and nothing else.
        feed(&mut a, Event { mono_ns: 900, ..write(2, 128) }, 3);
        assert_eq!(a.waiting_since(MonoTime(7)), [TargetId(1)]);
        let mut out = Vec::new();
        a.settle(TargetId(2), MonoTime(500), &mut out);
        assert!(out.is_empty(), "another disk: {out:?}");
        a.settle(TargetId(1), MonoTime(500), &mut out);
        assert_eq!(out, [Captured::Done { target: TargetId(1), id: RequestId(1) }]);
        assert!(a.writes_before(9, TargetId(1), &Extent::new(128, 8)));
        assert!(!a.writes_before(9, TargetId(1), &Extent::new(64, 8)));
        // A page that could not be read is read again now.
        feed(&mut a, chunk(3, 8, 4096, 8192, E_FIRST | E_DATA), 1);
        feed(&mut a, chunk(3, 16, 4096, 8192, E_FAULT | E_LAST), 0);
        out.clear();
        a.settle(TargetId(1), MonoTime(1000), &mut out);
        assert!(out.iter().any(|e| matches!(e, Captured::Lost { .. })), "{out:?}");
        assert_eq!(a.in_flight(), 0);
    }

    #[test]
    fn on_a_disk_that_failed_a_write_those_unseen_are_read_again() {
        let mut a = Assembler::new();
        let write = |rq, sector| chunk(rq, sector, 4096, 4096, E_FIRST | E_LAST | E_DATA);
        feed(&mut a, write(1, 8), 1);
        feed(&mut a, write(1, 64), 2);
        let failed = Event { error: -5, ..chunk(1, 64, 4096, 0, E_COMPLETE) };
        let out = feed(&mut a, failed, 0);
        let want = vec![Extent::new(64, 8), Extent::new(8, 8)];
        assert_eq!(out[0], Captured::Lost { target: TargetId(1), extents: want, why: LostWhy::WriteError });
        // From now on at once.
        feed(&mut a, write(2, 128), 3);
        let out = feed(&mut a, write(2, 256), 3);
        let lost = Captured::Lost { target: TargetId(1), extents: vec![Extent::new(128, 8)], why: LostWhy::WriteError };
        assert!(out.contains(&lost), "{out:?}");
        // Told once.
        let out = feed(&mut a, Event { sector: 256, ..failed }, 0);
        assert!(out.len() <= 1, "{out:?}");
    }

    #[test]
    fn a_request_whose_end_was_dropped_is_given_up() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 12288, E_FIRST | E_DATA), 0);
        let mut out = Vec::new();
        a.give_up_unfinished(MonoTime(7).plus_ms(UNFINISHED_MS - 1), &mut out);
        assert!(out.is_empty() && a.oldest_pending().is_some());
        a.give_up_unfinished(MonoTime(7).plus_ms(UNFINISHED_MS), &mut out);
        assert!(matches!(&out[..], [Captured::Lost { .. }]), "{out:?}");
        assert_eq!(a.oldest_pending(), None);
        // Its completion, should it come after all, has it read again.
        assert!(matches!(&feed(&mut a, chunk(1, 0, 12288, 0, E_COMPLETE), 0)[..], [Captured::Lost { .. }]));
    }

    #[test]
    fn a_completion_that_may_be_lost_is_not_waited_for() {
        let mut a = Assembler::new();
        feed(&mut a, chunk(1, 0, 4096, 4096, E_FIRST | E_LAST | E_DATA), 1);
        feed(&mut a, chunk(2, 256, 4096, 4096, E_FIRST | E_LAST | E_DATA), 1);
        a.doubt(TargetId(1), &[Extent::new(128, 128), Extent::new(256, 128)]);
        assert!(a.writes_before(9, TargetId(1), &Extent::new(0, 8)));
        assert!(!a.writes_before(9, TargetId(1), &Extent::new(256, 8)));
        assert_eq!(a.in_flight(), 1);
        let out = feed(&mut a, chunk(2, 256, 4096, 0, E_COMPLETE), 0);
        assert!(matches!(&out[..], [Captured::Lost { .. }, Captured::Done { .. }]), "{out:?}");
    }

    #[test]
    fn unfinished_requests_are_bounded() {
        let mut a = Assembler::new();
        let mut lost = 0;
        for rq in 0..20_000u64 {
            lost += feed(&mut a, chunk(rq, rq * 8, 4096, 8192, E_FIRST | E_DATA), 0).len();
        }
        assert!(a.pending_bytes <= PENDING_BYTES_MAX, "{}", a.pending_bytes);
        assert_eq!(lost, 20_000 - PENDING_BYTES_MAX / 4096);
    }

    /// Arbitrary records: never a panic, and the byte count stays right.
    #[test]
    fn hostile_records_do_no_harm() {
        for seed in 1..50u64 {
            let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut draw = |below: u64| {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                s % below
            };
            let mut a = Assembler::new();
            for _ in 0..500 {
                let e = Event {
                    mono_ns: draw(u64::MAX),
                    sector: if draw(9) == 0 { u64::MAX - draw(4) } else { draw(1000) },
                    rq: draw(6),
                    len: draw(9000) as u32,
                    total: if draw(9) == 0 { u32::MAX } else { draw(20_000) as u32 },
                    lost: 0,
                    target: draw(3) as u32,
                    flags: (draw(128) as u32) | (draw(12) as u32) << E_OP_SHIFT,
                    error: draw(2) as i32,
                };
                let data = vec![0; draw(5000) as usize];
                a.event(&e, &data, Position(0), &mut Vec::new());
                let held: usize = a.pending.values().map(|p| p.request.data.len()).sum();
                assert_eq!(held, a.pending_bytes, "seed {seed}");
            }
        }
    }
}
