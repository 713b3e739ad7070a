//! Randomness from a seed: the same draws in the same order for the same seed, and streams of draws that do not disturb each
//! other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A stream of draws.
#[derive(Debug)]
pub(crate) struct Dice(AtomicU64);

impl Dice {
    /// The stream called `name` of a seed.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, so that streams of one seed have nothing in common.
        let named = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64 ^ seed.rotate_left(32), |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(AtomicU64::new(named ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    pub(crate) fn draw(&self) -> u64 {
        // SplitMix64: a counter and a finaliser.
        const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
        let counter = self.0.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        let mixed = (counter ^ (counter >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Less than `bound`.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }

    /// Once in so many times.
    pub(crate) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// At least `least` and less than `most`, in whole milliseconds.
    pub(crate) fn between(&self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below(most.saturating_sub(least)))
    }

    pub(crate) fn one_of<T: Copy>(&self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }
}
