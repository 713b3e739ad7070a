//! One restore of a set of devices, from the admission to the last released lease.
//!
//! ```text
//!   Admitted
//!      | Start
//!   Entering                                 the old state goes
//!      |
//!   Loading
//!      |
//!   Verifying
//!      | the seal is verified
//!   FixingUp ----- hold ----> Held ---- the hold expires ----> Resetting
//!      | run at once           | Resume                          ^
//!      |<----------------------+                                 |
//!   AwaitingReady -------------- nobody says Ready in time ------+
//!      | Ready
//!   Quiescing                                if there is a barrier
//!      |
//!   Resuming
//!   - -|- - - point of no return: a device was found in RUNNING
//!   PartlyRunning
//!      |
//!   Completed
//!
//!   a failure, or Cancel in time:   on entry      Unwinding -> Aborted (preserved, or state lost)
//!                                   after it      Resetting -> Aborted (state lost)
//!                                   past the line Quarantined
//! ```
//!
//! Phases that the plan does not ask for are skipped. The complete picture, with every command, is in
//! `docs/restore.mmd`.
//!
//! # The point of no return
//!
//! It is the first device found in `RUNNING`. From then on the restored state acts on the world, and the set
//! can neither be reset as if it had never run nor be called restored before the last device runs too. Before
//! it, every failure resets the whole set. Cancel is honoured a little less long, while every device is still
//! in `RESUMING`: after that the answer would race with the SETs.
//!
//! The state that was in the devices before is gone much earlier, once the set is in `RESUMING`. Undoing a
//! restore gives devices that run, not devices that run what they ran before; [`Outcome::StateLost`] says so.
//!
//! # Invariants
//!
//! - No device leaves `RESUMING` towards `RUNNING` unless the seal was verified and the owner said Ready.
//! - No device runs freely before all have left `RESUMING`, if the plan has a barrier.
//! - A held restore whose deadline passes is reset, never run. So is one whose owner never says Ready.
//! - Success means that every device of the set was found in `RUNNING`.
//!
//! # Failure paths
//!
//! After a failed SET the executor reads back every device before it reports, and a device in `RUNNING` is
//! reported ([`RestoreEvent::AnyRunning`]) before the failure: that order decides between a reset and a
//! quarantine. Further failures while unwinding or resetting change nothing; the first error is the one that
//! is reported. Reports of a command that was overtaken by Cancel or the deadline are no-ops there.

mod event;
mod plan;
mod state;

pub use event::{RestoreCommand, RestoreEvent};
pub use plan::{AfterLoad, RestorePlan};
pub use state::RestoreState;

use crate::step::Verdict::{self, Ignore, Move, Refuse};
use crate::{Outcome, Step};

/// The answer of a restore to an event.
pub type RestoreStep = Step<RestoreState, RestoreEvent, RestoreCommand>;

type Answer = Verdict<RestoreState, RestoreCommand>;

impl RestoreState {
    /// Takes an event. The plan must be the same for the whole operation.
    pub fn on(self, plan: RestorePlan, event: RestoreEvent) -> RestoreStep {
        let answer = match event {
            RestoreEvent::Start => self.on_start(),
            RestoreEvent::AllEntered => {
                self.on_report(Self::Entering, Move(Self::Loading, RestoreCommand::Load))
            }
            RestoreEvent::AllLoaded => {
                self.on_report(Self::Loading, Move(Self::Verifying, RestoreCommand::Verify))
            }
            RestoreEvent::SealVerified => {
                self.on_report(Self::Verifying, Move(Self::FixingUp, RestoreCommand::FixUp))
            }
            RestoreEvent::FixedUp => self.on_report(Self::FixingUp, loaded(plan)),
            RestoreEvent::Ready => self.on_ready(plan),
            RestoreEvent::Resume => self.on_resume(plan),
            RestoreEvent::HoldExpired => self.on_hold_expired(),
            RestoreEvent::AllQuiesced => self.on_all_quiesced(),
            RestoreEvent::AnyRunning => self.on_any_running(),
            RestoreEvent::AllRunning => self.on_all_running(),
            RestoreEvent::Cancel => self.on_cancel(),
            RestoreEvent::Failed => self.on_failed(),
            RestoreEvent::Recovered => self.on_recovered(),
            RestoreEvent::AllReset => self.on_all_reset(),
            RestoreEvent::Unrecoverable => self.on_unrecoverable(),
        };
        answer.about(self, event)
    }

    fn on_start(self) -> Answer {
        if self == Self::Admitted { Move(Self::Entering, RestoreCommand::EnterResuming) } else { Refuse }
    }

    /// Ready before the fix-ups would not cover them; it is refused there, and the owner says it again.
    fn on_ready(self, plan: RestorePlan) -> Answer {
        match self {
            Self::Held { ready: false } => Move(Self::Held { ready: true }, RestoreCommand::AwaitResume),
            Self::AwaitingReady => run(plan),
            Self::Held { ready: true }
            | Self::Quiescing
            | Self::Resuming
            | Self::PartlyRunning
            | Self::Completed => Ignore,
            Self::Admitted
            | Self::Entering
            | Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Unwinding
            | Self::Resetting
            | Self::Aborted { .. }
            | Self::Quarantined => Refuse,
        }
    }

    /// A repeated call is a no-op while the first one has its effect, and refused once that is undone.
    fn on_resume(self, plan: RestorePlan) -> Answer {
        match plan.after {
            AfterLoad::Run => return Refuse,
            AfterLoad::Hold => {}
        }
        match self {
            Self::Held { ready: false } => Move(Self::AwaitingReady, RestoreCommand::AwaitReady),
            Self::Held { ready: true } => run(plan),
            Self::AwaitingReady
            | Self::Quiescing
            | Self::Resuming
            | Self::PartlyRunning
            | Self::Completed => Ignore,
            Self::Admitted
            | Self::Entering
            | Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Unwinding
            | Self::Resetting
            | Self::Aborted { .. }
            | Self::Quarantined => Refuse,
        }
    }

    /// The timer may lose the race against Resume, Ready, Cancel or a failure.
    fn on_hold_expired(self) -> Answer {
        match self {
            Self::Held { .. } | Self::AwaitingReady => reset_all(),
            Self::Quiescing | Self::Resuming | Self::PartlyRunning | Self::Unwinding | Self::Resetting => {
                Ignore
            }
            Self::Admitted
            | Self::Entering
            | Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Completed
            | Self::Aborted { .. }
            | Self::Quarantined => Refuse,
        }
    }

    /// Cancel cannot overtake this report or the next two, so late ones are defects and refused.
    fn on_all_quiesced(self) -> Answer {
        if self == Self::Quiescing { Move(Self::Resuming, RestoreCommand::Resume) } else { Refuse }
    }

    fn on_any_running(self) -> Answer {
        if self == Self::Resuming { Move(Self::PartlyRunning, RestoreCommand::FinishResume) } else { Refuse }
    }

    fn on_all_running(self) -> Answer {
        if matches!(self, Self::Resuming | Self::PartlyRunning) {
            Move(Self::Completed, RestoreCommand::Release)
        } else {
            Refuse
        }
    }

    fn on_cancel(self) -> Answer {
        match self {
            Self::Admitted => Move(Self::Aborted { outcome: Outcome::Preserved }, RestoreCommand::Release),
            Self::Entering => Move(Self::Unwinding, RestoreCommand::UndoEntry),
            Self::Loading | Self::Verifying | Self::FixingUp | Self::Held { .. } | Self::AwaitingReady => {
                reset_all()
            }
            Self::Unwinding | Self::Resetting | Self::Aborted { .. } => Ignore,
            Self::Quiescing | Self::Resuming | Self::PartlyRunning | Self::Completed | Self::Quarantined => {
                Refuse
            }
        }
    }

    fn on_failed(self) -> Answer {
        match self {
            Self::Admitted => Move(Self::Aborted { outcome: Outcome::Preserved }, RestoreCommand::Release),
            Self::Entering => Move(Self::Unwinding, RestoreCommand::UndoEntry),
            Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Held { .. }
            | Self::AwaitingReady
            | Self::Quiescing
            | Self::Resuming => reset_all(),
            Self::PartlyRunning => Move(Self::Quarantined, RestoreCommand::Quarantine),
            Self::Unwinding | Self::Resetting => Ignore,
            Self::Completed | Self::Aborted { .. } | Self::Quarantined => Refuse,
        }
    }

    fn on_recovered(self) -> Answer {
        if self == Self::Unwinding {
            Move(Self::Aborted { outcome: Outcome::Preserved }, RestoreCommand::Release)
        } else {
            Refuse
        }
    }

    fn on_all_reset(self) -> Answer {
        if matches!(self, Self::Unwinding | Self::Resetting) {
            Move(Self::Aborted { outcome: Outcome::StateLost }, RestoreCommand::Release)
        } else {
            Refuse
        }
    }

    fn on_unrecoverable(self) -> Answer {
        if matches!(self, Self::Unwinding | Self::Resetting) {
            Move(Self::Quarantined, RestoreCommand::Quarantine)
        } else {
            Refuse
        }
    }

    /// A report moves the state that waits for it. Where the restore is being undone, it comes from the
    /// command that was overtaken.
    fn on_report(self, awaiting: Self, then: Answer) -> Answer {
        if self == awaiting {
            then
        } else if matches!(self, Self::Unwinding | Self::Resetting) {
            Ignore
        } else {
            Refuse
        }
    }
}

const fn loaded(plan: RestorePlan) -> Answer {
    match plan.after {
        AfterLoad::Run => Move(RestoreState::AwaitingReady, RestoreCommand::AwaitReady),
        AfterLoad::Hold => Move(RestoreState::Held { ready: false }, RestoreCommand::AwaitResume),
    }
}

/// Reached only with a verified seal and with Ready.
const fn run(plan: RestorePlan) -> Answer {
    if plan.barrier {
        Move(RestoreState::Quiescing, RestoreCommand::EnterP2p)
    } else {
        Move(RestoreState::Resuming, RestoreCommand::Resume)
    }
}

const fn reset_all() -> Answer {
    Move(RestoreState::Resetting, RestoreCommand::ResetAll)
}
