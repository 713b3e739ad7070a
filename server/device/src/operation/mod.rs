//! A whole save or restore of a set of devices, from a plan to its end, on the calling thread.
//!
//! ```text
//!   fsm::SaveState --command--> execute on each DeviceLane --event--> fsm::SaveState …
//! ```
//! The operation machines of `fsm` decide; this module does what they command and reports what happened, and nothing
//! else decides anything: there is one loop, and one place where a failed operation is unwound.
//!
//! It serves a person at a shell and whoever tests a driver. There is no caller to wait for: cutover is automatic,
//! holds and deadlines are for a service that has somebody to tell.
//!
//! # Failure paths
//! The first error is the one reported, with the device that it is about. A device whose own driver could not bring it
//! back, or that hangs, is quarantined; the others of the set go back to RUNNING (a save) or are reset (a restore).

mod precopy;
mod restore;
mod save;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

pub use precopy::{Decision, Left, PrecopyPolicy};
pub use restore::{RestoreReport, StateSource, restore};
pub use save::{SaveReport, StateSink, save};

use vfio_checkpoint_fsm::{Capabilities, Outcome, PlanRefusal};

use crate::driver::{Failure, Standing};
use crate::lane::Hung;
use crate::{Call, DeviceError, DeviceLane, Identity, chain};

/// What a sink or a source of state may fail with: it belongs to the caller.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How an operation ended that did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperationError {
    /// The set cannot be handled as one. Nothing was touched.
    #[error("nothing was touched")]
    Refused(#[from] PlanRefusal),
    /// It failed on the way.
    #[error("{}{}", cause, outcome_text(*outcome, quarantined))]
    Failed {
        /// What went wrong first.
        #[source]
        cause: Cause,
        /// What became of the state that the devices carried before: lost where it was lost on any of them.
        outcome: Outcome,
        /// The devices that take no more work until somebody decides.
        quarantined: Vec<Identity>,
    },
}

fn outcome_text(outcome: Outcome, quarantined: &[Identity]) -> String {
    let state = match outcome {
        Outcome::Preserved => "; the devices run with their own state",
        Outcome::StateLost => "; device state was lost",
    };
    let quarantined =
        quarantined.iter().map(|device| format!("; {device} is quarantined until somebody decides"));
    std::iter::once(state.to_owned()).chain(quarantined).collect()
}

/// What went wrong first.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A device.
    #[error("{device}: {}", chain(failure))]
    Device {
        /// Which one.
        device: Identity,
        /// What it did.
        failure: DeviceError,
    },
    /// Whoever takes or gives the state.
    #[error("{}", chain(&**.0))]
    Other(BoxError),
}

/// What happened to the devices of a failing operation, gathered while it unwinds.
#[derive(Debug)]
struct Unwound {
    cause: Option<Cause>,
    outcome: Outcome,
    quarantined: Vec<Identity>,
}

impl Unwound {
    fn new() -> Self {
        Self { cause: None, outcome: Outcome::Preserved, quarantined: Vec::new() }
    }

    /// Keeps the first cause.
    fn blame(&mut self, cause: Cause) {
        self.cause.get_or_insert(cause);
    }

    /// Takes in how one device ended.
    fn device(&mut self, lane: &DeviceLane, ended: Result<Failure, Hung>) {
        let device = lane.identity();
        let (failure, outcome, standing) = match ended {
            Ok(failure) => (failure.first, failure.outcome, failure.standing),
            // What a call does that did not return is not known, so nothing good can be said of its device.
            Err(hung) => (hung.into(), Outcome::StateLost, Standing::Quarantined),
        };
        self.blame(Cause::Device { device: device.clone(), failure });
        self.outcome = self.outcome.and(outcome);
        if standing == Standing::Quarantined && !self.quarantined.contains(device) {
            self.quarantined.push(device.clone());
        }
    }

    fn into_error(self) -> OperationError {
        let cause = self.cause.unwrap_or_else(|| Cause::Other("the operation was given up".into()));
        OperationError::Failed { cause, outcome: self.outcome, quarantined: self.quarantined }
    }
}

/// The migration flags of every device of the set. Fails where one has hung.
fn capabilities(lanes: &[DeviceLane]) -> Result<Vec<Capabilities>, OperationError> {
    lanes
        .iter()
        .map(|lane| {
            lane.call(Call::Probe, |driver| driver.capabilities().migration).map_err(|hung| {
                let mut unwound = Unwound::new();
                unwound.device(lane, Err(hung));
                unwound.into_error()
            })
        })
        .collect()
}
