//! State that arrives from another agent.
//!
//! ```text
//!   stream --WireSource--> device::operation::restore
//!   loaded, HELD on record --> [Ready, on record --> the deadline on record anew] --> Ack{complete}: the source is told Prepared
//! ```
//! # Invariants
//! - The source waits for the commit from when it hears Prepared. So this side's deadline, on record too, runs from no earlier
//!   than when it is told: its limit is longer by all that the news may take.
//! - While Ready is awaited the stream is kept, over one connection or another: a source that heard nothing would take it for
//!   broken.
//!
//! # Failure paths
//! A source that gives up while Ready is awaited says so on the stream, or is gone and does not come back: nothing is run.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_device::Rearm;
use vfio_checkpoint_device::operation::{Arrival, BoxError, StateSource};

use crate::core::Core;
use crate::operation::Entry;
use crate::operation::record::{JobRecord, RecordedStep};
use crate::transfer::WireSource;

/// Gives the state that comes on an arrival's stream.
#[derive(Debug)]
pub struct ArrivalSource {
    wire: WireSource,
    core: Arc<Core>,
    entry: Arc<Entry>,
    hold_limit: Duration,
}

impl ArrivalSource {
    /// A source for the arrival `entry`, which waits for its commit for so long.
    pub fn new(wire: WireSource, core: Arc<Core>, entry: Arc<Entry>, hold_limit: Duration) -> Self {
        Self { wire, core, entry, hold_limit }
    }

    /// Waits until whoever uses the devices is ready.
    async fn await_ready(&mut self) -> Result<(), BoxError> {
        self.entry.hand_over(|handover| handover.awaits_ready = true);
        let entry = Arc::clone(&self.entry);
        let lost = tokio::select! {
            biased;
            () = entry.signals.ready() => None,
            lost = self.wire.linger() => Some(lost),
        };
        self.entry.hand_over(|handover| handover.awaits_ready = false);
        if let Some(lost) = lost {
            return Err(lost.into());
        }
        // The one on record runs since PREPARED, and that may be long ago.
        let deadline = self.core.environment.unix_now().after(self.hold_limit);
        // What was stopped is elsewhere.
        let step = RecordedStep::Held { deadline, limit: Some(self.hold_limit), stopped_at: None };
        self.core.record_step(&self.entry, step).await?;
        self.entry.held_until(deadline);
        Ok(())
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

    fn busy(&mut self) -> impl Future<Output = Infallible> + Send {
        self.wire.busy()
    }

    /// Whoever uses the devices is ready before the source is told Prepared: once the devices are told to run, nobody is
    /// waited for any more.
    async fn held(&mut self) -> Result<(), BoxError> {
        if matches!(self.entry.fixed.job, JobRecord::Arrive { require_ready: true, .. }) {
            self.await_ready().await?;
        }
        self.wire.held().await
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}
