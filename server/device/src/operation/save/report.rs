//! What is asked of a save, and what is told of it.

use std::time::Duration;

use vfio_checkpoint_fsm::{AfterSave, Cutover, Fate, SavePlan, SaveRequest, SaveState, Validity};

use super::super::PrecopyPolicy;

/// What is asked of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveTerms {
    /// How it is done.
    pub request: SaveRequest,
    /// How long to pre-copy, where cutover is automatic.
    pub policy: PrecopyPolicy,
    /// With manual cutover, how long Cutover is waited for, from the start of the save. It fails then, and the devices
    /// run on.
    pub cutover_limit: Duration,
    /// How long held devices wait for Resume. They run then, and the checkpoint is marked inconsistent. How long an offer
    /// waits for Commit. It is withdrawn then.
    pub hold_limit: Duration,
    /// How long devices that are handed over may be stopped until the other side is told to run them. After that the save
    /// is undone.
    pub stop_limit: Option<Duration>,
    /// Whether the wait for Commit counts. Where somebody says it, it is theirs how long the devices stand still.
    pub limits_commit: bool,
}

impl SaveTerms {
    /// Automatic cutover and no hold, as for a caller that nobody can reach.
    pub fn automatic(pre_copy: bool, after: AfterSave, policy: PrecopyPolicy) -> Self {
        let request = SaveRequest { pre_copy, cutover: Cutover::Auto, after };
        Self {
            request,
            policy,
            cutover_limit: Duration::ZERO,
            hold_limit: Duration::ZERO,
            stop_limit: None,
            limits_commit: true,
        }
    }
}

/// What a save did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveReport {
    /// What was done, after the wishes were held against what the devices can do.
    pub plan: SavePlan,
    /// Bytes of each device, in the order of the set.
    pub bytes: Vec<u64>,
    /// Of these, how many came while the devices ran.
    pub precopy_bytes: u64,
    /// How long the stop was expected to take when it began, where pre-copy could tell.
    pub predicted_downtime: Option<Duration>,
    /// From before the first device was stopped until the last ran again, or until the seal where they stay stopped, or
    /// until it was known that the other side runs them. A hold counts.
    pub downtime: Duration,
    /// The whole save.
    pub took: Duration,
    /// What the caller could not record after there was no way back, the first of it.
    pub unrecorded: Option<String>,
}

/// What the checkpoint is worth that stands after this end.
pub(super) fn checkpoint_after(state: SaveState) -> Option<Validity> {
    match state {
        SaveState::Aborted { checkpoint } | SaveState::Lost { checkpoint } => checkpoint,
        SaveState::Resuming { checkpoint } => Some(checkpoint),
        SaveState::Unwinding { checkpoint } => match checkpoint {
            Fate::Unsealed => None,
            Fate::Revocable(validity) | Fate::Stands(validity) => Some(validity),
        },
        SaveState::Completed | SaveState::CompletedStopped => Some(Validity::Consistent),
        SaveState::Inconsistent => Some(Validity::Inconsistent),
        SaveState::Admitted
        | SaveState::PreCopying
        | SaveState::AwaitingCutover
        | SaveState::Quiescing
        | SaveState::Stopping
        | SaveState::Draining
        | SaveState::Parking
        | SaveState::Sealing
        | SaveState::Held
        | SaveState::Marking
        | SaveState::Offered
        | SaveState::Committing
        | SaveState::LettingGo
        | SaveState::HandedOver => None,
    }
}
