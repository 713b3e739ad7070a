//! What a restore is asked, and what it answers.

use std::time::Duration;

use vfio_checkpoint_fsm::{AfterLoad, RestorePlan};

use crate::Seal;

/// What is asked of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreTerms {
    /// What the devices do once they are loaded.
    pub after: AfterLoad,
    /// How long loaded devices wait for Resume, from when whoever gave the state has been told; and how long that may take.
    /// They are reset then.
    pub hold_limit: Duration,
    /// How long their owner has to be ready. They are reset then.
    pub ready_limit: Duration,
}

impl RestoreTerms {
    /// Run at once, as soon as the owner is ready, which it is within `ready_limit`.
    pub fn run(ready_limit: Duration) -> Self {
        Self { after: AfterLoad::Run, hold_limit: Duration::ZERO, ready_limit }
    }
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreReport {
    /// What was done.
    pub plan: RestorePlan,
    /// The seal on each device's state, verified over what was written to it.
    pub seals: Vec<Seal>,
    /// The whole restore, or what was left of it to an operation that was taken up.
    pub took: Duration,
    /// What the caller could not record after there was no way back, the first of it.
    pub unrecorded: Option<String>,
}
