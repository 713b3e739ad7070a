//! What each number and each time of the configuration may be: one table, which the documentation of the keys repeats.
//!
//! A time of zero would mean nothing, and one of centuries is a typing mistake.

use std::fmt;
use std::time::Duration;

use vfio_checkpoint_proto::domain::StreamLimits;
use vfio_checkpoint_proto::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};

use super::AgentConfig;

const DAY: Duration = Duration::from_hours(24);
/// The mean one.
const YEAR: Duration = Duration::from_hours(8766);
const HOUR: Duration = Duration::from_hours(1);
/// The least of every time.
const INSTANT: Duration = Duration::from_millis(1);
/// More than any disk, and more than any link: 2^50.
const PIB: u64 = 1 << 50;

/// A number, or a time.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Amount {
    /// Of things, or of bytes.
    Number(u64),
    /// How long.
    Time(Duration),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Time(time) => humantime::format_duration(*time).fmt(f),
        }
    }
}

/// One value, and what it may be.
#[derive(Debug)]
pub(super) struct Bound {
    /// The key, as in the file.
    pub(super) key: String,
    /// What it is. None where it is not set, and need not be.
    pub(super) value: Option<Amount>,
    pub(super) least: Amount,
    pub(super) most: Amount,
    /// The key that says the most.
    most_is: Option<&'static str>,
}

impl Bound {
    fn number<N>(key: &str, value: N, least: u64, most: u64) -> Self
    where
        u64: TryFrom<N>,
    {
        Self::number_if(key, Some(value), least, most)
    }

    fn number_if<N>(key: &str, value: Option<N>, least: u64, most: u64) -> Self
    where
        u64: TryFrom<N>,
    {
        let value = value.map(|value| Amount::Number(u64::try_from(value).unwrap_or(u64::MAX)));
        let (least, most) = (Amount::Number(least), Amount::Number(most));
        Self { key: key.to_owned(), value, least, most, most_is: None }
    }

    fn time(key: &str, value: impl Into<Option<Duration>>, most: Duration) -> Self {
        let (value, most) = (value.into().map(Amount::Time), Amount::Time(most));
        Self { key: key.to_owned(), value, least: Amount::Time(INSTANT), most, most_is: None }
    }

    fn limited_by(mut self, key: &'static str) -> Self {
        self.most_is = Some(key);
        self
    }

    /// What it may be, in words.
    pub(super) fn range(&self) -> String {
        match self.most_is {
            Some(key) => format!("{} to {key}", self.least),
            None => format!("{} to {}", self.least, self.most),
        }
    }

    /// What is wrong with it, if anything is.
    pub(super) fn problem(&self) -> Option<String> {
        let value = self.value.filter(|value| *value < self.least || *value > self.most)?;
        let which = self.most_is.map(|_| format!(", which is {}", self.most)).unwrap_or_default();
        Some(format!("is {value} and must be {}{which}", self.range()))
    }
}

/// Every number and every time.
pub(super) fn bounds(config: &AgentConfig) -> Vec<Bound> {
    let AgentConfig { server, tls, defaults, limits, stores, .. } = config;
    let mut bounds = vec![
        Bound::number("server.max_connections", server.max_connections, 1, 65_536),
        Bound::number("server.max_concurrent_streams", server.max_concurrent_streams, 1, 4096),
        Bound::number("server.max_header_bytes", server.max_header_bytes, 1 << 10, 1 << 20),
        Bound::time("server.handshake_timeout", server.handshake_timeout, Duration::from_mins(5)),
        Bound::time("server.keepalive_interval", server.keepalive_interval, DAY),
        Bound::time("server.keepalive_timeout", server.keepalive_timeout, DAY),
        Bound::time("server.stream_idle_timeout", server.stream_idle_timeout, DAY),
        Bound::time("server.stream_lifetime", server.stream_lifetime, StreamLimits::MAX_LIFETIME),
        Bound::time("server.stream_resume_window", server.stream_resume_window, HOUR),
        Bound::time("server.seal_timeout", server.seal_timeout, DAY),
        Bound::time("server.shutdown_grace", server.shutdown_grace, HOUR),
        Bound::number_if("server.worker_threads", server.worker_threads, 1, 1024),
        Bound::time("tls.reload_interval", tls.reload_interval, DAY),
        Bound::time("limits.max_wait", limits.max_wait, 30 * DAY),
        Bound::time("defaults.downtime_limit", defaults.downtime_limit, DAY),
        Bound::number("defaults.rate_bytes_per_second", defaults.rate_bytes_per_second, 1, PIB),
        Bound::number("limits.max_operations", limits.max_operations, 1, 4096),
        Bound::number("limits.max_device_bytes", limits.max_device_bytes, 1, PIB),
        Bound::number(
            "limits.max_chunk_bytes",
            limits.max_chunk_bytes,
            u64::from(MIN_CHUNK_BYTES),
            u64::from(MAX_CHUNK_BYTES),
        ),
        // As much as a destination of this version may leave without an ack.
        Bound::number("limits.spool_memory_bytes", limits.spool_memory_bytes, 12 << 20, 1 << 30),
        Bound::number("limits.spool_disk_bytes", limits.spool_disk_bytes, 0, PIB),
        Bound::time("limits.device_call_timeout", limits.device_call_timeout, HOUR),
        Bound::time("limits.keep_finished", limits.keep_finished, YEAR),
        Bound::number("limits.keep_finished_count", limits.keep_finished_count, 1, 1_000_000),
    ];
    let waits = [
        ("defaults.pre_copy_budget", defaults.pre_copy_budget),
        ("defaults.cutover_timeout", defaults.cutover_timeout),
        ("defaults.hold_timeout", defaults.hold_timeout),
        ("defaults.stream_open_timeout", defaults.stream_open_timeout),
    ];
    bounds.extend(
        waits.map(|(key, value)| Bound::time(key, value, limits.max_wait).limited_by("limits.max_wait")),
    );
    for (index, store) in stores.iter().enumerate() {
        let key = |field: &str| format!("stores[{index}].{field}");
        bounds.push(Bound::number_if(&key("keep_free_bytes"), store.keep_free_bytes, 0, PIB));
        bounds.push(Bound::time(&key("collect_interval"), store.collect_interval, 7 * DAY));
    }
    bounds
}
