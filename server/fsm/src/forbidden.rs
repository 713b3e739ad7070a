//! Why a walk between two states is impossible, as a value with a sentence for people.
//!
//! A request that is forbidden here must not reach the kernel, whose answers to it differ:
//!
//! ```text
//!   to ERROR, or to an absent state   EINVAL
//!   out of ERROR                      EINVAL and a kernel warning, on which a host may be set to panic;
//!                                     from the pds driver: success, and the device stays in ERROR
//!   STOP_COPY to a pre-copy state     EINVAL; from kernels older than 7.2 that lack the fix: no answer, as
//!                                     the ioctl loops with the device's state lock held
//! ```
//!
//! Invariants: each reason names what to do instead, and none is worth a retry of the same request.

use std::fmt;

use crate::{Capabilities, State};

/// Why there is no walk between two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Forbidden {
    /// The target was `ERROR`. A device falls into `ERROR`; it is never sent there.
    ErrorAsTarget,
    /// The device is in `ERROR`, which only a reset leaves.
    OutOfError {
        /// The state that was asked for.
        to: State,
    },
    /// One of the two states does not exist for a device with these capabilities.
    StateAbsent {
        /// The state that does not exist.
        state: State,
        /// What the device can do.
        capabilities: Capabilities,
    },
    /// The target was a pre-copy state while the device is in `STOP_COPY`: a save stream only moves forward.
    StreamCannotRestart {
        /// The pre-copy state that was asked for.
        to: State,
    },
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ErrorAsTarget => f.write_str("a device cannot be sent to ERROR; to silence it, reset it"),
            Self::OutOfError { to } => {
                write!(f, "a device in ERROR cannot go to {to}; only a reset leaves ERROR, losing the state")
            }
            Self::StateAbsent { state, capabilities } => {
                write!(f, "a device with {capabilities} has no state {state}; choose a target that it has")
            }
            Self::StreamCannotRestart { to } => {
                write!(
                    f,
                    "a save stream cannot go back from STOP_COPY to {to}; go to RUNNING and start another"
                )
            }
        }
    }
}

impl std::error::Error for Forbidden {}
