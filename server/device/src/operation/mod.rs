//! A whole save or restore of a set of devices, from a plan to its end, as a future that answers to a caller.
//!
//! ```text
//!   fsm::SaveState --command--> execute on each DeviceLane --event--> fsm::SaveState …
//!        |                            |        ^
//!      moved                     StateSink,   cutover, resume, cancelled, deadlines
//!        v                       StateSource   |
//!      Caller ---------------------------------'
//! ```
//! The operation machines of `fsm` decide; this module does what they command and reports what happened, and nothing
//! else decides anything: there is one loop, and one place where a failed operation is unwound.
//!
//! The futures need no async runtime: an agent polls them on its own, a simulation on virtual time, and a program for a
//! shell blocks on them. Only the lanes call devices, so whoever polls is never held up by one.
//!
//! Read in this order: [`Caller`], the loop in `machine`, then `save`, `restore` and `take_up`.
//!
//! # Failure paths
//! The first error is the one reported, with the device that it is about. A device whose own driver could not bring it
//! back, or that hangs, is quarantined; the others of the set go back to RUNNING (a save) or are reset (a restore).
//!
//! A future that is dropped, or a process that dies, leaves the devices where they are. What the caller recorded of the
//! moves says how to go on: [`take_up_save`], [`take_up_restore`].

mod caller;
mod delivery;
mod error;
mod machine;
mod precopy;
mod restore;
mod save;
#[cfg(test)]
mod seeds;
mod set;
mod state;
mod take_up;
#[cfg(test)]
mod tests;

pub use caller::{Alone, Caller, DeviceProgress, OperationStep, Progress};
pub use delivery::Delivery;
pub use error::{BoxError, Cause, OperationError};
pub use precopy::{Decision, Left, Pace, PrecopyPolicy};
pub use restore::{RestoreReport, RestoreTerms, restore};
pub use save::{SaveReport, SaveTerms, save};
pub use state::{Arrival, Owner, Settled, StateSink, StateSource, Word};
pub use take_up::{LoadedBefore, RecordedRestore, RecordedSave, take_up_restore, take_up_save};

use vfio_checkpoint_fsm::Capabilities;

use crate::{Call, DeviceError, DeviceLane};

/// The migration flags of every device of the set, once each is found able to take part.
async fn capabilities(lanes: &[DeviceLane]) -> Result<Vec<Capabilities>, OperationError> {
    let mut all = Vec::with_capacity(lanes.len());
    for lane in lanes {
        let asked =
            lane.start(Call::Probe, |driver| driver.check_ready().map(|()| driver.capabilities().migration));
        let ready = asked.finished().await.map_err(DeviceError::from).and_then(|ready| ready);
        match ready {
            Ok(capabilities) => all.push(capabilities),
            Err(reason) => {
                return Err(OperationError::NotReady { device: lane.identity().clone(), reason });
            }
        }
    }
    Ok(all)
}
