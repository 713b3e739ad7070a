//! What can be said to an operation, why it is undone, and why something cannot be said to it now.

use std::fmt;
use std::time::Duration;

use vfio_checkpoint_fsm::handover::Unresolvable;

use super::{Entry, Phase};
use crate::operation::record::{AfterRecord, JobRecord};

/// Why an operation is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancel {
    /// Somebody asked.
    Requested {
        /// Who.
        by: String,
    },
    /// No stream was opened in time.
    NoStream {
        /// How long it was waited for.
        after: Duration,
    },
    /// The source of an arrival has given up.
    Abandoned {
        /// What it said.
        reason: String,
    },
    /// The agent ends.
    ShuttingDown,
}

impl fmt::Display for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested { by } => write!(f, "{by} asked for it"),
            Self::NoStream { after } => {
                write!(f, "nobody opened its stream within {}", humantime::format_duration(*after))
            }
            Self::Abandoned { reason } => write!(f, "the source gave it up: {reason}"),
            Self::ShuttingDown => f.write_str("the agent is shutting down"),
        }
    }
}

/// Why something cannot be said to an operation now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is over.
    #[error("it is over")]
    Over,
    /// It is past the point at which it can be undone.
    #[error("it is past its point of no return, in phase {phase:?}; wait for it to end")]
    PastNoReturn {
        /// Where it is.
        phase: Phase,
    },
    /// It is being undone.
    #[error("it is being undone")]
    Undone,
    /// It decides by itself.
    #[error("it was started with AUTO cutover, so it decides by itself when to stop the devices")]
    NotManual,
    /// It has no hold.
    #[error("it was started without a hold, so there is nothing to resume")]
    NoHold,
    /// It is not held yet.
    #[error("it is not held yet, it is in phase {phase:?}; watch it until it is HELD")]
    NotHeld {
        /// Where it is.
        phase: Phase,
    },
    /// Its stream is open, or was.
    #[error("its stream is open already, or was; start another operation")]
    StreamTaken,
    /// There is no such stream to resume.
    #[error(
        "it has no such stream to resume: it has another, or was opened by another identity or with version 1"
    )]
    OtherStream,
    /// It has none.
    #[error(
        "its state goes to a store or another agent, or comes from a store, so it has no stream; watch the operation instead"
    )]
    NoStream,
    /// It is of another kind.
    #[error("it moves no devices from node to node in the way that this is about")]
    NotAMigration,
    /// It goes on by itself.
    #[error("it was not started so that anybody has to say this; it goes on by itself")]
    NotAskedFor,
    /// The destination has not all state yet.
    #[error("the destination has not all state yet, it is in phase {phase:?}; watch it until it is PREPARED")]
    NotPrepared {
        /// Where it is.
        phase: Phase,
    },
    /// The destination has all state, and nobody has said Ready there.
    #[error("whoever uses its devices has not said Ready yet; send it again once that was said")]
    NotReady,
    /// Another epoch.
    #[error("the epochs are not those that Prepare answered")]
    StaleEpoch,
    /// Not in doubt.
    #[error("it is not in doubt, it is in phase {phase:?}; there is nothing to resolve")]
    NotInDoubt {
        /// Where it is.
        phase: Phase,
    },
    /// Nobody waits for the answer any more.
    #[error("whoever asked has hung up, so nothing was decided; look at it, and ask again")]
    CallerGone,
    /// No evidence.
    #[error("{0}")]
    Unresolvable(Unresolvable),
}

impl Entry {
    /// Says Cutover.
    pub fn cutover(&self) -> Result<(), Refused> {
        if !self.is_manual() {
            return Err(Refused::NotManual);
        }
        let view = self.view();
        if view.end.is_some() {
            return Err(Refused::Over);
        }
        // Also where its task has not come to it yet: what was undone first is not cut over.
        if view.phase == Phase::Unwinding || self.signals.cancel_reason().is_some() {
            return Err(Refused::Undone);
        }
        self.signals.say_cutover();
        Ok(())
    }

    /// Says Resume.
    pub fn resume(&self) -> Result<(), Refused> {
        match self.fixed.job {
            JobRecord::Save { after: AfterRecord::Hold, .. } | JobRecord::Restore { hold: true, .. } => {}
            JobRecord::Save { after: AfterRecord::Resume | AfterRecord::StayStopped, .. }
            | JobRecord::Restore { hold: false, .. }
            | JobRecord::Migrate { .. }
            | JobRecord::Arrive { .. } => return Err(Refused::NoHold),
        }
        let view = self.view();
        match view.phase {
            Phase::Held if self.signals.cancel_reason().is_some() => Err(Refused::Undone),
            Phase::Held => {
                self.signals.say_resume();
                Ok(())
            }
            // Said again while it has its effect. A hold that ran out ends without it, and is worth less.
            Phase::Resuming if self.signals.is_resumed() => Ok(()),
            Phase::Done => Err(Refused::Over),
            Phase::Resuming
            | Phase::WaitingForStream
            | Phase::Preparing
            | Phase::PreCopy
            | Phase::WaitingForCutover
            | Phase::Stopping
            | Phase::StopCopy
            | Phase::Sealing
            | Phase::Marking
            | Phase::Loading
            | Phase::Verifying
            | Phase::Prepared
            | Phase::Committing
            | Phase::LettingGo
            | Phase::Unwinding => Err(Refused::NotHeld { phase: view.phase }),
        }
    }

    /// Says Commit.
    pub fn commit(&self) -> Result<(), Refused> {
        match self.fixed.job {
            JobRecord::Migrate { manual_commit: true, .. } => {}
            JobRecord::Migrate { manual_commit: false, .. } => return Err(Refused::NotAskedFor),
            JobRecord::Save { .. } | JobRecord::Restore { .. } | JobRecord::Arrive { .. } => {
                return Err(Refused::NotAMigration);
            }
        }
        let view = self.view();
        match view.phase {
            Phase::Prepared if self.signals.cancel_reason().is_some() => Err(Refused::Undone),
            Phase::Prepared | Phase::Committing | Phase::LettingGo => {
                self.signals.say_commit();
                Ok(())
            }
            Phase::Done => Err(Refused::Over),
            Phase::Unwinding => Err(Refused::Undone),
            Phase::WaitingForStream
            | Phase::Preparing
            | Phase::PreCopy
            | Phase::WaitingForCutover
            | Phase::Stopping
            | Phase::StopCopy
            | Phase::Sealing
            | Phase::Held
            | Phase::Marking
            | Phase::Loading
            | Phase::Verifying
            | Phase::Resuming => Err(Refused::NotPrepared { phase: view.phase }),
        }
    }

    /// Whether Ready may be said. It may be so before it is waited for.
    pub fn takes_ready(&self) -> Result<(), Refused> {
        match self.fixed.job {
            JobRecord::Arrive { require_ready: true, .. } => {}
            JobRecord::Arrive { require_ready: false, .. } => return Err(Refused::NotAskedFor),
            JobRecord::Save { .. } | JobRecord::Restore { .. } | JobRecord::Migrate { .. } => {
                return Err(Refused::NotAMigration);
            }
        }
        let view = self.view();
        if view.end.is_some() {
            return Err(Refused::Over);
        }
        if view.phase == Phase::Unwinding || self.signals.cancel_reason().is_some() {
            return Err(Refused::Undone);
        }
        Ok(())
    }

    /// Says Cancel. An operation that is being undone already takes it as said again.
    pub fn cancel(&self, why: Cancel) -> Result<(), Refused> {
        let view = self.view();
        if view.end.is_some() {
            return Err(Refused::Over);
        }
        if !view.cancellable && view.phase != Phase::Unwinding {
            return Err(Refused::PastNoReturn { phase: view.phase });
        }
        self.signals.say_cancel(why);
        Ok(())
    }
}
