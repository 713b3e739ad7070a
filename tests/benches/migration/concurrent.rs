//! Many migrations at once through one agent to another.
//!
//! What an agent may need is told by its settings, for a migration, with nothing known of how they fall together:
//! at the source the spool of what is not acknowledged, the window of its stream and two batches of chunks; at the
//! destination the window of its connection and two batches. The state that moves is more than all of that together, so an
//! agent that kept it would be seen.

use std::time::Instant;

use serde_json::json;
use tokio::task::JoinSet;
use vfio_checkpoint_proto::v1::{self, PreCopyMode};
use vfio_checkpoint_server::config::OperationLimits;

use crate::Asked;
use crate::node::{PATIENCE, Pair, request, rounded};
use crate::report::Report;

const MIB: u64 = 1 << 20;
/// Code, runtime, journal, devices, and 64 connections with their TLS.
const BASE_MIB: u64 = 96;
/// A stream's window, a connection's, and two batches of two chunks of 1 MiB.
const STREAM_WINDOW_MIB: u64 = 8;
const CONNECTION_WINDOW_MIB: u64 = 16;
const BATCHES_MIB: u64 = 4;

pub(crate) async fn run(asked: &Asked, report: &mut Report) {
    let count = asked.concurrent;
    let many = count as u64;
    let spool_mib = OperationLimits::default().spool_memory_bytes / MIB;
    let bounds = (
        BASE_MIB + many * (spool_mib + STREAM_WINDOW_MIB + BATCHES_MIB),
        BASE_MIB + many * (CONNECTION_WINDOW_MIB + BATCHES_MIB),
    );
    let bytes = asked.concurrent_mib * MIB;
    let pair = Pair::new(None, count, bytes, bytes / 50).await;
    let (source, destination) = (&pair.source.client, &pair.destination.client);
    let mut requests = Vec::new();
    for index in 0..count {
        requests.push(request(source, destination, pair.to, index, PreCopyMode::Required).await.unwrap());
    }
    let idle = (pair.source.usage(), pair.destination.usage());
    let begun = Instant::now();
    let mut all = JoinSet::new();
    for request in requests {
        let client = source.clone();
        all.spawn(async move {
            let started = client.migrate(request).await.map_err(|error| error.to_string())?;
            let name = started.operation.unwrap_or_default().name;
            let ended = client.wait_operation(&name, PATIENCE).await.map_err(|error| error.to_string())?;
            let ended = ended.operation.unwrap_or_default();
            match ended.result() {
                v1::OperationResult::Succeeded => Ok(()),
                v1::OperationResult::Failed
                | v1::OperationResult::Cancelled
                | v1::OperationResult::Unspecified => Err(format!("{:?}", ended.failure)),
            }
        });
    }
    let ended: Vec<Result<(), String>> = all.join_all().await;
    let seconds = begun.elapsed().as_secs_f64();
    let failed: Vec<&String> = ended.iter().filter_map(|ended| ended.as_ref().err()).collect();
    for why in failed.iter().take(3) {
        eprintln!("concurrent: {why}");
    }
    let peak = (pair.source.usage().rss_peak_mib, pair.destination.usage().rss_peak_mib);
    let within = |peak: f64, bound: u64| peak <= f64::from(u32::try_from(bound).unwrap());
    let ok = failed.is_empty() && within(peak.0, bounds.0) && within(peak.1, bounds.1);
    eprintln!(
        "concurrent: {} of {count} failed, {seconds:.1} s, peak {peak:?} MiB of {bounds:?}",
        failed.len()
    );
    report.put("concurrent_ok", json!(ok));
    report.put("concurrent", json!(count));
    report.put("concurrent_failed", json!(failed.len()));
    report.put("concurrent_device_mib", json!(asked.concurrent_mib));
    report.put("concurrent_s", rounded(seconds));
    report.put("concurrent_idle_rss_mib_source", rounded(idle.0.rss_peak_mib));
    report.put("concurrent_idle_rss_mib_destination", rounded(idle.1.rss_peak_mib));
    report.put("concurrent_rss_peak_mib_source", rounded(peak.0));
    report.put("concurrent_rss_peak_mib_destination", rounded(peak.1));
    report.put("concurrent_rss_bound_mib_source", json!(bounds.0));
    report.put("concurrent_rss_bound_mib_destination", json!(bounds.1));
}
