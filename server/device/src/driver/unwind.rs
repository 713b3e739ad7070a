//! The one place where an operation that failed is unwound.
//!
//! ```text
//!   read back -> recover() -> nothing | walk | reset | quarantine
//!                               walk failed: read back, then reset (destination) or quarantine (source)
//!                               reset failed: read back, then quarantine
//! ```
//! A source of a set with the P2P barrier goes back in two steps, as it came: to RUNNING_P2P on its own, to RUNNING once
//! all devices are there. In between its session stays, so nothing else can start on it.

use vfio_checkpoint_fsm::{
    Capabilities, Outcome, Recovery, Role, State, after_failed_reset, after_failed_walk, recover,
    recover_entry,
};

use super::failure::{Answer, Failure, Standing, Step};
use super::{Driver, SessionId};
use crate::DeviceError;

/// The session that holds the device, and what is at stake in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Engagement {
    pub(super) session: SessionId,
    pub(super) stake: Stake,
    pub(super) peers: Peers,
    /// Where the device stood before the first step of the session, where somebody knows.
    pub(super) left_in: Option<State>,
}

/// Whether a device is saved on its own or in a set that shares memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    /// On its own: when a step fails it goes straight back to RUNNING.
    None,
    /// In a set with the P2P barrier: when a step fails it goes back to RUNNING_P2P and waits there for
    /// [`Driver::abort`], because a peer may still be stopped.
    Barrier,
}

impl Peers {
    pub(super) fn back(self) -> Back {
        match self {
            Self::None => Back::ToRunning,
            Self::Barrier => Back::ToBarrier,
        }
    }
}

/// How far back a source goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Back {
    ToRunning,
    ToBarrier,
}

/// What the state in the device is worth, which decides what a failure may cost.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stake {
    /// It is precious ([`Role::Source`]).
    Source,
    /// It is precious until the device has left RUNNING_P2P on its way into RESUMING.
    Entry,
    /// It is a copy ([`Role::Destination`]).
    Destination,
}

impl Stake {
    fn role(self) -> Role {
        match self {
            Self::Source => Role::Source,
            Self::Entry | Self::Destination => Role::Destination,
        }
    }

    fn recover(self, capabilities: Capabilities, landed: State, displaced: bool) -> Recovery {
        match self {
            // Somebody else has a hand on it: what it holds is not known, and it is left to somebody to decide.
            Self::Source if displaced => Recovery::Quarantine,
            Self::Source => recover(Role::Source, capabilities, landed),
            Self::Entry => recover_entry(capabilities, landed),
            Self::Destination => recover(Role::Destination, capabilities, landed),
        }
    }
}

impl From<Role> for Stake {
    fn from(role: Role) -> Self {
        match role {
            Role::Source => Self::Source,
            Role::Destination => Self::Destination,
        }
    }
}

impl Driver {
    /// Brings the device back, as far as it can be, and reports. Ends the session, except where the device now waits at
    /// the barrier.
    pub(super) fn unwind(&mut self, stake: Stake, back: Back, first: DeviceError) -> Failure {
        let capabilities = self.device.capabilities().migration;
        let left_in = self.left_in();
        let landed = self.read_back();
        let displaced = matches!(&landed, Ok(landed) if left_in.is_some_and(|left| left != *landed))
            || matches!(first, DeviceError::Displaced { .. });
        let mut recovery = match &landed {
            Ok(landed) => stake.recover(capabilities, *landed, displaced),
            // Where the device stands cannot be told. The next best is what helps in every state.
            Err(_) => after_failed_walk(stake.role()),
        };
        // Each failed attempt leads to the next kind of recovery, and the last is quarantine: this ends.
        loop {
            match recovery {
                Recovery::Nothing => return self.ended(first, Outcome::Preserved),
                Recovery::Walk { to } => {
                    let to = match back {
                        Back::ToBarrier if capabilities.p2p => State::RunningP2p,
                        Back::ToBarrier | Back::ToRunning => to,
                    };
                    if landed.as_ref().is_ok_and(|landed| self.walk_from(*landed, to).is_ok()) {
                        return if to == State::Running {
                            self.ended(first, Outcome::Preserved)
                        } else {
                            self.report(first, Outcome::Preserved)
                        };
                    }
                    // Where that left it is part of the answer, and decides what is still there.
                    let _ = self.read_back();
                    recovery = after_failed_walk(stake.role());
                }
                Recovery::Reset => {
                    if self.reset_and_read_back().is_ok() {
                        return self.ended(first, Outcome::StateLost);
                    }
                    recovery = after_failed_reset();
                }
                Recovery::Quarantine => {
                    let outcome = if displaced { Outcome::StateLost } else { self.outcome_in_quarantine() };
                    return self.quarantined(first, outcome);
                }
            }
        }
    }

    /// Where the last step of the session left the device, if it succeeded. A device found elsewhere was moved or reset
    /// by somebody else, or fell into ERROR. After a failed SET it may stand anywhere on the way.
    fn left_in(&self) -> Option<State> {
        let is_move = |step: &Step| matches!(step, Step::Set(..) | Step::Reset(_));
        let Some(last_set) = self.steps.iter().rposition(is_move) else {
            return self.engaged.and_then(|engagement| engagement.left_in);
        };
        match (self.steps.get(last_set), self.steps.get(last_set + 1)) {
            (Some(Step::Set(target, Answer::Ok)), Some(Step::ReadBack(Ok(found)))) if target == found => {
                Some(*target)
            }
            _ => None,
        }
    }

    /// Whether a device in quarantine still carries what it carried: not after a reset was tried, and not in ERROR or
    /// RESUMING, out of which nothing else leads. Anywhere else the state is there and cannot be brought to run.
    fn outcome_in_quarantine(&self) -> Outcome {
        let reset_tried = self.steps.iter().any(|step| matches!(step, Step::Reset(_)));
        match self.last_seen() {
            Some(State::Error | State::Resuming) | None => Outcome::StateLost,
            Some(_) if reset_tried => Outcome::StateLost,
            Some(_) => Outcome::Preserved,
        }
    }

    pub(super) fn quarantined(&mut self, first: DeviceError, outcome: Outcome) -> Failure {
        self.standing = Standing::Quarantined;
        self.ended(first, outcome)
    }

    fn ended(&mut self, first: DeviceError, outcome: Outcome) -> Failure {
        self.engaged = None;
        self.report(first, outcome)
    }

    fn report(&self, first: DeviceError, outcome: Outcome) -> Failure {
        let failure = Failure {
            first,
            state: self.last_seen(),
            outcome,
            standing: self.standing,
            steps: self.steps.clone(),
        };
        tracing::warn!(device = %self.device.identity(), %failure, "device operation failed");
        failure
    }
}
