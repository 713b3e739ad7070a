//! What a stop was made of: the spans of both agents, laid over the time for which the device stood still.
//!
//! ```text
//!   source        |SET STOP_COPY|read|    |journal|                        |
//!   destination         |write|    |journal|     |journal|SET RUNNING|journal|
//!   stop          [------------------------------------------------------] as the operation says
//!                 device: a call on a device was under way on either side; journal: no such call, and a sync was
//!                 fixed: neither; what is left is the service, its round trips and the wake-ups of its threads
//! ```

use std::time::Duration;

use crate::timed::Span;

/// Where the time of one stop went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stop {
    pub(crate) device_ms: f64,
    pub(crate) journal_ms: f64,
    pub(crate) fixed_ms: f64,
    /// From the call that stopped the device here until the return of the one after which it ran there.
    pub(crate) outside_ms: f64,
    pub(crate) syncs_source: f64,
    pub(crate) syncs_destination: f64,
    /// One of these syncs, on average.
    pub(crate) sync_ms: f64,
}

impl Stop {
    /// Takes apart a stop that lasted `downtime_ms` by the operation's own word.
    pub(crate) fn of(source: &[Span], destination: &[Span], downtime_ms: f64) -> Self {
        let stopping = source.iter().find(|span| !span.journal && span.state == "STOP_COPY");
        let begin = stopping.expect("the source was stopped").begin_us;
        let length = Duration::from_secs_f64(downtime_ms / 1000.0);
        let end = begin + u64::try_from(length.as_micros()).unwrap();
        let loaded = destination.iter().rposition(|span| span.state == "RESUMING").expect("it was loaded");
        let runs = destination[loaded..].iter().find(|span| span.state == "RUNNING");
        let runs = runs.expect("the destination runs").end_us;
        let all = || source.iter().chain(destination);
        let device = covered(all().filter(|span| !span.journal), begin, end);
        let busy = covered(all(), begin, end);
        let syncs = |spans: &[Span]| -> Vec<u64> {
            let on_path = |span: &&Span| span.journal && span.begin_us < end && span.end_us > begin;
            spans.iter().filter(on_path).map(|span| span.end_us - span.begin_us).collect()
        };
        let (here, there) = (syncs(source), syncs(destination));
        let sync_us: u64 = here.iter().chain(&there).sum();
        let count = |syncs: &[u64]| f64::from(u32::try_from(syncs.len()).unwrap());
        Self {
            device_ms: millis(device),
            journal_ms: millis(busy - device),
            fixed_ms: downtime_ms - millis(busy),
            outside_ms: millis(runs.saturating_sub(begin)),
            syncs_source: count(&here),
            syncs_destination: count(&there),
            sync_ms: millis(sync_us) / (count(&here) + count(&there)).max(1.0),
        }
    }
}

/// How much of a time these spans cover, in microseconds.
fn covered<'a>(spans: impl Iterator<Item = &'a Span>, begin: u64, end: u64) -> u64 {
    let mut spans: Vec<(u64, u64)> =
        spans.map(|span| (span.begin_us.max(begin), span.end_us.min(end))).filter(|(a, b)| a < b).collect();
    spans.sort_unstable();
    let mut until = begin;
    spans.into_iter().fold(0, |sum, (from, to)| {
        let more = to.saturating_sub(from.max(until));
        until = until.max(to);
        sum + more
    })
}

fn millis(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * 1000.0
}
