//! The seal on a device's state: how long it is and what it hashes to.
//!
//! A flipped byte is accepted by real drivers, and a truncated blob can be; only a length and a digest find them.
//! So the restore path takes only a [`VerifiedChunk`], and RESUMING is left only with a [`VerifiedSeal`]:
//!
//! ```text
//!   bytes -> Verifier::accept -> VerifiedChunk -> RestoreSession::write      each in its place, once
//!            Verifier::finish -> VerifiedSeal  -> RestoreSession::verified   same stream, same length
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Length and BLAKE3 digest of one device's state, over the plain bytes in order, whatever their segmentation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seal {
    /// Number of bytes.
    pub bytes: u64,
    /// BLAKE3 of the bytes.
    pub blake3: [u8; 32],
}

impl Seal {
    /// The digest as 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.blake3).to_hex().to_string()
    }
}

impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, blake3 {}", self.bytes, self.hex())
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seal({self})")
    }
}

/// A seal as text: the digest is hexadecimal in every serialised form.
#[derive(Serialize, Deserialize)]
struct SealText {
    bytes: u64,
    blake3: String,
}

impl Serialize for Seal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SealText { bytes: self.bytes, blake3: self.hex() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Seal {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = SealText::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(&text.blake3).map_err(serde::de::Error::custom)?;
        Ok(Self { bytes: text.bytes, blake3: *hash.as_bytes() })
    }
}

/// Hashes state as it passes by.
#[derive(Debug, Clone, Default)]
pub struct SealHasher {
    hasher: blake3::Hasher,
    bytes: u64,
}

impl SealHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
    }

    /// Bytes seen so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The seal on what was seen.
    pub fn seal(&self) -> Seal {
        Seal { bytes: self.bytes, blake3: *self.hasher.finalize().as_bytes() }
    }
}

/// Which run of a [`Verifier`] something came from, so that chunks of one stream cannot vouch for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct StreamId(u64);

/// Hashes state on its way into a device and hands out the proofs that the restore path asks for.
///
/// It may run on another thread than the device: a [`VerifiedChunk`] knows its place, so a
/// restore session takes each chunk once and in order.
#[derive(Debug)]
pub struct Verifier {
    stream: StreamId,
    hasher: SealHasher,
}

impl Verifier {
    /// A verifier for one stream into one device.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { stream: StreamId(NEXT.fetch_add(1, Ordering::Relaxed)), hasher: SealHasher::new() }
    }

    /// Takes the next bytes of the stream.
    pub fn accept(&mut self, bytes: Bytes) -> VerifiedChunk {
        let offset = self.hasher.bytes();
        self.hasher.update(&bytes);
        VerifiedChunk { stream: self.stream, offset, bytes }
    }

    /// Bytes taken so far.
    pub fn bytes(&self) -> u64 {
        self.hasher.bytes()
    }

    /// Compares what was taken with the seal that came with it.
    pub fn finish(self, expected: &Seal) -> Result<VerifiedSeal, SealMismatch> {
        let found = self.hasher.seal();
        if found == *expected {
            Ok(VerifiedSeal { stream: self.stream, seal: found })
        } else {
            Err(SealMismatch { expected: *expected, found })
        }
    }
}

impl Default for Verifier {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes that a [`Verifier`] has counted into its digest, with their place in the stream.
#[derive(Debug)]
pub struct VerifiedChunk {
    stream: StreamId,
    offset: u64,
    bytes: Bytes,
}

impl VerifiedChunk {
    /// Offset of the first byte in the stream.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether this is the chunk that belongs at `offset` of the stream that `first` came from, or of any stream
    /// where `first` is not set yet.
    pub fn belongs_at(&self, offset: u64, stream: &mut Option<StreamMark>) -> bool {
        self.offset == offset && stream.get_or_insert(StreamMark(self.stream)).0 == self.stream
    }
}

/// The stream that a session has taken its first chunk from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamMark(StreamId);

/// Proof that a whole stream is what its seal says. Made by [`Verifier::finish`], or by
/// [`journaled`](VerifiedSeal::journaled) from the word of an earlier life of the process.
#[derive(Debug, PartialEq, Eq)]
pub struct VerifiedSeal {
    stream: StreamId,
    seal: Seal,
}

impl VerifiedSeal {
    /// A seal that was verified before this process began.
    ///
    /// Only for a seal that an earlier life of the process verified, over what it wrote to the device, and then
    /// journaled durably. It covers no stream that is written now.
    pub fn journaled(seal: Seal) -> Self {
        Self { stream: Verifier::new().stream, seal }
    }

    /// The seal that was verified.
    pub fn seal(&self) -> Seal {
        self.seal
    }

    /// Whether this seals the stream that a session took `written` bytes from.
    pub fn covers(&self, written: u64, stream: Option<StreamMark>) -> bool {
        self.seal.bytes == written && stream.is_none_or(|mark| mark.0 == self.stream)
    }
}

/// The state is not what its seal says: truncated, extended, reordered or damaged on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device state is not what its seal says: sealed were {expected}, there are {found}")]
pub struct SealMismatch {
    /// What the seal says.
    pub expected: Seal,
    /// What was there.
    pub found: Seal,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashed(parts: &[&[u8]]) -> Seal {
        let mut hasher = SealHasher::new();
        for part in parts {
            hasher.update(part);
        }
        hasher.seal()
    }

    fn verify(state: &[u8], seal: &Seal) -> Result<VerifiedSeal, SealMismatch> {
        let mut verifier = Verifier::new();
        let _chunk = verifier.accept(Bytes::copy_from_slice(state));
        verifier.finish(seal)
    }

    #[test]
    fn segmentation_does_not_matter_and_order_does() {
        assert_eq!(hashed(&[b"abc", b"def"]), hashed(&[b"abcdef"]));
        assert_ne!(hashed(&[b"def", b"abc"]), hashed(&[b"abcdef"]));
    }

    #[test]
    fn truncation_extension_and_every_bit_flip_are_found() {
        let state = b"a small device state".to_vec();
        let seal = hashed(&[&state]);
        assert_eq!(verify(&state, &seal).unwrap().seal(), seal);
        for length in 0..state.len() {
            assert!(verify(&state[..length], &seal).is_err(), "truncated to {length}");
        }
        assert!(verify(&[&state[..], b"\0"].concat(), &seal).is_err(), "extended");
        for bit in 0..state.len() * 8 {
            let mut damaged = state.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(&damaged, &seal).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_chunk_belongs_to_one_place_of_one_stream() {
        let (mut one, mut other) = (Verifier::new(), Verifier::new());
        let (first, second) = (one.accept(Bytes::from_static(b"ab")), one.accept(Bytes::from_static(b"c")));
        let foreign = other.accept(Bytes::from_static(b"ab"));
        let mut stream = None;
        assert!(!second.belongs_at(0, &mut stream), "a gap");
        assert!(first.belongs_at(0, &mut stream));
        assert!(!first.belongs_at(2, &mut stream), "a duplicate");
        assert!(!foreign.belongs_at(0, &mut stream), "a replay from another stream");
        assert!(second.belongs_at(2, &mut stream));
        let seal = one.finish(&hashed(&[b"abc"])).unwrap();
        assert!(seal.covers(3, stream));
        assert!(!seal.covers(2, stream), "not all was written");
        let other = other.finish(&hashed(&[b"ab"])).unwrap();
        assert!(!other.covers(2, stream), "the seal of another stream");
    }

    #[test]
    fn text_form_round_trips_and_refuses_a_bad_digest() {
        let seal = hashed(&[b"x"]);
        let text = serde_json::to_string(&seal).unwrap();
        assert_eq!(serde_json::from_str::<Seal>(&text).unwrap(), seal);
        assert!(serde_json::from_str::<Seal>(r#"{"bytes":1,"blake3":"00"}"#).is_err());
    }
}
