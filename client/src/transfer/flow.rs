//! How a giver's stream flows, for whoever watches it and is not the one who gives.
//!
//! ```text
//!   Giver: the line breaks, is there again --> Flow --> whoever decides whether a device may stop
//! ```
//! Invariants: what is told was true a moment ago. A line that is over without having come back stays down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a giver's stream flows.
#[derive(Debug, Clone, Default)]
pub struct Flow(Arc<State>);

#[derive(Debug, Default)]
struct State {
    is_down: AtomicBool,
}

impl Flow {
    /// Whether there is no connection now: it broke, and what is given goes no further than into the spool.
    pub fn is_down(&self) -> bool {
        self.0.is_down.load(Ordering::Relaxed)
    }

    pub(super) fn set_down(&self, is_down: bool) {
        self.0.is_down.store(is_down, Ordering::Relaxed);
    }
}
