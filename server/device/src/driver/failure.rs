//! What the driver did and how it ended, as values.

use std::fmt;

use vfio_checkpoint_fsm::{Outcome, State};

use crate::{DeviceError, chain};

/// One thing the driver asked of a device, with the answer. A list of them is a trajectory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A SET to this state.
    Set(State, Answer),
    /// The state was read back.
    ReadBack(Result<State, Answer>),
    /// A reset.
    Reset(Answer),
}

/// How a device answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ok,
    /// Refused with this errno.
    Errno(i32),
    /// Failed without an errno.
    Failed,
}

impl Answer {
    pub(super) fn of<T>(result: &Result<T, DeviceError>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(error) => Self::of_error(error),
        }
    }

    pub(super) fn of_error(error: &DeviceError) -> Self {
        error.raw_os_error().map_or(Self::Failed, Self::Errno)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Errno(errno) => write!(f, "errno {errno}"),
            Self::Failed => f.write_str("failed"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(state, answer) => write!(f, "SET {state}: {answer}"),
            Self::ReadBack(Ok(state)) => write!(f, "GET: {state}"),
            Self::ReadBack(Err(answer)) => write!(f, "GET: {answer}"),
            Self::Reset(answer) => write!(f, "RESET: {answer}"),
        }
    }
}

/// Whether a device may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It takes work.
    InService,
    /// It takes no work until somebody decides: its state may be precious and the driver cannot tell what it is in,
    /// or it cannot be reset. See [`Driver::reset`](super::Driver::reset) and
    /// [`Driver::reinstate`](super::Driver::reinstate).
    Quarantined,
}

/// How an operation on a device ended that did not succeed: what went wrong first, and where that leaves the device.
#[derive(Debug)]
pub struct Failure {
    /// The first error. What recovery met later is in the steps.
    pub first: DeviceError,
    /// Where the device stands now, where that could be read.
    pub state: Option<State>,
    /// Whether the state that the device carried before is still there.
    pub outcome: Outcome,
    /// Whether the device takes more work.
    pub standing: Standing,
    /// Everything that was asked of the device since the operation began, recovery included.
    pub steps: Vec<Step>,
}

impl Failure {
    /// Whether the device was reset, and is seen to run again with nothing of what it carried.
    pub fn is_reset(&self) -> bool {
        self.standing == Standing::InService
            && self.state == Some(State::Running)
            && self.outcome == Outcome::StateLost
            && self.resets() > 0
    }

    /// How many resets were asked for.
    pub fn resets(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step, Step::Reset(_))).count()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; the device ", chain(&self.first))?;
        match self.state {
            Some(state) => write!(f, "is in {state}")?,
            None => f.write_str("is in an unknown state")?,
        }
        f.write_str(match self.outcome {
            Outcome::Preserved => ", its state preserved",
            Outcome::StateLost => ", its state lost",
        })?;
        f.write_str(match self.standing {
            Standing::InService => "",
            Standing::Quarantined => ", and it is quarantined until somebody decides",
        })
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // Display already tells the chain of `first`: whoever prints causes must not print it twice.
        None
    }
}
