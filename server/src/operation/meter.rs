//! How fast state moves: the rate over the last few seconds.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back a rate looks.
const WINDOW: Duration = Duration::from_secs(3);
/// No two samples are closer than this, so that there are few.
const SPACING: Duration = Duration::from_millis(100);

/// Measures a rate from totals.
#[derive(Debug, Default)]
pub(super) struct Meter {
    samples: VecDeque<(Duration, u64)>,
}

impl Meter {
    /// Takes in that `bytes` have moved in all by `now`.
    pub(super) fn sample(&mut self, now: Duration, bytes: u64) {
        if self.samples.back().is_some_and(|(at, _)| now.saturating_sub(*at) < SPACING) {
            return;
        }
        self.samples.push_back((now, bytes));
        while self.samples.len() > 2
            && self.samples.front().is_some_and(|(at, _)| now.saturating_sub(*at) > WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// Bytes a second; 0 before there are two samples.
    pub(super) fn rate(&self) -> u64 {
        let (Some((first, before)), Some((last, after))) = (self.samples.front(), self.samples.back()) else {
            return 0;
        };
        per_second(after.saturating_sub(*before), last.saturating_sub(*first))
    }
}

/// Bytes a second; 0 where no time has passed.
pub(super) fn per_second(bytes: u64, over: Duration) -> u64 {
    let nanos = over.as_nanos();
    if nanos == 0 {
        return 0;
    }
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// How long `bytes` take at `rate`. None where nothing moves.
pub(super) fn time_for(bytes: u64, rate: u64) -> Option<Duration> {
    let nanos = u128::from(bytes).checked_mul(1_000_000_000)?.checked_div(u128::from(rate))?;
    Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut meter = Meter::default();
        assert_eq!(meter.rate(), 0);
        for second in 0..10 {
            meter.sample(Duration::from_secs(second), second * 100);
        }
        assert_eq!(meter.rate(), 100);
        for second in 10..20 {
            meter.sample(Duration::from_secs(second), 900);
        }
        assert_eq!(meter.rate(), 0, "nothing moves any more");
    }

    #[test]
    fn samples_are_few() {
        let mut meter = Meter::default();
        for milli in 0..10_000 {
            meter.sample(Duration::from_millis(milli), milli);
        }
        assert!(meter.samples.len() < 40, "{}", meter.samples.len());
    }

    #[test]
    fn times_and_rates_do_not_overflow() {
        assert_eq!(per_second(u64::MAX, Duration::from_nanos(1)), u64::MAX);
        assert_eq!(time_for(u64::MAX, 1), Some(Duration::from_nanos(u64::MAX)));
        assert_eq!(time_for(1, 0), None);
    }
}
