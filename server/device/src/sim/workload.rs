//! What keeps a running device busy: writes at a set rate, in a fixed order, caught up with whenever somebody looks.
//!
//! ```text
//!   time since the last look -> Pacer -> so many writes -> Sweep -> which pages
//! ```
//!
//! # Invariants
//! - How often somebody looks changes nothing: fractions of a write are carried over.
//! - Catching up costs at most one visit of each page and one more, however much time has passed.

use std::time::Duration;

use super::generator::mix;

/// Turns time into a number of writes.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    /// What is left over, in byte-nanoseconds per second.
    carry: u128,
}

impl Pacer {
    /// How many writes of `unit_bytes` fell into `elapsed` at this rate.
    pub(super) fn writes(&mut self, elapsed: Duration, bytes_per_second: u64, unit_bytes: u64) -> u64 {
        let unit = 1_000_000_000 * u128::from(unit_bytes.max(1));
        let total = elapsed.as_nanos().saturating_mul(bytes_per_second.into()).saturating_add(self.carry);
        self.carry = total % unit;
        u64::try_from(total / unit).unwrap_or(u64::MAX)
    }
}

/// An order over `len` pages that visits each once before any twice and leaves neighbours far apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sweep {
    len: u64,
    stride: u64,
    start: u64,
}

impl Sweep {
    /// An order over `len` pages, at least one.
    pub(super) fn new(len: u64, seed: u64) -> Self {
        let len = len.max(1);
        // Near the golden section of the length, where steps spread most evenly; the nearest that visits all.
        let golden = u128::from(len) * 0x9E37_79B9_7F4A_7C15 / (1 << 64);
        let mut stride = u64::try_from(golden).unwrap_or(1).max(1);
        while gcd(stride, len) != 1 {
            stride += 1;
        }
        Self { len, stride, start: mix(seed) % len }
    }

    /// Calls `visit(page, times)` for writes `first..first + count`.
    pub(super) fn visit(&self, first: u64, count: u64, mut visit: impl FnMut(u64, u64)) {
        let rounds = count / self.len;
        if rounds > 0 {
            (0..self.len).for_each(|page| visit(page, rounds));
        }
        let mut page = self.at(first);
        for _ in 0..count % self.len {
            visit(page, 1);
            page = self.wrap(u128::from(page) + u128::from(self.stride));
        }
    }

    fn at(&self, write: u64) -> u64 {
        self.wrap(u128::from(write % self.len) * u128::from(self.stride) + u128::from(self.start))
    }

    fn wrap(&self, page: u128) -> u64 {
        u64::try_from(page % u128::from(self.len)).unwrap_or(0)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn looking_often_changes_nothing(steps in prop::collection::vec(0u64..3_000_000_000, 0..20), rate in 0u64..1 << 34) {
            let mut often = Pacer::default();
            let sum: u64 = steps.iter().map(|ns| often.writes(Duration::from_nanos(*ns), rate, 4096)).sum();
            let total = Duration::from_nanos(steps.iter().sum());
            prop_assert_eq!(sum, Pacer::default().writes(total, rate, 4096));
        }

        #[test]
        fn a_round_visits_every_page_once(len in 1u64..500, seed: u64, first in 0u64..1 << 40, rounds in 0u64..4, rest in 0u64..500) {
            let sweep = Sweep::new(len, seed);
            let count = rounds * len + rest % len;
            let mut together = BTreeMap::new();
            sweep.visit(first, count, |page, times| *together.entry(page).or_insert(0) += times);
            prop_assert!(together.iter().all(|(page, times)| *page < len && (*times == rounds || *times == rounds + 1)));
            prop_assert_eq!(together.values().sum::<u64>(), count);
            // One by one it is the same.
            let mut single = BTreeMap::new();
            for write in first..first + count {
                sweep.visit(write, 1, |page, times| *single.entry(page).or_insert(0) += times);
            }
            prop_assert_eq!(single, together);
        }
    }

    #[test]
    fn an_eternity_is_no_work() {
        let mut visits = 0;
        Sweep::new(100, 1).visit(0, u64::MAX, |_, _| visits += 1);
        assert!(visits < 200);
        assert_eq!(Pacer::default().writes(Duration::MAX, u64::MAX, 1), u64::MAX);
    }
}
