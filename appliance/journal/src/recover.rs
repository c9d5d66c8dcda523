//! The recovery table: what a segment file found at open is worth. Pure; every combination of facts has exactly one answer.
//!
//! ```text
//!     file      header     what is read           durable claims     segment after it     verdict
//!  A  any       foreign    -                      -                  -                    refuse by name
//!  B  sealed    ok         trailer ok             -                  continues | none     keep
//!  C  sealed    ok         trailer ok             -                  hole | overlap       corrupt (missing, overlap)
//!  D  sealed    any        trailer damaged        -                  -                    corrupt (a footer was flushed before the name)
//!  E  any       damaged    -                      -                  -                    corrupt (a header was flushed before the name)
//!  F  open      ok         nothing, no batch      none above         none                 remove: nothing was ever written
//!  G  open      ok         nothing                within segment     any                  corrupt
//!  H  open      ok         up to L                at most L          none                 seal at L (cut a torn tail)
//!  I  open      ok         up to L                above L            -                    corrupt
//!  J  open      ok         up to L                at most L          continues at L+1     seal at L
//!  K  open      ok         up to L                -                  hole after L         corrupt: a segment's name proves what is before it durable
//!  L  open      ok         up to L                -                  begins at or below L corrupt (overlap): the scan stops before it at a batch's end
//! ```
//!
//! "Claims" are all facts that say an LSN of this segment was durable: a batch of the segment, whole or behind the damage; the
//! control record. A *later segment* is the strongest claim of all and has its own column.
//!
//! Case F with a later segment that begins at the same LSN is a segment that was opened and left empty (a change of term, a
//! failed rename): removed as well.

use crate::{Damage, scan::Tail};
use model::Lsn;

/// What a segment's first block, or its trailer's copy of it, says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderFact {
    Good,
    /// Blank or damaged.
    Bad,
    /// Whole, but of another place in the history than the name says.
    Misnamed,
    /// Whole, but of another group.
    Foreign,
}

/// What the name says, and what can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BodyFact {
    /// Sealed by name; the trailer holds and ends at this LSN.
    Trailer { last: Lsn },
    /// Sealed by name; the trailer does not hold.
    NoTrailer,
    /// Open by name; whole batches end at `last` (below the segment's first LSN: none).
    Scanned { last: Lsn, tail: Tail },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    pub header: HeaderFact,
    pub first: Lsn,
    pub body: BodyFact,
    /// The highest LSN that a batch of this segment or the control record says was durable.
    pub claim: Lsn,
    /// Where the next segment of the timeline begins.
    pub next_first: Option<Lsn>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Sealed and whole.
    Keep,
    /// Seal it behind this LSN; `cut` says that something that was never acknowledged is cut off.
    SealAt {
        last: Lsn,
        cut: bool,
    },
    /// Opened and never written to.
    RemoveEmpty,
    /// Of another group: never adopted, never removed.
    Foreign,
    Corrupt(Damage),
}

/// Decides. The letters are those of the module's table.
pub fn decide(facts: &Facts) -> Verdict {
    match (facts.header, facts.body) {
        (HeaderFact::Foreign, _) => Verdict::Foreign,                       // A
        (HeaderFact::Misnamed, _) => Verdict::Corrupt(Damage::SegmentName), // E
        (_, BodyFact::NoTrailer) => Verdict::Corrupt(Damage::Trailer),      // D
        (HeaderFact::Bad, _) => Verdict::Corrupt(Damage::SegmentHeader),    // E
        (HeaderFact::Good, BodyFact::Trailer { last }) => match joint(last, facts.next_first) {
            Joint::Fits => Verdict::Keep,                                                      // B
            Joint::Hole { to } => Verdict::Corrupt(Damage::Missing { from: last.next(), to }), // C
            Joint::Overlap { at } => Verdict::Corrupt(Damage::Overlap { at }),                 // C
        },
        (HeaderFact::Good, BodyFact::Scanned { last, tail }) => {
            let empty = last < facts.first;
            if facts.claim > last && facts.claim >= facts.first {
                // G, I: the batches themselves, or control, prove that more was durable.
                return Verdict::Corrupt(Damage::Batch { durable: facts.claim, readable: last });
            }
            match joint(last, facts.next_first) {
                Joint::Fits if empty => Verdict::RemoveEmpty,                     // F
                Joint::Fits => Verdict::SealAt { last, cut: tail == Tail::Torn }, // H, J
                Joint::Hole { to } => Verdict::Corrupt(Damage::Batch { durable: to, readable: last }), // K, G
                Joint::Overlap { at } => Verdict::Corrupt(Damage::Overlap { at }), // L
            }
        }
    }
}

/// How a segment that ends at `last` meets the next one.
enum Joint {
    Fits,
    Hole { to: Lsn },
    Overlap { at: Lsn },
}

fn joint(last: Lsn, next_first: Option<Lsn>) -> Joint {
    match next_first {
        None => Joint::Fits,
        Some(next) if next == last.next() => Joint::Fits,
        Some(next) if next > last => Joint::Hole { to: next.prev() },
        Some(next) => Joint::Overlap { at: next },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table, said a second time and in other words: what may be cut, kept, removed, refused.
    fn oracle(f: &Facts) -> &'static str {
        if f.header == HeaderFact::Foreign {
            return "foreign";
        }
        if f.header != HeaderFact::Good || f.body == BodyFact::NoTrailer {
            return "corrupt";
        }
        // Everything that is known to have been durable: claims inside the segment, all that is before the next segment.
        let mut durable = 0;
        if f.claim >= f.first {
            durable = f.claim.0;
        }
        if let Some(next) = f.next_first {
            durable = durable.max(next.0 - 1);
        }
        let (last, sealed) = match f.body {
            BodyFact::Trailer { last } => (last.0, true),
            BodyFact::Scanned { last, .. } => (last.0, false),
            BodyFact::NoTrailer => return "corrupt",
        };
        if sealed {
            // A seal was flushed: claims cannot reach past it unless a later segment is gone, which the next one shows.
            return if f.next_first.is_none_or(|n| n.0 == last + 1) { "keep" } else { "corrupt" };
        }
        if durable > last {
            return "corrupt"; // acknowledged and not there
        }
        if f.next_first.is_some_and(|n| n.0 != last + 1) {
            return "corrupt";
        }
        if last < f.first.0 { "remove" } else { "seal" }
    }

    #[test]
    fn every_combination_has_the_answer_of_the_table() {
        let first = Lsn(100);
        let headers = [HeaderFact::Good, HeaderFact::Bad, HeaderFact::Misnamed, HeaderFact::Foreign];
        let mut bodies = vec![BodyFact::NoTrailer];
        for last in [99, 100, 104, 105, 106] {
            bodies.push(BodyFact::Scanned { last: Lsn(last), tail: Tail::Clean });
            bodies.push(BodyFact::Scanned { last: Lsn(last), tail: Tail::Torn });
            if last >= 100 {
                bodies.push(BodyFact::Trailer { last: Lsn(last) });
            }
        }
        let claims = [0, 50, 99, 100, 104, 105, 106, 200];
        let nexts = [None, Some(100), Some(101), Some(105), Some(106), Some(107), Some(200)];
        let mut counts = std::collections::BTreeMap::new();
        for header in headers {
            for body in &bodies {
                for claim in claims {
                    for next in nexts {
                        let facts = Facts { header, first, body: *body, claim: Lsn(claim), next_first: next.map(Lsn) };
                        let got = match decide(&facts) {
                            Verdict::Keep => "keep",
                            Verdict::SealAt { last, cut } => {
                                let BodyFact::Scanned { last: read, tail } = facts.body else {
                                    panic!("{facts:?}: sealed twice")
                                };
                                assert_eq!((last, cut), (read, tail == Tail::Torn), "{facts:?}");
                                "seal"
                            }
                            Verdict::RemoveEmpty => "remove",
                            Verdict::Foreign => "foreign",
                            Verdict::Corrupt(_) => "corrupt",
                        };
                        assert_eq!(got, oracle(&facts), "{facts:?}");
                        *counts.entry(got).or_insert(0u32) += 1;
                    }
                }
            }
        }
        assert_eq!(counts.values().sum::<u32>(), 4 * 15 * 8 * 7);
        assert_eq!(counts.len(), 5, "every verdict occurs: {counts:?}");
    }
}
