//! Farewells that are owed: each is said until its destination has taken it.
//!
//! ```text
//!   the end on record --farewell, half a minute--> taken: settled, on record
//!                                             '--> not taken: owed
//!   boot, and every few minutes: each migration that owes one --farewell, some seconds--> as above
//! ```
//! A destination keeps what it has answered until it hears that nobody will ask again. One whose source was away at that
//! moment, or was killed just then, would keep it for good; and one of which an admin let go would not be told to run.
//!
//! # Invariants
//! - A farewell is owed by what the journal says: by an end with a hand-over that was prepared and that is not settled. So a
//!   later life of the agent owes it too.
//! - It is owed for as long as the migration is on record, which is `limits.keep_finished`, and no longer. What a destination
//!   has of a source that is gone for good, or that has forgotten it, it keeps.
//!
//! # Failure paths
//! Where it cannot be recorded that a farewell was taken, it is said once more, which changes nothing.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_device::chain;

use super::Offer;
use crate::core::Core;
use crate::journal::Change;
use crate::operation::Entry;

/// How often what is owed is said.
const EVERY: Duration = Duration::from_mins(5);
/// How long one of them is tried then, before the next has its turn. To connect may take half of it.
const ONE: Duration = Duration::from_secs(10);

/// Says what is owed, for as long as the agent lives.
pub(crate) async fn say_farewells(core: Arc<Core>) {
    loop {
        for entry in core.operations.page(None, Entry::owes_farewell, usize::MAX) {
            // Where a device was seen last is not on record, so one that was out of service at the end counts as running.
            let may_run_here = entry.view().end.is_some_and(|end| end.out_of_service().next().is_some());
            Offer::new(Arc::clone(&core), entry, None).farewell_within(ONE, may_run_here).await;
        }
        core.environment.sleep(EVERY).await;
    }
}

/// The destination of a migration has taken its farewell.
pub(super) async fn taken(core: &Core, entry: &Entry) {
    let _one_at_a_time = entry.recording.lock().await;
    let mut record = entry.record(entry.on_record());
    if let Some(handover) = &mut record.handover {
        handover.settled = true;
    }
    match core.journal.commit(vec![Change::Operation(Box::new(record))]).await {
        Ok(()) => entry.settled(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "that the farewell was taken is not on record; it is said again");
        }
    }
}
