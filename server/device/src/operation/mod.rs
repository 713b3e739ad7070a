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
    /// It failed on the way.
    #[error("{}{}", cause, outcome_text(*outcome, quarantined, *sealed))]
    Failed {
        /// What went wrong first.
        #[source]
        cause: Cause,
        /// What became of the state that the devices carried before: lost where it was lost on any of them.
        outcome: Outcome,
        /// The devices that take no more work until somebody decides.
        quarantined: Vec<Identity>,
        /// Whether what was saved is sealed and stands all the same. It may be the only copy.
        sealed: bool,
    },
}

fn outcome_text(outcome: Outcome, quarantined: &[Identity], sealed: bool) -> String {
    let state = match outcome {
        Outcome::Preserved => "; the devices keep their own state",
        Outcome::StateLost => "; device state was lost",
    };
    let quarantined =
        quarantined.iter().map(|device| format!("; {device} is quarantined until somebody decides"));
    let sealed = sealed.then(|| "; what was saved is whole, and stands".to_owned());
    std::iter::once(state.to_owned()).chain(quarantined).chain(sealed).collect()
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
    sealed: bool,
}

impl Unwound {
    fn new() -> Self {
        Self { cause: None, outcome: Outcome::Preserved, quarantined: Vec::new(), sealed: false }
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
        let Self { outcome, quarantined, sealed, .. } = self;
        OperationError::Failed { cause, outcome, quarantined, sealed }
    }
}

/// The migration flags of every device of the set, once each is found able to take part.
fn capabilities(lanes: &[DeviceLane]) -> Result<Vec<Capabilities>, OperationError> {
    let ready = |lane: &DeviceLane| -> Result<Capabilities, DeviceError> {
        lane.call(Call::Probe, |driver| driver.check_ready().map(|()| driver.capabilities().migration))?
    };
    lanes
        .iter()
        .map(|lane| {
            ready(lane).map_err(|reason| OperationError::NotReady { device: lane.identity().clone(), reason })
        })
        .collect()
}
