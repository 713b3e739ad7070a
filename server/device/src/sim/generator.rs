//! Content of memory without memory: what a page holds follows from a seed, its number and its version.
//!
//! ```text
//!   page p, version v:   pattern(seed)[p * page_bytes mod 256 KiB ..]  XOR  key(seed, p, v), repeated
//!                        256 KiB of noise, fits a core's cache           64 bits
//! ```
//!
//! One load, one XOR and one store a word: a page is made, or compared, as fast as memory can be copied.
//!
//! # Invariants
//! - For one seed and page, `version -> key` is a bijection on 64 bits. So whoever sees a page's bytes can tell
//!   whether *any* version of it has them, and which one: [`Generator::key_of`], [`Generator::version_of`]. No
//!   stream has to say which version a page is.
//! - Two pages that share their part of the pattern have different keys, so there is nothing for a compressor or a
//!   deduplicating store to find.

use std::sync::Arc;

/// Words of noise a seed is expanded to: 256 KiB.
const PATTERN_WORDS: usize = 1 << 15;
/// Largest page: the pattern must hold several of them, or a page would repeat itself.
pub(super) const MAX_PAGE_BYTES: u32 = 64 << 10;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// `SplitMix64`'s finaliser, a bijection.
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The inverse of [`mix`].
fn unmix(x: u64) -> u64 {
    let x = (x ^ (x >> 31) ^ (x >> 62)).wrapping_mul(0x3196_42B2_D24D_8EC3);
    let x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(0x96DE_1B17_3F11_9089);
    x ^ (x >> 30) ^ (x >> 60)
}

/// Makes and recognises the content of pages.
#[derive(Debug, Clone)]
pub(super) struct Generator {
    seed: u64,
    pattern: Arc<[u64]>,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Self {
        let mut counter = mix(seed ^ 0x7061_7474_6572_6E00);
        let pattern = (0..PATTERN_WORDS)
            .map(|_| {
                counter = counter.wrapping_add(GOLDEN);
                mix(counter)
            })
            .collect();
        Self { seed, pattern }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// The key of a version of a page.
    pub(super) fn key(&self, page: u64, version: u64) -> u64 {
        mix(version.wrapping_add(self.page_salt(page)))
    }

    /// The version that has this key. Every key belongs to exactly one.
    pub(super) fn version_of(&self, page: u64, key: u64) -> u64 {
        unmix(key).wrapping_sub(self.page_salt(page))
    }

    fn page_salt(&self, page: u64) -> u64 {
        mix(self.seed ^ page.wrapping_mul(GOLDEN))
    }

    /// Makes the bytes that lie at `at` in memory. They must lie in one page, the one the key is of.
    pub(super) fn fill(&self, at: u64, key: u64, out: &mut [u8]) {
        let (word, skip) = Self::place(at);
        let head = if skip == 0 { 0 } else { (8 - skip).min(out.len()) };
        let (first, rest) = out.split_at_mut(head);
        first.copy_from_slice(&self.word(word, key)[skip..skip + head]);
        let word = word + usize::from(head > 0);
        let (whole, tail) = rest.as_chunks_mut::<8>();
        for (out, noise) in whole.iter_mut().zip(&self.pattern[word..]) {
            *out = (noise ^ key).to_le_bytes();
        }
        if !tail.is_empty() {
            tail.copy_from_slice(&self.word(word + whole.len(), key)[..tail.len()]);
        }
    }

    /// The one key with which memory from `at` on, the start of a page, would hold these bytes. At least 8 bytes,
    /// or there would be several.
    pub(super) fn key_of(&self, at: u64, bytes: &[u8]) -> Option<u64> {
        let (word, _) = Self::place(at);
        let (whole, tail) = bytes.as_chunks::<8>();
        let key = u64::from_le_bytes(*whole.first()?) ^ self.pattern[word];
        let differing = whole
            .iter()
            .zip(&self.pattern[word..])
            .fold(0, |differing, (bytes, noise)| differing | (u64::from_le_bytes(*bytes) ^ noise ^ key));
        let tail_fits = tail.is_empty() || tail == &self.word(word + whole.len(), key)[..tail.len()];
        (differing == 0 && tail_fits).then_some(key)
    }

    /// Which word of the pattern lies at `at`, and how far into it.
    fn place(at: u64) -> (usize, usize) {
        // Both fit: the first is below PATTERN_WORDS, the second below 8.
        let within = |value: u64| usize::try_from(value).unwrap_or(0);
        (within((at / 8) % PATTERN_WORDS as u64), within(at % 8))
    }

    fn word(&self, word: usize, key: u64) -> [u8; 8] {
        // A page of odd length may end on the pattern's last word; nothing lies behind it but the start.
        (self.pattern[word % PATTERN_WORDS] ^ key).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mix_is_undone(x: u64) {
            prop_assert_eq!(unmix(mix(x)), x);
            prop_assert_eq!(mix(unmix(x)), x);
        }

        #[test]
        fn a_page_tells_its_version(seed: u64, page in 0u64..1 << 40, version: u64, length in 8usize..200) {
            let generator = Generator::new(seed);
            let at = page * 4096;
            let mut bytes = vec![0; length];
            generator.fill(at, generator.key(page, version), &mut bytes);
            let key = generator.key_of(at, &bytes);
            prop_assert_eq!(key.map(|key| generator.version_of(page, key)), Some(version));
        }

        #[test]
        fn any_cut_of_a_page_is_the_same(start in 0usize..4096, length in 0usize..4096, page in 0u64..1 << 20) {
            let generator = Generator::new(7);
            let mut whole = vec![0; 4096];
            generator.fill(page * 4096, 99, &mut whole);
            let end = (start + length).min(4096);
            let mut part = vec![0; end - start];
            generator.fill(page * 4096 + start as u64, 99, &mut part);
            prop_assert_eq!(&part[..], &whole[start..end]);
        }

        #[test]
        fn a_flipped_bit_is_no_version(bit in 0usize..4096 * 8) {
            let generator = Generator::new(7);
            let mut bytes = vec![0; 4096];
            generator.fill(0, 99, &mut bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(generator.key_of(0, &bytes), None);
        }
    }
}
