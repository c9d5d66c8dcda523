//! Compression of payloads where it pays.
//!
//! One payload, one zstd frame. A payload is tried on its first 4 KiB at zstd level −5 first: encrypted or already compressed
//! data is given up after a few microseconds. The rest goes at level −1 and stays raw when less than 5 % would be saved: unpacking
//! costs the reader of a view every time, so a small saving does not pay.

use crate::format::MAX_RECORD_BYTES;
use model::Codec;
use std::io;

const LEVEL: i32 = -1;
const PROBE_LEVEL: i32 = -5;
const PROBE_BYTES: usize = 4096;
/// Kept only when the result is at most this many hundredths of the original.
const KEEP_PERCENT: usize = 95;

/// Compresses payloads; holds its working memory so that the hot path does not allocate.
pub struct Packer {
    compressor: zstd::bulk::Compressor<'static>,
    probe: zstd::bulk::Compressor<'static>,
    /// Always of full length: growing it would zero it each time.
    out: Box<[u8]>,
}

impl Packer {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            compressor: zstd::bulk::Compressor::new(LEVEL)?,
            probe: zstd::bulk::Compressor::new(PROBE_LEVEL)?,
            out: vec![0; MAX_RECORD_BYTES].into_boxed_slice(),
        })
    }

    /// The payload as it should be stored and sent: packed when that saves at least 5 %, else as it is. Longer than
    /// [`MAX_RECORD_BYTES`] is never packed (and refused as a frame later).
    pub fn pack<'a>(&'a mut self, payload: &'a [u8]) -> (Codec, &'a [u8]) {
        match self.try_pack(payload) {
            Some(len) => (Codec::Zstd, &self.out[..len]),
            None => (Codec::Raw, payload),
        }
    }

    fn try_pack(&mut self, payload: &[u8]) -> Option<usize> {
        // The buffers are smaller than what goes in: running out of room is the quick way to say "does not pay".
        let keep = |len: usize| len * KEEP_PERCENT / 100;
        if payload.len() > MAX_RECORD_BYTES {
            return None;
        }
        if payload.len() > PROBE_BYTES {
            let mut small = [0u8; PROBE_BYTES * KEEP_PERCENT / 100];
            self.probe.compress_to_buffer(&payload[..PROBE_BYTES], &mut small[..]).ok()?;
        }
        let room = &mut self.out[..keep(payload.len())];
        self.compressor.compress_to_buffer(payload, room).ok().filter(|len| *len > 0)
    }
}

/// A payload that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("payload has {had} bytes, {expected} are expected")]
    Length { expected: usize, had: usize },
    #[error("payload would unpack to more than {max} bytes")]
    TooLong { max: usize },
    #[error("payload is not a zstd frame")]
    Damaged(#[source] io::Error),
}

/// Unpacks payloads; holds its working memory.
pub struct Unpacker {
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Unpacker {
    pub fn new() -> io::Result<Self> {
        Ok(Self { decompressor: zstd::bulk::Decompressor::new()? })
    }

    /// Fills `out` exactly; its length says what the record covers. Never writes past it, whatever the payload claims.
    pub fn unpack(&mut self, codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<(), UnpackError> {
        match codec {
            Codec::Raw => {
                if stored.len() != out.len() {
                    return Err(UnpackError::Length { expected: out.len(), had: stored.len() });
                }
                out.copy_from_slice(stored);
                Ok(())
            }
            Codec::Zstd => {
                if out.len() > MAX_RECORD_BYTES {
                    return Err(UnpackError::TooLong { max: MAX_RECORD_BYTES });
                }
                let had = self.decompressor.decompress_to_buffer(stored, out).map_err(UnpackError::Damaged)?;
                if had != out.len() {
                    return Err(UnpackError::Length { expected: out.len(), had });
                }
                Ok(())
            }
        }
    }
}

/// How long a zstd payload says it is when unpacked: a cheap check before it is stored. None when it does not say so, which
/// no payload made by [`Packer`] omits.
pub fn claimed_len(stored: &[u8]) -> Option<u64> {
    zstd::zstd_safe::get_frame_content_size(stored).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_rng::Rng;

    #[test]
    fn what_is_packed_unpacks_bit_for_bit() {
        let mut packer = Packer::new().unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        let (mut packed, mut raw) = (0, 0);
        for seed in 1..300 {
            let mut rng = Rng::new(seed);
            let len = 512 * (1 + rng.below(256) as usize);
            let mut data = vec![0u8; len];
            let noise = rng.below(len as u64 + 1) as usize;
            rng.fill(&mut data[..noise]);
            let (codec, stored) = packer.pack(&data);
            match codec {
                Codec::Zstd => {
                    packed += 1;
                    assert!(stored.len() * 100 <= len * KEEP_PERCENT, "seed {seed}: kept {} of {len}", stored.len());
                    assert_eq!(claimed_len(stored), Some(len as u64), "seed {seed}");
                }
                Codec::Raw => raw += 1,
            }
            let mut back = vec![1u8; len];
            unpacker.unpack(codec, stored, &mut back).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(back == data, "seed {seed}");
        }
        assert!(packed > 20 && raw > 20, "both ways are taken: {packed} packed, {raw} raw");
    }

    #[test]
    fn unpacking_is_bounded_and_hostile_bytes_are_refused() {
        let mut packer = Packer::new().unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        let (codec, stored) = packer.pack(&[0; MAX_RECORD_BYTES]);
        assert_eq!(codec, Codec::Zstd);
        let stored = stored.to_vec();
        assert!(stored.len() < 200);
        assert!(matches!(unpacker.unpack(Codec::Zstd, &stored, &mut [0; 4096]), Err(UnpackError::Damaged(_))));
        let mut large = vec![0; MAX_RECORD_BYTES + 1];
        assert!(matches!(unpacker.unpack(Codec::Zstd, &stored, &mut large), Err(UnpackError::TooLong { .. })));
        assert!(matches!(unpacker.unpack(Codec::Zstd, &stored, &mut large[..MAX_RECORD_BYTES]), Ok(())));
        assert!(matches!(unpacker.unpack(Codec::Raw, &[1; 3], &mut [0; 4]), Err(UnpackError::Length { .. })));
        for seed in 1..2000 {
            let mut rng = Rng::new(seed);
            let mut bytes = stored.clone();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << rng.below(8);
            }
            // Any answer but a panic or a wrong length is right here: the record's checksum says whether it is damaged.
            let mut out = vec![0; 8192];
            if unpacker.unpack(Codec::Zstd, &bytes, &mut out).is_ok() {
                assert!(claimed_len(&bytes).is_none_or(|len| len <= 8192), "seed {seed}");
            }
        }
    }
}
