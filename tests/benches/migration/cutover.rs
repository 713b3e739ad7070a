//! What a cutover costs where there is nearly nothing left to move, on loopback.

use vfio_checkpoint_proto::v1::PreCopyMode;

use crate::node::Pair;
use crate::report::Report;
use crate::stop::Stop;

/// A device of 64 MiB, of which 16 pages change in a second.
const MEMORY_BYTES: u64 = 64 << 20;
const DIRTY_BYTES_S: u64 = 64 << 10;

pub(crate) async fn round(report: &mut Report) {
    let mut pair = Pair::new(None, 1, MEMORY_BYTES, DIRTY_BYTES_S).await;
    let moved = pair.migrate(0, PreCopyMode::Required).await.unwrap().well();
    let stop = Stop::of(&pair.source.spans(), &pair.destination.spans(), moved.downtime_ms());
    let left = moved.operation.moved_bytes - moved.pre_copy_bytes();
    eprintln!("cutover: downtime {:.2} ms, {left} bytes, {stop:?}", moved.downtime_ms());
    report.add("cutover_fixed_ms", stop.fixed_ms);
    report.add("cutover_device_ms", stop.device_ms);
    report.add("cutover_journal_ms", stop.journal_ms);
    report.add("cutover_downtime_ms", moved.downtime_ms());
    report.add("cutover_downtime_outside_ms", stop.outside_ms);
    report.add("cutover_bytes", f64::from(u32::try_from(left).unwrap()));
    report.add("journal_fsync_ms", stop.sync_ms);
    report.add("journal_syncs_on_path_source", stop.syncs_source);
    report.add("journal_syncs_on_path_destination", stop.syncs_destination);
}
