//! The second channel: one small datagram that proves that a host's agent lives, without TCP, TLS or the stream's queue between.
//!
//! ```text
//! agent  Beat{number, echo: the newest challenge} ──▶ box
//! agent  ◀── Beat{number: same, echo: a challenge}    box
//! ```
//!
//! # Format
//!
//! 64 bytes, little endian: `"HFB1"`, direction u8, three zero bytes, host [16], number u64, echo u64, mono_ns u64, and the first 16 bytes of
//! BLAKE3 keyed over all before. The key comes over the control connection, which is TLS; it is new with each plan.
//!
//! # What is proved
//!
//! Who does not know the key can make none. Who recorded some can send them again, but not with a challenge that is of today: a box counts a
//! beat only when it echoes one of its last two challenges, and has a higher number than the last. So a dead host cannot be made to look alive
//! for longer than two challenges last. Losing beats is always possible for who owns the network, and makes an alarm, not a takeover.

use model::{HostId, MonoTime};

pub const BEAT_LEN: usize = 64;
const MAGIC: [u8; 4] = *b"HFB1";
const SIGNED: usize = BEAT_LEN - 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BeatFrom {
    Agent,
    Box,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beat {
    pub from: BeatFrom,
    pub host: HostId,
    pub number: u64,
    pub echo: u64,
    /// The sender's clock; for measuring round trips.
    pub mono: MonoTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BeatError {
    #[error("{0} bytes are no beat")]
    Length(usize),
    #[error("does not begin as a beat does")]
    Magic,
    #[error("direction {0} is not known")]
    Direction(u8),
    #[error("reserved bytes are not zero")]
    Reserved,
    #[error("not made with this host's key")]
    Forged,
}

impl Beat {
    pub fn encode(&self, key: &[u8; 32]) -> [u8; BEAT_LEN] {
        let mut bytes = [0; BEAT_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = match self.from {
            BeatFrom::Agent => 1,
            BeatFrom::Box => 2,
        };
        bytes[8..24].copy_from_slice(&self.host.0);
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.echo.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.mono.0.to_le_bytes());
        let mac = blake3::keyed_hash(key, &bytes[..SIGNED]);
        bytes[SIGNED..].copy_from_slice(&mac.as_bytes()[..16]);
        bytes
    }

    /// Whose it says it is, to look up the key; nothing is proved yet.
    pub fn claimed_host(bytes: &[u8]) -> Result<HostId, BeatError> {
        let bytes: &[u8; BEAT_LEN] = bytes.try_into().map_err(|_| BeatError::Length(bytes.len()))?;
        if bytes[..4] != MAGIC {
            return Err(BeatError::Magic);
        }
        let mut host = [0; 16];
        host.copy_from_slice(&bytes[8..24]);
        Ok(HostId(host))
    }

    pub fn decode(bytes: &[u8], key: &[u8; 32]) -> Result<Self, BeatError> {
        let host = Self::claimed_host(bytes)?;
        let mac = blake3::keyed_hash(key, &bytes[..SIGNED]);
        // Every byte is looked at, wherever the first difference is: the time taken tells nothing.
        let differs = mac.as_bytes().iter().zip(&bytes[SIGNED..]).fold(0, |all, (a, b)| all | (a ^ b));
        if differs != 0 {
            return Err(BeatError::Forged);
        }
        let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |n, b| (n << 8) | u64::from(*b));
        let from = match bytes[4] {
            1 => BeatFrom::Agent,
            2 => BeatFrom::Box,
            other => return Err(BeatError::Direction(other)),
        };
        if bytes[5..8] != [0; 3] {
            return Err(BeatError::Reserved);
        }
        Ok(Self { from, host, number: number(24), echo: number(32), mono: MonoTime(number(40)) })
    }
}

/// The box's side of the channel for one host: which beats count, and what to answer. The caller draws the challenges.
#[derive(Clone, Debug, Default)]
pub struct BeatFilter {
    challenge: Option<u64>,
    before: Option<u64>,
    number: u64,
}

impl BeatFilter {
    /// A new challenge, each few seconds; the one before is still good.
    pub fn challenge(&mut self, drawn: u64) {
        self.before = self.challenge.replace(drawn);
    }
    /// Whether a beat that decoded is of now and of the agent. Numbers begin anew with each agent: a lower one counts when its challenge
    /// could not have been known to the last one's recorder, which is to say never; so agents number by their clock.
    pub fn counts(&mut self, beat: &Beat) -> bool {
        let known = [self.challenge, self.before].contains(&Some(beat.echo));
        let fresh = beat.from == BeatFrom::Agent && known && beat.number > self.number;
        if fresh {
            self.number = beat.number;
        }
        fresh
    }
    /// The agent rebooted, so its numbers begin anew; its control connection proved who it is.
    pub fn begin_anew(&mut self) {
        self.number = 0;
    }
    /// Sent for each beat with a good key, whether it counts or not: the first of an agent cannot know the challenge.
    pub fn answer(&self, beat: &Beat, now: MonoTime) -> Option<Beat> {
        let echo = self.challenge?;
        (beat.from == BeatFrom::Agent).then_some(Beat { from: BeatFrom::Box, echo, mono: now, ..*beat })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_rng::Rng;

    const KEY: [u8; 32] = [5; 32];
    fn beat(number: u64, echo: u64) -> Beat {
        Beat { from: BeatFrom::Agent, host: HostId([1; 16]), number, echo, mono: MonoTime(3) }
    }

    #[test]
    fn a_beat_reads_back_and_its_bytes_are_golden() {
        let bytes = beat(0x0102, 0x0304).encode(&KEY);
        assert_eq!(Beat::decode(&bytes, &KEY), Ok(beat(0x0102, 0x0304)));
        let hex: String = bytes[..SIGNED].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "484642310100000001010101010101010101010101010101020100000000000004030000000000000300000000000000"
        );
    }

    #[test]
    fn every_flipped_bit_and_other_key_and_noise_is_refused() {
        let bytes = beat(1, 2).encode(&KEY);
        for bit in 0..BEAT_LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Beat::decode(&bad, &KEY).is_err(), "bit {bit}");
        }
        assert_eq!(Beat::decode(&bytes, &[6; 32]), Err(BeatError::Forged));
        for seed in 1..2000 {
            let mut rng = Rng::new(seed);
            let mut noise = vec![0; rng.below(130) as usize];
            rng.fill(&mut noise);
            if noise.len() >= 4 {
                noise[..4].copy_from_slice(&MAGIC);
            }
            assert!(Beat::decode(&noise, &KEY).is_err(), "seed {seed}");
        }
    }

    #[test]
    fn what_was_recorded_does_not_count_again() {
        let mut filter = BeatFilter::default();
        assert_eq!(filter.answer(&beat(1, 0), MonoTime(9)), None, "nothing to answer before a challenge was drawn");
        filter.challenge(70);
        assert!(!filter.counts(&beat(1, 0)));
        let answer = filter.answer(&beat(1, 0), MonoTime(9)).unwrap();
        assert_eq!((answer.from, answer.number, answer.echo), (BeatFrom::Box, 1, 70));
        assert!(filter.counts(&beat(2, 70)));
        assert!(!filter.counts(&beat(2, 70)), "the same again");
        filter.challenge(71);
        assert!(filter.counts(&beat(3, 70)), "the challenge before is still good");
        filter.challenge(72);
        assert!(!filter.counts(&beat(4, 70)), "and the one before that is not");
        assert!(!filter.counts(&answer), "an answer is no beat");
        filter.begin_anew();
        assert!(filter.counts(&beat(1, 72)));
    }
}
