//! From what the agent knows to what the wire says. One way only: what comes from a peer is validated in the contract's
//! own crate.

mod checkpoint;
mod device;
mod migration;
mod operation;

pub(super) use checkpoint::checkpoint;
pub(super) use device::{blocker, data_size, device};
use migration::verdict;
pub(super) use migration::{migration_blocker, migration_prediction, proven_record, source_device};
pub(crate) use operation::phase;
pub(super) use operation::{operation, operation_at, prediction};

use std::time::Duration;

/// As the wire says it.
pub(super) fn duration(duration: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    let nanos = i32::try_from(duration.subsec_nanos()).unwrap_or(0);
    prost_types::Duration { seconds, nanos }
}
