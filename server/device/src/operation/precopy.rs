//! When pre-copy has done enough: a pure decision.
//!
//! Pre-copy goes on while it makes the stop shorter. It ends when the downtime predicted from what is left, what is under
//! way to whoever takes it, and the measured rates fits the limit, or when its budget of time is spent; then the caller says whether to stop all the
//! same or to give up. No device is stopped while nothing goes over to whoever takes its state; but a caller who says Cutover
//! during pre-copy has the last word, because its workload stands still already. Without pre-copy nothing is done before
//! there is a line, whoever says when.

use std::time::Duration;

use super::Delivery;
use crate::{DataSize, PrecopyInfo};

/// How long to pre-copy, and for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrecopyPolicy {
    /// The device should be stopped no longer than this.
    pub downtime_limit: Duration,
    /// Pre-copy takes at most this long.
    pub time_budget: Duration,
    /// Stop the device when the budget is spent and the predicted downtime does not fit; otherwise give up, with the
    /// device running on.
    pub stop_over_limit: bool,
}

impl Default for PrecopyPolicy {
    /// 300 ms of downtime, as QEMU's default; a minute of pre-copy; then stop all the same.
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            time_budget: Duration::from_mins(1),
            stop_over_limit: true,
        }
    }
}

/// What is known when the decision is made.
#[derive(Debug, Clone, Copy)]
pub struct Left {
    /// What the device says is left to pre-copy, where it says.
    pub precopy: Option<PrecopyInfo>,
    /// What the device says a stop-copy would take from here.
    pub stop_copy: DataSize,
    /// Whether the device had nothing to hand out just now.
    pub nothing_now: bool,
    /// What reading it has shown so far.
    pub pace: Pace,
}

/// What reading a device while it runs has shown. It is read in passes: each ends when there is nothing to hand out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    copied_bytes: u64,
    /// Since the device had nothing last.
    new_bytes: u64,
    /// Of these, what was measured.
    pass: Pass,
    /// The rate is measured on the largest pass: those that bring a few dirty pages take their time for few bytes, which
    /// says nothing about a stop.
    largest: Pass,
    had_nothing: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pass {
    pub(super) bytes: u64,
    pub(super) copying: Duration,
}

impl Pass {
    /// How long so many bytes take, where a rate is known.
    pub(super) fn time_for(&self, bytes: u64) -> Option<Duration> {
        if self.bytes == 0 || self.copying.is_zero() {
            return None;
        }
        let nanos = u128::from(bytes).saturating_mul(self.copying.as_nanos()) / u128::from(self.bytes);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

impl Pace {
    /// Takes in a read of so many bytes. Pauses, and the copying of other devices, are not part of what it took: a stop
    /// has none.
    pub fn read(&mut self, bytes: u64, took: Duration, nothing_now: bool) {
        if bytes > 0 {
            self.pass.bytes = self.pass.bytes.saturating_add(bytes);
            self.pass.copying = self.pass.copying.saturating_add(took);
        }
        if self.pass.bytes >= self.largest.bytes {
            self.largest = self.pass;
        }
        self.count(bytes, nothing_now);
    }

    /// The same for a read that says nothing about a rate: what it brought went nowhere yet.
    pub fn read_ahead(&mut self, bytes: u64, nothing_now: bool) {
        // What was measured of this pass before is not the whole of it any more.
        self.pass = Pass::default();
        self.count(bytes, nothing_now);
    }

    fn count(&mut self, bytes: u64, nothing_now: bool) {
        self.copied_bytes = self.copied_bytes.saturating_add(bytes);
        self.new_bytes = self.new_bytes.saturating_add(bytes);
        if nothing_now {
            self.had_nothing = true;
            self.new_bytes = 0;
            self.pass = Pass::default();
        }
    }

    /// Whether a device of so much state, if it says, has handed out all of it once: it had nothing more, or, where it is
    /// too busy ever to have nothing, it was as much as that.
    fn is_through(&self, size: Option<u64>) -> bool {
        self.had_nothing || size.is_some_and(|size| self.copied_bytes >= size)
    }

    /// Where a device does not say what is dirty, it is what came since it had nothing: the like of it may be dirty
    /// again. All of the first pass is new.
    fn dirty_bytes(&self, size: u64) -> u64 {
        if self.is_through(Some(size)) { self.new_bytes } else { 0 }
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Continue,
    /// Stop the device and copy the rest.
    CutOver,
    /// Give up: the downtime would be over the limit.
    GiveUp,
}

impl PrecopyPolicy {
    /// Decides for a set of devices, `elapsed` after pre-copy began, where what was read has arrived. They are drained one
    /// after another, so what each would take adds up.
    pub fn decide(&self, left: &[Left], elapsed: Duration) -> Decision {
        self.decide_on(left, &Delivery::default(), elapsed)
    }

    /// The same where some of what was read may be under way: a stop takes until that has arrived, too.
    pub fn decide_on(&self, left: &[Left], delivery: &Delivery, elapsed: Duration) -> Decision {
        let initial_done = left.iter().all(|left| match left.precopy {
            Some(info) => info.initial_bytes == 0,
            None => left.pace.is_through(left.stop_copy.bytes()),
        });
        let fits =
            |downtime: Option<Duration>| downtime.is_some_and(|downtime| downtime <= self.downtime_limit);
        let is_all_known = fits(Left::predicted_downtime_of(left, delivery));
        if initial_done && (is_all_known || fits(delivery.time_for(0)) && self.cannot_be_told(left)) {
            Decision::CutOver
        } else if elapsed < self.time_budget {
            Decision::Continue
        } else if self.stop_over_limit {
            Decision::CutOver
        } else {
            Decision::GiveUp
        }
    }

    /// Decides while nothing goes over to whoever takes the state. A device that was stopped now would stand still until
    /// something does again, so none is, however little is left of it and however late it is: the sink fails where it takes
    /// too long.
    pub fn decide_while_down(&self, elapsed: Duration) -> Decision {
        if elapsed < self.time_budget || self.stop_over_limit { Decision::Continue } else { Decision::GiveUp }
    }

    /// No device has more to hand out, and for one of them it cannot be told what a stop takes: it does not say what is
    /// dirty, or how much state it has, or handed out nothing to measure a rate by. Waiting longer brings no better
    /// knowledge. Where the caller insists on the limit, unknown meets no limit.
    fn cannot_be_told(&self, left: &[Left]) -> bool {
        self.stop_over_limit
            && left.iter().all(|left| left.nothing_now)
            && left.iter().any(|left| left.precopy.is_none() || left.predicted_downtime().is_none())
    }
}

impl Left {
    /// How long a stop of a set would take from here, where that can be told of every device: until the last byte is read,
    /// and has arrived behind all that is under way. Both go on at the same time.
    pub fn predicted_downtime_of(set: &[Self], delivery: &Delivery) -> Option<Duration> {
        let bytes = set.iter().try_fold(0, |sum: u64, left| Some(sum.saturating_add(left.left_bytes()?)))?;
        let reading = set.iter().map(Self::predicted_downtime).sum::<Option<Duration>>();
        match delivery.time_for(bytes) {
            // What arrives was read before, so where no rate of reading is known, that of arriving is one for both.
            Some(arriving) => Some(reading.unwrap_or_default().max(arriving)),
            // Nothing has arrived yet that a rate could be measured on.
            None if delivery.under_way_bytes() > 0 => None,
            None => reading,
        }
    }

    /// How long a stop would take from here at the rate measured so far. `None` where the device does not say how
    /// much is left, or no rate is known yet.
    pub fn predicted_downtime(&self) -> Option<Duration> {
        let bytes = self.left_bytes()?;
        if bytes == 0 { Some(Duration::ZERO) } else { self.pace.largest.time_for(bytes) }
    }

    /// How much a stop would have to read, where the device says how much state it has.
    fn left_bytes(&self) -> Option<u64> {
        // The device's data size may be the full size although most of it is copied; what is left to pre-copy says
        // nothing about the part that only a stopped device hands out. Each alone is wrong: the size bounds from
        // above, and what was copied and is not dirty again need not be copied twice.
        let size = self.stop_copy.bytes()?;
        let dirty = match self.precopy {
            Some(info) => info.initial_bytes.saturating_add(info.dirty_bytes),
            None => self.pace.dirty_bytes(size),
        };
        Some(size.saturating_sub(self.pace.copied_bytes).max(dirty).min(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: PrecopyPolicy = PrecopyPolicy {
        downtime_limit: Duration::from_millis(100),
        time_budget: Duration::from_secs(10),
        stop_over_limit: false,
    };

    /// 1000 bytes were copied in a second.
    fn left(initial: u64, dirty: u64) -> Left {
        Left {
            precopy: Some(PrecopyInfo { initial_bytes: initial, dirty_bytes: dirty, reinit: false }),
            stop_copy: DataSize::UpperBound(1000),
            nothing_now: false,
            pace: pace(&[(1000, 1000, false)]),
        }
    }

    /// Bytes, milliseconds, and whether there was nothing more.
    fn pace(reads: &[(u64, u64, bool)]) -> Pace {
        let mut pace = Pace::default();
        for (bytes, millis, nothing_now) in reads {
            pace.read(*bytes, Duration::from_millis(*millis), *nothing_now);
        }
        pace
    }

    /// A device that does not say what is dirty, of at most 1000 bytes.
    fn silent(reads: &[(u64, u64, bool)]) -> Left {
        let nothing_now = reads.last().is_some_and(|read| read.2);
        Left { precopy: None, stop_copy: DataSize::UpperBound(1000), nothing_now, pace: pace(reads) }
    }

    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn cuts_over_when_the_rest_fits_the_limit() {
        // 100 bytes fit into 100 ms and 101 do not.
        assert_eq!(POLICY.decide(&[left(0, 100)], SOON), Decision::CutOver);
        assert_eq!(POLICY.decide(&[left(0, 101)], SOON), Decision::Continue);
        assert_eq!(POLICY.decide(&[left(1, 0)], SOON), Decision::Continue, "initial bytes are left");
    }

    #[test]
    fn what_the_devices_of_a_set_take_adds_up() {
        assert_eq!(POLICY.decide(&[left(0, 50), left(0, 50)], SOON), Decision::CutOver);
        assert_eq!(POLICY.decide(&[left(0, 50), left(0, 51)], SOON), Decision::Continue);
        assert_eq!(POLICY.decide(&[left(0, 0), left(1, 0)], SOON), Decision::Continue);
    }

    #[test]
    fn a_spent_budget_stops_or_gives_up_as_asked() {
        let over = [left(0, 900)];
        assert_eq!(POLICY.decide(&over, Duration::from_millis(9_999)), Decision::Continue);
        assert_eq!(POLICY.decide(&over, Duration::from_secs(10)), Decision::GiveUp);
        let stop = PrecopyPolicy { stop_over_limit: true, ..POLICY };
        assert_eq!(stop.decide(&over, Duration::from_secs(10)), Decision::CutOver);
    }

    #[test]
    fn unknown_meets_no_limit_unless_allowed() {
        let unknown = Left { stop_copy: DataSize::Unknown, ..silent(&[(1000, 1000, true)]) };
        assert_eq!(unknown.predicted_downtime(), None);
        assert_eq!(POLICY.decide(&[unknown], SOON), Decision::Continue);
        let stop = PrecopyPolicy { stop_over_limit: true, ..POLICY };
        assert_eq!(stop.decide(&[unknown], SOON), Decision::CutOver);
    }

    #[test]
    fn a_quiet_device_that_does_not_say_what_is_dirty_is_done_when_it_has_nothing_more() {
        let half = silent(&[(500, 500, false)]);
        assert_eq!(POLICY.decide(&[half], SOON), Decision::Continue);
        assert_eq!(
            half.predicted_downtime(),
            Some(Duration::from_millis(500)),
            "what was copied is not left"
        );
        let all = silent(&[(500, 500, false), (500, 500, true)]);
        assert_eq!(all.predicted_downtime(), Some(Duration::ZERO));
        assert_eq!(POLICY.decide(&[all], SOON), Decision::CutOver);
        // Its peer is not done.
        assert_eq!(POLICY.decide(&[all, left(1, 0)], SOON), Decision::Continue);
    }

    #[test]
    fn of_such_a_device_what_came_since_it_had_nothing_is_dirty() {
        let begins = [(1000, 1000, true), (100, 100, false)];
        assert_eq!(silent(&begins).predicted_downtime(), Some(Duration::from_millis(100)));
        assert_eq!(POLICY.decide(&[silent(&begins)], SOON), Decision::CutOver);
        let goes_on = silent(&[begins[0], begins[1], (1, 1, false)]);
        assert_eq!(POLICY.decide(&[goes_on], SOON), Decision::Continue);
        assert_eq!(POLICY.decide(&[goes_on], POLICY.time_budget), Decision::GiveUp, "the budget ends it");
        let again = silent(&[begins[0], begins[1], (1, 1, true)]);
        assert_eq!(again.predicted_downtime(), Some(Duration::ZERO));
    }

    #[test]
    fn of_one_that_never_has_nothing_all_of_it_is_dirty() {
        let half = silent(&[(999, 999, false)]);
        let patient = PrecopyPolicy { downtime_limit: Duration::from_secs(1), ..POLICY };
        assert_eq!(patient.decide(&[half], SOON), Decision::Continue, "it may have more that never came");
        for all in [silent(&[(1000, 1000, false)]), silent(&[(1000, 1000, false), (4000, 4000, false)])] {
            assert_eq!(all.predicted_downtime(), Some(Duration::from_secs(1)));
            assert_eq!(patient.decide(&[all], SOON), Decision::CutOver);
            assert_eq!(POLICY.decide(&[all], SOON), Decision::Continue);
            assert_eq!(POLICY.decide(&[all], POLICY.time_budget), Decision::GiveUp);
        }
    }

    #[test]
    fn what_only_a_stop_brings_is_waited_for_by_those_who_insist_on_the_limit_alone() {
        let rest = silent(&[(500, 500, true)]);
        assert_eq!(rest.predicted_downtime(), Some(Duration::from_millis(500)));
        assert_eq!(POLICY.decide(&[rest], SOON), Decision::Continue);
        let stop = PrecopyPolicy { stop_over_limit: true, ..POLICY };
        assert_eq!(stop.decide(&[rest], SOON), Decision::CutOver);
    }

    #[test]
    fn small_dirty_reads_do_not_drag_the_rate_down() {
        let mut dirty = left(0, 100);
        dirty.pace = pace(&[(1000, 1000, true), (1, 5000, true), (1, 5000, true)]);
        assert_eq!(dirty.predicted_downtime(), Some(Duration::from_millis(100)));
        // A device that begins with a few bytes is measured by what follows.
        dirty.pace = pace(&[(1, 5000, true), (1000, 1000, false)]);
        assert_eq!(dirty.predicted_downtime(), Some(Duration::from_millis(100)));
    }
}
