//! A sink behind a line that breaks, slows down, or says late what went over: when a device stops for it, and what is
//! predicted.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, ready};
use vfio_checkpoint_fsm::Cutover;

use super::*;
use crate::executor::{Job, VirtualTime};
use crate::operation::{self, Caller, OperationStep, Progress, SaveTerms};
use crate::sim::SizeReport;
use crate::{Clock, Inline, Lane};

const MS: Duration = Duration::from_millis(1);

/// Takes each chunk in this time, but at once while its line is down, and where it has a rate at which chunks arrive behind
/// it.
struct Line {
    memory: Memory,
    time: Arc<VirtualTime>,
    slot: SimDevice,
    chunk_takes: Duration,
    down: Range<Duration>,
    /// Of a line that says what has arrived.
    bytes_per_ms: Option<u64>,
    /// When all that was given has.
    clear: Duration,
    /// When the first chunk came of a device that stands still.
    stopped: Option<Duration>,
}

impl StateSink for Line {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        if self.slot.state() == State::StopCopy {
            self.stopped.get_or_insert(self.time.now());
        } else {
            assert_eq!(self.slot.state(), State::PreCopy);
        }
        match self.bytes_per_ms {
            Some(rate) => {
                let takes = Duration::from_nanos(bytes.len() as u64 * 1_000_000 / rate);
                self.clear = self.clear.max(self.time.now()) + takes;
            }
            None if !self.is_down() => self.time.advance(self.chunk_takes),
            None => {}
        }
        self.memory.chunk(device, bytes).await
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        self.time.advance(self.clear.saturating_sub(self.time.now()));
        self.memory.seal(config).await
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        self.memory.mark_inconsistent().await
    }

    fn is_down(&self) -> bool {
        self.down.contains(&self.time.now())
    }

    fn under_way(&self) -> Option<u64> {
        let left = self.clear.saturating_sub(self.time.now());
        Some(u64::try_from(left.as_nanos()).unwrap() * self.bytes_per_ms? / 1_000_000)
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.memory.discard().await
    }
}

/// A device, and a sink for it whose line is down for so long.
fn line(change: fn(&mut SimConfig), down: Range<Duration>) -> (Node, Line) {
    line_on(Inline::new(7), |inline| Arc::new(inline), change, down)
}

fn line_on(
    inline: Inline,
    executor: impl FnOnce(Inline) -> Arc<dyn Executor>,
    change: fn(&mut SimConfig),
    down: Range<Duration>,
) -> (Node, Line) {
    let time = inline.time();
    let node = Node::on(executor(inline), Arc::clone(&time), &configs(1, change), &[]);
    let slot = node.slots[0].clone();
    let line = Line {
        memory: Memory::new(1),
        time,
        slot,
        chunk_takes: 10 * MS,
        down,
        bytes_per_ms: None,
        clear: Duration::ZERO,
        stopped: None,
    };
    (node, line)
}

const POLICY: PrecopyPolicy = PrecopyPolicy {
    downtime_limit: Duration::from_millis(300),
    time_budget: Duration::from_secs(1),
    stop_over_limit: true,
};

/// A device is never stopped so that it stands still for an outage: not where nothing of it is left, and not where the time
/// for pre-copy is over.
#[test]
fn no_device_stops_while_the_line_is_down() {
    let busy: fn(&mut SimConfig) = |config| {
        config.workload = Workload { dirty_bytes_per_second: 100_000, working_set_bytes: None };
    };
    for is_busy in [false, true] {
        let end = Duration::from_secs(20);
        let (node, mut sink) = line(if is_busy { busy } else { |_| () }, 15 * MS..end);
        let policy =
            if is_busy { PrecopyPolicy { downtime_limit: Duration::ZERO, ..POLICY } } else { POLICY };
        let report = save(&node.lanes, RESUME, policy, &mut sink).unwrap();
        let stopped = sink.stopped.expect("a stop has a rest");
        assert!((end..end + 200 * MS).contains(&stopped), "{is_busy}: stopped at {stopped:?}");
        assert!(report.downtime < Duration::from_secs(1), "{report:?}");
    }
}

/// Says Cutover from the beginning, and nothing else.
struct Paused;

impl Caller for Paused {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        ready(()).boxed()
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        pending().boxed()
    }

    fn moved(&self, _step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>> {
        ready(Ok(())).boxed()
    }

    fn progress(&self, _progress: &Progress<'_>) {}
}

/// Without pre-copy a device runs on until there is a line, also where its caller has said Cutover.
#[test]
fn a_stop_without_pre_copy_waits_for_the_line() {
    for cutover in [Cutover::Auto, Cutover::Manual] {
        let end = Duration::from_secs(5);
        let (node, mut sink) = line(|_| (), Duration::ZERO..end);
        let mut terms = SaveTerms::automatic(false, AfterSave::Resume, POLICY);
        (terms.request.cutover, terms.cutover_limit) = (cutover, end);
        let saved = pollster::block_on(operation::save(&node.lanes, terms, &Paused, &mut sink));
        let stopped = sink.stopped.expect("a stop has a rest");
        assert!((end..end + 200 * MS).contains(&stopped), "{cutover:?}: stopped at {stopped:?}");
        assert!(saved.unwrap().downtime < Duration::from_secs(1));
    }
}

/// Whoever insists on the limit is not kept waiting for a line on which nothing could fit.
#[test]
fn a_budget_that_is_spent_while_the_line_is_down_ends_it_where_the_limit_is_to_be_kept() {
    let (node, mut sink) = line(|_| (), 15 * MS..Duration::from_secs(20));
    let before = node.digests();
    let insist = PrecopyPolicy { stop_over_limit: false, ..POLICY };
    let (cause, outcome, _) = failed(save(&node.lanes, RESUME, insist, &mut sink).unwrap_err());
    assert!(matches!(cause, Cause::Downtime { .. }), "{cause}");
    assert!(sink.stopped.is_none() && sink.time.now() < Duration::from_secs(2));
    assert_eq!((outcome, node.digests()), (Outcome::Preserved, before));
}

/// What a spool takes while the line is down says nothing of how fast the line is.
#[test]
fn no_rate_is_measured_while_the_line_is_down() {
    let busy: fn(&mut SimConfig) = |config| {
        config.workload = Workload { dirty_bytes_per_second: 1 << 20, working_set_bytes: Some(64 << 10) };
    };
    for down in [Duration::ZERO..Duration::ZERO, 5 * MS..Duration::from_secs(2)] {
        let (node, mut sink) = line(busy, down);
        let policy = PrecopyPolicy { downtime_limit: Duration::from_secs(1), ..POLICY };
        let report = save(&node.lanes, RESUME, policy, &mut sink).unwrap();
        let predicted = report.predicted_downtime.expect("a rate is known");
        assert!(predicted * 2 >= report.downtime, "{predicted:?}, and it took {:?}", report.downtime);
    }
}

/// A device can be read much faster than its state goes over: what was read counts as left until it has arrived, and the
/// rate is that at which it arrives.
#[test]
fn what_is_under_way_is_waited_for_and_is_a_part_of_what_is_predicted() {
    let busy: fn(&mut SimConfig) = |config| {
        config.workload = Workload { dirty_bytes_per_second: 1 << 18, working_set_bytes: None };
    };
    // All of the device takes 300 ms; of the busy one nearly a quarter of what arrives is new again: what is written twice
    // between two reads is read once.
    for (change, fits_at) in [((|_| ()) as fn(&mut SimConfig), 250 * MS), (busy, 330 * MS)] {
        let (node, mut sink) = line(change, Duration::ZERO..Duration::ZERO);
        sink.bytes_per_ms = Some(1000);
        let policy = PrecopyPolicy { downtime_limit: 50 * MS, stop_over_limit: false, ..POLICY };
        let report = save(&node.lanes, RESUME, policy, &mut sink).unwrap();
        let predicted = report.predicted_downtime.expect("a rate is known");
        assert!(predicted <= 50 * MS, "{report:?}");
        assert!(predicted.abs_diff(report.downtime) <= 2 * MS, "{report:?}");
        let stopped = sink.stopped.unwrap();
        assert!((fits_at..fits_at + 15 * MS).contains(&stopped), "no later than it fits: {stopped:?}");
    }
}

/// Where nothing has arrived yet nobody knows how long it takes, and waiting tells.
#[test]
fn nothing_is_predicted_before_something_has_arrived() {
    let (node, mut sink) =
        line(|config| config.data_size = SizeReport::Unknown, Duration::ZERO..Duration::ZERO);
    sink.bytes_per_ms = Some(1000);
    let report = save(&node.lanes, RESUME, POLICY, &mut sink).unwrap();
    // How much only a stop brings cannot be told of such a device, and is not waited for; what is under way is.
    assert_eq!(report.predicted_downtime, None);
    assert!(report.downtime <= POLICY.downtime_limit, "{report:?}");
    assert!(sink.stopped.unwrap() < 10 * MS, "the limit is as long as all of the device takes");
    let (node, mut sink) =
        line(|config| config.data_size = SizeReport::Unknown, Duration::ZERO..Duration::ZERO);
    sink.bytes_per_ms = Some(500);
    let report = save(&node.lanes, RESUME, POLICY, &mut sink).unwrap();
    assert!(report.downtime <= POLICY.downtime_limit, "{report:?}");
    assert!((300 * MS..330 * MS).contains(&sink.stopped.unwrap()), "{:?}", sink.stopped);
}

/// Counts what the lanes of an executor are given to do.
#[derive(Debug)]
struct Counting {
    inline: Inline,
    jobs: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct CountingLane {
    lane: Box<dyn Lane>,
    jobs: Arc<AtomicUsize>,
}

impl Lane for CountingLane {
    fn submit(&self, job: Job) {
        self.jobs.fetch_add(1, Ordering::Relaxed);
        self.lane.submit(job);
    }
}

impl Clock for Counting {
    fn now(&self) -> Duration {
        self.inline.now()
    }
}

impl Executor for Counting {
    fn lane(&self, name: &str) -> std::io::Result<Box<dyn Lane>> {
        Ok(Box::new(CountingLane { lane: self.inline.lane(name)?, jobs: Arc::clone(&self.jobs) }))
    }

    fn pause(&self, duration: Duration) {
        self.inline.pause(duration);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.inline.sleep(duration)
    }

    fn random(&self) -> u64 {
        self.inline.random()
    }
}

/// A device that has nothing is asked again at a growing pause, however long what it had before takes to arrive: whoever takes
/// it must not decide how often it is.
#[test]
fn a_device_with_nothing_is_not_asked_more_often_because_something_is_under_way() {
    let jobs = Arc::new(AtomicUsize::new(0));
    let counting = |inline| -> Arc<dyn Executor> { Arc::new(Counting { inline, jobs: Arc::clone(&jobs) }) };
    let (node, mut sink) = line_on(Inline::new(7), counting, |_| (), Duration::ZERO..Duration::ZERO);
    // All of the device takes half a minute.
    sink.bytes_per_ms = Some(10);
    let policy = PrecopyPolicy { time_budget: Duration::from_secs(10), stop_over_limit: false, ..POLICY };
    let (cause, _, _) = failed(save(&node.lanes, RESUME, policy, &mut sink).unwrap_err());
    assert!(matches!(cause, Cause::Downtime { .. }), "{cause}");
    // Each time it is read, and asked for its size; at 100 ms it is a hundred times.
    let jobs = jobs.load(Ordering::Relaxed);
    assert!((200..300).contains(&jobs), "{jobs}");
}
