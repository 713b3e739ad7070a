//! Device state cut into chunks where its content says so, so that bytes put in near the start move few later cuts.
//!
//! The average length grows with the offset, as a fixed part of it: about 512 chunks for each doubling of the state, from
//! 16 KiB up to 256 KiB. So the table stays short, there are few objects, and nobody has to know beforehand how much state
//! there will be. A change in one place costs a small part of the state. Pages that are scattered over all of it cost
//! their chunks: 1% of the pages of 64 MiB is a fifth of its chunks.

use bytes::{Bytes, BytesMut};
use fastcdc::v2020::{Normalization, cut, select_masks};
use vfio_checkpoint_seal::{Seal, SealHasher};

/// The average length of chunks at the start.
const LEAST_AVERAGE_BYTES: usize = 16 << 10;
/// The average length of chunks far into the state.
const MOST_AVERAGE_BYTES: usize = 256 << 10;
/// The offset divided by this is the average length there.
const CHUNKS_BEFORE: u64 = 512;
/// The longest chunk that is believed. None of over 1 MiB is cut, because several are in memory at a time; there were
/// some.
pub(crate) const MOST_CHUNK_BYTES: usize = 4 << 20;
/// A sample of a chunk has to shrink to this many parts of 16, or the chunk is stored plain.
const WORTH_IT_SIXTEENTHS: usize = 14;
/// How much of a chunk is the sample.
const SAMPLE_BYTES: usize = 16 << 10;
/// The level for bulk: decompression is as fast at any.
const LEVEL: i32 = 1;

/// A chunk, ready to be stored.
#[derive(Debug)]
pub(crate) struct Piece {
    /// BLAKE3 of its plain bytes.
    pub blake3: [u8; 32],
    /// How many plain bytes it has.
    pub plain_bytes: u32,
    plain: Bytes,
}

/// How the chunks at some offset are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lengths {
    least: usize,
    average: usize,
    most: usize,
}

impl Lengths {
    fn at(offset: u64) -> Self {
        let wanted = usize::try_from(offset / CHUNKS_BEFORE).unwrap_or(usize::MAX);
        let wanted = wanted.clamp(LEAST_AVERAGE_BYTES, MOST_AVERAGE_BYTES);
        let average = 1 << wanted.ilog2();
        Self { least: average / 4, average, most: average * 4 }
    }

    /// Where the first chunk of `bytes` ends.
    fn cut(self, bytes: &[u8]) -> usize {
        let (short, long) = select_masks(self.average, Normalization::Level1);
        let (_, end) = cut(bytes, self.least, self.average, self.most, short, long, short << 1, long << 1);
        end
    }
}

/// Cuts one device's state.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    held: BytesMut,
    /// Where `held` begins.
    offset: u64,
    seal: SealHasher,
}

impl Cutter {
    /// Takes the next bytes, and gives the chunks that are whole with them.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Piece> {
        self.seal.update(bytes);
        self.held.extend_from_slice(bytes);
        let mut pieces = Vec::new();
        loop {
            let lengths = Lengths::at(self.offset);
            if self.held.len() < lengths.most {
                return pieces;
            }
            pieces.push(self.take(lengths));
        }
    }

    /// Gives the rest, and the seal on all.
    pub(crate) fn finish(mut self) -> (Vec<Piece>, Seal) {
        let mut pieces = Vec::new();
        while !self.held.is_empty() {
            let lengths = Lengths::at(self.offset);
            pieces.push(self.take(lengths));
        }
        (pieces, self.seal.seal())
    }

    fn take(&mut self, lengths: Lengths) -> Piece {
        // At least a byte, whatever the library says, so that this comes to an end.
        let end = lengths.cut(&self.held).clamp(1, self.held.len().min(lengths.most));
        let plain = self.held.split_to(end).freeze();
        self.offset += plain.len() as u64;
        let plain_bytes = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        Piece { blake3: *blake3::hash(&plain).as_bytes(), plain_bytes, plain }
    }
}

impl Piece {
    /// As it is stored: a zstd frame where that is shorter, and plain otherwise.
    pub(crate) fn pack(self) -> Bytes {
        let sample = &self.plain[..self.plain.len().min(SAMPLE_BYTES)];
        let pays = |packed: usize, plain: usize| packed * 16 < plain * WORTH_IT_SIXTEENTHS;
        let sampled = zstd::bulk::compress(sample, LEVEL);
        if !sampled.is_ok_and(|packed| pays(packed.len(), sample.len())) {
            return self.plain;
        }
        match zstd::bulk::compress(&self.plain, LEVEL) {
            Ok(packed) if pays(packed.len(), self.plain.len()) => packed.into(),
            // Out of memory for a context, at worst; it can be stored all the same.
            Ok(_) | Err(_) => self.plain,
        }
    }
}

/// Why a stored chunk is not the one that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotTheChunk {
    #[error("it is no zstd frame of {0} plain bytes")]
    Frame(u32),
    #[error("its plain bytes have another digest")]
    Digest,
}

/// The plain bytes of a stored chunk. No more memory is taken than the table says that there are bytes.
pub(crate) fn unpack(stored: Bytes, plain_bytes: u32, blake3: &[u8; 32]) -> Result<Bytes, NotTheChunk> {
    let plain_len = plain_bytes as usize;
    let plain = if stored.len() == plain_len {
        stored
    } else {
        let plain =
            zstd::bulk::decompress(&stored, plain_len).map_err(|_| NotTheChunk::Frame(plain_bytes))?;
        if plain.len() != plain_len {
            return Err(NotTheChunk::Frame(plain_bytes));
        }
        plain.into()
    };
    if blake3::hash(&plain).as_bytes() == blake3 { Ok(plain) } else { Err(NotTheChunk::Digest) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::noise;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn cut_all(state: &[u8], step: usize) -> (Vec<Piece>, Seal) {
        let mut cutter = Cutter::default();
        let mut pieces: Vec<Piece> = state.chunks(step).flat_map(|part| cutter.push(part)).collect();
        let (rest, seal) = cutter.finish();
        pieces.extend(rest);
        (pieces, seal)
    }

    fn names(pieces: &[Piece]) -> BTreeSet<([u8; 32], u32)> {
        pieces.iter().map(|piece| (piece.blake3, piece.plain_bytes)).collect()
    }

    #[test]
    fn the_pieces_are_the_state_however_it_comes() {
        let state = noise(7, 3 << 20);
        let (pieces, seal) = cut_all(&state, 1 << 20);
        let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece.plain.to_vec()).collect();
        assert!(whole == state);
        assert_eq!(seal.blake3, *blake3::hash(&state).as_bytes());
        assert_eq!(names(&cut_all(&state, 4093).0), names(&pieces));
        assert!(cut_all(&[], 1).0.is_empty());
    }

    #[test]
    fn bytes_put_in_near_the_start_cost_little() {
        for size in [8 << 20, 64 << 20] {
            let state = noise(size as u64, size);
            let (first, _) = cut_all(&state, 1 << 20);
            let mut changed = state.clone();
            changed.splice(1000..1000, *b"some bytes that were not there");
            // One part in a hundred, in the middle.
            let from = size / 2;
            changed[from..from + size / 100].copy_from_slice(&noise(99, size / 100));
            let (second, _) = cut_all(&changed, 1 << 20);
            let new = &names(&second) - &names(&first);
            let added: u64 = new.iter().map(|(_, bytes)| u64::from(*bytes)).sum();
            assert!(added * 20 < size as u64, "{added} of {size} bytes are new");
        }
    }

    #[test]
    fn the_average_grows_with_the_offset_and_no_further() {
        assert_eq!(Lengths::at(0).average, LEAST_AVERAGE_BYTES);
        assert_eq!(Lengths::at(64 << 20).average, 128 << 10);
        assert_eq!(Lengths::at(u64::MAX), Lengths { least: 64 << 10, average: 256 << 10, most: 1 << 20 });
        // 8 GiB of noise would be about so many.
        let mut offset = 0;
        let mut chunks = 0_u64;
        while offset < 8 << 30 {
            offset += Lengths::at(offset).average as u64;
            chunks += 1;
        }
        assert!((30_000..40_000).contains(&chunks), "{chunks}");
    }

    #[test]
    fn packing_is_tried_where_a_sample_says_that_it_pays() {
        let piece = |plain: Vec<u8>| Piece {
            blake3: *blake3::hash(&plain).as_bytes(),
            plain_bytes: u32::try_from(plain.len()).unwrap(),
            plain: plain.into(),
        };
        let random = noise(1, 100_000);
        assert!(piece(random.clone()).pack() == random);
        let zeros = vec![0; 100_000];
        let packed = piece(zeros.clone()).pack();
        assert!(packed.len() < 100, "{}", packed.len());
        assert!(unpack(packed, 100_000, blake3::hash(&zeros).as_bytes()).unwrap() == zeros);
    }

    #[test]
    fn a_bomb_and_a_wrong_chunk_are_refused() {
        let zeros = vec![0; 64 << 20];
        let bomb: Bytes = zstd::bulk::compress(&zeros, 1).unwrap().into();
        assert_eq!(unpack(bomb, 1 << 20, &[0; 32]), Err(NotTheChunk::Frame(1 << 20)));
        let short: Bytes = zstd::bulk::compress(&zeros[..1 << 20], 1).unwrap().into();
        assert_eq!(unpack(short, 2 << 20, &[0; 32]), Err(NotTheChunk::Frame(2 << 20)));
        assert_eq!(unpack(Bytes::from_static(b"abc"), 3, &[0; 32]), Err(NotTheChunk::Digest));
        assert_eq!(unpack(Bytes::from_static(b"abc"), 4, &[0; 32]), Err(NotTheChunk::Frame(4)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_packed_is_unpacked(plain in proptest::collection::vec(0..4_u8, 1..20_000)) {
            let blake3 = *blake3::hash(&plain).as_bytes();
            let plain_bytes = u32::try_from(plain.len()).unwrap();
            let piece = Piece { blake3, plain_bytes, plain: plain.clone().into() };
            prop_assert_eq!(unpack(piece.pack(), plain_bytes, &blake3), Ok(Bytes::from(plain)));
        }
    }
}
