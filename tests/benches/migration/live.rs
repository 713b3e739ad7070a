//! A busy device over a link of a rate: live, and stopped for all of it. And what a cut of the connection costs.

use vfio_checkpoint_proto::v1::PreCopyMode;

use crate::Asked;
use crate::link::Link;
use crate::node::{Moved, Pair};
use crate::relay::Relay;
use crate::report::Report;
use crate::stop::Stop;

/// What a device changes in a second, in parts of its memory.
const DIRTY_PARTS: u64 = 50;
const MIB: u64 = 1 << 20;

pub(crate) async fn round(asked: &Asked, link: &Link, report: &mut Report) {
    let live = one(asked, link, PreCopyMode::Required, "live", report).await;
    let stop_copy = one(asked, link, PreCopyMode::Never, "stop_copy", report).await;
    report.add("downtime_reduction", 1.0 - live.downtime_ms() / stop_copy.downtime_ms());
    report.add("total_time_ratio", live.seconds / stop_copy.seconds);
    let memory = f64::from(u32::try_from(asked.mib).unwrap()) * 1_048_576.0;
    let moved =
        |moved: &Moved| f64::from(u32::try_from(moved.operation.moved_bytes / 1024).unwrap()) * 1024.0;
    let pre_copy = f64::from(u32::try_from(live.pre_copy_bytes() / 1024).unwrap()) * 1024.0;
    report.add("precopy_bytes_over_size", pre_copy / memory);
    report.add("live_bytes_over_size", moved(&live) / memory);
    report.add("downtime_over_predicted", live.downtime_ms() / live.predicted_ms());
    report.add("live_predicted_downtime_ms", live.predicted_ms());
    report.add("stop_copy_downtime_over_predicted", stop_copy.downtime_ms() / stop_copy.predicted_ms());
}

/// One migration between two new agents.
async fn one(asked: &Asked, link: &Link, pre_copy: PreCopyMode, what: &str, report: &mut Report) -> Moved {
    let bytes = asked.mib * MIB;
    let mut pair = Pair::new(Some(link), 1, bytes, bytes / DIRTY_PARTS).await;
    let before = (pair.source.usage(), pair.destination.usage());
    let moved = pair.migrate(0, pre_copy).await.unwrap().well();
    let after = (pair.source.usage(), pair.destination.usage());
    let stop = Stop::of(&pair.source.spans(), &pair.destination.spans(), moved.downtime_ms());
    let gib = f64::from(u32::try_from(asked.mib).unwrap()) / 1024.0;
    let mut add = |name: &str, value: f64| report.add(&format!("{what}_{name}"), value);
    add("total_s", moved.seconds);
    add("downtime_ms", moved.downtime_ms());
    add("downtime_outside_ms", stop.outside_ms);
    add("cpu_s_per_gib_source", (after.0.cpu_seconds - before.0.cpu_seconds) / gib);
    add("cpu_s_per_gib_destination", (after.1.cpu_seconds - before.1.cpu_seconds) / gib);
    eprintln!(
        "{what}: {:.2} s, downtime {:.1} ms (predicted {:.1}, outside {:.1}), {stop:?}",
        moved.seconds,
        moved.downtime_ms(),
        moved.predicted_ms(),
        stop.outside_ms
    );
    moved
}

/// One migration on loopback at the link's rate whose connection is cut half-way.
pub(crate) async fn cut(asked: &Asked, report: &mut Report) {
    let bytes = (asked.mib / 4).max(8) * MIB;
    let mut pair = Pair::new(None, 1, bytes, bytes / DIRTY_PARTS).await;
    let rate = asked.mbit_s * 1_000_000 / 8;
    pair.to = Relay::start(pair.destination.address, Some(rate), Some(bytes / 2)).await;
    let moved = pair.migrate(0, PreCopyMode::Required).await.unwrap().well();
    let handover = moved.operation.handover.clone().unwrap_or_default();
    assert_eq!(handover.reconnects, 1, "it was cut once: {handover:?}");
    eprintln!("cut: {:.2} s, {} bytes sent again", moved.seconds, handover.resent_bytes);
    report.add("cut_resent_mib", f64::from(u32::try_from(handover.resent_bytes / 1024).unwrap()) / 1024.0);
    report.add("cut_mib", f64::from(u32::try_from(bytes / MIB).unwrap()));
    report.add("cut_total_s", moved.seconds);
    report.add("cut_downtime_ms", moved.downtime_ms());
}
