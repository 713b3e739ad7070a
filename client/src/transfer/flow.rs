//! How a giver's stream flows, for whoever watches it and is not the one who gives.
//!
//! ```text
//!   Giver: the line breaks, is there again; Ack --> Flow --> whoever decides when a device stops
//! ```
//! Invariants: what is told was true a moment ago. A line that is over without having come back stays down. What a taker may
//! keep to itself for good is never told as being under way: nobody could wait for it to arrive.
//!
//! Acknowledgements are counted in a stream that can be resumed. In another one nobody keeps what they are of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vfio_checkpoint_proto::domain::StreamLimits;

/// How a giver's stream flows.
#[derive(Debug, Clone, Default)]
pub struct Flow {
    state: Arc<State>,
    /// What a taker may leave without an ack for as long as it likes; none where acks are not counted.
    silent_bytes: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    is_down: AtomicBool,
    acked_bytes: AtomicU64,
}

impl Flow {
    /// Of a stream of these limits whose acks are counted.
    pub(super) fn counting(limits: &StreamLimits) -> Self {
        Self { state: Arc::default(), silent_bytes: Some(silent_bytes(limits)) }
    }

    /// Whether there is no connection now: it broke, and what is given goes no further than into the spool.
    pub fn is_down(&self) -> bool {
        self.state.is_down.load(Ordering::Relaxed)
    }

    /// Of so many bytes of state that were given, how many are still on their way. None where that is not known.
    pub fn under_way(&self, given_bytes: u64) -> Option<u64> {
        let acked_bytes = self.state.acked_bytes.load(Ordering::Relaxed);
        Some(given_bytes.saturating_sub(acked_bytes).saturating_sub(self.silent_bytes?))
    }

    pub(super) fn set_down(&self, is_down: bool) {
        self.state.is_down.store(is_down, Ordering::Relaxed);
    }

    pub(super) fn acked(&self, bytes: u64) {
        self.state.acked_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Bytes of state that a taker may leave without an ack for as long as it likes.
pub(super) fn silent_bytes(limits: &StreamLimits) -> u64 {
    match limits.ack_delay {
        Some(_) => 0,
        None => limits.ack_interval_bytes.saturating_sub(1),
    }
}
