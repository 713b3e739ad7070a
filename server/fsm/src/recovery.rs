//! What to do with one device after a SET failed, from the state that it was found in.
//!
//! ```text
//!                      RUNNING   any other walkable   RESUMING     ERROR        unknown, absent
//!   source             nothing   walk to RUNNING      quarantine   quarantine   quarantine
//!   entering RESUMING  nothing   RUNNING_P2P: walk,   reset        reset        reset
//!                                others: reset
//!   destination        reset     reset                reset        reset        reset
//!
//!   walk failed        source: quarantine     destination: reset
//!   reset failed       quarantine
//! ```
//!
//! The rows differ by what the device holds. A source holds the only copy: it is walked back to `RUNNING` or
//! left alone for somebody to decide, and never reset on its own. A destination holds a copy of a state whose
//! original is elsewhere, so it is reset from wherever it is, `RUNNING` included: letting a refused copy run
//! would make two running copies of one logical device.
//!
//! Between them lies a device that was on its way into `RESUMING`. Whether its old state is intact depends on
//! how far it got. In `RUNNING` or `RUNNING_P2P` it had not reached `STOP`, so nothing was replaced: it goes
//! back to `RUNNING`, and its state (often the blank state after a reset, but that is not known here) is
//! preserved. In `STOP` it had tried `STOP -> RESUMING`, on which a driver may clear the state, so it counts
//! as replaced. The found state alone cannot tell this device from one that was on its way *out* of
//! `RESUMING`; that is why [`recover_entry`] is a function of its own, and [`recover`] assumes the worse.
//!
//! Invariants: [`Recovery::Reset`] is never the answer for a source. Every answer but [`Recovery::Walk`]
//! needs no further decision; a failed walk has [`after_failed_walk`], a failed reset has
//! [`after_failed_reset`].
//!
//! Failure paths: the error of the first failed SET is the one to report; errors of the recovery are details
//! of it.

use std::fmt;

use crate::{Capabilities, Outcome, State, Walk, path};

/// What a device means to its operation, which decides what may be done to it without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The state in the device is precious: the agent's own device that is being saved, a lent or a borrowed
    /// one.
    Source,
    /// The state in the device is a copy that is being loaded, from the SET to `RESUMING` on.
    Destination,
}

/// What to do with a device after a failed SET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recovery {
    /// The device runs with its own state; there is nothing to undo.
    Nothing,
    /// Walk to this state; on failure, [`after_failed_walk`].
    Walk {
        /// Where to.
        to: State,
    },
    /// Reset the device; on failure, [`after_failed_reset`].
    Reset,
    /// Fence the device and touch it no more until somebody decides.
    Quarantine,
}

impl Recovery {
    /// What becomes of the device's state if the recovery succeeds. `None`: that is for somebody to decide.
    pub const fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Nothing | Self::Walk { .. } => Some(Outcome::Preserved),
            Self::Reset => Some(Outcome::StateLost),
            Self::Quarantine => None,
        }
    }
}

/// What to do with a device that was found in a state after a failed SET.
pub fn recover(role: Role, capabilities: Capabilities, landed: State) -> Recovery {
    match role {
        Role::Source => recover_source(capabilities, landed),
        Role::Destination => Recovery::Reset,
    }
}

/// What to do with a destination when the SET *into* `RESUMING` failed, from the state that it was found in.
///
/// Use it for that SET only. Once it has succeeded, [`recover`] is the one to ask.
pub fn recover_entry(capabilities: Capabilities, landed: State) -> Recovery {
    match landed {
        State::Running | State::RunningP2p => walk_home(capabilities, landed).unwrap_or(Recovery::Reset),
        State::Error
        | State::Stop
        | State::StopCopy
        | State::Resuming
        | State::PreCopy
        | State::PreCopyP2p => Recovery::Reset,
    }
}

/// What to do when the walk that a recovery asked for fails.
pub const fn after_failed_walk(role: Role) -> Recovery {
    match role {
        Role::Source => Recovery::Quarantine,
        Role::Destination => Recovery::Reset,
    }
}

/// What to do when a reset fails, whoever asked for it: no software means is left.
pub const fn after_failed_reset() -> Recovery {
    Recovery::Quarantine
}

fn recover_source(capabilities: Capabilities, landed: State) -> Recovery {
    match landed {
        // A walk out of RESUMING exists, but what it would run is not the state of this source.
        State::Resuming | State::Error => Recovery::Quarantine,
        State::Stop
        | State::Running
        | State::StopCopy
        | State::RunningP2p
        | State::PreCopy
        | State::PreCopyP2p => walk_home(capabilities, landed).unwrap_or(Recovery::Quarantine),
    }
}

/// The way back to `RUNNING`. `None`: the device claims a state that its capabilities exclude.
fn walk_home(capabilities: Capabilities, landed: State) -> Option<Recovery> {
    match path(capabilities, landed, State::Running) {
        Walk::NoOp => Some(Recovery::Nothing),
        Walk::Path(_) => Some(Recovery::Walk { to: State::Running }),
        Walk::Forbidden(_) => None,
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Walk { to } => write!(f, "walk to {to}"),
            Self::Reset => f.write_str("reset"),
            Self::Quarantine => f.write_str("quarantine"),
        }
    }
}
