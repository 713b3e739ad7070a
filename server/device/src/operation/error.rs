//! How an operation ended that did not succeed, and what is gathered for that while it unwinds.

use std::fmt::Display;
use std::time::Duration;

use vfio_checkpoint_fsm::{Outcome, PlanRefusal, Validity};

use super::SaveReport;
use crate::driver::{Failure, Standing};
use crate::lane::Hung;
use crate::{DeviceError, DeviceLane, Identity, chain};

/// What a sink, a source or a caller may fail with: it belongs to them.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How an operation ended that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The set cannot be handled as one. Nothing was touched.
    #[error("nothing was touched")]
    Refused(#[from] PlanRefusal),
    /// A device cannot take part, as it stands. Nothing was touched.
    #[error("nothing was touched: {device} cannot take part")]
    NotReady {
        /// Which one.
        device: Identity,
        /// Why not.
        #[source]
        reason: DeviceError,
    },
    /// It failed on the way, or was cancelled.
    #[error("{}{}", cause, outcome_text(*outcome, quarantined, *checkpoint))]
    Failed {
        /// What went wrong first.
        #[source]
        cause: Cause,
        /// What became of the state that the devices carried before: lost where it was lost on any of them.
        outcome: Outcome,
        /// The devices that take no more work until somebody decides.
        quarantined: Box<[Identity]>,
        /// The devices that were seen to be reset, also of those that are quarantined. In a box of its own, for the size of
        /// this error.
        reset: Box<Vec<Identity>>,
        /// What the checkpoint is worth that stands all the same, where what was saved is sealed. It may be the only
        /// copy.
        checkpoint: Option<Validity>,
    },
    /// The hold of a save expired before the caller said Resume: the devices run on, and the checkpoint is sealed, but
    /// marked inconsistent.
    #[error("the hold expired before Resume; the devices run on, and the checkpoint is marked inconsistent")]
    Inconsistent {
        /// What the save did. None where an earlier life of the process did most of it.
        report: Option<Box<SaveReport>>,
    },
}

impl OperationError {
    /// Whether the caller wanted it so.
    pub fn is_cancelled(&self) -> bool {
        match self {
            Self::Failed { cause, .. } => matches!(cause, Cause::Cancelled(_)),
            Self::Refused(_) | Self::NotReady { .. } | Self::Inconsistent { .. } => false,
        }
    }

    /// All of it in one line, for people, where whoever tells it has better words for the cause of a failure.
    pub fn in_words(&self, cause: impl Display) -> String {
        match self {
            Self::Failed { cause: _, outcome, quarantined, checkpoint, reset: _ } => {
                format!("{cause}{}", outcome_text(*outcome, quarantined, *checkpoint))
            }
            Self::Refused(_) | Self::NotReady { .. } | Self::Inconsistent { .. } => chain(self),
        }
    }
}

fn outcome_text(outcome: Outcome, quarantined: &[Identity], checkpoint: Option<Validity>) -> String {
    let state = match outcome {
        Outcome::Preserved => "; the devices keep their own state",
        Outcome::StateLost => "; device state was lost",
    };
    let quarantined =
        quarantined.iter().map(|device| format!("; {device} is quarantined until somebody decides"));
    let checkpoint = checkpoint.map(|validity| {
        match validity {
            Validity::Consistent => "; what was saved is whole, and stands",
            Validity::Inconsistent => "; what was saved stands, marked inconsistent",
        }
        .to_owned()
    });
    std::iter::once(state.to_owned()).chain(quarantined).chain(checkpoint).collect()
}

/// What went wrong first.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A device.
    #[error("{device}: {}", chain(failure))]
    Device {
        /// Which one.
        device: Identity,
        /// What it did.
        failure: DeviceError,
    },
    /// The caller took it back, for this reason.
    #[error("cancelled: {}", chain(&**.0))]
    Cancelled(BoxError),
    /// The caller could not write down where the operation stands.
    #[error("where the operation stands could not be recorded: {}", chain(&**.0))]
    Unrecorded(BoxError),
    /// Nobody said Cutover in time.
    #[error("nobody said Cutover within {limit:?}")]
    NoCutover {
        /// How long it was waited for.
        limit: Duration,
    },
    /// Pre-copy did not get the stop short enough.
    #[error("pre-copy did not bring the predicted downtime under {limit:?} in time")]
    Downtime {
        /// How short it should have been.
        limit: Duration,
    },
    /// The stop was about to take longer than it may.
    #[error("the devices were stopped for longer than leaves time for the rest of {limit:?}")]
    StopLimit {
        /// How long they may be stopped.
        limit: Duration,
    },
    /// Nobody said Commit in time.
    #[error("nobody said Commit within {limit:?}")]
    NoCommit {
        /// How long it was waited for.
        limit: Duration,
    },
    /// Whoever was to take the devices over does not.
    #[error("the devices were not taken over: {}", chain(&**.0))]
    NotTaken(BoxError),
    /// Nobody said Resume in time.
    #[error("nobody said Resume within {limit:?}")]
    HoldExpired {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The owner of interrupts and mappings was not ready in time.
    #[error("the owner of the devices' interrupts and memory was not ready within {limit:?}")]
    NotReady {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The process that was at it ended.
    #[error("the process that was at it ended before it was done")]
    Interrupted,
    /// Whoever takes or gives the state.
    #[error("{}", chain(&**.0))]
    Other(BoxError),
}

/// What happened to the devices of a failing operation, gathered while it unwinds.
#[derive(Debug)]
pub(super) struct Unwound {
    pub(super) cause: Option<Cause>,
    pub(super) outcome: Outcome,
    pub(super) quarantined: Vec<Identity>,
    pub(super) reset: Vec<Identity>,
    /// What the caller could not record after there was no way back, the first of it.
    pub(super) unrecorded: Option<String>,
}

impl Unwound {
    pub(super) fn new() -> Self {
        let (quarantined, reset) = (Vec::new(), Vec::new());
        Self { cause: None, outcome: Outcome::Preserved, quarantined, reset, unrecorded: None }
    }

    /// Keeps the first cause.
    pub(super) fn blame(&mut self, cause: Cause) {
        self.cause.get_or_insert(cause);
    }

    /// Why devices are given up.
    pub(super) fn reason(&self) -> String {
        self.cause.as_ref().map_or_else(|| "the operation was given up".to_owned(), ToString::to_string)
    }

    /// Takes in how one device ended.
    pub(super) fn device(&mut self, lane: &DeviceLane, ended: Result<Failure, Hung>) {
        let device = lane.identity();
        if ended.as_ref().is_ok_and(Failure::is_reset) {
            self.reset.push(device.clone());
        }
        let (failure, outcome, standing) = match ended {
            Ok(failure) => (failure.first, failure.outcome, failure.standing),
            // What a call does that did not return is not known, so nothing good can be said of its device.
            Err(hung) => (hung.into(), Outcome::StateLost, Standing::Quarantined),
        };
        self.blame(Cause::Device { device: device.clone(), failure });
        self.outcome = self.outcome.and(outcome);
        if standing == Standing::Quarantined {
            self.quarantine(device);
        }
    }

    pub(super) fn quarantine(&mut self, device: &Identity) {
        if !self.quarantined.contains(device) {
            self.quarantined.push(device.clone());
        }
    }

    /// Takes in that the caller could not record a move after which there is no way back.
    pub(super) fn unrecorded(&mut self, error: &BoxError) {
        let error = chain(&**error);
        tracing::error!(%error, "an operation goes on although its move could not be recorded");
        self.unrecorded.get_or_insert(error);
    }

    pub(super) fn into_error(self, checkpoint: Option<Validity>) -> OperationError {
        let cause = self.cause.unwrap_or_else(|| Cause::Other("the operation was given up".into()));
        let (outcome, quarantined, reset) = (self.outcome, self.quarantined.into(), Box::new(self.reset));
        OperationError::Failed { cause, outcome, quarantined, reset, checkpoint }
    }
}
