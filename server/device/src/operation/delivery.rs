//! What has become of the state that a sink was given, where the sink says what has arrived.
//!
//! ```text
//!   device --read--> given --queues, spool, network--> arrived
//!                    '------- under way --------'
//! ```
//! What is under way goes over before what is read after a stop, so it is a part of what is left. And reading only shows how
//! fast the queues take in: how fast state goes over is measured on what arrives.
//!
//! A rate is measured in passes, as with [`Pace`](super::Pace): from the first bytes that are given until all has arrived that was
//! given when the devices had nothing more. The largest pass counts. A few dirty bytes take their time, which says nothing
//! about a stop.

use std::time::Duration;

use super::precopy::Pass;

/// What has become of the state that a sink was given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivery {
    /// When it was looked at last; none where nothing is known, or nothing could go over since.
    last: Option<Sample>,
    pass: Pass,
    /// The pass ends once so much has arrived.
    pass_end: Option<u64>,
    largest: Pass,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    at: Duration,
    given_bytes: u64,
    under_way_bytes: u64,
}

impl Sample {
    fn arrived_bytes(&self) -> u64 {
        self.given_bytes.saturating_sub(self.under_way_bytes)
    }
}

impl Delivery {
    /// Takes in that, of all that was given, so much is under way at this time.
    pub fn sample(&mut self, at: Duration, given_bytes: u64, under_way_bytes: u64) {
        let now = Sample { at, given_bytes, under_way_bytes };
        if let Some(before) = self.last.replace(now) {
            let arrived = now.arrived_bytes().saturating_sub(before.arrived_bytes());
            // Otherwise there was nothing that could arrive.
            if before.under_way_bytes > 0 || arrived > 0 {
                self.pass.bytes = self.pass.bytes.saturating_add(arrived);
                self.pass.copying = self.pass.copying.saturating_add(at.saturating_sub(before.at));
            }
        }
        if self.pass.bytes >= self.largest.bytes {
            self.largest = self.pass;
        }
        if self.pass_end.is_some_and(|end| now.arrived_bytes() >= end) {
            self.pass = Pass::default();
            self.pass_end = None;
        }
    }

    /// The devices have nothing more for now: with what was given so far the pass is whole.
    pub fn nothing_more(&mut self) {
        self.pass_end = self.pass_end.or(self.last.map(|last| last.given_bytes));
    }

    /// Nothing goes over for now: this time, and what is caught up after it, are no measure.
    pub fn stand_still(&mut self) {
        *self = Self { largest: self.largest, ..Self::default() };
    }

    /// How much is under way.
    pub fn under_way_bytes(&self) -> u64 {
        self.last.map_or(0, |last| last.under_way_bytes)
    }

    /// How long it takes until so many bytes more have arrived, after what is under way. None where no rate is known.
    pub fn time_for(&self, more_bytes: u64) -> Option<Duration> {
        match self.under_way_bytes().saturating_add(more_bytes) {
            0 => Some(Duration::ZERO),
            bytes => self.largest.time_for(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At these milliseconds, so much was given and so much was under way.
    fn delivery(samples: &[(u64, u64, u64)]) -> Delivery {
        let mut delivery = Delivery::default();
        for (at, given, under_way) in samples {
            delivery.sample(Duration::from_millis(*at), *given, *under_way);
        }
        delivery
    }

    const SECOND: Option<Duration> = Some(Duration::from_secs(1));

    #[test]
    fn the_rate_is_that_of_what_arrives_and_not_of_what_is_given() {
        // 1000 bytes are given at once, and 400 of them arrive in 400 ms.
        let busy = delivery(&[(0, 0, 0), (0, 1000, 1000), (400, 1000, 600)]);
        assert_eq!(busy.under_way_bytes(), 600);
        assert_eq!((busy.time_for(0), busy.time_for(400)), (Some(Duration::from_millis(600)), SECOND));
        let nothing = delivery(&[(0, 0, 0), (0, 1000, 1000)]);
        assert_eq!(nothing.time_for(0), None, "nothing has arrived, so nobody knows");
        assert_eq!(Delivery::default().time_for(0), Some(Duration::ZERO));
        assert_eq!(Delivery::default().time_for(1), None);
    }

    #[test]
    fn what_trickles_after_the_bulk_does_not_drag_the_rate_down() {
        let mut delivery = delivery(&[(0, 0, 0), (0, 1000, 1000), (500, 1000, 500)]);
        delivery.nothing_more();
        // All of the bulk has arrived, while a few more bytes were given, which take for ever.
        for step in 1..100 {
            delivery.sample(Duration::from_millis(500 + 500 * step), 1000 + step, 1);
            delivery.nothing_more();
        }
        assert_eq!(delivery.time_for(999), SECOND);
        // With nothing under way time passes for nothing.
        delivery.sample(Duration::from_mins(10), 1099, 0);
        delivery.sample(Duration::from_mins(20), 1099, 0);
        assert_eq!(delivery.time_for(1000), SECOND);
    }

    #[test]
    fn the_time_of_an_outage_is_no_measure() {
        let mut delivery = delivery(&[(0, 0, 0), (0, 1000, 1000), (500, 1000, 500)]);
        delivery.stand_still();
        assert_eq!(delivery.under_way_bytes(), 0, "it is not known");
        delivery.sample(Duration::from_secs(20), 1500, 1000);
        assert_eq!(delivery.time_for(0), SECOND);
    }
}
