//! State that arrives from another agent.
//!
//! ```text
//!   stream --WireSource--> device::operation::restore
//!   loaded, HELD on record --> [Ready, on record] --> Ack{complete}: the source is told Prepared
//! ```

use std::sync::Arc;

use vfio_checkpoint_device::Rearm;
use vfio_checkpoint_device::operation::{Arrival, BoxError, StateSource};

use crate::operation::Entry;
use crate::operation::record::JobRecord;
use crate::transfer::WireSource;

/// Gives the state that comes on an arrival's stream.
#[derive(Debug)]
pub struct ArrivalSource {
    wire: WireSource,
    entry: Arc<Entry>,
}

impl ArrivalSource {
    /// A source for the arrival `entry`.
    pub fn new(wire: WireSource, entry: Arc<Entry>) -> Self {
        Self { wire, entry }
    }

    /// Tells the giver that nothing more is taken, and why.
    pub async fn give_up(self, reason: &str) {
        self.wire.give_up(reason).await;
    }
}

impl StateSource for ArrivalSource {
    fn next(&mut self) -> impl Future<Output = Result<Option<Arrival>, BoxError>> + Send {
        self.wire.next()
    }

    /// Whoever uses the devices is ready before the source is told Prepared: once the devices are told to run, nobody is
    /// waited for any more.
    async fn held(&mut self) -> Result<(), BoxError> {
        if matches!(self.entry.fixed.job, JobRecord::Arrive { require_ready: true, .. }) {
            self.entry.hand_over(|handover| handover.awaits_ready = true);
            // A source that gives up meanwhile says so by AbandonHandover.
            self.entry.signals.ready().await;
            self.entry.hand_over(|handover| handover.awaits_ready = false);
        }
        self.wire.held().await
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}
