//! What went wrong, in words for people and as an exit code for scripts.

use std::fmt;
use std::process::ExitCode;

use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::driver::{Failure, Standing};
use vfio_checkpoint_device::lane::Hung;
use vfio_checkpoint_device::operation::OperationError;
use vfio_checkpoint_fsm::Outcome;

/// How the program ends. Usage errors are clap's, which exits with 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    /// It did what was asked for.
    Done = 0,
    /// It failed, and the devices run with the state they had.
    Failed = 1,
    /// It cannot work, as things are. Nothing was touched.
    Blocked = 3,
    /// It failed, and device state was lost or a device needs somebody's decision.
    StateLost = 4,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// Why the program did not do what was asked for.
#[derive(Debug)]
pub(crate) struct CommandFailure {
    status: ExitStatus,
    text: String,
}

impl CommandFailure {
    /// It ended in this way, for this reason.
    pub(crate) fn new(status: ExitStatus, reason: impl fmt::Display) -> Self {
        Self { status, text: reason.to_string() }
    }

    /// It cannot work; nothing was touched.
    pub(crate) fn blocked(reason: impl fmt::Display) -> Self {
        Self { status: ExitStatus::Blocked, text: reason.to_string() }
    }

    /// It failed; devices run with the state they had.
    pub(crate) fn failed(error: &dyn std::error::Error) -> Self {
        Self { status: ExitStatus::Failed, text: chain(error) }
    }

    /// It did what was asked for, and could not say so.
    pub(crate) fn unprinted(error: &dyn std::error::Error) -> Self {
        let text = format!("done, but the result cannot be printed: {}", chain(error));
        Self { status: ExitStatus::Failed, text }
    }

    /// A device was given up: what it does is not known.
    pub(crate) fn hung(hung: Hung) -> Self {
        Self { status: ExitStatus::StateLost, text: hung.to_string() }
    }

    /// A device could not be brought to where it should be.
    pub(crate) fn of_device(failure: &Failure) -> Self {
        let kept = failure.outcome == Outcome::Preserved && failure.standing == Standing::InService;
        let status = if kept { ExitStatus::Failed } else { ExitStatus::StateLost };
        Self { status, text: failure.to_string() }
    }

    pub(crate) fn status(&self) -> ExitStatus {
        self.status
    }
}

impl From<OperationError> for CommandFailure {
    fn from(error: OperationError) -> Self {
        match &error {
            OperationError::Refused(refusal) => Self::blocked(format!("nothing was touched: {refusal}")),
            OperationError::NotReady { .. } => Self::blocked(chain(&error)),
            OperationError::Failed { outcome, quarantined, .. } => {
                let kept = *outcome == Outcome::Preserved && quarantined.is_empty();
                let status = if kept { ExitStatus::Failed } else { ExitStatus::StateLost };
                Self { status, text: error.to_string() }
            }
            OperationError::Inconsistent { .. } => Self::failed(&error),
        }
    }
}

impl fmt::Display for CommandFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
