//! What lies in the store: pages of packed pieces, and one record for each finished run.
//!
//! ```text
//! key    00                                            the store's own record: format, whose it is
//!        01 level ordinal(4, BE)                       attempts at writing this run (u32, BE)
//!        02 level ordinal(4, BE)                       the run is done: RunRecord
//!        03 level ordinal(4, BE) volume(4, BE) lba(8, BE)   a page; lba is its first piece's
//! page   crc(4, LE)  postcard(PageHead)  bits
//! bits   for each piece: kind if mixed, gap since the piece before, sectors, ordinal, offset, skip; each field as wide as the
//!        page's largest, less the page's smallest, offsets without the zero bits all of them end in
//! ```
//!
//! The CRC-32 covers whose store it is, the run and the key as well, so that a page cannot pass for another's. Each page has a
//! number and names the next page's key: whoever follows the chain notices a page that was lost or is from an earlier
//! attempt. A page never reaches over two volumes. Limits: [`PAGE_PIECES`] pieces, about 5.5 bytes each for random 4 KiB writes.
//!
//! Hostile bytes end as an error with a reason, never as a panic: widths are checked before they are used.

use super::{Piece, PieceKind, RunId, RunInfo, filter::Filter};
use model::VolumeId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Pieces in a page: a lookup reads and checks about 1.5 KiB for each run it asks.
pub(super) const PAGE_PIECES: usize = 256;

pub(super) const FORMAT: u16 = 1;

pub(super) const STORE_KEY: [u8; 1] = [0];
const ATTEMPT: u8 = 1;
const DONE: u8 = 2;
const PAGE: u8 = 3;

fn run_key(kind: u8, run: RunId) -> [u8; 6] {
    let o = run.ordinal.to_be_bytes();
    [kind, run.level, o[0], o[1], o[2], o[3]]
}

pub(super) fn attempt_key(run: RunId) -> [u8; 6] {
    run_key(ATTEMPT, run)
}
pub(super) fn done_prefix() -> [u8; 1] {
    [DONE]
}
pub(super) fn done_key(run: RunId) -> [u8; 6] {
    run_key(DONE, run)
}
/// Level and ordinal of a key made by [`done_key`].
pub(super) fn parse_done_key(key: &[u8]) -> Option<(u8, u32)> {
    match key {
        [DONE, level, ordinal @ ..] => Some((*level, u32::from_be_bytes(ordinal.try_into().ok()?))),
        _ => None,
    }
}
pub(super) fn page_prefix(run: RunId) -> [u8; 6] {
    run_key(PAGE, run)
}
pub(super) fn page_key(run: RunId, at: Place) -> [u8; 18] {
    let mut key = [0; 18];
    key[..6].copy_from_slice(&run_key(PAGE, run));
    key[6..10].copy_from_slice(&at.0.0.to_be_bytes());
    key[10..].copy_from_slice(&at.1.to_be_bytes());
    key
}
/// The place of a page of `run`; none when the key is something else's.
pub(super) fn parse_page_key(run: RunId, key: &[u8]) -> Option<Place> {
    let rest = key.strip_prefix(&page_prefix(run))?;
    let volume = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?);
    let lba = u64::from_be_bytes(rest.get(4..)?.try_into().ok()?);
    Some((VolumeId(volume), lba))
}

/// A sector of a volume, in the order of keys.
pub(super) type Place = (VolumeId, u64);

/// Whose bytes these are: goes into every checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Owner {
    pub(super) identity: [u8; 16],
    pub(super) run: RunId,
}

impl Owner {
    fn hasher(&self, key: &[u8]) -> crc32fast::Hasher {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.identity);
        hasher.update(&self.run.timeline.0.to_le_bytes());
        hasher.update(&[self.run.level]);
        hasher.update(&self.run.ordinal.to_le_bytes());
        hasher.update(key);
        hasher
    }
    /// `body` with its checksum before it.
    fn seal(&self, key: &[u8], body: &[u8]) -> Vec<u8> {
        let mut hasher = self.hasher(key);
        hasher.update(body);
        let mut out = Vec::with_capacity(4 + body.len());
        out.extend_from_slice(&hasher.finalize().to_le_bytes());
        out.extend_from_slice(body);
        out
    }
    /// The body of what [`Owner::seal`] made; none when it is not that, or another's.
    fn unseal<'a>(&self, key: &[u8], bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (crc, body) = bytes.split_first_chunk::<4>()?;
        let mut hasher = self.hasher(key);
        hasher.update(body);
        (hasher.finalize() == u32::from_le_bytes(*crc)).then_some(body)
    }
    pub(super) fn seal_record<T: Serialize>(&self, key: &[u8], record: &T) -> Vec<u8> {
        let body = postcard::to_allocvec(record).expect("a record of plain numbers can be serialised");
        self.seal(key, &body)
    }
    pub(super) fn unseal_record<T: DeserializeOwned>(&self, key: &[u8], bytes: &[u8]) -> Option<T> {
        postcard::from_bytes(self.unseal(key, bytes)?).ok()
    }
}

/// The store's own record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct StoreRecord {
    pub(super) format: u16,
    pub(super) timeline: u32,
    pub(super) generation: u32,
    /// Segments a generation, which decides what a run is.
    pub(super) segments: u32,
}

/// A finished run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct RunRecord {
    /// The attempt that wrote its pages.
    pub(super) stamp: u32,
    pub(super) pieces: u64,
    pub(super) pages: u32,
    pub(super) bytes: u64,
    pub(super) tag: u64,
    /// First and last page; none when the run is empty.
    pub(super) ends: Option<(Place, Place)>,
    pub(super) filter: Option<Filter>,
}

impl RunRecord {
    pub(super) fn info(&self) -> RunInfo {
        RunInfo { pieces: self.pieces, pages: u64::from(self.pages), bytes: self.bytes, tag: self.tag }
    }
    /// Whether its parts agree with each other.
    pub(super) fn is_sound(&self) -> bool {
        self.ends.is_some() == (self.pages > 0)
            && self.pieces >= u64::from(self.pages)
            && self.ends.is_none_or(|(first, last)| first <= last)
            && self.filter.as_ref().is_none_or(Filter::is_sound)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct PageHead {
    stamp: u32,
    /// The page's number in its run.
    seq: u32,
    /// Where the next page begins; none for the last.
    next: Option<Place>,
    count: u16,
    /// 0: all data, 1: all zeroes, 2: a bit for each piece.
    kinds: u8,
    gap_bits: u8,
    sectors_bits: u8,
    ordinal_bits: u8,
    offset_bits: u8,
    skip_bits: u8,
    offset_shift: u8,
    sectors_min: u32,
    ordinal_min: u32,
    offset_min: u32,
}

/// A page as it is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Page {
    pub(super) stamp: u32,
    pub(super) seq: u32,
    pub(super) next: Option<Place>,
    pub(super) pieces: Vec<Piece>,
}

/// Packs at most `u16::MAX` sorted, disjoint pieces of one volume.
pub(super) fn encode(owner: &Owner, stamp: u32, seq: u32, next: Option<Place>, pieces: &[Piece]) -> Vec<u8> {
    let first = &pieces[0];
    let data = || pieces.iter().filter(|p| p.kind == PieceKind::Data);
    let zeroes = pieces.len() - data().count();
    let min = |values: &mut dyn Iterator<Item = u32>| values.min().unwrap_or(0);
    let sectors_min = min(&mut pieces.iter().map(|p| p.sectors));
    let ordinal_min = min(&mut pieces.iter().map(|p| p.ordinal));
    let offset_shift = data().fold(0, |all, p| all | p.offset).trailing_zeros().min(31);
    let offset_min = min(&mut data().map(|p| p.offset >> offset_shift));
    let gaps = || {
        let ends = std::iter::once(first.lba).chain(pieces.iter().map(Piece::end));
        pieces.iter().zip(ends).map(|(piece, end)| piece.lba - end)
    };
    let head = PageHead {
        stamp,
        seq,
        next,
        count: u16::try_from(pieces.len()).expect("a page has at most PAGE_PIECES pieces"),
        kinds: if zeroes == 0 {
            0
        } else if zeroes == pieces.len() {
            1
        } else {
            2
        },
        gap_bits: width(gaps().max().unwrap_or(0)),
        sectors_bits: width_32(pieces.iter().map(|p| p.sectors - sectors_min)),
        ordinal_bits: width_32(pieces.iter().map(|p| p.ordinal - ordinal_min)),
        offset_bits: width_32(data().map(|p| (p.offset >> offset_shift) - offset_min)),
        skip_bits: width_32(data().map(|p| p.skip)),
        offset_shift: offset_shift as u8,
        sectors_min,
        ordinal_min,
        offset_min,
    };
    let mut body = postcard::to_allocvec(&head).expect("a record of plain numbers can be serialised");
    let mut bits = BitWriter::new(&mut body);
    for (piece, gap) in pieces.iter().zip(gaps()) {
        if head.kinds == 2 {
            bits.put(u64::from(piece.kind == PieceKind::Zero), 1);
        }
        bits.put(gap, head.gap_bits);
        bits.put(u64::from(piece.sectors - sectors_min), head.sectors_bits);
        bits.put(u64::from(piece.ordinal - ordinal_min), head.ordinal_bits);
        if piece.kind == PieceKind::Data {
            bits.put(u64::from((piece.offset >> offset_shift) - offset_min), head.offset_bits);
            bits.put(u64::from(piece.skip), head.skip_bits);
        }
    }
    bits.finish();
    owner.seal(&page_key(owner.run, (first.volume, first.lba)), &body)
}

/// Reads the page that lies at `at`.
pub(super) fn decode(owner: &Owner, at: Place, bytes: &[u8]) -> Result<Page, &'static str> {
    let body = owner.unseal(&page_key(owner.run, at), bytes).ok_or("a page does not match its checksum")?;
    let (head, packed): (PageHead, _) = postcard::take_from_bytes(body).map_err(|_| "a page has no readable head")?;
    let narrow = [head.sectors_bits, head.ordinal_bits, head.offset_bits, head.skip_bits];
    if head.gap_bits > 64
        || narrow.iter().any(|bits| *bits > 32)
        || head.kinds > 2
        || head.offset_shift > 31
        || head.count == 0
    {
        return Err("a page's head is out of range");
    }
    const CUT: &str = "a page is cut short";
    const RANGE: &str = "a page has a piece that is out of range";
    let mut bits = BitReader::new(packed);
    let mut pieces = Vec::with_capacity(usize::from(head.count));
    let mut end = at.1;
    for _ in 0..head.count {
        let zero = match head.kinds {
            0 => false,
            1 => true,
            _ => bits.take(1).ok_or(CUT)? == 1,
        };
        let gap = bits.take(head.gap_bits).ok_or(CUT)?;
        let mut narrow = |bits_wide: u8, least: u32| -> Result<u32, &'static str> {
            let value = bits.take(bits_wide).ok_or(CUT)? + u64::from(least);
            u32::try_from(value).map_err(|_| RANGE)
        };
        let sectors = narrow(head.sectors_bits, head.sectors_min)?;
        let ordinal = narrow(head.ordinal_bits, head.ordinal_min)?;
        let (offset, skip, kind) = if zero {
            (0, 0, PieceKind::Zero)
        } else {
            let units = narrow(head.offset_bits, head.offset_min)?;
            let offset = u32::try_from(u64::from(units) << head.offset_shift).map_err(|_| RANGE)?;
            (offset, narrow(head.skip_bits, 0)?, PieceKind::Data)
        };
        let lba = end.checked_add(gap).ok_or(RANGE)?;
        end = lba.checked_add(u64::from(sectors)).filter(|end| *end > lba).ok_or(RANGE)?;
        pieces.push(Piece { volume: at.0, lba, sectors, ordinal, offset, skip, kind });
    }
    if head.next.is_some_and(|next| next < (at.0, end)) || pieces.first().is_none_or(|p| p.lba != at.1) {
        return Err("a page's pieces do not lie where its key says");
    }
    Ok(Page { stamp: head.stamp, seq: head.seq, next: head.next, pieces })
}

fn width(value: u64) -> u8 {
    (64 - value.leading_zeros()) as u8
}

fn width_32(values: impl Iterator<Item = u32>) -> u8 {
    width(u64::from(values.max().unwrap_or(0)))
}

struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    /// Bits not yet in `out`, lowest first; always fewer than 8 between calls.
    held: u128,
    count: u32,
}

impl<'a> BitWriter<'a> {
    fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }
    fn put(&mut self, value: u64, bits: u8) {
        debug_assert!(width(value) <= bits, "{value} does not fit {bits} bits");
        self.held |= u128::from(value) << self.count;
        self.count += u32::from(bits);
        while self.count >= 8 {
            self.out.push(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }
    fn finish(self) {
        if self.count > 0 {
            self.out.push(self.held as u8);
        }
    }
}

struct BitReader<'a> {
    rest: &'a [u8],
    held: u128,
    count: u32,
}

impl<'a> BitReader<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self { rest, held: 0, count: 0 }
    }
    /// The next `bits` (at most 64); none when there are not so many.
    fn take(&mut self, bits: u8) -> Option<u64> {
        let bits = u32::from(bits);
        while self.count < bits {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            self.held |= u128::from(*byte) << self.count;
            self.count += 8;
        }
        let value = self.held & ((1 << bits) - 1);
        self.held >>= bits;
        self.count -= bits;
        Some(value as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::{below_bits, rng};
    use model::TimelineId;

    fn owner() -> Owner {
        Owner { identity: *b"0123456789abcdef", run: RunId::new(TimelineId(3), 1, 7) }
    }

    fn pieces(draw: &mut impl FnMut(u64) -> u64) -> Vec<Piece> {
        let mut lba = below_bits(draw, 50);
        let (wide, zero_share) = (draw(33), draw(3));
        (0..1 + draw(PAGE_PIECES as u64))
            .map(|_| {
                lba += below_bits(draw, 30);
                let kind = if draw(2) < zero_share { PieceKind::Zero } else { PieceKind::Data };
                let is_data = u32::from(kind == PieceKind::Data);
                let piece = Piece {
                    volume: VolumeId(9),
                    lba,
                    sectors: 1 + below_bits(draw, 32) as u32,
                    ordinal: draw(1 << wide) as u32,
                    offset: (draw(1 << 28) as u32 & !63) * is_data,
                    skip: draw(200) as u32 * is_data,
                    kind,
                };
                lba = piece.end();
                piece
            })
            .collect()
    }

    #[test]
    fn a_page_reads_back_as_it_was_written() {
        for seed in 1..500 {
            let mut draw = rng(seed);
            let list = pieces(&mut draw);
            let at = (VolumeId(9), list[0].lba);
            let next = (draw(2) == 0).then(|| (VolumeId(9 + draw(2) as u32), list[list.len() - 1].end() + draw(5)));
            let bytes = encode(&owner(), 5, 11, next, &list);
            let page = decode(&owner(), at, &bytes).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert_eq!(page, Page { stamp: 5, seq: 11, next, pieces: list }, "seed {seed}");
        }
    }

    #[test]
    fn the_largest_values_pass() {
        let whole = |kind| Piece {
            volume: VolumeId(u32::MAX),
            lba: u64::MAX - u64::from(u32::MAX),
            sectors: u32::MAX,
            ordinal: u32::MAX,
            offset: if kind == PieceKind::Data { u32::MAX } else { 0 },
            skip: if kind == PieceKind::Data { u32::MAX } else { 0 },
            kind,
        };
        for kind in [PieceKind::Data, PieceKind::Zero] {
            let small = Piece { volume: VolumeId(u32::MAX), lba: 0, sectors: 1, ordinal: 0, offset: 0, skip: 0, kind };
            let list = vec![small, whole(kind)];
            let bytes = encode(&owner(), u32::MAX, u32::MAX, None, &list);
            assert_eq!(decode(&owner(), (VolumeId(u32::MAX), 0), &bytes).map(|p| p.pieces), Ok(list));
        }
    }

    #[test]
    fn a_page_of_another_place_run_or_journal_is_refused() {
        let list = pieces(&mut rng(77));
        let at = (VolumeId(9), list[0].lba);
        let bytes = encode(&owner(), 1, 0, None, &list);
        assert!(decode(&owner(), at, &bytes).is_ok());
        assert!(decode(&owner(), (VolumeId(8), at.1), &bytes).is_err());
        assert!(decode(&owner(), (at.0, at.1 + 1), &bytes).is_err());
        assert!(decode(&Owner { run: RunId::new(TimelineId(3), 1, 8), ..owner() }, at, &bytes).is_err());
        assert!(decode(&Owner { run: RunId::new(TimelineId(2), 1, 7), ..owner() }, at, &bytes).is_err());
        assert!(decode(&Owner { identity: [0; 16], ..owner() }, at, &bytes).is_err());
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_noticed() {
        let list = pieces(&mut rng(5));
        let at = (VolumeId(9), list[0].lba);
        let bytes = encode(&owner(), 1, 0, None, &list);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&owner(), at, &bad).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&owner(), at, &bytes[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn hostile_bytes_with_a_right_checksum_do_not_panic() {
        for seed in 1..3000 {
            let mut draw = rng(seed);
            let list = pieces(&mut draw);
            let at = (VolumeId(9), list[0].lba);
            let mut body = encode(&owner(), 1, 0, None, &list)[4..].to_vec();
            for _ in 0..1 + draw(6) {
                let i = draw(body.len().min(40) as u64) as usize;
                body[i] = draw(256) as u8;
            }
            body.truncate(draw(body.len() as u64 + 1) as usize);
            let bytes = owner().seal(&page_key(owner().run, at), &body);
            if let Ok(page) = decode(&owner(), at, &bytes) {
                let sorted = page.pieces.windows(2).all(|w| w[0].end() <= w[1].lba);
                assert!(sorted, "seed {seed}: pieces out of order were believed");
            }
        }
    }

    #[test]
    fn keys_sort_as_places_do_and_read_back() {
        let run = owner().run;
        let places = [(0, 0), (0, 1), (0, 255), (0, 256), (0, u64::MAX), (1, 0), (256, 3), (u32::MAX, u64::MAX)];
        let keys: Vec<[u8; 18]> = places.iter().map(|(v, l)| page_key(run, (VolumeId(*v), *l))).collect();
        assert!(keys.is_sorted());
        for (key, (volume, lba)) in keys.iter().zip(places) {
            assert_eq!(parse_page_key(run, key), Some((VolumeId(volume), lba)));
            assert_eq!(parse_page_key(RunId { ordinal: 8, ..run }, key), None);
        }
        assert_eq!(parse_done_key(&done_key(run)), Some((1, 7)));
        assert_eq!(parse_done_key(&attempt_key(run)), None);
        assert_eq!(parse_done_key(&[2, 1]), None);
    }
}
